"""Rows of images as batches: normalised, and in training flipped and shifted as He et al. do."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmtkd.batches import Batch
from rmtkd.errors import DataError

SHIFT = 4
"""Pixels by which a training image is moved at most, zeros coming in."""
BATCH, HELD_BATCH = 128, 250


class ImageRows:
    """Images of one size, re-iterable in batches of `pixel_values` and `labels`; and `row_ids` where a row is the same
    in every pass.

    Args:
        images: `rows × height × width × channels`, 0..255.
        labels: class index of each row, or None for rows without labels.
        mean, std: of each channel, of values within 0..1.
        batch_size: rows a batch.
        seed: shuffle with this seed, anew in each epoch; None keeps one order.
        augments: also flip and shift at random, with the same seed.
        named: whether batches are mappings; else pairs, for networks that are called with images alone.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = HELD_BATCH,
        seed: int | None = None,
        augments: bool = False,
        named: bool = True,
    ):
        self.images = images
        self.labels: Any = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.mean, self.std = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        self.batch_size, self.seed, self.augments, self.named, self.epoch = batch_size, seed, augments, named, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose order, flips and shifts of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.images)
        rng = np.random.default_rng((self.seed or 0, self.epoch))
        order = np.arange(count) if self.seed is None else rng.permutation(count)
        for start in range(0, count, self.batch_size):
            batch = self._batch(order[start : start + self.batch_size], rng if self.augments else None)
            pair = [batch[name] for name in ("pixel_values", "labels") if name in batch]
            yield batch if self.named else tuple(pair)

    def _batch(self, rows: np.ndarray, rng: np.random.Generator | None) -> dict[str, Tensor]:
        pixels = torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2).float().div_(255)
        pixels = (pixels - self.mean) / self.std
        batch = {"pixel_values": pixels if rng is None else augmented(pixels, rng)}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch if rng is not None else {**batch, "row_ids": torch.from_numpy(rows)}


def preprocessor(side: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """How images are prepared for a model, as transformers' `preprocessor_config.json` says it."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def augmented(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the images mirrored, each moved by up to `SHIFT` pixels: cut out of itself in a frame of zeros."""
    rows, _, height, width = pixels.shape
    mirrored = torch.from_numpy(rng.random(rows) < 0.5)
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    framed = torch.nn.functional.pad(pixels, (SHIFT,) * 4)
    down, right = torch.from_numpy(rng.integers(0, 2 * SHIFT + 1, (2, rows, 1)))
    y, x = down + torch.arange(height), right + torch.arange(width)
    return framed[torch.arange(rows)[:, None, None], :, y[:, :, None], x[:, None, :]].movedim(-1, 1)


def decode(files: Sequence[bytes | Mapping[str, Any]], size: int, place: str) -> np.ndarray:
    """Images from the bytes of their files: `rows × size × size × 3`, 0..255.

    Args:
        files: PNG and the like; or what the hub's tables hold, with such `bytes`.
        size: height and width that all must have.
        place: where they are, for messages.

    Raises:
        DataError: if one is no image, or of another size.
    """
    from PIL import Image

    made = np.empty((len(files), size, size, 3), dtype=np.uint8)
    for i, file in enumerate(files):
        content = file["bytes"] if isinstance(file, Mapping) else file
        try:
            with Image.open(io.BytesIO(content)) as image:
                found = np.asarray(image.convert("RGB"))
        except Exception as error:  # whatever Pillow makes of other bytes
            raise DataError(f"{place} must hold images. Row {i} gave: {error}. Fetch it again.") from None
        if found.shape != made.shape[1:]:
            came = f"{found.shape[1]} × {found.shape[0]}"
            raise DataError(f"images of {place} must be {size} × {size}. Row {i} is {came}. Scale them.")
        made[i] = found
    return made
