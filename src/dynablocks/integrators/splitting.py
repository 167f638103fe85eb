"""Splitting methods: compositions of the flows of a field's terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from dynablocks.errors import InvalidArgument, require_finite, require_whole
from dynablocks.fields import VectorField
from dynablocks.integrators.base import APART, FLOW_PROPERTIES, INTEGRATORS, Integrator, StepSize, why_no_way_back
from dynablocks.integrators.exact import ExactFlow
from dynablocks.properties import Declaration, Dissipative, EnergyPreserving, Properties
from dynablocks.properties.own_code import shadowed
from dynablocks.properties.structure import fold

CUBE, FIFTH = 2 ** (1 / 3), 2 ** (1 / 5)
YOSHIDA4 = (1 / (2 - CUBE), -CUBE / (2 - CUBE), 1 / (2 - CUBE))
SUZUKI4 = (1 / (4 - 4 ** (1 / 3)),) * 2 + (1 - 4 / (4 - 4 ** (1 / 3)),) + (1 / (4 - 4 ** (1 / 3)),) * 2
YOSHIDA6 = tuple(a * b for a in (1 / (2 - FIFTH), -FIFTH / (2 - FIFTH), 1 / (2 - FIFTH)) for b in YOSHIDA4)


class Splitting(Integrator):
    r"""Exact flows of the terms of X = X₁ + … + X_k in turn.

    Lie–Trotter: Φ^h_{X_k} ∘ … ∘ Φ^h_{X₁} (order 1). Strang: Φ^{h/2}_{X₁} ∘ … ∘ Φ^h_{X_k} ∘ … ∘ Φ^{h/2}_{X₁} (order 2,
    symmetric). A composition with weights γ makes Strang steps of γ₁h, …, γ_s h: Σγᵢ = 1 and Σγᵢ³ = 0 give order 4
    (Yoshida, 1990; Suzuki, 1990). Orders above 2 need a negative γ, so a term that contracts expands there: no
    non-expansive claim survives.

    ``symplectic-euler`` is Lie–Trotter, ``verlet`` is Strang. The first term of a partitioned field is the kick
    (0, v(q)), so ``symplectic-euler`` moves p first. That of the paper's section 4.1, its adjoint, moves q first: it is
    Lie–Trotter of ``SumField(field.drift, field.kick)``, since the terms of a sum are taken in the order given.

    One Lie–Trotter step of two Lipschitz terms, differentiable or not, errs by O(h²) (bound and proof: Mathematics in
    the docs, appendix D).

    A step is what its substeps are: symplectic, volume-preserving or invertible when all of them are.

    Condition: every term has a closed-form flow.

    Args:
        name: the registry name.
        order: of the method: 1 for Lie–Trotter, for weights at most 2, and above it at most what Σγᵢ³ = 0 allows;
            beyond order 4 it is taken on trust.
        weights: γ; ``None`` for Lie–Trotter.

    Raises:
        InvalidArgument: the weights are no finite numbers of sum 1, or do not have the order.

    Source: Hairer, Lubich and Wanner, "Geometric Numerical Integration", sections II.4, II.5; paper appendix D.

    Example:
        >>> INTEGRATORS["strang"]().order, round(sum(YOSHIDA4), 12)
        (2, 1.0)
    """

    order: int
    keeps = FLOW_PROPERTIES - {EnergyPreserving, Dissipative}

    def __init__(self, name: str, order: int, weights: tuple[float, ...] | None) -> None:
        # Substeps of one's own may have any order without weights.
        lie_trotter = weights is None and type(self).substeps is Splitting.substeps
        self.name, self.order = name, require_whole("order", order, 1, 1 if lie_trotter else None)
        self.weights = None if weights is None else _checked(name, self.order, weights)
        self.symmetric = self.weights is not None and self.weights == self.weights[::-1]
        self._exact = ExactFlow()

    def substeps(self, field: VectorField) -> list[tuple[VectorField, float]]:
        """(term, fraction of h) in the order in which they are applied; equal neighbours are one substep."""
        terms = field.terms()
        if self.weights is None:
            return [(term, 1.0) for term in terms]
        found: list[tuple[VectorField, float]] = []
        for weight in self.weights:
            outer = [(term, weight / 2) for term in terms[:-1]]
            for term, part in [*outer, (terms[-1], weight), *reversed(outer)]:
                if found and found[-1][0] is term:
                    part += found.pop()[1]
                found.append((term, part))
        return found

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        for term, part in self.substeps(field):
            x = self._exact.step(term, x, part * step_size)
        return x

    def inverse(self, field: VectorField, y: Tensor, step_size: StepSize) -> Tensor:
        for term, part in reversed(self.substeps(field)):
            y = self._exact.step(term, y, -part * step_size)
        return y

    def log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        return self._both(field, x, step_size)[1]

    def with_log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> tuple[Tensor, Tensor]:
        if any(shadowed(self, name) for name in APART):
            return super().with_log_determinant(field, x, step_size)
        return self._both(field, x, step_size)

    # Neither of the two may rest on the other, which may be one of a subclass.
    def _both(self, field: VectorField, x: Tensor, step_size: StepSize) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for term, part in self.substeps(field):
            x, change = self._exact.with_log_determinant(term, x, part * step_size)
            total = total + change
        return x, total

    def why_not(self, field: VectorField) -> str | None:
        reasons = (term.why_no_flow() for term in field.terms())
        return next((f"{self.name} needs terms with exact flows; {reason}" for reason in reasons if reason), None)

    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        self.require(field)
        unspoken = self.why_unspoken(field, step_size)
        if unspoken is not None:
            return Declaration.of(reason=unspoken, title=self.title(step_size))
        declared = tuple(
            (f"substep{i}", self._exact.declare(term, part * step_size, bound))
            for i, (term, part) in enumerate(self.substeps(field))
        )
        kept, folded = fold(declared)
        _, losses = self.inherited(field, step_size)
        negative = any(part * step_size < 0 for _, part in self.substeps(field)) and step_size > 0
        if negative and self.order > 2:
            losses.append(f"Lipschitz grows: order {self.order} needs negative substeps, in which contraction expands")
        names = {loss.split()[0] for loss in losses}
        kept = [p for p in kept if type(p) in self.keeps or type(p) not in FLOW_PROPERTIES]
        own = [loss for loss in folded if loss.split()[0] not in names]
        moves = why_no_way_back(field)
        if moves is not None and not any(loss.startswith("Invertible") for loss in own):
            own.append(moves)  # where no substep is invertible none loses it
        reason = "composition of exact flows"
        return Declaration(Properties(kept), reason, declared, (*losses, *own), self.title(step_size))


def _checked(name: str, order: int, given: Sequence[float]) -> tuple[float, ...]:
    """The weights γ of Strang steps as floats, once Σγ = 1 and Σγ³ = 0 hold where the order asks for them."""
    try:
        weights = tuple(require_finite("weight", float(weight)) for weight in given)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"the weights of {name!r} are {given!r}; a tuple of finite numbers is needed.") from error
    slack = 1e-12 * (1 + sum(abs(weight) ** 3 for weight in weights))
    total, cubes = math.fsum(weights), math.fsum(weight**3 for weight in weights)
    if not weights or abs(total - 1) > slack:
        raise InvalidArgument(f"the weights of {name!r} sum up to {total:.12g}; a step of size h needs the sum 1.")
    if order > 2 and (abs(cubes) > slack or (order > 3 and weights != weights[::-1])):
        raise InvalidArgument(
            f"the weights of {name!r} do not have order {order}: above 2 Σγ³ must be 0 (it is {cubes:.3g}), above 3 "
            "they must be the same read backwards, too."
        )
    return weights


for _names, _order, _weights in (
    (("lie-trotter", "symplectic-euler"), 1, None),
    (("strang", "verlet"), 2, (1.0,)),
    (("yoshida4",), 4, YOSHIDA4),
    (("suzuki4",), 4, SUZUKI4),
    (("yoshida6",), 6, YOSHIDA6),
):
    for _name in _names:
        INTEGRATORS[_name] = partial(Splitting, _name, _order, _weights)
