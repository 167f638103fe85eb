"""The property algebra on known answers, and verify against modules whose properties are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dynablocks.properties
from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, PropertyViolated
from dynablocks.fields import FieldFacts, GradientField, MetricField, PartitionedField
from dynablocks.fitting.surrogates import FlowMap, Structure, build
from dynablocks.integrators import ExplicitEuler
from dynablocks.lifting import ChannelMix, PixelNormalisation, SpaceToDepth, ZeroLift
from dynablocks.linear import Bounds, Dense, LinearMap, OrthogonalConv, OrthogonalDense
from dynablocks.models.chain import Chain
from dynablocks.norms import Channelwise, DenseMetric, SpectralMetric
from dynablocks.properties import (
    ConformalSymplectic,
    Declaration,
    Dissipative,
    EnergyPreserving,
    Equivariant,
    GradientNormPreserving,
    Invertible,
    LinearInvariant,
    Lipschitz,
    Measurement,
    Metric,
    NormPreserving,
    Positive,
    Properties,
    Property,
    Structured,
    Symplectic,
    Verification,
    VolumePreserving,
    compose,
    declare,
    explain,
    verify,
)
from dynablocks.properties.jacobians import DENSE_LIMIT, jacobian_norms, jacobians, symplectic_defect
from dynablocks.properties.own_code import WRAPPERS
from dynablocks.properties.structure import original
from dynablocks.properties.verify import MEASURES
from dynablocks.reversible import ReversibleChain
from dynablocks.switching import FreeSignal
from dynablocks.testing import check_block

FINITE = st.floats(0, 1e200, allow_subnormal=True)


@given(FINITE, FINITE)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_lipschitz_constants_multiply_and_round_upwards(one: float, other: float) -> None:
    product = Lipschitz(one).then(Lipschitz(other)).constant
    assert product == math.inf or Fraction(product) >= Fraction(one) * Fraction(other)
    assert product <= one * other * (1 + 1e-15) + 1e-323


def test_constants_of_one_are_kept_exactly() -> None:
    assert Lipschitz(1.0).then(Lipschitz(1.0)) == Lipschitz(1.0)
    assert Lipschitz(0.0).then(Lipschitz(math.inf)).constant == math.inf
    assert Lipschitz(1.0).then(Lipschitz(1.0, Metric("M"))) is None
    with pytest.raises(InvalidArgument, match="a number >= 0"):
        Lipschitz(math.nan)


def test_tolerances_of_a_composition_add_up() -> None:
    def energy(x: Tensor) -> Tensor:
        return x.square().sum(1)

    for kept in (EnergyPreserving(energy), VolumePreserving(), Symplectic(), ConformalSymplectic(0.5), Invertible()):
        total = kept.within(1e-3).then(kept.within(2e-3))
        assert total is not None
        assert total.tolerance == pytest.approx(1.001 * 1.002 - 1)
    for first, second in ((Symplectic(), ConformalSymplectic(0.5)), (ConformalSymplectic(0.5), Symplectic())):
        mixed = first.within(1e-3).then(second.within(2e-3))
        assert mixed == ConformalSymplectic(0.5, tolerance=1e-3 + 2e-3 + 1e-3 * 2e-3)


class Fixed(Structured):
    """A map with the declaration it is given."""

    def __init__(self, function: object, *properties: Property) -> None:
        super().__init__()
        self.function, self.declared = function, properties

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def declare(self) -> Declaration:
        return Declaration.of(*self.declared, reason="given", title="Fixed")


def test_composition_keeps_what_all_parts_have_and_says_who_lost_the_rest() -> None:
    first = Fixed(lambda x: x, Lipschitz(2.0), Symplectic(), VolumePreserving(), LinearInvariant((1.0, 2.0)))
    second = Fixed(lambda x: x, Lipschitz(3.0), Symplectic(), LinearInvariant((2.0, 1.0)), Dissipative())
    declared = compose([("a", first), ("b", second)])
    assert 6.0 <= declared.properties.lipschitz <= 6.0 * (1 + 1e-15)
    assert declared.properties.of(Symplectic) is not None
    assert declared.properties.of(VolumePreserving) is None
    assert declared.losses == (
        "VolumePreserving is lost at b (given)",
        "LinearInvariant is lost at b (given)",
        "LinearInvariant is lost at a (given)",
        "Dissipative is lost at a (given)",
    )


def test_a_potential_decreases_along_one_field_only() -> None:
    part = Fixed(lambda x: x, Dissipative())
    assert compose([("a", part)]).properties.of(Dissipative) is not None
    assert compose([("a", part), ("b", part)]).properties.of(Dissipative) is None


def test_a_guarantee_tells_its_tolerance() -> None:
    assert str(Dissipative(tolerance=1e-13)) == "Dissipative(to 1.0e-13)"
    assert str(EnergyPreserving()) == "EnergyPreserving"


def test_the_empty_composition_is_the_identity() -> None:
    assert set(declare(nn.Sequential()).properties) == set(declare(nn.Identity()).properties)
    for held in verify(nn.Identity(), torch.randn(3, 4)):
        assert held.passed


def test_unknown_modules_declare_nothing_and_are_named_in_the_loss() -> None:
    declared = declare(nn.Sequential(nn.Flatten(), nn.GELU()))
    assert declared.properties == Properties()
    assert declared.properties.lipschitz == math.inf
    assert "Lipschitz is lost at 1 (GELU declares nothing)" in declared.losses
    assert str(verify(nn.GELU(), torch.randn(2, 3))) == "nothing is declared, so there is nothing to verify"


def test_a_subclass_of_a_known_module_declares_nothing() -> None:
    class Doubled(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert declare(Doubled()).properties == Properties()


def test_flattening_the_batch_is_no_map_of_samples() -> None:
    assert declare(nn.Flatten(0)).properties == Properties()


def test_a_sequential_has_no_inverse_even_where_its_parts_have() -> None:
    chain = nn.Sequential(SpaceToDepth(2), SpaceToDepth(2))
    declared = declare(chain)
    assert declared.properties.of(Invertible) is None
    assert declared.losses == ("Invertible is lost at Sequential (it has no method inverse)",)
    assert verify(chain, torch.randn(2, 1, 4, 4), deep=True).passed


def test_explain_prints_every_level_and_cuts_at_a_depth() -> None:
    model = nn.Sequential(nn.Sequential(nn.Flatten(), ZeroLift(4, 5)), nn.ReLU())
    text = str(explain(model))
    assert text.splitlines()[0] == "Sequential: (Lipschitz(1), Positive)  [composition of its parts]"
    assert "  - NormPreserving is lost at 1 (slopes in [0, 1])" in text
    zeros = "(Lipschitz(1), NormPreserving, LinearInvariant, Equivariant, Positive)  [zeros appended]"
    assert f"    1 ZeroLift(+1): {zeros}" in text
    assert len(explain(model, depth=0).lines) < len(explain(model, depth=1).lines) < len(explain(model).lines)


POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, 3),
    nn.MaxPool2d((2, 3)),
    nn.MaxPool2d(2, padding=1),
    nn.MaxPool2d(2, ceil_mode=True),
    nn.MaxPool2d(3, 2),
    nn.MaxPool2d(3, 1, padding=1),
    nn.MaxPool2d(2, 2, dilation=2),
    nn.AvgPool2d(2),
    nn.AvgPool2d((2, 3)),
    nn.AvgPool2d(2, 3),
]


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_pooling_constants_hold_and_disjoint_ones_are_attained(pool: nn.Module) -> None:
    # A bump that lies in as many windows as possible is the worst case of max-pooling.
    x = 0.01 * torch.randn(4, 1, 7, 7, dtype=torch.float64)
    x[:, 0, 3, 3] += 1
    declared = declare(pool).properties.lipschitz
    measured = float(jacobian_norms(pool, x).max())
    assert measured <= declared * (1 + 1e-14)
    disjoint = not isinstance(pool, nn.MaxPool2d) or declared == 1.0
    if disjoint:
        assert measured >= declared * (1 - 1e-12)
    assert verify(pool, x).passed


def test_overlapping_max_pooling_attains_its_constant() -> None:
    assert declare(nn.MaxPool2d(3, 1)).properties.lipschitz == pytest.approx(3.0)
    x = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    x[0, 0, 3, 3] = 1
    assert float(jacobian_norms(nn.MaxPool2d(3, 1), x)) == pytest.approx(3.0)


def test_constants_of_pooling_are_rounded_upwards() -> None:
    """In fractions, since 1/√(k₁k₂) is rounded twice."""
    for sides in itertools.product(range(1, 20), repeat=2):
        entries = math.prod(sides)
        assert Fraction(declare(nn.AvgPool2d(sides)).properties.lipschitz) ** 2 * entries >= 1
        assert Fraction(declare(nn.MaxPool2d(sides, 1)).properties.lipschitz) ** 2 >= entries


@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 2), nn.AvgPool2d(2, padding=1), nn.AvgPool2d(2, divisor_override=1)])
def test_other_average_pooling_declares_no_constant(pool: nn.Module) -> None:
    assert declare(pool).properties == (Equivariant(), Positive())


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.LeakyReLU(0.3), nn.LeakyReLU(-3.0), nn.Tanh(), nn.Flatten(), nn.Identity()]
)
def test_rules_of_torch_modules_hold(module: nn.Module) -> None:
    assert verify(module, torch.randn(8, 2, 3)).passed


def test_dense_jacobians_agree_with_functorch() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(90, 5, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.jacrev(lambda v: model(v)))(x)
    found = jacobians(model, x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(jacobians(model, x), found)


def test_jacobians_are_detached_and_those_of_functorch_are_not() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    dense = torch.func.vmap(torch.func.jacrev(lambda state: layer(state[None])[0]))(x)
    assert torch.equal(jacobians(layer, x), dense.detach())
    assert not jacobians(layer, x.clone().requires_grad_(True)).requires_grad
    (gradient,) = torch.autograd.grad(dense.square().sum(), layer.weight)
    assert torch.allclose(gradient, 2 * len(x) * layer.weight.detach(), rtol=0, atol=1e-13)


def test_jacobians_are_on_the_device_of_the_states() -> None:
    found = jacobians(lambda x: 2 * x, torch.ones(3, 2, device="meta"))
    assert (found.shape, found.device.type) == ((3, 2, 2), "meta")


def test_the_symplectic_defect_of_the_plane_is_that_of_the_area() -> None:
    matrices, factor = torch.randn(20, 2, 2, dtype=torch.float64), 0.7
    form = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    expected = (torch.linalg.det(matrices) - factor)[:, None, None] * form
    assert torch.allclose(symplectic_defect(matrices, factor), expected, rtol=0, atol=1e-13)


def test_the_symplectic_defect_vanishes_for_flows_of_linear_hamiltonian_fields_alone() -> None:
    eye, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    form = torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)])
    hessian = torch.randn(6, 6, dtype=torch.float64)
    hessian = (hessian + hessian.mT) / 6
    flow, other = torch.linalg.matrix_exp(form @ hessian), torch.linalg.matrix_exp(hessian)
    kept, broken = symplectic_defect(torch.stack([flow, other])).abs().flatten(1).amax(1).tolist()
    assert kept <= 1e-13 * float(flow.norm()) ** 2
    assert broken > 0.01


@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 4, 2), (2, 2, 4)])
def test_the_symplectic_defect_needs_square_matrices_of_even_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match=f"{shape[1]} × {shape[2]}"):
        symplectic_defect(torch.ones(shape))


def test_power_iteration_beyond_the_dense_limit_is_a_lower_bound_that_gets_close() -> None:
    model = nn.Sequential(nn.Linear(DENSE_LIMIT + 1, 20), nn.Tanh()).double()
    x = torch.randn(2, DENSE_LIMIT + 1, dtype=torch.float64)
    truth = torch.linalg.matrix_norm(jacobians(model, x), ord=2)
    found = jacobian_norms(model, x)
    assert (found <= truth * (1 + 1e-12)).all()
    assert (found >= 0.98 * truth).all()


class Counted(nn.Linear):
    """A linear map that counts how often it is evaluated."""

    times = 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return super().forward(x)


def test_power_iteration_evaluates_a_module_once_for_all_products_with_its_transpose() -> None:
    model = Counted(DENSE_LIMIT + 1, 3).double()
    found = jacobian_norms(model, torch.randn(2, DENSE_LIMIT + 1, dtype=torch.float64), iterations=9)
    # Once for the number of outputs, once for all Jᵀu, and once for each Jv.
    assert model.times == 1 + 1 + 9
    assert (found <= torch.linalg.matrix_norm(model.weight.detach(), ord=2) * (1 + 1e-12)).all()
    assert (found > 0).all()


ROTATION = torch.linalg.matrix_exp(torch.tensor([[0.0, 0.4], [-0.4, 0.0]], dtype=torch.float64))
SHEAR = torch.tensor([[1.0, 0.7], [0.0, 1.0]], dtype=torch.float64)


class WithExtras(Fixed):
    def inverse(self, y: Tensor) -> Tensor:
        return y / 2

    def potential(self, x: Tensor) -> Tensor:
        return x.square().sum(1)

    def energy(self, x: Tensor) -> Tensor:
        return x.square().sum(1)


LITTLE = 1e-10
"""Some thousand times what rounding is allowed: 64 · 2 eps."""

KNOWN = [
    (EnergyPreserving(), lambda x: x @ ROTATION, lambda x: (1 + LITTLE) * x @ ROTATION),
    (ConformalSymplectic(0.81), lambda x: 0.9 * x, lambda x: 0.9 * (1 + LITTLE) * x),
    (Positive(), torch.abs, lambda x: 0 * x - LITTLE),
    (Positive(), torch.abs, lambda x: x - LITTLE),
    # The constant of a map is allowed less: 16 · 2 eps, relative.
    (Lipschitz(2.0), lambda x: 2 * x, lambda x: 2 * (1 + 1e-12) * x),
    (GradientNormPreserving(), lambda x: x @ ROTATION, lambda x: (1 + LITTLE) * x @ ROTATION),
    (NormPreserving(), lambda x: x @ ROTATION, lambda x: (1 + LITTLE) * x @ ROTATION),
    (NormPreserving(), lambda x: x @ ROTATION, lambda x: x @ SHEAR),
    (VolumePreserving(), lambda x: x @ SHEAR, lambda x: (1 + LITTLE) * x @ SHEAR),
    (Symplectic(), lambda x: x @ SHEAR, lambda x: (1 + LITTLE) * x @ SHEAR),
    (LinearInvariant(), lambda x: x.flip(1), lambda x: x + LITTLE),
    (
        LinearInvariant((1.0, 3.0)),
        lambda x: x + x.square().sum(1, keepdim=True) * x.new_tensor([3.0, -1.0]),
        lambda x: x.flip(1),
    ),
    (Equivariant(), torch.tanh, lambda x: torch.tanh(x) + LITTLE),
    (Invertible(), lambda x: 2 * x, lambda x: 2 * x + LITTLE),
    (Dissipative(), lambda x: 0.9 * x, lambda x: (1 + LITTLE) * x),
]


@pytest.mark.parametrize(("declared", "true", "broken"), KNOWN, ids=lambda v: str(v) if isinstance(v, Property) else "")
def test_each_measurement_accepts_the_true_and_rejects_the_broken(
    declared: Property, true: object, broken: object
) -> None:
    x = torch.randn(8, 2)
    assert verify(WithExtras(true, declared), x).passed
    found = verify(WithExtras(broken, declared), x)
    assert not found.passed
    (held,) = found
    assert held.counterexample is not None
    assert held.counterexample.shape == (1, 2)
    with pytest.raises(PropertyViolated, match="VIOLATED"):
        found.require()


class Undone(WithExtras):
    """A map with the declaration and the inverse that it is given."""

    def __init__(self, function: object, back: object, *properties: Property) -> None:
        super().__init__(function, *properties)
        self.back = back

    def inverse(self, y: Tensor) -> Tensor:
        return self.back(y)

    def declare(self) -> Declaration:
        return super().declare()


FAR = torch.full((1, 2), 1e12, dtype=torch.float64)
FAR_AND_NEAR = torch.cat([FAR, torch.ones(1, 2, dtype=torch.float64)])
NEAR = torch.ones(1, 2, dtype=torch.float64)
STRETCH, DOUBLING = (torch.tensor([1e5, end], dtype=torch.float64) for end in (1e-5, 2e-5))

GROSS: list[tuple[Property, Callable[[Tensor], Tensor], Tensor]] = [
    *[(kind(), lambda x: 1.01 * x, FAR) for kind in (NormPreserving, LinearInvariant, GradientNormPreserving)],
    *[(kind(), lambda x: 1.01 * x, FAR) for kind in (EnergyPreserving, Dissipative)],
    *[
        (kind(), lambda x: torch.where(x > 10, x, 1.01 * x), FAR_AND_NEAR)
        for kind in (NormPreserving, LinearInvariant, EnergyPreserving, Dissipative)
    ],
    (Equivariant(), lambda x: torch.where(x.abs() > 10, x, x + 0.01), FAR_AND_NEAR),
    (Positive(), lambda x: torch.where(x > 10, x, -0.01), FAR_AND_NEAR),
    # The area doubles.
    (VolumePreserving(), lambda x: x * DOUBLING, NEAR),
    (Symplectic(), lambda x: x * DOUBLING, NEAR),
    (ConformalSymplectic(4.0), lambda x: x * DOUBLING, NEAR),
    # The area is nearly lost, where the determinant has no digit.
    (VolumePreserving(), lambda x: x * torch.tensor([1.0, 1e-17], dtype=torch.float64), 1e14 * NEAR),
]


@pytest.mark.parametrize(("declared", "broken", "x"), GROSS)
def test_large_states_and_large_derivatives_excuse_nothing_but_rounding(
    declared: Property, broken: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    (held,) = verify(WithExtras(broken, declared), x)
    assert not held.passed
    assert held.counterexample is not None
    assert torch.equal(held.counterexample, x[-1:])


@pytest.mark.parametrize(
    ("function", "back", "held"),
    [
        (lambda x: x * STRETCH, lambda y: y / STRETCH, True),
        (lambda x: x * STRETCH, lambda y: 0 * y, False),
        (lambda x: x + 1e6, lambda y: y - 1e6, True),
        (lambda x: x + 1e6, lambda y: y - 1e6 + 1e-6, False),
        (lambda x: 1e-14 * x, lambda y: 1e14 * y, True),
        (lambda x: 1e-14 * x, lambda y: 0 * y, False),
        (lambda x: 0 * x + 1e16, lambda y: 0 * y, False),
    ],
)
def test_an_inverse_is_held_to_what_rounding_of_both_sides_leaves_of_it(
    function: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], held: bool
) -> None:
    for x in (NEAR, torch.tensor([[0.3, -2.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)):
        assert verify(Undone(function, back, Invertible()), x).passed == held


def test_maps_that_keep_what_they_say_do_so_at_large_states_and_derivatives() -> None:
    turned = Fixed(lambda x: x @ ROTATION, NormPreserving(), GradientNormPreserving(), VolumePreserving(), Symplectic())
    swapped = WithExtras(lambda x: x.flip(1), LinearInvariant(), EnergyPreserving(), Dissipative(), Equivariant())
    stretched = Fixed(lambda x: x * STRETCH, VolumePreserving(), Symplectic(), Positive(), Equivariant())
    for x in (FAR, FAR_AND_NEAR, 1e6 * torch.randn(5, 2, dtype=torch.float64)):
        for module in (turned, swapped, stretched):
            verify(module, x).require()


@pytest.mark.parametrize("seed", range(20))
def test_isometries_raise_no_false_alarm(seed: int) -> None:
    torch.manual_seed(seed)
    x = 10 * torch.randn(6, 3)
    assert verify(
        Fixed(lambda x: x @ Q3[seed], Lipschitz(1.0 + 1e-15), GradientNormPreserving(), NormPreserving()), x
    ).passed


Q3 = torch.linalg.qr(torch.randn(20, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]


def test_the_worst_pair_is_found_where_no_sample_lies() -> None:
    steep = Fixed(lambda x: x + 2 * torch.relu(x - 0.5), Lipschitz(1.5))
    found = verify(steep, torch.full((4, 2), 0.2))
    assert not found.passed


def test_deep_verification_visits_the_parts() -> None:
    model = nn.Sequential(OrthogonalDense(3, 3), Fixed(lambda x: 1.1 * x, Lipschitz(1.0)))
    found = {held.where: held.passed for held in verify(model, torch.randn(4, 3), deep=True)}
    assert found["0"]
    assert not found["1"]
    assert not found["Sequential"]


def test_verify_tells_how_far_it_is() -> None:
    fractions: list[float] = []
    result = verify(nn.Flatten(), torch.randn(2, 1, 2), progress=fractions.append)
    assert fractions == [(k + 1) / len(result.checks) for k in range(len(result.checks))]
    assert len(fractions) > 1


def test_verify_leaves_the_module_alone_and_works_in_float64() -> None:
    seen: set[tuple[torch.dtype, torch.dtype, bool]] = set()

    class Watched(Dense):
        def forward(self, x: Tensor) -> Tensor:
            seen.add((x.dtype, self.matrix.dtype, self.training))
            return super().forward(x)

    dense = Watched(3, 2).train()
    before, planted = dense.matrix.detach().clone(), torch.randn(dense.matrix.shape)
    dense.matrix.grad = planted.clone()
    assert verify(dense, torch.randn(2, 3), against=(Lipschitz(2.0), Equivariant())).passed
    assert seen == {(torch.float64, torch.float64, False)}
    assert dense.training
    assert dense.matrix.dtype == torch.float32
    assert dense.matrix.requires_grad
    assert torch.equal(dense.matrix, before)
    assert torch.equal(dense.matrix.grad, planted)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.zeros(3), torch.full((1, 3), math.inf)])
def test_verify_refuses_unusable_samples(x: Tensor) -> None:
    with pytest.raises(InvalidArgument):
        verify(nn.ReLU(), x)


def test_a_property_with_an_own_init_is_refused_when_it_is_made() -> None:
    with pytest.raises(InvalidArgument, match=r"Bounded has an __init__ of its own, .* @dataclass\(frozen=True\)"):

        class Bounded(Property):
            def __init__(self, bound: float) -> None:
                self.bound = bound

    @dataclass(frozen=True)
    class Within(Property):
        bound: float

    @dataclass(frozen=True, slots=True)
    class Slotted(Property):
        bound: float

    for kind in (Within, Slotted):
        assert kind(1.0).then(kind(1.0)) == kind(1.0)
        assert kind(1.0).then(kind(2.0)) is None


def test_a_property_brings_its_measurement_as_the_error_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Novel(Property):
        pass

    halves, grows = Fixed(lambda x: x / 2, Novel()), Fixed(lambda x: 2 * x, Novel())
    x = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
    with pytest.raises(InvalidArgument, match=r"no measurement is known .* @dynablocks\.properties\.measures\(Novel\)"):
        verify(halves, x)
    monkeypatch.setitem(MEASURES, Novel, MEASURES[Positive])  # and so it is taken out again afterwards

    @dynablocks.properties.measures(Novel)
    def measure(module: nn.Module, declared: Property, x: Tensor) -> Measurement:
        growth = (module(x).abs() - x.abs()).amax(1).clamp_min(0.0)
        worst = int(growth.argmax())
        return Measurement(float(growth[worst]), x[worst : worst + 1])

    assert verify(halves, x).passed
    found = verify(grows, x)
    assert isinstance(found, Verification)
    (check,) = found
    assert not check.passed
    assert check.residual == 3.0
    assert check.counterexample.tolist() == [[1.0, -3.0]]


@pytest.mark.parametrize("declared", [NormPreserving(), Symplectic(), VolumePreserving(), LinearInvariant()])
def test_a_large_parameter_excuses_no_broken_map(declared: Property) -> None:
    class Louder(nn.Module):
        """With the mass of the Earth in kilograms beside it."""

        def __init__(self) -> None:
            super().__init__()
            self.mass = nn.Parameter(torch.tensor(6e24))

        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * x

    x = torch.randn(4, 2)
    assert not verify(Louder(), x, against=(declared,)).passed
    (check,) = verify(Louder(), x, against=(Lipschitz(1.4),))
    assert not check.passed
    assert verify(Louder(), x, against=(Lipschitz(1.5),)).passed


def test_a_measurement_of_ones_own_is_taken_for_lipschitz_constants_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEASURES, Lipschitz, lambda module, declared, x: Measurement(0.25, x[:1], 2.25))
    (check,) = verify(nn.Tanh(), torch.zeros(2, 3), kinds=(), against=(Lipschitz(2.0),))
    assert (check.passed, check.measured, check.residual) == (False, 2.25, 0.25)


def test_a_module_that_stands_twice_counts_twice() -> None:
    twice = Fixed(lambda x: 2 * x, Lipschitz(2.0))
    assert nn.Sequential(twice, twice)[0] is twice
    assert declare(nn.Sequential(twice, twice)).properties.lipschitz >= 4.0


@pytest.mark.parametrize(
    ("small", "declared"), [(0.0, VolumePreserving()), (1e-20, VolumePreserving()), (0.0, Invertible())]
)
def test_a_map_that_is_singular_in_floating_point_is_not_taken_for_another(small: float, declared: Property) -> None:
    class Flat(Fixed):
        def inverse(self, y: Tensor) -> Tensor:
            return y

    matrix = torch.diag(torch.tensor([1.0, small], dtype=torch.float64))
    assert not verify(Flat(lambda x: x @ matrix, declared), torch.randn(3, 2, dtype=torch.float64)).passed


def test_a_map_without_values_holds_nothing() -> None:
    for value in (math.nan, math.inf):
        for declared in (Lipschitz(1.0), NormPreserving(), LinearInvariant(), VolumePreserving(), Equivariant()):
            (held,) = verify(Fixed(lambda x, v=value: x * v, declared), torch.randn(3, 2, dtype=torch.float64))
            assert not held.passed


def test_values_that_are_not_finite_hold_nothing_whatever_their_derivatives() -> None:
    x = 1 + torch.rand(3, 2, dtype=torch.float64)
    for kind in (VolumePreserving(), Symplectic(), GradientNormPreserving()):
        assert not verify(Fixed(lambda x: x + math.inf, kind), x).passed
    assert not verify(Fixed(lambda x: (1000 * x).exp(), Positive()), x).passed


def test_one_sample_that_overflows_excuses_no_other() -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    twin = Fixed(lambda x: torch.where(x > 1.5, math.inf, 1.01 * x), NormPreserving())
    (held,) = verify(twin, x)
    assert held.tolerance < 1e-12
    assert not verify(Fixed(lambda x: 1.01 * x, NormPreserving()), x[:1]).passed
    assert not held.passed


class Halved(WithExtras):
    def declare(self) -> Declaration:
        return super().declare()

    def inverse(self, y: Tensor) -> Tensor:
        return 2 * y


@pytest.mark.parametrize(
    "chained",
    [nn.Sequential, Chain, lambda part: ReversibleChain([part])],
    ids=["Sequential", "Chain", "ReversibleChain"],
)
def test_what_a_part_says_of_its_own_method_does_not_outlive_it(chained: Callable[[nn.Module], nn.Module]) -> None:
    part = Halved(lambda x: 0.5 * x, Dissipative(), Invertible())
    network = chained(part)
    assert (declare(network).properties.of(Invertible) is None) == (chained is nn.Sequential)
    assert declare(network).properties.of(Dissipative) is None
    assert any("no method potential" in loss for loss in declare(network).losses)
    assert verify(network, torch.randn(3, 2)).passed


def test_each_group_has_a_symmetry_of_its_own() -> None:
    part = Fixed(torch.relu, Equivariant("permutations"))
    both = Properties([Equivariant("permutations"), Equivariant()])
    assert not declare(part).properties.odd
    assert both.odd
    assert len({p.slot for p in both}) == 2


def test_flattening_from_a_dimension_counted_from_the_end_declares_nothing() -> None:
    assert not declare(nn.Flatten(-2)).properties
    assert declare(nn.Flatten(2)).properties.lipschitz == 1


def test_an_invariant_of_another_number_of_entries_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"has 3 weights, for states of 2 entries and outputs of 2"):
        verify(nn.Identity(), torch.ones(1, 2), against=(LinearInvariant((1.0, 0.0, 0.0)),))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_an_invariant_is_measured_whatever_the_scale_of_its_weights(scale: float) -> None:
    weights = (scale, -scale, scale)
    x = torch.randn(3, 3, dtype=torch.float64)
    kept = Fixed(lambda x: x + torch.tensor([1.0, 1.0, 0.0]).double() * x.norm(), LinearInvariant(weights))
    lost = Fixed(lambda x: 0 * x, LinearInvariant(weights))
    assert verify(kept, x).passed
    assert not verify(lost, x).passed


def test_the_energies_of_two_modules_are_not_one() -> None:
    part = Fixed(lambda x: x, EnergyPreserving())
    assert compose([("a", part), ("b", part)]).properties.of(EnergyPreserving) is None


def test_every_measurement_is_shown_to_reject() -> None:
    assert {type(declared) for declared, *_ in KNOWN} >= set(MEASURES)


def test_an_undefined_gradient_hides_no_violation_at_another_sample() -> None:
    steep = Fixed(lambda x: 5 * x.square().sqrt(), GradientNormPreserving(), Lipschitz(1.0))
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    found = {type(check.declared): check for check in verify(steep, x).checks}
    assert not found[GradientNormPreserving].passed
    assert not found[Lipschitz].passed


def test_deep_verification_visits_the_linear_maps_of_fields() -> None:
    class Wrong(OrthogonalDense):
        def compute_weight(self) -> Tensor:
            return 1.1 * super().compute_weight()

        def compute_norm_bounds(self) -> Bounds:
            return Bounds(1.0, 1.0, exact=True, method="wishful thinking")

    block = DynamicalBlock(GradientField(Wrong(4, 4), "relu"), ExplicitEuler(), FreeSignal(0.5))
    failed = {check.where for check in verify(block, torch.randn(3, 4), deep=True).checks if not check.passed}
    assert "fields.0.linear" in failed


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_properties_are_measured_also_where_gradients_are_off(quiet: type[torch.no_grad]) -> None:
    verlet = DynamicalBlock(PartitionedField.example(), "verlet", FreeSignal(0.1))
    reflecting = DynamicalBlock(GradientField(OrthogonalDense(4, 4), "relu"), ExplicitEuler(), FreeSignal(2.0))
    with quiet():
        for block in (verlet, reflecting):
            x = torch.randn(3, *block.fields[0].in_shape)
            verify(block, x).require()
            check_block(block, x.double()).require()
    liar = Fixed(nn.Linear(4, 4), Symplectic())
    with quiet():
        assert not verify(liar, torch.randn(3, 4)).passed


def test_a_compiled_module_is_what_it_was() -> None:
    block = DynamicalBlock(GradientField(OrthogonalDense(4, 4), "relu"), ExplicitEuler(), FreeSignal(2.0))
    compiled = torch.compile(block)
    assert declare(compiled).properties == block.properties
    assert declare(nn.Sequential(compiled, block)).properties == declare(nn.Sequential(block, block)).properties
    assert len(verify(compiled, torch.randn(3, 4))) == len(block.properties)
    liar = torch.compile(Fixed(nn.Linear(4, 4), Symplectic()))
    assert not verify(liar, torch.randn(3, 4)).passed


class DistributedDataParallel(nn.Module):
    """It has the name of torch's wrapper, and computes something else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return 9 * self.module(x)


