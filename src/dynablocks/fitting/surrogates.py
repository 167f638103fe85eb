"""Surrogates of flow maps: a learned field, a method that keeps its structure, and the units of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_whole
from dynablocks.fields import VectorField
from dynablocks.fields.gradient import GradientField
from dynablocks.fields.hamiltonian import NeuralHamiltonian, SeparableHamiltonian
from dynablocks.fields.mass import MassPreservingField
from dynablocks.fields.sphere import SphereField
from dynablocks.fitting.objective import Residuals, flow_map_residuals
from dynablocks.fitting.structures import (
    CoordinateShears,
    FreeField,
    PositiveMidpoint,
    ProductionDestruction,
    SkewGradientField,
    even_energy,
)
from dynablocks.integrators import Integrator, integrator
from dynablocks.integrators.base import STEPPING
from dynablocks.integrators.discrete_gradient import DiscreteGradient, discrete_gradient, energy_form
from dynablocks.integrators.implicit import IMPLICIT_MIDPOINT, ImplicitRungeKutta
from dynablocks.linear import Dense
from dynablocks.linear.maps import require_batch
from dynablocks.properties import (
    ConformalSymplectic,
    Declaration,
    Dissipative,
    Equivariant,
    Invertible,
    Lipschitz,
    NormPreserving,
    Positive,
    Properties,
    Property,
    Structured,
)
from dynablocks.properties.declarations import OfFunction
from dynablocks.properties.own_code import overrides
from dynablocks.properties.structure import fold
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from jaxtyping import Float

MethodKind = TypeVar("MethodKind", bound=Integrator)


@dataclass(frozen=True)
class Structure:
    """What decides a surrogate's shape.

    Args:
        preserve: a name of :data:`SURROGATES`.
        names: of the state's entries; for ``symplectic`` and ``energy`` first all positions, then all momenta.
        width: hidden units of each learned function.
        weights: of the kept linear function (``mass``); ``None`` for the sum.
        odd: the map is odd, f(−x) = −f(x).
        separable: H(q, p) = T(p) + V(q) (``symplectic``).
        substeps: steps of the method in one step of the data.
        step: the usual time between samples.
        linear: the learned H has a term cᵀx, for data whose mean is no state of rest (``symplectic`` and ``energy``,
            not ``odd``); ``dynablocks fit`` sets it where it can.
    """

    preserve: str
    names: tuple[str, ...]
    width: int = 16
    weights: tuple[float, ...] | None = None
    odd: bool = False
    separable: bool = True
    substeps: int = 1
    step: float = 1.0
    linear: bool = False


FieldAndMethod = tuple[VectorField, Integrator]
SURROGATES: Registry[Callable[[Structure], FieldAndMethod]] = Registry("structure to preserve")
LEARNED_ENERGY = ("symplectic", "energy")
"""The structures whose field is made of a learned H."""
UNITS = {"mass": "power of two", "norm": "size", "positive": "size"}
"""Which change of units keeps the structure: one factor (size), by which products may have to be exact (a power of
two), or by default one factor and a shift."""
SHIFTED = (
    "it is about 0, and the states are shifted by the mean of the data; the structures 'mass', 'norm' and 'positive', "
    "and odd ones, shift none"
)
ONE_STATE = 1e-12
"""Starts that leave their mean by no more than this share of the largest entry are one state: means are rounded."""


class FlowMap(Structured):
    r"""x ↦ x(t + h) = c + sΨ((x − c)/s), Ψ several steps of one method on a learned autonomous field.

    The factor s is one number and the shift c one vector, fixed by the data; both leave symplecticity, volume, linear
    invariants and norms (c = 0) as they are. Time is measured in a unit of the data too. The step h may be another one
    for each sample, so irregular sampling and other steps than those of the training are possible. Each step rounds
    (x − c)/s by some eps‖x‖/s, and what is kept is kept to that at best: of data far from 0 that moves little it is
    more than the tolerance.

    Args:
        field: in the new units.
        method: an integrator.
        structure: names, substeps, the usual step.

    Raises:
        InvalidArgument: (when called) the states are no (batch, entries), or there is not one step a state.

    Example:
        >>> flow = build(Structure("symplectic", ("q", "p"), width=4, step=0.1))
        >>> x, h = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
        >>> flow(x, h).shape
        torch.Size([3, 2])
    """

    scale: Tensor
    centre: Tensor
    unit: Tensor
    # The last three carry over to the data what the method keeps in the units of the map.
    _spoken_of: ClassVar[tuple[str, ...]] = (*Structured._spoken_of, "to_units", "from_units", "_own_energy")

    def __init__(self, field: VectorField, method: Integrator, structure: Structure) -> None:
        super().__init__()
        self.field, self.method, self.structure = field, method, structure
        self.in_shape = self.out_shape = field.in_shape
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("centre", torch.zeros(field.in_shape, dtype=torch.float64))
        self.register_buffer("unit", torch.ones((), dtype=torch.float64))

    def forward(
        self, x: Float[Tensor, "batch entries"], step: Tensor | float | None = None
    ) -> Float[Tensor, "batch entries"]:
        """The states after ``step`` (a number, or one a sample), by default the usual one, in the map's precision."""
        self._require(x, step)
        z, h = self.to_units(x), self._small_step(step)
        for _ in range(self.structure.substeps):
            z = self.method.step(self.field, z, h)
        return self.from_units(z)

    def inverse(
        self, y: Float[Tensor, "batch entries"], step: Tensor | float | None = None
    ) -> Float[Tensor, "batch entries"]:
        """The states before ``step``, where the method has an inverse."""
        self._require(y, step)
        z, h = self.to_units(y), self._small_step(step)
        for _ in range(self.structure.substeps):
            z = self.method.inverse(self.field, z, h)
        return self.from_units(z)

    def vector_field(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        """The learned dx/dt in the units of the data."""
        self._require(x)
        return self.field(self.to_units(x)) * (self.scale / self.unit)

    def energy(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, " batch"]:
        """The learned H per sample in the units of the data, up to a constant.

        For maps that keep an energy ``vector_field`` is S(x)∇H(x) with a skew S, which is 𝕁 for states (q, p).
        """
        self._require(x)
        # ∇ of H((x − c)/s) brings 1/s, the field s/unit; in float32 s² alone may leave the range of numbers.
        return self._own_energy(x) * self.scale * (self.scale / self.unit)

    def _own_energy(self, x: Tensor) -> Tensor:
        """H in the map's own units, where it is of size one whatever the data, as the tolerances of a check want it."""
        return self.field.energy(self.to_units(x))

    @torch.no_grad()
    def rollout(self, x: Float[Tensor, "batch entries"], steps: Float[Tensor, "batch time"]) -> Tensor:
        """The states at the start and after each of the steps, one after the other: (batch, time + 1, entries).

        One row of steps serves all states.
        """
        self._require(x)
        if steps.ndim != 2 or len(steps) not in (1, len(x)):
            raise InvalidArgument(
                f"steps has shape {tuple(steps.shape)}; give ({len(x)}, time), one row a state, or (1, time) for all."
            )
        states = [x]
        for h in steps.unbind(1):
            states.append(self(states[-1], h))
        return torch.stack(states, dim=1)

    @torch.no_grad()
    def adopt_units(self, x: Tensor, y: Tensor, h: Tensor) -> None:
        """Take scale, shift and time unit from pairs of states; the scale from x, or x and y where all x are one."""
        kind = change_of_units(self.structure)
        if kind == "shift":
            self.centre.copy_(x.mean(0))
        size = float(departures(x, y, self.centre).square().mean().sqrt()) or 1.0
        self.scale.fill_(2.0 ** round(math.log2(size)) if kind == "power of two" else size)
        # Not the mean of speeds: two samples that lie close together would have the noise over next to no time.
        speed = float(((y - x) / self.scale).square().mean().sqrt() / h.square().mean().sqrt())
        self.unit.fill_(1 / speed if speed > 0 else float(h.mean()))

    def _require(self, x: Tensor, step: Tensor | float | None = None) -> None:
        require_batch(self, self.in_shape, x)
        if isinstance(step, Tensor) and step.numel() not in (1, len(x)):
            raise InvalidArgument(
                f"step has shape {tuple(step.shape)} for {len(x)} states; give a number, or one each; x.expand(k, -1) "
                "is a state k times."
            )

    def to_units(self, x: Tensor) -> Tensor:
        x = x.to(self.centre.dtype)
        return (x - self.centre) / self.scale

    def from_units(self, z: Tensor) -> Tensor:
        return self.centre.to(z) + self.scale.to(z) * z

    def _small_step(self, step: Tensor | float | None) -> Tensor | float:
        substeps = self.structure.substeps
        if isinstance(step, Tensor):
            step = step.to(self.unit)
            return (step.reshape(-1, 1) if step.ndim else step) / (substeps * self.unit)
        return (self.structure.step if step is None else step) / (substeps * float(self.unit))

    def declare(self) -> Declaration:
        h = float(self._small_step(None))
        with torch.no_grad():
            one = self.method.declare(self.field, h)
        declared = tuple((f"substep{k}", one) for k in range(self.structure.substeps))
        kept, losses = fold(declared)
        name = type(self.field).__name__
        # A shift moves the point about which a map is odd, the sphere it keeps, and the orthant.
        moved = (Equivariant, NormPreserving, Positive) if bool(self.centre.any()) else ()
        losses = (*losses, *(f"{type(p).__name__} is lost: {SHIFTED}" for p in kept if isinstance(p, moved)))
        properties = Properties(self._in_data_units(p) for p in kept if not isinstance(p, (Lipschitz, *moved)))
        scope = _scope(kept, self.method)
        reason = f"{self.structure.substeps} steps on {name} between changes of units; the same for {scope}"
        title = f"FlowMap(h={self.structure.step:.5g})"
        return Declaration(properties, reason, declared[:1], losses, title)

    def scope(self) -> str:
        """For which steps the declared properties hold, in words."""
        with torch.no_grad():
            kept = self.method.declare(self.field, float(self._small_step(None))).properties
        return _scope(kept, self.method)

    def _in_data_units(self, kept: Property) -> Property:
        if not isinstance(kept, OfFunction):
            return kept
        function = kept.function
        if function is None or function == self.field.energy:
            return replace(kept, function=self._own_energy)
        return replace(kept, function=lambda x: function(self.to_units(x)))

    def extra_repr(self) -> str:
        return f"{self.method!r}, {self.structure.substeps} substeps, preserve {self.structure.preserve}"


def _scope(kept: Iterable[Property], method: Integrator) -> str:
    kinds = {type(p) for p in kept}
    sign = " >= 0" if kinds & {Positive, Dissipative} else ""
    of_this_one = ["Invertible: this one"] * (Invertible in kinds and not method.explicit)
    of_this_one += ["ConformalSymplectic: by the factor of this one"] * (ConformalSymplectic in kinds)
    return f"every step size{sign}" + (f" ({', '.join(of_this_one)})" if of_this_one else "")


def change_of_units(structure: Structure) -> str:
    """How the map of a structure changes the units of its data, as :data:`UNITS` has it."""
    return UNITS.get(structure.preserve, "size" if structure.odd else "shift")


def departures(
    x: Float[Tensor, "batch entries"], y: Float[Tensor, "batch entries"], centre: Float[Tensor, " entries"]
) -> Float[Tensor, "states entries"]:
    """What tells the size of pairs (x, y): x − centre, of both ends where x is the centre to rounding.

    Example:
        >>> one, several = torch.full((3, 1), 0.1).double(), torch.tensor([[0.1], [0.2], [0.3]]).double()
        >>> [len(departures(x, x + 0.5, x.mean(0))) for x in (one, several)]
        [6, 3]
    """
    away, largest = x - centre, torch.maximum(x.abs().max(), y.abs().max())
    if bool(away.square().mean().sqrt() > ONE_STATE * largest):
        return away
    return torch.cat([x, y]) - centre


def build(structure: Structure) -> FlowMap:
    """The surrogate of a structure, in float64, with random parameters.

    Raises:
        InvalidArgument: an unknown structure, or one that the state cannot have.

    Example:
        >>> build(Structure("mass", ("S", "I", "R"), width=4)).properties
        (LinearInvariant)
    """
    substeps = require_whole("substeps", structure.substeps, 1, 1000)
    structure = replace(structure, substeps=substeps, width=require_whole("width", structure.width, 1, 4096))
    if structure.weights is not None and structure.preserve != "mass":
        raise InvalidArgument(f"weights belong to --preserve mass; got --preserve {structure.preserve}.")
    if structure.odd and structure.preserve in ("positive",):
        raise InvalidArgument("an odd map cannot keep states positive; leave out --odd or --preserve positive.")
    if structure.linear and (structure.odd or structure.preserve not in LEARNED_ENERGY):
        raise InvalidArgument(
            f"linear=True is for the learned energy of {' and '.join(LEARNED_ENERGY)} where the map is not odd; got "
            f"{structure.preserve}{', odd' if structure.odd else ''}: leave it out."
        )
    field, method = SURROGATES.get_known(structure.preserve)(structure)
    return FlowMap(field.double(), method, structure)


def training_residuals(flow: FlowMap) -> Residuals:
    r"""The residuals of one step: without a solve where the method has such a form (D2.12), else module(x, h) − y.

    Discrete gradients: y − x − hS∇̄H(x, y); implicit midpoint: y − x − hX((x + y)/2); both vanish exactly where the step
    from x is y, and neither solves an equation. All are in the map's own units, over ``flow.scale``: what an optimiser
    takes for small does not depend on the unit of the data.
    """
    method = flow.method
    if flow.structure.substeps != 1:
        return _step_residuals
    if _steps_as(method, DiscreteGradient):
        return _discrete_gradient_residuals
    midpoint = (IMPLICIT_MIDPOINT.a, IMPLICIT_MIDPOINT.b)
    if _steps_as(method, ImplicitRungeKutta) and (method.tableau.a, method.tableau.b) == midpoint:
        return _midpoint_residuals
    return _step_residuals


def _steps_as(method: Integrator, kind: type[MethodKind]) -> TypeGuard[MethodKind]:
    """Whether it solves the equation of this class, as no subclass with a step of its own does."""
    return isinstance(method, kind) and not any(overrides(method, kind, name) for name in STEPPING)


def _step_residuals(module: nn.Module, x: Tensor, y: Tensor, *step: Tensor) -> Tensor:
    assert isinstance(module, FlowMap)
    return flow_map_residuals(module, x, y, *step) / module.scale


def _discrete_gradient_residuals(module: nn.Module, x: Tensor, y: Tensor, *step: Tensor) -> Tensor:
    assert isinstance(module, FlowMap)
    assert isinstance(module.method, DiscreteGradient)
    form = energy_form(module.field)
    assert not isinstance(form, str)
    a, b, h = _ends(module, x, y, *step)
    mean = discrete_gradient(module.method.kind, form.energy, a, b, gradient=form.gradient, nodes=module.method.nodes)
    return b - a - h * form.structure((a + b) / 2, mean)


def _midpoint_residuals(module: nn.Module, x: Tensor, y: Tensor, *step: Tensor) -> Tensor:
    assert isinstance(module, FlowMap)
    a, b, h = _ends(module, x, y, *step)
    return b - a - h * module.field((a + b) / 2)


def _ends(flow: FlowMap, x: Tensor, y: Tensor, *step: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
    """Both ends of a step and its length in the map's own units."""
    flow._require(x, *step)
    flow._require(y)
    return flow.to_units(x), flow.to_units(y), flow._small_step(*(step or (None,)))


def _halves(structure: Structure) -> int:
    n = len(structure.names)
    if n % 2:
        raise InvalidArgument(
            f"there are {n} state columns ({', '.join(structure.names)}); --preserve {structure.preserve} needs an "
            "even number: first all positions, then all momenta."
        )
    return n


@SURROGATES.register("symplectic")
def _symplectic(structure: Structure) -> FieldAndMethod:
    n = _halves(structure)
    if not structure.separable:
        return _spread(NeuralHamiltonian(n, _learned_energy(structure, n))), integrator("implicit-midpoint")
    kinetic, potential = (_learned_energy(structure, n // 2) for _ in range(2))
    return _spread(SeparableHamiltonian(kinetic, potential, n)), integrator("suzuki4")


@SURROGATES.register("energy")
def _energy(structure: Structure) -> FieldAndMethod:
    n = len(structure.names)
    if n % 2:
        if structure.odd:
            raise InvalidArgument(f"--odd with --preserve energy needs an even number of state columns; there are {n}.")
        return _spread(SkewGradientField(n, structure.width, linear=structure.linear)), integrator("gonzalez")
    return _spread(NeuralHamiltonian(n, _learned_energy(structure, n))), integrator("gonzalez")


def _learned_energy(structure: Structure, entries: int) -> VectorField:
    return even_energy(entries, structure.width, odd=structure.odd, linear=structure.linear)


@SURROGATES.register("volume")
def _volume(structure: Structure) -> FieldAndMethod:
    return CoordinateShears(len(structure.names), structure.width, odd=structure.odd), integrator("suzuki4")


@SURROGATES.register("mass")
def _mass(structure: Structure) -> FieldAndMethod:
    n = len(structure.names)
    if n < 2:
        raise InvalidArgument("there is one state column; keeping a mass needs at least 2.")
    if structure.weights is not None and len(structure.weights) != n:
        raise InvalidArgument(
            f"--weights has {len(structure.weights)} numbers; the file has {n} state columns "
            f"({', '.join(structure.names)}); give one a column."
        )
    field = MassPreservingField(n, structure.width, weights=structure.weights, bias=not structure.odd)
    return _spread(field), integrator("rk4")


@SURROGATES.register("norm")
def _norm(structure: Structure) -> FieldAndMethod:
    n = len(structure.names)
    if n < 2:
        raise InvalidArgument("there is one state column; keeping a norm needs at least 2.")
    field = SphereField(Dense(n, structure.width), Dense(n, structure.width), bias=not structure.odd)
    return _spread(field), integrator("cayley-midpoint")


@SURROGATES.register("positive")
def _positive(structure: Structure) -> FieldAndMethod:
    return ProductionDestruction(len(structure.names), structure.width), PositiveMidpoint()


@SURROGATES.register("none")
def _none(structure: Structure) -> FieldAndMethod:
    return FreeField(len(structure.names), structure.width, odd=structure.odd), integrator("rk4")


@torch.no_grad()
def _spread(field: VectorField) -> VectorField:
    """Spread the kinks of a ridge function over the data's range: normal directions and offsets, small amplitudes."""
    for module in field.modules():
        if isinstance(module, GradientField):
            rows, columns = module.linear.out_shape[0], module.linear.in_shape[0]
            _normal(module.linear.parameters(), 1 / math.sqrt(columns))
            _normal([module.alpha] if module.alpha is not None else [], 1 / math.sqrt(rows))
            _normal([module.bias] if module.bias is not None else [], 1.0)
    bias = getattr(field, "bias", None)
    if isinstance(bias, nn.Parameter):
        _normal([bias], 1.0)
    return field


def _normal(parameters: Iterable[Tensor], spread: float) -> None:
    for parameter in parameters:
        nn.init.normal_(parameter, std=spread)
