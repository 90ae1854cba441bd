"""The claims of `rmtkd.replicates`: symmetrised cross-covariance of two passes, its noise symmetric about zero.

The reference is NumPy in float64 on all vectors at once.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rmtkd
from conftest import random_rows, tiny_bert
from rmtkd.checkpoint import read_planned
from rmtkd.errors import DataError, UnsupportedModelError
from rmtkd.planning import retarget
from rmtkd.replicates import Replicates


def pairs(n: int = 900, groups: int = 2, width: int = 6, mean: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    signal, one, other = (torch.randn(n, groups, width, generator=generator, dtype=torch.float64) for _ in range(3))
    return signal + one + mean, signal + 2 * other - mean


def streamed(first: Tensor, second: Tensor, size: int = 100) -> Replicates:
    replicates = Replicates(first.shape[2], groups=first.shape[1])
    for a, b in zip(first.split(size), second.split(size), strict=True):
        replicates.update(a, b)
    return replicates


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_it_is_the_symmetrised_cross_covariance_about_the_means(mean: float) -> None:
    first, second = pairs(mean=mean)
    found = streamed(first, second)
    for group in range(2):
        a, b = ((x - x.mean(0)) for x in (first[:, group].numpy(), second[:, group].numpy()))
        cross = a.T @ b / len(a)
        np.testing.assert_allclose(found.covariance()[group], (cross + cross.T) / 2, atol=1e-10 * max(1, mean))
        expected = np.linalg.eigvalsh((cross + cross.T) / 2)[::-1]
        np.testing.assert_allclose(found.eigenvalues()[group], expected, atol=1e-10 * max(1, mean))


def test_any_split_merged_equals_one_shot() -> None:
    first, second = pairs()
    merged = streamed(first[:200], second[:200]).merge(streamed(first[200:], second[200:]))
    torch.testing.assert_close(merged.covariance(), streamed(first, second, 900).covariance(), rtol=1e-10, atol=1e-10)


def test_equal_passes_leave_no_noise() -> None:
    first, _ = pairs()
    found = streamed(first, first).eigenvalues()
    assert (found > 0.1).all()


def test_noise_alone_is_symmetric_about_zero() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(4000, 1, 200, generator=generator) for _ in range(2))
    found = streamed(first, second).eigenvalues()[0]
    assert float(found.max()) == pytest.approx(-float(found.min()), rel=0.05)
    assert float(found.median()) == pytest.approx(0, abs=0.02)


def test_values_that_are_not_finite_are_refused() -> None:
    first, second = pairs()
    second[3, 1, 2] = torch.nan
    with pytest.raises(DataError, match="finite"):
        streamed(first, second)


@pytest.mark.parametrize("policy", ["paper", "guarded"])
def test_a_model_with_dropout_is_compressed_by_the_rule_that_runs_it_twice(policy: Any, tmp_path: Path) -> None:
    model, rows = tiny_bert(layers=1), list(random_rows(60))
    with torch.no_grad():
        rows = [{**row, "labels": model(**row).logits.argmax(-1)} for row in rows]
    options: Any = {"rule": "replicate", "policy": policy, "target": "70%params", "multiple_of": 2, "epochs": 0.2}
    small = rmtkd.compress(model, train=rows, selection=rows, out=tmp_path / "run", **options)
    assert small.plan.meets_target and small.record["config"]["rule"] == "replicate"
    assert {site.rule for site in small.plan.sites} == {"replicate"}
    assert 0 < next(site.count for site in small.plan.sites if site.name == "layer.0.ffn") < 48
    earlier, spectrums = read_planned(tmp_path / "run")
    again = retarget(earlier, spectrums, target="60%params")
    assert again.rule == "replicate" and again.meets_target
    applied = rmtkd.compress(model, train=rows, selection=rows, plan=again, epochs=0.0)
    assert applied.plan.widths == again.widths


def test_a_model_without_dropout_cannot_be_run_twice() -> None:
    model = tiny_bert(layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(UnsupportedModelError, match="must have dropout modules"):
        rmtkd.plan(model, calibration=list(random_rows(60)), rule="replicate")
