"""A spoiled model folder ends in one named error: nothing is run, nothing hangs, and at most twice the memory of the
honest folder is taken."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

Load = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def loads(place: Path) -> list[Load]:
    """What became of every folder that was spoiled, in a process of its own: a hang kills it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fuzzed_loads.py")), str(place), "0", "1"],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=place,
        # Memory that is given back is told as such at once.
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} after {lines[-1:]}: {done.stderr[-2000:]}"
    return [load for load in map(json.loads, lines) if load["call"] != "begun"]


def of(loads: list[Load], table: str) -> list[Load]:
    return [load for load in loads if load["table"] == table]


def test_there_are_a_thousand_of_each_kind_over_every_file(loads: list[Load]):
    for table in ("unsealed", "resealed"):
        ways = {(load["folder"], load["what"], load["number"]) for load in of(loads, table)}
        assert len(ways) >= 1000, table
        files = Counter(what.partition(":")[0] for _, what, _ in ways)
        assert len(files) == 8 and min(files.values()) >= 25, files


def test_honest_folders_load(loads: list[Load]):
    honest = of(loads, "honest")
    assert len(honest) >= 2 * 10
    assert {load["outcome"] for load in honest} == {"accepted"}


def test_what_is_not_as_it_was_written_is_refused(loads: list[Load]):
    assert [load for load in of(loads, "unsealed") if load["outcome"] != "refused"] == []


def test_what_was_sealed_again_is_refused_or_gives_its_stored_answers(loads: list[Load]):
    sealed = of(loads, "resealed")
    assert [load for load in sealed if load["outcome"] not in ("refused", "accepted")] == []
    outcomes = Counter(load["outcome"] for load in sealed)
    assert min(outcomes["refused"], outcomes["accepted"]) > 100, outcomes


def test_nothing_is_run_or_written(loads: list[Load], place: Path):
    assert [load for load in loads if load["seen"]] == []
    assert list(place.rglob("executed")) == []


def test_no_more_than_twice_the_honest_memory_is_taken(loads: list[Load]):
    if not any(load["extra"] for load in loads):
        pytest.skip("this system does not tell a process's highest size anew")
    assert [load for load in loads if load["share"] > 2] == []
