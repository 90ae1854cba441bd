"""The command that runs the benchmarks of the source repository: bench."""

import ast
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from rmtkd.cli.console import app, say
from rmtkd.errors import RunError, check_choice


@app.command(
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    options_metavar="",
)
def bench(
    words: Annotated[list[str] | None, typer.Argument(metavar="[NAME [ITS WORDS]...]", show_default=False)] = None,
) -> None:
    """Run a benchmark of a clone of the source repository; what follows its name is its own: `rmtkd bench NAME --help`.

    \b
    $ rmtkd bench vision run --model resnet56 --data DIR
    $ rmtkd bench
    ablation     What every part of the method is worth, on the small ...
    curve        Accuracy against parameters, from 50 % down to 5 %: ...
    """
    found = scripts()
    name, *its_own = words or ["--help"]
    if name == "--help":
        for known, script in found.items():
            said = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
            say(f"{known:12} {' '.join(said.partition('. ')[0].partition(chr(10) * 2)[0].split()).rstrip('.')}.")
        return
    check_choice("a benchmark", name, found, "What each is: rmtkd bench")
    # In this process: one that waits for another ends it a quarter of a second after Ctrl-C, in the middle of a step.
    script = str(found[name])
    sys.argv, sys.path[:0] = [script, *its_own], [str(found[name].parent)]
    runpy.run_path(script, run_name="__main__")


def scripts() -> dict[str, Path]:
    """The benchmarks by name: those of the clone that we are in, or that this package lies in.

    Raises:
        RunError: if there is none.
    """
    for root in (Path.cwd(), Path(__file__).parents[3]):
        if (root / "src" / "rmtkd").is_dir() and (root / "benchmarks").is_dir():
            paths = sorted((root / "benchmarks").glob("*.py"))
            return {p.stem.replace("_", "-"): p for p in paths if "__main__" in p.read_text(encoding="utf-8")}
    raise RunError(
        "benchmarks must be run from a clone of the source repository: they are not in the package. None is here. "
        "Clone it, and run there."
    )
