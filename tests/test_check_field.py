"""check_field on what is registered, on one liar for each fact and each method, and on first mistakes with a field."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_integrators import Spiral
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, PropertyViolated
from dynablocks.fields import (
    FIELDS,
    CompartmentField,
    Damping,
    DiagonalField,
    DissipativeField,
    FieldFacts,
    GradientField,
    IdentityField,
    LinearField,
    MassPreservingField,
    NeuralHamiltonian,
    PartitionedField,
    PotentialSum,
    RotationField,
    ShearField,
    SumField,
    TwoMatrixField,
    VectorField,
    leaky_relu,
    presnov,
)
from dynablocks.fields.base import energy_of, potential_of
from dynablocks.fields.sphere import TangentField
from dynablocks.fitting.structures import CoordinateShear, CoordinateShears, FreeField
from dynablocks.integrators import ExactFlow
from dynablocks.linear import Conv, Dense, OrthogonalDense
from dynablocks.switching import FreeSignal
from dynablocks.testing import FIELD_CHECKS, Finding, check_block, check_field
from dynablocks.testing.facts import FACTS, METHODS, false_facts, false_methods

HONEST: dict[str, Callable[[], VectorField]] = {name: FIELDS[name].example for name in sorted(FIELDS)} | {
    "convolution": lambda: GradientField(Conv((2, 3, 3), 3, 3), leaky_relu(0.1)),
    "flow with alpha": lambda: GradientField(OrthogonalDense(4, 3), leaky_relu(0.5), alpha=-0.5),
    "presnov gradient": lambda: presnov(MassPreservingField(3, 5), nodes=4).gradient,
    "presnov tangent": lambda: presnov(MassPreservingField(3, 5), nodes=4).tangent,
}


def finding(field: VectorField, check: str) -> Finding:
    (found,) = [found for found in check_field(field).findings if found.check == check]
    return found


@pytest.mark.parametrize("name", HONEST)
def test_what_is_registered_tells_the_truth(name: str) -> None:
    check_field(HONEST[name]()).require()


def test_a_check_leaves_no_trace() -> None:
    field = GradientField.example()
    before, state = copy.deepcopy(field.state_dict()), torch.random.get_rng_state()
    report = check_field(field).require()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in field.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in field.parameters())
    assert [found.check for found in report.findings] == list(FIELD_CHECKS)


class Claiming(TwoMatrixField):
    """A field of which nothing but its constants is true, and what it claims beyond that."""

    def __init__(self, **claim: object) -> None:
        super().__init__(Dense(4, 5), Dense(4, 5), "sigmoid")
        self.claim = claim

    def energy(self, x: Tensor) -> Tensor:
        return x.square().sum(1)

    def facts(self) -> FieldFacts:
        return replace(super().facts(), **self.claim)


FALSE: list[dict[str, object]] = [
    {"lipschitz": 0.01},
    {"one_sided": -1.0},
    {"spectrum": (-5.0, 5.0)},
    {"conservative": True},
    {"odd": True},
    {"divergence_free": True},
    {"hamiltonian": True},
    {"damping": 0.25},
    {"tangent": True},
    {"linear_invariants": (None,)},
    {"linear_invariants": ((1.0, -1.0, 0.5, 2.0),)},
    {"linear_invariants": ((1.0, 1.0),)},
    {"conserves_energy": True},
    {"dissipates_energy": True},
    {"positive": True},
]


@pytest.mark.parametrize("claim", FALSE, ids=lambda claim: next(iter(claim)))
def test_each_false_fact_is_found_and_named(claim: dict[str, object]) -> None:
    found = finding(Claiming(**claim), "facts at the start")
    assert not found.passed
    # What follows from the claim is false, too, and may be told first.
    assert f"; {next(iter(claim))}: " in f"; {found.message}", found.message


class Claimed(LinearField):
    """X(x) = diag(−1, 1/2, 2)x, and the facts that it is given."""

    def __init__(self, facts: FieldFacts) -> None:
        super().__init__(3)
        self.claim = facts
        with torch.no_grad():
            self.matrix.copy_(torch.diag(torch.tensor([-1.0, 0.5, 2.0])))

    def facts(self) -> FieldFacts:
        return self.claim


STEEP = "lipschitz: ‖DX‖ is 2 at a state, 2.0e-09 above"
FAR = "lipschitz: ‖δX‖ − lipschitz·‖δx‖ is 2.0e-09 between"
GROWING = "one_sided: an eigenvalue of (DX + DXᵀ)/2 is 2 at a state, 2.0e-09 above"
APART = "one_sided: ⟨δX, δx⟩ − one_sided·‖δx‖² is 2.0e-09 between"
REACH = "spectrum: the eigenvalues of DX reach from -1 to 2, beyond ["


@pytest.mark.parametrize(
    ("facts", "sentences"),
    [
        (FieldFacts(2.0, 2.0, (-1.0, 2.0)), []),
        # From a constant follows one_sided, and from an interval both constants: they are as short.
        (FieldFacts(lipschitz=2 - 2e-9), [STEEP, FAR, GROWING, APART]),
        (FieldFacts(one_sided=2 - 2e-9), [GROWING, APART]),
        (FieldFacts(spectrum=(-1 + 1e-9, 2.0)), [REACH]),
        (FieldFacts(spectrum=(-1.0, 2 - 2e-9)), [STEEP, FAR, GROWING, APART, REACH]),
    ],
    ids=["true", "lipschitz", "one_sided", "low end", "high end"],
)
def test_a_constant_that_is_short_by_a_billionth_is_found(facts: FieldFacts, sentences: list[str]) -> None:
    """Rounding is allowed 512 · 3 eps for a number of size 1: a thousand times less."""
    along = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    told = list(false_facts(Claimed(facts).double(), along))
    assert len(told) == len(sentences), told
    for found, sentence in zip(told, sentences, strict=True):
        assert found.startswith(sentence)


def test_what_is_not_claimed_is_not_found() -> None:
    check_field(Claiming()).require()


def test_each_fact_has_a_measurement_and_a_liar() -> None:
    facts = {attribute.name for attribute in dataclasses.fields(FieldFacts)} - {"reason", "metric"}
    assert set(FACTS) == facts
    assert {name for claim in FALSE for name in claim} == facts


def test_a_jump_breaks_a_constant_that_every_jacobian_keeps() -> None:
    class Sign(IdentityField):
        def forward(self, x: Tensor) -> Tensor:
            return x.sign()

        def facts(self) -> FieldFacts:
            return FieldFacts(0.0, 0.0)

    x = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    told = list(false_facts(Sign((2,)), x))
    assert [sentence.split(" is ")[0] for sentence in told] == [
        "lipschitz: ‖δX‖ − lipschitz·‖δx‖",
        "one_sided: ⟨δX, δx⟩ − one_sided·‖δx‖²",
    ]


class Scaling(VectorField):
    """X(x) = cx with a learned c, and the constant that a function of c gives."""

    def __init__(self, constant: Callable[[float], float]) -> None:
        super().__init__()
        self.in_shape, self.constant = (3,), constant
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.rate * x

    def facts(self) -> FieldFacts:
        return FieldFacts(self.constant(abs(float(self.rate.detach()))), odd=True, reason="a scaling")


def test_facts_are_measured_after_training_and_under_hostile_parameters() -> None:
    check_field(Scaling(lambda rate: rate)).require()
    assert check_field(Scaling(lambda rate: min(rate, 100.0))).failed == ("facts under hostile parameters",)
    remembered = check_field(Scaling(lambda rate: 0.5))
    # The constants of its steps follow from the fact.
    assert remembered.failed == ("facts after training", "facts under hostile parameters", "methods")
    with pytest.raises(PropertyViolated, match="Scaling fails the check 'facts after training': lipschitz: "):
        remembered.require()


class Decay(VectorField):
    """X(x) = −cx, which does not expand as long as the learned c is not negative."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape, self.rate = (3,), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return -self.rate * x

    def facts(self) -> FieldFacts:
        return FieldFacts(abs(float(self.rate.detach())), 0.0, odd=True)


