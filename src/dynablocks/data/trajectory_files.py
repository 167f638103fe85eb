"""Trajectories, pairs and starts from a user's files: CSV, Parquet, NumPy."""

from __future__ import annotations

import contextlib
import csv
import math
import re
import tokenize
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynablocks.data.trajectories import LABELS, TAKEN, Pairs, Starts, Trajectories, reserved_name
from dynablocks.errors import BadData, InvalidArgument, unknown_name
from dynablocks.files import expanded
from dynablocks.progress import track

if TYPE_CHECKING:
    from numpy.typing import NDArray

TRAJECTORY_HEADER = "trajectory,t,<state columns> (trajectory may be left out when there is only one)"
PAIRS_HEADER = "in_<name>...,out_<name>... and optionally h"
DYNAMICS_HEADER = f"{TRAJECTORY_HEADER}, or {PAIRS_HEADER}"
SIDES = ("in_", "out_")
SUFFIXES = (".csv", ".parquet", ".npz")
TABLES = (".csv", ".parquet")
"""The suffixes of files whose columns have names."""
SEVERAL = (
    "several trajectories are x (K, T, n) with t (T,) or (K, T), and those of different lengths a CSV or Parquet file "
    "with a column 'trajectory' (dynablocks.data.Trajectories(times, states, names).write_csv)"
)
"""What to save where there is more than one trajectory, in a sentence about an ``.npz``."""
NARROW = {"float16": torch.float16, "halffloat": torch.float16, "float32": torch.float32, "float": torch.float32}
"""The types, by their names in NumPy and in Arrow, that hold fewer digits than float64."""
PANDAS_INDEX = re.compile(r"Unnamed: \d+(\.\d+)*")
"""How pandas calls a column without a name, as the index of a table that it saved is one."""


def read_dynamics(path: Path | str, columns: Sequence[str] | None = None) -> Trajectories | Pairs:
    """Trajectories or input/output pairs, by the header of the file.

    - CSV (UTF-8, commas, decimal points) or Parquet with the columns ``trajectory,t,<state columns>``: one row a
      sample; without ``trajectory`` it is one trajectory. Its labels may be any text, and are kept; rows of different
      trajectories may be mixed; times increase within each.
    - CSV or Parquet with ``in_<name>...,out_<name>...`` and optionally ``h`` (the time between; 1 when left out).
    - NumPy ``.npz`` with ``t`` (T,) and ``x`` (T, n), or for K trajectories ``x`` (K, T, n) and ``t`` (T,), or (K, T)
      where each has times of its own; never unpickled. Its state columns have no names and are called ``x1``, …,
      ``xn``.

    Args:
        path: the file.
        columns: the state columns to read, in the order that the states are to have; of pairs their names without
            ``in_`` and ``out_``. Neither the names of other columns nor what they hold is looked at. Where a file with
            ``t`` has one of the columns itself it is one of trajectories, whatever other columns are called.
            ``None``: all, in the order of the file.

    Raises:
        BadData: the file is missing or cannot be used; the sentence says where and what to do.
        InvalidArgument: ``columns`` is empty, or has a name twice, or one that the file has not.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "pairs.csv")
        >>> _ = file.write_text("in_q,out_q\\n0,1\\n1,2\\n")
        >>> read_dynamics(file).h.tolist()
        [1.0, 1.0]
        >>> _ = file.write_text("t,p,note,q\\n0,1,warm,2\\n1,3,cold,4\\n")
        >>> read_dynamics(file, ["q", "p"]).states[0].tolist()
        [[2.0, 1.0], [4.0, 3.0]]
    """
    return _read(path, columns, timed=False)


def _read(path: Path | str, columns: Sequence[str] | None, *, timed: bool) -> Trajectories | Pairs:
    """As :func:`read_dynamics`; ``timed``: what has ``t`` is of trajectories, whatever its states are called."""
    path = expanded(path)
    _require_different(columns)
    read = partial(_dynamics_columns, chosen=columns, timed=timed)
    layout = _Layout(DYNAMICS_HEADER, 2, read, choice=columns is None)
    suffix = _require_file(path, layout)
    if suffix == ".npz":
        return _read_npz(path, columns)
    table = _read_table(path, suffix, layout)
    pairs = _holds_pairs(table.header, columns, timed=timed)
    return _pairs(table, whole=columns is None) if pairs else _trajectories(table)


