"""Bulk eigenvalue matching: the noise is fitted where it is alone, in the middle of the spectrum, and continued.

Reference:
    Z. T. Ke, Y. Ma, X. Lin, "Estimation of the number of spiked eigenvalues in a covariance matrix by bulk eigenvalue
    matching analysis", J. Am. Stat. Assoc. 118 (2023) 374–392, arXiv 2006.00436.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq, fminbound
from scipy.stats import gamma

from rmtkd.errors import OptionError
from rmtkd.spectra.anisotropic import AnisotropicMarchenkoPastur, edge_of
from rmtkd.spectra.spectrum import NoiseEdge, Spectrum, alive, answer, divided, fitted_scale, noise_levels
from rmtkd.spectra.tracy_widom import tracy_widom_cdf

_ATOMS = 128  # of the working law, at quantiles of the gamma distribution
_LARGEST = 2.5  # coefficient of variation: beyond, most directions of a gamma law would be dead
_DRAWS = 400
_TABLE = np.linspace(-8, 8, 321)  # of the Tracy–Widom law


@dataclass(frozen=True, kw_only=True)
class BulkMatchingRule:
    """`bema`: noise with gamma-distributed variances, matched to the middle of the spectrum.

    Working model: independent coordinates whose variances are drawn from a gamma distribution of mean σ² and
    coefficient of variation v (θ = 1/v²). For every v the quantiles of the anisotropic law (`anisotropic`) are known
    but for the scale σ², a regression; v is the best fit to the middle order statistics. The edge is the (1 − level)
    quantile of the largest eigenvalue under that model.

    The law of the largest eigenvalue needs no matrix: it is the mean, over variances drawn from the gamma distribution,
    of Tracy and Widom's law at the edge and scale of the anisotropic law of each draw. Hence the cost does not depend
    on the samples, and little on the width.

    Args:
        level: share of spectra of pure noise in which a direction is called signal; 0.1 as published.
        trim: share of the order statistics left out at either end.
        seed: of the drawn variances.

    Raises:
        OptionError: if `level` or `trim` is not within (0, 0.5).
    """

    name: ClassVar[str] = "bema"
    needs: ClassVar[frozenset[str]] = frozenset()
    level: float = 0.1
    trim: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("level", self.level), ("trim", self.trim)):
            if not 0 < value < 0.5:
                raise OptionError(f"{name} must be within (0, 0.5) — got {value} — 0.1 and 0.2 are published.")

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. Each group is held against its own level. The diagnostics: `variation`, of the variances."""
        levels = noise_levels(spectrum)
        found = alive(divided(spectrum, levels)).effective
        values = found.eigenvalues
        ranks = (np.arange(len(values)) + 0.5) / len(values)
        middle = (ranks > self.trim) & (ranks < 1 - self.trim) | (len(values) < 5)

        def misfit(variation: float) -> float:
            law = _working_law(variation, found.q_eff)
            expected = law.ppf(ranks[middle])
            return float(np.sum((values[middle] - fitted_scale(values, law, self.trim) * expected) ** 2))

        grid = np.linspace(0, _LARGEST, 11)
        best = int(np.argmin([misfit(v) for v in grid]))
        around = (grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)])
        variation = float(fminbound(misfit, *around, xtol=1e-3))  # pyright: ignore[reportArgumentType]
        variation = min(variation, 0.0, key=misfit)
        law = _working_law(variation, found.q_eff)
        sigma2 = fitted_scale(values, law, self.trim)
        width = max(1, round(spectrum.width * found.q_eff / spectrum.q_eff))  # without dead directions
        top = _largest_eigenvalue(found.groups, width, found.q_eff, variation, self.level, self.seed)
        return answer(
            self.name,
            found,
            law,
            sigma2 * top,
            sigma2=sigma2,
            scale=sigma2,
            diagnostics={"variation": variation},
            levels=levels,
        )


@cache
def _gamma_quantiles(variation: float) -> Float[np.ndarray, " atoms"]:
    """The middles of equal shares of a gamma distribution of mean one."""
    if variation < 1e-3:
        return np.ones(1)
    shape = variation**-2.0
    quantiles = gamma.ppf((np.arange(_ATOMS) + 0.5) / _ATOMS, shape, scale=1 / shape)
    return np.maximum(quantiles, 1e-12)


@cache
def _working_law(variation: float, q: float) -> AnisotropicMarchenkoPastur:
    return AnisotropicMarchenkoPastur(variances=_gamma_quantiles(variation), q=q)


@cache
def _largest_eigenvalue(groups: int, width: int, q: float, variation: float, level: float, seed: int) -> float:
    """The (1 − level) quantile of the largest eigenvalue of so many groups under the working model of mean one."""
    shape = max(variation, 1e-3) ** -2.0
    draws = 1 if variation < 1e-3 else _DRAWS * groups
    edge = edge_of(np.random.default_rng(seed).gamma(shape, 1 / shape, (draws, width)), q)
    scale = edge.scale * (width / q) ** (-2 / 3)
    share = (1 - level) ** (1 / groups)  # of the groups, so that all of them lie below

    def excess(top: float) -> float:
        return float(np.mean(np.interp((top - edge.upper) / scale, _TABLE, _tracy_widom_table()))) - share

    bounds = (float(np.min(edge.upper + _TABLE[0] * scale)), float(np.max(edge.upper + _TABLE[-1] * scale)))
    return float(brentq(excess, *bounds, xtol=1e-12))  # pyright: ignore[reportArgumentType]


@cache
def _tracy_widom_table() -> Float[np.ndarray, " points"]:
    return np.array([tracy_widom_cdf(s) for s in _TABLE])
