"""The odd part of a field."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import (
    ConstrainedField,
    DampedHamiltonian,
    EvenPotential,
    FieldFacts,
    GradientField,
    PartitionedField,
    VectorField,
)
from dynablocks.fields.odd import OddField
from dynablocks.linear import Dense, LinearMap, OrthogonalDense
from dynablocks.properties import Equivariant, Symplectic, verify
from dynablocks.switching.signals import FreeSignal
from dynablocks.testing import check_block
from dynablocks.testing.facts import false_facts


@pytest.fixture
def inner() -> GradientField:
    torch.manual_seed(0)
    field = GradientField(Dense(3, 5), "sigmoid", alpha=1.0).double()
    torch.nn.init.normal_(field.bias)
    torch.nn.init.normal_(field.alpha)
    return field


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_it_is_exactly_odd_where_the_field_is_not(inner: GradientField, x: Tensor) -> None:
    field = OddField(inner)
    assert torch.equal(field(-x), -field(x))
    assert float((inner(-x) + inner(x)).detach().abs().max()) > 0.1
    assert not inner.facts().odd
    assert field.facts().odd


def test_the_odd_part_of_an_odd_field_is_that_field(x: Tensor) -> None:
    torch.manual_seed(0)
    odd = GradientField(Dense(3, 5), "tanh", bias=False).double()
    assert torch.allclose(OddField(odd)(x), odd(x), rtol=0, atol=1e-15)


def test_it_is_the_gradient_of_its_potential(inner: GradientField, x: Tensor) -> None:
    field = OddField(inner)
    slope = torch.func.grad(lambda y: field.potential(y).sum())(x)
    assert torch.allclose(slope, field(x), rtol=0, atol=1e-14)
    assert torch.equal(field.potential(x), field.potential(-x))


def test_the_odd_part_halves_and_an_even_potential_does_not(inner: GradientField, x: Tensor) -> None:
    """Stored results depend on either factor, to the last bit."""
    odd, even = OddField(inner), EvenPotential(inner)
    difference = inner(x) - inner(-x)
    assert torch.equal(odd(x), 0.5 * difference)
    assert torch.equal(even(x), difference)
    for field, factor in ((odd, 0.5), (even, 1.0)):
        assert torch.equal(field.potential(x), factor * (inner.potential(x) + inner.potential(-x)))
        slope = torch.func.grad(lambda y, field=field: field.potential(y).sum())(x)
        assert torch.allclose(slope, field(x), rtol=0, atol=1e-13)
        assert list(field.state_dict()) == [f"field.{key}" for key in inner.state_dict()]


@pytest.mark.parametrize("kind", [OddField, EvenPotential])
def test_an_orthogonal_weight_is_computed_once_for_both_points(
    kind: type[VectorField], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = kind(GradientField(OrthogonalDense(3, 3), "sigmoid").double())
    computed, compute = [], OrthogonalDense.compute_weights

    def counted(self: OrthogonalDense, alike: list[LinearMap]) -> object:
        computed.append(self)
        return compute(self, alike)

    monkeypatch.setattr(OrthogonalDense, "compute_weights", counted)
    field(x)
    assert len(computed) == 1


def test_facts_bound_the_dense_jacobian(inner: GradientField, x: Tensor) -> None:
    field = OddField(inner)
    facts = field.facts()
    jacobians = torch.func.vmap(torch.func.jacrev(lambda row: field(row[None])[0]))(x)
    assert torch.allclose(jacobians, jacobians.mT, rtol=0, atol=1e-15)
    low, high = facts.spectrum or (0.0, 0.0)
    eigenvalues = torch.linalg.eigvalsh(jacobians.detach())
    assert low <= float(eigenvalues.min()) <= float(eigenvalues.max()) <= high
    assert float(torch.linalg.matrix_norm(jacobians.detach(), 2).max()) <= facts.lipschitz


def test_a_hamiltonian_of_the_odd_part(x: Tensor) -> None:
    torch.manual_seed(2)
    force = GradientField(Dense(1, 4), "sigmoid").double()
    torch.nn.init.normal_(force.bias)
    whole = PartitionedField(force, GradientField(Dense(1, 4), "tanh").double())
    field, pairs = OddField(whole), x[:, :2]
    slope = torch.func.grad(lambda y: field.energy(y).sum())(pairs)
    assert field.facts().hamiltonian
    assert torch.allclose(field(pairs), torch.stack([slope[:, 1], -slope[:, 0]], dim=1), rtol=0, atol=1e-14)


def test_steps_of_odd_forces_are_odd_and_symplectic() -> None:
    torch.manual_seed(3)
    block = DynamicalBlock(PartitionedField(OddField.example(), OddField.example()), "suzuki4", FreeSignal(0.1))
    assert block.properties.of(Equivariant) is not None
    assert block.properties.of(Symplectic) is not None
    assert verify(block, torch.randn(4, 8)).require().passed


def test_a_wrong_declaration_is_found(inner: GradientField, x: Tensor) -> None:
    class Lie(GradientField):
        def facts(self):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            return replace(super().facts(), odd=True)

    broken = Lie(Dense(3, 5), "sigmoid")
    assert not verify(DynamicalBlock(broken, "euler", FreeSignal(0.1)), x, kinds=(Equivariant,)).passed


def test_it_says_that_it_has_no_flow(inner: GradientField, x: Tensor) -> None:
    with pytest.raises(InvalidArgument, match="wrap the forces"):
        OddField(inner).flow(x, 1.0)


def test_conformance() -> None:
    torch.manual_seed(0)
    check_block(DynamicalBlock(OddField.example(), "rk4", FreeSignal(0.5))).require()


class Wavy(GradientField):
    """X(x) = Aᵀ(2g(u) − sin u) for u = Ax + b."""

    def profile(self, u: Tensor) -> Tensor:
        return 2 * super().profile(u) - torch.sin(u)


class Doubled(GradientField):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def split(self) -> tuple[GradientField, GradientField]:
        parts = super().split()
        for part in parts:
            part.alpha.data.mul_(2.0)
        return parts


@pytest.mark.parametrize("alpha", [None, -0.7])
def test_a_field_of_another_formula_has_no_split_but_its_own(alpha: float | None, x: Tensor) -> None:
    wavy, doubled = (kind(Dense(3, 4), "tanh", alpha=alpha).double() for kind in (Wavy, Doubled))
    plain = [GradientField(field.linear, "tanh", alpha=alpha).double() for field in (wavy, doubled)]
    # What plain fields give would add up to another field.
    assert float((plain[0].split()[0](x) + plain[0].split()[1](x) - wavy(x)).detach().abs().max()) > 1e-2
    with pytest.raises(InvalidArgument, match=r"Wavy has a profile of its own, .* give it a split of its own"):
        wavy.split()
    first, second = doubled.split()
    assert torch.allclose(first(x) + second(x), doubled(x), rtol=0, atol=1e-13)
    plain[1].forward = lambda x: x
    with pytest.raises(InvalidArgument, match="GradientField has a forward of its own"):
        plain[1].split()


@pytest.mark.parametrize(
    "make", [OddField, EvenPotential, lambda given: ConstrainedField(given, [None])], ids=["odd", "even", "constrained"]
)
def test_a_field_made_of_another_refuses_what_is_none(make: Callable[[object], VectorField]) -> None:
    others = (torch.nn.Linear(4, 4), "a Linear"), (Dense(4, 4), "a Dense"), (OddField, "the class OddField")
    for given, kind in others:
        with pytest.raises(InvalidArgument, match=rf"^(field|inner) is {kind}; a VectorField is needed: one of"):
            make(given)
    shapeless = VectorField()
    with pytest.raises(InvalidArgument, match=r"^in_shape of VectorField is None; set it to the shape of one sample"):
        make(shapeless)


def test_the_odd_part_of_a_damped_field_has_the_even_part_of_its_energy() -> None:
    field, states = DampedHamiltonian.example().double(), torch.randn(4, 4, dtype=torch.float64)
    expected = 0.5 * (field.energy(states) + field.energy(-states))
    assert torch.equal(OddField(field).energy(states), expected)


class Tilted(VectorField):
    """X = (1 + q)𝕁∇H keeps H = q + p²/2; its odd part (p, −q) does not keep p²/2."""

    in_shape = (2,)

    def energy(self, x: Tensor) -> Tensor:
        return x[:, 0] + 0.5 * x[:, 1].square()

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return torch.stack([(1 + q) * p, -(1 + q)], 1)

    def facts(self) -> FieldFacts:
        return FieldFacts(conserves_energy=True)


class Downhill(VectorField):
    """X = −e^{−3x}H' falls along H = x + x²/2; its odd part climbs x²/2 near 0."""

    in_shape = (1,)

    def energy(self, x: Tensor) -> Tensor:
        return (x + 0.5 * x.square()).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return -(-3 * x).exp() * (1 + x)

    def facts(self) -> FieldFacts:
        return FieldFacts(dissipates_energy=True)