def test_a_fact_that_holds_for_one_sign_of_a_parameter_alone_is_found() -> None:
    report = check_field(Decay())
    assert report.failed == ("facts under hostile parameters", "methods"), str(report)
    message = finding(Decay(), "facts under hostile parameters").message
    assert message.startswith("parameters negated: one_sided: "), message


class Pendulum(VectorField):
    """q̇ = p, ṗ = −sinh 5q − cp, of which far from 0 the steepness hides the damping in rounding."""

    in_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return torch.stack([p, -(5 * q).sinh() - 0.1 * p], dim=1)

    def facts(self) -> FieldFacts:
        return FieldFacts(hamiltonian=True)


def test_a_steep_state_excuses_no_other() -> None:
    message = finding(Pendulum(), "facts at the start").message
    for sentence in ("divergence_free: ∇·X is 1.0e-01 at a state", "hamiltonian: 𝕁DX is not symmetric, by 5.0e-02"):
        assert sentence in message, message
    near, far = torch.tensor([[0.1, 0.2]], dtype=torch.float64), torch.tensor([[10.0, 0.2]], dtype=torch.float64)
    assert len(list(false_facts(Pendulum(), near))) == len(list(false_facts(Pendulum(), torch.cat([near, far])))) == 2
    # There ‖DX‖ is 1e22, of which a float64 does not hold 0.1.
    assert not list(false_facts(Pendulum(), far))


