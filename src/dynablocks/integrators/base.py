"""What an integrator is: a one-step map of a vector field that declares what the map keeps of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.fields import FieldFacts, VectorField
from dynablocks.integrators.solver import Residual, solve
from dynablocks.linear import LinearMap, UnitNorm
from dynablocks.properties import (
    ConformalSymplectic,
    Declaration,
    Dissipative,
    EnergyPreserving,
    Equivariant,
    Invertible,
    LinearInvariant,
    Lipschitz,
    NormPreserving,
    Positive,
    Property,
    Symplectic,
    VolumePreserving,
)
from dynablocks.properties.own_code import foreign, replaced, shadowed
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


CLAIMS = ("keeps", "step_constant", "guarantees", "declare")
"""What an integrator says of its step."""

STEPPING = ("step", "solve")
"""The methods that a step is made of; :class:`ImplicitIntegrator` has the second."""

TWINS = {"inverse": ("inverse", "symmetric", "guarantees", "declare"), "log_determinant": ("log_determinant",)}
"""The methods that are of one step and no other, and what a class with a step of its own says to have them."""

APART = ("step", "log_determinant")
"""The methods that :meth:`Integrator.with_log_determinant` stands for."""

ROUGH = 1e-12
"""Solved to more than this, which is not much above float64's rounding, a step has no Lipschitz constant.

Two states that take one iteration more or less are moved apart by as much as the solver leaves, however near they are.
"""

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Parameters of these formats are looked at for what is no number."""


