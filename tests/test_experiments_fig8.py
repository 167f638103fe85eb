"""Figure 8: the pairs are those of the flow, the step's parts are what they are said to be, the fit finds a field."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from planted import Planted
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.experiments import Scale, Store
from dynablocks.experiments.fig8 import (
    DIMENSIONS,
    EPOCH_MEAN,
    KINDS,
    STEP,
    FieldCell,
    FieldsFromFlows,
    FlowStep,
    FourthOrderFieldCell,
    NetworkRotation,
    PrintedFieldCell,
    SplittingFieldCell,
    fields_figure,
    judged,
    printed_field,
    ridge_field,
    target,
    target_pairs,
)
from dynablocks.fields import SumField, VectorField
from dynablocks.fields.sphere import RotationField
from dynablocks.fields.symmetric import GradientOf
from dynablocks.integrators import integrator
from dynablocks.reporting.figures import FAINT


class Potential(nn.Module):
    """Σ (−cos xᵢ + cos³xᵢ/3 + xᵢ⁴/4), whose gradient is X₁."""

    def forward(self, x: Tensor) -> Tensor:
        return (-x.cos() + x.cos() ** 3 / 3 + x**4 / 4).sum(1)


def true_x1() -> SumField:
    tangent = RotationField(4, 2).double()
    nn.init.zeros_(tangent.outer.matrix)
    return SumField(GradientOf(Potential(), (4,)), tangent)


@pytest.mark.parametrize("name", DIMENSIONS)
def test_pairs_are_of_the_flow(name: str) -> None:
    x, y = target_pairs(name, 20, 0)
    assert float(x.abs().max()) <= 1
    back = x
    for _ in range(50):
        back = integrator("rk4").step(Lambda(name), back, STEP / 50)
    assert torch.allclose(back, y, rtol=0, atol=1e-12)


class Lambda(VectorField):
    """A target as a field."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.target = name

    def forward(self, x: Tensor) -> Tensor:
        return target(self.target, x)


def test_the_discrete_gradient_step_ends_in_y_for_its_own_solution() -> None:
    field = true_x1()
    x, _ = target_pairs("X1", 10, 1)
    y = x
    step = FlowStep(field, "splitting")
    for _ in range(60):
        y = step(torch.cat([x, y], dim=1))
    assert torch.allclose(step(torch.cat([x, y], dim=1)), y, rtol=0, atol=4e-15)
    change = Potential()(y) - Potential()(x)
    assert torch.allclose((y - x).square().sum(1) / STEP, change, rtol=0, atol=1e-13)


def test_the_true_field_is_judged_right_and_a_wrong_one_is_not() -> None:
    assert judged("X1", true_x1())["relative"] < 1e-12
    assert judged("X1", ridge_field(4, 3, 2).double())["relative"] > 0.1


def test_networks_have_the_sizes_of_the_released_code() -> None:
    field = printed_field(4, 10, 60)
    sizes = [tuple(p.shape) for p in field.parameters() if p.ndim == 2]
    assert sizes == [(10, 4), (10, 10), (1, 10), (60, 4), (60, 60), (60, 60), (6, 60)]
    x = torch.randn(5, 4, dtype=torch.float64)
    field = field.double()
    gradient, tangent = field.terms()
    assert isinstance(gradient, GradientOf)
    assert isinstance(tangent, NetworkRotation)
    assert float((tangent(x) * x).detach().sum(1).abs().max()) < 1e-14
    assert torch.allclose(field(x), gradient(x) + tangent(x), rtol=1e-12, atol=1e-12)


def test_unknown_target() -> None:
    with pytest.raises(InvalidArgument, match="X1"):
        target("X3", torch.zeros(1, 2))


@pytest.mark.parametrize("kind", [SplittingFieldCell, FourthOrderFieldCell])
def test_the_pendulum_is_found(kind: type[SplittingFieldCell], tmp_path: Path) -> None:
    result = kind("X2", points=160, train=140, width=12, hidden=40, adam_steps=50, finish_steps=60).build(
        tmp_path, Store(tmp_path)
    )
    assert result["train"] < 1e-9
    assert result["relative"] < 0.02


