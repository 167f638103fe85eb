"""Facts of every field against dense float64 Jacobians at many points, also under hostile weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
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
    Damping,
    DiagonalField,
    DissipativeField,
    FieldFacts,
    GradientField,
    GradientOf,
    IdentityField,
    LinearField,
    MassPreservingField,
    MetricField,
    PartitionedField,
    PlanarField,
    PreconditionedField,
    ShearField,
    TwoMatrixField,
    VectorField,
    activation,
    leaky_relu,
    smooth_leaky_relu,
)
from dynablocks.fields.base import potential_of
from dynablocks.fields.symmetric import EvenPotential, PotentialSum
from dynablocks.integrators import ExplicitEuler
from dynablocks.linear import Conv, Dense, OrthogonalConv, OrthogonalDense
from dynablocks.properties import Declaration, Equivariant, Structured
from dynablocks.switching import FreeSignal
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
        assert torch.allclose(field(x), gradient, atol=1e-12)


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
        assert torch.allclose(slope, field(x), atol=1e-13)


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
    assert torch.allclose(field(x), parts[0](x) + parts[1](x), atol=1e-13)
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
        assert torch.allclose(sigma(-u), -sigma(u))
    if sigma.primitive is not None:
        (derivative,) = torch.autograd.grad(sigma.primitive(u).sum(), u)
        assert torch.allclose(derivative, sigma(u), atol=1e-12)
    if sigma.negative_slope is not None:
        for t, s in itertools.product((-1.0, 0.5), (0.25, 2.0)):
            assert torch.allclose(sigma.flow(sigma.flow(u, t), s), sigma.flow(u, t + s), rtol=1e-12)
        small = (sigma.flow(u, 1e-6) - sigma.flow(u, -1e-6)) / 2e-6
        assert torch.allclose(small, sigma(u), rtol=1e-7, atol=1e-8)


def test_bad_activations_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="did you mean 'relu'"):
        activation("relo")
    with pytest.raises(InvalidArgument, match="negative_slope"):
        leaky_relu(-0.1)
    with pytest.raises(InvalidArgument, match="no closed form"):
        activation("tanh").flow(torch.zeros(1), 1.0)


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


def test_a_sum_with_a_part_that_is_no_gradient_is_none() -> None:
    rotation = PlanarField(Dense(2, 2))
    for field in (PotentialSum(LinearField(2), rotation), EvenPotential(rotation)):
        assert not field.facts().conservative
    assert PotentialSum(LinearField(2), GradientOf(nn.Linear(2, 1), (2,))).facts().conservative
    assert EvenPotential(GradientOf(nn.Linear(2, 1), (2,))).facts().conservative


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
        torch.testing.assert_close(field(inside), expected(x))
        assert torch.equal(inside, x)
    mapped = torch.func.vmap(lambda v: field(v[None])[0])(x)
    torch.testing.assert_close(mapped, expected(x))
