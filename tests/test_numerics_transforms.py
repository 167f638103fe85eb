"""Linear systems and inverses under function transforms, against one matrix after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynablocks.numerics.solving import invert_matrices, solve_systems
from dynablocks.numerics.transforms import unwrapped

Map = Callable[[Tensor, Tensor], Tensor]


def systems(runs: int = 4, size: int = 3) -> tuple[Tensor, Tensor]:
    """Matrices whose pivots differ from run to run."""
    shifted = size**0.5 * torch.eye(size, dtype=torch.float64).roll(1, 0)
    matrix = shifted + torch.randn(runs, size, size, dtype=torch.float64)
    return matrix, torch.randn(runs, size, 2, dtype=torch.float64)


MODES = (torch.func.jacrev, torch.func.jacfwd)
DERIVATIVES: dict[str, Callable[[Map], Map]] = {
    **{f"{mode.__name__} by {k}": (lambda f, mode=mode, k=k: mode(f, k)) for mode in MODES for k in (0, 1)},
    "jacrev of jacrev": lambda f: torch.func.jacrev(torch.func.jacrev(f)),
    "jacrev of jacfwd": lambda f: torch.func.jacrev(torch.func.jacfwd(f)),
    "jacfwd of jacrev": lambda f: torch.func.jacfwd(torch.func.jacrev(f)),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_under_vmap_are_those_of_each(name: str, gradients: bool) -> None:
    """One system a run, and a batch of one."""
    derivative = DERIVATIVES[name]
    matrix, right = systems()
    inverse_first = derivative(lambda a, b: torch.linalg.inv(a) @ b)
    wanted = torch.stack([inverse_first(a, b) for a, b in zip(matrix, right, strict=True)])
    with torch.set_grad_enabled(gradients):
        for f in (solve_systems, lambda a, b: solve_systems(a[None], b[None])[0]):
            found = torch.func.vmap(derivative(f))(matrix, right)
            assert torch.allclose(found, wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 0), (0, 2)])
def test_values_and_gradients_of_runs_along_any_axis(axes: tuple[int | None, int | None]) -> None:
    matrix, right = systems()
    given = [
        (v[0] if axis is None else v.movedim(0, axis)).clone().requires_grad_(True)
        for v, axis in zip((matrix, right), axes, strict=True)
    ]
    found = torch.func.vmap(solve_systems, in_dims=axes)(*given)
    each = [v if axis is None else v.movedim(axis, 0) for v, axis in zip(given, axes, strict=True)]
    wanted = torch.linalg.inv(each[0]) @ each[1]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((found * weights).sum(), given)
    for one, other in zip(gradients, torch.autograd.grad((wanted * weights).sum(), given), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


def test_second_derivatives_behind_vmap() -> None:
    matrix, right = (v.requires_grad_(True) for v in systems())
    stacked = torch.func.vmap(solve_systems)
    assert torch.autograd.gradcheck(stacked, (matrix, right), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(stacked, (matrix, right))


def test_as_many_right_sides_as_rows_and_matrices_are_no_vectors() -> None:
    matrix, right = systems(3)[0], torch.randn(3, 3, dtype=torch.float64)
    wanted = torch.linalg.inv(matrix) @ right
    assert torch.allclose(solve_systems(matrix, right), wanted, rtol=0, atol=1e-12)
    found = torch.func.vmap(solve_systems, in_dims=(0, None))(matrix, right)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_a_singular_run_is_an_error_only_where_asked() -> None:
    matrix, right = systems()
    matrix[1] = 0
    found = torch.func.vmap(lambda a, b: solve_systems(a, b, check=False))(matrix, right)
    assert found.isfinite().flatten(1).all(1).tolist() == [True, False, True, True]
    with pytest.raises(RuntimeError, match="singular"):
        torch.func.vmap(solve_systems)(matrix, right)


@pytest.mark.usefixtures("two_threads")
def test_large_matrices_of_many_runs() -> None:
    size = 180
    matrix = torch.randn(6, size, size, dtype=torch.float64) + 30 * torch.eye(size, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    for found in (
        torch.func.vmap(invert_matrices)(matrix),
        torch.func.vmap(solve_systems, in_dims=(0, None))(matrix, eye),
    ):
        torch.testing.assert_close(found @ matrix, eye.expand(6, size, size), rtol=0, atol=1e-11)


@pytest.mark.parametrize("size", [2, 70])
def test_inverses_of_singular_runs_are_not_finite(size: int) -> None:
    matrix = systems(3, size)[0]
    matrix[1, :, 0] = 0
    found = torch.func.vmap(invert_matrices)(matrix)
    assert found.isfinite().flatten(1).all(1).tolist() == [True, False, True]


def test_unwrapped_tensors_hold_the_numbers_of_all_runs() -> None:
    x = torch.randn(2, 3, 4)
    seen: list[Tensor] = []

    def look(row: Tensor) -> Tensor:
        seen.append(unwrapped(row))
        return row.sum()

    torch.func.vmap(torch.func.vmap(torch.func.grad(look)))(x)
    assert [torch.equal(values, x) for values in seen] == [True]
    assert unwrapped(x) is x
