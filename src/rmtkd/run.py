"""The loop: measure, plan, then cut, check, distil and evaluate, round after round, until a stop rule speaks.

Where a run stands is saved after every round and now and then within one; `Run.execute` goes on from there.
"""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rmtkd import artifact, progress, reporting
from rmtkd import batches as batching
from rmtkd.checkpoint import RunFolder, checksum
from rmtkd.cutting import cut_in_order
from rmtkd.dry_run import CHECK_ROWS, narrowed, plan
from rmtkd.energy import measure_energy
from rmtkd.environment import machine, versions
from rmtkd.errors import ArtifactError, DataError, RunError
from rmtkd.forecast import Forecast, forecast
from rmtkd.interruption import Interrupted
from rmtkd.measurement import (
    accuracy,
    compare,
    count_parameters,
    evaluation,
    time_forward,
)
from rmtkd.memory import peak_bytes
from rmtkd.planning import Plan, Spectrum
from rmtkd.pretrained import presented
from rmtkd.recovering import CONTROL, AtOnce, Recoveries
from rmtkd.result import Compressed
from rmtkd.schedule import (
    History,
    Options,
    Round,
    kept_widths,
    number_or_none,
    stop_reason,
    thinned,
    too_much_lost,
)
from rmtkd.sites import (
    Site,
    after_cuts,
    by_width,
    share_settings,
)
from rmtkd.standing import Standing, shaped
from rmtkd.subject import Subject
from rmtkd.surgery import check_cut
from rmtkd.writing import written_to


class Planned(NamedTuple):
    """A plan, by site the spectra that it was made from, and the seconds that it took to see these."""

    plan: Plan
    spectrums: Mapping[str, tuple[Spectrum, ...]]
    seconds_observed: float


ROUND_REPEATS = 10
"""Timed passes of each model after a round; the result is timed longer."""


