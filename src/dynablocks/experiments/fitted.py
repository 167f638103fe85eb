"""What experiments that fit networks have in common: seeds of a run, Adam in stairs, the split, a timed fit."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynablocks.experiments.cells import Cell, Store
from dynablocks.progress import progress_bar
from dynablocks.seeding import mixed_seed

Samples = tuple[Tensor, Tensor]
"""Inputs and values, one row a sample."""


@dataclass(frozen=True)
class AdamTraining:
    """Adam as the paper's authors use it in their small experiments: mean squared error, a rate that falls in stairs.

    Nothing is projected, so that learned steps may leave the range of their signal.

    Args:
        epochs, batch_size: each epoch sees every sample once, in a new order; the last batch may be smaller.
        lr, weight_decay: of Adam.
        stair: after so many epochs the rate is divided by ten.
    """

    epochs: int = 150
    batch_size: int = 32
    lr: float = 0.01
    weight_decay: float = 1e-5
    stair: int = 60

    def train(self, module: nn.Module, x: Tensor, y: Tensor, seed: int, label: str) -> None:
        """Train in place, in the precision of the data; equal seeds give equal results."""
        optimiser = torch.optim.Adam(module.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, self.stair, 0.1)
        generator = torch.Generator().manual_seed(seed)
        with progress_bar(label) as update:
            for epoch in range(self.epochs):
                for rows in torch.split(torch.randperm(len(x), generator=generator), self.batch_size):
                    optimiser.zero_grad()
                    nn.functional.mse_loss(module(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                schedule.step()
                update((epoch + 1) / self.epochs)


def last_tenth(x: Tensor, y: Tensor) -> tuple[Samples, Samples]:
    """Samples to fit, and the last tenth of all, which chooses the parameters that are kept.

    Example:
        >>> x = torch.arange(20.0)
        >>> [len(part) for part, _ in last_tenth(x, x)]
        [18, 2]
    """
    first = len(x) * 9 // 10
    return (x[:first], y[:first]), (x[first:], y[first:])


@dataclass(frozen=True, kw_only=True)
class RunCell(Cell):
    """One of several runs, which differ in all that is random.

    Args:
        run: which data and start.
        seed: of everything random, with ``run``.
    """

    run: int = 0
    seed: int = 0

    def mixed(self, purpose: int) -> int:
        """The seed of the data (0), the start (1) or the batches (2)."""
        return mixed_seed(self.seed, self.run, purpose) % 2**62


@dataclass(frozen=True, kw_only=True)
class FittedCell(RunCell):
    """A network fitted to the first of its data, and what is measured of it then.

    Attributes:
        name: what tables call the network.

    Args:
        points, train: how many samples, and how many of them, from the first on, are for training.
    """

    name: ClassVar[str] = ""

    points: int = 1000
    train: int = 900

    @abstractmethod
    def data(self) -> Samples:
        """All inputs and values."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The network before training."""

    @abstractmethod
    def fit(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        """Train it in place."""

    @abstractmethod
    def measure(self, network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        """The result but for the times, from the trained network and all data."""

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        x, y = self.data()
        network = self.network()
        clock, processor = time.perf_counter(), time.process_time()
        self.fit(network, x[: self.train], y[: self.train])
        spent = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
        return self.measure(network, x, y) | spent
