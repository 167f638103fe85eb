"""The paper's five networks: three stages of four layers with lifts and 2 × 2 max-pooling (section 3.3, design D4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import Activation, GradientField, TwoMatrixField, leaky_relu
from dynablocks.integrators import ExplicitEuler
from dynablocks.lifting import ChannelMix, PaperLift, ZeroLift
from dynablocks.linear import Conv, LinearMap, NormalisedConv, OrthogonalConv
from dynablocks.models.config import ModelConfig, needed
from dynablocks.models.network import MODELS, ModelKind
from dynablocks.switching import (
    REGIONS,
    FlexibleSignal,
    FreeSignal,
    LearnedStep,
    PairSignal,
    PaperFlexibleRegion,
    PrescribedSignal,
)

Shape = tuple[int, int, int]
BlockBuilder = Callable[[ModelConfig, Shape], DynamicalBlock]


def convolution(config: ModelConfig, shape: Shape) -> LinearMap:
    """The square convolution a configuration asks for."""
    size, padding = needed(config.kernel_size), needed(config.padding)
    if config.weights == "orthogonal":
        return OrthogonalConv(shape, kernel_size=size, padding=padding, method=needed(config.method))
    if config.weights == "free":
        return Conv(shape, shape[0], size, padding)
    return NormalisedConv(shape, shape[0], size, padding, penalty=config.penalty or 0.0, gain=float(size))


def _resnet(config: ModelConfig, shape: Shape) -> DynamicalBlock:
    field = TwoMatrixField(convolution(config, shape), convolution(config, shape), "relu")
    return DynamicalBlock(field, ExplicitEuler(), FreeSignal(1.0), bound=config.bound)


def _naive(config: ModelConfig, shape: Shape) -> DynamicalBlock:
    field = TwoMatrixField(convolution(config, shape), convolution(config, shape), "relu", decay=1.0)
    return DynamicalBlock(field, ExplicitEuler(), FreeSignal(0.5), bound=config.bound)


def _non_expansive(config: ModelConfig, shape: Shape) -> DynamicalBlock:
    field = GradientField(convolution(config, shape), "relu")
    start = 0.5 if config.step_start is None else config.step_start
    return DynamicalBlock(field, ExplicitEuler(), LearnedStep(start, 0.0, 2.0), bound=config.bound)


def pair_fields(config: ModelConfig, shape: Shape, expansive_sigma: Activation) -> list[GradientField]:
    """A contractive and an expansive gradient field with maps of their own."""
    sigma = leaky_relu(needed(config.slope))
    penalty = config.penalty if config.expansive_penalty is None else config.expansive_penalty
    return [
        GradientField(convolution(config, shape), sigma),
        GradientField(convolution(replace(config, penalty=penalty), shape), expansive_sigma, expansive=True),
    ]


def pair_block(
    config: ModelConfig, shape: Shape, expansive_sigma: Activation, signal_type: type[PairSignal], default: str
) -> DynamicalBlock:
    """Steps of a contractive and an expansive gradient field in turn, kept in a region, by the method of the region.

    A region takes AᵀA = I for granted in the contractive field. Zero padding to the same size, the default of the
    paper's networks here, excludes it for kernels beyond 1 × 1: such a block may expand, and declares what it has.

    Args:
        config: a completed configuration.
        shape: (channels, height, width) of the images.
        expansive_sigma: σ of the expansive field.
        signal_type: the order of the steps.
        default: the region where the configuration names none.

    Raises:
        InvalidArgument: an unknown region, one that holds no contractive step for the slope, or one whose method does
            not apply to the fields.
    """
    region_name = config.region or default
    slope = needed(config.slope)
    kind = REGIONS.get_known(region_name)
    region = kind(slope)
    # (3.12) takes the contractive step in two halves whatever S is; exact flows need no substeps.
    halves = signal_type is FlexibleSignal or isinstance(region, PaperFlexibleRegion)
    if not halves and region.method != "exact":
        region = kind(slope, needed(config.substeps))
    if region.first_range[1] == 0:
        raise InvalidArgument(
            f"slope is {slope:g}, for which the region {region_name!r} holds no contractive step but 0; take a "
            "slope > 0 or --model.region tight."
        )
    start = (1.0 if config.step_start is None else config.step_start, 0.1)
    balance, weight = needed(config.balance), config.step_penalty
    # Configurations of networks that were built before may hold a weight that their balance does not read.
    signal = signal_type(region, start, balance, weight if balance == "penalty" else None)
    return DynamicalBlock(pair_fields(config, shape, expansive_sigma), region.method, signal, bound=config.bound)


def _prescribed(config: ModelConfig, shape: Shape) -> DynamicalBlock:
    sigma = leaky_relu(needed(config.slope))
    return pair_block(config, shape, sigma, PrescribedSignal, "paper-prescribed")


def _flexible(config: ModelConfig, shape: Shape) -> DynamicalBlock:
    return pair_block(config, shape, leaky_relu(0.0), FlexibleSignal, "paper-flexible")


def lift(config: ModelConfig, shape: Shape, width: int) -> tuple[nn.Module, Shape]:
    """The map to ``width`` channels: inside the guarantee, or the paper's."""
    method, lifted = needed(config.method), (width, *shape[1:])
    if config.lift == "paper":
        return PaperLift(shape, width), lifted
    if width < shape[0]:
        return ChannelMix(shape, width, method), lifted
    if width == shape[0]:
        return nn.Identity(), shape
    return nn.Sequential(ZeroLift(shape[0], width), ChannelMix(lifted, width, method)), lifted


