# ruff: noqa: NPY002 - the global numbers are the ones in question
"""The claims of random numbers: one seed for all of them, and a caller who does not notice."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rmtkd.seeding import random_state, seeded, set_random_state

CPU = torch.device("cpu")


def drawn() -> list[float]:
    """Of every kind, an odd number of normal ones, which come in pairs."""
    return [float(torch.rand(())), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]


def test_one_seed_sets_the_random_numbers_of_torch_numpy_and_python() -> None:
    with seeded(5):
        first = drawn()
    with seeded(5):
        again = drawn()
    with seeded(6):
        others = drawn()
    assert first == again
    assert all(one != other for one, other in zip(first, others, strict=True))


@pytest.mark.parametrize("seed", [None, 3, 2**40])
def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_drawn(seed: int | None) -> None:
    drawn()
    state = random_state(CPU)
    expected = drawn()
    set_random_state(state, CPU)
    with pytest.raises(KeyboardInterrupt), seeded(seed):
        drawn()
        raise KeyboardInterrupt
    assert drawn() == expected


def test_without_a_seed_random_numbers_begin_with_the_callers() -> None:
    state = random_state(CPU)
    expected = drawn()
    set_random_state(state, CPU)
    with seeded(None):
        assert drawn() == expected


@pytest.mark.parametrize("draw", [drawn, lambda: None])
def test_a_state_is_one_that_can_be_gone_back_to(draw: Callable[[], object]) -> None:
    draw()
    state = random_state(CPU)
    assert state.dtype == torch.uint8
    first = [drawn() for _ in range(400)]  # more than one block of the generators
    set_random_state(state, CPU)
    assert [drawn() for _ in range(400)] == first


def test_states_of_earlier_versions_are_of_torch_alone() -> None:
    state = torch.get_rng_state()
    expected = torch.rand(3)
    others = np.random.rand(), random.random()
    set_random_state(state, CPU)
    assert torch.equal(torch.rand(3), expected)
    assert (np.random.rand(), random.random()) != others
