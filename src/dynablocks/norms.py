"""Norms ‖x‖_M = √(xᵀMx) on images and vectors, and the layers that lead into and out of them."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_range, require_sizes, require_whole
from dynablocks.lifting import ChannelMix, PixelNormalisation, ZeroLift
from dynablocks.numerics.rounding import EPS, product_slack
from dynablocks.properties import EUCLIDEAN, Declaration, Lipschitz, Metric, Structured, declare
from dynablocks.properties.structure import original

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Channelwise", "DenseMetric", "SpectralMetric", "Whitening", "smooth_modes"]

_SLACK = 2.0**-40
MOST_WAVELENGTH = 1e9
"""In pixels: beyond all images, and the fourth power of a much smaller frequency underflows."""


@dataclass(frozen=True)
class SpectralMetric(Metric):
    r"""A norm of images that weighs smooth changes (shading, illumination) differently from pixel noise.

    M is diagonal in the orthonormal cosine basis (DCT-II) of each channel. With λ = 4 sin²(πi/2H) + 4 sin²(πj/2W), the
    eigenvalue of the image's Laplacian at the frequency (i, j), and λ_c = (2π / wavelength)²,

        w(i, j) = (s λ_c² + λ²) / (λ_c² + λ²):

    about s for waves longer than ``wavelength``, about 1 for shorter ones. So M, M^{1/2}, M⁻¹ and M^{−1/2} are four
    small matrix products, done in float64. The same M in every channel, hence it commutes with maps across channels.

    Args:
        shape: (channels, height, width).
        smooth: s > 0, the weight of a constant change; 1 is the Euclidean norm. In norm it counts √s times as much.
        wavelength: in pixels, from 1 to 1e9, where half of the transition is done; by default the larger side of the
            image.

    Raises:
        InvalidArgument: a shape that is no image's, or a number out of range.

    Example:
        >>> metric = SpectralMetric((1, 8, 8), smooth=0.01)
        >>> shading, noise = torch.ones(1, 1, 8, 8) / 8, torch.ones(1, 1, 8, 8) / 8
        >>> noise[..., ::2] *= -1
        >>> round(metric.norm(shading).item(), 4), round(metric.norm(noise).item(), 2)
        (0.1, 0.97)
    """

    name: str = field(init=False, default="spectral")
    shape: tuple[int, int, int]
    smooth: float = 0.1
    wavelength: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", require_sizes("shape", self.shape, 3))
        require_range("smooth", self.smooth, 1e-6, 1e6)
        if self.wavelength is None:
            object.__setattr__(self, "wavelength", float(max(self.shape[1:])))
        assert self.wavelength is not None
        require_range("wavelength", self.wavelength, 1.0, MOST_WAVELENGTH)
        object.__setattr__(self, "name", f"spectral(smooth={self.smooth:g}, wavelength={self.wavelength:g})")

    @property
    def weights(self) -> Float[Tensor, "height width"]:
        """w: the eigenvalues of M by frequency, the constant image first."""
        return self._factors("cpu")[2]

    @property
    def eigenvalues(self) -> tuple[float, float]:
        weights = self.weights
        return float(weights.min()) * (1 - _SLACK), float(weights.max()) * (1 + _SLACK)

    @property
    def whitening_error(self) -> float:
        """Four products with bases C, ‖|C|‖ <= √s, and cosines known to π s ε: below 16 (2s + 16) √s ε for a side s."""
        side = max(self.shape[1:])
        return 16 * product_slack(side) * math.sqrt(side)

    def largest_on_modes(self, modes: int) -> float:
        """The largest ‖x‖_M / ‖x‖₂ of images made of the ``modes`` × ``modes`` longest cosine waves only.

        Example:
            >>> metric = SpectralMetric((1, 8, 8), smooth=0.01)
            >>> metric.largest_on_modes(1) < metric.largest_on_modes(2) < metric.largest_on_modes(8) < 1
            True
        """
        modes = require_whole("modes", modes, 1, max(self.shape[1:]))
        return math.sqrt(float(self.weights[:modes, :modes].max()) * (1 + _SLACK))

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(shape) == self.shape

    def whiten(self, x: Tensor) -> Tensor:
        return self._apply(x, 0.5)

    def unwhiten(self, u: Tensor) -> Tensor:
        return self._apply(u, -0.5)

    def dual(self, w: Tensor) -> Tensor:
        return self.unwhiten(w.reshape(-1, *self.shape)).reshape(w.shape)

    def with_channels(self, channels: int) -> SpectralMetric:
        """The same weights on images with another number of channels."""
        return SpectralMetric((channels, *self.shape[1:]), self.smooth, self.wavelength)

    def bounded_by(self, other: Metric) -> float:
        # A subclass may have a whitening of its own, of which the weights here say nothing.
        if type(other) is SpectralMetric and other.shape == self.shape and other != self:
            return math.sqrt(float((self.weights / other.weights).max()) * (1 + _SLACK))
        return super().bounded_by(other)

    def _factors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        assert self.wavelength is not None
        return _spectral_factors(self.shape[1], self.shape[2], self.smooth, self.wavelength, device)

    def _apply(self, x: Tensor, power: float) -> Tensor:
        _require_shape(self, x, self.shape)
        rows, columns, weights = self._factors(str(x.device))
        modes = rows @ x.double() @ columns.mT
        return (rows.mT @ (modes * weights**power) @ columns).to(x.dtype)


@functools.lru_cache(maxsize=64)
def _spectral_factors(
    height: int, width: int, smooth: float, wavelength: float, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The cosine bases of both sides, and w(i, j)."""
    cutoff = (2 * math.pi / wavelength) ** 4
    with torch.inference_mode(False), torch.no_grad():  # they outlive the context they are first asked for in
        (rows, down), (columns, across) = _cosines(height), _cosines(width)
        squared = (down[:, None] + across[None, :]) ** 2
        weights = (smooth * cutoff + squared) / (cutoff + squared)
        return rows.to(device), columns.to(device), weights.to(device)


