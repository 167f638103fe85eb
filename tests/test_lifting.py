"""Maps of channels-last images, of which a few copies are faster than torch's own: the same bits and derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks import lifting
from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import ShearField
from dynablocks.lifting import Head, PaperLift, PixelNormalisation, SpaceToDepth
from dynablocks.models import ModelConfig, Network
from dynablocks.models.chain import Chain
from dynablocks.properties import (
    Declaration,
    Equivariant,
    LinearInvariant,
    NormPreserving,
    Positive,
    VolumePreserving,
    declare,
    verify,
)
from dynablocks.robustness import certify
from dynablocks.switching import FreeSignal

DOUBLE = torch.float64
OWN, TORCHS = "_UnshuffledBackward", "PixelUnshuffleBackward0"
WIDE = lifting.WIDE_CHANNELS


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def require_same(found: Tensor, expected: Tensor, x: Tensor) -> None:
    """The same numbers in the same layout, and so the same gradient of ``x``."""
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    weights = torch.randn_like(expected)
    ours, torchs = (torch.autograd.grad(y, x, weights)[0] for y in (found, expected))
    assert torch.equal(ours, torchs)
    assert ours.stride() == torchs.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "factor"),
    [((2, WIDE, 4, 6), 2), ((1, WIDE + 1, 6, 3), 3), ((3, WIDE, 2, 2), 2), ((2, WIDE, 4, 4), 1), ((2, 3, 8, 4), 4)],
)
def test_space_to_depth_is_the_unshuffling_of_torch(
    shape: tuple[int, ...], factor: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
    module = SpaceToDepth(factor)
    require_same(module(x), functional.pixel_unshuffle(x, factor), x)
    assert torch.equal(module.inverse(module(x)), x)


@pytest.mark.parametrize(
    ("x", "node"),
    [
        (channels_last(2, WIDE, 4, 4), OWN),
        (channels_last(2, WIDE - 1, 4, 4), TORCHS),
        (torch.randn(2, WIDE, 4, 4), TORCHS),
        (channels_last(2, WIDE, 4, 8)[..., ::2], TORCHS),
        (channels_last(2, WIDE, 4, 4)[0], TORCHS),
    ],
    ids=["wide", "narrow", "channels first", "with gaps", "one image"],
)
def test_wide_channels_last_batches_take_the_copies(x: Tensor, node: str) -> None:
    y = SpaceToDepth(2)(x.requires_grad_())
    assert type(y.grad_fn).__name__ == node
    assert torch.equal(y, functional.pixel_unshuffle(x, 2))


def test_what_space_to_depth_gives_may_be_written_into() -> None:
    x = channels_last(2, WIDE, 2, 4).requires_grad_()
    y = SpaceToDepth(2)(x)
    y.mul_(3)
    assert torch.equal(y, 3 * functional.pixel_unshuffle(x, 2))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))


def test_an_image_of_no_whole_patches_is_refused_as_by_torch() -> None:
    for shape in ((1, WIDE, 3, 4), (1, WIDE, 4, 3)):
        with pytest.raises(RuntimeError, match="divisible by"):
            SpaceToDepth(2)(channels_last(*shape))


def test_derivatives_of_space_to_depth_of_every_order_and_mode() -> None:
    def cubed(x: Tensor) -> Tensor:
        return SpaceToDepth(2)(x) ** 3

    x = channels_last(1, WIDE, 2, 2, dtype=DOUBLE).requires_grad_()
    assert type(SpaceToDepth(2)(x).grad_fn).__name__ == OWN
    assert torch.autograd.gradcheck(cubed, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cubed, x, check_batched_grad=True)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_space_to_depth_under_the_transforms_of_torch(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    x = channels_last(3, WIDE, 2, 2, dtype=DOUBLE)

    def jacobians(module: nn.Module) -> Tensor:
        return torch.func.vmap(transform(lambda image: module(image[None])[0]))(x)

    found = jacobians(SpaceToDepth(2))
    assert torch.equal(found, jacobians(nn.PixelUnshuffle(2)))
    reverse = [torch.autograd.functional.jacobian(SpaceToDepth(2), image[None]) for image in x]
    assert torch.equal(found, torch.stack([dense[0, :, :, :, 0] for dense in reverse]))


@pytest.mark.parametrize(("shape", "factor"), [((2, 3, 8, 4), 4), ((1, WIDE, 4, 6), 2), ((2, 2, 6, 6), 3)])
def test_what_gpus_compute_is_the_unshuffling_in_the_layout_of_its_input(shape: tuple[int, ...], factor: int) -> None:
    x = channels_last(*shape).requires_grad_()
    require_same(lifting._regrouped(x, factor), functional.pixel_unshuffle(x, factor), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 3, 8, 6), (1, 3, 5, 5), (2, 3, 1, 1), (2, 3, 4, 1), (2, 1, 4, 4)])
def test_a_normalisation_is_its_formula_in_the_same_layout(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    channels = shape[1]
    module = PixelNormalisation((0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.7)[:channels])
    x = torch.rand(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()
    found, expected = module(x), (x - module.mean) * module.scale
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert found.is_contiguous(memory_format=layout)
    weights = torch.rand_like(expected)
    ours, plain = (torch.autograd.grad(y, x, weights)[0] for y in (found, expected))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    "x",
    [channels_last(2, 3, 8, 6)[:, :, ::2], torch.rand(2, 6, 8, 3).permute(0, 3, 2, 1), torch.rand(3, 4, 4)],
    ids=["with gaps", "columns first", "one image"],
)
def test_a_normalisation_of_images_that_lie_otherwise(x: Tensor) -> None:
    module = PixelNormalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.7))
    assert torch.equal(module(x), (x - module.mean) * module.scale)


def test_a_normalisation_under_vmap_as_in_a_loop() -> None:
    module = PixelNormalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.7))
    x = torch.rand(2, 4, 8, 6, 3).permute(0, 1, 4, 2, 3)
    assert torch.equal(torch.func.vmap(module)(x), torch.stack([module(part) for part in x]))


def test_one_number_a_channel_is_spread_in_the_layout_of_the_images() -> None:
    mean = torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    spread = lifting._spread(mean, channels_last(2, 3, 8, 6))
    assert torch.equal(spread, mean.expand(3, 8, 6))
    assert spread.stride() == (1, 18, 3)


@pytest.mark.parametrize("name", ["mean", "scale"])
def test_buffers_that_would_be_spread_over_channels_are_refused(name: str) -> None:
    """A grey image that is scaled by 4 in three channels grows by 4√3, and not by 4."""
    module, x = PixelNormalisation((0.5,), (0.25,)), torch.rand(2, 1, 4, 4)
    setattr(module, name, torch.full((3, 1, 1), 4.0))
    network = Network(nn.Sequential(module, nn.Flatten()), Head(48, 2), (1, 4, 4), ModelConfig())
    data = x, torch.zeros(2, dtype=torch.int64)
    for call in (lambda: module(x), module.declare, lambda: network.properties, lambda: certify(network, data)):
        with pytest.raises(InvalidArgument, match=rf"the {name} of \w+ has shape \(3, 1, 1\); \(1, 1, 1\), one number"):
            call()


def test_a_scale_of_pixels_is_refused() -> None:
    module = PixelNormalisation((0.5, 0.5), (0.25, 0.25))
    module.scale = torch.ones(2, 4, 4)
    with pytest.raises(InvalidArgument, match="one number for each channel"):
        module(torch.rand(1, 2, 4, 4))


@pytest.mark.parametrize("factor", [2.0, 1.5, 0, -1, True])
def test_a_factor_that_is_no_whole_number_is_refused(factor: float) -> None:
    with pytest.raises(InvalidArgument, match=r"^factor is .*; a whole number from 1 is needed\.$"):
        SpaceToDepth(factor)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SpaceToDepth(1),
        lambda: SpaceToDepth(2),
        lambda: SpaceToDepth(4),
        lambda: PaperLift((2, 4, 4), 2),
        lambda: PaperLift((2, 4, 4), 3, 1),
    ],
    ids=["factor 1", "factor 2", "factor 4", "paper's lift", "paper's lift of pixels"],
)
def test_maps_of_images_declare_what_is_measured_of_them(make: Callable[[], nn.Module]) -> None:
    module, x = make().double(), torch.randn(4, 2, 4, 4, dtype=DOUBLE)
    square = module(x).shape[1:].numel() == x.shape[1:].numel()
    asked = [NormPreserving(), LinearInvariant(), Equivariant(), Positive(), *[VolumePreserving()] * square]
    for stated in asked:
        measured = verify(module, x, kinds=(), against=(stated,)).passed
        assert measured == (stated in declare(module).properties), stated


class Magnified(SpaceToDepth):
    """It says of twice the image what holds of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def declare(self) -> Declaration:
        return super().declare()


