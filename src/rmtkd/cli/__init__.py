"""The command line: the same words as in Python."""

from rmtkd.cli import benchmarks, exports, facts, models, plans, reports, runs
from rmtkd.cli.console import app, fail, log_console, out_console
from rmtkd.errors import RmtkdError

EXTRAS = frozenset({"transformers", "datasets", "pyarrow", "sklearn", "PIL"})
"""Packages that come with the extras."""


def main() -> None:
    """Run the command line; errors of rmtkd are one message, not a traceback."""
    try:
        app()
    except KeyboardInterrupt as error:
        fail("interrupted", str(error) or "stopped at once. A run that had begun goes on with: rmtkd resume RUN")
    except RmtkdError as error:
        fail(type(error).__name__, str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        fail("missing package", f"{error.name} must be installed for this. Run: pip install 'rmtkd[text,vision,demo]'.")


__all__ = [
    "app",
    "benchmarks",
    "exports",
    "facts",
    "log_console",
    "main",
    "models",
    "out_console",
    "plans",
    "reports",
    "runs",
]
