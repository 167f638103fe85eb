"""Batches and augmentation on tensors, as pure functions of (seed, epoch, step)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, require_choice, require_whole
from dynablocks.seeding import seeded_generator

if TYPE_CHECKING:
    from jaxtyping import Float32, Int64, UInt8

_BATCH_STREAM = 0x424154
_AUGMENT_STREAM = 0x415547

CROP_FILLS = ("zeros", "reflect")


def batch_indices(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[Int64[Tensor, "batch"]]:
    """The index tensors of one epoch's batches: a random permutation cut into full batches.

    The last incomplete batch is dropped (the permutation differs each epoch, so no sample is left out for good), which
    gives ⌊num_samples / batch_size⌋ batches. With fewer samples than ``batch_size`` there is one batch of all of them.

    Args:
        num_samples: at least 1.
        batch_size: at least 1.
        seed: any integer.
        epoch: at least 0.

    Returns:
        CPU int64 tensors; they index tensors on any device.

    Raises:
        InvalidArgument: an argument is out of range or not an integer.

    Example:
        >>> [len(batch) for batch in batch_indices(10, 4, seed=0, epoch=0)]
        [4, 4]
    """
    require_whole("num_samples", num_samples, low=1)
    require_whole("batch_size", batch_size, low=1)
    require_whole("epoch", epoch, low=0)
    generator = seeded_generator(_BATCH_STREAM, seed, epoch)
    order = torch.randperm(num_samples, generator=generator)
    size = min(batch_size, num_samples)
    return list(torch.split(order[: num_samples - num_samples % size], size))


def to_unit_range(images: UInt8[Tensor, "batch channel height width"]) -> Float32[Tensor, "batch channel height width"]:
    """Pixels 0..255 as float32 in [0, 1]: x / 255. Device and memory format stay.

    Raises:
        InvalidArgument: the images are not uint8.

    Example:
        >>> to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist()
        [0.0, 0.20000000298023224, 1.0]
    """
    if images.dtype != torch.uint8:
        raise InvalidArgument(f"images have type {images.dtype}; uint8 pixels in 0 to 255 are needed.")
    return images.to(torch.float32).div_(255)


def augment(
    images: UInt8[Tensor, "batch channel height width"],
    seed: int,
    epoch: int,
    step: int,
    crop_padding: int = 4,
    flip: bool = True,
    crop_fill: str = "zeros",
    *,
    count: int | None = None,
    share: slice | None = None,
) -> Float32[Tensor, "batch channel height width"]:
    """Random crop of the padded image and random horizontal flip of each image, as float32 in [0, 1].

    Each image is padded by ``crop_padding`` pixels on every side, black ones or its own mirrored at the edge, and cut
    back to its size at a uniform offset in {0..2·crop_padding}²; then it is mirrored with probability 1/2. Draws are
    made on the CPU by a generator seeded with a hash of (seed, epoch, step), so they are the same on every device and
    leave the global random state alone. Where several devices share a batch they are those of the whole batch, so that
    each augments its own images alone as one device would among all.

    Args:
        images: a uint8 batch on any device; its memory format (contiguous or channels_last) is kept.
        seed: any integer.
        epoch: at least 0.
        step: the batch's number within its epoch, at least 0.
        crop_padding: at least 0, below height and width; 0 switches cropping off.
        flip: whether to mirror.
        crop_fill: what the padding holds: ``"zeros"``, or ``"reflect"``, the image mirrored at its edge, without the
            edge itself (as in ``torch.nn.functional.pad``).
        count: of how many images the whole batch is; all of it is in ``images`` when ``None``.
        share: which of them are in ``images``; all when ``None``.

    Raises:
        InvalidArgument: images are not a uint8 batch, or not as many as ``share`` has of ``count``, or a number is out
            of range.

    Source: the usual CIFAR augmentation (Lee et al., Deeply-supervised nets, 2015; design D4).

    Example:
        >>> batch = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
        >>> augment(batch, seed=0, epoch=0, step=0).shape
        torch.Size([2, 3, 8, 8])
        >>> second = augment(batch[1:], seed=0, epoch=0, step=0, count=2, share=slice(1, None))
        >>> torch.equal(second, augment(batch, seed=0, epoch=0, step=0)[1:])
        True
    """
    require_whole("epoch", epoch, low=0)
    require_whole("step", step, low=0)
    require_whole("crop_padding", crop_padding, low=0)
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InvalidArgument(f"images are {images.dtype} {tuple(images.shape)}; a uint8 batch (N, C, H, W) is needed.")
    require_crop(images.shape[-2:], crop_padding, crop_fill)
    whole = len(images) if count is None else require_whole("count", count, low=0)
    part = slice(None) if share is None else share
    if (wanted := len(range(whole)[part])) != len(images):
        raise InvalidArgument(
            f"images are {len(images)}, but {part} of a batch of {whole} has {wanted}; give the images of that share."
        )
    if crop_padding == 0 and not flip:
        return to_unit_range(images)
    offsets, mirrored = (drawn[part] for drawn in _draws(whole, seed, epoch, step, crop_padding))
    if not flip:
        mirrored = torch.zeros_like(mirrored)
    offsets, mirrored = offsets.to(images.device, non_blocking=True), mirrored.to(images.device, non_blocking=True)
    return to_unit_range(_crop(images, offsets, mirrored, crop_padding, crop_fill))


def require_crop(size: tuple[int, ...], crop_padding: int, crop_fill: str) -> None:
    """Refuse a padding that leaves nothing of the image in some crops, or into which it cannot be reflected.

    Raises:
        InvalidArgument: as said, or an unknown fill.
    """
    require_choice("crop_fill", crop_fill, CROP_FILLS)
    if crop_padding >= min(size):
        raise InvalidArgument(
            f"crop_padding is {crop_padding}; of images of {size[0]}x{size[1]} pixels 0 to {min(size) - 1} is allowed."
        )


def _draws(count: int, seed: int, epoch: int, step: int, padding: int) -> tuple[Tensor, Tensor]:
    generator = seeded_generator(_AUGMENT_STREAM, seed, epoch, step)
    mirrored = torch.randint(2, (count, 1), generator=generator) == 1
    offsets = torch.randint(2 * padding + 1, (count, 2), generator=generator)
    return offsets, mirrored


def _crop(images: Tensor, offsets: Tensor, mirrored: Tensor, padding: int, fill: str) -> Tensor:
    count, channels, height, width = images.shape
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + offsets[:, 1:]
    if fill == "reflect":
        source, rows, columns = images, _reflected(rows - padding, height), _reflected(columns - padding, width)
    else:
        source = torch.nn.functional.pad(images, (padding, padding, padding, padding))
    area, stride = source.shape[2] * source.shape[3], source.shape[3]
    pixels = (rows[:, :, None] * stride + columns[:, None, :]).view(count, 1, height * width)
    if images.is_contiguous():
        flat = source.reshape(count, channels, -1)
        return flat.gather(2, pixels.expand(count, channels, -1)).view(images.shape)
    first = torch.arange(count, device=images.device).view(count, 1, 1) * area
    flat = source.permute(0, 2, 3, 1).reshape(-1, channels)
    return flat.index_select(0, (pixels + first).view(-1)).view(count, height, width, channels).permute(0, 3, 1, 2)


def _reflected(index: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - index.abs()).abs()
