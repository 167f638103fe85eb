"""Matrices with orthonormal columns as smooth functions of free parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dynablocks.errors import InvalidArgument
from dynablocks.linear.maps import own_precision
from dynablocks.numerics.solving import invert_matrices
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from jaxtyping import Float

Parametrisation = Callable[[Tensor], Tensor]
ORTHOGONAL: Registry[Parametrisation] = Registry("orthogonal parametrisation")
r"""Maps from any matrix (…, n, p), p <= n, to one with orthonormal columns: the first p of a special orthogonal matrix
made from the skew-symmetric

.. math:: S = \begin{pmatrix} A - A^T & -B^T \\ B & 0 \end{pmatrix}, \qquad \mathrm{free} = \begin{pmatrix} A \\ B
    \end{pmatrix}, \quad A \in \mathbb R^{p \times p}.

For p = n that is S = W − Wᵀ."""


@ORTHOGONAL.register("cayley")
def cayley(free: Float[Tensor, "*batch n p"]) -> Float[Tensor, "*batch n p"]:
    r"""The first p columns of Q = (I + S)⁻¹(I − S).

    By Schur's complement they are (2X − I; −2BX) with X = (I + A − Aᵀ + BᵀB)⁻¹: one inverse of size p, whatever n,
    and the gradient is made of products.

    Condition: none on the parameters, since the symmetric part of I + A − Aᵀ + BᵀB is at least I. Rounding leaves
    ‖QᵀQ − I‖ of the order ε(1 + ‖B‖²), so that nothing is left of QᵀQ = I where that reaches 1
    (:func:`orthonormality_defect` measures it).
    Source: Cayley (1846); Helfrich, Willmott and Ye (2018).

    Example:
        >>> q = cayley(torch.randn(4, 2, dtype=torch.float64))
        >>> bool(torch.allclose(q.mT @ q, torch.eye(2, dtype=torch.float64)))
        True
    """
    _require_digits(free)
    with own_precision(free):
        upper, lower = _parts(free)
        eye = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
        doubled = 2 * invert_matrices(eye + (upper - upper.mT) + lower.mT @ lower)
        return torch.cat([doubled - eye, -(lower @ doubled)], -2)


@ORTHOGONAL.register("expm")
def expm(free: Float[Tensor, "*batch n p"]) -> Float[Tensor, "*batch n p"]:
    r"""The first p columns of Q = exp(S), the parametrisation of the paper's section 1.1; reaches every frame.

    Example:
        >>> q = expm(torch.randn(3, 3, dtype=torch.float64))
        >>> round(float(torch.linalg.det(q)), 12)
        1.0
    """
    _require_digits(free)
    with own_precision(free):
        upper, lower = _parts(free)
        above = functional.pad(-lower.mT, (0, 0, 0, lower.shape[-2]))
        skew = torch.cat([torch.cat([upper - upper.mT, lower], -2), above], -1)
        return torch.linalg.matrix_exp(skew)[..., : free.shape[-1]]


def _require_digits(free: Tensor) -> None:
    if free.dtype in (torch.float16, torch.bfloat16):
        kind = str(free.dtype).removeprefix("torch.")
        raise InvalidArgument(
            f"the free parameters of an orthogonal matrix are {kind}, too coarse for one; leave the module in float32 "
            "and compute under torch.autocast, which spares them."
        )


def _parts(free: Tensor) -> tuple[Tensor, Tensor]:
    columns = free.shape[-1]
    return free.narrow(-2, 0, columns), free.narrow(-2, columns, free.shape[-2] - columns)


@torch.no_grad()
def orthonormality_defect(weight: Float[Tensor, "rows columns *kernel"]) -> float:
    r"""δ with ‖AAᵀ − I‖₂ <= δ, or ‖AᵀA − I‖₂ <= δ where A has more rows than columns, in float64.

    For a matrix δ is the Frobenius norm. A kernel K stands for the convolution whose symbol is Σ_t K_t e^{i⟨ω, t⟩}; at
    every frequency ŴŴ* − I = Σ_s (Σ_t K_{t+s}K_tᵀ − δ_{s0}I) e^{i⟨ω, s⟩}, so that δ is the sum of the norms over s.
    Where the kernel has as many rows as columns ‖Ŵ*Ŵ − I‖ is the same. The singular values lie within δ of 1.

    Args:
        weight: a matrix, or the kernel (rows, columns, k, k) of a convolution of stride 1.

    Returns:
        δ, infinite where the weight is not finite.

    Example:
        >>> orthonormality_defect(torch.diag(torch.tensor([1.0, 0.5])))
        0.75
    """
    exact = weight.detach().to(device="cpu", dtype=torch.float64)
    if exact.shape[0] > exact.shape[1]:
        exact = exact.transpose(0, 1)
    if exact.ndim == 2:
        gaps = (exact @ exact.mT)[..., None, None]
    else:
        gaps = functional.conv2d(exact, exact, padding=exact.shape[-1] - 1)
    centre = gaps.shape[-1] // 2
    gaps[:, :, centre, centre] -= torch.eye(len(exact), dtype=torch.float64, device="cpu")
    defect = float(torch.linalg.vector_norm(gaps, dim=(0, 1)).sum())
    return defect if math.isfinite(defect) else math.inf


def orthogonal_start(count: tuple[int, ...], size: int, columns: int, spread: float = 1.0) -> Tensor:
    """Free parameters (…, n, p) whose S has entries of standard deviation ``spread`` / √n; 0 starts at the identity."""
    start = torch.randn(*count, size, columns) * (spread / (2 * size) ** 0.5)
    start[..., columns:, :] *= 2**0.5
    return start


def paraunitary_kernel(
    base: Float[Tensor, "*batch rows channels"],
    frames: Float[Tensor, "*batch factors channels rank"],
) -> Float[Tensor, "*batch rows channels k k"]:
    r"""A kernel that is orthogonal at every frequency, from a matrix and k−1 projections per direction.

    K(z₁, z₂) = Q ∏ᵢ (Pᵢ + z₁(I − Pᵢ)) ∏ⱼ (Pⱼ + z₂(I − Pⱼ)) with P = UUᵀ for orthonormal frames U. Each factor is
    unitary for |z| = 1, so the convolution is orthogonal with circular padding, an isometry with zero padding and full
    output, and non-expansive with zero padding and "same" output (a compression).

    Args:
        base: Q, with orthonormal rows (or columns).
        frames: 2(k−1) orthonormal frames, the first half for the vertical direction.

    Source: Li et al. (2019), "Preventing gradient attenuation in Lipschitz constrained convolutional networks" (BCOP).

    Example:
        >>> base = cayley(torch.randn(4, 4, dtype=torch.float64))
        >>> kernel = paraunitary_kernel(base, cayley(torch.randn(4, 4, 2, dtype=torch.float64)))
        >>> kernel.shape, bool(torch.allclose(kernel.sum((2, 3)), base))
        (torch.Size([4, 4, 3, 3]), True)
    """
    with own_precision(base):
        return _product_of_factors(base, frames)


def _product_of_factors(base: Tensor, frames: Tensor) -> Tensor:
    # Laid out as (…, rows, k, k, channels): a convolution in the format channels_last reads it without a copy.
    kernel = base[..., None, None, :]
    for axis, half in zip((-3, -2), frames.chunk(2, -3), strict=False):
        for frame in half.unbind(-3):
            kept = ((kernel.flatten(-4, -2) @ frame) @ frame.mT).reshape(kernel.shape)
            moved = kernel - kept
            size = kernel.shape[axis]
            between = moved.narrow(axis, 0, size - 1) + kept.narrow(axis, 1, size - 1)
            kernel = torch.cat([kept.narrow(axis, 0, 1), between, moved.narrow(axis, size - 1, 1)], axis)
    return kernel.movedim(-1, -3)
