"""The run folder: what a run was asked, what it did, what it found. Every file is written whole or not at all."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmtkd.environment import versions
from rmtkd.errors import RunError
from rmtkd.planning import Plan, Spectrum
from rmtkd.schedule import Options

PLAN_FILES = frozenset({"plan.json", "spectra.npz"})
"""What `rmtkd plan` writes. A folder that holds only these is not a run."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk, rename it: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class RunFolder:
    """`config.json · record.jsonl · plan.json · spectra.npz · summary.json · model/`."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: Path, options: Options) -> "RunFolder":
        """Start a run in an empty folder, or in one that holds only a plan.

        Raises:
            RunError: if the folder holds another run or other files.
        """
        folder = cls.for_plan(path)
        folder.save_json("config.json", {"options": options.to_dict(), "versions": versions()})
        return folder

    @classmethod
    def for_plan(cls, path: Path) -> "RunFolder":
        """A folder in which a plan may be written: new, empty, or holding only a plan.

        Raises:
            RunError: if the folder holds a run or other files.
        """
        cls.check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise `RunError` if the folder holds a run or other files."""
        if path.exists() and not path.is_dir():
            raise RunError(f"--out must be a folder. {path} is a file. Choose another name.")
        found = {file.name for file in path.iterdir()} if path.exists() else set()
        if found - PLAN_FILES:
            held = "another run" if "config.json" in found else f"other files ({sorted(found - PLAN_FILES)[0]})"
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
        write_atomically(self.path / name, (json.dumps(value, indent=1) + "\n").encode())

    def save_plan(self, plan: Plan, spectrums: Mapping[str, Sequence[Spectrum]]) -> None:
        """Write the plan and the spectra that it was made from."""
        write_atomically(self.path / "plan.json", (plan.to_json() + "\n").encode())
        arrays = {}
        for name, streams in spectrums.items():
            for i, spectrum in enumerate(streams):
                arrays[f"{name}/{i}/eigenvalues"] = spectrum.eigenvalues
                arrays[f"{name}/{i}/samples"] = np.int64(spectrum.samples)
        temporary = self.path / ".spectra.partial.npz"
        np.savez_compressed(temporary, **arrays)
        temporary.replace(self.path / "spectra.npz")