def read_starts(path: Path | str, names: Sequence[str]) -> Starts:
    """The states of a CSV or Parquet file from which solutions start, one a row.

    The file has the columns ``names``, in any order, and may have ``trajectory`` (what the solution is called) and
    ``t`` (when it starts; 0 when left out). Neither the names of other columns nor what they hold is looked at.

    Args:
        path: the file.
        names: of the state's entries, in their order; none of them ``trajectory`` or ``t``.

    Raises:
        BadData: the file is missing or cannot be used; the sentence says where and what to do.
        InvalidArgument: ``names`` has ``trajectory`` or ``t``.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "states.csv")
        >>> _ = file.write_text("p,q\\n0,0.5\\n0,1.5\\n")
        >>> read_starts(file, ("q", "p")).states.tolist()
        [[0.5, 0.0], [1.5, 0.0]]
    """
    path = expanded(path)
    taken = reserved_name(names)
    if taken is not None:
        raise InvalidArgument(f"names has {taken!r}, which is no state column in a file of starts; rename this entry.")
    header = f"{','.join(names)} and optionally trajectory and t"
    if path.suffix.lower() in (".npy", ".npz"):
        raise BadData(f"{path} has no column names; a CSV or Parquet file with the columns {header} is needed here.")
    layout = _Layout(header, 1, partial(_start_columns, names=names), TABLES)
    table = _read_table(path, _require_file(path, layout), layout)
    _require_one_row_each(table)
    none = torch.zeros(len(table.lines), dtype=torch.float64)
    times = table.columns(["t"])[:, 0] if "t" in table.names else none
    return Starts(times, table.columns(names), tuple(table.labels or ()))


def read_trajectories(path: Path | str) -> Trajectories:
    """The trajectories of a file; formats and errors as for :func:`read_dynamics`.

    A file with ``t`` is one of trajectories here, even where its states are called ``in_…`` and ``out_…``.
    """
    found = _read(path, None, timed=True)
    if isinstance(found, Pairs):
        raise BadData(f"{path} holds input/output pairs; a file with the columns {TRAJECTORY_HEADER} is needed here.")
    return found


@dataclass(frozen=True)
class _Layout:
    """What a table is to be: its header in words, its least number of rows, which columns of a header are read.

    ``read`` names them: the labels where they are used, and the numbers in their order. ``suffixes`` are those allowed.
    ``choice`` is whether the user may choose among the state columns.
    """

    header: str
    least: int
    read: Callable[[Path, Sequence[str]], list[str]]
    suffixes: tuple[str, ...] = SUFFIXES
    choice: bool = False


@dataclass(frozen=True)
class _Table:
    """Named columns: ``labels`` of the trajectory column or None, ``values`` (rows, columns read); where rows lie.

    ``header`` has the names of all columns, ``names`` those that were read as numbers, in the order of ``values``.
    ``times_stored_as`` is the type of the column ``t``.
    """

    path: Path
    header: Sequence[str]
    names: list[str]
    values: Tensor
    labels: list[str] | None
    lines: list[int]
    row_word: str
    times_stored_as: torch.dtype = torch.float64

    def where(self, row: int, column: str | None = None) -> str:
        place = f"{self.path}, {self.row_word} {self.lines[row]}"
        return place if column is None else f"{place}, column {column!r}"

    def columns(self, names: Sequence[str]) -> Tensor:
        return self.values[:, [self.names.index(name) for name in names]]


def _require_different(columns: Sequence[str] | None) -> None:
    if columns is None:
        return
    if not columns:
        raise InvalidArgument("columns is empty; name at least one state column, or leave it out for all.")
    for k, name in enumerate(columns):
        if name in columns[:k]:
            raise InvalidArgument(f"columns has {name!r} twice; name each state column once.")


def _require_known(kind: str, columns: Sequence[str], known: Sequence[str]) -> None:
    for name in columns:
        if name not in known:
            raise unknown_name(kind, name, known)


