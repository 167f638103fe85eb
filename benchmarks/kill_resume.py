"""Kill a training with SIGKILL at random moments, resume it each time, and compare the final weights bit for bit.

    python benchmarks/kill_resume.py --kills 10
    python benchmarks/kill_resume.py --kills 10 -- python -m dynablocks train --preset cpu --epochs 2 --out

The command after ``--`` gets a run directory appended; the default trains 12 epochs of the smoke preset on digits. Give
it a short checkpoint interval.

One undisturbed training gives the expected SHA-256 of ``checkpoint/model.safetensors`` and the time T from the first
checkpoint to the end. In another run directory the command is started, killed, and started again, until it has been
killed ``--kills`` times; then it may finish. A kill comes a random time in [0, 2T / kills] after the first new
checkpoint, so that the kills spread over the training; one in five comes while the program starts. Exits with 1 when a
digest differs, or when fewer kills met a running training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = ["--preset", "smoke", "--training.epochs", "12", "--training.checkpoint_seconds", "0.1"]
DEFAULT = [sys.executable, "-m", "dynablocks", "train", *SETTINGS, "--out"]
WEIGHTS = Path("checkpoint") / "model.safetensors"


def main() -> int:
    """Run both trainings, print a table, return the exit code."""
    options, command = parse()
    place = Path(options.directory or tempfile.mkdtemp(prefix="kill_resume."))
    calm, rough = place / "undisturbed", place / "killed"
    window = run_to_end(command, calm)
    expected = digest(calm)
    print(f"undisturbed: first checkpoint after {window[0]:.1f} s, end after {window[1]:.1f} s, {expected}")
    met = kill_often(command, rough, options.kills, window, expected, random.Random(options.seed))
    run_to_end(command, rough)
    same = digest(rough) == expected
    print(f"killed {met} times: {digest(rough)}")
    print("bit-identical" if same else "DIFFERENT", "final weights;", f"{last_step(calm)} and {last_step(rough)} steps")
    return 0 if same and met == options.kills else 1


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command that trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--directory", help="where to train; a temporary folder when left out")
    parser.add_argument("command", nargs="*", help="after --: the training command, to which a directory is appended")
    options = parser.parse_args()
    return options, options.command or DEFAULT


def start(command: list[str], directory: Path) -> subprocess.Popen[bytes]:
    """Start the command, in a process group of its own, its output in ``directory.log``."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.log", "ab") as log:
        return subprocess.Popen([*command, str(directory)], stdout=log, stderr=log, start_new_session=True)


def run_to_end(command: list[str], directory: Path) -> tuple[float, float]:
    """Run the command, insist that it ends well, and return the seconds to its first checkpoint and to its end."""
    begun, first = time.monotonic(), None
    process = start(command, directory)
    while process.poll() is None:
        if first is None and (directory / "checkpoint").exists():
            first = time.monotonic() - begun
        time.sleep(0.02)
    insist(process, directory)
    end = time.monotonic() - begun
    return (end if first is None else first), end


def insist(process: subprocess.Popen[bytes], directory: Path) -> None:
    """Stop when the training has failed by itself."""
    if process.returncode:
        log = Path(f"{directory}.log").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"the training in {directory} failed with {process.returncode}:\n{log[-2000:]}")


def kill_often(
    command: list[str], directory: Path, kills: int, window: tuple[float, float], expected: str, draw: random.Random
) -> int:
    """Start and kill the command ``kills`` times; returns how many kills met it running.

    A start that ends before its moment comes must have the expected digest; the run directory is then emptied for
    another round.
    """
    print(f"{'kill':>4}  {'moment':>24}  {'checkpoint at step':>18}  left behind")
    met = tries = 0
    while met < kills and tries < 20 * kills:
        tries += 1
        early = draw.random() < 0.2
        delay = draw.uniform(0, window[0]) if early else draw.uniform(0, 2 * (window[1] - window[0]) / kills)
        before = written(directory)
        process = start(command, directory)
        while not early and process.poll() is None and written(directory) in (before, None):
            time.sleep(0.005)
        moment = f"{delay:.2f} s after {'start' if early else 'checkpoint'}"
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            met += 1
            print(f"{met:>4}  {moment:>24}  {checkpoint_step(directory)!s:>18}  {left_behind(directory)}", flush=True)
            continue
        insist(process, directory)
        if digest(directory) != expected:
            raise SystemExit(f"DIFFERENT final weights in {directory} after {met} kills")
        print(f"{'':>4}  {moment:>24}  {'finished':>18}  the expected digest; emptied for another round", flush=True)
        shutil.rmtree(directory)
    return met


def written(directory: Path) -> int | None:
    """When the newest checkpoint was written, in nanoseconds."""
    try:
        return (directory / "checkpoint" / "manifest.json").stat().st_mtime_ns
    except OSError:
        return None


def checkpoint_step(directory: Path) -> int | None:
    """The step of the newest checkpoint, without trusting it."""
    import torch

    for name in ("checkpoint", "checkpoint.previous"):
        path = directory / name / "state.pt"
        if path.exists():
            return int(torch.load(path, weights_only=True)["step"])
    return None


def left_behind(directory: Path) -> str:
    """What lies in the run directory after a kill."""
    return ", ".join(sorted(path.name[:20] for path in directory.glob("*checkpoint*"))) or "nothing"


def digest(directory: Path) -> str:
    """SHA-256 of the final weights."""
    return hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest()


def last_step(directory: Path) -> int:
    """The step of the last line of ``metrics.jsonl``."""
    return int(json.loads((directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"])


if __name__ == "__main__":
    sys.exit(main())
