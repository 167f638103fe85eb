"""Implicit steps: the solver, its derivatives, orders, symplecticity, constants and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynablocks import integrators
from dynablocks.blocks import DynamicalBlock
from dynablocks.ensembles import ensemble_forward, stacked_parameters
from dynablocks.errors import InvalidArgument, NotConverged
from dynablocks.experiments.orders import suited_problem
from dynablocks.fields import FieldFacts, GradientField, LinearField, PartitionedField, VectorField, leaky_relu
from dynablocks.fields.hamiltonian import NeuralHamiltonian
from dynablocks.fields.sphere import RotationField
from dynablocks.integrators import measured_order, over_states
from dynablocks.integrators.base import INTEGRATORS, ImplicitIntegrator
from dynablocks.integrators.implicit import (
    GAUSS4,
    IMPLICIT_EULER,
    IMPLICIT_MIDPOINT,
    ImplicitRungeKutta,
    ImplicitTableau,
    Trapezoidal,
)
from dynablocks.integrators.solver import solve
from dynablocks.linear import Dense, OrthogonalConv, OrthogonalDense
from dynablocks.properties import (
    Declaration,
    Invertible,
    LinearInvariant,
    NormPreserving,
    Symplectic,
    VolumePreserving,
    verify,
)
from dynablocks.properties.jacobians import jacobians
from dynablocks.switching import FreeSignal, LearnedStep
from dynablocks.testing import check_block

NAMES = ("implicit-euler", "implicit-midpoint", "trapezoidal", "gauss4")
EVERY_METHOD = pytest.mark.parametrize("name", NAMES)
FORM = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)


class Pendulum(VectorField):
    """q̇ = p, ṗ = −ω² sin q."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (2,)
        self.omega = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 1], -self.omega.square() * torch.sin(x[:, 0])], dim=1)

    def energy(self, x: Tensor) -> Tensor:
        return 0.5 * x[:, 1].square() - self.omega.square() * torch.cos(x[:, 0])

    def facts(self) -> FieldFacts:
        size = max(1.0, float(self.omega.detach()) ** 2)
        return FieldFacts(size, (1 + size) / 2, odd=True, divergence_free=True, hamiltonian=True, conserves_energy=True)


class Rotation(VectorField):
    """ẋ = a × x with |a| growing with |x|: norms and aᵀx stay."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)
        self.axis = torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (1 + x.square().sum(1, keepdim=True)) * torch.linalg.cross(self.axis.expand_as(x).to(x), x)

    def facts(self) -> FieldFacts:
        return FieldFacts(
            odd=True, divergence_free=True, tangent=True, linear_invariants=((0.5, -1.0, 0.25),), reason="rotation"
        )


class Hostile(VectorField):
    """ẋ = 1 + x²: at x = 1 implicit Euler with h = 1 has no real solution."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.in_shape, self.value = (1,), value

    def forward(self, x: Tensor) -> Tensor:
        return self.value + x.square()

    def facts(self) -> FieldFacts:
        return FieldFacts()


def smooth_field(seed: int = 0) -> GradientField:
    torch.manual_seed(seed)
    field = GradientField(Dense(3, 4), "tanh").double()
    with torch.no_grad():
        field.linear.matrix.copy_(torch.randn(4, 3))
        field.bias.normal_()
    return field


@EVERY_METHOD
@pytest.mark.parametrize("make", [smooth_field, Pendulum])
def test_the_order_is_the_slope_of_the_error(name: str, make) -> None:
    method, field = INTEGRATORS[name](), make()
    x = torch.tensor([[0.5, -1.0, 0.3], [1.0, 0.2, -0.7]], dtype=torch.float64)[:, : field.in_shape[0]]
    assert measured_order(method, field, x, counts=(8, 16, 32)) == pytest.approx(method.order, abs=0.15)


@pytest.mark.parametrize("name", ["implicit-midpoint", "gauss4"])
@pytest.mark.parametrize("h", [0.1, -0.7])
def test_steps_are_symplectic_and_traps_are_not(name: str, h: float) -> None:
    x = 2 * torch.randn(6, 2, dtype=torch.float64)
    residual = {}
    for tried in (name, "trapezoidal", "rk4"):
        block = DynamicalBlock(Pendulum(), tried, FreeSignal(h)).double()
        dense = jacobians(block, x)
        residual[tried] = float((dense.mT @ FORM @ dense - FORM).abs().max())
        assert (block.properties.of(Symplectic) is not None) == (tried == name)
    assert residual[name] <= 1e-12
    assert min(residual["trapezoidal"], residual["rk4"]) > 1e-9
    kept = INTEGRATORS[name]().declare(Pendulum(), h).properties
    assert kept.of(VolumePreserving) is not None
    assert kept.of(Invertible) is not None


