"""Where widths are chosen: noise edges of all sites, one multiplier that meets the target, the reasons in words."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rmtkd import spectra
from rmtkd.errors import DataError, OptionError, PlanError, check_choice
from rmtkd.planning.budget import Curve, allocate
from rmtkd.planning.costs import LATENCY, Amount, Cost, CostTable, Target, shown, word
from rmtkd.planning.latency import LatencyTable
from rmtkd.planning.plan import Plan, SitePlan
from rmtkd.sites import Site, by_width
from rmtkd.spectra import NoiseEdge, Spectrum

Count = Callable[[str, Mapping[str, int]], Amount]
"""A cost, by name, at these widths of sites; full where a site is missing."""


MAX_LOSS = 0.05
"""Sum of held-out losses, in nats, up to which a guarded plan without a target narrows."""
PAIRS = "Each convolution that is cut becomes two"
"""How the remark begins that says on which side of them the 1 × 1 is."""
ON_CALIBRATION = "Losses were measured on calibration rows"
"""How the remark begins that says so where no other rows were given."""
FINENESS = 1 / 16
"""Between two widths that a budget considers, relative to the smaller one."""


class Desk:
    """Where widths are chosen: sites, their spectra and edges, and a way to count costs.

    With measured losses (`curves`, by shared width) the budget is divided by what each width costs in held-out loss;
    without, all sites have a common multiple of their edges.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        spectrums: Mapping[str, Sequence[Spectrum]],
        count: Count,
        baseline: Cost,
        *,
        rule: str,
        tau: float,
        multiple_of: int,
        min_share: float,
        uniform: bool = False,
        max_loss: float = MAX_LOSS,
        curves: Mapping[str, Curve] | None = None,
        latency: LatencyTable | None = None,
    ):
        check_choice("rule", rule, spectra.RULES)
        if not 0 <= min_share <= 1:
            raise OptionError(f"min_share must be within [0, 1]. Got {min_share}.")
        if multiple_of < 1:
            raise OptionError(f"multiple_of must be at least 1. Got {multiple_of}.")
        if not 0 < tau < 1:
            raise OptionError(f"tau must be within (0, 1). Got {tau}.")
        if not 0 < max_loss < math.inf:
            raise OptionError(f"max_loss must be greater than 0. Got {max_loss}.")
        self.sites, self.spectrums, self.count, self.baseline = sites, spectrums, count, dict(baseline)
        self.rule, self.tau, self.multiple_of, self.min_share = rule, tau, multiple_of, min_share
        self.uniform, self.latency = uniform, latency
        self.max_loss, self.curves = max_loss, curves
        self.groups = by_width(sites)
        self.edges: dict[str, tuple[NoiseEdge, ...]] = {}
        self.pays = {shares: self._paying_width(group) for shares, group in self.groups.items()}

    def plan(self, model: str, target: Target | None, fixed: dict[str, int], costs: CostTable | None) -> Plan:
        """Choose the widths: by their losses where these are known, else by a common multiple of the edges."""
        self._find_edges()
        multiplier = 1.0
        if self.curves is not None:
            widths = self._widths_by_loss(self.curves, target, fixed)
        else:
            if target is not None:
                multiplier = _meet(
                    lambda multiplier: self.count(target.cost, self.widths_at(multiplier, fixed)),
                    self._candidates(fixed),
                    target.limit(self.baseline),
                    lambda least: self._unreachable(target, fixed, least),
                )
            widths = self.widths_at(multiplier, fixed)
        return self.write(model, target, fixed, costs, multiplier, widths, widths)

    def _widths_by_loss(
        self, curves: Mapping[str, Curve], target: Target | None, fixed: Mapping[str, int]
    ) -> dict[str, int]:
        """The widths that lose least within the target; without one, that save most within the largest loss."""
        allowed = {
            shares: [fixed[shares]] if shares in fixed else self._choices(shares, curves[shares])
            for shares in self.groups
        }

        def cost(shared: Mapping[str, int]) -> Amount:
            return self.count(target.cost if target else "params", self._by_site(shared))

        limit = None if target is None else target.limit(self.baseline)
        shared = allocate(curves, allowed, cost, limit=limit, most_loss=self.max_loss)
        if limit is not None and target is not None and (least := cost(shared)) > limit:
            raise self._unreachable(target, fixed, least)
        return self._by_site(shared)

    def _choices(self, shares: str, curve: Curve) -> list[int]:
        """Widths that a shared width may be given, ascending: none below those that were measured, zero if it was,
        then multiples at distances that grow with the width, and the full one."""
        width, keep = self.groups[shares][0].width, self._rounded(shares, curve.least)
        found = {0} if curve.least == 0 and self.min_share == 0 else set()
        while keep <= min(self.pays[shares], width):
            found.add(keep)
            keep = self._rounded(shares, keep * (1 + FINENESS) + 1e-9)
        return sorted(found | {width})

    def _by_site(self, shared: Mapping[str, int]) -> dict[str, int]:
        return {site.name: shared[shares] for shares, group in self.groups.items() for site in group}

    def write(
        self,
        model: str,
        target: Target | None,
        fixed: dict[str, int],
        costs: CostTable | None,
        multiplier: float,
        widths: Mapping[str, int],
        planned: Mapping[str, int],
        loss: float | None = None,
    ) -> Plan:
        """The plan of these widths, its numbers derived from the spectra and counted costs."""
        self._find_edges()
        predicted = {cost: self.count(cost, widths) for cost in self.baseline}
        return Plan(
            model=model,
            target=None if target is None else str(target),
            rule=self.rule,
            tau=self.tau,
            multiple_of=self.multiple_of,
            min_share=self.min_share,
            uniform=self.uniform,
            policy="paper" if self.curves is None else "guarded",
            max_loss=self.max_loss,
            fixed=fixed,
            multiplier=multiplier,
            sites=tuple(
                self._site_plan(site, fixed, multiplier, widths[site.name], planned[site.name]) for site in self.sites
            ),
            baseline=self.baseline,
            predicted=predicted,
            remarks=tuple(self._remarks(target, fixed, widths, predicted)),
            costs=costs,
            curves=None if self.curves is None else dict(self.curves),
            loss=loss,
            latency=self.latency,
        )

    def widths_at(self, multiplier: float, fixed: Mapping[str, int]) -> dict[str, int]:
        """The width of every site where the edges are multiplied by this."""
        widths = {}
        for shares, group in self.groups.items():
            width = group[0].width
            if shares in fixed:
                keep = fixed[shares]
            elif not all(_is_counted(site) for site in group):
                keep = width
            else:
                rounded = self._rounded(shares, max(self._count_above(site, multiplier) for site in group))
                keep = rounded if rounded <= self.pays[shares] else width
            widths |= {site.name: keep for site in group}
        return widths

    def _rounded(self, shares: str, wish: float | int) -> int:
        """The multiple that a wish is rounded up to, at least the floor. Heads are counted one by one."""
        site = self.groups[shares][0]
        multiple = self.multiple_of if _is_counted(site) else 1
        # Shares are no binary fractions: 0.28 · 25 is a little above 7, and means 7.
        floor = max(multiple, site.least, self.min_share * site.width - 1e-9)
        return multiple * math.ceil(max(wish, floor) / multiple)

    def _find_edges(self) -> None:
        for site in self.sites:
            if site.name not in self.edges:
                self.edges[site.name] = tuple(
                    _no_edge(self.rule, spectrum, "The number of heads is not counted by an edge.", misfit=False)
                    if not _is_counted(site)
                    else _edge(site, spectrum, self.rule, self.tau)
                    for spectrum in self.spectrums[site.name]
                )

    def _pairs(self, name: str) -> list[tuple[Spectrum, NoiseEdge]]:
        return list(zip(self.spectrums[name], self.edges[name], strict=True))

    def _candidates(self, fixed: Mapping[str, int]) -> Float[np.ndarray, " candidates"]:
        """The multipliers that lead to different widths, ascending; at the last one every free site is at its least."""
        free = [site.name for site in self.sites if site.shares not in fixed and _is_counted(site)]
        return _critical([pair for name in free for pair in self._pairs(name)])

    def _count_above(self, site: Site, multiplier: float) -> float:
        """Directions per group above the edge. A product carries no more directions than either of its streams; units
        that are read at several places must do for all. All heads, as they are not counted so."""
        if not _is_counted(site):
            return float(site.width)
        return _deciding(site)(_count(spectrum, edge, multiplier) for spectrum, edge in self._pairs(site.name))

    def _paying_width(self, group: Sequence[Site]) -> int:
        """The largest width below the full one at which the model has no more parameters than at full width: an
        embedding in two factors may have more."""
        # Parameters rise with the width: what is too wide lies behind what is not.
        return bisect_left(
            range(1, group[0].width),
            True,
            key=lambda width: self.count("params", {site.name: width for site in group}) > self.baseline["params"],
        )

    def _settings(self) -> str:
        """The entries of a stock configuration that are all that is narrowed; empty if the plan is not uniform."""
        settings = dict.fromkeys(site.setting for site in self.sites if site.setting is not None)
        return " and ".join(settings) if self.uniform else ""

    def _whole(self) -> set[str]:
        """The shared widths that stay whole because the plan is uniform."""
        return {site.shares for site in self.sites if self.uniform and site.setting is None}

    def _unreachable(self, target: Target, fixed: Mapping[str, int], least: Amount) -> PlanError:
        """The error that says the least that can be had."""
        some_fixed, alone = bool(set(fixed) - self._whole()), self._settings()
        only = f": --uniform narrows {alone} alone" if alone else ""
        instead = ", or leave --uniform out: widths per layer go lower" if alone else ""
        return PlanError(
            f"the target must be at least {_share(least, target.cost, self.baseline)}, which remain with every "
            f"{'free ' * (some_fixed or bool(alone))}site at its least width{only}. "
            f"Got {shown(target.cost, target.limit(self.baseline))}. Raise the target, or lower multiple_of or "
            f"min_share{', or fix fewer widths' * some_fixed}{instead}."
        )

    def _remarks(
        self, target: Target | None, fixed: Mapping[str, int], widths: Mapping[str, int], predicted: Cost
    ) -> Iterator[str]:
        if self.uniform:
            cost = "params" if target is None else target.cost
            least = self.count(cost, self.widths_at(float(self._candidates(fixed)[-1]), fixed))
            yield (
                f"With --uniform, which narrows {self._settings()} alone, a plan goes down to "
                f"{_share(least, cost, self.baseline)}; with widths per layer, lower."
            )
        if ranks := [site for site in self.sites if site.streams and site.is_rank]:
            ahead = [site.name for site in ranks if site.streams[0].side == "input"]
            told = f"; ahead, and cheaper there, in {', '.join(ahead)}" if ahead else ""
            yield f"{PAIRS}: its own of few channels, and 1 × 1 behind it{told}."
        if self.latency is not None:
            after, before = shown(LATENCY, predicted[LATENCY]), shown(LATENCY, self.baseline[LATENCY])
            yield f"Latency is predicted: {after} of {before}, from times of the real shapes {self.latency.words}."
        for shares, group in self.groups.items():
            keep = widths[group[0].name]
            if self.pays[shares] < keep < group[0].width:
                more = self.count("params", {site.name: keep for site in group}) - self.baseline["params"]
                yield f"{shares}: the two factors of width {keep} have {more:,.0f} parameters more than the table has."
        if target is not None and (excess := predicted[target.cost] - target.limit(self.baseline)) > 0:
            yield (
                f"The target {target} is not met: {shown(target.cost, predicted[target.cost])} {word(target.cost)} "
                f"remain, {_excess(target.cost, excess)}, at the widths that were given."
            )

    def _site_plan(self, site: Site, fixed: Mapping[str, int], multiplier: float, keep: int, planned: int) -> SitePlan:
        # Of several streams one decides, and is shown.
        spectrum, edge = _deciding(site)(self._pairs(site.name), key=lambda pair: _count(pair[0], pair[1], multiplier))
        pooled = np.sort(edge.levelled(spectrum.eigenvalues).ravel())[::-1]
        above = edge.count(spectrum.eigenvalues, multiplier)
        has_gap = 0 < above < len(pooled) and pooled[above] > 0
        total = float(spectrum.eigenvalues.sum())
        count = self._count_above(site, multiplier)
        why = self._why(site, count, planned, multiplier, is_fixed=fixed.get(site.shares) == planned)
        return SitePlan(
            name=site.name,
            keep=keep,
            planned=planned,
            width=site.width,
            groups=site.groups,
            shares=site.shares,
            kind=site.kind,
            block=site.block,
            setting=site.setting,
            each=site.each,
            groups_of=site.groups_of,
            least=site.least,
            count=count,
            rule=edge.rule,
            samples=spectrum.samples,
            effective_samples=spectrum.effective_samples,
            q=edge.q,
            sigma2=edge.sigma2,
            edge=edge.edge,
            levels=edge.levels,
            multiplier=multiplier,
            ks=edge.ks,
            fit_error=edge.fit_error,
            misfit=edge.misfit,
            margin=float(pooled[above - 1] / pooled[above]) if has_gap else None,
            floor=self._floor(site),
            loss=None if self.curves is None else self.curves[site.shares].loss(keep),
            energy=min(1.0, float(spectrum.eigenvalues[:, : keep * site.each].sum()) / total) if total > 0 else 1.0,
            why=why if keep == planned else f"changed by hand: {planned} → {keep}; planned: {why}",
            remarks=edge.remarks,
        )

    def _floor(self, site: Site) -> float | None:
        """Directions per group that the default detector tells from noise, in the stream that decides."""
        counts = []
        for spectrum in self.spectrums[site.name] if _is_counted(site) else ():
            if spectrum.eigenvalues.any() and spectra.DETECTOR in spectra.RULES and spectrum.variances is not None:
                edge = spectrum.edge(spectra.rule_named(spectra.DETECTOR))
                counts.append(_count(spectrum, edge, 1.0))
        return _deciding(site)(counts, default=None)

    def _why(self, site: Site, count: float, keep: int, multiplier: float, *, is_fixed: bool) -> str:
        directions = f"{count:.1f} a head" if site.groups > 1 else f"{count:.0f}"
        above = f"{directions} above {'edge' if multiplier == 1 else f'{multiplier:.3g} × edge'}"
        if not _is_counted(site):
            above = "no edge counts heads"
        if is_fixed and site.shares in self._whole():
            return f"{above}: whole with --uniform"
        if is_fixed:
            asked = "whole" if keep == site.width else f"width {keep}"
            return f"{above}: {asked} as asked"
        if self.curves is not None:
            alone = f"costs {self.curves[site.shares].loss(keep):.2g} by itself"
            return f"{above}: whole" if keep == site.width else f"{above}; {alone}"
        if keep == site.width:
            paying = ", two factors would be larger" if self.pays[site.shares] < site.width - 1 else ""
            return f"{above}: whole{paying}"
        shared = f" of {site.shares}" if site.shares != site.name else ""
        return f"{above}, rounded up{shared}" if keep > count else above


