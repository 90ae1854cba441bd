"""The claims of tables in parts: what is prepared is whole, loses nothing, and needs no network."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import random_rows
from rmtkd.errors import DataError
from rmtkd.recipes.recipe import Rows


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_as_differences_are_the_same_images(benchmark: Any, channels: int) -> None:
    packed = benchmark("packed")
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, channels), dtype=np.uint8)
    before = images.copy()
    assert np.array_equal(packed.images_of(packed.differences(images)), images)
    assert np.array_equal(images, before)


def test_smooth_images_take_less_room_as_differences(benchmark: Any) -> None:
    packed = benchmark("packed")
    rng = np.random.default_rng(0)
    down, right = rng.uniform(0, 3, (2, 200, 1, 1, 1))
    grey = np.arange(32)[:, None, None] * down + np.arange(32)[:, None] * right + rng.integers(0, 4, (200, 32, 32, 1))
    images = (grey + np.array([0, 10, 20])).astype(np.uint8)
    sizes = [len(packed._compressed({"images": each})) for each in (images, packed.differences(images))]
    assert sizes[1] < 0.8 * sizes[0] < images.nbytes


def test_a_folder_is_prepared_entry_by_entry_and_again(benchmark: Any, tmp_path: Path) -> None:
    parts = benchmark("parts")
    for _ in range(2):
        parts.prepare("paper-vision", "tiny", None, None, tmp_path)
    assert json.loads((tmp_path / "parts.json").read_text())["entries"] == ["digits-digits_cnn"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-digits_cnn", "parts.json"]
    parts.prepare("paper-vision", "tiny", [], None, tmp_path)
    assert json.loads((tmp_path / "parts.json").read_text())["entries"] == ["digits-digits_cnn"]
    with pytest.raises(DataError, match="It holds paper-vision at scale tiny"):
        parts.prepare("paper-text", "tiny", None, None, tmp_path)


@pytest.mark.parametrize("given", [True, False])
def test_parts_that_would_need_a_hub_are_refused_when_they_are_prepared(
    benchmark: Any, given: bool, tmp_path: Path
) -> None:
    data = tmp_path if given else None
    with pytest.raises(DataError, match=r"must be a folder with bert-base-uncased-vocab\.txt, as parts run without"):
        benchmark("parts").prepare("paper-text", "cpu", ["bert-tiny-sst2"], data, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_parts_end_when_time_is_over_and_the_next_goes_on(benchmark: Any, tmp_path: Path) -> None:
    parts = benchmark("parts")
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


def test_packed_texts_are_the_same_rows(benchmark: Any, tmp_path: Path) -> None:
    packed = benchmark("packed")
    rows = Rows(train=random_rows(shuffle=True), selection=random_rows(seed=1), report=random_rows(seed=2), note="a")
    packed.pack(rows, tmp_path / "rows")
    read = packed.unpack(tmp_path / "rows", 0)
    for role in packed.ROLES:
        for mine, theirs in zip(getattr(read, role), getattr(rows, role), strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    (tmp_path / "rows" / "report-0.npz").unlink()
    with pytest.raises(DataError, match="lacks report-0"):
        packed.unpack(tmp_path / "rows", 0)
