"""Facts of every field against dense float64 Jacobians at many points, also under hostile weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import (
    ACTIVATIONS,
    FIELDS,
    Activation,
    CompartmentField,
    ConstrainedField,
    DampedHamiltonian,
    Damping,
    DiagonalField,
    DissipativeField,
    EnergyField,
    FieldFacts,
    GradientField,
    GradientOf,
    IdentityField,
    LinearField,
    MassPreservingField,
    MetricField,
    NeuralHamiltonian,
    PartitionedField,
    PlanarField,
    PreconditionedField,
    RotationField,
    SeparableHamiltonian,
    ShearField,
    SphereField,
    SumField,
    TwoMatrixField,
    VectorField,
    activation,
    leaky_relu,
    smooth_leaky_relu,
)
from dynablocks.fields.base import SAID_OF, _no_facts, potential_of
from dynablocks.fields.symmetric import EvenPotential, PotentialSum
from dynablocks.integrators import ExactFlow, ExplicitEuler, integrator
from dynablocks.lifting import ChannelMix
from dynablocks.linear import (
    Bounds,
    Conv,
    Dense,
    LinearMap,
    NormalisedConv,
    OrthogonalConv,
    OrthogonalDense,
    UnitDense,
    frozen_weights,
    shared_weights,
)
from dynablocks.norms import DenseMetric
from dynablocks.properties import (
    ConformalSymplectic,
    Declaration,
    Equivariant,
    Invertible,
    LinearInvariant,
    NormPreserving,
    Positive,
    Property,
    Structured,
    Symplectic,
    VolumePreserving,
    explain,
    jacobians,
    verify,
)
from dynablocks.switching import FreeSignal, LearnedStep
from dynablocks.testing import check_block, check_field
from dynablocks.testing.facts import false_facts

FIELD_MAKERS = {name: FIELDS[name].example for name in sorted(FIELDS)} | {
    "gradient free tanh": lambda: GradientField(Dense(3, 5), "tanh", bias=False),
    "gradient wide expansive": lambda: GradientField(Dense(4, 3), "relu", expansive=True),
    "gradient convolution": lambda: GradientField(Conv((2, 3, 3), 3, 3), leaky_relu(0.1)),
    "gradient strided": lambda: GradientField(Conv((2, 5, 5), 3, 3, stride=2), "sigmoid"),
    "gradient alpha": lambda: GradientField(Dense(3, 4), leaky_relu(0.25), alpha=0.5),
    "gradient full": lambda: GradientField(OrthogonalConv((2, 3, 3), padding="full"), leaky_relu(0.25)),
    "planar contractive": lambda: PlanarField(Dense(3, 3), smooth_leaky_relu(0.25), expansive=False),
    "two convolutions": lambda: TwoMatrixField(Conv((1, 3, 3), 2), Conv((1, 3, 3), 2), "arctan", decay=1.0, bias=False),
    "preconditioned full": lambda: PreconditionedField(Conv((2, 3, 3), 3, 3, "full"), "softplus"),
    "preconditioned same": lambda: PreconditionedField(Conv((2, 4, 4), 3, 3, "same")),
    "preconditioned circular": lambda: PreconditionedField(Conv((2, 3, 3), 2, 5, "circular")),
    "preconditioned orthogonal": lambda: PreconditionedField(OrthogonalDense(4, 4)),
    "preconditioned even": lambda: PreconditionedField(Conv((1, 4, 4), 2, 2, "circular")),
    "sum of gradients": lambda: SumField(GradientField(Dense(3, 4), "tanh"), LinearField(3, bias=True)),
    "sum in another metric": lambda: SumField(MetricField.example(), LinearField(3), PlanarField(Dense(3, 3))),
    "sum of Hamiltonians": lambda: SumField(SeparableHamiltonian.example(), NeuralHamiltonian.example()),
    "sum with damping": lambda: SumField(ShearField.example(), Damping((4,), 0.3), Damping((4,), 0.2)),
    "sum of tangents": lambda: SumField(RotationField.example(), SphereField.example()),
    "sum of exchanges": lambda: SumField(MassPreservingField.example(), CompartmentField.example()),
}
EVERY_FIELD = pytest.mark.parametrize("make", FIELD_MAKERS.values(), ids=FIELD_MAKERS)

SPOIL = {
    "start": lambda p: p,
    "random": torch.randn_like,
    "x1000": lambda p: 1000 * p,
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "rank one": lambda p: p if p.ndim < 2 else (p.flatten(1)[:, :1] * p.flatten(1)[:1]).reshape(p.shape),
    "tiny": lambda p: 1e-6 * p,
}


def spoiled(make, name: str) -> VectorField:
    field = make().double()
    with torch.no_grad():
        for p in field.parameters():
            p.copy_(SPOIL[name](p))
    return field


def draw(field: VectorField, points: int) -> Tensor:
    return 2 * torch.randn(points, *field.in_shape, dtype=torch.float64)


def dense_jacobians(field: VectorField, points: int = 24) -> Tensor:
    return jacobians_at(field, draw(field, points))


def jacobians_at(field: VectorField, x: Tensor) -> Tensor:
    """Jacobians in the coordinates in which the norm of the field's facts is the Euclidean one."""
    size, metric = x[0].numel(), field.facts().metric
    columns = torch.func.vmap(
        torch.func.jacrev(lambda u: metric.whiten(field(metric.unwhiten(u[None])))[0]),
    )(metric.whiten(x))
    return columns.reshape(len(x), size, size).detach()


def form(half: int) -> Tensor:
    """𝕁 = [[0, I], [−I, 0]]."""
    eye, zero = torch.eye(half, dtype=torch.float64), torch.zeros(half, half, dtype=torch.float64)
    return torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)])


@EVERY_FIELD
@pytest.mark.parametrize("hostile", SPOIL)
def test_facts_hold_at_every_point(make, hostile: str) -> None:
    field = spoiled(make, hostile)
    assert not list(false_facts(field, draw(field, 24)))


WITHOUT_CONSTANT = {
    *("compartments", "gradient-of", "hamiltonian-embedding", "rotation", "sphere"),
    *("sum of exchanges", "sum of tangents"),
}
"""The fields of which no Lipschitz constant is known, whatever their parameters are."""


@pytest.mark.parametrize("hostile", SPOIL)
@pytest.mark.parametrize("name", FIELD_MAKERS)
def test_a_constant_that_is_known_is_finite_under_hostile_parameters_too(name: str, hostile: str) -> None:
    """An infinite one holds at every point and says nothing."""
    lipschitz = spoiled(FIELD_MAKERS[name], hostile).facts().lipschitz
    assert (lipschitz == math.inf) == (name in WITHOUT_CONSTANT)


FREE_WEIGHTS = [name for name in FIELD_MAKERS if name.startswith("gradient ") and name != "gradient full"]


@pytest.mark.parametrize("name", FREE_WEIGHTS)
def test_the_constant_of_a_gradient_field_grows_with_the_square_of_its_weights(name: str) -> None:
    """So it is finite where parameters are hostile: an infinite one holds at every point and says nothing."""
    field = FIELD_MAKERS[name]().double()
    before = field.facts().lipschitz
    with torch.no_grad():
        for p in field.linear.parameters():
            p.mul_(1e3)
    assert 0 < before < math.inf
    assert field.facts().lipschitz == pytest.approx(1e6 * before, rel=1e-12)


@EVERY_FIELD
@pytest.mark.parametrize("hostile", ["start", "random", "rank one"])
@pytest.mark.parametrize("bound", ["tight", "paper"])
def test_euler_constants_hold_for_steps_of_either_sign(make, hostile: str, bound: str) -> None:
    field = spoiled(make, hostile)
    jacobians = dense_jacobians(field)
    eye = torch.eye(jacobians.shape[-1], dtype=torch.float64)
    for h in (-2.0, -0.5, 0.0, 0.3, 1.0, 2.0, 7.0):
        measured = float(torch.linalg.matrix_norm(eye + h * jacobians, ord=2).max())
        assert measured <= field.euler_constant(h, bound)[0] * (1 + 1e-12)


@EVERY_FIELD
def test_the_paper_bound_is_never_smaller_than_the_tight_one(make) -> None:
    for hostile in ("start", "random"):
        field = spoiled(make, hostile)
        for h in torch.linspace(-3, 3, 25).tolist():
            assert field.euler_constant(h, "paper")[0] >= field.euler_constant(h, "tight")[0] * (1 - 1e-12)


