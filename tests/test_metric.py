"""Non-expansive in ‖·‖_M: norms, field, network and certificates, held against dense float64 matrices."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import (
    ConstrainedField,
    EvenPotential,
    FieldFacts,
    GradientField,
    MetricField,
    ShearField,
    leaky_relu,
)
from dynablocks.fields import metric as metric_module
from dynablocks.fields.symmetric import conservative_field
from dynablocks.integrators import ExactFlow
from dynablocks.lifting import Head, PixelNormalisation, ZeroLift
from dynablocks.linear import Conv, Dense, LinearMap, OrthogonalConv, OrthogonalDense
from dynablocks.models import ModelConfig, Network, build
from dynablocks.norms import Channelwise, DenseMetric, SpectralMetric, Whitening, smooth_modes
from dynablocks.properties import EUCLIDEAN, Declaration, Lipschitz, Metric, Structured, Symplectic, declare, verify
from dynablocks.properties.jacobians import jacobians
from dynablocks.robustness import CertificateResult, certified_radii, certify, check_sound
from dynablocks.robustness.attacks import AttackConfig, attack
from dynablocks.switching import FreeSignal, LearnedStep
from dynablocks.testing import HOSTILE, check_block

TINY = ModelConfig("metric", widths=(3, 8), layers=(1, 1), metric_smooth=0.01, metric_wavelength=8.0)


def random_spd(size: int, condition: float = 20.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)
    return basis * values @ basis.mT


def matrices(metric: Metric, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """M, M^{1/2} and M^{−1/2} as dense matrices; the roots are scipy's."""
    size = math.prod(shape)
    units = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    matrix = metric.whiten(metric.whiten(units)).reshape(size, size)
    root = torch.as_tensor(scipy.linalg.sqrtm(matrix.numpy()).real)
    return matrix, root, torch.linalg.inv(root)


