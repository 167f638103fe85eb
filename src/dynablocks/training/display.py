"""What a person sees of a training: a progress bar, or lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from dynablocks.progress import EveryMinute, clock, error_console, print_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


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
        self._minute = EveryMinute()

    def __enter__(self) -> Display:
        if self._console is None:
            self._console = error_console()
        if self._console.is_interactive and not self._silent:
            self._bar = _progress_bar(self._console)
            self._bar.start()
            self._bar.add_task("", total=1.0, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, progress: float, seconds_left: float, metrics: dict[str, Any]) -> None:
        """Move the bar; without one print a line where the last is a minute old."""
        if self._bar is not None:
            # A narrow terminal shows the beginning of the text alone.
            text = f"{clock(seconds_left)} left  {_sentence(metrics)}"
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


def _progress_bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (TextColumn("train"), BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
    return Progress(*columns, console=console, refresh_per_second=4)


def _sentence(metrics: dict[str, Any]) -> str:
    parts = [f"epoch {metrics['epoch']:.4g}/{metrics['epochs']:.4g}"] if "epochs" in metrics else []
    parts += [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    parts += [f"accuracy {100 * metrics['accuracy']:.1f} %"] if "accuracy" in metrics else []
    if "validation_accuracy" in metrics:
        parts.append(f"validation {100 * metrics['validation_accuracy']:.1f} %")
    parts += [f"{metrics['images_per_second']:.0f} images/s"] if "images_per_second" in metrics else []
    return "  ".join(parts)
