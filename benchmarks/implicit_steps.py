"""How much faster implicit steps differentiate by the implicit function theorem than by unrolled iterations.

Both take the same implicit midpoint steps of a Hamiltonian field with the same solver tolerance and the same loss:
"fixed-point" differentiates through z ← x + (h/2) X(z) until it is solved, "newton" through Newton's iterations with
their Jacobians and linear solves. Printed are the processor seconds of a forward and backward pass (the fastest of
some), the ratios, and the largest relative difference of a gradient with respect to x, h and the parameters.
Fixed-point iterations are few where hL is small, ever more where it grows, and without end beyond hL = 2.

Run: ``python benchmarks/implicit_steps.py [--batch 64] [--step-sizes 0.1 0.3 1.0] [--repeats 15] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dynablocks.fields import VectorField
from dynablocks.fields.hamiltonian import NeuralHamiltonian
from dynablocks.integrators.implicit import IMPLICIT_MIDPOINT, ImplicitRungeKutta

sys.path.insert(0, str(Path(__file__).parent))
from command_line import finish, require_counts, require_place, write_figures

TOLERANCE = 1e-13


def unrolled_fixed_point(field: VectorField, x: Tensor, h: Tensor) -> Tensor:
    """Implicit midpoint by fixed-point iterations that are all in the graph."""
    middle = x
    for _ in range(200):
        following = x + h / 2 * field(middle)
        change = float((following - middle).detach().abs().max())
        middle = following
        if change <= TOLERANCE * float(middle.detach().abs().max()):
            break
    return 2 * middle - x


def unrolled_newton(field: VectorField, x: Tensor, h: Tensor) -> Tensor:
    """Implicit midpoint by Newton iterations that are all in the graph, Jacobians and linear solves included."""
    middle = x
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: field(v[None])[0]))
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    for _ in range(50):
        gap = middle - x - h / 2 * field(middle)
        change = torch.linalg.solve(eye - h / 2 * jacobian(middle), gap.unsqueeze(2)).squeeze(2)
        middle = middle - change
        if float(change.detach().abs().max()) <= TOLERANCE * float(middle.detach().abs().max()):
            break
    return 2 * middle - x


Step = Callable[[VectorField, Tensor, Tensor], Tensor]


def measure(
    steps: dict[str, Step], field: VectorField, x: Tensor, h: Tensor, repeats: int
) -> tuple[dict[str, float], dict[str, tuple[Tensor, ...]]]:
    """Processor seconds of the fastest forward and backward pass of each, taken in turns, and the gradients."""
    sources = [x, h, *field.parameters()]
    best, gradients = dict.fromkeys(steps, float("inf")), {}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            gradients[name] = torch.autograd.grad(
                step(field, x, h).square().sum(), sources, allow_unused=True, materialize_grads=True
            )
            best[name] = min(best[name], time.process_time() - started)
    return best, gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--step-sizes", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    require_counts(options, batch=1, repeats=1)
    require_place(options.json)
    torch.set_num_threads(1)
    figures = {}
    method = ImplicitRungeKutta(IMPLICIT_MIDPOINT, TOLERANCE)
    for dimension, size in itertools.product((2, 4, 16), options.step_sizes):
        torch.manual_seed(0)
        field = NeuralHamiltonian(dimension, width=32).double()
        x = torch.randn(options.batch, dimension, dtype=torch.float64, requires_grad=True)
        h = torch.tensor(size, dtype=torch.float64, requires_grad=True)
        unrolled: dict[str, Step] = {"fixed-point": unrolled_fixed_point, "newton": unrolled_newton}
        best, gradients = measure({"implicit": method.step, **unrolled}, field, x, h, options.repeats)
        implicit = best["implicit"]
        for name in unrolled:
            seconds, pairs = best[name], zip(gradients[name], gradients["implicit"], strict=True)
            gap = max(float((a - b).abs().max()) / max(1.0, float(b.abs().max())) for a, b in pairs)
            ratio = seconds / implicit
            found = {"implicit": implicit, "unrolled": seconds, "ratio": ratio, "difference": gap}
            figures[f"{dimension} entries, h = {size:g}, {name}"] = found
            print(
                f"{dimension:2d} entries, h = {size:3g}: unrolled {name:11s} {1e3 * seconds:6.1f} ms, implicit"
                f" {1e3 * implicit:6.1f} ms, ratio {ratio:5.2f}, largest difference of a gradient {gap:.0e}"
            )
    ratios = [found["ratio"] for found in figures.values()]
    print(f"median ratio {statistics.median(ratios):.2f}, smallest {min(ratios):.2f}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    finish(main)
