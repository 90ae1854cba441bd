"""Classification of texts and of pairs of texts: from columns to rows of token ids in their roles."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from rmtkd.distillation import Recovery
from rmtkd.errors import DataError
from rmtkd.recipes.checkpoints import load_classifier, start_classifier
from rmtkd.recipes.groups import Assignment, Grouping, Texts, assign, by_shared_texts
from rmtkd.recipes.recipe import Recipe, Rows, Source
from rmtkd.recipes.results import MEASURED
from rmtkd.recipes.rows import TokenRows, synthetic_batch
from rmtkd.recipes.tables import class_indices, read_columns

BATCH = 32
"""Rows of the batch whose cost is measured."""
HELD_BATCH = 64
"""Rows of a batch that is evaluated, not trained on."""
MAX_LENGTH = 128
"""Longest row in tokens, unless `--max-length` says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Texts and labels in the order of their source."""

    texts: list[Texts]
    labels: list[int] | None

    def take(self, rows: Sequence[int]) -> "Examples":
        """Some of them."""
        labels = None if self.labels is None else [self.labels[i] for i in rows]
        return Examples(texts=[self.texts[i] for i in rows], labels=labels)


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """A published task: parquet files in `--data`, or a data set of the hub, and how its rows hang together.

    Attributes:
        train_files: names of the file to train on, the first that is there.
        report_files: names of the file to report on.
        columns: names of one or two columns of texts in the files.
        hub: name on the hub.
        hub_config: configuration there, if it has any.
        hub_columns: names of the columns there, if they differ.
        hub_report: the split to report on; its training split is `train`.
        labels: names of the classes, by index.
        grouping: which rows must have one role.
        divides_report: whether the report file serves all roles where there is no file to train on.
        length: of the batch whose cost is measured, in tokens.
        max_length: longest row, in tokens.
    """

    train_files: tuple[str, ...]
    report_files: tuple[str, ...]
    columns: tuple[str, ...]
    hub: str
    hub_config: str | None = None
    hub_columns: tuple[str, ...] | None = None
    hub_report: str = "validation"
    labels: tuple[str, ...]
    grouping: Grouping = by_shared_texts
    divides_report: bool = False
    length: int = 64
    max_length: int = MAX_LENGTH


def read_examples(path: Path, columns: Sequence[str], label: str | None, classes: Sequence[str]) -> Examples:
    """Texts and labels of a file.

    Raises:
        DataError: if the file cannot be read or does not hold texts and labels of these classes.
    """
    texts = read_columns(path, columns, label)
    labels = None if label is None else class_indices(texts.pop(), classes, f"column {label!r} of {path}")
    for name, column in zip(columns, texts, strict=True):
        for text in column:
            if not isinstance(text, str):
                raise DataError(f"column {name!r} of {path} must hold texts. Got {text!r}. Check the column.")
    return Examples(texts=list(zip(*texts, strict=True)), labels=labels)


def find_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that is there; the first name if none is."""
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def fetch_examples(task: TextTask) -> list[Examples]:
    """The training and report rows, from the hub.

    Raises:
        DataError: if the hub cannot be reached.
    """
    from datasets import load_dataset

    try:
        hub = load_dataset(task.hub, task.hub_config)
    except (OSError, ValueError) as error:
        raise DataError(
            f"without --data the rows come from the hub, {task.hub}. Fetching them gave: {error}. Pass "
            f"--data, a folder with {task.train_files[0]} and {task.report_files[0]}."
        ) from None
    columns = task.hub_columns or task.columns
    return [
        Examples(texts=list(zip(*(split[name] for name in columns), strict=True)), labels=list(split["label"]))
        for split in (hub["train"], hub[task.hub_report])
    ]


def encode(source: Source, examples: Examples, max_length: int, **rows: Any) -> TokenRows:
    """Texts as rows of token ids, cut to what the task and the model allow. Of a pair the longer text is cut.

    Raises:
        DataError: if there is no tokenizer.
    """
    tokenizer, config = source.tokenizer, getattr(source.model, "config", None)
    if tokenizer is None:
        raise DataError("a text model must come with its tokenizer. Its folder holds none. Save one beside it.")
    columns = [list(column) for column in zip(*examples.texts, strict=True)]
    longest = min(max_length, tokenizer.model_max_length)
    # A single text has type 0 throughout, which is what a model assumes; some models know no types at all. Asked for by
    # name: the tokenizer of a folder of ours is of a general class that makes none by itself.
    typed = len(columns) > 1 and getattr(config, "type_vocab_size", 0) > 1
    made = tokenizer(*columns, truncation=True, max_length=longest, return_token_type_ids=typed)
    return TokenRows(
        made["input_ids"],
        examples.labels,
        types=made["token_type_ids"] if typed else None,
        pad_id=tokenizer.pad_token_id or 0,
        **rows,
    )


