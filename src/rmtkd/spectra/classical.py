"""Rules for white noise: thresholds known in closed form, and one that makes do with separable noise.

References:
    M. Gavish, D. L. Donoho, "The optimal hard threshold for singular values is 4/√3", IEEE Trans. Inf. Theory 60
        (2014) 5040–5053.
    I. M. Johnstone, "On the distribution of the largest eigenvalue in principal components analysis", Ann. Stat. 29
        (2001) 295–327.
    Z. Ma, "Accuracy of the Tracy–Widom limits for the extreme eigenvalues in white Wishart matrices", Bernoulli 18
        (2012) 322–359.
    D. L. Donoho, M. Gavish, E. Romanov, "ScreeNOT: exact MSE-optimal singular value thresholding in correlated noise",
        Ann. Stat. 51 (2023) 122–148.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq

from rmtkd.errors import OptionError
from rmtkd.spectra.laws import MarchenkoPastur
from rmtkd.spectra.spectrum import (
    NoiseEdge,
    Spectrum,
    against_white_noise,
    alive,
    divided,
    noise_levels,
    white_variance,
)
from rmtkd.spectra.tracy_widom import tracy_widom_quantile


def hard_threshold(beta: float) -> float:
    """λ*(β): the optimal threshold for singular values of X/(σ√n) with β = d/n ≤ 1 (Gavish & Donoho, eq. 11)."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


def hard_threshold_of_median(beta: float) -> float:
    """ω(β) = λ*(β)/√μ_β, μ_β the median of the law: the threshold in units of the median singular value."""
    return hard_threshold(beta) / math.sqrt(MarchenkoPastur(q=beta).median)


@dataclass(frozen=True, kw_only=True)
class GavishDonohoRule:
    """`gavish-donoho`: keep what a denoiser would keep, eigenvalues above ω(β)² times the median, β = min(q, 1/q).

    It minimises the squared error of the signal under white noise and is no detector: as q → 0 it keeps directions
    whose signal is stronger than their noise (twice the median).
    """

    name: ClassVar[str] = "gavish-donoho"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. Each group is held against its own level."""
        levels = noise_levels(spectrum)
        found = alive(divided(spectrum, levels))
        edge = hard_threshold_of_median(min(found.q, 1 / found.q)) ** 2 * float(np.median(found.eigenvalues))
        return against_white_noise(self.name, found, edge, levels=levels)


@dataclass(frozen=True, kw_only=True)
class TracyWidomRule:
    """`tracy-widom`: the (1 − level) quantile of the largest eigenvalue of white noise, of the effective samples.

    σ² is the regression of the middle eigenvalues on those of the law. Off the model it calls a fifth
    to a half of all directions signal.

    Args:
        level: share of spectra of white noise in which a direction is called signal.

    Raises:
        OptionError: if `level` is not within (0, 0.5).
    """

    name: ClassVar[str] = "tracy-widom"
    needs: ClassVar[frozenset[str]] = frozenset()
    level: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.level < 0.5:
            raise OptionError(f"level must be within (0, 0.5) — got {self.level} — 0.01 is usual.")

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. Centring and scale are Ma's. Each group is held against its own level."""
        levels = noise_levels(spectrum)
        found = alive(divided(spectrum, levels))
        n = max(1.0, spectrum.width / spectrum.q_eff)
        p = max(1.0, n * found.q_eff)  # of the directions that are not dead
        roots = math.sqrt(n - 0.5) + math.sqrt(p - 0.5)
        scale = roots * math.cbrt(1 / math.sqrt(n - 0.5) + 1 / math.sqrt(p - 0.5))
        top = (roots**2 + tracy_widom_quantile(1 - self.level / found.groups) * scale) / n
        edge = top * white_variance(found)
        return against_white_noise(self.name, found, edge, levels=levels)


@dataclass(frozen=True, kw_only=True)
class ScreenotRule:
    """`screenot`: the threshold for singular values that minimises the squared error under separable noise.

    It wants an upper bound on the signal, given as a share of the directions, and is sensitive to it: the noise hidden
    behind the signal is imputed from the next eigenvalues.

    Args:
        share: upper bound on the signal.

    Raises:
        OptionError: if `share` is not within [0, 0.5).
    """

    name: ClassVar[str] = "screenot"
    needs: ClassVar[frozenset[str]] = frozenset()
    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise OptionError(f"share must be within [0, 0.5) — got {self.share} — 0.25 is usual.")

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`."""
        found = alive(spectrum)
        singular = np.sqrt(found.eigenvalues)
        bound = min(int(self.share * len(singular)), (len(singular) - 1) // 2)
        edge = screenot_threshold(singular, min(found.q, 1 / found.q), bound) ** 2
        return against_white_noise(self.name, found, edge, assumes=False)


def screenot_threshold(singular: Float[np.ndarray, " count"], beta: float, bound: int) -> float:
    """The threshold t with t D′(t)/D(t) = −4, D(t) = φ (β φ + (1 − β)/t), φ(t) = E[t/(t² − z²)].

    Args:
        singular: singular values, ascending, not all zero; those that are zero for want of vectors left out.
        beta: the smaller over the larger side of the matrix, at most 1.
        bound: the largest so many are imputed before z is taken from them.

    Reference:
        Donoho, Gavish & Romanov (2023), eqs. 2.5 and 3.2; here without a tolerance that has a scale.
    """
    z = np.sort(singular).astype(np.float64)
    if bound:
        fill = (1 - (np.arange(bound) / bound) ** (2 / 3)) / (2 ** (2 / 3) - 1)
        first, second = z[-bound - 1], z[-2 * bound - 1]
        z[-bound:] = (first + fill * (first - second))[::-1]
    unit = z.max()
    z = z / unit

    def excess(log_t: float) -> float:
        t = math.exp(log_t)
        gaps = (t - z) * (t + z)
        phi = float(np.mean(t / gaps))
        slope = -float(np.mean((t * t + z * z) / gaps**2))
        other = beta * phi + (1 - beta) / t
        return t * (slope / phi + (beta * slope - (1 - beta) / t**2) / other) + 4

    low, high = 1e-13, 1.0
    while excess(high) < 0:
        high *= 2
    return unit * math.exp(brentq(excess, low, high, xtol=1e-14))  # pyright: ignore[reportArgumentType]