def test_the_derivative_of_implicit_midpoint_is_a_cayley_transform() -> None:
    field, h, x = Pendulum(), 0.8, torch.randn(5, 2, dtype=torch.float64)
    method = INTEGRATORS["implicit-midpoint"]()
    y = method.step(field, x, h).detach()
    inner = 0.5 * h * jacobians(field, (x + y) / 2)
    eye = torch.eye(2, dtype=torch.float64)
    cayley = torch.linalg.solve(eye - inner, eye + inner)
    one = torch.func.vmap(torch.func.jacrev(lambda v: method.step(field, v[None], h)[0]))(x)
    block = jacobians(DynamicalBlock(field, method, FreeSignal(h)).double(), x)
    assert torch.allclose(one, cayley, rtol=0, atol=1e-13)
    assert torch.allclose(block, cayley, rtol=0, atol=1e-7)
    stacked = torch.func.vmap(lambda v, t: method.step(field, v[None], t)[0])(x, torch.full((5,), h, dtype=x.dtype))
    assert torch.allclose(stacked, y, rtol=0, atol=1e-14)


@EVERY_METHOD
def test_a_symmetric_step_is_undone_by_the_opposite_step(name: str) -> None:
    method, field = INTEGRATORS[name](), smooth_field()
    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        y = method.step(field, x, 0.3)
        if not method.symmetric:
            with pytest.raises(InvalidArgument, match="no closed-form inverse"):
                method.inverse(field, y, 0.3)
            return
        assert torch.allclose(method.inverse(field, y, 0.3), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(INTEGRATORS))
def test_exactly_the_methods_that_say_symmetric_are_undone_by_the_opposite_step(name: str) -> None:
    method, field = INTEGRATORS[name](), suited_problem(name)
    if field is None:
        # None of the problems has an exact flow.
        field = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)).double()
        method.require(field)
    x = torch.randn(4, *field.in_shape, dtype=torch.float64).abs()
    with torch.no_grad():
        again = method.step(field, method.step(field, x, 0.3), -0.3)
    assert torch.allclose(again, x, rtol=0, atol=1e-10) == method.symmetric


def unrolled(residual, start: Tensor, iterations: int) -> Tensor:
    z = start
    for _ in range(iterations):
        z = z - residual(z)
    return z


@pytest.mark.parametrize("solver", ["newton", "fixed-point"])
def test_gradients_equal_those_of_unrolled_iterations(solver: str) -> None:
    field, probe = smooth_field(), torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)

    def residual(z: Tensor, x: Tensor, h: Tensor) -> Tensor:
        return z - x - h * field((x + z) / 2)

    sources = [x, h, *field.parameters()]
    implicit = solve(residual, x, x, h, method=solver)
    plain = unrolled(lambda z: residual(z, x, h), x, 60)
    assert torch.allclose(implicit, plain, rtol=0, atol=1e-12)
    given = torch.autograd.grad((probe * implicit).sum(), sources)
    expected = torch.autograd.grad((probe * plain).sum(), sources)
    for one, other in zip(given, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-8 * max(1.0, float(other.abs().max()))


@EVERY_METHOD
def test_gradients_equal_central_differences(name: str) -> None:
    method, field = INTEGRATORS[name](), Pendulum()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, h, _: method.step(field, x, h), (x, h, field.omega), atol=1e-6)


