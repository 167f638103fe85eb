"""Adversarial training with and without structure, at the same cost: the gap that the paper names.

Section 3.3 compares robust-by-structure networks with plain ones, not with adversarially trained ones. Here an
unconstrained ResNet and a network inside the guarantee are both trained on the images an ℓ2 attack finds (PGD, Madry et
al. 2018), with as many convolution FLOPs each: the ResNet with plain cross-entropy, as is usual.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.improved import structured_model, structured_training
from dynablocks.experiments.robustness import (
    Row,
    curve_table,
    make_row,
    paper_model,
    paper_training,
    row_cells,
    summary_table,
)
from dynablocks.models import ModelConfig, build
from dynablocks.reporting.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EPOCHS = {"smoke": 2.0, "cpu": 1.0, "paper": 60.0}
_ATTACK: dict[str, Any] = {"adversary_epsilon": 0.5, "adversary_steps": 1, "adversary_step_size": 2.0}
ADVERSARIES = {"smoke": ("pgd", "trades"), "cpu": ("pgd",), "paper": ("pgd", "trades")}


@functools.cache
def mflop(model: ModelConfig, shape: tuple[int, int, int]) -> float:
    """MFLOP of convolutions and matrix products of a training step (forward and backward) of one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dynablocks.linear import frozen_weights

    network = build(model, shape, 10, seed=0)
    pixels = torch.zeros(1, *shape, requires_grad=True)
    with frozen_weights(network), FlopCounterMode(display=False) as counter:
        network(pixels)
    return 3 * float(counter.get_total_flops()) / 1e6


def image_shape(scale: Scale) -> tuple[int, int, int]:
    """Of one image of the scale's data."""
    return (1, 8, 8) if scale.preset == "smoke" else (3, 32, 32)


def rows(scale: Scale) -> list[Row]:
    """Structured and plain, for each kind of adversarial training, at one cost; epochs in quarters."""
    shape = image_shape(scale)
    structured, plain = structured_model(scale), paper_model(scale, "resnet")
    epochs = _EPOCHS[scale.preset]
    longer = max(0.25, round(4 * epochs * mflop(structured, shape) / mflop(plain, shape)) / 4)
    found = []
    for adversary in ADVERSARIES[scale.preset]:
        changes = {"adversary": adversary, **_ATTACK}
        ours = structured_training(scale, epochs=epochs, **changes)
        theirs = paper_training(scale, 0.0, loss="cross-entropy", epochs=longer, **changes)
        found.append(make_row(f"structured + {adversary}", scale, structured, ours))
        found.append(make_row(f"resnet + {adversary}", scale, plain, theirs))
    return found


@EXPERIMENTS.register("adversarial")
class Adversarial(Experiment):
    """Structured and adversarially trained, beside adversarial training alone."""

    name = "adversarial"
    title = "Adversarial training with and without structure, at the same cost"
    source = "Beyond section 3.3"

    def cells(self, scale: Scale) -> list[Cell]:
        return row_cells(rows(scale))

    def tables(self, scale: Scale, store: Store) -> str:
        found, shape = rows(scale), image_shape(scale)
        costs = []
        for row in found:
            cost, epochs = mflop(row.training.model, shape), row.training.training.epochs or 0.0
            total = f"{cost * epochs / 1000:.3g}"
            line = {"network": row.label, "cost": f"{cost:.1f}", "epochs": f"{epochs:g}", "product": total}
            costs.append(line)
        columns = {"network": "network", "cost": "MFLOP an image and step", "epochs": "epochs"}
        columns |= {"product": "GFLOP an image, all epochs"}
        epsilon, steps = _ATTACK["adversary_epsilon"], _ATTACK["adversary_steps"]
        note = f"Training attacks: ℓ2, ε = {epsilon}, {steps} step of 2 ε from a random start."
        tables = (summary_table(found, store), curve_table(found, store, "margin"), markdown_table(costs, columns))
        return f"{note}\n\n{tables[0]}\n\nUnder PGD on the margin:\n\n{tables[1]}\n\nCost of training:\n\n{tables[2]}"

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        from dynablocks.experiments.robustness_figures import gap_figure

        return {"adversarial": gap_figure(rows(scale), store, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        ours, theirs = rows(scale)[:2]
        values = [row.certified_at(store) for row in (ours, theirs)]
        got = None if None in values else f"{values[0]:.3f} against {values[1]:.3f}"
        holds = None if got is None or scale.preset == "smoke" else (values[0] or 0) > (values[1] or 0)
        return [Check.of("certified at 36/255: structured against plain", "", "structured larger", got, holds)]
