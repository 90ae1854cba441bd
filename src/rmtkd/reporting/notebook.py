"""A result in a notebook: the same rows, and the widths as a picture."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from rmtkd.planning import Plan
from rmtkd.reporting.markup import Child, Html, element, table
from rmtkd.reporting.page import style
from rmtkd.reporting.plans import widths_of
from rmtkd.reporting.rows import size_headings, size_row, stopped, summary_rows
from rmtkd.reporting.silhouette import silhouette


def summary_html(record: Mapping[str, Any], plan: Plan) -> str:
    """What it costs, how well it does, and how wide it is."""
    key = f"widths-{secrets.token_hex(4)}"  # a notebook may show several
    drawing = silhouette(key, plan.sites, widths_of(record, plan))
    return _framed(result_table(record), element("p", f"{stopped(record)}."), drawing)


def result_table(record: Mapping[str, Any]) -> Html:
    """All rows of a result."""
    rows = [
        (element("span", row.name, class_="part") if row.is_part else row.name, row.before, row.after, row.change)
        for row in summary_rows(record)
    ]
    return table(("", "before", "after", "change"), rows, caption="What it costs and how well it does")


def sizes_html(records: Sequence[Mapping[str, Any]]) -> str:
    """Several sizes of one model."""
    rows = [size_row("untouched", records[0], is_untouched=True)]
    rows += [size_row(record["config"]["target"], record) for record in records]
    return _framed(table(("target", *size_headings(records[0])), rows, caption="Several sizes of one model"))


def _framed(*parts: Child) -> str:
    return element("div", element("style", Html(style("pictures.css"))), *parts, class_="rmtkd")
