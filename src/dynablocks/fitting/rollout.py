"""Rollouts of a fitted flow map against measured trajectories, and the drift of what it keeps over long times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.data.trajectories import Trajectories
from dynablocks.errors import DynablocksError
from dynablocks.fitting.objective import SAMPLES_AT_ONCE
from dynablocks.fitting.surrogates import LEARNED_ENERGY, FlowMap
from dynablocks.properties.jacobians import jacobians, symplectic_defect

if TYPE_CHECKING:
    from jaxtyping import Float

Windows = tuple[Tensor, Tensor, Tensor]
NOISE_DIFFERENCES = (2, 4, 6)
MOST_DIFFERENCES = 100_000
"""A difference of order 6 takes some 200 numbers on the way: of a long log all of them would not fit into memory."""
ENERGY_CHUNK = 65536
"""A learned energy is computed of so many states at a time, since its hidden units take more room than they do."""
STACKED_STATES = 4096
"""A run becomes one tensor every so many states: a tensor of its own for each takes far more room than its numbers."""
GAP = 5.0
"""A step that takes so many times the usual one is a gap: in the fit and its errors it would be all that counts."""
MOST_ROLLED_STEPS = 5000
"""A rollout of a test trajectory takes so many steps at most: more of a long log says little more and takes minutes."""
MOST_ROLLED_STATES = 200_000
"""All rollouts together take so many steps at most: of more trajectories every second, third, … is rolled out."""
LEFT_NUMBERS = "the states left the range of numbers"


def windows(data: Trajectories, horizon: int, stride: int = 1) -> Windows:
    """x (N, n), the ``horizon`` states that follow it (N, horizon · n), and the steps between them (N, horizon).

    A window starts at every ``stride``-th state, and so late that the last one ends with the trajectory.

    Example:
        >>> t = torch.arange(4.0, dtype=torch.float64)
        >>> x, y, h = windows(Trajectories((t,), (t[:, None],), ("q",)), 2)
        >>> x.tolist(), y.tolist(), h.shape
        ([[0.0], [1.0]], [[1.0, 2.0], [2.0, 3.0]], torch.Size([2, 2]))
    """
    starts, ends, steps = [], [], []
    for times, states in zip(data.times, data.states, strict=True):
        latest = len(times) - 1 - horizon
        for first in sorted({*range(0, latest + 1, stride), latest} if latest >= 0 else ()):
            last = first + horizon
            starts.append(states[first])
            ends.append(states[first + 1 : last + 1].flatten())
            steps.append(times[first : last + 1].diff())
    return torch.stack(starts), torch.stack(ends), torch.stack(steps)


def rollout_residuals(module: nn.Module, x: Tensor, y: Tensor, step: Tensor) -> Tensor:
    """The errors of several steps in a row, divided by the square root of their number, in the map's own units."""
    assert isinstance(module, FlowMap)
    states, z = [], x
    for h in step.unbind(1):
        z = module(z, h)
        states.append(z)
    return (torch.cat(states, dim=1) - y) / len(states) ** 0.5 / module.scale


@dataclass(frozen=True)
class Noise:
    """What was estimated of the noise in measured states.

    Attributes:
        columns: its standard deviation in each column, in the units of the data; 0 of columns that do not move.
        level: the root mean square, over the columns that move, of the noise over the column's own spread, so that the
            noise of one column is seen among clean ones. A column that rests but for its noise counts as 1.
        pooled: √(Σσᵢ²/Σsᵢ²) with the noise σᵢ and the spread sᵢ of the columns, as relative errors are pooled: the one
            to compare with these.
    """

    columns: tuple[float, ...]
    level: float = 0.0
    pooled: float = 0.0


