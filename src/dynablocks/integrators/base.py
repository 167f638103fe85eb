"""What an integrator is: a one-step map of a vector field that declares what the map keeps of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, VectorField
from dynablocks.properties import Declaration, Equivariant, LinearInvariant, Property
from dynablocks.registry import Registry

StepSize = Tensor | float


class Integrator:
    """A one-step map Ψ^h of a vector field.

    A subclass implements :meth:`step` and :meth:`declare`.

    Attributes:
        order: the error of one step of size h is O(h^(order + 1)); ``None`` for an exact flow.
        explicit: no equation is solved.
        preserves: field facts every step carries over, for the docs table.
    """

    order: int | None
    explicit: bool = True
    preserves: tuple[str, ...] = ("linear invariants", "odd symmetry")

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        """Ψ^h(x) for a batch."""
        raise NotImplementedError

    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        """What the map x ↦ Ψ^h(x) is guaranteed to be, for this field and step."""
        raise NotImplementedError

    def inverse(self, field: VectorField, y: Tensor, step_size: StepSize) -> Tensor:
        """The x with Ψ^h(x) = y.

        Raises:
            InvalidArgument: this integrator has no closed-form inverse.
        """
        raise InvalidArgument(f"{self!r} has no closed-form inverse; use the exact flow.")

    def log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        """log |det DΨ^h(x)| per sample.

        Raises:
            InvalidArgument: there is no closed form.
        """
        raise InvalidArgument(f"{self!r} has no closed-form log-determinant; use the exact flow.")

    def inherited(self, facts: FieldFacts) -> list[Property]:
        """What every Runge–Kutta step and every exact flow inherits from the field."""
        kept: list[Property] = []
        if facts.linear_invariant:
            kept.append(LinearInvariant())
        if facts.odd:
            kept.append(Equivariant())
        return kept

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


INTEGRATORS: Registry[Callable[[], Integrator]] = Registry("integrator")


def integrator(given: str | Integrator) -> Integrator:
    """The integrator of a registry name, or the integrator itself.

    Example:
        >>> from dynablocks.integrators import integrator
        >>> integrator("heun").order
        2
    """
    return given if isinstance(given, Integrator) else INTEGRATORS.get_known(given)()
