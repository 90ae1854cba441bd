"""Hook of mkdocs: pages that live elsewhere in the repository, and mathematics without a script.

Formulas come from `pymdownx.arithmatex` as TeX and become MathML, which every present browser draws by itself.
"""

import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site, and the files of the repository that they are."""

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that live elsewhere."""
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=links_within(text)))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """Links to files of the repository, as they lead to pages of the site."""
    for page, source in ELSEWHERE.items():
        text = text.replace(f"](../{source}", f"]({page}")
    return re.sub(r"(\]\([\w./-]+)\.ipynb", r"\1.md", text)


def on_page_content(text: str, **_: Any) -> str:
    """Formulas as MathML."""
    text = BLOCK.sub(lambda found: mathml(found[1], display="block"), text)
    return INLINE.sub(lambda found: mathml(found[1], display="inline"), text)


def links_within(text: str) -> str:
    """Links of a file at the root of the repository, as they are from a page of the site."""
    return re.sub(r"\]\(docs/", "](", text)


def mathml(tex: str, *, display: str) -> str:
    """A formula as MathML.

    Raises:
        ValueError: if a command of it is not understood, which would be shown as it is written.
    """
    from latex2mathml.converter import convert

    made = convert(html.unescape(tex).strip(), display=display)
    if strange := re.search(r"\\[A-Za-z]+", made):
        raise ValueError(
            f"a formula must be of commands that latex2mathml knows. Got {strange[0]} in {tex!r}. Say it otherwise."
        )
    return made
