"""Rules that ask for a share, whatever the noise."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rmtkd.errors import OptionError
from rmtkd.spectra.spectrum import NoiseEdge, Spectrum, against_white_noise, alive, edge_below


@dataclass(frozen=True, kw_only=True)
class EnergyRule:
    """`energy`: as few directions as carry this share of the variance.

    Args:
        share: of the sum of all eigenvalues.

    Raises:
        OptionError: if `share` is not within (0, 1).
    """

    name: ClassVar[str] = "energy"
    needs: ClassVar[frozenset[str]] = frozenset()
    share: float = 0.9

    def __post_init__(self) -> None:
        _check_share(self.share)

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`."""
        found = alive(spectrum)
        carried = np.cumsum(found.eigenvalues[::-1])
        count = 1 + int(np.searchsorted(carried, self.share * carried[-1] * (1 - 1e-12)))
        return against_white_noise(self.name, found, edge_below(found.eigenvalues[::-1], count), assumes=False)


@dataclass(frozen=True, kw_only=True)
class FixedRule:
    """`fixed`: this share of the directions.

    Args:
        share: of the width, rounded up; or
        width: directions of each group, which goes before `share`.

    Raises:
        OptionError: if `share` is not within (0, 1), or `width` is negative.
    """

    name: ClassVar[str] = "fixed"
    needs: ClassVar[frozenset[str]] = frozenset()
    share: float = 0.5
    width: int | None = None

    def __post_init__(self) -> None:
        _check_share(self.share)
        if self.width is not None and self.width < 0:
            raise OptionError(f"width must not be negative — got {self.width} — pass a number of directions.")

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. Directions that are zero are never counted."""
        found = alive(spectrum)
        width = math.ceil(self.share * spectrum.width - 1e-9) if self.width is None else self.width
        count = min(spectrum.groups * width, len(found.eigenvalues))
        return against_white_noise(self.name, found, edge_below(found.eigenvalues[::-1], count), assumes=False)


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise OptionError(f"share must be within (0, 1) — got {share} — 0.9 of the energy or 0.5 of the width, say.")
