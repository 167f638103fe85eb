"""Exact flows at the price of one Euler step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.fields import RidgeField, VectorField
from dynablocks.integrators.base import INTEGRATORS, Integrator, StepSize
from dynablocks.properties import Declaration, Invertible, Lipschitz


@INTEGRATORS.register("exact")
class ExactFlow(Integrator):
    r"""The exact flow of s Aᵀ diag(α) Σ(Ax + b) for AAᵀ = I and σ(u) = max(u, au).

    u = Ax + b obeys u̇ = sαΣ(u) elementwise, so Φ_t(x) = x + Aᵀ(φ_t(u) − u) with φ_t(u) = u e^{sαt} (u >= 0), u
    e^{sαat} (u < 0).
    The inverse is the flow for −t; log det = Σ over units of sαt or sαat. Square orthogonal A: L = e^{−at}
    (contractive),
    e^t (expansive); the declared constant uses the measured singular values of A, so it holds for the A that is stored.

    Source: design D2.4.

    Example:
        >>> from dynablocks.linear import OrthogonalDense
        >>> from dynablocks.fields import GradientField, leaky_relu
        >>> field = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)).double()
        >>> flow, x = ExactFlow(), torch.randn(2, 3, dtype=torch.float64)
        >>> bool(torch.allclose(flow.inverse(field, flow.step(field, x, 1.0), 1.0), x))
        True
    """

    order = None
    preserves = ("linear invariants", "odd symmetry", "invertibility")

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        ridge = self._ridge(field)
        return ridge.ridge_step(x, lambda u: ridge.sigma.flow(u, self._times(ridge, step_size, u)) - u)

    def inverse(self, field: VectorField, y: Tensor, step_size: StepSize) -> Tensor:
        return self.step(field, y, -step_size)

    def log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        ridge = self._ridge(field)
        u = ridge.preactivation(x)
        times = self._times(ridge, step_size, u)
        slope = ridge.sigma.negative_slope or 0.0
        return torch.where(u >= 0, times, slope * times).flatten(1).sum(1)

    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        ridge = self._ridge(field)
        # e^700 is near the largest float; beyond it the declared constant is infinite.
        exponents = [step_size * slope for slope in ridge.slope_range()]
        ends = [math.expm1(e) if e < 700 else math.inf for e in exponents]
        low, high = ridge.update_spectrum(min(ends), max(ends))
        constant = math.nextafter(max(abs(1 + low), abs(1 + high)), math.inf)
        reason = f"exact flow, symmetric Jacobian with eigenvalues in [{1 + low:.6g}, {1 + high:.6g}]"
        # Beyond e^±300 a flow and its inverse leave the range of floats.
        inverse = (Invertible(),) if max(map(abs, exponents)) < 300 else ()
        kept = (Lipschitz(constant, field.facts().metric), *inverse, *self.inherited(field.facts()))
        return Declaration.of(*kept, reason=reason, title=f"ExactFlow(t={step_size:.5g})")

    @staticmethod
    def _ridge(field: VectorField) -> RidgeField:
        if not isinstance(field, RidgeField) or not field.linear.rows_orthonormal:
            raise InvalidArgument(
                "the exact flow needs a gradient field whose A has orthonormal rows (AAᵀ = I): an OrthogonalDense with "
                "out <= in or an OrthogonalConv with circular padding."
            )
        if field.sigma.negative_slope is None:
            raise InvalidArgument(f"the exact flow needs relu or leaky-relu; got {field.sigma.name}.")
        return field

    @staticmethod
    def _times(field: RidgeField, step_size: StepSize, u: Tensor) -> Tensor:
        scales = field.slope_scales()
        if scales is None:
            return torch.as_tensor(field.sign * step_size, dtype=u.dtype, device=u.device)
        return field.per_channel(scales) * step_size