def grid_laplacian(height: int, width: int) -> Tensor:
    def path(size: int) -> Tensor:
        steps = torch.diff(torch.eye(size, dtype=torch.float64), dim=0)
        return steps.mT @ steps

    eye_h, eye_w = torch.eye(height, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    return torch.kron(path(height), eye_w) + torch.kron(eye_h, path(width))


@pytest.mark.parametrize(("smooth", "wavelength"), [(0.01, None), (5.0, 3.0), (1.0, 4.0)])
def test_the_spectral_metric_is_a_function_of_the_images_laplacian(smooth: float, wavelength: float | None) -> None:
    metric = SpectralMetric((2, 4, 5), smooth, wavelength)
    squared = torch.linalg.matrix_power(grid_laplacian(4, 5), 2)
    cutoff = (2 * math.pi / (wavelength or 5.0)) ** 4 * torch.eye(20, dtype=torch.float64)
    one = torch.linalg.solve(cutoff + squared, smooth * cutoff + squared)
    expected = torch.block_diag(one, one)
    matrix, root, _ = matrices(metric, (2, 4, 5))
    assert torch.allclose(matrix, expected, rtol=0, atol=1e-12)
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    assert torch.allclose(metric.whiten(x).flatten(1), x.flatten(1) @ root, rtol=0, atol=1e-12)
    assert torch.allclose(
        metric.norm(x) ** 2, ((x.flatten(1) @ expected) * x.flatten(1)).sum(1), rtol=1e-12, atol=1e-12
    )
    assert torch.allclose(metric.unwhiten(metric.whiten(x)), x, rtol=1e-12, atol=1e-12)
    low, high = metric.eigenvalues
    values = torch.linalg.eigvalsh(expected)
    assert low <= values[0] * (1 + 1e-12)
    assert values[-1] <= high * (1 + 1e-12)
    assert low == pytest.approx(float(values[0]))
    assert high == pytest.approx(float(values[-1]))


def test_modes_are_scipys_cosines_and_their_largest_weight_is_attained() -> None:
    basis = smooth_modes(8, 6, 2)
    coefficients = scipy.fft.dctn(basis.numpy(), axes=(1, 2), norm="ortho")
    assert abs(coefficients).sum() == pytest.approx(4)
    assert coefficients[1, 0, 1] == pytest.approx(1)
    metric = SpectralMetric((1, 8, 6), 0.01)
    assert float(metric.norm(basis[:, None]).max()) == pytest.approx(metric.largest_on_modes(2))


def test_modes_are_counted_in_whole_numbers_of_any_kind() -> None:
    metric = SpectralMetric((1, 8, 6), 0.01)
    assert metric.largest_on_modes(np.int64(2)) == metric.largest_on_modes(2)
    assert torch.equal(smooth_modes(8, 6, np.int64(2)), smooth_modes(8, 6, 2))
    for ask, most in ((metric.largest_on_modes, 8), (lambda modes: smooth_modes(8, 6, modes), 6)):
        with pytest.raises(InvalidArgument, match=rf"modes is 2\.5; a whole number from 1 to {most} is needed"):
            ask(2.5)


def test_the_dense_metric_has_scipys_root_and_its_inverse() -> None:
    matrix = random_spd(5)
    metric = DenseMetric(matrix)
    assert torch.allclose(metric.root, torch.as_tensor(scipy.linalg.sqrtm(matrix.numpy()).real), rtol=1e-12, atol=1e-12)
    assert torch.allclose(metric.root @ metric.inverse_root, torch.eye(5, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert metric == DenseMetric(matrix.clone())
    assert hash(metric) == hash(copy.deepcopy(metric))
    assert metric != DenseMetric(2 * matrix)
    assert metric != EUCLIDEAN
    assert metric.norm(torch.ones(1, 5)).dtype == torch.float32
    assert DenseMetric(matrix.float()).fits((5,))
    assert not metric.fits((1, 5))


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(2, 3), "a square matrix is needed"),
        (torch.ones(3), "a square matrix of floating-point numbers"),
        (torch.eye(2).long(), "floating-point"),
        ([[1.0]], "M is list"),
        (torch.tensor([[1.0, 0.1], [0.0, 1.0]]), "differs from its transpose by 0.1"),
        (torch.diag(torch.tensor([1.0, -1.0])), "positive definite"),
        (torch.ones(2, 2), "positive definite"),
        (torch.zeros(2, 2), "positive definite"),
        (torch.tensor([[math.nan]]), "NaN"),
    ],
)
def test_a_matrix_that_gives_no_norm_is_refused(matrix: Tensor, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        DenseMetric(matrix)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="another number of entries"):
        DenseMetric(torch.eye(4), (3,))
    for options in ({"smooth": 0.0}, {"smooth": math.nan}, {"wavelength": 0.5}):
        with pytest.raises(InvalidArgument):
            SpectralMetric((1, 4, 4), **options)
    with pytest.raises(InvalidArgument, match="3 positive sizes"):
        SpectralMetric((4, 4))
    with pytest.raises(InvalidArgument, match=r"one of samples \(1, 4, 4\)"):
        SpectralMetric((1, 4, 4)).norm(torch.zeros(2, 1, 5, 5))
    with pytest.raises(InvalidArgument, match="has another shape"):
        MetricField(Dense(3, 3), DenseMetric(torch.eye(2)))
    with pytest.raises(InvalidArgument, match="across channels only"):
        Channelwise(nn.MaxPool2d(2), SpectralMetric((1, 4, 4)))
    with pytest.raises(InvalidArgument, match="exact flow needs"):
        DynamicalBlock(MetricField.example(), ExactFlow(), FreeSignal(1.0))(torch.zeros(2, 3))


