"""A progress bar that appears only when the work takes more than two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
PATIENCE_SECONDS = 2.0


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield ``items``; after two seconds show on a terminal's stderr how far it is, and leave no trace at the end."""
    start = time.monotonic()
    bar: Progress | None = None
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if bar is None and time.monotonic() - start > PATIENCE_SECONDS:
                bar = _bar(description, total)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
    finally:
        if bar is not None:
            bar.stop()


def _bar(description: str, total: int) -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    bar.add_task(description, total=total)
    bar.start()
    return bar
