"""Is a module, or a field, what it says it is? The checks, each a function of its own."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, NotConverged
from dynablocks.fields import VectorField
from dynablocks.fields.base import require_field
from dynablocks.linear import LinearMap, frozen_weights
from dynablocks.properties import VolumePreserving, declare, explain, verify
from dynablocks.properties.jacobians import DENSE_LIMIT, jacobians, largest_finite, with_gradients
from dynablocks.registry import Registry
from dynablocks.seeding import seeded
from dynablocks.switching import keep_constraints, project
from dynablocks.testing.facts import false_facts, false_methods, wrong_shapes
from dynablocks.testing.maps import wrong_maps
from dynablocks.testing.report import ConformanceReport, run_checks

EPSILON = torch.finfo(torch.float64).eps
TRAINING_STEPS = 25
COARSE = 1e-3
"""What a float32 copy may differ by, relative: a module may multiply float32's rounding by up to some 1e4."""

FIELD_ENTRIES = 128
"""Up to so many entries a state :func:`check_block` measures the facts of fields; :func:`check_field` takes more."""

FIELD_STATES = 8
"""At so many states of its sample at most, of which every two are compared."""

LOG_DETERMINANTS = ("log_determinant", "with_log_determinant")
"""The methods of a module that give log |det J|."""

MOST_STRETCH = 1e6
"""The largest condition number of a Jacobian that rounding of its determinant is granted."""


@dataclass(frozen=True)
class Case:
    """What a check works on: a float64 module in eval mode, a float64 batch. Checks change only :meth:`clone`."""

    block: nn.Module
    pristine: nn.Module
    sample: Tensor
    modes_differ: bool = False

    def clone(self) -> nn.Module:
        """A copy that has never been called."""
        return copy.deepcopy(self.pristine)

    @cached_property
    def trained(self) -> nn.Module:
        """A copy after :data:`TRAINING_STEPS` steps, the one that all checks share."""
        return _trained(self.clone(), self.sample)

    def close(self, one: Tensor, other: Tensor) -> bool:
        """Equal up to rounding: eps × entries × largest magnitude, with a factor of 64."""
        if one.shape != other.shape:
            return False
        finite = one.isfinite() & other.isfinite()
        if not bool((finite | (one == other) | (one.isnan() & other.isnan())).all()):
            return False
        one, other = (torch.where(finite, values, 0.0) for values in (one, other))
        scale = max(1.0, largest_finite(one), largest_finite(self.sample))
        return bool((one - other).abs().max() <= 64 * EPSILON * self.sample[0].numel() * scale)


Test = Callable[[Case], Iterator[str]]
CHECKS: Registry[Test] = Registry("module check")
"""Those of :func:`check_block` by name; each yields one sentence for each thing that is wrong."""

FIELD_CHECKS: Registry[Test] = Registry("field check")
"""Those of :func:`check_field` by name."""

BOTH = (CHECKS, FIELD_CHECKS)


def check(name: str, *suites: Registry[Test]) -> Callable[[Test], Test]:
    """A decorator that adds a check to suites, by default to that of blocks; a taken name is an InvalidArgument."""

    def file_under(function: Test) -> Test:
        for suite in suites or (CHECKS,):
            suite.register(name)(function)
        return function

    return file_under


