"""How numbers are written for a person: percentages, radii, bounds, times; what is missing is said in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from fractions import Fraction
from typing import Any

NOT_MEASURED = "not measured"
LEVEL_TOLERANCE = 1e-4
"""Of a proved radius in levels of 255: so little above a whole number it is shown as one."""
_ROUNDED_LEVEL = 1e-9
"""Of a chosen radius in levels of 255: rounding takes k/255 less far from k; what is further off is another radius."""
LEAST_EXCESS = 1e-6
"""A bound that exceeds 1 by less is written as 1 and its excess: six decimals do not show it."""


def percent(value: float | None) -> str:
    """A fraction as a percentage.

    Example:
        >>> percent(0.6234), percent(None)
        ('62.3 %', 'not measured')
    """
    return NOT_MEASURED if _missing(value) else f"{100 * float(value or 0):.1f} %"


def proved_percent(value: float | None, decimals: int = 1) -> str:
    """A fraction of which something is proved as a percentage, rounded down: never all where one is missing.

    The fraction is the number that it is written as, so that 7 of 10 are 70 %, which no float is ten tenths of.

    Args:
        value: the fraction.
        decimals: of the percentage.

    Example:
        >>> proved_percent(0.9996), proved_percent(0.7), proved_percent(1.0), proved_percent(None)
        ('99.9 %', '70.0 %', '100.0 %', 'not measured')
    """
    return NOT_MEASURED if _missing(value) else f"{_points(float(value or 0), ROUND_FLOOR, decimals)} %"


def _points(share: float, direction: str, decimals: int = 1) -> Decimal:
    """100 times the number that a fraction is written as, rounded to the side asked for."""
    return (100 * Decimal(str(share))).quantize(Decimal(1).scaleb(-decimals), direction)


def several(number: float, noun: str) -> str:
    """A number with its noun, in the plural unless it is one.

    Example:
        >>> several(1, "epoch"), several(0.25, "epoch"), several(1200, "cell")
        ('1 epoch', '0.25 epochs', '1,200 cells')
    """
    shown = f"{number:,}" if isinstance(number, int) else f"{number:.4g}"
    return f"{shown} {noun}" if shown == "1" else f"{shown} {noun}s"


def interval(low: float, high: float) -> str:
    """A confidence interval of a fraction, rounded outwards: what is shown holds all of it.

    Example:
        >>> interval(0.61, 0.634), interval(0.6109, 0.63401)
        ('61.0 to 63.4 %', '61.0 to 63.5 %')
    """
    return f"{_points(low, ROUND_FLOOR)} to {_points(high, ROUND_CEILING)} %"


def radius(value: float) -> str:
    """An l2 radius in pixel units, and in levels of 255 where that is a whole number.

    Of a radius that was chosen; one that was proved is written by :func:`proved_radius`, one that an attack found by
    :func:`found_radius`.

    Example:
        >>> radius(36 / 255), radius(0.5), radius(0.19962)
        ('0.141 (36/255)', '0.5', '0.19962')
    """
    levels = 255 * value
    if 0.5 < levels < 254.5 and abs(levels - round(levels)) < _ROUNDED_LEVEL:
        return f"{value:.3f} ({round(levels)}/255)"
    return f"{value:.6g}"


def proved_radius(value: float) -> str:
    """A radius within which something is proved, rounded down: no number that is shown lies above it.

    Example:
        >>> proved_radius(0.19962), proved_radius(0.2), proved_radius(35.99995 / 255), proved_radius(1e-7)
        ('0.199', '0.200 (51/255)', '0.141', '9.99e-08')
    """
    levels = 255 * Fraction(value) if math.isfinite(value) else Fraction(0)
    level = math.floor(levels)
    if 1 <= level < 255 and levels - level < LEVEL_TOLERANCE:
        return f"{Decimal(value).quantize(Decimal('0.001'), ROUND_FLOOR)} ({level}/255)"
    return _digits(value, 3, ROUND_FLOOR)


def found_radius(value: float) -> str:
    """The length of a perturbation that was found, rounded up: nothing is shown below it.

    Example:
        >>> found_radius(0.3101), found_radius(0.31)
        ('0.311', '0.31')
    """
    return _digits(value, 3, ROUND_CEILING)


def _digits(value: float, digits: int, direction: str) -> str:
    """The exact number, rounded to so many digits on the side asked for."""
    if not math.isfinite(value):
        return "∞" if value > 0 else NOT_MEASURED
    exact = Decimal(value)
    last_digit = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{float(exact.quantize(last_digit, direction)):.{digits}g}"


def bound(value: float | None) -> str:
    """An upper Lipschitz bound, rounded up; ``None`` or infinite is no bound at all.

    By how much a bound that is 1 but for rounding exceeds it is written out: 1.000001 would be far above.

    Example:
        >>> bound(1.0), bound(1 + 3.11e-11), bound(34.5649), bound(None)
        ('1.000000', '1 + 3.2e-11', '34.57', 'no finite bound')
    """
    if value is None or math.isinf(value):
        return "no finite bound"
    if 1 < value < 1 + LEAST_EXCESS:
        return f"1 + {_digits(value - 1, 2, ROUND_CEILING)}"
    return _constant(value, ROUND_CEILING)


def measured_bound(value: float) -> str:
    """A lower bound of a Lipschitz constant, as a measurement is one, rounded down.

    Example:
        >>> measured_bound(0.9999999), measured_bound(34.5649), measured_bound(math.nan)
        ('0.999999', '34.56', 'not measured')
    """
    return _constant(value, ROUND_FLOOR)


def _constant(value: float, direction: str) -> str:
    """Six decimals near 1, so that a constant is told from 1; otherwise four digits."""
    if 0.1 <= value < 10:
        return str(Decimal(value).quantize(Decimal("0.000001"), direction))
    return _digits(value, 4, direction)


def body_bound(metrics: Mapping[str, Any]) -> str:
    """The Lipschitz bound of ``metrics.json``, which only a certificate knows.

    Example:
        >>> body_bound({"certified_accuracy": None, "lipschitz_bound": None})
        'not certified'
    """
    return "not certified" if metrics.get("certified_accuracy") is None else bound(metrics.get("lipschitz_bound"))


def area(metrics: Mapping[str, Any]) -> str:
    """The area under the attacked curve of ``metrics.json``, or why there is none.

    Example:
        >>> area({"auc": 0.6712}), area({"auc": None, "robust_accuracy": None})
        ('0.671', 'not attacked')
    """
    if metrics.get("auc") is not None:
        return f"{metrics['auc']:.3f}"
    return "attacked at one radius only" if metrics.get("robust_accuracy") else "not attacked"


def slack(value: float) -> str:
    """By how much a bound exceeds its measurement.

    Example:
        >>> slack(0.254), slack(3e-9), slack(float("inf"))
        ('25.4 %', 'below 0.01 %', 'unlimited')
    """
    if math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "unlimited"
    if value < -1e-6:
        return f"{100 * value:.4g} % (VIOLATED)"
    if value < 1e-4:
        return "below 0.01 %"
    return f"{100 * value:.1f} %" if value < 10 else f"{value + 1:.3g} times"


def duration(seconds: float | None) -> str:
    """A time span in the unit a person would use.

    Example:
        >>> duration(45.2), duration(2530), duration(7300)
        ('45 s', '42 min 10 s', '2 h 1 min')
    """
    if _missing(seconds):
        return NOT_MEASURED
    whole = round(float(seconds or 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(value: float | None) -> str:
    """A whole number with thousands apart.

    Example:
        >>> count(1234567)
        '1,234,567'
    """
    return NOT_MEASURED if _missing(value) else f"{round(float(value or 0)):,}"


def accuracy_at(points: Iterable[Mapping[str, Any]] | None, epsilon: float) -> float | None:
    """The accuracy at ``epsilon`` among ``{"epsilon": ..., "accuracy": ...}``; ``None`` when it is not there.

    It must be the same float, as JSON keeps it: what is proved at a smaller radius says nothing of this one, and what
    an attack broke at a larger one may survive here.

    Example:
        >>> accuracy_at([{"epsilon": 0.0, "accuracy": 0.9}], 0.0)
        0.9
    """
    for point in points or ():
        if float(point["epsilon"]) == epsilon:
            return float(point["accuracy"])
    return None


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