class Signed(PaperLift):
    """It says of αWx what holds of ReLU(αWx)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * self.linear(x)

    def declare(self) -> Declaration:
        return super().declare()


@pytest.mark.parametrize(
    ("make", "kind"), [(lambda: Magnified(2), VolumePreserving), (lambda: Signed((2, 4, 4), 2), Positive)]
)
def test_a_map_that_only_says_so_is_refuted(make: Callable[[], nn.Module], kind: type) -> None:
    assert not verify(make(), torch.randn(4, 2, 4, 4), kinds=(kind,)).passed


def test_a_chain_through_space_to_depth_keeps_volume() -> None:
    shear = DynamicalBlock(ShearField(nn.Tanh(), (2, 4, 4)), "exact", FreeSignal(0.5))
    chain, x = Chain(shear, SpaceToDepth(2)).double(), torch.randn(3, 2, 4, 4, dtype=DOUBLE)
    assert verify(chain, x, kinds=(VolumePreserving,)).passed


def test_a_lift_by_an_infinite_factor_keeps_no_sign() -> None:
    """0 times ∞ is no number."""
    lift = PaperLift((1, 4, 4), 2)
    with torch.no_grad():
        lift.alpha.fill_(torch.inf)
    assert lift.properties.of(Positive) is None
    assert not verify(lift, torch.zeros(1, 1, 4, 4), kinds=(), against=(Positive(),)).passed
