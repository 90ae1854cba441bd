"""Recipes: a task's rows in their four roles, its models, and settings that were measured to work.

The rows of a task never change roles. *Train* and the *calibration* share of it, *selection* (steers, nobody trains on
it, teachers included), *report* (published dev or test rows, read once, at the end).
"""

from rmtkd.errors import check_choice
from rmtkd.recipes.recipe import Recipe, Rows
from rmtkd.recipes.rows import TokenRows


def names() -> tuple[str, ...]:
    """The names of all recipes."""
    return ("digits", "sst2")


def get(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        OptionError: naming the nearest, if there is none.
    """
    check_choice("recipe", name, names())
    if name == "digits":
        from rmtkd.recipes.digits import DIGITS

        return DIGITS
    from rmtkd.recipes.text import SST2

    return SST2


__all__ = ["Recipe", "Rows", "TokenRows", "get", "names"]
