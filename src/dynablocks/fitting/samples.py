"""Which samples a fit learns from: the parts of the data, gaps left out, so many of them that there is room."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.errors import BadData
from dynablocks.fitting.rollout import GAP

MOST_SAMPLES = 20_000
"""A stage of a fit takes at most so many samples (steps, or runs of several steps), evenly spaced, of the training and
of the validation."""
SPREAD_SAMPLES = 4096
"""The spread of a learned energy is taken over at most so many states."""


@dataclass(frozen=True)
class Parts:
    """Training, validation and test data; there may be too little for a validation."""

    train: Trajectories | Pairs
    validation: Trajectories | Pairs | None
    test: Trajectories | Pairs


def split(data: Trajectories | Pairs, seed: int) -> Parts:
    """A fifth for the test, a fifth of the rest for validation: trajectories, the end of a single one, or pairs."""
    if isinstance(data, Pairs):
        return _split_pairs(data, seed)
    rest, test = data.split(0.2, seed)
    enough = len(rest) > 1 or len(rest.times[0]) >= 8
    train, validation = rest.split(0.2, seed) if enough else (rest, None)
    return Parts(train, validation, test)


def _split_pairs(data: Pairs, seed: int) -> Parts:
    if len(data) < 3:
        raise BadData(f"the file has {len(data)} pairs; at least 3 are needed to fit and to test.")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    test = max(1, len(data) // 5)
    held = (len(data) - test) // 5
    found, validation, train = map(data.take, (order[:test], order[test : test + held], order[test + held :]))
    return Parts(train, validation if held else None, found)


def usual_steps(data: Trajectories | Pairs, usual: float) -> Trajectories | Pairs:
    """The data without its gaps, of which errors of one step are measured; all of it where it has nothing else."""
    kept = data.without_gaps(GAP * usual)
    return data if kept is None else kept


def fitted_parts(parts: Parts, step: float) -> tuple[Trajectories | Pairs, Trajectories | Pairs | None]:
    """What is fitted of the training part and of the validation; half of the steps are no longer than ``step``."""
    train = parts.train.without_gaps(GAP * step)
    assert train is not None
    return train, None if parts.validation is None else parts.validation.without_gaps(GAP * step)


def thinned(data: tuple[Tensor, ...], most: int) -> tuple[Tensor, ...]:
    """At most so many rows of each, evenly spaced, the first and the last among them.

    Example:
        >>> thinned((torch.arange(10),), 4)
        (tensor([0, 3, 6, 9]),)
    """
    rows = len(data[0])
    if rows <= most:
        return data
    chosen = torch.arange(most) * (rows - 1) // max(1, most - 1)
    return tuple(part[chosen] for part in data)
