"""What experiments of fits share: the settings of their cells stay as recorded, and only training data is fitted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynablocks.experiments import EXPERIMENTS, Scale, Store
from dynablocks.experiments.fitted import FittedCell, Samples, last_tenth

RECORDS = Path(__file__).parent.parent / "docs" / "results"


@pytest.mark.parametrize("name", ["fig6", "fig7", "fig8", "rigid-body", "embedding"])
def test_cells_are_those_of_the_results_in_the_docs(name: str) -> None:
    """Equal descriptions have equal keys, so that cells which were built once are found again."""
    recorded = json.loads((RECORDS / f"cpu-{name}.json").read_text(encoding="utf-8"))["cells"]
    wanted = [{key: cell[key] for key in ("kind", "version", "data", "settings")} for cell in recorded]
    cells = EXPERIMENTS[name]().cells(Scale("cpu"))
    assert [cell.description() for cell in cells] == wanted
    assert [cell.title for cell in cells] == [cell["title"] for cell in recorded]


@pytest.mark.parametrize("count", [1, 10, 19, 200])
def test_the_last_tenth_is_held_out(count: int) -> None:
    x = torch.arange(count)
    (first, first_values), (last, last_values) = last_tenth(x, 2 * x)
    assert torch.equal(torch.cat([first, last]), x)
    assert torch.equal(torch.cat([first_values, last_values]), 2 * x)
    assert len(last) == -(-count // 10)


@dataclass(frozen=True)
class CountingCell(FittedCell):
    """Its network remembers how much data it was fitted to, and the largest input."""

    def data(self) -> Samples:
        x = torch.arange(self.points, dtype=torch.float64)[:, None]
        return x, 2 * x

    def network(self) -> nn.Module:
        return nn.Identity()

    def fit(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        network.seen = (len(x), float(x.max()), float(y.max()))

    def measure(self, network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"seen": network.seen, "all": len(x)}


def test_the_first_samples_are_fitted_and_all_are_measured(tmp_path: Path) -> None:
    result = CountingCell(points=10, train=7).build(tmp_path, Store(tmp_path))
    assert (result["seen"], result["all"]) == ((7, 6.0, 12.0), 10)
    assert list(result) == ["seen", "all", "seconds", "processor_seconds"]


def test_runs_seeds_and_purposes_have_seeds_of_their_own() -> None:
    cells = [CountingCell(run=run, seed=seed) for run in range(3) for seed in range(2)]
    assert len({cell.mixed(purpose) for cell in cells for purpose in range(3)}) == 18
