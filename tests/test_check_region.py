"""check_region: every registered region passes, and regions that allow or promise too much are caught."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, PropertyViolated
from dynablocks.switching import REGIONS, PrescribedSignal, Region, TightRegion
from dynablocks.testing import check_region


def regions() -> list[Region]:
    made = []
    for name in sorted(REGIONS):
        for slope, substeps in ((0.5, 1), (0.5, 2), (0.0, 1), (1.0, 1)):
            try:
                made.append(REGIONS[name](slope, substeps))
            except InvalidArgument:
                assert substeps > 1
    return made


@pytest.mark.parametrize("region", regions(), ids=lambda r: f"{type(r).__name__}-a{r.slope}-S{r.substeps}")
def test_every_registered_region_passes(region: Region) -> None:
    assert len(check_region(region).require().findings) == 6


class Greedy(TightRegion):
    """It allows what its own constant forbids."""

    def limit(self, first: float) -> float:
        return 10 * first


class Flattering(TightRegion):
    """Its constant is 10 % too small everywhere."""

    def pair_constant(self, first, second):
        return 0.9 * super().pair_constant(first, second)


class Generous(TightRegion):
    """It allows one per cent too much, and its constant stops at 1."""

    def limit(self, first: float) -> float:
        return 1.01 * super().limit(first) + 0.01

    def pair_constant(self, first, second):
        value = super().pair_constant(first, second)
        return value.clamp_max(1.0) if isinstance(value, Tensor) else min(value, 1.0)


class OfOtherSteps(TightRegion):
    """Its constant is that of Euler steps, where exact flows expand more."""

    method = "exact"


class Loose(TightRegion):
    """It projects nothing."""

    def project(self, first: float, second: float) -> tuple[float, float]:
        return first, second


class Restless(TightRegion):
    """It moves what lies inside."""

    def project(self, first: float, second: float) -> tuple[float, float]:
        first, second = super().project(first, second)
        return first, 0.5 * second


class WithoutGradient(TightRegion):
    """Its constant is a number for tensors too."""

    def pair_constant(self, first, second) -> float:
        return float(super().pair_constant(first, second))


class Detached(TightRegion):
    """Its constant is a tensor that no gradient goes through."""

    def pair_constant(self, first, second):
        value = super().pair_constant(first, second)
        return value.detach() if isinstance(value, Tensor) else value


class OfTheFirstStep(TightRegion):
    """Its constant has no gradient in h₂."""

    def pair_constant(self, first, second):
        return super().pair_constant(first, second.detach() if isinstance(second, Tensor) else second)


class Capped(TightRegion):
    """Its constant stops at 1, so that no budget and no penalty sees a pair that expands."""

    def pair_constant(self, first, second):
        value = super().pair_constant(first, second)
        return value.clamp_max(1.0) if isinstance(value, Tensor) else min(value, 1.0)


class CostsNothing(TightRegion):
    """Its constant is right, and its logarithm 0."""

    def log_constant(self, first, second):
        return 0 * super().log_constant(first, second)


class Unasked(TightRegion):
    """Its constant stops at 1 for tensors, which the penalty alone reads."""

    def pair_constant(self, first, second):
        value = super().pair_constant(first, second)
        return value.clamp_max(1.0) if isinstance(value, Tensor) else value


class BetweenGridPoints(TightRegion):
    """It allows too much but at each quarter of its range."""

    def limit(self, first: float) -> float:
        low, high = self.first_range
        return super().limit(first) + 0.2 * math.sin(4 * math.pi * (first - low) / (high - low)) ** 2


class Sinking(TightRegion):
    """It lets h₂ fall to where the step overshoots: |1 − 4| = 3."""

    @property
    def second_low(self) -> float:
        return -4.0


class OfOneSlope(TightRegion):
    """For h₂ < 0 it credits an expansive field without a flat side, which a ReLU has."""

    @property
    def second_low(self) -> float:
        return -1.0

    def pair_constant(self, first, second):
        value, alone = super().pair_constant(first, second), self._credited(first) * abs(1 + 0.5 * second)
        if isinstance(value, Tensor):
            return torch.where(second < 0, alone, value)
        return alone if second < 0 else value


BLOCKS = ("declared constant", "measured constant")


@pytest.mark.parametrize(
    ("twin", "failed"),
    [
        (Greedy, ("pair constant",)),
        (Flattering, BLOCKS),
        (Generous, BLOCKS),
        (OfOtherSteps, BLOCKS),
        (Loose, ("projection",)),
        (Restless, ("projection",)),
        (WithoutGradient, ("pair constant of tensors",)),
        (Detached, ("pair constant of tensors",)),
        (OfTheFirstStep, ("pair constant of tensors",)),
        (Capped, BLOCKS),
        (CostsNothing, BLOCKS),
        (Unasked, ("pair constant of tensors",)),
        (BetweenGridPoints, ("pair constant",)),
        (Sinking, ("pair constant",)),
        (OfOneSlope, BLOCKS),
    ],
)
def test_broken_twins_are_caught(twin: type[TightRegion], failed: tuple[str, ...]) -> None:
    assert check_region(twin(0.5)).failed == failed


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        (lambda first: math.inf, r"limit\(0\) is inf; a finite number is needed"),
        (lambda first: -5.0, "no pair of a grid lies in it"),
        (lambda first: 1 / first, "it raised ZeroDivisionError"),
    ],
)
def test_a_limit_that_is_none_gets_a_sentence(limit, sentence: str) -> None:
    class Odd(TightRegion):
        def limit(self, first: float) -> float:
            return limit(first)

    with pytest.raises(PropertyViolated, match=f"Odd fails the check 'limit': .*{sentence}"):
        check_region(Odd(0.5)).require()


@pytest.mark.parametrize(("given", "shown"), [("tight", "'tight'"), (TightRegion, "the class TightRegion")])
def test_what_is_no_region_is_refused(given: object, shown: str) -> None:
    for take in (check_region, PrescribedSignal):
        with pytest.raises(InvalidArgument, match=f"region is {shown}; an instance is needed, such as TightRegion"):
            take(given)


def test_it_leaves_random_numbers_and_gradients_as_they_are() -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        assert check_region(TightRegion(0.5)).passed
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_region_allows_too_much_between_the_points_of_a_grid_costs_what_its_own_constant_says() -> None:
    """The twin: nothing at quarters of [0, 2], and 0.2 at h₁ = 1/4, where L₁ = 7/8 and the limit is 1/7."""
    region, twin = TightRegion(0.5), BetweenGridPoints(0.5)
    for first in (0.0, 0.5, 1.0, 1.5, 2.0):
        assert twin.limit(first) == pytest.approx(region.limit(first), rel=0, abs=1e-12)
    assert twin.pair_constant(0.25, twin.limit(0.25)) == pytest.approx(1.175, rel=1e-12, abs=0)
    for seed in range(5):
        assert check_region(twin, seed=seed).failed == ("pair constant",)
