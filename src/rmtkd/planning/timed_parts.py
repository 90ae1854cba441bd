"""The parts of a network that are timed for a latency table: found, and called as in a forward pass of the whole."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.modules import randomize
from rmtkd.sites import Site, by_width
from rmtkd.surgery import fill_with_ones, skeleton

POINTS = 36
"""Most combinations of widths at which a part of the network is timed, where two or more meet in a parameter."""
MOST_KNOTS = 8
"""Most sizes of one width at which it is timed."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the network and its widths.

    Attributes:
        path: of the module that is timed; "" is the model.
        groups: its sites by shared width.
        arguments: what the module is called with.
        times: how often it is called in a forward pass.
        knots: for each width the sizes to measure.
    """

    path: str
    groups: tuple[tuple[Site, ...], ...]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    times: int
    knots: tuple[tuple[int, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The site that stands for each width."""
        return tuple(group[0].name for group in self.groups)

    @property
    def shape(self) -> tuple[int, ...]:
        """How many knots each width has."""
        return tuple(len(knots) for knots in self.knots)

    @property
    def steps(self) -> tuple[bool, ...]:
        """For each width whether its first cut adds something."""
        return tuple(any(site.factorizes for site in group) for group in self.groups)

    @property
    def points(self) -> Iterator[dict[str, int]]:
        """Widths by site name at every combination of the knots."""
        for sizes in itertools.product(*self.knots):
            yield {site.name: size for group, size in zip(self.groups, sizes, strict=True) for site in group}

    def call_at(
        self, model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], batch: Batch
    ) -> Callable[[], object]:
        """The call of a module of these widths."""
        module = filled(skeleton(model, sites, widths).get_submodule(self.path), next(model.parameters()).device)
        if not self.path:
            return partial(batching.logits, module, batch)
        args, kwargs = self.arguments
        return partial(module, *args, **kwargs)


def parts_by_shape(model: nn.Module, sites: Sequence[Site], batch: Batch) -> list[list[Part]]:
    """The parts of the network that have widths, those of one shape together."""
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        if site.width > site.least:
            blocks.setdefault(site.block, []).append(site)
    seen = _watch(model, {path for block in blocks.values() for path in _paths(block)}, batch)
    shapes: dict[str, list[Part]] = {}
    clusters = [(block, groups) for block in blocks.values() for groups in _clusters(block)]
    for block, groups in clusters:
        path = next(path for path in _paths(block) if path in seen)
        most = max(2, min(MOST_KNOTS, int(POINTS ** (1 / len(groups)))))
        part = Part(
            path=path,
            groups=groups,
            arguments=seen[path][0],
            times=len(seen[path]),
            knots=tuple(_knots(group, most) for group in groups),
        )
        inner = [[(site.name.removeprefix(site.block), site.groups) for site in group] for group in groups]
        module = model.get_submodule(path)
        shape = repr((module, shapes_of(module), outlines(part.arguments), part.times, part.knots, inner))
        shapes.setdefault(shape if path else groups[0][0].name, []).append(part)
    return list(shapes.values())


def _clusters(block: Sequence[Site]) -> list[tuple[tuple[Site, ...], ...]]:
    """The sites of a block by shared width, those widths together that meet in a parameter. Others add up: attention
    and feed-forward of MiniLM to 2 % of the block. So are those of a long chain taken, which have too many
    combinations."""
    found: list[tuple[set[str], tuple[tuple[Site, ...], ...]]] = []
    for group in by_width(block).values():
        parameters = {
            a.parameter for site in group for stream in site.streams for a in (*stream.writers, *stream.readers)
        }
        meeting = [cluster for cluster in found if cluster[0] & parameters]
        found = [cluster for cluster in found if not cluster[0] & parameters]
        groups = (*itertools.chain(*(groups for _, groups in meeting)), group)
        found.append((parameters.union(*(names for names, _ in meeting)), groups))
    return [
        part
        for _, groups in found
        for part in ([groups] if 2 ** len(groups) <= POINTS else [(group,) for group in groups])
    ]


def _paths(block: Iterable[Site]) -> list[str]:
    """Paths of the modules that hold all parameters around these sites, the smallest first, the model last."""
    owners = [
        axis.parameter.split(".")[:-1]
        for site in block
        for stream in site.streams
        for axis in (*stream.writers, *stream.readers)
    ]
    depth = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*owners, strict=False)))
    return [".".join(owners[0][:i]) for i in range(depth, -1, -1)]


def _watch(
    model: nn.Module, paths: Iterable[str], batch: Batch
) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What the modules at these paths are called with in a forward pass, as far as they are called."""
    seen: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {"": [((), {})]}

    def see(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(path, []).append((args, kwargs))

    handles = [
        model.get_submodule(path).register_forward_pre_hook(partial(see, path), with_kwargs=True)
        for path in sorted(paths)
        if path
    ]
    try:
        batching.logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _knots(group: Sequence[Site], most: int) -> tuple[int, ...]:
    """Sizes at which a width is measured: nothing, if it may go, and one; closer together where it is narrow, multiples
    of 8 where it is wide. Heads are wide by themselves."""
    width, multiple = group[0].width, 8 if group[0].each == 1 else 1
    sizes = {round(width * (i / (most - 1)) ** 2) for i in range(1, most - 1)} if most > 2 else set()
    knots = {group[0].least, 1, width} | {multiple * max(1, round(size / multiple)) for size in sizes}
    if any(site.factorizes for site in group):
        knots.add(width - 1)  # the widest that is factorised
    return tuple(sorted(size for size in knots if group[0].least <= size <= width))


def monotone(values: Float[np.ndarray, "..."], steps: Sequence[bool]) -> Float[np.ndarray, "..."]:
    """The times without what noise does to them: none is above that of a wider part. Times in order stay as they are.

    It is the mean of two bounds that are in order: the largest time of any narrower part, the least of any wider one.
    At a step, where the full width has one thing less to do, its times are apart.
    """
    done = np.empty_like(values)
    ranges = [(slice(-1), slice(-1, None)) if step else (slice(None),) for step in steps]
    for part in itertools.product(*ranges):
        above, below = values[part], values[part]
        for axis in range(values.ndim):
            above = np.maximum.accumulate(above, axis)
            below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
        done[part] = (above + below) / 2
    return done


def filled(module: nn.Module, device: torch.device) -> nn.Module:
    """The skeleton with random numbers: sums of zeros, or of numbers near it, may be faster or slower."""
    fill_with_ones(module, device)
    randomize(module, seed=0)
    return module.eval()


def shapes_of(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of its parameters."""
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


def outlines(arguments: Any) -> Any:
    """The arguments with shapes in place of tensors."""
    return tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), str(tensor.dtype)), arguments)
