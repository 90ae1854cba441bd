"""Pages written: of one run into its folder, of several where one says."""

from pathlib import Path

from rmtkd.checkpoint import REPORT
from rmtkd.errors import OptionError, RunError
from rmtkd.reporting.comparison import comparison_page
from rmtkd.reporting.evidence import Evidence, read_evidence, sizes_in
from rmtkd.reporting.page import write_page
from rmtkd.reporting.run_page import run_page


def write_report(*folders: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write what runs did as a page of HTML, from their records alone.

    A folder of several sizes gets a page that compares them, and each of its runs its own.

    Args:
        folders: run folders, finished or not, folders that hold only a plan, or folders of several sizes. More than one
            are compared.
        out: file of the page; `report.html` by default, in the folder if there is one, else here.

    Returns:
        The files that were written, the page that was asked for first.

    Raises:
        RunError: if a folder holds no run and no plan, no run is finished that could be compared, or a page cannot be
            written.
        PlanError: if a plan is broken.
    """
    if not folders:
        raise OptionError("a report is made of at least one run folder. Got none. Name one.")
    places = [Path(folder) for folder in folders]
    runs = [run for place in places for run in (sizes_in(place) or [place])]
    found = {name: read_evidence(run) for name, run in zip(_names(runs), runs, strict=True)}
    if len(places) == 1 and not sizes_in(places[0]):
        (one,) = found.values()
        return [write_page(Path(out) if out else one.folder / REPORT, run_page(one))]
    alone = len(places) == 1
    title = f"{places[0].resolve().name}: several sizes of one model" if alone else "Runs compared"
    page = write_page(Path(out) if out else places[0] / REPORT if alone else Path(REPORT), _compared(title, found))
    return [page, *(write_page(one.folder / REPORT, run_page(one)) for one in found.values() if alone)]


def _compared(title: str, found: dict[str, Evidence]) -> str:
    if not any(one.summary is not None for one in found.values()):
        first = next(iter(found.values())).folder
        raise RunError(
            "runs are compared by their results: at least one must be finished. None is. See how far one came: "
            f"rmtkd report {first}"
        )
    return comparison_page(title, found)


def _names(runs: list[Path]) -> list[str]:
    """Names of folders, with as much of their paths as tells them apart.

    Raises:
        OptionError: if one is given twice.
    """
    paths = [run.resolve() for run in runs]
    if twice := [str(run) for i, run in enumerate(runs) if paths[i] in paths[:i]]:
        raise OptionError(f"runs that are compared must differ. Got {twice[0]} twice. Leave it out.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [str(Path(*path.parts[-depth:])) for path in paths]
