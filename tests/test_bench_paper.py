"""The claims of a table of the published evaluation: at the scale `tiny` it runs from nothing and goes on where it was
left, its teacher bit for bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import BENCHMARKS
from rmtkd import recipes


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
    told = run("--settings", "published", "same-size", "uncut")
    for file, content in records.items():  # what was measured is not measured again
        assert (tmp_path / "results" / file).read_bytes() == content
    record = json.loads((tmp_path / "results" / f"tiny-digits-{task}-same-size-seed0.json").read_text())
    assert record["cost"]["parameters"] <= 0.53 * record["baseline"]["parameters"]
    published = json.loads((tmp_path / "results" / f"tiny-digits-{task}-published-seed0.json").read_text())
    for setting, (gentle, blend) in ((published, (0.0, False)), (record, (0.4, True))):  # what is ours is not theirs
        assert (setting["options"]["gentle"], setting["options"]["blend"]) == (gentle, blend)
    assert record["latency_at_1_ms"]["repeats"] == 20 and record["rows_per_second"]["median"] > 0
    energy = record["energy_at_1"]
    assert (energy["joules"] is None) != (energy["reason"] is None)  # a number, or why there is none
    assert record["machine"] and record["versions"]["torch"] and "--scale tiny" in record["command"]
    lines = [line for line in told.splitlines() if line.startswith("| tiny")]
    assert [line.split(" | ")[2] for line in lines] == 2 * [
        "teacher",
        "published",
        "same-size",
        "uncut",
    ]  # costs, accuracy
    uncut, teacher = (
        json.loads((tmp_path / "results" / f"tiny-digits-{task}-{part}-seed0.json").read_text())
        for part in ("uncut", "teacher")
    )
    assert uncut["cost"]["parameters"] == teacher["cost"]["parameters"]
    assert uncut["training"]["alpha"] == record["options"]["recovery"]["alpha"]  # as the others
    assert uncut["epochs"] == pytest.approx(record["options"]["epochs"], rel=0.05)
    assert uncut["accuracy"]["value"] > teacher["accuracy"]["value"]  # which ended before it had learned all


def test_a_teacher_that_was_left_is_the_one_that_was_not(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper, packed, vision = (benchmark(name) for name in ("paper", "packed", "paper_vision"))
    monkeypatch.setattr(paper, "measures", lambda *_, **__: {})
    (entry,) = vision.SCALES["tiny"]
    rows = recipes.get(entry.task).rows(None, entry.start(None, 0), 0)
    packed.pack(rows, tmp_path / "parts" / entry.key, largest=200_000)
    read = packed.unpack(tmp_path / "parts" / entry.key, 0)
    for role in packed.ROLES:
        for mine, theirs in zip(getattr(read, role), getattr(rows, role), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(list((tmp_path / "parts" / entry.key).glob("train-*.npz"))) > 1

    def losses(cache: str) -> list[float]:
        bench = paper.Bench(
            name="paper-vision",
            scale="tiny",
            settings={},
            data=None,
            prepared=tmp_path / "parts",
            cache=tmp_path / cache,
            results=tmp_path,
            seed=0,
            device="cpu",
        )
        return paper.train(paper.Work(bench=bench, entry=entry))["losses"]

    whole = losses("whole")

    def stop(event: dict[str, Any]) -> None:
        if event["step"] == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(paper, "print_event", stop)
        losses("left")
    assert losses("left") == whole
    assert not list((tmp_path / "left").glob("*.training"))
