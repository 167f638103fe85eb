"""What a module can be guaranteed to be: the property types and how each composes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, TypeVar

from torch import Tensor

from dynablocks.errors import InvalidArgument

P = TypeVar("P", bound="Property")


@dataclass(frozen=True)
class Metric:
    """A norm on the input and output space in which a Lipschitz constant is stated; the Euclidean one by default."""

    name: str = "l2"

    def norm(self, x: Tensor) -> Tensor:
        """‖x‖ for each row of a batch: (batch, …) ↦ (batch,)."""
        return x.flatten(1).norm(dim=1)


EUCLIDEAN = Metric()


@dataclass(frozen=True)
class Property:
    """A guarantee. Two guarantees of one type compose through :meth:`then`."""

    def then(self, following: Self) -> Self | None:
        """The guarantee of "first self, then ``following``", or ``None`` when the composition has none."""
        return self if self == following else None

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class Lipschitz(Property):
    r"""‖f(x) − f(y)‖ ≤ L ‖x − y‖ for all x, y; constants multiply (rounded upwards).

    Example:
        >>> Lipschitz(2.0).then(Lipschitz(0.5)).constant <= 1.0000001
        True
    """

    constant: float
    metric: Metric = EUCLIDEAN

    def __post_init__(self) -> None:
        if math.isnan(self.constant) or self.constant < 0:
            raise InvalidArgument(f"a Lipschitz constant is {self.constant!r}; a number >= 0 (or inf) is needed.")

    def then(self, following: Lipschitz) -> Lipschitz | None:
        if self.metric != following.metric:
            return None
        product = self.constant * following.constant
        if math.isnan(product):
            product = math.inf
        exact = {0.0, 1.0} & {self.constant, following.constant} or product == math.inf
        return Lipschitz(product if exact else math.nextafter(product, math.inf), self.metric)

    def __str__(self) -> str:
        metric = "" if self.metric == EUCLIDEAN else f", {self.metric.name}"
        return f"Lipschitz({self.constant:.9g}{metric})"


@dataclass(frozen=True)
class GradientNormPreserving(Property):
    r"""J(x) J(x)ᵀ = I for almost every x: back-propagated gradients keep their norm."""


@dataclass(frozen=True)
class Invertible(Property):
    r"""``module.inverse(module(x)) == x``; the module has a method ``inverse``."""


@dataclass(frozen=True)
class Symplectic(Property):
    r"""J(x)ᵀ 𝕁 J(x) = 𝕁 with 𝕁 = [[0, I], [−I, 0]] for x = (q, p)."""


@dataclass(frozen=True)
class VolumePreserving(Property):
    r"""|det J(x)| = 1."""


@dataclass(frozen=True)
class LinearInvariant(Property):
    r"""wᵀf(x) = wᵀx; ``weights=None`` is w = 1 (mass), which also composes across changes of dimension."""

    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class NormPreserving(Property):
    r"""‖f(x)‖ = ‖x‖."""


@dataclass(frozen=True)
class Dissipative(Property):
    r"""V(f(x)) ≤ V(x) for the module's ``potential`` V; holds along one potential only, so it never composes."""

    def then(self, following: Self) -> Self | None:
        return None


@dataclass(frozen=True)
class Equivariant(Property):
    r"""f(g·x) = g·f(x) for every g of the named group; ``"sign"`` is {+1, −1} (f is odd)."""

    group: str = "sign"


class Properties(tuple[Property, ...]):
    """The guarantees of one module.

    Example:
        >>> Properties([Lipschitz(1.0), Invertible()]).lipschitz
        1.0
    """

    def of(self, kind: type[P]) -> P | None:
        """The guarantee of type ``kind``, or ``None``."""
        return next((p for p in self if isinstance(p, kind)), None)

    @property
    def lipschitz(self) -> float:
        """The declared Lipschitz constant in ℓ2, ``inf`` when there is none."""
        return next((p.constant for p in self if isinstance(p, Lipschitz) and p.metric == EUCLIDEAN), math.inf)

    def kinds(self) -> Iterator[type[Property]]:
        return (type(p) for p in self)

    def __repr__(self) -> str:
        return "(" + ", ".join(str(p) for p in self) + ")"
