"""The claims of the spectral rules: golden values, known answers on spectra whose signal is known, and how often noise
alone is called signal."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import eigh
from scipy.special import airy

from rmtkd.effective import EffectiveSize
from rmtkd.errors import DataError, OptionError
from rmtkd.spectra import (
    RULES,
    AnisotropicMarchenkoPastur,
    BulkMatchingRule,
    ConsensusRule,
    EnergyRule,
    FixedRule,
    GapRule,
    GavishDonohoRule,
    MarchenkoPastur,
    MarchenkoPasturRule,
    NoiseEdge,
    ParallelAnalysisRule,
    ReplicateRule,
    ScreenotRule,
    Spectrum,
    TracyWidomRule,
    rule_named,
)
from rmtkd.spectra.anisotropic import edge_of
from rmtkd.spectra.classical import hard_threshold, hard_threshold_of_median, screenot_threshold
from rmtkd.spectra.matching import _largest_eigenvalue
from rmtkd.spectra.tracy_widom import tracy_widom_cdf, tracy_widom_quantile

D = 128


def wishart(population: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The covariance of n ≥ d Gaussian vectors of this population covariance, or of these variances (Bartlett)."""
    rng, d = np.random.default_rng(seed), len(population)
    factor = np.tril(rng.standard_normal((d, d)), -1) + np.diag(np.sqrt(rng.chisquare(n - np.arange(d))))
    if population.ndim == 1:
        factor *= np.sqrt(population)[:, None]
    else:
        factor = np.linalg.cholesky(population) @ factor
    return factor @ factor.T / n


def spectrum_of(covariance: np.ndarray, n: int, effective: float | None = None) -> Spectrum:
    return Spectrum(
        eigenvalues=np.linalg.eigvalsh(covariance)[None, ::-1].copy(),
        samples=n,
        variances=np.diag(covariance)[None].copy(),
        effective_samples=effective,
    )


def counted(found: NoiseEdge, spectrum: Spectrum) -> int:
    return found.count(spectrum.eigenvalues)


def noise_variances(kind: str, seed: int, d: int = D) -> np.ndarray:
    return {
        "iso": np.ones(d),
        "hetero": np.random.default_rng(1000 + seed).gamma(2, 0.5, d),
        "plaw_diag": 1 / (np.arange(d) + 10.0),
    }[kind]


def spiked(variances: np.ndarray, n: int, strengths: np.ndarray, seed: int) -> np.ndarray:
    """A population covariance: this noise, and signal of these strengths times its edge in random directions."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((len(variances), len(strengths))))[0]
    edge = float(edge_of(variances, len(variances) / n).upper)
    return np.diag(variances) + (axes * (edge * strengths)) @ axes.T


# ------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    ("p", "quantile"),
    [
        (0.01, -3.8954326731),
        (0.05, -3.1803799769),
        (0.10, -2.7824279057),
        (0.30, -1.9103797462),
        (0.50, -1.2685746165),
        (0.70, -0.5922871910),
        (0.80, -0.1653134252),
        (0.90, 0.4501432891),
        (0.95, 0.9793160535),
        (0.98, 1.5977556741),
        (0.99, 2.0234492814),
        (0.995, 2.4223265859),
        (0.999, 3.2721960590),
    ],
)
def test_tracy_widom_quantiles_match_golden_values(p: float, quantile: float) -> None:
    """Of a determinant on a longer interval with more points; to two digits they are Johnstone's (2001) table."""
    assert tracy_widom_quantile(p) == pytest.approx(quantile, abs=1e-9)


def test_tracy_widom_law_is_that_of_the_painleve_equation() -> None:
    """F₁² = exp(−∫ q + (x − s) q²) over (s, ∞), q″ = x q + 2 q³, q ~ Ai: no determinant."""
    start, (nodes, weights) = 6.0, np.polynomial.legendre.leggauss(60)
    x, weights = start + 7 * (nodes + 1), 7 * weights
    ai = airy(x)[0]
    known = [*airy(start)[:2], weights @ ai**2, weights @ ((x - start) * ai**2), weights @ ai]
    solved = solve_ivp(
        lambda s, y: [y[1], s * y[0] + 2 * y[0] ** 3, -(y[0] ** 2), -y[2], -y[0]],
        (start, -5),
        known,
        method="DOP853",
        rtol=1e-13,
        atol=1e-16,
        t_eval=[3.0, 1.0, -1.0, -2.0, -3.0, -4.0, -4.6],
    )
    expected = np.exp(-(solved.y[3] + solved.y[4]) / 2)
    np.testing.assert_allclose([tracy_widom_cdf(s) for s in solved.t], expected, rtol=0, atol=1e-10)


def test_tracy_widom_law_matches_known_values_and_its_square_law() -> None:
    """F₁ at two points; and F₂ from the Airy kernel by the same quadrature, at Bornemann's value."""
    assert tracy_widom_cdf(0.0) == pytest.approx(0.8319080662, abs=1e-10)
    assert tracy_widom_cdf(-2.0) == pytest.approx(0.2743201979, abs=1e-10)
    nodes, weights = np.polynomial.legendre.leggauss(80)
    x, weights = -2 + 8 * (nodes + 1), 8 * weights
    ai, slope = airy(x)[:2]
    apart = np.subtract.outer(x, x) + np.eye(80)
    kernel = (np.outer(ai, slope) - np.outer(slope, ai)) / apart
    np.fill_diagonal(kernel, slope**2 - x * ai**2)
    second = np.linalg.det(np.eye(80) - np.sqrt(weights)[:, None] * kernel * np.sqrt(weights))
    assert second == pytest.approx(0.4132241425051226, abs=1e-12)


def test_tracy_widom_refuses_what_it_cannot_compute() -> None:
    with pytest.raises(OptionError, match="Tracy–Widom probabilities"):
        tracy_widom_quantile(1.0)


