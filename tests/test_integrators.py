"""Orders, exact flows, contractivity and invariants of every integrator, against scipy and dense Jacobians."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, NotConverged
from dynablocks.experiments import Store
from dynablocks.experiments.orders import FlowBoundsCell, convergence, lie_trotter_bound, lipschitz_problem
from dynablocks.fields import (
    FIELDS,
    CompartmentField,
    Damping,
    FieldFacts,
    GradientField,
    LinearField,
    OddField,
    PartitionedField,
    PreconditionedField,
    ShearField,
    SphereField,
    SumField,
    TwoMatrixField,
    VectorField,
    leaky_relu,
)
from dynablocks.integrators import (
    GAUSS4,
    HEUN,
    INTEGRATORS,
    RK4,
    SSP3,
    DiscreteGradient,
    ExactFlow,
    ExplicitEuler,
    ExplicitRungeKutta,
    ImplicitRungeKutta,
    Integrator,
    Projected,
    Splitting,
    Tableau,
    Trapezoidal,
    exact_solution,
    integrator,
    measured_order,
    over_states,
)
from dynablocks.integrators.base import flow_properties
from dynablocks.integrators.implicit import ImplicitTableau
from dynablocks.integrators.splitting import YOSHIDA4
from dynablocks.linear import Conv, Dense, OrthogonalConv, OrthogonalDense, frozen_weights
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
    NormPreserving,
    Positive,
    Symplectic,
    VolumePreserving,
    symplectic_defect,
    verify,
)
from dynablocks.properties.jacobians import jacobians
from dynablocks.switching import FreeSignal
from dynablocks.testing import INTEGRATOR_CHECKS, check_integrator
from dynablocks.testing.methods import Trial

EVERY_INTEGRATOR = pytest.mark.parametrize("name", sorted(INTEGRATORS))


def reference(field: VectorField, start: Tensor, time: float) -> Tensor:
    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return field(torch.from_numpy(flat).reshape(1, *field.in_shape)).flatten().numpy()

    ends = []
    for point in start:
        solution = solve_ivp(slope, (0, time), point.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
        ends.append(torch.from_numpy(solution.y[:, -1]).reshape(point.shape))
    return torch.stack(ends)


@EVERY_INTEGRATOR
def test_the_order_is_the_slope_of_the_error(name: str) -> None:
    method = INTEGRATORS[name]()
    if method.order is None:
        pytest.skip("an exact flow has no order; it is compared with scipy below")
    measured = convergence(name)
    assert measured["slope"] == pytest.approx(method.order, abs=0.15)


def test_a_wrong_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: Heun's weights a little off are of order 1."""
    twin = Tableau("twin", 1, ((), (1.0,)), (0.4, 0.6))
    monkeypatch.setitem(INTEGRATORS, "twin", lambda: ExplicitRungeKutta(twin))
    assert convergence("twin")["slope"] == pytest.approx(1.0, abs=0.15)


def linear_field(rate: float) -> LinearField:
    field = LinearField(1).double().requires_grad_(False)
    field.matrix.fill_(rate)
    return field


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("ssp3", 3), ("rk4", 4)])
def test_the_measured_order_is_that_of_the_stability_function(name: str, order: int) -> None:
    """On ẋ = −x a step is R(−h)x, R the series of exp up to the order, since there are as many stages."""
    counts = (2, 4, 8, 16)
    ends = [sum((-1 / n) ** k / math.factorial(k) for k in range(order + 1)) ** n for n in counts]
    expected = -np.polyfit(np.log(counts), np.log([abs(end - math.exp(-1)) for end in ends]), 1)[0]
    found = measured_order(name, linear_field(-1.0), torch.ones(1, 1, dtype=torch.float64), 1.0, counts)
    assert found == pytest.approx(expected, rel=1e-4)


def test_steps_that_follow_another_field_have_the_order_zero() -> None:
    """The broken twin: its steps agree with each other as well as Euler's do."""

    class Slow(ExplicitEuler):
        def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
            return super().step(field, x, 0.9 * step_size)

    start = torch.ones(1, 1, dtype=torch.float64)
    assert abs(measured_order(Slow(), linear_field(-1.0), start)) < 0.1
    assert measured_order(ExplicitEuler(), linear_field(-1.0), start) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"counts": (8,)}, "two different numbers of steps"),
        ({"counts": (8, 0)}, "counts is 0"),
        ({"time": 0.0}, "time is 0.0"),
        ({"start": torch.ones(1, 1)}, r"torch\.float32, torch\.float64 .* give field\.double\(\)"),
        ({"start": torch.ones(1, dtype=torch.float64)}, r"the shape \(1,\)"),
        ({"method": "rk4", "counts": (512, 1024)}, "take fewer steps"),
        ({"method": "cayley"}, "tangent to spheres"),
    ],
)
def test_where_there_is_no_order_to_measure_a_sentence_says_so(change: dict, sentence: str) -> None:
    given = {"method": "euler", "field": linear_field(-1.0), "start": torch.ones(1, 1, dtype=torch.float64)}
    with pytest.raises(InvalidArgument, match=sentence):
        measured_order(**(given | change))


def test_a_solution_that_ends_before_the_time_is_no_solution() -> None:
    """x(t) = 1/(1 − t) leaves all numbers at t = 1."""
    start = torch.ones(1, 1, dtype=torch.float64)
    assert float(exact_solution(torch.square, start, 0.5)) == pytest.approx(2.0, rel=1e-11)
    with pytest.raises(InvalidArgument, match=r"the solution to t = 2 stops at t = 1 \(.*; take a shorter time"):
        exact_solution(torch.square, start, 2.0)


class Mute(Integrator):
    """Euler's method, of which no order is said."""

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return x + over_states(step_size, x) * field(x)


def test_a_method_that_says_no_order_is_told_what_to_set() -> None:
    start = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(InvalidArgument, match=r"Mute says no order; set order = p on the class"):
        measured_order(Mute(), linear_field(-1.0), start)
    assert measured_order(Mute(), linear_field(-1.0), start, counts=(32, 64)) == pytest.approx(1.0, abs=0.05)


def test_the_bounds_on_flows_hold_and_the_printed_ones_do_not() -> None:
    """Proposition 2.1 and appendix D, whose proof misses the part of ‖f‖ and whose last lines lack the factor L_f."""
    ratios = FlowBoundsCell(fields=3).build(Path(), Store(Path()))
    assert 0.3 < ratios["stability"] <= 1
    assert 0.3 < ratios["splitting"] <= 1
    assert 0.1 < ratios["splitting_kinked"] <= 1
    assert min(ratios["splitting_of_proof"], ratios["splitting_as_printed"]) > 1


@pytest.mark.parametrize("h", [0.01, 0.1, 1.0])
def test_the_bound_of_a_lie_trotter_step_needs_both_fields(h: float) -> None:
    """f = 1 and g(x) = x from 0: the step ends in h e^h, the flow of f + g in e^h − 1, and L_f is 0."""
    constant = LinearField(1, bias=True).double().requires_grad_(False)
    constant.matrix.zero_()
    constant.bias.fill_(1.0)
    end = integrator("lie-trotter").step(SumField(constant, linear_field(1.0)), torch.zeros(1, 1).double(), h)
    missed = float(end) - math.expm1(h)
    assert missed == pytest.approx(h * math.exp(h) - math.expm1(h), rel=1e-9)
    constants, largest = (constant.facts().lipschitz, 1.0), math.expm1(h)
    assert constants[0] == 0
    assert lie_trotter_bound(constants, (0.0, largest), h) == 0 < missed
    assert missed <= lie_trotter_bound(constants, (1.0, largest), h) <= (1 + h) * missed


def with_kinks(sizes: tuple[float, float]) -> tuple[GradientField, GradientField]:
    """A contractive and an expansive leaky-ReLU field of these Lipschitz constants, of sizes around 1."""
    fields = []
    for expansive, size in zip((False, True), sizes, strict=True):
        field = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5), expansive=expansive, alpha=size).double()
        nn.init.normal_(field.bias, std=1 / size)
        fields.append(field)
    return fields[0], fields[1]


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (0.01, 1.0), (1.0, 0.01)])
def test_a_lie_trotter_step_of_lipschitz_fields_stays_within_its_bound(sizes: tuple[float, float]) -> None:
    """Where L_f is far below L_g it breaks the bound that has no part of ‖f‖."""
    first, second = with_kinks(sizes)
    field, x, h = SumField(first, second), torch.randn(6, 3, dtype=torch.float64), 0.25
    constants = first.facts().lipschitz, second.facts().lipschitz
    assert constants == pytest.approx(sizes, rel=1e-6)
    with torch.no_grad(), frozen_weights(field):
        half, end = exact_solution(field, x, h / 2), exact_solution(field, x, h)
        missed = (integrator("lie-trotter").step(field, x, h) - end).norm(dim=1)
        along_first = [first(y).norm(dim=1) for y in (x, first.flow(x, h / 2), first.flow(x, h))]
        along_sum = [second(z).norm(dim=1) for z in (x, half, end)]
    speeds = torch.stack(along_first).amax(0), torch.stack(along_sum).amax(0)
    assert (missed <= lie_trotter_bound(constants, speeds, h)).all()
    if sizes[0] < sizes[1]:
        assert (missed > lie_trotter_bound(constants, (torch.zeros_like(missed), speeds[1]), h)).any()


def test_a_lie_trotter_splitting_of_fields_that_are_lipschitz_alone_has_at_least_order_one() -> None:
    """Proposition D.1 asks for no derivative."""
    field = lipschitz_problem()
    assert all(term.sigma.slope_min < term.sigma.slope_max for term in field.terms())
    assert convergence("lie-trotter", field=field)["slope"] >= 0.9


