"""The explicit Euler method with S substeps."""

from __future__ import annotations

import itertools
import math
from typing import TypeGuard

from torch import Tensor

from dynablocks.errors import require_whole
from dynablocks.fields import RidgeField, VectorField
from dynablocks.fields.base import over_states
from dynablocks.integrators.base import INTEGRATORS, RUNGE_KUTTA_KEEPS, Integrator, StepSize
from dynablocks.numerics.rounding import EPS
from dynablocks.properties import GradientNormPreserving, Property


@INTEGRATORS.register("euler")
class ExplicitEuler(Integrator):
    r"""x ↦ x + (h/S) X(x), S times.

    For a ridge field with AAᵀ = I the S substeps are one elementwise recursion between one A and one Aᵀ (design
    D2.4). The Lipschitz constant is max |1 + hλ| over the Jacobian's spectrum where the Jacobian is symmetric (tight,
    design D2.2). With ReLU, AAᵀ = I and h = −2s, s the field's sign, the step is x ↦ (I − AᵀA)x − Aᵀ|Ax + b| − Aᵀb:
    −Aᵀ|Ax + b| up to a shift for square A, the identity on the kernel of a wide one. Its Jacobian is orthogonal almost
    everywhere (D2.5).

    Args:
        substeps: S >= 1.

    Example:
        >>> import torch
        >>> from dynablocks.linear import OrthogonalDense
        >>> from dynablocks.fields import GradientField
        >>> field = GradientField(OrthogonalDense(3, 3))
        >>> round(ExplicitEuler().declare(field, 2.0).properties.lipschitz, 5)
        1.0
    """

    order = 1
    keeps = RUNGE_KUTTA_KEEPS

    def __init__(self, substeps: int = 1) -> None:
        self.substeps = require_whole("substeps", substeps, 1)

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        h = step_size / self.substeps
        if _is_plain(field) and self.substeps == 1:
            return field.euler_step(x, h)
        if _is_plain(field) and field.linear.rows_orthonormal:
            return field.ridge_step(x, lambda u: self._recursion(field, u, h))
        h = over_states(h, x)
        for _ in range(self.substeps):
            x = x + h * field(x)
        return x

    def _recursion(self, field: RidgeField, u: Tensor, h: StepSize) -> Tensor:
        v, h = u, over_states(h, u)
        for _ in range(self.substeps):
            v = v + h * field.profile(v)
        return v - u

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        h = step_size / self.substeps
        if self.substeps == 1:
            return field.euler_constant(h, bound)
        ridge = field if _is_plain(field) and field.linear.rows_orthonormal else None
        if ridge is not None and bound == "tight":
            return self._elementwise_constant(ridge, h)
        once, reason = field.euler_constant(h, bound)
        constant = math.nextafter(math.prod([once] * self.substeps) * (1 + self.substeps * EPS), math.inf)
        if ridge is not None:
            # The recursion between one A and one Aᵀ is that power only as far as AAᵀ = I holds.
            constant = max(constant, self._elementwise_constant(ridge, h)[0])
        return constant, f"({reason})^{self.substeps}"

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        kept, losses = self.inherited(field, step_size)
        if not self._reflects(field, step_size):
            return kept, losses
        # J = I − 2AᵀDA, D of zeros and ones, has JJᵀ − I = 4AᵀD(AAᵀ − I)DA, of norm <= 4(1 + δ)δ for ‖AAᵀ − I‖ <= δ.
        tolerance = field.linear.isometry_tolerance(4.01)
        if tolerance is None:
            return kept, [*losses, f"GradientNormPreserving is lost: {field.linear.why_no_isometry()}"]
        return [GradientNormPreserving(tolerance=tolerance), *kept], losses

    def title(self, step_size: float) -> str:
        return f"Euler(h={step_size:.5g}, S={self.substeps})"

    def _elementwise_constant(self, field: RidgeField, h: float) -> tuple[float, str]:
        moves, ends = [h * slope for slope in field.slope_range()], []
        for some in itertools.combinations_with_replacement(moves, self.substeps):
            product = math.prod(1 + move for move in some)
            width = 4 * self.substeps * EPS * abs(product)  # moves, factors and products are rounded
            shrinks = all(-1 <= move <= 0 for move in some)
            # Beyond all numbers a product may be of either sign, and ∞ − ∞ is none.
            low, high = (product - width, product + width) if math.isfinite(product) else (-math.inf, math.inf)
            ends += [low, min(high, 1.0) if shrinks else high]
        low, high = field.update_spectrum(min(ends) - 1, max(ends) - 1)
        constant = math.nextafter(max(abs(1 + low), abs(1 + high)), math.inf)
        return constant, f"elementwise substeps, 1+λ in [{1 + low:.6g}, {1 + high:.6g}]"

    def _reflects(self, field: VectorField, step_size: float) -> TypeGuard[RidgeField]:
        return (
            self.substeps == 1
            and _is_plain(field)
            and field.slope_scales() is None
            and field.sigma.negative_slope == 0.0
            and field.linear.rows_orthonormal
            and step_size * field.sign == -2.0
        )

    def __repr__(self) -> str:
        return f"ExplicitEuler(substeps={self.substeps})"


def _is_plain(field: VectorField) -> TypeGuard[RidgeField]:
    """Whether a ridge field's step may be taken in u = Ax + b."""
    return isinstance(field, RidgeField) and field.is_plain
