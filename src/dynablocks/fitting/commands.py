"""The command ``dynablocks fit``."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynablocks.arguments import joined_values, make_parser, say
from dynablocks.errors import BadCheckpoint, BadData, InvalidArgument, require_choice, require_range, unknown_name
from dynablocks.files import expanded, lock_file, read_json, resolved, sha256, write_text
from dynablocks.fitting.doubts import doubts
from dynablocks.fitting.folder import already_there, claim, write_weights
from dynablocks.fitting.job import PRESETS, FitConfig, Plan, plan, run_stages
from dynablocks.fitting.report import headline_rows, long_run, measure, warnings, write_outputs
from dynablocks.fitting.samples import MOST_SAMPLES, usual_steps
from dynablocks.fitting.surrogates import LEARNED_ENERGY, SURROGATES, Structure, build
from dynablocks.progress import Stopped, output_console, printable, progress_bar, show
from dynablocks.reporting.words import duration, several
from dynablocks.run_files import CONFIG, EXAMPLE_DATA, LOCK, METRICS, REPORT

if TYPE_CHECKING:
    from dynablocks.data.trajectories import Pairs, Trajectories

SUMMARY = """Learn the flow map of a dynamical system from trajectories, keeping a chosen
structure for any parameters: mass, volume, norm or the symplectic form to
rounding, a learned energy to the solver's tolerance.

FILE is CSV, Parquet or NumPy .npz. A CSV has the header
trajectory,t,<state columns>, one row a sample; irregular times are fine, and
trajectory may be left out when there is one. Input/output pairs:
in_<name>...,out_<name>... and optionally h, the time between them."""

EXAMPLES = """what to preserve:
  mass        a weighted sum of the columns (--weights; by default all 1):
              reactions, epidemics, compartments; columns may become negative
  symplectic  Hamiltonian mechanics: columns are all positions, then all
              momenta; over long times the learned energy oscillates and, as a
              rule, does not drift
  energy      a learned energy, to the solver's tolerance; an even number of
              columns is all positions, then all momenta
  volume      of the state space, where no column drives itself (dx/dt does
              not depend on x): rigid bodies, the ABC flow, separable maps;
              not flows that stretch along their own axis, as x' = x, y' = -y
  norm        the Euclidean length of the state: spins, directions, wave
              functions; where an energy is kept too, as by a rigid body,
              energy is the better choice
  positive    states stay >= 0: concentrations, populations
  none        nothing: a baseline to compare with

examples:
  no data needed, from nothing to a report in minutes:
    dynablocks fit --example pendulum --out runs/first
  then, trajectories of the fit:
    dynablocks rollout runs/first --start 0.5,0.0 --out trajectory.csv
  f(-x) = -f(x), where the system has this symmetry:
    dynablocks fit pendulum.csv --preserve symplectic --odd
  S + I + R of the surrogate stays the same, to rounding:
    dynablocks fit sir.csv --preserve mass
    dynablocks fit tanks.parquet --preserve mass --weights 1,2.5,0.5
  the energy is not T(p) + V(q); momenta, not velocities:
    dynablocks fit arm.csv --preserve symplectic --coupled
  of a file with more columns, or in another order:
    dynablocks fit log.csv --preserve symplectic --columns q1,q2,p1,p2
  seconds, to see that the file is read:
    dynablocks fit data.csv --preserve none --preset smoke

