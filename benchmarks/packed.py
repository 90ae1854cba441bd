"""Rows of a task as arrays in files that are small enough to carry: token ids in 16 bits, images in 8, no texts.

A folder has `rows.json`, which says what the rows of each role are, and for each role as many `ROLE-NUMBER.npz` as it
takes, each of at most 60 MB.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmtkd.checkpoint import write_json
from rmtkd.errors import DataError
from rmtkd.recipes.images import ImageRows
from rmtkd.recipes.recipe import Rows
from rmtkd.recipes.rows import TokenRows

LARGEST = 60_000_000
"""Bytes of a file."""
ROLES = ("train", "selection", "report")


def pack(rows: Rows, folder: Path, largest: int = LARGEST) -> None:
    """Write the rows of all roles."""
    folder.mkdir(parents=True)
    facts: dict[str, Any] = {"note": rows.note}
    for role in ROLES:
        collection = getattr(rows, role)
        count = len(collection.labels)
        size = sum(array.nbytes for array in _arrays(collection, range(count)).values())
        files = -(-5 * size // (4 * largest))  # rows are of unequal length: a fifth is left free
        bounds = [count * i // files for i in range(files + 1)]
        names = [f"{role}-{i}.npz" for i in range(files)]
        for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
            np.savez(folder / name, **_arrays(collection, range(start, stop)))  # type: ignore[arg-type]
            if (folder / name).stat().st_size > largest:
                raise DataError(f"{name} must have at most {largest:,} bytes. Its rows are too unequal.")
        facts[role] = {"files": names, **_facts(collection)}
    write_json(folder / "rows.json", facts)


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


def _arrays(collection: Any, rows: Sequence[int]) -> dict[str, np.ndarray]:
    chosen = slice(rows[0], rows[-1] + 1)
    labels = collection.labels[chosen].astype(np.int16)
    if isinstance(collection, ImageRows):
        return {"images": collection.images[chosen], "labels": labels}
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
    arrays: dict[str, Any] = {name: np.concatenate([file[name] for file in files]) for name in files[0]}
    labels, options = arrays.pop("labels"), {**facts["options"], "seed": seed}
    if facts["kind"] == "images":
        return ImageRows(arrays["images"], labels, **options)
    ends = arrays.pop("lengths").cumsum()[:-1]
    split = {name: [row.tolist() for row in np.split(values, ends)] for name, values in arrays.items()}
    return TokenRows(split["ids"], labels, types=split.get("types"), **options)


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)