class Integrator:
    """A one-step map Ψ^h of a vector field.

    A subclass implements :meth:`step`, and :meth:`step_constant` where a constant is known. It extends
    :meth:`guarantees` where a step is more, or less, than what ``keeps`` says, and :meth:`why_not` where it does not
    take every field. :meth:`declare` puts them together. :func:`dynablocks.testing.check_integrator` holds a method
    against what it says.

    Attributes:
        name: which method it is, for a class of several.
        order: the error of one step of size h is O(h^(order + 1)); ``None`` for an exact flow
            (:func:`dynablocks.integrators.measured_order` measures it). There is no default.
        explicit: no equation is solved.
        symmetric: Ψ^{−h} is the inverse of Ψ^h, for every field that the method takes; an explicit step is declared
            :class:`~dynablocks.properties.Invertible` for it (:meth:`guarantees`).
        keeps: the properties of the exact flow that every step has; none unless a subclass says so.
        solved: those of ``keeps`` that hold to :attr:`tolerance` only, because an equation is solved
            (:meth:`tolerance_of`). What follows from them does, too.
        tolerance: of the solver.
    """

    name: str = ""
    order: int | None
    explicit: bool = True
    symmetric: bool = False
    keeps: frozenset[type[Property]] = frozenset()
    solved: frozenset[type[Property]] = frozenset()
    tolerance: float = 0.0
    _own_symmetry: bool = True
    _own_inverse: bool = True
    _own_keeps: bool = True

    def __init_subclass__(cls, **given: Any) -> None:
        """A step of a subclass is guaranteed only what the subclass says of it, whatever it inherits.

        Nor is it undone by the inverse of the step that it replaces, or changes volume as that did. It says so by
        attributes and methods of the class: what an ``__init__`` sets may be of the step before.
        """
        super().__init_subclass__(**given)
        silent = [claim for claim in CLAIMS if replaced(cls, STEPPING, (claim, "declare"), (Integrator,))]
        silent += [method for method, said in TWINS.items() if replaced(cls, STEPPING, said, (Integrator,))]
        # What was silenced stays so in subclasses of the subclass, until one of them speaks.
        spoken = any(map(vars(cls).get, ("inverse", "symmetric")))
        cls._own_inverse = "inverse" not in silent and (cls._own_inverse or spoken)
        cls._own_keeps = "keeps" not in silent and (cls._own_keeps or "keeps" in vars(cls))
        if replaced(cls, ("inverse",), ("guarantees", "declare"), ()):
            silent += ["guarantees", "declare"]
        if replaced(cls, APART, ("with_log_determinant",), ()):
            silent += ["with_log_determinant"]
        for claim in silent:
            setattr(cls, claim, vars(Integrator)[claim])
        # What is inherited of it, set in an __init__ or not, is said of the step that is replaced.
        cls._own_symmetry = replaced(cls, STEPPING, ("symmetric",), (Integrator,)) is None

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        """Ψ^h(x) for a batch.

        What is declared is of a step that does not depend on the state. With h(x) the Jacobian DΨ^h gains
        ∂Ψ^h/∂h (∇h)ᵀ: the symplectic form and volume are lost, and the constant is another.

        Args:
            field: X.
            x: the states, (batch, …).
            step_size: h of either sign: a number, a tensor of one for all states, or one a state, (batch,) or
                (batch, 1), which :func:`dynablocks.integrators.over_states` shapes to multiply states. Without it
                (batch,) would multiply entries wherever there are as many of them as states.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement step(field, x, step_size): Ψ^h(x) for a batch x of states, with h a "
            "number or, shaped by over_states(step_size, x), one a state."
        )

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        """A Lipschitz constant of Ψ^h in the metric of the field's facts, and the reason.

        Where no constant is known it is infinite, and the reason says what the other guarantees stand on. ``bound`` is
        ``"tight"`` or ``"paper"``, as in :class:`dynablocks.blocks.DynamicalBlock`.
        """
        return math.inf, "no Lipschitz constant is known"

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        """What Ψ^h is beside its constant, and a sentence for each property that it loses.

        By default what is inherited, and :class:`~dynablocks.properties.Invertible` where the step is explicit and
        ``symmetric``: then :meth:`inverse`, Ψ^{−h}, undoes Ψ^h but for rounding. An implicit step says it itself, since
        its equation is solved to a tolerance, and has one solution for small steps alone.
        """
        kept, losses = self.inherited(field, step_size)
        undone = self.symmetric and self._own_symmetry and type(self).inverse is Integrator.inverse
        return [*kept, Invertible()] if undone and self.explicit else kept, losses

    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        """What the map x ↦ Ψ^h(x) is guaranteed to be, for this field and step.

        Nothing where the step or a parameter is no finite number; and no way back while a map in training makes another
        weight at each use (:class:`~dynablocks.linear.UnitNorm`).

        Raises:
            InvalidArgument: the method does not apply to the field.
        """
        self.require(field)
        unspoken = self.why_unspoken(field, step_size)
        if unspoken is not None:
            return Declaration.of(reason=unspoken, title=self.title(step_size))
        constant, reason = self.step_constant(field, step_size, bound)
        known = [Lipschitz(constant, field.facts().metric)] if math.isfinite(constant) else []
        kept, losses = self.guarantees(field, step_size)
        if known and self.tolerance > ROUGH:
            rough = f"solved to {self.tolerance:.1e}, a step may jump; take a tolerance of at most {ROUGH:g}"
            known, losses = [], [f"Lipschitz is lost: {rough}", *losses]
        moves = why_no_way_back(field)
        if moves and any(isinstance(owned, Invertible) for owned in kept):
            kept = [owned for owned in kept if not isinstance(owned, Invertible)]
            losses = [*losses, moves]
        return Declaration.of(*known, *kept, reason=reason, title=self.title(step_size), losses=losses)

    def why_unspoken(self, field: VectorField, step_size: float) -> str | None:
        """Why nothing is said of a step, whose code is foreign or which is made of no numbers; ``None`` otherwise."""
        return self.foreign_code(field) or why_no_numbers(field, step_size)

    def foreign_code(self, field: VectorField) -> str | None:
        """Why the step is not what the classes of the method and of the field say, ``None`` where it is."""
        own = next((name for name in (*STEPPING, "inverse") if shadowed(self, name)), None)
        return foreign(field) if own is None else f"{self!r} has a {own} of this instance, not of its class"

    def title(self, step_size: float) -> str:
        """The name and the step size, above what is declared."""
        return f"{self.name or type(self).__name__}(h={step_size:.5g})"

    def why_not(self, field: VectorField) -> str | None:
        """Why the method does not apply to this field, ``None`` when it does: a sentence without its full stop.

        A block asks when it is made: let the answer follow from the structure, ``field.standing_facts()``, and not from
        what the parameters are at the moment.
        """
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
        if not (self.symmetric and self._own_inverse):
            raise InvalidArgument(f"{self!r} has no closed-form inverse; use the exact flow or a symmetric method.")
        return self.step(field, y, -step_size)

    def log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        """log |det DΨ^h(x)| per sample: 0 for a volume-preserving step.

        Raises:
            InvalidArgument: there is no closed form.
        """
        kept, _ = self.inherited(field, 1.0)
        if not any(isinstance(p, VolumePreserving) for p in kept):
            raise InvalidArgument(
                f"{self!r} has no closed-form log-determinant; use the exact flow, or give the method's class a "
                "log_determinant(field, x, step_size)."
            )
        return x.new_zeros(x.shape[0])

    def with_log_determinant(self, field: VectorField, x: Tensor, step_size: StepSize) -> tuple[Tensor, Tensor]:
        """What :meth:`step` and :meth:`log_determinant` give, which a method where they share work computes at once.

        A subclass that replaces one of them is asked for the two apart again, unless it has this method as well.

        Raises:
            InvalidArgument: as :meth:`log_determinant`.
        """
        change = self.log_determinant(field, x, step_size)
        return self.step(field, x, step_size), change

    def tolerance_of(self, kind: type[Property], field: VectorField) -> float:
        """To what a step keeps a property of ``keeps``: :attr:`tolerance` for those of ``solved``, 0 for others.

        A method that keeps it of some fields alone to rounding says so here.
        """
        return self.tolerance if kind in self.solved else 0.0

    def inherited(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        """What the step keeps of what the exact flow keeps, and a sentence for each property that it loses.

        One that keeps the symplectic form keeps volume (:func:`volume_tolerance`).
        """
        kept: list[Property] = []
        losses: list[str] = []
        # What an __init__ that is inherited says of it is said of the step that is replaced.
        keeps = self.keeps if self._own_keeps else frozenset()
        for owned in flow_properties(field, step_size):
            kind = type(owned)
            if kind in keeps:
                kept.append(owned.within(self.tolerance_of(kind, field)))
            elif kind is VolumePreserving and Symplectic in keeps and field.facts().hamiltonian:
                of_form = self.tolerance_of(Symplectic, field)
                kept.append(owned.within(volume_tolerance(of_form, math.prod(field.in_shape))))
            else:
                losses.append(f"{kind.__name__} is lost: the flow has it, {self!r} does not keep it; {ADVICE[kind]}")
        if ConformalSymplectic in keeps and _factor_is_lost(field.facts(), step_size):
            losses.append("ConformalSymplectic is lost: its factor is beyond what a float holds; take shorter steps")
        return kept, losses

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"


class ImplicitIntegrator(Integrator):
    """A method whose step is the solution of an equation, which its :meth:`step` hands to :meth:`solve`.

    Args:
        tolerance: of the solver, relative (:func:`dynablocks.integrators.solver.solve`); above 1e-12 no Lipschitz
            constant is declared, since a step that is solved so roughly may jump.
        max_iterations: of the solver, at least 1.

    Raises:
        InvalidArgument: one of them is out of range.

    A subclass with a :meth:`solve` of its own is one with another step: it is guaranteed what it says itself.

    Example:
        >>> import torch
        >>> from dynablocks.fields import LinearField
        >>> from dynablocks.integrators import over_states
        >>> class ImplicitEuler(ImplicitIntegrator):
        ...     order = 1
        ...     def step(self, field, x, step_size):
        ...         return self.solve(lambda z, x, h: z - x - h * field(z), x, x, over_states(step_size, x))
        >>> field = LinearField(1).double()
        >>> _ = field.requires_grad_(False).matrix.fill_(-1.0)
        >>> ImplicitEuler().step(field, torch.ones(1, 1, dtype=torch.float64), 1.0).item()
        0.5
    """

    explicit = False

    def __init__(self, tolerance: float = 1e-13, max_iterations: int = 50) -> None:
        self.tolerance = require_range("tolerance", tolerance, 0.0, 1.0, open_low=True)
        self.max_iterations = require_whole("max_iterations", max_iterations, 1)

    def solve(
        self,
        residual: Residual,
        start: Tensor,
        *inputs: StepSize,
        rounding: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The z with F(z, inputs) = 0 for F = ``residual``, by the solver as it is set.

        Raises:
            NotConverged: it is not found.
        """
        return solve(
            residual,
            start,
            *inputs,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            subject=f"the step of {self!r}",
            rounding=rounding,
        )


