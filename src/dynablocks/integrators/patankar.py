"""Modified Patankar methods: mass-conserving and positive for every step size."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.fields import VectorField
from dynablocks.fields.base import over_matrices, over_states
from dynablocks.fields.mass import MassPreservingField
from dynablocks.integrators.base import INTEGRATORS, Integrator, StepSize
from dynablocks.linear.solving import solve_systems
from dynablocks.properties import Declaration, LinearInvariant, Positive

if TYPE_CHECKING:
    from jaxtyping import Float


class ModifiedPatankar(Integrator):
    r"""A production–destruction step in the masses z = w∘x: sources and sinks are both weighted with the new state.

    Order 1: zᵢ⁺ = zᵢ + h Σⱼ (rᵢⱼ(x)zⱼ⁺ − rⱼᵢ(x)zᵢ⁺). Order 2 (MPRK22 with α = 1): with ẑ that step, the rates of a
    second one from z are (rᵢⱼ(x)zⱼ/ẑⱼ + rᵢⱼ(x̂))/2. Each solves (I − hM)z⁺ = z, where M has nonnegative entries off the
    diagonal and columns of sum 0: an M-matrix, so z⁺ >= 0 for z >= 0, and Σz⁺ = Σz, for every h >= 0. A step h < 0 is
    the equation's too, but keeps no sign and may have no solution.

    Condition: a field with nonnegative rates, ``MassPreservingField(..., positive=True)``.

    Args:
        order: 1 or 2.

    Raises:
        InvalidArgument: another order.

    Source: Burchard, Deleersnijder and Meister (2003), "A high-order conservative Patankar-type discretisation";
        Kopecz and Meister (2018), "On order conditions for modified Patankar–Runge–Kutta schemes".

    Example:
        >>> field, x = MassPreservingField(3, 4, positive=True), torch.tensor([[1.0, 0.0, 0.0]])
        >>> y = ModifiedPatankar().step(field, x, 100.0)
        >>> bool((y >= 0).all()), round(y.sum().item(), 5)
        (True, 1.0)
    """

    keeps = frozenset({LinearInvariant, Positive})

    def __init__(self, order: int = 1) -> None:
        if order not in (1, 2):
            raise InvalidArgument(f"order is {order!r}; modified Patankar methods of orders 1 and 2 are known.")
        self.order = order

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        field, step_size = self._with_rates(field), over_states(step_size, x)
        weights = x.new_tensor(field.weights)
        masses, rates = weights * x, field.rates(x)
        moved = exchange(masses, rates, step_size)
        if self.order == 2:
            shares = _shares(masses, moved, rates, step_size).unsqueeze(-2)
            moved = exchange(masses, 0.5 * (rates * shares + field.rates(moved / weights)), step_size)
        return moved / weights

    def why_not(self, field: VectorField) -> str | None:
        if isinstance(field, MassPreservingField) and field.positive:
            return None
        return f"{self!r} needs rates: a MassPreservingField with positive=True; got {type(field).__name__}"

    def _with_rates(self, field: VectorField) -> MassPreservingField:
        self.require(field)
        assert isinstance(field, MassPreservingField)
        return field

    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        self.require(field)
        kept, losses = self.inherited(field, step_size)
        if step_size < 0:
            losses.append(f"Positive is lost by {self!r}: the step {step_size:.4g} is negative")
            losses.extend(
                f"LinearInvariant is lost by {self!r}: (I − hM)z⁺ = z may be singular for h < 0" for _ in kept
            )
            kept = []
        title = f"{self!r}(h={step_size:.5g})"
        return Declaration.of(*kept, reason="an M-matrix of column sums 1", title=title, losses=losses)

    def __repr__(self) -> str:
        return "patankar" if self.order == 1 else "mprk22"


def exchange(
    masses: Float[Tensor, "batch n"], rates: Float[Tensor, "batch n n"], step_size: StepSize
) -> Float[Tensor, "batch n"]:
    """z⁺ with zᵢ⁺ = zᵢ + h Σⱼ (rᵢⱼzⱼ⁺ − rⱼᵢzᵢ⁺); what rounding does to Σz⁺ is put back in proportion to |zᵢ⁺|.

    The system is solved in float64, where the 1 beside h Σᵢ rᵢⱼ is not lost before h r reaches 2⁵³.

    Raises:
        InvalidArgument: it reached that.
    """
    eye = torch.eye(masses.shape[-1], dtype=torch.float64, device=masses.device)
    flows = over_matrices(step_size) * rates.double()
    matrix = eye * (1 + flows.sum(-2, keepdim=True)) - flows
    try:
        moved = solve_systems(matrix, masses.double().unsqueeze(-1)).squeeze(-1).to(masses.dtype)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InvalidArgument(
            "the step times the rates is beyond 2^53, where rounding hides the state; use a smaller step."
        ) from error
    total = moved.abs().sum(-1, keepdim=True)
    lost = masses.sum(-1, keepdim=True) - moved.sum(-1, keepdim=True)
    return moved + moved.abs() * lost / torch.where(total > 0, total, 1.0)


def _shares(masses: Tensor, moved: Tensor, rates: Tensor, step_size: StepSize) -> Tensor:
    """zⱼ/ẑⱼ, in [0, 1 + h Σᵢ rᵢⱼ] for z >= 0; kept there for other z too, so the rates stay nonnegative."""
    ratio = masses / torch.where(moved != 0, moved, 1.0)
    most = (1 + step_size * rates.sum(-2)).clamp_min(0)
    return torch.minimum(ratio.clamp_min(0), most)


INTEGRATORS["patankar"] = partial(ModifiedPatankar, 1)
INTEGRATORS["mprk22"] = partial(ModifiedPatankar, 2)
