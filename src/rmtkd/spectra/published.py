"""The published rule: a Marchenko–Pastur bulk fitted from a quantile of the eigenvalues.

Reference:
    D. Ettori et al., "RMT-KD: Random Matrix Theoretic Causal Knowledge Distillation", arXiv 2509.15724 (2025).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from rmtkd.errors import OptionError
from rmtkd.spectra.laws import MarchenkoPastur
from rmtkd.spectra.spectrum import NoiseEdge, Spectrum, alive, kolmogorov_smirnov, most_ks


@dataclass(frozen=True, kw_only=True)
class MarchenkoPasturRule:
    """`mp`, the published rule, made well-posed.

    σ₀² is the τ-quantile; σ² then minimises the L2 distance between the histogram of the eigenvalues and the
    law on its support [λ₋, λ₊]; the edge is λ₊ = σ² (1 + √q)². Signal does not disturb the fit much, as it
    lies outside the support. As published the problem is ill-posed, and ours differs where it must:

    * *Scale-free.* A density has the unit 1/λ, so the published objective, a mean of squares, falls like 1/σ⁴ as
      the support widens: its global minimum is infinite noise, which keeps nothing. In t = λ/σ² the objective compares
      shares of the eigenvalues, and bin masses come from the exact cdf.
    * *Continuous.* A histogram of d points is piecewise constant in σ², with many false minima. The empirical
      cdf is interpolated linearly between eigenvalues instead; they repel each other, so little is lost.
    * *Local.* If there is a bulk, the τ-quantile is one of its eigenvalues: λ₋ ≤ σ₀² ≤ λ₊. Hence σ² is the
      best fit within σ₀²/(1 + √q)² ≤ σ² ≤ σ₀²/(1 − √q)² (1/q for q > 1), never beyond 4 σ₀², and never below
      σ₀²/4 by the first bound. It follows that the edge never falls below the τ-quantile, and that a larger τ
      never keeps more. Where nothing improves on σ₀², σ₀² stays.

    As q → 0 the support closes on σ²: if the spectrum then is no bulk but, say, a power law, the rule keeps a
    share 1 − τ of it or a little less, whatever the data. τ is a compression setting there, and the remarks
    say so. Zero eigenvalues are set aside (`alive`), and for q > 1 the others are fitted by duality.

    Args:
        tau: quantile at which σ² starts; a larger one keeps less.
        bins: bins of the histogram on the support; fewer are used below 8 eigenvalues a bin.

    Raises:
        OptionError: if `tau` or `bins` is out of range.

    Reference:
        Ettori et al., arXiv 2509.15724 (2025). The three changes and the care for zeros are ours.
    """

    name: ClassVar[str] = "mp"
    needs: ClassVar[frozenset[str]] = frozenset()
    tau: float = 0.5
    bins: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.tau < 1:
            raise OptionError(f"tau must lie strictly between 0 and 1 — got {self.tau} — 0.4 to 0.6 is usual.")
        if self.bins < 1:
            raise OptionError(f"bins must be at least 1 — got {self.bins} — 20 is usual.")

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. The diagnostics hold `sigma2_initial`, the first estimate σ₀²."""
        found = alive(spectrum)
        noise, q, remarks = found.eigenvalues, found.q, list(found.remarks)
        gram = noise / max(1.0, q)  # by duality these follow σ² MP(min(q, 1/q)), which has no atom
        law = MarchenkoPastur(q=min(q, 1 / q))
        initial = float(np.quantile(gram, self.tau))
        sigma2, error = _refine(gram, law, initial, min(self.bins, max(1, len(gram) // 8)))
        edge = MarchenkoPastur(q=q, sigma2=sigma2).upper

        if sigma2 == initial:
            remarks.append("The fit did not improve on the τ-quantile, which is kept.")
        below = gram[noise <= edge] / sigma2
        ks = kolmogorov_smirnov(below, law)
        misfit = ks > most_ks(len(below))
        if misfit:
            remarks.append(f"No bulk fits, KS {ks:.2f}.")
        share = float(np.mean(noise > edge))
        if q < 0.05 and abs(share - (1 - self.tau)) <= 0.1:
            remarks.append(
                f"With q = {q:.2g} the edge closes on σ²: the rule acts as a quantile threshold and keeps "
                f"{share:.0%}, where 1 − τ is {1 - self.tau:.0%}."
            )
        return NoiseEdge(
            rule=self.name,
            q=q,
            q_eff=found.q_eff,
            sigma2=sigma2,
            edge=edge,
            fit_error=error,
            ks=ks,
            misfit=misfit,
            diagnostics={"sigma2_initial": initial},
            remarks=tuple(remarks),
        )


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
