"""The claims of tables in parts: what is prepared is whole, loses nothing, and needs no network."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmtkd.errors import DataError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_as_differences_are_the_same_images(module: Any, channels: int) -> None:
    packed = module("packed")
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 7, channels), dtype=np.uint8)
    before = images.copy()
    assert np.array_equal(packed.images_of(packed.differences(images)), images)
    assert np.array_equal(images, before)


def test_smooth_images_take_less_room_as_differences(module: Any) -> None:
    packed = module("packed")
    rng = np.random.default_rng(0)
    down, right = rng.uniform(0, 3, (2, 200, 1, 1, 1))
    grey = np.arange(32)[:, None, None] * down + np.arange(32)[:, None] * right + rng.integers(0, 4, (200, 32, 32, 1))
    images = (grey + np.array([0, 10, 20])).astype(np.uint8)
    sizes = [len(packed._compressed({"images": each})) for each in (images, packed.differences(images))]
    assert sizes[1] < 0.8 * sizes[0] < images.nbytes


def test_a_folder_is_prepared_entry_by_entry_and_again(module: Any, tmp_path: Path) -> None:
    parts = module("parts")
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
    module: Any, given: bool, tmp_path: Path
) -> None:
    data = tmp_path if given else None
    with pytest.raises(DataError, match=r"must be a folder with bert-base-uncased-vocab\.txt, as parts run without"):
        module("parts").prepare("paper-text", "cpu", ["bert-tiny-sst2"], data, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
