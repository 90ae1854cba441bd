"""What a batch is: a mapping called as `model(**inputs)`, or a pair `(x, labels)` called as `model(x)`.

Keys of a mapping that are not inputs: `labels`, and `row_ids`, each row's place in its collection. The key
`attention_mask`, if present, says which positions are real (1) and which are padding (0).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd.errors import DataError

Batch = Mapping[str, Tensor] | tuple[Tensor, Tensor] | list[Tensor]
"""One batch. Collections of batches are *re-iterable*: a list, a `DataLoader`, anything with `__iter__`."""

NOT_INPUTS = frozenset({"labels", "row_ids"})
"""Keys of a mapping that the model is not called with."""


def inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that the model is called with."""
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    return (batch[0],), {}


def labels(batch: Batch) -> Tensor | None:
    """The class indices, shape `(rows,)`, or None where the batch has none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if len(batch) > 1 else None


def real_positions(batch: Batch) -> Tensor | None:
    """Boolean mask of the unpadded positions, shape `(rows, length)`, or None where every position is real.

    Raises:
        DataError: if the mask has another number of dimensions: then it does not say which positions are real.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.ndim != 2:
        raise DataError(
            f"attention_mask must have shape [rows, length]. Got {list(mask.shape)}. Pass 1 for real positions and 0 "
            "for padding."
        )
    return None if mask is None else mask.bool()


def to(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`."""
    if isinstance(batch, Mapping):
        return {name: value.to(device) for name, value in batch.items()}
    return tuple(value.to(device) for value in batch)  # type: ignore[return-value]


def rows(batch: Batch) -> int:
    """The number of rows in the batch."""
    first = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(first)


def length(batch: Batch) -> int:
    """The number of positions of each row, padding included; 1 for a pair."""
    return next(iter(inputs(batch)[1].values())).shape[1] if isinstance(batch, Mapping) else 1


def head(batch: Batch, count: int) -> Batch:
    """The first `count` rows of the batch."""
    if isinstance(batch, Mapping):
        return {name: value[:count] for name, value in batch.items()}
    return tuple(value[:count] for value in batch)  # type: ignore[return-value]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores of shape `(rows, classes)`: the model's output, or its field `logits`."""
    args, kwargs = inputs(batch)
    output = model(*args, **kwargs)
    return output if isinstance(output, Tensor) else output.logits


def first(batches: Iterable[Batch], role: str) -> Batch:
    """The first batch of a collection.

    Raises:
        DataError: if there is none.
    """
    for batch in batches:
        return batch
    raise DataError(f"{role} must hold at least one batch. Got none. Pass more rows.")


def every(batches: Iterable[Batch], step: int) -> Iterator[Batch]:
    """Every `step`-th batch, from the first."""
    return (batch for i, batch in enumerate(batches) if i % step == 0)
