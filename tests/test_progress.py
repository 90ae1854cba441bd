"""Events are told in order; plain lines in a pipe, a bar on a terminal that is always taken away again."""

import io
import itertools
import json
import time
from functools import partial

import pytest
from rich.console import Console

from rmtkd.progress import Bars, Emitter, PlainLines, describe, watcher

ACCURACY = {"value": 0.9, "n": 100, "stderr": 0.03}
EVENTS = [
    {"event": "start", "seconds": 0.0, "selection_accuracy": ACCURACY},
    {"event": "plan", "seconds": 0.1, "predicted": {"params": 1000, "flops": 2000}, "widths": {}},
    {"event": "cut", "seconds": 0.2, "number": 1, "sites": ["a", "b"]},
    {"event": "check", "seconds": 0.3, "number": 1, "error": 1e-7, "selection_accuracy": 0.8},
    *({"event": "step", "seconds": 0.4, "number": 1, "step": i, "steps": 20, "loss": 1 / i} for i in range(1, 21)),
    {
        "event": "round",
        "seconds": 0.5,
        "number": 1,
        "parameters": 500,
        "accuracy": 0.85,
        "steps": 20,
        "rolled_back": True,
    },
    {"event": "measure", "seconds": 0.6},
    *({"event": "step", "seconds": 0.7, "number": 0, "step": i, "steps": 2, "loss": 1.0} for i in (1, 2)),
    {"event": "done", "seconds": 0.8, "stop_reason": "plan: every site has the width the rule gives it"},
]
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""What a terminal is sent to hide its cursor and to show it again."""


def terminal() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=True, width=100), text


def test_events_reach_all_listeners_in_order_and_stamped():
    first, second = [], []
    emit = Emitter(first.append, second.append)
    emit("start", a=1)
    emit("done", a=2)
    assert first == second
    assert [(event["event"], event["a"]) for event in first] == [("start", 1), ("done", 2)]
    assert 0 <= first[0]["seconds"] <= first[1]["seconds"]


def test_a_listener_that_comes_late_is_told_what_it_missed():
    early, late = [], []
    emit = Emitter(early.append)
    emit("start")
    emit("step", step=1)
    emit.add(late.append)
    emit("done")
    assert [event["event"] for event in early] == ["start", "step", "done"]
    assert [event["event"] for event in late] == ["start", "done"]


def test_long_reading_is_told_now_and_then_and_to_those_there_alone(monkeypatch: pytest.MonkeyPatch):
    early, late, clock = [], [], itertools.count(0.0, 4.0)
    monkeypatch.setattr(time, "monotonic", partial(next, clock))
    emit = Emitter(early.append)
    assert list(emit.reading("abcdefg", "training")) == list("abcdefg")
    emit.add(late.append)
    lines = [describe(event) for event in early]
    assert lines and lines[0] == "reading training rows: 3 batches so far"
    assert late == []


def test_events_are_json():
    told = []
    Emitter(told.append)("start", options={"a": None})
    assert json.loads(json.dumps(told[0])) == told[0]


def test_every_event_of_a_run_is_described_in_one_line():
    for event in EVENTS:
        line = describe(event)
        assert line is None if event["event"] == "step" else line and "\n" not in line
    assert describe({"event": "something new"}) is None


def test_in_a_pipe_there_are_plain_lines_and_one_per_tenth_of_the_steps():
    text = io.StringIO()
    with watcher(Console(file=text, width=200)) as listener:
        assert isinstance(listener, PlainLines)
        for event in EVENTS:
            listener(event)
    lines = text.getvalue().splitlines()
    assert "\x1b" not in text.getvalue()
    assert sum("step" in line and "/20" in line for line in lines) == 10
    assert lines[0] == "[    0.0 s] teacher: 90.00% ± 3.00% on 100 selection rows"
    assert any("taken back" in line for line in lines)
    assert lines[-1].endswith("stopped: plan: every site has the width the rule gives it")


def test_on_a_terminal_there_is_a_bar_that_is_taken_away():
    console, text = terminal()
    with watcher(console) as listener:
        assert isinstance(listener, Bars)
        for event in EVENTS:
            listener(event)
    told = text.getvalue()
    assert all(part in told for part in ("training", "0/20", "0/2", "loss 1.0000"))
    assert told.count(HIDE) == told.count(SHOW) == 2
    assert "stopped: plan" in told.rpartition(SHOW)[2]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_bar_is_taken_away_also_when_the_run_fails(error: type[BaseException]):
    console, text = terminal()
    with pytest.raises(error), watcher(console) as listener:
        for event in EVENTS[:10]:
            listener(event)
        raise error
    assert text.getvalue().count(HIDE) == text.getvalue().count(SHOW) == 1
