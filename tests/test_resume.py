"""A run that was stopped anywhere goes on to the model that it would have given, to the bit."""

import copy
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import rmtkd
import rmtkd.run
from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd import checkpoint, environment, reporting
from rmtkd.checkpoint import RunFolder
from rmtkd.distillation import Recovery
from rmtkd.errors import ArtifactError, DataError, OptionError, RunError
from rmtkd.progress import describe
from rmtkd.recipes import TokenRows
from rmtkd.reporting.plans import per_head
from rmtkd.result import Compressed
from rmtkd.run import made_with
from rmtkd.sites import find_sites
from rmtkd.training import Phase

OPTIONS: dict[str, Any] = {
    "target": "70%params",
    "policy": "paper",  # faster; a run with measured widths is one of those below
    "multiple_of": 2,
    "granularity": "layer",
    "epochs": 1.5,
    "save_every_s": 0.0,
    "recovery": Recovery(lr=1e-3, average=0.9, hidden=0.5),
}
TIMES: dict[str, Any] = {
    "seconds_cut": 0.0,
    "seconds_recovery": 0.0,
    "latency_ms": None,
    "latency_ms_untouched": None,
}
"""What differs between two runs of the same bits."""


class Killed(BaseException):
    """Ends a run as a power cut would: nothing of ours catches it."""


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_bert()


@pytest.fixture(scope="module")
def rows(model: torch.nn.Module) -> dict[str, Any]:
    """Rows on which the random model is always right."""
    made = {
        "train": random_rows(160, seed=1, shuffle=True),
        "selection": random_rows(96, seed=2),
        "report": random_rows(64, seed=3),
    }
    for part in made.values():
        unshuffled = TokenRows(part.ids, part.labels, batch_size=1000)
        with torch.no_grad():
            (batch,) = unshuffled
            answers = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        part.labels[unshuffled._order()[0]] = answers.numpy()
    return made


