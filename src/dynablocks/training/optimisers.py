"""Optimisers by name, as torch has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dynablocks.errors import InvalidArgument
from dynablocks.registry import Registry
from dynablocks.training.config import TrainingConfig

ParameterGroups = list[dict[str, Any]]
OPTIMISERS: Registry[Callable[[ParameterGroups, TrainingConfig], torch.optim.Optimizer]] = Registry("optimiser")


@OPTIMISERS.register("sgd")
def _sgd(groups: ParameterGroups, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)


@OPTIMISERS.register("nesterov")
def _nesterov(groups: ParameterGroups, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)


@OPTIMISERS.register("adam")
def _adam(groups: ParameterGroups, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=config.lr, betas=(config.momentum, 0.999))


@OPTIMISERS.register("adamw")
def _adamw(groups: ParameterGroups, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))


@OPTIMISERS.register("nadam")
def _nadam(groups: ParameterGroups, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.NAdam(groups, lr=config.lr, betas=(config.momentum, 0.999), decoupled_weight_decay=True)


def make_optimiser(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser ``config`` names over the trainable parameters of ``model``.

    Weight decay acts on tensors with two or more dimensions, so never on biases, step sizes or scales.

    Raises:
        InvalidArgument: the model has nothing to train.

    Example:
        >>> optimiser = make_optimiser(nn.Linear(2, 2), TrainingConfig(optimiser="adamw", weight_decay=0.1))
        >>> [group["weight_decay"] for group in optimiser.param_groups]
        [0.1, 0.0]
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InvalidArgument("the model has no trainable parameters; unfreeze some, or skip the training.")
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups: ParameterGroups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return OPTIMISERS.get_known(config.optimiser)([group for group in groups if group["params"]], config)