class Shuffled(ZeroLift):
    """A permutation of pixels, of constant 1 in ℓ2: it makes noise of shading."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., [0, 2, 1, 3]]

    def declare(self) -> Declaration:
        return Declaration.of(Lipschitz(1.0), reason="a permutation")


class Weighted(SpectralMetric):
    """Whatever it changes, what is proved of its base is not known of it."""


def test_the_constant_across_channels_is_of_known_layers_and_norms_alone() -> None:
    metric, shuffled = SpectralMetric((1, 4, 4), smooth=0.01), Shuffled(1, 1)
    shading = smooth_modes(4, 4, 2)[1:2, None]
    assert float(metric.norm(shuffled(shading))) > 2 * float(metric.norm(shading))
    with pytest.raises(InvalidArgument, match="module is a Shuffled, which is not known to act across channels only"):
        Channelwise(shuffled, metric)
    for other in (DenseMetric(torch.eye(16), (1, 4, 4)), Weighted((1, 4, 4)), EUCLIDEAN):
        with pytest.raises(InvalidArgument, match=f"metric is a {type(other).__name__}, .* give a SpectralMetric"):
            Channelwise(ZeroLift(1, 1), other)


def test_a_constant_across_channels_is_that_of_the_layer_and_the_norm_that_are_there_now() -> None:
    metric, other = SpectralMetric((1, 4, 4), smooth=0.01), SpectralMetric((1, 4, 4), smooth=4.0)
    layer = Channelwise(ZeroLift(1, 3), metric, 3)
    layer.metric = other
    (stated,) = layer.properties
    assert stated == Lipschitz(1.0, other, SpectralMetric((3, 4, 4), smooth=4.0))
    verify(layer, torch.randn(3, 1, 4, 4)).require()
    for name, part in (("module", Shuffled(1, 3)), ("metric", Weighted((1, 4, 4)))):
        spoilt = Channelwise(ZeroLift(1, 3), metric, 3)
        setattr(spoilt, name, part)
        assert not spoilt.properties
        assert "which is not known to " in spoilt.declare().reason


def test_ratios_of_norms_and_the_dual_are_those_of_the_matrices() -> None:
    one, other = SpectralMetric((1, 3, 4), 0.05), SpectralMetric((1, 3, 4), 4.0, 3.0)
    (_, root, inverse), (_, _, other_inverse) = matrices(one, (1, 3, 4)), matrices(other, (1, 3, 4))
    exact = float(torch.linalg.matrix_norm(root @ other_inverse, ord=2))
    assert exact <= one.bounded_by(other) <= exact * (1 + 1e-9)
    euclidean = float(torch.linalg.matrix_norm(root, ord=2))
    assert euclidean <= one.bounded_by(EUCLIDEAN) <= euclidean * (1 + 1e-9)
    assert float(torch.linalg.matrix_norm(inverse, ord=2)) <= EUCLIDEAN.bounded_by(one)
    assert one.bounded_by(one) == 1
    dense = DenseMetric(random_spd(12), (1, 3, 4))
    crossed = float(torch.linalg.matrix_norm(matrices(dense, (1, 3, 4))[1] @ inverse, ord=2))
    assert crossed <= dense.bounded_by(one) * (1 + 1e-12)
    w = torch.randn(2, 12, dtype=torch.float64)
    assert torch.allclose(one.dual(w), w @ inverse, rtol=1e-12, atol=1e-12)


def test_certified_radii_in_a_metric_use_the_dual_norm_of_the_differences() -> None:
    matrix = random_spd(4)
    metric, weight = DenseMetric(matrix), torch.randn(3, 4, dtype=torch.float64)
    x = torch.randn(50, 4, dtype=torch.float64)
    radii = certified_radii(x @ weight.mT, metric.dual(weight), 1.0)
    inverse = torch.linalg.inv(matrix)
    logits = x @ weight.mT
    for sample, radius in zip(logits, radii, strict=True):
        i = int(sample.argmax())
        gaps = {j: weight[i] - weight[j] for j in range(3) if j != i}
        exact = min(float((sample[i] - sample[j]) / (gap @ inverse @ gap).sqrt()) for j, gap in gaps.items())
        assert float(radius) == pytest.approx(exact, rel=1e-9)


def test_constants_compose_only_where_their_norms_meet() -> None:
    m, n = DenseMetric(random_spd(3)), DenseMetric(random_spd(3, seed=1))
    assert Lipschitz(1.0, m).then(Lipschitz(1.0)) is None
    assert Lipschitz(1.0, m).then(Lipschitz(1.0, n)) is None
    assert Lipschitz(1.0).then(Lipschitz(1.0, m)) is None
    assert Lipschitz(0.5, m, EUCLIDEAN).then(Lipschitz(2.0)).to == EUCLIDEAN
    assert Lipschitz(1.0, m, m) == Lipschitz(1.0, m)
    assert Lipschitz(1.0, m).then(Lipschitz(1.0, m)).image == m
    block, other = (DynamicalBlock(MetricField(Dense(3, 3), metric), "euler", FreeSignal(0.1)) for metric in (m, n))
    assert declare(nn.Sequential(block, OrthogonalDense(3, 3))).properties.of(Lipschitz) is None
    assert "does not compose" in declare(nn.Sequential(block, other)).losses[0]
    assert declare(nn.Sequential(block, other)).properties.lipschitz == math.inf
    whole = declare(nn.Sequential(block, Whitening(m), OrthogonalDense(3, 3))).properties
    assert whole.lipschitz_in(m, EUCLIDEAN) <= 1 + 1e-5
    assert whole.lipschitz == math.inf
    mixed = DynamicalBlock([MetricField(Dense(3, 3), m), GradientField(Dense(3, 3))], "euler", _pair())
    assert mixed.properties.of(Lipschitz) is None


def _pair() -> object:
    from dynablocks.switching import REGIONS, PrescribedSignal

    return PrescribedSignal(REGIONS["tight"](), (1.0, 0.1))


FIELDS = {
    "square": lambda: MetricField(Dense(3, 3), DenseMetric(random_spd(3)), leaky_relu(0.5)),
    "tall": lambda: MetricField(Dense(3, 5), DenseMetric(random_spd(3)), leaky_relu(0.5)),
    "wide": lambda: MetricField(Dense(5, 2), DenseMetric(random_spd(5)), leaky_relu(0.5)),
    "expansive": lambda: MetricField(Dense(3, 4), DenseMetric(random_spd(3)), leaky_relu(0.5), expansive=True),
    "orthogonal in coordinates": lambda: MetricField(
        OrthogonalDense(4, 4), DenseMetric(random_spd(4)), "relu", whitened=True
    ),
    "ill-conditioned": lambda: MetricField(Dense(4, 4), DenseMetric(random_spd(4, 1e6)), leaky_relu(0.5)),
    "ill-conditioned, in coordinates": lambda: MetricField(
        OrthogonalDense(4, 4), DenseMetric(random_spd(4, 1e6)), whitened=True
    ),
    "convolution": lambda: MetricField(Conv((2, 3, 3), 3), SpectralMetric((2, 3, 3), 0.01), "relu"),
    "orthogonal convolution in coordinates": lambda: MetricField(
        OrthogonalConv((2, 3, 3)), SpectralMetric((2, 3, 3), 0.01), whitened=True
    ),
}
EVERY_FIELD = pytest.mark.parametrize("name", FIELDS)


def largest_norm(module: nn.Module, metric: Metric, x: Tensor) -> float:
    """max ‖M^{1/2} J M^{−1/2}‖₂ over the samples, from dense float64 Jacobians."""
    _, root, inverse = matrices(metric, tuple(x.shape[1:]))
    return float(torch.linalg.matrix_norm(root @ jacobians(module, x) @ inverse, ord=2).max())


@EVERY_FIELD
@pytest.mark.parametrize("step", [0.3125, 1.75, -0.5])
def test_the_declared_constant_is_the_largest_jacobian_in_the_metric(name: str, step: float) -> None:
    torch.manual_seed(0)
    field = FIELDS[name]().double()
    declared, _ = field.euler_constant(step)
    block = DynamicalBlock(field, "euler", FreeSignal(step)).double()
    stated = block.properties.of(Lipschitz)
    assert stated.metric == field.metric
    assert stated.constant == declared
    x = torch.randn(8, *field.in_shape, dtype=torch.float64)
    measured = []
    for shift in (0.0, 1e5, -1e5):
        with torch.no_grad():
            field.bias.fill_(shift)
        measured.append(largest_norm(block, field.metric, x))
    # With every unit active, or none, one of the two ends of the spectrum is attained.
    assert max(measured) <= declared * (1 + 1e-9)
    assert max(measured) >= declared * (1 - 1e-6)


def test_the_field_is_the_papers_up_to_the_misprint() -> None:
    field = MetricField(Dense(3, 4), DenseMetric(random_spd(3)), leaky_relu(0.5)).double()
    w, m, x = field.linear.matrix.detach(), field.metric.matrix, torch.randn(6, 3, dtype=torch.float64)
    expected = -leaky_relu(0.5)(x @ m @ w.mT + field.bias) @ w
    assert torch.allclose(field(x), expected, rtol=1e-12, atol=1e-12)
    largest = float(torch.linalg.eigvalsh(w @ m @ w.mT).max())
    assert field.facts().lipschitz == pytest.approx(largest)
    one_sided = ((field(x) - field(x + 1)) @ m * (x - (x + 1))).sum(1)
    assert bool((one_sided <= 1e-12).all())


def test_a_map_too_large_to_be_formed_is_bounded_by_both_ends_of_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """σ_min(W) λ_min(M)^{1/2} and ‖W‖ λ_max(M)^{1/2}; W M^{1/2} itself has the singular values 6 and 1/2."""
    monkeypatch.setattr(metric_module, "DENSE_ENTRIES", 0)
    metric = DenseMetric(torch.diag(torch.tensor([4.0, 0.25], dtype=torch.float64)))
    field = MetricField(Dense(2, 2), metric).double()
    with torch.no_grad():
        field.linear.matrix.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    smallest, largest, method = field.singular_values()
    assert (smallest, largest) == pytest.approx((0.5, 6.0), rel=1e-12, abs=0)
    assert smallest <= 0.5
    assert largest >= 6.0
    assert method == "‖W‖‖M^{1/2}‖"


@EVERY_FIELD
def test_a_step_conforms_before_and_after_training_and_under_hostile_parameters(name: str) -> None:
    torch.manual_seed(1)
    check_block(DynamicalBlock(FIELDS[name](), "euler", LearnedStep(0.75))).require()


@pytest.mark.parametrize("spoil", [*HOSTILE.values(), lambda p: p * torch.tensor([1e-3, *[1.0] * 3])])
@pytest.mark.parametrize("condition", [2.0, 1e6])
def test_the_declared_constant_survives_hostile_weights(spoil: object, condition: float) -> None:
    field = MetricField(Dense(4, 4), DenseMetric(random_spd(4, condition)), "relu").double()
    with torch.no_grad():
        field.linear.matrix.copy_(spoil(field.linear.matrix))
    block = DynamicalBlock(field, "euler", FreeSignal(0.5)).double()
    declared = block.properties.lipschitz_in(field.metric)
    assert largest_norm(block, field.metric, torch.randn(64, 4, dtype=torch.float64)) <= declared * (1 + 1e-9)


@pytest.mark.parametrize("method", ["heun", "rk4"])
def test_runge_kutta_steps_are_non_expansive_in_the_metric(method: str) -> None:
    field = MetricField(Dense(3, 4), DenseMetric(random_spd(3)), "relu")
    block = DynamicalBlock(field, method, FreeSignal(1.5 / field.facts().lipschitz))
    assert block.properties.lipschitz_in(field.metric) == 1
    assert block.properties.lipschitz == math.inf
    check_block(block).require()


def test_a_pair_of_fields_in_one_metric_stays_in_it() -> None:
    metric = DenseMetric(random_spd(3))
    fields = [
        MetricField(OrthogonalDense(3, 3), metric, leaky_relu(0.5), expansive=expansive, whitened=True)
        for expansive in (False, True)
    ]
    block = DynamicalBlock(fields, "euler", _pair())
    assert block.properties.lipschitz_in(metric) <= 1 + 1e-5
    check_block(block).require()


class Misprinted(MetricField):
    """(B.1) as it is printed: −WᵀΣ(MWz + b)."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.metric.whiten(self.metric.whiten(self.linear(x)))
        return -self.linear.adjoint(self.sigma(inner + self.bias))

    def facts(self) -> FieldFacts:
        return super().facts()


