"""One fit from data to files: settings, stages, checkpoints, the saved surrogate."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.errors import BadCheckpoint, BadData, DynablocksError, InvalidArgument, require_choice, require_range
from dynablocks.files import plain_data, tensor_digest, write_atomically, write_text
from dynablocks.fitting.regression import FitHistory, FitRecord, fit
from dynablocks.fitting.rollout import GAP, NOISE_DIFFERENCES, Windows, noise_level, rollout_residuals, windows
from dynablocks.fitting.surrogates import (
    LEARNED_ENERGY,
    SURROGATES,
    FlowMap,
    Structure,
    build,
    departures,
    training_residuals,
)
from dynablocks.run_files import CHECKPOINT, CONFIG, EXAMPLE_DATA, METRICS, PREDICTIONS, REPORT, VERIFICATION, WEIGHTS

NOISY = 1e-4
MOST_SAMPLES = 20_000
"""A stage of a fit takes at most so many samples (steps, or runs of several steps), evenly spaced, of the training and
of the validation."""
NOISE = ("auto", "yes", "no")
HARMLESS = ("max_minutes",)
DIGEST = "digest"
"""Under this name the file of the weights says what they are, so that a flipped bit is seen."""

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

    def __post_init__(self) -> None:
        SURROGATES.get_known(self.preserve)
        require_choice("noise", self.noise, NOISE)
        require_range("width", self.width, 1, 4096)
        require_range("seed", self.seed, 0, 2**63 - 1)
        require_range("adam_steps", self.adam_steps, 0)
        require_range("finish_steps", self.finish_steps, 0)
        if self.substeps is not None:
            require_range("substeps", self.substeps, 1, 1000)
        if self.horizon is not None:
            require_range("horizon", self.horizon, 1, 1000)
        if self.max_minutes is not None:
            require_range("max_minutes", self.max_minutes, 0, open_low=True)


@dataclass(frozen=True)
class Parts:
    """Training, validation and test data; there may be too little for a validation."""

    train: Trajectories | Pairs
    validation: Trajectories | Pairs | None
    test: Trajectories | Pairs


@dataclass(frozen=True)
class Plan:
    """What will be fitted and how, decided from the data before anything is computed.

    ``noise_untold``: the trajectories are too short to tell noise from curvature, so that they are taken for clean.
    """

    structure: Structure
    parts: Parts
    noise: float
    horizon: int
    noise_untold: bool = False


def plan(data: Trajectories | Pairs, config: FitConfig) -> Plan:
    """The split of the data, the surrogate's structure, and the horizon of the training.

    Raises:
        BadData: too little data, or states that the structure cannot have.
        InvalidArgument: the structure does not fit the columns.
    """
    parts = split(data, config.seed)
    for part in (data, parts.train):
        _require_states(torch.cat(pairs_of(part)[:2]), data.names)
    if config.preserve == "positive":
        _require_nonnegative(data)
    step = float(pairs_of(parts.train)[2].median())
    train, held = _fitted_parts(parts, step)
    x, y, _ = pairs_of(train)
    noise, untold = _noise(train, config)
    noisy = config.noise == "yes" or (config.noise == "auto" and noise > NOISY)
    horizon = 1
    if isinstance(train, Trajectories):
        fitted = [part for part in (train, held) if isinstance(part, Trajectories)]
        horizon = longest_horizon(fitted, config.horizon or (10 if noisy else 1))
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
    structure = Structure(
        preserve=config.preserve,
        names=data.names,
        width=config.width,
        weights=config.weights,
        odd=config.odd,
        separable=config.separable,
        substeps=config.substeps or _substeps(x, y, config, 0.3 if noisy else 0.1),
        step=step,
        linear=config.preserve in LEARNED_ENERGY and not config.odd,
    )
    with torch.random.fork_rng():
        build(structure)
    return Plan(structure, parts, noise, horizon, untold)


def _noise(train: Trajectories | Pairs, config: FitConfig) -> tuple[float, bool]:
    """The estimate of the noise, and whether it may as well be curvature: then it is left out, as 0.

    Short trajectories have differences of low order alone, which keep some of any curve.
    """
    if config.noise == "no" or not isinstance(train, Trajectories):
        return 0.0, False
    noise, longest = noise_level(train), max(len(times) for times in train.times)
    untold = config.noise == "auto" and noise > NOISY and longest <= NOISE_DIFFERENCES[-1]
    return (0.0 if untold else noise), untold


def longest_horizon(parts: Sequence[Trajectories], wanted: int) -> int:
    """At most ``wanted`` steps in a row, so that trajectories which have them hold half of the steps of every part."""
    for horizon in range(wanted, 1, -1):
        lengths = [[len(times) - 1 for times in part.times] for part in parts]
        if all(2 * sum(steps for steps in each if steps >= horizon) >= sum(each) for each in lengths):
            return horizon
    return 1


def without_gaps(data: Trajectories | Pairs, longest: float) -> Trajectories | Pairs | None:
    """The data without steps that take longer, trajectories in pieces; all of it where there are none.

    Returns:
        ``None`` where no step is left.

    Example:
        >>> t = torch.tensor([0.0, 1.0, 9.0, 10.0, 11.0, 30.0], dtype=torch.float64)
        >>> [piece.tolist() for piece in without_gaps(Trajectories((t,), (t[:, None],), ("q",)), 5.0).times]
        [[0.0, 1.0], [9.0, 10.0, 11.0]]
    """
    short = pairs_of(data)[2] <= longest
    if bool(short.all()):
        return data
    if not bool(short.any()):
        return None
    if isinstance(data, Pairs):
        return Pairs(data.x[short], data.y[short], data.h[short], data.names)
    times: list[Tensor] = []
    states: list[Tensor] = []
    for t, x in zip(data.times, data.states, strict=True):
        starts = [place + 1 for place, h in enumerate(t.diff().tolist()) if h > longest]
        times.extend(piece for piece in torch.tensor_split(t, starts) if len(piece) > 1)
        states.extend(piece for piece in torch.tensor_split(x, starts) if len(piece) > 1)
    return Trajectories(tuple(times), tuple(states), data.names)


def usual_steps(data: Trajectories | Pairs, usual: float) -> Trajectories | Pairs:
    """The data without its gaps, of which errors of one step are measured; all of it where it has nothing else."""
    kept = without_gaps(data, GAP * usual)
    return data if kept is None else kept


def _fitted_parts(parts: Parts, step: float) -> tuple[Trajectories | Pairs, Trajectories | Pairs | None]:
    """What is fitted of the training part and of the validation; half of the steps are no longer than ``step``."""
    train = without_gaps(parts.train, GAP * step)
    assert train is not None
    return train, None if parts.validation is None else without_gaps(parts.validation, GAP * step)


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
            place = f"trajectory {data.label(k)!r} at t = {float(data.times[k][row]):.6g}"
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


def split(data: Trajectories | Pairs, seed: int) -> Parts:
    """A fifth for the test, a fifth of the rest for validation: trajectories, the end of a single one, or pairs."""
    if isinstance(data, Pairs):
        return _split_pairs(data, seed)
    rest, test = data.split(0.2, seed)
    enough = len(rest) > 1 or len(rest.times[0]) >= 8
    train, validation = rest.split(0.2, seed) if enough else (rest, None)
    return Parts(train, validation, test)


def _split_pairs(data: Pairs, seed: int) -> Parts:
    if len(data) < 3:
        raise BadData(f"the file has {len(data)} pairs; at least 3 are needed to fit and to test.")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    test = max(1, len(data) // 5)
    held = (len(data) - test) // 5
    cuts = (order[:test], order[test : test + held], order[test + held :])
    found, validation, train = (Pairs(data.x[rows], data.y[rows], data.h[rows], data.names) for rows in cuts)
    return Parts(train, validation if held else None, found)


def pairs_of(data: Trajectories | Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, h) of all single steps."""
    return data.pairs() if isinstance(data, Trajectories) else (data.x, data.y, data.h)


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
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        flow = build(planned.structure)
    train, held = _fitted_parts(planned.parts, planned.structure.step)
    x, y, h = pairs_of(train)
    flow.adopt_units(x, y, h)
    long = planned.horizon > 1
    minutes = math.inf if config.max_minutes is None else config.max_minutes
    budget = None if math.isinf(minutes) else 60 * minutes

    def stage(name: str, residuals: Any, parts: tuple[Any, Any], share: float, **settings: Any) -> FitHistory:
        data, validation = parts
        checkpoint = None if directory is None else directory / CHECKPOINT / f"{name.replace(' ', '-')}.pt"
        if checkpoint is not None and checkpoint.exists():
            say(f"{name}: going on from {checkpoint}")
        return fit(
            flow,
            data[0],
            data[1],
            step=data[2],
            residuals=residuals,
            validation=validation,
            max_seconds=None if budget is None else share * budget,
            checkpoint=checkpoint,
            seed=config.seed,
            label=f"fitting {name}",
            **settings,
        )

    single = (_single_steps(train), None if held is None else _single_steps(held))
    residuals = training_residuals(flow)
    first = stage(
        "one step",
        residuals,
        single,
        0.3 if long else 1.0,
        adam_steps=config.adam_steps,
        finish="lbfgs" if long else "levenberg-marquardt",
        finish_steps=min(config.finish_steps, 100) if long else config.finish_steps,
    )
    stages = {"one step": first}
    say(f"one step: loss {first.loss:.3g} after {first.seconds:.0f} s; {first.stopped}")
    if long:
        runs, later = (_runs(part, planned.horizon) for part in (train, held))
        assert runs is not None  # several steps in a row are planned of trajectories alone
        if len(runs[0]) > MOST_SAMPLES:
            say(f"{planned.horizon} steps: {MOST_SAMPLES:,} of {len(runs[0]):,} runs are used, evenly spaced")
        rolled = stage(
            f"{planned.horizon} steps",
            rollout_residuals,
            (thinned(runs, MOST_SAMPLES), None if later is None else thinned(later, MOST_SAMPLES)),
            0.7,
            adam_steps=config.adam_steps // 4,
            lr=2e-3,
            finish_steps=config.finish_steps,
        )
        stages[f"{planned.horizon} steps"] = rolled
        say(f"{planned.horizon} steps: loss {rolled.loss:.3g} after {rolled.seconds:.0f} s; {rolled.stopped}")
    return Fitted(flow.eval(), planned, stages)


