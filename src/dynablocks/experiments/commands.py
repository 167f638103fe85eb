"""The command ``dynablocks reproduce``."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynablocks.arguments import expand, make_parser, say
from dynablocks.config import PRESETS
from dynablocks.data import infer_name
from dynablocks.data.cifar import CIFAR10, CIFAR100, find_copy
from dynablocks.data.folders import require_folder
from dynablocks.errors import InvalidArgument, require_choice, require_range
from dynablocks.experiments import EXPERIMENTS
from dynablocks.experiments.base import Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.provenance import cores
from dynablocks.experiments.runner import (
    all_cells,
    build_cells,
    build_with_workers,
    chosen,
    gather_checks,
    interrupt_once,
    require_workers,
    time_limit,
    write_outputs,
)
from dynablocks.progress import Stopped, output_console
from dynablocks.reporting.words import duration, several

if TYPE_CHECKING:
    from rich.table import Table

DONE, DIFFERS, UNFINISHED = 0, 1, 3
MOST_HOURS, MOST_SEED = 1e5, 2e8
"""Timers count so many seconds; NumPy's random numbers begin with 32 bits, and an experiment has up to 15 seeds for one
of the command's."""


def add_arguments(parser: Any) -> None:
    """The options of ``dynablocks reproduce``."""
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("names", type=str, nargs="*", help=f"what to make: all, or some of {names}")
    parser.add_argument(
        "--preset",
        type=str,
        default="cpu",
        help="smoke (all: minutes, embedded data), cpu (hours, two cores) or paper (its settings: a GPU, or patience)",
    )
    parser.add_argument("--data.dir", type=Path, default=None, help="a CIFAR-10 copy (default: through the Hub)")
    parser.add_argument("--cifar100-dir", type=Path, default=None, help="a CIFAR-100 copy; without it: not run")
    parser.add_argument("--out", type=Path, default=Path("reproduced"), help="where cells, tables and figures are kept")
    parser.add_argument("--seed", type=int, default=0, help="of data, starts and trainings")
    parser.add_argument("--dry-run", action="store_true", help="list the cells with their state and cost, and stop")
    parser.add_argument(
        "--check", action="store_true", help="only compare what is there with the paper; 1 if it differs or failed"
    )
    parser.add_argument("--max-hours", type=float, default=None, help="stop after so long, ready to go on")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes build cells; they share the cores")
    parser.add_argument("--retry", action="store_true", help="try again what failed before")
    parser.add_argument("--worker", action="store_true", help="build cells for another process; write no tables")


def reproduce_command(arguments: Sequence[str]) -> int:
    """Build, write and compare.

    Returns:
        0; 1 when a cell failed, or with ``--check`` when a result differs; 3 when cells are left to build, since the
        time was over or their data is not there.
    """
    parser = make_parser("reproduce", "Make figures and tables of the paper; what is there already is not made again.")
    add_arguments(parser)
    options = parser.parse_args(expand(arguments, "reproduce"))
    require_choice("preset", options.preset, PRESETS)
    require_range("jobs", options.jobs, 1, 1024)
    require_range("seed", options.seed, 0, MOST_SEED)
    if options.max_hours is not None:
        require_range("max_hours", options.max_hours, 0, MOST_HOURS, open_low=True)
    if options.out.exists() and not options.out.is_dir():
        raise InvalidArgument(f"--out {options.out} is a file; give a folder.")
    for folder, wanted in ((options.data.dir, CIFAR10), (options.cifar100_dir, CIFAR100)):
        if folder is not None and find_copy(wanted, require_folder(folder)) is None:
            raise InvalidArgument(f"{folder} holds {infer_name(folder)}; {wanted.name} is needed there.")
    if options.worker:
        signal.signal(signal.SIGINT, interrupt_once)
    experiments = chosen(options.names)
    scale = Scale(options.preset, options.data.dir, options.cifar100_dir, options.seed)
    store = Store(options.out / "cells")
    if options.jobs > 1 and not (options.dry_run or options.check):  # these start no process, and write nothing
        require_workers(experiments, store.root)
    cells = all_cells(experiments, scale)
    if options.dry_run:
        return _dry_run(cells, store)
    if options.check:
        return _check(experiments, scale, cells, store)
    return _build(options, arguments, experiments, scale, cells, store)


