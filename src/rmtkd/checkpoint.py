"""The run folder: what a run was asked, what it did, what it found, and where it stands.

Every file is written whole or not at all. Where the run stands is two files, each replaced in one piece: `last/round`
after every round, `last/step` now and then within one. A state of a round that is over counts for nothing.
"""

import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from rmtkd.errors import OptionError, PlanError, RunError
from rmtkd.planning import Plan, Spectrum, Target
from rmtkd.storage import apart
from rmtkd.writing import check_writable, write_atomically, write_json, written_to

REPORT = "report.html"
"""The page that tells what a folder holds, made from the rest at any time."""
_PLAN = rf"(plan|spectra)(\.\d+)?\.(json|npz)|{re.escape(REPORT)}"
PLAN_FILES = re.compile(rf"{_PLAN}|\.({_PLAN}|config\.json)\.partial")
"""What `rmtkd plan` writes, earlier plans with a number, and the page about it; or what was left half written, before a
run had begun. A folder that holds only these is not a run."""


def is_size(folder: Path) -> bool:
    """Whether this is the folder of one of several sizes: it has the name of a target."""
    try:
        Target.parse(folder.name)
    except OptionError:
        return False
    return folder.is_dir()


def write_state(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors, copied from any device, and plain JSON values to one file, whole or not at all."""
    stored = apart(tensors)
    text = json.dumps(facts)
    write_atomically(path, serialize(stored, metadata={"facts": text, "checksum": checksum(stored, text)}))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote. Raises whatever safetensors and JSON make of damaged bytes, or `ValueError`."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if metadata["checksum"] != checksum(tensors, metadata["facts"]):
        raise ValueError("another checksum than was written")
    return tensors, json.loads(metadata["facts"])


def read_planned(folder: Path) -> tuple[Plan, dict[str, tuple[Spectrum, ...]]]:
    """The plan of a folder and the spectra that it was made from.

    Raises:
        PlanError: if the plan is broken, line by line.
        RunError: if the folder does not hold both, or the spectra cannot be read.
    """
    missing = [name for name in ("plan.json", "spectra.npz") if not (folder / name).is_file()]
    if missing:
        raise RunError(
            f"a folder to plan from must hold plan.json and spectra.npz. {folder} has no {' and no '.join(missing)}. "
            "Name a folder that `rmtkd plan` or `rmtkd compress` wrote."
        )
    plan = Plan.read(folder / "plan.json")
    spectrums: dict[str, tuple[Spectrum, ...]] = {}
    try:
        with np.load(folder / "spectra.npz") as arrays:
            for key in sorted(name for name in arrays if name.endswith("/eigenvalues")):
                name = key.rsplit("/", 2)[0]
                spectrums[name] = (*spectrums.get(name, ()), _read_spectrum(arrays, key.rsplit("/", 1)[0]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f"spectra.npz must be the arrays that rmtkd wrote. Reading {folder / 'spectra.npz'} gave {error!r}. "
            "Plan anew with the model."
        ) from None
    return plan, spectrums


def _read_spectrum(arrays: Mapping[str, np.ndarray], prefix: str) -> Spectrum:
    """What is stored of one stream; folders of earlier versions hold less."""
    found: dict[str, Any] = {}
    for name in (field.name for field in fields(Spectrum)):
        if (value := arrays.get(f"{prefix}/{name}")) is not None:
            found[name] = value if value.ndim else value.item()
    return Spectrum(**found)


class RunFolder:
    """`config.json · record.jsonl · plan.json · spectra.npz · last/ · summary.json · model/ · report.html`."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> "RunFolder":
        """Start a run in a new or empty folder, or in one that holds only a plan.

        Args:
            path: the folder.
            config: what `config.json` shall say: all that it takes to start the run again.

        Raises:
            RunError: if the folder holds another run or other files, cannot be written, or another process is at it.
        """
        folder = cls.for_plan(path)
        folder._take()
        try:
            cls.check_free(path)  # still, now that nobody else begins a run in it
            folder.save_json("config.json", _sealed({**config, "id": secrets.token_hex(8)}))
        except BaseException:
            folder.release()
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started, to go on with. What was left half written is cleared away.

        Raises:
            RunError: if there is no run, it cannot be written, or another process is at it.
        """
        folder = cls(path)
        folder.config()
        if not os.access(path, os.W_OK | os.X_OK):
            raise RunError(f"a run folder must be writable. {path} is not. Change its permissions, or copy it.")
        folder._take()
        for leftover in (*path.glob(".*.partial"), *path.glob("last/.*.partial")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        record = path / "record.jsonl"
        if record.exists() and not (lines := record.read_bytes()).endswith(b"\n"):
            write_atomically(record, lines[: lines.rfind(b"\n") + 1])
        return folder

    @classmethod
    def for_plan(cls, path: Path) -> "RunFolder":
        """A folder in which a plan may be written: new, empty, or holding only a plan.

        Raises:
            RunError: if the folder holds a run or other files, or cannot be written.
        """
        cls.check_free(path)
        with written_to(path):
            path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise `RunError` if the folder holds a run or other files, or cannot be written."""
        check_writable(path, "--out")
        found = sorted(file.name for file in path.iterdir()) if path.exists() else []
        if others := [name for name in found if not PLAN_FILES.fullmatch(name)]:
            is_run = "config.json" in found and '"began_with"' in (path / "config.json").read_text(errors="replace")
            held = "another run" if is_run else f"other files ({others[0]})"
            hint = f"Go on with it: rmtkd resume {path}. Or choose" if is_run else "Choose"
            raise RunError(
                f"--out must be a new folder, or hold only a plan. {path} holds {held}. "
                f"{hint} another folder, or remove this one; nothing in it was changed."
            )

    def config(self) -> dict[str, Any]:
        """What the run was asked.

        Raises:
            RunError: if the folder holds no run.
        """
        config = self._read_json("config.json", "Start one: rmtkd compress.")
        if not isinstance(config, dict) or "id" not in config:
            inside = self.path.parent if (self.path.parent / "record.jsonl").exists() else None
            hint = f"Did you mean {inside}?" if inside else "Start one: rmtkd compress."
            raise RunError(
                f"a run folder must hold what `rmtkd compress` wrote. {self.path} holds something else. {hint}"
            )
        if _sealed(config) != config:
            raise RunError(
                f"{self.path / 'config.json'} must be as it was written: a run goes on with the options that it began "
                "with. It was changed. Restore it, or start a new run; nothing was changed."
            )
        return config

    def summary(self) -> dict[str, Any] | None:
        """The record of a finished run; None while it is not finished."""
        return self._read_json("summary.json", "") if (self.path / "summary.json").is_file() else None

    def events(self) -> list[dict[str, Any]]:
        """What the record tells, in order; a line that is being written is left out."""
        path = self.path / "record.jsonl"
        try:
            lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
            return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise RunError(f"{path} must be as it was written. Reading it gave: {error}. Restore it.") from None

    def plan(self) -> Plan | None:
        """The plan of the run; None while it has none."""
        path = self.path / "plan.json"
        return Plan.read(path) if path.is_file() else None

    def hold_plan(self, begun: Plan) -> None:
        """Make sure that `plan.json` is the plan that the run began with: written again if it is gone.

        Raises:
            RunError: if it was changed since.
        """
        try:
            found = self.plan()
            is_same = found is None or found.to_json() == begun.to_json()
        except PlanError:
            found, is_same = begun, False
        if found is None:
            with written_to(self.path):
                write_atomically(self.path / "plan.json", (begun.to_json() + "\n").encode())
        elif not is_same:
            raise RunError(
                f"a run goes on with the plan that it began with. {self.path / 'plan.json'} is another now. Move it "
                "elsewhere to go on, and start a new run with --plan for what it says."
            )

    def has_begun(self) -> bool:
        """Whether the run has come as far as its plan."""
        return (self.path / "last" / "round.safetensors").exists()

    def has_begun_or_ended(self) -> bool:
        """Whether the run has come as far as its plan, or is finished."""
        return self.has_begun() or (self.path / "summary.json").is_file()

    def forget(self) -> None:
        """Remove a run that was refused before it had a plan, so that its folder is free again."""
        for name in ("config.json", "record.jsonl"):
            (self.path / name).unlink(missing_ok=True)
        self.drop_state()
        with suppress(OSError):  # a plan lies in it
            self.path.rmdir()
        self.release()

    def release(self) -> None:
        """Let other processes have the run."""
        if self._lock is not None:
            with suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(self._lock, fcntl.LOCK_UN)  # processes that were forked hold the same lock
            os.close(self._lock)
            self._lock = None

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event to the record; the steps of training are left out, rounds sum them up."""
        if event["event"] != "step":
            with written_to(self.path), (self.path / "record.jsonl").open("a") as file:
                file.write(json.dumps(event) + "\n")

    def save_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        with written_to(self.path):
            write_json(self.path / name, value)

    def save_state(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write `last/NAME.safetensors`, in place of the one that is there.

        Args:
            name: `round` or `step`.
            tensors: by name; copied, from any device.
            facts: plain JSON values.
        """
        with written_to(self.path):
            (self.path / "last").mkdir(exist_ok=True)
            own = {**facts, "run": self.config()["id"], "state": name}
            write_state(self.path / "last" / f"{name}.safetensors", tensors, own)

    def load_state(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save_state` wrote last under this name; None if there is nothing.

        Raises:
            RunError: if the file is damaged.
        """
        path = self.path / "last" / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            tensors, facts = read_state(path)
            if (facts["run"], facts["state"]) != (self.config()["id"], name):
                raise ValueError("it belongs to another run, or is another state")
            return tensors, facts
        except Exception as error:
            instead = "the start of its round" if name == "step" else "the beginning"
            raise RunError(
                f"{path} must be as it was written. Reading it gave: {error or type(error).__name__}. Restore it, or "
                f"remove it: then `rmtkd resume {self.path}` goes on from {instead}. Nothing was changed."
            ) from error

    def drop_state(self) -> None:
        """Remove where the run stands: it is finished."""
        shutil.rmtree(self.path / "last", ignore_errors=True)

    def save_plan(self, plan: Plan, spectrums: Mapping[str, Sequence[Spectrum]]) -> None:
        """Write the plan and the spectra that it was made from. Another plan that is there is kept, under a number."""
        content = (plan.to_json() + "\n").encode()
        current = self.path / "plan.json"
        arrays = {}
        for name, streams in spectrums.items():
            for i, spectrum in enumerate(streams):
                known = {field: value for field, value in asdict(spectrum).items() if value is not None}
                arrays |= {f"{name}/{i}/{field}": np.asarray(value) for field, value in known.items()}
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        with written_to(self.path):
            if current.exists() and current.read_bytes() != content:
                number = next(n for n in itertools.count(1) if not (self.path / f"plan.{n}.json").exists())
                for name in ("plan{}.json", "spectra{}.npz"):
                    if (self.path / name.format("")).exists():
                        (self.path / name.format("")).rename(self.path / name.format(f".{number}"))
            write_atomically(self.path / "spectra.npz", packed.getvalue())
            write_atomically(current, content)  # last: a run with a plan has its spectra

    def _read_json(self, name: str, hint: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise RunError(f"a run folder must hold {name}. {self.path} does not. {hint}".rstrip()) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} must be as it was written. Reading it gave: {error}. Restore it.") from None

    def _take(self) -> None:
        """Keep other processes away until this one ends, however it ends. What is locked is the folder: any file in it
        may be replaced."""
        try:
            import fcntl
        except ImportError:  # a system without it goes without
            return
        with written_to(self.path):
            self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(self._lock), self.path.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        except OSError:  # a file system that does not lock folders goes without, too
            return
        if not is_ours:
            self.release()
            raise RunError(
                f"one process at a time must work on a run. Another one is at {self.path}. Wait for it, or stop it."
            )


def _sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, as JSON has it, with the SHA-256 of all the rest as its last entry."""
    rest = json.loads(json.dumps({key: value for key, value in config.items() if key != "checksum"}))
    return {**rest, "checksum": checksum({}, json.dumps(rest))}


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of names, shapes and bytes of tensors, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
