"""One phase of training. It can be left between any two steps, saved, and continued to the same bits."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.distillation import Recovery, Teacher, WeightAverage, distillation_loss, hidden_loss, outputs_of
from rmtkd.environment import Precision
from rmtkd.errors import DataError, OptionError
from rmtkd.measurement import check_labels
from rmtkd.memory import Pieces
from rmtkd.norms import as_gathered
from rmtkd.seeding import random_state, set_random_state
from rmtkd.storage import tensors_of

OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What the optimisers remember of each parameter."""


def steps_of(epochs: float, batches_per_epoch: int) -> int:
    """How many steps so many epochs are: at least one, if there is any training."""
    return max(round(epochs * batches_per_epoch), int(epochs > 0))


@dataclass(frozen=True, kw_only=True)
class PhaseState:
    """All that a phase needs to go on: tensors by name, and plain JSON values."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Phase:
    """Some steps of training of one student; with a teacher, by distillation.

    Args:
        student: the model to train, in place. Parameters whose `requires_grad` is False are left alone, unless all are:
            a checkpoint for inference is trained like any other.
        rows: training batches, gone through as often as needed; `set_epoch(number)` is called before each pass where
            the collection has it.
        steps: optimisation steps.
        recovery: loss, optimiser and schedule.
        teacher: whose answers, and hidden states, the student learns.
        first_epoch: number of the first pass.
        first_batch: number of the batch of that pass to begin with.
        pass_began: the random numbers with which that pass began, where it did so before this phase: a collection that
            draws its order by them goes on in the same.
        precision: `bf16` runs both models under autocast.
        blocks: paths of the modules after which hidden states are compared, where `recovery.hidden` is not 0.
        pieces: in how many pieces a batch is run, should memory run out. Gradients add up to those of the batch.

    Raises:
        OptionError: if no parameter may be trained.
    """

    def __init__(
        self,
        student: nn.Module,
        rows: Iterable[Batch],
        *,
        steps: int,
        recovery: Recovery,
        teacher: Teacher | None = None,
        first_epoch: int = 0,
        first_batch: int = 0,
        pass_began: Tensor | None = None,
        precision: Precision = "fp32",
        blocks: Sequence[str] = (),
        pieces: Pieces | None = None,
    ):
        self.student, self.rows, self.steps, self.recovery = student, rows, steps, recovery
        self.teacher = teacher
        self.mine = self.theirs = tuple(blocks) if teacher is not None and recovery.hidden else ()
        """Paths of the modules whose outputs `with_hidden` compares, in the student and in the teacher."""
        self.pieces = pieces or Pieces()
        self.device = next(student.parameters()).device
        bf16 = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=True)
        self.autocast = bf16 if precision == "bf16" else nullcontext()
        self.trained = _trained(student, freeze_embeddings=recovery.freeze_embeddings)
        self.optimizer = _optimizer(self.trained.values(), recovery)
        self.average = WeightAverage(student, recovery.average) if recovery.average else None
        self.losses: list[float] = []
        self.epoch, self.position = first_epoch, first_batch
        """The pass that is under way, and how many of its batches have been used."""
        self.pass_began = random_state(self.device) if pass_began is None else pass_began
        """The state of the random numbers when it began."""

    def run(self, between: Callable[["Phase"], None] | None = None) -> list[float]:
        """Take the steps that are left. The student is in evaluation mode afterwards, whatever happens.

        Args:
            between: called after each step. It may save the phase, and end it by raising.

        Returns:
            The loss of every step.

        Raises:
            DataError: if there are no rows, labels are missing or outside the head's range, or the loss is not finite.
        """
        flags = [(parameter, parameter.requires_grad) for parameter in self.student.parameters()]
        trained = {id(parameter) for parameter in self.trained.values()}
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in trained)
        self.student.train()
        batches = self._batches()
        try:
            while len(self.losses) < self.steps:
                self._step(next(batches))
                if between:
                    between(self)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None
            self.student.eval()
        if self.average and self.losses:
            with torch.no_grad():
                self.average.apply()
        return self.losses

    def state(self) -> PhaseState:
        """Where the phase stands between two steps. The tensors are those that go on being trained: store them now."""
        tensors = {f"student.{name}": value for name, value in tensors_of(self.student).items()}
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        if self.average:
            tensors |= {f"average.{name}": value for name, value in self.average.average.items()}
        if self.teacher is not None and self.teacher.kept is not None:
            tensors["teacher.kept"] = self.teacher.kept
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["random.pass_began"] = self.pass_began
        tensors["random.now"] = random_state(self.device)
        return PhaseState(
            tensors=tensors,
            facts={"epoch": self.epoch, "position": self.position, "pieces": self.pieces.count},
        )

    @torch.no_grad()
    def restore(self, state: PhaseState) -> None:
        """Go back to a state of the same phase; `run` then goes on from there, with the same random numbers.

        Raises:
            KeyError, RuntimeError: if it is the state of another phase.
        """
        tensors = state.tensors
        for name, value in tensors_of(self.student).items():
            value.copy_(tensors[f"student.{name}"])
        for name, parameter in self.trained.items():
            found = {key: tensors.get(f"optimizer.{key}.{name}") for key in OPTIMIZER_STATE}
            self.optimizer.state[parameter] = {
                key: _beside(parameter, value) for key, value in found.items() if value is not None
            }
        if self.average:
            for name, value in self.average.average.items():
                value.copy_(tensors[f"average.{name}"])
        if self.teacher is not None:
            self.teacher.kept = tensors.get("teacher.kept")
        self.losses = tensors["losses"].tolist()
        if self.average:
            self.average.count = len(self.losses)
        self.pass_began = tensors["random.pass_began"]
        set_random_state(tensors["random.now"], self.device)
        self.epoch, self.position = state.facts["epoch"], state.facts["position"]
        self.pieces.count = state.facts["pieces"]

    def check_finite(self, must: str, value: float) -> None:
        """Raise `DataError` unless what came of the step that is under way is a number."""
        if not math.isfinite(value):
            step = len(self.losses) + 1
            raise DataError(f"{must} {value} at step {step}. Lower the learning rate, or look for bad rows.")

    def _step(self, batch: Batch) -> None:
        step = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recovery.lr * learning_rate_factor(step, self.steps, self.recovery.warmup)
        loss = self.pieces(batch, self._backward)
        self.check_finite("the loss must stay finite. It became", loss)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.recovery.clip)
        self.check_finite("gradients must stay finite. Their norm became", float(norm))
        self.optimizer.step()
        if self.average:
            self.average.update()
        self.losses.append(loss)

    def _backward(self, parts: Sequence[Batch]) -> float:
        """Gradients of the mean loss over all rows of the parts, from nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        total = sum(batching.rows(part) for part in parts)
        mean = 0.0
        for part in parts:
            share = batching.rows(part) / total
            loss = self._loss(batching.to(part, self.device))
            (loss * share).backward()
            mean += float(loss.detach()) * share
        return mean

    def _loss(self, batch: Batch) -> Tensor:
        labels = batching.labels(batch)
        guide, recovery = None, self.recovery
        with self.autocast:
            if self.teacher is not None and not self.theirs:
                guide = self.teacher.logits(batch)
            elif self.teacher is not None:  # an answer that was kept has no hidden states
                with torch.no_grad(), outputs_of(self.teacher.model, self.theirs) as theirs:
                    guide = batching.logits(self.teacher.model, batch).float()
            norms = as_gathered(self.student) if batching.rows(batch) == 1 else nullcontext()
            with outputs_of(self.student, self.mine) as mine, norms:
                scores = batching.logits(self.student, batch).float()
        if labels is not None:  # on a GPU the loss itself would end the process
            check_labels(labels, scores.shape[1], "training labels")
        known = distillation_loss(scores, guide, labels, alpha=recovery.alpha, temperature=recovery.temperature)
        both = [key for key in mine if key in theirs] if self.theirs else []  # a student may skip blocks in training
        if not both:
            return known
        pairs = [mine[key] for key in both], [theirs[key] for key in both]
        return self.with_hidden(known, *pairs, batching.real_positions(batch))

    def with_hidden(self, known: Tensor, mine: list[Tensor], theirs: list[Tensor], mask: Tensor | None) -> Tensor:
        """The loss of labels and answers, and beside it that of hidden states.

        Args:
            known: the loss without.
            mine, theirs: outputs of the student's and of the teacher's modules.
            mask: which positions are real; None if all are.
        """
        return known + self.recovery.hidden * hidden_loss(mine, theirs, mask)

    def _batches(self) -> Iterator[Batch]:
        """Batches without end, from where the phase stands."""
        while True:
            batching.set_epoch(self.rows, self.epoch)
            now = random_state(self.device)
            if self.position == 0:
                self.pass_began = now
            # A collection may draw its order when the pass begins: let it draw the same again. What it draws for each
            # batch, it draws between two steps.
            set_random_state(self.pass_began, self.device)
            batches = iter(self.rows)
            if self.position:
                for _ in itertools.islice(batches, self.position):
                    pass
                set_random_state(now, self.device)
            for batch in batches:
                self.position += 1
                yield batch
            if self.position == 0:
                raise DataError("training rows must hold at least one batch. Got none. Pass more rows.")
            self.epoch, self.position = self.epoch + 1, 0


