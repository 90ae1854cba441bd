"""Run batches through a model and gather the moments of its activations. Hooks live and die here."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.hooks import RemovableHandle

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.covariance import Covariance
from rmtkd.effective import EffectiveSize
from rmtkd.errors import DataError, UnsupportedModelError
from rmtkd.measurement import evaluation
from rmtkd.memory import Pieces
from rmtkd.replicates import Replicates
from rmtkd.seeding import seeded
from rmtkd.sites import Axis, Site, Stream


class Enough(Exception):
    """Ends a forward pass once the last stream has been seen."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What was seen of one stream: its moments, how many independent vectors that is, and two stochastic passes."""

    moments: Covariance
    effective: EffectiveSize | None = None
    replicates: Replicates | None = None

    @property
    def effective_samples(self) -> float | None:
        """n_eff; None where it was not gathered, or where it cannot be told."""
        if self.effective is None or self.effective.count != self.moments.count:
            return None
        return self.effective.value()


def in_groups(activations: Tensor, groups: int) -> Tensor:
    """The last dimension split into groups: `… × (groups · width)` to `… × groups × width`."""
    return activations.unflatten(-1, (groups, -1))


def first_output(output: Tensor | tuple[Any, ...]) -> Tensor:
    """What a block passes on: its output, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def channel_dim(module: nn.Module) -> int:
    """The dimension of a module's input and output that holds the units."""
    return 1 if isinstance(module, _ConvNd) else -1


Look = Callable[[Tensor], Tensor | None]
"""Is given the activations of a stream; what it returns, unless None, takes their place."""


def attach(model: nn.Module, stream: Stream, see: Look) -> RemovableHandle:
    """Hook `see` onto a stream of the model. It is given the activations with the units in their last dimension. What
    it returns, unless None, takes their place.

    The caller removes the hook by the handle.
    """
    module = model.get_submodule(stream.module)
    shown = partial(_shown, see, channel_dim(module), stream.positions)
    if stream.side == "input":
        return module.register_forward_pre_hook(partial(_before, shown), with_kwargs=True)
    return module.register_forward_hook(partial(_after, shown))


def _shown(see: Look, dim: int, positions: int, activations: Tensor) -> Tensor | None:
    if positions > 1:
        activations = activations.unflatten(-1, (-1, positions)).transpose(-1, -2)
    replaced = see(activations.movedim(dim, -1))
    if replaced is None:
        return None
    replaced = replaced.movedim(-1, dim).contiguous()  # a forward may look at memory, by `view`
    return replaced.transpose(-1, -2).flatten(-2) if positions > 1 else replaced


