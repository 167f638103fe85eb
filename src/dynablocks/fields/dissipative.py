"""Fields that lose energy: gradient flows in a learned metric, and damped Hamiltonian fields."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.errors import InvalidArgument, require_range, require_sizes, require_whole
from dynablocks.fields.activations import Activation
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField, known_potential, why_no_potential
from dynablocks.fields.hamiltonian import EnergyField, SeparableHamiltonian, canonical, even_size
from dynablocks.fields.partitioned import IdentityField, halves
from dynablocks.fields.symmetric import conservative_field, ridge_energy
from dynablocks.numerics.bounds import linear_norm_bounds
from dynablocks.numerics.rounding import exp_up, round_up

if TYPE_CHECKING:
    from jaxtyping import Float


@FIELDS.register("dissipative")
class DissipativeField(EnergyField):
    r"""X(x) = −R∇V(x), R = LLᵀ: dV/dt = −‖Lᵀ∇V‖² <= 0. R is positive semidefinite, definite where L is regular.

    The Lipschitz constant is ‖L‖² Lip(∇V).

    Args:
        entries: n.
        energy: V, as a scalar module or as the conservative field ∇V; αᵀΓ(Ax + b) + ½xᵀQx when ``None``.
        width, sigma: rows of A and σ of the default V.

    Raises:
        InvalidArgument: a size is no whole number from 1, or the energy has no known potential or another shape.

    Source: design D2.12; McLachlan, Quispel and Robidoux (1999), "Geometric integration using discrete gradients".

    Example:
        >>> DissipativeField(2).facts().dissipates_energy
        True
    """

    def __init__(
        self,
        entries: int,
        energy: nn.Module | None = None,
        *,
        width: int = 16,
        sigma: str | Activation = "tanh",
    ) -> None:
        super().__init__()
        entries = require_whole("entries", entries, 1)
        self.in_shape = (entries,)
        self.slope = conservative_field(ridge_energy(entries, width, sigma) if energy is None else energy, (entries,))
        if self.slope.in_shape != self.in_shape:
            raise InvalidArgument(f"the energy is one of {self.slope.in_shape}, the field one of {self.in_shape}.")
        self.factor = nn.Parameter(torch.eye(entries) + 0.1 * torch.randn(entries, entries))

    @classmethod
    def example(cls) -> DissipativeField:
        return cls(3, width=4)

    def energy(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """V(x) per sample."""
        return known_potential(self.slope, x)

    def gradient(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """∇V(x) per sample."""
        value: Tensor = self.slope(x)
        return value

    def structure(self, x: Tensor, v: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """−Rv = −L(Lᵀv), for every v: ⟨v, −Rv⟩ = −‖Lᵀv‖² <= 0."""
        return -functional.linear(v @ self.factor, self.factor)

    def facts(self) -> FieldFacts:
        # It may have been replaced since the field was made.
        lost = why_no_potential(self.slope)
        if lost is not None:
            return FieldFacts(reason=lost)
        known, norm = self.slope.facts().euclidean(), linear_norm_bounds(self.factor.detach()).upper
        # Upwards also where products of tiny numbers underflow.
        size = math.nextafter(norm * norm, math.inf) if norm else 0.0
        lipschitz = math.nextafter(size * known.lipschitz, math.inf) if size and known.lipschitz else 0.0
        return replace(
            self._standing_facts(),
            lipschitz=lipschitz,
            one_sided=lipschitz,
            odd=known.odd,
            reason=f"−LLᵀ∇V, ‖L‖² <= {size:.4g}",
        )

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(dissipates_energy=why_no_potential(self.slope) is None)


@FIELDS.register("damping")
class Damping(VectorField):
    r"""X(q, p) = (0, −γp), γ >= 0, with the flow (q, e^{−γt}p): it multiplies the symplectic form by e^{−γt}.

    Args:
        in_shape: (entries, …) of x = (q, p), cut into equal halves along the first axis.
        gamma: γ per unit of time; the start where it is learned (then γ = softplus(c) for a free c).
        learned: whether γ is learned.

    Raises:
        InvalidArgument: γ < 0, or γ = 0 where it is learned; no tuple of sizes, or an odd number of entries.

    Source: McLachlan and Perlmutter (2001), "Conformal Hamiltonian systems".

    Example:
        >>> Damping((2,), 0.5, learned=False).flow(torch.ones(1, 2), 2.0)
        tensor([[1.0000, 0.3679]])
    """

    def __init__(self, in_shape: tuple[int, ...], gamma: float = 0.1, *, learned: bool = True) -> None:
        super().__init__()
        require_range("gamma", gamma, 0.0, 1e6, open_low=learned)
        in_shape = require_sizes("in_shape", in_shape)
        self.in_shape, self.fixed = (even_size(in_shape[0]), *in_shape[1:]), float(gamma)
        # softplus(c) = γ for c = γ + log(1 − e^{−γ}).
        self.free = nn.Parameter(torch.tensor(gamma + math.log(-math.expm1(-gamma)))) if learned else None

    @classmethod
    def example(cls) -> Damping:
        return cls((4,))

    @property
    def split(self) -> int:
        """The number of entries of q, half of all: the factor of the form rests on it, so that it cannot be set."""
        return self.in_shape[0] // 2

    def gamma(self) -> Tensor | float:
        """γ, differentiable where it is learned."""
        return self.fixed if self.free is None else functional.softplus(self.free)

    def rate(self) -> float:
        """γ as a number.

        Raises:
            InvalidArgument: it is negative, as that of a subclass may be, or no finite number.
        """
        gamma = self.gamma()
        return require_range("gamma", float(gamma.detach() if isinstance(gamma, Tensor) else gamma), 0.0)

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch entries ..."]:
        q, p = halves(x, self.split)
        return torch.cat([torch.zeros_like(q), -self.gamma() * p], dim=1)

    def flow(self, x: Float[Tensor, "batch entries ..."], time: Tensor | float) -> Float[Tensor, "batch entries ..."]:
        q, p = halves(x, self.split)
        return torch.cat([q, self._exponent(x, time).exp() * p], dim=1)

    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        """−γt for each entry of p."""
        return (self._exponent(x, time).flatten() * x[:, self.split :].shape[1:].numel()).expand(x.shape[0])

    def _exponent(self, x: Tensor, time: Tensor | float) -> Tensor:
        return torch.as_tensor(-self.gamma() * time, dtype=x.dtype, device=x.device)

    def is_undone(self, time: float) -> bool:
        """Yes: rounding of a multiple of p is relative to it."""
        return type(self).flow is Damping.flow or super().is_undone(time)

    def flow_constant(self, time: float) -> tuple[float, str]:
        """max(1, e^{−γt})."""
        exponent = -self.rate() * time
        constant = 1.0 if exponent <= 0 else exp_up(exponent)
        return constant, f"q rests, p is multiplied by e^{exponent:.4g}"

    def facts(self) -> FieldFacts:
        gamma = round_up(self.rate())
        known = FieldFacts.of_spectrum(-gamma, 0.0, odd=True, reason=f"damping γ = {gamma:.4g}")
        # Where a subclass cuts elsewhere it damps other entries than p, and the form has no factor.
        return replace(known, damping=self.rate()) if 2 * self.split == self.in_shape[0] else known

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=True)


@FIELDS.register("damped-hamiltonian")
class DampedHamiltonian(SeparableHamiltonian):
    r"""q̇ = ∇T(p), ṗ = −∇V(q) − γp, γ >= 0: conformal Hamiltonian, its flow multiplies the symplectic form by e^{−γt}.

    The three terms kick, drift and damping have exact flows, so splittings are exactly conformal symplectic, with the
    factor e^{−γh}. H = T + V falls along solutions where pᵀ∇T(p) >= 0: for ‖p‖²/2 (then X = S∇H with
    S = [[0, I], [−I, −γI]]), and for every convex even T.

    Args:
        kinetic, potential, entries, width, sigma: as for :class:`SeparableHamiltonian`.
        gamma, learned: as for :class:`Damping`.

    Source: McLachlan and Perlmutter (2001), "Conformal Hamiltonian systems"; Bhatt, Floyd and Moore (2016),
        "Second order conformal symplectic schemes for damped Hamiltonian systems".

    Example:
        >>> field = DampedHamiltonian(entries=2, gamma=0.5, learned=False)
        >>> field.facts().damping, field.facts().dissipates_energy, len(field.terms())
        (0.5, True, 3)
    """

    def __init__(
        self,
        kinetic: nn.Module | None = None,
        potential: nn.Module | None = None,
        entries: int | None = None,
        *,
        gamma: float = 0.1,
        learned: bool = True,
        width: int = 16,
        sigma: str | Activation = "tanh",
    ) -> None:
        super().__init__(kinetic, potential, entries, width=width, sigma=sigma)
        self.damping = Damping(self.in_shape, gamma, learned=learned)

    @classmethod
    def example(cls) -> DampedHamiltonian:
        return cls(None, None, 4, width=3)

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch entries ..."]:
        rate: Tensor = self.damping(x)
        return super().forward(x) + rate

    def energy(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, " batch"]:
        """H(q, p) = T(p) + V(q), that of the field without damping."""
        return super().energy(x)

    def terms(self) -> tuple[VectorField, ...]:
        """The kick (0, −∇V(q)), the damping (0, −γp) and the drift (∇T(p), 0)."""
        return self.kick, self.damping, self.drift

    def _damps_momenta(self) -> bool:
        """Whether the damping is that of p and of nothing else: it may have been replaced since the field was made."""
        known = self.damping.standing_facts().conservative and self.damping.in_shape == self.in_shape
        return known and 2 * self.damping.split == self.in_shape[0]

    def _is_conformal(self) -> bool:
        """Whether X is still 𝕁∇H − γ(0, p), by its parts as they are now."""
        return self._damps_momenta() and all(part.standing_facts().hamiltonian for part in (self.kick, self.drift))

    def why_no_structure(self) -> str | None:
        """Why X is not S∇H with a constant S, ``None`` when it is."""
        if not self._damps_momenta():
            return f"the {type(self.damping).__name__} of a damped Hamiltonian field is not known to damp p alone"
        # A subclass is another T.
        if type(self.drift.force) is IdentityField:
            return None
        return "a damped Hamiltonian field is S∇H for T(p) = ‖p‖²/2 only (kinetic=None)"

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        """(v_p, −v_q − γv_p), for every v: ⟨v, Sv⟩ = −γ‖v_p‖² <= 0.

        Raises:
            InvalidArgument: T is not ‖p‖²/2, or something else than p is damped.
        """
        reason = self.why_no_structure()
        if reason is not None:
            raise InvalidArgument(f"{reason}; use a splitting method.")
        rate: Tensor = self.damping(v)
        return canonical(v) + rate

    def facts(self) -> FieldFacts:
        kick, drift, damping = self.kick.facts(), self.drift.facts(), self.damping.facts()
        force = self.drift.force.facts() if isinstance(self.drift.force, VectorField) else FieldFacts()
        # A monotone odd ∇T vanishes at 0, so pᵀ∇T(p) >= 0.
        monotone = force.odd and force.spectrum is not None and force.spectrum[0] >= 0
        gamma = damping.damping if self._is_conformal() else None
        return FieldFacts(
            lipschitz=round_up(max(kick.lipschitz, drift.lipschitz) + damping.lipschitz),
            one_sided=round_up((kick.lipschitz + drift.lipschitz) / 2 + max(0.0, damping.one_sided)),
            odd=kick.odd and drift.odd and damping.odd,
            damping=gamma,
            dissipates_energy=gamma is not None and gamma >= 0 and monotone and self._has_energy(),
            reason=f"{'kick and drift' if gamma is None else '𝕁∇H'} with damping γ = {damping.lipschitz:.4g}",
        )

    def _standing_facts(self) -> FieldFacts:
        conformal = type(self.drift.force) is IdentityField and self._is_conformal()
        return FieldFacts(dissipates_energy=conformal and self._has_energy())
