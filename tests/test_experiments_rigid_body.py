"""The rigid body's flow map: every structure is kept by its own map and by no other, and the measures see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planted import Planted, built_store
from torch import Tensor

from dynablocks.data.physics import integrate
from dynablocks.data.systems import require_system
from dynablocks.experiments import Scale, Store
from dynablocks.experiments.drift import ROUNDING
from dynablocks.experiments.rigid_body import (
    EXACT,
    KINDS,
    SYSTEM,
    RigidBodyCell,
    RigidBodyFlowMap,
    pairs,
    rigid_body_figure,
    rolled_out,
)


def test_pairs_keep_what_the_body_keeps() -> None:
    x, y = pairs(20, 0)
    norms = x.norm(dim=1)
    assert 0.5 <= float(norms.min()) < float(norms.max()) <= 1.5
    for invariant in require_system(SYSTEM).invariants.values():
        assert float((invariant(x) - invariant(y)).abs().max()) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_each_map_keeps_its_own_structure_after_the_fit(kind: str, tmp_path: Path) -> None:
    cell = RigidBodyCell(kind, train=40, test=10, width=4, adam_steps=30, finish_steps=10, horizon=30)
    found = cell.build(tmp_path, Store(tmp_path))
    assert (found["determinant"] <= EXACT) == (kind == "volume")
    assert (found["norm"] <= EXACT) == (kind == "norm")
    assert ("learned" in found) == (kind == "energy")
    assert found.get("learned", 0.0) <= 30 * ROUNDING
    assert found["test"] < 1e-2


def test_the_test_is_of_the_last_pairs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their targets are moved by 10⁶, beside which the errors of a map that was not fitted are nothing."""

    def moved(count: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = pairs(count, seed)
        return x, torch.cat([y[:10], y[10:] + 1e6])

    monkeypatch.setattr("dynablocks.experiments.rigid_body.pairs", moved)
    cell = RigidBodyCell("none", train=10, test=5, width=2, adam_steps=0, finish_steps=0, horizon=2)
    assert cell.build(tmp_path, Store(tmp_path))["test"] == pytest.approx(1e12, rel=1e-3)


class Inflated:
    """The truth, 1 % too large all along."""

    def rollout(self, x: Tensor, steps: Tensor) -> Tensor:
        times = torch.cat([steps.new_zeros(1), steps[0].cumsum(0)])
        return 1.01 * integrate(SYSTEM, x, times)


def test_drifts_are_those_of_a_known_inflation() -> None:
    """‖y‖ grows by 1 %, the energy by 1.01² − 1, and on the unit sphere the mean square of an entry is 1/3."""
    found = rolled_out(Inflated(), 20)  # type: ignore[arg-type]
    assert found["norm"] == pytest.approx(0.01, rel=1e-9)
    assert found["energy"] == pytest.approx(0.0201, rel=1e-9)
    assert found["rollout"] == pytest.approx(1e-4 / 3, rel=1e-9)
    assert found["norms"] == pytest.approx([0.01] * 21, rel=1e-9)
    assert found["energies"] == pytest.approx([0.0201] * 21, rel=1e-9)
    assert "learned" not in found


def test_the_drift_of_a_learned_energy_is_absolute() -> None:
    """Of 100‖y‖², which a growth by 1 % changes by 2.01; of what sees no growth, nothing."""

    def drift(learned: Callable[[Tensor], Tensor]) -> float:
        return float(rolled_out(Inflated(), 20, learned)["learned"])  # type: ignore[arg-type]

    assert drift(lambda y: 100 * y.square().sum(1)) == pytest.approx(2.01, rel=1e-9)
    assert drift(lambda y: y[:, 0] * 0) == 0.0


def of_drifts(*drifts: float | None) -> Planted:
    """A store in which each run of one kind has kept its energy so far, or is older than that measure."""

    def result(cell: RigidBodyCell) -> dict[str, float]:
        drift = drifts[cell.run]
        found = {"test": 1.0, "rollout": 1.0, "energy": 1.0, "norm": 0.0, "determinant": 0.0}
        found |= {"seconds": 1.0, "parameters": 5}
        return found | ({} if drift is None or cell.preserve != "energy" else {"learned": drift})

    return Planted(result)


def test_a_learned_energy_that_was_not_measured_is_not_compared() -> None:
    def verdict(*drifts: float | None) -> str:
        checks = RigidBodyFlowMap().checks(Scale("cpu"), of_drifts(*drifts))
        return next(check.verdict for check in checks if check.what.startswith("energy: largest"))

    assert verdict(1e-10, 2e-10, 9e-10) == "agrees"
    assert verdict(1e-10, 2e-10, 1.1e-9) == "differs"
    assert verdict(1e-10, None, 2e-10) == verdict(None, None, None) == "not compared"
    for drifts, shown in (((None, None, None), False), ((1e-10, 2e-10, 3e-10), True)):
        table = RigidBodyFlowMap().tables(Scale("cpu"), of_drifts(*drifts))
        assert ("learned energy's drift" in table) == ("3.0e-10" in table) == shown


def test_the_rollouts_are_drawn_over_the_true_one() -> None:
    found = rolled_out(Inflated(), 20)  # type: ignore[arg-type]
    energy, norm, plane = rigid_body_figure({"volume": found, "none": found}).axes
    truth, first, second = plane.lines
    assert truth.get_label() == "the true path"
    start = torch.tensor(found["path"], dtype=torch.float64)[:1]
    exact = integrate(SYSTEM, start, torch.tensor(found["times"], dtype=torch.float64))[0]
    assert torch.allclose(torch.tensor(truth.get_xydata()), exact[:, :2], rtol=0, atol=1e-12)
    assert [line.get_color() for line in (first, second)] == [line.get_color() for line in energy.lines]
    assert len(norm.lines) == 2


def test_smoke_experiment(tmp_path: Path) -> None:
    experiment, scale = RigidBodyFlowMap(), Scale("smoke")
    store = built_store(experiment, tmp_path)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"agrees", "not compared"}
    assert "a learned energy" in experiment.tables(scale, store)
    assert set(experiment.figures(scale, store)) == {"rigid-body"}
    assert torch.tensor(store.result(experiment.cells(scale)[0])["path"]).shape == (21, 3)  # type: ignore[index]
