"""Distillation peers: what a student that starts from nothing is taught beside the teacher's answers.

| name | taught | source |
|---|---|---|
| student | nothing else | Hinton, Vinyals, Dean, arXiv 1503.02531 |
| attention | where the energy of each stage's output lies | Zagoruyko, Komodakis, arXiv 1612.03928, eq. 2, β = 1000 |
| fitnets | the middle stage's output, through a learned 1 × 1 map | Romero et al., arXiv 1412.6550, eq. 3 |
| contrastive | which of many images the last stage's output belongs to | Tian, Krishnan, Isola, arXiv 1910.10699 |

*fitnets* has its two stages: the first third of the steps learns the hint alone. *contrastive* has 128 dimensions and
temperature 0.07 as published; its negatives are the last 4,096 images of a queue instead of 16,384 of a memory bank,
and it takes the softmax over them (InfoNCE) in place of a binary decision for each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.distillation import outputs_of
from rmtkd.training import Phase


class Attention(nn.Module):
    """Attention transfer."""

    weight, alone = 1000.0, 0.0

    def __init__(self, students: Sequence[Tensor], teachers: Sequence[Tensor]):
        super().__init__()

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Half the sum over stages of the mean squared difference of the normalised maps of energy: the mean over
        positions is the published code's, to which this β belongs; equation 2 has a norm."""
        pairs = zip(map(_energy, students), map(_energy, teachers), strict=True)
        return torch.stack([(student - teacher).square().mean() for student, teacher in pairs]).sum() / 2


def _energy(stage: Tensor) -> Tensor:
    return functional.normalize(stage.square().mean(1).flatten(1))


class FitNets(nn.Module):
    """The hint of the middle stage."""

    weight, alone = 1.0, 1 / 3

    def __init__(self, students: Sequence[Tensor], teachers: Sequence[Tensor]):
        super().__init__()
        self.middle = len(students) // 2
        self.regressor = nn.Conv2d(students[self.middle].shape[1], teachers[self.middle].shape[1], 1)

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Half the mean squared distance of the regressed output from the teacher's."""
        return (self.regressor(students[self.middle]) - teachers[self.middle]).square().mean() / 2


class Contrastive(nn.Module):
    """Contrastive representation distillation."""

    weight, alone = 0.8, 0.0
    queue: Tensor

    def __init__(self, students: Sequence[Tensor], teachers: Sequence[Tensor], *, width: int = 128, images: int = 4096):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(stages[-1].shape[1], width) for stages in (students, teachers))
        self.temperature = 0.07
        self.register_buffer("queue", functional.normalize(torch.randn(2, images, width), dim=-1))

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Cross-entropy of finding each image's own embedding by the other network, both ways."""
        mine, theirs = (
            functional.normalize(head(stages[-1].mean((2, 3))), dim=-1)
            for head, stages in zip(self.heads, (students, teachers), strict=True)
        )
        losses = []
        for here, there, past in ((mine, theirs, self.queue[1]), (theirs, mine, self.queue[0])):
            scores = here @ torch.cat([there, past.to(there)]).mT / self.temperature
            losses.append(functional.cross_entropy(scores, torch.arange(len(here), device=here.device)))
        new = torch.stack([mine, theirs]).detach().float()
        self.queue = torch.cat([new, self.queue], 1)[:, : self.queue.shape[1]]
        return torch.stack(losses).sum()


HINTS: Mapping[str, Callable[..., Any] | None] = {
    "student": None,
    "attention": Attention,
    "fitnets": FitNets,
    "contrastive": Contrastive,
}


class Taught(nn.Module):
    """A student and what its hint has to learn, trained together; called, the student alone."""

    def __init__(self, student: nn.Module, teacher: nn.Module, stages: Sequence[str], hint: str, batch: Batch):
        super().__init__()
        self.student = student
        made = HINTS[hint]
        self.hint = None if made is None else made(*(_stages_of(model, stages, batch) for model in (student, teacher)))

    def forward(self, **batch: Tensor) -> Any:
        """The student's answer."""
        return self.student(**batch)


@torch.no_grad()
def _stages_of(model: nn.Module, stages: Sequence[str], batch: Batch) -> list[Tensor]:
    with outputs_of(model.eval(), stages) as seen:
        batching.logits(model, batch)
    return list(seen.values())


class TaughtPhase(Phase):
    """A phase with the loss of a hint beside the answers. The student is a `Taught`.

    Args:
        stages: paths of the modules whose outputs are compared.
        phase: see `Phase`.
    """

    def __init__(self, student: Taught, *phase: Any, stages: Sequence[str], **options: Any):
        super().__init__(student, *phase, **options)
        self.hint, self.mine, self.theirs = student.hint, tuple(f"student.{path}" for path in stages), tuple(stages)

    def with_hidden(self, known: Tensor, mine: list[Tensor], theirs: list[Tensor], mask: Tensor | None) -> Tensor:
        assert self.hint is not None
        extra = self.hint.weight * self.hint([s.float() for s in mine], [t.float() for t in theirs])
        if len(self.losses) < self.hint.alone * self.steps:
            return extra
        return known + (0.0 if self.hint.alone else extra)
