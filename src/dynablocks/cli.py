"""The command line: ``dynablocks run | train | attack | certify | audit | verify | explain | report | fit | ...``."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

from dynablocks.arguments import make_parser
from dynablocks.errors import OUT_OF_MEMORY, DynablocksError, unknown_name
from dynablocks.progress import Stopped, is_terminal, printable, tell
from dynablocks.run_directory import commands

USAGE = """dynablocks: neural networks from dynamical systems, robust by proof.

usage: dynablocks COMMAND [options]
       dynablocks COMMAND --help       the options of a command
       dynablocks --version

classifiers:
  run       train, certify, attack and report in one directory: the main job
  train     train a network; resumes an unfinished training
  attack    attack the test images of a run with l2-PGD at many radii
  certify   certify every test image of a run
  audit     check a certificate file against weights, data and attacks
  verify    measure every declared property of a run's network in float64
  explain   print how a network's properties follow from its parts
  report    write the self-contained report.html of a run

physical systems:
  fit       fit a CSV, NumPy or Parquet file of trajectories, keeping mass,
            energy, volume, ...
  rollout   continue from states of your own with a fit; writes CSV

the paper:
  reproduce a figure or table of the paper, or all: cached, resumable, at three
            scales

names:
  list      what can be named: models, datasets, fields, integrators, ...

examples:
  the embedded digits, a minute on two cores:
    dynablocks run
  a network of the paper on them:
    dynablocks run --model prescribed --lift paper --preset smoke
  a CIFAR-10 copy, 15 minutes of training:
    dynablocks run --data-dir ~/cifar10 --out runs/cifar
    dynablocks explain runs/cifar
  a map that keeps the sum of the states:
    dynablocks fit trajectories.csv --preserve mass
    dynablocks rollout runs/fit-trajectories-mass --start 0.9,0.1,0.0
  every figure and table in minutes, to see that it works:
    dynablocks reproduce all --preset smoke
"""

LESS_MEMORY = {
    "run": "use a smaller --training.batch_size or --model.widths; once it is trained, a smaller --attack.batch_size",
    "train": "use a smaller --training.batch_size or --model.widths",
    "attack": "use a smaller --attack.batch_size",
    "audit": "use a smaller --samples",
    "fit": "give fewer rows or a smaller --width",
    "rollout": "use a smaller --steps",
}
"""What to do where the memory of a command does not suffice."""
RESUMED = ("run", "train", "attack", "fit", "reproduce")
"""Commands that keep what they have finished when they are stopped, and go on from there; others write at their end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a closed pipe, 2 for an error of use, 130 after Ctrl-C.

    Example:
        >>> main(["list", "models"])
        certified
        convnet
        flexible
        metric
        naive
        non_expansive
        prescribed
        resnet
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    format_before = warnings.formatwarning
    warnings.formatwarning = _as_sentence
    try:
        with _every_character():
            return _exit_code(arguments)
    except DynablocksError as error:
        tell(f"dynablocks: error: {error}")
        return 2
    except Stopped:
        return 130
    except KeyboardInterrupt:
        tell(f"dynablocks: stopped; {_after_stopping(arguments)}.")
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        place = place if _is_open(sys.stdout) else "standard output: "
        tell(f"dynablocks: error: {place}{error.strerror or error}; choose another place.")
        return 2
    except (MemoryError, RuntimeError) as error:
        # torch says RuntimeError, on a CPU as on a GPU.
        if isinstance(error, RuntimeError) and not re.search(OUT_OF_MEMORY, str(error)):
            raise
        advice = LESS_MEMORY.get(arguments[0], "free some, or take a larger machine")
        tell(f"dynablocks: error: out of memory; {advice}.")
        return 2
    finally:
        warnings.formatwarning = format_before
        for stream in (sys.stdout, sys.stderr):
            if not _is_open(stream):
                _discard(stream)


def _after_stopping(arguments: list[str]) -> str:
    """What is kept of a stopped command, and how to go on: not with --overwrite, which would delete it."""
    if not arguments or arguments[0] not in RESUMED:
        return "nothing of it is kept, and the same command begins anew"
    again = "the same command, without --overwrite," if "--overwrite" in arguments else "the same command"
    return f"what was finished is kept, and {again} does the rest"


def _exit_code(arguments: list[str]) -> int:
    """Run the command and write out all that it printed; --help and its like stop by themselves."""
    try:
        code = _dispatch(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0) if not isinstance(stop.code, str) else 2
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def _is_open(stream: TextIO | None) -> bool:
    """Whether a stream takes what was printed: its disk may be full, its reader gone."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        return False
    return True


def _discard(stream: TextIO) -> None:
    """Send to nowhere what a stream holds: the interpreter writes it out at its end, would fail, and exit with 120."""
    with contextlib.suppress(OSError, ValueError):
        handle = stream.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), handle)


@contextlib.contextmanager
def _every_character() -> Iterator[None]:
    """Print what the encoding of standard output lacks, such as … in Latin-1, as "?"; in files as \\u2026."""
    stream: Any = sys.stdout
    if getattr(stream, "errors", None) != "strict" or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors="replace" if is_terminal(stream) else "backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # it writes out what is left, and the output may be full
            stream.reconfigure(errors="strict")


def _as_sentence(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours as one sentence, without the line of the source that Python adds."""
    del filename, lineno, line
    kind = "" if issubclass(category, UserWarning) else f"{category.__name__}: "
    return f"dynablocks: warning: {kind}{printable(' '.join(str(message).split()))}\n"


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import dynablocks

        print(f"dynablocks {dynablocks.__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        raise unknown_name("command", arguments[0], COMMANDS)
    return command(arguments[1:])


def _fit(arguments: Sequence[str]) -> int:
    from dynablocks.fitting.commands import fit_command

    return fit_command(arguments)


def _rollout(arguments: Sequence[str]) -> int:
    from dynablocks.fitting.rollout_command import rollout_command

    return rollout_command(arguments)


def _reproduce(arguments: Sequence[str]) -> int:
    from dynablocks.experiments.commands import reproduce_command

    return reproduce_command(arguments)


def _list(arguments: Sequence[str]) -> int:
    from dynablocks.catalogue import catalogue

    kinds = catalogue()
    parser = make_parser("list", f"What can be named. Kinds: {', '.join(kinds)}.")
    parser.add_argument("kind", nargs="?", type=str, help="one kind; all when left out")
    options = parser.parse_args(list(arguments))
    if options.kind is not None:
        if options.kind not in kinds:
            raise unknown_name("kind", options.kind, kinds)
        print("\n".join(sorted(kinds[options.kind])))
        return 0
    for kind, names in kinds.items():
        print(f"{kind + ':':<16}{', '.join(sorted(names))}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": commands.run_command,
    "train": commands.train_command,
    "attack": commands.attack_command,
    "certify": commands.certify_command,
    "audit": commands.audit_command,
    "verify": commands.verify_command,
    "explain": commands.explain_command,
    "report": commands.report_command,
    "fit": _fit,
    "rollout": _rollout,
    "reproduce": _reproduce,
    "list": _list,
}
