"""Rows of token ids as batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

POOL = 50
"""Batches' worth of shuffled rows that are sorted by length together: little padding, still random."""


class TokenRows:
    """Token sequences of unequal length and their labels, re-iterable in padded batches.

    Args:
        ids: token ids of each row.
        labels: class index of each row.
        batch_size: rows a batch.
        pad_id: token id of padding.
        seed: shuffle with this seed, anew in each epoch; None keeps one order, shortest rows first.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        *,
        batch_size: int = 32,
        pad_id: int = 0,
        seed: int | None = None,
    ):
        self.ids, self.labels = ids, np.asarray(labels, dtype=np.int64)
        self.batch_size, self.pad_id, self.seed = batch_size, pad_id, seed
        self.lengths = np.array([len(row) for row in ids], dtype=np.int64)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.ids) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in self._order():
            yield self._pad(rows)

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

    def _pad(self, rows: np.ndarray) -> dict[str, Tensor]:
        length = int(self.lengths[rows].max())
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : self.lengths[row]] = torch.as_tensor(self.ids[row], dtype=torch.long)
            mask[i, : self.lengths[row]] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.from_numpy(self.labels[rows])}


def synthetic_batch(vocabulary: int, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens without padding, for measuring cost."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
