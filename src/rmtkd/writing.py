"""Files and folders that come into being whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rmtkd.errors import RmtkdError, RunError


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


@contextmanager
def written_to(path: Path, then: str = "") -> Iterator[None]:
    """Errors of the file system in our own words.

    Args:
        path: what is written to.
        then: what goes on from what was written before: the run in a folder of this path by default.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # a disk that fills up under weights is told by safetensors
        told = getattr(error, "strerror", None) or error
        raise RunError(
            f"{path} must take what is written to it. It does not: {told}. What was written before stays. Make room or "
            f"change its permissions, then: {then or f'rmtkd resume {path}'}"
        ) from error


def check_new(path: Path, what: str, kind: type[RmtkdError] = RunError) -> Path:
    """Return the path of what shall come into being. Raise an error of this kind if anything has its name, be it a link
    to nowhere, or if nothing can be written there.

    Args:
        path: of a file or folder.
        what: it will be, at the beginning of a sentence.
        kind: of the error.
    """
    if os.path.lexists(path):
        raise kind(f"{what} must be new. {path} exists. Choose another name or remove it.")
    check_writable(path.absolute().parent, what, kind)
    return path


def check_writable(folder: Path, what: str, kind: type[RmtkdError] = RunError) -> None:
    """Raise an error of this kind if a folder cannot come into being, or be written in if it exists."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise kind(f"{what} must be, or lie in, a folder. {nearest} is not one. Choose another name.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise kind(f"{what} must be, or lie in, a folder that can be written. {nearest} cannot. Choose another one.")


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
