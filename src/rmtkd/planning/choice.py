"""From spectra to a plan: how wide every site stays, and why. With the model, or later without it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from rmtkd.activations import Observed
from rmtkd.batches import Batch
from rmtkd.covariance import eigenvalues_of
from rmtkd.errors import PlanError, check_choice
from rmtkd.planning.budget import POLICIES, Curve
from rmtkd.planning.costs import COSTS, LATENCY, Amount, Cost, CostTable, Target
from rmtkd.planning.desk import MAX_LOSS, ON_CALIBRATION, PAIRS, Count, Desk
from rmtkd.planning.latency import LatencyTable
from rmtkd.planning.pins import fixed_widths, uniform_sites
from rmtkd.planning.plan import Plan
from rmtkd.sites import Site, share_settings
from rmtkd.spectra import Spectrum


def spectra_of(observed: Mapping[str, Sequence[Observed]]) -> dict[str, tuple[Spectrum, ...]]:
    """The spectrum of every stream of every site, and what else rules look at."""
    return {name: tuple(map(_spectrum, streams)) for name, streams in observed.items()}


def _spectrum(stream: Observed) -> Spectrum:
    covariance = stream.moments.covariance()
    replicate = stream.replicates
    return Spectrum(
        eigenvalues=eigenvalues_of(covariance).numpy(),
        samples=stream.moments.count,
        variances=covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).numpy(),
        effective_samples=stream.effective_samples,
        replicate=None if replicate is None else replicate.eigenvalues().numpy(),
    )


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
    uniform: bool = False,
    max_loss: float = MAX_LOSS,
    curves: Mapping[str, Curve] | None = None,
    exclude: Iterable[str] = (),
    keep: Iterable[tuple[str, int]] = (),
    latency: LatencyTable | None = None,
) -> Plan:
    """Choose the width of every site.

    With measured losses (the policy `guarded`), the widths lose least on held-out rows for the target, or, without one,
    save most within `max_loss`. Without them (the policy `paper`), a site keeps the directions above its noise edge;
    with a target, all edges are raised or lowered by one common multiplier, the smallest that meets it. An embedding
    stays whole where its two factors would have more parameters than it has.

    Args:
        model: the untouched model.
        sites: the sites that may be narrowed.
        spectrums: from `spectra_of`, for the same sites.
        batch: a batch whose FLOPs are counted, and whose latency is measured if the target asks for it.
        rule: name in `spectra.RULES`.
        tau: quantile that starts the noise level, in (0, 1); larger cuts more.
        target: what is to remain.
        multiple_of: kept widths are rounded up to multiples of this (hardware), never above the full width.
        min_share: no site keeps less than this share of its width (the method's ρ_min).
        uniform: narrow only widths that a stock configuration gives, each for all layers at once; the widest wish
            counts.
        max_loss: largest sum of held-out losses of a plan with curves and without a target, in nats.
        curves: measured losses by shared width, from `sensitivity`.
        exclude: sites that stay whole: names or patterns such as `layer.*.ffn`.
        keep: sites with the width that they are given, whatever `multiple_of` and `min_share` say. The other sites
            meet the target around them.
        latency: measured times of the model's shapes; those of this machine if the target asks for them.

    Raises:
        PlanError: if the target cannot be met (the message says the minimum), or if what `exclude` and `keep` ask for
            is impossible.
        OptionError: for an unknown rule or values out of range, or if `uniform` has nothing to narrow.
        DataError: if a spectrum is none (not finite, or without what the rule needs), naming the site.
    """
    if uniform:
        sites = uniform_sites(sites)
    fixed = fixed_widths(sites, exclude, keep, uniform=uniform)
    if latency is None and target is not None and target.cost == LATENCY:
        latency = LatencyTable.cached(model, sites, batch)
    baseline, costs = CostTable.measure(model, sites, batch)
    count = _by_table(costs, baseline, sites) if costs else _by_skeleton(model, sites, batch)
    desk = Desk(
        sites,
        spectrums,
        *_timed(count, baseline, latency),
        rule=rule,
        tau=tau,
        multiple_of=multiple_of,
        min_share=min_share,
        uniform=uniform,
        max_loss=max_loss,
        curves=curves,
        latency=latency,
    )
    return desk.plan(type(model).__name__, target, fixed, costs)


def retarget(
    plan: Plan,
    spectrums: Mapping[str, Sequence[Spectrum]],
    *,
    target: str | None = None,
    rule: str | None = None,
    tau: float | None = None,
    multiple_of: int | None = None,
    min_share: float | None = None,
    uniform: bool | None = None,
    policy: str | None = None,
    max_loss: float | None = None,
    curves: Mapping[str, Curve] | None = None,
    exclude: Iterable[str] = (),
    keep: Iterable[tuple[str, int]] = (),
) -> Plan:
    """Plan again from the spectra of an earlier plan, without data or model, in seconds.

    What is not given stays as it was. Widths that were fixed, or changed by hand, stay too, unless `exclude` or `keep`
    say otherwise. A uniform plan stays uniform.

    Args:
        plan: the earlier plan.
        spectrums: what it was made from.
        target: what is to remain, such as `20%params`.
        rule: see `make_plan`, also for `tau`, `multiple_of` and `min_share`.
        tau: see there.
        multiple_of: see there.
        min_share: see there.
        uniform: what the earlier plan is, if it is given.
        policy: `paper` turns a guarded plan into one of common edges; `guarded` takes a plan with curves.
        max_loss: see `make_plan`; takes a plan with curves. Without a target beside it, it takes the place of the
            plan's.
        curves: in place of the plan's.
        exclude: sites that are to stay whole, beside those that the plan fixes.
        keep: sites and the widths that they are given.

    Raises:
        PlanError: see `make_plan`; also if `uniform` is not what the plan is, if the spectra are not those of the plan,
            or if the widths of the model depend on each other in a way that its cost has no formula.
        OptionError, DataError: see `make_plan`.
    """
    if plan.costs is None:
        raise PlanError(
            "a plan must hold the cost of its model as a formula to be made anew without the model. This one has none. "
            "Plan with the model: `rmtkd plan RECIPE --model MODEL`."
        )
    if uniform not in (None, plan.uniform):
        raise PlanError(
            f"a plan made anew without the model must stay as uniform as it was ({plan.uniform}). Got {uniform}. Plan "
            "with the model: `rmtkd plan RECIPE --model MODEL`, with or without --uniform."
        )
    if policy is not None:
        check_choice("policy", policy, POLICIES)
    if (policy == "guarded" or max_loss is not None) and plan.curves is None and curves is None:
        raise PlanError(
            "a guarded plan takes losses that were measured with the model. This plan has none. Plan with the model: "
            "`rmtkd plan RECIPE --model MODEL --policy guarded`."
        )
    sites = [site.outline for site in plan.sites]
    _check_spectrums(sites, spectrums)
    fixed = plan.fixed | {site.shares: site.keep for site in plan.sites if site.by_hand}
    desk = Desk(
        sites,
        spectrums,
        *_timed(_by_table(plan.costs, plan.baseline, sites), plan.baseline, plan.latency),
        rule=plan.rule if rule is None else rule,
        tau=plan.tau if tau is None else tau,
        multiple_of=plan.multiple_of if multiple_of is None else multiple_of,
        min_share=plan.min_share if min_share is None else min_share,
        uniform=plan.uniform,
        max_loss=plan.max_loss if max_loss is None else max_loss,
        curves=None if policy == "paper" else curves or plan.curves,
        latency=plan.latency,
    )
    words = plan.target if target is None and max_loss is None else target
    aim = None if words is None else Target.parse(words)
    if aim is not None and aim.cost == LATENCY and plan.latency is None:
        raise PlanError(
            "a target of latency must rest on measured times. This plan has none, as its target asked for none. Plan "
            f"with the model: `rmtkd plan RECIPE --model MODEL --target {words}`."
        )
    fixed |= fixed_widths(sites, exclude, keep, uniform=plan.uniform)
    made = desk.plan(plan.model, aim, fixed, plan.costs)
    told = _remarks_that_start(plan, PAIRS)  # what only the model's sites tell
    if curves is None and made.policy == "guarded":
        told += _remarks_that_start(plan, ON_CALIBRATION)
    return replace(made, remarks=(*made.remarks, *told), embedding_levels=plan.embedding_levels, low_rank=plan.low_rank)


def settle(
    plan: Plan,
    model: nn.Module,
    sites: Sequence[Site],
    spectrums: Mapping[str, Sequence[Spectrum]],
    batch: Batch,
) -> Plan:
    """A plan that was edited, with everything but the user's widths derived anew from the model and its spectra.

    The measured loss stays where the widths are those it was measured at.

    Args:
        plan: the plan, its widths as they shall be.
        model, sites, spectrums, batch: see `make_plan`.

    Raises:
        PlanError: if the plan names other sites than the model has.
    """
    plan.check_fits(sites)
    if plan.uniform:
        sites = share_settings(sites)
    baseline, costs = CostTable.measure(model, sites, batch)
    count = _by_table(costs, baseline, sites) if costs else _by_skeleton(model, sites, batch)
    desk = Desk(
        sites,
        spectrums,
        *_timed(count, baseline, plan.latency),
        rule=plan.rule,
        tau=plan.tau,
        multiple_of=plan.multiple_of,
        min_share=plan.min_share,
        uniform=plan.uniform,
        max_loss=plan.max_loss,
        curves=plan.curves,
        latency=plan.latency,
    )
    target = None if plan.target is None else Target.parse(plan.target)
    planned = {site.name: site.planned for site in plan.sites}
    loss = plan.loss if plan.widths == planned else None
    made = desk.write(type(model).__name__, target, plan.fixed, costs, plan.multiplier, plan.widths, planned, loss)
    return replace(
        made,
        remarks=(*made.remarks, *_remarks_that_start(plan, ON_CALIBRATION)),
        embedding_levels=plan.embedding_levels,
        low_rank=plan.low_rank,
    )


def _remarks_that_start(plan: Plan, words: str) -> tuple[str, ...]:
    return tuple(remark for remark in plan.remarks if remark.startswith(words))


def _by_table(costs: CostTable, baseline: Cost, sites: Sequence[Site]) -> Count:
    full = {site.shares: site.width for site in sites}
    shares = {site.name: site.shares for site in sites}

    def count(cost: str, widths: Mapping[str, int]) -> Amount:
        dropped = {shares[name]: full[shares[name]] - width for name, width in widths.items()}
        return baseline[cost] + costs.change(cost, dropped)

    return count


def _by_skeleton(model: nn.Module, sites: Sequence[Site], batch: Batch) -> Count:
    return lambda cost, widths: COSTS[cost](model, sites, widths, batch)


def _timed(count: Count, baseline: Cost, latency: LatencyTable | None) -> tuple[Count, Cost]:
    """The count and the baseline with latency beside what is counted, if there is a table."""
    if latency is None:
        return count, baseline

    def cost_of(cost: str, widths: Mapping[str, int]) -> Amount:
        return latency.cost(widths) if cost == LATENCY else count(cost, widths)

    return cost_of, {**baseline, LATENCY: latency.full_ms}


def _check_spectrums(sites: Sequence[Site], spectrums: Mapping[str, Sequence[Spectrum]]) -> None:
    strangers = {site.name for site in sites} ^ set(spectrums) or {
        site.name for site in sites if {s.eigenvalues.shape for s in spectrums[site.name]} != {(site.groups, site.size)}
    }
    if strangers:
        raise PlanError(
            f"spectra must be those that the plan was made from. They differ in {', '.join(sorted(strangers))}. "
            "Keep plan.json and spectra.npz of one plan together."
        )
