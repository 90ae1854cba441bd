"""The pages of the site: hooks do what they promise, pictures are those of the records, links lead somewhere."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def building(name: str) -> ModuleType:
    """A file of `docs/building`, as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location(f"building_{name}", DOCS / "building" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Pictures


@pytest.mark.parametrize("name", building("pictures").PICTURES)
def test_a_committed_picture_is_what_the_records_give(name: str) -> None:
    """To a pixel, as another processor may round otherwise."""
    drawn, committed = building("pictures").PICTURES[name](), (DOCS / name).read_text(encoding="utf-8")
    number = re.compile(r"-?\d+(?:\.\d+)?")
    assert number.sub("#", drawn) == number.sub("#", committed)
    assert [float(n) for n in number.findall(drawn)] == pytest.approx(
        [float(n) for n in number.findall(committed)], abs=1.0
    )


# Formulas and pages from elsewhere


def test_formulas_become_mathml_in_lines_and_in_blocks() -> None:
    pytest.importorskip("latex2mathml")
    page = r'<p>so <span class="arithmatex">\(a \lt b\)</span></p><div class="arithmatex">\[ \sqrt{q} \]</div>'
    made = building("pages").on_page_content(page)
    assert "arithmatex" not in made and made.count("<math") == 2
    assert 'display="block"' in made and "<msqrt>" in made
    with pytest.raises(ValueError, match=r"Got \\unheardof"):
        building("pages").on_page_content(r'<span class="arithmatex">\(\unheardof x\)</span>')


def test_links_of_a_file_at_the_root_lead_to_pages() -> None:
    pages = building("pages")
    assert pages.links_within("see [results](docs/results.md) and [x](docs/a/b.md#c)") == (
        "see [results](results.md) and [x](a/b.md#c)"
    )
    assert all((ROOT / source).is_file() for source in pages.ELSEWHERE.values())


def test_links_to_files_of_the_repository_lead_to_pages() -> None:
    assert building("pages").on_page_markdown("[a](../CONTRIBUTING.md#x) [b](notebooks/digits.ipynb) `c.ipynb`") == (
        "[a](contributing.md#x) [b](notebooks/digits.md) `c.ipynb`"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_of_the_repository(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


# Notebooks


def output(kind: str, **fields: Any) -> dict[str, Any]:
    return {"output_type": kind, **fields}


def test_a_cell_is_shown_with_what_it_put_out() -> None:
    shown = building("notebooks").cell_markdown(
        {
            "cell_type": "code",
            "source": ["a = 1\n", "a"],
            "outputs": [
                output("stream", name="stdout", text="said\n"),
                output("stream", name="stderr", text="logged"),
                output("execute_result", data={"text/plain": "1"}),
                output("display_data", data={"text/plain": "x", "text/html": "<b>x</b>"}),
            ],
        }
    )
    assert "```python\na = 1\na\n```" in shown and "```text\nsaid\n```" in shown and "```text\n1\n```" in shown
    assert "<b>x</b>" in shown and "logged" not in shown and "\nx\n" not in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs_and_begin_with_words(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[0]["cell_type"] == "markdown" and "".join(cells[0]["source"]).startswith("# ")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


# Pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """The build checks this, too, and anchors; here README is among the pages."""
    generated = {*building("pages").ELSEWHERE, *(f"notebooks/{path.stem}.md" for path in NOTEBOOKS)}
    for link in re.findall(
        r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    ):
        if "://" not in link:
            target = (page.parent / link).resolve()
            assert target.exists() or str(target.relative_to(DOCS)) in generated, link


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (page for page in PAGES if page.is_relative_to(DOCS)):
        assert str(page.relative_to(DOCS)) in navigation


def test_commands_of_the_pages_are_commands() -> None:
    from typer.main import get_command

    from rmtkd.cli import app

    known: Any = get_command(app)
    for page in PAGES:
        if page.name in ("log.md", "design.md") or "results" in page.relative_to(ROOT).parts:  # of versions past, too
            continue
        for block in re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
            for line in re.findall(r"^rmtkd (.*)$", block, re.MULTILINE):
                name, *words = line.partition("#")[0].split()
                assert name in known.commands, f"{page}: rmtkd {line}"
                options = {option for parameter in known.commands[name].params for option in parameter.opts}
                if name != "bench":  # its words are the benchmark's
                    assert {word for word in words if word.startswith("--")} <= options | {"--help"}, f"{page}: {line}"
