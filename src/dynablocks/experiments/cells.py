"""Cells: results that are computed once, under a name made of everything that decides them.

A cell is a frozen dataclass of settings. Its key is the SHA-256 of the settings, the kind's version, the data's hash
and the keys of the cells it needs, so equal keys mean equal results, and a folder of cells can be shared by any number
of processes and machines. A cell is built under a temporary name and renamed when it is whole; a killed build goes on
from what it left there; a failed one leaves ``FAILED.json`` and blocks nobody. Where memory or disk give out nothing is
said of the cell: the error reaches the caller, and the cell stays a begun one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from dynablocks.errors import OUT_OF_MEMORY, BadData, DynablocksError
from dynablocks.experiments.provenance import made_here
from dynablocks.files import expanded, is_held, lock_file, read_json, sha256, write_json
from dynablocks.run_files import CELL, FAILED, RESULT

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

MADE = {"commit", "torch", "device", "threads", "date"}
"""What a result says, beside its time, of where it was made."""


class DamagedCell(BadData):
    """A file of a built cell is not what its build wrote: no failure of the cell that reads it."""


@dataclass(frozen=True)
class Cell(ABC):
    """One result: a subclass's fields are its settings, and :meth:`build` computes it.

    The result must be a pure function of the settings (seeds are settings). A field whose metadata says
    ``{"result": False}`` (a device, a folder) does not decide the result and stays out of the key.

    Attributes:
        version: raised when :meth:`build` changes its meaning; part of the key.
        leftovers: the files from which a killed :meth:`build` goes on; removed once the result is stored.
    """

    version: ClassVar[int] = 1
    leftovers: ClassVar[tuple[str, ...]] = ()

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

    @property
    def computes_on(self) -> str:
        """Where :meth:`build` computes here, cpu or cuda: for what the result says of its hardware, not for the key."""
        return "cpu"

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
        root: the folder, which may begin with ``~``; made when something is built.

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

    def __init__(self, root: str | Path) -> None:
        self.root = expanded(root)
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

    def results_of(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """The results of those cells that are built, in the order of the cells."""
        found = (self.result(cell) for cell in cells)
        return [result for result in found if result is not None]

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
            # Another process may have built it since.
            if free and self.record(cell) is None:
                self._set_damaged_aside(cell)
                (self._partial(cell) / FAILED).unlink(missing_ok=True)

    def build(self, cell: Cell, *, retry: bool = False) -> str:
        """Build a cell unless it is built, failed (and no ``retry``), being built elsewhere, or lacks what it needs.

        Returns:
            Its state afterwards.

        Raises:
            OSError, MemoryError, RuntimeError, DynablocksError: memory or disk gave out; the cell stays partial.
            DamagedCell: a file of a cell that it reads is damaged; the cell stays partial.
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
        """Free the name of a built cell from a folder whose result is gone or cannot be read.

        Its files stay for the build to find, unless a begun one has files of its own. A kill at any instant leaves what
        the next call sets aside.
        """
        final, partial = self.directory(cell), self._partial(cell)
        if not final.is_dir():
            return
        if partial.exists():
            os.rename(final, final.with_name(f"{final.name}.damaged-{secrets.token_hex(4)}"))
            return
        (final / RESULT).unlink(missing_ok=True)
        os.rename(final, partial)

    def _build(self, cell: Cell) -> None:
        partial = self._partial(cell)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / FAILED).unlink(missing_ok=True)
            description = cell.description()
            if not _is_result_of(partial / RESULT, description):
                self._compute(cell, description)
            for name in cell.leftovers:
                (partial / name).unlink(missing_ok=True)
            os.rename(partial, self.directory(cell))
        except Exception as error:
            if isinstance(error, DamagedCell) or _is_of_the_machine(error):
                raise
            self._note_failure(cell, error)

    def _compute(self, cell: Cell, description: dict[str, Any]) -> None:
        """Build the cell in its folder; the result is written last, when everything else is there."""
        partial, started = self._partial(cell), time.perf_counter()
        write_json(partial / CELL, description)
        result = cell.build(partial, self)
        made = made_here(cell.computes_on) | {"seconds": round(time.perf_counter() - started, 2)}
        tensors = [path for path in sorted(partial.glob("*.safetensors")) if path.name not in cell.leftovers]
        files = {path.name: sha256(path) for path in tensors}
        record = {"title": cell.title, **description, "result": result, "made": made, "files": files}
        write_json(partial / RESULT, record)

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
    """Whether a result file holds what a build writes: a result, where and in what time it was made."""
    if not isinstance(content, dict) or not isinstance(made := content.get("made"), dict):
        return False
    timed = isinstance(seconds := made.get("seconds"), (int, float)) and 0 <= seconds < 1e308
    return timed and made.keys() >= MADE and isinstance(content.get("result"), dict)


def _is_result_of(path: Path, description: dict[str, Any]) -> bool:
    """Whether a build that was killed had stored its result, so that only the renaming is left."""
    try:
        record = read_json(path)
    except DynablocksError:
        return False
    return _is_record(record) and all(record.get(name) == value for name, value in description.items())


def _is_of_the_machine(error: BaseException | None) -> bool:
    """Whether memory, disk or permissions kept a cell from being built: elsewhere, or later, it can be.

    A file that is not there is the cell's own failure.
    """
    from safetensors import SafetensorError

    if type(error) is DynablocksError:
        # A file cannot be written or read; what is wrong in a file is BadData or BadCheckpoint.
        return isinstance(error.__cause__, SafetensorError) or _is_of_the_machine(error.__cause__)
    if isinstance(error, RuntimeError):
        return re.search(OUT_OF_MEMORY, str(error)) is not None
    return isinstance(error, (OSError, MemoryError)) and not isinstance(error, FileNotFoundError)


def stored_tensors(cell: Cell, store: Store, name: str, restore: Callable[[dict[str, Tensor]], T]) -> T:
    """What ``restore`` makes of a tensor file of a built cell.

    Raises:
        DamagedCell: the file is not there, cannot be read, or is not what the build wrote, which its SHA-256 tells; the
            results of older cells hold none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = store.directory(cell)
    path = folder / name
    damaged = DamagedCell(f"{path} is damaged; remove {folder} and give the command again.")
    try:
        digest = (store.record(cell) or {}).get("files", {}).get(name)
        if digest is not None and sha256(path) != digest:
            raise damaged
        return restore(load_file(path))
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, RuntimeError, StopIteration) as error:
        raise damaged from error


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
