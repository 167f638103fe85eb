"""The figure of the gap between attacks and certificates, of results that are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from dynablocks.experiments import robustness
from dynablocks.experiments.base import Scale
from dynablocks.experiments.robustness import make_row, paper_model, paper_training
from dynablocks.experiments.robustness_figures import gap_figure
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
    monkeypatch.setattr(robustness, "stored_certificate", lambda cell, store: result)
    (axes,) = (a for a in gap_figure([row], SimpleNamespace(result=results.get)).axes if a.get_visible())
    (shaded,) = (c for c in axes.collections if isinstance(c, PolyCollection))
    edges: dict[float, set[float]] = {}
    for x, y in shaded.get_paths()[0].vertices:
        edges.setdefault(round(float(x), 9), set()).add(round(float(y), 9))
    expected = {0.0: (100, 100), 0.1: (50, 90), 0.2: (0, 80), 0.5: (0, 50), 1.0: (0, 25)}
    assert set(edges) == set(expected)
    for epsilon, (low, high) in expected.items():
        assert np.isclose([min(edges[epsilon]), max(edges[epsilon])], [low, high]).all()
