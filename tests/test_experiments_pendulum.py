"""The pendulum's flow map at smoke size, and its data against oracles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from planted import built_store

from dynablocks.data.physics import integrate
from dynablocks.experiments import Scale, Store
from dynablocks.experiments.pendulum import (
    PendulumCell,
    PendulumFlowMap,
    energy,
    flow_map,
    orbit,
    properties,
    rollout,
    test_error,
)
from dynablocks.properties import Equivariant

SMOKE = Scale("smoke")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built_store(PendulumFlowMap(), tmp_path_factory.mktemp("cells"))


def test_the_data_keep_their_energy() -> None:
    assert float((energy(orbit(1000)) + 0.5).abs().max()) <= 1e-14


def test_the_data_have_the_period_4k() -> None:
    mpmath = pytest.importorskip("mpmath")
    period = 4 * mpmath.ellipk(mpmath.mpf("0.25"))
    assert float(period) == pytest.approx(6.7430014192503, abs=1e-12)
    states = orbit(1000)
    for k in (7, 40, 140, 999):
        time = mpmath.mpf(k) / 10 - 2 * period
        sn, cn = (mpmath.ellipfun(name, time, m=mpmath.mpf("0.25")) for name in ("sn", "cn"))
        expected = [float(2 * mpmath.asin(sn / 2)), float(cn)]
        assert states[k].tolist() == pytest.approx(expected, abs=1e-14)


def test_the_data_solve_the_equation() -> None:
    states = orbit(20)
    times = 0.1 * torch.arange(21, dtype=torch.float64)
    assert torch.allclose(integrate("pendulum", states[:1], times)[0], states, rtol=0, atol=1e-12)


def test_one_step_is_accurate_with_the_true_forces() -> None:
    from dynablocks.blocks import DynamicalBlock
    from dynablocks.experiments.drift import PendulumForce
    from dynablocks.fields import PartitionedField
    from dynablocks.switching.signals import FreeSignal

    block = DynamicalBlock(PartitionedField(None, PendulumForce()), "yoshida6", FreeSignal(0.1)).double()
    block.signal.steps.fill_(0.1)
    assert float((block(orbit(40)[:-1]) - orbit(40)[1:]).abs().max()) < 1e-8
    assert float((rollout(block, 50) - orbit(50)).abs().max()) < 1e-6


def test_the_test_error_is_that_of_a_hundred_pairs_after_those_of_the_training() -> None:
    """The identity errs by the orbit's own increments."""
    states = orbit(140)
    increments = [(states[k + 1] - states[k]).square().mean() for k in range(40, 140)]
    expected = float(torch.stack(increments).mean())
    assert test_error(torch.nn.Identity()) == pytest.approx(expected, rel=1e-14)
    every = float((states[1:] - states[:-1]).square().mean())
    assert abs(every - expected) > 1e-3 * expected


def test_only_the_odd_map_declares_and_has_the_symmetry() -> None:
    odd, plain = flow_map(True, 5, 0), flow_map(False, 5, 0)
    assert odd.properties.of(Equivariant) is not None
    assert plain.properties.of(Equivariant) is None
    x = orbit(5)
    assert properties(odd, x)["oddness"] <= 1e-15
    assert properties(plain, x)["oddness"] > 1e-4
    assert float(odd.signal.steps) == 0.1


def test_the_smoke_fit_learns(built: Store) -> None:
    for cell in PendulumFlowMap().cells(SMOKE):
        result = built.result(cell)
        assert result is not None
        assert result["train"] < 1e-6
        assert result["test"] < 1e-4
        assert result["parameters"] <= 500
        assert result["properties"]["Symplectic"] <= 1e-12


def test_the_result_is_a_function_of_the_settings(built: Store, tmp_path: Path) -> None:
    cell = PendulumFlowMap().cells(SMOKE)[0]
    other = Store(tmp_path)
    assert other.build(cell) == "built"
    first, second = ({k: v for k, v in (s.result(cell) or {}).items() if k != "seconds"} for s in (built, other))
    assert first == second


def test_presets() -> None:
    experiment = PendulumFlowMap()
    cells = {preset: experiment.cells(Scale(preset)) for preset in ("smoke", "cpu", "paper")}
    assert cells["cpu"] == cells["paper"]
    assert len(cells["cpu"]) == 10
    assert all(isinstance(cell, PendulumCell) for cell in cells["smoke"])


def test_table_figure_and_checks(built: Store) -> None:
    experiment = PendulumFlowMap()
    assert "odd field" in experiment.tables(SMOKE, built)
    assert len(experiment.figures(SMOKE, built)["pendulum"].axes) == 3
    verdicts = [check.verdict for check in experiment.checks(SMOKE, built)]
    assert verdicts == ["not compared"] * 3 + ["agrees"]
