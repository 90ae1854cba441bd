"""Accuracy against parameters, from 50 % down to 5 %: four ways to choose widths and directions.

    python benchmarks/curve.py --teacher TEACHER --task sst2 --data DIR run [--methods …] [--sizes …] [--seeds …]
    python benchmarks/curve.py table       # Markdown
    python benchmarks/curve.py figure      # docs/curve.svg

| method | widths | directions |
|---|---|---|
| guarded | budget divided by measured loss on selection rows | folded, Fisher metric |
| published | noise edges of the published rule, times one factor | folded |
| energy | the same share of variance everywhere | folded |
| magnitude | the same share of every width | largest weights |

Every cell (task, method, size, seed, learning rate) is one JSON file in `benchmarks/results/curve/`, and one that has
its file is not run again. All cells of one run share the teacher, whose answers to the training rows are computed once,
the rows, the number of steps and the loss. The learning rate of a method is the one that is best on selection rows at
10 % with seed 0. Report rows are read once a cell, after all choices.
"""

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from figures import BEFORE, Panel, chart
from records import identity, kept, percent, print_event, publish, spread, tried
from rmtkd import batches as batching
from rmtkd import compression, recipes
from rmtkd.activations import observe
from rmtkd.blending import blend
from rmtkd.cutting import cut_in_order
from rmtkd.distillation import Recovery, Teacher
from rmtkd.dry_run import metrics_of
from rmtkd.environment import has_bf16, precision_on
from rmtkd.errors import PlanError
from rmtkd.levels import in_levels
from rmtkd.measurement import accuracy, count_parameters, divergence, evaluation
from rmtkd.planning import Plan, retarget, spectra_of
from rmtkd.schedule import Options
from rmtkd.sensitivity import ROWS, every_nth_row
from rmtkd.sites import Site, blocks_of, by_width, find_sites
from rmtkd.surgery import fold
from rmtkd.training import Phase
from shift import beside, scored
from sst2 import magnitude_bases

RESULTS = Path(__file__).parent / "results" / "curve"
FIGURE = Path(__file__).parent.parent / "docs" / "curve.svg"
SIZES = (0.1, 0.25, 0.05, 0.5)
SEEDS = (0, 1, 2)
LEARNING_RATES = (2e-4, 5e-4)
RATED = 0.1
"""The size at which learning rates are compared."""
CALIBRATION = 0.04
LEVELS = 3


@dataclass(frozen=True, kw_only=True)
class Work:
    """A task, its teacher and its rows; what is made from them once."""

    task: str
    teacher: str
    data: Path
    seed: int
    cache: Path
    device: str = "cpu"

    @cached_property
    def recipe(self) -> Any:
        return recipes.get(self.task)

    @cached_property
    def source(self) -> Any:
        return self.recipe.load(self.teacher)

    @cached_property
    def model(self) -> nn.Module:
        return self.source.model.to(self.device)

    @cached_property
    def teacher_id(self) -> str:
        return identity(self.model)

    @cached_property
    def rows(self) -> Any:
        return self.recipe.rows(self.data, self.source, self.seed)

    @cached_property
    def calibration(self) -> Any:
        return compression.share_of(self.rows.train, CALIBRATION)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return find_sites(self.model)

    def plan(self, **options: Any) -> Plan:
        """A plan of the library."""
        example = self.recipe.example(self.model, self.rows)
        made, _ = compression.plan(
            self.model,
            calibration=self.calibration,
            selection=self.rows.selection,
            example=example,
            sites=self.sites,
            seed=self.seed,
            device=self.device,
            **options,
        )
        return made

    @cached_property
    def measured(self) -> Any:
        """A guarded plan with its spectra, the model in levels that it is for, and the metrics of its outputs."""
        model, sites = in_levels(self.model, self.sites, self.rows.train, LEVELS)
        metrics = metrics_of(model, sites, self.calibration, Options())
        made, spectrums = compression.plan(
            model,
            calibration=self.calibration,
            selection=self.rows.selection,
            example=self.recipe.example(self.model, self.rows),
            sites=sites,
            metrics=metrics,
            target="10%params",
            seed=self.seed,
            device=self.device,
        )
        return made, spectrums, model, sites, metrics

    @cached_property
    def own(self) -> dict[str, Any]:
        """How well the teacher itself does on report rows."""
        return asdict(accuracy(self.model, self.rows.report))

    @cached_property
    def answers(self) -> tuple[Tensor, Tensor]:
        """The teacher's log-probabilities of selection rows, and labels."""
        return scored(self.model, self.rows.selection)

    def nearness(self, student: nn.Module) -> dict[str, Any]:
        """How near a student is to the teacher on selection rows."""
        answers, labels = self.answers
        return beside(answers, scored(student, self.rows.selection)[0], labels)

    def taught(self) -> Teacher:
        """The teacher with its answers to all training rows, which are computed once for all cells."""
        teacher = Teacher(self.model, cache=True)
        teacher.kept = kept(self.cache / f"answers-{self.task}-{self.teacher_id}.pt", partial(self._answered, teacher))
        return teacher

    def _answered(self, teacher: Teacher) -> Any:
        kind = torch.device(self.device).type
        with evaluation(self.model), torch.autocast(kind, torch.bfloat16, enabled=has_bf16(self.device)):
            for batch in self.rows.train:
                teacher.logits(batching.to(batch, self.device))
        return teacher.kept


