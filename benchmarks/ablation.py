"""What every part of the method is worth, on the small transformer for digits in full: one thing changed at a time.

    rmtkd bench ablation --scale tiny       # two settings of each kind, a twentieth of the recovery; a test
    rmtkd bench ablation --scale cpu        # all of them, three seeds; an hour on one core
    rmtkd bench ablation --table            # only the tables and docs/ablation.svg

The reference is the default at 13 % of the parameters, about the least that noise edges can leave. `threshold` and
`rule` have no target: there the rule says how much is cut, as published (`--policy paper --metric output`). Every cell
is one JSON file in `benchmarks/results/ablation/`; one that has its file is not run again.

`form`: the same widths in other forms. *inserted* is the published projection that stays, principal directions in front
of every feed-forward reader, which leaves the writers as they are; *no reconstruction* drops units and directions
without putting anything in their place.

`causal`, without training: directions are projected out of the running, untouched network at all sites at once, the
dropped ones of a plan, or as many of those that were kept (the weakest, or the strongest); the divergence of its
answers is what these directions cause.
"""

import argparse
import copy
import json
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
from records import cell, percent, publish, spread
from rmtkd import compression, recipes
from rmtkd.activations import attach, collect
from rmtkd.bases import Basis, linear_basis
from rmtkd.cutting import cut_in_order, fit_bases
from rmtkd.distillation import Recovery
from rmtkd.dry_run import metrics_of, narrowed
from rmtkd.measurement import accuracy, count_flops, count_parameters, evaluation, predict
from rmtkd.planning import Plan
from rmtkd.schedule import Options
from rmtkd.sensitivity import projection
from rmtkd.sites import Site, by_width, find_sites
from rmtkd.spectra import RULES
from rmtkd.surgery import fold
from rmtkd.training import train

RESULTS = Path(__file__).parent / "results" / "ablation"
FIGURE = Path(__file__).parent.parent / "docs" / "ablation.svg"
TARGET = "13%params"
"""At a quarter nothing tells settings apart; the published rule, which keeps all heads, goes no lower than 12.6 %."""
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
    "calibration": {"10 %": {}, **{f"{100 * s:g} %": {"calibration_share": s} for s in (0.001, 0.01, 0.03, 0.2)}},
}
"""Options that differ from the reference, by kind and name; where none does, it is the reference, which is run once."""
FORMS = ("folded", "folded, deep to shallow", "no reconstruction", "inserted")
CAUSES = ("dropped", "as many of the kept, weakest", "as many of the kept, strongest")


class Work:
    """The digits, their teacher, and one plan."""

    def __init__(self, seed: int, cache: Path, recovery: float, epochs: float):
        self.seed, self.cache, self.recovery, self.epochs = seed, cache, recovery, epochs
        self.recipe: Any = recipes.get("digits")

    @cached_property
    def teacher(self) -> nn.Module:
        """The trained network."""
        from rmtkd.teaching import train_teacher

        folder = self.cache / f"digits-{self.epochs:g}epochs-seed{self.seed}"
        if not folder.exists():
            train_teacher(self.recipe, out=folder, seed=self.seed, epochs=self.epochs)
        return self.recipe.load(str(folder)).model

    @cached_property
    def rows(self) -> Any:
        """By role."""
        return self.recipe.rows(None, None, self.seed)

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
            target=TARGET,
            policy="paper",
            seed=self.seed,
        )
        return made


