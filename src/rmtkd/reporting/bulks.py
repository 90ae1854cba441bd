"""The spectrum of a site in a picture: its directions in order, the law of noise, the edge, and what is kept."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from rmtkd.planning import SitePlan
from rmtkd.reporting import numbers
from rmtkd.reporting.frame import WIDTH, Frame, Scale, decade, path_of, picture, text
from rmtkd.reporting.markup import Html, element
from rmtkd.reporting.plans import kept, per_head
from rmtkd.reporting.silhouette import coordinates
from rmtkd.spectra import MarchenkoPastur, Spectrum
from rmtkd.spectra.spectrum import most_ks

TOP, BOTTOM, LEFT, MIDDLE, RIGHT = 18, 176, 42, 256, WIDTH - 6
HEIGHT = 216
POINTS, BINS = 80, 28
DECADES = 9
"""Eigenvalues further below the largest are drawn at the foot: rounding, or nothing."""


def spectrum_picture(key: str, site: SitePlan, spectrum: Spectrum, widths: Mapping[str, int]) -> Html:
    """The eigenvalues of the stream that decided, over all heads (each over its level), largest first; beside them, how
    many lie where.

    Args:
        key: see `picture`.
        site: of the plan.
        spectrum: of its stream.
        widths: kept width by site name.
    """
    values = _levelled(site, spectrum)
    stays = min(coordinates(site, widths)[1], len(values))
    frame = _frame(values)
    law = law_of(site)
    edge = site.edge * site.multiplier
    parts = [
        _kept(frame, stays, len(values)),
        frame.rows([(tick, decade(tick)) for tick in frame.y.ticks()]),
        frame.columns([(1, "1"), (len(values), numbers.count(len(values)))], "directions, largest first"),
        text(MIDDLE + 4, BOTTOM + 31, "how many there", "name"),
        _histogram(frame, values),
        _law(frame, values, law, site),
        _directions(frame, values, stays),
        _edge(frame, edge, _edge_words(site)) if edge > 0 else None,
    ]
    told = (
        f"{numbers.count(len(values))} eigenvalues from {numbers.small(float(values[0]))} down to "
        f"{numbers.small(float(values[-1]))}. {bulk_sentence(site, spectrum)}"
    )
    return picture(key, f"Spectrum of {site.name}", told, *parts, height=HEIGHT)


def law_of(site: SitePlan) -> MarchenkoPastur | None:
    """The Marchenko–Pastur law that the rule fitted; None where the rule has another law, or none."""
    return MarchenkoPastur(q=site.q, sigma2=site.sigma2) if site.rule == "mp" and site.sigma2 > 0 else None


def kept_sentence(site: SitePlan, widths: Mapping[str, int]) -> str:
    """What is kept of a site."""
    before, after = per_head(site, site.width), kept(site, widths)
    full, stays = coordinates(site, widths)
    return (
        f"keeps {before}, the whole" if stays == full else f"keeps {after} of {before} ({numbers.share(stays, full)})"
    )


def bulk_sentence(site: SitePlan, spectrum: Spectrum) -> str:
    """What the edge is worth: whether noise explains what lies below.

    Args:
        site: of the plan.
        spectrum: see `spectrum_picture`.
    """
    if site.edge == 0:
        return " ".join(site.remarks) or "There is no edge here."
    factor = "" if site.multiplier == 1 else f", moved by the factor {numbers.small(site.multiplier)} for the target"
    where = f"Edge {numbers.small(site.edge)}{factor}"
    if site.misfit:
        edge = "only a threshold on a quantile" if site.rule == "mp" else "only a convention"
        return f"{where}. KS {site.ks:.2f}: no bulk of noise fits here, so the edge is {edge}."
    if site.ks > most_ks(_below(site, _levelled(site, spectrum))):
        return (
            f"{where}. KS {site.ks:.2f}: white noise does not explain what lies below, nor does {site.rule} take it to."
        )
    return f"{where}. KS {site.ks:.2f}: noise explains what lies below."


def _levelled(site: SitePlan, spectrum: Spectrum) -> Float[np.ndarray, " count"]:
    """The eigenvalues of all heads, each over its level, largest first."""
    levels = np.array(site.levels or (1.0,))[:, None]
    return np.sort((spectrum.eigenvalues / levels).ravel())[::-1]


def _below(site: SitePlan, values: Float[np.ndarray, " count"]) -> int:
    """How many eigenvalues lie at or below the edge, but for zeros."""
    return int(np.count_nonzero((values > 0) & (values <= site.edge)))


def _frame(values: Float[np.ndarray, " count"]) -> Frame:
    """Directions across, eigenvalues upwards by factors."""
    largest = float(values[0]) if values[0] > 0 else 1.0
    alive = values[values > largest * 10.0**-DECADES]
    least = float(alive[-1]) if len(alive) else largest / 10
    return Frame(
        x=Scale(low=1, high=max(2, len(values)), start=LEFT, end=MIDDLE - 8),
        y=Scale(low=min(least, largest / 10) * 0.8, high=largest * 1.25, start=BOTTOM, end=TOP, log=True),
    )


def _kept(frame: Frame, stays: int, count: int) -> Html | None:
    """The ground behind as many directions as are kept."""
    if stays == 0:
        return None
    end = frame.x(stays + 0.5) if stays < count else frame.x.end
    label = text(LEFT + 3, TOP - 6, f"{numbers.count(stays)} kept", "tick kept-word")
    ground = element("rect", x=LEFT, y=TOP, width=max(1.0, end - LEFT), height=BOTTOM - TOP, class_="ground")
    return Html(ground + label)


def _directions(frame: Frame, values: Float[np.ndarray, " count"], stays: int) -> list[Html]:
    """The eigenvalues, those of as many as are kept stronger."""
    chosen = np.unique(
        np.r_[np.arange(min(12, len(values))), np.linspace(0, len(values) - 1, POINTS).round().astype(int)]
    )
    points = [frame.point(int(i) + 1, float(values[i])) for i in chosen]
    inside = sum(int(i) < stays for i in chosen)
    paths = []
    if inside < len(points):
        paths.append(element("path", d=path_of(points[max(0, inside - 1) :]), class_="curve dropped"))
    if inside:
        paths.append(element("path", d=path_of(points[:inside]), class_="curve stays"))
    return paths


def _law(frame: Frame, values: Float[np.ndarray, " count"], law: MarchenkoPastur | None, site: SitePlan) -> list[Html]:
    """Where the eigenvalues at or below the edge would lie if they were noise, and their density beside it."""
    below = _below(site, values)
    if law is None or below == 0:
        return []
    count = np.count_nonzero(values > 0)
    ranks = np.unique(np.linspace(0, below - 1, min(below, POINTS // 2)).round().astype(int))
    atom = max(0.0, 1 - 1 / law.q)
    expected = law.ppf(atom + (1 - atom) * (1 - (ranks + 0.5) / below))
    scree = [frame.point(int(count - below + rank) + 1, float(x)) for rank, x in zip(ranks, expected, strict=True)]
    edges = np.geomspace(max(law.lower, frame.y.low), law.upper, POINTS // 2 + 1)
    masses = below * np.diff(law.cdf(edges)) / (1 - atom) / np.diff(np.log(edges))
    class_ = "law misfit" if site.misfit else "law"
    across = _across(frame, values)
    middles = np.sqrt(edges[1:] * edges[:-1])
    density = [(across(float(mass)), frame.y(float(x))) for x, mass in zip(middles, masses, strict=True)]
    density = [(MIDDLE, frame.y(float(edges[0]))), *density, (MIDDLE, frame.y(float(edges[-1])))]
    return [element("path", d=path_of(points), class_=class_) for points in (scree, density)]


def _histogram(frame: Frame, values: Float[np.ndarray, " count"]) -> Html:
    """How many eigenvalues lie where, by equal factors."""
    heights, edges = _counts(frame, values)
    across = _across(frame, values)
    points: list[tuple[float, float]] = [(MIDDLE, frame.y(float(edges[0])))]
    for height, low, high in zip(heights, edges[:-1], edges[1:], strict=True):
        points += [(across(float(height)), frame.y(float(low))), (across(float(height)), frame.y(float(high)))]
    points.append((MIDDLE, frame.y(float(edges[-1]))))
    return element("path", d=path_of(points) + "Z", class_="histogram")


def _counts(
    frame: Frame, values: Float[np.ndarray, " count"]
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " ends"]]:
    """Eigenvalues by unit of their logarithm, in each bin."""
    edges = np.geomspace(frame.y.low, frame.y.high, BINS + 1)
    return np.histogram(values, edges)[0] / np.diff(np.log(edges)), edges


def _across(frame: Frame, values: Float[np.ndarray, " count"]) -> Scale:
    """The axis of the histogram."""
    return Scale(low=0, high=max(1.0, 1.1 * float(_counts(frame, values)[0].max())), start=MIDDLE, end=RIGHT)


def _edge_words(site: SitePlan) -> str:
    """The edge that counts: a target may move all edges by one factor."""
    return "edge" if site.multiplier == 1 else f"edge × {numbers.small(site.multiplier)}"


def _edge(frame: Frame, edge: float, words: str) -> list[Html]:
    y = frame.y(edge)
    return [
        element("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="edge"),
        text(RIGHT, y - 4 if y > TOP + 12 else y + 11, words, "tick end edge-word"),
    ]


def decided(site: SitePlan, streams: Sequence[Spectrum]) -> Spectrum | None:
    """The spectrum of the stream that decided on a site: the one of which the plan tells the energy. None where it is
    not stored."""

    def energy(spectrum: Spectrum) -> float:
        total = float(spectrum.eigenvalues.sum())
        return float(spectrum.eigenvalues[:, : site.keep * site.each].sum()) / total if total > 0 else 1.0

    return min(streams, key=lambda spectrum: abs(energy(spectrum) - site.energy), default=None)
