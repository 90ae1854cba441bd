"""Cutting a network width by width, shallow to deep, each on the activations that the cuts before it leave.

After every cut the activations further on are others, and are collected anew. What lies before the cut is not run
again: the calls of a block are kept in files, so that a pass over the calibration rows runs one block and not all.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.activations import Enough, collect, first_output, readers
from rmtkd.bases import Basis, bilinear_bases, linear_basis, unit_bases
from rmtkd.batches import Batch, Call
from rmtkd.covariance import Covariance
from rmtkd.fisher import Metrics, after_cut, weighed
from rmtkd.measurement import evaluation
from rmtkd.memory import Pieces, is_out_of_memory
from rmtkd.norms import batch_norms, gather_statistics, norms_of
from rmtkd.sites import Site, after_cuts, blocks_of, by_width
from rmtkd.surgery import fold

Fit = Callable[[int], tuple[Basis, ...]]
"""From a width to the bases of a site's streams."""


def fit_bases(
    model: nn.Module, site: Site, moments: Sequence[Covariance], keep: int, metrics: Metrics | None = None
) -> tuple[Basis, ...]:
    """The bases of one site's streams at width `keep`; for several widths see `fitting`."""
    return fitting(model, site, moments, metrics)(keep)


def fitting(
    model: nn.Module,
    site: Site,
    moments: Sequence[Covariance],
    metrics: Metrics | None = None,
    orders: dict[int, Tensor] | None = None,
) -> Fit:
    """What gives the bases of one site's streams at any width, from the moments of its activations, in the metrics of
    what its readers write; without, all errors count alike. What does not hang on the width is computed here, once.
    `orders` is this site's of `bases.unit_bases`."""
    if site.kind == "bilinear":
        queries, keys = moments
        # A constant added to all keys moves every score of a query alike, which softmax does not see: centre them.
        return partial(bilinear_bases, queries.second_moment(), keys.covariance())
    weights = weighed(readers(model, site), site, metrics or {})
    centred = [stream.is_centred for stream in site.streams]
    spreads = [m.covariance() if c else m.second_moment() for m, c in zip(moments, centred, strict=True)]
    means = [m.mean if c else torch.zeros_like(m.mean) for m, c in zip(moments, centred, strict=True)]
    if site.kind == "linear":
        return lambda keep: (linear_basis(spreads[0], means[0], weights[0], keep),)
    return partial(unit_bases, spreads, means, weights, each=site.each, orders=orders)


def cut_in_order(
    model: nn.Module,
    sites: Sequence[Site],
    widths: Mapping[str, int],
    calibration: Iterable[Batch],
    *,
    metrics: Metrics | None = None,
    blocks: Sequence[str] | None = None,
    pieces: Pieces | None = None,
    scratch: Path | None = None,
) -> tuple[nn.Module, dict[str, tuple[Basis, ...]]]:
    """Cut sites one width after the other, shallow to deep.

    Args:
        model: the model, left as it was.
        sites: the sites to cut.
        widths: for each site's name the width that is kept.
        calibration: batches whose activations choose the bases.
        metrics: from `fisher.output_metrics`: in which errors of the cut are small; the identity by default.
        blocks: paths of all blocks of the model in order; those of the sites by default.
        pieces: in how many pieces a batch is run, should memory run out.
        scratch: folder for the files of this cut; the system's by default.

    Returns:
        The narrower model and the bases by site name; none for the width of heads of which none was kept.
    """
    bases: dict[str, tuple[Basis, ...]] = {}
    with BlockCalls(model, calibration, blocks or blocks_of(sites), scratch=scratch) as calls:
        for shares in by_width(sites):
            cut = {name: widths[name] for name in bases}
            group = by_width(after_cuts(sites, cut)).get(shares, ())
            if not group:
                continue
            moments = _moments(model, group, calibration, calls, pieces)
            for site in group:
                bases[site.name] = fit_bases(model, site, moments[site.name], widths[site.name], metrics)
            for site in group:
                metrics = after_cut(metrics or {}, site, bases[site.name][0])
            model = fold(model, group, bases)
            _renew(model, group, calibration, calls, pieces)
    if norms_of(sites):  # what lies further on sees other activations, too
        gather_statistics(model, batch_norms(model), calibration, pieces=pieces)
    return model, bases


def _renew(
    model: nn.Module, group: Sequence[Site], calibration: Iterable[Batch], calls: "BlockCalls", pieces: Pieces | None
) -> None:
    """Gather the statistics of the norms that read these sites: what is cut next is seen through them."""
    norms, scope = norms_of(group), group[0].scope
    if scope is not None and calls.at == scope and calls.follow_each_other:
        gather_statistics(model, norms, calls)
    else:
        gather_statistics(model, norms, calibration, pieces=pieces)


