"""Explicit methods that keep ‖x‖ exactly, for fields tangent to spheres."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dynablocks.fields import VectorField
from dynablocks.fields.base import over_states
from dynablocks.fields.sphere import TangentField, keep_norm, rotate_in_plane
from dynablocks.integrators.base import INTEGRATORS, Integrator, StepSize
from dynablocks.properties import Equivariant, NormPreserving, Property

NORM_KEEPS: frozenset[type[Property]] = frozenset({NormPreserving, Equivariant})


class NormPreservingMethod(Integrator):
    """Common part: what is declared. No Lipschitz constant: fields tangent to spheres have none either."""

    keeps = NORM_KEEPS

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return math.inf, f"order {self.order}, moves on the sphere"

    def why_not(self, field: VectorField) -> str | None:
        if field.standing_facts().tangent:
            return None
        name = type(field).__name__
        return f"{self!r} needs a field tangent to spheres (SphereField, RotationField); {name} is not"

    def __repr__(self) -> str:
        return self.name


@INTEGRATORS.register("calvo")
class CalvoEulerHeun(NormPreservingMethod):
    r"""Heun's step, moved along the difference of the Euler and the Heun step until the norm is that of x; order 2.

    With k₁ = X(x), k₂ = X(x + hk₁) and w = (h/2)(k₂ − k₁), x ↦ x + hk₁ + μw; Euler is μ = 0, Heun μ = 1. Because k₁ is
    tangent at x and k₂ at x + hk₁, (x + hk₁)·w = −‖hk₁‖²/2, so the norm of x is met where rμ² − μ + 1 = 0 with
    r = ‖w‖²/‖hk₁‖² = O(h²): μ = 2/(1 + √(1 − 4r)) = 1 + O(h²). Where h is so large that r > 1/4 and the line misses the
    sphere, its point nearest to 0 (μ = 1/(2r)) is scaled to the norm: the map is continuous and keeps the norm always.

    Source: Calvo, Hernández-Abreu, Montijano and Rández (2006), "On the preservation of invariants by explicit
        Runge–Kutta methods" (directional projection); paper appendix A.

    Example:
        >>> from dynablocks.fields.sphere import RotationField
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> round(CalvoEulerHeun().step(RotationField(2), x, 0.5).norm().item(), 4)
        5.0
    """

    name = "calvo"
    order = 2

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        self.require(field)
        step_size = over_states(step_size, x)
        first = field(x)
        euler = x + step_size * first
        line = (0.5 * step_size * (field(euler) - first)).flatten(1)
        length = (step_size * first).flatten(1).square().sum(1, keepdim=True)
        ratio = line.square().sum(1, keepdim=True) / torch.where(length > 0, length, 1.0)
        return keep_norm(euler.flatten(1) + _along_line(ratio) * line, x)


def _along_line(ratio: Tensor) -> Tensor:
    """μ = 2/(1 + √(1 − 4r)), the root of rμ² − μ + 1 = 0 next to 1; 1/(2r) where there is none."""
    real = ratio < 0.25
    root = (1 - 4 * torch.where(real, ratio, 0.0)).sqrt()
    return torch.where(real, 2 / (1 + root), 1 / (2 * torch.where(real, 1.0, ratio)))


@dataclass(frozen=True)
class LieScheme:
    """x ↦ χ(hΛ(m))x with χ the chart (``"exp"`` or ``"cayley"``), m = x or, with ``midpoint``, m = χ(hΛ(x)/2)x."""

    name: str
    chart: str
    midpoint: bool


class LieMethod(NormPreservingMethod):
    r"""x ↦ χ(hΛ(m))x for X(x) = Λ(x)x with skew Λ; χ = exp or cay is orthogonal, so ‖x‖ is kept for every h.

    With m = x the order is 1 (Lie–Euler, Cayley), with m = χ(hΛ(x)/2)x it is 2 (the midpoint Runge–Kutta–Munthe-Kaas
    method: χ(tΛ) = I + tΛ + t²Λ²/2 + O(t³) for both charts). Fields without a Λ of their own, as one with a
    ``forward`` of its own and an inherited ``rotate``, move by the rank-two Λ = (Xxᵀ − xXᵀ)/‖x‖².

    Source: Hairer, Lubich and Wanner, "Geometric Numerical Integration", section IV.8; design D2.7.

    Example:
        >>> from dynablocks.fields.sphere import RotationField
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> round(LieMethod(SCHEMES[0]).step(RotationField(2), x, 0.5).norm().item(), 4)
        5.0
    """

    def __init__(self, scheme: LieScheme) -> None:
        self.scheme, self.name = scheme, scheme.name
        self.order = 2 if scheme.midpoint else 1

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        self.require(field)
        step_size = over_states(step_size, x)
        at = self._rotate(field, x, x, 0.5 * step_size) if self.scheme.midpoint else x
        return self._rotate(field, at, x, step_size)

    def _rotate(self, field: VectorField, at: Tensor, v: Tensor, time: StepSize) -> Tensor:
        if isinstance(field, TangentField) and "rotate" not in field._of_another:
            return field.rotate(at, v, time, self.scheme.chart)
        return rotate_in_plane(at, time * field(at), v, self.scheme.chart)


SCHEMES = (
    LieScheme("lie-euler", "exp", midpoint=False),
    LieScheme("cayley", "cayley", midpoint=False),
    LieScheme("lie-midpoint", "exp", midpoint=True),
    LieScheme("cayley-midpoint", "cayley", midpoint=True),
)

for _scheme in SCHEMES:
    INTEGRATORS[_scheme.name] = partial(LieMethod, _scheme)
