"""The claims of the tables of the published evaluation: at the scale `tiny` they run from nothing, resume, and show
published beside measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("name", "task"), [("paper_text", "digits"), ("paper_vision", "digits_cnn")])
def test_a_table_is_made_from_nothing_and_goes_on_where_it_was_left(name: str, task: str, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, BENCHMARKS / f"{name}.py", "--scale", "tiny", "--cache", tmp_path / "cache"]
        done = subprocess.run([*command, "--results", tmp_path / "results", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--settings", "published")
    records = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert sorted(records) == [f"tiny-digits-{task}-{part}-seed0.json" for part in ("published", "teacher")]
    told = run("--settings", "published", "same-size")
    for file, content in records.items():  # what was measured is not measured again
        assert (tmp_path / "results" / file).read_bytes() == content
    record = json.loads((tmp_path / "results" / f"tiny-digits-{task}-same-size-seed0.json").read_text())
    assert record["cost"]["parameters"] <= 0.53 * record["baseline"]["parameters"]
    assert record["latency_at_1_ms"]["repeats"] == 20 and record["rows_per_second"]["median"] > 0
    energy = record["energy_at_1"]
    assert (energy["joules"] is None) != (energy["reason"] is None)  # a number, or why there is none
    assert record["machine"] and record["versions"]["torch"] and "--scale tiny" in record["command"]
    lines = [line for line in told.splitlines() if line.startswith("| tiny")]
    assert [line.split(" | ")[3] for line in lines] == ["teacher", "published", "same-size"]


def test_the_ablation_changes_one_thing_at_a_time(tmp_path: Path) -> None:
    words = ["--scale", "tiny", "--kinds", "threshold", "causal", "--cache", tmp_path / "cache"]
    command = [sys.executable, BENCHMARKS / "ablation.py", *words, "--results", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    low, high = (records[f"threshold-{tau}-seed0"] for tau in ("0.02", "0.1"))
    assert high["parameters"] < low["parameters"] < 1  # a larger τ cuts more
    dropped, kept = records["causal-dropped-seed0"], records["causal-as_many_of_the_kept-weakest-seed0"]
    each = [record["divergence"] / record["directions"] for record in (dropped, kept)]
    assert 0 < 2 * each[0] < each[1]  # even the weakest of the kept directions are worth more than those that go
    assert "| causal: projected out |" in done.stdout and "| threshold | seeds |" in done.stdout
