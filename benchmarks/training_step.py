"""How near a training step is to the raw convolution rate, in one run: ratios, not seconds.

Prints, with alternating repetitions and medians:

1. the training step (forward, backward, optimiser, projections) of a ``prescribed`` network of twice the paper's layers
   against its raw convolutions (and matrix products) alone: the same shapes, forward and backward, through autograd, in
   the same memory format;
2. a block of exact flows against the same block with S = 2 Euler steps;
3. the share of a training step that each orthogonal parametrisation takes in the ``certified`` network;
4. both shares for the network and batch of the preset ``certified/cpu-1h``, in float32 and, where the processor has
   it, in mixed bfloat16 (weights and optimiser in float32, as the training loop does it), and the ratio of the two;
5. what products with circulant matrices are worth in a network with a third stage of convolutions of 2 x 2 pixels.

Run: ``python benchmarks/training_step.py [--batch 128] [--repeats 7]``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.blocks import DynamicalBlock
from dynablocks.config import preset_settings
from dynablocks.fields import GradientField, leaky_relu
from dynablocks.linear import OrthogonalConv, shared_weights
from dynablocks.linear.circular import circular_pad
from dynablocks.models import ModelConfig, build
from dynablocks.switching import ExactFlowRegion, PrescribedSignal, TightRegion, keep_constraints, regularisation
from dynablocks.training import TrainingConfig, make_optimiser
from dynablocks.training.precision import supports_bf16

sys.path.insert(0, str(Path(__file__).parent))
from command_line import finish, require_counts, require_place, write_figures
from measuring import seconds_in_turns

IMAGE, CLASSES = (3, 32, 32), 10


def medians(actions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each action, the actions taken in turn."""
    return {name: statistics.median(values) for name, values in seconds_in_turns(actions, repeats).items()}


def training_step(
    network: nn.Module,
    pixels: Tensor,
    penalised: bool = True,
    dtype: torch.dtype = torch.float32,
    training: Mapping[str, Any] = {},
) -> Callable[[], None]:
    """One step as the training loop does it, the network in ``dtype``, with the optimiser that ``training`` names."""
    config = TrainingConfig(**{**training, "lr": 1e-4})
    optimiser = make_optimiser(network, config)
    keep_constraints(network, optimiser)

    def step() -> None:
        with shared_weights(network):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = network(pixels)
            loss = logits.float().square().mean()
            penalty = regularisation(network) if penalised else None
            if penalty is not None:
                loss = loss + penalty
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


Operation = Callable[[Tensor, Tensor], Tensor]


def heavy_operations(network: nn.Module, pixels: Tensor) -> list[tuple[torch.Size, torch.Size, Operation]]:
    """Every convolution and matrix product on images in one forward pass, as torch is asked for it: shapes and map.

    Weights are made before it, as in a training step: what is multiplied for their norms is no image.
    """
    calls: list[tuple[torch.Size, torch.Size, Operation]] = []
    convolve, multiply = functional.conv2d, functional.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0) -> Tensor:
        calls.append((x.shape, weight.shape, lambda x, kernel: convolve(x, kernel, None, stride, padding)))
        return convolve(x, weight, bias, stride, padding)

    def noted_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append((x.shape, weight.shape, multiply))
        return multiply(x, weight, bias)

    with (
        torch.no_grad(),
        shared_weights(network),
        patch.object(functional, "conv2d", lambda *given: noted(*given[:5])),
        patch.object(functional, "linear", noted_product),
    ):
        network(pixels)
    return calls


