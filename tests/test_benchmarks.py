"""The claims of the tables of the published evaluation: at the scale `tiny` they run from nothing, resume, and show
published beside measured."""

import importlib
import json
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import random_rows, tiny_bert
from rmtkd import recipes
from rmtkd.errors import DataError
from rmtkd.recipes.recipe import Rows

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
    published = json.loads((tmp_path / "results" / f"tiny-digits-{task}-published-seed0.json").read_text())
    for setting, (gentle, blend) in ((published, (0.0, False)), (record, (0.4, True))):  # what is ours is not theirs
        assert (setting["options"]["gentle"], setting["options"]["blend"]) == (gentle, blend)
    assert record["latency_at_1_ms"]["repeats"] == 20 and record["rows_per_second"]["median"] > 0
    energy = record["energy_at_1"]
    assert (energy["joules"] is None) != (energy["reason"] is None)  # a number, or why there is none
    assert record["machine"] and record["versions"]["torch"] and "--scale tiny" in record["command"]
    lines = [line for line in told.splitlines() if line.startswith("| tiny")]
    assert [line.split(" | ")[2] for line in lines] == 2 * ["teacher", "published", "same-size"]  # costs, accuracy


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


def test_a_shift_is_measured_on_the_same_rows_and_clean_rows_lose_nothing(tmp_path: Path) -> None:
    words = ["--scale", "tiny", "--tasks", "digits_cnn", "--cache", tmp_path / "cache"]
    command = [sys.executable, BENCHMARKS / "shift.py", *words, "--results", tmp_path / "results"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    seen = [records[f"tiny-digits_cnn-domains-{which}-seed0"] for which in ("own", "other", "mixed")]
    assert len({record["closed form"]["accuracy"]["value"] for record in seen}) == 3  # three cuts
    clean, fog = records["tiny-digits_cnn-corruptions-fog-seed0"]["shifts"]
    for name, model in clean["models"].items():
        assert model["loss"]["value"] == 0 == model["beyond"]["value"]
        lost = model["accuracy"]["value"] - fog["models"][name]["accuracy"]["value"]
        assert fog["models"][name]["loss"]["value"] == pytest.approx(lost)
    assert fog["models"]["teacher"]["loss"]["value"] > 0.1 and fog["models"]["teacher"]["divergence"]["value"] == 0
    noisy = records["tiny-digits_cnn-corruptions-gaussian_noise-seed0"]["shifts"][1]
    accuracies = [100 * shift["models"]["own, own rows"]["accuracy"]["value"] for shift in (fog, noisy)]
    assert f"| digits_cnn | 3 | own, own rows | 2 | {sum(accuracies) / 2:.1f} |" in done.stdout


@pytest.fixture
def corruptions(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("corruptions")


def test_images_are_spoiled_the_more_the_higher_the_severity_and_always_alike(corruptions: Any) -> None:
    rng = np.random.default_rng(0)
    images = np.clip(rng.integers(60, 200, (24, 8, 8, 3)).repeat(4, 1).repeat(4, 2), 0, 255).astype(np.uint8)
    for kind in corruptions.CORRUPTIONS:
        made = [corruptions.corrupted(images, kind, severity, 0) for severity in corruptions.SEVERITIES]
        assert all(each.shape == images.shape and each.dtype == np.uint8 for each in made)
        slight, _, strong = (np.abs(each.astype(int) - images).mean() for each in made)
        assert 0 < slight < strong, kind
        assert np.array_equal(made[0], corruptions.corrupted(images, kind, 1, 0))
    flat = np.full((2, 8, 8, 3), 100, dtype=np.uint8)
    for kind in ("gaussian blur", "defocus blur", "motion blur", "contrast", "pixelate"):
        assert np.array_equal(corruptions.corrupted(flat, kind, 5, 0), flat), kind  # weights add up to one


def test_as_many_letters_are_mistyped_as_asked_for(corruptions: Any) -> None:
    text = "abcdefghij klmnopqrst uvwxyz " * 400
    (same,) = corruptions.mistyped([text], 0.0, 0)
    assert same == text
    letters = sum(map(str.isalpha, text))
    for kind, change in (("drop", -1), ("double", 1)):
        (made,) = corruptions.mistyped([text], 0.1, 0, [kind])
        assert change * (len(made) - len(text)) / letters == pytest.approx(0.1, abs=0.01)
    (made,) = corruptions.mistyped([text], 0.1, 0, ["neighbour"])
    pairs = [(a, b) for a, b in zip(text, made, strict=True) if a != b]
    assert len(pairs) / letters == pytest.approx(0.1, abs=0.01)
    assert all(b in corruptions.NEIGHBOURS[a] and a in corruptions.NEIGHBOURS[b] for a, b in pairs)
    (made,) = corruptions.mistyped([text], 0.1, 0, ["swap"])
    assert sorted(made) == sorted(text) and made != text
    assert corruptions.mistyped([text], 0.1, 0) == corruptions.mistyped([text], 0.1, 0)


def test_parts_end_when_time_is_over_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parts = importlib.import_module("parts")
    parts.prepare("paper-vision", "tiny", None, None, tmp_path / "parts")

    def part(minutes: float) -> bool:
        given = Namespace(minutes=minutes, settings=[], seeds=[0], device="cpu", work=tmp_path / "work")
        given.results = tmp_path / "results"
        return parts.run(tmp_path / "parts", given)

    assert not part(0.01)
    assert part(9.0)
    logs = [json.loads(path.read_text()) for path in sorted((tmp_path / "results" / "parts").iterdir())]
    teacher = "tiny-digits-digits_cnn-teacher-seed0.json"
    assert [log["records"] for log in logs] == [[], [teacher]]
    assert all((log["energy"]["joules"] is None) == ("reason" in log["energy"]) for log in logs)
    assert json.loads((tmp_path / "results" / teacher).read_text())["accuracy"]["value"] > 0.5


def test_a_teacher_that_was_left_is_the_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    paper, packed, vision = (importlib.import_module(name) for name in ("paper", "packed", "paper_vision"))
    monkeypatch.setattr(paper, "measures", lambda *_: {})
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


def test_packed_texts_are_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    packed = importlib.import_module("packed")
    rows = Rows(train=random_rows(shuffle=True), selection=random_rows(seed=1), report=random_rows(seed=2), note="a")
    packed.pack(rows, tmp_path / "rows")
    read = packed.unpack(tmp_path / "rows", 0)
    for role in packed.ROLES:
        for mine, theirs in zip(getattr(read, role), getattr(rows, role), strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    (tmp_path / "rows" / "report-0.npz").unlink()
    with pytest.raises(DataError, match="lacks report-0"):
        packed.unpack(tmp_path / "rows", 0)
