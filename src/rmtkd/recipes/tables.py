"""Columns of a user's table: parquet, CSV, TSV or JSON lines."""

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rmtkd.errors import DataError

KINDS = {".parquet": "parquet", ".csv": "CSV", ".tsv": "TSV", ".jsonl": "JSON lines"}
"""What a file must be, by the end of its name."""


def read_columns(
    path: Path, columns: Sequence[str], label: str | None = None, *, binary: bool = False
) -> list[list[Any]]:
    """Columns of a table, without empty values; the labels, if they are asked for, last.

    Args:
        path: the file. CSV quotes a field that holds commas, quotes or line ends; TSV has no quotes.
        columns: names of the columns of inputs. In CSV and TSV they are read as texts, whatever they look like.
        label: name of the column of labels.
        binary: whether inputs are bytes, such as images.

    Raises:
        DataError: if the file cannot be read, a column is missing, or a value is empty.
    """
    import pyarrow as pa

    if not path.is_file():
        near = (
            sorted(file.name for file in path.parent.iterdir() if file.suffix in KINDS) if path.parent.is_dir() else []
        )
        beside = f" Beside it: {', '.join(near[:5])}." if near else ""
        raise DataError(
            f"the rows must be in {path}. There is no such file.{beside} Check --data or --file; your own files are "
            "for the recipe text: rmtkd compress text --data FILE --columns TEXT --label LABEL"
        )
    if path.suffix not in KINDS:
        raise DataError(f"a file of rows must end in {', '.join(KINDS)}. Got {path.name}. Convert or rename it.")
    names = [*columns, *([] if label is None else [label])]
    if len(set(names)) < len(names):
        raise DataError(f"every column must be named once. Got {', '.join(names)}. Check --columns and --label.")
    try:
        table = _read(path, columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} must be a {KINDS[path.suffix]} file. Reading it gave: {error}. Fetch or write it again."
        ) from None
    for name in names:
        if table.column_names.count(name) != 1:
            near = difflib.get_close_matches(name, table.column_names, n=1, cutoff=0.6)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"{path} must have a column {name!r}. It has {', '.join(table.column_names)}.{hint} Rename one, or "
                "name yours, which the recipe text takes: --columns TEXT[,SECOND] --label LABEL"
            )
    return [_filled(table[name], name, path, is_label=name == label, binary=binary) for name in names]


def _filled(column: Any, name: str, path: Path, *, is_label: bool, binary: bool) -> list[Any]:
    """The values of a column that has no empty ones."""
    import pyarrow as pa

    is_bytes = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    if binary and not is_label and not is_bytes:
        raise DataError(f"column {name!r} of {path} must hold bytes of images. It holds {column.type}. Convert it.")
    if (is_bytes and (is_label or not binary)) or (is_label and pa.types.is_nested(column.type)):
        raise DataError(f"column {name!r} of {path} must hold texts or numbers. It holds {column.type}. Convert it.")
    try:
        values = column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8. Reading it gave: {error}. Write it again.") from None
    if empty := sum(value is None or value != value for value in values):  # NaN is not itself
        raise DataError(f"column {name!r} of {path} must be filled. {empty} rows are empty. Remove them.")
    return values


def _read(path: Path, texts: Sequence[str]) -> Any:
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as file:
            return file.read()
    if path.suffix == ".jsonl":
        return json.read_json(path)
    quoted = path.suffix == ".csv"
    return csv.read_csv(
        path,
        parse_options=csv.ParseOptions(
            delimiter="," if quoted else "\t", quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
        convert_options=csv.ConvertOptions(column_types={name: pa.string() for name in texts}),
    )


def class_indices(values: Iterable[Any], names: Sequence[str], where: str) -> list[int]:
    """Labels as indices of classes.

    A label is the name of its class. Where no name is a number, as `1`, `-1` and `1.0` are, it may also be the index.

    Raises:
        DataError: naming the labels that are neither.
    """
    index = {name: i for i, name in enumerate(names)}
    if not any(map(_is_number, names)):
        index |= {str(i): i for i in range(len(names))}
    labels = list(values)
    unknown = sorted({repr(value) for value in labels if str(value) not in index})
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise DataError(
            f"{where} must hold names of classes ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''}) or "
            f"their indices, whole numbers within 0..{len(names) - 1}. Got {', '.join(unknown[:3])}{more}. Map the "
            "labels, or use a model with these classes."
        )
    return [index[str(value)] for value in labels]


def _is_number(name: str) -> bool:
    """Whether a name would be read as a finite number: `nan` and `infinity` are words."""
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False
