"""What a folder tells of a run: read from its records, never from weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmtkd.artifact import is_artifact
from rmtkd.checkpoint import RunFolder, is_size, read_planned
from rmtkd.errors import RunError
from rmtkd.planning import Plan
from rmtkd.reporting.rows import stopped, summary_rows
from rmtkd.schedule import Options, Round, kept_widths
from rmtkd.spectra import Spectrum


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a run, or of a plan that no run has applied.

    Attributes:
        folder: where it lies.
        plan: the plan.
        spectrums: those that it was made from, by site; empty where they are missing.
        config: what the run was asked; None where there is only a plan.
        events: of the record, in order.
        summary: of a finished run.
    """

    folder: Path
    plan: Plan
    spectrums: Mapping[str, Sequence[Spectrum]]
    config: Mapping[str, Any] | None
    events: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """What the folder is called."""
        return self.folder.resolve().name

    @property
    def options(self) -> dict[str, Any]:
        """What the run was asked; for options that there were not yet, what was done without them."""
        assert self.config is not None
        return Options.from_dict(self.config["options"]).to_dict()

    @property
    def rounds(self) -> tuple[Round, ...]:
        """Those of the summary, or as far as the run came. A round that was done again counts as it was at last."""
        if self.summary is not None:
            return tuple(Round.from_dict(done) for done in self.summary["rounds"])
        told = [event for event in self.events if event["event"] == "round"]
        found = [{key: event[key] for key in event if key not in ("event", "seconds")} for event in told]
        return tuple({done["number"]: Round.from_dict(done) for done in found}.values())

    @property
    def widths(self) -> dict[str, int]:
        """Kept width by site name: what rounds have cut; of a plan alone, what it would."""
        if self.config is None:
            return self.plan.widths
        done = kept_widths(self.rounds)
        return {site.name: done.get(site.name, site.width) for site in self.plan.sites}

    @property
    def baseline(self) -> Mapping[str, Any] | None:
        """Selection accuracy of the untouched model, told when the run began."""
        return next((event["selection_accuracy"] for event in self.events if event["event"] == "start"), None)


def read_evidence(folder: Path) -> Evidence:
    """What a folder tells.

    Raises:
        RunError: if it holds neither run nor plan, or what it holds cannot be read.
        PlanError: if its plan is broken.
    """
    if not folder.is_dir():
        raise RunError(f"a report is made of a run folder. There is no folder {folder}. Is the path right?")
    if is_artifact(folder):
        hint = (
            f"Its run may be {folder.parent}: rmtkd report {folder.parent}"
            if is_run(folder.parent)
            else "Name the run."
        )
        raise RunError(f"a report is made of a run folder. {folder} is a model folder. {hint}")
    run = RunFolder(folder)
    config = run.config() if (folder / "config.json").exists() else None
    plan = run.plan()
    if plan is None:
        raise RunError(
            f"a report takes at least a plan. {folder} has "
            + ("none yet. Go on with the run first: rmtkd resume " + str(folder) if config else "no run and no plan. ")
            + ("" if config else "Make one: rmtkd plan, or rmtkd compress.")
        )
    has_spectra = (folder / "spectra.npz").is_file()
    return Evidence(
        folder=folder,
        plan=plan,
        spectrums=read_planned(folder)[1] if has_spectra else {},
        config=config,
        events=run.events(),
        summary=_summary(run),
    )


def _summary(run: RunFolder) -> Mapping[str, Any] | None:
    """The record of a finished run, with all that pages show; None while it is not finished.

    Raises:
        RunError: if something of it is missing, or is something else.
    """
    path = run.path / "summary.json"
    if not path.is_file():
        return None
    summary: Any = run.summary()
    try:
        for show in (summary_rows, stopped):
            show(summary)
        for done in summary["rounds"]:
            Round.from_dict(done)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise RunError(f"{path} must be as it was written. Reading it gave: {error!r}. Restore it.") from None
    return summary


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / "record.jsonl").is_file() or (folder / "summary.json").is_file()


def sizes_in(folder: Path) -> list[Path]:
    """The run folders of several sizes, in the order in which they were begun; none if this is another folder."""
    if not folder.is_dir() or (folder / "config.json").exists() or (folder / "plan.json").exists():
        return []
    return sorted(
        (found for found in folder.iterdir() if is_size(found) and (found / "config.json").is_file()), key=_begun
    )


def _begun(folder: Path) -> tuple[int, str]:
    """When the run began, as its configuration is never written again."""
    return (folder / "config.json").stat().st_mtime_ns, folder.name
