"""The same additive block, reversibly: this library beside memcnn and revlib, and ordinary backpropagation.

A block is (q, p) ↦ (q + u(p), p + v(q + u(p))) with u, v = Linear–tanh–Linear on 64 entries each; all chains have
the same weights, and their outputs and gradients are compared first. memcnn is ``InvertibleModuleWrapper`` of its
``AdditiveCoupling``, revlib its ``ReversibleSequential`` with the default memory mode.

- Time: a forward and backward pass of each in turns in one process; the median of the seconds, and of the ratios to
  the ordinary pass of the same round.
- Memory: the peak of the resident memory during a pass, less what was resident before it, each in a process of its
  own; tensors come from mmap, so that the heap's fragmentation is not measured.

A peer that cannot be imported is left out: ``pip install memcnn revlib``.

Run: ``python benchmarks/reversible_peers.py [--depth 50] [--batch 4096] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.fields import ShearField
from dynablocks.reversible import ReversibleChain
from dynablocks.switching import FreeSignal

sys.path.insert(0, str(Path(__file__).parent))
from command_line import finish, require_counts, require_place, write_figures
from measuring import in_fresh_process, peak_above_start, seconds_in_turns

HALF = 64
Map = Callable[[Tensor], Tensor]


def forces(depth: int) -> list[nn.Module]:
    """u and v of every block in turn."""
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(HALF, HALF), nn.Tanh(), nn.Linear(HALF, HALF)) for _ in range(2 * depth)]
    for force in made:
        nn.init.normal_(force[2].weight, std=0.1 / HALF**0.5)
    return made


def ours(parts: list[nn.Module]) -> ReversibleChain:
    """Each coupling is the exact flow, for time one, of a shear."""
    return ReversibleChain(
        DynamicalBlock(ShearField(force, (2 * HALF,), moves="qp"[k % 2]), "exact", FreeSignal(1.0))
        for k, force in enumerate(parts)
    )


def memcnn_chain(parts: list[nn.Module]) -> Map:
    import memcnn

    couplings = [memcnn.AdditiveCoupling(Fm=u, Gm=v, split_dim=1) for u, v in zip(parts[::2], parts[1::2], strict=True)]
    # Without a copy of its own the first wrapper would free the input.
    chain = nn.Sequential(*(memcnn.InvertibleModuleWrapper(fn=coupling, keep_input=False) for coupling in couplings))
    return lambda x: chain(x.clone())


def revlib_chain(parts: list[nn.Module]) -> Map:
    import revlib

    return revlib.ReversibleSequential(*parts, split_dim=1)


def ways(parts: list[nn.Module]) -> dict[str, Map]:
    """Every chain that can be built here, of the same forces."""
    chain = ours(parts)
    found: dict[str, Map] = {"ordinary": chain.ordinary, "dynablocks": chain}
    for name, make in {"memcnn": memcnn_chain, "revlib": revlib_chain}.items():
        if importlib.util.find_spec(name):
            found[name] = make(parts)
    return found


def one_pass(function: Map, x: Tensor) -> Tensor:
    """Forward and backward; the output."""
    output = function(x)
    output.square().mean().backward()
    return output


def differences(depth: int) -> dict[str, float]:
    """Of outputs and of the gradients of every parameter from the ordinary ones: the largest entry, in float64."""
    parts = [force.double() for force in forces(depth)]
    x = torch.randn(16, 2 * HALF, dtype=torch.float64)
    found = {}
    for name, function in ways(parts).items():
        for force in parts:
            force.zero_grad()
        output = one_pass(function, x.clone().requires_grad_(True)).detach()
        found[name] = [output, *(p.grad.clone() for force in parts for p in force.parameters() if p.grad is not None)]
    expected = found["ordinary"]
    return {
        name: max(float((f - e).abs().max()) for f, e in zip(tensors, expected, strict=True))
        if len(tensors) == len(expected)
        else float("inf")
        for name, tensors in found.items()
    }


def times(depth: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each pass, on a copy of the input, the ways in turns."""
    chains, x = ways(forces(depth)), torch.randn(batch, 2 * HALF)

    def passing(function: Map) -> Callable[[], Tensor]:
        return lambda: one_pass(function, x.clone().requires_grad_(True))

    return seconds_in_turns({name: passing(function) for name, function in chains.items()}, rounds)


def measure_memory(name: str, depth: int, batch: int) -> int:
    """Bytes of the peak above the start; call it in a fresh process."""
    torch.set_num_threads(1)
    function = ways(forces(depth))[name]
    one_pass(function, torch.randn(2, 2 * HALF, requires_grad=True))
    x = torch.randn(batch, 2 * HALF, requires_grad=True)
    return peak_above_start(partial(one_pass, function, x))


def memory(name: str, depth: int, batch: int) -> int:
    """:func:`measure_memory` in a process of its own."""
    return int(in_fresh_process(__file__, "--measure", name, "--depth", depth, "--batch", batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=50, help="blocks of two couplings, at least 5")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure_memory(options.measure, options.depth, options.batch))
        return
    require_counts(options, depth=5, batch=1, rounds=1)
    require_place(options.json)
    torch.set_num_threads(1)
    wrong, seconds = differences(options.depth), times(options.depth, options.batch, options.rounds)
    figures = {}
    print(f"{options.depth} blocks, batch {options.batch}, {2 * HALF} entries")
    print("way            seconds  / ordinary   peak MB (depth/5, depth)   difference, float64")
    for name, measured in seconds.items():
        ratio = statistics.median(m / o for m, o in zip(measured, seconds["ordinary"], strict=True))
        shallow, deep = (memory(name, depth, options.batch) / 1e6 for depth in (options.depth // 5, options.depth))
        row = {"seconds": statistics.median(measured), "ratio": ratio, "shallow": shallow, "deep": deep}
        figures[name] = row | {"difference": wrong[name]}
        print(f"{name:12s} {row['seconds']:9.3f} {ratio:11.2f} {shallow:14.1f} {deep:10.1f} {wrong[name]:21.1e}")
    for name in ("memcnn", "revlib"):
        if name not in seconds:
            print(f"{name} is not installed and left out.")
    write_figures(options.json, figures)


if __name__ == "__main__":
    finish(main)
