"""Running out of memory, and what to do about it: halve the batch, and say so."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from rmtkd import batches as batching
from rmtkd.batches import Batch

resource: Any = None
with suppress(ImportError):  # a system without it goes without
    import resource

T = TypeVar("T")
_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class Pieces:
    """In how many pieces a batch is run: one, until memory runs out; then twice as many, from there on.

    Args:
        on_halved: called with the new number of pieces.
    """

    def __init__(self, on_halved: Callable[[int], None] | None = None, *, count: int = 1):
        self.count = count
        self.on_halved = on_halved

    def __call__(self, batch: Batch, attempt: Callable[[Sequence[Batch]], T]) -> T:
        """What `attempt` makes of the pieces of the batch. It is called anew, with more pieces, where memory ran out.

        Raises:
            RuntimeError, MemoryError: what `attempt` raised, where it was something else or a piece is a single row.
        """
        while True:
            try:
                return attempt(batching.split(batch, self.count))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.count >= batching.rows(batch):
                    raise
            self.count *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.on_halved:
                self.on_halved(self.count)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _CPU_MESSAGES)


def peak_bytes(device: torch.device | str = "cpu") -> int | None:
    """The most memory that was held at once so far: by this process on a CPU, by torch on an accelerator; None where
    the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes(device: torch.device | str = "cpu") -> int:
    """Memory held now: by this process on a CPU, by torch on an accelerator; 0 where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that is free to be taken now, or None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
