"""Latency as a cost: times of the real shapes, measured once on this machine and kept; for other widths, in between."""

import bisect
import hashlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.environment import machine
from rmtkd.errors import PlanError
from rmtkd.measurement import evaluation, time_calls
from rmtkd.modules import order_of
from rmtkd.planning.lines import Problems, check, parse
from rmtkd.planning.timed_parts import filled, monotone, outlines, parts_by_shape, shapes_of
from rmtkd.sites import Site
from rmtkd.surgery import skeleton
from rmtkd.writing import write_atomically

SECONDS, FEWEST, MOST = 20.0, 5, 100
"""How long all parts are timed, in turns, unless these are fewer or more turns."""
VERSION = 3
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
        """Milliseconds at these widths: linear in each of them between two knots; below the first, the first's.

        A budget asks for the same widths again and again: what was answered is kept.
        """
        key = tuple(widths)
        if key not in self._known:
            self._known[key] = self._interpolated(key)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[int, ...], float]:
        return {}

    def _interpolated(self, widths: tuple[int, ...]) -> float:
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
        wholes = [filled(skeleton(model, sites, widths), device) for widths in ({}, least)]
        calls: list[Callable[[], object]] = [partial(batching.logits, whole, batch) for whole in wholes]
        with evaluation(model):
            shapes = parts_by_shape(model, sites, batch)
            for parts in shapes:
                calls += [parts[0].call_at(model, sites, widths, batch) for widths in parts[0].points]
        with torch.no_grad():
            full_ms, least_ms, *times = (stopwatch or in_turns)(calls, device)
        grids, rest = [], iter(times)
        for parts in shapes:
            first = parts[0]
            values = first.times * np.array([next(rest) for _ in first.points]).reshape(first.shape)
            grids.append((parts, monotone(values, first.steps)))
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


def _key(model: nn.Module, sites: Sequence[Site], batch: Batch) -> str:
    """A hash of all that a table depends on."""
    facts = (
        VERSION,
        circumstances(model, batch),
        repr(model),
        getattr(getattr(model, "config", None), "_attn_implementation", None),
        shapes_of(model),
        [str(order_of(parameter)) for parameter in model.parameters()],
        [(site.name, site.block, site.least, site.width, site.groups) for site in sites],
        outlines(batching.inputs(batch)),
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
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(asdict(self)).encode())
