"""Run batches through a model and gather the moments of its activations. Hooks live and die here."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.covariance import Covariance
from rmtkd.errors import DataError, UnsupportedModelError
from rmtkd.measurement import evaluation
from rmtkd.memory import Pieces
from rmtkd.sites import Site, Stream


class Enough(Exception):
    """Ends a forward pass once the last stream has been seen."""


def in_groups(activations: Tensor, groups: int) -> Tensor:
    """The last dimension split into groups: `… × (groups · width)` to `… × groups × width`."""
    return activations.unflatten(-1, (groups, -1))


def first_output(output: Tensor | tuple[Any, ...]) -> Tensor:
    """What a block passes on: its output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


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


def collect(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch], *, pieces: Pieces | None = None
) -> dict[str, tuple[Covariance, ...]]:
    """Moments of every stream of the sites, over the real positions of all batches, in one pass.

    A module that is called several times in a forward pass is seen at each call. Held at once are the moments and the
    streams of one batch.

    Args:
        model: the model, run in evaluation mode without gradients. The first batch goes all the way, which tells how
            often each module is called; the others only as deep as the deepest site.
        sites: sites of this model.
        batches: calibration batches.
        pieces: in how many pieces a batch is run, should memory run out.

    Returns:
        For each site's name one `Covariance` per stream.

    Raises:
        DataError: if there are no real positions, fewer than a site is wide, or if activations are not finite.
        UnsupportedModelError: if a forward pass does not come by a site.
    """
    moments = {site.name: tuple(Covariance(site.width, groups=site.groups) for _ in site.streams) for site in sites}
    pieces = pieces or Pieces()
    device = next(model.parameters()).device
    streams = [
        (site, stream, moment)
        for site in sites
        for stream, moment in zip(site.streams, moments[site.name], strict=True)
    ]
    seen: list[tuple[Site, Covariance, Tensor]] = []
    calls: int | None = None  # of all streams' modules in a whole forward pass
    pending = 0
    mask: Tensor | None = None

    def watch(site: Site, moment: Covariance, activations: Tensor) -> None:
        nonlocal pending
        vectors = in_groups(activations, site.groups)
        seen.append((site, moment, vectors.flatten(0, -3) if mask is None else vectors[mask]))
        pending -= 1
        if pending == 0:
            raise Enough

    def run(parts: Sequence[Batch]) -> None:
        """See all streams of one batch. A second attempt, in smaller parts, sees them from the start."""
        nonlocal mask, pending, calls
        seen.clear()
        for part in parts:
            part = batching.to(part, device)
            mask, before = batching.real_positions(part), len(seen)
            pending = calls or 0  # counting down from 0 never gets there
            with suppress(Enough):
                batching.logits(model, part)
            if calls is None:
                calls = len(seen) - before
                _check_seen(streams, seen)

    handles: list[RemovableHandle] = []
    try:
        for site, stream, moment in streams:
            handles.append(attach(model, stream, partial(watch, site, moment)))
        with evaluation(model):
            for batch in batches:
                pieces(batch, run)
                for site, moment, vectors in seen:
                    _update(site, moment, vectors)
    finally:
        for handle in handles:
            handle.remove()
    for site, stream, moment in streams:
        if stream.table is not None:
            _update(site, moment, model.get_parameter(stream.table).detach()[:, None])
    for site in sites:
        _check_count(site, min(moment.count for moment in moments[site.name]))
    return moments


def _check_seen(
    streams: Sequence[tuple[Site, Stream, Covariance]], seen: Sequence[tuple[Site, Covariance, Tensor]]
) -> None:
    found = {id(moment) for _, moment, _ in seen}
    for site, stream, moment in streams:
        if id(moment) not in found:
            raise UnsupportedModelError(
                f"a forward pass must call {stream.module} for the site {site.name}. It did not. Describe the module "
                "that is called, or leave the site out; nothing was changed."
            )


def _update(site: Site, moment: Covariance, vectors: Tensor) -> None:
    try:
        moment.update(vectors)
    except DataError as error:
        raise DataError(f"site {site.name}: {error}") from None


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


def gradient_moment(model: nn.Module, module: str, batches: Iterable[Batch]) -> Float[Tensor, "width width"]:
    """What the model's answers feel of an error at the output of a module: `E[g gᵀ]` at the real positions, with g the
    gradient of the log-probability of a class that is drawn from the model's own answer (Fisher information).

    To second order, the KL divergence from the model with an error e there is `½ eᵀ E[g gᵀ] e`. Each batch takes one
    backward pass per class, and no parameter is changed.

    Args:
        model: run in evaluation mode.
        module: path of a module whose output is one tensor with positions before the last dimension.
        batches: calibration rows; a few dozen batches will do.

    Returns:
        The second moment in float64 on the CPU, with a mean diagonal of 1.

    Raises:
        DataError: if no row has a gradient.
    """
    device = next(model.parameters()).device
    seen: list[Any] = []
    total: Tensor | None = None
    flags = [(part, part.training) for part in model.modules()]
    handle = model.get_submodule(module).register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        model.eval()
        for batch in batches:
            seen.clear()
            with torch.enable_grad():
                scores = batching.logits(model, batching.to(batch, device)).log_softmax(-1)
            mask = batching.real_positions(batch)
            for label in range(scores.shape[-1]):
                chosen = scores[:, label]
                drawn = (chosen * chosen.detach().exp().sqrt()).sum()  # the root: it is squared below
                (gradient,) = torch.autograd.grad(drawn, seen[0], retain_graph=True)
                real = gradient.flatten(0, -2) if mask is None else gradient[mask.to(device)]
                real = real.double().cpu()
                total = real.mT @ real + (0 if total is None else total)
    finally:
        handle.remove()
        for part, flag in flags:
            part.training = flag
    if total is None or not total.diagonal().mean() > 0:
        raise DataError("the answers must depend on calibration rows. No gradient arrives. Pass rows of the task.")
    return total / total.diagonal().mean()


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
