"""Cells: results that are computed once, under a name made of everything that decides them.

A cell is a frozen dataclass of settings. Its key is the SHA-256 of the settings, the kind's version, the data's hash
and the keys of the cells it needs, so equal keys mean equal results, and a folder of cells can be shared by any number
of processes and machines. A cell is built under a temporary name and renamed when it is whole; a killed build goes on
from what it left there; a failed one leaves ``FAILED.json`` and blocks nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dynablocks.errors import DynablocksError
from dynablocks.experiments.provenance import made_here
from dynablocks.files import is_held, lock_file, read_json, write_json
from dynablocks.run_files import CELL, FAILED, RESULT

MADE = {"commit", "torch", "device", "threads", "date"}
"""What a result says, beside its time, of where it was made."""


@dataclass(frozen=True)
class Cell(ABC):
    """One result: a subclass's fields are its settings, and :meth:`build` computes it.

    The result must be a pure function of the settings (seeds are settings). A field whose metadata says
    ``{"result": False}`` (a device, a folder) does not decide the result and stays out of the key.

    Attributes:
        version: raised when :meth:`build` changes its meaning; part of the key.
    """

    version: ClassVar[int] = 1

    @property
    def kind(self) -> str:
        """The class name in words: ``RegionCell`` is ``region``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__.removesuffix("Cell")).lower()

    @property
    def title(self) -> str:
        """One line for people."""
        return self.kind

    @property
    def cost(self) -> float:
        """About how many seconds two cores take; only ratios matter."""
        return 1.0

    def needs(self) -> tuple[Cell, ...]:
        """The cells to build before this one: the fields that are cells."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return tuple(value for value in values if isinstance(value, Cell))

    def data_hash(self) -> str:
        """The hash of the data read from outside, empty when there is none.

        Raises:
            DynablocksError: the data is not there; the cell is then "not run".
        """
        return ""

    @abstractmethod
    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        """Compute the result as plain JSON; files go into ``directory``, where a killed build finds them again."""

    @property
    def key(self) -> str:
        """SHA-256 of all that decides the result."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()

    def description(self) -> dict[str, Any]:
        """All that decides the result, as plain JSON: what the key hashes and ``cell.json`` holds."""
        settings = {field.name: plain(getattr(self, field.name)) for field in deciding(self)}
        return {"kind": self.kind, "version": self.version, "data": self.data_hash(), "settings": settings}


