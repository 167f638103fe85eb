"""Orthogonal parametrisations, adjoints of every linear map, and held weights, against dense float64 matrices."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields import (
    CompartmentField,
    Damping,
    DiagonalField,
    DissipativeField,
    GradientField,
    GradientOf,
    HamiltonianEmbedding,
    LinearField,
    MassPreservingField,
    MetricField,
    NeuralHamiltonian,
    PlanarField,
    PreconditionedField,
    RotationField,
    ShearField,
    SphereField,
    TwoMatrixField,
    leaky_relu,
    presnov,
)
from dynablocks.integrators import ExactFlow
from dynablocks.lifting import ChannelMix, Head
from dynablocks.linear import (
    ORTHOGONAL,
    Bounds,
    Conv,
    Dense,
    LinearMap,
    NormalisedConv,
    OrthogonalConv,
    OrthogonalDense,
    UnitConv,
    frozen_weights,
    ocnn_penalty,
    paraunitary_kernel,
    shared_weights,
)
from dynablocks.linear.orthogonal import orthonormality_defect
from dynablocks.norms import DenseMetric
from dynablocks.properties import Declaration, Equivariant, GradientNormPreserving, Lipschitz, NormPreserving, verify

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("name", sorted(ORTHOGONAL))
def test_parametrisations_are_special_orthogonal(name: str, size: int, dtype: torch.dtype) -> None:
    for scale in (0.0, 0.1, 1.0, 3.0):
        free = scale * torch.randn(5, size, size, dtype=dtype) / size**0.5
        q = ORTHOGONAL[name](free).double()
        assert torch.linalg.matrix_norm(q @ q.mT - torch.eye(size), ord=2).max() <= TOLERANCE[dtype]
        assert torch.allclose(
            torch.linalg.det(q), torch.ones(5, dtype=torch.float64), rtol=0, atol=size * TOLERANCE[dtype]
        )


@pytest.mark.parametrize("name", sorted(ORTHOGONAL))
def test_parametrisations_are_differentiable(name: str) -> None:
    free = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ORTHOGONAL[name], free)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 2), (2, 4, 2)])
def test_derivatives_of_cayley_of_every_order_and_mode(shape: tuple[int, ...]) -> None:
    free = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    cubed = lambda free: ORTHOGONAL["cayley"](free) ** 3  # noqa: E731
    assert torch.autograd.gradcheck(cubed, free, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cubed, free, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_cayley_under_vmap_as_in_a_loop(axis: int) -> None:
    free = torch.randn(3, 3, 4, 2, dtype=torch.float64)
    each = torch.stack([ORTHOGONAL["cayley"](part) for part in free.unbind(axis)])
    torch.testing.assert_close(torch.func.vmap(ORTHOGONAL["cayley"], in_dims=axis)(free), each, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_gradient_of_cayley_is_right_for_large_and_small_parameters(scale: float) -> None:
    free = scale * torch.randn(6, 3, dtype=torch.float64)
    direction = torch.randn_like(free)

    def by_the_formula(free: Tensor) -> Tensor:
        upper, lower = free[:3], free[3:]
        doubled = 2 * torch.linalg.inv(torch.eye(3, dtype=free.dtype) + upper - upper.mT + lower.mT @ lower)
        return torch.cat([doubled - torch.eye(3, dtype=free.dtype), -lower @ doubled])

    found, expected = (
        torch.func.grad(lambda free, q=q: (q(free) * direction).sum())(free)
        for q in (ORTHOGONAL["cayley"], by_the_formula)
    )
    assert (found - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 1), (5, 2), (8, 4), (33, 7), (4, 4)])
@pytest.mark.parametrize("name", sorted(ORTHOGONAL))
def test_a_frame_is_the_first_columns_of_the_rotation(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    size, columns = shape
    for scale in (0.0, 0.1, 1.0, 3.0):
        free = scale * torch.randn(3, size, columns, dtype=torch.float64)
        square = torch.cat([free, torch.zeros(3, size, size - columns, dtype=torch.float64)], -1)
        square[:, columns:, :columns] = free[:, columns:]
        square[:, :columns, :columns] = free[:, :columns]
        expected = ORTHOGONAL[name](square)[..., :columns]
        rounding = TOLERANCE[dtype] * (1 + torch.linalg.matrix_norm(free, ord=2).max() ** 2)
        assert (ORTHOGONAL[name](free.to(dtype)).double() - expected).abs().max() <= rounding


def test_a_kernel_is_the_product_of_its_factors_at_every_frequency() -> None:
    base = ORTHOGONAL["cayley"](torch.randn(4, 3, dtype=torch.float64)).mT
    frames = ORTHOGONAL["cayley"](torch.randn(4, 4, 2, dtype=torch.float64))
    kernel = paraunitary_kernel(base, frames)
    for first, second in ((0.3, 1.1), (-2.0, 0.7)):
        waves = torch.polar(torch.ones(2, dtype=torch.float64), torch.tensor([first, second], dtype=torch.float64))
        expected = base + 0j
        for k, frame in enumerate(frames):
            projection = frame @ frame.mT
            expected = expected @ (projection + waves[k // 2] * (torch.eye(4) - projection))
        powers = waves[:, None] ** torch.arange(3)
        symbol = torch.einsum("reij,i,j->re", kernel + 0j, powers[0], powers[1])
        torch.testing.assert_close(symbol, expected, rtol=1e-12, atol=1e-12)


def test_kernels_made_in_a_batch_are_those_made_alone() -> None:
    bases = ORTHOGONAL["cayley"](torch.randn(2, 5, 4, 3, dtype=torch.float64)).mT
    frames = ORTHOGONAL["cayley"](torch.randn(2, 5, 2, 4, 2, dtype=torch.float64))
    together = paraunitary_kernel(bases, frames)
    assert together.shape == (2, 5, 3, 4, 2, 2)
    alone = paraunitary_kernel(bases[1, 3], frames[1, 3])
    torch.testing.assert_close(together[1, 3], alone, rtol=1e-13, atol=1e-13)
    assert alone.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OrthogonalDense(9, 4),
        lambda: OrthogonalDense(40, 40, "expm"),
        lambda: OrthogonalConv((6, 4, 4), 4, 3),
        lambda: ChannelMix((6, 4, 4), 3),
    ],
    ids=["cayley", "expm", "convolution", "channel mix"],
)
def test_weights_are_made_in_their_own_precision_under_autocast(make: Callable[[], LinearMap]) -> None:
    linear = make()
    with torch.autocast("cpu", torch.bfloat16):
        weight = linear.compute_weight()
    assert weight.dtype == torch.float32
    assert torch.equal(weight, linear.compute_weight())


class ScaledConv(OrthogonalConv):
    """A broken twin whose weight is twice an orthogonal one."""

    def compute_weight(self) -> Tensor:
        return 2 * super().compute_weight()


@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_shared_weights_and_their_gradients_are_those_of_each_map(rows: int, kernel: int) -> None:
    alike = [OrthogonalConv((4, 4, 4), rows, kernel_size=kernel) for _ in range(3)]
    others = [OrthogonalConv((6, 4, 4), kernel_size=kernel), OrthogonalConv((4, 4, 4), rows, kernel, method="expm")]
    dense = [OrthogonalDense(*sizes) for sizes in ((6, rows), (6, rows), (rows, 6), (6, 6), (6, 6))]
    rest = [ScaledConv((4, 4, 4), rows, kernel), ChannelMix((4, 4, 4), 2), OrthogonalDense(6, rows, "expm")]
    network = nn.ModuleList([*alike, *others, *dense, *rest]).double()
    alone = [linear.compute_weight() for linear in network]
    parameters = [p for p in network.parameters() if p.requires_grad]
    directions = [torch.randn_like(w) for w in alone]
    expected = torch.autograd.grad(
        sum((w * d).sum() for w, d in zip(alone, directions, strict=True)), parameters, allow_unused=True
    )
    with shared_weights(network):
        held = [linear.weight for linear in network]
    torch.testing.assert_close(held, alone, rtol=1e-13, atol=1e-13)
    found = torch.autograd.grad(
        sum((w * d).sum() for w, d in zip(held, directions, strict=True)), parameters, allow_unused=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["same", "full", "circular"])
def test_a_convolution_refuses_images_of_another_size_since_its_norm_is_another(padding: str) -> None:
    conv = Conv((1, 4, 4), 1, 3, padding)
    with torch.no_grad():
        conv.kernel.fill_(1.0)
    larger = Conv((1, 8, 8), 1, 3, padding)
    larger.load_state_dict(conv.state_dict())
    assert padding == "circular" or larger.norm_bounds().lower > 1.1 * conv.norm_bounds().upper
    for call in (conv, conv.adjoint, lambda x: conv.affine(x, None)):
        with pytest.raises(InvalidArgument, match="was built for"):
            call(torch.rand(2, 1, 8, 8))
    images = torch.rand(3, 2, 1, 4, 4)
    torch.testing.assert_close(torch.func.vmap(conv)(images)[1], conv(images[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [Dense, OrthogonalDense])
def test_a_matrix_refuses_entries_of_another_number(make: Callable[[int, int], LinearMap]) -> None:
    linear = make(4, 3).double()
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    for call in (linear, lambda x: linear.affine(x, None)):
        for wrong in (torch.zeros(2, 5), y, torch.zeros(4, 1), torch.zeros(())):
            with pytest.raises(InvalidArgument, match=r"\w+ was built for \(batch, 4\)"):
                call(wrong)
    with pytest.raises(InvalidArgument, match=r"\w+ was built for \(batch, 3\)"):
        linear.adjoint(x)
    # A sample alone, a batch of batches and what transforms see of either are of the right number.
    matrix = linear.dense_matrix().detach()
    torch.testing.assert_close(torch.func.jacrev(linear)(x[0]).detach(), matrix, rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.func.vmap(linear)(x), linear(x), rtol=0, atol=1e-14)
    dense = torch.func.vmap(torch.func.jacrev(linear.adjoint))(y).detach()
    torch.testing.assert_close(dense, matrix.mT.expand(2, 4, 3), rtol=0, atol=1e-14)


def test_parametrisations_agree_with_their_formulas() -> None:
    free = torch.randn(4, 4, dtype=torch.float64)
    skew = free - free.mT
    assert torch.allclose(ORTHOGONAL["expm"](free), torch.linalg.matrix_exp(skew), rtol=1e-12, atol=1e-12)
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(
        ORTHOGONAL["cayley"](free), torch.linalg.inv(eye + skew) @ (eye - skew), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(4, 4), (5, 2), (2, 5), (1, 1), (1, 3)])
@pytest.mark.parametrize("name", sorted(ORTHOGONAL))
def test_dense_maps_have_unit_singular_values(name: str, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    linear = OrthogonalDense(*sizes, name).to(dtype)
    values = torch.linalg.svdvals(linear.dense_matrix())
    assert (values - 1).abs().max() <= TOLERANCE[dtype]
    assert linear.rows_orthonormal == (sizes[1] <= sizes[0])
    assert linear.columns_orthonormal == (sizes[1] >= sizes[0])


KERNELS = [
    (padding, kernel, channels)
    for padding, kernel, channels in itertools.product(("circular", "full", "same"), (1, 2, 3, 5), (1, 2, 3, 8))
    if padding != "same" or kernel % 2
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("padding", "kernel", "channels"), KERNELS)
def test_orthogonal_convolutions(padding: str, kernel: int, channels: int, dtype: torch.dtype) -> None:
    conv = OrthogonalConv((channels, 4, 5), kernel_size=kernel, padding=padding).to(dtype)
    matrix = conv.dense_matrix()
    values = torch.linalg.svdvals(matrix)
    assert values[0] <= 1 + TOLERANCE[dtype]
    bounds = conv.norm_bounds()
    assert values[0] <= bounds.upper <= 1 + 5 * TOLERANCE[dtype]
    if padding != "same" or kernel == 1:
        assert conv.columns_orthonormal
        assert (values - 1).abs().max() <= TOLERANCE[dtype]
        assert 1 - 5 * TOLERANCE[dtype] <= conv.smallest_singular_value() <= values[-1]
    if conv.rows_orthonormal:
        assert torch.allclose(
            matrix @ matrix.mT, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("padding", ["circular", "full", "same"])
def test_fewer_channels_give_orthonormal_rows_only_where_declared(padding: str) -> None:
    conv = OrthogonalConv((4, 4, 4), 2, 3, padding).double()
    matrix = conv.dense_matrix()
    assert not conv.columns_orthonormal
    assert conv.rows_orthonormal == (padding == "circular")
    if conv.rows_orthonormal:
        assert torch.allclose(matrix @ matrix.mT, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.linalg.svdvals(matrix)[0] <= 1 + 1e-12


def test_an_orthogonal_convolution_is_more_than_a_shift() -> None:
    kernel = OrthogonalConv((4, 5, 5), kernel_size=3).weight.detach()
    assert (kernel.square().sum((0, 1)) > 1e-3).all()


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (5, 3)])
def test_channel_mix_is_orthogonal(rows: int, columns: int) -> None:
    mix = ChannelMix((columns, 2, 3), rows).double()
    values = torch.linalg.svdvals(mix.dense_matrix())
    assert (values - 1).abs().max() <= 1e-12
    assert values[0] <= mix.norm_bounds().upper


def linear_maps() -> dict[str, LinearMap]:
    maps: dict[str, LinearMap] = {
        "dense": Dense(5, 3),
        "head": Head(5, 3),
        "frobenius head": Head(5, 3, "frobenius"),
        "orthogonal": OrthogonalDense(5, 3, "expm"),
        "tall orthogonal": OrthogonalDense(3, 5),
        "mix down": ChannelMix((4, 3, 2), 3),
        "mix up": ChannelMix((2, 3, 2), 3),
        "normalised": NormalisedConv((2, 5, 4), 3),
    }
    for padding, size in (("circular", 2), ("circular", 3), ("full", 2), ("full", 3), ("same", 3)):
        maps[f"orthogonal {padding} {size}"] = OrthogonalConv((4, 5, 4), 3, size, padding)
    for padding, size, stride, groups, dilation in itertools.product(
        ("same", "full", "circular"), (1, 2, 3, 5), (1, 2, 3), (1, 2), (1, 2)
    ):
        name = f"conv {padding} k{size} s{stride} g{groups} d{dilation}"
        try:
            maps[name] = Conv((4, 7, 6), 6, size, padding, stride=stride, groups=groups, dilation=dilation)
        except InvalidArgument:
            assert (padding == "same" and size % 2 == 0) or (padding == "circular" and stride > 1)
    return maps


@pytest.mark.parametrize("name", sorted(linear_maps()))
def test_the_adjoint_is_the_transpose(name: str) -> None:
    linear = linear_maps()[name].double()
    x, y = torch.randn(2, *linear.in_shape, dtype=torch.float64), torch.randn(2, *linear.out_shape, dtype=torch.float64)
    bias = linear(torch.zeros_like(x))
    image, back = linear(x) - bias, linear.adjoint(y)
    assert image.shape == y.shape
    assert back.shape == x.shape
    assert torch.allclose((image * y).flatten(1).sum(1), (x * back).flatten(1).sum(1), rtol=0, atol=1e-12)
    matrix = linear.dense_matrix()
    assert torch.allclose(image.flatten(1), x.flatten(1) @ matrix.mT, rtol=0, atol=1e-12)
    assert torch.allclose(back.flatten(1), y.flatten(1) @ matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(linear_maps()))
def test_bounds_hold_the_dense_singular_values_also_for_hostile_weights(name: str) -> None:
    linear = linear_maps()[name]
    for spoil in (lambda p: p, lambda p: 1000 * p, torch.zeros_like, torch.ones_like):
        with torch.no_grad():
            for p in linear.parameters():
                p.copy_(spoil(p))
        matrix = linear.dense_matrix()
        values = torch.linalg.svdvals(matrix)
        bounds = linear.norm_bounds()
        slack = 1e-13 * float(values[0])
        assert bounds.lower <= values[0] + slack
        assert values[0] <= bounds.upper + slack
        smallest = float(values[-1]) if matrix.shape[0] >= matrix.shape[1] else 0.0
        assert linear.smallest_singular_value() <= smallest + slack


def test_normalised_convolutions_start_with_norm_one_at_most_and_declare_the_truth() -> None:
    for gain in (0.1, 1.0, 30.0):
        conv = NormalisedConv((3, 6, 6), 4, gain=gain)
        norm = float(torch.linalg.svdvals(conv.dense_matrix())[0])
        assert norm <= 1.02
        assert norm <= conv.properties.lipschitz
    free = NormalisedConv((3, 6, 6), 4, gain=30.0, project=False)
    free.project_()
    assert torch.linalg.svdvals(free.dense_matrix())[0] > 2


def test_a_kernel_of_norm_below_one_is_left_alone() -> None:
    """W / max(1, ‖W‖), not W / ‖W‖."""
    conv = NormalisedConv((2, 4, 4), 2, gain=0.1).double()
    assert float(torch.linalg.svdvals(conv.dense_matrix())[0]) < 0.2
    before = conv.kernel.detach().clone()
    conv.project_(20)
    assert torch.equal(conv.kernel, before)


def test_the_penalty_vanishes_exactly_at_orthogonal_kernels() -> None:
    assert float(ocnn_penalty(OrthogonalConv((4, 5, 5)).double().weight.detach())) < 1e-25
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    assert float(ocnn_penalty(kernel)) > 0.1
    conv = Conv((3, 5, 5), 2, 3, "circular").double()
    matrix = conv.dense_matrix()
    gram = matrix @ matrix.mT - torch.eye(50, dtype=torch.float64)
    # Each of the 25 output pixels sees every shift of the kernel once when the image is at least 2k − 1 wide.
    assert float(ocnn_penalty(conv.weight.detach())) == pytest.approx(float(gram.square().sum().detach()) / 25)


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (2, 2), (3, 2)])
def test_the_penalty_of_a_tall_kernel_is_that_of_its_columns(size: int, stride: int) -> None:
    """Far from the border every pixel of the image sees all shifts: the Gram matrix's columns of one pixel a phase."""
    channels = 2 * stride**2 + 1
    conv = Conv((2, 12, 12), channels, size, "full", stride=stride).double()
    gram = conv.dense_matrix().detach()
    gram = gram.mT @ gram - torch.eye(288, dtype=torch.float64)
    columns = gram.reshape(288, 2, 12, 12)[:, :, 4 : 4 + stride, 4 : 4 + stride]
    assert float(ocnn_penalty(conv.weight.detach(), stride)) == pytest.approx(float(columns.square().sum()))
    orthonormal = torch.linalg.qr(torch.randn(5, 4, dtype=torch.float64))[0].reshape(5, 1, 2, 2)
    assert float(ocnn_penalty(orthonormal, 2)) < 1e-25


