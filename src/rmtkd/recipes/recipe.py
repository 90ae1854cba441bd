"""What a recipe is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from rmtkd.distillation import Recovery

Collection = Any
"""Rows of a role: `TokenRows` or `ImageRows`, as the recipe has it."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a task by role. Calibration is a share of train."""

    train: Collection
    selection: Collection
    report: Collection
    note: str = ""
    """One line on where the rows come from and how they were divided."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and what must travel with it."""

    model: nn.Module
    tokenizer: Any = None
    preprocessor: Mapping[str, Any] | None = None
    """What transformers' `preprocessor_config.json` holds, of a model for images."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, by index, of a model that has a configuration."""
        config: Any = self.model.config
        return tuple(config.id2label[i] for i in range(config.num_labels))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A result on the report rows, as the records of the source repository hold it. Accuracies are in percent.

    Attributes:
        network: what was compressed.
        remains: the share that is left, in percent.
        cost: of what: parameters, or operations.
        accuracy: of the narrow model; the mean over seeds.
        spread: the standard deviation over seeds, or the standard error over rows of a single one.
        teacher: accuracy of the untouched model.
        rows: how many were reported on.
        epochs: of recovery.
        command: what measures it.
        records: the records of each seed, below `benchmarks/results`.
        teacher_record: the record of the teacher, where theirs do not hold it.
    """

    network: str
    remains: float
    cost: Literal["parameters", "operations"]
    accuracy: float
    spread: float
    teacher: float
    rows: int
    epochs: float
    command: str
    records: tuple[str, ...]
    teacher_record: str | None = None

    def line(self) -> str:
        """The result in one line, without its command."""
        seeds = len(self.records)
        return (
            f"{self.network} at {self.remains:.1f}% of the {self.cost}, {self.epochs:g} "
            f"epoch{'s' * (self.epochs != 1)} of recovery: {self.accuracy:.1f} ± {self.spread:.1f} %, teacher "
            f"{self.teacher:.1f} % (n = {self.rows:,}, {seeds} seed{'s' * (seeds != 1)})"
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A task: where its rows come from, which models do it, and settings that work.

    Attributes:
        describe: one line for `rmtkd ls`: what it is, and what it reports on.
        measured: a result on its report rows; None where none was measured.
        start: a model to be trained, from a path or hub name, or from nothing where the recipe can; seed of its head,
            data of which it must know the classes.
        load: a trained model, from a path or hub name; or from what is with the data.
        rows: all rows for a model, from `--data` or the recipe's own source; seed of the order.
        file_rows: the labelled rows of one file, for a model.
        example: the batch whose cost is measured, for a model and its rows.
        labels: names of the classes, by index; None where they are the model's.
        training: how a teacher is trained.
        epochs: passes over the training rows for a teacher.
        needs_no_checkpoint: whether a teacher can start from nothing.
        options: defaults of `schedule.Options` for this task.
    """

    name: str
    describe: str
    labels: tuple[str, ...] | None
    start: Callable[[str | None, int, Path | None], Source]
    load: Callable[..., Source]
    rows: Callable[[Path | None, Source, int], Rows]
    file_rows: Callable[[Path, Source], Collection]
    example: Callable[[nn.Module, Rows], Any]
    training: Recovery
    epochs: float
    measured: Measured | None = None
    needs_no_checkpoint: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
