"""Latency that a plan predicts against what the narrowed model takes; and what FLOPs would have predicted.

    OMP_NUM_THREADS=1 python benchmarks/latency.py --task sst2 --teacher TEACHER --data DIR [--rows 32 1] [--share 0.02]

One cell for each batch: the table is measured, plans are made for targets and drawn at random, and then the narrowed
models (random values: time does not depend on them) are timed in turns with the untouched shape.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from records import cell
from rmtkd import batches as batching
from rmtkd import compression, recipes
from rmtkd.activations import observe
from rmtkd.errors import PlanError
from rmtkd.modules import randomize
from rmtkd.planning import LATENCY, LatencyTable, make_plan, predict_cost, retarget, spectra_of
from rmtkd.sites import Site, find_sites
from rmtkd.surgery import fill_with_ones, skeleton

RESULTS = Path(__file__).parent / "results" / "latency"
TARGETS = ("50%params", "25%params", "10%params", "2x", "4x")
SCALES = (1.0, 0.5, 0.25, 0.1)
"""Random widths go from 8 to this share of the full ones."""
SECONDS = 45.0


def latency_cell(task_name: str, teacher: str, data: Path, share: float, rows: int) -> dict[str, Any]:
    """Shares of the untouched model's latency and FLOPs, predicted and measured, by plan."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    model, sites = source.model, find_sites(source.model)
    parts = task.rows(data, source, 0)
    calibration = list(compression.share_of(parts.train, share))
    example = batching.head(task.example(model, parts), rows)
    spectrums = spectra_of(observe(model, sites, calibration))
    start = time.perf_counter()
    table = LatencyTable.measure(model, sites, example)
    seconds = time.perf_counter() - start
    plans: dict[str, dict[str, int]] = {}
    made = make_plan(model, sites, spectrums, example, latency=table)
    for target in TARGETS:
        with suppress(PlanError):  # one row cannot be four times as fast at any widths
            plans[target] = retarget(made, spectrums, target=target).widths
    for scale in SCALES:
        plans[f"random, up to {scale:.0%}"] = random_widths(sites, scale, random.Random(f"{scale}"))
    models = [filled(skeleton(model, sites, widths)) for widths in ({}, *plans.values())]
    processor, wall = times([partial(batching.logits, narrowed, example) for narrowed in models])
    baseline = predict_cost(model, sites, {}, example)
    lines = {}
    for i, (name, widths) in enumerate(plans.items(), start=1):
        cost = predict_cost(model, sites, widths, example)
        lines[name] = {
            **{key: cost[key] / baseline[key] for key in cost},
            f"{LATENCY} predicted": table.cost(widths) / table.full_ms,
            f"{LATENCY} measured": processor[i] / processor[0],
            f"{LATENCY} measured by the wall clock": wall[i] / wall[0],
            "ms": processor[i],
        }
    return {
        "task": task_name,
        "batch": table.measured_on["batch"],
        "measured_on": table.measured_on,
        "seconds_table": seconds,
        "full_ms": processor[0],
        "full_ms_in_table": table.full_ms,
        "plans": lines,
    }


def random_widths(sites: Sequence[Site], scale: float, draw: random.Random) -> dict[str, int]:
    """Multiples of 8 for every shared width, up to this share of the full one."""
    shared: dict[str, int] = {}
    for site in sites:
        most = max(8, round(scale * site.width))
        shared.setdefault(site.shares, 8 * draw.randint(1, max(1, most // 8)))
    return {site.name: shared[site.shares] for site in sites}


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """A skeleton with random values."""
    fill_with_ones(model, "cpu")
    randomize(model, seed=1)
    return model.eval()


@torch.no_grad()
def times(calls: Sequence[Callable[[], object]]) -> tuple[list[float], list[float]]:
    """Median milliseconds of each call, in turns for `SECONDS`: processor time of this thread, and wall clock."""
    processor: list[list[float]] = [[] for _ in calls]
    wall: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        for call, own, all_ in zip(calls, processor, wall, strict=True):
            start, start_own = time.perf_counter(), time.thread_time()
            call()
            own.append(1e3 * (time.thread_time() - start_own))
            all_.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record) for record in processor], [statistics.median(record) for record in wall]


def table_of(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as a table in Markdown."""
    lines = [
        "| plan | batch | parameters | measured | predicted | error | by FLOPs | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for name, line in record["plans"].items():
            measured, predicted = line[f"{LATENCY} measured"], line[f"{LATENCY} predicted"]
            lines.append(
                f"| {name} | {record['batch']} | {line['params']:.1%} | {measured:.1%} ({1 / measured:.2f}×) | "
                f"{predicted:.1%} | {predicted / measured - 1:+.1%} | {line['flops']:.1%} | "
                f"{line['flops'] / measured - 1:+.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the cells that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 1])
    parser.add_argument("--share", type=float, default=0.02)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    records = [
        cell(
            RESULTS / f"{chosen.task}-{rows}.json",
            partial(latency_cell, chosen.task, chosen.teacher, chosen.data, chosen.share, rows),
        )
        for rows in chosen.rows
    ]
    print(table_of(records))


if __name__ == "__main__":
    main()