def moving_maps(module: nn.Module) -> list[UnitNorm]:
    """The linear maps of a module that have another weight at their next use with gradients.

    Example:
        >>> from dynablocks.linear import UnitDense
        >>> len(moving_maps(UnitDense(2, 2).train())), len(moving_maps(UnitDense(2, 2).eval()))
        (1, 0)
    """
    return [part for part in module.modules() if isinstance(part, UnitNorm) and part.training]


def why_no_way_back(field: VectorField) -> str | None:
    """Why the inverse of a step is of another one, ``None`` where both take the same weights."""
    moving = moving_maps(field)
    if not moving:
        return None
    return f"Invertible is lost: the weight of {type(moving[0]).__name__} moves at each use in training; call eval()"


def why_no_numbers(field: VectorField, step_size: float) -> str | None:
    """Why a step may lead to what is no number, ``None`` where it is made of numbers: structure is kept by these alone.

    A buffer that no linear map holds may be infinite, as the mask of an attention is. Nothing is read where there is
    nothing to read: on the meta device, under function transforms, in lazy layers before their first input.

    Example:
        >>> from dynablocks.fields import IdentityField
        >>> why_no_numbers(IdentityField((2,)), math.inf)
        'the step is inf; nothing is said of one that is no finite number'
    """
    if not math.isfinite(step_size):
        return f"the step is {step_size}; nothing is said of one that is no finite number"
    for path, part in field.named_modules():
        masks = not isinstance(part, LinearMap)
        held: list[tuple[str, Tensor, bool]] = []
        held += [(name, value, False) for name, value in part.named_parameters(path, recurse=False)]
        held += [(name, value, masks) for name, value in part.named_buffers(path, recurse=False)]
        for name, value, may_be_infinite in held:
            ends = _ends(value)
            if any(map(math.isnan, ends)) or not (may_be_infinite or all(map(math.isfinite, ends))):
                return f"{name} of {type(field).__name__} holds nan or inf, so that nothing is said of its steps"
    return None


