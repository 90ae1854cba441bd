"""Out of memory is not the end: the batch is halved, said so, and the results are those of the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

import rmtkd
from conftest import random_rows, tiny_bert
from rmtkd import memory
from rmtkd.activations import collect, observe
from rmtkd.distillation import Recovery, Teacher
from rmtkd.measurement import predict
from rmtkd.memory import Pieces, available_bytes, held_bytes, is_out_of_memory, peak_bytes
from rmtkd.sites import find_sites
from rmtkd.training import Phase

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
]


class Narrow(torch.nn.Module):
    """Has room for so many rows."""

    def __init__(self, model: torch.nn.Module, room: int, error: Exception | None = None):
        super().__init__()
        self.inner, self.room, self.error = model, room, error or ERRORS[0]

    def forward(self, **inputs: Any) -> Any:
        if len(inputs["input_ids"]) > self.room:
            raise self.error
        return self.inner(**inputs)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_batch_is_halved_until_it_fits_and_stays_so(error: Exception):
    told: list[int] = []
    pieces = Pieces(told.append)
    model = Narrow(tiny_bert(), 5, error)
    expected, _ = predict(model.inner, random_rows(64))
    got, _ = predict(model, random_rows(64), pieces=pieces)
    assert told == [2, 4]
    assert pieces.count == 4
    torch.testing.assert_close(got, expected)


def test_another_error_is_not_about_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        predict(Narrow(tiny_bert(), 0, RuntimeError("shapes do not fit")), random_rows())
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_a_single_row_that_does_not_fit_ends_it():
    pieces = Pieces()
    with pytest.raises(torch.OutOfMemoryError):
        predict(Narrow(tiny_bert(), 0), random_rows(32, batch_size=4), pieces=pieces)
    assert pieces.count == 4


def test_moments_count_every_row_once_when_memory_ran_out_half_way():
    model = tiny_bert().double()
    sites = find_sites(model)
    expected = collect(model, sites, random_rows(200))
    calls = 0

    def fail_late(*_: object) -> None:  # the first streams have been seen by then
        nonlocal calls
        calls += 1
        if calls in (1, 4):
            raise ERRORS[0]

    handle = model.get_submodule("bert.encoder.layer.1.intermediate").register_forward_hook(fail_late)
    pieces = Pieces()
    got = collect(model, sites, random_rows(200), pieces=pieces)
    handle.remove()
    assert pieces.count == 4
    for name, streams in expected.items():
        for mine, theirs in zip(got[name], streams, strict=True):
            assert mine.count == theirs.count
            torch.testing.assert_close(mine.covariance(), theirs.covariance())


@pytest.mark.parametrize("call", [2, 3])
def test_replicates_are_pairs_of_the_same_rows_when_memory_ran_out_in_one_of_them(call: int):
    model = tiny_bert(hidden_dropout_prob=0.1)
    sites, rows = find_sites(model), random_rows(200)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise ERRORS[0]

    handle = model.get_submodule("bert.encoder.layer.1.intermediate").register_forward_hook(fail)
    pieces = Pieces()
    got = observe(model, sites, rows, pieces=pieces, replicate_seed=0)
    handle.remove()
    assert pieces.count == 2
    expected = observe(model, sites, rows, pieces=Pieces(count=2), replicate_seed=0)
    for name, streams in expected.items():
        for mine, theirs in zip(got[name], streams, strict=True):
            assert mine.replicates is not None and theirs.replicates is not None
            assert torch.equal(mine.replicates.covariance(), theirs.replicates.covariance())


def test_gradients_of_the_pieces_add_up_to_those_of_the_batch():
    teacher = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    students, losses = [], []
    for room in (99, 3):
        calm: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        student = Narrow(tiny_bert(seed=1, **calm).double(), room)
        # equal lengths: padding weighs hidden states, rows weigh losses
        batch = {"input_ids": torch.randint(1, 50, (16, 9), generator=torch.Generator().manual_seed(0))}
        batch["labels"] = batch["input_ids"][:, 0] % 3
        phase = Phase(
            student,
            [batch],
            steps=3,
            recovery=Recovery(lr=1e-3, hidden=0.5),
            teacher=Teacher(Narrow(teacher, 99)),
            blocks=["inner.bert.encoder.layer.0"],
        )
        losses.append(phase.run())
        students.append(student)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the hidden term is a mean of ratios
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


def test_a_run_that_meets_too_little_memory_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch):
    model = tiny_bert()
    forward: Any = type(model).forward
    events: list[Any] = []

    def narrow(self: torch.nn.Module, *args: Any, **inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 8:
            raise ERRORS[0]
        return forward(self, *args, **inputs)

    rows = {name: random_rows(96, seed=i) for i, name in enumerate(("train", "selection"))}
    for part in rows.values():
        part.labels = None
    monkeypatch.setattr(type(model), "forward", narrow)
    result = rmtkd.compress(
        model,
        train=rows["train"],
        selection=rows["selection"],
        example={"input_ids": torch.ones(4, 6, dtype=torch.long)},
        target="70%params",
        multiple_of=2,
        calibration_share=0.5,
        on_event=events.append,
    )
    assert result.record["finished"]
    assert [event["pieces"] for event in events if event["event"] == "memory"] == [2]


def test_memory_is_told_in_bytes():
    before = held_bytes()
    ballast = torch.ones(32_000_000)
    assert held_bytes() - before > 100e6
    assert 1.01 * (peak_bytes() or 0) > held_bytes() > 100e6  # the system counts the two at different moments
    free = available_bytes()
    assert free is not None and free > 0
    assert len(ballast) == 32_000_000


def test_a_system_that_does_not_say_what_a_process_holds_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "resource", None)
    monkeypatch.setattr(memory, "Path", lambda _: Path("/nowhere"))
    assert (peak_bytes(), held_bytes(), available_bytes()) == (None, 0, None)
