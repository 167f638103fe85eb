"""The conformance suite: is a module, or a field, what it says it is? For the library's and for yours."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, NotConverged, PropertyViolated
from dynablocks.fields import FieldFacts, GradientField, VectorField
from dynablocks.fields.base import require_field
from dynablocks.fields.checks import false_facts, false_methods, wrong_shapes
from dynablocks.linear import OrthogonalDense, frozen_weights
from dynablocks.properties import (
    Declaration,
    GradientNormPreserving,
    Invertible,
    Lipschitz,
    Structured,
    declare,
    explain,
    verify,
)
from dynablocks.properties.verify import DENSE_LIMIT, jacobians, largest_finite, with_gradients
from dynablocks.switching import FreeSignal, keep_constraints, project

EPSILON = torch.finfo(torch.float64).eps
TRAINING_STEPS = 25
FIELD_ENTRIES = 128
"""Up to so many entries a state :func:`check_block` measures the facts of fields; :func:`check_field` takes more."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; ``message`` says what is wrong when it failed."""

    check: str
    passed: bool
    message: str = ""

    def __str__(self) -> str:
        return f"ok    {self.check}" if self.passed else f"FAIL  {self.check}: {self.message}"


@dataclass(frozen=True)
class ConformanceReport:
    """All findings about one module; print it, ask ``passed`` or ``failed``, or :meth:`require` it."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(f.check for f in self.findings if not f.passed)

    def require(self) -> ConformanceReport:
        """Itself when everything passed.

        Raises:
            PropertyViolated: a check failed; the sentence names the module, the check and what was found.
        """
        for finding in self.findings:
            if not finding.passed:
                raise PropertyViolated(f"{self.subject} fails the check {finding.check!r}: {finding.message}")
        return self

    def __str__(self) -> str:
        return "\n".join([self.subject, *(f"  {finding}" for finding in self.findings)])


@dataclass(frozen=True)
class Case:
    """What a check works on: a float64 module in eval mode, a float64 batch. Checks change only :meth:`clone`."""

    block: nn.Module
    pristine: nn.Module
    sample: Tensor

    def clone(self) -> nn.Module:
        """A copy that has never been called."""
        return copy.deepcopy(self.pristine)

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
CHECKS: dict[str, Test] = {}
"""Those of :func:`check_block` by name; each yields one sentence for each thing that is wrong."""

FIELD_CHECKS: dict[str, Test] = {}
"""Those of :func:`check_field` by name."""

BOTH = (CHECKS, FIELD_CHECKS)


def check(name: str, *suites: dict[str, Test]) -> Callable[[Test], Test]:
    """A decorator that adds a check to suites, by default to that of blocks."""

    def file_under(function: Test) -> Test:
        for suite in suites or (CHECKS,):
            suite[name] = function
        return function

    return file_under


@with_gradients
def check_block(block: nn.Module, sample: Tensor | None = None, *, seed: int = 0) -> ConformanceReport:
    """Run the conformance suite on a module; works on copies, so the module and the random state stay as they are.

    Shape and batch invariance, dtype, determinism, train and eval mode, state round trips, gradients, dead parameters,
    the inverse and log-determinant, and every declared property: at the start, after 25 SGD steps under
    :func:`dynablocks.switching.keep_constraints`, and under hostile parameters (×1000, zero, constant, rank one; then
    projected, as after any step of an optimiser), where a declaration may change but must stay true, and an implicit
    step may raise :class:`dynablocks.errors.NotConverged`. The fields of its blocks must have the shape of their
    states, and facts that are true at the start and under hostile parameters (up to :data:`FIELD_ENTRIES` entries).

    Args:
        block: any module that declares its properties, or any composition of such.
        sample: a batch of at least two inputs; drawn from a normal distribution of shape ``block.in_shape`` (or
            ``input_shape``) when ``None``.
        seed: of the sample, the training targets and the probes.

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _report(block, _checked_sample(block, sample), CHECKS, seed)


