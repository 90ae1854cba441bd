"""The claims of the table of the published evaluation: every figure of the source stands beside what was measured, of
the task that it is of, with a reason; and the table says rows, machine, versions, seeds and commands."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any


def record(network: str, task: str, part: str, seed: int = 0, share: float = 1.0, **other: Any) -> dict[str, Any]:
    """A record of a model that has this share of everything that its teacher has."""
    latency = {"median": 20 * share, "iqr": 1.0, "batch": 1, "length": 32, "threads": 1, "repeats": 9, "device": "cuda"}
    estimate = {"value": 0.8 + (0.01 if share < 1 else 0), "n": 1000, "stderr": 0.0125}
    made = {
        "network": network,
        "task": task,
        "part": part,
        "scale": "full",
        "seed": seed,
        "command": f"rmtkd bench x --seeds {seed}",
        "cost": {
            "parameters": round(22_713_986 * share),
            "parameters_encoder": round(10_000_000 * share),
            "flops": round(64e9 * share),
            "disk_bytes": round(90e6 * share),
            "latency_ms": {**latency, "batch": 32},
        },
        "latency_at_1_ms": latency,
        "rows_per_second": {"median": 187 / share, "iqr": 12.0},
        "energy_at_1": {
            "joules": 0.5 * share,
            "watts": 300 * share,
            "rest_watts": 70.0,
            "source": "NVML",
            "reason": None,
        },
        "memory_bytes": round(200e6 * share),
        "accuracy": estimate,
        "f1": estimate,
        "machine": {"processor": "a CPU", "cores": "16", "threads": "1", "bf16 matrix instructions": "True"},
        "versions": {"python": "3.12", "torch": "2.13.0", "rmtkd": "0.1.0"},
    }
    of_teacher = {"rows": "7 training rows", "start": "random", "epochs": 3.0, "threshold": 0.81}
    of_student = {"teacher_latency_at_1_ms": {**latency, "median": 20.0}, "before_recovery": 0.7, "rounds": 1}
    return {**made, **(of_teacher if part == "teacher" else of_student), **other}


def written(folder: Path, *records: dict[str, Any]) -> Path:
    folder.mkdir()
    for r in records:
        (folder / f"{r['network']}-{r['task']}-{r['part']}-{r['seed']}.json").write_text(json.dumps(r))
    return folder


def cells_of(markdown: str, *beginning: str) -> list[list[str]]:
    """Cells of the lines that have these first cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    return [cells for cells in lines if cells[: len(beginning)] == list(beginning)]


def test_every_published_figure_stands_beside_a_measured_one_and_a_reason(benchmark: Any, tmp_path: Path) -> None:
    one = [record("bert-tiny", "sst2", part, share=s) for part, s in (("teacher", 1.0), ("same-size", 0.4))]
    text = benchmark("paper_table").table(written(tmp_path / "records", *one), benchmark("paper_text").REPORTED)
    lines = cells_of(text, "full", "bert-tiny, sst2", "same-size")
    against = {cells[3]: cells[4:] for cells in lines if len(cells) == 7}
    assert {name: cells[:2] for name, cells in against.items()} == {
        "parameters": ["−58.8 %", "−60.0 %"],
        "accuracy": ["+1.4 %", "+1.00 points"],
        "speed at batch 1": ["30–35 % faster", "2.50×"],
        "memory": ["−55 %", "−60 %"],
        "power": ["lower", "−60 %"],
    }
    assert all(reason for *_, reason in against.values())
    assert cells_of(text, "full", "bert-tiny, sst2", "published")[0][3:6] == [
        "all",
        "parameters −58.8 %; accuracy +1.4 %; speed at batch 1 30–35 % faster; memory −55 %; power lower",
        "not run yet",
    ]


def test_what_was_not_begun_is_told_too(benchmark: Any, tmp_path: Path) -> None:
    records = written(tmp_path / "records", record("bert-tiny", "sst2", "teacher"))
    table, reported = benchmark("paper_table").table, benchmark("paper_text").REPORTED
    (qnli,) = cells_of(table(records, reported), "–", "bert-base, qnli")
    assert qnli[4].startswith("parameters 139 M; parameters −80.9 %; accuracy +1.8 %; ")
    assert qnli[5:] == ["not run yet", "scale full, for an accelerator (`rmtkd bench parts`)"]
    not_begun = set(reported.published) - {("bert-tiny", "sst2")}
    told = {tuple(cells[1].split(", ")) for cells in cells_of(table(records, reported), "–")}
    assert told == not_begun


def test_figures_of_glue_are_not_of_ag_news(benchmark: Any, tmp_path: Path) -> None:
    records = [
        record("bert-base", task, part, share=1.0 if part == "teacher" else 0.2)
        for task in ("ag_news", "qnli", "qqp")
        for part in ("teacher", "published")
    ]
    text = benchmark("paper_table").table(written(tmp_path / "records", *records), benchmark("paper_text").REPORTED)
    told = {
        task: {cells[3] for cells in cells_of(text, "full", f"bert-base, {task}") if len(cells) == 7}
        for task in ("ag_news", "qnli", "qqp")
    }
    assert told["ag_news"] == {"parameters"}  # of the teacher
    assert told["qnli"] == {*told["qqp"], "speed at batch 1"} and "memory" in told["qqp"]
    notes = {"qnli": "5,463 published dev rows alone", "qqp": "9,600 of its", "ag_news": "29,378 of its 120,000"}
    for task, note in notes.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"* {task}: 7 training rows. ")]
        assert note in line


