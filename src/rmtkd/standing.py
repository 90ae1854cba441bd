"""What a run has reached between two rounds: kept in its folder, and found there again."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd.checkpoint import RunFolder
from rmtkd.measurement import Estimate
from rmtkd.planning import Plan
from rmtkd.schedule import Round, kept_widths
from rmtkd.seeding import random_state, set_random_state
from rmtkd.sites import Site
from rmtkd.storage import tensors_of
from rmtkd.surgery import fill, skeleton


@dataclass(kw_only=True)
class Standing:
    """What a run has reached: the rounds that are over, and the model they left."""

    plan: Plan
    baseline: Estimate
    student: nn.Module
    rounds: tuple[Round, ...] = ()
    seconds: float = 0.0
    """That the run took before `since`."""
    since: float = field(default_factory=time.monotonic)
    """The moment from which on seconds are counted, by the clock that only goes forward."""
    pass_began: Tensor | None = None
    """The random numbers with which the pass through the training rows began that is under way; None before the first
    step, and in runs that an earlier version began."""

    @property
    def kept(self) -> dict[str, int]:
        """The widths that have been cut, by site name."""
        return kept_widths(self.rounds)

    def spent(self) -> float:
        """Seconds that the run has taken up to now, in all sessions."""
        return self.seconds + time.monotonic() - self.since

    def count(self, step: Mapping[str, Any]) -> None:
        """Take in what a session took that ended within a round, by the facts that were saved there."""
        self.seconds = max(self.seconds, step.get("seconds_run", 0.0) + step["seconds"])

    def save(self, folder: RunFolder, *, pieces: int) -> None:
        """Write it, in place of what was written before, with the random numbers of this moment.

        Args:
            folder: of the run.
            pieces: in how many pieces a batch is run by now.
        """
        cut = tensors_of(self.student) if self.kept else {}  # the user has the model that nothing was cut from
        folder.save_state(
            "round",
            {
                **{f"model.{name}": value for name, value in cut.items()},
                **({} if self.pass_began is None else {"random.pass_began": self.pass_began}),
                "random": random_state(device_of(self.student)),
            },
            {
                "plan": self.plan.to_json(),
                "baseline": asdict(self.baseline),
                "rounds": [asdict(done) for done in self.rounds],
                "seconds": self.spent(),
                "pieces": pieces,
            },
        )

    @classmethod
    def load(cls, folder: RunFolder, model: nn.Module, sites: Sequence[Site]) -> "tuple[Standing, int] | None":
        """Where the run stands, and in how many pieces a batch is run; None if it has no plan yet. The random numbers
        go on from that moment.

        Args:
            folder: of the run.
            model: that the run began with.
            sites: of that model.

        Raises:
            RunError: if the state is damaged.
        """
        saved = folder.load_state("round")
        if saved is None:
            return None
        tensors, facts = saved
        standing = cls(
            plan=Plan.from_json(facts["plan"]),
            baseline=Estimate(**facts["baseline"]),
            student=model,
            rounds=tuple(Round.from_dict(done) for done in facts["rounds"]),
            seconds=facts["seconds"],
            pass_began=tensors.get("random.pass_began"),
        )
        if standing.kept:
            weights = {name.removeprefix("model."): v for name, v in tensors.items() if name.startswith("model.")}
            standing.student = shaped(model, sites, standing.kept, weights)
        set_random_state(tensors["random"], device_of(model))
        return standing, facts["pieces"]


def shaped(
    model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The model at these widths, on its device, in evaluation mode, with these weights; without any, to be filled."""
    student = skeleton(model, sites, widths)
    empty = {name: torch.empty_like(value, device="cpu") for name, value in student.named_parameters()}
    fill(student, weights or empty)
    return student.to(device_of(model)).eval()


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next(model.parameters()).device