@with_gradients
def check_field(field: VectorField, sample: Tensor | None = None, *, seed: int = 0) -> ConformanceReport:
    """Run the conformance suite on a vector field; works on copies, so the field and the random state stay as they are.

    The field must have the shape of its states, be what a module is to be (as in :func:`check_block`), and tell the
    truth: each fact of :meth:`~dynablocks.fields.VectorField.facts` and of its standing facts is measured in float64,
    against X and its dense Jacobians at random states, at a tenth and at ten times of these: at the start, after 25 SGD
    steps, and under hostile parameters. At the start ``potential``, ``energy``, ``structure``, ``terms``, the Euler
    constants, the flow, its constants and its log-determinant are held against X as well, where the field has them.

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = torch.randn(8, *field.in_shape, dtype=torch.float64) if sample is None else sample
        states = _checked_sample(field, drawn)
        if tuple(states.shape[1:]) != field.in_shape:
            raise InvalidArgument(
                f"sample has shape {tuple(states.shape)}; states of {type(field).__name__} have shape {field.in_shape}."
            )
        return _report(field, states, FIELD_CHECKS, seed)


def _report(module: nn.Module, sample: Tensor, checks: dict[str, Test], seed: int) -> ConformanceReport:
    pristine = copy.deepcopy(module).cpu().double().eval()
    case = Case(copy.deepcopy(pristine), pristine, sample)
    findings = []
    for name, test in checks.items():
        torch.manual_seed(seed)
        findings.append(_run(name, test, case))
    return ConformanceReport(type(module).__name__, tuple(findings))


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


def _run(name: str, test: Test, case: Case) -> Finding:
    try:
        problems = list(test(case))
    except Exception as error:
        sentence = str(error).split("\n", maxsplit=1)[0]
        problems = [f"it raised {type(error).__name__}: {sentence}"]
    return Finding(name, not problems, "; ".join(problems))


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
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            given = case.clone().to(dtype)(case.sample.to(dtype)).dtype
        if given != dtype:
            yield f"{dtype} parameters and inputs give a {given} output"


@check("determinism", *BOTH)
def _determinism(case: Case) -> Iterator[str]:
    with torch.no_grad():
        if not torch.equal(case.block(case.sample), case.block(case.sample)):
            yield "two calls on one input differ"


@check("input untouched", *BOTH)
def _input_untouched(case: Case) -> Iterator[str]:
    given = case.sample.clone()
    with torch.no_grad():
        case.block(given)
    if not torch.equal(given, case.sample):
        yield "forward changes its input in place"


@check("train and eval", *BOTH)
def _modes(case: Case) -> Iterator[str]:
    block = case.clone()
    with torch.no_grad():
        evaluated = block.eval()(case.sample)
        if not case.close(evaluated, block.train()(case.sample)):
            yield "train and eval mode give different outputs"


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

    fresh, trained = case.clone(), _trained(case)
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
    method = getattr(case.block, "log_determinant", None)
    if method is None:
        return
    try:
        with torch.no_grad():
            given = method(case.sample)
    except InvalidArgument:
        return
    _, expected = torch.linalg.slogdet(jacobians(case.block, case.sample))
    tolerance = 64 * EPSILON * case.sample[0].numel() ** 2 * max(1.0, largest_finite(expected))
    # −∞ beside −∞, of a singular Jacobian, is equal too.
    agrees = given.shape == expected.shape and bool(
        (((given - expected).abs() <= tolerance) | (given == expected)).all()
    )
    if not agrees:
        yield f"log_determinant gives {given.tolist()}, the dense Jacobian {expected.tolist()}"


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
    yield from _violations(_trained(case), case.sample, deep=True)


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
            states = _scaled(torch.randn(4, *field.in_shape, dtype=torch.float64))
            wrong = [*false_facts(field, states), *_false_under_hostile_parameters(field, states)]
            yield from (f"{type(field).__name__}: {sentence}" for sentence in wrong)


@check("facts at the start", FIELD_CHECKS)
def _facts(case: Case) -> Iterator[str]:
    yield from false_facts(_field(case.block), _scaled(case.sample))


@check("facts after training", FIELD_CHECKS)
def _facts_after_training(case: Case) -> Iterator[str]:
    yield from false_facts(_field(_trained(case)), _scaled(case.sample))


@check("facts under hostile parameters", FIELD_CHECKS)
def _facts_under_hostile_parameters(case: Case) -> Iterator[str]:
    yield from _false_under_hostile_parameters(_field(case.clone()), _scaled(case.sample))


@check("methods", FIELD_CHECKS)
def _methods(case: Case) -> Iterator[str]:
    yield from false_methods(_field(case.block), _scaled(case.sample))


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
}


def _violations(block: nn.Module, sample: Tensor, *, deep: bool = False, search_steps: int = 15) -> Iterator[str]:
    held = verify(block, sample, deep=deep, search_steps=search_steps)
    return (str(result) for result in held if not result.passed)


def _trained(case: Case) -> nn.Module:
    """A copy after 25 SGD steps on a regression to random targets of twice the output's size."""
    block = case.clone().train()
    parameters = [p for p in block.parameters() if p.requires_grad]
    if not parameters:
        return block.eval()
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    handle = keep_constraints(block, optimiser)
    with torch.no_grad():
        output = block(case.sample)
        target = 2 * output + torch.randn_like(output)
    for _ in range(TRAINING_STEPS):
        optimiser.zero_grad()
        loss = (block(case.sample) - target).square().mean()
        if loss.requires_grad:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    handle.remove()
    return block.requires_grad_(True).eval()


