"""What must hold in a plan beside the types of its fields: ranges, shared widths, and the sites of its model."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, get_args

from rmtkd.errors import OptionError, PlanError
from rmtkd.planning.budget import POLICIES, Curve
from rmtkd.planning.costs import COSTS, LATENCY, PAIR, Target
from rmtkd.planning.latency import LatencyTable
from rmtkd.planning.lines import Placed, Problems, brief, show
from rmtkd.sites import Kind, Site, share_settings
from rmtkd.spectra import RULES

SHAPE = ("kind", "block", "shares", "setting", "width", "groups", "each", "groups_of", "least")
"""What a site of a plan and the site of its model have in common."""


def review(root: Placed, fields: Mapping[str, Any], sites: Sequence[Site] | None, problems: Problems) -> None:
    """Note what is wrong with a plan whose fields have been checked one by one.

    Args:
        root: the plan with its lines.
        fields: those of its fields whose types are in order, sites as dicts.
        sites: the sites of the model that it is for.
        problems: where problems go.
    """
    if "sites" in fields:
        uniform = fields.get("uniform") is True
        if fields.get("embedding_levels", 1) != 1 or fields.get("low_rank") is True:
            sites = None  # other ones than those of the model as it is: they are held against the plan later
        if uniform and sites is not None:
            sites = share_settings(sites)
        _review_sites(root.value["sites"], fields["sites"], sites, problems, uniform=uniform)
        _review_head(root, fields, problems)


def misfits(listed: Sequence[Mapping[str, Any]], sites: Sequence[Site]) -> Iterator[tuple[int | None, str]]:
    """Where a plan and a model differ: the number of the plan's site, if it is one, and a sentence."""
    known = {site.name: site for site in sites}
    missing = dict(known)
    for i, planned in enumerate(listed):
        if "name" not in planned:
            continue
        site = known.get(planned["name"])
        missing.pop(planned["name"], None)
        if site is None:
            yield (
                i,
                f"{show(planned['name'])}: the model has no such site.{nearest(planned['name'], known)}",
            )
            continue
        for key in SHAPE:
            if key in planned and planned[key] != getattr(site, key):
                yield i, f"{site.name}: {key} must be {getattr(site, key)}, the model's. Got {brief(planned[key])}."
    for name in missing:
        yield (
            None,
            f"{name}: every site of the model must be in the plan. It is missing; to leave it whole, keep its width.",
        )


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest one, or some of them."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else f" There are {', '.join(known[:8])}{', …' * (len(known) > 8)}."


def _review_sites(
    placed: Placed,
    listed: Sequence[Mapping[str, Any]],
    sites: Sequence[Site] | None,
    problems: Problems,
    *,
    uniform: bool,
) -> None:
    named: dict[str, int] = {}
    shared: dict[str, tuple[str, int, int]] = {}

    def line(i: int, key: str) -> int:
        return placed.value[i].value[key].line

    for i, site in enumerate(listed):
        label = show(site["name"]) if "name" in site else f"sites[{i}]"
        if "name" in site and (first := named.setdefault(site["name"], i)) != i:
            text = f"{label}: a site must come once. It also stands on line {line(first, 'name')}."
            problems.add(line(i, "name"), text)
        if "kind" in site and site["kind"] not in get_args(Kind):
            text = f"{label}: kind must be one of {', '.join(get_args(Kind))}. Got {brief(site['kind'])}."
            problems.add(line(i, "kind"), text)
        for key in ("keep", "planned"):
            if {key, "width", "least"} <= set(site) and not site["least"] <= site[key] <= site["width"]:
                least, width = site["least"], site["width"]
                text = f"{label}: {key} must be a whole number from {least} to {width}. Got {site[key]}."
                problems.add(line(i, key), text)
        stays_whole = uniform and site.get("setting", "") is None and {"keep", "width"} <= set(site)
        if stays_whole and site["keep"] != site["width"]:
            text = f"{label}: keep must be {site['width']}, the whole width, as the plan is uniform. "
            problems.add(line(i, "keep"), f"{text}Got {site['keep']}.")
        if "keep" in site and "shares" in site:
            other, at, keep = shared.setdefault(site["shares"], (label, line(i, "keep"), site["keep"]))
            if keep != site["keep"]:
                text = f"{label}: keep must be that of {other} on line {at}, whose width it shares. "
                problems.add(line(i, "keep"), f"{text}Got {site['keep']} and {keep}.")
    for i, text in () if sites is None else misfits(listed, sites):
        problems.add(placed.line if i is None else line(i, "name"), text)


