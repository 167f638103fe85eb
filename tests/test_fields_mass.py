"""Mass-preserving and constrained fields, modified Patankar methods and the lifts that keep a structure."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, GradientField, VectorField
from dynablocks.fields.mass import CompartmentField, ConstrainedField, InvariantSpace, MassPreservingField, span_basis
from dynablocks.integrators import INTEGRATORS, integrator, measured_order
from dynablocks.integrators.patankar import ModifiedPatankar, exchange
from dynablocks.lifting import MassProjection, ZeroLift
from dynablocks.linear import Dense
from dynablocks.properties import LinearInvariant, Positive, verify
from dynablocks.switching import FreeSignal
from dynablocks.testing import check_block
from dynablocks.testing.facts import false_facts

WEIGHTS = (1.0, -2.0, 0.5, 3.0)
SEVERAL = [None, (0.0, 1.0, -2.0, 0.3)]
FIELDS: dict[str, Callable[[], VectorField]] = {
    "mass": lambda: MassPreservingField(4, 6),
    "weighted": lambda: MassPreservingField(4, 6, weights=WEIGHTS),
    "odd": lambda: MassPreservingField(4, 6, bias=False),
    "positive": lambda: CompartmentField(4, 6),
    "positive weighted": lambda: CompartmentField(4, 6, weights=(1.0, 2.0, 0.5, 3.0)),
    "several": lambda: ConstrainedField(GradientField(Dense(4, 5), "tanh"), SEVERAL),
}
PATANKAR = ("patankar", "mprk22")


def states(count: int = 50) -> Tensor:
    return torch.rand(count, 4, dtype=torch.float64)


def perturbed(field: VectorField, factor: float = 1.0) -> VectorField:
    with torch.no_grad():
        for parameter in field.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).mul_(factor)
    return field


def drift(field: VectorField, x: Tensor, y: Tensor) -> float:
    """The worst change of a declared invariant, relative to the sizes that were summed."""
    worst = 0.0
    for weights in field.facts().linear_invariants:
        w = torch.ones(4, dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
        size = ((x.abs() + y.abs()) @ w.abs()).clamp_min(1.0)
        worst = max(worst, float((((y - x) @ w).abs() / size).max().detach()))
    return worst


@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("name", FIELDS)
def test_runge_kutta_keeps_the_mass_to_rounding(name: str, factor: float, method: str) -> None:
    field, x = perturbed(FIELDS[name](), factor), states()
    with torch.no_grad():
        y = integrator(method).step(field, x, 0.1 if factor == 1 else 1e-3)
    assert drift(field, x, y) <= 1e-14


@pytest.mark.parametrize("factor", [1.0, 1000.0])
@pytest.mark.parametrize("h", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("method", PATANKAR)
@pytest.mark.parametrize("name", ["positive", "positive weighted"])
def test_patankar_is_positive_and_conservative_from_hostile_states(
    name: str, method: str, h: float, factor: float
) -> None:
    field = perturbed(FIELDS[name](), factor)
    x = torch.cat([states(), torch.eye(4).double(), 1e-300 * torch.eye(4).double(), torch.zeros(1, 4).double()])
    x = torch.cat([x, torch.tensor([[1e8, 1e-8, 0.0, 1.0]]).double()])
    with torch.no_grad():
        y = integrator(method).step(field, x, h)
    assert torch.isfinite(y).all()
    assert (y >= 0).all()
    assert drift(field, x, y) <= 1e-14


def test_explicit_euler_leaves_the_nonnegative_states() -> None:
    field = perturbed(FIELDS["positive"]())
    block = DynamicalBlock(field, "euler", FreeSignal(10.0))
    assert block(states()).min() < 0
    assert block.properties.of(Positive) is None
    assert any("patankar keeps it" in loss for _, part in block.declare().parts for loss in part.losses)


def skew(moved: Tensor) -> Tensor:
    """A − Aᵀ, with the six entries of A above the diagonal of 4 × 4."""
    upper = moved.new_zeros(len(moved), 4, 4)
    for k, (i, j) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
        upper[:, i, j] = moved[:, k]
    return upper - upper.mT


@pytest.mark.parametrize("name", FIELDS)
def test_the_field_is_the_stated_formula(name: str) -> None:
    field, x = perturbed(FIELDS[name]()), states(5)
    if isinstance(field, ConstrainedField):
        rows = np.array([[1.0] * 4, SEVERAL[1]])
        projector = np.eye(4) - np.linalg.pinv(rows) @ rows
        expected = field.inner(x) @ torch.tensor(projector)
    elif isinstance(field, CompartmentField):
        w, rates = torch.tensor(field.weights, dtype=torch.float64), field.rates(x)
        assert (rates >= 0).all()
        assert not rates.diagonal(dim1=1, dim2=2).any()
        assert (rates > 0).sum() == 5 * 12
        generator = rates - torch.diag_embed(rates.sum(1))
        expected = (generator @ (w * x).unsqueeze(-1)).squeeze(-1) / w
    else:
        assert isinstance(field, MassPreservingField)
        w = torch.tensor(field.weights, dtype=torch.float64)
        moved = field.outer.adjoint(field.sigma(field.inner.affine(x, field.bias)))
        expected = skew(moved) @ w
        # By pairs, one moving 1 and the others 0.
        assert torch.equal(field.incidence().mT, skew(torch.eye(6, dtype=torch.float64)) @ w)
    assert torch.allclose(field(x), expected, atol=1e-13, rtol=0)


DRAWN = {
    "skew": (MassPreservingField, 3, ["bias", "inner.matrix", "outer.matrix"]),
    "compartments": (CompartmentField, 6, ["bias", "rate_bias", "inner.matrix", "outer.matrix"]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_stored_parameters_have_these_names_and_this_start(name: str) -> None:
    """Results and checkpoints depend on both: C is drawn first, then B with a column for each output."""
    kind, outputs, names = DRAWN[name]
    torch.manual_seed(3)
    field = kind(3, 5)
    torch.manual_seed(3)
    inner, outer = Dense(3, 5), Dense(outputs, 5)
    state = field.state_dict()
    assert list(state) == names
    assert torch.equal(state["inner.matrix"], inner.matrix)
    assert torch.equal(state["outer.matrix"], outer.matrix)
    assert not any(state[key].any() for key in names if key.endswith("bias"))
    assert list(kind(3, 5, bias=False).state_dict()) == ["inner.matrix", "outer.matrix"]


@pytest.mark.parametrize("kind", [MassPreservingField, CompartmentField])
def test_the_weights_of_a_field_are_those_that_its_facts_speak_of(
    kind: type[MassPreservingField | CompartmentField],
) -> None:
    given = (1.0, 2.0, 0.5)
    field = kind(3, weights=given)
    with pytest.raises(AttributeError, match="weights"):
        field.weights = (1.0, 2.0, 4.0)
    assert field.weights == given
    assert field.facts().linear_invariants == (given,)
    assert kind(3).weights == (1.0, 1.0, 1.0)


def test_compartments_are_no_skew_form_and_the_other_way_round() -> None:
    assert not isinstance(CompartmentField(3), MassPreservingField)
    assert not hasattr(CompartmentField(3), "incidence")
    assert not hasattr(MassPreservingField(3), "rates")


@pytest.mark.parametrize("name", ["mass", "weighted", "odd", "several"])
@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_lipschitz_and_oddness(name: str, factor: float) -> None:
    field, x = perturbed(FIELDS[name](), factor), 1e-3 * torch.randn(20, 4, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: field(v[None])[0]))(x)
    assert float(torch.linalg.matrix_norm(jacobian, ord=2).max().detach()) <= field.facts().lipschitz
    odd = bool(torch.allclose(field(-x), -field(x), rtol=0, atol=1e-12 * factor**2))
    assert odd == field.facts().odd


@pytest.mark.parametrize("method", PATANKAR)
@pytest.mark.parametrize("name", ["positive", "positive weighted"])
def test_patankar_orders(name: str, method: str) -> None:
    measured = measured_order(method, perturbed(FIELDS[name]()), 0.2 + states(5), counts=(64, 128, 256))
    assert abs(measured - integrator(method).order) <= 0.15


def test_patankar_solves_linear_exchange_like_scipy() -> None:
    from scipy.integrate import solve_ivp

    field = perturbed(FIELDS["positive"]())
    x = states(1)

    def rate(t: float, y: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return field(torch.tensor(y)[None])[0].numpy()

    exact = solve_ivp(rate, (0, 1), x[0].numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    y = x
    with torch.no_grad():
        for _ in range(400):
            y = ModifiedPatankar(2).step(field, y, 1 / 400)
    assert np.abs(y[0].numpy() - exact).max() < 1e-5


BLOCKS = [(name, "euler") for name in FIELDS] + [(n, m) for n in ("positive", "positive weighted") for m in PATANKAR]


@pytest.mark.parametrize(("name", "method"), BLOCKS)
def test_blocks_pass_the_conformance_suite(name: str, method: str) -> None:
    check_block(DynamicalBlock(FIELDS[name](), method, FreeSignal(0.1))).require()


def test_what_blocks_declare() -> None:
    weighted = DynamicalBlock(FIELDS["positive weighted"](), "mprk22", FreeSignal(0.1))
    assert weighted.properties.of(LinearInvariant) == LinearInvariant((1.0, 2.0, 0.5, 3.0))
    assert weighted.properties.of(Positive) is not None
    several = DynamicalBlock(FIELDS["several"](), "rk4", FreeSignal(0.1))
    kept = [p for p in several.properties if isinstance(p, LinearInvariant)]
    assert kept == [LinearInvariant(None), LinearInvariant(SEVERAL[1])]
    backwards = DynamicalBlock(FIELDS["positive"](), "patankar", FreeSignal(-0.1)).declare()
    assert backwards.properties.of(Positive) is None
    assert any("negative" in loss for _, part in backwards.parts for loss in part.losses)


class LeakingField(MassPreservingField):
    """Mass is off by 1e-9 of the rate; the declaration says it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor([1 + 1e-9, 1.0, 1.0, 1.0], dtype=x.dtype)

    def facts(self) -> FieldFacts:
        return super().facts()


