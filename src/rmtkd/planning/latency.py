"""Latency as a cost: times of the real shapes, measured once on this machine and kept; for other widths, in between."""

import bisect
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.environment import machine
from rmtkd.errors import PlanError
from rmtkd.measurement import evaluation, time_calls
from rmtkd.modules import randomize
from rmtkd.planning.lines import Problems, check, parse
from rmtkd.sites import Site, by_width
from rmtkd.surgery import fill_with_zeros, skeleton

POINTS = 36
"""Most combinations of widths at which a part of the network is timed, where two or more meet in a parameter."""
MOST_KNOTS = 8
"""Most sizes of one width at which it is timed."""
SECONDS, FEWEST, MOST = 20.0, 5, 100
"""How long all parts are timed, in turns, unless these are fewer or more turns."""
VERSION = 2
"""Of the files in the cache; another one is measured anew."""

Stopwatch = Callable[[Sequence[Callable[[], object]], torch.device], Sequence[float]]
"""The milliseconds that each of several calls takes on a device."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The time of one part of the network at a grid of its widths, for all parts of its shape.

    Attributes:
        parts: for each part of this shape, the names of the sites that stand for its widths, in the order of `knots`.
        knots: for each width the sizes at which it was measured, ascending, the last is the full width.
        ms: milliseconds of a forward pass that go to one part, at every combination of the knots, the last width
            fastest.
    """

    parts: tuple[tuple[str, ...], ...]
    knots: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...]

    def __post_init__(self) -> None:
        whole = (
            all(len(names) == len(self.knots) for names in self.parts)
            and all(knots and knots[0] >= 0 and list(knots) == sorted(set(knots)) for knots in self.knots)
            and len(self.ms) == int(np.prod([len(knots) for knots in self.knots]))
            and min(self.ms) >= 0
        )
        if not whole:
            raise PlanError(
                "a latency table must have a time of at least 0 for every combination of ascending widths. That of "
                f"{', '.join(itertools.chain(*self.parts)) or 'no site'} has not. Make the plan anew with the model."
            )

    def at(self, widths: Sequence[int]) -> float:
        """Milliseconds at these widths: linear in each of them between two knots; below the first, the first's."""
        values = np.asarray(self.ms).reshape([len(knots) for knots in self.knots])
        for knots, width in zip(self.knots, widths, strict=True):
            i = bisect.bisect_left(knots, width, hi=len(knots) - 1)
            if i == 0 or width >= knots[i]:
                values = values[i]
            else:
                share = (width - knots[i - 1]) / (knots[i] - knots[i - 1])
                values = (1 - share) * values[i - 1] + share * values[i]
        return float(values)


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Milliseconds of a forward pass at any widths, from measured times.

    A forward pass takes what the whole model takes, less what each part takes less at its narrower widths:

        latency = full_ms + Σ_parts (grid(widths) − grid(full widths))

    A part alone runs out of other caches than within the model. So all `grid`s are scaled by one factor, by which the
    formula gives the measured time of the whole model with every width at its least.

    Attributes:
        measured_on: processor, threads, device, batch and what else decides, in words.
        full_ms: the untouched model.
        grids: the parts of the network by shape.
    """

    measured_on: dict[str, str]
    full_ms: float
    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        if not self.full_ms > 0:
            raise PlanError(
                f"the latency of the whole model must be more than 0 ms. Got {self.full_ms}. Make the plan anew with "
                "the model."
            )

    def cost(self, widths: Mapping[str, int]) -> float:
        """Predicted milliseconds of a forward pass.

        Args:
            widths: by site name; full where a site is missing.
        """
        change = 0.0
        for grid in self.grids:
            full = [knots[-1] for knots in grid.knots]
            for names in grid.parts:
                kept = [widths.get(name, width) for name, width in zip(names, full, strict=True)]
                if kept != full:
                    change += grid.at(kept) - grid.at(full)
        return self.full_ms + change

    @property
    def words(self) -> str:
        """What the predictions rest on, as the end of a sentence."""
        on = self.measured_on
        return f"measured on {on['processor']} ({on['device']}, {on['threads']} threads), batch {on['batch']}"

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "LatencyTable":
        """The table of fields whose types are in order, see `lines.check`.

        Raises:
            PlanError: if the fields do not fit each other.
        """
        return cls(**{**fields, "grids": tuple(Grid(**grid) for grid in fields["grids"])})

    def check_fits(self, widths: Mapping[str, int]) -> None:
        """Raise `PlanError` unless the table is about sites of these full widths."""
        for grid in self.grids:
            for names in grid.parts:
                if [widths.get(name) for name in names] != [knots[-1] for knots in grid.knots]:
                    raise PlanError(
                        f"a latency table must be of the plan's sites at full width. {', '.join(names)} differ. Make "
                        "the plan anew with the model."
                    )

    @classmethod
    def measure(
        cls, model: nn.Module, sites: Sequence[Site], batch: Batch, *, stopwatch: Stopwatch | None = None
    ) -> "LatencyTable":
        """Time the parts of the model at a few widths each, in turns with the whole model, filled with random numbers.

        A part is the smallest module that holds all parameters around the sites of one block and is called in a forward
        pass, once or more often; the whole model, if need be. It is called as it was in a pass of the model. Parts of
        one shape are measured once. Widths that meet in a parameter are measured in combinations, as they multiply.

        Args:
            model: the model, left as it was.
            sites: the sites that may be narrowed.
            batch: what a forward pass is timed on.
            stopwatch: what times the calls.
        """
        device = next(model.parameters()).device
        batch = batching.to(batch, device)
        least = {site.name: site.least for site in sites}
        wholes = [_filled(skeleton(model, sites, widths), device) for widths in ({}, least)]
        calls: list[Callable[[], object]] = [partial(batching.logits, whole, batch) for whole in wholes]
        with evaluation(model):
            shapes = _parts_by_shape(model, sites, batch)
            for parts in shapes:
                calls += [parts[0].call_at(model, sites, widths, batch) for widths in parts[0].points]
        with torch.no_grad():
            full_ms, least_ms, *times = (stopwatch or in_turns)(calls, device)
        grids, rest = [], iter(times)
        for parts in shapes:
            first = parts[0]
            values = first.times * np.array([next(rest) for _ in first.points]).reshape(first.shape)
            grids.append((parts, _monotone(values, first.steps)))
        gained = sum(len(parts) * (values.flat[-1] - values.flat[0]) for parts, values in grids)
        scale = max(full_ms - least_ms, 0.0) / gained if gained > 0 else 1.0
        return cls(
            measured_on=circumstances(model, batch),
            full_ms=full_ms,
            grids=tuple(
                Grid(
                    parts=tuple(part.names for part in parts),
                    knots=parts[0].knots,
                    ms=tuple(float(scale * value) for value in values.flat),
                )
                for parts, values in grids
            ),
        )

    @classmethod
    def cached(
        cls, model: nn.Module, sites: Sequence[Site], batch: Batch, *, stopwatch: Stopwatch | None = None
    ) -> "LatencyTable":
        """The table of this machine, model and batch: measured the first time, then read from `cache_folder`.

        A file that is damaged, or of anything else, is measured anew and replaced.
        """
        key = _key(model, sites, batch)
        path = cache_folder() / f"latency-{key[:32]}.json"
        with suppress(OSError, PlanError, ValueError):
            found = _File.of(path.read_text(encoding="utf-8"))
            found.table.check_fits({site.name: site.width for site in sites})
            if found.key == key:
                return found.table
        table = cls.measure(model, sites, batch, stopwatch=stopwatch)
        _File(key=key, table=table).save(path)
        return table


def in_turns(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The median milliseconds of each call, of several turns after two that are not counted.

    One thread of a CPU is timed by its own processor time: the wall-clock time of a machine that does nothing else.
    With other work on it the wall clock is off by a factor, and not the same one for short calls and for long.
    """
    clock = time.thread_time if _has_own_clock(device) else time.perf_counter
    time_calls(calls, device, repeats=1, warm_up=0)
    began = time.perf_counter()
    time_calls(calls, device, repeats=1, warm_up=0)
    turns = round(SECONDS / (time.perf_counter() - began))
    records = time_calls(calls, device, repeats=min(max(turns, FEWEST), MOST), warm_up=0, clock=clock)
    return [statistics.median(record) for record in records]


