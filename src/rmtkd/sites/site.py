"""The nouns: what a site is made of, and what can be asked of several."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["linear", "pointwise", "bilinear"]
Quantity = Literal["width", "total", "scaling"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One dimension of one parameter. Its size is `copies × groups × width` of the site, copy after copy, and in each
    copy group after group. Several copies: a gated block whose value and gate are one matrix."""

    parameter: str
    dim: int
    copies: int = 1


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Activations of one width: where they are seen, who writes them, who reads them."""

    module: str
    """The module whose `side` carries the activations in its last dimension, at each of its calls."""
    side: Literal["input", "output"]
    writers: tuple[Axis, ...]
    readers: tuple[Axis, ...] = ()
    intercept: str | None = None
    """The readers' bias: it takes up the mean of what is dropped. Where there is none, the basis is about zero."""
    table: str | None = None
    """The parameter whose rows are the only activations that there are. Each counts once more than it was seen: what
    calibration rows do not hold may be met later, and a table of rare tokens would have no directions at all."""


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A plain attribute by which a module knows a width: `width`, `total` (groups × width) or `scaling` (width^-½)."""

    module: str
    name: str
    quantity: Quantity

    def value(self, width: int, groups: int) -> int | float:
        """What the attribute must be at this width."""
        return {"width": width, "total": groups * width, "scaling": width**-0.5}[self.quantity]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One width of the network.

    Attributes:
        name: what the user calls it, for example `layer.3.ffn`.
        kind: the algebra that holds there.
        block: the part of the network it belongs to, in order of depth.
        width: size per group.
        groups: how many groups (attention heads) have this width each.
        streams: one, or for `bilinear` the two that meet in the product.
        shares: name of the width that it has in common with other sites.
        scope: path of the module whose call computes the block; None outside the stack of blocks, or where a module
            is called more than once in a forward pass.
        factorizes: path of an embedding that must first become table × projection for this width to exist.
        attributes: plain attributes to be set together with the width.
        setting: entry of a stock configuration that gives this width, one for all sites that name it; None where no
            stock configuration can say the width.
        scaled: whether the network divides the product by the square root of the width that it finds; the old one is
            folded into the writer.
    """

    name: str
    kind: Kind
    block: str
    width: int
    streams: tuple[Stream, ...]
    shares: str
    scope: str | None = None
    groups: int = 1
    factorizes: str | None = None
    attributes: tuple[Attribute, ...] = ()
    setting: str | None = None
    scaled: bool = False

    @property
    def is_centred(self) -> bool:
        """Whether a bias can take up the mean of what is dropped."""
        return self.streams[0].intercept is not None


def by_width(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites grouped by the width they share, in order."""
    groups: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        groups[site.shares] = (*groups.get(site.shares, ()), site)
    return groups


def share_settings(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The same sites; those whose width one entry of a stock configuration gives share a width of that entry's name."""
    return tuple(site if site.setting is None else replace(site, shares=site.setting) for site in sites)


def blocks_of(sites: Iterable[Site]) -> list[str]:
    """Paths of the blocks that the sites lie in, in order."""
    return list(dict.fromkeys(site.scope for site in sites if site.scope))
