"""Recipes: a task's rows in their four roles, its models, and settings that were measured to work.

The rows of a task never change roles. *Train* and the *calibration* share of it, *selection* (steers, nobody trains on
it, teachers included), *report* (published dev or test rows, read once, at the end).
"""

from dataclasses import replace

from rmtkd.errors import OptionError, check_choice
from rmtkd.recipes.own import own_recipe
from rmtkd.recipes.published import TASKS
from rmtkd.recipes.recipe import Recipe, Rows
from rmtkd.recipes.rows import TokenRows
from rmtkd.recipes.text import text_recipe

IMAGES = ("digits_cnn", "cifar10")
"""Recipes of images."""
SHORTEST = 8
"""Shortest `--max-length`: less would leave no text between the special tokens."""


def names() -> tuple[str, ...]:
    """The names of all recipes."""
    return ("digits", "digits_cnn", *TASKS, "cifar10", "text")


def get(name: str, *, columns: str | None = None, label: str | None = None, max_length: int | None = None) -> Recipe:
    """The recipe of this name.

    Args:
        name: one of `names()`.
        columns: for `text`, the columns of texts: one, or two with a comma between them.
        label: for `text`, the column of labels; None for rows without labels.
        max_length: for texts, the longest row in tokens.

    Raises:
        OptionError: naming the nearest, if there is none; or if it has no such option.
    """
    check_choice("recipe", name, names(), "What each is: rmtkd ls")
    given = {"--columns": columns, "--label": label, "--max-length": max_length}
    allowed = {"text": set(given), **{image: set() for image in (*IMAGES, "digits")}}.get(name, {"--max-length"})
    if strangers := [option for option, value in given.items() if value is not None and option not in allowed]:
        raise OptionError(
            f"--columns and --label are for the recipe text, --max-length for recipes of texts. Got "
            f"{', '.join(strangers)} for {name}. Leave it out, or choose another recipe."
        )
    if max_length is not None and max_length < SHORTEST:
        raise OptionError(f"--max-length must be at least {SHORTEST}. Got {max_length}.")
    if name in ("digits", "digits_cnn"):
        from rmtkd.recipes import digits

        return digits.DIGITS if name == "digits" else digits.DIGITS_CNN
    if name == "cifar10":
        from rmtkd.recipes.cifar import CIFAR10

        return CIFAR10
    if name == "text":
        return own_recipe(columns, label, max_length)
    describe, task = TASKS[name]
    return text_recipe(name, describe, replace(task, max_length=max_length or task.max_length))


__all__ = ["Recipe", "Rows", "TokenRows", "get", "names"]