def test_a_class_that_has_the_name_of_a_wrapper_is_none() -> None:
    inner = OrthogonalDense(3, 3).double()
    named = DistributedDataParallel(inner)
    x = torch.randn(2, 3, dtype=torch.float64)
    assert float(jacobian_norms(named, x).min()) == pytest.approx(9, rel=1e-9)
    assert original(named) is named
    assert not declare(named).properties
    real = (nn.parallel.DistributedDataParallel, type(torch.compile(inner)))
    assert {f"{kind.__module__}.{kind.__qualname__}" for kind in real} == set(WRAPPERS)
    assert original(torch.compile(inner)) is inner


class Size(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)


def test_a_module_may_give_one_number_a_sample() -> None:
    x = torch.randn(5, 3)
    verify(Fixed(Size(), Lipschitz(1.0)), x).require()
    assert not verify(Fixed(Size(), Lipschitz(0.99)), x).passed
    verify(Fixed(Size(), NormPreserving(), GradientNormPreserving()), x).require()
    doubled = Fixed(lambda x: 2 * Size()(x), NormPreserving(), GradientNormPreserving(), Equivariant(), Positive())
    assert [check.passed for check in verify(doubled, x)] == [False, False, False, True]


def test_images_behind_implicit_steps_are_measured_without_forward_derivatives() -> None:
    block = DynamicalBlock(GradientField(OrthogonalConv((3, 16, 16)), "tanh"), "implicit-euler", FreeSignal(0.5))
    x = torch.randn(2, 3, 16, 16)
    assert x[0].numel() > DENSE_LIMIT
    (stated,) = (p for p in block.properties if isinstance(p, Lipschitz))
    verify(block, x, kinds=(Lipschitz,), search_steps=2).require()
    low = Fixed(block, Lipschitz(0.5 * stated.constant))
    assert not verify(low, x, kinds=(Lipschitz,), search_steps=2).passed


