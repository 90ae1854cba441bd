"""The law of the eigenvalues of noise that is not equally strong in all directions.

Let the noise have population variances h (the eigenvalues of its covariance, of distribution H) and q = d/n. The
limiting law of the sample eigenvalues λ is given by the equation of Silverstein (1995). In u = −1/m, where m is the
Stieltjes transform of the n × n companion, it reads

    λ(u) = u + q E[h + h²/(u − h)],

and the law lives where λ is real off the real axis: on the curve u = a + ib, b > 0, on which

    q E[h² / ((a − h)² + b²)] = 1.

For every real a there is at most one such b, and λ rises with a. As λ(u) is elementary, so is the integral of m dλ, and
the cdf is exact at every point of the curve:

    1 − F = ( arg u / q − E[arg u − arg(u − h) + h b / |u − h|²] ) / π.

The upper edge is λ(u*), at the real point u* above all h where the condition holds with b = 0. Around it the
largest eigenvalue fluctuates as Tracy and Widom say, on the scale n^(−2/3) u* (1 + q E[(h/(u* − h))³])^(1/3) (El
Karoui 2007; Lee & Schnelli 2016 for real data). For equal h the curve is a circle, and the law is that of Marchenko and
Pastur.

References:
    J. W. Silverstein, "Strong convergence of the empirical distribution of eigenvalues of large dimensional random
        matrices", J. Multivariate Analysis 55 (1995) 331–339.
    N. El Karoui, "Tracy–Widom limit for the largest eigenvalue of a large class of complex sample covariance
        matrices", Ann. Probab. 35 (2007) 663–714.
    J. O. Lee, K. Schnelli, "Tracy–Widom distribution for the largest eigenvalue of real sample covariance matrices with
        general population", Ann. Appl. Probab. 26 (2016) 3786–3839.
    O. Ledoit, M. Wolf, "Numerical implementation of the QuEST function", Comput. Stat. Data Anal. 115 (2017) 199–223
        (the curve).
    E. Dobriban, A. B. Owen, "Deterministic parallel analysis", J. R. Stat. Soc. B 81 (2019) 163–183 (the edge as a
        threshold).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from rmtkd.errors import DataError
from rmtkd.spectra.laws import check_positive

_NODES = 128  # points of the curve, once at the quantiles of H and once over the whole range
_STEP = 0.01  # of the cdf between two nodes, at most
_ATOMS = 256  # of H that the curve needs; the edge takes them all


class Edge(NamedTuple):
    """Where noise ends, and the scale on which the largest eigenvalue fluctuates there, times n^(2/3)."""

    upper: Float[np.ndarray, "*batch"]
    scale: Float[np.ndarray, "*batch"]


def edge_of(variances: Float[np.ndarray, "*batch width"], q: float) -> Edge:
    """Upper edge of the law, and its Tracy–Widom scale.

    Args:
        variances: population variances of the noise, not all zero.
        q: aspect ratio d/n.
    """
    top = variances.max(axis=-1)
    h = variances / top[..., None]
    u = _end(h, q, side=1)
    ratio = h / (u[..., None] - h)
    upper = u * (1 + q * np.mean(ratio, axis=-1))
    scale = u * np.cbrt(1 + q * np.mean(ratio**3, axis=-1))
    return Edge(np.asarray(top * upper), np.asarray(top * scale))


@dataclass(frozen=True, kw_only=True)
class AnisotropicMarchenkoPastur:
    """The limiting law of the eigenvalues of a sample covariance of noise with these population variances.

    Args:
        variances: of the noise, not negative, not all zero.
        q: aspect ratio d/n.

    Raises:
        OptionError: if `q` is not a positive finite number.
        DataError: if the variances are not finite, negative, or all zero.
    """

    variances: Float[np.ndarray, " width"]
    q: float

    def __post_init__(self) -> None:
        check_positive("q", self.q)
        h = self.variances
        if not (h.size and np.all(np.isfinite(h)) and np.all(h >= 0) and np.any(h > 0)):
            raise DataError(
                "Variances must be finite, not negative and not all zero — these are not — pass the diagonal of a "
                "covariance."
            )

    @property
    def upper(self) -> float:
        """Upper edge of the support."""
        return float(self._edge.upper)

    @property
    def scale(self) -> float:
        """The largest eigenvalue fluctuates about `upper` by this times n^(−2/3) times a Tracy–Widom variable."""
        return float(self._edge.scale)

    def cdf(self, x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """Probability of an eigenvalue at or below `x`, of those that are not zero; to about 5e-3."""
        return np.asarray(np.interp(x, *self._curve, left=0, right=1))

    def ppf(self, p: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
        """The quantile function, inverse of `cdf`."""
        points, probabilities = self._curve
        return np.asarray(np.interp(p, probabilities, points))

    @cached_property
    def _edge(self) -> Edge:
        return edge_of(self.variances, self.q)

    @cached_property
    def _curve(self) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
        """Eigenvalues, ascending, and the exact cdf there."""
        positive = np.sort(self.variances[self.variances > 0])
        q = self.q * len(positive) / len(self.variances)
        unit = positive[-1]
        h = np.interp(np.linspace(0, 1, _ATOMS), np.linspace(0, 1, len(positive)), positive) / unit
        h = positive / unit if len(positive) <= _ATOMS else h
        low, high = (float(_end(h, q, side=side)) for side in (-1, 1))
        quantiles = np.quantile(np.concatenate([[low], h, [high]]), np.linspace(0, 1, _NODES))
        even = low + (high - low) * np.sin(np.linspace(0, np.pi / 2, _NODES)) ** 2
        a = np.unique(np.concatenate([quantiles, even]))
        points, probabilities = _on_the_curve(a, h, q)
        for _ in range(60):  # far from where the nodes are, all of a small part of the mass may lie between two
            wide = (np.diff(probabilities) > _STEP) & (np.diff(a) > 1e-15 * a[1:])
            if not wide.any():
                break
            middles = (a[1:] + a[:-1])[wide] / 2
            more = _on_the_curve(middles, h, q)
            places = np.flatnonzero(wide) + 1
            a = np.insert(a, places, middles)
            points, probabilities = np.insert(points, places, more[0]), np.insert(probabilities, places, more[1])
        return unit * np.maximum.accumulate(np.maximum(points, 0)), np.maximum.accumulate(probabilities)


def _on_the_curve(
    a: Float[np.ndarray, " nodes"], h: Float[np.ndarray, " atoms"], q: float
) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
    """Eigenvalues, and the cdf there, of the points of the curve with these real parts."""
    a = a[:, None]
    # Newton for s = b² on the concave 1/E[h²/((a − h)² + s)] from the left: monotone.
    s, square = np.full_like(a, 1e-30), (a - h) ** 2
    for _ in range(60):
        terms = h**2 / (square + s)
        mean = terms.mean(axis=1, keepdims=True)
        step = mean * (q * mean - 1) / np.mean(terms / (square + s), axis=1, keepdims=True)
        s = np.maximum(s + step, 1e-30)
        if np.all(np.abs(step) <= 1e-12 * np.maximum(s, 1e-15)):
            break
    distance, b = square + s, np.sqrt(s)
    points = a[:, 0] + q * np.mean(h + h**2 * (a - h) / distance, axis=1)
    angle = np.arctan2(b, a)
    above = angle[:, 0] / q - np.mean(angle - np.arctan2(b, a - h) + h * b / distance, axis=1)
    share = min(1.0, 1 / q)  # of the eigenvalues, the others being zero
    return points, 1 - np.clip(above / np.pi / share, 0, 1)


def _end(h: Float[np.ndarray, "*batch atoms"], q: float, *, side: int) -> Float[np.ndarray, "*batch"]:
    """The real u above (side 1) or below (side −1) all h with q E[(h/(u − h))²] = 1, where the curve meets the axis."""
    outermost = h.max(axis=-1) if side > 0 else h.min(axis=-1)
    gap = outermost * np.sqrt(q / h.shape[-1])  # too small, as the outermost h alone gives this
    for _ in range(100):  # Newton for the square root of the inverse, which is concave: monotone from the left
        distance = gap[..., None] + np.abs(outermost[..., None] - h)
        mean = np.mean((h / distance) ** 2, axis=-1)
        step = mean * (np.sqrt(q * mean) - 1) / np.mean(h**2 / distance**3, axis=-1)
        gap = gap + step
        if np.all(np.abs(step) <= 1e-14 * gap):
            break
    return np.asarray(outermost + side * gap)
