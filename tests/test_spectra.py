"""The claims of `rmtkd.spectra`: closed forms against quadrature and goldens, the rule on known spectra."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from rmtkd.errors import DataError, OptionError
from rmtkd.spectra import MarchenkoPastur, MarchenkoPasturRule, NoiseEdge, Spectrum
from rmtkd.spectra.laws import _cdf_of_angle

QUADRATURE_Q = [1e-6, 1e-4, 0.01, 0.1, 0.5, 1.0, 3.0]


def wishart_spectrum(variances: np.ndarray, n: float, seed: int) -> np.ndarray:
    """Eigenvalues of the covariance of n ≥ d Gaussian vectors with these population variances.

    By Bartlett's decomposition XXᵀ = LLᵀ, with L lower triangular, normal below a diagonal of χ: no n × d
    matrix. The law of the eigenvalues does not depend on the directions of the spikes, so the axes serve.
    """
    rng, d = np.random.default_rng(seed), len(variances)
    factor = np.tril(rng.standard_normal((d, d)), -1) + np.diag(np.sqrt(rng.chisquare(n - np.arange(d))))
    factor *= np.sqrt(variances)[:, None]
    return np.linalg.eigvalsh(factor @ factor.T / n)


def gaussian_spectrum(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.eigvalsh(vectors.T @ vectors / len(vectors))


def random_spectrum(seed: int, size: int) -> np.ndarray:
    """From nearly flat to very steep, in no order, as real spectra are."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.exp(rng.uniform(0.01, 3) * rng.standard_normal(size)))


def mp(eigenvalues: np.ndarray, *, q: float, tau: float = 0.5, bins: int = 20) -> NoiseEdge:
    """The published rule on one group, of as many samples as `q` says but for rounding."""
    samples = max(1, round(len(eigenvalues) / q))
    return MarchenkoPasturRule(tau=tau, bins=bins)(Spectrum(eigenvalues=eigenvalues[None], samples=samples))


def power_law(d: int) -> np.ndarray:
    return 1 / (np.arange(d) + 10.0)


# ---------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize(
    ("q", "median"),
    [
        (1.0, 0.6527759416),
        (0.5, 0.8304658816),
        (0.25, 0.9160040707),
        (0.1, 0.9665651474),
        (0.01, 0.9966656763),
        (0.001, 0.9996666568),
    ],
)
def test_median_matches_golden_values(q: float, median: float) -> None:
    assert MarchenkoPastur(q=q).median == pytest.approx(median, abs=1e-10)


@pytest.mark.parametrize(
    ("x", "q", "probability"),
    [(0.9355615616712443, 0.1, 0.4681111288), (1.132304473782995, 0.5, 0.6292003388)],
)
def test_cdf_matches_golden_values(x: float, q: float, probability: float) -> None:
    assert float(MarchenkoPastur(q=q).cdf(x)) == pytest.approx(probability, abs=1e-10)


@pytest.mark.parametrize("q", QUADRATURE_Q)
def test_cdf_is_the_integral_of_the_density(q: float) -> None:
    """Quadrature of the textbook density in λ, its square-root edges removed by λ = λ₋ + h (1 − cos θ)."""
    law = MarchenkoPastur(q=q, sigma2=2.5)
    h = (law.upper - law.lower) / 2
    atom = max(0.0, 1 - 1 / q)

    def position(theta: float) -> float:
        return law.lower + 2 * h * np.sin(theta / 2) ** 2

    for theta in (0.02, 0.3, 1.0, 1.6, 2.4, 3.1):
        mass, _ = integrate.quad(
            lambda t: float(law.pdf(position(t))) * h * np.sin(t), 0, theta, epsabs=1e-13, epsrel=1e-11
        )
        # the endpoint is known to one rounding, and the density near it is as large as pdf(x)
        x = position(theta)
        allowed = 1e-10 + float(law.pdf(x)) * np.spacing(x) * 4
        assert float(law.cdf(x)) == pytest.approx(atom + mass, abs=allowed)


