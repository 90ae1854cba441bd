"""Embeddings and convolutions in two factors, embeddings in several tables: the modules that `rmtkd` adds to a network;
and random starts."""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from rmtkd.errors import OptionError, UnsupportedModelError
from rmtkd.modeling_rmtkd import EmbeddingLevel, EmbeddingLevels, FactorizedEmbedding, FactorizedLevel, LowRankPair

RARE = 0.01
"""Share of all occurrences that the tokens of the last level have together. What is rarer than a level falls from level
to level by one factor: of three levels the tokens have 90 %, 9 % and 1 %. Measured in docs/log.md."""


def factorized(embedding: nn.Embedding) -> FactorizedEmbedding:
    """The same function as `embedding`: its table, which is not copied, followed by the identity, which is frozen where
    the table is."""
    weight, width = embedding.weight, embedding.embedding_dim
    kind = FactorizedLevel if isinstance(embedding, EmbeddingLevel) else FactorizedEmbedding
    made = kind.like(embedding, width, device="meta", dtype=weight.dtype)
    made.weight = weight
    made.projection.to_empty(device=weight.device)
    with torch.no_grad():
        made.projection.weight.copy_(torch.eye(width, dtype=weight.dtype))
        if made.projection.bias is not None:
            made.projection.bias.zero_()
    made.projection.requires_grad_(weight.requires_grad)
    return made


def low_rank(convolution: Any, side: str) -> LowRankPair:
    """The same function as `convolution`, whose weight is not copied: it and the identity, 1 × 1, on one side of it,
    which lies in memory as its weight does, and is frozen where it is."""
    width = convolution.out_channels if side == "output" else convolution.in_channels
    made = LowRankPair(convolution, width, side)
    taps: Any
    mixing: Any
    taps, mixing = made if side == "output" else reversed(made)
    mixing.to(memory_format=order_of(convolution.weight))
    mixing.requires_grad_(convolution.weight.requires_grad)
    taps.weight, taps.bias = convolution.weight, convolution.bias
    with torch.no_grad():
        mixing.weight.copy_(torch.eye(width, dtype=mixing.weight.dtype).view_as(mixing.weight))
        if mixing.bias is not None:
            mixing.bias.zero_()
    return made