def test_symplectic_euler_of_the_paper_moves_q_first_and_that_of_the_library_p() -> None:
    """Section 4.1 by hand: q₊ = q + h ∂K(p) and p₊ = p − h ∂V(q₊)."""
    field, h = PartitionedField.example().double(), 0.3
    x = torch.randn(5, 4, dtype=torch.float64)
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.5)
    (a, c), (b, d) = ((f.linear.matrix.detach(), f.bias.detach()) for f in (field.drift.force, field.kick.force))

    def kinetic(p: Tensor) -> Tensor:
        return torch.tanh(p @ a.mT + c) @ a

    def potential(q: Tensor) -> Tensor:
        return torch.tanh(q @ b.mT + d) @ b

    (q, p), paper = x.chunk(2, dim=1), SumField(field.drift, field.kick)
    moved = q + h * kinetic(p)
    by_hand = torch.cat([moved, p - h * potential(moved)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(integrator("lie-trotter").step(paper, x, h), by_hand, rtol=0, atol=1e-13)
        kicked = p - h * potential(q)
        here = torch.cat([q + h * kinetic(kicked), kicked], dim=1)
        torch.testing.assert_close(integrator("symplectic-euler").step(field, x, h), here, rtol=0, atol=1e-13)
        back = integrator("symplectic-euler").step(field, by_hand, -h)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-13)
    block = DynamicalBlock(paper, "lie-trotter", FreeSignal(h)).double()
    assert block.properties.of(Symplectic) is not None
    verify(block, x, kinds=(Symplectic,)).require()


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)),
        lambda: GradientField(OrthogonalDense(4, 2), leaky_relu(0.1), expansive=True),
        lambda: GradientField(OrthogonalDense(3, 3), "relu", alpha=-0.8),
        lambda: GradientField(OrthogonalConv((2, 3, 3)), leaky_relu(0.5)),
        lambda: PreconditionedField(OrthogonalDense(3, 3), "relu"),
    ],
)
@pytest.mark.parametrize("time", [0.8, -0.5])
def test_the_exact_flow_agrees_with_scipy(make, time: float) -> None:
    field = make().double()
    with torch.no_grad():
        field.bias.normal_()
    x = torch.randn(3, *field.in_shape, dtype=torch.float64)
    flow = ExactFlow()
    with torch.no_grad():
        end = flow.step(field, x, time)
        assert torch.allclose(end, reference(field, x, time), rtol=0, atol=1e-9)
        assert torch.allclose(flow.inverse(field, end, time), x, rtol=0, atol=1e-12)
        twice = flow.step(field, flow.step(field, x, 0.3 * time), 0.7 * time)
        assert torch.allclose(twice, end, rtol=0, atol=1e-12)
        given = flow.log_determinant(field, x, time)
    size = x[0].numel()
    dense = torch.func.vmap(torch.func.jacrev(lambda v: flow.step(field, v[None], time)[0]))(x).reshape(-1, size, size)
    assert torch.allclose(torch.linalg.slogdet(dense.detach())[1], given, rtol=0, atol=1e-12)
    declared = flow.declare(field, time).properties
    assert declared.of(Invertible) is not None
    measured = torch.linalg.matrix_norm(dense.detach(), ord=2).max()
    assert measured <= declared.lipschitz * (1 + 1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("time", [0.7, -0.7, 3.0])
def test_exact_flow_constants_are_attained(slope: float, time: float) -> None:
    field = GradientField(OrthogonalDense(3, 3), leaky_relu(slope)).double()
    x = 3 * torch.randn(400, 3, dtype=torch.float64)
    dense = torch.func.vmap(torch.func.jacrev(lambda v: ExactFlow().step(field, v[None], time)[0]))(x).detach()
    declared = ExactFlow().declare(field, time).properties.lipschitz
    assert declared == pytest.approx(np.exp(-slope * time) if time > 0 else np.exp(-time))
    assert float(torch.linalg.matrix_norm(dense, ord=2).max()) == pytest.approx(declared, rel=1e-9)


def test_exact_flows_refuse_fields_they_do_not_solve() -> None:
    for field, sentence in (
        (GradientField(Dense(3, 3)), "orthonormal rows"),
        (GradientField(OrthogonalDense(2, 4)), "orthonormal rows"),
        (GradientField(OrthogonalDense(3, 3), "tanh"), "relu or leaky-relu"),
        (GradientField(OrthogonalConv((2, 4, 4), padding="full")), "orthonormal rows"),
    ):
        with pytest.raises(InvalidArgument, match=sentence):
            ExactFlow().step(field, torch.zeros(1, *field.in_shape), 1.0)
    with pytest.raises(InvalidArgument, match="no closed-form inverse"):
        ExplicitEuler().inverse(field, torch.zeros(1, 3), 1.0)


def test_an_overflowing_flow_declares_no_inverse_and_no_constant() -> None:
    for linear, slope in ((OrthogonalDense(3, 3), 0.5), (OrthogonalDense(4, 2), 1.0)):
        field = GradientField(linear, leaky_relu(slope), expansive=True)
        declared = ExactFlow().declare(field, 1e4).properties
        assert declared.lipschitz == np.inf
        assert declared.of(Invertible) is None


class Spiral(VectorField):
    """ẋ = (aI + ωJ)x with J = ((0, 1), (−1, 0)): ‖DΦ_t‖ = e^{at}, and the Lipschitz constant is √(a² + ω²)."""

    def __init__(self, rate: float, turn: float) -> None:
        super().__init__()
        self.in_shape, self.rate, self.turn = (2,), rate, turn
        self.register_buffer("matrix", torch.tensor([[rate, turn], [-turn, rate]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def facts(self) -> FieldFacts:
        return FieldFacts(math.hypot(self.rate, self.turn), self.rate, reason="a normal matrix")

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        growth, angle = (torch.as_tensor(rate * time, dtype=x.dtype) for rate in (self.rate, self.turn))
        return growth.exp() * (angle.cos() * x + angle.sin() * torch.stack([x[:, 1], -x[:, 0]], dim=1))


@pytest.mark.parametrize("rate", [-0.5, 0.5])
@pytest.mark.parametrize("time", [0.0, 0.7, 3.0, -0.7])
def test_the_constant_of_a_flow_without_one_of_its_own_is_that_of_groenwall(rate: float, time: float) -> None:
    field = Spiral(rate, 2.0)
    declared = ExactFlow().declare(field, time).properties.lipschitz
    measured = torch.linalg.matrix_norm(dense_step(ExactFlow(), field, torch.randn(3, 2).double(), time), ord=2).max()
    assert float(measured) == pytest.approx(math.exp(rate * time), rel=1e-12)
    assert declared >= float(measured) * (1 - 1e-13)
    exponent = rate * time if time >= 0 else -time * math.hypot(rate, 2.0)
    assert declared == pytest.approx(math.exp(exponent), rel=1e-12)
    assert Spiral(0.5, 2.0).flow_constant(1e4)[0] == math.inf


class Relaxation(VectorField):
    """ẋ = c − x with its flow in closed form; c is held in a number format."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_shape = (2,)
        self.register_buffer("rest", torch.ones(2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest - x

    def facts(self) -> FieldFacts:
        return FieldFacts.of_spectrum(-1.0, -1.0, odd=False, reason="−I")

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return self.rest + (x - self.rest) * torch.as_tensor(-time, dtype=x.dtype).exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_closed_form_that_forgets_its_state_is_not_undone(dtype: torch.dtype) -> None:
    field, x = Relaxation(dtype), torch.tensor([[2.0, 3.0]], dtype=dtype)
    for time in (1.0, 8.0, 20.0, 28.0, 40.0):
        back = field.flow(field.flow(x, time), -time)
        declared = ExactFlow().declare(field, time).properties.of(Invertible)
        assert (declared is not None) == (time <= {torch.float32: 8.0, torch.float64: 28.0}[dtype])
        if declared is not None:
            assert float((back - x).abs().max()) < 5e-3
    assert torch.equal(field.flow(field.flow(x, 40.0), -40.0), field.rest.expand(1, 2))


class Saddle(VectorField):
    """q̇ = p, ṗ = q, in whose flow both constants are e^t."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_shape = (2,)
        self.register_buffer("format", torch.zeros(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)

    def facts(self) -> FieldFacts:
        return FieldFacts(1.0, 1.0, odd=True, divergence_free=True, reason="a saddle")

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        time = torch.as_tensor(time, dtype=x.dtype)
        return time.cosh() * x + time.sinh() * x.flip(1)


@pytest.mark.parametrize(("dtype", "longest"), [(torch.float32, 4.0), (torch.float64, 14.0)])
def test_a_flow_that_grows_there_and_back_is_undone_for_half_as_long(dtype: torch.dtype, longest: float) -> None:
    field, x = Saddle(dtype), torch.tensor([[1.0, 0.0], [0.3, 0.9]], dtype=dtype)
    for time in (1.0, 4.0, 8.0, 14.0, 17.0):
        declared = ExactFlow().declare(field, time).properties.of(Invertible)
        assert (declared is not None) == (time <= longest)
        if declared is not None:
            assert float((field.flow(field.flow(x, time), -time) - x).abs().max()) < 5e-3
    back = field.flow(field.flow(x, 20.0), -20.0)
    assert float((back - x).abs().max()) > 0.05


def test_a_flow_without_a_constant_says_what_its_inverse_wants() -> None:
    class Unbounded(Relaxation):
        def facts(self) -> FieldFacts:
            return FieldFacts(reason="nothing is known")

    (loss,) = (loss for loss in ExactFlow().declare(Unbounded(torch.float64), 0.1).losses if "Invertible" in loss)
    assert "no Lipschitz constant of the flow is known" in loss
    (loss,) = (loss for loss in ExactFlow().declare(Relaxation(torch.float64), 900.0).losses if "Invertible" in loss)
    assert "take a shorter time" in loss


class Exchange(VectorField):
    """ẋ = M tanh(x) with 1ᵀM = 0: mass moves, none is lost; odd."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.rates = nn.Parameter(torch.tensor([[-1.0, 0.5, 0.25], [0.75, -0.5, 0.5], [0.25, 0.0, -0.75]]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.rates.mT

    def facts(self) -> FieldFacts:
        norm = float(torch.linalg.matrix_norm(self.rates.detach().double(), ord=2)) * (1 + 1e-12)
        return FieldFacts(norm, norm, odd=True, linear_invariants=(None,), reason="columns sum to zero")


@EVERY_INTEGRATOR
def test_linear_invariants_and_symmetry_are_kept(name: str) -> None:
    method, field = INTEGRATORS[name](), Exchange().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    if method.why_not(field) is not None:
        with pytest.raises(InvalidArgument):
            method.declare(field, 0.7)
        return
    declared = method.declare(field, 0.7).properties
    assert (declared.of(LinearInvariant) is not None) == (LinearInvariant in method.keeps)
    assert (declared.of(Equivariant) is not None) == (Equivariant in method.keeps)
    with torch.no_grad():
        y = method.step(field, x, 0.7)
        assert torch.allclose(y.sum(1), x.sum(1), rtol=0, atol=1e-13)
        assert torch.allclose(method.step(field, -x, 0.7), -y, rtol=0, atol=1e-14)


def decaying_field() -> TwoMatrixField:
    """One whose one-sided constant is negative: −1.91, and 2.09 its Lipschitz constant."""
    field = TwoMatrixField(Dense(3, 3), Dense(3, 3), "tanh", decay=2.0)
    with torch.no_grad():
        for linear in (field.inner, field.outer):
            linear.matrix.mul_(0.3)
    return field


def test_positive_weights_alone_make_no_implicit_method_non_expansive() -> None:
    """R(z) = (1 + 3z/4)/(1 − z/4) tends to −3 for stiff decay."""
    quarter = ImplicitTableau("quarter", 1, ((0.25,),), (1.0,))
    field = decaying_field()
    assert field.facts().one_sided < 0
    assert not quarter.b_stable
    assert ImplicitRungeKutta(quarter).declare(field, 1.0).properties.lipschitz == math.inf


def dense_step(method: Integrator, field: VectorField, x: Tensor, h: float) -> Tensor:
    return jacobians(lambda v: method.step(field, v, h), x)


class HalfEuler(Integrator):
    """Two Euler steps of half the size, as a user writes a method."""

    order = 1
    keeps = frozenset({LinearInvariant})

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        half = 0.5 * over_states(step_size, x)
        x = x + half * field(x)
        return x + half * field(x)


class BoundedHalfEuler(HalfEuler):
    """The same with a constant."""

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        constant, reason = field.euler_constant(step_size / 2, bound)
        return math.nextafter(constant * constant, math.inf), reason


def test_a_method_of_ones_own_declares_what_its_attributes_and_its_constant_say() -> None:
    field, x = Exchange().double(), 2 * torch.randn(50, 3, dtype=torch.float64)
    bare, bounded = HalfEuler().declare(field, 0.5), BoundedHalfEuler().declare(field, 0.5)
    assert (bare.title, bounded.title) == ("HalfEuler(h=0.5)", "BoundedHalfEuler(h=0.5)")
    for declared in (bare, bounded):
        assert declared.properties.of(LinearInvariant) is not None
        assert [loss.split()[0] for loss in declared.losses] == ["Equivariant"]
    assert bare.properties.of(Lipschitz) is None
    measured = float(torch.linalg.matrix_norm(dense_step(BoundedHalfEuler(), field, x, 0.5), ord=2).max())
    assert measured <= bounded.properties.lipschitz == pytest.approx(field.euler_constant(0.25)[0] ** 2)
    assert measured_order(HalfEuler(), field, x[:3]) == pytest.approx(1.0, abs=0.1)


def test_a_method_without_a_step_says_what_to_implement() -> None:
    class Nothing(Integrator):
        order = 1

    with pytest.raises(NotImplementedError, match=r"Nothing must implement step\(field, x, step_size\)"):
        Nothing().step(Exchange(), torch.zeros(1, 3), 0.1)


class Reaction(VectorField):
    """A ⇌ B with the rates 2 and 1 + x_A², and C that takes no part: a field with rates, as a user writes one."""

    in_shape = (3,)
    weights = (1.0, 1.0, 1.0)

    def rates(self, x: Tensor) -> Tensor:
        forth, back = torch.full_like(x[:, 0], 2.0), 1 + x[:, 0].square()
        none = torch.zeros_like(forth)
        from_column_to_row = [none, back, none, forth, none, none, none, none, none]
        return torch.stack(from_column_to_row, dim=1).reshape(-1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        flux = self.rates(x) * x.unsqueeze(1)
        return (flux - flux.mT).sum(2)

    def facts(self) -> FieldFacts:
        return FieldFacts(linear_invariants=(None, (0.0, 0.0, 1.0)), positive=True, reason="a reaction")


class WithoutRates(Reaction):
    rates = None


def test_patankar_methods_take_any_positive_field_with_rates() -> None:
    field, x = Reaction(), torch.tensor([[1.0, 0.0, 0.5], [0.2, 3.0, 0.0]], dtype=torch.float64)
    generator = field.rates(x) - torch.diag_embed(field.rates(x).sum(1))
    for h in (0.1, 100.0):
        solved = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - h * generator, x.unsqueeze(2)).squeeze(2)
        torch.testing.assert_close(INTEGRATORS["patankar"]().step(field, x, h), solved, rtol=1e-12, atol=1e-14)
    start = torch.tensor([[1.0, 0.5, 0.5]], dtype=torch.float64)
    for name, order in (("patankar", 1), ("mprk22", 2)):
        method = INTEGRATORS[name]()
        assert measured_order(method, field, start, counts=(64, 128, 256, 512)) == pytest.approx(order, abs=0.15)
        declared = method.declare(field, 100.0)
        assert declared.properties == (LinearInvariant(), Positive())
        assert ["not LinearInvariant(0.0, 0.0, 1.0)" in loss for loss in declared.losses] == [True]
        assert "needs rates" in method.why_not(WithoutRates())


class Sped(Reaction):
    """Twice the field, with the rates of half of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def facts(self) -> FieldFacts:
        return super().facts()


class SpedByItsRates(Reaction):
    def rates(self, x: Tensor) -> Tensor:
        return 2 * super().rates(x)

    def facts(self) -> FieldFacts:
        return super().facts()


@pytest.mark.parametrize("name", ["patankar", "mprk22"])
def test_the_rates_of_another_forward_are_not_taken(name: str) -> None:
    method = INTEGRATORS[name]()
    assert "Sped has a forward of its own, and the rates of another" in str(method.why_not(Sped()))
    assert method.why_not(SpedByItsRates()) is None


WITHOUT = {
    *("calvo", "cayley", "cayley-midpoint", "lie-euler", "lie-midpoint", "projected-heun", "projected-rk4"),
    *("gonzalez", "itoh-abe", "mean-value"),
    *("mprk22", "patankar"),
}
"""The methods whose steps have no constant yet."""


@EVERY_INTEGRATOR
def test_declared_constants_hold(name: str) -> None:
    method = INTEGRATORS[name]()
    fields = [
        GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)),
        GradientField(OrthogonalDense(4, 3), expansive=True),
    ]
    fields += [GradientField(Dense(3, 4), "tanh"), Exchange(), PreconditionedField(Dense(3, 4))]
    fields += [PartitionedField.example(), decaying_field()]
    fields = [field for field in fields if method.why_not(field) is None]
    finite = 0
    for field, h in itertools.product(fields, (-2.0, -0.3, 0.0, 0.5, 1.5, 2.0, 4.0)):
        field = field.double()
        x = 2 * torch.randn(200, *field.in_shape, dtype=torch.float64)
        try:
            measured = torch.linalg.matrix_norm(dense_step(method, field, x, h), ord=2).max()
        except NotConverged:
            # The equation of an implicit step has one solution for |h|L < 1; beyond it may have none.
            assert abs(h) * field.facts().lipschitz >= 1
            continue
        for bound in ("tight", "paper"):
            declared = method.declare(field, h, bound).properties.lipschitz
            assert measured <= declared * (1 + 1e-12)
            finite += h != 0 and declared < math.inf
    assert (finite == 0) == (name in WITHOUT), "an infinite constant holds of every step and says nothing"


@pytest.mark.parametrize("substeps", [1, 2, 3, 5])
def test_elementwise_substeps_are_the_substeps(substeps: int) -> None:
    method = ExplicitEuler(substeps)
    for field in (
        GradientField(OrthogonalDense(4, 3), leaky_relu(0.3)),
        GradientField(OrthogonalDense(3, 3), "tanh", alpha=-1.2),
        GradientField(OrthogonalConv((2, 3, 3)), "relu", expansive=True),
        PreconditionedField(OrthogonalDense(3, 3)),
    ):
        field = field.double()
        x = torch.randn(50, *field.in_shape, dtype=torch.float64)
        for h in (-1.0, 0.8, 2.0):
            plain = x
            for _ in range(substeps):
                plain = plain + h / substeps * field(plain)
            assert torch.allclose(method.step(field, x, h), plain, rtol=0, atol=1e-12)
            size = x[0].numel()
            dense = dense_step(method, field, x, h).reshape(-1, size, size)
            tight = method.declare(field, h).properties.lipschitz
            assert torch.linalg.matrix_norm(dense, ord=2).max() <= tight * (1 + 1e-12)
            assert tight <= method.declare(field, h, "paper").properties.lipschitz * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(0,), (0, 1)])
@pytest.mark.parametrize("name", [name for name in sorted(INTEGRATORS) if INTEGRATORS[name]().explicit])
def test_no_states_move_with_no_steps(name: str, shape: tuple[int, ...]) -> None:
    method, x, h = INTEGRATORS[name](), torch.zeros(0, 3, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    fields = (GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)), SphereField(Dense(3, 4)), CompartmentField(3, 4))
    field = next(field for field in fields if method.why_not(field) is None).double()
    assert method.step(field, x, h).shape == (0, 3)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_step_size_of_an_euler_step_is_the_number_to_the_bit(shape: tuple[int, ...]) -> None:
    field, x = GradientField(Dense(3, 4), "tanh").double(), torch.randn(5, 3, dtype=torch.float64)
    step = ExplicitEuler().step(field, x, torch.full(shape, 0.3, dtype=torch.float64))
    assert torch.equal(step, ExplicitEuler().step(field, x, 0.3))