def test_costs_show_disk_operations_watts_and_the_machine(benchmark: Any, tmp_path: Path) -> None:
    records = [
        record("resnet50", "cifar10", part, seed, s)
        for part, s in (("teacher", 1), ("same-size", 0.5))
        for seed in (0, 1)
    ]
    text = benchmark("paper_table").table(written(tmp_path / "records", *records), benchmark("paper_vision").REPORTED)
    (cost,) = [cells for cells in cells_of(text, "full", "resnet50, cifar10", "same-size") if len(cells) == 14]
    assert cost[3] == "2" and cost[6:8] == ["45.0 ± 0.0", "1.000 ± 0.000 G"]
    assert cost[12:] == ["0.25 ± 0 J", "150.0 ± 0.0 W (70.0 ± 0.0)"]
    assert "* Scale full, seed 1: a CPU (cuda), cores 16, threads 1, with bf16 instructions; python 3.12, torch" in text
    assert "* Made by `rmtkd bench x --seeds 1`." in text
    energy = {cells[3]: cells[4:6] for cells in cells_of(text, "full", "resnet50, cifar10", "same-size")}[
        "energy at batch 1"
    ]
    assert energy == ["about −10 %", "−50 ± 0 %"]
    assert [cells[4] for cells in cells_of(text, "full", "resnet50, cifar10", "CRD")] == ["−45.4 %; +0.6"]


def test_without_a_counter_the_table_says_why(benchmark: Any, tmp_path: Path) -> None:
    none = {"joules": None, "watts": None, "rest_watts": None, "source": None, "reason": "no counter here"}
    records = [
        record("bert-tiny", "qqp", part, share=s, energy_at_1=none) for part, s in (("teacher", 1), ("published", 0.5))
    ]
    text = benchmark("paper_table").table(written(tmp_path / "records", *records), benchmark("paper_text").REPORTED)
    (power,) = cells_of(text, "full", "bert-tiny, qqp", "published", "power")
    assert power[4:6] == ["lower", "not measured: no counter here"]
    assert "* No energy at scale full: no counter here." in text


def test_peers_are_those_of_the_same_teacher_at_the_rate_that_selection_prefers(benchmark: Any, tmp_path: Path) -> None:
    folder = written(tmp_path / "records", record("bert-tiny", "sst2", "teacher", teacher_id="a"))
    (tmp_path / "peers").mkdir()
    size = 22_713_986
    for i, (lr, selection, value, teacher) in enumerate(
        [(2e-4, 0.7, 0.9, "a"), (5e-4, 0.8, 0.79, "a"), (2e-4, 0.9, 0.5, "b")]
    ):
        peer = {"peer": "pkd", "task": "sst2", "lr": lr, "epochs": 1.0, "teacher_id": teacher}
        peer |= {"parameters": size // 2, "accuracy": value, "accuracy_selection": selection, "teacher": 0.8}
        (tmp_path / "peers" / f"{i}.json").write_text(json.dumps(peer))
    text = benchmark("paper_table").table(folder, benchmark("paper_text").REPORTED)
    told = {title: cells_of(text, "full", "bert-tiny, sst2", title)[0][4:6] for title in ("PKD", "DistilBERT")}
    assert told == {
        "PKD": ["−50.1 %; −0.8", "−50.0 %; −1.00 points"],
        "DistilBERT": ["−54.8 %; +0.4", "not run on this network"],
    }


def test_a_command_tells_rows_entry_seed_and_device(benchmark: Any) -> None:
    paper, text = benchmark("paper"), benchmark("paper_text")
    entry = next(entry for entry in text.SCALES["cpu"] if entry.key == "bert-tiny-sst2")
    places: dict[str, Any] = {"cache": Path("runs"), "results": Path("results")}
    bench = paper.Bench(name="paper-text", scale="cpu", settings={}, data=Path("x"), seed=3, device="cuda", **places)
    shared = "--only bert-tiny-sst2"
    assert bench.command(entry, "teacher") == (
        f"rmtkd bench paper-text --scale cpu --data DIR {shared} --seeds 3 --device cuda"
    )
    parts = replace(bench, prepared=Path("x"))
    assert parts.command(entry, "tenth") == (
        f"rmtkd bench parts prepare paper-text --scale cpu --data DIR {shared} --out PARTS && "
        "rmtkd bench parts run PARTS --settings tenth --seeds 3 --device cuda"
    )


def test_no_record_is_no_table(benchmark: Any, tmp_path: Path) -> None:
    assert benchmark("paper_table").table(tmp_path, benchmark("paper_text").REPORTED) == ""


def test_accuracy_before_recovery_is_told_of_whole_cuts_alone(benchmark: Any, tmp_path: Path) -> None:
    """Of several rounds the first has cut only a part."""
    records = [
        record("bert-tiny", "sst2", part, share=1.0 if part == "teacher" else 0.4, rounds=rounds)
        for part, rounds in (("teacher", 0), ("same-size", 1), ("published", 7))
    ]
    text = benchmark("paper_table").table(written(tmp_path / "records", *records), benchmark("paper_text").REPORTED)
    told = {cells[2]: cells[4] for cells in cells_of(text, "full", "bert-tiny, sst2") if len(cells) == 8}
    assert told == {"teacher": "", "same-size": "70.00 %", "published": ""}


def test_a_student_of_another_teacher_has_no_row(benchmark: Any, tmp_path: Path) -> None:
    records = [
        record("bert-tiny", "sst2", "teacher", teacher_id="mine"),
        record("bert-tiny", "sst2", "same-size", share=0.4, teacher_id="mine"),
        record("bert-tiny", "sst2", "published", share=0.4, teacher_id="another"),
    ]
    text = benchmark("paper_table").table(written(tmp_path / "records", *records), benchmark("paper_text").REPORTED)
    costs = [cells[2] for cells in cells_of(text, "full", "bert-tiny, sst2") if len(cells) == 14]
    assert costs == ["teacher", "same-size"]