def test_many_unknowns_are_solved_without_jacobians() -> None:
    torch.manual_seed(0)
    field = GradientField(OrthogonalConv((3, 7, 7)), leaky_relu(0.3)).double()
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    block = DynamicalBlock(field, "implicit-midpoint", FreeSignal(0.4)).double()
    middle = unrolled(lambda z: z - x - h / 2 * field(z), x, 60)
    y = block.method.step(field, x, h)
    assert torch.allclose(y, 2 * middle - x, rtol=0, atol=1e-12)
    probe, sources = torch.randn_like(x), [x, h, *field.parameters()]
    given = torch.autograd.grad((probe * y).sum(), sources)
    expected = torch.autograd.grad((probe * (2 * middle - x)).sum(), sources)
    for one, other in zip(given, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-8 * max(1.0, float(other.abs().max()))
    dense = jacobians(block, x.detach()[:1])
    assert float(torch.linalg.matrix_norm(dense, ord=2).max()) <= block.properties.lipschitz * (1 + 1e-12)


def test_nothing_to_differentiate_gives_no_graph() -> None:
    field, x = Pendulum().requires_grad_(False), torch.randn(2, 2, dtype=torch.float64)
    method = INTEGRATORS["implicit-midpoint"]()
    y = method.step(field, x, 0.1)
    assert not y.requires_grad
    (gradient,) = torch.autograd.grad(method.step(field.requires_grad_(), x, 0.1).sum(), field.omega)
    assert bool(torch.isfinite(gradient))


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    y = INTEGRATORS["implicit-midpoint"]().step(Pendulum(), x, 0.1)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(first.sum(), x)


def test_invariants_of_a_rotation() -> None:
    field, x = Rotation(), torch.randn(6, 3, dtype=torch.float64)
    for name, keeps in (("implicit-midpoint", True), ("gauss4", True), ("implicit-euler", False)):
        method = INTEGRATORS[name]()
        declared = method.declare(field, 0.4).properties
        assert (declared.of(NormPreserving) is not None) == keeps
        assert declared.of(LinearInvariant) is not None
        with torch.no_grad():
            y = method.step(field, x, 0.4)
        assert torch.allclose(y @ field.axis, x @ field.axis, rtol=0, atol=1e-13)
        assert bool(((y.norm(dim=1) - x.norm(dim=1)).abs() <= 1e-12).all()) == keeps
        verify(DynamicalBlock(field, name, FreeSignal(0.4)), x, search_steps=2).require()


@EVERY_METHOD
def test_declared_constants_hold(name: str) -> None:
    method = INTEGRATORS[name]()
    contracting = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)).double()
    expanding = GradientField(OrthogonalDense(4, 3), "tanh", expansive=True).double()
    for field, h in ((contracting, 0.5), (contracting, 40.0), (contracting, -0.4), (expanding, 0.7), (expanding, -9.0)):
        x = 2 * torch.randn(60, *field.in_shape, dtype=torch.float64)
        dense = jacobians(lambda v, h=h, f=field: method.step(f, v, h), x)
        largest = float(torch.linalg.matrix_norm(dense, ord=2).max())
        assert largest <= method.declare(field, h).properties.lipschitz * (1 + 1e-12)
    bounded = method.declare(contracting, 40.0).properties.lipschitz
    assert bounded <= 1.0 if name != "trapezoidal" else bounded < math.inf
    assert method.declare(contracting, 0.0).properties.lipschitz <= 1 + 1e-12


@pytest.mark.parametrize(
    ("name", "constant"),
    [("implicit-euler", 2 / 3), ("implicit-midpoint", 0.6), ("trapezoidal", 0.6), ("gauss4", 1.0)],
)
def test_the_constant_of_a_contraction_is_the_gain_of_its_slowest_mode(name: str, constant: float) -> None:
    """|R(−1/2)| for one stage and the trapezoidal rule; of two stages B-stability alone is known."""
    field = LinearField(2).double()
    with torch.no_grad():
        field.matrix.copy_(torch.diag(torch.tensor([-2.0, -0.5])))
    declared, _ = INTEGRATORS[name]().step_constant(field, 1.0)
    assert declared == pytest.approx(constant, rel=1e-12, abs=0)


@EVERY_METHOD
def test_a_step_without_growth_declares_1_and_no_rounding(name: str) -> None:
    """The spectrum is [−c, 0], whose end 0 has the gain 1."""
    method, field = INTEGRATORS[name](), GradientField(Dense(3, 2), "tanh").double()
    assert field.facts().spectrum[1] == 0.0
    for h in (1e-9, 0.1):
        assert method.declare(field, h).properties.lipschitz == 1.0
    assert method.step_constant(field, 0.0)[0] == 1.0
    assert method.declare(field, -0.1).properties.lipschitz > 1.0


def test_a_turn_is_not_expanded_by_rounding() -> None:
    class Turn(VectorField):
        in_shape = (2,)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 1], -x[:, 0]], dim=1)

        def facts(self) -> FieldFacts:
            return FieldFacts(1.0, 0.0, reason="a turn")

    for name in ("implicit-euler", "implicit-midpoint", "gauss4"):
        assert INTEGRATORS[name]().step_constant(Turn(), 0.5)[0] == 1.0


