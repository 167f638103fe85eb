"""Which samples a fit learns from: the parts of the data, gaps left out, so many of them that there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.errors import BadData, InvalidArgument, unknown_name
from dynablocks.fitting.rollout import GAP, NOISE_DIFFERENCES

MOST_SAMPLES = 20_000
"""A stage of a fit takes at most so many samples (steps, or runs of several steps), evenly spaced, of the training and
of the validation."""
SPREAD_SAMPLES = 4096
"""The spread of a learned energy is taken over at most so many states."""
TELLING_SAMPLES = NOISE_DIFFERENCES[-1] + 1
"""Trajectories of so many samples tell noise from curvature, and have several steps in a row to be compared."""


@dataclass(frozen=True)
class Parts:
    """Training, validation and test data; there may be too little for a validation."""

    train: Trajectories | Pairs
    validation: Trajectories | Pairs | None
    test: Trajectories | Pairs


def split(data: Trajectories | Pairs, seed: int, test: Sequence[str] | None = None) -> Parts:
    """A fifth for the test, a fifth of the rest for validation: trajectories, the end of a single one, or pairs.

    ``test`` names the trajectories of the test, which are drawn without it. Short ones are drawn only where
    there are too few others: a validation of them would not allow several steps in a row.
    """
    if isinstance(data, Pairs):
        if test is not None:
            raise InvalidArgument("test names trajectories, which pairs are not; leave it out, or give trajectories.")
        return _split_pairs(data, seed)
    rest, found = data.split(0.2, seed, shortest=TELLING_SAMPLES) if test is None else _named(data, test)
    enough = len(rest) > 1 or len(rest.times[0]) >= 8
    train, validation = rest.split(0.2, seed, shortest=TELLING_SAMPLES) if enough else (rest, None)
    return Parts(train, validation, found)


def _named(data: Trajectories, labels: Sequence[str]) -> tuple[Trajectories, Trajectories]:
    """The trajectories of other labels, and those of these."""
    known = [data.label(k) for k in range(len(data))]
    for label in labels:
        if label not in known:
            raise unknown_name("trajectory of the test", label, known)
    rest = [k for k, label in enumerate(known) if label not in labels]
    if not rest:
        raise InvalidArgument("test names every trajectory; leave one or more for the fit.")
    return data.take(rest), data.take([k for k, label in enumerate(known) if label in labels])


def _split_pairs(data: Pairs, seed: int) -> Parts:
    if len(data) < 3:
        raise BadData(f"the file has {len(data)} pairs; at least 3 are needed to fit and to test.")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    test = max(1, len(data) // 5)
    held = (len(data) - test) // 5
    validation = data.take(order[test : test + held]) if held else None
    return Parts(data.take(order[test + held :]), validation, data.take(order[:test]))


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
