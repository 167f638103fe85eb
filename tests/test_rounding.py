"""The proven rounding bound against float64, with inputs and orders of summation made to err."""

from __future__ import annotations

import copy
import functools
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import Activation, FieldFacts, GradientField, MetricField, TwoMatrixField, leaky_relu
from dynablocks.integrators import ExactFlow, ExplicitEuler
from dynablocks.lifting import ChannelMix, Head, PaperLift, PixelNormalisation
from dynablocks.linear import Bounds, Conv, Dense, LinearMap, OrthogonalConv, OrthogonalDense, frozen_weights
from dynablocks.models import MODELS, ModelConfig, Network, build
from dynablocks.norms import Channelwise, SpectralMetric, Whitening
from dynablocks.robustness import CertificateResult, certified_radii, certify, rounding
from dynablocks.robustness.arithmetic import (
    _FPMATH_FOUND,
    NoRoundingBound,
    full_precision,
    gamma,
    plain_arithmetic,
    require_strict_environment,
    unit_roundoff,
)
from dynablocks.robustness.audit import AuditFailed, _layer_bound, singular_range
from dynablocks.robustness.certificates import _logit_error
from dynablocks.robustness.evaluation import evaluating, to_pixels
from dynablocks.robustness.rounding import LogitError, _Arithmetic, rounding_bound
from dynablocks.switching import FreeSignal

TINY = {"widths": (4, 8), "layers": (2, 1)}
CASES = {
    "certified": ModelConfig("certified", **TINY, step_start=2.0),
    "normalised": ModelConfig("certified", **TINY, normalise=True, dense_layers=1, dense_width=16),
    "dense": ModelConfig(
        "certified", widths=(4, 8), layers=(1, 0), dense_layers=2, dense_rows=0.25, step_start=2.0, method="expm"
    ),
    "exact": ModelConfig("certified", **TINY, step="exact", slope=0.3),
    "preconditioned": ModelConfig("certified", **TINY, step="preconditioned"),
    "three substeps": ModelConfig("prescribed", **TINY, padding="same", substeps=3, slope=0.3),
    "orthogonal substeps": ModelConfig("prescribed", **TINY, weights="orthogonal", padding="circular", substeps=2),
    "paper lift": ModelConfig("non_expansive", **TINY, lift="paper"),
    "flexible": ModelConfig("flexible", **TINY),
    "naive": ModelConfig("naive", **TINY),
    "resnet": ModelConfig("resnet", **TINY),
    "metric": ModelConfig("metric", **TINY),
    "potential": ModelConfig("certified", **TINY, step="potential", dense_layers=1, dense_step="potential"),
}


def pooled() -> Network:
    body = nn.Sequential(PixelNormalisation((0.3, 0.6), (0.2, 0.3)), nn.AvgPool2d([2, 2]), nn.Flatten())
    return Network(body, Head(32, 5), (2, 8, 8), ModelConfig())


def in_given_weights() -> Network:
    metric = SpectralMetric((2, 8, 8))
    normalisation = Channelwise(PixelNormalisation((0.3, 0.6), (0.2, 0.3)), metric)
    field = MetricField(Conv((2, 8, 8), 3, 3, "circular", gain=0.5), metric, "relu")
    block = DynamicalBlock(field, "euler", FreeSignal(0.5))
    body = nn.Sequential(normalisation, block, Whitening(metric), nn.Flatten())
    return Network(body, Head(128, 5), (2, 8, 8), ModelConfig())


def normalised_after_a_convolution() -> Network:
    """One pixel becomes 361: of a white image 2^-5 each, halfway between two numbers at 2^19, so all of it is lost."""
    convolution = Conv((2, 1, 1), 1, 19, "full")
    with torch.no_grad():
        convolution.kernel.fill_(2.0**-6)
    body = nn.Sequential(nn.AvgPool2d(8), convolution, PixelNormalisation((-(2.0**19),), (1.0,)), nn.Flatten())
    return Network(body, Head(361, 5), (2, 8, 8), ModelConfig())


BY_HAND: dict[str, Callable[[], Network]] = {
    "average pooling": pooled,
    "metric in given weights": in_given_weights,
    "normalisation after a convolution": normalised_after_a_convolution,
}


