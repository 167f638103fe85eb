"""Build the cells of experiments, alone or with other processes, and write what is made of them."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dynablocks.arguments import say
from dynablocks.errors import InvalidArgument
from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store, in_order
from dynablocks.experiments.provenance import where_made
from dynablocks.files import can_lock, write_atomically, write_json, write_text
from dynablocks.progress import PATIENCE_SECONDS
from dynablocks.reporting.figures import style
from dynablocks.reporting.words import duration
from dynablocks.training.interrupts import is_repeated_interrupt

Say = Callable[[str], None]

WINDOWS = os.name == "nt"
POLL_SECONDS = 0.5
ENDED = ("built", "failed", "impossible")


ELSEWHERE = {
    "fig1": "Figure 1 is drawn by table1; name that",
    "fig2": "Figure 2 is a sketch, with nothing to compute; name another",
}
"""Figures of the paper that no experiment is called after."""


def chosen(names: Sequence[str]) -> list[Experiment]:
    """The experiments of the names; ``all`` is every one.

    Raises:
        InvalidArgument: a name is unknown, or of a figure that stands elsewhere.
    """
    for name in ELSEWHERE.keys() & set(names):
        raise InvalidArgument(f"unknown experiment {name!r}: {ELSEWHERE[name]}.")
    wanted = sorted(EXPERIMENTS, key=_natural) if "all" in names else list(names)
    if not wanted:
        raise InvalidArgument(f"nothing was named to reproduce; name one of {', '.join(EXPERIMENTS)}, or all.")
    return [EXPERIMENTS.get_known(name)() for name in wanted]


def _natural(name: str) -> tuple[str, int]:
    """Sorts fig4 before fig10."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or 0)


def all_cells(experiments: Sequence[Experiment], scale: Scale) -> list[Cell]:
    """Every cell once, after those it needs, in the experiments' order."""
    return list(in_order([cell for experiment in experiments for cell in experiment.cells(scale)]))


def build_cells(cells: Sequence[Cell], store: Store, say: Say, *, retry: bool = False) -> None:
    """Build what is missing; wait for cells that other processes build.

    The time left follows from what all processes together have built meanwhile.

    Raises:
        MemoryError, RuntimeError: memory did not suffice for a cell; the others are built.
    """
    ended: set[Cell] = set()
    lacking: Exception | None = None
    settled = [state for state in ENDED if not (retry and state == "failed")]

    def outstanding() -> float:
        return sum(cell.cost for cell in cells if cell not in ended and store.state(cell) not in settled)

    began, whole = time.perf_counter(), outstanding()
    while True:
        moved = waiting = False
        for number, cell in enumerate(cells, start=1):
            if cell in ended:
                continue
            before, started = store.state(cell), time.perf_counter()
            try:
                state = store.build(cell, retry=retry)
            except (MemoryError, RuntimeError) as error:
                lacking = lacking or error
                ended.add(cell)
                moved = True
                continue
            waiting = waiting or state == "running"
            if state not in ENDED:
                continue
            ended.add(cell)
            moved = True
            if before in ENDED and not (before == "failed" and retry):
                continue
            rest = outstanding()
            left = (time.perf_counter() - began) / max(whole - rest, cell.cost, 1e-9) * rest
            ending = f", about {duration(left)} left" if left > PATIENCE_SECONDS else ""
            took = duration(time.perf_counter() - started)
            say(f"[{number:>3}/{len(cells)}] {cell.title}: {state} in {took}{ending}")
            if state == "failed":
                say(f"          {store.failure(cell)}")
        if not moved and not waiting:
            if lacking is not None:
                raise lacking
            return
        if not moved:
            time.sleep(POLL_SECONDS)


def require_workers(experiments: Sequence[Experiment], folder: Path) -> None:
    """Refuse processes that could not build the cells of these experiments together.

    A worker is the program ``dynablocks``, which knows no experiment of the user's; and cells are shared by locked
    files.

    Args:
        experiments: what to build.
        folder: of the cells; made, since only a file that is written there tells whether it can be locked.

    Raises:
        InvalidArgument: an experiment is of another package, or files in the folder cannot be locked.
        DynablocksError: the folder is not writable.
    """
    for experiment in experiments:
        module = type(experiment).__module__
        if not module.startswith("dynablocks.experiments."):
            raise InvalidArgument(
                f"the experiment {experiment.name} (of {module}) is known to this process only; give --jobs 1."
            )
    if not can_lock(folder):
        raise InvalidArgument(
            f"processes cannot share the cells in {folder}, where nothing locks files (Windows, a file system without "
            "flock); give --jobs 1, or another --out."
        )


