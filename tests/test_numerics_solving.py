"""Batches of linear systems, also where torch's own batches go wrong."""

from __future__ import annotations

import pytest
import torch

from dynablocks.linear.orthogonal import cayley
from dynablocks.numerics.solving import invert_matrices, solve_systems


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("size", [48, 160, 192])
def test_batches_of_large_orthogonal_matrices(size: int) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        free = torch.randn(4, size, size, generator=generator, dtype=torch.float64) / (2 * size) ** 0.5
        orthogonal = cayley(free)
        assert (orthogonal @ orthogonal.mT - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize(("left", "right"), [((), ()), ((3,), (3,)), ((2, 1), (3,)), ((1,), (2, 2))])
def test_shapes_broadcast_as_in_torch(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    size = 65
    matrix = torch.randn(*left, size, size, dtype=torch.float64) + 20 * torch.eye(size, dtype=torch.float64)
    wanted = torch.randn(*right, size, 2, dtype=torch.float64)
    found = solve_systems(matrix, wanted)
    assert found.shape == torch.broadcast_shapes(matrix.shape[:-2], wanted.shape[:-2]) + wanted.shape[-2:]
    torch.testing.assert_close(matrix @ found, wanted.expand(found.shape), rtol=0, atol=1e-12)


def test_gradients_pass() -> None:
    matrix = (torch.randn(2, 70, 70, dtype=torch.float64) + 20 * torch.eye(70)).requires_grad_()
    right = torch.randn(2, 70, 1, dtype=torch.float64)
    (found,) = torch.autograd.grad(solve_systems(matrix, right).sum(), matrix)
    inverse = torch.stack([torch.linalg.inv(m) for m in matrix.detach()])
    wanted = -(inverse.mT @ torch.ones(2, 70, 1, dtype=torch.float64)) @ (inverse @ right).mT
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("two_threads")
def test_inverses_of_batches_of_large_matrices() -> None:
    matrix = torch.randn(6, 180, 180, dtype=torch.float64) + 30 * torch.eye(180, dtype=torch.float64)
    torch.testing.assert_close(
        invert_matrices(matrix) @ matrix, torch.eye(180, dtype=torch.float64).expand(6, 180, 180), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("size", [2, 70])
def test_a_singular_matrix_is_an_error_only_where_asked(size: int) -> None:
    matrix = torch.zeros(2, size, size, dtype=torch.float64)
    right = torch.ones(2, size, 1, dtype=torch.float64)
    assert not solve_systems(matrix, right, check=False).isfinite().all()
    with pytest.raises(RuntimeError, match="singular"):
        solve_systems(matrix, right)
