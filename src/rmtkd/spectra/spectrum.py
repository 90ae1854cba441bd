"""What every spectral rule looks at, `Spectrum`, and what it answers, `NoiseEdge`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from rmtkd.errors import DataError
from rmtkd.spectra.laws import check_positive

MISFIT_KS = 0.1
"""The distance above which no bulk was found: true noise of 50 eigenvalues or more stays well below."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What is known of one stream of a site: the eigenvalues of its centred covariance, pooled over heads, and more.

    The laws of noise are laws of one covariance, and the 32 eigenvalues of one head make no histogram: the heads of a
    layer (the groups) are pooled for the noise level, then each head is counted against the common edge.

    Args:
        eigenvalues: those of the covariance of each group, descending.
        samples: vectors that the covariance is of.
        variances: diagonal of each group's covariance; None if it was not kept.
        effective_samples: independent vectors that would scatter a covariance as much as these did; None if unknown,
            and then the samples are taken to be independent.
        replicate: eigenvalues of each group's symmetrised cross-covariance between two stochastic passes over the
            same inputs, (C + Cᵀ)/2; None without a second pass.
    """

    eigenvalues: Float[np.ndarray, "groups width"]
    samples: int
    variances: Float[np.ndarray, "groups width"] | None = None
    effective_samples: float | None = None
    replicate: Float[np.ndarray, "groups width"] | None = None

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.eigenvalues.shape[0]

    @property
    def width(self) -> int:
        """Dimensions of one group."""
        return self.eigenvalues.shape[1]

    @property
    def q(self) -> float:
        """Aspect ratio of one group: width over samples."""
        return self.width / self.samples

    @property
    def q_eff(self) -> float:
        """Width over effective samples; `q` where these are unknown."""
        return self.q if self.effective_samples is None else self.width / self.effective_samples


@dataclass(frozen=True, kw_only=True)
class NoiseEdge:
    """Where a rule says that the noise ends, and how well noise explains what lies below.

    Args:
        rule: name of the rule, a key of `RULES`.
        q: aspect ratio of the noise; smaller than the spectrum's if zero directions were set aside.
        q_eff: the same with effective samples.
        sigma2: noise variance σ².
        edge: the threshold; eigenvalues above it count as signal.
        fit_error: L2 distance between the histogram of the noise and the rule's law of it, on the support scaled to
            length one: scale-free, 0 for a perfect fit, about 0.1 for true noise of a few hundred dimensions, 1 or
            more for none.
        ks: Kolmogorov–Smirnov distance between the non-zero eigenvalues at or below `edge` and the law.
        misfit: whether `ks` exceeds 0.1, i.e. no bulk was found and the edge is a convention.
        diagnostics: numbers of the rule's own, by name.
        remarks: what a reader must know, as plain sentences.
    """

    rule: str
    q: float
    q_eff: float
    sigma2: float
    edge: float
    fit_error: float
    ks: float
    misfit: bool
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def count(self, eigenvalues: Float[np.ndarray, " count"], multiplier: float = 1.0) -> int:
        """Number of eigenvalues strictly above `multiplier` times the edge.

        Args:
            eigenvalues: a spectrum, in any order; for pooled groups, that of one group.
            multiplier: a margin on the edge, greater than one to keep less.

        Returns:
            The count.

        Raises:
            OptionError: if `multiplier` is not a positive finite number.
        """
        check_positive("multiplier", multiplier)
        return int(np.count_nonzero(eigenvalues > multiplier * self.edge))


@runtime_checkable
class Rule(Protocol):
    """Finds the edge of the noise in a spectrum.

    Every rule is scale-equivariant, deterministic, and indifferent to the order of the eigenvalues within a group.

    Raises:
        DataError: if the eigenvalues are not finite, negative, or all zero, or if the spectrum lacks what the rule
            needs.
    """

    def __call__(self, spectrum: Spectrum) -> NoiseEdge: ...


@dataclass(frozen=True, kw_only=True)
class Alive:
    """The part of a spectrum that is not zero, checked.

    Args:
        eigenvalues: positive, ascending, of all groups.
        q: aspect ratio that belongs to them.
        q_eff: the same with effective samples.
        remarks: what to say about zeros.
    """

    eigenvalues: Float[np.ndarray, " alive"]
    q: float
    q_eff: float
    remarks: tuple[str, ...]


def alive(spectrum: Spectrum) -> Alive:
    """Set aside zero eigenvalues, which are no noise level.

    Those of dead, constant or dependent directions shrink q to the dimensions left. Those that the law itself promises
    for q > 1 (fewer vectors than dimensions, less one if centred) leave q unchanged.

    Raises:
        DataError: if there are no eigenvalues, or if they are not finite, negative, or all zero.
    """
    eigenvalues, q = _checked(spectrum.eigenvalues.ravel()), spectrum.q
    total, largest = len(eigenvalues), float(eigenvalues[-1])
    rank = int(np.count_nonzero(eigenvalues > total * np.finfo(np.float64).eps * largest))
    full = spectrum.groups * min(spectrum.width, spectrum.samples)
    # Where the law promises zeros, what float32 vectors leave in their place is rounding, not noise.
    if rank > full and eigenvalues[total - full - 1] <= total * np.finfo(np.float32).eps * largest:
        rank = full
    remarks, share = [], 1.0
    if q > 1:
        remarks.append(f"With q = {q:.3g} there are fewer vectors than dimensions: only {rank} eigenvalues tell.")
    # Centring costs one vector (per group, hence the 2 %): that is no dead direction.
    if rank < (total if q <= 1 else 0.98 * full - 1):
        share = rank / total
        remarks.append(
            f"{total - rank} of {total} eigenvalues are zero (dead, constant or dependent directions) and "
            f"set aside: q is {share * q:.3g} instead of {q:.3g}."
        )
    return Alive(
        eigenvalues=eigenvalues[total - rank :], q=share * q, q_eff=share * spectrum.q_eff, remarks=tuple(remarks)
    )


@runtime_checkable
class Law(Protocol):
    """A law of the eigenvalues of noise: its cumulative distribution function."""

    def cdf(self, x: Float[np.ndarray, " count"]) -> Float[np.ndarray, " count"]: ...


def kolmogorov_smirnov(values: Float[np.ndarray, " count"], law: Law) -> float:
    """Largest distance between the empirical cdf of ascending `values` and `law`; 1 if there are none."""
    if len(values) == 0:
        return 1.0
    steps, cdf = np.arange(len(values) + 1) / len(values), law.cdf(values)
    return float(max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1])))


def _checked(eigenvalues: Float[np.ndarray, " count"]) -> Float[np.ndarray, " count"]:
    """`eigenvalues` in float64, ascending."""
    if len(eigenvalues) == 0:
        raise DataError("A spectrum must hold at least one eigenvalue — got none — pass the eigenvalues.")
    if not np.all(np.isfinite(eigenvalues)):
        bad = np.count_nonzero(~np.isfinite(eigenvalues))
        raise DataError(f"Eigenvalues must be finite — got {bad} NaN or infinite — check the vectors behind them.")
    ascending = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    if ascending[0] < -1e-6 * abs(ascending[-1]):
        raise DataError(
            f"Eigenvalues of a covariance must not be negative — got {ascending[0]:.3g} — pass the spectrum "
            "of a covariance."
        )
    if ascending[-1] <= 0:
        raise DataError(
            "Some eigenvalue must be positive — got only zeros — the width is dead on these data: leave it alone."
        )
    return ascending
