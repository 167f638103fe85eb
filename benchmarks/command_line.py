"""What the scripts of this folder share: numbers that are refused, figures that are written, and how a script ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dynablocks.errors import DynablocksError, require_whole
from dynablocks.files import finite_or_none, require_writable, write_json


def require_counts(options: argparse.Namespace, **least: int) -> None:
    """Refuse an option below its least whole number.

    Raises:
        InvalidArgument: naming the first such option.
    """
    for name, low in least.items():
        require_whole(f"--{name.replace('_', '-')}", getattr(options, name), low)


def require_place(file: Path | None) -> None:
    """Find out now, and not after the work, whether figures can be written to a file.

    Raises:
        DynablocksError: its folder is not writable, or the disk is full.
    """
    if file is not None:
        require_writable(file.parent)


def write_figures(file: Path | None, figures: Any) -> None:
    """Write figures as JSON where a file was named; ``null`` stands for infinity and NaN, which JSON has not."""
    if file is not None:
        write_json(file, _finite(figures))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return finite_or_none(value) if isinstance(value, float) else value


def finish(main: Callable[[], int | None]) -> NoReturn:
    """End the process with what ``main`` returns; with 2 and one sentence for what the user can mend."""
    try:
        sys.exit(main())
    except DynablocksError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