def _review_head(root: Placed, fields: Mapping[str, Any], problems: Problems) -> None:
    whole = [site for site in fields["sites"] if {"shares", "width", "least"} <= set(site)]
    full = {site["shares"]: site["width"] for site in whole}
    least = {site["shares"]: site["least"] for site in whole}
    timed = fields.get("latency") is not None
    both = f"be {' and '.join(COSTS)}, each a whole number of at least 1{f', and {LATENCY}' * timed}"

    def is_cost(cost: Mapping[str, int | float]) -> bool:
        counts = [cost.get(name) for name in COSTS]
        return (
            set(cost) == {*COSTS, *([LATENCY] if timed else [])}
            and all(isinstance(count, int) and count >= 1 for count in counts)
            and cost.get(LATENCY, 1) > 0
        )

    for name, holds, words in (
        ("rule", lambda rule: rule in RULES, f"be one of {', '.join(RULES)}"),
        ("tau", lambda tau: 0 < tau < 1, "be within (0, 1)"),
        ("multiple_of", lambda number: number >= 1, "be at least 1"),
        ("min_share", lambda share: 0 <= share <= 1, "be within [0, 1]"),
        ("multiplier", lambda number: number > 0, "be greater than 0"),
        ("policy", lambda policy: policy in POLICIES, f"be one of {', '.join(POLICIES)}"),
        ("max_loss", lambda number: number > 0, "be greater than 0"),
        (
            "curves",
            lambda curves: curves is None or bool(problems.found) or _are_curves(curves, full),
            "have ascending widths up to the full one for every shared width, with losses from 0 and a weight above 0",
        ),
        ("baseline", is_cost, both),
        ("predicted", is_cost, both),
        (
            "fixed",
            lambda fixed: all(least.get(name, 1) <= width <= full.get(name, 0) for name, width in fixed.items()),
            f"give widths from the least to the full one to {', '.join(full)}, or some of them",
        ),
        (
            "costs",
            # An entry for a site that is itself wrong would be one problem said twice.
            lambda costs: costs is None or bool(problems.found) or _is_table(costs, full),
            "have an entry for every cost and shared width",
        ),
    ):
        if name in fields and not _holds_missing(fields[name]) and not holds(fields[name]):
            placed = root.value[name]
            problems.add(placed.line, f"{name} must {words}. Got {brief(placed.plain())}.")
    if fields.get("target") is not None:
        line = root.value["target"].line
        try:
            if Target.parse(fields["target"]).cost == LATENCY and not timed:
                text = "a target of latency must come with the measured times in `latency`. There are none."
                problems.add(line, f"{text} Plan with the model.")
        except OptionError as error:
            problems.add(line, str(error).replace("--target", "target"))
    if timed and not problems.found:
        try:
            table = LatencyTable.of(fields["latency"])
            table.check_fits({site["name"]: site["width"] for site in fields["sites"]})
        except PlanError as error:
            problems.add(root.value["latency"].line, str(error))


def _is_table(table: Mapping[str, Any], full: Mapping[str, int]) -> bool:
    if set(table) != {"once", "per_unit", "together"} or any(set(part) != set(COSTS) for part in table.values()):
        return False
    pairs = [pair.split(PAIR) for part in table["together"].values() for pair in part]
    return all(len(pair) == 2 and set(pair) <= set(full) for pair in pairs) and all(
        set(table[name][cost]) == set(full) for name in ("once", "per_unit") for cost in COSTS
    )


def _are_curves(curves: Mapping[str, Any], full: Mapping[str, int]) -> bool:
    return set(curves) == set(full) and all(
        Curve(**curve).is_sound and curve["widths"][-1] == full[name] for name, curve in curves.items()
    )


def _holds_missing(value: Any) -> bool:
    """Whether a type was wrong somewhere in the value, which has been said."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return value is MISSING or any(_holds_missing(part) for part in parts)