def _moments(
    model: nn.Module, group: Sequence[Site], calibration: Iterable[Batch], calls: "BlockCalls", pieces: Pieces | None
) -> dict[str, tuple[Covariance, ...]]:
    scope = group[0].scope
    if scope is not None and calls.follow_each_other:
        try:
            calls.move_to(model, scope)
            return collect(model, group, calls)
        except (OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            calls.follow_each_other = False  # no room for the files, or for whole batches: the long way needs neither
    return collect(model, group, calibration, pieces=pieces)


class BlockCalls:
    """The calls of one block over all batches, in files: re-iterable, as batches that run only this block.

    A network may use other inputs at every block. So the first batch is watched: only where every block is called once,
    in order, with the output of the one before it and otherwise the very same arguments, none of them changed in place,
    do calls follow each other.
    And only tensors and plain values are kept: files hold nothing that would have to be trusted.

    Args:
        model: the network.
        batches: what it is called with.
        blocks: paths of its blocks, in order.
        scratch: folder for the files; the system's by default.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], blocks: Sequence[str], *, scratch: Path | None = None
    ):
        self.batches, self.blocks, self.scratch = batches, list(blocks), scratch
        self.at: str | None = None
        self.files: list[Path] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.follow_each_other = len(self.blocks) > 0 and follow_each_other(model, batches, self.blocks)

    def __enter__(self) -> "BlockCalls":
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def move_to(self, model: nn.Module, block: str) -> None:
        """Hold the calls of this block: run what lies between the last block held and this one."""
        if self.at is None or self.blocks.index(block) < self.blocks.index(self.at):
            self._record(model, block)
        while self.at != block:
            self._advance(model)

    def __iter__(self) -> Iterator[Batch]:
        assert self.at is not None, "move_to comes first"
        for file in self.files:
            yield self._read(file)

    def _read(self, file: Path) -> Call:
        kept = torch.load(file, weights_only=True)
        mask: Mapping[str, Tensor] = {} if kept["mask"] is None else {"attention_mask": kept["mask"]}
        return Call(rows={"state": kept["args"][0], **mask}, forward=partial(_call_block, self.at, kept))

    def _record(self, model: nn.Module, block: str) -> None:
        self.at, self.files = block, []
        if self._folder is None:  # only now: there may be no room for a folder either
            self._folder = tempfile.TemporaryDirectory(prefix=".calls-", suffix=".partial", dir=self.scratch)
        folder = Path(self._folder.name)
        device = next(model.parameters()).device

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.update(args=list(args), kwargs=dict(kwargs))
            raise Enough

        handle = model.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with evaluation(model):
                for i, batch in enumerate(self.batches):
                    kept: dict[str, Any] = {"mask": batching.real_positions(batch)}
                    with suppress(Enough):
                        batching.logits(model, batching.to(batch, device))
                    self.files.append(folder / f"{i}.pt")
                    torch.save(kept, self.files[-1])
        finally:
            handle.remove()

    def _advance(self, model: nn.Module) -> None:
        with evaluation(model):
            for file in self.files:
                kept = torch.load(file, weights_only=True)
                kept["args"][0] = _call_block(self.at, kept, model, None)
                torch.save(kept, file)
        self.at = self.blocks[self.blocks.index(self.at) + 1]  # type: ignore[arg-type]


def _call_block(path: str | None, kept: Mapping[str, Any], model: nn.Module, _: object) -> Tensor:
    assert path is not None
    return first_output(model.get_submodule(path)(*kept["args"], **kept["kwargs"]))


def follow_each_other(model: nn.Module, batches: Iterable[Batch], blocks: Sequence[str]) -> bool:
    """Whether each block is called once, with the output of the block before it and else the same arguments, all of
    them tensors or plain values, and nothing changes these or what it puts out in place."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
    versions: list[tuple[Tensor, int]] = []

    def note(*values: Any) -> None:
        versions.extend((tensor, _version(tensor)) for value in values for tensor in tensors_in(value))

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(args, kwargs)

    def leave(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((path, args, kwargs, output))
        note(output)

    with ExitStack() as hooks, evaluation(model):
        for path in blocks:
            block = model.get_submodule(path)
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(partial(leave, path), with_kwargs=True).remove)
        batch = batching.first(batches, "calibration")
        batching.logits(model, batching.to(batching.head(batch, 2), next(model.parameters()).device))
    if [path for path, *_ in calls] != list(blocks) or any(_version(tensor) != seen for tensor, seen in versions):
        return False
    if not all(args and isinstance(args[0], Tensor) and _is_plain([*args, kwargs]) for _, args, kwargs, _ in calls):
        return False

    def rest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Everything but the state that goes from block to block."""
        return [*args[1:], *(kwargs[name] for name in sorted(kwargs))]

    for (_, args, kwargs, output), (_, then_args, then_kwargs, _) in itertools.pairwise(calls):
        if then_args[0] is not first_output(output) or (len(args), sorted(kwargs)) != (
            len(then_args),
            sorted(then_kwargs),
        ):
            return False
        if any(a is not b for a, b in zip(rest(args, kwargs), rest(then_args, then_kwargs), strict=True)):
            return False
    return True


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors of inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, in lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from tensors_in(part)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor, a number, a text or nothing, or a list, tuple or dictionary of such."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, (*value, *value.values())))
    return type(value) in (Tensor, nn.Parameter, type(None), bool, int, float, str)
