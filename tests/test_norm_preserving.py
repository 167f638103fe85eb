"""Norm-preserving methods and projections: the norm to rounding, measured orders, what is lost and why."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, GradientField, PartitionedField, VectorField
from dynablocks.fields.mass import ConstrainedField
from dynablocks.fields.sphere import RotationField, SphereField
from dynablocks.integrators import ExactFlow, ExplicitEuler, Integrator, integrator, measured_order, over_states
from dynablocks.integrators.norm_preserving import CalvoEulerHeun
from dynablocks.integrators.projection import Projected, _basis
from dynablocks.linear import Conv, Dense
from dynablocks.properties import Equivariant, NormPreserving, Symplectic, verify
from dynablocks.switching import FreeSignal
from dynablocks.testing import check_block

METHODS = ("calvo", "lie-euler", "cayley", "lie-midpoint", "cayley-midpoint", "projected-heun", "projected-rk4")


class RigidBody(VectorField):
    """ẋ = x × I⁻¹x: tangent, even, without a Λ of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cross(x, x / x.new_tensor([1.0, 2.0, 3.0]))

    def facts(self) -> FieldFacts:
        return FieldFacts(tangent=True, divergence_free=True)


class Oscillator(VectorField):
    """q̇ = p, ṗ = −q: Hamiltonian and tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 1], -x[:, 0]], dim=1)

    def facts(self) -> FieldFacts:
        return FieldFacts(lipschitz=1.0, tangent=True, hamiltonian=True, divergence_free=True, odd=True)


class TangentAndMass(VectorField):
    """ẋ = 1 × x: keeps ‖x‖ and Σx."""

    def __init__(self) -> None:
        super().__init__()
        self.in_shape = (3,)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.cross(torch.ones_like(x), x) * (1 + x.square().sum(1, keepdim=True))

    def facts(self) -> FieldFacts:
        return FieldFacts(tangent=True, linear_invariants=(None,), odd=True)


FIELDS: dict[str, Callable[[], VectorField]] = {
    "sphere": lambda: SphereField(Dense(3, 5), Dense(3, 5)),
    "odd sphere": lambda: SphereField(Dense(3, 5), Dense(3, 5), bias=False),
    "image sphere": lambda: SphereField(Conv((1, 3, 3), 2), Conv((1, 3, 3), 2)),
    "rotation": lambda: RotationField(3, 5),
    "rigid body": RigidBody,
}


def build(name: str, factor: float = 1.0) -> tuple[VectorField, Tensor]:
    field = FIELDS[name]().double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)).mul_(factor)
    return field, torch.randn(6, *field.in_shape, dtype=torch.float64)


def norm_drift(x: Tensor, y: Tensor) -> float:
    before, after = x.flatten(1).norm(dim=1), y.flatten(1).norm(dim=1)
    return float(((after - before).abs() / before).max())


@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("name", FIELDS)
def test_the_norm_is_kept_to_rounding(name: str, factor: float) -> None:
    field, x = build(name, factor)
    with torch.no_grad():
        for method in METHODS:
            for h in (1e-3, 0.1, 3.0, -50.0):
                y = integrator(method).step(field, x, h)
                assert norm_drift(x, y) <= 1e-14, (method, h)


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_is_kept_over_many_steps(method: str) -> None:
    field, x = build("rigid body")
    y, chosen = x, integrator(method)
    for _ in range(300):
        y = chosen.step(field, y, 0.1)
    assert norm_drift(x, y) <= 1e-12
    z = x
    for _ in range(300):
        z = integrator("rk4").step(field, z, 0.1)
    assert norm_drift(x, z) > 1e-9


@pytest.mark.parametrize("name", ["sphere", "rotation", "rigid body"])
def test_orders(name: str) -> None:
    field, x = build(name)
    x = x / x.norm(dim=1, keepdim=True)
    for method in METHODS:
        order = integrator(method).order or 0
        measured = measured_order(method, field, x, counts=(8, 16, 32) if order == 4 else (16, 32, 64))
        assert abs(measured - order) <= 0.15, (method, measured)


def test_lie_methods_of_a_constant_rotation_are_exact_or_cayleys() -> None:
    x, h = torch.randn(5, 2, dtype=torch.float64), 0.4
    for method, angle in (("lie-euler", h), ("lie-midpoint", h), ("cayley", 2 * np.arctan(h / 2))):
        cosine, sine = np.cos(angle), np.sin(angle)
        exact = torch.stack([cosine * x[:, 0] + sine * x[:, 1], cosine * x[:, 1] - sine * x[:, 0]], dim=1)
        assert torch.allclose(integrator(method).step(Oscillator(), x, h), exact, rtol=0, atol=1e-14)


class Slowed(RotationField):
    """Half of a field Λ(x)x, with the Λ of the whole."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)

    def facts(self) -> FieldFacts:
        return FieldFacts(tangent=True)


