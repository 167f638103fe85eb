"""What may be declared, and what torch's own layers declare, against measurements of these."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields import ShearField
from dynablocks.properties import (
    Declaration,
    Equivariant,
    Lipschitz,
    Positive,
    Properties,
    Structured,
    VolumePreserving,
    declare,
    verify,
)

POOLS: list[nn.Module] = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    nn.MaxPool2d(2, 2, dilation=2),
    nn.MaxPool2d(2, 1, padding=1, dilation=8),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, 2, ceil_mode=True),
    nn.AvgPool2d(2, padding=1),
    nn.AvgPool2d(2, padding=1, count_include_pad=False),
    nn.AvgPool2d(2, divisor_override=3),
    nn.AvgPool2d(2, divisor_override=-3),
]
LAYERS = [*POOLS, nn.ReLU(), nn.LeakyReLU(0.3), nn.LeakyReLU(-3.0), nn.Tanh(), nn.Flatten(), nn.Flatten(2)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_of_torch_declare_what_is_measured_of_them(layer: nn.Module) -> None:
    """Of the pixels around an image of 7 × 7 a window of two with a gap of eight meets nothing: it is −∞."""
    x = torch.randn(4, 2, 7, 7, dtype=torch.float64)
    asked = [Positive(), Equivariant(), *[VolumePreserving()] * (layer not in POOLS)]
    for stated in asked:
        measured = verify(layer, x, kinds=(), against=(stated,)).passed
        assert measured == (stated in declare(layer).properties), stated


def test_a_slope_that_is_no_number_keeps_no_sign() -> None:
    """At 0 the output is 0 · ∞."""
    assert declare(nn.LeakyReLU(math.inf)).properties.of(Positive) is None
    assert not verify(nn.LeakyReLU(math.inf), torch.ones(1, 2), kinds=(), against=(Positive(),)).passed


def test_a_constant_has_no_tolerance() -> None:
    """One of 1 to 0.5 may be 1.5, of which neither a composition nor a radius would know."""
    with pytest.raises(InvalidArgument, match=r"given to the tolerance 0\.5, .*; put it into the constant"):
        Lipschitz(1.0, tolerance=0.5)
    for tolerance in (1e-3, -1e-3, math.nan):
        with pytest.raises(InvalidArgument, match="put it into the constant"):
            Lipschitz(1.0).within(tolerance)
    assert Lipschitz(1.0).within(0.0) == Lipschitz(1.0)


class Leaning(Structured):
    """It is odd but for a shift."""

    in_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3

    def declare(self) -> Declaration:
        return Declaration.of(Equivariant(tolerance=2e-3), reason="a small shift")


def test_a_symmetry_to_a_tolerance_makes_nothing_odd() -> None:
    assert Properties([Equivariant()]).odd
    assert not Leaning().properties.odd
    assert not ShearField(Leaning()).facts().odd
