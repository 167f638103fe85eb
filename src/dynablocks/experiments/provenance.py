"""Where a result was made: versions, commit, machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def made_here(device: str = "cpu") -> dict[str, Any]:
    """Version, commit, hardware and date, as plain JSON, of what is computed on a device, cpu or cuda.

    Example:
        >>> sorted(made_here())[:3]
        ['commit', 'date', 'device']
    """
    import torch

    import dynablocks

    return {
        "version": dynablocks.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


@functools.cache
def device_name(device: str = "cpu") -> str:
    """The GPU's name for cuda; the processor's, with the cores this process may use and its vector instructions."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return f"{_processor()}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str | None:
    """The commit of the source this runs from, with ``+`` when a file of its repository differs from it; ``None`` when
    it is installed, be it inside another repository."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)

    try:
        if git("ls-files", "--error-unmatch", here.name).returncode != 0:
            return None
        found, changed = git("rev-parse", "--short", "HEAD"), git("diff", "--quiet", "HEAD", "--", ":/")
    except OSError:
        return None
    return found.stdout.strip() + ("+" if changed.returncode == 1 else "")


def where_made(record: dict[str, Any]) -> str:
    """The last paragraph of a page: data copies, seed, machines, commits and time of the cells that are built."""
    made = [cell["made"] for cell in record["cells"] if "made" in cell]
    missing = sum("made" not in cell for cell in record["cells"])
    data = {name for cell in record["cells"] if (name := data_of(cell)) is not None}
    seconds = sum(entry["seconds"] for entry in made)

    def several(key: str) -> str:
        return ", ".join(sorted({str(entry[key]) for entry in made if entry[key] is not None})) or "unknown"

    parts = [
        f"preset {record['preset']}",
        f"data {', '.join(sorted(data))}" if data else "generated data",
        f"seed {record['seed']}",
        f"hardware {several('device')}, {several('threads')} thread(s) a cell",
        f"torch {several('torch')}",
        f"commit {several('commit')}",
        f"date {several('date')}",
        f"{len(made)} cells in {seconds / 60:.1f} min of cell time",
    ]
    if missing:
        parts.append(f"{missing} cells not run")
    return "Where it was made: " + "; ".join(parts) + "."


def data_of(cell: dict[str, Any]) -> str | None:
    """The data set of a cell: as its result names the copy, or as its settings do; ``None`` for generated data."""
    result, settings = cell.get("result") or {}, cell.get("settings") or {}
    name = result.get("dataset") or result.get("data") or settings.get("data")
    return name if isinstance(name, str) else None