def _holds_pairs(header: Sequence[str], chosen: Sequence[str] | None, *, timed: bool = False) -> bool:
    """Whether a header is one of pairs, by its names in_… and out_….

    Not where ``t`` is in it and a chosen column, or where what has ``t`` is ``timed``: then these are names of states.
    """
    if "t" in header and (timed or any(name in header for name in chosen or ())):
        return False
    sides = {side for side in SIDES for name in header if name.startswith(side)}
    return len(sides) == 2 or (len(sides) == 1 and "t" not in header)


def _dynamics_columns(path: Path, header: Sequence[str], chosen: Sequence[str] | None, timed: bool) -> list[str]:
    """The columns of trajectories or pairs to be read: all, or those of the chosen state components.

    Pairs have no labels, so a column of them stays unread.
    """
    pairs = _holds_pairs(header, chosen, timed=timed)
    if "t" not in header and not pairs:
        came = _shortened(",".join(header))
        raise BadData(f"{path} has the header {came}, without the column 't'; the header must be {DYNAMICS_HEADER}.")
    if chosen is None:
        return [name for name in header if name != LABELS or not pairs]
    if not pairs:
        _require_known("column", chosen, [name for name in dict.fromkeys(header) if name and name not in TAKEN])
        return [name for name in (*TAKEN, *chosen) if name in header]
    known = {name.removeprefix(side): None for side in SIDES for name in header if name.startswith(side)}
    _require_known("column of pairs (named without in_ and out_)", chosen, list(known))
    sought = [*(f"{side}{name}" for side in SIDES for name in chosen), "h"]
    return [name for name in sought if name in header]


