"""Ctrl-C: the first one is noted, and heeded between two steps; a second one stops at once."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

REPEAT_SECONDS = 1.0
NOTED = b"\nStopping at the end of a step; Ctrl-C again stops at once.\n"
_latest_interrupt = [-math.inf]


def is_repeated_interrupt() -> bool:
    """Whether another interrupt came just before: a worker of ``reproduce`` gets the terminal's and its command's."""
    now = time.monotonic()
    if now - _latest_interrupt[0] <= REPEAT_SECONDS:
        return True
    _latest_interrupt[0] = now
    return False


@contextlib.contextmanager
def polite_interrupt(*, silent: bool = False) -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C, from which on the yielded function returns True; a second one interrupts at once.

    The first is answered on standard error, unless ``silent`` (all processes but the first): a step may take long.
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
        if not silent:
            _answer()

    try:
        before = signal.signal(signal.SIGINT, note)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)


def _answer() -> None:
    """Say that Ctrl-C was noted; not through the stream, which a signal in its midst must not enter again."""
    if sys.stderr is not None:  # otherwise its number may be that of another file
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), NOTED)
