"""Many small networks trained at once: the runs are one more dimension of every parameter and every activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.ensembles import ensemble_forward, stacked_parameters
from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.seeding import seeded_generator

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Projected(Protocol):
    """A network whose constraint can be put on given parameters, stacked or not."""

    def project_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Put the parameters back into their feasible set, in place."""


@dataclass(frozen=True)
class EnsembleTraining:
    """How every run is trained: Adam with a cosine schedule on the cross-entropy of small batches.

    Args:
        steps: optimiser steps.
        batch_size: points of a batch, drawn with replacement.
        learning_rate: of Adam, at the start; it falls to 0 along a half cosine.

    Raises:
        InvalidArgument: a count that is no whole number from 1, or a rate that is not above 0.
    """

    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            object.__setattr__(self, name, require_whole(name, getattr(self, name), 1))
        require_range("learning_rate", self.learning_rate, 0.0, open_low=True)

    def optimiser(
        self, parameters: Sequence[Tensor]
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Adam, which treats every entry alone, so that stacked runs do not see each other; and its schedule."""
        # A gradient that is 0 but for rounding must stay nearly 0 when it is divided by its own size.
        adam = torch.optim.Adam(parameters, lr=self.learning_rate, eps=1e-5)
        return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)


def batch_choices(seeds: Sequence[int], training: EnsembleTraining, samples: int) -> Int[Tensor, "runs steps batch"]:
    """The points of every batch of every run; a run's depend on its seed only."""
    shape = (training.steps, training.batch_size)
    return torch.stack([torch.randint(samples, shape, generator=seeded_generator(seed)) for seed in seeds])


def train_ensemble(
    networks: Sequence[nn.Module],
    points: Float[Tensor, "samples features"],
    labels: Int[Tensor, " samples"],
    training: EnsembleTraining,
    seeds: Sequence[int],
    *,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Train equal networks together, each as if it were alone, with the batches of its own seed.

    A network that has ``project_parameters`` is projected after every step.

    Args:
        networks: the starts; they stay as they are.
        points, labels: the training set of all runs.
        training: the settings.
        seeds: of the batches, one a network.
        progress: called with the fraction done.

    Returns:
        The stacked parameters after training.

    Raises:
        InvalidArgument: networks that differ, or another number of seeds.
    """
    if len(seeds) != len(networks):
        raise InvalidArgument(f"got {len(seeds)} seeds for {len(networks)} networks; one each is needed.")
    template, parameters = networks[0], stacked_parameters(networks)
    project = getattr(template, "project_parameters", None)
    optimiser, schedule = training.optimiser(list(parameters.values()))
    choices = batch_choices(seeds, training, len(points))
    for step in range(training.steps):
        chosen = choices[:, step]
        logits = ensemble_forward(template, parameters, points[chosen], shared=False)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten(), reduction="sum")
        optimiser.zero_grad()
        torch.autograd.backward(loss / training.batch_size)
        optimiser.step()
        schedule.step()
        if project is not None:
            project(parameters)
        if progress is not None and step % 16 == 0:
            progress(step / training.steps)
    return {name: parameter.detach() for name, parameter in parameters.items()}