class Claims(Structured):
    """A block with the claim that it is non-expansive in a metric."""

    def __init__(self, block: nn.Module, metric: Metric) -> None:
        super().__init__()
        self.block, self.metric, self.in_shape = block, metric, (3,)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.block(x)
        return image

    def declare(self) -> Declaration:
        return Declaration.of(Lipschitz(1.0, self.metric), reason="claimed")


def _fixed_weight() -> LinearMap:
    linear = Dense(3, 3)
    with torch.no_grad():
        linear.matrix.copy_(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0]]))
    return linear


def test_verify_rejects_the_misprinted_field_and_accepts_the_right_one() -> None:
    metric = DenseMetric(random_spd(3, 50.0))
    x = torch.randn(16, 3)
    for kind, right in ((MetricField, True), (Misprinted, False)):
        field = kind(_fixed_weight(), metric, "relu")
        block = DynamicalBlock(field, "euler", FreeSignal(0.5 / field.facts().lipschitz))
        assert verify(block, x).passed is right


@pytest.mark.parametrize(("factor", "right"), [(1.999, True), (2.2, False)])
def test_verify_rejects_a_step_beyond_the_limit(factor: float, right: bool) -> None:
    metric = DenseMetric(random_spd(3, 50.0))
    field = MetricField(_fixed_weight(), metric, "relu")
    w, m = field.linear.matrix.detach().double(), metric.matrix
    limit = factor / float(torch.linalg.eigvalsh(w @ m @ w.mT).max())
    block = DynamicalBlock(field, "euler", FreeSignal(limit))
    assert verify(Claims(block, metric), torch.randn(16, 3)).passed is right
    # The same step is measured in its own metric only: in l2 it expands.
    assert not verify(Claims(block, EUCLIDEAN), torch.randn(16, 3)).passed


