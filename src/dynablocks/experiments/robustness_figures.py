"""Figures of the robustness study: attacked curves, and the gap between what survives and what is proved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynablocks.experiments.robustness import Row
from dynablocks.reporting.figures import BLUE, GREEN, INK, ORANGE, PURPLE, VERMILION, new_figure, styled
from dynablocks.robustness import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dynablocks.experiments.cells import Store

COLOURS = {"resnet": INK, "naive": PURPLE, "non_expansive": ORANGE, "prescribed": GREEN, "flexible": BLUE}
DASHED: Any = (0, (4, 1.6))
DOTTED: Any = (0, (1, 1.6))


@styled
def attacked_figure(rows: Sequence[Row], store: Store, *, watermark: str | None = None) -> Figure:
    """The paper's Figures 4 and 10: accuracy under its attack, a panel a margin; the paper's own curves dotted."""
    margins = list(dict.fromkeys(row.margin for row in rows))
    figure = new_figure(4.2 * len(margins) + 1.6, 3.9, watermark)
    panels = figure.subplots(1, len(margins), sharey=True, squeeze=False)[0]
    for axes, margin in zip(panels, margins, strict=True):
        for row in (row for row in rows if row.margin == margin):
            colour = COLOURS.get(row.model, VERMILION)
            _draw(axes, row.attacked(store, "ce"), colour, "-", label=row.label)
            _draw(axes, row.paper(), colour, DOTTED)
        axes.set(xlim=(0, 1), ylim=(0, 100), xlabel="ε: ℓ2 norm, pixels in [0, 1]")
        axes.set_title(f"margin {margin:g}" if margin is not None else "")
    panels[0].set_ylabel(f"accuracy under {rows[0].attack.config.steps}-step CE-PGD in %")
    title = "solid: here\ndotted: paper" if any(row.paper() is not None for row in rows) else None
    _legend(panels[-1], loc="center left", bbox_to_anchor=(1.0, 0.5), title=title)
    return figure


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
        bound = (store.result(row.certificate) or {}).get("body_lipschitz")
        lacking = "failed" if row.failed(store) else "not run"
        note = lacking if certified is None else f"bound {bound:.3g}" if bound is not None else "bound infinite"
        axes.set_title(f"{row.label}{'' if row.margin is None else f', {row.margin:g}'}: {note}", fontsize=8.5)
        axes.set(xlim=(0, 1), ylim=(0, 100))
    _legend(panels[0], fontsize=7.5)
    figure.supxlabel("ε: ℓ2 norm, pixels in [0, 1]", fontsize=9)
    figure.supylabel("accuracy in %", fontsize=9)
    return figure


@styled
def paper_steps_figure(rows: Sequence[Row], store: Store, *, watermark: str | None = None) -> Figure:
    """The paper's Figures 5 and 12: learned (h₁, h₂) of each pair as segments on the t axis, one line a network.

    A step begins at its dot and ends at its diamond, to the left of it where it is negative; h₂ is taken first (3.12).
    """
    figure = new_figure(8.4, 0.9 + 0.62 * len(rows), watermark)
    axes = figure.add_subplot()
    for height, row in enumerate(reversed(rows)):
        result, time = store.result(row.training), 0.0
        for block in (result or {}).get("steps", []):
            for name, colour in (("h2", VERMILION), ("h1", BLUE)):
                step = block["values"].get(name)
                if step is None:
                    continue
                end = time + step
                axes.plot([time, end], [height, height], color=colour, lw=2)
                for place, marker in ((time, "o"), (end, "D")):
                    axes.plot([place], [height], color=colour, marker=marker, markersize=4.5)
                time = end
        if result is None:
            axes.text(0, height, "  not run", va="center")
    axes.set_yticks(range(len(rows)), [_step_label(row) for row in reversed(rows)])
    axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel="t: sum of the steps; a step goes from its dot to its diamond")
    for name, colour in (("h₂, expansive", VERMILION), ("h₁, contractive", BLUE)):
        axes.plot([], [], color=colour, lw=2, label=name)
    _legend(axes, fontsize=7.5)
    return figure


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
