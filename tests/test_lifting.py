"""Maps of channels-last images, of which a few copies are faster than torch's own: the same bits and derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks import lifting
from dynablocks.lifting import PixelNormalisation, SpaceToDepth

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
