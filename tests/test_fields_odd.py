"""The odd part of a field."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import EvenPotential, GradientField, PartitionedField, VectorField
from dynablocks.fields.odd import OddField
from dynablocks.linear import Dense, LinearMap, OrthogonalDense
from dynablocks.properties import Equivariant, Symplectic, verify
from dynablocks.switching.signals import FreeSignal
from dynablocks.testing import check_block


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


@pytest.mark.parametrize("method", ["euler", "rk4"])
def test_conformance(method: str) -> None:
    torch.manual_seed(0)
    check_block(DynamicalBlock(OddField.example(), method, FreeSignal(0.5))).require()
