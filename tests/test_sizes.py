"""Several sizes at once are what each would be alone, from one measurement; they can be stopped, and go on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rmtkd
from conftest import Sentiment, assert_untouched, contents, random_rows, snapshot, tiny_bert
from rmtkd import dry_run, environment, progress, subject
from rmtkd.checkpoint import REPORT, RunFolder
from rmtkd.errors import OptionError, PlanError, RunError
from rmtkd.planning import LatencyTable
from rmtkd.sensitivity import Sensitivity
from rmtkd.sites import find_sites
from rmtkd.sizes import check_targets
from test_cli import PAPER, Command, command
from test_latency import flops

__all__ = ["command"]

TARGETS = ("70%params", "50%params")
COMMON: dict[str, Any] = {
    "multiple_of": 4,
    "precision": "fp32",
    "epochs": 0.5,
}


class Taught:
    """Rows with a model's own answers for labels, so that it is far better than chance."""

    def __init__(self, model: torch.nn.Module, rows: Any):
        with torch.no_grad():
            batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in rows]
            self.batches = [{**batch, "labels": model(**batch).logits.argmax(-1)} for batch in batches]

    def __iter__(self):
        return iter(self.batches)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_bert(layers=1)


@pytest.fixture(scope="module")
def common(model: torch.nn.Module) -> dict[str, Any]:
    train = Taught(model, random_rows(64, seed=3))
    return COMMON | {"train": train, "calibration": train, "selection": Taught(model, random_rows(48, seed=4))}


@pytest.fixture(scope="module")
def alone(model: torch.nn.Module, common: dict[str, Any]) -> dict[str, rmtkd.Compressed]:
    """Each size by itself."""
    return {target: rmtkd.compress(model, target=target, **common) for target in TARGETS}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured, in order."""
    seen: list[str] = []
    for owner, name in (
        (dry_run, "observe"),
        (subject, "metrics_of"),
        (subject, "check_teacher"),
        (Sensitivity, "_single"),
    ):
        real = getattr(owner, name)

        def see(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            if name != "_single" or args[0]._curves is None:
                seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, see)
    return seen


def test_each_size_is_what_it_would_be_alone(
    model: torch.nn.Module, common: dict[str, Any], alone: dict[str, rmtkd.Compressed], measured: list[str]
):
    """The same plans and the same bits, also where one target is of latency; everything is measured once."""
    before, events = snapshot(model), []
    sizes = rmtkd.compress_sizes(model, targets=TARGETS, on_event=events.append, **common)
    told = [event["seconds_cut"] for event in events if event["event"] == "forecast"]
    assert len(told) == len(TARGETS) and len(set(told)) == 1  # of one pass, which was seen once
    assert measured == ["check_teacher", "metrics_of", "observe", "_single"]
    assert list(sizes) == list(TARGETS)
    for target, result in sizes.items():
        assert result.plan == alone[target].plan
        assert result.record["config"] == alone[target].record["config"]
        assert_untouched(result.model, snapshot(alone[target].model))
    assert_untouched(model, before)
    text = sizes.summary()
    for target, result in sizes.items():
        cost = result.record["compressed"]
        accuracy = cost["accuracy_selection"]
        line = next(line for line in text.splitlines() if target in line)
        assert f"{cost['parameters']:,}" in line and f"{accuracy['value']:.2%} ± {accuracy['stderr']:.2%}" in line
        assert f"{result.record['baseline']['parameters']:,}" in text


@pytest.mark.parametrize("options", [{"policy": "paper"}, {"uniform": True}, {"rule": "rdpa", "metric": "output"}])
def test_so_are_the_plans_with_other_options_and_costs(
    model: torch.nn.Module, common: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Only the targets of latency get plans with times."""
    sites, example = find_sites(model), next(iter(common["selection"]))
    table = LatencyTable.measure(model, sites, example, stopwatch=flops)
    monkeypatch.setattr(LatencyTable, "cached", lambda *_: table)
    given = {"calibration": common["calibration"], "selection": common["selection"]}
    survey = dry_run.Survey(model, **given, options=rmtkd.Options(multiple_of=4, **options))
    for target in ("90%params", "85%latency"):
        made, spectrums = rmtkd.plan(model, **given, multiple_of=4, target=target, **options)
        assert survey.plan(target) == made
        assert (made.latency is not None) == (target == "85%latency")
    assert spectrums.keys() == survey.spectrums.keys()


