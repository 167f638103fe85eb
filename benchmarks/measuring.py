"""How the scripts of this folder measure: seconds of actions in turns, and peaks of memory in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def seconds_in_turns(actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each action in each round, the actions in turns; a round that is not counted warms them up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def resident(entry: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (the peak) of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(entry):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {entry} in /proc/self/status")


def peak_above_start(action: Callable[[], object]) -> int:
    """Bytes of the peak of the resident memory during an action, less what was resident before it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def in_fresh_process(script: str, *flags: object) -> Any:
    """What a script prints, as JSON, in a process of its own, on one thread and with tensors from mmap.

    By default glibc serves tensors from its heap, whose fragmentation would be measured with them.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, script, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)
