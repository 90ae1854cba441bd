"""Files and folders are written whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from conftest import contents
from rmtkd.errors import ExportError
from rmtkd.writing import check_new, new_folder, write_atomically, write_json


def test_writing_replaces_the_whole_content(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_bytes(b"a much longer old content")
    write_atomically(path, b"new")
    assert contents(tmp_path) == {"a.json": b"new"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def fail(*_: object):
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert contents(tmp_path) == {"a.json": b"old"}


def test_json_that_cannot_be_written_leaves_the_old_content(tmp_path: Path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_new_folder_appears_whole_and_readable_by_the_same_people(tmp_path: Path):
    with new_folder(tmp_path / "in" / "new") as partial:
        (partial / "private").write_bytes(b"1")
        (partial / "private").chmod(0o600)
        (partial / "plain").write_bytes(b"2")
        assert not (tmp_path / "in" / "new").exists()
        plain = (partial / "plain").stat().st_mode
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["new"]
    assert (tmp_path / "in" / "new" / "private").stat().st_mode == plain


def test_what_shall_be_new_needs_a_place_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert check_new(tmp_path / "some" / "where", "it") == tmp_path / "some" / "where"
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="it must be new"):
        check_new(tmp_path / "file", "it", ExportError)
    with pytest.raises(ExportError, match=r"it must be, or lie in, a folder.*file is not one"):
        check_new(tmp_path / "file" / "in", "it", ExportError)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root every folder can be written
    with pytest.raises(ExportError, match="must be, or lie in, a folder that can be written"):
        check_new(tmp_path / "new", "it", ExportError)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_new_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]):
    with pytest.raises(error), new_folder(tmp_path / "new") as partial:
        (partial / "file").write_bytes(b"1")
        raise error
    assert list(tmp_path.iterdir()) == []
