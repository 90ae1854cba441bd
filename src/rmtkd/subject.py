"""What runs are about: a model, its rows by role, and what is measured of them before anything is cut."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.calibration import share_of
from rmtkd.checkpoint import checksum
from rmtkd.distillation import check_blocks, check_pair
from rmtkd.dry_run import Survey, metrics_of
from rmtkd.environment import Precision, precision_on
from rmtkd.errors import OptionError, PlanError, UnsupportedModelError
from rmtkd.fisher import Metrics, fit
from rmtkd.levels import in_levels
from rmtkd.measurement import Estimate, answers, count_parameters, divergence, evaluation, precision_for
from rmtkd.memory import Pieces
from rmtkd.modules import check_module, packing_rows, plain_copy
from rmtkd.norms import as_gathered
from rmtkd.planning import Plan, check_described
from rmtkd.pretrained import check_presentable
from rmtkd.progress import Emitter
from rmtkd.roles import (
    ANEW,
    Answered,
    Roles,
    check_packed,
    check_report,
    check_teacher,
    fingerprint,
    fingerprint_of_training,
)
from rmtkd.schedule import Options
from rmtkd.seeding import seeded
from rmtkd.sensitivity import ROWS, every_nth_row
from rmtkd.sites import Site, after_cuts, blocks_of, check_sites, encoder_of, explore, is_known
from rmtkd.storage import tensors_of
from rmtkd.surgery import fill_with_ones, skeleton


class Subject:
    """What a run is about, or several runs to different targets.

    Args:
        model: is copied, and never changed.
        rows: by role.
        options: of the runs; no target is read.
        sites: of a model whose family is not known; found by default.
        teacher_model: what students learn from, if it is not the model.
        emit: tells how far rows have been read.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Roles,
        options: Options,
        *,
        sites: Sequence[Site] | None = None,
        teacher_model: nn.Module | None = None,
        emit: Emitter | None = None,
    ):
        self.emit = emit or Emitter()
        self.is_own = sites is not None or not is_known(model)
        self.encoder = None if self.is_own else encoder_of(model)
        if not self.is_own:
            check_presentable(model)
        self.model = _copied(model).to(options.device).eval()
        self.packs = list(packing_rows(model))
        """Paths of modules that pack rows in the user's model, and do not in ours."""
        self.remarks: tuple[str, ...] = ()
        """For the plan: what users would want to know."""
        rows.check_again()
        example = batching.first(rows.selection, "selection")
        if sites is None:
            found = explore(self.model, example, low_rank=options.low_rank)
            sites = found.sites
            if self.is_own and not options.low_rank:
                self.remarks = tuple(f"What {path} writes stays whole: {why}." for path, why in found.whole.items())
        else:
            check_sites(self.model, sites, low_rank=options.low_rank)
            check_described(self.model, sites, example)
        self.sites = tuple(sites)
        self.blocks = blocks_of(self.sites)
        self.options = options
        self.pieces = Pieces()
        self.train = rows.train
        watch = partial(self.emit.reading, role="training")
        self.calibration = (
            share_of(rows.train, options.calibration_share, watch) if rows.calibration is None else rows.calibration
        )
        self.measured_against: dict[str, str] = {}
        batching.first(rows.train, "training")
        told = "training" if rows.calibration is None else "calibration"
        seen = fingerprint(self.emit.reading(self.calibration, told), told)[0]
        self.fingerprints: dict[str, str] = {}
        self.selection = self._labelled("selection", rows.selection)
        self.report = None if rows.report is None else self._labelled("report", rows.report)
        self.example = batching.to(rows.example or example, options.device)
        if options.epochs > 0:
            _check_training(self.model, self.example)
        all_rows, self.batches_per_epoch = fingerprint_of_training(rows.train, options.device, self.classes, watch)
        if all_rows == ANEW:
            seen = ANEW if rows.calibration is None else seen
            self.remarks += (f"Training rows are {ANEW}, by random numbers that no seed sets: each run has others.",)
            if options.embedding_levels > 1:
                raise OptionError(
                    "embedding_levels counts the tokens of all training rows, which must be the same when a run goes "
                    f"on. These are {ANEW}, by random numbers that no seed sets. Draw them by those of torch, random "
                    "or numpy, which are set from `seed`; or leave embedding_levels at 1."
                )
        self.fingerprints |= {"training rows": f"{all_rows} {self.batches_per_epoch} batches", "calibration rows": seen}
        self.teacher_model: nn.Module | None = None
        if teacher_model is not None:
            self.teacher_model = _copied(teacher_model).to(options.device).eval()
            self.packs_of_teacher = list(packing_rows(teacher_model))
            check_pair(self.model, self.teacher_model, self.example, self.blocks if options.recovery.hidden else ())
            self.fingerprints["teacher model"] = checksum(tensors_of(self.teacher_model))
        # What the first cut is made from: the same function as the teacher's.
        self.start, self.sites = in_levels(self.model, self.sites, rows.train, options.embedding_levels)
        self.precision: Precision = precision_for(self.start, self.example, options.precision)
        if self.precision != precision_on(options.device, options.precision):
            self.remarks += ("In bf16, which this machine is faster in, the model does not run: all is in 32 bits.",)

    def _labelled(self, role: str, rows: Iterable[Batch]) -> Iterable[Batch]:
        """Rows with labels: their own, or else the teacher's answers."""
        self.fingerprints[f"{role} rows"], has_labels = fingerprint(self.emit.reading(rows, role), role)
        if not has_labels:
            batching.check_labels_named(self.model, batching.first(rows, role))
        self.measured_against[role] = "labels" if has_labels else "teacher"
        return rows if has_labels else Answered(rows, self.model, self.pieces)

    # ------------------------------------------------------------------ the same as before?

    def begins_with(self) -> dict[str, str]:
        """SHA-256 of the model and of the rows."""
        return {"model": checksum(tensors_of(self.model), repr(self.sites)), **self.fingerprints}

    def take_up(self, config: Mapping[str, Any]) -> list[str]:
        """Be what an earlier session's run was about, by its `config.json`: in the precision that it decided on.

        Returns:
            What the run began with and is another now.
        """
        self.precision = config.get("precision", self.precision)
        began, now = config["began_with"], self.begins_with()
        if "calibration rows" not in began:  # earlier versions knew training rows by those that calibration sees
            count = f"{self.batches_per_epoch} batches"
            now |= {"training rows": f"{now['calibration rows']} {count}", "calibration rows": None}
        return [name for name in {**began, **now} if began.get(name) != now.get(name)]

    # ------------------------------------------------------------------ what is measured once

    @cached_property
    def baseline(self) -> Estimate:
        """Selection accuracy of the untouched model. What would be refused after hours is looked at, too."""
        if self.options.recovery.hidden and not self.blocks:
            raise OptionError(
                f"hidden must be 0 for a model whose sites lie in no blocks: there is nothing to compare. Got "
                f"{self.options.recovery.hidden:g} for {type(self.model).__name__}. Leave it out."
            )
        with self._seeded():
            found = check_teacher(self.model, self.selection, pieces=self.pieces)
            check_packed(self.model, self.packs, self.selection)
        if self.teacher_model is not None:
            with self._seeded():
                check_packed(self.teacher_model, self.packs_of_teacher, self.selection)
            self.taught_by()
        if self.report is not None and self.measured_against["report"] == "labels":
            with self._seeded():
                check_report(self.report, self.classes)
        return found

    @property
    def first_teacher(self) -> nn.Module:
        """The untouched model, or the teacher model where there is one."""
        return self.model if self.teacher_model is None else self.teacher_model

    def taught_by(self) -> dict[str, Any]:
        """How large the teacher of all rounds is, where it is a model of its own, and how well it does."""
        parameters = count_parameters(self.first_teacher)
        return {"parameters": parameters, "accuracy_selection": asdict(self._taught_by)}

    @cached_property
    def _taught_by(self) -> Estimate:
        with self._seeded():
            return check_teacher(self.first_teacher, self.selection, pieces=self.pieces)

    @cached_property
    def classes(self) -> int:
        """Between how many classes the head chooses."""
        with evaluation(self.model):
            scores = batching.logits(self.model, batching.head(self.example, 1))
        if scores.ndim != 2:
            raise UnsupportedModelError(
                f"a model must give a score for every class, [rows, classes]. {type(self.model).__name__} gave "
                f"{list(scores.shape)} for one row. Pass a forward= that gives them; nothing was changed."
            )
        return scores.shape[1]

    @property
    def decided(self) -> Options:
        """The options with the precision that was decided on."""
        return replace(self.options, precision=self.precision)

    @cached_property
    def metrics(self) -> Metrics:
        """In which the errors of cuts are measured: those of the untouched model, for all rounds."""
        with self._seeded():
            return metrics_of(self.start, self.sites, self.calibration, self.decided, pieces=self.pieces)

    def metrics_for(self, model: nn.Module, kept: Mapping[str, int]) -> Metrics:
        """The same; anew where outputs that sites are read into have been narrowed since."""
        if fit(self.metrics, model):
            return self.metrics
        return metrics_of(model, after_cuts(self.sites, kept), self.calibration, self.decided, pieces=self.pieces)

    def survey(self) -> Survey:
        """Measure what plans are made from, of a teacher that has something to teach."""
        _ = self.baseline
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

    def planned(self, survey: Survey, target: str | None) -> Plan:
        """The plan for this target.

        Raises:
            PlanError: if it cannot be met: with what of the network stays whole.
            OptionError: see `check_hidden`.
        """
        try:
            made = survey.plan(target)
        except PlanError as error:
            raise PlanError("\n".join((str(error), *self.remarks))) from error
        return self.check_hidden(made)

    def check_hidden(self, made: Plan) -> Plan:
        """Return the plan, if what it leaves of the model can be taught hidden states, where it shall be.

        Raises:
            OptionError: if it narrows what blocks put out.
        """
        if self.options.recovery.hidden:
            with self._seeded():
                student = skeleton(self.start, self.sites, made.widths)
                fill_with_ones(student, self.options.device)
                check_blocks(student, self.start, self.example, self.blocks)
        return made

    def apart(self, student: nn.Module) -> float:
        """How far the student's answers are from those of the first teacher, over some selection rows, in nats. Not
        from those of a round's teacher, which many small cuts may have taken far away."""
        rows, theirs = self._near
        return divergence(student, theirs, rows, pieces=self.pieces)

    @cached_property
    def _near(self) -> tuple[list[Batch], list[Tensor]]:
        """Those rows, and what the first teacher answers."""
        with self._seeded():
            rows = every_nth_row(self.selection, ROWS)
            return rows, [answers(self.first_teacher, batch, self.pieces) for batch in rows]

    def _seeded(self) -> AbstractContextManager[None]:
        """Whenever something is first asked for, what is drawn later stays the same."""
        return seeded(self.options.seed, self.options.device)


