"""What keeping the calls of blocks saves while cutting, and what a forecast is worth.

    python benchmarks/cutting.py --task sst2 --teacher TEACHER --data DIR [--share 0.02]

Cuts the same plan twice, with and without the kept calls, and compares bits and seconds.
"""

import argparse
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from records import cell, identity
from rmtkd import compression, cutting, recipes
from rmtkd.cutting import cut_in_order
from rmtkd.sites import find_sites

RESULTS = Path(__file__).parent / "results" / "cutting"


def cutting_cell(task_name: str, teacher: str, data: Path, share: float) -> dict[str, Any]:
    """Seconds of both ways, and whether they give the same model."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    rows = task.rows(data, source, 0)
    calibration = list(compression.share_of(rows.train, share))
    example = task.example(source.model, rows)
    plan, _ = compression.plan(source.model, calibration=calibration, example=example, target="25%params")
    sites = find_sites(source.model)
    seconds, models = {}, {}
    for way, follow in (("kept calls", cutting.follow_each_other), ("whole passes", lambda *_: False)):
        with mock.patch.object(cutting, "follow_each_other", follow):
            start = time.perf_counter()
            models[way], _ = cut_in_order(source.model, sites, plan.widths, calibration)
            seconds[way] = time.perf_counter() - start
    one, other = (dict(model.named_parameters()) for model in models.values())
    return {
        "task": task_name,
        "batches": len(calibration),
        "seconds_by_way": seconds,
        "ratio": seconds["whole passes"] / seconds["kept calls"],
        "same_bits": all(torch.equal(value, other[name]) for name, value in one.items()),
    }


def main() -> None:
    """Run the cell and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--share", type=float, default=0.02)
    chosen = parser.parse_args()
    record = cell(
        RESULTS / f"{chosen.task}.json",
        lambda: cutting_cell(chosen.task, chosen.teacher, chosen.data, chosen.share),
        teacher_id=identity(recipes.get(chosen.task).load(chosen.teacher).model),
    )
    print(record)


if __name__ == "__main__":
    main()
