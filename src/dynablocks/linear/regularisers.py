"""Penalties that pull a kernel towards orthogonality; they help training and guarantee nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float


def ocnn_penalty(kernel: Float[Tensor, "out in k k"], stride: int = 1) -> Float[Tensor, ""]:
    r"""‖W ⋆ W − δI‖²_F: how far the convolution is from row-orthogonal (from column-orthogonal where
    out > in · stride²).

    W ⋆ W is the kernel's correlation with itself over all shifts that are multiples of the stride; for columns, that of
    the kernel's phases, the kernels of stride 1 from the image's pixels of one position modulo the stride.

    Args:
        kernel: the kernel W.
        stride: the stride s of the convolution; s / gcd(s, d) with a dilation d, since outputs share pixels at such
            shifts of taps. Columns are then those of the pixels that the kernel sees.

    Source: Wang et al. (2020), "Orthogonal convolutional neural networks", section 3.2; paper section 3.3.

    Example:
        >>> ocnn_penalty(torch.eye(2).reshape(2, 2, 1, 1)).item()
        0.0
    """
    if kernel.shape[0] > kernel.shape[1] * stride**2:
        spare = -kernel.shape[-1] % stride
        kernel = functional.pixel_unshuffle(functional.pad(kernel, (0, spare, 0, spare)), stride).transpose(0, 1)
        stride = 1
    size = kernel.shape[-1]
    padding = (size - 1) // stride * stride
    correlation = functional.conv2d(kernel, kernel, stride=stride, padding=padding)
    target = torch.zeros_like(correlation)
    centre = padding // stride
    target[:, :, centre, centre] = torch.eye(kernel.shape[0], dtype=kernel.dtype, device=kernel.device)
    return (correlation - target).square().sum()
