"""Several models side by side in a picture: how accurate they are for their size, or for their time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rmtkd.reporting import numbers
from rmtkd.reporting.frame import WIDTH, Frame, Number, Scale, path_of, picture, text
from rmtkd.reporting.markup import Html, element

TOP, BOTTOM, LEFT, RIGHT = 16, 226, 48, WIDTH - 12
HEIGHT = 268


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model.

    Attributes:
        letter: by which table and pictures name it.
        name: in words.
        cost: what the axis measures.
        low, high: the spread of the cost.
        quality: an `Estimate`.
        is_untouched: whether it is a model before compression.
    """

    letter: str
    name: str
    cost: Number
    low: Number
    high: Number
    quality: Mapping[str, Any]
    is_untouched: bool


def front_picture(key: str, title: str, axis: str, measure: str, points: Sequence[Point]) -> Html:
    """Quality upwards, cost to the right, with spread; a line through the models that no other one beats in both.

    Args:
        key: see `picture`.
        title: of the picture.
        axis: what costs are, with their unit.
        measure: what the quality is, such as accuracy.
        points: the models.
    """
    heights = [p.quality["value"] + sign * p.quality["stderr"] for p in points for sign in (-1, 1)]
    room = max(0.005, 0.08 * (max(heights) - min(heights)))
    frame = Frame(
        x=Scale(low=0, high=1.08 * max(p.high for p in points), start=LEFT, end=RIGHT),
        y=Scale(low=max(0.0, min(heights) - room), high=min(1.0, max(heights) + room), start=BOTTOM, end=TOP),
    )
    best = [frame.point(p.cost, p.quality["value"]) for p in unbeaten(points)]
    parts = [
        frame.rows([(tick, f"{100 * tick:.4g}%") for tick in frame.y.ticks()]),
        frame.columns([(tick, f"{tick:.4g}") for tick in frame.x.ticks(5)], axis),
        element("path", d=path_of(best), class_="front") if len(best) > 1 else None,
        *(_spread(frame, p) for p in points),
        *(_dot(frame, p) for p in points),
    ]
    told = "; ".join(f"{p.letter}, {p.name}: {p.cost:.4g}, {numbers.estimate(p.quality)}" for p in points)
    return picture(key, title, f"{axis}, {measure} ± standard error. {told}.", *parts, height=HEIGHT)


def unbeaten(points: Sequence[Point]) -> list[Point]:
    """Those for which no other one costs less and is at least as accurate, by rising cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality["value"])):
        if not found or point.quality["value"] > found[-1].quality["value"]:
            found.append(point)
    return found


def _spread(frame: Frame, point: Point) -> list[Html]:
    x, y = frame.point(point.cost, point.quality["value"])
    error = point.quality["stderr"]
    low, high = frame.y(point.quality["value"] - error), frame.y(point.quality["value"] + error)
    return [
        element("line", x1=x, x2=x, y1=low, y2=high, class_="spread"),
        element("line", x1=frame.x(point.low), x2=frame.x(point.high), y1=y, y2=y, class_="spread"),
    ]


def _dot(frame: Frame, point: Point) -> list[Html]:
    x, y = frame.point(point.cost, point.quality["value"])
    return [
        element("circle", cx=x, cy=y, r=8.5, class_="dot hollow" if point.is_untouched else "dot"),
        text(x, y + 4, point.letter, "letter middle" if point.is_untouched else "letter on middle"),
    ]