def _build(
    options: Any,
    arguments: Sequence[str],
    experiments: Sequence[Experiment],
    scale: Scale,
    cells: Sequence[Cell],
    store: Store,
) -> int:
    with time_limit(options.max_hours if options.jobs == 1 else None) as is_over:
        try:
            if options.jobs > 1:
                # Once, and not by each worker in turn.
                for cell in cells if options.retry else ():
                    store.forget_failure(cell)
                build_with_workers([a for a in arguments if a != "--retry"], options.jobs, cores())
            else:
                build_cells(cells, store, say, retry=options.retry)
        except KeyboardInterrupt as interrupt:
            if not is_over():
                say("stopped; the same command goes on from here")
                raise Stopped from interrupt
    states = [store.state(cell) for cell in cells]
    if not options.worker:
        _write(experiments, scale, store, options.out)
        _sum_up(cells, states, store, say)
    if "failed" in states:
        return DIFFERS
    return DONE if set(states) <= {"built"} else UNFINISHED


def _write(experiments: Sequence[Experiment], scale: Scale, store: Store, out: Path) -> None:
    for experiment in experiments:
        paths = write_outputs(experiment, scale, store, out)
        say(f"{experiment.name}: {paths[0]}")
    _show(check_table(gather_checks(experiments, scale, store)))


def _sum_up(cells: Sequence[Cell], states: Sequence[str], store: Store, say: Callable[[str], None]) -> None:
    _say_failures(cells, states, store, say)
    impossible = [cell for cell, state in zip(cells, states, strict=True) if state == "impossible"]
    if impossible:
        first = impossible[0]
        say(f"not run: {several(len(impossible), 'cell')}, such as {first.title}: {store.obstacle(first)}")
    unfinished = sum(state in ("running", "partial", "waiting") for state in states)
    if unfinished and "failed" not in states:
        verb = "is" if unfinished == 1 else "are"
        say(f"{unfinished} of {several(len(cells), 'cell')} {verb} not built yet; the same command goes on")


def _say_failures(cells: Sequence[Cell], states: Sequence[str], store: Store, say: Callable[[str], None]) -> None:
    for cell, state in zip(cells, states, strict=True):
        if state == "failed":
            say(f"failed: {cell.title}: {store.failure(cell)} (--retry tries again)")


def _dry_run(cells: Sequence[Cell], store: Store) -> int:
    left = 0.0
    for cell in cells:
        state = store.state(cell)
        cost = 0.0 if state in ("built", "impossible") else cell.cost
        left += cost
        print(f"{state:<10} {duration(cost) if cost else '':>14}  {cell.title}")
    print(f"about {duration(left)} on two CPU cores for what is missing of {several(len(cells), 'cell')}")
    return DONE


def _check(experiments: Sequence[Experiment], scale: Scale, cells: Sequence[Cell], store: Store) -> int:
    checks, states = gather_checks(experiments, scale, store), [store.state(cell) for cell in cells]
    _show(check_table(checks))
    _say_failures(cells, states, store, say)
    differs = "failed" in states or any(check.verdict == "differs" for _, check in checks)
    return DIFFERS if differs else DONE


def check_table(checks: Sequence[tuple[str, Check]]) -> Table:
    """The comparisons as a table for the terminal."""
    from rich.table import Table

    table = Table(title=None)
    for heading in ("", "what", "paper", "expected", "got", "verdict"):
        table.add_column(heading, overflow="fold")
    colours = {"agrees": "green", "differs": "red"}
    for name, check in checks:
        verdict = f"[{colours[check.verdict]}]{check.verdict}[/]" if check.verdict in colours else check.verdict
        table.add_row(name, check.what, check.paper, check.expected, check.got, verdict)
    return table


def _show(table: Table) -> None:
    output_console(140).print(table)