@pytest.mark.parametrize("q", QUADRATURE_Q)
def test_density_integrates_to_one_with_the_atom_and_has_the_known_moments(q: float) -> None:
    sigma2 = 0.7
    law = MarchenkoPastur(q=q, sigma2=sigma2)
    h = (law.upper - law.lower) / 2

    def moment(f) -> float:
        def integrand(t: float) -> float:
            x = law.lower + 2 * h * np.sin(t / 2) ** 2
            return f(x) * float(law.pdf(x)) * h * np.sin(t)

        return integrate.quad(integrand, 0, np.pi, epsabs=1e-13, epsrel=1e-11)[0]

    # the density itself is only as good as λ − λ₋ in double precision, at q = 1e-6 some 1e-10
    assert moment(lambda x: 1.0) == pytest.approx(min(1, 1 / q), rel=1e-8)
    assert moment(lambda x: x) == pytest.approx(sigma2, rel=1e-8)
    assert moment(lambda x: x**3) == pytest.approx(sigma2**3 * (1 + 3 * q + q * q), rel=1e-8)
    if q <= 1:
        assert moment(lambda x: (x - sigma2) ** 2) == pytest.approx(q * sigma2**2, rel=1e-7)


@pytest.mark.parametrize("q", [1e-8, 1e-4, 0.0099, 0.0101, 0.3, 1.0, 1.5, 50.0])
def test_ppf_inverts_cdf(q: float) -> None:
    law = MarchenkoPastur(q=q, sigma2=3.0)
    x = law.lower + (law.upper - law.lower) * np.linspace(0.001, 0.999, 101)
    np.testing.assert_allclose(law.ppf(law.cdf(x)), x, rtol=1e-14, atol=1e-13 * (law.upper - law.lower))
    atom = max(0.0, 1 - 1 / q)
    p = atom + (1 - atom) * np.linspace(0.001, 0.999, 101)
    allowed = 4e-16 * law.upper / (law.upper - law.lower) * 20  # one rounding of λ, times the density
    np.testing.assert_allclose(law.cdf(law.ppf(p)), p, atol=allowed + 1e-15)


def test_law_is_stable_for_tiny_q() -> None:
    """At q = 1e-8 the law is Wigner's semicircle of radius 2√q about 1, up to terms of order √q."""
    law = MarchenkoPastur(q=1e-8)
    u = np.linspace(-0.99, 0.99, 67)
    semicircle = 0.5 + (u * np.sqrt(1 - u * u) + np.arcsin(u)) / np.pi
    p = law.cdf(1 + 2e-4 * u)
    np.testing.assert_allclose(p, semicircle, atol=1e-4)
    assert np.all(np.diff(p) > 0)
    assert law.median == pytest.approx(1 - 1e-8 / 3, abs=1e-15)


@pytest.mark.parametrize("r", [1e-8, 1e-3, 0.0999, 0.1001, 0.4, 0.9])
def test_cdf_has_full_precision_on_both_sides_of_the_change_of_formula(r: float) -> None:
    """Against the sine series to 600 terms; the closed form alone would be wrong by 1e-8 at r = 1e-8."""
    phi = np.linspace(0, np.pi, 41)
    k = np.arange(2, 602)
    tail = np.array([math.fsum(r ** (k - 2.0) * np.sin(k * angle) / k) for angle in phi])
    expected = (phi + r * np.sin(phi) - (1 - r * r) * tail) / np.pi
    np.testing.assert_allclose(_cdf_of_angle(phi, r), expected, rtol=0, atol=2e-15)


def test_zero_is_an_atom_when_vectors_are_fewer_than_dimensions() -> None:
    law, dual = MarchenkoPastur(q=4.0, sigma2=1.5), MarchenkoPastur(q=0.25, sigma2=1.5)
    assert law.median == 0.0
    assert float(law.cdf(0.0)) == pytest.approx(0.75, abs=1e-15)
    assert float(law.cdf(-1e-12)) == 0.0
    np.testing.assert_array_equal(law.ppf(np.array([0.0, 0.3, 0.75])), 0.0)
    p = np.linspace(0.01, 0.99, 33)
    np.testing.assert_allclose(law.ppf(0.75 + p / 4), 4 * dual.ppf(p), rtol=1e-12)


