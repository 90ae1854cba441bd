"""What each option of recovery is worth, at equal shape, start and steps. Steers by selection rows only: report rows
are not read.

    python benchmarks/recovery.py run --task sst2 --teacher TEACHER --data DIR
    python benchmarks/recovery.py pace --task sst2 --teacher TEACHER --data DIR
    python benchmarks/recovery.py table

Every cell (task, setting, seed) is one compression to a quarter of the parameters; its record is a file in
`benchmarks/results/recovery/`, and cells whose record is there are not run again.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from records import cell, print_event
from rmtkd import compression, recipes
from rmtkd.batches import Batch
from rmtkd.distillation import Recovery, Teacher
from rmtkd.measurement import predict
from rmtkd.modules import randomize
from rmtkd.schedule import Options
from rmtkd.sites import find_sites
from rmtkd.surgery import fill_with_zeros, skeleton
from rmtkd.training import Phase

RESULTS = Path(__file__).parent / "results" / "recovery"
TARGET = "25%params"
PACE_BATCHES = 40
TASKS = ("sst2", "ag_news")
SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {},
    "hidden 0.5": {"hidden": 0.5},
    "hidden 2": {"hidden": 2.0},
    "hidden 8": {"hidden": 8.0},
    "α 0": {"alpha": 0.0},
    "α 0.7": {"alpha": 0.7},
    "T 1": {"temperature": 1.0},
    "T 4": {"temperature": 4.0},
    "average 0.99": {"average": 0.99},
    "average 0.998": {"average": 0.998},
    "lr 1e-4": {"lr": 1e-4},
    "lr 5e-4": {"lr": 5e-4},
    "by layer": {"granularity": "layer"},
    "by layer, original": {"granularity": "layer", "teacher": "original"},
    "by layer, average": {"granularity": "layer", "average": 0.99},
}
"""What differs from the reference: one epoch share of α 0.3, T 2, learning rate 2e-4, all cuts at once."""


def run_cell(task_name: str, setting: str, seed: int, teacher: str, data: Path, epochs: float) -> dict[str, Any]:
    """Compress, and compare with the teacher on selection rows."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    rows = task.rows(data, source.tokenizer, seed)
    given = dict(SETTINGS[setting])
    given["epochs"] = epochs * given.get("epochs", 1.0)
    own = {name: given.pop(name) for name in list(given) if name not in Options.__dataclass_fields__}
    result = compression.compress(
        source.model,
        train=rows.train,
        selection=rows.selection,
        example=task.example(source.model),
        target=TARGET,
        recovery=Recovery(**own),
        precision="bf16",
        seed=seed,
        on_event=print_event,
        **given,
    )
    expected, labels = predict(source.model, rows.selection)
    got, _ = predict(result.model, rows.selection)
    p, q = expected.log_softmax(-1), got.log_softmax(-1)
    return {
        "task": task_name,
        "setting": setting,
        "options": given,
        "recovery": asdict(Recovery(**own)),
        "n": len(labels),
        "teacher": float((expected.argmax(-1) == labels).float().mean()),
        "accuracy_cut": [done["accuracy_cut"] for done in result.record["rounds"]],
        "accuracy": float((got.argmax(-1) == labels).float().mean()),
        "cross_entropy": float(torch.nn.functional.cross_entropy(got, labels)),
        "agreement": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "steps": sum(done["steps"] for done in result.record["rounds"]),
        "seconds_recovery": sum(done["seconds_recovery"] for done in result.record["rounds"]),
        "parameters": result.record["compressed"]["parameters"],
        "versions": result.record["versions"],
    }


def pace(teacher: nn.Module, widths: dict[str, int], rows: Iterable[Batch], recovery: Recovery) -> list[float]:
    """Median seconds of a step in each of three passes over a few batches."""
    sites = find_sites(teacher)
    student = skeleton(teacher, sites, widths)
    fill_with_zeros(student, "cpu")
    randomize(student, seed=0)
    few = list(itertools.islice(rows, PACE_BATCHES))
    blocks = list(dict.fromkeys(site.scope for site in sites if site.scope))
    times = [time.perf_counter()]
    Phase(
        student,
        few,
        steps=3 * len(few),
        recovery=recovery,
        teacher=Teacher(teacher, cache=recovery.cache_teacher),
        precision="bf16",
        blocks=blocks,
    ).run(lambda _: times.append(time.perf_counter()))
    steps = [after - before for before, after in itertools.pairwise(times)]
    return [statistics.median(steps[i : i + len(few)]) for i in range(0, len(steps), len(few))]


def pace_cell(task_name: str, teacher: str, data: Path) -> dict[str, Any]:
    """What a step costs with and without the teacher's kept answers, and with hidden states."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    rows = task.rows(data, source.tokenizer, 0)
    calibration = compression.share_of(rows.train, 0.1)
    plan, _ = compression.plan(source.model, calibration=calibration, example=task.example(source.model), target=TARGET)
    return {
        "task": task_name,
        "pace": {
            name: pace(source.model, plan.widths, rows.train, recovery)
            for name, recovery in {
                "no cache": Recovery(cache_teacher=False),
                "cache": Recovery(),
                "hidden states": Recovery(hidden=1.0),
            }.items()
        },
    }


def table() -> str:
    """The records as Markdown, one table a task."""
    lines: list[str] = []
    for task in TASKS:
        records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{task}-*.json"))]
        records = [record for record in records if "setting" in record]
        if not records:
            continue
        lines += [
            f"**{task}**: teacher {records[0]['teacher']:.2%} of {records[0]['n']} selection rows, "
            f"{records[0]['accuracy_cut'][0]:.2%} after a cut of everything at once.",
            "",
            "| setting | accuracy by seed | mean | agreement | KL | steps | s a step |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for setting in SETTINGS:
            of = sorted((r for r in records if r["setting"] == setting), key=lambda r: r["seed"])
            if of:
                mean = {key: statistics.mean(r[key] for r in of) for key in ("accuracy", "agreement", "kl")}
                pace = statistics.mean(r["seconds_recovery"] / r["steps"] for r in of)
                by_seed = " / ".join(f"{r['accuracy']:.2%}" for r in of)
                lines.append(
                    f"| {setting} | {by_seed} | {mean['accuracy']:.2%} "
                    f"| {mean['agreement']:.2%} | {mean['kl']:.4f} | {of[0]['steps']} | {pace:.2f} |"
                )
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the named part of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "pace", "table"))
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--teacher")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    chosen = parser.parse_args(arguments)
    if chosen.part == "table":
        print(table())
        return
    if chosen.part == "pace":
        cell(RESULTS / f"{chosen.task}-pace.json", lambda: pace_cell(chosen.task, chosen.teacher, chosen.data))
        return
    for seed in chosen.seeds:
        for setting in chosen.settings:
            name = f"{chosen.task}-{setting.replace(' ', '_').replace(',', '')}-{seed}"
            cell(
                RESULTS / f"{name}.json",
                lambda setting=setting, seed=seed: {
                    "seed": seed,
                    **run_cell(chosen.task, setting, seed, chosen.teacher, chosen.data, chosen.epochs),
                },
            )


if __name__ == "__main__":
    main()
