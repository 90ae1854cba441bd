"""Training with and without a teacher: the loss, and one phase of optimisation."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.errors import DataError, OptionError

Precision = Literal["fp32", "bf16"]
PRECISIONS = ("auto", "fp32", "bf16")
"""What may be asked for; `auto` is whichever is faster."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a network is trained: hard labels against the teacher, optimiser, schedule.

    Attributes:
        alpha: weight of the labels' cross-entropy; 1 - alpha is the teacher's.
        temperature: of both softmaxes; the divergence is scaled by its square.
        lr: peak learning rate of AdamW. Linear warm-up, then linear decay to a tenth.
        weight_decay: on matrices, not on biases and norms.
        warmup: share of the steps of a phase that warm up.
        clip: largest gradient norm.
        freeze_embeddings: leave embedding tables as they are.
    """

    alpha: float = 0.3
    temperature: float = 2.0
    lr: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    freeze_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("alpha", 0, 1),
            ("warmup", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise OptionError(f"{name} must be within [{low}, {high}]. Got {value}.")
        if not 0 <= self.weight_decay < math.inf:
            raise OptionError(f"weight_decay must be at least 0. Got {self.weight_decay}.")
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


def train(
    student: nn.Module,
    rows: Iterable[Batch],
    *,
    steps: int,
    first_epoch: int = 0,
    teacher: nn.Module | None = None,
    recovery: Recovery,
    precision: Precision = "fp32",
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train the student, in place, for a number of steps; with a teacher, by distillation.

    Args:
        student: the model to train, left in evaluation mode.
        rows: training batches, gone through as often as needed; `set_epoch(number)` is called before each pass where
            the collection has it.
        steps: optimisation steps.
        first_epoch: number of the first pass.
        teacher: evaluated without gradients, in evaluation mode.
        recovery: loss, optimiser and schedule.
        precision: `bf16` runs both models under autocast.
        on_step: called after each step with its number, from 1, and its loss.

    Returns:
        The loss of every step.

    Raises:
        DataError: if there are no rows, labels are missing or outside the head's range, or the loss is not finite.
    """
    device = next(student.parameters()).device
    frozen = _embedding_tables(student) if recovery.freeze_embeddings else set()
    trained = [parameter for parameter in student.parameters() if id(parameter) not in frozen]
    optimizer = _optimizer(trained, recovery)
    autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=True) if precision == "bf16" else nullcontext()
    losses = []
    student.train()
    if teacher is not None:
        teacher.eval()
    flags = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) not in frozen)
    try:
        for step, batch in zip(range(steps), _endless(rows, first_epoch), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = recovery.lr * learning_rate_factor(step, steps, recovery.warmup)
            labels = batching.labels(batch)
            batch = batching.to(batch, device)
            with autocast:
                guide = None
                if teacher is not None:
                    with torch.no_grad():
                        guide = batching.logits(teacher, batch).float()
                scores = batching.logits(student, batch).float()
            _check_labels(labels, scores.shape[1])
            loss = distillation_loss(
                scores,
                guide,
                batching.labels(batch),
                alpha=recovery.alpha,
                temperature=recovery.temperature,
            )
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise DataError(
                    f"the loss must stay finite. It became {losses[-1]} at step {step + 1}. "
                    "Lower the learning rate, or look for bad rows."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, recovery.clip)
            optimizer.step()
            if on_step:
                on_step(step + 1, losses[-1])
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        student.eval()
    return losses


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then linear decay to a tenth at the last."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 1 - 0.9 * (step - rising) / max(1, steps - 1 - rising)


def _check_labels(labels: Tensor | None, classes: int) -> None:
    """Raise `DataError` for labels that the head does not have: on a GPU the loss itself would end the process."""
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"training labels must be within 0..{classes - 1}, the range of the model's head. Got "
            f"{int(labels.min())}..{int(labels.max())}. Map the labels, or use a model with that many classes."
        )


def _endless(rows: Iterable[Batch], epoch: int) -> Iterator[Batch]:
    while True:
        if hasattr(rows, "set_epoch"):
            rows.set_epoch(epoch)  # type: ignore[attr-defined]
        empty = True
        for batch in rows:
            empty = False
            yield batch
        if empty:
            raise DataError("training rows must hold at least one batch. Got none. Pass more rows.")
        epoch += 1


def _embedding_tables(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _optimizer(parameters: Iterable[nn.Parameter], recovery: Recovery) -> torch.optim.AdamW:
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recovery.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=recovery.lr, fused=True)
