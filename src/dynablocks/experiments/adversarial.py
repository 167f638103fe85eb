"""Adversarial training with and without structure, at the same cost: the gap that the paper names.

Section 3.3 says that structure alone is "not as good" as adversarial training, and shows plain networks beside it only.
Here an unconstrained ResNet and a network inside the guarantee are both trained on the images an ℓ2 attack finds (PGD,
Madry et al. 2018; TRADES, Zhang et al. 2019), with as many convolution FLOPs each: the ResNet with plain cross-entropy,
as is usual. The paper preset is on CIFAR-10, the smaller ones on the embedded digits, with several seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import mean
from typing import TYPE_CHECKING, Any

from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.improved import structured_model, structured_training
from dynablocks.experiments.robustness import (
    CERTIFIED_EPSILON,
    Row,
    fewest_samples,
    larger_check,
    make_row,
    paper_model,
    paper_training,
    row_cells,
)
from dynablocks.models import ModelConfig, build
from dynablocks.reporting.tables import markdown_table
from dynablocks.reporting.words import accuracy_at, percent, proved_percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ADVERSARIES = ("none", "pgd", "trades")
KINDS = ("structured", "resnet")
SEEDS = {"smoke": 1, "cpu": 3, "paper": 1}
EPOCHS = {"smoke": 1.0, "cpu": 20.0, "paper": 60.0}
ATTACK: dict[str, Any] = {"adversary_epsilon": 0.5, "adversary_steps": 2, "adversary_step_size": 2.0}
DIGITS: dict[str, Any] = {"widths": (16, 32), "layers": (2, 2)}
SHORT: dict[str, Any] = {"batch_size": 64, "crop_padding": 0, "flip": False, "precision": "32"}
CERTIFIED = 4
"""Which of the means of :func:`_measured` is of the certified images, which may be more than the attacked ones."""
COMPARED: tuple[tuple[int, str, Callable[[float], str]], ...] = (
    (2, "worst attack @0.5", percent),
    (CERTIFIED, "certified @36/255", proved_percent),
)
"""Which of the means of :func:`_measured` are compared, what they are and how they are written."""


@functools.cache
def mflop(model: ModelConfig, shape: tuple[int, int, int]) -> float:
    """MFLOP of convolutions and matrix products of a training step (forward and backward) of one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dynablocks.linear import frozen_weights

    network = build(model, shape, 10, seed=0)
    with frozen_weights(network), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *shape))
    return 3 * float(counter.get_total_flops()) / 1e6


def image_shape(scale: Scale) -> tuple[int, int, int]:
    """Of one image of the scale's data."""
    return (3, 32, 32) if scale.preset == "paper" else (1, 8, 8)


def model(scale: Scale, kind: str) -> ModelConfig:
    """The network of one kind, at the scale's size."""
    from dataclasses import replace

    sizes = {} if scale.preset == "paper" else DIGITS
    return replace(structured_model(scale) if kind == "structured" else paper_model(scale, "resnet"), **sizes)


def epochs(scale: Scale, kind: str) -> float:
    """As many as cost the same, in quarters."""
    costs = {name: mflop(model(scale, name), image_shape(scale)) for name in KINDS}
    return max(0.25, round(4 * EPOCHS[scale.preset] * costs["structured"] / costs[kind]) / 4)


def runs(scale: Scale, kind: str, adversary: str) -> list[Row]:
    """One row a seed."""
    changes: dict[str, Any] = {"adversary": adversary, "epochs": epochs(scale, kind)}
    changes |= {} if adversary == "none" else ATTACK
    changes |= {} if scale.preset == "paper" else SHORT
    found = []
    for seed in scale.seeds(SEEDS[scale.preset]):
        if kind == "structured":
            training = structured_training(scale, **changes, seed=seed)
        else:
            training = paper_training(scale, 0.0, loss="cross-entropy", **changes, seed=seed)
        data = "cifar10" if scale.preset == "paper" else "digits"
        found.append(make_row(f"{kind}, {adversary}", scale, model(scale, kind), training, data=data))
    return found


