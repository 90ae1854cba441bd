"""From spectra to a plan: how wide every site stays, why, and what the model will then cost."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import nn

from rmtkd import spectra
from rmtkd.batches import Batch
from rmtkd.covariance import Covariance
from rmtkd.errors import OptionError, PlanError, check_choice
from rmtkd.measurement import count_flops, count_parameters
from rmtkd.sites import Site, by_width
from rmtkd.spectra import NoiseEdge
from rmtkd.surgery import fill_with_zeros, skeleton

FORMAT = 1


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
        """Read `25%params`, `40%flops`, `5M`, `800k` or `1200000`.

        Raises:
            OptionError: if the text is none of these, or the share is not within (0, 100].
        """
        if share := re.fullmatch(r"([\d.]+)\s*%\s*([a-z]+)", text.strip().lower()):
            amount = float(share[1]) / 100
            if not 0 < amount <= 1:
                raise OptionError(f"--target must leave more than 0 % and at most 100 %. Got {text!r}.")
            cost = check_choice("the cost in --target", share[2], ("params", "flops"))
            return cls(cost=cost, amount=amount, is_share=True)  # type: ignore[arg-type]
        if number := re.fullmatch(r"([\d.]+)\s*([kmb]?)", text.strip().lower()):
            amount = float(number[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[number[2]]
            return cls(cost="params", amount=amount, is_share=False)
        raise OptionError(f"--target must be what remains, such as 25%params, 40%flops or 5M. Got {text!r}.")

    def limit(self, baseline: "Cost") -> float:
        """The largest count that meets the target."""
        return self.amount * baseline[self.cost] if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{self.amount:.4g} of {self.cost}" if self.is_share else f"{self.amount:,.0f} {self.cost}"


Cost = Mapping[str, int]
"""`params` and `flops` of a model."""


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """What is done to one site, and why.

    Attributes:
        keep: width that stays, per group.
        count: directions above the noise edge per group, before rounding and sharing (the mean over heads).
        edge: the noise edge of the rule, in units of the activations' variance.
        multiplier: the count was taken above this multiple of the edge.
        margin: gap in the pooled spectrum: the smallest kept over the largest dropped eigenvalue.
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
    margin: float
    energy: float
    why: str
    remarks: tuple[str, ...] = ()


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
        except (KeyError, TypeError, json.JSONDecodeError) as error:
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
    one common multiplier, the smallest that meets the target.

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
    """
    check_choice("rule", rule, spectra.RULES)
    if not 0 <= min_share <= 1:
        raise OptionError(f"min_share must be within [0, 1]. Got {min_share}.")
    if multiple_of < 1:
        raise OptionError(f"multiple_of must be at least 1. Got {multiple_of}.")
    edges = {
        site.name: tuple(spectra.RULES[rule](s.eigenvalues.ravel(), q=s.q, tau=tau) for s in spectrums[site.name])
        for site in sites
    }

    def widths_at(multiplier: float) -> dict[str, int]:
        widths = {}
        for group in by_width(sites).values():
            wish = max(_count(spectrums[s.name], edges[s.name], multiplier) for s in group)
            floor = max(multiple_of, min_share * group[0].width)
            rounded = multiple_of * math.ceil(max(wish, floor) / multiple_of)
            widths |= {site.name: min(rounded, group[0].width) for site in group}
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


def _count(spectrums: Sequence[Spectrum], edges: Sequence[NoiseEdge], multiplier: float) -> float:
    """Directions per group above the edge. A product carries no more directions than either of its streams."""
    return min(
        edge.count(spectrum.eigenvalues.ravel(), multiplier) / len(spectrum.eigenvalues)
        for spectrum, edge in zip(spectrums, edges, strict=True)
    )


def _critical(
    spectrums: Mapping[str, Sequence[Spectrum]], edges: Mapping[str, Sequence[NoiseEdge]]
) -> Float[np.ndarray, " candidates"]:
    """Every multiplier at which a count changes, ascending."""
    ratios = [
        spectrum.eigenvalues.ravel() / edge.edge
        for name in spectrums
        for spectrum, edge in zip(spectrums[name], edges[name], strict=True)
    ]
    return np.unique(np.concatenate([[0.0], *ratios]))


def _meet(
    target: Target,
    baseline: Cost,
    cost_at: Callable[[float], int],
    candidates: Float[np.ndarray, " candidates"],
) -> float:
    """The smallest multiplier whose widths meet the target: cost falls as the multiplier rises, so bisect."""
    limit = target.limit(baseline)
    least = cost_at(float(candidates[-1]))
    if least > limit:
        raise PlanError(
            f"the target must be at least {least:,} {target.cost} ({least / baseline[target.cost]:.1%} of "
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
    margin = float(pooled[above - 1] / pooled[above]) if 0 < above < len(pooled) and pooled[above] > 0 else math.inf
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
        q=spectrum.q,
        sigma2=edge.sigma2,
        edge=edge.edge,
        multiplier=multiplier,
        ks=edge.ks,
        fit_error=edge.fit_error,
        misfit=edge.misfit,
        margin=margin if math.isfinite(margin) else 0.0,
        energy=float(spectrum.eigenvalues[:, :keep].sum()) / total if total > 0 else 1.0,
        why=_why(site, count, keep, multiplier),
        remarks=edge.remarks,
    )


def _why(site: Site, count: float, keep: int, multiplier: float) -> str:
    directions = f"{count:.1f} a head" if site.groups > 1 else f"{count:.0f}"
    edge = "edge" if multiplier == 1 else f"{multiplier:.3g} × edge"
    if keep == site.width:
        return f"{directions} above {edge}: whole"
    shared = f" of {site.shares}" if site.shares != site.name else ""
    return f"{directions} above {edge}, rounded up{shared}" if keep > count else f"{directions} above {edge}"
