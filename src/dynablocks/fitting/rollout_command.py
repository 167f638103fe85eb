"""The command ``dynablocks rollout``."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynablocks.data.trajectories import SUFFIXES, Starts, Trajectories, read_starts
from dynablocks.errors import BadData, InvalidArgument, require_range, require_whole
from dynablocks.files import expanded, require_writable, resolved, write_text
from dynablocks.fitting.job import load_fit, thinned
from dynablocks.fitting.report import SPREAD_SAMPLES
from dynablocks.fitting.rollout import change_along, safe_rollout
from dynablocks.fitting.surrogates import FlowMap, Structure
from dynablocks.progress import track

SUMMARY = """Trajectories of a fit from states of yours, as CSV: trajectory,t,<state columns>, one row a state, the
start first. dynablocks fit and pandas.read_csv read it.

Without --out the CSV goes to standard output, to be piped, and everything else to standard error."""

EXAMPLES = """starts:
  --start 0.5,0.0      one state: a number for each state column, in the order of the fit
  --start states.csv   CSV or Parquet with the state columns in any order, one row a start; it may have the columns
                       trajectory, what each is called, and t, when it starts (else they are numbered and start at 0);
                       what other columns hold is not looked at

examples:
  dynablocks rollout runs/first --start 0.5,0.0 > trajectory.csv
  dynablocks rollout runs/first --start 0.5,0.0 --steps 1000 --out trajectory.csv
  dynablocks rollout runs/first --start states.csv --step 0.05 --out trajectories.csv

A fit is most accurate at its usual step; step_halving_error in its metrics.json says how far others are off. At the end
standard error says how far what the fit keeps of a state (mass, norm, learned energy, signs) has moved.
In Python: flow = dynablocks.fitting.load_fit(DIR); flow.rollout(x, steps)."""

MOST_STEPS = 10**8


def add_arguments(parser: Any) -> None:
    """The options of ``dynablocks rollout``."""
    parser.add_argument("directory", type=str, nargs="?", help="the folder of a fit")
    parser.add_argument("--start", type=str, default=None, help="a state, as 0.5,0.0, or a file of states")
    parser.add_argument("--steps", type=int, default=100, help="how many steps from each start")
    parser.add_argument(
        "--step", type=float, default=None, help="the time of a step, above 0 (default: the usual one of the fit)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="the CSV file to write (default: print it to standard output)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out where it is there already")


def rollout_command(options: Any, say: Callable[[str], None]) -> int:
    """Read the fit and the starts, roll out, write; say how far what is kept has moved."""
    if options.directory is None:
        raise InvalidArgument("no fit was given; use: dynablocks rollout DIR --start 0.5,0.0")
    steps = require_whole("--steps", options.steps, 1, MOST_STEPS)
    if options.step is not None:
        require_range("--step", options.step, 0, open_low=True)
    if options.out is not None:
        _require_out(Path(options.out), overwrite=options.overwrite)
    flow = load_fit(expanded(options.directory))
    starts = _starts(options.start, flow.structure)
    found = _trajectories(flow, starts, flow.structure.step if options.step is None else options.step, steps)
    if options.out is None:
        print(found.to_csv(), end="")
    else:
        write_text(resolved(expanded(options.out)), found.to_csv())
        print(options.out)
    states = torch.stack(found.states)
    kept = change_along(flow, states, thinned((states.flatten(0, 1),), SPREAD_SAMPLES)[0])
    if kept is not None:
        what, change = kept
        say(f"{what}: at most {float(change.max()):.2g} along {steps} step{'s' if steps > 1 else ''}")
    return 0


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


def _trajectories(flow: FlowMap, starts: Starts, step: float, steps: int) -> Trajectories:
    """The states at the starts and after each step.

    Raises:
        InvalidArgument: times, or states, leave the range of numbers, or a step's equation is not solved.
    """
    times = starts.times[:, None] + step * torch.arange(steps + 1, dtype=torch.float64)
    if not bool(times.isfinite().all()) or not bool((times.diff(dim=1) > 0).all()):
        raise InvalidArgument(
            f"--step is {step!r}; {steps} such steps from t = {float(starts.times.abs().max()):g} give times that are "
            "no numbers, or are equal after rounding; give another --step."
        )
    h = torch.tensor(step, dtype=torch.float64)
    states, stopped = safe_rollout(flow, starts.states, track(repeat(h, steps), "rolling out", steps))
    if stopped is not None:
        raise _ended(flow, starts, times, states, h, stopped)
    return Trajectories(times.unbind(), states.unbind(), flow.structure.names, starts.labels)


def _ended(flow: FlowMap, starts: Starts, times: Tensor, states: Tensor, h: Tensor, stopped: str) -> InvalidArgument:
    """The error for a run that ends early: which, when and why."""
    row, reason = 0, stopped
    for k, last in enumerate(states[:, -1]):
        _, alone = safe_rollout(flow, last[None], [h])
        if alone is not None:
            row, reason = k, alone
            break
    reached, steps = states.shape[1] - 1, times.shape[1] - 1
    advice = f"--steps {reached}, " if reached else ""
    time = float(times[row, reached])
    return InvalidArgument(
        f"the run from the start {starts.label(row)!r} ends at t = {time:.6g}, after {reached} of {steps} steps: "
        f"{reason.rstrip('.')}; give {advice}another --start or a smaller --step."
    )