def train(student: nn.Module, rows: Iterable[Batch], *, teacher: nn.Module | None = None, **phase: Any) -> list[float]:
    """Train the student, in place, in one phase; the arguments are those of `Phase`.

    Returns:
        The loss of every step.
    """
    return Phase(student, rows, teacher=None if teacher is None else Teacher(teacher), **phase).run()


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then linear decay to a tenth at the last."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 1 - 0.9 * (step + 1 - rising) / max(1, steps - rising)


def _beside(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of what an optimiser remembers of a parameter, on its device, and in memory as it lies: fused optimisers
    go through both entry by entry."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _trained(student: nn.Module, *, freeze_embeddings: bool) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    parameters = dict(student.named_parameters())
    tables = _embedding_tables(student) if freeze_embeddings else set()
    is_for_inference = not any(parameter.requires_grad for parameter in parameters.values())
    trained = {
        name: parameter
        for name, parameter in parameters.items()
        if (parameter.requires_grad or is_for_inference) and id(parameter) not in tables
    }
    if not trained:
        raise OptionError(
            "at least one parameter must be trained. All but embedding tables are frozen, and freeze_embeddings leaves "
            "these alone. Leave it out, or set requires_grad of what is to recover."
        )
    return trained


def _embedding_tables(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _optimizer(parameters: Iterable[nn.Parameter], recovery: Recovery) -> torch.optim.Optimizer:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recovery.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recovery.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recovery.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recovery.lr, fused=True)
