"""The law of Tracy and Widom: how far the largest eigenvalue of real noise strays from the edge.

    F₁(s) = det(I − V),   V(x, y) = ½ Ai((x + y)/2) on L²(s, ∞),

a Fredholm determinant, computed by Gauss–Legendre quadrature on (s, s + 32). What is cut off there counts like
Ai(s + 16)², which is nothing for s ≥ −8.

References:
    C. A. Tracy, H. Widom, "On orthogonal and symplectic matrix ensembles", Commun. Math. Phys. 177 (1996) 727–754.
    P. L. Ferrari, H. Spohn, "A determinantal formula for the GOE Tracy–Widom distribution", J. Phys. A 38 (2005) L557.
    F. Bornemann, "On the numerical evaluation of Fredholm determinants", Math. Comp. 79 (2010) 871–915.
"""

from functools import cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import airy

from rmtkd.errors import OptionError

_POINTS, _REACH = 80, 32.0


def tracy_widom_cdf(s: float) -> float:
    """F₁(s), with an absolute error of about 1e-13 for s ≥ −8."""
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    x, weights = s + _REACH * (nodes + 1) / 2, _REACH * weights / 2
    root = np.sqrt(weights)
    kernel = root[:, None] * airy((x[:, None] + x) / 2)[0] / 2 * root
    return float(np.linalg.det(np.eye(_POINTS) - kernel))


@cache
def tracy_widom_quantile(p: float) -> float:
    """The s with F₁(s) = p, to about 1e-10 where p lies within [0.001, 0.999]; at either end to 1e-7.

    Raises:
        OptionError: if `p` is not within [1e-6, 1 − 1e-6].
    """
    if not 1e-6 <= p <= 1 - 1e-6:
        raise OptionError(f"Tracy–Widom probabilities must be within [1e-6, 1 − 1e-6] — got {p} — pass 0.99, say.")
    return float(brentq(lambda s: tracy_widom_cdf(s) - p, -8.0, 12.0, xtol=1e-13))  # pyright: ignore[reportArgumentType]
