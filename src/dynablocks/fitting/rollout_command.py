"""The command ``dynablocks rollout``."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynablocks.arguments import joined_values, make_parser, say
from dynablocks.data.trajectories import CSV_ROWS, Starts, csv_parts, reserved_name
from dynablocks.data.trajectory_files import SUFFIXES, read_starts
from dynablocks.errors import BadData, DynablocksError, InvalidArgument, require_range, require_whole
from dynablocks.files import expanded, read_json, require_writable, resolved, write_atomically
from dynablocks.fitting.folder import load_fit
from dynablocks.fitting.rollout import GAP, change_along, safe_rollout
from dynablocks.fitting.samples import SPREAD_SAMPLES, thinned
from dynablocks.fitting.surrogates import LEARNED_ENERGY, FlowMap, Structure
from dynablocks.progress import is_terminal, track
from dynablocks.run_files import METRICS

if TYPE_CHECKING:
    from jaxtyping import Float64

SUMMARY = """Trajectories of a fit from states of yours, as CSV:
trajectory,t,<state columns>, one row a state, the start first. dynablocks fit
(states called in_... and out_... by --columns) and pandas.read_csv read it.

Without --out the CSV goes to standard output, to be piped, and everything else
to standard error."""

EXAMPLES = """starts:
  --start 0.5,0.0      one state: a number for each state column, in the order
                       of the fit
  --start states.csv   CSV or Parquet with the state columns in any order;
                       every row is a start. It may have the columns
                       trajectory, what each is called, and t, when it starts
                       (else they are numbered and start at 0); other columns
                       are not looked at

examples:
  dynablocks rollout runs/first --start 0.5,0.0 > trajectory.csv
  dynablocks rollout runs/first --start 0.5,0.0 --steps 1000 --out long.csv
  dynablocks rollout runs/first --start states.csv --step 0.05 --out all.csv

