"""Partitioned fields on x = (q, p): shears, whose flows are exact, and sums of two of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_choice, require_sizes, require_whole
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField, energy_of, over_states, potential_of
from dynablocks.fields.gradient import GradientField
from dynablocks.linear import Dense
from dynablocks.linear.maps import LOOSEST
from dynablocks.numerics.rounding import round_up
from dynablocks.properties import declare

if TYPE_CHECKING:
    from jaxtyping import Float

HALVES = ("q", "p")


def halves(x: Float[Tensor, "batch entries ..."], split: int) -> tuple[Tensor, Tensor]:
    """(q, p): the first ``split`` entries (channels of an image) and the others."""
    return x[:, :split], x[:, split:]


def _writes(x: Tensor) -> int | None:
    """How often x and what it is a view of were written to; ``None`` where that is not counted."""
    uncounted = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.is_inference()
    return None if uncounted else x._version


@FIELDS.register("shear")
class ShearField(VectorField):
    r"""X(q, p) = (0, v(q)), or (u(p), 0) with ``moves="q"``: one part moves, driven by the other, which rests.

    Its flow Φ_t(x) = x + tX(x) is one Euler step of any size and sign; |det DΦ_t| = 1 whatever v is, and v may be any
    module. Where v is a gradient field and both parts have one shape, X = 𝕁∇H with H(q, p) = −V(q) for v = ∇V, so the
    shear is symplectic: a gradient module of a SympNet (Jin et al., 2020) for v = Kᵀ diag(a) Σ(Kq + b).

    Args:
        force: v (or u): from the resting part to the rate of the moving one; a :class:`VectorField` says what it is, of
            another module only what it declares is known.
        in_shape: (entries, …) of x, cut along the first axis; by default twice that of ``force``, a square map.
        moves: ``"p"`` or ``"q"``.
        split: how many entries q has; by default half.

    Raises:
        InvalidArgument: the shape of x is unknown, no tuple of sizes, or cannot be cut at ``split``.

    Source: paper section 4.1, 4.2; design D2.9, D2.10.

    Example:
        >>> shear = ShearField(GradientField(Dense(2, 5), "tanh"))
        >>> x = torch.ones(1, 4)
        >>> bool((shear.flow(x, 3.0)[:, :2] == x[:, :2]).all()), shear.facts().hamiltonian
        (True, True)
    """

    def __init__(
        self,
        force: nn.Module,
        in_shape: tuple[int, ...] | None = None,
        *,
        moves: str = "p",
        split: int | None = None,
    ) -> None:
        super().__init__()
        self.force, self.moves = force, require_choice("moves", moves, HALVES)
        self.in_shape, self.split = _shape_and_split(force, in_shape, split)

    @classmethod
    def example(cls) -> ShearField:
        return cls(GradientField(Dense(2, 3), "tanh"))

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch entries ..."]:
        q, p = halves(x, self.split)
        if self.moves == "p":
            return torch.cat([torch.zeros_like(q), self.rate(q, p)], dim=1)
        return torch.cat([self.rate(p, q), torch.zeros_like(p)], dim=1)

    def rate(self, rests: Tensor, moves: Tensor) -> Tensor:
        """The force at the half that rests.

        Raises:
            InvalidArgument: it is not of the shape of the half that moves, or it is written over the half that rests.
        """
        writes = _writes(rests)
        # What is a view of the state is not for the force to change; where nobody would notice, it gets a copy.
        rate: Tensor = self.force(rests.clone() if writes is None else rests)
        if writes is not None and writes != _writes(rests):
            raise InvalidArgument(
                f"the force ({type(self.force).__name__}) changes its input in place, and with it the half of the "
                "state that rests; give it layers that do not, such as nn.ReLU() for nn.ReLU(inplace=True)."
            )
        if rate.shape != moves.shape:
            raise InvalidArgument(
                f"the force has shape {tuple(rate.shape)}, the half that it moves {tuple(moves.shape)}; a force has "
                "an entry for each of these, so give the gradient of a potential (conservative_field), not itself."
            )
        return rate

    def flow(self, x: Float[Tensor, "batch entries ..."], time: Tensor | float) -> Float[Tensor, "batch entries ..."]:
        q, p = halves(x, self.split)
        time = over_states(time, x)
        if self.moves == "p":
            return torch.cat([q, p + time * self.rate(q, p)], dim=1)
        return torch.cat([q + time * self.rate(p, q), p], dim=1)

    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        return x.new_zeros(x.shape[0])

    def flow_constant(self, time: float) -> tuple[float, str]:
        return self.euler_constant(time)

    def is_undone(self, time: float) -> bool:
        """Whether what is added to a half leaves its digits: the other half, which rests, tells what it was.

        Where no constant of the force is known it is taken for moderate.
        """
        if type(self).flow is not ShearField.flow:
            return super().is_undone(time)
        lipschitz = self.facts().lipschitz
        if math.isinf(lipschitz):
            return True
        return abs(time) * (lipschitz + self._rate_at_zero()) * self._roundoff() <= LOOSEST

    @torch.no_grad()
    def _rate_at_zero(self) -> float:
        """‖v(0)‖, which the constant of v leaves out; 0 of a force of another shape, which says so where it is used."""
        held = (part for part in (*self.parameters(), *self.buffers()) if part.is_floating_point())
        try:
            return float(self(next(held, torch.zeros(())).new_zeros(1, *self.in_shape)).norm())
        except (InvalidArgument, RuntimeError):
            return 0.0

    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        r"""s/2 + √(1 + s²/4) with s = |h|L: the norm of [[1, 0], [s, 1]]."""
        slope = abs(step_size) * self.facts().lipschitz if step_size else 0.0
        if math.isinf(slope):
            return math.inf, "no Lipschitz constant of the force is known"
        return math.nextafter(slope / 2 + math.hypot(1.0, slope / 2), math.inf), f"shear with |h|L = {slope:.4g}"

    def facts(self) -> FieldFacts:
        declared = self.force.facts().euclidean() if isinstance(self.force, VectorField) else None
        known = declare(self.force).properties
        lipschitz = known.lipschitz if declared is None else declared.lipschitz
        return replace(
            self._standing_facts(),
            lipschitz=lipschitz,
            one_sided=lipschitz / 2,
            odd=known.odd if declared is None else declared.odd,
            reason="nilpotent Jacobian" + (f", {declared.reason}" if declared and declared.reason else ""),
        )

    def _standing_facts(self) -> FieldFacts:
        known = self.force.standing_facts().euclidean() if isinstance(self.force, VectorField) else FieldFacts()
        equal = 2 * self.split == self.in_shape[0]
        return FieldFacts(divergence_free=True, hamiltonian=known.conservative and equal)

    def energy(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, " batch"]:
        """H(q, p) = −V(q) for v = ∇V, or U(p) for u = ∇U."""
        q, p = halves(x, self.split)
        return -potential_of(self.force, q) if self.moves == "p" else potential_of(self.force, p)

    def extra_repr(self) -> str:
        return f"moves {self.moves}, {self.split} of {self.in_shape[0]} entries are q"


def _shape_and_split(
    force: nn.Module, in_shape: tuple[int, ...] | None, split: int | None
) -> tuple[tuple[int, ...], int]:
    if in_shape is None:
        known = getattr(force, "in_shape", None)
        if known is None:
            raise InvalidArgument(f"{type(force).__name__} has no in_shape; give the shape of x = (q, p) as in_shape=.")
        in_shape = (2 * known[0], *known[1:])
    in_shape = require_sizes("in_shape", in_shape)
    chosen = in_shape[0] // 2 if split is None else require_whole("split", split)
    if not 0 < chosen < in_shape[0] or (split is None and in_shape[0] % 2):
        raise InvalidArgument(f"x of shape {in_shape} cannot be cut at {chosen}; give split= in 1 … {in_shape[0] - 1}.")
    return in_shape, chosen


@FIELDS.register("partitioned")
class PartitionedField(VectorField):
    r"""X(q, p) = (u(p), v(q)): divergence free, and Hamiltonian where u and v are gradient fields.

    It is the sum of two shears (:meth:`terms`), so every splitting method gives an explicit, invertible,
    volume-preserving step: symplectic Euler is Lie–Trotter, Störmer–Verlet is Strang. With H(q, p) = U(p) − V(q) for
    u = ∇U and v = ∇V the steps are symplectic.

    Args:
        u: the rate of q, from p; ``None`` is u(p) = p, the second-order field q̈ = v(q).
        v: the rate of p, from q.
        in_shape, split: as in :class:`ShearField`.

    Source: paper section 4.2; design D2.10.

    Example:
        >>> field = PartitionedField(GradientField(Dense(1, 4), "tanh"), GradientField(Dense(1, 4), "tanh"))
        >>> field.facts().hamiltonian, len(field.terms())
        (True, 2)
    """

    def __init__(
        self,
        u: nn.Module | None,
        v: nn.Module,
        in_shape: tuple[int, ...] | None = None,
        *,
        split: int | None = None,
    ) -> None:
        super().__init__()
        kick = ShearField(v, in_shape, moves="p", split=split)
        self.kick = kick
        half = (kick.in_shape[0] - kick.split, *kick.in_shape[1:])
        if u is None and half[0] != kick.split:
            raise InvalidArgument(
                f"split is {kick.split} of {kick.in_shape[0]} entries; without u the halves must be equal, since q̇ = p."
            )
        self.drift = ShearField(IdentityField(half) if u is None else u, kick.in_shape, moves="q", split=kick.split)
        self.in_shape = kick.in_shape

    @classmethod
    def example(cls) -> PartitionedField:
        return cls(GradientField(Dense(2, 3), "tanh", expansive=True), GradientField(Dense(2, 3), "tanh"))

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch entries ..."]:
        q, p = halves(x, self.kick.split)
        return torch.cat([self.drift.rate(p, q), self.kick.rate(q, p)], dim=1)

    def terms(self) -> tuple[VectorField, ...]:
        """The kick (0, v(q)) and the drift (u(p), 0)."""
        return self.kick, self.drift

    def facts(self) -> FieldFacts:
        kick, drift = self.kick.facts().euclidean(), self.drift.facts().euclidean()
        return replace(
            self._standing_facts(),
            lipschitz=max(kick.lipschitz, drift.lipschitz),
            one_sided=round_up((kick.lipschitz + drift.lipschitz) / 2),
            odd=kick.odd and drift.odd,
            reason="Jacobian of two off-diagonal blocks",
        )

    def _standing_facts(self) -> FieldFacts:
        hamiltonian = self.kick.standing_facts().hamiltonian and self.drift.standing_facts().hamiltonian
        return FieldFacts(divergence_free=True, hamiltonian=hamiltonian, conserves_energy=hamiltonian)

    def energy(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, " batch"]:
        """H(q, p) = U(p) − V(q)."""
        return energy_of(self.kick, x) + energy_of(self.drift, x)

    def _has_energy(self) -> bool:
        return super()._has_energy() and self.kick._has_energy() and self.drift._has_energy()


class IdentityField(VectorField):
    """X(x) = x = ∇‖x‖²/2."""

    def __init__(self, in_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.in_shape = in_shape

    def forward(self, x: Tensor) -> Tensor:
        return x

    def facts(self) -> FieldFacts:
        return FieldFacts.of_spectrum(1.0, 1.0, odd=True, reason="the identity")

    def potential(self, x: Tensor) -> Tensor:
        """‖x‖²/2 per sample."""
        return 0.5 * x.flatten(1).square().sum(1)