@with_gradients
def check_block(
    block: nn.Module, sample: Tensor | None = None, *, seed: int = 0, modes_differ: bool = False
) -> ConformanceReport:
    """Run the conformance suite on a module; works on copies, so the module and the random state stay as they are.

    Shape and batch invariance, dtype, to 1e-3 the values of a float32 copy, determinism, train and eval
    mode, state round trips, gradients, dead parameters, the inverse and log-determinant, and every declared property
    (the volumes of parts of more than 700 entries are left to :func:`dynablocks.verify` with ``kinds``):
    at the start, after 25 SGD steps under :func:`dynablocks.switching.keep_constraints`, and under hostile parameters
    (×1000, zero, constant, rank one, negated; then projected, as after any step of an optimiser), where a declaration
    may change but must stay true, and an implicit step may raise :class:`dynablocks.errors.NotConverged`. The fields of
    its blocks must have the shape of their states, and they and their terms facts that are true at the start and under
    hostile parameters (up to :data:`FIELD_ENTRIES` entries; at states of the sample, where it has their shape). Linear
    maps must have the adjoint and the bounds that their matrix has, and in gradient fields a weight that steps may
    scale.

    Args:
        block: any module that declares its properties, or any composition of such.
        sample: a batch of at least two inputs; drawn from a normal distribution of shape ``block.in_shape`` (or
            ``input_shape``) when ``None``.
        seed: of the sample, the training targets and the probes.
        modes_differ: whether train and eval mode may give different outputs, as with dropout. What is declared is
            measured in eval mode, also of the trained module.

    Returns:
        The report; ``check_block(block).require()`` raises on the first failure.

    Raises:
        InvalidArgument: no sample was given and the module has no ``in_shape``, or the sample is no finite float batch;
            it is a vector field, which :func:`check_field` is for.

    Example:
        >>> from dynablocks.linear import OrthogonalDense
        >>> check_block(OrthogonalDense(2, 2)).passed
        True
    """
    if isinstance(block, VectorField):
        raise InvalidArgument(
            f"{type(block).__name__} is a vector field, and declares nothing as a map; check its facts with "
            "check_field(field), and a step of it with check_block(DynamicalBlock(field))."
        )
    with seeded(seed):
        return _report(block, _checked_sample(block, sample), CHECKS, seed, modes_differ)


@with_gradients
def check_field(field: VectorField, sample: Tensor | None = None, *, seed: int = 0) -> ConformanceReport:
    """Run the conformance suite on a vector field; works on copies, so the field and the random state stay as they are.

    The field must have the shape of its states, be what a module is to be (as in :func:`check_block`), and tell the
    truth: each fact of :meth:`~dynablocks.fields.VectorField.facts` and of its standing facts is measured in float64,
    against X and its dense Jacobians at random states, at a tenth and at ten times of these: at the start, after 25 SGD
    steps, and under hostile parameters. At the start, after the steps, and with all parameters negated or 1
    ``potential``, ``energy``, ``structure``, ``terms``, ``rates``, ``rotate``, the Euler constants, the flow (of one
    time for all states and of one each), its gradient in time, its constants and its log-determinant are held against X
    as well, where the field has them. All of it is measured of the terms of a sum, too: a splitting knows the field by
    these.

    It can refute a fact, not prove it: a constant that is true where it was measured may be too small elsewhere.

    Args:
        field: of at most 700 entries a state; check a small instance of a class.
        sample: at least two states, (batch, ``*field.in_shape``); drawn from a normal distribution when ``None``.
        seed: of the states, the training targets and the probes.

    Returns:
        The report; ``check_field(field).require()`` raises on the first failure.

    Raises:
        InvalidArgument: ``field`` is no vector field, has no ``in_shape`` or too many entries, or the sample is no
            finite float batch of states.

    Example:
        >>> from dynablocks.fields import GradientField
        >>> check_field(GradientField.example()).passed
        True
    """
    require_field("field", field)
    entries = math.prod(field.in_shape)
    if entries > DENSE_LIMIT:
        raise InvalidArgument(
            f"a state of {type(field).__name__} has {entries} entries; dense Jacobians are formed for at most "
            f"{DENSE_LIMIT}, so check a smaller instance."
        )
    with seeded(seed):
        return _report(field, checked_states(field, sample, 8), FIELD_CHECKS, seed)


def _report(
    module: nn.Module, sample: Tensor, checks: Registry[Test], seed: int, modes_differ: bool = False
) -> ConformanceReport:
    pristine = copy.deepcopy(module).cpu().double().eval()
    case = Case(copy.deepcopy(pristine), pristine, sample, modes_differ)
    return run_checks(type(module).__name__, checks, case, seed)


def _checked_sample(block: nn.Module, sample: Tensor | None) -> Tensor:
    if sample is None:
        shape = getattr(block, "in_shape", None) or getattr(block, "input_shape", None)
        if shape is None:
            raise InvalidArgument(
                f"{type(block).__name__} has neither in_shape nor input_shape; give sample=, a batch of inputs."
            )
        return torch.randn(4, *shape, dtype=torch.float64)
    if sample.ndim < 2 or sample.shape[0] < 2 or not sample.is_floating_point() or not torch.isfinite(sample).all():
        raise InvalidArgument(
            f"sample is a {sample.dtype} tensor of shape {tuple(sample.shape)}; "
            "a finite float batch of at least two is needed."
        )
    return sample.detach().cpu().double().clone()


