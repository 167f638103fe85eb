"""What steps ask of a field: the structure that stands for all parameters, read from none of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.ensembles import ensemble_forward, stacked_parameters
from dynablocks.fields import (
    FIELDS,
    ConstrainedField,
    DampedHamiltonian,
    DissipativeField,
    EvenPotential,
    FieldFacts,
    GradientField,
    LinearField,
    MassPreservingField,
    MetricField,
    NeuralHamiltonian,
    OddField,
    PartitionedField,
    PlanarField,
    PotentialSum,
    ShearField,
    VectorField,
)
from dynablocks.fields.presnov import presnov
from dynablocks.integrators import integrator
from dynablocks.integrators.discrete_gradient import discrete_gradient, energy_form
from dynablocks.linear import Dense, LinearMap
from dynablocks.properties import Equivariant, LinearInvariant, NormPreserving, verify
from dynablocks.switching import FreeSignal

EVERY_FIELD: dict[str, Callable[[], VectorField]] = {name: FIELDS[name].example for name in sorted(FIELDS)} | {
    "sum": lambda: PotentialSum(LinearField(3, bias=True), GradientField(Dense(3, 4), "tanh"), sign=-1.0),
    "sum with a planar field": lambda: PotentialSum(LinearField(2), PlanarField(Dense(2, 2))),
    "even": lambda: EvenPotential(LinearField(3)),
    "shear in another metric": lambda: ShearField(MetricField.example()),
    "shear of a module": lambda: ShearField(nn.Linear(2, 2), (4,)),
    "odd Hamiltonian": lambda: OddField(NeuralHamiltonian(4, width=3)),
    "odd mass": lambda: OddField(MassPreservingField(3, 5)),
    "damped": lambda: DampedHamiltonian(GradientField(Dense(2, 3), "tanh", expansive=True, bias=False), None, 4),
    "presnov gradient": lambda: presnov(MassPreservingField(3, 5), nodes=4).gradient,
    "presnov tangent": lambda: presnov(MassPreservingField(3, 5), nodes=4).tangent,
}
READ = ("planar", "sum with a planar field", "two-matrix")
"""Fields whose structure does not stand apart from their facts, since no step asks for it."""

STRUCTURE = (
    "conservative",
    "linear_invariants",
    "divergence_free",
    "hamiltonian",
    "conserves_energy",
    "tangent",
    "positive",
    "metric",
)


def check_standing_facts(standing: FieldFacts, facts: FieldFacts) -> None:
    """The structure is that of the facts, and no constant is better."""
    for name in STRUCTURE:
        assert getattr(standing, name) == getattr(facts, name), name
    assert facts.dissipates_energy or not standing.dissipates_energy
    assert facts.lipschitz <= standing.lipschitz
    assert facts.one_sided <= standing.one_sided


@pytest.mark.parametrize("name", EVERY_FIELD)
def test_standing_facts_are_the_structure_of_the_facts(name: str) -> None:
    field = EVERY_FIELD[name]().double()
    check_standing_facts(field.standing_facts(), field.facts())
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
    check_standing_facts(field.standing_facts(), field.facts())


@pytest.mark.parametrize("name", [name for name in EVERY_FIELD if name not in READ])
def test_standing_facts_read_no_parameter(name: str) -> None:
    field = EVERY_FIELD[name]()
    facts = field.facts()
    # Parameters on the meta device have no numbers to read.
    check_standing_facts(field.to("meta").standing_facts(), facts)


def test_facts_of_parameters_without_numbers_cannot_be_made() -> None:
    with pytest.raises(RuntimeError):
        LinearField(3).to("meta").facts()


def test_a_standing_fact_too_many_is_found() -> None:
    class Boasting(GradientField):
        def _standing_facts(self) -> FieldFacts:
            return FieldFacts(conservative=True, tangent=True)

    field = Boasting(Dense(3, 4), "tanh")
    with pytest.raises(AssertionError, match="tangent"):
        check_standing_facts(field.standing_facts(), field.facts())


def test_a_subclass_with_facts_of_its_own_stands_by_them() -> None:
    class Tangent(GradientField):
        def facts(self) -> FieldFacts:
            return replace(super().facts(), tangent=True)

    field = Tangent(Dense(3, 4), "tanh")
    assert field.standing_facts() == field.facts()
    assert integrator("calvo").why_not(field) is None
    assert integrator("calvo").why_not(GradientField(Dense(3, 4), "tanh")) is not None


STEPS = {
    "projected, one mass": ("projected-rk4", lambda: MassPreservingField(3, 5)),
    "projected, two": (
        "projected-heun",
        lambda: ConstrainedField(GradientField(Dense(4, 5), "tanh"), [None, (1.0, -2.0, 0.5, 0.0)]),
    ),
    "projected, norm": ("projected-heun", lambda: presnov(MassPreservingField(3, 5), nodes=4).tangent),
    "norm-preserving": ("calvo", lambda: presnov(MassPreservingField(3, 5), nodes=4).tangent),
    "norm-preserving, rotations": ("lie-euler", lambda: presnov(MassPreservingField(3, 5), nodes=4).tangent),
}
SOLVED = {
    "of a gradient field": ("gonzalez", lambda: GradientField(Dense(3, 4), "tanh")),
    "of a Hamiltonian": ("mean-value", lambda: NeuralHamiltonian(4, width=3)),
    "of an odd part": ("gonzalez", lambda: OddField(NeuralHamiltonian(4, width=3))),
    "of halves": ("gonzalez", PartitionedField.example),
    "of a dissipative field": ("mean-value", lambda: DissipativeField(3, width=4)),
}


def block_of(method: str, make: Callable[[], VectorField]) -> DynamicalBlock:
    """A float64 block whose parameters are away from their start."""
    block = DynamicalBlock(make(), method, FreeSignal(0.1)).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block


@pytest.mark.parametrize("name", [*STEPS, *SOLVED])
def test_steps_ask_for_no_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("a norm was asked for")

    for bound in ("norm_bounds", "smallest_singular_value"):
        monkeypatch.setattr(LinearMap, bound, refuse)
    for place in ("mass.linear_norm_bounds", "dissipative.linear_norm_bounds", "symmetric.checked_float64"):
        monkeypatch.setattr(f"dynablocks.fields.{place}", refuse)
    block = block_of(*(STEPS | SOLVED)[name])
    assert block(torch.randn(4, *block.in_shape, dtype=torch.float64)).isfinite().all()
    with pytest.raises(AssertionError, match="a norm was asked for"):
        block.fields[0].facts()


@pytest.mark.parametrize("name", [*STEPS, "of an odd part"])
def test_steps_take_stacked_parameters(name: str) -> None:
    blocks = [block_of(*(STEPS | SOLVED)[name]) for _ in range(3)]
    x = torch.randn(5, *blocks[0].in_shape, dtype=torch.float64)
    outputs = ensemble_forward(blocks[0], stacked_parameters(blocks), x)
    for run, block in enumerate(blocks):
        torch.testing.assert_close(outputs[run], block(x), rtol=0, atol=1e-12)
    assert not torch.allclose(outputs[0], outputs[1])


class Residual(nn.Module):
    """(x, y) in one row ↦ y − x − hS∇̄H(x, y), which vanishes for the step of a discrete gradient."""

    def __init__(self, block: DynamicalBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, pairs: Tensor) -> Tensor:
        x, y = pairs.chunk(2, dim=1)
        form = energy_form(self.block.fields[0])
        assert not isinstance(form, str)
        mean = discrete_gradient(self.block.method.kind, form.energy, x, y, gradient=form.gradient)
        return y - x - self.block.signal.steps * form.structure((x + y) / 2, mean)


@pytest.mark.parametrize("name", SOLVED)
def test_residuals_of_discrete_gradients_take_stacked_parameters(name: str) -> None:
    """As their steps do; no equation is solved here."""
    networks = [Residual(block_of(*SOLVED[name])) for _ in range(3)]
    x = torch.randn(5, *networks[0].block.in_shape, dtype=torch.float64)
    pairs = torch.cat([x, networks[0].block(x).detach()], dim=1)
    outputs = ensemble_forward(networks[0], stacked_parameters(networks), pairs)
    for run, network in enumerate(networks):
        torch.testing.assert_close(outputs[run], network(pairs), rtol=0, atol=1e-12)
    assert float(outputs[0].detach().abs().max()) < 1e-11 < float(outputs[1].detach().abs().max())


class Turning(VectorField):
    """X = w × x for a learned w: ‖x‖ stays whatever w is, and wᵀx as long as w does."""

    in_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.axis = nn.Parameter(torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cross(self.axis.expand_as(x), x)

    def facts(self) -> FieldFacts:
        return FieldFacts(tangent=True, odd=True, linear_invariants=(tuple(self.axis.detach().tolist()),))

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(tangent=True)


def test_a_projection_keeps_what_it_projects_onto_and_no_other_fact() -> None:
    """Heun's step keeps wᵀx; the way back to the norm of x, which scales the state, does not."""
    field, x = Turning(), torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    heun, projected = (DynamicalBlock(field, name, FreeSignal(1.0)).double() for name in ("heun", "projected-heun"))
    missed = [float(((block(x) - x) @ field.axis).detach().abs()) for block in (heun, projected)]
    assert missed[0] < 1e-13 < 0.1 < missed[1]
    assert heun.properties.of(LinearInvariant) is not None
    assert [type(kept) for kept in projected.properties] == [NormPreserving, Equivariant]
    verify(projected, x).require()
    (loss,) = projected.method.declare(field, 1.0).losses
    assert loss.startswith("LinearInvariant is lost by Projected(ExplicitRungeKutta(heun)): it projects onto what")
