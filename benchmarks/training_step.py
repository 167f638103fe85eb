"""How near a training step is to the raw convolution rate, in one run: ratios, not seconds.

Prints, with alternating repetitions and medians:

1. the training step (forward, backward, optimiser, projections) of the paper-size ``prescribed`` network against its
raw
   convolutions alone: the same shapes, forward and backward, through autograd, in the same memory format;
2. a block of exact flows against the same block with S = 2 Euler steps;
3. the share of a training step that each orthogonal parametrisation takes in the ``certified`` network.

Run: ``python benchmarks/training_step.py [--batch 128] [--repeats 7]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.blocks import DynamicalBlock
from dynablocks.fields import GradientField, leaky_relu
from dynablocks.linear import Conv, OrthogonalConv, shared_weights
from dynablocks.models import ModelConfig, build
from dynablocks.switching import ExactFlowRegion, PrescribedSignal, TightRegion, keep_constraints, regularisation


def medians(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each action, the actions taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(repeats):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def training_step(network: nn.Module, pixels: Tensor, penalised: bool = True) -> Callable[[], None]:
    """One step as the training loop does it."""
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    keep_constraints(network, optimiser)

    def step() -> None:
        with shared_weights(network):
            loss = network(pixels).square().mean()
            penalty = regularisation(network) if penalised else None
            if penalty is not None:
                loss = loss + penalty
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def convolution_calls(network: nn.Module, pixels: Tensor) -> list[tuple[tuple[int, ...], Conv]]:
    """Every product with a convolution or its adjoint in one forward pass: (input shape, map)."""
    calls: list[tuple[tuple[int, ...], Conv]] = []
    maps = [m for m in network.modules() if isinstance(m, Conv)]
    for linear in maps:

        def noted(weight: Tensor, x: Tensor, bias: Tensor | None, linear: Conv = linear) -> Tensor:
            calls.append((tuple(x.shape), linear))
            return Conv._convolve(linear, weight, x, bias)

        def noted_adjoint(weight: Tensor, y: Tensor, linear: Conv = linear) -> Tensor:
            calls.append((tuple(y.shape), linear))
            return Conv.multiply_adjoint(linear, weight, y)

        linear._convolve, linear.multiply_adjoint = noted, noted_adjoint  # type: ignore[method-assign]
    with torch.no_grad():
        network(pixels)
    for linear in maps:
        del linear._convolve, linear.multiply_adjoint
    return calls


def raw_convolutions(network: nn.Module, pixels: Tensor) -> Callable[[], None]:
    """The same convolutions and nothing else: forward, backward to input and kernel."""
    work = []
    for shape, linear in convolution_calls(network, pixels):
        forward = shape[1] == linear.in_shape[0]
        kernel = linear.weight.detach()
        kernel = kernel if forward else kernel.flip(2, 3).transpose(0, 1).contiguous()
        x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_(True)
        work.append((x, kernel.clone().requires_grad_(True), linear.zeros))

    def step() -> None:
        for x, kernel, padding in work:
            y = functional.conv2d(x, kernel, padding=padding)
            torch.autograd.grad(y, (x, kernel), y.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    torch.manual_seed(0)
    pixels = torch.rand(options.batch, 3, 32, 32).to(memory_format=torch.channels_last)
    figures: dict[str, float] = {}

    network = build(ModelConfig("prescribed", lift="paper"), (3, 32, 32), 10, seed=0)
    times = medians({"step": training_step(network, pixels), "raw": raw_convolutions(network, pixels)}, options.repeats)
    figures["raw convolutions / training step (paper-size prescribed)"] = times["raw"] / times["step"]

    shape, sigma = (64, 16, 16), leaky_relu(0.5)
    x = torch.randn(options.batch, *shape).to(memory_format=torch.channels_last)
    fields = [GradientField(OrthogonalConv(shape), sigma), GradientField(OrthogonalConv(shape), sigma, expansive=True)]
    exact = DynamicalBlock(fields, "exact", PrescribedSignal(ExactFlowRegion(0.5)))
    euler = DynamicalBlock(fields, "euler", PrescribedSignal(TightRegion(0.5, 2)))

    def both_ways(block: DynamicalBlock) -> Callable[[], None]:
        return lambda: block(x).square().mean().backward()

    times = medians({"exact": both_ways(exact), "euler": both_ways(euler)}, options.repeats)
    figures["exact flow / S = 2 Euler (64 channels, 16 x 16)"] = times["exact"] / times["euler"]

    for method in ("cayley", "expm"):
        certified = build(ModelConfig("certified", method=method), (3, 32, 32), 10, seed=0)

        def weights(network: nn.Module = certified) -> None:
            with shared_weights(network):
                held = [m._held for m in network.modules() if getattr(m, "_held", None) is not None]
            torch.stack([w.square().sum() for w in held]).sum().backward()

        times = medians({"weights": weights, "step": training_step(certified, pixels, False)}, options.repeats)
        figures[f"orthogonal weights ({method}) / training step (certified)"] = times["weights"] / times["step"]

    for name, value in figures.items():
        print(f"{value:6.3f}  {name}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
