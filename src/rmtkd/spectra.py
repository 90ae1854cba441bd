"""The Marchenko–Pastur law, and where the noise of a measured spectrum ends.

Take n independent vectors of d independent coordinates, each with mean zero and variance σ². The eigenvalues
of their sample covariance do not sit at σ²: as d and n grow with q = d/n fixed, they fill an interval whose
density is the law of Marchenko and Pastur (1967),

    ρ(λ) = √((λ₊ − λ)(λ − λ₋)) / (2π q σ² λ),        λ± = σ² (1 ± √q)².

For q > 1 the covariance has rank n: an atom of mass 1 − 1/q sits at zero, and the other eigenvalues, those of
the n × n Gram matrix up to the factor q, follow q·MP(1/q) (duality). A direction that carries more than noise
shows as an eigenvalue above λ₊, provided that its variance exceeds σ² (1 + √q).

**The variable φ.** Everything below is written with r = √q ≤ 1 (or 1/√q, by duality) and

    λ = σ² (1 + q − 2√q cos φ),  φ ∈ [0, π],        dF/dφ = (2/π) sin²φ / (1 + r² − 2r cos φ),

where the square roots of the edges are gone. As (1 + r² − 2r cos φ)⁻¹ is a Poisson kernel, the cdf is a sine
series,

    π F(φ) = φ + r sin φ − (1 − r²) T(φ),           T(φ) = Σ_{k≥2} r^(k−2) sin(kφ) / k = (A − r sin φ) / r²,

with A = Σ_{k≥1} r^k sin(kφ)/k = arg(1 / (1 − r e^{iφ})). The closed form of T loses a factor 1/r of precision
to cancellation, so the series itself is summed where r is small, and it is short there.

**The rule** `mp` finds σ² from the eigenvalues alone and answers with the edge λ₊ (a `NoiseEdge`). It follows
Ettori et al.; three things are ours, because the refinement is ill-posed as published: the scale-free
objective, its continuity, and the interval in which σ² is sought. `mp` says why.

References:
    V. A. Marchenko, L. A. Pastur, "Distribution of eigenvalues for some sets of random matrices", Math.
    USSR-Sbornik
        1 (1967) 457–483.
    Z. Bai, J. W. Silverstein, "Spectral Analysis of Large Dimensional Random Matrices", 2nd ed., Springer
    2010, ch. 3. D. Ettori et al., "RMT-KD: Random Matrix Theoretic Causal Knowledge Distillation", arXiv
    2509.15724 (2025).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rmtkd.errors import DataError, OptionError

_SERIES_BELOW = 0.1  # r under which T(φ) is summed; above it the closed form is right to 1e-15
_SERIES_TERMS = 18  # 0.1¹⁸ is below the spacing of doubles
_MISFIT_KS = 0.1  # a true bulk of 50 eigenvalues or more stays well below


@dataclass(frozen=True, kw_only=True)
class MarchenkoPastur:
    """The limiting law of the eigenvalues of a sample covariance of white noise.

    Args:
        q: aspect ratio d/n, any positive number.
        sigma2: variance of the noise, σ².

    Raises:
        OptionError: if `q` or `sigma2` is not a positive finite number.

    Reference:
        Marchenko & Pastur (1967); Bai & Silverstein (2010), theorem 3.6. The moments are E λ = σ², Var λ = q
        σ⁴.
    """

    q: float
    sigma2: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("q", self.q), ("sigma2", self.sigma2)):
            _check_positive(name, value)

    @property
    def lower(self) -> float:
        """Lower edge λ₋ of the continuous part."""
        return self.sigma2 * (1 - math.sqrt(self.q)) ** 2

    @property
    def upper(self) -> float:
        """Upper edge λ₊."""
        return self.sigma2 * (1 + math.sqrt(self.q)) ** 2

    @property
    def median(self) -> float:
        """The median; zero for q ≥ 2, where the atom holds half of the mass."""
        return float(self.ppf(0.5))

    def pdf(self, x: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
        """Density of the continuous part, whose mass is min(1, 1/q); zero at and outside the edges.

        Args:
            x: eigenvalues.

        Returns:
            The density at `x`, in units of 1/eigenvalue.
        """
        x = np.asarray(x, dtype=np.float64)
        inside = (x > self.lower) & (x < self.upper)
        safe = np.where(inside, x, self.upper)  # the edge itself gives 0, and never 0/0
        root = np.sqrt((self.upper - safe) * (safe - self.lower))
        return np.asarray(root / (2 * np.pi * self.q * self.sigma2 * safe))

    def cdf(self, x: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
        """Probability of an eigenvalue at or below `x`, the atom at zero included.

        Args:
            x: eigenvalues.

        Returns:
            Probabilities, with an absolute error of a few 1e-16 for every q.
        """
        x = np.asarray(x, dtype=np.float64)
        # From the distances to the two edges, not from cos φ: no cancellation near the edges.
        above, below = np.maximum(x - self.lower, 0), np.maximum(self.upper - x, 0)
        phi = np.asarray(2 * np.arctan2(np.sqrt(above), np.sqrt(below)))
        mass = min(1.0, 1 / self.q)
        return np.asarray(np.where(x < 0, 0.0, (1 - mass) + mass * _cdf_of_angle(phi, self._radius)))

    def ppf(self, p: Float[np.ndarray, "*shape"] | float) -> Float[np.ndarray, "*shape"]:
        """The quantile function, inverse of `cdf`; zero for p within the atom.

        Bisection in φ: it reaches double precision, and it is monotone in `p` whatever the rounding, as two
        probabilities share their brackets until a midpoint parts them.

        Args:
            p: probabilities.

        Returns:
            Eigenvalues, between `lower` and `upper`, or zero.

        Raises:
            OptionError: if a probability lies outside [0, 1].
        """
        p = np.asarray(p, dtype=np.float64)
        if not np.all((p >= 0) & (p <= 1)):
            raise OptionError("Probabilities must lie between 0 and 1 — some do not — pass values in [0, 1].")
        mass = min(1.0, 1 / self.q)
        target = (p - (1 - mass)) / mass
        low, high = np.zeros_like(p), np.full_like(p, np.pi)
        for _ in range(60):  # π/2⁶⁰ is below the spacing of doubles near 1
            middle = np.asarray((low + high) / 2)
            left = _cdf_of_angle(middle, self._radius) < target
            low, high = np.where(left, middle, low), np.where(left, high, middle)
        x = self.lower + (self.upper - self.lower) * np.sin((low + high) / 4) ** 2
        x = np.where(target >= 1, self.upper, x)  # F rounds to one short of φ = π
        return np.asarray(np.where(target <= 0, self.lower if self.q <= 1 else 0.0, x))

    @property
    def _radius(self) -> float:
        return math.sqrt(min(self.q, 1 / self.q))


def _cdf_of_angle(phi: Float[np.ndarray, "*shape"], r: float) -> Float[np.ndarray, "*shape"]:
    """F(φ) of the module docstring for r = √q ≤ 1."""
    if r < _SERIES_BELOW:
        k = np.arange(2, 2 + _SERIES_TERMS)
        tail = np.tensordot(r ** (k - 2.0) / k, np.sin(np.multiply.outer(k, phi)), axes=1)
    else:
        tail = (np.arctan2(r * np.sin(phi), 1 - r * np.cos(phi)) - r * np.sin(phi)) / r**2
    return np.asarray(np.clip((phi + r * np.sin(phi) - (1 - r * r) * tail) / np.pi, 0, 1))


@dataclass(frozen=True, kw_only=True)
class NoiseEdge:
    """Where a rule says that the noise ends, and how well noise explains what lies below.

    Args:
        rule: name of the rule, a key of `RULES`.
        q: aspect ratio of the noise; smaller than the one given if zero directions were set aside.
        sigma2_initial: first estimate σ₀² of the noise variance, before refinement.
        sigma2: noise variance σ².
        edge: the threshold; eigenvalues above it count as signal.
        fit_error: L2 distance at `sigma2` between histogram and law, on the support scaled to length one:
            scale-free, 0 for a perfect fit, about 0.1 for true noise of a few hundred dimensions, 1 or more
            for none.
        ks: Kolmogorov–Smirnov distance between the non-zero eigenvalues at or below `edge` and the law.
        misfit: whether `ks` exceeds 0.1, i.e. no bulk was found and the edge is a convention.
        remarks: what a reader must know, as plain sentences.
    """

    rule: str
    q: float
    sigma2_initial: float
    sigma2: float
    edge: float
    fit_error: float
    ks: float
    misfit: bool
    remarks: tuple[str, ...] = ()

    def count(self, eigenvalues: Float[np.ndarray, " count"], multiplier: float = 1.0) -> int:
        """Number of eigenvalues strictly above `multiplier` times the edge.

        Args:
            eigenvalues: a spectrum, in any order; for pooled groups, that of one group.
            multiplier: a margin on the edge, greater than one to keep less.

        Returns:
            The count.

        Raises:
            OptionError: if `multiplier` is not a positive finite number.
        """
        _check_positive("multiplier", multiplier)
        return int(np.count_nonzero(eigenvalues > multiplier * self.edge))


def mp(eigenvalues: Float[np.ndarray, " count"], *, q: float, tau: float = 0.5, bins: int = 20) -> NoiseEdge:
    """The published rule: a Marchenko–Pastur bulk fitted from the τ-quantile of the eigenvalues.

    σ₀² is the τ-quantile; σ² then minimises the L2 distance between the histogram of the eigenvalues and the
    law on its support [λ₋, λ₊]; the edge is λ₊ = σ² (1 + √q)². Signal does not disturb the fit much, as it
    lies outside the support. As published the problem is ill-posed, and ours differs where it must:

    * *Scale-free.* A density has the unit 1/λ, so the published objective falls like 1/σ² as the support
      widens: its global minimum is infinite noise, which keeps nothing. In t = λ/σ² the objective compares
      shares of the eigenvalues, and bin masses come from the exact cdf.
    * *Continuous.* A histogram of d points is piecewise constant in σ², with many false minima. The empirical
      cdf is interpolated linearly between eigenvalues instead; they repel each other, so little is lost.
    * *Local.* If there is a bulk, the τ-quantile is one of its eigenvalues: λ₋ ≤ σ₀² ≤ λ₊. Hence σ² is the
      best fit within σ₀²/(1 + √q)² ≤ σ² ≤ σ₀²/(1 − √q)² (1/q for q > 1), never beyond 4 σ₀², and never below
      σ₀²/4 by the first bound. It follows that the edge never falls below the τ-quantile, and that a larger τ
      never keeps more. Where nothing improves on σ₀², σ₀² stays.

    As q → 0 the support closes on σ²: if the spectrum then is no bulk but, say, a power law, the rule keeps a
    share 1 − τ of it or a little less, whatever the data. τ is a compression setting there, and the remarks
    say so.

    Zero eigenvalues are no noise level. Those of dead, constant or dependent directions are set aside, and q
    shrinks with the dimensions left. Those that the law itself promises for q > 1 (fewer vectors than
    dimensions, less one if centred) are set aside too, and the others are fitted by duality, with q
    unchanged.

    Args:
        eigenvalues: a spectrum in any order, or several of equal q pooled (the heads of a layer).
        q: aspect ratio d/n of one group; dimensions over vectors.
        tau: quantile at which σ² starts; a larger one keeps less.
        bins: bins of the histogram on the support; fewer are used below 8 eigenvalues a bin.

    Returns:
        The edge and the quality of the fit. Scale-equivariant and deterministic.

    Raises:
        DataError: if there are no eigenvalues, or if they are not finite, negative, or all zero.
        OptionError: if `q`, `tau` or `bins` is out of range.

    Reference:
        Ettori et al., arXiv 2509.15724 (2025). The three changes and the care for zeros are ours.
    """
    _check_positive("q", q)
    if not 0 < tau < 1:
        raise OptionError(f"tau must lie strictly between 0 and 1 — got {tau} — 0.4 to 0.6 is usual.")
    if bins < 1:
        raise OptionError(f"bins must be at least 1 — got {bins} — 20 is usual.")
    noise, q, remarks = _without_zeros(_checked(eigenvalues), q)
    gram = noise / max(1.0, q)  # by duality these follow σ² MP(min(q, 1/q)), which has no atom
    law = MarchenkoPastur(q=min(q, 1 / q))
    initial = float(np.quantile(gram, tau))
    sigma2, error = _refine(gram, law, initial, min(bins, max(1, len(gram) // 8)))
    edge = MarchenkoPastur(q=q, sigma2=sigma2).upper

    if sigma2 == initial:
        remarks.append("The fit did not improve on the τ-quantile, which is kept.")
    ks = _kolmogorov_smirnov(gram[noise <= edge] / sigma2, law)
    if ks > _MISFIT_KS:
        remarks.append(f"No bulk fits, KS {ks:.2f}.")
    share = float(np.mean(noise > edge))
    if q < 0.05 and abs(share - (1 - tau)) <= 0.1:
        remarks.append(
            f"With q = {q:.2g} the edge closes on σ²: the rule acts as a quantile threshold and keeps "
            f"{share:.0%}, where 1 − τ is {1 - tau:.0%}."
        )
    return NoiseEdge(
        rule="mp",
        q=q,
        sigma2_initial=initial,
        sigma2=sigma2,
        edge=edge,
        fit_error=error,
        ks=ks,
        misfit=ks > _MISFIT_KS,
        remarks=tuple(remarks),
    )


RULES: dict[str, Callable[..., NoiseEdge]] = {"mp": mp}
"""Every rule by name: `rule(eigenvalues, q=..., **options) -> NoiseEdge`."""


def _refine(gram: Float[np.ndarray, " count"], law: MarchenkoPastur, initial: float, bins: int) -> tuple[float, float]:
    """The best fit (σ², its L2 error) in the interval in which `initial` is a bulk eigenvalue.

    Args:
        gram: positive eigenvalues, ascending.
        law: the law for σ² = 1, with q ≤ 1.
        initial: σ₀².
        bins: number of bins on the support.
    """
    bin_edges = np.linspace(law.lower, law.upper, bins + 1)
    masses = np.diff(law.cdf(bin_edges))
    empirical = np.linspace(0, 1, len(gram))

    def error(sigma2: Float[np.ndarray, " trial"]) -> Float[np.ndarray, " trial"]:
        cdf = np.interp(np.multiply.outer(sigma2, bin_edges), gram, empirical, left=0, right=1)
        return np.sqrt(bins * np.sum((np.diff(cdf, axis=1) - masses) ** 2, axis=1))

    # The trial points hang on the median, not on σ₀²: one landscape for every τ, so that σ² grows with τ.
    reference, step = float(np.median(gram)), math.sqrt(law.q) / 400
    first = math.log(initial / law.upper / reference) / step
    last = math.log(initial / max(law.lower, 0.25) / reference) / step
    trials = reference * np.exp(step * np.arange(math.ceil(first), math.floor(last) + 1))
    errors = error(trials)
    best = errors <= errors.min() + 1e-12  # ties but for rounding: the one next to σ₀² wins
    if np.interp(initial, trials, errors) <= errors.min() + 1e-12:
        sigma2 = initial
    else:
        sigma2 = float(min(trials[best], key=lambda trial: abs(math.log(trial / initial))))
    return sigma2, float(error(np.array([sigma2]))[0])


def _without_zeros(eigenvalues: Float[np.ndarray, " count"], q: float) -> tuple[np.ndarray, float, list[str]]:
    """The non-zero eigenvalues, the q that belongs to them, and what to say about it."""
    total, largest = len(eigenvalues), float(eigenvalues[-1])
    rank = int(np.count_nonzero(eigenvalues > total * np.finfo(np.float64).eps * largest))
    full = math.ceil(total / q) if q > 1 else total
    # Where the law promises zeros, what float32 vectors leave in their place is rounding, not noise.
    if rank > full and eigenvalues[total - full - 1] <= total * np.finfo(np.float32).eps * largest:
        rank = full
    remarks = []
    if q > 1:
        remarks.append(f"With q = {q:.3g} there are fewer vectors than dimensions: only {rank} eigenvalues tell.")
    # Centring costs one vector (per group, hence the 2 %): that is no dead direction.
    if rank < (total if q <= 1 else 0.98 * full - 1):
        alive = q * rank / total
        remarks.append(
            f"{total - rank} of {total} eigenvalues are zero (dead, constant or dependent directions) and "
            f"set aside: q is {alive:.3g} instead of {q:.3g}."
        )
        q = alive
    return eigenvalues[total - rank :], q, remarks


def _kolmogorov_smirnov(values: Float[np.ndarray, " count"], law: MarchenkoPastur) -> float:
    """Largest distance between the empirical cdf of ascending `values` and `law`; 1 if there are none."""
    if len(values) == 0:
        return 1.0
    steps, cdf = np.arange(len(values) + 1) / len(values), law.cdf(values)
    return float(max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1])))


def _checked(eigenvalues: Float[np.ndarray, " count"]) -> Float[np.ndarray, " count"]:
    """`eigenvalues` in float64, ascending."""
    if len(eigenvalues) == 0:
        raise DataError("A spectrum must hold at least one eigenvalue — got none — pass the eigenvalues.")
    if not np.all(np.isfinite(eigenvalues)):
        bad = np.count_nonzero(~np.isfinite(eigenvalues))
        raise DataError(f"Eigenvalues must be finite — got {bad} NaN or infinite — check the vectors behind them.")
    ascending = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    if ascending[0] < -1e-6 * abs(ascending[-1]):
        raise DataError(
            f"Eigenvalues of a covariance must not be negative — got {ascending[0]:.3g} — pass the spectrum "
            "of a covariance."
        )
    if ascending[-1] <= 0:
        raise DataError(
            "Some eigenvalue must be positive — got only zeros — the width is dead on these data: leave it alone."
        )
    return ascending


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{name} must be a positive finite number — got {value} — pass one.")
