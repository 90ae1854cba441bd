"""Sites: the widths of a network that may be narrowed, as data.

A *site* names the parameters that write a width, those that read it, where its activations are seen, and the *kind*
of algebra that the network allows there:

| kind | what lies between writer and reader | exact | cut |
|---|---|---|---|
| `linear` | nothing, or a map that acts on other axes | any change of basis | best low rank for the reader |
| `pointwise` | a pointwise non-linearity | permutation, scaling | units; least squares into the reader |
| `bilinear` | two streams meet in a scalar product | paired change of basis | best low rank of the product |

Sites that must keep one common width (query/key and value/output of a layer, so that the stock forward and the fused
attention kernel survive) carry the same `shares`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn

from rmtkd.errors import UnsupportedModelError
from rmtkd.families import FAMILIES, EncoderFamily
from rmtkd.modules import FactorizedEmbedding

Kind = Literal["linear", "pointwise", "bilinear"]
Quantity = Literal["width", "total", "scaling"]
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One dimension of one parameter. Its size is `groups × width` of the site, group after group."""

    parameter: str
    dim: int


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Activations of one width: where they are seen, who writes them, who reads them."""

    module: str
    """The module whose `side` carries the activations in its last dimension."""
    side: Literal["input", "output"]
    writers: tuple[Axis, ...]
    readers: tuple[Axis, ...] = ()
    intercept: str | None = None
    """The readers' bias: it takes up the mean of what is dropped."""


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
        scope: path of the module whose call computes the block; None outside the stack of blocks.
        factorizes: path of an embedding that must first become table × projection for this width to exist.
        attributes: plain attributes to be set together with the width.
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


def find_family(model: nn.Module) -> EncoderFamily:
    """The family whose table describes this model.

    Raises:
        UnsupportedModelError: if there is none, or if the model's head is of another kind than single-label
            classification.
    """
    class_name = type(model).__name__
    supported = ", ".join(family.model_class for family in FAMILIES)
    for family in FAMILIES:
        if class_name in family.refused_classes:
            raise UnsupportedModelError(
                f"the model must have a single-label classification head. {class_name} has "
                f"{family.refused_classes[class_name]}. Use {family.model_class}; nothing was changed."
            )
        if class_name == family.model_class:
            _check_config(model, class_name)
            return family
    raise UnsupportedModelError(
        f"the model must be one of: {supported}. Got {class_name}, whose widths rmtkd does not know. Nothing was "
        "changed."
    )


def find_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every width of the model that may be narrowed, shallow to deep.

    Args:
        model: a supported model, also one that was compressed before.

    Raises:
        UnsupportedModelError: naming the class, the head, the part or the precision that is not understood.
    """
    family = find_family(model)
    sites = [_embedding_site(model, family.word_embeddings)]
    for i in range(len(_expect(model, family.layers, nn.ModuleList))):
        sites += _layer_sites(model, family, i)
    _check_precision(model)
    _check_untied(model, sites)
    return tuple(sites)


def by_width(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites grouped by the width they share, in order."""
    groups: dict[str, tuple[Site, ...]] = {}
    for site in sites:
        groups[site.shares] = (*groups.get(site.shares, ()), site)
    return groups


def _check_config(model: nn.Module, class_name: str) -> None:
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification") or getattr(config, "num_labels", None) == 1:
        head = problem or "regression (one output)"
        raise UnsupportedModelError(
            f"the head must be single-label classification. This {class_name} has problem type {head}, for which "
            "recovery has no loss. Nothing was changed."
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"the encoder must be bidirectional without cross-attention. This {class_name} is a decoder. Nothing was "
            "changed."
        )


def _check_precision(model: nn.Module) -> None:
    """Half precision drowns the small eigenvalues, the check of a cut and the small steps of recovery in rounding."""
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModelError(
                f"parameters must be float32 or float64. {name} is {parameter.dtype}. Call `model.float()` first: "
                "recovery uses bfloat16 by itself where that is faster. Nothing was changed."
            )


def _check_untied(model: nn.Module, sites: Iterable[Site]) -> None:
    """A parameter with two names (layers that share their weights) would be folded twice."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    touched = {axis.parameter for site in sites for stream in site.streams for axis in stream.writers + stream.readers}
    for tied in names.values():
        if len(tied) > 1 and touched.intersection(tied):
            raise UnsupportedModelError(
                f"a parameter around a site must belong to one module. {' and '.join(tied)} are the same. Give each "
                "its own copy; nothing was changed."
            )


def _expect(model: nn.Module, path: str, *kinds: type[M]) -> M:
    """The submodule at `path`, exactly of one of these types: a subclass (a quantised layer, an adapter) may compute
    something else with its weight."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, kinds) or type(module) not in kinds:
        expected = " or ".join(kind.__name__ for kind in kinds)
        found = "nothing" if module is None else type(module).__name__
        raise UnsupportedModelError(
            f"{path} must be {expected}. Got {found}, which rmtkd cannot cut. Replace it by its plain form first; "
            "nothing was changed."
        )
    return module


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = _expect(model, path, nn.Linear)
    own = dict(module.named_parameters())
    if "weight" not in own:
        raise UnsupportedModelError(
            f"{path} must hold its weight as a parameter. It computes it from {', '.join(own)}. Make the pruning or "
            "parametrization permanent first; nothing was changed."
        )
    if "bias" not in own:
        raise UnsupportedModelError(
            f"{path} must have a bias, into which the mean of dropped directions folds. It has none. "
            "Nothing was changed."
        )
    return module


