"""A small run, whole and killed twenty times at random moments; prints the checksums of both models as JSON.

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
from rmtkd.run import tensors_of

KILLS = 20


def session(out: Path, sessions: int) -> None:
    """Start the run, or go on with it."""
    torch.set_num_threads(1)
    model, parts = tiny_bert(layers=3), {"train": 160, "selection": 96}
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
        multiple_of=2,
        granularity="site",
        epochs=6.0,
        save_every_s=0.0,
        control=True,
        recovery=Recovery(average=0.9),
    )


def fork(out: Path, sessions: int, seconds: float | None) -> bool:
    """One session, killed after so many seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            session(out, sessions)
        finally:
            os._exit(0 if (out / "summary.json").exists() else 1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status == 0


def main(folder: Path) -> None:
    """Run both."""
    began = time.monotonic()
    assert fork(folder / "whole", 0, None)
    seconds = time.monotonic() - began
    random.seed(0)
    kills = sessions = 0
    while kills < KILLS:
        # Mostly short, so that twenty of them do not come to the end; some as long as a tenth of the run.
        if fork(folder / "killed", sessions, random.uniform(0.02, 0.1) * seconds + 0.1):
            break
        kills, sessions = kills + 1, sessions + 1
    assert kills == KILLS, f"the run ended after {kills} kills"
    assert fork(folder / "killed", sessions, None)
    sums = {name: checksum(tensors_of(rmtkd.load(folder / name / "model"))) for name in ("whole", "killed")}
    print(json.dumps({"kills": kills, "seconds": seconds, **sums}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
