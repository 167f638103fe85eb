"""Is a field what it says of itself? Its facts and its methods against X and its dense Jacobians, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.fields.base import FieldFacts, VectorField, why_no_energy
from dynablocks.fields.hamiltonian import canonical
from dynablocks.fields.sphere import TangentField
from dynablocks.properties import EUCLIDEAN, Metric
from dynablocks.properties.declarations import LEAST_DIGITS, require_norm
from dynablocks.properties.jacobians import jacobians, largest_finite, with_gradients
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ROUNDING = 512 * torch.finfo(torch.float64).eps
"""What rounding may do to a sum, for each of its terms and relative to the largest."""

STEPS, TIMES = (-2.0, -0.5, 0.5, 2.0), (0.2, 0.3)
"""The steps of which constants are measured, and the times of which flows are."""
LEGIBLE = 1e6
"""By how much a flow may stretch rounding and still be held against its way back."""


@dataclass(frozen=True, eq=False)
class Measured:
    """A float64 field at some states: X and DX there, and what rounding may do to them.

    Args:
        field: X.
        x: the states, (batch, …).
        metric: that of the facts, which ``lipschitz``, ``one_sided``, ``spectrum`` and ``conservative`` are said in.
    """

    field: VectorField
    x: Tensor
    metric: Metric

    @property
    def entries(self) -> int:
        """How many numbers a state holds."""
        return self.x[0].numel()

    def rates_at(self, x: Tensor) -> Float[Tensor, "batch entries"]:
        """X at any states, one row each."""
        with torch.no_grad():
            found: Tensor = self.field(x)
        return _finite(found.flatten(1), "X")

    @cached_property
    def rates(self) -> Float[Tensor, "batch entries"]:
        """X at the states."""
        return self.rates_at(self.x)

    @cached_property
    def jacobians(self) -> Float[Tensor, "batch entries entries"]:
        """DX at the states."""
        return _finite(jacobians(self.field, self.x), "DX")

    @cached_property
    def coordinates(self) -> Float[Tensor, "batch entries entries"]:
        """R DX R⁻¹, in the coordinates in which the norm of the metric is the Euclidean one."""
        if self.metric == EUCLIDEAN:
            return self.jacobians
        require_norm(self.metric, tuple(self.x.shape[1:]))
        whiten, unwhiten = self.metric.whiten, self.metric.unwhiten
        return _finite(jacobians(lambda u: whiten(self.field(unwhiten(u))), whiten(self.x)), "DX")

    @cached_property
    def norms(self) -> Float[Tensor, " batch"]:
        """‖DX‖ in the metric."""
        return _norms(self.coordinates)

    @cached_property
    def eigenvalues(self) -> Float[Tensor, "batch entries"]:
        """Those of the symmetric part of DX in the metric."""
        values: Tensor = torch.linalg.eigvalsh(0.5 * (self.coordinates + self.coordinates.mT))
        return values

    @cached_property
    def two(self) -> Int[Tensor, "2 pairs"]:
        """Every two states."""
        return torch.triu_indices(len(self.x), len(self.x), 1)

    @cached_property
    def pairs(self) -> tuple[Float[Tensor, "pairs entries"], Float[Tensor, "pairs entries"]]:
        """R(X(x) − X(y)) and R(x − y) for every two states: a jump is in no Jacobian."""
        first, second = self.two
        images = self.metric.whiten(self.rates.reshape(self.x.shape)).flatten(1)
        points = self.metric.whiten(self.x).flatten(1)
        return images[first] - images[second], points[first] - points[second]

    @property
    def slack(self) -> Float[Tensor, " batch"]:
        """What rounding may do to DX at each state: a steep one excuses no other.

        Where DX is small its terms may be as large as elsewhere: those of a difference that cancels there.
        """
        least = min(1.0, float(self.norms.median()))
        return ROUNDING * self.entries * self.metric.condition**2 * self.norms.clamp_min(least)

    @cached_property
    def unit(self) -> float:
        """What rounding may do to a number of size 1: parameters that are large multiply it, but excuse no digit."""
        largest = max([1.0, *map(largest_finite, self.field.parameters())])
        return min(ROUNDING * self.entries * largest, LEAST_DIGITS)

    def tolerance(self, *values: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """What rounding may do to values like these, at each state."""
        sizes = torch.stack([_sizes(given) for given in (self.x, *values)])
        return self.unit * sizes.amax(0).clamp_min(1.0)

    def tolerance_of_pairs(self, *values: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """What rounding may do to values like these, for every two states; that of X at both is not among it."""
        first, second = self.two
        states = _sizes(self.x)
        sizes = torch.stack([states[first], states[second], *(_sizes(given) for given in values)])
        return self.unit * self.metric.condition**2 * sizes.amax(0).clamp_min(1.0)

    @cached_property
    def rates_of_pairs(self) -> Float[Tensor, " pairs"]:
        """‖X(x)‖ + ‖X(y)‖ in the metric for every two states: their difference is rounded relative to it."""
        first, second = self.two
        sizes = self.metric.norm(self.rates.reshape(self.x.shape))
        return sizes[first] + sizes[second]


def _sizes(values: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """The largest |entry| of each state that is finite."""
    known = values.detach().abs().nan_to_num(nan=0.0, posinf=0.0)
    return known.flatten(1).amax(1) if known.ndim > 1 else known


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise InvalidArgument(f"{name} is not finite at a state, so nothing can be said of it.")
    return values


def _norms(matrices: Float[Tensor, "batch n n"]) -> Float[Tensor, " batch"]:
    norms: Tensor = torch.linalg.matrix_norm(matrices, ord=2)
    return norms


Check = Callable[[Measured, FieldFacts], Iterator[str]]
FACTS: Registry[Check] = Registry("measured fact")
"""By each fact, what measures it: one sentence for each thing that is wrong."""

METHODS: Registry[Check] = Registry("measured method")
"""By each method that a field may have, what holds it against the field."""


def wrong_shapes(field: VectorField) -> Iterator[str]:
    """A sentence where X has another shape than its states, which x + hX(x) would broadcast.

    Example:
        >>> from dynablocks.fields import IdentityField
        >>> class Total(IdentityField):
        ...     def forward(self, x):
        ...         return x.sum(1, keepdim=True)
        >>> next(wrong_shapes(Total((2,))))
        'X has shape (3, 1) for states (3, 2); a field has the shape of its states'
    """
    # A field of one sample, or of a number a sample, may have the shape of one batch by chance.
    for count in (3, 4):
        x = torch.randn(count, *field.in_shape, dtype=torch.float64)
        with torch.no_grad():
            rates = field(x)
        if rates.shape != x.shape:
            yield f"X has shape {tuple(rates.shape)} for states {tuple(x.shape)}; a field has the shape of its states"
            return


def false_facts(field: VectorField, x: Float[Tensor, "batch ..."]) -> Iterator[str]:
    """A sentence for each fact of a float64 field, and of its terms, that is false at the states x.

    Standing facts are among them.

    Example:
        >>> from dynablocks.fields import IdentityField
        >>> class Still(IdentityField):
        ...     def facts(self):
        ...         return FieldFacts(1.0, 1.0, tangent=True)
        >>> list(false_facts(Still((2,)), torch.ones(1, 2, dtype=torch.float64)))
        ['tangent: ⟨x, X⟩ is 2.0e+00 at a state']
    """
    return _of_field_and_terms(_false_facts, field, x)


def false_methods(field: VectorField, x: Float[Tensor, "batch ..."]) -> Iterator[str]:
    """A sentence for each method of a float64 field, and of its terms, that contradicts it, or its facts, at x."""
    return _of_field_and_terms(_false_methods, field, x)


Measure = Callable[[VectorField, Tensor], Iterator[str]]


def _of_field_and_terms(measure: Measure, field: VectorField, x: Tensor) -> Iterator[str]:
    """Of a copy without gradients; of its terms, but not of theirs, as a splitting asks for no more."""
    field = copy.deepcopy(field).requires_grad_(False)
    yield from measure(field, x)
    for term in dict.fromkeys(field.terms()):
        if term is not field:
            found = measure(term.requires_grad_(False), x)
            yield from (f"term {type(term).__name__}: {sentence}" for sentence in found)


def _false_facts(field: VectorField, x: Tensor) -> Iterator[str]:
    facts, standing = field.facts(), field.standing_facts()
    at = Measured(field, x, facts.metric)
    told: set[str] = set()
    for sentence in _wrong(FACTS, at, facts):
        told.add(sentence)
        yield sentence
    if standing != facts:
        there = at if standing.metric == facts.metric else Measured(field, x, standing.metric)
        yield from (f"standing {sentence}" for sentence in _wrong(FACTS, there, standing) if sentence not in told)


def _false_methods(field: VectorField, x: Tensor) -> Iterator[str]:
    facts = field.facts()
    yield from _wrong(METHODS, Measured(field, x, facts.metric), facts)


def _wrong(table: Registry[Check], at: Measured, facts: FieldFacts) -> Iterator[str]:
    for name, check in table.items():
        try:
            for sentence in check(at, facts):
                yield f"{name}: {sentence}"
        except InvalidArgument as error:
            yield f"{name}: {str(error).rstrip('.')}"


def _worst(found: Float[Tensor, "states ..."], allowed: Float[Tensor, " states"]) -> float | None:
    """The largest value among the states where one exceeds what is allowed there; ``None`` where none does."""
    largest = found.flatten(1).amax(1) if found.ndim > 1 else found
    wrong = ~(largest <= allowed)
    return float(largest[wrong].max()) if bool(wrong.any()) else None


def _above(
    what: str, found: Float[Tensor, "states ..."], limit: float, slack: Float[Tensor, " states"]
) -> Iterator[str]:
    worst = _worst(found, limit + slack)
    if worst is not None:
        yield f"{what} is {worst:.9g} at a state, {worst - limit:.1e} above the declared {limit:.9g}"


def _beyond(
    what: str, found: Float[Tensor, "states ..."], slack: Float[Tensor, " states"], where: str = "at a state"
) -> Iterator[str]:
    worst = _worst(found, slack)
    if worst is not None:
        yield f"{what} is {worst:.1e} {where}"


def _asymmetry(what: str, matrices: Float[Tensor, "batch n n"], slack: Float[Tensor, " batch"]) -> Iterator[str]:
    worst = _worst((0.5 * (matrices - matrices.mT)).abs(), slack)
    if worst is not None:
        yield f"{what} is not symmetric, by {worst:.1e}"


def _difference(
    what: str, one: Float[Tensor, "states ..."], other: Float[Tensor, "states ..."], slack: Float[Tensor, " states"]
) -> Iterator[str]:
    worst = _worst((one - other).abs(), slack)
    if worst is not None:
        yield f"{what} differ by up to {worst:.1e}"


def _change(
    at: Measured, slope: Float[Tensor, "batch entries"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """⟨slope, X⟩ at each state, and what rounding of its terms may be."""
    return _product(at, slope, at.rates)


def _product(
    at: Measured, one: Float[Tensor, "batch entries"], other: Float[Tensor, "batch entries"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """⟨one, other⟩ at each state, and what rounding of its terms may be."""
    sizes = one.norm(dim=1) * other.norm(dim=1)
    return (one * other).sum(1), at.unit * sizes.clamp_min(1.0)


@with_gradients
def _slope(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Float[Tensor, "batch entries"]:
    """The gradient of a function with one number a state."""
    point = x.detach().clone().requires_grad_(True)
    values = function(point)
    if values.shape != x.shape[:1]:
        raise InvalidArgument(
            f"it has shape {tuple(values.shape)} for {len(x)} states; {name}(x) is one number a state, ({len(x)},)."
        )
    if not values.requires_grad:
        return torch.zeros_like(x).flatten(1)
    (slope,) = torch.autograd.grad(values.sum(), point, allow_unused=True, materialize_grads=True)
    return slope.flatten(1)


@FACTS.register("lipschitz")
def _lipschitz(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.lipschitz == math.inf:
        return
    yield from _above("‖DX‖", at.norms, facts.lipschitz, at.slack)
    moved, apart = at.pairs
    allowed = facts.lipschitz * apart.norm(dim=1)
    slack = at.tolerance_of_pairs(at.rates_of_pairs, allowed)
    yield from _beyond("‖δX‖ − lipschitz·‖δx‖", moved.norm(dim=1) - allowed, slack, "between two states")


@FACTS.register("one_sided")
def _one_sided(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.one_sided == math.inf:
        return
    yield from _above("an eigenvalue of (DX + DXᵀ)/2", at.eigenvalues, facts.one_sided, at.slack)
    moved, apart = at.pairs
    allowed = facts.one_sided * apart.square().sum(1)
    slack = at.tolerance_of_pairs(at.rates_of_pairs * apart.norm(dim=1), allowed)
    yield from _beyond("⟨δX, δx⟩ − one_sided·‖δx‖²", (moved * apart).sum(1) - allowed, slack, "between two states")


@FACTS.register("spectrum")
def _spectrum(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.spectrum is None:
        return
    yield from _asymmetry("DX", at.coordinates, at.slack)
    low, high = facts.spectrum
    least, most = at.eigenvalues.amin(1), at.eigenvalues.amax(1)
    wrong = ~((low - at.slack <= least) & (most <= high + at.slack))
    if bool(wrong.any()):
        smallest, largest = float(least[wrong].min()), float(most[wrong].max())
        beyond = max(low - smallest, largest - high)
        yield (
            f"the eigenvalues of DX reach from {smallest:.9g} to {largest:.9g}, beyond [{low:.9g}, {high:.9g}] by "
            f"{beyond:.1e}"
        )


@FACTS.register("conservative")
def _conservative(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.conservative:
        yield from _asymmetry("DX", at.coordinates, at.slack)


@FACTS.register("odd")
def _odd(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.odd:
        yield from _beyond("|X(−x) + X(x)|", (at.rates_at(-at.x) + at.rates).abs(), at.tolerance(at.rates))


@FACTS.register("linear_invariants")
def _linear_invariants(at: Measured, facts: FieldFacts) -> Iterator[str]:
    for weights in facts.linear_invariants:
        numbers = (1.0,) * at.entries if weights is None else weights
        if len(numbers) != at.entries:
            yield f"{numbers} are {len(numbers)} weights for states of {at.entries} entries"
            continue
        change, rounding = _change(at, at.rates.new_tensor(numbers).expand_as(at.rates))
        yield from _beyond(f"wᵀX for w = {weights or 1}", change.abs(), rounding)


@FACTS.register("divergence_free")
def _divergence_free(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.divergence_free:
        yield from _beyond("∇·X", at.jacobians.diagonal(dim1=1, dim2=2).sum(1).abs(), at.slack)


@FACTS.register("hamiltonian")
def _hamiltonian(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.hamiltonian:
        yield from _form(at, 0.0)


@FACTS.register("damping")
def _damping(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.damping is not None:
        yield from _form(at, facts.damping)


def _form(at: Measured, damping: float) -> Iterator[str]:
    """X = 𝕁∇H − γ(0, p) for some H where 𝕁(DX + γ diag(0, I)) = −∇²H is symmetric."""
    if at.x.shape[1] % 2:
        yield f"states of shape {tuple(at.x.shape[1:])} have no halves (q, p)"
        return
    undamped, half = at.jacobians.clone(), at.entries // 2
    undamped[:, half:, half:] += damping * torch.eye(half, dtype=undamped.dtype)
    yield from _asymmetry("𝕁(DX + γ diag(0, I))" if damping else "𝕁DX", canonical(undamped), at.slack)


@FACTS.register("conserves_energy")
def _conserves_energy(at: Measured, facts: FieldFacts) -> Iterator[str]:
    # A Hamiltonian field keeps an H also where no closed form of it is known.
    if facts.conserves_energy and not (facts.hamiltonian and _refuses(at.field.energy, at.x)):
        change, rounding = _change(at, _slope("energy", at.field.energy, at.x))
        yield from _beyond("|dH/dt|", change.abs(), rounding)


@FACTS.register("dissipates_energy")
def _dissipates_energy(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.dissipates_energy:
        yield from _beyond("dH/dt", *_change(at, _slope("energy", at.field.energy, at.x)))


@FACTS.register("tangent")
def _tangent(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.tangent:
        change, rounding = _change(at, at.x.flatten(1))
        yield from _beyond("⟨x, X⟩", change.abs(), rounding)


@FACTS.register("positive")
def _positive(at: Measured, facts: FieldFacts) -> Iterator[str]:
    """At |x| with each entry 0 in turn, with all of them 0 but one, where no other makes up for it, and at 0."""
    if not facts.positive:
        return
    inside, one = at.x.flatten(1).abs(), torch.eye(at.entries, dtype=torch.bool).unsqueeze(1)
    walls, axes = torch.where(one, 0.0, inside), torch.where(one, inside, 0.0)
    states = torch.cat([walls.flatten(0, 1), axes.flatten(0, 1), torch.zeros_like(inside[:1])])
    # In pieces: a field may hold a matrix for each state.
    parts = torch.split(states.reshape(-1, *at.x.shape[1:]), 256)
    rates = torch.cat([at.rates_at(part) for part in parts])
    slack = at.unit * torch.maximum(_sizes(states), _sizes(rates)).clamp_min(1.0)
    yield from _beyond("−Xᵢ where xᵢ = 0", torch.where(states == 0, -rates, 0.0), slack)


def _refuses(function: Callable[..., Any], *given: Any) -> bool:
    """Whether a method says that the field has no such thing."""
    try:
        with torch.no_grad():
            function(*given)
    except InvalidArgument:
        return True
    return False


@METHODS.register("potential")
def _potential(at: Measured, facts: FieldFacts) -> Iterator[str]:
    potential: Any = getattr(at.field, "potential", None)
    known = callable(potential) and "potential" not in at.field._of_another
    known = known and facts.conservative and facts.metric == EUCLIDEAN
    if known and not _refuses(potential, at.x):
        slope = _slope("potential", potential, at.x)
        yield from _difference("∇V and X", slope, at.rates, at.tolerance(slope, at.rates))


@METHODS.register("energy")
def _energy(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if facts.hamiltonian and why_no_energy(at.field) is None and not _refuses(at.field.energy, at.x):
        slope = canonical(_slope("energy", at.field.energy, at.x))
        yield from _difference("𝕁∇H and X", slope, at.rates, at.tolerance(slope, at.rates))


@METHODS.register("structure")
def _structure(at: Measured, facts: FieldFacts) -> Iterator[str]:
    methods: list[Any] = [getattr(at.field, name, None) for name in ("energy", "gradient", "structure")]
    energy, gradient, structure = methods
    refused = "structure" in at.field._of_another or getattr(at.field, "why_no_structure", lambda: None)() is not None
    if refused or not all(map(callable, methods)) or _refuses(energy, at.x):
        return
    with torch.no_grad():
        given = gradient(at.x)
        image = structure(at.x, given).flatten(1)
    slope = _slope("energy", energy, at.x)
    yield from _difference("∇H and gradient", slope, given.flatten(1), at.tolerance(slope))
    yield from _difference("structure(x, gradient(x)) and X", image, at.rates, at.tolerance(image, slope))
    yield from _form_of_structure(at, facts, structure)


def _form_of_structure(at: Measured, facts: FieldFacts, structure: Callable[[Tensor, Tensor], Tensor]) -> Iterator[str]:
    """S(x)v for random v: a discrete gradient is none of the gradients, of which dH/dt speaks."""
    generator = torch.Generator().manual_seed(5)
    v, w = torch.randn(2, *at.x.shape, generator=generator, dtype=at.x.dtype)
    with torch.no_grad():
        one, other, both = (structure(at.x, given).flatten(1) for given in (v, w, v - 2 * w))
    names, rounding = "structure(x, v − 2w) and structure(x, v) − 2 structure(x, w)", at.tolerance(one, other, both)
    yield from _difference(names, both, one - 2 * other, rounding)
    growth, rounding = _product(at, v.flatten(1), one)
    if facts.conserves_energy:
        yield from _beyond("|⟨v, structure(x, v)⟩| for a random v", growth.abs(), rounding)
    elif facts.dissipates_energy:
        yield from _beyond("⟨v, structure(x, v)⟩ for a random v", growth, rounding)


@METHODS.register("terms")
def _terms(at: Measured, facts: FieldFacts) -> Iterator[str]:
    terms = at.field.terms()
    if all(term is at.field for term in terms):
        return
    parts = [Measured(term, at.x, EUCLIDEAN).rates for term in terms]
    yield from _difference("the sum of the terms and X", sum(parts, 0 * at.rates), at.rates, at.tolerance(*parts))


@METHODS.register("euler_constant")
def _euler_constant(at: Measured, facts: FieldFacts) -> Iterator[str]:
    for h in STEPS:
        norms = _norms(torch.eye(at.entries, dtype=at.x.dtype) + h * at.coordinates)
        for bound in ("tight", "paper"):
            constant, _ = at.field.euler_constant(h, bound)
            if constant < math.inf:
                what = f"‖I + hDX‖ for h = {h} and bound={bound!r}"
                yield from _above(what, norms, constant, abs(h) * at.slack + ROUNDING * at.entries)


@METHODS.register("flow")
def _flow(at: Measured, facts: FieldFacts) -> Iterator[str]:
    """What is a flow has the derivative X at time 0, and Φ_t ∘ Φ_s = Φ_{s+t}."""
    if at.field.why_no_flow() is not None:
        return
    flow, (first, second) = at.field.flow, TIMES
    speed = max(1.0, largest_finite(at.rates), facts.lipschitz if facts.lipschitz < math.inf else 0.0)
    step = 1e-3 / speed
    with torch.no_grad():
        one, other = (flow(at.x, k * step) - flow(at.x, -k * step) for k in (1, 2))
        twice, once = flow(flow(at.x, first), second), flow(at.x, first + second)
    slope = ((8 * one - other) / (12 * step)).flatten(1)
    slack = 1e-8 * torch.maximum(_sizes(at.x), _sizes(at.rates)).clamp_min(1.0)
    yield from _difference("its derivative at time 0 and X", slope, at.rates, slack * max(1.0, speed / 1e3))
    yield from _difference("Φ_t(Φ_s(x)) and Φ_{s+t}(x)", twice, once, at.tolerance(twice, once))
    growth = math.exp(min(700.0, second * speed))
    if growth < LEGIBLE:
        with torch.no_grad():
            back = flow(flow(at.x, second), -second)
        yield from _difference("Φ_{−t}(Φ_t(x)) and x", back, at.x, growth * at.tolerance(twice, once, back))
    yield from _flow_of_times(at, speed)


def _one_a_state(at: Measured) -> Tensor:
    """The times in turn, shaped to multiply the states."""
    order = torch.arange(len(at.x)) % len(TIMES)
    return at.x.new_tensor(TIMES)[order].reshape(-1, *(1,) * (at.x.ndim - 1))


def _raised(method: str, times: Tensor, error: Exception) -> str:
    sentence = str(error).split("\n", maxsplit=1)[0]
    return (
        f"{method}(x, t) with t of shape {tuple(times.shape)}, one a state, raises {type(error).__name__} "
        f"({sentence}); t is a number, or a tensor that multiplies x"
    )


def _flow_of_times(at: Measured, speed: float) -> Iterator[str]:
    """Steps may be one a state, and learned: Φ_t(x) of many t is that of each alone, and ∂Φ_t(x)/∂t = X(Φ_t(x))."""
    times = _one_a_state(at)
    probe = torch.randn(at.x.shape, generator=torch.Generator().manual_seed(6), dtype=at.x.dtype)
    with torch.no_grad():
        early, late = (at.field.flow(at.x, time) for time in TIMES)
        alone = torch.where(times == TIMES[0], early, late)
    try:
        moved, slope = _moved(at.field.flow, at.x, times, probe)
    except Exception as error:
        yield _raised("flow", times, error)
        return
    if moved.shape != alone.shape:
        yield f"flow(x, t) of t {tuple(times.shape)} and x {tuple(at.x.shape)} has shape {tuple(moved.shape)}"
        return
    yield from _difference("Φ_t(x) for one t a state and for each t alone", moved, alone, at.tolerance(moved, alone))
    expected, rounding = _product(at, probe.flatten(1), at.rates_at(moved))
    if slope is not None:
        what = "⟨v, ∂Φ_t(x)/∂t⟩ and ⟨v, X(Φ_t(x))⟩ for a random v"
        yield from _difference(what, slope, expected, speed * rounding)
    elif _worst(expected.abs(), speed * rounding) is not None:
        yield "flow(x, t) has no gradient in a tensor t, and steps cannot be learned; compute with t, not with float(t)"


@with_gradients
def _moved(
    flow: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, probe: Tensor
) -> tuple[Tensor, Float[Tensor, " batch"] | None]:
    """f(x, t), and the derivative by t of ⟨v, f(x, t)⟩ for each state; ``None`` where there is none."""
    t = times.clone().requires_grad_(True)
    moved = flow(x.detach().clone(), t)
    if not moved.requires_grad or moved.shape != probe.shape:
        return moved.detach(), None
    (slope,) = torch.autograd.grad((probe.clone() * moved).sum(), t, allow_unused=True)
    return moved.detach(), None if slope is None else slope.flatten()


@METHODS.register("flow_constant")
def _flow_constant(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if at.field.why_no_flow() is not None:
        return
    for time in (TIMES[0], -TIMES[0]):
        constant, _ = at.field.flow_constant(time)
        if constant < math.inf:
            norms = _norms(_flow_coordinates(at, time))
            slack = ROUNDING * at.entries * at.metric.condition**2 * norms
            yield from _above(f"‖DΦ_t‖ for t = {time}", norms, constant, slack)


@METHODS.register("flow_log_determinant")
def _flow_log_determinant(at: Measured, facts: FieldFacts) -> Iterator[str]:
    if at.field.why_no_flow() is not None or _refuses(at.field.flow_log_determinant, at.x, TIMES[0]):
        return
    for time in (TIMES[0], -TIMES[0]):
        with torch.no_grad():
            given = at.field.flow_log_determinant(at.x, time)
        _, expected = torch.linalg.slogdet(_flow_jacobians(at, time))
        if given.shape != expected.shape:
            yield f"it has shape {tuple(given.shape)} for {len(at.x)} states; one number a state is needed"
            return
        slack = ROUNDING * at.entries**2 * _sizes(expected).clamp_min(1.0)
        yield from _difference(f"it and that of the dense Jacobian for t = {time}", given, expected, slack)
    yield from _growth_of_times(at)


def _growth_of_times(at: Measured) -> Iterator[str]:
    """Learned steps of a density take its gradient: ∂/∂t log |det DΦ_t(x)| = tr DX(Φ_t(x)), Liouville's formula."""
    times, ones = _one_a_state(at), at.x.new_ones(len(at.x))
    try:
        given, slope = _moved(at.field.flow_log_determinant, at.x, times, ones)
    except Exception as error:
        yield _raised("flow_log_determinant", times, error)
        return
    if given.shape != ones.shape:
        yield f"of t {tuple(times.shape)} it has shape {tuple(given.shape)}; one number a state is needed"
        return
    with torch.no_grad():
        moved = at.field.flow(at.x, times)
    slopes = _finite(jacobians(at.field, moved), "DX(Φ_t(x))")
    expected, slack = slopes.diagonal(dim1=1, dim2=2).sum(1), 1e-8 * _sizes(slopes).clamp_min(1.0)
    if slope is not None:
        yield from _difference("its derivative by t and tr DX(Φ_t(x))", slope, expected, slack)
    elif _worst(expected.abs(), slack) is not None:
        yield "it has no gradient in a tensor t, and steps cannot be learned; compute with t, not with float(t)"