def estimated_noise(data: Trajectories) -> Noise:
    """The noise of trajectories, from high divided differences.

    A divided difference of order k annihilates polynomials of lower degree, so of a smooth trajectory little is left
    but noise; the smallest estimate over the orders 2, 4, 6 counts, of each column and of the level. Coarse sampling
    looks like noise. Each column is measured over its own spread, by a median, which outliers do not move. Of many
    samples about 100,000 differences of each order are taken, evenly spaced.

    Example:
        >>> t = torch.linspace(0, 1, 50, dtype=torch.float64)
        >>> estimated_noise(Trajectories((t,), (torch.stack([t.sin(), t.cos()], 1),), ("q", "p"))).level < 1e-9
        True
    """
    states = torch.cat(data.states)
    spread = states.std(dim=0)
    moving = spread > 1e-12 * states.abs().amax(0)
    found = _deviations_by_order(data, spread, moving) if bool(moving.any()) else []
    if not found:
        return Noise((0.0,) * len(spread))
    by_order = torch.stack(found)
    columns = torch.zeros_like(spread)
    columns[moving] = by_order.amin(0) * spread[moving]
    return Noise(
        tuple(columns.tolist()),
        level=float(by_order.square().mean(dim=1).sqrt().min()),
        pooled=float(columns.norm() / spread[moving].norm()),
    )


def _deviations_by_order(data: Trajectories, spread: Tensor, moving: Tensor) -> list[Float[Tensor, " moving"]]:
    """The noise over the spread of each column that moves, from the differences of each order that there are."""
    every = math.ceil(sum(map(len, data.states)) / MOST_DIFFERENCES)
    still = torch.cat([x[:, moving].diff(dim=0) for x in data.states]).abs().median(dim=0).values == 0
    found = []
    for order in NOISE_DIFFERENCES:
        left = [
            _differences(t, (x / spread)[:, moving], order, every)
            for t, x in zip(data.times, data.states, strict=True)
            if len(t) > order
        ]
        if left:
            found.append(_deviations(torch.cat(left), still))
    return found


def _deviations(differences: Tensor, still: Tensor) -> Tensor:
    """The noise of each column, from the median of what is left, which outliers do not move.

    Of columns that mostly stay as they are, as rounded measurements of a slow motion do, the median would be 0: there
    it is the root mean square.
    """
    typical = differences.abs().median(dim=0).values / 0.6745
    return torch.where(still, differences.square().mean(dim=0).sqrt(), typical)


def _differences(times: Tensor, states: Tensor, order: int, every: int) -> Tensor:
    """Divided differences of unit weights, one at every so many samples."""
    t = times.unfold(0, order + 1, every)
    apart = t[:, :, None] - t[:, None, :] + torch.eye(order + 1, dtype=t.dtype) * t.diff(dim=1).mean(1)[:, None, None]
    weights = 1 / (apart / t.diff(dim=1).mean(1)[:, None, None]).prod(2)
    weights = weights / weights.norm(dim=1, keepdim=True)
    return torch.einsum("wk,wnk->wn", weights, states.unfold(0, order + 1, every))


@dataclass(frozen=True)
class Rollout:
    """One measured trajectory and the prediction from its first state: times (T,), both (T', n) with T' <= T.

    ``label`` is what the trajectory is called in the data; ``cut`` says that it goes on after these times.
    """

    times: Tensor
    measured: Tensor
    predicted: Tensor
    stopped: str | None = None
    label: str = ""
    cut: bool = False

    @property
    def errors(self) -> Tensor:
        """Mean squared error over the entries at each time."""
        return (self.predicted - self.measured[: len(self.predicted)]).square().mean(1)


def roll_out(
    flow: FlowMap, data: Trajectories, progress: Callable[[float], object] = lambda fraction: None
) -> list[Rollout]:
    """Predictions from the first state of every trajectory over its own times, 5,000 steps of each at most.

    A gap takes several steps, of about the usual length. Where the trajectories have more than 200,000 steps together
    every second, third, … is rolled out. All take their steps together, so that a prediction is that of its trajectory
    alone up to rounding, and to the tolerance of a method that solves an equation.

    ``progress`` gets the fraction of the steps that is done.
    """
    paths = [_steps_through(times, flow.structure.step) for times in data.times]
    every = 1
    while every < len(paths) and sum(len(steps) for steps, _ in paths[::every]) > MOST_ROLLED_STATES:
        every += 1
    chosen = range(0, len(paths), every)
    runs = _rolled(flow, torch.stack([data.states[k][0] for k in chosen]), [paths[k][0] for k in chosen], progress)
    found = []
    for k, (run, stopped) in zip(chosen, runs, strict=True):
        times, states, places = data.times[k], data.states[k], paths[k][1]
        reached, predicted = len(places), run[places[places < len(run)]]
        cut = reached < len(times)
        found.append(Rollout(times[:reached], states[:reached], predicted, stopped, data.label(k), cut))
    return found