def test_law_is_constant_outside_the_support() -> None:
    law = MarchenkoPastur(q=0.2, sigma2=2.0)
    outside = np.array([-1.0, 0.0, law.lower, law.upper, 1e9])
    np.testing.assert_array_equal(law.pdf(outside), 0)
    np.testing.assert_array_equal(law.cdf(outside), [0, 0, 0, 1, 1])
    np.testing.assert_allclose(law.ppf(np.array([0.0, 1.0])), [law.lower, law.upper], rtol=1e-14)


@settings(max_examples=60, deadline=None)
@given(
    q=st.floats(1e-8, 20.0),
    sigma2=st.floats(1e-6, 1e6),
    p=st.lists(st.floats(0, 1), min_size=2, max_size=30).map(sorted),
)
def test_ppf_is_monotone_and_stays_in_the_support(q: float, sigma2: float, p: list[float]) -> None:
    law = MarchenkoPastur(q=q, sigma2=sigma2)
    x = law.ppf(np.array(p))
    assert np.all(np.diff(x) >= 0)
    assert np.all((x == 0) | ((x >= law.lower * (1 - 1e-14)) & (x <= law.upper * (1 + 1e-14))))


def test_law_keeps_the_shape_it_is_asked() -> None:
    law = MarchenkoPastur(q=0.5)
    for function, argument in ((law.pdf, 1.0), (law.cdf, 1.0), (law.ppf, 0.5)):
        assert function(argument).shape == ()
        assert function(np.full((2, 3), argument)).shape == (2, 3)
        np.testing.assert_array_equal(function(np.full((2, 3), argument)), float(function(argument)))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_impossible_parameters_are_refused(bad: float) -> None:
    with pytest.raises(OptionError, match="q must be"):
        MarchenkoPastur(q=bad)
    with pytest.raises(OptionError, match="sigma2 must be"):
        MarchenkoPastur(q=0.5, sigma2=bad)
    with pytest.raises(OptionError, match="tau"):
        mp(np.ones(4), q=0.1, tau=bad)
    with pytest.raises(OptionError, match="multiplier"):
        mp(np.ones(4), q=0.1).count(np.ones(4), bad)
    with pytest.raises(OptionError, match=r"\[0, 1\]"):
        MarchenkoPastur(q=0.5).ppf(np.array([0.5, bad if bad else 2.0]))


# ---------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("tau", [0.4, 0.5, 0.6])
def test_rule_counts_the_spikes_of_isotropic_noise(tau: float) -> None:
    d, ratio, spikes = 256, 10, 10
    variances = np.ones(d)
    variances[:spikes] = (1 + ratio**-0.5) ** 2 * np.geomspace(8, 1.3, spikes)
    errors, sigma2 = [], []
    for seed in range(40):
        eigenvalues = wishart_spectrum(variances, ratio * d, seed)
        found = mp(eigenvalues, q=1 / ratio, tau=tau)
        errors.append(found.count(eigenvalues) - spikes)
        sigma2.append(found.sigma2)
        assert not found.misfit
    assert np.mean(np.abs(errors) <= 1) >= 0.95
    assert np.mean(np.equal(errors, 0)) >= 0.75
    assert np.mean(sigma2) == pytest.approx(1, abs=0.01)
    assert np.std(sigma2) < 0.015


@pytest.mark.parametrize("bins", [8, 80])
def test_rule_does_not_hang_on_the_number_of_bins(bins: int) -> None:
    variances = np.ones(256)
    variances[:10] = 1.75 * np.geomspace(8, 1.3, 10)
    spectra = [wishart_spectrum(variances, 2560, seed) for seed in range(20)]
    errors = [mp(s, q=0.1, bins=bins).count(s) - 10 for s in spectra]
    assert np.mean(np.abs(errors) <= 1) >= 0.95


def test_rule_counts_spikes_when_vectors_are_fewer_than_dimensions() -> None:
    """q = 2, uncentred (rank n) and centred (rank n − 1)."""
    n, d, spikes = 160, 320, 4
    scale = np.ones(d)
    scale[:spikes] = np.sqrt(3 * (1 + np.sqrt(2)) ** 2)
    for seed in range(8):
        vectors = np.random.default_rng(seed).standard_normal((n, d)) * scale
        for sample in (vectors, vectors - vectors.mean(0)):
            eigenvalues = gaussian_spectrum(sample)
            found = mp(eigenvalues, q=d / n)
            assert abs(found.count(eigenvalues) - spikes) <= 1
            assert found.q == d / n
            assert found.sigma2 == pytest.approx(1, abs=0.1)
            assert not found.misfit
            assert any("fewer vectors" in remark for remark in found.remarks)


