"""The exponential of matrices in batches, each to the accuracy that it has alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynablocks.numerics.solving import solve_systems
from dynablocks.numerics.transforms import unwrapped

if TYPE_CHECKING:
    from jaxtyping import Float

PADE = (1.0, 1 / 2, 5 / 44, 1 / 66, 1 / 792, 1 / 15840, 1 / 665280)
"""The coefficients of p in the [6/6] Padé approximant p(x)/p(−x) of eˣ."""


def matrix_exponential(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    r"""exp(A) = r(A/2ᵏ)^(2ᵏ): the [6/6] Padé approximant r of exp, squared k times.

    k >= 0 is the least with ‖A‖/2ᵏ <= 1/2, ‖A‖ the largest sum Σⱼ|aᵢⱼ| of a row, for each matrix by itself. Without
    rounding that is exp(A + E), where ‖E‖ <= 2⁻⁵³‖A‖ for every A, since 1/2 is below Higham's θ₆ = 0.54, and r has no
    pole there.

    Of an error δ‖X‖ a squaring X ↦ X² makes one of at most (2δ + δ²)‖X‖², and adds that of a product. Where A is
    normal (symmetric, skew) ‖X²‖ = ‖X‖² in ℓ2, so rounding is of the size of n max(1, ‖A‖)ε, relative to ‖exp(A)‖; for
    other A it may be more. For skew A every factor is a rotation, as r(−x)r(x) = 1.

    ``torch.linalg.matrix_exp`` is off by up to 1e-11 in float64, and differently for a matrix alone and in a batch.
    Under :func:`torch.func.vmap` the loop runs until the run with the largest k is done.

    Args:
        matrix: A. Where its entries are not finite, or exp(A) is too large, nor is the result.

    Source: Higham (2005), "The scaling and squaring method for the matrix exponential revisited", table 2.1.

    Example:
        >>> quarter = torch.tensor([[[0.0, -torch.pi / 2], [torch.pi / 2, 0.0]]])
        >>> bool(torch.allclose(matrix_exponential(quarter), torch.tensor([[0.0, -1.0], [1.0, 0.0]]), atol=1e-6))
        True
    """
    norms = matrix.detach().abs().sum(-1).amax(-1)[..., None, None]
    squarings = torch.where(norms.isfinite(), norms.clamp_min(0.5).log2().ceil() + 1, 0.0)
    small = matrix * torch.exp2(-squarings)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    square = small @ small
    fourth = square @ square
    even = PADE[0] * eye + PADE[2] * square + PADE[4] * fourth + PADE[6] * square @ fourth
    odd = small @ (PADE[1] * eye + PADE[3] * square + PADE[5] * fourth)
    power: Tensor = solve_systems(even - odd, even + odd)
    counts = unwrapped(squarings)
    for done in range(int(counts.max()) if counts.numel() else 0):
        power = torch.where(squarings > done, power @ power, power)
    return power