class Rates(VectorField):
    """X(x) = Mx, where one entry draws from another: only where that one stands alone does no other make up for it."""

    in_shape = (8,)

    def __init__(self, drawn: float) -> None:
        super().__init__()
        matrix = torch.ones(8, 8) - 8 * torch.eye(8)
        matrix[0, 2] = drawn
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def facts(self) -> FieldFacts:
        return FieldFacts(positive=True)


def test_signs_are_measured_where_one_entry_stands_alone() -> None:
    check_field(Rates(0.0)).require()
    message = finding(Rates(-0.05), "facts at the start").message
    assert message.startswith("positive: −Xᵢ where xᵢ = 0 is "), message


class BiasForgotten(GradientField):
    """Its potential is that of the start, where the bias is 0."""

    def potential(self, x: Tensor) -> Tensor:
        primitive = self.sigma.require_primitive("its sigma")
        return self.sign * primitive(self.linear.affine(x, None)).sum(1)

    def facts(self) -> FieldFacts:
        return replace(super().facts(), reason="claimed")


def test_a_method_that_is_right_at_the_start_alone_is_found() -> None:
    report = check_field(BiasForgotten(Dense(3, 4), "tanh"))
    assert report.failed == ("methods",), str(report)
    message = report.findings[-1].message
    assert message.startswith("after training, potential: ∇V and X differ by up to "), message


def test_facts_that_hold_in_one_mode_alone_are_found() -> None:
    class SilentInTraining(DiagonalField):
        def facts(self) -> FieldFacts:
            return FieldFacts() if self.training else super().facts()

    report = check_field(SilentInTraining(3))
    assert report.failed == ("train and eval",), str(report)


def test_the_parts_of_a_sum_are_those_that_it_has_now() -> None:
    fields = LinearField(3), GradientField(Dense(3, 4), "tanh")
    total = SumField(*fields).double()
    lipschitz = total.facts().lipschitz
    total.fields[1] = torch.compile(fields[1], backend="eager")
    assert total.terms() == fields
    assert total.facts().lipschitz == pytest.approx(lipschitz, rel=1e-12)
    total.fields[0] = nn.Linear(3, 3)
    for read in (total.facts, total.standing_facts, total.terms):
        with pytest.raises(InvalidArgument, match=r"fields\[0\] is a Linear; a VectorField is needed"):
            read()


def test_a_sign_that_is_set_to_a_factor_multiplies_what_is_said() -> None:
    total = PotentialSum(LinearField(3), DiagonalField(3)).double()
    lipschitz = total.facts().lipschitz
    total.sign = 2.0
    assert total.terms() == (total,)
    assert total.facts().lipschitz == pytest.approx(2 * lipschitz, rel=1e-12)
    x = torch.randn(4, 3, dtype=torch.float64)
    assert not [*false_facts(total, x), *false_methods(total, x)]


def with_a_bias(network: nn.Module) -> None:
    network.bias = nn.Parameter(torch.ones(4))


def with_a_hook(network: nn.Module) -> None:
    network.register_forward_hook(lambda module, given, output: output + 1)


@pytest.mark.parametrize("spoil", [with_a_bias, with_a_hook])
@pytest.mark.parametrize("make", [FreeField, lambda *sizes, odd: CoordinateShear(2, 0, *sizes[1:], odd=odd)])
def test_a_free_field_is_odd_as_long_as_its_network_is(
    make: Callable[..., FreeField | CoordinateShear], spoil: Callable[[nn.Module], None]
) -> None:
    field = make(2, 4, odd=True).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    assert field.facts().odd
    assert not list(false_facts(field, x))
    spoil(field.rate)
    assert not field.facts().odd
    assert not make(2, 4, odd=False).facts().odd


def test_the_shears_of_a_field_are_those_that_it_has_now() -> None:
    field = CoordinateShears(3, 4)
    shears = field.terms()
    field.shears[1] = torch.compile(shears[1], backend="eager")
    assert field.terms() == shears
    field.shears[1] = LinearField(3)
    assert not field.facts().divergence_free


def test_a_standing_fact_that_the_facts_do_not_state_is_measured_too() -> None:
    class Boasting(GradientField):
        def _standing_facts(self) -> FieldFacts:
            return FieldFacts(conservative=True, tangent=True)

    found = finding(Boasting(Dense(3, 4), "tanh"), "facts at the start")
    assert found.message.startswith("standing tangent: ")


def test_facts_are_measured_also_where_gradients_are_off() -> None:
    honest, liar = NeuralHamiltonian.example(), Claiming(conserves_energy=True)
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            check_field(honest).require()
            assert "facts at the start" in check_field(liar).failed


