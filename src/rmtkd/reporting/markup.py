"""HTML and SVG from Python: text is escaped unless it is `Html`, so that no name in a record can become markup."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

VOID = frozenset({"meta", "br", "wbr", "circle", "line", "path", "polyline", "rect"})
"""Elements without contents."""


class Html(str):
    """Text that is markup already."""


Child = str | int | None | Iterable[Any]


def element(name: str, /, *children: Child, **attributes: Any) -> Html:
    """An element.

    Args:
        name: of the element.
        children: strings are escaped, `Html` is not; None is nothing; lists are taken apart.
        attributes: `class_` is `class`, `stroke_width` is `stroke-width`. None and False leave an attribute out, True
            gives it without a value; floats are written to a tenth, which is a tenth of a pixel.
    """
    given = {key: value for key, value in attributes.items() if value is not None and value is not False}
    written = "".join(_attribute(key, value) for key, value in given.items())
    if name in VOID:
        return Html(f"<{name}{written}>" if name in ("meta", "br", "wbr") else f"<{name}{written}/>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """Children one after the other."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str | int):
        return Html(html.escape(str(children), quote=False))
    return Html("".join(join(child) for child in children))


def table(headings: Sequence[str], rows: Iterable[Sequence[Child]], *, caption: str, texts: Iterable[int] = ()) -> Html:
    """A table that scrolls within a box of its own where it is wider than the page.

    Args:
        headings: above the columns.
        rows: cells; the first of each heads its row.
        caption: what the table is of.
        texts: columns of words; the others are numbers, and stand at the right.
    """
    words = {0, *texts}
    kinds = [None if i in words else "number" for i in range(len(headings))]
    head = [element("th", name, scope="col", class_=kind) for name, kind in zip(headings, kinds, strict=True)]
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [element("td", c, class_=k) for c, k in zip(row[1:], kinds[1:], strict=True)],
        )
        for row in rows
    ]
    found = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", element("tr", head)),
        element("tbody", body),
    )
    return element("div", found, class_="scroll", role="region", aria_label=caption, tabindex=0)


def _attribute(key: str, value: Any) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(text)}"'
