"""The figure of the gap between attacks and certificates, of results that are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from dynablocks.experiments import robustness
from dynablocks.experiments.base import Scale
from dynablocks.experiments.fig4 import attack_note
from dynablocks.experiments.robustness import make_row, paper_model, paper_training
from dynablocks.experiments.robustness_figures import gap_figure, steps_figure
from dynablocks.robustness import CertificateResult

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
    together: list[tuple[object, object]] = []
    monkeypatch.setattr(robustness, "stored_certificate", lambda cell, store: result)
    monkeypatch.setattr(robustness, "stored_attack", lambda cell, store: "the attack")
    monkeypatch.setattr(robustness, "check_sound", lambda *both: together.append(both))
    store = SimpleNamespace(result=results.get, failure=lambda cell: None)
    (axes,) = (a for a in gap_figure([row], store).axes if a.get_visible())
    assert together == [("the attack", result)], "what is shown together is checked together"
    (shaded,) = (c for c in axes.collections if isinstance(c, PolyCollection))
    edges: dict[float, set[float]] = {}
    for x, y in shaded.get_paths()[0].vertices:
        edges.setdefault(round(float(x), 9), set()).add(round(float(y), 9))
    expected = {0.0: (100, 100), 0.1: (50, 90), 0.2: (0, 80), 0.5: (0, 50), 1.0: (0, 25)}
    assert set(edges) == set(expected)
    for epsilon, (low, high) in expected.items():
        assert np.isclose([min(edges[epsilon]), max(edges[epsilon])], [low, high]).all()


def planted(row: robustness.Row, **states: Any) -> Any:
    points = [{"epsilon": e, "accuracy": 0.9 - 0.4 * e} for e in (0.0, 36 / 255, 0.5, 1.0)]
    certificate = {
        "samples": 64,
        "certified_accuracy": [{"epsilon": e, "accuracy": 0.4} for e in (36 / 255, 8 / 255)],
        "clean_accuracy": 0.9,
        "body_lipschitz": 1.0,
    }
    attacked = {"samples": 64, "robust_accuracy": points, "robust_accuracy_by_loss": {"ce": points}}
    results = {row.certificate: certificate, row.attack: attacked} | states.pop("results", {})
    return SimpleNamespace(result=results.get, failure=lambda cell: None, **states)


def test_a_row_whose_attack_failed_certifies_nothing() -> None:
    scale = Scale("smoke")
    row = make_row("naive", scale, paper_model(scale, "naive"), paper_training(scale, 0.07), margin=0.07)
    whole = planted(row)
    assert "40.0 %" in robustness.summary_table([row], whole)
    assert row.certified_at(whole) == 0.4
    broken = planted(row, results={row.attack: None})
    broken.failure = lambda cell: "a Lipschitz bound is too small" if cell == row.attack else None
    table = robustness.summary_table([row], broken)
    assert "failed" in table
    assert "40.0 %" not in table
    assert row.certified_at(broken) is None
    assert row.certified(broken) is None


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


def test_steps_are_drawn_as_the_paper_draws_them() -> None:
    row = robustness.paper_row(Scale("smoke"), "flexible", 0.07)
    steps = {"steps": [{"block": "1", "values": {"h1": 1.0, "h2": -0.4}}]}
    (axes,) = steps_figure([row], SimpleNamespace(result={row.training: steps}.get)).axes
    lines = [line for line in axes.lines if len(line.get_xdata())]
    segments = [tuple(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2]
    assert segments == [(0.0, -0.4), pytest.approx((-0.4, 0.6))]
    marks = [(line.get_marker(), float(line.get_xdata()[0])) for line in lines if len(line.get_xdata()) == 1]
    assert [marker for marker, _ in marks] == ["o", "D", "o", "D"]
    assert [place for _, place in marks] == pytest.approx([0.0, -0.4, -0.4, 0.6])


def test_the_note_says_what_was_attacked() -> None:
    assert "3 steps" in attack_note(Scale("smoke"))
    assert "10 steps" in attack_note(Scale("paper"))
    assert "attacked no further" in attack_note(Scale("cpu"))
    assert "attacked no further" not in attack_note(Scale("paper"))


def test_rows_of_both_data_sets_can_be_told_apart(tmp_path: Path) -> None:
    scale = Scale("cpu", tmp_path, tmp_path)
    rows = robustness.paper_rows(scale, [0.07])
    store = SimpleNamespace(result=lambda cell: None, failure=lambda cell: None)
    for table in (robustness.summary_table(rows, store), robustness.curve_table(rows, store)):
        names = [tuple(line.split("|")[1:5]) for line in table.splitlines()[2:]]
        assert len(names) == len(set(names))
