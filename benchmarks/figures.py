"""Line charts as SVG without any library: panels side by side, a colour a series."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#1b7837", "#762a83", "#2166ac", "#b2182b", "#8c510a", "#525252")
WIDTH, HEIGHT, LEFT, TOP, GAP = 380, 300, 56, 34, 40

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart.

    Attributes:
        title: above it.
        series: points by name; one whose name ends in ` (before)` is dashed and hollow, in the colour of its namesake.
        ticks: where the horizontal axis is labelled, with what.
        log: whether that axis is logarithmic.
    """

    title: str
    series: Mapping[str, Points]
    ticks: Sequence[tuple[float, str]]
    log: bool = False


def chart(panels: Sequence[Panel]) -> str:
    """All panels in one picture, with one legend. Percentages, between the nearest lines of the grid."""
    names = list(dict.fromkeys(name.removesuffix(BEFORE) for panel in panels for name in panel.series))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    width, height = LEFT + len(panels) * (WIDTH + GAP), HEIGHT + 2 * TOP + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for i, panel in enumerate(panels):
        parts += _panel(panel, LEFT + i * (WIDTH + GAP), colours)
    for i, name in enumerate(names):
        parts.append(f'<text x="{LEFT + 95 * i}" y="{HEIGHT + 2 * TOP + 12}" fill="{colours[name]}">{name}</text>')
    if any(name.endswith(BEFORE) for panel in panels for name in panel.series):
        told = "dashed, hollow: before recovery"
        parts.append(f'<text x="{LEFT}" y="{HEIGHT + 2 * TOP + 32}" fill="#525252">{told}</text>')
    return "\n".join([*parts, "</svg>", ""])


BEFORE = " (before)"


def _panel(panel: Panel, left: float, colours: Mapping[str, str]) -> list[str]:
    heights = [y for points in panel.series.values() for _, y in points]
    step = 5 if max(heights) - min(heights) <= 50 else 10
    low, high = step * math.floor(min(heights) / step), step * math.ceil(max(heights) / step)
    scale = math.log if panel.log else float
    ends = [scale(x) for x, _ in panel.ticks]
    first, last = min(ends), max(ends)

    def at(x: float, y: float) -> tuple[float, float]:
        share = (scale(x) - first) / max(last - first, 1e-9)
        return left + WIDTH * (0.04 + 0.92 * share), TOP + HEIGHT * (high - y) / max(high - low, 1)

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{panel.title}</text>']
    for percent in range(low, high + 1, step):
        y = at(panel.ticks[0][0], percent)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>')
    for x, label in panel.ticks:
        parts.append(f'<text x="{at(x, low)[0]:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{label}</text>')
    for name, points in panel.series.items():
        colour, places = colours[name.removesuffix(BEFORE)], [at(x, y) for x, y in sorted(points)]
        dashes, filling = (' stroke-dasharray="5 4"', "#fff") if name.endswith(BEFORE) else ("", colour)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{filling}" stroke="{colour}" stroke-width="1.5"/>'
            for x, y in places
        ]
    return parts
