"""Linear (and nearly linear) maps between blocks that change the dimension, each with its Lipschitz constant."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.errors import InvalidArgument, require_choice, require_sizes, require_whole
from dynablocks.linear import Bounds, LinearMap, NormalisedConv, linear_norm_bounds
from dynablocks.linear.dense import Dense
from dynablocks.linear.maps import require_shape
from dynablocks.linear.orthogonal import ORTHOGONAL, orthogonal_start, orthonormality_defect
from dynablocks.properties import (
    Declaration,
    Equivariant,
    GradientNormPreserving,
    Invertible,
    LinearInvariant,
    Lipschitz,
    NormPreserving,
    Positive,
    Property,
    Structured,
    VolumePreserving,
)

if TYPE_CHECKING:
    from jaxtyping import Float


class PixelNormalisation(Structured):
    r"""x ↦ (x − mean) / std per channel: L = 1 / min std. A layer of the model, so certificates live in pixel space.

    Args:
        mean, std: one number a channel.

    Raises:
        InvalidArgument: they differ in length or are empty, a number is not finite, or a std is not above 0; when it is
            called, or asked for its properties: buffers of another shape were put in their place.

    Example:
        >>> round(PixelNormalisation((0.5,), (0.25,)).properties.lipschitz, 6)
        4.0
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0 or not all(map(math.isfinite, (*mean, *std))):
            raise InvalidArgument(f"mean {mean} and std {std} must be finite, of one length, with std > 0.")
        self.channels = len(mean)
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("scale", (1 / torch.tensor(std, dtype=torch.float64)).float().reshape(-1, 1, 1))
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        self._require_numbers()
        require_shape(self, (self.channels, *x.shape[-2:]), x)
        mean, scale = self.mean, self.scale
        if x.device.type == "cpu" and x.ndim == 4 and x.shape[1] > 1 and x.stride(1) == 1:
            mean, scale = _spread(mean, x), _spread(scale, x)
        return (x - mean) * scale

    def _require_numbers(self) -> None:
        """Refuse buffers of another shape, put there since: spread over channels they would make a wider map."""
        wanted = (self.channels, 1, 1)
        for name, held in (("mean", self.mean), ("scale", self.scale)):
            if tuple(held.shape) != wanted:
                raise InvalidArgument(
                    f"the {name} of {type(self).__name__} has shape {tuple(held.shape)}; {wanted}, one number for each "
                    "channel that it was built for, is needed."
                )

    def declare(self) -> Declaration:
        self._require_numbers()
        scales = self.scale.cpu().double().abs()
        largest = float(scales.max())
        kept = [Lipschitz(largest)]
        if float(scales.min()) == largest == 1.0:
            return Declaration.of(*kept, GradientNormPreserving(), reason="centring only", title="PixelNormalisation")
        return Declaration.of(*kept, reason=f"1/min std = {largest:.5g}", title="PixelNormalisation")


ISOMETRY = (Lipschitz(1.0), NormPreserving())
WIDE_CHANNELS = 16
"""Where a pixel has so many channels, a CPU copies them as one row faster than ATen takes them one by one."""


class SpaceToDepth(Structured):
    """f × f pixels become f² channels: a permutation of the entries.

    Args:
        factor: f.

    Raises:
        InvalidArgument: f is no whole number from 1.

    Example:
        >>> SpaceToDepth(2)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 12, 4, 4])
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.factor = require_whole("factor", factor, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.factor
        if f > 1 and _is_plain_channels_last(x) and not (x.shape[2] % f or x.shape[3] % f):
            if x.is_cuda:
                return _regrouped(x, f)
            if x.device.type == "cpu" and x.shape[1] >= WIDE_CHANNELS:
                return _Unshuffled.of(x, f)
        return functional.pixel_unshuffle(x, f)

    def inverse(self, y: Tensor) -> Tensor:
        """The image again."""
        return functional.pixel_shuffle(y, self.factor)

    def declare(self) -> Declaration:
        kept: list[Property] = [*ISOMETRY, GradientNormPreserving(), VolumePreserving()]
        kept += [LinearInvariant(), Invertible(), Equivariant(), Positive()]
        return Declaration.of(*kept, reason="a permutation", title=f"SpaceToDepth({self.factor})")


class ZeroLift(Structured):
    """Append zero channels (or entries): an isometry that keeps mass (the sum of the entries) and nonnegativity.

    Args:
        in_channels, out_channels: the sizes, in_channels <= out_channels.

    Raises:
        InvalidArgument: a size below 1, a lift that goes down, or an input of another number of channels.

    Source: paper section 4.3.

    Example:
        >>> ZeroLift(2, 4)(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2., 0., 0.]])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels = require_whole("in_channels", in_channels, 1)
        self.extra = require_whole("out_channels", out_channels, self.in_channels) - self.in_channels

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch lifted ..."]:
        _require_entries(self, self.in_channels, x)
        return functional.pad(x, (0,) * (2 * (x.ndim - 2)) + (0, self.extra))

    def declare(self) -> Declaration:
        kept: list[Property] = [*ISOMETRY, LinearInvariant(), Equivariant(), Positive()]
        if not self.extra:
            kept.append(GradientNormPreserving())
        return Declaration.of(*kept, reason="zeros appended", title=f"ZeroLift(+{self.extra})")


