"""Linear maps of norm 1: a free weight divided by its norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynablocks.linear.bounds import Bounds, conv_norm_bounds, linear_norm_bounds
from dynablocks.linear.convolution import Conv
from dynablocks.linear.dense import Dense
from dynablocks.linear.maps import LinearMap

if TYPE_CHECKING:
    from jaxtyping import Float

TINY = 1e-30


class UnitNorm(LinearMap):
    r"""A = K/‖K‖ for a free K: x ↦ x − hAᵀσ(Ax + b) does not expand for 0 <= h <= 2, whatever K is.

    In training ‖K‖ is one step of power iteration a training step, from the last leading vector (a lower bound, whose
    error vanishes as K moves slowly); in evaluation it is a sound upper bound in float64, so that ‖A‖ <= 1. What is
    declared is always the bound of the weight in use.

    Source: Meunier et al. (2022), "A dynamical system perspective for Lipschitz neural networks" (convex potential
        layers), with a sound norm in place of their hundred iterations.
    """

    leading: Tensor

    def free_weight(self) -> Tensor:
        """K."""
        raise NotImplementedError

    def free_norm_bounds(self) -> Bounds:
        """Sound bounds of ‖K‖."""
        raise NotImplementedError

    def start_iteration(self, steps: int = 20) -> None:
        """Register the leading vector and bring it near."""
        self.register_buffer("leading", torch.randn(1, *self.in_shape))
        for _ in range(steps):
            self._iterate(self.free_weight())

    @torch.no_grad()
    def _iterate(self, weight: Tensor) -> None:
        image = self.multiply_adjoint(weight, self.multiply(weight, self.leading))
        length = image.norm()
        # A weight of zeros says nothing of directions; the next one needs a vector to start from.
        self.leading.copy_(torch.where(length > 0, image / length.clamp_min(TINY), self.leading))

    def compute_weight(self) -> Tensor:
        """K/‖K‖."""
        weight = self.free_weight()
        if self.training and torch.is_grad_enabled():
            self._iterate(weight)
            return weight / self.multiply(weight, self.leading).norm().clamp_min(TINY)
        return weight / max(self.free_norm_bounds().upper, TINY)


class UnitConv(UnitNorm, Conv):
    r"""A convolution divided by its norm.

    Example:
        >>> conv = UnitConv((2, 5, 5), 3, 3, "circular").eval()
        >>> 1 - 1e-5 < conv.norm_bounds().upper < 1 + 1e-5
        True
    """

    def make_parameters(self, in_channels: int, out_channels: int, gain: float) -> None:
        super().make_parameters(in_channels, out_channels, gain)
        self.start_iteration()

    def free_weight(self) -> Float[Tensor, "out in k k"]:
        return self.kernel

    def free_norm_bounds(self) -> Bounds:
        return conv_norm_bounds(self.kernel.detach(), self.geometry)


class UnitDense(UnitNorm, Dense):
    r"""A matrix divided by its norm.

    Example:
        >>> linear = UnitDense(4, 3).eval()
        >>> 1 - 1e-5 < linear.norm_bounds().upper < 1 + 1e-5
        True
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.start_iteration()

    def free_weight(self) -> Float[Tensor, "out in"]:
        return self.matrix

    def free_norm_bounds(self) -> Bounds:
        return linear_norm_bounds(self.matrix.detach())
