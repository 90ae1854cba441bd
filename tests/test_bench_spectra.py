"""The claims of the grid of noises: a table is of as many seeds as it says, and JSON is all that goes to stdout."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def spectra(benchmark: Any) -> Any:
    return benchmark("spectra")


def recorded(spectra: Any, folder: Path, seeds: int) -> list[str]:
    """A record whose first three draws are right and whose others are one too many; the words that read it."""
    rules = [rule for rule in spectra.RULES if rule not in spectra.SKIPPED]
    errors = {rule: [0] * 3 + [1] * (seeds - 3) for rule in rules}
    (folder / "iso_10.json").write_text(json.dumps({"errors": errors}))
    return ["spectra", "--noises", "iso", "--ratios", "10", "--out", str(folder)]


@pytest.mark.parametrize(("words", "exact"), [((), 0.15), (("--seeds", "3"), 1.0)])
def test_json_is_all_that_is_printed_and_is_of_as_many_seeds_as_asked_for(
    spectra: Any,
    words: tuple[str, ...],
    exact: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [*recorded(spectra, tmp_path, 20), "--json", *words])
    spectra.main()
    grid = json.loads(capsys.readouterr().out)
    assert {rule: row["iso"]["exact"] for rule, row in grid.items()} == dict.fromkeys(grid, exact)


def test_records_of_fewer_seeds_than_asked_for_are_refused(
    spectra: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*recorded(spectra, tmp_path, 20), "--seeds", "30"])
    with pytest.raises(SystemExit, match=r"must hold 30 seeds. It holds 20"):
        spectra.main()
