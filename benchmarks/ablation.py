"""What every part of the method is worth, on the small transformer for digits in full and on a slice of SST-2: one
thing changed at a time.

    rmtkd bench ablation --scale tiny       # two settings of each kind, a twentieth of the recovery; a test
    rmtkd bench ablation --scale cpu        # all of them, three seeds; an hour on one core
    rmtkd bench ablation --scale cpu --task sst2 --teacher TEACHER --data DIR --seeds 0     # a tenth of the rows
    rmtkd bench ablation --table            # only the tables and docs/ablation.svg

The reference is the default at 13 % of the parameters, about the least that noise edges can leave (SST-2: 10 %).
`threshold` and `rule` have no target: there the rule says how much is cut, as published (`--policy paper --metric
output`); recovery is the reference's, which `form` alone takes without `gentle` and `blend`. `calibration` is a share
of the rows that are used, and at least one batch: of digits that is 0.5 %. Every cell is one JSON file in
`benchmarks/results/ablation/`; one that has its file is not run again.

`form`: the same widths in other forms. *inserted* is the published projection that stays, principal directions in front
of every feed-forward reader, which leaves the writers as they are; *no reconstruction* drops units and directions
without putting anything in their place.

`causal`, without training: directions are projected out of the running, untouched network at all sites at once, the
dropped ones of a plan, or as many of those that were kept (the weakest, or the strongest); the divergence of its
answers is what these directions cause.
"""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rmtkd
from figures import BEFORE, Panel, chart
from forms import FORM
from records import arguments, identity, percent, publish, read_largest_scale, spread, tried
from rmtkd import compression, recipes
from rmtkd.activations import attach, collect
from rmtkd.bases import Basis
from rmtkd.distillation import Recovery
from rmtkd.dry_run import metrics_of, narrowed
from rmtkd.measurement import accuracy, count_flops, count_parameters, divergence, evaluation, predict
from rmtkd.planning import Plan
from rmtkd.schedule import Options
from rmtkd.sensitivity import projection
from rmtkd.sites import find_sites
from rmtkd.spectra import RULES
from rmtkd.training import train

RESULTS = Path(__file__).parent / "results" / "ablation"
FIGURE = Path(__file__).parent.parent / "docs" / "ablation.svg"
TARGET = "13%params"
"""At a quarter nothing tells settings apart; the published rule, which keeps all heads, goes no lower than 12.6 %."""
SLICED = {"sst2": (0.1, "10%params", 1.0)}
"""Of other tasks: the share of the training rows that is used, the target of the reference, epochs of recovery."""
TAUS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
PAPER: Mapping[str, Any] = {"policy": "paper", "metric": "output", "target": None}
KINDS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "threshold": {f"{tau:g}": {**PAPER, "tau": tau} for tau in TAUS},
    "rule": {rule: {**PAPER, "rule": rule} for rule in RULES if rule not in ("energy", "fixed")},
    "policy": {
        "guarded, fisher": {},
        "guarded, output": {"metric": "output"},
        "paper, fisher": {"policy": "paper"},
        "paper, output": {"policy": "paper", "metric": "output"},
    },
    "granularity": {
        "round": {},
        "layer, previous": {"granularity": "layer"},
        "layer, original": {"granularity": "layer", "teacher": "original"},
        "site, previous": {"granularity": "site"},
        "site, original": {"granularity": "site", "teacher": "original"},
    },
    "alpha": {"0.3": {}, **{f"{alpha:g}": {"recovery": {"alpha": alpha}} for alpha in (0.0, 0.5, 0.7, 1.0)}},
    "temperature": {"2": {}, **{f"{t:g}": {"recovery": {"temperature": t}} for t in (0.5, 1.0, 1.5, 4.0)}},
    "gentle": {"0.4": {}, "0": {"gentle": 0.0}},
    "blend": {"nearest": {}, "end": {"blend": False}},
    "calibration": {"10 %": {}, **{f"{100 * s:g} %": {"calibration_share": s} for s in (0.001, 0.01, 0.03, 0.2)}},
}
"""Options that differ from the reference, by kind and name; where none does, it is the reference, which is run once."""
REFERENCE = "reference"
CAUSES = ("dropped", "as many of the kept, weakest", "as many of the kept, strongest")