def weight_of(linear: LinearMap) -> Tensor:
    return linear.weight.detach().clone()


MAPS = pytest.mark.parametrize("make", [lambda: Dense(3, 3), lambda: OrthogonalDense(3, 3)], ids=["free", "orthogonal"])


def move(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))


@MAPS
def test_a_frozen_weight_is_constant_inside_and_fresh_outside(make) -> None:
    linear = make()
    before = weight_of(linear)
    with frozen_weights(linear):
        assert linear.weight is linear.weight
        assert not linear.weight.requires_grad
        move(linear)
        assert torch.equal(linear.weight, before)
        bounds = linear.norm_bounds()
        assert linear.norm_bounds() is bounds
    assert not torch.equal(linear.weight, before)
    assert linear.norm_bounds() is not bounds
    assert linear.weight.requires_grad


@MAPS
def test_a_shared_weight_keeps_its_gradient(make) -> None:
    linear = make()
    with shared_weights(linear):
        assert linear.weight is linear.weight
        linear(torch.ones(1, 3)).square().sum().backward()
    assert linear.matrix.grad is not None


@MAPS
def test_contexts_nest_in_either_order(make) -> None:
    linear = make()
    with shared_weights(linear):
        outer = linear.weight
        with frozen_weights(linear):
            assert not linear.weight.requires_grad
            with shared_weights(linear, linear):
                assert not linear.weight.requires_grad
        assert linear.weight is outer
        assert linear.weight.requires_grad
    with frozen_weights(linear):
        frozen = linear.weight
        with shared_weights(linear):
            assert linear.weight is frozen
        assert linear.weight is frozen
    assert linear._held is None


