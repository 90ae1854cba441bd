"""Parallel analysis without draws: the spectrum is held against noise of the same variances and no correlation.

References:
    E. Dobriban, A. B. Owen, "Deterministic parallel analysis", J. R. Stat. Soc. B 81 (2019) 163–183. The effective
    sample size, and setting massive channels aside, are ours.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from rmtkd.errors import DataError, OptionError
from rmtkd.spectra.anisotropic import AnisotropicMarchenkoPastur
from rmtkd.spectra.spectrum import NoiseEdge, Spectrum, alive, answer, divided, fitted_scale, relative_levels
from rmtkd.spectra.tracy_widom import tracy_widom_quantile


@dataclass(frozen=True, kw_only=True)
class ParallelAnalysisRule:
    """`rdpa`, robust deterministic parallel analysis: what no correlation between the coordinates would leave.

    Take noise that has the measured variance in every coordinate and no correlation between coordinates: the largest
    eigenvalue of its covariance is the edge of the anisotropic law (`anisotropic`) at q = width over *effective*
    samples, and fluctuates as Tracy and Widom say. The edge is its (1 − level) quantile. Signal adds to the variances,
    so that the edge is high rather than low; there is no deflation, which runs away where a spectrum has no gap.

    Groups, the heads of a layer, have an edge each, and share the level: their noise differs, and the loudest would be
    signal at a common edge.

    *Massive channels* (variances above `massive` times the median of their group) would raise the edge above
    everything else. They are set aside, and count as the signal that they are: as many directions as there are such
    channels lie above the edge, also where channels that go together fill fewer.

    Its blind spot is noise that is correlated across coordinates, in a basis unknown: there the variances are flatter
    than the eigenvalues of the noise. It shows as a misfit between the law and the eigenvalues below the edge, and the
    remarks say so.

    Args:
        level: share of spectra of pure noise in which a direction is called signal.
        massive: variance of a massive channel over the median.

    Raises:
        OptionError: if `level` is not within (0, 0.5) or `massive` is below 1.
    """

    name: ClassVar[str] = "rdpa"
    needs: ClassVar[frozenset[str]] = frozenset({"variances"})
    level: float = 0.01
    massive: float = 20.0

    def __post_init__(self) -> None:
        if not 1 <= self.massive < math.inf:
            raise OptionError(f"massive must be at least 1 and finite — got {self.massive} — 20 is usual.")
        if not 0 < self.level < 0.5:
            raise OptionError(f"level must be within (0, 0.5) — got {self.level} — 0.01 is usual.")

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. The diagnostics hold the number of `massive` channels and the bare edge of the law, `upper`."""
        if spectrum.variances is None:
            raise DataError(
                f"The rule {self.name} needs the variances of the coordinates — the spectrum holds eigenvalues alone — "
                "collect the spectra anew, or use the rule bema."
            )
        alive(spectrum)  # or refused
        bounds = [self._bound(spectrum, group) for group in range(spectrum.groups)]
        edge = float(np.mean([bound.edge for bound in bounds if bound.edge > 0]))
        levels = relative_levels([bound.edge for bound in bounds])
        level = divided(spectrum, levels)
        found = alive(level).effective
        is_massive = np.stack([bound.is_massive for bound in bounds])[spectrum.living]
        massive, remarks = int(is_massive.sum()), []
        if massive:
            remarks.append(f"{massive} massive channels (variance above {self.massive:g} medians) count as signal.")
        # What lies below the edge may be such noise, without the shadow of the signal, or white. Dead groups have none.
        assert level.variances is not None
        variances = np.where(is_massive, 0.0, level.variances[spectrum.living])
        noise = _without_signal(level.eigenvalues[spectrum.living], variances, edge)[~is_massive]
        laws = [
            AnisotropicMarchenkoPastur(variances=variances, q=ratio)
            for variances, ratio in (
                (noise, spectrum.q_eff * float(np.mean(~is_massive))),
                (np.ones(1), found.q_eff),
            )
            if np.any(variances > 0)
        ]
        scales = [fitted_scale(found.eigenvalues, law) for law in laws]
        upper = float(np.mean([bound.upper for bound in bounds if bound.edge > 0]))
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
                levels=levels,
            )
            for law, scale in zip(laws, scales, strict=True)
        ]
        return min(answers, key=lambda answer: answer.ks)

    def _bound(self, spectrum: Spectrum, group: int) -> "_Bound":
        """Where the noise of one group ends. The level is shared out over all groups."""
        assert spectrum.variances is not None
        variances = spectrum.variances[group]
        if not spectrum.living[group] or not np.any(variances > 0):
            return _Bound(edge=0.0, upper=0.0, is_massive=np.zeros(spectrum.width, dtype=bool))
        is_massive = variances > self.massive * float(np.median(variances[variances > 0]))
        law = AnisotropicMarchenkoPastur(
            variances=variances[~is_massive], q=spectrum.q_eff * float(np.mean(~is_massive))
        )
        effective = spectrum.width / spectrum.q_eff
        margin = tracy_widom_quantile(1 - self.level / int(spectrum.living.sum())) * effective ** (-2 / 3)
        edge = law.upper + margin * law.scale
        if massive := int(is_massive.sum()):
            # Every massive channel has its direction, also where one lies below the edge of the others.
            found = alive(
                replace(spectrum, eigenvalues=spectrum.eigenvalues[group][None], variances=None, replicate=None)
            )
            edge = min(edge, float(np.nextafter(found.eigenvalues[-min(massive, len(found.eigenvalues))], 0)))
        return _Bound(edge=edge, upper=law.upper, is_massive=is_massive)


class _Bound(NamedTuple):
    """Of one group: the edge, that of the bare law, and which channels are massive."""

    edge: float
    upper: float
    is_massive: Bool[np.ndarray, " width"]


def _without_signal(
    eigenvalues: Float[np.ndarray, "groups width"], variances: Float[np.ndarray, "groups width"], edge: float
) -> Float[np.ndarray, "groups width"]:
    """The variances without what lies above the edge, taken to be spread evenly over the coordinates.

    For the fit below the edge alone: the edge itself keeps the shadow of the signal, and errs on the high side.
    """
    below = np.where(eigenvalues > edge, 0, eigenvalues).sum(axis=1, keepdims=True)
    excess = np.maximum(variances.sum(axis=1, keepdims=True) - below, 0)
    return np.maximum(variances - excess / eigenvalues.shape[1], 0)
