"""Models and rows that several tests share: tiny, random, in float64 where a claim is exact."""

import os
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rmtkd.recipes.rows import TokenRows


def tiny_bert(*, seed: int = 0, labels: int = 3, layers: int = 2, **config: object) -> BertForSequenceClassification:
    """A BERT of width 32 with two heads of 16, random but far from its small initial values."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            **{
                "vocab_size": 50,
                "hidden_size": 32,
                "num_hidden_layers": layers,
                "num_attention_heads": 2,
                "intermediate_size": 48,
                "max_position_embeddings": 24,
                "num_labels": labels,
                "hidden_dropout_prob": 0.1,
                **config,
            }
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_rows(
    count: int = 64, *, seed: int = 0, labels: int = 3, batch_size: int = 16, shuffle: bool = False
) -> TokenRows:
    """Random token rows of unequal length, so that batches hold padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (count,), generator=generator)
    ids = [torch.randint(1, 50, (int(n),), generator=generator).tolist() for n in lengths]
    classes = torch.randint(0, labels, (count,), generator=generator).tolist()
    return TokenRows(ids, classes, batch_size=batch_size, seed=seed if shuffle else None)


@pytest.fixture
def model() -> BertForSequenceClassification:
    return tiny_bert()


@pytest.fixture
def rows() -> TokenRows:
    return random_rows()


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data, named by RMTKD_DATA."""
    folder = os.environ.get("RMTKD_DATA")
    if not folder:
        pytest.skip("RMTKD_DATA does not name the folder of real data")
    return Path(folder)
