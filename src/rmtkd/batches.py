"""What a batch is: a mapping called as `model(**inputs)`, a pair `(x, labels)` called as `model(x)`, or one of these
with a `forward` of its own.

Keys of a mapping that are not inputs: `labels`, and `row_ids`, each row's place in its collection. The key
`attention_mask`, if present, says which positions are real (1) and which are padding (0).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from rmtkd.errors import DataError, UnsupportedModelError

Tensors = Mapping[str, Tensor] | tuple[Tensor, ...] | list[Tensor]
"""What data loaders give: tensors whose first dimension is the row."""
Forward = Callable[[nn.Module, Any], Tensor]
"""Class scores of shape `(rows, classes)` from a model and what a loader gave."""


@dataclass(frozen=True)
class Call:
    """Rows that a model is not called with in one of the two usual ways."""

    rows: Tensors
    forward: Forward


Batch = Tensors | Call
"""One batch. Collections of batches are *re-iterable*: a list, a `DataLoader`, anything with `__iter__`."""

NOT_INPUTS = frozenset({"labels", "row_ids"})
"""Keys of a mapping that the model is not called with."""
MISNAMED = ("label", "label_ids")
"""Keys under which other tools look for labels."""


class Calls:
    """A collection of batches with a `forward` of its own."""

    def __init__(self, batches: Iterable[Tensors], forward: Forward):
        self.batches, self.forward = batches, partial(_class_scores, forward)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass, where the collection can."""
        set_epoch(self.batches, epoch)

    def __iter__(self) -> Iterator[Call]:
        return (Call(check(rows), self.forward) for rows in self.batches)  # type: ignore[arg-type]


@overload
def called(batches: Iterable[Any], forward: Forward | None) -> Iterable[Batch]: ...
@overload
def called(batches: None, forward: Forward | None) -> None: ...
def called(batches: Iterable[Any] | None, forward: Forward | None) -> Iterable[Batch] | None:
    """The same batches, with a `forward` of their own."""
    return batches if batches is None or forward is None else Calls(batches, forward)


def check_again(**roles: Iterable[Any] | None) -> None:
    """Raise `DataError` for a collection, of any role, that can be gone through only once."""
    for role, given in roles.items():
        batches = given.batches if isinstance(given, Calls) else given
        if isinstance(batches, Iterator):
            raise DataError(
                f"{role} rows are gone through several times. Got {type(batches).__name__}, which is used up after "
                "once. Pass a list, a DataLoader, or an object whose `__iter__` begins anew."
            )


def check(batch: Any) -> Batch:
    """Return the batch, if it is one.

    Raises:
        DataError: naming what it holds besides tensors of rows.
    """
    if isinstance(batch, Call):  # what it holds was looked at when it was made
        return batch
    if not isinstance(batch, Mapping | tuple | list) or not batch:
        raise DataError(
            f"a batch must be a mapping of tensors, or a pair (x, labels). Got {_told(batch)}. Make the loader give "
            "one of these; rows without labels are (x,)."
        )
    held: list[tuple[Any, Any]] = list(batch.items() if isinstance(batch, Mapping) else enumerate(batch))
    for name, value in held:
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise DataError(
                f"a batch must hold tensors alone, whose first dimension is the row. Got {_told(value)} at {name!r}. "
                "Leave it out, or make it one tensor, in the collate_fn of the loader."
            )
    for name, value in held:
        if len(value) != rows(batch):
            raise DataError(
                f"all tensors of a batch must have as many rows. Got {_told(value)} at {name!r}, and {rows(batch)} "
                "rows of the first. Give every row its own, in the collate_fn of the loader."
            )
    return batch


def check_labels_named(model: nn.Module, batch: Batch) -> None:
    """Raise `DataError` for labels that are under a key of other tools, where the model takes no input of that name."""
    rows = batch.rows if isinstance(batch, Call) else batch
    if not isinstance(rows, Mapping) or "labels" in rows:
        return
    taken = () if isinstance(batch, Call) else inspect.signature(model.forward).parameters
    for name in MISNAMED:
        if name in rows and name not in taken:
            raise DataError(f"the labels of a batch must be under 'labels'. Got {name!r}. Rename it, or leave it out.")


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{type(value).__name__}{' of nothing' if isinstance(value, Sized) and not len(value) else ''}"