class Work:
    """A task, its teacher, and one plan.

    Args:
        seed: of all that is drawn.
        cache: folder of teachers for digits.
        recovery: epochs.
        epochs: of a teacher for digits.
        task: digits, or one of `SLICED`.
        path: of the teacher of another task.
        data: of another task.
        device: where a compression runs and students recover; what is measured beside it is on the CPU.
    """

    def __init__(
        self,
        seed: int,
        cache: Path,
        recovery: float,
        epochs: float,
        *,
        task: str = "digits",
        path: str | None = None,
        data: Path | None = None,
        device: str = "cpu",
    ):
        self.seed, self.cache, self.recovery, self.epochs = seed, cache, recovery, epochs
        self.task, self.path, self.data, self.device = task, path, data, device
        self.recipe: Any = recipes.get(task)
        self.share, self.target, _ = SLICED.get(task, (1.0, TARGET, recovery))

    @cached_property
    def source(self) -> Any:
        """The trained network, with what belongs to it."""
        from rmtkd.teaching import train_teacher

        if self.path is not None:
            return self.recipe.load(self.path, self.data)

        folder = self.cache / f"digits-{self.epochs:g}epochs-seed{self.seed}"
        if not folder.exists():
            train_teacher(self.recipe, out=folder, seed=self.seed, epochs=self.epochs)
        return self.recipe.load(str(folder))

    @property
    def teacher(self) -> nn.Module:
        """The trained network."""
        return self.source.model

    @cached_property
    def teacher_id(self) -> str | None:
        """Of a teacher that was given; those for digits are made anew, and differ in the last bits."""
        return None if self.path is None else identity(self.teacher)

    @cached_property
    def rows(self) -> Any:
        """By role; of the training rows a slice."""
        whole = self.recipe.rows(self.data, self.source, self.seed)
        return whole if self.share == 1 else replace(whole, train=list(compression.share_of(whole.train, self.share)))

    @property
    def recover(self) -> Recovery:
        """How students recover."""
        return self.recipe.options.get("recovery", Recovery())

    @cached_property
    def calibration(self) -> Any:
        """A tenth of the training rows."""
        return compression.share_of(self.rows.train, 0.1)

    @cached_property
    def example(self) -> Any:
        """The batch whose cost is counted."""
        return self.recipe.example(self.teacher, self.rows)

    @cached_property
    def plan(self) -> Plan:
        """The published rule at the target of the reference."""
        made, _ = compression.plan(
            self.teacher,
            calibration=self.calibration,
            example=self.example,
            target=self.target,
            policy="paper",
            seed=self.seed,
        )
        return made


def run(work: Work, options: Mapping[str, Any]) -> dict[str, Any]:
    """One compression with these options."""
    given = {"target": work.target, "epochs": work.recovery, **options}
    given["recovery"] = replace(work.recover, **given.get("recovery", {}))
    result = rmtkd.compress(
        work.teacher,
        train=work.rows.train,
        selection=work.rows.selection,
        report=work.rows.report,
        example=work.example,
        seed=work.seed,
        device=work.device,
        **given,
    )
    record, student = result.record, result.model.cpu()
    untouched = accuracy(work.teacher, work.rows.report).value
    seen = compression.share_of(work.rows.train, given.get("calibration_share", Options().calibration_share))
    closed_form = rmtkd.narrow(work.teacher, result.plan, calibration=seen, metric=given.get("metric", "fisher"))
    return {
        "options": {name: asdict(value) if isinstance(value, Recovery) else value for name, value in given.items()},
        "teacher": untouched,
        "parameters": record["compressed"]["parameters"] / record["baseline"]["parameters"],
        "flops": record["compressed"]["flops"] / record["baseline"]["flops"],
        "before": accuracy(closed_form, work.rows.report).value,
        "after": record["compressed"]["accuracy"]["value"],
        "nats_before": divergence(closed_form, work.teacher, work.rows.report),
        "nats_after": divergence(student, work.teacher, work.rows.report),
        "steps": sum(done["steps"] for done in record["rounds"]),
    }


