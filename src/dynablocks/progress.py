"""How far long work is: a bar with the time left on a terminal, elsewhere a line a minute; and the consoles for both.

A bar leaves no trace at its end. Lines are for what is read later, or as text: the log of a job, ``TERM=dumb``.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
PATIENCE_SECONDS = 2.0
"""What takes longer shows how far it is."""
LINE_SECONDS = 60.0
"""Where no bar can be drawn, a line appears at most so often."""
REFRESH_SECONDS = 0.1
"""Items that come faster are not shown one by one."""
SPEED_SECONDS = 3600.0
"""A bar takes its speed from its moves in so long a time: one that seldom moves needs two of them."""
BESIDE_LABEL = 41
"""Columns that a short bar, the percentage and both clocks take: a longer label is cut before a clock is."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C of which a person was told already: what is kept, and how to go on."""


def is_terminal(stream: Any) -> bool:
    """Whether a stream ends at a terminal; one that is closed, or not there at all, does not.

    Example:
        >>> is_terminal(None)
        False
    """
    try:
        return stream is not None and bool(stream.isatty())
    except ValueError:
        return False


def output_console(columns: int) -> Console:
    """The console on standard output, as wide as its terminal, or so many columns where it is none."""
    from rich.console import Console

    return Console(width=None if is_terminal(sys.stdout) else columns)


def error_console() -> Console:
    """The console on standard error, where everything that is not a result goes.

    It falls silent where its disk is full or its reader gone: what is told of a computation does not end it.
    """
    return _quiet_when_broken()(stderr=True)


@functools.cache
def _quiet_when_broken() -> type[Console]:
    from rich.console import Console

    class QuietWhenBroken(Console):
        """A console that stops nothing: rich's own leaves the program where the reader is gone."""

        def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
            # Here all is written: lines, a bar's beginning, its moves from a thread of their own, and its end.
            try:
                super().__exit__(exc_type, exc_value, traceback)
            except (OSError, ValueError):
                self.quiet = True

        def on_broken_pipe(self) -> None:
            self.quiet = True

    return QuietWhenBroken


def printable(text: str) -> str:
    r"""``text`` in one line, with what a terminal would obey, or cannot show, as Python writes it.

    Names in a sentence come from files that others made: an escape sequence or a line break in one could show a verdict
    that nobody gave.

    Example:
        >>> print(printable("a\x1b[2J\nb"))
        a\x1b[2J\nb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_line(console: Console, sentence: str) -> None:
    """Print a sentence, made :func:`printable`; its brackets and colons stay. A full disk makes the console quiet."""
    try:
        console.print(printable(sentence), markup=False, emoji=False, highlight=False, soft_wrap=True)
    except OSError:
        console.quiet = True


def show(sentence: str) -> None:
    """Print a sentence that is a result, made :func:`printable`, to standard output.

    Example:
        >>> show("the certificate holds")
        the certificate holds
    """
    print(printable(sentence))


def tell(sentence: str) -> None:
    """Write a sentence, made :func:`printable`, to standard error where one takes it, and never to standard output."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(printable(sentence), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """A time in words of a clock.

    Example:
        >>> clock(190), clock(3661)
        ('3:10', '1:01:01')
    """
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class EveryMinute:
    """Says when the next line is due: a minute after it was made, and after each time that it said so."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether a minute has passed."""
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return False
        self._last = now
        return True


class ProgressLines:
    """Takes the fraction done, as a bar does, and prints at most one line a minute.

    The speed is that since the first call: what goes on from where it was stopped does not begin at 0.
    """

    def __init__(self, label: str, console: Console) -> None:
        self._label, self._console, self._minute = label, console, EveryMinute()
        self._first: tuple[float, float] | None = None

    def __call__(self, fraction: float) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now, fraction
        if fraction >= 1 or not self._minute.is_due():
            return
        began, before = self._first
        gained = fraction - before
        left = f", about {clock((now - began) * (1 - fraction) / gained)} left" if gained > 0 else ""
        print_line(self._console, f"{self._label}: {100 * fraction:.0f} %{left}")


@contextlib.contextmanager
def progress_bar(label: str, console: Console | None = None) -> Iterator[Callable[[float], None]]:
    """A bar for one task, or its lines; the yielded function takes the fraction done.

    Example:
        >>> with progress_bar("counting") as update:
        ...     update(1.0)
    """
    label = printable(label)
    console = console or error_console()
    if not console.is_interactive:
        yield ProgressLines(label, console)
        return
    with _bar(console) as progress:
        task = progress.add_task(label, total=1.0)
        yield lambda fraction: progress.update(task, completed=fraction)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield ``items``, ``total`` of them; after two seconds show on standard error how far it is."""
    due = time.monotonic() + PATIENCE_SECONDS
    update: Callable[[float], None] | None = None
    with contextlib.ExitStack() as stack:
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now < due:
                continue
            due = now + REFRESH_SECONDS
            if update is None:
                update = stack.enter_context(progress_bar(description))
            update(done / total)


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    # Of all columns the bar alone may shrink: rich takes what is lacking from those that may wrap.
    label = Column(no_wrap=True, overflow="ellipsis", max_width=max(8, console.width - BESIDE_LABEL))
    columns = (
        TextColumn("{task.description}", markup=False, table_column=label),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("left,"),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("gone"),
    )
    return Progress(
        *columns,
        console=console,
        transient=True,
        speed_estimate_period=SPEED_SECONDS,
        redirect_stdout=is_terminal(sys.stdout),  # of results that are piped none may go to the bar's console
    )