class Filling(VectorField):
    """max(−Σx, 0) in every entry: 0 on the nonnegative states, where the odd part is negative."""

    in_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(-x.sum(1, keepdim=True)).expand_as(x)

    def facts(self) -> FieldFacts:
        return FieldFacts(positive=True)


def test_energies_and_signs_are_not_those_of_the_odd_part() -> None:
    tilted, downhill, filling = OddField(Tilted()), OddField(Downhill()), OddField(Filling())
    assert tilted(torch.tensor([[1.0, 0.5]]).double()).tolist() == [[0.5, -1.0]]  # d(p²/2)/dt = −1/2
    assert downhill(torch.tensor([[0.1]]).double()).item() > 0.19  # d(x²/2)/dt > 0
    assert filling(torch.tensor([[0.0, 1.0]]).double()).tolist() == [[-0.5, -0.5]]
    for facts in (tilted.facts(), tilted.standing_facts(), downhill.facts(), downhill.standing_facts()):
        assert not facts.conserves_energy
        assert not facts.dissipates_energy
    assert not filling.facts().positive
    assert not filling.standing_facts().positive


@pytest.mark.parametrize("factor", [2.0, -0.3])
@pytest.mark.parametrize("kind", [OddField, EvenPotential])
def test_facts_are_those_of_the_factor_of_the_class_or_of_the_instance(
    kind: type[VectorField], factor: float, inner: GradientField, x: Tensor
) -> None:
    scaled, set_later = type("Multiple", (kind,), {"factor": factor})(inner), kind(inner)
    set_later.factor = factor
    for field in (scaled, set_later):
        assert torch.equal(field(x), factor * (inner(x) - inner(-x)))
        assert not list(false_facts(field, 0.1 * x))
        plain = kind(inner)
        expected = abs(factor / plain.factor) * plain.facts().lipschitz
        assert field.facts().lipschitz == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("factor", [2.0, -0.3])
def test_the_hamiltonian_and_the_damping_of_an_odd_part_have_its_factor(factor: float) -> None:
    class Multiple(OddField):
        pass

    Multiple.factor = factor
    torch.manual_seed(2)
    force = GradientField(Dense(1, 4), "sigmoid").double()
    torch.nn.init.normal_(force.bias)
    field = Multiple(PartitionedField(None, force))
    states = torch.randn(5, 2, dtype=torch.float64)
    slope = torch.func.grad(lambda y: field.energy(y).sum())(states)
    assert field.facts().hamiltonian
    torch.testing.assert_close(field(states), torch.stack([slope[:, 1], -slope[:, 0]], dim=1), rtol=0, atol=1e-13)
    damped = Multiple(DampedHamiltonian(None, force, gamma=0.5, learned=False).double())
    assert damped.facts().damping == pytest.approx(2 * factor * 0.5, rel=1e-15)
    assert not list(false_facts(damped, states))
