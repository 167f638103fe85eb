r"""Rounding slack: what makes a float64 computation a true bound.

Every constant is a worst-case bound of the exact-arithmetic error with a factor of at least two to spare (but that of
LAPACK, see :func:`singular_value_slack`), so that ``computed + slack`` is an upper bound, and ``computed - slack`` a
lower bound, of the exact value. Here :math:`\epsilon = 2^{-52}`, twice the unit roundoff.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument

EPS = 2.0**-52
FLUSH = 2.0**-1022
"""How far an entry of :func:`to_unit_scale` may be from its value: below that, it may lose digits or become 0."""


def round_up(value: float) -> float:
    """A float above ``value`` and above the result of up to four more roundings of it; 0 stays 0, NaN is infinite.

    Example:
        >>> round_up(1.0) > 1.0, round_up(0.0)
        (True, 0.0)
    """
    if math.isnan(value):
        return math.inf
    return math.nextafter(value * (1 + 8 * EPS), math.inf) if value > 0 else 0.0


def exp_up(exponent: float) -> float:
    """A float above e^x for every x within two roundings of ``exponent``, each of which multiplies e^x by 1 ± ε|x|.

    Example:
        >>> exp_up(0.0) > 1.0, exp_up(1e9)
        (True, inf)
    """
    if not exponent < 700:
        return math.inf
    return math.nextafter(math.exp(exponent) * (1 + 4 * EPS * (2 + abs(exponent))), math.inf)


def expm1_bounds(exponent: float) -> tuple[float, float]:
    """Floats below and above e^x − 1 for every x within two roundings of ``exponent``; 0 is exact.

    From e^700, near the largest float, the upper one is infinite.

    Example:
        >>> expm1_bounds(0.0), expm1_bounds(1e9)
        ((0.0, 0.0), (-1.0, inf))
    """
    if not exponent < 700:
        return -1.0, math.inf
    value = math.expm1(exponent)
    slack = 4 * EPS * (abs(value) + abs(exponent) * math.exp(exponent)) if exponent else 0.0
    return max(-1.0, value - slack), value + slack


def round_down(value: float) -> float:
    """A non-negative float below ``value`` and below the result of up to four more roundings of it.

    Example:
        >>> round_down(1.0) < 1.0, round_down(-1e-9)
        (True, 0.0)
    """
    return max(0.0, math.nextafter(value * (1 - 8 * EPS), -math.inf)) if value > 0 else 0.0


def singular_value_slack(rows: int, columns: int, largest: float) -> float:
    r"""What each singular value computed by LAPACK is taken to err by at most: :math:`16(m+n)\,\epsilon\,\sigma_1`.

    The computed values are the exact ones of A + E with :math:`\|E\| \le p(m,n)\,\epsilon\,\sigma_1` and p "a modestly
    growing function" (Weyl's inequality moves each singular value by at most that). The factor 16(m+n) is a choice and
    no promise of LAPACK's; ``conv_norm_bounds(..., "gram")`` does without.

    Source:
        LAPACK Users' Guide (Anderson et al. 1999), section 4.9.1.

    Example:
        >>> 0 < singular_value_slack(3, 3, 1.0) < 1e-13
        True
    """
    return 16 * (rows + columns) * EPS * largest


def product_slack(length: int) -> float:
    r"""Bound :math:`(2k+16)\,\epsilon` of the error of an inner product of length k, relative to :math:`|x|^T|y|`.

    Real or complex, in any order of summation: :math:`\gamma_{k+2}` is at most :math:`(k+2)\,\epsilon/2` up to
    second order, times :math:`\sqrt 2` for complex numbers.

    Source:
        N. J. Higham, Accuracy and Stability of Numerical Algorithms (2002), sections 3.1 and 3.6.

    Example:
        >>> product_slack(9) < 1e-14
        True
    """
    return (2 * length + 16) * EPS


def checked_float64(weight: Tensor, name: str, dimensions: int) -> Tensor:
    """The exact float64 copy of a weight, detached and on the CPU.

    Raises:
        InvalidArgument: it is no real floating-point tensor of that many dimensions, is empty, or holds nan or inf.

    Example:
        >>> checked_float64(torch.ones(2, 3), "weight", 2).dtype
        torch.float64
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise InvalidArgument(f"{name} is {kind}; a tensor of real floating-point numbers is needed.")
    if weight.dim() != dimensions or weight.numel() == 0:
        raise InvalidArgument(
            f"{name} has shape {tuple(weight.shape)}; a tensor of {dimensions} dimensions, none of them 0, is needed."
        )
    copy = weight.detach().to(device="cpu", dtype=torch.float64)
    if not bool(torch.isfinite(copy).all()):
        raise InvalidArgument(f"{name} holds nan or inf, so it has no norm; check the training that produced it.")
    return copy


def to_unit_scale(weight: Tensor) -> tuple[Tensor, int]:
    r"""(w, e) with ``weight`` = :math:`2^e w` and the largest \|entry\| of w in [1/2, 1); no rounding.

    Squares of weights of any size then neither overflow nor underflow. (Only a float64 entry that is :math:`2^{-1022}`
    times the largest one or less can lose digits, or become 0. A slack relative to the largest entry of w covers that;
    where w enters in parts, as in the matrix of a convolution of which some taps never meet the image, ``FLUSH`` is
    added for each entry.) A zero tensor has e = 0.

    Example:
        >>> to_unit_scale(torch.tensor([3.0, -8.0], dtype=torch.float64))
        (tensor([ 0.1875, -0.5000], dtype=torch.float64), 4)
    """
    exponent = math.frexp(float(weight.abs().max()))[1]
    half = exponent // 2
    scaled = weight * math.ldexp(1.0, -half) * math.ldexp(1.0, half - exponent)
    return scaled, exponent