@torch.no_grad()
def _rolled(
    flow: FlowMap,
    starts: Float[Tensor, "run n"],
    steps: Sequence[Float[Tensor, " time"]],
    progress: Callable[[float], object],
) -> list[tuple[Float[Tensor, "time n"], str | None]]:
    """The states from each start on over steps of its own, as far as they go, and why they end early.

    The first steps of all runs are one batch, then the second ones of those that go on, and so forth.
    """
    lengths = torch.tensor([len(own) for own in steps])
    last = (lengths + 1).cumsum(0) - 1
    first = last - lengths
    # The rows of all runs, one run below the other: the states, and the step that is taken from each.
    states = starts.new_zeros(int(last[-1]) + 1, starts.shape[1])
    h = torch.cat([part for own in steps for part in (own, own.new_zeros(1))])
    states[first] = starts
    newest, done, total = first.clone(), 0, int(lengths.sum())
    reasons: dict[int, str] = {}
    for part in torch.split(torch.arange(len(steps)), SAMPLES_AT_ONCE):
        going = part[newest[part] < last[part]]
        while len(going):
            following, failed = _one_step(flow, states[newest[going]], h[newest[going]])
            done += len(going)
            reasons |= {int(going[row]): reason for row, reason in failed.items()}
            kept = torch.tensor([row not in failed for row in range(len(going))])
            going = going[kept]
            newest[going] += 1
            states[newest[going]] = following[kept].to(states)
            going = going[newest[going] < last[going]]
            progress(done / total)
    bounds = zip(first.tolist(), newest.tolist(), strict=True)
    return [(states[start : end + 1], reasons.get(k)) for k, (start, end) in enumerate(bounds)]