def thinned(data: tuple[Tensor, ...], most: int) -> tuple[Tensor, ...]:
    """At most so many rows of each, evenly spaced, the first and the last among them.

    Example:
        >>> thinned((torch.arange(10),), 4)
        (tensor([0, 3, 6, 9]),)
    """
    rows = len(data[0])
    if rows <= most:
        return data
    chosen = torch.arange(most) * (rows - 1) // max(1, most - 1)
    return tuple(part[chosen] for part in data)


def _single_steps(data: Trajectories | Pairs) -> tuple[Tensor, ...]:
    """(x, y, h) of single steps, of as many as a stage takes; h is a column."""
    x, y, h = pairs_of(data)
    return thinned((x, y, h[:, None]), MOST_SAMPLES)


def _runs(data: Trajectories | Pairs | None, horizon: int) -> Windows | None:
    """So many steps in a row of trajectories, runs that overlap by half; ``None`` of other data."""
    return windows(data, horizon, max(1, horizon // 2)) if isinstance(data, Trajectories) else None


def save_fit(directory: Path | str, flow: FlowMap) -> None:
    """Write the surrogate's parameters, units and structure for :func:`load_fit`, into a folder that may be new.

    Raises:
        InvalidArgument: :func:`build` makes another map of the structure, so that :func:`load_fit` would return it.
        BadCheckpoint: the folder holds something else, or a fit of ``dynablocks fit`` with another structure.
    """
    import yaml

    _require_built(flow)
    directory, structure = Path(directory), plain_data(asdict(flow.structure))
    stored = read_config(directory) if (directory / CONFIG).exists() else {"fit": {}}
    if stored["fit"] and stored.get("structure") != structure:
        raise BadCheckpoint(f"{directory} holds a fit with another structure; give another folder.")
    if not stored["fit"]:
        text = yaml.safe_dump({"fit": {}, "structure": structure}, sort_keys=False, allow_unicode=True)
        write_text(directory / CONFIG, text)
    write_atomically(directory / WEIGHTS, lambda path: _save_weights(flow, path))


def _save_weights(flow: FlowMap, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(flow, str(path), {DIGEST: _digest(flow)})


def _digest(flow: FlowMap) -> str:
    """Of a map's numbers in float64, in which they are loaded whatever they were stored in."""
    state = flow.state_dict().items()
    return tensor_digest({name: value.double() if value.is_floating_point() else value for name, value in state})


def _is_whole(flow: FlowMap, path: Path) -> bool:
    """Whether the numbers of a loaded map are finite, and those that were stored where the file says which."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        stored = (stream.metadata() or {}).get(DIGEST)
    finite = all(bool(value.isfinite().all()) for value in flow.state_dict().values())
    return finite and stored in (None, _digest(flow))


def _require_built(flow: FlowMap) -> None:
    with torch.random.fork_rng(devices=[]):
        built = build(flow.structure)
    if type(flow) is FlowMap and _anatomy(flow) == _anatomy(built) and _acts_alike(flow, built):
        return
    raise InvalidArgument(
        f"save_fit stores maps that build(structure) makes, here {type(built.field).__name__} by {built.method!r}; "
        f"this {type(flow).__name__} of {type(flow.field).__name__} by {flow.method!r} is another: keep its parameters "
        "with safetensors and build it by your own code."
    )


def _anatomy(flow: FlowMap) -> tuple[Any, ...]:
    """All of a map but the numbers in it."""
    shapes = {name: tuple(value.shape) for name, value in flow.state_dict().items()}
    settings = {k: sorted(map(str, v)) if isinstance(v, frozenset) else repr(v) for k, v in vars(flow.method).items()}
    return type(flow.field), repr(flow.field), type(flow.method), settings, shapes


@torch.no_grad()
def _acts_alike(flow: FlowMap, built: FlowMap) -> bool:
    """Whether the built map, with the parameters of the other, does the same: it may differ in what no name shows."""
    own, built = copy.deepcopy(flow).to(built.centre).eval(), built.eval()
    built.load_state_dict(own.state_dict())
    states = torch.linspace(0, 1, 5 * own.centre.numel(), dtype=built.centre.dtype).reshape(5, -1)
    states = own.centre + own.scale * states
    return all(
        torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)
        for ours, theirs in zip(_doings(own, states), _doings(built, states), strict=True)
    )


def _doings(flow: FlowMap, states: Tensor) -> tuple[Tensor, Tensor]:
    """The field at the states, and one step from them; NaN where there is none."""
    try:
        step = flow(states)
    except DynablocksError:
        step = torch.full_like(states, math.nan)
    return flow.vector_field(states), step


def load_fit(directory: Path | str) -> FlowMap:
    """The surrogate of ``dynablocks fit`` or :func:`save_fit` in a folder, in float64: ``flow(x)``, ``flow(x, step)``.

    Raises:
        BadCheckpoint: the directory holds no finished fit, or one whose numbers are not those that were stored.

    Example:
        >>> load_fit("nowhere")
        Traceback (most recent call last):
        ...
        dynablocks.errors.BadCheckpoint: nowhere holds no finished fit (no config.yaml); make one with dynablocks fit.
    """
    from safetensors.torch import load_model

    directory = Path(directory)
    content = read_config(directory)
    if not (directory / WEIGHTS).exists():
        raise BadCheckpoint(f"{directory} holds no finished fit (no {WEIGHTS}); run the same dynablocks fit again.")
    try:
        stored = dict(content["structure"])
        weights = stored["weights"]
        stored |= {"names": tuple(stored["names"]), "weights": None if weights is None else tuple(weights)}
        flow = build(Structure(**stored))
        load_model(flow, str(directory / WEIGHTS))
        if not _is_whole(flow, directory / WEIGHTS):
            raise BadCheckpoint("numbers that are not finite, or not those that were stored")
    except Exception as error:
        raise BadCheckpoint(f"{directory} holds a damaged fit; make it again with --overwrite.") from error
    return flow.eval()


def read_config(directory: Path) -> dict[str, Any]:
    """The content of the directory's ``config.yaml``."""
    import yaml

    if not (directory / CONFIG).exists():
        raise BadCheckpoint(f"{directory} holds no finished fit (no {CONFIG}); make one with dynablocks fit.")
    try:
        content = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadCheckpoint(f"{directory / CONFIG} cannot be read; make the fit again in another folder.") from error
    if not isinstance(content, dict) or "fit" not in content:
        raise BadCheckpoint(f"{directory} holds something else than a fit; give another folder.")
    return content


def claim(directory: Path, config: FitConfig, structure: Structure, source: dict[str, Any], *, overwrite: bool) -> bool:
    """Make the directory this fit's own; ``True`` when it holds this fit already, finished.

    Raises:
        InvalidArgument: it is a file, or holds something else.
        BadCheckpoint: it holds another fit.
    """
    import yaml

    if directory.exists() and not directory.is_dir():
        raise InvalidArgument(f"--out {directory} is a file; give a folder.")
    content = {"fit": asdict(config), "structure": asdict(structure), "data": source}
    plain = yaml.safe_load(yaml.safe_dump(plain_data(content), allow_unicode=True))
    if overwrite and (directory / CONFIG).exists():
        read_config(directory)  # refuses the folder of anything but a fit
        _forget(directory)
    elif (directory / CONFIG).exists():
        stored = read_config(directory)
        differing = _differing(stored, plain)
        if differing:
            raise BadCheckpoint(
                f"{directory} holds a fit with another {differing}; choose another --out, or --overwrite to fit anew."
            )
        if (directory / METRICS).exists() and (directory / WEIGHTS).exists():
            return True
    elif directory.exists() and not all(_is_harmless(path) for path in directory.iterdir()):
        raise InvalidArgument(f"--out {directory} holds other files; give an empty or a new folder.")
    write_text(directory / CONFIG, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    return False


def _differing(stored: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    for group in ("data", "fit", "structure"):
        held, new = stored.get(group), wanted[group]
        old = held if isinstance(held, dict) else {}
        for key in new:
            if key not in (*HARMLESS, "file") and old.get(key) != new[key]:
                word = {"names": "choice of --columns"}.get(key, key)
                return f"{word} ({old.get(key)!r}, now {new[key]!r})" if key != "sha256" else "data file"
    return None


def _is_harmless(path: Path) -> bool:
    """Whether a fit may begin beside this: what a desktop, a lock or a killed writer leaves is hidden."""
    return path.name == EXAMPLE_DATA or path.name.startswith(".")


def _forget(directory: Path) -> None:
    """Remove what a fit made but its settings, which the next one replaces: without them the folder is no fit's."""
    for name in (WEIGHTS, METRICS, VERIFICATION, PREDICTIONS, REPORT):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / CHECKPOINT, ignore_errors=True)