def knows_epochs(batches: Iterable[Any]) -> bool:
    """Whether the order of its next pass can be chosen."""
    return knows_epochs(batches.batches) if isinstance(batches, Calls) else hasattr(batches, "set_epoch")


def set_epoch(batches: Iterable[Any], epoch: int) -> None:
    """Choose the order of the next pass through a collection that knows epochs; others keep their own."""
    if knows_epochs(batches):
        batches.set_epoch(epoch)  # type: ignore[attr-defined]


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor changed."""
    if isinstance(batch, Call):
        return replace(batch, rows=map_tensors(batch.rows, change))
    if isinstance(batch, Mapping):
        return {name: change(value) for name, value in batch.items()}
    return tuple(change(value) for value in batch)


def inputs(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that the model is called with."""
    if isinstance(batch, Call):
        return inputs(batch.rows)
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    return (batch[0],), {}


def labels(batch: Batch) -> Tensor | None:
    """The class indices, int64 of shape `(rows,)`, or None where the batch has none.

    Raises:
        DataError: if they are not one whole number for each row, or a tuple is no pair.
    """
    if isinstance(batch, Call):
        return labels(batch.rows)
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    elif len(batch) > 2:
        raise DataError(
            f"a batch that is a tuple must be (x, labels). Got {len(batch)} parts. Make it a mapping, with `labels`."
        )
    else:
        found = batch[1] if len(batch) > 1 else None
    return None if found is None else _one_a_row("labels", found, batch)


def labelled(batch: Batch, answers: Tensor) -> Batch:
    """The batch with these class indices as its labels."""
    if isinstance(batch, Call):
        return replace(batch, rows=labelled(batch.rows, answers))
    return {**batch, "labels": answers} if isinstance(batch, Mapping) else (batch[0], answers)


def row_ids(batch: Batch) -> Tensor | None:
    """The rows' numbers in their collection, shape `(rows,)`, or None where they have none."""
    if isinstance(batch, Call):
        return row_ids(batch.rows)
    found = batch.get("row_ids") if isinstance(batch, Mapping) else None
    return None if found is None else _one_a_row("row_ids", found, batch)


def _one_a_row(name: str, found: Any, batch: Batch) -> Tensor:
    whole = isinstance(found, Tensor) and not found.is_floating_point() and not found.is_complex()
    if not whole or found.shape != (rows(batch),):
        came = f"{found.dtype}, {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"{name} must be a tensor of one whole number for each of {rows(batch)} rows. Got {came}.")
    return found.long()


def real_positions(batch: Batch) -> Tensor | None:
    """Boolean mask of the unpadded positions, shape `(rows, length)`, or None where every position is real.

    Raises:
        DataError: if the mask has another number of dimensions: then it does not say which positions are real.
    """
    if isinstance(batch, Call):
        return real_positions(batch.rows)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is not None and mask.ndim != 2:
        raise DataError(
            f"attention_mask must have shape [rows, length]. Got {list(mask.shape)}. Pass 1 for real positions and 0 "
            "for padding."
        )
    return None if mask is None else mask.bool()