class HealthyBlock(Structured):
    r"""x ↦ s ∘ x + b with L = max |s|, invertible where s ≠ 0: every broken twin differs from it in one thing.

    Example:
        >>> check_block(HealthyBlock()).passed
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 0.75]))
        self.shift = nn.Parameter(torch.tensor([0.25, 0.0, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift

    def inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) / self.scale

    def log_determinant(self, x: Tensor) -> Tensor:
        return self.scale.abs().log().sum().expand(x.shape[0])

    def declare(self) -> Declaration:
        sizes = self.scale.detach().double().abs()
        inverse = (Invertible(),) if float(sizes.min()) > 0 else ()
        return Declaration.of(Lipschitz(float(sizes.max())), *inverse, reason="elementwise", title=type(self).__name__)


class _LipschitzTooSmall(HealthyBlock):
    def declare(self) -> Declaration:
        constant = 0.99 * float(self.scale.detach().double().abs().max())
        return Declaration.of(Lipschitz(constant), reason="one per cent too small")


class _DeclaresOnce(HealthyBlock):
    def __init__(self) -> None:
        super().__init__()
        self.first_declaration = super().declare()

    def declare(self) -> Declaration:
        return self.first_declaration


class _ForgetsItsConstraint(HealthyBlock):
    def declare(self) -> Declaration:
        return Declaration.of(Lipschitz(1.0), reason="true as long as somebody keeps |s| <= 1")


class _InverseOff(HealthyBlock):
    def inverse(self, y: Tensor) -> Tensor:
        return super().inverse(y) + 1e-9


class _LogDeterminantOff(HealthyBlock):
    def log_determinant(self, x: Tensor) -> Tensor:
        return super().log_determinant(x) + 1e-9


class _BatchMean(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-6 * x.mean(0)


class _BatchLost(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten()


class _Promotes(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.ones(1, dtype=torch.float64)


class _NonDeterministic(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-6 * torch.rand(())


class _ChangesInput(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x)
        if not torch.is_grad_enabled():
            x.mul_(2)
        return output


class _TrainsDifferently(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 - 1e-6 if self.training else 1.0)


class _KeepsOldWeight(HealthyBlock):
    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        if self.kept is None:
            object.__setattr__(self, "kept", self.scale.detach().clone())
        assert self.kept is not None
        return self.kept * x + self.shift + 0 * self.scale.sum()


class _StateElsewhere(HealthyBlock):
    offset: float = 0.0

    def project_(self) -> None:
        self.offset = float(self.shift.detach().sum())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


class _GradientOff(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1e-3 * (x - x.detach())


class _InfiniteGradient(HealthyBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * (x - x).abs().sqrt()


class _DeadParameter(HealthyBlock):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


class _NormPreservingClaim(Structured):
    """The step of size 1.9, which is non-expansive, with the claim that holds at 2 only."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.block = DynamicalBlock(GradientField(OrthogonalDense(3, 3)), "euler", FreeSignal(1.9))

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.block(x)
        return image

    def declare(self) -> Declaration:
        return Declaration.of(*self.block.properties, GradientNormPreserving(), reason="wishful thinking")


