"""Circular padding and its adjoint, each in one pass over the image; kernels as large as the image as one matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from jaxtyping import Float


def circular_pad(
    x: Float[Tensor, "batch channels height width"], before: int, after: int
) -> Float[Tensor, "batch channels padded_height padded_width"]:
    r"""The image continued periodically by ``before`` rows and columns ahead of it and ``after`` behind it.

    The same as :func:`torch.nn.functional.pad` with ``mode="circular"``; its gradient is the adjoint written out (the
    borders are added where they came from), in place of autograd's sum over slices. Differentiable any number of
    times, in forward mode too, and under :func:`torch.func.vmap`.

    Args:
        x: images.
        before, after: at most the height and the width.

    Example:
        >>> circular_pad(torch.arange(4.0).reshape(1, 1, 2, 2), 0, 1)[0, 0].tolist()
        [[0.0, 1.0, 0.0], [2.0, 3.0, 2.0], [0.0, 1.0, 0.0]]
    """
    return _Circular.of(x, before, after, fold=False) if before + after else x


def circulant_product(
    kernel: Float[Tensor, "out in size size"],
    x: Float[Tensor, "batch in size size"],
    before: int,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "batch out size size"]:
    r"""The circular cross-correlation with a kernel as large as the image, as one product with the circulant matrix.

    y_o(p) = b_o + Σ_{c,q} K_oc(q − p + before mod n) x_c(q): such a matrix has each entry of the kernel n² times and no
    zero, so that it costs no more arithmetic than the convolution, and processors reach their full rate with it, which
    they don't for convolutions of so few pixels and their gradients.

    Args:
        kernel: n × n.
        x: images of n × n pixels.
        before: how many pixels the image is continued by, ahead of it.
        bias: one number for each output channel.

    Example:
        >>> circulant_product(torch.arange(4.0).reshape(1, 1, 2, 2), torch.eye(2)[None, None], 0)[0, 0].tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """
    out_channels, _, size = kernel.shape[:3]
    moves = [(i - before, j - before) for i in range(size) for j in range(size)]
    pixels_last = kernel.permute(0, 2, 3, 1)
    blocks = torch.stack([pixels_last.roll(move, (1, 2)) for move in moves])
    offsets = None if bias is None else bias.repeat(size**2)
    y = functional.linear(x.permute(0, 2, 3, 1).flatten(1), blocks.flatten(0, 1).flatten(1), offsets)
    return y.reshape(-1, size, size, out_channels).permute(0, 3, 1, 2)


def _empty_as(x: Tensor, height: int, width: int) -> Tensor:
    """An uninitialised image of this size, laid out as ``x`` is; of all images where vmap hides more than one."""
    samples, channels = x.shape[:2]
    if x.stride(1) == 1 and channels > 1:
        return x.new_empty(samples, height, width, channels).permute(0, 3, 1, 2)
    return x.new_empty(samples, channels, height, width)


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    height, width = x.shape[2:]
    out = _empty_as(x, height + before + after, width + before + after)
    rows = out.narrow(2, before, height)
    rows.narrow(3, before, width).copy_(x)
    if before:
        rows.narrow(3, 0, before).copy_(x.narrow(3, width - before, before))
    if after:
        rows.narrow(3, before + width, after).copy_(x.narrow(3, 0, after))
    if before:
        out.narrow(2, 0, before).copy_(out.narrow(2, height, before))
    if after:
        out.narrow(2, before + height, after).copy_(out.narrow(2, before, after))
    return out


def _folded(y: Tensor, before: int, after: int) -> Tensor:
    for axis in (2, 3):
        size = y.shape[axis] - before - after
        core = y.narrow(axis, before, size)
        core = _empty_as(core, core.shape[2], core.shape[3]).copy_(core)
        if before:
            core.narrow(axis, size - before, before).add_(y.narrow(axis, 0, before))
        if after:
            core.narrow(axis, 0, after).add_(y.narrow(axis, before + size, after))
        y = core
    return y


class _Circular(torch.autograd.Function):
    """Padding, or its adjoint: each is the other's gradient."""

    @classmethod
    def of(cls, x: Tensor, before: int, after: int, fold: bool) -> Tensor:
        """The map, recorded by autograd."""
        image: Tensor = cls.apply(x, before, after, fold)  # type: ignore[no-untyped-call]
        return image

    @staticmethod
    def forward(x: Tensor, before: int, after: int, fold: bool) -> Tensor:
        return _folded(x, before, after) if fold else _padded(x, before, after)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int, bool], output: Tensor) -> None:
        _, ctx.before, ctx.after, ctx.fold = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _Circular.of(gradients[0], ctx.before, ctx.after, not ctx.fold), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _Circular.of(tangents[0], ctx.before, ctx.after, ctx.fold)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None, None], x: Tensor, *how: Any) -> tuple[Tensor, int]:
        samples = x.movedim(in_dims[0], 0)
        image = _Circular.of(samples.flatten(0, 1), *how)
        return image.reshape(*samples.shape[:2], *image.shape[1:]), 0
