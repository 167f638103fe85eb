"""Is a region what it says it is? What it allows must not expand, in its own formula and in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dynablocks.blocks import DynamicalBlock
from dynablocks.fields import GradientField, leaky_relu
from dynablocks.linear import OrthogonalDense
from dynablocks.properties import jacobians
from dynablocks.properties.jacobians import with_gradients
from dynablocks.switching import PrescribedSignal, Region
from dynablocks.switching.regions import require_region
from dynablocks.testing.report import ConformanceReport, run_checks

GRID, DRAWN, DRAWN_FOR_BLOCKS = 5, 16, 3
"""How many h₁ are on the grid, and drawn between its points: for formulas, and for blocks."""

FEATURES = 3
SAMPLES = 64
ROUNDING, ROUNDING_OF_BLOCKS = 1e-12, 1e-9
"""What a formula may exceed 1 by, and, relative, a block its formula: each of its steps has a constant rounded up."""

SHIFT, ROUNDING_OF_SLOPES = 1e-5, 1e-6
"""For differences in h₂, and what they and a gradient may differ by, relative to 1 and the slope."""

Pair = tuple[float, float]


@with_gradients
def check_region(region: Region, *, seed: int = 0) -> ConformanceReport:
    r"""Whether the pairs of steps that a region allows make no block expand.

    For h₁ on a grid of its range and drawn from it, and h₂ the least, 0 and the greatest beside it:

    - "limit": the range and every limit(h₁) are finite, and the region is not empty;
    - "projection": ``project`` leaves pairs of the region alone and brings others, around the grid, into it;
    - "pair constant": L(h₁, h₂) <= 1 for L = ``pair_constant``;
    - "pair constant of tensors": of float64 tensors ``pair_constant`` and ``log_constant`` are tensors, as the penalty
      needs them, and the same numbers, also for an h₂ above the limit, where they have their gradient in h₂;
    - "declared constant", "measured constant": that of a block of the S pairs is at most L(h₁, h₂)^S and at most the
      exponential of ``log_constant``, also for an h₂ above the limit: there budgets and penalties read what a pair
      costs. Its steps are those of ``region.method`` for gradient fields with one orthogonal A; the slopes of σ reach
      from a to 1, in a second block those of the expansive field from 0. Measured is the largest norm of dense
      Jacobians, which for such blocks comes up to a bound that is tight.

    Args:
        region: any region; one of each a and S that is to be used.
        seed: of A, of the states and of the h₁ beside the grid.

    Returns:
        The report; ``check_region(region).require()`` raises on the first failure.

    Raises:
        InvalidArgument: ``region`` is none, but a name or a class, say.

    Example:
        >>> from dynablocks.switching import ExactFlowRegion
        >>> print(check_region(ExactFlowRegion(0.5)))
        ExactFlowRegion
          ok    limit
          ok    projection
          ok    pair constant
          ok    pair constant of tensors
          ok    declared constant
          ok    measured constant
    """
    return run_checks(type(require_region(region)).__name__, CHECKS, region, seed, most=1)


def _contractive_steps(region: Region, drawn: int = DRAWN) -> list[float]:
    """Those of a grid with both ends, and others between: a limit can be right at every point of a grid."""
    low, high = region.first_range
    between = low + (high - low) * torch.rand(drawn, dtype=torch.float64)
    return sorted({*np.linspace(low, high, GRID).tolist(), *between.tolist()})


def _allowed(region: Region, drawn: int = DRAWN) -> list[Pair]:
    """Pairs of the region with the least, no and the greatest expansion."""
    pairs = {
        (first, second): None
        for first in _contractive_steps(region, drawn)
        for second in (region.second_low, 0.0, region.limit(first))
    }
    return [pair for pair in pairs if region.contains(*pair)]


def _beyond(region: Region, drawn: int = DRAWN) -> list[Pair]:
    """Pairs above the limit, where a budget and a penalty read the constants."""
    return [(first, max(region.limit(first), 0.0) + 1) for first in _contractive_steps(region, drawn)]


def _limit(region: Region) -> Iterator[str]:
    low, high = region.first_range
    if not -math.inf < low <= high < math.inf:
        yield f"first_range is ({low}, {high}); two finite numbers in order are needed"
        return
    for first in _contractive_steps(region):
        if not math.isfinite(region.limit(first)):
            yield f"limit({first:.4g}) is {region.limit(first)}; a finite number is needed"
    if not _allowed(region):
        yield f"no pair of a grid lies in it: h₂ is to be from second_low = {region.second_low:.4g} to limit(h₁)"


def _projection(region: Region) -> Iterator[str]:
    low, high = region.first_range
    for first in (low - 1, *_contractive_steps(region), high + 1):
        limit = region.limit(min(max(first, low), high))
        for second in (region.second_low - 1, region.second_low, 0.0, limit, limit + 1):
            landed = region.project(first, second)
            if not region.contains(*landed):
                yield f"project({first:.4g}, {second:.4g}) is {landed}, which lies outside"
            elif region.contains(first, second) and landed != (first, second):
                yield f"project moves ({first:.4g}, {second:.4g}), which lies inside, to {landed}"
            elif region.project(*landed) != landed:
                yield f"project moves {landed}, which it gave itself, to {region.project(*landed)}"


def _pair_constant(region: Region) -> Iterator[str]:
    for first, second in _allowed(region):
        constant = region.pair_constant(first, second)
        if not constant <= 1 + ROUNDING:
            yield f"pair_constant({first:.4g}, {second:.4g}) is {constant:.6g}; in the region at most 1 is allowed"


def _pair_constant_of_tensors(region: Region) -> Iterator[str]:
    for first, second in (*_allowed(region), *_beyond(region)):
        steps = torch.tensor([first, second], dtype=torch.float64).unbind()
        for name, expected, found in (
            ("pair_constant", region.pair_constant(first, second), region.pair_constant(*steps)),
            ("log_constant", region.log_constant(first, second), region.log_constant(*steps)),
        ):
            if not isinstance(found, Tensor):
                yield f"{name} of float64 tensors is a {type(found).__name__}; a tensor is needed, for its gradient"
            elif not abs(float(found) - expected) <= ROUNDING * (1 + abs(expected)):
                yield f"{name}({first:.4g}, {second:.4g}) is {expected} of floats and {float(found)} of tensors"
    for first, second in _beyond(region):
        for name, constant in (("pair_constant", region.pair_constant), ("log_constant", region.log_constant)):
            expected = (constant(first, second + SHIFT) - constant(first, second - SHIFT)) / (2 * SHIFT)
            given = torch.tensor([first, second], dtype=torch.float64, requires_grad=True)
            found = constant(*given.unbind())
            differentiable = isinstance(found, Tensor) and found.requires_grad
            slope = torch.autograd.grad(found, given)[0][1].item() if differentiable else 0.0
            if not abs(slope - expected) <= ROUNDING_OF_SLOPES * (1 + abs(expected)):
                yield (
                    f"the gradient of {name}({first:.4g}, {second:.4g}) in h₂ is {slope:.6g} of tensors, and its "
                    f"differences show {expected:.6g}"
                )


def _blocks(region: Region) -> Iterator[tuple[DynamicalBlock, PrescribedSignal]]:
    """Blocks that come up to a tight bound: with one orthogonal A the entries of Ax do not mix."""
    for slope in dict.fromkeys((region.slope, 0.0)):
        linear, signal = OrthogonalDense(FEATURES, FEATURES), PrescribedSignal(region)
        contractive = GradientField(linear, leaky_relu(region.slope), bias=False)
        expansive = GradientField(linear, leaky_relu(slope), expansive=True)
        assert expansive.bias is not None
        with torch.no_grad():
            # An entry that the first field leaves on one side of its kink can be on either side of the second one's.
            expansive.bias.copy_(torch.linspace(-1, 1, FEATURES))
        yield DynamicalBlock([contractive, expansive], region.method, signal).double(), signal


def _constants(region: Region, constant: Callable[[DynamicalBlock], float]) -> Iterator[str]:
    for block, signal in _blocks(region):
        for first, second in (*_allowed(region, DRAWN_FOR_BLOCKS), *_beyond(region, DRAWN_FOR_BLOCKS)):
            with torch.no_grad():
                signal.steps.copy_(torch.tensor([first, second], dtype=torch.float64))
            found, by_pair = constant(block), region.pair_constant(first, second) ** region.substeps
            by_logarithm = math.exp(region.log_constant(first, second))
            for name, stated in (("pair_constant", by_pair), ("log_constant", by_logarithm)):
                if not found <= stated * (1 + ROUNDING_OF_BLOCKS):
                    yield (
                        f"that of a block of {region.method} steps h₁ = {first:.4g}, h₂ = {second:.4g} is "
                        f"{found:.9g}; by {name} it is at most {stated:.9g}"
                    )


def _declared_constant(region: Region) -> Iterator[str]:
    return _constants(region, lambda block: block.properties.lipschitz)


def _measured_constant(region: Region) -> Iterator[str]:
    x = 2 * torch.randn(SAMPLES, FEATURES, dtype=torch.float64)
    return _constants(region, lambda block: float(torch.linalg.matrix_norm(jacobians(block, x), ord=2).max()))


CHECKS: dict[str, Callable[[Region], Iterator[str]]] = {
    "limit": _limit,
    "projection": _projection,
    "pair constant": _pair_constant,
    "pair constant of tensors": _pair_constant_of_tensors,
    "declared constant": _declared_constant,
    "measured constant": _measured_constant,
}
