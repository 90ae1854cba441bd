"""Every error that `rmtkd` raises on purpose.

Messages follow one grammar: *what must hold — what came — what to do*. Each class is also a builtin
`ValueError` or `RuntimeError`, so that callers who know nothing of `rmtkd` can catch it.
"""

import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable
from typing import Any


class RmtkdError(Exception):
    """Base of all errors raised by `rmtkd`."""


class OptionError(RmtkdError, ValueError):
    """An option has a value that it cannot have."""


class DataError(RmtkdError, ValueError):
    """The rows or activations cannot be used: too few, not finite, labels out of range, a teacher at chance."""


class UnsupportedModelError(RmtkdError, ValueError):
    """The model, its head or one of its parts is not understood. Nothing was changed."""


class PlanError(RmtkdError, ValueError):
    """A plan cannot be made or does not fit the model."""


class SurgeryError(RmtkdError, RuntimeError):
    """A cut model disagrees with its full-width reference.

    `error` is by how much, relative to the largest output; NaN if it does not run, or gives no numbers.
    """

    def __init__(self, message: str, *, error: float = math.nan):
        super().__init__(message)
        self.error = error


class ArtifactError(RmtkdError, ValueError):
    """A model folder is incomplete, altered, or of another format."""


class ExportError(RmtkdError, RuntimeError):
    """A model cannot be written in a format, or what was written is not the same network. Nothing was left behind."""


class RunError(RmtkdError, RuntimeError):
    """A run folder cannot be used as asked."""


def check_choice(what: str, value: str, allowed: Iterable[str], then: str = "") -> str:
    """Return `value` if it is one of `allowed`. `then` is what to do, where there is more to it than to choose.

    Raises:
        OptionError: naming the nearest allowed value.
    """
    names = list(allowed)
    if value in names:
        return value
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"{what} must be one of {', '.join(names)}. Got {value!r}.{hint}{then and f' {then}'}")


_KINDS: dict[Any, tuple[type, str]] = {
    float: (numbers.Real, "a number"),
    int: (numbers.Integral, "a whole number"),
    bool: (bool, "True or False"),
    str: (str, "text"),
    type(None): (type(None), "None"),
}


def check_kinds(options: Any) -> None:
    """Hold the fields of a dataclass against their annotations, as far as these are plain: `epochs: float`. Numbers of
    other libraries become Python's own, which JSON knows.

    Raises:
        OptionError: naming the first field that holds something else; neither True nor False is a number.
    """
    for name, hint in typing.get_type_hints(type(options)).items():
        allowed = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        if not all(kind in _KINDS for kind in allowed):
            continue
        value, kinds = getattr(options, name), [_KINDS[kind] for kind in allowed]
        if not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind, _ in kinds):
            raise OptionError(f"{name} must be {' or '.join(told for _, told in kinds)}. Got {value!r}.")
        if isinstance(value, numbers.Real) and type(value) not in (int, float, bool):
            plain = int(value) if isinstance(value, numbers.Integral) else float(value)
            object.__setattr__(options, name, plain)