def checked_states(field: VectorField, sample: Tensor | None, count: int) -> Tensor:
    """The sample in float64, or ``count`` normally distributed states where there is none.

    Raises:
        InvalidArgument: the sample is no finite float batch of at least two states of the field.
    """
    drawn = torch.randn(count, *field.in_shape, dtype=torch.float64) if sample is None else sample
    states = _checked_sample(field, drawn)
    if tuple(states.shape[1:]) != field.in_shape:
        raise InvalidArgument(
            f"sample has shape {tuple(states.shape)}; states of {type(field).__name__} have shape {field.in_shape}."
        )
    return states


def _field(module: nn.Module) -> VectorField:
    assert isinstance(module, VectorField)
    return module


def _fields(block: nn.Module) -> list[VectorField]:
    """Those of the dynamical blocks in a module, each once."""
    blocks = [module for module in block.modules() if isinstance(module, DynamicalBlock)]
    return [_field(field) for field in dict.fromkeys(field for part in blocks for field in part.fields)]


@check("shapes of its fields")
def _shapes(case: Case) -> Iterator[str]:
    for field in _fields(case.block):
        yield from (f"{type(field).__name__}: {sentence}" for sentence in wrong_shapes(field))


@check("shape", FIELD_CHECKS)
def _shape(case: Case) -> Iterator[str]:
    yield from wrong_shapes(_field(case.block))


@check("input untouched", *BOTH)
def _input_untouched(case: Case) -> Iterator[str]:
    """Before the other checks: where a map works in place, they compare its output with itself."""
    given = case.sample.clone()
    with torch.no_grad():
        case.block(given)
    if not torch.equal(given, case.sample):
        yield "forward changes its input in place"


@check("batch invariance", *BOTH)
def _batch_invariance(case: Case) -> Iterator[str]:
    with torch.no_grad():
        together = case.block(case.sample)
        if together.ndim < 1 or together.shape[0] != case.sample.shape[0]:
            yield f"a batch of {case.sample.shape[0]} gives an output of shape {tuple(together.shape)}"
            return
        for i in range(len(case.sample)):
            if not case.close(together[i : i + 1], case.block(case.sample[i : i + 1])):
                yield f"sample {i} alone gives another output than in the batch"
                return


@check("dtype", *BOTH)
def _dtype(case: Case) -> Iterator[str]:
    with torch.no_grad():
        exact = case.block(case.sample.clone())
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            given = case.clone().to(dtype)(case.sample.to(dtype, copy=True))
        if given.dtype != dtype:
            yield f"{dtype} parameters and inputs give a {given.dtype} output"
        # What is beyond the largest number of a format is infinite there, and no fault.
        if bool((~given.isfinite() & (exact.abs() <= torch.finfo(dtype).max)).any()):
            yield f"a copy in {dtype} gives NaN or infinity for a number"
        finite = given.isfinite() & exact.isfinite()
        gap = largest_finite(torch.where(finite, given.double() - exact, 0.0)) / max(1.0, largest_finite(exact))
        if not gap <= COARSE:
            yield f"a copy in {dtype} gives an output that is off by {gap:.1e} of the largest entry"


@check("determinism", *BOTH)
def _determinism(case: Case) -> Iterator[str]:
    with torch.no_grad():
        if not torch.equal(case.block(case.sample), case.block(case.sample)):
            yield "two calls on one input differ"


@check("train and eval", *BOTH)
def _modes(case: Case) -> Iterator[str]:
    """Where both modes give one output, what is said of it is one thing: other checks read it in eval mode alone."""
    block = case.clone()
    with torch.no_grad():
        evaluated, said = block.eval()(case.sample), _said(block)
        alike = case.close(evaluated, block.train()(case.sample))
        also = _said(block)
    if not alike and not case.modes_differ:
        yield "train and eval mode give different outputs; where they are to, give modes_differ=True"
    elif alike and also != said:
        yield f"train and eval mode give one output, of which they say {also} and {said}"


