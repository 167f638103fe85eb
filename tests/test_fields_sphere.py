"""Fields tangent to spheres and the Presnov decomposition against dense formulas and known decompositions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.ensembles import ensemble_forward, stacked_parameters
from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, VectorField
from dynablocks.fields.base import potential_of
from dynablocks.fields.mass import MassPreservingField
from dynablocks.fields.presnov import presnov
from dynablocks.fields.sphere import RotationField, SphereField, TangentField
from dynablocks.fitting.objective import Objective
from dynablocks.linear import Conv, Dense
from dynablocks.properties import NormPreserving, verify
from dynablocks.switching import FreeSignal
from dynablocks.testing import check_block

FIELDS: dict[str, Callable[[], TangentField]] = {
    "sphere": SphereField.example,
    "odd sphere": lambda: SphereField(Dense(3, 5), Dense(3, 5), bias=False),
    "image sphere": lambda: SphereField(Conv((1, 3, 3), 2), Conv((1, 3, 3), 2)),
    "rotation": RotationField.example,
    "presnov": lambda: presnov(MassPreservingField(3, 5), nodes=8).tangent,
}


def build(name: str, factor: float = 1.0) -> tuple[TangentField, Tensor]:
    """The field with parameters away from their start, times ``factor``, and a batch of states."""
    field = FIELDS[name]().double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).mul_(factor)
    return field, torch.randn(7, *field.in_shape, dtype=torch.float64)


def generator(field: TangentField, x: Tensor) -> Tensor:
    """Λ(x): the field's own where it has one, otherwise that of rank two, (Xxᵀ − xXᵀ)/‖x‖²."""
    if isinstance(field, RotationField):
        return field.generator(x)
    flat = x.flatten(1)
    outer = field(x).flatten(1).unsqueeze(-1) * flat.unsqueeze(-2) / flat.square().sum(1)[:, None, None]
    return outer - outer.mT