class SpillingPatankar(ModifiedPatankar):
    """The stages of a method that is conservative, but explicit: it leaves x >= 0."""

    keeps = ModifiedPatankar.keeps

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return x + step_size * field(x)


def test_broken_twins_are_caught() -> None:
    torch.manual_seed(0)
    leaking = DynamicalBlock(LeakingField(4, 6), "euler", FreeSignal(0.1))
    assert "properties at the start" in check_block(leaking).failed
    spilling = DynamicalBlock(FIELDS["positive"](), SpillingPatankar(), FreeSignal(10.0))
    assert not verify(spilling, states(), kinds=(Positive,)).passed
    honest = DynamicalBlock(FIELDS["positive"](), "patankar", FreeSignal(10.0))
    assert verify(honest, states(), kinds=(Positive,)).passed


def test_exchange_matches_the_dense_system() -> None:
    masses, rates = states(3), torch.rand(3, 4, 4, dtype=torch.float64)
    moved = exchange(masses, rates, 0.7)
    gained = (rates * moved.unsqueeze(1)).sum(2) - rates.sum(1) * moved
    assert torch.allclose(moved, masses + 0.7 * gained, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MassPreservingField(1), "entries is 1; a whole number from 2 is needed"),
        (lambda: MassPreservingField(3, weights=(1.0, 2.0)), "vectors of 3 finite numbers"),
        (lambda: MassPreservingField(3, weights=(1.0, 0.0, 2.0)), "ConstrainedField allows zeros"),
        (lambda: CompartmentField(3, weights=(1.0, -1.0, 2.0)), "must be positive"),
        (lambda: MassPreservingField(3, weights=(1.0, math.nan, 2.0)), "finite"),
        (lambda: CompartmentField(1), "entries is 1; a whole number from 2 is needed"),
        (lambda: CompartmentField(3, weights=(1.0, 0.0, 2.0)), "must be positive"),
        (lambda: InvariantSpace(3, [None, (2.0, 2.0, 2.0)]), "linearly independent"),
        (lambda: ModifiedPatankar(3), "orders 1 and 2"),
        (lambda: DynamicalBlock(MassPreservingField(3), "patankar", FreeSignal(0.1))(torch.ones(1, 3)), "needs rates"),
        (lambda: ZeroLift(3, 2), "out_channels is 2; a whole number from 3 is needed"),
        (lambda: ZeroLift(2.5, 3), "in_channels is 2.5; a whole number from 1 is needed"),
        (lambda: MassProjection(2, 3), "out_entries is 3; a whole number from 1 to 2 is needed"),
    ],
)
def test_errors_say_what_to_do(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        make()


def matrix_of(module: nn.Module, size: int) -> Tensor:
    return module.double()(torch.eye(size, dtype=torch.float64)).mT.detach()


def test_lifts_are_the_stated_matrices() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    lift, back = matrix_of(ZeroLift(3, 8), 3), matrix_of(MassProjection(8, 3), 8)
    assert torch.equal(torch.ones(8, dtype=torch.float64) @ lift, ones)
    assert torch.allclose(ones @ back, torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.equal(back @ lift, torch.eye(3, dtype=torch.float64))
    norm = float(torch.linalg.matrix_norm(back, ord=2))
    declared = MassProjection(8, 3).properties.lipschitz
    assert abs(norm / declared - 1) <= 1e-14


def test_lifts_pass_the_conformance_suite() -> None:
    check_block(ZeroLift(2, 5), torch.randn(4, 2, dtype=torch.float64)).require()
    check_block(MassProjection(5, 2)).require()


def test_lifts_of_images_work_per_pixel() -> None:
    x = torch.rand(2, 4, 3, 3)
    assert torch.equal(ZeroLift(4, 6)(x)[:, :4], x)
    assert torch.allclose(MassProjection(4, 3)(x).sum(1), x.sum(1), rtol=0, atol=2e-6)


def test_the_papers_projection_loses_mass() -> None:
    x = states(1)
    papers = x[:, :1] + x[:, 1:].sum(1, keepdim=True) / 3
    assert abs(float(papers.sum() - x.sum())) > 0.1
    assert abs(float(MassProjection(4, 1)(x).sum() - x.sum())) < 1e-15


def test_registered_names() -> None:
    assert {"patankar", "mprk22"} <= set(INTEGRATORS)
    assert isinstance(FIELDS["mass"]().facts(), FieldFacts)


@pytest.mark.parametrize(("module", "entries"), [(ZeroLift(2, 4), 2), (MassProjection(4, 2), 4)])
def test_lifts_and_projections_take_states_of_their_size_only(module: nn.Module, entries: int) -> None:
    assert module(torch.ones(1, entries, 3)).shape[2] == 3
    for wrong in (torch.ones(1, entries + 2), torch.ones(entries)):
        with pytest.raises(InvalidArgument, match=rf"takes \(batch, {entries}"):
            module(wrong)


def test_exchange_holds_for_steps_that_float32_cannot_add_to_one() -> None:
    rates = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    moved = exchange(torch.tensor([[1.0, 0.0]]), rates, 2.0**27)
    assert torch.allclose(moved, torch.tensor([[0.5, 0.5]]), rtol=0, atol=1e-6)
    with pytest.raises(InvalidArgument, match="smaller step"):
        exchange(torch.tensor([[1.0, 0.0]]), rates, 2.0**60)


@pytest.mark.usefixtures("two_threads")
def test_large_systems_in_a_batch_are_those_alone() -> None:
    """torch 2.13 factorises batches of matrices of 150 and more rows wrongly with several threads."""
    field, x = CompartmentField(200, 4).double(), torch.rand(32, 200, dtype=torch.float64)
    together = ModifiedPatankar().step(field, x, 1.0)
    alone = torch.cat([ModifiedPatankar().step(field, row[None], 1.0) for row in x])
    assert torch.allclose(together, alone, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("vectors", "rank"),
    [
        ([(1.0, -2.0, 0.5, 3.0)], 1),
        ([(1.0, 1.0, 1.0, 1.0), (0.0, 1.0, -2.0, 0.3)], 2),
        ([(1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)], 2),
        ([(1.0, 2.0, 3.0, 4.0)] * 6, 1),
        ([(1e200, 0.0, 1e200, 0.0), (0.0, 1e-200, 0.0, 0.0)], 2),
        ([(0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 1.0, 0.0)], 1),
        ([(0.0, 0.0, 0.0, 0.0)], 0),
    ],
)
def test_the_basis_spans_the_vectors_and_no_more(vectors: list[tuple[float, ...]], rank: int) -> None:
    basis, columns = span_basis(vectors), np.array(vectors).T
    assert basis.shape == (4, rank)
    assert np.allclose(basis.T @ basis, np.eye(rank), rtol=0, atol=1e-14)
    columns = columns / np.abs(columns).max(0).clip(1e-300)
    assert np.allclose(basis @ (basis.T @ columns), columns, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["weights", "basis"])
def test_the_basis_of_a_space_is_that_of_its_weights(name: str) -> None:
    space = InvariantSpace(3, [(1.0, 2.0, 0.5)])
    with pytest.raises(AttributeError, match=name):
        setattr(space, name, getattr(InvariantSpace(3, [None]), name))
    weights = torch.tensor([space.weights[0]], dtype=torch.float64)
    assert float(space.remove(weights).abs().max()) < 1e-14


def test_compartments_of_another_space_say_what_holds_of_it() -> None:
    field, x = CompartmentField(3, 4).double(), torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    assert field.facts().positive
    field.space = InvariantSpace(3, [(-1.0, 2.0, 0.5)])
    assert float(field(x).detach()[0, 0]) < 0
    assert field.facts().linear_invariants == ((-1.0, 2.0, 0.5),)
    assert not field.facts().positive
    field.space = InvariantSpace(3, [(0.0, 2.0, 0.5)])
    assert not torch.isfinite(field(x)).all()
    assert field.facts().linear_invariants == ()


class Heavier(CompartmentField):
    weights = (1.0, 2.0, 4.0)


def test_compartments_keep_the_mass_of_the_weights_that_they_divide_by() -> None:
    """Whatever else the space holds, and whatever weights it was made of."""
    wide, heavier, x = CompartmentField(3, 4).double(), Heavier(3, 4).double(), torch.rand(4, 3, dtype=torch.float64)
    wide.space = InvariantSpace(3, [(1.0, 2.0, 0.5), (0.0, 1.0, -1.0)])
    for field, weights in ((wide, (1.0, 2.0, 0.5)), (heavier, Heavier.weights)):
        assert field.facts().linear_invariants == (weights,)
        assert not list(false_facts(field, x))
        block = DynamicalBlock(field, "patankar", FreeSignal(0.5))
        assert block.properties == (LinearInvariant(weights), Positive())
        verify(block, x).require()
    assert CompartmentField(3, 4).facts().linear_invariants == (None,)