def to(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`."""
    return map_tensors(batch, lambda value: value.to(device))


def in_precision(batch: Batch, precision: torch.dtype) -> Batch:
    """The batch for a model in this precision: every floating-point tensor in it."""
    return map_tensors(batch, lambda value: value.to(precision) if value.is_floating_point() else value)


def rows(batch: Batch) -> int:
    """The number of rows in the batch."""
    return len(_first_tensor(batch))


def length(batch: Batch) -> int:
    """The number of positions of each row, padding included; 1 where rows are not token sequences.

    What comes without a name is a sequence only if it can be nothing else: whole numbers, rows × positions.
    """
    args, kwargs = inputs(batch)
    if args and not kwargs:
        return args[0].shape[1] if _are_token_ids(args[0]) else 1
    tokens = next(iter(kwargs.values()), None)
    if tokens is None or tokens.ndim < 2 or (tokens.ndim in (2, 4) and tokens.is_floating_point()):
        return 1  # a row of floating-point numbers is one vector, or an image
    return tokens.shape[1]


def _are_token_ids(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 2:
        return False
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def head(batch: Batch, count: int) -> Batch:
    """The first `count` rows of the batch."""
    return map_tensors(batch, lambda value: value[:count])


def split(batch: Batch, pieces: int) -> list[Batch]:
    """The rows of the batch in so many pieces of about the same size; fewer where there are fewer rows."""
    if pieces == 1:
        return [batch]
    size = -(-rows(batch) // pieces)
    return [
        map_tensors(batch, lambda value, start=start: value[start : start + size])
        for start in range(0, rows(batch), size)
    ]


def joined(first: Batch, second: Batch) -> Batch | None:
    """The rows of two batches in one; None where their tensors do not fit together.

    Mappings with an `attention_mask` of rows × positions are padded to the longer of the two: with zeros, which the
    mask hides.
    """
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        if isinstance(first, Call) and isinstance(second, Call) and first.forward is second.forward:
            rows = joined(first.rows, second.rows)
            return None if rows is None or isinstance(rows, Call) else replace(first, rows=rows)
        if isinstance(first, Call | Mapping) or isinstance(second, Call | Mapping):
            return None
        fits = len(first) == len(second) and all(map(_fits, first, second))
        return tuple(torch.cat(pair) for pair in zip(first, second, strict=True)) if fits else None
    if first.keys() != second.keys():
        return None
    shapes = [batch["attention_mask"].shape for batch in (first, second) if "attention_mask" in batch]
    if len(shapes) == 2 and all(len(shape) == 2 for shape in shapes):
        short, long = sorted(shape[1] for shape in shapes)
        if short < long:
            first, second = (
                {name: _padded(value, shape, long) for name, value in batch.items()}
                for batch, shape in zip((first, second), shapes, strict=True)
            )
    if not all(_fits(value, second[name]) for name, value in first.items()):
        return None
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}


def _fits(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim > 0 and a[:0].shape == b[:0].shape


def _padded(value: Any, shape: torch.Size, length: int) -> Any:
    is_by_position = isinstance(value, Tensor) and value.shape == shape
    return torch.nn.functional.pad(value, (0, length - shape[1])) if is_by_position else value


def _first_tensor(batch: Batch) -> Tensor:
    if isinstance(batch, Call):
        return _first_tensor(batch.rows)
    return next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores of shape `(rows, classes)`: the model's output, or its field `logits`, or what `forward` makes.

    Raises:
        UnsupportedModelError: if the output is neither.
    """
    if isinstance(batch, Call):
        return batch.forward(model, batch.rows)
    args, kwargs = inputs(batch)
    output = model(*args, **kwargs)
    scores = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if scores is None:
        raise UnsupportedModelError(
            f"a model must return class scores, or an output with `logits`. {type(model).__name__} returned "
            f"{type(output).__name__}. Pass a forward= that gives them, or set its config.return_dict to True."
        )
    return scores


def _class_scores(forward: Forward, model: nn.Module, batch: Tensors) -> Tensor:
    """What a `forward` of the user's gives, if it is class scores."""
    scores: Any = forward(model, batch)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != rows(batch):
        came = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise DataError(f"forward must return class scores of shape [{rows(batch)}, classes]. Got {came}.")
    return scores


def first(batches: Iterable[Any], role: str) -> Batch:
    """The first batch of a collection.

    Raises:
        DataError: if there is none, or it is no batch: see `check`.
    """
    for batch in batches:
        return check(batch)
    raise DataError(f"{role} must hold at least one batch. Got none. Pass more rows.")
