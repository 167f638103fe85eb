"""A network of the field of the paper's appendix B: non-expansive in a norm that tells shading from pixel noise."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.fields import MetricField
from dynablocks.integrators import ExplicitEuler
from dynablocks.lifting import ChannelMix, ZeroLift
from dynablocks.linear import OrthogonalConv
from dynablocks.models import certified
from dynablocks.models.config import ModelConfig, needed
from dynablocks.models.network import MODELS, ModelKind
from dynablocks.models.paper import Shape
from dynablocks.norms import Channelwise, SpectralMetric, Whitening

OF_STAGES = ("stem", "rows", "step", "slope", "balance", "step_penalty")
"""What is read for the certified model's stages alone, of which one width leaves none."""


def image_metric(config: ModelConfig, shape: Shape) -> SpectralMetric:
    """The norm on images a configuration asks for."""
    return SpectralMetric(shape, needed(config.metric_smooth), config.metric_wavelength)


def build_body(config: ModelConfig, shape: Shape) -> tuple[nn.Sequential, int]:
    """Steps of metric fields on the whole image, M^{1/2}, then the certified model's stages in ℓ2.

    The first entries of ``widths`` and ``layers`` are those of the metric fields. Each of their steps is
    M^{−1/2}ΨM^{1/2} with a Euclidean step Ψ, and lifts commute with M^{1/2}: the body is one for M = I behind the fixed
    linear filter M^{1/2}.
    """
    assert config.widths is not None
    assert config.layers is not None
    if len(config.widths) > 1:
        certified.require_sides(config, shape, ahead=1)
    width, height, columns = config.widths[0], *shape[1:]
    entrance = image_metric(config, shape)
    size, padding, method = needed(config.kernel_size), needed(config.padding), needed(config.method)
    lift = ZeroLift(shape[0], width) if width > shape[0] else ChannelMix(shape, width, method)
    metric, shape = entrance.with_channels(width), (width, height, columns)
    parts: list[nn.Module] = [Channelwise(lift, entrance, width)]
    for _ in range(config.layers[0]):
        linear = OrthogonalConv(shape, kernel_size=size, padding=padding, method=method)
        field = MetricField(linear, metric, "relu", whitened=True)
        parts.append(DynamicalBlock(field, ExplicitEuler(), certified.step_signal(config), bound=config.bound))
    parts.append(Whitening(metric))
    if len(config.widths) == 1:
        dense, features = certified.dense_steps(config, width * height * columns)
        return nn.Sequential(*parts, nn.Flatten(), *dense), features
    rest = replace(config, widths=config.widths[1:], layers=config.layers[1:])
    following, features = certified.build_body(rest, shape)
    return nn.Sequential(*parts, *following), features


def unread(config: ModelConfig) -> dict[str, str]:
    """As of the certified model; steps of metric fields grow whatever its own do, of which one width leaves none."""
    found = certified.unread(config, others=config.layers is None or config.layers[0] > 0)
    if config.widths is not None and len(config.widths) == 1:
        found |= dict.fromkeys(OF_STAGES, "one width")
    return found


MODELS["metric"] = ModelKind(
    "steps that are non-expansive in a norm ‖·‖_M of images, then M^{1/2} and the certified model",
    replace(
        MODELS["certified"].defaults,
        name="metric",
        widths=(8, 64, 128),
        layers=(2, 3, 3),
        stem=4,
        metric_smooth=0.1,
    ),
    build_body,
    MODELS["certified"].settings | {"metric_smooth", "metric_wavelength"},
    image_metric,
    unread,
)