def run(work: Work, options: Mapping[str, Any]) -> dict[str, Any]:
    """One compression with these options."""
    given = {"target": TARGET, "epochs": work.recovery, **options}
    given["recovery"] = replace(work.recipe.options["recovery"], **given.get("recovery", {}))
    result = rmtkd.compress(
        work.teacher,
        train=work.rows.train,
        selection=work.rows.selection,
        report=work.rows.report,
        example=work.example,
        seed=work.seed,
        **given,
    )
    record = result.record
    untouched = accuracy(work.teacher, work.rows.report).value
    closed_form = rmtkd.narrow(
        work.teacher, result.plan, calibration=work.calibration, metric=given.get("metric", "fisher")
    )
    return {
        "options": {name: asdict(value) if isinstance(value, Recovery) else value for name, value in given.items()},
        "teacher": untouched,
        "parameters": record["compressed"]["parameters"] / record["baseline"]["parameters"],
        "flops": record["compressed"]["flops"] / record["baseline"]["flops"],
        "before": accuracy(closed_form, work.rows.report).value,
        "after": record["compressed"]["accuracy"]["value"],
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
    }
    torch.manual_seed(work.seed)
    steps = round(work.recovery * len(work.rows.train))
    train(student, work.rows.train, steps=steps, teacher=work.teacher, recovery=work.recipe.options["recovery"])
    return {**facts, "after": accuracy(student, work.rows.report).value, "steps": steps}


def folded(work: Work, sites: Sequence[Site], metrics: Any) -> nn.Module:
    """The library's way."""
    return cut_in_order(work.teacher, sites, work.plan.widths, work.calibration, metrics=metrics)[0]


def deep_to_shallow(work: Work, sites: Sequence[Site], metrics: Any) -> nn.Module:
    """The same, the last width first: each is cut on the activations of layers that are whole yet."""
    return cut_in_order(work.teacher, sites[::-1], work.plan.widths, work.calibration, metrics=metrics)[0]


def unreconstructed(work: Work, sites: Sequence[Site], metrics: Any) -> nn.Module:
    """The same units and directions; of what is dropped nothing is put back, not even its mean."""
    student = work.teacher
    for group in by_width(sites).values():
        student = cut(work, student, group, metrics, plainly)
    return student


def cut(work: Work, model: nn.Module, group: Sequence[Site], metrics: Any, change: Callable[..., Basis]) -> nn.Module:
    """One shared width cut by the library's bases, changed."""
    moments = collect(model, group, work.calibration)
    made = {s.name: fit_bases(model, s, moments[s.name], work.plan.widths[s.name], metrics) for s in group}
    return fold(model, group, {s.name: tuple(change(s, basis) for basis in made[s.name]) for s in group})


def plainly(site: Site, basis: Basis) -> Basis:
    """The basis with the shortest way back, and about zero. Of a product there is no other."""
    if site.kind == "bilinear":
        return basis
    return replace(basis, lift=torch.linalg.pinv(basis.reduce), mean=torch.zeros_like(basis.mean))


def inserted(work: Work, sites: Sequence[Site], metrics: Any) -> nn.Module:
    """Principal directions in front of every feed-forward reader, as a map that stays. Heads, and an embedding, which
    has no reader to stand in front of, are folded."""
    student = work.teacher
    for group in by_width(sites).values():
        (site, *others) = group
        if others or site.kind != "pointwise":
            student = cut(work, student, group, metrics, lambda _, basis: basis)
            continue
        (moments,) = collect(student, group, work.calibration)[site.name]
        identity = torch.eye(site.size, dtype=torch.float64)[None]
        basis = linear_basis(moments.covariance(), moments.mean, identity, work.plan.widths[site.name])
        student = with_projection(student, site.streams[0].module, basis)
    return student


def with_projection(model: nn.Module, path: str, basis: Basis) -> nn.Module:
    """The model with a projection in front of the linear map at this path."""
    student = copy.deepcopy(model)
    old: Any = student.get_submodule(path)
    first = nn.Linear(old.in_features, basis.reduce.shape[1], bias=False)
    second = nn.Linear(basis.reduce.shape[1], old.out_features)
    with torch.no_grad():
        weight = old.weight.double()
        first.weight.copy_(basis.reduce[0])
        second.weight.copy_(weight @ basis.lift[0])
        dropped = basis.mean[0] - basis.projector[0] @ basis.mean[0]
        second.bias.copy_((0 if old.bias is None else old.bias.double()) + weight @ dropped)
    student.set_submodule(path, nn.Sequential(first, second))
    return student.eval()