@MAPS
@pytest.mark.parametrize("context", [shared_weights, frozen_weights])
def test_an_exception_releases_the_weight(make, context) -> None:
    linear = make()
    with pytest.raises(RuntimeError, match="inside"), context(linear):
        raise RuntimeError("inside")
    assert linear._held is None
    assert linear._held_facts is None


def test_an_exception_while_computing_releases_the_others() -> None:
    good, bad = Dense(2, 2), OrthogonalDense(2, 2)

    def fails(free: Tensor) -> Tensor:
        raise RuntimeError("no weight")

    bad.parametrisation = fails
    for context in (shared_weights, frozen_weights):
        with pytest.raises(RuntimeError, match="no weight"), context(nn.ModuleList([good, bad])):
            pass
        assert good._held is None


@MAPS
@pytest.mark.parametrize("context", [shared_weights, frozen_weights])
def test_copies_and_states_made_inside_hold_nothing(make, context) -> None:
    linear = make()
    with context(linear):
        copied, state = copy.deepcopy(linear), linear.state_dict()
    assert copied._held is None
    assert set(state) == {"matrix"}
    move(copied)
    assert not torch.equal(copied.weight, linear.weight)
    assert torch.equal(copied.weight, copied.compute_weight())


def test_loading_a_state_changes_the_weight_at_once() -> None:
    one, other = OrthogonalConv((2, 4, 4)), OrthogonalConv((2, 4, 4))
    one(torch.zeros(1, 2, 4, 4))
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.weight, other.weight)


