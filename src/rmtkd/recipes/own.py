"""Texts of the user's own, for a checkpoint of hers: a file that serves all roles, or a folder with files for them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from rmtkd.errors import DataError, OptionError
from rmtkd.recipes.checkpoints import load_classifier
from rmtkd.recipes.groups import by_shared_texts
from rmtkd.recipes.recipe import Recipe, Rows, Source
from rmtkd.recipes.rows import TokenRows
from rmtkd.recipes.tables import KINDS, read_columns
from rmtkd.recipes.text import (
    HELD_BATCH,
    MAX_LENGTH,
    TEACHING,
    Examples,
    encode,
    example,
    read_examples,
    rows_in_roles,
    start_text_classifier,
)

DESCRIBE = (
    "your own texts: --data FILE or FOLDER (parquet, CSV, TSV, JSON lines) with --columns TEXT[,SECOND] and --label; "
    "reported on test.*, else validation.* or dev.*, else on a fifth of the file"
)
LENGTH_STEP = 8
"""Lengths are measured in steps of so many tokens, as kernels like them."""


def own_recipe(columns: str | None, label: str | None, max_length: int | None) -> Recipe:
    """The recipe of some columns of the user's own tables.

    Args:
        columns: one column of texts, or two, with a comma between them; `text` by default.
        label: the column of labels; None for rows without labels.
        max_length: longest row, in tokens.

    Raises:
        OptionError: if there are no or more than two columns.
    """
    names = [name.strip() for name in ("text" if columns is None else columns).split(",")]
    if not all(names) or len(names) > 2:
        raise OptionError(f"--columns must name one column of texts or two. Got {columns!r}. Write --columns a,b.")
    longest = max_length or MAX_LENGTH
    return Recipe(
        name="text",
        describe=DESCRIBE,
        labels=None,
        start=partial(start, names, label),
        load=partial(load_classifier, labels=None),
        rows=partial(load_rows, names, label, longest),
        file_rows=partial(file_rows, names, label, longest),
        example=example_of_rows,
        **TEACHING,
    )


def find_files(data: Path | None) -> dict[str, Path]:
    """Files by role: `train`, and `selection` and `report` where they have their own.

    Raises:
        DataError: if it is not clear which file has which role.
    """
    if data is None:
        raise DataError(
            "the recipe text must have rows. Got none. Pass a file or a folder of files, and what its columns are: "
            "--data rows.csv --columns TEXT --label LABEL"
        )
    if not data.is_dir():
        return {"train": data}
    found: dict[str, Path] = {}
    for name, stems in (("train", ("train",)), ("test", ("test",)), ("dev", ("dev", "validation"))):
        files = sorted(path for path in data.iterdir() if path.stem in stems and path.suffix in KINDS)
        if len(files) > 1:
            raise DataError(
                f"{data} must hold one file of {name} rows. It holds {', '.join(file.name for file in files)}. Remove "
                "the others."
            )
        if files:
            found[name] = files[0]
    if "train" not in found or len(found) == 1:
        raise DataError(
            f"{data} must hold train.* and one of test.*, validation.*, dev.* ({', '.join(KINDS)}). It holds "
            f"{', '.join(sorted(path.name for path in data.iterdir())[:10]) or 'nothing'}. Rename them, or pass a file."
        )
    if "test" not in found:
        return {"train": found["train"], "report": found["dev"]}
    roles = {"train": "train", "dev": "selection", "test": "report"}
    return {roles[name]: path for name, path in found.items()}


def load_rows(
    columns: Sequence[str], label: str | None, max_length: int, data: Path | None, source: Source, seed: int
) -> Rows:
    """All rows by role, with the classes of the model.

    Raises:
        DataError: if the rows cannot be read, or there are too few.
    """
    files = find_files(data)
    examples = {role: read_own(path, columns, label, source.labels) for role, path in files.items()}
    labels = examples["train"].labels
    if labels is not None and len(set(labels)) < 2:
        raise _one_class(files["train"], label, source.labels[labels[0]] if labels else None)
    return rows_in_roles(
        source,
        examples["train"],
        examples.get("selection"),
        examples.get("report"),
        grouping=by_shared_texts,
        max_length=max_length,
        seed=seed,
    )


def file_rows(columns: Sequence[str], label: str | None, max_length: int, path: Path, source: Source) -> TokenRows:
    """The rows of one file."""
    return encode(source, read_own(path, columns, label, source.labels), max_length, batch_size=HELD_BATCH)


def read_own(path: Path, columns: Sequence[str], label: str | None, classes: Sequence[str]) -> Examples:
    """Texts and labels of a file, all texts filled.

    Raises:
        DataError: if the file cannot be read or does not hold texts and labels of these classes.
    """
    examples = read_examples(path, columns, label, classes)
    for i, row in enumerate(examples.texts):
        if not all(text.strip() for text in row):
            raise DataError(
                f"columns {', '.join(columns)} of {path} must be filled. Row {i + 1} holds an empty text. Remove it."
            )
    if not examples.texts:
        raise DataError(f"{path} must hold rows. It holds none. Check --data or --file.")
    return examples


def start(columns: Sequence[str], label: str | None, path: str | None, seed: int, data: Path | None) -> Source:
    """A pretrained checkpoint with a fresh head of the classes that the training file holds, in their order.

    Raises:
        DataError: if there are no labels, or fewer than two classes.
    """
    if label is None:
        raise DataError(
            "a teacher must be trained on labelled rows. Got no --label. Name the column of labels: --label COLUMN"
        )
    file = find_files(data)["train"]
    *_, values = read_columns(file, columns, label)
    classes = [str(value) for value in sorted(set(values))]
    if len(classes) < 2:
        raise _one_class(file, label, *classes or [None])
    return start_text_classifier(path, classes, seed)


def example_of_rows(model: nn.Module, rows: Rows) -> dict[str, Any]:
    """The batch whose cost is measured: as long as the median training row, in steps of eight tokens."""
    median = float(np.median(rows.train.lengths))
    return example(LENGTH_STEP * int(np.ceil(median / LENGTH_STEP)), model, rows)


def _one_class(file: Path, label: str | None, only: str | None) -> DataError:
    return DataError(
        f"column {label!r} of {file} must hold at least two classes. It holds {only or 'no labels'}. Check the column."
    )