class MassProjection(Structured):
    r"""Keep the first k entries and add o = (1/k) Σ dropped to each of them: mass and nonnegativity stay.

    It is the matrix [I, (1/k)11ᵀ], of norm √(1 + s/k) for s dropped entries.

    Args:
        in_entries: k + s entries (channels of an image).
        out_entries: k.

    Raises:
        InvalidArgument: not 1 <= out_entries <= in_entries, or an input of another number of entries.

    Source: paper section 4.3, whose o = (1/s) Σ dropped keeps the mass for s = k only (design D3).

    Example:
        >>> MassProjection(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
        tensor([[5., 6.]])
    """

    def __init__(self, in_entries: int, out_entries: int) -> None:
        super().__init__()
        self.in_entries = require_whole("in_entries", in_entries, 1)
        self.out_entries = require_whole("out_entries", out_entries, 1, self.in_entries)
        self.in_shape, self.out_shape = (self.in_entries,), (self.out_entries,)

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch kept ..."]:
        _require_entries(self, self.in_entries, x)
        kept, dropped = x[:, : self.out_entries], x[:, self.out_entries :]
        return kept + dropped.sum(1, keepdim=True) / self.out_entries

    def declare(self) -> Declaration:
        k, s = self.out_entries, self.in_entries - self.out_entries
        norm = math.nextafter(math.sqrt(1 + s / k) * (1 + 2.0**-52), math.inf) if s else 1.0
        kept = (Lipschitz(norm), LinearInvariant(), Positive(), Equivariant())
        title = f"MassProjection({self.in_entries}->{self.out_entries})"
        return Declaration.of(*kept, reason=f"‖[I, 11ᵀ/k]‖ = √(1 + s/k) = {norm:.5g}", title=title)


class ChannelMix(LinearMap):
    r"""An orthogonal 1 × 1 map of channels: orthonormal rows when channels go down, orthonormal columns when they go
    up.

    Args:
        in_shape: (channels, height, width) of one input.
        out_channels: channels of the output.
        method: ``"cayley"`` or ``"expm"`` (:data:`dynablocks.linear.ORTHOGONAL`).
        spread: size of the random start; 0 starts at the (cut) identity.

    Raises:
        InvalidArgument: ``in_shape`` is no image's, ``out_channels`` no whole number from 1, or ``method`` not known.

    Example:
        >>> mix = ChannelMix((8, 2, 2), 4)
        >>> mix(torch.zeros(1, 8, 2, 2)).shape, round(mix.properties.lipschitz, 5)
        (torch.Size([1, 4, 2, 2]), 1.0)
    """

    def __init__(
        self, in_shape: tuple[int, int, int], out_channels: int, method: str = "cayley", spread: float = 1.0
    ) -> None:
        super().__init__()
        require_sizes("in_shape", in_shape, 3)
        out_channels = require_whole("out_channels", out_channels, 1)
        self.in_shape, self.out_shape = tuple(in_shape), (out_channels, *in_shape[1:])
        self.rows_orthonormal = out_channels <= in_shape[0]
        self.columns_orthonormal = out_channels >= in_shape[0]
        self.parametrisation = ORTHOGONAL.get_known(method)
        sizes = max(in_shape[0], out_channels), min(in_shape[0], out_channels)
        self.free = nn.Parameter(orthogonal_start((), *sizes, spread))

    def compute_weight(self) -> Float[Tensor, "out in 1 1"]:
        frame = self.parametrisation(self.free)
        matrix = frame if self.out_shape[0] >= self.in_shape[0] else frame.mT
        return matrix[:, :, None, None].contiguous()

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return functional.conv2d(x, weight)

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return functional.conv2d(y, weight.transpose(0, 1))

    def compute_norm_bounds(self) -> Bounds:
        return linear_norm_bounds(self.weight.detach()[:, :, 0, 0])

    def compute_orthonormality_defect(self) -> float:
        return orthonormality_defect(self.weight)


