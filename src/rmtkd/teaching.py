"""Training a teacher by a recipe."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rmtkd.checkpoint import RunFolder, new_folder, write_json
from rmtkd.environment import check_device, has_bf16, versions
from rmtkd.errors import OptionError, RunError, check_choice
from rmtkd.measurement import count_parameters, quality
from rmtkd.progress import Emitter, Listener
from rmtkd.recipes.checkpoints import save_classifier
from rmtkd.recipes.recipe import Recipe
from rmtkd.training import PRECISIONS, Phase


def train_teacher(
    recipe: Recipe,
    *,
    out: Path,
    model: str | None = None,
    data: Path | None = None,
    epochs: float | None = None,
    lr: float | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    seed: int = 0,
    device: str = "cpu",
    on_event: Listener | None = None,
) -> dict[str, Any]:
    """Train a teacher on the recipe's training rows and write it as a transformers folder.

    Args:
        recipe: the task.
        out: folder for the model, its tokenizer and `training.json`; must be new.
        model: path or hub name to start from, where the recipe needs one.
        data: folder of parquet files.
        epochs: passes over the training rows.
        lr: peak learning rate.
        precision: of training; `auto` is bf16 where this machine has instructions for it.
        seed: of the head's start, the order of rows and dropout.
        device: where to train.
        on_event: called with every event.

    Returns:
        What `training.json` holds.

    Raises:
        RunError: if `out` exists or cannot be written.
        OptionError: if an option has a value that it cannot have.
        DataError: if rows or checkpoint cannot be used.
    """
    check_new(out)
    check_device(device)
    epochs = recipe.epochs if epochs is None else epochs
    if not (0 <= epochs < math.inf and seed >= 0):
        raise OptionError(f"epochs and seed must be at least 0. Got {epochs:g} and {seed}.")
    check_choice("precision", precision, PRECISIONS)
    recovery = recipe.training if lr is None else replace(recipe.training, lr=lr)
    source = recipe.start(model, seed, data)
    student = source.model.to(device)
    rows = recipe.rows(data, source, seed)
    emit = Emitter([on_event] if on_event else [])
    emit("rows", note=rows.note)
    steps = round(epochs * len(rows.train))
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        phase = Phase(student, rows.train, steps=steps, recovery=recovery, precision=precision)
        phase.run(lambda p: emit("step", step=len(p.losses), steps=steps, loss=p.losses[-1]))
    record = {
        "recipe": recipe.name,
        "start": Path(model).name if model and Path(model).exists() else model,
        "parameters": count_parameters(student),
        "classes": len(source.labels),
        "rows": rows.note,
        **{name: asdict(estimate) for name, estimate in quality(student, rows.report).items()},
        **{f"{name}_selection": asdict(estimate) for name, estimate in quality(student, rows.selection).items()},
        "steps": steps,
        "seed": seed,
        "training": asdict(recovery),
        "precision": precision,
        "versions": versions(),
    }
    with new_folder(out) as partial:
        save_classifier(source, partial)
        write_json(partial / "training.json", record)
    return record


def check_new(out: Path) -> None:
    """Raise `RunError` if the folder exists or cannot be made."""
    if out.exists() or out.is_symlink():
        raise RunError(f"--out must be new. {out} exists. Choose another name or remove it.")
    RunFolder.check_free(out)
