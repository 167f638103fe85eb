"""Modified Patankar methods: mass-conserving and positive for every step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.fields import VectorField
from dynablocks.fields.base import over_matrices, over_states
from dynablocks.integrators.base import INTEGRATORS, Integrator, StepSize
from dynablocks.numerics.solving import solve_systems
from dynablocks.properties import LinearInvariant, Positive, Property

if TYPE_CHECKING:
    from jaxtyping import Float


class ExchangesMass(Protocol):
    r"""What a Patankar step asks of a field that is positive: wᵢẋᵢ = Σⱼ (rᵢⱼ(x)wⱼxⱼ − rⱼᵢ(x)wᵢxᵢ).

    Attributes:
        weights: w, a positive number for each entry of x.
    """

    @property
    def weights(self) -> Sequence[float]: ...

    def rates(self, x: Tensor, /) -> Tensor:
        """rᵢⱼ(x) >= 0 with rᵢᵢ = 0, (batch, n) ↦ (batch, n, n)."""
        ...


class ModifiedPatankar(Integrator):
    r"""A production–destruction step in the masses z = w∘x: sources and sinks are both weighted with the new state.

    Order 1: zᵢ⁺ = zᵢ + h Σⱼ (rᵢⱼ(x)zⱼ⁺ − rⱼᵢ(x)zᵢ⁺). Order 2 (MPRK22 with α = 1): with ẑ that step, the rates of a
    second one from z are (rᵢⱼ(x)zⱼ/ẑⱼ + rᵢⱼ(x̂))/2. Each solves (I − hM)z⁺ = z, where M has nonnegative entries off the
    diagonal and columns of sum 0: an M-matrix, so z⁺ >= 0 for z >= 0, and Σz⁺ = Σz, for every h >= 0. A step h < 0 is
    the equation's too, but keeps no sign and may have no solution.

    Condition: the field has ``rates`` and ``weights`` (:class:`ExchangesMass`), and its facts say ``positive`` and that
    Σz is a linear invariant, as :class:`dynablocks.fields.CompartmentField`. Other linear invariants are not kept.

    Args:
        order: 1 or 2.

    Raises:
        InvalidArgument: another order.

    Source: Burchard, Deleersnijder and Meister (2003), "A high-order conservative Patankar-type discretisation";
        Kopecz and Meister (2018), "On order conditions for modified Patankar–Runge–Kutta schemes".

    Example:
        >>> from dynablocks.fields import CompartmentField
        >>> field, x = CompartmentField(3, 4), torch.tensor([[1.0, 0.0, 0.0]])
        >>> y = ModifiedPatankar().step(field, x, 100.0)
        >>> bool((y >= 0).all()), round(y.sum().item(), 5)
        (True, 1.0)
    """

    keeps = frozenset({LinearInvariant, Positive})

    def __init__(self, order: int = 1) -> None:
        if order not in (1, 2):
            raise InvalidArgument(f"order is {order!r}; modified Patankar methods of orders 1 and 2 are known.")
        self.order, self.name = order, "patankar" if order == 1 else "mprk22"

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        given, step_size = self._with_rates(field), over_states(step_size, x)
        weights = x.new_tensor(given.weights)
        masses, rates = weights * x, given.rates(x)
        moved = exchange(masses, rates, step_size)
        if self.order == 2:
            shares = _shares(masses, moved, rates, step_size).unsqueeze(-2)
            moved = exchange(masses, 0.5 * (rates * shares + given.rates(moved / weights)), step_size)
        return moved / weights

    def why_not(self, field: VectorField) -> str | None:
        if callable(getattr(field, "rates", None)) and hasattr(field, "weights"):
            own, name = field._of_another.get("rates"), type(field).__name__
            if own is not None and hasattr(type(field), "rates"):
                return (
                    f"{name} has a {own} of its own, and the rates of another; give it the rates(x) that X is "
                    "made of, or take a Runge–Kutta method"
                )
            facts = field.standing_facts()
            if facts.positive and facts.linear_invariants:
                return None
        return (
            f"{self!r} needs rates: a CompartmentField, or a field with a method rates and an attribute weights, whose "
            f"facts say positive and name a linear invariant; got {type(field).__name__}"
        )

    def _with_rates(self, field: VectorField) -> ExchangesMass:
        self.require(field)
        return cast(ExchangesMass, field)

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return math.inf, "an M-matrix of column sums 1"

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        inherited, losses = self.inherited(field, step_size)
        weights = tuple(map(float, self._with_rates(field).weights))
        kept: list[Property] = []
        for owned in inherited:
            if isinstance(owned, LinearInvariant) and (owned.weights or (1.0,) * len(weights)) != weights:
                losses.append(f"LinearInvariant is lost by {self!r}: it keeps the sum of the masses, not {owned}")
            else:
                kept.append(owned)
        if step_size >= 0:
            return kept, losses
        losses.append(f"Positive is lost by {self!r}: the step {step_size:.4g} is negative")
        losses.extend(f"LinearInvariant is lost by {self!r}: (I − hM)z⁺ = z may be singular for h < 0" for _ in kept)
        return [], losses

    def __repr__(self) -> str:
        return self.name


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
