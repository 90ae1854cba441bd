"""The usual sites of any `nn.Module`, made from the paths of its parts. They read shapes and check; they run nothing.

A table of a model of one's own is a few of these:

```python
sites = (
    embedding_site(model, "words"),
    *attention_sites(model, "layer.0", query="layer.0.q", key="layer.0.k", value="layer.0.v", output="layer.0.o",
                     heads=8, attributes={"layer.0.head_width": "width"}),
    feed_forward_site(model, "layer.0.ffn", writers=["layer.0.up"], reader="layer.0.down"),
)
```

What they cannot see is the `forward` between the parts. `surgery.check_cut` compares every cut with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from torch import nn

from rmtkd.errors import UnsupportedModelError, check_choice
from rmtkd.measurement import evaluation
from rmtkd.modeling_rmtkd import EmbeddingLevel, EmbeddingLevels, FactorizedEmbedding, FactorizedLevel
from rmtkd.sites.site import Absent, Attribute, Axis, Quantity, Site, Stream

M = TypeVar("M", bound=nn.Module)


def embedding_site(
    model: nn.Module, path: str, *, name: str = "embeddings.word", block: str = "embeddings", least: int = 1
) -> Site:
    """The width of an embedding table, whole or cut before: it becomes table × projection.

    Args:
        model: the model that holds it.
        path: of an `nn.Embedding`, or of the `FactorizedEmbedding` that a cut has put there; or of one level.
        name: of the site.
        block: the part of the network that it belongs to.
        least: the smallest width, see `Site`.

    Raises:
        UnsupportedModelError: if something else is there.
    """
    embedding = expect(model, path, nn.Embedding, EmbeddingLevel, FactorizedEmbedding, FactorizedLevel)
    factorized, is_level = isinstance(embedding, FactorizedEmbedding), isinstance(embedding, EmbeddingLevel)
    # Before the embedding is factorised, the table's own output is the width; afterwards, the projection's input.
    stream = Stream(
        module=f"{path}.projection" if factorized else path,
        side="input" if factorized else "output",
        writers=(Axis(parameter=f"{path}.weight", dim=1),),
        readers=(Axis(parameter=f"{path}.projection.weight", dim=1),),
        intercept=None if is_level else f"{path}.projection.bias",
        table=f"{path}.weight" if is_level else None,
    )
    return Site(
        name=name,
        kind="linear",
        block=block,
        width=embedding.embedding_dim,
        streams=(stream,),
        shares=name,
        least=least,
        factorizes=None if factorized else path,
    )


def embedding_sites(
    model: nn.Module, path: str, *, name: str = "embeddings.word", block: str = "embeddings"
) -> tuple[Site, ...]:
    """The widths of an embedding: one, or of an embedding in levels (`modules.split_embedding`) one a level. After the
    first a level may go, whose tokens are zeros then; a level that has gone is no site.

    Raises:
        UnsupportedModelError: if something else is there.
    """
    embedding = dict(model.named_modules()).get(path)
    if not isinstance(embedding, EmbeddingLevels):
        return (embedding_site(model, path, name=name, block=block),)
    return tuple(
        embedding_site(model, f"{path}.levels.{i}", name=f"{name}.{i}", block=block, least=int(i == 0))
        for i, level in enumerate(embedding.levels)
        if level.embedding_dim  # type: ignore[union-attr]
    )


def linear_site(
    model: nn.Module,
    name: str,
    *,
    writer: str,
    reader: str,
    groups: int = 1,
    block: str | None = None,
    shares: str | None = None,
    scope: str | None = None,
) -> Site:
    """The width between two linear maps with nothing between them, or a map that acts on other axes.

    Args:
        model: the model that holds them.
        name: of the site.
        writer: path of the first `nn.Linear`.
        reader: path of the second.
        groups: how many widths lie side by side, none of which is mixed with another (attention heads).
        block: the part of the network that it belongs to; its own name by default.
        shares: name of the width that it has in common with other sites; its own by default.
        scope: path of the module whose single call computes the block.

    Raises:
        UnsupportedModelError: if a part is no plain linear map or has another width.
    """
    stream = _between(model, (writer,), reader)
    return Site(
        name=name,
        kind="linear",
        block=block or name,
        width=_share(reader, linear(model, reader).in_features, groups),
        groups=groups,
        streams=(stream,),
        shares=shares or name,
        scope=scope,
    )


def feed_forward_site(
    model: nn.Module,
    name: str,
    *,
    writers: Sequence[str],
    reader: str,
    copies: int = 1,
    activation: str | None = None,
    block: str | None = None,
    scope: str | None = None,
) -> Site:
    """The inner width of a feed-forward block: a pointwise non-linearity between writer and reader, or several writers
    whose outputs are multiplied unit by unit.

    Args:
        model: the model that holds them.
        name: of the site.
        writers: paths of the `nn.Linear`s that write the width: one, or value and gate.
        reader: path of the `nn.Linear` that reads it.
        copies: how many times each writer lays out the width; 2 where value and gate are chunks of one output.
        activation: attribute that holds the non-linearity; then it is tried whether it is pointwise.
        block: the part of the network that it belongs to; its own name by default.
        scope: path of the module whose single call computes the block.

    Raises:
        UnsupportedModelError: if a part is no plain linear map or has another width, or the activation mixes units.
    """
    width = linear(model, reader).in_features
    stream = _between(model, writers, reader, copies)
    if activation is not None:
        _check_pointwise(model, activation)
    return Site(
        name=name,
        kind="pointwise",
        block=block or name,
        width=width,
        streams=(stream,),
        shares=name,
        scope=scope,
        least=0,
    )


def attention_sites(
    model: nn.Module,
    block: str,
    *,
    query: str,
    key: str,
    value: str,
    output: str,
    heads: int,
    attributes: Mapping[str, Quantity] | None = None,
    scaled: bool = True,
    scope: str | None = None,
    absent: Absent | None = None,
) -> tuple[Site, ...]:
    """The heads and the head width of an attention whose scores are a plain product of queries and keys: no rotation
    by position, no norm of their own. The number of heads is a site where an attribute says it; two more sites share
    the head width: query/key and value/output.

    Args:
        model: the model that holds them.
        block: the part of the network that it belongs to; the sites are `block.heads`, `block.query_key` and
            `block.value`.
        query: path of the `nn.Linear` that writes the queries, head after head.
        key: of the keys, in as many heads.
        value: of the values, in as many heads.
        output: of the `nn.Linear` that reads all heads.
        heads: number of heads.
        attributes: attributes by which modules know the width, as `path.to.module.name: quantity`. Without one for the
            `groups`, which are the heads, their number stays as it is.
        scaled: whether scores are divided by the square root of the head width that the module finds, in its weights
            or attributes; False where the factor is a constant.
        scope: path of the module whose single call computes the block.
        absent: how the attention runs without heads; at least one is kept by default.

    Raises:
        UnsupportedModelError: if a part is no plain linear map, has another width, or an attribute is stale.
    """
    width = _share(query, linear(model, query).out_features, heads)
    for path in (query, key, value):
        if (found := linear(model, path).out_features) != heads * width:
            raise UnsupportedModelError(
                f"{path} must write {heads} heads of {width}, as {query} does. It writes {found}. Nothing was changed."
            )
    named = tuple(_attribute(path, quantity) for path, quantity in (attributes or {}).items())
    for attribute in named:
        _check_attribute(model, attribute, width, heads, query)
    heads_site = f"{block}.heads" if any(attribute.quantity == "groups" for attribute in named) else None
    value_site = replace(
        linear_site(
            model,
            f"{block}.value",
            writer=value,
            reader=output,
            groups=heads,
            block=block,
            shares=f"{block}.head",
            scope=scope,
        ),
        groups_of=heads_site,
    )
    query_key = Site(
        name=f"{block}.query_key",
        kind="bilinear",
        block=block,
        width=width,
        groups=heads,
        streams=tuple(Stream(module=path, side="output", writers=_written(model, path)) for path in (query, key)),
        shares=f"{block}.head",
        scope=scope,
        groups_of=heads_site,
        attributes=tuple(attribute for attribute in named if attribute.quantity != "groups"),
        scaled=scaled,
    )
    if heads_site is None:
        return query_key, value_site
    whole_heads = Site(
        name=heads_site,
        kind="heads",
        block=block,
        width=heads,
        each=width,
        least=1 if absent is None else 0,
        streams=(_between(model, (query, key, value), output),),
        shares=heads_site,
        scope=scope,
        attributes=tuple(
            replace(attribute, quantity="width") if attribute.quantity == "groups" else attribute
            for attribute in named
            if attribute.quantity in ("groups", "total")
        ),
        absent=absent,
    )
    return whole_heads, query_key, value_site


def expect(model: nn.Module, path: str, *kinds: type[M]) -> M:
    """The submodule at `path`, exactly of one of these types: a subclass (a quantised layer, an adapter) may compute
    something else with its weight.

    Raises:
        UnsupportedModelError: naming what is there instead.
    """
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


def linear(model: nn.Module, path: str) -> nn.Linear:
    """The linear map at `path`, with its weight as a parameter.

    Raises:
        UnsupportedModelError: if something else is there, or the weight is computed.
    """
    module = expect(model, path, nn.Linear)
    own = dict(module.named_parameters())
    if "weight" not in own:
        raise UnsupportedModelError(
            f"{path} must hold its weight as a parameter. It computes it from {', '.join(own)}. Make the pruning or "
            "parametrization permanent first; nothing was changed."
        )
    return module


def _between(model: nn.Module, writers: Iterable[str], reader: str, copies: int = 1) -> Stream:
    """What the writers write and the reader reads."""
    size = linear(model, reader).in_features
    for path in writers:
        if (found := linear(model, path).out_features) != copies * size:
            times = f"{copies} × " if copies > 1 else ""
            raise UnsupportedModelError(
                f"{path} must write {times}{size}, which {reader} reads. It writes {found}. Nothing was changed."
            )
    return Stream(
        module=reader,
        side="input",
        writers=tuple(axis for path in writers for axis in _written(model, path, copies)),
        readers=(Axis(parameter=f"{reader}.weight", dim=1),),
        intercept=None if linear(model, reader).bias is None else f"{reader}.bias",
    )


def _written(model: nn.Module, path: str, copies: int = 1) -> tuple[Axis, ...]:
    """The axes by which a linear map writes its output."""
    names = ["weight"] if linear(model, path).bias is None else ["weight", "bias"]
    return tuple(Axis(parameter=f"{path}.{name}", dim=0, copies=copies) for name in names)


def _share(path: str, size: int, groups: int) -> int:
    if groups < 1 or size % groups:
        raise UnsupportedModelError(
            f"{path} must have a whole width for each of {groups} groups. It has {size} in all. Nothing was changed."
        )
    return size // groups


def _attribute(path: str, quantity: Quantity) -> Attribute:
    check_choice(f"what {path} says", quantity, get_args(Quantity))
    module, _, name = path.rpartition(".")
    return Attribute(module=module, name=name, quantity=quantity)


def _at(model: nn.Module, path: str) -> Any:
    """What is at a path: a module, or a plain attribute of one."""
    owner, _, name = path.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), name)
    except AttributeError:
        raise UnsupportedModelError(
            f"{path} must be an attribute of the model. There is none. Name another; nothing was changed."
        ) from None


def _check_attribute(model: nn.Module, attribute: Attribute, width: int, groups: int, path: str) -> None:
    found = _at(model, f"{attribute.module}.{attribute.name}")
    expected = attribute.value(width, groups)
    if not isinstance(found, int | float) or abs(found - expected) > 1e-9:
        raise UnsupportedModelError(
            f"{attribute.module}.{attribute.name} must be {expected:.6g}: {path} writes {groups} heads of {width}. "
            f"Got {found!r}. It is stale, or a factor to be folded into the queries first; nothing was changed."
        )


def _check_pointwise(model: nn.Module, path: str) -> None:
    """Try whether the activation treats every unit by itself, and all alike: of some units in another order it must
    make the same as of all of them."""
    activation = _at(model, path)
    if not callable(activation):
        raise UnsupportedModelError(
            f"an activation must be a module or a function. {path} is {activation!r}. Name another; nothing was "
            "changed."
        )
    values = torch.linspace(-3, 3, 24, device="cpu").view(2, 1, 12)
    units = [7, 2, 11, 0, 5]
    whole: Any
    part: Any
    try:
        if isinstance(activation, nn.Module):
            own = list(activation.parameters())
            if any(parameter.is_meta for parameter in own):
                return  # a shape without values: what was saved had been tried
            values = values.to(own[0]) if own else values
            with evaluation(activation):
                whole, part = activation(values), activation(values[..., units])
        else:
            whole, part = activation(values), activation(values[..., units])
        is_pointwise = whole.shape == values.shape and torch.allclose(whole[..., units], part)
    except (RuntimeError, TypeError, ValueError):  # shapes that do not fit
        is_pointwise = False
    if not is_pointwise:
        kind = type(activation).__name__ if isinstance(activation, nn.Module) else repr(activation)
        raise UnsupportedModelError(
            f"{path} must act on every unit by itself, all alike. Got {kind}, which does not. Leave this width whole; "
            "nothing was changed."
        )
