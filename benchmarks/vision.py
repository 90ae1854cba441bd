"""ResNets of CIFAR-10 at the same number of operations: four ways to choose channels, the same recovery.

    rmtkd bench vision run --model resnet56 --data DIR [--flops 0.39] [--methods …] [--epochs 5] [--seeds 0]
                           [--optimizer sgd --lr 0.05] [--over 0.01] [--device cuda]
    rmtkd bench vision table       # Markdown

| method | widths | channels |
|---|---|---|
| rmtkd | residual and inner, a budget divided by measured loss | chosen and reconstructed, Fisher metric |
| pairs | the same to √share, then the ranks of low-rank pairs | the same |
| magnitude | inner, the same share of each | largest L1 norm of the filter |
| group_norm | residual and inner, the same share of each | Torch-Pruning's `GroupNormPruner`, one shot |

The share of operations is met from below. *magnitude* and *group_norm* move in steps: of ResNet-56 the latter leaves
39.1 % of the operations, or 34.7 %. With `--over 0.01` these two may leave up to a hundredth more than asked for.

The students of `hints.py` start from nothing, with one share of all widths, and have as many parameters as *rmtkd*.

Every cell (network, method, share of operations, epochs, seed, optimiser, learning rate, what it may be over) is one
JSON file in `benchmarks/results/vision/`, and one that has its file is not run again. All share the teacher, the rows,
the loss and the number of steps. Statistics of norms are gathered anew after every cut, for all methods. The teacher
has seen the selection rows; report rows are read twice a cell, before and after recovery, and steer nothing.

For Torch-Pruning: `pip install torch-pruning`.

References:
    Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710. Fang et al., "DepGraph", arXiv 2301.12900.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hints import HINTS, Taught, TaughtPhase
from records import cell, kept, percent, print_event, publish, spread
from rmtkd import batches as batching
from rmtkd import compression, recipes
from rmtkd.bases import Basis
from rmtkd.distillation import OPTIMIZERS, Recovery, Teacher
from rmtkd.environment import precision_on
from rmtkd.measurement import accuracy, count_flops, count_parameters, time_forward
from rmtkd.norms import batch_norms, gather_statistics
from rmtkd.sites import Site, find_sites
from rmtkd.surgery import fold
from rmtkd.training import Phase

RESULTS = Path(__file__).parent / "results" / "vision"
CALIBRATION = 0.04
STAGES = ("layer1", "layer2", "layer3")
SHARES = {"resnet56": 0.39, "resnet20": 0.55}
"""Share of the operations that remains, unless another is asked for: 2.56 and 1.82 times fewer."""


class Work:
    """A network, its teacher and its rows.

    Args:
        model: its name.
        data: folder of its images.
        seed: of all that is drawn.
        cache: folder of cut networks.
        over: share of the operations asked for by which `STEPPED` methods may leave more.
        device: where networks are.
    """

    def __init__(self, model: str, data: Path, seed: int, cache: Path, *, over: float = 0.0, device: str = "cpu"):
        recipe = recipes.get("cifar10")
        source = recipe.load(model, data)
        self.model = source.model.to(device)
        self.rows = recipe.rows(data, source, seed)
        self.example = recipe.example(self.model, self.rows)
        self.calibration = list(compression.share_of(self.rows.train, CALIBRATION))
        self.name, self.seed, self.cache, self.over, self.device = model, seed, cache, over, device

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return find_sites(self.model)

    @cached_property
    def operations(self) -> int:
        return count_flops(self.model, self.example)

    def fits(self, model: nn.Module, share: float) -> bool:
        """Whether what a step leaves is no more than may be left."""
        return count_flops(model, self.example) <= (1 + self.over) * share * self.operations


def rmtkd(work: Work, share: float, multiple_of: int) -> nn.Module:
    """The library's default."""
    return narrowed_to(work, work.model, share * work.operations, multiple_of=multiple_of)


def pairs(work: Work, share: float, multiple_of: int) -> nn.Module:
    """The same to the square root of the share, then low-rank pairs for the rest."""
    narrower = narrowed_to(work, work.model, math.sqrt(share) * work.operations, multiple_of=multiple_of)
    return narrowed_to(work, narrower, share * work.operations, multiple_of=multiple_of, low_rank=True)


