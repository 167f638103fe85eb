"""Linear systems in batches, right on every build of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LARGEST_IN_A_BATCH = 64


def solve_systems(
    matrix: Float[Tensor, "*batch n n"], right: Float[Tensor, "*batch n k"], *, check: bool = True
) -> Float[Tensor, "*batch n k"]:
    """X with matrix @ X = right, like :func:`torch.linalg.solve`, of larger matrices on a CPU one after the other.

    torch 2.13 factorises a batch of CPU matrices in parallel; with several threads its blocked factorisation, from
    about n = 150 on, then returns garbage without a word (errors of 0.4 for orthogonal matrices, or an error about
    pivots). One matrix at a time is right, and for such sizes as fast.

    Args:
        matrix, right: the systems.
        check: whether a singular matrix is an error; otherwise its solution is not finite.

    Raises:
        RuntimeError: a matrix is singular, with ``check``.

    Example:
        >>> eye = torch.eye(2).expand(3, 2, 2)
        >>> solve_systems(2 * eye, eye)[0].tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    batch = torch.Size(torch.broadcast_shapes(matrix.shape[:-2], right.shape[:-2]))  # type: ignore[no-untyped-call]
    if matrix.device.type != "cpu" or matrix.shape[-1] <= LARGEST_IN_A_BATCH or batch.numel() <= 1:
        return _solve(matrix, right, check)
    matrices = matrix.expand(*batch, *matrix.shape[-2:]).flatten(0, -3)
    rights = right.expand(*batch, *right.shape[-2:]).flatten(0, -3)
    solved = [_solve(a, b, check) for a, b in zip(matrices, rights, strict=True)]
    return torch.stack(solved).reshape(*batch, *right.shape[-2:])


def invert_matrices(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The inverses, not finite where a matrix is singular; see :func:`solve_systems` for the reason to have this.

    Example:
        >>> invert_matrices(2 * torch.eye(2).expand(3, 2, 2))[1].tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    if matrix.device.type != "cpu" or matrix.shape[-1] <= LARGEST_IN_A_BATCH or matrix.shape[:-2].numel() <= 1:
        return torch.linalg.inv_ex(matrix)[0]
    return torch.stack([torch.linalg.inv_ex(m)[0] for m in matrix.flatten(0, -3)]).reshape(matrix.shape)


def _solve(matrix: Tensor, right: Tensor, check: bool) -> Tensor:
    found: Tensor = torch.linalg.solve_ex(matrix, right, check_errors=check)[0]
    return found
