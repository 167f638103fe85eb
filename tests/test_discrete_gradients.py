"""Discrete gradients: their defining identities, energy over many steps, orders, limits and training losses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_implicit import assert_stacked_as_alone
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import (
    ACTIVATIONS,
    FieldFacts,
    GradientField,
    MassPreservingField,
    OddField,
    PartitionedField,
    PreconditionedField,
    ShearField,
    SumField,
    VectorField,
)
from dynablocks.fields.dissipative import DampedHamiltonian, DissipativeField
from dynablocks.fields.hamiltonian import HamiltonianEmbedding, NeuralHamiltonian, SeparableHamiltonian, canonical
from dynablocks.fields.presnov import presnov
from dynablocks.integrators import measured_order
from dynablocks.integrators.base import INTEGRATORS
from dynablocks.integrators.discrete_gradient import (
    KINDS,
    DiscreteGradient,
    MinusPotential,
    _with_length,
    discrete_gradient,
    energy_form,
)
from dynablocks.linear import Dense
from dynablocks.properties import Declaration, Dissipative, EnergyPreserving, Equivariant, Structured, declare, verify
from dynablocks.switching import FreeSignal
from dynablocks.testing import check_block, check_field
from dynablocks.testing.facts import false_facts, false_methods

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


class Pendulum(VectorField):
    """q̇ = p, ṗ = −ω² sin q − γp, as S∇H."""

    def __init__(self, gamma: float = 0.0) -> None:
        super().__init__()
        self.in_shape, self.gamma = (2,), gamma
        self.omega = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))

    def energy(self, x: Tensor) -> Tensor:
        return 0.5 * x[:, 1].square() - self.omega.square() * torch.cos(x[:, 0])

    def gradient(self, x: Tensor) -> Tensor:
        return torch.stack([self.omega.square() * torch.sin(x[:, 0]), x[:, 1]], dim=1)

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.stack([v[:, 1], -v[:, 0] - self.gamma * v[:, 1]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.structure(x, self.gradient(x))

    def facts(self) -> FieldFacts:
        return FieldFacts(odd=True, conserves_energy=self.gamma == 0, dissipates_energy=self.gamma > 0)


def quartic(x: Tensor) -> Tensor:
    return x[:, 0] ** 4 + x[:, 0] * x[:, 1] * x[:, 2] + x[:, 2].square() - 0.5 * x[:, 1] ** 3


@EVERY_KIND
def test_the_defining_identities(kind: str) -> None:
    x, y = torch.randn(2, 20, 3, dtype=torch.float64)
    for energy in (quartic, lambda x: torch.relu(x).sum(1), lambda x: torch.tanh(40 * x).sum(1)):
        mean = discrete_gradient(kind, energy, x, y)
        assert torch.allclose((mean * (y - x)).sum(1), energy(y) - energy(x), rtol=0, atol=1e-12)
    exact = torch.func.grad(lambda z: quartic(z).sum())(x)
    assert torch.allclose(discrete_gradient(kind, quartic, x, x), exact, rtol=0, atol=1e-13)
    for distance in (1e-12, 1e-8, 1e-6, 1e-5):
        near = discrete_gradient(kind, quartic, x, x + distance * torch.randn_like(x))
        assert torch.allclose(near, exact, rtol=0, atol=1e3 * distance + 1e-9)
    swapped = discrete_gradient(kind, quartic, y, x)
    symmetric = torch.allclose(discrete_gradient(kind, quartic, x, y), swapped, rtol=0, atol=1e-12)
    assert symmetric == (kind != "itoh-abe")


def test_the_mean_value_is_the_integral() -> None:
    x, y = torch.randn(2, 10, 3, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(30)
    slope = torch.func.grad(lambda z: quartic(z).sum())
    integral = sum(w / 2 * slope(x + (c + 1) / 2 * (y - x)) for c, w in zip(nodes, weights, strict=True))
    assert torch.allclose(discrete_gradient("mean-value", quartic, x, y, nodes=2), integral, rtol=0, atol=1e-12)
    assert not torch.allclose(discrete_gradient("gonzalez", quartic, x, y), integral, rtol=0, atol=1e-6)


def test_a_mean_value_of_one_node_is_the_midpoint_that_is_put_right_along_the_segment() -> None:
    """Quadrature of one node is the midpoint rule, so what is left of it is Gonzalez' formula."""
    x, y = torch.randn(2, 10, 3, dtype=torch.float64)
    d = y - x
    midpoint = torch.func.grad(lambda z: quartic(z).sum())((x + y) / 2)
    defect = quartic(y) - quartic(x) - (midpoint * d).sum(1)
    expected = midpoint + (defect / d.square().sum(1))[:, None] * d
    one = discrete_gradient("mean-value", quartic, x, y, nodes=1)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(discrete_gradient("gonzalez", quartic, x, y, nodes=4), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(one, discrete_gradient("mean-value", quartic, x, y, nodes=4), rtol=0, atol=1e-3)


def test_a_step_takes_as_many_nodes_as_it_is_told() -> None:
    field, x = Pendulum(), torch.tensor([[2.0, 1.5], [2.5, -0.4]], dtype=torch.float64)
    with torch.no_grad():
        one, four = (DiscreteGradient("mean-value", nodes=nodes).step(field, x, 0.5) for nodes in (1, 4))
        gonzalez = INTEGRATORS["gonzalez"]().step(field, x, 0.5)
    torch.testing.assert_close(one, gonzalez, rtol=0, atol=1e-12)
    assert float((one - four).norm(dim=1).min()) > 1e-6


def test_itoh_abe_needs_only_energies() -> None:
    x, y = torch.randn(2, 4, 3, dtype=torch.float64)
    given = discrete_gradient("itoh-abe", quartic, x, y, gradient=lambda z: torch.full_like(z, torch.nan))
    for i in range(3):
        corner = torch.cat([y[:, :i], x[:, i:]], dim=1)
        moved = torch.cat([y[:, : i + 1], x[:, i + 1 :]], dim=1)
        assert torch.allclose(given[:, i], (quartic(moved) - quartic(corner)) / (y - x)[:, i], rtol=0, atol=1e-12)


@EVERY_KIND
def test_gradients_stay_finite_where_states_meet(kind: str) -> None:
    field = Pendulum()
    x = torch.tensor([[0.3, 0.5], [0.0, 0.0], [0.3, 0.5], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.3, 0.5], [0.0, 0.0], [0.3, 0.9], [1.1, 1.8]], dtype=torch.float64, requires_grad=True)
    mean = discrete_gradient(kind, field.energy, x, y)
    gradients = torch.autograd.grad(mean.square().sum(), [x, y, field.omega])
    assert all(bool(torch.isfinite(g).all()) for g in (mean, *gradients))
    assert torch.autograd.gradcheck(lambda x, y: discrete_gradient(kind, field.energy, x, y)[3:], (x, y), atol=1e-6)


