"""Energy-preserving learning: the data are those published, the fit finds what is there, and the verdicts follow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Planted
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.experiments import Scale, Store
from dynablocks.experiments.energy import (
    CLAIMED,
    NAMES,
    PUBLISHED,
    Energy,
    LearningCell,
    PublishedCell,
    best_published,
    judged,
)
from dynablocks.experiments.energy_data import BODIES, NOISE, learning_data, learning_system, solutions
from dynablocks.experiments.energy_models import HAMILTONIANS, Relative, RolloutMap, fit_noisy, hamiltonian_model
from dynablocks.fields.hamiltonian import SeparableHamiltonian
from dynablocks.fields.symmetric import LinearField, ridge_energy


def rotated(starts: Tensor, times: Tensor) -> Tensor:
    """The spring's solution: H = q² + p² turns (q, p) with speed 2."""
    q, p = starts[:, :1], starts[:, 1:]
    cos, sin = (2 * times).cos(), (2 * times).sin()
    return torch.stack([q * cos + p * sin, p * cos - q * sin], dim=2)


def spring(stiffness: float = 2.0) -> SeparableHamiltonian:
    field = SeparableHamiltonian(LinearField(1), LinearField(1)).double()
    with torch.no_grad():
        for parameter, value in zip(field.parameters(), (stiffness, 2.0), strict=True):
            parameter.fill_(value)
    return field


