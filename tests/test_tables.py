"""Tables of the user's own are read by the end of their name; what is no table of rows is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rmtkd.errors import DataError
from rmtkd.recipes.tables import class_indices, read_columns

TEXTS = ["plain", 'with "quotes", a comma', "123", "NA", "ünï – ✓", " spaces "]
LABELS = ["bad", "good", "bad", "bad", "good", "good"]


def write_csv(path: Path, texts: list[str], labels: list[Any]) -> None:
    import csv

    rows = [[text, label, 0.5] for text, label in zip(texts, labels, strict=True)]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label", "other"], *rows])


def write_tsv(path: Path, texts: list[str], labels: list[Any]) -> None:
    lines = ["text\tlabel\tother", *(f"{text}\t{label}\t0.5" for text, label in zip(texts, labels, strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_jsonl(path: Path, texts: list[str], labels: list[Any]) -> None:
    rows = [{"text": text, "label": label, "other": 0.5} for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_parquet(path: Path, texts: list[str], labels: list[Any]) -> None:
    table = pa.table({"text": texts, "label": labels, "other": [0.5] * len(texts)})
    pq.write_table(table.set_column(1, "label", table["label"].dictionary_encode()), path)


Writer = Callable[[Path, list[str], list[Any]], None]
WRITERS: dict[str, Writer] = {"csv": write_csv, "tsv": write_tsv, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_table_gives_the_same_columns(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, TEXTS, LABELS)
    assert read_columns(path, ["text"], "label") == [TEXTS, LABELS]
    assert read_columns(path, ["label", "text"]) == [LABELS, TEXTS]


@pytest.mark.parametrize("kind", WRITERS)
def test_whole_numbers_are_read_as_such_and_texts_as_texts(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    WRITERS[kind](path, ["1", "2"], [1, 0])
    assert read_columns(path, ["text"], "label") == [["1", "2"], [1, 0]]


def test_a_quoted_field_may_hold_line_ends(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", ["one\ntwo", "three"], [0, 1])
    assert read_columns(tmp_path / "rows.csv", ["text"]) == [["one\ntwo", "three"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"text\na\n", "must end in .parquet, .csv, .tsv, .jsonl. Got rows.txt"),
        ("rows", b"text\na\n", "must end in"),
        ("rows.csv", b"", "must be a CSV file. Reading it gave"),
        ("rows.csv", b"text,label\na,0\nb\n", "must be a CSV file. Reading it gave"),
        ("rows.csv", b"text,label\n\xff\xfe,0\n", "must be a CSV file. Reading it gave"),
        ("rows.tsv", b"", "must be a TSV file"),
        ("rows.jsonl", b'{"text": "a"', "must be a JSON lines file"),
        ("rows.parquet", b"text,label\na,0\n", "must be a parquet file"),
        ("rows.csv", b"body,label\na,0\n", "must have a column 'text'. It has body, label"),
        ("rows.csv", b"text,text,label\na,b,0\n", "must have a column 'text'. It has text, text, label"),
        ("rows.csv", b"text,class\na,0\n", "must have a column 'label'. It has text, class"),
        ("rows.csv", b"text,label\na,0\nb,\n", "column 'label' of .* must be filled. 1 rows are empty"),
        ("rows.jsonl", b'{"text": "a", "label": 0}\n{"label": 1}', "column 'text' of .* must be filled. 1 rows"),
    ],
)
def test_what_is_no_table_of_these_columns_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_columns(tmp_path / name, ["text"], "label")


def test_a_column_is_named_once(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", ["a"], [0])
    with pytest.raises(DataError, match=r"every column must be named once\. Got text, text"):
        read_columns(tmp_path / "rows.csv", ["text"], "text")


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        (["bad", "good"], ["good", "bad"], [1, 0]),
        (["bad", "good"], [1, 0, 1], [1, 0, 1]),
        (["bad", "good"], ["1", "bad"], [1, 0]),
        (["LABEL_0", "LABEL_1"], [1, 0], [1, 0]),
        (["1", "2", "3"], [3, 1], [2, 0]),  # names that are numbers are names
        (["0", "1"], [1, 0], [1, 0]),
        (["False", "True"], [True, False], [1, 0]),
    ],
)
def test_a_label_is_a_name_or_an_index(names: list[str], values: list[Any], expected: list[int]) -> None:
    assert class_indices(values, names, "column 'label'") == expected


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (["bad", "good"], ["god", "bad"], r"names of classes \(bad, good\) or their indices, .* 0..1. Got 'god'. Map"),
        (["bad", "good"], [2, 0, -1], "Got -1, 2. Map"),
        (["bad", "good"], [0.5], "Got 0.5"),
        (["1", "2", "3"], [0, 1], "Got 0"),
        (["1.0", "2.0", "3.0"], [1, 2], "Got 1, 2"),
        (["-1", "1e0"], [0], "Got 0"),
        (["bad", "good"], list("abcdef"), "Got 'a', 'b', 'c' and 3 more"),
    ],
)
def test_a_label_that_is_neither_is_named(names: list[str], values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_indices(values, names, "column 'label'")


def test_a_label_that_is_no_number_is_empty(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": [float("nan"), 1.0]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="1 rows are empty"):
        read_columns(tmp_path / "rows.parquet", ["text"], "label")


@pytest.mark.parametrize("values", [[b"0", b"1"], [[0], [1]], [{"a": 0}, {"a": 1}]])
def test_labels_that_are_neither_texts_nor_numbers_are_refused(tmp_path: Path, values: list[object]) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": values}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="must hold texts or numbers"):
        read_columns(tmp_path / "rows.parquet", ["text"], "label")


def test_json_lines_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes('{"text": "caf\u00e9", "label": 1}\n'.encode("latin-1"))
    with pytest.raises(DataError):
        read_columns(tmp_path / "rows.jsonl", ["text"], "label")
