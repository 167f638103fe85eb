"""Errors that a person can act on: one sentence that says what, what came, what is allowed, what to do."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Sequence

OUT_OF_MEMORY = "out of memory|can't allocate memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
"""How a RuntimeError of torch says so, on a GPU, on a CPU and of the GPU's libraries."""


class DynablocksError(Exception):
    """Something the user gave cannot be used; the command line prints the sentence and exits with 2."""


class InvalidArgument(DynablocksError, ValueError):
    """An argument is out of its range, of the wrong shape or not known."""


class BadData(DynablocksError, ValueError):
    """A data set or a file's content cannot be used."""


class BadCheckpoint(DynablocksError, RuntimeError):
    """A run directory is missing, incomplete, corrupt or was made by something else."""


class UnsoundResult(DynablocksError, AssertionError):
    """A certificate and an attack contradict each other: a bug in a bound, never to be reported as a result."""


class PropertyViolated(DynablocksError, AssertionError):
    """A measured property contradicts the declared one."""


class Diverged(DynablocksError, ArithmeticError):
    """A training whose loss or weights left the finite numbers."""


class NotConverged(DynablocksError, ArithmeticError):
    """The equation of an implicit step has no solution near its start, or the solver did not find it."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InvalidArgument:
    """The error for an unknown registry name, the nearest known one first.

    Example:
        >>> print(unknown_name("field", "gradiant", ["sphere", "gradient"]))
        unknown field 'gradiant'; did you mean 'gradient'? Known: gradient, sphere.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    rest = [*near, *(n for n in names if n not in near)]
    return InvalidArgument(f"unknown {kind} {str(name)!r}{hint} Known: {', '.join(rest)}.")


def require_finite(name: str, value: float) -> float:
    """``value`` when it is a finite number, otherwise :class:`InvalidArgument`."""
    try:
        finite = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError as error:
        raise InvalidArgument(f"{name} is a whole number of more than 308 digits; give a smaller one.") from error
    if not finite:
        raise InvalidArgument(f"{name} is {value!r}; a finite number is needed.")
    return float(value)


def require_whole(name: str, value: int, low: int | None = None, high: int | None = None) -> int:
    """``value`` as a Python int when it is a whole number from ``low`` to ``high``, otherwise :class:`InvalidArgument`.

    Example:
        >>> require_whole("substeps", True, 1)
        Traceback (most recent call last):
        dynablocks.errors.InvalidArgument: substeps is True; a whole number from 1 is needed.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        long = number is not None and abs(number) >= 10**308
        shown = "a whole number of more than 308 digits" if long else repr(value)
        limits = ("" if low is None else f" from {low}") + ("" if high is None else f" to {high}")
        raise InvalidArgument(f"{name} is {shown}; a whole number{limits} is needed.")
    return number


UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What PyYAML raises of texts that are none, beside its own errors: of ``!!bool x``, of a date that never was."""


def require_range(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> float:
    """``value`` when low <= value <= high (low < value with ``open_low``), otherwise :class:`InvalidArgument`."""
    require_finite(name, value)
    if value < low or value > high or (open_low and value == low):
        bracket = "(" if open_low or low == -math.inf else "["
        closing = ")" if high == math.inf else "]"
        raise InvalidArgument(f"{name} is {value!r}; allowed are values in {bracket}{low:g}, {high:g}{closing}.")
    return value


def require_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """``value`` when it is one of ``choices``, otherwise :class:`InvalidArgument` that names them.

    Example:
        >>> require_choice("precision", 32, ["auto", "32"])
        Traceback (most recent call last):
        dynablocks.errors.InvalidArgument: precision is 32; text is needed, such as '32'.
    """
    options = list(choices)
    if not isinstance(value, str):
        like = str(value) if str(value) in options else options[0]
        raise InvalidArgument(f"{name} is {value!r}; text is needed, such as {like!r}.")
    if value not in options:
        raise unknown_name(name, value, options)
    return value


def require_sizes(name: str, shape: Sequence[int], rank: int | None = None) -> tuple[int, ...]:
    """``shape`` when it is a sequence of ``rank`` positive sizes (one or more without), otherwise an error.

    Raises:
        InvalidArgument: it is something else.

    Example:
        >>> require_sizes("in_shape", 3, 3)
        Traceback (most recent call last):
        dynablocks.errors.InvalidArgument: in_shape is 3; 3 positive sizes are needed, such as (3, 32, 32).
    """
    listed = isinstance(shape, Sequence) and not isinstance(shape, str)
    counted = listed and (len(shape) == rank if rank else len(shape) > 0)
    if not counted or any(not isinstance(size, int) or size < 1 for size in shape):
        shown = tuple(shape) if listed else shape
        if rank:
            raise InvalidArgument(
                f"{name} is {shown!r}; {rank} positive sizes are needed, such as {(3, *(32,) * (rank - 1))}."
            )
        raise InvalidArgument(f"{name} is {shown!r}; a tuple of positive sizes is needed, such as (3,) or (3, 32, 32).")
    return tuple(shape)
