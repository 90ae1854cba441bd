"""The nouns: what a site is made of, and what can be asked of several."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["linear", "pointwise", "bilinear", "heads"]
Quantity = Literal["width", "total", "scaling", "groups"]
RANK = ".rank"
"""After the path of a convolution, the name of the width between the two that it may become."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One dimension of one parameter, or of a buffer. Its size is `copies × groups × width × each × positions` of the
    site, copy after copy, in each copy group after group, in each group unit after unit. Several copies: a gated block
    whose value and gate are one matrix. Several positions: a linear map that reads a flattened image."""

    parameter: str
    dim: int
    copies: int = 1
    positions: int = 1


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Activations of one width: where they are seen, who writes them, who reads them."""

    module: str
    """The module whose `side` carries the activations, at each of its calls: in the second dimension where it is a
    convolution, else in the last."""
    side: Literal["input", "output"]
    writers: tuple[Axis, ...]
    readers: tuple[Axis, ...] = ()
    intercept: str | None = None
    """The readers' bias: it takes up the mean of what is dropped. Where there is none, the basis is about zero."""
    table: str | None = None
    """The parameter whose rows are the only activations that there are. Each counts once more than it was seen: what
    calibration rows do not hold may be met later, and a table of rare tokens would have no directions at all."""
    norm: str | None = None
    """The norm by batch statistics that follows the readers: in place of an intercept its statistics, gathered anew
    after a cut, take up the mean of what is dropped."""
    positions: int = 1
    """How many positions lie flattened behind each unit."""

    @property
    def is_centred(self) -> bool:
        """Whether a bias, or the statistics of a norm, can take up the mean of what is dropped."""
        return self.intercept is not None or self.norm is not None


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A plain attribute by which a module knows a width: `width`, `total` (groups × width × each), `scaling`
    (width^-½) or `groups`."""

    module: str
    name: str
    quantity: Quantity

    def value(self, width: int, groups: int, each: int = 1) -> int | float:
        """What the attribute must be at this width."""
        if self.quantity == "scaling":
            return width**-0.5
        return {"width": width, "total": groups * width * each, "groups": groups}[self.quantity]


@dataclass(frozen=True, kw_only=True)
class Absent:
    """What an attention without heads still does: the modules that its context, which is empty then, goes through."""

    module: str
    """Path of the attention."""
    after: tuple[str, ...] = ()
    """Names within it of what follows the context, in order."""
    norm: str | None = None
    """Name within it of the norm that is then taken of the sum with the attention's input."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One width of the network.

    Attributes:
        name: what the user calls it, for example `layer.3.ffn`.
        kind: the algebra that holds there.
        block: the part of the network it belongs to, in order of depth.
        width: size per group, in units.
        groups: how many groups (attention heads) have this width each.
        each: coordinates of a unit: where whole heads are the units, the width of a head.
        groups_of: name of the site whose width is this one's number of groups, and whose units are as wide as this
            one: heads, of which some may go.
        least: the smallest width, 0 where nothing may be kept: then the reader's bias is all that remains.
        absent: what takes the place of the module that does not run without units.
        streams: one, or for `bilinear` the two that meet in the product. Units may be read at several places, with
            other activations at each: as many streams, of which the first has the writers.
        shares: name of the width that it has in common with other sites.
        scope: path of the module whose call computes the block; None outside the stack of blocks, or where a module
            is called more than once in a forward pass.
        factorizes: path of an embedding that must first become table × projection for this width to exist, or of a
            convolution that must become two, on the stream's side of which the added one is 1 × 1.
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
    each: int = 1
    groups_of: str | None = None
    least: int = 1
    absent: Absent | None = None
    factorizes: str | None = None
    attributes: tuple[Attribute, ...] = ()
    setting: str | None = None
    scaled: bool = False

    @property
    def size(self) -> int:
        """Coordinates of a group."""
        return self.width * self.each

    @property
    def is_rank(self) -> bool:
        """Whether it is the width between the two convolutions that one may become."""
        return self.factorizes is not None and self.name == f"{self.factorizes}{RANK}"

    @property
    def projected(self) -> tuple[Stream, ...]:
        """The streams whose projection does what the cut does: of the two that meet in a product one is enough."""
        return self.streams[:1] if self.kind == "bilinear" else self.streams


def by_width(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites grouped by the width they share, in order."""
    groups: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        groups[site.shares] = (*groups.get(site.shares, ()), site)
    return groups


def after_cuts(sites: Iterable[Site], widths: Mapping[str, int]) -> tuple[Site, ...]:
    """These sites of a model, of which some have been cut to these widths, by name; full where one is missing.

    Where heads have gone, other sites have fewer groups; where heads are narrower, a head is a smaller unit. Sites
    without a group are gone too.
    """
    sites = tuple(sites)
    kept = {site.name: site.width for site in sites} | dict(widths)
    each = {site.groups_of: kept[site.name] for site in sites if site.groups_of}
    changed = (
        replace(
            site,
            width=kept[site.name],
            groups=kept.get(site.groups_of or "", site.groups),
            each=each.get(site.name, site.each),
        )
        for site in sites
    )
    return tuple(site for site in changed if site.groups)


def share_settings(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The same sites; those whose width one entry of a stock configuration gives share a width of that entry's name,
    which is at least 1 there."""
    return tuple(
        site if site.setting is None else replace(site, shares=site.setting, least=max(site.least, 1)) for site in sites
    )


def blocks_of(sites: Iterable[Site]) -> list[str]:
    """Paths of the blocks that the sites lie in, in order."""
    return list(dict.fromkeys(site.scope for site in sites if site.scope))
