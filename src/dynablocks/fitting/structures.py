"""Learned fields of general form for the surrogates: coordinate shears, production–destruction, skew-gradient, free."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, VectorField
from dynablocks.fields.base import known_potential, over_states, require_field
from dynablocks.fields.hamiltonian import EnergyField
from dynablocks.fields.sphere import skew_matrix
from dynablocks.fields.symmetric import EvenPotential, ridge_energy
from dynablocks.integrators import Integrator
from dynablocks.integrators.base import StepSize
from dynablocks.properties import Positive
from dynablocks.properties.own_code import foreign
from dynablocks.properties.structure import original

if TYPE_CHECKING:
    from jaxtyping import Float


class ShallowNetwork(nn.Module):
    """x ↦ W tanh(Ax + b) + Lx + c; without b and c (``odd``) it is odd.

    Example:
        >>> network, x = ShallowNetwork(3, 2, 5, odd=True), torch.ones(1, 3)
        >>> bool((network(-x) + network(x)).abs().max() < 1e-6), network(x).shape
        (True, torch.Size([1, 2]))
    """

    def __init__(self, entries: int, outputs: int, width: int, *, odd: bool = False) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(width, entries) / math.sqrt(entries))
        self.outer = nn.Parameter(0.5 * torch.randn(outputs, width) / math.sqrt(width))
        self.linear = nn.Parameter(0.1 * torch.randn(outputs, entries))
        self.bias = None if odd else nn.Parameter(torch.randn(width))
        self.constant = None if odd else nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch outputs"]:
        before = x @ self.inner.mT
        hidden = torch.tanh(before if self.bias is None else before + self.bias)
        y = hidden @ self.outer.mT + x @ self.linear.mT
        return y if self.constant is None else y + self.constant


def _is_odd(network: nn.Module) -> bool:
    """Whether a part of a field is a :class:`ShallowNetwork` without b and c, and computes what its class says."""
    inside = original(network)
    known = type(inside) is ShallowNetwork and inside.bias is None and inside.constant is None
    return known and foreign(network, everywhere=True) is None


class FreeField(VectorField):
    """X(x) = W tanh(Ax + b) + Lx + c: nothing is kept, but the parity on request.

    Example:
        >>> FreeField(2, 4, odd=True).facts().odd
        True
    """

    def __init__(self, entries: int, width: int, *, odd: bool = False) -> None:
        super().__init__()
        self.in_shape = (entries,)
        self.rate = ShallowNetwork(entries, entries, width, odd=odd)

    @classmethod
    def example(cls) -> FreeField:
        return cls(2, 3)

    def forward(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        rate: Tensor = self.rate(x)
        return rate

    def facts(self) -> FieldFacts:
        return FieldFacts(odd=_is_odd(self.rate), reason="a free field")


class CoordinateShear(VectorField):
    r"""Xᵢ(x) = f(the other entries), Xⱼ = 0 for j ≠ i: its flow x + tX(x) is exact and keeps the volume.

    Example:
        >>> shear, x = CoordinateShear(3, 1, 4), torch.ones(2, 3)
        >>> shear(x)[:, [0, 2]].abs().max().item()
        0.0
    """

    def __init__(self, entries: int, index: int, width: int, *, odd: bool = False) -> None:
        super().__init__()
        self.in_shape, self.index = (entries,), index
        self.rate = ShallowNetwork(entries - 1, 1, width, odd=odd)

    @classmethod
    def example(cls) -> CoordinateShear:
        return cls(3, 1, 4)

    def forward(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        i = self.index
        rate = self.rate(torch.cat([x[:, :i], x[:, i + 1 :]], dim=1))
        return torch.cat([torch.zeros_like(x[:, :i]), rate, torch.zeros_like(x[:, i + 1 :])], dim=1)

    def facts(self) -> FieldFacts:
        return FieldFacts(odd=_is_odd(self.rate), divergence_free=True, reason="nilpotent Jacobian")

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return x + time * self(x)

    def is_undone(self, time: float) -> bool:
        """Yes: the entries that rest tell what was added to the other."""
        return type(self).flow is CoordinateShear.flow or super().is_undone(time)

    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        return x.new_zeros(x.shape[0])


class CoordinateShears(VectorField):
    r"""Xᵢ(x) = fᵢ(xⱼ, j ≠ i) for every i: divergence free, a sum of n exact shears, so splittings keep the volume.

    Every field with ∂Xᵢ/∂xᵢ = 0 for all i is of this form (rigid body, ABC flow, separable Hamiltonian), and no other:
    not the stagnation flow ẋ = x, ẏ = −y, which is divergence free, too.

    Example:
        >>> len(CoordinateShears(3, 4).terms())
        3
    """

    def __init__(self, entries: int, width: int, *, odd: bool = False) -> None:
        super().__init__()
        if entries < 2:
            raise InvalidArgument(f"there is {entries} state column; keeping volume needs at least 2.")
        self.in_shape = (entries,)
        self.shears = nn.ModuleList(CoordinateShear(entries, i, width, odd=odd) for i in range(entries))

    @classmethod
    def example(cls) -> CoordinateShears:
        return cls(3, 4)

    def forward(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        return torch.stack([shear(x) for shear in self.shears]).sum(0)

    def terms(self) -> tuple[VectorField, ...]:
        return tuple(require_field(f"shears[{i}]", original(shear)) for i, shear in enumerate(self.shears))

    def facts(self) -> FieldFacts:
        parts = [term.facts() for term in self.terms()]
        odd, free = all(part.odd for part in parts), all(part.divergence_free for part in parts)
        return FieldFacts(odd=odd, divergence_free=free, reason="a sum of coordinate shears")


class SkewGradientField(EnergyField):
    r"""X(x) = S(x)∇H(x) with S(x) skew, its entries affine in x: H is conserved, in any dimension.

    Args:
        entries: n >= 2.
        width: rows of A in H(x) = αᵀΓ(Ax + b) + ½xᵀQx.
        linear: whether H also has a term cᵀx.

    Example:
        >>> field, x = SkewGradientField(3, 4), torch.ones(2, 3)
        >>> bool((field(x) * field.gradient(x)).sum(1).abs().max() < 1e-6)
        True
    """

    def __init__(self, entries: int, width: int, *, linear: bool = False) -> None:
        super().__init__()
        if entries < 2:
            raise InvalidArgument(f"there is {entries} state column; keeping an energy needs at least 2.")
        self.in_shape = (entries,)
        self.hamiltonian = ridge_energy(entries, width, linear=linear)
        pairs = entries * (entries - 1) // 2
        self.mixing = nn.Parameter(0.5 * torch.randn(pairs, entries) / math.sqrt(entries))
        self.offset = nn.Parameter(0.5 * torch.randn(pairs))

    @classmethod
    def example(cls) -> SkewGradientField:
        return cls(3, 4)

    def energy(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, " batch"]:
        """H(x) per sample."""
        return known_potential(self.hamiltonian, x)

    def gradient(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        """∇H(x) per sample."""
        value: Tensor = self.hamiltonian(x)
        return value

    def structure(self, x: Tensor, v: Tensor) -> Float[Tensor, "batch entries"]:
        """S(x)v per sample."""
        skew = skew_matrix(x @ self.mixing.mT + self.offset, self.in_shape[0])
        return (skew @ v.unsqueeze(-1)).squeeze(-1)

    def facts(self) -> FieldFacts:
        return FieldFacts(conserves_energy=True, reason="S(x)∇H(x), S skew")


class ProductionDestruction(VectorField):
    r"""Xᵢ(x) = Pᵢ(x) − Dᵢ(x)xᵢ with P, D >= 0: nonnegative states stay nonnegative.

    Example:
        >>> field = ProductionDestruction(2, 4)
        >>> bool((field(torch.zeros(1, 2)) >= 0).all())
        True
    """

    def __init__(self, entries: int, width: int) -> None:
        super().__init__()
        self.in_shape = (entries,)
        self.rates = ShallowNetwork(entries, 2 * entries, width)

    @classmethod
    def example(cls) -> ProductionDestruction:
        return cls(2, 4)

    def production_destruction(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """P(x) and D(x)."""
        produced, destroyed = nn.functional.softplus(self.rates(x)).chunk(2, dim=1)
        return produced, destroyed

    def forward(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        produced, destroyed = self.production_destruction(x)
        return produced - destroyed * x

    def facts(self) -> FieldFacts:
        return FieldFacts(positive=True, reason="P − D∘x with P, D >= 0")


class PositiveMidpoint(Integrator):
    r"""The midpoint rule of ẋ = P − D∘x with P, D frozen in each stage: x e^{−hD} + hPφ(−hD), φ(z) = (eᶻ − 1)/z.

    Order 2; both summands are nonnegative for h >= 0 and x >= 0, so positivity holds for every step.

    Condition: the field is a :class:`ProductionDestruction`.

    Example:
        >>> step = PositiveMidpoint().step(ProductionDestruction(2, 4), torch.zeros(1, 2), 100.0)
        >>> bool((step >= 0).all())
        True
    """

    order = 2
    keeps = frozenset({Positive})

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        self.require(field)
        assert isinstance(field, ProductionDestruction)
        step_size = over_states(step_size, x)
        half = _frozen(x, *field.production_destruction(x), 0.5 * step_size)
        return _frozen(x, *field.production_destruction(half), step_size)

    def why_not(self, field: VectorField) -> str | None:
        name = type(field).__name__
        if not isinstance(field, ProductionDestruction):
            return f"{self!r} needs a field of the form P − D∘x (ProductionDestruction); got {name}"
        if "production_destruction" in field._of_another:
            return f"{name} has a forward of its own, and P and D of another; give it production_destruction(x)"
        return None

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return math.inf, "sums of nonnegative terms"


def _frozen(x: Tensor, produced: Tensor, destroyed: Tensor, step_size: StepSize) -> Tensor:
    # D > 0 by softplus, so the quotient is safe but where it underflows.
    decay = step_size * destroyed
    small = decay.abs() < 1e-8
    share = torch.where(small, 1 - decay / 2, -torch.expm1(-decay) / torch.where(small, 1.0, decay))
    return x * torch.exp(-decay) + step_size * produced * share


def even_energy(entries: int, width: int, *, odd: bool, linear: bool = False) -> VectorField:
    """∇H for a learned H(x) = αᵀΓ(Ax + b) + ½xᵀQx, with ``linear`` + cᵀx, even where the field is to be odd."""
    if odd and linear:
        raise InvalidArgument("an even H has no linear term; leave out odd or linear.")
    energy = ridge_energy(entries, width, linear=linear)
    return EvenPotential(energy) if odd else energy
