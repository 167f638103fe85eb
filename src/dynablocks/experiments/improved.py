"""Beyond the paper: guarantees that hold, exact flows and switching laws for the whole network, beside its rows.

The paper's lifts have free factors and its pixels are divided by their standard deviation, so its networks prove
nothing at the radii it attacks at (their bounds are honest and large). Here every layer is inside the guarantee: an
isometric stem, orthogonal weights, a row-normalised head, and a loss that asks for a margin in units of the input. One
row has steps of size h = 2, the end of (3.5), reached from h = 1 during training (design D2.5); the other has
exact flows of contractive and expansive fields in place of Euler steps, with one budget Σ log L <= 0 for the whole
network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.robustness import (
    Row,
    attack_note,
    curve_table,
    fewest_samples,
    larger_check,
    make_row,
    paper_rows,
    row_cells,
    summary_table,
)
from dynablocks.models import ModelConfig
from dynablocks.reporting.words import proved_percent
from dynablocks.training import TrainingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MODEL: dict[str, dict[str, Any]] = {
    "smoke": {"widths": (8, 16), "layers": (1, 1)},
    "cpu": {"widths": (32, 64, 128), "layers": (2, 3, 3)},
    "paper": {"widths": (64, 128, 256), "layers": (4, 4, 4)},
}
_TRAINING: dict[str, dict[str, Any]] = {
    "smoke": {"epochs": 2.0, "batch_size": 128, "precision": "32"},
    "cpu": {"epochs": 16.0, "batch_size": 256, "crop_padding": 2, "flip": True, "precision": "32"},
    "paper": {"epochs": 100.0, "batch_size": 256, "crop_padding": 4, "flip": True, "precision": "32"},
}
_EXACT: dict[str, dict[str, Any]] = {"smoke": {}, "cpu": {"layers": (2, 2, 2)}, "paper": {}}
_EXACT_EPOCHS = {"smoke": 2.0, "cpu": 5.0, "paper": 100.0}
_LOSS: dict[str, Any] = {
    "loss": "offset-cross-entropy",
    "offset": 0.6,
    "temperature": 0.35,
    "optimiser": "adam",
    "lr": 0.01,
}


def structured_model(scale: Scale) -> ModelConfig:
    """Steps x − hAᵀReLU(Ax + b) with AᵀA = I, h from 1 to 2, the end of (3.5).

    With padding "full" A is tall and AAᵀ ≠ I: gradients may lose norm at h = 2, where they keep it for AAᵀ = I.
    """
    return ModelConfig("certified", kernel_size=2, padding="full", **_MODEL[scale.preset])


def exact_model(scale: Scale) -> ModelConfig:
    """Exact flows of contractive and expansive fields in turn, in balance over the whole network."""
    sizes = _MODEL[scale.preset] | _EXACT[scale.preset]
    return ModelConfig("certified", step="exact", balance="network", padding="circular", kernel_size=2, **sizes)


def structured_training(scale: Scale, **changes: Any) -> TrainingConfig:
    """The training of both."""
    settings = _LOSS | _TRAINING[scale.preset] | {"seed": scale.seed, "regularisation": 1.0}
    return TrainingConfig(**(settings | changes))


def our_rows(scale: Scale) -> list[Row]:
    """The networks inside the guarantee."""
    exact = structured_training(scale, epochs=_EXACT_EPOCHS[scale.preset])
    return [
        make_row("Euler steps, h to 2", scale, structured_model(scale), structured_training(scale)),
        make_row("exact flow, network budget", scale, exact_model(scale), exact),
    ]


def faithful_rows(scale: Scale) -> list[Row]:
    """The paper's networks on the same data, all margins: the same cells as in Figures 4 and 10."""
    return [row for row in paper_rows(scale) if row.training.data != "cifar100"]


@EXPERIMENTS.register("improved")
class Improved(Experiment):
    """Our rows beside the paper's."""

    name = "improved"
    title = "Networks whose guarantee holds, beside the paper's"
    source = "Beyond sections 3.2 and 3.3"

    def cells(self, scale: Scale) -> list[Cell]:
        return row_cells([*our_rows(scale), *faithful_rows(scale)])

    def tables(self, scale: Scale, store: Store) -> str:
        rows = [*our_rows(scale), *faithful_rows(scale)]
        curves = f"Under the paper's attack:\n\n{curve_table(our_rows(scale), store)}"
        return f"{attack_note(scale)}\n\n{summary_table(rows, store)}\n\n{curves}"

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        from dynablocks.experiments.robustness_figures import gap_figure

        rows = [*our_rows(scale), *[row for row in faithful_rows(scale) if row.margin == 0.07]]
        return {"improved": gap_figure(rows, store, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        ours, theirs = our_rows(scale), faithful_rows(scale)
        areas = [_best([row.paper_auc(store) for row in rows]) for rows in (ours, theirs)]
        proofs = [_best([row.certified_at(store) for row in rows]) for rows in (ours, theirs)]
        images = fewest_samples([row.attack for row in (*ours, *theirs)], store)
        tested = fewest_samples([row.certificate for row in (*ours, *theirs)], store)
        pairs: tuple[tuple[str, list[float | None], int, Callable[[float], str]], ...] = (
            ("AUC (CE)", areas, images, "{:.3f}".format),
            ("certified at 36/255", proofs, tested, proved_percent),
        )
        named, compared = "{}: best of ours against best of the paper's rows", scale.preset != "smoke"
        return [
            larger_check(named.format(what), "", "ours larger", first, second, count, compared, write)
            for what, (first, second), count, write in pairs
        ]


def _best(values: list[float | None]) -> float | None:
    """The largest of them, ``None`` unless all are there."""
    found = [value for value in values if value is not None]
    return max(found) if len(found) == len(values) else None
