"""What calibration sees of the training rows: an even share of their batches, the same in every pass."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from rmtkd import memory
from rmtkd.batches import Batch, Call, Calls, check, knows_epochs, set_epoch
from rmtkd.errors import DataError

T = TypeVar("T")
Look = Callable[[Iterable[Any]], Iterator[Any]]
"""A pass through batches, as somebody watches it."""
READING = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
)
"""How a `DataLoader` reads the rows that it was told to."""
LEFT = 0.1
"""Share of the free memory that kept batches may leave."""


def share_of(batches: Iterable[Any], share: float, look: Look = iter) -> Iterable[Batch]:
    """An even share of the batches, from the first, the same in every pass.

    A collection that knows epochs gives its first pass again. Of others the batches are kept; of a `DataLoader` that
    draws rows by number no others are read, and where it shuffles that share of the rows.

    Args:
        batches: a collection that can be gone through again.
        share: between 0 and 1.
        look: through which batches that are kept are read.

    Raises:
        DataError: if memory cannot hold what must be kept.
    """
    return FirstPass(batches, share) if knows_epochs(batches) else _kept(_chosen(batches, share, look))


@dataclass(frozen=True)
class FirstPass:
    """A share of the first pass through a collection that knows epochs."""

    batches: Iterable[Batch]
    share: float

    def __iter__(self) -> Iterator[Batch]:
        set_epoch(self.batches, 0)
        return evenly(self.batches, self.share)


def evenly(items: Iterable[T], share: float) -> Iterator[T]:
    """This share of the items, evenly spread, from the first."""
    exact = Fraction(str(share))  # as a double 0.1 is a little more than a tenth
    return (item for i, item in enumerate(items) if math.ceil((i + 1) * exact) > math.ceil(i * exact))


def _chosen(batches: Iterable[Any], share: float, look: Look) -> Iterator[Batch]:
    """One pass through the share."""
    if isinstance(batches, Calls):
        return (Call(check(rows), batches.forward) for rows in _chosen(batches.batches, share, look))  # type: ignore[arg-type]
    if type(batches) is not DataLoader or isinstance(batches.dataset, IterableDataset) or batches.batch_sampler is None:
        return evenly(look(batches), share)
    numbers = list(evenly(batches.batch_sampler, share)) if not _shuffles(batches) else _dealt(batches, share)
    reading = {name: getattr(batches, name) for name in READING}
    return look(DataLoader(batches.dataset, batch_sampler=numbers, **reading))


def _shuffles(loader: DataLoader) -> bool:
    """Whether it goes through all rows in a random order, as `shuffle=True` has it."""
    sampler, size = loader.sampler, loader.batch_size
    is_plain = type(loader.batch_sampler) is BatchSampler and type(sampler) is RandomSampler and size is not None
    return is_plain and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore


def _dealt(loader: DataLoader, share: float) -> list[list[int]]:
    """This share of the rows, evenly spread over all, in batches: not by the loader's random numbers, which would be
    others when a run goes on. Mixed, as norms by batch statistics want batches of all kinds of rows."""
    rows = list(evenly(range(len(loader.dataset)), share))  # type: ignore[arg-type]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    size: int = loader.batch_size  # type: ignore[assignment]
    numbers = [[rows[i] for i in order[start : start + size]] for start in range(0, len(rows), size)]
    return numbers[:-1] if loader.drop_last and len(numbers) > 1 and len(numbers[-1]) < size else numbers


def _kept(batches: Iterable[Batch]) -> list[Batch]:
    kept, free = [], memory.available_bytes()
    for batch in batches:
        kept.append(batch)
        left = memory.available_bytes()
        if free and left is not None and left < LEFT * free:
            raise DataError(
                "the training rows that calibration sees must fit in memory: they come in another order in every pass, "
                f"so they are kept. Of {free / 1e9:.1f} GB that were free {left / 1e9:.1f} are left after {len(kept)} "
                "batches. Pass a smaller calibration_share, or rows of their own as calibration, which are read anew."
            )
    return kept
