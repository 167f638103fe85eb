"""Linear systems in batches, right on every build of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from dynablocks.numerics.transforms import unwrapped

if TYPE_CHECKING:
    from jaxtyping import Float

LARGEST_IN_A_BATCH = 64


def solve_systems(
    matrix: Float[Tensor, "*batch n n"], right: Float[Tensor, "*batch n k"], *, check: bool = True
) -> Float[Tensor, "*batch n k"]:
    """X with matrix @ X = right, like :func:`torch.linalg.solve`, of larger matrices on a CPU one after the other.

    torch 2.13 factorises a batch of CPU matrices in parallel; with several threads its blocked factorisation, from
    about n = 150 on, then returns garbage without a word (errors of 0.4 for orthogonal matrices, or an error about
    pivots). One matrix at a time is right, and for such sizes as fast.

    Its ``lu_solve`` takes the wrong factors on a CPU where those of (b, 1) matrices meet (b, c) right sides. Under
    :func:`torch.func.vmap` the derivatives of ``torch.linalg.solve`` do that in forward mode and, inside
    ``torch.no_grad()``, in reverse mode. Under function transforms they are therefore written out here: right in all
    modes and orders but forward over forward mode, where ``torch.linalg.solve`` is wrong, too.

    Args:
        matrix, right: the systems, of batches that broadcast.
        check: whether a singular matrix is an error; otherwise its solution is not finite.

    Raises:
        RuntimeError: a matrix is singular, with ``check``.

    Example:
        >>> eye = torch.eye(2).expand(3, 2, 2)
        >>> solve_systems(2 * eye, eye)[0].tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    batch = torch.Size(torch.broadcast_shapes(matrix.shape[:-2], right.shape[:-2]))  # type: ignore[no-untyped-call]
    # Before torch may take n right sides (n, n) of n matrices for one vector a matrix.
    right = right.expand(*batch, *right.shape[-2:])
    if torch._C._are_functorch_transforms_active():
        solution: Tensor = _Solution.apply(matrix.expand(*batch, *matrix.shape[-2:]), right, check)  # type: ignore[no-untyped-call]
        return solution
    if matrix.device.type != "cpu" or matrix.shape[-1] <= LARGEST_IN_A_BATCH or batch.numel() <= 1:
        return _solve(matrix, right, check)
    matrices = matrix.expand(*batch, *matrix.shape[-2:]).flatten(0, -3)
    solved = [_solve(a, b, check) for a, b in zip(matrices, right.flatten(0, -3), strict=True)]
    return torch.stack(solved).reshape(right.shape)


def invert_matrices(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The inverses, not finite where a matrix is singular; see :func:`solve_systems` for the reason to have this.

    Example:
        >>> invert_matrices(2 * torch.eye(2).expand(3, 2, 2))[1].tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    if matrix.device.type != "cpu" or matrix.shape[-1] <= LARGEST_IN_A_BATCH:
        return torch.linalg.inv_ex(matrix)[0]
    if torch._C._are_functorch_transforms_active() and unwrapped(matrix).numel() > matrix.numel():
        # Only an operation of its own gets to see the runs that vmap hides.
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        return solve_systems(matrix, eye, check=False)
    if matrix.shape[:-2].numel() <= 1:
        return torch.linalg.inv_ex(matrix)[0]
    return torch.stack([torch.linalg.inv_ex(m)[0] for m in matrix.flatten(0, -3)]).reshape(matrix.shape)


def _solve(matrix: Tensor, right: Tensor, check: bool) -> Tensor:
    found: Tensor = torch.linalg.solve_ex(matrix, right, check_errors=check)[0]
    return found


class _Solution(Function):
    """X with AX = B for A and B of one batch shape: dX = A⁻¹(dB − dA X), and B̄ = A⁻ᵀX̄, Ā = −B̄Xᵀ."""

    @staticmethod
    def forward(matrix: Tensor, right: Tensor, check: bool) -> Tensor:
        return solve_systems(matrix, right, check=check)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        matrix, found = ctx.saved_tensors
        of_right = solve_systems(matrix.mT, gradient, check=False)
        return -of_right @ found.mT, of_right, None

    @staticmethod
    def jvp(ctx: Any, matrix_tangent: Tensor, right_tangent: Tensor, _: None) -> Tensor:
        matrix, found = ctx.saved_tensors
        return solve_systems(matrix, right_tangent - matrix_tangent @ found, check=False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, matrix: Tensor, right: Tensor, check: bool) -> Any:
        moved = [v if d is None else v.movedim(d, 0) for v, d in zip((matrix, right), in_dims[:2], strict=True)]
        return solve_systems(*moved, check=check), 0
