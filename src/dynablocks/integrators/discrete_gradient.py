"""Discrete gradients: steps that conserve or dissipate the energy of X = S∇H whatever the step size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, require_choice, require_whole
from dynablocks.fields import VectorField
from dynablocks.fields.base import (
    known_potential,
    one_number_a_state,
    over_states,
    why_map_unknown,
    why_no_energy,
    why_no_potential,
)
from dynablocks.fields.dissipative import DampedHamiltonian, DissipativeField
from dynablocks.fields.hamiltonian import HamiltonianEmbedding, NeuralHamiltonian, SeparableHamiltonian, canonical
from dynablocks.integrators.base import INTEGRATORS, ImplicitIntegrator, StepSize
from dynablocks.linear.maps import is_mixed, own_precision
from dynablocks.properties import Dissipative, EnergyPreserving, Equivariant, Property

if TYPE_CHECKING:
    from jaxtyping import Float

KINDS = ("gonzalez", "mean-value", "itoh-abe")

Energy = Callable[[Tensor], Tensor]


class EnergyForm(NamedTuple):
    """X(x) = S(x)∇H(x): ``energy`` H per sample, ``gradient`` ∇H, ``structure`` (x, v) ↦ S(x)v.

    ``constant`` says that S is known to be the same everywhere: then steps are odd where H is even, as it is where X is
    odd and S invertible.
    """

    energy: Energy
    gradient: Callable[[Tensor], Tensor]
    structure: Callable[[Tensor, Tensor], Tensor]
    constant: bool


CONSTANT: frozenset[Callable[..., Tensor]] = frozenset(
    {
        NeuralHamiltonian.structure,
        SeparableHamiltonian.structure,
        HamiltonianEmbedding.structure,
        DissipativeField.structure,
        DampedHamiltonian.structure,
    }
)
"""Of the library's fields the methods ``structure`` that do not depend on x.