def _one_step(
    flow: FlowMap, x: Float[Tensor, "batch n"], h: Float[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch n"], dict[int, str]]:
    """A step of each state, and by its row why a state has none.

    A batch fails as a whole, so its halves are tried, down to a state alone.
    """
    try:
        following: Tensor = flow(x, h)
    except DynablocksError as error:
        if len(x) == 1:
            return x, {0: str(error)}
        middle = len(x) // 2
        low, failed = _one_step(flow, x[:middle], h[:middle])
        high, later = _one_step(flow, x[middle:], h[middle:])
        return torch.cat([low, high]), failed | {middle + row: reason for row, reason in later.items()}
    lost = (~following.isfinite()).any(dim=1).nonzero().flatten().tolist()
    return following, dict.fromkeys(lost, LEFT_NUMBERS)


def _steps_through(times: Tensor, usual: float) -> tuple[Tensor, Tensor]:
    """The steps of a rollout over these times, and which of its states is that at each time, as far as it goes.

    A gap is crossed in equal steps of about the usual length: the learned field is autonomous,
    and where it makes up for an error of its method, it does so at that step alone.
    """
    h = times.diff()
    counts = torch.where(h > GAP * usual, (h / usual).round(), 1.0)
    places = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    places = places[places <= MOST_ROLLED_STEPS].long()
    reached = len(places) - 1
    return (h / counts)[:reached].repeat_interleave(counts[:reached].long()), places


@torch.no_grad()
def safe_rollout(
    flow: FlowMap, x: Float[Tensor, "batch n"], steps: Iterable[Tensor]
) -> tuple[Float[Tensor, "batch time n"], str | None]:
    """The states from x on, as far as all stay finite and the method solves its equations, and why they end early.

    Args:
        flow: the surrogate.
        x: the states at the start.
        steps: one number after the other, each for all states.
    """
    runs: list[Tensor] = []
    recent, last, stopped = [x], x, None
    for h in steps:
        try:
            following = flow(last, h.expand(len(x)))
        except DynablocksError as error:
            stopped = str(error)
            break
        if not bool(following.isfinite().all()):
            stopped = LEFT_NUMBERS
            break
        if len(recent) == STACKED_STATES:
            runs.append(torch.stack(recent, dim=1))
            recent = []
        recent.append(following)
        last = following
    runs.append(torch.stack(recent, dim=1))
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1), stopped


@dataclass(frozen=True)
class Drift:
    """How far something kept has moved along a long run: ``what``, times, values."""

    what: str
    times: Tensor
    values: Tensor


def drifts(
    flow: FlowMap,
    times: Float[Tensor, " time"],
    states: Float[Tensor, "time n"],
    reference: Float[Tensor, "samples n"],
    points: int = 24,
) -> list[Drift]:
    """What the surrogate keeps, measured along a long rollout of it.

    A learned energy is known up to a constant only, so its change is divided by its spread over the states of
    ``reference``, such as those of the training: the root mean square of H(x) − H(x̄), x̄ their mean.
    """
    preserve = flow.structure.preserve
    kept = change_along(flow, states[None], reference)
    found = [] if kept is None else [Drift(kept[0], times, kept[1][0])]
    if preserve == "symplectic" and len(states) > 1:
        with torch.no_grad():
            found.append(_form_defect(flow, times, states, points))
    if preserve == "volume":
        chosen = _starts(states, points)
        defect = (torch.linalg.det(jacobians(flow, states[chosen])).abs() - 1).abs()
        found.append(Drift("| |det J| − 1 | of a step", times[chosen], defect))
    return found


@torch.no_grad()
def change_along(
    flow: FlowMap, states: Float[Tensor, "batch time n"], reference: Float[Tensor, "samples n"]
) -> tuple[str, Float[Tensor, "batch time"]] | None:
    """What a surrogate keeps of a state, in words, and how far it has moved since the start of each run.

    ``None`` where it keeps nothing of a single state; ``reference`` as in :func:`drifts`. A relative change is over the
    mass Σ|wᵢxᵢ| or the norm ‖x‖ at the start; where that is 0 to rounding, over that of a state whose entries all have
    the size of the data, ``flow.scale``.

    Example:
        >>> from dynablocks.fitting.surrogates import Structure, build
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 1.5]], dtype=torch.float64)
        >>> change_along(build(Structure("mass", ("a", "b"), width=2)), x[None], x)[1].tolist()
        [[0.0, 0.16666666666666666]]
    """
    preserve, start = flow.structure.preserve, states[:, :1]
    if preserve == "mass":
        weights = states.new_tensor(flow.structure.weights or (1.0,) * states.shape[2])
        size = _never_zero((weights * start).abs().sum(2), flow.scale * weights.abs().sum())
        return "relative change of the mass", ((states - start) @ weights).abs() / size
    if preserve == "norm":
        norms = states.norm(dim=2)
        size = _never_zero(norms[:, :1], flow.scale * states.shape[2] ** 0.5)
        return "relative change of the norm", (norms - norms[:, :1]).abs() / size
    if preserve in LEARNED_ENERGY:
        energy = torch.cat([flow.energy(part) for part in torch.split(states.flatten(0, 1), ENERGY_CHUNK)])
        energy = energy.reshape(states.shape[:2])
        change = (energy - energy[:, :1]).abs() / _energy_spread(flow, reference)
        return "change of the learned energy over its spread", change
    if preserve == "positive":
        return "negative part of the smallest entry", states.amin(2).clamp_max(0).abs()
    return None


def _never_zero(size: Tensor, usual: Tensor) -> Tensor:
    """The sizes to divide by, the usual one in place of those that are 0 to rounding."""
    return torch.where(size > torch.finfo(size.dtype).eps * usual, size, usual.to(size))


def _energy_spread(flow: FlowMap, reference: Tensor) -> Tensor:
    """The root mean square of H(x) − H(x̄), which is not 0 of one orbit either; the size of H where it is rounding."""
    energy = flow.energy(torch.cat([reference.mean(0, keepdim=True), reference]))
    spread, size = (energy[1:] - energy[0]).square().mean().sqrt(), energy.abs().max()
    varies = spread > 64 * torch.finfo(energy.dtype).eps * size
    return torch.where(varies, spread, size).clamp_min(1e-300)


def _starts(states: Tensor, points: int) -> Tensor:
    """States from which a step is known to exist: all but the last, at which a run may have ended early."""
    return torch.linspace(0, max(0, len(states) - 2), points).long()


def _form_defect(flow: FlowMap, times: Tensor, states: Tensor, points: int) -> Drift:
    chosen = _starts(states, points)
    defect = symplectic_defect(jacobians(flow, states[chosen])).flatten(1).norm(dim=1)
    return Drift("‖Jᵀ𝕁J − 𝕁‖ of a step", times[chosen], defect)