@pytest.mark.parametrize("at", [("plan", 2), ("cut", 1), ("measure", 2)])
def test_stopped_anywhere_the_same_call_goes_on(
    model: torch.nn.Module,
    common: dict[str, Any],
    alone: dict[str, rmtkd.Compressed],
    tmp_path: Path,
    at: tuple[str, int],
):
    """Stopped at the n-th event of a kind, then called again; the second size by `resume`."""
    out, targets, count = tmp_path / "sizes", TARGETS[:2], 0

    def stop(event: Any) -> None:
        nonlocal count
        count += event["event"] == at[0]
        if (event["event"], count) == at:
            count += 1
            raise KeyboardInterrupt

    try:
        left = rmtkd.compress_sizes(model, targets=targets, out=out, on_event=stop, **common)
    except KeyboardInterrupt:
        assert at[0] == "plan"  # a run that has begun returns
    else:
        assert list(left) == list(targets[: at[1]]) and not left[targets[at[1] - 1]].record["finished"]
        rows = {name: common[name] for name in ("train", "selection", "calibration")}
        rmtkd.resume(out / targets[1], model, **rows)
    events: list[Any] = []
    sizes = rmtkd.compress_sizes(model, targets=targets, out=out, on_event=events.append, **common)
    assert sorted(path.name for path in out.iterdir()) == sorted([*targets, REPORT])
    for target in targets:
        assert sizes[target].record["finished"]
        assert_untouched(sizes[target].model, snapshot(alone[target].model))
        assert_untouched(rmtkd.load(out / target / "model"), snapshot(alone[target].model))


def test_more_targets_come_later(model: torch.nn.Module, common: dict[str, Any], tmp_path: Path, measured: list[str]):
    out, common = tmp_path / "sizes", {**common, "epochs": 0.0}
    rmtkd.compress_sizes(model, targets=["70%params"], out=out, **common)
    first = {name: value for name, value in contents(out).items() if name != REPORT}  # the page that compares all
    measured.clear()
    sizes = rmtkd.compress_sizes(model, targets=["70%params", "50 %params"], out=out, **common)
    assert {name: value for name, value in contents(out).items() if name in first} == first
    assert list(sizes) == ["70%params", "50%params"] and measured.count("observe") == 1
    measured.clear()
    rmtkd.compress_sizes(model, targets=["50%params", "70%params"], out=out, **common)
    assert measured == []