def test_a_field_leaves_nothing_held() -> None:
    field = GradientField(OrthogonalDense(3, 3))
    field(torch.randn(2, 3)).sum().backward()
    assert field.linear._held is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dense(0, 3), "in_features is 0; a whole number from 1 is needed"),
        (lambda: Dense(4.0, 3), "in_features is 4.0; a whole number from 1 is needed"),
        (lambda: Head(4, 2.5), "classes is 2.5; a whole number from 1 is needed"),
        (lambda: Conv(3, 16, 3), "in_shape is 3; 3 positive sizes are needed, such as (3, 32, 32)"),
        (lambda: NormalisedConv(3, 16, 3), "in_shape is 3; 3 positive sizes are needed"),
        (lambda: UnitConv("abc", 16), "in_shape is 'abc'; 3 positive sizes are needed"),
        (lambda: OrthogonalConv(3, 3), "in_shape is 3; 3 positive sizes are needed"),
        (lambda: OrthogonalConv([2, 4.0, 4]), "in_shape is (2, 4.0, 4); 3 positive sizes are needed"),
        (lambda: OrthogonalConv((2, 4, 4), 1.5), "out_channels is 1.5; a whole number from 1 is needed"),
        (lambda: Conv((2, 4, 4), 3, (3, 3)), "kernel_size is (3, 3); a whole number from 1 is needed"),
        (lambda: Conv((2, 4, 4), 3, stride=0), "stride is 0; a whole number from 1 is needed"),
        (lambda: Conv((2, 4, 4), 2, groups=2.0), "groups is 2.0; a whole number from 1 is needed"),
        (lambda: Conv((2, 4, 4), 3, dilation=0), "dilation is 0; a whole number from 1 is needed"),
        (lambda: Conv((2, 4, 4), 3, 2, "same"), "kernel_size is 2 with padding 'same'; use an odd one"),
        (lambda: Conv((2, 4, 4), 3, 3, "circular", stride=2), "stride is 2 with circular padding; use stride 1"),
        (lambda: Conv((3, 4, 4), 4, 3, groups=2), "groups is 2; it must divide 3 and 4 channels"),
        (lambda: Conv((2, 4, 4), 3, 3, "reflect"), "unknown padding 'reflect'. Known: circular, full, same"),
        (lambda: Conv((2, 4), 3), "in_shape is (2, 4); 3 positive sizes are needed"),
        (lambda: OrthogonalConv((2, 4, 4), 3), "out_channels is 3; at most the 2 input channels are allowed"),
        (lambda: OrthogonalDense(2, 2, "caley"), "unknown orthogonal parametrisation 'caley'; did you mean 'cayley'"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], LinearMap], words: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(words)):
        make()