class PaperLift(Structured):
    r"""x ↦ ReLU(αWx) with ‖W‖ <= 1 and a free factor α: the paper's lift, whose constant |α|‖W‖ is not 1.

    Its values are nonnegative whatever α and W are.

    Args:
        in_shape: (channels, height, width) of one input.
        out_channels: channels of the output.
        kernel_size: k, odd, of the k × k kernel of W.

    Raises:
        InvalidArgument: a size below 1, or an even kernel size.

    Source: paper section 3.3 and design D3.

    Example:
        >>> PaperLift((1, 4, 4), 3)(torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, in_shape: tuple[int, int, int], out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.linear = NormalisedConv(in_shape, out_channels, kernel_size, gain=3.0)
        self.in_shape, self.out_shape = self.linear.in_shape, self.linear.out_shape
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.alpha * self.linear(x))

    def declare(self) -> Declaration:
        alpha, norm = abs(float(self.alpha.detach())), self.linear.norm_bounds().upper
        constant = math.nextafter(alpha * norm, math.inf)
        # Of an infinite α or W, 0 times ∞ is no number.
        kept = [Positive()] if math.isfinite(constant) else []
        return Declaration.of(Lipschitz(constant), *kept, reason=f"|α|‖W‖ = {alpha:.4g}·{norm:.4g}", title="PaperLift")


class Head(Dense):
    r"""The last layer z = Wx + b, with the certificate's pairwise distances ‖wᵢ − wⱼ‖.

    Args:
        in_features, classes: the sizes.
        normalise: ``"rows"`` (each row of W has norm 1), ``"frobenius"`` (‖W‖_F = 1; the paper's code has at most
            1) or ``"none"``.

    Raises:
        InvalidArgument: another ``normalise``, or a size below 1; when called, an input of another size.

    Example:
        >>> head = Head(5, 3)
        >>> bool(torch.allclose(head.weight.norm(dim=1), torch.ones(3)))
        True
    """

    def __init__(self, in_features: int, classes: int, normalise: str = "rows") -> None:
        self.normalise = require_choice("normalise", normalise, ("rows", "frobenius", "none"))
        classes = require_whole("classes", classes, 1)
        super().__init__(in_features, classes)
        self.bias = nn.Parameter(torch.zeros(classes))

    def compute_weight(self) -> Float[Tensor, "classes features"]:
        if self.normalise == "rows":
            return functional.normalize(self.matrix, dim=1)
        if self.normalise == "frobenius":
            return self.matrix / self.matrix.norm().clamp_min(1e-12)
        return self.matrix

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch classes"]:
        require_shape(self, self.in_shape, x)
        return functional.linear(x, self.weight, self.bias)

    def declare(self) -> Declaration:
        bounds = self.norm_bounds()
        reason = f"‖W‖ <= {bounds.upper:.6g}, {self.normalise} normalised"
        return Declaration.of(Lipschitz(bounds.upper), reason=reason, title="Head")


def _require_entries(module: nn.Module, entries: int, x: Tensor) -> None:
    """What is declared holds for one number of entries, whatever axes come behind them."""
    if x.ndim < 2 or x.shape[1] != entries:
        name = type(module).__name__
        raise InvalidArgument(f"the input has shape {tuple(x.shape)}; {name} takes (batch, {entries}, ...).")


def _spread(value: Tensor, x: Tensor) -> Tensor:
    """One number a channel, (C, 1, 1), as an image of the size of ``x``, channels last.

    Where both operands lie so, a loop of the CPU runs over a whole image, and otherwise over the channels of a pixel.
    """
    height, width = x.shape[-2:]
    return value.permute(1, 2, 0).expand(height, width, -1).contiguous().permute(2, 0, 1)


def _is_plain_channels_last(x: Tensor) -> bool:
    """Whether these are channels-last images without gaps, outside of ``torch.func`` and ``torch.compile``.

    In the former a tensor does not tell its layout; the latter writes loops of its own.
    """
    if x.ndim != 4 or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def _regrouped(x: Tensor, factor: int) -> Tensor:
    """``pixel_unshuffle`` of channels-last images, whose layout stays: ATen's on GPUs gives another one."""
    samples, channels, height, width = x.shape
    rows, columns = height // factor, width // factor
    patches = x.permute(0, 2, 3, 1).reshape(samples, rows, factor, columns, factor, channels)
    pixels = patches.permute(0, 1, 3, 5, 2, 4).reshape(samples, rows, columns, channels * factor**2)
    return pixels.permute(0, 3, 1, 2)


class _Unshuffled(torch.autograd.Function):
    """``pixel_unshuffle`` of channels-last images, a copy for each place in a patch; ATen's adjoint is fast."""

    @classmethod
    def of(cls, x: Tensor, factor: int) -> Tensor:
        """The map, recorded by autograd."""
        image: Tensor = cls.apply(x, factor)  # type: ignore[no-untyped-call]
        return image

    @staticmethod
    def forward(x: Tensor, factor: int) -> Tensor:
        samples, channels, height, width = x.shape
        shape = (samples, channels * factor**2, height // factor, width // factor)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        pixels = x.permute(0, 2, 3, 1)
        rows = y.permute(0, 2, 3, 1)
        patches = rows.view(*rows.shape[:3], channels, factor, factor)
        for i, j in itertools.product(range(factor), repeat=2):
            patches[..., i, j].copy_(pixels[:, i::factor, j::factor])
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return functional.pixel_shuffle(gradients[0], ctx.factor), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        # Not :meth:`of`, whose copies cannot be made of a batch of tangents (``vectorize=True``).
        return functional.pixel_unshuffle(tangents[0], ctx.factor)