def narrowed_to(work: Work, model: nn.Module, operations: float, **options: Any) -> nn.Module:
    """The model, or a narrower one, at so many operations."""
    plan, _ = compression.plan(
        model,
        calibration=work.calibration,
        selection=work.rows.selection,
        example=work.example,
        target=f"{100 * operations / count_flops(model, work.example):.4f}%flops",
        seed=work.seed,
        device=work.device,
        **options,
    )
    return compression.narrow(model, plan, calibration=work.calibration)


def magnitude(work: Work, share: float, multiple_of: int) -> nn.Module:
    """The same share of every inner width, by bisection; the filters with the largest L1 norm."""
    inner = [site for site in work.sites if site.scope is not None]

    def cut(part: float) -> nn.Module:
        bases = {site.name: (_largest(work.model, site, max(1, round(part * site.width))),) for site in inner}
        return fold(work.model, inner, bases)

    return cut(largest(lambda part: work.fits(cut(part), share)))


def _largest(model: nn.Module, site: Site, keep: int) -> Basis:
    """The units whose filters have the largest L1 norm; the others are dropped without replacement."""
    weights = [
        model.get_parameter(axis.parameter).detach() for axis in site.streams[0].writers if "bn" not in axis.parameter
    ]
    score = torch.stack([weight.abs().flatten(1).sum(1) for weight in weights]).sum(0)
    kept = score.topk(keep).indices.sort().values.cpu()
    reduce = torch.eye(site.width, dtype=torch.float64)[kept][None]
    return Basis(reduce=reduce, lift=reduce.mT, mean=torch.zeros(1, site.width, dtype=torch.float64))


def group_norm(work: Work, share: float, multiple_of: int) -> nn.Module:
    """Torch-Pruning on the same network."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    example = {"pixel_values": work.example["pixel_values"][:1].to(work.device)}

    def cut(part: float) -> nn.Module:
        model = copy.deepcopy(work.model)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        pruner = tp.pruner.GroupNormPruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=part,
            ignored_layers=[model.get_submodule("linear")],
            output_transform=lambda output: output.logits.sum(),
        )
        pruner.step()
        return model.eval()

    return cut(1 - largest(lambda kept: work.fits(cut(1 - kept), share)))


def student(work: Work, share: float, multiple_of: int) -> nn.Module:
    """A random start with the same share of every width, and no more parameters than the library's default. It hangs on
    the seed and the shape alone."""
    most = count_parameters(start(work, "rmtkd", share, multiple_of)[0])
    whole: Any = work.model.config

    def of(part: float) -> nn.Module:
        config = copy.deepcopy(whole)
        config.hidden_sizes = [max(1, round(part * size)) for size in whole.hidden_sizes]
        config.inner_sizes = [[max(1, round(part * size)) for size in sizes] for sizes in whole.inner_sizes]
        torch.manual_seed(work.seed)
        return type(work.model)(config).to(work.device).eval()  # type: ignore[call-arg]

    return of(largest(lambda part: count_parameters(of(part)) <= most))


def largest(fits: Callable[[float], bool]) -> float:
    """The largest share that fits, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


STEPPED = ("magnitude", "group_norm")
METHODS = {"rmtkd": rmtkd, "pairs": pairs, "magnitude": magnitude, "group_norm": group_norm} | dict.fromkeys(
    HINTS, student
)