def test_rounding_of_float32_is_not_taken_for_noise_when_vectors_are_few() -> None:
    vectors = np.random.default_rng(0).standard_normal((100, 300)).astype(np.float32)
    exact = mp(gaussian_spectrum(vectors.astype(np.float64)), q=3.0)
    rounded = mp(gaussian_spectrum(vectors).clip(min=0).astype(np.float64), q=3.0)
    assert rounded.sigma2 == pytest.approx(exact.sigma2, rel=1e-3)


def test_pooled_groups_give_a_steadier_noise_level_than_one() -> None:
    """Twelve heads of width 32 with a common noise level."""
    one, pooled = [], []
    for seed in range(12):
        heads = [wishart_spectrum(np.ones(32), 320, 100 * seed + head) for head in range(12)]
        one.append(mp(heads[0], q=0.1).sigma2)
        pooled.append(mp(np.concatenate(heads), q=0.1).sigma2)
    assert np.std(pooled) < np.std(one) / 1.5
    assert np.mean(pooled) == pytest.approx(1, abs=0.02)


def test_anisotropic_noise_keeps_about_half_and_says_so() -> None:
    """Documents the limit: on a power law at n/d = 200 the rule is a quantile threshold."""
    for seed in range(6):
        eigenvalues = wishart_spectrum(power_law(256), 200 * 256, seed)
        found = mp(eigenvalues, q=1 / 200)
        assert 0.35 <= found.count(eigenvalues) / 256 <= 0.55
        assert found.misfit
        assert found.ks > 0.1
        assert any("No bulk fits, KS" in remark for remark in found.remarks)
        assert any("quantile threshold" in remark for remark in found.remarks)


def test_plain_quantile_edge_keeps_one_minus_tau_of_anisotropic_noise() -> None:
    q = 1e-6
    for tau in (0.4, 0.5, 0.6):
        eigenvalues = wishart_spectrum(power_law(256), 256 / q, 0)
        found = mp(eigenvalues, q=q, tau=tau)
        plain = MarchenkoPastur(q=q, sigma2=found.diagnostics["sigma2_initial"]).upper
        assert np.mean(eigenvalues > plain) == pytest.approx(1 - tau, abs=0.02)
        assert found.count(eigenvalues) / 256 == pytest.approx(1 - tau, abs=0.02)


def test_true_noise_is_not_called_a_misfit_nor_a_quantile_threshold() -> None:
    for q in (0.01, 0.1, 0.9):
        eigenvalues = wishart_spectrum(np.ones(200), 200 / q, 1)
        found = mp(eigenvalues, q=q)
        assert not found.misfit
        assert found.fit_error < 0.2
        assert not any("quantile" in remark or "bulk" in remark for remark in found.remarks)


def misfits(variances: np.ndarray, ratio: int) -> float:
    """The share of draws of noise of these variances that are called a misfit."""
    draws = [wishart_spectrum(variances, ratio * len(variances), seed) for seed in range(40)]
    return float(np.mean([mp(draw, q=1 / ratio).misfit for draw in draws]))


@pytest.mark.parametrize("d", [8, 12, 16, 24])
def test_true_noise_of_few_directions_is_no_misfit(d: int) -> None:
    assert misfits(np.ones(d), 20) <= 0.1


def test_a_power_law_of_sixteen_directions_is_a_misfit() -> None:
    assert misfits(power_law(16), 200) >= 0.9


def test_refinement_does_not_run_to_infinite_noise() -> None:
    """The published objective is smaller at 1000 σ² than at the true σ²: its global minimum keeps nothing."""
    eigenvalues = wishart_spectrum(np.ones(256), 2560, 3)

    def published(sigma2: float) -> float:
        law = MarchenkoPastur(q=0.1, sigma2=sigma2)
        edges = np.linspace(law.lower, law.upper, 41)
        heights = np.histogram(eigenvalues, edges)[0] / (256 * np.diff(edges))
        return float(np.sum((heights - law.pdf((edges[1:] + edges[:-1]) / 2)) ** 2 * np.diff(edges)))

    assert published(1000.0) < published(1.0) / 10
    assert mp(eigenvalues, q=0.1).sigma2 == pytest.approx(1, abs=0.03)


