"""Every error is one of ours, catchable as a builtin, and suggests what was meant."""

import inspect
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rmtkd import errors
from rmtkd.errors import OptionError, RmtkdError, check_choice, check_kinds

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_ours_and_a_builtin(kind: type[Exception]):
    assert issubclass(kind, RmtkdError)
    assert kind is RmtkdError or issubclass(kind, (ValueError, RuntimeError))


def test_a_choice_that_exists_is_returned():
    assert check_choice("rule", "mp", ("mp", "edge")) == "mp"


def test_a_near_miss_is_suggested():
    with pytest.raises(
        OptionError, match=r"rule must be one of mp, shrinkage\. Got 'shrinkge'\. Did you mean 'shrinkage'"
    ):
        check_choice("rule", "shrinkge", ("mp", "shrinkage"))


def test_a_far_miss_names_the_choices_only():
    with pytest.raises(OptionError) as caught:
        check_choice("rule", "zzz", ("mp", "edge"))
    assert str(caught.value) == "rule must be one of mp, edge. Got 'zzz'."


class Kinds(SimpleNamespace):
    """Annotations of every kind that is looked at, and two that are not."""

    share: float
    count: int
    whole: bool
    name: str | None
    names: Sequence[str]
    anything: Any


GOOD: dict[str, Any] = {"share": 0.5, "count": 2, "whole": True, "name": None, "names": (), "anything": 5}


@pytest.mark.parametrize("change", [{}, {"share": 1}, {"share": np.float32(1)}, {"count": np.int64(3)}, {"name": "a"}])
def test_values_of_their_kind_pass(change: dict[str, Any]):
    kinds = Kinds(**{**GOOD, **change})
    check_kinds(kinds)
    kept = {**vars(kinds)}
    assert json.loads(json.dumps(kept)) == {**GOOD, **change, "names": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": "1"}, "share must be a number. Got '1'"),
        ({"share": None}, "share must be a number. Got None"),
        ({"share": True}, "share must be a number. Got True"),
        ({"count": 1.5}, "count must be a whole number. Got 1.5"),
        ({"count": False}, "count must be a whole number. Got False"),
        ({"whole": 1}, "whole must be True or False. Got 1"),
        ({"name": 0.25}, "name must be text or None. Got 0.25"),
    ],
)
def test_a_value_of_another_kind_is_named(change: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        check_kinds(Kinds(**{**GOOD, **change}))