def explicit_methods() -> list[ExplicitRungeKutta]:
    made = [INTEGRATORS[name]() for name in sorted(INTEGRATORS)]
    return [m for m in made if isinstance(m, ExplicitRungeKutta)]


@pytest.mark.parametrize("method", explicit_methods(), ids=repr)
def test_steps_at_the_circle_limit_are_non_expansive(method: ExplicitRungeKutta) -> None:
    radius = method.tableau.circle_radius
    if radius == 0:
        assert min(method.tableau.b) <= 0
        return
    for seed in range(5):
        torch.manual_seed(seed)
        field = GradientField(Dense(3, 6), "relu" if seed % 2 else "tanh").double()
        with torch.no_grad():
            field.linear.matrix.copy_(torch.randn(6, 3))
            field.bias.normal_()
        h = 2 * radius / field.facts().lipschitz
        assert method.declare(field, h * (1 - 1e-9)).properties.lipschitz == 1.0
        assert method.declare(field, 1.01 * h).properties.lipschitz > 1.0
        x, y = 3 * torch.randn(2, 4000, 3, dtype=torch.float64)
        with torch.no_grad():
            ratio = (method.step(field, x, h) - method.step(field, y, h)).norm(dim=1) / (x - y).norm(dim=1)
        assert ratio.max() <= 1 + 1e-10