def test_a_lipschitz_constant_in_the_metric_is_measured_exactly() -> None:
    metric = DenseMetric(random_spd(3, 50.0))
    block = DynamicalBlock(FIELDS["square"](), "euler", FreeSignal(0.4)).double()
    exact = largest_norm(block, metric, torch.randn(8, 3, dtype=torch.float64))

    class Inflated(Claims):
        def declare(self) -> Declaration:
            return Declaration.of(Lipschitz(10.0, metric), reason="generous")

    check = next(iter(verify(Inflated(block, metric), torch.randn(32, 3))))
    assert exact * (1 - 1e-9) <= check.measured <= 10


def test_layers_between_norms_conform() -> None:
    metric = SpectralMetric((2, 3, 4), 0.01)
    x = torch.randn(3, 2, 3, 4)
    check_block(Whitening(metric), x).require()
    check_block(Channelwise(ZeroLift(2, 3), metric, 3), x).require()
    inverse = Whitening(metric).inverse(metric.whiten(x))
    assert torch.allclose(inverse, x, rtol=0, atol=1e-5)
    heavy = SpectralMetric((2, 3, 4), 4.0)
    assert heavy.eigenvalues[1] > 1.5
    assert not verify(Claims(Whitening(heavy), heavy), x).passed
    assert verify(Whitening(heavy), x).passed


