"""Ax + b of dense maps against the plain formula: gradients, number formats, ensembles, products of one's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynablocks.ensembles import ensemble_forward, stacked_parameters
from dynablocks.errors import InvalidArgument
from dynablocks.fields import GradientField
from dynablocks.linear import Bounds, Dense, LinearMap, OrthogonalDense, UnitDense, linear_norm_bounds

DOUBLE = torch.float64
MAPS: dict[str, Callable[[], Dense]] = {
    "free": lambda: Dense(4, 3),
    "orthogonal": lambda: OrthogonalDense(4, 3),
    "divided by its norm": lambda: UnitDense(4, 3).eval(),
}


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4)])
@pytest.mark.parametrize("name", MAPS)
def test_it_is_the_product_and_the_bias_with_their_gradients(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = MAPS[name]().double()
    x, bias = torch.randn(shape, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    pull = torch.randn(*shape[:-1], 3, dtype=DOUBLE)

    def with_gradients(image: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        value = image(*inputs)
        return [value.detach(), *torch.autograd.grad((value * pull).sum(), [*inputs, linear.matrix])]

    found = with_gradients(linear.affine)
    expected = with_gradients(lambda x, b: x @ linear.weight.mT + b)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(linear.affine(x, None), linear(x))


def test_under_autocast_it_stays_in_the_number_format_of_products() -> None:
    """As of a convolution; a bias that is added afterwards would make float32 of it again."""
    torch.manual_seed(0)
    linear, bias = Dense(4, 3), torch.randn(3, requires_grad=True)
    x = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        image = linear.affine(x, bias)
    assert image.dtype == torch.bfloat16
    exact = x.double() @ linear.weight.double().mT + bias.double()
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(image.double(), exact, rtol=eps, atol=8 * eps)
    image.float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == linear.matrix.grad.dtype == torch.float32


class Louder(Dense):
    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return 9 * super().multiply(weight, x)


class Stacked(Dense):
    """Its weight is a stack of one matrix."""

    def compute_weight(self) -> Tensor:
        return self.matrix[None]

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return super().multiply(weight[0], x)

    def compute_norm_bounds(self) -> Bounds:
        return linear_norm_bounds(self.weight.detach()[0])


def test_a_product_of_ones_own_is_used() -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(5, 4, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    given = Dense(4, 3).double()
    given.multiply = lambda weight, x: 9 * (x @ weight.mT)
    for linear, factor in ((Louder(4, 3).double(), 9), (Stacked(4, 3).double(), 1), (given, 9)):
        expected = factor * (x @ linear.matrix.mT) + bias
        torch.testing.assert_close(linear.affine(x, bias), expected, rtol=1e-12, atol=1e-13)


def test_what_is_said_of_the_maps_of_the_library_stands() -> None:
    """An ``affine`` of one's own voids it; that of the class that has the products does not."""
    for make in MAPS.values():
        linear = make()
        assert linear.is_known
        assert linear.has_its_matrix
        assert type(linear).affine is Dense.affine is not LinearMap.affine


@pytest.mark.parametrize("name", ["free", "orthogonal"])
def test_an_ensemble_of_fields_computes_as_each_alone(name: str) -> None:
    torch.manual_seed(0)
    fields = [GradientField(MAPS[name](), "tanh").double() for _ in range(3)]
    with torch.no_grad():
        for field in fields:
            field.bias.normal_()
    x = torch.randn(5, 4, dtype=DOUBLE)
    outputs = ensemble_forward(fields[0], stacked_parameters(fields), x)
    torch.testing.assert_close(outputs, torch.stack([field(x) for field in fields]), rtol=1e-12, atol=1e-13)


def test_an_input_of_another_size_gets_one_sentence() -> None:
    with pytest.raises(InvalidArgument, match=r"the input has shape \(2, 5\); Dense was built for \(batch, 4\)"):
        Dense(4, 3).affine(torch.ones(2, 5), torch.ones(3))