def test_circle_radii_and_the_limit_of_heun() -> None:
    assert HEUN.circle_radius == pytest.approx(1.0)
    assert RK4.circle_radius == pytest.approx(1.0)
    assert Tableau("euler", 1, ((),), (1.0,)).circle_radius == pytest.approx(1.0)
    field = GradientField(Dense(1, 1), leaky_relu(1.0), bias=False).double()
    with torch.no_grad():
        field.linear.matrix.fill_(1.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    method = ExplicitRungeKutta(HEUN)
    assert abs(float(method.step(field, x, 2.0).detach())) <= 1
    assert abs(float(method.step(field, x, 2.02).detach())) > 1


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2)])
def test_the_step_of_size_two_is_a_reflection(sizes: tuple[int, int]) -> None:
    for expansive, h in ((False, 2.0), (True, -2.0)):
        field = GradientField(OrthogonalDense(*sizes), "relu", expansive=expansive).double()
        declared = ExplicitEuler().declare(field, h).properties
        assert declared.of(GradientNormPreserving) is not None
        dense = dense_step(ExplicitEuler(), field, torch.randn(50, sizes[0], dtype=torch.float64), h)
        assert torch.allclose(
            dense @ dense.mT, torch.eye(sizes[0], dtype=torch.float64).expand_as(dense), rtol=0, atol=1e-12
        )
    for field, h, substeps in (
        (GradientField(OrthogonalDense(3, 3), "relu"), 1.999, 1),
        (GradientField(OrthogonalDense(3, 3), leaky_relu(0.1)), 2.0, 1),
        (GradientField(OrthogonalDense(2, 3), "relu"), 2.0, 1),
        (GradientField(OrthogonalDense(3, 3), "relu", alpha=1.0), 2.0, 1),
        (GradientField(Dense(3, 3), "relu"), 2.0, 1),
        (GradientField(OrthogonalDense(3, 3), "relu"), 2.0, 2),
    ):
        assert ExplicitEuler(substeps).declare(field, h).properties.of(GradientNormPreserving) is None


LOST = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0**27, 2.0**26]], dtype=torch.float64)
"""Parameters whose Cayley transform is off by O(1) in float64: 1 is lost in I + BᵀB."""


def test_a_reflection_by_rows_without_digits_keeps_no_gradient_norms() -> None:
    field = GradientField(OrthogonalDense(3, 2), "relu").double()
    with torch.no_grad():
        field.linear.matrix.copy_(LOST)
    declared = ExplicitEuler().declare(field, 2.0)
    assert declared.properties.of(GradientNormPreserving) is None
    assert declared.losses[0].startswith("GradientNormPreserving is lost: rounding leaves ‖AAᵀ − I‖ = ")
    values = torch.linalg.svdvals(dense_step(ExplicitEuler(), field, torch.randn(50, 3, dtype=torch.float64), 2.0))
    assert (values - 1).abs().max() > 0.1
    assert values.max() <= declared.properties.lipschitz * (1 + 1e-12)


@pytest.mark.parametrize("off", [1e-5, 1e-9])
def test_rows_that_are_nearly_orthonormal_reflect_to_the_stated_tolerance_and_are_not_undone(off: float) -> None:
    """Against dense Jacobians, and the flow −t of the flow t."""
    torch.manual_seed(0)
    reflecting = GradientField(OrthogonalDense(3, 2), "relu").double()
    flowing = GradientField(OrthogonalDense(3, 2), leaky_relu(0.5)).double()
    x = torch.randn(50, 3, dtype=torch.float64)
    for field in (reflecting, flowing):
        nn.init.normal_(field.bias)
        assert field.is_undone(0.8)
        field.linear.hold(field.linear.weight.detach() + off * torch.randn(2, 3, dtype=torch.float64))
    stated = ExplicitEuler().declare(reflecting, 2.0).properties.of(GradientNormPreserving)
    values = torch.linalg.svdvals(dense_step(ExplicitEuler(), reflecting, x, 2.0))
    assert 0.01 * off < float((values - 1).abs().max()) <= stated.tolerance <= 100 * off
    with torch.no_grad():
        back = flowing.flow(flowing.flow(x, 0.8), -0.8)
    gap = ((back - x).norm(dim=1) / x.norm(dim=1).clamp_min(1.0)).max()
    assert 0.01 * off < float(gap) <= 100 * off
    assert not flowing.is_undone(0.8)
    with torch.no_grad():
        flowing.linear.hold(None)
        flowing.linear.matrix.copy_(LOST)
    assert not flowing.is_undone(0.8)
    assert ExactFlow().declare(flowing, 0.8).properties.of(Invertible) is None


