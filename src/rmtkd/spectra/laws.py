"""The law of Marchenko and Pastur: what the eigenvalues of a covariance look like where there is nothing but noise.

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

References:
    V. A. Marchenko, L. A. Pastur, "Distribution of eigenvalues for some sets of random matrices", Math.
    USSR-Sbornik 1 (1967) 457–483.
    Z. Bai, J. W. Silverstein, "Spectral Analysis of Large Dimensional Random Matrices", 2nd ed., Springer
    2010, ch. 3.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rmtkd.errors import OptionError

_SERIES_BELOW = 0.1  # r under which T(φ) is summed; above it the closed form is right to 1e-15
_SERIES_TERMS = 18  # 0.1¹⁸ is below the spacing of doubles


def check_positive(name: str, value: float) -> None:
    """Raise OptionError unless `value` is a positive finite number."""
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"{name} must be a positive finite number — got {value} — pass one.")


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
            check_positive(name, value)

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
            Probabilities, as exact as `x` less an edge is: a few 1e-16 for q near 1, and 1e-16/√q for small q.
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
