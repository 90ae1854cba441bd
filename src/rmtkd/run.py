"""The loop: measure, plan, then cut, check, distil and evaluate, round after round, until a stop rule speaks.

Where a run stands is saved after every round and now and then within one; `Run.execute` goes on from there.
"""

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd import artifact, progress, reporting
from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.checkpoint import RunFolder, checksum
from rmtkd.cutting import cut_in_order
from rmtkd.distillation import check_pair
from rmtkd.dry_run import CHECK_ROWS, Survey, metrics_of, narrowed, plan
from rmtkd.energy import measure_energy
from rmtkd.environment import Precision, check_device, machine, precision_on, versions
from rmtkd.errors import ArtifactError, RunError
from rmtkd.fisher import Metrics, fit
from rmtkd.forecast import Forecast, forecast
from rmtkd.interruption import Interrupted
from rmtkd.levels import in_levels
from rmtkd.measurement import (
    Estimate,
    accuracy,
    answers,
    compare,
    count_parameters,
    divergence,
    evaluation,
    time_forward,
)
from rmtkd.memory import Pieces, peak_bytes
from rmtkd.planning import Plan, Spectrum
from rmtkd.pretrained import presented
from rmtkd.recovering import CONTROL, AtOnce, Recoveries
from rmtkd.result import Compressed
from rmtkd.roles import Answered, Roles, check_report, check_teacher, fingerprint, fingerprint_of_all, share_of
from rmtkd.schedule import History, Options, Round, kept_widths, stop_reason, thinned, too_much_lost
from rmtkd.sensitivity import ROWS, spread
from rmtkd.sites import (
    Site,
    after_cuts,
    blocks_of,
    by_width,
    check_ranks,
    encoder_of,
    explore,
    is_known,
    share_settings,
)
from rmtkd.standing import Standing, shaped
from rmtkd.surgery import check_cut, tensors_of

Planned = tuple[Plan, Mapping[str, tuple[Spectrum, ...]]]
"""A plan, and by site the spectra that it was made from."""

ROUND_REPEATS = 10
"""Timed passes of each model after a round; the result is timed longer."""


@contextmanager
def seeded(options: Options) -> Iterator[None]:
    """Random numbers of our own, from the run's seed; afterwards the caller's go on as if nothing had been drawn.

    Raises:
        OptionError: if the run's device is not there.
    """
    device = torch.device(check_device(options.device))
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(options.seed)
        yield


