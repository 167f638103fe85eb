"""K/‖K‖ as one step of autograd against the plain quotient: values, derivatives of every order and mode, layouts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynablocks.linear import UnitConv, UnitDense
from dynablocks.linear.unit import UnitNorm, _Quotient

DOUBLE = torch.float64
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(5, 3, dtype=DOUBLE),
    "turned matrix": lambda: torch.randn(3, 5, dtype=DOUBLE).mT,
    "kernel": lambda: torch.randn(4, 3, 2, 2, dtype=DOUBLE),
    "channels last": lambda: torch.randn(4, 3, 2, 2, dtype=DOUBLE).contiguous(memory_format=torch.channels_last),
    "one channel": lambda: torch.randn(4, 1, 3, 3, dtype=DOUBLE),
    "part of a kernel": lambda: torch.randn(4, 6, 2, 2, dtype=DOUBLE)[:, ::2],
}
MAPS: dict[str, Callable[[], UnitNorm]] = {
    "dense": lambda: UnitDense(4, 9),
    "circular": lambda: UnitConv((3, 4, 4), 5, 3, "circular"),
    "same": lambda: UnitConv((3, 4, 4), 2, 3),
}


def drawn(name: str) -> tuple[Tensor, Tensor]:
    """A weight and a length, as leaves that need gradients."""
    torch.manual_seed(0)
    return WEIGHTS[name]().requires_grad_(), torch.tensor(1.7, dtype=DOUBLE, requires_grad=True)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_values_are_those_of_the_quotient_and_gradients_too(name: str, turned: bool) -> None:
    """The gradient that comes in lies in memory as the weight does, or the other way round."""
    weight, length = drawn(name)
    pull = torch.randn_like(weight)
    if turned:
        pull = torch.randn(weight.shape[::-1], dtype=DOUBLE).permute(*range(weight.ndim)[::-1])
    plain, unit = weight / length, _Quotient.of(weight, length)
    assert torch.equal(unit, plain)
    assert unit.stride() == plain.stride()
    expected = torch.autograd.grad(plain, (weight, length), pull)
    found = torch.autograd.grad(unit, (weight, length), pull)
    assert abs(float(expected[1])) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", WEIGHTS)
def test_derivatives_of_every_order_and_mode(name: str) -> None:
    inputs = drawn(name)
    assert torch.autograd.gradcheck(_Quotient.of, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(_Quotient.of, inputs, check_batched_grad=True)


def test_a_derivative_without_the_share_of_the_length_is_caught() -> None:
    """The broken twin: the length as a constant."""
    weight, length = drawn("matrix")
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda k, l: _Quotient.of(k, l.detach()) + 0 * l, (weight, length))


def test_a_weight_of_zeros_has_finite_derivatives_with_respect_to_the_length() -> None:
    weight, length = torch.zeros(3, 2, requires_grad=True), torch.tensor(1e-30, requires_grad=True)
    _, found = torch.autograd.grad(_Quotient.of(weight, length).sum(), (weight, length))
    assert float(found) == 0


@pytest.mark.parametrize("name", MAPS)
def test_in_training_a_map_learns_as_by_the_plain_quotient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = MAPS[name]().double().train()
    with torch.no_grad():
        # An orthogonal start has many leading vectors.
        for parameter in linear.parameters():
            parameter.normal_()
    x, pull = torch.randn(2, *linear.in_shape, dtype=DOUBLE), torch.randn(2, *linear.out_shape, dtype=DOUBLE)

    def learned(linear: UnitNorm) -> tuple[Tensor, list[Tensor]]:
        image = linear(x)
        return image.detach(), list(torch.autograd.grad((image * pull).sum(), list(linear.parameters())))

    twin = copy.deepcopy(linear)
    assert type(linear.compute_weight().grad_fn).__name__ == "_QuotientBackward"
    twin.compute_weight()
    image, found = learned(linear)
    monkeypatch.setattr(_Quotient, "of", lambda weight, length: weight / length)
    expected_image, expected = learned(twin)
    assert torch.equal(image, expected_image)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MAPS)
def test_without_gradients_in_transforms_and_in_evaluation_the_quotient_is_plain(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(weight: Tensor, length: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(_Quotient, "of", refuse)
    linear = MAPS[name]().train()
    x = torch.randn(linear.in_shape)
    with torch.no_grad():
        linear.compute_weight()
    assert torch.func.jacrev(lambda v: linear(v[None])[0])(x).shape == (*linear.out_shape, *linear.in_shape)
    linear.eval().compute_weight()
    with pytest.raises(AssertionError):
        linear.train().compute_weight()