# What is refused


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        (["25%params", "25.0% params"], {}, OptionError, r"Got 25%params and 25\.0%params, which are the same"),
        (["40%latency", "2.5x"], {}, OptionError, "which are the same"),
        ([], {}, OptionError, "Got none"),
        (["50%params", "25%parms"], {}, OptionError, "Did you mean 'params'"),
        (["50%params"], {"target": "25%params"}, OptionError, "Got target too"),
        (["50%params"], {"plan": None}, OptionError, "Got plan too"),
        (["50%params", "1%params"], {}, PlanError, "at least"),
    ],
)
def test_bad_targets_change_nothing(
    model: torch.nn.Module, common: dict[str, Any], tmp_path: Path, targets: Any, options: Any, error: Any, message: str
):
    with pytest.raises(error, match=message):
        rmtkd.compress_sizes(model, targets=targets, out=tmp_path / "sizes", **{**common, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("targets", "told"), [([0.25], "0.25"), (5, "5"), (None, "None"), (["50%params", 2], "2")])
def test_targets_that_are_no_texts_are_refused(targets: Any, told: str):
    with pytest.raises(OptionError, match=rf"targets must be texts\. Got {told}\."):
        check_targets(targets)


def test_other_options_and_other_folders_are_refused(model: torch.nn.Module, common: dict[str, Any], tmp_path: Path):
    out, common = tmp_path / "sizes", {**common, "epochs": 0.0, "policy": "paper"}
    rmtkd.compress_sizes(model, targets=["70%params"], out=out, **common)
    before = contents(out)
    with pytest.raises(RunError, match="other values were given for: epochs, seed"):
        rmtkd.compress_sizes(model, targets=["60%params", "70%params"], out=out, **{**common, "epochs": 0.1, "seed": 1})
    assert contents(out) == before
    with pytest.raises(RunError, match=r"holds config\.json|holds "):
        rmtkd.compress_sizes(model, targets=["50%params"], out=out / "70%params", **common)
    assert contents(out) == before


def test_the_edited_plan_of_any_size_is_refused_before_the_first_goes_on(
    model: torch.nn.Module, common: dict[str, Any], tmp_path: Path
):
    out, targets, events = tmp_path / "sizes", ["70%params", "60%params"], []

    def stop(event: Any) -> None:
        events.append(event["event"])
        if event["event"] == "cut":
            raise KeyboardInterrupt

    common = {**common, "policy": "paper", "on_event": stop}
    rmtkd.compress_sizes(model, targets=targets, out=out, **common)
    (out / "60%params" / "plan.json").write_text("{")
    with pytest.raises(RunError, match="goes on with the plan that it began with"):
        rmtkd.compress_sizes(model, targets=targets, out=out, **common)
    assert events.count("cut") == 1


def test_sizes_of_an_earlier_version_go_on(
    model: torch.nn.Module, common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, options = tmp_path / "sizes", {**common, "epochs": 0.0, "policy": "paper", "gentle": 0.0, "blend": False}
    rmtkd.compress_sizes(model, targets=["70%params"], out=out, **options)
    now = RunFolder.config

    def then(folder: RunFolder) -> dict[str, Any]:
        config = now(folder)
        early = {name: value for name, value in config["options"].items() if name not in ("gentle", "blend")}
        return {**config, "options": early}

    monkeypatch.setattr(RunFolder, "config", then)
    events: list[Any] = []
    rmtkd.compress_sizes(model, targets=["70%params"], out=out, on_event=events.append, **options)
    assert "finished" in [event["event"] for event in events]
    with pytest.raises(RunError, match="other values were given for: gentle, blend"):
        rmtkd.compress_sizes(model, targets=["70%params"], out=out, **{**options, "gentle": 0.4, "blend": True})


def test_all_sizes_have_the_precision_that_the_first_began_in(
    model: torch.nn.Module, common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(event: Any) -> None:
        if event["event"] == "cut":
            raise KeyboardInterrupt

    out, options = tmp_path / "sizes", {**common, "policy": "paper", "precision": "auto", "epochs": 0.3}
    monkeypatch.setattr(environment, "has_bf16", lambda _: True)
    rmtkd.compress_sizes(model, targets=["70%params"], out=out, on_event=stop, **options)
    monkeypatch.setattr(environment, "has_bf16", lambda _: False)
    sizes = rmtkd.compress_sizes(model, targets=["70%params", "50%params"], out=out, **options)
    assert [size.record["precision"] for size in sizes.values()] == ["bf16", "bf16"]


# The command


def test_one_command_gives_several_sizes(sentiment: Sentiment, command: Command, tmp_path: Path):
    out = tmp_path / "sizes"
    words = ("compress", "sst2", "--model", sentiment.teacher, "--data", sentiment.data, "--out", out, *PAPER)
    words += ("--multiple-of", 4, "--epochs", 0.2, "--precision", "fp32", "--target", "70%params", "--target")
    code, told, log = command(*words, "50%params")
    assert code == 0 and "target 50%params, 2 of 2" in log
    records = [json.loads((out / name / "summary.json").read_text()) for name in ("70%params", "50%params")]
    for record in records:
        (line,) = (line for line in told.splitlines() if f" {record['config']['target']} " in line)
        cost, value = record["compressed"], record["compressed"]["accuracy"]
        assert f"{cost['parameters']:,}" in line and f"{value['value']:.2%} ± {value['stderr']:.2%}" in line
        assert re.search(r"\d\.\d\d×", line)
    assert rmtkd.load(out / "50%params" / "model") is not None
    code, told, _ = command("resume", out / "50%params", "--json")
    assert code == 0 and json.loads(told) == records[1]
    code, told, _ = command(*words, "50%params", "--json")
    assert code == 0 and json.loads(told) == records
    before = contents(tmp_path)
    for refused, message in (
        (("70.0%params",), "which are the same"),
        (("50%params", "--plan", out / "70%params" / "plan.json"), "with --plan the plan decides. Got --target"),
        (("50%params", "--seed", 1), "other values were given for: "),
        (("1%params",), "at least"),
    ):
        code, told, log = command(*words, *refused)
        assert code == 2 and told == "" and message in log, log
        assert contents(tmp_path) == before


def test_a_target_that_is_under_way_is_named():
    event = {"event": "size", "seconds": 0.0, "target": "25%params", "number": 1, "sizes": 2}
    assert progress.describe(event) == "target 25%params, 1 of 2"
