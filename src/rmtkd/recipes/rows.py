"""Rows of token ids as batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

POOL = 50
"""Batches' worth of shuffled rows that are sorted by length together: little padding, still random."""
STEP = 8
"""Batches are as long as a multiple of so many tokens, or as the longest row of all: few shapes, for which memory is
used again and kernels are kept. At any length a step on a CPU takes 1.3 times as long (docs/log.md)."""


class TokenRows:
    """Token sequences of unequal length, re-iterable in padded batches.

    A batch holds `input_ids`, `attention_mask`, `row_ids` (each row's index here, whatever the order), and
    `token_type_ids` and `labels` where there are any.

    Args:
        ids: token ids of each row.
        labels: class index of each row, or None for rows without labels.
        types: token type ids of each row, for pairs of texts.
        batch_size: rows a batch.
        pad_id: token id of padding.
        seed: shuffle with this seed, anew in each epoch; None keeps one order, shortest rows first.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]] | np.ndarray,
        labels: Sequence[int] | np.ndarray | None,
        *,
        types: Sequence[Sequence[int]] | None = None,
        batch_size: int = 32,
        pad_id: int = 0,
        seed: int | None = None,
    ):
        self.ids, self.types = ids, types
        self.labels: Any = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.batch_size, self.pad_id, self.seed = batch_size, pad_id, seed
        self.lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self.longest = int(self.lengths.max(initial=0))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.ids) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self._order():
            yield self._batch(rows)

    def _order(self) -> list[np.ndarray]:
        if self.seed is None:
            order = np.argsort(self.lengths, kind="stable")
            return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rng = np.random.default_rng((self.seed, self.epoch))
        shuffled = rng.permutation(len(self.ids))
        batches = []
        for start in range(0, len(shuffled), POOL * self.batch_size):
            pool = shuffled[start : start + POOL * self.batch_size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        length = min(-(-self.lengths[rows].max() // STEP) * STEP, self.longest)
        real = np.arange(length)[None] < self.lengths[rows, None]
        batch = {"input_ids": _pad(self.ids, rows, real, self.pad_id), "attention_mask": torch.from_numpy(real).long()}
        if self.types is not None:
            batch["token_type_ids"] = _pad(self.types, rows, real, 0)
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return {**batch, "row_ids": torch.from_numpy(rows)}


def _pad(values: Sequence[Sequence[int]] | np.ndarray, rows: np.ndarray, real: np.ndarray, filler: int) -> Tensor:
    """The values of some rows, one row each, `filler` where nothing is real."""
    padded = np.full(real.shape, filler, dtype=np.int64)
    padded[real] = np.concatenate([values[row] for row in rows])
    return torch.from_numpy(padded)


def synthetic_batch(vocabulary: int, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens without padding, for measuring cost."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