def start(work: Work, method: str, share: float, multiple_of: int) -> tuple[nn.Module, dict[str, Any]]:
    """The cut network, made once for all recoveries, and what is known before recovery."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(work.seed)
        begin = time.monotonic()
        student = METHODS[method](work, share, multiple_of)
        gather_statistics(student, batch_norms(student), work.calibration)
        facts = {"seconds_cut": time.monotonic() - begin}
        return student, facts | {f"{name}_cut": asdict(accuracy(student, rows)) for name, rows in _held(work)}

    name = f"{work.name}-{method}-{share:g}-{multiple_of}-{work.seed}{over_of(work.over, method)}.pt"
    return kept(work.cache / name, make, work.device)


def over_of(over: float, method: str) -> str:
    """How names of files tell that more than asked for may be left."""
    return f"-over{over:g}" if over and method in STEPPED else ""


def run(work: Work, method: str, share: float, epochs: float, multiple_of: int, recovery: Recovery) -> dict[str, Any]:
    """One cell."""
    student, facts = start(work, method, share, multiple_of)
    print({name: round(facts[f"{name}_cut"]["value"], 4) for name, _ in _held(work)}, flush=True)
    torch.manual_seed(work.seed)
    phase: dict[str, Any] = {
        "steps": round(epochs * len(work.rows.train)),
        "recovery": recovery,
        "teacher": Teacher(work.model),
        "precision": precision_on(work.device),
    }
    if HINTS.get(method):
        taught = Taught(student, work.model, STAGES, method, batching.to(work.example, work.device)).to(work.device)
        training: Phase = TaughtPhase(taught, work.rows.train, stages=STAGES, **phase)
    else:
        training = Phase(student, work.rows.train, **phase)
    training.run(lambda phase: print_event({"event": "step", "step": len(phase.losses), "loss": phase.losses[-1]}))
    batches = {rows: {"pixel_values": work.example["pixel_values"].repeat(4, 1, 1, 1)[:rows]} for rows in (1, 128)}
    times = {rows: time_forward([work.model, student], batch, repeats=30) for rows, batch in batches.items()}
    return {
        "method": method,
        "share": share,
        "over": work.over if method in STEPPED else 0.0,
        "epochs": epochs,
        "multiple_of": multiple_of,
        "seed": work.seed,
        "recovery": asdict(recovery),
        "baseline": {
            "parameters": count_parameters(work.model),
            "flops": work.operations,
            **{name: asdict(accuracy(work.model, rows)) for name, rows in _held(work)},
        },
        "parameters": count_parameters(student),
        "flops": count_flops(student, work.example),
        "widths": {site.name: site.width for site in find_sites(student)},
        "latency_ms": {rows: [asdict(latency) for latency in pair] for rows, pair in times.items()},
        **facts,
        **{name: asdict(accuracy(student, rows)) for name, rows in _held(work)},
    }


def _held(work: Work) -> list[tuple[str, Any]]:
    return [("accuracy", work.rows.report), ("accuracy_selection", work.rows.selection)]


def table() -> str:
    """The records as Markdown."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        recovery = f"{record['recovery'].get('optimizer', 'adamw')} {record['recovery']['lr']:g}"
        cell_of = ("share", "epochs", "method", "multiple_of")
        key = (path.name.split("-")[0], *(record[name] for name in cell_of), recovery, record.get("over", 0.0))
        found.setdefault(key, []).append(record)
    lines = [
        "| network | fewer MACs | epochs | recovery | method | seeds | parameters | test, teacher | before recovery "
        "| after | batch 1 | batch 128 |",
        "|---|--:|--:|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (network, _, epochs, method, _, recovery, _), cells in sorted(
        found.items(), key=lambda item: tuple(map(str, item[0]))
    ):
        first = cells[0]
        baseline = first["baseline"]
        fewer = statistics.mean(baseline["flops"] / r["flops"] for r in cells)
        faster = [
            statistics.mean(r["latency_ms"][rows][0]["median"] / r["latency_ms"][rows][1]["median"] for r in cells)
            for rows in ("1", "128")
        ]
        lines.append(
            f"| {network} | {fewer:.2f}× | {epochs:g} | {recovery} | {method} | {len(cells)} "
            f"| {first['parameters'] / baseline['parameters']:.0%} | {100 * baseline['accuracy']['value']:.2f} "
            f"| {spread(percent(cells, 'accuracy_cut'))} | {spread(percent(cells, 'accuracy'))} "
            f"| {faster[0]:.2f}× | {faster[1]:.2f}× |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run cells, or print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "table"))
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--flops", type=float)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--multiple-of", type=int, default=4)
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--over", type=float, default=0.0, help="Share by which steps may leave more than asked for.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path("runs/vision"), help="Cut networks.")
    chosen = parser.parse_args()
    if chosen.part == "table":
        publish("vision", table())
        return
    share = chosen.flops or SHARES[chosen.model]
    recovery = Recovery(optimizer=chosen.optimizer, lr=chosen.lr, weight_decay=5e-4)
    for seed in chosen.seeds:
        work = Work(chosen.model, chosen.data, seed, chosen.cache, over=chosen.over, device=chosen.device)
        for method in chosen.methods:
            name = f"{chosen.model}-{method}-{share:g}-{chosen.epochs:g}epochs-seed{seed}"
            name += f"-multiple{chosen.multiple_of}" * (chosen.multiple_of != 4) + over_of(chosen.over, method)
            name += f"-{recovery.optimizer}-{recovery.lr:g}" * ((recovery.optimizer, recovery.lr) != ("adamw", 1e-3))
            one = partial(run, work, method, share, chosen.epochs, chosen.multiple_of, recovery)
            cell(RESULTS / f"{name}.json", one)


if __name__ == "__main__":
    main()
