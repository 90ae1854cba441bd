"""A phase of training: what it learns from, what it ends with, and that it goes on where it was left."""

import copy
from typing import Any

import pytest
import torch

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.distillation import Recovery, Teacher, WeightAverage, hidden_loss, outputs_of
from rmtkd.errors import OptionError
from rmtkd.training import Phase, PhaseState

BLOCKS = ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def phase(student: torch.nn.Module, teacher: torch.nn.Module | None = None, **given) -> Phase:
    options = {"steps": 9, "recovery": Recovery(lr=1e-3, hidden=0.5, average=0.8), "blocks": BLOCKS, **given}
    cache = options["recovery"].cache_teacher
    return Phase(
        student,
        random_rows(64, shuffle=True),
        teacher=None if teacher is None else Teacher(teacher, cache=cache),
        **options,
    )


@pytest.mark.parametrize(("hidden", "optimizer"), [(0.0, "adamw"), (0.5, "adamw"), (0.0, "sgd")])
@pytest.mark.parametrize("left_at", [1, 4, 6, 8])
def test_a_phase_goes_on_where_it_was_left(left_at: int, hidden: float, optimizer: str):
    recovery = Recovery(lr=1e-3, hidden=hidden, average=0.8, optimizer=optimizer)
    teacher, start = tiny_bert(), tiny_bert(seed=1)
    torch.manual_seed(3)
    whole = copy.deepcopy(start)
    losses = phase(whole, teacher, recovery=recovery).run()

    class Left(Exception):
        pass

    kept = []

    def leave(running: Phase) -> None:
        if len(running.losses) == left_at:
            state = running.state()
            kept.append(PhaseState(tensors={k: v.clone() for k, v in state.tensors.items()}, facts=state.facts))
            raise Left

    torch.manual_seed(3)
    with pytest.raises(Left):
        phase(copy.deepcopy(start), teacher, recovery=recovery).run(leave)
    torch.manual_seed(99)  # another session draws other numbers before it goes on
    again = copy.deepcopy(start)
    second = phase(again, teacher, recovery=recovery)
    second.restore(kept[0])
    assert second.run() == losses
    assert_untouched(again, snapshot(whole))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_phase_of_channels_last_goes_on_from_a_file_which_knows_one_order(optimizer: str):
    recovery = Recovery(lr=1e-2, optimizer=optimizer, average=0.8)
    torch.manual_seed(0)
    rows = [(torch.randn(8, 8, 6, 6), torch.randint(0, 4, (8,))) for _ in range(4)]
    start: Any = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    start.to(memory_format=torch.channels_last)
    whole, again = copy.deepcopy(start), copy.deepcopy(start)
    losses = Phase(whole, rows, steps=6, recovery=recovery).run()
    kept = []

    def keep(running: Phase) -> None:
        if len(running.losses) == 3:
            state = running.state()
            tensors = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in state.tensors.items()}
            kept.append(
                PhaseState(tensors={k: v.copy_(state.tensors[k]) for k, v in tensors.items()}, facts=state.facts)
            )

    Phase(copy.deepcopy(start), rows, steps=6, recovery=recovery).run(keep)
    second = Phase(again, rows, steps=6, recovery=recovery)
    second.restore(kept[0])
    assert second.run() == losses
    assert_untouched(again, snapshot(whole))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_frozen_is_left_alone_and_a_phase_that_was_left_agrees(optimizer: str):
    recovery = Recovery(lr=1e-3, average=0.8, optimizer=optimizer)
    start = tiny_bert(seed=1)
    start.bert.embeddings.requires_grad_(False)
    start.bert.encoder.layer[0].requires_grad_(False)
    frozen = {name: p.clone() for name, p in start.named_parameters() if not p.requires_grad}
    students, kept = [copy.deepcopy(start) for _ in range(2)], []

    def keep(running: Phase) -> None:
        if len(running.losses) == 4:
            state = running.state()
            kept.append(PhaseState(tensors={k: v.clone() for k, v in state.tensors.items()}, facts=state.facts))

    torch.manual_seed(3)
    losses = phase(students[0], tiny_bert(), recovery=recovery).run(keep)
    second = phase(students[1], tiny_bert(), recovery=recovery)
    second.restore(kept[0])
    assert second.run() == losses
    for student in students:
        assert_untouched(student, snapshot(students[0]))
        assert all(torch.equal(student.get_parameter(name), value) for name, value in frozen.items())
        assert not torch.equal(student.classifier.weight, start.classifier.weight)
        assert {name for name, value in student.named_parameters() if not value.requires_grad} == set(frozen)


def test_where_all_is_frozen_all_is_trained():
    """A checkpoint for inference is no wish to keep what is cut as it is."""
    students = [tiny_bert(seed=1) for _ in range(2)]
    students[1].requires_grad_(False)
    losses = []
    for student in students:
        torch.manual_seed(0)
        losses.append(phase(student, tiny_bert()).run())
    assert losses[0] == losses[1]
    assert not any(parameter.requires_grad for parameter in students[1].parameters())


def test_a_phase_of_which_nothing_may_be_trained_is_refused():
    student = tiny_bert().requires_grad_(False)
    student.bert.embeddings.word_embeddings.requires_grad_(True)
    with pytest.raises(OptionError, match="at least one parameter must be trained"):
        phase(student, recovery=Recovery(freeze_embeddings=True))


