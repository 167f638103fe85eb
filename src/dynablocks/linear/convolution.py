"""Convolutions as linear maps between image spaces: free, normalised, exactly orthogonal."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.errors import InvalidArgument, require_choice, require_sizes, require_whole
from dynablocks.linear.circular import circulant_product, circular_pad
from dynablocks.linear.maps import LinearMap, require_shape
from dynablocks.linear.orthogonal import ORTHOGONAL, orthogonal_start, orthonormality_defect, paraunitary_kernel
from dynablocks.linear.regularisers import ocnn_penalty
from dynablocks.numerics.bounds import Bounds, ConvGeometry, conv_norm_bounds, conv_smallest_singular_value
from dynablocks.properties.own_code import overrides, shadowed

if TYPE_CHECKING:
    from jaxtyping import Float

PADDINGS = ("same", "full", "circular")

MOST_CIRCULANT = 4
"""The largest side n of images that are multiplied with the circulant matrix: it has n² times the kernel's numbers, and
is made anew for each product."""


class Conv(LinearMap):
    r"""A free convolution (cross-correlation) on images of a fixed size, with its adjoint and sound norm bounds.

    Args:
        in_shape: (channels, height, width) of one input.
        out_channels: channels of the output.
        kernel_size: k, for a k × k kernel.
        padding: ``"same"`` (zeros, n → n for odd k), ``"full"`` (zeros, n → n + k − 1) or ``"circular"`` (n → n).
        stride, groups, dilation: as in :class:`torch.nn.Conv2d`; circular padding needs stride 1.
        gain: the kernel starts orthogonal with this scale.

    Raises:
        InvalidArgument: sizes, a padding or options that make no convolution; when called, images of another shape.

    Example:
        >>> conv = Conv((2, 5, 5), 3, 3)
        >>> conv(torch.zeros(1, 2, 5, 5)).shape, conv.adjoint(torch.zeros(1, 3, 5, 5)).shape
        (torch.Size([1, 3, 5, 5]), torch.Size([1, 2, 5, 5]))
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        out_channels: int,
        kernel_size: int = 3,
        padding: str = "same",
        *,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        require_sizes("in_shape", in_shape, 3)
        self._padding = require_choice("padding", padding, PADDINGS)
        out_channels = require_whole("out_channels", out_channels, 1)
        self._kernel_size = require_whole("kernel_size", kernel_size, 1)
        self._stride, self._groups = require_whole("stride", stride, 1), require_whole("groups", groups, 1)
        self._dilation = require_whole("dilation", dilation, 1)
        self.in_shape = tuple(in_shape)
        self._require_convolution(out_channels)
        self.out_shape = (out_channels, *self._output_size(in_shape, self._reach))
        self.make_parameters(in_shape[0], out_channels, gain)

    @property
    def kernel_size(self) -> int:
        """k as it was given: products and bounds rest on it and on what follows, so that none of them can be set.

        A subclass may say otherwise for all of its maps, as by ``padding = "circular"``: products and bounds read that.
        """
        return self._kernel_size

    @property
    def padding(self) -> str:
        """The name of the padding."""
        return self._padding

    @property
    def stride(self) -> int:
        """As in :class:`torch.nn.Conv2d`, one number for both axes."""
        return self._stride

    @property
    def groups(self) -> int:
        """As in :class:`torch.nn.Conv2d`."""
        return self._groups

    @property
    def dilation(self) -> int:
        """As in :class:`torch.nn.Conv2d`, one number for both axes."""
        return self._dilation

    @property
    def zeros(self) -> int:
        """How many zeros are put around an image on either side; 0 with circular padding."""
        return {"same": self._reach // 2, "full": self._reach, "circular": 0}[self.padding]

    @property
    def geometry(self) -> ConvGeometry:
        """The convolution without its weight, as the bounds take it."""
        height, width = self.in_shape[1:]
        circular = self.padding == "circular"
        return ConvGeometry(
            input_size=(height, width),
            stride=self.stride,
            padding="same" if circular else self.zeros,
            padding_mode="circular" if circular else "zeros",
            groups=self.groups,
            dilation=self.dilation,
        )

    def _require_convolution(self, out_channels: int) -> None:
        """Refuse options that make no convolution, those that a subclass fixes too."""
        channels, groups, kernel_size, stride = self.in_shape[0], self.groups, self.kernel_size, self.stride
        require_choice("padding", self.padding, PADDINGS)
        if channels % groups or out_channels % groups:
            raise InvalidArgument(f"groups is {groups}; it must divide {channels} and {out_channels} channels.")
        if self.padding == "same" and kernel_size % 2 == 0:
            raise InvalidArgument(
                f"kernel_size is {kernel_size} with padding 'same'; use an odd one, or padding 'full'."
            )
        if self.padding != "circular":
            return
        if stride != 1:
            raise InvalidArgument(
                f"stride is {stride} with circular padding; use stride 1 (and space-to-depth to shrink)."
            )
        self.geometry.output_size((kernel_size, kernel_size))

    def make_parameters(self, in_channels: int, out_channels: int, gain: float) -> None:
        kernel = torch.empty(out_channels, in_channels // self.groups, self.kernel_size, self.kernel_size)
        nn.init.orthogonal_(kernel, gain=gain / self.kernel_size)
        self.kernel = nn.Parameter(kernel)

    def _output_size(self, in_shape: tuple[int, int, int], reach: int) -> tuple[int, int]:
        if self.padding == "circular":
            return in_shape[1], in_shape[2]
        height, width = ((n + 2 * self.zeros - reach - 1) // self.stride + 1 for n in in_shape[1:])
        if min(height, width) < 1:
            raise InvalidArgument(f"a {in_shape} image is too small for kernel {self.kernel_size}; use a smaller one.")
        return height, width

    def compute_weight(self) -> Float[Tensor, "out in k k"]:
        return self.kernel

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return self._convolve(weight, x, None)

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if type(self).multiply is not Conv.multiply:
            return super().affine(x, bias)
        return self._convolve(self.weight, x, bias)

    def _convolve(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        require_shape(self, self.in_shape, x)
        if self.padding == "circular":
            return self._circularly(weight, x, self._reach // 2, bias)
        return functional.conv2d(x, weight, bias, self.stride, self.zeros, self.dilation, self.groups)

    def _circularly(self, kernel: Tensor, x: Tensor, before: int, bias: Tensor | None = None) -> Tensor:
        if x.ndim == 3:
            return self._circularly(kernel, x[None], before, bias)[0]
        after = self._reach - before
        covers = kernel.shape[2:] == x.shape[2:] and kernel.shape[2] <= MOST_CIRCULANT
        if covers and self.groups == self.dilation == 1:
            return circulant_product(kernel, x, before, bias)
        return functional.conv2d(circular_pad(x, before, after), kernel, bias, 1, 0, self.dilation, self.groups)

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        require_shape(self, self.out_shape, y)
        if self.stride == 1 and self.groups == 1:
            turned = weight.flip(2, 3).transpose(0, 1)
            if self.padding == "circular":
                return self._circularly(turned, y, self._reach - self._reach // 2)
            return functional.conv2d(y, turned, None, 1, self._reach - self.zeros, self.dilation)
        if self.padding == "circular":
            return self._grouped_circular_adjoint(weight, y)
        sizes = [self.in_shape[i + 1] - self._smallest_preimage(i) for i in (0, 1)]
        return functional.conv_transpose2d(y, weight, None, self.stride, self.zeros, sizes, self.groups, self.dilation)

    @property
    def _reach(self) -> int:
        return (self.kernel_size - 1) * self.dilation

    def _smallest_preimage(self, axis: int) -> int:
        return (self.out_shape[axis + 1] - 1) * self.stride - 2 * self.zeros + self._reach + 1

    def _grouped_circular_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        per_group = weight.reshape(self.groups, -1, *weight.shape[1:]).flip(3, 4).transpose(1, 2).flatten(0, 1)
        return self._circularly(per_group, y, self._reach - self._reach // 2)

    def compute_norm_bounds(self) -> Bounds:
        return conv_norm_bounds(self.weight.detach(), self.geometry)

    def compute_smallest_singular_value(self) -> float:
        return conv_smallest_singular_value(self.weight.detach(), self.geometry)


class NormalisedConv(Conv):
    r"""A convolution with ‖W‖ <= 1 kept by projection after every optimiser step: W ↦ W / max(1, ‖W‖).

    The projection uses warm-started power iteration, as the paper does, so ‖W‖ <= 1 holds only up to its error: the
    *declared* constant is the upper bound of the kernel as it is, never 1 by assumption.

    Args:
        in_shape, out_channels, kernel_size, padding, gain, options: as for :class:`Conv`.
        penalty: weight of the OCNN regulariser ‖W ⋆ W − δI‖² in :func:`dynablocks.switching.regularisation`.
        project: whether the kernel is divided by max(1, ‖W‖) at all.

    Raises:
        InvalidArgument: sizes, a padding or options that make no convolution.

    Source: paper section 3.3; Wang et al. (2020), "Orthogonal convolutional neural networks".

    Example:
        >>> conv = NormalisedConv((2, 5, 5), 3, gain=9.0)
        >>> conv(torch.zeros(1, 2, 5, 5)).shape, conv.norm_bounds().upper < 1.5
        (torch.Size([1, 3, 5, 5]), True)
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        out_channels: int,
        kernel_size: int = 3,
        padding: str = "same",
        *,
        penalty: float = 0.0,
        project: bool = True,
        gain: float = 1.0,
        **options: int,
    ) -> None:
        super().__init__(in_shape, out_channels, kernel_size, padding, gain=gain, **options)
        self.penalty, self.project = penalty, project
        self.register_buffer("leading", torch.randn(1, *in_shape), persistent=True)
        self.leading: Tensor
        self.project_(iterations=20)

    @torch.no_grad()
    def project_(self, iterations: int = 1) -> None:
        """Divide the kernel by max(1, ‖W‖), ‖W‖ from power iteration started at the last leading vector."""
        if not self.project:
            return
        for _ in range(iterations):
            self.leading.copy_(self.power_step(self.kernel, self.leading / self.leading.norm()))
        norm = self.multiply(self.kernel, self.leading).norm()
        self.kernel.div_(torch.where(norm.isfinite(), norm, 1.0).clamp_min(1.0))

    def regularisation(self) -> Tensor | None:
        """``penalty`` · ‖W ⋆ W − δI‖², or ``None`` when the penalty is 0."""
        if not self.penalty:
            return None
        # Outputs share pixels where a multiple of the stride is one of the dilation, counted here in taps.
        stride = self.stride // math.gcd(self.stride, self.dilation)
        groups = [ocnn_penalty(kernel, stride) for kernel in self.kernel.chunk(self.groups)]
        return self.penalty * torch.stack(groups).sum()


class OrthogonalConv(Conv):
    r"""An exactly orthogonal convolution: circular padding AᵀA = AAᵀ = I; "full" zero padding AᵀA = I; "same" ‖A‖ <= 1.

    The kernel is paraunitary: one orthogonal matrix and 2(k − 1) projections of rank ⌊c/2⌋, all from one batched
    parametrisation.

    Args:
        in_shape: (channels, height, width) of one input.
        out_channels: at most the input's channels (fewer gives orthonormal rows); equal by default.
        kernel_size: k.
        padding: ``"circular"``, ``"full"`` or ``"same"``.
        method: ``"cayley"`` or ``"expm"``.
        spread: size of the random start.

    Raises:
        InvalidArgument: sizes or a padding that make no convolution, more channels than the input has, or an unknown
            ``method``; when called, images of another shape.

    Source: design D2.13; Li et al. (2019).

    Example:
        >>> conv = OrthogonalConv((4, 5, 5), kernel_size=3, padding="circular").double()
        >>> matrix = conv.dense_matrix()
        >>> bool((matrix @ matrix.mT - torch.eye(100)).abs().max() < 1e-12)
        True
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        out_channels: int | None = None,
        kernel_size: int = 3,
        padding: str = "circular",
        *,
        method: str = "cayley",
        spread: float = 1.0,
    ) -> None:
        self.spread = spread
        self.parametrisation = ORTHOGONAL.get_known(method)
        require_sizes("in_shape", in_shape, 3)
        out_channels = in_shape[0] if out_channels is None else require_whole("out_channels", out_channels, 1)
        if out_channels > in_shape[0]:
            raise InvalidArgument(
                f"out_channels is {out_channels}; at most the {in_shape[0]} input channels are allowed."
            )
        super().__init__(in_shape, out_channels, kernel_size, padding)
        # Windows that the border cuts off leave no orthonormal rows, and pixels that fewer windows see no columns.
        circular = self.padding == "circular"
        self.rows_orthonormal = circular or self._reach == self.zeros == 0
        seen_by_all = circular or (self.stride == 1 and self.zeros >= self._reach)
        self.columns_orthonormal = out_channels == in_shape[0] and seen_by_all

    def make_parameters(self, in_channels: int, out_channels: int, gain: float) -> None:
        factors, rank = 2 * (self.kernel_size - 1), max(1, in_channels // 2)
        self.base = nn.Parameter(orthogonal_start((), in_channels, out_channels, self.spread))
        frames = orthogonal_start((factors,), in_channels, rank, self.spread)
        # With none, as of 1 x 1, several devices would wait for their gradient.
        self.frames = nn.Parameter(frames, requires_grad=factors > 0)

    def weight_group(self) -> Hashable | None:
        if overrides(self, OrthogonalConv, "compute_weight") or shadowed(self, "compute_weights"):
            return None
        base, frames = self.base, self.frames
        return type(self).compute_weights, self.parametrisation, base.shape, frames.shape, base.dtype, base.device

    def compute_weights(self, alike: Sequence[LinearMap]) -> Sequence[Float[Tensor, "out in k k"]]:
        convs = [linear for linear in alike if isinstance(linear, OrthogonalConv)]
        bases, frames = torch.stack([c.base for c in convs]), torch.stack([c.frames for c in convs])
        if bases.shape[1:] == frames.shape[2:]:
            together = self.parametrisation(torch.cat([bases[:, None], frames], 1))
            bases, frames = together[:, 0], together[:, 1:]
        else:
            bases, frames = self.parametrisation(bases), self.parametrisation(frames)
        return paraunitary_kernel(bases.mT, frames).unbind()

    def compute_weight(self) -> Float[Tensor, "out in k k"]:
        return self.compute_weights([self])[0]

    def compute_orthonormality_defect(self) -> float:
        return orthonormality_defect(self.weight)