def test_sizes_of_any_kind_of_whole_number_are_kept_as_pythons() -> None:
    one, three = np.int64(1), np.int64(3)
    for linear in (Dense(three, one), OrthogonalDense(three, one), Conv((1, 4, 4), three, three, stride=one)):
        assert {type(size) for size in (*linear.in_shape, *linear.out_shape)} == {int}
    assert type(LinearField(three).in_shape[0]) is int


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearField(2.5), "entries is 2.5; a whole number"),
        (lambda: DiagonalField("3"), "entries is '3'; a whole number"),
        (lambda: RotationField((3,)), "entries is (3,); a whole number"),
        (lambda: RotationField(3, 2.5), "hidden is 2.5; a whole number from 1"),
        (lambda: MassPreservingField(2.5), "entries is 2.5; a whole number"),
        (lambda: CompartmentField((3,)), "entries is (3,); a whole number"),
        (lambda: CompartmentField(3, hidden=0), "hidden is 0; a whole number from 1"),
        (lambda: NeuralHamiltonian(4.0), "entries is 4.0; a whole number"),
        (lambda: NeuralHamiltonian(4, width=2.5), "width is 2.5; a whole number from 1"),
        (lambda: DissipativeField(2.5), "entries is 2.5; a whole number from 1"),
        (lambda: GradientOf(nn.Linear(2, 1), 2), "in_shape is 2; a tuple of positive sizes is needed, such as (3,)"),
        (lambda: GradientOf(nn.Linear(2, 1), ()), "in_shape is (); a tuple of positive sizes"),
        (lambda: Damping(4), "in_shape is 4; a tuple of positive sizes"),
        (lambda: HamiltonianEmbedding(nn.Linear(2, 2), 2), "in_shape is 2; a tuple of positive sizes"),
        (lambda: ShearField(nn.Linear(2, 2), 4), "in_shape is 4; a tuple of positive sizes"),
        (lambda: ShearField(nn.Linear(2, 2), (4,), split=2.0), "split is 2.0; a whole number"),
        (lambda: presnov(torch.sin, 2), "in_shape is 2; a tuple of positive sizes"),
        (lambda: presnov(torch.sin, (2,), nodes=2.5), "nodes is 2.5; a whole number"),
    ],
)
def test_sizes_of_the_wrong_kind_are_refused_by_fields(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(words)):
        make()


