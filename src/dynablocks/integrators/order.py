"""The order of a method as it is measured: its errors at a fixed time, against the number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.fields import VectorField
from dynablocks.integrators.base import Integrator, integrator

if TYPE_CHECKING:
    from jaxtyping import Float64

TOLERANCE = 1e-13
"""The relative tolerance of the solution that errors are taken from."""
FIRST_COUNTS = {3: 16, 4: 8, 5: 4, 6: 2}
"""The fewest steps for methods of these orders; 32 for others."""


def exact_solution(
    field: Callable[[Tensor], Tensor], start: Float64[Tensor, "batch ..."], time: float
) -> Float64[Tensor, "batch ..."]:
    """Φ_t of each start, float64, by scipy's DOP853 at relative tolerance 1e-13.

    Args:
        field: the right-hand side, of a batch of states.
        start: the states at time 0.
        time: t.

    Raises:
        InvalidArgument: the solution cannot be followed so far: it leaves all numbers before, say.

    Example:
        >>> end = exact_solution(lambda x: -x, torch.ones(1, 1, dtype=torch.float64), 1.0)
        >>> round(float(end), 12)
        0.367879441171
    """
    from scipy.integrate import solve_ivp

    shape = start.shape

    def slope(_: float, flat: Any) -> Any:
        with torch.no_grad():
            return field(torch.from_numpy(flat).reshape(shape)).flatten().numpy()

    solved = solve_ivp(slope, (0.0, time), start.flatten().numpy(), method="DOP853", rtol=TOLERANCE, atol=1e-15)
    if not solved.success:
        raise InvalidArgument(
            f"the solution to t = {time:g} stops at t = {solved.t[-1]:.6g} ({solved.message.rstrip('.')}); take a "
            "shorter time, or starts from which it goes on."
        )
    return torch.from_numpy(solved.y[:, -1].copy()).reshape(shape)


@torch.no_grad()
def errors_at(
    method: Integrator,
    field: VectorField,
    start: Float64[Tensor, "batch ..."],
    truth: Float64[Tensor, "batch ..."],
    time: float,
    counts: Sequence[int],
) -> list[float]:
    """‖xₙ − truth‖ over all states after n equal steps from ``start`` to ``time``, for each n in ``counts``."""
    errors = []
    for count in counts:
        x = start
        for _ in range(count):
            x = method.step(field, x, time / count)
        errors.append(float((x - truth).norm()))
    return errors


def rate_of(counts: Sequence[int], errors: Sequence[float]) -> float:
    """p of the line log error = c − p log n that fits best.

    Example:
        >>> round(rate_of([10, 20, 40], [4.0, 1.0, 0.25]), 12)
        2.0
    """
    logs = torch.tensor([list(counts), list(errors)], dtype=torch.float64).log()
    centred = logs - logs.mean(1, keepdim=True)
    return -float((centred[0] * centred[1]).sum() / centred[0].square().sum())


def declared_order(method: Integrator) -> int | None:
    """``order`` of a method, ``None`` for an exact flow.

    Raises:
        InvalidArgument: its class says none.

    Example:
        >>> declared_order(integrator("heun"))
        2
    """
    if not hasattr(method, "order"):
        raise InvalidArgument(
            f"{type(method).__name__} says no order; set order = p on the class, where the error of one step of size h "
            "is O(h^(p + 1)), or order = None where the step is an exact flow."
        )
    return method.order


def measured_order(
    method: str | Integrator,
    field: VectorField,
    start: Float64[Tensor, "batch ..."],
    time: float = 1.0,
    counts: Sequence[int] | None = None,
) -> float:
    r"""The order that a method shows on one field: p in ‖xₙ − Φ_t(x₀)‖ ≈ C (t/n)^p for n steps of size t/n.

    Φ_t is :func:`exact_solution`, which shares nothing with the method: steps that follow another field have the order
    0, however well they agree with each other. A method shows its order, up to a few hundredths, where the field is
    smooth and (t/n)L well below 1; on special fields (linear ones, say) it may show more.

    Args:
        method: an integrator or its registry name.
        field: X, its parameters in float64.
        start: x₀, one or more states (batch, …) in float64.
        time: t > 0.
        counts: the numbers of steps n, at least two different ones; by default four, fewer for methods of high order,
            whose errors soon are rounding.

    Raises:
        InvalidArgument: the method does not apply to the field, or says no order where ``counts`` are left out; a
            number is out of range, or not float64; the solution ends before t; an error is rounding or not finite, so
            that there is nothing to measure.

    Source: Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", section II.3.

    Example:
        >>> from dynablocks.fields import LinearField
        >>> field = LinearField(1).double()
        >>> _ = field.requires_grad_(False).matrix.fill_(-1.0)
        >>> round(measured_order("heun", field, torch.ones(1, 1, dtype=torch.float64)), 1)
        2.0
    """
    method = integrator(method)
    method.require(field)
    require_range("time", time, 0.0, open_low=True)
    if counts is None:
        first = FIRST_COUNTS.get(declared_order(method) or 1, 32)
        counts = [first * 2**k for k in range(4)]
    counts = [require_whole("counts", count, 1) for count in counts]
    if len(set(counts)) < 2:
        raise InvalidArgument(f"counts is {counts}; a slope needs two different numbers of steps.")
    kinds = {str(tensor.dtype) for tensor in (start, *field.parameters())}
    if kinds != {"torch.float64"} or start.ndim < 2:
        raise InvalidArgument(
            f"states and parameters are {', '.join(sorted(kinds))} and start has the shape {tuple(start.shape)}; an "
            "order is measured in float64 on a batch of states: give field.double() and start.double(), (batch, …)."
        )
    truth = exact_solution(field, start, time)
    errors = errors_at(method, field, start, truth, time, counts)
    least = 10 * max(TOLERANCE, method.tolerance * max(counts)) * max(1.0, float(truth.norm()))
    if not all(least < error < math.inf for error in errors):
        raise InvalidArgument(
            f"the errors after {counts} steps are {errors}; finite ones above {least:.1e}, what rounding and "
            "solvers may do, measure an order: take fewer steps where they are below, more or a shorter time where "
            "they explode."
        )
    return rate_of(counts, errors)
