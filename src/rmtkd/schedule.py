"""What a run is asked to do, what it did, and when it stops: options, records, and rules that read only records."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from rmtkd.distillation import Recovery
from rmtkd.environment import PRECISIONS, check_device
from rmtkd.errors import OptionError, check_choice, check_kinds
from rmtkd.fisher import METRICS
from rmtkd.measurement import Latency
from rmtkd.planning import LATENCY, MAX_LOSS, POLICIES, Plan, Target, fixed_widths
from rmtkd.spectra import RULES
from rmtkd.training import steps_of

Granularity = Literal["site", "layer", "round"]
OF_PLANS = (
    *("target", "policy", "max_loss", "rule", "tau", "multiple_of", "min_share", "uniform"),
    *("embedding_levels", "low_rank"),
)
"""Names of the options that a plan has decided on when it is applied, beside what sites stay whole or have a width."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All choices of a run.

    Attributes:
        target: what remains (`25%params`, `5M`, `40%flops`, `40%latency`) or a speed-up (`2.5x`); without one, what
            the policy keeps.
        policy: how widths are chosen: `guarded` by the loss that every width costs on selection rows, measured after
            cuts in closed form; `paper` by the noise edges alone, moved by a common factor to meet a target.
        max_loss: what guarded widths may cost in sum where there is no target, in nats of divergence from the teacher.
        metric: in which the error of a cut is small: `fisher` weighs it by how much the answers care, `output` counts
            all errors of what the readers write alike.
        rule: spectral rule, a name in `spectra.RULES`.
        tau: quantile that starts the noise level; larger cuts more.
        granularity: what is cut between two recoveries: one width (`site`), one layer, or all (`round`).
        epochs: recovery over the whole run, in passes over the training rows; 0 cuts only.
        teacher: `previous` is the checkpoint before the cut, `original` the untouched model.
        gentle: the divergence of a cut, in nats a row, from which on recovery takes the whole learning rate; after
            milder cuts see `rate_after`. 0 takes it after any cut.
        blend: after recovery, go back on the straight line to the cut as far as makes the answers nearest to the
            teacher's on selection rows (a quarter of the way at least stays; see `rmtkd.blending`).
        tolerance: largest loss of selection accuracy, as a fraction (0.02 is two points); a cut that
            breaks it is taken back and the run stops. None sets no bound.
        max_rounds: stop after as many rounds. None sets no bound.
        multiple_of: kept widths are multiples of this.
        min_share: no width below this share of its full size (the method's ρ_min).
        uniform: narrow only widths that the model's stock configuration gives, each for all layers at once and in one
            round, so that the result is a stock model. The smallest such models are larger.
        embedding_levels: tokens have as many embedding tables as this, each with a width of its own, by how often they
            occur in the training rows; 1 is one table for all.
        low_rank: in place of narrowing widths, make two convolutions of lower rank of one: for what narrowing leaves.
        exclude: sites that stay whole: names, or shell-style patterns such as `layer.*.ffn`.
        keep: sites, or patterns, with the width that they are given; a mapping, or pairs, which it becomes.
        calibration_share: share of the training batches whose activations are seen.
        recovery: the training after each cut.
        precision: of training, and of the passes that measure losses; `auto` is bf16 where this machine has
            instructions for it.
        seed: of everything random.
        device: where the models run.
        save_every_s: seconds between two saves of where the run stands, if it has a folder.
    """

    target: str | None = None
    policy: Literal["guarded", "paper"] = "guarded"
    max_loss: float = MAX_LOSS
    metric: Literal["fisher", "output"] = "fisher"
    rule: str = "mp"
    tau: float = 0.5
    granularity: Granularity = "round"
    epochs: float = 1.0
    teacher: Literal["previous", "original"] = "previous"
    gentle: float = 0.4
    blend: bool = True
    tolerance: float | None = None
    max_rounds: int | None = None
    multiple_of: int = 8
    min_share: float = 0.0
    uniform: bool = False
    embedding_levels: int = 1
    low_rank: bool = False
    exclude: Sequence[str] = ()
    keep: Mapping[str, int] | Sequence[Sequence[Any]] = ()
    calibration_share: float = 0.1
    recovery: Recovery = field(default_factory=Recovery)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    device: str = "cpu"
    save_every_s: float = 30.0

    def __post_init__(self) -> None:
        check_kinds(self)
        self._make_plain()
        if not isinstance(self.recovery, Recovery):
            raise OptionError(f"recovery must be a Recovery. Got {self.recovery!r}.")
        check_choice("policy", self.policy, POLICIES)
        check_choice("metric", self.metric, METRICS)
        check_choice("rule", self.rule, RULES)
        check_choice("granularity", self.granularity, ("site", "layer", "round"))
        check_choice("teacher", self.teacher, ("previous", "original"))
        check_choice("precision", self.precision, PRECISIONS)
        if self.target is not None:
            Target.parse(self.target)
        for name, ok, must in (
            ("tau", 0 < self.tau < 1, "within (0, 1)"),
            ("max_loss", 0 < self.max_loss < math.inf, "greater than 0"),
            ("epochs", 0 <= self.epochs < math.inf, "at least 0"),
            ("gentle", 0 <= self.gentle < math.inf, "at least 0"),
            ("tolerance", self.tolerance is None or 0 <= self.tolerance <= 1, "within [0, 1]"),
            ("max_rounds", self.max_rounds is None or self.max_rounds >= 1, "at least 1"),
            ("multiple_of", self.multiple_of >= 1, "at least 1"),
            ("min_share", 0 <= self.min_share <= 1, "within [0, 1]"),
            ("embedding_levels", self.embedding_levels >= 1, "at least 1"),
            ("embedding_levels", self.embedding_levels == 1 or not self.uniform, "1 in a uniform plan"),
            ("low_rank", not self.low_rank or (self.embedding_levels == 1 and not self.uniform), "the only change"),
            ("exclude", all(isinstance(name, str) and name for name in self.exclude), "names of sites"),
            ("keep", all(_is_pair(pair) for pair in self.keep), "names of sites with a width from 0 each"),
            ("calibration_share", 0 < self.calibration_share <= 1, "within (0, 1]"),
            ("seed", self.seed >= 0, "at least 0"),
            ("save_every_s", 0 <= self.save_every_s < math.inf, "at least 0"),
        ):
            if not ok:
                raise OptionError(f"{name} must be {must}. Got {getattr(self, name)}.")
        check_device(self.device)

    @classmethod
    def of(cls, given: Mapping[str, Any], taken_by: Callable[..., Any]) -> "Options":
        """The options that a caller gives by name.

        Args:
            given: what a function was given beside its own arguments.
            taken_by: that function.

        Raises:
            OptionError: naming what is no option, and the nearest that is one.
        """
        of_recovery = {part.name for part in fields(Recovery)}
        own = [word for word in inspect.signature(taken_by).parameters if word != "options"]
        known = [*own, *(part.name for part in fields(cls))]
        for name, value in given.items():
            if name in of_recovery:
                told = f"{name}={value!r}"
                raise OptionError(f"{name} must be said of recovery. Got {told}. Pass recovery=rmtkd.Recovery({told}).")
            check_choice(f"an argument of {taken_by.__name__}", name, known)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return {**asdict(self), "exclude": list(self.exclude), "keep": [list(pair) for pair in self.keep]}

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """`keep` as pairs of name and width."""
        return tuple((pair[0], pair[1]) for pair in self.keep)  # type: ignore[index]

    def steps(self, batches_per_epoch: int) -> int:
        """Of recovery over the whole run."""
        return steps_of(self.epochs, batches_per_epoch)

    def rate_after(self, divergence: float | None) -> float:
        """The peak learning rate after a cut that moved the answers so far from the teacher's, in nats a row:
        `lr √(divergence / gentle)`, from a thousandth of `lr` to `lr`, which it is where the divergence is not known.

        Steps of one size leave a student at one distance from its teacher, whatever it began at: a cut that has cost
        little would lose by steps that are right for one that has cost much.
        """
        lr = self.recovery.lr
        if divergence is None or not divergence < self.gentle:
            return lr
        return lr * max(math.sqrt(divergence / self.gentle), 1e-3)

    def follow(self, plan: Plan, given: Iterable[str]) -> "Options":
        """These options with the choices that a plan has already made.

        Args:
            plan: the plan that a run applies.
            given: names of the options that the caller chose; they must not contradict the plan.

        Raises:
            OptionError: naming every option that does.
        """
        mine = {name: getattr(self, name) for name in OF_PLANS}
        if self.target is not None:
            mine["target"] = str(Target.parse(self.target))
        theirs = {name: getattr(plan, name) for name in mine}
        kept = {site.shares: site.keep for site in plan.sites}
        asked = fixed_widths([site.outline for site in plan.sites], self.exclude, self.pairs)
        wrong = [
            f"{name} {mine[name]}, not {theirs[name]}"
            for name in mine
            if name in given and mine[name] not in (None, theirs[name])
        ]
        wrong += [f"width {width} of {name}, not {kept[name]}" for name, width in asked.items() if width != kept[name]]
        if wrong:
            raise OptionError(
                f"options must not contradict the plan that is applied. Got {', '.join(wrong)}. Change the plan "
                "(`rmtkd plan FOLDER` makes it anew in seconds), or leave these options out."
            )
        return replace(self, **theirs, exclude=(), keep=tuple((name, kept[name]) for name in plan.fixed))

    def _make_plain(self) -> None:
        """Lists, as JSON has them, and mappings become tuples."""
        exclude, keep = self.exclude, self.keep
        for name, value in (("exclude", exclude), ("keep", keep)):
            if not isinstance(value, Iterable):
                raise OptionError(f"{name} must be names of sites. Got {value!r}.")
        pairs = keep.items() if isinstance(keep, Mapping) else keep
        object.__setattr__(self, "exclude", (exclude,) if isinstance(exclude, str) else tuple(exclude))
        object.__setattr__(self, "keep", tuple(tuple(pair) if isinstance(pair, list) else pair for pair in pairs))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Options":
        """The options that `to_dict` gave, maybe on another machine: whether their device is there matters only where a
        model is placed. A run that began before there were `gentle` and `blend`, which were of `Recovery` for a while,
        goes on without."""
        recovery = dict(values["recovery"])
        early = {name: recovery.pop(name, usual) for name, usual in (("gentle", 0.0), ("blend", False))}
        made = cls(**{**early, **values, "recovery": Recovery(**recovery), "device": "cpu"})
        object.__setattr__(made, "device", str(values["device"]))
        return made


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round did: a cut, its check, its recovery, and what selection rows say of it. Where a divergence was no
    number, it is None."""

    number: int
    sites: tuple[str, ...]
    widths: dict[str, tuple[int, int]]
    """Site name to (width before, width after)."""
    parameters: int
    check_error: float
    """Largest relative difference from the projected full-width reference, in float64."""
    accuracy_cut: float
    """Selection accuracy after the cut, before recovery."""
    accuracy: float
    """Selection accuracy after recovery."""
    steps: int
    loss_first: float | None
    loss_last: float | None
    seconds_cut: float
    seconds_recovery: float
    rolled_back: bool = False
    divergence_cut: float | None = None
    """After the cut, from the answers of the untouched model, or of the teacher model where the run has one: in nats a
    row, over some selection rows."""
    divergence: float | None = None
    """The same after recovery; a little too small where these rows have chosen `blend`."""
    lr: float | None = None
    """The peak learning rate of recovery."""
    blend: float | None = None
    """The share of what recovery changed that is kept; None where the weights were not blended with the cut's."""
    way: tuple[tuple[float, float | None], ...] = ()
    """Every share that was tried, and the divergence there; of all that recovery changed first."""
    losses: tuple[tuple[int, float], ...] = ()
    """The loss of recovery over steps, see `thinned`."""
    latency_ms: Latency | None = None
    """Of the model that the round left."""
    latency_ms_untouched: Latency | None = None
    """Of the untouched model, measured in turns with it."""

    def __post_init__(self) -> None:
        for name in ("divergence_cut", "divergence"):
            object.__setattr__(self, name, number_or_none(getattr(self, name)))
        object.__setattr__(self, "way", tuple((share, number_or_none(apart)) for share, apart in self.way))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Round":
        """The round that `asdict` gave, also through JSON, or an earlier version, which knew less."""
        made: dict[str, Any] = {
            "sites": tuple(values["sites"]),
            "widths": {name: tuple(pair) for name, pair in values["widths"].items()},
            "losses": tuple((step, loss) for step, loss in values.get("losses", ())),
            "way": tuple((share, distance) for share, distance in values.get("way", ())),
        }
        for name in ("latency_ms", "latency_ms_untouched"):
            found = values.get(name)
            made[name] = found and Latency(**found)
        return cls(**{**values, **made})


def number_or_none(value: float | None) -> float | None:
    """The value, if it is finite: JSON, and so a record, knows no other numbers."""
    return None if value is None or not math.isfinite(value) else value


def kept_widths(rounds: Iterable[Round]) -> dict[str, int]:
    """The widths that these rounds have cut, by site name."""
    return {name: after for done in rounds if not done.rolled_back for name, (_, after) in done.widths.items()}


def thinned(losses: Sequence[float], most: int = 100) -> tuple[tuple[int, float], ...]:
    """Losses by step as at most so many points: the last step of each stretch, and the mean loss over it."""
    ends = [len(losses) * (i + 1) // most for i in range(most)] if len(losses) > most else range(1, len(losses) + 1)
    starts = [0, *ends][:-1]
    means = (sum(losses[start:end]) / (end - start) for start, end in zip(starts, ends, strict=True))
    return tuple((end, float(f"{mean:.4g}")) for end, mean in zip(ends, means, strict=True))


@dataclass(frozen=True, kw_only=True)
class History:
    """The part of a run that stop rules look at."""

    options: Options
    baseline_accuracy: float
    rounds: tuple[Round, ...]
    pending: int
    """Rounds that are still planned."""
    meets_target: bool = True
    """Whether the plan, which may be changed by hand, is within its target."""


StopRule = Callable[[History], str | None]


def too_much_lost(history: History) -> str | None:
    """Selection accuracy fell by more than the tolerance."""
    tolerance = history.options.tolerance
    if tolerance is None or not history.rounds:
        return None
    lost = history.baseline_accuracy - history.rounds[-1].accuracy
    if lost <= tolerance:
        return None
    return (
        f"tolerance: round {history.rounds[-1].number} lost {lost:.2%} of selection accuracy, more than {tolerance:.2%}"
    )


def enough_rounds(history: History) -> str | None:
    """The allowed number of rounds is reached."""
    most = history.options.max_rounds
    if most is None or len(history.rounds) < most or history.pending == 0:
        return None
    return f"max_rounds: {most} rounds done, {history.pending} left out"


def plan_finished(history: History) -> str | None:
    """Every planned cut is made."""
    if history.pending:
        return None
    if history.options.target is not None:
        if not history.meets_target:
            return f"plan: every cut is made; its widths do not meet the target {Target.parse(history.options.target)}"
        target = Target.parse(history.options.target)
        return f"target: {target} reached{', as predicted from measured shapes' * (target.cost == LATENCY)}"
    return "plan: every site has the width the rule gives it"


def _is_pair(pair: object) -> bool:
    return (
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and bool(pair[0])
        and type(pair[1]) is int
        and pair[1] >= 0
    )


STOP_RULES: tuple[StopRule, ...] = (too_much_lost, enough_rounds, plan_finished)
"""Asked in this order after every round; the first that speaks ends the run."""


def stop_reason(history: History) -> str | None:
    """Why the run ends now, or None if it goes on."""
    return next((reason for rule in STOP_RULES if (reason := rule(history))), None)