@pytest.mark.parametrize("name", NAMES)
def test_solutions_keep_the_energy(name: str) -> None:
    system = learning_system(name)
    random = np.random.RandomState(3)
    starts = torch.from_numpy(np.stack([system.draw(random) for _ in range(5)]))
    states = solutions(system, starts)
    energies = system.energy(states)
    assert float((energies - energies[:, :1]).abs().max()) < 1e-8
    assert states.shape == (5, len(system.times), system.dimension)
    slopes = (solutions(system, starts, torch.tensor([0.0, 1e-5]))[:, 1] - starts) / 1e-5
    assert torch.allclose(slopes, system.slope(starts), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_slopes_are_hamiltonian(name: str) -> None:
    system = learning_system(name)
    random = np.random.RandomState(4)
    x = torch.from_numpy(np.stack([system.draw(random) for _ in range(5)])).requires_grad_()
    (gradient,) = torch.autograd.grad(system.energy(x).sum(), x)
    half = system.dimension // 2
    assert torch.allclose(
        system.slope(x.detach()), torch.cat([gradient[:, half:], -gradient[:, :half]], 1), rtol=0, atol=1e-12
    )


def test_spring_data_are_drawn_as_published() -> None:
    """The public generator, written out: seed, start, radius, then the noise of q and of p, for 50 trajectories."""
    data, random = learning_data("spring", seed=7), np.random.RandomState(7)
    times = np.linspace(0, 20, 100)
    for k in range(50):
        start = random.rand(2) * 2 - 1
        radius = random.rand() * 0.9 + 0.1
        start = start / np.sqrt((start**2).sum()) * radius
        exact = rotated(torch.from_numpy(start)[None], torch.from_numpy(times))[0]
        noise = np.stack([random.randn(100) * 0.1, random.randn(100) * 0.1], axis=1)
        given = data.train[k] if k < 25 else data.test[k - 25]
        assert torch.allclose(given, exact + torch.from_numpy(noise), rtol=0, atol=1e-8)


def test_statistics_of_the_data_are_those_published() -> None:
    data = learning_data("spring", seed=0)
    assert data.train.shape == data.test.shape == (25, 100, 2)
    assert data.rollouts.shape == (15, 100, 2)
    exact = torch.stack([-data.test_slopes[..., 1], data.test_slopes[..., 0]], dim=2) / 2
    deviations = data.test - exact
    assert float(deviations.std()) == pytest.approx(NOISE, rel=0.05)
    assert abs(float(deviations.mean())) < 4 * NOISE / math.sqrt(5000)
    assert not torch.equal(learning_data("spring", seed=1).train, data.train)
    random = np.random.RandomState(0)
    for name, low, high in (("spring", 0.1, 1.0), ("pendulum", 1.3, 2.3)):
        system = learning_system(name)
        radii = np.array([np.linalg.norm(system.draw(random)) for _ in range(400)])
        assert low <= radii.min() < low + 0.02
        assert high - 0.02 < radii.max() <= high
        inside = np.abs([system.draw_rollout(random) for _ in range(400)])
        assert 0.2 <= inside.min() < 0.21
        assert 0.99 < inside.max() <= 1.0


def test_bodies_are_opposite_on_nearly_circular_orbits() -> None:
    random = np.random.RandomState(0)
    starts = torch.from_numpy(np.stack([learning_system("two-body").draw(random) for _ in range(2000)]))
    assert torch.equal(starts[:, ::2], -starts[:, 1::2])
    place, speed = starts[:, 0:4:2], starts[:, 4::2]
    assert float((place * speed).sum(1).abs().max()) < 1e-15
    circular = 2 * speed.norm(dim=1) * place.norm(dim=1).sqrt()
    assert float(circular.mean()) == pytest.approx(1.0, abs=0.005)
    assert float(circular.std()) == pytest.approx(0.05, rel=0.1)
    assert 0.5 <= float(place.min()) < float(place.max()) <= 1.5


def test_bodies_for_training_are_not_those_of_the_test() -> None:
    """The first 200 starts are for the test, however few of them are used."""
    system, random = learning_system("two-body"), np.random.RandomState(3)
    starts = torch.from_numpy(np.stack([system.draw(random) for _ in range(BODIES)]))
    data = learning_data("two-body", seed=3, trajectories=2)
    torch.testing.assert_close(data.train[:, 0], starts[200:202], rtol=0, atol=1e-14)
    torch.testing.assert_close(data.test[:, 0], starts[:2], rtol=0, atol=1e-14)
    assert float((starts[200:202] - starts[:2]).abs().amax(1).min()) > 1e-3


def test_unknown_names_are_explained() -> None:
    with pytest.raises(InvalidArgument, match="pendulum"):
        learning_data("pendelum")
    with pytest.raises(InvalidArgument, match="seed is 5000000000"):
        learning_data("spring", seed=5_000_000_000)
    with pytest.raises(InvalidArgument, match="separable"):
        hamiltonian_model("seperable", 2, 3)


@pytest.mark.parametrize("model", HAMILTONIANS)
def test_every_model_is_the_field_of_its_energy(model: str) -> None:
    dimension = 8 if model == "relative" else 2
    field = hamiltonian_model(model, dimension, 3)
    x = torch.randn(4, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(field.energy(x).sum(), x)
    half = dimension // 2
    assert torch.allclose(field(x), torch.cat([gradient[:, half:], -gradient[:, :half]], dim=1), rtol=0, atol=1e-12)
    if model == "even":
        assert torch.equal(field(-x), -field(x))


def test_relative_forces_add_up_to_nothing_and_do_not_see_translations() -> None:
    force = Relative(ridge_energy(2, 3)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    pushes = force(x)
    assert float((pushes[:, ::2] + pushes[:, 1::2]).abs().max()) == 0.0
    assert torch.allclose(force(x + torch.tensor([3.0, 3.0, -1.0, -1.0])), pushes, rtol=0, atol=1e-12)


def test_noisy_trajectories_give_the_spring_back() -> None:
    times = torch.arange(20, dtype=torch.float64) * 0.2
    generator = torch.Generator().manual_seed(0)
    starts = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    clean = rotated(starts, times)
    noisy = clean + 0.01 * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
    field = spring(1.8)
    misfit = fit_noisy(RolloutMap(field, 0.2, 20, 8, noisy[:, 0]), noisy, noise=0.01, steps=8)
    # 160 measurements, 10 unknowns: expect 0.94 ± 0.11.
    assert 0.6 < misfit < 1.3
    with torch.no_grad():
        assert torch.allclose(
            field(torch.eye(2, dtype=torch.float64)).abs().sum(1), torch.full((2,), 2.0).double(), rtol=0, atol=0.02
        )


def test_the_metric_is_zero_for_the_truth_and_sees_a_wrong_spring() -> None:
    data = learning_data("spring", seed=0)
    truth = judged(learning_system("spring"), spring(), data, 64)
    wrong = judged(learning_system("spring"), spring(2.2), data, 64)
    assert truth["published"] < 1e-6
    assert truth["derivative"] == pytest.approx(4 * NOISE**2, rel=0.05)
    # q² + ap² for a = 1/1.1 is kept, so q² + p² swings by up to a tenth of p².
    assert 1e-4 < wrong["published"] < 1e-1
    # The same sums, which a processor may add in another order.
    assert wrong["published"] == pytest.approx(wrong["energy"], rel=1e-13)


def test_the_published_metric_is_of_squares_and_of_two_bodies_of_their_energy() -> None:
    for name in ("spring", "pendulum"):
        assert learning_system(name).measured(torch.tensor([[3.0, 4.0]])).item() == 25
    # Two apart, with kinetic energy 1/4.
    bodies = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.5, -0.5]], dtype=torch.float64)
    assert learning_system("two-body").measured(bodies).item() == -0.25


