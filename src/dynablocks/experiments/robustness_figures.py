"""Figures of the robustness study: attacked curves, and the gap between what survives and what is proved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynablocks.experiments.robustness import Row
from dynablocks.reporting import words
from dynablocks.reporting.data import StepRow
from dynablocks.reporting.figures import BLUE, GREEN, INK, ORANGE, PURPLE, VERMILION, draw_steps, new_figure, styled
from dynablocks.robustness import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dynablocks.experiments.cells import Store

COLOURS = {"resnet": INK, "naive": PURPLE, "non_expansive": ORANGE, "prescribed": GREEN, "flexible": BLUE}
MARKERS = {"resnet": "s", "naive": "^", "non_expansive": "D", "prescribed": "v", "flexible": "o"}
"""A network is told by its marker where colours are not."""
DASHED: Any = (0, (4, 1.6))
DOTTED: Any = (0, (1, 1.6))


@styled
def attacked_figure(rows: Sequence[Row], store: Store, *, watermark: str | None = None) -> Figure:
    """The paper's Figures 4 and 10: accuracy under its attack, and below it the areas; a column of panels a margin.

    A marker a network, full. The paper's own curves are dotted, and the markers of what is its own are open.
    """
    margins = list(dict.fromkeys(row.margin for row in rows))
    figure = new_figure(4.2 * len(margins) + 1.6, 5.6, watermark)
    panels = figure.subplots(2, len(margins), sharey="row", squeeze=False, height_ratios=(2.6, 1))
    for (curves, areas), margin in zip(panels.T, margins, strict=True):
        chosen = [row for row in rows if row.margin == margin]
        for row in chosen:
            colour, marked = COLOURS.get(row.model, VERMILION), {"marker": MARKERS.get(row.model, "X"), "markersize": 4}
            _draw(curves, row.attacked(store, "ce"), colour, "-", label=row.label, **marked)
            _draw(curves, row.paper(), colour, DOTTED, fillstyle="none", **marked)
        curves.set(xlim=(0, 1), ylim=(0, 100), xlabel="ε: ℓ2 norm, pixels in [0, 1]")
        curves.set_title(f"margin {margin:g}" if margin is not None else "")
        _draw_areas(areas, chosen, store)
    panels[0, 0].set_ylabel(f"accuracy under {rows[0].attack.config.steps}-step CE-PGD in %")
    with_paper = any(row.paper() is not None for row in rows)
    title = "solid, full: here\ndotted, open: paper" if with_paper else None
    _legend(panels[0, -1], loc="center left", bbox_to_anchor=(1.0, 0.5), title=title)
    return figure


def _draw_areas(axes: Axes, rows: Sequence[Row], store: Store) -> None:
    """The area below each attacked curve, a line a network: full here, open the paper's."""
    for height, row in enumerate(rows):
        paper = row.paper()
        for area, filled in ((row.paper_auc(store), "full"), (None if paper is None else paper.auc, "none")):
            if area is not None:
                look: dict[str, Any] = {
                    "color": COLOURS.get(row.model, VERMILION),
                    "marker": MARKERS.get(row.model, "X"),
                }
                axes.plot([area], [height], fillstyle=filled, markersize=6, linestyle="", **look)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="AUC: area below the curve")


@styled
def gap_figure(rows: Sequence[Row], store: Store, *, watermark: str | None = None) -> Figure:
    """For each network what the paper's attack and the stronger one leave, what is proved, and the gap between.

    The gap is one of the images that were attacked; the curve of what is proved, of all.
    """
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = new_figure(2.9 * columns, 2.9 * lines + 0.5, watermark)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(panels, rows, strict=False):
        worst, certified = row.attacked(store), row.certified(store)
        _draw(axes, row.attacked(store, "ce"), INK, DOTTED, label="paper's attack")
        _draw(axes, worst, VERMILION, DASHED, label="worst of attacks")
        _draw(axes, certified, BLUE, "-", label="certified")
        proved = row.certified_of_attacked(store)
        if worst is not None and proved is not None:
            high = np.interp(proved.epsilons, worst.epsilons, worst.accuracies)
            low = np.asarray(proved.accuracies)
            axes.fill_between(proved.epsilons, 100 * low, 100 * high, color=ORANGE, alpha=0.2, lw=0)
        constant = (store.result(row.certificate) or {}).get("body_lipschitz")
        lacking = "failed" if row.failed(store) else "not run"
        shown = "bound infinite" if constant is None else f"bound {words.bound(constant)}"
        note = lacking if certified is None else shown
        axes.set_title(f"{row.label}{'' if row.margin is None else f', {row.margin:g}'}: {note}", fontsize=8.5)
        axes.set(xlim=(0, 1), ylim=(0, 100))
    _legend(panels[0], fontsize=7.5)
    figure.supxlabel("ε: ℓ2 norm, pixels in [0, 1]", fontsize=9)
    figure.supylabel("accuracy in %", fontsize=9)
    return figure


@styled
def paper_steps_figure(rows: Sequence[Row], store: Store, *, watermark: str | None = None) -> Figure:
    """The paper's Figures 5 and 12: learned (h₁, h₂) of each pair as segments on the t axis, one panel a network.

    A step begins at its dot and ends at its diamond, to the left of it where it is negative; h₂ is taken first (3.12).
    """
    walks = [_pairs_walked(store.result(row.training)) for row in rows]
    tallest = max(3, *(2 * len(walk) for walk in walks))
    figure = new_figure(8.4, 0.8 + (0.4 + 0.18 * tallest) * len(rows), watermark)
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axes, row, walk in zip(panels, rows, walks, strict=True):
        draw_steps(axes, walk)
        lacking = "" if store.result(row.training) is not None else ": not run"
        axes.set_title(f"{_step_label(row)}{lacking}", fontsize=8.5)
    panels[-1].set_xlabel("t: sum of the steps; a step goes from its dot to its diamond")
    drawn = next((axes for axes, walk in zip(panels, walks, strict=True) if walk), panels[0])
    _legend(drawn, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _pairs_walked(result: dict[str, Any] | None) -> list[StepRow]:
    """The pairs of a stored training as they are taken: h₂ of the expansive field, then h₁."""
    order = (("h2", 1), ("h1", 0))
    return [
        StepRow(block["block"], block["values"], [(k, block["values"][name]) for name, k in order])
        for block in (result or {}).get("steps", [])
    ]


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **options)


def _step_label(row: Row) -> str:
    return f"{row.training.data}, margin {row.margin:g}" if row.margin is not None else row.label


def _draw(axes: Axes, curve: Curve | None, colour: str, dashes: Any, **options: Any) -> None:
    if curve is None:
        return
    values = [100 * value for value in curve.accuracies]
    axes.plot(curve.epsilons, values, color=colour, linestyle=dashes, lw=1.6 if dashes == "-" else 1.1, **options)
