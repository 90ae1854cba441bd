"""Several sizes of one model: what plans are made from is measured once, then every target is a run of its own."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rmtkd import artifact, progress, reporting
from rmtkd.batches import Forward
from rmtkd.checkpoint import REPORT, RunFolder, is_size
from rmtkd.environment import check_device
from rmtkd.errors import OptionError, RmtkdError, RunError
from rmtkd.planning import Plan, Target
from rmtkd.result import Compressed
from rmtkd.roles import Roles
from rmtkd.run import Planned, Run, report_on
from rmtkd.schedule import Options
from rmtkd.seeding import random_state, seeded, set_random_state
from rmtkd.sites import Site
from rmtkd.standing import Standing, device_of
from rmtkd.subject import Subject


class Sizes(dict[str, Compressed]):
    """Compressed models by their targets, as far as the runs came: one that was interrupted is the last."""

    def summary(self) -> str:
        """All sizes in one table of plain text."""
        return reporting.sizes_text([result.record for result in self.values()])

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return reporting.sizes_html([result.record for result in self.values()])


def compress_sizes(
    model: nn.Module,
    *,
    targets: Iterable[str],
    train: Iterable[Any],
    selection: Iterable[Any],
    report: Iterable[Any] | None = None,
    calibration: Iterable[Any] | None = None,
    example: Any = None,
    sites: Sequence[Site] | None = None,
    forward: Forward | None = None,
    teacher_model: nn.Module | None = None,
    control: bool = False,
    out: str | Path | None = None,
    extra_files: Iterable[Path] = (),
    command: Mapping[str, Any] | None = None,
    on_event: progress.Listener | None = None,
    **options: Any,
) -> Sizes:
    """Compress a model to several targets. Spectra, metrics and losses are measured once; every target gets the plan
    that `compress` makes for it alone, and a run of its own.

    With `out` the same call again goes on where it was stopped: finished sizes are read, those that have begun go on,
    and targets that are new are planned. `resume(f"{out}/25%params", ...)` goes on with one of them.

    Args:
        targets: what remains, such as `["50%params", "25%params"]`.
        out: folder of the run folders, one for each target: `OUT/25%params`.
        options: the fields of `Options` but for the target.

    The others are those of `compress`.

    Returns:
        By target what `compress` returns. Ctrl-C ends it as it ends a run: the one that was stopped is the last.

    Raises:
        RmtkdError: see `rmtkd.errors`. If any target cannot be met, nothing was changed.
    """
    if "target" in options or "plan" in options:
        raise OptionError(
            f"several sizes are given by their targets alone. Got {'target' if 'target' in options else 'plan'} too. "
            "Leave it out, or use compress for one size."
        )
    names = check_targets(targets)
    chosen = replace(Options.of(options, compress_sizes), target=names[0])
    place = None if out is None else Path(out)
    if place is not None:
        check_place(place, names)
    extra_files = artifact.check_extra_files(extra_files)
    rows = Roles(train=train, selection=selection, report=report, calibration=calibration, example=example)
    with seeded(chosen.seed, check_device(chosen.device)), ExitStack() as held:
        rows, emit = rows.called(forward), progress.Emitter(on_event)
        subject = Subject(model, rows, chosen, sites=sites, teacher_model=teacher_model, emit=emit)
        subject.pieces.on_halved = lambda count: emit("memory", pieces=count)
        runs = {
            name: Run(subject, replace(chosen, target=name), control=control, emit=progress.Emitter(on_event))
            for name in names
        }
        folders = {} if place is None else {name: _open(place / name, run) for name, run in runs.items()}
        for folder in folders.values():
            held.callback(folder.release)
        began = _begin(subject, runs, folders, place, held, dict(command or {}))
        done = Sizes()
        for number, (name, run) in enumerate(runs.items(), 1):
            emit("size", target=name, number=number, sizes=len(runs))
            begun, state = began.pop(name, (None, None))
            if state is not None:
                set_random_state(state, device_of(subject.model))
            done[name] = run.execute(None, folders.get(name), extra_files, begun=begun)
            if not done[name].record["finished"]:
                break
        if place is not None:
            report_on(place, emit)
        return done


def check_targets(targets: Any) -> list[str]:
    """The targets as names of folders, in their order.

    Raises:
        OptionError: if they are no texts, there are none, one is not a target, or two are the same.
    """
    names: dict[Target, str] = {}
    given = [targets] if isinstance(targets, str) or not isinstance(targets, Iterable) else targets
    for text in given:
        if not isinstance(text, str):
            raise OptionError(f"targets must be texts. Got {text!r}. Pass such as ['50%params', '25%params'].")
        target, name = Target.parse(text), "".join(text.split())
        if target in names:
            raise OptionError(
                f"targets must differ. Got {names[target]} and {name}, which are the same. Leave one out."
            )
        names[target] = name
    if not names:
        raise OptionError("at least one target is needed. Got none. Pass some, such as 50%params and 25%params.")
    return list(names.values())


def check_place(place: Path, names: Iterable[str]) -> None:
    """Raise `RunError` unless the folder is new, or holds nothing but runs to targets; or if one cannot be written."""
    for folder in place.iterdir() if place.is_dir() else ():
        if folder.name != REPORT and not is_size(folder):
            raise RunError(
                f"--out must be a new folder, or hold only runs to targets, one folder for each. {place} holds "
                f"{folder.name}. Choose another folder; nothing in it was changed."
            )
    for name in names:
        if not (place / name / "config.json").exists():
            RunFolder.check_free(place / name)


def _open(path: Path, run: Run) -> RunFolder:
    """The folder of one target, with the run that was begun in it, if there is one; else none is made yet."""
    if not (path / "config.json").exists():
        return RunFolder(path)
    folder = RunFolder.open(path)
    try:
        config = folder.config()
        theirs = {**Options.from_dict(config["options"]).to_dict(), "control": config["control"]}
        ours = {**run.options.to_dict(), "control": run.with_control}
        if differ := [name for name in ours if ours[name] != theirs[name]] + run.subject.take_up(config):
            raise RunError(
                f"a run goes on with what it began with. In {path} other values were given for: {', '.join(differ)}. "
                "Give the same, or choose another folder; nothing was changed."
            )
        if (begun := folder.load_state("round")) is not None:
            folder.hold_plan(Plan.from_json(begun[1]["plan"]))
    except BaseException:
        folder.release()
        raise
    return folder


def _begin(
    subject: Subject,
    runs: Mapping[str, Run],
    folders: dict[str, RunFolder],
    place: Path | None,
    held: ExitStack,
    command: dict[str, Any],
) -> dict[str, tuple[Standing, Tensor]]:
    """Plan all targets that have no plan yet, from one survey, and only then begin their runs: what they stand at, and
    with which random numbers."""
    missing = [name for name in runs if place is None or not folders[name].has_begun_or_ended()]
    planned: dict[str, Planned] = {}
    if missing:
        survey = subject.survey()
        planned = {
            name: Planned(subject.planned(survey, name), survey.spectrums, survey.seconds_observed) for name in missing
        }
        del survey
    began: dict[str, tuple[Standing, Tensor]] = {}
    for name, made in planned.items():
        run, folder = runs[name], None
        if place is not None:
            folder = folders[name]
            if not (place / name / "config.json").exists():
                folder = RunFolder.create(place / name, {**run.config(), "plan": None, "command": command})
                held.callback(folder.release)
                folders[name] = folder
        try:
            began[name] = run.begin(None, folder, made), random_state(device_of(subject.model))
        except RmtkdError:
            if folder is not None and not folder.has_begun():
                folder.forget()
            raise
    return began


__all__ = ["Sizes", "check_place", "check_targets", "compress_sizes"]