def _edge(site: Site, spectrum: Spectrum, rule: str, tau: float) -> NoiseEdge:
    if not spectrum.eigenvalues.any():
        return _no_edge(rule, spectrum, "The width is dead on these data: a constant does for it.", misfit=True)
    try:
        return spectrum.edge(spectra.rule_named(rule, tau=tau))
    except DataError as error:
        raise DataError(f"site {site.name}: {error} To leave it whole: --exclude {site.name}.") from None


def _deciding(site: Site) -> Callable[..., Any]:
    """Which of a site's streams decides on its width: of a product the one with fewer directions, else the one with
    most."""
    return min if site.kind == "bilinear" else max


def _is_counted(site: Site) -> bool:
    """Whether an edge says how wide the site stays. Heads are no directions: all stay, unless their number is given."""
    return site.kind != "heads"


def _no_edge(rule: str, spectrum: Spectrum, remark: str, *, misfit: bool) -> NoiseEdge:
    """Of a width that no edge counts: heads, or a dead one, of which nothing lies above any edge."""
    return NoiseEdge(
        rule=rule,
        q=spectrum.q,
        q_eff=spectrum.q_eff,
        sigma2=0.0,
        edge=0.0,
        fit_error=float(misfit),
        ks=float(misfit),
        misfit=misfit,
        remarks=(remark,),
    )