@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_tangent_and_generators_are_skew(name: str, factor: float) -> None:
    field, x = build(name, factor)
    rate, flat = field(x).flatten(1), x.flatten(1)
    assert ((rate * flat).sum(1).abs() <= 1e-14 * rate.norm(dim=1) * flat.norm(dim=1)).all()
    matrix = generator(field, x)
    assert torch.equal(matrix, -matrix.mT)
    product = (matrix @ flat.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(product, rate, atol=1e-13 * float(rate.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("chart", ["exp", "cayley"])
@pytest.mark.parametrize("name", FIELDS)
def test_rotations_equal_the_dense_matrix_functions(name: str, chart: str) -> None:
    import scipy.linalg

    field, x = build(name)
    v = torch.randn_like(x)
    moved = field.rotate(x, v, 0.7, chart).flatten(1)
    for at, before, after in zip(generator(field, x), v.flatten(1), moved, strict=True):
        matrix = 0.7 * at.detach().numpy()
        eye = np.eye(len(matrix))
        exact = scipy.linalg.expm(matrix) if chart == "exp" else np.linalg.solve(eye - matrix / 2, eye + matrix / 2)
        assert np.abs(exact @ before.numpy() - after.detach().numpy()).max() < 1e-13


def test_the_sphere_field_is_the_projected_one() -> None:
    field, x = build("sphere")
    assert isinstance(field, SphereField)
    for row, rate in zip(x, field(x), strict=True):
        projector = torch.eye(3, dtype=torch.float64) - torch.outer(row, row) / row.square().sum()
        f = field.outer.weight.mT @ torch.tanh(field.inner.weight @ row + field.bias)
        assert torch.allclose(projector @ f, rate, rtol=0, atol=1e-14)


def test_the_rotation_field_is_its_skew_matrix_times_the_state() -> None:
    field, x = RotationField(3, 5, "sigmoid").double(), torch.randn(7, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
        hidden = torch.sigmoid(x @ field.inner.matrix.mT + field.bias)
        a, b, c = (hidden @ field.outer.matrix).unbind(1)
        u, v, w = x.unbind(1)
        expected = torch.stack([a * v + b * w, c * w - a * u, -b * u - c * v], 1)
        torch.testing.assert_close(field(x), expected, rtol=0, atol=1e-12)


def test_zero_is_at_rest_with_finite_gradients() -> None:
    for name in FIELDS:
        field, x = build(name)
        zero = torch.zeros_like(x).requires_grad_(True)
        image = field(zero)
        assert not image.any()
        (gradient,) = torch.autograd.grad(image.sum() + field.rotate(zero, zero, 0.3).sum(), zero)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("sphere", "rotation")])
def test_blocks_pass_the_conformance_suite(name: str) -> None:
    check_block(DynamicalBlock(FIELDS[name](), "euler", FreeSignal(0.1))).require()


def test_oddness_is_declared_where_it_holds() -> None:
    for name in FIELDS:
        field, x = build(name)
        assert bool(torch.allclose(field(-x), -field(x), rtol=0, atol=1e-13)) == field.facts().odd


class NotQuiteTangent(SphereField):
    """The projection with a radial part of 1e-9."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-9 * x

    def facts(self) -> FieldFacts:
        return super().facts()

    def rotate(self, at: Tensor, v: Tensor, time: Tensor | float, chart: str = "exp") -> Tensor:
        return v + time * self(at)


def test_a_broken_twin_is_caught() -> None:
    block = DynamicalBlock(NotQuiteTangent(Dense(3, 5)), "lie-euler", FreeSignal(0.1))
    assert block.properties.of(NormPreserving) is not None
    assert not verify(block, torch.randn(4, 3), kinds=(NormPreserving,)).passed
    assert "properties at the start" in check_block(block).failed


TURN = torch.tensor([[0.0, 2.0, -1.0], [-2.0, 0.0, 0.5], [1.0, -0.5, 0.0]], dtype=torch.float64)


def quartic_gradient(x: Tensor) -> Tensor:
    """∇V of V = Σ xᵢ⁴/4 + x₀x₁x₂."""
    product = torch.stack([x[:, 1] * x[:, 2], x[:, 0] * x[:, 2], x[:, 0] * x[:, 1]], dim=1)
    return x**3 + product


@pytest.mark.parametrize("nodes", [3, 16])
def test_presnov_recovers_known_parts(nodes: int) -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    parts = presnov(
        lambda y: quartic_gradient(y) + (1 + y.square().sum(1, keepdim=True)) * (y @ TURN.mT), (3,), nodes=nodes
    )
    assert torch.allclose(parts.gradient(x), quartic_gradient(x), rtol=0, atol=1e-12)
    assert torch.allclose(parts.tangent(x), (1 + x.square().sum(1, keepdim=True)) * (x @ TURN.mT), rtol=0, atol=1e-12)
    potential = (x**4).sum(1) / 4 + x.prod(1)
    assert torch.allclose(parts.potential(x), potential, rtol=0, atol=1e-12)
    assert torch.allclose(potential_of(parts.gradient, x), potential, rtol=0, atol=1e-12)


def test_presnov_of_the_papers_first_field_has_no_tangent_part() -> None:
    x = 2 * torch.rand(20, 4, dtype=torch.float64) - 1
    parts = presnov(lambda y: y.sin() ** 3 + y**3, (4,))
    assert torch.allclose(parts.gradient(x), x.sin() ** 3 + x**3, rtol=0, atol=1e-12)
    assert parts.tangent(x).abs().max() < 1e-12


def test_presnov_parts_of_a_field_with_one_derivative_are_not_lipschitz() -> None:
    """f = (|x₂|^{3/2}, 0): U = (2/5) x₁|x₂|^{3/2} and ∂₂U = (3/5) x₁ sign(x₂)|x₂|^{1/2}; (x₂², 0) has (2/3) x₁x₂."""
    small = torch.tensor([1e-2, 1e-4, 1e-6], dtype=torch.float64)
    points = torch.stack([torch.ones_like(small), small], dim=1)
    rough = presnov(lambda x: torch.stack([x[:, 1].abs() ** 1.5, 0 * x[:, 1]], dim=1), (2,), nodes=32)
    assert torch.allclose(rough.gradient(points)[:, 1] / small, 0.6 / small.sqrt(), rtol=1e-4, atol=0)
    smooth = presnov(lambda x: torch.stack([x[:, 1] ** 2, 0 * x[:, 1]], dim=1), (2,))
    assert torch.allclose(smooth.gradient(points)[:, 1], 2 / 3 * small, rtol=1e-12, atol=0)


def test_presnov_structure_is_exact_with_too_few_nodes() -> None:
    inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    coarse, fine = presnov(inner, (3,), nodes=2), presnov(inner, (3,), nodes=24)
    assert ((coarse.tangent(x) * x).sum(1).abs() < 1e-15 * 10).all()
    hessian = torch.func.vmap(torch.func.jacrev(lambda v: coarse.gradient(v[None])[0]))(x)
    assert torch.allclose(hessian, hessian.mT, rtol=0, atol=1e-14)
    assert torch.allclose(fine.gradient(x) + fine.tangent(x), inner(x), rtol=0, atol=1e-12)
    assert not torch.allclose(coarse.gradient(x) + coarse.tangent(x), inner(x), rtol=0, atol=1e-6)


def test_presnov_parts_train_the_parameters_of_f() -> None:
    inner = nn.Linear(3, 3).double()
    parts = presnov(inner, (3,))
    x = torch.randn(4, 3, dtype=torch.float64)
    (parts.gradient(x).square().sum() + parts.tangent(x).square().sum()).backward()
    assert inner.weight.grad is not None
    assert inner.weight.grad.any()
    check_block(DynamicalBlock(parts.gradient, "euler", FreeSignal(0.1))).require()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SphereField(Dense(3, 4), Dense(3, 5)), "same shapes"),
        (lambda: RotationField(1), "entries is 1; a whole number from 2 is needed"),
        (lambda: presnov(lambda x: x), "in_shape="),
        (lambda: presnov(lambda x: x, (2,), nodes=0), "nodes is 0; a whole number from 1 is needed"),
    ],
)
def test_errors_say_what_to_do(make: Callable[[], VectorField], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        make()


def test_rotations_of_no_sample_are_no_rotations() -> None:
    block = DynamicalBlock(RotationField(3), "lie-euler", FreeSignal(0.1))
    assert block(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("method", ["lie-euler", "lie-midpoint", "cayley", "cayley-midpoint"])
def test_lie_steps_take_stacked_parameters(method: str) -> None:
    """Of runs whose exponentials are squared a different number of times."""
    blocks, x = [], torch.randn(5, 3, dtype=torch.float64)
    for factor in (0.01, 1.0, 30.0):
        field, _ = build("rotation", factor)
        blocks.append(DynamicalBlock(field, method, FreeSignal(0.3)).double())
    stacked = stacked_parameters(blocks)
    outputs = ensemble_forward(blocks[0], stacked, x)
    together = torch.autograd.grad(outputs.square().mul(x).sum(), list(stacked.values()))
    gradients = dict(zip(stacked, together, strict=True))
    for run, block in enumerate(blocks):
        alone = block(x)
        assert torch.allclose(outputs[run], alone, rtol=0, atol=1e-11)
        wanted = torch.autograd.grad(alone.square().mul(x).sum(), list(block.parameters()))
        for (name, _), gradient in zip(block.named_parameters(), wanted, strict=True):
            size = max(1.0, float(gradient.abs().max()))
            assert torch.allclose(gradients[name][run], gradient, rtol=0, atol=1e-11 * size)


@pytest.mark.parametrize("method", ["lie-midpoint", "cayley-midpoint"])
def test_least_squares_of_lie_steps_have_the_jacobian_of_each_sample(method: str) -> None:
    """RᵀR = [J r]ᵀ[J r], with J of one sample after the other from autograd alone."""
    field, x = build("rotation", 3.0)
    block, y = DynamicalBlock(field, method, FreeSignal(0.3)).double(), torch.randn_like(x)
    factor = Objective(block, [x, y]).triangular_factor()
    rows = []
    for residual in (block(x) - y).flatten():
        gradients = torch.autograd.grad(residual, list(block.parameters()), retain_graph=True)
        rows.append(torch.cat([*(gradient.flatten() for gradient in gradients), residual.detach()[None]]))
    stacked = torch.stack(rows)
    gram = stacked.mT @ stacked
    assert torch.allclose(factor.mT @ factor, gram, rtol=0, atol=1e-12 * float(gram.abs().max()))
