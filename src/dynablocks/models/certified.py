"""Our own network: everything from pixel to logit lies inside the guarantee."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from torch import nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import GradientField, PreconditionedField, leaky_relu
from dynablocks.integrators import ExplicitEuler
from dynablocks.lifting import ChannelMix, SpaceToDepth, ZeroLift
from dynablocks.linear import Conv, LinearMap, OrthogonalConv, OrthogonalDense, UnitConv, UnitDense
from dynablocks.models.config import ModelConfig, needed
from dynablocks.models.network import MODELS, ModelKind
from dynablocks.models.paper import PAIR, Shape, pair_block
from dynablocks.switching import FreeSignal, LearnedStep, PrescribedSignal, ScheduledSignal, SwitchingSignal

MOST_DENSE_ENTRIES = 10**8
"""Of one dense matrix: 1.6 GB in float32, with its gradient and what Adam keeps. That of all features grows with the
fourth power of the images' sides."""


def step_signal(config: ModelConfig) -> SwitchingSignal:
    """The scheduled step of a configuration, or the learned one."""
    start = needed(config.step_start)
    if config.step_rule == "learned":
        return LearnedStep(start, 0.0, 2.0)
    return ScheduledSignal(start, needed(config.step_end), needed(config.step_until))


def _block(config: ModelConfig, shape: Shape) -> DynamicalBlock:
    size, padding = needed(config.kernel_size), needed(config.padding)
    if config.step == "preconditioned":
        kernel = Conv(shape, shape[0], size, padding, gain=0.5)
        return DynamicalBlock(PreconditionedField(kernel, "relu"), ExplicitEuler(), FreeSignal(2.0), bound=config.bound)
    if config.step == "exact":
        sigma = leaky_relu(needed(config.slope))
        return pair_block(replace(config, region="exact"), shape, sigma, PrescribedSignal, "exact")
    rows = max(1, round(needed(config.rows) * shape[0]))
    if config.step == "potential":
        free: LinearMap = UnitConv(shape, rows, size, padding)
        return DynamicalBlock(GradientField(free, "relu"), ExplicitEuler(), step_signal(config), bound=config.bound)
    linear = OrthogonalConv(shape, rows, kernel_size=size, padding=padding, method=needed(config.method))
    return DynamicalBlock(GradientField(linear, "relu"), ExplicitEuler(), step_signal(config), bound=config.bound)


def require_sides(config: ModelConfig, shape: Shape, ahead: int = 0) -> None:
    """Refuse images whose sides the stem, times 2 for each further stage, does not divide.

    Args:
        config: a completed configuration.
        shape: (channels, height, width) of the images.
        ahead: how many of its stages come before the stem.

    Raises:
        InvalidArgument: as said; it names a stem and stages that these images fit.
    """
    assert config.widths is not None
    assert config.layers is not None
    sides, stem, stages = math.gcd(*shape[1:]), needed(config.stem), len(config.widths) - ahead
    fold = stem * 2 ** (stages - 1)
    if sides % fold == 0:
        return
    pairs = itertools.product(range(stem, 0, -1), range(stages, 0, -1))
    fitting, count = next((s, n) for s, n in pairs if sides % (s * 2 ** (n - 1)) == 0)
    widths, layers = (str(list(sizes[: ahead + count])).replace(" ", "") for sizes in (config.widths, config.layers))
    raise InvalidArgument(
        f"images of {shape[1]} x {shape[2]} pixels cannot be folded by {fold} (the stem's {stem}, and 2 at each "
        f"further stage); make their sides divisible by {fold}, or give --model.stem {fitting} "
        f"--model.widths '{widths}' --model.layers '{layers}'."
    )