@EVERY_KIND
def test_energy_over_a_thousand_steps(kind: str) -> None:
    method, field = INTEGRATORS[kind](), Pendulum()
    x = torch.tensor([[1.0, 0.0], [2.5, 0.3], [0.0, 2.6], [1e-3, 0.0]], dtype=torch.float64)
    start, drift = field.energy(x).detach(), 0.0
    with torch.no_grad():
        for _ in range(1000):
            x = method.step(field, x, 0.1)
        drift = float((field.energy(x) - start).abs().max())
    assert drift <= 1000 * method.tolerance
    control = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    before = field.energy(control)
    for _ in range(100):
        control = INTEGRATORS["rk4"]().step(field, control.detach(), 0.1)
    assert float((field.energy(control).detach() - before).abs()) > 1e-8


@EVERY_KIND
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_the_order_is_the_slope_of_the_error(kind: str, gamma: float) -> None:
    method, field = INTEGRATORS[kind](), Pendulum(gamma)
    x = torch.tensor([[1.0, 0.3]], dtype=torch.float64)
    # With one degree of freedom and H = T(p) + V(q) the coordinate increments are symmetric in x and x', so of order 2.
    expected = 2 if kind == "itoh-abe" else method.order
    assert measured_order(method, field, x, counts=(40, 80, 160)) == pytest.approx(expected, abs=0.15)


