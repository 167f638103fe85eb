"""Reference-accurate solutions of the physical systems, and data sets made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynablocks.data.systems import PhysicalSystem, require_system
from dynablocks.data.trajectories import Trajectories
from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.seeding import seeded_generator

if TYPE_CHECKING:
    from jaxtyping import Float64
    from numpy.typing import NDArray

_CHUNK = 128
_LOWEST_RTOL = 100 * float(np.finfo(np.float64).eps)


def integrate(
    system: PhysicalSystem | str,
    x0: Float64[Tensor, "batch n"],
    times: Float64[Tensor, "*batch time"],
    rtol: float = 1e-13,
    atol: float = 1e-14,
) -> Float64[Tensor, "batch time n"]:
    """Solutions of x' = X(x) at ``times`` to reference accuracy, x0 being the states at the first time.

    Each segment between two times is solved as dx/ds = (t_{k+1} − t_k) X(x), s in [0, 1], for at most 128 trajectories
    together, so that sampling times may differ and no value is interpolated. The local error of every step is below
    ``atol`` + ``rtol``·|x| in the root mean square over those trajectories.

    Args:
        times: (T,) for all or (batch, T), in any order, negative steps included.
        rtol: relative tolerance, at least 2.2e-14 (SciPy's bound).
        atol: absolute tolerance, above 0.

    Returns:
        float64 (batch, T, n); the first of T is ``x0``.

    Raises:
        InvalidArgument: a shape or tolerance does not fit, or the solver cannot go on (collision, blow-up).

    Source: SciPy's DOP853 (Hairer, Nørsett and Wanner 1993), for a stiff system Radau (order 5) with exact Jacobians.

    Example:
        >>> x0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        >>> times = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> torch.allclose(integrate("mass-spring", x0, times)[0, 1, 0], times[1].cos(), rtol=0, atol=1e-13)
        True
    """
    system = require_system(system)
    require_range("rtol", rtol, low=_LOWEST_RTOL)
    require_range("atol", atol, low=0.0, open_low=True)
    states = _require_states(system, x0)
    grid = _require_times(times, len(states))
    chunks = [
        _solve_chunk(system, *part, rtol, atol)
        for part in zip(torch.split(states, _CHUNK), torch.split(grid, _CHUNK), strict=True)
    ]
    return torch.cat(chunks)


def flow_pairs(
    system: PhysicalSystem | str, count: int, horizon: float, seed: int = 0
) -> tuple[Float64[Tensor, "count n"], Float64[Tensor, "count n"]]:
    """``count`` initial states of the system and their images under its flow map after the time ``horizon``.

    Args:
        horizon: any finite time; a negative one goes backwards.
        seed: the states depend on it and on nothing else.

    Returns:
        (x0, x1), float64 (count, n) each.

    Raises:
        InvalidArgument: an argument is out of range, or the solver cannot go on.

    Source: the set-up of the paper's figure 6 is ``flow_pairs("sir", 1000, 1.0)``, of which 900 are for training.

    Example:
        >>> x0, x1 = flow_pairs("sir", 3, 1.0)
        >>> x1.shape, bool(((x1.sum(1) - x0.sum(1)).abs() < 1e-14).all())
        (torch.Size([3, 3]), True)
    """
    system = require_system(system)
    require_range("horizon", horizon)
    x0 = system.draw(count, seeded_generator(seed, 0))
    return x0, integrate(system, x0, torch.tensor([0.0, horizon], dtype=torch.float64))[:, -1]


def generate(
    system: PhysicalSystem | str,
    trajectories: int = 10,
    steps: int = 100,
    step_size: float = 0.1,
    *,
    times: Float64[Tensor, "time"] | None = None,
    noise: float = 0.0,
    irregular: float = 0.0,
    seed: int = 0,
) -> Trajectories:
    """Sampled solutions from random initial states, with measurement noise and irregular sampling on request.

    Args:
        trajectories: how many.
        steps: sampling intervals of each, ``step_size`` long, from time 0; so ``steps`` + 1 states.
        times: sampling times instead, strictly increasing.
        noise: standard deviation, in the state's units, of the normal noise added to every measured component.
        irregular: in [0, 1): every time but the first and last moves by up to half this share of its shorter
            neighbouring interval, for each trajectory anew.
        seed: fixes everything; noise and irregularity leave the initial states as they are.

    Raises:
        InvalidArgument: an argument is out of range, or the solver cannot go on.

    Example:
        >>> data = generate("pendulum", trajectories=2, steps=3, noise=0.01, irregular=0.5, seed=4)
        >>> len(data), data.dimension, data.names, data.states[0].shape
        (2, 2, ('q', 'p'), torch.Size([4, 2]))
    """
    system = require_system(system)
    require_whole("trajectories", trajectories, low=1)
    require_range("noise", noise, low=0.0)
    require_range("irregular", irregular, low=0.0)
    if irregular >= 1:
        raise InvalidArgument(
            f"irregular is {irregular}; allowed are values in [0, 1), so that times keep their order."
        )
    base = _regular_times(steps, step_size) if times is None else _increasing(times)
    grid = _jitter(base.expand(trajectories, -1), irregular, seed)
    states = integrate(system, system.draw(trajectories, seeded_generator(seed, 0)), grid)
    if noise > 0:
        states = states + noise * torch.randn(states.shape, dtype=torch.float64, generator=seeded_generator(seed, 2))
    return Trajectories(tuple(grid.unbind(0)), tuple(states.unbind(0)), system.state_names)


def _regular_times(steps: int, step_size: float) -> Tensor:
    require_whole("steps", steps, low=1)
    require_range("step_size", step_size, low=0.0, open_low=True)
    return step_size * torch.arange(steps + 1, dtype=torch.float64)


def _increasing(times: Tensor) -> Tensor:
    grid = _require_doubles("times", times)
    if grid.dim() != 1 or len(grid) < 2 or not bool((grid.diff() > 0).all()):
        raise InvalidArgument("times must be one row of at least 2 finite, strictly increasing numbers.")
    return grid


def _jitter(grid: Tensor, irregular: float, seed: int) -> Tensor:
    if irregular == 0 or grid.shape[1] < 3:
        return grid.clone()
    gaps = grid.diff()
    room = torch.minimum(gaps[:, :-1], gaps[:, 1:])
    shift = torch.rand(room.shape, dtype=torch.float64, generator=seeded_generator(seed, 1)) - 0.5
    moved = grid.clone()
    moved[:, 1:-1] += irregular * shift * room
    return moved


def _require_states(system: PhysicalSystem, x0: Tensor) -> Tensor:
    if x0.dim() != 2 or x0.shape[1] != system.dimension or not len(x0):
        raise InvalidArgument(
            f"x0 has the shape {tuple(x0.shape)}; {system.name} needs (batch, {system.dimension}) with a batch of at "
            "least 1."
        )
    return _require_doubles("x0", x0)


def _require_times(times: Tensor, batch: int) -> Tensor:
    if times.dim() not in (1, 2) or times.shape[-1] < 1 or (times.dim() == 2 and len(times) != batch):
        raise InvalidArgument(
            f"times has the shape {tuple(times.shape)}; (T,) or ({batch}, T) with T at least 1 is needed."
        )
    return _require_doubles("times", times).expand(batch, -1)


def _require_doubles(name: str, values: Tensor) -> Tensor:
    if values.dtype != torch.float64:
        raise InvalidArgument(f"{name} is {values.dtype}; torch.float64 is needed: make it so from the start.")
    if not bool(values.isfinite().all()):
        raise InvalidArgument(f"{name} has a value that is not finite; finite numbers are needed.")
    return values.detach().cpu()


def _solve_chunk(system: PhysicalSystem, x0: Tensor, times: Tensor, rtol: float, atol: float) -> Tensor:
    states = [x0]
    for k, length in enumerate(times.diff().unbind(1)):
        states.append(_solve_segment(system, states[-1], length[:, None], (rtol, atol), times[:, k]))
    return torch.stack(states, dim=1)


def _solve_segment(
    system: PhysicalSystem, x0: Tensor, length: Tensor, tolerances: tuple[float, float], start: Tensor
) -> Tensor:
    from scipy.integrate import solve_ivp

    def slope(_: float, flat: NDArray[np.float64]) -> NDArray[np.float64]:
        x = torch.from_numpy(flat).view_as(x0)
        return (length * system.vector_field(x)).numpy().ravel()

    options: dict[str, Any] = {"method": "DOP853"}
    if system.stiff:
        options = {"method": "Radau", "jac": _block_jacobian(system, length)}
    rtol, atol = tolerances
    solution = solve_ivp(slope, (0.0, 1.0), x0.numpy().ravel(), rtol=rtol, atol=atol, **options)
    final = torch.from_numpy(solution.y[:, -1].copy()) if solution.success else torch.tensor([torch.nan])
    if not bool(final.isfinite().all()):
        raise InvalidArgument(
            f"the reference solver cannot follow {system.name} beyond about t = {float(start.min()):.6g} (a collision "
            "or a blow-up); choose other initial states or a shorter time."
        )
    return final.view_as(x0)


def _block_jacobian(system: PhysicalSystem, length: Tensor) -> Any:
    """The derivative of a segment's stacked slopes: sparse, one block a trajectory."""
    from scipy.sparse import bsr_matrix

    derivative = torch.func.vmap(torch.func.jacrev(lambda row: system.vector_field(row[None])[0]))
    order = np.arange(len(length) + 1)

    def jacobian(_: float, flat: NDArray[np.float64]) -> Any:
        blocks = length[:, :, None] * derivative(torch.from_numpy(flat).view(len(length), -1))
        return bsr_matrix((blocks.numpy(), order[:-1], order), shape=(len(flat), len(flat))).tocsc()

    return jacobian
