# ruff: noqa: NPY002 - the global numbers are the ones in question
"""The claims of the rows of a run: they are known again in any order, and labelled by the teacher once."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from conftest import random_rows, tiny_bert
from rmtkd import batches as batching
from rmtkd.batches import Calls
from rmtkd.calibration import share_of
from rmtkd.memory import Pieces
from rmtkd.roles import ANEW, Answered, Roles, fingerprint, fingerprint_of_all, fingerprint_of_training
from rmtkd.seeding import seeded

BATCHES = list(random_rows(40, seed=3))


def altered(name: str, change: Any) -> list[Any]:
    """The batches with one of their tensors changed, of the third batch."""
    return [{**batch, name: change(batch[name].clone())} if i == 2 else batch for i, batch in enumerate(BATCHES)]


def one_more(value: Tensor) -> Tensor:
    value[-1] += 1
    return value


def test_rows_are_known_again_in_any_order_and_padding() -> None:
    known = fingerprint_of_all(BATCHES)
    assert known[1] == 3
    assert fingerprint_of_all(BATCHES[::-1]) == known
    rows = random_rows(40, seed=3, shuffle=True)
    for epoch in range(3):
        rows.set_epoch(epoch)
        assert fingerprint_of_all(rows) == known
    assert {fingerprint_of_all(shuffling(longer(BATCHES))) for _ in range(3)} == {known}


@pytest.mark.parametrize("is_called", [False, True])
def test_a_share_of_shuffled_batches_is_the_same_in_every_pass(is_called: bool) -> None:
    for rows in (shuffling(longer(BATCHES)), random_rows(40, seed=3, shuffle=True)):
        train = (
            Roles(train=rows, selection=BATCHES).called((lambda model, rows: model(rows)) if is_called else None).train
        )
        share, seen = share_of(train, 0.7), set()
        for epoch in range(3):
            batching.set_epoch(train, epoch)
            list(train)
            seen.add(fingerprint(share, "calibration"))
        assert len(seen) == 1


class Noisy:
    """The batches with other labels in every pass."""

    def __init__(self, draw: Callable[[], float]):
        self.draw = draw

    def __iter__(self) -> Iterator[Any]:
        return ({**batch, "labels": torch.full_like(batch["labels"], int(1e6 * self.draw()))} for batch in BATCHES)


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_rows_that_draw_random_numbers_of_the_run_are_known_by_its_seed(draw: Callable[[], float]) -> None:
    found = []
    for seed in (1, 1, 2):
        with seeded(seed):
            found.append(fingerprint_of_training(Noisy(draw), "cpu")[0])
    assert found[0] == found[1] != found[2]
    assert ANEW not in found


def test_rows_that_draw_random_numbers_of_their_own_are_said_to_be_drawn_anew() -> None:
    assert fingerprint_of_training(Noisy(np.random.default_rng(0).random), "cpu") == (ANEW, 3)


def test_an_order_of_their_own_does_not_make_rows_others() -> None:
    own = shuffling(longer(BATCHES), generator=torch.Generator().manual_seed(0))
    assert fingerprint_of_training(own, "cpu") == fingerprint_of_all(BATCHES)


def test_a_fingerprint_leaves_random_numbers_as_a_plain_pass_does() -> None:
    rows = Noisy(np.random.rand)
    with seeded(1):
        list(rows)
        expected = np.random.rand()
    with seeded(1):
        fingerprint_of_training(rows, "cpu")
        assert np.random.rand() == expected


def shuffling(batches: list[Any], **loader: Any) -> Any:
    """A loader of their rows, in an order of its own in every pass."""
    rows = [{k: value[i] for k, value in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    return DataLoader(rows, batch_size=16, shuffle=True, **loader)  # type: ignore[arg-type]


def longer(batches: list[Any]) -> list[Any]:
    """All padded to one length, with a token that is not the usual one."""
    found = []
    for batch in batches:
        more = 24 - batch["input_ids"].shape[1]
        ids, mask = (torch.nn.functional.pad(batch[name], (0, more)) for name in ("input_ids", "attention_mask"))
        found.append({**batch, "input_ids": ids.masked_fill(mask == 0, 7), "attention_mask": mask})
    return found


@pytest.mark.parametrize(
    "other",
    [
        altered("labels", one_more),
        altered("input_ids", lambda ids: ids.index_fill(0, torch.tensor([1]), 9)),
        altered("attention_mask", lambda mask: mask.index_fill(1, torch.tensor([0]), 0)),
        [{name: value for name, value in batch.items() if name != "labels"} for batch in BATCHES],
        [{name: value[:8] for name, value in batch.items()} for batch in BATCHES],
        [*BATCHES, BATCHES[0]],
        BATCHES[:-1],
        [BATCHES[0], BATCHES[0], BATCHES[2]],
        random_rows(40, seed=4),
    ],
)
def test_other_rows_are_told_apart(other: Any) -> None:
    assert fingerprint_of_all(other) != fingerprint_of_all(BATCHES)


def test_rows_of_any_kind_are_known_again() -> None:
    images = [(torch.rand(6, 3, 40, 40), torch.arange(6)), (torch.rand(6, 3, 40, 40).half(), torch.arange(6))]
    pairs: list[Any] = [
        *images,
        (torch.rand(2, 5).bfloat16(),),
        (torch.ones(3, 4, dtype=torch.bool),),
        (torch.zeros(2, 0),),
    ]
    for i, pair in enumerate(pairs):
        assert fingerprint_of_all([pair]) == fingerprint_of_all([pair])
        rest = [fingerprint_of_all([other]) for other in pairs[:i]]
        assert fingerprint_of_all([pair]) not in rest
    calls = Calls([BATCHES[0]], lambda model, rows: model(rows))
    assert fingerprint_of_all(calls) == fingerprint_of_all([BATCHES[0]])
    four = {"ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 1, 3, 3)}  # a mask that says nothing of positions
    assert fingerprint_of_all([four]) != fingerprint_of_all([{**four, "ids": torch.zeros(2, 3)}])


class Counted(torch.nn.Module):
    """Counts the rows that it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.rows = tiny_bert(), 0

    def forward(self, **inputs: Tensor) -> Any:
        self.rows += len(inputs["input_ids"])
        return self.inner(**inputs)


def test_the_teacher_labels_rows_once() -> None:
    model, rows = Counted(), random_rows(40)
    rows.labels = None
    answered = Answered(rows, model, Pieces())
    next(iter(answered))  # a pass that is left early
    passes = [[batch["labels"] for batch in answered] for _ in range(4)]  # type: ignore[index]
    assert model.rows == 40
    with torch.no_grad():
        expected = [model.inner(**batching.inputs(batch)[1]).logits.argmax(-1) for batch in rows]
    for labels in passes:
        assert all(torch.equal(one, other) for one, other in zip(labels, expected, strict=True))


def test_rows_in_another_order_get_their_own_answers_and_take_no_more_memory() -> None:
    model = Counted()
    answered = Answered(shuffling(longer(BATCHES)), model, Pieces())
    for _ in range(3):
        for batch in answered:
            with torch.no_grad():
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}  # type: ignore[index]
                assert torch.equal(model.inner(**inputs).logits.argmax(-1), batch["labels"])  # type: ignore[index]
    assert len(answered.known) == 3
