"""A plan in words: its columns, the same for every table, and what its reader must know."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from rmtkd.planning import LATENCY, Plan, SitePlan
from rmtkd.reporting import numbers
from rmtkd.schedule import Round, kept_widths
from rmtkd.spectra import takes


def plan_title(plan: Plan) -> str:
    """What the plan is of, and how its widths were chosen."""
    is_guarded = plan.policy == "guarded"
    measured = "" if plan.loss is None else f", measured loss {plan.loss:.2g}"
    edges = "" if is_guarded else f", edge × {plan.multiplier:.3g}"
    return (
        f"{plan.model} · rule {plan.rule}"
        + (f", τ {plan.tau:g}" if takes(plan.rule, "tau") else "")
        + (f" · guarded{measured}" if is_guarded else "")
        + (f" · target {plan.target}{edges}" if plan.target else "")
    )


def plan_prediction(plan: Plan) -> str:
    """What the narrowed model will cost, in a sentence."""
    baseline, predicted = plan.baseline, plan.predicted
    return (
        f"before recovery: {predicted['params']:,} of {baseline['params']:,} parameters "
        f"({numbers.share(predicted['params'], baseline['params'])}), "
        f"{numbers.megaflops(predicted['flops'])} of {numbers.megaflops(baseline['flops'])} MFLOPs "
        f"({numbers.share(predicted['flops'], baseline['flops'])})"
        + (
            f", {predicted[LATENCY]:.4g} of {baseline[LATENCY]:.4g} ms "
            f"({numbers.share(predicted[LATENCY], baseline[LATENCY])}, predicted from measured shapes)"
            if LATENCY in baseline
            else ""
        )
    )


def plan_columns(plan: Plan) -> dict[str, list[str]]:
    """What a plan says, by column, a line a site. `signal` and `loss` are known of guarded plans alone."""
    columns = {
        "site": [site.name for site in plan.sites],
        "kind": [site.kind for site in plan.sites],
        "width": [per_head(site, site.width) for site in plan.sites],
        "signal": [_directions(site, site.floor) for site in plan.sites],
        "above": [_directions(site, site.count) for site in plan.sites],
        "keep": [kept(site, plan.widths) + _mark(site, plan) for site in plan.sites],
        "loss": ["–" if site.loss is None else f"{site.loss:.2g}" for site in plan.sites],
        "n_eff/n": [_independent(site) for site in plan.sites],
        "q": [f"{site.q:.2g}" for site in plan.sites],
        "noise σ²": [numbers.small(site.sigma2 or None) for site in plan.sites],
        "edge": [numbers.small(site.edge or None) for site in plan.sites],
        "KS": [_fit(site) for site in plan.sites],
        "energy": [_energy(site, plan.widths) for site in plan.sites],
    }
    return columns if plan.policy == "guarded" else {n: c for n, c in columns.items() if n not in ("signal", "loss")}


def plan_table(plan: Plan, width: int = 120) -> Table:
    """A plan as a table, one line a site: how many directions (of one head) stand above the edge, how many stay.

    A guarded plan also tells how many the detector tells from noise (`signal`), and what the width that stays loses by
    itself. Of n activation vectors n_eff are independent. Where the console is narrow, these and the noise level are
    left to plan.json, which also has the reasons in words.
    """
    table = Table(title=plan_title(plan), caption=plan_prediction(plan), title_justify="left", caption_justify="left")
    left_out = {"noise σ²", "edge"} if plan.policy == "guarded" else set()
    if width < 100:
        left_out |= {"n_eff/n", "q", "noise σ²", "edge"}
    columns = {name: column for name, column in plan_columns(plan).items() if name not in left_out}
    for name in columns:
        table.add_column(name, justify="left" if name in ("site", "kind") else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def per_head(site: SitePlan, width: int) -> str:
    """A width of a site, with the number of its heads where it has several."""
    return f"{site.groups}×{width}" if site.groups > 1 else str(width)


def widths_of(record: Mapping[str, Any], plan: Plan) -> dict[str, int]:
    """Width by site name, as it is: of a run that ended early not all that were planned have been cut."""
    cut = record.get("widths") or kept_widths(Round.from_dict(done) for done in record["rounds"])
    return {site.name: site.width for site in plan.sites} | cut


def kept(site: SitePlan, widths: Mapping[str, int]) -> str:
    """The width that stays, in as many heads as stay.

    Args:
        site: the site.
        widths: kept width by site name, this site's and those of the numbers of heads among them.
    """
    heads, keep = widths.get(site.groups_of or "", site.groups), widths[site.name]
    if heads == site.groups:
        return per_head(site, keep)
    return f"{heads}×{keep}" if heads else "0"


def _directions(site: SitePlan, count: float | None) -> str:
    return "–" if count is None else f"{count:.1f}" if site.groups > 1 else f"{count:.0f}"


def _fit(site: SitePlan) -> str:
    """How far noise is from explaining what lies below the edge; a dash where no edge counts."""
    return f"{site.ks:.2f}{'!' * site.misfit}" if site.edge or site.misfit else "–"


def _independent(site: SitePlan) -> str:
    return "–" if site.effective_samples is None else f"{site.effective_samples / site.samples:.0%}"


def _energy(site: SitePlan, widths: Mapping[str, int]) -> str:
    """Share of the variance that as many directions can hold; a dash where heads go, and take theirs along."""
    return f"{site.energy:.1%}" if widths.get(site.groups_of or "", site.groups) == site.groups else "–"


def _mark(site: SitePlan, plan: Plan) -> str:
    """`*` for a width changed by hand, `=` for one that was asked for, or stays whole with `--uniform`."""
    return "*" if site.by_hand else "=" if site.shares in plan.fixed else ""


def plan_notes(plan: Plan) -> list[str]:
    """What a reader of the plan must know beside the table, in sentences."""
    notes = [note for note in (misfit_note(plan), floor_note(plan)) if note]
    if by_hand := [f"{site.name} {site.planned} → {site.keep}" for site in plan.sites if site.by_hand]:
        notes.append(f"* changed by hand: {', '.join(by_hand)}.")
    if any(_mark(site, plan) == "=" for site in plan.sites):
        notes.append("= the width that was asked for" + (", or whole with --uniform." if plan.uniform else "."))
    return [*notes, *(f"! {remark}" for remark in plan.remarks)]


def misfit_note(plan: Plan) -> str | None:
    """One sentence on the sites where what lies below the edge is no noise that the rule knows, if there are any."""
    bad = [site.name for site in plan.sites if site.misfit]
    if not bad:
        return None
    of = f"! {len(bad)} of {len(plan.sites)} spectra"
    if plan.rule == "mp":
        return (
            f"{of} show no Marchenko–Pastur bulk (KS > 0.1): there the edge is a threshold on a quantile, not a test "
            "for noise."
        )
    return f"{of} are not noise below the edge as {plan.rule} takes it to be: there the edge is a convention."


def floor_note(plan: Plan) -> str | None:
    """One sentence on the sites where the rule counts fewer directions than the detector tells from noise, if there are
    any in a guarded plan."""
    if plan.policy != "guarded":
        return None
    above = [site for site in plan.sites if site.floor is not None and site.floor > site.count]
    if not above:
        return None
    told = ", ".join(f"{s.name} {_directions(s, s.floor)} > {_directions(s, s.count)}" for s in above[:8])
    return (
        f"! At {len(above)} of {len(plan.sites)} sites more directions are told from noise (signal) than the rule "
        f"{plan.rule} keeps (above): {told}{', …' * (len(above) > 8)}."
    )