@EVERY_KIND
def test_energy_falls_for_every_step_size(kind: str) -> None:
    torch.manual_seed(0)
    method, x = INTEGRATORS[kind](), torch.randn(5, 2, dtype=torch.float64)
    for h in (0.1, 1.0):
        field = Pendulum(0.3)
        declared = method.declare(field, h).properties.of(Dissipative)
        assert declared is not None
        assert declared.tolerance == method.tolerance
        with torch.no_grad():
            assert bool((field.energy(method.step(field, x, h)) < field.energy(x)).all())
    assert method.declare(Pendulum(0.3), -0.1).properties.of(Dissipative) is None
    assert method.declare(Pendulum(), -0.1).properties.of(EnergyPreserving) is not None


@EVERY_KIND
def test_forms_of_the_librarys_fields(kind: str) -> None:
    torch.manual_seed(0)
    method = INTEGRATORS[kind]()
    for field in (
        PartitionedField.example(),
        NeuralHamiltonian.example(),
        DissipativeField.example(),
        GradientField(Dense(3, 4), "tanh"),
        PreconditionedField(Dense(3, 4), "tanh"),
    ):
        field = field.double()
        x = torch.randn(4, *field.in_shape, dtype=torch.float64)
        form = energy_form(field)
        assert not isinstance(form, str)
        slope = torch.func.grad(lambda z, form=form: form.energy(z).sum())(x)
        assert torch.allclose(form.gradient(x), slope, rtol=0, atol=1e-12)
        assert torch.allclose(form.structure(x, slope), field(x), rtol=0, atol=1e-12)
        with torch.no_grad():
            change = form.energy(method.step(field, x, 0.2)) - form.energy(x)
        assert float(change.max()) <= 1e-12
        if field.facts().conserves_energy:
            assert float(change.abs().max()) <= 1e-12


def test_gradients_equal_those_of_unrolled_iterations() -> None:
    torch.manual_seed(0)
    field = NeuralHamiltonian.example().double()
    for kind in KINDS:
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        h = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        form, z = energy_form(field), x + 0.05 * field(x)
        for _ in range(40):
            mean = discrete_gradient(kind, form.energy, x, z, gradient=form.gradient)
            z = x + h * form.structure((x + z) / 2, mean)
        y = INTEGRATORS[kind]().step(field, x, h)
        assert torch.allclose(y, z, rtol=0, atol=1e-12)
        sources = [x, h, *field.parameters()]
        given = torch.autograd.grad(y.square().sum(), sources)
        expected = torch.autograd.grad(z.square().sum(), sources)
        for one, other in zip(given, expected, strict=True):
            assert float((one - other).abs().max()) <= 1e-8 * max(1.0, float(other.abs().max()))


@EVERY_KIND
def test_parameters_have_their_gradients_where_the_states_need_none(kind: str) -> None:
    """H(x) depends on them too, and enters the equation of a step as one number a state."""
    field, h = Pendulum(), 0.3
    form, x = energy_form(field), torch.tensor([[0.4, 1.0], [-1.1, 0.3], [2.0, -0.7]], dtype=torch.float64)
    z = x
    for _ in range(60):
        z = x + h * form.structure((x + z) / 2, discrete_gradient(kind, form.energy, x, z, gradient=form.gradient))
    y = INTEGRATORS[kind]().step(field, x, h)
    given, expected = (torch.autograd.grad(end.square().sum(), field.omega)[0] for end in (y, z))
    torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)


@EVERY_KIND
def test_no_states_move_with_no_steps(kind: str) -> None:
    assert INTEGRATORS[kind]().step(Pendulum(), torch.zeros(0, 2, dtype=torch.float64), 0.3).shape == (0, 2)


