"""Labelled points in the plane: two moons, circles, spirals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64
    from numpy.typing import NDArray

PointMaker = Callable[[int, float, int], "tuple[NDArray[np.float64], NDArray[np.int64]]"]
PLANAR_SETS: Registry[PointMaker] = Registry("planar set")


@PLANAR_SETS.register("moons")
def _moons(num_samples: int, noise: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import make_moons

    points, labels = make_moons(num_samples, noise=noise, random_state=seed)
    return points, labels


@PLANAR_SETS.register("circles")
def _circles(num_samples: int, noise: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    from sklearn.datasets import make_circles

    points, labels = make_circles(num_samples, noise=noise, factor=0.5, random_state=seed)
    return points, labels


@PLANAR_SETS.register("spirals")
def _spirals(num_samples: int, noise: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    labels = np.arange(num_samples) % 2
    radius = np.sqrt(random.uniform(0.01, 1.0, num_samples))
    angle = 3 * math.pi * radius + math.pi * labels
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points += noise * random.standard_normal(points.shape)
    order = random.permutation(num_samples)
    return points[order], labels[order]


def planar(
    name: str, num_samples: int, noise: float = 0.1, seed: int = 0
) -> tuple[Float64[Tensor, "sample 2"], Int64[Tensor, "sample"]]:
    """Two classes of points in the plane, in random order, each half of the samples (moons and circles: scikit-learn).

    - ``moons``: two interleaved half circles of radius 1, centred at (0, 0) and (1, 1/2) (``make_moons``);
    - ``circles``: circles of radius 1 (class 0) and 1/2 (class 1) about the origin (``make_circles``);
    - ``spirals``: r·(cos(3πr + πk), sin(3πr + πk)) for class k, r² uniform in [0.01, 1]: arms of 1.35 turns.

    Args:
        num_samples: at least 2.
        noise: standard deviation of the normal noise added to each coordinate, at least 0.
        seed: in 0..2³²−1; the points depend on nothing else.

    Returns:
        Points, float64 (N, 2), and labels 0 or 1, int64 (N,).

    Raises:
        InvalidArgument: an unknown name or an argument out of range.

    Source: the paper gives its planar set as a picture only (design D3); these stand in for it.

    Example:
        >>> points, labels = planar("spirals", 100, noise=0.0, seed=1)
        >>> points.shape, labels.bincount().tolist(), bool(points.norm(dim=1).max() <= 1)
        (torch.Size([100, 2]), [50, 50], True)
    """
    make = PLANAR_SETS.get_known(name)
    require_whole("num_samples", num_samples, low=2)
    require_range("noise", noise, low=0)
    if require_whole("seed", seed, low=0) >= 2**32:
        raise InvalidArgument(f"seed is {seed}; allowed are 0 to {2**32 - 1}.")
    points, labels = make(num_samples, noise, seed)
    return torch.from_numpy(points.astype(np.float64)), torch.from_numpy(labels.astype(np.int64))