@pytest.mark.parametrize(
    ("beta", "known", "unknown"),
    [
        (1e-4, 1.4144256220, 1.4144491964),
        (0.01, 1.4347484457, 1.4371464018),
        (0.05, 1.5066074107, 1.5193409596),
        (0.1, 1.5816483953, 1.6087715574),
        (0.2, 1.7048151013, 1.7650464327),
        (0.25, 1.7580293771, 1.8368657911),
        (0.5, 1.9785990538, 2.1711853485),
        (1.0, 4 / math.sqrt(3), 2.8583624241),
    ],
)
def test_hard_thresholds_match_golden_values(beta: float, known: float, unknown: float) -> None:
    """Those of ω by quadrature with 25 digits."""
    assert hard_threshold(beta) == pytest.approx(known, abs=1e-9)
    assert hard_threshold_of_median(beta) == pytest.approx(unknown, abs=1e-9)


def test_hard_threshold_tends_to_twice_the_median() -> None:
    assert hard_threshold_of_median(1e-10) ** 2 == pytest.approx(2, abs=1e-8)
    assert hard_threshold(1.0) == pytest.approx(4 / math.sqrt(3), abs=1e-15)


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1, 0.01])
def test_screenot_on_white_noise_is_the_optimal_hard_threshold(beta: float) -> None:
    for grid, allowed in ((4000, 1e-5), (40_000, 1e-6)):
        quantiles = MarchenkoPastur(q=beta).ppf((np.arange(grid) + 0.5) / grid)
        assert screenot_threshold(np.sqrt(quantiles), beta, 0) == pytest.approx(hard_threshold(beta), abs=allowed)


@pytest.mark.parametrize("exponent", [-8, -3, 3, 8])
def test_screenot_has_no_scale(exponent: int) -> None:
    singular = np.sqrt(np.linalg.eigvalsh(wishart(np.ones(D), 4 * D, 0)))
    one, scaled = (screenot_threshold(c * singular, 0.25, 30) for c in (1.0, 10.0**exponent))
    assert scaled == pytest.approx(10.0**exponent * one, rel=1e-10)


@pytest.mark.parametrize(("q", "edge"), [(0.5, 7.0712721624), (0.1, 4.5603533720), (0.01, 3.4465242762)])
def test_edge_of_two_levels_matches_golden_values(q: float, edge: float) -> None:
    for variances in (np.array([1.0, 3.0]), np.repeat([1.0, 3.0], 64)):
        assert AnisotropicMarchenkoPastur(variances=variances, q=q).upper == pytest.approx(edge, abs=1e-10)


@pytest.mark.parametrize("q", [1e-6, 0.01, 0.5, 1.0, 3.0])
def test_law_of_equal_variances_is_that_of_marchenko_and_pastur(q: float) -> None:
    law, white = AnisotropicMarchenkoPastur(variances=np.full(9, 2.5), q=q), MarchenkoPastur(q=q, sigma2=2.5)
    n = 1000.0
    assert law.upper == pytest.approx(white.upper, rel=1e-12)
    # Johnstone's scale (√n + √p)(1/√n + 1/√p)^(1/3) / n, in these variables
    johnstone = 2.5 * (1 + math.sqrt(q)) * np.cbrt(1 + 1 / math.sqrt(q))
    assert law.scale * n ** (-2 / 3) == pytest.approx(johnstone * n ** (-2 / 3), rel=1e-10)
    atom = max(0.0, 1 - 1 / q)
    x = np.linspace(white.lower, white.upper, 300)
    np.testing.assert_allclose(law.cdf(x), (white.cdf(x) - atom) / (1 - atom), atol=1e-3)
    points, exact = law._curve
    np.testing.assert_allclose(exact, (white.cdf(points) - atom) / (1 - atom), atol=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 2, 10, 200])