def _cosines(size: int) -> tuple[Float[Tensor, "size size"], Float[Tensor, " size"]]:
    """The orthonormal DCT-II matrix and the Laplacian's eigenvalues 4 sin²(πk/2n)."""
    index = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * index[:, None] * (index[None, :] + 0.5)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis, 4 * torch.sin(math.pi * index / (2 * size)) ** 2


def smooth_modes(height: int, width: int, modes: int) -> Float[Tensor, "count height width"]:
    """The ``modes`` × ``modes`` longest cosine waves of an image: an orthonormal basis of smooth shadings, in float64.

    Example:
        >>> smooth_modes(8, 8, 2).shape
        torch.Size([4, 8, 8])
    """
    modes = require_whole("modes", modes, 1, min(height, width))
    rows, columns = _cosines(height)[0][:modes], _cosines(width)[0][:modes]
    return torch.einsum("ih,jw->ijhw", rows, columns).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class DenseMetric(Metric):
    r"""The norm of a given symmetric positive definite matrix M.

    M^{1/2} comes from the eigenvectors, in float64; the norm is ‖M^{1/2}x‖₂ for the M^{1/2} that is stored.

    Args:
        matrix: M, (n, n).
        shape: the shape of one sample with n entries; (n,) when ``None``.

    Raises:
        InvalidArgument: M is not square, finite, symmetric and positive definite, or the shape has another size.

    Example:
        >>> metric = DenseMetric(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> [round(v, 6) for v in metric.norm(torch.tensor([[1.0, 1.0], [1.0, -1.0]])).tolist()]
        [2.44949, 1.414214]
    """

    name: str = field(init=False, default="M")
    matrix: Tensor
    shape: tuple[int, ...] | None = None
    root: Tensor = field(init=False, repr=False)
    inverse_root: Tensor = field(init=False, repr=False)
    _eigenvalues: tuple[float, float] = field(init=False, repr=False, default=(1.0, 1.0))

    def __post_init__(self) -> None:
        exact = _checked_square(self.matrix)
        size = len(exact)
        shape = (size,) if self.shape is None else tuple(self.shape)
        if torch.Size(shape).numel() != size:
            raise InvalidArgument(f"M is {size} x {size} but samples of shape {shape} have another number of entries.")
        values, vectors = torch.linalg.eigh(exact)
        slack = 64 * size * EPS * float(values[-1].abs())
        if float(values[0]) <= slack:
            raise InvalidArgument(
                f"M has eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}; a positive definite matrix "
                "is needed, with a smallest eigenvalue above rounding: add a multiple of the identity."
            )
        halves = {power: _symmetric(vectors * values**power @ vectors.mT) for power in (0.5, -0.5)}
        facts = {"matrix": exact, "shape": shape, "root": halves[0.5], "inverse_root": halves[-0.5]}
        facts |= {"_eigenvalues": (float(values[0]) - slack, float(values[-1]) + slack)}
        digest = hashlib.sha256(exact.numpy().tobytes() + repr(shape).encode()).hexdigest()
        for name, value in (facts | {"name": f"M({size} x {size}, {digest[:8]})"}).items():
            object.__setattr__(self, name, value)

    @property
    def eigenvalues(self) -> tuple[float, float]:
        return self._eigenvalues

    @property
    def whitening_error(self) -> float:
        """One product with R, ‖|R|‖ <= √n ‖R‖; the inverse is that of R before it was rounded, so cond(R) times it."""
        size = len(self.matrix)
        return product_slack(size) * math.sqrt(size) * self.condition

    def fits(self, shape: tuple[int, ...]) -> bool:
        return tuple(shape) == self.shape

    def whiten(self, x: Tensor) -> Tensor:
        return self._multiply(self.root, x)

    def unwhiten(self, u: Tensor) -> Tensor:
        return self._multiply(self.inverse_root, u)

    def dual(self, w: Tensor) -> Tensor:
        assert self.shape is not None
        return self.unwhiten(w.reshape(-1, *self.shape)).reshape(w.shape)

    def _multiply(self, matrix: Tensor, x: Tensor) -> Tensor:
        assert self.shape is not None
        _require_shape(self, x, self.shape)
        return (x.double().flatten(1) @ matrix.to(x.device)).reshape(x.shape).to(x.dtype)

    def __eq__(self, other: object) -> bool:
        # One of a subclass may be another norm of the same matrix.
        if not isinstance(other, DenseMetric) or type(other) is not type(self):
            return False
        return self.shape == other.shape and torch.equal(self.matrix, other.matrix)

    def __hash__(self) -> int:
        return hash((self.name, self.shape))