def test_one_large_outlier_does_not_move_the_noise() -> None:
    eigenvalues = wishart_spectrum(np.ones(256), 2560, 5)
    with_outlier = np.append(eigenvalues[:-1], 1e10)
    assert mp(with_outlier, q=0.1).sigma2 == pytest.approx(mp(eigenvalues, q=0.1).sigma2, rel=0.02)
    assert mp(with_outlier, q=0.1).count(with_outlier) >= 1


@pytest.mark.parametrize("q", [0.01, 0.1])
def test_dead_units_are_set_aside_exactly(q: float) -> None:
    """Dead or constant coordinates add exact zeros; the answer is that of the live ones, and so is q."""
    alive = wishart_spectrum(np.ones(120), 120 / q, 2)
    padded = np.concatenate([np.zeros(200), alive])
    reference, found = mp(alive, q=q), mp(padded, q=q * 320 / 120)
    assert found.q == pytest.approx(q, rel=1e-12)
    assert found.sigma2 == pytest.approx(reference.sigma2, rel=1e-9)
    assert found.edge == pytest.approx(reference.edge, rel=1e-9)
    assert found.q_eff == found.q
    assert any("200 of 320 eigenvalues are zero" in remark for remark in found.remarks)
    assert not reference.remarks


def test_dead_units_are_told_from_missing_vectors() -> None:
    """300 units, 60 alive, 150 vectors: q is 2 on paper, but the live units have vectors enough."""
    vectors = np.zeros((150, 300))
    vectors[:, :60] = np.random.default_rng(0).standard_normal((150, 60))
    found = mp(gaussian_spectrum(vectors), q=2.0)
    assert found.q == pytest.approx(60 / 150)
    assert found.sigma2 == pytest.approx(1, abs=0.1)
    assert not found.misfit


@pytest.mark.parametrize("q", [1e-14, 1e-6, 0.01, 1.0, 7.0])
def test_width_one_is_noise(q: float) -> None:
    found = mp(np.array([2.5]), q=q)
    assert found.count(np.array([2.5])) == 0
    assert np.isfinite(found.edge)


@pytest.mark.parametrize("size", [2, 3, 5, 16])
@pytest.mark.parametrize("q", [1e-14, 1e-4, 0.5, 1.0])
def test_equal_eigenvalues_are_noise(size: int, q: float) -> None:
    assert mp(np.full(size, 0.3), q=q).count(np.full(size, 0.3)) == 0


def test_bad_spectra_are_refused() -> None:
    with pytest.raises(DataError, match="only zeros"):
        mp(np.zeros(5), q=0.1)
    with pytest.raises(DataError, match="at least one"):
        mp(np.zeros(0), q=0.1)
    with pytest.raises(DataError, match="negative"):
        mp(np.array([1.0, 2.0, -0.1]), q=0.1)
    for bad in (np.nan, np.inf):
        with pytest.raises(DataError, match="1 NaN or infinite"):
            mp(np.array([1.0, bad, 2.0]), q=0.1)
    with pytest.raises(OptionError, match="bins"):
        mp(np.ones(4), q=0.1, bins=0)


def test_rounding_below_zero_is_forgiven() -> None:
    eigenvalues = np.append(wishart_spectrum(np.ones(50), 500, 0), -1e-15)
    clipped = np.maximum(eigenvalues, 0)
    assert mp(eigenvalues, q=0.1).sigma2 == pytest.approx(mp(clipped, q=0.1).sigma2, rel=1e-12)


def test_count_is_strict_and_takes_a_margin() -> None:
    found = NoiseEdge(rule="mp", q=0.1, q_eff=0.1, sigma2=1.0, edge=2.0, fit_error=0.0, ks=0.0, misfit=False)
    eigenvalues = np.array([2.0, 5.0, 1.0, 3.0, 3.0])
    assert found.count(eigenvalues) == 3
    assert found.count(eigenvalues, 1.5) == 1
    assert found.count(eigenvalues, 0.9) == 4


spectra = st.builds(random_spectrum, st.integers(0, 10**6), st.integers(1, 200))
ratios = st.floats(1e-6, 5.0)
taus = st.floats(0.05, 0.95)


