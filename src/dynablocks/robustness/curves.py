"""Accuracy-epsilon curves: area and confidence intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from dynablocks.errors import InvalidArgument, require_range, require_whole

PAPER_EPSILONS = (0.0, 8 / 255, 16 / 255, 36 / 255, 0.3, 0.5, 0.6, 0.8, 1.0)


def checked_epsilons(epsilons: Sequence[float]) -> tuple[float, ...]:
    """The radii as floats, at least one, finite, not negative, strictly increasing; else :class:`InvalidArgument`.

    Example:
        >>> checked_epsilons([0, 0.5])
        (0.0, 0.5)
    """
    if len(epsilons) == 0:
        raise InvalidArgument("epsilons is empty; give at least one radius such as 0.141.")
    values = tuple(float(require_range("epsilon", value, 0.0)) for value in epsilons)
    if any(b <= a for a, b in itertools.pairwise(values)):
        raise InvalidArgument(f"epsilons are {list(values)}; give each once, in increasing order.")
    return values


def auc(epsilons: Sequence[float], accuracies: Sequence[float]) -> float:
    """Area below the piecewise linear accuracy-epsilon curve.

    ``sum_k (epsilon_{k+1} - epsilon_k) (accuracy_k + accuracy_{k+1}) / 2``, not normalised: on the paper's range,
    0 to 1, it is at most 1; on a longer range it can be more.

    Args:
        epsilons: increasing l2 radii in pixel units [0, 1].
        accuracies: fractions in [0, 1], one a radius.

    Raises:
        InvalidArgument: fewer than two points, lengths that differ, or values out of range.

    Source:
        Celledoni et al., arXiv 2210.02373, section 3.3.

    Example:
        >>> auc([0.0, 0.5, 1.0], [1.0, 0.5, 0.0])
        0.5
    """
    curve = Curve(tuple(epsilons), tuple(accuracies), samples=1)
    if len(curve.epsilons) < 2:
        raise InvalidArgument("an area needs at least two epsilons; one was given.")
    points = list(zip(curve.epsilons, curve.accuracies, strict=True))
    return math.fsum((b - a) * (u + v) / 2 for (a, u), (b, v) in itertools.pairwise(points))


@dataclass(frozen=True)
class Curve:
    """Accuracy at each epsilon, measured on ``samples`` images.

    Args:
        epsilons: increasing l2 radii in pixel units [0, 1].
        accuracies: fractions in [0, 1], one a radius.
        samples: how many images stand behind each fraction.

    Raises:
        InvalidArgument: lengths that differ or values out of range.

    Example:
        >>> curve = Curve((0.0, 1.0), (0.8, 0.2), samples=100)
        >>> curve.auc
        0.5
        >>> low, high = curve.confidence_interval()[0]
        >>> round(low, 3), round(high, 3)
        (0.711, 0.867)
    """

    epsilons: tuple[float, ...]
    accuracies: tuple[float, ...]
    samples: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilons", checked_epsilons(self.epsilons))
        values = tuple(float(require_range("accuracy", value, 0.0, 1.0)) for value in self.accuracies)
        object.__setattr__(self, "accuracies", values)
        if len(self.epsilons) != len(values):
            raise InvalidArgument(
                f"there are {len(self.epsilons)} epsilons and {len(values)} accuracies; one a radius."
            )
        object.__setattr__(self, "samples", require_whole("samples", self.samples, 1))

    @property
    def auc(self) -> float:
        """Area below the curve; see :func:`auc`."""
        return auc(self.epsilons, self.accuracies)

    def confidence_interval(self, level: float = 0.95) -> tuple[tuple[float, float], ...]:
        """Wilson score interval of each accuracy.

        ``(p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`` with z the normal quantile of ``level``.

        Source:
            Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212.
        """
        if not 0 < level < 1:
            raise InvalidArgument(f"level is {level!r}; allowed are values in (0, 1) such as 0.95.")
        z, n = NormalDist().inv_cdf((1 + level) / 2), self.samples
        intervals = []
        for p in self.accuracies:
            centre = p + z * z / (2 * n)
            half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
            low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
            intervals.append((min(max(low, 0.0), p), max(min(high, 1.0), p)))
        return tuple(intervals)

    def at(self, epsilons: Sequence[float]) -> Curve:
        """The curve at some of its own epsilons; at :data:`PAPER_EPSILONS` its area compares with the paper's."""
        known = dict(zip(self.epsilons, self.accuracies, strict=True))
        missing = [value for value in epsilons if value not in known]
        if missing:
            raise InvalidArgument(f"epsilon {missing[0]:g} was not measured; measured are {list(self.epsilons)}.")
        return Curve(tuple(epsilons), tuple(known[value] for value in epsilons), self.samples)

    def points(self) -> list[dict[str, float]]:
        """``[{"epsilon": ..., "accuracy": ...}, ...]``, as in ``metrics.json``."""
        return [{"epsilon": e, "accuracy": a} for e, a in zip(self.epsilons, self.accuracies, strict=True)]