def _ends(value: Tensor) -> tuple[float, float]:
    """The least and the largest entry, NaN where one is; 0 of what cannot be read."""
    lazy = isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer))
    if lazy or value.is_meta or value.dtype not in FORMATS or not value.numel():
        return 0.0, 0.0
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return 0.0, 0.0
    # Reduced where it lies: torch.isfinite would copy it.
    return float(value.detach().amin()), float(value.detach().amax())


def volume_tolerance(of_form: float, entries: int) -> float:
    r"""To what a map keeps volume that keeps the symplectic form to ``of_form``: n^{3/2} times that, n entries a state.

    Let Jᵀ𝕁J = 𝕁 + E with ‖E‖_F <= τ‖J‖_F² <= τn‖J‖². As E is skew, the eigenvalues of 𝕁⁻¹E come in pairs, and det J,
    the Pfaffian of 𝕁 + E over that of 𝕁, is the product of 1 + λ over one of each pair. Their |λ| sum up to at most
    s = √n‖E‖_F/2 (Weyl), so that |det J − 1| <= e^s − 1: in first order n^{3/2}τ/2 times ‖J‖², the condition number of
    a symplectic J. Twice that covers the rest for s <= 0.3; E = ε𝕁 with JᵀJ = (1 + ε)I comes within a factor of two.

    Example:
        >>> volume_tolerance(1e-6, 4), volume_tolerance(0.0, 4)
        (8e-06, 0.0)
    """
    return of_form * float(entries) ** 1.5


def _factor_is_lost(facts: FieldFacts, step_size: float) -> bool:
    """e^{±708} is about the largest, and the least, number that a float holds with all its digits."""
    return facts.damping is not None and abs(facts.damping * step_size) > 708


def flow_properties(field: VectorField, step_size: float) -> list[Property]:
    """What the exact flow Φ_h of the field is guaranteed to be, from the field's facts.

    That −V falls along every flow of ∇V is not among it, or each Euler step of a gradient field would report a loss
    that nobody asks for; :class:`dynablocks.integrators.DiscreteGradient` alone speaks of it.
    """
    facts: FieldFacts = field.facts()
    found: list[Property] = []
    if facts.hamiltonian:
        found.append(Symplectic())
    if facts.damping is not None and not _factor_is_lost(facts, step_size):
        found.append(ConformalSymplectic(math.exp(-facts.damping * step_size)))
    if facts.divergence_free:
        found.append(VolumePreserving())
    if facts.tangent:
        found.append(NormPreserving())
    found.extend(LinearInvariant(weights) for weights in facts.linear_invariants)
    if facts.odd:
        found.append(Equivariant())
    # Where the field tells no H, there is nothing that a step could be said to keep.
    told = type(field).energy is not VectorField.energy
    if facts.conserves_energy and told:
        found.append(EnergyPreserving(field.energy))
    if facts.dissipates_energy and told and step_size >= 0:
        found.append(Dissipative(field.energy))
    if facts.positive and step_size >= 0:
        found.append(Positive())
    return found


INTEGRATORS: Registry[Callable[[], Integrator]] = Registry("integrator")


def integrator(given: str | Integrator) -> Integrator:
    """The integrator of a registry name, or the integrator itself.

    Raises:
        InvalidArgument: no method has this name, or it is the class of one.

    Example:
        >>> integrator("euler")
        ExplicitEuler(substeps=1)
    """
    if isinstance(given, type) and issubclass(given, Integrator):
        raise InvalidArgument(f"method is the class {given.__name__}; give an instance, {given.__name__}().")
    if isinstance(given, Integrator):
        return given
    filed = INTEGRATORS.get_known(given)
    return filed if isinstance(filed, Integrator) else filed()
