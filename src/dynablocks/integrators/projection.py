"""A step followed by the projection onto the sphere and the planes that solutions stay on."""

from __future__ import annotations

import math
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from dynablocks.fields import FieldFacts, VectorField
from dynablocks.fields.mass import span_basis
from dynablocks.fields.sphere import inverse_norm
from dynablocks.integrators.base import INTEGRATORS, Integrator, StepSize
from dynablocks.integrators.runge_kutta import HEUN, RK4, ExplicitRungeKutta
from dynablocks.properties import (
    ConformalSymplectic,
    Equivariant,
    LinearInvariant,
    NormPreserving,
    Property,
    Symplectic,
    VolumePreserving,
)

GEOMETRY = (Symplectic, ConformalSymplectic, VolumePreserving)


class Projected(Integrator):
    r"""y ↦ the nearest point to y = Ψ^h(x) that has the norm and the linear invariants of x; the order of Ψ stays.

    With Q an orthonormal basis of the span of the linear invariants' weights and R = I − QQᵀ:
    QQᵀx + Ry · ‖Rx‖/‖Ry‖; without a norm to keep QQᵀx + Ry, without linear invariants y‖x‖/‖y‖.

    The projection depends on the state, so symplecticity and volume are lost, also where Ψ keeps them (design D2.14).
    It is odd in (x, y), so steps are odd where those of Ψ are; that X is odd does not suffice.

    Condition: the field is tangent to spheres or has linear invariants, whatever its parameters are: onto that a step
    projects, and that it keeps (:meth:`~dynablocks.fields.VectorField.standing_facts`).

    Args:
        base: Ψ.

    Source: Hairer, Lubich and Wanner, "Geometric Numerical Integration", section IV.4.

    Example:
        >>> from dynablocks.fields.sphere import RotationField
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> round(Projected(ExplicitRungeKutta(RK4)).step(RotationField(2), x, 0.5).norm().item(), 4)
        5.0
    """

    keeps = frozenset({NormPreserving, LinearInvariant, Equivariant})

    def __init__(self, base: Integrator) -> None:
        self.base, self.order, self.explicit = base, base.order, base.explicit
        self.name = f"Projected({base!r})"

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        self.require(field)
        facts = field.standing_facts()
        before, after = x.flatten(1), self.base.step(field, x, step_size).flatten(1)
        kept, free = torch.zeros_like(before), after
        if facts.linear_invariants:
            basis = torch.from_numpy(_basis(facts.linear_invariants, before.shape[1]))
            basis = basis.to(device=x.device, dtype=x.dtype)
            kept = (before @ basis) @ basis.mT
            free = after - (after @ basis) @ basis.mT
        if facts.tangent:
            length = torch.linalg.vector_norm(before - kept, dim=1, keepdim=True)
            free = free * (length * inverse_norm(free))
        return (kept + free).reshape(x.shape)

    def why_not(self, field: VectorField) -> str | None:
        facts = field.standing_facts()
        if not facts.tangent and not facts.linear_invariants:
            return (
                f"{self!r} has nothing to project onto: {type(field).__name__} keeps neither norm nor a linear function"
            )
        return self.base.why_not(field)

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return math.inf, "projected onto the invariants of x"

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        inherited, losses = self.inherited(field, step_size)
        for kind in GEOMETRY:
            losses = [self._why_lost(kind) if loss.startswith(f"{kind.__name__} ") else loss for loss in losses]
        standing = field.standing_facts()
        kept = [owned for owned in inherited if _is_met(owned, standing)]
        losses += [
            f"{type(owned).__name__} is lost by {self!r}: it projects onto what holds for all parameters alone"
            for owned in inherited
            if owned not in kept
        ]
        if not any(isinstance(p, Equivariant) for p in kept):
            return kept, losses
        told = self.base.declare(field, step_size)
        if Equivariant() in told.properties:
            return kept, losses
        passed_on = [loss for loss in told.losses if loss.startswith("Equivariant ")]
        own = f"Equivariant is lost by {self!r}: {self.base!r} does not keep it to rounding"
        return [p for p in kept if not isinstance(p, Equivariant)], [*losses, *(passed_on or [own])]

    def _why_lost(self, kind: type) -> str:
        return f"{kind.__name__} is lost by {self!r}: the projection after the step depends on the state"

    def __repr__(self) -> str:
        return self.name


def _is_met(owned: Property, standing: FieldFacts) -> bool:
    """Whether a step projects onto it, where that is what a projection keeps: it asks for standing facts alone."""
    if isinstance(owned, LinearInvariant):
        return owned.weights in standing.linear_invariants
    return standing.tangent or not isinstance(owned, NormPreserving)


@lru_cache(maxsize=64)
def _basis(invariants: tuple[tuple[float, ...] | None, ...], entries: int) -> np.ndarray:
    """Orthonormal columns that span the weights, in float64."""
    return span_basis([(1.0,) * entries if weights is None else weights for weights in invariants])


for _name, _tableau in (("projected-heun", HEUN), ("projected-rk4", RK4)):
    INTEGRATORS[_name] = partial(Projected, ExplicitRungeKutta(_tableau))
