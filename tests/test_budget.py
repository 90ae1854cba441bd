"""The claims of budgets: curves become convex without losing their ends, and the widths that come out lose least."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtkd.planning.budget import Curve, allocate

losses = st.lists(st.floats(0, 10), min_size=1, max_size=7)


def curve_of(values: list[float], step: int = 8) -> Curve:
    """A curve at every multiple of `step`, nothing lost at the last."""
    return Curve(widths=tuple(step * (i + 1) for i in range(len(values) + 1)), losses=(*values, 0.0))


@given(losses)
def test_the_minorant_is_convex_below_the_points_and_meets_both_ends(values: list[float]) -> None:
    curve = curve_of(values)
    widths, found = curve.minorant
    assert (widths[0], widths[-1]) == (curve.widths[0], curve.widths[-1])
    assert (found[0], found[-1]) == (curve.losses[0], 0)
    slopes = np.diff(found) / np.diff(widths)
    assert all(slopes[1:] >= slopes[:-1] - 1e-12)
    assert all(slopes <= 1e-12)
    assert all(curve.loss(width) <= loss + 1e-12 for width, loss in zip(curve.widths, curve.losses, strict=True))


@given(losses, st.floats(0.01, 100))
def test_a_weight_scales_the_loss(values: list[float], weight: float) -> None:
    curve = curve_of(values)
    heavy = Curve(widths=curve.widths, losses=curve.losses, weight=weight)
    assert heavy.loss(12) == pytest.approx(weight * curve.loss(12))


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(0.01, 5), min_size=3, max_size=3), min_size=2, max_size=3), st.integers(0, 100))
def test_no_other_widths_of_the_same_cost_lose_less(steps: list[list[float]], at: int) -> None:
    """Held against trying everything, where the limit is a cost at which the descent stands."""
    curves = {str(i): curve_of(np.cumsum(sorted(gains))[::-1].tolist()) for i, gains in enumerate(steps)}
    allowed = {name: list(curve.widths) for name, curve in curves.items()}

    def cost(widths: Mapping[str, int]) -> float:
        return sum(widths.values())

    least, most = (sum(choose(widths) for widths in allowed.values()) for choose in (min, max))
    limit = least + at * (most - least) // 100 // 8 * 8
    chosen = allocate(curves, allowed, cost, limit=float(limit))
    assert cost(chosen) <= limit

    def loss(widths: Mapping[str, int]) -> float:
        return sum(curves[name].loss(width) for name, width in widths.items())

    tried = (dict(zip(allowed, widths, strict=True)) for widths in itertools.product(*allowed.values()))
    best = min(loss(widths) for widths in tried if cost(widths) <= limit)
    assert loss(chosen) <= best + 1e-9


def test_what_the_last_step_leaves_over_is_spent() -> None:
    curves = {
        "dear": Curve(widths=(1, 10), losses=(0.1, 0.0)),
        "cheap": Curve(widths=(1, 2, 3), losses=(1.0, 0.4, 0.0)),
    }
    allowed = {"dear": [1, 10], "cheap": [1, 2, 3]}
    chosen = allocate(curves, allowed, lambda widths: widths["dear"] + 4 * widths["cheap"], limit=14.0)
    assert chosen == {"dear": 1, "cheap": 3}


def test_a_step_that_saves_nothing_is_looked_beyond() -> None:
    """The first cut of an embedding adds a matrix."""
    costs = {10: 100, 9: 105, 5: 60, 1: 20}
    curve = Curve(widths=(1, 5, 9, 10), losses=(3.0, 1.0, 0.1, 0.0))
    chosen = allocate({"table": curve}, {"table": [1, 5, 9, 10]}, lambda widths: costs[widths["table"]], limit=70.0)
    assert chosen == {"table": 5}


def test_widths_that_meet_in_one_matrix_are_seen_at_the_cost_they_then_have() -> None:
    curves = {"a": curve_of([0.3, 0.1]), "b": curve_of([0.3, 0.2])}
    allowed = {"a": [8, 16, 24], "b": [8, 16, 24]}
    chosen = allocate(curves, allowed, lambda widths: widths["a"] * widths["b"], limit=24.0 * 16)
    assert chosen == {"a": 16, "b": 24}


@given(st.lists(losses, min_size=1, max_size=3), st.floats(0.001, 20))
def test_without_a_target_the_sum_of_losses_stays_within_the_bound(values: list[list[float]], most: float) -> None:
    curves = {str(i): curve_of(found) for i, found in enumerate(values)}
    allowed = {name: list(curve.widths) for name, curve in curves.items()}
    chosen = allocate(curves, allowed, lambda widths: sum(widths.values()), most_loss=most)
    total = sum(curves[name].loss(width) for name, width in chosen.items())
    assert total <= most
    for name, width in chosen.items():  # and nothing more could be saved
        lower = [other for other in allowed[name] if other < width]
        if lower:
            assert total - curves[name].loss(width) + curves[name].loss(max(lower)) > most


def test_a_limit_that_cannot_be_met_gives_the_least() -> None:
    curves = {"a": curve_of([1.0])}
    assert allocate(curves, {"a": [8, 16]}, lambda widths: widths["a"], limit=1.0) == {"a": 8}


@pytest.mark.parametrize(
    "wrong",
    [
        {"widths": (8, 8), "losses": (1.0, 0.0)},
        {"widths": (8, 16), "losses": (1.0,)},
        {"widths": (), "losses": ()},
        {"widths": (8, 16), "losses": (math.inf, 0.0)},
        {"widths": (8, 16), "losses": (-1.0, 0.0)},
        {"widths": (8, 16), "losses": (1.0, 0.0), "weight": 0.0},
    ],
)
def test_a_curve_knows_whether_it_is_sound(wrong: dict[str, object]) -> None:
    assert curve_of([1.0]).is_sound
    assert not Curve(**wrong).is_sound  # type: ignore[arg-type]