@settings(max_examples=60, deadline=None)
@given(spectra, ratios, taus, st.floats(-8, 8))
def test_rule_is_scale_equivariant(spectrum: np.ndarray, q: float, tau: float, exponent: float) -> None:
    c = 10.0**exponent
    one, scaled = mp(spectrum, q=q, tau=tau), mp(c * spectrum, q=q, tau=tau)
    assert scaled.sigma2 == pytest.approx(c * one.sigma2, rel=1e-9)
    assert scaled.edge == pytest.approx(c * one.edge, rel=1e-9)
    assert scaled.fit_error == pytest.approx(one.fit_error, rel=1e-9, abs=1e-9)
    assert scaled.ks == pytest.approx(one.ks, abs=1e-9)
    assert scaled.remarks == one.remarks


@settings(max_examples=40, deadline=None)
@given(spectra, ratios, taus, st.integers(0, 1000))
def test_rule_ignores_the_order(spectrum: np.ndarray, q: float, tau: float, seed: int) -> None:
    assert mp(np.random.default_rng(seed).permutation(spectrum), q=q, tau=tau) == mp(spectrum, q=q, tau=tau)


@settings(max_examples=80, deadline=None)
@given(spectra, ratios, taus, taus)
def test_larger_tau_never_keeps_more(spectrum: np.ndarray, q: float, tau: float, other: float) -> None:
    low, high = (mp(spectrum, q=q, tau=t) for t in sorted((tau, other)))
    assert high.edge >= low.edge * (1 - 1e-12)
    assert high.count(spectrum) <= low.count(spectrum)


@settings(max_examples=80, deadline=None)
@given(spectra, ratios, taus)
def test_noise_stays_local_to_the_quantile(spectrum: np.ndarray, q: float, tau: float) -> None:
    found = mp(spectrum, q=q, tau=tau)
    assert (
        found.diagnostics["sigma2_initial"] / 4 * (1 - 1e-12)
        <= found.sigma2
        <= 4 * found.diagnostics["sigma2_initial"] * (1 + 1e-12)
    )
    law = MarchenkoPastur(q=min(found.q, 1 / found.q), sigma2=found.sigma2)
    assert law.lower * (1 - 1e-9) <= found.diagnostics["sigma2_initial"] <= law.upper * (1 + 1e-9)
    assert found.edge == pytest.approx(found.sigma2 * (1 + np.sqrt(found.q)) ** 2, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(spectra, st.floats(1e-6, 1.0), taus)
def test_ks_is_that_of_scipy(spectrum: np.ndarray, q: float, tau: float) -> None:
    found = mp(spectrum, q=q, tau=tau)
    below = spectrum[spectrum <= found.edge]
    law = MarchenkoPastur(q=found.q, sigma2=found.sigma2)
    expected = stats.kstest(below, law.cdf).statistic if len(below) else 1.0
    assert found.ks == pytest.approx(expected, abs=1e-9)
    assert found.misfit == (found.ks > max(0.1, min(0.5, 2.6 / max(len(below), 1))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eigenvalues": np.ones(4)}, r"shape \[groups, width\] — got \[4\]"),
        ({"variances": np.ones((1, 4))}, r"variances of a spectrum must have the shape .*\[2, 4\] — got \[1, 4\]"),
        ({"replicate": np.ones((4, 2))}, r"replicate of a spectrum .* got \[4, 2\]"),
        ({"samples": 0}, "samples of a spectrum must be above 0 and finite — got 0"),
        ({"effective_samples": 0.0}, "effective_samples of a spectrum must be above 0"),
        ({"effective_samples": math.inf}, "effective_samples of a spectrum must be above 0 and finite — got inf"),
    ],
)
def test_a_spectrum_whose_parts_do_not_fit_is_refused(fields: dict, message: str) -> None:
    """Of Spectrum's own words: in tests beartype speaks before them where a shape is wrong."""
    spectrum = object.__new__(Spectrum)
    for name, value in {"eigenvalues": np.ones((2, 4)), "samples": 100, **fields}.items():
        object.__setattr__(spectrum, name, value)
    with pytest.raises(DataError, match=message):
        spectrum.__post_init__()
