"""What :func:`dynablocks.memory.keep_freed_memory` is worth: a training step with and without it, in alternating
processes.

Run: ``python benchmarks/allocator.py [--batch 256] [--rounds 3]``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

STEP = """
import sys, time, torch
from dynablocks.memory import keep_freed_memory
from dynablocks.models import ModelConfig, build
if sys.argv[1] == "keep":
    assert keep_freed_memory()
network = build(ModelConfig("certified"), (3, 32, 32), 10, seed=0)
pixels = torch.rand(int(sys.argv[2]), 3, 32, 32).to(memory_format=torch.channels_last)
times = []
for _ in range(5):
    started = time.perf_counter()
    network(pixels).square().sum().backward()
    times.append(time.perf_counter() - started)
print(min(times[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ratios = []
    for _ in range(options.rounds):
        seconds = {}
        for mode in ("default", "keep"):
            command = [sys.executable, "-c", STEP, mode, str(options.batch)]
            seconds[mode] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratios.append(seconds["default"] / seconds["keep"])
        print(f"default {seconds['default']:.3f} s, kept {seconds['keep']:.3f} s: {ratios[-1]:.2f} times faster")
    print(f"median: {statistics.median(ratios):.2f} times faster")


if __name__ == "__main__":
    main()
