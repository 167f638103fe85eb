"""Reversible backpropagation against depth: peak memory, gradients and step time beside ordinary backpropagation.

The block is a symplectic Euler step (two shears, an additive coupling) of a separable Hamiltonian field with tanh and
square matrices. A chain's loss is the mean square of its output.

- Memory (matrices 16 x 16, so that a batch of activations outweighs a thousand blocks' parameters): each figure from a
  process of its own: the peak of the resident memory during one forward and backward pass, less what was resident
  before it (interpreter, library, parameters, their ``.grad`` and the batch), after a warm-up on two samples. Beside
  it, the same less the size of the parameters once more, for the gradients that a pass returns before they are added
  to ``.grad``. The first, raw figure decides. Tensors come from mmap (``MALLOC_MMAP_THRESHOLD_``): by default glibc
  serves them from its heap, whose fragmentation adds up to a quarter at depth 1000.
- Gradients (64 x 64): largest difference from the ordinary ones at depth 1000 in float64, relative to each tensor's
  largest entry.
- Time (64 x 64): seconds of a forward and backward pass of both ways, in turns in one process; the median of the
  ratios.

Run: ``python benchmarks/reversible_depth.py [--batch 65536] [--depths 10 100 1000] [--json FILE]``. Exits with 1 when a
limit is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dynablocks.blocks import DynamicalBlock
from dynablocks.fields import GradientField, PartitionedField
from dynablocks.linear import Dense
from dynablocks.reversible import ReversibleChain
from dynablocks.switching import FreeSignal

sys.path.insert(0, str(Path(__file__).parent))
from command_line import finish, require_counts, require_place, write_figures
from measuring import in_fresh_process, peak_above_start, seconds_in_turns

HALF, MEMORY_HALF = 64, 16
MEMORY_LIMIT, GRADIENT_LIMIT, TIME_LIMIT = 1.15, 1e-10, 1.5


def chain_of(depth: int, half: int = HALF, step: float = 0.1) -> ReversibleChain:
    """``depth`` symplectic Euler steps, each of its own field."""
    torch.manual_seed(0)
    return ReversibleChain(
        DynamicalBlock(
            PartitionedField(
                GradientField(Dense(half, half), "tanh", expansive=True), GradientField(Dense(half, half), "tanh")
            ),
            "symplectic-euler",
            FreeSignal(step),
        )
        for _ in range(depth)
    )


def pass_of(chain: ReversibleChain, x: Tensor, way: str) -> None:
    """One forward and backward pass."""
    output = chain(x) if way == "reversible" else chain.ordinary(x)
    output.square().mean().backward()


def measure_memory(depth: int, way: str, batch: int) -> dict[str, float]:
    """Bytes above what was resident before the pass; call it in a fresh process."""
    torch.set_num_threads(1)
    chain = chain_of(depth, MEMORY_HALF)
    pass_of(chain, torch.randn(2, 2 * MEMORY_HALF), way)
    chain.zero_grad(set_to_none=False)
    x = torch.randn(batch, 2 * MEMORY_HALF, requires_grad=True)
    peak = peak_above_start(partial(pass_of, chain, x, way))
    return {"peak": peak, "parameters": sum(p.numel() * p.element_size() for p in chain.parameters())}


def memory(depth: int, way: str, batch: int) -> dict[str, float]:
    """:func:`measure_memory` in a process of its own."""
    found: dict[str, float] = in_fresh_process(__file__, "--measure", depth, way, "--batch", batch)
    return found


def gradient_difference(depth: int, batch: int = 32) -> float:
    """Largest difference of a gradient, relative to the largest entry of its tensor, in float64."""
    chain = chain_of(depth).double()
    x = torch.randn(batch, 2 * HALF, dtype=torch.float64, requires_grad=True)
    tensors = [x, *chain.parameters()]
    found = torch.autograd.grad(chain(x).square().mean(), tensors)
    expected = torch.autograd.grad(chain.ordinary(x).square().mean(), tensors)
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))


def step_times(depth: int, batch: int, rounds: int) -> tuple[float, float, float]:
    """Median seconds of both ways (reversible first) and the median of the ratios of neighbouring passes."""
    chain, x = chain_of(depth), torch.randn(batch, 2 * HALF, requires_grad=True)
    seconds = seconds_in_turns({way: partial(pass_of, chain, x, way) for way in ("reversible", "ordinary")}, rounds)
    ratios = [r / o for r, o in zip(seconds["reversible"], seconds["ordinary"], strict=True)]
    return statistics.median(seconds["reversible"]), statistics.median(seconds["ordinary"]), statistics.median(ratios)


def verdict(name: str, value: float, limit: float) -> bool:
    """Print a figure beside its limit."""
    met = value <= limit
    print(f"{'met' if met else 'MISSED':6s} {name}: {value:.3g} (limit {limit:g})")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=65536, help="samples, for memory")
    parser.add_argument("--depths", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--ordinary-depths", type=int, nargs="*", default=[10, 30], help="memory of the ordinary way")
    parser.add_argument("--time-depth", type=int, default=100)
    parser.add_argument("--time-batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_memory(int(options.measure[0]), options.measure[1], options.batch)))
        return 0
    require_counts(options, batch=1, time_depth=1, time_batch=1, rounds=1)
    require_place(options.json)
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    print("way         depth  peak above the start  less returned gradients")
    runs = [("reversible", d) for d in options.depths] + [("ordinary", d) for d in options.ordinary_depths]
    for way, depth in runs:
        found = memory(depth, way, options.batch)
        figures[f"{way} {depth}"] = found["peak"]
        less = found["peak"] - found["parameters"]
        print(f"{way:10s} {depth:6d} {found['peak'] / 1e6:17.1f} MB {less / 1e6:17.1f} MB")
    deepest, first = max(options.depths), min(options.depths)
    figures["memory ratio"] = figures[f"reversible {deepest}"] / figures[f"reversible {first}"]
    figures["gradient difference"] = gradient_difference(deepest)
    reversible, ordinary, figures["time ratio"] = step_times(options.time_depth, options.time_batch, options.rounds)
    print(f"step of depth {options.time_depth}: reversible {reversible:.3f} s, ordinary {ordinary:.3f} s")
    met = [
        verdict(f"memory, depth {deepest} / depth {first}", figures["memory ratio"], MEMORY_LIMIT),
        verdict(f"gradients at depth {deepest}, float64", figures["gradient difference"], GRADIENT_LIMIT),
        verdict("step time / ordinary", figures["time ratio"], TIME_LIMIT),
    ]
    write_figures(options.json, figures)
    return 0 if all(met) else 1


if __name__ == "__main__":
    finish(main)