def guarded(work: Work, size: float) -> nn.Module:
    """The library's policy and metric with three embedding levels: all sizes from losses that were weighed once, at
    10 %."""
    made, spectrums, model, sites, metrics = work.measured
    plan = retarget(made, spectrums, target=f"{100 * size:g}%params")
    return cut(model, sites, plan.widths, work, metrics)


def published(work: Work, size: float) -> nn.Module:
    """The published rule, its edges times the common factor that meets the size."""
    return cut(work.model, work.sites, work.plan(policy="paper", target=f"{100 * size:g}%params").widths, work)


def energy(work: Work, size: float) -> nn.Module:
    """The fewest directions with the same share of the variance at every site."""
    values = {
        name: tuple(spectrum.eigenvalues.sum(0) / spectrum.eigenvalues.sum() for spectrum in streams)
        for name, streams in spectra_of(observe(work.model, work.sites, work.calibration)).items()
    }

    def widths(share: float) -> dict[str, int]:
        wish = {site.name: min(int((v.cumsum() < share).sum()) + 1 for v in values[site.name]) for site in work.sites}
        return {
            site.name: rounded(max(wish[other.name] for other in group), site)
            for group in by_width(work.sites).values()
            for site in group
        }

    return cut(work.model, work.sites, widest(work, size, widths), work)


def magnitude(work: Work, size: float) -> nn.Module:
    """The largest weights; every width keeps the same share."""

    def widths(share: float) -> dict[str, int]:
        return {site.name: rounded(share * site.width, site) for site in work.sites}

    chosen = widest(work, size, widths)
    sites = [site for site in work.sites if chosen[site.name] < site.width]
    return fold(work.model, sites, {s.name: magnitude_bases(work.model, s, chosen[s.name]) for s in sites})


METHODS: Mapping[str, Callable[[Work, float], nn.Module]] = {
    "guarded": guarded,
    "published": published,
    "energy": energy,
    "magnitude": magnitude,
}


def rounded(wish: float, site: Site) -> int:
    """The multiple of 8 that a wish is rounded up to. Heads stay, and an embedding whose factors would not pay."""
    keep = 8 * math.ceil(max(wish, 1) / 8)
    return site.width if site.kind == "heads" or keep > 0.95 * site.width else keep


def widest(work: Work, size: float, widths: Callable[[float], dict[str, int]]) -> dict[str, int]:
    """The widths of the largest share that fits the size, by bisection."""
    costs = work.plan(policy="paper")
    full = {site.shares: site.width for site in work.sites}

    def parameters(chosen: Mapping[str, int]) -> int:
        dropped = {site.shares: full[site.shares] - chosen[site.name] for site in work.sites}
        return costs.baseline["params"] + costs.costs.change("params", dropped)  # type: ignore[union-attr]

    if parameters(widths(0.0)) > size * costs.baseline["params"]:
        raise PlanError(f"{size:.0%} must be within reach. {parameters(widths(0.0)):,} parameters remain at least.")
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(widths(middle)) <= size * costs.baseline["params"] else (low, middle)
    return widths(low)


def cut(
    model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], work: Work, metrics: Any = None
) -> nn.Module:
    """The narrowed model."""
    cut_sites = [site for site in sites if widths[site.name] < site.width]
    return cut_in_order(model, cut_sites, widths, work.calibration, metrics=metrics)[0]


