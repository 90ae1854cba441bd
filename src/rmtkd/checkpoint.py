"""The run folder: what a run was asked, what it did, what it found. Every file is written whole or not at all."""

import io
import itertools
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rmtkd.environment import versions
from rmtkd.errors import RunError
from rmtkd.planning import Plan, Spectrum
from rmtkd.schedule import Options

PLAN_FILES = re.compile(r"(plan|spectra)(\.\d+)?\.(json|npz)")
"""What `rmtkd plan` writes, earlier plans with a number. A folder that holds only these is not a run."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, rename it: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


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
                samples = int(arrays[key.replace("eigenvalues", "samples")])
                spectrum = Spectrum(eigenvalues=arrays[key], samples=samples)
                spectrums[name] = (*spectrums.get(name, ()), spectrum)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(
            f"spectra.npz must be the arrays that rmtkd wrote. Reading {folder / 'spectra.npz'} gave {error!r}. "
            "Plan anew with the model."
        ) from None
    return plan, spectrums


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name. It gets its own name when all went well; otherwise nothing is left.

    Args:
        path: the folder that shall come into being.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir()
        yield partial
        for file in partial.iterdir():  # safetensors makes its files private, whatever the umask allows
            file.chmod(partial.stat().st_mode & 0o666)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class RunFolder:
    """`config.json · record.jsonl · plan.json · spectra.npz · summary.json · model/`."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: Path, options: Options) -> "RunFolder":
        """Start a run in a new or empty folder, or in one that holds only a plan.

        Raises:
            RunError: if the folder holds another run or other files, or cannot be written.
        """
        folder = cls.for_plan(path)
        folder.save_json("config.json", {"options": options.to_dict(), "versions": versions()})
        return folder

    @classmethod
    def for_plan(cls, path: Path) -> "RunFolder":
        """A folder in which a plan may be written: new, empty, or holding only a plan.

        Raises:
            RunError: if the folder holds a run or other files, or cannot be written.
        """
        cls.check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise `RunError` if the folder holds a run or other files, or cannot be written."""
        nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        if not nearest.is_dir():
            raise RunError(f"--out must be a folder. {nearest} is not one. Choose another name.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise RunError(f"--out must be a folder that can be written. {nearest} cannot. Choose another one.")
        found = sorted(file.name for file in path.iterdir()) if path.exists() else []
        if others := [name for name in found if not PLAN_FILES.fullmatch(name)]:
            held = "another run" if "config.json" in found else f"other files ({others[0]})"
            raise RunError(
                f"--out must be a new folder, or hold only a plan. {path} holds {held}. "
                "Choose another folder, or remove this one; nothing in it was changed."
            )

    def append(self, event: Mapping[str, Any]) -> None:
        """Add one event to the record; the steps of training are left out, rounds sum them up."""
        if event["event"] != "step":
            with (self.path / "record.jsonl").open("a") as file:
                file.write(json.dumps(event) + "\n")

    def save_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        write_json(self.path / name, value)

    def save_plan(self, plan: Plan, spectrums: Mapping[str, Sequence[Spectrum]]) -> None:
        """Write the plan and the spectra that it was made from. Another plan that is there is kept, under a number."""
        content = (plan.to_json() + "\n").encode()
        current = self.path / "plan.json"
        if current.exists() and current.read_bytes() != content:
            number = next(n for n in itertools.count(1) if not (self.path / f"plan.{n}.json").exists())
            for name in ("plan{}.json", "spectra{}.npz"):
                if (self.path / name.format("")).exists():
                    (self.path / name.format("")).rename(self.path / name.format(f".{number}"))
        write_atomically(current, content)
        arrays = {}
        for name, streams in spectrums.items():
            for i, spectrum in enumerate(streams):
                arrays[f"{name}/{i}/eigenvalues"] = spectrum.eigenvalues
                arrays[f"{name}/{i}/samples"] = np.int64(spectrum.samples)
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        write_atomically(self.path / "spectra.npz", packed.getvalue())
