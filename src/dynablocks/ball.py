"""The ℓ2 ball around images: random points of it, the projection on it, and the direction in which an attack moves.

Norms and directions are there twice. The attack in training sums in the images' memory format and copies nothing; those
of an evaluation round as Foolbox does, with which they are compared image by image. The two differ in the last digits,
on which trained weights and stored attacks depend, so neither can stand for the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

FOOLBOX_FLOOR = 1e-12
"""What a norm counts as at least, in Foolbox."""


def unit_ball_points(draws: Float[Tensor, "batch draws"]) -> Float[Tensor, "batch size"]:
    """Uniform points of the unit ball, one a row of standard normal numbers: two more than a point has entries.

    Source: the first d coordinates of a uniform point of the sphere in d + 2 dimensions (Voelker et al. 2017).

    Example:
        >>> unit_ball_points(torch.tensor([[3.0, 0.0, 4.0]]))
        tensor([[0.6000]])
    """
    return (draws / draws.norm(dim=1, keepdim=True))[:, :-2]


def projected(
    delta: Float[Tensor, "batch channels height width"],
    radius: float | Float[Tensor, "batch 1 1 1"],
    norms: Float[Tensor, "batch 1 1 1"],
) -> Float[Tensor, "batch channels height width"]:
    """δ min(1, r / ‖δ‖): the point of the ball that is nearest to δ.

    Args:
        delta: δ of each image.
        radius: r.
        norms: ‖δ‖ as the caller computes it, above 0.

    Example:
        >>> delta = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
        >>> projected(delta, 10.0, image_norms(delta)).tolist() == delta.tolist()
        True
        >>> round(float(image_norms(projected(delta, 1.0, image_norms(delta)))), 6)
        1.0
    """
    return delta * (radius / norms).clamp_max(1.0)


def image_norms(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 1 1"]:
    """‖x‖ of each image, in any memory format without a copy."""
    return x.square().sum((1, 2, 3), keepdim=True).sqrt()


def direction(gradient: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """g / ‖g‖ of each image, however small; 0 where g is 0 or not finite. Nothing here waits for the device."""
    tiny = torch.finfo(gradient.dtype).tiny
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    gradient = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny)
    return gradient / image_norms(gradient).clamp_min(tiny)


def foolbox_norms(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 1 1"]:
    """‖x‖ of each image, but at least 1e-12."""
    return x.flatten(1).norm(dim=1).clamp_min(FOOLBOX_FLOOR)[:, None, None, None]


def foolbox_direction(
    gradient: Float[Tensor, "batch channels height width"], *, exact: bool
) -> Float[Tensor, "batch channels height width"]:
    """g / ‖g‖, without entries that are not finite; 0 where none is finite, or g is 0.

    ``exact`` scales tiny gradients up first, otherwise ‖g‖ counts as 1e-12 at least, as in Foolbox.
    """
    gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
    if exact:
        largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
        gradient = gradient / torch.where(largest > 0, largest, 1.0)
    return gradient * (1 / foolbox_norms(gradient))
