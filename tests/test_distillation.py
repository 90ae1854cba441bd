"""The loss equals its formula; one phase of training changes the student, and nothing else."""

import copy
import itertools
import math

import pytest
import torch

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.distillation import Recovery, distillation_loss
from rmtkd.errors import DataError
from rmtkd.training import Phase, learning_rate_factor, train


def scores(seed: int) -> torch.Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_equals_its_formula(temperature: float, alpha: float):
    student, teacher = scores(0), scores(1)
    expected = 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), LABELS.tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in row] for row in (t, s))
        divergence = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        cross_entropy = -math.log(math.exp(s[label]) / sum(map(math.exp, s)))
        expected += (alpha * cross_entropy + (1 - alpha) * temperature**2 * divergence) / len(LABELS)
    got = distillation_loss(student, teacher, LABELS, alpha=alpha, temperature=temperature)
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient():
    teacher = scores(0)
    student = teacher.clone().requires_grad_(True)
    loss = distillation_loss(student, teacher, LABELS, alpha=0.0, temperature=2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-15)
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-15


def test_without_labels_the_divergence_has_full_weight():
    got = distillation_loss(scores(0), scores(1), None, alpha=0.3, temperature=2.0)
    assert torch.equal(got, distillation_loss(scores(0), scores(1), LABELS, alpha=0.0, temperature=2.0))


def test_without_a_teacher_the_cross_entropy_has_full_weight():
    got = distillation_loss(scores(0), None, LABELS, alpha=0.3, temperature=2.0)
    assert torch.equal(got, torch.nn.functional.cross_entropy(scores(0), LABELS))


def test_without_both_there_is_nothing_to_learn():
    with pytest.raises(DataError, match="must have labels where there is no teacher"):
        distillation_loss(scores(0), None, None, alpha=0.3, temperature=2.0)


@pytest.mark.parametrize("steps", [3, 10, 100, 101])
def test_the_learning_rate_rises_then_falls_to_a_tenth(steps: int):
    factors = [learning_rate_factor(step, steps, 0.1) for step in range(steps)]
    peak = factors.index(max(factors))
    assert max(factors) == 1
    assert all(0 < a < b for a, b in itertools.pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(factors[peak:]))
    assert factors[-1] == pytest.approx(0.1)


def test_a_phase_of_one_step_runs_at_the_peak():
    assert learning_rate_factor(0, 1, 0.1) == 1


def test_a_phase_that_only_warms_up_ends_at_the_peak():
    assert [learning_rate_factor(step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_training_changes_the_student_and_not_the_teacher():
    teacher, student = tiny_bert(), tiny_bert(seed=1)
    before, start = snapshot(teacher), snapshot(student)
    losses = train(student, random_rows(), steps=6, teacher=teacher, recovery=Recovery(lr=1e-3))
    assert_untouched(teacher, before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert len(losses) == 6
    assert not student.training
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, start[name])}
    assert moved == {name for name, _ in student.named_parameters()}


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("sgd", 3e-2)])
def test_training_towards_the_teacher_comes_closer_to_it(optimizer: str, lr: float):
    teacher = tiny_bert()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.classifier.weight.mul_(-1)
    recovery = Recovery(alpha=0.0, lr=lr, optimizer=optimizer)
    losses = train(student, random_rows(), steps=40, teacher=teacher, recovery=recovery)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_frozen_embeddings_stay_and_flags_come_back():
    student = tiny_bert()
    tables = {name: value.clone() for name, value in student.named_parameters() if name.endswith("embeddings.weight")}
    assert len(tables) == 3
    student.classifier.bias.requires_grad_(False)
    train(student, random_rows(), steps=2, recovery=Recovery(freeze_embeddings=True))
    for name, value in tables.items():
        assert torch.equal(student.get_parameter(name), value)
    assert not student.classifier.bias.requires_grad
    assert all(value.requires_grad for name, value in student.named_parameters() if name != "classifier.bias")


def test_flags_come_back_also_when_training_fails():
    student = tiny_bert()
    student.classifier.bias.requires_grad_(False)
    with pytest.raises(DataError):
        train(student, [], steps=2, recovery=Recovery(freeze_embeddings=True))
    assert not student.classifier.bias.requires_grad
    assert student.bert.embeddings.word_embeddings.weight.requires_grad
    assert not student.training


def test_the_same_seed_gives_the_same_bits_twice():
    def run(seed: int) -> torch.nn.Module:
        teacher, student = tiny_bert(), tiny_bert(seed=1)
        torch.manual_seed(seed)  # of dropout
        train(student, random_rows(shuffle=True), steps=5, teacher=teacher, recovery=Recovery(lr=1e-3))
        return student

    assert_untouched(run(1), snapshot(run(1)))
    assert not torch.equal(run(1).get_parameter("classifier.weight"), run(2).get_parameter("classifier.weight"))


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_training_takes_as_many_steps_as_asked_over_passes_in_new_orders(steps: int):
    rows = random_rows(64, batch_size=16, shuffle=True)
    seen, epochs = [], []
    set_epoch = rows.set_epoch
    rows.set_epoch = lambda epoch: (epochs.append(epoch), set_epoch(epoch))[1]
    phase = Phase(tiny_bert(), rows, steps=steps, first_epoch=5, recovery=Recovery())
    losses = phase.run(lambda phase: seen.append((len(phase.losses), phase.losses[-1])))
    assert seen == list(enumerate(losses, 1))
    assert len(losses) == steps
    assert epochs == list(range(5, 5 + -(-steps // 4)))


def test_a_loss_that_is_not_finite_ends_training_before_it_spoils_the_student():
    student = tiny_bert()
    with torch.no_grad():
        student.classifier.bias.fill_(float("nan"))
    start = snapshot(student)
    with pytest.raises(DataError, match=r"the loss must stay finite\. It became nan at step 1"):
        train(student, random_rows(), steps=3, recovery=Recovery())
    for name, value in snapshot(student).items():
        assert torch.equal(value, start[name]) or name == "classifier.bias"


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_labels_outside_the_head_are_refused(label: int):
    rows = random_rows()
    rows.labels[7] = label
    with pytest.raises(DataError, match=r"training labels must be within 0\.\.2"):
        train(tiny_bert(), rows, steps=4, recovery=Recovery())


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="at least one batch"):
        train(tiny_bert(), random_rows(0), steps=1, recovery=Recovery())
