"""Rules that see different things in a spectrum, and what they agree on."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from rmtkd.spectra.matching import BulkMatchingRule
from rmtkd.spectra.parallel import ParallelAnalysisRule
from rmtkd.spectra.spectrum import NoiseEdge, Spectrum, against_white_noise, alive


@dataclass(frozen=True, kw_only=True)
class GapRule:
    """`gap`: the last eigenvalue that stands further above the next than noise would.

    At the edge of noise of any correlation eigenvalues fall like a line in rank^(2/3) (Onatski 2010): twice the slope
    of five eigenvalues below the signal is a gap that noise does not make. Signal that blends into the noise is missed.

    Reference:
        A. Onatski, "Determining the number of factors from empirical distribution of eigenvalues", Rev. Econ. Stat. 92
        (2010) 1004–1016.
    """

    name: ClassVar[str] = "gap"

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. Groups are averaged rank by rank."""
        found = alive(spectrum)
        descending = np.sort(spectrum.eigenvalues, axis=1)[:, ::-1].mean(axis=0)
        count = _last_gap(descending)
        padded = np.concatenate([[2 * descending[0]], descending, [0.0]])
        return against_white_noise(self.name, found, float(padded[count : count + 2].mean()), assumes=False)


def _last_gap(descending: Float[np.ndarray, " width"], most: float = 0.25, window: int = 5) -> int:
    """Directions above the last gap, among the first `most` of all."""
    bound = min(int(most * len(descending)), len(descending) - window - 1)
    if bound < 1:
        return 0
    gaps = descending[:bound] - descending[1 : bound + 1]
    count = bound
    for _ in range(20):
        ranks = np.arange(count, count + window) ** (2 / 3)
        slope = np.polyfit(ranks, descending[count : count + window], 1)[0]
        wide = np.flatnonzero(gaps >= 2 * abs(slope))
        previous, count = count, int(wide[-1]) + 1 if len(wide) else 0
        if count == previous:
            break
    return count


@dataclass(frozen=True, kw_only=True)
class ConsensusRule:
    """`consensus`: the middle one of `rdpa`, `bema` and `gap`, which fail on different noise.

    Where `rdpa` and `bema` are right they agree within a direction or so. Where they do not, the noise is of a kind
    that neither knows, and the answer is a misfit.
    """

    name: ClassVar[str] = "consensus"

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. The diagnostics hold the count of each member, per group."""
        eigenvalues = spectrum.eigenvalues.ravel()
        members = [rule(spectrum) for rule in (ParallelAnalysisRule(), BulkMatchingRule(), GapRule())]
        counts = {member.rule: member.count(eigenvalues) / spectrum.groups for member in members}
        middle = sorted(members, key=lambda member: counts[member.rule])[1]
        apart = abs(counts["rdpa"] - counts["bema"])
        disagree = apart > 2
        told = ", ".join(f"{name} {count:.3g}" for name, count in counts.items())
        return replace(
            middle,
            rule=self.name,
            misfit=middle.misfit or disagree,
            diagnostics=counts,
            remarks=(*middle.remarks, *([f"The rules disagree on the noise: {told}."] if disagree else [])),
        )