class WrongSign(LinearField):
    def potential(self, x: Tensor) -> Tensor:
        return -super().potential(x)

    def facts(self) -> FieldFacts:
        return replace(super().facts(), reason="claimed")


class Upside(NeuralHamiltonian):
    def energy(self, x: Tensor) -> Tensor:
        return -super().energy(x)

    def facts(self) -> FieldFacts:
        return replace(super().facts(), reason="claimed")


class Steep(DissipativeField):
    def gradient(self, x: Tensor) -> Tensor:
        return 2 * super().gradient(x)


class Bent(DissipativeField):
    """Its structure is right, but not linear in v."""

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        return v.norm(dim=1, keepdim=True) * super().structure(x, v)


class Rising(DissipativeField):
    """X is that of the class, which dissipates V; a step along any v but ∇V(x) does not."""

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        slope = self.gradient(x)
        along = slope * (slope * v).sum(1, keepdim=True) / slope.square().sum(1, keepdim=True)
        return super().structure(x, v) + 10 * (v - along)

    def facts(self) -> FieldFacts:
        return replace(super().facts(), reason="claimed")


class Halved(PartitionedField):
    def terms(self) -> tuple[VectorField, ...]:
        return (self.kick,)


class Small(TwoMatrixField):
    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        constant, reason = super().euler_constant(step_size, bound)
        return 0.5 * constant, reason


class Late(Damping):
    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow(x, 1.0001 * time)


class OneStep(LinearField):
    """Its flow is an Euler step: right at the start, but of no group."""

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return x + time * self(x)


class ForwardsOnly(Damping):
    """Far back in time it goes too far."""

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        times = torch.as_tensor(time, dtype=x.dtype)
        return super().flow(x, torch.where(times < -0.1, 2 * times, times))


class PaperOnly(Small):
    """The tight constant holds."""

    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return super().euler_constant(step_size) if bound == "paper" else VectorField.euler_constant(self, step_size)


class DenseForwards(Damping):
    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow_log_determinant(x, torch.as_tensor(time, dtype=x.dtype).clamp_min(0))


class Shrinking(Damping):
    def flow_constant(self, time: float) -> tuple[float, str]:
        return 0.5, "wishful thinking"


class Denser(Damping):
    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow_log_determinant(x, time) + 1e-6


class Beside(Damping):
    def flow_with_log_determinant(self, x: Tensor, time: Tensor | float) -> tuple[Tensor, Tensor]:
        moved, change = super().flow_with_log_determinant(x, time)
        return moved, 1.0001 * change


class MovedBeside(Damping):
    def flow_with_log_determinant(self, x: Tensor, time: Tensor | float) -> tuple[Tensor, Tensor]:
        moved, change = super().flow_with_log_determinant(x, time)
        return moved + 1e-6, change


class Transposed(CompartmentField):
    """X is that of the class, and the rates lead from i to j."""

    def forward(self, x: Tensor) -> Tensor:
        weights = x.new_tensor(self.weights)
        flux = CompartmentField.rates(self, x) * (weights * x).unsqueeze(-2)
        return (flux - flux.mT).sum(-1) / weights

    def rates(self, x: Tensor) -> Tensor:
        return super().rates(x).mT

    def facts(self) -> FieldFacts:
        return super().facts()


class NegativeRates(Transposed):
    """No rates, since some are below 0."""

    def rates(self, x: Tensor) -> Tensor:
        return CompartmentField.rates(self, x) - 10.0

    def facts(self) -> FieldFacts:
        return super().facts()


class Growing(RotationField):
    def rotate(self, at: Tensor, v: Tensor, time: Tensor | float, chart: str = "exp") -> Tensor:
        return (1 + 1e-6) * super().rotate(at, v, time, chart)

    def facts(self) -> FieldFacts:
        return super().facts()


class TurnedBack(RotationField):
    """Wrong in the chart of Cayley alone."""

    def rotate(self, at: Tensor, v: Tensor, time: Tensor | float, chart: str = "exp") -> Tensor:
        return super().rotate(at, v, time if chart == "exp" else -time, chart)

    def facts(self) -> FieldFacts:
        return super().facts()


class Deaf(Damping):
    """Its log-determinant has no gradient in t."""

    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow_log_determinant(x, time.detach() if isinstance(time, Tensor) else time)

    def facts(self) -> FieldFacts:
        return super().facts()


