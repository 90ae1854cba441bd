"""Rows of a task as arrays in files that are small enough to carry: token ids in 16 bits, images in 8, no texts.

A folder has `rows.json`, which says what the rows of each role are, and for each role as many `ROLE-NUMBER.npz` as it
takes, each of at most 60 MB. All of them are read at once. Texts are far below that; CIFAR-10 is not: its 60,000 images
of 3,072 bytes take 184 MB as they are, 136 as PNG, 110 here, 108 as WebP without loss and 101 by the slowest coding
that was tried (LZMA; of 2,000 images), so that they travel in four files, one after the other.

Images are kept as differences: red and blue from green, then each pixel from what its left, upper and upper left
neighbours let expect, all modulo 256, which a general compressor then makes smaller than it makes images.
"""

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rmtkd.errors import DataError
from rmtkd.recipes.images import ImageRows
from rmtkd.recipes.recipe import Rows
from rmtkd.recipes.rows import TokenRows
from rmtkd.writing import new_folder, write_json

LARGEST = 60_000_000
"""Bytes of a file."""
ROLES = ("train", "selection", "report")


def pack(rows: Rows, folder: Path, largest: int = LARGEST) -> None:
    """Write the rows of all roles, in the place of what the folder held."""
    facts: dict[str, Any] = {"note": rows.note}
    shutil.rmtree(folder, ignore_errors=True)
    with new_folder(folder) as partial:
        for role in ROLES:
            collection = getattr(rows, role)
            files = {f"{role}-{i}.npz": content for i, content in enumerate(_contents(collection, largest))}
            for name, content in files.items():
                (partial / name).write_bytes(content)
            facts[role] = {"files": list(files), **_facts(collection)}
        write_json(partial / "rows.json", facts)


def unpack(folder: Path, seed: int) -> Rows:
    """The rows of all roles; seed of the order of training.

    Raises:
        DataError: if files are missing.
    """
    facts = json.loads((folder / "rows.json").read_text())
    missing = [name for role in ROLES for name in facts[role]["files"] if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} must hold all its files. It lacks {', '.join(missing)}. Carry them, too.")
    made = {role: _collection(folder, facts[role], seed if role == "train" else None) for role in ROLES}
    return Rows(**made, note=facts["note"])


def _contents(collection: Any, largest: int) -> list[bytes]:
    """A collection in as few files as are small enough.

    Raises:
        DataError: if a single row is larger.
    """
    count, files = len(collection.labels), 1
    while files <= count:
        bounds = [count * i // files for i in range(files + 1)]
        made = [_compressed(_arrays(collection, range(*ends))) for ends in pairwise(bounds)]
        if max(map(len, made)) <= largest:
            return made
        files = max(files + 1, sum(map(len, made)) // largest)
    raise DataError(f"a file must hold at least one row. One takes more than {largest:,} bytes. Allow larger files.")


def _compressed(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def differences(images: np.ndarray) -> np.ndarray:
    """Images as differences of neighbours, modulo 256, a plane a colour: `channels × rows × height × width`."""
    planes = images.copy()
    if images.shape[-1] == 3:
        planes[..., ::2] -= images[..., 1:2]
    for axis in (1, 2):
        planes = np.diff(planes, axis=axis, prepend=np.zeros_like(planes.take([0], axis)))
    return np.ascontiguousarray(np.moveaxis(planes, -1, 0))


def images_of(planes: np.ndarray) -> np.ndarray:
    """What `differences` was given."""
    images = np.moveaxis(planes, 0, -1)
    for axis in (1, 2):
        images = images.cumsum(axis, dtype=np.uint8)
    if images.shape[-1] == 3:
        images[..., ::2] += images[..., 1:2]
    return np.ascontiguousarray(images)


def _arrays(collection: Any, rows: Sequence[int]) -> dict[str, np.ndarray]:
    chosen = slice(rows[0], rows[-1] + 1)
    labels = collection.labels[chosen].astype(np.int16)
    if isinstance(collection, ImageRows):
        return {"planes": differences(collection.images[chosen]), "labels": labels}
    ids = np.concatenate([np.asarray(collection.ids[i]) for i in rows])
    made = {"ids": ids.astype(np.uint16 if ids.max() < 2**16 else np.int32), "labels": labels}
    if collection.types is not None:
        made["types"] = np.concatenate([np.asarray(collection.types[i], dtype=np.uint8) for i in rows])
    return {**made, "lengths": collection.lengths[chosen].astype(np.int32)}


def _facts(collection: Any) -> dict[str, Any]:
    """What a collection is made with beside its arrays."""
    if isinstance(collection, ImageRows):
        scale = {name: getattr(collection, name).flatten().tolist() for name in ("mean", "std")}
        own = {name: getattr(collection, name) for name in ("augments", "named")}
        return {"kind": "images", "options": {**scale, **own, "batch_size": collection.batch_size}}
    return {"kind": "tokens", "options": {"pad_id": collection.pad_id, "batch_size": collection.batch_size}}


def _collection(folder: Path, facts: Mapping[str, Any], seed: int | None) -> TokenRows | ImageRows:
    files = [_read(folder / name) for name in facts["files"]]
    arrays: dict[str, Any] = {
        name: np.concatenate([file[name] for file in files], axis=1 if name == "planes" else 0) for name in files[0]
    }
    labels, options = arrays.pop("labels"), {**facts["options"], "seed": seed}
    if facts["kind"] == "images":
        return ImageRows(images_of(arrays["planes"]), labels, **options)
    ends = arrays.pop("lengths").cumsum()[:-1]
    split = {name: [row.tolist() for row in np.split(values, ends)] for name, values in arrays.items()}
    return TokenRows(split["ids"], labels, types=split.get("types"), **options)


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)