def form(work: Work, name: str) -> dict[str, Any]:
    """The widths of one plan in one form, and recovery of what came of it."""
    sites = narrowed(find_sites(work.teacher), work.plan)
    metrics = metrics_of(work.teacher, sites, work.calibration, Options(seed=work.seed))
    student = FORM[name](work, sites, metrics)
    before = accuracy(student, work.rows.report).value
    facts = {
        "teacher": accuracy(work.teacher, work.rows.report).value,
        "parameters": count_parameters(student) / count_parameters(work.teacher),
        "flops": count_flops(student, work.example) / count_flops(work.teacher, work.example),
        "before": before,
        "nats_before": divergence(student, work.teacher, work.rows.report),
    }
    torch.manual_seed(work.seed)
    steps = round(work.recovery * len(work.rows.train))
    teacher = copy.deepcopy(work.teacher).to(work.device)
    train(student.to(work.device), work.rows.train, steps=steps, teacher=teacher, recovery=work.recover)
    student.cpu()
    after = {
        "after": accuracy(student, work.rows.report).value,
        "nats_after": divergence(student, work.teacher, work.rows.report),
    }
    return {**facts, **after, "steps": steps}


def causal(work: Work, which: str) -> dict[str, Any]:
    """What the answers lose with these directions."""
    model, widths = work.teacher, work.plan.widths
    sites = [site for site in narrowed(find_sites(model), work.plan) if site.kind != "bilinear"]
    moments = collect(model, sites, work.calibration)
    answers = predict(model, work.rows.report)[0].double().log_softmax(-1)
    projected = 0
    with ExitStack() as hooks, evaluation(model):
        for site in sites:
            stream, moment = site.streams[0], moments[site.name][0]
            out = chosen(moment.covariance(), site.size - widths[site.name] * site.each, which)
            projected += site.groups * (site.size - out.shape[-1])
            basis = Basis(reduce=out.mT, lift=out, mean=moment.mean)
            hooks.callback(attach(model, stream, projection(basis, torch.device("cpu"))).remove)
        scores, labels = predict(model, work.rows.report)
    changed = scores.double().log_softmax(-1)
    return {
        "divergence": float((answers.exp() * (answers - changed)).sum(-1).mean()),
        "agreement": float((answers.argmax(-1) == changed.argmax(-1)).double().mean()),
        "after": float((scores.argmax(-1) == labels).double().mean()),
        "teacher": float((answers.argmax(-1) == labels).double().mean()),
        "directions": projected,
        "of": sum(site.groups * site.size for site in sites),
    }


def chosen(covariance: Tensor, dropped: int, which: str) -> Tensor:
    """What stays, as columns: everything but the dropped directions, or but as many of the kept ones (half of those
    where fewer are kept)."""
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(-1)  # the strongest first
    width = vectors.shape[-1]
    kept = width - dropped
    if which == "dropped":
        return vectors[..., :kept]
    count = dropped if dropped < kept else kept // 2
    if which.endswith("weakest"):
        return torch.cat([vectors[..., : kept - count], vectors[..., kept:]], -1)
    return vectors[..., count:]


def settings(scale: str) -> dict[str, dict[str, Callable[[Work], dict[str, Any]]]]:
    """What is run, by kind and name; at the smallest scale two of each kind."""
    every: dict[str, dict[str, Callable[[Work], dict[str, Any]]]] = {
        kind: {name: partial(run, options=options) for name, options in named.items()} for kind, named in KINDS.items()
    }
    every["form"] = {name: partial(form, name=name) for name in FORM}
    every["causal"] = {name: partial(causal, which=name) for name in CAUSES}
    most = 2 if scale == "tiny" else None
    return {kind: dict(list(named.items())[:most]) for kind, named in every.items()}


def table(results: Path) -> str:
    """The records as Markdown, a table a task and kind."""
    every = read_largest_scale(results)
    made = {task: _tables([r for r in every if r.get("task", "digits") == task]) for task in ("digits", *SLICED)}
    named = [text if task == "digits" else f"**{task}**\n\n{text}" for task, text in made.items() if text]
    return "\n\n".join(named)


