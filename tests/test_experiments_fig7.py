"""Figure 7: targets, networks, cells, table, figure and checks at smoke size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted, built_store

from dynablocks.errors import InvalidArgument
from dynablocks.experiments import Cell, Scale, Store
from dynablocks.experiments.fig7 import (
    FinishedRegressionCell,
    FlowRegression,
    PrintedRegressionCell,
    grid,
    measure,
    noisy_values,
    regression_figure,
    target,
)
from dynablocks.models.universal import FlowComposition, PairedFlows

SMOKE = Scale("smoke")
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built_store(FlowRegression(), tmp_path_factory.mktemp("cells"))


def test_targets_at_known_points() -> None:
    x = torch.tensor([[-2.0], [0.0], [math.pi]], dtype=torch.float64)
    expected = [6 - math.sin(2), 0.0, math.pi**2 + math.pi]
    assert target("f", x).flatten().tolist() == pytest.approx(expected, abs=1e-14)
    assert target("g", torch.tensor([[-5.0, 12.0]])).item() == 13
    with pytest.raises(InvalidArgument, match="target"):
        target("h", x)


def test_the_noise_is_as_stated_and_the_points_normal() -> None:
    x, y = noisy_values("g", 4000, 0.01, 3)
    noise = y - target("g", x)
    assert float(noise.std()) == pytest.approx(0.01, rel=5 / math.sqrt(8000))
    assert x.std(0).tolist() == pytest.approx([1, 1], rel=5 / math.sqrt(8000))
    assert torch.equal(noisy_values("g", 9, 0.0, 3)[1], target("g", noisy_values("g", 9, 0.0, 3)[0]))


@pytest.mark.parametrize(("keep_norm", "kept"), [(True, True), (False, False)])
def test_only_the_norm_preserving_step_keeps_the_norm(keep_norm: bool, kept: bool) -> None:
    network = FlowComposition(2, width=4, layers=1, sigma="relu", keep_norm=keep_norm, step=0.5)
    pair = network.parts[1]
    assert isinstance(pair, PairedFlows)
    z = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = pair.methods[1].step(pair.rotation, z, pair.signal.steps[0])
    drift = float((moved.norm(dim=1) / z.norm(dim=1) - 1).abs().max())
    assert (drift <= 8 * EPS) == kept
    assert not torch.allclose(moved, z)


def test_both_steps_of_a_pair_use_one_step_size() -> None:
    pair = FlowComposition(1, width=3, layers=1, keep_norm=False, step=None, seed=1).parts[1]
    assert isinstance(pair, PairedFlows)
    assert sum(p.numel() for p in pair.signal.parameters()) == 1
    with torch.no_grad():
        pair.signal.steps.zero_()
    z = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(pair(z), z)


def test_the_papers_network_has_the_size_of_the_released_code() -> None:
    network = PrintedRegressionCell("f").network()
    pairs = [part for part in network.parts if isinstance(part, PairedFlows)]
    assert len(pairs) == 6
    assert {pair.gradient.linear.out_shape for pair in pairs} == {(10,)}


def test_the_grid_is_that_of_the_figure() -> None:
    assert (grid("f").min().item(), grid("f").max().item()) == (-3, 3)
    assert grid("g").shape == (3721, 2)
    assert float(grid("g").abs().max()) == 2


def test_measured_errors_are_those_of_the_target_without_noise() -> None:
    class Shifted(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return target("g", x) + 0.25

    found = measure(Shifted(), "g", torch.randn(5, 2, dtype=torch.float64))
    assert (found["sup"], found["mean"], found["test_mse"]) == pytest.approx((0.25, 0.25, 0.0625))


def test_the_last_points_alone_are_the_test() -> None:
    class Steep(torch.nn.Module):
        """It errs by x."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return target("f", x) + x

    x = torch.tensor([[1.0]] * 7 + [[2.0]] * 3, dtype=torch.float64)
    found = PrintedRegressionCell("f", points=10, train=7).measure(Steep(), x, target("f", x))
    assert found["test_mse"] == pytest.approx(4.0, rel=1e-12)


def test_the_finish_is_far_better_than_adam_alone(built: Store) -> None:
    cell = FinishedRegressionCell("f", points=400, train=360, width=4, layers=1, adam_steps=50, finish_steps=25)
    result = cell.build(Path(), built)
    network = cell.network()
    start = measure(network, "f", torch.zeros(1, 1, dtype=torch.float64))
    assert result["mean"] < 0.05 * start["mean"]


def test_results_are_functions_of_the_settings(tmp_path: Path, built: Store) -> None:
    for cell in FlowRegression().cells(SMOKE):
        again, before = cell.build(tmp_path, built), built.result(cell)
        assert before is not None
        timed = ("seconds", "processor_seconds")
        assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in before.items() if k not in timed}


def test_both_networks_see_the_same_data() -> None:
    assert PrintedRegressionCell("f", run=2).mixed(0) == FinishedRegressionCell("f", run=2).mixed(0)
    assert len({PrintedRegressionCell("f", run=run).mixed(purpose) for run in range(3) for purpose in range(3)}) == 9


def test_cpu_and_paper_share_their_cells() -> None:
    keys = [[cell.key for cell in FlowRegression().cells(Scale(preset))] for preset in ("cpu", "paper", "smoke")]
    assert keys[0] == keys[1]
    assert len(keys[0]) == len(set(keys[0])) == 20
    assert not set(keys[2]) & set(keys[0])


def test_table_figure_and_checks(built: Store) -> None:
    experiment = FlowRegression()
    assert "not run" not in experiment.tables(SMOKE, built)
    figure = experiment.figures(SMOKE, built)["fig7"]
    assert len(figure.axes) == 6
    figure.canvas.draw()
    assert {check.verdict for check in experiment.checks(SMOKE, built)} == {"not compared"}


def test_both_maps_of_errors_have_one_scale() -> None:
    """That of the larger error."""
    truth = target("g", grid("g")).flatten()
    shifts = {PrintedRegressionCell.name: 0.5, FinishedRegressionCell.name: -0.125}
    drawn = regression_figure({("g", name): truth + shift for name, shift in shifts.items()}).axes
    scales = [image.get_clim() for axes in drawn for image in axes.images]
    assert scales == [(0.0, pytest.approx(0.5, rel=1e-12))] * 2


def test_checks_compare_with_the_noise_and_the_papers_network() -> None:
    def verdicts(printed: float, finished: float) -> list[str]:
        errors = {PrintedRegressionCell: printed, FinishedRegressionCell: finished}

        def result(cell: Cell) -> dict[str, Any]:
            error = errors[type(cell)]  # type: ignore[index]
            return {"sup": error, "mean": error, "test_mse": 0, "parameters": 1, "seconds": 1, "processor_seconds": 1}

        checks = FlowRegression().checks(Scale("cpu"), Planted(result))
        return [check.verdict for check in checks[:3]]

    assert verdicts(0.04, 0.005) == ["agrees", "agrees", "agrees"]
    assert verdicts(0.001, 0.005) == ["agrees", "differs", "agrees"]
    assert verdicts(0.04, 0.03) == ["differs", "agrees", "agrees"]
    # A worse reproduction is an easier rival, but differs itself.
    assert verdicts(0.1, 0.05) == ["differs", "agrees", "differs"]