def trained(network: Network, steps: int = 30) -> tuple[Network, Tensor, Tensor]:
    from dynablocks.data import load_data
    from dynablocks.switching import keep_constraints, set_progress

    train = load_data("digits").train
    x, labels = train.images[:256].float() / 255, train.labels[:256]
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    keep_constraints(network, optimiser)
    for step in range(steps):
        set_progress(network, step / steps)
        optimiser.zero_grad()
        nn.functional.cross_entropy(8 * network(x), labels).backward()
        optimiser.step()
    return network.eval(), x, labels


@pytest.fixture(scope="module")
def digits() -> tuple[Network, Tensor, Tensor]:
    torch.set_num_threads(1)
    return trained(build(TINY, (1, 8, 8), 10, seed=0))


def test_the_network_states_its_metric_and_a_constant_from_l2(digits: tuple[Network, Tensor, Tensor]) -> None:
    network, x, _ = digits
    metric = network.metric
    assert isinstance(metric, SpectralMetric)
    assert metric.smooth == 0.01
    constant, weight = network.certificate_inputs(metric)
    assert constant <= 1 + 1e-4
    assert torch.equal(weight, network.head.weight.double())
    euclidean = network.certificate_inputs()[0]
    assert euclidean == pytest.approx(constant * math.sqrt(metric.eigenvalues[1]))
    body, few = copy.deepcopy(network.body).double(), x[:12].double()
    *_, inverse = matrices(metric, (1, 8, 8))
    dense = jacobians(body, few)
    assert float(torch.linalg.matrix_norm(dense @ inverse, ord=2).max()) <= body_constant(network) * (1 + 1e-12)
    assert float(torch.linalg.matrix_norm(dense, ord=2).max()) <= euclidean
    stated = [p for p in network.properties if isinstance(p, Lipschitz)]
    assert [p.metric for p in stated] == [metric, EUCLIDEAN]
    assert verify(network, x[:4], search_steps=3).passed


def test_where_shading_weighs_more_the_constant_from_l2_is_larger() -> None:
    """The constant image has the weight 4, so ‖M^{1/2}x‖ = 2‖x‖ along it."""
    metric = SpectralMetric((1, 4, 4), smooth=4.0)
    body = nn.Sequential(Whitening(metric), nn.Flatten())
    network = Network(body, Head(16, 2, "none"), (1, 4, 4), ModelConfig()).double()
    with torch.no_grad():
        network.head.matrix.zero_()[0] = 0.25
    assert 2 * (1 - 1e-12) <= network.properties.lipschitz <= 2 * (1 + 1e-6)


def body_constant(network: Network) -> float:
    return copy.deepcopy(network).double().certificate_inputs(network.metric)[0]


@pytest.mark.slow
def test_the_network_conforms() -> None:
    check_block(build(TINY, (1, 8, 8), 3, seed=0)).require()


def attacked(network: Network, x: Tensor, labels: Tensor, radius: Tensor) -> Tensor:
    """Whether ascent on the margin within ‖δ‖_M <= radius, in coordinates, changes each class."""
    metric = network.metric
    truth = nn.functional.one_hot(labels, network.num_classes).bool()
    shape = (-1, 1, 1, 1)
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    broken = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(25):
        u = (u * (radius / EUCLIDEAN.norm(u).clamp_min(1e-9)).reshape(shape)).detach().requires_grad_(True)
        logits = network(x + metric.unwhiten(u))
        broken |= logits.argmax(1) != labels
        lead = logits.masked_fill(truth, -torch.inf).amax(1) - logits[truth]
        (gradient,) = torch.autograd.grad(lead.sum(), u)
        u = u + (0.3 * radius / EUCLIDEAN.norm(gradient).clamp_min(1e-12)).reshape(shape) * gradient
    return broken


def test_no_attack_in_the_metric_breaks_a_certified_image(digits: tuple[Network, Tensor, Tensor]) -> None:
    network, x, labels = digits
    result = certify(network, (x, labels), metric=network.metric)
    sure = result.correct & (result.radii > 0)
    assert int(sure.sum()) > 100
    assert result.norm == network.metric.name
    x, labels, radii = x[sure], labels[sure], result.radii[sure].float()
    assert not bool(attacked(network, x, labels, radii).any())
    assert bool(attacked(network, x, labels, 5 * radii).any())


def test_radii_in_l2_are_those_in_the_metric_by_the_largest_ratio(digits: tuple[Network, Tensor, Tensor]) -> None:
    network, x, labels = digits
    metric = network.metric
    inside, euclidean = certify(network, (x, labels), metric=metric), certify(network, (x, labels))
    assert euclidean.norm == "l2"
    assert "norm" not in euclidean.summary([0.0])
    ratio = math.sqrt(metric.eigenvalues[1])
    assert torch.allclose(euclidean.radii, inside.radii / ratio, rtol=1e-9, atol=1e-12)
    again = CertificateResult.restore(json.loads(json.dumps(inside.summary([0.0]))), inside.tensors())
    assert again.norm == metric.name


