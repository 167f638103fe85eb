"""Parts with a forward, flow or step of their own: what is proved of the library's classes does not hold for them."""

from __future__ import annotations

from torch import nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.fields import MetricField, RidgeField, TwoMatrixField
from dynablocks.integrators import ExactFlow, ExplicitEuler
from dynablocks.lifting import ChannelMix, Head, PaperLift, PixelNormalisation, SpaceToDepth, ZeroLift
from dynablocks.linear import Conv, Dense, LinearMap
from dynablocks.norms import Channelwise, Whitening
from dynablocks.properties.own_code import overrides, shadowed

FIELDS: tuple[type[object], ...] = (RidgeField, TwoMatrixField, MetricField)
PRODUCTS = ("forward", "multiply", "multiply_adjoint", "affine", "adjoint")
"""The methods of linear maps that compute."""
METHODS: tuple[type[object], ...] = (ExplicitEuler, ExactFlow)
LAYERS: tuple[type[object], ...] = (
    nn.Sequential,
    DynamicalBlock,
    Channelwise,
    Whitening,
    PixelNormalisation,
    SpaceToDepth,
    ZeroLift,
    PaperLift,
    Head,
    ChannelMix,
    Conv,
    Dense,
    LinearMap,
)


def has_own(part: object, method: str) -> bool:
    """Whether the part is of a subclass that replaces this method of the class whose code is known.

    Example:
        >>> class Louder(nn.Sequential):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> has_own(Louder(), "forward"), has_own(nn.Sequential(), "forward"), has_own(nn.ReLU(), "forward")
        (True, False, False)
    """
    known = next((kind for kind in (*FIELDS, *METHODS, *LAYERS) if isinstance(part, kind)), None)
    return shadowed(part, method) or (known is not None and overrides(part, known, method))
