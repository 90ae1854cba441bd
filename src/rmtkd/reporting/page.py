"""What every page is: one file that needs nothing else, readable with any browser, at any width, on paper too."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rmtkd.errors import RunError
from rmtkd.reporting.markup import Child, Html, element, join
from rmtkd.writing import write_atomically

GENERATOR = "rmtkd report"
FOOT = "Made by rmtkd from the records of the run alone. Nothing here is computed anew, and no weights were read."


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        key: by which the contents lead to it.
        title: its heading.
        body: what it holds.
    """

    key: str
    title: str
    body: Child


def page(*, over: str, title: str, lead: Child, notes: Sequence[Child], sections: Sequence[Section]) -> str:
    """A whole page.

    Args:
        over: a line above the title.
        title: of the page.
        lead: the first sentence.
        notes: what must be known before reading on.
        sections: in order.
    """
    contents = element("ul", [element("li", element("a", s.title, href=f"#{s.key}")) for s in sections])
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content=GENERATOR),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} · {over}"),
        element("style", Html(style("page.css") + style("pictures.css"))),
    )
    body = element(
        "body",
        element(
            "header",
            element("p", over, class_="over"),
            element("h1", breakable(title)),
            element("p", lead, class_="lead"),
            [element("p", note, class_="note") for note in notes],
            element("nav", contents, aria_label="Contents"),
        ),
        element("main", [_section(found) for found in sections]),
        element("footer", element("p", FOOT)),
        class_="rmtkd",
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def breakable(words: str) -> Html:
    """Words that may be broken before a capital within, as names of classes are long."""
    return join(
        [[element("wbr") if i else None, part] for i, part in enumerate(re.split(r"(?<=[a-z])(?=[A-Z])", words))]
    )


def _section(found: Section) -> Html:
    heading = element("h2", found.title, id=f"{found.key}-heading")
    return element("section", heading, found.body, id=found.key, aria_labelledby=f"{found.key}-heading")


def style(name: str) -> str:
    """A style sheet of this package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def figure(title: str, below: Child, drawing: Child, after: Child = None, *, wide: bool = False) -> Html:
    """A picture with its heading above, and a sentence below it or after it."""
    caption = element("figcaption", element("h3", title), None if below is None else element("p", below))
    end = None if after is None else element("p", after)
    return element("figure", caption, drawing, end, class_="wide" if wide else None)


def key(*entries: tuple[str, str, str]) -> Html:
    """What the marks of a picture mean: for each a class (`line`, `ring` or none), its style, its meaning."""
    return element(
        "ul", [element("li", words, class_=mark or None, style=look) for mark, look, words in entries], class_="key"
    )


def listed(sentences: Iterable[Child]) -> Html | None:
    """Sentences as a list; nothing where there are none."""
    found = list(sentences)
    return element("ul", [element("li", sentence) for sentence in found], class_="remarks") if found else None


def write_page(path: Path, content: str) -> Path:
    """Write a page, in place of one that was written before.

    Raises:
        RunError: if another file has its name, or it cannot be written.
    """
    try:
        if path.exists() and f'name="generator" content="{GENERATOR}"'.encode() not in path.read_bytes()[:4096]:
            raise RunError(
                f"a report takes the place of an earlier report alone. {path} is something else. Move it, or name "
                "another file: --out FILE."
            )
        write_atomically(path, content.encode())
    except OSError as error:
        raise RunError(
            f"the report must be written. {path} cannot be: {error.strerror or error}. Name a file: --out FILE."
        ) from error
    return path