Where their facts say that X is odd, H is even: S is invertible but for :class:`DissipativeField`, whose facts ask ∇H.
"""


@dataclass(frozen=True)
class MinusPotential:
    """H = −V of a gradient field X = ∇V = −∇H; two of one field are equal, so that what is said of both composes."""

    field: VectorField

    def __call__(self, x: Tensor) -> Tensor:
        return -known_potential(self.field, x)


def energy_form(field: VectorField) -> EnergyForm | str:
    r"""H, ∇H and S of X = S∇H, or the reason why the field has no such form; none of them is evaluated.

    Fields that have the methods ``energy``, ``gradient`` and ``structure`` say so themselves; Hamiltonian ones have
    S = 𝕁 = [[0, I], [−I, 0]], so ∇H = −𝕁X; gradient fields X = −∇H have S = −I.

    Condition: ``structure(x, v)`` is linear in v, and ⟨v, structure(x, v)⟩ is 0 for every v where the field conserves
    its energy, <= 0 where it dissipates it. That dH/dt is so says it of v = ∇H(x) alone;
    :func:`dynablocks.testing.check_field` measures it for others.

    Example:
        >>> from dynablocks.fields import PartitionedField
        >>> x = torch.ones(1, 4)
        >>> form = energy_form(field := PartitionedField.example())
        >>> bool(torch.allclose(form.structure(x, form.gradient(x)), field(x)))
        True
    """
    reason = getattr(field, "why_no_structure", lambda: None)()
    if reason is not None:
        return str(reason)
    name = type(field).__name__
    if all(callable(getattr(field, method, None)) for method in ("energy", "gradient", "structure")):
        if "structure" in field._of_another:
            return (
                f"{name} has a forward of its own, and no structure to go with it; give it structure(x, v) with "
                "X = structure(x, gradient(x)), or take a Runge–Kutta method"
            )
        constant = getattr(field.structure, "__func__", None) in CONSTANT
        return EnergyForm(field.energy, field.gradient, field.structure, constant)  # type: ignore[arg-type]
    facts = field.standing_facts()
    if facts.hamiltonian:
        reason = why_no_energy(field)
        if reason is not None:
            return f"{reason}, H of X = 𝕁∇H, or take a Runge–Kutta method"
        return EnergyForm(field.energy, lambda x: -canonical(field(x)), lambda x, v: canonical(v), True)
    if not facts.conservative:
        return why_map_unknown(field) or (
            f"{name} has no known energy H with X = S∇H; use a Hamiltonian, partitioned, dissipative or gradient "
            "field, or give it methods energy(x), gradient(x) and structure(x, v) with X = structure(x, gradient(x))"
        )
    reason = why_no_potential(field)
    if reason is not None:
        return reason
    return EnergyForm(MinusPotential(field), lambda x: -field(x), lambda x, v: -v, True)


def _zeros(field: VectorField) -> Tensor:
    """One state in the number format and on the device of the field."""
    return next(field.parameters(), torch.zeros(())).new_zeros(1, *field.in_shape)


def discrete_gradient(
    kind: str,
    energy: Energy,
    x: Float[Tensor, "batch ..."],
    y: Float[Tensor, "batch ..."],
    *,
    gradient: Callable[[Tensor], Tensor] | None = None,
    nodes: int = 4,
) -> Float[Tensor, "batch ..."]:
    r"""∇̄H(x, y) with ⟨∇̄H(x, y), y − x⟩ = H(y) − H(x) and ∇̄H(x, x) = ∇H(x).

    - ``"gonzalez"``: ∇H(m) + (H(y) − H(x) − ⟨∇H(m), d⟩) d/‖d‖² with m = (x + y)/2, d = y − x. Symmetric, order 2.
    - ``"mean-value"``: ∫₀¹ ∇H(x + td) dt by Gauss–Legendre quadrature, exact for polynomials H of degree <= 2 · nodes;
      for other H what the quadrature leaves of H(y) − H(x) is added along d as Gonzalez does. Symmetric, order 2.
    - ``"itoh-abe"``: (H(y₁…yᵢ, xᵢ₊₁…) − H(y₁…yᵢ₋₁, xᵢ…))/(yᵢ − xᵢ) for each entry i. Not symmetric: order 1. It
      needs no derivative but where an increment (nearly) vanishes: there it is ∂ᵢH halfway.

    Where the states are close and the difference of energies is rounding, the formulas' limits are used, so that values
    and gradients stay finite. With a known target y a training loss ‖(y − x)/h − S∇̄H(x, y)‖² needs no solve.

    Args:
        kind: one of the three.
        energy: H, (batch, …) ↦ (batch,), sample by sample.
        x, y: the two states.
        gradient: ∇H; by default from automatic differentiation.
        nodes: of the quadrature.

    Raises:
        InvalidArgument: unknown kind, shapes that differ, fewer than one node.

    Source: Gonzalez (1996); Harten, Lax and van Leer (1983); Itoh and Abe (1988); McLachlan, Quispel and Robidoux
        (1999); paper appendix A; design D2.12.

    Example:
        >>> H = lambda x: 0.5 * x.square().sum(1) + x[:, 0] ** 4
        >>> x, y = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0, 0.0]]).double()
        >>> [round(float((discrete_gradient(k, H, x, y) * (y - x)).sum() - (H(y) - H(x))), 12) + 0.0 for k in KINDS]
        [0.0, 0.0, 0.0]
    """
    require_choice("discrete gradient", kind, KINDS)
    if x.shape != y.shape or x.ndim < 2:
        raise InvalidArgument(f"x and y have shapes {tuple(x.shape)} and {tuple(y.shape)}; give two equal batches.")
    require_whole("nodes", nodes, 1)
    slope = torch.func.grad(lambda z: energy(z).sum()) if gradient is None else gradient
    return _with_length(kind, energy, slope, x, y, nodes)[0]


def _with_length(
    kind: str, energy: Energy, gradient: Energy, x: Tensor, y: Tensor, nodes: int, before: Tensor | None = None
) -> tuple[Tensor, Float[Tensor, " batch"]]:
    """∇̄H, and the least length by which a difference of energies was divided in it; ∞ where none was.

    ``before`` is H(x) where it is known; Itoh and Abe evaluate H at x with all other corners.
    """
    if kind == "itoh-abe":
        return _coordinate_increments(energy, gradient, x, y)
    before = energy(x) if before is None else before
    return _projected_mean(energy, gradient, x, y, 1 if kind == "gonzalez" else nodes, before)


def _projected_mean(
    energy: Energy, gradient: Energy, x: Tensor, y: Tensor, nodes: int, before: Tensor
) -> tuple[Tensor, Float[Tensor, " batch"]]:
    """The quadrature of ∇H along the segment, with its energy defect put along d; one node is Gonzalez' choice."""
    d = y - x
    column = (-1,) + (1,) * (x.ndim - 1)
    if nodes == 1:
        mean = gradient((x + y) / 2)
    else:
        abscissae, weights = (torch.from_numpy(v).to(x) for v in np.polynomial.legendre.leggauss(nodes))
        lead = (nodes,) + (1,) * x.ndim
        points = (x + y) / 2 + abscissae.reshape(lead) * (d / 2)
        mean = (gradient(points.flatten(0, 1)).reshape(points.shape) * (weights / 2).reshape(lead)).sum(0)
    after = energy(y)
    defect = after - before - (mean * d).flatten(1).sum(1)
    squared = d.flatten(1).square().sum(1)
    with torch.no_grad():
        eps = torch.finfo(x.dtype).eps
        sizes = x.flatten(1).norm(dim=1) + y.flatten(1).norm(dim=1)
        far = squared > (eps ** (1 / 3) * sizes).square()
        energies = before.abs() + after.abs()
        meant = far & (defect.abs() > 4 * eps * energies)
        # Near as seen from the origin, which says nothing of H: a defect beyond all rounding counts as well.
        rounding = energies + mean.flatten(1).norm(dim=1) * sizes
        meant = meant | ((squared > eps * sizes.square()) & (defect.abs() > 4 * eps * rounding))
        length = torch.where(far | meant, squared.sqrt(), math.inf)
    share = defect / torch.where(far | meant, squared, 1.0)
    # A defect that is nothing but rounding, or zero, still moves with the parameters of H.
    share = torch.where(meant, share, torch.where(far, share - share.detach(), 0.0))
    return mean + share.reshape(column) * d, length


