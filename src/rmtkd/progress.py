"""Events of a run, and the two ways to watch them: bars on a terminal, plain lines in a pipe."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
Listener = Callable[[Mapping[str, Any]], None]
"""Called with every event: a mapping with the keys `event` and `seconds` (since the start) and those of its kind."""


PASSING = frozenset({"reading", "step"})
"""Events that nobody is told of who listens later."""
EVERY = 10.0
"""Seconds after which it is told again how far rows have been read."""


class Emitter:
    """Sends every event to all listeners, stamped with the time since the start."""

    def __init__(self, *listeners: Listener | None):
        self.listeners = [listener for listener in listeners if listener]
        self.told: list[Mapping[str, Any]] = []
        self.start = time.monotonic()

    def add(self, listener: Listener) -> None:
        """Tell one more listener, first of all that was told before."""
        for event in self.told:
            listener(event)
        self.listeners.append(listener)

    def __call__(self, event: str, **fields: Any) -> None:
        """Send one event."""
        stamped = {"event": event, "seconds": round(time.monotonic() - self.start, 3), **fields}
        if event not in PASSING:
            self.told.append(stamped)
        for listener in self.listeners:
            listener(stamped)

    def reading(self, rows: Iterable[T], role: str) -> Iterator[T]:
        """The same batches, telling now and then how many were read."""
        last = time.monotonic()
        for count, batch in enumerate(rows, 1):
            if time.monotonic() - last >= EVERY:
                last = time.monotonic()
                self("reading", role=role, batches=count)
            yield batch


def describe(event: Mapping[str, Any]) -> str | None:
    """One line about an event, or None for those that are not told."""
    match event["event"]:
        case "reading":
            return f"reading {event['role']} rows: {event['batches']:,} batches so far"
        case "size":
            return f"target {event['target']}, {event['number']} of {event['sizes']}"
        case "start":
            accuracy = event["selection_accuracy"]
            return f"teacher: {accuracy['value']:.2%} ± {accuracy['stderr']:.2%} on {accuracy['n']} selection rows"
        case "plan":
            return f"plan: {event['predicted']['params']:,} parameters, {event['predicted']['flops'] / 1e6:,.1f} MFLOPs"
        case "cut":
            return f"round {event['number']}: cutting {len(event['sites'])} sites"
        case "check":
            return (
                f"round {event['number']}: equals its full-width reference to {event['error']:.0e}; "
                f"{event['selection_accuracy']:.2%} before recovery{_near(event)}"
            )
        case "round":
            back = " – taken back" if event["rolled_back"] else ""
            return (
                f"round {event['number']}: {event['parameters']:,} parameters, {event['accuracy']:.2%} on selection "
                f"after {event['steps']} steps{_near(event)}{back}"
            )
        case "blend":
            return f"round {event['number']}: going back towards the cut"
        case "forecast":
            return f"this will take {forecast_line(event)}"
        case "memory":
            return f"memory ran out: from here on a batch is run in {event['pieces']} pieces"
        case "resume":
            changed = [f"{name} {old} → {new}" for name, (old, new) in event["changed"].items()]
            note = f"; since it began: {', '.join(changed)}, so that the last bits may differ" if changed else ""
            return f"going on after {event['rounds']} rounds{note}"
        case "training":
            return f"going on after step {event['step']} of {event['steps']}"
        case "interrupted":
            return f"interrupted {event['where']}"
        case "finished":
            return f"this run is finished: {event['stop_reason']}"
        case "rows":
            return event["note"]
        case "unreported":
            return f"no report.html: {event['reason']} To try again: rmtkd report {event['folder']}"
        case "measure":
            return "measuring both models"
        case "done":
            return f"stopped: {event['stop_reason']}"
    return None


def _near(event: Mapping[str, Any]) -> str:
    """How far from the teacher, and by which steps; nothing in records of earlier versions."""
    apart, lr, blend = event.get("divergence"), event.get("lr"), event.get("blend")
    pace = "" if lr is None else f" at a learning rate of {lr:.2g}"
    pace += "" if blend is None else f", of whose changes {blend:.0%} are kept"
    return pace if apart is None else f"{pace}, {apart:.2g} nats from the teacher"


def forecast_line(forecast: Mapping[str, Any]) -> str:
    """A forecast in words."""
    spent = forecast["seconds_cut"] + forecast["seconds_recovery"]
    free, needed = forecast["free_bytes"], forecast["memory_bytes"]
    short = f" (only {free / 1e9:.1f} GB are free: batches may have to be halved)" if free and free < needed else ""
    return (
        f"about {duration(spent)} ({duration(forecast['seconds_cut'])} to cut, {forecast['steps']:,} steps of "
        f"{forecast['seconds_step']:.2g} s), {needed / 1e9:.1f} GB of memory{short} and "
        f"{forecast['disk_bytes'] / 1e9:.1f} GB of disk"
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is short."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class PlainLines:
    """A line per event, and one per tenth of the steps, for logs and pipes."""

    def __init__(self, console: Console):
        self.console = console

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Print the event."""
        if event["event"] == "step":
            step, steps = event["step"], event["steps"]
            if step * 10 // steps == (step - 1) * 10 // steps:
                return
            line = f"step {step}/{steps}, loss {event['loss']:.4f}"
        else:
            line = describe(event)
        if line:
            self.console.print(f"[{event['seconds']:7.1f} s] {line}", highlight=False, markup=False, soft_wrap=True)


class Bars:
    """A bar with the time remaining for the steps of each phase; other events as lines above it."""

    def __init__(self, console: Console):
        self.console = console
        self.lines = PlainLines(console)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            console=console,
            transient=True,
        )
        self.task = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Draw the event."""
        if event["event"] != "step":
            return self.lines(event)
        if self.task is None:
            name = f"round {event['number']}" if event.get("number") else "training"
            self.progress.start()
            self.task = self.progress.add_task(name, total=event["steps"], loss=event["loss"])
        self.progress.update(self.task, completed=event["step"], loss=event["loss"])
        if event["step"] == event["steps"]:
            self.close()

    def close(self) -> None:
        """Take the bar away, also in the middle of a phase, and give the terminal its cursor back."""
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.progress.stop()
            self.task = None


@contextmanager
def watcher(console: Console) -> Iterator[Listener]:
    """Bars where the console is a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield PlainLines(console)
        return
    bars = Bars(console)
    try:
        yield bars
    finally:
        bars.close()
