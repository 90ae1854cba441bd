"""The claims of `rmtkd.effective`: what correlated vectors are worth, whatever the spectrum, exact to merge.

Known answers: independent vectors n; an autoregression ρ over sequences of L, n / (1 + 2 Σ (1 − k/L) ρ²ᵏ); r copies of
each vector n / r.
"""

from functools import reduce
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkd.effective import GROUPS, EffectiveSize
from rmtkd.errors import DataError

LENGTH = 32


def white(n: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregression(n: int, width: int, rho: float, seed: int = 0) -> Tensor:
    steps = white(n, width, seed).unflatten(0, (-1, LENGTH))
    for t in range(1, LENGTH):
        steps[:, t] = rho * steps[:, t - 1] + (1 - rho**2) ** 0.5 * steps[:, t]
    return steps.flatten(0, 1)


def numbers(n: int, length: int = LENGTH) -> Tensor:
    return torch.arange(n) // length


def streamed(vectors: Tensor, sequences: Tensor, size: int = 1000) -> EffectiveSize:
    effective = EffectiveSize(vectors.shape[1])
    for part, ids in zip(vectors.split(size), sequences.split(size), strict=True):
        effective.update(part, ids)
    return effective


def share(vectors: Tensor, sequences: Tensor | None = None) -> float:
    value = streamed(vectors, numbers(len(vectors)) if sequences is None else sequences).value()
    assert value is not None
    return value / len(vectors)


def theory(rho: float) -> float:
    return 1 / (1 + 2 * sum((1 - k / LENGTH) * rho ** (2 * k) for k in range(1, LENGTH)))


def spectra(width: int) -> dict[str, Tensor]:
    """Linear maps that give white vectors a spectrum."""
    rotation = torch.linalg.qr(white(width, width, seed=9)).Q
    power = torch.diag(1 / (torch.arange(width, dtype=torch.float64) + 10).sqrt())
    spikes = torch.eye(width, dtype=torch.float64) + 30 * rotation[:, :10] @ rotation[:, :10].mT
    massive = torch.ones(width, dtype=torch.float64)
    massive[:2] = 1e3
    return {"flat": torch.eye(width).double(), "power": power @ rotation, "spikes": spikes, "massive": massive.diag()}


CASES = [(256, "flat"), (256, "power"), (256, "spikes"), (256, "massive"), (40, "flat"), (40, "power"), (700, "flat")]


# ---------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize(("width", "spectrum"), CASES)
def test_independent_vectors_count_in_full(width: int, spectrum: str) -> None:
    form = spectra(width)[spectrum]
    found = [share(white(6400, width, seed) @ form) for seed in range(3)]
    assert sum(found) / 3 == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("width", "spectrum"), CASES)
def test_an_autoregression_counts_as_in_theory(width: int, spectrum: str) -> None:
    assert theory(0.9) == pytest.approx(0.1231, abs=1e-4)
    form = spectra(width)[spectrum]
    found = [share(autoregression(9600, width, 0.9, seed) @ form) for seed in range(3)]
    assert sum(found) / 3 == pytest.approx(0.123, abs=0.015)


@pytest.mark.parametrize("copies", [2, 4, 16])
def test_copies_of_a_token_count_once(copies: int) -> None:
    vectors = white(4800, 200).repeat_interleave(copies, 0)
    assert share(vectors) == pytest.approx(1 / copies, rel=0.1)


def test_strong_spikes_that_are_correlated_otherwise_do_not_tell() -> None:
    """Ten directions of a thousand times the variance, nearly constant over a sequence, in white noise."""
    noise, factors = white(9600, 256), autoregression(9600, 10, 0.99, seed=1)
    directions = torch.linalg.qr(white(256, 10, seed=2)).Q
    assert share(noise + 30 * factors @ directions.mT) == pytest.approx(1, abs=0.05)


def test_heavy_tails_of_whole_tokens_cost_what_theory_says() -> None:
    """Of tokens of scale s, (Σ s²)² / Σ s⁴ count."""
    scale = white(12800, 1, seed=3).abs() + 0.2
    expected = float(scale.square().sum() ** 2 / scale.pow(4).sum()) / len(scale)
    assert expected < 0.6
    assert share(white(12800, 256) * scale) == pytest.approx(expected, rel=0.07)


def test_heavy_tails_of_single_coordinates_cost_little() -> None:
    """They do not move the edge of the Marchenko–Pastur law either."""
    assert share(white(12800, 256) * white(12800, 256, seed=4)) == pytest.approx(1, abs=0.07)