FORM: Mapping[str, Callable[..., nn.Module]] = dict(
    zip(FORMS, (folded, deep_to_shallow, unreconstructed, inserted), strict=True)
)


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
    every["form"] = {name: partial(form, name=name) for name in FORMS}
    every["causal"] = {name: partial(causal, which=name) for name in CAUSES}
    most = 2 if scale == "tiny" else None
    return {kind: dict(list(named.items())[:most]) for kind, named in every.items()}


def table(results: Path) -> str:
    """The records as Markdown, a table a kind."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    lines: list[str] = []
    for kind, named in settings("cpu").items():
        mine = {name: [r for r in found if r["file"] == file_of(kind, name)] for name in named}
        if not any(mine.values()):
            continue
        if kind == "causal":
            lines += [
                "",
                f"| {kind}: projected out | directions | seeds | divergence, nats | same answers | accuracy |",
            ]
            lines.append("|---|--:|--:|--:|--:|--:|")
        else:
            lines += ["", f"| {kind} | seeds | parameters | FLOPs | before recovery | after | against teacher |"]
            lines.append("|---|--:|--:|--:|--:|--:|--:|")
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
                lines.append(f"| {name} | {len(cells)} | " + " | ".join([*numbers, against]) + " |")
    return "\n".join(lines).strip()


def _percent(cells: Sequence[Mapping[str, Any]], key: str) -> str:
    return spread(percent(cells, key)) + " %"


def figure(results: Path) -> str:
    """The published figure: accuracy and what remains against τ."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*threshold*.json"))]
    taus = sorted({r["options"]["tau"] for r in found})

    def points(key: str) -> list[tuple[float, float]]:
        return [(t, 100 * statistics.mean(r[key] for r in found if r["options"]["tau"] == t)) for t in taus]

    series = {"accuracy": points("after"), f"accuracy{BEFORE}": points("before"), "parameters": points("parameters")}
    return chart([Panel(title="τ, digits: per cent", series=series, ticks=[(t, f"{t:g}") for t in taus])])


def main() -> None:
    """Run cells, and write tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("tiny", "cpu", "full"), default="tiny")
    parser.add_argument("--kinds", nargs="+", default=list(settings("cpu")), choices=list(settings("cpu")))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--cache", type=Path, default=Path("runs") / "ablation", help="Teachers.")
    parser.add_argument("--results", type=Path, help="Folder of the records; those of the repository by default.")
    parser.add_argument("--table", action="store_true", help="Only write tables and figure.")
    given = parser.parse_args()
    results = given.results or RESULTS
    seeds = given.seeds or ([0] if given.scale == "tiny" else [0, 1, 2])
    for seed in () if given.table else seeds:
        recovery, epochs = (0.25, 3.0) if given.scale == "tiny" else (5.0, 24.0)
        work = Work(seed, given.cache, recovery, epochs)
        for kind, named in settings(given.scale).items():
            for name, act in named.items() if kind in given.kinds else ():
                file = file_of(kind, name)
                cell(results / f"{file}-seed{seed}.json", partial(_described, file, seed, given.scale, act, work))
    if given.results is None:
        publish("ablation", table(results))
        FIGURE.write_text(figure(results))
    else:
        print(table(results))


def file_of(kind: str, name: str) -> str:
    """What a setting is called among files: the reference is the same in all kinds."""
    if KINDS.get(kind, {}).get(name) == {}:
        return "reference"
    return f"{kind}-{name.replace(', ', '-').replace(' %', '%').replace(' ', '_')}"


def _described(file: str, seed: int, scale: str, act: Callable[[Work], Any], work: Work) -> dict[str, Any]:
    facts = {"file": file, "seed": seed, "scale": scale}
    return {**facts, "command": f"rmtkd bench ablation --scale {scale}", **act(work)}


if __name__ == "__main__":
    main()