def test_an_attack_in_l2_is_not_held_against_radii_in_another_norm(digits: tuple[Network, Tensor, Tensor]) -> None:
    network, x, labels = digits
    data = (x[:16], labels[:16])
    found = attack(network, data, AttackConfig(epsilons=(0.0, 0.3), steps=2, losses=("margin",)))
    check_sound(found, certify(network, data))
    with pytest.raises(InvalidArgument, match="certify in l2 to compare"):
        check_sound(found, certify(network, data, metric=network.metric))


def test_the_model_takes_its_norm_from_the_configuration() -> None:
    twin = build(ModelConfig("metric", widths=(3, 8), layers=(1, 1), metric_smooth=1.0), (1, 8, 8), 10)
    assert twin.metric.eigenvalues == pytest.approx((1.0, 1.0))
    colour = build(ModelConfig("metric", widths=(2,), layers=(1,), metric_smooth=0.2, normalise=True), (3, 6, 6), 4)
    assert colour.metric.shape == (3, 6, 6)
    assert colour(torch.rand(2, 3, 6, 6)).shape == (2, 4)
    assert colour.certificate_inputs(colour.metric)[0] == pytest.approx(4.0, rel=1e-4)
    for options in ({"metric_smooth": 0.0}, {"metric_wavelength": 0.0}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            ModelConfig("metric", **options)


def test_facts_are_euclidean_unless_they_say_otherwise() -> None:
    assert FieldFacts(1.0, 0.0).metric == EUCLIDEAN
    assert GradientField.example().facts().metric == EUCLIDEAN
    assert MetricField(Dense(3, 3), EUCLIDEAN).facts().metric == EUCLIDEAN
    check_block(DynamicalBlock(MetricField(Dense(3, 3), EUCLIDEAN), "euler", FreeSignal(0.5))).require()


def test_the_experiment_shows_the_misprint_and_the_trained_constant(tmp_path: Path) -> None:
    from dynablocks.experiments.base import Scale
    from dynablocks.experiments.cells import Store
    from dynablocks.experiments.metric import MetricExperiment, MisprintCell, perturbation_figure

    store, scale, experiment = Store(tmp_path), Scale("smoke"), MetricExperiment()
    assert "not run" in experiment.tables(scale, store)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"not run"}
    perturbation_figure({"euclidean": None, "metric": None})
    assert store.build(MisprintCell(trials=100)) == "built"
    verdicts = [check.verdict for check in experiment.checks(scale, store)]
    assert verdicts == ["agrees", "agrees", "not run", "not run"]


@pytest.mark.slow
def test_the_experiment_runs_in_smoke(tmp_path: Path) -> None:
    from dynablocks.experiments.base import Scale
    from dynablocks.experiments.cells import Store, in_order
    from dynablocks.experiments.metric import MetricExperiment

    store, scale, experiment = Store(tmp_path), Scale("smoke"), MetricExperiment()
    for cell in in_order(experiment.cells(scale)):
        assert store.build(cell) == "built", store.failure(cell)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"agrees"}
    assert "%" in experiment.tables(scale, store)
    assert list(experiment.figures(scale, store)) == ["metric"]


