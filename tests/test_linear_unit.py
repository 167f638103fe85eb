"""Maps divided by their norm against dense float64 matrices: at the start, after training, and for hostile weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.ensembles import ensemble_forward, stacked_parameters
from dynablocks.errors import InvalidArgument
from dynablocks.fields import GradientField
from dynablocks.integrators import ExplicitEuler
from dynablocks.linear import Dense, LinearMap, NormalisedConv, UnitConv, UnitDense, frozen_weights, shared_weights
from dynablocks.linear.unit import GRADIENT_STEPS
from dynablocks.properties import verify
from dynablocks.robustness.audit import singular_range
from dynablocks.switching import FreeSignal

MAKERS = {
    "dense, wide": lambda: UnitDense(9, 4),
    "dense, tall": lambda: UnitDense(4, 9),
    "circular": lambda: UnitConv((3, 4, 4), 5, 3, "circular"),
    "same": lambda: UnitConv((3, 4, 4), 2, 3),
    "full": lambda: UnitConv((2, 3, 4), 2, 2, "full"),
}
EVERY_MAP = pytest.mark.parametrize("name", MAKERS)


def largest(linear: LinearMap) -> float:
    """The norm of the map as it is, by a dense SVD."""
    with torch.no_grad():
        return float(np.linalg.svd(linear.dense_matrix().numpy(), compute_uv=False)[0])


def free(linear: LinearMap) -> nn.Parameter:
    return next(p for p in linear.parameters() if p.ndim > 1)


@EVERY_MAP
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-6])
def test_the_norm_is_one_in_evaluation_whatever_the_weight(name: str, scale: float) -> None:
    linear = MAKERS[name]().double().eval()
    with torch.no_grad():
        free(linear).mul_(scale).add_(0.3 * scale * torch.randn_like(free(linear)))
    # With "same" padding the bound is that of a larger torus.
    least = 0.8 if name == "same" else 1 - 1e-9
    assert least <= largest(linear) <= 1 + 1e-12
    assert largest(linear) <= linear.norm_bounds().upper
    assert singular_range(linear)[0] <= 1 + 1e-9 or name == "same"


@EVERY_MAP
def test_a_weight_of_zeros_and_one_of_rank_one(name: str) -> None:
    linear = MAKERS[name]().double()
    with torch.no_grad():
        free(linear).zero_()
    for mode in (linear.train(), linear.eval()):
        assert largest(mode) == 0
        assert bool(mode.compute_weight().isfinite().all())
    with torch.no_grad():
        free(linear)[0, 0] = 2.0
    linear.train()
    for _ in range(60):
        linear.compute_weight()
    assert largest(linear.eval()) <= 1 + 1e-12
    assert float(linear.train().compute_weight().detach().abs().max()) > 0


@EVERY_MAP
def test_training_divides_by_power_iteration_which_gets_close_from_below(name: str) -> None:
    linear = MAKERS[name]().double().train()
    for _ in range(300):
        weight = linear.compute_weight()
    norm = float(np.linalg.svd(linear.eval().dense_matrix().detach().numpy(), compute_uv=False)[0])
    scale = float(weight.detach().norm() / linear.compute_weight().norm())
    assert 1 - 1e-9 <= scale * norm <= 1 + 1e-3


@pytest.mark.parametrize("training", [True, False])
@EVERY_MAP
def test_the_gradient_is_that_of_the_quotient_with_its_norm(name: str, training: bool) -> None:
    torch.manual_seed(0)
    linear = MAKERS[name]().double().train()
    with torch.no_grad():
        # An orthogonal start has many leading vectors, and its norm no gradient.
        free(linear).normal_()
    for _ in range(2000):
        linear.compute_weight()
    linear.train(training)
    direction = torch.randn_like(free(linear))
    (found,) = torch.autograd.grad((linear.compute_weight() * direction).sum(), free(linear))
    twin = copy.deepcopy(linear)

    def quotient(weight: Tensor) -> Tensor:
        units = torch.eye(int(np.prod(twin.in_shape)), dtype=torch.float64).reshape(-1, *twin.in_shape)
        matrix = twin.multiply(weight, units).flatten(1)
        return (weight / torch.linalg.matrix_norm(matrix, ord=2) * direction).sum()

    expected = torch.func.grad(quotient)(free(linear).detach())
    if name == "same" and not training:  # divided by the norm on the padded torus
        expected *= largest(linear)
    assert (found - expected).norm() <= 2e-3 * expected.norm()


@EVERY_MAP
def test_a_map_may_be_used_twice_before_the_backward_pass(name: str) -> None:
    linear = MAKERS[name]().double().train()
    x = torch.randn(2, *linear.in_shape, dtype=torch.float64)
    (linear(x).sum() + linear(2 * x).sum()).backward()
    first = free(linear).grad.clone()
    assert bool(first.isfinite().all())
    jacobian = torch.func.jacrev(lambda v: linear(v[None])[0])(x[0])
    assert jacobian.shape == (*linear.out_shape, *linear.in_shape)


@EVERY_MAP
def test_the_norm_is_taken_in_full_precision_under_autocast(name: str) -> None:
    linear = MAKERS[name]().train()
    twin = copy.deepcopy(linear)
    with torch.autocast("cpu", torch.bfloat16):
        weight = linear.compute_weight()
    assert weight.dtype == torch.float32
    assert torch.equal(weight, twin.compute_weight())


@EVERY_MAP
def test_in_evaluation_the_weight_is_the_same_with_and_without_gradients(name: str) -> None:
    linear = MAKERS[name]().eval()
    with torch.no_grad():
        expected = linear.compute_weight()
    assert torch.equal(linear.compute_weight(), expected)


def test_what_is_declared_in_training_is_the_bound_of_the_weight_in_training() -> None:
    linear = UnitDense(2, 2).double().train()
    with torch.no_grad():
        linear.matrix.copy_(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))
        linear.leading.copy_(torch.tensor([[1.0, 0.0]]))
    block = DynamicalBlock(GradientField(linear, "relu"), ExplicitEuler(), FreeSignal(2.0)).train()
    assert block.properties.lipschitz >= 199
    assert block.eval().properties.lipschitz <= 1 + 1e-9


@pytest.mark.parametrize("bad", [1e25, float("inf"), float("nan")])
def test_a_weight_that_overflows_leaves_the_iteration_in_order(bad: float) -> None:
    unit, normalised = UnitDense(4, 3).train(), NormalisedConv((2, 4, 4), 2, 3)
    for linear, parameter in ((unit, unit.matrix), (normalised, normalised.kernel)):
        good = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(bad)
        unit.compute_weight()
        normalised.project_()
        if bad == 1e25:
            assert bool(parameter.isfinite().all())
        with torch.no_grad():
            parameter.copy_(good)
        assert bool(linear.leading.isfinite().all())
        assert bool(linear.weight.isfinite().all())


@EVERY_MAP
def test_steps_do_not_expand_after_training(name: str) -> None:
    torch.manual_seed(1)
    block = DynamicalBlock(GradientField(MAKERS[name](), "relu"), ExplicitEuler(), FreeSignal(2.0))
    optimiser = torch.optim.Adam(block.parameters(), lr=0.05)
    x = torch.randn(16, *block.in_shape)
    for _ in range(10):
        optimiser.zero_grad()
        with shared_weights(block):
            (block(x) + x).square().mean().backward()
        optimiser.step()
    block.eval()
    assert block.properties.lipschitz <= 1 + 1e-5
    assert verify(block, x[:4], deep=True).passed


def test_the_norm_is_kept_until_the_weight_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = UnitDense(5, 3).eval()
    counted: list[int] = []
    original = UnitDense.free_norm_bounds
    monkeypatch.setattr(UnitDense, "free_norm_bounds", lambda self: counted.append(1) or original(self))
    for _ in range(3):
        linear(torch.ones(1, 5))
    with frozen_weights(linear):
        linear(torch.ones(1, 5))
    assert len(counted) == 1
    with torch.no_grad():
        linear.matrix.mul_(5.0)
    assert largest(linear) <= 1 + 1e-6
    assert len(counted) == 2
    linear.load_state_dict(UnitDense(5, 3).state_dict())
    assert largest(linear) <= 1 + 1e-6
    assert len(counted) == 3
    linear.matrix.data.mul_(5.0)
    assert largest(linear) <= 1 + 1e-6
    assert largest(copy.deepcopy(linear).double()) <= 1 + 1e-12


def test_the_iteration_goes_on_from_the_stored_vector() -> None:
    one, other = UnitConv((2, 4, 4), 3, 3, "circular").train(), UnitConv((2, 4, 4), 3, 3, "circular").train()
    for _ in range(5):
        one.compute_weight()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.compute_weight(), other.compute_weight())


def test_a_step_that_trusts_too_small_a_norm_is_caught() -> None:
    """The broken twin: divided by half the norm."""

    class Halved(UnitDense):
        def compute_weight(self) -> Tensor:
            return 2 * super().compute_weight()

    block = DynamicalBlock(GradientField(Halved(4, 4), "relu"), ExplicitEuler(), FreeSignal(2.0)).eval()
    assert block.properties.lipschitz > 2


@EVERY_MAP
def test_a_weight_whose_squares_overflow_is_divided_and_has_a_slope_in_evaluation(name: str) -> None:
    """K/‖K‖ does not change with the scale of K, and its slope is divided by it; a power of two leaves all digits."""
    linear, scale = MAKERS[name]().eval(), 2.0**83
    direction = torch.randn_like(free(linear))
    found = []
    for factor in (1.0, scale):
        with torch.no_grad():
            free(linear).mul_(factor)
            expected = linear.compute_weight()
        weight = linear.compute_weight()
        assert torch.equal(weight, expected)
        (slope,) = torch.autograd.grad((weight * direction).sum(), free(linear))
        found.append((weight.detach(), factor * slope))
    assert not bool(free(linear).square().sum().isfinite())
    torch.testing.assert_close(found[1], found[0], rtol=1.3e-6, atol=1e-5)


def test_what_is_declared_in_training_holds_for_the_uses_that_follow() -> None:
    """Each takes a step of power iteration of its own; a bound of the present weight alone is too large in the end."""
    linear = UnitDense(2, 2).double().train()
    with torch.no_grad():
        linear.matrix.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        linear.leading.copy_(torch.tensor([[0.6, 0.8]]))
        high, low = linear.norm_bounds().upper, linear.smallest_singular_value()
        of_this_weight = Dense.compute_smallest_singular_value(linear)
    values = torch.stack([torch.linalg.svdvals(linear.compute_weight().detach()) for _ in range(40)])
    assert low <= float(values.min())
    assert float(values.max()) <= high
    assert float(values[-1, -1]) == pytest.approx(1 / 3)
    assert of_this_weight > 0.5


@EVERY_MAP
@pytest.mark.parametrize("scale", [1e2, 1e-2])
def test_what_is_declared_in_training_holds_whatever_the_length_of_the_stored_vector(name: str, scale: float) -> None:
    linear = MAKERS[name]().double().train()
    with torch.no_grad():
        free(linear).normal_()
        expected = linear.compute_weight()
        linear.leading.mul_(scale)
        torch.testing.assert_close(linear.compute_weight(), expected, rtol=1e-13, atol=0)
        high, low = linear.norm_bounds().upper, linear.smallest_singular_value()
    for _ in range(3):
        weight = linear.compute_weight().detach()
        with torch.no_grad():
            linear.hold(weight)
            values = torch.linalg.svdvals(linear.dense_matrix())
            linear.hold(None)
        assert float(values[0]) <= high * (1 + 1e-12)
        assert low <= float(values[-1]) * (1 + 1e-12)


def test_a_stored_vector_of_length_one_is_taken_as_it_is() -> None:
    """To the last bit: attacks in training multiply by the weight that it gives."""
    torch.manual_seed(0)
    linear = UnitConv((3, 4, 4), 5, 3, "circular").train()
    with torch.no_grad():
        expected = free(linear) / linear.multiply(free(linear), linear.leading).norm()
        assert torch.equal(linear.compute_weight(), expected)


def two_of(make: Callable[[], LinearMap]) -> list[LinearMap]:
    """Two maps of normal weights."""
    maps = [make().double() for _ in range(2)]
    with torch.no_grad():
        for linear in maps:
            free(linear).normal_()
    return maps


@pytest.mark.parametrize("learning", [True, False])
def test_each_run_of_an_ensemble_is_divided_by_its_own_norm(learning: bool) -> None:
    torch.manual_seed(0)
    maps = two_of(MAKERS["dense, tall"])
    for linear in maps:
        # So wide a gap to the other singular values that the iteration ends in the norm, 2, to the last digit.
        u, _, vt = torch.linalg.svd(free(linear).detach(), full_matrices=False)
        with torch.no_grad():
            free(linear).copy_(u @ torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.25]).double()) @ vt)
    before, stacked = [linear.leading.clone() for linear in maps], stacked_parameters(maps)
    with torch.set_grad_enabled(learning):
        images = ensemble_forward(maps[0], stacked, torch.eye(4, dtype=torch.float64))
    for run, linear in enumerate(maps):
        torch.testing.assert_close(images[run].detach(), free(linear).detach().mT / 2, rtol=0, atol=1e-12)
        assert torch.equal(linear.leading, before[run])
    if not learning:
        return
    direction = torch.randn_like(images)
    (found,) = torch.autograd.grad((images * direction).sum(), stacked["matrix"])
    for run, linear in enumerate(maps):

        def quotient(weight: Tensor, pull: Tensor = direction[run]) -> Tensor:
            return (weight.mT / torch.linalg.matrix_norm(weight, ord=2) * pull).sum()

        expected = torch.func.grad(quotient)(free(linear).detach())
        torch.testing.assert_close(found[run], expected, rtol=0, atol=1e-11)


@EVERY_MAP
def test_an_ensemble_iterates_for_each_run_from_the_vector_of_the_first(name: str) -> None:
    maps = two_of(MAKERS[name])
    x = torch.randn(3, *maps[0].in_shape, dtype=torch.float64)
    images = ensemble_forward(maps[0], stacked_parameters(maps), x)
    for run, linear in enumerate(maps):
        weight, vector = free(linear).detach(), maps[0].leading
        for _ in range(GRADIENT_STEPS):
            vector = linear.power_step(weight, vector)
        by_hand = linear.multiply(weight, x) / linear.multiply(weight, vector).norm()
        torch.testing.assert_close(images[run].detach(), by_hand, rtol=0, atol=1e-10)


@EVERY_MAP
def test_an_ensemble_in_evaluation_is_refused_for_want_of_a_bound(name: str) -> None:
    maps = [linear.eval() for linear in two_of(MAKERS[name])]
    stacked, x = stacked_parameters(maps), torch.randn(3, *maps[0].in_shape, dtype=torch.float64)
    with pytest.raises(InvalidArgument, match="evaluate the networks one by one"):
        ensemble_forward(maps[0], stacked, x)

    def summed(own: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(maps[0], own, (x,)).sum()

    with pytest.raises(InvalidArgument, match="evaluate the networks one by one"):
        torch.func.vmap(torch.func.grad(summed))(stacked)
    # One network on many states has one weight, whose norm it keeps.
    expected = maps[0](x)
    apart = torch.func.vmap(lambda state: maps[0](state[None])[0])(x)
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-12)


def test_what_is_declared_does_not_move_the_iteration() -> None:
    torch.manual_seed(0)
    linear = two_of(MAKERS["dense, wide"])[0].train()
    before = linear.leading.clone()
    declared = linear.properties.lipschitz
    assert torch.equal(linear.leading, before)
    assert largest(linear) <= declared <= largest(linear) * (1 + 1e-6)
    linear.compute_weight()
    assert not torch.equal(linear.leading, before)


@EVERY_MAP
def test_a_copy_of_a_map_that_was_compiled_in_place_has_its_own_weight(name: str) -> None:
    """What ``compile()`` leaves is bound to the map that it was called on."""
    linear = MAKERS[name]().eval()
    linear.compile(backend="eager")
    twin = copy.deepcopy(linear)
    assert linear._compiled_call_impl is not None
    assert twin._compiled_call_impl is None


@EVERY_MAP
def test_no_copy_of_the_weight_is_kept_through_training(name: str) -> None:
    """Evaluation holds one beside its norm, which tells it when the weight has changed."""
    linear = MAKERS[name]()
    x = torch.randn(2, *linear.in_shape)
    with torch.no_grad():
        expected = linear.eval()(x)
        assert linear._held_norm is not None
        linear.train()(x)
        assert linear._held_norm is not None
    linear(x)
    assert linear._held_norm is None
    with torch.no_grad():
        assert torch.equal(linear.eval()(x), expected)


def test_parameters_are_stacked_by_name_whatever_the_order_in_which_they_were_registered() -> None:
    class Affine(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.randn(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.a * x + self.b

    networks, x = [Affine("a", "b"), Affine("b", "a")], torch.randn(5, 3)
    stacked = stacked_parameters(networks)
    assert torch.equal(stacked["b"].detach(), torch.stack([network.b.detach() for network in networks]))
    outputs = ensemble_forward(networks[0], stacked, x)
    torch.testing.assert_close(outputs, torch.stack([network(x) for network in networks]), rtol=0, atol=1e-6)
