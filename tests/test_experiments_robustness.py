"""The figure of the gap between attacks and certificates, of results that are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from dynablocks.experiments import robustness
from dynablocks.experiments.base import Check, Scale
from dynablocks.experiments.cells import Store
from dynablocks.experiments.fig4 import Figure4
from dynablocks.experiments.fig5 import Figure5, LearnedSteps
from dynablocks.experiments.fig12 import Figure12
from dynablocks.experiments.provenance import made_here
from dynablocks.experiments.reference import paper_curve
from dynablocks.experiments.robustness import attack_note, make_row, paper_model, paper_training
from dynablocks.experiments.robustness_figures import attacked_figure, gap_figure, paper_steps_figure
from dynablocks.experiments.runs import AttackCell, TrainingCell
from dynablocks.files import write_json, write_tensors
from dynablocks.robustness import PAPER_EPSILONS, AttackResult, CertificateResult
from dynablocks.run_files import ATTACK_TENSORS, CERTIFICATE_TENSORS, RESULT

ATTACKED, CERTIFIED = (0.0, 0.5, 1.0), (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)


def test_the_shaded_gap_reaches_from_what_is_proved_to_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Scale("smoke")
    row = make_row("naive", scale, paper_model(scale, "naive"), paper_training(scale, 0.07), margin=0.07)
    labels = torch.zeros(8, dtype=torch.int64)
    # Of the four images that were attacked half are certified up to 0.15; the other four would say something else.
    radii = torch.tensor([0.15, 0.15, 0.05, 0.05, 0.9, 0.9, 0.9, 0.9], dtype=torch.float64)
    result = CertificateResult(radii, labels, labels, body_lipschitz=1.0)
    left = [{"epsilon": e, "accuracy": a} for e, a in zip(ATTACKED, (1.0, 0.5, 0.25), strict=True)]
    attacked = {"samples": 4, "robust_accuracy": left, "robust_accuracy_by_loss": {"ce": left}}
    results = {row.attack: attacked, row.certificate: result.summary(CERTIFIED)}
    monkeypatch.setattr(robustness, "stored_certificate", lambda cell, store: result)
    store = SimpleNamespace(result=results.get, state=lambda cell: "waiting")
    (axes,) = (a for a in gap_figure([row], store).axes if a.get_visible())
    (shaded,) = (c for c in axes.collections if isinstance(c, PolyCollection))
    edges: dict[float, set[float]] = {}
    for x, y in shaded.get_paths()[0].vertices:
        edges.setdefault(round(float(x), 9), set()).add(round(float(y), 9))
    expected = {0.0: (100, 100), 0.1: (50, 90), 0.2: (0, 80), 0.5: (0, 50), 1.0: (0, 25)}
    assert set(edges) == set(expected)
    for epsilon, (low, high) in expected.items():
        assert np.isclose([min(edges[epsilon]), max(edges[epsilon])], [low, high]).all()


@pytest.fixture
def built(tmp_path: Path) -> tuple[robustness.Row, Store]:
    """A row whose attack and certificate are built, of one image that was broken at 0.6."""
    scale, store = Scale("smoke"), Store(tmp_path)
    row = make_row("naive", scale, paper_model(scale, "naive"), paper_training(scale, 0.07), margin=0.07)
    labels = torch.zeros(1, dtype=torch.int64)
    certificate = CertificateResult(
        torch.tensor([0.5], dtype=torch.float64), labels, labels.clone(), body_lipschitz=1.0
    )
    config = row.attack.config
    broken = torch.tensor([[epsilon >= 0.6 for epsilon in config.epsilons]])
    attacked = AttackResult(
        config=config,
        labels=labels,
        clean_predictions=labels.clone(),
        broken={loss: broken.clone() for loss in config.losses},
        smallest_broken_norm=torch.tensor([0.6]),
        examples=torch.zeros(0, 1, 8, 8),
        example_predictions=labels[:0],
        example_norms=torch.zeros(0),
        example_losses=(),
    )
    summaries = {row.certificate: certificate.summary((8 / 255, 36 / 255, 0.5)), row.attack: attacked.summary()}
    tensors = {
        row.certificate: (CERTIFICATE_TENSORS, certificate.tensors()),
        row.attack: (ATTACK_TENSORS, attacked.tensors()),
    }
    for cell, summary in summaries.items():
        folder = store.directory(cell)
        folder.mkdir(parents=True)
        made = made_here() | {"seconds": 1.0}
        write_json(folder / RESULT, {"title": cell.title, "result": summary, "made": made})
        name, held = tensors[cell]
        write_tensors(folder / name, held)
    return row, store


def test_a_row_whose_attack_failed_certifies_nothing(
    built: tuple[robustness.Row, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, store = built
    assert not row.failed(store)
    assert "failed" not in robustness.summary_table([row], store)
    assert row.certified_at(store) == 1.0
    state = store.state
    monkeypatch.setattr(store, "state", lambda cell: "failed" if cell == row.attack else state(cell))
    assert "failed" in robustness.summary_table([row], store)
    assert row.certified_at(store) is None
    assert row.certified(store) is None


def test_a_certificate_that_the_stored_attack_breaks_is_not_shown(
    built: tuple[robustness.Row, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, store = built
    labels = torch.zeros(1, dtype=torch.int64)
    larger = CertificateResult(torch.tensor([0.9], dtype=torch.float64), labels, labels, body_lipschitz=1.0)
    monkeypatch.setattr(robustness, "stored_certificate", lambda cell, store: larger)
    assert row.failed(store)
    assert row.certified_at(store) is None


def test_orders_that_the_papers_own_numbers_contradict_are_not_held_against_a_reproduction() -> None:
    scale = Scale("paper")
    for margin in robustness.MARGINS:
        rows = robustness.paper_rows(scale, [margin])
        curves = {row.attack: row.paper() for row in rows}
        store = SimpleNamespace(
            result=lambda cell, curves=curves: {
                "samples": 1024,
                "robust_accuracy_by_loss": {"ce": curves[cell].points()},
            }
        )
        verdicts = [check.verdict for check in robustness.order_checks(scale, margin, rows, store)]
        assert "differs" not in verdicts, margin
        assert "agrees" in verdicts, margin


def test_orders_are_compared_on_every_data_set_that_was_run(tmp_path: Path) -> None:
    right = {"flexible": 0.7, "prescribed": 0.6, "non_expansive": 0.5, "naive": 0.4, "resnet": 0.3}
    areas = {"cifar10": right, "cifar100": right | {"naive": 0.55}}

    def result(cell: AttackCell) -> dict[str, object]:
        area = areas[cell.training.data][cell.training.model.name]
        points = [{"epsilon": epsilon, "accuracy": area} for epsilon in PAPER_EPSILONS]
        return {"samples": 1024, "robust_accuracy": points, "robust_accuracy_by_loss": {"ce": points}}

    checks = Figure4().checks(Scale("cpu", tmp_path, tmp_path), SimpleNamespace(result=result))
    orders = {check.what: check.verdict for check in checks if check.what.startswith("AUC, margin")}
    # That flexible is above prescribed the numbers of the paper contradict on CIFAR-100.
    assert list(orders.values()) == ["agrees"] * 3 + ["differs", "agrees", "not compared"]
    assert [what for what in orders if "cifar100" in what] == list(orders)[3:]


def test_the_signs_of_steps_are_compared_where_the_paper_is_clear(tmp_path: Path) -> None:
    scale = Scale("paper", tmp_path, tmp_path)

    def verdicts(experiment: LearnedSteps, **negative: int) -> list[str]:
        """Of six pairs so many with a negative h₂ on each data set, as the networks of the paper have."""

        def result(cell: TrainingCell) -> dict[str, object]:
            second = [-0.4 if k < negative[cell.data] else 0.4 for k in range(6)]
            return {"steps": [{"block": f"{k}", "values": {"h1": 1.0, "h2": h}} for k, h in enumerate(second)]}

        return [check.verdict for check in experiment.checks(scale, SimpleNamespace(result=result))]

    assert verdicts(Figure5(), cifar10=1, cifar100=0) == ["agrees", "agrees"]
    assert verdicts(Figure5(), cifar10=0, cifar100=1) == ["differs", "differs"]
    # At 0.15 almost all of them are, at 0.3 more than the one at 0.07.
    for negative, expected in (
        (1, ["differs", "differs"]),
        (2, ["differs", "agrees"]),
        (4, ["differs", "agrees"]),
        (5, ["agrees", "agrees"]),
        (6, ["agrees", "agrees"]),
    ):
        assert verdicts(Figure12(), cifar10=negative, cifar100=6) == [*expected, "not compared", "not compared"]


def test_steps_are_drawn_as_the_paper_draws_them() -> None:
    row = robustness.paper_row(Scale("smoke"), "flexible", 0.07)
    steps = {"steps": [{"block": "1", "values": {"h1": 1.0, "h2": -0.4}}]}
    (axes,) = paper_steps_figure([row], SimpleNamespace(result={row.training: steps}.get)).axes
    lines = [line for line in axes.lines if len(line.get_xdata())]
    segments = [tuple(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2]
    assert segments == [(0.0, -0.4), pytest.approx((-0.4, 0.6))]
    # The step to the right goes over the same t as the one to the left, and does not hide it.
    assert [tuple(line.get_ydata()) for line in lines if len(line.get_xdata()) == 2] == [(0, 0), (1, 1)]
    marks = [(line.get_marker(), float(line.get_xdata()[0])) for line in lines if len(line.get_xdata()) == 1]
    assert [marker for marker, _ in marks] == ["o", "D", "o", "D"]
    assert [place for _, place in marks] == pytest.approx([0.0, -0.4, -0.4, 0.6])


def test_each_network_has_a_panel_of_its_steps(tmp_path: Path) -> None:
    rows = Figure12().rows(Scale("cpu", tmp_path))
    steps = {"steps": [{"block": f"body.{k}", "values": {"h1": 1.0, "h2": -0.4}} for k in range(3)]}
    panels = paper_steps_figure(rows, SimpleNamespace(result={rows[1].training: steps}.get)).axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "cifar10, margin 0.15: not run",
        "cifar10, margin 0.3",
    ]
    assert [len([line for line in axes.lines if len(line.get_xdata()) == 2]) for axes in panels] == [0, 6]
    assert [axes.get_legend() is None for axes in panels] == [True, False]


@pytest.mark.parametrize("margins", [(0.07,), (0.15, 0.3)])
def test_areas_stand_below_the_curves_beside_the_papers(margins: tuple[float, ...]) -> None:
    """The right panels of the paper's Figure 4."""
    rows = robustness.paper_rows(Scale("cpu"), margins)

    def result(cell: AttackCell) -> dict[str, object]:
        share = 0.1 * (1 + robustness.NETWORKS.index(cell.training.model.name))
        points = [{"epsilon": epsilon, "accuracy": share} for epsilon in PAPER_EPSILONS]
        return {"samples": 1024, "robust_accuracy": points, "robust_accuracy_by_loss": {"ce": points}}

    drawn = attacked_figure(rows, SimpleNamespace(result=result)).axes
    panels = [axes for axes in drawn if axes.get_xlabel().startswith("AUC")]
    assert len(panels) == len(margins)
    for axes, margin in zip(panels, margins, strict=True):
        marks = [(line.get_fillstyle(), float(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes.lines]
        for height, name in enumerate(robustness.NETWORKS):
            curve = paper_curve("cifar10", name, margin)
            assert curve is not None
            assert ("full", pytest.approx(0.1 * (1 + height), rel=1e-12), height) in marks
            assert ("none", pytest.approx(curve.auc, rel=1e-12), height) in marks
    nothing = attacked_figure(rows, SimpleNamespace(result=lambda cell: None)).axes
    assert sum(axes.get_xlabel().startswith("AUC") for axes in nothing) == len(margins)


def test_the_bound_of_the_blocks_is_their_product(built: tuple[robustness.Row, Store]) -> None:
    row, store = built

    def shown(bounds: list[float | None]) -> str:
        blocks = [[f"body.{k}", bound] for k, bound in enumerate(bounds)]
        trained = {row.training: {"block_bounds": blocks, "parameters": 5}}
        planted = SimpleNamespace(
            result=lambda cell: trained.get(cell) or store.result(cell),
            record=store.record,
            directory=store.directory,
            state=store.state,
        )
        return robustness.summary_table([row], planted).splitlines()[-1].split("|")[-3].strip()

    assert shown([1.5, 2.0, 0.5]) == "1.500000"
    assert shown([5.0, 6.91298]) == "34.57"
    assert shown([1.5, None]) == "infinite"


def test_each_number_of_the_summary_stands_under_its_heading() -> None:
    scale = Scale("smoke")
    row = make_row("naive", scale, paper_model(scale, "naive"), paper_training(scale, 0.07), margin=0.07)

    def points(share: float) -> list[dict[str, float]]:
        return [{"epsilon": epsilon, "accuracy": share} for epsilon in row.attack.config.epsilons]

    certified = [{"epsilon": 8 / 255, "accuracy": 0.8}, {"epsilon": 36 / 255, "accuracy": 0.6}]
    results = {
        row.training: {"parameters": 7},
        row.certificate: {
            "samples": 100,
            "clean_accuracy": 0.91,
            "certified_accuracy": certified,
            "body_lipschitz": 1.5,
        },
        row.attack: {"samples": 64, "robust_accuracy": points(0.3), "robust_accuracy_by_loss": {"ce": points(0.5)}},
    }
    table = robustness.summary_table([row], SimpleNamespace(result=results.get, state=lambda cell: "waiting"))
    heads, _, line = ([cell.strip() for cell in text.strip("|").split("|")] for text in table.splitlines())
    found = dict(zip(heads, line, strict=True))
    wanted = {"clean": "91.0 %", "AUC (CE)": "0.500", "AUC (worst)": "0.300", "worst @36/255": "30.0 %"}
    wanted |= {"certified @36/255": "60.0 %", "certified @8/255": "80.0 %", "bound of the body": "1.500000"}
    wanted |= {"images/parameters": "100 / 7"}
    assert {name: found[name] for name in wanted} == wanted


def test_what_a_row_proves_is_rounded_down_and_its_bound_up() -> None:
    """Of 10,000 images four are not certified; the same share of those that an attack left is nearly all."""
    scale = Scale("smoke")
    row = make_row("naive", scale, paper_model(scale, "naive"), paper_training(scale, 0.07), margin=0.07)
    points = [{"epsilon": epsilon, "accuracy": 0.9996} for epsilon in row.attack.config.epsilons]
    certified = [{"epsilon": epsilon, "accuracy": 0.9996} for epsilon in (8 / 255, 36 / 255)]
    summary = {"samples": 10_000, "clean_accuracy": 0.9996, "certified_accuracy": certified, "body_lipschitz": 34.5649}
    attacked = {"samples": 10_000, "robust_accuracy": points, "robust_accuracy_by_loss": {"ce": points}}
    results = {row.training: {"parameters": 7}, row.certificate: summary, row.attack: attacked}
    table = robustness.summary_table([row], SimpleNamespace(result=results.get, state=lambda cell: "waiting"))
    heads, _, line = ([cell.strip() for cell in text.strip("|").split("|")] for text in table.splitlines())
    found = dict(zip(heads, line, strict=True))
    assert (found["certified @36/255"], found["certified @8/255"], found["clean"]) == ("99.9 %", "99.9 %", "100.0 %")
    assert found["bound of the body"] == "34.57"


def test_the_fewest_images_say_what_can_be_told() -> None:
    attacks = [row.attack for row in robustness.paper_rows(Scale("cpu"), (0.07,))]
    counts = dict(zip(attacks, (1024, 64, 256, 512, 128), strict=True))
    store = SimpleNamespace(result=lambda cell: {"samples": counts[cell]})
    assert robustness.fewest_samples(attacks, store) == 64


def test_the_note_says_what_was_attacked() -> None:
    assert "with 3 (there ten) steps" in attack_note(Scale("smoke"))
    assert "with 10 (there ten) steps" in attack_note(Scale("paper"))
    assert "attacked no further" in attack_note(Scale("cpu"))
    assert "attacked no further" not in attack_note(Scale("paper"))


def test_rows_of_both_data_sets_can_be_told_apart(tmp_path: Path) -> None:
    scale = Scale("cpu", tmp_path, tmp_path)
    rows = robustness.paper_rows(scale, [0.07])
    store = SimpleNamespace(result=lambda cell: None, state=lambda cell: "waiting")
    for table in (robustness.summary_table(rows, store), robustness.curve_table(rows, store)):
        names = [tuple(line.split("|")[1:5]) for line in table.splitlines()[2:]]
        assert len(names) == len(set(names))


def test_each_network_has_a_marker_of_its_own() -> None:
    rows = robustness.paper_rows(Scale("cpu"), (0.07,))
    points = [{"epsilon": epsilon, "accuracy": 0.5} for epsilon in PAPER_EPSILONS]
    result = {"samples": 1024, "robust_accuracy": points, "robust_accuracy_by_loss": {"ce": points}}
    curves, areas = attacked_figure(rows, SimpleNamespace(result=lambda cell: result)).axes
    here = [line for line in curves.lines if line.get_linestyle() == "-"]
    assert len({line.get_marker() for line in here}) == len(here) == len(robustness.NETWORKS)
    for axes in (curves, areas):
        assert {line.get_marker() for line in axes.lines} == {line.get_marker() for line in here}
        assert {(line.get_marker(), line.get_fillstyle()) for line in axes.lines} == {
            (line.get_marker(), filled) for line in here for filled in ("full", "none")
        }


@pytest.mark.parametrize(
    ("name", "rate", "factor", "penalty", "expansive"),
    [
        ("flexible", 1e-4, 0.5, 1.0, 0.0),
        ("prescribed", 1e-3, 0.1, 1.0, None),
        ("non_expansive", 1e-4, 0.5, 1.0, None),
        ("naive", 1e-3, 0.1, 0.01, None),
        ("resnet", 1e-2, 0.1, None, None),
    ],
)
def test_trainings_on_cifar_100_are_the_released_ones(
    name: str, rate: float, factor: float, penalty: float | None, expansive: float | None, tmp_path: Path
) -> None:
    """Of CIFAR100/*/main.ipynb: the rate, what it is multiplied by every 30 epochs, and the weights of penalties."""
    scale = Scale("paper", tmp_path, tmp_path)
    row = robustness.warm_row(scale, name, 0.07)
    assert row is not None
    training, model = row.training.training, row.training.model
    assert (training.lr, training.step_factor) == (rate, factor)
    assert (training.schedule, training.step_epochs, training.epochs, training.momentum) == ("step", 30.0, 100, 0.9)
    assert (model.penalty, model.expansive_penalty, model.head) == (penalty, expansive, "none")
    begun = robustness.paper_row(scale, name, 0.07).training
    assert row.training.warm_start == begun
    assert (begun.training.lr, begun.training.step_factor, begun.model.expansive_penalty) == (0.01, 0.1, None)


def test_references_of_other_steps_say_so(tmp_path: Path) -> None:
    scale, note = Scale("paper", tmp_path, tmp_path), " (released network, other steps)"
    nothing = SimpleNamespace(result=lambda cell: None)
    rows = robustness.paper_rows(scale, (0.07,))
    checks = robustness.auc_checks(scale, rows, nothing)
    noted = [row.model for row, check in zip(rows, checks, strict=True) if check.paper.endswith(note)]
    assert noted == ["flexible", "prescribed"] * 2
    assert checks[0].paper == f"0.6802{note}"
    for experiment in (Figure5(), Figure12()):
        assert all(check.paper.endswith(note) for check in experiment.checks(scale, nothing))


@pytest.mark.parametrize(
    ("first", "second", "compared", "expected", "got", "verdict"),
    [
        (0.56, 0.53, True, "ours larger", "0.56 against 0.53", "agrees"),
        (0.53, 0.56, True, "ours larger", "0.53 against 0.56", "differs"),
        (0.55, 0.53, True, "closer than 1,024 images can tell", "0.55 against 0.53", "not compared"),
        (0.53, 0.56, False, "ours larger", "0.53 against 0.56", "not compared"),
        (0.55, 0.53, False, "ours larger", "0.55 against 0.53", "not compared"),
        (None, 0.53, True, "ours larger", "", "not run"),
        (0.56, None, False, "ours larger", "", "not run"),
    ],
)
def test_two_shares_are_compared_where_images_and_preset_allow(
    first: float | None, second: float | None, compared: bool, expected: str, got: str, verdict: str
) -> None:
    found = robustness.larger_check("a", "b", "ours larger", first, second, 1024, compared, "{:.2f}".format)
    assert found == Check("a", "b", expected, got, verdict)
