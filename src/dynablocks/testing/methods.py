"""Is an integrator what it says of itself? Its order, its steps and their inverses, on one field, in float64."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, NotConverged, require_range
from dynablocks.fields import VectorField
from dynablocks.fields.base import require_field
from dynablocks.integrators import Integrator, exact_solution, integrator, measured_order
from dynablocks.integrators.base import StepSize
from dynablocks.integrators.order import declared_order
from dynablocks.properties import Invertible, Lipschitz, verify
from dynablocks.properties.jacobians import largest_finite, with_gradients
from dynablocks.registry import Registry
from dynablocks.seeding import seeded
from dynablocks.switching import FreeSignal
from dynablocks.testing.report import ConformanceReport, run_checks
from dynablocks.testing.suite import check_block, checked_states

STATES = 4
"""How many states are drawn."""

OFF_THE_ORDER = 0.15
"""By how much a measured order may differ from the declared one."""

ROUNDING, OF_SOLUTIONS, OF_SLOPES = 1e-10, 1e-8, 1e-5
"""What two steps that are equal, a flow and the solution found by steps, and a gradient and a difference may differ by,
relative to the states."""


@dataclass(frozen=True, eq=False)
class Trial:
    """What a check of a method works on.

    Args:
        method: the method.
        field: a float64 field in eval mode that it takes.
        x: at least two float64 states, (batch, …).
        step_size: of the steps that are compared.
        time: at which errors are taken for the order.
        counts: the numbers of steps for it, those of :func:`dynablocks.integrators.measured_order` when ``None``.
        seed: of the block's checks.
    """

    method: Integrator
    field: VectorField
    x: Tensor
    step_size: float = 0.25
    time: float = 1.0
    counts: Sequence[int] | None = None
    seed: int = 0

    def step(self, x: Tensor, step_size: StepSize) -> Tensor:
        """Ψ^h(x), without gradients."""
        with torch.no_grad():
            return self.method.step(self.field, x, step_size)

    def difference(self, what: str, one: Tensor, other: Tensor, slack: float = ROUNDING) -> Iterator[str]:
        """A sentence where two states differ by more than rounding, and what a solver leaves, can do."""
        if one.shape != other.shape:
            yield f"{what} have the shapes {tuple(one.shape)} and {tuple(other.shape)}"
            return
        gap, size = float((one - other).abs().max()), max(1.0, *map(largest_finite, (self.x, one, other)))
        if not gap <= max(slack, 100 * self.method.tolerance) * size:
            yield f"{what} differ by up to {gap:.1e}"


Test = Callable[[Trial], Iterator[str]]
INTEGRATOR_CHECKS: Registry[Test] = Registry("integrator check")
"""Those of :func:`check_integrator` by name; each yields one sentence for each thing that is wrong."""


@with_gradients
def check_integrator(
    method: str | Integrator,
    field: VectorField,
    sample: Tensor | None = None,
    *,
    step_size: float = 0.25,
    time: float = 1.0,
    counts: Sequence[int] | None = None,
    seed: int = 0,
) -> ConformanceReport:
    r"""Whether a method is what it says of itself, on one field; works on copies of the field and the states.

    - "order": the order that its errors show (:func:`dynablocks.integrators.measured_order`) is within 0.15 of the
      declared one; of one that says ``None``, Ψ^t(x) is the solution at t = ``time``;
    - "a step for each state": with h of shape (batch,) or (batch, 1) a batch moves as its states do one by one;
    - "a learned step": with h a tensor the step has the gradient in h that its differences show;
    - "inverse": the step −h of a ``symmetric`` method undoes the step h, and ``inverse`` where Invertible is declared;
    - "block": a block of it passes :func:`dynablocks.testing.check_block`, with all that it declares, and one of the
      step −h, and of the bound ``"paper"`` where that is another, has the Lipschitz constant that it declares.

    It can refute what a method says, not prove it: take a field of the structure that the method is made for, and
    another one.

    Condition: hL is well below 1; the field is smooth where the method has an order, and not so special that a method
    shows a higher one (as some do on linear fields).

    Args:
        method: an integrator or its registry name.
        field: X, which the method takes.
        sample: at least two states, (batch, ``*field.in_shape``); drawn from a normal distribution when ``None``, their
            absolute values for a field that keeps states nonnegative.
        step_size: h of the steps that are compared and of the block.
        time, counts: as in :func:`dynablocks.integrators.measured_order`; other ones help where it finds no order.
        seed: of the states, and as in ``check_block``.

    Returns:
        The report; ``check_integrator(method, field).require()`` raises on the first failure.

    Raises:
        InvalidArgument: ``method`` is no integrator or does not take the field, ``field`` is no vector field or has no
            ``in_shape``, the sample is no finite float batch of states, or a number is out of range.

    Example:
        >>> from dynablocks.fields import GradientField
        >>> from dynablocks.linear import OrthogonalDense
        >>> print(check_integrator("heun", GradientField(OrthogonalDense(2, 2), "tanh")))
        ExplicitRungeKutta(heun)
          ok    order
          ok    a step for each state
          ok    a learned step
          ok    inverse
          ok    block
    """
    chosen = integrator(method)
    chosen.require(require_field("field", field))
    require_range("step_size", step_size, 0.0, open_low=True)
    require_range("time", time, 0.0, open_low=True)
    with seeded(seed):
        states = checked_states(field, sample, STATES)
        if sample is None and field.standing_facts().positive:
            states = states.abs()
        double = copy.deepcopy(field).cpu().double().eval()
        trial = Trial(chosen, double, states, step_size, time, counts, seed)
        return run_checks(repr(chosen), INTEGRATOR_CHECKS, trial, seed)


@INTEGRATOR_CHECKS.register("order")
def _order(trial: Trial) -> Iterator[str]:
    order, time = declared_order(trial.method), trial.time
    if order is None:
        what = f"the step t = {time:g} of an exact flow, whose order is None, and the solution"
        end = exact_solution(trial.field, trial.x, time)
        yield from trial.difference(what, trial.step(trial.x, time), end, OF_SOLUTIONS)
        return
    measured = measured_order(trial.method, trial.field, trial.x, time, trial.counts)
    if not abs(measured - order) <= OFF_THE_ORDER:
        yield f"{order} is declared, and the errors at t = {time:g} show {measured:.2f}"


@INTEGRATOR_CHECKS.register("a step for each state")
def _steps_of_states(trial: Trial) -> Iterator[str]:
    sizes = trial.step_size * torch.linspace(0.5, 1.0, len(trial.x), dtype=trial.x.dtype)
    alone = torch.cat([trial.step(x, h) for x, h in zip(torch.split(trial.x, 1), sizes.tolist(), strict=True)])
    for given in (sizes, sizes[:, None]):
        shape = f"h of shape {tuple(given.shape)}, one a state,"
        try:
            together = trial.step(trial.x, given)
        except Exception as error:
            sentence = str(error).split("\n", maxsplit=1)[0]
            yield f"a step with {shape} raises {type(error).__name__} ({sentence}); use over_states(step_size, x)"
            continue
        yield from trial.difference(f"a step with {shape} and the steps of each state alone", together, alone)


@INTEGRATOR_CHECKS.register("a learned step")
def _learned_step(trial: Trial) -> Iterator[str]:
    """⟨v, ∂Ψ^h(x)/∂h⟩ for a random v, against a difference of fourth order."""
    probe, h = torch.randn_like(trial.x), trial.step_size
    learned = torch.tensor(h, dtype=trial.x.dtype, requires_grad=True)
    moved = trial.method.step(trial.field, trial.x.clone(), learned)
    slope = None
    if moved.requires_grad:
        (slope,) = torch.autograd.grad((probe * moved).sum(), learned, allow_unused=True)
    small = 1e-3 * h
    near, far = (
        float((probe * (trial.step(trial.x, h + k * small) - trial.step(trial.x, h - k * small))).sum()) for k in (1, 2)
    )
    expected = (8 * near - far) / (12 * small)
    size = max(1.0, abs(expected), float((probe * moved.detach()).abs().sum()))
    if slope is None and abs(expected) > OF_SLOPES * size:
        yield "step(field, x, h) has no gradient in a tensor h, so that steps are not learned; compute with h itself"
    elif slope is not None and not abs(float(slope) - expected) <= OF_SLOPES * size:
        yield f"⟨v, ∂Ψ^h(x)/∂h⟩ for a random v is {float(slope):.6g}, and its differences show {expected:.6g}"


@INTEGRATOR_CHECKS.register("inverse")
def _inverse(trial: Trial) -> Iterator[str]:
    method, field, h = trial.method, trial.field, trial.step_size
    moved = trial.step(trial.x, h)
    if method.symmetric:
        yield from trial.difference("symmetric is said, and Ψ^{−h}(Ψ^h(x)) and x", trial.step(moved, -h), trial.x)
    with torch.no_grad():
        if method.declare(field, h).properties.of(Invertible) is None:
            return
        back = method.inverse(field, moved, h)
    yield from trial.difference("Invertible is declared, and inverse(field, Ψ^h(x), h) and x", back, trial.x)


@INTEGRATOR_CHECKS.register("block")
def _block(trial: Trial) -> Iterator[str]:
    block = DynamicalBlock(trial.field, trial.method, FreeSignal(trial.step_size))
    report = check_block(block, trial.x, seed=trial.seed)
    yield from (f"{found.check}: {found.message}" for found in report.findings if not found.passed)
    yield from _wrong_constant(trial, trial.step_size, "paper", block.properties.lipschitz)
    # A method may refuse to go back, and an equation may have no solution there: neither is a wrong constant.
    with contextlib.suppress(InvalidArgument, NotConverged):
        yield from _wrong_constant(trial, -trial.step_size, "tight", math.inf)
        back = DynamicalBlock(trial.field, trial.method, FreeSignal(-trial.step_size))
        yield from _wrong_constant(trial, -trial.step_size, "paper", back.properties.lipschitz)


def _wrong_constant(trial: Trial, step_size: float, bound: str, known: float) -> Iterator[str]:
    """What expands beyond its constant, where that is another than the known one, which has been measured."""
    block = DynamicalBlock(trial.field, trial.method, FreeSignal(step_size), bound=bound)
    if not block.properties.lipschitz < known:
        return
    what = ["the step −h"] * (step_size < 0) + ["the bound 'paper'"] * (bound == "paper")
    held = verify(block, trial.x, kinds=(Lipschitz,), search_steps=15)
    yield from (f"{', '.join(what)}: {result}" for result in held if not result.passed)
