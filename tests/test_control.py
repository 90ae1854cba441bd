"""The control of a run: what it is trained for, and that a run has its model also where its control has none."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rmtkd
import rmtkd.run
from conftest import random_rows, tiny_bert
from rmtkd import recovering
from rmtkd.distillation import Recovery
from rmtkd.measurement import accuracy

QUICK: dict[str, Any] = {
    "policy": "paper",
    "multiple_of": 4,
    "granularity": "layer",
    "epochs": 1.0,
    "precision": "fp32",
    "control": True,
}


def run(**options: Any) -> rmtkd.Compressed:
    """A run on rows without labels: all that the teacher answers is right."""
    rows = {"train": random_rows(96, seed=1, shuffle=True), "selection": random_rows(48, seed=2)}
    for part in rows.values():
        part.labels = None
    return rmtkd.compress(tiny_bert(), **rows, **{**QUICK, "target": "70%params", **options})


def spoil(model: torch.nn.Module, *, seed: int) -> None:
    """A start that no network comes back from."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)


def test_a_control_that_cannot_be_trained_is_told_and_the_run_has_its_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(recovering, "randomize", spoil)
    result = run(out=tmp_path / "run")
    told = result.record["control"]
    assert told == {"start": "random", "steps": sum(done.steps for done in result.rounds), "accuracy": None} | {
        "failed": "the loss must stay finite. It became nan at step 1. Lower the learning rate, or look for bad rows."
    }
    assert result.record["finished"] and result.record["stop_reason"].startswith("target:")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["control"] == told
    rmtkd.load(tmp_path / "run" / "model")
    assert "failed" in result.summary() and "It became nan at step 1" in " ".join(result.summary().split())
    assert "It became nan at step 1" in (tmp_path / "run" / "report.html").read_text()
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert re.search(rf"\| same shape, random start, {told['steps']} steps[^|]*\|  \| failed \|  \|", card)


def test_the_control_takes_the_steps_of_the_rounds_that_stayed(monkeypatch: pytest.MonkeyPatch):
    """The second round loses more than it may."""
    measured: list[float] = []

    def falling(*args: Any, **kwargs: Any) -> Any:
        found = accuracy(*args, **kwargs)
        measured.append(found.value)
        return found if len(measured) <= 2 else type(found)(value=0.0, n=found.n, stderr=0.0)

    monkeypatch.setattr(rmtkd.run, "accuracy", falling)
    result = run(tolerance=0.99)
    first, second = result.rounds
    assert second.rolled_back and not first.rolled_back and second.steps
    assert result.record["control"]["steps"] == first.steps


def test_what_nothing_was_cut_from_has_no_control():
    result = run(tolerance=0.0, recovery=Recovery(lr=0.1), granularity="round", blend=False, gentle=0.0)
    assert [done.rolled_back for done in result.rounds] == [True]
    assert "control" not in result.record and "random start" not in result.summary()
