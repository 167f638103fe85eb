"""Fields that are a structure times the gradient of an energy, Hamiltonian ones first."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_sizes, require_whole
from dynablocks.fields.activations import Activation
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField, known_potential, why_no_potential
from dynablocks.fields.gradient import GradientField
from dynablocks.fields.partitioned import PartitionedField, halves
from dynablocks.fields.symmetric import (
    EvenPotential,
    PotentialSum,
    conservative_field,
    gradient_of,
    ridge_energy,
)
from dynablocks.linear import Dense
from dynablocks.numerics.rounding import EPS
from dynablocks.properties import declare

if TYPE_CHECKING:
    from jaxtyping import Float


def canonical(v: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch entries ..."]:
    """𝕁v = (v_p, −v_q) for v = (v_q, v_p).

    Example:
        >>> canonical(torch.tensor([[1.0, 2.0]]))
        tensor([[ 2., -1.]])
    """
    first, second = halves(v, v.shape[1] // 2)
    return torch.cat([second, -first], dim=1)


class EnergyField(VectorField):
    r"""X(x) = S(x)∇H(x): H is conserved where S is skew, dissipated where S + Sᵀ is negative semidefinite.

    A subclass gives :meth:`energy` and :meth:`structure`, and :meth:`gradient` where it has a closed form. Discrete
    gradient methods are made of these three.
    """

    def gradient(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """∇H(x) per sample, by automatic differentiation of :meth:`energy`."""
        return gradient_of(self.energy, x)

    @abstractmethod
    def structure(self, x: Float[Tensor, "batch ..."], v: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """S(x)v per sample, for every v: linear in v, ⟨v, S(x)v⟩ = 0 where H is conserved, <= 0 where it falls."""
        raise NotImplementedError(f"{type(self).__name__} must implement structure(x, v): the product S(x)v.")

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """X(x) = S(x)∇H(x)."""
        return self.structure(x, self.gradient(x))


@FIELDS.register("neural-hamiltonian")
class NeuralHamiltonian(EnergyField):
    r"""X = 𝕁∇H on x = (q, p), so q̇ = ∂H/∂p and ṗ = −∂H/∂q, for a learned H of any form.

    By default H(x) = αᵀΓ(Ax + b) + ½xᵀQx with gradients in closed form. The implicit midpoint rule is symplectic on it,
    discrete gradients conserve H. A Jacobian 𝕁∇²H with eigenvalues of ∇²H in [c₋, c₊] has the one-sided constant
    (c₊ − c₋)/2, since 𝕁(∇²H − cI) differs from it by a skew matrix.

    Args:
        entries: 2n, of x = (q, p), all positions and then all momenta.
        energy: H, a module (batch, 2n) ↦ (batch,) or (batch, 1), or the conservative field ∇H; ``None`` is the default.
        width: rows of A.
        sigma: σ = γ', a registry name or an :class:`Activation` with a primitive.
        quadratic: whether H has the term ½xᵀQx.
        even: take H(x) + H(−x) in place of H, which makes X odd.

    Raises:
        InvalidArgument: an odd number of entries, or an energy without a known potential.

    Source: design D2.9; Greydanus, Dzamba and Yosinski (2019), "Hamiltonian neural networks".

    Example:
        >>> field = NeuralHamiltonian(2, even=True)
        >>> x = torch.ones(1, 2)
        >>> bool((field(-x) == -field(x)).all()), field.facts().hamiltonian
        (True, True)
    """

    def __init__(
        self,
        entries: int,
        energy: nn.Module | None = None,
        *,
        width: int = 16,
        sigma: str | Activation = "tanh",
        quadratic: bool = True,
        even: bool = False,
    ) -> None:
        super().__init__()
        self.in_shape = (even_size(entries),)
        given = ridge_energy(entries, width, sigma, quadratic=quadratic) if energy is None else energy
        chosen = conservative_field(given, self.in_shape)
        if chosen.in_shape != self.in_shape:
            raise InvalidArgument(f"the energy is one of {chosen.in_shape}, the field one of {self.in_shape}.")
        self.hamiltonian: VectorField = EvenPotential(chosen) if even else chosen

    @classmethod
    def example(cls) -> NeuralHamiltonian:
        return cls(4, width=3)

    def energy(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, " batch"]:
        """H(x) per sample."""
        return known_potential(self.hamiltonian, x)

    def gradient(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        """∇H(x) per sample."""
        value: Tensor = self.hamiltonian(x)
        return value

    def structure(self, x: Tensor, v: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        """𝕁v = (v_p, −v_q)."""
        return canonical(v)

    def facts(self) -> FieldFacts:
        # It may have been replaced since the field was made.
        lost = why_no_potential(self.hamiltonian)
        if lost is not None:
            return FieldFacts(reason=lost)
        known = self.hamiltonian.facts().euclidean()
        one_sided = known.lipschitz
        if known.spectrum is not None:
            low, high = known.spectrum
            one_sided = min(one_sided, 0.5 * (high - low) + 4 * EPS * known.lipschitz)
        return replace(
            self._standing_facts(),
            lipschitz=known.lipschitz,
            one_sided=one_sided,
            odd=known.odd,
            reason=f"𝕁∇H, {known.reason}",
        )

    def _standing_facts(self) -> FieldFacts:
        known = why_no_potential(self.hamiltonian) is None
        return FieldFacts(divergence_free=known, hamiltonian=known, conserves_energy=known)


def even_size(entries: int) -> int:
    """``entries`` when x = (q, p) can be cut into equal halves.

    Raises:
        InvalidArgument: it is odd, below 2 or no whole number.
    """
    entries = require_whole("entries", entries)
    if entries < 2 or entries % 2:
        raise InvalidArgument(f"entries is {entries}; x = (q, p) needs an even number >= 2.")
    return entries


@FIELDS.register("separable-hamiltonian")
class SeparableHamiltonian(PartitionedField):
    r"""X = 𝕁∇H for H(q, p) = T(p) + V(q): q̇ = ∇T(p), ṗ = −∇V(q). Splittings (Verlet) are explicit and symplectic on it.

    Args:
        kinetic: T, as a scalar module or as the conservative field ∇T; ``None`` is ‖p‖²/2.
        potential: V, likewise; ``None`` is αᵀΓ(Aq + b) + ½qᵀQq with ``width`` rows.
        entries: 2n, of x = (q, p), all positions and then all momenta; needed unless ``potential`` is a field.
        width, sigma: of the default V.

    Raises:
        InvalidArgument: an odd or missing number of entries, or a part without a known potential.

    Source: design D2.9.

    Example:
        >>> spring = SeparableHamiltonian(None, nn.Linear(1, 1, bias=False), entries=2)
        >>> spring.facts().conserves_energy, spring.energy(torch.zeros(1, 2)).tolist()
        (True, [0.0])
    """

    def __init__(
        self,
        kinetic: nn.Module | None = None,
        potential: nn.Module | None = None,
        entries: int | None = None,
        *,
        width: int = 16,
        sigma: str | Activation = "tanh",
    ) -> None:
        half = None if entries is None else (even_size(entries) // 2,)
        if potential is None:
            if half is None:
                raise InvalidArgument("give entries=, the size of x = (q, p), or a potential.")
            potential = ridge_energy(half[0], width, sigma)
        elif half is None and not isinstance(potential, VectorField):
            raise InvalidArgument(
                f"the potential is a {type(potential).__name__}, which does not tell the shape of q; give entries=, "
                "the size of x = (q, p), or GradientOf(module, in_shape) in its place."
            )
        force = PotentialSum(conservative_field(potential, half), sign=-1.0)
        moved = None if kinetic is None else conservative_field(kinetic, half or force.in_shape)
        for name, part in (("potential", force), ("kinetic energy", moved)):
            if part is not None and part.in_shape != (half or force.in_shape):
                raise InvalidArgument(f"the {name} is one of {part.in_shape}; half of x is {half or force.in_shape}.")
        super().__init__(moved, force)

    @classmethod
    def example(cls) -> SeparableHamiltonian:
        return cls(None, None, 4, width=3)

    def gradient(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch entries ..."]:
        """∇H = (∇V(q), ∇T(p)) per sample."""
        q, p = halves(x, self.kick.split)
        return torch.cat([-self.kick.rate(q, p), self.drift.rate(p, q)], dim=1)

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        """𝕁v = (v_p, −v_q)."""
        return canonical(v)


@FIELDS.register("hamiltonian-embedding")
class HamiltonianEmbedding(EnergyField):
    r"""X(z, p) = (f(z), −(∂f/∂z)ᵀp) = 𝕁∇H with H(z, p) = pᵀf(z): any field f as the first half of a Hamiltonian one.

    On p = 0 it is (f(z), 0), so with E: z ↦ (z, 0) and P: (z, p) ↦ z the flow of f is P Φ^h E, and
    its step by a Runge–Kutta method P Ψ^h E with the same method; of others this need not hold.

    Args:
        field: f, from its ``in_shape`` to the same.
        in_shape: the shape of z where ``field`` does not know it.

    Raises:
        InvalidArgument: the shape of z is unknown, or no tuple of sizes.

    Source: paper section 2.2; design D2.8.

    Example:
        >>> from dynablocks.fields import GradientField
        >>> field = HamiltonianEmbedding(GradientField(Dense(2, 3), "tanh"))
        >>> z = torch.ones(1, 2)
        >>> bool(torch.allclose(field.restrict(field(field.embed(z))), field.field(z)))
        True
    """

    def __init__(self, field: nn.Module, in_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        known = getattr(field, "in_shape", None) if in_shape is None else in_shape
        if known is None:
            raise InvalidArgument(f"{type(field).__name__} has no in_shape; give the shape of z as in_shape=.")
        known = require_sizes("in_shape", known)
        self.field, self.in_shape = field, (2 * known[0], *known[1:])

    @classmethod
    def example(cls) -> HamiltonianEmbedding:
        return cls(GradientField(Dense(2, 3), "tanh"))

    def embed(self, z: Float[Tensor, "batch n ..."]) -> Float[Tensor, "batch twice ..."]:
        """(z, 0)."""
        return torch.cat([z, torch.zeros_like(z)], dim=1)

    def restrict(self, x: Float[Tensor, "batch twice ..."]) -> Float[Tensor, "batch n ..."]:
        """z of (z, p)."""
        return halves(x, self.in_shape[0] // 2)[0]

    def energy(self, x: Float[Tensor, "batch twice ..."]) -> Float[Tensor, " batch"]:
        """H(z, p) = pᵀf(z) per sample."""
        z, p = halves(x, self.in_shape[0] // 2)
        product: Tensor = p * self.field(z)
        return product.flatten(1).sum(1)

    def gradient(self, x: Float[Tensor, "batch twice ..."]) -> Float[Tensor, "batch twice ..."]:
        """∇H = ((∂f/∂z)ᵀp, f(z)): one product with the transposed Jacobian."""
        z, p = halves(x, self.in_shape[0] // 2)
        value, pull = torch.func.vjp(self.field, z)[:2]
        return torch.cat([pull(p)[0], value], dim=1)

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        """𝕁v = (v_p, −v_q)."""
        return canonical(v)

    def facts(self) -> FieldFacts:
        odd = self.field.facts().odd if isinstance(self.field, VectorField) else declare(self.field).properties.odd
        return replace(self._standing_facts(), odd=odd, reason="H = pᵀf(z) grows without bound in p")

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(divergence_free=True, hamiltonian=True, conserves_energy=True)