class Run:
    """One run: what it is about, its options, and where it writes.

    Args:
        subject: model and rows.
        options: with the target.
        control: whether the same shape is trained from a random start, too.
        emit: tells what happens.
    """

    def __init__(
        self, subject: Subject, options: Options, *, control: bool = False, emit: progress.Emitter | None = None
    ):
        self.subject, self.options, self.with_control = subject, options, control
        self.emit = emit or progress.Emitter()
        self.folder: RunFolder | None = None

    def config(self) -> dict[str, Any]:
        """What it takes to start this run again, and by what to know that it is the same."""
        return {
            "options": self.options.to_dict(),
            "control": self.with_control,
            "made_with": made_with(),
            "precision": self.subject.precision,
            "began_with": self.subject.begins_with(),
        }

    def execute(
        self,
        given: Plan | None = None,
        folder: RunFolder | None = None,
        extra_files: Iterable[Path] = (),
        *,
        begun: Standing | None = None,
    ) -> Compressed:
        """The story of a run, top to bottom, from wherever it stands: what was begun, or what the folder says."""
        if folder is not None and (record := folder.summary()) is not None:
            return self.finished(folder, record)
        self.subject.pieces.on_halved = lambda count: self.emit("memory", pieces=count)
        standing = begun or (self.go_on(folder) if folder else None)
        if standing is None:
            standing = self.begin(given, folder)
        standing.since = time.monotonic()
        queue = self.portions(standing.plan)
        steps = self.steps_of(len(queue))
        try:
            while (reason := stop_reason(history := self.history(standing, len(queue)))) is None:
                number = len(standing.rounds) + 1
                candidate, done = self.round(standing, queue[number - 1], number, steps[number - 1])
                if too_much_lost(replace(history, rounds=(*standing.rounds, done))):
                    done = replace(done, rolled_back=True)
                else:
                    standing.student = candidate
                standing.rounds = (*standing.rounds, done)
                self.emit("round", **asdict(done))
                if folder is not None:
                    standing.save(folder, pieces=self.subject.pieces.count)
            self.emit("measure")
            record = self.measure(standing, reason)
            if self.with_control and standing.kept:  # what nothing was cut from has the shape of the teacher
                record["control"] = self.control(standing)
        except AtOnce:
            raise
        except (Interrupted, KeyboardInterrupt) as stop:
            return self.interrupted(standing, stop)
        record["seconds"] = standing.spent()
        record["model_checksum"] = checksum(artifact.weights_of(standing.student))
        compressed = self.result(standing.student, standing.plan, standing.rounds, record)
        if folder is not None:
            self.finish(folder, compressed, extra_files)
        self.emit("done", stop_reason=reason)
        return compressed

    # ------------------------------------------------------------------ beginning, going on, ending

    def begin(self, given: Plan | None, folder: RunFolder | None, planned: Planned | None = None) -> Standing:
        """Look at the teacher and make the plan, if that was not done before."""
        subject, began = self.subject, time.monotonic()
        self.emit("start", options=self.options.to_dict(), selection_accuracy=asdict(subject.baseline))
        made, spectrums, seconds = planned or self.planned(given)
        made = replace(made, remarks=(*made.remarks, *subject.remarks))
        standing = Standing(plan=made, baseline=subject.baseline, student=subject.start, since=began)
        self.emit("plan", predicted=standing.plan.predicted, widths=standing.plan.widths)
        self.emit("forecast", **asdict(self.forecast(standing.plan, seconds)))
        if folder is not None:
            folder.save_plan(standing.plan, spectrums)
            self.emit.add(folder.append)
            self.folder = folder
            standing.save(folder, pieces=subject.pieces.count)
        standing.seconds = standing.spent()
        return standing

    def planned(self, given: Plan | None) -> Planned:
        """The plan, and the spectra that it was made from. What else it took is let go."""
        subject = self.subject
        if given is None:
            survey = subject.survey()
            return Planned(subject.planned(survey, self.options.target), survey.spectrums, survey.seconds_observed)
        began = time.monotonic()
        made, spectrums = plan(
            subject.start,
            calibration=subject.calibration,
            example=subject.example,
            given=given,
            sites=subject.sites,
            pieces=subject.pieces,
            **fields_of(replace(self.options, precision=subject.precision)),
        )
        return Planned(subject.check_hidden(made), spectrums, time.monotonic() - began)

    def go_on(self, folder: RunFolder) -> Standing | None:
        """Where the run stands by its folder; None if it has no plan yet."""
        loaded = Standing.load(folder, self.subject.start, self.subject.sites)
        if loaded is None:
            return None
        self.folder, (standing, self.subject.pieces.count) = folder, loaded
        folder.hold_plan(standing.plan)
        self.emit.listeners.append(folder.append)
        began, now = folder.config()["made_with"], made_with()
        changed = {name: [began.get(name), now.get(name)] for name in began | now if began.get(name) != now.get(name)}
        self.emit("resume", rounds=len(standing.rounds), changed=changed)
        return standing

    def finish(self, folder: RunFolder, compressed: Compressed, extra_files: Iterable[Path]) -> None:
        """Write the result, and the page about it. A run is finished when its summary is there."""
        with written_to(folder.path):
            for name in ("model", "model-so-far"):
                if (folder.path / name).exists():  # of a session that ended before its summary
                    shutil.rmtree(folder.path / name)
            compressed.save(folder.path / "model", extra_files=extra_files)
        folder.save_json("summary.json", compressed.record)
        folder.drop_state()
        report_on(folder.path, self.emit)

    def finished(self, folder: RunFolder, record: dict[str, Any]) -> Compressed:
        """What a finished run returned."""
        made = folder.plan()
        if made is None:
            raise RunError(f"a finished run must hold plan.json. {folder.path} does not. Restore it.")
        try:
            rounds, reason = tuple(Round.from_dict(done) for done in record["rounds"]), record["stop_reason"]
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{folder.path / 'summary.json'} must be as it was written. Reading it gave: {error!r}. Restore it."
            ) from error
        self.emit("finished", stop_reason=reason)
        kept = kept_widths(rounds)
        weights = artifact.load_weights(folder.path / "model")
        if checksum(weights) != record.get("model_checksum"):
            raise ArtifactError(
                f"{folder.path / 'model'} must hold the weights that the run ended with. They are others. Restore "
                "it, or compress again into another folder."
            )
        student = shaped(self.subject.start, self.subject.sites, kept, weights)
        return self.result(student, made, rounds, record)

    def interrupted(self, standing: Standing, stop: BaseException) -> Compressed:
        """The model as it is: in the middle of its round, or of the last one that is over."""
        student, where, kept = standing.student, f"after {len(standing.rounds)} rounds", standing.kept
        if isinstance(stop, Interrupted):
            number, where, trained = stop.args
            if number != CONTROL:
                cut = after_cuts(self.portions(standing.plan)[number - 1], kept)
                student, kept = trained, kept | {site.name: standing.plan.widths[site.name] for site in cut}
        reason = f"interrupted {where}"
        self.emit("interrupted", where=where)
        standing = replace(standing, student=student.eval())
        record = {**self.measure(standing, reason, report=False), "finished": False, "widths": kept}
        return self.result(student, standing.plan, standing.rounds, record)

    def result(self, student: nn.Module, made: Plan, rounds: tuple[Round, ...], record: dict[str, Any]) -> Compressed:
        """What the run gives back: a model of transformers in a class that says its widths."""
        subject = self.subject
        return Compressed(
            model=student if subject.is_own else presented(student),
            plan=made,
            rounds=rounds,
            record=record,
            sites=subject.sites if subject.is_own else None,
            example=subject.example if subject.is_own else None,
        )

    # ------------------------------------------------------------------ one round

    def round(self, standing: Standing, sites: Sequence[Site], number: int, steps: int) -> tuple[nn.Module, Round]:
        """Cut, check, evaluate, recover, evaluate. A round that was left in its recovery goes on there."""
        subject = self.subject
        before, widths = standing.student, standing.plan.widths
        sites = after_cuts(sites, standing.kept)
        is_previous = subject.teacher_model is None and self.options.teacher == "previous"
        teacher = before if is_previous else subject.first_teacher
        saved = self.recoveries.saved_step(number)
        start = time.monotonic()
        if saved is None:
            self.emit("cut", number=number, sites=[site.name for site in sites])
            student, bases = cut_in_order(
                before,
                sites,
                widths,
                subject.calibration,
                metrics=subject.metrics_for(before, standing.kept),
                blocks=subject.blocks,
                pieces=subject.pieces,
                scratch=self.folder and self.folder.path / "last",
            )
            rows = batching.head(batching.first(subject.selection, "selection"), CHECK_ROWS)
            error = check_cut(before, student, sites, bases, rows)
            cut = accuracy(student, subject.selection, pieces=subject.pieces)
            apart = number_or_none(subject.apart(student))
            self.emit("check", number=number, error=error, selection_accuracy=cut.value, divergence=apart)
            facts: dict[str, Any] = {"error": error, "accuracy_cut": cut.value, "divergence_cut": apart}
            facts |= {"seconds_cut": time.monotonic() - start, "seconds_run": standing.spent()}
        else:
            standing.count(saved.facts)
            kept = standing.kept | {site.name: widths[site.name] for site in sites}
            student = shaped(subject.start, subject.sites, kept)
            facts = saved.facts
        lr = self.options.rate_after(facts.get("divergence_cut"))
        back = partial(subject.apart, student) if self.options.blend else None
        taken = sum(done.steps for done in standing.rounds)
        recovered = self.recoveries.recover(
            student,
            teacher,
            number,
            steps,
            facts,
            saved,
            taken=taken,
            pass_began=standing.pass_began,
            apart=back,
            lr=lr,
        )
        losses, standing.pass_began = recovered.losses, recovered.pass_began
        after = accuracy(student, subject.selection, pieces=subject.pieces).value if losses else facts["accuracy_cut"]
        untouched, latency = time_forward([subject.model, student], subject.example, repeats=ROUND_REPEATS)
        return student, Round(
            number=number,
            sites=tuple(site.name for site in sites),
            widths={site.name: (site.width, widths[site.name]) for site in sites},
            parameters=count_parameters(student),
            check_error=facts["error"],
            accuracy_cut=facts["accuracy_cut"],
            accuracy=after,
            steps=len(losses),
            loss_first=losses[0] if losses else None,
            loss_last=losses[-1] if losses else None,
            seconds_cut=facts["seconds_cut"],
            seconds_recovery=recovered.seconds,
            divergence_cut=facts.get("divergence_cut"),
            divergence=subject.apart(student) if losses else facts.get("divergence_cut"),
            lr=lr if losses else None,
            blend=recovered.share,
            way=recovered.way,
            losses=thinned(losses),
            latency_ms=latency,
            latency_ms_untouched=untouched,
        )

    @property
    def recoveries(self) -> Recoveries:
        """The training after each cut, and of the control."""
        subject = self.subject
        return Recoveries(
            options=self.options,
            rows=subject.train,
            batches_per_epoch=subject.batches_per_epoch,
            calibration=subject.calibration,
            blocks=subject.blocks,
            precision=subject.precision,
            pieces=subject.pieces,
            folder=self.folder,
            emit=self.emit,
        )

    # ------------------------------------------------------------------ bookkeeping

    def forecast(self, made: Plan, seconds_observed: float) -> Forecast:
        """What the run will take."""
        subject = self.subject
        control = 2 if self.with_control else 1
        return forecast(
            subject.start,
            subject.sites,
            made.widths,
            subject.train,
            steps=control * self.options.steps(subject.batches_per_epoch),
            recovery=self.options.recovery,
            blend=self.options.blend,
            precision=subject.precision,
            calibration=subject.calibration,
            seconds_observed=seconds_observed,
            teacher=subject.teacher_model,
        )

    def history(self, standing: Standing, portions: int) -> History:
        """What stop rules look at."""
        return History(
            options=self.options,
            baseline_accuracy=standing.baseline.value,
            rounds=standing.rounds,
            pending=portions - len(standing.rounds),
            meets_target=standing.plan.meets_target,
        )

    def portions(self, made: Plan) -> list[tuple[Site, ...]]:
        """The sites that the plan narrows, in the portions that are cut between two recoveries. Sites that share a
        width are never parted: where they lie in several layers, they are cut with the first."""
        groups = by_width(share_settings(self.subject.sites) if made.uniform else self.subject.sites).values()
        first = {site.name: group[0] for group in groups for site in group}
        key = {
            "site": lambda site: first[site.name].name,
            "layer": lambda site: first[site.name].block,
            "round": lambda site: "",
        }[self.options.granularity]
        portions: dict[str, tuple[Site, ...]] = {}
        for site in narrowed(self.subject.sites, made):
            portions[key(site)] = (*portions.get(key(site), ()), site)
        return list(portions.values())

    def steps_of(self, rounds: int) -> list[int]:
        """The run's recovery steps dealt evenly to its rounds."""
        total = self.options.steps(self.subject.batches_per_epoch)
        return [total * (i + 1) // rounds - total * i // rounds for i in range(rounds)]

    def measure(self, standing: Standing, reason: str, *, report: bool = True) -> dict[str, Any]:
        """The record: what both models cost and how well they do, and how the run went."""
        subject = self.subject
        rows = {"": subject.report if report else None, "_selection": subject.selection}
        models = subject.model, standing.student
        costs = compare(*models, subject.example, rows, encoder=subject.encoder, pieces=subject.pieces)
        calls = [partial(batching.logits, model, subject.example) for model in models]
        with evaluation(*models):
            energies = measure_energy(calls, torch.device(self.options.device)) if report else []
        for found, energy in zip(costs.values(), energies, strict=False):
            found["energy"] = energy.to_dict()
        return {
            **costs,
            "rounds": [asdict(done) for done in standing.rounds],
            "stop_reason": reason,
            "finished": True,
            "measured_against": subject.measured_against,
            **({"teacher_model": subject.taught_by()} if subject.teacher_model is not None else {}),
            "classes": subject.classes,
            "config": self.options.to_dict(),
            "precision": subject.precision,
            "peak_memory_bytes": peak_bytes(self.options.device),
            "seed": self.options.seed,
            "versions": versions(),
            "machine": machine(),
        }

    def control(self, standing: Standing) -> dict[str, Any]:
        """The same shape from a random start, distilled for as many steps: what the cut itself is worth.

        Not every shape can be trained from there: then it has no accuracy, but the run still its model.
        """
        subject, saved = self.subject, self.recoveries.saved_step(CONTROL)
        if saved is not None:
            standing.count(saved.facts)
        facts = {"seconds_run": standing.spent()} if saved is None else saved.facts
        steps = sum(done.steps for done in standing.rounds if not done.rolled_back)
        told = {"start": "random", "steps": steps}
        rows = subject.selection if subject.report is None else subject.report
        try:
            scratch = self.recoveries.from_nothing(standing.student, subject.first_teacher, steps, facts, saved)
            return {**told, "accuracy": asdict(accuracy(scratch, rows, pieces=subject.pieces))}
        except DataError as error:
            return {**told, "accuracy": None, "failed": str(error)}


def report_on(folder: Path, emit: progress.Emitter) -> None:
    """Write the page of a folder. If that fails, say so: what the folder holds is there and whole."""
    try:
        reporting.write_report(folder)
    except Exception as error:  # whatever a page may fail of
        emit("unreported", folder=str(folder), reason=str(error) or type(error).__name__)


def made_with() -> dict[str, str]:
    """What the last bits of a result depend on: versions, and the number of threads."""
    return {**versions(), "threads": str(torch.get_num_threads())}


def fields_of(options: Options) -> dict[str, Any]:
    """The options as keyword arguments of `Options`."""
    return {name: getattr(options, name) for name in options.__dataclass_fields__}