def _tables(found: Sequence[Mapping[str, Any]]) -> str:
    lines: list[str] = []
    for kind, named in settings("cpu").items():
        mine = {name: [r for r in found if r["file"] == file_of(kind, name)] for name in named}
        if all(not cells or file_of(kind, name) == REFERENCE for name, cells in mine.items()):
            continue  # the reference alone compares with nothing
        if kind == "causal":
            lines += [
                "",
                f"| {kind}: projected out | directions | seeds | divergence, nats | same answers | accuracy |",
            ]
            lines.append("|---|--:|--:|--:|--:|--:|")
        else:
            told = "before recovery | after | against teacher | nats from it, before → after"
            lines += ["", f"| {kind} | seeds | parameters | FLOPs | {told} |", "|---|--:|--:|--:|--:|--:|--:|--:|"]
        for name, cells in mine.items():
            if cells and kind == "causal":
                shares = f"{cells[0]['directions']:,} of {cells[0]['of']:,}"
                caused = spread([r["divergence"] for r in cells], ".3f")
                numbers = (caused, _percent(cells, "agreement"), _percent(cells, "after"))
                lines.append(f"| {name} | {shares} | {len(cells)} | " + " | ".join(numbers) + " |")
            elif cells:
                losses = [100 * (r["after"] - r["teacher"]) for r in cells]
                against = f"{statistics.mean(losses):+.2f}"
                numbers = [_percent(cells, key) for key in ("parameters", "flops", "before", "after")]
                lines.append(f"| {name} | {len(cells)} | " + " | ".join([*numbers, against, _nats(cells)]) + " |")
    return "\n".join(lines).strip()


def _nats(cells: Sequence[Mapping[str, Any]]) -> str:
    """On report rows; the first records do not hold it."""
    if any("nats_after" not in r for r in cells):
        return "–"
    return " → ".join(spread([r[key] for r in cells], ".3f") for key in ("nats_before", "nats_after"))


def _percent(cells: Sequence[Mapping[str, Any]], key: str) -> str:
    return spread(percent(cells, key)) + " %"


def figure(results: Path) -> str:
    """The published figure: accuracy and what remains against τ."""
    every = [r for r in read_largest_scale(results) if r["file"].startswith("threshold")]
    panels = []
    for task in ("digits", *SLICED):
        found = [r for r in every if r.get("task", "digits") == task]
        taus = sorted({r["options"]["tau"] for r in found})
        series = {
            name: [(t, statistics.mean(percent([r for r in found if r["options"]["tau"] == t], key))) for t in taus]
            for name, key in (("accuracy", "after"), (f"accuracy{BEFORE}", "before"), ("parameters", "parameters"))
        }
        if taus:
            ticks = [(t, f"{t:g}") for t in taus]
            panels.append(Panel(title=f"{task}: per cent against τ", series=series, ticks=ticks))
    return chart(panels)


def main() -> None:
    """Run cells, and write tables and figure."""
    parser = arguments("ablation", __doc__)
    parser.add_argument("--kinds", nargs="+", default=list(settings("cpu")), choices=list(settings("cpu")))
    parser.add_argument("--task", default="digits", choices=("digits", *SLICED))
    parser.add_argument("--teacher", help="Of another task than digits.")
    parser.add_argument("--device", default="cpu", help="Where students recover.")
    given = parser.parse_args()
    results = given.results or RESULTS
    seeds = given.seeds or ([0] if given.scale == "tiny" else [0, 1, 2])
    for seed in () if given.table else seeds:
        recovery, epochs = (0.25, 3.0) if given.scale == "tiny" else (5.0, 24.0)
        if given.task in SLICED:
            recovery = SLICED[given.task][2]
        other = {"task": given.task, "path": given.teacher, "data": given.data, "device": given.device}
        work = Work(seed, given.cache, recovery, epochs, **other)
        prefix = f"{given.scale}-{given.task}"
        for kind, named in settings(given.scale).items():
            for name, act in named.items() if kind in given.kinds else ():
                file = file_of(kind, name)
                one = partial(_described, file, kind, given.scale, act, work)
                tried(results / f"{prefix}-{file}-seed{seed}.json", one, teacher_id=work.teacher_id)
    publish("ablation", table(results), given.results)
    if given.results is None:
        FIGURE.write_text(figure(results))


def file_of(kind: str, name: str) -> str:
    """What a setting is called among files: the reference is the same in all kinds."""
    if KINDS.get(kind, {}).get(name) == {}:
        return REFERENCE
    return f"{kind}-{name.replace(', ', '-').replace(' %', '%').replace(' ', '_')}"


def _described(file: str, kind: str, scale: str, act: Callable[[Work], Any], work: Work) -> dict[str, Any]:
    facts = {"file": file, "task": work.task, "seed": work.seed, "scale": scale}
    where = f" --task {work.task} --teacher TEACHER --data DIR" if work.task in SLICED else ""
    how = f"--kinds {kind} --seeds {work.seed} --device {work.device}"
    return {**facts, "command": f"rmtkd bench ablation --scale {scale}{where} {how}", **act(work)}


if __name__ == "__main__":
    main()
