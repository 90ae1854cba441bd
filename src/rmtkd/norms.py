"""Norms by batch statistics: after a cut their statistics are those of another network, and are gathered anew.

A constant that a reader loses with the dropped units shows in the mean of its norm, lost energy in the variance: both
are put right by one pass over calibration rows, without labels and without training.

Reference:
    Izmailov et al., arXiv 1803.05407, §3.2 (`bn_update`, the same pass after weights were averaged).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.measurement import evaluation
from rmtkd.memory import Pieces
from rmtkd.sites import Site


def norms_of(sites: Iterable[Site]) -> tuple[str, ...]:
    """Paths of the norms that take up what a cut of these sites drops."""
    return tuple(dict.fromkeys(stream.norm for site in sites for stream in site.streams if stream.norm))


def batch_norms(model: nn.Module) -> tuple[str, ...]:
    """Paths of all norms that run on gathered statistics."""
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    )


@contextmanager
def of_each_batch(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """The norms at these paths take the statistics of the batch that is run, and keep their own for afterwards."""
    norms: list[_BatchNorm] = [model.get_submodule(path) for path in paths]  # type: ignore[misc]
    before = [(norm, norm.momentum, norm.training) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
            norm.train()
        yield
    finally:
        for norm, momentum, training in before:
            norm.momentum = momentum
            norm.train(training)


def gather_statistics(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Batch], *, pieces: Pieces | None = None
) -> None:
    """Give the norms at these paths, in place, the statistics of their inputs over all batches: the mean over batches
    of what each batch has, as training would.

    Args:
        model: run in evaluation mode but for these norms, which take the statistics of each batch.
        paths: of the norms; with none, nothing is run.
        batches: of calibration; see `without_single_rows`.
        pieces: in how many pieces a batch is run, should memory run out.
    """
    norms: list[_BatchNorm] = [model.get_submodule(path) for path in paths]  # type: ignore[misc]
    if not norms:
        return
    pieces = pieces or Pieces()
    device = next(model.parameters()).device
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]

    def run(parts: Sequence[Batch]) -> None:
        for part in parts:
            batching.logits(model, batching.to(part, device))

    with evaluation(model):
        try:
            for norm in norms:
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked = norm.num_batches_tracked.clone()
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over batches
                norm.train()
            for batch in without_single_rows(batches):
                pieces(batch, run)
        finally:
            for norm, momentum, tracked in before:
                norm.momentum, norm.num_batches_tracked = momentum, tracked


def without_single_rows(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of several rows, as a single one may have no statistics; where there is none, all."""
    has_several = any(batching.rows(batch) > 1 for batch in batches)
    return (batch for batch in batches if batching.rows(batch) > 1 or not has_several)