@pytest.mark.parametrize("method", ["lie-euler", "cayley", "lie-midpoint", "cayley-midpoint"])
def test_a_rotation_with_a_forward_of_its_own_does_not_turn_as_the_one_before(method: str) -> None:
    """The broken twin: by the inherited Λ steps would go twice as far, with the order 0."""
    field, x = Slowed(3, 5).double(), torch.randn(6, 3, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    chosen = integrator(method)
    assert abs(measured_order(chosen, field, x, counts=(16, 32, 64)) - (chosen.order or 0)) <= 0.15
    with torch.no_grad():
        assert norm_drift(x, chosen.step(field, x, 0.5)) <= 1e-14
        assert float((field.rotate(x, x, 0.5) - chosen.step(field, x, 0.5)).norm()) > 0.01


def test_calvo_solves_its_equation_and_is_heun_plus_a_fourth_order_term() -> None:
    field, x = build("rotation")
    gaps = []
    for h in (0.02, 0.01):
        y = CalvoEulerHeun().step(field, x, h)
        first = field(x)
        heun = x + 0.5 * h * (first + field(x + h * first))
        gaps.append(float((y - heun).norm().detach()))
        # On the line through the Euler and the Heun point.
        w, moved = heun - x - h * first, y - x - h * first
        cosine = (w * moved).sum(1) / (w.norm(dim=1) * moved.norm(dim=1))
        assert torch.allclose(cosine, torch.ones_like(cosine), rtol=0, atol=1e-8)
    assert abs(np.log2(gaps[0] / gaps[1]) - 4) < 0.2


def test_calvo_is_continuous_where_the_line_leaves_the_sphere() -> None:
    field, x = build("rotation")
    sizes = torch.linspace(0, 20, 20001, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        for start in x:
            path = CalvoEulerHeun().step(field, start.expand(len(sizes), -1), sizes)
            assert float((path[1:] - path[:-1]).norm(dim=1).max()) < 0.1


BLOCKS = [(name, method) for name in ("sphere", "odd sphere", "rotation") for method in METHODS[:5]]
BLOCKS += [("rotation", "projected-rk4"), ("image sphere", "calvo"), ("image sphere", "cayley")]


@pytest.mark.parametrize(("name", "method"), BLOCKS)
def test_blocks_pass_the_conformance_suite(name: str, method: str) -> None:
    block = DynamicalBlock(FIELDS[name](), method, FreeSignal(0.1))
    assert block.properties.of(NormPreserving) is not None
    assert (block.properties.of(Equivariant) is not None) == name.startswith("odd")
    check_block(block).require()


@pytest.mark.parametrize("method", ["calvo", "lie-euler", "cayley", "projected-rk4"])
def test_fields_that_do_not_fit_get_a_sentence(method: str) -> None:
    with pytest.raises(InvalidArgument, match=r"tangent|nothing to project onto"):
        DynamicalBlock(GradientField(Dense(3, 4), "tanh"), method, FreeSignal(0.1)).declare()


def test_projection_keeps_norm_and_linear_invariants_together() -> None:
    field, x = TangentAndMass(), torch.randn(6, 3, dtype=torch.float64)
    y = x
    for _ in range(200):
        y = integrator("projected-heun").step(field, y, 0.05)
    assert norm_drift(x, y) <= 1e-12
    assert float((y.sum(1) - x.sum(1)).abs().max()) <= 1e-12
    assert abs(measured_order("projected-rk4", field, 0.5 * x, counts=(8, 16, 32)) - 4) <= 0.15
    check_block(DynamicalBlock(field, "projected-rk4", FreeSignal(0.1))).require()


def test_projection_returns_a_drifting_mass() -> None:
    class Drifting(ConstrainedField):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-3

        def facts(self) -> FieldFacts:
            return super().facts()

    field = Drifting(GradientField(Dense(4, 5), "tanh"), [None]).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        assert (integrator("heun").step(field, x, 1.0).sum(1) - x.sum(1)).abs().min() > 1e-3
        assert (integrator("projected-heun").step(field, x, 1.0).sum(1) - x.sum(1)).abs().max() < 1e-14


def test_the_basis_spans_the_weights_and_one_asked_for_in_inference_mode_serves_training_later() -> None:
    _basis.cache_clear()
    weights = (0.0, 1.0, -2.0, 0.3)
    field = ConstrainedField(GradientField(Dense(4, 5), "tanh"), [None, weights]).double()
    x, method = torch.randn(5, 4, dtype=torch.float64), integrator("projected-heun")
    with torch.inference_mode():
        before = method.step(field, x, 0.5)
    after = method.step(field, x, 0.5)
    after.square().sum().backward()
    assert torch.allclose(before, after.detach(), rtol=0, atol=1e-14)
    assert all(parameter.grad is not None for parameter in field.parameters())
    assert _basis.cache_info().misses == 1
    basis, rows = _basis((None, weights), 4), np.array([(1.0,) * 4, weights])
    assert np.allclose(basis @ basis.T, np.linalg.pinv(rows) @ rows, rtol=0, atol=1e-14)


DEPENDENT = ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0), None)
"""Weights of which the last is the sum of the others."""


