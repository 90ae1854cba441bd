"""A plan as a value: for every site the width that stays, and why. Written as JSON, edited by hand, read back whole."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rmtkd.errors import PlanError
from rmtkd.planning.budget import Curve
from rmtkd.planning.costs import CostTable, Target
from rmtkd.planning.latency import LatencyTable
from rmtkd.planning.lines import Problems, brief, check, parse
from rmtkd.planning.review import misfits, review
from rmtkd.sites import Site, share_settings
from rmtkd.writing import write_atomically

FORMAT = 5


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """What is done to one site, and why.

    Attributes:
        keep: width that stays, per group, from `least` to `width`. The number to edit.
        planned: the width that was chosen when the plan was made; another `keep` is one changed by hand.
        count: directions above the noise edge per group, before rounding and sharing (the mean over heads).
        setting, each, groups_of, least: see `Site`.
        samples: vectors that the spectrum was measured on.
        effective_samples: independent vectors that these are worth; None where unknown.
        q: aspect ratio of the noise that was fitted; dead directions, if any, are set aside.
        sigma2: noise variance; for the rule `mp`, `edge` is `sigma2 (1 + √q)²`.
        edge: the noise edge of the rule, in units of the activations' variance; of heads that have one each, the mean.
        levels: the edge of each head over that mean; empty where all have the same.
        multiplier: the count was taken above this multiple of the edge.
        ks, fit_error, misfit: how well noise explains what lies below the edge, see `spectra.NoiseEdge`.
        margin: gap in the pooled spectrum: the smallest eigenvalue above the edge over the largest below it; None
            where there is no such pair.
        energy: share of the variance in the `keep` largest directions of each head, as if all heads stayed.
        floor: directions that the default detector tells from noise, per group; None if it cannot say.
        loss: held-out loss of narrowing this width alone, to `keep`; None where it was not measured.
        why: one sentence.
    """

    name: str
    keep: int
    planned: int
    width: int
    groups: int
    shares: str
    kind: str
    block: str
    count: float
    rule: str
    samples: int
    q: float
    sigma2: float
    edge: float
    multiplier: float
    ks: float
    fit_error: float
    misfit: bool
    margin: float | None
    energy: float
    why: str
    floor: float | None = None
    loss: float | None = None
    effective_samples: float | None = None
    setting: str | None = None
    each: int = 1
    groups_of: str | None = None
    least: int = 1
    levels: tuple[float, ...] = ()
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.keep, int) and self.least <= self.keep <= self.width):
            raise PlanError(
                f"a site keeps a whole number from {self.least} to its width. {self.name} of width {self.width} was "
                f"given {self.keep!r}. Change it in the plan."
            )

    @property
    def by_hand(self) -> bool:
        """Whether `keep` was changed after the plan was made."""
        return self.keep != self.planned

    @property
    def outline(self) -> Site:
        """The site as far as a plan knows it: without parameters and streams."""
        return Site(
            name=self.name,
            kind=self.kind,  # type: ignore[arg-type]
            block=self.block,
            width=self.width,
            groups=self.groups,
            shares=self.shares,
            setting=self.setting,
            each=self.each,
            groups_of=self.groups_of,
            least=self.least,
            streams=(),
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """For every site the width that stays and the reason, and what the narrowed model will cost. A plain value.

    Attributes:
        uniform: whether only widths are narrowed that a stock configuration gives, each for all layers at once.
        embedding_levels: in how many levels tokens are, see `Options`.
        low_rank: whether its widths are those between two convolutions that one becomes, see `Options`.
        fixed: by name of a shared width: what `exclude`, `keep` and `uniform` asked for; planning again leaves it
            alone.
        multiplier: common factor on all edges, the smallest that meets the target.
        baseline, predicted: `params` and `flops` of the untouched and of the narrowed model, counted; `latency_ms` in
            addition where there is a table to predict it from.
        remarks: what the reader of the plan must know, in sentences.
        costs: the model's cost as a formula of the widths; None where there is none.
        policy: see `schedule.Options`.
        max_loss: largest sum of held-out losses of a guarded plan without a target.
        curves: measured losses by shared width, from which a guarded plan divides its budget.
        loss: held-out loss, all cuts together in closed form, as measured at these widths; None where it was not.
        latency: measured times of the model's shapes, made when a target first asks for latency. Every later plan
            from this one, and every resumed run, uses these.
    """

    model: str
    target: str | None
    rule: str
    tau: float
    multiple_of: int
    min_share: float
    uniform: bool = False
    policy: str = "paper"
    max_loss: float
    embedding_levels: int = 1
    low_rank: bool = False
    fixed: dict[str, int]
    multiplier: float
    sites: tuple[SitePlan, ...]
    baseline: dict[str, int | float]
    predicted: dict[str, int | float]
    remarks: tuple[str, ...] = ()
    costs: CostTable | None
    curves: dict[str, Curve] | None = None
    loss: float | None = None
    latency: LatencyTable | None = None
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        kept: dict[str, int] = {}
        for site in self.sites:
            if kept.setdefault(site.shares, site.keep) != site.keep:
                raise PlanError(
                    f"sites that share the width {site.shares} must keep the same. Got {kept[site.shares]} and "
                    f"{site.keep}. Give them one width in the plan."
                )
            if self.uniform and site.setting is None and site.keep != site.width:
                raise PlanError(
                    f"in a uniform plan {site.name} must keep its whole width {site.width}, which no entry of a stock "
                    f"configuration gives. Got {site.keep}. Change it in the plan, or make one that is not uniform."
                )

    @property
    def widths(self) -> dict[str, int]:
        """The kept width by site name."""
        return {site.name: site.keep for site in self.sites}

    @property
    def meets_target(self) -> bool:
        """Whether the predicted cost is within the target; true without one."""
        if self.target is None:
            return True
        target = Target.parse(self.target)
        return self.predicted[target.cost] <= target.limit(self.baseline)

    def check_fits(self, sites: Sequence[Site]) -> None:
        """Raise `PlanError`, naming every site in which the plan and the model differ."""
        shared = share_settings(sites) if self.uniform else sites
        found = [text for _, text in misfits([asdict(site) for site in self.sites], shared)]
        if found:
            raise PlanError(
                "\n".join(
                    ("a plan must name exactly the sites of its model, at their full widths. They differ:", *found)
                )
                + "\nMake the plan from this model; nothing was changed."
            )

    def to_json(self) -> str:
        """The plan as JSON, read back by `from_json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str, *, sites: Sequence[Site] | None = None, name: str = "plan.json") -> "Plan":
        """Read a plan, also one that was edited by hand.

        Args:
            text: what `to_json` wrote.
            sites: the sites of the model that it is for, to be held against it.
            name: what the text is called in messages.

        Raises:
            PlanError: naming everything that is wrong at once, with the line and the site.
        """
        problems = Problems(name)
        root = parse(text, problems)
        version = root.value.get("format") if isinstance(root.value, dict) else None
        if version is not None and version.value != FORMAT:
            problems.add(version.line, f"format must be {FORMAT}. Got {brief(version.value)}.")
            problems.stop()
        fields = check(cls, root, "", problems)
        review(root, fields, sites, problems)
        problems.stop()
        costs = fields["costs"] and CostTable(**fields["costs"])
        curves = fields["curves"] and {name: Curve(**curve) for name, curve in fields["curves"].items()}
        latency = fields["latency"] and LatencyTable.of(fields["latency"])
        sites_kept = tuple(SitePlan(**site) for site in fields["sites"])
        return cls(**{**fields, "costs": costs, "curves": curves, "latency": latency, "sites": sites_kept})

    @classmethod
    def read(cls, path: Path, *, sites: Sequence[Site] | None = None) -> "Plan":
        """Read a plan from a file, see `from_json`.

        Raises:
            PlanError: if the file cannot be read, or holds no whole plan, or one that does not fit the sites.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"a plan must be a text file in UTF-8. Reading {path} gave {error}. Name another file."
            ) from None
        return cls.from_json(text, sites=sites, name=str(path))

    def save(self, path: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_atomically(path, (self.to_json() + "\n").encode())