def deciding(settings: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass that decide a result."""
    return [field for field in dataclasses.fields(settings) if field.metadata.get("result", True)]


def plain(value: Any) -> Any:
    """A setting as JSON; a cell stands for its key, and an empty (``None``) setting is left out, as if not there.

    Raises:
        TypeError: a value without a stable form, such as a function or an object with an address.
    """
    if isinstance(value, Cell):
        return {"cell": value.key}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {field.name: getattr(value, field.name) for field in deciding(value)}
        return {name: plain(item) for name, item in given.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a setting of type {type(value).__name__} has no stable hash; use plain values.")


class Store:
    """A folder of cells.

    Args:
        root: the folder; made when something is built.

    Example:
        >>> import tempfile
        >>> @dataclass(frozen=True)
        ... class SquareCell(Cell):
        ...     side: int = 2
        ...     def build(self, directory, store):
        ...         return {"area": self.side**2}
        >>> store = Store(Path(tempfile.mkdtemp()))
        >>> store.state(SquareCell(3)), store.build(SquareCell(3)), store.result(SquareCell(3))
        ('waiting', 'built', {'area': 9})
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._names: dict[Cell, str] = {}
        self._results: dict[Cell, dict[str, Any]] = {}

    def directory(self, cell: Cell) -> Path:
        """Where the files of a built cell are.

        Raises:
            DynablocksError: the cell's data is not there, so it has no key.
        """
        if cell not in self._names:
            self._names[cell] = f"{cell.kind}-{cell.key[:20]}"
        return self.root / self._names[cell]

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a built cell, otherwise ``None``."""
        record = self.record(cell)
        return None if record is None else record["result"]

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """Result, settings and provenance of a built cell, otherwise ``None``."""
        if cell not in self._results:
            with contextlib.suppress(DynablocksError):
                path = self.directory(cell) / RESULT
                if path.exists() and _is_record(record := read_json(path)):
                    self._results[cell] = record
        return self._results.get(cell)

    def state(self, cell: Cell) -> str:
        """built, failed, running (somewhere), partial (begun and stopped), waiting or impossible (no data)."""
        try:
            final = self.directory(cell)
        except DynablocksError:
            return "impossible"
        if (final / RESULT).exists():
            return "built" if self.record(cell) is not None else "failed"
        partial = self._partial(cell)
        if not partial.is_dir():
            return "waiting"
        if is_held(self._lock(cell)):
            return "running"
        return "failed" if (partial / FAILED).exists() else "partial"

    def failure(self, cell: Cell) -> str | None:
        """Why the last build failed, or why its result cannot be read, in one sentence."""
        damaged = self.directory(cell) / RESULT
        if damaged.exists():
            return f"{damaged} is damaged; --retry builds it again."
        with contextlib.suppress(DynablocksError, KeyError, TypeError):
            return str(read_json(self._partial(cell) / FAILED)["error"])
        return None

    def obstacle(self, cell: Cell) -> str | None:
        """Why the cell cannot be built here, in one sentence: its data is not there."""
        try:
            self.directory(cell)
        except DynablocksError as error:
            return str(error)
        return None

    def forget_failure(self, cell: Cell) -> None:
        """Make a failed cell a begun one: its files stay for the next build to find."""
        if self.state(cell) != "failed":
            return
        with lock_file(self._lock(cell)) as free:
            if free:
                self._set_damaged_aside(cell)
                (self._partial(cell) / FAILED).unlink(missing_ok=True)

    def build(self, cell: Cell, *, retry: bool = False) -> str:
        """Build a cell unless it is built, failed (and no ``retry``), being built elsewhere, or lacks what it needs.

        Returns:
            Its state afterwards.
        """
        state = self.state(cell)
        if state in ("built", "running", "impossible") or (state == "failed" and not retry):
            return state
        if any(self.state(needed) != "built" for needed in cell.needs()):
            return state
        with lock_file(self._lock(cell)) as free:
            if not free:
                return "running"
            if self.record(cell) is None:
                self._set_damaged_aside(cell)
                self._build(cell)
        return self.state(cell)

    def _set_damaged_aside(self, cell: Cell) -> None:
        """Make a cell whose result cannot be read a begun one: its files stay for the build to find."""
        final = self.directory(cell)
        if (final / RESULT).exists() and not self._partial(cell).exists():
            (final / RESULT).unlink()
            os.rename(final, self._partial(cell))

    def _build(self, cell: Cell) -> None:
        partial, started = self._partial(cell), time.perf_counter()
        try:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / FAILED).unlink(missing_ok=True)
            description = cell.description()
            write_json(partial / CELL, description)
            result = cell.build(partial, self)
            made = made_here() | {"seconds": round(time.perf_counter() - started, 2)}
            write_json(partial / RESULT, {"title": cell.title, **description, "result": result, "made": made})
            os.rename(partial, self.directory(cell))
        except Exception as error:
            self._note_failure(cell, error)

    def _note_failure(self, cell: Cell, error: Exception) -> None:
        report = {"title": cell.title, "error": f"{error}" or type(error).__name__, "type": type(error).__name__}
        try:
            write_json(self._partial(cell) / FAILED, report | {"traceback": traceback.format_exc()})
        except DynablocksError as unwritten:
            warnings.warn(f"{cell.title} failed: {report['error']} (not stored: {unwritten})", stacklevel=2)

    def _partial(self, cell: Cell) -> Path:
        return self.directory(cell).with_suffix(".partial")

    def _lock(self, cell: Cell) -> Path:
        return self.root / "locks" / self.directory(cell).name


def _is_record(content: object) -> bool:
    """Whether a result file holds what :meth:`Store._build` writes: a result, where and in what time it was made."""
    if not isinstance(content, dict) or not isinstance(made := content.get("made"), dict):
        return False
    timed = isinstance(seconds := made.get("seconds"), (int, float)) and 0 <= seconds < 1e308
    return timed and made.keys() >= MADE and isinstance(content.get("result"), dict)


def in_order(cells: list[Cell]) -> Iterator[Cell]:
    """Each cell once, after those it needs."""
    seen: set[Cell] = set()

    def visit(cell: Cell) -> Iterator[Cell]:
        if cell in seen:
            return
        seen.add(cell)
        for needed in cell.needs():
            yield from visit(needed)
        yield cell

    for cell in cells:
        yield from visit(cell)
