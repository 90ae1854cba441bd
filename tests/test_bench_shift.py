"""The claims of the benchmark of shifted rows: what spoils them does what it says, and losses are of the same rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import BENCHMARKS


@pytest.fixture
def corruptions(benchmark: Any) -> Any:
    return benchmark("corruptions")


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