def build_with_workers(arguments: Sequence[str], jobs: int, cores: int) -> None:
    """Run the same command in ``jobs`` processes that share the cells and the cores, and wait for them.

    Bars of several processes would overwrite one another, so each has a dumb terminal and prints lines. One that a
    signal ends can say nothing itself, so that is said here; also how many ended with 2, whose sentences stand above
    the lines of the others.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // jobs)), "TERM": "dumb"}
    # With -m modules are looked for in the working directory first, without -P: only where this process does so, too.
    safe = ["-P"] if {"", os.getcwd()}.isdisjoint(sys.path) else []
    command = [sys.executable, *safe, "-m", "dynablocks", "reproduce", *arguments, "--jobs", "1", "--worker"]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        with terminated_as_interrupted():
            for _ in range(jobs):
                workers.append(subprocess.Popen(command, env=environment))
            codes = [worker.wait() for worker in workers]
    except KeyboardInterrupt:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(signal.SIGINT)
        for worker in workers:
            worker.wait()
        raise
    for number in (-code for code in codes if code < 0):
        # By 9, SIGKILL, the kernel ends what takes the last memory.
        hint = " (out of memory?); use fewer --jobs" if number == 9 else "; the same command goes on from what it left"
        say(f"a worker was ended by signal {number}{hint}")
    if refused := codes.count(2):
        say(f"{refused} of {jobs} workers ended with an error, exit code 2; each has said above what to do")


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM, as ``kill`` and job schedulers send it, for a Ctrl-C: it would end this process and no worker."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupt_once(number: int, frame: object) -> None:
    """A handler of SIGINT for workers, which get the terminal's and at once their command's."""
    if not is_repeated_interrupt():
        raise KeyboardInterrupt


@contextlib.contextmanager
def time_limit(hours: float | None) -> Iterator[Callable[[], bool]]:
    """Interrupt this process, as Ctrl-C does, after so many hours; the yielded function says whether that happened."""
    over = threading.Event()

    def interrupt() -> None:
        over.set()
        if WINDOWS:
            _thread.interrupt_main()  # os.kill would end the process there, before it saves anything
        else:
            os.kill(os.getpid(), signal.SIGINT)

    if hours is None:
        yield over.is_set
        return
    timer = threading.Timer(3600 * hours, interrupt)
    timer.daemon = True
    # A script's background job inherits an ignored SIGINT.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        yield over.is_set
    finally:
        timer.cancel()
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_outputs(experiment: Experiment, scale: Scale, store: Store, out: Path) -> list[Path]:
    """NAME.md, NAME.json and the figures, from the cells that are built."""
    folder = out / (scale.preset + (f"-seed-{scale.seed}" if scale.seed else ""))
    paths = [folder / f"{experiment.name}.md", folder / f"{experiment.name}.json"]
    for stem, figure in experiment.figures(scale, store).items():
        for ending in ("png", "svg"):
            path = folder / f"{stem}.{ending}"
            options = {"metadata": {"Date": None}} if ending == "svg" else {"metadata": {"Software": None}, "dpi": 150}
            with style():
                write_atomically(path, lambda temporary: figure.savefig(temporary, format=ending, **options))  # noqa: B023
            paths.append(path)
    pictures = [path.name for path in paths[2:] if path.suffix == ".png"]
    write_text(paths[0], page(experiment, scale, store, pictures))
    write_json(paths[1], provenance(experiment, scale, store))
    return paths


def page(experiment: Experiment, scale: Scale, store: Store, pictures: Sequence[str]) -> str:
    """The experiment's Markdown page."""
    head = f"# {experiment.title}\n\nSource: {experiment.source}. Made by `{command(experiment, scale)}`.\n"
    images = "".join(f"\n![{name}]({name})\n" for name in pictures)
    origin = "" if scale.preset == "smoke" else f"\n{where_made(provenance(experiment, scale, store))}\n"
    return f"{head}\n{experiment.tables(scale, store).strip()}\n{images}{origin}"


def command(experiment: Experiment, scale: Scale) -> str:
    """The command that makes the experiment again."""
    used = {getattr(cell, "data_dir", None) for cell in in_order(experiment.cells(scale))} - {None}
    data = " --data-dir CIFAR10" if scale.data_dir in used else ""
    data += " --cifar100-dir CIFAR100" if scale.cifar100_dir in used else ""
    seed = f" --seed {scale.seed}" if scale.seed else ""
    return f"dynablocks reproduce {experiment.name} --preset {scale.preset}{data}{seed}"


def provenance(experiment: Experiment, scale: Scale, store: Store) -> dict[str, object]:
    """Every cell with its state, key, settings, result and machine; and the checks."""
    rows = []
    for cell in in_order(experiment.cells(scale)):
        record = store.record(cell) or {}
        said = {key: value for key, value in record.items() if key not in ("title", "files")}
        rows.append({"title": cell.title, "state": store.state(cell), **said})
    checks = [asdict(check) for check in experiment.checks(scale, store)]
    return {"experiment": experiment.name, "preset": scale.preset, "seed": scale.seed, "checks": checks, "cells": rows}


def gather_checks(experiments: Sequence[Experiment], scale: Scale, store: Store) -> list[tuple[str, Check]]:
    """Every comparison with the paper, with its experiment's name."""
    return [(e.name, check) for e in experiments for check in e.checks(scale, store)]
