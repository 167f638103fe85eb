"""Reproduce everything at the smoke preset twice, once killed on the way; the tables must be the same bytes.

python .ci/check_reproduce.py FOLDER [JOBS]
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LIMIT_SECONDS = 300


def command(out: Path, jobs: int) -> list[str]:
    return ["dynablocks", "reproduce", "all", "--preset", "smoke", "--jobs", str(jobs), "--out", str(out)]


def kill_midway(out: Path, jobs: int, built: int) -> int:
    """Start, wait for so many cells, then until one is half done, and kill everything; how many cells were built."""
    process = subprocess.Popen(command(out, jobs), stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        done, begun = list(out.glob("cells/*/result.json")), list(out.glob("cells/training-*.partial/config.yaml"))
        if len(done) >= built and begun:
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return len(list(out.glob("cells/*/result.json")))


def tables(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "smoke").glob("*.md"))}


def main() -> int:
    folder, jobs = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2
    started = time.monotonic()
    subprocess.run(command(folder / "whole", jobs), check=True)
    seconds = time.monotonic() - started
    print(f"reproduce all --preset smoke: {seconds:.0f} s")
    built = kill_midway(folder / "killed", jobs, 12)
    subprocess.run(command(folder / "killed", jobs), check=True, stderr=subprocess.DEVNULL)
    whole, killed = tables(folder / "whole"), tables(folder / "killed")
    different = [name for name in whole if whole[name] != killed.get(name)]
    print(f"killed after {built} cells and resumed: {len(whole) - len(different)} of {len(whole)} tables are identical")
    if different or not whole:
        print(f"different: {', '.join(different)}", file=sys.stderr)
        return 1
    if seconds > LIMIT_SECONDS:
        print(f"it took longer than {LIMIT_SECONDS} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
