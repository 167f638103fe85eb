"""Least squares to rounding, and surrogates that keep their structure through a fit."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.errors import BadCheckpoint, BadData, DynablocksError, InvalidArgument, NotConverged
from dynablocks.fields import DampedHamiltonian, FieldFacts, GradientField, LinearField, VectorField
from dynablocks.fields.hamiltonian import NeuralHamiltonian, canonical
from dynablocks.fields.mass import CompartmentField
from dynablocks.fields.sphere import RotationField, SphereField
from dynablocks.fields.symmetric import PotentialSum, ridge_energy
from dynablocks.fitting import (
    FitConfig,
    Structure,
    build,
    fit,
    job,
    load_fit,
    regression,
    rollout,
    save_fit,
    structures,
)
from dynablocks.fitting.doubts import doubts, positions_first
from dynablocks.fitting.folder import claim, write_weights
from dynablocks.fitting.job import plan, run_stages
from dynablocks.fitting.objective import SAMPLES_AT_ONCE, Objective
from dynablocks.fitting.regression import FitRecord
from dynablocks.fitting.rollout import (
    LEFT_NUMBERS,
    Noise,
    _starts,
    change_along,
    drifts,
    estimated_noise,
    roll_out,
    rollout_residuals,
    safe_rollout,
    windows,
)
from dynablocks.fitting.samples import fitted_parts, split, thinned, usual_steps
from dynablocks.fitting.second_order import LevenbergMarquardt, LimitedMemoryBFGS
from dynablocks.fitting.single_steps import column_errors, one_step_error, step_halving_gap
from dynablocks.fitting.structures import (
    CoordinateShears,
    FreeField,
    PositiveMidpoint,
    ProductionDestruction,
    SkewGradientField,
    _frozen,
)
from dynablocks.fitting.surrogates import SURROGATES, FlowMap, training_residuals
from dynablocks.fitting.verification import verified
from dynablocks.integrators import IMPLICIT_MIDPOINT, ImplicitRungeKutta, Integrator, exact_solution, integrator
from dynablocks.integrators.discrete_gradient import DiscreteGradient
from dynablocks.integrators.implicit import ImplicitTableau
from dynablocks.integrators.solver import solve
from dynablocks.linear import Dense
from dynablocks.properties import (
    ConformalSymplectic,
    Declaration,
    EnergyPreserving,
    Equivariant,
    LinearInvariant,
    NormPreserving,
    Positive,
    Symplectic,
    VolumePreserving,
    verify,
)
from dynablocks.switching import FreeSignal
from dynablocks.testing import HOSTILE, check_block

F64 = torch.float64
DIMENSIONS = {"symplectic": 2, "energy": 2, "mass": 3, "norm": 3, "volume": 3, "positive": 2, "none": 2}


class Exponentials(nn.Module):
    """a e^{bx} + c: three parameters, recoverable."""

    def __init__(self, start: tuple[float, float, float] = (1.0, -0.5, 0.0)) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(start, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.theta
        return a * torch.exp(b * x) + c


def exponential_data() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0, 3, 30, dtype=F64)[:, None]
    return x, Exponentials((2.0, -1.3, 0.5))(x).detach()


def surrogate(preserve: str, *, odd: bool = False, width: int = 4) -> FlowMap:
    torch.manual_seed(0)
    substeps = 1 if preserve == "energy" else 2
    names = tuple("abcd"[: DIMENSIONS[preserve]])
    return build(Structure(preserve, names, width=width, odd=odd, substeps=substeps, step=0.1))


def states(flow: FlowMap, count: int = 12) -> Tensor:
    x = torch.randn(count, len(flow.structure.names), dtype=F64, generator=torch.Generator().manual_seed(1))
    return x.abs() if flow.structure.preserve == "positive" else x


def test_levenberg_marquardt_reaches_rounding_on_a_recoverable_problem() -> None:
    x, y = exponential_data()
    module = Exponentials()
    history = fit(module, x, y, adam_steps=20)
    assert history.loss < 1e-28
    assert torch.allclose(module.theta.detach(), torch.tensor([2.0, -1.3, 0.5], dtype=F64), rtol=0, atol=1e-12)
    assert history.mean_squared_error() == 2 * history.loss


def test_levenberg_marquardt_finds_the_minimum_that_scipy_finds() -> None:
    from scipy.optimize import least_squares

    x, y = exponential_data()
    noisy = y + 0.05 * torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    module = Exponentials()
    history = fit(module, x, noisy, adam_steps=0)

    def residual(theta: Tensor) -> Tensor:
        a, b, c = theta
        return (a * (b * x).exp() + c - noisy)[:, 0].numpy()

    found = least_squares(residual, [1.0, -0.5, 0.0], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert history.loss == pytest.approx(found.cost / len(x), rel=1e-10)
    assert torch.allclose(module.theta.detach(), torch.as_tensor(found.x), rtol=0, atol=1e-6)


def test_the_triangular_factor_is_that_of_the_dense_jacobian_whatever_the_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = exponential_data()
    module = Exponentials()
    dense = torch.func.jacrev(lambda t: torch.func.functional_call(module, {"theta": t}, (x,)))(module.theta)[:, 0]
    both = torch.cat([dense, module(x) - y], dim=1).detach()
    whole = Objective(module, (x, y)).triangular_factor()
    monkeypatch.setattr("dynablocks.fitting.objective.CHUNK_ENTRIES", 16)
    chunked = Objective(module, (x, y)).triangular_factor()
    for factor in (whole, chunked):
        assert torch.allclose(factor.mT @ factor, both.mT @ both, rtol=1e-13, atol=1e-13)
    wrong = factor.clone()
    wrong[0, 0] *= 1 + 1e-6
    assert not torch.allclose(wrong.mT @ wrong, both.mT @ both, rtol=1e-13, atol=1e-13)


def test_lbfgs_takes_over_where_dense_jacobians_do_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = exponential_data()
    monkeypatch.setattr("dynablocks.fitting.second_order.MOST_UNKNOWNS", 2)
    history = fit(Exponentials(), x, y, adam_steps=20)
    assert history.records[-1].phase == "lbfgs"
    assert history.loss < 1e-20


def test_implicit_steps_of_many_unknowns_are_finished_by_lbfgs() -> None:
    """520 weights are few enough for dense Jacobians; a step of 130 unknowns is solved without any."""
    block = DynamicalBlock(GradientField(Dense(130, 4), "tanh"), "implicit-euler", FreeSignal(0.1)).double()
    x = torch.randn(4, 130, dtype=torch.float64)
    history = fit(block, x, 0.9 * x, adam_steps=0, finish_steps=2)
    assert history.records[-1].phase == "lbfgs"


def test_custom_residuals_are_minimised() -> None:
    x, y = exponential_data()
    module = Exponentials()
    history = fit(module, x, y, residuals=lambda m, a, b: 3 * (m(a) - b), adam_steps=20)
    assert history.loss < 1e-27


def test_targets_of_another_shape_are_refused() -> None:
    """Their difference would be of all pairs of samples."""
    x, y = exponential_data()
    for targets in (y[:, 0], y.expand(-1, 2)):
        with pytest.raises(InvalidArgument, match=r"gives \(30, 1\) for targets of shape \(30,") as caught:
            fit(Exponentials(), x, targets, adam_steps=5)
        assert "\n" not in str(caught.value)


class Flat(Exponentials):
    """One number a sample, of one axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


def test_residuals_of_one_axis_are_minimised() -> None:
    x, y = exponential_data()
    history = fit(Flat(), x, y[:, 0], adam_steps=20)
    assert history.loss < 1e-26
    assert history.records[-1].phase == "levenberg-marquardt"
    assert history.samples == 30


def test_equal_fits_are_equal_to_the_last_bit_and_batches_follow_the_seed() -> None:
    x, y = exponential_data()
    found = []
    for seed in (0, 0, 1):
        module = Exponentials()
        fit(module, x, y, adam_steps=10, batch_size=8, finish=None, seed=seed)
        found.append(module.theta.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_interrupted_fit_goes_on_to_the_same_result(tmp_path: Path) -> None:
    x, y = exponential_data()
    straight, resumed = Exponentials(), Exponentials()
    fit(straight, x, y, adam_steps=200, finish_steps=6)
    path = tmp_path / "state.pt"

    def interrupt(record: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    options = {"adam_steps": 200, "finish_steps": 6, "checkpoint": path, "checkpoint_seconds": 0.0}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            fit(resumed, x, y, callback=interrupt, **options)
        resumed = Exponentials()
    history = fit(resumed, x, y, **options)
    assert torch.equal(straight.theta, resumed.theta)
    assert len(history.records) > 4
    again = Exponentials()
    assert fit(again, x, y, **options).loss == history.loss
    assert torch.equal(again.theta, resumed.theta)


@pytest.mark.parametrize("finish", ["levenberg-marquardt", "lbfgs"])
def test_a_fit_interrupted_in_its_finish_goes_on_to_the_same_bits(
    finish: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LimitedMemoryBFGS, "inner_steps", 3)  # so that it takes several turns
    x, y = exponential_data()
    options = {"adam_steps": 20, "finish": finish, "finish_steps": 40, "checkpoint_seconds": 0.0}
    straight = Exponentials()
    history = fit(straight, x, y, **options)
    losses = {record.step: record.loss for record in history.records if record.phase == finish}

    def resumed(path: Path) -> tuple[Tensor, dict[int, float]]:
        seen = 0

        def interrupt(record: FitRecord) -> None:
            nonlocal seen
            seen += record.phase == finish
            if seen == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(Exponentials(), x, y, callback=interrupt, checkpoint=path, **options)
        later: list[FitRecord] = []
        module = Exponentials()
        fit(module, x, y, callback=later.append, checkpoint=path, **options)
        assert {record.phase for record in later} == {finish}
        return module.theta.detach(), {record.step: record.loss for record in later}

    theta, later = resumed(tmp_path / "state.pt")
    assert torch.equal(theta, straight.theta)
    assert later
    assert later.items() <= losses.items()
    second_order = {"levenberg-marquardt": LevenbergMarquardt, "lbfgs": LimitedMemoryBFGS}[finish]
    monkeypatch.setattr(second_order, "load_state_dict", lambda self, state: None)
    _, forgetful = resumed(tmp_path / "forgetful.pt")
    assert not forgetful.items() <= losses.items()


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(BadCheckpoint, match="remove it"):
        fit(Exponentials(), *exponential_data(), checkpoint=path)


def test_the_best_parameters_on_the_validation_are_kept() -> None:
    x, y = exponential_data()
    noisy = y + 0.3 * torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))
    history = fit(net, x, noisy, adam_steps=50, finish_steps=20, validation=(x, y))
    best = min(record.validation for record in history.records)
    assert history.validation == best
    assert (0.5 * (net(x) - y).square().sum(1).mean()).item() == pytest.approx(best, rel=1e-12)


def test_constraints_hold_after_every_step() -> None:
    class Kept(Exponentials):
        @torch.no_grad()
        def project_(self) -> None:
            self.theta[0].clamp_(0.0, 1.5)

    module = Kept()
    seen = []
    fit(
        module,
        *exponential_data(),
        adam_steps=30,
        finish_steps=20,
        callback=lambda _: seen.append(module.theta[0].item()),
    )
    assert max(seen) <= 1.5
    assert module.theta[0].item() == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr": 0.0}, "lr"),
        ({"finish": "newton"}, "unknown finish 'newton'"),
        ({"max_seconds": -1.0}, "max_seconds"),
        ({"x": torch.zeros(3, 1)}, "equal rows"),
        ({"y": torch.full((30, 1), torch.nan)}, "not finite"),
        ({"lr": 1e300}, "the loss is"),
    ],
)
def test_a_bad_argument_gets_one_sentence(change: dict[str, object], sentence: str) -> None:
    x, y = exponential_data()
    settings: dict[str, object] = {"x": x, "y": y, "adam_steps": 5} | change
    with pytest.raises(InvalidArgument, match=sentence) as caught:
        fit(Exponentials(), **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preserve", list(SURROGATES))
def test_a_surrogate_keeps_its_structure_before_and_after_a_fit(preserve: str) -> None:
    flow = surrogate(preserve)
    x = states(flow)
    h = torch.linspace(0.05, 0.15, len(x), dtype=F64)
    y = x + 0.1 * x.roll(1, 1)
    y = y.abs() if preserve == "positive" else y
    flow.adopt_units(x, y, h)
    names = {type(kept).__name__.removesuffix("Preserving").lower() for kept in flow.properties}
    wanted = {"mass": "linearinvariant"}.get(preserve, preserve)
    assert preserve == "none" or wanted in names
    verify(flow, x[:4]).require()
    before = [p.detach().clone() for p in flow.parameters()]
    fit(flow, x, y, step=h[:, None], residuals=training_residuals(flow), adam_steps=5, finish_steps=2)
    assert any(not torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))
    verify(flow, x[:4]).require()


KEPT = {
    "symplectic": Symplectic,
    "energy": EnergyPreserving,
    "volume": VolumePreserving,
    "mass": LinearInvariant,
    "norm": NormPreserving,
    "positive": Positive,
}


@pytest.mark.parametrize("kind", sorted(HOSTILE))
@pytest.mark.parametrize("preserve", KEPT)
def test_a_surrogate_keeps_its_structure_for_any_parameters_and_other_steps(preserve: str, kind: str) -> None:
    flow = surrogate(preserve)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(HOSTILE[kind](parameter))
    # In longer steps of fields that are so fast the Jacobians keep no digit to be measured.
    time = 1e-3 if kind == "x1000" else 1.0
    for step in (0.1, 1.0) if preserve == "positive" else (0.1, 1.0, -0.3):
        flow.structure = replace(flow.structure, step=step * time)
        for state in states(flow, 2).split(1):
            # A step may refuse an equation that it cannot solve; it must not answer wrongly.
            with contextlib.suppress(NotConverged):
                verify(flow, state, kinds=(KEPT[preserve],)).require()


def test_an_odd_number_of_columns_keeps_its_learned_energy_too() -> None:
    torch.manual_seed(0)
    flow = build(Structure("energy", ("a", "b", "c"), width=4, step=0.1))
    assert isinstance(flow.field, SkewGradientField)
    x = states(flow)
    h = torch.full((len(x), 1), 0.1, dtype=F64)
    fit(flow, x, x + 0.1 * x.roll(1, 1), step=h, residuals=training_residuals(flow), adam_steps=5, finish_steps=2)
    assert flow.properties.of(EnergyPreserving) is not None
    verify(flow, x[:4]).require()

    class Leaking(SkewGradientField):
        def structure(self, x: Tensor, v: Tensor) -> Tensor:
            return super().structure(x, v) - 1e-6 * v

        def facts(self) -> FieldFacts:
            return replace(super().facts(), reason="claimed all the same")

    assert not verify(FlowMap(Leaking(3, 4).double(), integrator("gonzalez"), flow.structure), x[:4]).passed


