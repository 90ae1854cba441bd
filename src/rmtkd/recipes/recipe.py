"""What a recipe is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from rmtkd.distillation import Recovery
from rmtkd.recipes.rows import TokenRows


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a task by role. Calibration is a share of train."""

    train: TokenRows
    selection: TokenRows
    report: TokenRows


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and the tokenizer that must travel with it."""

    model: nn.Module
    tokenizer: Any = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A task: where its rows come from, which models do it, and settings that work.

    Attributes:
        describe: one line for `rmtkd ls`.
        start: a model to be trained, from a path or hub name, or from nothing where the recipe can.
        load: a trained model, from a path or hub name.
        rows: all rows, from a folder of parquet files or the recipe's own source; tokenizer, seed of the order.
        file_rows: the labelled rows of one parquet file.
        example: the batch whose cost is measured.
        labels: names of the classes, by index.
        training: how a teacher is trained.
        epochs: passes over the training rows for a teacher.
        needs_no_checkpoint: whether a teacher can start from nothing.
        options: defaults of `schedule.Options` for this task.
    """

    name: str
    describe: str
    labels: tuple[str, ...]
    start: Callable[[str | None, int], Source]
    load: Callable[[str], Source]
    rows: Callable[[Path | None, Any, int], Rows]
    file_rows: Callable[[Path, Any], TokenRows]
    example: Callable[[nn.Module], dict[str, Any]]
    training: Recovery
    epochs: float
    needs_no_checkpoint: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
