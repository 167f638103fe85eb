"""Hamiltonian, conservative and dissipative fields and SympNets against dense Jacobians and exact solutions."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from test_fields import form
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, GradientField, PartitionedField, ShearField, SumField, VectorField
from dynablocks.fields.dissipative import DampedHamiltonian, Damping, DissipativeField
from dynablocks.fields.hamiltonian import HamiltonianEmbedding, NeuralHamiltonian, SeparableHamiltonian, canonical
from dynablocks.fields.sphere import RotationField
from dynablocks.fields.symmetric import (
    DiagonalField,
    EvenPotential,
    GradientOf,
    LinearField,
    PotentialSum,
    conservative_field,
)
from dynablocks.integrators import ExactFlow, integrator
from dynablocks.integrators.base import flow_properties
from dynablocks.linear import Dense
from dynablocks.models.chain import Chain
from dynablocks.models.sympnet import sympnet
from dynablocks.properties import (
    ConformalSymplectic,
    Declaration,
    Dissipative,
    EnergyPreserving,
    Equivariant,
    Invertible,
    Property,
    Structured,
    Symplectic,
    VolumePreserving,
    declare,
    verify,
)
from dynablocks.properties.jacobians import jacobians
from dynablocks.switching import EvenSteps, FreeSignal
from dynablocks.testing import check_block
from dynablocks.testing.facts import false_facts


def scalar_network(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, 1, bias=False))


CONSERVATIVE = {
    "linear": lambda: LinearField(3, bias=True),
    "diagonal": lambda: DiagonalField(3, "sigmoid"),
    "gradient-of": lambda: GradientOf(scalar_network(3), (3,)),
    "contractive": lambda: GradientField(Dense(3, 4), "tanh", alpha=1.0),
    "negative sum": lambda: PotentialSum(LinearField(3), GradientField(Dense(3, 4), "tanh"), sign=-1.0),
    "even": lambda: EvenPotential(PotentialSum(LinearField(3, bias=True), GradientField(Dense(3, 4), "tanh"))),
}
ENERGY = {
    "ridge": NeuralHamiltonian.example,
    "even ridge": lambda: NeuralHamiltonian(4, width=3, even=True),
    "module": lambda: NeuralHamiltonian(4, scalar_network(4), even=True),
    "separable": SeparableHamiltonian.example,
    "separable modules": lambda: SeparableHamiltonian(scalar_network(2), scalar_network(2), 4),
    "separable fields": lambda: SeparableHamiltonian(
        GradientField(Dense(2, 3), "tanh"), GradientField(Dense(2, 3), "tanh")
    ),
    "embedding": HamiltonianEmbedding.example,
    "dissipative": DissipativeField.example,
    "dissipative module": lambda: DissipativeField(4, scalar_network(4)),
    "damped": DampedHamiltonian.example,
}
FIELDS_OF_THIS_FILE = (
    CONSERVATIVE
    | ENERGY
    | {
        "damping": Damping.example,
        "odd linear": lambda: LinearField(2),
        "shear of a module": lambda: ShearField(GradientOf(scalar_network(2), (2,))),
    }
)


def spoiled(make, factor: float = 1.0) -> VectorField:
    field = make().double()
    with torch.no_grad():
        for p in field.parameters():
            p.copy_(factor * (p + 0.3 * torch.randn_like(p)))
    return field


def draw(module: nn.Module, count: int = 5) -> Tensor:
    return torch.randn(count, *module.in_shape, dtype=torch.float64)


def form_defect(module: nn.Module, x: Tensor, factor: float = 1.0) -> float:
    J = jacobians(module, x).detach()
    gap = J.mT @ form(x.shape[1] // 2) @ J - factor * form(x.shape[1] // 2)
    return float((gap.flatten(1).norm(dim=1) / J.flatten(1).square().sum(1).clamp_min(1)).max())


@pytest.mark.parametrize("factor", [1.0, 1000.0, 0.0])
@pytest.mark.parametrize("make", FIELDS_OF_THIS_FILE.values(), ids=FIELDS_OF_THIS_FILE)
def test_facts_hold_for_dense_jacobians(make, factor: float) -> None:
    field = spoiled(make, factor)
    assert not list(false_facts(field, draw(field)))


@pytest.mark.parametrize("make", CONSERVATIVE.values(), ids=CONSERVATIVE)
def test_a_conservative_field_is_the_gradient_of_its_potential(make) -> None:
    field = spoiled(make)
    x = draw(field).requires_grad_(True)
    (slope,) = torch.autograd.grad(field.potential(x).sum(), x)
    assert torch.allclose(slope, field(x), rtol=0, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(slope, field(x), rtol=0, atol=1e-13)
    shear = ShearField(field)
    assert shear.facts().hamiltonian
    state = draw(shear).requires_grad_(True)
    (slope,) = torch.autograd.grad(shear.energy(state).sum(), state)
    assert torch.allclose(canonical(slope), shear(state), rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", ENERGY.values(), ids=ENERGY)
def test_an_energy_field_is_its_structure_times_the_gradient_of_its_energy(make) -> None:
    field = spoiled(make)
    x = draw(field)
    step = 1e-5
    slope = torch.stack(
        [
            (field.energy(x + step * e) - field.energy(x - step * e)) / (2 * step)
            for e in torch.eye(x.shape[1]).double()
        ],
        dim=1,
    )
    assert torch.allclose(slope, field.gradient(x), rtol=0, atol=1e-8)
    assert torch.allclose(field.structure(x, field.gradient(x)), field(x), rtol=0, atol=1e-13)
    if field.facts().hamiltonian:
        assert torch.allclose(slope @ form(x.shape[1] // 2).mT, field(x), rtol=0, atol=1e-8)


def test_a_field_of_wrong_sign_or_without_symmetry_is_refused_by_verify() -> None:
    class NotSymmetric(LinearField):
        def symmetric(self) -> Tensor:
            return self.matrix

        def facts(self) -> FieldFacts:
            return super().facts()

    class NotOdd(SeparableHamiltonian):
        def facts(self) -> FieldFacts:
            return replace(super().facts(), odd=True)

    class WrongRate(Damping):
        def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
            return super().flow(x, 1.0001 * time)

    class Growing(DissipativeField):
        def structure(self, x: Tensor, v: Tensor) -> Tensor:
            return -super().structure(x, v)

        def facts(self) -> FieldFacts:
            return replace(super().facts(), reason="claimed")

    def failures(field: VectorField, method: str) -> set[type[Property]]:
        block = DynamicalBlock(field, method, FreeSignal(0.1)).double()
        return {type(c.declared) for c in verify(block, draw(block)) if not c.passed}

    asymmetric = spoiled(lambda: NotSymmetric(2))
    assert Symplectic in failures(ShearField(asymmetric), "exact")
    assert failures(ShearField(spoiled(lambda: LinearField(2))), "exact") == set()
    assert ConformalSymplectic in failures(spoiled(lambda: WrongRate((4,))), "exact")
    assert Equivariant in failures(spoiled(lambda: NotOdd(None, None, 4, width=3)), "euler")
    growing = spoiled(Growing.example)
    (claim,) = [p for p in flow_properties(growing, 0.1) if isinstance(p, Dissipative)]
    assert not verify(Claiming(growing, claim), draw(growing)).passed
    sound = spoiled(DissipativeField.example)
    (claim,) = [p for p in flow_properties(sound, 0.1) if isinstance(p, Dissipative)]
    assert verify(Claiming(sound, claim), draw(sound)).passed


class Claiming(Structured):
    """A tiny Euler step that claims one property."""

    def __init__(self, field: VectorField, claim: Property) -> None:
        super().__init__()
        self.field, self.claim, self.in_shape = field, claim, field.in_shape

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-4 * self.field(x)

    def declare(self) -> Declaration:
        return Declaration.of(self.claim, reason="claimed")


@pytest.mark.parametrize("method", ["symplectic-euler", "verlet", "yoshida4"])
@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("name", ["separable", "separable modules", "separable fields"])
def test_splitting_steps_of_separable_fields_are_symplectic(name: str, factor: float, method: str) -> None:
    block = DynamicalBlock(spoiled(ENERGY[name], factor), method, FreeSignal(0.1)).double()
    assert {Symplectic, VolumePreserving, Invertible} <= set(map(type, block.properties))
    assert form_defect(block, draw(block)) <= 1e-12


def test_a_spring_follows_the_exact_oscillator() -> None:
    spring = PartitionedField(None, PotentialSum(unit_spring(), sign=-1.0))
    as_hamiltonian = SeparableHamiltonian(None, unit_spring()).double()
    x = draw(spring)
    assert torch.allclose(spring(x), as_hamiltonian(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(as_hamiltonian(x), canonical(x), rtol=0, atol=1e-15)
    assert torch.allclose(as_hamiltonian.energy(x), 0.5 * x.square().sum(1), rtol=1e-12, atol=1e-12)
    for method, order in (("verlet", 2), ("yoshida4", 4)):
        errors = []
        for steps in (20, 40):
            y = x
            for _ in range(steps):
                y = integrator(method).step(as_hamiltonian, y, 1.0 / steps)
            exact = math.cos(1.0) * x + math.sin(1.0) * canonical(x)
            errors.append(float((y - exact).detach().norm()))
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def unit_spring() -> LinearField:
    spring = LinearField(1).double()
    nn.init.ones_(spring.matrix)
    return spring


def test_a_damped_field_has_three_exact_flows_and_multiplies_the_form() -> None:
    field = spoiled(DampedHamiltonian.example)
    gamma, h, x = field.facts().damping, 0.3, draw(field)
    assert gamma > 0
    for term in field.terms():
        assert ExactFlow().why_not(term) is None
    total = sum(term(x) for term in field.terms())
    assert torch.allclose(total, field(x), rtol=0, atol=1e-14)
    for method in ("lie-trotter", "strang", "yoshida4"):
        block = DynamicalBlock(field, method, FreeSignal(h)).double()
        h = float(block.signal.steps)
        assert form_defect(block, x, math.exp(-gamma * h)) <= 1e-13
        assert form_defect(block, x) > 1e-4
        expected = torch.linalg.slogdet(jacobians(block, x)).logabsdet
        assert torch.allclose(block.log_determinant(x), expected, rtol=0, atol=1e-12)
        assert torch.allclose(expected, torch.full_like(expected, -2 * gamma * h), rtol=0, atol=1e-12)
        assert torch.allclose(block.inverse(block(x)), x, rtol=0, atol=1e-12)


def test_a_sum_of_shears_and_damping_steps_as_the_damped_field_does() -> None:
    field, x = spoiled(DampedHamiltonian.example), torch.randn(5, 4, dtype=torch.float64)
    total = SumField(SumField(field.kick, field.damping), field.drift)
    assert total.terms() == field.terms()
    assert torch.allclose(total(x), field(x), rtol=0, atol=1e-13)
    for method in ("lie-trotter", "strang", "yoshida4"):
        whole, parts = (DynamicalBlock(each, method, FreeSignal(0.25)).double() for each in (field, total))
        assert torch.equal(parts(x), whole(x))
        stated = parts.properties.of(ConformalSymplectic)
        assert stated is not None
        assert stated == whole.properties.of(ConformalSymplectic)
        assert verify(parts, x).passed


def test_the_energies_of_hamiltonian_parts_add_up() -> None:
    parts = spoiled(SeparableHamiltonian.example), spoiled(NeuralHamiltonian.example)
    field, x = SumField(*parts), torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(field.energy(x), parts[0].energy(x) + parts[1].energy(x), rtol=1e-14, atol=1e-14)
    block = DynamicalBlock(field, "gonzalez", FreeSignal(0.1)).double()
    assert block.properties.of(EnergyPreserving) is not None
    assert verify(block, x).passed
    dissipating = SumField(spoiled(lambda: DissipativeField(4, width=3)), parts[0])
    assert not dissipating.facts().conserves_energy
    assert not dissipating.facts().dissipates_energy
    with pytest.raises(InvalidArgument, match="SumField has no energy"):
        dissipating.energy(x)


def test_the_energy_of_an_opposite_sum_is_the_opposite_energy() -> None:
    """H = −(q² + p²)/2: X = (−p, q)."""
    field = PotentialSum(SeparableHamiltonian(None, unit_spring()), sign=-1.0).double()
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert field.energy(x).tolist() == [-2.5]
    assert field(x).tolist() == [[-2.0, 1.0]]
    slope = torch.func.grad(lambda y: field.energy(y).sum())(x)
    torch.testing.assert_close(canonical(slope), field(x), rtol=0, atol=1e-14)


def test_a_damped_oscillator_follows_its_exact_solution() -> None:
    gamma = 0.4
    field = DampedHamiltonian(None, unit_spring(), gamma=gamma, learned=False).double()
    x = draw(field)
    generator = torch.tensor([[0.0, 1.0], [-1.0, -gamma]], dtype=torch.float64)
    errors = []
    for steps in (50, 100):
        y = x
        for _ in range(steps):
            y = integrator("strang").step(field, y, 2.0 / steps)
        errors.append(float((y - x @ torch.linalg.matrix_exp(2.0 * generator).mT).detach().norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.05)
    assert field.facts().dissipates_energy


def test_a_dissipative_field_falls_by_its_factor_times_its_transpose() -> None:
    """−L(Lᵀ∇V), and not −Lᵀ(L∇V) or −L∇V, which fall as well for an L near I."""
    falling, x = DissipativeField(3).double(), torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        falling.factor.normal_()
        expected = -falling.slope(x) @ (falling.factor @ falling.factor.mT)
        torch.testing.assert_close(falling(x), expected, rtol=0, atol=1e-12)


def test_the_volume_of_damped_images_falls_by_every_pixel_of_the_momenta() -> None:
    """−γt = −1 for each of the nine pixels of the one channel of p."""
    field, x = Damping((2, 3, 3), 0.5, learned=False), torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    assert field.flow_log_determinant(x, 2.0).tolist() == [-9.0, -9.0]


def test_damping_dissipates_only_where_the_momentum_and_velocity_agree() -> None:
    convex = GradientField(Dense(2, 3), "tanh", expansive=True, bias=False)
    assert DampedHamiltonian(convex, None, 4).facts().dissipates_energy
    concave = GradientField(Dense(2, 3), "tanh", bias=False)
    damped = DampedHamiltonian(concave, None, 4)
    assert not damped.facts().dissipates_energy
    with pytest.raises(InvalidArgument, match="use a splitting method"):
        damped.structure(torch.zeros(1, 4), torch.zeros(1, 4))


def test_damping_against_a_shifted_kinetic_energy_may_raise_the_energy() -> None:
    """dH/dt = −γ p T'(p) = 0.25 tanh(1/2) at p = −1/2 for T = log cosh(p + 1)."""
    kinetic = GradientField(Dense(1, 1), "tanh", expansive=True)
    with torch.no_grad():
        kinetic.linear.matrix.fill_(1.0)
        kinetic.bias.fill_(1.0)
    field = DampedHamiltonian(kinetic, LinearField(1), 2, gamma=0.5, learned=False).double()
    x = torch.tensor([[0.0, -0.5]], dtype=torch.float64)
    slope = torch.func.grad(lambda y: field.energy(y).sum())(x)
    assert float((slope * field(x)).sum().detach()) == pytest.approx(0.25 * math.tanh(0.5), rel=1e-9)
    assert not field.facts().dissipates_energy


