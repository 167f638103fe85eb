from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from dynablocks.errors import InvalidArgument
from dynablocks.experiments.reference import paper_results
from dynablocks.robustness import PAPER_EPSILONS, Curve, auc

RESULTS = paper_results()
EPSILONS = RESULTS["epsilons"]
PUBLISHED = {
    f"{data} {network} {margin}": (row["robust_accuracy"], row["auc"])
    for data, networks in RESULTS["datasets"].items()
    for network, margins in networks.items()
    for margin, row in margins.items()
}
"""The accuracies of the paper's thirty networks, and the area below them that it prints with four digits."""


def test_the_published_table_is_whole() -> None:
    assert len(PUBLISHED) == 30
    assert pytest.approx(EPSILONS, abs=1e-15) == list(PAPER_EPSILONS)
    assert PUBLISHED["cifar10 switch_flexible 0.07"][1] == 0.6802
    assert PUBLISHED["cifar100 non_expansive 0.3"][1] == 0.367


@pytest.mark.parametrize("name", PUBLISHED)
def test_area_is_the_published_one(name):
    accuracies, published = PUBLISHED[name]
    assert auc(EPSILONS, accuracies) == pytest.approx(published, abs=5.1e-5)


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


def test_intervals_have_the_level_that_is_asked_for() -> None:
    curve = Curve((0.0,), (0.5,), samples=40)
    expected = binomtest(20, 40).proportion_ci(0.5, method="wilson")
    ((low, high),) = curve.confidence_interval(0.5)
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0, abs=1e-12)
    with pytest.raises(InvalidArgument, match="level is 1;"):
        curve.confidence_interval(level=1)


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
