"""Progress bars with the time left, for anything that takes more than two seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")
PATIENCE_SECONDS = 2.0


def error_console() -> Console:
    """The console on standard error, where everything that is not a result goes."""
    from rich.console import Console

    return Console(stderr=True)


@contextlib.contextmanager
def progress_bar(label: str, console: Console | None = None) -> Iterator[Callable[[float], None]]:
    """A bar for one task; the yielded function takes the fraction done. Without a terminal nothing is drawn.

    Example:
        >>> with progress_bar("counting") as update:
        ...     update(1.0)
    """
    with _bar(console or error_console()) as progress:
        task = progress.add_task(label, total=1.0)
        yield lambda fraction: progress.update(task, completed=fraction)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield ``items``; after two seconds show on a terminal's stderr how far it is, and leave no trace at the end."""
    start = time.monotonic()
    bar: Progress | None = None
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if bar is None and time.monotonic() - start > PATIENCE_SECONDS:
                bar = _bar(error_console())
                bar.add_task(description, total=total)
                bar.start()
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
    finally:
        if bar is not None:
            bar.stop()


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