def test_dead_and_repeated_coordinates_change_nothing() -> None:
    vectors = autoregression(9600, 96, 0.8)
    expected = share(vectors)
    padded = torch.cat([vectors, torch.full((len(vectors), 200), 3.0), vectors[:, :5]], 1)
    assert share(padded) == pytest.approx(expected, rel=0.1)
    assert share(padded.float()) == pytest.approx(share(padded), rel=1e-4)


def test_more_directions_than_effective_vectors_are_no_obstacle() -> None:
    found = [share(autoregression(1280, 256, 0.9, seed)) for seed in range(4)]  # 157 effective, 128 buckets
    assert sum(found) / 4 == pytest.approx(theory(0.9), abs=0.015)


# ---------------------------------------------------------------------------------------------- streaming


def state_of(effective: EffectiveSize) -> list[Tensor]:
    return [x for g in effective._groups if g.count for x in (g.mean, g.covariance())]


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 640), max_size=7).map(sorted),
    mean=st.sampled_from([0.0, 1.0, 1e4]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order_equals_one_shot(cuts: list[int], mean: float, order) -> None:
    vectors, sequences = white(640, 150) + mean, numbers(640, 16)
    bounds = [0, *cuts, 640]
    sizes = [b - a for a, b in pairwise(bounds)]  # some are empty, most cut a sequence
    parts = [streamed(x, i) for x, i in zip(vectors.split(sizes), sequences.split(sizes), strict=True)]
    order.shuffle(parts)
    whole, merged = streamed(vectors, sequences, 640), reduce(EffectiveSize.merge, parts)
    assert merged.count == 640
    assert merged.value() == pytest.approx(whole.value(), rel=1e-10 * max(1, mean))
    for a, b in zip(state_of(merged), state_of(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * max(1, mean))


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_any_number_of_workers_gives_the_same(workers: int) -> None:
    vectors, sequences = autoregression(3200, 200, 0.7), numbers(3200)
    parts = [streamed(vectors[sequences % workers == w], sequences[sequences % workers == w]) for w in range(workers)]
    assert reduce(EffectiveSize.merge, parts).value() == pytest.approx(share(vectors) * 3200, rel=1e-12)


def test_a_mean_of_ten_thousand_deviations_does_not_tell() -> None:
    vectors = autoregression(6400, 100, 0.9)
    assert share(vectors + 1e4) == pytest.approx(share(vectors), rel=1e-6)
    assert share((vectors + 1e4).float()) == pytest.approx(share(vectors), rel=1e-2)


def test_a_sequence_is_one_wherever_its_positions_come() -> None:
    """Position by position over all sequences: as far apart as can be."""
    vectors, sequences = autoregression(6400, 100, 0.9), numbers(6400)
    order = torch.arange(6400).unflatten(0, (-1, LENGTH)).T.flatten()
    assert streamed(vectors[order], sequences[order]).value() == pytest.approx(share(vectors) * 6400, rel=1e-10)


def test_groups_are_even_and_follow_no_cycle() -> None:
    from rmtkd.effective import _scattered

    for ids in (torch.arange(800), torch.arange(0, 6400, 8), torch.arange(10**12, 10**12 + 800)):
        counts = torch.bincount(_scattered(ids), minlength=GROUPS)
        assert counts.min() > 60 and counts.max() < 140


def test_memory_does_not_grow_with_the_width() -> None:
    effective = streamed(white(300, 5000), numbers(300))
    assert sum(t.numel() * 8 for g in effective._groups for t in g.state().values()) < 1.1e6


# ---------------------------------------------------------------------------------------------- edge cases


def test_nothing_is_said_where_nothing_can_be() -> None:
    assert EffectiveSize(8).value() is None
    assert streamed(white(100, 8), torch.zeros(100, dtype=torch.long)).value() is None  # one sequence
    assert streamed(white(100, 1), numbers(100, 1)).value() is None  # one direction has no pairs
    assert streamed(torch.ones(100, 8), numbers(100, 1)).value() is None  # no variance


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_and_nothing_is_added(bad: float) -> None:
    effective, vectors = streamed(white(200, 300), numbers(200)), white(40, 300)
    before = effective.value()
    vectors[7, 250] = bad
    with pytest.raises(DataError, match="finite"):
        effective.update(vectors, numbers(40))
    assert (effective.count, effective.value()) == (200, before)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[n, 8\]"):
        EffectiveSize(8).update(white(4, 9), torch.arange(4))
    with pytest.raises(DataError, match="number of a sequence"):
        EffectiveSize(8).update(white(4, 8), torch.arange(3))
    with pytest.raises(DataError, match="equal widths"):
        EffectiveSize(8).merge(EffectiveSize(9))
