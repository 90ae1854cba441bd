"""A task's rows and those of another domain, and models that were cut on either: what `shift.py` measures."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from corruptions import CORRUPTIONS, SEVERITIES, mixture
from records import identity, kept, print_event
from rmtkd import batches as batching
from rmtkd import compression, recipes
from rmtkd.batches import Batch
from rmtkd.distillation import Recovery, Teacher
from rmtkd.environment import precision_on
from rmtkd.recipes.images import ImageRows
from rmtkd.recipes.rows import TokenRows
from rmtkd.training import Phase

SEEN = ("own", "other", "mixed")
"""Whose rows a cut sees."""
RECOVERED = ("closed form", "own rows", "seen rows")
"""How it recovered: not, on the task's rows, or on rows of what it has seen by the teacher's answers alone."""
OTHER = {"sst2": "ag_news", "ag_news": "sst2"}
IMAGES = ("cifar10", "digits_cnn")
CALIBRATION = 0.04
SPOILED = 3
"""Severity of the images that are calibrated on."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is done.

    Attributes:
        targets: of each task.
        epochs: of recovery, over the task's own rows.
        images: at most so many test images.
        corruptions: kinds and severities of them.
    """

    targets: Mapping[str, str]
    epochs: float
    images: int
    corruptions: tuple[Sequence[str], Sequence[int]]


TARGETS = {"sst2": "10%params", "ag_news": "10%params", "cifar10": "39%flops"}
SCALES = {
    "tiny": Scale(
        targets={"digits": "25%params", "digits_cnn": "40%flops"},
        epochs=0.25,
        images=450,
        corruptions=(("gaussian noise", "fog"), (3,)),
    ),
    "cpu": Scale(targets=TARGETS, epochs=0.5, images=2500, corruptions=(tuple(CORRUPTIONS), SEVERITIES)),
    "full": Scale(targets=TARGETS, epochs=3.0, images=10_000, corruptions=(tuple(CORRUPTIONS), SEVERITIES)),
}


class Mixed:
    """Batches of two collections in turns, as many in all as the first has."""

    def __init__(self, own: Iterable[Batch], other: Iterable[Batch]):
        self.own, self.other = own, other

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        for rows in (self.own, self.other):
            batching.set_epoch(rows, epoch)

    def __iter__(self) -> Iterator[Batch]:
        own, other = list(self.own), list(self.other)  # spread evenly: collections are sorted by length
        for i, mine in enumerate(own):
            yield other[i * len(other) // len(own)] if i % 2 else mine


class Unlabelled:
    """A collection of batches without labels."""

    def __init__(self, rows: Iterable[Any]):
        self.rows = rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        batching.set_epoch(self.rows, epoch)

    def __iter__(self) -> Iterator[Batch]:
        return ({name: value for name, value in batch.items() if name != "labels"} for batch in self.rows)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A task, its teacher, its rows and those of another domain."""

    task: str
    teacher: str
    data: Path | None
    seed: int
    cache: Path
    scale: Scale

    @cached_property
    def recipe(self) -> Any:
        """The task."""
        return recipes.get(self.task)

    @cached_property
    def source(self) -> Any:
        """The teacher with its tokenizer."""
        return self.recipe.load(self.teacher, self.data)

    @cached_property
    def teacher_id(self) -> str:
        """Its weights, in a word."""
        return identity(self.source.model)

    @cached_property
    def own(self) -> Any:
        """Its rows by role."""
        return self.recipe.rows(self.data, self.source, self.seed)

    @cached_property
    def other(self) -> Any:
        """Rows of another domain in the teacher's tokens: another task's texts, spoiled images, digits upside down."""
        if self.task in OTHER:
            return recipes.get(OTHER[self.task]).rows(self.data, self.source, self.seed)
        change = spoiled if self.task in IMAGES else reversed_tokens
        return replace(
            self.own, **{role: change(getattr(self.own, role), self.seed) for role in ("train", "selection")}
        )

    def seen(self, which: str, role: str) -> Any:
        """Rows of a role as a cut sees them."""
        is_share = role == "calibration"
        own, other = (
            compression.share_of(rows.train, CALIBRATION) if is_share else getattr(rows, role)
            for rows in (self.own, self.other)
        )
        return {"own": own, "other": other, "mixed": Mixed(own, other)}[which]

    def student(self, which: str, recovered: str, levels: int = 1) -> nn.Module:
        """A compressed model, made once for all parts."""
        done = f"{recovered.replace(' ', '_')}-{self.scale.targets[self.task]}-{self.scale.epochs:g}epochs"
        name = f"{self.task}-{self.teacher_id}-{which}-{levels}levels-{done}-seed{self.seed}.pt"

        def make() -> nn.Module:
            torch.manual_seed(self.seed)
            return self.cut(which, levels) if recovered == RECOVERED[0] else self.recover(which, recovered, levels)

        return kept(self.cache / name, make)

    def cut(self, which: str, levels: int) -> nn.Module:
        """The closed form."""
        rows: dict[str, Any] = {"calibration": self.seen(which, "calibration"), "train": self.own.train}
        plan, _ = compression.plan(
            self.source.model,
            **rows,
            selection=self.seen(which, "selection"),
            example=self.recipe.example(self.source.model, self.own),
            target=self.scale.targets[self.task],
            embedding_levels=levels,
            multiple_of=self.recipe.options.get("multiple_of", 8),
            seed=self.seed,
        )
        return compression.narrow(self.source.model, plan, **rows)

    def recover(self, which: str, recovered: str, levels: int) -> nn.Module:
        """The same after recovery."""
        student = self.student(which, RECOVERED[0], levels)
        rows = self.own.train if recovered == "own rows" else Unlabelled(self.seen(which, "train"))
        Phase(
            student,
            rows,
            steps=round(self.scale.epochs * len(self.own.train)),
            recovery=self.recipe.options.get("recovery", Recovery()),
            teacher=Teacher(self.source.model),
            precision=precision_on("cpu"),
        ).run(lambda phase: print_event({"event": "step", "step": len(phase.losses), "loss": phase.losses[-1]}))
        return student


def spoiled(rows: ImageRows, seed: int) -> ImageRows:
    """Every image with one of the corruptions."""
    made = copy.copy(rows)
    made.images = mixture(rows.images, SPOILED, seed)
    return made


def reversed_tokens(rows: TokenRows, seed: int) -> TokenRows:
    """Digits with their patches in the opposite order."""
    made, ids = copy.copy(rows), np.asarray(rows.ids)
    made.ids = ids[:, [0, *range(ids.shape[1] - 1, 0, -1)]]
    return made
