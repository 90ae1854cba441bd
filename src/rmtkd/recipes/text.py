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
from rmtkd.recipes.tables import read_table

SELECTION_PARTS = 20
"""One row in twenty is a selection row, by a hash of its text: the same rows in every command and whatever the seed,
and repeated texts fall on one side."""
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


def read_texts(task: TextTask, path: Path) -> tuple[list[str], list[int]]:
    """Texts and labels of a parquet file.

    Raises:
        DataError: if the file cannot be read or does not hold texts and class indices.
    """
    texts, labels = read_table(path, task.column, task.label, len(task.labels))
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"column {task.column!r} of {path} must hold texts. Got {text!r}. Check the column.")
    return texts, labels


def fetch_texts(task: TextTask) -> list[tuple[list[str], list[int]]]:
    """Texts and labels of the training and report rows, from the hub.

    Raises:
        DataError: if the hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        hub = load_dataset(task.hub_name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"without --data the rows come from the hub, {task.hub_name}. Fetching them gave: {error}. Pass --data, a "
            f"folder with {task.train_file} and {task.report_file}."
        ) from None
    splits = [hub[name] for name in ("train", task.hub_report_split)]
    return [(list(split[task.hub_column]), list(split["label"])) for split in splits]


def encode(task: TextTask, tokenizer: Any, texts: Sequence[str], labels: Sequence[int], **rows: Any) -> TokenRows:
    """Texts as rows of token ids, cut to what the task and the model allow.

    Raises:
        DataError: if there is no tokenizer.
    """
    if tokenizer is None:
        raise DataError("a text model must come with its tokenizer. Its folder holds none. Save one beside it.")
    longest = min(task.max_length, tokenizer.model_max_length)
    ids = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"] if texts else []
    return TokenRows(ids, labels, pad_id=tokenizer.pad_token_id or 0, **rows)


def load_rows(task: TextTask, data: Path | None, tokenizer: Any, seed: int) -> Rows:
    """All rows of the task by role. A text has one role: what is reported on is neither trained on nor selected by.

    Raises:
        DataError: if the rows cannot be read, or there are too few.
    """
    if data is not None:
        train, report = (read_texts(task, data / name) for name in (task.train_file, task.report_file))
    else:
        train, report = fetch_texts(task)
    reported = set(report[0])

    def part(selected: bool) -> tuple[list[str], list[int]]:
        rows = [row for row in zip(*train, strict=True) if row[0] not in reported and is_selection(row[0]) == selected]
        if not rows:
            role = "selection" if selected else "training"
            raise DataError(
                f"one training row in {SELECTION_PARTS} is held out for selection. Of {len(train[0])} rows none is "
                f"left as a {role} row. Pass more rows."
            )
        texts, labels = zip(*rows, strict=True)
        return list(texts), list(labels)

    return Rows(
        train=encode(task, tokenizer, *part(False), seed=seed),
        selection=encode(task, tokenizer, *part(True), batch_size=64),
        report=encode(task, tokenizer, *report, batch_size=64),
    )


def file_rows(task: TextTask, path: Path, tokenizer: Any) -> TokenRows:
    """The labelled rows of one parquet file."""
    return encode(task, tokenizer, *read_texts(task, path), batch_size=64)


def start(task: TextTask, path: str | None, seed: int) -> Source:
    """A pretrained checkpoint with a fresh head."""
    if path is None:
        raise DataError("a text teacher must start from a checkpoint. Got none. Pass --model PATH_OR_HUB_NAME.")
    return start_classifier(path, task.labels, seed)


def example(model: nn.Module) -> dict[str, Any]:
    """The batch whose cost is measured."""
    config: Any = model.config
    return synthetic_batch(config.vocab_size, *EXAMPLE)


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
    load=partial(load_classifier, labels=SST2_TASK.labels),
    rows=partial(load_rows, SST2_TASK),
    file_rows=partial(file_rows, SST2_TASK),
    example=example,
    training=Recovery(lr=4e-5, average=0.999),
    epochs=3.0,
    options={},
)