def run(model: torch.nn.Module, rows: Mapping[str, Any], out: Path, **options: Any) -> Compressed:
    return rmtkd.compress(model, **rows, out=out, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def whole(model: torch.nn.Module, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """The run that nobody stopped."""
    return run(model, rows, tmp_path_factory.mktemp("whole") / "run", control=True)


def assert_same(one: Compressed, other: Compressed) -> None:
    assert_untouched(one.model, snapshot(other.model))
    assert one.plan == other.plan
    for mine, theirs in zip(one.rounds, other.rounds, strict=True):
        assert replace(mine, **TIMES) == replace(theirs, **TIMES)
    for part in ("baseline", "compressed"):
        assert one.record[part]["accuracy"] == other.record[part]["accuracy"]
    assert one.record.get("control") == other.record.get("control")
    assert one.record["stop_reason"] == other.record["stop_reason"]


def killing_at(moment: int) -> Any:
    """A listener that ends the run at the event of this number."""
    seen = 0

    def listen(event: Mapping[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            raise Killed

    return listen


def test_the_same_command_twice_gives_the_same_bits(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path
):
    assert_same(run(model, rows, tmp_path / "again", control=True), whole)


@pytest.mark.parametrize("first", [1, 2, 3, 4, 6, 9, 11, 13, 20])
def test_a_run_that_ended_at_any_event_goes_on_to_the_same_bits(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path, first: int
):
    out = tmp_path / "run"
    with pytest.raises(Killed):
        run(model, rows, out, control=True, on_event=killing_at(first))
    ends = 1
    for moment in (2, 5, 9, 10_000):
        try:
            result = rmtkd.resume(out, model, **rows, on_event=killing_at(moment))
            break
        except Killed:
            ends += 1
    assert_same(result, whole)
    assert_untouched(rmtkd.load(out / "model"), snapshot(whole.model))
    assert not (out / "last").exists()
    assert ends > 1


def test_a_uniform_run_that_was_killed_goes_on_to_the_same_bits(
    model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path
):
    options: dict[str, Any] = {"uniform": True, "target": "85%params", "policy": "guarded"}
    expected = run(model, rows, tmp_path / "whole", **options)
    for moment in (4, 8):  # with the plan made, and within recovery
        out = tmp_path / f"killed at {moment}"
        with pytest.raises(Killed):
            run(model, rows, out, **options, on_event=killing_at(moment))
        result = rmtkd.resume(out, model, **rows)
        assert_same(result, expected)
        assert result.plan.uniform and len({result.plan.widths[f"layer.{i}.ffn"] for i in range(2)}) == 1


def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path):
    """In processes of their own, killed by the system: also in the middle of a save."""
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= 20
    assert len(told["models"]) > 1 and len(set(told["models"].values())) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_saves_and_returns_a_usable_model(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path, number: signal.Signals
):
    steps = []

    def press(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            steps.append(event["step"])
            if event["number"] == 2 and event["step"] == 2:
                signal.raise_signal(number)

    before = signal.getsignal(number)
    stopped = run(model, rows, tmp_path / "run", control=True, on_event=press)
    assert signal.getsignal(number) is before
    assert steps[-1] == 2
    assert stopped.record["finished"] is False
    assert stopped.record["stop_reason"].startswith("interrupted after step 2 of")
    assert stopped.record["compressed"]["accuracy"] is None  # report rows are read once, at the end
    batch = next(iter(rows["report"]))
    assert stopped.model(input_ids=batch["input_ids"]).logits.isfinite().all()
    stopped.save(tmp_path / "so-far")
    assert_untouched(rmtkd.load(tmp_path / "so-far"), snapshot(stopped.model))
    card = (tmp_path / "so-far" / "README.md").read_text()
    sites = zip(find_sites(model), find_sites(stopped.model), stopped.plan.sites, strict=True)
    for before, after, planned in sites:  # of a round that is over, of the one that was left, and of none
        widths = (per_head(planned, site.width) for site in (before, after))
        assert f"| {before.name} | {' | '.join(widths)} |" in card
    assert_same(rmtkd.resume(tmp_path / "run", model, **rows), whole)


def test_ctrl_c_in_the_control_gives_the_compressed_model_and_not_the_control(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path
):
    def press(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and (event["number"], event["step"]) == (0, 2):
            signal.raise_signal(signal.SIGINT)

    stopped = run(model, rows, tmp_path / "run", control=True, on_event=press)
    assert stopped.record["stop_reason"].endswith("in the control")
    assert_untouched(stopped.model, snapshot(whole.model))
    assert_same(rmtkd.resume(tmp_path / "run", model, **rows), whole)


def test_ctrl_c_while_going_back_to_the_cut_loses_nothing(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path
):
    def press(event: Mapping[str, Any]) -> None:
        if event["event"] == "blend":
            signal.raise_signal(signal.SIGINT)

    stopped = run(model, rows, tmp_path / "run", control=True, on_event=press, save_every_s=1e6)
    assert stopped.record["finished"] is False
    steps = whole.rounds[0].steps
    assert stopped.record["stop_reason"] == f"interrupted after step {steps} of {steps} in round 1"
    told: list[Any] = []
    again = rmtkd.resume(tmp_path / "run", model, **rows, on_event=told.append)
    assert_same(again, whole)
    assert not any(event["event"] == "step" and event["number"] == 1 for event in told)


def test_a_second_ctrl_c_ends_the_run_at_once(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path
):
    """Nothing more is measured, and what is on disk is good to go on with."""
    told = []

    def press(event: Mapping[str, Any]) -> None:
        told.append(event["event"])
        if event["event"] == "step" and event["number"] == 2 and event["step"] == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(model, rows, tmp_path / "run", control=True, on_event=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert told[-1] == "step"
    assert_same(rmtkd.resume(tmp_path / "run", model, **rows), whole)


def test_a_second_ctrl_c_while_the_model_is_measured_ends_it_at_once(
    model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path
):
    def press(event: Mapping[str, Any]) -> None:
        if event["event"] in ("step", "interrupted"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(model, rows, tmp_path / "run", on_event=press)


def test_ctrl_c_while_cutting_gives_the_model_of_the_last_round(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path
):
    def press(event: Mapping[str, Any]) -> None:
        if event["event"] == "cut" and event["number"] == 2:
            signal.raise_signal(signal.SIGINT)

    stopped = run(model, rows, tmp_path / "run", control=True, on_event=press)
    assert stopped.record["finished"] is False
    assert stopped.record["stop_reason"] == "interrupted after 1 rounds"
    assert sum(p.numel() for p in stopped.model.parameters()) == whole.rounds[0].parameters
    assert_same(rmtkd.resume(tmp_path / "run", model, **rows), whole)


def test_ctrl_c_while_planning_ends_a_run_that_has_nothing_to_give_yet(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path
):
    def press(event: Mapping[str, Any]) -> None:
        if event["event"] == "start":
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(model, rows, tmp_path / "run", control=True, on_event=press)
    assert_same(rmtkd.resume(tmp_path / "run", model, **rows), whole)


def test_a_run_without_a_folder_can_be_interrupted_too(model: torch.nn.Module, rows: dict[str, Any]):
    def press(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            signal.raise_signal(signal.SIGINT)

    stopped = rmtkd.compress(model, **rows, **OPTIONS, on_event=press)
    assert stopped.record["finished"] is False
    assert stopped.record["stop_reason"].startswith("interrupted after step 1 of")


def test_a_full_disk_is_told_and_the_older_state_stays(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path
):
    out, written = tmp_path / "run", []

    def no_room(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", no_room)
        with pytest.raises(RunError, match=r"No space left on device.*stays.*rmtkd resume"):
            run(model, rows, out, control=True)
    assert not list(out.rglob("*.partial"))
    assert_same(rmtkd.resume(out, model, **rows), whole)


def test_a_disk_that_is_full_when_the_model_is_written_is_told_and_the_run_goes_on(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, tmp_path: Path
):
    def no_room(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rmtkd.artifact.folder.write_atomically", no_room)
        with pytest.raises(RunError, match=r"No space left on device.*stays.*then: rmtkd resume .*run"):
            run(model, rows, out, control=True)
    assert not (out / "model").exists() and not list(out.rglob("*.partial"))
    told: list[Any] = []
    assert_same(rmtkd.resume(out, model, **rows, on_event=told.append), whole)
    assert not any(event["event"] == "cut" for event in told)


@pytest.fixture(scope="module")
def killed(model: torch.nn.Module, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed in its second round."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Killed):
        run(model, rows, out, control=True, on_event=killing_at(17))
    return out


@pytest.fixture
def stopped(killed: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    shutil.copytree(killed, tmp_path / "stopped")
    return tmp_path / "stopped"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
@pytest.mark.parametrize("name", ["step", "round"])
def test_a_damaged_state_is_named_and_everything_stays(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, stopped: Path, name: str, damage: str
):
    state = stopped / "last" / f"{name}.safetensors"
    content = bytearray(state.read_bytes())
    content[-7] ^= 1
    spoiled = {"flip": bytes(content), "cut": content[: len(content) // 2], "empty": b"", "text": b"{}"}[damage]
    state.write_bytes(spoiled)
    before = files(stopped)
    with pytest.raises(RunError, match=f"{name}.safetensors must be as it was written.*remove it"):
        rmtkd.resume(stopped, model, **rows)
    after = files(stopped)
    assert {key: value for key, value in after.items() if key != "record.jsonl"} == {
        key: value for key, value in before.items() if key != "record.jsonl"
    }
    state.unlink()  # what the message says
    assert_same(rmtkd.resume(stopped, model, **rows), whole)


def test_a_plan_that_was_edited_under_a_run_is_refused_and_one_that_is_gone_comes_back(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, stopped: Path
):
    plan = stopped / "plan.json"
    begun = plan.read_bytes()
    edited = json.loads(begun)
    edited["remarks"] = ["by hand"]
    plan.write_text(json.dumps(edited))
    with pytest.raises(RunError, match=r"goes on with the plan that it began with.*start a new run with --plan"):
        rmtkd.resume(stopped, model, **rows)
    plan.unlink()
    assert_same(rmtkd.resume(stopped, model, **rows), whole)
    assert plan.read_bytes() == begun


def test_a_read_only_folder_is_refused(
    model: torch.nn.Module, rows: dict[str, Any], stopped: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root every folder can be written
    with pytest.raises(RunError, match="must be writable"):
        rmtkd.resume(stopped, model, **rows)


def test_a_finished_run_says_so_and_gives_its_result(model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path):
    first = run(model, rows, tmp_path / "run")
    before, told = files(tmp_path / "run"), []
    again = rmtkd.resume(tmp_path / "run", model, **rows, on_event=told.append)
    assert [event["event"] for event in told] == ["finished"]
    assert_same(again, first)
    assert files(tmp_path / "run") == before


def relabelled(rows: TokenRows) -> TokenRows:
    other = copy.copy(rows)
    other.labels = (rows.labels + 1) % 3  # type: ignore[operator]
    return other


def test_another_model_or_other_rows_are_refused(model: torch.nn.Module, rows: dict[str, Any], stopped: Path):
    with pytest.raises(RunError, match="goes on with the model that it began with"):
        rmtkd.resume(stopped, tiny_bert(seed=5), **rows)
    with pytest.raises(RunError, match="goes on with the model that it began with"):
        rmtkd.resume(stopped, model, **rows, sites=find_sites(model)[::-1])
    with pytest.raises(RunError, match="goes on with the training rows that it began with"):
        rmtkd.resume(stopped, model, **{**rows, "train": random_rows(160, seed=4, shuffle=True)})
    for name, called in (("train", "training"), ("selection", "selection"), ("report", "report")):
        with pytest.raises(RunError, match=f"goes on with the {called} rows that it began with"):
            rmtkd.resume(stopped, model, **{**rows, name: relabelled(rows[name])})
    with pytest.raises(RunError, match="goes on with the report rows that it began with"):
        rmtkd.resume(stopped, model, **{**rows, "report": None})
    with pytest.raises(RunError, match="goes on with the teacher model that it began with"):
        rmtkd.resume(stopped, model, **rows, teacher_model=model)


def calibrated(rows: dict[str, Any]) -> dict[str, Any]:
    """With calibration rows of their own: no share of the training rows is seen by anything but training."""
    return {**rows, "calibration": random_rows(160, seed=1)}


def test_other_training_rows_are_refused_also_where_calibration_does_not_see_them(
    model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path
):
    out, given = tmp_path / "run", calibrated(rows)
    with pytest.raises(Killed):
        run(model, given, out, on_event=killing_at(5))
    with pytest.raises(RunError, match="goes on with the training rows that it began with"):
        rmtkd.resume(out, model, **{**given, "train": relabelled(rows["train"])})
    with pytest.raises(RunError, match="goes on with the calibration rows that it began with"):
        rmtkd.resume(out, model, **{**given, "calibration": random_rows(160, seed=6)})
    one = copy.copy(rows["train"])
    one.ids = [*one.ids[:-1], [*one.ids[-1][:-1], 49 - one.ids[-1][-1] % 2]]  # a token of a row
    with pytest.raises(RunError, match="goes on with the training rows that it began with"):
        rmtkd.resume(out, model, **{**given, "train": one})
    assert rmtkd.resume(out, model, **given).record["finished"]


def test_a_run_of_an_earlier_version_which_did_not_look_at_all_training_rows_goes_on(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, stopped: Path
):
    config = RunFolder(stopped).config()
    began = config["began_with"]
    count = began["training rows"].split(" ", 1)[1]
    began["training rows"] = f"{began.pop('calibration rows')} {count}"
    RunFolder(stopped).save_json("config.json", checkpoint._sealed(config))
    with pytest.raises(RunError, match="goes on with the training rows that it began with"):
        rmtkd.resume(stopped, model, **{**rows, "train": relabelled(rows["train"])})
    assert_same(rmtkd.resume(stopped, model, **rows), whole)


def test_altered_weights_of_a_finished_run_are_refused(model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path):
    run(model, rows, tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 0x40
    weights.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="weights that the run ended with"):
        rmtkd.resume(tmp_path / "run", model, **rows)


def test_a_model_folder_is_no_run(model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path):
    run(model, rows, tmp_path / "run")
    with pytest.raises(RunError, match=r"holds something else\. Did you mean"):
        rmtkd.resume(tmp_path / "run" / "model", model, **rows)
    with pytest.raises(RunError, match="holds other files"):
        run(model, rows, tmp_path / "run" / "model")


def test_a_bug_before_the_plan_leaves_the_folder_free(model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path):
    def fail(event: Mapping[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(model, rows, tmp_path / "run", on_event=fail)
    assert not (tmp_path / "run").exists()


def test_two_processes_cannot_work_on_one_run(model: torch.nn.Module, rows: dict[str, Any], stopped: Path):
    busy = RunFolder.open(stopped)
    try:
        with pytest.raises(RunError, match="one process at a time"):
            rmtkd.resume(stopped, model, **rows)
    finally:
        busy.release()


def test_a_folder_without_a_run_says_what_to_do(model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path):
    with pytest.raises(RunError, match=r"must hold config.json.*rmtkd compress"):
        rmtkd.resume(tmp_path, model, **rows)


def test_starting_again_in_the_folder_of_a_run_names_resume(
    model: torch.nn.Module, rows: dict[str, Any], stopped: Path
):
    before = files(stopped)
    with pytest.raises(RunError, match="Go on with it: rmtkd resume"):
        run(model, rows, stopped)
    assert files(stopped) == before


def test_the_seconds_of_a_run_are_those_of_all_its_sessions(
    model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path
):
    """One that ended in a round, one that ended in the control, and the last: up to the last step that was saved."""
    out, slept, told = tmp_path / "run", {"cut": 0.5, "measure": 0.25}, [[0.0], [0.0], [0.0]]

    def end_at(session: int, number: int) -> Callable[[Mapping[str, Any]], None]:
        def listen(event: Mapping[str, Any]) -> None:
            time.sleep(slept.pop(event["event"], 0.0))
            if event["event"] == "step" and event["number"] == number and event["step"] > 2:
                raise Killed
            if event["event"] in ("start", "resume", "step"):
                told[session].append(event["seconds"])

        return listen

    with pytest.raises(Killed):
        run(model, rows, out, control=True, granularity="round", on_event=end_at(0, 1))
    with pytest.raises(Killed):
        rmtkd.resume(out, model, **rows, on_event=end_at(1, 0))
    result = rmtkd.resume(out, model, **rows, on_event=end_at(2, -1))
    assert not slept
    assert result.record["seconds"] > sum(times[-1] - times[1] for times in told) - 0.1


class Loader:
    """A loader that shuffles by the global random numbers, as users' loaders do. Even one that does not draws one."""

    def __init__(self, rows: TokenRows, *, shuffle: bool):
        self.loader = DataLoader(list(rows), batch_size=None, shuffle=shuffle)  # type: ignore

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def test_a_loader_with_a_random_order_of_its_own_goes_on_in_that_order(
    model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path
):
    loaded = {**rows, "train": Loader(rows["train"], shuffle=True)}
    for role in ("selection", "calibration"):
        loaded[role] = Loader(rows["selection"], shuffle=False)
    expected = run(model, loaded, tmp_path / "whole")
    for moment in (7, 8, 12, 16, 18):
        out = tmp_path / f"killed at {moment}"
        with pytest.raises(Killed):
            run(model, loaded, out, on_event=killing_at(moment))
        assert_same(rmtkd.resume(out, model, **loaded), expected)


def test_an_epoch_is_one_pass_through_the_rows_however_many_rounds_it_is_dealt_to(
    model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []
    step = Phase._step

    def look(phase: Phase, batch: Any) -> None:
        seen.extend(batch["row_ids"].tolist())
        step(phase, batch)

    def begin(event: Mapping[str, Any]) -> None:
        if event["event"] == "forecast":
            seen.clear()

    monkeypatch.setattr(Phase, "_step", look)
    loaded = {**rows, "train": Loader(rows["train"], shuffle=True)}
    result = run(model, loaded, tmp_path / "run", granularity="site", epochs=1.0, on_event=begin)
    assert len([done for done in result.rounds if done.steps]) > 2
    assert sorted(seen) == list(range(160))


class Augmented:
    """Rows of which a token is drawn anew in every pass, by the random numbers of a library."""

    def __init__(self, rows: TokenRows, draw: Callable[[], float]):
        self.rows, self.draw = rows, draw

    def set_epoch(self, number: int) -> None:
        self.rows.set_epoch(number)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.rows:
            ids = batch["input_ids"].clone()
            ids[:, 0] = int(40 * self.draw())
            yield {**batch, "input_ids": ids}


@pytest.mark.parametrize("draw", [np.random.rand, lambda: float(torch.rand(()))])
def test_rows_that_draw_random_numbers_for_every_batch_go_on_to_the_same_bits(
    model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path, draw: Callable[[], float]
):
    given = {**rows, "train": Augmented(rows["train"], draw)}
    expected = run(model, given, tmp_path / "whole")
    assert "seed" not in "".join(expected.plan.remarks)
    for moment in (4, 9, 16):
        out = tmp_path / f"killed at {moment}"
        with pytest.raises(Killed):
            run(model, given, out, on_event=killing_at(moment))
        draw()
        assert_same(rmtkd.resume(out, model, **given), expected)


def test_a_run_whose_rows_no_seed_sets_goes_on_with_others_and_says_so(
    model: torch.nn.Module, rows: dict[str, Any], stopped: Path, tmp_path: Path
):
    given, out = {**rows, "train": Augmented(rows["train"], np.random.default_rng().random)}, tmp_path / "run"
    with pytest.raises(Killed):
        run(model, given, out, on_event=killing_at(9))
    result = rmtkd.resume(out, model, **given)
    assert result.record["finished"]
    assert "by random numbers that no seed sets" in "".join(result.plan.remarks)
    with pytest.raises(RunError, match="goes on with the training rows that it began with"):
        rmtkd.resume(stopped, model, **given)


def test_a_half_written_line_of_the_record_is_dropped(model: torch.nn.Module, rows: dict[str, Any], stopped: Path):
    with (stopped / "record.jsonl").open("a") as file:
        file.write('{"event": "rou')
    rmtkd.resume(stopped, model, **rows)
    events = [json.loads(line) for line in (stopped / "record.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "done"


def test_what_a_killed_session_left_half_written_is_cleared_away(
    model: torch.nn.Module, rows: dict[str, Any], stopped: Path
):
    (stopped / ".summary.json.partial").write_bytes(b"{")
    (stopped / "last" / ".calls-x.partial").mkdir()
    shutil.copytree(stopped / "last", stopped / "model")  # a model without its summary is not a result
    rmtkd.resume(stopped, model, **rows)
    assert not [path for path in stopped.rglob("*") if path.name.startswith(".")]
    assert rmtkd.load(stopped / "model") is not None


def test_other_threads_than_the_run_began_with_are_told(
    model: torch.nn.Module, rows: dict[str, Any], stopped: Path, monkeypatch: pytest.MonkeyPatch
):
    now = made_with()
    monkeypatch.setattr(rmtkd.run, "made_with", lambda: {**now, "threads": "77"})
    told: list[Any] = []
    rmtkd.resume(stopped, model, **rows, on_event=told.append)
    assert list(told[0]["changed"]) == ["threads"]
    line = describe(told[0])
    assert line is not None and re.search(r"since it began: threads \d+ → 77", line)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.pop("options"),
        lambda config: config["options"].update(colour="red"),
        lambda config: config["options"].update(recovery=None),
        lambda config: config.update(plan={"format": 2}),
        lambda config: config.update(began_with=None),
        lambda config: config["options"].update(tau="half"),
        lambda config: config["options"].update(epochs=0.0),
        lambda config: config.update(checksum="0"),
    ],
)
def test_a_configuration_edited_by_hand_is_refused(
    model: torch.nn.Module, rows: dict[str, Any], stopped: Path, edit: Callable[[dict[str, Any]], Any]
):
    config = json.loads((stopped / "config.json").read_text())
    edit(config)
    (stopped / "config.json").write_text(json.dumps(config))
    before = files(stopped)
    with pytest.raises(RunError, match=r"config\.json must be as it was written"):
        rmtkd.resume(stopped, model, **rows)
    assert files(stopped) == before


def test_a_run_of_another_device_is_reported_anywhere_and_goes_on_only_there(
    model: torch.nn.Module, rows: dict[str, Any], stopped: Path
):
    config = RunFolder(stopped).config()
    config["options"]["device"] = "cuda:99"
    RunFolder(stopped).save_json("config.json", checkpoint._sealed(config))
    (page,) = reporting.write_report(stopped)
    assert "cuda:99" in page.read_text()
    with pytest.raises(OptionError, match=r"device must be there\. Got 'cuda:99'"):
        rmtkd.resume(stopped, model, **rows)


def test_a_run_goes_on_in_the_precision_that_it_began_in(
    model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(environment, "has_bf16", lambda _: True)
    expected = run(model, rows, tmp_path / "whole")
    assert expected.record["precision"] == "bf16" and expected.record["config"]["precision"] == "auto"
    with pytest.raises(Killed):
        run(model, rows, tmp_path / "run", on_event=killing_at(9))
    shutil.copytree(tmp_path / "run", tmp_path / "earlier")
    monkeypatch.setattr(environment, "has_bf16", lambda _: False)
    assert_same(rmtkd.resume(tmp_path / "run", model, **rows), expected)
    config = RunFolder(tmp_path / "earlier").config()
    assert config.pop("precision") == "bf16"  # which earlier versions did not write
    RunFolder(tmp_path / "earlier").save_json("config.json", checkpoint._sealed(config))
    assert rmtkd.resume(tmp_path / "earlier", model, **rows).record["precision"] == "fp32"


@pytest.mark.parametrize("name", ["step", "round"])
def test_the_state_of_another_run_is_refused(
    model: torch.nn.Module, rows: dict[str, Any], stopped: Path, tmp_path: Path, name: str
):
    with pytest.raises(Killed):
        run(model, rows, tmp_path / "other", control=True, on_event=killing_at(18))
    shutil.copy(tmp_path / "other" / "last" / f"{name}.safetensors", stopped / "last")
    with pytest.raises(RunError, match="it belongs to another run"):
        rmtkd.resume(stopped, model, **rows)


def test_a_copied_run_goes_on_as_well(
    model: torch.nn.Module, rows: dict[str, Any], whole: Compressed, stopped: Path, tmp_path: Path
):
    shutil.copytree(stopped, tmp_path / "elsewhere")
    assert_same(rmtkd.resume(tmp_path / "elsewhere", model, **rows), whole)


def test_rows_that_can_be_read_once_are_refused(model: torch.nn.Module, rows: dict[str, Any], tmp_path: Path):
    for name in rows:
        with pytest.raises(DataError, match=f"{name} rows are gone through several times"):
            run(model, {**rows, name: iter(rows[name])}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