def _before(shown: Look, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if args:
        replaced = shown(args[0])
        return None if replaced is None else ((replaced, *args[1:]), kwargs)
    name, activations = next(pair for pair in kwargs.items() if isinstance(pair[1], Tensor))  # `linear(input=x)`
    replaced = shown(activations)
    return None if replaced is None else (args, {**kwargs, name: replaced})


def _after(shown: Look, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
    return shown(output)


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
    return moments_of(_gather(model, sites, batches, pieces))


def observe(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    pieces: Pieces | None = None,
    replicate_seed: int | None = None,
) -> dict[str, tuple[Observed, ...]]:
    """What `collect` gathers, and in the same pass how many independent vectors that is.

    Vectors of one row belong together: of one `row_ids`, or of one place in the collection. A stream that comes in
    another shape than row by row has no effective number.

    Args:
        model, sites, batches, pieces: see `collect`.
        replicate_seed: if given, every batch is also run twice with its dropout modules in training mode, their noise
            drawn from this seed, the caller's random numbers left as they are. (The dropout of fused attention follows
            the mode of its own module, and stays off.)

    Raises:
        UnsupportedModelError: also if replicates are asked for and the model has no dropout.
        DataError: see `collect`.
    """
    sizes = [EffectiveSize(site.groups * site.size) for site in sites for _ in site.streams]
    pairs = None
    if replicate_seed is not None:
        _check_dropout(model)
        pairs = [Replicates(site.size, groups=site.groups) for site in sites for _ in site.streams]
    return _gather(model, sites, batches, pieces, sizes, pairs, replicate_seed or 0)


def moments_of(observed: Mapping[str, Sequence[Observed]]) -> dict[str, tuple[Covariance, ...]]:
    """The moments alone, as `collect` gives them."""
    return {name: tuple(stream.moments for stream in streams) for name, streams in observed.items()}


def _gather(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    pieces: Pieces | None,
    sizes: Sequence[EffectiveSize] | None = None,
    pairs: Sequence[Replicates] | None = None,
    seed: int = 0,
) -> dict[str, tuple[Observed, ...]]:
    pieces = pieces or Pieces()
    streams = [site for site in sites for _ in site.streams]
    moments = [Covariance(site.size, groups=site.groups) for site in streams]
    rows = 0
    with evaluation(model), watched(model, sites, pieces) as vectors_of:
        for number, batch in enumerate(batches):
            for i, vectors, sequences in vectors_of(batch, rows):
                with _named(streams[i]):
                    moments[i].update(vectors)
                if sizes and sequences is not None:
                    sizes[i].update(vectors.flatten(1), sequences)
            if pairs:
                first, second, halved = [], [], 0
                while halved != pieces.count:  # memory may run out: both in as many pieces
                    halved = pieces.count
                    with _dropout(model, seed, number):
                        first, second = vectors_of(batch, rows), vectors_of(batch, rows)
                for (i, one, _), (_, other, _) in zip(first, second, strict=True):
                    with _named(streams[i]):
                        pairs[i].update(one, other)
            rows += batching.rows(batch)
    for i, stream in enumerate(stream for site in sites for stream in site.streams):
        if stream.table is not None:
            table = model.get_parameter(stream.table).detach()
            with _named(streams[i]):
                moments[i].update(table[:, None])
            if sizes:
                sizes[i].update(table, -1 - torch.arange(len(table)))
            if pairs:
                pairs[i].update(table[:, None], table[:, None])
    for site, moment in zip(streams, moments, strict=True):
        _check_count(site, moment.count)
    nothing = [None] * len(streams)
    observed = iter(
        Observed(moments=m, effective=e, replicates=r)
        for m, e, r in zip(moments, sizes or nothing, pairs or nothing, strict=True)
    )
    return {site.name: tuple(next(observed) for _ in site.streams) for site in sites}


@contextmanager
def _dropout(model: nn.Module, *seeds: int) -> Iterator[None]:
    """Dropout modules in training mode, on random numbers of their own."""
    active = _dropout_modules(model)
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    with seeded(seed, next(model.parameters()).device):
        for module in active:
            module.train()
        try:
            yield
        finally:
            for module in active:
                module.eval()


def _dropout_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _DropoutNd) and module.p > 0]


def _check_dropout(model: nn.Module) -> None:
    if not _dropout_modules(model):
        raise UnsupportedModelError(
            f"a model must have dropout modules for replicates. {type(model).__name__} has no stochastic pass: none of "
            "its modules is a torch.nn.Dropout with p > 0. Choose another rule, or load the model with its dropout."
        )


Seen = tuple[int, Tensor, Tensor | None]
"""The number of a stream, counted over all sites; its vectors in one call, n × groups × width; for each the number of
its row, n, or None where that cannot be told."""