def test_mass_is_kept_to_rounding_after_a_fit_and_for_every_step() -> None:
    flow = surrogate("mass")
    x = states(flow)
    fit(flow, x, x.roll(1, 1), step=torch.full((len(x), 1), 0.1), adam_steps=20, finish_steps=3)
    for h in (0.1, -0.3, torch.linspace(0, 1, len(x), dtype=F64)):
        assert (flow(x, h).sum(1) - x.sum(1)).abs().max().item() <= 1e-13 * float(x.abs().sum(1).max())


class LosingMass(FlowMap):
    """Says that it keeps the mass, and loses a billionth of it a step."""

    def forward(self, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        return super().forward(x, step) * (1 - 1e-9)

    def declare(self) -> Declaration:
        return super().declare()


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_a_lost_mass_is_seen_in_every_unit(unit: float) -> None:
    kept = surrogate("mass")
    lost = LosingMass(kept.field, kept.method, kept.structure)
    x = unit * states(kept, 8)
    for flow, holds in ((kept, True), (lost, False)):
        flow.scale.fill_(unit)
        outcome = verified(flow, x)
        assert outcome is not None
        assert [(type(check.declared), check.passed) for check in outcome] == [(LinearInvariant, holds)]


@pytest.mark.parametrize("preserve", ["symplectic", "energy", "volume", "norm", "positive"])
@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_what_a_surrogate_keeps_is_verified_in_every_unit(preserve: str, unit: float) -> None:
    flow = surrogate(preserve)
    flow.scale.fill_(unit)
    outcome = verified(flow, unit * states(flow, 4).abs())
    assert outcome is not None
    assert len(outcome) >= 1
    assert outcome.passed, str(outcome)


def test_the_residual_without_a_solve_vanishes_exactly_on_steps() -> None:
    for preserve, separable in (("energy", True), ("symplectic", False)):
        torch.manual_seed(0)
        flow = build(Structure(preserve, ("q", "p"), width=4, separable=separable, step=0.2))
        x = states(flow)
        y = flow(x, 0.2).detach()
        h = torch.full((len(x), 1), 0.2, dtype=F64)
        assert training_residuals(flow)(flow, x, y, h).abs().max().item() < 1e-12
        assert training_residuals(flow)(flow, x, y + 1e-3, h).abs().max().item() > 1e-4


def test_one_step_for_each_sample_is_that_of_each_alone_and_inverses_undo() -> None:
    for preserve in ("symplectic", "volume", "mass", "norm"):
        flow = surrogate(preserve)
        x = states(flow, 4)
        h = torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=F64)
        alone = torch.cat([flow(x[i : i + 1], float(h[i])) for i in range(4)])
        assert torch.allclose(flow(x, h), alone, rtol=0, atol=1e-14)
        if preserve in ("symplectic", "volume"):
            assert torch.allclose(flow.inverse(flow(x, h), h), x, rtol=0, atol=1e-13)


def test_an_odd_surrogate_is_odd() -> None:
    for preserve in ("symplectic", "energy", "volume", "mass", "norm", "none"):
        flow = surrogate(preserve, odd=True)
        x = states(flow, 3)
        assert torch.allclose(flow(-x), -flow(x), rtol=0, atol=1e-12), preserve


