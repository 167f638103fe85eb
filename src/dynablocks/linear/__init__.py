"""Linear maps with adjoints, orthogonal parametrisations and sound bounds on singular values."""

from dynablocks.linear.convolution import Conv, NormalisedConv, OrthogonalConv
from dynablocks.linear.dense import Dense, OrthogonalDense
from dynablocks.linear.maps import LinearMap, frozen_weights, shared_weights
from dynablocks.linear.orthogonal import ORTHOGONAL, cayley, expm, paraunitary_kernel
from dynablocks.linear.regularisers import ocnn_penalty
from dynablocks.linear.unit import UnitConv, UnitDense, UnitNorm
from dynablocks.numerics.bounds import Bounds, ConvGeometry, conv_norm_bounds, linear_norm_bounds

__all__ = [
    "ORTHOGONAL",
    "Bounds",
    "Conv",
    "ConvGeometry",
    "Dense",
    "LinearMap",
    "NormalisedConv",
    "OrthogonalConv",
    "OrthogonalDense",
    "UnitConv",
    "UnitDense",
    "UnitNorm",
    "cayley",
    "conv_norm_bounds",
    "expm",
    "frozen_weights",
    "linear_norm_bounds",
    "ocnn_penalty",
    "paraunitary_kernel",
    "shared_weights",
]
