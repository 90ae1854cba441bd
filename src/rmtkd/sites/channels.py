"""What a walk through a graph knows of channels: which widths there are, and where an activation holds them."""

from dataclasses import dataclass, field

from rmtkd.sites.site import Attribute, Axis


@dataclass(eq=False)
class Width:
    """Channels that must stay or go together."""

    size: int
    order: int
    """Place in the graph where they first are."""
    writers: list[Axis] = field(default_factory=list)
    readers: list["Reader"] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    writing: list[str] = field(default_factory=list)
    """Paths of the convolutions and linear maps that write it."""
    whole: str | None = None
    """Why it must stay as it is."""
    rotates: bool = True
    """Whether nothing but maps has been seen to touch it, which a rotation goes through."""
    same_as: "Width | None" = None


@dataclass(frozen=True)
class Reader:
    """A convolution or linear map that reads a width."""

    module: str
    positions: int = 1
    norm: str | None = None
    intercept: str | None = None


@dataclass(frozen=True)
class Channels:
    """Which dimension of an activation holds which width, and how many positions lie flattened behind each channel."""

    width: Width
    dim: int
    positions: int = 1


def width_of(width: Width) -> Width:
    """The width that this one has become part of."""
    while width.same_as is not None:
        width = width.same_as
    return width


def unite(a: Width, b: Width) -> Width:
    """One width of two."""
    a, b = sorted((width_of(a), width_of(b)), key=lambda width: width.order)
    if a is not b:
        b.same_as = a
        for name in ("writers", "readers", "attributes", "writing"):
            mine = getattr(a, name)
            mine += [part for part in getattr(b, name) if part not in mine]
        a.whole = a.whole or b.whole
        a.rotates = a.rotates and b.rotates
    return a
