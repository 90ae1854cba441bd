"""What a run will take, told before it is spent: time by a few steps of the real shape, memory and disk by counting."""

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.distillation import Recovery, Teacher, outputs_of
from rmtkd.environment import Precision
from rmtkd.measurement import count_parameters, evaluation
from rmtkd.memory import available_bytes, held_bytes
from rmtkd.modules import randomize
from rmtkd.seeding import seeded
from rmtkd.sites import Site, blocks_of
from rmtkd.surgery import fill_with_ones, skeleton
from rmtkd.training import Phase

STEPS = 4
"""Steps that are timed, after one that is not."""
CUT_PASSES = 1.25
"""Cutting everything in order takes this many times what one pass for all sites took (measured: 1.18 and 1.26 for
MiniLM on SST-2, 1.17 on AG News, the check of the cut included)."""

BACKWARD = 2
"""The backward pass holds about as much again as the forward pass has kept for it."""
SLACK = {"cpu": 2.0}
"""What an allocator comes to hold beyond what is in use at once, by device; 1 elsewhere. On a CPU batches of ever other
lengths leave gaps: MiniLM peaked at 2.8 GB on SST-2 and at 4.7 GB on AG News."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Time, memory and disk of a run on this machine; estimates, by what a few steps took."""

    seconds_cut: float
    seconds_recovery: float
    seconds_step: float
    steps: int
    memory_bytes: int
    """Most memory at once, what the process already holds included."""
    free_bytes: int | None
    """Memory that is free for it now; None where the system does not say."""
    disk_bytes: int
    """Most room in the run folder: the state, and the calls that are kept while cutting."""


def forecast(
    model: nn.Module,
    sites: Sequence[Site],
    widths: Mapping[str, int],
    rows: Iterable[Batch],
    *,
    steps: int,
    recovery: Recovery,
    blend: bool,
    precision: Precision,
    calibration: Iterable[Batch],
    seconds_observed: float,
    teacher: nn.Module | None = None,
) -> Forecast:
    """Estimate a run that cuts the model to these widths.

    Args:
        model: what is cut, left as it was.
        sites: all sites of the model.
        widths: the width that each keeps.
        rows: training batches; the first few are trained on, by a model of the final shape that is thrown away.
        steps: of the whole recovery.
        recovery: how the run will train.
        blend: whether the weights of the cut are kept for afterwards.
        precision: in which precision.
        calibration: batches whose activations will be seen; the largest of them stands for the largest of all.
        seconds_observed: what one pass over them for all sites took.
        teacher: whose answers are learned; the model's by default.
    """
    device = next(model.parameters()).device
    teacher = model if teacher is None else teacher
    with seeded(None, device):
        student = skeleton(model, sites, widths)
        fill_with_ones(student, device)
        randomize(student, seed=0)
        few = list(itertools.islice(rows, STEPS + 1))
        seconds_step = 0.0
        if steps:
            seconds_step = _seconds_a_step(student, teacher, few, recovery, precision, blocks_of(sites))
        batches, largest = 0, few[0]
        for batch in calibration:
            batches, largest = batches + 1, max(largest, batch, key=_positions)
        activations = _activation_bytes(student, largest, precision)
    parameters, kept = count_parameters(model), count_parameters(student)
    size = next(model.parameters()).element_size()
    moments = sum(8 * site.groups * site.size**2 * len(site.streams) for site in sites)
    more = bool(recovery.average) + blend
    # weights, gradients and the two moments of AdamW, the average, the cut, and the batch's activations
    training = size * kept * (4 + more) + BACKWARD * activations
    slack = SLACK.get(device.type, 1.0)
    hidden = _hidden_bytes(model, largest, blocks_of(sites))
    held, free = held_bytes(device), available_bytes(device)
    return Forecast(
        seconds_cut=CUT_PASSES * seconds_observed,
        seconds_recovery=steps * seconds_step,
        seconds_step=seconds_step,
        steps=steps,
        memory_bytes=held + round(slack * max(training, moments + activations)),
        free_bytes=None if free is None else held + free,
        # the state of a step twice, while one takes the place of the other
        disk_bytes=size * (parameters + 2 * kept * (3 + more)) + batches * hidden,
    )


def _positions(batch: Batch) -> int:
    return batching.rows(batch) * batching.length(batch)


def _seconds_a_step(
    student: nn.Module,
    teacher: nn.Module,
    few: Sequence[Batch],
    recovery: Recovery,
    precision: Precision,
    blocks: Sequence[str],
) -> float:
    times = [time.perf_counter()]
    _Timed(
        student,
        few,
        steps=STEPS + 1,
        recovery=recovery,
        teacher=Teacher(teacher),
        precision=precision,
        blocks=blocks,
    ).run(lambda _: times.append(time.perf_counter()))
    return (times[-1] - times[1]) / (len(times) - 2)


class _Timed(Phase):
    """A phase of which only the time counts: its start is random, from where not every network gives numbers."""

    def check_finite(self, must: str, value: float) -> None:
        """Any value will do."""


def _activation_bytes(model: nn.Module, batch: Batch, precision: Precision) -> int:
    """What a training step keeps of the forward pass, counted on one row and multiplied."""
    device = next(model.parameters()).device
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    held: list[Any] = []
    rows = min(2, batching.rows(batch))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    ):
        held.append(batching.logits(model, batching.to(batching.head(batch, rows), device)))
    return sum(seen.values()) * batching.rows(batch) // rows


def _hidden_bytes(model: nn.Module, batch: Batch, blocks: Sequence[str]) -> int:
    """Size of what goes from block to block for one batch; 0 for a model without blocks."""
    device = next(model.parameters()).device
    with evaluation(model), outputs_of(model, blocks[:1]) as seen:
        batching.logits(model, batching.to(batching.head(batch, 1), device))
    return sum(state.numel() * state.element_size() for state in seen.values()) * batching.rows(batch)
