"""Linear maps of norm 1: a free weight divided by its norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.linear.convolution import Conv
from dynablocks.linear.dense import Dense
from dynablocks.linear.maps import TINY, LinearMap, own_precision
from dynablocks.numerics.bounds import Bounds, conv_norm_bounds, linear_norm_bounds

if TYPE_CHECKING:
    from jaxtyping import Float


GRADIENT_STEPS = 30
"""Steps of power iteration where the stored vector stays as it is: for a gradient in evaluation, and in transforms."""

ROUNDINGS_OF_ONE = 16
"""So many eps of its number format may rounding move the norm of a vector that was divided by its norm."""


class UnitNorm(LinearMap):
    r"""A = K/‖K‖ for a free K: the step x ↦ x − hAᵀσ(Ax + b) does not expand for 0 <= h <= 2, whatever K is.

    Unlike orthogonal rows, A may treat directions differently: those of small singular values stay as they are.

    In training mode ‖K‖ is power iteration, one more step at each use with gradients, from the leading vector of the
    last: a lower bound that stays close as long as K moves slowly. In evaluation mode it is a sound upper bound in
    float64, kept until K changes, so that ‖A‖ <= 1. Gradients are those of K/‖K‖ ("same" padding: with the norm of the
    padded torus taken for that of the map), as near as the leading vector is.

    Transforms of ``torch.func`` allow no writing, and all runs of an ensemble have one stored vector: training mode
    takes ``GRADIENT_STEPS`` steps from it there at each use, with gradients or without, and none is left for the next:
    where the largest singular values of K lie close together, ‖A‖ stays above 1.

    What is declared is a sound bound of the weight of the mode: a little above 1 in training. There the weight is
    another at the next use with gradients, divided by ‖Kv‖ for a v that is further on. For the same K that norm
    does not fall (‖Kv‖² is a Rayleigh quotient of KᵀK), so the weight shrinks, by the factor ‖A‖ at most: bounds of its
    singular values from both sides hold for all uses that follow, but for rounding in the number format of K.

    Raises:
        InvalidArgument: a use in evaluation mode under ``vmap`` over K, for which no sound bound is computed.

    Source: Meunier et al. (2022), "A dynamical system perspective for Lipschitz neural networks" (convex potential
        layers), with a sound norm in place of their hundred iterations.
    """

    leading: Tensor
    _held_norm: tuple[Tensor, float] | None = None

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
            self.leading.copy_(self.power_step(self.free_weight(), self.leading))

    def _norm(self, weight: Tensor) -> float:
        """The upper bound of ‖K‖ of evaluation."""
        if torch._C._are_functorch_transforms_active() and _is_batched(weight):
            raise InvalidArgument(
                f"a {type(self).__name__} in evaluation mode divides by a proven bound of its norm, which is not known "
                "of weights under vmap; evaluate the networks one by one, or leave them in training mode."
            )
        now, kept = weight.detach(), self._held_norm
        if kept is None or (kept[0].dtype, kept[0].device) != (now.dtype, now.device) or not torch.equal(kept[0], now):
            kept = self._held_norm = now.clone(), self.free_norm_bounds().upper
        return kept[1]

    def compute_weight(self) -> Tensor:
        """K/‖K‖."""
        weight = self.free_weight()
        learning = torch.is_grad_enabled()
        with own_precision(weight):
            if not self.training:
                unit = weight / max(self._norm(weight), TINY)
                # Its own norm gives the slope, and the value 1: that of K may be beyond the number format.
                return unit / self._relative_length(unit) if learning and weight.requires_grad else unit
            vector, transformed = self.leading, torch._C._are_functorch_transforms_active()
            steps = GRADIENT_STEPS if transformed else int(learning)
            for _ in range(steps):
                vector = self.power_step(weight, vector)
            length = self.multiply(weight, vector).norm()
            if not steps:
                # A step leaves ‖v‖ = 1 but for rounding; the stored vector may have been scaled since.
                size = vector.norm()
                is_unit = (size - 1).abs() <= ROUNDINGS_OF_ONE * torch.finfo(size.dtype).eps
                length = torch.where(is_unit, length, length / size.clamp_min(TINY))
            # The stored vector is a copy: the graph needs this one as it is, and functorch allows no writing.
            if learning and not transformed:
                self.leading.copy_(vector)
                if self._held_norm is not None:
                    self._held_norm = None  # it holds a copy of a K that training moves away from
            return weight / length.clamp_min(TINY)

    def _relative_length(self, weight: Tensor) -> Tensor:
        """‖Wv‖ over itself for the leading vector v of W: 1, with the slope of log ‖W‖."""
        vector = self.leading
        for _ in range(GRADIENT_STEPS):
            vector = self.power_step(weight, vector)
        length = self.multiply(weight, vector).norm().clamp_min(TINY)
        return length / length.detach()

    def compute_smallest_singular_value(self) -> float:
        if not self.training:
            return super().compute_smallest_singular_value()
        # The norm first: where no weight is held and gradients are on, each of the two is of a weight of its own.
        largest = self.norm_bounds().upper
        return super().compute_smallest_singular_value() / max(1.0, largest)


def _is_batched(value: Tensor) -> bool:
    """Whether ``vmap`` runs over the tensor, itself or behind other transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        if torch._C._functorch.is_batchedtensor(value):
            return True
        value = torch._C._functorch.get_unwrapped(value)
    return False


class UnitConv(UnitNorm, Conv):
    r"""A convolution divided by its norm; see :class:`UnitNorm` and :class:`Conv`.

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
    r"""A matrix divided by its norm; see :class:`UnitNorm`.

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