def test_the_hidden_term_is_the_mean_share_of_the_real_positions_that_differs():
    teacher = [torch.tensor([[[3.0, 4.0], [100.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])]
    student = [torch.tensor([[[3.0, 3.0], [0.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])]
    mask = torch.tensor([[True, False]])
    assert float(hidden_loss(student, teacher, mask)) == pytest.approx((1 / 25 + 0) / 2)
    assert float(hidden_loss(student, teacher, None)) == pytest.approx(((1 + 10_000) / 10_025 + 162 / 163) / 2)


def test_the_hidden_term_brings_hidden_states_nearer():
    batch = next(iter(random_rows()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    distances = {}
    for hidden in (0.0, 5.0):
        teacher, student = tiny_bert(), tiny_bert(seed=1)
        torch.manual_seed(0)
        phase(student, teacher, recovery=Recovery(lr=3e-3, hidden=hidden), steps=40).run()
        with torch.no_grad(), outputs_of(teacher, BLOCKS) as theirs, outputs_of(student, BLOCKS) as mine:
            teacher(**inputs)
            student(**inputs)
        distances[hidden] = float(hidden_loss([*mine.values()], [*theirs.values()], batch["attention_mask"].bool()))
    assert distances[5.0] < 0.8 * distances[0.0]


def test_outputs_are_seen_only_within():
    model = tiny_bert()
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    with outputs_of(model, BLOCKS) as seen:
        model(**batch)
        assert [list(state.shape) for state in seen.values()] == [[2, 5, 32]] * 2
    model(**batch)
    assert len(seen) == 2


def test_a_phase_ends_with_the_average_of_its_weights():
    student = tiny_bert()
    averages = []

    def watch(running: Phase) -> None:
        assert running.average is not None
        averages.append({name: value.clone() for name, value in running.average.average.items()})

    running = phase(student, recovery=Recovery(lr=1e-2, average=0.8))
    start = WeightAverage(student, 0.8)
    running.run(watch)
    last = dict(student.named_parameters())
    assert all(torch.equal(value, averages[-1][name]) for name, value in last.items())
    assert any(not torch.equal(value, start.average[name]) for name, value in last.items())


class Counting(torch.nn.Module):
    """Counts the rows that it answers."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inner, self.rows = model, 0

    def forward(self, **inputs: torch.Tensor):
        self.rows += len(inputs["input_ids"])
        return self.inner(**inputs)


def test_a_teacher_answers_every_row_once_and_its_answers_are_kept():
    losses = {}
    for cache in (False, True):
        teacher = Counting(tiny_bert())
        torch.manual_seed(0)
        running = phase(tiny_bert(seed=1), teacher, recovery=Recovery(cache_teacher=cache), steps=12)  # three passes
        losses[cache] = running.run()
        assert teacher.rows == (64 if cache else 3 * 64)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_rows_without_numbers_are_answered_every_time():
    teacher = Counting(tiny_bert())
    batches = [{k: v for k, v in batch.items() if k != "row_ids"} for batch in random_rows(32)]
    Phase(tiny_bert(), batches, steps=4, recovery=Recovery(), teacher=Teacher(teacher, cache=True)).run()
    assert teacher.rows == 64


def test_an_answer_is_that_of_its_row():
    teacher = Teacher(tiny_bert(), cache=True)
    rows = random_rows(64, shuffle=True)
    for batch in rows:
        teacher.logits(batch)
    rows.set_epoch(1)
    for batch in rows:
        with torch.no_grad():
            fresh = teacher.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(teacher.logits(batch), fresh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", [{"hidden": -1.0}, {"average": 1.0}, {"average": -0.1}])
def test_impossible_options_are_refused(option: dict[str, Any]):
    with pytest.raises(OptionError, match=f"{next(iter(option))} must be"):
        Recovery(**option)


def test_a_last_batch_of_one_row_is_trained_on_with_the_statistics_there_are():
    """Norms by batch statistics have none of a single vector: torch refuses it."""
    torch.manual_seed(0)
    norm: Any = torch.nn.BatchNorm1d(8)
    student = torch.nn.Sequential(torch.nn.Linear(6, 8), norm, torch.nn.ReLU(), torch.nn.Linear(8, 3))
    rows = [(torch.randn(n, 6), torch.arange(n) % 3) for n in (8, 1)]
    seen = []

    def look(running: Phase) -> None:
        assert student.training and norm.training
        seen.append(norm.running_mean.clone())

    losses = Phase(student, rows, steps=4, recovery=Recovery(lr=1e-3)).run(look)
    assert len(losses) == 4
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


class Skipping(torch.nn.Module):
    """Leaves out a block now and then, in training."""

    def __init__(self, skips: tuple[int, ...]):
        super().__init__()
        self.blocks, self.skips = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3)), skips
        self.head = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = x if self.training and i in self.skips else x + block(x)
        return self.head(x)


@pytest.mark.parametrize("skips", [(), (1,), (0, 1, 2)])
def test_hidden_states_are_compared_after_the_blocks_that_a_student_runs(skips: tuple[int, ...]):
    torch.manual_seed(0)
    teacher, student = Skipping(()), Skipping(skips)
    rows = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    running = Phase(
        student,
        rows,
        steps=1,
        recovery=Recovery(alpha=0.0, hidden=1.0),
        teacher=Teacher(teacher),
        blocks=[f"blocks.{i}" for i in range(3)],
    )
    seen: list[int] = []
    running.with_hidden = lambda known, mine, theirs, mask: seen.extend((len(mine), len(theirs))) or known  # type: ignore
    running.run()
    assert seen == ([] if len(skips) == 3 else [3 - len(skips)] * 2)
