"""One fit: its settings, what is decided from the data, and its stages, which go on from their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.errors import BadData, InvalidArgument, require_choice, require_range, require_whole
from dynablocks.fitting.objective import Objective, Residuals
from dynablocks.fitting.regression import FitHistory, FitRecord, fit
from dynablocks.fitting.rollout import NOISE_DIFFERENCES, Noise, Windows, estimated_noise, rollout_residuals, windows
from dynablocks.fitting.samples import MOST_SAMPLES, Parts, fitted_parts, split, thinned
from dynablocks.fitting.surrogates import (
    LEARNED_ENERGY,
    SURROGATES,
    FlowMap,
    Structure,
    build,
    departures,
    training_residuals,
)
from dynablocks.properties import LinearInvariant, Property
from dynablocks.reporting.words import several
from dynablocks.run_files import CHECKPOINT
from dynablocks.seeding import seeded

NOISY = 1e-4
NOISE = ("auto", "yes", "no")
COUNTS: dict[str, tuple[int, int | None]] = {
    "width": (1, 4096),
    "seed": (0, 2**63 - 1),
    "adam_steps": (0, None),
    "finish_steps": (0, None),
    "substeps": (1, 1000),
    "horizon": (1, 1000),
}
"""The whole numbers among the settings of a fit, each with the least and the greatest."""
CHOSEN = ("substeps", "horizon")
"""Those that the data decides where they are ``None``."""

PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {"width": 6, "adam_steps": 40, "finish_steps": 4, "max_minutes": None},
    "cpu": {"width": 12, "adam_steps": 800, "finish_steps": 150, "max_minutes": 3.0},
    "long": {"width": 32, "adam_steps": 4000, "finish_steps": 1000, "max_minutes": 60.0},
}


@dataclass(frozen=True)
class FitConfig:
    """What decides a fit; ``None`` of ``substeps`` and ``horizon`` is chosen from the data.

    Args:
        preserve: a name of :data:`SURROGATES`.
        weights, odd, separable, width, substeps: as in :class:`Structure`.
        noise: whether to expect measurement noise: ``auto``, ``yes``, ``no``.
        horizon: how many steps in a row are compared with the data.
        adam_steps, finish_steps: of a stage.
        max_minutes: of wall clock for everything.
        seed: of the split, the start and the batches.
        test: the labels of the trajectories that are held out as the test, as all of one experiment; ``None``: drawn.
    """

    preserve: str = "none"
    weights: tuple[float, ...] | None = None
    odd: bool = False
    separable: bool = True
    width: int = 12
    substeps: int | None = None
    noise: str = "auto"
    horizon: int | None = None
    adam_steps: int = 800
    finish_steps: int = 150
    max_minutes: float | None = 3.0
    seed: int = 0
    test: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        SURROGATES.get_known(self.preserve)
        require_choice("noise", self.noise, NOISE)
        for name, (low, high) in COUNTS.items():
            value = getattr(self, name)
            if value is not None or name not in CHOSEN:
                object.__setattr__(self, name, require_whole(name, value, low, high))  # of NumPy's integers Python's
        if self.max_minutes is not None:
            require_range("max_minutes", self.max_minutes, 0, open_low=True)
        if self.test is not None:
            labels = tuple(self.test) if isinstance(self.test, list | tuple) else ()
            if not labels or not all(isinstance(label, str) for label in labels):
                raise InvalidArgument(f"test is {self.test!r}; labels of trajectories are needed, as ('3', '7').")
            object.__setattr__(self, "test", labels)


@dataclass(frozen=True)
class Plan:
    """What will be fitted and how, decided from the data before anything is computed.

    ``weights``: of the mass, as they were given; the structure has them over a power of two.
    ``noise_untold``: the trajectories are too short to tell noise from curvature, so that they are taken for clean.
    ``cut_to_one``: they are noisy, and too few have several steps in a row, so that single ones are fitted.
    ``unsolved``: of a finished fit, so many steps in a row were meant to be compared, and were not solved.
    """

    structure: Structure
    parts: Parts
    noise: Noise
    horizon: int
    weights: tuple[float, ...] | None = None
    noise_untold: bool = False
    cut_to_one: bool = False
    unsolved: int | None = None

    def told(self, kept: Property) -> str:
        """A property of the surrogate in words, that of a mass with the weights that were given."""
        if isinstance(kept, LinearInvariant) and self.weights is not None and set(self.weights) != {1.0}:
            kept = replace(kept, weights=tuple(map(float, self.weights)))
        return str(kept)


def plan(data: Trajectories | Pairs, config: FitConfig) -> Plan:
    """The split of the data, the surrogate's structure, and the horizon of the training.

    Raises:
        BadData: too little data, or states that the structure cannot have.
        InvalidArgument: the structure does not fit the columns, or the labels of the test are not those of the data.
    """
    parts = split(data, config.seed, config.test)
    for part in (data, parts.train):
        _require_states(torch.cat(part.pairs()[:2]), data.names)
    if config.preserve == "positive":
        _require_nonnegative(data)
    step = float(parts.train.pairs()[2].median())
    train, held = fitted_parts(parts, step)
    x, y, _ = train.pairs()
    noise, untold = _noise(train, config)
    noisy = config.noise == "yes" or (config.noise == "auto" and noise.level > NOISY)
    horizon, wanted = 1, config.horizon or (10 if noisy else 1)
    if isinstance(train, Trajectories):
        fitted = [part for part in (train, held) if isinstance(part, Trajectories)]
        horizon = longest_horizon(fitted, wanted)
        if config.noise == "yes" and horizon == 1 and config.horizon != 1:
            raise InvalidArgument(
                "--noise yes fits several steps in a row; too many trajectories of the training or validation part are "
                "too short for that: give longer ones, or leave it out."
            )
    elif config.noise == "yes":
        raise InvalidArgument(
            "--noise yes fits several steps in a row, which a file of pairs does not hold; give trajectories, or leave "
            "it out."
        )
    if config.horizon is not None and horizon < config.horizon:
        raise InvalidArgument(
            f"horizon is {config.horizon}; only runs of up to {several(horizon, 'step')} make up half of each part of "
            "the data: give at most that, or longer trajectories."
        )
    structure = Structure(
        preserve=config.preserve,
        names=data.names,
        width=config.width,
        weights=_of_size_one(config.weights),
        odd=config.odd,
        separable=config.separable,
        substeps=config.substeps or _substeps(x, y, config, 0.3 if noisy else 0.1),
        step=step,
        linear=config.preserve in LEARNED_ENERGY and not config.odd,
    )
    with seeded(config.seed):
        build(structure)
    return Plan(structure, parts, noise, horizon, config.weights, untold, noisy and horizon == 1 < wanted)


def _of_size_one(weights: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """The weights over a power of two, the largest in [1, 2), which keeps the same sum and rounds none but tiny ones.

    The field is linear in its weights, so that a common factor would scale its start and every step of Adam. What no
    field takes is left as it is, for the error to name.
    """
    if weights is None or not all(math.isfinite(w) and w != 0 for w in weights):
        return weights
    _, exponent = math.frexp(max(map(abs, weights), default=1.0))
    scaled = tuple(math.ldexp(w, 1 - exponent) for w in weights)
    return scaled if all(scaled) else weights


def _noise(train: Trajectories | Pairs, config: FitConfig) -> tuple[Noise, bool]:
    """The estimate of the noise, and whether it may as well be curvature: then it is left out, as 0.

    Short trajectories have differences of low order alone, which keep some of any curve.
    """
    none = Noise((0.0,) * len(train.names))
    if config.noise == "no" or not isinstance(train, Trajectories):
        return none, False
    noise, longest = estimated_noise(train), max(len(times) for times in train.times)
    untold = config.noise == "auto" and noise.level > NOISY and longest <= NOISE_DIFFERENCES[-1]
    return (none if untold else noise), untold


def longest_horizon(parts: Sequence[Trajectories], wanted: int) -> int:
    """At most ``wanted`` steps in a row, so that trajectories which have them hold half of the steps of every part."""
    for horizon in range(wanted, 1, -1):
        lengths = [[len(times) - 1 for times in part.times] for part in parts]
        if all(2 * sum(steps for steps in each if steps >= horizon) >= sum(each) for each in lengths):
            return horizon
    return 1


def _require_states(states: Tensor, names: tuple[str, ...]) -> None:
    if bool((states == states[0]).all()):
        raise BadData("every state to learn from is the same; there is no motion in the file, or in its training part.")
    largest = states.abs().amax(0)
    if not math.isfinite(float((2 * largest).square().sum() * len(states))):
        place = int(largest.argmax())
        raise BadData(
            f"column {names[place]!r} reaches {float(largest[place]):.3g}, too large to be squared; "
            "scale the columns, and leave out rows with fill values."
        )


def _require_nonnegative(data: Trajectories | Pairs) -> None:
    for k, states in enumerate((data.x, data.y) if isinstance(data, Pairs) else data.states):
        if not bool((states < 0).any()):
            continue
        row, column = (states < 0).nonzero()[0].tolist()
        if isinstance(data, Pairs):
            place = f"{('in', 'out')[k]}_{data.names[column]} of pair {row + 1}"
        else:
            place = f"trajectory {data.label(k)!r} at t = {float(data.times[k][row]):.12g}"
        raise BadData(
            f"column {data.names[column]!r} has negative values ({float(states[row, column]):.6g} in {place}); "
            "--preserve positive needs states >= 0: put 0 there if that is noise, or take another structure."
        )


def _substeps(x: Tensor, y: Tensor, config: FitConfig, most: float) -> int:
    """So many that a substep moves the state by at most this share of its size; one where an equation is solved."""
    if config.preserve == "energy" or (config.preserve == "symplectic" and not config.separable):
        return 1
    size = float(departures(x, y, x.mean(0)).square().sum(1).mean().sqrt())
    moved = float((y - x).norm(dim=1).quantile(0.95)) if len(x) < 1_000_000 else float((y - x).norm(dim=1).max())
    return min(10, max(1, math.ceil(moved / (most * size)))) if size > 0 else 1


@dataclass
class Fitted:
    """A finished fit: the surrogate, its plan, the history of each stage."""

    flow: FlowMap
    plan: Plan
    stages: dict[str, FitHistory]

    @property
    def history(self) -> FitHistory:
        return list(self.stages.values())[-1]

    def curve(self) -> list[tuple[str, FitRecord]]:
        """All records with the names of their stages."""
        return [(name, record) for name, history in self.stages.items() for record in history.records]


def run_stages(
    planned: Plan, config: FitConfig, directory: Path | None = None, say: Callable[[str], object] = lambda text: None
) -> Fitted:
    """Fit one step at a time, then, where the data is noisy, several steps in a row; goes on from its checkpoints."""
    with seeded(config.seed):
        flow = build(planned.structure)
    train, held = fitted_parts(planned.parts, planned.structure.step)
    flow.adopt_units(*train.pairs())
    stage = partial(_stage, flow, config=config, directory=directory, say=say)
    long = planned.horizon > 1
    single = training_residuals(flow), (_single_steps(train), None if held is None else _single_steps(held))
    first = stage(
        "one step",
        *single,
        0.3 if long else 1.0,
        adam_steps=config.adam_steps,
        finish="lbfgs" if long else "levenberg-marquardt",
        finish_steps=min(config.finish_steps, 100) if long else config.finish_steps,
    )
    stages = {"one step": first}
    horizon = _solved_horizon(flow, train, planned.horizon) if long else 1
    if horizon < planned.horizon:
        planned = replace(planned, horizon=horizon, unsolved=planned.horizon)
    if horizon > 1:
        name = f"{horizon} steps"
        runs, later = (_runs(part, horizon) for part in (train, held))
        assert runs is not None  # several steps in a row are planned of trajectories alone
        if len(runs[0]) > MOST_SAMPLES:
            say(f"{name}: {MOST_SAMPLES:,} of {len(runs[0]):,} runs are used, evenly spaced")
        stages[name] = stage(
            name,
            rollout_residuals,
            (thinned(runs, MOST_SAMPLES), None if later is None else thinned(later, MOST_SAMPLES)),
            0.7,
            adam_steps=config.adam_steps // 4,
            lr=2e-3,
            finish_steps=config.finish_steps,
        )
    elif planned.unsolved:
        # The first stage was a short one, which prepares the second.
        stages["single steps"] = stage("single steps", *single, 0.7, adam_steps=0, finish_steps=config.finish_steps)
    return Fitted(flow.eval(), planned, stages)


def _stage(
    flow: FlowMap,
    name: str,
    residuals: Residuals,
    samples: tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None],
    share: float,
    *,
    config: FitConfig,
    directory: Path | None,
    say: Callable[[str], object],
    **settings: Any,
) -> FitHistory:
    """Fit (x, y, h) of the training, with those of the validation, in this share of the time; from its checkpoint on.

    ``settings`` are those of :func:`fit` in which stages differ.
    """
    (x, y, h), validation = samples
    checkpoint = None if directory is None else directory / CHECKPOINT / f"{name.replace(' ', '-')}.pt"
    if checkpoint is not None and checkpoint.exists():
        say(f"{name}: going on from {checkpoint}")
    history = fit(
        flow,
        x,
        y,
        step=h,
        residuals=residuals,
        validation=validation,
        max_seconds=None if config.max_minutes is None else share * (60 * config.max_minutes),
        checkpoint=checkpoint,
        seed=config.seed,
        label=f"fitting {name}",
        **settings,
    )
    say(f"{name}: loss {history.loss:.3g} after {history.seconds:.0f} s; {history.stopped}")
    return history


def _single_steps(data: Trajectories | Pairs) -> tuple[Tensor, ...]:
    """(x, y, h) of single steps, of as many as a stage takes; h is a column."""
    x, y, h = data.pairs()
    return thinned((x, y, h[:, None]), MOST_SAMPLES)


def _solved_horizon(flow: FlowMap, train: Trajectories | Pairs, wanted: int) -> int:
    """Half of the wanted steps in a row, and half of these, until the present map has them from every start.

    Single steps may be fitted without solving their equation, which may have no solution from where a step has led.
    """
    horizon = wanted
    if flow.method.explicit:
        return horizon
    while horizon > 1:
        runs = _runs(train, horizon)
        assert runs is not None
        x, y, h = thinned(runs, MOST_SAMPLES)
        if math.isfinite(Objective(flow, (x, y, h), rollout_residuals).value()):
            return horizon
        horizon //= 2
    return 1


def _runs(data: Trajectories | Pairs | None, horizon: int) -> Windows | None:
    """So many steps in a row of trajectories, runs that overlap by half; ``None`` of other data."""
    return windows(data, horizon, max(1, horizon // 2)) if isinstance(data, Trajectories) else None