class Run:
    """One run: its model, its rows, its options, and where it writes."""

    def __init__(
        self,
        model: nn.Module,
        rows: Roles,
        options: Options,
        *,
        sites: Sequence[Site] | None = None,
        teacher_model: nn.Module | None = None,
        control: bool = False,
        on_event: progress.Listener | None = None,
    ):
        self.is_own = sites is not None or not is_known(model)
        self.encoder = None if self.is_own else encoder_of(model)
        self.model = copy.deepcopy(model).to(options.device).eval()
        self.left_whole: tuple[str, ...] = ()
        if sites is None:
            found = explore(self.model, batching.first(rows.selection, "selection"), low_rank=options.low_rank)
            sites = found.sites
            if self.is_own and not options.low_rank:
                self.left_whole = tuple(f"What {path} writes stays whole: {why}." for path, why in found.whole.items())
        elif options.low_rank:
            check_ranks(sites)
        self.sites = tuple(sites)
        self.blocks = blocks_of(self.sites)
        self.options, self.with_control = options, control
        rows.check_again()
        self.emit = progress.Emitter([on_event] if on_event else [])
        self.pieces = Pieces(lambda count: self.emit("memory", pieces=count))
        self.train_rows = rows.train
        self.calibration = (
            share_of(rows.train, options.calibration_share) if rows.calibration is None else rows.calibration
        )
        self.measured_against: dict[str, str] = {}
        batching.first(rows.train, "training rows")
        told = "training" if rows.calibration is None else "calibration"
        seen = fingerprint(self.calibration, told)[0]
        self.fingerprints: dict[str, str] = {}
        self.selection = self._labelled("selection", rows.selection)
        self.report = None if rows.report is None else self._labelled("report", rows.report)
        self.example = batching.to(rows.example or batching.first(rows.selection, "selection"), options.device)
        batching.set_epoch(rows.train, 0)
        all_rows, self.batches_per_epoch = fingerprint_of_all(rows.train)
        self.fingerprints |= {"training rows": f"{all_rows} {self.batches_per_epoch} batches", "calibration rows": seen}
        self.teacher_model: nn.Module | None = None
        if teacher_model is not None:
            self.teacher_model = copy.deepcopy(teacher_model).to(options.device).eval()
            check_pair(self.model, self.teacher_model, self.example, self.blocks if options.recovery.hidden else ())
            self.fingerprints["teacher model"] = checksum(tensors_of(self.teacher_model))
        # What the first cut is made from: the same function as the teacher's.
        self.start, self.sites = in_levels(self.model, self.sites, rows.train, options.embedding_levels)
        self.precision: Precision = precision_on(options.device, options.precision)
        self.folder: RunFolder | None = None
        self.known: dict[str, Any] = {}

    @property
    def decided(self) -> Options:
        """The options with the precision that the run decided on."""
        return replace(self.options, precision=self.precision)

    @property
    def metrics(self) -> Metrics:
        """In which the errors of cuts are measured: those of the untouched model, for all rounds."""
        return self._once(
            "metrics", lambda: metrics_of(self.start, self.sites, self.calibration, self.decided, pieces=self.pieces)
        )

    def _once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What is known of the untouched model and its rows, by this run or one to another target."""
        if name not in self.known:
            with seeded(self.options):  # whenever it is first asked for, what is drawn later stays the same
                self.known[name] = measure()
        return self.known[name]

    def aimed(self, target: str) -> "Run":
        """The run with another target: what is known of model and rows is shared, its story is its own."""
        other = copy.copy(self)
        other.options, other.folder = replace(self.options, target=target), None
        other.emit = progress.Emitter(self.emit.listeners)
        other.pieces = Pieces(lambda count: other.emit("memory", pieces=count))
        return other

    def metrics_for(self, model: nn.Module, kept: Mapping[str, int]) -> Metrics:
        """The same; anew where outputs that sites are read into have been narrowed since."""
        if fit(self.metrics, model):
            return self.metrics
        return metrics_of(model, after_cuts(self.sites, kept), self.calibration, self.decided, pieces=self.pieces)

    def config(self) -> dict[str, Any]:
        """What it takes to start this run again, and by what to know that it is the same."""
        return {
            "options": self.options.to_dict(),
            "control": self.with_control,
            "made_with": made_with(),
            "precision": self.precision,
            "began_with": self.begins_with(),
        }

    def begins_with(self) -> dict[str, str]:
        """SHA-256 of the model and of the rows."""
        return {"model": checksum(tensors_of(self.model), repr(self.sites)), **self.fingerprints}

    def take_up(self, config: Mapping[str, Any]) -> list[str]:
        """Be the run that an earlier session began, by its `config.json`: in the precision that it decided on.

        Returns:
            What it began with and is another now.
        """
        self.precision = config.get("precision", self.precision)
        began, now = config["began_with"], self.begins_with()
        if "calibration rows" not in began:  # earlier versions knew training rows by those that calibration sees
            count = f"{self.batches_per_epoch} batches"
            now |= {"training rows": f"{now['calibration rows']} {count}", "calibration rows": None}
        return [name for name in {**began, **now} if began.get(name) != now.get(name)]

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
        started = time.monotonic()
        standing = begun or (self.go_on(folder) if folder else None)
        if standing is None:
            standing = self.begin(given, folder)
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
                    seconds = standing.seconds + time.monotonic() - started
                    standing.save(folder, seconds=seconds, pieces=self.pieces.count)
            self.emit("measure")
            record = self.measure(standing, reason)
            if self.with_control:
                record["control"] = self.control(standing.student, sum(done.steps for done in standing.rounds))
        except AtOnce:
            raise
        except (Interrupted, KeyboardInterrupt) as stop:
            return self.interrupted(standing, stop)
        record["seconds"] = standing.seconds + time.monotonic() - started
        record["model_checksum"] = checksum(artifact.weights_of(standing.student))
        compressed = self.result(standing.student, standing.plan, standing.rounds, record)
        if folder is not None:
            self.finish(folder, compressed, extra_files)
        self.emit("done", stop_reason=reason)
        return compressed

    # ------------------------------------------------------------------ beginning, going on, ending

    def look(self) -> Estimate:
        """Look at the teacher: it must have something to teach."""
        baseline = self._once("baseline", lambda: check_teacher(self.model, self.selection, pieces=self.pieces))
        if self.teacher_model is not None:
            self.taught_by()
        if self.report is not None and self.measured_against["report"] == "labels":  # now, and not after hours
            self._once("report", lambda: check_report(self.report or (), self.classes()))
        return baseline

    @property
    def first_teacher(self) -> nn.Module:
        """The untouched model, or the teacher model where the run has one."""
        return self.model if self.teacher_model is None else self.teacher_model

    def taught_by(self) -> dict[str, Any]:
        """How large the teacher of all rounds is, where it is a model of its own, and how well it does."""
        model = self.teacher_model
        assert model is not None
        found = self._once("teacher", lambda: check_teacher(model, self.selection, pieces=self.pieces))
        return {"parameters": count_parameters(model), "accuracy_selection": asdict(found)}

    def survey(self) -> Survey:
        """Measure what plans are made from."""
        return Survey(
            self.start,
            calibration=self.calibration,
            selection=self.selection,
            example=self.example,
            sites=self.sites,
            metrics=self.metrics if self.options.policy == "guarded" else None,
            pieces=self.pieces,
            options=self.decided,
        )

    def begin(self, given: Plan | None, folder: RunFolder | None, planned: Planned | None = None) -> Standing:
        """Look at the teacher and make the plan, if that was not done before."""
        baseline = self.look()
        self.emit("start", options=self.options.to_dict(), selection_accuracy=asdict(baseline))
        began = time.monotonic()
        made, spectrums = planned or self.planned(given)
        made = replace(made, remarks=(*made.remarks, *self.left_whole))
        standing = Standing(plan=made, baseline=baseline, student=self.start)
        self.emit("plan", predicted=standing.plan.predicted, widths=standing.plan.widths)
        self.emit("forecast", **asdict(self.forecast(standing.plan, time.monotonic() - began)))
        if folder is not None:
            folder.save_plan(standing.plan, spectrums)
            self.emit.add(folder.append)
            self.folder = folder
            standing.save(folder, seconds=0.0, pieces=self.pieces.count)
        return standing

    def planned(self, given: Plan | None) -> Planned:
        """The plan, and the spectra that it was made from. What else it took is let go."""
        if given is None:
            survey = self.survey()
            return survey.plan(self.options.target), survey.spectrums
        return plan(
            self.start,
            calibration=self.calibration,
            example=self.example,
            given=given,
            sites=self.sites,
            pieces=self.pieces,
            **fields_of(self.decided),
        )

    def go_on(self, folder: RunFolder) -> Standing | None:
        """Where the run stands by its folder; None if it has no plan yet."""
        loaded = Standing.load(folder, self.start, self.sites)
        if loaded is None:
            return None
        self.folder, (standing, self.pieces.count) = folder, loaded
        self.emit.listeners.append(folder.append)
        began, now = folder.config()["made_with"], made_with()
        changed = {name: [began.get(name), now.get(name)] for name in began | now if began.get(name) != now.get(name)}
        self.emit("resume", rounds=len(standing.rounds), changed=changed)
        return standing

    def finish(self, folder: RunFolder, compressed: Compressed, extra_files: Iterable[Path]) -> None:
        """Write the result, and the page about it. A run is finished when its summary is there."""
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
        student = shaped(self.start, self.sites, kept, weights)
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
        is_own = self.is_own
        return Compressed(
            model=student if is_own else presented(student),
            plan=made,
            rounds=rounds,
            record=record,
            sites=self.sites if is_own else None,
            example=self.example if is_own else None,
        )

    # ------------------------------------------------------------------ one round

    def round(self, standing: Standing, sites: Sequence[Site], number: int, steps: int) -> tuple[nn.Module, Round]:
        """Cut, check, evaluate, recover, evaluate. A round that was left in its recovery goes on there."""
        before, widths = standing.student, standing.plan.widths
        sites = after_cuts(sites, standing.kept)
        is_previous = self.teacher_model is None and self.options.teacher == "previous"
        teacher = before if is_previous else self.first_teacher
        saved = self.recoveries.saved_step(number)
        start = time.monotonic()
        if saved is None:
            self.emit("cut", number=number, sites=[site.name for site in sites])
            student, bases = cut_in_order(
                before,
                sites,
                widths,
                self.calibration,
                metrics=self.metrics_for(before, standing.kept),
                blocks=self.blocks,
                pieces=self.pieces,
                scratch=self.folder and self.folder.path / "last",
            )
            rows = batching.head(batching.first(self.selection, "selection"), CHECK_ROWS)
            error = check_cut(before, student, sites, bases, rows)
            cut = accuracy(student, self.selection, pieces=self.pieces)
            apart = self.apart(student)
            self.emit("check", number=number, error=error, selection_accuracy=cut.value, divergence=apart)
            facts = {"error": error, "accuracy_cut": cut.value, "divergence_cut": apart}
            facts["seconds_cut"] = time.monotonic() - start
        else:
            student = shaped(self.start, self.sites, standing.kept | {site.name: widths[site.name] for site in sites})
            facts = saved.facts
        lr = self.options.rate_after(facts.get("divergence_cut"))
        back = partial(self.apart, student) if self.options.blend else None
        losses, seconds, kept = self.recoveries.recover(
            student, teacher, number, steps, facts, saved, apart=back, lr=lr
        )
        after = accuracy(student, self.selection, pieces=self.pieces).value if losses else facts["accuracy_cut"]
        untouched, latency = time_forward([self.model, student], self.example, repeats=ROUND_REPEATS)
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
            seconds_recovery=seconds,
            divergence_cut=facts.get("divergence_cut"),
            divergence=self.apart(student) if losses else facts.get("divergence_cut"),
            lr=lr if losses else None,
            blend=kept,
            losses=thinned(losses),
            latency_ms=latency,
            latency_ms_untouched=untouched,
        )

    @property
    def recoveries(self) -> Recoveries:
        """The training after each cut, and of the control."""
        return Recoveries(
            options=self.options,
            rows=self.train_rows,
            batches_per_epoch=self.batches_per_epoch,
            calibration=self.calibration,
            blocks=self.blocks,
            precision=self.precision,
            pieces=self.pieces,
            folder=self.folder,
            emit=self.emit,
        )

    def apart(self, student: nn.Module) -> float:
        """How far the student's answers are from those of the first teacher, over some selection rows. Not from those
        of a round's teacher, which many small cuts may have taken far away."""
        rows, theirs = self._once("near", self._near)
        return divergence(student, theirs, rows, pieces=self.pieces)

    def _near(self) -> tuple[list[Batch], list[Tensor]]:
        """Those rows, and what the first teacher answers."""
        rows = spread(self.selection, ROWS)
        return rows, [answers(self.first_teacher, batch, self.pieces) for batch in rows]

    # ------------------------------------------------------------------ bookkeeping

    def forecast(self, made: Plan, seconds_plan: float) -> Forecast:
        """What the run will take."""
        control = 2 if self.with_control else 1
        return forecast(
            self.start,
            self.sites,
            made.widths,
            self.train_rows,
            steps=control * round(self.options.epochs * self.batches_per_epoch),
            recovery=self.options.recovery,
            blend=self.options.blend,
            precision=self.precision,
            calibration=self.calibration,
            seconds_plan=seconds_plan,
            teacher=self.teacher_model,
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
        groups = by_width(share_settings(self.sites) if made.uniform else self.sites).values()
        first = {site.name: group[0] for group in groups for site in group}
        key = {
            "site": lambda site: first[site.name].name,
            "layer": lambda site: first[site.name].block,
            "round": lambda site: "",
        }[self.options.granularity]
        portions: dict[str, tuple[Site, ...]] = {}
        for site in narrowed(self.sites, made):
            portions[key(site)] = (*portions.get(key(site), ()), site)
        return list(portions.values())

    def steps_of(self, rounds: int) -> list[int]:
        """The run's recovery steps dealt evenly to its rounds."""
        total = round(self.options.epochs * self.batches_per_epoch)
        return [total * (i + 1) // rounds - total * i // rounds for i in range(rounds)]

    def measure(self, standing: Standing, reason: str, *, report: bool = True) -> dict[str, Any]:
        """The record: what both models cost and how well they do, and how the run went."""
        rows = {"": self.report if report else None, "_selection": self.selection}
        costs = compare(self.model, standing.student, self.example, rows, encoder=self.encoder, pieces=self.pieces)
        calls = [partial(batching.logits, model, self.example) for model in (self.model, standing.student)]
        with evaluation(self.model, standing.student):
            energies = measure_energy(calls, torch.device(self.options.device)) if report else []
        for found, energy in zip(costs.values(), energies, strict=False):
            found["energy"] = energy.to_dict()
        return {
            **costs,
            "rounds": [asdict(done) for done in standing.rounds],
            "stop_reason": reason,
            "finished": True,
            "measured_against": self.measured_against,
            **({"teacher_model": self.taught_by()} if self.teacher_model is not None else {}),
            "classes": self.classes(),
            "config": self.options.to_dict(),
            "precision": self.precision,
            "peak_memory_bytes": peak_bytes(self.options.device),
            "seed": self.options.seed,
            "versions": versions(),
            "machine": machine(),
        }

    def classes(self) -> int:
        """Between how many classes the head chooses."""
        with evaluation(self.model):
            return batching.logits(self.model, batching.head(self.example, 1)).shape[1]

    def control(self, student: nn.Module, steps: int) -> dict[str, Any]:
        """The same shape from a random start, distilled for as many steps: what the cut itself is worth."""
        scratch = self.recoveries.from_nothing(student, self.first_teacher, steps)
        rows = self.selection if self.report is None else self.report
        return {"start": "random", "steps": steps, "accuracy": asdict(accuracy(scratch, rows, pieces=self.pieces))}

    def _labelled(self, role: str, rows: Iterable[Batch]) -> Iterable[Batch]:
        """Rows with labels: their own, or else the teacher's answers."""
        self.fingerprints[f"{role} rows"], has_labels = fingerprint(rows, role)
        self.measured_against[role] = "labels" if has_labels else "teacher"
        return rows if has_labels else Answered(rows, self.model, self.pieces)


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
