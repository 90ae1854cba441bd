"""From a model of a known family to its sites."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from rmtkd.batches import Batch
from rmtkd.errors import OptionError, UnsupportedModelError
from rmtkd.families import FAMILIES, IMAGE_FAMILIES, Attention, EncoderFamily, FeedForward, ImageFamily
from rmtkd.modeling_rmtkd import PREFIX, NoHeads
from rmtkd.sites.parts import attention_sites, embedding_sites, expect, feed_forward_site, linear
from rmtkd.sites.site import Absent, Quantity, Site
from rmtkd.sites.tracing import Traced, nothing_to_narrow, trace_sites


def find_family(model: nn.Module) -> EncoderFamily:
    """The family of texts whose table describes this model.

    Raises:
        UnsupportedModelError: if there is none, or if the model's head is of another kind than single-label
            classification.
    """
    class_name = type(model).__name__.removeprefix(PREFIX)
    supported = ", ".join(family.model_class for family in (*FAMILIES, *IMAGE_FAMILIES))
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
        f"the model must be one of: {supported}. Got {class_name}, whose widths rmtkd does not know. In Python "
        "follow it with a batch, find_sites(model, batch), or say where they are (rmtkd.sites); or choose one of "
        "these. `rmtkd check MODEL` tries it. Nothing was changed."
    )


def find_image_family(model: nn.Module) -> ImageFamily | None:
    """The family of images that this model is of, if it is of one."""
    class_name = type(model).__name__.removeprefix(PREFIX)
    return next((family for family in IMAGE_FAMILIES if class_name == family.model_class), None)


def is_known(model: nn.Module) -> bool:
    """Whether the model is of a supported family: such a model can be saved so that nothing of ours is needed to load
    it.

    Raises:
        UnsupportedModelError: for another head of a supported family.
    """
    if find_image_family(model) is not None:
        return True
    class_name = type(model).__name__.removeprefix(PREFIX)
    is_text = any(class_name in {family.model_class, *family.refused_classes} for family in FAMILIES)
    return is_text and find_family(model) is not None


def encoder_of(model: nn.Module) -> str | None:
    """Path of the module whose parameters count as the encoder's; None where there is none."""
    images = find_image_family(model)
    if images is not None:
        return images.encoder
    return find_family(model).encoder if is_known(model) else None


def random_images(model: nn.Module, rows: int, *, seed: int = 0) -> dict[str, Tensor] | None:
    """Random images that a model of an image family can be called with; None for any other model."""
    family = find_image_family(model)
    if family is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(rows, *family.image_shape(model.config), generator=generator)}


def find_sites(model: nn.Module, example: Batch | None = None, *, low_rank: bool = False) -> tuple[Site, ...]:
    """Every width of the model that may be narrowed, shallow to deep: the sites of `explore`."""
    return explore(model, example, low_rank=low_rank).sites


def explore(model: nn.Module, example: Batch | None = None, *, low_rank: bool = False) -> Traced:
    """Every width of the model that may be narrowed, and what of a network that was followed stays whole.

    Args:
        model: a supported model, also one that was compressed before; or, with an example, any that is built from
            convolutions, linear maps, norms by batch statistics, and what acts channel by channel.
        example: a batch that the model can be called with. A model of a supported family needs none.
        low_rank: instead, the width between the two convolutions that every single one may become.

    Raises:
        UnsupportedModelError: naming the class, the head, the part or the precision that is not understood; or if there
            is no convolution that may become two.
    """
    images = random_images(model, 2)
    batch = images if images is not None else example
    if images is None and (batch is None or is_known(model)):
        found = Traced(sites=tuple(site for _, describe in search(model) for site in describe()), whole={})
    else:
        found = trace_sites(model, batch)  # type: ignore[arg-type]
    if low_rank and not found.ranks:
        raise UnsupportedModelError(
            "a model must have convolutions to make low-rank pairs of: of one group each, called once, and no halves "
            f"of a pair already. {type(model).__name__} has none. Leave low_rank out; nothing was changed."
        )
    if low_rank:
        found = replace(found, sites=found.ranks)
    if not found.sites:
        raise nothing_to_narrow(model, found.whole)
    check_parameters(model, found.sites)
    return found


def check_sites(model: nn.Module, sites: Sequence[Site], *, low_rank: bool) -> None:
    """What `explore` holds of the sites that it finds, of sites that are given.

    Raises:
        UnsupportedModelError: see `check_parameters`.
        OptionError: if they are not ranks, and `low_rank` is asked for.
    """
    check_parameters(model, sites)
    others = [site.name for site in sites if not site.is_rank]
    if low_rank and others:
        raise OptionError(
            f"with low_rank the sites must be those of find_sites(model, example, low_rank=True). Got {others[0]}. "
            "Leave sites out."
        )


