"""Other ways to a smaller BERT on the same rows, from the same teacher, with as many steps, at as many parameters.

    rmtkd bench peers --scale tiny                                      # digits; a test
    rmtkd bench peers --scale cpu --task sst2 --teacher TEACHER --data DIR
    rmtkd bench peers --table

| name | start | taught | source |
|---|---|---|---|
| distilbert | every second layer | labels, answers, cosine of the last hidden states | arXiv 1910.01108 |
| pkd | the first half of the layers | labels, answers, normalised [CLS] states, β = 100 | arXiv 1908.09355 |
| theseus | the first half of the layers | labels, in the place of two layers of the teacher each | arXiv 2002.02925 |
| random | every second layer's shape, Xavier | labels and answers | |
| magnitude | largest weights, the same share of each width | labels and answers | |
| energy | as many directions as hold the same share of the variance | labels and answers | |
| rmtkd | widths by measured loss, three embedding levels | labels and answers | arXiv 2509.15724 |

The first four have half of the layers; the others have as many parameters as these, or fewer. *distilbert* has no
pretraining of its own, which its source has: only its start and losses are compared. *theseus* replaces with a
probability that rises from a half to one over two thirds of the steps, the rest trains the successor alone;
embedding and head stay the teacher's until then; it begins as in its source's code (`run_glue.py`). Learning rate: for
each the best of two on selection rows.

Checked by tests: halving keeps the teacher's layers bit for bit; at probability one Theseus computes what its successor
computes, and at zero what the teacher does; the losses of hidden states are zero for the teacher's own.
"""

import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curve import Work, energy, guarded, magnitude
from records import arguments, at_best_rate, cell, percent, print_event, publish, spread
from rmtkd.distillation import Recovery, Teacher
from rmtkd.environment import precision_on
from rmtkd.measurement import accuracy, count_parameters
from rmtkd.modules import randomize
from rmtkd.training import Phase

RESULTS = Path(__file__).parent / "results" / "peers"
LAYERS = "bert.encoder.layer"
LEARNING_RATES = (2e-4, 5e-4)
PATIENCE = 100.0
REPLACED = 0.5, 2 / 3
"""The probability that Theseus begins with, and the share of the steps over which it rises to one."""


def halved(teacher: nn.Module, kept: Sequence[int]) -> nn.Module:
    """A copy of a BERT with these of its layers."""
    student: Any = copy.deepcopy(teacher)
    layers = student.get_submodule(LAYERS)
    student.set_submodule(LAYERS, nn.ModuleList([layers[i] for i in kept]))
    student.config.num_hidden_layers = len(kept)
    return student


def depth_of(model: nn.Module) -> int:
    """The number of layers."""
    return len(model.get_submodule(LAYERS))  # type: ignore[arg-type]


def every_second(model: nn.Module) -> list[int]:
    """Numbers of half of the layers, the first and every second after it."""
    return list(range(0, depth_of(model), 2))


class HiddenPhase(Phase):
    """A phase with one more loss, of hidden states after some layers of both.

    Args:
        mine, theirs: numbers of the layers whose outputs are compared, of the student and of the teacher.
        extra: the loss, of these outputs and of which positions are real.
        phase: see `Phase`.
    """

    def __init__(self, *phase: Any, mine: Sequence[int], theirs: Sequence[int], extra: Any, **options: Any):
        super().__init__(*phase, **options)
        self.extra = extra
        self.mine, self.theirs = (tuple(f"{LAYERS}.{i}" for i in numbers) for numbers in (mine, theirs))

    def with_hidden(self, known: Tensor, mine: list[Tensor], theirs: list[Tensor], mask: Tensor | None) -> Tensor:
        return known + self.extra([h.float() for h in mine], [h.float() for h in theirs], mask)


