"""Sums of fields, which splitting methods take apart again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields.base import FieldFacts, VectorField, energy_of, require_field
from dynablocks.numerics.rounding import EPS
from dynablocks.properties.structure import original

if TYPE_CHECKING:
    from jaxtyping import Float


def sum_of_facts(parts: Sequence[FieldFacts]) -> FieldFacts:
    r"""What the facts of X₁, …, X_k say of X₁ + … + X_k, in ℓ2.

    Constants add up, and so do the ends of spectra: λ_max(J₁ + J₂) <= λ_max(J₁) + λ_max(J₂) for symmetric J (Weyl). A
    fact that is linear in X holds where it holds of all parts, as do the signs of ``positive``; the rates of conformal
    Hamiltonian parts add up, a Hamiltonian one having γ = 0. Of energies nothing is said: the flow of another part may
    raise that of one.

    Example:
        >>> total = sum_of_facts([FieldFacts(spectrum=(-1.0, 0.0), odd=True), FieldFacts(2.0)])
        >>> 3.0 <= total.lipschitz < 3.0 + 1e-14, 2.0 <= total.one_sided < 2.0 + 1e-14, total.spectrum, total.odd
        (True, True, None, False)
    """
    known = [facts.euclidean() for facts in parts]
    spectra = [facts.spectrum for facts in known if facts.spectrum is not None]
    symmetric = len(spectra) == len(known)
    return FieldFacts(
        lipschitz=_sum_up([facts.lipschitz for facts in known]),
        one_sided=_sum_up([facts.one_sided for facts in known]),
        spectrum=_sum_of_intervals(spectra) if symmetric else None,
        conservative=all(facts.conservative for facts in known),
        odd=all(facts.odd for facts in known),
        linear_invariants=_common_invariants(known),
        divergence_free=all(facts.divergence_free for facts in known),
        hamiltonian=all(facts.hamiltonian for facts in known),
        damping=_sum_of_rates(known),
        tangent=all(facts.tangent for facts in known),
        positive=all(facts.positive for facts in known),
        reason=known[0].reason if symmetric else "sum of fields",
    )


def _sum_up(values: Sequence[float]) -> float:
    """A float above the sum of these numbers, which may cancel: the slack is that of their sizes; ∞ − ∞ is ∞."""
    total = sum(values) + 4 * len(values) * EPS * sum(map(abs, values))
    return math.inf if math.isnan(total) else total


def _sum_of_intervals(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """An interval that holds all sums of numbers of each."""
    return 0.0 - _sum_up([-low for low, _ in intervals]), _sum_up([high for _, high in intervals])


def _common_invariants(parts: Sequence[FieldFacts]) -> tuple[tuple[float, ...] | None, ...]:
    first, *others = parts
    return tuple(w for w in first.linear_invariants if all(w in facts.linear_invariants for facts in others))


def _sum_of_rates(parts: Sequence[FieldFacts]) -> float | None:
    """γ of a sum of fields 𝕁∇Hᵢ − γᵢ(0, p), at least one of which is damped."""
    rates = [facts.damping for facts in parts if facts.damping is not None]
    conformal = all(facts.hamiltonian or facts.damping is not None for facts in parts)
    return sum(rates) if rates and conformal else None


class SumField(VectorField):
    r"""X = X₁ + … + X_k, with the terms of its parts: splittings of three and more parts, of any fields with flows.

    It is what all its parts are: a gradient field, odd, tangent to spheres, of zero divergence, Hamiltonian, conformal
    Hamiltonian, with common linear invariants or signs; its constants are their sums. Where all are Hamiltonian its
    energy is H₁ + … + H_k. For gradient fields :class:`PotentialSum` has the potential as well.

    Args:
        fields: X₁, …, X_k, of one ``in_shape``.

    Raises:
        InvalidArgument: there are none, one is no vector field, or their shapes differ.

    Source: Hairer, Lubich and Wanner, "Geometric Numerical Integration", section II.5.

    Example:
        >>> import torch
        >>> from dynablocks.fields import Damping, SeparableHamiltonian
        >>> field = SumField(SeparableHamiltonian(entries=2), Damping((2,), 0.5, learned=False))
        >>> [type(term).__name__ for term in field.terms()], field.facts().damping
        (['ShearField', 'ShearField', 'Damping'], 0.5)
        >>> field(torch.ones(4, 2)).shape
        torch.Size([4, 2])
    """

    def __init__(self, *fields: VectorField) -> None:
        super().__init__()
        if not fields:
            raise InvalidArgument("a sum of no fields was asked for; give at least one: SumField(first, second).")
        chosen = [require_field(f"fields[{k}]", field) for k, field in enumerate(fields)]
        shapes = sorted({field.in_shape for field in chosen})
        if len(shapes) > 1:
            raise InvalidArgument(f"the fields of a sum have the shapes {shapes}; give fields of one in_shape.")
        self.fields, self.in_shape = nn.ModuleList(chosen), chosen[0].in_shape

    def _parts(self) -> tuple[VectorField, ...]:
        """X₁, …, X_k as they are now, a compiled one as what it was.

        Raises:
            InvalidArgument: one that was put in place of another is no vector field.
        """
        return tuple(require_field(f"fields[{k}]", original(field)) for k, field in enumerate(self.fields))

    def terms(self) -> tuple[VectorField, ...]:
        """The terms of X₁, those of X₂, …"""
        return tuple(term for field in self._parts() for term in field.terms())

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        first, *others = self.fields
        total: Tensor = first(x)
        for field in others:
            total = total + field(x)
        return total

    def energy(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """H₁ + … + H_k of Hamiltonian parts.

        Raises:
            InvalidArgument: a part is not Hamiltonian, or has no energy but that of another field.
        """
        if not self.standing_facts().hamiltonian:
            return super().energy(x)
        first, *others = self._parts()
        return sum((energy_of(field, x) for field in others), energy_of(first, x))

    def facts(self) -> FieldFacts:
        return self._with_energy(sum_of_facts([field.facts() for field in self._parts()]))

    def _standing_facts(self) -> FieldFacts:
        return self._with_energy(sum_of_facts([field.standing_facts() for field in self._parts()]))

    def _with_energy(self, facts: FieldFacts) -> FieldFacts:
        """𝕁∇H keeps its own H, whichever parts it is made of, where these have methods for it."""
        if not facts.hamiltonian or not self._has_energy():
            return facts
        return replace(facts, conserves_energy=True)

    def _has_energy(self) -> bool:
        return super()._has_energy() and all(field._has_energy() for field in self._parts())