An interrupted fit goes on when the same command is given again. The folder
gets report.html, metrics.json, verification.json, predictions.csv, config.yaml
and model.safetensors; in Python: dynablocks.fitting.load_fit(DIR)."""

FIRST_CHOICES = ("mass", "symplectic", "positive", "energy", "volume", "norm")
"""What an example keeps: the first of those that its system has. Energy of mechanics, rather than of predator and prey:
with an even number of columns a learned energy is one of positions and momenta."""
EXAMPLE_NOISE = 0.01


def add_arguments(parser: Any) -> None:
    """The options of ``dynablocks fit``."""
    parser.add_argument("file", type=str, nargs="?", help="the measured trajectories or pairs")
    parser.add_argument("--preserve", type=str, default=None, help=f"one of {', '.join(SURROGATES)}")
    parser.add_argument(
        "--columns",
        type=str,
        default=None,
        help="the state columns, in the order that the states are to have, as q1,q2,p1,p2 (a name with a comma in "
        "quotation marks); others are not looked at. Of pairs without in_ and out_; of .npz x1,x2,... (default: all "
        "but trajectory and t, in the file's order)",
    )
    parser.add_argument(
        "--example",
        type=str,
        default=None,
        help="fit noisy trajectories of this system, such as pendulum (positive: noise does not make a state negative)",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="the folder for everything (default: runs/fit-NAME-PRESERVE)"
    )
    parser.add_argument("--preset", type=str, default="cpu", help="smoke (seconds), cpu (minutes) or long (an hour)")
    parser.add_argument(
        "--max-minutes", type=float, default=None, help="stop fitting after so long (default: the preset's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument(
        "--test", type=str, default=None, help="labels of the test trajectories, as 3,7 (default: a fifth, drawn)"
    )
    parser.add_argument("--weights", type=str, default=None, help="for mass: one number a state column, as 1,2.5,1")
    parser.add_argument("--odd", action="store_true", help="the system has the symmetry x -> -x")
    parser.add_argument("--coupled", action="store_true", help="for symplectic: the energy is not T(p) + V(q)")
    parser.add_argument(
        "--substeps", type=int, default=None, help="steps of the method between two samples (default: chosen)"
    )
    parser.add_argument(
        "--width", type=int, default=None, help="hidden units of each learned function (default: the preset's)"
    )
    parser.add_argument(
        "--noise",
        type=str,
        default="auto",
        help="auto, yes (fit several steps in a row) or no (there is none: sampling that is coarse looks like it)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what was read and what would be fitted, and stop")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds another fit")


def fit_command(arguments: Sequence[str]) -> int:
    """Read, fit, verify, roll out, report."""
    parser = make_parser("fit", SUMMARY, EXAMPLES)
    add_arguments(parser)
    options = parser.parse_args(joined_values(arguments, "--weights"))
    preserve, name = _choices(options)
    config = _config(options, preserve)
    out = Path(options.out or Path("runs") / f"fit-{name}-{preserve}")
    if out.exists() and not out.is_dir():
        raise InvalidArgument(f"--out {out} is a file; give a folder.")
    origin = _read(options, preserve, out, _column_names(options))
    planned = plan(origin.data, config)
    if options.dry_run:
        return _dry_run(planned, config, origin.file, out)
    source = origin.describe()
    with lock_file(_lock(resolved(out))) as free:
        if not free:
            raise InvalidArgument(f"another process is fitting in {out}; wait for it or choose another --out.")
        finished = claim(out, config, planned.structure, source, overwrite=options.overwrite)
        if origin.example is not None:
            write_text(origin.file, origin.example)
        if finished:
            say(already_there(out, config))
        else:
            try:
                _fit(planned, config, out, source, "dynablocks fit " + shlex.join(arguments))
            except KeyboardInterrupt as interrupt:
                say(f"interrupted; the same command, without --overwrite, goes on from {out}")
                raise Stopped from interrupt
    _show(out / METRICS)
    print(out / REPORT)
    return 0


def _lock(folder: Path) -> Path:
    """Beside the folder, so that a refused fit leaves that as it is; inside where nothing can be written beside it."""
    if folder.is_dir() and not os.access(folder.parent, os.W_OK):
        return folder / LOCK
    return folder.parent / f".{folder.name}.lock"


def _fit(planned: Plan, config: FitConfig, out: Path, source: dict[str, str], command: str) -> None:
    say(_reading(planned, source["file"]))
    if _has_momenta(planned.structure):
        say(_columns(planned.structure))
    fitted = run_stages(planned, config, out, say)
    write_weights(out, fitted.flow)
    with progress_bar("verifying and rolling out") as update:
        outcome = measure(fitted, long_run(config), update)
    write_outputs(out, outcome, source, command)


def _choices(options: Any) -> tuple[str, str]:
    """What to preserve, and a short name of the data."""
    if (options.file is None) == (options.example is None):
        came = "neither" if options.file is None else "both"
        raise InvalidArgument(f"give a FILE or --example NAME ({came} came); see dynablocks fit --help.")
    if options.example is not None:
        from dynablocks.data.systems import require_system

        kept = require_system(options.example).preserves
        default = next((word for word in FIRST_CHOICES if word in kept), "none")
        name = options.example
    else:
        default, name = None, Path(options.file).stem
    preserve = options.preserve or default
    if preserve is None:
        raise InvalidArgument(f"--preserve is missing; give one of {', '.join(SURROGATES)} (none keeps nothing).")
    if preserve not in SURROGATES:
        raise unknown_name("--preserve", preserve, SURROGATES)
    return preserve, name


def _config(options: Any, preserve: str) -> FitConfig:
    settings = dict(PRESETS[require_choice("preset", options.preset, PRESETS)])
    for key in ("width", "max_minutes"):
        if getattr(options, key) is not None:
            settings[key] = getattr(options, key)
    if options.coupled and preserve != "symplectic":
        raise InvalidArgument(f"--coupled belongs to --preserve symplectic; got --preserve {preserve}.")
    if options.max_minutes is not None:
        require_range("--max-minutes", options.max_minutes, 0, open_low=True)
    return FitConfig(
        preserve=preserve,
        weights=_weights(options.weights),
        odd=options.odd,
        separable=not (options.coupled or _couples(options, preserve)),
        substeps=options.substeps,
        noise=options.noise,
        seed=options.seed,
        test=_names("--test", options.test),
        **settings,
    )


def _couples(options: Any, preserve: str) -> bool:
    """Whether the energy of the example is known not to be T(p) + V(q)."""
    if options.example is None or preserve != "symplectic":
        return False
    from dynablocks.data.systems import require_system

    return not require_system(options.example).separable


def _weights(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        weights = tuple(float(part) for part in text.strip("[]() ").split(","))
    except ValueError:
        raise InvalidArgument(f"--weights is {text!r}; numbers separated by commas are needed, as 1,2.5,1.") from None
    if not all(math.isfinite(w) and w != 0 for w in weights):
        cure = "; fit the field `constrained` in Python, or leave out by --columns a column without mass on which no "
        cure += "other depends"
        advice = cure if 0 in weights else ""
        raise InvalidArgument(f"--weights is {text!r}; every weight must be a finite number other than 0{advice}.")
    return weights


@dataclass(frozen=True)
class _Source:
    """What is fitted and its file; of an example also the file's text, which is written once the folder is ours."""

    data: Trajectories | Pairs
    file: Path
    example: str | None = None

    def describe(self) -> dict[str, str]:
        digest = sha256(self.file) if self.example is None else hashlib.sha256(self.example.encode()).hexdigest()
        return {"file": self.file.name, "sha256": digest}


