"""The training after each cut of a run: it can be left between any two steps, saved, and gone on with.

What it writes is `last/step` in the folder of the run. A state of a round that is over counts for nothing.
"""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from rmtkd.batches import Batch
from rmtkd.blending import Way, blend
from rmtkd.checkpoint import RunFolder
from rmtkd.distillation import Recovery, Teacher
from rmtkd.environment import Precision
from rmtkd.errors import RunError
from rmtkd.interruption import Asked, Interrupted, interruptible
from rmtkd.memory import Pieces
from rmtkd.modules import randomize
from rmtkd.norms import batch_norms, gather_statistics
from rmtkd.progress import Emitter
from rmtkd.schedule import Options
from rmtkd.training import Phase, PhaseState

START = "start."
"""Begins the names of the parameters before recovery, in what is saved within a round."""

CONTROL = 0
"""The number under which the control's training goes; rounds begin at 1."""


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What a recovery came to.

    Attributes:
        losses: of every step.
        seconds: of all sessions.
        share: of recovery that is kept, where the weights were blended with those of the cut.
        way: see `blending.Way`; empty where they were not.
        pass_began: the random numbers with which the pass through the rows began in which it ended.
    """

    losses: list[float]
    seconds: float
    share: float | None = None
    way: Way = ()
    pass_began: Tensor | None = None


class AtOnce(KeyboardInterrupt):
    """Ctrl-C came a second time: nothing more is done."""


@dataclass(frozen=True, kw_only=True)
class Recoveries:
    """All that the recoveries of a run have in common.

    Attributes:
        options: of the run.
        rows: training batches.
        batches_per_epoch: how many these are.
        calibration: batches that norms gather their statistics from on the way back to a cut.
        blocks: paths of the modules whose outputs `options.recovery.hidden` compares.
        precision: of training.
        pieces: in how many pieces a batch is run.
        folder: of the run, if it has one.
        emit: tells events.
    """

    options: Options
    rows: Iterable[Batch]
    batches_per_epoch: int
    calibration: Iterable[Batch]
    blocks: Sequence[str]
    precision: Precision
    pieces: Pieces
    folder: RunFolder | None
    emit: Emitter

    def recover(
        self,
        student: nn.Module,
        teacher: nn.Module,
        number: int,
        steps: int,
        facts: Mapping[str, Any],
        saved: PhaseState | None,
        *,
        taken: int = 0,
        pass_began: Tensor | None = None,
        apart: Callable[[], float] | None = None,
        **recovery: Any,
    ) -> Recovered:
        """Train the student, in place, from where it was left.

        Args:
            student: as it was cut.
            teacher: whose answers it learns.
            number: of the round, or `CONTROL`.
            steps: of the whole recovery.
            facts: what else is known of the round, saved with its state.
            saved: the state that it was left in.
            taken: steps of the recoveries before: it begins with the rows that come next.
            pass_began: what the last of them gave as this: those rows are of the pass that it left.
            apart: how far the student is from the teacher of all rounds. If given, it goes back towards the cut as far
                as makes this least.
            recovery: fields of `Recovery` that are other than the run's.

        Raises:
            Interrupted: after Ctrl-C, with the number, where it stopped, and the student as it is.
            AtOnce: after another.
            RunError: if the state is of another round.
        """
        if steps == 0:
            return Recovered(losses=[], seconds=0.0, pass_began=pass_began)
        began = time.monotonic() - facts.get("seconds", 0.0)
        phase = self._phase(student, teacher, steps, taken, pass_began, replace(self.options.recovery, **recovery))
        cut = None if apart is None else _cut_weights(student, saved)
        if saved is not None:
            _go_back(phase, saved)
        with interruptible() as asked:
            try:
                phase.run(_Between(self, asked, number, {**facts}, began, cut or {}))
                share, way = (None, ()) if apart is None or cut is None else self._blend(student, cut, apart, number)
                if asked.stop:
                    raise Interrupted(number, _where(steps, steps, number), student)
            except KeyboardInterrupt as again:
                if asked.stop:
                    raise AtOnce from again
                raise
        return Recovered(
            losses=phase.losses,
            seconds=time.monotonic() - began,
            share=share,
            way=way,
            pass_began=phase.pass_began,
        )

    def from_nothing(
        self,
        student: nn.Module,
        teacher: nn.Module,
        steps: int,
        facts: Mapping[str, Any],
        saved: PhaseState | None,
    ) -> nn.Module:
        """A model of the student's shape from a random start, distilled for as many steps: the control of a run."""
        scratch = copy.deepcopy(student)
        randomize(scratch, seed=self.options.seed)
        self.recover(scratch, teacher, CONTROL, steps, facts, saved, freeze_embeddings=False)
        return scratch

    def saved_step(self, number: int) -> PhaseState | None:
        """Where the training of this number stands, if it is the one that was left."""
        saved = self.folder.load_state("step") if self.folder else None
        if saved is None or saved[1]["number"] != number:
            return None
        return PhaseState(tensors=saved[0], facts=saved[1])

    def _phase(
        self,
        student: nn.Module,
        teacher: nn.Module,
        steps: int,
        taken: int,
        pass_began: Tensor | None,
        recovery: Recovery,
    ) -> Phase:
        epoch, batch = divmod(taken, self.batches_per_epoch)
        return Phase(
            student,
            self.rows,
            steps=steps,
            first_epoch=epoch,
            first_batch=batch,
            pass_began=pass_began,
            teacher=Teacher(teacher, cache=recovery.cache_teacher and steps > self.batches_per_epoch),
            recovery=recovery,
            precision=self.precision,
            blocks=self.blocks,
            pieces=self.pieces,
        )

    def _blend(
        self, student: nn.Module, cut: Mapping[str, Tensor], apart: Callable[[], float], number: int
    ) -> tuple[float, Way]:
        self.emit("blend", number=number)
        settle = partial(gather_statistics, student, batch_norms(student), self.calibration, pieces=self.pieces)
        return blend(student, cut, apart, settle)