def test_the_learned_field_is_the_derivative_of_the_flow() -> None:
    flow = surrogate("symplectic")
    x = states(flow, 3)
    flow.adopt_units(x, x + 0.1, torch.full((3,), 0.1, dtype=F64))
    slope = (flow(x, 1e-4) - flow(x, -1e-4)) / 2e-4
    assert torch.allclose(slope, flow.vector_field(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("structure", "sentence"),
    [
        (Structure("symplectic", ("a", "b", "c")), "even number"),
        (Structure("mass", ("a", "b"), weights=(1.0,)), "one a column"),
        (Structure("mass", ("a",)), "at least 2"),
        (Structure("norm", ("a", "b"), weights=(1.0, 1.0)), "belong to --preserve mass"),
        (Structure("symplectik", ("a", "b")), "did you mean 'symplectic'"),
        (Structure("positive", ("a", "b"), odd=True), "odd"),
        (Structure("mass", ("a", "b"), linear=True), "linear=True is for"),
        (Structure("energy", ("a", "b"), odd=True, linear=True), "linear=True is for"),
    ],
)
def test_an_impossible_structure_gets_one_sentence(structure: Structure, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        build(structure)


def spirals(count: int = 4, noise: float = 0.0) -> Trajectories:
    generator = torch.Generator().manual_seed(0)
    times, found = [], []
    for k in range(count):
        t = torch.linspace(0, 2, 21, dtype=F64)
        x = (0.5 + k) * torch.stack([t.cos(), -t.sin()], dim=1)
        times.append(t)
        found.append(x + noise * torch.randn(x.shape, dtype=F64, generator=generator))
    return Trajectories(tuple(times), tuple(found), ("q", "p"))


def test_windows_and_rollouts_agree_with_single_steps() -> None:
    flow, data = surrogate("symplectic"), spirals()
    x, y, h = windows(data, 3, stride=2)
    z = x
    for k in range(3):
        z = flow(z, h[:, k])
        part = rollout_residuals(flow, x, y, h)[:, 2 * k : 2 * k + 2] * 3**0.5
        assert torch.allclose(part, z - y[:, 2 * k : 2 * k + 2], rtol=0, atol=1e-14)
    assert torch.allclose(flow.rollout(x, h)[:, -1], z, rtol=0, atol=1e-14)


def test_noise_is_estimated() -> None:
    spread = float(torch.cat(spirals().states).std(0).mean())
    assert estimated_noise(spirals()).level < 1e-6
    assert estimated_noise(spirals(noise=0.02)).level == pytest.approx(0.02 / spread, rel=0.4)


def resting(data: Trajectories, noise: float) -> Trajectories:
    """The same with another column, which rests but for its noise."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.cat([x, noise * torch.randn(len(x), 1, dtype=F64, generator=generator)], dim=1) for x in data.states]
    return replace(data, states=tuple(found), names=(*data.names, "z"))


def test_a_column_that_rests_but_for_its_noise_holds_no_warning_back() -> None:
    from dynablocks.fitting.report import measure, warnings

    config = FitConfig("none", width=2, substeps=1, adam_steps=0, finish_steps=0, max_minutes=None)
    planned = plan(resting(spirals(12), 1e-6), config)
    assert planned.horizon == 10
    noise, spread = planned.noise, torch.cat(planned.parts.train.states).std(dim=0)
    assert noise.level == pytest.approx(3**-0.5, rel=0.5)
    assert noise.columns[2] == pytest.approx(1e-6, rel=0.5)
    pooled = float(torch.tensor(noise.columns, dtype=F64).norm() / spread.norm())
    assert noise.pooled == pytest.approx(pooled, rel=1e-9)
    assert noise.pooled < 1e-5
    metrics = measure(run_stages(planned, config), 2).metrics
    assert metrics["noise_level"] == noise.pooled
    far, sentence = metrics | {"rollout_relative_error": 0.5}, "Rollouts are off by 50.0 % of the spread"
    assert [said for said in warnings(far) if said.startswith(sentence)]
    assert not [said for said in warnings(far | {"noise_level": noise.level}) if said.startswith(sentence)]


def test_noise_is_pooled_as_errors_are() -> None:
    """Of columns with spreads of 1 to 10 and the same noise."""
    t = torch.linspace(0, 40, 4001, dtype=F64)
    noise = 0.02 * torch.randn(len(t), 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = torch.stack([t.cos(), 10 * t.sin()], dim=1) + noise
    found, spread = estimated_noise(Trajectories((t,), (x,), ("a", "b"))), x.std(dim=0)
    assert found.columns == pytest.approx((0.02, 0.02), rel=0.1)
    assert found.pooled == pytest.approx(0.02 * 2**0.5 / float(spread.norm()), rel=0.1)
    assert found.level == pytest.approx(0.02 * float(spread.reciprocal().square().mean().sqrt()), rel=0.1)


@pytest.mark.parametrize(("count", "sizes"), [(3, (2, 0, 1)), (8, (6, 1, 1)), (23, (16, 3, 4))])
def test_no_pair_is_both_learned_from_and_tested(count: int, sizes: tuple[int, int, int]) -> None:
    x = torch.arange(count, dtype=F64)[:, None]
    parts = split(Pairs(x, x + 0.5, torch.ones(count, dtype=F64), ("q",)), 1)
    found = [[] if p is None else p.pairs()[0].flatten().tolist() for p in (parts.train, parts.validation, parts.test)]
    assert tuple(map(len, found)) == sizes
    assert sorted(itertools.chain(*found)) == list(range(count))


def test_the_horizon_follows_the_noise() -> None:
    assert plan(spirals(), FitConfig("symplectic")).horizon == 1
    assert plan(spirals(noise=0.02), FitConfig("symplectic")).horizon == 10
    assert plan(spirals(noise=0.02), FitConfig("symplectic", noise="no")).horizon == 1


def test_a_fit_learns_an_oscillator_and_is_saved(tmp_path: Path) -> None:
    config = FitConfig("symplectic", odd=True, width=2, substeps=1, adam_steps=60, finish_steps=12)
    planned = plan(spirals(), config)
    fitted = run_stages(planned, config)
    x, y, h = planned.parts.test.pairs()
    assert float((fitted.flow(x, h) - y).detach().abs().max()) < 1e-4
    assert not claim(tmp_path / "fit", config, planned.structure, {"sha256": "0"}, overwrite=False)
    with pytest.raises(BadCheckpoint, match="holds a fit of dynablocks fit and its results; give another folder"):
        save_fit(tmp_path / "fit", fitted.flow)
    write_weights(tmp_path / "fit", fitted.flow)
    assert torch.equal(load_fit(tmp_path / "fit")(x, h), copy.deepcopy(fitted.flow)(x, h))
    with pytest.raises(BadCheckpoint, match="another"):
        claim(tmp_path / "fit", FitConfig("energy"), planned.structure, {"sha256": "0"}, overwrite=False)


def test_data_that_cannot_be_learned_gets_a_sentence() -> None:
    t = torch.linspace(0, 1, 20, dtype=F64)
    still = Trajectories((t,), (torch.ones(20, 2, dtype=F64),), ("q", "p"))
    with pytest.raises(BadData, match="no motion"):
        plan(still, FitConfig("none"))
    with pytest.raises(BadData, match="negative values"):
        plan(spirals(), FitConfig("positive"))
    decay = torch.linspace(1, 0.1, 40, dtype=F64)[:, None]
    decay[-2:] = -0.01  # in the test part
    times = torch.linspace(0, 1, 40, dtype=F64)
    with pytest.raises(BadData, match=r"negative values \(-0\.01 in trajectory '0' at t = 0\.974358974359\).*put"):
        plan(Trajectories((times,), (decay,), ("c",)), FitConfig("positive"))
    moving = Trajectories((t, t), (torch.ones(20, 2, dtype=F64), spirals(1).states[0][:20]), ("q", "p"))
    with pytest.raises(BadData, match="training part"):
        [plan(moving, FitConfig("none", seed=seed)) for seed in range(8)]


def test_several_steps_in_a_row_are_as_many_as_most_of_the_data_has() -> None:
    t, noise = torch.linspace(0, 3, 31, dtype=F64), torch.Generator().manual_seed(0)

    def rotation(states: int) -> Tensor:
        x = torch.stack([t[:states].cos(), t[:states].sin()], 1)
        return x + 0.05 * torch.randn(x.shape, generator=noise, dtype=F64)

    lengths = (8,) * 40 + (12,) * 6
    data = Trajectories(tuple(t[:n] for n in lengths), tuple(map(rotation, lengths)), ("q", "p"))
    planned = plan(data, FitConfig(noise="yes"))
    assert planned.horizon == 7
    starts, _, _ = windows(planned.parts.train, planned.horizon, 3)
    assert len(starts) >= len(planned.parts.train)
    short = Trajectories((t[:2],) * 9, tuple(rotation(2) for _ in range(9)), ("q", "p"))
    with pytest.raises(InvalidArgument, match="--noise yes"):
        plan(short, FitConfig(noise="yes"))


def test_windows_reach_the_end_of_their_trajectory() -> None:
    t = torch.arange(15, dtype=F64)
    starts, ends, _ = windows(Trajectories((t,), (t[:, None],), ("q",)), 10, stride=5)
    assert starts.flatten().tolist() == [0, 4]
    assert float(ends.max()) == 14


def flow_of(field: nn.Module, method: str, names: str) -> FlowMap:
    return FlowMap(field.double(), integrator(method), Structure("none", tuple(names)))


PER_SAMPLE = {
    "ridge": lambda: flow_of(GradientField(Dense(2, 4), "tanh"), "euler", "qp"),
    "rotation": lambda: flow_of(RotationField(4), "cayley", "abcd"),
    "compartments": lambda: flow_of(CompartmentField(4), "patankar", "SIRD"),
    "compartments, order 2": lambda: flow_of(CompartmentField(4), "mprk22", "SIRD"),
}


@pytest.mark.parametrize("make", PER_SAMPLE.values(), ids=PER_SAMPLE)
def test_each_sample_takes_its_own_step(make: Callable[[], FlowMap]) -> None:
    """As many samples as the widths of the fields, where a wrong broadcast is silent."""
    torch.manual_seed(0)
    flow = make()
    x, h = torch.rand(4, *flow.in_shape, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    alone = torch.cat([flow(x[i : i + 1], float(h[i])) for i in range(4)])
    assert torch.allclose(flow(x, h), alone, rtol=1e-12, atol=1e-13)


def test_the_type_of_the_step_does_not_change_the_unit_of_time() -> None:
    flow = build(Structure("none", ("a", "b"), step=1.0))
    flow.unit.fill_(0.8)
    x = torch.rand(1, 2, dtype=torch.float64)
    assert torch.equal(flow(x, torch.tensor([1])), flow(x, 1.0))
    assert torch.equal(flow.rollout(x, torch.full((1, 2), 1))[:, 1], flow(x, 1.0))


def test_counts_are_measured_in_a_power_of_two_and_keep_their_sum() -> None:
    flow = build(Structure("mass", ("S", "I", "R"), width=4))
    x = 1e6 * torch.rand(50, 3, dtype=torch.float64)
    flow.adopt_units(x, x + 1, torch.ones(50, dtype=torch.float64))
    assert flow.scale.log2() == flow.scale.log2().round()
    assert 0.2 < flow.to_units(x).max() < 5
    assert flow.vector_field(x[:5]).std(0).max() > 0, "the hidden units are not saturated"
    assert verify(flow, x[:4]).passed


def test_a_shift_loses_what_it_moves() -> None:
    flow = FlowMap(FreeField(2, 4, odd=True).double(), integrator("rk4"), Structure("none", ("a", "b")))
    assert flow.properties.of(Equivariant) is not None
    x = torch.rand(9, 2, dtype=torch.float64) + 1
    flow.adopt_units(x, x + 0.1, torch.ones(9, dtype=torch.float64))
    assert flow.properties.of(Equivariant) is None


@pytest.mark.parametrize(("preserve", "kept"), [("norm", NormPreserving), ("positive", Positive)])
def test_a_shifted_map_keeps_no_sphere_and_no_orthant(preserve: str, kept: type) -> None:
    flow = surrogate(preserve)
    assert flow.properties.of(kept) is not None
    flow.centre.fill_(1.0)
    assert flow.properties.of(kept) is None


def test_constant_columns_say_nothing_of_the_noise() -> None:
    t = torch.linspace(0, 2, 41, dtype=torch.float64)

    def states(k: int, *constant: float) -> Tensor:
        return torch.stack([(t + k).sin(), (t + k).cos(), *(torch.full_like(t, c) for c in constant)], 1)

    plain = Trajectories((t,) * 3, tuple(map(states, range(3))), ("S", "I"))
    more = Trajectories((t,) * 3, tuple(states(k, 3.31e8, 7.0) for k in range(3)), ("S", "I", "N", "M"))
    assert estimated_noise(more).level == pytest.approx(estimated_noise(plain).level, rel=1e-9)


class Exponential(nn.Module):
    """exp(ax)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.a * x)


def test_parameters_that_fail_on_the_validation_are_not_the_best() -> None:
    one = torch.ones(4, 1, dtype=torch.float64)
    module = Exponential()
    history = fit(module, one, math.e * one, validation=(1000 * one, one))
    assert history.validation is not None
    assert bool(module(1000 * one).isfinite().all())


@pytest.mark.parametrize("change", [{"y": -5.0}, {"adam_steps": 3}, {"validation": True}, {"module": nn.ReLU}])
def test_a_checkpoint_of_another_fit_is_refused(change: dict, tmp_path: Path) -> None:
    def network(kind: type[nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 3), kind(), nn.Linear(3, 1)).double()

    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    options = {"finish_steps": 3, "checkpoint": tmp_path / "c.pt"}
    fit(network(nn.Tanh), x, 3 * x, adam_steps=2, **options)
    held = {"validation": (x, x)} if change.get("validation") else {}
    steps, slope, module = change.get("adam_steps", 2), change.get("y", 3.0), network(change.get("module", nn.Tanh))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(BadCheckpoint, match="is not a checkpoint of this fit"):
        fit(module, x, slope * x, adam_steps=steps, **options, **held)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_checkpoint_of_a_map_with_other_substeps_is_refused(tmp_path: Path) -> None:
    x, y, h = spirals().pairs(stride=10)

    def fitted(substeps: int) -> float:
        flow = build(Structure("none", ("q", "p"), width=2, substeps=substeps))
        flow.adopt_units(x, y, h)
        settings = {"adam_steps": 3, "finish_steps": 2, "checkpoint": tmp_path / "c.pt"}
        return fit(flow, x, y, step=h[:, None], residuals=training_residuals(flow), **settings).loss

    assert fitted(1) == fitted(1)
    with pytest.raises(BadCheckpoint, match="is not a checkpoint of this fit"):
        fitted(3)


def test_a_fit_whose_loss_is_drawn_anew_goes_on(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    module = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    first, again = (fit(module, x, 3 * x, adam_steps=5, finish=None, checkpoint=tmp_path / "c.pt") for _ in range(2))
    assert again.loss == first.loss


def test_a_checkpoint_that_cannot_be_read_now_is_not_to_be_removed(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    with pytest.raises(DynablocksError, match=r"cannot be read .*; nothing was changed: make it readable"):
        fit(nn.Linear(1, 1), x, 3 * x, adam_steps=2, checkpoint=tmp_path)


def test_the_finish_that_stands_in_keeps_to_the_steps_that_were_asked_for() -> None:
    x = torch.randn(500, 60, dtype=torch.float64)
    history = fit(nn.Linear(60, 60), x, x.tanh(), adam_steps=0, finish_steps=0)
    assert [record.phase for record in history.records] == ["start"]


class Parabola(nn.Module):
    """z = x + az², the smaller root, real for 4ax <= 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return solve(lambda z, x: z - x - self.a * z * z, x, x)


@pytest.mark.parametrize("finish", ["levenberg-marquardt", "lbfgs"])
def test_a_step_without_a_solution_is_rejected_and_the_fit_goes_on(finish: str) -> None:
    one = torch.ones(4, 1, dtype=torch.float64)
    module = Parabola()
    history = fit(module, one, 1.5 * one, adam_steps=0, finish=finish)
    assert history.loss < history.records[0].loss
    assert float(module.a.detach()) <= 0.25


class Quadrant(nn.Module):
    """(θ₁ + θ₂, 0.2 θ₂) with θ >= 0, which has its least distance from (1, −0.2) at the edge, at (1, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.2, 0.0], dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.theta.sum(), 0.2 * self.theta[1]]).expand(len(x), 2)

    @torch.no_grad()
    def project_(self) -> None:
        self.theta.clamp_(min=0)


@pytest.mark.parametrize(("finish", "near"), [("levenberg-marquardt", 1e-3), ("lbfgs", 1e-6)])
def test_a_minimum_at_the_edge_of_what_is_allowed_is_found(finish: str, near: float) -> None:
    """Without the constraint it is (2, −1), whose projection (2, 0) is worse than the start.

    Damped steps get there slowly, and end where the loss falls by less than a thousandth in twenty of them.
    """
    module = Quadrant()
    history = fit(module, torch.zeros(1, 1), torch.tensor([[1.0, -0.2]]), adam_steps=0, finish=finish, finish_steps=200)
    assert history.loss == pytest.approx(0.02, rel=near, abs=0)
    assert torch.allclose(module.theta.detach(), torch.tensor([1.0, 0.0], dtype=F64), rtol=0, atol=0.01)


def test_lbfgs_takes_no_more_iterations_than_were_asked_for() -> None:
    x, y = exponential_data()
    history = fit(Exponentials(), x, y, adam_steps=0, finish="lbfgs", finish_steps=23)
    assert [record.step for record in history.records] == [0, 20, 23]
    few, one = (fit(Exponentials(), x, y, adam_steps=0, finish="lbfgs", finish_steps=n) for n in (5, 1))
    assert one.loss > few.loss > history.loss


@pytest.mark.parametrize("finish", ["levenberg-marquardt", "lbfgs"])
@pytest.mark.parametrize("module", [Exponentials, Parabola])
def test_a_record_of_a_finish_has_the_loss_of_the_parameters_at_that_moment(
    finish: str, module: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after steps that were rejected, as those to a parabola without a root."""
    monkeypatch.setattr(LimitedMemoryBFGS, "inner_steps", 3)
    one = torch.ones(4, 1, dtype=F64)
    x, y = exponential_data() if module is Exponentials else (one, 1.5 * one)
    fitted = module()
    pairs: list[tuple[float, float]] = []

    def compare(record: FitRecord) -> None:
        with torch.no_grad():
            pairs.append((record.loss, 0.5 * float((fitted(x) - y).square().sum()) / len(x)))

    fit(fitted, x, y, adam_steps=0, finish=finish, finish_steps=12, callback=compare)
    assert len(pairs) > 1
    for noted, computed in pairs:
        assert noted == pytest.approx(computed, rel=1e-12, abs=0)


class Refusing(Exponentials):
    """Its third step of training has no solution."""

    trained = 0

    def forward(self, x: Tensor) -> Tensor:
        self.trained += torch.is_grad_enabled()
        if torch.is_grad_enabled() and self.trained == 3:
            raise NotConverged("the step is not solved for 1 sample; take a smaller step.")
        return super().forward(x)


def test_a_fit_says_why_it_ended() -> None:
    for module, reason in ((Exponentials(), "the steps of Adam were done"), (Refusing(), "a step had no solution")):
        history = fit(module, *exponential_data(), adam_steps=10, finish=None)
        assert history.stopped == reason
        assert math.isfinite(history.loss)


def test_states_at_which_a_run_ended_are_not_stepped_from() -> None:
    states = torch.zeros(5, 2)
    assert int(_starts(states, 24).max()) == 3
    assert int(_starts(states[:1], 24).max()) == 0


def test_one_short_trajectory_does_not_switch_the_horizon_off() -> None:
    t = torch.linspace(0, 3, 31, dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)
    long = tuple(
        torch.stack([(t + k).sin(), (t + k).cos()], 1) + 0.1 * torch.randn(31, 2, generator=noise, dtype=torch.float64)
        for k in range(8)
    )
    data = Trajectories((t,) * 8, long, ("q", "p"))
    short = Trajectories((*data.times, *(t[:2],) * 4), (*long, *(long[0][:2],) * 4), ("q", "p"))
    config = FitConfig(noise="yes")
    assert plan(data, config).horizon == plan(short, config).horizon == 10
    pairs = Pairs(long[0][:-1], long[0][1:], t.diff(), ("q", "p"))
    with pytest.raises(InvalidArgument, match="file of pairs"):
        plan(pairs, config)


def noisy_rotations(*lengths: int) -> Trajectories:
    t, noise = torch.linspace(0, 3, 31, dtype=F64), torch.Generator().manual_seed(0)
    found = []
    for k, length in enumerate(lengths):
        x = torch.stack([(t[:length] + k).sin(), (t[:length] + k).cos()], dim=1)
        found.append(x + 0.1 * torch.randn(x.shape, generator=noise, dtype=F64))
    return Trajectories(tuple(t[:length] for length in lengths), tuple(found), ("q", "p"))


@pytest.mark.parametrize("lengths", [(31, 31, 31), (5, 5, 5)])
def test_a_horizon_that_the_data_does_not_have_is_refused(lengths: tuple[int, ...]) -> None:
    data, most = noisy_rotations(*lengths), lengths[0] - 1
    assert plan(data, FitConfig(horizon=most, noise="no")).horizon == most
    with pytest.raises(InvalidArgument, match=f"horizon is {most + 1}; only runs of up to {most} steps make up half"):
        plan(data, FitConfig(horizon=most + 1, noise="no"))


def test_steps_that_the_second_stage_leaves_out_are_told() -> None:
    def told(*lengths: int) -> list[str]:
        return [doubt for doubt in doubts(plan(noisy_rotations(*lengths), FitConfig(noise="yes"))) if "lie in" in doubt]

    data = noisy_rotations(*(6,) * 10, *(11,) * 24)
    planned = plan(data, FitConfig(noise="yes"))
    train, held = (
        [len(times) - 1 for times in part.times] for part in fitted_parts(planned.parts, planned.structure.step)
    )
    missed = " and ".join(
        f"{sum(n for n in steps if n < 10)} of {sum(steps)} {use} steps"
        for use, steps in (("training", train), ("validation", held))
        if 10 * sum(n for n in steps if n < 10) > sum(steps)
    )
    (sentence,) = told(*(6,) * 10, *(11,) * 24)
    assert sentence.startswith(f"{missed} lie in runs of fewer than 10, ")
    assert "training" in missed
    assert told(*(11,) * 20) == []
    assert told(*(31,) * 20, 6) == []


@pytest.mark.parametrize(("solved", "horizon"), [(5, 5), (3, 2), (0, 1)])
def test_a_map_whose_steps_in_a_row_are_not_solved_is_compared_over_fewer(
    solved: int, horizon: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Single steps are fitted without solving their equations, which may have no solution from where a step has led."""

    def residuals(flow: FlowMap, x: Tensor, y: Tensor, step: Tensor) -> Tensor:
        if step.shape[1] > solved:
            raise NotConverged("no solution")
        return rollout_residuals(flow, x, y, step)

    monkeypatch.setattr(job, "rollout_residuals", residuals)
    config = FitConfig("energy", noise="yes", width=2, adam_steps=8, finish_steps=1, max_minutes=None)
    planned = plan(noisy_rotations(31, 31, 31, 31), config)
    assert (planned.horizon, planned.unsolved) == (10, None)
    fitted = run_stages(planned, config)
    assert (fitted.plan.horizon, fitted.plan.unsolved) == (horizon, 10)
    assert list(fitted.stages) == ["one step", f"{horizon} steps" if horizon > 1 else "single steps"]
    assert math.isfinite(fitted.history.loss)
    (told,) = [doubt for doubt in doubts(fitted.plan) if "not all solved" in doubt]
    compared = "single steps" if horizon == 1 else f"{horizon} steps in a row"
    assert f"The equations of 10 steps in a row were not all solved after the first stage, so {compared} were" in told


def test_what_a_shift_of_the_states_takes_is_told() -> None:
    x = 5.0 + torch.rand(20, 3, dtype=F64)
    for method, field, kept in (
        ("patankar", CompartmentField(3), "Positive"),
        ("cayley", RotationField(3, 5), "NormPreserving"),
    ):
        flow = FlowMap(field.double(), integrator(method), Structure("none", ("S", "I", "R"), step=0.1))
        assert not [loss for loss in flow.declare().losses if "shifted" in loss]
        scope = flow.scope()
        flow.adopt_units(x, x.roll(1, 0), torch.full((20,), 0.1, dtype=F64))
        assert any(loss.startswith(f"{kept} is lost: it is about 0, ") for loss in flow.declare().losses)
        assert flow.scope() == scope == ("every step size >= 0" if kept == "Positive" else "every step size")


def test_masses_far_from_zero_are_told() -> None:
    def told(preserve: str, shift: float, odd: bool = False) -> list[str]:
        data = sums(0.0)
        data = replace(data, states=tuple(x + shift for x in data.states))
        return [doubt for doubt in doubts(plan(data, FitConfig(preserve, odd=odd))) if doubt.startswith("Far from 0")]

    assert len(told("mass", 1e8)) == 1
    assert told("mass", 0.0) == told("mass", 1e8, odd=True) == told("positive", 1e8) == []


def test_a_short_trajectory_is_not_drawn_where_there_are_others() -> None:
    data, said = noisy_rotations(31, 31, 31, 31, 2), set()
    for seed in range(16):
        planned = plan(data, FitConfig(seed=seed))
        assert (planned.horizon, planned.cut_to_one) == (10, False)
        for part in (planned.parts.validation, planned.parts.test):
            assert isinstance(part, Trajectories)
            assert {len(times) for times in part.times} == {31}
        # One of three, so that the other two are split at random.
        planned = plan(data.take([0, 1, 4]), FitConfig(seed=seed))
        short = len(planned.parts.train.times[0]) == 31
        told = [doubt for doubt in doubts(planned) if doubt.startswith("The data looks noisy, but too many traj")]
        assert (planned.horizon, planned.cut_to_one, len(told)) == (1, short, short)
        said.add(short)
    assert said == {True, False}


def test_the_trajectories_of_the_test_may_be_named(tmp_path: Path) -> None:
    data = replace(spirals(6), labels=tuple("abcdef"))
    for seed in range(4):
        parts = plan(data, FitConfig("none", seed=seed, test=("e", "b"))).parts
        assert parts.test.labels == ("b", "e")
        assert parts.validation is not None
        assert sorted((*parts.train.labels, *parts.validation.labels)) == list("acdf")
    assert plan(spirals(3), FitConfig("none", test=["1"])).parts.test.labels == ("1",)
    for test, sentence in ((("g",), "unknown trajectory of the test 'g'"), (data.labels, "every trajectory; leave")):
        with pytest.raises(InvalidArgument, match=sentence):
            plan(data, FitConfig("none", test=test))
    with pytest.raises(InvalidArgument, match="test names trajectories, which pairs are not"):
        plan(Pairs(*data.pairs(), data.names), FitConfig("none", test=("a",)))
    for wrong in ("ab", (), (1,), 5):
        with pytest.raises(InvalidArgument, match=r"test is .*; labels of trajectories are needed"):
            FitConfig(test=wrong)  # type: ignore[arg-type]
    structure = plan(data, FitConfig("none", width=2)).structure
    for test, sentence in ((("a",), None), (("a",), None), (("b",), r"another test \(\['a'\], now \['b'\]\)")):
        with contextlib.nullcontext() if sentence is None else pytest.raises(BadCheckpoint, match=sentence):
            claim(tmp_path / "fit", FitConfig("none", width=2, test=test), structure, {"sha256": "0"}, overwrite=False)


def test_the_positive_midpoint_takes_a_step_a_sample() -> None:
    field, x = ProductionDestruction(2, 4).double(), torch.rand(2, 2, dtype=F64)
    both = PositiveMidpoint().step(field, x, torch.tensor([0.1, 0.4], dtype=F64))
    for row, (start, h) in enumerate(zip(x, (0.1, 0.4), strict=True)):
        assert torch.allclose(both[row], PositiveMidpoint().step(field, start[None], h)[0], rtol=1e-14, atol=0)


def test_a_surrogate_says_for_which_steps_it_keeps_what_it_keeps() -> None:
    assert surrogate("positive").scope() == "every step size >= 0"
    assert "every step size >= 0" in surrogate("positive").declare().reason
    assert surrogate("symplectic").scope() == surrogate("mass").scope() == "every step size"
    damped = flow_of(DampedHamiltonian.example(), "strang", "abcd")
    assert damped.properties.of(ConformalSymplectic) is not None
    assert damped.scope() == "every step size (ConformalSymplectic: by the factor of this one)"
    assert damped.scope() in damped.declare().reason


def test_a_negative_step_of_the_positive_midpoint_is_its_formula() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(_frozen(0 * one, one, one, -10.0)) == pytest.approx(1 - math.exp(10), rel=1e-12)


def test_the_positive_midpoint_has_the_order_it_declares() -> None:
    torch.manual_seed(0)
    field, method = ProductionDestruction(2, 4).double(), PositiveMidpoint()
    start, counts, errors = torch.rand(4, 2, dtype=torch.float64), (16, 32, 64), []
    truth = exact_solution(field, start, 1.0)
    with torch.no_grad():
        for count in counts:
            x = start
            for _ in range(count):
                x = method.step(field, x, 1 / count)
            errors.append(float((x - truth).norm()))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] == pytest.approx(method.order, abs=0.15)


def test_the_positive_midpoint_declares_positivity_alone() -> None:
    declared = PositiveMidpoint().declare(ProductionDestruction(2, 4), 0.25)
    assert [type(kept) for kept in declared.properties] == [Positive]
    assert (declared.title, declared.reason) == ("PositiveMidpoint(h=0.25)", "sums of nonnegative terms")
    with pytest.raises(InvalidArgument, match="needs a field of the form"):
        PositiveMidpoint().declare(FreeField(2, 4), 0.25)


class Doubled(ProductionDestruction):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_the_positive_midpoint_takes_no_p_and_d_of_another_field() -> None:
    with pytest.raises(InvalidArgument, match="Doubled has a forward of its own, and P and D of another"):
        PositiveMidpoint().step(Doubled(2, 4), torch.ones(1, 2), 0.25)


def test_the_parts_of_surrogates_conform() -> None:
    torch.manual_seed(0)
    check_block(DynamicalBlock(ProductionDestruction.example(), PositiveMidpoint(), FreeSignal(0.5))).require()
    check_block(DynamicalBlock(CoordinateShears.example(), "suzuki4", FreeSignal(0.1))).require()


def test_a_limit_that_is_not_reached_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = exponential_data()

    def fitted(seconds_a_call: float, limit: float | None) -> dict[str, Tensor]:
        clock = itertools.count()
        monkeypatch.setattr(regression, "time", SimpleNamespace(monotonic=lambda: next(clock) * seconds_a_call))
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        fit(module, x, y, adam_steps=30, finish=None, max_seconds=limit)
        return module.state_dict()

    free = fitted(0.0, None)
    for pace in (1e-6, 1e-3):
        for name, value in fitted(pace, 1e3).items():
            assert torch.equal(value, free[name])
    hurried = fitted(1.0, 20.0)
    assert any(not torch.equal(value, free[name]) for name, value in hurried.items())


def test_a_surrogate_made_in_python_is_saved_and_takes_any_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = build(Structure("mass", ("a", "b", "c"), width=4, step=0.1, weights=(1.0, 2.0, 1.0)))
    x = torch.rand(3, 3, dtype=F64)
    save_fit(tmp_path / "new" / "fit", flow)
    again = load_fit(tmp_path / "new" / "fit")
    assert torch.equal(again(x), flow(x))
    assert again.structure == flow.structure
    assert torch.equal(again(x.float()), again(x.float().double()))
    other = build(Structure("mass", ("a", "b", "c"), width=4, step=0.2))
    save_fit(str(tmp_path / "new" / "fit"), other)
    assert load_fit(tmp_path / "new" / "fit").structure == other.structure
    (tmp_path / "new" / "fit" / "config.yaml").write_text("fit: {preserve: mass}\nstructure: {}\n")
    with pytest.raises(BadCheckpoint, match="holds a fit of dynablocks fit"):
        save_fit(tmp_path / "new" / "fit", other)


MAPS = {
    "separable": Structure("symplectic", ("q", "p"), width=4, step=0.1, linear=True),
    "coupled": Structure("symplectic", ("q", "p"), width=4, step=0.1, separable=False, linear=True),
    "energy": Structure("energy", ("q", "p"), width=4, step=0.1, linear=True),
    "skew": Structure("energy", ("a", "b", "c"), width=4, step=0.1, linear=True),
}


@pytest.mark.parametrize("shape", [(2, 1), (2,), (3, 3), (1, 2, 2)])
def test_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    flow, x = build(MAPS["coupled"]), torch.ones(shape, dtype=F64)
    calls: list[Callable[[Tensor], object]] = [
        flow,
        flow.inverse,
        flow.vector_field,
        flow.energy,
        lambda z: flow.rollout(z, torch.full((1, 3), 0.1, dtype=F64)),
        lambda z: training_residuals(flow)(flow, z, torch.ones(len(z), 2, dtype=F64)),
        lambda z: training_residuals(flow)(flow, torch.ones(len(z), 2, dtype=F64), z),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument, match=r"FlowMap was built for \(batch, 2\)"):
            call(x)


def test_steps_are_one_a_state_or_one_for_all() -> None:
    flow = build(MAPS["separable"])
    x = states(flow, 3)
    for one in (0.1, torch.tensor(0.1, dtype=F64), torch.tensor([0.1], dtype=F64)):
        assert torch.allclose(flow(x, one), flow(x, torch.full((3,), 0.1, dtype=F64)), rtol=1e-14, atol=1e-14)
    for step in (torch.ones(2, dtype=F64), torch.ones(3, 2, dtype=F64)):
        with pytest.raises(InvalidArgument, match="one each"):
            flow(x, step)
    with pytest.raises(InvalidArgument, match="one each"):
        flow(x[:1], torch.ones(2, dtype=F64))
    for steps in (torch.ones(4, dtype=F64), torch.ones(2, 4, dtype=F64)):
        with pytest.raises(InvalidArgument, match="one row a state"):
            flow.rollout(x, steps)
    row = torch.full((1, 4), 0.1, dtype=F64)
    assert torch.allclose(flow.rollout(x, row), flow.rollout(x, row.expand(3, -1)), rtol=1e-14, atol=1e-14)


class Derived(FlowMap):
    """A surrogate of another class."""


def slow_shears() -> FlowMap:
    """The field of ``volume``, whose shears flow at half their speed: their step differs, not their values."""

    class CoordinateShear(structures.CoordinateShear):
        def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
            return x + 0.5 * time * self(x)

    field = CoordinateShears(3, 4)
    field.shears = nn.ModuleList(CoordinateShear(3, i, 4) for i in range(3))
    return FlowMap(field.double(), integrator("suzuki4"), Structure("volume", ("a", "b", "c"), width=4))


OTHERS: dict[str, Callable[[FlowMap], FlowMap]] = {
    "field": lambda flow: FlowMap(CoordinateShears(2, 4).double(), flow.method, flow.structure),
    "method": lambda flow: FlowMap(flow.field, integrator("heun"), flow.structure),
    "width": lambda flow: FlowMap(flow.field, flow.method, replace(flow.structure, width=5)),
    "parity": lambda flow: FlowMap(flow.field, flow.method, replace(flow.structure, odd=True)),
    "class": lambda flow: Derived(flow.field, flow.method, flow.structure),
}
HIDDEN: dict[str, Callable[[], FlowMap]] = {
    "activation": lambda: FlowMap(
        SphereField(Dense(3, 4), Dense(3, 4), "sigmoid").double(),
        integrator("cayley-midpoint"),
        Structure("norm", ("a", "b", "c"), width=4),
    ),
    "sign": lambda: FlowMap(
        NeuralHamiltonian(2, PotentialSum(*ridge_energy(2, 4).fields, sign=-1.0)).double(),  # type: ignore[arg-type]
        integrator("gonzalez"),
        Structure("energy", ("q", "p"), width=4),
    ),
    "tolerance": lambda: FlowMap(
        NeuralHamiltonian(2, ridge_energy(2, 4)).double(),
        DiscreteGradient("gonzalez", tolerance=1e-6),
        Structure("energy", ("q", "p"), width=4),
    ),
    "step": slow_shears,
}


@pytest.mark.parametrize("other", HIDDEN.values(), ids=HIDDEN)
def test_a_map_that_differs_in_what_no_name_shows_is_not_saved(other: Callable[[], FlowMap], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"save_fit stores maps that build\(structure\) makes"):
        save_fit(tmp_path / "fit", other())


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_map_that_its_structure_does_not_make_is_not_saved(
    other: Callable[[FlowMap], FlowMap], tmp_path: Path
) -> None:
    flow, folder = surrogate("none"), tmp_path / "fit"
    with pytest.raises(InvalidArgument, match=r"save_fit stores maps that build\(structure\) makes"):
        save_fit(folder, other(flow))
    assert not folder.exists()
    before = torch.get_rng_state()
    save_fit(folder, flow)
    assert torch.equal(torch.get_rng_state(), before)
    x = states(flow)
    assert torch.equal(load_fit(folder)(x), flow(x))


def test_a_ridge_energy_has_a_linear_term_on_request_alone() -> None:
    def drawn(**options: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return ridge_energy(2, 3, **options).state_dict()

    plain, tilted = drawn(), drawn(linear=True)
    assert set(tilted) - set(plain) == {"fields.1.bias"}
    assert all(torch.equal(tilted[name], value) for name, value in plain.items())
    with pytest.raises(InvalidArgument, match="quadratic"):
        ridge_energy(2, 3, quadratic=False, linear=True)


@pytest.mark.parametrize(("preserve", "separable"), [("symplectic", True), ("symplectic", False), ("energy", True)])
def test_a_constant_field_is_a_learned_energy_of_its_own(preserve: str, separable: bool) -> None:
    names = ("q1", "q2", "p1", "p2")
    flow = build(Structure(preserve, names, width=3, separable=separable, linear=True))
    x = states(flow, 5)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.zero_()
        biases = [part.bias for part in flow.field.modules() if isinstance(part, LinearField)]
        for bias in biases:
            assert bias is not None
            bias.normal_()
        slope = torch.cat([bias for bias in biases if bias is not None])
        assert torch.equal(flow.vector_field(x), canonical(slope.expand(5, -1)))
        assert torch.allclose(flow.energy(x), x @ slope, rtol=1e-14, atol=1e-14)
    assert not flow.field.facts().odd


def test_fits_that_are_not_odd_learn_a_linear_term() -> None:
    for preserve, odd, linear in (
        ("symplectic", False, True),
        ("energy", False, True),
        ("symplectic", True, False),
        ("none", False, False),
    ):
        assert plan(spirals(), FitConfig(preserve, odd=odd)).structure.linear is linear


def test_a_folder_is_refused_to_a_fit_of_another_structure_or_other_columns(tmp_path: Path) -> None:
    config = FitConfig("none", width=2)
    structure = plan(spirals(), config).structure

    def claimed(wanted: Structure) -> bool:
        return claim(tmp_path / "fit", config, wanted, {"sha256": "0"}, overwrite=False)

    assert not claimed(structure)
    assert not claimed(structure)
    with pytest.raises(BadCheckpoint, match=r"another linear \(False, now True\)"):
        claimed(replace(structure, linear=True))
    with pytest.raises(BadCheckpoint, match=r"another choice of --columns \(\['q', 'p'\], now \['p', 'q'\]\)"):
        claimed(replace(structure, names=("p", "q")))


def test_a_folder_whose_settings_were_edited_away_is_refused(tmp_path: Path) -> None:
    config = FitConfig("none", width=2)
    structure = plan(spirals(), config).structure
    (tmp_path / "config.yaml").write_text("fit: [1]\nstructure: 5\ndata: nothing\n")
    with pytest.raises(BadCheckpoint, match="another data file"):
        claim(tmp_path, config, structure, {"sha256": "0"}, overwrite=False)


@pytest.mark.parametrize("preserve", list(SURROGATES))
def test_several_runs_together_are_those_of_each_alone(preserve: str) -> None:
    flow = surrogate(preserve)
    x, steps = states(flow, 3), torch.tensor([0.1, 0.05, 0.2], dtype=F64)
    runs, stopped = safe_rollout(flow, x, steps.unbind())
    assert stopped is None
    assert runs.shape == (3, 4, x.shape[1])
    for run, start in zip(runs, x, strict=True):
        z = [start[None]]
        for h in steps.tolist():
            z.append(flow(z[-1], h).detach())
        assert torch.allclose(run, torch.cat(z), rtol=1e-11, atol=1e-11)


def test_a_run_is_the_same_however_many_states_are_stacked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, h = surrogate("symplectic"), torch.tensor(0.1, dtype=F64)
    whole, _ = safe_rollout(flow, states(flow, 3), itertools.repeat(h, 7))
    assert whole.shape == (3, 8, 2)
    for most in (1, 3, 4, 8):
        monkeypatch.setattr("dynablocks.fitting.rollout.STACKED_STATES", most)
        assert torch.equal(safe_rollout(flow, states(flow, 3), itertools.repeat(h, 7))[0], whole)


def test_a_run_ends_where_a_step_has_no_solution_or_leaves_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, h = torch.tensor([[1.0, 2.0], [-3.0, 4.0]], dtype=F64), torch.tensor(0.2, dtype=F64)
    runs, stopped = safe_rollout(growth(0.2), x / 4 * 1e308, itertools.repeat(h, 9))
    assert stopped == "the states left the range of numbers"
    # 1.2³ < 1.797 < 1.2⁴ for the entry of 10³⁰⁸.
    assert runs.shape == (2, 4, 2)
    stepped = FlowMap.forward

    def refuse(self: FlowMap, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        if bool((x[:, 0] > 1.3).any()):
            raise NotConverged("the step is not solved for 1 sample; take a smaller step.")
        return stepped(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", refuse)
    runs, stopped = safe_rollout(growth(0.2), x, itertools.repeat(h, 9))
    assert stopped == "the step is not solved for 1 sample; take a smaller step."
    assert torch.allclose(runs[0, :, 0], torch.tensor([1.0, 1.2, 1.44], dtype=F64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("preserve", "what", "changes"),
    [
        ("mass", "relative change of the mass", [[0.0, 1 / 6], [0.0, 1.0]]),
        ("norm", "relative change of the norm", [[0.0, 2.0], [0.0, 3.0]]),
        ("positive", "negative part of the smallest entry", [[0.0, 0.0], [0.0, 3.0]]),
    ],
)
def test_changes_of_what_is_kept_are_those_of_each_run(preserve: str, what: str, changes: list[list[float]]) -> None:
    runs = {
        "mass": [[[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]],
        "norm": [[[1.0, 2.0, 2.0], [0.0, 9.0, 0.0]], [[0.0, 0.0, 1.0], [4.0, 0.0, 0.0]]],
        "positive": [[[1.0, 2.0], [0.5, 0.0]], [[1.0, 0.0], [-2.0, -3.0]]],
    }
    moved = torch.tensor(runs[preserve], dtype=F64)
    found = change_along(surrogate(preserve), moved, moved[0])
    assert found is not None
    assert found[0] == what
    assert torch.allclose(found[1], torch.tensor(changes, dtype=F64), rtol=1e-14, atol=1e-15)
    assert change_along(surrogate("none"), torch.ones(1, 2, 2, dtype=F64), torch.ones(1, 2, dtype=F64)) is None


def test_a_weighted_mass_changes_by_its_weights_over_the_size_of_its_parts() -> None:
    """x − y is 2, 3 and 2; its parts at the start are 3 and −1."""
    flow = build(Structure("mass", ("x", "y"), width=2, weights=(1.0, -1.0)))
    runs = torch.tensor([[[3.0, 1.0], [4.0, 1.0], [5.0, 3.0]]], dtype=F64)
    found = change_along(flow, runs, runs[0])
    assert found is not None
    assert found[1].tolist() == [[0.0, 0.25, 0.0]]


@pytest.mark.parametrize(("preserve", "usual"), [("mass", 300.0), ("norm", 100 * 3**0.5)])
def test_changes_from_a_start_at_0_are_over_the_size_of_the_data(preserve: str, usual: float) -> None:
    flow = surrogate(preserve)
    flow.scale.fill_(100.0)
    runs = torch.zeros(3, 2, 3, dtype=F64)
    runs[1, 1, 0] = 1e-14
    runs[2, :, 0] = torch.tensor([1e-6, 3e-6])
    found = change_along(flow, runs, runs[0])
    assert found is not None
    wanted = torch.tensor([[0.0, 0.0], [0.0, 1e-14 / usual], [0.0, 2.0]], dtype=F64)
    assert torch.allclose(found[1], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("structure", MAPS.values(), ids=MAPS)
def test_changes_of_a_learned_energy_do_not_depend_on_the_chunks(
    structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = build(structure)
    runs = torch.stack([states(flow, 5), 2 * states(flow, 5)])
    whole = change_along(flow, runs, runs[0])
    monkeypatch.setattr("dynablocks.fitting.rollout.ENERGY_CHUNK", 3)
    chunked = change_along(flow, runs, runs[0])
    assert whole is not None
    assert chunked is not None
    assert torch.allclose(whole[1], chunked[1], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        values, middle = flow.energy(runs[0]), flow.energy(runs[0].mean(0, keepdim=True))
        ends = flow.energy(runs[:, -1]) - flow.energy(runs[:, 0])
    spread = (values - middle).square().mean().sqrt()
    assert torch.allclose(whole[1][:, -1], ends.abs() / spread, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", MAPS.values(), ids=MAPS)
def test_the_learned_energy_is_in_the_units_of_the_data(structure: Structure) -> None:
    torch.manual_seed(0)
    flow = build(structure)
    x = 1e3 * states(flow, 6) + 50
    flow.adopt_units(x, x + 20 * x.roll(1, 1), torch.full((6,), 0.1, dtype=F64))
    point = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(flow.energy(point).sum(), point)
    with torch.no_grad():
        moved = flow.vector_field(x)
        skew = flow.field.structure(flow.to_units(x), slope)  # type: ignore[operator]
    assert torch.allclose(moved, skew, rtol=0, atol=1e-11 * float(moved.abs().max()))


@pytest.mark.parametrize("structure", MAPS.values(), ids=MAPS)
def test_the_drift_of_a_learned_energy_knows_no_constant_and_no_unit(
    structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, found = torch.arange(5, dtype=F64), []
    for unit, constant in ((1.0, 0.0), (1.0, 1e3), (2.0**-20, 0.0), (2.0**20, 0.0)):
        torch.manual_seed(0)
        flow = build(structure)
        x = unit * (states(flow, 8) + 3)
        flow.adopt_units(x, x + 0.1 * x.roll(1, 1), torch.full((8,), 0.1, dtype=F64))
        energy = flow.field.energy
        monkeypatch.setattr(flow.field, "energy", lambda z, energy=energy, constant=constant: energy(z) + constant)
        drift = drifts(flow, times, x[:5], x)[0]
        assert drift.what == "change of the learned energy over its spread"
        found.append(drift.values)
        assert bool(drifts(flow, times, x[:5], x[:1])[0].values.isfinite().all())
    with torch.no_grad():
        values, middle = flow.energy(x), flow.energy(x.mean(0, keepdim=True))
    wanted = (values[:5] - values[0]).abs() / (values - middle).square().mean().sqrt()
    for drift_values in found:
        assert torch.allclose(drift_values, wanted, rtol=1e-8, atol=1e-10)


def test_a_learned_energy_is_verified_alike_whatever_the_size_of_the_data() -> None:
    class Leaking(SkewGradientField):
        def structure(self, x: Tensor, v: Tensor) -> Tensor:
            return super().structure(x, v) - 1e-6 * v

        def facts(self) -> FieldFacts:
            return replace(super().facts(), reason="claimed all the same")

    structure = MAPS["skew"]
    for size, field, kept in (
        (1e-6, SkewGradientField(3, 4, linear=True), True),
        (1e6, SkewGradientField(3, 4, linear=True), True),
        (1e-6, Leaking(3, 4, linear=True), False),
    ):
        flow = FlowMap(field.double(), integrator("gonzalez"), structure)
        x = size * states(flow, 6)
        flow.adopt_units(x, x + 0.1 * x.roll(1, 1), torch.full((6,), 0.1, dtype=F64))
        assert verify(flow, x[:4]).passed == kept


def growth(step: float, rate: float = 1.0) -> FlowMap:
    """An Euler step of ẋ = rate · x."""
    field = LinearField(2).double()
    with torch.no_grad():
        field.matrix.copy_(rate * torch.eye(2))
    return FlowMap(field, integrator("euler"), Structure("none", ("a", "b"), step=step))


@pytest.mark.parametrize(("preserve", "defect"), [("volume", 0.75), ("symplectic", 0.75 * 2**0.5)])
def test_the_defect_of_a_step_is_that_of_its_jacobian(
    preserve: str, defect: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Euler step of ẋ = −x of length 1/2 has J = I/2: det J = 1/4, and Jᵀ𝕁J − 𝕁 = −3/4 𝕁."""
    flow = growth(0.5, rate=-1.0)
    flow.structure = replace(flow.structure, preserve=preserve)
    monkeypatch.setattr(flow.field, "energy", lambda z: z.sum(1))
    times, x = torch.arange(3, dtype=F64), torch.randn(3, 2, dtype=F64)
    *_, drift = drifts(flow, times, x, x)
    assert drift.values.tolist() == pytest.approx([defect] * 24, rel=1e-12)


def test_errors_of_a_report_are_of_their_parts_and_drifts_the_largest() -> None:
    """Circles of radius r that turn by h in a step, and the map (1 + h)x; no part has the mean r² of another."""
    from dynablocks.fitting.report import measure

    t = torch.linspace(0, 2, 21, dtype=F64)
    circles = tuple(r * torch.stack([t.cos(), -t.sin()], dim=1) for r in (1.0, 2.0, 3.0, 4.0))
    config = FitConfig("norm", noise="no", width=2, substeps=1, adam_steps=0, finish_steps=0, max_minutes=None)
    fitted = run_stages(plan(Trajectories((t,) * 4, circles, ("q", "p")), config), config)
    parts, h = fitted.plan.parts, fitted.plan.structure.step
    fitted.flow = growth(h)
    fitted.flow.structure = fitted.plan.structure
    metrics = measure(fitted, 40).metrics
    for name, part in (("train", parts.train), ("validation", parts.validation), ("test", parts.test)):
        x, _, _ = part.pairs()
        wanted = float(x.square().sum(1).mean()) * ((1 + h) ** 2 - 2 * (1 + h) * math.cos(h) + 1) / 2
        assert metrics[f"{name}_mse"] == pytest.approx(wanted, rel=1e-9)
    radius, spread = float(parts.test.states[0][0].norm()), float(parts.train.pairs()[1].var(dim=0).mean())
    assert metrics["step_halving_error"] == pytest.approx(h * h / 4 * radius / math.sqrt(2 * spread), rel=1e-9)
    assert metrics["drift"] == {"relative change of the norm": pytest.approx((1 + h) ** 40 - 1, rel=1e-9)}


def test_two_half_steps_are_compared_with_a_whole_one() -> None:
    x = torch.tensor([[1.0, 0.0], [-3.0, 4.0]], dtype=F64)
    assert step_halving_gap(growth(0.2), x) == pytest.approx(0.05, rel=1e-12)  # h²/4 · ‖x‖
    accurate = FlowMap(growth(0.2).field, integrator("rk4"), Structure("none", ("a", "b"), step=0.2))
    assert float(step_halving_gap(accurate, x) or 0.0) < 1e-4


def test_errors_of_columns_are_their_own() -> None:
    x, h = torch.zeros(4, 2, dtype=F64), torch.ones(4, dtype=F64)
    data = Pairs(x, x + torch.tensor([1.0, 2.0], dtype=F64), h, ("a", "b"))
    found = column_errors(growth(0.2), data)
    assert found is not None
    assert found.tolist() == [1.0, 4.0]
    assert one_step_error(growth(0.2), data) == 2.5


def test_steps_that_are_not_solved_have_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FlowMap, x: Tensor, step: object = None) -> Tensor:
        raise NotConverged("the step is not solved for 1 sample; take a smaller step.")

    monkeypatch.setattr(FlowMap, "forward", refuse)
    x = torch.ones(4, 2, dtype=F64)
    data = Pairs(x, x, torch.ones(4, dtype=F64), ("a", "b"))
    assert step_halving_gap(growth(0.2), x) is None
    assert column_errors(growth(0.2), data) is None
    assert math.isinf(one_step_error(growth(0.2), data))


@pytest.mark.parametrize("most", [3, SAMPLES_AT_ONCE])
def test_errors_are_measured_of_so_many_samples_at_a_time(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, data, stepped = surrogate("none"), spirals(1), FlowMap.forward
    x, y, h = data.pairs()
    wanted = (flow(x, h) - y).detach().square().mean(0)
    rows: list[int] = []

    def counted(self: FlowMap, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        rows.append(len(x))
        return stepped(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", counted)
    monkeypatch.setattr("dynablocks.fitting.single_steps.SAMPLES_AT_ONCE", most)
    found = column_errors(flow, data)
    assert found is not None
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
    assert rows == ([3] * 6 + [2] if most == 3 else [20])


def test_too_many_samples_are_thinned_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynablocks.fitting.job.MOST_SAMPLES", 2)
    config = FitConfig("none", noise="yes", width=2, substeps=1, adam_steps=4, finish_steps=1)
    told: list[str] = []
    held: list[int] = []

    def recorded(*given: Any, **settings: Any) -> regression.FitHistory:
        held.append(len(settings["validation"][0]))
        return fit(*given, **settings)

    monkeypatch.setattr("dynablocks.fitting.job.fit", recorded)
    fitted = run_stages(plan(spirals(), config), config, None, told.append)
    assert {name: history.samples for name, history in fitted.stages.items()} == {"one step": 2, "10 steps": 2}
    assert held == [2, 2]
    assert "10 steps: 2 of 6 runs are used, evenly spaced" in told


def test_rollouts_are_called_as_their_trajectories() -> None:
    data = replace(spirals(3), labels=("left", "right", "middle"))
    assert [rollout.label for rollout in roll_out(surrogate("symplectic"), data)] == list(data.labels)
    _, test = spirals(10).split(0.2, seed=1)
    numbers = [rollout.label for rollout in roll_out(surrogate("symplectic"), test)]
    assert numbers == list(test.labels)
    for label, state in zip(numbers, test.states, strict=True):
        assert torch.equal(state, spirals(10).states[int(label)])


@pytest.mark.parametrize(("rows", "most"), [(7, 1), (7, 3), (2**24 + 4, 5)])
def test_thinned_rows_are_evenly_spaced_and_never_beyond_the_last(rows: int, most: int) -> None:
    (kept,) = thinned((torch.arange(rows),), most)
    assert len(kept) == most
    assert kept[0] == 0
    assert most == 1 or (kept[-1] == rows - 1 and int(kept.diff().max() - kept.diff().min()) <= 1)


def test_a_folder_stays_that_of_a_fit_whenever_its_writer_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FitConfig("none", width=2)
    structure = plan(spirals(), config).structure
    folder = tmp_path / "fit"

    def claimed(seed: int, *, overwrite: bool) -> bool:
        return claim(folder, replace(config, seed=seed), structure, {"sha256": "0"}, overwrite=overwrite)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder.mkdir()
    (folder / ".config.yaml.0f0f.tmp").touch()
    assert not claimed(0, overwrite=False)
    (folder / "model.safetensors").touch()
    (folder / "mine.csv").touch()
    with monkeypatch.context() as patch:
        patch.setattr("dynablocks.fitting.folder.write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            claimed(1, overwrite=True)
    assert not (folder / "model.safetensors").exists()
    with pytest.raises(BadCheckpoint, match="another seed"):
        claimed(1, overwrite=False)
    assert not claimed(1, overwrite=True)
    assert not claimed(1, overwrite=False)
    assert (folder / "mine.csv").exists()


def test_the_noise_of_a_long_log_is_that_of_some_of_its_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 40, 4001, dtype=F64)
    x = torch.stack([t.cos(), -t.sin()], dim=1)
    log = Trajectories((t,), (x + 0.02 * torch.randn(x.shape, dtype=F64, generator=generator),), ("q", "p"))
    wanted = 0.02 / float(x.std(0).mean())
    assert estimated_noise(log).level == pytest.approx(wanted, rel=0.1)
    differences, taken = rollout._differences, []

    def counted(*given: Any) -> Tensor:
        found = differences(*given)
        taken.append(len(found))
        return found

    monkeypatch.setattr(rollout, "_differences", counted)
    monkeypatch.setattr(rollout, "MOST_DIFFERENCES", 1000)
    assert estimated_noise(log).level == pytest.approx(wanted, rel=0.1)
    assert len(taken) == 3
    assert all(750 < count <= 1000 for count in taken)


@pytest.mark.parametrize(
    ("preserve", "noise"),
    [("symplectic", "yes"), ("mass", "yes"), ("norm", "yes"), ("none", "yes"), ("none", "no"), ("energy", "no")],
)
def test_a_fit_does_not_see_the_unit_of_the_data(preserve: str, noise: str) -> None:
    """A power of two rounds nothing, so that the fits are equal to the last bit."""
    config = FitConfig(preserve, noise=noise, width=2, substeps=1, adam_steps=20, finish_steps=2, max_minutes=None)
    found = []
    for unit in (1.0, 2.0**-20):
        data = spirals(noise=0.01)
        data = replace(data, states=tuple(unit * x for x in data.states))
        found.append(run_stages(plan(data, config), config))
    first, second = (dict(fitted.flow.named_parameters()) for fitted in found)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert found[0].history.loss == found[1].history.loss
    assert found[1].flow.scale == 2.0**-20 * found[0].flow.scale


class Damped(DiscreteGradient):
    """Nine tenths of the step of a discrete gradient."""

    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return x + 0.9 * (super().step(field, x, step_size) - x)


class DampedMidpoint(ImplicitRungeKutta):
    def step(self, field: VectorField, x: Tensor, step_size: Tensor | float) -> Tensor:
        return x + 0.9 * (super().step(field, x, step_size) - x)


@pytest.mark.parametrize(
    "method",
    [
        Damped("gonzalez"),
        DampedMidpoint(IMPLICIT_MIDPOINT),
        # The name of the midpoint rule, and other coefficients.
        ImplicitRungeKutta(ImplicitTableau("implicit-midpoint", 1, ((0.75,),), (1.0,))),
    ],
    ids=["discrete gradient", "midpoint", "tableau"],
)
def test_the_residuals_of_a_method_of_ones_own_are_those_of_its_step(method: Integrator) -> None:
    torch.manual_seed(0)
    flow = FlowMap(NeuralHamiltonian(2, width=4), method, Structure("none", ("q", "p"), step=0.2)).double()
    x, h = torch.randn(4, 2, dtype=F64), torch.full((4, 1), 0.2, dtype=F64)
    y = flow(x, h).detach()
    assert training_residuals(flow)(flow, x, y, h).abs().max().item() < 1e-12


def test_residuals_are_in_the_units_of_the_map() -> None:
    flow = surrogate("symplectic")
    x, h = states(flow, 4), torch.tensor([[0.1], [0.2], [0.1], [0.05]], dtype=F64)
    y = x + 0.1
    flow.scale.fill_(4.0)
    wanted = (flow(x, h) - y) / 4
    assert torch.equal(training_residuals(flow)(flow, x, y, h), wanted)
    assert torch.equal(rollout_residuals(flow, x, y, h), wanted)


def test_samples_that_lie_close_together_do_not_set_the_unit_of_time() -> None:
    flow = build(Structure("none", ("a", "b")))
    x = torch.randn(10, 2, dtype=F64)
    y, h = x + 0.1 * torch.randn(10, 2, dtype=F64), torch.ones(10, dtype=F64)
    h[3] = 1e-9
    flow.adopt_units(x, y, h)
    wanted = flow.scale * h.square().mean().sqrt() / (y - x).square().mean().sqrt()
    assert float(flow.unit) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("unit", [1.0, 1e-9])
@pytest.mark.parametrize(("start", "odd"), [(0.1, False), (0.0, False), (0.0, True)])
def test_steps_from_one_state_take_the_size_from_both_ends(start: float, odd: bool, unit: float) -> None:
    """Half of the states lie at the centre, so that the size is that of the motion over √2."""
    x = torch.full((3, 1), start * unit, dtype=F64)
    y = x + unit * torch.tensor([[0.05], [0.1], [0.15]], dtype=F64)
    flow = build(Structure("none", ("q",), odd=odd))
    flow.adopt_units(x, y, torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    motion = float((y - x).square().mean().sqrt())
    assert float(flow.scale) == pytest.approx(motion / 2**0.5, rel=1e-9)
    assert float(flow.to_units(y).detach().abs().max()) < 3


def test_pairs_from_one_state_at_several_times_are_fitted() -> None:
    """Of three times 0.1 the mean is off by a rounding, which is no size to divide by."""
    h = torch.arange(1.0, 5.0, dtype=F64)
    x = torch.full((4, 1), 0.1, dtype=F64)
    config = FitConfig("none", width=2, adam_steps=5, finish_steps=2, max_minutes=None)
    fitted = run_stages(plan(Pairs(x, x + 0.05 * h[:, None], h, ("q",)), config), config)
    assert math.isfinite(fitted.history.loss)
    assert 0.01 < float(fitted.flow.scale) < 1


def test_the_noise_of_one_column_among_clean_ones_is_seen() -> None:
    t = torch.linspace(0, 40, 4001, dtype=F64)
    noisy = t.cos() + 0.05 * torch.randn(len(t), dtype=F64, generator=torch.Generator().manual_seed(0))
    log = Trajectories((t,), (torch.stack([t.cos(), t.sin(), noisy], 1),), ("a", "b", "c"))
    assert estimated_noise(log).level == pytest.approx(0.05 / float(noisy.std()) / 3**0.5, rel=0.15)


def test_the_noise_of_rounded_data_is_not_zero() -> None:
    """A jump by s leaves s·(1, −5, 10, −10, 5, −1)/√924 of the differences of order 6, the smallest estimate."""
    t = torch.arange(2000, dtype=F64)
    rounded = 0.1 * (t / 200).floor()
    wanted = 0.1 * math.sqrt(9 * 252 / 924 / 1994) / float(rounded.std())
    assert estimated_noise(Trajectories((t,), (rounded[:, None],), ("a",))).level == pytest.approx(wanted, rel=1e-6)


def oscillators(samples: int, step: float, noise: float = 0.0) -> Trajectories:
    """Thirty of them, each from another place."""
    t, generator = step * torch.arange(samples, dtype=F64), torch.Generator().manual_seed(0)
    found = []
    for k in range(30):
        x = (0.5 + 0.1 * k) * torch.stack([(t + k).cos(), -(t + k).sin()], dim=1)
        found.append(x + noise * torch.randn(x.shape, dtype=F64, generator=generator))
    return Trajectories((t,) * 30, tuple(found), ("q", "p"))


@pytest.mark.parametrize(("samples", "step"), [(4, 0.1), (6, 0.2)])
def test_short_clean_trajectories_are_not_taken_for_noisy(samples: int, step: float) -> None:
    data = oscillators(samples, step)
    assert estimated_noise(data).level > 1e-4
    planned, clean = (plan(data, FitConfig("symplectic", noise=noise)) for noise in ("auto", "no"))
    assert (planned.horizon, planned.noise.level, planned.structure) == (1, 0.0, clean.structure)
    (told,) = doubts(planned)
    assert told.startswith("No training trajectory has the 7 samples in a row that tell noise from curvature")
    assert doubts(clean) == []
    noisy = plan(data, FitConfig("symplectic", noise="yes"))
    assert noisy.horizon == samples - 1
    assert doubts(noisy) == []


def test_seven_samples_in_a_row_tell_noise_from_curvature() -> None:
    clean, noisy = (plan(oscillators(7, 0.1, noise), FitConfig("symplectic")) for noise in (0.0, 0.02))
    assert (clean.horizon, noisy.horizon) == (1, 6)
    assert doubts(clean) == doubts(noisy) == []


def test_no_noise_is_taken_at_its_word() -> None:
    assert plan(spirals(noise=0.02), FitConfig("none", noise="no")).noise == Noise((0.0, 0.0))
    assert plan(spirals(noise=0.02), FitConfig("none")).noise.level > 0.0


def test_steps_across_gaps_are_left_out_of_the_fit() -> None:
    whole = spirals(6)
    late = torch.arange(21) >= 10
    data = replace(whole, times=tuple(torch.where(late, t + 5, t) for t in whole.times))
    config = FitConfig("none", noise="no", width=2, substeps=1, adam_steps=2, finish_steps=1)
    planned = plan(data, config)
    assert len(planned.parts.train) == 4
    assert run_stages(planned, config).history.samples == 4 * 19
    (told,) = doubts(planned)
    assert told == (
        "4 of 80 training steps, 1 of 20 validation steps, 1 of 20 test steps take more than 5 times the usual 0.1: "
        "they are left out of the fit and of the errors of one step."
    )
    assert doubts(plan(whole, config)) == []
    several = FitConfig("none", noise="yes", width=2, substeps=1, adam_steps=2, finish_steps=1)
    assert run_stages(plan(data, several), several).stages["10 steps"].samples == 4  # one window of each later piece


def paused(data: Trajectories, k: int, factor: float, pause: float) -> Trajectories:
    """The spirals with one of them sampled at other times: all of its steps longer, and a pause in the middle."""
    t = factor * data.times[k] + pause * (torch.arange(21) >= 10)
    x = (0.5 + k) * torch.stack([t.cos(), -t.sin()], dim=1)
    times, states = list(data.times), list(data.states)
    times[k], states[k] = t, x
    return replace(data, times=tuple(times), states=tuple(states))


def test_a_pause_in_the_test_alone_spoils_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynablocks.fitting.report import measure

    (label,) = spirals(6).split(0.2, 0)[1].labels
    config = FitConfig("none", noise="no", width=2, substeps=1, adam_steps=2, finish_steps=1)
    fitted = run_stages(plan(paused(spirals(6), int(label), 1.0, 10.0), config), config)
    stepped = FlowMap.forward

    def refuse(self: FlowMap, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        if isinstance(step, Tensor) and float(step.max()) > 0.2:
            raise NotConverged("the step is not solved for 1 sample; take a smaller step.")
        return stepped(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", refuse)
    metrics = measure(fitted, 2).metrics
    x, y, h = fitted.plan.parts.test.pairs()
    short = h < 0.2
    assert int((~short).sum()) == 1
    error = float((fitted.flow(x[short], h[short]) - y[short]).detach().square().mean())
    motion = float((y - x)[short].square().mean())
    assert metrics["test_mse"] == pytest.approx(error, rel=1e-9)
    assert metrics["test_error_over_motion"] == pytest.approx(math.sqrt(error / motion), rel=1e-9)
    assert metrics["rollouts_ended_early"] == 0
    (told,) = metrics["doubts"]
    assert told.startswith("1 of 20 test steps take more than 5 times the usual 0.1: they are left out of the fit")


def test_errors_of_a_part_that_is_gaps_alone_are_of_them() -> None:
    (label,) = spirals(6).split(0.2, 0)[1].labels
    planned = plan(paused(spirals(6), int(label), 10.0, 0.0), FitConfig("none", noise="no"))
    (told,) = doubts(planned)
    assert told.startswith("20 of 20 test steps take more than 5 times the usual 0.1:")
    assert told.endswith("; the test has no others, and its error is of them.")
    assert usual_steps(planned.parts.test, planned.structure.step) is planned.parts.test


def test_a_rollout_crosses_a_gap_in_steps_like_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynablocks.fitting.report import _rollout_metrics

    flow = surrogate("symplectic")
    t = torch.tensor([0.0, 0.1, 0.4, 1.13, 1.23], dtype=F64)
    data = Trajectories((t,), (states(flow, 5),), flow.structure.names)
    steps = torch.tensor([0.1, 0.3, *[0.73 / 7] * 7, 0.1], dtype=F64)
    wanted = flow.rollout(data.states[0][:1], steps[None])[0, [0, 1, 2, 9, 10]]
    (whole,) = roll_out(flow, data)
    assert torch.equal(whole.times, t)
    assert torch.equal(whole.measured, data.states[0])
    assert torch.allclose(whole.predicted, wanted, rtol=1e-12, atol=1e-12)
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "MOST_ROLLED_STEPS", 5)
        (cut,) = roll_out(flow, data)
    assert torch.equal(cut.times, t[:3])
    assert torch.equal(cut.predicted, whole.predicted[:3])
    assert _rollout_metrics([cut], data, 1.0)["rollouts_cut"] == 1
    stepped, calls = FlowMap.forward, itertools.count()

    def refuse(self: FlowMap, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        if next(calls) == 5:
            raise NotConverged("the step is not solved for 1 sample; take a smaller step.")
        return stepped(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", refuse)
    (ended,) = roll_out(flow, data)
    assert ended.stopped is not None
    assert torch.equal(ended.times, t)
    assert torch.equal(ended.predicted, whole.predicted[:3])
    assert len(ended.errors) == 3


def test_data_without_gaps_is_left_as_it_is() -> None:
    data = spirals()
    assert data.without_gaps(0.5) is data
    assert data.without_gaps(0.05) is None
    x, y, h = data.pairs()
    h[3] = 9.0
    kept = Pairs(x, y, h, data.names).without_gaps(0.5)
    assert isinstance(kept, Pairs)
    assert torch.equal(kept.x, torch.cat([x[:3], x[4:]]))
    assert float(kept.h.max()) < 0.5
    assert kept.without_gaps(0.5) is kept
    assert kept.without_gaps(0.05) is None


def sums(left: float, noise: float = 0.0) -> Trajectories:
    """Two columns s and 1 − (1 − left)·s, whose sum moves by left · s."""
    t, generator = torch.linspace(0, 2, 41, dtype=F64), torch.Generator().manual_seed(0)
    found = []
    for k in range(5):
        s = 0.5 + 0.3 * (t + 1.01 * k).sin()  # of which no two have a step in common
        x = torch.stack([s, 1 - (1 - left) * s], dim=1)
        found.append(x + noise * torch.randn(x.shape, dtype=F64, generator=generator))
    return Trajectories((t,) * 5, tuple(found), ("a", "b"))


def test_data_that_does_not_keep_its_mass_is_told() -> None:
    assert doubts(plan(sums(0.0), FitConfig("mass"))) == []
    assert doubts(plan(sums(0.1), FitConfig("mass", weights=(0.9, 1.0)))) == []
    (told,) = doubts(plan(sums(0.1), FitConfig("mass")))
    share = 0.1 / math.sqrt(2 * (1 + 0.9**2))
    assert f"the weighted sum of the columns does not stay: along a trajectory it varies by {100 * share:.1f} %" in told
    assert "compare with --preserve none" in told
    assert doubts(plan(sums(0.1), FitConfig("none"))) == []
    assert doubts(plan(sums(0.0, 0.01), FitConfig("mass"))) == []
    assert len(doubts(plan(sums(0.0, 0.01), FitConfig("mass", noise="no")))) == 1


def test_the_noise_of_a_column_at_rest_hides_no_change_of_mass_or_norm() -> None:
    ellipses = replace(spirals(), states=tuple(x * torch.tensor([1.0, 0.5], dtype=F64) for x in spirals().states))
    for data, preserve, what in ((sums(0.1), "mass", "the columns"), (ellipses, "norm", "the norm of the state")):
        (told,) = doubts(plan(resting(data, 1e-6), FitConfig(preserve)))
        assert f"{what} does not stay: along a trajectory" in told
    for data, preserve in ((resting(sums(0.0), 0.01), "mass"), (spirals(noise=0.1), "norm")):
        assert doubts(plan(data, FitConfig(preserve))) == []
        assert len(doubts(plan(data, FitConfig(preserve, noise="no")))) == 1


def test_the_common_factor_of_weights_decides_nothing() -> None:
    fits = []
    for factor in (1.0, 2.0**40):
        config = FitConfig("mass", (factor, 2 * factor), noise="no", width=2, substeps=1, adam_steps=20, finish_steps=2)
        fits.append(run_stages(plan(spirals(), config), config))
    first, second = (fitted.flow for fitted in fits)
    assert first.structure == second.structure
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    (kept,) = second.properties
    assert kept == LinearInvariant((0.5, 1.0))
    assert fits[1].plan.told(kept) == f"LinearInvariant({2.0**40}, {2.0**41})"
    # The map of a stored structure is one of its own weights.
    stored = build(replace(second.structure, weights=(2.0**40, 2.0**41)))
    assert stored.properties.of(LinearInvariant) == LinearInvariant((2.0**40, 2.0**41))


@pytest.mark.parametrize("size", [1e-310, 1e-26, 0.7, 1.0, 1e30, 1.7e308])
def test_weights_of_any_size_are_taken_near_one(size: float) -> None:
    planned = plan(spirals(), FitConfig("mass", weights=(size, -size)))
    assert planned.weights == (size, -size)
    first, second = planned.structure.weights or ()
    assert 1 <= first < 2
    assert second == -first
    assert math.frexp(first)[0] == math.frexp(size)[0]


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ((0.0, 0.0), "must be linearly independent"),
        ((4.0, 0.0), r"weights are \(4\.0, 0\.0\); all must be nonzero"),
        ((4.0, math.nan), r"\(4\.0, nan\)\] are not vectors of 2 finite numbers"),
        ((4.0,), "--weights has 1 numbers; the file has 2 state columns"),
    ],
)
def test_weights_that_no_field_takes_are_named_as_they_were_given(weights: tuple[float, ...], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        plan(spirals(), FitConfig("mass", weights=weights))


@pytest.mark.parametrize(("scale", "unit"), [(1e-25, 1e-20), (1e25, 1e20)])
def test_a_learned_energy_in_float32_is_that_in_float64(scale: float, unit: float) -> None:
    """The square of such a scale is no number of float32."""
    flow = build(MAPS["energy"])
    flow.scale.fill_(scale)
    flow.unit.fill_(unit)
    x = scale * states(flow, 6)
    with torch.no_grad():
        wanted, narrow = flow.energy(x), copy.deepcopy(flow).float().energy(x.float())
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_pairs_that_do_not_keep_their_mass_or_norm_are_told() -> None:
    def pairs(data: Trajectories) -> Pairs:
        """Every other step, so that no pair follows another."""
        return Pairs(*(part[::2] for part in data.pairs()), data.names)

    assert doubts(plan(pairs(sums(0.0)), FitConfig("mass"))) == []
    (told,) = doubts(plan(pairs(sums(0.1)), FitConfig("mass")))
    share = 0.1 / math.sqrt(2 * (1 + 0.9**2))
    assert f"the weighted sum of the columns does not stay: from in to out it varies by {100 * share:.1f} %" in told
    assert doubts(plan(pairs(sums(0.1)), FitConfig("none"))) == []
    circles = spirals()
    assert doubts(plan(pairs(circles), FitConfig("norm"))) == []
    ellipses = replace(circles, states=tuple(x * torch.tensor([1.0, 0.5], dtype=F64) for x in circles.states))
    (told,) = doubts(plan(pairs(ellipses), FitConfig("norm")))
    assert "the norm of the state does not stay: from in to out" in told


def test_a_test_of_far_more_steps_than_the_training_is_told() -> None:
    t = torch.linspace(0, 20, 201, dtype=F64)
    x = torch.stack([t.cos(), -t.sin()], dim=1)
    data, seen = Trajectories((t, t[:6]), (x, x[:6]), ("q", "p")), set()
    for seed in range(16):
        planned = plan(data, FitConfig("none", seed=seed))
        large = len(planned.parts.test.times[0]) == 201
        said = [told.startswith("The training has 5 steps, the test 200:") for told in doubts(planned)]
        assert any(said) == large
        seen.add(large)
    assert seen == {True, False}


def test_columns_far_from_zero_are_told() -> None:
    circles = spirals()

    def moved(by: float) -> Trajectories:
        return replace(circles, states=tuple(x + torch.tensor([by, 0.0], dtype=F64) for x in circles.states))

    (told,) = doubts(plan(moved(-1e5), FitConfig("energy")))
    assert told.startswith("Far from 0, by more than 10000 times the size of the motion: q. Every step is rounded")
    assert doubts(plan(moved(-1e3), FitConfig("energy"))) == []
    assert doubts(plan(moved(-1e5), FitConfig("energy", odd=True))) == []  # which is not shifted


def test_data_that_does_not_keep_its_norm_is_told() -> None:
    circles = spirals()
    assert doubts(plan(circles, FitConfig("norm"))) == []
    ellipses = replace(circles, states=tuple(x * torch.tensor([1.0, 0.5], dtype=F64) for x in circles.states))
    (told,) = doubts(plan(ellipses, FitConfig("norm")))
    assert "the norm of the state does not stay" in told


def test_a_single_trajectory_is_told_and_two_are_not() -> None:
    (told,) = doubts(plan(spirals(1), FitConfig("none")))
    assert told.startswith("There is one trajectory:")
    assert doubts(plan(spirals(2), FitConfig("none"))) == []


def test_an_angle_that_wraps_is_told() -> None:
    t = torch.linspace(0, 20, 201, dtype=F64)
    wrapped = torch.remainder(t + math.pi, 2 * math.pi) - math.pi
    log = Trajectories((t,), (torch.stack([wrapped, t.cos()], 1),), ("theta", "c"))
    found = [told for told in doubts(plan(log, FitConfig("none"))) if "wraps" in told]
    assert len(found) == 1
    assert found[0].startswith("Column 'theta' jumps by 6.18: an angle that wraps?")
    assert found[0].endswith("; or a value that stands for a missing one: remove those rows.")
    straight = replace(log, states=(torch.stack([t, t.cos()], 1),))
    assert not [told for told in doubts(plan(straight, FitConfig("none"))) if "wraps" in told]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ("q1,p1,q2,p2", "q1,q2,p1,p2"),
        ("x_1,v_1,x_2,v_2,x_3,v_3", "x_1,x_2,x_3,v_1,v_2,v_3"),
        ("theta1,omega1,theta2,omega2", "theta1,theta2,omega1,omega2"),
        ("q1,q2,p1,p2", None),
        ("q,p", None),
        ("q1,p1", None),
        ("a1,a2,a3,a4", None),
        ("q1,p1,q2,p3", None),
        ("x,y,px,py", None),
        ("x,px,y,py", "x,y,px,py"),
        ("x,vx,y,vy,z,vz", "x,y,z,vx,vy,vz"),
        ("x,x_dot,y,y_dot", "x,y,x_dot,y_dot"),
        ("theta_1,d_theta_1,theta_2,d_theta_2", "theta_1,theta_2,d_theta_1,d_theta_2"),
        ("x,px,y,vy", None),
        ("px,x,py,y", None),
        ("x1,x10,x2,x20", None),
    ],
)
def test_positions_and_momenta_that_alternate_are_told(names: str, order: str | None) -> None:
    found = positions_first(names.split(","))
    assert found == (None if order is None else tuple(order.split(",")))


def test_test_steps_that_the_training_has_too_are_told() -> None:
    x, y, h = spirals().pairs()
    chained, apart = Pairs(x, y, h, ("q", "p")), Pairs(x[::2], y[::2], h[::2], ("q", "p"))
    twice = apart.take(torch.arange(len(apart)).repeat(2))
    for seed in range(4):
        planned = plan(chained, FitConfig("none", seed=seed))
        train, test = (list(zip(*part.pairs()[:2], strict=True)) for part in (planned.parts.train, planned.parts.test))
        shared = [any(torch.equal(a, d) or torch.equal(b, c) for c, d in train) for a, b in test]
        (told,) = doubts(planned)
        share = 100 * sum(shared) / len(shared)
        assert told.startswith(f"Of the test steps {share:.1f} % stand in the training, too, or end or begin where")
        assert told.endswith("Give the trajectories, and each row once.")
        assert doubts(plan(apart, FitConfig("none", seed=seed))) == []
        assert len(doubts(plan(twice, FitConfig("none", seed=seed)))) == 1


def test_a_trajectory_under_two_labels_is_told_and_rest_is_not() -> None:
    one, said = spirals(), set()
    for seed in range(8):
        planned = plan(Trajectories(2 * one.times, 2 * one.states, one.names), FitConfig("none", seed=seed))
        twins = {str((int(label) + 4) % 8) for label in planned.parts.test.labels}
        leaks = not twins.isdisjoint(planned.parts.train.labels)
        found = [told for told in doubts(planned) if told.startswith("Of the test steps")]
        assert len(found) == leaks
        assert all(told.endswith("under two labels? Leave one of them out.") for told in found)
        said.add(leaks)
    assert True in said
    t = torch.linspace(0, 2, 21, dtype=F64)
    ended = tuple((k + 1) * (1 - t).clamp_min(0)[:, None] for k in range(6))  # for half of the time at 0
    assert doubts(plan(Trajectories((t,) * 6, ended, ("c",)), FitConfig("none", noise="no"))) == []


EVEN = {
    "rounded": ([round(k / 30, 3) for k in range(61)], True),
    "rounded, since 1970": ([1.7e9 + round(k / 30, 3) for k in range(61)], True),
    "in milliseconds": ([float(round(1000 * k / 30)) for k in range(61)], True),
    "rounded, one left out": ([round(k / 30, 3) for k in range(61) if k != 20], True),
    "not rounded": ([k / 30 for k in range(61)], False),
    "tenths": ([0.1 * k for k in range(61)], False),
    "tenths, one left out": ([0.1 * k for k in range(61) if k != 20], False),
    "uneven tenths": ([0.1 * (3 * k + (k % 3 == 1)) for k in range(61)], False),
}


@pytest.mark.parametrize(("times", "told"), EVEN.values(), ids=EVEN)
def test_even_times_that_were_rounded_are_told(times: list[float], told: bool) -> None:
    t, angle = torch.tensor(times, dtype=F64), torch.linspace(0, 2, len(times), dtype=F64)
    states = tuple(r * torch.stack([angle.cos(), -angle.sin()], dim=1) for r in (1.0, 2.0))
    config = FitConfig("none", noise="no")
    found = [said for said in doubts(plan(Trajectories((t, t), states, ("q", "p")), config)) if "were rounded" in said]
    assert len(found) == told
    if times == EVEN["rounded"][0]:
        assert found[0].startswith(
            "Times are multiples of 0.001, and the steps between them 0.033 or 0.034, as of even times that were "
            "rounded: each step may be off by up to 0.03 of itself."
        )


def test_two_rates_of_measurement_are_not_taken_for_rounding() -> None:
    states = tuple(r * torch.linspace(1, 2, 31, dtype=F64)[:, None] for r in (1.0, 2.0, 3.0))
    times = tuple(h * torch.arange(31, dtype=F64) for h in (0.2, 0.3, 0.2))
    said = doubts(plan(Trajectories(times, states, ("q",)), FitConfig("none", noise="no")))
    assert not any("were rounded" in told for told in said)


def test_coarse_measurements_are_not_taken_for_repeated_ones() -> None:
    """A thermometer that shows tenths: most of its steps occur in every trajectory."""
    t = torch.linspace(0, 3, 61, dtype=F64)
    states = tuple((10 * (20 + r * torch.exp(-t))).round()[:, None] / 10 for r in (2.0, 2.2, 2.4, 2.6, 2.8, 3.0))
    said = doubts(plan(Trajectories((t,) * 6, states, ("c",)), FitConfig("none", noise="no")))
    assert not any(told.startswith("Of the test steps") for told in said)


def test_rollouts_of_long_trajectories_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynablocks.fitting.report import _rollout_metrics

    data = spirals()
    flow = surrogate("symplectic")
    whole = roll_out(flow, data)
    assert _rollout_metrics(whole, data, 1.0)["rollouts_cut"] == 0
    monkeypatch.setattr(rollout, "MOST_ROLLED_STEPS", 3)
    found = roll_out(flow, data)
    for short, long in zip(found, whole, strict=True):
        assert torch.equal(short.predicted, long.predicted[:4])
        assert torch.equal(short.times, long.times[:4])
        assert torch.equal(short.measured, long.measured[:4])
    metrics = _rollout_metrics(found, data, 1.0)
    assert (metrics["rollouts_cut"], metrics["rollout_steps"]) == (4, 3)
    assert metrics["rollout_time"] == pytest.approx(0.3)


def test_predicting_no_change_is_an_error_of_one_over_the_motion() -> None:
    from dynablocks.fitting.report import _over_motion, _rollout_metrics
    from dynablocks.fitting.rollout import Rollout

    x, y, h = spirals().pairs()
    held = float((x - y).square().mean())
    assert _over_motion(held, Pairs(x, y, h, ("q", "p"))) == 1.0
    assert _over_motion(0.0, Pairs(x, x, h, ("q", "p"))) is None
    resting = [Rollout(t, z, z[:1].expand(len(z), -1)) for t, z in zip(spirals().times, spirals().states, strict=True)]
    assert _rollout_metrics(resting, spirals(), 1.0)["rollout_error_over_motion"] == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("preserve", list(SURROGATES))
def test_rollouts_together_are_those_of_each_trajectory_alone(preserve: str) -> None:
    """Of several lengths and times, one with a gap."""
    flow = surrogate(preserve)
    x, lengths = states(flow, 12), (4, 2, 6, 3)
    times = [(0.1 + 0.02 * k) * torch.arange(length, dtype=F64) for k, length in enumerate(lengths)]
    times[2][-1] += 0.7
    measured = [x[k : k + length] for k, length in enumerate(lengths)]
    together = roll_out(flow, Trajectories(tuple(times), tuple(measured), flow.structure.names))
    for found, t, own in zip(together, times, measured, strict=True):
        (alone,) = roll_out(flow, Trajectories((t,), (own,), flow.structure.names))
        assert found.stopped == alone.stopped
        assert torch.equal(found.times, t)
        assert torch.equal(found.measured, own)
        assert torch.allclose(found.predicted, alone.predicted, rtol=1e-10, atol=1e-10)


def test_a_rollout_that_ends_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    t, reason = 0.2 * torch.arange(6, dtype=F64), "the step is not solved for 1 sample; take a smaller step."
    starts = torch.tensor([[1.0, 0.0], [-3.0, 4.0], [0.5, 0.0], [1.2, 1.0]], dtype=F64)
    data = Trajectories((t,) * 4, tuple(start.expand(6, -1) for start in starts), ("a", "b"))
    stepped = FlowMap.forward

    def refuse(self: FlowMap, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        if bool((x[:, 0] > 1.3).any()):
            raise NotConverged(reason if len(x) == 1 else "the steps are not solved for some samples.")
        return stepped(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", refuse)
    found = roll_out(growth(0.2), data)
    assert [run.stopped for run in found] == [reason, None, None, reason]
    for run, start, reached in zip(found, starts, (3, 6, 6, 2), strict=True):
        wanted = 1.2 ** torch.arange(reached, dtype=F64)[:, None] * start
        assert run.predicted.shape == wanted.shape
        assert torch.allclose(run.predicted, wanted, rtol=1e-13, atol=1e-13)


def test_a_rollout_that_leaves_the_numbers_ends_alone() -> None:
    t, one = 0.2 * torch.arange(6, dtype=F64), torch.ones(6, 2, dtype=F64)
    large, small = roll_out(growth(0.2), Trajectories((t, t), (1e308 * one, one), ("a", "b")))
    # 1.2³ < 1.797 < 1.2⁴.
    assert (large.stopped, len(large.predicted)) == (LEFT_NUMBERS, 4)
    assert (small.stopped, len(small.predicted)) == (None, 6)


@pytest.mark.parametrize(("most", "rows"), [(4096, [50] * 5), (20, [20] * 10 + [10] * 5)])
def test_rollouts_take_their_steps_together(most: int, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    flow, stepped = surrogate("symplectic"), FlowMap.forward
    batches: list[int] = []
    told: list[float] = []

    def counted(self: FlowMap, x: Tensor, step: Tensor | float | None = None) -> Tensor:
        batches.append(len(x))
        return stepped(self, x, step)

    monkeypatch.setattr(FlowMap, "forward", counted)
    monkeypatch.setattr(rollout, "MOST_ROLLED_STEPS", 5)
    monkeypatch.setattr(rollout, "SAMPLES_AT_ONCE", most)
    found = roll_out(flow, spirals(50), told.append)
    assert batches == rows
    assert {(len(run.predicted), run.cut) for run in found} == {(6, True)}
    assert told == pytest.approx([sum(rows[: k + 1]) / 250 for k in range(len(rows))], rel=1e-12)


def test_of_very_many_trajectories_some_are_rolled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynablocks.fitting.report import _rollout_metrics, _rollout_rows

    monkeypatch.setattr(rollout, "MOST_ROLLED_STATES", 100)
    data = replace(spirals(12), labels=tuple("abcdefghijkl"))
    found = roll_out(surrogate("symplectic"), data)
    assert [run.label for run in found] == ["a", "d", "g", "j"]  # of 20 steps each, and of every second it would be 120
    assert all(torch.equal(run.measured, data.states[3 * k]) for k, run in enumerate(found))
    metrics = _rollout_metrics(found, data, 1.0)
    assert (metrics["rollouts_left_out"], metrics["rollouts_cut"]) == (8, 0)
    assert next(_rollout_rows(metrics, ""))[2].endswith("; 8 more were not rolled out")
    assert len(roll_out(surrogate("symplectic"), spirals(1))) == 1


@pytest.mark.parametrize(
    ("start", "unit", "told"), [(0.0, 0.01, False), (1.7e9, 10.0, False), (1.7e9, 0.01, True), (-1.7e9, 0.01, True)]
)
def test_times_that_float64_knows_poorly_are_told(start: float, unit: float, told: bool) -> None:
    data = spirals()
    late = replace(data, times=tuple(start + unit * t for t in data.times))
    found = doubts(plan(late, FitConfig("none", noise="no")))
    assert len(found) == told
    if start > 0 and told:
        assert found[0].startswith(
            "Times reach 1700000000.02, where float64 rounds the time between two samples by up to 3.8e-07, and the "
            "usual one is 0.0009999: subtract the first time while they are still whole numbers or decimals"
        )


def test_times_that_were_stored_as_float32_are_told() -> None:
    data = replace(spirals(), times_stored_as=torch.float32)
    (found,) = doubts(plan(data, FitConfig("none", noise="no")))
    assert found.startswith("Times reach 2, where float32 rounds the time between two samples by up to 2.4e-07, and")
    assert found.endswith("save them as float64 where they are made; afterwards it mends nothing.")


def test_positions_alone_are_told_to_be_no_whole_state() -> None:
    from dynablocks.fitting.report import measure, warnings

    t = torch.linspace(0, 4 * math.pi, 101, dtype=F64)

    def velocity(q: Tensor) -> Tensor:
        return torch.from_numpy(np.gradient(q.numpy(), t.numpy(), edge_order=2))

    position = [(t + k).sin() for k in range(5)]
    whole = [torch.stack([q, velocity(q)], dim=1) for q in position]
    config = FitConfig("none", noise="no", width=2, substeps=1, adam_steps=60, finish_steps=12, max_minutes=None)
    progress: list[float] = []

    def measured(columns: list[Tensor], *names: str) -> dict[str, Any]:
        data = Trajectories((t,) * 5, tuple(columns), names)
        return measure(run_stages(plan(data, config), config), 4, progress.append).metrics

    alone = measured([q[:, None] for q in position], "q")
    assert 0.9 < alone["test_error_over_motion"] < 1.1
    cure = "or the columns are not a whole state (positions without velocities or momenta): append the rest."
    assert [told.endswith(cure) for told in warnings(alone) if "of the motion in a step" in told] == [True]
    assert progress == sorted(progress)
    assert any(0.2 < done < 0.4 for done in progress)
    assert any(0.4 < done < 0.9 for done in progress)
    both = measured(whole, "q", "v")
    assert both["test_error_over_motion"] < 0.5
    assert not [told for told in warnings(both) if "of the motion in a step" in told]


def test_steps_across_gaps_are_not_counted_among_those_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynablocks.fitting.commands import _reading
    from dynablocks.fitting.report import _data

    whole = spirals(6)
    late = torch.arange(21) >= 10
    data = replace(whole, times=tuple(torch.where(late, t + 5, t) for t in whole.times))
    planned = plan(data, FitConfig("none", noise="no"))
    outcome: Any = SimpleNamespace(fitted=SimpleNamespace(flow=build(planned.structure), plan=planned))
    # Four trajectories of 20 steps, one of each a gap.
    for most, told in ((78, False), (70, True)):
        for place in ("commands", "report"):
            monkeypatch.setattr(f"dynablocks.fitting.{place}.MOST_SAMPLES", most)
        assert ("70 of 76 training steps are used, evenly spaced" in _reading(planned, "a.csv")) == told
        assert ("80 steps, of which 70 are used, evenly spaced" in "".join(_data(outcome, {"file": "a.csv"}))) == told
        assert ("are used" in _reading(planned, "a.csv")) == told


@pytest.mark.parametrize("name", ["width", "seed", "adam_steps", "finish_steps", "substeps", "horizon"])
def test_counts_of_a_fit_are_whole_numbers(name: str) -> None:
    for wrong in (2.5, True):
        with pytest.raises(InvalidArgument, match=f"{name} is {wrong}; a whole number from"):
            FitConfig(**{name: wrong})
    found = getattr(FitConfig(**{name: np.int64(3)}), name)
    assert (type(found), found) == (int, 3)


@pytest.mark.parametrize("name", ["width", "substeps"])
def test_counts_of_a_structure_are_whole_numbers(name: str, tmp_path: Path) -> None:
    structure = Structure("none", ("a", "b"), width=3, substeps=2)
    for wrong in (2.5, True):
        with pytest.raises(InvalidArgument, match=f"{name} is {wrong}; a whole number from 1 to"):
            build(replace(structure, **{name: wrong}))
    flow = build(replace(structure, **{name: np.int64(2)}))
    save_fit(tmp_path / "fit", flow)
    assert load_fit(tmp_path / "fit").structure == flow.structure == replace(structure, **{name: 2})


def test_counts_of_least_squares_are_whole_numbers(tmp_path: Path) -> None:
    x, y = exponential_data()
    counts = {"adam_steps": 4, "batch_size": 8, "finish_steps": 1, "seed": 3}
    for name, wrong in itertools.product(counts, (2.5, True)):
        with pytest.raises(InvalidArgument, match=f"{name} is {wrong}; a whole number"):
            fit(Exponentials(), x, y, **(counts | {name: wrong}))
    first, again = Exponentials(), Exponentials()
    fit(first, x, y, checkpoint=tmp_path / "c.pt", **counts)
    # The checkpoint is one of the same fit.
    fit(again, x, y, checkpoint=tmp_path / "c.pt", **{name: np.int64(count) for name, count in counts.items()})
    assert torch.equal(first.theta, again.theta)


def test_home_is_a_place_for_fits_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    flow = surrogate("none")
    save_fit("~/fit", flow)
    assert torch.equal(load_fit("~/fit")(states(flow)), flow(states(flow)))
    fit(Exponentials(), *exponential_data(), adam_steps=1, finish_steps=0, checkpoint="~/c.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"fit", "c.pt"}


def test_the_names_of_stored_parameters_stay() -> None:
    """A fit that was stored holds them."""
    assert set(FreeField(2, 3).state_dict()) == {
        f"rate.{name}" for name in ("inner", "outer", "linear", "bias", "constant")
    }
    assert set(ProductionDestruction(2, 3).rates.state_dict()) == {"inner", "outer", "linear", "bias", "constant"}


def test_the_batch_of_a_step_is_its_part_of_the_order_of_its_epoch() -> None:
    samples, size, seed = 11, 4, 3
    batches = regression._Batches(samples, size, seed)
    for step in (0, 1, 2, 5, 4, 0, 100):
        epoch, position = divmod(step, samples // size)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(samples, generator=generator)
        assert torch.equal(batches.of(step), order[position * size : (position + 1) * size])
    assert regression._Batches(4, 4, seed).of(7) is None


def test_friction_is_found_whatever_the_mass_and_the_unit() -> None:
    """As docs/structured_dynamics.md has it; with q̇ = p in the map's own units the steps are not met."""
    torch.manual_seed(0)
    spring = torch.tensor([[0.0, 0.5], [-1.0, -0.3]], dtype=F64)
    x, h = 1e-3 * torch.randn(40, 2, dtype=F64), 0.02 + 0.06 * torch.rand(40, 1, dtype=F64)
    y = (torch.linalg.matrix_exp(h[:, :, None] * spring) @ x[:, :, None])[:, :, 0]

    def fitted(kinetic: LinearField | None, potential: nn.Module) -> tuple[float, float]:
        field = DampedHamiltonian(kinetic, potential)
        flow = FlowMap(field, integrator("strang"), Structure("none", ("q", "p"), step=0.05))
        flow.adopt_units(x, y, h)
        history = fit(flow, x, y, step=h, residuals=training_residuals(flow), adam_steps=0)
        return history.loss, field.damping.rate() / float(flow.unit)

    ridges = GradientField(Dense(1, 3), "tanh", expansive=True, alpha=1.0)
    loss, rate = fitted(LinearField(1, bias=True), PotentialSum(ridges, LinearField(1, bias=True)))
    assert loss < 1e-8
    assert rate == pytest.approx(0.3, abs=0.01)
    assert fitted(None, LinearField(1, bias=True))[0] > 1e-6