def cosine(mine: Sequence[Tensor], theirs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """One minus the cosine of the last hidden states, over real positions."""
    difference = 1 - functional.cosine_similarity(mine[-1], theirs[-1], dim=-1)
    return difference.mean() if mask is None else difference[mask].mean()


def patience(mine: Sequence[Tensor], theirs: Sequence[Tensor], _: Tensor | None) -> Tensor:
    """Mean squared difference of the normalised first states, over rows, layers and dimensions, times β: as in the
    published code, to whose mean this β belongs (equation 7 of the paper has a sum)."""
    pairs = [[functional.normalize(h[:, 0], dim=-1) for h in pair] for pair in zip(mine, theirs, strict=True)]
    return PATIENCE * torch.stack([(a - b).square().mean() for a, b in pairs]).mean()


class Theseus(nn.Module):
    """A teacher of which every two layers may be replaced by one; called with images of neither, it is a classifier.

    Attributes:
        probability: of each successor, for each batch, to stand in the place of its two layers.
    """

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.whole: Any = copy.deepcopy(teacher)
        self.successors = nn.ModuleList([copy.deepcopy(self.layers[i]) for i in range(len(every_second(teacher)))])
        self.probability = 1.0
        for parameter in self.whole.parameters():
            parameter.requires_grad_(False)

    @property
    def layers(self) -> Any:
        """The teacher's."""
        return self.whole.get_submodule(LAYERS)

    def forward(self, **batch: Tensor) -> Any:
        """The answer with some pairs of layers replaced."""
        layers, count = list(self.layers), len(self.successors)
        replaced = (
            torch.rand(count) < self.probability if self.training else torch.tensor([self.probability >= 1] * count)
        )
        if self.training and not replaced.any():
            replaced[int(torch.randint(count, ()))] = True  # with none there is nothing to learn from the batch
        chosen: list[nn.Module] = []
        for i, successor in enumerate(self.successors):
            chosen += [successor] if replaced[i] else layers[2 * i : 2 * i + 2]
        self.whole.set_submodule(LAYERS, nn.ModuleList(chosen))
        try:
            return self.whole(**batch)
        finally:
            self.whole.set_submodule(LAYERS, nn.ModuleList(layers))

    def successor(self) -> nn.Module:
        """The smaller model by itself."""
        student: Any = copy.deepcopy(self.whole)
        student.set_submodule(LAYERS, copy.deepcopy(self.successors))
        student.config.num_hidden_layers = len(self.successors)
        for parameter in student.parameters():
            parameter.requires_grad_(True)
        return student


Peer = Callable[[Any, int, Recovery], nn.Module]
"""From the work, the number of steps and the recovery to a trained student."""


def options_of(work: Work, steps: int, recovery: Recovery) -> dict[str, Any]:
    """What all phases share."""
    return {"steps": steps, "recovery": recovery, "precision": precision_on(work.device)}


def distilbert(work: Work, steps: int, recovery: Recovery) -> nn.Module:
    """Layer halving with distillation."""
    student = halved(work.model, every_second(work.model))
    ends = {"mine": [depth_of(student) - 1], "theirs": [depth_of(work.model) - 1], "extra": cosine}
    phase = options_of(work, steps, recovery)
    HiddenPhase(student, work.rows.train, teacher=Teacher(work.model), **ends, **phase).run(told)
    return student


def pkd(work: Work, steps: int, recovery: Recovery) -> nn.Module:
    """Patient knowledge distillation, "skip": each layer but the last is held to every second of the teacher."""
    count = len(every_second(work.model))
    student = halved(work.model, range(count))
    mine = range(max(1, count - 1))
    ends = {"mine": list(mine), "theirs": [min(2 * i + 1, depth_of(work.model) - 1) for i in mine], "extra": patience}
    phase = options_of(work, steps, recovery)
    HiddenPhase(student, work.rows.train, teacher=Teacher(work.model), **ends, **phase).run(told)
    return student


def theseus(work: Work, steps: int, recovery: Recovery) -> nn.Module:
    """Module replacing, then the successor alone. Labels only."""
    ship, (first, share) = Theseus(work.model), REPLACED
    rising = round(share * steps)

    def between(phase: Phase) -> None:
        ship.probability = first + (1 - first) * len(phase.losses) / max(1, rising)
        told(phase)

    ship.probability = first
    successors = replace(recovery, alpha=1.0)
    phase = SuccessorPhase(ship, work.rows.train, **options_of(work, rising, successors))
    phase.run(between)
    student = ship.successor()
    Phase(student, work.rows.train, first_epoch=1, **options_of(work, steps - rising, successors)).run(told)
    return student


class SuccessorPhase(Phase):
    """A phase in which only the successors of a `Theseus` learn."""

    def __init__(self, ship: Theseus, *phase: Any, **options: Any):
        super().__init__(ship, *phase, **options)
        own = {id(parameter) for parameter in ship.successors.parameters()}
        self.trained = {name: p for name, p in self.trained.items() if id(p) in own}


def from_shape(work: Work, steps: int, recovery: Recovery) -> nn.Module:
    """The halved shape from a random start."""
    student = halved(work.model, every_second(work.model))
    randomize(student, seed=work.seed)
    return distilled(work, student, steps, recovery)


def cut_by(method: Callable[[Work, float], nn.Module], work: Work, steps: int, recovery: Recovery) -> nn.Module:
    """A cut to as many parameters as the halved model has, and distillation."""
    size = count_parameters(halved(work.model, every_second(work.model))) / count_parameters(work.model)
    return distilled(work, method(work, size), steps, recovery)


def distilled(work: Work, student: nn.Module, steps: int, recovery: Recovery) -> nn.Module:
    """Labels and answers, which are computed once for all."""
    Phase(student, work.rows.train, teacher=work.taught(), **options_of(work, steps, recovery)).run(told)
    return student


def told(phase: Phase) -> None:
    """Every 200th step."""
    print_event({"event": "step", "step": len(phase.losses), "loss": phase.losses[-1]})


PEERS: Mapping[str, Peer] = {
    "distilbert": distilbert,
    "pkd": pkd,
    "theseus": theseus,
    "random": from_shape,
    "magnitude": partial(cut_by, magnitude),
    "energy": partial(cut_by, energy),
    "rmtkd": partial(cut_by, guarded),
}


def run(work: Work, peer: str, lr: float, epochs: float, scale: str) -> dict[str, Any]:
    """One cell."""
    where = "" if scale == "tiny" else f" --task {work.task} --teacher TEACHER" + (" --data DIR" if work.data else "")
    how = f"--peers {peer} --epochs {epochs:g} --seeds {work.seed} --device {work.device}"
    torch.manual_seed(work.seed)
    steps = round(epochs * len(work.rows.train))
    student = PEERS[peer](work, steps, Recovery(lr=lr))
    return {
        "peer": peer,
        "command": f"rmtkd bench peers --scale {scale}{where} {how}",
        "task": work.task,
        "seed": work.seed,
        "lr": lr,
        "epochs": epochs,
        "steps": steps,
        "parameters": count_parameters(student),
        "baseline_parameters": count_parameters(work.model),
        "teacher": asdict(accuracy(work.model, work.rows.report)),
        "accuracy_selection": asdict(accuracy(student, work.rows.selection)),
        "accuracy": asdict(accuracy(student, work.rows.report)),
    }


def table(results: Path) -> str:
    """The records as Markdown: of every peer the learning rate that is best on selection rows."""
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    lines = [
        "| task | teacher | peer | seeds | parameters | lr | report | against teacher | selection |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for task, teacher in dict.fromkeys((r["task"], r["teacher_id"]) for r in found):
        for peer in PEERS:
            cells = at_best_rate([r for r in found if (r["task"], r["teacher_id"], r["peer"]) == (task, teacher, peer)])
            if cells:
                share = statistics.mean(r["parameters"] / r["baseline_parameters"] for r in cells)
                reached = percent(cells, "accuracy")
                against = statistics.mean(reached) - _mean(cells, "teacher")
                selection = _mean(cells, "accuracy_selection")
                facts = f"{len(cells)} | {share:.1%} | {cells[0]['lr']:g} | {spread(reached)} | {against:+.2f}"
                of = f"{cells[0]['baseline_parameters'] / 1e6:.1f} M, {_mean(cells, 'teacher'):.2f}"
                lines.append(f"| {task} | {of} | {peer} | {facts} | {selection:.2f} |")
    return "\n".join(lines) if found else ""


def _mean(cells: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.mean(percent(cells, key))


def main() -> None:
    """Run cells, and write the table."""
    parser = arguments("peers", __doc__)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--teacher", help="A trained BERT; at the smallest scale one is trained.")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    results, is_tiny = given.results or RESULTS, given.scale == "tiny"
    task, teacher = ("digits", given.cache / "teacher") if is_tiny else (given.task, given.teacher)
    if is_tiny and not given.table and not teacher.exists():
        from rmtkd import recipes
        from rmtkd.teaching import train_teacher

        train_teacher(recipes.get("digits"), out=teacher, epochs=3.0)
    for seed in () if given.table else given.seeds or ([0] if is_tiny else [0, 1, 2]):
        places = {"data": given.data, "cache": given.cache, "device": given.device}
        work = Work(task=task, teacher=str(teacher), seed=seed, **places)
        for peer in given.peers:
            for lr in (1e-3,) if is_tiny else LEARNING_RATES:
                epochs = given.epochs or (0.25 if is_tiny else 1.0)
                named = f"{given.scale}-{task}-{work.teacher_id}-{peer}-{lr:g}-{epochs:g}epochs-seed{seed}"
                one = partial(run, work, peer, lr, epochs, given.scale)
                cell(results / f"{named}.json", one, teacher_id=work.teacher_id)
    publish("peers", table(results), given.results)


if __name__ == "__main__":
    main()
