"""Handwritten digits as token sequences: the real 8 × 8 scans that scikit-learn ships, each as 16 patch tokens.

Small enough for a demonstration and for tests, real enough to lose accuracy when something is cut wrongly.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rmtkd.distillation import Recovery
from rmtkd.errors import DataError
from rmtkd.recipes.checkpoints import load_classifier
from rmtkd.recipes.recipe import Recipe, Rows, Source
from rmtkd.recipes.rows import TokenRows, synthetic_batch
from rmtkd.recipes.tables import class_indices, read_columns

LEVELS = 4
"""Grey levels of a pixel, from the scans' 17."""
PATCHES = LEVELS**4
START, PAD = PATCHES, PATCHES + 1
LENGTH = 17
"""A start token and 16 patches of 2 × 2 pixels."""
REPORT, SELECTION = 450, 150
"""Rows held out for the report and for selection; the other 1,197 are trained on."""
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


def load_rows(data: Path | None, source: Source, seed: int) -> Rows:
    """All rows by role. They ship with scikit-learn: `data` and `source` have nothing to say."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))  # the original order is by writer
    scans, labels = digits.images[order], digits.target[order]
    held = REPORT + SELECTION
    training = np.concatenate([shifted(scans[held:], *shift) for shift in SHIFTS])
    return Rows(
        train=TokenRows(tokens(training), np.tile(labels[held:], len(SHIFTS)), pad_id=PAD, seed=seed),
        selection=TokenRows(tokens(scans[REPORT:held]), labels[REPORT:held], pad_id=PAD, batch_size=150),
        report=TokenRows(tokens(scans[:REPORT]), labels[:REPORT], pad_id=PAD, batch_size=150),
        note=f"{len(training):,} training rows (with scans moved), {SELECTION} selection and {REPORT} report rows",
    )


def file_rows(path: Path, source: Source) -> TokenRows:
    """Rows of a file with columns `pixels` (64 grey levels, 0..16) and `label`.

    Raises:
        DataError: if the file cannot be read or does not hold scans and class indices.
    """
    pixels, labels = read_columns(path, ["pixels"], "label")
    for scan in pixels:
        if not isinstance(scan, list) or len(scan) != 64 or not all(p is not None and 0 <= p <= 16 for p in scan):
            raise DataError(f"column 'pixels' of {path} must hold lists of 64 grey levels within 0..16. Got {scan!r}.")
    indices = class_indices(labels, LABELS, f"column 'label' of {path}")
    return TokenRows(tokens(np.array(pixels).reshape(-1, 8, 8)), indices, pad_id=PAD, batch_size=150)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Source(model=BertForSequenceClassification(config).eval())


def example(model: nn.Module, rows: Rows) -> dict[str, Any]:
    """The batch whose cost is measured."""
    return synthetic_batch(PATCHES, 32, LENGTH)


DIGITS = Recipe(
    name="digits",
    describe="scikit-learn's 8 × 8 handwritten digits as 17 tokens: 1,797 scans, no download; reported on 450 of them",
    labels=LABELS,
    start=start,
    load=partial(load_classifier, labels=LABELS),
    rows=load_rows,
    file_rows=file_rows,
    example=example,
    training=Recovery(lr=1e-3, average=0.999),
    epochs=24.0,
    needs_no_checkpoint=True,
    options={"target": "25%params", "epochs": 5.0, "recovery": Recovery(lr=1e-3)},
)
