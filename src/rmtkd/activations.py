"""Run batches through a model and gather the moments of its activations. Hooks live and die here."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.covariance import Covariance
from rmtkd.errors import DataError, UnsupportedModelError
from rmtkd.measurement import evaluation
from rmtkd.sites import Site, Stream


class _Enough(Exception):
    """Ends a forward pass once the last stream has been seen."""


def in_groups(activations: Tensor, groups: int) -> Tensor:
    """The last dimension split into groups: `… × (groups · width)` to `… × groups × width`."""
    return activations.unflatten(-1, (groups, -1))


def attach(model: nn.Module, stream: Stream, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Hook `see` onto a stream of the model. What it returns, unless None, takes the place of the activations.

    The caller removes the hook by the handle.
    """
    module = model.get_submodule(stream.module)

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor | None:
        return see(arguments[0])

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return see(output)

    return module.register_forward_pre_hook(before) if stream.side == "input" else module.register_forward_hook(after)


def collect(model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]) -> dict[str, tuple[Covariance, ...]]:
    """Moments of every stream of the sites, over the real positions of all batches, in one pass.

    A module that is called several times in a forward pass is seen at each call.

    Args:
        model: the model, run in evaluation mode without gradients. The first batch goes all the way, which tells how
            often each module is called; the others only as deep as the deepest site.
        sites: sites of this model.
        batches: calibration batches.

    Returns:
        For each site's name one `Covariance` per stream.

    Raises:
        DataError: if there are no real positions, fewer than a site is wide, or if activations are not finite.
        UnsupportedModelError: if a forward pass does not come by a site.
    """
    moments = {site.name: tuple(Covariance(site.width, groups=site.groups) for _ in site.streams) for site in sites}
    seen: Counter[tuple[str, int]] = Counter()  # calls by stream in the forward pass that runs
    calls: int | None = None  # of all streams in a whole one
    mask: Tensor | None = None
    device = next(model.parameters()).device

    def watch(site: Site, i: int, activations: Tensor) -> None:
        vectors = in_groups(activations, site.groups)
        vectors = vectors.flatten(0, -3) if mask is None else vectors[mask]
        try:
            moments[site.name][i].update(vectors)
        except DataError as error:
            raise DataError(f"site {site.name}: {error}") from None
        seen[site.name, i] += 1
        if seen.total() == calls:
            raise _Enough

    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            for i, stream in enumerate(site.streams):
                handles.append(attach(model, stream, partial(watch, site, i)))
        with evaluation(model):
            for batch in batches:
                batch = batching.to(batch, device)
                mask = batching.real_positions(batch)
                seen.clear()
                try:
                    batching.logits(model, batch)
                except _Enough:
                    continue
                _check_seen(sites, seen)
                calls = seen.total()
    finally:
        for handle in handles:
            handle.remove()
    for site in sites:
        _check_count(site, min(moment.count for moment in moments[site.name]))
    return moments


def _check_seen(sites: Sequence[Site], seen: Mapping[tuple[str, int], int]) -> None:
    for site in sites:
        for i, stream in enumerate(site.streams):
            if not seen[site.name, i]:
                raise UnsupportedModelError(
                    f"a forward pass must call {stream.module} for the site {site.name}. It did not. Describe the "
                    "module that is called, or leave the site out; nothing was changed."
                )


def _check_count(site: Site, count: int) -> None:
    if count == 0:
        raise DataError(
            "calibration must hold at least one real (unpadded) position. Got none: no rows, or rows of padding "
            "only. Pass calibration rows with their attention_mask."
        )
    if count < site.width:
        raise DataError(
            f"site {site.name} of width {site.width} needs at least as many activation vectors. Got {count}. "
            "Pass more calibration rows."
        )


def readers(model: nn.Module, site: Site) -> Float[Tensor, "groups out width"]:
    """The weights that read a site's (first) stream, stacked along their outputs, in float64 on the CPU.

    Those of an embedding that is not factorised yet are the identity.
    """
    if site.factorizes:
        return torch.eye(site.width, dtype=torch.float64)[None]
    stacked = []
    for axis in site.streams[0].readers:
        weight = model.get_parameter(axis.parameter).detach().double().cpu()
        stacked.append(in_groups(weight.movedim(axis.dim, -1).flatten(0, -2), site.groups))
    return torch.cat(stacked).movedim(1, 0)