def _said(module: nn.Module) -> str:
    """What a module declares, or a field says of itself; constants to nine digits, which rounding leaves alone."""
    if isinstance(module, VectorField):
        return ", ".join(f"{name}={_digits(fact)}" for name, fact in vars(module.facts()).items())
    return repr(declare(module).properties)


def _digits(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_digits, value))})"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


@check("frozen weights", *BOTH)
def _frozen(case: Case) -> Iterator[str]:
    block = case.clone()
    with torch.no_grad():
        free = block(case.sample)
        with frozen_weights(block):
            frozen, copied = block(case.sample), copy.deepcopy(block)
        if not case.close(free, frozen):
            yield "the output differs inside frozen_weights"
        _shift_parameters(copied)
        _shift_parameters(block)
        if not case.close(copied(case.sample), block(case.sample)):
            yield "a copy made inside frozen_weights keeps the old weight"


def _shift_parameters(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.mul_(0.75).add_(0.125)


@check("state round trip", *BOTH)
def _state(case: Case) -> Iterator[str]:
    from safetensors.torch import load, save

    fresh, trained = case.clone(), case.trained
    with torch.no_grad():
        fresh(case.sample)
        expected = trained(case.sample)
        fresh.load_state_dict(trained.state_dict())
        if not torch.equal(fresh(case.sample), expected):
            yield "a copy that loads the state_dict of the trained module gives another output"
        state = {name: value.contiguous().clone() for name, value in trained.state_dict().items()}
        other = case.clone()
        other.load_state_dict(load(save(state)))
        if not torch.equal(other(case.sample), expected):
            yield "a copy that loads the safetensors bytes of the trained module gives another output"
        if not torch.equal(copy.deepcopy(trained)(case.sample), expected):
            yield "a deep copy of the trained module gives another output"


@check("gradients", *BOTH)
def _gradients(case: Case) -> Iterator[str]:
    block = case.clone()
    with torch.no_grad():
        # Away from the start, where exact zeros (of correlations, of biases) can sit on a kink.
        for parameter in block.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = [case.sample.clone().requires_grad_(True), *(p for p in block.parameters() if p.requires_grad)]
    with torch.no_grad():
        probe = torch.randn_like(block(case.sample))

    def value() -> Tensor:
        weighted: Tensor = probe * block(tensors[0])
        return weighted.sum()

    gradients = torch.autograd.grad(value(), tensors, allow_unused=True, materialize_grads=True)
    if not all(bool(torch.isfinite(g).all()) for g in gradients):
        yield "a gradient is not finite"
        return
    wrong = sum(not _slope_agrees(value, tensors, gradients) for _ in range(3))
    # One of three directions may cross a kink of a piecewise linear activation.
    if wrong > 1:
        yield "autograd disagrees with central differences"


def _slope_agrees(value: Callable[[], Tensor], tensors: list[Tensor], gradients: tuple[Tensor, ...]) -> bool:
    step = 1e-6
    directions = [torch.randn_like(t) for t in tensors]
    origins = [t.detach().clone() for t in tensors]
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for t, origin, d in zip(tensors, origins, directions, strict=True):
                t.copy_(origin + sign * step * d)
            values.append(float(value()))
        for t, origin in zip(tensors, origins, strict=True):
            t.copy_(origin)
    measured = (values[0] - values[1]) / (2 * step)
    exact = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    scale = sum(float(g.norm() * d.norm()) for g, d in zip(gradients, directions, strict=True))
    # Differences lose eps / step; the step's square is what the third derivative multiplies.
    return abs(measured - exact) <= 1e-6 * scale + 100 * EPSILON / step * max(1.0, *map(abs, values))


@check("gradient flow", *BOTH)
def _gradient_flow(case: Case) -> Iterator[str]:
    block = case.clone()
    alive: set[str] = set()
    for attempt in range(3):
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.05 * attempt * torch.randn_like(parameter))
        output = block(case.sample)
        if not output.requires_grad:
            break
        block.zero_grad()
        (torch.randn_like(output) * output).sum().backward()
        alive |= {n for n, p in block.named_parameters() if p.grad is not None and bool(p.grad.any())}
    dead = [n for n, p in block.named_parameters() if p.requires_grad and n not in alive]
    if dead:
        yield f"no gradient reaches {', '.join(dead)}"