def test_the_tolerance_of_an_inverse_is_that_of_the_tableaus_own_weights() -> None:
    """Three midpoint steps in a row (Yoshida): d = (2, −2, 2)."""
    outer = 1 / (2 - 2 ** (1 / 3))
    steps = (outer, 1 - 2 * outer, outer)
    a = tuple(tuple(steps[j] if j < i else steps[i] / 2 if j == i else 0.0 for j in range(3)) for i in range(3))
    tableau = ImplicitTableau("yoshida-midpoint", 4, a, steps)
    assert sum(map(abs, tableau.stage_weights)) == pytest.approx(6, rel=1e-12)
    field = LinearField(2).double()
    with torch.no_grad():
        field.matrix.copy_(torch.diag(torch.tensor([-0.1, 0.1])))
    for method, stated in ((ImplicitRungeKutta(tableau), 12), (INTEGRATORS["gauss4"](), 8)):
        declared = method.declare(field, 0.1).properties.of(Invertible)
        assert declared.tolerance == pytest.approx(stated * method.tolerance, rel=1e-12)


def test_tableaux_know_what_they_are() -> None:
    assert [t.symplectic for t in (IMPLICIT_EULER, IMPLICIT_MIDPOINT, GAUSS4)] == [False, True, True]
    assert [t.b_stable for t in (IMPLICIT_EULER, IMPLICIT_MIDPOINT, GAUSS4)] == [True, True, True]
    assert [t.symmetric for t in (IMPLICIT_EULER, IMPLICIT_MIDPOINT, GAUSS4)] == [False, True, True]
    assert GAUSS4.stage_weights == pytest.approx((-math.sqrt(3), math.sqrt(3)))
    for a, b, sentence in (
        (((1.0,),), (0.5,), "Σ bᵢ is 0.5"),
        (((1.0, 0.0),), (1.0,), "must be 1 × 1"),
        (((0.0, 0.0), (0.5, 0.5)), (0.5, 0.5), "singular"),
    ):
        with pytest.raises(InvalidArgument, match=sentence):
            ImplicitTableau("x", 1, a, b)


def test_no_solution_is_an_error_and_nothing_is_returned() -> None:
    good, bad = torch.tensor([[-5.0]]).double(), torch.tensor([[1.0]]).double()
    method = INTEGRATORS["implicit-euler"]()
    with torch.no_grad():
        assert torch.isfinite(method.step(Hostile(), good, 0.1)).all()
        with pytest.raises(NotConverged, match=r"1 of 2 samples.*smaller step or an explicit method"):
            method.step(Hostile(), torch.cat([good, bad]), 1.0)
        with pytest.raises(NotConverged):
            method.step(Hostile(math.nan), good, 0.1)
        with pytest.raises(NotConverged):
            method.step(Hostile(), torch.full_like(good, math.nan), 0.1)
        wide = torch.ones(2, 200, dtype=torch.float64)
        with pytest.raises(NotConverged, match="2 of 2 samples"):
            solve(lambda z: z - 1 - z.square(), wide)
    assert issubclass(NotConverged, ArithmeticError)


class OwnImplicitEuler(ImplicitIntegrator):
    """Implicit Euler, as a user writes a method."""

    order = 1

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return self.solve(lambda z, x, h: z - x - h * field(z), x, x, over_states(step_size, x))


def test_an_implicit_method_of_ones_own_is_its_equation() -> None:
    field, x = smooth_field(), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        known = INTEGRATORS["implicit-euler"]().step(field, x, 0.3)
        assert torch.allclose(OwnImplicitEuler().step(field, x, 0.3), known, rtol=0, atol=1e-12)
        with pytest.raises(NotConverged, match=r"the step of OwnImplicitEuler\(\) is not solved for 1 of 1 samples"):
            OwnImplicitEuler().step(Hostile(), torch.ones(1, 1, dtype=torch.float64), 1.0)
    assert not OwnImplicitEuler().explicit


