"""Handwritten digits as token sequences: the real 8 × 8 scans that scikit-learn ships, each as 16 patch tokens.

Small enough for a demonstration and for tests, real enough to lose accuracy when something is cut wrongly.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rmtkd.distillation import Recovery
from rmtkd.errors import DataError
from rmtkd.recipes.checkpoints import load_classifier
from rmtkd.recipes.images import ImageRows, preprocessor
from rmtkd.recipes.recipe import Recipe, Rows, Source
from rmtkd.recipes.results import MEASURED
from rmtkd.recipes.rows import TokenRows, synthetic_batch
from rmtkd.recipes.tables import class_indices, read_columns
from rmtkd.seeding import seeded

LEVELS = 4
"""Grey levels of a pixel, from the scans' 17."""
PATCHES = LEVELS**4
START, PAD = PATCHES, PATCHES + 1
LENGTH = 17
"""A start token and 16 patches of 2 × 2 pixels."""
REPORT, SELECTION = 450, 150
"""Rows held out for the report and for selection; the other 1,197 are trained on."""
NORMALISATION: dict[str, Any] = {"mean": (0.3,), "std": (0.37,)}
LABELS = tuple(str(digit) for digit in range(10))
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
"""Training scans are also seen moved by one pixel."""


def tokens(scans: np.ndarray) -> np.ndarray:
    """Scans of shape `(rows, 8, 8)` and values 0..16 as token ids of shape `(rows, 17)`."""
    levels = np.minimum(scans.astype(np.int64) * LEVELS // 17, LEVELS - 1)
    patches = levels.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)
    ids = patches @ LEVELS ** np.arange(4)
    return np.concatenate([np.full((len(ids), 1), START), ids], axis=1)


def shifted(scans: np.ndarray, down: int, right: int) -> np.ndarray:
    """Scans moved by some pixels, zeros coming in."""
    moved = np.zeros_like(scans)
    source = scans[:, max(0, -down) : 8 - max(0, down), max(0, -right) : 8 - max(0, right)]
    moved[:, max(0, down) : 8 + min(0, down), max(0, right) : 8 + min(0, right)] = source
    return moved


Form = Callable[..., Any]
"""Rows from scans, labels, `batch_size` and `seed`."""


def token_rows(scans: np.ndarray, labels: np.ndarray, **options: Any) -> TokenRows:
    """Scans as sequences of tokens."""
    return TokenRows(tokens(scans), labels, pad_id=PAD, **options)


def image_rows(scans: np.ndarray, labels: np.ndarray, **options: Any) -> ImageRows:
    """Scans as images of one channel."""
    return ImageRows((scans * (255 / 16)).astype(np.uint8)[..., None], labels, **NORMALISATION, **options)


def load_rows(form: Form, train_batch: int, data: Path | None, source: Source, seed: int) -> Rows:
    """All rows by role. They ship with scikit-learn: `data` and `source` have nothing to say."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))  # the original order is by writer
    scans, labels = digits.images[order], digits.target[order]
    held = REPORT + SELECTION
    training = np.concatenate([shifted(scans[held:], *shift) for shift in SHIFTS])
    return Rows(
        train=form(training, np.tile(labels[held:], len(SHIFTS)), seed=seed, batch_size=train_batch),
        selection=form(scans[REPORT:held], labels[REPORT:held], batch_size=150),
        report=form(scans[:REPORT], labels[:REPORT], batch_size=150),
        note=f"{len(training):,} training rows (with scans moved), {SELECTION} selection and {REPORT} report rows",
    )


def file_rows(form: Form, path: Path, source: Source) -> Any:
    """Rows of a file with columns `pixels` (64 grey levels, 0..16) and `label`.

    Raises:
        DataError: if the file cannot be read or does not hold scans and class indices.
    """
    pixels, labels = read_columns(path, ["pixels"], "label")
    for scan in pixels:
        if not isinstance(scan, list) or len(scan) != 64 or not all(map(_is_grey, scan)):
            raise DataError(f"column 'pixels' of {path} must hold lists of 64 grey levels within 0..16. Got {scan!r}.")
    indices = class_indices(labels, LABELS, f"column 'label' of {path}")
    return form(np.array(pixels).reshape(-1, 8, 8), np.asarray(indices), batch_size=150)


def _is_grey(level: Any) -> bool:
    return isinstance(level, int | float) and 0 <= level <= 16


def start(path: str | None, seed: int, data: Path | None = None) -> Source:
    """A small BERT from a random start.

    Raises:
        DataError: if a checkpoint is given.
    """
    from transformers import BertConfig, BertForSequenceClassification

    if path is not None:
        raise DataError(f"the digits teacher starts from nothing. Got --model {path!r}. Leave it out.")
    config = BertConfig(
        vocab_size=PATCHES + 2,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=LENGTH,
        type_vocab_size=1,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
        pad_token_id=PAD,
    )
    with seeded(seed):
        return Source(model=BertForSequenceClassification(config).eval())


def example(model: nn.Module, rows: Rows) -> dict[str, Any]:
    """The batch whose cost is measured."""
    return synthetic_batch(PATCHES, 32, LENGTH)


def start_cnn(path: str | None, seed: int, data: Path | None = None) -> Source:
    """A small residual network from a random start.

    Raises:
        DataError: if a checkpoint is given.
    """
    from rmtkd.modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

    if path is not None:
        raise DataError(f"the digits teacher starts from nothing. Got --model {path!r}. Leave it out.")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = CifarResNetConfig(hidden_sizes=[16, 32], inner_sizes=[[16, 16], [32, 32]], num_channels=1, **names)
    with seeded(seed):
        return source_of(CifarResNetForImageClassification(config).eval())


def load_cnn(path: str, data: Path | None = None) -> Source:
    """A trained network for images of digits."""
    return source_of(load_classifier(path, labels=LABELS, task="ImageClassification").model)


def source_of(model: nn.Module) -> Source:
    """A network and how images are prepared for it."""
    return Source(model=model, preprocessor=preprocessor(8, **NORMALISATION))


def image_example(model: nn.Module, rows: Rows) -> dict[str, Any]:
    """The batch whose cost is measured."""
    return {"pixel_values": torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


DIGITS = Recipe(
    name="digits",
    describe="scikit-learn's 8 × 8 handwritten digits as 17 tokens: 1,797 scans, no download; reported on 450 of them",
    labels=LABELS,
    start=start,
    load=partial(load_classifier, labels=LABELS),
    rows=partial(load_rows, token_rows, 32),
    file_rows=partial(file_rows, token_rows),
    example=example,
    training=Recovery(lr=1e-3, average=0.999),
    epochs=24.0,
    measured=MEASURED["digits"],
    needs_no_checkpoint=True,
    options={"target": "25%params", "epochs": 5.0, "recovery": Recovery(lr=1e-3)},
)
DIGITS_CNN = Recipe(
    name="digits_cnn",
    describe="the same scans as images of 8 × 8 pixels, for a small residual network; reported on 450 of them",
    labels=LABELS,
    start=start_cnn,
    load=load_cnn,
    rows=partial(load_rows, image_rows, 64),
    file_rows=partial(file_rows, image_rows),
    example=image_example,
    training=Recovery(lr=3e-3),
    epochs=6.0,
    measured=MEASURED["digits_cnn"],
    needs_no_checkpoint=True,
    options={"target": "40%flops", "epochs": 3.0, "multiple_of": 4, "recovery": Recovery(lr=2e-3)},
)
