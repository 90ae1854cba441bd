"""Files are written whole or not at all; a folder that holds anything else is never touched."""

import json
import os
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from conftest import contents, random_rows, tiny_bert
from rmtkd import compression
from rmtkd.checkpoint import RunFolder, read_planned, read_state, write_state
from rmtkd.errors import RunError
from rmtkd.planning import Plan


def test_a_run_may_start_in_a_new_an_empty_or_a_planned_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned" / "plan.json").write_text("{}")
    (tmp_path / "planned" / "spectra.npz").write_bytes(b"")
    for name in ("new/and/deep", "empty", "planned"):
        RunFolder.create(tmp_path / name, {"options": {"seed": 3}})
        assert RunFolder(tmp_path / name).config()["options"] == {"seed": 3}


def test_of_two_runs_that_begin_in_one_folder_at_once_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both have found the folder free before either has written to it."""
    out, check, first = tmp_path / "run", RunFolder.check_free, []

    def check_while_another_begins(path: Path) -> None:
        check(path)
        if not first:
            first.append(None)
            first[0] = RunFolder.create(path, {"who": "first", "began_with": {}})

    monkeypatch.setattr(RunFolder, "check_free", check_while_another_begins)
    with pytest.raises(RunError, match="one process at a time"):
        RunFolder.create(out, {"who": "second"})
    assert RunFolder(out).config()["who"] == "first"
    with pytest.raises(RunError, match="one process at a time"):
        RunFolder.open(out)
    first[0].release()
    with pytest.raises(RunError, match="holds another run"):
        RunFolder.create(out, {"who": "third"})
    RunFolder.open(out).release()


@pytest.mark.parametrize("name", ["plan.json", "spectra.npz", "spectra.1.npz", "report.html", "config.json"])
def test_what_was_left_half_written_before_a_run_began_is_in_nobodys_way(tmp_path: Path, name: str):
    (tmp_path / f".{name}.partial").write_bytes(b"{")
    RunFolder.check_free(tmp_path)
    (tmp_path / f".{name}").write_bytes(b"{")
    with pytest.raises(RunError, match="holds other files"):
        RunFolder.check_free(tmp_path)


def test_a_run_that_is_refused_leaves_its_folder_to_the_next(tmp_path: Path):
    first = RunFolder.create(tmp_path / "run", {"who": "first"})
    late = RunFolder(tmp_path / "run")
    with pytest.raises(RunError, match="one process at a time"):
        late._take()
    first.forget()
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError):
        late._take()
    RunFolder.create(tmp_path / "run", {"who": "next"}).release()


def test_a_folder_that_was_removed_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    lock = fcntl.flock

    def locked_too_late(descriptor: int, how: int) -> None:
        (tmp_path / "run").rmdir()
        (tmp_path / "run").mkdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", locked_too_late)
    with pytest.raises(RunError, match="one process at a time"):
        RunFolder.create(tmp_path / "run", {})
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("held", ["config.json", "thesis.tex", "plan.json.bak"])
def test_a_folder_with_anything_else_is_refused_and_untouched(tmp_path: Path, held: str):
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text("{}")
    (out / held).write_text("mine")
    before = contents(out)
    for start in (RunFolder.check_free, RunFolder.for_plan, lambda path: RunFolder.create(path, {})):
        with pytest.raises(RunError, match=r"--out must be a new folder.*nothing in it was changed"):
            start(out)
    assert contents(out) == before


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "nowhere"):
        with pytest.raises(RunError, match="--out must be, or lie in, a folder"):
            RunFolder.check_free(path)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root every folder can be written
    with pytest.raises(RunError, match="can be written"):
        RunFolder.check_free(tmp_path / "new")


def test_the_record_is_valid_json_lines_without_steps(tmp_path: Path):
    folder = RunFolder.create(tmp_path / "run", {})
    events = [{"event": "start", "note": "a\nb – ü"}, {"event": "step", "step": 1}, {"event": "done", "seconds": 0.5}]
    for event in events:
        folder.append(event)
    lines = (tmp_path / "run" / "record.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [events[0], events[2]]


def test_a_saved_plan_reads_back_equal_with_its_spectra(tmp_path: Path):
    import numpy as np

    made, spectrums = compression.plan(tiny_bert(), calibration=list(random_rows(200)), multiple_of=2)
    folder = RunFolder.for_plan(tmp_path / "run")
    folder.save_plan(made, spectrums)
    folder.save_plan(made, spectrums)
    assert set(contents(tmp_path / "run")) == {"plan.json", "spectra.npz"}
    assert Plan.from_json((tmp_path / "run" / "plan.json").read_text()) == made
    arrays = np.load(tmp_path / "run" / "spectra.npz", allow_pickle=False)
    assert np.array_equal(arrays["layer.0.ffn/0/eigenvalues"], spectrums["layer.0.ffn"][0].eigenvalues)
    assert arrays["layer.0.ffn/0/samples"] == spectrums["layer.0.ffn"][0].samples


@pytest.mark.parametrize("older", [False, True])
def test_spectra_read_back_whole_and_those_of_earlier_versions_with_what_they_hold(tmp_path: Path, older: bool):
    import numpy as np

    made, spectrums = compression.plan(tiny_bert(), calibration=list(random_rows(200)), multiple_of=2)
    spectrums = {
        name: tuple(replace(s, replicate=-s.eigenvalues) for s in streams) for name, streams in spectrums.items()
    }
    RunFolder.for_plan(tmp_path).save_plan(made, spectrums)
    if older:
        arrays = dict(np.load(tmp_path / "spectra.npz"))
        np.savez(
            tmp_path / "spectra.npz", **{k: v for k, v in arrays.items() if k.endswith(("/eigenvalues", "/samples"))}
        )
    _, read = read_planned(tmp_path)
    assert list(read) == sorted(spectrums)
    for name, streams in spectrums.items():
        for stored, spectrum in zip(read[name], streams, strict=True):
            assert spectrum.effective_samples is not None
            for field, value in asdict(spectrum).items():
                expected = None if older and field not in ("eigenvalues", "samples") else value
                assert np.array_equal(getattr(stored, field), expected)  # type: ignore[arg-type]
                assert type(getattr(stored, field)) is type(expected)


def test_planning_again_keeps_the_earlier_plan_under_a_number(tmp_path: Path):
    first, spectrums = compression.plan(tiny_bert(), calibration=list(random_rows(200)), multiple_of=2)
    second, _ = compression.plan(tiny_bert(), calibration=list(random_rows(200)), multiple_of=4)
    folder = RunFolder.for_plan(tmp_path / "run")
    for made in (first, second, first):
        RunFolder.for_plan(tmp_path / "run")  # numbered plans do not make it a run
        folder.save_plan(made, spectrums)
    kept = [
        Plan.from_json((tmp_path / "run" / name).read_text()) for name in ("plan.1.json", "plan.2.json", "plan.json")
    ]
    assert kept == [first, second, first]
    assert (tmp_path / "run" / "spectra.1.npz").is_file()


def test_a_run_that_was_released_is_free_though_a_forked_process_lives_on(tmp_path: Path):
    """As the workers of a data loader do."""
    first = RunFolder.create(tmp_path / "run", {})
    sleeper = os.fork()
    if sleeper == 0:
        time.sleep(60)
        os._exit(0)
    try:
        first.release()
        RunFolder.open(tmp_path / "run").release()
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)


def test_a_state_may_hold_tensors_that_share_memory(tmp_path: Path):
    whole = torch.arange(12.0)
    tensors = {"whole": whole, "part": whole[:6], "again": whole.view(3, 4), "row": whole.view(3, 4).T[1]}
    write_state(tmp_path / "state", tensors, {})
    found, _ = read_state(tmp_path / "state")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
