"""`rmtkd.json`: what a model folder says of itself, sealed by its own SHA-256; and the files that it vouches for.

docs/format.md is the specification.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rmtkd.artifact.files import read_json, sha256, told
from rmtkd.errors import ArtifactError

FORMAT = 2
MANIFEST = "rmtkd.json"
FIELDS: Mapping[str, type] = {
    "format": int,
    "library": str,
    "model_class": str,
    "shapes": dict,
    "narrowed": dict,
    "labels": dict,
    "versions": dict,
    "provenance": dict,
    "files": dict,
    "self_test": dict,
    "checksum": str,
}
"""What `rmtkd.json` holds."""


def is_artifact(folder: Path) -> bool:
    """Whether the folder is a model folder of `rmtkd`."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The contents of `rmtkd.json`.

    Raises:
        ArtifactError: if it is missing, not JSON, lacks a key, was altered, or has another format.
    """
    path = folder / MANIFEST
    if not is_artifact(folder):
        raise ArtifactError(f"a model folder must hold {MANIFEST}. {folder} {_what_else(folder)}")
    manifest = read_json(path)
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        raise ArtifactError(
            f"the folder's format must be {FORMAT}. Got {told(manifest['format'])}. Use the rmtkd that wrote it."
        )
    wrong = [
        key for key, kind in FIELDS.items() if not isinstance(manifest, dict) or type(manifest.get(key)) is not kind
    ]
    if wrong:
        raise ArtifactError(
            f"{path} must hold {', '.join(FIELDS)}. Missing or odd: {', '.join(wrong)}. Fetch it again."
        )
    # Every byte counts: a repeated key or other white space is not what was written either.
    try:
        whole = path.read_bytes() == sealed({key: manifest[key] for key in manifest if key != "checksum"}).encode()
    except RecursionError:  # lists may be nested deeper when they are read than when they are written
        whole = False
    if not whole:
        raise ArtifactError(f"{path} must be as it was written. Its checksum differs. Fetch the folder again.")
    return manifest


def _what_else(folder: Path) -> str:
    """What a path is that is no model folder, and what to do."""
    if not folder.is_dir():
        return "is no folder. Is the path right?"
    if is_artifact(folder / "model"):
        return f"is a run. Its model is '{folder / 'model'}'."
    if (folder / "config.json").is_file():
        return (
            "is one of transformers'. AutoModelForSequenceClassification.from_pretrained reads it; rmtkd.save(model, "
            "FOLDER) makes one that verifies itself."
        )
    return "does not. Is the path right?"


def sealed(manifest: Mapping[str, Any]) -> str:
    """The text of `rmtkd.json`, with the SHA-256 of all the rest as its last entry."""
    checksum = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}, indent=1) + "\n"


def vouch(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def verify_files(folder: Path, manifest: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Raise `ArtifactError` unless every file that the manifest vouches for is there as it was written, and those that
    are needed are among them."""
    for name, expected in {**dict.fromkeys(needed), **manifest["files"]}.items():
        path = folder / name
        if Path(name).name != name or not _is_file(path):
            raise ArtifactError(f"the folder must hold {told(name)}. It does not. Fetch the folder again.")
        # Size first: a file that has grown without end is not read.
        if not isinstance(expected, dict) or path.stat().st_size != expected.get("bytes") or vouch(path) != expected:
            raise ArtifactError(f"{path} must be as it was written. Its checksum differs. Fetch the folder again.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False
