"""Handwritten digits as token sequences: the real 8 × 8 scans that scikit-learn ships, each as 16 patch tokens.

Small enough for a demonstration and for tests, real enough to lose accuracy when something is cut wrongly.
"""

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

LEVELS = 4
"""Grey levels of a pixel, from the scans' 17."""
PATCHES = LEVELS**4
START, PAD = PATCHES, PATCHES + 1
LENGTH = 17
"""A start token and 16 patches of 2 × 2 pixels."""
REPORT, SELECTION = 450, 150
"""Rows held out for the report and for selection; the other 1,197 are trained on."""
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


def load_rows(data: Path | None, tokenizer: Any, seed: int) -> Rows:
    """All rows by role. They ship with scikit-learn: `data` and `tokenizer` have nothing to say."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))  # the original order is by writer
    scans, labels = digits.images[order], digits.target[order]
    held = REPORT + SELECTION
    training = np.concatenate([shifted(scans[held:], *shift) for shift in SHIFTS])
    return Rows(
        train=TokenRows(tokens(training), np.tile(labels[held:], len(SHIFTS)), pad_id=PAD, seed=seed),
        selection=TokenRows(tokens(scans[REPORT:held]), labels[REPORT:held], pad_id=PAD, batch_size=150),
        report=TokenRows(tokens(scans[:REPORT]), labels[:REPORT], pad_id=PAD, batch_size=150),
    )


def file_rows(path: Path, tokenizer: Any) -> TokenRows:
    """Rows of a parquet file with columns `pixels` (64 grey levels) and `label`."""
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"the rows must be in {path}. There is no such file. Check --file.")
    table = pq.read_table(path)
    scans = np.array(table["pixels"].to_pylist()).reshape(-1, 8, 8)
    return TokenRows(tokens(scans), table["label"].to_pylist(), pad_id=PAD, batch_size=150)


def start(path: str | None, seed: int) -> Source:
    """A small BERT from a random start."""
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
        num_labels=10,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Source(model=BertForSequenceClassification(config).eval())


def example(model: nn.Module) -> dict[str, Any]:
    """The batch whose cost is measured."""
    return synthetic_batch(PATCHES, 32, LENGTH)


DIGITS = Recipe(
    name="digits",
    describe="scikit-learn's 8 × 8 handwritten digits as 17 tokens: 1,797 scans, no download; reported on 450 of them",
    labels=tuple(str(digit) for digit in range(10)),
    start=start,
    load=load_classifier,
    rows=load_rows,
    file_rows=file_rows,
    example=example,
    training=Recovery(lr=1e-3, weight_decay=0.01),
    epochs=20,
    needs_no_checkpoint=True,
    options={"target": "25%params", "epochs": 5, "recovery": Recovery(lr=1e-3)},
)
