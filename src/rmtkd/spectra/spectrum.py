"""What every spectral rule looks at, `Spectrum`, and what it answers, `NoiseEdge`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from rmtkd.errors import DataError
from rmtkd.spectra.anisotropic import AnisotropicMarchenkoPastur
from rmtkd.spectra.laws import check_positive

MISFIT_KS = 0.1
"""The distance above which no bulk was found of many eigenvalues: true noise of 50 or more stays well below."""
_UNSURE = 0.1  # relative error that is borne in a measured number of effective samples


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What is known of one stream of a site: the eigenvalues of its centred covariance, pooled over heads, and more.

    The laws of noise are laws of one covariance, and the 32 eigenvalues of one head make no histogram: the heads of a
    layer (the groups) are pooled. Heads differ in how loud their noise is, up to thirtyfold: rules that test for noise
    hold each head against a level of its own, and pool what is left.

    Args:
        eigenvalues: those of the covariance of each group, descending.
        samples: vectors that the covariance is of.
        variances: diagonal of each group's covariance; None if it was not kept.
        effective_samples: independent vectors that would scatter a covariance as much as these did; None if unknown,
            and then the samples are taken to be independent.
        replicate: eigenvalues of each group's symmetrised cross-covariance between two stochastic passes over the
            same inputs, (C + Cᵀ)/2; None without a second pass.

    Raises:
        DataError: if the arrays are not of one shape, groups × width, or if there are no samples.
    """

    eigenvalues: Float[np.ndarray, "groups width"]
    samples: int
    variances: Float[np.ndarray, "groups width"] | None = None
    effective_samples: float | None = None
    replicate: Float[np.ndarray, "groups width"] | None = None

    def __post_init__(self) -> None:
        shape = np.shape(self.eigenvalues)
        if len(shape) != 2:
            raise DataError(
                f"The eigenvalues of a spectrum must have shape [groups, width] — got {list(shape)} — "
                "pass eigenvalues[None] for a single group."
            )
        for name in ("variances", "replicate"):
            value = getattr(self, name)
            if value is not None and np.shape(value) != shape:
                raise DataError(
                    f"The {name} of a spectrum must have the shape of its eigenvalues, {list(shape)} — got "
                    f"{list(np.shape(value))} — pass those of the same groups, or None."
                )
        for name, count in (("samples", self.samples), ("effective_samples", self.effective_samples)):
            if count is not None and not 0 < count < math.inf:
                raise DataError(
                    f"The {name} of a spectrum must be above 0 and finite — got {count} — pass how many there were."
                )

    @cached_property
    def _answers(self) -> "dict[Rule, NoiseEdge]":
        return {}

    def edge(self, rule: "Rule") -> "NoiseEdge":
        """What a rule says of this spectrum; asked once, as plans for several targets ask again."""
        if rule not in self._answers:
            self._answers[rule] = rule(self)
        return self._answers[rule]

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.eigenvalues.shape[0]

    @property
    def width(self) -> int:
        """Dimensions of one group."""
        return self.eigenvalues.shape[1]

    @property
    def living(self) -> Bool[np.ndarray, " groups"]:
        """Which groups vary at all, but for rounding: a head may be dead."""
        tops = self.eigenvalues.max(axis=1)
        return tops > self.eigenvalues.size * np.finfo(np.float64).eps * tops.max(initial=0.0)

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
        edge: the threshold; eigenvalues above it count as signal. Of several groups the mean, where each has its own.
        fit_error: L2 distance between the histogram of the noise and the rule's law of it, on the support scaled to
            length one: scale-free, 0 for a perfect fit, below 0.1 for true noise of a few hundred dimensions,
            about 1 where hardly any lies on the support, more where it crowds into few bins.
        ks: Kolmogorov–Smirnov distance between the non-zero eigenvalues at or below `edge` and the law.
        misfit: whether the noise is not what the rule takes it to be, so that the edge is a convention: `ks` exceeds
            `most_ks`, of rules whose edge hangs on a law; or the members of `consensus` disagree.
        diagnostics: numbers of the rule's own, by name.
        remarks: what a reader must know, as plain sentences.
        levels: the edge of each group over `edge`; empty where one holds for all.
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
    levels: tuple[float, ...] = ()

    def levelled(self, eigenvalues: Float[np.ndarray, "*groups count"]) -> Float[np.ndarray, "*groups count"]:
        """Eigenvalues, each over the level of its group: those of all groups can be held against `edge`.

        Raises:
            DataError: if the groups have levels and the eigenvalues are not those of so many.
        """
        if not self.levels:
            return eigenvalues
        if eigenvalues.ndim != 2 or len(eigenvalues) != len(self.levels):
            raise DataError(
                f"Eigenvalues must be those of all {len(self.levels)} groups, as each has its own edge — got shape "
                f"{list(eigenvalues.shape)} — pass them as [groups, width]."
            )
        return eigenvalues / np.array(self.levels)[:, None]

    def count(self, eigenvalues: Float[np.ndarray, "*groups count"], multiplier: float = 1.0) -> int:
        """Number of eigenvalues strictly above `multiplier` times the edge of their group.

        Args:
            eigenvalues: those of all groups; or any, in any order, where there is one edge for all.
            multiplier: a margin on the edge, greater than one to keep less.

        Returns:
            The count.

        Raises:
            OptionError: if `multiplier` is not a positive finite number.
            DataError: see `levelled`.
        """
        check_positive("multiplier", multiplier)
        return int(np.count_nonzero(self.levelled(eigenvalues) > multiplier * self.edge))