def stages(block: BlockBuilder) -> Callable[[ModelConfig, Shape], tuple[nn.Sequential, int]]:
    """Lift, blocks, 2 × 2 max-pool for each width; then flat features."""

    def build_body(config: ModelConfig, shape: Shape) -> tuple[nn.Sequential, int]:
        assert config.widths is not None
        assert config.layers is not None
        parts: list[nn.Module] = []
        for width, count in zip(config.widths, config.layers, strict=True):
            lifted, shape = lift(config, shape, width)
            parts.append(lifted)
            parts.extend(block(config, shape) for _ in range(count))
            if min(shape[1:]) < 2:
                raise InvalidArgument(f"{len(config.widths)} stages halve the image below one pixel; use fewer stages.")
            parts.append(nn.MaxPool2d(2))
            shape = (shape[0], shape[1] // 2, shape[2] // 2)
        parts.append(nn.Flatten())
        return nn.Sequential(*parts), shape[0] * shape[1] * shape[2]

    return build_body


PAPER = ModelConfig(
    name="prescribed",
    widths=(32, 64, 128),
    layers=(4, 4, 4),
    lift="isometric",
    weights="penalised",
    method="cayley",
    padding="same",
    kernel_size=3,
    slope=0.5,
    substeps=2,
    balance="pair",
    step_penalty=1.0,
    head="frobenius",
    normalise=True,
)


CONVOLUTION = frozenset({"kernel_size", "padding", "weights", "method", "penalty"})
"""What :func:`convolution` reads."""

PAIR = CONVOLUTION | {"slope", "step_start", "balance", "step_penalty", "expansive_penalty"}
"""What :func:`pair_block` reads, besides the region and its substeps."""


def _unread(defaults: ModelConfig, pairs: bool, config: ModelConfig) -> dict[str, str]:
    """What the choice of lift and weights, and of region and balance where there are pairs, leaves unread."""
    lifts, weights = config.lift or needed(defaults.lift), config.weights or needed(defaults.weights)
    found = {} if weights == "penalised" else dict.fromkeys(("penalty", "expansive_penalty"), f"weights {weights}")
    if lifts == "paper" and weights != "orthogonal":
        found["method"] = f"lift paper and weights {weights}"
    name = config.region or defaults.region
    region = REGIONS.get(name) if isinstance(name, str) else None
    # As in pair_block: the default region reads them, and an unknown one is refused there.
    if isinstance(region, type) and (region.method == "exact" or issubclass(region, PaperFlexibleRegion)):
        found["substeps"] = f"region {name}"
    balance = (config.balance or defaults.balance) if pairs else "penalty"
    return found if balance == "penalty" else found | {"step_penalty": f"balance {balance}"}


def _file(name: str, summary: str, block: BlockBuilder, settings: frozenset[str], **changes: object) -> None:
    defaults = replace(PAPER, name=name, **changes)  # type: ignore[arg-type]
    unread = partial(_unread, defaults, "balance" in settings)
    MODELS[name] = ModelKind(summary, defaults, stages(block), settings | {"lift"}, unread=unread)


_file(
    "resnet",
    "x + AᵀReLU(Bx + b), unconstrained: the reference",
    _resnet,
    CONVOLUTION,
    weights="free",
    lift="paper",
    head="none",
)
_file("naive", "½(x + AᵀReLU(Bx + b)) with ‖A‖, ‖B‖ <= 1", _naive, CONVOLUTION, penalty=0.01, head="none")
# The penalties are those of the released code on CIFAR-10; `reproduce` has its own of CIFAR-100.
_file(
    "non_expansive",
    "x − hAᵀReLU(Ax + b), 0 <= h <= 2 learned: (3.5)",
    _non_expansive,
    CONVOLUTION | {"step_start"},
    penalty=0.1,
)
# A pair of steps is two of the paper's four layers a stage.
_file(
    "prescribed",
    "contractive and expansive steps in turn: (3.11)",
    _prescribed,
    PAIR | {"region", "substeps"},
    penalty=0.1,
    layers=(2, 2, 2),
)
_file(
    "flexible",
    "an expansive step of either sign, then a contractive one: (3.12)",
    _flexible,
    PAIR | {"region"},
    penalty=0.01,
    layers=(2, 2, 2),
)
