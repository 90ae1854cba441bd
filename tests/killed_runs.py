"""A small run, whole, and killed twenty times at random moments; prints the checksums of the models as JSON.

Each session is a forked process, so that the twenty need not import everything anew. Nothing is computed before the
fork: threads would not survive it.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import rmtkd
from conftest import random_rows, tiny_bert
from rmtkd.checkpoint import checksum
from rmtkd.distillation import Recovery
from rmtkd.storage import tensors_of

KILLS = 20


def session(out: Path) -> None:
    """Start the run, or go on with it."""
    torch.set_num_threads(1)
    model, parts = tiny_bert(), {"train": 160, "selection": 96}
    rows: dict[str, Any] = {}
    for i, (name, count) in enumerate(parts.items()):
        rows[name] = random_rows(count, seed=i, shuffle=name == "train")
        rows[name].labels = None
    if (out / "config.json").exists():
        rmtkd.resume(out, model, **rows)
        return
    rmtkd.compress(
        model,
        **rows,
        out=out,
        target="70%params",
        policy="paper",
        multiple_of=2,
        granularity="site",
        epochs=4.0,
        save_every_s=0.0,
        control=True,
        recovery=Recovery(average=0.9),
    )


def fork(out: Path, seconds: float | None) -> bool:
    """One session, killed after so many seconds; whether the run came to its end."""
    child = os.fork()
    if child == 0:
        try:
            session(out)
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return (out / "summary.json").exists()


def main(folder: Path) -> None:
    """Run one whole, and others that are killed, until twenty sessions were."""
    began = time.monotonic()
    assert fork(folder / "whole", None)
    seconds = time.monotonic() - began
    random.seed(0)
    kills, runs = 0, 1
    while kills < KILLS:
        if fork(folder / f"killed-{runs}", random.uniform(0.02, 0.12) * seconds + 0.1):
            runs += 1
        else:
            kills += 1
    assert fork(folder / f"killed-{runs}", None)
    names = ["whole", *(f"killed-{i + 1}" for i in range(runs))]
    sums = {name: checksum(tensors_of(rmtkd.load(folder / name / "model"))) for name in names}
    print(json.dumps({"kills": kills, "seconds": seconds, "models": sums}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
