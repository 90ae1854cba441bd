"""JSON that knows its lines: values with the line they stand on, checked against the fields of a dataclass."""

import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from rmtkd.errors import PlanError

# Of JSON that has proved valid. White space lies between.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')

_WHOLE = 2**63
"""Whole numbers stay below."""


@dataclass(frozen=True)
class Placed:
    """A value and its line. Objects and arrays hold placed values."""

    value: Any
    line: int

    def plain(self) -> Any:
        """The value without lines."""
        if isinstance(self.value, dict):
            return {name: member.plain() for name, member in self.value.items()}
        if isinstance(self.value, list):
            return [member.plain() for member in self.value]
        return self.value


class Problems:
    """What is wrong with a file, line by line."""

    def __init__(self, name: str):
        self.name = name
        self.found: list[tuple[int, str]] = []

    def add(self, line: int, text: str) -> None:
        """Note a problem."""
        if (line, text) not in self.found:
            self.found.append((line, text))

    def stop(self) -> None:
        """Raise one `PlanError` that names all problems, if there are any."""
        if self.found:
            lines = (f"{self.name}:{line}: {text}" for line, text in sorted(self.found))
            count = "1 problem" if len(self.found) == 1 else f"{len(self.found)} problems"
            raise PlanError(
                "\n".join((f"a plan must be whole and fit its model. {self.name} has {count}:", *lines))
                + "\nCorrect them, or make the plan anew with `rmtkd plan`; nothing was changed."
            )


def parse(text: str, problems: Problems) -> Placed:
    """Read JSON with the line of every value; a key that comes twice is a problem.

    Raises:
        PlanError: if it is not JSON, with line and column.
    """
    try:
        json.loads(text)
        return _placed(_tokens(text), problems)
    except json.JSONDecodeError as error:
        problems.add(error.lineno, f"a plan must be JSON. At column {error.colno}: {error.msg}.")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        problems.add(1, f"a plan must be JSON that can be read. Got {type(error).__name__}: {error}.")
    problems.stop()
    raise AssertionError  # stop() has raised


def check(kind: Any, placed: Placed, label: str, problems: Problems) -> Any:
    """The plain value, if it is of this kind; else a problem and `MISSING`.

    Args:
        kind: a type annotation: a dataclass, `str`, `int`, `float`, `bool`, their tuples, dicts by name, or None.
        placed: the value.
        label: what to call it, in front of "must be".
        problems: where problems go.

    Returns:
        The value. Of a dataclass, a dict of those fields that are there and in order.
    """
    if kind not in _KINDS and typing.get_origin(kind) in (types.UnionType, typing.Union):
        (inner,) = (part for part in typing.get_args(kind) if part is not type(None))
        return None if placed.value is None else check(inner, placed, label, problems)
    if is_dataclass(kind):
        return _check_fields(kind, placed, label, problems)
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and isinstance(placed.value, list):
        return tuple(
            check(parts[0], member, _name_of(member) or f"{label}[{i}]", problems)
            for i, member in enumerate(placed.value)
        )
    if typing.get_origin(kind) is dict and isinstance(placed.value, dict):
        return {
            show(name): check(parts[1], member, f"{label}, {show(name)},", problems)
            for name, member in placed.value.items()
        }
    words, fits = _KINDS[kind if kind in _KINDS else typing.get_origin(kind)]
    if not fits(placed.value):
        problems.add(placed.line, f"{label} must be {words}. Got {brief(placed.value)}.")
        return MISSING
    return float(placed.value) if kind is float else placed.value


def brief(value: Any) -> str:
    """A value as it is named in a message."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def show(name: str) -> str:
    """A name from a file, safe to print."""
    return name if name.isprintable() and len(name) <= 80 else brief(name)


def _name_of(placed: Placed) -> str | None:
    """A record of a list is called by its name, if it has one."""
    name = placed.value.get("name") if isinstance(placed.value, dict) else None
    return show(name.value) if name and isinstance(name.value, str) and name.value else None


def _check_fields(kind: Any, placed: Placed, label: str, problems: Problems) -> dict[str, Any]:
    start = f"{label}: " if label else ""
    if not isinstance(placed.value, dict):
        problems.add(placed.line, f"{start}must be an object. Got {brief(placed.value)}.")
        return {}
    hints = typing.get_type_hints(kind)
    members = placed.value
    wanted = [field.name for field in fields(kind)]
    for name in wanted:
        if name not in members:
            problems.add(placed.line, f"{start}the field {name} must be there. It is missing.")
    for name, member in members.items():
        if name not in wanted:
            problems.add(member.line, f"{start}there must be no other field than rmtkd writes. Got {show(name)}.")
    values = {name: check(hints[name], members[name], f"{start}{name}", problems) for name in wanted if name in members}
    return {name: value for name, value in values.items() if value is not MISSING}


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", lambda value: isinstance(value, str) and value.isprintable()),
    int: ("a whole number", lambda value: type(value) is int and abs(value) < _WHOLE),
    float: (
        "a finite number",
        # NaN fails the comparison, infinity and numbers that are too large for a float do too
        lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max,
    ),
    int | float: (
        "a finite number, below 2⁶³ if it is whole",
        lambda value: abs(value) < _WHOLE if type(value) is int else type(value) is float and math.isfinite(value),
    ),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    tuple: ("a list", lambda value: False),
    dict: ("an object", lambda value: False),
}


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line, end = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", end, match.start())
        end = match.start()
        yield match[0], line


def _placed(tokens: Iterator[tuple[str, int]], problems: Problems, first: tuple[str, int] | None = None) -> Placed:
    token, line = first or next(tokens)
    if token == "[":
        members = []
        while (following := next(tokens))[0] != "]":
            if following[0] != ",":
                members.append(_placed(tokens, problems, following))
        return Placed(members, line)
    if token == "{":
        named: dict[str, Placed] = {}
        while (following := next(tokens))[0] != "}":
            if following[0] != ",":
                name = json.loads(following[0])
                next(tokens)  # the colon
                value = _placed(tokens, problems)
                if name in named:
                    problems.add(
                        following[1], f"a name must come once. {show(name)} also stands on line {named[name].line}."
                    )
                named.setdefault(name, value)
        return Placed(named, line)
    return Placed(json.loads(token), line)