def _column_names(options: Any) -> tuple[str, ...] | None:
    if options.columns is not None and options.example is not None:
        raise InvalidArgument("--columns chooses among the columns of a FILE; leave it out with --example.")
    return _names("--columns", options.columns)


def _names(flag: str, text: str | None) -> tuple[str, ...] | None:
    """What stands between the commas of an option's text."""
    if text is None:
        return None
    try:
        names = tuple(part.strip() for part in next(csv.reader([text], skipinitialspace=True, strict=True)))
    except csv.Error:
        names = ()
    if not names or not all(names):
        raise InvalidArgument(
            f"{flag} is {text!r}; names separated by commas are needed, as q,p (one that has a comma in quotation "
            "marks)."
        )
    return names


def _read(options: Any, preserve: str, out: Path, columns: Sequence[str] | None = None) -> _Source:
    from dynablocks.data.trajectory_files import read_dynamics

    if options.example is None:
        file = expanded(options.file)
        return _Source(read_dynamics(file, columns), file)
    from dynablocks.data.physics import generate
    from dynablocks.data.systems import require_system

    data = generate(options.example, trajectories=10, steps=60, step_size=0.1, noise=EXAMPLE_NOISE, seed=options.seed)
    if preserve == "positive" and preserve in require_system(options.example).preserves:
        data = replace(data, states=tuple(states.clamp_min(0) for states in data.states))
    file = out / EXAMPLE_DATA
    if file.exists() and not (out / CONFIG).exists() and not options.overwrite and not options.dry_run:
        raise BadData(f"{file} is there already; give it as FILE, or choose another --out.")
    return _Source(data, file, data.to_csv())


