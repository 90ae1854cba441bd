"""Cells of a benchmark: each is one JSON file, written whole or not at all, and one that has its file is not run again,
so that a killed benchmark goes on where it stopped."""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkd.checkpoint import checksum
from rmtkd.environment import machine, versions
from rmtkd.errors import DataError, RmtkdError
from rmtkd.storage import tensors_of
from rmtkd.writing import write_atomically, write_json

SCALES = ("tiny", "cpu", "full")


def cell(path: Path, run: Callable[[], dict[str, Any]], *, teacher_id: str | None = None) -> dict[str, Any]:
    """The record of a cell: read, or run and written.

    Args:
        path: of the record.
        run: makes it.
        teacher_id: `identity` of the teacher, which the record holds.

    Raises:
        DataError: if the record that is there is of another teacher.
    """
    if not path.exists():
        print(f"running {path.stem}", flush=True)
        start = time.monotonic()
        of_teacher = {} if teacher_id is None else {"teacher_id": teacher_id}
        record = {
            **run(),
            **of_teacher,
            "seconds": time.monotonic() - start,
            "machine": machine(),
            "versions": versions(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    record = json.loads(path.read_text())
    if teacher_id is not None and record.get("teacher_id", teacher_id) != teacher_id:
        raise DataError("this record is of another teacher. Move it away, or go on with that teacher.")
    print(f"{path.stem}: {headline(record)}", flush=True)
    return record


def kept(path: Path, make: Callable[[], Any], device: str = "cpu") -> Any:
    """What is made once for several cells: read, or made and written, whole or not at all."""
    if not path.exists():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(made, content)
        write_atomically(path, content.getvalue())
    return torch.load(path, weights_only=False, map_location=device)


def tried(path: Path, run: Callable[[], dict[str, Any]], *, teacher_id: str | None = None) -> dict[str, Any] | None:
    """The record of a cell; None, and a line that says why, where rmtkd refuses it: the other cells are run."""
    try:
        return cell(path, run, teacher_id=teacher_id)
    except RmtkdError as error:
        print(f"{path.stem}: {error}", flush=True)
        return None


def read_largest_scale(results: Path) -> list[dict[str, Any]]:
    """The records of a folder, of the largest scale alone: scales differ in more than in noise."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    scales = [scale for scale in SCALES if any(record["scale"] == scale for record in found)]
    return [record for record in found if record["scale"] in scales[-1:]]


def identity(model: nn.Module) -> str:
    """The beginning of its weights' checksum: what was made with one teacher is of no use to another."""
    return checksum(tensors_of(model))[:8]


def headline(record: Mapping[str, Any]) -> str:
    """The accuracies of a record in one line."""
    after = record.get("compressed", record)
    known = [key for key in ("accuracy", "accuracy_selection") if after.get(key) is not None]
    return ", ".join(f"{key} {spread(percent([after], key))}" for key in known)


def percent(cells: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Of each cell a proportion in percent: a number, or an estimate with its `value`."""
    values = [cell[key] for cell in cells]
    return [100 * (value["value"] if isinstance(value, Mapping) else value) for value in values]


def at_best_rate(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the cells of one method those that learned longest, at the learning rate that is best on selection rows."""
    longest = max((each["epochs"] for each in cells), default=0)
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for each in cells:
        if each["epochs"] == longest:
            by_rate.setdefault(each["lr"], []).append(each)
    return max(by_rate.values(), key=lambda mine: statistics.mean(percent(mine, "accuracy_selection")), default=[])


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean over seeds, and their standard deviation where there are several."""
    deviation = f" ± {statistics.stdev(values):{form.replace('+', '')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def print_event(event: Mapping[str, Any]) -> None:
    """Rounds, and every 200th step."""
    if event["event"] != "step" or event["step"] % 200 == 0:
        print({k: v for k, v in event.items() if k not in ("widths", "sites", "options")}, flush=True)


PAGES = Path(__file__).parent.parent / "docs" / "results"
"""The pages of results, which hold the tables."""


def arguments(name: str, describe: str | None) -> argparse.ArgumentParser:
    """What every table of the published evaluation takes: its scale, rows, seeds, and where files lie."""
    parser = argparse.ArgumentParser(description=describe, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--cache", type=Path, default=Path("runs") / name, help="Models that are made on the way.")
    parser.add_argument("--results", type=Path, help="Folder of the records; those of the repository by default.")
    parser.add_argument("--table", action="store_true", help="Run nothing, write the table.")
    return parser


def publish(name: str, markdown: str, results: Path | None = None) -> None:
    """Print a table. One of the repository's records, where `results` names no other folder, also takes the place of
    the one of this name in the pages, between `<!-- name -->` and `<!-- /name -->`; where there is none, say so."""
    print(markdown)
    if results is not None:
        return
    begin, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    for page in PAGES.glob("*.md"):
        before, _, rest = page.read_text(encoding="utf-8").partition(begin)
        if end in rest:
            write_atomically(page, (before + begin + markdown + end + rest.partition(end)[2]).encode())
            return
    print(f"docs/results has no place for {name}: `<!-- {name} -->`, an empty line, `<!-- /{name} -->`.")