def start(work: Work, method: str, size: float) -> tuple[nn.Module, dict[str, Any]]:
    """The cut model, made once for all learning rates, and what is known before recovery."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        student = METHODS[method](work, size)
        return student, {
            "parameters": count_parameters(student),
            "accuracy_selection_cut": asdict(accuracy(student, work.rows.selection)),
            "accuracy_cut": asdict(accuracy(student, work.rows.report)),
            "widths": {site.name: site.width for site in find_sites(student)},
        }

    return kept(work.cache / f"{work.task}-{work.teacher_id}-{method}-{size:g}-{work.seed}.pt", make, work.device)


def run(
    work: Work, method: str, size: float, epochs: float, recovery: Recovery, is_blended: bool = False
) -> dict[str, Any]:
    """One cell. With a hidden-state term the teacher runs along, as its hidden states are not kept. What a student was
    before it was blended stands beside."""
    student, facts = start(work, method, size)
    before = work.nearness(student)
    cut_weights = copy.deepcopy(dict(student.named_parameters())) if is_blended else {}
    torch.manual_seed(work.seed)
    steps = round(epochs * len(work.rows.train))
    Phase(
        student,
        work.rows.train,
        steps=steps,
        recovery=recovery,
        teacher=work.taught(),
        blocks=blocks_of(find_sites(work.model)),
        precision=precision_on(work.device),
    ).run(lambda phase: print_event({"event": "step", "step": len(phase.losses), "loss": phase.losses[-1]}))
    if is_blended:
        rows = every_nth_row(work.rows.selection, ROWS)
        facts["unblended"] = {"accuracy": asdict(accuracy(student, work.rows.report)), "near": work.nearness(student)}
        distance = partial(divergence, student, work.model, rows)
        facts["share"], facts["way"] = blend(student, cut_weights, distance, lambda: None)
    return {
        "task": work.task,
        "method": method,
        "size": size,
        "seed": work.seed,
        "lr": recovery.lr,
        "epochs": epochs,
        "hidden": recovery.hidden,
        "alpha": recovery.alpha,
        "blend": float(is_blended),
        "steps": steps,
        "baseline_parameters": count_parameters(work.model),
        "teacher": work.own,
        "teacher_id": work.teacher_id,
        **facts,
        "near_cut": before,
        "near": work.nearness(student),
        "accuracy_selection": asdict(accuracy(student, work.rows.selection)),
        "accuracy": asdict(accuracy(student, work.rows.report)),
    }


PLAIN = {"epochs": 1.0, "hidden": 0.0, "alpha": Recovery().alpha, "blend": 0.0}
"""How cells of the curve recover, but for the rate."""


def is_plain(record: Mapping[str, Any]) -> bool:
    return all(record.get(name, usual) == usual for name, usual in PLAIN.items())


def records() -> list[dict[str, Any]]:
    """All cells of one plain epoch."""
    return [r for r in every_record() if is_plain(r)]


def every_record() -> list[dict[str, Any]]:
    """All cells."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def chosen_rate(found: Sequence[Mapping[str, Any]], task: str, method: str) -> float | None:
    """The learning rate that is best on selection rows at the size where all are tried, with seed 0."""
    mine = [r for r in found if (r["task"], r["method"], r["size"], r["seed"]) == (task, method, RATED, 0)]
    return max(mine, key=lambda r: r["accuracy_selection"]["value"])["lr"] if mine else None