@pytest.mark.parametrize("h", [1.0, -3.0, 12.0])
@pytest.mark.parametrize("bound", ["tight", "paper"])
def test_substeps_beyond_all_numbers_have_no_constant(h: float, bound: str) -> None:
    """(1 − 10³⁰h/12)¹² is beyond all floats, and ∞ − ∞ bounds nothing."""
    field = GradientField(OrthogonalDense(4, 2), "relu", alpha=1e30)
    assert ExplicitEuler(12).declare(field, h, bound).properties.lipschitz == math.inf


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("x", 1, ((), (1.0,)), (0.5, 0.4)), "Σ bᵢ is 0.9, and order 1 needs 1"),
        (("x", 2, ((), (1.0,)), (0.4, 0.6)), "Σ bᵢcᵢ is 0.6, and order 2 needs 0.5"),
        (("x", 3, HEUN.a, HEUN.b), "order 3 needs"),
        (("x", 4, SSP3.a, SSP3.b), "order 4 needs"),
        (("x", 1, ((), (1.0,)), (math.nan, 0.5)), "of finite numbers"),
        (("x", 1, ((1.0,),), (1.0,)), "row i of A"),
        (("x", 1, ((),), (0.5, 0.5)), "row i of A"),
    ],
)
def test_bad_tableaux_are_refused(arguments: tuple, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        Tableau(*arguments)


class Fourth(ExplicitRungeKutta):
    tableau = RK4


def test_a_tableau_of_the_class_brings_its_name_and_order() -> None:
    method, field, x = Fourth(HEUN), GradientField(Dense(3, 4), "tanh").double(), torch.randn(5, 3, dtype=torch.float64)
    assert (method.name, method.order) == ("rk4", 4)
    with torch.no_grad():
        assert torch.equal(method.step(field, x, 0.3), ExplicitRungeKutta(RK4).step(field, x, 0.3))
    with pytest.raises(AttributeError, match="order"):
        method.order = 2


def test_names() -> None:
    with pytest.raises(InvalidArgument, match="did you mean 'heun'"):
        integrator("huen")
    with pytest.raises(InvalidArgument, match="substeps is 0"):
        ExplicitEuler(0)
    with pytest.raises(InvalidArgument, match=r"method is the class ExactFlow; give an instance, ExactFlow\(\)\."):
        integrator(ExactFlow)


def names_of(*kinds: type[Integrator]) -> tuple[str, ...]:
    return tuple(name for name in sorted(INTEGRATORS) if isinstance(INTEGRATORS[name](), kinds))


DISCRETE, SPLIT, PROJECTED = names_of(DiscreteGradient), names_of(Splitting), names_of(Projected)
RUNGE_KUTTA = names_of(ExplicitEuler, ExplicitRungeKutta, ImplicitRungeKutta, Trapezoidal)
ENERGIES = ("partitioned", "separable-hamiltonian", "neural-hamiltonian", "hamiltonian-embedding")
ROTATING = ("calvo", "cayley", "lie-euler", "lie-midpoint", "cayley-midpoint", "implicit-midpoint", "gauss4")
KEPT = [
    (Symplectic, ("partitioned", "separable-hamiltonian", "shear"), SPLIT),
    (Symplectic, (*ENERGIES, "shear"), ("implicit-midpoint", "gauss4")),
    (ConformalSymplectic, ("damped-hamiltonian", "damping"), SPLIT),
    (EnergyPreserving, ENERGIES, DISCRETE),
    (Dissipative, ("dissipative", "damped-hamiltonian", "gradient", "linear"), DISCRETE),
    (VolumePreserving, ("partitioned", "separable-hamiltonian", "shear"), SPLIT),
    (VolumePreserving, (*ENERGIES, "shear"), ("implicit-midpoint", "gauss4")),
    (LinearInvariant, ("mass-preserving", "constrained", "compartments"), (*RUNGE_KUTTA, *PROJECTED)),
    (LinearInvariant, ("compartments",), ("patankar", "mprk22")),
    (Positive, ("compartments",), ("patankar", "mprk22")),
    (NormPreserving, ("sphere", "rotation"), (*ROTATING, *PROJECTED)),
    (Equivariant, ("odd", "diagonal"), (*RUNGE_KUTTA, *DISCRETE)),
    (Equivariant, ("damping",), SPLIT),
]


@pytest.mark.parametrize(("kind", "field", "method"), [(k, f, m) for k, fs, ms in KEPT for f in fs for m in ms])
def test_the_table_of_what_is_kept_is_what_blocks_declare(kind: type, field: str, method: str) -> None:
    """The table in docs/structured_dynamics.md."""
    block = DynamicalBlock(FIELDS[field].example(), method, FreeSignal(0.1))
    assert block.properties.of(kind) is not None
    x = 0.1 + torch.rand(3, *(block.in_shape or (3,)), dtype=torch.float64)
    assert len(verify(block, x, kinds=(kind,)).require()) >= 1


SAID = {
    "symplectic form": Symplectic,
    "conformal symplectic form": ConformalSymplectic,
    "energy": EnergyPreserving,
    "dissipation": Dissipative,
    "volume": VolumePreserving,
    "mass, linear invariants": LinearInvariant,
    "mass and nonnegative states": Positive,
    "norm": NormPreserving,
    "parity": Equivariant,
}
NOT = {"rotation", "patankar", "mprk22"}
"""What the row of parity leaves out."""


def quoted(text: str) -> set[str]:
    """The fields and the methods that a text of the docs names."""
    return set(re.findall("`([^`]+)`", text)) & {*FIELDS, *INTEGRATORS}


def test_the_table_of_the_docs_names_nothing_that_is_not_tested() -> None:
    page = (Path(__file__).parents[1] / "docs" / "structured_dynamics.md").read_text(encoding="utf-8")
    rows = page.split("| what is kept | fields | methods |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    (splittings,) = (line for line in page.splitlines() if line.startswith("Splittings are "))
    assert quoted(splittings) == {*SPLIT, "partitioned"}
    words = {"splittings": SPLIT, "every Runge–Kutta method": RUNGE_KUTTA, "projected ones": PROJECTED}
    words |= {"discrete gradients": DISCRETE, "of the first row": (*quoted(rows[0]), *SPLIT)}
    said = set()
    for row in rows:
        kind = SAID[row.split(" | ")[0].removeprefix("| ")]
        named = quoted(row).union(*(names for word, names in words.items() if word in row))
        tested = {name for k, fields, methods in KEPT if k is kind for name in (*fields, *methods)}
        assert named - (NOT if kind is Equivariant else set()) <= tested, row
        said.add(kind)
    assert said == {kind for kind, _, _ in KEPT} == set(SAID.values())


def test_what_the_row_of_parity_leaves_out_has_none() -> None:
    block = DynamicalBlock(FIELDS["rotation"].example(), "cayley", FreeSignal(0.1))
    assert block.properties.of(Equivariant) is None
    assert {name for name in INTEGRATORS if Equivariant not in INTEGRATORS[name]().keeps} == NOT & set(INTEGRATORS)


class TwoContractions(VectorField):
    """X₁ + X₂, each −AᵀReLU(Ax + b) with an orthogonal A of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.parts = nn.ModuleList([GradientField(OrthogonalDense(3, 3), "relu") for _ in range(2)])
        for part in self.parts:
            nn.init.normal_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x) + self.parts[1](x)

    def facts(self) -> FieldFacts:
        return FieldFacts(reason="a sum of two")

    def terms(self) -> tuple[VectorField, ...]:
        return tuple(self.parts)


CUBE = 2 ** (1 / 3)


@pytest.mark.parametrize(
    ("name", "back"), [("lie-trotter", 0.0), ("strang", 0.0), ("yoshida4", (2 * CUBE - 1) / (2 - CUBE))]
)
def test_a_splitting_of_order_above_two_goes_back_in_time_and_may_expand(name: str, back: float) -> None:
    """Forwards each flow has the constant 1, for −t it has e^t, since ‖A‖ = 1 and ReLU has the slopes 0 and 1.

    With Yoshida's weights γ, −cγ, γ for c = 2^{1/3} and γ = 1/(2 − c) the second term goes back once, for cγ, and the
    first twice, for (c − 1)γ/2, where two Strang steps meet: (2c − 1)γ in all.
    """
    field, method = TwoContractions().double(), INTEGRATORS[name]()
    declared = method.declare(field, 1.0)
    assert declared.properties.lipschitz == pytest.approx(math.exp(back), rel=1e-12)
    dense = dense_step(method, field, 2 * torch.randn(200, 3, dtype=torch.float64), 1.0)
    assert torch.linalg.matrix_norm(dense, ord=2).max() <= declared.properties.lipschitz * (1 + 1e-12)
    grows = "Lipschitz grows: order 4 needs negative substeps, in which contraction expands"
    assert (grows in declared.losses) == (back > 0)


def test_a_step_size_that_depends_on_the_state_loses_the_symplectic_form() -> None:
    """DΨ = ∂Ψ/∂x + ∂Ψ/∂h (∇h)ᵀ: what is declared is of the first part alone."""
    field, verlet = PartitionedField(None, linear_field(-4.0)).double(), integrator("verlet")
    x = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)

    def size(points: Tensor) -> Tensor:
        return 0.1 * (1 + points.square().sum(1))

    fixed, rates = [], []
    for point, h in zip(x.split(1), size(x).split(1), strict=True):
        fixed.append(dense_step(verlet, field, point, float(h)))
        rates.append(jacobians(lambda step, at=point: verlet.step(field, at, step), h[:, None]))
    varying = jacobians(lambda points: verlet.step(field, points, size(points)), x)
    gradients = 0.2 * x[:, None]
    torch.testing.assert_close(varying, torch.cat(fixed) + torch.cat(rates) @ gradients, rtol=0, atol=1e-12)
    assert float(symplectic_defect(torch.cat(fixed)).abs().max()) <= 1e-12
    assert float(symplectic_defect(varying).abs().amax((1, 2)).min()) > 1e-3


class Driven(GradientField):
    """A ridge field with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Raised(GradientField):
    """A ridge field with a profile of its own."""

    def profile(self, u: Tensor) -> Tensor:
        return super().profile(u) + 1


class Steeper(GradientField):
    """A ridge field with a preactivation of its own."""

    def preactivation(self, x: Tensor) -> Tensor:
        return 3 * super().preactivation(x)


@pytest.mark.parametrize("substeps", [1, 2])
@pytest.mark.parametrize("kind", [Driven, Raised, Steeper])
def test_no_step_takes_a_field_for_that_of_its_base_class(kind: type[GradientField], substeps: int) -> None:
    field, x = kind(OrthogonalDense(3, 3), "relu").double(), torch.randn(2, 3, dtype=torch.float64)
    expected = x
    for _ in range(substeps):
        expected = expected + 0.4 / substeps * field(expected)
    torch.testing.assert_close(ExplicitEuler(substeps).step(field, x, 0.4), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(InvalidArgument, match="of its own, and no flow"):
        ExactFlow().step(field, x, 0.4)


@pytest.mark.parametrize(
    ("base", "name"),
    [(GradientField, "forward"), (GradientField, "profile"), (GradientField, "preactivation"), (OddField, "forward")],
)
def test_a_flow_that_a_class_wrote_is_not_that_of_a_subclass_with_another_formula(
    base: type[VectorField], name: str
) -> None:
    solved = type("Solved", (base,), {"flow": lambda self, x, time: x})
    changed = type("Changed", (solved,), {name: lambda self, given: 2 * getattr(base, name)(self, given)})
    assert ExactFlow().why_not(solved.example()) is None
    assert ExactFlow().why_not(changed.example()) == f"Changed has a {name} of its own, and no flow to go with it"


@pytest.mark.parametrize("step", [1.0, -1.0, 1e-14])
@pytest.mark.parametrize("substeps", [10, 100, 1000])
def test_the_constant_of_many_elementwise_substeps_is_no_lower_than_their_product(substeps: int, step: float) -> None:
    field = GradientField(OrthogonalDense(2, 2), leaky_relu(0.5), expansive=True).double()
    declared = ExplicitEuler(substeps).declare(field, step).properties.lipschitz
    exact = max(abs((1 + Fraction(step) * slope / substeps) ** substeps) for slope in (Fraction(1), Fraction(1, 2)))
    assert exact <= Fraction(declared) <= exact * (1 + Fraction(1, 10**9))
    verify(DynamicalBlock(field, ExplicitEuler(substeps), FreeSignal(step)), torch.randn(3, 2)).require()


GROWING = [m for m in explicit_methods() if min((*m.tableau.b, *(a for row in m.tableau.a for a in row))) >= 0]


@pytest.mark.parametrize("method", GROWING, ids=repr)
def test_the_declared_growth_is_attained_by_a_linear_field(method: ExplicitRungeKutta) -> None:
    field = GradientField(Dense(1, 1), leaky_relu(1.0), expansive=True, bias=False).double()
    with torch.no_grad():
        field.linear.matrix.fill_(1.0)
    slope = float(dense_step(method, field, torch.ones(1, 1, dtype=torch.float64), 0.7).abs().max())
    assert method.declare(field, 0.7).properties.lipschitz == pytest.approx(slope, rel=1e-12)


def test_the_constant_of_a_step_that_cancels_is_rounded_up() -> None:
    class Steep(LinearField):
        def facts(self) -> FieldFacts:
            return FieldFacts(9.9, -9.9, (-9.9, -9.9), reason="exact")

    stated = Fraction(Steep(2).euler_constant(0.1)[0])
    assert stated >= abs(1 + Fraction(0.1) * Fraction(-9.9))
    assert Steep(2).euler_constant(0.1)[0] == pytest.approx(0.01, rel=1e-12)


def test_the_constant_of_a_decaying_step_is_rounded_up() -> None:
    field = TwoMatrixField(Dense(2, 2), Dense(2, 2), "relu", decay=9.9)
    with torch.no_grad():
        for linear in (field.inner, field.outer):
            linear.matrix.zero_()
    stated = field.euler_constant(0.1)[0]
    assert Fraction(stated) >= abs(1 - Fraction(0.1) * Fraction(9.9))
    assert stated == pytest.approx(0.01, rel=1e-12)


def test_the_constant_of_a_shear_is_attained() -> None:
    shear = ShearField(LinearField(1)).double()
    with torch.no_grad():
        for parameter in shear.parameters():
            parameter.fill_(2.0)
    exact = np.linalg.norm([[1.0, 0.0], [0.6, 1.0]], 2)
    assert ExactFlow().declare(shear, 0.3).properties.lipschitz == pytest.approx(exact, rel=1e-12)


def fitting_field(method: Integrator) -> VectorField | None:
    """A registered field that the method takes, of images where there is one."""
    images: list[VectorField] = [GradientField(Conv((2, 4, 4), 2), "tanh"), GradientField(OrthogonalConv((2, 4, 4)))]
    every = [*images, *(kind.example() for kind in FIELDS.values())]
    return next((field for field in every if method.why_not(field) is None), None)


@EVERY_INTEGRATOR
def test_states_may_have_a_step_each(name: str) -> None:
    method = INTEGRATORS[name]()
    field = fitting_field(method)
    assert field is not None
    # As many samples as entries along the last axis, so that a step an entry would go unseen by shapes.
    x = 0.5 + torch.rand(field.in_shape[-1], *field.in_shape, dtype=torch.float64)
    assert told("a step for each state", method, field.double(), x) == []


@pytest.mark.parametrize("method", [ExplicitEuler(), ExplicitEuler(2), ExplicitRungeKutta(RK4), HalfEuler()], ids=repr)
def test_images_may_have_a_step_each(method: Integrator) -> None:
    field = GradientField(Conv((2, 4, 4), 2), "tanh").double()
    assert told("a step for each state", method, field, torch.randn(4, 2, 4, 4, dtype=torch.float64)) == []


def told(check: str, method: Integrator, field: VectorField, x: Tensor) -> list[str]:
    """What one check of a method says of it."""
    return list(INTEGRATOR_CHECKS[check](Trial(method, field, x, step_size=0.2)))


def round_field() -> GradientField:
    """A smooth field with the constant 1."""
    return GradientField(OrthogonalDense(3, 3), "tanh").double()


class Boasting(HalfEuler):
    order = 2


class Common(HalfEuler):
    """One step for all states: the mean of theirs."""

    keeps = HalfEuler.keeps

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return super().step(field, x, torch.as_tensor(step_size, dtype=x.dtype).mean())


class Unlearned(HalfEuler):
    """The numbers of the step, without its gradient in h."""

    keeps = HalfEuler.keeps

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return super().step(field, x, torch.as_tensor(step_size, dtype=x.dtype).detach())


class Undone(HalfEuler):
    """Two steps of which the opposite ones are no inverse."""

    symmetric = True


class Flattering(BoundedHalfEuler):
    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        constant, reason = super().step_constant(field, step_size, bound)
        return 0.9 * constant, reason


class FlatteringInThePaper(BoundedHalfEuler):
    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        constant, reason = super().step_constant(field, step_size, bound)
        return (0.9 if bound == "paper" else 1.0) * constant, reason


LIARS: dict[str, tuple[type[Integrator], tuple[str, ...]]] = {
    "order": (Boasting, ("order",)),
    "a step for each state": (Common, ("a step for each state",)),
    "a learned step": (Unlearned, ("a learned step",)),
    "inverse": (Undone, ("inverse", "block")),
    "block": (Flattering, ("block",)),
}


@pytest.mark.parametrize("check", LIARS)
def test_each_check_of_a_method_refuses_its_liar(check: str) -> None:
    kind, failed = LIARS[check]
    report = check_integrator(kind(), round_field())
    assert report.failed == failed, str(report)
    assert not any("it raised" in found.message for found in report.findings), str(report)


def test_each_check_of_a_method_has_a_liar() -> None:
    assert set(LIARS) == set(INTEGRATOR_CHECKS)


def test_an_honest_method_passes_and_nothing_is_changed() -> None:
    field = round_field()
    before, state = {name: value.clone() for name, value in field.state_dict().items()}, torch.random.get_rng_state()
    report = check_integrator(BoundedHalfEuler(), field).require()
    assert [found.check for found in report.findings] == list(INTEGRATOR_CHECKS)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())


def test_the_constant_that_the_paper_has_is_measured_too() -> None:
    field, x = round_field(), torch.randn(4, 3, dtype=torch.float64)
    forwards, back = told("block", FlatteringInThePaper(), field, x)
    assert forwards.startswith("the bound 'paper': DynamicalBlock: Lipschitz(")
    assert back.startswith("the step −h, the bound 'paper': DynamicalBlock: Lipschitz(")
    assert told("block", BoundedHalfEuler(), field, x) == []


@pytest.mark.parametrize("name", INTEGRATORS)
def test_steps_have_their_gradient_in_a_step_that_is_learned(name: str) -> None:
    method = INTEGRATORS[name]()
    field = fitting_field(method)
    assert field is not None
    x = 0.5 + torch.rand(3, *field.in_shape, dtype=torch.float64)
    assert told("a learned step", method, field.double(), x) == []


def test_a_wrong_gradient_in_a_learned_step_is_found() -> None:
    class HalfGradient(HalfEuler):
        def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
            moved = super().step(field, x, step_size)
            return moved if isinstance(step_size, float) else 0.5 * (moved + moved.detach())

    (wrong,) = told("a learned step", HalfGradient(), round_field(), torch.randn(4, 3, dtype=torch.float64))
    assert wrong.startswith("⟨v, ∂Ψ^h(x)/∂h⟩ for a random v is ")


@pytest.mark.parametrize("states", [3, 4])
def test_a_step_that_is_not_shaped_to_the_states_is_told_how(states: int) -> None:
    """Three steps multiply the three entries of a state, four multiply none."""

    class Unshaped(Mute):
        def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
            return x + step_size * field(x)

    x = torch.randn(states, 3, dtype=torch.float64)
    (wrong,) = told("a step for each state", Unshaped(), round_field(), x)
    assert wrong.startswith(f"a step with h of shape ({states},), one a state, ")
    assert ("raises" in wrong, "use over_states" in wrong) == (states == 4,) * 2


def test_an_exact_flow_has_no_order_and_is_the_solution() -> None:
    field, x = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)).double(), torch.randn(4, 3, dtype=torch.float64)
    assert told("order", ExactFlow(), field, x) == []

    class NotExact(HalfEuler):
        order = None

    (wrong,) = told("order", NotExact(), field, x)
    assert wrong.startswith("the step t = 1 of an exact flow, whose order is None, and the solution differ by")


