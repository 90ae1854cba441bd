"""The tables of the published evaluation in parts, for an accelerator that is lent for minutes and has no network.

    rmtkd bench parts prepare paper-text --scale full --data DIR --out PARTS [--only bert-base-sst2]   # here
    rmtkd bench parts run PARTS --device cuda --minutes 9 --work WORK --results OUT                    # there, again

*prepare* writes all that is needed into one folder, in files of at most 60 MB: rows as token ids or bytes of images,
and the vocabulary. A folder may be prepared entry by entry. Every text task is one small file a role; CIFAR-10 is 110
MB in all, and no coding that was tried brings it to 60 (`packed.py`): there a part reads four files, which have to be
carried one by one. Entries that start from a checkpoint are left out. *run* reads this folder alone. It works for so
many minutes, ends as Ctrl-C does, after the step that is under way, and the next call goes on there: in the training
of a teacher, in a recovery, or with the next measurement. A measurement, and the look at a model before it is cut, are
begun anew if time ends within them, so that a part must be longer than these. What is known of the state of training is
in WORK, which has to stay where parts run (a BERT-base with its optimiser takes 1.3 GB); where it is lost, the cells
without a record begin anew.

Cells are the records of the table itself (`rmtkd bench paper-text --table` shows them when they lie in
`benchmarks/results/`). Every part leaves one more, `OUT/parts/SCALE-NUMBER.json`: its seconds, the records it added,
and the energy of the device from its own counter, or why there is none.
"""

import argparse
import json
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import paper_text
import paper_vision
from packed import pack
from paper import RESULTS, Bench
from rmtkd import recipes
from rmtkd.energy import Counter, counter_of
from rmtkd.environment import machine, versions
from rmtkd.errors import DataError
from rmtkd.measurement import wait
from rmtkd.writing import write_json

TABLES: Mapping[str, Any] = {"paper-text": paper_text, "paper-vision": paper_vision}
CONTENTS = "parts.json"


def prepare(table: str, scale: str, only: Sequence[str] | None, data: Path | None, out: Path) -> None:
    """Write the folder that parts read; what it holds of the same table stays.

    Raises:
        DataError: if parts would have to fetch something, or the folder is another table's.
    """
    entries = prepared(out, table, scale)
    for entry in TABLES[table].SCALES[scale]:
        if entry.start is None or (only is not None and entry.key not in only):
            continue
        carry(entry.files, data, out)
        rows = recipes.get(entry.task).rows(data, entry.start(data, 0), 0)
        pack(rows, out / entry.key)
        entries = list(dict.fromkeys([*entries, entry.key]))
        write_json(out / CONTENTS, {"table": table, "scale": scale, "entries": entries, "versions": versions()})
        print(f"{entry.key}: {rows.note}", flush=True)


def prepared(out: Path, table: str, scale: str) -> list[str]:
    """The entries that a folder holds."""
    if not (out / CONTENTS).is_file():
        return []
    facts = json.loads((out / CONTENTS).read_text())
    if (facts["table"], facts["scale"]) != (table, scale):
        came = f"{facts['table']} at scale {facts['scale']}"
        raise DataError(f"{out} must be empty or hold {table} at scale {scale}. It holds {came}. Name another folder.")
    return facts["entries"]


def carry(files: Sequence[str], data: Path | None, out: Path) -> None:
    """Copy what a start reads from the data folder: where parts run there is no hub to fetch it from."""
    for name in files:
        if data is None or not (data / name).is_file():
            place = "no folder" if data is None else f"{data}, which lacks it"
            raise DataError(f"--data must be a folder with {name}, as parts run without network. Got {place}. Add it.")
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / name, out)


def run(folder: Path, given: argparse.Namespace) -> bool:
    """One part; whether all is done."""
    facts = json.loads((folder / CONTENTS).read_text())
    table, scale = facts["table"], facts["scale"]
    module, results = TABLES[table], given.results or RESULTS / table
    settings = {key: module.SETTINGS[key] for key in module.SETTINGS if given.settings is None or key in given.settings}
    finished, before, start = False, _records(results), time.monotonic()
    with Watched(torch.device(given.device)) as watched, limited(60 * given.minutes):
        try:
            for seed in given.seeds:
                bench = Bench(
                    name=table,
                    scale=scale,
                    settings=settings,
                    data=folder,
                    prepared=folder,
                    cache=given.work,
                    results=results,
                    seed=seed,
                    device=given.device,
                )
                for entry in module.SCALES[scale]:
                    if entry.key in facts["entries"]:
                        bench.run(entry)
            finished = True
        except KeyboardInterrupt:
            print("time is over: the same command goes on", flush=True)
    log = results / "parts"
    log.mkdir(parents=True, exist_ok=True)
    record = {
        "finished": finished,
        "seconds": time.monotonic() - start,
        "records": sorted(_records(results) - before),
        "energy": watched.energy,
        "command": f"rmtkd bench parts run, {table} at scale {scale}",
        "machine": machine(),
        "versions": versions(),
    }
    number = len(list(log.glob(f"{scale}-*.json")))
    write_json(log / f"{scale}-{number:03}.json", record)
    return finished


def _records(results: Path) -> set[str]:
    return {path.name for path in results.glob("*.json")}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Within, Ctrl-C comes by itself when time is over."""

    def ring(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Watched:
    """What a device takes in all, rest included, from entry to exit.

    Attributes:
        energy: joules and their source; or no joules, and the reason.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.counter: Counter | None = None
        self.energy: dict[str, Any] = {"joules": None}

    def __enter__(self) -> "Watched":
        try:
            self.counter = counter_of(self.device)
            self.start = self.counter.read()
        except DataError as error:
            self.counter, self.energy["reason"] = None, str(error)
        return self

    def __exit__(self, *_: object) -> None:
        if self.counter is not None:
            wait(self.device)
            joules = self.counter.joules(self.start, self.counter.read())
            self.energy = {"joules": joules, "source": self.counter.source}


def main() -> None:
    """Prepare parts, or run one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    preparing = verbs.add_parser("prepare")
    preparing.add_argument("table", choices=list(TABLES))
    preparing.add_argument("--scale", choices=("tiny", "cpu", "full"), default="tiny")
    preparing.add_argument("--only", nargs="+", help="Names of entries, such as bert-tiny-sst2.")
    preparing.add_argument("--data", type=Path)
    preparing.add_argument("--out", type=Path, required=True)
    running = verbs.add_parser("run")
    running.add_argument("parts", type=Path)
    running.add_argument("--minutes", type=float, default=9.0)
    running.add_argument("--device", default="cpu")
    running.add_argument("--settings", nargs="*", help="Of the table; with none, teachers alone.")
    running.add_argument("--seeds", nargs="+", type=int, default=[0])
    running.add_argument("--work", type=Path, default=Path("runs") / "parts", help="Where training stands.")
    running.add_argument("--results", type=Path, help="Folder of the records; those of the repository by default.")
    given = parser.parse_args()
    if given.verb == "prepare":
        prepare(given.table, given.scale, given.only, given.data, given.out)
    else:
        print("finished" if run(given.parts, given) else "not finished", flush=True)


if __name__ == "__main__":
    main()
