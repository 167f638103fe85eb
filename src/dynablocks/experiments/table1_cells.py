"""The cells of Table 1: many planar networks of one family, trained together."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynablocks.data import mixed_seed, planar
from dynablocks.ensembles import ensemble_forward
from dynablocks.experiments.cells import Cell, Store, stored_tensors
from dynablocks.experiments.ensembles import EnsembleTraining, train_ensemble
from dynablocks.experiments.planar_networks import PlanarNetwork, StandardisedTraining
from dynablocks.files import write_tensors
from dynablocks.progress import progress_bar
from dynablocks.seeding import seeded

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

NAMES = {"F+Fc": "F ∪ Fc", "F": "F", "Fc": "Fc"}
WEIGHTS = "networks.safetensors"


@dataclass(frozen=True)
class PlanarSet:
    """Which points: training, validation and test points differ by the seed only; the training mean is subtracted.

    Args:
        name: of a set of :func:`dynablocks.data.planar`.
        noise: standard deviation of its noise.
        train, test: how many points.
    """

    name: str = "moons"
    noise: float = 0.16
    train: int = 1000
    test: int = 10000

    def points(self, part: str, seed: int) -> tuple[Float[Tensor, "n 2"], Int[Tensor, " n"]]:
        """The points and labels of ``"train"``, ``"validation"`` or ``"test"``."""
        seeds = {name: mixed_seed(seed, k) % 2**32 for k, name in enumerate(("train", "validation", "test"))}
        train, labels = planar(self.name, self.train, self.noise, seeds["train"])
        if part == "train":
            return train - train.mean(0), labels
        points, labels = planar(self.name, self.test, self.noise, seeds[part])
        return points - train.mean(0), labels


@dataclass(frozen=True)
class EnsembleCell(Cell):
    """All runs of one family, trained together in float64.

    Args:
        family: a name in :data:`FAMILIES`.
        runs: how many networks; they differ in their start and their batches.
        layers: residual layers of a network.
        points: the planar set.
        training: the settings of every run.
        part: the points that are held out to measure the accuracy, ``"test"`` or ``"validation"``.
        seed: of the points, starts and batches.
    """

    family: str
    runs: int = 100
    layers: int = 10
    points: PlanarSet = field(default_factory=PlanarSet)
    training: EnsembleTraining = field(default_factory=EnsembleTraining)
    part: str = "test"
    seed: int = 0

    @property
    def title(self) -> str:
        return f"{self.runs} planar networks of the family {NAMES[self.family]}"

    @property
    def cost(self) -> float:
        return self.training.steps * (0.01 + 0.0003 * self.runs)

    def networks(self) -> list[StandardisedTraining]:
        """The networks before training."""
        found = []
        for run in range(self.runs):
            with seeded(mixed_seed(self.seed, run, 0)):
                found.append(StandardisedTraining(self.family, self.layers).double())
        return found

    def batch_seeds(self) -> list[int]:
        """The seed of the batches of every run."""
        return [mixed_seed(self.seed, run, 1) for run in range(self.runs)]

    def train(self) -> dict[str, Tensor]:
        """The stacked parameters of all runs after training, as those of plain networks."""
        points, labels = self.points.points("train", self.seed)
        networks = self.networks()
        with progress_bar(self.title) as update:
            trained = train_ensemble(networks, points, labels, self.training, self.batch_seeds(), progress=update)
        return networks[0].fold(trained, ensemble_forward(networks[0].body, of_body(trained), points))

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        started = time.perf_counter()
        parameters = self.train()
        seconds = time.perf_counter() - started
        write_tensors(directory / WEIGHTS, parameters)
        return self.measure(parameters) | {"seconds": seconds}

    @torch.no_grad()
    def measure(self, parameters: dict[str, Tensor]) -> dict[str, Any]:
        """Accuracy, steps, T and the bound of every run."""
        points, labels = self.points.points(self.part, self.seed)
        template = PlanarNetwork(self.family, self.layers).double()
        logits = ensemble_forward(template, parameters, points)
        steps = template.step_sizes(parameters)
        bounds = [network.body_lipschitz() for network in unstacked(self.family, self.layers, parameters)]
        return {
            "accuracies": (logits.argmax(-1) == labels).double().mean(-1).tolist(),
            "final_times": steps.abs().sum(-1).tolist(),
            "steps": steps.tolist(),
            "bounds": bounds,
        }


def of_body(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the body alone, under its own names."""
    prefix = "body."
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def unstacked(family: str, layers: int, parameters: dict[str, Tensor]) -> list[PlanarNetwork]:
    """The networks of stacked parameters, one a run."""
    found = []
    for run in range(len(next(iter(parameters.values())))):
        network = PlanarNetwork(family, layers).double()
        network.load_state_dict({name: stack[run] for name, stack in parameters.items()})
        found.append(network)
    return found


def stored_network(cell: EnsembleCell, store: Store, run: int) -> PlanarNetwork:
    """One trained network of a built cell.

    Raises:
        DamagedCell: the file of its weights is not what the build wrote.
    """

    def chosen(parameters: dict[str, Tensor]) -> PlanarNetwork:
        one = {name: stack[run : run + 1] for name, stack in parameters.items()}
        return unstacked(cell.family, cell.layers, one)[0]

    return stored_tensors(cell, store, WEIGHTS, chosen)


def median_run(result: dict[str, Any]) -> int:
    """The run whose accuracy is the median, the lower one of two."""
    accuracies = result["accuracies"]
    return accuracies.index(statistics.median_low(accuracies))