def network_of(name: str, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    if name in BY_HAND:
        network = BY_HAND[name]().eval()
    else:
        network = build(CASES[name], (2, 8, 8), 5, mean=(0.3, 0.6), std=(0.2, 0.3), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in network.named_parameters():
            if key.endswith("bias"):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return network


def images(count: int = 6, seed: int = 0) -> Tensor:
    """Noise, and images of one value: sums of equal terms round in one direction."""
    noise = torch.rand(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.cat([noise, torch.full((1, 2, 8, 8), 1 / 3), torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)])


def exact_twin(network: Network) -> Network:
    """The network in float64 with exactly the effective weights that the given one holds."""
    twin = copy.deepcopy(network).double()
    for ours, theirs in zip(network.modules(), twin.modules(), strict=True):
        if isinstance(ours, LinearMap):
            theirs.hold(ours.weight.detach().double())
        if hasattr(ours, "slope_scales") and ours.slope_scales() is not None:
            scales = ours.slope_scales().detach().double()
            object.__setattr__(theirs, "slope_scales", lambda scales=scales: scales)
    return twin


def errors(network: Network, pixels: Tensor) -> tuple[Tensor, Tensor, LogitError, Tensor]:
    """True errors of features and logits, and their bounds."""
    with torch.no_grad(), evaluating(network), plain_arithmetic():
        logits, bound = rounding_bound(network, pixels)
        twin = exact_twin(network)
        features = (twin.body(pixels.double()) - network.body(pixels).double()).norm(dim=1)
        wrong = (twin(pixels.double()) - logits.double()).abs()
        return features, wrong, bound, network.head.weight.double().norm(dim=1)


@pytest.fixture(params=[True, False], ids=["at the image", "from norms"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either bound of an Euler step in float32, whose errors can be seen; float64 takes the one from norms."""
    start = _Arithmetic.__init__

    def chosen(self: _Arithmetic, pixels: Tensor) -> None:
        start(self, pixels)
        self.worth_measuring = request.param

    monkeypatch.setattr(_Arithmetic, "__init__", chosen)


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("name", [*CASES, *BY_HAND])
def test_true_errors_never_exceed_the_bound(name: str) -> None:
    for seed in (0, 1):
        features, wrong, bound, norms = errors(network_of(name, seed), images(seed=seed))
        assert features.max() > 0
        assert (features <= bound.features).all()
        assert (wrong <= bound.of_logits(norms)).all()


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("name", [*CASES, *BY_HAND])
def test_the_bound_within_a_radius_holds_at_every_moved_image(name: str) -> None:
    network, centre = network_of(name), images(2)
    _, _, bound, norms = errors(network, centre)
    generator = torch.Generator().manual_seed(5)
    for size in (0.1, 3.0):
        step = torch.randn(centre.shape, generator=generator)
        moved = (centre + size * step / step.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
        radius = float((moved.double() - centre.double()).flatten(1).norm(dim=1).max())
        features, wrong, _, _ = errors(network, moved)
        assert (features <= bound.features + bound.features_slope * radius).all()
        assert (wrong <= bound.of_logits(norms, radius)).all()


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"convnet"}))
def test_every_named_model_has_a_proof_in_both_formats(name: str) -> None:
    network = build(ModelConfig(name, **TINY), (1, 8, 8), 10, seed=0).eval()
    data = (torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64))
    double, single = (certify(network, data, arithmetic=kind) for kind in ("float64", "float32"))
    assert double.proved
    assert single.proved
    assert (double.arithmetic, single.arithmetic) == ("float64", "float32")
    assert double.logit_error < 1e-8 < single.logit_error
    assert (single.radii <= double.radii + 1e-5).all()


def one_by_one(weight: Tensor, x: Tensor) -> Tensor:
    """Products added one after the other, from the first: an order no library would choose."""
    total = x.new_zeros(len(x), len(weight))
    for k in range(x.shape[1]):
        total = total + x[:, k : k + 1] * weight[:, k]
    return total


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a subclass nothing is proved, so the classes themselves add in this order."""
    monkeypatch.setattr(Head, "forward", lambda self, x: one_by_one(self.weight, x) + self.bias)
    monkeypatch.setattr(Dense, "multiply", lambda self, weight, x: one_by_one(weight, x))


SMALL = math.sqrt(0.99 * 2.0**-24)
"""1 + SMALL² rounds to 1 in float32, so a sum that starts with 1 loses every such term."""


def losing(size: int = 16) -> tuple[Network, Tensor]:
    """Class 0 is right by n − 1 terms that are lost in float32; class 1 has the single number between the two."""
    count = size * size
    head = Head(count, 2, "none")
    with torch.no_grad():
        head.matrix[0] = SMALL
        head.matrix[0, 0] = 1.0
        head.matrix[1] = 0.0
        head.matrix[1, 0] = 1.0 + 2.0**-23
        head.bias.zero_()
    body = nn.Sequential(PixelNormalisation((0.0,), (1.0,)), nn.Flatten())
    pixels = torch.full((1, 1, size, size), SMALL)
    pixels[..., 0, 0] = 1.0
    return Network(body, head, (1, size, size), ModelConfig()).eval(), pixels


@pytest.mark.parametrize("slow", [False, True])
def test_lost_terms_come_near_the_bound_and_a_hundredth_of_it_is_caught(
    slow: bool, request: pytest.FixtureRequest
) -> None:
    if slow:
        request.getfixturevalue("in_turn")
    network, pixels = losing()
    _, wrong, bound, norms = errors(network, pixels)
    limit = bound.of_logits(norms)
    assert (wrong <= limit).all()
    assert wrong[0, 0] > limit[0, 0] / 100
    if slow:
        assert wrong[0, 0] > 0.9 * limit[0, 0]


@pytest.mark.usefixtures("in_turn")
def test_terms_that_float64_loses_come_near_its_bound() -> None:
    """The oracle is the exact rational logit: no float64 twin could show what float64 loses."""
    network, pixels = losing()
    network, pixels, small = network.double(), pixels.double(), math.sqrt(0.99 * 2.0**-53)
    with torch.no_grad():
        network.head.matrix[0, 1:] = small
        pixels.view(-1)[1:] = small
        with evaluating(network), plain_arithmetic():
            logits, bound = rounding_bound(network, pixels)
            limit = bound.of_logits(network.head.weight.norm(dim=1))
    exact = 1 + 255 * Fraction(small) ** 2
    wrong, allowed = exact - Fraction(logits[0, 0].item()), Fraction(limit[0, 0].item())
    assert Fraction(9, 10) * allowed <= wrong <= allowed


def losing_inside_a_block() -> tuple[Network, Tensor]:
    """The same terms are lost in Ax of a contractive step, whose other factor Aᵀ passes the error on."""
    linear = Dense(256, 2)
    with torch.no_grad():
        linear.matrix[0], linear.matrix[1] = SMALL, 0.0
        linear.matrix[0, 0] = 1.0
    network, pixels = losing()
    network.body.append(DynamicalBlock(GradientField(linear), "euler", FreeSignal(1.0)))
    return network, pixels


@pytest.mark.usefixtures("arithmetic", "in_turn")
def test_lost_terms_inside_a_block_come_near_its_bound() -> None:
    network, pixels = losing_inside_a_block()
    features, wrong, bound, norms = errors(network, pixels)
    assert (features <= bound.features).all()
    assert (wrong <= bound.of_logits(norms)).all()
    assert features[0] > bound.features[0] / 10


@pytest.mark.usefixtures("arithmetic", "in_turn")
def test_from_a_black_image_the_slopes_carry_the_whole_bound() -> None:
    for (network, pixels), inside in ((losing(), False), (losing_inside_a_block(), True)):
        _, _, bound, norms = errors(network, torch.zeros_like(pixels))
        features, wrong, _, _ = errors(network, pixels)
        radius = float(pixels.double().norm())
        limit = bound.of_logits(norms, radius)
        assert bound.features.max() < 1e-20
        assert (features <= bound.features + bound.features_slope * radius).all()
        assert (wrong <= limit).all()
        if inside:
            assert features[0] > 0.9 * bound.features_slope * radius
        else:
            assert wrong[0, 0] > 0.9 * limit[0, 0]


@pytest.mark.usefixtures("in_turn")
def test_a_near_tie_that_float32_decides_wrongly_is_not_certified() -> None:
    network, pixels = losing()
    with torch.no_grad(), evaluating(network), plain_arithmetic():
        logits, bound = rounding_bound(network, pixels)
        exact = exact_twin(network)(pixels.double())
        weight = network.head.weight.double()
    assert logits.argmax() == 1
    assert exact.argmax() == 0
    assert certified_radii(logits, weight, 1.0, rounding=bound).item() == 0
    broken = LogitError(
        bound.features / 1000, bound.features_slope, bound.head / 1000, bound.head_slope / 1000, bound.unit
    )
    assert certified_radii(logits, weight, 1.0, rounding=broken).item() > 0
    label = torch.tensor([0])
    assert certify(network, (pixels, label), arithmetic="float32").radii.item() == 0
    right = certify(network, (pixels, label), arithmetic="float64")
    assert right.predictions.item() == 0
    assert right.radii.item() > 0


def test_ties_are_never_certified() -> None:
    network = network_of("certified")
    with torch.no_grad():
        network.head.matrix[1] = network.head.matrix[0]
        network.head.bias[:2] = 100.0
    for kind in ("float64", "float32"):
        assert certify(network, (images(2), torch.zeros(5, dtype=torch.int64)), arithmetic=kind).radii.max() == 0


def test_the_pairwise_radius_by_hand() -> None:
    kind = torch.float64
    head, slope = torch.tensor([[0.01, 0.02]], dtype=kind), torch.tensor([0.1, 0.2], dtype=kind)
    bound = LogitError(torch.tensor([0.1], dtype=kind), 0.5, head, slope, 0.0)
    radius = certified_radii(torch.tensor([[2.0, 0.0]]), torch.eye(2), 1.5, rounding=bound)
    d = math.sqrt(2)
    assert radius.item() == pytest.approx((2 - 2 * (0.1 * d + 0.03)) / ((1.5 + 0.5) * d + 0.3), rel=1e-11)


def test_the_proof_replaces_the_measurement_and_is_larger() -> None:
    network, pixels = network_of("certified"), images()
    data = (pixels, torch.zeros(len(pixels), dtype=torch.int64))
    with evaluating(network), plain_arithmetic():
        logits, bound = rounding_bound(network, pixels)
        norms = network.head.weight.double().norm(dim=1)
        measured = _logit_error(network, pixels, logits)
    proved = certify(network, data, arithmetic="float32")
    assert proved.logit_error == pytest.approx(float(bound.of_logits(norms).max()))
    assert measured < proved.logit_error < 0.1


def test_the_stated_logit_error_is_the_largest_at_a_sample() -> None:
    """u‖x‖ of the features, times ‖w‖ = 2, and γ₁₇(‖w‖‖x‖ + |b|) of the head."""
    head = Head(16, 2, "none")
    with torch.no_grad():
        head.matrix[0], head.matrix[1] = 0.5, 0.0
        head.bias.copy_(torch.tensor([-3.0, 0.0]))
    network = Network(nn.Sequential(nn.Flatten()), head, (1, 4, 4), ModelConfig()).eval()
    pixels = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    result = certify(network, (pixels, torch.zeros(3, dtype=torch.int64)), arithmetic="float32")
    unit, size = 2.0**-24, float(pixels.double().flatten(1).norm(dim=1).max())
    assert result.logit_error == pytest.approx(2 * unit * size + gamma(17, unit) * (2 * size + 3), rel=1e-5, abs=0)


def test_bounds_of_parts_joined_are_those_of_the_whole_batch_in_its_order() -> None:
    network, pixels = network_of("certified"), images()
    with torch.no_grad(), evaluating(network), plain_arithmetic():
        _, whole = rounding_bound(network, pixels)
        parts = [rounding_bound(network, part)[1] for part in pixels.split(4)]
    joined = LogitError.joined(parts)
    # Activations of another batch may be summed in another order.
    torch.testing.assert_close(joined.features, whole.features, rtol=1e-4, atol=0)
    torch.testing.assert_close(joined.head, whole.head, rtol=1e-4, atol=0)
    assert (joined.features_slope, joined.unit) == (whole.features_slope, whole.unit)
    assert torch.equal(joined.head_slope, whole.head_slope)
    assert not torch.allclose(LogitError.joined(parts[::-1]).features, whole.features, rtol=1e-2, atol=0)


def test_joined_bounds_have_the_largest_slopes() -> None:
    def part(features: list[float], slope: float, head: list[list[float]], head_slope: list[float]) -> LogitError:
        return LogitError(torch.tensor(features), slope, torch.tensor(head), torch.tensor(head_slope), 2.0**-24)

    first = part([1.0, 2.0], 0.5, [[1.0, 2.0], [3.0, 4.0]], [0.125, 0.5])
    joined = LogitError.joined([first, part([3.0], 0.75, [[5.0, 6.0]], [0.25, 0.375])])
    assert joined.features.tolist() == [1.0, 2.0, 3.0]
    assert joined.head.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert (joined.features_slope, joined.head_slope.tolist(), joined.unit) == (0.75, [0.25, 0.5], 2.0**-24)


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class Reflection(LinearMap):
    """x − 2⟨x, v⟩v / ‖v‖²: its weight is no matrix of the map."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.in_shape = self.out_shape = (size,)
        self.normal = nn.Parameter(torch.full((1, size), 1e-6))

    def compute_weight(self) -> Tensor:
        return self.normal

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        unit = nn.functional.normalize(weight[0], dim=0)
        return x - 2 * (x @ unit)[:, None] * unit

    def compute_norm_bounds(self) -> Bounds:
        return Bounds(1.0, 1.0 + 1e-6, exact=True, method="a reflection")


def test_a_linear_map_of_the_users_own_is_measured_and_not_audited() -> None:
    body = nn.Sequential(nn.Flatten(), Reflection(64))
    network = Network(body, Head(64, 3), (1, 8, 8), ModelConfig()).eval()
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(NoRoundingBound, match="Reflection"), evaluating(network), plain_arithmetic():
        rounding_bound(network, images)
    assert not certify(network, (images, torch.zeros(4, dtype=torch.long))).proved
    with pytest.raises(AuditFailed, match="does not know the linear map Reflection"):
        singular_range(body[1])


class Shifted(GradientField):
    """The same up to rounding, which is large: what is added and taken away again swallows digits."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + 2.0**20) - 2.0**20


class Amplified(GradientField):
    def forward(self, x: Tensor) -> Tensor:
        return 8 * super().forward(x)


@pytest.mark.parametrize("kind", [Shifted, Amplified])
def test_a_field_with_a_forward_pass_of_its_own_is_measured_and_not_audited(kind: type[GradientField]) -> None:
    block = DynamicalBlock(kind(OrthogonalDense(64, 64), "relu"), ExplicitEuler(), FreeSignal(1.0))
    network = Network(nn.Sequential(nn.Flatten(), block), Head(64, 3), (1, 8, 8), ModelConfig()).eval()
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(NoRoundingBound, match="forward of its own"), evaluating(network), plain_arithmetic():
        rounding_bound(network, images)
    assert not certify(network, (images, torch.zeros(4, dtype=torch.long)), arithmetic="float32").proved
    with pytest.raises(AuditFailed, match="forward of its own"):
        _layer_bound(block)


SHIFT = 2.0**49


class Fivefold(Activation):
    def __call__(self, u: Tensor) -> Tensor:
        return 5 * super().__call__(u)


def saying(sigma: Activation, negative_slope: float) -> Activation:
    """The activation with a word of itself that its constructor may refuse."""
    object.__setattr__(sigma, "negative_slope", negative_slope)
    return sigma


BY_OTHER_CODE = {
    "swallows digits": saying(Activation("relu2", lambda u: (u + SHIFT).clamp_min(SHIFT) - SHIFT, 0.0, 1.0), 0.0),
    "called otherwise": saying(Fivefold("relu", functional.relu, 0.0, 1.0), 0.0),
    "steep": saying(Activation("steep", functools.partial(functional.leaky_relu, negative_slope=3.0), 1.0, 3.0), 3.0),
    "another slope": saying(Activation("half", leaky_relu(0.5).function, 0.0, 1.0), 0.0),
}


def of_one_pixel(sigma: Activation) -> Network:
    """x − σ(x), and the class by its sign."""
    linear, head = Dense(1, 1), Head(1, 2, "none")
    with torch.no_grad():
        linear.matrix.fill_(1.0)
        head.matrix.copy_(torch.tensor([[1.0], [-1.0]]))
    block = DynamicalBlock(GradientField(linear, sigma), "euler", FreeSignal(1.0))
    return Network(nn.Sequential(nn.Flatten(), block), head, (1, 1, 1), ModelConfig()).eval()


def test_a_relu_by_other_code_may_swallow_digits() -> None:
    """In real arithmetic it is the ReLU, and the features of both pixels are 0."""
    pixels = torch.tensor([0.06, 0.07], dtype=torch.float64).reshape(2, 1, 1, 1)
    assert of_one_pixel(BY_OTHER_CODE["swallows digits"]).double()(pixels).argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("name", BY_OTHER_CODE)
def test_of_an_activation_by_other_code_no_rounding_is_proved(name: str) -> None:
    sigma, data = BY_OTHER_CODE[name], (torch.full((1, 1, 1, 1), 0.06), torch.tensor([0]))
    assert not certify(of_one_pixel(sigma), data).proved
    field, arithmetic = GradientField(OrthogonalDense(2, 1), sigma), _Arithmetic(torch.zeros(1, 1, 1, 2))
    for bound in (
        lambda: rounding._ridge_euler(field, 0.5, arithmetic),
        lambda: rounding._ridge_euler_near(field, 0.5, arithmetic, torch.zeros(1, 2)),
        lambda: rounding._recursion(ExplicitEuler(2), field, torch.tensor(0.5), arithmetic),
        lambda: rounding._flow(ExactFlow(), field, torch.tensor(0.5), arithmetic),
    ):
        with pytest.raises(NoRoundingBound, match="use relu or leaky-relu"):
            bound()


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_of_the_activations_of_the_library_the_rounding_is_proved(slope: float) -> None:
    data = torch.full((1, 1, 1, 1), 0.06), torch.tensor([0])
    assert certify(of_one_pixel(leaky_relu(slope)), data).proved
    assert rounding._leaky_slope(leaky_relu(slope)) == slope


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_nothing_is_proved_of_float32_where_products_may_be_rounded_further(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, pixels = network_of("certified"), images()
    data = (pixels, torch.zeros(len(pixels), dtype=torch.int64))
    monkeypatch.setenv(name, "BF16")
    assert not certify(network, data, arithmetic="float32").proved
    assert certify(network, data).proved
    monkeypatch.setenv(name, "strict")
    assert certify(network, data, arithmetic="float32").proved


UNSET_TOO_LATE = """
import os, torch
from torch import nn
from dynablocks.lifting import Head
from dynablocks.models import ModelConfig, Network
from dynablocks.robustness import certify
from dynablocks.robustness.arithmetic import environment_text
del os.environ["{name}"]
network = Network(nn.Sequential(nn.Flatten()), Head(2, 2), (1, 1, 2), ModelConfig())
for arithmetic in ("float32", "float64"):
    result = certify(network, (torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])), arithmetic=arithmetic)
    print(result.proved, result.rounding_reason)
print(environment_text())
"""


def test_a_variable_that_is_unset_after_the_start_was_read_all_the_same() -> None:
    """oneDNN reads it once in a process."""
    name = "ONEDNN_DEFAULT_FPMATH_MODE"
    command, started = [sys.executable, "-c", UNSET_TOO_LATE.format(name=name)], os.environ | {name: "BF16"}
    said = subprocess.run(command, env=started, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].startswith(f"False {name} is 'BF16', or was at the start")
    assert said[0].endswith("unset it, and start Python anew.")
    assert said[1].startswith("True")
    assert said[2].endswith(f", {name}='BF16' when imported")


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_what_a_variable_was_at_the_start_counts_beside_what_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    pixels = torch.zeros(1)
    for found in (None, "strict", "STRICT"):
        monkeypatch.setitem(_FPMATH_FOUND, name, found)
        require_strict_environment(pixels)
    monkeypatch.setitem(_FPMATH_FOUND, name, "any")
    require_strict_environment(pixels.double())
    with pytest.raises(NoRoundingBound, match=f"^{name} is 'any', or was at the start: "):
        require_strict_environment(pixels)


def of_convolution(conv: Conv) -> Network:
    block = DynamicalBlock(GradientField(conv, "relu"), "euler", FreeSignal(0.5))
    body = nn.Sequential(block, nn.Flatten())
    return Network(body, Head(math.prod(conv.in_shape), 3), conv.in_shape, ModelConfig()).eval()


def proof_on(
    machine: str, conv: Conv, monkeypatch: pytest.MonkeyPatch, arithmetic: str = "float32"
) -> CertificateResult:
    monkeypatch.setattr("platform.machine", lambda: machine)
    data = torch.rand(2, *conv.in_shape, generator=torch.Generator().manual_seed(0)), torch.zeros(2, dtype=torch.int64)
    return certify(of_convolution(conv), data, arithmetic=arithmetic)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv((4, 5, 5), 4, groups=4),
        lambda: Conv((4, 5, 5), 8, groups=4),
        lambda: Conv((1, 5, 5), 3),
        lambda: Conv((3, 5, 5), 1, padding="full"),
        lambda: Conv((4, 5, 5), 2, padding="circular", groups=2),
    ],
    ids=["depthwise", "with a multiplier", "of one channel", "to one channel", "adjoint"],
)
def test_depthwise_convolutions_have_no_proof_where_torch_takes_winograd(
    make: Callable[[], Conv], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 on ARM and RISC-V; torch has no switch for it."""
    conv = make()
    assert proof_on("x86_64", conv, monkeypatch).proved
    for machine in ("arm64", "ARM64", "aarch64", "armv7l", "riscv64"):
        result = proof_on(machine, conv, monkeypatch)
        assert not result.proved
        assert "Winograd's algorithm on this processor" in result.rounding_reason
        assert proof_on(machine, conv, monkeypatch, "float64").proved


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv((4, 5, 5), 4, groups=2),
        lambda: Conv((4, 5, 5), 4, stride=2, groups=4),
        lambda: Conv((4, 7, 7), 4, dilation=2, groups=4),
        lambda: Conv((4, 5, 5), 4, 5, groups=4),
    ],
    ids=["of two channels", "stride", "dilation", "of 25 pixels"],
)
def test_other_convolutions_have_their_proof_everywhere(
    make: Callable[[], Conv], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proof_on("arm64", make(), monkeypatch).proved


def test_full_precision_of_an_older_torch_switches_tf32_of_cudnn_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynablocks.robustness.arithmetic._PRECISION_SWITCHES", ())
    before = torch.backends.cudnn.allow_tf32
    with full_precision():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_pixels_are_within_one_rounding_of_their_value() -> None:
    shades = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        pixels = to_pixels(shades, torch.device("cpu"), dtype)
        assert torch.equal(pixels, (shades.double() / 255).to(dtype))


def test_without_a_proof_the_error_is_measured_and_said_to_be() -> None:
    network = network_of("certified")
    network.body.insert(1, Foreign())
    with torch.no_grad(), evaluating(network), pytest.raises(NoRoundingBound, match="Foreign has no proved bound"):
        rounding_bound(network, images())
    result = certify(network, (images(), torch.zeros(9, dtype=torch.int64)))
    assert not result.proved
    summary = result.summary([0.0])
    assert summary["rounding"] == "measured"
    assert "Foreign has no proved bound" in summary["rounding_reason"]
    assert CertificateResult.restore(summary, result.tensors()).rounding_reason == result.rounding_reason
    assert result.radii.max() == 0


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def certificate_inputs(self) -> tuple[float, Tensor]:
        return 1.0, torch.eye(2)


def test_a_certificate_says_why_its_rounding_is_measured() -> None:
    data = torch.tensor([[[[0.9, 0.1]]]]), torch.tensor([0])
    assert certify(Plain(), data).rounding_reason.startswith("Plain is no dynablocks.models.Network")
    proved = certify(Network(nn.Sequential(nn.Flatten()), Head(2, 2), (1, 1, 2), ModelConfig()), data)
    assert proved.proved
    assert proved.summary([0.0])["rounding_reason"] == ""
    older = {name: value for name, value in proved.summary([0.0]).items() if name != "rounding_reason"}
    assert CertificateResult.restore(older, proved.tensors()).rounding_reason == ""


@pytest.mark.parametrize("name", ["batch_size", "samples"])
def test_counts_of_images_are_whole_numbers_of_any_kind(name: str) -> None:
    network, data = network_of("certified"), (images(2), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=rf"{name} is 2\.5; a whole number from 1 is needed"):
        certify(network, data, **{name: 2.5})
    ours, theirs = (certify(network, data, **{name: number}).radii for number in (2, np.int64(2)))
    assert torch.equal(ours, theirs)


def test_a_body_is_declared_once_however_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No field is asked for anything again: not for the constants of its steps, either."""
    blocks = [DynamicalBlock(GradientField(Dense(128, 8), "relu"), "euler", FreeSignal(0.5)) for _ in range(2)]
    network = Network(nn.Sequential(nn.Flatten(), *blocks), Head(128, 5), (2, 8, 8), ModelConfig()).double().eval()
    asked: list[GradientField] = []
    told = GradientField.facts

    def counted(self: GradientField) -> FieldFacts:
        asked.append(self)
        return told(self)

    monkeypatch.setattr(GradientField, "facts", counted)
    counts = []
    for size in (8, 4):
        asked.clear()
        assert certify(network, (images(5), torch.zeros(8, dtype=torch.int64)), batch_size=size).proved
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0


def test_a_part_is_bounded_once_for_each_shape_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same normalisation before and after pooling: of fewer pixels, the mean is shorter."""
    shared, *twins = (PixelNormalisation((0.3, 0.6), (0.2, 0.3)) for _ in range(3))
    pool, flat = nn.AvgPool2d(2), nn.Flatten()
    leaf, made = rounding._leaf, list[tuple[str, int]]()

    def counted(module: nn.Module, arithmetic: _Arithmetic, pixels: int) -> rounding._Value:
        made.append((type(module).__name__, pixels))
        return leaf(module, arithmetic, pixels)

    monkeypatch.setattr(rounding, "_leaf", counted)
    found = []
    for first, second, known in ((*twins, None), (shared, shared, {})):
        torch.manual_seed(0)
        network = Network(nn.Sequential(first, pool, second, flat), Head(32, 5), (2, 8, 8), ModelConfig()).eval()
        made.clear()
        with torch.no_grad(), evaluating(network), plain_arithmetic():
            parts = [rounding_bound(network, part, known=known)[1] for part in images().split(4)]
        found.append(LogitError.joined(parts))
    assert made == [("PixelNormalisation", 64), ("AvgPool2d", 64), ("PixelNormalisation", 16), ("Flatten", 16)]
    for name in ("features", "head", "head_slope"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    assert found[0].features_slope == found[1].features_slope


def test_gamma_and_formats() -> None:
    assert gamma(4, 0.25) == math.inf
    assert gamma(100, 2.0**-24) == pytest.approx(100 / (2**24 - 100))
    assert unit_roundoff(torch.bfloat16) == 2.0**-8
    with pytest.raises(ValueError, match="arithmetic 'float16'"):
        certify(network_of("certified"), (images(), torch.zeros(9, dtype=torch.int64)), arithmetic="float16")


def test_plain_arithmetic_switches_fast_convolutions_off_and_back() -> None:
    assert torch.get_num_threads() == 1  # with more, torch takes no NNPACK
    x, kernel = torch.rand(1, 8, 8, 8), torch.rand(8, 8, 3, 3)
    before = torch.conv2d(x, kernel)
    with plain_arithmetic():
        assert not torch._C._get_nnpack_enabled()
        assert not torch.backends.cudnn.enabled
        plain = torch.conv2d(x, kernel)
    exact = torch.conv2d(x.double(), kernel.double())
    assert (plain - exact).abs().max() <= gamma(72, 2.0**-24) * exact.abs().max()
    assert torch.equal(torch.conv2d(x, kernel), before)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_plain_arithmetic_undoes_lower_precision_and_restores_it(precision: str) -> None:
    matrix = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    exact = matrix.double() @ matrix.double()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with plain_arithmetic():
            assert ((matrix @ matrix).double() - exact).abs().max() <= gamma(256, 2.0**-24) * exact.max()
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_plain_arithmetic_switches_autocast_off() -> None:
    matrix = torch.rand(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16
        with plain_arithmetic():
            assert (matrix @ matrix).dtype == torch.float32


def test_the_rounding_of_the_image_itself_is_in_the_bound() -> None:
    network = build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10, seed=0).eval()
    pixels = torch.full((1, 1, 8, 8), 1 / 3)
    with torch.no_grad(), frozen_weights(network), plain_arithmetic():
        error = rounding_bound(network, pixels)[1]
    lost = float((pixels.double() - 1 / 3).norm())
    assert lost > 0
    assert float(error.features[0]) > lost
    assert error.features_slope >= 2.0**-24


IN_EITHER_FORMAT = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
"""In float32 what is of second order is lost in a tolerance of 1e-5; in bfloat16 it is a hundredth of the bound."""


@IN_EITHER_FORMAT
def test_errors_pass_through_layers_as_documented(dtype: torch.dtype) -> None:
    """E' = L E + γ₂ L (‖x‖ + 2E) for (x − 0)·4, by hand: no slack hides a missing factor."""
    layers = [PixelNormalisation((0.0,), (0.25,)) for _ in range(3)]
    network = Network(nn.Sequential(*layers, nn.Flatten()), Head(64, 3), (1, 8, 8), ModelConfig()).to(dtype).eval()
    pixels = torch.rand(2, 1, 8, 8).to(dtype)
    with torch.no_grad(), evaluating(network), plain_arithmetic():
        _, bound = rounding_bound(network, pixels)
    unit, size = unit_roundoff(dtype), pixels.double().flatten(1).norm(dim=1)
    start = unit * (1 + 2 * unit)
    error, slope, reach = start * size, start, 1.0
    for _ in range(3):
        error, size = 4 * error + gamma(2, unit) * 4 * (size + 2 * error), 4 * size
        slope, reach = 4 * slope + gamma(2, unit) * 4 * (reach + slope), 4 * reach
    torch.testing.assert_close(bound.features, error, rtol=1e-5, atol=0)
    assert bound.features_slope == pytest.approx(slope, rel=1e-5)


def test_what_underflows_between_two_layers_is_in_the_bound() -> None:
    """1 becomes 1e-30, then 1e-60, which is 0 in float32, and stays 0; exactly, it becomes 1 again."""
    layers = [PixelNormalisation((0.0,), (std,)) for std in (1e30, 1e30, 1e-30, 1e-30)]
    network = Network(nn.Sequential(*layers, nn.Flatten()), Head(64, 3), (1, 8, 8), ModelConfig()).eval()
    features, _, bound, _ = errors(network, torch.ones(1, 1, 8, 8))
    assert 7 < float(features[0]) <= float(bound.features[0])


@pytest.mark.parametrize(("size", "count"), [(2, 4), ((2, 3), 6)])
def test_average_pooling_counts_its_sums_and_its_division(size: int | tuple[int, int], count: int) -> None:
    """γ of n − 1 sums and a division, relative to the mean of n pixels, whose norm is 1/√n."""
    bound = rounding._leaf(nn.AvgPool2d(size), _Arithmetic(torch.zeros(1, 1, 6, 6)), pixels=36)
    assert bound.error.slope >= gamma(count, 2.0**-24) / math.sqrt(count)
    assert bound.size.slope >= 1 / math.sqrt(count)


def test_full_precision_switches_the_tf32_of_convolutions_off_too() -> None:
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has no switch for each operation")
    before = torch.backends.cudnn.conv.fp32_precision
    with full_precision():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_full_precision_keeps_bfloat16_out_of_the_products_of_onednn(kind: str) -> None:
    switch = getattr(torch.backends.mkldnn, kind, None)
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("this torch has no switch for each operation")
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "bf16"
        with full_precision():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = before


def test_what_may_emulate_products_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
    require_strict_environment(torch.zeros(1, dtype=torch.float64))
    elsewhere = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)
    with pytest.raises(NoRoundingBound, match="cuBLAS may emulate"):
        require_strict_environment(elsewhere)
    with pytest.raises(NoRoundingBound, match="type meta"):
        require_strict_environment(torch.zeros(1, device="meta"))


def test_weights_are_made_in_the_arithmetic_that_is_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("certified")
    allowed: list[bool] = []
    original = OrthogonalConv.compute_weight

    def noted(linear: OrthogonalConv) -> Tensor:
        allowed.append(torch.backends.cudnn.enabled)
        return original(linear)

    monkeypatch.setattr(OrthogonalConv, "compute_weight", noted)
    certify(network, (torch.rand(2, *network.input_shape), torch.zeros(2, dtype=torch.int64)), arithmetic="float32")
    assert allowed
    assert not any(allowed)


SIGNED_MAPS: dict[str, Callable[[], LinearMap]] = {
    "dense": lambda: OrthogonalDense(16, 16),
    "circular": lambda: OrthogonalConv((4, 4, 4)),
    "strided, in groups": lambda: Conv((4, 5, 5), 4, 3, stride=2, groups=2),
    "of channels": lambda: ChannelMix((8, 2, 2), 4),
}
EVERY_SIGNED_MAP = pytest.mark.parametrize("make", SIGNED_MAPS.values(), ids=SIGNED_MAPS)


@EVERY_SIGNED_MAP
def test_weights_of_both_signs_count_by_their_sizes(make: Callable[[], LinearMap]) -> None:
    linear = make()
    bound = rounding._absolute_norm(linear)
    assert bound >= float(torch.linalg.matrix_norm(linear.dense_matrix().abs(), ord=2))
    if isinstance(linear, OrthogonalDense):  # the norm of A itself would not do
        assert bound > 1.5 * linear.norm_bounds().upper


@EVERY_SIGNED_MAP
def test_products_of_both_signs_count_by_their_sizes_at_an_image(make: Callable[[], LinearMap]) -> None:
    """At least u(‖A‖(n + 4)‖|A||x|‖ + (m + 4)‖|A|ᵀσ(Ax)‖), with n and m products a sum of A and of Aᵀ."""
    linear = make()
    x = torch.randn(8, *linear.in_shape)
    matrix, flat = linear.dense_matrix(), x.double().flatten(1)
    inner, outer = (int((matrix != 0).sum(axis).max()) + 4 for axis in (1, 0))
    into = (flat.abs() @ matrix.abs().mT).norm(dim=1)
    back = ((flat @ matrix.mT).relu() @ matrix.abs()).norm(dim=1)
    least = 2.0**-24 * (torch.linalg.matrix_norm(matrix, ord=2) * inner * into + outer * back)
    with torch.no_grad():
        here, _ = rounding._ridge_euler_near(GradientField(linear, "relu", bias=False), 1.0, _Arithmetic(x), x)
    assert (here >= least).all()


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, ord=2))


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_two_matrices_count_both_products_the_decay_and_the_sums(decay: float) -> None:
    """Of x + h(AᵀReLU(Bx) − cx): γ of each product, two roundings of cx and of h times the rest, one of each sum."""
    field, h = TwoMatrixField(Dense(4, 3), Dense(4, 3), "relu", decay=decay, bias=False), 0.7
    with torch.no_grad():
        field.outer.matrix.mul_(3)
    inner, outer = field.inner.dense_matrix(), field.outer.dense_matrix()
    products = (4 + 4) * spectral(outer) * spectral(inner.abs()) + (3 + 4) * spectral(outer.abs()) * spectral(inner)
    later = 4 if decay else 3
    moved = products + later * spectral(outer) * spectral(inner) + (2 + later) * decay
    bound = rounding._two_matrices(field, h, _Arithmetic(torch.zeros(1, 1, 2, 2)))
    assert bound.error.slope >= 2.0**-24 * (1 + h * moved)


@pytest.mark.parametrize("h", [-0.7, 0.7])
def test_ridge_steps_count_both_products_the_activation_and_the_sum(h: float) -> None:
    """Of x + hαAᵀσ(Ax): γ of each product, two roundings of a leaky σ, one of the sum."""
    field = GradientField(Dense(4, 3), leaky_relu(0.5), alpha=0.6, bias=False)
    matrix = field.linear.dense_matrix()
    norm, absolute = spectral(matrix), spectral(matrix.abs())
    moved = (4 + 4 + 3 + 4) * norm * absolute + 2 * norm**2
    arithmetic, least = _Arithmetic(torch.zeros(1, 1, 2, 2)), 2.0**-24 * (1 + 0.6 * abs(h) * moved)
    with torch.no_grad():
        _, growth = rounding._ridge_euler_near(field, h, arithmetic, torch.zeros(1, 4))
    assert growth >= least
    assert rounding._ridge_euler(field, h, arithmetic).error.slope >= least


BIASED: dict[str, Callable[[], LinearMap]] = {"dense": lambda: Dense(4, 3), "convolution": lambda: Conv((2, 4, 4), 3)}


@pytest.mark.parametrize("make", BIASED.values(), ids=BIASED)
def test_ridge_steps_count_the_bias_and_every_rounding_beside_it(make: Callable[[], LinearMap]) -> None:
    """At least u(h(‖A‖(w + ‖σ(v)‖) + (m + 4)‖|A|ᵀ|σ(v)|‖) + ‖x‖) at an image, for v = Ax + b, and from norms for x = 0.

    In w = (n + 4)(‖|A||x|‖ + ‖b‖) + 2‖v‖ are the product with A and the activation.
    """
    field, h = GradientField(make(), leaky_relu(0.5)), 3.0
    with torch.no_grad():
        field.bias.fill_(5.0)
    matrix = field.linear.dense_matrix()
    bias, norm = torch.full((len(matrix),), 5.0, dtype=torch.float64), spectral(matrix)
    inner, outer = (int((matrix != 0).sum(axis).max()) + 4 for axis in (1, 0))

    def least(x: Tensor) -> float:
        flat = x.double().flatten()
        v = matrix @ flat + bias
        active = functional.leaky_relu(v, 0.5)
        wrong = inner * ((matrix.abs() @ flat.abs()).norm() + bias.norm()) + 2 * v.norm()
        moved = norm * (wrong + active.norm()) + outer * (active.abs() @ matrix.abs()).norm()
        return 2.0**-24 * float(h * moved + flat.norm())

    black = torch.zeros(1, *field.linear.in_shape)
    arithmetic = _Arithmetic(black)
    for x in (black, torch.randn(black.shape)):
        with torch.no_grad():
            here, _ = rounding._ridge_euler_near(field, h, arithmetic, x)
        assert float(here[0]) >= least(x)
    assert rounding._ridge_euler(field, h, arithmetic).error.constant >= least(black)


@pytest.mark.parametrize("whitened", [False, True])
def test_metric_steps_count_both_whitenings_both_products_and_the_sum(whitened: bool) -> None:
    """Of x + hWᵀReLU(WMx), with M = R² in two factors, or of x + hR⁻¹AᵀReLU(ARx): R^{±1} is rounded once each time."""
    field, h = MetricField(Dense(3, 4), MetricField.example().metric, "relu", whitened=whitened, bias=False), 0.7
    low, _, high = torch.linalg.eigvalsh(field.metric.matrix).tolist()
    matrix, grown = field.linear.dense_matrix(), math.sqrt(high / low) if whitened else high
    norm, absolute = spectral(matrix), spectral(matrix.abs())
    moved = grown * ((3 + 4 + 4 + 4) * norm * absolute + (2 + 2 + 1) * norm**2)
    bound = rounding._metric_euler(field, h, _Arithmetic(torch.zeros(1, 1, 2, 2)))
    assert bound.error.slope >= 2.0**-24 * (1 + h * moved)


def test_bounds_of_steps_back_are_those_of_steps_forward() -> None:
    arithmetic, x = _Arithmetic(torch.zeros(1, 1, 2, 2)), torch.randn(3, 4)
    ridge = GradientField(OrthogonalDense(4, 3), leaky_relu(0.5), alpha=0.6)
    two, metric = TwoMatrixField(Dense(4, 3), Dense(4, 3), "relu", decay=0.4), MetricField.example()
    for bound in (
        lambda h: rounding._ridge_euler(ridge, h, arithmetic).error,
        lambda h: rounding._two_matrices(two, h, arithmetic).error,
        lambda h: rounding._metric_euler(metric, h, arithmetic).error,
        lambda h: rounding._recursion(ExplicitEuler(3), ridge, torch.tensor(h), arithmetic).local,
    ):
        assert bound(-0.7) == bound(0.7)
        assert 0 < bound(0.7).slope < bound(1.4).slope
    with torch.no_grad():
        back, forward = (rounding._ridge_euler_near(ridge, h, arithmetic, x) for h in (-0.7, 0.7))
    assert torch.equal(back[0], forward[0])
    assert bool((forward[0] > 0).all())
    assert back[1] == forward[1] > 0


def test_bounds_of_negative_factors_are_those_of_their_sizes() -> None:
    arithmetic = _Arithmetic(torch.zeros(1, 1, 4, 4))
    ridge, lift = GradientField(Dense(4, 3), "relu", alpha=0.6), PaperLift((1, 4, 4), 3)
    two = TwoMatrixField(Dense(4, 3), Dense(4, 3), "relu", decay=0.4)

    def bounds() -> list[rounding._Affine]:
        return [
            rounding._ridge_euler(ridge, 0.7, arithmetic).error,
            rounding._two_matrices(two, 0.7, arithmetic).error,
            rounding._leaf(lift, arithmetic, pixels=16).error,
        ]

    before = bounds()
    assert all(bound.slope > 0 for bound in before)
    with torch.no_grad():
        ridge.alpha.neg_()
        lift.alpha.neg_()
        two.decay = -two.decay
    assert bounds() == before


@pytest.mark.parametrize("expansive", [False, True])
@pytest.mark.parametrize("time", [0.0625, 0.5, 3.0, 10.0])
def test_exact_flows_count_the_documented_roundings(time: float, expansive: bool) -> None:
    """γ_{7 + ⌈4|t|⌉} of the argument and of what it grows to; a map of two numbers adds less than that."""
    field = GradientField(OrthogonalDense(2, 1), leaky_relu(0.5), expansive=expansive)
    for t in (-time, time):
        local = rounding._flow(ExactFlow(), field, torch.tensor(t), _Arithmetic(torch.zeros(1, 1, 1, 2))).local
        grown = math.exp(max(0.0, t if expansive else -t))
        assert local.slope >= (1 + grown) * gamma(7 + math.ceil(4 * time), 2.0**-24)


@pytest.mark.parametrize("substeps", [3, 5, 16])
def test_substeps_as_one_recursion_count_the_documented_roundings(substeps: int) -> None:
    """γ_{6S + 1} of the argument and of what it grows to."""
    field = GradientField(OrthogonalDense(2, 1), leaky_relu(0.5))
    arithmetic = _Arithmetic(torch.zeros(1, 1, 1, 2))
    local = rounding._recursion(ExplicitEuler(substeps), field, torch.tensor(0.25), arithmetic).local
    grown = (1 + 0.25 / substeps) ** substeps
    assert local.slope >= (1 + grown) * gamma(6 * substeps + 1, 2.0**-24)


@IN_EITHER_FORMAT
def test_errors_in_another_norm_pass_through_layers_as_documented(dtype: torch.dtype) -> None:
    """As above, by hand, with the ratios of the norm on images to ℓ2 and back: 1.1 < low < high."""
    metric = SpectralMetric((1, 4, 4), smooth=4.0)
    body = nn.Sequential(Channelwise(PixelNormalisation((0.0,), (0.25,)), metric), Whitening(metric), nn.Flatten())
    network = Network(body, Head(16, 3), (1, 4, 4), ModelConfig()).to(dtype).eval()
    pixels = torch.rand(2, 1, 4, 4).to(dtype)
    with torch.no_grad(), evaluating(network), plain_arithmetic():
        _, bound = rounding_bound(network, pixels)
    low, high = (math.sqrt(value) for value in metric.eigenvalues)
    assert 1.1 < low < high
    unit, size = unit_roundoff(dtype), pixels.double().flatten(1).norm(dim=1)
    start = unit * (1 + 2 * unit) * high
    two, error, slope, reach = gamma(2, unit), start * size, start, high
    error = 4 * error + high * two * 4 * (size + 2 * error / low)
    slope = 4 * slope + high * two * 4 * (reach + slope) / low
    size, reach = 4 * size, 4 * reach
    error, slope = error + unit * high * (size + 2 * error / low), slope + unit * high * (reach + slope) / low
    torch.testing.assert_close(bound.features, error, rtol=1e-5, atol=0)
    assert bound.features_slope == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_lost_beside_a_bias_is_in_the_bound(inside: bool) -> None:
    """1 + 2^-25 is 1 in float32."""
    head, field = Head(1, 2, "none"), TwoMatrixField(Dense(1, 1), Dense(1, 1), "relu")
    with torch.no_grad():
        head.matrix.copy_(torch.tensor([[1.0 if inside else 2.0**-25], [0.0]]))
        head.bias.copy_(torch.tensor([0.0 if inside else 1.0, 0.0]))
        field.inner.matrix.fill_(2.0**-15)
        field.outer.matrix.fill_(1.0)
        field.bias.fill_(1.0)
    step = DynamicalBlock(field, "euler", FreeSignal(1.0)) if inside else nn.Identity()
    body = nn.Sequential(PixelNormalisation((0.0,), (1.0,)), nn.Flatten(), step)
    pixels = torch.full((1, 1, 1, 1), 2.0**-10 if inside else 1.0)
    features, wrong, bound, norms = errors(Network(body, head, (1, 1, 1), ModelConfig()).eval(), pixels)
    assert float((features if inside else wrong[:, 0])[0]) == 2.0**-25
    assert (features <= bound.features).all()
    assert (wrong <= bound.of_logits(norms)).all()


def factors_that_cancel() -> Network:
    """z = ∓6 (x₁ + x₂) by way of 3e38 (x₁ + x₂), which is no float32 from x₁ + x₂ = 1.135 on: then z is NaN."""
    body = nn.Sequential(nn.Flatten(), Dense(2, 2), Dense(2, 1))
    network = Network(body, Head(1, 2, "none"), (1, 1, 2), ModelConfig()).eval()
    with torch.no_grad():
        body[1].matrix.fill_(3e38)
        body[2].matrix.copy_(torch.tensor([[4e-38, -2e-38]]))
        network.head.matrix.copy_(torch.tensor([[-1.0], [1.0]]))
    return network


def a_field_beyond_the_step() -> Network:
    """z = ±0.91² · 1e10 x by way of X(x) = −9e38 x, which is no float32 from x = 0.378 on: then z is ∓∞."""
    lift, linear, head = Dense(1, 1), Dense(1, 1), Head(1, 2, "none")
    with torch.no_grad():
        lift.matrix.fill_(1e10)
        linear.matrix.fill_(3e14)
        head.matrix.copy_(torch.tensor([[1.0], [-1.0]]))
    block = DynamicalBlock(GradientField(linear, "relu", bias=False), ExplicitEuler(2), FreeSignal(2e-30))
    return Network(nn.Sequential(nn.Flatten(), lift, block), head, (1, 1, 1), ModelConfig()).eval()


@pytest.mark.parametrize(
    ("make", "at", "near", "label", "part"),
    [(factors_that_cancel, (0.5, 0.5), (0.6, 0.6), 1, "Dense"), (a_field_beyond_the_step, (0.3,), (0.4,), 0, "Block")],
)
def test_where_a_number_may_overflow_nothing_is_proved(
    make: Callable[[], Network], at: tuple[float, ...], near: tuple[float, ...], label: int, part: str
) -> None:
    network, here, there = make(), torch.tensor([[[at]]]), torch.tensor([[[near]]])
    single, double = (certify(network, (here, torch.tensor([label])), arithmetic=f"float{n}") for n in (32, 64))
    assert not single.proved
    assert re.search(rf"inside \w*{part} are bounded by .* only, .* may overflow", single.rounding_reason)
    # What float64 proves of itself float32 breaks.
    assert double.proved
    assert float((there - here).norm()) < double.radii.item()
    assert network.double()(there.double()).argmax() == label
    logits = network.float()(there)
    assert not bool(torch.isfinite(logits).all())
    assert float(logits[0, label]) != float(logits.max())


def test_a_head_may_overflow_too() -> None:
    network = Network(nn.Sequential(nn.Flatten()), Head(2, 2, "none"), (1, 1, 2), ModelConfig()).eval()
    with torch.no_grad():
        network.head.matrix.copy_(torch.tensor([[3e38, 3e38], [0.0, 0.0]]))
    data = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])
    assert "inside Head" in certify(network, data, arithmetic="float32").rounding_reason
    assert certify(network, data).proved


class LargestActivation(TorchDispatchMode):
    """The largest number in any result that has a row for each sample."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, self.found = samples, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # New memory and views, of that too, hold what nobody has written yet.
        shared = [given.alias_info for given in func._schema.returns]
        written = "empty" not in str(func) and all(info is None or info.is_write for info in shared)
        numbers = written and isinstance(result, Tensor) and result.is_floating_point()
        if numbers and result.ndim > 1 and len(result) == self.samples:
            self.found = max(self.found, float(result.abs().max()))
        return result


@pytest.mark.parametrize("name", [*CASES, *BY_HAND])
def test_no_activation_inside_a_step_exceeds_what_bounds_all_numbers_in_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, seen = rounding._Chain.take, list[tuple[float, float]]()

    def watched(chain: rounding._Chain, step: rounding._Step, part: str) -> None:
        with LargestActivation(len(chain.x)) as largest:
            step.function(chain.x)
        size, _ = chain.size()
        seen.append((largest.found, step.peak.slope * float(size.max()) + step.peak.constant))
        take(chain, step, part)

    monkeypatch.setattr(rounding._Chain, "take", watched)
    errors(network_of(name), images())
    assert max(found for found, _ in seen) > 0
    assert all(found <= peak for found, peak in seen)
