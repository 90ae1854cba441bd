"""What `rmtkd ls` says was measured is what the committed records hold: no number is written without one."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from rmtkd import recipes
from rmtkd.recipes.recipe import Measured
from rmtkd.recipes.results import MEASURED

RECORDS = Path(__file__).parents[1] / "benchmarks" / "results"
COSTS = {"parameters": "parameters", "operations": "flops"}


def read(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / name).read_text())


def narrow(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the narrow model: a run's has it below `compressed`, a benchmark's beside the rest."""
    return record.get("compressed", record)


def remaining(record: dict[str, Any], cost: str) -> float:
    before = record["baseline"][cost] if "baseline" in record else record[f"baseline_{cost}"]
    return 100 * narrow(record)[cost] / before


def epochs_of(record: dict[str, Any]) -> float:
    return record["config"]["epochs"] if "config" in record else record["epochs"]


@pytest.mark.parametrize("name", MEASURED)
def test_a_recipe_tells_what_its_records_hold(name: str) -> None:
    told = MEASURED[name]
    records = [read(file) for file in told.records]
    accuracies = [narrow(record)["accuracy"] for record in records]
    values = [100 * accuracy["value"] for accuracy in accuracies]
    spread = statistics.stdev(values) if len(values) > 1 else 100 * accuracies[0]["stderr"]
    teacher = read(told.teacher_record)["baseline"] if told.teacher_record else records[0]["baseline"]
    remains = [remaining(record, COSTS[told.cost]) for record in records]
    assert round(statistics.mean(values), 1) == told.accuracy
    assert round(spread, 1) == told.spread
    assert round(100 * teacher["accuracy"]["value"], 1) == told.teacher
    assert round(max(remains), 1) == told.remains
    assert {accuracy["n"] for accuracy in accuracies} == {told.rows}
    assert {epochs_of(record) for record in records} == {told.epochs}
    assert len({record.get("seed") for record in records}) == len(records)


@pytest.mark.parametrize("name", MEASURED)
def test_the_records_are_of_the_command_that_stands_beside_them(name: str) -> None:
    told = MEASURED[name]
    words = told.command.split()
    for record in map(read, told.records):
        if words[:2] == ["rmtkd", "compress"]:
            assert words[2] == name and record["config"]["target"] == recipes.get(name).options["target"]
        elif words[2] == "curve":
            assert words[words.index("--task") + 1] == record["task"] == name and record["method"] == "guarded"
        else:
            assert words[2] == "vision" and record["method"] == "pairs"
            assert record["recovery"]["lr"] == float(words[words.index("--lr") + 1])
        if "--epochs" in words:
            assert float(words[words.index("--epochs") + 1]) == record["epochs"]


def test_every_measured_recipe_tells_it_and_the_others_say_that_they_were_not() -> None:
    assert {name: recipes.get(name).measured for name in recipes.names() if recipes.get(name).measured} == MEASURED


def test_one_seed_is_told_as_one() -> None:
    facts: dict[str, Any] = {"accuracy": 91.25, "spread": 0.5, "teacher": 92.0, "rows": 1000, "command": "rmtkd ls"}
    one = Measured(network="a net", remains=25.0, cost="parameters", epochs=1.0, records=("a",), **facts)
    assert one.line() == (
        "a net at 25.0% of the parameters, 1 epoch of recovery: 91.2 ± 0.5 %, teacher 92.0 % (n = 1,000, 1 seed)"
    )
    three = Measured(network="a net", remains=25.0, cost="operations", epochs=2.0, records=("a", "b", "c"), **facts)
    assert "of the operations, 2 epochs" in three.line() and three.line().endswith("3 seeds)")
