"""Training a teacher by a recipe. What is stopped goes on when the same is asked again, to the same bits."""

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rmtkd import batches as batching
from rmtkd.checkpoint import checksum, read_state, write_state
from rmtkd.environment import PRECISIONS, check_device, precision_on, versions
from rmtkd.errors import OptionError, RunError, check_choice
from rmtkd.interruption import interruptible
from rmtkd.measurement import count_parameters, quality
from rmtkd.memory import Pieces
from rmtkd.progress import Emitter, Listener
from rmtkd.recipes.checkpoints import save_classifier
from rmtkd.recipes.recipe import Recipe
from rmtkd.roles import fingerprint
from rmtkd.seeding import seeded
from rmtkd.storage import tensors_of
from rmtkd.training import Phase, PhaseState, steps_of
from rmtkd.writing import check_new, new_folder, write_json, written_to

SAVE_EVERY = 60.0
"""Seconds between two saves of where a training stands."""


AGAIN = "the same command"


def train_teacher(
    recipe: Recipe,
    *,
    out: Path,
    model: str | None = None,
    data: Path | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    seed: int = 0,
    device: str = "cpu",
    save_every_s: float = SAVE_EVERY,
    on_event: Listener | None = None,
) -> dict[str, Any]:
    """Train a teacher on the recipe's training rows and write it as a transformers folder.

    Where it stands is one file beside the folder, `OUT.training`, until it is finished. After Ctrl-C, or worse, the
    same call goes on from there.

    Args:
        recipe: the task.
        out: folder for the model, its tokenizer and `training.json`; must be new.
        model: path or hub name to start from, where the recipe needs one.
        data: folder of parquet files.
        epochs: passes over the training rows.
        lr: peak learning rate.
        precision: of training; `auto` is bf16 where this machine has instructions for it.
        seed: of the head's start, the order of rows and dropout.
        device: where to train.
        save_every_s: seconds between two saves of where it stands.
        on_event: called with every event.

    Returns:
        What `training.json` holds.

    Raises:
        RunError: if `out` exists or cannot be written, or if `OUT.training` is damaged or of another training.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step is over and saved.
        OptionError: if an option has a value that it cannot have.
        DataError: if rows or checkpoint cannot be used.
    """
    check_new(out, "--out")
    check_device(device)
    epochs = recipe.epochs if epochs is None else epochs
    if not (0 <= epochs < math.inf and seed >= 0):
        raise OptionError(f"epochs and seed must be at least 0. Got {epochs:g} and {seed}.")
    check_choice("precision", precision, PRECISIONS)
    recovery = recipe.training if lr is None else replace(recipe.training, lr=lr)
    source = recipe.start(model, seed, data)
    student = source.model.to(device)
    rows = recipe.rows(data, source, seed)
    emit = Emitter(on_event)
    emit("rows", note=rows.note)
    steps = steps_of(epochs, len(rows.train))
    precision = precision_on(device, precision)
    batching.set_epoch(rows.train, 0)
    known = fingerprint(emit.reading(rows.train, "training"), "training")[0]
    asked_for = {"rows": known, "steps": steps, "seed": seed, "precision": precision}
    left = TrainingFile(out, checksum(tensors_of(student), json.dumps([asked_for, asdict(recovery)])))
    with seeded(seed, device), interruptible() as asked:
        pieces = Pieces(lambda count: emit("memory", pieces=count))
        phase = Phase(student, rows.train, steps=steps, recovery=recovery, precision=precision, pieces=pieces)
        if left.restore(phase) is not None:
            emit("training", step=len(phase.losses), steps=steps)

        def between(_: Phase) -> None:
            step = len(phase.losses)
            emit("step", step=step, steps=steps, loss=phase.losses[-1])
            if asked.stop or left.age() > save_every_s:
                left.save(phase)
            if asked.stop:
                raise KeyboardInterrupt(f"stopped after step {step} of {steps}. The same command goes on from there.")

        phase.run(between)
    record = {
        "recipe": recipe.name,
        "start": Path(model).name if model and Path(model).exists() else model,
        "parameters": count_parameters(student),
        "classes": len(source.labels),
        "rows": rows.note,
        **{name: asdict(estimate) for name, estimate in quality(student, rows.report).items()},
        **{f"{name}_selection": asdict(estimate) for name, estimate in quality(student, rows.selection).items()},
        "steps": steps,
        "seed": seed,
        "training": asdict(recovery),
        "precision": precision,
        "versions": versions(),
    }
    with written_to(out, AGAIN), new_folder(out) as partial:
        save_classifier(source, partial)
        write_json(partial / "training.json", record)
    left.drop()
    return record


class TrainingFile:
    """Where a training stands: one file beside the folder that is to be.

    Args:
        out: the folder.
        identity: of the training: what it begins with and what it was asked.
    """

    def __init__(self, out: Path, identity: str):
        self.path = out.absolute().with_name(f"{out.absolute().name}.training")
        self.identity, self.saved = identity, time.monotonic()

    def age(self) -> float:
        """Seconds since the last save."""
        return time.monotonic() - self.saved

    def save(self, phase: Phase, **facts: Any) -> None:
        """Write where the phase stands, and plain JSON values, in place of what was there."""
        state = phase.state()
        with written_to(self.path, AGAIN):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_state(self.path, state.tensors, {**facts, "phase": state.facts, "identity": self.identity})
        self.saved = time.monotonic()

    def restore(self, phase: Phase) -> dict[str, Any] | None:
        """Take the phase to where it was left; the values that were saved with it, or None if nothing was left.

        Raises:
            RunError: if the file is damaged, or of another training.
        """
        if not self.path.exists():
            return None
        try:
            tensors, facts = read_state(self.path)
        except Exception as error:
            raise RunError(
                f"{self.path} must be as it was written. Reading it gave: {error or type(error).__name__}. "
                "Remove it to train from the start."
            ) from error
        if facts.get("identity") != self.identity:
            raise RunError(
                f"{self.path} must be of this training. It is of one with another start, other rows or other options. "
                "Finish that one with its own command, remove the file, or choose another --out."
            )
        phase.restore(PhaseState(tensors=tensors, facts=facts["phase"]))
        return facts

    def drop(self) -> None:
        """Remove the file: the training is finished."""
        self.path.unlink(missing_ok=True)
