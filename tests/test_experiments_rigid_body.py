"""The rigid body's flow map: every structure is kept by its own map and by no other, and the measures see it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynablocks.data.physics import integrate
from dynablocks.data.systems import require_system
from dynablocks.experiments import Scale, Store
from dynablocks.experiments.rigid_body import EXACT, KINDS, SYSTEM, RigidBodyCell, RigidBodyFlowMap, pairs, rolled_out


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
    assert found["test"] < 1e-2


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


def test_smoke_experiment(tmp_path: Path) -> None:
    experiment, scale, store = RigidBodyFlowMap(), Scale("smoke"), Store(tmp_path)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"not run"}
    cells = experiment.cells(scale)
    assert [store.build(cell) for cell in cells] == ["built"] * len(cells)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"agrees", "not compared"}
    assert "a learned energy" in experiment.tables(scale, store)
    assert set(experiment.figures(scale, store)) == {"rigid-body"}
    assert torch.tensor(store.result(cells[0])["path"]).shape == (21, 3)  # type: ignore[index]
