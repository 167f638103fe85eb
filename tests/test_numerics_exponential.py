"""The exponential of matrices against closed forms, scipy and eigenvalues; alone, in a batch, and under vmap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dynablocks.blocks import DynamicalBlock
from dynablocks.ensembles import ensemble_forward, stacked_parameters
from dynablocks.fields import LinearField
from dynablocks.fields.sphere import skew_matrix
from dynablocks.numerics.exponential import PADE, matrix_exponential
from dynablocks.switching import FreeSignal

EPS = torch.finfo(torch.float64).eps
SCALES = [1e-3, 1e-2, 0.1, 1.0, 30.0]


def row_sums(matrix: Tensor) -> Tensor:
    """max(1, ‖A‖) of each matrix."""
    return matrix.abs().sum(-1).amax(-1).clamp_min(1.0)


def norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, ord=2)


def test_the_coefficients_are_those_of_pade() -> None:
    """(12 − j)! 6! / (12! j! (6 − j)!)."""
    wanted = [math.perm(6, j) / (math.perm(12, j) * math.factorial(j)) for j in range(7)]
    assert list(PADE) == pytest.approx(wanted, rel=4 * EPS, abs=0)


@pytest.mark.parametrize("scale", SCALES)
def test_of_skew_matrices_it_is_a_rotation(scale: float) -> None:
    import scipy.linalg

    matrices = scale * skew_matrix(torch.randn(5, 6, dtype=torch.float64), 4)
    exact = torch.stack([torch.tensor(scipy.linalg.expm(m.numpy())) for m in matrices])
    alone = torch.cat([matrix_exponential(m[None]) for m in matrices])
    for given in (matrix_exponential(matrices), alone, torch.stack([matrix_exponential(m) for m in matrices])):
        assert (given - exact).abs().max() < 1e-14 * max(1.0, 20 * scale)
        assert (given @ given.mT - torch.eye(4)).abs().max() < 1e-14 * max(1.0, 20 * scale)
        assert (torch.linalg.det(given) - 1).abs().max() < 1e-14 * max(1.0, 20 * scale)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", SCALES)
def test_of_symmetric_matrices_it_is_that_of_the_eigenvalues(scale: float, sign: float) -> None:
    """Also where all eigenvalues have one sign, so that all of the exponential is large or small."""
    free = torch.randn(5, 6, 6, dtype=torch.float64)
    for matrix in (scale * (free + free.mT), sign * scale / 6 * free @ free.mT):
        values, vectors = torch.linalg.eigh(matrix)
        exact = vectors @ (values.exp().unsqueeze(-1) * vectors.mT)
        assert (norm(matrix_exponential(matrix) - exact) <= 4 * 6 * row_sums(matrix) * EPS * norm(exact)).all()


@pytest.mark.parametrize("value", [-2.0, 0.0, 0.5, 3.0])
def test_of_a_jordan_block_it_is_the_closed_form(value: float) -> None:
    """e^λ times the Toeplitz matrix of 1/k!."""
    shift = torch.eye(6, dtype=torch.float64).roll(1, 1).triu()
    exact = sum(math.exp(value) / math.factorial(k) * torch.linalg.matrix_power(shift, k) for k in range(6))
    assert torch.allclose(matrix_exponential(value * torch.eye(6) + shift), exact, rtol=0, atol=1e-14 * math.exp(value))


@pytest.mark.parametrize("coupling", [1.0, 1e6])
def test_of_a_triangular_matrix_it_is_the_closed_form(coupling: float) -> None:
    """Far from normal: the many squarings cost digits, as many as 2ᵏε."""
    matrix = torch.tensor([[1.0, coupling], [0.0, -1.0]], dtype=torch.float64)
    exact = torch.tensor([[math.e, coupling * math.sinh(1.0)], [0.0, 1 / math.e]], dtype=torch.float64)
    size = 8 * EPS * float(row_sums(matrix))
    assert torch.allclose(matrix_exponential(matrix), exact, rtol=size, atol=0)


def test_of_a_small_matrix_it_does_not_depend_on_a_large_one_beside_it() -> None:
    small = skew_matrix(torch.randn(1, 3, dtype=torch.float64), 3)
    both = matrix_exponential(torch.cat([small, 1e6 * small, 0 * small]))
    assert float((both[0] - matrix_exponential(small)[0]).abs().max()) < 1e-15
    assert torch.equal(both[2], torch.eye(3, dtype=torch.float64))


def test_of_no_matrix_it_is_none() -> None:
    assert matrix_exponential(torch.zeros(0, 3, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize("entry", [math.nan, math.inf, 1e3])
def test_what_is_not_finite_stays_in_its_sample(entry: float) -> None:
    """Also where the exponential of a finite matrix is too large."""
    matrices = torch.zeros(2, 2, 2, dtype=torch.float64)
    matrices[0, 0, 0] = entry
    found = matrix_exponential(matrices)
    assert not found[0].isfinite().all()
    assert torch.equal(found[1], torch.eye(2, dtype=torch.float64))


def hostile() -> Tensor:
    """0, and matrices that are squared never, a few and many times."""
    sizes = torch.tensor([0.0, 1e-3, 1.0, 5.0, 20.0], dtype=torch.float64)
    return sizes[:, None, None] * torch.randn(5, 3, 3, dtype=torch.float64)


def test_derivatives_of_both_modes_and_of_second_order() -> None:
    matrices = (0.2 * hostile()).requires_grad_(True)
    assert torch.autograd.gradcheck(matrix_exponential, matrices, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(matrix_exponential, matrices)


def test_under_vmap_it_is_that_of_each() -> None:
    matrices = hostile()
    alone = torch.stack([matrix_exponential(matrix) for matrix in matrices])
    stacked = torch.func.vmap(matrix_exponential)
    for found in (
        stacked(matrices),
        torch.func.vmap(matrix_exponential, in_dims=2, out_dims=1)(matrices.movedim(0, 2)).movedim(1, 0),
        torch.func.vmap(stacked)(matrices.expand(2, *matrices.shape))[1],
    ):
        assert (norm(found - alone) <= 4 * 3 * row_sums(matrices) * EPS * norm(alone)).all()


@pytest.mark.parametrize("gradients", [False, True])
def test_jacobians_under_vmap_are_those_of_each(gradients: bool) -> None:
    matrices = hostile()[:4]
    wanted = torch.stack([torch.autograd.functional.jacobian(matrix_exponential, matrix) for matrix in matrices])
    with torch.set_grad_enabled(gradients):
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            found = torch.func.vmap(transform(matrix_exponential))(matrices)
            assert torch.allclose(found, wanted, rtol=0, atol=1e-13 * float(wanted.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
def test_flows_of_linear_fields_take_stacked_parameters(bias: bool) -> None:
    blocks, x = [], torch.randn(4, 3, dtype=torch.float64)
    for spread in (0.01, 1.0, 10.0):
        field = LinearField(3, bias=bias, spread=spread)
        if field.bias is not None:
            torch.nn.init.normal_(field.bias)
        blocks.append(DynamicalBlock(field, "exact", FreeSignal(0.3)).double())
    outputs = ensemble_forward(blocks[0], stacked_parameters(blocks), x)
    for output, block in zip(outputs, blocks, strict=True):
        alone = block(x)
        assert torch.allclose(output, alone, rtol=0, atol=1e-12 * float(alone.detach().abs().max()))