def order_of(tensor: Tensor) -> torch.memory_format:
    """The order in which a tensor lies in memory: channels last, or else the usual one.

    By its strides: of 1 × 1 filters `is_contiguous` says that they lie in both, and convolutions go by one.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim, torch.contiguous_format)
    usual, other = (
        torch.empty(tensor.shape, device="meta", memory_format=order).stride()
        for order in (torch.contiguous_format, last)
    )
    return last if tensor.stride() == other != usual else torch.contiguous_format


def split_embedding(
    model: nn.Module, path: str, counts: Num[Tensor, " vocabulary"], levels: int | Sequence[int]
) -> nn.Module:
    """The same function, to the bit, with the embedding at `path` in several tables: tokens that occur often, less
    often, hardly ever. Each is a width of its own. There are as many parameters as before.

    Args:
        model: the model, left as it was.
        path: of a plain `nn.Embedding`.
        counts: how often each token occurs.
        levels: how many (see `level_bounds`); or how many of the commonest tokens each level ends with, the last level,
            with all others, left out.

    Returns:
        A copy of the model, with `EmbeddingLevels` at `path`.

    Raises:
        UnsupportedModelError: if something else is there, or its rows depend on each other.
        OptionError: if counts or levels do not fit the table.
    """
    embedding = model.get_submodule(path)
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        raise UnsupportedModelError(
            f"{path} must be a plain nn.Embedding without max_norm and scale_grad_by_freq to be split into levels. "
            f"Got {embedding}. Use embedding_levels=1; nothing was changed."
        )
    size = embedding.num_embeddings
    if counts.shape != (size,) or bool((counts < 0).any()):
        raise OptionError(f"counts must be one number from 0 for each of {size} tokens. Got {list(counts.shape)}.")
    bounds = level_bounds(counts, levels) if isinstance(levels, int) else levels
    ends = [0, *bounds, size]
    if ends != sorted(set(ends)):
        raise OptionError(f"levels must end after 1 to {size - 1} tokens, ascending. Got {list(bounds)}.")
    split = plain_copy(model)
    if not bounds:
        return split
    made = set_levels(split, path, [end - begin for begin, end in pairwise(ends)])
    order = counts.cpu().argsort(descending=True, stable=True)
    if (pad := embedding.padding_idx) is not None:  # the first row of the last level
        others = order[order != pad]
        order = torch.cat([others[: ends[-2]], torch.tensor([pad]), others[ends[-2] :]])
    weight = embedding.weight
    made.rows = order.argsort().to(weight.device, torch.int32)
    for level, tokens in zip(made.levels, order.to(weight.device).tensor_split(list(bounds)), strict=True):
        rows = nn.Parameter(weight.detach()[tokens], requires_grad=weight.requires_grad)
        level.weight = rows  # type: ignore[union-attr]
    return split


def set_levels(model: nn.Module, path: str, counts: Sequence[int]) -> EmbeddingLevels:
    """Put an embedding in levels of so many tokens each, whole and without values, in place of the one at `path`."""
    old: Any = model.get_submodule(path)
    pad, weight = old.padding_idx, old.weight
    count, width = weight.shape
    shape = nn.Embedding(count, width, pad, sparse=old.sparse, device="meta", dtype=weight.dtype)
    made = EmbeddingLevels(shape, [(count, None) for count in counts]).train(old.training)
    model.set_submodule(path, made)
    return made


def level_bounds(counts: Num[Tensor, " vocabulary"], levels: int) -> tuple[int, ...]:
    """How many of the commonest tokens each level but the last ends with, by their share of all occurrences (see
    `RARE`). Fewer levels, if tokens do not suffice."""
    if levels < 1:
        raise OptionError(f"embedding_levels must be at least 1. Got {levels}.")
    shares = counts.double().sort(descending=True).values.cumsum(0) / counts.double().sum().clamp_min(1)
    ends = [int((shares < 1 - RARE ** (i / (levels - 1))).sum()) + 1 for i in range(1, levels)]
    return tuple(sorted({end for end in ends if end < len(counts)}))


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy that can be copied again when its embedding is replaced, without what transformers hooks onto it for
    gradient checkpointing; in which every position goes through every layer: an `nn.TransformerEncoder` would pack its
    rows as nested tensors, which know neither hooks nor gradients; and whose embeddings have dense gradients, which
    optimisers want that train them together with other weights."""
    made = copy.deepcopy(model)
    if callable(unhook := getattr(made, "disable_input_require_grads", None)):
        unhook()
    for module in packing_rows(made).values():
        module.use_nested_tensor = False
    for module in made.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    return made


def unpacked(model: nn.Module) -> nn.Module:
    """The model, or a plain copy if it packs rows."""
    return plain_copy(model) if packing_rows(model) else model


def packing_rows(model: nn.Module) -> dict[str, Any]:
    """The modules that may run on nested tensors in evaluation mode, where they leave zeros at padding; by path."""
    return {path: module for path, module in model.named_modules() if getattr(module, "use_nested_tensor", False)}


def check_module(model: Any) -> None:
    """Raise `UnsupportedModelError` for what is no module."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"the model must be a torch.nn.Module. Got {type(model).__name__}. Load it first, for example by "
            "AutoModelForSequenceClassification.from_pretrained."
        )


def randomize(model: nn.Module, *, seed: int) -> None:
    """Give the model a random start, in place: Xavier for matrices, as the paper trains; He for convolutions; small
    embeddings; zeros for biases and ones for other vectors. What was frozen is not any more: it would stay random.

    Drawn on the CPU: the same start on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.LayerNorm, nn.GroupNorm, _NormBase)):
                module.reset_parameters()
                continue
            for name, parameter in module.named_parameters(recurse=False):
                drawn = torch.empty(parameter.shape)
                if "bias" in name:
                    drawn.zero_()
                elif isinstance(module, nn.Embedding):
                    drawn.normal_(std=0.02, generator=generator)
                elif isinstance(module, _ConvNd):
                    nn.init.kaiming_normal_(drawn, generator=generator)
                elif drawn.ndim > 1:
                    nn.init.xavier_uniform_(drawn, generator=generator)
                else:
                    drawn.fill_(1.0)  # a gain
                parameter.copy_(drawn)