def _count(spectrum: Spectrum, edge: NoiseEdge, multiplier: float) -> float:
    """Directions per group above the edge."""
    return edge.count(spectrum.eigenvalues, multiplier) / len(spectrum.eigenvalues)


def _critical(pairs: Iterable[tuple[Spectrum, NoiseEdge]]) -> Float[np.ndarray, " candidates"]:
    """A multiplier between every two neighbouring steps of the counts, below the first and above the last, ascending.
    (At a step itself rounding would decide.)"""
    ratios = [edge.levelled(spectrum.eigenvalues).ravel() / edge.edge for spectrum, edge in pairs if edge.edge > 0]
    steps = np.unique(np.concatenate([*ratios, np.zeros(1)]))
    steps = steps[steps > 0]
    if len(steps) == 0:  # every width is fixed or dead
        return np.ones(1)
    return np.concatenate([steps[:1] / 2, (steps[1:] + steps[:-1]) / 2, steps[-1:] * 2])


def _meet(
    cost_at: Callable[[float], Amount],
    candidates: Float[np.ndarray, " candidates"],
    limit: float,
    unreachable: Callable[[Amount], PlanError],
) -> float:
    """The smallest multiplier whose widths meet the limit: cost falls as the multiplier rises, so bisect.

    FLOPs need not fall everywhere, as a factorised embedding adds some. Whatever they do, the answer meets the limit
    and the candidate before it does not.
    """
    if (least := cost_at(float(candidates[-1]))) > limit:
        raise unreachable(least)
    low, high = 0, len(candidates) - 1  # `high` meets the limit
    while low < high:
        middle = (low + high) // 2
        if cost_at(float(candidates[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return float(candidates[high])


def _share(amount: Amount, cost: str, baseline: Cost) -> str:
    """An amount of a cost and its share of the baseline, rounded up: what is named can be met."""
    percent = math.ceil(amount / baseline[cost] * 1000) / 10
    return f"{shown(cost, amount)} {word(cost)} ({percent:.1f}% of {shown(cost, baseline[cost])})"


def _excess(cost: str, excess: Amount) -> str:
    return f"{shown(cost, excess)} too much" if cost == LATENCY else f"{math.ceil(excess):,} too many"
