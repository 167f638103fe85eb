"""What figures 3 and 11 share: regions of step pairs, their sizes, and the measured pairs that put them to the test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dynablocks.experiments.base import Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.monte_carlo import TOLERANCE, MonteCarloCell, measured, violations
from dynablocks.reporting import markdown_table
from dynablocks.reporting.figures import BLUE, GREEN, INK, PURPLE, VERMILION, new_figure, styled
from dynablocks.switching import REGIONS, ExactFlowRegion, Region

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLOPE = 0.5
SIZES = {"smoke": (150, 25, 2), "cpu": (1000, 100, 16), "paper": (4000, 400, 48)}
"""By preset: uniform pairs over the window, pairs of each kind a region gets, random weights a size n."""


@dataclass(frozen=True)
class Panel:
    """One way to take a pair of steps, and the regions that claim something about it.

    Args:
        step: its name, the panel's title.
        regions: names in ``REGIONS``.
        signal: ``"prescribed"`` or ``"flexible"``.
        substeps: S.
        window: (lowest h₁, highest h₁, lowest h₂, highest h₂) of the plane.
    """

    step: str
    regions: tuple[str, ...]
    signal: str
    substeps: int
    window: tuple[float, float, float, float]

    def cell(self, scale: Scale) -> MonteCarloCell:
        """The measurement at a scale."""
        pairs, claimed, trials = SIZES[scale.preset]
        chosen = (self.regions, self.signal, self.substeps, self.window)
        return MonteCarloCell(*chosen, pairs, claimed, trials, SLOPE, scale.seed)


class RegionExperiment(Experiment):
    """Regions drawn beside each other, each tested by measured constants of the step it speaks about.

    Attributes:
        paper_region: the paper's region in ``REGIONS``.
        panels: the ways to take a pair.
    """

    paper_region: ClassVar[str]
    panels: ClassVar[tuple[Panel, ...]]

    def cells(self, scale: Scale) -> list[Cell]:
        return [panel.cell(scale) for panel in self.panels]

    def tables(self, scale: Scale, store: Store) -> str:
        rows = []
        for panel in self.panels:
            cell = panel.cell(scale)
            result = store.result(cell)
            for name, region in cell.claims().items():
                rows.append(
                    {"step": panel.step, "region": name} | measured_columns(region, cell, result) | size_columns(region)
                )
        columns = {
            "step": "step",
            "region": "region",
            "pairs": "pairs tested inside",
            "violations": "constant above 1",
            "largest": "largest constant inside",
            "covered": "share of the window's valid pairs",
            "peak": "largest h₂",
            "area": "area at h₂ ≥ 0",
            "share": "of the tight region's",
        }
        return markdown_table(rows, columns)

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        results = [store.result(panel.cell(scale)) for panel in self.panels]
        figure = regions_figure(self.paper_region, self.panels, results, watermark=scale.watermark)
        return {self.name: figure}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        found = self.geometry()
        for panel in self.panels:
            cell = panel.cell(scale)
            result = store.result(cell)
            for name, region in cell.claims().items():
                found.append(violation_check(panel, name, region, result))
                found.append(left_out_check(panel, name, region, result, loose=name == self.paper_region))
        return found

    @abstractmethod
    def geometry(self) -> list[Check]:
        """The comparisons that need no measurement: heights and areas."""


def peak(region: Region) -> tuple[float, float]:
    """(h₁, h₂) where the region admits the largest expansive step, to about 1e-10 in h₁; its limit has one maximum.

    Example:
        >>> from dynablocks.switching import PaperPrescribedRegion
        >>> h1, h2 = peak(PaperPrescribedRegion(0.5))
        >>> round(h1, 4), round(h2, 4)
        (0.5, 0.1547)
    """
    low, high = region.first_range
    for _ in range(6):
        grid = np.linspace(low, high, 201)
        best = int(np.argmax([region.limit(float(first)) for first in grid]))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 200)])
    first = float(grid[best])
    return first, region.limit(first)


def area(region: Region, points: int = 20001) -> float:
    """The area of the part with h₂ >= 0, by the trapezoidal rule.

    Example:
        >>> from dynablocks.switching import ExactFlowRegion
        >>> round(area(ExactFlowRegion(0.5)), 6)
        4.0
    """
    from scipy.integrate import trapezoid  # NumPy has it from 2.0 on

    grid, limits = region.boundary(points).T
    return float(trapezoid(np.maximum(limits, 0.0), grid))


def peak_check(what: str, paper: str, expected: tuple[float, float], got: tuple[float, float]) -> Check:
    """The largest h₂ and where it is, against a closed form."""
    agrees = all(abs(a - b) < 1e-4 for a, b in zip(expected, got, strict=True))
    written = [f"{second:.4f} at h₁ = {first:.4f}" for first, second in (expected, got)]
    return Check.of(what, paper, written[0], written[1], agrees)


def tight_region(region: Region) -> Region:
    """The tight region of the very steps that a region speaks about, which take h₁ in as many parts.

    Example:
        >>> from dynablocks.switching import PaperFlexibleRegion
        >>> tight_region(PaperFlexibleRegion(0.5))
        TightHalvesRegion(slope=0.5, substeps=1)
    """
    name = "tight-halves" if region.contractive_parts == 2 else "tight"
    return REGIONS[name](region.slope, region.substeps)


def size_columns(region: Region) -> dict[str, Any]:
    """A region's columns in the table that need no measurement."""
    first, second = peak(region)
    whole = area(tight_region(region))
    # An exact flow has no largest step: its area is that of the range it is cut to.
    share = None if isinstance(region, ExactFlowRegion) else f"{100 * area(region) / whole:.1f} %"
    return {
        "peak": f"{second:.4f} at h₁ = {first:.3g}",
        "area": f"{area(region):.4f}",
        "share": share,
    }