def _checked_square(matrix: Tensor) -> Float[Tensor, "n n"]:
    """M in float64, exactly symmetric.

    Raises:
        InvalidArgument: it is no finite symmetric matrix.
    """
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point() or matrix.ndim != 2 or 0 in matrix.shape:
        found = f"{matrix.dtype} {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise InvalidArgument(f"M is {found}; a square matrix of floating-point numbers is needed.")
    if matrix.shape[0] != matrix.shape[1]:
        raise InvalidArgument(f"M is {matrix.shape[0]} x {matrix.shape[1]}; a square matrix is needed.")
    exact = matrix.detach().cpu().double()
    if not bool(torch.isfinite(exact).all()):
        raise InvalidArgument("M holds NaN or infinity; a finite symmetric matrix is needed.")
    gap, size = float((exact - exact.mT).abs().max()), float(exact.abs().max())
    if gap > 64 * torch.finfo(matrix.dtype).eps * size:
        raise InvalidArgument(
            f"M differs from its transpose by {gap:.3g}; a symmetric matrix is needed: give (M + Mᵀ) / 2."
        )
    return _symmetric(exact)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _require_shape(metric: Metric, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape[1:]) != shape:
        raise InvalidArgument(f"the metric {metric.name} is one of samples {shape}; got a batch {tuple(x.shape)}.")


