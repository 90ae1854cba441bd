"""Signal is what two noisy passes over the same inputs have in common."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from rmtkd.errors import DataError
from rmtkd.spectra.laws import check_positive
from rmtkd.spectra.spectrum import (
    NoiseEdge,
    Spectrum,
    against_white_noise,
    alive,
    divided,
    edge_below,
    relative_levels,
)


@dataclass(frozen=True, kw_only=True)
class ReplicateRule:
    """`replicate`, the mirror: noise leaves the cross-covariance of two passes a spectrum symmetric about zero.

    Two passes over the same inputs share the signal, and their noise is independent (dropout masks, augmentations).
    Then the noise has no sign in C = sym(Y¹Y²ᵀ)/n, and its negative edge is the null of its positive one: signal is
    what lies above the mirrored edge. No noise level, no sample size, no basis is assumed. A network without noise is
    all signal, and the rule then answers the full width: a ceiling.

    Args:
        slack: margin beyond the mirrored edge, in units of the distance from the smallest to the fifth smallest
            eigenvalue of C.

    Raises:
        OptionError: if `slack` is not a positive finite number.

    Reference:
        In the spirit of cvPCA (C. Stringer et al., "High-dimensional geometry of population responses in visual
        cortex", Nature 571 (2019) 361–365); the mirror is ours.
    """

    name: ClassVar[str] = "replicate"
    needs: ClassVar[frozenset[str]] = frozenset({"replicate"})
    slack: float = 1.0

    def __post_init__(self) -> None:
        check_positive("slack", self.slack)

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. Each group has a mirror of its own; what is counted there is counted from the top among the
        eigenvalues of the covariance. The diagnostics: `mirror`, the threshold for those of C, in the mean."""
        if spectrum.replicate is None:
            raise DataError(
                f"The rule {self.name} needs two stochastic passes — the spectrum has none — collect the spectra with "
                "replicates, or use the rule rdpa."
            )
        if not np.all(np.isfinite(spectrum.replicate)):
            raise DataError("Replicates must be finite — some are not — check the vectors behind them.")
        alive(spectrum)  # or refused
        mirrors = [self._mirror(np.sort(shared)) for shared in spectrum.replicate]
        edges = [
            edge_below(np.sort(own)[::-1], int(min(np.count_nonzero(shared > mirror), np.count_nonzero(own > 0))))
            if lives
            else 0.0
            for own, shared, mirror, lives in zip(
                spectrum.eigenvalues, spectrum.replicate, mirrors, spectrum.living, strict=True
            )
        ]
        levels = relative_levels(edges)
        edge = float(np.mean([edge for edge in edges if edge > 0]))
        found = alive(divided(spectrum, levels))
        told = {"mirror": float(np.mean(mirrors))}
        return against_white_noise(self.name, found, edge, assumes=False, diagnostics=told, levels=levels)

    def _mirror(self, shared: Float[np.ndarray, " width"]) -> float:
        """The threshold of one group, for its ascending eigenvalues of C: rounding alone if there is no noise."""
        lowest, rounding = float(shared[0]), len(shared) * np.finfo(np.float64).eps * float(np.abs(shared).max())
        if lowest > -rounding:
            return rounding
        return self.slack * float(shared[min(4, len(shared) - 1)] - lowest) - lowest