def _has_own_clock(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def circumstances(model: nn.Module, batch: Batch) -> dict[str, str]:
    """What decides how long a forward pass takes beside the model's shapes, without names of machines."""
    parameter, facts = next(model.parameters()), machine()
    device = parameter.device
    return {
        "processor": facts["processor"] if device.type == "cpu" else torch.cuda.get_device_name(device),
        "system": facts["system"],
        "cores": facts["cores"],
        "threads": facts["threads"],
        "device": str(device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "batch": f"{batching.rows(batch)} × {batching.length(batch)}",
        "clock": "processor time of one thread" if _has_own_clock(device) else "wall clock",
    }


def cache_folder() -> Path:
    """Where measurements are kept: `RMTKD_CACHE`, or `rmtkd` in `XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("RMTKD_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rmtkd"


# ---------------------------------------------------------------------------------------------- files


def _key(model: nn.Module, sites: Sequence[Site], batch: Batch) -> str:
    """A hash of all that a table depends on."""
    facts = (
        VERSION,
        circumstances(model, batch),
        repr(model),
        _shapes(model),
        [(site.name, site.block, site.least, site.width, site.groups) for site in sites],
        _outlines(batching.inputs(batch)),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _File:
    """What is kept: the table, and what it is of."""

    key: str
    table: LatencyTable

    @classmethod
    def of(cls, text: str) -> "_File":
        problems = Problems("a file of the cache")
        fields = check(cls, parse(text, problems), "", problems)
        problems.stop()
        return cls(key=fields["key"], table=LatencyTable.of(fields["table"]))

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. A cache that cannot be written is none: the plan has the table."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- parts of a network


@dataclass(frozen=True, kw_only=True)
class _Part:
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
        module = _filled(skeleton(model, sites, widths).get_submodule(self.path), next(model.parameters()).device)
        if not self.path:
            return partial(batching.logits, module, batch)
        args, kwargs = self.arguments
        return partial(module, *args, **kwargs)


def _parts_by_shape(model: nn.Module, sites: Sequence[Site], batch: Batch) -> list[list[_Part]]:
    """The parts of the network that have widths, those of one shape together."""
    blocks: dict[str, list[Site]] = {}
    for site in sites:
        if site.width > site.least:
            blocks.setdefault(site.block, []).append(site)
    seen = _watch(model, {path for block in blocks.values() for path in _paths(block)}, batch)
    shapes: dict[str, list[_Part]] = {}
    clusters = [(block, groups) for block in blocks.values() for groups in _clusters(block)]
    for block, groups in clusters:
        path = next(path for path in _paths(block) if path in seen)
        most = max(2, min(MOST_KNOTS, int(POINTS ** (1 / len(groups)))))
        part = _Part(
            path=path,
            groups=groups,
            arguments=seen[path][0],
            times=len(seen[path]),
            knots=tuple(_knots(group, most) for group in groups),
        )
        inner = [[(site.name.removeprefix(site.block), site.groups) for site in group] for group in groups]
        shape = repr((_shapes(model.get_submodule(path)), _outlines(part.arguments), part.times, part.knots, inner))
        shapes.setdefault(shape if path else groups[0][0].name, []).append(part)
    return list(shapes.values())


def _clusters(block: Sequence[Site]) -> list[tuple[tuple[Site, ...], ...]]:
    """The sites of a block by shared width, those widths together that meet in a parameter. Others add up: attention
    and feed-forward of MiniLM to 2 % of the block."""
    found: list[tuple[set[str], tuple[tuple[Site, ...], ...]]] = []
    for group in by_width(block).values():
        parameters = {
            a.parameter for site in group for stream in site.streams for a in (*stream.writers, *stream.readers)
        }
        meeting = [cluster for cluster in found if cluster[0] & parameters]
        found = [cluster for cluster in found if not cluster[0] & parameters]
        groups = (*itertools.chain(*(groups for _, groups in meeting)), group)
        found.append((parameters.union(*(names for names, _ in meeting)), groups))
    return [groups for _, groups in found]


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


def _monotone(values: Float[np.ndarray, "..."], steps: Sequence[bool]) -> Float[np.ndarray, "..."]:
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


def _filled(module: nn.Module, device: torch.device) -> nn.Module:
    """The skeleton with random numbers: sums of zeros, or of numbers near it, may be faster or slower."""
    fill_with_zeros(module, device)
    randomize(module, seed=0)
    return module.eval()


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


def _outlines(arguments: Any) -> Any:
    """The arguments with shapes in place of tensors."""
    return tree_map_only(Tensor, lambda tensor: (tuple(tensor.shape), str(tensor.dtype)), arguments)
