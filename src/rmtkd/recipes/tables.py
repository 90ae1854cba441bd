"""Labelled rows of a parquet file."""

from pathlib import Path
from typing import Any

from rmtkd.errors import DataError


def read_table(path: Path, column: str, label: str, classes: int) -> tuple[list[Any], list[int]]:
    """Inputs and labels of a parquet file.

    Args:
        path: the file.
        column: name of the column of inputs.
        label: name of the column of class indices.
        classes: how many classes there are.

    Raises:
        DataError: if the file cannot be read, a column is missing, a value is empty, or a label is no class index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"the rows must be in {path}. There is no such file. Check --data or --file.")
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} must be a parquet file. Reading it gave: {error}. Fetch or write it again.") from None
    for name in (column, label):
        if name not in table.column_names:
            raise DataError(f"{path} must have a column {name!r}. It has {', '.join(table.column_names)}. Rename one.")
        if empty := table[name].null_count:
            raise DataError(f"column {name!r} of {path} must be filled. {empty} rows are empty. Remove them.")
    labels = table[label].to_pylist()
    for value in labels:
        if not isinstance(value, int) or not 0 <= value < classes:
            raise DataError(
                f"column {label!r} of {path} must hold class indices, whole numbers within 0..{classes - 1}. "
                f"Got {value!r}. Map the labels to their indices."
            )
    return table[column].to_pylist(), labels
