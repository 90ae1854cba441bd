"""What a guarded plan costs, in processor time, against one epoch of recovery; and the memory that it takes.

    OMP_NUM_THREADS=1 python benchmarks/plan_cost.py --teacher TEACHER --task sst2 --data DIR

Processor time of one thread, so that other jobs on the machine count little. The record lies in
`benchmarks/results/plan_cost/`. An epoch is its number of steps times the median of sixty, teacher included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from records import cell
from rmtkd import compression, recipes
from rmtkd.activations import collect, moments_of, observe
from rmtkd.cutting import cut_in_order
from rmtkd.distillation import Recovery, Teacher
from rmtkd.dry_run import metrics_of
from rmtkd.environment import has_bf16, precision_on
from rmtkd.memory import peak_bytes
from rmtkd.planning import Plan, Target, make_plan, retarget, spectra_of
from rmtkd.schedule import Options
from rmtkd.sensitivity import Sensitivity
from rmtkd.sites import find_sites
from rmtkd.training import Phase

RESULTS = Path(__file__).parent / "results" / "plan_cost"
STEPS = 60


def measure(task_name: str, teacher: str, data: Path, target: str) -> dict[str, Any]:
    """Seconds of every part."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    model, rows = source.model, task.rows(data, source, 0)
    sites, example = find_sites(model), task.example(model, rows)
    calibration = compression.share_of(rows.train, Options().calibration_share)
    seconds: dict[str, float] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = act()
        seconds[name] = seconds.get(name, 0.0) + time.process_time() - began
        return found

    timed("moments alone", lambda: collect(model, sites, calibration))
    observed = timed("collection", lambda: observe(model, sites, calibration))
    metrics = timed("metrics", lambda: metrics_of(model, sites, calibration, Options()))
    spectrums = timed("eigenvalues", lambda: spectra_of(observed))
    published = timed("costs and edges", lambda: make_plan(model, sites, spectrums, example))

    def again(curves: Any) -> Plan:
        return timed("budget", lambda: retarget(published, spectrums, target=target, curves=curves))

    judge = timed(
        "guard",
        lambda: Sensitivity(model, sites, moments_of(observed), rows.selection, metrics=metrics, bf16=has_bf16("cpu")),
    )
    fit = judge._fit
    judge._fit = lambda *args: timed("bases", lambda: fit(*args))  # type: ignore[method-assign]
    plan = timed("guard", lambda: judge.guarded(published, again))
    seconds["guard"] -= seconds["bases"] + seconds["budget"]
    peak = peak_bytes()
    student = timed("cut", lambda: cut_in_order(model, sites, plan.widths, calibration, metrics=metrics)[0])
    steps: list[float] = [time.process_time()]
    Phase(
        student,
        rows.train,
        steps=STEPS,
        recovery=Recovery(),
        teacher=Teacher(model),
        precision=precision_on("cpu"),
    ).run(lambda _: steps.append(time.process_time()))
    step = statistics.median(b - a for a, b in pairwise(steps[1:]))
    seconds["epoch"] = step * len(rows.train)
    algebra = sum(seconds[name] for name in ("eigenvalues", "costs and edges", "budget", "bases"))
    return {
        "task": task_name,
        "target": str(Target.parse(target)),
        "parts": seconds,
        "algebra_share": algebra / seconds["epoch"],
        "passes_share": sum(seconds[name] for name in ("collection", "metrics", "guard")) / seconds["epoch"],
        "peak_bytes": peak,
        "moments_bytes": sum(8 * s.groups * s.size**2 * len(s.streams) for s in sites),
    }


def main() -> None:
    """Measure once; print the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", default="25%params")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = cell(
        RESULTS / f"{chosen.task}.json", lambda: measure(chosen.task, chosen.teacher, chosen.data, chosen.target)
    )
    print({name: round(value, 1) for name, value in record["parts"].items()})
    print(f"algebra {record['algebra_share']:.1%}, passes {record['passes_share']:.1%} of an epoch")


if __name__ == "__main__":
    main()
