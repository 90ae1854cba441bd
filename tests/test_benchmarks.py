"""The claims of the tables of the published evaluation: at the scale `tiny` they run from nothing, resume, and show
published beside measured."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import random_rows, tiny_bert

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


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers")


@torch.no_grad()
def test_theseus_is_its_teacher_at_probability_zero_and_its_successor_at_one(peers: Any) -> None:
    teacher, batch = tiny_bert(layers=3), next(iter(random_rows()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ship = peers.Theseus(teacher).eval()
    ship.probability = 0.0
    assert torch.equal(ship(**inputs).logits, teacher(**inputs).logits)
    for parameter in ship.successors.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    ship.probability = 1.0
    small = ship.successor().eval()
    assert peers.depth_of(small) == 2 and torch.equal(ship(**inputs).logits, small(**inputs).logits)
    assert peers.depth_of(ship.whole) == 3


@torch.no_grad()
def test_halving_keeps_layers_and_hidden_losses_are_zero_for_the_teachers_own(peers: Any) -> None:
    teacher = tiny_bert(layers=4)
    mine = peers.halved(teacher, peers.every_second(teacher)).bert.encoder.layer
    for i, j in ((0, 0), (1, 2)):
        for a, b in zip(mine[i].parameters(), teacher.bert.encoder.layer[j].parameters(), strict=True):
            assert torch.equal(a, b)
    states = [torch.randn(2, 5, 8), torch.randn(2, 5, 8)]
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for loss in (peers.cosine, peers.patience):
        assert float(loss(states, states, mask)) == pytest.approx(0, abs=1e-6)
        assert float(loss(states, states[::-1], mask)) > 0.1
        scaled = [2 * state for state in states]  # only directions count
        assert float(loss(states, scaled, mask)) == pytest.approx(0, abs=1e-6)


def test_peers_run_from_nothing(tmp_path: Path) -> None:
    chosen = ["distilbert", "pkd", "theseus", "random", "magnitude"]
    words = ["--scale", "tiny", "--cache", tmp_path / "cache", "--results", tmp_path / "results", "--peers", *chosen]
    done = subprocess.run([sys.executable, BENCHMARKS / "peers.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()]
    assert len(records) == len(chosen) and len({record["steps"] for record in records}) == 1
    halved = {r["peer"]: r["parameters"] for r in records if r["peer"] in ("distilbert", "pkd", "theseus", "random")}
    assert len(set(halved.values())) == 1
    assert all(record["parameters"] <= halved["pkd"] for record in records)
    assert sum(line.startswith("| digits | ") for line in done.stdout.splitlines()) == len(chosen)


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
