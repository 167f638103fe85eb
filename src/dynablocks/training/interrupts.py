"""Ctrl-C: the first one is noted, and heeded between two steps; a second one stops at once."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator

REPEAT_SECONDS = 1.0
_latest_interrupt = [-math.inf]


def is_repeated_interrupt() -> bool:
    """Whether another interrupt came just before: a worker of ``reproduce`` gets the terminal's and its command's."""
    now = time.monotonic()
    if now - _latest_interrupt[0] <= REPEAT_SECONDS:
        return True
    _latest_interrupt[0] = now
    return False


@contextlib.contextmanager
def polite_interrupt() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C, from which on the yielded function returns True; a second one interrupts at once.

    An ignored Ctrl-C stays ignored: a script's background job inherits that, for it is meant for the foreground.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield lambda: False
        return
    noted: list[int] = []
    _latest_interrupt[0] = -math.inf

    def note(number: int, frame: object) -> None:
        if is_repeated_interrupt():
            return
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
