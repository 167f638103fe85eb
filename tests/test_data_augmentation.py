"""Batches, augmentation, seeds and planar sets: oracles, determinism, independence of global random state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dynablocks.data import augment, batch_indices, mixed_seed, planar, to_unit_range
from dynablocks.data.augmentation import _draws
from dynablocks.errors import InvalidArgument


def _images(count: int = 16, channels: int = 3, height: int = 12, width: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, channels, height, width), generator=generator).to(torch.uint8)


def _slow_augment(
    images: torch.Tensor, offsets: torch.Tensor, mirrored: torch.Tensor, padding: int, mode: str = "constant"
) -> torch.Tensor:
    """Image by image with NumPy: pad, cut, mirror, divide."""
    result = []
    for image, (down, right), mirror in zip(images.numpy(), offsets.tolist(), mirrored.flatten().tolist(), strict=True):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=mode)  # type: ignore[call-overload]
        cut = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
        result.append((cut[:, :, ::-1] if mirror else cut).astype(np.float32) / np.float32(255))
    return torch.from_numpy(np.stack(result))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4, 9])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_augment_equals_the_slow_reference(
    channels: int, padding: int, flip: bool, memory_format: torch.memory_format
) -> None:
    images = _images(channels=channels).contiguous(memory_format=memory_format)
    offsets, mirrored = _draws(len(images), 3, 5, 7, padding)
    expected = _slow_augment(images, offsets, mirrored & flip, padding)
    result = augment(images, 3, 5, 7, crop_padding=padding, flip=flip)
    assert torch.equal(result, expected)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=memory_format)
    broken = _slow_augment(images, offsets.flip(1), mirrored & flip, padding)
    assert padding == 0 or not torch.equal(result, broken)


@pytest.mark.parametrize("padding", [1, 4, 9])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reflected_padding_equals_that_of_numpy(padding: int, memory_format: torch.memory_format) -> None:
    images = _images().contiguous(memory_format=memory_format)
    offsets, mirrored = _draws(len(images), 3, 5, 7, padding)
    result = augment(images, 3, 5, 7, crop_padding=padding, crop_fill="reflect")
    assert torch.equal(result, _slow_augment(images, offsets, mirrored, padding, "reflect"))
    assert result.is_contiguous(memory_format=memory_format)
    assert not torch.equal(result, _slow_augment(images, offsets, mirrored, padding, "symmetric"))


def test_a_view_that_is_neither_contiguous_nor_channels_last_is_augmented_alike() -> None:
    images = _images(count=32)
    assert torch.equal(augment(images[::2], 0, 0, 0), augment(images[::2].contiguous(), 0, 0, 0))


@pytest.mark.parametrize("share", [slice(0, None, 2), slice(1, None, 2), slice(2, None, 3), slice(5, 9), slice(None)])
@pytest.mark.parametrize("options", [{}, {"crop_fill": "reflect"}, {"flip": False}, {"crop_padding": 0, "flip": False}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_share_of_a_batch_is_augmented_as_it_is_in_the_whole(
    share: slice, options: dict[str, Any], memory_format: torch.memory_format
) -> None:
    images = _images().contiguous(memory_format=memory_format)
    whole = augment(images, 3, 5, 7, **options)
    own = images[share].contiguous(memory_format=memory_format)
    result = augment(own, 3, 5, 7, **options, count=len(images), share=share)
    assert torch.equal(result, whole[share])
    assert result.is_contiguous(memory_format=memory_format)


def test_draws_for_a_share_alone_are_others() -> None:
    """The broken twin."""
    images = _images()
    assert not torch.equal(augment(images[1::2], 3, 5, 7), augment(images, 3, 5, 7)[1::2])


def test_augmentation_depends_on_seed_epoch_and_step_and_on_nothing_else() -> None:
    images = _images()
    first = augment(images, 1, 2, 3)
    torch.manual_seed(999)
    torch.rand(5)
    before = torch.get_rng_state()
    assert torch.equal(augment(images, 1, 2, 3), first)
    batch_indices(50, 8, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (3, 2, 1)]:
        assert not torch.equal(augment(images, *other), first)


def test_cropping_draws_do_not_change_the_mirroring() -> None:
    assert torch.equal(_draws(64, 0, 0, 0, 4)[1], _draws(64, 0, 0, 0, 0)[1])


def test_offsets_and_mirroring_are_uniform() -> None:
    count, padding = 20_000, 4
    offsets, mirrored = _draws(count, 0, 0, 0, padding)
    sides = 2 * padding + 1
    for axis in range(2):
        counts = torch.bincount(offsets[:, axis], minlength=sides).double()
        expected = count / sides
        # Chi-squared with 8 degrees of freedom exceeds 31.8 with probability 1e-4.
        assert ((counts - expected) ** 2 / expected).sum() < 31.8
    assert abs(float(mirrored.double().mean()) - 0.5) < 4 * 0.5 / count**0.5


def test_a_uniform_image_keeps_its_values_and_the_padding_is_black() -> None:
    white = torch.full((64, 1, 8, 8), 255, dtype=torch.uint8)
    values = augment(white, 0, 0, 0).unique()
    assert values.tolist() == [0.0, 1.0]
    assert torch.equal(augment(white, 0, 0, 0, crop_padding=0), torch.ones(64, 1, 8, 8))


def test_to_unit_range_is_division_by_255() -> None:
    pixels = torch.arange(256).to(torch.uint8)
    exact = torch.arange(256, dtype=torch.float64) / 255
    assert (to_unit_range(pixels).double() - exact).abs().max() <= torch.finfo(torch.float32).eps
    assert to_unit_range(pixels).max() == 1


def test_batches_cover_each_sample_at_most_once_and_drop_the_rest() -> None:
    batches = batch_indices(103, 10, seed=1, epoch=2)
    assert [len(batch) for batch in batches] == [10] * 10
    seen = torch.cat(batches)
    assert len(seen.unique()) == 100
    assert seen.min() >= 0
    assert seen.max() < 103
    again = torch.cat(batch_indices(103, 10, seed=1, epoch=2))
    assert torch.equal(seen, again)
    assert not torch.equal(seen, torch.cat(batch_indices(103, 10, seed=1, epoch=3)))
    assert not torch.equal(seen, torch.cat(batch_indices(103, 10, seed=2, epoch=2)))


def test_fewer_samples_than_a_batch_give_one_batch_of_all() -> None:
    (batch,) = batch_indices(3, 10, seed=0, epoch=0)
    assert batch.sort().values.tolist() == [0, 1, 2]


def test_mixed_seeds_do_not_collide_on_a_grid() -> None:
    seeds = {mixed_seed(a, b, c) for a in range(-3, 4) for b in range(30) for c in range(50)}
    assert len(seeds) == 7 * 30 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(1) != mixed_seed(1, 0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: augment(_images().float(), 0, 0, 0), "uint8"),
        (lambda: augment(_images()[0], 0, 0, 0), "uint8 batch"),
        (lambda: augment(_images(), 0, -1, 0), "epoch is -1"),
        (lambda: augment(_images(), 0, 0, -1), "step is -1"),
        (lambda: augment(_images(), 0, 0, 0, crop_padding=-1), "crop_padding is -1"),
        (lambda: augment(_images(), 0, 0, 0, crop_fill="edge"), "crop_fill 'edge'"),
        (lambda: augment(_images(), 0, 0, 0, count=-1), "count is -1"),
        (lambda: augment(_images(), 0, 0, 0, count=15), "images are 16, but .* of a batch of 15 has 15"),
        (
            lambda: augment(_images(), 0, 0, 0, share=slice(0, None, 2)),
            "images are 16, but .* of a batch of 16 has 8; give the images of that share",
        ),
        (
            lambda: augment(_images(), 0, 0, 0, crop_padding=10, crop_fill="reflect"),
            "0 to 9 is allowed",
        ),
        (lambda: augment(_images(), 0.5, 0, 0), "seed is 0.5"),  # type: ignore[arg-type]
        (lambda: to_unit_range(_images().float()), "uint8"),
        (lambda: batch_indices(0, 1, 0, 0), "num_samples is 0"),
        (lambda: batch_indices(5, 0, 0, 0), "batch_size is 0"),
        (lambda: batch_indices(5, 2, 0, -1), "epoch is -1"),
        (lambda: batch_indices(5, True, 0, 0), "batch_size is True"),
        (lambda: planar("moon", 10), "did you mean 'moons'"),
        (lambda: planar("moons", 1), "num_samples is 1"),
        (lambda: planar("moons", 10, noise=-1.0), "noise is -1.0"),
        (lambda: planar("moons", 10, noise=float("nan")), "noise is nan"),
        (lambda: planar("moons", 10, seed=-1), "seed is -1"),
        (lambda: planar("moons", 10, seed=2**32), "allowed are 0 to 4294967295"),
    ],
)
def test_bad_arguments_get_one_sentence(call, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidArgument, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["moons", "circles", "spirals"])
def test_planar_sets_are_balanced_and_a_function_of_their_seed(name: str) -> None:
    points, labels = planar(name, 200, noise=0.05, seed=4)
    assert points.dtype == torch.float64
    assert points.shape == (200, 2)
    assert labels.bincount().tolist() == [100, 100]
    np.random.seed(0)  # noqa: NPY002
    again, _ = planar(name, 200, noise=0.05, seed=4)
    assert torch.equal(points, again)
    assert not torch.equal(points, planar(name, 200, noise=0.05, seed=5)[0])


def test_planar_points_lie_on_their_curves_without_noise() -> None:
    points, labels = planar("circles", 100, noise=0.0)
    radius = torch.where(labels == 0, 1.0, 0.5)
    assert (points.norm(dim=1) - radius).abs().max() < 1e-12
    points, labels = planar("moons", 100, noise=0.0)
    centred = points - torch.tensor([1.0, 0.5], dtype=torch.float64) * labels[:, None]
    assert (centred.norm(dim=1) - 1).abs().max() < 1e-12
    points, labels = planar("spirals", 100, noise=0.0)
    radius = points.norm(dim=1)
    angle = 3 * torch.pi * radius + torch.pi * labels.double()
    assert (points - radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)).abs().max() < 1e-12
