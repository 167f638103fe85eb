"""Long runs: bounded energy errors of symplectic methods, against the drift of Runge–Kutta."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dynablocks.experiments import Store
from dynablocks.experiments.drift import PROBLEMS, SIZE_LIMIT, DriftCell, drift
from dynablocks.integrators import exact_solution


def run(problem: str, method: str, steps: int) -> dict[str, float]:
    found: dict[str, float] = DriftCell(problem, method, steps).build(Path(), Store(Path()))
    return found


@pytest.mark.parametrize("problem", PROBLEMS)
def test_verlet_does_not_drift_and_runge_kutta_does(problem: str) -> None:
    assert run(problem, "verlet", 3000)["moved"] < 0.05
    assert run(problem, "rk4", 3000)["moved"] > 0.5
    assert run(problem, "euler", 3000)["largest"] > SIZE_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", ["verlet", "implicit-midpoint"])
def test_a_hundred_thousand_steps(problem: str, method: str) -> None:
    assert run(problem, method, 100_000)["moved"] < 0.05


def test_the_kepler_start_is_an_ellipse_of_period_two_pi() -> None:
    problem = PROBLEMS["kepler"]
    field, start = problem.field().double(), torch.tensor([problem.start], dtype=torch.float64)
    assert float(field.energy(start)) == pytest.approx(-0.5, abs=1e-15)
    assert torch.allclose(exact_solution(field, start, 2 * math.pi), start, rtol=0, atol=1e-9)


def test_a_slow_leak_is_seen() -> None:
    """The broken twin of the measure: a ramp under an oscillation of ten times its size a quarter."""
    assert drift([(e := math.sin(k) + 0.01 * k, e, e) for k in range(400)])["moved"] > 0.4
    assert drift([(e := math.sin(k), e, e) for k in range(400)])["moved"] < 0.02