@check("log-determinant")
def _log_determinant(case: Case) -> Iterator[str]:
    """At the start, where biases and logarithms of scales may be 0, after training, and with parameters as in MILD."""
    if any(callable(getattr(case.block, method, None)) for method in LOG_DETERMINANTS):
        yield from _first_wrong(case, lambda block: _wrong_log_determinants(block, case))


def _wrong_log_determinants(block: nn.Module, case: Case) -> Iterator[str]:
    """A sentence for each of the two methods that contradicts the map; one may refuse."""
    alone, beside = (getattr(block, method, None) for method in LOG_DETERMINANTS)
    given: dict[str, Tensor] = {}
    image = output = case.sample
    with torch.no_grad(), contextlib.suppress(InvalidArgument):
        if callable(alone):
            given["log_determinant"] = alone(case.sample)
    with torch.no_grad(), contextlib.suppress(InvalidArgument):
        if callable(beside):
            image, given["with_log_determinant"] = beside(case.sample)
            output = block(case.sample)
    if not given:
        return
    if not case.close(image, output):
        yield "with_log_determinant gives another image than forward"
    dense = jacobians(block, case.sample)
    _, expected = torch.linalg.slogdet(dense)
    tolerance = _rounding_of_volumes(block, dense) * max(1.0, largest_finite(expected))
    for method, found in given.items():
        # −∞ beside −∞, of a singular Jacobian, is equal too.
        agrees = found.shape == expected.shape and bool(
            (((found - expected).abs() <= tolerance) | (found == expected)).all()
        )
        if not agrees:
            yield f"{method} gives {found.tolist()}, the dense Jacobian {expected.tolist()}"


