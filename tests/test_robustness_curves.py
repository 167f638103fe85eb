from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from dynablocks.errors import InvalidArgument
from dynablocks.robustness import PAPER_EPSILONS, Curve, auc

EPSILONS = [0.0, 0.03137254901960784, 0.06274509803921569, 0.1411764705882353, 0.3, 0.5, 0.6, 0.8, 1.0]
PUBLISHED = {
    "cifar10 unconstrained_resnet 0.3": (
        [0.914062, 0.888672, 0.858398, 0.791992, 0.582031, 0.347656, 0.239258, 0.094727, 0.040039],
        0.3987,
    ),
    "cifar10 switch_prescribed 0.07": (
        [0.807617, 0.797852, 0.790039, 0.775391, 0.739258, 0.677734, 0.645508, 0.581055, 0.515625],
        0.6719,
    ),
    "cifar10 switch_flexible 0.07": (
        [0.822266, 0.8125, 0.807617, 0.790039, 0.746094, 0.686523, 0.655273, 0.586914, 0.512695],
        0.6802,
    ),
    "cifar100 non_expansive 0.3": (
        [0.537109, 0.524414, 0.512695, 0.484375, 0.426758, 0.363281, 0.333008, 0.273438, 0.208008],
        0.367,
    ),
}
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "paper_results.json"


@pytest.mark.parametrize("name", PUBLISHED)
def test_area_is_the_published_one(name):
    accuracies, published = PUBLISHED[name]
    assert auc(EPSILONS, accuracies) == pytest.approx(published, abs=5.1e-5)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the paper's full table is not beside this checkout")
def test_area_is_the_published_one_in_all_thirty_rows():
    reference = json.loads(REFERENCE.read_text())
    rows = [
        row for networks in reference["datasets"].values() for margins in networks.values() for row in margins.values()
    ]
    assert len(rows) == 30
    assert pytest.approx(reference["epsilons"], abs=1e-15) == list(PAPER_EPSILONS)
    for row in rows:
        assert auc(reference["epsilons"], row["robust_accuracy"]) == pytest.approx(row["auc"], abs=5.1e-5)


def test_a_normalised_or_stepwise_area_would_not_match():
    accuracies, published = PUBLISHED["cifar10 switch_prescribed 0.07"]
    stepwise = float(np.sum(np.diff(EPSILONS) * np.array(accuracies)[:-1]))
    assert abs(stepwise - published) > 1e-3
    assert abs(auc(EPSILONS, accuracies) / accuracies[0] - published) > 1e-3


def test_intervals_are_wilsons():
    curve = Curve((0.0, 0.1, 0.2, 0.3), (1.0, 0.5, 0.1, 0.0), samples=40)
    for accuracy, (low, high) in zip(curve.accuracies, curve.confidence_interval(), strict=True):
        expected = binomtest(round(accuracy * 40), 40).proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert low <= accuracy <= high


def test_a_curve_at_some_of_its_points():
    curve = Curve((0.0, 0.25, 1.0), (1.0, 0.9, 0.0), samples=10)
    assert curve.at((0.0, 1.0)).auc == 0.5
    assert curve.points()[1] == {"epsilon": 0.25, "accuracy": 0.9}
    with pytest.raises(InvalidArgument, match=r"epsilon 0\.3 was not measured"):
        curve.at((0.3,))


@pytest.mark.parametrize(
    ("epsilons", "accuracies"),
    [
        ((), ()),
        ((0.0,), (1.0,)),
        ((0.0, 1.0), (1.0,)),
        ((1.0, 0.0), (1.0, 0.5)),
        ((0.0, 1.0), (1.0, 1.5)),
        ((0.0, 1.0), (1.0, float("nan"))),
        ((-1.0, 1.0), (1.0, 0.5)),
    ],
)
def test_bad_curves_get_one_sentence(epsilons, accuracies):
    with pytest.raises(InvalidArgument):
        auc(epsilons, accuracies)