def _transition(shape: Shape, factor: int, width: int, method: str) -> tuple[list[nn.Module], Shape]:
    """Space to depth, then an orthogonal 1 × 1 map to ``width`` channels."""
    shape = (shape[0] * factor**2, shape[1] // factor, shape[2] // factor)
    parts: list[nn.Module] = [SpaceToDepth(factor)] if factor > 1 else []
    if width > shape[0]:
        parts.append(ZeroLift(shape[0], width))
        shape = (width, *shape[1:])
    parts.append(ChannelMix(shape, width, method))
    return parts, (width, *shape[1:])


def dense_steps(config: ModelConfig, features: int) -> tuple[list[nn.Module], int]:
    """The steps behind the last stage, and how many features they leave.

    Raises:
        InvalidArgument: they are asked to be wider than what the last stage leaves, or one of their matrices would have
            more than ``MOST_DENSE_ENTRIES`` numbers.
    """
    if not config.dense_layers:
        if config.dense_width:
            raise InvalidArgument(
                f"dense_width is {config.dense_width} with dense_layers 0; give dense_layers >= 1, or no dense_width."
            )
        return [], features
    if needed(config.dense_width) > features:
        raise InvalidArgument(f"dense_width is {config.dense_width}; at most the {features} features are possible.")
    width, method = config.dense_width or features, needed(config.method)
    rows = max(1, round(needed(config.dense_rows) * width))
    _require_dense_size(features, width, rows)
    parts: list[nn.Module] = [OrthogonalDense(features, width, method)] if width < features else []
    for _ in range(config.dense_layers):
        potential = config.dense_step == "potential"
        linear: LinearMap = UnitDense(width, rows) if potential else OrthogonalDense(width, rows, method)
        field = GradientField(linear, "relu")
        parts.append(DynamicalBlock(field, ExplicitEuler(), step_signal(config), bound=config.bound))
    return parts, width


def _require_dense_size(features: int, width: int, rows: int) -> None:
    entries = width * (features if width < features else rows)
    if entries > MOST_DENSE_ENTRIES:
        fitting = max(1, min(1024, MOST_DENSE_ENTRIES // features))
        raise InvalidArgument(
            f"the dense steps behind {features:,} features have a matrix of {entries:,} numbers; at most "
            f"{MOST_DENSE_ENTRIES:,} are possible: give --model.dense_width {fitting}, take --preset cpu, which has no "
            "dense steps, or make the images smaller."
        )


def build_body(config: ModelConfig, shape: Shape) -> tuple[nn.Sequential, int]:
    """Stem, stages of steps with folding between them, dense steps."""
    require_sides(config, shape)
    assert config.widths is not None
    assert config.layers is not None
    parts: list[nn.Module] = []
    for stage, (width, count) in enumerate(zip(config.widths, config.layers, strict=True)):
        moves, shape = _transition(shape, 2 if stage else needed(config.stem), width, needed(config.method))
        parts.extend(moves)
        parts.extend(_block(config, shape) for _ in range(count))
    parts.append(nn.Flatten())
    features = shape[0] * shape[1] * shape[2]
    dense, features = dense_steps(config, features)
    return nn.Sequential(*parts, *dense), features


def unread(config: ModelConfig, *, others: bool = False) -> dict[str, str]:
    """What the choice of the steps leaves unread, with a word for it.

    Args:
        config: as it was given.
        others: whether the network has steps, besides these, that grow as the configuration says.
    """
    step, balance = config.step or "orthogonal", config.balance or "pair"
    found: dict[str, str] = {}
    if step != "exact":
        found = dict.fromkeys(("slope", "balance", "step_penalty"), f"step {step}")
    elif balance != "penalty":
        found = {"step_penalty": f"balance {balance}"}
    if step in ("exact", "preconditioned") and not (config.dense_layers or others):
        # Pairs of exact flows begin with step_start.
        names = ["step_end", "step_until", "step_rule", *(["step_start"] if step == "preconditioned" else [])]
        found |= dict.fromkeys(names, f"step {step} and dense_layers 0")
    elif config.step_rule == "learned":
        found |= dict.fromkeys(("step_end", "step_until"), "step_rule learned")
    return found


# Exact flows need orthonormal rows, so that nothing is penalised.
EXACT = PAIR - {"weights", "penalty", "expansive_penalty"}
STEP = {"step", "step_start", "step_end", "step_until", "step_rule", "rows", "stem"}
DENSE = {"dense_width", "dense_layers", "dense_rows", "dense_step"}
MODELS["certified"] = ModelKind(
    "isometric stem, orthogonal steps whose size grows from 1 to 2, row-normalised head",
    ModelConfig(
        name="certified",
        widths=(32, 64, 128),
        layers=(3, 3, 3),
        lift="isometric",
        weights="orthogonal",
        method="cayley",
        padding="circular",
        kernel_size=3,
        rows=1.0,
        step="orthogonal",
        slope=0.5,
        balance="pair",
        step_start=1.0,
        step_end=2.0,
        step_until=0.7,
        stem=2,
        dense_width=0,
        dense_layers=0,
        dense_rows=1.0,
        head="rows",
        normalise=False,
    ),
    build_body,
    EXACT | STEP | DENSE,
    unread=unread,
)
