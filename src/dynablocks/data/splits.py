"""Training, validation and test images of one data set; validation is held out from training, never from test."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynablocks.data.datasets import ImageDataset, fingerprint
from dynablocks.errors import BadData, InvalidArgument, require_whole
from dynablocks.seeding import seeded_generator

_VALIDATION_STREAM = 0x56414C


@dataclass(frozen=True, eq=False)
class DataSplits:
    """The parts of a data set.

    Args:
        train: what a model learns from.
        validation: held out from the training images; None when its size is 0.
        test: what results are reported on.
        fingerprint: SHA-256 over the images and labels of all training images (before holding out) and of the test
            images, so it names the copy of the data whatever the validation size.

    Raises:
        BadData: the parts differ in image shape or class names.
    """

    train: ImageDataset
    validation: ImageDataset | None
    test: ImageDataset
    fingerprint: str

    def __post_init__(self) -> None:
        for role, part in (("test", self.test), ("validation", self.validation)):
            if part is None:
                continue
            if part.image_shape != self.train.image_shape:
                raise BadData(
                    f"the {role} images of {part.name} have shape {part.image_shape} and the training images "
                    f"{self.train.image_shape}; all images must have one shape (channels, height, width)."
                )
            if part.class_names != self.train.class_names:
                raise BadData(f"the {role} and training images of {part.name} name their classes differently.")


def hold_out(
    train: ImageDataset, test: ImageDataset, validation: int = 0, seed: int = 0, digest: str | None = None
) -> DataSplits:
    """Take ``validation`` images out of ``train``, at random and without stratification.

    The held-out images are the first ``validation`` ones of a permutation that depends on ``seed`` and the number of
    training images only, so a larger validation set contains a smaller one; the rest keeps its order.

    Args:
        validation: number of images, 0 ≤ validation < len(train).
        digest: the fingerprint of train and test when it is known already.

    Raises:
        InvalidArgument: ``validation`` or ``seed`` is not an integer, or ``validation`` is out of range.

    Example:
        >>> images = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
        >>> five = ImageDataset("five", images, torch.arange(5), tuple("abcde"))
        >>> splits = hold_out(five, five, validation=2)
        >>> len(splits.train), len(splits.validation)
        (3, 2)
    """
    require_validation(validation)
    if validation >= len(train):
        raise InvalidArgument(
            f"validation is {validation}; {train.name} has {len(train)} training images, so allowed are 0 to "
            f"{len(train) - 1}; choose a smaller one."
        )
    generator = seeded_generator(_VALIDATION_STREAM, seed)
    digest = digest or fingerprint(train, test)
    if validation == 0:
        return DataSplits(train, None, test, digest)
    order = torch.randperm(len(train), generator=generator)
    held, rest = order[:validation].sort().values, order[validation:].sort().values
    return DataSplits(train.subset(rest), train.subset(held), test, digest)


def require_validation(validation: int) -> int:
    """``validation`` when it is an integer of at least 0, otherwise :class:`InvalidArgument`."""
    return require_whole("validation", validation, low=0)
