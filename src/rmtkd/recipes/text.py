"""Text classification: SST-2."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rmtkd.distillation import Recovery
from rmtkd.errors import DataError
from rmtkd.recipes.checkpoints import load_classifier, start_classifier
from rmtkd.recipes.recipe import Recipe, Rows, Source
from rmtkd.recipes.rows import TokenRows, synthetic_batch

SELECTION_PARTS = 20
"""One row in twenty is a selection row, by a hash of its text: the same rows in every command and whatever the seed, and
repeated texts fall on one side."""
EXAMPLE = (32, 32)
"""Batch and length in tokens whose cost is measured."""


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """Where the rows of a text task are: parquet files in `--data`, or a data set of the hub."""

    train_file: str
    report_file: str
    column: str
    label: str
    hub_name: str
    hub_column: str
    hub_report_split: str
    labels: tuple[str, ...]
    max_length: int = 128


def is_selection(text: str) -> bool:
    """Whether a training row with this text is held out for selection."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % SELECTION_PARTS == 0


def read_parquet(path: Path, text: str, label: str) -> tuple[list[str], list[int]]:
    """Texts and labels of a parquet file.

    Raises:
        DataError: if the file or a column is missing, or a value is empty.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"the rows must be in {path}. There is no such file. Check --data or --file.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} must be a parquet file. Reading it gave: {error}.") from None
    for column in (text, label):
        if column not in table.column_names:
            raise DataError(
                f"{path} must have a column {column!r}. It has {', '.join(table.column_names)}. Rename one."
            )
        if table[column].null_count:
            raise DataError(f"column {column!r} of {path} must be filled. {table[column].null_count} rows are empty.")
    return table[text].to_pylist(), table[label].to_pylist()


def encode(task: TextTask, tokenizer: Any, texts: Sequence[str], labels: Sequence[int], **rows: Any) -> TokenRows:
    """Texts as rows of token ids."""
    if tokenizer is None:
        raise DataError("a text model must come with its tokenizer. Its folder holds none. Save one beside it.")
    ids = tokenizer(list(texts), truncation=True, max_length=task.max_length)["input_ids"] if texts else []
    return TokenRows(ids, labels, pad_id=tokenizer.pad_token_id or 0, **rows)


def load_rows(task: TextTask, data: Path | None, tokenizer: Any, seed: int) -> Rows:
    """All rows of the task by role."""
    if data is not None:
        texts, labels = read_parquet(data / task.train_file, task.column, task.label)
        report = read_parquet(data / task.report_file, task.column, task.label)
    else:
        from datasets import load_dataset

        hub = load_dataset(task.hub_name)
        texts, labels = list(hub["train"][task.hub_column]), list(hub["train"]["label"])
        split = hub[task.hub_report_split]
        report = list(split[task.hub_column]), list(split["label"])
    held = [is_selection(text) for text in texts]

    def part(selected: bool) -> tuple[list[str], list[int]]:
        keep = [i for i, h in enumerate(held) if h == selected]
        return [texts[i] for i in keep], [labels[i] for i in keep]

    return Rows(
        train=encode(task, tokenizer, *part(False), seed=seed),
        selection=encode(task, tokenizer, *part(True), batch_size=64),
        report=encode(task, tokenizer, *report, batch_size=64),
    )


def file_rows(task: TextTask, path: Path, tokenizer: Any) -> TokenRows:
    """The labelled rows of one parquet file."""
    return encode(task, tokenizer, *read_parquet(path, task.column, task.label), batch_size=64)


def start(task: TextTask, path: str | None, seed: int) -> Source:
    """A pretrained checkpoint with a fresh head."""
    if path is None:
        raise DataError("a text teacher must start from a checkpoint. Got none. Pass --model PATH_OR_HUB_NAME.")
    return start_classifier(path, task.labels, seed)


def example(model: nn.Module) -> dict[str, Any]:
    """The batch whose cost is measured."""
    return synthetic_batch(model.config.vocab_size, *EXAMPLE)


SST2_TASK = TextTask(
    train_file="sst2_train.parquet",
    report_file="sst2_dev.parquet",
    column="text",
    label="label",
    hub_name="stanfordnlp/sst2",
    hub_column="sentence",
    hub_report_split="validation",
    labels=("negative", "positive"),
)

SST2 = Recipe(
    name="sst2",
    describe="SST-2, sentiment of film reviews: 67,349 phrases; reported on the 872 dev sentences",
    labels=SST2_TASK.labels,
    start=partial(start, SST2_TASK),
    load=load_classifier,
    rows=partial(load_rows, SST2_TASK),
    file_rows=partial(file_rows, SST2_TASK),
    example=example,
    training=Recovery(lr=4e-5, weight_decay=0.01),
    epochs=3,
    average=True,
    options={},
)
