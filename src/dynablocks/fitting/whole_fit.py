"""A whole fit of measured states from Python: what ``dynablocks fit`` does between its file and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.errors import InvalidArgument
from dynablocks.fitting.job import FitConfig, plan, run_stages
from dynablocks.fitting.surrogates import FlowMap


@dataclass(frozen=True)
class WholeFit:
    """A surrogate of measured states, and what was measured of it.

    Attributes:
        flow: the surrogate, in float64.
        metrics: what ``dynablocks fit`` writes into ``metrics.json``.
        warnings: what should make a reader doubt the surrogate, a sentence each.
    """

    flow: FlowMap
    metrics: dict[str, Any]
    warnings: list[str]


def fit_trajectories(data: Trajectories | Pairs, config: FitConfig) -> WholeFit:
    """Fit a surrogate to measured states as ``dynablocks fit`` does: parts held out, units, noise, stages, measures.

    A test part is held out, and a validation that chooses the parameters; steps across gaps are left out; noisy
    trajectories are compared over several steps in a row after a stage of single ones. Equal arguments give equal
    results on one machine, unless ``max_minutes`` cuts the fit short. Nothing is written: :func:`save_fit` stores the
    surrogate; report and checkpoints are those of the command.

    Args:
        data: trajectories or pairs, such as :func:`dynablocks.data.read_dynamics` reads.
        config: what decides the fit.

    Raises:
        BadData: too little data, or states that the structure cannot have.
        InvalidArgument: no such data, or a structure that does not fit the columns.

    Example:
        >>> from dynablocks.data import generate
        >>> data = generate("sir", trajectories=4, steps=20)
        >>> found = fit_trajectories(data, FitConfig("mass", width=2, adam_steps=5, finish_steps=1))
        >>> found.flow.structure.names, found.metrics["verified"]
        (('S', 'I', 'R'), True)
    """
    from dynablocks.fitting.report import long_run, measure, warnings

    if not isinstance(data, Trajectories | Pairs):
        raise InvalidArgument(
            f"data is a {type(data).__name__}; give Trajectories or Pairs, as dynablocks.data.read_dynamics reads them."
        )
    fitted = run_stages(plan(data, config), config)
    metrics = measure(fitted, long_run(config)).metrics
    return WholeFit(fitted.flow, metrics, warnings(metrics))