class _Between:
    """What happens after each step: tell, save now and then, and stop if asked to."""

    def __init__(
        self, run: Recoveries, asked: Asked, number: int, facts: dict[str, Any], began: float, cut: Mapping[str, Tensor]
    ):
        self.run, self.asked, self.number, self.facts, self.began = run, asked, number, facts, began
        self.cut = {f"{START}{name}": value for name, value in cut.items()}
        self.saved = time.monotonic()

    def __call__(self, phase: Phase) -> None:
        step, steps = len(phase.losses), phase.steps
        self.run.emit("step", number=self.number, step=step, steps=steps, loss=phase.losses[-1])
        if self.asked.stop or step == steps or time.monotonic() - self.saved >= self.run.options.save_every_s:
            self._save(phase)
        if self.asked.stop:
            raise Interrupted(self.number, _where(step, steps, self.number), phase.student)

    def _save(self, phase: Phase) -> None:
        if self.run.folder is not None:
            state = phase.state()
            own = {"number": self.number, "seconds": time.monotonic() - self.began}
            self.run.folder.save_state("step", {**state.tensors, **self.cut}, {**self.facts, **state.facts, **own})
        self.saved = time.monotonic()


def _cut_weights(student: nn.Module, saved: PhaseState | None) -> dict[str, Tensor]:
    """All parameters as the cut has made them: the student's, or those that were saved with its state."""
    if saved is None:
        return {name: value.detach().clone() for name, value in student.named_parameters()}
    found = {name: value for name, value in saved.tensors.items() if name.startswith(START)}
    if not found:
        raise RunError(
            "last/step.safetensors must hold the weights of the cut. It does not. Remove it: then the run goes on from "
            "the start of its round."
        )
    return {name.removeprefix(START): value for name, value in found.items()}


def _go_back(phase: Phase, saved: PhaseState) -> None:
    try:
        phase.restore(saved)
    except (KeyError, RuntimeError, TypeError) as error:
        raise RunError(
            f"last/step.safetensors must be of this round. Going back to it gave: {error!r}. Remove it: then the run "
            "goes on from the start of its round."
        ) from error


def _where(step: int, steps: int, number: int) -> str:
    return f"after step {step} of {steps} {'in the control' if number == CONTROL else f'in round {number}'}"
