"""The command that writes pages: report."""

from pathlib import Path
from typing import Annotated

import typer

from rmtkd.cli.console import app, say


@app.command("report")
def report_runs(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, finished or not, or with a plan alone; the folder of several sizes.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the page goes; report.html by default, of one run in its folder, of several here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write what a run did as one page of HTML; of several runs, one page that compares them.

    \b
    $ rmtkd report runs/digits
    runs/digits/report.html
    $ rmtkd report runs/sizes
    runs/sizes/report.html
    runs/sizes/12%params/report.html
    ...
    $ rmtkd report runs/digits runs/layers --out comparison.html
    comparison.html
    """
    from rmtkd import reporting

    for page in reporting.write_report(*runs, out=out):
        say(str(page))