@runtime_checkable
class Rule(Protocol):
    """Finds the edge of the noise in a spectrum.

    Every rule is scale-equivariant, deterministic, and indifferent to the order of the eigenvalues within a group.

    Attributes:
        name: what users call it.
        needs: fields of `Spectrum` without which it refuses.

    Raises:
        DataError: if the eigenvalues are not finite, negative, or all zero, or if the spectrum lacks what the rule
            needs.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def __call__(self, spectrum: Spectrum) -> NoiseEdge: ...


@dataclass(frozen=True, kw_only=True)
class Alive:
    """The part of a spectrum that is not zero, checked.

    Args:
        eigenvalues: positive, ascending, of all groups that are not dead.
        groups: how many these are.
        q: aspect ratio that belongs to them.
        q_eff: the same with effective samples.
        independent: how many of the eigenvalues as many independent vectors as there are effective samples would leave.
        remarks: what to say about zeros.
        is_rough: whether there are more eigenvalues than the law for `q_eff` promises.
    """

    eigenvalues: Float[np.ndarray, " alive"]
    groups: int
    q: float
    q_eff: float
    independent: int
    remarks: tuple[str, ...]
    is_rough: bool = False

    @property
    def effective(self) -> "Alive":
        """What the law for `q_eff` speaks of: where that is above 1, it leaves the other eigenvalues zero. Vectors that
        resemble each other make them small instead."""
        rank = len(self.eigenvalues)
        if self.independent == rank:
            return self
        is_rough, remarks = rank > (1 + _UNSURE) * self.independent, self.remarks
        if is_rough:
            remarks = (
                *remarks,
                f"There are fewer effective samples than dimensions, {rank} eigenvalues in place of "
                f"{self.independent}: σ² is rough, and too low.",
            )
        return replace(self, eigenvalues=self.eigenvalues[-self.independent :], remarks=remarks, is_rough=is_rough)


def alive(spectrum: Spectrum) -> Alive:
    """Set aside zero eigenvalues, which are no noise level, and dead groups.

    Those of dead, constant or dependent directions shrink q to the dimensions left, where vectors outnumber these.
    Those that the law itself promises for q > 1 (fewer vectors than dimensions, less one in each group, as they are
    centred) leave q unchanged; so do they q_eff, whose number of vectors is measured, and may be off by a tenth.

    Raises:
        DataError: if there are no eigenvalues, or if they are not finite, negative, or all zero.
    """
    _checked(spectrum.eigenvalues.ravel())
    living = spectrum.eigenvalues[spectrum.living]
    groups, eigenvalues, q = len(living), _checked(living.ravel()), spectrum.q
    total, largest = len(eigenvalues), float(eigenvalues[-1])
    rank = int(np.count_nonzero(eigenvalues > total * np.finfo(np.float64).eps * largest))
    full = groups * min(spectrum.width, spectrum.samples)
    # Where the law promises zeros, what float32 vectors leave in their place is rounding, not noise.
    if rank > full and eigenvalues[total - full - 1] <= total * np.finfo(np.float32).eps * largest:
        rank = full
    effective = groups * spectrum.width / spectrum.q_eff  # of all groups
    lacks_vectors = rank >= groups * min(spectrum.width, spectrum.samples - 1)
    lacks_effective = lacks_vectors or abs(rank - effective) <= _UNSURE * effective + groups
    share = 1.0 if lacks_vectors else rank / total
    remarks = []
    if groups < spectrum.groups:
        remarks.append(f"{spectrum.groups - groups} of {spectrum.groups} groups are dead and set aside.")
    if q > 1:
        remarks.append(f"With q = {q:.3g} there are fewer vectors than dimensions: only {rank} eigenvalues tell.")
    if not lacks_vectors:
        remarks.append(
            f"{total - rank} of {total} eigenvalues are zero (dead, constant or dependent directions) and "
            f"set aside: q is {share * q:.3g} instead of {q:.3g}."
        )
    return Alive(
        eigenvalues=eigenvalues[total - rank :],
        groups=groups,
        q=share * q,
        q_eff=spectrum.q_eff if lacks_effective else rank / total * spectrum.q_eff,
        independent=min(rank, max(1, round(effective))),
        remarks=tuple(remarks),
    )


@runtime_checkable
class Law(Protocol):
    """A law of the eigenvalues of noise: its cumulative distribution function, and the inverse of it."""

    def cdf(self, x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]: ...

    def ppf(self, p: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]: ...


def kolmogorov_smirnov(values: Float[np.ndarray, " count"], law: Law) -> float:
    """Largest distance between the empirical cdf of ascending `values` and `law`; 1 if there are none."""
    if len(values) == 0:
        return 1.0
    steps, cdf = np.arange(len(values) + 1) / len(values), law.cdf(values)
    return float(max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1])))


def most_ks(count: int) -> float:
    """The Kolmogorov–Smirnov distance up to which so many eigenvalues below an edge may be noise.

    Few lie further from their law: of 300 draws of white noise of d directions, from 20 d vectors each, nineteen of
    twenty stay within 1.9, 2.1, 2.3, 2.4 and 2.8 over their number at d = 8, 12, 16, 24 and 32, by `mp`, which fits
    least closely. So 2.6 over their number is borne, and half at most. What is no noise is told less often, too, the
    fewer there are: of power laws of 8 and 12 directions about half, of 16 nearly all.
    """
    return max(MISFIT_KS, min(0.5, 2.6 / max(count, 1)))


def histogram_error(values: Float[np.ndarray, " count"], law: Law, bins: int = 20) -> float:
    """L2 distance between the histogram of `values` and `law`, on the support of the law scaled to length one."""
    if len(values) == 0:
        return 1.0
    bins = min(bins, max(1, len(values) // 8))
    edges = np.linspace(law.ppf(np.zeros(())), law.ppf(np.ones(())), bins + 1)
    shares = np.histogram(values, edges)[0] / len(values)
    return float(np.sqrt(bins * np.sum((shares - np.diff(law.cdf(edges))) ** 2)))


def fitted_scale(values: Float[np.ndarray, " count"], law: Law, trim: float = 0.2) -> float:
    """The factor by which the quantiles of `law` fit the middle of ascending `values` best, in least squares.

    Args:
        values: eigenvalues; the share `trim` at either end is left out, where signal and small directions are.
        law: of the same shape, and any scale.
        trim: share left out at either end.

    Reference:
        Z. T. Ke, Y. Ma, X. Lin, "Estimation of the number of spiked eigenvalues in a covariance matrix by bulk
        eigenvalue matching analysis", J. Am. Stat. Assoc. 118 (2023) 374–392.
    """
    middle = slice(int(trim * len(values)), max(1, math.ceil((1 - trim) * len(values))))
    expected = law.ppf((np.arange(len(values))[middle] + 0.5) / len(values))
    return float(expected @ values[middle] / (expected @ expected))


def answer(
    rule: str,
    found: Alive,
    law: Law,
    edge: float,
    *,
    sigma2: float,
    scale: float = 1.0,
    assumes: bool = True,
    diagnostics: Mapping[str, float] | None = None,
    remarks: Sequence[str] = (),
    levels: Sequence[float] = (),
) -> NoiseEdge:
    """The answer of a rule, with what its law of the noise says of the eigenvalues at or below the edge.

    Args:
        rule: its name.
        found: what it looked at, each group over its level.
        law: of the noise divided by `scale`.
        edge: the threshold.
        sigma2: noise variance.
        scale: what eigenvalues are divided by before they are held against the law.
        assumes: whether the edge hangs on the law, so that a misfit is the rule's.
        diagnostics, remarks: the rule's own.
        levels: see `NoiseEdge`.
    """
    noise = found.eigenvalues[found.eigenvalues <= edge] / scale
    ks = kolmogorov_smirnov(noise, law)
    misfit = assumes and ks > most_ks(len(noise))
    return NoiseEdge(
        rule=rule,
        q=found.q,
        q_eff=found.q_eff,
        sigma2=sigma2,
        edge=edge,
        fit_error=histogram_error(noise, law),
        ks=ks,
        misfit=misfit or (assumes and found.is_rough),
        diagnostics=dict(diagnostics or {}),
        remarks=(*found.remarks, *remarks, *([f"No bulk fits, KS {ks:.2f}."] if misfit else [])),
        levels=tuple(levels),
    )


def white_noise(found: Alive) -> Law:
    """The law of the non-zero eigenvalues of noise of variance one in every direction."""
    return AnisotropicMarchenkoPastur(variances=np.ones(1), q=found.q_eff)


def against_white_noise(rule: str, found: Alive, edge: float, **told: Any) -> NoiseEdge:
    """`answer` of a rule that has no law of its own: white noise with the variance of the middle of the spectrum."""
    found = found.effective
    law, sigma2 = white_noise(found), white_variance(found)
    return answer(rule, found, law, edge, sigma2=sigma2, scale=sigma2, **told)


def white_variance(found: Alive) -> float:
    """σ² of white noise of which the middle of the spectrum is."""
    return fitted_scale(found.effective.eigenvalues, white_noise(found))


def divided(spectrum: Spectrum, levels: Sequence[float]) -> Spectrum:
    """Every group over its level; the spectrum itself where there are none."""
    if not levels:
        return spectrum
    by = np.array(levels)[:, None]
    variances = None if spectrum.variances is None else spectrum.variances / by
    return replace(spectrum, eigenvalues=spectrum.eigenvalues / by, variances=variances, replicate=None)


def noise_levels(spectrum: Spectrum) -> tuple[float, ...]:
    """How loud the noise of each group is, relative to their mean: by the middle of its own eigenvalues, as if it were
    white. None for a single group; 1 for a dead one."""
    if spectrum.groups == 1:
        return ()
    plain = replace(spectrum, variances=None, replicate=None)
    return relative_levels(
        [
            white_variance(alive(replace(plain, eigenvalues=own[None]))) if lives else 0.0
            for own, lives in zip(spectrum.eigenvalues, spectrum.living, strict=True)
        ]
    )


def relative_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Levels of groups over the mean of those that are not dead (zero), which get 1; none for a single group."""
    mean = sum(levels) / max(1, sum(level > 0 for level in levels))
    return tuple(level / mean if level > 0 else 1.0 for level in levels) if len(levels) > 1 else ()


def edge_below(descending: Float[np.ndarray, " count"], count: int) -> float:
    """An edge that just so many of these eigenvalues lie above; fewer, if the last equals the next."""
    return float(np.concatenate([[2 * descending[0]], descending, [0.0]])[count : count + 2].mean())


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
            "Some eigenvalue must be positive — got only zeros — the width is dead on these data: there is no noise."
        )
    return ascending