@pytest.mark.parametrize("kind", ["gonzalez", "mean-value"])
def test_an_energy_that_is_known_is_not_computed_again(kind: str) -> None:
    x, y = torch.randn(2, 6, 3, dtype=torch.float64)
    slope = torch.func.grad(lambda z: quartic(z).sum())
    asked: list[Tensor] = []

    def energy(z: Tensor) -> Tensor:
        asked.append(z)
        return quartic(z)

    known = _with_length(kind, energy, slope, x, y, 4, quartic(x))
    assert len(asked) == 1
    assert asked[0] is y
    for one, other in zip(known, _with_length(kind, energy, slope, x, y, 4), strict=True):
        assert torch.equal(one, other)


STACKED = {
    "of a gradient field": lambda: GradientField(Dense(3, 4), "tanh"),
    "of a Hamiltonian": lambda: NeuralHamiltonian(4, width=3),
    "of halves": PartitionedField.example,
    "of a dissipative field": lambda: DissipativeField(3, width=4),
}


@EVERY_KIND
@pytest.mark.parametrize("name", STACKED)
def test_steps_take_stacked_parameters(kind: str, name: str) -> None:
    blocks = [DynamicalBlock(STACKED[name](), kind, FreeSignal(0.1)).double() for _ in range(3)]
    with torch.no_grad():
        for parameter in (p for block in blocks for p in block.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert_stacked_as_alone(blocks, torch.randn(5, *blocks[0].in_shape, dtype=torch.float64), 1e-8)


def test_a_loss_with_a_known_target_needs_no_solve() -> None:
    field, h = Pendulum(), 0.2
    x = torch.randn(20, 2, dtype=torch.float64)
    y = INTEGRATORS["gonzalez"]().step(field, x, h).detach()
    with torch.no_grad():
        field.omega.fill_(0.8)
    optimiser = torch.optim.LBFGS([field.omega], max_iter=50, tolerance_grad=1e-14, tolerance_change=0.0)

    def loss() -> Tensor:
        optimiser.zero_grad()
        mean = discrete_gradient("gonzalez", field.energy, x, y)
        gap: Tensor = ((y - x) / h - field.structure((x + y) / 2, mean)).square().mean()
        gap.backward()
        return gap

    optimiser.step(loss)
    assert float(field.omega.detach()) == pytest.approx(1.2, abs=1e-8)


def test_bad_input_is_refused() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(InvalidArgument, match="did you mean 'gonzalez'"):
        discrete_gradient("gonzales", quartic, x, x)
    with pytest.raises(InvalidArgument, match="two equal batches"):
        discrete_gradient("gonzalez", quartic, x, x[:1])
    with pytest.raises(InvalidArgument, match="nodes is 0"):
        discrete_gradient("mean-value", quartic, x, x, nodes=0)
    with pytest.raises(InvalidArgument, match="nodes is 0"):
        DiscreteGradient("mean-value", nodes=0)

    class Unknown(VectorField):
        in_shape = (3,)

        def facts(self) -> FieldFacts:
            return FieldFacts()

    for action in (lambda m: m.step(Unknown(), x, 0.1), lambda m: m.declare(Unknown(), 0.1)):
        with pytest.raises(InvalidArgument, match="no known energy"):
            action(INTEGRATORS["gonzalez"]())


@pytest.mark.slow
@EVERY_KIND
def test_blocks_conform(kind: str) -> None:
    torch.manual_seed(0)
    for field in (NeuralHamiltonian.example(), DissipativeField.example(), PartitionedField.example()):
        check_block(DynamicalBlock(field, kind, FreeSignal(0.1))).require()  # hostile refusals are excused inside


def test_a_field_whose_energy_has_no_formula_is_refused_and_says_why() -> None:
    field = PartitionedField(None, GradientField(Dense(2, 3), "arctan"))
    assert "arctan" in str(INTEGRATORS["gonzalez"]().why_not(field))
    with pytest.raises(InvalidArgument, match="arctan"):
        DynamicalBlock(field, "gonzalez", FreeSignal(0.1)).declare()


@EVERY_KIND
@pytest.mark.parametrize("far", [0.0, 1e3, 1e6])
def test_the_energy_is_met_wherever_the_origin_is(kind: str, far: float) -> None:
    x = torch.tensor([[far + 1.0, 1.0]], dtype=torch.float64)
    y = x + torch.tensor([[0.5, -0.4]], dtype=torch.float64)
    energy = lambda z: 0.5 * z[:, 1].square() - torch.cos(z[:, 0])  # noqa: E731
    mean = discrete_gradient(kind, energy, x, y)
    defect = float(((mean * (y - x)).sum(1) - (energy(y) - energy(x))).abs())
    assert defect <= 16 * torch.finfo(torch.float64).eps * (1 + far)


@pytest.mark.parametrize("kind", ["gonzalez", "itoh-abe"])
def test_a_defect_of_zero_still_moves_with_the_parameters(kind: str) -> None:
    x, y = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[3.0]], dtype=torch.float64)

    def value(theta: Tensor) -> Tensor:
        mean = discrete_gradient(kind, lambda z: 0.5 * z[:, 0].square() + theta * z[:, 0] ** 4, x, y)
        return mean.sum()

    assert float(torch.func.grad(value)(torch.zeros((), dtype=torch.float64))) == pytest.approx((3.0**4 - 1) / 2)


