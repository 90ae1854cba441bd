"""A teacher is trained the same way twice, written whole or not at all, and where nothing was before."""

import errno
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from conftest import Sentiment, tiny_bert
from rmtkd import recipes, teaching, writing
from rmtkd.distillation import WeightAverage
from rmtkd.errors import DataError, OptionError, RunError
from rmtkd.recipes.checkpoints import load_classifier
from rmtkd.teaching import train_teacher
from rmtkd.training import Phase

SST2 = recipes.get("sst2")


def test_the_average_of_a_constant_is_the_constant():
    model = tiny_bert()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    average = WeightAverage(model)
    for _ in range(5):
        average.update()
    average.apply()
    for parameter, value in zip(model.parameters(), start, strict=True):
        assert torch.allclose(parameter, value, atol=1e-6)


def test_the_average_weighs_by_its_decay():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average, expected = WeightAverage(model, decay=0.5), 0.0
    for step, value in enumerate((1.0, 3.0, -2.0), 1):
        torch.nn.init.constant_(model.weight, value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    average.apply()
    assert float(model.weight.detach()) == pytest.approx(expected, rel=1e-6)


def test_a_teacher_is_a_stock_folder_with_its_record(sentiment: Sentiment):
    names = {path.name for path in sentiment.teacher.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}
    assert len({path.stat().st_mode for path in sentiment.teacher.iterdir()}) == 1
    record = json.loads((sentiment.teacher / "training.json").read_text())
    assert set(record["accuracy"]) == {"value", "n", "stderr"}
    assert record["accuracy"]["value"] > 0.9
    assert record["accuracy"]["n"] == record["f1"]["n"] == 90
    assert str(sentiment.start.parent) not in json.dumps(record)
    source = load_classifier(str(sentiment.teacher), labels=SST2.labels)
    assert source.tokenizer is not None and record["parameters"] == sum(p.numel() for p in source.model.parameters())


def train(sentiment: Sentiment, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    usual: dict[str, Any] = {"epochs": 0.3, "lr": 1e-3, "precision": "fp32"}
    train_teacher(SST2, model=str(sentiment.start), data=sentiment.data, out=out, **{**usual, **options})
    return load_file(out / "model.safetensors")


def test_the_same_seed_gives_the_same_teacher_and_another_seed_another(sentiment: Sentiment, tmp_path: Path):
    before = torch.get_rng_state()
    first, again, other = (train(sentiment, tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_events_of_training_come_in_order(sentiment: Sentiment, tmp_path: Path):
    events = []
    train_teacher(
        SST2, model=str(sentiment.start), data=sentiment.data, out=tmp_path / "t", epochs=0.2, on_event=events.append
    )
    assert events.pop(0)["note"].endswith("90 report rows")
    steps = events[0]["steps"]
    assert [event["step"] for event in events] == list(range(1, steps + 1))
    assert json.loads((tmp_path / "t" / "training.json").read_text())["steps"] == steps


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": -1.0}, OptionError, "epochs and seed must be at least 0. Got -1"),
        ({"epochs": float("nan")}, OptionError, "epochs and seed must be at least 0"),
        ({"seed": -1}, OptionError, "epochs and seed must be at least 0"),
        ({"lr": 0.0}, OptionError, "lr must be greater than 0"),
        ({"device": "cuda:99"}, OptionError, "device must be there"),
        ({"model": None}, DataError, "must start from a checkpoint"),
        ({"data": Path("/nowhere")}, DataError, "There is no such file"),
    ],
)
def test_a_refused_training_leaves_nothing_behind(
    sentiment: Sentiment, tmp_path: Path, options: dict, error: type[Exception], message: str
):
    given = {"model": str(sentiment.start), "data": sentiment.data, "out": tmp_path / "t", **options}
    with pytest.raises(error, match=message):
        train_teacher(SST2, **given)
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_exists_is_refused_at_once_and_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(teaching, "check_device", None)  # nothing further is asked
    for name in ("file", "folder", "file/below"):
        with pytest.raises(RunError, match="--out must be"):
            train_teacher(SST2, out=tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


class Killed(BaseException):
    """Ends a training as a power cut would: nothing of ours catches it."""


@pytest.mark.parametrize("ending", ["ctrl-c", "kill"])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(sentiment: Sentiment, tmp_path: Path, ending: str):
    whole = train(sentiment, tmp_path / "whole")
    out, steps = tmp_path / "left", []

    def stop(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            steps.append(event["step"])
            if len(steps) in (2, 5):  # the second time in the middle of what is left
                if ending == "kill":
                    raise Killed
                signal.raise_signal(signal.SIGINT)

    for _ in range(2):
        with pytest.raises(Killed if ending == "kill" else KeyboardInterrupt):
            train(sentiment, out, save_every_s=0.0, on_event=stop)
        assert not out.exists() and (tmp_path / "left.training").is_file()
    left = train(sentiment, out, save_every_s=0.0, on_event=stop)
    assert all(torch.equal(value, left[name]) for name, value in whole.items())
    assert steps == sorted(steps) and steps[-1] > 5
    assert len(steps) == len(set(steps)) + (2 if ending == "kill" else 0)  # a step that was not saved is made again
    assert not (tmp_path / "left.training").exists()


def test_what_stands_of_another_training_is_refused_and_stays(sentiment: Sentiment, tmp_path: Path):
    def stop(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"stopped after step 1 of \d+\. The same command goes on"):
        train(sentiment, tmp_path / "t", on_event=stop)
    standing = tmp_path / "t.training"
    content = standing.read_bytes()
    for other in ({"seed": 1}, {"lr": 2e-3}, {"epochs": 0.5}):
        with pytest.raises(RunError, match=r"t\.training must be of this training"):
            train(sentiment, tmp_path / "t", **other)
    assert standing.read_bytes() == content
    standing.write_bytes(content[:-7])
    with pytest.raises(RunError, match=r"t\.training must be as it was written.*Remove it"):
        train(sentiment, tmp_path / "t")


def test_a_training_that_is_ended_before_its_first_save_leaves_nothing_behind(sentiment: Sentiment, tmp_path: Path):
    def interrupt(event: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(sentiment, tmp_path / "t", on_event=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_the_same_command_goes_on(
    sentiment: Sentiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While it is trained, and when it is written, where safetensors has an error of its own."""
    whole, steps = train(sentiment, tmp_path / "whole"), []
    full, message = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), r"No space left.*stays.*then: the same command"
    out = tmp_path / "t"
    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", Mock(side_effect=[None, None, full]))
        with pytest.raises(RunError, match=message):
            train(sentiment, out, save_every_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(teaching, "save_classifier", Mock(side_effect=SafetensorError("I/O error: No space left")))
        with pytest.raises(RunError, match=message):
            train(sentiment, out, save_every_s=0.0, on_event=lambda event: steps.append(event.get("step")))
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "t.training"}
    assert next(step for step in steps if step) == 2  # of what was saved first
    left = train(sentiment, out)
    assert all(torch.equal(value, left[name]) for name, value in whole.items())


def test_a_training_that_runs_out_of_memory_says_so(
    sentiment: Sentiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    backward = Phase._backward

    def scarce(phase: Phase, parts: Any) -> float:
        if len(parts) == 1:
            raise MemoryError
        return backward(phase, parts)

    events: list[Any] = []
    monkeypatch.setattr(Phase, "_backward", scarce)
    train(sentiment, tmp_path / "t", on_event=events.append)
    assert [event["pieces"] for event in events if event["event"] == "memory"] == [2]
