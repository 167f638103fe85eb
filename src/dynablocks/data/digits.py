"""Handwritten digits: scikit-learn's 1,797 real grey 8×8 images, nothing to download."""

from __future__ import annotations

import numpy as np
import torch

from dynablocks.data.datasets import ImageDataset


def load_digits() -> tuple[ImageDataset, ImageDataset]:
    """The training and test images of ``digits``: 1 channel, 8×8, pixels 0..16 scaled to 0..255 and rounded.

    The split is fixed, whatever the seed: of each digit's images, in scikit-learn's order, the third of every five is a
    test image. So both parts have the class frequencies of the whole (stratified, 80/20).

    Source: Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI 1998 (its test part).

    Example:
        >>> train, test = load_digits()
        >>> len(train), len(test), train.image_shape
        (1438, 359, (1, 8, 8))
    """
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy(np.rint(bunch.images / 16 * 255).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    rank = torch.zeros_like(labels)
    for digit in range(10):
        rank[labels == digit] = torch.arange(int((labels == digit).sum()))
    is_test = rank % 5 == 2
    names = tuple(str(digit) for digit in range(10))
    whole = ImageDataset("digits", images, labels, names)
    return whole.subset((~is_test).nonzero().flatten()), whole.subset(is_test.nonzero().flatten())