def _reading(planned: Plan, file: str) -> str:
    parts = planned.parts
    counts = ", ".join(
        f"{len(part.pairs()[0])} for {use}"
        for use, part in (("training", parts.train), ("validation", parts.validation), ("the test", parts.test))
        if part is not None
    )
    noise = f"; noise about {planned.noise.level:.2g} of a column's own spread" if planned.horizon > 1 else ""
    steps = len(usual_steps(parts.train, planned.structure.step).pairs()[0])
    used = f"; {MOST_SAMPLES:,} of {steps:,} training steps are used, evenly spaced" if steps > MOST_SAMPLES else ""
    return f"{file}: {len(planned.structure.names)} state columns, steps: {counts}{used}{noise}"


def _has_momenta(structure: Structure) -> bool:
    return structure.preserve in LEARNED_ENERGY and len(structure.names) % 2 == 0


def _columns(structure: Structure) -> str:
    """The state columns, and which of them are taken for positions and momenta."""
    names, half = structure.names, len(structure.names) // 2
    if not _has_momenta(structure):
        return ", ".join(names)
    return f"positions {', '.join(names[:half])}; momenta {', '.join(names[half:])}"


def _dry_run(planned: Plan, config: FitConfig, file: Path, out: Path) -> int:
    structure, flow = planned.structure, build(planned.structure)
    limit = "no limit" if config.max_minutes is None else f"at most {duration(60 * config.max_minutes)}"
    facts = {
        "read": _reading(planned, file.name),
        "columns": _columns(structure),
        "surrogate": f"{type(flow.field).__name__} by {flow.method!r}, {several(structure.substeps, 'substep')}",
        "declares": ", ".join(map(planned.told, flow.properties)) or "nothing",
        "parameters": str(sum(p.numel() for p in flow.parameters())),
        "compared": "step by step" if planned.horizon == 1 else f"{several(planned.horizon, 'step')} in a row",
        "time": limit,
        "folder": str(out),
    }
    for name, value in facts.items():
        show(f"{name:<12}{value}")
    for doubt in doubts(planned):
        show(f"warning: {doubt}")
    return 0


def _show(path: Path) -> None:
    """Print what a fit's metrics say.

    Raises:
        BadCheckpoint: they are JSON, but not the metrics of a fit.
    """
    from rich.table import Table

    metrics = read_json(path)
    try:
        rows, said = headline_rows(metrics), warnings(metrics)
        if not all(isinstance(cell, str) for row in rows for cell in row):
            raise TypeError("the table has words alone")
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{path} was cut or edited; remove it and give the command again.") from error
    table = Table(title=None, show_edge=False)
    for heading in ("", "result", "meaning"):
        table.add_column(heading, justify="right" if heading == "result" else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    output_console(110).print(table, markup=False)
    for warning in said:
        show(f"warning: {warning}")