@EVERY_KIND
@pytest.mark.parametrize("far", [1e2, 1e6])
def test_steps_far_from_the_origin_keep_the_energy(kind: str, far: float) -> None:
    """Of a pendulum in whole turns: the energy there is the one here, but for rounding of the angle."""
    turns = 2 * torch.pi * round(far / (2 * torch.pi))
    x = torch.tensor([[turns + 1.0, 1.0], [turns + 0.3, -0.7]], dtype=torch.float64)
    field = Pendulum().requires_grad_(False)
    before = field.energy(x)
    for _ in range(20):
        x = INTEGRATORS[kind]().step(field, x, 0.5)
        # The solver's tolerance is relative to the state.
        assert (field.energy(x) - before).abs().max() <= 20 * 4e-13 * far


@EVERY_KIND
def test_gradient_flows_dissipate_and_several_steps_do(kind: str) -> None:
    torch.manual_seed(0)
    field = GradientField(Dense(3, 4), "tanh").double()
    block = DynamicalBlock([field], kind, FreeSignal(0.7))
    twice = nn.Sequential(block, DynamicalBlock([field], kind, FreeSignal(0.2)))
    x = torch.randn(4, 3, dtype=torch.float64)
    for module in (block, twice):
        assert module(x).isfinite().all()
        assert declare(module).properties.of(Dissipative) is not None
        verify(module, x).require()
    assert INTEGRATORS[kind]().declare(field, -0.7).properties.of(Dissipative) is None
    other = DynamicalBlock([copy.deepcopy(field)], kind, FreeSignal(0.2))
    assert declare(nn.Sequential(block, other)).properties.of(Dissipative) is None
    climbing = MinusPotential(GradientField(Dense(3, 4), "tanh", expansive=True).double())
    (check,) = verify(Climbs(block, climbing), x)
    assert not check.passed


class Climbs(Structured):
    """The broken twin: a step that dissipates the energy of another field, it says."""

    def __init__(self, block: DynamicalBlock, energy: MinusPotential) -> None:
        super().__init__()
        self.block, self.claimed = block, energy

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)

    def declare(self) -> Declaration:
        return Declaration.of(Dissipative(self.claimed), reason="a false claim")


