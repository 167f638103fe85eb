"""What in the data itself should make a reader doubt a fit of it, a sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.fitting.job import GAP, Plan, pairs_of
from dynablocks.fitting.surrogates import LEARNED_ENERGY
from dynablocks.reporting import words

JUMP, CALM = 0.8, 0.1
"""An angle that wraps jumps by more of its range than the first, and mostly moves by less than the second."""
LEAK, LEAK_NOISE = 0.01, 3.0
"""From which share of the motion, and how many times the noise, what is to be kept varies in the data."""


def doubts(planned: Plan) -> list[str]:
    """What the data may be unfit for, before anything is fitted.

    Example:
        >>> from dynablocks.fitting.job import FitConfig, plan
        >>> t = torch.linspace(0, 3, 31, dtype=torch.float64)
        >>> log = Trajectories((t,), (torch.stack([t.cos(), -t.sin()], 1),), ("q", "p"))
        >>> [sentence[:24] for sentence in doubts(plan(log, FitConfig("symplectic")))]
        ['There is one trajectory:']
    """
    return [*_alone(planned), *_gaps(planned), *_wrapped(planned), *_alternating(planned), *_not_kept(planned)]


def _alone(planned: Plan) -> Iterator[str]:
    train, test = planned.parts.train, planned.parts.test
    # Parts of one trajectory are called alike.
    if isinstance(train, Trajectories) and isinstance(test, Trajectories) and train.labels == test.labels:
        yield (
            "There is one trajectory: the test is how it goes on, and says little about other starts. Measure from "
            "several."
        )


def _gaps(planned: Plan) -> Iterator[str]:
    h = pairs_of(planned.parts.train)[2]
    longer = int((h > GAP * planned.structure.step).sum())
    if longer:
        yield (
            f"{longer} of {len(h)} training steps take more than {GAP:g} times the usual {planned.structure.step:.4g}: "
            "they were left out of the fit, and count in its errors."
        )


def _wrapped(planned: Plan) -> Iterator[str]:
    x, y = (torch.cat(ends) for ends in zip(*(pairs_of(part)[:2] for part in _parts(planned)), strict=True))
    both, moves = torch.cat([x, y]), (y - x).abs()
    width = both.amax(0) - both.amin(0)
    jumps = (moves.amax(0) > JUMP * width) & (moves.median(dim=0).values < CALM * width)
    for name, jump, wraps in zip(planned.structure.names, moves.amax(0).tolist(), jumps.tolist(), strict=True):
        if wraps:
            yield (
                f"Column {name!r} jumps by {jump:.3g}: an angle that wraps? Then take numpy.unwrap of it before (of "
                "degrees with period=360), one trajectory at a time."
            )


def _alternating(planned: Plan) -> Iterator[str]:
    names = planned.structure.names
    order = positions_first(names) if planned.structure.preserve in LEARNED_ENERGY else None
    if order is not None:
        half = len(names) // 2
        yield (
            f"Positions and momenta seem to alternate, but {', '.join(names[:half])} are taken for the positions and "
            f"{', '.join(names[half:])} for the momenta. If that is wrong: --columns {','.join(order)}"
        )


def positions_first(names: Sequence[str]) -> tuple[str, ...] | None:
    """The names with all of one letter first, where two letters alternate with equal numbers; else ``None``.

    Example:
        >>> positions_first(("q1", "p1", "q2", "p2"))
        ('q1', 'q2', 'p1', 'p2')
    """
    matches = [re.fullmatch(r"(.*?)_?(\d+)", name) for name in names]
    parts = [(match[1], match[2]) for match in matches if match is not None]
    if len(names) < 4 or len(names) % 2 or len(parts) < len(names):
        return None
    stems, numbers = zip(*parts, strict=True)
    first, second = set(stems[0::2]), set(stems[1::2])
    alternate = len(first) == len(second) == 1 and first != second and numbers[0::2] == numbers[1::2]
    return (*names[0::2], *names[1::2]) if alternate else None


def _not_kept(planned: Plan) -> Iterator[str]:
    """The deviations of the sum or norm from its mean along each trajectory, against those of the states."""
    runs = [states for part in _parts(planned) if isinstance(part, Trajectories) for states in part.states]
    preserve = planned.structure.preserve
    if preserve not in ("mass", "norm") or not runs:
        return
    spread = torch.cat(runs).std(dim=0)
    motion = _within(runs).square().sum(1).mean().sqrt()
    if preserve == "mass":
        weights = spread.new_tensor(planned.structure.weights or (1.0,) * len(spread))
        left, most = _within([states @ weights for states in runs]), float(weights.norm())
        noise = (weights * spread).norm()
        what, cure = "the weighted sum of the columns", "check --weights and the units of the columns"
    else:
        left, most = _within([states.norm(dim=1) for states in runs]), 1.0
        noise = spread.square().mean().sqrt()
        what, cure = "the norm of the state", "check the units of the columns and that 0 is their centre"
    share = float(left.square().mean().sqrt() / (most * motion))
    if share > max(LEAK, float(LEAK_NOISE * planned.noise * noise / (most * motion))):
        yield (
            f"In the data {what} does not stay: along a trajectory it varies by {words.percent(share)} of the motion "
            f"(root mean square), which no surrogate that keeps it can follow. If that is not noise, {cure}, and "
            "compare with --preserve none."
        )


def _within(runs: Sequence[Tensor]) -> Tensor:
    """The deviations from the mean of each run."""
    return torch.cat([run - run.mean(dim=0) for run in runs])


def _parts(planned: Plan) -> list[Trajectories | Pairs]:
    parts = planned.parts
    return [part for part in (parts.train, parts.validation, parts.test) if part is not None]
