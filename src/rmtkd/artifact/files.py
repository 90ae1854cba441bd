"""The files of a model folder, looked at before they are read: their texts may take no more memory than their tensors.

A parser makes of a text many times its size, so that a small file could fill the memory. What is honest is small
beside the weights.
"""

import hashlib
import json
import reprlib
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rmtkd.errors import ArtifactError

WEIGHTS = "model.safetensors"
ALWAYS_READ = 2**19
"""So many bytes a text may have beside weights of any size: what some thousands of tensors need."""
SHARE, MOST_READ = 16, 2**26
"""Beside large weights it may have as many bytes as one in this many of theirs, and never more than this."""
BYTES_A_VALUE = 32
"""Lists and numbers take most where they are shortest: on average a value has at least so many of the bytes allowed."""


def read_json(path: Path) -> Any:
    """The value in a JSON file of a model folder.

    Raises:
        ArtifactError: if it is not JSON, or larger than it can honestly be.
    """
    try:
        most, size = _most_bytes(path.parent / WEIGHTS), path.stat().st_size
        if size > most:
            raise ValueError(f"it has more than {most:,} bytes")
        with path.open("rb") as file:
            content = file.read(size)
        if sum(content.count(start) for start in (b"[", b"{", b",")) > most // BYTES_A_VALUE:
            raise ValueError(f"it has more than {most // BYTES_A_VALUE:,} values")
        return json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path} must be JSON. Reading it gave: {told(error)}. Fetch the folder again.") from None


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of every tensor in a file of safetensors by name; no tensor is read.

    Raises:
        ArtifactError: if it is no such file, or its header is larger than it can honestly be.
    """
    try:
        most = _most_bytes(path)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > most:
            raise ValueError(f"its header has more than {most:,} bytes")
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # whatever safetensors makes of missing or damaged bytes
        raise ArtifactError(
            f"{path} must hold tensors as they were written. Reading them gave: {told(error)}. Fetch the folder again."
        ) from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def told(what: object) -> str:
    """A value or an error in words, shortened: it may be an attacker's."""
    if not isinstance(what, Exception):
        return reprlib.repr(what)
    text = f"{type(what).__name__}: {what}"
    return text if len(text) <= 300 else f"{text[:300]}…"


def _most_bytes(weights: Path) -> int:
    return max(ALWAYS_READ, min(weights.stat().st_size // SHARE, MOST_READ) if weights.is_file() else 0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
