"""Figures 3, 9 and 11: regions put to the test by measured constants, and one-pixel pictures."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dynablocks.errors import InvalidArgument
from dynablocks.experiments.base import Scale
from dynablocks.experiments.cells import Store
from dynablocks.experiments.fig3 import PrescribedRegions
from dynablocks.experiments.fig9 import OnePixelCell, OnePixelPictures, change_one_pixel
from dynablocks.experiments.fig11 import FlexibleRegions
from dynablocks.experiments.monte_carlo import (
    TOLERANCE,
    MonteCarloCell,
    PairStep,
    claimed_pairs,
    measured,
    random_orthogonal,
    violations,
)
from dynablocks.experiments.orders import errors_figure
from dynablocks.experiments.regions import area, left_out_check, peak, peak_check, size_columns
from dynablocks.fields import GradientField, leaky_relu
from dynablocks.integrators import ExactFlow, ExplicitEuler
from dynablocks.linear import Dense
from dynablocks.reporting.figures import CYCLE
from dynablocks.switching import (
    REGIONS,
    ExactFlowRegion,
    PaperFlexibleRegion,
    PaperPrescribedRegion,
    TightHalvesRegion,
    TightRegion,
)

SMOKE = Scale("smoke")
EXPERIMENTS = [PrescribedRegions(), FlexibleRegions(), OnePixelPictures()]


class FakeStore:
    """Results by cell, nothing on disk."""

    def __init__(self, results):
        self.results = results

    def result(self, cell):
        return self.results.get(cell)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("cells"))
    cells = [cell for experiment in EXPERIMENTS for cell in experiment.cells(SMOKE)]
    assert {store.build(cell) for cell in cells} == {"built"}
    return FakeStore({cell: json.loads(json.dumps(store.result(cell))) for cell in cells})


def pairs(*values):
    return torch.tensor(values, dtype=torch.float64).T.contiguous()


def test_the_worst_constant_is_the_product_of_the_closed_forms():
    first, second = pairs((4 / 3, 2.0), (1.0, 0.5), (1.8, 0.1), (0.0, 0.3), (2.5, 0.0))
    euler = PairStep(TightRegion(0.5, 1)).worst_constants(first, second)
    closed = torch.maximum((1 - first).abs(), (1 - first / 2).abs()) * (1 + second)
    torch.testing.assert_close(euler, closed, rtol=1e-13, atol=0)
    twice = PairStep(TightRegion(0.5, 2)).worst_constants(2 * first, 2 * second)
    torch.testing.assert_close(twice, closed**2, rtol=1e-13, atol=0)
    halves = PairStep(PaperFlexibleRegion(0.5), "flexible").worst_constants(first, second)
    torch.testing.assert_close(halves, (1 - first / 4) ** 2 * (1 + second), rtol=1e-13, atol=0)
    exact = PairStep(ExactFlowRegion(0.5, 2)).worst_constants(first, second)
    torch.testing.assert_close(exact, torch.exp(second - first / 2), rtol=1e-13, atol=0)


@pytest.mark.parametrize("signal", ["prescribed", "flexible"])
@pytest.mark.parametrize("region", [TightRegion(0.5, 2), ExactFlowRegion(0.5, 2)])
def test_random_weights_never_exceed_the_worst(region, signal):
    generator = torch.Generator().manual_seed(3)
    first, second = torch.rand((2, 60), generator=generator, dtype=torch.float64) * 5 - torch.tensor([[0.0], [2.5]])
    step = PairStep(region, signal)
    random, worst = step.random_constants(first, second, 6, generator), step.worst_constants(first, second)
    assert (random <= worst * (1 + 1e-13)).all()
    assert (random > 0.5 * worst).float().mean() > 0.8


@pytest.mark.parametrize(
    ("region", "method"), [(TightRegion(0.5), ExplicitEuler()), (ExactFlowRegion(0.5), ExactFlow())]
)
@pytest.mark.parametrize("signal", ["prescribed", "flexible"])
def test_the_factors_are_those_of_the_library_s_steps(region, method, signal):
    """At every corner of the activation the modelled eigenvalue is the derivative of the real one-dimensional step."""
    step = PairStep(region, signal)
    for index, x in itertools.product((0, 1), (-1.0, 1.0)):
        field = GradientField(Dense(1, 1), leaky_relu(step.slopes(index)[0]), expansive=bool(index)).double()
        slope = step.slopes(index)[int(x > 0)]
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.fill_(1.0 if parameter.ndim == 2 else 0.0)
        if isinstance(method, ExactFlow):

            def flow(u, index=index, field=field):
                return field.sigma.flow(u, (0.7 if index else -0.7) * torch.ones_like(u))
        else:

            def flow(u, field=field):
                return method.step(field, u, torch.tensor(0.7, dtype=torch.float64))

        derivative = torch.autograd.functional.jacobian(flow, torch.tensor([[x]], dtype=torch.float64)).item()
        expected = step.factors(index, torch.tensor(0.7, dtype=torch.float64), torch.tensor(slope, dtype=torch.float64))
        assert derivative == pytest.approx(expected.item(), rel=1e-14)


@pytest.mark.parametrize(("h1", "h2"), [(1.0, 0.6), (2.9, 1.5), (3.5, 0.4)])
def test_the_worst_product_over_two_substeps_is_reached_by_one_map_with_fixed_biases(h1, h2):
    """The substeps share A and b, so that D may differ between them has to be realised by one point and two biases."""
    generator = torch.Generator().manual_seed(1)
    contractive, expansive = 40 * torch.rand((2, 200_000), generator=generator, dtype=torch.float64) - 20
    x, slope = torch.zeros_like(contractive), torch.ones_like(contractive)
    for _ in range(2):
        for sign, bias, size in ((-1, contractive, h1 / 2), (1, expansive, h2 / 2)):
            inner = torch.where(x + bias > 0, 1.0, 0.5).double()
            x, slope = x + sign * size * inner * (x + bias), slope * (1 + sign * size * inner)
    worst = PairStep(TightRegion(0.5, 2)).worst_constants(*pairs((h1, h2)))
    assert slope.abs().max().item() == pytest.approx(worst.item(), rel=1e-13)


CLAIMS = [
    (PaperPrescribedRegion, 1, "prescribed"),
    (PaperPrescribedRegion, 2, "prescribed"),
    (TightRegion, 1, "prescribed"),
    (TightRegion, 2, "prescribed"),
    (TightRegion, 1, "flexible"),
    (ExactFlowRegion, 1, "prescribed"),
    (ExactFlowRegion, 1, "flexible"),
    (PaperFlexibleRegion, 1, "flexible"),
]


def measure(region, signal):
    generator = torch.Generator().manual_seed(5)
    first, second = pairs(*claimed_pairs(region, 60, generator))
    step = PairStep(region, signal)
    random, worst = step.random_constants(first, second, 1, generator), step.worst_constants(first, second)
    columns = {"first": first, "second": second, "random": random, "worst": worst}
    return {name: column.tolist() for name, column in columns.items()}


@pytest.mark.parametrize(("kind", "substeps", "signal"), CLAIMS)
@pytest.mark.parametrize("slope", [0.2, 0.5, 0.8])
def test_no_pair_inside_a_region_expands(kind, substeps, signal, slope):
    region = kind(slope, substeps)
    result = measure(region, signal)
    assert all(region.contains(first, second) for first, second, _ in measured(result))
    assert violations(region, result) == []


@pytest.mark.parametrize("kind", [TightRegion, ExactFlowRegion])
@pytest.mark.parametrize("factor", [1.2, 1.001])
def test_a_region_that_is_too_large_is_caught(kind, factor):
    @dataclass(frozen=True)
    class Larger(kind):
        def limit(self, first):
            return factor * kind.limit(self, first)

    region = Larger(0.5)
    assert len(violations(region, measure(region, "prescribed"))) >= 60 * 0.9


def test_areas_and_peaks_against_closed_forms():
    assert area(PaperPrescribedRegion(0.5, 2)) == pytest.approx(4 * (math.log(3) - 1), rel=1e-6)
    assert area(TightRegion(0.5, 1)) == pytest.approx(3 * math.log(3) - 2, rel=1e-6)
    assert peak(PaperPrescribedRegion(0.5)) == pytest.approx((0.5, 2 / math.sqrt(3) - 1), abs=1e-8)
    assert peak(TightRegion(0.5, 2)) == pytest.approx((8 / 3, 4.0), abs=1e-6)


def test_a_region_is_measured_by_the_tight_one_of_its_own_steps():
    shares = {region: size_columns(region(0.5))["share"] for region in (TightRegion, TightHalvesRegion)}
    assert set(shares.values()) == {"100.0 %"}
    # The integrals of 4/((h − 1)² + 3) − 1 over [0.11, 1.9], and of the limit of the two halves, which is 8.
    paper = 4 / math.sqrt(3) * (math.atan(0.9 / math.sqrt(3)) + math.atan(0.89 / math.sqrt(3))) - 1.79
    assert area(TightHalvesRegion(0.5)) == pytest.approx(8.0, rel=1e-5)
    assert size_columns(PaperFlexibleRegion(0.5))["share"] == f"{100 * paper / 8:.1f} %" == "5.2 %"
    assert size_columns(ExactFlowRegion(0.5))["share"] is None


def test_random_orthogonal_matrices_are_orthogonal_and_of_both_orientations():
    q = random_orthogonal((40,), 5, torch.Generator().manual_seed(0))
    assert (q @ q.mT - torch.eye(5)).abs().max() < 1e-14
    assert set(torch.linalg.det(q).round().tolist()) == {-1.0, 1.0}


def test_regions_that_take_a_pair_differently_need_cells_of_their_own():
    with pytest.raises(InvalidArgument, match="different pieces"):
        MonteCarloCell(("tight", "exact"), "prescribed", 1, (0, 1, 0, 1), 3, 1, 1)
    with pytest.raises(InvalidArgument, match="unknown region"):
        MonteCarloCell(("tigt",), "prescribed", 1, (0, 1, 0, 1), 3, 1, 1)
    with pytest.raises(InvalidArgument, match="unknown signal"):
        PairStep(TightRegion(0.5), "flexibel")


def test_trials_are_a_whole_number():
    step, (first, second) = PairStep(TightRegion(0.5)), pairs((1.0, 0.5))
    for trials in (2.5, True, 0):
        with pytest.raises(InvalidArgument, match=r"trials is .*; a whole number from 1 is needed"):
            step.random_constants(first, second, trials, torch.Generator())
    own, numpy = (step.random_constants(first, second, n, torch.Generator().manual_seed(0)) for n in (3, np.int64(3)))
    assert torch.equal(own, numpy)


def test_fourteen_methods_of_one_order_are_told_apart():
    result = {"order": 2, "steps": [2, 4], "errors": [0.1, 0.025]}
    axes, names = errors_figure({f"method {k}": result for k in range(14)}).axes
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == 14
    assert {colour for colour, _ in looks} == set(CYCLE)
    assert [text.get_text() for text in names.get_legend().get_texts()] == [f"method {k}" for k in range(14)]


def test_a_changed_region_changes_the_key(monkeypatch):
    cell = MonteCarloCell(("tight",), "prescribed", 1, (0.0, 1.0, 0.0, 1.0), 3, 1, 1)
    before = cell.key
    assert before == cell.key
    monkeypatch.setattr(TightRegion, "limit", lambda self, first: 0.1)
    assert cell.key != before
    assert "tight" in REGIONS


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_tables_checks_and_figures_are_functions_of_the_results(experiment, built):
    assert {check.verdict for check in experiment.checks(SMOKE, built)} == {"agrees"}
    table = experiment.tables(SMOKE, built)
    assert table == experiment.tables(SMOKE, built)
    assert "not run" not in table
    figures = experiment.figures(SMOKE, built)
    assert list(figures) == [experiment.name]
    assert any("smoke" in text.get_text() for text in figures[experiment.name].texts)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_what_was_not_run_is_said(experiment):
    nothing = FakeStore({})
    assert "not run" in experiment.tables(SMOKE, nothing)
    assert "not run" in {check.verdict for check in experiment.checks(SMOKE, nothing)}
    assert "differs" not in {check.verdict for check in experiment.checks(SMOKE, nothing)}
    experiment.figures(SMOKE, nothing)


def test_a_violation_in_the_results_turns_the_check_around(built):
    experiment = PrescribedRegions()
    cell = experiment.panels[0].cell(SMOKE)
    result = dict(built.result(cell))
    result["random"] = [1 + 2 * TOLERANCE if i == cell.pairs else c for i, c in enumerate(result["random"])]
    checks = experiment.checks(SMOKE, FakeStore({cell: result}))
    wrong = [check.what for check in checks if check.verdict == "differs"]
    assert any("violations inside the region paper-prescribed" in what for what in wrong)


@pytest.mark.parametrize(
    ("got", "verdict"), [((0.5, 0.1547), "agrees"), ((0.5, 0.155), "differs"), ((0.51, 0.1547), "differs")]
)
def test_a_largest_step_of_another_size_or_place_differs(got, verdict):
    assert peak_check("largest h₂", "(3.10)", (0.5, 0.1547), got).verdict == verdict


@pytest.mark.parametrize(("constant", "loose", "sharp"), [(1.0, "agrees", "differs"), (1.1, "differs", "agrees")])
def test_a_valid_pair_outside_speaks_for_a_loose_region_and_against_a_sharp_one(constant, loose, sharp):
    """(1, 3/2) has (1 + h₂)√(1 − 2h₁a + h₁²) = 5/2, so that (3.10) leaves it out."""
    region, panel = PaperPrescribedRegion(0.5), PrescribedRegions().panels[0]
    result = {"first": [1.0], "second": [1.5], "random": [constant], "worst": [constant]}
    assert left_out_check(panel, "paper", region, result, loose=True).verdict == loose
    assert left_out_check(panel, "paper", region, result, loose=False).verdict == sharp


def test_two_builds_are_equal(tmp_path):
    cell = PrescribedRegions().panels[1].cell(SMOKE)
    assert cell.build(tmp_path, None) == cell.build(tmp_path, None)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_value_of_one_pixel_changes_and_its_norm_is_exact(channels):
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(256, (channels, 6, 9), generator=generator, dtype=torch.uint8)
    changed = change_one_pixel(image, generator)
    clean, perturbed = (torch.tensor(changed[key]).reshape(image.shape) for key in ("clean", "perturbed"))
    assert torch.equal(clean, image.long())
    where = (clean != perturbed).nonzero().tolist()
    assert where == [[0, *changed["pixel"]]]
    assert changed["l2"] == pytest.approx(abs(changed["new"] - changed["old"]) / 255, rel=1e-15)
    assert changed["shading_metric"] == pytest.approx(10 * changed["l2"], rel=1e-12)
    assert changed["l2"] <= changed["metric"] < changed["shading_metric"]


def test_the_pictures_are_of_different_classes_and_named_by_their_data(tmp_path):
    cell = OnePixelCell("digits", count=4)
    result = cell.build(tmp_path, None)
    assert len({picture["class"] for picture in result["pictures"]}) == 4
    assert len(cell.data_hash()) == 64
    assert OnePixelCell("digits", seed=1).key != cell.key
    assert OnePixelPictures().cell(Scale("cpu", data_dir=tmp_path)).data == "cifar10"


def test_the_red_channel_is_that_of_cifar_but_for_smoke():
    """Digits have none: without a copy, here or on the Hub, the figure is not run."""
    data = {preset: OnePixelPictures().cell(Scale(preset)).data for preset in ("smoke", "cpu", "paper")}
    assert data == {"smoke": "digits", "cpu": "cifar10", "paper": "cifar10"}


@pytest.mark.parametrize(("entry", "verdict"), [(3, "agrees"), (20 + 3, "differs"), (None, "differs")])
def test_a_change_of_another_channel_is_seen(entry, verdict):
    clean = [0] * 60
    changed = [100 if index == entry else 0 for index in range(60)]
    cell = OnePixelPictures().cell(Scale("cpu"))
    result = {"shape": [3, 4, 5], "pictures": [{"clean": clean, "perturbed": changed}]}
    (check,) = OnePixelPictures().checks(Scale("cpu"), FakeStore({cell: result}))
    assert check.verdict == verdict