def _coordinate_increments(
    energy: Energy, gradient: Energy, x: Tensor, y: Tensor
) -> tuple[Tensor, Float[Tensor, " batch"]]:
    start, end = x.flatten(1), y.flatten(1)
    entries = start.shape[1]
    moved = torch.ones(entries + 1, entries, dtype=torch.bool, device=x.device).tril(-1).unsqueeze(1)
    corners = torch.where(moved, end, start)
    energies = energy(corners.reshape(-1, *x.shape[1:])).reshape(entries + 1, -1)
    halfway = torch.where(
        torch.eye(entries, dtype=torch.bool, device=x.device).unsqueeze(1), (start + end) / 2, corners[:-1]
    )
    slopes = gradient(halfway.reshape(-1, *x.shape[1:])).reshape(entries, -1, entries)
    limit = slopes.diagonal(dim1=0, dim2=2)
    d = end - start
    gained = (energies[1:] - energies[:-1]).mT
    with torch.no_grad():
        eps, sizes = torch.finfo(x.dtype).eps, (start.norm(dim=1) + end.norm(dim=1)).unsqueeze(1)
        rounding = (energies[1:].abs() + energies[:-1].abs()).mT + limit.abs() * sizes
        beyond = (d.abs() > eps**0.5 * sizes) & ((gained - limit * d).abs() > 4 * eps * rounding)
        near = (d.abs() <= eps ** (1 / 3) * sizes) & ~beyond
        length = torch.where(near, math.inf, d.abs()).amin(1)
    quotient = gained / torch.where(near, 1.0, d)
    return torch.where(near, limit, quotient).reshape(x.shape), length