def _start_columns(path: Path, header: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns of the states, and those of labels and times where there are any."""
    for name in names:
        if name not in header:
            came = _shortened(",".join(header))
            raise BadData(
                f"{path} has the header {came}, without the column {name!r}; the columns {','.join(names)} are needed, "
                "and optionally trajectory and t."
            )
    return [*names, *(name for name in TAKEN if name in header)]


def _require_one_row_each(table: _Table) -> None:
    first: dict[str, int] = {}
    for row, label in enumerate(table.labels or []):
        before = first.setdefault(label, row)
        if before != row:
            place = table.where(row, LABELS)
            raise BadData(
                f"{place}: {label!r} stands in {table.row_word} {table.lines[before]} already; a start is one row, "
                "with a label of its own; remove one or rename it."
            )


def _require_file(path: Path, layout: _Layout) -> str:
    allowed = ", ".join(layout.suffixes)
    if path.is_dir():
        raise BadData(f"{path} is a folder; name one file in it ({allowed}).")
    if not path.exists():
        raise BadData(f"{path} does not exist; check the path.")
    if not path.is_file():  # to open a pipe waits for its writer, and a fit reads its file twice
        raise BadData(f"{path} is a pipe or a device; write what it gives into a file ({allowed}) and name that.")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        raise BadData(f"{path} has states but no times; save both: numpy.savez('data.npz', t=times, x=states).")
    if suffix not in layout.suffixes:
        raise BadData(f"{path} has the suffix {suffix!r}; allowed are {allowed}; convert it to one of them.")
    try:
        size = path.stat().st_size
        path.open("rb").close()
    except OSError as error:
        raise BadData(f"{path} cannot be read ({error.strerror or error}); check its permissions.") from error
    if not size:
        needed = _rows(layout.least)
        raise BadData(f"{path} is empty; a header line and at least {needed} are needed; export it again.")
    return suffix


def _rows(count: int) -> str:
    return "one row" if count == 1 else f"{count} rows"


def _read_table(path: Path, suffix: str, layout: _Layout) -> _Table:
    return _read_csv(path, layout) if suffix == ".csv" else _read_parquet(path, layout)


def _require_header(path: Path, header: Sequence[str], needed: str) -> None:
    came = ",".join(header)
    if header and all(_number(name) is not None for name in header):
        raise BadData(f"{path} has no header: line 1 is {_shortened(came)}; the header must be {needed}.")
    if len(header) == 1 and any(mark in came for mark in ";\t"):
        raise BadData(f"{path}, line 1: {_shortened(came)} is not separated by commas; export it with commas.")


def _require_names(path: Path, header: Sequence[str], read: Sequence[str], rows: Sequence[Sequence[str]] = ()) -> None:
    """Each column that is read has a name, and one of its own; ``rows`` of a CSV tell what a first one without is."""
    if "" in read:
        place = header.index("")
        if place == 0 and rows and all(row[0].strip() == str(k) for k, row in enumerate(rows)):
            raise BadData(
                f"{path}: column 1 has no name and numbers the rows: it was written by pandas with its index; use "
                "to_csv(index=False), or choose the state columns with --columns."
            )
        came = _shortened(",".join(header))
        raise BadData(f"{path}: column {place + 1} has no name in the header {came}; name or remove it.")
    counts = Counter(header)
    for name in read:
        if counts[name] > 1:
            raise BadData(f"{path}: the column name {name!r} stands twice in the header; make the names differ.")


def _require_meant(path: Path, header: Sequence[str], read: Sequence[str], layout: _Layout) -> None:
    """Nobody who chose no columns meant the index of pandas, or labels under a name of other case, for a state."""
    for name in read if layout.choice else ():
        if PANDAS_INDEX.fullmatch(name):
            raise BadData(
                f"{path}: the column {name!r} had no name when pandas read it, as the index of a saved table; use "
                "to_csv(index=False), or choose the state columns with --columns."
            )
        if name.lower() == LABELS and LABELS not in header and "t" in header:
            raise BadData(
                f"{path} has the column {name!r}; call it {LABELS!r} if it says of which trajectory a row is, or "
                "choose the state columns with --columns."
            )


def _shortened(text: str, longest: int = 80) -> str:
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")


def _number(cell: str) -> float | None:
    """Like float(), but Python's 1_000 is text."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _csv_rows(path: Path, layout: _Layout) -> tuple[list[list[str]], list[int]]:
    """The rows of a CSV that are not blank, the header first, and the line of each."""
    text = _decode(path)
    count, reader = text.count("\n") + 1, csv.reader(StringIO(text, newline=""), skipinitialspace=True, strict=True)
    del text  # the reader has a copy, and a file may be long
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        for row in track(reader, f"reading {path.name}", count):
            if any(cell.strip() for cell in row):
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise BadData(
            f"{path}, line {reader.line_num}: no CSV ({error}); correct the line or export it again."
        ) from None
    if not rows:
        needed = _rows(layout.least)
        raise BadData(f"{path} has only blank lines; a header line and at least {needed} are needed; export it again.")
    return rows, lines


def _read_csv(path: Path, layout: _Layout) -> _Table:
    rows, lines = _csv_rows(path, layout)
    header = [name.strip() for name in rows.pop(0)]
    lines.pop(0)
    _require_header(path, header, layout.header)
    read = layout.read(path, header)
    _require_names(path, header, read, rows)
    _require_meant(path, header, read, layout)
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise BadData(
                f"{path}, line {line} has {len(row)} {'cell' if len(row) == 1 else 'cells'}; the header has "
                f"{len(header)} columns; give every line as many (decimal points, no decimal commas)."
            )
    names = [name for name in read if name != LABELS]
    numeric = [header.index(name) for name in names]
    placed = track(zip(rows, lines, strict=True), f"parsing {path.name}", len(rows))
    parsed = [_parse_row(path, line, header, row, numeric, layout) for row, line in placed]
    values = torch.tensor(parsed, dtype=torch.float64).reshape(len(rows), len(numeric))
    labels = [row[header.index(LABELS)].strip() for row in rows] if LABELS in read else None
    return _checked(_Table(path, header, names, values, labels, lines, "line"), layout.least)


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BadData(f"{path}, line {line} is not UTF-8 text; export the file as CSV in UTF-8.") from error


def _parse_row(
    path: Path, line: int, header: list[str], row: list[str], numeric: list[int], layout: _Layout
) -> list[float]:
    numbers = []
    for k in numeric:
        number = _number(row[k])
        if number is None:
            empty = not row[k].strip()
            came = "is empty" if empty else f"is the text {_shortened(row[k])}"
            usual = "correct it or remove the line"
            cure = usual if empty and header[k] == "t" else _cure(header[k], header, layout, usual)
            raise BadData(f"{path}, line {line}, column {header[k]!r} {came}; a finite number is needed; {cure}.")
        numbers.append(number)
    return numbers


def _cure(column: str, header: Sequence[str], layout: _Layout, usual: str) -> str:
    """What to do about a column that holds something else than numbers."""
    pairs = _holds_pairs(header, None)
    if column == "t" and not pairs:
        return "times are numbers, such as seconds since the start: convert them"
    if layout.choice and not (pairs and column == "h"):
        return f"{usual}, or choose the state columns with --columns"
    return usual


def _checked(table: _Table, least: int) -> _Table:
    """``table`` when it has ``least`` rows or more, all its numbers are finite and all its labels are there."""
    rows = len(table.lines)
    if rows < least:
        count = "one row" if rows else "a header but no rows"
        needed = f"{_rows(least)} {'is' if least == 1 else 'are'}"
        raise BadData(f"{table.path} has {count}; at least {needed} needed; give more samples.")
    bad = (~table.values.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise BadData(
            f"{table.where(row, table.names[column])} is {float(table.values[row, column])} (or empty); a finite "
            f"number is needed; correct it or remove the {table.row_word}."
        )
    if table.labels is not None and "" in table.labels:
        place = table.where(table.labels.index(""), LABELS)
        raise BadData(f"{place} is empty; a number or a name of the trajectory is needed in every row.")
    return table


def _read_parquet(path: Path, layout: _Layout) -> _Table:
    from pyarrow import parquet

    with _whole_parquet(path):
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        header = list(schema.names)
    _require_header(path, header, layout.header)
    read = layout.read(path, header)
    _require_names(path, header, read)
    _require_meant(path, header, read, layout)
    names = [name for name in read if name != LABELS]
    _require_numbers(path, schema, names, layout)
    with _whole_parquet(path):
        table = file.read(columns=read)
        labels = [_label(value) for value in table[LABELS].to_pylist()] if LABELS in read else None
        columns = [np.asarray(table[name].to_numpy(), dtype=np.float64) for name in names]
    values = torch.from_numpy(np.stack(columns, axis=1)) if columns else torch.empty(len(table), 0).double()
    lines = list(range(1, len(table) + 1))
    stored = NARROW.get(str(schema.field("t").type), torch.float64) if "t" in names else torch.float64
    return _checked(_Table(path, header, names, values, labels, lines, "row", stored), layout.least)


@contextlib.contextmanager
def _whole_parquet(path: Path) -> Iterator[None]:
    """One sentence for a damaged Parquet file, and for labels that Python has no value for, as times of nanoseconds.

    Damaged text, of names or labels, shows only when it is decoded.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _corrupt(path, "parquet", error) from error
    except (ValueError, OverflowError, KeyError) as error:
        raise BadData(
            f"{path} has a value that cannot be read ({_reason(error)}); write the labels of trajectories as text."
        ) from error


def _require_numbers(path: Path, schema: Any, names: Sequence[str], layout: _Layout) -> None:
    from pyarrow import types

    for name in names:
        if name.startswith("__index_level_"):
            raise BadData(f"{path} has the pandas index {name!r} as a column; write it with index=False.")
        kind = schema.field(name).type
        if not (types.is_integer(kind) or types.is_floating(kind)):
            cure = _cure(name, schema.names, layout, "convert it")
            raise BadData(f"{path}: the column {name!r} is {kind}; integers or floating point are needed; {cure}.")


def _label(value: object) -> str:
    return "" if value is None else str(value).strip()


def _corrupt(path: Path, kind: str, error: Exception) -> BadData:
    return BadData(f"{path} is truncated or no {kind} file ({_reason(error)}); write it again.")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _trajectories(table: _Table) -> Trajectories:
    names = tuple(name for name in table.names if name != "t")
    if not names:
        raise BadData(f"{table.path} has no state columns; the header must be {TRAJECTORY_HEADER}.")
    groups: dict[str, list[int]] = {}
    for row, label in enumerate(table.labels or [""] * len(table.lines)):
        groups.setdefault(label, []).append(row)
    times, states = table.columns(["t"])[:, 0], table.columns(names)
    for label, rows in groups.items():
        if len(rows) < 2:
            raise BadData(
                f"{table.where(rows[0])}: the trajectory {label!r} has this row only; at least 2 are needed; add rows "
                "or remove it."
            )
        _require_increasing(table, times, label, rows)
    parts = [torch.tensor(rows) for rows in groups.values()]
    labels: tuple[str, ...] = () if table.labels is None else tuple(groups)
    stored = _rounded_to(table.times_stored_as, times)
    return Trajectories(
        tuple(times[part] for part in parts), tuple(states[part] for part in parts), names, labels, stored
    )


def _require_increasing(table: _Table, times: Tensor, label: str, rows: list[int]) -> None:
    wrong = (times[rows].diff() <= 0).nonzero()
    if not len(wrong):
        return
    before, row = rows[int(wrong[0])], rows[int(wrong[0]) + 1]
    inside = f" in the trajectory {label!r}" if table.labels is not None else ""
    hint = "" if table.labels is not None else "; if a new trajectory begins here, add a column 'trajectory'"
    relation, rounded, cure = "comes before", "", "sort the rows by time"
    if bool(times[row] == times[before]):
        relation, rounded = "repeats", _made_alike(table.times_stored_as)
        cure = "keep one of the two rows, or write times with more digits"
    raise BadData(
        f"{table.where(row, 't')}: the time {float(times[row])!r} {relation} {float(times[before])!r} of "
        f"{table.row_word} {table.lines[before]}{inside}; times must increase{rounded}; {cure}{hint}."
    )


def _pairs(table: _Table, whole: bool) -> Pairs:
    """The pairs of a table; one that was read as a ``whole`` has no other columns."""
    inputs = [name[3:] for name in table.names if name.startswith("in_")]
    outputs = [name[4:] for name in table.names if name.startswith("out_")]
    extra = [name for name in table.header if not name.startswith(SIDES) and name != "h"] if whole else []
    if "t" in table.header:
        raise BadData(
            f"{table.path} has the column 't' of a trajectory and the names in_…, out_… of pairs; remove 't' if the "
            f"rows are pairs ({PAIRS_HEADER}); of a trajectory rename the states, or choose them by --columns as they "
            "are called."
        )
    if extra:
        raise BadData(f"{table.path} has the column {extra[0]!r}; a file of pairs has {PAIRS_HEADER}; remove it.")
    for name in sorted(set(inputs) ^ set(outputs)):
        has, lacks = (f"in_{name}", f"out_{name}") if name in inputs else (f"out_{name}", f"in_{name}")
        raise BadData(f"{table.path} has the column {has!r} but not {lacks!r}; a file of pairs has {PAIRS_HEADER}.")
    taken = reserved_name(inputs)
    if taken is not None:
        raise BadData(
            f"{table.path} has a state called {taken!r} (in_{taken}, out_{taken}), which is another column in files of "
            "trajectories; rename it, or choose other states."
        )
    h = table.columns(["h"])[:, 0] if "h" in table.names else torch.ones(len(table.lines), dtype=torch.float64)
    wrong = (h <= 0).nonzero()
    if len(wrong):
        place = table.where(int(wrong[0]), "h")
        raise BadData(
            f"{place} is {float(h[wrong[0]])!r}; a time step above 0 is needed; correct it or remove the row."
        )
    x, y = (table.columns([side + name for name in inputs]) for side in SIDES)
    return Pairs(x, y, h, tuple(inputs))


def _read_npz(path: Path, columns: Sequence[str] | None) -> Trajectories:
    arrays, stored = _npz_arrays(path)
    t, x = arrays["t"], arrays["x"]
    samples = x.shape[:-1]
    if x.ndim not in (2, 3) or t.shape not in (samples[-1:], samples) or 0 in x.shape:
        raise BadData(
            f"{path} has t of shape {t.shape} and x of shape {x.shape}; t (T,) and x (T, n) of one trajectory are "
            f"needed: reshape them; {SEVERAL}."
        )
    if t.shape[-1] < 2:
        raise BadData(f"{path} has one sample a trajectory; at least 2 are needed; give more samples.")
    known = [f"x{k + 1}" for k in range(x.shape[-1])]
    names = tuple(known if columns is None else columns)
    _require_known("column", names, known)
    cure = "leave that sample out"
    if x.ndim == 3:
        cure += f" of all trajectories, unless a shorter one ends before it: {SEVERAL}"
    _require_finite(path, "t", t, cure)
    _require_finite(path, "x", x, cure, unread=[k for k, name in enumerate(known) if name not in names])
    _require_ordered(path, t, stored)
    times, states = torch.from_numpy(t), torch.from_numpy(x.reshape(-1, *x.shape[-2:]))
    if columns is not None:
        states = states[..., [known.index(name) for name in names]]
    each = times.unbind(0) if t.ndim == 2 else (times,) * len(states)
    return Trajectories(each, states.unbind(0), names, times_stored_as=_rounded_to(stored, times))


def _require_finite(path: Path, name: str, array: NDArray[np.float64], cure: str, unread: Sequence[int] = ()) -> None:
    bad = np.argwhere(~np.isfinite(array))
    bad = bad[~np.isin(bad[:, -1], unread)]
    if len(bad):
        place = tuple(map(int, bad[0]))
        value = float(array[place])
        raise BadData(f"{path}: {name}[{_place(place)}] is {value}; finite numbers are needed; {cure}.")


def _require_ordered(path: Path, t: NDArray[np.float64], stored: torch.dtype) -> None:
    """The times of one trajectory or of all, (T,), or of each, (K, T), increase."""
    wrong = np.argwhere(np.diff(t) <= 0)
    if not len(wrong):
        return
    *row, k = map(int, wrong[0])
    before, after = (*row, k), (*row, k + 1)
    earlier, later = float(t[before]), float(t[after])
    same = later == earlier
    rounded = _made_alike(stored) if same else ""
    cure = "keep one of the two samples, or save times with more digits" if same else "sort the samples by time"
    raise BadData(
        f"{path}: t[{_place(after)}] = {later!r} does not come after t[{_place(before)}] = {earlier!r}; times must "
        f"increase{rounded}; {cure}, unless a new trajectory begins or a shorter one ends here: {SEVERAL}."
    )


def _place(index: tuple[int, ...]) -> str:
    return ", ".join(map(str, index))


def _made_alike(stored: torch.dtype) -> str:
    """Why times may repeat that did not where they were made."""
    if stored == torch.float64:
        return ""
    name = str(stored).removeprefix("torch.")
    return f", and as {name} some may be rounded alike: save them as float64 where they are made"


def _rounded_to(stored: torch.dtype, times: Tensor) -> torch.dtype:
    """``stored`` where it rounded the times; float64 where all of them leave its last four bits empty.

    As whole numbers, halves and quarters do, unless they are large: it holds them exactly. Rounded times hardly all do.
    """
    if stored == torch.float64:
        return stored
    _, exponent = math.frexp(float(times.abs().max()))
    grain = math.ldexp(8 * torch.finfo(stored).eps, exponent)  # sixteen times from the largest to the next
    return torch.float64 if bool((times / grain == (times / grain).round()).all()) else stored


def _npz_arrays(path: Path) -> tuple[dict[str, NDArray[np.float64]], torch.dtype]:
    """The arrays ``t`` and ``x`` as float64, and the type of ``t``."""
    arrays: dict[str, Any] = {}
    keys: list[str] = []
    name = ""
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            keys = list(file)
            for name in ("t", "x"):
                arrays[name] = file[name] if name in keys else None
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        raise BadData(
            f"{path}: the array {name!r} holds Python objects or is damaged; save plain numbers; {SEVERAL}."
        ) from error
    except Exception as error:  # NumPy's reader of headers, and each kind of compression, have errors of their own
        raise _corrupt(path, "npz", error) from error
    for name, array in arrays.items():
        if array is None:
            raise BadData(f"{path} has the arrays {', '.join(keys) or 'none'}, without {name!r}; save t and x.")
        if not isinstance(array, np.ndarray):
            raise BadData(f"{path}: {name!r} is no NumPy array; save t and x with numpy.savez.")
        if array.dtype.kind not in "iuf":
            raise BadData(f"{path}: the array {name!r} is of type {array.dtype}; real numbers are needed.")
    stored = NARROW.get(arrays["t"].dtype.name, torch.float64)
    return {name: np.ascontiguousarray(array, dtype=np.float64) for name, array in arrays.items()}, stored