class Askew(VectorField):
    """X = (p³, −q³) = S∇H for H = (q⁴ + p⁴)/4 with S(x) = X(x)∇H(x)ᵀ/‖∇H(x)‖², which is not skew."""

    in_shape = (2,)

    def energy(self, x: Tensor) -> Tensor:
        return 0.25 * (x**4).sum(1)

    def gradient(self, x: Tensor) -> Tensor:
        return x**3

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        slope = self.gradient(x)
        return self(x) * (slope * v).sum(1, keepdim=True) / slope.square().sum(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return canonical(self.gradient(x))

    def facts(self) -> FieldFacts:
        return FieldFacts(odd=True, conserves_energy=True)


def test_a_structure_that_is_skew_on_gradients_alone_is_found_since_steps_lose_the_energy() -> None:
    """The broken twin: X = S∇H and dH/dt = 0 are true. For y = x + hX(m), ⟨∇H(m), y − x⟩ = 0: the midpoint rule."""
    field, x, h = Askew(), torch.tensor([[1.0, 0.5], [0.3, -0.9]], dtype=torch.float64), 0.5
    assert not list(false_facts(field, x))
    (told,) = false_methods(field, x)
    assert told.startswith("structure: |⟨v, structure(x, v)⟩| for a random v is "), told
    assert "methods" in check_field(field).failed
    y = INTEGRATORS["gonzalez"]().step(field, x, h)
    torch.testing.assert_close(y, INTEGRATORS["implicit-midpoint"]().step(field, x, h), rtol=0, atol=1e-10)
    assert float((field.energy(y) - field.energy(x)).abs().max()) > 1e-3
    for kind in ("gonzalez", "mean-value"):
        assert not verify(DynamicalBlock(field, kind, FreeSignal(h)), x, kinds=(EnergyPreserving,)).passed


class Slanted(VectorField):
    """X(x) = −x = −eˣ H'(x) for H' = x e⁻ˣ: an odd field of an S and an H that are neither even nor odd."""

    in_shape = (1,)

    def energy(self, x: Tensor) -> Tensor:
        return -((1 + x) * torch.exp(-x)).sum(1)

    def gradient(self, x: Tensor) -> Tensor:
        return x * torch.exp(-x)

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        return -torch.exp(x) * v

    def forward(self, x: Tensor) -> Tensor:
        return -x

    def facts(self) -> FieldFacts:
        return FieldFacts(odd=True, dissipates_energy=True)


@EVERY_KIND
def test_steps_of_an_odd_field_with_a_structure_of_its_own_need_not_be_odd(kind: str) -> None:
    field, method, x = Slanted(), INTEGRATORS[kind](), torch.tensor([[1.0], [0.4]], dtype=torch.float64)
    assert not [*false_facts(field, x), *false_methods(field, x)]
    declared = method.declare(field, 0.5)
    assert declared.properties.of(Equivariant) is None
    assert [loss.split()[0] for loss in declared.losses] == ["Equivariant"]
    assert float((method.step(field, x, 0.5) + method.step(field, -x, 0.5)).abs().min()) > 1e-4
    assert declared.properties.of(Dissipative) is not None
    verify(DynamicalBlock(field, kind, FreeSignal(0.5)), x).require()


def odd_force(expansive: bool) -> GradientField:
    return GradientField(Dense(2, 3), "tanh", expansive=expansive, bias=False)


ODD = {
    "Hamiltonian": lambda: NeuralHamiltonian(4, width=3, even=True),
    "halves": lambda: PartitionedField(None, odd_force(expansive=False)),
    "separable": lambda: SeparableHamiltonian(None, odd_force(expansive=True)),
    "damped": lambda: DampedHamiltonian(None, odd_force(expansive=True)),
    "embedding": lambda: HamiltonianEmbedding(odd_force(expansive=False)),
    "dissipative": lambda: DissipativeField(2, odd_force(expansive=True), width=3),
    "gradient": lambda: odd_force(expansive=False),
}


@EVERY_KIND
@pytest.mark.parametrize("name", ODD)
def test_steps_of_odd_fields_with_a_constant_structure_are_odd(kind: str, name: str) -> None:
    block = DynamicalBlock(ODD[name](), kind, FreeSignal(0.1)).double()
    assert block.properties.of(Equivariant) is not None
    verify(block, torch.randn(4, *block.in_shape, dtype=torch.float64), kinds=(Equivariant,)).require()


class Harmonic(VectorField):
    """X = ∇V for V = Re z³, which keeps H = Im z³, since ⟨∇V, ∇H⟩ = 0 (Cauchy and Riemann)."""

    in_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return torch.stack([3 * (q * q - p * p), -6 * q * p], dim=1)

    def potential(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return q**3 - 3 * q * p * p

    def energy(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return 3 * q * q * p - p**3

    def facts(self) -> FieldFacts:
        return FieldFacts(conservative=True, conserves_energy=True)


@EVERY_KIND
def test_a_step_that_follows_a_potential_keeps_no_other_energy(kind: str) -> None:
    field, method, x = Harmonic(), INTEGRATORS[kind](), torch.tensor([[0.7, 0.3], [-0.5, 0.6]], dtype=torch.float64)
    assert not [*false_facts(field, x), *false_methods(field, x)]
    declared = method.declare(field, 0.1)
    assert declared.properties.of(EnergyPreserving) is None
    assert [loss.split()[0] for loss in declared.losses] == ["EnergyPreserving"]
    assert declared.properties.of(Dissipative) == Dissipative(MinusPotential(field), tolerance=method.tolerance)
    y = method.step(field, x, 0.1)
    # Along a straight line z³ changes by Δz times the mean of 3z², which here is |Δz|²/h: the mean value keeps Im z³.
    assert (float((field.energy(y) - field.energy(x)).abs().max()) > 1e-6) == (kind != "mean-value")
    verify(DynamicalBlock(field, kind, FreeSignal(0.1)), x).require()


@pytest.mark.parametrize("kind", [NeuralHamiltonian, SeparableHamiltonian, DampedHamiltonian, DissipativeField])
def test_a_field_with_a_forward_of_its_own_has_no_structure_of_the_one_before(kind: type[VectorField]) -> None:
    """The broken twin: a step of S∇H leaves out the brake, which those of Runge–Kutta methods take along."""
    assert not isinstance(energy_form(kind.example()), str)
    braked = type("Braked", (kind,), {"forward": lambda self, x: kind.forward(self, x) - 0.1 * x}).example()
    assert str(energy_form(braked)).startswith("Braked has a forward of its own, and no structure to go with it")
    for name in KINDS:
        with pytest.raises(InvalidArgument, match="a forward of its own"):
            DynamicalBlock(braked, name, FreeSignal(0.1))
    assert INTEGRATORS["rk4"]().why_not(braked) is None


class Kicked(PartitionedField):
    """X = 𝕁∇H + c: Hamiltonian with another energy than the inherited one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0

    def facts(self) -> FieldFacts:
        return FieldFacts(hamiltonian=True)


def test_the_energy_of_another_forward_is_not_taken() -> None:
    kicked = Kicked.example()
    assert str(energy_form(kicked)).startswith("Kicked has a forward of its own, and the energy of another")
    assert INTEGRATORS["gonzalez"]().why_not(kicked) is not None
    assert INTEGRATORS["implicit-midpoint"]().why_not(kicked) is None


class Doubled(PartitionedField):
    """X = 2𝕁∇H, which keeps the inherited H and is 𝕁∇ of twice that."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def facts(self) -> FieldFacts:
        return FieldFacts(hamiltonian=True, conserves_energy=True)


class Louder(ShearField):
    """X = 2𝕁∇H by a rate of its own."""

    flow = ShearField.flow

    def rate(self, rests: Tensor, moves: Tensor) -> Tensor:
        return 2 * super().rate(rests, moves)

    def facts(self) -> FieldFacts:
        return FieldFacts(hamiltonian=True)


class Quieter(NeuralHamiltonian):
    """X = ½𝕁∇H by a structure of its own: it keeps H, and is 𝕁∇ of half of it."""

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        return 0.5 * canonical(v)

    def facts(self) -> FieldFacts:
        return FieldFacts(hamiltonian=True, conserves_energy=True)


def louder_kick() -> PartitionedField:
    field = PartitionedField.example()
    field.kick = Louder(field.kick.force)
    return field


OF_ANOTHER_ENERGY: dict[str, Callable[[], VectorField]] = {
    "a sum": lambda: SumField(Kicked.example()),
    "a sum in a sum": lambda: SumField(SumField(Kicked.example()), PartitionedField.example()),
    "a sum with a structure": lambda: SumField(PartitionedField.example(), Quieter.example()),
    "an odd part": lambda: OddField(Doubled.example()),
    "a sum of odd parts": lambda: SumField(OddField(Doubled.example())),
    "a shear": Louder.example,
    "a sum of shears": lambda: SumField(*louder_kick().terms()),
    "a sum of a field of shears": lambda: SumField(louder_kick()),
}


@pytest.mark.parametrize("name", OF_ANOTHER_ENERGY)
def test_the_energy_of_another_field_is_taken_in_nothing_that_is_made_of_one(name: str) -> None:
    field = OF_ANOTHER_ENERGY[name]().double()
    assert not field.facts().conserves_energy
    assert not field.standing_facts().conserves_energy
    x = torch.randn(3, 4, dtype=torch.float64)
    # X is Hamiltonian, as its parts say, and no claim about an H of it is left.
    assert field.facts().hamiltonian
    assert not list(false_facts(field, x))
    for kind in KINDS:
        assert "and the energy of another" in str(INTEGRATORS[kind]().why_not(field))


def test_the_energy_of_another_rate_is_not_that_of_the_two_halves() -> None:
    field, x = louder_kick().double(), torch.randn(3, 4, dtype=torch.float64)
    assert not list(false_facts(field, x))
    with pytest.raises(InvalidArgument, match=r"^Louder has a rate of its own, and the energy of another"):
        field.energy(x)
    assert INTEGRATORS["gonzalez"]().why_not(field) is not None


def test_a_field_that_repeats_the_energy_of_its_own_forward_is_taken_in_a_sum() -> None:
    class Repeated(Doubled):
        def energy(self, x: Tensor) -> Tensor:
            return 2 * super().energy(x)

        def facts(self) -> FieldFacts:
            return FieldFacts(hamiltonian=True)

    field = SumField(Repeated.example(), NeuralHamiltonian.example()).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert field.facts().conserves_energy
    assert not [*false_facts(field, x), *false_methods(field, x)]
    verify(DynamicalBlock(field, "gonzalez", FreeSignal(0.1)), x, kinds=(EnergyPreserving,)).require()


class Halved(NeuralHamiltonian):
    """X = ½𝕁∇H, by a forward of its own and the structure that goes with it."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * canonical(self.gradient(x))

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        return 0.5 * canonical(v)

    def facts(self) -> FieldFacts:
        return FieldFacts(conserves_energy=True)


def test_a_field_that_repeats_the_structure_of_its_own_forward_is_taken() -> None:
    field, x = Halved(2, width=3).double(), torch.randn(3, 2, dtype=torch.float64)
    assert not [*false_facts(field, x), *false_methods(field, x)]
    assert measured_order("gonzalez", field, x, counts=(20, 40, 80)) == pytest.approx(2, abs=0.15)
    for kind in KINDS:
        verify(DynamicalBlock(field, kind, FreeSignal(0.1)), x, kinds=(EnergyPreserving,)).require()


@EVERY_KIND
def test_a_gradient_found_by_quadrature_dissipates_its_potential_and_loses_nothing(kind: str) -> None:
    gradient, method = presnov(MassPreservingField(3, 5), nodes=4).gradient, INTEGRATORS[kind]()
    declared = method.declare(gradient, 0.1)
    assert declared.properties == (Dissipative(MinusPotential(gradient), tolerance=method.tolerance),)
    assert declared.losses == INTEGRATORS["euler"]().declare(gradient, 0.1).losses == ()


@EVERY_KIND
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-9, 1e-12])
def test_a_discrete_gradient_has_its_digits_where_the_energy_is_small(kind: str, size: float) -> None:
    """For H = Σ log cosh xᵢ it is (x + y)/2 up to cubes of the states, and H is of the size of their squares."""
    primitive = ACTIVATIONS["tanh"]().require_primitive("a field")
    x, y = size * torch.randn(2, 10, 3, dtype=torch.float64)
    mean = discrete_gradient(kind, lambda z: primitive(z).sum(1), x, y)
    largest = float(torch.maximum(x.abs(), y.abs()).max())
    torch.testing.assert_close(mean, (x + y) / 2, rtol=0, atol=2 * largest**3 + 1e-9 * size)


@EVERY_KIND
def test_steps_of_a_preconditioned_field_dissipate(kind: str) -> None:
    block = DynamicalBlock(PreconditionedField(Dense(3, 4), "tanh"), kind, FreeSignal(0.7)).double()
    assert block.properties.of(Dissipative) is not None
    verify(block, torch.randn(4, 3, dtype=torch.float64)).require()
