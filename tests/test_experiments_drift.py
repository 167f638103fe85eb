"""Long runs: bounded energy errors of symplectic methods, against the drift of Runge–Kutta."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from planted import Planted

from dynablocks.experiments import Scale, Store
from dynablocks.experiments.drift import (
    BOUNDED,
    METHODS,
    PROBLEMS,
    ROUNDING,
    SIZE_LIMIT,
    SOLVED,
    STEPS,
    Drift,
    DriftCell,
    drift,
)
from dynablocks.integrators import exact_solution


def run(problem: str, method: str, steps: int) -> dict[str, float]:
    found: dict[str, float] = DriftCell(problem, method, steps).build(Path(), Store(Path()))
    return found


@pytest.mark.parametrize("problem", PROBLEMS)
def test_verlet_does_not_drift_and_runge_kutta_does(problem: str) -> None:
    assert run(problem, "verlet", 3000)["moved"] < 0.05
    assert run(problem, "rk4", 3000)["moved"] > 0.5
    assert run(problem, "euler", 3000)["largest"] > SIZE_LIMIT


def verdicts(preset: str, largest: float, moved: float) -> dict[str, str]:
    """What is said of each method on the first problem, where every run has this result."""
    checks = Drift().checks(Scale(preset), Planted(lambda cell: {"largest": largest, "moved": moved}))
    return dict(zip(METHODS, [check.verdict for check in checks], strict=False))


def test_the_bound_of_discrete_gradients_is_compared_at_any_length() -> None:
    limit = ROUNDING * STEPS["smoke"]
    for largest, moved, verdict in ((0.9 * limit, 0.75, "agrees"), (1.1 * limit, 0.0, "differs")):
        found = verdicts("smoke", largest, moved)
        assert {method for method in METHODS if found[method] != "not compared"} == set(SOLVED)
        assert {found[method] for method in SOLVED} == {verdict}


def test_long_runs_tell_drift_from_none() -> None:
    """Of a discrete gradient an error that stays, as that of a symplectic method does, is a wrong one, too."""
    still, moving = verdicts("cpu", 1e-3, 0.0), verdicts("cpu", 1e-3, 0.75)
    assert {method for method in METHODS if still[method] == "differs"} == {"rk4", "euler", *SOLVED}
    assert {method for method in METHODS if moving[method] == "agrees"} == {"rk4", "euler"}
    for largest, verdict in ((0.9, "agrees"), (1.1, "differs")):
        assert verdicts("cpu", largest * ROUNDING * STEPS["cpu"], 0.75)["gonzalez"] == verdict


def test_an_energy_error_that_is_large_all_along_is_no_bounded_one() -> None:
    found = verdicts("cpu", 2 * SIZE_LIMIT, 0.0)
    assert {method for method in METHODS if found[method] == "differs"} == set(BOUNDED)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_discrete_gradient_stays_within_its_bound(problem: str) -> None:
    assert run(problem, "gonzalez", 50)["largest"] <= ROUNDING * 50
    assert run(problem, "rk4", 50)["largest"] > ROUNDING * 50


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
