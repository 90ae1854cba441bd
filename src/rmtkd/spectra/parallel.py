"""Parallel analysis without draws: the spectrum is held against noise of the same variances and no correlation.

References:
    E. Dobriban, A. B. Owen, "Deterministic parallel analysis", J. R. Stat. Soc. B 81 (2019) 163–183. The effective
    sample size, and setting massive channels aside, are ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from rmtkd.errors import DataError, OptionError
from rmtkd.spectra.anisotropic import AnisotropicMarchenkoPastur
from rmtkd.spectra.laws import check_positive
from rmtkd.spectra.spectrum import NoiseEdge, Spectrum, alive, answer, fitted_scale
from rmtkd.spectra.tracy_widom import tracy_widom_quantile


@dataclass(frozen=True, kw_only=True)
class ParallelAnalysisRule:
    """`rdpa`, robust deterministic parallel analysis: what no correlation between the coordinates would leave.

    Take noise that has the measured variance in every coordinate and no correlation between coordinates: the largest
    eigenvalue of its covariance is the edge of the anisotropic law (`anisotropic`) at q = width over *effective*
    samples, and fluctuates as Tracy and Widom say. The edge is its (1 − level) quantile. Signal adds to the variances,
    so that the edge is high rather than low; there is no deflation, which runs away where a spectrum has no gap.

    *Massive channels* (variances above `massive` times the median of their group) would raise the edge above
    everything else. They are set aside, and count as the signal that they are: each has an eigenvalue above its own
    variance or nearly so.

    Its blind spot is noise that is correlated across coordinates, in a basis unknown: there the variances are flatter
    than the eigenvalues of the noise. It shows as a misfit between the law and the eigenvalues below the edge, and the
    remarks say so.

    Args:
        level: share of spectra of pure noise in which a direction is called signal.
        massive: variance of a massive channel over the median.

    Raises:
        OptionError: if `level` is not within (0, 0.5) or `massive` is not positive.
    """

    name: ClassVar[str] = "rdpa"
    needs: ClassVar[frozenset[str]] = frozenset({"variances"})
    level: float = 0.01
    massive: float = 20.0

    def __post_init__(self) -> None:
        check_positive("massive", self.massive)
        if not 0 < self.level < 0.5:
            raise OptionError(f"level must be within (0, 0.5) — got {self.level} — 0.01 is usual.")

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. The diagnostics hold the number of `massive` channels and the bare edge of the law, `upper`."""
        if spectrum.variances is None:
            raise DataError(
                f"The rule {self.name} needs the variances of the coordinates — the spectrum holds eigenvalues alone — "
                "collect the spectra anew, or use the rule bema."
            )
        found = alive(spectrum)
        median = np.array([[np.median(group[group > 0]) if np.any(group > 0) else 0.0] for group in spectrum.variances])
        is_massive = spectrum.variances > self.massive * median
        noise = np.where(is_massive, 0.0, spectrum.variances)
        law = AnisotropicMarchenkoPastur(variances=noise[~is_massive], q=spectrum.q_eff)
        effective = spectrum.width / spectrum.q_eff
        margin = tracy_widom_quantile(1 - self.level / spectrum.groups) * effective ** (-2 / 3)
        upper = law.upper
        edge = upper + margin * law.scale
        massive, remarks = int(is_massive.sum()), []
        if massive:
            # Every massive channel has its direction, also where one lies below the edge of the others.
            edge = min(edge, float(np.nextafter(found.eigenvalues[-massive], 0)))
            remarks.append(f"{massive} massive channels (variance above {self.massive:g} medians) count as signal.")
        # What lies below the edge may be such noise, without the shadow of the signal, or white.
        laws = [
            AnisotropicMarchenkoPastur(variances=variances, q=spectrum.q_eff)
            for variances in (_without_signal(spectrum, noise, edge)[~is_massive], np.ones(1))
            if np.any(variances > 0)
        ]
        scales = [fitted_scale(found.eigenvalues, law) for law in laws]
        answers = [
            answer(
                self.name,
                found,
                law,
                edge,
                sigma2=scale * float(law.variances[law.variances > 0].mean()),
                scale=scale,
                diagnostics={"massive": float(massive), "upper": upper},
                remarks=remarks,
            )
            for law, scale in zip(laws, scales, strict=True)
        ]
        return min(answers, key=lambda answer: answer.ks)


def _without_signal(
    spectrum: Spectrum, variances: Float[np.ndarray, "groups width"], edge: float
) -> Float[np.ndarray, "groups width"]:
    """The variances without what lies above the edge, taken to be spread evenly over the coordinates.

    For the fit below the edge alone: the edge itself keeps the shadow of the signal, and errs on the high side.
    """
    below = np.where(spectrum.eigenvalues > edge, 0, spectrum.eigenvalues).sum(axis=1, keepdims=True)
    excess = np.maximum(variances.sum(axis=1, keepdims=True) - below, 0)
    return np.maximum(variances - excess / spectrum.width, 0)
