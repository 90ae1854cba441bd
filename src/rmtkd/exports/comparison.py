"""Is an exported network the model that it was made of? What both say to the same rows, in batches of many shapes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.errors import DataError, ExportError
from rmtkd.measurement import answers
from rmtkd.memory import Pieces

TOLERANCE = 1e-4
"""Largest difference of float32 scores, relative to the largest score: other kernels round differently."""
LEAST_AGREEMENT = 0.75
"""With a smaller share of equal answers an 8-bit network is no form of the model at all."""
ROWS = 256
"""About as many rows are compared in batches of several shapes."""
FEW = 7
"""Rows of the batches that have an odd number of rows and of tokens."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What an exported network and its model say to the same rows.

    Attributes:
        rows: how many were compared.
        shapes: of the batches, as (rows, tokens), each once.
        difference: largest difference of scores, relative to the largest score.
        agreement: share of rows with the same answer.
        flipped: rows with another answer although the model's two best scores are further apart than rounding is.
    """

    rows: int
    shapes: tuple[tuple[int, int], ...]
    difference: float
    agreement: float
    flipped: int


def some_of(batches: Sequence[Batch]) -> list[Batch]:
    """Some of the batches, from first to last: rows that are not shuffled come shortest first.

    Raises:
        DataError: if there are none.
    """
    if not batches:
        raise DataError("rows for an export must hold at least one batch. Got none. Pass more rows.")
    wanted = min(len(batches), max(2, ROWS // batching.rows(batches[0])))
    return [batches[int(i)] for i in torch.linspace(0, len(batches) - 1, wanted).round()]


def in_shapes(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, and of each the first row alone, and an odd number of rows with an odd number of tokens."""
    for batch in batches:
        tokens = batching.length(batch)
        odd = max(1, tokens - 1 + tokens % 2)
        few = batching.head(batch, FEW)
        yield batch
        yield batching.head(batch, 1)
        yield batching.map_tensors(few, lambda value, odd=odd: value[:, :odd] if value.ndim == 2 else value)


def compare(model: nn.Module, exported: nn.Module, batches: Iterable[Batch]) -> Agreement:
    """What a model and its exported network say to the same batches.

    Raises:
        ExportError: if the exported network does not run on one of them, or gives no numbers.
    """
    expected, got, shapes = [], [], []
    for batch in batches:
        shape = (batching.rows(batch), batching.length(batch))
        expected.append(answers(model, batch, Pieces()))
        try:
            got.append(answers(exported, batch, Pieces()))
        except Exception as error:  # of whatever runtime
            raise ExportError(
                f"an exported network must run on every batch. It fails on {shape[0]} rows of {shape[1]} tokens with: "
                f"{error}. Export to another format; nothing was written."
            ) from error
        shapes.append(shape)
    wanted, found = torch.cat(expected), torch.cat(got)
    if not found.isfinite().all():
        raise ExportError(
            "an exported network must give numbers. It gives infinities or none at all. Export to another format; "
            "nothing was written."
        )
    scale = wanted.abs().max().clamp_min(1e-12)
    best = wanted.topk(2).values
    differ = wanted.argmax(-1) != found.argmax(-1)
    return Agreement(
        rows=len(wanted),
        shapes=tuple(dict.fromkeys(shapes)),
        difference=float((found - wanted).abs().max() / scale),
        agreement=1 - float(differ.float().mean()),
        flipped=int((differ & (best[:, 0] - best[:, 1] > 2 * TOLERANCE * scale)).sum()),
    )


def hold_to(found: Agreement, *, int8: bool) -> Agreement:
    """Return what was found if the exported network passes for the model.

    Raises:
        ExportError: if scores or answers are others; of 8-bit networks, if far too many answers are.
    """
    if int8:
        if found.agreement < LEAST_AGREEMENT:
            raise ExportError(
                f"an 8-bit network must give the model's answer to at least {LEAST_AGREEMENT:.0%} of rows. It does to "
                f"{found.agreement:.1%} of {found.rows}. Export without --int8; nothing was written."
            )
    elif not found.difference <= TOLERANCE or found.flipped:  # NaN is in no order
        raise ExportError(
            f"an exported network must give the model's scores to {TOLERANCE:.0e} of the largest, and its answers. "
            f"Scores differ by {found.difference:.1e}, and {found.flipped} of {found.rows} answers. Export to another "
            "format; nothing was written."
        )
    return found
