"""The loop: measure, plan, then cut, check, distil and evaluate, round after round, until a stop rule speaks."""

import copy
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkd import artifact, progress, reporting
from rmtkd import batches as batching
from rmtkd.activations import collect, readers
from rmtkd.bases import Basis, bilinear_bases, linear_basis, unit_basis
from rmtkd.batches import Batch
from rmtkd.checkpoint import RunFolder
from rmtkd.covariance import Covariance
from rmtkd.distillation import Precision, Recovery, train
from rmtkd.environment import versions
from rmtkd.errors import DataError
from rmtkd.measurement import (
    Estimate,
    accuracy,
    chance_level,
    count_parameters,
    is_bf16_faster,
    measure,
    predict,
    proportion,
    time_forward,
)
from rmtkd.modules import randomize
from rmtkd.planning import Plan, Spectrum, Target, make_plan, settle, spectra_of
from rmtkd.schedule import History, Options, Round, stop_reason, too_much_lost
from rmtkd.sites import Site, by_width, find_family, find_sites
from rmtkd.surgery import check_cut, fold

CHECK_ROWS = 4
"""Rows of the selection set on which every cut is checked against its reference, in float64."""


@dataclass(frozen=True)
class Compressed:
    """A compressed model and the evidence: what was planned, what happened, what it costs now."""

    model: nn.Module
    plan: Plan
    rounds: tuple[Round, ...]
    record: dict[str, Any]
    """What `summary.json` holds."""

    def summary(self) -> str:
        """The result as a table of plain text."""
        return reporting.summary_table(self.record)

    def save(self, folder: str | Path, *, extra_files: Iterable[Path] = ()) -> None:
        """Write the model folder that `rmtkd.load` reads: weights, shapes, checksums, self-test, model card."""
        card = reporting.model_card(self.record, self.plan)
        artifact.save(self.model, Path(folder), card=card, provenance=self.record, extra_files=extra_files)


def compress(
    model: nn.Module,
    *,
    train: Iterable[Batch],
    selection: Iterable[Batch],
    report: Iterable[Batch] | None = None,
    calibration: Iterable[Batch] | None = None,
    example: Batch | None = None,
    plan: Plan | None = None,
    control: bool = False,
    out: str | Path | None = None,
    extra_files: Iterable[Path] = (),
    on_event: progress.Listener | None = None,
    **options: Any,
) -> Compressed:
    """Make a trained model narrower and let it recover by self-distillation. The model is left as it was.

    Args:
        model: a trained classifier of a supported family.
        train: batches for recovery; gone through several times.
        selection: labelled rows that nobody trained on; they steer the run and are never reported as its result.
        report: labelled rows for the result; read once, at the end.
        calibration: batches whose activations are seen; a share of `train` by default.
        example: the batch whose FLOPs and latency are measured; the first selection batch by default.
        plan: use the widths of this plan, which may have been changed by hand. What else it says is derived anew, and
            its target, rule, tau, multiple_of and min_share stand for those options.
        control: also train the same final shape from a random start for the same number of steps.
        out: run folder to write: configuration, plan, spectra, record, summary, model.
        extra_files: files to copy into the model folder (a tokenizer's).
        on_event: called with every event of the run.
        options: the fields of `Options`: target, tau, granularity, epochs, seed, ...

    Returns:
        The compressed model, in evaluation mode on `device`, with plan and record.

    Raises:
        RmtkdError: see `rmtkd.errors`; nothing that existed before is changed.
    """
    chosen = Options(**options)
    if plan is not None:
        chosen = chosen.follow(plan, given=options)
    if out is not None:
        RunFolder.check_free(Path(out))
    extra_files = artifact.check_extra_files(extra_files)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        run = _Run(model, train, selection, report, calibration, example, chosen, on_event)
        compressed = run.execute(plan, None if out is None else Path(out), control)
    if run.folder:
        compressed.save(run.folder.path / "model", extra_files=extra_files)
        run.folder.save_json("summary.json", compressed.record)
    return compressed