@METHODS.register("flow_with_log_determinant")
def _flow_with_log_determinant(at: Measured, facts: FieldFacts) -> Iterator[str]:
    """Steps of a density flow take both from it, and not from the two methods that are held against X."""
    if at.field.why_no_flow() is not None or _refuses(at.field.flow_log_determinant, at.x, TIMES[0]):
        return
    for time in (TIMES[0], -TIMES[0]):
        with torch.no_grad():
            moved, change = at.field.flow_with_log_determinant(at.x, time)
            image, expected = at.field.flow(at.x, time), at.field.flow_log_determinant(at.x, time)
        if moved.shape != image.shape or change.shape != expected.shape:
            yield f"it has the shapes {tuple(moved.shape)} and {tuple(change.shape)} for {len(at.x)} states"
            return
        yield from _difference(f"its image and flow for t = {time}", moved, image, at.tolerance(moved, image))
        slack = ROUNDING * at.entries**2 * _sizes(expected).clamp_min(1.0)
        yield from _difference(f"it and flow_log_determinant for t = {time}", change, expected, slack)


@METHODS.register("rates")
def _rates(at: Measured, facts: FieldFacts) -> Iterator[str]:
    """Those of Patankar steps, which move by them and not by X: rᵢⱼ takes mass from j to i. At |x|."""
    field: Any = at.field
    rates, known = getattr(field, "rates", None), facts.positive and bool(facts.linear_invariants)
    if not (known and callable(rates) and hasattr(field, "weights")) or "rates" in at.field._of_another:
        return
    x = at.x.abs()
    with torch.no_grad():
        given = rates(x)
    if tuple(given.shape) != (len(x), at.entries, at.entries):
        yield f"it has shape {tuple(given.shape)} for states {tuple(x.shape)}; a square matrix a state is needed"
        return
    weights = torch.as_tensor(field.weights, dtype=x.dtype)
    flux, moved = given * (weights * x).unsqueeze(-2), weights * at.rates_at(x)
    yield from _beyond("−rᵢⱼ", -given, at.tolerance(given))
    yield from _beyond("|rᵢᵢ|", given.diagonal(dim1=1, dim2=2).abs(), at.tolerance(given))
    what = "wᵢXᵢ and Σⱼ(rᵢⱼzⱼ − rⱼᵢzᵢ) with z = w∘x"
    yield from _difference(what, moved, flux.sum(-1) - flux.sum(-2), at.tolerance(flux, moved))