def test_a_damped_splitting_declares_its_factor() -> None:
    field = spoiled(DampedHamiltonian.example)
    for method in ("lie-trotter", "strang", "yoshida4"):
        block = DynamicalBlock(field, method, FreeSignal(0.25)).double()
        stated = block.properties.of(ConformalSymplectic)
        assert stated is not None
        assert stated.factor == pytest.approx(math.exp(-0.25 * field.facts().damping))
        assert block.properties.of(Symplectic) is None
        assert verify(block, draw(block)).passed


@pytest.mark.parametrize("method", ["euler", "heun", "rk4"])
def test_a_step_of_the_embedding_restricts_to_the_step_of_the_field(method: str) -> None:
    inner = spoiled(lambda: GradientField(Dense(3, 4), "tanh"))
    field, step = HamiltonianEmbedding(inner), integrator(method)
    z = draw(inner)
    there = step.step(field, field.embed(z), 0.2)
    assert torch.allclose(field.restrict(there), step.step(inner, z, 0.2), rtol=0, atol=1e-14)
    assert (there[:, 3:] == 0).all()


def test_the_embedded_flow_of_a_rotation_is_a_rotation() -> None:
    rotation = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        rotation.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    field = HamiltonianEmbedding(rotation, (2,))
    z = torch.randn(4, 2, dtype=torch.float64)
    x = field.embed(z)
    for _ in range(100):
        x = integrator("rk4").step(field, x, 0.01)
    exact = z @ torch.linalg.matrix_exp(rotation.weight.detach()).mT
    assert torch.allclose(field.restrict(x), exact, rtol=0, atol=1e-9)
    assert field.facts().hamiltonian


