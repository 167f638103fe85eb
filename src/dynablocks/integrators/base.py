"""What an integrator is: a one-step map of a vector field that declares what the map keeps of it."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, VectorField
from dynablocks.properties import (
    ConformalSymplectic,
    Declaration,
    Dissipative,
    EnergyPreserving,
    Equivariant,
    LinearInvariant,
    Lipschitz,
    NormPreserving,
    Positive,
    Property,
    Symplectic,
    VolumePreserving,
)
from dynablocks.registry import Registry

StepSize = Tensor | float

RUNGE_KUTTA_KEEPS: frozenset[type[Property]] = frozenset({LinearInvariant, Equivariant})
"""What every Runge–Kutta step inherits from the field."""

ADVICE: dict[type[Property], str] = {
    Symplectic: "verlet (separable fields) or implicit-midpoint keep it",
    ConformalSymplectic: "lie-trotter and strang keep it where the field's terms have exact flows",
    VolumePreserving: "lie-trotter and strang keep it where the field's terms have exact flows",
    NormPreserving: "cayley, lie-euler, calvo and implicit-midpoint keep it",
    EnergyPreserving: "gonzalez, mean-value and itoh-abe keep it",
    Dissipative: "gonzalez, mean-value and itoh-abe keep it",
    Positive: "patankar keeps it",
    LinearInvariant: "Runge–Kutta methods keep it",
    Equivariant: "Runge–Kutta methods keep it",
}
"""What solutions of a field can keep, and which methods carry each over to their steps."""

FLOW_PROPERTIES = frozenset(ADVICE)


class Integrator:
    """A one-step map Ψ^h of a vector field.

    A subclass implements :meth:`step` and :meth:`declare`.

    Attributes:
        order: the error of one step of size h is O(h^(order + 1)); ``None`` for an exact flow.
        explicit: no equation is solved.
        symmetric: Ψ^{−h} is the inverse of Ψ^h.
        keeps: the properties of the exact flow that every step has; none unless a subclass says so.
        solved: those of ``keeps`` that hold to :attr:`tolerance` only, because an equation is solved.
        tolerance: of the solver.
    """

    order: int | None
    explicit: bool = True
    symmetric: bool = False
    keeps: frozenset[type[Property]] = frozenset()
    solved: frozenset[type[Property]] = frozenset()
    tolerance: float = 0.0

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        """Ψ^h(x) for a batch."""
        raise NotImplementedError

    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        """What the map x ↦ Ψ^h(x) is guaranteed to be, for this field and step."""
        raise NotImplementedError

    def why_not(self, field: VectorField) -> str | None:
        """Why the method does not apply to this field, ``None`` when it does."""
        return None

    def require(self, field: VectorField) -> None:
        """Do nothing when the method applies to the field.

        Raises:
            InvalidArgument: it does not; the sentence says why.
        """
        reason = self.why_not(field)
        if reason is not None:
            raise InvalidArgument(f"{reason}.")

    def inverse(self, field: VectorField, y: Tensor, step_size: StepSize) -> Tensor:
        """The x with Ψ^h(x) = y: the step −h of a symmetric method.

        Raises:
            InvalidArgument: this integrator has no closed-form inverse.
        """
        if not self.symmetric:
            raise InvalidArgument(f"{self!r} has no closed-form inverse; use the exact flow or a symmetric method.")
        return self.step(field, y, -step_size)

    def log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        """log |det DΨ^h(x)| per sample: 0 for a volume-preserving step.

        Raises:
            InvalidArgument: there is no closed form.
        """
        kept, _ = self.inherited(field, 1.0)
        if not any(isinstance(p, VolumePreserving) for p in kept):
            raise InvalidArgument(f"{self!r} has no closed-form log-determinant; use the exact flow.")
        return x.new_zeros(x.shape[0])

    def inherited(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        """What the step keeps of what the exact flow keeps, and a sentence for each property that it loses."""
        kept: list[Property] = []
        losses: list[str] = []
        for owned in flow_properties(field, step_size):
            kind = type(owned)
            through_form = kind is VolumePreserving and Symplectic in self.keeps and field.facts().hamiltonian
            if kind in self.keeps or through_form:
                kept.append(owned.within(self.tolerance) if kind in self.solved else owned)
            else:
                losses.append(f"{kind.__name__} is lost: the flow has it, {self!r} does not keep it; {ADVICE[kind]}")
        return kept, losses

    @staticmethod
    def lipschitz(constant: float, field: VectorField) -> tuple[Lipschitz, ...]:
        """The constant in the metric of the field's facts; nothing when no constant is known."""
        return (Lipschitz(constant, field.facts().metric),) if math.isfinite(constant) else ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def flow_properties(field: VectorField, step_size: float) -> list[Property]:
    """What the exact flow Φ_h of the field is guaranteed to be, from the field's facts."""
    facts: FieldFacts = field.facts()
    found: list[Property] = []
    if facts.hamiltonian:
        found.append(Symplectic())
    if facts.damping is not None:
        found.append(ConformalSymplectic(math.exp(min(700.0, -facts.damping * step_size))))
    if facts.divergence_free:
        found.append(VolumePreserving())
    if facts.tangent:
        found.append(NormPreserving())
    found.extend(LinearInvariant(weights) for weights in facts.linear_invariants)
    if facts.odd:
        found.append(Equivariant())
    if facts.conserves_energy:
        found.append(EnergyPreserving(field.energy))
    if facts.dissipates_energy and step_size >= 0:
        found.append(Dissipative(field.energy))
    if facts.positive and step_size >= 0:
        found.append(Positive())
    return found


INTEGRATORS: Registry[Callable[[], Integrator]] = Registry("integrator")


def integrator(given: str | Integrator) -> Integrator:
    """The integrator of a registry name, or the integrator itself.

    Example:
        >>> integrator("euler")
        ExplicitEuler(substeps=1)
    """
    return given if isinstance(given, Integrator) else INTEGRATORS.get_known(given)()
