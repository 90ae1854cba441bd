"""What a student is taught: hard labels, the teacher's answers, and the teacher's hidden states."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rmtkd import batches as batching
from rmtkd.activations import first_output
from rmtkd.batches import Batch
from rmtkd.errors import DataError, OptionError, check_kinds
from rmtkd.measurement import evaluation

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a network is trained: hard labels against the teacher, optimiser, schedule.

    Attributes:
        alpha: weight of the labels' cross-entropy; 1 - alpha is the teacher's.
        temperature: of both softmaxes; the divergence is scaled by its square.
        hidden: weight of the difference of hidden states after each block; 0 leaves them free. It is for models whose
            blocks put out what no cut narrows, as transformers' do.
        optimizer: `adamw`, or `sgd` with Nesterov's momentum of 0.9.
        lr: peak learning rate. Linear warm-up, then linear decay to a tenth.
        weight_decay: on matrices and filters, not on biases and norms.
        warmup: share of the steps of a phase that warm up.
        clip: largest gradient norm.
        freeze_embeddings: leave embedding tables as they are.
        average: decay of a moving average of the weights, which is what a phase ends with (and what then teaches the
            next one); 0 ends with the last weights.
        cache_teacher: keep the teacher's answers to rows that come again.
    """

    alpha: float = 0.3
    temperature: float = 2.0
    hidden: float = 0.0
    optimizer: str = "adamw"
    lr: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    freeze_embeddings: bool = False
    average: float = 0.0
    cache_teacher: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.optimizer not in OPTIMIZERS:
            raise OptionError(f"optimizer must be {' or '.join(OPTIMIZERS)}. Got {self.optimizer}.")
        for name in ("alpha", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} must be within [0, 1]. Got {getattr(self, name)}.")
        if not 0 <= self.average < 1:
            raise OptionError(f"average must be within [0, 1). Got {self.average}.")
        for name in ("weight_decay", "hidden"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be at least 0. Got {getattr(self, name)}.")
        for name in ("temperature", "lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be greater than 0. Got {getattr(self, name)}.")


def distillation_loss(
    student: Float[Tensor, "rows classes"],
    teacher: Float[Tensor, "rows classes"] | None,
    labels: Int[Tensor, " rows"] | None,
    *,
    alpha: float,
    temperature: float,
) -> Float[Tensor, ""]:
    """`α·CE + (1 - α)·T²·KL(teacher ‖ student)` with both softmaxes at temperature T, averaged over rows.

    Without a teacher only the cross-entropy, without labels only the divergence, each at full weight.

    Raises:
        DataError: if there is neither.

    Reference:
        Hinton, Vinyals, Dean, arXiv 1503.02531, §2 (the factor T²); arXiv 2509.15724 (α).
    """
    if teacher is None and labels is None:
        raise DataError("a batch must have labels where there is no teacher. Got none. Add `labels`.")
    if teacher is None:
        return functional.cross_entropy(student, labels)  # type: ignore[arg-type]
    divergence = temperature**2 * functional.kl_div(
        functional.log_softmax(student / temperature, -1),
        functional.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    if labels is None:
        return divergence
    return alpha * functional.cross_entropy(student, labels) + (1 - alpha) * divergence


def hidden_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None) -> Float[Tensor, ""]:
    """Mean over blocks of `E‖h_student - h_teacher‖² / E‖h_teacher‖²`, each mean taken over the real positions.

    Student and teacher have the same hidden width, so that no map between them must be learned; the ratio has no scale,
    so that one weight serves every block and model.

    Args:
        students: hidden states of the student after each block, `rows × … × width`.
        teachers: those of the teacher, of the same shapes.
        mask: which positions are real, `rows × length`; None if all are.

    Reference:
        The hidden-state term of TinyBERT, arXiv 1909.10351, eq. 8, without its adapter.
    """
    ratios = []
    for student, teacher in zip(students, teachers, strict=True):
        if mask is not None:
            student, teacher = student[mask], teacher[mask]
        student, teacher = student.float(), teacher.float()
        ratios.append((student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12))
    return torch.stack(ratios).mean()


Outputs = dict[tuple[int, int], Tensor]
"""What modules put out, by the place of a module in the list of their paths and the number of its call."""


@contextmanager
def outputs_of(model: nn.Module, paths: Sequence[str]) -> Iterator[Outputs]:
    """What receives the outputs of the modules at `paths` in a forward pass, copied: what comes after may change them
    in place. Empty it between two passes."""
    seen: Outputs = {}
    handles = [
        model.get_submodule(path).register_forward_hook(partial(_see, seen, place)) for place, path in enumerate(paths)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _see(seen: Outputs, place: int, _: nn.Module, __: Any, output: Any) -> None:
    number = sum(other == place for other, _ in seen)
    seen[place, number] = first_output(output).clone()


class Teacher:
    """A model that answers; its answers to rows with numbers can be kept for the next time.

    Args:
        model: evaluated without gradients, in evaluation mode.
        cache: whether answers are kept. Padding moves an answer by no more than rounding.
    """

    def __init__(self, model: nn.Module, *, cache: bool = False):
        self.model, self.cache = model.eval(), cache
        self.kept: Float[Tensor, "known classes"] | None = None
        """Answers by row number; NaN where there is none yet."""

    @torch.no_grad()
    def logits(self, batch: Batch) -> Float[Tensor, "rows classes"]:
        """The teacher's class scores, in float32."""
        ids = batching.row_ids(batch) if self.cache else None
        if ids is not None and self.kept is not None and int(ids.max()) < len(self.kept):
            answers = self.kept[ids.cpu()]
            if not answers.isnan().any():
                return answers.to(ids.device)
        answers = batching.logits(self.model, batch).float()
        if ids is not None:
            self._keep(ids.cpu(), answers.cpu())
        return answers

    def _keep(self, ids: Tensor, answers: Tensor) -> None:
        known = 0 if self.kept is None else len(self.kept)
        if (needed := int(ids.max()) + 1) > known:
            grown = answers.new_full((max(needed, 2 * known), answers.shape[1]), math.nan)
            if self.kept is not None:
                grown[:known] = self.kept
            self.kept = grown
        self.kept[ids] = answers  # type: ignore[index]


def check_pair(student: nn.Module, teacher: nn.Module, batch: Batch, blocks: Sequence[str] = ()) -> None:
    """Raise `OptionError` unless a model can learn from another: both answer the batch with as many class scores, and
    have hidden states of the same shapes after each of the blocks."""
    shapes: list[list[tuple[int, ...]]] = []
    row = batching.head(batch, 1)
    for model in (student, teacher):
        try:
            with evaluation(model), outputs_of(model, blocks) as hidden:
                scores = batching.logits(model, row)
        except Exception as error:  # whatever a model makes of rows that are not meant for it
            raise OptionError(
                f"a teacher model must answer the rows that its student answers. {type(model).__name__} gave: "
                f"{error!r}. Choose another{', or leave hidden at 0' if blocks else ''}."
            ) from error
        shapes.append([tuple(scores.shape), *(tuple(state.shape) for state in hidden.values())])
    mine, theirs = shapes
    if mine != theirs:
        what = "class scores" if mine[0] != theirs[0] else "hidden states"
        raise OptionError(
            f"a teacher model must have {what} of the student's shape. Got {theirs} of the teacher, {mine} of the "
            f"student. Choose another{', or leave hidden at 0' if mine[0] == theirs[0] else ''}."
        )


def check_blocks(student: nn.Module, teacher: nn.Module, batch: Batch, blocks: Sequence[str]) -> None:
    """Raise `OptionError` unless each of the blocks puts out what it does in the teacher, in shape: what is narrower
    cannot be compared."""
    row, shapes = batching.head(batch, 1), []
    for model in (student, teacher):
        with evaluation(model), outputs_of(model, blocks) as hidden:
            batching.logits(model, row)
        shapes.append({key: list(state.shape[1:]) for key, state in hidden.items()})
    mine, theirs = shapes
    if narrower := [key for key in mine if mine[key] != theirs.get(key)]:
        first = narrower[0]
        raise OptionError(
            f"hidden must be 0 where outputs of blocks are narrowed, which then cannot be compared. Those of "
            f"{len({block for block, _ in narrower})} of {len(blocks)} blocks are, such as of {blocks[first[0]]}: from "
            f"{theirs.get(first)} to {mine[first]}. Leave hidden out, or exclude the sites that blocks put out."
        )


class WeightAverage:
    """Exponential moving average of a model's parameters.

    Reference:
        Tarvainen, Valpola, arXiv 1703.01780 (a teacher that is the average of students).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.count = decay, 0
        self.current = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.average = {name: parameter.clone() for name, parameter in self.current.items()}

    def update(self) -> None:
        """Take in the current parameters. The first updates weigh more, so that the start is forgotten."""
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        for name, average in self.average.items():
            average.lerp_(self.current[name], weight)

    def apply(self) -> None:
        """Give the model its averaged parameters."""
        for name, average in self.average.items():
            self.current[name].copy_(average)
