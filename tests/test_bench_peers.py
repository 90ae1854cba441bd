"""The claims of the other ways to a smaller BERT: each as its source says, all alike in size and steps."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BENCHMARKS, random_rows, tiny_bert


@pytest.fixture
def peers(benchmark: Any) -> Any:
    return benchmark("peers")


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
def test_theseus_begins_with_the_first_layers_of_its_teacher_as_its_source_does(peers: Any) -> None:
    teacher = tiny_bert(layers=4)
    mine, theirs = peers.Theseus(teacher).successor().bert.encoder.layer, teacher.bert.encoder.layer
    assert len(mine) == 2
    for i in range(2):
        for a, b in zip(mine[i].parameters(), theirs[i].parameters(), strict=True):
            assert torch.equal(a, b)


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
