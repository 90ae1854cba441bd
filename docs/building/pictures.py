"""The pictures of the pages, from the records of the repository: python docs/building/pictures.py

`bulks.svg` puts two spectra beside the law of noise, `widths.svg` what widths cost and which were chosen. `fold.svg`
shows no data and is drawn by hand.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rmtkd.spectra import MarchenkoPastur, MarchenkoPasturRule, Spectrum

DOCS = Path(__file__).parents[1]
RECORDS = DOCS.parent / "benchmarks" / "results"
WIDE, HIGH, EDGE = 330, 220, 50
SIGNAL, NOISE, INK = "#b2182b", "#2166ac", "#333"
COLOURS = ("#440154", "#31688e", "#35b779", "#d95f02")
LEAST = 1e-6
"""Losses below this are drawn at it."""


def picture(parts: Sequence[str], panels: int) -> str:
    """Parts in one picture."""
    width, height = panels * (WIDE + EDGE) + EDGE // 2, HIGH + 90
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
    return "\n".join([f'{head}font-size="12">', '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>", ""])


def words(x: float, y: float, text: str, more: str = "") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}"{more}>{text}</text>'


def histogram(spectrum: Spectrum, panel: int, title: str) -> list[str]:
    """The eigenvalues below three edges, in blue below the edge of the rule and in red above it; and the fitted law."""
    values = np.sort(spectrum.eigenvalues.ravel())
    found = MarchenkoPasturRule()(spectrum)
    law, last = MarchenkoPastur(q=found.q, sigma2=found.sigma2), 3 * found.edge
    counts, ends = np.histogram(values, bins=48, range=(0, last))
    grid = np.linspace(0, last, 241)
    drawn = law.pdf(grid) * len(values) * (ends[1] - ends[0])
    left, bottom, most = EDGE + panel * (WIDE + EDGE), HIGH + 40, float(max(counts.max(), drawn.max()))
    parts = [words(left, 22, title, ' font-weight="bold"')]
    for i, count in enumerate(counts):
        if count:
            high, colour = HIGH * count / most, NOISE if ends[i + 1] <= found.edge else SIGNAL
            x, wide = left + WIDE * i / len(counts), WIDE / len(counts) - 0.8
            parts.append(
                f'<rect x="{x:.1f}" y="{bottom - high:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="{colour}" '
                'fill-opacity="0.55"/>'
            )
    line = " ".join(
        f"{left + WIDE * x / last:.1f},{bottom - HIGH * y / most:.1f}" for x, y in zip(grid, drawn, strict=True)
    )
    at = left + WIDE / 3
    above = int((values > found.edge).sum())
    return [
        *parts,
        f'<polyline points="{line}" fill="none" stroke="{INK}" stroke-width="1.5"/>',
        f'<line x1="{at:.1f}" y1="40" x2="{at:.1f}" y2="{bottom}" stroke="{INK}" stroke-dasharray="4 3"/>',
        words(at + 5, 52, "edge λ₊"),
        words(at + 5, 68, f"{above} of {len(values)} above"),
        words(at + 5, 84, f"KS {found.ks:.2f}"),
        f'<line x1="{left}" y1="{bottom}" x2="{left + WIDE}" y2="{bottom}" stroke="{INK}"/>',
        words(left, bottom + 16, "0"),
        words(left + WIDE, bottom + 16, "3 λ₊", ' text-anchor="end"'),
        words(left + WIDE / 2, bottom + 34, "eigenvalue", ' text-anchor="middle"'),
    ]


def noise_with_signal(width: int = 256, samples: int = 2560, seed: int = 0) -> Spectrum:
    """Independent noise with ten planted directions of 8 … 1.3 times its edge."""
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((samples, width))
    edge = (1 + np.sqrt(width / samples)) ** 2
    data[:, :10] *= np.sqrt(edge * np.geomspace(8, 1.3, 10))
    eigenvalues = np.linalg.eigvalsh(np.cov(data.T))[::-1]
    return Spectrum(eigenvalues=eigenvalues[None], samples=samples)


def stored(file: str, stream: str) -> Spectrum:
    """A spectrum of the records."""
    with np.load(RECORDS / file) as arrays:
        return Spectrum(eigenvalues=arrays[f"{stream}/eigenvalues"], samples=int(arrays[f"{stream}/samples"]))


def bulks() -> str:
    """A spectrum that has a bulk, and one of a trained layer, which has none."""
    layer = stored("layers/sst2.npz", "layer.0.ffn/0")
    left = histogram(noise_with_signal(), 0, "noise, ten directions planted")
    return picture([*left, *histogram(layer, 1, "MiniLM-L6 on SST-2, layer.0.ffn")], 2)


def curve_panel(plan: dict[str, Any], ending: str, panel: int, title: str) -> list[str]:
    """What the widths of one kind cost, each alone, and the ones that were chosen."""
    left, bottom = EDGE + panel * (WIDE + EDGE), HIGH + 40
    kept = {site["shares"]: (site["keep"], site["width"]) for site in plan["sites"]}
    parts = [words(left, 22, title, ' font-weight="bold"')]

    def place(share: float, loss: float) -> tuple[float, float]:
        return left + WIDE * share, bottom - HIGH * (np.log10(max(loss, LEAST)) + 6) / 6

    for power in range(-6, 1, 2):
        y = place(0, 10.0**power)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDE}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(
            words(left - 4, y + 4, f"10{'⁰⁻'[power < 0]}{'⁰¹²³⁴⁵⁶'[-power] if power else ''}", ' text-anchor="end"')
        )
    names = [name for name in plan["curves"] if name.endswith(ending)]
    for i, name in enumerate(names):
        curve, (keep, width) = plan["curves"][name], kept[name]
        points = [place(w / width, loss) for w, loss in zip(curve["widths"], curve["losses"], strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        x, y = place(
            keep / width, float(np.exp(np.interp(keep, curve["widths"], np.log(np.maximum(curve["losses"], LEAST)))))
        )
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        parts.append(words(left + WIDE - 4, 54 + 16 * i, name, f' text-anchor="end" style="fill:{colour}"'))
    for share in (0, 50, 100):
        parts.append(words(left + WIDE * share / 100, bottom + 16, f"{share} %", ' text-anchor="middle"'))
    parts.append(words(left + WIDE / 2, bottom + 34, "share of the width that is kept", ' text-anchor="middle"'))
    return parts


def widths() -> str:
    """What feed-forward widths and heads of the digits' model cost, and what was chosen at a quarter."""
    plan = json.loads((RECORDS / "recipes" / "digits-plan.json").read_text())
    left = curve_panel(plan, ".ffn", 0, "feed-forward width: loss, nats")
    return picture([*left, *curve_panel(plan, ".heads", 1, "heads: loss, nats")], 2)


PICTURES = {"bulks.svg": bulks, "widths.svg": widths}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")
