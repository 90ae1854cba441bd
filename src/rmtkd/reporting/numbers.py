"""How each kind of number is written. Every rendering takes its words from here, so that none is formatted twice."""

from collections.abc import Mapping
from typing import Any

Cost = Mapping[str, Any]
"""What one model costs and how well it does: `baseline` or `compressed` of a record."""


def count(number: int) -> str:
    """A number of things: `648,202`."""
    return f"{number:,}"


def share(part: int | float, whole: int | float) -> str:
    """What remains of a whole: `24.8%`."""
    return f"{part / whole:.1%}"


def megaflops(flops: int | float) -> str:
    """FLOPs in millions."""
    return f"{flops / 1e6:,.1f}"


def megabytes(size: int) -> str:
    """Bytes in millions, with the unit."""
    return f"{size / 1e6:,.2f} MB"


def milliseconds(latency: Mapping[str, Any]) -> str:
    """The median of a measured `Latency`, without its spread."""
    return f"{latency['median']:.1f} ms"


def spread_of(latency: Mapping[str, Any]) -> str:
    """The median with its interquartile range."""
    return f"{milliseconds(latency)} (IQR {latency['iqr']:.1f})"


def ratio_of(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> str:
    """How many times faster the second is: `2.50×`."""
    return f"{slow['median'] / fast['median']:.2f}×"


def faster(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> str:
    """The same in words, also where it is slower."""
    is_slower = fast["median"] > slow["median"]
    return f"{ratio_of(fast, slow)} slower" if is_slower else f"{ratio_of(slow, fast)} faster"


def batch_of(latency: Mapping[str, Any]) -> str:
    """The batch that was timed: rows, positions where rows have several, and threads."""
    positions = f" × {latency['length']}" if latency["length"] > 1 else ""
    return f"{latency['batch']}{positions}, {latency['threads']} threads"


def joules(energy: int | float) -> str:
    """Energy with its unit."""
    return f"{energy:.3g} J"


def watts(power: int | float) -> str:
    """Power with its unit."""
    return f"{power:.3g} W"


def percent(value: int | float) -> str:
    """A proportion without a spread, as rounds have it."""
    return f"{value:.2%}"


def estimate(value: Mapping[str, Any] | None) -> str:
    """A proportion with its standard error."""
    return "–" if value is None else f"{value['value']:.2%} ± {value['stderr']:.2%}"


def points(before: int | float, after: int | float) -> str:
    """The difference of two proportions."""
    return f"{100 * (after - before):+.2f} points"


def small(value: int | float | None) -> str:
    """A number of any size, to three digits; a dash where there is none."""
    return "–" if value is None else f"{value:.3g}"


def measure(key: str, classes: int) -> str:
    """The name of what is measured."""
    if key.startswith("f1"):
        return "F1" if classes == 2 else "macro F1"
    return "accuracy"
