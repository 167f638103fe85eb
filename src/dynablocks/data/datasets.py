"""A set of labelled images: one uint8 tensor, one label tensor, the names of the classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynablocks.errors import BadData, InvalidArgument

if TYPE_CHECKING:
    from jaxtyping import Int64, UInt8


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images of one size, held as one tensor.

    Pixels are whole numbers in 0..255, so a pixel can be neither NaN nor infinite; :func:`to_unit_range`
    maps them to [0, 1].

    Args:
        name: what results are labelled with, for example ``"digits"`` or ``"cifar10-jpeg"``.
        images: uint8, shape (N, C, H, W), N ≥ 1, C = 1 (grey) or 3 (RGB).
        labels: int64, shape (N,), each in [0, number of classes).
        class_names: one name for each label.

    Raises:
        BadData: a wrong type, shape or label.

    Example:
        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> data = ImageDataset("three", images, torch.tensor([0, 1, 1]), ("cat", "dog"))
        >>> len(data), data.image_shape, data.num_classes, len(data.subset([2]))
        (3, (1, 8, 8), 2, 1)
    """

    name: str
    images: UInt8[Tensor, "sample channel height width"]
    labels: Int64[Tensor, "sample"]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_images(self.name, self.images)
        _check_labels(self.name, self.labels, len(self.images), len(self.class_names))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """The number of classes, whether or not each occurs."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def subset(self, indices: Int64[Tensor, "chosen"] | Sequence[int]) -> ImageDataset:
        """The images at ``indices``, in that order, as a data set of its own.

        Raises:
            InvalidArgument: no index, an index that is not an integer, or one outside [0, N).
        """
        chosen = torch.as_tensor(indices)
        if chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.ndim != 1 or not len(chosen):
            raise InvalidArgument(
                f"indices have type {chosen.dtype} and shape {tuple(chosen.shape)}; "
                "a list of one or more integers is needed."
            )
        chosen = chosen.to(torch.int64)
        if chosen.min() < 0 or chosen.max() >= len(self):
            raise InvalidArgument(
                f"indices reach from {int(chosen.min())} to {int(chosen.max())}; "
                f"{self.name} has {len(self)} images, so allowed are 0 to {len(self) - 1}."
            )
        return ImageDataset(self.name, self.images[chosen], self.labels[chosen], self.class_names)


def _check_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise BadData(
            f"the images of {name} are {found}; a uint8 tensor of pixels 0 to 255 is needed "
            "(it cannot hold NaN or infinity; scale floats in [0, 1] by 255 and round them)."
        )
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise BadData(
            f"the images of {name} have shape {tuple(images.shape)}; (N, C, H, W) is needed, "
            "with at least one image and C = 1 (grey) or 3 (RGB)."
        )


def _check_labels(name: str, labels: Tensor, num_images: int, num_classes: int) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (num_images,):
        found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise BadData(f"the labels of {name} are {found}; an int64 tensor of shape ({num_images},) is needed.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise BadData(
            f"the labels of {name} reach from {low} to {high}; with {num_classes} classes allowed are 0 to "
            f"{num_classes - 1}; check that the files belong to this data set."
        )


def fingerprint(*datasets: ImageDataset) -> str:
    """SHA-256 of the bytes of each set's images (row by row) and labels (little-endian int64), as hexadecimal digits.

    Example:
        >>> images = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
        >>> fingerprint(ImageDataset("one", images, torch.tensor([0]), ("zero",)))[:8]
        '15ec7bf0'
    """
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(dataset.images.cpu().contiguous().numpy().data)
        digest.update(dataset.labels.cpu().contiguous().numpy().astype("<i8").data)
    return digest.hexdigest()