@METHODS.register("rotate")
def _rotate(at: Measured, facts: FieldFacts) -> Iterator[str]:
    """exp(tΛ(x)) and cay(tΛ(x)) keep norms, and the derivative of both at t = 0 is Λ(x), with Λ(x)x = X(x).

    Where X is odd Λ is even, since steps are declared to be odd, too.
    """
    if not (facts.tangent and isinstance(at.field, TangentField)) or "rotate" in at.field._of_another:
        return
    rotate, x = at.field.rotate, at.x
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(8), dtype=x.dtype)
    turning = at.rates.norm(dim=1) / x.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    step = 1e-4 / max(1.0, largest_finite(turning))
    size = torch.maximum(_sizes(x), _sizes(at.rates)).clamp_min(1.0)
    for chart in ("exp", "cayley"):
        with torch.no_grad():
            turned = rotate(x, probe, TIMES[0], chart).flatten(1)
            one, other = (rotate(x, x, k * step, chart) - rotate(x, x, -k * step, chart) for k in (1, 2))
        grown = (turned.norm(dim=1) - probe.flatten(1).norm(dim=1)).abs()
        yield from _beyond(f"|‖rotate(x, v, t, {chart!r})‖ − ‖v‖| for a random v", grown, at.tolerance(probe))
        slope = ((8 * one - other) / (12 * step)).flatten(1)
        what = f"the derivative of rotate(x, x, t, {chart!r}) at t = 0 and X"
        yield from _difference(what, slope, at.rates, 1e-8 * size)
        if facts.odd:
            with torch.no_grad():
                opposite = rotate(-x, probe, TIMES[0], chart).flatten(1)
            what = f"rotate(−x, v, t, {chart!r}) and rotate(x, v, t, {chart!r}) of an odd field"
            yield from _difference(what, opposite, turned, at.tolerance(probe))


def _flow_jacobians(at: Measured, time: float) -> Float[Tensor, "batch entries entries"]:
    return _finite(jacobians(lambda x: at.field.flow(x, time), at.x), "DΦ_t")


def _flow_coordinates(at: Measured, time: float) -> Float[Tensor, "batch entries entries"]:
    """R DΦ_t R⁻¹, in the coordinates in which the norm of the metric is the Euclidean one."""
    whiten, unwhiten = at.metric.whiten, at.metric.unwhiten
    return _finite(jacobians(lambda u: whiten(at.field.flow(unwhiten(u), time)), whiten(at.x)), "DΦ_t")