def test_an_instance_may_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTEGRATORS, "halves", HalfEuler())
    assert integrator("halves") is INTEGRATORS["halves"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Tableau("own", 1, ((),), (1.0)), "tableau 'own': A is to be a tuple of rows and b a tuple"),
        (lambda: Tableau("own", 1, ("a",), (1.0,)), "tableau 'own': A is to be a tuple of rows and b a tuple"),
        (lambda: Tableau("own", 1, ((),), (math.inf,)), "tableau 'own': A is to be a tuple of rows and b a tuple"),
        (lambda: ImplicitTableau("own", 1, (1.0,), (1.0,)), "tableau 'own': A is to be a tuple of rows and b a tuple"),
        (lambda: ExplicitRungeKutta(GAUSS4), "tableau is of class ImplicitTableau; an explicit method takes a Tableau"),
        (lambda: ImplicitRungeKutta(RK4), "tableau is of class Tableau; an implicit method takes an ImplicitTableau"),
    ],
)
def test_coefficients_that_are_none_and_methods_of_another_kind_are_refused(
    make: Callable[[], object], sentence: str
) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        make()


def test_coefficients_may_be_any_numbers() -> None:
    third = Fraction(1, 3)
    midpoint = ImplicitTableau("fractions", 2, ((Fraction(1, 2),),), np.ones(1))
    assert (midpoint.a, midpoint.b, midpoint.symplectic) == (((0.5,),), (1.0,), True)
    nystrom = Tableau("fractions", 3, [[], [2 * third], [Fraction(0), 2 * third]], [0.25, 0.375, Fraction(3, 8)])
    assert nystrom.b == (0.25, 0.375, 0.375)


class HalfWeight(OrthogonalDense):
    def compute_weight(self) -> Tensor:
        return 0.5 * super().compute_weight()


class Honest(OrthogonalDense):
    """Its __init__ would say otherwise."""

    rows_orthonormal = False
    columns_orthonormal = False

    def compute_weight(self) -> Tensor:
        return 0.5 * super().compute_weight()


class Rotation(Dense):
    rows_orthonormal = True

    def compute_weight(self) -> Tensor:
        return torch.linalg.matrix_exp(self.matrix - self.matrix.mT)


def test_a_weight_of_ones_own_may_be_said_to_have_orthonormal_rows() -> None:
    field, x = GradientField(Rotation(3, 3), leaky_relu(0.5)).double(), torch.randn(5, 3, dtype=torch.float64)
    assert (field.linear.rows_orthonormal, field.linear.columns_orthonormal) == (True, False)
    assert ExactFlow().why_not(field) is None
    flow, honest = ExactFlow(), Honest(2, 2)
    assert (honest.rows_orthonormal, honest.columns_orthonormal) == (False, False)
    torch.testing.assert_close(
        flow.step(field, flow.step(field, x, 0.5), 0.5), flow.step(field, x, 1.0), rtol=1e-12, atol=1e-12
    )


def test_rows_of_another_weight_are_not_taken_for_orthonormal() -> None:
    """The formulas of the flow, and of several Euler steps at once, are for orthonormal rows."""
    field, x = GradientField(HalfWeight(2, 2), leaky_relu(0.5)).double(), torch.randn(5, 2, dtype=torch.float64)
    assert not field.linear.rows_orthonormal
    assert "orthonormal" in str(ExactFlow().why_not(field))
    two, one = ExplicitEuler(2), ExplicitEuler()
    twice = one.step(field, one.step(field, x, 1.0), 1.0)
    torch.testing.assert_close(two.step(field, x, 2.0), twice, rtol=1e-14, atol=1e-14)
    assert OrthogonalDense(2, 2).rows_orthonormal


@pytest.mark.parametrize(("bias", "slope", "kept"), [(1.0, 1.0, True), (1e8, 0.0, False), (0.0, 1e9, False)])
def test_a_shear_that_rounds_a_half_away_is_not_undone(bias: float, slope: float, kept: bool) -> None:
    force = LinearField(1, bias=True)
    with torch.no_grad():
        for name, parameter in force.named_parameters():
            parameter.fill_(bias if "bias" in name else slope)
    shear, x = ShearField(force), torch.ones(1, 2)
    assert (ExactFlow().declare(shear, 1.0).properties.of(Invertible) is not None) == kept
    back = ExactFlow().inverse(shear, ExactFlow().step(shear, x, 1.0), 1.0)
    assert torch.allclose(back, x, rtol=0, atol=1e-3) == kept


