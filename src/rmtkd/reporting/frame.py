"""What every chart stands on: a frame with scales, grid and labels, and a picture that can be read aloud."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rmtkd.reporting.markup import Child, Html, element

WIDTH = 360
"""Of a chart in its own units: the width of a phone, so that its text is as large there as it is meant to be."""

Number = int | float
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def picture(key: str, title: str, told: str, *parts: Child, height: int, width: int | None = WIDTH) -> Html:
    """An SVG with its title and what it shows in words.

    Args:
        key: unlike that of any other picture of the page.
        title: its name.
        told: what can be seen in it.
        parts: of the drawing.
        height: in units; in pixels where there is no width.
        width: in units; None for a drawing that is as wide as its place, with horizontal lengths in percent.
    """
    return element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", told, id=f"{key}-told"),
        *parts,
        class_="picture" if width else "picture fluid",
        viewBox=f"0 0 {width} {height}" if width else None,
        width=None if width else "100%",
        height=None if width else height,
        role="img",
        aria_labelledby=f"{key}-title {key}-told",
    )


def text(x: Number | str, y: Number, words: str, class_: str | None = None, **attributes: object) -> Html:
    """A text in a picture."""
    return element("text", words, x=x, y=y, class_=class_, **attributes)


def path_of(points: Sequence[tuple[Number, Number]]) -> str:
    """Points as the data of a path, to a tenth of a pixel."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One axis: from what it measures to where it is drawn.

    Attributes:
        low, high: the ends of what is measured.
        start, end: where these lie in the picture.
        log: whether equal factors are equal lengths.
    """

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def __call__(self, value: Number) -> float:
        """Where a value lies; beyond an end, at that end."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        share = (min(at, high) - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values along the axis, so many at most."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / most))
            return [10.0**power for power in range(first, last + 1, step)]
        step = _round_step((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(least: Number) -> float:
    """The smallest of 1, 2, 5, 10, … that is not below."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def decade(value: Number) -> str:
    """A power of ten in words."""
    power = round(math.log10(value))
    return {0: "1", 1: "10", 2: "100"}.get(power, "10" + str(power).translate(SUPERSCRIPTS))


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The two axes of a chart."""

    x: Scale
    y: Scale

    def point(self, x: Number, y: Number) -> tuple[float, float]:
        """Where a point lies."""
        return self.x(x), self.y(y)

    def rows(self, labels: Sequence[tuple[Number, str]]) -> list[Html]:
        """Lines across, with labels at the left."""
        left, right = sorted((self.x.start, self.x.end))
        lines = []
        for value, words in labels:
            y = self.y(value)
            lines.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
            lines.append(text(left - 6, y + 3.5, words, "tick end"))
        return lines

    def columns(self, labels: Sequence[tuple[Number, str]], name: str) -> list[Html]:
        """Labels below, and what they are of."""
        bottom = max(self.y.start, self.y.end)
        base = element("line", x1=self.x.start, x2=self.x.end, y1=bottom, y2=bottom, class_="axis")
        marks = [text(self.x(value), bottom + 15, words, "tick middle") for value, words in labels]
        return [base, *marks, text((self.x.start + self.x.end) / 2, bottom + 31, name, "name middle")]