class _SilentExplanation(HealthyBlock):
    def declare(self) -> Declaration:
        raise InvalidArgument("this module does not know what it is.")


class _FrozenDiffers(Structured):
    """An orthogonal map whose output depends on whether its weight is being shared."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.linear = OrthogonalDense(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.linear(x)
        return image * (1 - 1e-6 if self.linear._held is not None else 1.0)

    def declare(self) -> Declaration:
        return Declaration.of(
            Lipschitz(math.nextafter(self.linear.properties.lipschitz, math.inf)), reason="orthogonal"
        )


class _OneNumberAState(VectorField):
    """Minus the sum of a state, which x + hX(x) would subtract from each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return -self.rate * x.sum(1, keepdim=True)

    def facts(self) -> FieldFacts:
        return FieldFacts(odd=True, reason="linear")


class _FalseDivergence(GradientField):
    def facts(self) -> FieldFacts:
        return replace(super().facts(), divergence_free=True)


def _euler(field: VectorField) -> DynamicalBlock:
    return DynamicalBlock(field, "euler", FreeSignal(0.5))


def broken_twins() -> dict[str, tuple[nn.Module, str]]:
    """Modules that violate exactly one thing each, with the name of the check that must catch it.

    Example:
        >>> module, name = broken_twins()["Lipschitz constant 1 % too small"]
        >>> name in check_block(module).failed
        True
    """
    return {
        "Lipschitz constant 1 % too small": (_LipschitzTooSmall(), "properties at the start"),
        "constraint nobody keeps": (_ForgetsItsConstraint(), "properties after training"),
        "declaration of old parameters": (_DeclaresOnce(), "properties under hostile parameters"),
        "inverse off by 1e-9": (_InverseOff(), "properties at the start"),
        "gradient-norm preservation at h = 1.9": (_NormPreservingClaim(), "properties at the start"),
        "log-determinant off by 1e-9": (_LogDeterminantOff(), "log-determinant"),
        "output depends on the batch": (_BatchMean(), "batch invariance"),
        "batch dimension lost": (_BatchLost(), "batch invariance"),
        "float32 becomes float64": (_Promotes(), "dtype"),
        "random forward": (_NonDeterministic(), "determinism"),
        "input changed in place": (_ChangesInput(), "input untouched"),
        "train differs from eval": (_TrainsDifferently(), "train and eval"),
        "weight cached at the first evaluation": (_KeepsOldWeight(), "state round trip"),
        "state outside the state_dict": (_StateElsewhere(), "state round trip"),
        "frozen weights change the output": (_FrozenDiffers(), "frozen weights"),
        "gradient off": (_GradientOff(), "gradients"),
        "gradient not finite": (_InfiniteGradient(), "gradients"),
        "parameter without gradient": (_DeadParameter(), "gradient flow"),
        "declaration that fails": (_SilentExplanation(), "explain"),
        "field of one number a state": (_euler(_OneNumberAState()), "shapes of its fields"),
        "fact that no Euler step uses": (_euler(_FalseDivergence(OrthogonalDense(3, 3))), "facts of its fields"),
    }
