"""Figure 1: mean step lengths, the points, and the decision regions with certified discs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dynablocks.experiments.table1_cells import NAMES, EnsembleCell, median_run, stored_network
from dynablocks.reporting.figures import BLUE, INK, VERMILION, new_figure, styled
from dynablocks.robustness.certificates import certified_radii

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from dynablocks.experiments.cells import Store

GRID, DISCS, SHOWN = 160, 14, 400
COLOURS = (BLUE, VERMILION)


@styled
def planar_figure(cells: Sequence[EnsembleCell], store: Store, *, watermark: str | None = None) -> Figure:
    """The paper's Figure 1 (lengths, points), and below it the median network of every family.

    Args:
        cells: one a family, the alternating one first.
        store: where the results are; panels without one say "not run".
    """
    figure = new_figure(9.6, 5.6, watermark)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.12))
    top, bottom = halves
    lengths, points = top.subplots(1, 2, width_ratios=(1.6, 1))
    _lengths(lengths, cells[0], store)
    _points(points, cells[0])
    panels = bottom.subplots(1, len(cells), sharex=True, sharey=True)
    for axes, cell in zip(panels, cells, strict=True):
        _regions(axes, cell, store)
    return figure


def _lengths(axes: Axes, cell: EnsembleCell, store: Store) -> None:
    axes.set(title=f"mean lengths of the steps, {NAMES[cell.family]}", xlabel="t")
    axes.set_yticks([0, 1], ["F", "Fc"])
    axes.grid(axis="y", visible=False)
    result = store.result(cell)
    if result is None:
        axes.text(0.5, 0.5, "not run", ha="center", transform=axes.transAxes)
        return
    means = torch.tensor(result["steps"], dtype=torch.float64).abs().mean(0).tolist()
    start = 0.0
    for layer, length in enumerate(means):
        contractive = layer % 2 == 0
        row, colour = (1, BLUE) if contractive else (0, VERMILION)
        axes.barh(row, length, left=start, height=0.6, color=colour)
        axes.text(start + length / 2, row + 0.36, f"{length:.2f}", ha="center", va="bottom", fontsize=7)
        start += length
    axes.set(ylim=(-0.5, 1.7), xlim=(0, start or 1.0))


def _points(axes: Axes, cell: EnsembleCell) -> None:
    points, labels = cell.points.points("train", cell.seed)
    _scatter(axes, points, labels, 5.0)
    axes.set(title=f"{cell.points.name}, noise {cell.points.noise:g}: {cell.points.train} points")


def _scatter(axes: Axes, points: Tensor, labels: Tensor, size: float) -> None:
    for label, colour in enumerate(COLOURS):
        x, y = points[labels == label][: SHOWN // 2].T.tolist()
        axes.scatter(x, y, s=size, color=colour, linewidths=0)
    axes.set_aspect("equal")
    axes.grid(visible=False)


@torch.no_grad()
def _regions(axes: Axes, cell: EnsembleCell, store: Store) -> None:
    from matplotlib.patches import Circle

    result = store.result(cell)
    if result is None:
        axes.set(title=f"{NAMES[cell.family]}: not run")
        return
    run = median_run(result)
    network = stored_network(cell, store, run)
    points, labels = cell.points.points(cell.part, cell.seed)
    low, high = points.amin(0) - 0.3, points.amax(0) + 0.3
    xs, ys = (torch.linspace(float(a), float(b), GRID, dtype=torch.float64) for a, b in zip(low, high, strict=True))
    plane = torch.cartesian_prod(xs, ys)
    logits = network(plane)
    surface = (logits[:, 1] - logits[:, 0]).reshape(GRID, GRID).T
    axes.contourf(xs.tolist(), ys.tolist(), surface.tolist(), levels=[-1e9, 0.0, 1e9], colors=COLOURS, alpha=0.18)
    _scatter(axes, points[:SHOWN], labels[:SHOWN], 2.0)
    weight = network.head.weight
    shown = network(points[:SHOWN])
    radii = certified_radii(shown, weight, result["bounds"][run], labels=labels[:SHOWN])
    for point, radius, label in list(zip(points.tolist(), radii.tolist(), labels.tolist(), strict=False))[:DISCS]:
        axes.add_patch(Circle(point, radius, facecolor="none", edgecolor=INK, linewidth=0.9))
        axes.plot(*point, marker="o", markersize=3, color=COLOURS[label], markeredgecolor=INK, markeredgewidth=0.5)
    axes.set(
        title=f"{NAMES[cell.family]}: {100 * result['accuracies'][run]:.1f} %, T = {result['final_times'][run]:.2f}"
    )
