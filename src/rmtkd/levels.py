"""Ranks by token frequency: count the tokens, then split the embedding into levels, before anything is planned."""

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.activations import Enough, attach
from rmtkd.batches import Batch
from rmtkd.errors import DataError, UnsupportedModelError
from rmtkd.measurement import evaluation
from rmtkd.modeling_rmtkd import EmbeddingLevels
from rmtkd.modules import split_embedding
from rmtkd.sites import Site, Stream, embedding_sites


def in_levels(
    model: nn.Module, sites: Sequence[Site], rows: Iterable[Batch], levels: int
) -> tuple[nn.Module, tuple[Site, ...]]:
    """The same function with its embedding in as many levels, and its sites.

    Args:
        model: the model, left as it was. One that is in levels stays as it is.
        sites: of the model.
        rows: whose tokens are counted: all training rows.
        levels: how many; 1 changes nothing. Fewer, if tokens do not suffice.

    Raises:
        UnsupportedModelError: if the model has no plain embedding among its sites, or more than one.
    """
    if levels == 1 or any(isinstance(module, EmbeddingLevels) for module in model.modules()):
        return model, tuple(sites)
    found = [site for site in sites if site.factorizes is not None]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"embedding_levels needs one whole embedding among the sites. Got {len(found)}: it may have been cut "
            "before. Leave it at 1; nothing was changed."
        )
    (words,) = found
    path = words.factorizes or ""
    split = split_embedding(model, path, count_tokens(model, path, rows), levels)
    parts = embedding_sites(split, path, name=words.name, block=words.block)
    return split, tuple(part for site in sites for part in (parts if site is words else (site,)))


def count_tokens(model: nn.Module, path: str, rows: Iterable[Batch]) -> Int[Tensor, " vocabulary"]:
    """How often each token occurs at the real positions of these rows, as the embedding at `path` is given them.

    The first batch goes all the way, which tells how often the embedding is called; of the others nothing is run beyond
    its last call.

    Raises:
        DataError: if there are others than it has rows for.
    """
    embedding = model.get_submodule(path)
    counts = torch.zeros(embedding.num_embeddings, dtype=torch.int64)  # type: ignore[call-overload]
    device = next(model.parameters()).device
    mask: Tensor | None = None
    calls: int | None = None  # in a whole forward pass
    pending = 0

    def see(ids: Tensor) -> None:
        nonlocal pending
        if (others := ids[(ids < 0) | (ids >= len(counts))]).numel():
            told = ", ".join(map(str, others.unique().tolist()[:3]))
            raise DataError(
                f"token ids must be within 0..{len(counts) - 1}: {path} has {len(counts)} rows. Got {told}. Use the "
                "tokenizer of the model."
            )
        real = ids if mask is None or mask.shape != ids.shape else ids[mask]
        counts.add_(real.flatten().cpu().bincount(minlength=len(counts)))
        pending -= 1
        if pending == 0:
            raise Enough

    handle = attach(model, Stream(module=path, side="input", writers=()), see)
    try:
        with evaluation(model):
            for batch in rows:
                mask = batching.real_positions(batch)
                mask = None if mask is None else mask.to(device)
                pending = calls or 0  # counting down from 0 never gets there
                with suppress(Enough):
                    batching.logits(model, batching.to(batch, device))
                calls = -pending if calls is None else calls
    finally:
        handle.remove()
    return counts
