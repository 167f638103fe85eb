"""Table 1 and Figure 1: cells, table, figure and checks at smoke size."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted, built_store

from dynablocks.experiments import Scale, Store
from dynablocks.experiments.ensembles import EnsembleTraining
from dynablocks.experiments.planar_networks import FAMILIES
from dynablocks.experiments.table1 import PlanarClassification, quartiles
from dynablocks.experiments.table1_cells import EnsembleCell, PlanarSet, stored_network
from dynablocks.robustness.certificates import certified_radii

SMOKE = Scale("smoke")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built_store(PlanarClassification(), tmp_path_factory.mktemp("cells"))


def test_cpu_and_paper_share_their_cells() -> None:
    experiment = PlanarClassification()
    keys = [[cell.key for cell in experiment.cells(Scale(preset))] for preset in ("cpu", "paper", "smoke")]
    assert keys[0] == keys[1] != keys[2]
    assert [cell.runs for cell in experiment.cells(Scale("paper"))] == [100] * 3


def test_training_validation_and_test_points_differ() -> None:
    points = [PlanarSet().points(part, 0)[0][:100] for part in ("train", "validation", "test")]
    assert not any(torch.equal(first, second) for first, second in ((points[0], points[1]), (points[1], points[2])))


def test_results_are_those_of_the_stored_networks(built: Store) -> None:
    for cell in PlanarClassification().cells(SMOKE):
        assert isinstance(cell, EnsembleCell)
        result = built.result(cell)
        assert result is not None
        assert len(result["accuracies"]) == cell.runs == 4
        points, labels = cell.points.points("test", 0)
        network = stored_network(cell, built, 2)
        accuracy = float((network(points).argmax(1) == labels).double().mean())
        assert accuracy == pytest.approx(result["accuracies"][2], abs=2 / len(labels))
        assert result["final_times"][2] == pytest.approx(sum(map(abs, result["steps"][2])))
        assert max(result["bounds"]) <= 1 + 1e-11


def test_the_certified_discs_hold_their_class(built: Store) -> None:
    for cell in PlanarClassification().cells(SMOKE):
        assert isinstance(cell, EnsembleCell)
        network = stored_network(cell, built, 0)
        points, _ = cell.points.points("test", 0)
        points = points[:100]
        logits = network(points)
        radii = certified_radii(logits, network.head.weight, network.body_lipschitz())
        assert float(radii.max()) > 0
        angles = torch.linspace(0, 6.3, 64, dtype=torch.float64)
        circle = torch.stack([angles.cos(), angles.sin()], dim=1)

        def kept(scale: float) -> bool:
            around = points[:, None] + scale * radii[:, None, None] * circle  # noqa: B023
            changed = network(around.reshape(-1, 2)).argmax(1).reshape(100, -1)  # noqa: B023
            return bool((changed == logits.argmax(1)[:, None]).all())  # noqa: B023

        assert kept(1.0)
        assert not kept(1e6)


def test_the_result_is_a_function_of_the_settings(built: Store, tmp_path: Path) -> None:
    cell = PlanarClassification().cells(SMOKE)[1]
    assert isinstance(cell, EnsembleCell)
    again, before = cell.build(tmp_path, built), built.result(cell)
    assert before is not None
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}
    short = replace(cell, runs=2, training=EnsembleTraining(steps=5))
    assert (
        short.measure(short.train())["steps"] != replace(short, seed=1).measure(replace(short, seed=1).train())["steps"]
    )


def test_table_figure_and_checks(built: Store) -> None:
    experiment = PlanarClassification()
    table = experiment.tables(SMOKE, built)
    assert "98.0 %" in table
    assert "not run" not in table
    figure = experiment.figures(SMOKE, built)["fig1"]
    assert len(figure.axes) == 5
    figure.canvas.draw()
    checks = experiment.checks(SMOKE, built)
    assert [check.verdict for check in checks] == ["not compared"] * 4 + ["agrees"] * 3


def of_families(
    accuracies: dict[str, float], times: dict[str, float], bounds: dict[str, list[float]] | None = None
) -> Planted:
    """A store in which a family has one accuracy and one T, and these bounds or 1."""

    def result(cell: EnsembleCell) -> dict[str, Any]:
        found = {"accuracies": [accuracies[cell.family]], "final_times": [times[cell.family]]}
        return found | {"bounds": (bounds or {}).get(cell.family, [1.0])}

    return Planted(result)


def test_accuracies_and_times_of_other_points_than_the_papers_are_not_compared() -> None:
    """Near its numbers or far from them, at any preset; the bounds are compared whatever they are."""
    papers = {"F+Fc": 0.98, "F": 0.99, "Fc": 0.973}, {"F+Fc": 1.84, "F": 7.53, "Fc": 19.82}
    others = dict.fromkeys(FAMILIES, 0.5), {"F+Fc": 3.0, "F": 2.0, "Fc": 1.0}
    for preset, (accuracies, times) in itertools.product(("smoke", "cpu", "paper"), (papers, others)):
        checks = PlanarClassification().checks(Scale(preset), of_families(accuracies, times))
        assert [check.verdict for check in checks] == ["not compared"] * 4 + ["agrees"] * 3
        assert {check.expected for check in checks[:4]} == {"other data than the paper's"}
    assert [check.got for check in checks[:4]] == ["50.0 %"] * 3 + ["3.00, 2.00, 1.00"]


@pytest.mark.parametrize("preset", ["smoke", "paper"])
def test_one_network_that_may_expand_is_seen_at_every_preset(preset: str) -> None:
    values = dict.fromkeys(FAMILIES, 0.98)
    bounds = {"F+Fc": [0.2, 1 + 1e-12], "F": [0.9, 1.01, 0.5]}
    checks = PlanarClassification().checks(Scale(preset), of_families(values, values, bounds))
    assert [check.verdict for check in checks[-3:]] == ["agrees", "differs", "agrees"]
    assert checks[-2].got == "1.01"


def test_quartiles_are_those_of_torch() -> None:
    values = torch.rand(11, dtype=torch.float64)
    expected = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    assert quartiles(values.tolist()) == pytest.approx(tuple(expected))
