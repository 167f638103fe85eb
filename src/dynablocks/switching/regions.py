"""Feasible regions for pairs of steps (h₁ contractive, h₂ expansive) that do not expand for orthonormal A."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.registry import Registry

Number = TypeVar("Number", float, Tensor)
"""A float or a tensor: one formula serves projections and differentiable penalties."""

_TINY = 1e-300


def require_region(region: object) -> Region:
    """A region itself.

    Raises:
        InvalidArgument: it is something else, as a name or a class.

    Example:
        >>> require_region("tight")
        Traceback (most recent call last):
        ...
        dynablocks.errors.InvalidArgument: region is 'tight'; an instance is needed, such as TightRegion(0.5, 2).
    """
    if not isinstance(region, Region):
        shown = f"the class {region.__name__}" if isinstance(region, type) else repr(region)
        raise InvalidArgument(f"region is {shown}; an instance is needed, such as TightRegion(0.5, 2).")
    return region


def _at_least(value: Number, low: float) -> Number:
    return value.clamp_min(low) if isinstance(value, Tensor) else max(value, low)


def _larger(a: Number, b: Number) -> Number:
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)


def _sqrt(value: Number) -> Number:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _exp(value: Number) -> Number:
    return value.exp() if isinstance(value, Tensor) else math.exp(value)


def _log(value: Number) -> Number:
    return value.log() if isinstance(value, Tensor) else math.log(value)


@dataclass(frozen=True)
class Region:
    r"""A set {h₁ in [low₁, high₁], low₂ <= h₂ <= limit(h₁)} of step pairs.

    Condition: A₁ᵀA₁ = I in the contractive field and ‖A₂‖ <= 1 in the expansive one; otherwise a pair may expand, and
    the block declares what it has. For Euler steps of any A there is :class:`dynablocks.switching.NonExpansivePair`.

    A subclass gives :meth:`limit`, the largest expansive step beside a contractive step h₁, the range of each step and
    :meth:`pair_constant`, which takes floats or float64 tensors. :func:`dynablocks.testing.check_region` holds it to
    that.

    Attributes:
        slope: a, the smaller slope of σ.
        substeps: S; each step is taken as S steps of size h/S.
        contractive_parts: in how many equal parts the contractive step of each of the S pairs is taken.
        method: the registry name of the integrator whose steps :meth:`pair_constant` bounds; named models take it.
    """

    contractive_parts: ClassVar[int] = 1
    method: ClassVar[str] = "euler"

    slope: float = 0.5
    substeps: int = 1

    def __post_init__(self) -> None:
        require_range("slope", self.slope, 0.0, 1.0)
        object.__setattr__(self, "substeps", require_whole("substeps", self.substeps, 1))

    @property
    def first_range(self) -> tuple[float, float]:
        """The range of h₁."""
        raise NotImplementedError(f"{type(self).__name__} must have a property first_range: (low, high), those of h₁.")

    @property
    def second_low(self) -> float:
        """The smallest h₂."""
        return 0.0

    def limit(self, first: float) -> float:
        """The largest h₂ beside h₁ = ``first``."""
        raise NotImplementedError(f"{type(self).__name__} must implement limit(first): the largest h₂ beside h₁.")

    def pair_constant(self, first: Number, second: Number) -> Number:
        """A bound on the pair's Lipschitz constant, which the region keeps at or below 1.

        It holds above the limit, too, where :class:`dynablocks.switching.NetworkBudget` and penalties read what a pair
        costs.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement pair_constant(first, second): a Lipschitz constant of the steps "
            "h₁/S and h₂/S, one after the other, of floats or of float64 tensors."
        )

    def log_constant(self, first: Number, second: Number) -> Number:
        """log of the bound on the whole block's Lipschitz constant: S times the pair; differentiable for tensors."""
        return self.substeps * _log(_at_least(self.pair_constant(first, second), _TINY))

    def contains(self, first: float, second: float, slack: float = 0.0) -> bool:
        """Whether (h₁, h₂) lies in the region, up to ``slack``."""
        low, high = self.first_range
        inside = low - slack <= first <= high + slack and second >= self.second_low - slack
        return bool(inside and second <= self.limit(min(max(first, low), high)) + slack)

    def project(self, first: float, second: float) -> tuple[float, float]:
        """The paper's projection: clamp h₁ to its range, then h₂ to what h₁ allows; the region stays as it is."""
        low, high = self.first_range
        first = min(max(first, low), high)
        return first, min(max(second, self.second_low), max(self.limit(first), self.second_low))

    def boundary(self, points: int = 400) -> np.ndarray:
        """Points (points, 2) along the upper boundary h₂ = limit(h₁), for plots."""
        grid = np.linspace(*self.first_range, points)
        return np.stack([grid, [self.limit(float(h)) for h in grid]], axis=1)


REGIONS: Registry[type[Region]] = Registry("region")


def tight_contraction(step_size: Number, slope: float) -> Number:
    """L₁ = max(|1 − h|, |1 − ah|): the constant of x − hAᵀΣ(Ax + b) for orthogonal A."""
    return _larger(abs(1 - step_size), abs(1 - slope * step_size))