def test_the_last_pairs_alone_are_the_test() -> None:
    """Held against its own steps, moved by 1/2 in training and by 1/4 in the test."""
    step = FlowStep(ridge_field(2, 1, 2).double(), "rk4")
    pairs = torch.cat(target_pairs("X2", 5, 0), dim=1)
    shift = torch.tensor([0.5, 0.5, 0.5, 0.25, 0.25], dtype=torch.float64)[:, None]
    with torch.no_grad():
        moved = step(pairs) + shift
    found = FourthOrderFieldCell("X2", points=5, train=3).measure(step, pairs, moved)
    assert (found["train"], found["test"]) == pytest.approx((0.25, 0.0625), rel=1e-12)


def test_smoke_experiment(tmp_path: Path) -> None:
    experiment, scale, store = FieldsFromFlows(), Scale("smoke"), Store(tmp_path)
    assert {check.verdict for check in experiment.checks(scale, store)} == {"not run"}
    cells = experiment.cells(scale)
    assert [store.build(cell) for cell in cells] == ["built"] * (len(DIMENSIONS) * len(KINDS))
    assert {check.verdict for check in experiment.checks(scale, store)} == {"not compared"}
    assert PrintedFieldCell.name in experiment.tables(scale, store)
    assert set(experiment.figures(scale, store)) == {"fig8"}


def test_the_papers_network_is_held_against_the_mean_of_the_released_last_epoch() -> None:
    assert pytest.approx(5.473936e-6 * 100 / 11, rel=1e-3) == EPOCH_MEAN

    def checks(loss: float) -> dict[str, tuple[str, str]]:
        def result(cell: FieldCell) -> dict[str, float]:
            losses = dict.fromkeys(("train", "test"), loss if isinstance(cell, PrintedFieldCell) else 1e-12)
            return losses | {"relative": 1e-3, "largest": 1e-3, "fitted": 5, "seconds": 1.0}

        found = FieldsFromFlows().checks(Scale("cpu"), Planted(result))
        return {check.what: (check.paper, check.verdict) for check in found}

    name = f"X1: training loss, {PrintedFieldCell.name}"
    assert checks(3.8e-5)[name] == ("4.98e-05", "agrees")
    assert checks(6e-5)[name] == ("4.98e-05", "differs")
    # One RK4 step has another loss than the paper's.
    for target_name, papers in (("X1", "4.98e-05"), ("X2", "a plot")):
        said = [checks(1e-7)[f"{target_name}: training loss, {kind.name}"][0] for kind in KINDS]
        assert said == [papers, papers, ""]


def test_every_network_can_be_told_apart_in_the_picture() -> None:
    line = torch.zeros(5, 4, dtype=torch.float64)
    line[:, 0] = torch.linspace(-1, 1, 5, dtype=torch.float64)
    side = torch.linspace(-1, 1, 3, dtype=torch.float64)
    points = {"X1": line, "X2": torch.cartesian_prod(side, side)}
    shown = {(name, kind.name): torch.stack([x, target(name, x) + 0.1]) for name, x in points.items() for kind in KINDS}
    along, errors, plane = fields_figure(shown).axes
    truth, *fits = along.lines
    assert (truth.get_label(), truth.get_color()) == ("X₁", FAINT)
    assert all(truth.get_linewidth() > fit.get_linewidth() for fit in fits)
    colours = [fit.get_color() for fit in fits]
    assert len(set(colours)) == len(KINDS)
    assert FAINT not in colours
    assert [drawn.get_color() for drawn in errors.lines] == colours
    arrows = plane.collections
    assert [to_hex(drawn.get_facecolor()[0]) for drawn in arrows] == [FAINT, *colours]
    widths = [drawn.width for drawn in arrows]
    assert widths == sorted(set(widths), reverse=True)
    assert [drawn.get_zorder() for drawn in arrows][1:] == sorted(drawn.get_zorder() for drawn in arrows[1:])
