"""Optimisers by name, as torch has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.registry import Registry

if TYPE_CHECKING:
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
    return torch.optim.Adam(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=_fused(groups))


@OPTIMISERS.register("adamw")
def _adamw(groups: ParameterGroups, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=_fused(groups))


@OPTIMISERS.register("nadam")
def _nadam(groups: ParameterGroups, config: TrainingConfig) -> torch.optim.Optimizer:
    return torch.optim.NAdam(groups, lr=config.lr, betas=(config.momentum, 0.999), decoupled_weight_decay=True)


def _fused(groups: ParameterGroups) -> bool | None:
    """One pass over memory in place of eighteen: on a CPU, where torch does not choose it by itself.

    That pass walks weights, gradients and moments side by side, so it is only for weights whose strides these get too.
    """
    parameters = [p for group in groups for p in group["params"]]
    return True if all(map(_is_walked, parameters)) else None


def _is_walked(parameter: Tensor) -> bool:
    """Whether it lies on a CPU without gaps; of a view of every second column, say, neighbours would be changed."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return parameter.device.type == "cpu" and parameter.is_floating_point() and dense


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser the moments that a checkpoint stored; how it steps on this device stays its own.

    The checkpoint may be of another device, or of a version without fused steps. Its moments get the strides of the
    weights, as fused steps read them: a training may go on with another ``channels_last``.
    """
    own = [{"fused": group["fused"]} if "fused" in group else {} for group in optimiser.param_groups]
    groups = [stored | fused for stored, fused in zip(state["param_groups"], own, strict=True)]
    optimiser.load_state_dict(state | {"param_groups": groups})
    for parameter, moments in optimiser.state.items():
        if "mu_product" in moments:
            # NAdam reads this number at each step, and torch has taken it to the weights' device.
            moments["mu_product"] = moments["mu_product"].cpu()
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def make_optimiser(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimiser ``config`` names over the trainable parameters of ``model``.

    Weight decay acts on tensors with two or more dimensions, so never on biases, step sizes or scales.

    Raises:
        InvalidArgument: the model has nothing to train.

    Example:
        >>> from dynablocks.training import TrainingConfig
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
