"""The exponential average of a model's weights over the training steps."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dynablocks.switching.constraints import project


class ExponentialAverage:
    r"""A copy of a model whose weights are :math:`\bar w \leftarrow d\,\bar w + (1 - d)\,w` after each step.

    In step k the decay is min(d, k / (k + 10)), so that the start does not linger. Buffers are copied. Projections onto
    constraints that are not convex do not survive averaging; :meth:`model` applies them to the copy.

    Args:
        model: what is trained.
        decay: d in (0, 1).

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = ExponentialAverage(model, 0.5)
        >>> _ = model.weight.data.add_(1.0)
        >>> average.update(model, step=100)
        >>> round((model.weight - average.model().weight).item(), 3)
        0.5
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.copy = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        decay = min(self.decay, step / (step + 10))
        averages = [p.data for p in self.copy.parameters()]
        torch._foreach_lerp_(averages, [p.data for p in model.parameters()], 1 - decay)
        for buffer, current in zip(self.copy.buffers(), model.buffers(), strict=True):
            buffer.copy_(current)

    def model(self) -> nn.Module:
        """A copy of the averaged model with its constraints applied."""
        averaged = copy.deepcopy(self.copy)
        project(averaged)
        return averaged