A fit is most accurate at its usual step; step_halving_error in its
metrics.json says how far others are off. A --step of more than five times the
usual one is taken as several of about that length, and its end is written. At
the end standard error says when runs leave the range of the training data,
where nothing was learned, and how far what the fit keeps of a state (mass,
norm, learned energy, signs) has moved; the learned energy of a symplectic one
oscillates. In Python: flow = dynablocks.fitting.load_fit(DIR);
flow.rollout(x, steps)."""

MOST_NUMBERS = 50_000_000
"""So many times and entries of states are computed at once: they take less than 2 GB, as CSV 1 GB."""
OUTSIDE = 0.05
"""By so much of the range of the training data a run may leave it without being told."""


def add_arguments(parser: Any) -> None:
    """The options of ``dynablocks rollout``."""
    parser.add_argument("directory", type=str, nargs="?", help="the folder of a fit")
    parser.add_argument("--start", type=str, default=None, help="a state, as 0.5,0.0, or a file of states")
    parser.add_argument("--steps", type=int, default=100, help="how many steps from each start")
    parser.add_argument(
        "--step",
        type=float,
        default=None,
        help="the time of a step, above 0 (default: the usual one of the fit, to 12 digits)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="the CSV file to write (default: print it to standard output)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it is there already")


def rollout_command(arguments: Sequence[str]) -> int:
    """Read the fit and the starts, roll out, write; say where runs leave the data, how far what is kept has moved."""
    parser = make_parser("rollout", SUMMARY, EXAMPLES)
    add_arguments(parser)
    options = parser.parse_args(joined_values(arguments, "--start"))
    steps = _require_options(options)
    flow = load_fit(options.directory)
    structure = flow.structure
    _require_readable(options.directory, structure)
    starts = _starts(options.start, structure)
    # A median of differences such as 0.3 − 0.2 is 0.1 but for its last digits.
    step = float(f"{structure.step:.12g}") if options.step is None else options.step
    _require_room(starts, steps)
    times = _times(starts, step, steps)
    each = _steps_in(step, structure.step)
    _require_room(starts, steps, each)
    if _numbers(options.start) is None:
        say(_reading(options.start, starts))
    if each > 1:
        say(f"a step of {step:.12g} is taken as {each:,} of about the usual {structure.step:.6g}")
    states = _states(flow, starts, times, step, each)
    runs = ((starts.label(k), times[k], states[k]) for k in range(len(states)))
    parts = csv_parts(structure.names, runs)
    if options.out is not None or not is_terminal(sys.stdout):
        parts = track(parts, "writing", 1 + len(states) * math.ceil(times.shape[1] / CSV_ROWS))
    _write(options.out, parts)
    left = _left_range(_training_range(expanded(options.directory), structure), times, states, flow)
    if left is not None:
        say(left)
    moved = _moved(flow, states)
    if moved is not None:
        say(f"{moved} in {steps} step{'s' if steps > 1 else ''} of {step:.12g}")
    return 0


def _require_options(options: Any) -> int:
    """The number of steps; what is wrong with any option is known before the fit is read."""
    if options.directory is None:
        raise InvalidArgument("no fit was given; use: dynablocks rollout DIR --start 0.5,0.0")
    steps = require_whole("--steps", options.steps, 1)
    if options.step is not None:
        require_range("--step", options.step, 0, open_low=True)
    if options.out is not None:
        _require_out(Path(options.out), overwrite=options.overwrite)
    elif options.overwrite:
        raise InvalidArgument("--overwrite replaces the file of --out, which is missing; give --out, or leave it out.")
    return steps


def _require_out(path: Path, *, overwrite: bool) -> None:
    """Find out before the computation that nothing can, or should, be written."""
    place = resolved(expanded(path))
    if place.is_dir():
        raise InvalidArgument(f"--out {path} is a folder; name a file in it, such as {path / 'trajectory.csv'}.")
    if place.suffix.lower() != ".csv":
        raise InvalidArgument(f"--out is {path}; a CSV is written, so give a name that ends in .csv.")
    if place.exists() and not overwrite:
        raise InvalidArgument(f"--out {path} is there already; choose another name, or --overwrite to replace it.")
    require_writable(place.parent)


def _require_readable(directory: str, structure: Structure) -> None:
    """A CSV of trajectories can be read again only where no state is called as one of its other columns."""
    taken = reserved_name(structure.names)
    if taken is not None:
        raise InvalidArgument(
            f"the fit in {directory} has the state column {taken!r}, which a CSV of trajectories has already; use "
            "flow.rollout in Python, or fit with another name."
        )


def _starts(given: str | None, structure: Structure) -> Starts:
    """The states to start from, of a text of numbers or of a file."""
    names = ", ".join(structure.names)
    if given is None:
        raise InvalidArgument(f"--start is missing; give a number for each state column ({names}), or a file of them.")
    numbers = _numbers(given)
    if numbers is not None:
        starts = _single(given, numbers, structure)
    elif os.path.exists(expanded(given)) or Path(given).suffix.lower() in SUFFIXES:
        starts = read_starts(given, structure.names)
    else:
        raise InvalidArgument(
            f"--start is {given!r}, neither numbers separated by commas, one for each state column ({names}), nor a "
            "CSV or Parquet file; give one of both."
        )
    if structure.preserve == "positive" and bool((starts.states < 0).any()):
        row, column = (starts.states < 0).nonzero()[0].tolist()
        value, name = float(starts.states[row, column]), structure.names[column]
        raise BadData(
            f"the start {starts.label(row)!r} has {name} = {value!r}; this fit is of states >= 0 (--preserve "
            "positive): give such a start."
        )
    return starts


def _numbers(text: str) -> list[float] | None:
    """The numbers of a text such as 0.5,0.0; ``None`` where it is none."""
    try:
        return [float(part) for part in text.strip("[]() ").split(",")]
    except ValueError:
        return None


def _single(given: str, numbers: list[float], structure: Structure) -> Starts:
    names = structure.names
    if len(numbers) != len(names):
        raise InvalidArgument(
            f"--start is {given!r}, of length {len(numbers)}; the fit has {len(names)} state columns "
            f"({', '.join(names)}): give one number for each."
        )
    state = torch.tensor([numbers], dtype=torch.float64)
    if not bool(state.isfinite().all()):
        raise InvalidArgument(f"--start is {given!r}; every number must be finite.")
    return Starts(torch.zeros(1, dtype=torch.float64), state)


def _counted(starts: Starts) -> str:
    count = len(starts.states)
    return f"{count:,} start{'s' if count > 1 else ''}"


def _reading(given: str, starts: Starts) -> str:
    """How many starts a file has, and a doubt where it looks like one measured trajectory."""
    found = f"{Path(given).name}: {_counted(starts)}"
    if len(starts.states) > 1 and not starts.labels and bool((starts.times.diff() > 0).all()):
        found += ", one a row; if the rows are one measured trajectory, give the row to start from alone"
    return found


def _steps_in(step: float, usual: float) -> int:
    """As how many steps one is taken that is far longer than the usual one, of which a fit knows: as gaps are.

    Example:
        >>> [_steps_in(step, 0.1) for step in (0.01, 0.5, 0.52, 5.0)]
        [1, 1, 5, 50]
    """
    # The quotient may be infinite; beyond the most that are taken it makes no difference.
    return round(min(step / usual, MOST_NUMBERS)) if 0 < GAP * usual < step else 1


def _require_room(starts: Starts, steps: int, each: int = 1) -> None:
    """Refuse more than memory, and whoever reads the CSV, can take; each step may be taken as several."""
    count, entries = starts.states.shape
    numbers = count * (steps * each + 1) * (entries + 1)
    if numbers > MOST_NUMBERS and each > 1:
        raise InvalidArgument(
            f"--steps {steps} from {_counted(starts)}, each step taken as {each:,} of about the usual length, would be "
            f"{numbers:,} numbers; at most {MOST_NUMBERS:,} are computed at once: give a smaller --step or --steps, or "
            "fewer starts."
        )
    if numbers > MOST_NUMBERS:
        most = MOST_NUMBERS // (count * (entries + 1)) - 1
        advice = f"give --steps {most} or less, or fewer starts" if most >= 1 else "give fewer starts"
        raise InvalidArgument(
            f"--steps {steps} from {_counted(starts)} would be {numbers:,} numbers; at most {MOST_NUMBERS:,} are "
            f"computed at once: {advice}."
        )


def _times(starts: Starts, step: float, steps: int) -> Float64[Tensor, "start time"]:
    """The times of the start and after each step.

    Raises:
        InvalidArgument: they leave the range of numbers, or are equal after rounding.
    """
    times = starts.times[:, None] + step * torch.arange(steps + 1, dtype=torch.float64)
    if not bool(times.isfinite().all()) or not bool((times.diff(dim=1) > 0).all()):
        begin = ", or leave out the column t" if bool(starts.times.any()) else ""
        raise InvalidArgument(
            f"--step is {step!r}; {steps} such steps from t = {float(starts.times.abs().max()):.12g} give times that "
            f"are no numbers, or are equal after rounding; give another --step{begin}."
        )
    return times


def _states(flow: FlowMap, starts: Starts, times: Tensor, step: float, each: int) -> Float64[Tensor, "start time n"]:
    """The states at those times, between which are so many steps each.

    Raises:
        InvalidArgument: they leave the range of numbers, or a step's equation is not solved.
    """
    steps, h = times.shape[1] - 1, torch.tensor(step / each, dtype=torch.float64)
    small = track(repeat(h, steps * each), "rolling out", steps * each)
    states, stopped = safe_rollout(flow, starts.states, small)
    if stopped is None:
        return states[:, ::each]
    row, reason = _first_failure(flow, states[:, -1], h)
    taken = states.shape[1] - 1
    reached, end = taken // each, float(times[row, 0]) + taken * float(h)
    advice = f"--steps {reached}, " if reached else ""
    cure = "another --start" if each > 1 else "another --start or a smaller --step"
    raise InvalidArgument(
        f"the run from the start {starts.label(row)!r} ends at t = {end:.12g}, after {reached} of {steps} steps: "
        f"{(reason or stopped).rstrip('.')}; give {advice}{cure}."
    )


def _first_failure(flow: FlowMap, states: Tensor, h: Tensor) -> tuple[int, str | None]:
    """The first of the states from which a step fails, and why; halves are tried, since states fail together."""
    low, high = 0, len(states)
    while high - low > 1:
        middle = (low + high) // 2
        _, failed = safe_rollout(flow, states[low:middle], [h])
        low, high = (middle, high) if failed is None else (low, middle)
    return low, safe_rollout(flow, states[low:high], [h])[1]


def _write(out: Path | None, parts: Iterable[str]) -> None:
    """Write the parts of a CSV one after the other, to a file or to standard output."""
    if out is None:
        with _as_utf8(sys.stdout):
            for part in parts:
                print(part, end="")
        return

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.writelines(parts)

    write_atomically(resolved(expanded(out)), write)
    print(out)


@contextlib.contextmanager
def _as_utf8(stream: Any) -> Iterator[None]:
    """What is redirected or piped is a file, and of the same bytes everywhere; a terminal has its own encoding."""
    if not hasattr(stream, "reconfigure") or is_terminal(stream):
        yield
        return
    before = {"encoding": stream.encoding, "errors": stream.errors}
    stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        yield
        stream.flush()
    finally:
        with contextlib.suppress(OSError, ValueError):  # after an error it would fail again to write what is left
            stream.reconfigure(**before)


def _training_range(directory: Path, structure: Structure) -> Float64[Tensor, "2 n"] | None:
    """The least and the greatest value of each column of the training data; ``None`` where the fit has none."""
    try:
        ranges = read_json(directory / METRICS)["training_range"]
        return torch.tensor([ranges[name] for name in structure.names], dtype=torch.float64).reshape(-1, 2).mT
    except (DynablocksError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _left_range(
    limits: Float64[Tensor, "2 n"] | None,
    times: Float64[Tensor, "start time"],
    states: Float64[Tensor, "start time n"],
    flow: FlowMap,
) -> str | None:
    """How many runs leave the range of the training data, and where the first of them does, in words.

    The range of a column of one value has no width: the room beside it is a share of the size of the data.
    """
    if limits is None:
        return None
    low, high = limits
    varies = high - low > 1e-12 * torch.maximum(low.abs(), high.abs())
    room = OUTSIDE * torch.where(varies, high - low, flow.scale)
    outside = (states < low - room) | (states > high + room)
    left = outside.any(2).any(1)
    if not bool(left.any()):
        return None
    run = int(left.nonzero()[0])
    place = int(outside[run].any(1).nonzero()[0])
    column = flow.structure.names[int(outside[run, place].nonzero()[0])]
    return (
        f"{int(left.sum())} of {len(states)} runs leave the range of the training data (the first in column "
        f"{column!r}, from t = {float(times[run, place]):.12g}): nothing was learned there"
    )


def _moved(flow: FlowMap, states: Tensor) -> str | None:
    """How far what the fit keeps of a state has moved, in words; ``None`` where it keeps nothing of a state."""
    kept = change_along(flow, states, thinned((states.flatten(0, 1),), SPREAD_SAMPLES)[0])
    if kept is None:
        return None
    what, change = kept
    if flow.structure.preserve in LEARNED_ENERGY:
        what += " along these runs"  # not over that of the training, as the report has it
    most = float(change.max())
    if not math.isfinite(most):
        return f"{what} cannot be measured: it leaves the range of numbers"
    return f"{what}: at most {most:.2g}"
