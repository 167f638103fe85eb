"""Orthogonal matrices as smooth functions of free parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynablocks.linear.solving import solve_systems
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from jaxtyping import Float

Parametrisation = Callable[[Tensor], Tensor]
ORTHOGONAL: Registry[Parametrisation] = Registry("orthogonal parametrisation")
"""Maps from any square matrix W (…, n, n) to a special orthogonal matrix, through S = W − Wᵀ."""


@ORTHOGONAL.register("cayley")
def cayley(free: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    r"""Q = (I + S)⁻¹(I − S) with S = W − Wᵀ.

    Condition: none on W, since I + S is always invertible; reaches every rotation without eigenvalue −1.
    Source: Cayley (1846); Helfrich, Willmott and Ye (2018).

    Example:
        >>> q = cayley(torch.randn(4, 4, dtype=torch.float64))
        >>> bool(torch.allclose(q @ q.mT, torch.eye(4, dtype=torch.float64)))
        True
    """
    skew = free - free.mT
    eye = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return solve_systems(eye + skew, eye - skew)


@ORTHOGONAL.register("expm")
def expm(free: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    r"""Q = exp(W − Wᵀ), the parametrisation of the paper's section 1.1; reaches every rotation.

    Example:
        >>> q = expm(torch.randn(3, 3, dtype=torch.float64))
        >>> round(float(torch.linalg.det(q)), 12)
        1.0
    """
    return torch.linalg.matrix_exp(free - free.mT)


def orthogonal_start(count: tuple[int, ...], size: int, spread: float = 1.0) -> Tensor:
    """Free parameters (…, n, n) whose skew part has entries of standard deviation ``spread`` / √n; 0 starts at I."""
    return torch.randn(*count, size, size) * (spread / (2 * size) ** 0.5)


def paraunitary_kernel(
    base: Float[Tensor, "rows channels"],
    frames: Float[Tensor, "factors channels rank"],
    kernel_size: int,
) -> Float[Tensor, "rows channels k k"]:
    r"""A kernel that is orthogonal at every frequency, from a matrix and k−1 projections per direction.

    K(z₁, z₂) = Q ∏ᵢ (Pᵢ + z₁(I − Pᵢ)) ∏ⱼ (Pⱼ + z₂(I − Pⱼ)) with P = UUᵀ for orthonormal frames U. Each factor is
    unitary
    for |z| = 1, so the convolution is orthogonal with circular padding, an isometry with zero padding and full output,
    and non-expansive with zero padding and "same" output (a compression).

    Args:
        base: Q, with orthonormal rows (or columns).
        frames: 2(k−1) orthonormal frames, the first half for the vertical direction.
        kernel_size: k.

    Source: Li et al. (2019), "Preventing gradient attenuation in Lipschitz constrained convolutional networks" (BCOP).
    """
    projections = frames @ frames.mT
    rows = _product_of_factors(projections[: kernel_size - 1])
    columns = _product_of_factors(projections[kernel_size - 1 :])
    kernel = torch.einsum("rc,icd,jde->reij", base, rows, columns)
    return kernel


def _product_of_factors(projections: Tensor) -> Tensor:
    """Coefficients (k, n, n) of the polynomial ∏ᵢ (Pᵢ + z(I − Pᵢ))."""
    size = projections.shape[-1]
    eye = torch.eye(size, dtype=projections.dtype, device=projections.device)
    product = eye.unsqueeze(0)
    for projection in projections:
        kept = product @ projection
        moved = product - kept
        nothing = torch.zeros_like(kept[:1])
        product = torch.cat([kept, nothing]) + torch.cat([nothing, moved])
    return product
