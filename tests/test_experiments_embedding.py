"""The Hamiltonian embedding: the measure sees a broken twin, and the plane's symplectic maps cannot contract."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from planted import Planted, built_store
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.experiments import Scale, Store
from dynablocks.experiments.embedding import (
    DAMPING,
    METHODS,
    NETWORKS,
    ROLLOUT,
    STEP,
    SYMPLECTIC,
    DampedCell,
    Embedding,
    EmbeddingCell,
    damped,
    damped_pairs,
    network,
    rollout_start,
    symplecticity,
)
from dynablocks.integrators import exact_solution
from dynablocks.properties.jacobians import jacobians


@pytest.mark.parametrize("method", METHODS)
def test_the_embedded_step_is_the_step_of_f(method: str, tmp_path: Path) -> None:
    found = EmbeddingCell("lotka-volterra", method, 3).build(tmp_path, Store(tmp_path))
    assert found["gap"] <= 1e-14
    assert found["momentum"] == 0
    assert (found["symplectic"] <= 1e-12) == (method in SYMPLECTIC)


def test_symplecticity_of_known_maps() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    shear = torch.tensor([[1.0, 3.0], [0.0, 1.0]], dtype=torch.float64)
    assert symplecticity(lambda z: z @ shear.mT, x) < 1e-15
    assert symplecticity(lambda z: 0.5 * z, x) == pytest.approx(0.75)


def test_the_damped_pendulum_contracts_areas() -> None:
    step, x = 1e-3, damped_pairs(4, 0)[0]
    logs = torch.linalg.slogdet(torch.eye(2) + step * jacobians(damped, x)).logabsdet
    assert float((logs / step + DAMPING).abs().max()) < 2 * step
    assert math.exp(-DAMPING * STEP) == pytest.approx(0.9048, abs=1e-4)


def test_networks_of_the_plane_keep_areas_and_lifted_ones_need_not() -> None:
    torch.manual_seed(0)
    x = damped_pairs(3, 0)[0]
    areas = {kind: torch.linalg.det(jacobians(network(kind, 3), x)) for kind in NETWORKS}
    assert float((areas["plane"] - 1).abs().max()) < 1e-13
    assert all(float((areas[kind] - 1).abs().max()) > 1e-4 for kind in ("embedded", "sympnet"))
    with pytest.raises(InvalidArgument, match="sympnet"):
        network("sympnets", 3)


def test_only_the_embedding_learns_it(tmp_path: Path) -> None:
    errors = {}
    for kind in ("plane", "embedded"):
        cell = DampedCell(kind, train=60, test=20, width=8, adam_steps=50, finish_steps=15)
        errors[kind] = cell.build(tmp_path, Store(tmp_path))["test"]
    assert errors["embedded"] < 1e-3 * errors["plane"]


def test_the_test_is_of_the_last_pairs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their targets are moved by 10⁶, beside which the errors of a map that was not fitted are nothing."""

    def moved(count: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = damped_pairs(count, seed)
        return x, torch.cat([y[:10], y[10:] + 1e6])

    monkeypatch.setattr("dynablocks.experiments.embedding.damped_pairs", moved)
    cell = DampedCell("plane", train=10, test=5, width=2, adam_steps=0, finish_steps=0)
    assert cell.build(tmp_path, Store(tmp_path))["test"] == pytest.approx(1e12, rel=1e-3)


def reach(z: Tensor) -> float:
    """The largest entry along the true paths of rollouts, without its sign."""
    largest = float(z.abs().max())
    for _ in range(ROLLOUT):
        z = exact_solution(damped, z, STEP)
        largest = max(largest, float(z.abs().max()))
    return largest


def test_the_true_path_of_a_rollout_stays_among_the_training_data() -> None:
    starts = torch.cat([rollout_start(DampedCell("plane", seed=seed).mixed(0)) for seed in range(10)])
    assert len(starts.unique(dim=0)) == 10
    assert float(starts.abs().max()) <= 1
    assert float(damped_pairs(200, 0)[0].abs().max()) == pytest.approx(2, abs=0.05)
    side = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert reach(torch.cat([starts, torch.cartesian_prod(side, side)])) < 1.54
    # From a corner of the data it turns over.
    assert reach(torch.tensor([[1.9, 1.95]], dtype=torch.float64)) > 6


def test_a_run_that_ends_far_away_is_shown_beside_the_median() -> None:
    tests, rollouts = [2e-9, 1e-9, 3e-9], [1e-8, 4e4, 2e-8]

    def result(cell: EmbeddingCell | DampedCell) -> dict[str, float] | None:
        if not isinstance(cell, DampedCell):
            return None
        errors = {"test": tests[cell.run], "rollout": rollouts[cell.run]}
        return errors | {"area": 1.0, "parameters": 5, "seconds": 1.0}

    table = Embedding().tables(Scale("cpu"), Planted(result))
    assert table.count("| 2.0e-09 | 3.0e-09 | 2.0e-08 | 4.0e+04 |") == len(NETWORKS)


def test_smoke_experiment(tmp_path: Path) -> None:
    experiment, scale = Embedding(), Scale("smoke")
    store = built_store(experiment, tmp_path)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"agrees", "not compared"}
    assert NETWORKS["embedded"] in experiment.tables(scale, store)
    (cell,) = experiment.groups(scale)["embedded"]
    result = store.result(cell)
    assert result is not None
    start = rollout_start(cell.mixed(0))[0].tolist()
    assert result["path"][0] == result["true_path"][0] == start
    assert len(result["path"]) == len(result["true_path"]) == ROLLOUT + 1
    ends = torch.tensor([result["path"][-1], result["true_path"][-1]], dtype=torch.float64)
    assert result["rollout"] == pytest.approx(float(ends.diff(dim=0).square().mean()), rel=1e-9)
    figures = experiment.figures(scale, store)
    assert set(figures) == {"embedding"}
    for axes in figures["embedding"].axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["truth", "network"]