@contextmanager
def watched(
    model: nn.Module, sites: Sequence[Site], pieces: Pieces | None = None
) -> Iterator[Callable[[Batch, int], list[Seen]]]:
    """Hook onto all streams of the sites: gives a function of a batch and the number of its first row, which runs the
    batch and tells what was seen, call by call.

    The first batch goes all the way, which tells how often each module is called; the others only as deep as the
    deepest site. The mode of the model is the caller's business.
    """
    pieces = pieces or Pieces()
    device = next(model.parameters()).device
    streams = [(site, stream) for site in sites for stream in site.streams]
    seen: list[Seen] = []
    calls: int | None = None  # of all streams' modules in a whole forward pass
    pending = first_row = 0
    mask: Tensor | None = None
    rows: Tensor = torch.zeros(0)

    def watch(number: int, activations: Tensor) -> None:
        nonlocal pending
        vectors = in_groups(activations, streams[number][0].groups)
        by_row = len(vectors) == len(rows)
        if mask is not None and vectors.shape[:-2] == mask.shape:  # behind pooling there is nothing to mask
            seen.append((number, vectors[mask], rows[:, None].expand(mask.shape)[mask]))
        else:
            flat = vectors.flatten(0, -3).clone()  # what comes after may change activations in place
            seen.append((number, flat, rows.repeat_interleave(len(flat) // max(len(rows), 1)) if by_row else None))
        pending -= 1
        if pending == 0:
            raise Enough

    def run(parts: Sequence[Batch]) -> None:
        """See all streams of one batch. A second attempt, in smaller parts, sees them from the start."""
        nonlocal mask, pending, calls, rows
        seen.clear()
        first = first_row
        for part in parts:
            part = batching.to(part, device)
            mask, before = batching.real_positions(part), len(seen)
            numbers = batching.row_ids(part)
            rows = torch.arange(first, first + batching.rows(part), device=device) if numbers is None else numbers
            first += len(rows)
            pending = calls or 0  # counting down from 0 never gets there
            with suppress(Enough):
                batching.logits(model, part)
            if calls is None:
                calls = len(seen) - before
                _check_seen(streams, seen)

    def vectors_of(batch: Batch, row: int) -> list[Seen]:
        nonlocal first_row
        first_row = row
        pieces(batch, run)
        return list(seen)

    with ExitStack() as hooks:
        for number, (_, stream) in enumerate(streams):
            hooks.callback(attach(model, stream, partial(watch, number)).remove)
        yield vectors_of


def _check_seen(streams: Sequence[tuple[Site, Stream]], seen: Sequence[Seen]) -> None:
    found = {number for number, _, _ in seen}
    for number, (site, stream) in enumerate(streams):
        if number not in found:
            raise UnsupportedModelError(
                f"a forward pass must call {stream.module} for the site {site.name}. It did not. Describe the module "
                "that is called, or leave the site out; nothing was changed."
            )


@contextmanager
def _named(site: Site) -> Iterator[None]:
    """What is wrong with vectors, told with the site."""
    try:
        yield
    except DataError as error:
        raise DataError(f"site {site.name}: {error}") from None


def _check_count(site: Site, count: int) -> None:
    if count == 0:
        raise DataError(
            "calibration must hold at least one real (unpadded) position. Got none: no rows, or rows of padding "
            "only. Pass calibration rows with their attention_mask."
        )
    if count < site.size:
        raise DataError(
            f"site {site.name} of width {site.size} needs at least as many activation vectors. Got {count}. "
            "Pass more calibration rows."
        )


def readers(model: nn.Module, site: Site) -> tuple[Float[Tensor, "groups _ width"], ...]:
    """The weights that read each of a site's streams, stacked along their outputs, in float64 on the CPU. Every tap of
    a convolution, and every position of a flattened image, is an output of its own.

    Where a module is not factorised yet, those of its output are the identity, those of its input its own weights.
    """
    if site.factorizes and site.streams[0].side == "output":
        return (torch.eye(site.width, dtype=torch.float64)[None],)
    if site.factorizes:
        return (reader(model, Axis(parameter=f"{site.factorizes}.weight", dim=1))[None],)
    return tuple(
        torch.cat([in_groups(reader(model, axis), site.groups) for axis in stream.readers]).movedim(1, 0)
        for stream in site.streams
    )


def reader(model: nn.Module, axis: Axis) -> Float[Tensor, "out total"]:
    """A reader's weight in float64 on the CPU, as a matrix that acts on the site's activations."""
    weight = model.get_parameter(axis.parameter).detach().double().cpu()
    return unfolded(weight, axis).flatten(0, -2)


def unfolded(weight: Tensor, axis: Axis) -> Tensor:
    """A parameter with the site's units in its last dimension; what positions they have in one before it."""
    units = weight.shape[axis.dim] // axis.positions
    return weight.unflatten(axis.dim, (units, axis.positions)).movedim(axis.dim, -1)


def folded(weight: Tensor, axis: Axis) -> Tensor:
    """The parameter that `unfolded` made this of."""
    return weight.movedim(-1, axis.dim).flatten(axis.dim, axis.dim + 1)