@EXPERIMENTS.register("adversarial")
class Adversarial(Experiment):
    """Structured and adversarially trained, beside adversarial training alone."""

    name = "adversarial"
    title = "Adversarial training with and without structure, at the same cost"
    source = "Beyond section 3.3"

    def cells(self, scale: Scale) -> list[Cell]:
        return row_cells([row for a in ADVERSARIES for kind in KINDS for row in runs(scale, kind, a)])

    def tables(self, scale: Scale, store: Store) -> str:
        lines = [_line(scale, store, kind, adversary) for adversary in ADVERSARIES for kind in KINDS]
        epsilon, steps, size = (ATTACK[f"adversary_{name}"] for name in ("epsilon", "steps", "step_size"))
        note = (
            f"Attacks in training: ℓ2, ε = {epsilon}, {steps} steps of {size:g} ε from a random start. Means over the "
            "runs; worst is the worst of PGD on the cross-entropy and on the margin. The same cost means as many FLOPs "
            "of convolutions; an attack in training multiplies both alike."
        )
        return f"{note}\n\n{markdown_table(lines, list(lines[0]))}"

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        from dynablocks.experiments.robustness_figures import gap_figure

        rows = [runs(scale, kind, adversary)[0] for kind in KINDS for adversary in ADVERSARIES]
        return {"adversarial": gap_figure(rows, store, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        rows = [row for a in ADVERSARIES for k in KINDS for row in runs(scale, k, a)]
        images = fewest_samples([row.attack for row in rows], store)
        certified = fewest_samples([row.certificate for row in rows], store)
        found = {(k, a): _measured(scale, store, k, a) for k in KINDS for a in ADVERSARIES}
        checks = []
        for adversary in ADVERSARIES[1:]:
            pair = found["structured", adversary], found["resnet", adversary]
            for column, what, write in COMPARED:
                first, second = (None if line is None else line[column] for line in pair)
                named, compared = f"{what}, {adversary}: structured against resnet", scale.preset != "smoke"
                count = certified if column == CERTIFIED else images
                checks.append(larger_check(named, "", "structured larger", first, second, count, compared, write))
        return [*checks, self._claim(scale, found, images)]

    def _claim(self, scale: Scale, found: dict[tuple[str, str], list[float] | None], images: int) -> Check:
        """Section 3.3: structure alone is not as good as adversarial training; of CIFAR-10, so not of digits."""
        alone = found["structured", "none"]
        trained = [line[2] for a in ADVERSARIES[1:] if (line := found["resnet", a]) is not None]
        best = max(trained) if len(trained) == len(ADVERSARIES) - 1 else None
        compared = scale.preset == "paper"
        wanted = "resnet larger" if compared else "other data than the paper's"
        what = "worst attack @0.5: resnet with its best adversary against structured with none"
        kept = None if alone is None else alone[2]
        return larger_check(what, "the first", wanted, best, kept, images, compared, percent)


def _measured(scale: Scale, store: Store, kind: str, adversary: str) -> list[float] | None:
    """Means of clean, worst attack at 36/255 and 0.5, area, and certified at 36/255.

    ``None`` unless all were run, and where an attack failed or broke its certificate, which then proves nothing.
    """
    values = []
    for row in runs(scale, kind, adversary):
        certificate, attacked = row.certificate_summary(store), row.attacked(store)
        if certificate is None or attacked is None:
            return None
        points = attacked.points()
        worst = [accuracy_at(points, epsilon) or 0.0 for epsilon in (36 / 255, 0.5)]
        area = row.paper_auc(store, None) or 0.0
        proved = accuracy_at(certificate["certified_accuracy"], CERTIFIED_EPSILON) or 0.0
        values.append([certificate["clean_accuracy"], *worst, area, proved])
    return [mean(column) for column in zip(*values, strict=True)]


def _line(scale: Scale, store: Store, kind: str, adversary: str) -> dict[str, str]:
    cost, count = mflop(model(scale, kind), image_shape(scale)), epochs(scale, kind)
    line = {"network": kind, "adversary": adversary, "runs": str(SEEDS[scale.preset]), "epochs": f"{count:g}"}
    line |= {"GFLOP an image": f"{cost * count / 1000:.3g}"}
    columns = ("clean", "worst @36/255", "worst @0.5", "AUC (worst)", "certified @36/255")
    values = _measured(scale, store, kind, adversary)
    if values is None:
        return line | dict.fromkeys(columns, "not run")
    writes: tuple[Callable[[float], str], ...] = (percent, percent, percent, "{:.3f}".format, proved_percent)
    return line | {name: write(value) for name, write, value in zip(columns, writes, values, strict=True)}