class Spun(TangentField):
    """X(x) = ω × x, which is odd, with Λ(x)v = (ω + x) × v, which turns x and −x in two ways."""

    in_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("axis", torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cross(self.axis.expand_as(x), x)

    def rotate(self, at: Tensor, v: Tensor, time: Tensor | float, chart: str = "exp") -> Tensor:
        w = self.axis + at
        zero = torch.zeros_like(w[:, 0])
        rows = [[zero, -w[:, 2], w[:, 1]], [w[:, 2], zero, -w[:, 0]], [-w[:, 1], w[:, 0], zero]]
        skew = time * torch.stack([torch.stack(row, 1) for row in rows], 1)
        eye = torch.eye(3, dtype=v.dtype)
        turn = skew.matrix_exp() if chart == "exp" else torch.linalg.solve(eye - skew / 2, eye + skew / 2)
        return (turn @ v.unsqueeze(-1)).squeeze(-1)

    def facts(self) -> FieldFacts:
        return FieldFacts(1.0, 0.0, odd=True, tangent=True, reason="a turn")


WRONG: list[tuple[str, Callable[[], VectorField]]] = [
    ("potential", lambda: WrongSign(3)),
    ("energy", lambda: Upside(4, width=3)),
    ("structure", lambda: Steep(3, width=4)),
    ("structure", lambda: Bent(3, width=4)),
    ("structure", lambda: Rising(3, width=4)),
    ("terms", lambda: Halved(None, GradientField(Dense(2, 3), "tanh"))),
    ("euler_constant", lambda: Small(Dense(3, 5), Dense(3, 5))),
    ("euler_constant", lambda: PaperOnly(Dense(3, 5), Dense(3, 5))),
    ("flow", lambda: Late((4,))),
    ("flow", lambda: ForwardsOnly((4,))),
    ("flow", lambda: OneStep(3)),
    ("flow_constant", lambda: Shrinking((4,))),
    ("flow_log_determinant", lambda: Denser((4,))),
    ("flow_log_determinant", lambda: DenseForwards((4,))),
    ("flow_log_determinant", lambda: Deaf((4,))),
    ("flow_with_log_determinant", lambda: Beside((4,))),
    ("flow_with_log_determinant", lambda: MovedBeside((4,))),
    ("rates", lambda: Transposed(3, 5)),
    ("rates", lambda: NegativeRates(3, 5)),
    ("rotate", lambda: Growing(3, 5)),
    ("rotate", lambda: TurnedBack(3, 5)),
    ("rotate", Spun),
]


@pytest.mark.parametrize(("method", "make"), WRONG, ids=lambda given: given if isinstance(given, str) else "")
def test_each_method_that_contradicts_the_field_is_found_and_named(
    method: str, make: Callable[[], VectorField]
) -> None:
    found = finding(make(), "methods")
    assert not found.passed
    assert found.message.startswith(f"{method}: ") or f"; {method}: " in found.message, found.message


class OfPositiveRates(VectorField):
    """X = −cx, whose potential takes |c| for c; c is 1/2 at the start and grows."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (2,)
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return -self.rate * x

    def potential(self, x: Tensor) -> Tensor:
        return -0.5 * self.rate.abs() * x.square().sum(1)

    def facts(self) -> FieldFacts:
        value = -float(self.rate.detach())
        return FieldFacts.of_spectrum(value, value, odd=True, reason="−c I")

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=True, odd=True)


def test_methods_are_held_against_parameters_of_the_other_sign() -> None:
    assert finding(OfPositiveRates(), "facts under hostile parameters").passed
    found = finding(OfPositiveRates(), "methods")
    assert found.message.startswith("parameters negated: potential: ∇V and X differ by up to "), found.message


def test_a_column_of_energies_is_refused() -> None:
    class Column(NeuralHamiltonian):
        def energy(self, x: Tensor) -> Tensor:
            return super().energy(x).unsqueeze(1)

        def facts(self) -> FieldFacts:
            return super().facts()

    column, x = Column(4, width=3), torch.randn(4, 4)
    for energy in (lambda x: energy_of(column, x), SumField(NeuralHamiltonian(4, width=3), column).energy):
        with pytest.raises(InvalidArgument, match=r"the energy of Column has shape \(4, 1\) for 4 states"):
            energy(x)


def test_a_column_of_potentials_is_refused_wherever_it_is_taken() -> None:
    class Column(GradientField):
        def potential(self, x: Tensor) -> Tensor:
            return super().potential(x).unsqueeze(1)

        def facts(self) -> FieldFacts:
            return super().facts()

    own, x = Column(OrthogonalDense(2, 2), "tanh"), torch.randn(4, 2)
    told = r"the potential of Column has shape \(4, 1\) for 4 states; one number a state, of shape \(4,\), is needed"
    for energy in (PotentialSum(own, LinearField(2)).potential, lambda x: potential_of(own, x)):
        with pytest.raises(InvalidArgument, match=told):
            energy(x)
    with pytest.raises(InvalidArgument, match=r"has shape \(2, 1\) for 2 states"):
        DynamicalBlock(own, "gonzalez", FreeSignal(0.1))


def test_what_a_structure_does_to_other_vectors_than_gradients_is_in_no_fact() -> None:
    rising = Rising(3, width=4)
    assert finding(rising, "facts at the start").passed
    message = finding(rising, "methods").message
    assert message.startswith("structure: ⟨v, structure(x, v)⟩ for a random v is "), message


def test_each_method_has_a_measurement_and_a_liar() -> None:
    assert {method for method, _ in WRONG} == set(METHODS)


class OfNumbers(Damping):
    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow(x, float(time))


class OfTheFirst(Damping):
    """All states move for the time of the first."""

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow(x, torch.as_tensor(time, dtype=x.dtype).flatten()[0])


class WithoutGradient(Damping):
    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow(x, torch.as_tensor(time, dtype=x.dtype).detach())


class TwiceTheGradient(Damping):
    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        time = torch.as_tensor(time, dtype=x.dtype)
        return super().flow(x, 2 * time - time.detach())


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (OfNumbers, "flow: flow(x, t) with t of shape (5, 1), one a state, raises "),
        (OfTheFirst, "flow: Φ_t(x) for one t a state and for each t alone differ by"),
        (WithoutGradient, "flow: flow(x, t) has no gradient in a tensor t"),
        (TwiceTheGradient, "flow: ⟨v, ∂Φ_t(x)/∂t⟩ and ⟨v, X(Φ_t(x))⟩ for a random v differ by"),
    ],
)
def test_a_flow_takes_a_time_for_each_state_and_has_the_gradient_of_it(kind: type[Damping], sentence: str) -> None:
    """Steps of a batch may differ, and steps are learned; of one number for all of them each flow is right."""
    told = list(false_methods(kind((4,), 0.5).double(), torch.randn(5, 4, dtype=torch.float64)))
    assert told
    assert told[0].startswith(sentence), told


class Backwards(ShearField):
    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow(x, -time)


class Hasty(ShearField):
    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return super().flow(x, 2 * time)


class OnSpheres(ShearField):
    def facts(self) -> FieldFacts:
        return replace(super().facts(), tangent=True)


def with_kick(kind: type[ShearField]) -> PartitionedField:
    """A field that is the sum of its terms, of which one is another's."""
    field = PartitionedField.example()
    field.kick = kind(field.kick.force)
    return field


@pytest.mark.parametrize("kind", [Backwards, Hasty])
def test_a_term_with_the_flow_of_another_field_is_found(kind: type[ShearField]) -> None:
    """The steps of a splitting are those of the flows of its terms."""
    report = check_field(with_kick(kind))
    assert report.failed == ("methods",), str(report)
    message = report.findings[-1].message
    assert message.startswith(f"term {kind.__name__}: flow: its derivative at time 0 and X differ by"), message


def test_a_term_with_a_false_fact_is_found_beside_its_field_and_in_a_block() -> None:
    field = with_kick(OnSpheres)
    message = finding(field, "facts at the start").message
    assert message.startswith("term OnSpheres: tangent: ⟨x, X⟩ is "), message
    report = check_block(DynamicalBlock(field, "verlet", FreeSignal(0.1)))
    (found,) = [found for found in report.findings if found.check == "facts of its fields"]
    assert found.message.startswith("PartitionedField: term OnSpheres: tangent: "), found.message


class Endless(VectorField):
    """X(x) = sx, the sum of its halves, which are such sums."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.in_shape, self.share = (2,), share

    def forward(self, x: Tensor) -> Tensor:
        return self.share * x

    def facts(self) -> FieldFacts:
        return FieldFacts.of_spectrum(self.share, self.share, odd=True, reason="a multiple of x")

    def terms(self) -> tuple[VectorField, ...]:
        return Endless(self.share / 2), Endless(self.share / 2)


def test_terms_of_terms_are_not_asked_for() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    assert not [*false_facts(Endless(), x), *false_methods(Endless(), x)]


def test_a_number_a_state_of_another_shape_is_named() -> None:
    class Column(LinearField):
        def potential(self, x: Tensor) -> Tensor:
            return super().potential(x).unsqueeze(1)

        def facts(self) -> FieldFacts:
            return replace(super().facts(), reason="claimed")

    (told,) = false_methods(Column(2).double(), torch.ones(3, 2, dtype=torch.float64))
    assert told == "potential: it has shape (3, 1) for 3 states; potential(x) is one number a state, (3,)"


class OwnField(VectorField):
    """A field that is what a function of its states is."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.in_shape, self.function = (3,), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def facts(self) -> FieldFacts:
        return FieldFacts()


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: -x.sum(1, keepdim=True), "(3, 1)"),
        (lambda x: -x.sum(1), "(3,)"),
        (lambda x: torch.stack([x[1], -x[0]]), "(2, 3)"),
    ],
    ids=["one number a state", "a flat batch", "of one state"],
)
def test_a_field_of_another_shape_than_its_states_is_told_so(function: Callable[[Tensor], Tensor], shape: str) -> None:
    sentence = f"X has shape {shape} for states (3, 3); a field has the shape of its states"
    field = OwnField(function)
    assert finding(field, "shape").message == sentence
    report = check_block(DynamicalBlock(field, "euler", FreeSignal(0.5)))
    assert (report.failed[0], report.findings[0].message) == ("shapes of its fields", f"OwnField: {sentence}")