def test_law_of_unequal_variances_is_that_of_a_large_draw(ratio: float) -> None:
    rng, d = np.random.default_rng(0), 400
    variances, n = rng.gamma(2, 0.5, d), int(ratio * 400)
    vectors = rng.standard_normal((n, d)) * np.sqrt(variances)
    values = np.linalg.eigvalsh(vectors.T @ vectors / n)
    values = values[values > 1e-9]
    law = AnisotropicMarchenkoPastur(variances=variances, q=d / n)
    ranks = (np.arange(len(values)) + 0.5) / len(values)
    np.testing.assert_allclose(law.cdf(values), ranks, atol=0.012)
    middle = slice(len(values) // 10, -len(values) // 10)
    np.testing.assert_allclose(law.ppf(ranks)[middle], values[middle], rtol=0.05)
    assert values[-1] == pytest.approx(law.upper, rel=0.05)


@pytest.mark.parametrize("q", [0.005, 0.1, 2.0])
@pytest.mark.parametrize("few", [15.0, 1e-4, 1e4])
def test_law_of_variances_far_apart_is_that_of_each_where_its_own_are(few: float, q: float) -> None:
    """A fifth of the variances lies far off: its eigenvalues are those of noise of its own, or all but."""
    law = AnisotropicMarchenkoPastur(variances=np.repeat([1.0, few], [80, 20]), q=q)
    grid = law._curve[1]
    assert np.diff(grid).max() <= 0.0101
    draw = np.linalg.eigvalsh(wishart(np.repeat([1.0, few], [320, 80]), int(400 / q), 0)) if q < 1 else None
    if draw is not None:
        np.testing.assert_allclose(law.cdf(draw), (np.arange(400) + 0.5) / 400, atol=0.012)


def test_edge_with_margin_lies_above_the_noise_of_nearly_every_draw() -> None:
    """Claimed for one draw in a hundred at the nominal level; at most three are allowed."""
    variances, n = np.repeat([1.0, 3.0], 32), 640
    law = AnisotropicMarchenkoPastur(variances=variances, q=0.1)
    threshold = law.upper + tracy_widom_quantile(0.99) * law.scale * n ** (-2 / 3)
    largest = [np.linalg.eigvalsh(wishart(variances, n, seed))[-1] for seed in range(200)]
    assert np.mean(np.array(largest) > threshold) <= 0.03
    assert 0.05 < np.mean(np.array(largest) > law.upper) < 0.35  # the bare edge is crossed often


def test_impossible_variances_are_refused() -> None:
    for bad in (np.zeros(3), np.array([1.0, -1.0]), np.array([1.0, np.nan]), np.ones(0)):
        with pytest.raises(DataError, match="Variances must be finite"):
            AnisotropicMarchenkoPastur(variances=bad, q=0.1)
    with pytest.raises(OptionError, match="q must be"):
        AnisotropicMarchenkoPastur(variances=np.ones(3), q=0.0)


# ------------------------------------------------------------------------------------- one direction of signal


def test_spike_is_inflated_and_turned_as_the_spiked_model_says() -> None:
    """γ = 0.5, ℓ = 3: λ → ℓ (1 + γ/(ℓ − 1)) = 3.75, squared overlap → (1 − γ/(ℓ−1)²)/(1 + γ/(ℓ−1)) = 0.7."""
    d, values, overlaps = 1000, [], []
    population = np.ones(d)
    population[0] = 3.0
    for seed in range(20):
        eigenvalues, vectors = eigh(wishart(population, 2 * d, seed), subset_by_index=[d - 1, d - 1])
        values.append(eigenvalues[-1])
        overlaps.append(vectors[0, -1] ** 2)
    assert np.mean(values) == pytest.approx(3.75, rel=0.02)
    assert np.mean(overlaps) == pytest.approx(0.7, rel=0.02)


def test_spike_below_the_transition_is_noise_and_one_above_is_found() -> None:
    n, kept = 4 * D, {0.5: 0, 3.0: 0}
    for strength in kept:
        population = np.ones(D)
        population[0] = 1 + strength * math.sqrt(D / n)
        for seed in range(200):
            spectrum = spectrum_of(wishart(population, n, seed), n)
            kept[strength] += counted(TracyWidomRule()(spectrum), spectrum) > 0
    assert kept[0.5] <= 6
    assert kept[3.0] == 200


# ------------------------------------------------------------------------------------------- noise alone


@pytest.mark.parametrize("kind", ["iso", "hetero", "plaw_diag"])
def test_noise_alone_is_called_signal_in_one_draw_of_a_hundred(kind: str) -> None:
    """Nominal 1 %: of 200 draws at most 3 % may hold a false direction."""
    n, alarms = 10 * D, 0
    for seed in range(200):
        spectrum = spectrum_of(wishart(noise_variances(kind, seed), n, seed), n)
        alarms += counted(ParallelAnalysisRule()(spectrum), spectrum) > 0
    assert alarms <= 6


def ar1(rng: np.random.Generator, rho: float, sequences: int, width: int, length: int = 32) -> np.ndarray:
    """Sequences of vectors, correlated along the sequence, of variance one."""
    vectors = rng.standard_normal((length, sequences, width))
    for step in range(1, length):
        vectors[step] = rho * vectors[step - 1] + math.sqrt(1 - rho**2) * vectors[step]
    return vectors.transpose(1, 0, 2).reshape(-1, width)


def heads(loudness: np.ndarray, n: int, seed: int, strengths: np.ndarray | None = None) -> Spectrum:
    """As many groups of 32 as there are levels of noise; with strengths, of signal too, relative to each one's edge."""
    population = np.ones(32) if strengths is None else spiked(np.ones(32), n, strengths, seed)
    parts = [level * wishart(population, n, 100 * seed + group) for group, level in enumerate(loudness)]
    return Spectrum(
        eigenvalues=np.stack([np.linalg.eigvalsh(part)[::-1] for part in parts]),
        samples=n,
        variances=np.stack([np.diag(part) for part in parts]),
    )


@pytest.mark.parametrize(
    "rule", [ParallelAnalysisRule(), TracyWidomRule(), BulkMatchingRule(level=0.01), GapRule(), ConsensusRule()]
)
def test_heads_of_unequal_noise_are_not_called_signal(rule: Any) -> None:
    """At a common edge rdpa called a head signal in 87 of 100 such draws. Tracy and Widom's rule estimates each level
    from 32 eigenvalues, which is worth a few alarms more."""
    spectra = [heads(np.geomspace(1, 4, 12), 1600, seed) for seed in range(20)]
    alarms = sum(counted(rule(spectrum), spectrum) > 0 for spectrum in spectra)
    assert alarms <= (3 if rule.name == "tracy-widom" else 1)


@pytest.mark.parametrize("rule", [ParallelAnalysisRule(), TracyWidomRule(), BulkMatchingRule(), GapRule()])
def test_signal_of_quiet_heads_is_counted_beside_loud_ones(rule: Any) -> None:
    spectrum = heads(np.geomspace(1, 10, 12), 1600, 0, np.array([4.0, 3, 2]))
    found = rule(spectrum)
    assert [
        int(np.sum(own > found.edge * level)) for own, level in zip(spectrum.eigenvalues, found.levels, strict=True)
    ] == [3] * 12
    assert counted(found, spectrum) == 36
    with pytest.raises(DataError, match="all 12 groups"):
        found.count(spectrum.eigenvalues.ravel())


@pytest.mark.parametrize("rest", [0.0, 1e-18])
@pytest.mark.parametrize("name", sorted(RULES.keys() - {"replicate", "fixed"}))
def test_dead_heads_change_no_count(name: str, rest: float) -> None:
    """Nine of twelve heads, all zero or rounding: what the living are told stays."""
    rule, whole = rule_named(name), heads(np.ones(3), 1600, 0, np.array([4.0, 3, 2]))
    assert whole.variances is not None
    values, variances = (np.vstack([part, np.full((9, 32), rest)]) for part in (whole.eigenvalues, whole.variances))
    spectrum = Spectrum(eigenvalues=values, variances=variances, samples=1600)
    found, expected = rule(spectrum), rule(whole)
    assert counted(found, spectrum) == counted(expected, whole)
    assert found.edge == pytest.approx(expected.edge)
    assert "9 of 12 groups are dead and set aside." in found.remarks


@pytest.mark.parametrize("n", [8, 30])
def test_centring_every_head_makes_no_direction_dead(n: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((n, 12, 64))
    vectors -= vectors.mean(axis=0)
    covariance = np.einsum("ngi,ngj->gij", vectors, vectors) / n
    spectrum = Spectrum(eigenvalues=np.linalg.eigvalsh(covariance)[:, ::-1].clip(0), samples=n)
    for rule in (TracyWidomRule(), BulkMatchingRule(), MarchenkoPasturRule()):
        found = rule(spectrum)
        assert found.q_eff == found.q == 64 / n
        assert found.sigma2 == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_repeated_vectors_make_no_direction_dead(repeats: int) -> None:
    """64 vectors of 128 dimensions, repeated: noise of variance one at q = 2 all along."""
    vectors = np.random.default_rng(0).standard_normal((64, 128)).repeat(repeats, axis=0)
    n = len(vectors)
    for effective in (58.0, 64.0, 70.0):  # as it is measured
        spectrum = spectrum_of(vectors.T @ vectors / n, n, effective)
        for rule in (ParallelAnalysisRule(), TracyWidomRule(), BulkMatchingRule(), ConsensusRule()):
            found = rule(spectrum)
            assert found.q_eff == 128 / effective
            assert found.sigma2 == pytest.approx(1, rel=0.15)
            assert counted(found, spectrum) == 0


@pytest.mark.parametrize(("rho", "sequences"), [(0.9, 40), (0.9, 25), (0.95, 25)])
def test_fewer_effective_samples_than_dimensions_are_a_misfit_and_told(rho: float, sequences: int) -> None:
    """σ² = 1. All eigenvalues are positive, where the law would have zeros: matched to all of them it was 0.11 to 0.63,
    and 17 to 46 directions of noise lay above Tracy and Widom's edge."""
    vectors, lags = ar1(np.random.default_rng(0), rho, sequences, 200), np.arange(1, 32)
    n = len(vectors)
    spectrum = spectrum_of(vectors.T @ vectors / n, n, n / float(1 + 2 * np.sum((1 - lags / 32) * rho ** (2 * lags))))
    for rule in (ParallelAnalysisRule(), TracyWidomRule(), BulkMatchingRule()):
        found = rule(spectrum)
        assert found.sigma2 == pytest.approx(1, rel=0.2)
        assert counted(found, spectrum) <= 10
        assert found.misfit and any("fewer effective samples than dimensions" in told for told in found.remarks)


def test_correlated_samples_make_few_false_directions_where_the_effective_size_is_known() -> None:
    """ρ = 0.9 in sequences of 32: n_eff/n = 0.123. With n itself, every eighth direction is false."""
    found, measured, naive = [], [], []
    for seed in range(12):
        vectors = ar1(np.random.default_rng(seed), 0.9, 20, 64)
        covariance, n = vectors.T @ vectors / len(vectors), len(vectors)
        for effective, falsely in ((0.123 * n, found), (measured_size(vectors), measured), (None, naive)):
            spectrum = spectrum_of(covariance, n, effective)
            falsely.append(counted(ParallelAnalysisRule()(spectrum), spectrum))
    assert np.mean(found) <= 1
    assert np.mean(measured) <= 1
    assert np.mean(naive) > 5


@pytest.mark.parametrize("ratio", [5.0, 0.2])
def test_tracy_widom_edge_is_the_quantile_of_the_largest_eigenvalue(ratio: float) -> None:
    """Of 800 draws of white noise, for fewer vectors than dimensions too."""
    rng, (d, n) = np.random.default_rng(0), (40, 200) if ratio > 1 else (200, 40)
    draws = [rng.standard_normal((n, d)) for _ in range(800)]
    grams = (x.T @ x if d < n else x @ x.T for x in draws)
    largest = [np.linalg.eigvalsh(gram)[-1] / n for gram in grams]
    spectrum = spectrum_of(draws[0].T @ draws[0] / n, n)
    for level in (0.05, 0.01):
        found = TracyWidomRule(level=level)(spectrum)
        assert found.edge / found.sigma2 == pytest.approx(np.quantile(largest, 1 - level), rel=0.01)


def test_bulk_matching_threshold_is_that_of_the_largest_of_all_groups() -> None:
    """Twelve heads of white noise: at most one set in ten has an eigenvalue above, but for what a draw of 500 tells."""
    largest = [[np.linalg.eigvalsh(wishart(np.ones(64), 640, 12 * i + g))[-1] for g in range(12)] for i in range(500)]
    drawn = np.quantile(np.max(largest, axis=1), 0.9)
    assert 0.998 <= _largest_eigenvalue(12, 64, 0.1, 0.0, 0.1, 0) / drawn <= 1.01


def test_dead_coordinates_change_no_edge_of_bulk_matching() -> None:
    variances = noise_variances("hetero", 0, 64)
    spectrum = spectrum_of(wishart(variances, 640, 0), 640)
    padded = Spectrum(eigenvalues=np.pad(spectrum.eigenvalues, ((0, 0), (0, 192))), samples=640)
    assert BulkMatchingRule()(padded).edge == pytest.approx(BulkMatchingRule()(spectrum).edge, rel=1e-6)


# ------------------------------------------------------------------------------------------ planted signal


SPIKES = np.geomspace(8, 1.3, 10)


@pytest.mark.parametrize("kind", ["iso", "hetero"])
def test_detector_counts_planted_signal_exactly(kind: str) -> None:
    exact = []
    for seed in range(20):
        n = 50 * 256
        population = spiked(noise_variances(kind, seed, 256), n, SPIKES, seed)
        spectrum = spectrum_of(wishart(population, n, seed), n)
        exact.append(counted(ParallelAnalysisRule()(spectrum), spectrum) == 10)
    assert np.mean(exact) >= 0.9


def act_like(seed: int, *, massive: int = 0) -> Spectrum:
    """n/d = 50: unequal variances, correlation 0.8 along sequences, heavy-tailed token scale; five spikes, and massive
    channels at 100 times the edge. n_eff/n = 1 / (2 + 2 Σ (1 − k/32) 0.64^k)."""
    rng, d = np.random.default_rng(seed), 64
    n = 50 * d
    lags = np.arange(1, 32)
    effective = n / (2 + 2 * np.sum((1 - lags / 32) * 0.64**lags))
    variances = rng.gamma(2, 0.5, d)
    edge = float(edge_of(variances, d / effective).upper)
    axes = np.linalg.qr(rng.standard_normal((d, 5)))[0]
    signal = ar1(rng, 0.8, n // 32, 5) * np.sqrt(edge * np.geomspace(12, 3, 5))
    vectors = ar1(rng, 0.8, n // 32, d) * np.sqrt(variances) + signal @ axes.T
    vectors[:, :massive] += rng.standard_normal((n, massive)) * math.sqrt(100 * edge)
    vectors *= np.sqrt(4 / rng.chisquare(6, (n, 1)))
    return spectrum_of(vectors.T @ vectors / n, n, float(effective))


@pytest.mark.parametrize("massive", [0, 2])
def test_detector_counts_signal_in_activations_like_those_of_a_network(massive: int) -> None:
    found = []
    for seed in range(20):
        spectrum = act_like(seed, massive=massive)
        edge = ParallelAnalysisRule()(spectrum)
        found.append(counted(edge, spectrum))
        assert edge.diagnostics["massive"] == massive
        assert any("massive channels" in remark for remark in edge.remarks) == (massive > 0)
    assert np.mean(np.equal(found, 5 + massive)) >= 0.9


@pytest.mark.parametrize("factor", [30.0, 1e3, 1e6])
def test_massive_channels_never_hide_signal(factor: float) -> None:
    n = 10 * D
    plain = spiked(noise_variances("hetero", 0), n, np.geomspace(8, 2, 6), 0)
    loud = plain.copy()
    loud[[3, 70], [3, 70]] += factor * np.median(np.diag(plain))
    before, after = (spectrum_of(wishart(population, n, 1), n) for population in (plain, loud))
    assert counted(ParallelAnalysisRule()(after), after) >= counted(ParallelAnalysisRule()(before), before) == 6
    blind = ParallelAnalysisRule(massive=1e12)
    assert counted(blind(after), after) < 6 or factor < 100


@pytest.mark.parametrize("repeats", [1, 4, 16])
def test_repeating_every_token_changes_no_count(repeats: int) -> None:
    """The covariance is the same, and so is the effective size; the published rule is fooled (14, 62, 96 of 256)."""
    n = 2 * 256
    covariance = wishart(spiked(np.ones(256), n, SPIKES, 0), n, 0)
    spectrum = spectrum_of(covariance, n * repeats, float(n))
    for rule in (ParallelAnalysisRule(), BulkMatchingRule(), TracyWidomRule(), ConsensusRule()):
        assert counted(rule(spectrum), spectrum) == 10
    if repeats > 1:
        assert counted(MarchenkoPasturRule()(spectrum), spectrum) > 20


@pytest.mark.parametrize("repeats", [1, 4, 16])
def test_repeating_every_token_changes_no_count_with_the_size_as_measured(repeats: int) -> None:
    """From vectors to the count, with the effective size of `EffectiveSize`."""
    n = 8 * D
    root = np.linalg.cholesky(spiked(np.ones(D), n, np.geomspace(8, 1.5, 10), 0))
    for seed in range(3):
        vectors = (np.random.default_rng(seed).standard_normal((n, D)) @ root.T).repeat(repeats, axis=0)
        spectrum = spectrum_of(vectors.T @ vectors / len(vectors), len(vectors), measured_size(vectors))
        assert spectrum.q_eff == pytest.approx(D / n, rel=0.1)
        assert counted(ParallelAnalysisRule()(spectrum), spectrum) == 10


def measured_size(vectors: np.ndarray) -> float:
    size = EffectiveSize(vectors.shape[1])
    size.update(torch.from_numpy(vectors), torch.arange(len(vectors)) // 32)
    found = size.value()
    assert found is not None
    return found


def test_massive_channels_that_go_together_or_outnumber_the_vectors_are_borne() -> None:
    rng = np.random.default_rng(0)
    loud = 1e3 * rng.standard_normal((640, 1)) * np.ones(3)
    together = np.concatenate([loud, rng.standard_normal((640, 61))], axis=1)
    spectrum = spectrum_of(together.T @ together / 640, 640)
    assert counted(ParallelAnalysisRule()(spectrum), spectrum) == 3
    few = spectrum_of(together[:2].T @ together[:2] / 2, 2)
    assert counted(ParallelAnalysisRule()(few), few) <= 2


def test_dead_heads_change_nothing_that_the_detector_says_of_the_living() -> None:
    rng = np.random.default_rng(1)
    heads = rng.standard_normal((3, 64, 32)) * np.sqrt(rng.gamma(1, 1, (3, 1, 32)))
    covariances = np.swapaxes(heads, 1, 2) @ heads / 64
    living = Spectrum(
        eigenvalues=np.linalg.eigvalsh(covariances)[:, ::-1].copy(),
        samples=64,
        variances=np.diagonal(covariances, axis1=1, axis2=2).copy(),
    )
    assert living.variances is not None
    dead = np.zeros((9, 32))
    mixed = Spectrum(
        eigenvalues=np.concatenate([living.eigenvalues, dead]),
        samples=64,
        variances=np.concatenate([living.variances, dead]),
    )
    alone, among = ParallelAnalysisRule()(living), ParallelAnalysisRule()(mixed)
    assert among.ks == pytest.approx(alone.ks) and among.ks < 0.05 and not among.misfit
    assert (among.edge, among.sigma2) == pytest.approx((alone.edge, alone.sigma2))


def test_gap_is_not_that_between_the_last_vector_and_zero() -> None:
    """Ten vectors of 60 coordinates, and 200 of which 10 are alive: no signal."""
    rng = np.random.default_rng(0)
    for vectors in (rng.standard_normal((10, 60)), np.pad(rng.standard_normal((200, 10)), ((0, 0), (0, 50)))):
        spectrum = spectrum_of(vectors.T @ vectors / len(vectors), len(vectors))
        assert counted(GapRule()(spectrum), spectrum) == 0


def test_correlation_across_coordinates_is_a_misfit_of_the_detector() -> None:
    """Power-law noise in a random basis: the one thing parallel analysis cannot see, and it says so."""
    n, rng = 50 * D, np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((D, D)))[0]
    spectrum = spectrum_of(wishart((rotation * noise_variances("plaw_diag", 0)) @ rotation.T, n, 0), n)
    found = ParallelAnalysisRule()(spectrum)
    assert found.misfit
    assert any("No bulk fits" in remark for remark in found.remarks)
    white = spectrum_of(wishart(spiked(np.ones(D), n, SPIKES, 0), n, 0), n)
    assert not ParallelAnalysisRule()(white).misfit


# ----------------------------------------------------------------------------------------------- bulk matching


def test_bulk_matching_finds_the_law_of_the_variances() -> None:
    n, variation = 20 * 256, []
    for seed in range(6):
        population = spiked(noise_variances("hetero", seed, 256), n, SPIKES, seed)
        spectrum = spectrum_of(wishart(population, n, seed), n)
        found = BulkMatchingRule()(spectrum)
        variation.append(found.diagnostics["variation"])
        assert counted(found, spectrum) == 10
        assert found.ks < 0.1
        assert not found.misfit
    assert np.mean(variation) == pytest.approx(2**-0.5, rel=0.1)


def test_bulk_matching_threshold_is_the_quantile_of_drawn_matrices() -> None:
    """The edges of drawn variances stand for the largest eigenvalues of drawn matrices: nine of ten lie below."""
    n, above = 8 * 64, []
    for seed in range(100):
        spectrum = spectrum_of(wishart(noise_variances("hetero", seed, 64), n, seed), n)
        above.append(counted(BulkMatchingRule()(spectrum), spectrum) > 0)
    assert 0.02 <= np.mean(above) <= 0.2


def test_bulk_matching_is_deterministic_by_seed() -> None:
    n = 8 * 64
    spectrum = spectrum_of(wishart(noise_variances("hetero", 0, 64), n, 0), n)
    assert BulkMatchingRule()(spectrum) == BulkMatchingRule()(spectrum)
    assert BulkMatchingRule(seed=1)(spectrum).edge == pytest.approx(BulkMatchingRule()(spectrum).edge, rel=0.05)


# --------------------------------------------------------------------------------------------------- replicates


def replicated(seed: int, *, spikes: int, sequence: float = 0.0) -> Spectrum:
    """Two passes with rotated power-law noise and a shared signal."""
    rng, d = np.random.default_rng(seed), 64
    n = 20 * d
    rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
    color = rotation * np.sqrt(noise_variances("plaw_diag", 0, d))
    edge = float(edge_of(noise_variances("plaw_diag", 0, d), d / n).upper)
    axes = np.linalg.qr(rng.standard_normal((d, d)))[0][:, :spikes]
    signal = rng.standard_normal((n, spikes)) * np.sqrt(edge * np.geomspace(8, 1.3, max(spikes, 1))[:spikes])
    first, second = (signal @ axes.T + ar1(rng, sequence, n // 32, d) @ color.T for _ in range(2))
    cross = first.T @ second / n
    covariance = first.T @ first / n
    return Spectrum(
        eigenvalues=np.linalg.eigvalsh(covariance)[None, ::-1].copy(),
        samples=n,
        replicate=np.linalg.eigvalsh((cross + cross.T) / 2)[None],
    )


def test_mirror_finds_nothing_in_noise() -> None:
    false = [counted(ReplicateRule()(spectrum), spectrum) for spectrum in (replicated(s, spikes=0) for s in range(40))]
    assert np.mean(np.array(false) <= 1) >= 0.95


@pytest.mark.parametrize("sequence", [0.0, 0.9])
def test_mirror_counts_signal_under_rotated_power_law_noise(sequence: float) -> None:
    found = []
    for seed in range(20):
        spectrum = replicated(seed, spikes=10, sequence=sequence)
        edge = ReplicateRule()(spectrum)
        found.append(counted(edge, spectrum))
        assert not edge.misfit
    assert np.mean(np.equal(found, 10)) >= 0.95


def test_every_head_has_a_mirror_of_its_own() -> None:
    """Noise a hundred times louder in the last head than in the first; at one mirror for all 27 of 36 were found."""
    rng, n = np.random.default_rng(0), 1600
    own, shared = [], []
    for level in np.geomspace(1, 100, 12):
        axes = np.linalg.qr(rng.standard_normal((32, 32)))[0][:, :3] * np.sqrt([5.0, 4, 3])
        signal = rng.standard_normal((n, 3)) @ axes.T
        first, second = (np.sqrt(level) * (signal + rng.standard_normal((n, 32))) for _ in range(2))
        cross = first.T @ second / n
        own.append(np.linalg.eigvalsh(first.T @ first / n)[::-1])
        shared.append(np.linalg.eigvalsh((cross + cross.T) / 2)[::-1])
    spectrum = Spectrum(eigenvalues=np.stack(own), samples=n, replicate=np.stack(shared))
    found = ReplicateRule()(spectrum)
    assert list((found.levelled(spectrum.eigenvalues) > found.edge).sum(axis=1)) == [3] * 12


@pytest.mark.parametrize("width", [1, 4, 8, 64])
def test_without_noise_all_is_signal(width: int) -> None:
    spectrum = spectrum_of(wishart(np.geomspace(1, 9, width), 200, 1), 200)
    spectrum = replace(spectrum, replicate=spectrum.eigenvalues)
    assert counted(ReplicateRule()(spectrum), spectrum) == width


@pytest.mark.parametrize("groups", [1, 3])
def test_units_that_only_dropout_wakes_are_no_signal(groups: int) -> None:
    own = np.tile([4.0, 3.0, 2.0, 1.0, 0.0, 0.0], (groups, 1))
    found = ReplicateRule()(Spectrum(eigenvalues=own, samples=200, replicate=own + 0.5))
    assert (found.levelled(own) > found.edge).sum() == 4 * groups


# ------------------------------------------------------------------------------------------- gaps and consensus


def test_gap_is_found_in_noise_of_any_correlation() -> None:
    n, rng = 50 * 256, np.random.default_rng(0)
    for seed in range(5):
        rotation = np.linalg.qr(rng.standard_normal((256, 256)))[0]
        noise = (rotation * noise_variances("hetero", seed, 256)) @ rotation.T
        axes = np.linalg.qr(rng.standard_normal((256, 10)))[0]
        spectrum = spectrum_of(wishart(noise + 40 * axes @ axes.T, n, seed), n)
        assert counted(GapRule()(spectrum), spectrum) == 10


def test_consensus_is_the_middle_count_and_tells_when_the_rules_disagree() -> None:
    n = 50 * 256
    hetero = spectrum_of(wishart(spiked(noise_variances("hetero", 0, 256), n, SPIKES, 0), n, 0), n)
    found = ConsensusRule()(hetero)
    assert counted(found, hetero) == 10 == found.diagnostics["bema"]
    assert not any("disagree" in remark for remark in found.remarks)

    steep = spectrum_of(wishart(spiked(noise_variances("plaw_diag", 0, 256), n, SPIKES, 0), n, 0), n)
    found = ConsensusRule()(steep)
    members = [found.diagnostics[name] for name in ("rdpa", "bema", "gap")]
    assert counted(found, steep) == sorted(members)[1]
    assert found.misfit
    assert any("The rules disagree on the noise: rdpa 10" in remark for remark in found.remarks)


def rotated_power_law(seed: int, width: int, ratio: int, spikes: int) -> tuple[np.ndarray, int]:
    """A covariance of noise of variances 1/(i + 10) in a random basis, and signal 8 … 1.3 times its edge."""
    rng, n = np.random.default_rng(seed), ratio * width
    variances = noise_variances("plaw_diag", seed, width)
    rotation, axes = (np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(2))
    strengths = float(edge_of(variances, 1 / ratio).upper) * np.geomspace(8, 1.3, 10)[:spikes]
    axes = axes[:, :spikes]
    return wishart((rotation * variances) @ rotation.T + (axes * strengths) @ axes.T, n, seed), n


@pytest.mark.parametrize("ratio", [10, 200])
def test_consensus_counts_signal_under_rotated_power_law_noise(ratio: int) -> None:
    """Where parallel analysis and bulk matching both call the top of the noise signal."""
    found, fooled = [], []
    for seed in range(10):
        spectrum = spectrum_of(*rotated_power_law(seed, 256, ratio, 10))
        edge = ConsensusRule()(spectrum)
        found.append(counted(edge, spectrum))
        fooled.append(edge.diagnostics["rdpa"])
        assert edge.misfit
    assert np.mean(np.equal(found, 10)) >= 0.9
    assert np.mean(fooled) > 12


def test_consensus_sees_no_signal_where_the_spectrum_has_no_step() -> None:
    spectrum = spectrum_of(*rotated_power_law(0, 256, 50, 0))
    found = ConsensusRule()(spectrum)
    assert counted(ParallelAnalysisRule()(spectrum), spectrum) > 5
    assert counted(found, spectrum) <= 1
    assert any("end in a step" in remark for remark in found.remarks)


# ---------------------------------------------------------------------------------------------------- shares


def test_energy_keeps_as_few_directions_as_carry_the_share() -> None:
    spectrum = Spectrum(eigenvalues=np.array([[5.0, 3.0, 1.5, 0.5], [6.0, 2.5, 1.0, 0.4]]), samples=100)
    for share, count in ((0.2, 1), (0.29, 1), (0.31, 2), (0.55, 2), (0.6, 3), (0.82, 4), (0.87, 5), (0.999, 8)):
        assert counted(EnergyRule(share=share)(spectrum), spectrum) == count


def test_fixed_keeps_what_it_is_told() -> None:
    rng = np.random.default_rng(0)
    spectrum = Spectrum(eigenvalues=np.sort(rng.uniform(1, 2, (3, 16)))[:, ::-1].copy(), samples=100)
    assert counted(FixedRule()(spectrum), spectrum) == 24
    assert counted(FixedRule(share=0.25)(spectrum), spectrum) == 12
    for width in (0, 5, 16, 99):
        assert counted(FixedRule(width=width)(spectrum), spectrum) == 3 * min(width, 16)


# ----------------------------------------------------------------------------------------------- every rule


def full_spectrum(seed: int = 0, groups: int = 2, width: int = 48, scale: float = 1.0) -> Spectrum:
    """All fields, groups of one noise level and three directions of signal each."""
    n = 20 * width
    parts = [wishart(spiked(np.ones(width), n, np.array([8, 4, 2.0]), seed), n, seed + g) for g in range(groups)]
    values = np.stack([np.linalg.eigvalsh(part)[::-1] for part in parts]) * scale
    mirror = np.stack([np.concatenate([[9, 5, 3], np.linspace(-0.5, 0.5, width - 3)])] * groups) * scale
    return Spectrum(
        eigenvalues=values,
        samples=n,
        variances=np.stack([np.diag(part) for part in parts]) * scale,
        effective_samples=n / 1.5,
        replicate=mirror,
    )


DETECTORS = ["mp", "rdpa", "replicate", "bema", "consensus", "gap", "gavish-donoho", "tracy-widom", "screenot"]


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_answers_in_its_own_name_with_both_ratios(name: str) -> None:
    spectrum = full_spectrum()
    found = RULES[name]()(spectrum)
    assert found.rule == name
    assert found.q == pytest.approx(spectrum.q)
    assert found.q_eff == pytest.approx(1.5 * spectrum.q)
    assert 0 <= found.ks <= 1
    assert found.edge > 0
    assert found.sigma2 > 0
    if name in DETECTORS and name != "mp":
        assert counted(found, spectrum) == 6
        assert found.sigma2 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("exponent", [-12, 9])
@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_is_scale_equivariant(name: str, exponent: int) -> None:
    c = 10.0**exponent
    one, scaled = RULES[name]()(full_spectrum()), RULES[name]()(full_spectrum(scale=c))
    assert scaled.edge == pytest.approx(c * one.edge, rel=1e-6)
    assert scaled.sigma2 == pytest.approx(c * one.sigma2, rel=1e-6)
    assert scaled.ks == pytest.approx(one.ks, abs=1e-6)
    assert scaled.remarks == one.remarks


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_bears_few_samples_dead_directions_and_width_one(name: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 60))
    vectors[:, :10] = 0  # dead
    for sample in (vectors, vectors[:8], vectors[:, 10:11], vectors[:, 10:12]):
        covariance = sample.T @ sample / len(sample)
        values = np.linalg.eigvalsh(covariance)[None, ::-1].copy()
        spectrum = Spectrum(
            eigenvalues=np.maximum(values, 0),
            samples=len(sample),
            variances=np.diag(covariance)[None].copy(),
            effective_samples=len(sample) / 2,
            replicate=values - values.mean(),
        )
        found = RULES[name]()(spectrum)
        assert np.isfinite(found.edge)
        assert np.isfinite(found.fit_error)
        assert 0 <= counted(found, spectrum) <= min(sample.shape)


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_refuses_what_is_no_spectrum(name: str) -> None:
    good = np.array([[3.0, 2.0, 1.0, 0.5]])
    for values, message in (
        (np.zeros((1, 4)), "only zeros"),
        (np.zeros((1, 0)), "at least one"),
        (np.array([[1.0, 2.0, -0.1, 3.0]]), "negative"),
        (np.array([[1.0, np.nan, 2.0, 3.0]]), "1 NaN or infinite"),
    ):
        like = good[:, : values.shape[1]]
        spectrum = Spectrum(eigenvalues=values, samples=10, variances=like, replicate=like)
        with pytest.raises(DataError, match=message):
            RULES[name]()(spectrum)
    if needed := getattr(RULES[name], "needs", None):
        broken = np.array([[3.0, np.nan, 1.0, 0.5]])
        given: dict[str, Any] = {"variances": good, "replicate": good} | dict.fromkeys(needed, broken)
        with pytest.raises(DataError, match="must be finite"):
            RULES[name]()(Spectrum(eigenvalues=good, samples=10, **given))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (ParallelAnalysisRule(), "rdpa needs the variances of the coordinates — .* — .* bema"),
        (ConsensusRule(), "needs the variances"),
        (ReplicateRule(), "replicate needs two stochastic passes — .* — .* rdpa"),
    ],
)
def test_rule_that_lacks_what_it_needs_says_so(rule: ParallelAnalysisRule, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rule(Spectrum(eigenvalues=np.array([[2.0, 1.0]]), samples=10))


def test_impossible_options_are_refused() -> None:
    for make, message in (
        (lambda: ParallelAnalysisRule(level=0.7), "level"),
        (lambda: ParallelAnalysisRule(massive=0.0), "massive"),
        (lambda: BulkMatchingRule(level=0.0), "level"),
        (lambda: BulkMatchingRule(trim=0.5), "trim"),
        (lambda: TracyWidomRule(level=1.0), "level"),
        (lambda: ReplicateRule(slack=-1.0), "slack"),
        (lambda: ScreenotRule(share=0.5), "share"),
        (lambda: EnergyRule(share=1.0), "share"),
        (lambda: FixedRule(share=0.0), "share"),
        (lambda: FixedRule(width=-1), "width"),
    ):
        with pytest.raises(OptionError, match=message):
            make()


def test_rules_are_made_by_name_with_the_options_that_they_have() -> None:
    assert rule_named("mp", tau=0.4, level=0.1) == MarchenkoPasturRule(tau=0.4)
    assert rule_named("rdpa", tau=0.4, level=0.05) == ParallelAnalysisRule(level=0.05)
    assert rule_named("gavish-donoho", tau=0.4) == GavishDonohoRule()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 40),
    groups=st.integers(1, 3),
    ratio=st.floats(0.2, 1e4),
    steepness=st.floats(0, 3),
    share=st.floats(0.05, 1),
)
def test_rules_answer_with_finite_numbers_on_any_spectrum(
    seed: int, width: int, groups: int, ratio: float, steepness: float, share: float
) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(np.exp(steepness * rng.standard_normal((groups, width))))[:, ::-1].copy()
    samples = max(1, int(ratio * width))
    spectrum = Spectrum(
        eigenvalues=values,
        samples=samples,
        variances=rng.permuted(values, axis=1),
        effective_samples=max(1.0, share * samples),
        replicate=rng.standard_normal((groups, width)),
    )
    for rule in RULES.values():
        found = rule()(spectrum)
        assert np.isfinite([found.edge, found.sigma2, found.ks, found.fit_error]).all()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_needs_what_it_says_and_no_more(name: str) -> None:
    whole = spectrum_of(wishart(noise_variances("iso", 0), 2000, 0), 2000)
    whole = replace(whole, replicate=whole.eigenvalues.copy())
    for field in ("variances", "replicate"):
        without = replace(whole, **{field: None})
        if field in RULES[name].needs:
            with pytest.raises(DataError, match="needs"):
                rule_named(name)(without)
        else:
            assert rule_named(name)(without) == rule_named(name)(whole)
