"""The dry run: what would be cut and why; and the cut alone, without recovery."""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from rmtkd import batches as batching
from rmtkd.activations import Observed, moments_of, observe
from rmtkd.batches import Batch, Forward, called
from rmtkd.cutting import cut_in_order
from rmtkd.fisher import Metrics, output_metrics
from rmtkd.levels import in_levels
from rmtkd.measurement import precision_for
from rmtkd.memory import Pieces
from rmtkd.modules import check_module, unpacked
from rmtkd.planning import (
    LATENCY,
    ON_CALIBRATION,
    Curve,
    LatencyTable,
    Plan,
    Spectrum,
    Target,
    check_described,
    make_plan,
    retarget,
    settle,
    spectra_of,
    uniform_sites,
)
from rmtkd.schedule import Options
from rmtkd.sensitivity import Sensitivity
from rmtkd.sites import Site, blocks_of, check_sites, find_sites
from rmtkd.spectra import RULES
from rmtkd.surgery import check_cut

CHECK_ROWS = 4
"""Rows on which every cut is checked against its reference, in float64."""


def plan(
    model: nn.Module,
    *,
    calibration: Iterable[Batch],
    selection: Iterable[Batch] | None = None,
    example: Batch | None = None,
    given: Plan | None = None,
    sites: Sequence[Site] | None = None,
    metrics: Metrics | None = None,
    train: Iterable[Batch] | None = None,
    forward: Forward | None = None,
    pieces: Pieces | None = None,
    **options: Any,
) -> tuple[Plan, dict[str, tuple[Spectrum, ...]]]:
    """The dry run: collect activations, look at the spectra, choose the widths. Trains and changes nothing.

    Args:
        model: the untouched model.
        calibration: batches whose activations are seen.
        selection: held-out batches, on which guarded widths are measured; those of the calibration by default, to which
            cuts are fitted: the plan then says so.
        example: the batch whose FLOPs are predicted; the first calibration batch by default.
        given: a plan whose widths are used instead of chosen ones.
        sites: the widths that may be narrowed; those of the model's family by default.
        metrics: of the outputs that sites are read into, if they are known; made by default where they are needed.
        train: batches whose tokens are counted for `embedding_levels`; those of calibration by default.
        forward: class scores from the model and a batch, as `compress` takes it.
        pieces: in how many pieces a batch is run, should memory run out.
        options: the fields of `Options`; everything is run where the model is.

    Returns:
        The plan, and the spectra it was made from by site name.

    Raises:
        DataError: for rows that can be gone through only once, among what `rmtkd.errors` tells.
    """
    chosen = Options.of(options, plan)
    batching.check_again(calibration=calibration, selection=selection, train=train)
    calibration, selection, train = called(calibration, forward), called(selection, forward), called(train, forward)
    example = None if example is None else batching.first(called([example], forward), "example")
    check_module(model)
    if given is None:
        if sites is not None:
            check_described(model, sites, batching.first(calibration, "calibration"))
        survey = Survey(
            model,
            calibration=calibration,
            selection=selection,
            example=example,
            sites=sites,
            metrics=metrics,
            train=train,
            pieces=pieces,
            options=chosen,
        )
        return survey.plan(chosen.target), survey.spectrums
    model, sites = _start(model, sites, calibration, train, given)
    given.check_fits(sites)
    spectrums = spectra_of(_observed(model, sites, calibration, given.rule, chosen, pieces))
    if example is None:
        example = batching.first(calibration, "calibration")
    return settle(given, model, sites, spectrums, example), spectrums