@pytest.mark.parametrize(
    "metric",
    [DenseMetric(0.1 * torch.eye(64) + torch.ones(64, 64)), SpectralMetric((1, 8, 8), smooth=0.01)],
    ids=["dense", "spectral"],
)
def test_the_error_of_whitening_is_within_its_bound(metric: DenseMetric | SpectralMetric) -> None:
    """Against the same map applied in extended precision to the matrix that is stored."""
    x = torch.randn(20, *(metric.shape or ()), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    units = torch.eye(64, dtype=torch.float64).reshape(64, *(metric.shape or ()))
    root = metric.whiten(units).flatten(1).numpy().astype(np.longdouble)
    exact = x.flatten(1).numpy().astype(np.longdouble) @ root
    error = np.linalg.norm((metric.whiten(x).flatten(1).numpy() - exact).astype(float), axis=1)
    norm = math.sqrt(metric.eigenvalues[1])
    assert 0 < metric.whitening_error < 1e-10
    assert (error <= metric.whitening_error * norm * x.flatten(1).norm(dim=1).numpy()).all()


def test_a_negative_scale_counts_with_its_size() -> None:
    layer = PixelNormalisation((0.5, 0.5), (1.0, 0.25))
    layer.scale[1] = -5.0
    assert layer.properties.lipschitz == 5.0


def test_what_is_made_of_a_field_in_another_metric_is_bounded_in_l2() -> None:
    """Its numbers are those of ⟨·,·⟩_M; taken for ℓ2 they are too small, and its Jacobian is not symmetric."""
    inner = MetricField(Dense(2, 1), DenseMetric(torch.diag(torch.tensor([100.0, 0.01]))), "relu", bias=False)
    with torch.no_grad():
        inner.linear.matrix.fill_(1.0)
    x = torch.tensor([[-0.7, 0.2], [0.9, 0.4]], dtype=torch.float64)
    there = jacobians(inner.double(), x)
    largest = float(torch.linalg.matrix_norm(there, 2).max())
    assert largest > inner.facts().lipschitz
    shear = ShearField(inner)
    assert shear.facts().lipschitz >= largest
    assert not shear.facts().hamiltonian
    assert not DynamicalBlock(shear, "exact", FreeSignal(1.0)).properties.of(Symplectic)
    assert ConstrainedField(inner, [(0.0, 1.0)]).facts().lipschitz >= largest / 2
    with pytest.raises(InvalidArgument, match="no gradient field"):
        conservative_field(inner)


class Stated(Structured):
    """A body that says what it is told to."""

    def __init__(self, stated: Lipschitz) -> None:
        super().__init__()
        self.stated = stated

    def declare(self) -> Declaration:
        return Declaration.of(self.stated, reason="given", title="Stated")


def test_rows_that_are_close_make_the_whitening_error_count() -> None:
    """Distances of whitened rows err by the rows' lengths; where rows are close that is more than their distance."""
    metric = DenseMetric(random_spd(9))
    network = build(ModelConfig("certified", widths=(1,), layers=(1,)), (1, 8, 8), 3, seed=0)
    weight = torch.randn(3, 9, dtype=torch.float64)

    def constant(spread: float) -> float:
        rows = weight[:1] + spread * (weight - weight[:1])
        stub = SimpleNamespace(
            input_shape=(1, 8, 8), head=SimpleNamespace(weight=rows), body=Stated(Lipschitz(1.0, EUCLIDEAN, metric))
        )
        return type(network).certificate_inputs(stub)[0]

    assert 1 <= constant(1.0) < 1 + 1e-9
    assert constant(1e-9) > constant(1e-6) > constant(1.0)
    assert constant(1e-13) == math.inf


def test_the_worst_shading_goes_towards_the_other_class() -> None:
    """One step of 2ε along a constant unit gradient, from norm ε, ends within 30° of it, on the sphere of norm ε."""
    from dynablocks.experiments.metric import shading, worst_shading

    weight = torch.randn(1, 4, 4)

    class Tilted(nn.Module):
        num_classes = 2

        def forward(self, x: Tensor) -> Tensor:
            tilt = (x * weight).sum((1, 2, 3))
            return torch.stack([torch.zeros_like(tilt), tilt], dim=1)

    x, labels = torch.rand(6, 1, 4, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    shade = shading(x)
    slope = torch.stack([(weight * shade(mode[None])).sum() for mode in torch.eye(4)])
    towards = (1 - 2 * labels)[:, None] * slope / slope.norm()
    found = worst_shading(Tilted(), x, labels, shade, 0.5, 1, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    # cos 30° times ε is 0.4330.
    assert ((found * towards).sum(1) > 0.4329).all()
    assert (found.norm(dim=1) <= 0.5 * (1 + 1e-6)).all()


def test_a_projected_field_and_an_even_potential_are_bounded_in_l2() -> None:
    """J = −(1, 1)ᵀ(100, 0.01) where the unit is active: ‖A‖² = 100.01 in the metric, 100√2 in ℓ2; P leaves (1, 1)."""
    inner = MetricField(Dense(2, 1), DenseMetric(torch.diag(torch.tensor([100.0, 0.01]))), "relu", bias=False).double()
    with torch.no_grad():
        inner.linear.matrix.fill_(1.0)
    x = torch.tensor([[0.9, 0.4]], dtype=torch.float64)
    constrained, even = ConstrainedField(inner, [(1.0, -1.0)]), EvenPotential(inner)
    norm = float(torch.linalg.matrix_norm(jacobians(constrained, x), 2).max())
    assert norm == pytest.approx(100 * math.sqrt(2), rel=1e-6)
    assert inner.facts().lipschitz < norm <= constrained.facts().lipschitz
    there = jacobians(even, x)[0]
    assert abs(float(there[0, 1] - there[1, 0])) > 99
    for facts in (even.facts(), even.standing_facts()):
        assert facts.spectrum is None
        assert not facts.conservative
