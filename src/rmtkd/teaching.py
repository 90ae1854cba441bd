"""Training a teacher by a recipe."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkd import batches as batching
from rmtkd.checkpoint import write_atomically
from rmtkd.distillation import train
from rmtkd.environment import versions
from rmtkd.errors import RunError
from rmtkd.measurement import accuracy, count_parameters, is_bf16_faster
from rmtkd.progress import Emitter, Listener
from rmtkd.recipes.recipe import Recipe


class WeightAverage:
    """Exponential moving average of a model's parameters."""

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay, self.count = decay, 0
        self.current = [parameter.detach() for parameter in model.parameters()]
        self.average = [parameter.clone() for parameter in self.current]

    def update(self) -> None:
        """Take in the current parameters. The first updates weigh more, so that the start is forgotten."""
        self.count += 1
        weight = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.average, self.current, weight)

    def apply(self) -> None:
        """Give the model its averaged parameters."""
        torch._foreach_copy_(self.current, self.average)


def train_teacher(
    recipe: Recipe,
    *,
    out: Path,
    model: str | None = None,
    data: Path | None = None,
    epochs: float | None = None,
    lr: float | None = None,
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
        seed: of the head's start, the order of rows and dropout.
        device: where to train.
        on_event: called with every event.

    Returns:
        What `training.json` holds.

    Raises:
        RunError: if `out` exists.
    """
    if out.exists():
        raise RunError(f"--out must be new. {out} exists. Choose another name or remove it.")
    source = recipe.start(model, seed)
    student = source.model.to(device)
    rows = recipe.rows(data, source.tokenizer, seed)
    emit = Emitter([on_event] if on_event else [])
    recovery = recipe.training if lr is None else replace(recipe.training, lr=lr)
    steps = round((recipe.epochs if epochs is None else epochs) * len(rows.train))
    bf16 = is_bf16_faster(student, batching.to(batching.first(rows.train, "train"), device))
    average = WeightAverage(student) if recipe.average else None

    def on_step(step: int, loss: float) -> None:
        if average:
            average.update()
        emit("step", step=step, steps=steps, loss=loss)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train(
            student,
            rows.train,
            steps=steps,
            recovery=recovery,
            precision="bf16" if bf16 else "fp32",
            on_step=on_step,
        )
    if average and steps:
        average.apply()
    record = {
        "recipe": recipe.name,
        "start": model,
        "parameters": count_parameters(student),
        "accuracy": asdict(accuracy(student, rows.report)),
        "accuracy_selection": asdict(accuracy(student, rows.selection)),
        "steps": steps,
        "seed": seed,
        "training": asdict(recovery),
        "precision": "bf16" if bf16 else "fp32",
        "versions": versions(),
    }
    student.save_pretrained(out)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(out)
    write_atomically(out / "training.json", (json.dumps(record, indent=1) + "\n").encode())
    return record