@REGIONS.register("paper-prescribed")
@dataclass(frozen=True)
class PaperPrescribedRegion(Region):
    r"""(1 + h₂/S) √(1 − 2(h₁/S)a + (h₁/S)²) <= 1, 0 <= h₁, h₂ <= S (paper (3.10)); for a = 0 only h₁ = 0 is left."""

    @property
    def first_range(self) -> tuple[float, float]:
        return 0.0, float(self.substeps) * min(1.0, 2 * self.slope)

    def limit(self, first: float) -> float:
        return max(0.0, self.substeps * (1 / self._credited(first) - 1))

    def pair_constant(self, first: Number, second: Number) -> Number:
        return (1 + second / self.substeps) * self._credited(first)

    def _credited(self, first: Number) -> Number:
        return _at_least(self._contraction(first / self.substeps), 0.5)

    def _contraction(self, step_size: Number) -> Number:
        # Not 0, where the root has no slope.
        return _sqrt(_at_least(1 - 2 * step_size * self.slope + step_size * step_size, _TINY))


@REGIONS.register("paper-flexible")
@dataclass(frozen=True)
class PaperFlexibleRegion(Region):
    r"""(1 + h₂)(1 − h₁a + h₁²/4) <= 1 for h₂ > 0, with 0.11 <= h₁ <= 1.9 and −1.9 <= h₂ (paper appendix C).

    The contractive step is taken as two halves, the other one whole. For h₂ <= 0 both maps are non-expansive on their
    own. Beyond h₁ = 4a the first factor exceeds 1, so h₁ is capped there too.

    Raises:
        InvalidArgument: ``substeps`` is not 1.
    """

    contractive_parts: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.substeps != 1:
            raise InvalidArgument(
                f"substeps is {self.substeps}; (3.12) halves the contractive step once, so it must be 1."
            )

    @property
    def first_range(self) -> tuple[float, float]:
        return min(0.11, 4 * self.slope), min(1.9, 4 * self.slope)

    @property
    def second_low(self) -> float:
        return -1.9

    def limit(self, first: float) -> float:
        return max(0.0, 1 / (1 - first * self.slope + first * first / 4) - 1)

    def pair_constant(self, first: Number, second: Number) -> Number:
        balanced = (1 + second) * (1 - first * self.slope + first * first / 4)
        alone = _at_least(abs(1 + second), 1.0)
        if isinstance(second, Tensor):
            return torch.where(second > 0, balanced, alone)
        return balanced if second > 0 else alone


@REGIONS.register("tight")
@dataclass(frozen=True)
class TightRegion(Region):
    r"""L₁(h₁/S)(1 + h₂/S) <= 1 with L₁(h) = max(|1 − h|, |1 − ah|); h₂ in [−2S, 0] needs no balance (design D2.2–D2.3).

    With the contractive step in p parts L₁(h₁/S) is L₁(h₁/(Sp))ᵖ. It is taken to be at least 0.001: as a → 1 it
    vanishes at h₁ = Sp, and no stored A is orthogonal enough for h₂ = ∞.
    """

    @property
    def first_range(self) -> tuple[float, float]:
        return 0.0, 2.0 * self.substeps * self.contractive_parts

    @property
    def second_low(self) -> float:
        return -2.0 * self.substeps

    def limit(self, first: float) -> float:
        return self.substeps * (1 / self._credited(first) - 1)

    def pair_constant(self, first: Number, second: Number) -> Number:
        # At least 1 also for h₂ < 0: the other field's σ may be a ReLU, which leaves half of the space alone.
        expansion = _at_least(abs(1 + second / self.substeps), 1.0)
        return self._credited(first) * expansion

    def _credited(self, first: Number) -> Number:
        # No stored A contracts to 0: its singular values are 1 up to rounding only.
        return _at_least(self._contraction(first), 1e-3)

    def _contraction(self, first: Number) -> Number:
        part = first / (self.substeps * self.contractive_parts)
        return tight_contraction(part, self.slope) ** self.contractive_parts


@REGIONS.register("tight-halves")
@dataclass(frozen=True)
class TightHalvesRegion(TightRegion):
    r"""L₁(h₁/2S)²(1 + h₂/S) <= 1: the tight region of the paper's flexible step, whose h₁ is taken in two halves.

    For a = 1/2 it allows h₂ up to 8 (at h₁ = 8/3) where the paper's appendix C stops at 1/3 (at h₁ = 1).

    Example:
        >>> round(TightHalvesRegion(0.5).limit(8 / 3), 6)
        8.0
    """

    contractive_parts: ClassVar[int] = 2


@REGIONS.register("exact")
@dataclass(frozen=True)
class ExactFlowRegion(Region):
    r"""h₂ <= a h₁, h₁ in [0, 4]: exact flows with L = e^{−ah₁} and e^{h₂} (D2.4); h₂ in [−4, 0] needs no balance."""

    method: ClassVar[str] = "exact"

    @property
    def first_range(self) -> tuple[float, float]:
        return 0.0, 4.0

    @property
    def second_low(self) -> float:
        return -4.0

    def limit(self, first: float) -> float:
        return self.slope * first

    def pair_constant(self, first: Number, second: Number) -> Number:
        return _exp(self.log_constant(first, second) / self.substeps)

    def log_constant(self, first: Number, second: Number) -> Number:
        return _at_least(second, 0.0) - self.slope * first