@pytest.mark.parametrize("slope", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("expansive", [False, True])
def test_the_tight_constant_is_attained_for_orthogonal_weights(slope: float, expansive: bool) -> None:
    field = GradientField(OrthogonalDense(3, 3), leaky_relu(slope), expansive=expansive).double()
    jacobians = dense_jacobians(field, 3000)
    for h in (-2.0, -0.7, 0.2, 4 / 3, 2.0, 3.0):
        measured = float(torch.linalg.matrix_norm(torch.eye(3) + h * jacobians, ord=2).max())
        declared = field.euler_constant(h)[0]
        assert 0.99 * declared <= measured <= declared * (1 + 1e-12)
        s = 1.0 if expansive else -1.0
        assert declared == pytest.approx(max(abs(1 + s * h), abs(1 + s * h * slope)))


@pytest.mark.parametrize("norm", [0.3, 1.0, 5.0])
def test_a_contractive_step_is_non_expansive_up_to_two_over_the_squared_norm(norm: float) -> None:
    field = GradientField(OrthogonalDense(3, 3).double(), "relu").double()
    field.linear = Dense(3, 3).double()
    with torch.no_grad():
        field.linear.matrix.copy_(norm * torch.diag(torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)))
    limit = 2 / norm**2
    assert field.euler_constant(limit * (1 - 1e-12))[0] <= 1 + 1e-11
    assert field.euler_constant(limit * 1.001)[0] > 1.001
    jacobians = dense_jacobians(field, 200)
    beyond = torch.linalg.matrix_norm(torch.eye(3) + 1.01 * limit * jacobians, ord=2).max()
    assert 1.01 < beyond <= field.euler_constant(1.01 * limit)[0] * (1 + 1e-12)


