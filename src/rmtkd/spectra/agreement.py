"""Rules that see different things in a spectrum, and what they agree on."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from rmtkd.spectra.matching import BulkMatchingRule
from rmtkd.spectra.parallel import ParallelAnalysisRule
from rmtkd.spectra.spectrum import (
    Alive,
    NoiseEdge,
    Spectrum,
    against_white_noise,
    alive,
    divided,
    edge_below,
    noise_levels,
)
from rmtkd.spectra.tracy_widom import tracy_widom_quantile


@dataclass(frozen=True, kw_only=True)
class GapRule:
    """`gap`: the last eigenvalue that stands further above the next than noise would.

    At the edge of noise of any correlation eigenvalues fall about like a line in rank^(2/3) (Onatski 2010): a gap of
    more than twice the slope of five eigenvalues below the signal is rarely made by noise. Zeros are set aside. Signal
    that blends into the noise is missed.

    Reference:
        A. Onatski, "Determining the number of factors from empirical distribution of eigenvalues", Rev. Econ. Stat. 92
        (2010) 1004–1016.
    """

    name: ClassVar[str] = "gap"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. Groups, each over its own level, are averaged rank by rank."""
        levels = noise_levels(spectrum)
        level = divided(spectrum, levels)
        found = alive(level)
        descending = _mean_spectrum(level, found)
        edge = edge_below(descending, _last_gap(descending))
        return against_white_noise(self.name, found, edge, assumes=False, levels=levels)


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
        wide = np.flatnonzero(gaps > 2 * abs(slope))
        previous, count = count, int(wide[-1]) + 1 if len(wide) else 0
        if count == previous:
            break
    return count


@dataclass(frozen=True, kw_only=True)
class ConsensusRule:
    """`consensus`: the middle one of `rdpa`, `bema` and `gap`, cut back to where the spectrum steps down.

    The three fail on different noise, but all of them fail where noise is correlated across coordinates and falls like
    a power law: its largest directions lie above the edge of any noise of the same variances, or fitted to the middle.
    They go on smoothly from what lies below, though, as signal does not. So of the directions that the middle rule
    counts those are kept that end in a step: the last one from the top that lies further above the directions below it
    than the edge of noise would (`last_step`). Where there is no step at all, nothing is counted.

    Where `rdpa` and `bema` are right they agree within a direction or so, and end in a step. Where they do not, the
    noise is of a kind that they do not know, and the answer is a misfit.
    """

    name: ClassVar[str] = "consensus"
    needs: ClassVar[frozenset[str]] = frozenset({"variances"})

    def __call__(self, spectrum: Spectrum) -> NoiseEdge:
        """See `Rule`. The diagnostics hold the count of each member, per living group."""
        members = [rule(spectrum) for rule in (ParallelAnalysisRule(), BulkMatchingRule(), GapRule())]
        living = int(spectrum.living.sum())
        counts = {member.rule: member.count(spectrum.eigenvalues) / living for member in members}
        middle = sorted(members, key=lambda member: counts[member.rule])[1]
        edge, levels, remarks = middle.edge, middle.levels, []
        bound, own = counts[middle.rule], noise_levels(spectrum)
        level = divided(spectrum, own)
        descending = _mean_spectrum(level, alive(level))
        if (count := last_step(descending, math.ceil(bound))) < math.ceil(bound):
            edge, levels = edge_below(descending, count), own
            remarks.append(f"Of {bound:.3g} directions above the middle edge only {count} end in a step.")
        if abs(counts["rdpa"] - counts["bema"]) > 2:
            told = ", ".join(f"{name} {count:.3g}" for name, count in counts.items())
            remarks.append(f"The rules disagree on the noise: {told}.")
        return replace(
            middle,
            rule=self.name,
            edge=edge,
            levels=levels,
            misfit=middle.misfit or bool(remarks),
            diagnostics=counts,
            remarks=(*middle.remarks, *remarks),
        )


def last_step(descending: Float[np.ndarray, " width"], bound: int, window: int = 24) -> int:
    """Directions down to the last one, among the first `bound`, that lies above the edge of those below it.

    Near the edge μ of noise of any correlation log λ_j ≈ log μ − s (3π j/2)^(2/3) (zeros of the Airy function), and the
    largest fluctuates by s times a Tracy–Widom variable. Both are regressed from the next `window` eigenvalues; a
    direction ends in a step if it lies above the 99 % quantile. Of fewer than 20 directions nothing is said: the bound.
    """
    logs = np.log(descending)
    window = min(window, len(logs) // 4)
    if window < 5:
        return bound
    root = (1.5 * np.pi * np.arange(1, window + 1)) ** (2 / 3)
    for count in range(min(bound, len(logs) - window), 0, -1):
        slope, edge = np.polyfit(root, logs[count : count + window], 1)
        if logs[count - 1] > edge - tracy_widom_quantile(0.99) * slope:
            return count
    return 0


def _mean_spectrum(spectrum: Spectrum, found: Alive) -> Float[np.ndarray, " alive"]:
    """The living groups averaged rank by rank, descending; as many as are not zero in their mean."""
    rank = math.ceil(len(found.eigenvalues) / found.groups)
    return np.sort(spectrum.eigenvalues[spectrum.living], axis=1)[:, ::-1][:, :rank].mean(axis=0)