def measured_columns(region: Region, cell: MonteCarloCell, result: dict[str, Any] | None) -> dict[str, Any]:
    """A region's columns in the table that come from measured pairs."""
    if result is None:
        return dict.fromkeys(("pairs", "violations", "largest", "covered"), "not run")
    inside = [constant for first, second, constant in measured(result) if region.contains(first, second)]
    valid = [pair[:2] for pair in measured(result)[: cell.pairs] if pair[2] <= 1 + TOLERANCE]
    covered = sum(region.contains(*pair) for pair in valid)
    return {
        "pairs": len(inside),
        "violations": len(violations(region, result)),
        "largest": f"1 {max(inside) - 1:+.1e}",
        "covered": f"{100 * covered / max(len(valid), 1):.1f} % ({covered} of {len(valid)})",
    }


def violation_check(panel: Panel, name: str, region: Region, result: dict[str, Any] | None) -> Check:
    """No pair inside the region has a measured constant above 1."""
    what = f"{panel.step}: violations inside the region {name}"
    if result is None:
        return Check.of(what, "non-expansive", "0", None, None)
    count = len(violations(region, result))
    return Check.of(what, "non-expansive", "0", str(count), count == 0)


def left_out_check(panel: Panel, name: str, region: Region, result: dict[str, Any] | None, *, loose: bool) -> Check:
    """How many pairs with h₂ >= 0 outside the region expand for no weights: some if loose, none if sharp."""
    what, expected = f"{panel.step}: valid pairs with h₂ ≥ 0 that {name} leaves out", "some" if loose else "0"
    if result is None:
        return Check.of(what, "", expected, None, None)
    count = len(left_out(region, result))
    return Check.of(what, "", expected, str(count), (count > 0) == loose)


def left_out(region: Region, result: dict[str, Any]) -> list[tuple[float, float]]:
    """The measured pairs with h₂ >= 0 outside the region whose largest constant is at most 1."""
    return [
        (first, second)
        for first, second, constant in measured(result)
        if constant <= 1 + TOLERANCE and second >= 0 and not region.contains(first, second)
    ]


@styled
def regions_figure(
    paper_region: str,
    panels: Sequence[Panel],
    results: Sequence[dict[str, Any] | None],
    *,
    watermark: str | None = None,
) -> Figure:
    """A panel for each step: the paper's region filled, the tight and exact-flow ones outlined, and measured pairs.

    Args:
        paper_region: its name in ``REGIONS``.
        panels: what to draw.
        results: of each panel's :class:`MonteCarloCell`; ``None`` draws no points.
        watermark: a text across the figure.

    Example:
        >>> panel = Panel("Euler", ("tight",), "prescribed", 1, (0.0, 2.0, 0.0, 2.0))
        >>> len(regions_figure("paper-prescribed", [panel], [None]).axes)
        1
    """
    columns = 2 if len(panels) == 4 else len(panels)
    rows = -(-len(panels) // columns)
    figure = new_figure(7.4, 0.6 + (2.9 if columns == 3 else 2.8 * rows), watermark)
    for axes, panel, result in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, results, strict=True):
        _draw_panel(axes, paper_region, panel, result)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", frameon=False, fontsize=8.5, ncols=3)
    return figure


def _draw_panel(axes: Axes, paper_region: str, panel: Panel, result: dict[str, Any] | None) -> None:
    left, right, bottom, top = panel.window
    substeps = 1 if paper_region == "paper-flexible" else panel.substeps
    paper = REGIONS[paper_region](SLOPE, substeps)
    axes.fill(*_outline(paper), color=GREEN, alpha=0.45, linewidth=0, label="the paper's region", zorder=1.5)
    tight = next((name for name in panel.regions if name.startswith("tight")), "tight")
    for name, colour, label in ((tight, INK, "tight bound"), ("exact", PURPLE, "exact flow")):
        dashes = "-" if name in panel.regions else (0, (1, 1.5))
        x, y = _outline(REGIONS[name](SLOPE, substeps))
        axes.plot([*x, x[0]], [*y, y[0]], color=colour, linestyle=dashes, linewidth=1.4, label=label, zorder=3)
    for colour, marker, label, above in (
        (BLUE, "o", "measured constant at most 1", False),
        (VERMILION, "x", "above 1", True),
    ):
        pairs = [] if result is None else [p[:2] for p in measured(result) if (p[2] > 1 + TOLERANCE) == above]
        across, up = [first for first, _ in pairs], [second for _, second in pairs]
        axes.scatter(across, up, s=5, color=colour, marker=marker, linewidths=0.6, alpha=0.7, label=label, zorder=2)
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="h₁, contractive", ylabel="h₂, expansive")
    axes.set_title(panel.step if result is not None else f"{panel.step} (points: not run)", fontsize=9)


def _outline(region: Region) -> tuple[list[float], list[float]]:
    """The corners (h₁, h₂) of the region, from the lower left one along the upper boundary to the lower right one."""
    low, high = region.first_range
    upper = region.boundary(401).tolist()
    corners = [(low, region.second_low), *((x, y) for x, y in upper), (high, region.second_low)]
    x, y = zip(*corners, strict=True)
    return list(x), list(y)