HOLDERS: dict[str, Callable[[object], object]] = {
    "gradient": GradientField,
    "preconditioned": PreconditionedField,
    "planar": PlanarField,
    "sphere": SphereField,
    "sphere, outer": lambda given: SphereField(Dense(4, 4), given),
    "two matrices": lambda given: TwoMatrixField(given, Dense(4, 4)),
    "two matrices, outer": lambda given: TwoMatrixField(Dense(4, 4), given),
    "metric": lambda given: MetricField(given, DenseMetric(torch.eye(4))),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_field_refuses_what_is_no_linear_map_of_the_library(name: str) -> None:
    for given, kind in ((nn.Linear(4, 4), "a Linear"), (Dense, "the class Dense"), (torch.eye(4), "a Tensor")):
        said = rf"^(linear|inner|outer) is {kind}; a LinearMap is needed, such as dynablocks\.linear\.Dense\(4, 4\)\.$"
        with pytest.raises(InvalidArgument, match=said):
            HOLDERS[name](given)
    HOLDERS[name](Dense(4, 4))


def penalised(in_channels: int, out_channels: int, stride: int, dilation: int) -> NormalisedConv:
    shape, options = (in_channels, 20, 20), {"stride": stride, "dilation": dilation}
    conv = NormalisedConv(shape, out_channels, 3, "full", penalty=1.0, project=False, **options).double()
    with torch.no_grad():
        conv.kernel.normal_()
    return conv


STRIDES = pytest.mark.parametrize(("stride", "dilation"), [(2, 2), (2, 3), (2, 4), (4, 2), (1, 2)])


@STRIDES
def test_the_penalty_of_a_dilated_kernel_is_that_of_its_rows(stride: int, dilation: int) -> None:
    """An output far from the border shares its pixels with all that it can: its rows of the Gram matrix."""
    conv = penalised(2, 2, stride, dilation)
    matrix = conv.dense_matrix()
    height, width = conv.out_shape[1:]
    gram = (matrix @ matrix.mT - torch.eye(len(matrix), dtype=torch.float64)).reshape(2, height, width, -1)
    rows = gram[:, height // 2, width // 2]
    assert float(conv.regularisation().detach()) == pytest.approx(float(rows.square().sum()), rel=1e-10)


@STRIDES
def test_the_penalty_of_a_tall_dilated_kernel_is_that_of_the_columns_that_it_sees(stride: int, dilation: int) -> None:
    apart = math.gcd(stride, dilation)
    phases = stride // apart
    conv = penalised(1, phases**2 + 1, stride, dilation)
    matrix = conv.dense_matrix()
    gram = (matrix.mT @ matrix - torch.eye(400, dtype=torch.float64)).reshape(20, 20, -1)
    # Taps meet the pixels whose numbers are multiples of that divisor.
    seen = slice(8, 8 + stride, apart)
    columns = gram[seen, seen]
    assert columns.shape[:2] == (phases, phases)
    assert float(conv.regularisation().detach()) == pytest.approx(float(columns.square().sum()), rel=1e-10)


def test_a_dilated_kernel_whose_neighbouring_outputs_agree_has_a_penalty() -> None:
    """Taps (1, 1, 0)/√2: the next output is two pixels away, which is one tap, so the two share a pixel."""
    conv = penalised(1, 1, 2, 2)
    with torch.no_grad():
        conv.kernel.zero_()
        conv.kernel[0, 0, 1, :2] = 0.5**0.5
    assert float(conv.regularisation().detach()) == pytest.approx(0.5)


@pytest.mark.parametrize("layer", [Conv, OrthogonalConv])
def test_a_circular_kernel_that_wraps_more_than_once_is_refused(layer: type[Conv]) -> None:
    with pytest.raises(InvalidArgument, match="wraps around an image of"):
        layer((1, 2, 2), 1, kernel_size=7, padding="circular")


def test_the_penalty_of_a_grouped_convolution_is_that_of_its_groups() -> None:
    conv = NormalisedConv((2, 4, 4), 2, 1, penalty=0.5, project=False, groups=2)
    with torch.no_grad():
        conv.kernel.fill_(1.0)
    assert float(conv.regularisation()) == 0.0
    with torch.no_grad():
        conv.kernel[0] = 2.0
    assert float(conv.regularisation()) == 4.5


def test_the_dense_matrix_is_made_on_the_cpu_whatever_the_default_device() -> None:
    for linear in (Dense(4, 3), OrthogonalConv((4, 3, 3), kernel_size=2), Conv((2, 5, 5), 3)):
        expected = linear.dense_matrix()
        with torch.device("meta"):
            matrix = linear.dense_matrix()
        assert matrix.device.type == "cpu"
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-15)


def test_weights_are_made_on_devices_without_autocast() -> None:
    for linear in (OrthogonalDense(4, 2), OrthogonalConv((4, 3, 3), kernel_size=2)):
        assert linear.to("meta").weight.is_meta


ISOMETRIES: dict[str, Callable[[], LinearMap]] = {
    "square": lambda: OrthogonalDense(4, 4),
    "rows": lambda: OrthogonalDense(5, 3),
    "columns": lambda: OrthogonalDense(3, 5),
    "circular": lambda: OrthogonalConv((3, 4, 5), kernel_size=3),
    "circular, even": lambda: OrthogonalConv((2, 3, 3), kernel_size=2),
    "circular rows": lambda: OrthogonalConv((4, 4, 4), 2, 3),
    "full": lambda: OrthogonalConv((2, 3, 4), kernel_size=3, padding="full"),
    "same, one pixel": lambda: OrthogonalConv((3, 3, 3), kernel_size=1, padding="same"),
    "mix of channels, down": lambda: ChannelMix((4, 2, 3), 3),
    "mix of channels, up": lambda: ChannelMix((2, 2, 3), 4),
}
EVERY_ISOMETRY = pytest.mark.parametrize("name", ISOMETRIES)


def dense_defect(linear: LinearMap) -> float:
    """‖AAᵀ − I‖, or ‖AᵀA − I‖ where the columns are orthonormal, of the dense matrix."""
    matrix = linear.dense_matrix()
    gram = matrix @ matrix.mT if linear.rows_orthonormal else matrix.mT @ matrix
    return float(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=torch.float64), ord=2))


@pytest.mark.parametrize("off", [1e-6, 1e-2, 1.0])
@EVERY_ISOMETRY
def test_the_orthonormality_defect_bounds_that_of_the_dense_matrix(name: str, off: float) -> None:
    linear = ISOMETRIES[name]().double()
    weight = linear.weight.detach()
    linear.hold(weight + off * torch.randn_like(weight))
    measured = dense_defect(linear)
    assert 0.1 * off < measured <= linear.orthonormality_defect() * (1 + 1e-12)
    assert linear.orthonormality_defect() <= 64 * measured


@pytest.mark.parametrize("dtype", TOLERANCE)
@EVERY_ISOMETRY
def test_isometries_of_ordinary_parameters_are_declared_without_a_tolerance(name: str, dtype: torch.dtype) -> None:
    linear = ISOMETRIES[name]().to(dtype)
    declared = linear.declare()
    assert (declared.properties.of(GradientNormPreserving) is not None) == linear.rows_orthonormal
    assert (declared.properties.of(NormPreserving) is not None) == linear.columns_orthonormal
    assert {stated.tolerance for stated in declared.properties} == {0.0}
    assert declared.losses == ()


