"""Figure 6: data, networks, cells, table, figure and checks at smoke size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import Planted, built_store

from dynablocks.blocks import DynamicalBlock
from dynablocks.data.physics import integrate
from dynablocks.errors import InvalidArgument
from dynablocks.experiments import Scale, Store
from dynablocks.experiments.fig6 import (
    MSE_LIMIT,
    SirFieldCell,
    SirFlowMap,
    SirPrintedCell,
    field_network,
    measure,
    printed_network,
    sir_pairs,
)
from dynablocks.experiments.fitted import AdamTraining
from dynablocks.properties import LinearInvariant, declare, verify

SMOKE = Scale("smoke")
EPS = torch.finfo(torch.float64).eps


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built_store(SirFlowMap(), tmp_path_factory.mktemp("cells"))


@pytest.mark.parametrize("starts", ["cube", "simplex"])
def test_pairs_are_of_the_sir_flow(starts: str) -> None:
    x, y = sir_pairs(starts, 4, 0)
    assert float((x.sum(1) - 1).abs().max()) <= 4 * EPS
    state = x
    for _ in range(400):  # Kutta's method with h = 1/400: error about h⁴ = 4e-11.
        state = kutta_step(state, 1 / 400)
    assert float((state - y).abs().max()) < 1e-11
    assert not torch.equal(x, sir_pairs(starts, 4, 1)[0])


def kutta_step(x: torch.Tensor, h: float) -> torch.Tensor:
    def slope(z: torch.Tensor) -> torch.Tensor:
        s, i, _ = z.unbind(1)
        return torch.stack([-s * i, s * i - i, i], dim=1)

    a = slope(x)
    b = slope(x + h / 2 * a)
    c = slope(x + h / 2 * b)
    return x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c))


def test_unknown_starts_are_named() -> None:
    with pytest.raises(InvalidArgument, match="simplex"):
        sir_pairs("ball", 4, 0)


def test_both_networks_keep_mass_whatever_their_weights() -> None:
    x = torch.rand(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for network in (field_network(10, 4, 0.5, 0), printed_network(10, 0)):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            y = network(x)
        assert float((y - x[:, :3]).abs().max()) > 1e-3
        size = float(y.abs().max()) + 1
        assert float((y.sum(1) - x.sum(1)).abs().max()) <= 200 * EPS * size


def test_the_papers_network_has_three_blocks_of_three_layers() -> None:
    network = printed_network(50, 0)
    assert sum(isinstance(part, DynamicalBlock) for part in network.modules()) == 9
    # Of a layer on n entries: C, b, B of n(n − 1)/2 columns, and the step.
    entries = 3 * [10, 10, 15]
    expected = sum(50 * n + 50 + 50 * n * (n - 1) // 2 + 1 for n in entries)
    assert sum(p.numel() for p in network.parameters()) == expected == 34_959


def test_the_block_of_one_field_declares_mass_and_it_holds() -> None:
    network = field_network(10, 4, 0.5, 0)
    torch.nn.init.normal_(network.fields[0].outer.matrix)  # type: ignore[union-attr, arg-type]
    assert declare(network).properties.of(LinearInvariant) is not None
    x = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert verify(network, x).passed


def test_a_network_that_loses_mass_is_seen() -> None:
    x, y = sir_pairs("cube", 6, 0)
    leaky = torch.nn.Linear(3, 3).double()
    assert measure(leaky, (x, y), (x, y))["mass_error"] > 1e-3


class ExactFlowMap(torch.nn.Module):
    """What the networks learn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return integrate("sir", x, torch.tensor([0.0, 1.0], dtype=torch.float64))[:, -1]


def test_errors_are_those_of_known_shifts() -> None:
    """The exact map, held against targets that are 1/2 too large in training and 1/4 in the test, the last pairs."""
    x, y = sir_pairs("cube", 11, 0)
    shift = torch.tensor([0.5] * 6 + [0.25] * 5, dtype=torch.float64)[:, None]
    found = SirFieldCell(points=11, train=6).measure(ExactFlowMap(), x, y + shift)
    assert found["mse"] == pytest.approx(0.0625, abs=1e-11)
    assert found["train_mse"] == pytest.approx(0.25, abs=1e-11)
    assert found["rollout_mse"] < 1e-20
    assert found["mass_error"] <= 1e-14
    assert found["errors"] == pytest.approx([0.25] * 5, abs=1e-11)


