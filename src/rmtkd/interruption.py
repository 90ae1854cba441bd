"""Ctrl-C, and the signal that a cluster sends: asked once, a run ends after the step; asked twice, at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to stop, and its state is saved."""


class Asked:
    """Whether someone has asked the run to stop."""

    def __init__(self) -> None:
        self.stop = False


@contextmanager
def interruptible() -> Iterator[Asked]:
    """Within, the first Ctrl-C only asks; the second raises `KeyboardInterrupt`. Afterwards all is as before.

    Signals reach only the main thread of a program: elsewhere nobody asks.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(_: int, __: FrameType | None) -> None:
        if asked.stop:
            raise KeyboardInterrupt
        asked.stop = True

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