@pytest.mark.parametrize("sigma", ["relu", "leaky-relu", "tanh", "sigmoid"])
@pytest.mark.parametrize("expansive", [False, True])
def test_a_gradient_field_is_the_gradient_of_its_potential(sigma: str, expansive: bool) -> None:
    for linear in (Dense(3, 5), Conv((2, 3, 3), 3, 3)):
        field = GradientField(linear, sigma, expansive=expansive, alpha=0.7).double()
        x = torch.randn(6, *field.in_shape, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(field.potential(x).sum(), x)
        assert torch.allclose(field(x), gradient, rtol=0, atol=1e-12)


def test_a_potential_needs_a_primitive() -> None:
    for field in (GradientField(Dense(2, 2), "arctan"), DiagonalField(2, "arctan")):
        with pytest.raises(InvalidArgument, match=f"{type(field).__name__} with arctan .* no closed-form primitive"):
            field.potential(torch.zeros(1, 2))


@pytest.mark.parametrize("expansive", [False, True])
def test_the_potential_of_a_field_has_the_sign_of_the_field(expansive: bool) -> None:
    ridge = GradientField(Dense(3, 4), "tanh", expansive=expansive)
    x = torch.randn(5, 3, dtype=torch.float64)
    for field in (ridge.double(), PotentialSum(ridge, LinearField(3), sign=-1.0).double()):
        slope = torch.func.grad(lambda y, field=field: potential_of(field, y).sum())(x)
        assert torch.allclose(slope, field(x), rtol=0, atol=1e-13)


def test_what_is_no_gradient_with_a_known_potential_has_none() -> None:
    planar = PlanarField(Dense(2, 2))
    for field in (planar, PotentialSum(LinearField(2), planar), Damping((2,)), MetricField.example(), nn.Linear(2, 1)):
        with pytest.raises(InvalidArgument, match=f"{type(field).__name__} has no known potential"):
            potential_of(field, torch.zeros(1, 2))
    with pytest.raises(InvalidArgument, match="use a Hamiltonian, partitioned or dissipative field"):
        GradientField(Dense(2, 3)).energy(torch.zeros(1, 2))


def test_corollary_2_3_splits_a_mixed_field_into_two_of_opposite_kinds() -> None:
    field = GradientField(Dense(3, 6), leaky_relu(0.25), expansive=True, alpha=1.0).double()
    with torch.no_grad():
        field.alpha.normal_()
        field.bias.normal_()
    parts = field.split()
    x = torch.randn(20, 3, dtype=torch.float64)
    assert torch.allclose(field(x), parts[0](x) + parts[1](x), rtol=0, atol=1e-13)
    assert parts[0].facts().spectrum[0] >= 0
    assert parts[1].facts().cocoercive


PRECONDITIONED = [name for name in FIELD_MAKERS if name.startswith("preconditioned")]


@pytest.mark.parametrize("name", PRECONDITIONED)
@pytest.mark.parametrize("hostile", SPOIL)
def test_the_preconditioner_dominates_the_gram_matrix(name: str, hostile: str) -> None:
    field = spoiled(FIELD_MAKERS[name], hostile)
    matrix = field.linear.dense_matrix()
    scales = -field.per_channel(field.slope_scales()).expand(field.linear.out_shape).flatten().detach()
    symmetric = matrix.mT @ (scales[:, None] * matrix)
    assert torch.linalg.eigvalsh(symmetric).max() <= 1 + 1e-12
    assert field.euler_constant(2.0)[0] <= 1 + 1e-11


@pytest.mark.parametrize(
    "make", [lambda: Dense(3, 5), lambda: Conv((2, 4, 4), 3, 3, "circular")], ids=["dense", "convolution"]
)
def test_the_spectrum_of_a_preconditioned_field_covers_scales_rounded_to_float32(make) -> None:
    """For A >= 0 the exact T has λ_max(AᵀT⁻¹A) = 1; some T as rounded exceed that, so −[0, 1] would be false."""
    largest = []
    for seed in range(50):
        torch.manual_seed(seed)
        field = PreconditionedField(make())
        with torch.no_grad():
            for p in field.linear.parameters():
                p.uniform_()
            field.log_scale.normal_()
            scales = -field.per_channel(field.slope_scales().double()).expand(field.linear.out_shape).flatten()
        matrix = field.linear.dense_matrix()
        largest.append(float(torch.linalg.eigvalsh(matrix.mT @ (scales[:, None] * matrix)).max()))
        assert largest[-1] <= -field.facts().spectrum[0]
    assert max(largest) > 1 + 1e-9


def test_the_scaling_of_a_preconditioner_may_be_anything() -> None:
    field = PreconditionedField(Dense(3, 4)).double()
    with torch.no_grad():
        field.linear.matrix.copy_(torch.randn(4, 3))
        field.log_scale.copy_(torch.tensor([1000.0, -1000.0, 3.0, 0.0]))
    spectrum = field.facts().spectrum
    assert -1 - 1e-12 <= spectrum[0] <= torch.linalg.eigvalsh(dense_jacobians(field)).min() + 1e-12


def test_a_preconditioned_field_refuses_what_its_bound_does_not_cover() -> None:
    for options in ({"stride": 2}, {"groups": 2}):
        with pytest.raises(InvalidArgument, match="stride 1 and groups 1"):
            PreconditionedField(Conv((2, 4, 4), 4, 3, **options))


def test_a_preconditioned_field_of_a_steep_activation_has_its_slope() -> None:
    """A = T = 1: X(x) = −2x, and x + 1.5 X(x) = −2x."""
    field = PreconditionedField(Dense(1, 1), Activation("double", lambda u: 2 * u, 2.0, 2.0), bias=False).double()
    with torch.no_grad():
        field.linear.matrix.fill_(1.0)
        assert field(torch.ones(1, 1, dtype=torch.float64)).item() == -2.0
    assert field.facts().spectrum[0] == pytest.approx(-2.0, rel=1e-12)
    assert 2.0 <= field.euler_constant(1.5)[0] <= 2.0 + 1e-12


class Signed(PreconditionedField):
    """Its second unit expands, three times as fast as the first one contracts."""

    def slope_scales(self) -> Tensor:
        return super().slope_scales() * self.log_scale.new_tensor([1.0, -3.0])


def test_a_preconditioned_field_of_factors_or_slopes_of_either_sign_has_their_spectrum() -> None:
    """A = T = I: X(x) = (−ReLU(x₁), 3 ReLU(x₂)), and −σ(x) = 2x for σ(x) = −2x."""
    signed = Signed(Dense(2, 2), bias=False).double()
    falling = PreconditionedField(Dense(2, 2), bias=False).double()
    falling.sigma = Activation("falling", lambda u: -2 * u, -2.0, -2.0)
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    for field, rates, ends in ((signed, [-1.0, 3.0], (-1.0, 3.0)), (falling, [2.0, 2.0], (0.0, 2.0))):
        with torch.no_grad():
            field.linear.matrix.copy_(torch.eye(2))
            assert field(x).tolist() == [rates]
        facts = field.facts()
        assert facts.spectrum == pytest.approx(ends, rel=1e-12, abs=0)
        assert facts.one_sided >= max(rates)
        assert field.euler_constant(1.0)[0] >= 1 + max(rates)
        assert not list(false_facts(field, draw(field, 12)))


@pytest.mark.parametrize("factor", [-1.5, 0.0, 0.1, 2.0])
def test_facts_of_a_multiple_of_a_field_hold_of_it(factor: float) -> None:
    class Multiple(GradientField):
        def forward(self, x: Tensor) -> Tensor:
            return factor * super().forward(x)

        def facts(self) -> FieldFacts:
            return GradientField(self.linear, "tanh", bias=False).facts().scaled(factor)

    torch.manual_seed(0)
    field = Multiple(Dense(3, 4), "tanh", bias=False).double()
    assert not list(false_facts(field, draw(field, 12)))
    exact = Fraction(factor) * Fraction(0.3)
    facts = FieldFacts(0.3, 0.3, (0.3, 0.3), damping=0.5, dissipates_energy=True, positive=True).scaled(factor)
    assert Fraction(facts.spectrum[0]) <= exact <= Fraction(facts.spectrum[1])
    assert abs(exact) <= facts.lipschitz <= abs(0.3 * factor) * (1 + 1e-15)
    assert exact <= Fraction(facts.one_sided)
    assert facts.damping == factor * 0.5
    assert (facts.dissipates_energy, facts.positive) == (factor >= 0, factor >= 0)
    assert FieldFacts().scaled(factor).lipschitz == math.inf


def test_a_negative_decay_counts_with_its_size() -> None:
    """X(x) = ReLU(x) + x has the slopes 1 and 2."""
    field = TwoMatrixField(Dense(1, 1), Dense(1, 1), "relu", decay=-1.0, bias=False).double()
    with torch.no_grad():
        field.inner.matrix.fill_(1.0)
        field.outer.matrix.fill_(1.0)
        assert field(torch.ones(1, 1, dtype=torch.float64)).item() == 2.0
    for constant in (field.facts().lipschitz, field.facts().one_sided):
        assert 2.0 <= constant <= 2.0 + 1e-12


def test_planar_constants_are_exact() -> None:
    field = PlanarField(Dense(2, 2), leaky_relu(0.5)).double()
    with torch.no_grad():
        field.linear.matrix.normal_()
    jacobians = dense_jacobians(field, 5000)
    for h in (-1.0, -0.1, 0.4, 2.0):
        measured = torch.linalg.matrix_norm(torch.eye(2) + h * jacobians, ord=2).max()
        assert float(measured) == pytest.approx(field.euler_constant(h)[0], rel=1e-12)
    with pytest.raises(InvalidArgument, match="n <= 8"):
        PlanarField(Dense(9, 9))
    with pytest.raises(InvalidArgument, match="n to n"):
        PlanarField(Dense(2, 3))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_have_the_slopes_primitive_and_symmetry_they_declare(name: str) -> None:
    check_activation(ACTIVATIONS[name]())


@pytest.mark.parametrize("slope", [0.0, 0.1, 0.5, 1.0])
def test_leaky_activations_have_the_slopes_they_declare(slope: float) -> None:
    check_activation(leaky_relu(slope))
    check_activation(smooth_leaky_relu(slope))


def check_activation(sigma: Activation) -> None:
    u = torch.linspace(-30, 30, 4001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(sigma(u).sum(), u)
    assert sigma.slope_min - 1e-12 <= slopes.min()
    assert slopes.max() <= sigma.slope_max + 1e-12
    assert slopes.max() >= sigma.slope_max - 2e-3
    assert slopes.min() <= sigma.slope_min + 2e-3
    if sigma.odd:
        assert torch.allclose(sigma(-u), -sigma(u), rtol=1e-12, atol=1e-12)
    if sigma.primitive is not None:
        (derivative,) = torch.autograd.grad(sigma.primitive(u).sum(), u)
        assert torch.allclose(derivative, sigma(u), rtol=0, atol=1e-12)
    if sigma.negative_slope is not None:
        for t, s in itertools.product((-1.0, 0.5), (0.25, 2.0)):
            assert torch.allclose(sigma.flow(sigma.flow(u, t), s), sigma.flow(u, t + s), rtol=1e-12, atol=0)
        small = (sigma.flow(u, 1e-6) - sigma.flow(u, -1e-6)) / 2e-6
        assert torch.allclose(small, sigma(u), rtol=1e-7, atol=1e-8)


def test_bad_activations_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="did you mean 'relu'"):
        activation("relo")
    with pytest.raises(InvalidArgument, match="negative_slope"):
        leaky_relu(-0.1)
    with pytest.raises(InvalidArgument, match="no closed form"):
        activation("tanh").flow(torch.zeros(1), 1.0)
    for a, least, largest in (
        (-1.0, -1.0, 1.0),
        (2.0, 1.0, 2.0),
        (0.5, 0.6, 1.0),
        (0.5, 0.5, 0.9),
        (math.nan, 0.0, 1.0),
    ):
        with pytest.raises(InvalidArgument, match="negative_slope"):
            Activation("other", torch.abs, least, largest, negative_slope=a)
    with pytest.raises(InvalidArgument, match="__call__ of its own"):
        Fivefold("relu", torch.relu, 0.0, 1.0, negative_slope=0.0)
    with pytest.raises(InvalidArgument, match="Ninefold has a flow of its own, of which negative_slope says nothing"):
        Ninefold("relu", torch.relu, 0.0, 1.0, negative_slope=0.0)
    assert Ninefold("relu", torch.relu, 0.0, 1.0).negative_slope is None


class Fivefold(Activation):
    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        return 5 * super().__call__(u)


class Ninefold(Activation):
    """A flow of another σ: exact steps of constant 1 would be 9x."""

    def flow(self, u: torch.Tensor, time: torch.Tensor | float) -> torch.Tensor:
        return 9 * u


def test_a_scale_that_is_no_number_has_no_facts() -> None:
    diagonal, preconditioned = DiagonalField(2), PreconditionedField(Dense(2, 2))
    with torch.no_grad():
        diagonal.scale[1] = torch.nan
        preconditioned.linear.matrix[0, 0] = torch.nan
    for field in (diagonal, preconditioned):
        with pytest.raises(InvalidArgument, match="nan or inf"):
            field.facts()


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_no_field_states_facts_of_parameters_that_are_no_numbers(name: str) -> None:
    """One clear sentence, or facts that promise nothing false: an undefined map has no finite constant."""
    pristine = FIELDS[name].example()
    for parameter, _ in pristine.named_parameters():
        field = copy.deepcopy(pristine)
        with torch.no_grad():
            field.get_parameter(parameter).fill_(torch.nan)
        with contextlib.suppress(InvalidArgument):
            # A bias only moves the field and leaves its constants as they are.
            facts = field.facts()
            assert not math.isnan(facts.lipschitz)
            assert math.isinf(facts.lipschitz) or parameter.endswith("bias")
            assert facts.damping is None or math.isfinite(facts.damping)


STEPPING = (
    *("calvo", "cayley", "euler", "exact", "gonzalez", "heun", "implicit-midpoint"),
    *("patankar", "projected-heun", "strang", "trapezoidal"),
)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", sorted(FIELDS))
def test_no_step_of_parameters_that_are_no_numbers_declares_anything(name: str, bad: float) -> None:
    """Nor the structure that stands for all parameters: what is no number has no norm, sign or volume."""
    pristine = FIELDS[name].example()
    suited = [method for method in STEPPING if integrator(method).why_not(pristine) is None]
    for method in suited:
        block = DynamicalBlock(copy.deepcopy(pristine), method, FreeSignal(0.5))
        for parameter in block.fields.parameters():
            good = parameter.detach().clone()
            with torch.no_grad():
                parameter.fill_(bad)
                # One clear sentence, where the weight of a map cannot be made of it.
                with contextlib.suppress(InvalidArgument):
                    assert not block.properties, method
                parameter.copy_(good)


STRUCTURED: dict[str, tuple[Callable[[], VectorField], str, type[Property]]] = {
    "rotation": (RotationField.example, "cayley", NormPreserving),
    "sphere": (SphereField.example, "lie-euler", NormPreserving),
    "compartments": (CompartmentField.example, "patankar", Positive),
    "halves": (PartitionedField.example, "verlet", Symplectic),
    "damping": (lambda: Damping((2,), 0.5, learned=False), "exact", ConformalSymplectic),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", STRUCTURED)
def test_structure_is_kept_by_steps_and_weights_that_are_numbers(name: str, bad: float) -> None:
    make, method, kind = STRUCTURED[name]
    block = DynamicalBlock(make(), method, LearnedStep(0.5)).double()
    assert block.properties.of(kind) is not None
    with torch.no_grad():
        block.signal.steps.fill_(bad)
        assert not block.properties
        assert "nothing is said of one that is no finite number" in str(explain(block))
        block.signal.steps.fill_(0.5)
        for parameter in block.fields.parameters():
            good = parameter.clone()
            parameter.view(-1)[-1] = bad
            assert not block.properties
            assert "holds nan or inf" in str(explain(block))
            parameter.copy_(good)
    assert block.properties.of(kind) is not None


class Masked(nn.Module):
    """A force behind a mask of −∞, as those of an attention have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([[0.0, -math.inf], [0.0, 0.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mask.softmax(dim=1)


def test_a_mask_of_infinity_takes_no_structure_and_one_of_nan_does() -> None:
    block, x = DynamicalBlock(ShearField(Masked(), (4,)), "exact", FreeSignal(0.5)).double(), torch.randn(3, 4)
    assert block.properties.of(VolumePreserving) is not None
    verify(block, x).require()
    block.fields[0].force.mask[0, 0] = math.nan
    assert not block.properties


def test_what_has_no_numbers_yet_is_not_asked_for_them() -> None:
    meta, lazy = CompartmentField.example().to("meta"), ShearField(nn.LazyLinear(2), (4,))
    assert integrator("heun").declare(meta, 0.5).properties.of(LinearInvariant) is not None
    assert integrator("exact").declare(lazy, 0.5).properties.of(VolumePreserving) is not None


def test_a_sum_with_a_part_that_is_no_gradient_is_none() -> None:
    rotation = PlanarField(Dense(2, 2))
    for field in (PotentialSum(LinearField(2), rotation), EvenPotential(rotation)):
        assert not field.facts().conservative
    assert PotentialSum(LinearField(2), GradientOf(nn.Linear(2, 1), (2,))).facts().conservative
    assert EvenPotential(GradientOf(nn.Linear(2, 1), (2,))).facts().conservative


def test_an_even_potential_doubles_a_constant_without_a_spectrum_too() -> None:
    class Stated(IdentityField):
        def facts(self) -> FieldFacts:
            return FieldFacts(1.0, 1.0, conservative=True, odd=True)

    field, x = EvenPotential(Stated((2,))), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert torch.equal(field(x), 2 * x)
    assert (field.facts().lipschitz, field.facts().one_sided) == (2.0, 2.0)


def test_a_symmetry_under_another_group_makes_no_shear_odd() -> None:
    class Permuted(Structured):
        in_shape = out_shape = (2,)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

        def declare(self) -> Declaration:
            return Declaration.of(Equivariant("permutations"), reason="entrywise")

    assert not ShearField(Permuted(), (4,)).facts().odd


def test_constants_beyond_all_numbers_are_infinite() -> None:
    field = GradientField(Dense(3, 3).double())
    huge = DynamicalBlock(field, ExplicitEuler(16), FreeSignal(1e22))
    assert huge.properties.lipschitz == math.inf
    with torch.no_grad():
        field.linear.matrix.mul_(1e160)
    assert field.facts().lipschitz == math.inf


@pytest.mark.parametrize("name", ["softplus", "smooth-leaky-relu"])
def test_an_activation_does_not_jump(name: str) -> None:
    u = torch.linspace(15.0, 45.0, 200_001, dtype=torch.float64)
    rise = activation(name).function(u).diff() / u.diff()
    assert float(rise.min()) >= 0
    assert float(rise.max()) <= 1 + 1e-9


def test_a_scale_that_is_not_a_number_declares_nothing() -> None:
    field = GradientField(Dense(3, 2), "relu", alpha=1.0)
    with torch.no_grad():
        field.alpha[0] = math.nan
    with pytest.raises(InvalidArgument, match="nan or inf"):
        field.facts()


def test_halves_of_different_size_need_a_map_between_them() -> None:
    with pytest.raises(InvalidArgument, match="the halves must be equal"):
        PartitionedField(None, nn.Linear(1, 2), (3,), split=1)


def test_the_parts_of_a_field_have_its_number_format() -> None:
    expansive, contractive = GradientField(Dense(3, 2)).double().split()
    assert expansive.alpha.dtype == contractive.alpha.dtype == torch.float64
    assert (expansive.alpha.tolist(), contractive.alpha.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def test_slopes_of_either_sign_count_by_their_size_and_others_are_refused() -> None:
    torch.manual_seed(0)
    sine = Activation("sin", torch.sin, -1.0, 1.0, odd=True)
    steep = Activation("steep", lambda u: torch.where(u > 0, -2 * u, 0.5 * u), -2.0, 0.5)
    assert (sine.lipschitz, steep.lipschitz) == (1.0, 2.0)
    x = torch.randn(200, 3, dtype=torch.float64)
    for field in (TwoMatrixField(Dense(3, 4), Dense(3, 4), steep), MassPreservingField(3, 4, sigma=steep)):
        field = field.double()
        y = x + 1e-4 * torch.randn_like(x)
        with torch.no_grad():
            assert ((field(x) - field(y)).norm(dim=1) <= field.facts().lipschitz * (x - y).norm(dim=1)).all()
    with pytest.raises(InvalidArgument, match=r"sin has slopes down to -1; .* monotone"):
        PreconditionedField(Dense(3, 4), sine)
    for slopes in ((1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(InvalidArgument, match="two finite numbers"):
            Activation("odd one", torch.sin, *slopes)


def test_an_activation_that_learns_is_refused() -> None:
    """It is no module, so that no field would have its parameters, in training or in a state dict."""
    for function, primitive in ((nn.PReLU(), None), (torch.relu, nn.PReLU())):
        with pytest.raises(InvalidArgument, match=r"a function of prelu is a PReLU with parameters, .*; learn them as"):
            Activation("prelu", function, 0.0, 1.0, primitive)
    field = GradientField(Dense(2, 3), Activation("module without parameters", nn.Tanh(), 0.0, 1.0)).double()
    x = torch.randn(4, 2, dtype=torch.float64)
    expected = -field.linear.adjoint(field.linear.affine(x, field.bias).tanh())
    torch.testing.assert_close(field(x), expected, rtol=1e-13, atol=1e-13)


class LouderDense(Dense):
    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return 9 * super().multiply(weight, x)


class ReturningConv(Conv):
    """It says how large it is, and its weight is no kernel of it all the same."""

    def adjoint(self, y: Tensor) -> Tensor:
        return -super().adjoint(y)

    def compute_norm_bounds(self) -> Bounds:
        return super().compute_norm_bounds()


class HalfDense(Dense):
    def compute_weight(self) -> Tensor:
        return 0.5 * self.matrix


def test_a_preconditioner_is_made_of_weights_that_are_the_map_alone() -> None:
    for linear in (LouderDense(3, 3), ReturningConv((1, 3, 3), 2)):
        with pytest.raises(InvalidArgument, match=f"which is not known of {type(linear).__name__}; give a Dense"):
            PreconditionedField(linear)
    # However the weight is made, T is made of it.
    plain = HalfDense(3, 4), UnitDense(3, 4).eval(), ChannelMix((2, 3, 3), 2)
    for linear in (*plain, OrthogonalConv((2, 3, 3)), NormalisedConv((1, 3, 3), 2)):
        field = PreconditionedField(linear).double()
        assert not list(false_facts(field, draw(field, 12)))


class Tenth(Dense):
    """A tenth of A by images of its own, as its bounds say."""

    def affine(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().affine(0.1 * x, bias)

    def adjoint(self, y: Tensor) -> Tensor:
        return 0.1 * super().adjoint(y)

    def compute_norm_bounds(self) -> Bounds:
        return Bounds(0.0, 0.10001 * super().compute_norm_bounds().upper, exact=False, method="a tenth of A")


def test_a_map_of_images_of_its_own_is_that_map_wherever_it_is_called() -> None:
    """By itself, and in Euler steps, which take a weight times h of other maps: with A they would be x − 19Aᵀ tanh."""
    linear, x = Tenth(3, 3).double(), torch.randn(12, 3, dtype=torch.float64)
    torch.testing.assert_close(linear(x), 0.1 * x @ linear.matrix.mT, rtol=0, atol=1e-14)
    assert linear.properties.lipschitz < 0.11
    verify(linear, x).require()
    field = GradientField(linear, "tanh", bias=False)
    block = DynamicalBlock(field, "euler", FreeSignal(190.0)).double()
    assert block.properties.lipschitz == 1.0
    torch.testing.assert_close(block(0.1 * x), 0.1 * x + 190.0 * field(0.1 * x), rtol=0, atol=1e-13)
    verify(block, 0.1 * x).require()


class Friction(ShearField):
    """X(q, p) = (0, −p), by a rate that reads the half that it moves."""

    def rate(self, rests: Tensor, moves: Tensor) -> Tensor:
        return -moves

    def facts(self) -> FieldFacts:
        return FieldFacts.of_spectrum(-1.0, 0.0, odd=True, reason="friction")


def test_a_shear_with_a_rate_of_its_own_has_no_flow_of_the_one_before() -> None:
    """Φ_t is (q, e^{−t}p), and no x + tX(x)."""
    field, x = Friction(nn.Linear(2, 2), (4,)).double(), torch.randn(5, 4, dtype=torch.float64)
    assert not list(false_facts(field, x))
    solution = torch.cat([x[:, :2], math.exp(-3.0) * x[:, 2:]], dim=1)
    assert not torch.allclose(field.flow(x, 3.0), solution)
    assert field.why_no_flow() == "Friction has a rate of its own, and no flow to go with it"
    for method in ("exact", "strang"):
        with pytest.raises(InvalidArgument, match="Friction has a rate of its own"):
            DynamicalBlock(field, method, FreeSignal(3.0))


class Scaled(IdentityField):
    """X(x) = cx, whose spectrum is c and nothing else."""

    def __init__(self, factor: float) -> None:
        super().__init__((2,))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x

    def potential(self, x: Tensor) -> Tensor:
        return self.factor * super().potential(x)

    def facts(self) -> FieldFacts:
        return FieldFacts.of_spectrum(self.factor, self.factor, odd=True, reason="exact")


@pytest.mark.parametrize("factors", [(1.0, 1.5 * 2.0**-53, -1.0), (0.1, 0.2, -0.3), (1e16, 1.0, -1e16, 1.0)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_spectrum_of_a_sum_that_cancels_holds_the_exact_one(factors: tuple[float, ...], sign: float) -> None:
    low, high = PotentialSum(*map(Scaled, factors), sign=sign).facts().spectrum
    exact = Fraction(sign) * sum(map(Fraction, factors))
    assert Fraction(low) <= exact <= Fraction(high)
    assert high - low <= 1e-14 * sum(map(abs, factors))


def test_constants_of_weights_whose_squares_underflow_are_rounded_up() -> None:
    ridge = GradientField(Dense(1, 1), leaky_relu(1.0), expansive=True).double()
    falling = DissipativeField(1, LinearField(1)).double()
    with torch.no_grad():
        ridge.linear.matrix.fill_(1e-170)
        falling.factor.fill_(1e-170)
        falling.slope.matrix.fill_(1.0)
    exact = Fraction(1e-170) ** 2
    low, high = ridge.facts().spectrum
    assert Fraction(low) <= exact <= Fraction(high)
    assert exact <= Fraction(falling.facts().lipschitz) < Fraction(1e-300)
    with torch.no_grad():
        ridge.linear.matrix.zero_()
        falling.factor.zero_()
    assert ridge.facts().spectrum == (0.0, 0.0)
    assert falling.facts().lipschitz == 0.0


def test_numbers_that_overflow_against_each_other_bound_nothing() -> None:
    """X(x) = −1e308 x: in √(1 + 2hμ + h²L²) the terms are −∞ and ∞."""

    class Steep(Scaled):
        def facts(self) -> FieldFacts:
            return FieldFacts(1e308, -1e308, reason="exact")

    assert Steep(-1e308).euler_constant(1.0)[0] == pytest.approx(1e308)
    assert Steep(-1e308).euler_constant(10.0)[0] == math.inf
    ridge = GradientField(Dense(2, 2))
    for ends in ((math.nan, 0.0), (0.0, math.nan), (-math.inf, math.nan)):
        assert ridge.update_spectrum(*ends) == (-math.inf, math.inf)


class InPlace(nn.Module):
    """x ↦ W ReLU(x), where the ReLU is written over x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu_(x))


class OutOfPlace(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(x))


SHEARS = {
    "kick": lambda force: ShearField(force, (4,)),
    "drift": lambda force: ShearField(force, (4,), moves="q"),
    "halves": lambda force: PartitionedField(None, force, (4,)),
}


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", SHEARS)
def test_a_force_that_is_written_over_the_half_that_rests_is_refused(name: str, quiet: type[torch.no_grad]) -> None:
    field, x = SHEARS[name](InPlace()), torch.randn(3, 4)
    steps = [field] if name == "halves" else [field, lambda x: field.flow(x, 0.5)]
    with quiet():
        for step in steps:
            with pytest.raises(InvalidArgument, match=r"the force \(InPlace\) changes its input in place"):
                step(x.clone() if quiet is not torch.inference_mode else x)


@pytest.mark.parametrize("name", SHEARS)
def test_a_force_gets_a_copy_where_nobody_counts_what_it_writes(name: str) -> None:
    """Of inference tensors and under torch.func: there the half that rests stays as it is."""
    force, twin = InPlace(), OutOfPlace()
    twin.load_state_dict(force.state_dict())
    field, expected = SHEARS[name](force), SHEARS[name](twin)
    x = torch.randn(3, 4)
    with torch.inference_mode():
        inside = x.clone()
        torch.testing.assert_close(field(inside), expected(x), rtol=0, atol=1e-5)
        assert torch.equal(inside, x)
    mapped = torch.func.vmap(lambda v: field(v[None])[0])(x)
    torch.testing.assert_close(mapped, expected(x), rtol=0, atol=1e-5)


def test_what_follows_from_a_fact_is_drawn_and_a_better_bound_is_kept() -> None:
    alone = FieldFacts(spectrum=(-2.0, 0.5))
    assert alone == FieldFacts(2.0, 0.5, (-2.0, 0.5), conservative=True)
    assert replace(alone, odd=True) == FieldFacts(spectrum=(-2.0, 0.5), odd=True)
    better, worse = FieldFacts(1.5, 0.25, (-2.0, 0.5)), FieldFacts(3.0, 1.0, (-2.0, 0.5))
    assert (better.lipschitz, better.one_sided) == (1.5, 0.25)
    assert (worse.lipschitz, worse.one_sided) == (2.0, 0.5)
    assert [FieldFacts(1.0, given).one_sided for given in (math.inf, 2.0, -0.5)] == [1.0, 1.0, -0.5]
    assert FieldFacts(hamiltonian=True).divergence_free
    assert not FieldFacts(conservative=True).divergence_free


def test_constants_and_gradients_alone_are_those_of_a_metric() -> None:
    metric = DenseMetric(torch.diag(torch.tensor([1.0, 0.5])))
    facts = FieldFacts(spectrum=(-2.0, 0.5), hamiltonian=True, tangent=True, damping=0.25, metric=metric)
    assert (facts.lipschitz, facts.one_sided, facts.conservative, facts.divergence_free) == (2.0, 0.5, True, True)
    there = facts.euclidean()
    assert (there.spectrum, there.conservative, there.metric.name) == (None, False, "l2")
    assert there.lipschitz == there.one_sided >= 2.0 * math.sqrt(2.0)
    kept = ("divergence_free", "hamiltonian", "tangent", "damping")
    assert [getattr(there, name) for name in kept] == [getattr(facts, name) for name in kept]


class InMetric(VectorField):
    """X(x) = Jx on the plane, and facts whose constants are those of the metric of M = diag(4, 1)."""

    metric = DenseMetric(torch.diag(torch.tensor([4.0, 1.0])))

    def __init__(self, matrix: list[list[float]], **facts: object) -> None:
        super().__init__()
        self.in_shape, self.claim = (2,), FieldFacts(odd=True, metric=self.metric, **facts)
        self.register_buffer("matrix", torch.tensor(matrix, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def facts(self) -> FieldFacts:
        return self.claim


def test_a_field_is_hamiltonian_in_l2_whatever_the_metric_of_its_constants_is() -> None:
    """(q, −p/4) = 𝕁M⁻¹∇H for H = qp keeps no form of ℓ2: a step of h = 1 has the determinant 3 · (7/9)."""
    x, midpoint = torch.randn(3, 2, dtype=torch.float64), integrator("implicit-midpoint")
    scaled = InMetric([[1.0, 0.0], [0.0, -0.25]], lipschitz=1.0, hamiltonian=True)
    assert [told.split(":")[0] for told in false_facts(scaled, x)] == ["divergence_free", "hamiltonian"]
    volumes = torch.linalg.det(jacobians(lambda v: midpoint.step(scaled, v, 1.0), x))
    torch.testing.assert_close(volumes, torch.full_like(volumes, 7 / 3), rtol=1e-6, atol=0)
    field = InMetric([[1.0, 0.0], [0.0, -1.0]], lipschitz=1.0, hamiltonian=True)
    assert not list(false_facts(field, x))
    block = DynamicalBlock(field, midpoint, FreeSignal(0.5)).double()
    assert block.properties.of(Symplectic) is not None
    assert block.properties.of(VolumePreserving) is not None
    assert block.properties.lipschitz_in(InMetric.metric) < math.inf == block.properties.lipschitz
    verify(block, x).require()


def test_a_field_is_tangent_to_the_spheres_of_l2_whatever_the_metric_of_its_constants_is() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    turning = InMetric([[0.0, 1.0], [-1.0, 0.0]], lipschitz=2.0, tangent=True)
    total = SumField(turning, RotationField(2)).double()
    assert total.facts().tangent
    assert not [*false_facts(turning, x), *false_facts(total, x)]
    for field in (turning, total):
        block = DynamicalBlock(field, "calvo", FreeSignal(0.5)).double()
        assert block.properties.of(NormPreserving) is not None
        verify(block, x).require()


def test_a_field_that_states_its_spectrum_alone_is_a_gradient() -> None:
    class Stated(IdentityField):
        def facts(self) -> FieldFacts:
            return FieldFacts(spectrum=(1.0, 1.0))

    shear = ShearField(Stated((2,))).double()
    assert shear.facts().hamiltonian
    block = DynamicalBlock(shear, "exact", FreeSignal(0.5))
    verify(block, torch.randn(4, 4), kinds=(Symplectic,)).require()


@pytest.mark.parametrize("name", ["energy", "flow", "terms", "facts", "forward", "flow_constant", "example", "double"])
def test_a_part_of_a_field_is_not_hidden_by_a_method_of_its_name(name: str) -> None:
    class Hiding(IdentityField):
        def __init__(self, part: nn.Module | nn.Parameter) -> None:
            super().__init__((2,))
            setattr(self, name, part)

    for part in (nn.Linear(2, 1), nn.Parameter(torch.zeros(2))):
        kind = type(part).__name__
        with pytest.raises(InvalidArgument, match=rf"^Hiding sets self\.{name} to a {kind}, .* choose another name"):
            Hiding(part)
    field = IdentityField((2,))
    field.energy_part = nn.Linear(2, 1)
    assert [path for path, _ in field.named_parameters()] == ["energy_part.weight", "energy_part.bias"]


def test_a_part_is_not_hidden_by_what_its_own_class_has() -> None:
    class OwnGradient(EnergyField):
        def __init__(self) -> None:
            super().__init__()
            self.gradient = nn.Linear(2, 2)

    class OwnSign(GradientField):
        def __init__(self) -> None:
            super().__init__(Dense(2, 2))
            self.sign = nn.Linear(1, 1)

    class Default(IdentityField):
        inner: nn.Module | None = None

        def __init__(self) -> None:
            super().__init__((2,))
            self.inner = nn.Linear(2, 2)

    for kind, hiding in (
        (OwnGradient, "the method gradient of EnergyField"),
        (OwnSign, "the property sign of GradientField"),
        (Default, "the attribute inner of Default"),
    ):
        with pytest.raises(InvalidArgument, match=rf"^{kind.__name__} sets self\.\w+.* which {hiding} would hide"):
            kind()


class OwnMatrix(LinearMap):
    """x ↦ Wx for a W that is kept under a name of its own."""

    in_shape = out_shape = (2,)

    def __init__(self, name: str, matrix: Tensor) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, matrix)

    def compute_weight(self) -> Tensor:
        return getattr(self, self.name)

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        return x @ weight.mT

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        return y @ weight

    def compute_norm_bounds(self) -> Bounds:
        return Bounds(0.0, math.inf, exact=False, method="unknown")


def test_the_weight_of_a_map_is_computed_of_parts_with_other_names() -> None:
    """``self.weight`` would be found to be what is computed of it, and so on forever."""
    matrix = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    for name in ("weight", "features", "forward"):
        for part in (nn.Parameter(matrix), nn.Buffer(matrix)):
            with pytest.raises(InvalidArgument, match=rf"^OwnMatrix sets self\.{name} .* such as self\.{name}_part\.$"):
                OwnMatrix(name, part)
    linear, x = OwnMatrix("matrix", nn.Parameter(matrix)), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert linear(x).tolist() == [[-1.0, -2.0]]
    assert linear.adjoint(x).tolist() == [[-2.0, -3.0]]
    with shared_weights(linear):
        assert linear.weight is linear.matrix
    assert [name for name, _ in linear.named_parameters()] == ["matrix"]


def test_a_field_without_a_flow_says_what_to_write() -> None:
    x, sentence = torch.zeros(1, 4), r"DiagonalField implements none; give it flow\(x, time\), or terms\(\) for"
    for call in (DiagonalField(4).flow, DiagonalField(4).flow_log_determinant):
        with pytest.raises(InvalidArgument, match=sentence):
            call(x, 0.5)
    for field in (PartitionedField.example(), SumField(DiagonalField(4), LinearField(4))):
        with pytest.raises(InvalidArgument, match=f"{type(field).__name__} implements none; take a splitting method"):
            field.flow(x, 0.5)
    assert "DiagonalField implements none" in str(integrator("strang").why_not(SumField(DiagonalField(4))))


def linear_field(bias: bool) -> LinearField:
    field = LinearField(3, bias=bias).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
    return field


def exact_flow(field: LinearField, time: float) -> tuple[Tensor, Tensor]:
    """E and v of x ↦ Ex + v by eigenvalues: scipy's expm is off by 5e-13 of E here."""
    values, vectors = torch.linalg.eigh(field.symmetric().detach())
    exponential = (vectors * torch.exp(time * values)) @ vectors.mT
    if field.bias is None:
        return exponential, torch.zeros(3, dtype=torch.float64)
    return exponential, (vectors * (torch.expm1(time * values) / values)) @ vectors.mT @ field.bias.detach()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("time", [0.7, -1.3, 4.0])
def test_the_flow_of_a_linear_field_is_the_exponential(bias: bool, time: float) -> None:
    field, x = linear_field(bias), torch.randn(5, 3, dtype=torch.float64)
    matrix, shift = exact_flow(field, time)
    largest = max(1.0, float(matrix.abs().max()), float(shift.abs().max()))
    with torch.no_grad():
        moved = field.flow(x, time)
        assert torch.allclose(moved, x @ matrix.mT + shift, rtol=0, atol=1e-12 * largest)
        volume = field.flow_log_determinant(x, time)
        exponents = time * torch.linalg.eigvalsh(field.symmetric())
    assert torch.allclose(volume, exponents.sum().expand(5), rtol=1e-12, atol=1e-12)
    # For t < 0 it is e^{−λt} for the least eigenvalue λ, not e^{|t|L}.
    norm = float(torch.linalg.matrix_norm(matrix, ord=2))
    assert norm * (1 - 1e-12) <= field.flow_constant(time)[0] <= norm * (1 + 1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_flow_takes_a_time_a_state_and_has_gradients(bias: bool) -> None:
    field, x = linear_field(bias), torch.randn(4, 3, dtype=torch.float64)
    times = torch.tensor([[-0.5], [0.0], [0.25], [2.0]], dtype=torch.float64)
    together = field.flow(x, times)
    alone = torch.cat([field.flow(part, float(time)) for part, time in zip(x.split(1), times, strict=True)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12)
    volume = times[:, 0] * field.symmetric().trace()
    assert torch.allclose(field.flow_log_determinant(x, times), volume, rtol=0, atol=1e-12)
    zero = LinearField(3, bias=bias, spread=0.0).double()  # its eigenvalues coincide
    for start in (field, zero):
        inputs = (x.clone().requires_grad_(True), times.clone().requires_grad_(True), *start.parameters())
        assert torch.autograd.gradcheck(lambda x, t, *parameters, start=start: start.flow(x, t), inputs)


def test_a_linear_flow_is_declared_invertible_as_far_as_digits_are_left() -> None:
    field = linear_field(True)
    short = 10.0 / field.facts().lipschitz
    declared = ExactFlow().declare(field, short)
    assert declared.properties.of(Invertible) is not None
    block = DynamicalBlock(field, "exact", FreeSignal(short)).double()
    verify(block, torch.randn(4, 3)).require()
    assert ExactFlow().declare(field, 2 * short).properties.of(Invertible) is None


@pytest.mark.parametrize("time", [1.0, -1.0])
def test_a_long_linear_flow_has_no_inverse_either_way(time: float) -> None:
    """Eigenvalues ±30: (1, 1) and (1, −1) grow by e³⁰ one way, and e⁻³⁰ of that is below the rounding of cosh 30."""
    field, flow = LinearField(2).double(), ExactFlow()
    with torch.no_grad():
        field.matrix.copy_(torch.tensor([[0.0, 30.0], [30.0, 0.0]]))
        x = torch.tensor([[1.0, math.copysign(1.0, time)]], dtype=torch.float64)
        missed = float((flow.inverse(field, flow.step(field, x, time), time) - x).abs().max())
    assert missed > 0.5
    assert flow.declare(field, time).properties.of(Invertible) is None


def test_hessian_bounds_that_are_given_open_constants_and_are_refuted_where_they_are_wrong() -> None:
    class Bowl(nn.Module):
        """Σ √(1 + xᵢ²), whose Hessian has the eigenvalues (1 + xᵢ²)^{−3/2} in (0, 1]."""

        def forward(self, x: Tensor) -> Tensor:
            return (1 + x.square()).sqrt().sum(1)

    honest = GradientOf(Bowl(), (3,), spectrum=(0.0, 1.0))
    facts = honest.facts()
    assert (facts.lipschitz, facts.one_sided, facts.conservative) == (1.0, 1.0, True)
    assert honest.standing_facts() == facts
    assert not list(false_facts(honest, draw(honest, 20)))
    for wrong in ((0.0, 0.5), (0.5, 1.0)):
        assert "facts at the start" in check_field(GradientOf(Bowl(), (3,), spectrum=wrong)).failed
    assert GradientOf(Bowl(), (3,)).facts().lipschitz == math.inf
    with pytest.raises(InvalidArgument, match=r"^spectrum is \(1.0, 0.0\); two numbers"):
        GradientOf(Bowl(), (3,), spectrum=(1.0, 0.0))


CLOSED = {
    "sum of gradients": {"conservative"},
    "sum in another metric": set(),
    "sum of Hamiltonians": {"hamiltonian", "divergence_free", "conserves_energy"},
    "sum with damping": {"damping"},
    "sum of tangents": {"tangent"},
    "sum of exchanges": {"linear_invariants"},
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_sum_is_what_all_of_its_parts_are(name: str) -> None:
    """That this is true is measured with the other fields above."""
    field = FIELD_MAKERS[name]()
    facts = field.facts()
    kinds = ("conservative", "linear_invariants", "divergence_free", "hamiltonian", "damping", "tangent", "positive")
    assert {kind for kind in (*kinds, "conserves_energy", "dissipates_energy") if getattr(facts, kind)} == CLOSED[name]
    assert (facts.spectrum is not None) == (name == "sum of gradients")
    x = draw(field.double(), 3)
    assert torch.allclose(field(x), sum(part(x) for part in field.fields), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fact", "make"),
    [
        ("linear_invariants", lambda: MassPreservingField(3, 5)),
        ("tangent", lambda: RotationField(3)),
        ("damping", lambda: Damping((4,), 0.5, learned=False)),
    ],
)
def test_what_holds_of_one_part_alone_is_not_said_of_a_sum(fact: str, make) -> None:
    """Beside Sx: 1ᵀX gains 1ᵀSx, ⟨x, X⟩ gains xᵀSx, and 𝕁S is symmetric for few S."""
    part = make()
    other = LinearField(*part.in_shape)
    assert getattr(part.facts(), fact)
    for field in (SumField(part, other), SumField(other, part)):
        for facts in (field.facts(), field.standing_facts()):
            assert not getattr(facts, fact)


def test_a_sum_keeps_the_invariants_that_all_of_its_parts_keep() -> None:
    both = ConstrainedField(LinearField(4), [None, (1.0, -2.0, 0.5, 0.0)])
    one, other = MassPreservingField(4, 5), MassPreservingField(4, 5, weights=(1.0, 2.0, 3.0, 4.0))
    assert SumField(both, one).facts().linear_invariants == (None,)
    assert SumField(both, one, other).facts().linear_invariants == ()


def test_constants_of_a_sum_are_the_sums_and_no_less() -> None:
    class Hopeful(SumField):
        def facts(self) -> FieldFacts:
            return replace(super().facts(), one_sided=1.0)

    parts = IdentityField((2,)), IdentityField((2,))
    facts = SumField(*parts).facts()
    for constant in (facts.lipschitz, facts.one_sided, *facts.spectrum):
        assert constant == pytest.approx(2.0, rel=1e-14)
    assert facts.spectrum[0] <= 2.0 <= min(facts.spectrum[1], facts.lipschitz, facts.one_sided)
    x = torch.randn(3, 2, dtype=torch.float64)
    assert not list(false_facts(SumField(*parts), x))
    assert next(false_facts(Hopeful(*parts), x)).startswith("one_sided: ")
    cancelling = PotentialSum(*map(Scaled, (1.0, 1.5 * 2.0**-53, -1.0)))
    assert cancelling.facts().one_sided >= 1.5 * 2.0**-53


@pytest.mark.parametrize("name", ["sum of Hamiltonians", "sum with damping"])
def test_a_sum_conforms_and_its_splitting_does(name: str) -> None:
    check_field(FIELD_MAKERS[name]()).require()
    if name == "sum with damping":
        check_block(DynamicalBlock(FIELD_MAKERS[name](), "strang", FreeSignal(0.5))).require()


@pytest.mark.parametrize(("method", "order"), [("lie-trotter", 1), ("strang", 2), ("yoshida4", 4)])
def test_splittings_of_three_linear_fields_have_their_order(method: str, order: int) -> None:
    field = SumField(LinearField(3), SumField(LinearField(3), LinearField(3))).double()
    assert [type(term) for term in field.terms()] == [LinearField] * 3
    x = torch.randn(5, 3, dtype=torch.float64)
    total = LinearField(3).double()
    with torch.no_grad():
        total.matrix.copy_(sum(term.matrix for term in field.terms()))
        exact, errors = x @ exact_flow(total, 1.0)[0].mT, []
        for steps in (16, 32):
            y = x
            for _ in range(steps):
                y = integrator(method).step(field, y, 1 / steps)
            errors.append(float((y - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_the_terms_of_a_potential_sum_are_its_fields_unless_it_is_turned_round() -> None:
    fields = LinearField(2), DiagonalField(2)
    assert PotentialSum(*fields).terms() == fields
    opposite = PotentialSum(*fields, sign=-1.0)
    assert opposite.terms() == (opposite,)
    check_field(opposite).require()


def test_the_opposite_of_a_damped_field_grows_and_that_of_a_positive_one_may_lose_its_signs() -> None:
    growing = PotentialSum(Damping((4,), 0.25, learned=False), sign=-1.0)
    assert growing.facts().damping == -0.25
    assert CompartmentField.example().facts().positive
    assert not PotentialSum(CompartmentField.example(), sign=-1.0).facts().positive


def test_what_is_no_sum_is_refused_in_one_sentence() -> None:
    for given, message in (
        ((), "give at least one"),
        ((LinearField(2), nn.Linear(2, 2)), r"fields\[1\] is a Linear; a VectorField is needed"),
        ((LinearField(2), LinearField(3)), r"shapes \[\(2,\), \(3,\)\]; give fields of one in_shape"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            SumField(*given)
    with pytest.raises(InvalidArgument, match="SumField has no energy"):
        SumField(LinearField(2)).energy(torch.zeros(1, 2))


def test_a_sum_of_potentials_has_a_sign_and_no_factor() -> None:
    with pytest.raises(InvalidArgument, match=r"sign is 2\.0; 1\.0 or -1\.0 is needed"):
        PotentialSum(LinearField(2), sign=2.0)


@pytest.mark.parametrize(("dtype", "invertible"), [(torch.float64, True), (torch.float32, False)])
def test_a_linear_flow_is_invertible_where_its_number_format_leaves_digits(
    dtype: torch.dtype, invertible: bool
) -> None:
    field = LinearField(3).to(dtype)
    with torch.no_grad():
        turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
        field.matrix.copy_(turn @ torch.diag(torch.tensor([-14.0, 0.3, 14.0])) @ turn.mT)
    block = DynamicalBlock(field, "exact", FreeSignal(1.0))
    assert (block.properties.of(Invertible) is not None) == invertible
    x = torch.ones(1, 3, dtype=dtype)
    with torch.no_grad():
        missed = float((block.inverse(block(x)) - x).abs().max())
    assert (missed < 0.1) == invertible


def test_a_linear_flow_with_a_huge_bias_has_no_inverse_to_rounding() -> None:
    field = LinearField(3, bias=True).double()
    with torch.no_grad():
        turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
        field.matrix.copy_(turn @ torch.diag(torch.tensor([-14.0, 0.3, 14.0])) @ turn.mT)
        for bias, invertible in ((1.0, True), (1e8, False)):
            field.bias.fill_(bias)
            found = ExactFlow().declare(field, 1.0).properties.of(Invertible)
            assert (found is not None) == invertible


@pytest.mark.parametrize("step_size", [1e-300, 1e-17, 1e-15, 0.5, 1.0])
def test_a_contractive_step_however_small_declares_one(step_size: float) -> None:
    field = GradientField(Dense(3, 2), "tanh").double()
    low = -field.facts().spectrum[0]
    assert ExplicitEuler().declare(field, step_size / low).properties.lipschitz == 1.0
    with torch.no_grad():
        field.linear.matrix.zero_()
    assert ExplicitEuler().declare(field, step_size).properties.lipschitz == 1.0


def test_a_sum_within_a_sum_has_the_energy_that_its_parts_have() -> None:
    class Nameless(VectorField):
        in_shape = (2,)

        def forward(self, x: Tensor) -> Tensor:
            return x.flip(1) * x.new_tensor([1.0, -1.0])

        def facts(self) -> FieldFacts:
            return FieldFacts(1.0, hamiltonian=True, odd=True)

    known = SeparableHamiltonian(entries=2)
    for field, has_energy in ((SumField(SumField(known), known), True), (SumField(SumField(Nameless()), known), False)):
        assert field.facts().conserves_energy == field.standing_facts().conserves_energy == has_energy


def test_a_sum_with_a_forward_of_its_own_is_no_sum_of_its_terms() -> None:
    class Twice(SumField):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    field = Twice(ShearField.example(), Damping((4,), 0.3))
    assert field.terms() == (field,)
    assert integrator("strang").why_not(field) is not None


@pytest.mark.parametrize(("claim", "code"), [(claim, code) for claim, codes in SAID_OF.items() for code in codes])
def test_what_is_said_of_a_method_is_not_said_of_the_one_that_replaces_it(claim: str, code: str) -> None:
    def own(self: VectorField) -> None: ...

    def other(self: VectorField) -> None: ...

    said = type("Said", (VectorField,), {claim: own, code: own})
    replaced = type("Replaced", (said,), {code: other})
    honest = type("Honest", (said,), {code: other, claim: other})
    silent = _no_facts if claim == "facts" else vars(VectorField)[claim]
    assert [getattr(kind, claim) for kind in (said, replaced, honest)] == [own, silent, other]


@pytest.mark.parametrize(("factor", "falls"), [(2.0, True), (-2.0, False)])
def test_a_damped_field_of_another_kinetic_energy_has_no_constant_structure(factor: float, falls: bool) -> None:
    """With T = c‖p‖²/2 the damping −γp is that of γ/c in S, which would brake by −cγp for γ."""
    field = DampedHamiltonian(Scaled(factor), LinearField(2), 4, gamma=0.5, learned=False)
    assert "S∇H for T(p) = ‖p‖²/2 only" in str(integrator("gonzalez").why_not(field))
    assert field.facts().dissipates_energy == falls
    assert not field.standing_facts().dissipates_energy
    check_field(field).require()
    assert integrator("gonzalez").why_not(DampedHamiltonian(None, LinearField(2), 4)) is None


def log_cosh(u: Decimal) -> Decimal:
    return ((u.exp() + (-u).exp()) / 2).ln()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_primitive_of_tanh_has_its_digits_near_0(dtype: torch.dtype) -> None:
    """Against 60 decimal digits; differences of it are what discrete gradients divide."""
    u = torch.tensor([*(10.0**-power for power in range(13)), 0.999, 1.001, -0.3, -20.0, 0.0], dtype=dtype)
    with localcontext() as context:
        context.prec = 60
        exact = torch.tensor([float(log_cosh(Decimal(value))) for value in u.tolist()], dtype=torch.float64)
    found = activation("tanh").require_primitive("a field")(u).double()
    torch.testing.assert_close(found, exact, rtol=16 * torch.finfo(dtype).eps, atol=0)


class Squared(GradientField):
    """The factors s(1 + α²) in place of sα."""

    def slope_scales(self) -> Tensor:
        return self.sign * (1 + self.alpha.square())


@pytest.mark.parametrize("expansive", [False, True])
def test_a_potential_has_the_factors_that_the_field_has(expansive: bool) -> None:
    check_field(Squared(Dense(3, 4), "tanh", expansive=expansive, alpha=0.5)).require()


@pytest.mark.parametrize("name", ["tanh", "relu", "sigmoid"])
def test_a_preconditioned_field_is_the_gradient_of_its_potential(name: str) -> None:
    for linear in (Dense(3, 5), Conv((2, 3, 3), 3, 3)):
        field = PreconditionedField(linear, name).double()
        with torch.no_grad():
            field.log_scale.normal_()
            field.bias.normal_()
        x = torch.randn(6, *field.in_shape, dtype=torch.float64)
        slope = torch.func.grad(lambda y, field=field: potential_of(field, y).sum())(x)
        torch.testing.assert_close(slope, field(x), rtol=0, atol=1e-13)


def test_a_potential_is_not_that_of_a_field_with_a_forward_of_its_own() -> None:
    class Shifted(GradientField):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

        def facts(self) -> FieldFacts:
            return FieldFacts(conservative=True)

    class Whole(Shifted):
        def potential(self, x: Tensor) -> Tensor:
            return super().potential(x) + x.sum(1)

        def facts(self) -> FieldFacts:
            return FieldFacts(conservative=True)

    x = torch.randn(4, 3, dtype=torch.float64)
    shifted, whole = (kind(Dense(3, 2), "tanh").double() for kind in (Shifted, Whole))
    with pytest.raises(InvalidArgument, match="Shifted has no known potential"):
        potential_of(shifted, x)
    assert integrator("gonzalez").why_not(shifted) is not None
    slope = torch.func.grad(lambda y: potential_of(whole, y).sum())(x)
    torch.testing.assert_close(slope, whole(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["profile", "preactivation"])
def test_a_potential_is_not_that_of_a_field_with_a_formula_of_its_own(name: str) -> None:
    def tripled(self: GradientField, given: Tensor) -> Tensor:
        return 3 * getattr(GradientField, name)(self, given)

    said = {name: tripled, "facts": lambda self: FieldFacts(conservative=True)}
    field = type("Raised", (GradientField,), said)(Dense(3, 2), "tanh").double()
    x = torch.randn(4, 3, dtype=torch.float64)
    slope = torch.func.grad(lambda y: GradientField.potential(field, y).sum())(x)
    assert float((slope - field(x)).detach().abs().max()) > 0.1
    with pytest.raises(InvalidArgument, match="Raised has no known potential"):
        potential_of(field, x)
    assert integrator("gonzalez").why_not(field) is not None


def test_the_preconditioner_covers_a_border_where_the_gram_matrix_exceeds_the_kernels_correlation() -> None:
    """Inside 1 · 1 and −1 · 1 cancel; the first row of outputs sees the second row of the kernel alone."""
    field = PreconditionedField(Conv((1, 4, 4), 1, 3, "same")).double()
    kernel = torch.tensor([[[[1.0, -1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]], dtype=torch.float64)
    with torch.no_grad():
        field.linear.kernel.copy_(kernel)
    correlation = nn.functional.conv2d(kernel, kernel, padding=2)[0, 0]
    matrix = field.linear.dense_matrix().detach()
    assert (float(correlation[2, 3]), float((matrix @ matrix.mT)[0, 1])) == (0.0, 1.0)
    symmetric = -float(field.slope_scales().detach()) * (matrix.mT @ matrix)
    assert float(torch.linalg.eigvalsh(symmetric).max()) <= 1 + 1e-12
    assert float(field.slope_scales().detach()) == -1 / float(correlation.abs().sum())


def test_no_least_singular_value_is_asked_for_where_a_slope_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(linear: Dense) -> float:
        raise AssertionError("a least singular value was asked for")

    monkeypatch.setattr(Dense, "compute_smallest_singular_value", refuse)
    block = DynamicalBlock(GradientField(Dense(3, 3), "relu"), "euler", FreeSignal(0.5))
    assert block.properties.lipschitz == 1.0
    with pytest.raises(AssertionError, match="was asked for"):
        GradientField(Dense(3, 3), leaky_relu(0.5)).facts()


def test_the_dear_part_of_facts_is_found_once_for_a_weight_that_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[type] = []
    for kind, method in ((PreconditionedField, "_exact_gram"), (MetricField, "_dense_singular_values")):
        plain = getattr(kind, method)
        monkeypatch.setattr(
            kind, method, lambda self, *given, plain=plain: found.append(type(self)) or plain(self, *given)
        )
    for field in (PreconditionedField.example(), MetricField.example()):
        found.clear()
        DynamicalBlock(field, "euler", FreeSignal(0.1)).declare()
        assert found == [type(field)]


def test_two_metrics_of_one_weight_that_is_held_have_constants_of_their_own() -> None:
    linear = Dense(2, 2)
    fields = [MetricField(linear, DenseMetric(scale * torch.eye(2)), "relu") for scale in (1.0, 4.0)]
    with frozen_weights(linear):
        constants = [field.facts().lipschitz for field in (*fields, fields[0])]
    assert constants == pytest.approx([1.0, 4.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("linear", [OrthogonalDense(8, 4), OrthogonalConv((2, 4, 4), padding="circular")], ids=repr)
def test_a_short_step_under_autocast_is_of_float32(linear: LinearMap) -> None:
    """e^t − 1 = 0.01 is about one digit of bfloat16: a change that is made there is lost."""
    torch.manual_seed(0)
    field, x = GradientField(linear, sigma="leaky-relu"), torch.randn(16, *linear.in_shape)
    for step in (ExactFlow().step, ExplicitEuler(2).step):
        exact = step(copy.deepcopy(field).double(), x.double(), 0.01) - x
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = step(field, x, 0.01).double() - x
        assert float((found - exact).norm() / exact.norm()) < 0.02


def test_the_factors_of_a_field_are_laid_out_by_its_class() -> None:
    class Ninefold(GradientField):
        def per_channel(self, values: Tensor) -> Tensor:
            return 9 * super().per_channel(values)

    field = Ninefold(OrthogonalDense(3, 3), "relu", alpha=1.0, bias=False).double()
    x = field.linear.adjoint(torch.ones(1, 3, dtype=torch.float64)).detach()
    torch.testing.assert_close(field(x).detach(), -9 * x, rtol=0, atol=1e-13)
    assert not field.is_plain
    assert math.isinf(field.facts().lipschitz)
    assert math.isinf(field.euler_constant(1.0)[0])
    assert field.why_no_flow() is not None
    with pytest.raises(InvalidArgument, match="Ninefold has a per_channel of its own, and no split"):
        field.split()


@pytest.mark.parametrize("linear", [LouderDense(3, 3), Conv((2, 4, 4), 2, 3, "full", stride=2)], ids=repr)
def test_a_preconditioned_field_of_another_map_than_it_was_made_with_has_no_facts(linear: LinearMap) -> None:
    field = PreconditionedField(Dense(3, 3))
    assert field.facts().spectrum is not None
    assert field.standing_facts().conservative
    field.linear = linear
    for facts in (field.facts(), field.standing_facts()):
        assert replace(facts, reason="") == FieldFacts()
    assert f"the weight of {type(linear).__name__} is not known" in field.facts().reason
