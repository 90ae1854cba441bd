"""What the commands share: where they are registered, where they print, and what ends them."""

import sys
from typing import NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    help="Make a trained model several times smaller, faster and dense, with the evidence of what that costs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out_console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width
log_console = Console(stderr=True)


def command_line() -> list[str]:
    """The words by which this process was called."""
    return ["rmtkd", *sys.argv[1:]]


def say(text: str) -> None:
    """A line of the result, to standard output; the terminal wraps it."""
    out_console.print(text, highlight=False, soft_wrap=True, markup=False)


def log(text: str) -> None:
    """A line about what is going on, to standard error."""
    log_console.print(text, highlight=False, soft_wrap=True, markup=False)


def fail(kind: str, message: str) -> NoReturn:
    """Tell what is wrong, and end."""
    log_console.print(f"[bold red]error:[/] {kind}", highlight=False)
    log(message)
    sys.exit(2)