def raw_convolutions(network: nn.Module, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """The same convolutions and products and nothing else: forward, backward to input and kernel."""
    work = []
    for shape, kernel_shape, operation in heavy_operations(network, pixels):
        x, kernel = torch.randn(shape, dtype=dtype), torch.randn(kernel_shape, dtype=dtype)
        if x.ndim == 4:
            x = x.to(memory_format=torch.channels_last)
        work.append((x.requires_grad_(True), kernel.requires_grad_(True), operation))

    def step() -> None:
        for x, kernel, operation in work:
            y = operation(x, kernel)
            torch.autograd.grad(y, (x, kernel), y.detach())

    return step


def without_products(step: Callable[[], None]) -> Callable[[], None]:
    """The same step with a convolution of the continued image wherever the library multiplies by a circulant matrix."""

    def plain(kernel: Tensor, x: Tensor, before: int, bias: Tensor | None = None) -> Tensor:
        return functional.conv2d(circular_pad(x, before, kernel.shape[2] - 1 - before), kernel, bias)

    def patched() -> None:
        with patch("dynablocks.linear.convolution.circulant_product", plain):
            step()

    return patched


def orthogonal_weights(network: nn.Module) -> Callable[[], None]:
    """All weights of the network, forward and backward, and nothing else."""
    parameters = [p for p in network.parameters() if p.requires_grad]

    def step() -> None:
        with shared_weights(network):
            held = [m._held for m in network.modules() if getattr(m, "_held", None) is not None]
        torch.autograd.grad(held, parameters, [w.detach() for w in held], allow_unused=True)

    return step


def images(batch: int) -> Tensor:
    """Random pixels of the size of CIFAR's."""
    return torch.rand(batch, *IMAGE).to(memory_format=torch.channels_last)


def prescribed_step(batch: int, repeats: int) -> dict[str, float]:
    """The first figure of the list above."""
    network = build(ModelConfig("prescribed", layers=(4, 4, 4), lift="paper"), IMAGE, CLASSES, seed=0)
    pixels = images(batch)
    times = medians({"step": training_step(network, pixels), "raw": raw_convolutions(network, pixels)}, repeats)
    return {"raw convolutions / training step (prescribed, twice the paper's layers)": times["raw"] / times["step"]}


def exact_flows(batch: int, repeats: int) -> dict[str, float]:
    """The second figure."""
    shape, sigma = (64, 16, 16), leaky_relu(0.5)
    x = torch.randn(batch, *shape).to(memory_format=torch.channels_last)
    fields = [GradientField(OrthogonalConv(shape), sigma), GradientField(OrthogonalConv(shape), sigma, expansive=True)]
    exact = DynamicalBlock(fields, "exact", PrescribedSignal(ExactFlowRegion(0.5)))
    euler = DynamicalBlock(fields, "euler", PrescribedSignal(TightRegion(0.5, 2)))

    def both_ways(block: DynamicalBlock) -> Callable[[], None]:
        return lambda: block(x).square().mean().backward()

    times = medians({"exact": both_ways(exact), "euler": both_ways(euler)}, repeats)
    return {"exact flow / S = 2 Euler (64 channels, 16 x 16)": times["exact"] / times["euler"]}


def orthogonal_shares(batch: int, repeats: int) -> dict[str, float]:
    """The third figures."""
    figures, pixels = {}, images(batch)
    for method in ("cayley", "expm"):
        network = build(ModelConfig("certified", method=method), IMAGE, CLASSES, seed=0)
        actions = {"weights": orthogonal_weights(network), "step": training_step(network, pixels, False)}
        times = medians(actions, repeats)
        figures[f"orthogonal weights ({method}) / training step (certified)"] = times["weights"] / times["step"]
    return figures


def preset_actions(formats: Sequence[torch.dtype]) -> dict[str, Callable[[], object]]:
    """What the fourth and fifth figures time: the preset's network and one with a third stage, in each format."""
    settings = preset_settings("certified/cpu-1h", "certified", "cifar10")
    three_stages = settings["model"] | {"layers": (4, 4, 3), "dense_layers": 0}
    headline, convolutions = (
        build(ModelConfig("certified", **chosen), IMAGE, CLASSES, seed=0).to(memory_format=torch.channels_last)
        for chosen in (settings["model"], three_stages)
    )
    pixels = images(settings["training"]["batch_size"])
    actions: dict[str, Callable[[], object]] = {"weights": orthogonal_weights(headline)}
    for dtype in formats:
        circulant = training_step(convolutions, pixels, False, dtype, settings["training"])
        actions[f"step {dtype}"] = training_step(headline, pixels, False, dtype, settings["training"])
        actions[f"raw {dtype}"] = raw_convolutions(headline, pixels, dtype)
        actions[f"circulant {dtype}"] = circulant
        actions[f"plain {dtype}"] = without_products(circulant)
    return actions


def preset_shares(repeats: int) -> dict[str, float]:
    """The fourth and fifth figures."""
    figures = {}
    formats = [torch.float32] + [torch.bfloat16] * supports_bf16(torch.device("cpu"))
    times = medians(preset_actions(formats), repeats)
    for dtype in formats:
        arithmetic, step = str(dtype).removeprefix("torch."), times[f"step {dtype}"]
        name = f"certified/cpu-1h, {arithmetic}"
        figures[f"raw convolutions / training step ({name})"] = times[f"raw {dtype}"] / step
        figures[f"orthogonal weights / training step ({name})"] = times["weights"] / step
        ratio = times[f"circulant {dtype}"] / times[f"plain {dtype}"]
        figures[f"circulant matrices / convolutions in a third stage, training step ({arithmetic})"] = ratio
    if len(formats) > 1:
        name = "training step, bfloat16 / float32 (certified/cpu-1h)"
        figures[name] = times[f"step {formats[1]}"] / times[f"step {formats[0]}"]
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    require_counts(options, batch=1, repeats=1)
    require_place(options.json)
    return options


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    figures = prescribed_step(options.batch, options.repeats)
    figures |= exact_flows(options.batch, options.repeats)
    figures |= orthogonal_shares(options.batch, options.repeats)
    figures |= preset_shares(options.repeats)
    for name, value in figures.items():
        print(f"{value:6.3f}  {name}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    finish(main)
