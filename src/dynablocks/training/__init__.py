"""Training: settings, losses, schedules, one loop, and checkpoints that survive being killed."""

from __future__ import annotations

from dynablocks.training.checkpoint import find_checkpoint, load_checkpoint, load_weights, read_config, save_checkpoint
from dynablocks.training.config import TrainingConfig
from dynablocks.training.loop import TrainingSummary, fit
from dynablocks.training.losses import LOSSES, hinge, make_loss, offset_cross_entropy
from dynablocks.training.optimisers import OPTIMISERS, make_optimiser
from dynablocks.training.precision import choose_device, choose_precision
from dynablocks.training.schedules import SCHEDULES, learning_rate_factor

__all__ = [
    "LOSSES",
    "OPTIMISERS",
    "SCHEDULES",
    "TrainingConfig",
    "TrainingSummary",
    "choose_device",
    "choose_precision",
    "find_checkpoint",
    "fit",
    "hinge",
    "learning_rate_factor",
    "load_checkpoint",
    "load_weights",
    "make_loss",
    "make_optimiser",
    "offset_cross_entropy",
    "read_config",
    "save_checkpoint",
]
