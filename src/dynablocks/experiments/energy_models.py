"""Hamiltonian models told more or less of the system, and their fit to noisy trajectories with unknown starts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import require_choice
from dynablocks.fields import FieldFacts, VectorField
from dynablocks.fields.base import potential_of
from dynablocks.fields.hamiltonian import NeuralHamiltonian, SeparableHamiltonian
from dynablocks.fields.symmetric import EvenPotential, LinearField, ridge_energy
from dynablocks.fitting import fit
from dynablocks.integrators import integrator
from dynablocks.seeding import seeded

if TYPE_CHECKING:
    from jaxtyping import Float64

HAMILTONIANS = {
    "separable": "H = T(p) + V(q)",
    "even": "H = T(p) + V(q), T and V even",
    "kinetic": "H = pᵀMp/2 + V(q), M learned",
    "relative": "H = pᵀMp/2 + V(q₁ − q₂), M learned",
    "general": "H(q, p)",
}
"""Every model and all that it is told of the system; T, V and H are tanh ridge functions plus a quadratic form."""

START = {"linear.matrix": 0.7, "bias": 1.5, "alpha": 0.05}
"""Standard deviations at the start of A, b and α in αᵀΓ(Ax + b): slopes of all sizes and kinks all over the data."""

PRIOR = {"linear.matrix": 0.7, "bias": 1.5, "alpha": 1.0, "matrix": 3.0}
"""Standard deviations of the normal prior of A, b, α and Q: H is smooth over distances of about one."""


class Relative(VectorField):
    """x ↦ Dᵀ∇V(Dx) for D(x₁, x₂, y₁, y₂) = (x₁ − x₂, y₁ − y₂): forces that depend on differences and add up to 0.

    Example:
        >>> force = Relative(LinearField(2))
        >>> force(torch.randn(3, 4))[:, :2].sum(1).abs().max() < 1e-6
        tensor(True)
    """

    difference: Tensor

    def __init__(self, field: VectorField) -> None:
        super().__init__()
        self.field, self.in_shape = field, (2 * field.in_shape[0],)
        self.register_buffer("difference", torch.kron(torch.eye(field.in_shape[0]), torch.tensor([[1.0, -1.0]])))

    def forward(self, x: Tensor) -> Tensor:
        return self.field(x @ self.difference.mT) @ self.difference

    def facts(self) -> FieldFacts:
        known = self.field.facts()
        return FieldFacts(2 * known.lipschitz, conservative=True, odd=known.odd, reason="pulled back by a difference")

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=True)

    def potential(self, x: Tensor) -> Tensor:
        """V(Dx) per sample."""
        return potential_of(self.field, x @ self.difference.mT)


def hamiltonian_model(name: str, entries: int, width: int, seed: int = 0) -> VectorField:
    """The field of a model, float64, its parameters drawn from their prior.

    Args:
        name: one of :data:`HAMILTONIANS`.
        entries: of x = (q, p).
        width: ridge functions of each potential (twice as many for H of both).
        seed: of the start.

    Raises:
        InvalidArgument: no model of this name.

    Example:
        >>> hamiltonian_model("separable", 2, 4).facts().conserves_energy
        True
    """
    require_choice("model", name, HAMILTONIANS)
    half = entries // 2
    with seeded(seed):
        field: VectorField
        if name == "general":
            field = NeuralHamiltonian(entries, width=2 * width)
        elif name == "separable":
            field = SeparableHamiltonian(ridge_energy(half, width), ridge_energy(half, width))
        elif name == "even":
            kinetic, potential = (EvenPotential(ridge_energy(half, width)) for _ in range(2))
            field = SeparableHamiltonian(kinetic, potential)
        elif name == "kinetic":
            field = SeparableHamiltonian(LinearField(half), ridge_energy(half, width))
        else:
            field = SeparableHamiltonian(LinearField(half), Relative(ridge_energy(half // 2, width)))
        for key, parameter in field.named_parameters():
            if (spread := spread_of(key, START)) is not None:
                nn.init.normal_(parameter, std=spread)
    return field.double()


def spread_of(key: str, spreads: dict[str, float]) -> float | None:
    """The standard deviation of a parameter by the end of its name, ``None`` where none is given.

    Example:
        >>> spread_of("kick.force.fields.0.linear.matrix", PRIOR), spread_of("kick.force.fields.1.matrix", START)
        (0.7, None)
    """
    return next((spread for end, spread in spreads.items() if key.endswith(end)), None)


class RolloutMap(nn.Module):
    r"""x₀ ↦ (x₀, Ψ(x₀), Ψ²(x₀), …), Ψ some steps of a method over one sampling interval.

    With ``starts`` the input is a row of weights and x₀ = weights · starts, so that a one-hot row selects a learned
    start: the states that a noisy trajectory began with are unknowns of the fit.

    Args:
        field: X.
        interval: the time between two states.
        length: states of a rollout.
        substeps: of each interval.
        starts: noisy starts to learn, (windows, n).

    Example:
        >>> model = RolloutMap(hamiltonian_model("separable", 2, 4), 0.2, 5)
        >>> model(torch.zeros(3, 2, dtype=torch.float64)).shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self, field: VectorField, interval: float, length: int, substeps: int = 1, starts: Tensor | None = None
    ) -> None:
        super().__init__()
        self.field, self.length, self.substeps = field, length, substeps
        self.method = integrator("rk4" if isinstance(field, NeuralHamiltonian) else "verlet")
        self.step_size = interval / substeps
        self.starts = None if starts is None else nn.Parameter(starts.clone())

    def forward(self, x: Float64[Tensor, "batch n"]) -> Float64[Tensor, "batch length n"]:
        if self.starts is not None:
            x = x @ self.starts
        states = [x]
        for _ in range(self.length - 1):
            for _ in range(self.substeps):
                x = self.method.step(self.field, x, self.step_size)
            states.append(x)
        return torch.stack(states, dim=1)


def fit_noisy(rollout: RolloutMap, windows: Float64[Tensor, "windows length n"], noise: float, steps: int) -> float:
    r"""Maximum a posteriori fit of field and starts: min Σ‖Ψᵏ(xᵢ) − zᵢₖ‖²/noise² + Σ(θⱼ/priorⱼ)².

    The prior's residuals are samples of their own: weights that select a piece of θ instead of a start.

    Returns:
        Mean squared residual over noise²: near 1 when the fit is right.
    """
    count, size = len(windows), windows[0].numel()
    pieces = -(-sum(p.numel() for p in rollout.field.parameters()) // size)
    targets = torch.cat([windows, windows.new_zeros(pieces, *windows.shape[1:])])

    def residuals(model: RolloutMap, weights: Tensor, target: Tensor) -> Tensor:
        scaled = [p.flatten() / (spread_of(key, PRIOR) or math.inf) for key, p in model.field.named_parameters()]
        theta = noise * torch.cat(scaled)
        padded = torch.cat([theta, theta.new_zeros(pieces * size - theta.numel())]).view(pieces, size)
        data, prior = weights[:, :count], weights[:, count:]
        errors = (model(data) - target).flatten(1) * data.sum(1, keepdim=True)
        return errors + prior @ padded

    selectors = torch.eye(count + pieces, dtype=torch.float64)
    fit(rollout, selectors, targets, residuals=residuals, adam_steps=0, finish_steps=steps, label="fitting rollouts")
    with torch.no_grad():
        return float((rollout(selectors[:count, :count]) - windows).square().mean()) / noise**2
