"""The network's widths before and after, in one picture."""

from collections.abc import Mapping, Sequence

from rmtkd.planning import SitePlan
from rmtkd.reporting import numbers
from rmtkd.reporting.frame import picture, text
from rmtkd.reporting.markup import Html, element
from rmtkd.reporting.plans import kept, per_head

ROW, GAP, BAR = 20, 8, 10
LABEL, START, LENGTH, NUMBER = 36.0, 37.5, 38.5, 77.5
"""In percent of the width: where labels end, where bars begin, how long the longest is, where numbers begin."""
LONGEST_NAME = 20


def silhouette(key: str, sites: Sequence[SitePlan], widths: Mapping[str, int]) -> Html:
    """Every site as a bar: its full width pale, what is kept solid, all on one scale of coordinates.

    Args:
        key: see `picture`.
        sites: in order of depth.
        widths: kept width by site name.
    """
    longest = max((coordinates(site, widths)[0] for site in sites), default=1)
    parts, y, block = [], 0, None
    for site in sites:
        y += GAP if block not in (None, site.block) else 0
        parts.append(_bar(site, widths, y, longest))
        y, block = y + ROW, site.block
    narrowed = sum(widths[site.name] < site.width for site in sites)
    told = (
        f"{numbers.count(len(sites))} sites, {numbers.count(narrowed)} of them narrower than before. "
        "A pale bar is the full width, the solid part what is kept. The numbers stand in the table of sites."
    )
    return picture(key, "Widths before and after", told, *parts, height=y + 4, width=None)


def coordinates(site: SitePlan, widths: Mapping[str, int]) -> tuple[int, int]:
    """How many coordinates a site has in all its heads, and how many of them are kept."""
    heads = widths.get(site.groups_of or "", site.groups)
    return site.groups * site.width * site.each, heads * widths[site.name] * site.each


def _bar(site: SitePlan, widths: Mapping[str, int], y: int, longest: int) -> Html:
    full, stays = coordinates(site, widths)
    before, after = per_head(site, site.width), kept(site, widths)
    share = numbers.share(stays, full)

    def bar(count: int, class_: str) -> Html | None:
        length = f"{LENGTH * count / longest:.2f}%"
        return element("rect", x=f"{START}%", y=y + 5, width=length, height=BAR, rx=2, class_=class_) if count else None

    words = f"{before} → {after}" if stays < full else f"{before}, whole"
    return element(
        "g",
        element("title", f"{site.name}: {before} → {after}, {share}"),
        text(f"{LABEL}%", y + 14, shortened(site.name), "label end"),
        bar(full, "full"),
        bar(stays, "kept"),
        element(
            "text",
            words,
            element("tspan", f"\u2002{share}", class_="share") if stays < full else None,
            x=f"{NUMBER}%",
            y=y + 14,
            class_="label" if stays < full else "label muted",
        ),
    )


def shortened(name: str, most: int = LONGEST_NAME) -> str:
    """A name with its middle left out where it is long."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-(most - 1 - half) :]}"