def longest_input(model: nn.Module) -> int | None:
    """The longest input of a model in tokens, supported or not; None if its configuration does not say."""
    config = getattr(model, "config", None)
    for family in FAMILIES:
        if type(model).__name__.removeprefix(PREFIX) == family.model_class:
            return family.longest_input(config)
    return getattr(config, "max_position_embeddings", None)


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of the layers of a supported model, those that share their weights once."""
    return _expand(model, find_family(model).layers)


def search(model: nn.Module) -> Iterator[tuple[str, Callable[[], tuple[Site, ...]]]]:
    """Where the sites of a supported model are: parts of the network, shallow to deep, each with a function that
    describes its sites or raises `UnsupportedModelError`."""
    family = find_family(model)
    yield "embeddings.word", lambda: embedding_sites(model, family.word_embeddings)
    for i, layer in enumerate(_expand(model, family.layers)):
        scope = None if family.repeats_layers else layer
        if family.attention is not None:
            yield f"layer.{i}.attention", partial(_attention, model, family.attention, f"layer.{i}", layer, scope)
        yield f"layer.{i}.ffn", partial(_feed_forward, model, family.feed_forward, f"layer.{i}", layer, scope)


def check_parameters(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise `UnsupportedModelError` for parameters in half precision, or parameters and buffers tied around a site."""
    _check_precision(model)
    _check_untied(model, sites)


def _expand(model: nn.Module, pattern: str) -> list[str]:
    """The paths that a pattern with `*` for the indices of module lists stands for, in order."""
    head, star, tail = pattern.partition(".*")
    if not star:
        return [pattern]
    count = len(expect(model, head, nn.ModuleList))
    return [path for i in range(count) for path in _expand(model, f"{head}.{i}{tail}")]


def _attention(model: nn.Module, names: Attention, block: str, layer: str, scope: str | None) -> tuple[Site, ...]:
    query, key, value, output = (f"{layer}.{name}" for name in (names.query, names.key, names.value, names.output))
    attention = f"{layer}.{names.module}"
    if type(model.get_submodule(attention)) is NoHeads:
        return ()
    for path in (query, key, value, output):
        linear(model, path)
    _check_stock(model, attention, names.module_class)
    attributes: dict[str, Quantity] = {f"{attention}.{names.head_size}": "width"}
    if names.all_head_size is not None:
        attributes[f"{attention}.{names.all_head_size}"] = "total"
    attributes |= {f"{attention}.{names.scaling}": "scaling", f"{attention}.{names.heads}": "groups"}
    return attention_sites(
        model,
        block,
        query=query,
        key=key,
        value=value,
        output=output,
        heads=getattr(model.get_submodule(attention), names.heads),
        attributes=attributes,
        scope=scope,
        absent=Absent(module=attention, after=names.after, norm=names.norm),
    )


def _feed_forward(model: nn.Module, names: FeedForward, block: str, layer: str, scope: str | None) -> tuple[Site, ...]:
    writers, reader = [f"{layer}.{name}" for name in names.writers], f"{layer}.{names.reader}"
    for path in (*writers, reader):
        linear(model, path)
    for part, stock in names.stock.items():
        _check_stock(model, f"{layer}.{part}" if part else layer, stock)
    if names.chunk_size is not None:
        owner, _, name = f"{layer}.{names.chunk_size}".rpartition(".")
        if getattr(model.get_submodule(owner), name, 0):
            raise UnsupportedModelError(
                f"{owner}.{name} must be 0, else activations come in pieces. Set it to 0, the outputs stay the same; "
                "nothing was changed."
            )
    if linear(model, reader).in_features == 0:
        return ()
    site = feed_forward_site(
        model,
        f"{block}.ffn",
        writers=writers,
        reader=reader,
        copies=names.copies,
        activation=f"{layer}.{names.activation}",
        block=block,
        scope=scope,
    )
    return (replace(site, setting=names.setting),)


def _check_stock(model: nn.Module, path: str, stock: str) -> None:
    """What lies between the parts is code, which a table cannot describe: only that of the stock classes is known."""
    found = type(model.get_submodule(path)).__name__
    if found != stock:
        raise UnsupportedModelError(
            f"{path} must be {stock}. Got {found}, which may compute something else. Replace it by its plain form "
            "first; nothing was changed."
        )


def _check_config(model: nn.Module, class_name: str) -> None:
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification") or getattr(config, "num_labels", None) == 1:
        head = problem or "regression (one output)"
        raise UnsupportedModelError(
            f"the head must be single-label classification. This {class_name} has problem type {head}, for which "
            "recovery has no loss. Choose a checkpoint with at least two classes; nothing was changed."
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"the encoder must be bidirectional without cross-attention. This {class_name} is a decoder. Set "
            "is_decoder and add_cross_attention to False if it is used as an encoder; nothing was changed."
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
    """A parameter or buffer with two names (layers that share their weights) would be folded twice."""
    names: dict[int, list[str]] = {}
    buffers = model.named_buffers(remove_duplicate=False)
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers):
        names.setdefault(id(tensor), []).append(name)
    sites = list(sites)
    touched = {axis.parameter for site in sites for stream in site.streams for axis in stream.writers + stream.readers}
    touched |= {f"{site.factorizes}.{name}" for site in sites if site.factorizes for name in ("weight", "bias")}
    for tied in names.values():
        if len(tied) > 1 and touched.intersection(tied):
            raise UnsupportedModelError(
                f"a parameter or buffer around a site must belong to one module. {' and '.join(tied)} are the same. "
                "Give each its own copy; nothing was changed."
            )