@pytest.mark.parametrize(
    ("row", "dtype"), [((2.0**27, 2.0**26), torch.float64), ((2.0**13, 2.0**11), torch.float32)], ids=str
)
def test_columns_without_digits_are_not_said_to_keep_norms(row: tuple[float, ...], dtype: torch.dtype) -> None:
    """In I + BᵀB the 1 is lost, or nearly; the exact transform has orthonormal columns."""
    linear = OrthogonalDense(2, 3).to(dtype)
    with torch.no_grad():
        linear.matrix.copy_(torch.tensor([(0.0, 0.0), (0.0, 0.0), row]))
    values = torch.linalg.svdvals(linear.dense_matrix())
    assert (values - 1).abs().max() > 0.05
    declared = linear.declare()
    assert declared.properties.of(NormPreserving) is None
    assert declared.losses[0].startswith("NormPreserving is lost: rounding leaves ‖AAᵀ − I‖ = ")
    assert values.max() <= declared.properties.lipschitz


@pytest.mark.parametrize("make", [lambda: OrthogonalDense(2, 3), lambda: OrthogonalDense(3, 2)])
def test_what_large_parameters_leave_of_an_isometry_is_its_tolerance(make: Callable[[], LinearMap]) -> None:
    linear = make().double()
    with torch.no_grad():
        linear.matrix.zero_()
        linear.matrix[2] = torch.tensor([3000.1, 1234.7])
    values = torch.linalg.svdvals(linear.dense_matrix())
    (stated,) = [p for p in linear.properties if isinstance(p, (GradientNormPreserving, NormPreserving))]
    assert 0 < float((values - 1).abs().max()) <= stated.tolerance < 1e-3
    verify(linear, torch.randn(5, *linear.in_shape)).require()


def test_many_entries_excuse_no_rows_that_are_far_from_orthonormal() -> None:
    """‖AAᵀ − I‖ = 8.5e-4 √2 = 1.2e-3 is below 64 · 200 ε = 1.5e-3, but no isometry."""
    linear, weight = OrthogonalDense(200, 2), torch.zeros(2, 200)
    weight[0, 0] = weight[1, 1] = math.sqrt(1.00085)
    linear.hold(weight)
    assert 1.1e-3 < linear.orthonormality_defect() < 1.3e-3
    assert linear.isometry_tolerance() is None
    declared = linear.declare()
    assert declared.properties.of(GradientNormPreserving) is None
    assert declared.losses[0].startswith("GradientNormPreserving is lost")


class Leaning(OrthogonalDense):
    """A with another sign where fields call it."""

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().affine(-x, bias)


def test_rows_of_images_of_ones_own_are_not_taken_for_orthonormal() -> None:
    """With A = I, ẋ = −σ(−x) = x for x < 0, so x(1) = −e from −1; the formula in Ax + b says e⁻¹ − 2."""
    field = GradientField(Leaning(3, 3, spread=0.0), leaky_relu(0.5)).double()
    wrong = field.flow(-torch.ones(1, 3, dtype=torch.float64), 1.0).detach()
    assert abs(float(wrong[0, 0]) + math.e) > 1
    assert not field.linear.rows_orthonormal
    assert not field.linear.columns_orthonormal
    assert ExactFlow().why_not(field) is not None


def test_a_weight_that_is_no_number_is_no_isometry() -> None:
    assert orthonormality_defect(torch.tensor([[torch.nan]])) == float("inf")