def plan(
    model: nn.Module,
    *,
    calibration: Iterable[Batch],
    example: Batch | None = None,
    given: Plan | None = None,
    **options: Any,
) -> tuple[Plan, dict[str, tuple[Spectrum, ...]]]:
    """The dry run: collect activations, look at the spectra, choose the widths. Trains and changes nothing.

    Args:
        model: the untouched model.
        calibration: batches whose activations are seen.
        example: the batch whose FLOPs are predicted; the first calibration batch by default.
        given: a plan whose widths are used instead of chosen ones.
        options: the fields of `Options`.

    Returns:
        The plan, and the spectra it was made from by site name.
    """
    chosen = Options(**options)
    sites = find_sites(model)
    if given is not None:
        given.check_fits(sites)
    spectrums = spectra_of(collect(model, sites, calibration))
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
        exclude=chosen.exclude,
        keep=chosen.pairs,
    )
    return made, spectrums


def fit_bases(model: nn.Module, site: Site, moments: Sequence[Covariance], keep: int) -> tuple[Basis, ...]:
    """The bases of one site's streams at width `keep`, from the moments of its activations."""
    if site.kind == "bilinear":
        queries, keys = moments
        # A constant added to all keys moves every score of a query alike, which softmax does not see: centre them.
        return bilinear_bases(queries.second_moment(), keys.covariance(), keep)
    form = {"linear": linear_basis, "pointwise": unit_basis}[site.kind]
    (moment,) = moments
    return (form(moment.covariance(), moment.mean, readers(model, site), keep),)


def cut_in_order(
    model: nn.Module, sites: Sequence[Site], widths: dict[str, int], calibration: Iterable[Batch]
) -> tuple[nn.Module, dict[str, tuple[Basis, ...]]]:
    """Cut sites one width after the other, shallow to deep, each on the activations that the cuts before it leave.

    Returns:
        The narrower model and the bases by site name.
    """
    bases: dict[str, tuple[Basis, ...]] = {}
    for group in by_width(sites).values():
        moments = collect(model, group, calibration)
        for site in group:
            bases[site.name] = fit_bases(model, site, moments[site.name], widths[site.name])
        model = fold(model, group, bases)
    return model, bases


def narrow(model: nn.Module, plan: Plan, *, calibration: Iterable[Batch]) -> nn.Module:
    """Apply a plan in closed form: cut, check, train nothing. The model is left as it was.

    Args:
        model: the model that the plan was made from.
        plan: the widths to keep; edit them with `dataclasses.replace`, or in its JSON.
        calibration: batches whose activations choose the bases.

    Returns:
        A new, narrower, dense model in evaluation mode.

    Raises:
        PlanError: if the plan names other sites than the model has.
        SurgeryError: if the result differs from the projected full-width reference.
    """
    sites = _narrowed(find_sites(model), plan)
    batches = list(calibration)
    student, bases = cut_in_order(model, sites, plan.widths, batches)
    check_cut(model, student, sites, bases, batching.head(batching.first(batches, "calibration"), CHECK_ROWS))
    return student.eval()


def _narrowed(sites: Sequence[Site], plan: Plan) -> tuple[Site, ...]:
    """The sites of the model that the plan narrows."""
    plan.check_fits(sites)
    return tuple(site for site in sites if plan.widths[site.name] < site.width)


