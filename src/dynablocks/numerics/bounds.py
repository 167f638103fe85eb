r"""Sound bounds of the singular values of linear maps and convolutions.

Every upper bound here is at least, and every lower bound at most, the exact-arithmetic value for the weights as stored:
all work is in float64 on the CPU, and the rounding slack of :mod:`dynablocks.numerics.rounding` is added. Power
iteration only ever gives lower bounds. Assumed are LAPACK's error constant (there) and ``cos`` and ``sin`` within 8 ε.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dynablocks.errors import InvalidArgument, require_choice, require_whole
from dynablocks.numerics.rounding import (
    EPS,
    FLUSH,
    checked_float64,
    product_slack,
    round_down,
    round_up,
    singular_value_slack,
    to_unit_scale,
)

if TYPE_CHECKING:
    from jaxtyping import Float

METHODS = ("auto", "dense", "fft", "gram", "cholesky", "power")

_DENSE_WORK = 3e8
_DENSE_SIDE = 2048
_CHUNK_ENTRIES = 2**21
_POWER_STEPS = 16
_GRAM_SQUARINGS = 8
_CHOLESKY_SIDE = 16384
_CHOLESKY_MARGINS = (1e-4, 1e-3, 1e-2, 1e-1)

Pair = tuple[int, int]


@dataclass(frozen=True)
class Bounds:
    """An interval that holds a singular value: ``lower <= value <= upper``.

    ``exact`` says that the two ends differ by rounding slack only; ``method`` names what gave the upper bound. An upper
    bound of ``inf`` (method "power") means that none was computed.

    Raises:
        InvalidArgument: an end is nan or negative, or lower > upper.

    Example:
        >>> Bounds(0.5, 1.0, exact=False, method="fft").upper
        1.0
    """

    lower: float
    upper: float
    exact: bool
    method: str

    def __post_init__(self) -> None:
        if not 0 <= self.lower <= self.upper:
            raise InvalidArgument(f"the bounds are [{self.lower}, {self.upper}]; 0 <= lower <= upper is needed.")


@dataclass(frozen=True)
class ConvGeometry:
    r"""Everything about a 2-D convolution except its weight.

    For kernel size k and dilation d, ``padding`` is an int, one int an axis, "valid" (none), "same" (d(k-1) in all, the
    smaller half first, as in PyTorch) or "full" (d(k-1) on either side). "same" is allowed with a stride: it then means
    these amounts. ``input_size`` is (height, width).

    Raises:
        InvalidArgument: a size, stride, dilation or number of groups below 1, a negative padding, or an unknown name.

    Example:
        >>> ConvGeometry((8, 8), stride=2, padding=1).output_size((3, 3))
        (4, 4)
    """

    input_size: Pair
    stride: int | Pair = 1
    padding: int | Pair | str = 0
    padding_mode: str = "zeros"
    groups: int = 1
    dilation: int | Pair = 1

    def __post_init__(self) -> None:
        _pair("input_size", self.input_size, least=1)
        _pair("stride", self.stride, least=1)
        _pair("dilation", self.dilation, least=1)
        if isinstance(self.padding, str):
            require_choice("padding", self.padding, ("same", "full", "valid"))
        else:
            _pair("padding", self.padding, least=0)
        require_choice("padding_mode", self.padding_mode, ("zeros", "circular"))
        require_whole("groups", self.groups, 1)

    @classmethod
    def of(cls, module: torch.nn.Conv2d, input_size: Pair) -> ConvGeometry:
        """The geometry of a ``torch.nn.Conv2d`` for inputs of one size.

        Example:
            >>> ConvGeometry.of(torch.nn.Conv2d(4, 4, 3, padding=1, groups=2), (8, 8)).groups
            2
        """
        return cls(
            input_size,
            stride=(module.stride[0], module.stride[1]),
            padding=module.padding if isinstance(module.padding, str) else (module.padding[0], module.padding[1]),
            padding_mode=module.padding_mode,
            groups=module.groups,
            dilation=(module.dilation[0], module.dilation[1]),
        )

    def pads(self, kernel_size: Pair) -> tuple[Pair, Pair]:
        """The padding (before, after) of each axis.

        Example:
            >>> ConvGeometry((8, 8), padding="same").pads((3, 2))
            ((1, 1), (0, 1))
        """
        reach = _reach(self, kernel_size)
        if self.padding == "valid":
            return (0, 0), (0, 0)
        if self.padding == "full":
            return (reach[0], reach[0]), (reach[1], reach[1])
        if self.padding == "same":
            return (reach[0] // 2, reach[0] - reach[0] // 2), (reach[1] // 2, reach[1] - reach[1] // 2)
        high, wide = _pair("padding", self.padding, least=0)
        return (high, high), (wide, wide)

    def output_size(self, kernel_size: Pair) -> Pair:
        """(height, width) of the output.

        Raises:
            InvalidArgument: the kernel does not fit into the padded image, or circular padding exceeds the image.

        Example:
            >>> ConvGeometry((8, 6), padding="full", dilation=2).output_size((3, 3))
            (12, 10)
        """
        sizes = _pair("input_size", self.input_size, least=1)
        reach, pads, strides = _reach(self, kernel_size), self.pads(kernel_size), _pair("stride", self.stride, least=1)
        rooms = [n + before + after - r for n, (before, after), r in zip(sizes, pads, reach, strict=True)]
        if min(rooms) < 1:
            raise InvalidArgument(
                f"a kernel of {tuple(kernel_size)} with dilation {self.dilation} does not fit into an image of {sizes} "
                f"with padding {self.padding}; use a larger padding or a smaller kernel."
            )
        if self.padding_mode == "circular" and any(max(p) > n for p, n in zip(pads, sizes, strict=True)):
            raise InvalidArgument(
                f"circular padding {pads} wraps around an image of {sizes} more than once; at most {sizes} is allowed."
            )
        return (rooms[0] - 1) // strides[0] + 1, (rooms[1] - 1) // strides[1] + 1


def dense_matrix(
    weight: Float[Tensor, "out_channels group_channels kernel_height kernel_width"],
    geometry: ConvGeometry,
) -> Float[Tensor, "outputs inputs"]:
    r"""The matrix of a convolution in float64, by applying it to the identity.

    Each entry is a copy of a stored weight, hence exact; only where a circular kernel is larger than the image are
    entries sums of weights. Its size is :math:`O m_h m_w \times C n_h n_w`: for small layers.

    Raises:
        InvalidArgument: the weight holds nan or inf, or weight and geometry do not fit.

    Example:
        >>> dense_matrix(torch.tensor([[[[2.0, 1.0]]]]), ConvGeometry((1, 3)))
        tensor([[2., 1., 0.],
                [0., 2., 1.]], dtype=torch.float64)
    """
    return _dense(_checked_kernel(weight, geometry), geometry)


def linear_norm_bounds(weight: Float[Tensor, "outputs inputs"]) -> Bounds:
    r"""Bounds of the largest singular value by a dense SVD.

    :math:`\hat\sigma_1 \pm 16(m+n)\,\epsilon\,\hat\sigma_1`
    (:func:`~dynablocks.numerics.rounding.singular_value_slack`).

    Raises:
        InvalidArgument: the weight is not 2-D, holds nan or inf, or its norm exceeds the largest float64.

    Example:
        >>> bounds = linear_norm_bounds(torch.eye(3))
        >>> 1 - 1e-12 < bounds.lower < 1 < bounds.upper < 1 + 1e-12
        True
    """
    unit, exponent = to_unit_scale(checked_float64(weight, "weight", 2))
    values, slack = _singular_values(unit)
    return _rescaled(values[0] - slack, values[0] + slack, exponent, True, "dense")


def smallest_singular_value_bounds(matrix: Float[Tensor, "rows columns"]) -> Bounds:
    r"""Bounds of :math:`\sqrt{\lambda_{\min}(A^TA)} = \min_x \|Ax\|/\|x\|` by a dense SVD.

    It is the smallest singular value where there are at least as many rows as columns, and 0 where there are fewer.

    Raises:
        InvalidArgument: the matrix is not 2-D, or holds nan or inf.

    Example:
        >>> row = torch.tensor([[3.0, 4.0]])
        >>> round(smallest_singular_value_bounds(row.mT).lower, 9), smallest_singular_value_bounds(row).upper
        (5.0, 0.0)
    """
    exact = checked_float64(matrix, "matrix", 2)
    if exact.shape[0] < exact.shape[1]:
        return Bounds(0.0, 0.0, exact=True, method="dense")
    unit, exponent = to_unit_scale(exact)
    values, slack = _singular_values(unit)
    return _rescaled(values[-1] - slack, values[-1] + slack, exponent, True, "dense")


def conv_norm_bounds(
    weight: Float[Tensor, "out_channels group_channels kernel_height kernel_width"],
    geometry: ConvGeometry,
    method: str = "auto",
) -> Bounds:
    r"""Bounds of the norm :math:`\|A\|_2` of a convolution on images of one size.

    - "dense": SVD of :func:`dense_matrix`, exact.
    - "fft": the largest singular value of the symbol
      :math:`\hat W(\omega)_{oc} = \sum_t W_{oct}\,e^{i\langle\omega, dt\rangle}` over a grid of frequencies.

      *Circular padding*: A consists of rows of the circular convolution C on the image's own grid. If each occurs
      equally often, r times, then :math:`\|A\| = \sqrt r\,\|C\|` (exact; r = 1 for "same"); else at most r times, and
      :math:`\|A\| \le \sqrt r\,\|C\|`.

      *Zero padding* p before and q after n pixels, reach :math:`\rho = d(k-1)`: output pixels whose window meets the
      image have windows inside :math:`[-p', n-1+q']` with :math:`p' = \min(p,\rho)`, :math:`q' = \min(q,\rho)` (the
      others are 0). Modulo :math:`N \ge n + \max(p', q')` no position there falls onto a pixel that it is not, and the
      :math:`n + p' + q' - \rho \le N` outputs stay distinct, so A is a compression of the circular convolution on N
      pixels and its norm is at most that one's. ("same": :math:`n + \lceil\rho/2\rceil`; "full": :math:`n + \rho`.) The
      grid of n pixels is no bound.

      *Stride* s: on a grid of N pixels, :math:`s \mid N`, the symbol is the polyphase one,
      :math:`s^{-1/2}[\hat W(\omega), \hat W(\omega + 2\pi/s), \dots]` on each axis. A zero-padded grid is rounded up to
      such an N; for a circular image s is replaced by gcd(s, n), of which the wanted rows are a part.

      *Groups*: the maximum over the groups, as A is block diagonal.
    - "gram": the symbols as above, their norms by Gram iteration, looser by at most the factor
      :math:`a^{1/1024}` for a channels.
    - "cholesky": the first t a little above the lower bound of power iteration (1.0001 to 1.1 times it) for which
      :math:`t^2 I - A^TA` has a Cholesky factorisation in floating point, or the bound of "fft" where that is smaller.
      With zero padding and n input numbers it is tight after :math:`n^3/3` operations, where "dense" is far too slow
      and "fft" loose.
    - "power": a lower bound :math:`\|Av\|/\|v\|` by power iteration; the upper bound is ``inf``.
    - "auto": "fft" where it is exact, else "dense" for small layers, else "fft".

    Where "fft" and "gram" are not exact, the lower bound is that of power iteration.

    A Cholesky factorisation of a computed M that ends proves
    :math:`\lambda_{\min}(M) \ge -2(n+2)\,\epsilon\,\mathrm{tr} M`.

    Slack, relative to :math:`T = (\sum_{oc}(\sum_t |W_{oct}|)^2)^{1/2}`: K taps summed with phases known to
    :math:`30\,\epsilon` move a symbol by at most :math:`(2K+76)\,\epsilon\,T`; then that of the SVD. It
    covers weights that underflow when the kernel is scaled, T being at least the largest; "dense" adds 2^-1022 an
    entry.

    Raises:
        InvalidArgument: the weight holds nan or inf, weight and geometry do not fit, or the method is unknown.

    Source:
        Sedghi, Gupta, Long 2019 (symbol); Delattre et al. 2023 (Gram iteration); design D2.13 (padded grids); Rump
        2006, "Verification of positive definiteness" (Cholesky).

    Example:
        >>> kernel = torch.ones(1, 1, 3, 3)
        >>> round(conv_norm_bounds(kernel, ConvGeometry((8, 8), padding=1, padding_mode="circular")).upper, 9)
        9.0
        >>> conv_norm_bounds(kernel, ConvGeometry((8, 8), padding=1)).upper < 9
        True
    """
    require_choice("method", method, METHODS)
    unit, exponent = to_unit_scale(_checked_kernel(weight, geometry))
    if not bool(unit.any()):
        return Bounds(0.0, 0.0, exact=True, method="dense" if method == "auto" else method)
    grid = _grid(geometry, (unit.shape[2], unit.shape[3]))
    if method == "auto":
        method = "dense" if not grid.exact and _is_small(unit, geometry) else "fft"
    if method == "dense":
        largest, _, slack = _dense_extremes(unit, geometry)
        return _rescaled(largest - slack, largest + slack, exponent, True, method)
    if method == "power":
        return _rescaled(_power_lower_bound(unit, geometry, 8 * _POWER_STEPS), math.inf, exponent, False, method)
    factor = math.sqrt(grid.most_repeats)
    if method == "gram":
        upper = factor * _gram_upper_bound(unit, geometry, grid)
        return _rescaled(_power_lower_bound(unit, geometry, _POWER_STEPS), upper, exponent, False, method)
    if method == "cholesky":
        _check_cholesky_side(unit, geometry)
        lower = _power_lower_bound(unit, geometry, 8 * _POWER_STEPS)
        largest, _, slack = _symbol_extremes(unit, geometry, grid)
        upper = min(factor * (largest + slack), _cholesky_upper_bound(unit, geometry, lower))
        return _rescaled(lower, upper, exponent, False, method)
    largest, _, slack = _symbol_extremes(unit, geometry, grid)
    lower = factor * (largest - slack) if grid.exact else _power_lower_bound(unit, geometry, _POWER_STEPS)
    return _rescaled(lower, factor * (largest + slack), exponent, grid.exact, method)


def conv_smallest_singular_value(
    weight: Float[Tensor, "out_channels group_channels kernel_height kernel_width"],
    geometry: ConvGeometry,
) -> float:
    r"""A lower bound of :math:`\sqrt{\lambda_{\min}(A^TA)} = \min_x \|Ax\|/\|x\|`; 0 where none is known.

    - Fewer outputs than inputs (also per group): 0, which is then exact.
    - Circular padding: A has every row of the circular convolution C at least r times, so the bound is
      :math:`\sqrt r\,\min_\omega \sigma_{\min}(\hat W(\omega))`; exact if each occurs r times (r = 1 for "same").
    - Zero padding of at least d(k-1) on every side ("full"): let E put the image on the grid of
      :math:`N \ge n + d(k-1)` pixels of :func:`conv_norm_bounds`, with zeros around. Each output of the circular
      convolution C on that grid is either an output of A or sees no pixel of the image, and so
      :math:`\|Ax\| = \|CEx\| \ge \sigma_{\min}(C)\,\|Ex\| = \sigma_{\min}(C)\,\|x\|`, 1 for a paraunitary kernel.
      (Needs a tall symbol, :math:`O \ge s_h s_w C` in each group; the same holds for a stride.)
    - Otherwise a dense SVD when the layer is small, and 0 when it is not.

    Raises:
        InvalidArgument: the weight holds nan or inf, or weight and geometry do not fit.

    Example:
        >>> scaling = torch.eye(2).mul(3).reshape(2, 2, 1, 1)
        >>> round(conv_smallest_singular_value(scaling, ConvGeometry((8, 8))), 9)
        3.0
    """
    unit, exponent = to_unit_scale(_checked_kernel(weight, geometry))
    rows, columns = _matrix_shape(unit, geometry)
    if rows < columns or not bool(unit.any()):
        return 0.0
    grid = _grid(geometry, (unit.shape[2], unit.shape[3]))
    symbol_is_tall = unit.shape[0] >= geometry.groups * unit.shape[1] * math.prod(grid.stride)
    if not grid.exact and _is_small(unit, geometry):
        _, smallest, slack = _dense_extremes(unit, geometry)
    elif grid.least_repeats > 0 and symbol_is_tall:
        _, smallest, slack = _symbol_extremes(unit, geometry, grid)
        smallest, slack = math.sqrt(grid.least_repeats) * smallest, math.sqrt(grid.least_repeats) * slack
    else:
        return 0.0
    return _rescaled(smallest - slack, smallest + slack, exponent, False, "fft").lower


@dataclass(frozen=True)
class _Grid:
    """The circular convolution whose rows contain those of the layer.

    Each row occurs at most ``most_repeats`` times in the layer and, counting rows that vanish on its inputs as present,
    at least ``least_repeats`` times (0 where rows are missing).
    """

    size: Pair
    stride: Pair
    most_repeats: int
    least_repeats: int
    exact: bool


def _grid(geometry: ConvGeometry, kernel_size: Pair) -> _Grid:
    axes = [
        (_circular_axis if geometry.padding_mode == "circular" else _zero_padded_axis)(n, s, reach, pads, outputs)
        for n, s, reach, pads, outputs in zip(
            _pair("input_size", geometry.input_size, least=1),
            _pair("stride", geometry.stride, least=1),
            _reach(geometry, kernel_size),
            geometry.pads(kernel_size),
            geometry.output_size(kernel_size),
            strict=True,
        )
    ]
    (size_h, stride_h, most_h, least_h, exact_h), (size_w, stride_w, most_w, least_w, exact_w) = axes
    return _Grid((size_h, size_w), (stride_h, stride_w), most_h * most_w, least_h * least_w, exact_h and exact_w)


def _circular_axis(n: int, stride: int, reach: int, pads: Pair, outputs: int) -> tuple[int, int, int, int, bool]:
    divisor = math.gcd(n, stride)
    rows = n // divisor
    return n, divisor, -(-outputs // rows), outputs // rows, outputs % rows == 0


def _zero_padded_axis(n: int, stride: int, reach: int, pads: Pair, outputs: int) -> tuple[int, int, int, int, bool]:
    size = n + max(min(pad, reach) for pad in pads)
    size += -size % stride
    return size, stride, 1, int(min(pads) >= reach), reach == 0 and pads == (0, 0)


def _symbols(weight: Tensor, geometry: ConvGeometry, grid: _Grid) -> Iterator[Tensor]:
    """Batches of the symbols of all groups, (batch, out, aliases * in), one of each pair of conjugate frequencies."""
    out_channels, in_channels, *kernel_size = weight.shape
    groups, taps = geometry.groups, kernel_size[0] * kernel_size[1]
    aliases = math.prod(grid.stride)
    kernel = weight.reshape(out_channels * in_channels, taps).T
    coarse_h, coarse_w = grid.size[0] // grid.stride[0], grid.size[1] // grid.stride[1]
    frequencies = _half_plane(coarse_h, coarse_w).reshape(-1, 1, 2)
    shifts = torch.cartesian_prod(_indices(grid.stride[0]) * coarse_h, _indices(grid.stride[1]) * coarse_w)
    dilation = _pair("dilation", geometry.dilation, least=1)
    offsets = torch.cartesian_prod(_indices(kernel_size[0]) * dilation[0], _indices(kernel_size[1]) * dilation[1])
    batch = max(1, _CHUNK_ENTRIES // (out_channels * in_channels * aliases))
    for start in range(0, len(frequencies), batch):
        chunk = frequencies[start : start + batch]
        angle = _phases((chunk + shifts).reshape(-1, 2), offsets, grid.size)
        symbol = torch.complex(angle.cos() @ kernel, angle.sin() @ kernel) / math.sqrt(aliases)
        symbol = symbol.reshape(len(chunk), aliases, groups, out_channels // groups, in_channels)
        yield symbol.permute(0, 2, 3, 1, 4).reshape(len(chunk) * groups, out_channels // groups, -1)


def _half_plane(height: int, width: int) -> Tensor:
    """One of each pair (f, -f) of the frequencies of a grid: the symbol of a real kernel at -f is the conjugate."""
    grid = torch.cartesian_prod(_indices(height), _indices(width))
    mirror = -grid % torch.tensor([height, width], device="cpu")
    return grid[grid[:, 0] * width + grid[:, 1] <= mirror[:, 0] * width + mirror[:, 1]]


def _phases(frequencies: Tensor, offsets: Tensor, size: Pair) -> Tensor:
    """Angles 2 pi <f/N, t> in [0, 4 pi); the integer products are reduced modulo N first, so no accuracy is lost."""
    turns = [(frequencies[:, i, None] * offsets[:, i] % size[i]).to(torch.float64) / size[i] for i in (0, 1)]
    return 2 * math.pi * (turns[0] + turns[1])


def _symbol_slack(weight: Tensor) -> float:
    """Bound of the spectral norm of the error of a computed symbol; phases below 4 pi have errors below 30 eps."""
    return (product_slack(weight.shape[2] * weight.shape[3]) + 60 * EPS) * _tap_norm(weight)


def _tap_norm(weight: Tensor) -> float:
    r"""T: at least the norm of every symbol, and of the stride-1 convolution with the absolute values of the weight."""
    total = float(torch.linalg.vector_norm(weight.abs().sum(dim=(2, 3))))
    return total * (1 + weight.numel() * EPS)


def _symbol_extremes(weight: Tensor, geometry: ConvGeometry, grid: _Grid) -> tuple[float, float, float]:
    """Largest and smallest computed singular value over all frequencies and groups, and the slack of both."""
    largest, smallest, slack = 0.0, math.inf, 0.0
    for symbols in _symbols(weight, geometry, grid):
        values = _finite(torch.linalg.svdvals(symbols))
        largest = max(largest, float(values[..., 0].max()))
        smallest = min(smallest, float(values[..., -1].min()))
        slack = singular_value_slack(symbols.shape[-2], symbols.shape[-1], largest)
    return largest, smallest, slack + _symbol_slack(weight)


def _finite(values: Tensor) -> Tensor:
    """The values, where all are finite numbers: of a NaN ``max`` would make nothing."""
    if not bool(values.isfinite().all()):
        raise InvalidArgument("singular values came out that are not finite; use another method.")
    return values


def _gram_upper_bound(weight: Tensor, geometry: ConvGeometry, grid: _Grid) -> float:
    upper = max(float(_finite(_gram_iteration(symbols)).max()) for symbols in _symbols(weight, geometry, grid))
    return upper + _symbol_slack(weight)


def _gram_iteration(matrices: Tensor) -> Tensor:
    r"""Upper bounds of the norms of a batch of matrices.

    With :math:`H_k = G_k/r_k`, r_k a power of two with :math:`\|H_k\|_F < 1` (no rounding), and
    :math:`G_{k+1} = \mathrm{fl}(H_k^* H_k)`, whose error is at most :math:`\delta`, it holds that
    :math:`\|G_k\|^2 = r_k^2\|H_k^*H_k\| \le r_k^2(\|G_{k+1}\| + \delta)`, whether or not rounding left it Hermitian.
    The last norm is bounded by Frobenius', and the chain is followed back.
    """
    gram = matrices if matrices.shape[-2] >= matrices.shape[-1] else matrices.mH
    delta = 2 * product_slack(gram.shape[-2])
    scales = [_power_of_two_above(gram.abs().amax(dim=(-2, -1)))]
    gram = gram / scales[0][..., None, None]
    for _ in range(_GRAM_SQUARINGS + 1):
        scales.append(_power_of_two_above(torch.linalg.matrix_norm(gram)))
        normalised = gram / scales[-1][..., None, None]
        gram = normalised.mH @ normalised
    bound = torch.linalg.matrix_norm(gram) * (1 + product_slack(gram.shape[-1] ** 2))
    for scale in reversed(scales[1:]):
        bound = scale * (bound + delta).sqrt() * (1 + 4 * EPS)
    return torch.where(matrices.abs().amax(dim=(-2, -1)) > 0, scales[0] * bound, 0.0)


def _power_of_two_above(values: Tensor) -> Tensor:
    """The least power of two above each positive value, 1 for 0; the division is exact."""
    return torch.where(values > 0, values / torch.frexp(values)[0], 1.0)


def _power_lower_bound(weight: Tensor, geometry: ConvGeometry, steps: int) -> float:
    r""":math:`\|Av\|/\|v\|` for a v found by power iteration, less the rounding of its evaluation.

    The computed Av differs from the exact one by at most :math:`(2K+16)\,\epsilon\,|A||v|` with K products a sum, and
    :math:`\||A|\| \le \sqrt r\,T`; the two norms by :math:`(2\ell+16)\,\epsilon` of themselves for length l.
    """
    taps = weight[0].numel()
    repeats = _grid(geometry, (weight.shape[2], weight.shape[3])).most_repeats
    height, width = _pair("input_size", geometry.input_size, least=1)
    generator = torch.Generator().manual_seed(0)
    shape = (1, weight.shape[1] * geometry.groups, height, width)
    quotient = 0.0
    with torch.inference_mode(False), torch.enable_grad():
        kernel = weight.clone()
        vector = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        for _ in range(steps):
            vector.requires_grad_()
            image = _convolve(vector, kernel, geometry)
            length, image_length = float(vector.detach().norm()), float(image.detach().norm())
            quotient = max(quotient, image_length / length)
            (back,) = torch.autograd.grad(image, vector, image.detach())
            if not bool(back.any()):
                break
            vector = (back / back.norm()).detach()
    relative = product_slack(max(vector.numel(), image.numel()))
    return max(0.0, quotient * (1 - 2 * relative) - product_slack(taps) * math.sqrt(repeats) * _tap_norm(weight))


def _cholesky_upper_bound(weight: Tensor, geometry: ConvGeometry, lower: float) -> float:
    r"""The first t above ``lower`` with a factorisation of :math:`t^2I - G`, and all rounding; ``inf`` without any.

    The computed G differs from :math:`A^TA` by a matrix of norm at most :math:`2(2K+16)\,\epsilon\,r T^2`, K products a
    sum; see :func:`_power_lower_bound`.
    """
    gram = _gram_matrix(weight, geometry)
    size = len(gram)
    repeats = _grid(geometry, (weight.shape[2], weight.shape[3])).most_repeats
    products = max(weight[0].numel(), weight.shape[0] * weight.shape[2] * weight.shape[3])
    gram_slack = 2 * product_slack(products) * repeats * _tap_norm(weight) ** 2
    for margin in _CHOLESKY_MARGINS:
        square = (lower * (1 + margin)) ** 2
        shifted = -gram
        shifted.diagonal().add_(square)
        if int(torch.linalg.cholesky_ex(shifted)[1]) == 0:
            return math.sqrt(square * (1 + 2 * (size + 3) * size * EPS) + gram_slack) * (1 + 4 * EPS)
    return math.inf


def _gram_matrix(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """AᵀA, by applying the convolution and its adjoint to the unit vectors."""
    height, width = _pair("input_size", geometry.input_size, least=1)
    channels = weight.shape[1] * geometry.groups
    size = channels * height * width
    gram = torch.empty(size, size, dtype=torch.float64, device="cpu")
    with torch.inference_mode(False), torch.enable_grad():
        kernel = weight.clone()
        for rows in gram.chunk(math.ceil(size**2 / _CHUNK_ENTRIES)):
            rows.zero_().diagonal(rows.storage_offset() // size).fill_(1.0)
            units = rows.reshape(-1, channels, height, width).clone().requires_grad_()
            image = _convolve(units, kernel, geometry)
            rows.copy_(torch.autograd.grad(image, units, image.detach())[0].flatten(1))
    return gram


def _check_cholesky_side(weight: Tensor, geometry: ConvGeometry) -> None:
    columns = _matrix_shape(weight, geometry)[1]
    if columns > _CHOLESKY_SIDE:
        raise InvalidArgument(
            f"the weight acts on {columns} numbers; the method 'cholesky' takes at most {_CHOLESKY_SIDE}. Use 'fft'."
        )


def _dense_extremes(weight: Tensor, geometry: ConvGeometry) -> tuple[float, float, float]:
    """Largest and smallest singular value of the matrix, group by group, and the slack of both."""
    single = ConvGeometry(
        geometry.input_size, geometry.stride, geometry.padding, geometry.padding_mode, 1, geometry.dilation
    )
    largest, smallest, slack = 0.0, math.inf, 0.0
    for part in weight.chunk(geometry.groups):
        values, _ = _singular_values(_dense(part, single))
        largest, smallest = max(largest, values[0]), min(smallest, values[-1])
    rows, columns = _matrix_shape(weight, geometry)
    # Of a kernel whose large taps never meet the image the matrix may hold nothing but entries that were flushed.
    slack = singular_value_slack(rows, columns, largest) + math.sqrt(rows * columns) * FLUSH
    if geometry.padding_mode == "circular":
        pixels = rows // weight.shape[0]
        slack += product_slack(weight.shape[2] * weight.shape[3]) * math.sqrt(pixels) * _tap_norm(weight)
    return largest, smallest if rows >= columns else 0.0, slack


def _singular_values(matrix: Tensor) -> tuple[list[float], float]:
    values: list[float] = _finite(torch.linalg.svdvals(matrix)).tolist()
    return values, singular_value_slack(matrix.shape[0], matrix.shape[1], values[0])


def _dense(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    height, width = _pair("input_size", geometry.input_size, least=1)
    channels = weight.shape[1] * geometry.groups
    identity = torch.eye(channels * height * width, dtype=torch.float64, device="cpu")
    images = _convolve(identity.reshape(-1, channels, height, width), weight, geometry)
    return images.flatten(1).T.contiguous()


def _convolve(images: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    (top, bottom), (left, right) = geometry.pads((weight.shape[2], weight.shape[3]))
    mode = "circular" if geometry.padding_mode == "circular" else "constant"
    padded = functional.pad(images, (left, right, top, bottom), mode=mode)
    return functional.conv2d(
        padded,
        weight,
        stride=_pair("stride", geometry.stride, least=1),
        dilation=_pair("dilation", geometry.dilation, least=1),
        groups=geometry.groups,
    )


def _is_small(weight: Tensor, geometry: ConvGeometry) -> bool:
    rows, columns = (side // geometry.groups for side in _matrix_shape(weight, geometry))
    work = geometry.groups * rows * columns * min(rows, columns)
    return max(rows, columns) <= _DENSE_SIDE and work <= _DENSE_WORK


def _matrix_shape(weight: Tensor, geometry: ConvGeometry) -> Pair:
    outputs = math.prod(geometry.output_size((weight.shape[2], weight.shape[3])))
    inputs = math.prod(_pair("input_size", geometry.input_size, least=1))
    return weight.shape[0] * outputs, weight.shape[1] * geometry.groups * inputs


def _rescaled(lower: float, upper: float, exponent: int, exact: bool, method: str) -> Bounds:
    try:
        low, high = math.ldexp(lower, exponent), math.ldexp(upper, exponent)
    except OverflowError:
        low, high = 0.0, math.nan
    if math.isnan(low) or math.isnan(high) or (math.isinf(high) and method != "power"):
        raise InvalidArgument("the norm of the weight exceeds the largest float64; scale the weights down.")
    return Bounds(round_down(low), round_up(high), exact, method)


def _checked_kernel(weight: Tensor, geometry: ConvGeometry) -> Tensor:
    exact = checked_float64(weight, "weight", 4)
    if exact.shape[0] % geometry.groups:
        raise InvalidArgument(
            f"weight has {exact.shape[0]} output channels for {geometry.groups} groups; use a multiple of the groups."
        )
    geometry.output_size((exact.shape[2], exact.shape[3]))
    return exact


def _reach(geometry: ConvGeometry, kernel_size: Pair) -> Pair:
    dilation, kernel = _pair("dilation", geometry.dilation, least=1), _pair("kernel_size", kernel_size, least=1)
    return dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)


def _indices(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu")


def _pair(name: str, value: object, *, least: int) -> Pair:
    sides = (value, value) if isinstance(value, int) else value
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or not all(_is_count(side, least) for side in sides):
        raise InvalidArgument(f"{name} is {value!r}; one or two integers of at least {least} are needed.")
    return sides[0], sides[1]


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
