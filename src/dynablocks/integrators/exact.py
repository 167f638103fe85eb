"""Exact flows, where a field has one in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynablocks.fields import VectorField
from dynablocks.fields.base import over_states
from dynablocks.integrators.base import APART, FLOW_PROPERTIES, INTEGRATORS, Integrator, StepSize
from dynablocks.properties import Invertible, Property
from dynablocks.properties.own_code import shadowed

UNKNOWN = (
    "Invertible is lost: no Lipschitz constant of the flow is known; give the facts of the field a lipschitz, or the "
    "field a flow_constant"
)
TOO_FAR = "Invertible is lost: the way back multiplies rounding by too much; take a shorter time or a smaller bias"

SHORT = 1e-9
"""A time after which every flow with a constant has a small one."""


@INTEGRATORS.register("exact")
class ExactFlow(Integrator):
    r"""The exact flow Φ_t of a field that has one in closed form; it keeps all that solutions keep.

    Gradient fields s Aᵀ diag(α) Σ(Ax + b) with AAᵀ = I and σ(u) = max(u, au): u = Ax + b obeys u̇ = sαΣ(u) elementwise,
    so Φ_t(x) = x + Aᵀ(φ_t(u) − u) with φ_t(u) = u e^{sαt} (u >= 0), u e^{sαat} (u < 0). Shears (u(p), 0) and (0, v(q)):
    Φ_t(x) = x + tX(x). The inverse is the flow for −t, declared where the number format leaves it its digits
    (:meth:`~dynablocks.fields.VectorField.is_undone`); the log-determinant has a closed form.

    Source: design D2.4, D2.10.

    Example:
        >>> import torch
        >>> from dynablocks.linear import OrthogonalDense
        >>> from dynablocks.fields import GradientField, leaky_relu
        >>> field = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)).double()
        >>> flow, x = ExactFlow(), torch.randn(2, 3, dtype=torch.float64)
        >>> bool(torch.allclose(flow.inverse(field, flow.step(field, x, 1.0), 1.0), x))
        True
    """

    order = None
    symmetric = True
    keeps = FLOW_PROPERTIES

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        self.require(field)
        return field.flow(x, over_states(step_size, x))

    def log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        self.require(field)
        return field.flow_log_determinant(x, over_states(step_size, x))

    def with_log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> tuple[Tensor, Tensor]:
        if any(shadowed(self, name) for name in APART):
            return super().with_log_determinant(field, x, step_size)
        self.require(field)
        return field.flow_with_log_determinant(x, over_states(step_size, x))

    def why_not(self, field: VectorField) -> str | None:
        return field.why_no_flow()

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return field.flow_constant(step_size)

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        kept, losses = self.inherited(field, step_size)
        largest = largest_growth(field)
        invertible = field.standing_facts().divergence_free or all(
            field.flow_constant(time)[0] < largest for time in (step_size, -step_size)
        )
        # A tolerance would not compose: the miss of one flow passes through the inverses of those before it.
        if not (invertible and field.is_undone(step_size)):
            known = all(field.flow_constant(time)[0] < math.inf for time in (SHORT, -SHORT))
            return kept, [*losses, TOO_FAR if known else UNKNOWN]
        return [Invertible(), *kept], losses

    def title(self, step_size: float) -> str:
        return f"ExactFlow(t={step_size:.5g})"


def largest_growth(field: VectorField) -> float:
    """A flow that grows or shrinks by more than this leaves, with its inverse, the range of the field's numbers.

    It leaves room for the growth of several flows in a row. Of a field that holds none it is that of float32: its
    states may be of any format.

    Example:
        >>> from dynablocks.fields import Damping
        >>> 1e15 < largest_growth(Damping((2,))) < 1e16 < 1e123 < largest_growth(Damping((2,)).double())
        True
    """
    held = [part.dtype for part in (*field.parameters(), *field.buffers()) if part.is_floating_point()]
    return float(min(torch.finfo(kind).max for kind in held or [torch.float32]) ** 0.4)