class _Run:
    """The state of one run."""

    def __init__(
        self,
        model: nn.Module,
        train_rows: Iterable[Batch],
        selection: Iterable[Batch],
        report: Iterable[Batch] | None,
        calibration: Iterable[Batch] | None,
        example: Batch | None,
        options: Options,
        on_event: progress.Listener | None,
    ):
        self.family = find_family(model)
        self.model = copy.deepcopy(model).to(options.device).eval()
        self.train_rows, self.selection, self.report = train_rows, selection, report
        self.calibration = calibration or share_of(train_rows, options.calibration_share)
        self.example = batching.to(example or batching.first(selection, "selection"), options.device)
        self.options = options
        self.emit = progress.Emitter([on_event] if on_event else [])
        self.folder: RunFolder | None = None
        if report is not None:
            batching.first(report, "report")  # not read before the end, but there
        self.batches_per_epoch = sum(1 for _ in train_rows)
        if self.batches_per_epoch == 0:
            raise DataError("training rows must hold at least one batch. Got none. Pass more rows.")
        self.precision: Precision = "fp32"

    def execute(self, given: Plan | None, out: Path | None, control: bool) -> Compressed:
        """The story of a run, top to bottom."""
        options, emit = self.options, self.emit
        started = time.monotonic()
        baseline = check_teacher(self.model, self.selection)
        emit("start", options=options.to_dict(), selection_accuracy=asdict(baseline))
        made, spectrums = plan(
            self.model, calibration=self.calibration, example=self.example, given=given, **_fields(options)
        )
        emit("plan", predicted=made.predicted, widths=made.widths)
        queue = self.rounds_of(made)
        if out is not None:  # not before all input has proved good: a refused run leaves nothing behind
            self.folder = RunFolder.create(out, options)
            self.folder.save_plan(made, spectrums)
            emit.add(self.folder.append)
        if options.precision != "auto":
            self.precision = options.precision
        elif options.epochs > 0 and is_bf16_faster(copy.deepcopy(self.model).requires_grad_(True), self.example):
            self.precision = "bf16"

        steps = self.steps_of(len(queue))
        student, rounds = self.model, ()
        history = History(
            options=options,
            baseline_accuracy=baseline.value,
            rounds=(),
            pending=len(queue),
            meets_target=made.meets_target,
        )
        while (reason := stop_reason(history)) is None:
            sites = queue.pop(0)
            candidate, done = self.round(student, sites, made, len(rounds) + 1, steps[len(rounds)])
            history = replace(history, rounds=(*rounds, done), pending=len(queue))
            if too_much_lost(history):
                done = replace(done, rolled_back=True)
            else:
                student = candidate
            rounds = (*rounds, done)
            emit("round", **asdict(done))

        emit("measure")
        record = self.measure(student, rounds, reason)
        if control:
            record["control"] = self.control(student, sum(r.steps for r in rounds))
        record["seconds"] = time.monotonic() - started
        emit("done", stop_reason=reason)
        return Compressed(model=student, plan=made, rounds=rounds, record=record)

    def round(
        self, before: nn.Module, sites: Sequence[Site], made: Plan, number: int, steps: int
    ) -> tuple[nn.Module, Round]:
        """Cut, check, evaluate, recover, evaluate."""
        start = time.monotonic()
        self.emit("cut", number=number, sites=[site.name for site in sites])
        student, bases = cut_in_order(before, sites, made.widths, self.calibration)
        rows = batching.head(batching.first(self.selection, "selection"), CHECK_ROWS)
        error = check_cut(before, student, sites, bases, rows)
        cut = accuracy(student, self.selection)
        self.emit("check", number=number, error=error, selection_accuracy=cut.value)
        middle = time.monotonic()
        losses = self.recover(student, self.model if self.options.teacher == "original" else before, number, steps)
        after = accuracy(student, self.selection) if losses else cut
        return student, Round(
            number=number,
            sites=tuple(site.name for site in sites),
            widths={site.name: (site.width, made.widths[site.name]) for site in sites},
            parameters=count_parameters(student),
            check_error=error,
            accuracy_cut=cut.value,
            accuracy=after.value,
            steps=len(losses),
            loss_first=losses[0] if losses else None,
            loss_last=losses[-1] if losses else None,
            seconds_cut=middle - start,
            seconds_recovery=time.monotonic() - middle,
        )

    def recover(self, student: nn.Module, teacher: nn.Module | None, number: int, steps: int) -> list[float]:
        """Train the student, with progress events."""
        if steps == 0:
            return []
        return train(
            student,
            self.train_rows,
            steps=steps,
            first_epoch=number - 1,
            teacher=teacher,
            recovery=self.options.recovery,
            precision=self.precision,
            on_step=lambda step, loss: self.emit("step", number=number, step=step, steps=steps, loss=loss),
        )

    def rounds_of(self, made: Plan) -> list[tuple[Site, ...]]:
        """The sites that the plan narrows, in the portions that are cut between two recoveries."""
        key = {
            "site": lambda site: site.shares,
            "layer": lambda site: site.block,
            "round": lambda site: "",
        }[self.options.granularity]
        portions: dict[str, tuple[Site, ...]] = {}
        for site in _narrowed(find_sites(self.model), made):
            portions[key(site)] = (*portions.get(key(site), ()), site)
        return list(portions.values())

    def steps_of(self, rounds: int) -> list[int]:
        """The run's recovery steps dealt evenly to its rounds."""
        total = round(self.options.epochs * self.batches_per_epoch)
        return [total * (i + 1) // rounds - total * i // rounds for i in range(rounds)]

    def measure(self, student: nn.Module, rounds: tuple[Round, ...], reason: str) -> dict[str, Any]:
        """What both models cost and how well they do, measured side by side on the same rows and batch."""
        latencies = time_forward([self.model, student], self.example)
        record: dict[str, Any] = {}
        for name, model, latency in zip(("baseline", "compressed"), (self.model, student), latencies, strict=True):
            cost = measure(model, self.example, encoder=self.family.encoder, latency=latency).to_dict()
            cost["accuracy"] = None if self.report is None else asdict(accuracy(model, self.report))
            cost["accuracy_selection"] = asdict(accuracy(model, self.selection))
            record[name] = cost
        return {
            **record,
            "rounds": [asdict(done) for done in rounds],
            "stop_reason": reason,
            "config": self.options.to_dict(),
            "precision": self.precision,
            "seed": self.options.seed,
            "versions": versions(),
        }

    def control(self, student: nn.Module, steps: int) -> dict[str, Any]:
        """The same shape from a random start, distilled for as many steps: what the cut itself is worth."""
        scratch = copy.deepcopy(student)
        randomize(scratch, seed=self.options.seed)
        recovery = replace(self.options.recovery, freeze_embeddings=False)
        train(
            scratch,
            self.train_rows,
            steps=steps,
            teacher=self.model,
            recovery=recovery,
            precision=self.precision,
            on_step=lambda step, loss: self.emit("step", number=0, step=step, steps=steps, loss=loss),
        )
        rows = self.selection if self.report is None else self.report
        return {"start": "random", "steps": steps, "accuracy": asdict(accuracy(scratch, rows))}


def check_teacher(model: nn.Module, selection: Iterable[Batch]) -> Estimate:
    """Selection accuracy of the teacher.

    Raises:
        DataError: if labels are outside the head's range, or if the teacher does no better than always answering the
            commonest class: there is nothing to distil.
    """
    scores, labels = predict(model, selection)
    classes = scores.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(
            f"labels must be within 0..{classes - 1}, the range of the model's head. Got "
            f"{int(labels.min())}..{int(labels.max())}. Map the labels, or use a model with that many classes."
        )
    result = proportion(int((scores.argmax(-1) == labels).sum()), len(labels))
    chance = chance_level(labels)
    margin = 2 * math.sqrt(chance * (1 - chance) / len(labels))
    if result.value <= chance + margin:
        raise DataError(
            f"the teacher must do better than chance. It has {result.value:.1%} of {result.n} selection rows right, "
            f"always answering the commonest class {chance:.1%}. Train it first (`rmtkd train`), or check the labels."
        )
    return result


def share_of(rows: Iterable[Batch], share: float) -> list[Batch]:
    """An even share of the batches, of the first pass whatever has been read before."""
    if hasattr(rows, "set_epoch"):
        rows.set_epoch(0)  # type: ignore[attr-defined]
    return list(batching.every(rows, max(1, round(1 / share))))


def _fields(options: Options) -> dict[str, Any]:
    """The options as keyword arguments of `Options`."""
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


__all__ = ["Compressed", "Recovery", "compress", "cut_in_order", "fit_bases", "plan"]
