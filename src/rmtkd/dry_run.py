"""The dry run: what would be cut and why; and the cut alone, without recovery."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rmtkd import batches as batching
from rmtkd.activations import observe
from rmtkd.batches import Batch
from rmtkd.cutting import cut_in_order
from rmtkd.levels import in_levels
from rmtkd.memory import Pieces
from rmtkd.planning import Plan, Spectrum, Target, make_plan, settle, spectra_of, uniform_sites
from rmtkd.schedule import Options
from rmtkd.sites import Site, blocks_of, find_sites
from rmtkd.spectra import RULES
from rmtkd.surgery import check_cut

CHECK_ROWS = 4
"""Rows on which every cut is checked against its reference, in float64."""


def plan(
    model: nn.Module,
    *,
    calibration: Iterable[Batch],
    example: Batch | None = None,
    given: Plan | None = None,
    sites: Sequence[Site] | None = None,
    train: Iterable[Batch] | None = None,
    pieces: Pieces | None = None,
    **options: Any,
) -> tuple[Plan, dict[str, tuple[Spectrum, ...]]]:
    """The dry run: collect activations, look at the spectra, choose the widths. Trains and changes nothing.

    Args:
        model: the untouched model.
        calibration: batches whose activations are seen.
        example: the batch whose FLOPs are predicted; the first calibration batch by default.
        given: a plan whose widths are used instead of chosen ones.
        sites: the widths that may be narrowed; those of the model's family by default.
        train: batches whose tokens are counted for `embedding_levels`; those of calibration by default.
        pieces: in how many pieces a batch is run, should memory run out.
        options: the fields of `Options`.

    Returns:
        The plan, and the spectra it was made from by site name.
    """
    chosen = Options(**options)
    levels = chosen.embedding_levels if given is None else given.embedding_levels
    every = find_sites(model) if sites is None else sites
    model, sites = in_levels(model, every, calibration if train is None else train, levels)
    if given is not None:
        given.check_fits(sites)
    elif chosen.uniform:
        uniform_sites(sites)  # refused before anything takes time
    rule = RULES[chosen.rule if given is None else given.rule]
    seed = chosen.seed if "replicate" in getattr(rule, "needs", ()) else None
    spectrums = spectra_of(observe(model, sites, calibration, pieces=pieces, replicate_seed=seed))
    if example is None:
        example = batching.first(calibration, "calibration")
    if given is not None:
        return settle(given, model, sites, spectrums, example), spectrums
    made = make_plan(
        model,
        sites,
        spectrums,
        example,
        rule=chosen.rule,
        tau=chosen.tau,
        target=None if chosen.target is None else Target.parse(chosen.target),
        multiple_of=chosen.multiple_of,
        min_share=chosen.min_share,
        uniform=chosen.uniform,
        exclude=chosen.exclude,
        keep=chosen.pairs,
    )
    return replace(made, embedding_levels=levels), spectrums


def narrow(
    model: nn.Module,
    plan: Plan,
    *,
    calibration: Iterable[Batch],
    sites: Sequence[Site] | None = None,
    train: Iterable[Batch] | None = None,
) -> nn.Module:
    """Apply a plan in closed form: cut, check, train nothing. The model is left as it was.

    Args:
        model: the model that the plan was made from.
        plan: the widths to keep; edit them with `dataclasses.replace`, or in its JSON.
        calibration: batches whose activations choose the bases.
        sites: the widths that may be narrowed; those of the model's family by default.
        train: batches whose tokens are counted for `embedding_levels`; those of calibration by default.

    Returns:
        A new, narrower, dense model in evaluation mode.

    Raises:
        PlanError: if the plan names other sites than the model has.
        SurgeryError: if the result differs from the projected full-width reference.
    """
    every = find_sites(model) if sites is None else sites
    model, every = in_levels(model, every, calibration if train is None else train, plan.embedding_levels)
    cut = narrowed(every, plan)
    student, bases = cut_in_order(model, cut, plan.widths, calibration, blocks=blocks_of(every))
    check_cut(model, student, cut, bases, batching.head(batching.first(calibration, "calibration"), CHECK_ROWS))
    return student.eval()


def narrowed(sites: Sequence[Site], plan: Plan) -> tuple[Site, ...]:
    """The sites of the model that the plan narrows; without the width of heads of which none is kept."""
    plan.check_fits(sites)
    widths = plan.widths
    gone = {name for name, width in widths.items() if width == 0}
    return tuple(site for site in sites if widths[site.name] < site.width and site.groups_of not in gone)
