"""What a person sees of a training: a progress bar, or lines where there is no terminal."""

from __future__ import annotations

import contextlib
import math
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dynablocks.progress import EveryMinute, clock, error_console, is_terminal, print_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

WIDE, LONG_BAR, SHORT_BAR = 112, 24, 8
"""From so many columns on there is room for a long bar beside everything that is said, and the columns of both."""
FRAME = 13
"""The columns of a line that are neither bar nor text: the word before it, the percentage, spaces."""
LEFT_OUT = ("loss", "images_per_second", "validation_accuracy", "accuracy", "epochs")
"""What is said where there is room for it, least needed first."""


class Display:
    """Shows loss, accuracy, images a second, the epoch and the time left, on standard error.

    A bar on a terminal; elsewhere, as in the log of a job, a line for every epoch and one a minute within a long one.

    Args:
        console: where to write; standard error when empty.
        silent: show nothing (all processes but the first).

    Example:
        >>> with Display(silent=True) as display:
        ...     display.update(0.5, 12.0, {"loss": 1.0})
    """

    def __init__(self, console: Console | None = None, *, silent: bool = False) -> None:
        self._console = console
        self._silent = silent
        self._bar: Progress | None = None
        self._bar_width = 0
        self._minute = EveryMinute()

    def __enter__(self) -> Display:
        if self._console is None:
            self._console = error_console()
        if self._console.is_interactive and not self._silent:
            self._bar_width = LONG_BAR if self._console.width >= WIDE else SHORT_BAR
            self._bar = _progress_bar(self._console, self._bar_width)
            self._bar.start()
            self._bar.add_task("", total=1.0, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # of a console that the caller made
                self._bar.stop()
            self._bar = None

    def update(self, progress: float, seconds_left: float, metrics: dict[str, Any]) -> None:
        """Move the bar; without one print a line where the last is a minute old."""
        if self._bar is not None:
            left = f"{clock(seconds_left)} left"
            room = self._bar.console.width - self._bar_width - FRAME - len(left)
            text = f"{left}  {_sentence(metrics, room)}"
            self._bar.update(self._bar.task_ids[0], completed=progress, text=text)
        elif self._minute.is_due():
            self.say(f"{_sentence(metrics)}  {clock(seconds_left)} left")

    def epoch(self, metrics: dict[str, Any], seconds_left: float) -> None:
        """One line for a finished epoch; nothing where the bar is."""
        if self._bar is None:
            self._minute = EveryMinute()
            trained = clock(metrics.get("seconds", 0.0))
            self.say(f"{_sentence(metrics)}  {trained} trained, {clock(seconds_left)} left")

    def say(self, sentence: str) -> None:
        """Print a sentence, above the bar."""
        if self._console is not None and not self._silent:
            print_line(self._console, sentence)


def _progress_bar(console: Console, width: int) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    bar = BarColumn(bar_width=width)
    columns = (TextColumn("train"), bar, TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    # Of results that are piped none may go to the bar's console.
    return Progress(*columns, console=console, refresh_per_second=4, redirect_stdout=is_terminal(sys.stdout))


def _sentence(metrics: dict[str, Any], room: float = math.inf) -> str:
    """What is known of the training, less what has no room: the first of ``LEFT_OUT`` goes first."""
    parts: dict[str, str] = {}
    if "epochs" in metrics:
        parts["epochs"] = f"epoch {metrics['epoch']:.4g}/{metrics['epochs']:.4g}"
    if "loss" in metrics:
        parts["loss"] = f"loss {metrics['loss']:.4f}"
    if "accuracy" in metrics:
        parts["accuracy"] = f"accuracy {100 * metrics['accuracy']:.1f} %"
    if "validation_accuracy" in metrics:
        parts["validation_accuracy"] = f"validation {100 * metrics['validation_accuracy']:.1f} %"
    if "images_per_second" in metrics:
        parts["images_per_second"] = f"{metrics['images_per_second']:.0f} images/s"
    for name in LEFT_OUT:
        if sum(len(part) + 2 for part in parts.values()) <= room:
            break
        parts.pop(name, None)
    return "  ".join(parts.values())