def table() -> str:
    """The records as Markdown."""
    found, lines = records(), []
    for task in dict.fromkeys(r["task"] for r in found):
        mine = [r for r in found if r["task"] == task]
        lines += [
            f"**{task}**",
            "",
            "| method | size | parameters | seeds | lr | report before recovery | after one epoch | selection after |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for method in METHODS:
            for size in sorted({r["size"] for r in mine}, reverse=True):
                lr = chosen_rate(mine, task, method)
                cells = [r for r in mine if (r["method"], r["size"], r["lr"]) == (method, size, lr)]
                if cells:
                    n = cells[0]["baseline_parameters"]
                    share = statistics.mean(r["parameters"] for r in cells) / n
                    lines.append(
                        f"| {method} | {size:.0%} | {share:.1%} | {len(cells)} | {lr:g} "
                        f"| {spread(percent(cells, 'accuracy_cut'))} | {spread(percent(cells, 'accuracy'))} "
                        f"| {spread(percent(cells, 'accuracy_selection'))} |"
                    )
        lines.append("")
    every = every_record()
    others = [r for r in every if not is_plain(r) or r["lr"] != chosen_rate(found, r["task"], r["method"])]
    lines += [*other_recovery([r for r in others if "unblended" not in r]), ""]
    return "\n".join([*lines, *blended([r for r in every if "unblended" in r])]).strip()


def other_recovery(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells that recovered otherwise, a line each."""
    lines = [
        "| other recovery | size | seed | epochs | hidden | α | lr | report before | after | selection after "
        "| divergence before | after |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in found:
        setting = " | ".join(f"{r.get(name, PLAIN[name]):g}" for name in ("epochs", "hidden", "alpha"))
        numbers = (spread(percent([r], key)) for key in ("accuracy_cut", "accuracy", "accuracy_selection"))
        lines.append(
            f"| {_cell(r)} | {setting} | {r['lr']:g} | "
            + " | ".join([*numbers, _nats(r, "near_cut"), _nats(r, "near")])
            + " |"
        )
    return lines


def blended(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells that were blended with their cut: report accuracy and divergence of the cut, at the end of recovery, and
    between. No line where there is no cell."""
    if not found:
        return []
    lines = [
        "| blended | size | seed | epochs | lr | report, cut | recovered | between | share | nats, cut | recovered "
        "| between |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in found:
        ends = [r["accuracy_cut"], r["unblended"]["accuracy"], r["accuracy"]]
        reached = " | ".join(f"{100 * end['value']:.2f}" for end in ends)
        near = f"{_nats(r, 'near_cut')} | {_nats(r['unblended'], 'near')} | {_nats(r, 'near')}"
        lines.append(f"| {_cell(r)} | {r['epochs']:g} | {r['lr']:g} | {reached} | {r['share']:g} | {near} |")
    return lines


def _cell(record: Mapping[str, Any]) -> str:
    return f"{record['task']} {record['method']} | {record['size']:.0%} | {record['seed']}"


def _nats(record: Mapping[str, Any], key: str) -> str:
    """A divergence; nothing in records of before it was measured."""
    return f"{record[key]['divergence']['value']:.3f}" if key in record else ""


def figure() -> str:
    """Report accuracy against the share of the parameters, a panel a task: solid after one epoch, dashed before."""
    found, panels = records(), []
    for task in dict.fromkeys(r["task"] for r in found):
        mine = [r for r in found if r["task"] == task]
        series: dict[str, list[tuple[float, float]]] = {}
        for method in METHODS:
            lr = chosen_rate(mine, task, method)
            for key, end in (("accuracy", ""), ("accuracy_cut", BEFORE)):
                for size in sorted({r["size"] for r in mine}):
                    cells = [r for r in mine if (r["method"], r["size"], r["lr"]) == (method, size, lr)]
                    if cells:
                        share = statistics.mean(r["parameters"] / r["baseline_parameters"] for r in cells)
                        point = share, statistics.mean(percent(cells, key))
                        series.setdefault(method + end, []).append(point)
        ticks = [(size, f"{size:.0%}") for size in SIZES]
        panels.append(Panel(title=task, series=series, ticks=ticks, log=True))
    return chart(panels)


def main() -> None:
    """Run cells, or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "table", "figure"))
    parser.add_argument("--teacher")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/curve"), help="Cut models and the teacher's answers.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--learning-rates", nargs="+", type=float, help="In place of those that are compared at 10 %%.")
    for name, usual in PLAIN.items():
        parser.add_argument(f"--{name}", type=float, default=usual)
    chosen = parser.parse_args()
    if chosen.part == "table":
        publish("curve", table())
        return
    if chosen.part == "figure":
        FIGURE.write_text(figure())
        return
    chosen.cache.mkdir(parents=True, exist_ok=True)
    given = vars(chosen)
    for seed in chosen.seeds:
        places = {"data": chosen.data, "cache": chosen.cache, "device": chosen.device}
        work = Work(task=chosen.task, teacher=chosen.teacher, seed=seed, **places)
        for size in chosen.sizes:
            for method in chosen.methods:
                best = chosen_rate(records(), chosen.task, method)
                usual_rates = LEARNING_RATES if best is None or (seed, size) == (0, RATED) else [best]
                for lr in chosen.learning_rates or usual_rates:
                    other = "".join(f"-{name}{given[name]:g}" for name, usual in PLAIN.items() if given[name] != usual)
                    name = f"{chosen.task}-{method}-{size:g}-seed{seed}-{lr:g}{other}"
                    recovery = Recovery(lr=lr, hidden=chosen.hidden, alpha=chosen.alpha)
                    one = partial(run, work, method, size, chosen.epochs, recovery, bool(chosen.blend))
                    # refused: the least that a method can leave may be more
                    tried(RESULTS / f"{name}.json", one, teacher_id=work.teacher_id)


if __name__ == "__main__":
    main()
