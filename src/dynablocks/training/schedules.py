"""Learning-rate schedules: pure functions of the training progress in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dynablocks.errors import InvalidArgument
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from dynablocks.training.config import TrainingConfig

SCHEDULES: Registry[Callable[[float, float, TrainingConfig], float]] = Registry("schedule")
LARGEST_RATE = 1e30
"""Of a learning rate; it is a float32 also where Adam divides it by 1 − beta1."""


def warmed_up(progress: float, warmup: float) -> tuple[float, float]:
    """The linear warm-up's factor in [0, 1] and the share in [0, 1] of the time after it.

    Example:
        >>> warmed_up(0.125, 0.25), warmed_up(0.625, 0.25)
        ((0.5, 0.0), (1.0, 0.5))
    """
    if progress < warmup:
        return progress / warmup, 0.0
    return 1.0, (progress - warmup) / (1 - warmup)


@SCHEDULES.register("constant")
def constant(progress: float, epoch: float, config: TrainingConfig) -> float:
    """The factor 1 throughout."""
    return 1.0


@SCHEDULES.register("step")
def step(progress: float, epoch: float, config: TrainingConfig) -> float:
    """``step_factor`` to the power of the number of whole ``step_epochs`` that have passed.

    Raises:
        InvalidArgument: the learning rate grows beyond the largest that is allowed.

    Source: Celledoni et al., arXiv 2210.02373, section 3.3, in words; their released code has 0.1 every 30 epochs.

    Example:
        >>> from dynablocks.training import TrainingConfig
        >>> step(0.5, 30.0, TrainingConfig(step_epochs=30, step_factor=0.1))
        0.1
    """
    try:
        factor = math.pow(config.step_factor, math.floor(epoch / config.step_epochs))
    except OverflowError:
        factor = math.inf
    if config.lr * factor > LARGEST_RATE:
        raise InvalidArgument(
            f"step_factor {config.step_factor:g} every {config.step_epochs:g} epochs takes the learning rate beyond "
            "all numbers; give a smaller step_factor, or more step_epochs."
        )
    return factor


@SCHEDULES.register("one-cycle")
def one_cycle(progress: float, epoch: float, config: TrainingConfig) -> float:
    """Linear from 0 to 1 over the first ``warmup`` of the training, then half a cosine down to 0.

    Source: Smith and Topin, arXiv 1708.07120.

    Example:
        >>> from dynablocks.training import TrainingConfig
        >>> config = TrainingConfig(schedule="one-cycle", warmup=0.2)
        >>> [round(one_cycle(p, 0.0, config), 3) for p in (0.1, 0.2, 0.6, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    rise, fall = warmed_up(progress, config.warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * fall))


@SCHEDULES.register("one-cycle-linear")
def one_cycle_linear(progress: float, epoch: float, config: TrainingConfig) -> float:
    """Linear from 0 to 1 over the first ``warmup`` of the training, then linear down to 0.

    Example:
        >>> from dynablocks.training import TrainingConfig
        >>> one_cycle_linear(0.75, 0.0, TrainingConfig(warmup=0.5))
        0.5
    """
    rise, fall = warmed_up(progress, config.warmup)
    return rise * (1 - fall)


def learning_rate_factor(progress: float, epoch: float, config: TrainingConfig) -> float:
    """What the schedule ``config`` names multiplies the learning rate by.

    Args:
        progress: the share of the training that is done, in [0, 1].
        epoch: passes over the training images so far, whole and part.
        config: names the schedule and holds its settings.

    Example:
        >>> from dynablocks.training import TrainingConfig
        >>> learning_rate_factor(0.9, 9.0, TrainingConfig(schedule="constant"))
        1.0
    """
    return SCHEDULES.get_known(config.schedule)(progress, epoch, config)
