"""The claims of the benchmark of ResNets: what students are taught is what their sources write, and a start from
nothing is no larger than asked for, and the same whatever was made before it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmtkd.distillation import Recovery, Teacher
from rmtkd.measurement import count_flops, count_parameters
from rmtkd.recipes.cifar import small_network


@pytest.fixture
def hints(benchmark: Any) -> Any:
    return benchmark("hints")


@pytest.fixture
def vision(benchmark: Any) -> Any:
    return benchmark("vision")


def stages(widths: tuple[int, ...], rows: int = 3) -> list[Tensor]:
    """Outputs of two stages, 4 × 4 and 2 × 2."""
    return [torch.randn(rows, width, size, size) for width, size in zip(widths, (4, 2), strict=True)]


def test_attention_transfer_compares_normalised_maps_of_energy(hints: Any) -> None:
    torch.manual_seed(0)
    mine, theirs = stages((2, 3)), stages((4, 6))
    total = 0.0
    for a, b in zip(mine, theirs, strict=True):
        differences = []
        for row in range(len(a)):
            energies = []
            for stage in (a, b):
                energy = sum((stage[row, channel] ** 2 for channel in range(stage.shape[1])), torch.zeros(()))
                energies.append(energy / math.sqrt(float((energy**2).sum())))
            differences.append((energies[0] - energies[1]) ** 2)
        total += float(torch.stack(differences).mean()) / 2
    loss = hints.Attention(mine, theirs)
    assert float(loss(mine, theirs)) == pytest.approx(total, rel=1e-5)
    assert float(loss(mine, [3 * stage for stage in mine])) == pytest.approx(0, abs=1e-12)  # only where it lies counts


@torch.no_grad()
def test_contrast_is_the_cross_entropy_against_the_batch_and_a_queue(hints: Any) -> None:
    torch.manual_seed(0)
    mine, theirs = stages((2, 3)), stages((4, 6))
    loss = hints.Contrastive(mine, theirs, width=5, images=7)
    queue = loss.queue.clone()
    embedded = []
    for head, stage in zip(loss.heads, (mine[-1], theirs[-1]), strict=True):
        means = [stage[row].mean((1, 2)) for row in range(len(stage))]
        rows = [head.weight @ mean + head.bias for mean in means]
        embedded.append([row / row.norm() for row in rows])
    total = 0.0
    for here, there, past in ((embedded[0], embedded[1], queue[1]), (embedded[1], embedded[0], queue[0])):
        for i, row in enumerate(here):
            scores = [math.exp(float(row @ other) / 0.07) for other in [*there, *past]]
            total -= math.log(scores[i] / sum(scores)) / len(here)
    assert float(loss(mine, theirs)) == pytest.approx(total, rel=1e-4)
    new = torch.stack([torch.stack(rows) for rows in embedded])
    torch.testing.assert_close(loss.queue, torch.cat([new, queue[:, :4]], 1))  # the newest first, the oldest are gone


@torch.no_grad()
def test_the_hint_is_half_the_mean_squared_distance_of_the_regressed_middle_stage(hints: Any) -> None:
    torch.manual_seed(0)
    mine, theirs = stages((2, 3)), stages((4, 6))
    loss = hints.FitNets(mine, theirs)
    weight, bias = loss.regressor.weight[:, :, 0, 0], loss.regressor.bias
    regressed = torch.einsum("oc,nchw->nohw", weight, mine[1]) + bias[:, None, None]
    assert float(loss(mine, theirs)) == pytest.approx(float(((regressed - theirs[1]) ** 2).mean()) / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["Attention", "FitNets", "Contrastive"])
def test_a_hint_is_taught_where_the_images_are(hints: Any, name: str) -> None:
    mine, theirs = ([stage.to("meta") for stage in stages(widths)] for widths in ((2, 3), (4, 6)))
    loss = getattr(hints, name)(mine, theirs).to("meta")
    assert loss(mine, theirs).device.type == "meta"


def test_fitnets_train_only_up_to_the_hint_in_their_first_stage(hints: Any) -> None:
    torch.manual_seed(0)
    teacher, student = small_network(8), small_network(8)
    names = ("layer1", "layer2", "layer3")
    rows = [{"pixel_values": torch.randn(8, 3, 32, 32), "labels": torch.arange(8)}]
    taught = hints.Taught(student, teacher, names, "fitnets", rows[0])
    phase = hints.TaughtPhase(
        taught, rows, stages=names, steps=9, recovery=Recovery(lr=1e-2), teacher=Teacher(teacher), first_epoch=0
    )
    known = {name: parameter.detach().clone() for name, parameter in taught.named_parameters()}
    moved: list[set[str]] = []

    def look(_: Any) -> None:
        now = dict(taught.named_parameters())
        moved.append({name.split(".")[1] for name in now if not torch.equal(now[name], known[name])})
        known.update({name: value.detach().clone() for name, value in now.items()})

    phase.run(look)
    early = {"conv1", "bn1", "layer1", "layer2"}
    assert all(step == early | {"regressor"} for step in moved[:3])
    assert all(step == early | {"layer3", "linear"} for step in moved[3:])


class Network:
    """What a start from nothing takes of a `vision.Work`."""

    def __init__(self, vision: Any, over: float = 0.0):
        self.model, self.seed, self.device, self.over = small_network(8), 0, "cpu", over
        self.example = {"pixel_values": torch.randn(2, 3, 32, 32)}
        self.operations, self.sites = count_flops(self.model, self.example), vision.find_sites(self.model)

    def fits(self, model: nn.Module, share: float) -> bool:
        return count_flops(model, self.example) <= (1 + self.over) * share * self.operations


@pytest.mark.parametrize("part", [0.8, 0.3, 0.1])
def test_a_student_from_nothing_has_no_more_parameters_than_asked(
    vision: Any, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = nn.Linear(round(part * count_parameters(small_network(8))), 1, bias=False)
    monkeypatch.setattr(vision, "start", lambda *_: (asked, {}))
    student = vision.student(Network(vision), 0.5, 4)
    assert 0.85 * count_parameters(asked) < count_parameters(student) <= count_parameters(asked)


def test_a_student_from_nothing_is_the_same_whatever_was_made_before_it(
    vision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for draws in (0, 100):  # a cut that was cached draws nothing
        monkeypatch.setattr(vision, "start", lambda *_, draws=draws: (torch.randn(draws), nn.Linear(100, 100), {})[1:])
        torch.manual_seed(draws)
        made.append(vision.student(Network(vision), 0.5, 4))
    for a, b in zip(*(model.parameters() for model in made), strict=True):
        assert torch.equal(a, b)


def test_steps_may_leave_a_little_more_than_asked_where_they_are_told_so(vision: Any) -> None:
    work = Network(vision)
    least = count_flops(vision.magnitude(work, 0.7, 4), work.example) / work.operations
    finer = Network(vision, over=0.1)
    more = count_flops(vision.magnitude(finer, 0.7, 4), finer.example) / finer.operations
    assert least <= 0.7 < more <= 0.77
    assert vision.over_of(0.1, "magnitude") == "-over0.1" and vision.over_of(0.0, "magnitude") == ""
    assert vision.over_of(0.1, "rmtkd") == ""  # which meets any share
