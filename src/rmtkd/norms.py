"""Norms by batch statistics: after a cut their statistics are those of another network, and are gathered anew.

A constant that a reader loses with the dropped units shows in the mean of its norm, lost energy in the variance: both
are put right by one pass over calibration rows, without labels and without training.

A norm that is frozen on purpose, so that `train` leaves it in evaluation mode, keeps the statistics that it has, folded
by the cut: a width that is read into it is cut about zero, as nothing takes up a constant there.

Reference:
    Izmailov et al., arXiv 1803.05407, §3.2 (`bn_update`, the same pass after weights were averaged).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.measurement import evaluation
from rmtkd.memory import Pieces
from rmtkd.sites import Site, frozen_norms


def norms_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """Paths of the norms that take up what a cut of these sites drops."""
    return tuple(dict.fromkeys(stream.norm for site in sites for stream in site.streams if stream.norm))


def batch_norms(model: nn.Module) -> tuple[str, ...]:
    """Paths of all norms that run on gathered statistics, frozen ones among them."""
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    )


@contextmanager
def of_each_batch(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """The norms at these paths take the statistics of the batch that is run, and keep their own for afterwards. Frozen
    ones go on with their own."""
    norms = _not_frozen(model, paths)
    before = [(norm, norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.training = 0.0, True
        yield
    finally:
        for norm, momentum, training in before:
            norm.momentum, norm.training = momentum, training


@contextmanager
def as_gathered(model: nn.Module) -> Iterator[None]:
    """All norms run on the statistics that they have gathered: of a batch of a single row there may be none."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    try:
        for norm in norms:
            norm.training = False
        yield
    finally:
        for norm in norms:
            norm.training = True


def gather_statistics(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Batch], *, pieces: Pieces | None = None
) -> None:
    """Give the norms at these paths, in place, the statistics of their inputs over all batches: the mean over batches
    of what each batch has, as training would. Frozen norms, and such as are not called, keep what they have.

    Args:
        model: run in evaluation mode but for these norms, which take the statistics of each batch.
        paths: of the norms; with none to be gathered, nothing is run.
        batches: of calibration; see `without_single_rows`.
        pieces: in how many pieces a batch is run, should memory run out. Each counts as a batch.
    """
    norms = _not_frozen(model, paths)
    if not norms:
        return
    pieces = pieces or Pieces()
    device = next(model.parameters()).device
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]

    def run(parts: Sequence[Batch]) -> None:
        """A second attempt, in smaller parts, forgets what the norms have seen of the first."""
        for value, held in zip(_statistics(norms), begun, strict=True):
            value.copy_(held)
        for part in without_single_rows(parts):
            batching.logits(model, batching.to(part, device))

    with evaluation(model):
        try:
            for norm in norms:
                norm.num_batches_tracked = torch.tensor(0, device=device)  # the first batch replaces what was there
                norm.momentum, norm.training = None, True  # the plain mean over batches
            for batch in without_single_rows(batches):
                begun = [value.clone() for value in _statistics(norms)]
                pieces(batch, run)
        finally:
            for norm, momentum, tracked in before:
                norm.momentum, norm.num_batches_tracked = momentum, tracked


def _not_frozen(model: nn.Module, paths: Sequence[str]) -> list[_BatchNorm]:
    frozen = frozen_norms(model) if paths else ()
    found: list[Any] = [model.get_submodule(path) for path in paths if path not in frozen]
    return found


def _statistics(norms: Iterable[_BatchNorm]) -> list[Tensor]:
    """What a norm changes when it sees a batch."""
    found: list[Any] = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    return [value for values in found for value in values]


def without_single_rows(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of several rows, as a single one may have no statistics; where there is none, all."""
    has_several = any(batching.rows(batch) > 1 for batch in batches)
    return (batch for batch in batches if batching.rows(batch) > 1 or not has_several)