def test_published_figures() -> None:
    assert best_published("spring") == ("DGNet, dopri5", 6.16e-4)
    assert best_published("pendulum")[1] == 1.08e-2
    assert best_published("two-body") == ("SRNN, leapfrog", 4.04e-5)
    assert all(set(row) == {"model", *NAMES} for row in PUBLISHED)


@pytest.mark.parametrize("system", NAMES)
def test_published_training_runs(system: str, tmp_path: Path) -> None:
    result = PublishedCell(system, width=4, steps=3, trajectories=2).build(tmp_path, Store(tmp_path))
    assert all(math.isfinite(value) for value in (*result["losses"], result["published"]))


def test_smoke_experiment(tmp_path: Path) -> None:
    experiment, scale, store = Energy(), Scale("smoke"), Store(tmp_path)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"not run"}
    assert "6.16e-04" in experiment.tables(scale, store)
    cells = experiment.cells(scale)
    assert [store.build(cell) for cell in cells] == ["built"] * len(cells)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"not compared"}
    assert HAMILTONIANS[CLAIMED["pendulum"]] in experiment.tables(scale, store)
    assert set(experiment.figures(scale, store)) == {"energy", "energy_phase"}
    again = cells[0].build(tmp_path, store)
    assert again == store.result(cells[0])


def test_verdicts_follow_the_best_published_figure() -> None:
    def verdicts(figure: float) -> list[str]:
        result = {"published": figure, "energy": 0.0, "derivative": 0.0, "unknowns": 1}
        return [check.verdict for check in Energy().checks(Scale("cpu"), Planted(lambda cell: result))]

    assert verdicts(1e-6) == ["agrees"] * 6
    assert verdicts(5e-4) == ["agrees", "differs", "agrees", "agrees", "differs", "differs"]
    assert verdicts(2e-2) == ["differs"] * 6


def test_a_mean_over_some_of_the_seeds_is_no_figure() -> None:
    """One that lacks a seed would stand unmarked beside the others, and beside the published ones."""
    result = {"published": 1.5e-6, "energy": 0.0, "derivative": 0.0, "unknowns": 1}

    def figures(*lacking: int) -> list[str]:
        def results(cell: LearningCell) -> dict[str, float] | None:
            return None if cell.system == "spring" and cell.seed in lacking else result

        table = Energy().tables(Scale("cpu"), Planted(results))
        line = next(line for line in table.splitlines() if line.startswith(f"| {HAMILTONIANS['separable']} "))
        return [cell.strip() for cell in line.split("|")[2:-1]]

    assert figures() == ["here", "1.50e-06", "1.50e-06", "—"]
    assert figures(3) == ["here", "—", "1.50e-06", "—"]