def rows_in_roles(
    source: Source,
    train: Examples,
    selection: Examples | None,
    report: Examples | None,
    *,
    grouping: Grouping,
    max_length: int,
    seed: int,
) -> Rows:
    """All rows by role. A text has one role: what is reported on is neither trained on nor selected by.

    Args:
        source: the model that the rows are for.
        train: rows to train on, and the source of the roles that have no rows of their own.
        selection: rows for selection, if there are any.
        report: rows for the report, if there are any.
        grouping: which rows must have one role.
        max_length: longest row, in tokens.
        seed: of the order of the training rows.

    Raises:
        DataError: if there are too few rows.
    """
    given = [None if examples is None else examples.texts for examples in (selection, report)]
    roles = assign(train.texts, *given, grouping=grouping)
    return Rows(
        train=encode(source, train.take(roles.train), max_length, seed=seed),
        selection=encode(source, (selection or train).take(roles.selection), max_length, batch_size=HELD_BATCH),
        report=encode(source, (report or train).take(roles.report), max_length, batch_size=HELD_BATCH),
        note=_note(roles, divided=report is None),
    )


def _note(roles: Assignment, *, divided: bool) -> str:
    counts = [len(rows) for rows in (roles.train, roles.selection, roles.report)]
    note = "{:,} training, {:,} selection and {:,} report rows".format(*counts)
    if divided:
        note += " of one file, divided by a hash so that no text has two roles: its report rows are not a published set"
    if roles.left_out:
        note += f"; {roles.left_out:,} left out, for a text they share with held-out rows"
    return note


def load_rows(task: TextTask, data: Path | None, source: Source, seed: int) -> Rows:
    """All rows of a published task by role.

    Raises:
        DataError: if the rows cannot be read, or there are too few.
    """
    if data is None:
        train, report = fetch_examples(task)
    else:
        read = partial(read_examples, columns=task.columns, label="label", classes=task.labels)
        train_file, report_file = find_file(data, task.train_files), find_file(data, task.report_files)
        if task.divides_report and not train_file.is_file():
            train, report = read(report_file), None
        else:
            train, report = read(train_file), read(report_file)
    return rows_in_roles(source, train, None, report, grouping=task.grouping, max_length=task.max_length, seed=seed)


def file_rows(task: TextTask, path: Path, source: Source) -> TokenRows:
    """The labelled rows of one file."""
    return encode(
        source, read_examples(path, task.columns, "label", task.labels), task.max_length, batch_size=HELD_BATCH
    )


def start(task: TextTask, path: str | None, seed: int, data: Path | None) -> Source:
    """A pretrained checkpoint with a fresh head."""
    return start_text_classifier(path, task.labels, seed)


def start_text_classifier(path: str | None, labels: Sequence[str], seed: int) -> Source:
    """A pretrained checkpoint with a fresh head of these classes.

    Raises:
        DataError: if no checkpoint is named.
    """
    if path is None:
        raise DataError(
            "a text teacher must start from a checkpoint. Got none. Pass --model PATH_OR_HUB_NAME, such as "
            "--model google-bert/bert-base-uncased"
        )
    return start_classifier(path, labels, seed)


def example(length: int, model: nn.Module, rows: Rows) -> dict[str, Any]:
    """The batch whose cost is measured."""
    config: Any = model.config
    return synthetic_batch(config.vocab_size, BATCH, length)


def text_recipe(name: str, describe: str, task: TextTask) -> Recipe:
    """The recipe of a published task."""
    return Recipe(
        name=name,
        describe=describe,
        labels=task.labels,
        start=partial(start, task),
        load=partial(load_classifier, labels=task.labels),
        rows=partial(load_rows, task),
        file_rows=partial(file_rows, task),
        example=partial(example, task.length),
        measured=MEASURED.get(name),
        **TEACHING,
    )


TEACHING: dict[str, Any] = {"training": Recovery(lr=4e-5, average=0.999), "epochs": 3.0}
"""How teachers of texts are trained: measured on SST-2 (docs/log.md)."""