def test_the_mass_error_is_that_of_the_worst_state_and_an_error_that_of_the_worst_component() -> None:
    class Leaking(torch.nn.Module):
        """S loses half of I."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - 0.5 * torch.nn.functional.pad(x[:, 1:2], (0, 2))

    x = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = measure(Leaking(), (x, x), (x, x))
    assert found["masses"] == found["errors"] == [0.125, 0.25, 0.0]
    assert found["mass_error"] == 0.25


def test_one_field_is_fitted_far_below_the_paper(tmp_path: Path) -> None:
    cell = SirFieldCell(points=200, train=160, hidden=40, steps=2, finish_steps=35)
    result = cell.build(tmp_path, Store(tmp_path))
    assert result["mse"] <= MSE_LIMIT
    assert result["mass_error"] <= 1e-14
    assert (result["parameters"], result["fitted"]) == (280, 120)


def test_results_are_functions_of_the_settings(tmp_path: Path, built: Store) -> None:
    for cell in SirFlowMap().cells(SMOKE):
        again, before = cell.build(tmp_path, built), built.result(cell)
        assert before is not None
        timed = ("seconds", "processor_seconds")
        assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in before.items() if k not in timed}


def test_runs_and_purposes_have_different_seeds() -> None:
    cells = [SirFieldCell(run=run, seed=seed) for run in range(3) for seed in range(2)]
    seeds = {cell.mixed(purpose) for cell in cells for purpose in range(3)}
    assert len(seeds) == 18
    assert SirFieldCell(run=1).mixed(0) == SirPrintedCell(run=1).mixed(0)


def test_adam_is_reproducible_and_lowers_the_loss() -> None:
    x, y = sir_pairs("cube", 64, 0)
    losses = []
    for _ in range(2):
        network = printed_network(10, 0)
        before = float((network(x) - y).square().mean().detach())
        AdamTraining(epochs=3).train(network, x, y, 5, "test")
        losses.append(float((network(x) - y).square().mean().detach()))
    assert losses[0] == losses[1] < before


def test_cpu_and_paper_share_their_cells() -> None:
    keys = [[cell.key for cell in SirFlowMap().cells(Scale(preset))] for preset in ("cpu", "paper", "smoke")]
    assert keys[0] == keys[1]
    assert len(keys[0]) == len(set(keys[0])) == 15
    assert not set(keys[2]) & set(keys[0])


def test_table_figure_and_checks(built: Store) -> None:
    experiment = SirFlowMap()
    table = experiment.tables(SMOKE, built)
    assert "3.35e-06" in table
    assert "not run" not in table
    figure = experiment.figures(SMOKE, built)["fig6"]
    assert len(figure.axes) == 3
    figure.canvas.draw()
    verdicts = {check.what: check.verdict for check in experiment.checks(SMOKE, built)}
    masses = {what for what in verdicts if "mass error" in what}
    assert len(masses) == 2
    assert verdicts == dict.fromkeys(verdicts, "not compared") | dict.fromkeys(masses, "agrees")


def test_a_small_run_that_loses_mass_is_seen() -> None:
    given = {"mse": 1.0, "rollout_mse": 1.0, "mass_error": 1e-13, "parameters": 700, "fitted": 300}
    given |= {"seconds": 1.0, "processor_seconds": 1.0}
    checks = SirFlowMap().checks(SMOKE, Planted(lambda cell: given))
    assert [check.verdict for check in checks].count("differs") == 2
    assert all("mass error" in check.what for check in checks if check.verdict == "differs")


def test_the_summary_takes_median_and_extremes() -> None:
    base = {
        "rollout_mse": 1.0,
        "mass_error": 0.0,
        "parameters": 3,
        "fitted": 2,
        "seconds": 1.0,
        "processor_seconds": 1.0,
    }
    found = SirFlowMap().summary([base | {"mse": mse, "mass_error": mse} for mse in (3.0, 1.0, 5.0)])
    assert (found["median"], found["least"], found["most"], found["mass"]) == (3.0, 1.0, 5.0, 5.0)


def test_settings_change_the_key() -> None:
    cell = SirFieldCell()
    assert (
        len({cell.key, replace(cell, hidden=50).key, replace(cell, run=1).key, replace(cell, starts="simplex").key})
        == 4
    )
