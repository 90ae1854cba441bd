"""The two verbs: compress a model, and go on with a compression that was stopped."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rmtkd import artifact, progress
from rmtkd.batches import Forward
from rmtkd.calibration import share_of
from rmtkd.checkpoint import RunFolder
from rmtkd.dry_run import narrow, plan
from rmtkd.environment import check_device
from rmtkd.errors import RunError
from rmtkd.planning import Plan
from rmtkd.result import Compressed
from rmtkd.roles import Roles
from rmtkd.run import Run
from rmtkd.schedule import Options
from rmtkd.seeding import seeded
from rmtkd.sites import Site
from rmtkd.subject import Subject


def compress(
    model: nn.Module,
    *,
    train: Iterable[Any],
    selection: Iterable[Any],
    report: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    example: Any = None,
    sites: Sequence[Site] | None = None,
    forward: Forward | None = None,
    teacher_model: nn.Module | None = None,
    plan: Plan | None = None,
    control: bool = False,
    out: str | Path | None = None,
    extra_files: Iterable[str | Path] = (),
    command: Mapping[str, Any] | None = None,
    on_event: progress.Listener | None = None,
    **options: Any,
) -> Compressed:
    """Make a trained model narrower and let it recover by self-distillation. The model is left as it was.

    Rows may come without labels: then the student learns from the teacher alone, and what is measured on rows without
    labels is the share of them to which it gives the teacher's answer.

    Ctrl-C ends the run after the step that is under way: its state is saved, and the model as it is comes back, with
    `record["finished"]` false. A second one, or one before there is a plan, ends it at once: it raises
    `KeyboardInterrupt`. A run with a folder goes on with `resume`.

    Args:
        model: a trained classifier of a supported family, or any module whose `sites` are given.
        train: batches for recovery; gone through several times.
        selection: rows that nobody trained on; they steer the run and are never reported as its result.
        report: rows for the result; evaluated once, at the end.
        calibration: batches whose activations are seen; a share of `train` by default.
        example: the batch whose FLOPs and latency are measured; the first selection batch by default.
        sites: the widths that may be narrowed; those of the model's family by default.
        forward: class scores from the model and what the collections of rows give, for models that are called neither
            as `model(**batch)` nor as `model(batch[0])`.
        teacher_model: another model to learn from in all rounds, in place of one of the run's: a larger one, or the one
            that an earlier cut was made from. It is called as the model is.
        plan: use the widths of this plan, which may have been changed by hand. What else it says is derived anew, and
            its choices stand for those options (see `Options.follow`).
        control: also train the same final shape from a random start for the same number of steps.
        out: run folder to write: configuration, plan, spectra, record, state, summary, model.
        extra_files: files to copy into the model folder (a tokenizer's).
        command: JSON values for `config.json`: what it takes to load model and rows again.
        on_event: called with every event of the run.
        options: the fields of `Options`: target, tau, granularity, epochs, seed, ...

    Returns:
        The compressed model, in evaluation mode on `device`, with plan and record.

    Raises:
        RmtkdError: see `rmtkd.errors`; nothing that existed before is changed.
    """
    chosen = Options.of(options, compress)
    if plan is not None:
        chosen = chosen.follow(plan, given=options)
    if out is not None:
        RunFolder.check_free(Path(out))
    extra_files = artifact.check_extra_files(extra_files)
    rows = Roles(train=train, selection=selection, report=report, calibration=calibration, example=example)
    with seeded(chosen.seed, check_device(chosen.device)):
        rows, emit = rows.called(forward), progress.Emitter(on_event)
        subject = Subject(model, rows, chosen, sites=sites, teacher_model=teacher_model, emit=emit)
        run = Run(subject, chosen, control=control, emit=emit)
        if out is None:
            return run.execute(plan)
        config = {**run.config(), "plan": plan and json.loads(plan.to_json()), "command": dict(command or {})}
        folder = RunFolder.create(Path(out), config)
        try:
            return run.execute(plan, folder, extra_files)
        except Exception:
            if not folder.has_begun_or_ended():  # a refused run leaves nothing behind
                folder.forget()
            raise
        finally:
            folder.release()


def resume(
    run_folder: str | Path,
    model: nn.Module,
    *,
    train: Iterable[Any],
    selection: Iterable[Any],
    report: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    example: Any = None,
    sites: Sequence[Site] | None = None,
    forward: Forward | None = None,
    teacher_model: nn.Module | None = None,
    extra_files: Iterable[str | Path] = (),
    on_event: progress.Listener | None = None,
) -> Compressed:
    """Go on with a run that was stopped anywhere, to the model that it would have given.

    On a CPU, with as many threads, that model is the same to the bit.

    Args:
        run_folder: the `out` of `compress`.
        model: the model that the run began with; it, a teacher model and the rows are given as they were to `compress`.

    Returns:
        What `compress` returns; of a finished run, what it returned.

    Raises:
        RunError: if there is no such run, it began with another model or other rows, or its state is damaged.
    """
    folder = RunFolder.open(Path(run_folder))
    try:
        chosen, given, control, config = _asked(folder)
        rows = Roles(train=train, selection=selection, report=report, calibration=calibration, example=example)
        with seeded(chosen.seed, check_device(chosen.device)):
            rows, emit = rows.called(forward), progress.Emitter(on_event)
            subject = Subject(model, rows, chosen, sites=sites, teacher_model=teacher_model, emit=emit)
            if others := subject.take_up(config):
                anew = " A loader with an order of its own is made anew for this." if "rows" in others[0] else ""
                raise RunError(
                    f"a run goes on with the {others[0]} that it began with. These are others. Pass the same ones, or "
                    f"start a new run; nothing was changed.{anew}"
                )
            run = Run(subject, chosen, control=control, emit=emit)
            return run.execute(given, folder, artifact.check_extra_files(extra_files))
    finally:
        folder.release()


def _asked(folder: RunFolder) -> tuple[Options, Plan | None, bool, Mapping[str, Any]]:
    """The options of a run, the plan it was given, whether it has a control, and all that its configuration says."""
    config = folder.config()
    try:
        given = None if config["plan"] is None else Plan.from_json(json.dumps(config["plan"]))
        return Options.from_dict(config["options"]), given, bool(config["control"]), config
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(
            f"{folder.path / 'config.json'} must be as it was written. Reading it gave: {error!r}. Restore "
            "it, or start a new run; nothing was changed."
        ) from error


__all__ = ["Compressed", "compress", "narrow", "plan", "resume", "share_of"]
