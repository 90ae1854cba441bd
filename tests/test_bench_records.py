"""The claims of records of benchmarks: a cell is written whole or not at all, and a table of the pages is what its
records give."""

import importlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import BENCHMARKS
from rmtkd.errors import DataError

FULL_DISK = """
import resource
import sys
from pathlib import Path

from records import cell

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
cell(Path(sys.argv[1]), lambda: {"accuracy": 0.5, "losses": [1.0] * 1000})
"""


def test_a_record_that_could_not_be_written_whole_is_not_there(tmp_path: Path) -> None:
    words = [sys.executable, "-c", FULL_DISK, tmp_path / "cell.json"]
    done = subprocess.run(words, cwd=BENCHMARKS, capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_record_of_another_teacher_is_refused_and_stays(benchmark: Any, tmp_path: Path) -> None:
    records, path = benchmark("records"), tmp_path / "cell.json"
    made = records.cell(path, lambda: {"accuracy": 0.5}, teacher_id="a")
    assert made["teacher_id"] == "a"
    content = path.read_bytes()
    assert records.cell(path, lambda: {"accuracy": 0.7}, teacher_id="a") == made
    with pytest.raises(DataError, match="this record is of another teacher"):
        records.cell(path, lambda: {"accuracy": 0.7}, teacher_id="b")
    assert path.read_bytes() == content


TABLES: Mapping[str, Callable[[Any], str]] = {
    "curve": lambda module: module.table(),
    "embedding": lambda module: module.table(),
    "vision": lambda module: module.table(),
    "ablation": lambda module: module.table(module.RESULTS),
    "shift": lambda module: module.table(module.RESULTS),
    "peers": lambda module: module.table(module.RESULTS),
    "paper-text": lambda module: published_table(module),
    "paper-vision": lambda module: published_table(module),
}


def published_table(module: Any) -> str:
    """A table of the published evaluation."""
    results = BENCHMARKS / "results" / module.__name__.replace("_", "-")
    return importlib.import_module("paper_table").table(results, module.REPORTED)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_pages_is_what_its_records_give(name: str, benchmark: Any) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (BENCHMARKS.parent / "docs" / "results").glob("*.md")]
    (page,) = [page for page in pages if f"<!-- {name} -->\n" in page]
    committed = page.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]
    assert TABLES[name](benchmark(name.replace("-", "_"))) == committed