class Survey:
    """What plans are made from: spectra, and for guarded plans what every width costs by itself. Measured once, and
    then good for any number of targets: each gets the plan that `plan` makes for it alone.

    Args:
        options: all but their target counts.

    The others are those of `plan`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        calibration: Iterable[Batch],
        selection: Iterable[Batch] | None = None,
        example: Batch | None = None,
        sites: Sequence[Site] | None = None,
        metrics: Metrics | None = None,
        train: Iterable[Batch] | None = None,
        pieces: Pieces | None = None,
        options: Options,
    ):
        self.model, self.sites = _start(model, sites, calibration, train, options)
        if options.uniform:
            uniform_sites(self.sites)  # refused before anything takes time
        self.options, self.calibration, self.selection, self.pieces = options, calibration, selection, pieces
        began = time.monotonic()
        observed = _observed(self.model, self.sites, calibration, options.rule, options, pieces)
        self.seconds_observed = time.monotonic() - began
        self.spectrums: dict[str, tuple[Spectrum, ...]] = spectra_of(observed)
        self.example = batching.first(calibration, "calibration") if example is None else example
        self.metrics = metrics
        self.moments = moments_of(observed) if options.policy == "guarded" else {}
        self.published: dict[bool, Plan] = {}

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """What measures the losses."""
        metrics = self.metrics
        if metrics is None:
            metrics = metrics_of(self.model, self.sites, self.calibration, self.options, pieces=self.pieces)
        return Sensitivity(
            self.model,
            uniform_sites(self.sites) if self.options.uniform else self.sites,
            self.moments,
            self.calibration if self.selection is None else self.selection,
            metrics=metrics,
            bf16=precision_for(self.model, self.example, self.options.precision) == "bf16",
            pieces=self.pieces,
        )

    def plan(self, target: str | None) -> Plan:
        """The plan for this target."""
        chosen = replace(self.options, target=target)
        if chosen.policy == "paper":
            return self._make(chosen)
        published = self.published.get(is_timed(target))  # with times only where a target asks for them
        if published is None:
            published = self.published[is_timed(target)] = self._make(chosen)

        def again(curves: Mapping[str, Curve]) -> Plan:
            if published.costs is None:
                return self._make(chosen, curves)
            return retarget(published, self.spectrums, target=chosen.target, curves=curves)

        made = self.sensitivity.guarded(published, again)
        if self.selection is None:
            made = replace(made, remarks=(*made.remarks, f"{ON_CALIBRATION}: no others were given."))
        return made

    def _make(self, chosen: Options, curves: Mapping[str, Curve] | None = None) -> Plan:
        made = _make(self.model, self.sites, self.spectrums, self.example, chosen, curves)
        return replace(made, embedding_levels=chosen.embedding_levels, low_rank=chosen.low_rank)


def _start(
    model: nn.Module,
    sites: Sequence[Site] | None,
    calibration: Iterable[Batch],
    train: Iterable[Batch] | None,
    chosen: Options | Plan,
) -> tuple[nn.Module, tuple[Site, ...]]:
    """What cuts begin from: the model with its embedding in levels, and its sites, found where none are given."""
    model, example = unpacked(model), batching.first(calibration, "calibration")
    if sites is None:
        sites = find_sites(model, example, low_rank=chosen.low_rank)
    else:
        check_sites(model, sites, low_rank=chosen.low_rank)
    return in_levels(model, sites, calibration if train is None else train, chosen.embedding_levels)


def is_timed(target: str | None) -> bool:
    """Whether a target is one of latency."""
    return target is not None and Target.parse(target).cost == LATENCY


def _observed(
    model: nn.Module,
    sites: Sequence[Site],
    calibration: Iterable[Batch],
    rule: str,
    options: Options,
    pieces: Pieces | None,
) -> dict[str, tuple[Observed, ...]]:
    """The activations, with replicates if the rule looks at them."""
    seed = options.seed if "replicate" in RULES[rule].needs else None
    return observe(model, sites, calibration, pieces=pieces, replicate_seed=seed)


def _make(
    model: nn.Module,
    sites: Sequence[Site],
    spectrums: Mapping[str, Sequence[Spectrum]],
    example: Batch,
    chosen: Options,
    curves: Mapping[str, Curve] | None = None,
) -> Plan:
    """The plan of these curves; without, the published one, with a target only if that is what was asked for."""
    target = None if chosen.target is None else Target.parse(chosen.target)
    return make_plan(
        model,
        sites,
        spectrums,
        example,
        rule=chosen.rule,
        tau=chosen.tau,
        target=target if curves is not None or chosen.policy == "paper" else None,
        latency=LatencyTable.cached(model, sites, example) if is_timed(chosen.target) else None,
        multiple_of=chosen.multiple_of,
        min_share=chosen.min_share,
        uniform=chosen.uniform,
        max_loss=chosen.max_loss,
        curves=curves,
        exclude=chosen.exclude,
        keep=chosen.pairs,
    )


def narrow(
    model: nn.Module,
    plan: Plan,
    *,
    calibration: Iterable[Batch],
    sites: Sequence[Site] | None = None,
    metric: str = "fisher",
    precision: str = "auto",
    train: Iterable[Batch] | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Apply a plan in closed form: cut, check, train nothing. The model is left as it was.

    Args:
        model: the model that the plan was made from.
        plan: the widths to keep; edit them with `dataclasses.replace`, or in its JSON.
        calibration: batches whose activations choose the bases.
        sites: the widths that may be narrowed; those of the model's family by default.
        metric, precision: see `Options`.
        train: batches whose tokens are counted for `embedding_levels`; those of calibration by default.
        forward: class scores from the model and a batch, as `compress` takes it.

    Returns:
        A new, narrower, dense model in evaluation mode.

    Raises:
        PlanError: if the plan names other sites than the model has.
        SurgeryError: if the result differs from the projected full-width reference.
    """
    batching.check_again(calibration=calibration, train=train)
    calibration, train = called(calibration, forward), called(train, forward)
    check_module(model)
    model, every = _start(model, sites, calibration, train, plan)
    cut = narrowed(every, plan)
    options = Options(metric=metric, precision=precision)  # type: ignore[arg-type]
    metrics = metrics_of(model, cut, calibration, options)
    student, bases = cut_in_order(model, cut, plan.widths, calibration, metrics=metrics, blocks=blocks_of(every))
    check_cut(model, student, cut, bases, batching.head(batching.first(calibration, "calibration"), CHECK_ROWS))
    return (copy.deepcopy(student) if student is model else student).eval()


def metrics_of(
    model: nn.Module,
    sites: Sequence[Site],
    calibration: Iterable[Batch],
    options: Options,
    *,
    pieces: Pieces | None = None,
) -> Metrics:
    """The metrics that the options ask for: none for the identity, or where nothing is cut."""
    if options.metric == "output" or not sites:
        return {}
    bf16 = precision_for(model, batching.first(calibration, "calibration"), options.precision) == "bf16"
    return output_metrics(model, sites, calibration, seed=options.seed, bf16=bf16, pieces=pieces)


def narrowed(sites: Sequence[Site], plan: Plan) -> tuple[Site, ...]:
    """The sites of the model that the plan narrows; without the width of heads of which none is kept."""
    plan.check_fits(sites)
    widths = plan.widths
    gone = {name for name, width in widths.items() if width == 0}
    return tuple(site for site in sites if widths[site.name] < site.width and site.groups_of not in gone)