class Whitening(Structured):
    r"""x ↦ M^{1/2} x: an isometry from ‖·‖_M to ℓ2, after which any Euclidean non-expansive layer may follow.

    Example:
        >>> Whitening(SpectralMetric((1, 4, 4))).properties
        (Lipschitz(1, spectral(smooth=0.1, wavelength=4) to l2))
    """

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return self.metric.whiten(x)

    def inverse(self, u: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """M^{−1/2} u."""
        return self.metric.unwhiten(u)

    def declare(self) -> Declaration:
        kept = Lipschitz(1.0, self.metric, EUCLIDEAN)
        return Declaration.of(kept, reason="‖M^{1/2}x‖₂ = ‖x‖_M", title="Whitening")

    def extra_repr(self) -> str:
        return self.metric.name


class Channelwise(Structured):
    r"""A map x ↦ (Q ⊗ I)x + t across channels, with its Euclidean constant stated in a :class:`SpectralMetric`.

    M is the same in every channel, M = I ⊗ S, so S^{1/2} commutes with Q: ‖(Q ⊗ I)x‖_M <= ‖Q‖ ‖x‖_M.

    Args:
        module: a pixel normalisation, zero lift or channel mix, of no subclass.
        metric: the norm of its inputs.
        channels: of its outputs, where their number differs from the inputs'.

    Raises:
        InvalidArgument: another module or metric, for which this is not known, or other numbers of channels than the
            module's own.

    Example:
        >>> metric = SpectralMetric((1, 4, 4))
        >>> Channelwise(ZeroLift(1, 3), metric, 3)(torch.zeros(2, 1, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(self, module: nn.Module, metric: SpectralMetric, channels: int | None = None) -> None:
        super().__init__()
        unknown = _why_not_channelwise(module, metric, channels)
        if unknown is not None:
            raise InvalidArgument(f"{unknown}.")
        self.module, self.metric, self.channels = module, metric, channels

    @property
    def image(self) -> SpectralMetric:
        """The norm of the outputs, that of the inputs on as many channels as they have."""
        return self.metric if self.channels is None else self.metric.with_channels(self.channels)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch more height width"]:
        image: Tensor = self.module(x)
        return image

    def declare(self) -> Declaration:
        inner = declare(self.module)
        title = f"Channelwise {inner.title}"
        # Another part or metric may have been put there since.
        unknown = _why_not_channelwise(self.module, self.metric, self.channels)
        if unknown is not None:
            return Declaration.of(reason=unknown, title=title)
        kept = Lipschitz(inner.properties.lipschitz, self.metric, self.image)
        return Declaration.of(kept, reason=f"M is the same in every channel; {inner.reason}", title=title)


def _why_not_channelwise(module: nn.Module, metric: Metric, channels: int | None) -> str | None:
    """Why the proof of :class:`Channelwise` is not of these, which is of these very classes; ``None`` where it is.

    A subclass may mix pixels, and another norm weigh channels differently.
    """
    inside = original(module)
    ends = _channels_of(inside)
    if ends is None:
        return (
            f"module is a {type(module).__name__}, which is not known to act across channels only; give a "
            "PixelNormalisation, a ZeroLift or a ChannelMix, and no subclass of one"
        )
    if type(metric) is not SpectralMetric:
        return (
            f"metric is a {type(metric).__name__}, which is not known to be the same in every channel; give a "
            "SpectralMetric"
        )
    stated = metric.shape[0], metric.shape[0] if channels is None else channels
    if stated != ends:
        return (
            f"{type(inside).__name__} leads from {ends[0]} to {ends[1]} channels, and norms on {stated[0]} and "
            f"{stated[1]} are given; give a metric on {ends[0]} and channels={ends[1]}"
        )
    return None


def _channels_of(module: nn.Module) -> tuple[int, int] | None:
    """How many channels a layer takes and leaves; ``None`` of another than those that act across channels only."""
    if type(module) is PixelNormalisation:
        return module.channels, module.channels
    if type(module) is ZeroLift:
        return module.in_channels, module.in_channels + module.extra
    if type(module) is ChannelMix:
        return module.in_shape[0], module.out_shape[0]
    return None