def _check_training(model: nn.Module, example: Batch) -> None:
    """Run two rows as recovery will: in training a forward may give other things than class scores.

    Raises:
        UnsupportedModelError: if it does.
    """
    student, rows = copy.deepcopy(model).train(), batching.head(example, 2)
    norms = as_gathered(student) if batching.rows(rows) == 1 else nullcontext()
    with seeded(None, next(model.parameters()).device), torch.no_grad(), norms:
        batching.logits(student, rows)


def _copied(model: nn.Module) -> nn.Module:
    """A copy of its own.

    Raises:
        UnsupportedModelError: if it is none, or cannot be copied: compiled, or with weights that hooks compute.
    """
    check_module(model)
    if isinstance(plain := getattr(model, "_orig_mod", None), nn.Module):
        raise UnsupportedModelError(
            f"the model must not be compiled. Got a compiled {type(plain).__name__}. Pass what torch.compile was "
            "given; nothing was changed."
        )
    try:
        return plain_copy(model)
    except Exception as error:  # whatever its own code may raise
        raise UnsupportedModelError(
            f"the model must be one that copy.deepcopy can copy. {type(model).__name__} gave: {error!r}. Weights that "
            "hooks compute can be made permanent (torch.nn.utils.remove_weight_norm, remove_spectral_norm); nothing "
            "was changed."
        ) from error