METHODS = {
    "linear": "exact",
    "diagonal": "euler",
    "gradient-of": "euler",
    "module": "euler",
    "separable": "verlet",
    "separable modules": "verlet",
    "damping": "exact",
    "damped": "strang",
    "shear of a module": "exact",
}
"""Euler steps of registered examples are those of the conformance tests."""


@pytest.mark.parametrize(("name", "method"), METHODS.items())
def test_blocks_conform(name: str, method: str) -> None:
    check_block(DynamicalBlock(FIELDS_OF_THIS_FILE[name](), method, FreeSignal(0.5))).require()


SYMPNETS = {
    "G": lambda: sympnet("G", 4, 4, width=5),
    "G odd": lambda: sympnet("G", 2, 3, width=4, odd=True, learned_steps=True),
    "LA": lambda: sympnet("LA", 4, 2, sublayers=3),
    "LA odd": lambda: sympnet("LA", 2, 2, odd=True, sigma="arctan"),
}
EVERY_SYMPNET = pytest.mark.parametrize("make", SYMPNETS.values(), ids=SYMPNETS)


@EVERY_SYMPNET
def test_sympnets_are_symplectic_at_any_weights_and_after_training(make) -> None:
    network = make().double()
    trained = copy.deepcopy(network)
    optimiser = torch.optim.SGD(trained.parameters(), 0.05)
    x = draw(network)
    before = trained(x).detach()
    for _ in range(25):
        optimiser.zero_grad()
        (trained(x) - 0.5 * x).square().mean().backward()
        optimiser.step()
    assert not torch.allclose(trained(x), before)
    large = spoiled(lambda: copy.deepcopy(network), 1000.0)
    for each in (network, trained, large):
        assert {Symplectic, VolumePreserving, Invertible} <= set(map(type, each.properties))
        assert form_defect(each, x) <= 1e-12
    for each in (network, trained):
        assert torch.allclose(each.inverse(each(x)), x, rtol=0, atol=1e-12)
        assert (torch.linalg.det(jacobians(each, x)).abs() - 1).abs().max() <= 1e-12
        assert (each.log_determinant(x) == 0).all()


