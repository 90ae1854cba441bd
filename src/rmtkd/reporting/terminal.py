"""A result in a terminal, and as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rmtkd.reporting.rows import size_headings, size_row, sizes_notes, stopped, summary_rows


def summary(record: Mapping[str, Any]) -> Table:
    """The result as a table."""
    table = Table(title="what it costs and how well it does", title_justify="left", caption_justify="left")
    table.add_column("")
    for name in ("before", "after", ""):
        table.add_column(name, justify="right")
    for row in summary_rows(record):
        table.add_row(*row.cells)
    table.caption = stopped(record)
    return table


def summary_table(record: Mapping[str, Any], width: int = 110) -> str:
    """The result as plain text."""
    return _plain(summary(record), width)


def sizes_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Several sizes of one model in one table, a line for each target; the first is the untouched model."""
    table = Table(title="several sizes of one model", title_justify="left", caption_justify="left")
    table.add_column("target", no_wrap=True)
    for name in size_headings(records[0]):
        table.add_column(name, justify="right")
    named = {record["config"]["target"]: record for record in records}
    table.add_row(*size_row("untouched", records[0], is_untouched=True))
    for name, record in named.items():
        table.add_row(*size_row(name, record))
    table.caption = "\n".join(sizes_notes(named)) or None
    return table


def sizes_text(records: Sequence[Mapping[str, Any]], width: int = 120) -> str:
    """That table as plain text."""
    return _plain(sizes_table(records), width)


def _plain(table: Table, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
