"""The figures of a fit's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynablocks.fitting.samples import thinned
from dynablocks.reporting.figures import BLUE, INK, SERIES, VERMILION, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dynablocks.fitting.regression import FitRecord
    from dynablocks.fitting.rollout import Drift, Rollout

MOST_PANELS = 6
MOST_POINTS = 2001
"""Of a curve: what a figure cannot show would make the page large and slow. The long run of a report has so many."""
MOST_CURVES = 200
LARGEST = 1e300
"""Values are drawn as if they were no larger: the length of a linear axis must be a number."""


def _drawn(across: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """The points of a curve to draw: all of a short one, evenly spaced ones of a long one."""
    return thinned((across, up), MOST_POINTS)


def _drawn_states(across: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """The same on linear axes, for states that may grow to the end of the range of numbers."""
    return _drawn(across.clamp(-LARGEST, LARGEST), up.clamp(-LARGEST, LARGEST))


@styled
def loss_figure(curve: Sequence[tuple[str, FitRecord]]) -> Figure:
    """Training and validation error over time, each stage with its own lines."""
    figure = new_figure(7.4, 3.0, None)
    axes = figure.add_subplot()
    offset = 0.0
    for k, stage in enumerate(dict.fromkeys(name for name, _ in curve)):
        records = [record for name, record in curve if name == stage]
        seconds = [offset + record.seconds for record in records]
        colour = SERIES[k % len(SERIES)]
        axes.plot(seconds, [max(2 * r.loss, 1e-40) for r in records], color=colour, label=f"{stage}, training")
        held = [(s, 2 * r.validation) for s, r in zip(seconds, records, strict=True) if r.validation is not None]
        if held:
            dashes = (0, (4, 1.6))
            axes.plot(*zip(*held, strict=True), color=colour, linestyle=dashes, label=f"{stage}, validation")
        finish = next((s for s, r in zip(seconds, records, strict=True) if r.phase not in ("start", "adam")), None)
        if finish is not None:
            axes.axvline(finish, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        offset = seconds[-1] if seconds else offset
    axes.set(yscale="log", xlabel="seconds", title="mean squared residual, in units of the fit")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


@styled
def component_figure(rollout: Rollout, names: Sequence[str]) -> Figure:
    """Every component over time: measured dots, the prediction from the first state as a line."""
    shown = min(len(names), MOST_PANELS)
    figure = new_figure(7.4, 0.6 + 1.3 * shown, None)
    panels = figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]
    for k, axes in enumerate(panels):
        measured, predicted = rollout.measured[:, k], rollout.predicted[:, k]
        axes.plot(*_drawn(rollout.times, measured), "o", color=BLUE, markersize=2.5, label="measured")
        axes.plot(*_drawn_states(rollout.times[: len(predicted)], predicted), color=VERMILION, label="predicted")
        axes.set(title=names[k].replace("$", r"\$"))
    panels[0].legend(frameon=False, fontsize=8.5, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    panels[-1].set(xlabel="time")
    return figure


@styled
def portrait_figure(rollouts: Sequence[Rollout], states: Tensor, names: Sequence[str]) -> Figure:
    """The first two components against each other: data and predictions, and a long run."""
    figure = new_figure(7.4, 3.6, None)
    left, right = figure.subplots(1, 2)
    for k, rollout in enumerate(rollouts[:MOST_PANELS]):
        labels = ("measured", "predicted") if k == 0 else (None, None)
        left.plot(*_drawn(*rollout.measured[:, :2].T), "o", color=BLUE, markersize=2, label=labels[0])
        left.plot(*_drawn_states(*rollout.predicted[:, :2].T), color=VERMILION, linewidth=1.2, label=labels[1])
    right.plot(*_drawn_states(*states[:, :2].T), ".", color=VERMILION, markersize=1.2)
    left.legend(frameon=False, fontsize=8.5)
    across, up = (name.replace("$", r"\$") for name in names[:2])
    left.set(title="test data", xlabel=across, ylabel=up)
    right.set(title=f"{len(states) - 1} steps of the surrogate", xlabel=across, ylabel=up)
    return figure


@styled
def error_figure(rollouts: Sequence[Rollout]) -> Figure:
    """Root mean squared error of every test rollout over time, of many some, and the median of all.

    Errors below 1e-17 of the largest measured value are drawn there, so that the unit of the data does not matter.
    """
    figure = new_figure(7.4, 2.8, None)
    axes = figure.add_subplot()
    least = 1e-17 * (max((float(r.measured.abs().max()) for r in rollouts), default=0.0) or 1.0)
    for k, rollout in enumerate(rollouts[:: max(1, math.ceil(len(rollouts) / MOST_CURVES))]):
        error = rollout.errors.sqrt()[1:]
        times = (rollout.times - rollout.times[0])[1 : len(error) + 1]
        label = "a test trajectory" if k == 0 else None
        axes.plot(*_drawn(times, error.clamp_min(least)), color=BLUE, alpha=0.5, linewidth=1.2, label=label)
    times, median = median_error(rollouts)
    if len(rollouts) > 2 and len(times):
        axes.plot(*_drawn(times, median.clamp_min(least)), color=VERMILION, label="median")
    axes.set(yscale="log", xlabel="time since the start of the prediction", title="root mean squared error")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def median_error(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    """Times since the start, and the median of the errors (root mean squared) there, as far as all rollouts go.

    A rollout's error between its samples is interpolated linearly.
    """
    rollouts = [r for r in rollouts if len(r.predicted) > 1]
    if not rollouts:
        return torch.zeros(0), torch.zeros(0)
    own = [(r.times - r.times[0])[: len(r.predicted)] for r in rollouts]
    end = min(float(times[-1]) for times in own)
    times = max(own, key=lambda t: int((t <= end).sum()))
    times = times[(times > 0) & (times <= end)]
    errors = [np.interp(times, t, r.errors.sqrt()) for t, r in zip(own, rollouts, strict=True)]
    return times, torch.from_numpy(np.median(errors, axis=0))


@styled
def drift_figure(drifts: Sequence[Drift]) -> Figure:
    """What is kept, along a long run."""
    figure = new_figure(7.4, 2.8, None)
    for axes, drift in zip(figure.subplots(1, len(drifts), squeeze=False)[0], drifts, strict=True):
        axes.plot(*_drawn(drift.times, drift.values.clamp_min(1e-18)), ".", color=BLUE, markersize=2)
        axes.set(yscale="log", xlabel="time", title=drift.what)
    return figure
