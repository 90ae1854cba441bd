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

from torch import nn

from records import cell, identity, print_event
from rmtkd import artifact, compression, recipes
from rmtkd.batches import Batch
from rmtkd.distillation import Recovery, Teacher
from rmtkd.measurement import count_parameters, predict
from rmtkd.modules import randomize
from rmtkd.recipes.recipe import Rows
from rmtkd.schedule import Options
from rmtkd.seeding import seeded
from rmtkd.sites import blocks_of, find_sites
from rmtkd.surgery import fill_with_ones, skeleton
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
    "α 0.7, T 1": {"alpha": 0.7, "temperature": 1.0},
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


def run_cell(
    task_name: str, setting: str, seed: int, teacher: str, data: Path, epochs: float, work: Path
) -> dict[str, Any]:
    """Recover the same cut model in one way, and compare with the teacher on selection rows."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    rows = task.rows(data, source, seed)
    given = dict(SETTINGS[setting])
    own = {name: given.pop(name) for name in list(given) if name not in Options.__dataclass_fields__}
    recovery = Recovery(**own)
    if given:  # other portions: other cuts
        result = compression.compress(
            source.model,
            train=rows.train,
            selection=rows.selection,
            example=task.example(source.model, rows),
            target=TARGET,
            epochs=epochs,
            recovery=recovery,
            precision="bf16",
            seed=seed,
            gentle=0.0,  # as all settings
            blend=False,
            on_event=print_event,
            **given,
        )
        student, steps = result.model, sum(done.steps for done in result.rounds)
        seconds = sum(done.seconds_recovery for done in result.rounds)
    else:
        student = cut_model(source.model, rows, task.example(source.model, rows), work / f"{task_name}-{seed}")
        steps = round(epochs * len(rows.train))
        started = time.monotonic()
        with seeded(seed):
            Phase(
                student,
                rows.train,
                steps=steps,
                recovery=recovery,
                teacher=Teacher(source.model),
                precision="bf16",
                blocks=blocks_of(find_sites(student)),
            ).run(lambda p: print_event({"event": "step", "step": len(p.losses), "loss": p.losses[-1]}))
        seconds = time.monotonic() - started
    return {
        "task": task_name,
        "setting": setting,
        "options": given,
        "recovery": asdict(recovery),
        "parameters": count_parameters(student),
        "steps": steps,
        "seconds_recovery": seconds,
        **compare(source.model, student, rows.selection),
    }


def cut_model(model: nn.Module, rows: Rows, example: Batch, kept: Path) -> nn.Module:
    """The model cut to the target, from the folder where it was kept."""
    folder = kept.with_name(f"{kept.name}-{identity(model)}")
    if not folder.exists():
        calibration = compression.share_of(rows.train, 0.1)
        plan, _ = compression.plan(
            model, calibration=calibration, selection=rows.selection, example=example, target=TARGET
        )
        artifact.save(compression.narrow(model, plan, calibration=calibration), folder)
    return artifact.load(folder)


def compare(teacher: nn.Module, student: nn.Module, rows: Iterable[Batch]) -> dict[str, Any]:
    """How well the student does, and how near to the teacher."""
    expected, labels = predict(teacher, rows)
    got, _ = predict(student, rows)
    p, q = expected.log_softmax(-1), got.log_softmax(-1)
    return {
        "n": len(labels),
        "teacher": float((expected.argmax(-1) == labels).float().mean()),
        "accuracy": float((got.argmax(-1) == labels).float().mean()),
        "cross_entropy": float(nn.functional.cross_entropy(got, labels)),
        "agreement": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
    }


def cut_cell(task_name: str, seed: int, teacher: str, data: Path, work: Path) -> dict[str, Any]:
    """The cut model before recovery."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    rows = task.rows(data, source, seed)
    student = cut_model(source.model, rows, task.example(source.model, rows), work / f"{task_name}-{seed}")
    return {"task": task_name, "setting": "cut", "steps": 0, **compare(source.model, student, rows.selection)}


def pace(teacher: nn.Module, widths: dict[str, int], rows: Iterable[Batch], recovery: Recovery) -> list[float]:
    """Median seconds of a step in each of three passes over a few batches."""
    sites = find_sites(teacher)
    student = skeleton(teacher, sites, widths)
    fill_with_ones(student, "cpu")
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
    rows = task.rows(data, source, 0)
    calibration = compression.share_of(rows.train, 0.1)
    plan, _ = compression.plan(
        source.model, calibration=calibration, example=task.example(source.model, rows), target=TARGET
    )
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
            "every cut at once unless said otherwise, one seed a number.",
            "",
            "| setting | accuracy by seed | mean | agreement | KL | steps | s a step |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for setting in ("cut", *SETTINGS):
            of = sorted((r for r in records if r["setting"] == setting), key=lambda r: r["seed"])
            if of:
                mean = {key: statistics.mean(r[key] for r in of) for key in ("accuracy", "agreement", "kl")}
                pace = statistics.mean(r.get("seconds_recovery", 0) / max(r["steps"], 1) for r in of)
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
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"), help="Where cut models are kept.")
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    chosen = parser.parse_args(arguments)
    if chosen.part == "table":
        print(table())
        return
    teacher_id = identity(recipes.get(chosen.task).load(chosen.teacher).model)
    if chosen.part == "pace":
        path = RESULTS / f"{chosen.task}-pace.json"
        cell(path, lambda: pace_cell(chosen.task, chosen.teacher, chosen.data), teacher_id=teacher_id)
        return
    for seed in chosen.seeds:
        cell(
            RESULTS / f"{chosen.task}-cut-{seed}.json",
            lambda seed=seed: {"seed": seed, **cut_cell(chosen.task, seed, chosen.teacher, chosen.data, chosen.work)},
            teacher_id=teacher_id,
        )
        for setting in chosen.settings:
            name = f"{chosen.task}-{setting.replace(' ', '_').replace(',', '')}-{seed}"
            cell(
                RESULTS / f"{name}.json",
                lambda setting=setting, seed=seed: {
                    "seed": seed,
                    **run_cell(chosen.task, setting, seed, chosen.teacher, chosen.data, chosen.epochs, chosen.work),
                },
                teacher_id=teacher_id,
            )


if __name__ == "__main__":
    main()
