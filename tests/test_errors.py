"""Every error is one of ours, catchable as a builtin, and suggests what was meant."""

import inspect

import pytest

from rmtkd import errors
from rmtkd.errors import OptionError, RmtkdError, check_choice

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