def test_a_field_of_one_state_is_not_taken_for_one_of_a_batch_of_its_size() -> None:
    found = finding(OwnField(lambda x: torch.stack([x[1], -x[0], x[2]])), "shape")
    assert found.message.startswith("X has shape (3, 3) for states (4, 3)")


def test_fields_and_modules_are_sent_to_the_check_that_is_theirs() -> None:
    with pytest.raises(InvalidArgument, match=r"LinearField is a vector field, .*; check its facts with check_field"):
        check_block(LinearField(3))
    with pytest.raises(InvalidArgument, match="field is a Linear; a VectorField is needed"):
        check_field(nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match="in_shape of Shapeless is None; set it to the shape of one sample"):
        check_field(type("Shapeless", (VectorField,), {})())
    with pytest.raises(InvalidArgument, match="has 701 entries; dense Jacobians are formed for at most 700"):
        check_field(IdentityField((701,)))
    with pytest.raises(InvalidArgument, match=r"sample has shape \(4, 2\); states of LinearField have shape \(3,\)"):
        check_field(LinearField(3), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lipschitz", math.nan),
        ("lipschitz", -1.0),
        ("lipschitz", torch.tensor(1.0)),
        ("one_sided", math.nan),
        ("spectrum", (1.0, -1.0)),
        ("spectrum", (math.nan, 0.0)),
        ("spectrum", (torch.tensor(0.0), torch.tensor(1.0))),
        ("spectrum", 2.0),
        ("damping", math.inf),
        ("linear_invariants", [None]),
        ("linear_invariants", (1.0, 1.0)),
        ("linear_invariants", ((0.0, 0.0),)),
        ("linear_invariants", ((1.0, math.nan),)),
    ],
)
def test_facts_that_cannot_be_are_refused_in_one_sentence(name: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{name} is .* needed"):
        FieldFacts(**{name: value})


def test_what_follows_from_a_spectrum_is_drawn_and_better_bounds_are_kept() -> None:
    alone = FieldFacts(spectrum=(-1.0, 0.25))
    assert (alone.lipschitz, alone.one_sided) == (1.0, 0.25)
    stated = FieldFacts(0.5, 0.125, (-1.0, 0.25))
    assert (stated.lipschitz, stated.one_sided) == (0.5, 0.125)
    unknown = FieldFacts.of_spectrum(math.nan, 0.0, odd=False, reason="0 · ∞")
    assert (unknown.spectrum, unknown.lipschitz, unknown.one_sided) == ((-math.inf, math.inf), math.inf, math.inf)


def test_a_flow_is_taken_where_the_class_has_one_and_its_log_determinant_is_asked_for() -> None:
    field, x = Spiral(-0.5, 2.0), torch.randn(4, 2, dtype=torch.float64)
    check_field(field).require()
    block = DynamicalBlock(field, "exact", FreeSignal(0.5)).double()
    exact = x @ torch.linalg.matrix_exp(0.5 * field.matrix).mT
    torch.testing.assert_close(block(x), exact, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(block.inverse(block(x)), x, rtol=1e-13, atol=1e-13)
    with pytest.raises(InvalidArgument, match=r"Spiral has a flow, but not its log-determinant; give it a method"):
        block.log_determinant(x)
    check_block(block).require()
    none = DiagonalField(2)
    for call in (none.flow, none.flow_log_determinant):
        with pytest.raises(InvalidArgument, match="needs a closed form, and DiagonalField implements none"):
            call(x, 0.5)
    assert ExactFlow().why_not(none) is not None


def test_what_a_field_lacks_is_said_with_what_to_write() -> None:
    class Bare(VectorField):
        in_shape = (2,)

    x = torch.zeros(1, 2)
    with pytest.raises(NotImplementedError, match=r"Bare must implement forward\(x\)"):
        Bare()(x)
    for call in (Bare().facts, Bare().standing_facts):
        with pytest.raises(NotImplementedError, match=r"Bare must implement facts\(\)"):
            call()
    with pytest.raises(InvalidArgument, match=r"or give it a method energy\(x\), one number a sample"):
        LinearField(2).energy(x)
    with pytest.raises(InvalidArgument, match=r"or give it a method potential\(x\) with X = ∇V, one number a sample"):
        potential_of(Damping((2,)), x)


class DoubledInFloat32(DiagonalField):
    def forward(self, x: Tensor) -> Tensor:
        rates = super().forward(x)
        return 2 * rates if x.dtype == torch.float32 else rates

    def facts(self) -> FieldFacts:
        return FieldFacts(odd=True)


def test_a_field_that_is_another_one_in_float32_is_found() -> None:
    report = check_field(DoubledInFloat32(3))
    assert report.failed == ("dtype",), str(report)
    message = finding(DoubledInFloat32(3), "dtype").message
    assert message.startswith("a copy in torch.float32 gives an output that is off by "), message


class Braked(NeuralHamiltonian):
    """With a brake, of which the structure that it inherits knows nothing, and no step takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 0.1 * x

    def facts(self) -> FieldFacts:
        return FieldFacts()


class Shifted(GradientField):
    """∇(V + Σx) by a forward of its own, with the potential V that no step takes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1

    def facts(self) -> FieldFacts:
        return FieldFacts(conservative=True)


class WronglyShifted(Shifted):
    """The potential is its own, and wrong."""

    def potential(self, x: Tensor) -> Tensor:
        return super().potential(x) + 2 * x.sum(1)

    def facts(self) -> FieldFacts:
        return FieldFacts(conservative=True)


class Kicked(PartitionedField):
    """𝕁∇H + 1 by a forward of its own, with the energy H that no step takes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1

    def facts(self) -> FieldFacts:
        return FieldFacts(hamiltonian=True)


def test_a_method_that_is_not_taken_for_the_fields_own_is_not_held_against_it() -> None:
    for field in (Braked(4, width=3), Shifted(Dense(3, 4), "tanh"), Kicked.example()):
        assert finding(field, "methods").passed, str(check_field(field))
    found = finding(WronglyShifted(Dense(3, 4), "tanh"), "methods")
    assert found.message.startswith("potential: ∇V and X differ by "), found.message


class OneWay(GradientField):
    """Its constant is that of the step forwards."""

    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        return super().euler_constant(abs(step_size), bound)


class TightAlone(TwoMatrixField):
    """The paper's constant holds."""

    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        constant, reason = super().euler_constant(step_size, bound)
        return (0.5 if bound == "tight" else 1.0) * constant, reason


class NeverGrows(Damping):
    """True for t >= 0."""

    def flow_constant(self, time: float) -> tuple[float, str]:
        return 1.0, "q rests"


class Twofold(DissipativeField):
    """X is that of the class, its structure twice that."""

    def forward(self, x: Tensor) -> Tensor:
        return -(self.gradient(x) @ self.factor) @ self.factor.mT

    def structure(self, x: Tensor, v: Tensor) -> Tensor:
        return 2 * super().structure(x, v)

    def facts(self) -> FieldFacts:
        return replace(super().facts(), reason="claimed")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OneWay(OrthogonalDense(3, 3), "tanh"), "euler_constant: ‖I + hDX‖ for h = -2.0 and bound='tight' is "),
        (lambda: TightAlone(Dense(3, 5), Dense(3, 5)), "and bound='tight' is "),
        (lambda: NeverGrows((4,)), "flow_constant: ‖DΦ_t‖ for t = -0.2 is "),
        (lambda: Twofold(3, width=4), "structure: structure(x, gradient(x)) and X differ by up to "),
    ],
    ids=["backwards", "tight", "back in time", "another structure"],
)
def test_what_is_wrong_one_way_alone_is_found(make: Callable[[], VectorField], sentence: str) -> None:
    field = make().double()
    told = list(false_methods(field, torch.randn(8, *field.in_shape, dtype=torch.float64)))
    assert any(sentence in each for each in told), told


class Clipped(VectorField):
    """Of slope 1 within 1/2 of 0, or beyond 8, and of slope 0 elsewhere; it says 1/2."""

    in_shape = (1,)

    def __init__(self, far: bool) -> None:
        super().__init__()
        self.far = far

    def forward(self, x: Tensor) -> Tensor:
        return x - x.clamp(-8.0, 8.0) if self.far else x.clamp(-0.5, 0.5)

    def facts(self) -> FieldFacts:
        return FieldFacts(0.5, 0.5)


@pytest.mark.parametrize("far", [False, True])
def test_facts_are_measured_near_0_and_far_from_it(far: bool) -> None:
    """At ±2 and 3 both slopes are 0, and of two such states the images differ by at most a quarter of the distance."""
    sample = torch.tensor([[2.0], [-2.0], [3.0]], dtype=torch.float64)
    assert not list(false_facts(Clipped(far), sample))
    assert "facts at the start" in check_field(Clipped(far), sample).failed