class Exchanging(VectorField):
    """Two entries exchange what they have, the third rests."""

    in_shape = (3,)

    def forward(self, x: Tensor) -> Tensor:
        rate = x[:, 0].cos() + 0.5 * x[:, 1] * x[:, 2]
        return torch.stack([rate, -rate, torch.zeros_like(rate)], dim=1)

    def facts(self) -> FieldFacts:
        return FieldFacts(linear_invariants=DEPENDENT)


def test_dependent_invariants_do_not_freeze_what_is_free() -> None:
    """Runge–Kutta steps keep linear functions themselves, so that there is nothing to put back."""
    basis = _basis(DEPENDENT, 3)
    assert basis.shape == (3, 2)
    onto = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert np.allclose(basis @ basis.T, onto, rtol=0, atol=1e-14)
    field, x = Exchanging(), torch.randn(6, 3, dtype=torch.float64)
    for name in ("heun", "rk4"):
        y = integrator(f"projected-{name}").step(field, x, 0.3)
        assert torch.allclose(y, integrator(name).step(field, x, 0.3), rtol=0, atol=1e-14)
        assert float((y - x).abs().max()) > 0.01
    assert abs(measured_order("projected-rk4", field, x, counts=(16, 32, 64)) - 4) <= 0.15


class Leaning(Integrator):
    """Euler's step and h²|x| beside it: not odd, whatever the field is."""

    order = 1

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        h = over_states(step_size, x)
        return x + h * field(x) + h * h * x.abs()


def test_a_projected_step_is_odd_where_that_of_its_base_is() -> None:
    field, x = build("odd sphere")
    method = Projected(Leaning())
    declared = method.declare(field, 0.3)
    assert declared.properties.of(Equivariant) is None
    assert declared.properties.of(NormPreserving) is not None
    told = [loss for loss in declared.losses if loss.startswith("Equivariant ")]
    assert told == ["Equivariant is lost: the flow has it, Leaning() does not keep it; Runge–Kutta methods keep it"]
    with torch.no_grad():
        y = method.step(field, x, 0.3)
        assert norm_drift(x, y) <= 1e-14
        assert float((method.step(field, -x, 0.3) + y).abs().max()) > 1e-3
    for odd in (Projected(ExplicitEuler()), integrator("projected-heun"), integrator("projected-rk4")):
        assert odd.declare(field, 0.3).properties.of(Equivariant) is not None
        with torch.no_grad():
            assert torch.allclose(odd.step(field, -x, 0.3), -odd.step(field, x, 0.3), rtol=0, atol=1e-14)


def test_projection_loses_symplecticity_and_says_so() -> None:
    declared = integrator("projected-rk4").declare(Oscillator(), 0.1)
    assert declared.properties.of(Symplectic) is None
    assert declared.properties.of(NormPreserving) is not None
    lost = [loss for loss in declared.losses if "the projection after the step depends on the state" in loss]
    assert [loss.split()[0] for loss in lost] == ["Symplectic", "VolumePreserving"]
    with pytest.raises(InvalidArgument, match="nothing to project onto"):
        Projected(ExactFlow()).require(PartitionedField.example())


class UnprojectedCalvo(CalvoEulerHeun):
    """Heun's step with the declaration of Calvo's."""

    keeps = CalvoEulerHeun.keeps

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return integrator("heun").step(field, x, step_size)


class TiltedProjection(Projected):
    """The projection with a norm off by 1e-11."""

    keeps = Projected.keeps

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return super().step(field, x, step_size) * (1 + 1e-11)


@pytest.mark.parametrize("twin", [UnprojectedCalvo(), TiltedProjection(integrator("rk4"))])
def test_broken_twins_are_caught(twin: CalvoEulerHeun | TiltedProjection) -> None:
    block = DynamicalBlock(FIELDS["rotation"](), twin, FreeSignal(0.1))
    assert not verify(block, torch.randn(4, 3), kinds=(NormPreserving,)).passed
    assert "properties at the start" in check_block(block).failed
