"""The claims of the ablation: one thing changes at a time, and a record says how it was made."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import BENCHMARKS


def test_the_ablation_changes_one_thing_at_a_time(tmp_path: Path) -> None:
    words = ["--scale", "tiny", "--kinds", "threshold", "causal", "--cache", tmp_path / "cache"]
    command = [sys.executable, BENCHMARKS / "ablation.py", *words, "--results", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    low, high = (records[f"tiny-digits-threshold-{tau}-seed0"] for tau in ("0.02", "0.1"))
    assert high["parameters"] < low["parameters"] < 1  # a larger τ cuts more
    assert 0 < low["nats_before"] < high["nats_before"]
    dropped, kept = (
        records[f"tiny-digits-causal-{which}-seed0"] for which in ("dropped", "as_many_of_the_kept-weakest")
    )
    each = [record["divergence"] / record["directions"] for record in (dropped, kept)]
    assert 0 < 2 * each[0] < each[1]  # even the weakest of the kept directions are worth more than those that go
    assert "| causal: projected out |" in done.stdout and "| threshold | seeds |" in done.stdout