@pytest.mark.parametrize("column", [False, True])
def test_an_implicit_method_of_ones_own_takes_a_step_a_state(column: bool) -> None:
    field, x = smooth_field(), torch.randn(3, 3, dtype=torch.float64)
    h = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    with torch.no_grad():
        together = OwnImplicitEuler().step(field, x, h[:, None] if column else h)
        alone = [OwnImplicitEuler().step(field, part[None], float(step)) for part, step in zip(x, h, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


def assert_stacked_as_alone(blocks: list[DynamicalBlock], x: Tensor, slack: float) -> None:
    """Blocks whose parameters are stacked under vmap have the values, and up to ``slack`` the gradients, of each."""
    stacked = stacked_parameters(blocks)
    outputs = ensemble_forward(blocks[0], stacked, x)
    gradients = torch.autograd.grad(outputs.square().sum(), list(stacked.values()))
    for run, block in enumerate(blocks):
        alone = block(x)
        torch.testing.assert_close(outputs[run], alone, rtol=0, atol=1e-12)
        expected = torch.autograd.grad(alone.square().sum(), list(block.parameters()))
        for one, other in zip(gradients, expected, strict=True):
            assert float((one[run] - other).abs().max()) <= slack * max(1.0, float(other.abs().max()))
    assert not torch.allclose(outputs[0], outputs[1])


@EVERY_METHOD
def test_steps_take_stacked_parameters(name: str) -> None:
    blocks = [DynamicalBlock(smooth_field(seed), name, LearnedStep(0.1 * (seed + 1))).double() for seed in range(3)]
    assert_stacked_as_alone(blocks, torch.randn(4, 3, dtype=torch.float64), 1e-9)


@EVERY_METHOD
def test_gradients_of_function_transforms_equal_those_of_autograd(name: str) -> None:
    block, x = DynamicalBlock(smooth_field(), name, FreeSignal(0.3)).double(), torch.randn(4, 3, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(block, parameters, (x,)).square().sum()

    parameters = dict(block.named_parameters())
    given = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(block(x).square().sum(), list(parameters.values()))
    for one, other in zip(given.values(), expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-9 * max(1.0, float(other.abs().max()))


def test_runs_without_a_solution_are_counted_with_all_others() -> None:
    start, a = torch.zeros(3, 1, dtype=torch.float64), torch.tensor([0.1, 2.0], dtype=torch.float64)
    solved = torch.func.vmap(lambda a: solve(lambda z: z - a - z.square(), start))
    with torch.no_grad():
        smaller_root = (1 - (1 - 4 * a[:1]).sqrt()) / 2
        torch.testing.assert_close(solved(a[:1]), smaller_root.expand(1, 3, 1), rtol=1e-12, atol=0)
        with pytest.raises(NotConverged, match="3 of 6 samples"):
            solved(a)


def test_without_jacobians_stacked_equations_have_values_alone() -> None:
    a = torch.randn(3, 2, 130, dtype=torch.float64)

    def root(a: Tensor) -> Tensor:
        return solve(lambda z, a: z - 0.5 * torch.tanh(z) - a, a, a)

    with torch.no_grad():
        alone = torch.stack([root(part) for part in a])
        torch.testing.assert_close(torch.func.vmap(root)(a), alone, rtol=0, atol=1e-11)
    with pytest.raises(InvalidArgument, match="one run after the other"):
        torch.func.vmap(root)(a)


def test_damping_finds_the_root_where_plain_newton_diverges() -> None:
    start = torch.tensor([[3.0], [0.1], [-20.0]], dtype=torch.float64)
    assert torch.allclose(solve(torch.atan, start), torch.zeros_like(start), rtol=0, atol=1e-12)


def test_each_sample_is_solved_alone_and_in_single_precision() -> None:
    method, field = INTEGRATORS["gauss4"](), smooth_field()
    x = torch.randn(6, 3, dtype=torch.float64) * torch.logspace(-6, 3, 6, dtype=torch.float64)[:, None]
    with torch.no_grad():
        y = method.step(field, x, 0.5)
        alone = torch.cat([method.step(field, row[None], 0.5) for row in x])
        assert torch.allclose(y, alone, rtol=1e-14, atol=1e-14)
        single = method.step(field.float(), x.float(), 0.5)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), y, rtol=1e-5, atol=1e-5)
    assert method.step(field, x[:0].float(), 0.5).shape == (0, 3)


@pytest.mark.slow
@EVERY_METHOD
def test_blocks_conform(name: str) -> None:
    torch.manual_seed(0)
    for field in (PartitionedField.example(), GradientField(Dense(3, 4), "tanh")):
        check_block(DynamicalBlock(field, name, FreeSignal(0.1))).require()  # hostile refusals are excused inside


def test_trapezoidal_is_conjugate_to_midpoint() -> None:
    field, h, x = Pendulum(), 0.3, torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        first = x + h / 2 * field(x)
        midpoint = INTEGRATORS["implicit-midpoint"]().step(field, first, h)
        y = Trapezoidal().step(field, x, h)
        assert torch.allclose(y + h / 2 * field(y), midpoint, rtol=0, atol=1e-13)


def test_a_tableau_with_a_pole_inside_the_spectrum_has_no_constant() -> None:
    field = LinearField(3).double()
    with torch.no_grad():
        field.matrix.copy_(torch.diag(torch.tensor([-2.0, -0.9, 0.1])))
    method = ImplicitRungeKutta(ImplicitTableau("t", 1, ((-1.0,),), (1.0,)))
    bound = method.declare(field, 1.0).properties.lipschitz
    assert bound >= 8.0


@pytest.mark.parametrize(
    ("tableau", "entries", "exact"),
    [(IMPLICIT_MIDPOINT, 64, True), (IMPLICIT_MIDPOINT, 130, False), (GAUSS4, 64, True), (GAUSS4, 66, False)],
)
def test_beyond_the_dense_limit_the_form_is_kept_to_the_tolerance_of_the_adjoint(
    tableau: ImplicitTableau, entries: int, exact: bool
) -> None:
    """The unknowns are those of all stages."""
    method = ImplicitRungeKutta(tableau, tolerance=1e-12)
    declared = method.declare(NeuralHamiltonian(entries), 0.1).properties
    kept = {type(p): p.tolerance for p in declared if isinstance(p, (Symplectic, VolumePreserving))}
    assert kept
    assert all((tolerance == 0) == exact for tolerance in kept.values())


@pytest.mark.parametrize("method", ["implicit-euler", "implicit-midpoint", "gauss4", "gonzalez"])
def test_equations_are_solved_in_full_precision_under_autocast(method: str) -> None:
    torch.manual_seed(0)
    block = DynamicalBlock(GradientField(OrthogonalDense(32, 32), "tanh"), method, FreeSignal(0.5))
    behind, x = nn.Sequential(nn.Linear(32, 32), block), torch.randn(8, 32)
    for network, tolerance in ((block, 1e-4), (behind, 0.05)):
        found = []
        for enabled in (False, True):
            point = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = network(point)
            y.square().sum().backward()
            found.append((y.detach(), point.grad))
        for plain, mixed in zip(*found, strict=True):
            assert mixed.dtype == torch.float32
            torch.testing.assert_close(mixed, plain, rtol=tolerance, atol=tolerance)


class Saddle(VectorField):
    """ẋ = (x, y, −2z): of no divergence, and of no symplectic form in three dimensions."""

    in_shape = (3,)

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_tensor([1.0, 1.0, -2.0])

    def facts(self) -> FieldFacts:
        return FieldFacts(2.0, 1.0, divergence_free=True)


@pytest.mark.parametrize(("name", "volume"), [("implicit-midpoint", 25 / 27), ("gauss4", 26047 / 26011)])
def test_volume_is_kept_through_the_symplectic_form_alone(name: str, volume: float) -> None:
    """det DΨ = R(1/2)² R(−1), with R(1/2) = 5/3, R(−1) = 1/3 of the midpoint rule and 61/37, 7/19 of Gauss."""
    field, method, x = Saddle(), INTEGRATORS[name](), torch.randn(2, 3, dtype=torch.float64)
    volumes = torch.linalg.det(jacobians(lambda v: method.step(field, v, 0.5), x))
    torch.testing.assert_close(volumes, torch.full_like(volumes, volume), rtol=1e-6, atol=0)
    assert method.declare(field, 0.5).properties.of(VolumePreserving) is None
    with pytest.raises(InvalidArgument, match="no closed-form log-determinant"):
        method.log_determinant(field, x, 0.5)


@pytest.mark.parametrize(
    ("name", "reach"), [("implicit-midpoint", 0.5), ("gauss4", 0.5 + math.sqrt(3) / 6), ("trapezoidal", 0.5)]
)
def test_a_step_is_invertible_where_its_stages_are_unique(name: str, reach: float) -> None:
    """|h| L max Σ|aᵢⱼ| < 1, for steps of either sign."""
    field, method = smooth_field(), INTEGRATORS[name]()
    longest = 1 / (reach * field.facts().lipschitz)
    for share, invertible in ((0.99, True), (-0.99, True), (1.01, False), (-1.01, False)):
        assert (method.declare(field, share * longest).properties.of(Invertible) is not None) == invertible


class Stiff(VectorField):
    """Rates −1 and −100, of which the one-sided constant tells the slower alone."""

    in_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_tensor([-1.0, -100.0])

    def facts(self) -> FieldFacts:
        return FieldFacts(100.0, -1.0)


def test_a_theta_method_counts_the_stiffest_modes() -> None:
    """R(−10) = −3/7, R(−1000) = −399/601, R(−∞) = −2/3."""
    method = ImplicitRungeKutta(ImplicitTableau("theta", 1, ((0.6,),), (1.0,)))
    assert 399 / 601 <= method.step_constant(Stiff(), 10.0)[0] <= 2 / 3 + 1e-12


EXPORTED = {
    "implicit-euler": lambda: integrators.ImplicitRungeKutta(integrators.IMPLICIT_EULER, tolerance=1e-12),
    "implicit-midpoint": lambda: integrators.ImplicitRungeKutta(integrators.IMPLICIT_MIDPOINT, tolerance=1e-12),
    "gauss4": lambda: integrators.ImplicitRungeKutta(integrators.GAUSS4, tolerance=1e-12),
    "lie-euler": lambda: integrators.LieMethod(integrators.LieScheme("lie-euler", "exp", midpoint=False)),
    "cayley-midpoint": lambda: integrators.LieMethod(integrators.LieScheme("cayley-midpoint", "cayley", midpoint=True)),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_methods_are_made_of_exported_names(name: str) -> None:
    assert {"GAUSS4", "IMPLICIT_EULER", "IMPLICIT_MIDPOINT", "LieScheme"} <= set(integrators.__all__)
    method, registered = EXPORTED[name](), INTEGRATORS[name]()
    assert (method.name, method.order) == (registered.name, registered.order)
    field, x = RotationField(3, 5).double(), torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(method.step(field, x, 0.3), registered.step(field, x, 0.3), rtol=0, atol=1e-10)


class Quick(ImplicitRungeKutta):
    """Two fixed-point steps in place of the solution."""

    def solve(self, residual, start: Tensor, *inputs: Tensor | float, rounding=None) -> Tensor:
        z = start
        for _ in range(2):
            z = z - residual(z, *inputs)
        return z


class Counting(ImplicitRungeKutta):
    """The solution, as it is said, and how often it was asked for."""

    asked = 0

    def solve(self, *given, **options) -> Tensor:
        self.asked += 1
        return super().solve(*given, **options)

    def declare(self, field: VectorField, step_size: float, bound: str = "tight") -> Declaration:
        return super().declare(field, step_size, bound)


def test_what_a_method_says_is_not_of_another_solver() -> None:
    """At 0, where DX = −I, the second of two steps z ← x + hX(z) has the slope 1 − h(1 − h) = 91 for h = 10."""
    field, x = GradientField(OrthogonalDense(3, 3), "tanh"), torch.zeros(1, 3, dtype=torch.float64)
    twin = DynamicalBlock(field, Quick(IMPLICIT_EULER), FreeSignal(10.0)).double()
    assert float(torch.linalg.matrix_norm(jacobians(twin, x), ord=2)) == pytest.approx(91, rel=1e-9)
    assert [*twin.properties] == []
    honest = DynamicalBlock(field, Counting(IMPLICIT_EULER), FreeSignal(10.0)).double()
    honest(x)
    assert honest.method.asked == 1
    assert honest.properties.lipschitz <= 1
    method = ImplicitRungeKutta(IMPLICIT_EULER)
    method.solve = Quick(IMPLICIT_EULER).solve
    for declared in (method.declare(field, 10.0), DynamicalBlock(field, method, FreeSignal(10.0)).declare()):
        assert [*declared.properties] == []
    assert "a solve of this instance" in method.declare(field, 10.0).reason


def test_a_step_that_is_solved_roughly_jumps_and_has_no_constant() -> None:
    """z + 10 tanh z = x: near x = 0.4 the solver starts to take one iteration more, which moves z by some 0.005."""
    field = GradientField(Dense(1, 1), "tanh", bias=False).double()
    x, gap = torch.linspace(0.3, 0.7, 4001, dtype=torch.float64)[:, None], 1e-4
    for tolerance, jumps in ((0.1, True), (1e-13, False)):
        method = ImplicitRungeKutta(IMPLICIT_EULER, tolerance)
        with torch.no_grad():
            field.linear.matrix.fill_(1.0)
            y = method.step(field, x, 10.0)
        assert (float(y.diff(dim=0).abs().max()) > gap) == jumps
        declared = method.declare(field, 10.0)
        assert (declared.properties.lipschitz == math.inf) == jumps
        assert [loss.startswith("Lipschitz is lost: solved to 1.0e-01") for loss in declared.losses] == [True] * jumps
    assert Trapezoidal(1e-6).declare(field, 0.1).properties.lipschitz == math.inf


def test_the_symplectic_form_is_kept_to_the_tolerance_of_a_rough_solver() -> None:
    field = PartitionedField.example().double()
    for tolerance, known in ((1e-3, 8e-3), (1e-13, 0.0)):
        kept = ImplicitRungeKutta(IMPLICIT_MIDPOINT, tolerance).declare(field, 0.3).properties
        assert kept.of(Symplectic).tolerance == known
        assert kept.of(VolumePreserving).tolerance == pytest.approx(8 * known)
        block = DynamicalBlock(field, ImplicitRungeKutta(IMPLICIT_MIDPOINT, tolerance), FreeSignal(0.3)).double()
        x = torch.randn(4, *field.in_shape, dtype=torch.float64)
        assert verify(block, x, kinds=(Symplectic, VolumePreserving)).passed


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tolerance": 0.0}, r"tolerance is 0.0; allowed are values in \(0, 1\]"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"tolerance": "tight"}, "tolerance is 'tight'"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"max_iterations": 2.5}, "max_iterations is 2.5"),
    ],
)
def test_settings_of_a_solver_out_of_range_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        Trapezoidal(**settings)


ROOT15 = math.sqrt(15)
GAUSS6 = ImplicitTableau(
    "gauss6",
    6,
    (
        (5 / 36, 2 / 9 - ROOT15 / 15, 5 / 36 - ROOT15 / 30),
        (5 / 36 + ROOT15 / 24, 2 / 9, 5 / 36 - ROOT15 / 24),
        (5 / 36 + ROOT15 / 30, 2 / 9 + ROOT15 / 15, 5 / 36),
    ),
    (5 / 18, 4 / 9, 5 / 18),
)


def test_a_tableau_is_symmetric_but_for_rounding_of_its_coefficients() -> None:
    """Of ẋ = −x the steps h = 1 and −1 of the second give (1 − 0.499999²)/(1 − 0.500001²) x."""
    nearly = ImplicitTableau("theta", 1, ((0.500001,),), (1.0,))
    field, x = LinearField(1).double(), torch.ones(1, 1, dtype=torch.float64)
    for tableau, missed, symmetric in ((GAUSS6, 0.0, True), (nearly, 0.000002 / 0.749999, False)):
        method = ImplicitRungeKutta(tableau)
        with torch.no_grad():
            field.matrix.fill_(-1.0)
            back = method.step(field, method.step(field, x, 1.0), -1.0)
        assert float(back) - 1 == pytest.approx(missed, rel=1e-4, abs=1e-12)
        assert method.symmetric == tableau.symmetric == symmetric
        assert (method.declare(field, 0.5).properties.of(Invertible) is not None) == symmetric


def test_order_and_symmetry_are_those_of_the_tableau() -> None:
    method = ImplicitRungeKutta(IMPLICIT_MIDPOINT)
    with pytest.raises(AttributeError, match="tableau"):
        method.tableau = IMPLICIT_EULER
    assert (method.order, method.symmetric, method.name) == (2, True, "implicit-midpoint")


class Backward(ImplicitRungeKutta):
    tableau = IMPLICIT_EULER


def test_a_tableau_of_the_class_brings_its_order_and_symmetry() -> None:
    """Its step −h is no inverse, whatever the tableau that it was made with says of itself."""
    method, field, x = Backward(IMPLICIT_MIDPOINT), LinearField(1).double(), torch.ones(1, 1, dtype=torch.float64)
    assert (method.name, method.order, method.symmetric) == ("implicit-euler", 1, False)
    with torch.no_grad():
        field.matrix.fill_(-1.0)
        assert float(method.step(field, x, 0.5)) == pytest.approx(1 / 1.5, rel=1e-12)
    assert method.declare(field, 0.5).properties.of(Invertible) is None
    assert ImplicitRungeKutta(IMPLICIT_MIDPOINT).declare(field, 0.5).properties.of(Invertible) is not None
    with pytest.raises(InvalidArgument, match="no closed-form inverse"):
        method.inverse(field, x, 0.5)