class DiscreteGradient(ImplicitIntegrator):
    r"""The y with y − x = h S((x + y)/2) ∇̄H(x, y).

    H(y) − H(x) = h ⟨∇̄H, S∇̄H⟩ is 0 for Sᵀ = −S and <= 0 for S <= 0: energy is conserved, or dissipated, for every step
    size, to the solver's tolerance. ``gonzalez`` and ``mean-value`` are symmetric of order 2; ``itoh-abe`` has order 1
    and is not symmetric. Steps are odd where S is constant and H even, as it is where X is odd and S invertible.

    Condition: the field has the form X = S∇H (:func:`energy_form`), and S is skew, or <= 0, on all vectors, since
    ∇̄H(x, y) is no gradient of H. Of a ``structure(x, v)`` of your own that is taken for granted.

    Args:
        kind: ``"gonzalez"``, ``"mean-value"`` or ``"itoh-abe"`` (:func:`discrete_gradient`).
        nodes: of the mean value's quadrature.
        tolerance, max_iterations: of the solver, as in :class:`ImplicitIntegrator`.

    Raises:
        InvalidArgument: unknown kind, fewer than one node.
        NotConverged: when a step's equation is not solved.

    Source: McLachlan, Quispel and Robidoux (1999), "Geometric integration using discrete gradients"; paper appendix A;
        design D2.12.

    Example:
        >>> from dynablocks.fields import PartitionedField
        >>> field, x = PartitionedField.example().double(), torch.ones(1, 4, dtype=torch.float64)
        >>> y = DiscreteGradient("gonzalez").step(field, x, 0.5)
        >>> bool((field.energy(y) - field.energy(x)).abs() < 1e-13)
        True
    """

    keeps = frozenset({EnergyPreserving, Dissipative, Equivariant})
    solved = frozenset({EnergyPreserving, Dissipative})

    def __init__(self, kind: str, *, nodes: int = 4, tolerance: float = 1e-13, max_iterations: int = 50) -> None:
        super().__init__(tolerance, max_iterations)
        self.kind = self.name = require_choice("discrete gradient", kind, KINDS)
        self.nodes = require_whole("nodes", nodes, 1)
        self.symmetric = kind != "itoh-abe"
        self.order = 2 if self.symmetric else 1

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        form = energy_form(field)
        if isinstance(form, str):
            raise InvalidArgument(f"{form}.")
        step_size = over_states(step_size, x)
        # H(x) is computed once, in the precision in which the equation is solved.
        x = x.float() if is_mixed(x) and x.dtype in (torch.bfloat16, torch.float16) else x
        with own_precision(x):
            before = form.energy(x) if x.numel() else x.new_zeros(len(x))

        def residual(z: Tensor, x: Tensor, h: StepSize, before: Tensor) -> Tensor:
            mean = _with_length(self.kind, form.energy, form.gradient, x, z, self.nodes, before)[0]
            return z - x - h * form.structure((x + z) / 2, mean)

        return self.solve(residual, x, x, step_size, before, rounding=partial(self._rounding, form))

    def _rounding(self, form: EnergyForm, z: Tensor, x: Tensor, h: StepSize, before: Tensor) -> Tensor:
        """What rounding of H does to h S∇̄H: ∇̄H has a component (H(z) − H(x))/‖d‖ along d."""
        length = _with_length(self.kind, form.energy, form.gradient, x, z, self.nodes, before)[1]
        # Where no difference was divided another iterate may do so, at this length or beyond.
        near = torch.finfo(x.dtype).eps ** (1 / 3) * (x.flatten(1).norm(dim=1) + z.flatten(1).norm(dim=1))
        length = torch.where(length.isinf(), near, length)
        noise = 8 * torch.finfo(x.dtype).eps * (before.abs() + form.energy(z).abs()) / length
        unit = torch.ones_like(z) / math.sqrt(z[0].numel())
        image = h * form.structure((x + z) / 2, unit)
        return torch.nan_to_num(noise * image.flatten(1).norm(dim=1), nan=0.0, posinf=0.0)

    def why_not(self, field: VectorField) -> str | None:
        form = energy_form(field)
        if isinstance(form, str):
            return form
        two = torch.cat([_zeros(field)] * 2)
        try:
            one_number_a_state(f"the energy of {type(field).__name__}", form.energy(two), two)
        except InvalidArgument as error:
            return str(error).rstrip(".")
        return None

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return math.inf, "H(y) − H(x) = h⟨∇̄H, S∇̄H⟩"

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        inherited, losses = self.inherited(field, step_size)
        form = energy_form(field)
        if isinstance(form, str):
            return inherited, losses
        kept: list[Property] = []
        for owned in inherited:
            lost = _why_lost(owned, form, type(field).__name__)
            if lost is None:
                kept.append(owned)
            else:
                losses.append(f"{type(owned).__name__} is lost: {lost}")
        if isinstance(form.energy, MinusPotential) and step_size >= 0:
            kept.append(Dissipative(form.energy, tolerance=self.tolerance))
        return kept, losses


def _why_lost(owned: Property, form: EnergyForm, name: str) -> str | None:
    """Why a step does not keep what the flow of the field keeps, ``None`` where it does."""
    if isinstance(owned, (EnergyPreserving, Dissipative)) and owned.function != form.energy:
        return f"the step is one of −V for X = ∇V; for energy(x) give {name} methods gradient(x) and structure(x, v)"
    if isinstance(owned, Equivariant) and not form.constant:
        return f"a step of an odd S∇H is odd where S(−x) = S(x), unknown of {name}; Runge–Kutta methods keep it"
    return None


for _kind in KINDS:
    INTEGRATORS[_kind] = partial(DiscreteGradient, _kind)