class Twice(OrthogonalDense):
    """Its bounds are right, and speak of the products that fields call, which are those of the class before."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def compute_norm_bounds(self) -> Bounds:
        bounds = super().compute_norm_bounds()
        return Bounds(bounds.lower, 2 * bounds.upper, exact=False, method="twice")


class Unbounded(Twice):
    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return 3 * super().multiply(weight, x)


class Bounded(Unbounded):
    def compute_norm_bounds(self) -> Bounds:
        return Bounds(0.0, 7.0, exact=False, method="six times an isometry")


class Said(Twice):
    def declare(self) -> Declaration:
        return Declaration.of(Lipschitz(self.norm_bounds().upper), reason="twice an isometry")


class Fifth(Conv):
    """A convolution of the fifth of its input; its bounds say so."""

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return super().multiply(weight, 0.2 * x)

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return 0.2 * super().multiply_adjoint(weight, y)

    def compute_norm_bounds(self) -> Bounds:
        return Bounds(0.0, 0.201 * super().compute_norm_bounds().upper, exact=False, method="a fifth")


def test_fields_multiply_by_the_products_that_bounds_are_of() -> None:
    linear, x = Fifth((1, 4, 4), 2, 3).double(), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(linear.affine(x, None), linear.multiply(linear.weight, x), rtol=0, atol=0)
    y = torch.randn(3, *linear.out_shape, dtype=torch.float64)
    torch.testing.assert_close((linear(x) * y).sum(), (x * linear.adjoint(y)).sum(), rtol=0, atol=1e-12)
    assert float(torch.linalg.matrix_norm(linear.dense_matrix(), 2)) <= linear.norm_bounds().upper


@pytest.mark.parametrize("kind", [Twice, Unbounded, Bounded])
def test_bounds_of_the_products_do_not_speak_of_another_forward(kind: type[OrthogonalDense]) -> None:
    linear, x = kind(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    assert float((linear(x).norm(dim=1) / x.norm(dim=1)).min().detach()) > 1.9
    assert [*linear.properties] == []
    assert Said(3, 3).properties.lipschitz == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("make", [lambda: OrthogonalDense(3, 3), lambda: OrthogonalConv((3, 4, 4))])
@pytest.mark.parametrize("method", ["compute_weight", "compute_weights"])
def test_a_weight_of_an_instance_is_the_one_that_is_shared_and_declared(
    make: Callable[[], LinearMap], method: str
) -> None:
    linear, other = make().double(), make().double()
    weight = 9 * linear.compute_weight().detach()
    setattr(linear, method, (lambda: weight) if method == "compute_weight" else lambda alike: [weight])
    with shared_weights(other, linear):
        assert torch.equal(linear.weight, weight)
        assert not torch.equal(other.weight, weight)
    assert linear.properties.lipschitz >= 9 * (1 - 1e-12)
    assert [type(stated) for stated in linear.properties] == [Lipschitz, Equivariant]
    verify(linear, torch.randn(3, *linear.in_shape)).require()


@pytest.mark.parametrize("name", ["kernel_size", "padding", "stride", "groups", "dilation", "zeros", "geometry"])
def test_a_convolution_has_the_options_that_its_bounds_are_of(name: str) -> None:
    """‖A‖ of the same kernel differs between paddings, so that none of them can be set apart from the bounds."""
    for kind in (Conv, NormalisedConv, OrthogonalConv, UnitConv):
        conv = kind((2, 4, 4), 2, 3, "full").double()
        with pytest.raises(AttributeError, match=name):
            setattr(conv, name, getattr(Conv((2, 4, 4), 2, 3, "circular"), name))
        assert getattr(copy.deepcopy(conv), name) == getattr(conv, name)
        norm = float(torch.linalg.matrix_norm(conv.eval().dense_matrix().detach(), ord=2))
        assert conv.norm_bounds().upper >= norm * (1 - 1e-12)


FIXED = [
    *(("padding", padding) for padding in ("same", "full", "circular")),
    *(("kernel_size", 1), ("stride", 2), ("groups", 2), ("dilation", 2), ("zeros", 0)),
]


@pytest.mark.parametrize("given", ["same", "full", "circular"])
@pytest.mark.parametrize(("name", "value"), FIXED)
@pytest.mark.parametrize("kind", [Conv, NormalisedConv, OrthogonalConv, UnitConv])
def test_an_option_that_a_subclass_fixes_is_that_of_its_products_and_of_its_bounds(
    kind: type[Conv], name: str, value: int | str, given: str
) -> None:
    """The norm with zeros around is no bound of the circular one, and a border leaves no orthonormal rows."""
    own = type("Own", (kind,), {name: value})
    if (name, given) == ("stride", "circular"):
        with pytest.raises(InvalidArgument, match="stride is 2 with circular padding"):
            own((2, 5, 5), 2, 3, given)
        return
    if kind is OrthogonalConv and name == "groups":  # it has one kernel, of all channels
        return
    conv = own((2, 5, 5), 2, 3, given).double().eval()
    assert getattr(conv, name) == value
    for fill in (False, kind is not OrthogonalConv):
        if fill:  # all pixels add up, so that paddings differ most
            with torch.no_grad():
                conv.kernel.fill_(1.0)
        matrix = conv.dense_matrix().detach()
        values, (rows, columns) = torch.linalg.svdvals(matrix), matrix.shape
        assert rows == math.prod(conv.out_shape)
        assert conv.norm_bounds().upper >= values[0] * (1 - 1e-12)
        assert conv.smallest_singular_value() <= (float(values[-1]) if rows >= columns else 0.0) + 1e-12
        for claimed, frame in ((conv.rows_orthonormal, matrix), (conv.columns_orthonormal, matrix.mT)):
            eye = torch.eye(len(frame), dtype=torch.float64)
            assert not claimed or torch.allclose(frame @ frame.mT, eye, rtol=0, atol=1e-12)
    x, y = torch.randn(2, *conv.in_shape).double(), torch.randn(2, *conv.out_shape).double()
    torch.testing.assert_close((conv(x) * y).sum(), (x * conv.adjoint(y)).sum(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "value"), [("padding", "reflect"), ("kernel_size", 2), ("groups", 3)])
def test_an_option_of_a_subclass_that_makes_no_convolution_is_refused(name: str, value: int | str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        type("Own", (Conv,), {name: value})((2, 5, 5), 2, 3, "same")


def test_orthonormal_rows_are_those_of_the_padding_that_a_subclass_fixes() -> None:
    """With zeros around AAᵀ is not I, whatever padding was asked for."""
    own = type("Own", (OrthogonalConv,), {"padding": "same"})
    conv = own((2, 5, 5), 2, 3, "circular").double()
    assert dense_defect(conv) > 1e-3
    assert not conv.rows_orthonormal
    assert not conv.columns_orthonormal
    assert [type(stated) for stated in conv.properties] == [Lipschitz, Equivariant]


ALONE = [("same", (2, 5, 4), 3), ("full", (2, 5, 4), 2), ("circular", (2, 5, 4), 3), ("circular", (2, 3, 3), 3)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("padding", "shape", "size"), ALONE)
def test_an_image_without_a_batch_is_mapped_as_in_one(
    padding: str, shape: tuple[int, int, int], size: int, groups: int
) -> None:
    """Of a circular kernel that covers the image, too, whose product is that with its circulant matrix."""
    conv, bias = Conv(shape, 4, size, padding, groups=groups).double(), torch.randn(4, dtype=torch.float64)
    x, y = torch.randn(3, *conv.in_shape).double(), torch.randn(3, *conv.out_shape).double()
    for call, batch in ((conv, x), (lambda image: conv.affine(image, bias), x), (conv.adjoint, y)):
        torch.testing.assert_close(call(batch[0]), call(batch)[0], rtol=0, atol=1e-12)
    jacobian = torch.func.jacrev(conv)(x[0]).reshape(math.prod(conv.out_shape), -1)
    torch.testing.assert_close(jacobian.detach(), conv.dense_matrix().detach(), rtol=0, atol=1e-12)