def _rounding_of_volumes(block: nn.Module, dense: Tensor) -> float:
    """What rounding, and an equation that is solved, may do to log |det J|: the condition number of J multiplies it."""
    values = torch.linalg.svdvals(dense.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    condition = (values[:, 0] / values[:, -1]).nan_to_num(nan=1.0, posinf=MOST_STRETCH).max().clamp(1.0, MOST_STRETCH)
    solved = declare(block).properties.of(VolumePreserving)
    slack = 64 * EPSILON * dense.shape[-1] ** 2 + (0.0 if solved is None else solved.tolerance)
    return float(condition) * slack


@check("explain")
def _explain(case: Case) -> Iterator[str]:
    text = str(explain(case.block))
    if not text.strip():
        yield "explain prints nothing"
    for held in verify(case.block, case.sample, kinds=()):
        yield f"verify ignores its kinds: {held}"


@check("properties at the start")
def _properties(case: Case) -> Iterator[str]:
    yield from _violations(case.block, case.sample, deep=True)


@check("properties after training")
def _properties_after_training(case: Case) -> Iterator[str]:
    yield from _violations(case.trained, case.sample, deep=True)


@check("properties under hostile parameters")
def _properties_under_hostile_parameters(case: Case) -> Iterator[str]:
    for name, spoil in HOSTILE.items():
        block = _spoiled(case.clone(), spoil)
        for kind in {type(declared): None for declared in declare(block).properties}:
            # An implicit step may refuse an equation that it cannot solve; it must not answer wrongly.
            with contextlib.suppress(NotConverged):
                for held in verify(block, case.sample, kinds=(kind,), search_steps=5):
                    if not held.passed:
                        yield f"parameters {name}: {held}"


@check("facts of its fields")
def _facts_of_fields(case: Case) -> Iterator[str]:
    for field in _fields(case.clone()):
        if math.prod(field.in_shape) <= FIELD_ENTRIES:
            states = _scaled(_states(field, case.sample))
            wrong = [*false_facts(field, states), *_false_under_hostile_parameters(field, states)]
            yield from (f"{type(field).__name__}: {sentence}" for sentence in wrong)


def _states(field: VectorField, sample: Tensor) -> Tensor:
    """Those of the sample, where it has their shape, otherwise drawn ones; of a field that keeps signs nonnegative."""
    alike = tuple(sample.shape[1:]) == field.in_shape
    states = sample[:FIELD_STATES] if alike else torch.randn(4, *field.in_shape, dtype=torch.float64)
    return states.abs() if field.standing_facts().positive else states


@check("adjoint")
def _adjoint(case: Case) -> Iterator[str]:
    yield from wrong_maps(case.block)
    if any(isinstance(part, LinearMap) for part in case.block.modules()):
        for name, spoil in HOSTILE.items():
            yield from (f"parameters {name}: {sentence}" for sentence in wrong_maps(_spoiled(case.clone(), spoil)))


@check("facts at the start", FIELD_CHECKS)
def _facts(case: Case) -> Iterator[str]:
    yield from false_facts(_field(case.block), _scaled(case.sample))


@check("facts after training", FIELD_CHECKS)
def _facts_after_training(case: Case) -> Iterator[str]:
    yield from false_facts(_field(case.trained), _scaled(case.sample))


@check("facts under hostile parameters", FIELD_CHECKS)
def _facts_under_hostile_parameters(case: Case) -> Iterator[str]:
    yield from _false_under_hostile_parameters(_field(case.clone()), _scaled(case.sample))


@check("methods", FIELD_CHECKS)
def _methods(case: Case) -> Iterator[str]:
    """At the start, where biases may be 0, after training, and with parameters as in MILD."""
    states = _scaled(case.sample)
    yield from _first_wrong(case, lambda field: false_methods(_field(field), states))


def _first_wrong(case: Case, check: Callable[[nn.Module], Iterator[str]]) -> Iterator[str]:
    """What is wrong at the start; where nothing is, after training; then with the parameters of MILD."""
    wrong = list(check(case.block)) or [f"after training, {told}" for told in check(case.trained)]
    if not wrong and next(case.block.parameters(), None) is not None:
        for name in MILD:
            # An equation may have no solution there.
            with contextlib.suppress(NotConverged):
                block = _spoiled(case.clone(), HOSTILE[name])
                wrong += [f"parameters {name}: {told}" for told in check(block)]
    yield from wrong


def _scaled(x: Tensor) -> Tensor:
    """The states, those at a tenth and those at ten times of them: near 0 and where functions are saturated, too."""
    return torch.cat([x, 0.1 * x, 10 * x])


def _false_under_hostile_parameters(field: VectorField, states: Tensor) -> Iterator[str]:
    if next(field.parameters(), None) is None:
        return
    for name, spoil in HOSTILE.items():
        # A field may solve an equation, and refuse one; it must not answer wrongly.
        with contextlib.suppress(NotConverged):
            for sentence in false_facts(_field(_spoiled(copy.deepcopy(field), spoil)), states):
                yield f"parameters {name}: {sentence}"


def _spoiled(module: nn.Module, spoil: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module itself with other parameters, projected as after any step of an optimiser."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spoil(parameter))
    project(module)
    return module


def _rank_one(parameter: Tensor) -> Tensor:
    if parameter.ndim < 2:
        return parameter
    flat = parameter.flatten(1)
    return (flat[:, :1] * flat[:1]).reshape(parameter.shape)


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "x1000": lambda p: 1000 * p,
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "of rank one": _rank_one,
    "negated": torch.neg,
}


MILD = ("negated", "constant")
"""Those under which flows and their determinants stay within the range of numbers."""


def _violations(block: nn.Module, sample: Tensor, *, deep: bool = False, search_steps: int = 15) -> Iterator[str]:
    held = verify(block, sample, deep=deep, search_steps=search_steps)
    return (str(result) for result in held if not result.passed)


def _trained(block: nn.Module, sample: Tensor) -> nn.Module:
    """The module itself after 25 SGD steps on a regression to random targets of twice the output's size."""
    block.train()
    parameters = [p for p in block.parameters() if p.requires_grad]
    if not parameters:
        return block.eval()
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    handle = keep_constraints(block, optimiser)
    with torch.no_grad():
        output = block(sample)
        target = 2 * output + torch.randn_like(output)
    for _ in range(TRAINING_STEPS):
        optimiser.zero_grad()
        loss = (block(sample) - target).square().mean()
        if loss.requires_grad:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    handle.remove()
    return block.requires_grad_(True).eval()