def test_a_linear_layer_declares_the_norm_of_its_matrix() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        layer = nn.Linear(3, 5, bias=bias).double()
        declared = declare(nn.Sequential(layer, nn.ReLU())).properties
        norm = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
        assert norm <= declared.lipschitz <= norm * (1 + 1e-12)
        assert (declare(layer).properties.of(Equivariant) is None) == bias
        verify(layer, torch.randn(4, 3, dtype=torch.float64)).require()
    hooked = torch.nn.utils.weight_norm(nn.Linear(3, 3))
    assert not declare(hooked).properties


def test_the_identity_loses_nothing_whatever_the_property() -> None:
    torch.manual_seed(0)
    block = DynamicalBlock(PartitionedField.example(), "verlet", FreeSignal(0.1))
    for parts in ([nn.Identity(), block], [block, nn.Identity()], [nn.Identity(), block, nn.Identity()]):
        declared = declare(nn.Sequential(*parts)).properties
        assert declared.of(Symplectic) is not None
        assert declared.lipschitz == block.properties.lipschitz
    nothing = nn.Sequential(nn.Sequential(), nn.Identity(), nn.Identity())
    assert set(declare(nothing).properties) == set(declare(nn.Identity()).properties)
    assert declare(nn.Sequential(nothing, block)).properties.of(Symplectic) is not None
    assert declare(nn.Sequential(block, nn.Tanh())).properties.of(Symplectic) is None
    assert declare(Chain(block, block)).properties.of(Invertible) is not None
    assert declare(Chain(nn.Identity(), block)).properties.of(Invertible) is None
    metric = DenseMetric(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    step = DynamicalBlock(MetricField(Dense(2, 2), metric), "euler", FreeSignal(0.75))
    assert declare(nn.Sequential(nn.Identity(), step)).properties.lipschitz_in(metric) == 1.0


def test_isometries_and_permutations_keep_what_they_keep() -> None:
    torch.manual_seed(0)
    wide, mix = OrthogonalDense(3, 5), ChannelMix((2, 4, 4), 3)
    image, state = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    for module, x, kinds in (
        (wide, state, {NormPreserving, Equivariant}),
        (mix, image, {NormPreserving, Equivariant}),
        (OrthogonalConv((2, 4, 4), 2, 3, padding="circular"), image, {NormPreserving, GradientNormPreserving}),
        (SpaceToDepth(2), image, {Positive, Equivariant}),
        (ZeroLift(2, 3), image, {Positive, Equivariant, LinearInvariant}),
        (nn.Flatten(), image, {Positive, Equivariant}),
        (nn.ReLU(), image, {Positive}),
    ):
        assert kinds <= {type(p) for p in declare(module).properties}
        verify(module, x).require()
    assert declare(OrthogonalDense(5, 3)).properties.of(NormPreserving) is None


@pytest.mark.parametrize(
    ("part", "shape", "channels", "said"),
    [
        (ZeroLift(1, 3), (1, 4, 4), None, "from 1 to 3 channels, and norms on 1 and 1 are given; .* channels=3"),
        (ZeroLift(1, 3), (2, 4, 4), 3, "from 1 to 3 channels, and norms on 2 and 3 are given; give a metric on 1 "),
        (ChannelMix((5, 4, 4), 2), (5, 4, 4), 3, "from 5 to 2 channels, and norms on 5 and 3 are given; .* channels=2"),
        (PixelNormalisation((0.5,) * 3, (0.25,) * 3), (1, 4, 4), None, "from 3 to 3 channels, and norms on 1 and 1 "),
    ],
)
def test_norms_of_other_channels_than_those_of_a_layer_are_refused(
    part: nn.Module, shape: tuple[int, int, int], channels: int | None, said: str
) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{type(part).__name__} leads {said}"):
        Channelwise(part, SpectralMetric(shape), channels)


def test_a_layer_across_channels_declares_its_norms_as_long_as_they_are_of_its_channels() -> None:
    one, other = SpectralMetric((5, 4, 4)), SpectralMetric((2, 4, 4))
    layer = Channelwise(ChannelMix((5, 4, 4), 2), one, 2)
    verify(layer, torch.randn(3, 5, 4, 4)).require()
    assert layer.properties.lipschitz_in(one, other) == pytest.approx(1.0, rel=1e-5, abs=0)
    layer.channels = None
    assert not layer.properties
    assert layer.declare().reason.startswith("ChannelMix leads from 5 to 2 channels, and norms on 5 and 5 are given")


@pytest.mark.parametrize("metric", [Metric("M"), DenseMetric(torch.eye(6), (2, 3)), SpectralMetric((1, 2, 3), 1.0)])
def test_the_norms_of_no_samples_are_none(metric: Metric) -> None:
    shape = getattr(metric, "shape", (2, 3))
    assert metric.norm(torch.zeros(0, *shape)).shape == (0,)
    ones = metric.norm(torch.ones(4, *shape, dtype=torch.float64))
    torch.testing.assert_close(ones, torch.full((4,), 6**0.5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_what_is_not_declared_is_not_said_to_hold() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(InvalidArgument, match=r"Linear declares no Symplectic.*against="):
        verify(nn.Linear(2, 2), x, kinds=(Symplectic,))
    turn = nn.Linear(2, 2)
    with torch.no_grad():
        turn.weight.copy_(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    found = verify(turn, x, kinds=(), against=(Symplectic(), NormPreserving()))
    assert [check.passed for check in found] == [True, False]
    assert [type(check.declared) for check in found] == [Symplectic, NormPreserving]


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (Lipschitz(2.0), "Lipschitz(2)"),
        (ConformalSymplectic(0.5, tolerance=1e-13), "ConformalSymplectic(0.5, to 1.0e-13)"),
        (LinearInvariant((1.0, 2.0), tolerance=1e-13), "LinearInvariant(1.0, 2.0, to 1.0e-13)"),
        (LinearInvariant(), "LinearInvariant"),
        (EnergyPreserving(tolerance=1e-13), "EnergyPreserving(to 1.0e-13)"),
        (Equivariant(), "Equivariant"),
        (Equivariant("flip"), "Equivariant(flip)"),
    ],
)
def test_a_property_tells_its_tolerance(declared: Property, said: str) -> None:
    assert str(declared) == said


class Misspelt(GradientField):
    def facts(self) -> FieldFacts:
        return FieldFacts(self.lineer.norm_bounds().upper ** 2)


class MisspeltWeight(Dense):
    def compute_weight(self) -> Tensor:
        return self.matirx


class Shapeless(LinearMap):
    """A map that forgets to say its shapes."""


@pytest.mark.parametrize(
    ("read", "missing"),
    [
        (lambda: DynamicalBlock(Misspelt(Dense(2, 2)), ExplicitEuler(), FreeSignal(0.5)).properties, "lineer"),
        (lambda: MisspeltWeight(2, 2).weight, "matirx"),
        (lambda: MisspeltWeight(2, 2)(torch.zeros(1, 2)), "matirx"),
        (lambda: Shapeless().features, "out_shape"),
    ],
)
def test_a_property_that_fails_names_what_is_missing_and_not_itself(read: Callable[[], object], missing: str) -> None:
    with pytest.raises(RuntimeError, match=f"raised AttributeError: .* has no attribute '{missing}'") as caught:
        read()
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_verification_echoes_what_it_prints() -> None:
    found = verify(nn.Flatten(), torch.ones(2, 1, 2, 2), kinds=(NormPreserving,))
    assert repr(found) == str(found) == "Flatten: NormPreserving holds (residual 0.00e+00, tolerance 5.68e-14)"
    report = check_block(DynamicalBlock(GradientField(OrthogonalDense(2, 2)), ExplicitEuler(), FreeSignal(0.5)))
    assert repr(report) == str(report)
    assert repr(report).startswith(f"{report.subject}\n  ok    ")


class InPlace(Structured):
    """It halves what it is given, and says that norms stay."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)

    def declare(self) -> Declaration:
        return Declaration.of(NormPreserving(), reason="its input is its output")


@pytest.mark.parametrize("deep", [False, True])
def test_a_map_that_works_in_place_is_not_measured(deep: bool) -> None:
    x = torch.ones(2, 3)
    for module in (InPlace(), nn.Sequential(InPlace()), nn.Sequential(nn.Identity(), InPlace())):
        with pytest.raises(InvalidArgument, match="changes its input in place, so that "):
            verify(module, x, deep=deep)
    assert torch.equal(x, torch.ones(2, 3))


def test_a_part_is_measured_at_what_it_is_given_and_not_at_what_is_made_of_it() -> None:
    liar = Fixed(lambda x: 2 * x, Positive(), Lipschitz(1.0))
    first = nn.Sequential(Fixed(lambda x: x, NormPreserving()), nn.ReLU(inplace=True), liar)
    failed = [check for check in verify(first, torch.randn(4, 3), deep=True) if not check.passed]
    assert [check.where for check in failed] == ["2"]

    class Swallowed(Structured):
        """‖f(x)‖ = ‖x‖ for x >= 0 alone, as every x is once it has worked in place."""

        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()

        def declare(self) -> Declaration:
            return Declaration.of(NormPreserving(), reason="true of nonnegative x")

    with pytest.raises(InvalidArgument, match=r"^1 changes its input in place"):
        verify(nn.Sequential(Fixed(lambda x: 2 * x), Swallowed()), torch.randn(4, 3), deep=True)


def test_the_root_is_verified_beside_a_part_that_has_the_name_of_its_class() -> None:
    class Liar(Structured):
        def __init__(self) -> None:
            super().__init__()
            self.Liar = Fixed(lambda x: x, NormPreserving())

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.Liar(x)

        def declare(self) -> Declaration:
            return Declaration.of(NormPreserving(), reason="as its part")

    found = verify(Liar(), torch.randn(3, 2), deep=True)
    assert [(check.where, check.passed) for check in found] == [("Liar", True), ("Liar", False)]


class Kept(Structured):
    """A shift of all entries, and two functions that it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1

    def energy(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)).square().sum(1)

    def potential(self, x: Tensor) -> Tensor:
        return -x.sum(1)

    def declare(self) -> Declaration:
        return Declaration.of(EnergyPreserving(), Dissipative(), reason="a shift")


def total(self: nn.Module, x: Tensor) -> Tensor:
    return x.square().sum(1)


@pytest.mark.parametrize("method", ["energy", "potential"])
def test_another_energy_or_potential_is_not_spoken_of(method: str) -> None:
    x = torch.randn(4, 3)
    verify(Kept(), x).require()
    other = type("Other", (Kept,), {method: total})
    claimed = EnergyPreserving() if method == "energy" else Dissipative()
    assert not verify(other(), x.abs(), kinds=(), against=(claimed,)).passed
    assert not other().properties
    assert f"has a method {method} of its own" in other().declare().reason
    honest = type("Honest", (other,), {"declare": lambda self: Declaration.of(Lipschitz(1.0), reason="a shift")})
    assert honest().properties.lipschitz == 1.0


@pytest.mark.parametrize("method", ["energy", "potential"])
def test_a_composition_has_the_energy_of_no_part(method: str) -> None:
    model = type("Model", (Chain,), {method: total})(Kept())
    assert not model.properties
    assert any(f"(its {method} is not that of its parts)" in loss for loss in model.declare().losses)
    assert not Chain(Kept()).properties


@pytest.mark.parametrize("method", ["to_units", "from_units", "_own_energy", "energy"])
def test_a_flow_map_in_units_of_its_own_declares_nothing(method: str) -> None:
    built = build(Structure("symplectic", ("q", "p"), width=4))
    given = built.field, built.method, built.structure
    assert FlowMap(*given).properties.of(Symplectic) is not None
    assert type("Renamed", (FlowMap,), {})(*given).properties.of(Symplectic) is not None
    bent = type("Bent", (FlowMap,), {method: lambda self, x: getattr(FlowMap, method)(self, x) ** 3})(*given)
    assert not bent.properties
    assert f"has a method {method} of its own" in bent.declare().reason
