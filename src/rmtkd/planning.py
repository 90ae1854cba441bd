"""From spectra to a plan: how wide every site stays, why, and what the model will then cost."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import nn

from rmtkd import spectra
from rmtkd.batches import Batch
from rmtkd.covariance import Covariance
from rmtkd.errors import DataError, OptionError, PlanError, check_choice
from rmtkd.measurement import count_flops, count_parameters
from rmtkd.sites import Site, by_width
from rmtkd.spectra import NoiseEdge
from rmtkd.surgery import fill_with_zeros, skeleton

FORMAT = 1
_NUMBER = r"(\d+\.?\d*|\.\d+)"


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """What is counted at one stream of a site: the eigenvalues of its centred covariance, pooled over heads.

    The Marchenko–Pastur law is the law of one covariance, and the 32 eigenvalues of one head make no histogram: the
    heads of a layer are pooled for the noise level, then each head is counted against the common edge.
    """

    eigenvalues: Float[np.ndarray, "groups width"]
    samples: int

    @property
    def q(self) -> float:
        """Aspect ratio of one group: width over samples."""
        return self.eigenvalues.shape[1] / self.samples


@dataclass(frozen=True, kw_only=True)
class Target:
    """The share, or number, of a cost that remains: `25%params`, `40%flops`, `5M`."""

    cost: Literal["params", "flops"]
    amount: float
    """At most this much: a fraction of the untouched model's cost if `is_share`, else a count."""
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read `25%params`, `40%flops`, `5M`, `800k`, `1200000` or `1,200,000`.

        Raises:
            OptionError: if the text is none of these, the share is not within (0, 100], or the number is below 1.
        """
        words = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.strip().lower())
        if share := re.fullmatch(rf"{_NUMBER}\s*%\s*([a-z]+)", words):
            amount = float(share[1]) / 100
            if not 0 < amount <= 1:
                raise OptionError(f"--target must leave more than 0 % and at most 100 %. Got {text!r}.")
            check_choice("the cost in --target", share[2], COSTS)
            return cls(cost="params" if share[2] == "params" else "flops", amount=amount, is_share=True)
        if number := re.fullmatch(rf"{_NUMBER}\s*([kmb]?)", words):
            amount = float(number[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[number[2]]
            if amount < 1:
                raise OptionError(f"--target must leave at least 1 parameter. Got {text!r}. A share is 25%params.")
            return cls(cost="params", amount=amount, is_share=False)
        raise OptionError(f"--target must be what remains, such as 25%params, 40%flops or 5M. Got {text!r}.")

    def limit(self, baseline: "Cost") -> float:
        """The largest count that meets the target."""
        return self.amount * baseline[self.cost] if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{self.amount * 100:.10g}%{self.cost}" if self.is_share else f"{self.amount:,.0f}"


Cost = Mapping[str, int]
"""`params` and `flops` of a model."""


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """What is done to one site, and why.

    Attributes:
        keep: width that stays, per group, from 1 to `width`.
        count: directions above the noise edge per group, before rounding and sharing (the mean over heads).
        samples: vectors that the spectrum was measured on.
        q: aspect ratio of the noise that was fitted; dead directions, if any, are set aside.
        sigma2: noise variance; for the rule `mp`, `edge` is `sigma2 (1 + √q)²`.
        edge: the noise edge of the rule, in units of the activations' variance.
        multiplier: the count was taken above this multiple of the edge.
        ks, fit_error, misfit: how well noise explains what lies below the edge, see `spectra.NoiseEdge`.
        margin: gap in the pooled spectrum: the smallest eigenvalue above the edge over the largest below it; None
            where there is no such pair.
        energy: share of the variance in the `keep` largest directions.
        why: one sentence.
    """

    name: str
    kind: str
    block: str
    shares: str
    width: int
    groups: int
    keep: int
    count: float
    rule: str
    samples: int
    q: float
    sigma2: float
    edge: float
    multiplier: float
    ks: float
    fit_error: float
    misfit: bool
    margin: float | None
    energy: float
    why: str
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.keep, int) and 1 <= self.keep <= self.width):
            raise PlanError(
                f"a site keeps a whole number from 1 to its width. {self.name} of width {self.width} was given "
                f"{self.keep!r}. Change it in the plan."
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """For every site the width that stays and the reason, and what the narrowed model will cost. A plain value."""

    model: str
    tau: float
    rule: str
    target: str | None
    multiplier: float
    sites: tuple[SitePlan, ...]
    baseline: dict[str, int]
    predicted: dict[str, int]
    remarks: tuple[str, ...] = ()
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        kept: dict[str, int] = {}
        for site in self.sites:
            if kept.setdefault(site.shares, site.keep) != site.keep:
                raise PlanError(
                    f"sites that share the width {site.shares} must keep the same. Got {kept[site.shares]} and "
                    f"{site.keep}. Give them one width in the plan."
                )

    @property
    def widths(self) -> dict[str, int]:
        """The kept width by site name."""
        return {site.name: site.keep for site in self.sites}

    def to_json(self) -> str:
        """The plan as JSON, read back by `from_json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: if the text is not a plan of a known format.
        """
        try:
            fields = json.loads(text)
            if fields["format"] != FORMAT:
                raise PlanError(f"a plan must have format {FORMAT}. Got {fields['format']!r}. Make it anew.")
            fields["sites"] = tuple(SitePlan(**{**site, "remarks": tuple(site["remarks"])}) for site in fields["sites"])
            return cls(**{**fields, "remarks": tuple(fields["remarks"])})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise PlanError(f"a plan must be the JSON that `rmtkd plan` writes. Reading it gave {error!r}.") from None

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        path.write_text(self.to_json() + "\n")


def spectra_of(moments: Mapping[str, Sequence[Covariance]]) -> dict[str, tuple[Spectrum, ...]]:
    """The spectrum of every stream of every site."""
    return {
        name: tuple(Spectrum(eigenvalues=m.eigenvalues().numpy(), samples=m.count) for m in streams)
        for name, streams in moments.items()
    }


def make_plan(
    model: nn.Module,
    sites: Sequence[Site],
    spectrums: Mapping[str, Sequence[Spectrum]],
    batch: Batch,
    *,
    rule: str = "mp",
    tau: float = 0.5,
    target: Target | None = None,
    multiple_of: int = 8,
    min_share: float = 0.0,
) -> Plan:
    """Choose the width of every site.

    Without a target a site keeps the directions above its noise edge. With one, all edges are raised or lowered by
    one common multiplier, the smallest that meets the target. An embedding stays whole where its two factors would
    have more parameters than it has.

    Args:
        model: the untouched model.
        sites: the sites that may be narrowed.
        spectrums: from `spectra_of`, for the same sites.
        batch: a batch whose FLOPs are counted.
        rule: name in `spectra.RULES`.
        tau: quantile that starts the noise level, in (0, 1); larger cuts more.
        target: what is to remain.
        multiple_of: kept widths are rounded up to multiples of this (hardware), never above the full width.
        min_share: no site keeps less than this share of its width (the method's ρ_min).

    Raises:
        PlanError: if the target cannot be met; the message says the minimum.
        OptionError: for an unknown rule or values out of range.
        DataError: if a width is dead, naming the site.
    """
    check_choice("rule", rule, spectra.RULES)
    if not 0 <= min_share <= 1:
        raise OptionError(f"min_share must be within [0, 1]. Got {min_share}.")
    if multiple_of < 1:
        raise OptionError(f"multiple_of must be at least 1. Got {multiple_of}.")
    edges = {site.name: _edges(site, spectrums[site.name], rule, tau) for site in sites}
    pays = {group[0].shares: _paying_width(model, group[0]) for group in by_width(sites).values()}

    def widths_at(multiplier: float) -> dict[str, int]:
        widths = {}
        for shares, group in by_width(sites).items():
            width = group[0].width
            wish = max(_count(spectrums[s.name], edges[s.name], multiplier) for s in group)
            # Shares are no binary fractions: 0.28 · 25 is a little above 7, and means 7.
            floor = max(multiple_of, min_share * width - 1e-9)
            rounded = multiple_of * math.ceil(max(wish, floor) / multiple_of)
            widths |= {site.name: rounded if rounded <= pays[shares] else width for site in group}
        return widths

    baseline = predict_cost(model, sites, {}, batch)
    multiplier = 1.0
    if target is not None:

        def cost_at(multiplier: float) -> int:
            return COSTS[target.cost](model, sites, widths_at(multiplier), batch)

        multiplier = _meet(target, baseline, cost_at, _critical(spectrums, edges))
    widths = widths_at(multiplier)
    return Plan(
        model=type(model).__name__,
        tau=tau,
        rule=rule,
        target=None if target is None else str(target),
        multiplier=multiplier,
        sites=tuple(
            _site_plan(site, spectrums[site.name], edges[site.name], multiplier, widths[site.name]) for site in sites
        ),
        baseline=baseline,
        predicted=predict_cost(model, sites, widths, batch),
    )


def predict_cost(model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], batch: Batch) -> dict[str, int]:
    """Parameters and FLOPs of the model at these widths, counted on its skeleton: exact, and no model is built."""
    return {name: count(model, sites, widths, batch) for name, count in COSTS.items()}


def _parameters(model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], batch: Batch) -> int:
    return count_parameters(skeleton(model, sites, widths))


def _flops(model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], batch: Batch) -> int:
    shape = skeleton(model, sites, widths)
    # Zeros in place of weights: a forward pass may look at values, which the meta device has none of.
    fill_with_zeros(shape, next(model.parameters()).device)
    return count_flops(shape, batch)


COSTS: Mapping[str, Callable[[nn.Module, Sequence[Site], Mapping[str, int], Batch], int]] = {
    "params": _parameters,
    "flops": _flops,
}
"""What a target can name, and how it is counted for given widths."""


def _edges(site: Site, spectrums: Sequence[Spectrum], rule: str, tau: float) -> tuple[NoiseEdge, ...]:
    try:
        return tuple(spectra.RULES[rule](s.eigenvalues.ravel(), q=s.q, tau=tau) for s in spectrums)
    except DataError as error:
        raise DataError(f"site {site.name}: {error}") from None


def _paying_width(model: nn.Module, site: Site) -> int:
    """The largest width below the full one at which the site has no more parameters than at full width."""
    if not site.factorizes:
        return site.width - 1
    rows = model.get_parameter(f"{site.factorizes}.weight").shape[0]
    # rows · k + k · width + width, of table, projection and its bias, against rows · width
    return min(site.width - 1, (rows - 1) * site.width // (rows + site.width))


def _count(spectrums: Sequence[Spectrum], edges: Sequence[NoiseEdge], multiplier: float) -> float:
    """Directions per group above the edge. A product carries no more directions than either of its streams."""
    return min(
        edge.count(spectrum.eigenvalues.ravel(), multiplier) / len(spectrum.eigenvalues)
        for spectrum, edge in zip(spectrums, edges, strict=True)
    )


def _critical(
    spectrums: Mapping[str, Sequence[Spectrum]], edges: Mapping[str, Sequence[NoiseEdge]]
) -> Float[np.ndarray, " candidates"]:
    """A multiplier between every two neighbouring steps of the counts, below the first and above the last, ascending.
    (At a step itself rounding would decide.)"""
    ratios = [
        spectrum.eigenvalues.ravel() / edge.edge
        for name in spectrums
        for spectrum, edge in zip(spectrums[name], edges[name], strict=True)
    ]
    steps = np.unique(np.concatenate(ratios))
    steps = steps[steps > 0]
    return np.concatenate([steps[:1] / 2, (steps[1:] + steps[:-1]) / 2, steps[-1:] * 2])


def _meet(
    target: Target,
    baseline: Cost,
    cost_at: Callable[[float], int],
    candidates: Float[np.ndarray, " candidates"],
) -> float:
    """The smallest multiplier whose widths meet the target: cost falls as the multiplier rises, so bisect.

    FLOPs need not fall everywhere, as a factorised embedding adds some. Whatever they do, the answer meets the target
    and the candidate before it does not.
    """
    limit = target.limit(baseline)
    least = cost_at(float(candidates[-1]))
    if least > limit:
        share = math.ceil(least / baseline[target.cost] * 1000) / 10  # rounded up: what is named can be met
        raise PlanError(
            f"the target must be at least {least:,} {target.cost} ({share:.1f}% of "
            f"{baseline[target.cost]:,}), which remain with every site at its least width. Got {limit:,.0f}. "
            "Raise the target, or lower multiple_of or min_share."
        )
    low, high = 0, len(candidates) - 1  # `high` meets the target
    while low < high:
        middle = (low + high) // 2
        if cost_at(float(candidates[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return float(candidates[high])


def _site_plan(
    site: Site, spectrums: Sequence[Spectrum], edges: Sequence[NoiseEdge], multiplier: float, keep: int
) -> SitePlan:
    count = _count(spectrums, edges, multiplier)
    # Of the two streams of a product the one with fewer directions decides, and is shown.
    shown = min(range(len(edges)), key=lambda i: _count(spectrums[i : i + 1], edges[i : i + 1], multiplier))
    spectrum, edge = spectrums[shown], edges[shown]
    pooled = np.sort(spectrum.eigenvalues.ravel())[::-1]
    above = edge.count(pooled, multiplier)
    has_gap = 0 < above < len(pooled) and pooled[above] > 0
    total = float(spectrum.eigenvalues.sum())
    return SitePlan(
        name=site.name,
        kind=site.kind,
        block=site.block,
        shares=site.shares,
        width=site.width,
        groups=site.groups,
        keep=keep,
        count=count,
        rule=edge.rule,
        samples=spectrum.samples,
        q=edge.q,
        sigma2=edge.sigma2,
        edge=edge.edge,
        multiplier=multiplier,
        ks=edge.ks,
        fit_error=edge.fit_error,
        misfit=edge.misfit,
        margin=float(pooled[above - 1] / pooled[above]) if has_gap else None,
        energy=min(1.0, float(spectrum.eigenvalues[:, :keep].sum()) / total),
        why=_why(site, count, keep, multiplier),
        remarks=edge.remarks,
    )


def _why(site: Site, count: float, keep: int, multiplier: float) -> str:
    directions = f"{count:.1f} a head" if site.groups > 1 else f"{count:.0f}"
    edge = "edge" if multiplier == 1 else f"{multiplier:.3g} × edge"
    if keep == site.width:
        paying = ", two factors would be larger" if site.factorizes else ""
        return f"{directions} above {edge}: whole{paying}"
    shared = f" of {site.shares}" if site.shares != site.name else ""
    return f"{directions} above {edge}, rounded up{shared}" if keep > count else f"{directions} above {edge}"