class HeldForce(VectorField):
    """Of a matrix that is no parameter."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.in_shape = (entries,)
        self.register_buffer("stiffness", torch.eye(entries))

    def forward(self, x: Tensor) -> Tensor:
        return -x @ self.stiffness

    def facts(self) -> FieldFacts:
        return FieldFacts.of_spectrum(-1.0, -1.0, odd=True, reason="−I")


def test_a_shear_of_a_force_without_parameters_is_undone() -> None:
    shear = ShearField(HeldForce(2)).double()
    assert ExactFlow().declare(shear, 1.0).properties.of(Invertible) is not None


def test_an_energy_that_a_field_does_not_tell_is_not_kept() -> None:
    """Facts alone are no H that a step could be held against."""

    class Silent(VectorField):
        in_shape = (2,)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 1], -x[:, 0]], dim=1)

        def facts(self) -> FieldFacts:
            return FieldFacts(1.0, 0.0, hamiltonian=True, divergence_free=True, conserves_energy=True)

    class Telling(Silent):
        def energy(self, x: Tensor) -> Tensor:
            return 0.5 * x.square().sum(1)

    for field, told in ((Silent(), False), (Telling(), True)):
        assert any(type(kept) is EnergyPreserving for kept in flow_properties(field, 0.1)) == told
        assert any(type(kept) is Symplectic for kept in flow_properties(field, 0.1))


def test_what_is_no_method_or_no_state_of_its_field_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="method is the class HalfEuler"):
        check_integrator(HalfEuler, round_field())
    with pytest.raises(InvalidArgument, match="field is a Tanh; a VectorField is needed"):
        check_integrator("euler", nn.Tanh())
    with pytest.raises(InvalidArgument, match="tangent to spheres"):
        check_integrator("cayley", round_field())
    with pytest.raises(InvalidArgument, match=r"sample has shape \(4, 2\); states of GradientField have shape \(3,\)"):
        check_integrator("euler", round_field(), torch.zeros(4, 2))
    with pytest.raises(InvalidArgument, match=r"step_size is 0\.0"):
        check_integrator("euler", round_field(), step_size=0.0)


class Leapfrog(Integrator):
    """Kick, drift and kick: Störmer–Verlet, as a user writes it."""

    order = 2
    symmetric = True
    keeps = frozenset({Symplectic, VolumePreserving})

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        assert isinstance(field, PartitionedField)
        x = field.drift.flow(field.kick.flow(x, 0.5 * step_size), step_size)
        return field.kick.flow(x, 0.5 * step_size)

    def why_not(self, field: VectorField) -> str | None:
        if isinstance(field, PartitionedField):
            return None
        return f"{self!r} needs a PartitionedField; got {type(field).__name__}"


class KickLater(Leapfrog):
    """Drift and kick, of which the opposite step is no inverse: that of kick, drift and kick was said to be one."""

    keeps = Leapfrog.keeps

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        assert isinstance(field, PartitionedField)
        return field.kick.flow(field.drift.flow(x, step_size), step_size)


class Repeated(Leapfrog):
    """The step of the one before, with its own word for it."""

    symmetric = True

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return super().step(field, x, step_size)


class OwnInverse(Leapfrog):
    def inverse(self, field: VectorField, y: Tensor, step_size: Tensor | float) -> Tensor:
        return y


def halves() -> PartitionedField:
    field = PartitionedField.example().double()
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.5)
    return field


def test_an_explicit_symmetric_step_is_invertible_by_its_opposite() -> None:
    field, x = halves(), torch.randn(5, 4, dtype=torch.float64)
    block = DynamicalBlock(field, Leapfrog(), FreeSignal(0.3)).double()
    assert [type(kept) for kept in block.properties] == [Symplectic, VolumePreserving, Invertible]
    verlet = DynamicalBlock(field, "verlet", FreeSignal(0.3)).double()
    torch.testing.assert_close(block(x), verlet(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(block.inverse(block(x)), x, rtol=0, atol=1e-13)
    check_integrator(Leapfrog(), field).require()


def test_what_is_said_of_a_symmetric_step_is_not_of_another_nor_of_an_equation() -> None:
    field, x = halves(), torch.randn(5, 4, dtype=torch.float64)
    later = KickLater()
    assert float((later.step(field, later.step(field, x, 0.3), -0.3) - x).detach().abs().max()) > 1e-4
    with pytest.raises(InvalidArgument, match="no closed-form inverse"):
        later.inverse(field, x, 0.3)
    repeated = Repeated()
    torch.testing.assert_close(repeated.inverse(field, repeated.step(field, x, 0.3), 0.3), x, rtol=0, atol=1e-12)
    for method, invertible in ((later, False), (OwnInverse(), False), (Repeated(), True)):
        assert (method.declare(field, 0.3).properties.of(Invertible) is not None) == invertible, method
    discrete = INTEGRATORS["gonzalez"]()
    assert discrete.symmetric
    assert discrete.declare(field, 0.3).properties.of(Invertible) is None


def test_the_papers_constant_of_substeps_covers_rows_that_are_nearly_orthonormal() -> None:
    torch.manual_seed(0)
    field = GradientField(OrthogonalDense(8, 8), leaky_relu(1.0))
    block = DynamicalBlock(field, ExplicitEuler(3), FreeSignal(3.0), bound="paper").double()
    # With h/S = 1 the recursion ends at 0: the step is (I − AᵀA)x − Aᵀb, whose size is the rounding of A alone.
    weight = field.linear.weight.detach()
    left = torch.linalg.matrix_norm(torch.eye(8, dtype=weight.dtype) - weight.mT @ weight, 2)
    assert block.properties.lipschitz >= float(left)


class Onwards(ExplicitEuler):
    """Its constant is that of the step forwards, whichever way the step goes."""

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return field.euler_constant(abs(step_size), bound)


class NeverBack(HalfEuler):
    """The same of two half steps, but it goes no way back."""

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        if step_size < 0:
            raise InvalidArgument("the step is negative; NeverBack goes forwards alone.")
        return super().step(field, x, step_size)

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        constant, reason = field.euler_constant(abs(step_size) / 2, bound)
        return math.nextafter(constant * constant, math.inf), reason


def test_a_constant_that_holds_forwards_alone_is_refused_unless_the_method_refuses_to_go_back() -> None:
    """A contraction expands backwards: by 1 + |h| max σ' where AAᵀ = I."""
    x = torch.randn(4, 3, dtype=torch.float64)
    (wrong,) = told("block", Onwards(), round_field(), x)
    assert wrong.startswith("the step −h: DynamicalBlock: Lipschitz(1) VIOLATED")
    assert told("block", ExplicitEuler(), round_field(), x) == []
    assert told("block", NeverBack(), round_field(), x) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("time", "invertible"), [(1.0, True), (4.0, True), (20.0, False), (40.0, False)])
def test_a_ridge_flow_is_invertible_while_its_inverse_leaves_digits(
    dtype: torch.dtype, time: float, invertible: bool
) -> None:
    """Where units shrink by e^{−t}, Φ_t(x) is still rounded as x is, and the way back multiplies that by e^t."""
    field, x = GradientField(OrthogonalDense(8, 8), leaky_relu(0.5)).to(dtype), torch.randn(20, 8, dtype=dtype)
    flow = ExactFlow()
    assert (flow.declare(field, time).properties.of(Invertible) is not None) == invertible
    with torch.no_grad():
        back = flow.inverse(field, flow.step(field, x, time), time)
    missed = float((back - x).norm(dim=1).max())
    if invertible:
        assert missed <= 4096 * torch.finfo(dtype).eps
    elif time == 40:
        assert not missed <= 0.1


@pytest.mark.parametrize(("dtype", "invertible"), [(torch.float32, False), (torch.float64, True)])
def test_many_entries_excuse_no_lost_digits(dtype: torch.dtype, invertible: bool) -> None:
    """Of 16,384 entries the sum of roundings would allow more than float32 has digits for."""
    field = GradientField(OrthogonalConv((16, 32, 32)), leaky_relu(0.5)).to(dtype)
    assert (ExactFlow().declare(field, 12.0).properties.of(Invertible) is not None) == invertible


@pytest.mark.parametrize(("bias", "invertible"), [(500.0, True), (1000.0, False)])
def test_the_bias_of_an_image_counts_once_a_pixel(bias: float, invertible: bool) -> None:
    """G = (1 − e^{−0.8})(e^{0.8} − 1)(1 + 32b) is 10,799 or 21,597; the limit is 16 a number of 1,024."""
    field = GradientField(OrthogonalConv((1, 32, 32)), leaky_relu(0.5)).double()
    nn.init.constant_(field.bias, bias)
    assert field.is_undone(0.8) == invertible


class Hopeful(GradientField):
    """A ridge field that takes each of its flows for undone by the opposite one."""

    def is_undone(self, time: float) -> bool:
        return True


@pytest.mark.parametrize(("kind", "time"), [(GradientField, 4.0), (Hopeful, 16.0)])
def test_a_ridge_flow_that_says_it_is_invertible_too_long_is_refuted(kind: type[GradientField], time: float) -> None:
    """All units shrink alike, so that the Jacobian e^{−t}I has the condition number 1."""
    field = kind(OrthogonalDense(8, 8), leaky_relu(0.5)).double()
    x = field.linear.adjoint(0.5 + torch.rand(20, 8, dtype=torch.float64)).detach()
    assert float(field.linear(x).min()) > 0
    held = verify(DynamicalBlock(field, "exact", FreeSignal(time)), x, kinds=(Invertible,))
    assert held.passed == (kind is GradientField)


@pytest.mark.parametrize(("dtype", "invertible"), [(torch.float32, False), (torch.float64, True)])
def test_a_flow_that_leaves_the_range_of_its_number_format_has_no_inverse(dtype: torch.dtype, invertible: bool) -> None:
    """e^{−110} is no float32 but 0, and e^{110} is none."""
    field, flow, x = Damping((2,), 1.0).to(dtype), ExactFlow(), torch.ones(1, 2, dtype=dtype)
    assert (flow.declare(field, 110.0).properties.of(Invertible) is not None) == invertible
    with torch.no_grad():
        back = flow.inverse(field, flow.step(field, x, 110.0), 110.0)
    assert torch.allclose(back, x, rtol=1e-12, atol=0) == invertible


def test_a_flow_of_no_numbers_of_its_own_takes_states_of_any_format() -> None:
    field = Damping((2,), 1.0, learned=False)
    assert not list(field.parameters())
    for time, invertible in ((30.0, True), (110.0, False)):
        assert (ExactFlow().declare(field, time).properties.of(Invertible) is not None) == invertible


def even_ridge(**options: float) -> GradientField:
    return GradientField(OrthogonalDense(4, 4), leaky_relu(0.3), **options)


