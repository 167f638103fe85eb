"""The published settings of energy-preserving learning: spring, pendulum and two bodies, with noise and rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import require_range, unknown_name

if TYPE_CHECKING:
    from jaxtyping import Float64

NOISE = 0.1
TRAJECTORIES, TRAINING = 50, 25
ROLLOUTS = 15
BODIES, BODIES_TEST = 1000, 200


@dataclass(frozen=True)
class LearningSystem:
    """A system of the published tables.

    Attributes:
        name: spring, pendulum or two-body.
        dimension: of x = (q, p).
        times: of every trajectory, in training and in rollouts.
        slope: ẋ for (batch, dimension).
        energy: H, per sample.
        measured: what the published metric compares: q² + p² for spring and pendulum, H for two bodies.
        draw: a random start, from NumPy's generator in the order in which the public code draws.
        draw_rollout: a random start of a rollout.
        noise: standard deviation of the noise in each entry of each training and test state.
    """

    name: str
    dimension: int
    times: Float64[Tensor, " times"]
    slope: Callable[[Tensor], Tensor]
    energy: Callable[[Tensor], Tensor]
    measured: Callable[[Tensor], Tensor]
    draw: Callable[[np.random.RandomState], Any]
    draw_rollout: Callable[[np.random.RandomState], Any]
    noise: float = NOISE

    @property
    def interval(self) -> float:
        """The time between two states."""
        return float(self.times[1])


def solutions(
    system: LearningSystem, starts: Float64[Tensor, "batch n"], times: Float64[Tensor, " times"] | None = None
) -> Float64[Tensor, "batch times n"]:
    """Φ_t of each start at the system's times, by DOP853 with relative tolerance 1e-11.

    Example:
        >>> solutions(learning_system("spring"), torch.ones(1, 2, dtype=torch.float64)).shape
        torch.Size([1, 100, 2])
    """
    from scipy.integrate import solve_ivp

    grid = (system.times if times is None else times).numpy()

    def slope(_: float, flat: Any) -> Any:
        return system.slope(torch.from_numpy(flat).view_as(starts)).flatten().numpy()

    solved = solve_ivp(
        slope, (0.0, grid[-1]), starts.flatten().numpy(), method="DOP853", t_eval=grid, rtol=1e-11, atol=1e-12
    )
    return torch.from_numpy(solved.y.copy()).view(*starts.shape, len(grid)).movedim(2, 1)


@dataclass(frozen=True)
class LearningData:
    """Trajectories (trajectories, times, n): noisy ones for training and test, exact ones of the rollouts."""

    train: Float64[Tensor, "trajectories times n"]
    test: Float64[Tensor, "trajectories times n"]
    test_slopes: Float64[Tensor, "trajectories times n"]
    rollouts: Float64[Tensor, "rollouts times n"]


def learning_data(name: str, seed: int = 0, trajectories: int | None = None) -> LearningData:
    """The data of one seed.

    Spring and pendulum: 50 trajectories of 20 s and 100 points with noise 0.1, the first 25 for training. Two bodies:
    1,000 trajectories of 25 s and 500 points without noise, the first 200 for test. 15 rollouts of the same times.

    Args:
        name: spring, pendulum or two-body.
        seed: of everything.
        trajectories: only so many training trajectories (and two test ones), for a smaller budget.

    Raises:
        InvalidArgument: no system of this name, or a seed that NumPy does not take.

    Source: Greydanus, Dzamba and Yosinski (2019), data; Matsubara, Ishikawa and Yaguchi (2020), times.

    Example:
        >>> data = learning_data("spring", seed=0, trajectories=3)
        >>> data.train.shape, data.rollouts.shape
        (torch.Size([3, 100, 2]), torch.Size([15, 100, 2]))
    """
    require_range("seed", seed, 0, 2**32 - 1)
    system, random = learning_system(name), np.random.RandomState(seed)
    if system.noise:
        states, slopes = _noisy(system, random)
        train, test, test_slopes = states[:TRAINING], states[TRAINING:], slopes[TRAINING:]
    else:
        starts = torch.from_numpy(np.stack([system.draw(random) for _ in range(BODIES)]))
        wanted = BODIES - BODIES_TEST if trajectories is None else trajectories
        train = solutions(system, starts[BODIES_TEST : BODIES_TEST + wanted])
        test = solutions(system, starts[: min(BODIES_TEST, wanted)])
        test_slopes = system.slope(test.flatten(0, 1)).view_as(test)
    starts = torch.from_numpy(np.stack([system.draw_rollout(random) for _ in range(ROLLOUTS)]))
    return LearningData(train[:trajectories], test, test_slopes, solutions(system, starts))


def _noisy(system: LearningSystem, random: np.random.RandomState) -> tuple[Tensor, Tensor]:
    """Noisy states and exact slopes; a trajectory's noise is drawn before the next one's start."""
    starts, noise = [], []
    for _ in range(TRAJECTORIES):
        starts.append(system.draw(random))
        noise.append(np.stack([random.randn(len(system.times)) for _ in range(system.dimension)], axis=1))
    states = solutions(system, torch.from_numpy(np.stack(starts)))
    slopes = system.slope(states.flatten(0, 1)).view_as(states)
    return states + system.noise * torch.from_numpy(np.stack(noise)), slopes


def _on_circle(low: float) -> Callable[[np.random.RandomState], Any]:
    """(q, p) of uniform radius in [low, low + 0.9 or 1]: spring 0.1 … 1, pendulum 1.3 … 2.3."""
    width = 0.9 if low < 1 else 1.0

    def draw(random: np.random.RandomState) -> Any:
        start = random.rand(2) * 2 - 1
        return start / np.sqrt((start**2).sum()) * (random.rand() * width + low)

    return draw


def _inside(random: np.random.RandomState) -> Any:
    """0.2 <= |q|, |p| <= 1."""
    start = (random.rand(2) * 2 - 1) * 0.8
    return start + 0.2 * np.sign(start)


def _orbit(random: np.random.RandomState) -> Any:
    """Two unit masses opposite each other on a nearly circular orbit: (x₁, x₂, y₁, y₂) and the velocities."""
    place = random.rand(2) + 0.5
    speed = np.array([-place[1], place[0]]) / (2 * (place**2).sum() ** 0.75) * (1 + 0.05 * random.randn())
    return np.array([z for pair in (place, speed) for entry in pair for z in (entry, -entry)])


def _spring_slope(x: Tensor) -> Tensor:
    return torch.stack([2 * x[:, 1], -2 * x[:, 0]], dim=1)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _pendulum_slope(x: Tensor) -> Tensor:
    return torch.stack([2 * x[:, 1], -3 * torch.sin(x[:, 0])], dim=1)


def _pendulum_energy(x: Tensor) -> Tensor:
    return 3 * (1 - torch.cos(x[..., 0])) + x[..., 1].square()


def _distance(x: Tensor) -> tuple[Tensor, Tensor]:
    apart = torch.stack([x[..., 0] - x[..., 1], x[..., 2] - x[..., 3]], dim=-1)
    return apart, apart.norm(dim=-1)


def _bodies_slope(x: Tensor) -> Tensor:
    apart, distance = _distance(x)
    pull = apart / distance[..., None] ** 3
    force = torch.stack([-pull[..., 0], pull[..., 0], -pull[..., 1], pull[..., 1]], dim=-1)
    return torch.cat([x[..., 4:], force], dim=-1)


def _bodies_energy(x: Tensor) -> Tensor:
    return 0.5 * x[..., 4:].square().sum(-1) - 1 / _distance(x)[1]


_LONG = torch.linspace(0.0, 20.0, 100, dtype=torch.float64)
_ORBITS = torch.linspace(0.0, 25.0, 500, dtype=torch.float64)
LEARNING_SYSTEMS = {
    "spring": LearningSystem("spring", 2, _LONG, _spring_slope, _squares, _squares, _on_circle(0.1), _inside),
    "pendulum": LearningSystem(
        "pendulum", 2, _LONG, _pendulum_slope, _pendulum_energy, _squares, _on_circle(1.3), _inside
    ),
    "two-body": LearningSystem(
        "two-body", 8, _ORBITS, _bodies_slope, _bodies_energy, _bodies_energy, _orbit, _orbit, noise=0.0
    ),
}


def learning_system(name: str) -> LearningSystem:
    """The system of a name.

    Raises:
        InvalidArgument: there is none of this name.

    Example:
        >>> learning_system("pendulum").dimension
        2
    """
    if name not in LEARNING_SYSTEMS:
        raise unknown_name("system", name, LEARNING_SYSTEMS)
    return LEARNING_SYSTEMS[name]