@pytest.mark.parametrize("kind", ["G", "LA"])
def test_sympnets_conform(kind: str) -> None:
    # Deeper ones with weights ×1000 have Jacobians whose determinant float64 cannot hold.
    check_block(sympnet(kind, 4, 2 if kind == "G" else 1, 3)).require()


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize(("half", "layers", "width", "sublayers"), [(1, 3, 4, 2), (3, 2, 5, 3), (2, 1, 1, 1)])
def test_sympnets_have_the_documented_number_of_parameters(
    half: int, layers: int, width: int, sublayers: int, odd: bool
) -> None:
    def count(kind: str) -> int:
        network = sympnet(kind, 2 * half, layers, width, sublayers, odd=odd)
        return sum(p.numel() for p in network.parameters())

    assert count("G") == layers * width * (half + (1 if odd else 2))
    biases = 0 if odd else half * min(2, sublayers) * (layers + 1)
    assert count("LA") == (layers + 1) * sublayers * half**2 + biases + layers * half
    network = sympnet("LA", 2 * half, layers, width, sublayers, odd=odd).double()
    assert (network.properties.of(Equivariant) is not None) == odd


def test_a_chain_inverts_and_sums_what_its_parts_do() -> None:
    damped = DynamicalBlock(Damping((4,), 0.5, learned=False), "exact", FreeSignal(0.5))
    chain = Chain(sympnet("G", 4, 2, 3), damped, damped).double()
    x = draw(chain)
    assert torch.allclose(chain.inverse(chain(x)), x, rtol=0, atol=1e-12)
    assert torch.allclose(chain.log_determinant(x), torch.full((5,), -1.0, dtype=torch.float64), rtol=0, atol=1e-15)
    assert verify(chain, x).passed
    with pytest.raises(InvalidArgument, match=r"part 0 \(ReLU\) has no inverse"):
        Chain(nn.ReLU()).inverse(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sympnet("H", 4, 2), "kind"),
        (lambda: sympnet("G", 3, 2), "even number"),
        (lambda: sympnet("G", 4, 0), "layers is 0"),
        (lambda: sympnet("G", 4, 2, odd=True, sigma="relu"), "odd activation"),
        (lambda: NeuralHamiltonian(4, LinearField(3)), "the field one of"),
        (lambda: NeuralHamiltonian(4, GradientField(Dense(4, 3), "arctan")), "no closed-form potential"),
        (lambda: NeuralHamiltonian(4, DampedHamiltonian(entries=4)), "no gradient field"),
        (lambda: GradientOf(nn.Linear(2, 2), (2,))(torch.zeros(1, 2)), "one number per sample"),
        (lambda: SeparableHamiltonian(), "give entries="),
        (lambda: SeparableHamiltonian(None, nn.Linear(2, 1)), r"give entries=, .* or GradientOf\(module, in_shape\)"),
        (lambda: conservative_field(nn.Linear(2, 1)), "give in_shape="),
        (lambda: HamiltonianEmbedding(nn.Linear(2, 2)), "give the shape of z"),
        (lambda: Damping((4,), -1.0), "gamma"),
        (lambda: Damping((3,)), "even number"),
        (lambda: DissipativeField(3, LinearField(2)), "the field one of"),
        (lambda: LinearField(0), "entries is 0; a whole number from 1 is needed"),
        (lambda: Chain(), "at least one part"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(make, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_the_parts_of_a_separable_hamiltonian_fit_its_dimension() -> None:
    with pytest.raises(InvalidArgument, match="potential"):
        SeparableHamiltonian(None, LinearField(3), entries=4)
    with pytest.raises(InvalidArgument, match="kinetic energy"):
        SeparableHamiltonian(LinearField(3), LinearField(2))


def test_a_potential_is_not_taken_for_a_force() -> None:
    field = PartitionedField(None, nn.Linear(2, 1), (4,))
    for call in (field, lambda x: field.kick.flow(x, 0.1)):
        with pytest.raises(InvalidArgument, match=r"the force has shape \(3, 1\), the half that it moves \(3, 2\)"):
            call(torch.randn(3, 4))


class Drive(Damping):
    """It drives p where its class damps it."""

    def gamma(self) -> float:
        return -0.5


def driven() -> list[VectorField]:
    late = Damping((2,), 0.5, learned=False)
    late.fixed = -0.5
    hamiltonian = DampedHamiltonian(None, unit_spring(), gamma=0.5, learned=False)
    hamiltonian.damping.fixed = -0.5
    return [Drive((2,)), late, hamiltonian]


def test_a_rate_below_zero_is_refused_and_not_taken_for_none() -> None:
    """p ↦ 1.5p of an Euler step: no facts of a field that loses energy hold."""
    x = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    for field in driven():
        block = DynamicalBlock(field, "euler", FreeSignal(1.0)).double()
        assert float(block(x)[0, 1].detach()) == 1.5
        for ask in (field.facts, lambda block=block: block.properties):
            with pytest.raises(InvalidArgument, match=r"^gamma is -0\.5; allowed are values in \[0, inf\)\.$"):
                ask()


def test_the_factor_of_the_form_is_true_or_not_declared() -> None:
    field, flow = Damping((2,), 705.0, learned=False), ExactFlow()
    for time in (-1.0, 1.0):
        stated = flow.declare(field, time).properties.of(ConformalSymplectic)
        assert stated is not None
        assert stated.factor == pytest.approx(math.exp(-705.0 * time), rel=1e-12)
        assert flow.declare(field, 2 * time).properties.of(ConformalSymplectic) is None
        twice = DynamicalBlock(field, "exact", EvenSteps(2 * time, 2))
        assert twice.properties.of(ConformalSymplectic) is None
    ways = [DynamicalBlock(field, "exact", FreeSignal(time)) for time in (1.0, -1.0)]
    there_and_back = declare(nn.Sequential(*ways)).properties.of(ConformalSymplectic)
    assert there_and_back is not None
    assert there_and_back.factor == pytest.approx(1.0, rel=1e-12)
    large, small, none = map(ConformalSymplectic, (1e200, 1e-200, 0.0))
    assert large.then(large) is small.then(small) is None
    assert large.then(none) == none.then(small) == none


def test_a_rotation_is_no_gradient_of_an_energy() -> None:
    """Λ(x)x in the place of ∇H, once the field is made, is the gradient of nothing that X could keep or lose."""
    for field, part in ((NeuralHamiltonian(4, width=3), "hamiltonian"), (DissipativeField(4, width=3), "slope")):
        assert field.standing_facts() != FieldFacts()
        setattr(field, part, RotationField(4))
        for facts in (field.facts(), field.standing_facts()):
            assert replace(facts, reason="") == FieldFacts()
        assert "RotationField has no known potential" in field.facts().reason
    damped = DampedHamiltonian.example().double()
    assert damped.facts().damping is not None
    assert damped.standing_facts().dissipates_energy
    damped.kick.force = RotationField(2).double()
    for facts in (damped.facts(), damped.standing_facts()):
        assert replace(facts, reason="") == FieldFacts()
    assert not list(false_facts(damped, draw(damped)))


def test_the_halves_of_a_damped_state_cannot_be_set() -> None:
    field = Damping((4,), 0.5, learned=False)
    with pytest.raises(AttributeError, match="split"):
        field.split = 1
    assert field(torch.ones(1, 4)).tolist() == [[0.0, 0.0, -0.5, -0.5]]


class Elsewhere(Damping):
    """It leaves the first entry alone, and damps a position too."""

    split = 1


class Twofold(Damping):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_damping_of_other_entries_gives_the_form_no_factor() -> None:
    """Its flow is diag(1, c, c, c): of (q₁, p₁) the form is multiplied by c, of (q₂, p₂) by c²."""
    field = Elsewhere((4,), 0.5, learned=False).double()
    x, flow = draw(field), ExactFlow()
    assert form_defect(DynamicalBlock(field, "exact", FreeSignal(1.0)), x, math.exp(-0.5)) > 0.05
    assert field.facts().damping is None
    assert not list(false_facts(field, x))
    assert flow.declare(field, 1.0).properties.of(ConformalSymplectic) is None
    assert flow.declare(Damping((4,), 0.5, learned=False), 1.0).properties.of(ConformalSymplectic) is not None


@pytest.mark.parametrize("kind", [Elsewhere, Twofold])
def test_a_damping_put_in_place_of_another_is_not_taken_for_it(kind: type[Damping]) -> None:
    field = DampedHamiltonian.example().double()
    field.damping = kind((4,), 0.5, learned=False).double()
    for facts in (field.facts(), field.standing_facts()):
        assert (facts.damping, facts.dissipates_energy) == (None, False)
    assert not list(false_facts(field, draw(field)))
    reason = integrator("gonzalez").why_not(field)
    assert reason == f"the {kind.__name__} of a damped Hamiltonian field is not known to damp p alone"