AT_ONCE: dict[str, tuple[Callable[[], Integrator], Callable[[], VectorField]]] = {
    "exact": (ExactFlow, lambda: GradientField(OrthogonalDense(4, 2), leaky_relu(0.3))),
    "exact, learned factors": (ExactFlow, lambda: even_ridge(alpha=1.0)),
    "exact, convolution": (ExactFlow, lambda: GradientField(OrthogonalConv((2, 3, 3)), leaky_relu(0.5))),
    "exact, preconditioned": (ExactFlow, lambda: PreconditionedField(OrthogonalDense(3, 3), "relu")),
    "exact, linear": (ExactFlow, lambda: LinearField(3, bias=True)),
    "lie-trotter": (INTEGRATORS["lie-trotter"], lambda: SumField(even_ridge(), LinearField(4))),
    "strang": (INTEGRATORS["strang"], lambda: SumField(LinearField(4), even_ridge(alpha=1.0), Damping((4,), 0.3))),
    "yoshida4": (INTEGRATORS["yoshida4"], PartitionedField.example),
    "apart": (Leapfrog, PartitionedField.example),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_step_and_its_log_determinant_at_once_are_those_apart(name: str) -> None:
    """For one step and for one a state, with their gradients, and against the dense Jacobian."""
    make_method, make_field = AT_ONCE[name]
    method, field = make_method(), make_field().double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(5, *field.in_shape, dtype=torch.float64, requires_grad=True)
    leaves = [x, *field.parameters()]
    for step_size in (0.3, torch.linspace(-0.3, 0.5, 5, dtype=torch.float64)[:, None]):
        together = method.with_log_determinant(field, x, step_size)
        apart = method.step(field, x, step_size), method.log_determinant(field, x, step_size)
        torch.testing.assert_close(together, apart, rtol=1e-14, atol=1e-14)
        slopes = [torch.autograd.grad(a.sum() + b.sum(), leaves, allow_unused=True) for a, b in (together, apart)]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)
    _, volume = method.with_log_determinant(field, x, 0.3)
    _, expected = torch.linalg.slogdet(jacobians(lambda state: method.step(field, state, 0.3), x.detach()))
    torch.testing.assert_close(volume.detach(), expected, rtol=0, atol=1e-11)


class Twice(Integrator):
    """Before another method among the bases: a step without a word on how it is undone and what it does to volume."""

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return 2 * super().step(field, x, step_size)


class DoubledSplitting(Twice, Splitting):
    def log_determinant(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return super().log_determinant(field, x, step_size) + math.log(2) * x[0].numel()


class DenserSplitting(Splitting):
    def log_determinant(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return super().log_determinant(field, x, step_size) + 1


class DoubledFlow(Twice, ExactFlow):
    def log_determinant(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return super().log_determinant(field, x, step_size) + math.log(2) * x[0].numel()


class DenserFlow(ExactFlow):
    def log_determinant(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return super().log_determinant(field, x, step_size) + 1


class AtRest(Integrator):
    """Both at once, by code that no subclass shares."""

    order = 0

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return x

    def with_log_determinant(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))


class Denser(AtRest):
    def log_determinant(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return x.new_ones(len(x))


class DoubledRidge(GradientField):
    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return 2 * super().flow(x, time)

    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow_log_determinant(x, time)


class DenserRidge(GradientField):
    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow_log_determinant(x, time) + 1


class DoubledChange(GradientField):
    def ridge_step(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return super().ridge_step(x, lambda u: 2 * change(u))

    def why_no_flow(self) -> None:
        return None


class SilentSplitting(Twice, Splitting):
    pass


class SilentFlow(Twice, ExactFlow):
    pass


class SpeakingFlow(SilentFlow):
    """Half of the step backwards in time undoes it."""

    def inverse(self, field: VectorField, y: Tensor, step_size: Tensor | float) -> Tensor:
        return ExactFlow().step(field, y / 2, -step_size)


class StillSilent(SilentFlow):
    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        return super().declare(field, step_size, bound)


SILENT = [SilentSplitting("verlet", 2, (1.0,)), SilentFlow(), StillSilent()]


@pytest.mark.parametrize("method", SILENT, ids=lambda method: type(method).__name__)
def test_a_step_of_ones_own_has_neither_the_inverse_nor_the_volume_of_the_one_it_replaces(method: Integrator) -> None:
    field, x = PartitionedField.example().double(), torch.randn(3, 4, dtype=torch.float64)
    field = field if isinstance(method, Splitting) else even_ridge().double()
    for ask in (method.log_determinant, method.with_log_determinant, method.inverse):
        with pytest.raises(InvalidArgument, match="no closed-form"):
            ask(field, x, 0.3)
    assert [*method.declare(field, 0.3).properties] == []


class Saying(Integrator):
    """An instance that says what its step keeps."""

    order = 1

    def __init__(self) -> None:
        self.keeps = frozenset({Symplectic})

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return INTEGRATORS["verlet"]().step(field, x, step_size)


class Shrunk(Saying):
    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return 0.9 * super().step(field, x, step_size)


class StillShrunk(Shrunk):
    pass


def test_what_an_instance_says_of_its_step_is_not_said_of_another() -> None:
    field = PartitionedField.example().double()
    assert Saying().declare(field, 0.1).properties.of(Symplectic) is not None
    for silent in (Shrunk(), StillShrunk()):
        assert [*silent.declare(field, 0.1).properties] == []


@pytest.mark.parametrize(
    ("order", "weights", "sentence"),
    [
        (2, (1.0, 1.0), "sum up to 2; a step of size h needs the sum 1"),
        (1, (), "sum up to 0"),
        (2, (math.nan,), "a tuple of finite numbers is needed"),
        (2, ("a",), "a tuple of finite numbers is needed"),
        (2, 1.0, "a tuple of finite numbers is needed"),
        (4, (0.5, 0.5), r"do not have order 4: above 2 Σγ³ must be 0 \(it is 0.25\)"),
        (4, (*YOSHIDA4[:2], YOSHIDA4[2] + 1e-6), "sum up to"),
        (0, (1.0,), "order is 0"),
        (2, None, "order is 2"),
    ],
)
def test_weights_of_a_splitting_that_step_by_another_time_or_have_a_lower_order_are_refused(
    order: int, weights: object, sentence: str
) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        Splitting("own", order, weights)


def test_weights_of_order_three_need_not_be_the_same_read_backwards() -> None:
    """γ₁ = 3/2, and the other two the roots of z² + z/2 − 13/6, so that Σγ = 1 and Σγ³ = 0."""
    root = math.sqrt(1 / 16 + 13 / 6)
    method = Splitting("own", 3, (1.5, root - 0.25, -root - 0.25))
    assert not method.symmetric
    x = 0.3 * torch.randn(4, 4, dtype=torch.float64)
    measured = measured_order(method, halves(), x, 0.5, counts=(8, 16, 32, 64))
    assert measured == pytest.approx(3, rel=0, abs=0.3)


def test_substeps_of_ones_own_have_their_order() -> None:
    class Own(Splitting):
        def substeps(self, field: VectorField) -> list[tuple[VectorField, float]]:
            return INTEGRATORS["yoshida4"]().substeps(field)

    assert Own("own", 4, None).order == 4


def test_a_composition_of_ones_own_has_its_order() -> None:
    thirds = Splitting("thirds", 2, [Fraction(1, 3)] * 3)
    assert (thirds.weights, thirds.symmetric) == ((1 / 3,) * 3, True)
    assert measured_order(thirds, halves(), torch.randn(4, 4, dtype=torch.float64)) == pytest.approx(2, rel=0, abs=0.15)


def test_a_step_of_ones_own_is_undone_by_an_inverse_of_ones_own() -> None:
    method, field, x = SpeakingFlow(), even_ridge().double(), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(method.inverse(field, method.step(field, x, 0.3), 0.3), x, rtol=1e-12, atol=1e-12)


def with_method(owner: object, name: str, method: Callable[..., Tensor]) -> object:
    """Set on the instance ``owner``, or on one of its parts for a name with a dot."""
    *path, last = name.split(".")
    part = owner
    for step in path:
        part = getattr(part, step)
    setattr(part, last, method)
    return owner


def verlet() -> Splitting:
    return INTEGRATORS["verlet"]()


OWN_CODE: dict[str, tuple[Callable[[], Integrator], Callable[[], VectorField]]] = {
    "step of a splitting": (lambda: DoubledSplitting("verlet", 2, (1.0,)), PartitionedField.example),
    "log-determinant of a splitting": (lambda: DenserSplitting("verlet", 2, (1.0,)), PartitionedField.example),
    "step of one splitting": (lambda: with_method(verlet(), "step", lambda *given: 2 * given[1]), halves),
    "log-determinant of one": (lambda: with_method(verlet(), "log_determinant", lambda *given: given[1][:, 0]), halves),
    "step of its flows": (lambda: with_method(verlet(), "_exact.step", lambda *given: 2 * given[1]), halves),
    "step of a flow": (DoubledFlow, even_ridge),
    "log-determinant of a flow": (DenserFlow, even_ridge),
    "log-determinant beside both at once": (Denser, even_ridge),
    "flow of a field": (ExactFlow, lambda: DoubledRidge(OrthogonalDense(4, 4), "relu")),
    "log-determinant of a field": (ExactFlow, lambda: DenserRidge(OrthogonalDense(4, 4), "relu")),
    "what a flow is made of": (ExactFlow, lambda: DoubledChange(OrthogonalDense(4, 4), "relu")),
    "flow of one field": (ExactFlow, lambda: with_method(even_ridge(), "flow", lambda x, time: 3 * x)),
    "of a term": (INTEGRATORS["strang"], lambda: SumField(LinearField(4), DenserRidge(OrthogonalDense(4, 4), "relu"))),
}


@pytest.mark.parametrize("name", OWN_CODE)
def test_methods_of_ones_own_are_taken_for_a_step_with_its_log_determinant(name: str) -> None:
    make_method, make_field = OWN_CODE[name]
    method, field = make_method(), make_field().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        apart = method.step(field, x, 0.7), method.log_determinant(field, x, 0.7)
        torch.testing.assert_close(method.with_log_determinant(field, x, 0.7), apart, rtol=1e-14, atol=1e-14)