def _writer(path: str) -> tuple[Axis, Axis]:
    return Axis(parameter=f"{path}.weight", dim=0), Axis(parameter=f"{path}.bias", dim=0)


def _embedding_site(model: nn.Module, path: str) -> Site:
    embedding = _expect(model, path, nn.Embedding, FactorizedEmbedding)
    factorized = isinstance(embedding, FactorizedEmbedding)
    width = embedding.table.embedding_dim if factorized else embedding.embedding_dim
    table, projection = FactorizedEmbedding.names(path)
    # Before the embedding is factorised, the table's own output is the width; afterwards, the projection's input.
    stream = Stream(
        module=projection if factorized else path,
        side="input" if factorized else "output",
        writers=(Axis(parameter=f"{table}.weight", dim=1),),
        readers=(Axis(parameter=f"{projection}.weight", dim=1),),
        intercept=f"{projection}.bias",
    )
    return Site(
        name="embeddings.word",
        kind="linear",
        block="embeddings",
        width=width,
        streams=(stream,),
        shares="embeddings.word",
        factorizes=None if factorized else path,
    )


def _layer_sites(model: nn.Module, family: EncoderFamily, i: int) -> tuple[Site, ...]:
    def path(part: str) -> str:
        return f"{family.layers}.{i}.{part}"

    query, key, value, output = (path(p) for p in (family.query, family.key, family.value, family.attention_output))
    ffn_in, ffn_out = path(family.ffn_in), path(family.ffn_out)
    for part in (query, key, value, output, ffn_in, ffn_out):
        _linear(model, part)
    attention = model.get_submodule(path(family.attention))
    if type(attention).__name__ != family.attention_class:
        raise UnsupportedModelError(
            f"{path(family.attention)} must be {family.attention_class}. Got {type(attention).__name__}, which may do "
            "more than a scaled product. Replace it by its plain form first; nothing was changed."
        )
    if getattr(model.get_submodule(f"{family.layers}.{i}"), family.chunk_size, 0):
        raise UnsupportedModelError(
            f"{family.layers}.{i}.{family.chunk_size} must be 0, else activations come in pieces. Set it to 0, the "
            "outputs stay the same; nothing was changed."
        )
    heads = getattr(attention, family.heads)
    head_width = getattr(attention, family.head_size)
    for part in (query, key, value):
        if _linear(model, part).out_features != heads * head_width:
            raise UnsupportedModelError(
                f"{part} must write {heads} heads of {head_width}. It writes {_linear(model, part).out_features}. "
                "Its head size is stale or its heads differ; nothing was changed."
            )
    if abs(getattr(attention, family.scaling) - head_width**-0.5) > 1e-9:
        raise UnsupportedModelError(
            f"{path(family.attention)}.{family.scaling} must be head size^-½ = {head_width**-0.5:.6g}. Got "
            f"{getattr(attention, family.scaling):.6g}. Fold the factor into the query first; nothing was changed."
        )
    block, scope = f"layer.{i}", f"{family.layers}.{i}"
    attributes: tuple[tuple[str, Quantity], ...] = (
        (family.head_size, "width"),
        (family.all_head_size, "total"),
        (family.scaling, "scaling"),
    )
    return (
        Site(
            name=f"{block}.query_key",
            kind="bilinear",
            block=block,
            width=head_width,
            groups=heads,
            streams=tuple(Stream(module=p, side="output", writers=_writer(p)) for p in (query, key)),
            shares=f"{block}.head",
            scope=scope,
            attributes=tuple(
                Attribute(module=path(family.attention), name=name, quantity=quantity) for name, quantity in attributes
            ),
        ),
        Site(
            name=f"{block}.value",
            kind="linear",
            block=block,
            width=head_width,
            groups=heads,
            streams=(
                Stream(
                    module=output,
                    side="input",
                    writers=_writer(value),
                    readers=(Axis(parameter=f"{output}.weight", dim=1),),
                    intercept=f"{output}.bias",
                ),
            ),
            shares=f"{block}.head",
            scope=scope,
        ),
        Site(
            name=f"{block}.ffn",
            kind="pointwise",
            block=block,
            width=_linear(model, ffn_in).out_features,
            streams=(
                Stream(
                    module=ffn_out,
                    side="input",
                    writers=_writer(ffn_in),
                    readers=(Axis(parameter=f"{ffn_out}.weight", dim=1),),
                    intercept=f"{ffn_out}.bias",
                ),
            ),
            shares=f"{block}.ffn",
            scope=scope,
        ),
    )
