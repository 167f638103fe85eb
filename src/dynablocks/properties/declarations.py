"""What a module can be guaranteed to be: the property types and how each composes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.properties.own_code import replaced

P = TypeVar("P", bound="Property")


@dataclass(frozen=True)
class Metric:
    r"""A norm ‖x‖_M = √(xᵀMx) = ‖Rx‖₂ in which a Lipschitz constant is stated; by default the Euclidean one, R = I.

    A subclass gives the symmetric R = M^{1/2} (:meth:`whiten`), its inverse (:meth:`unwhiten`) and bounds on M's
    eigenvalues (:mod:`dynablocks.norms`). What is said of R is said of the methods beside it: a subclass with others
    has neither :attr:`eigenvalues` nor a :attr:`whitening_error` until it has its own. A :meth:`norm` of its own, such
    as that of l1 or l∞, is refused: eigenvalues, radii and :func:`dynablocks.verify` would speak of another one.

    Two metrics are the same when they compare equal: whatever distinguishes them must take part in ``==``, as a field
    of a frozen dataclass or in an ``__eq__`` and ``__hash__`` of one's own.

    Raises:
        InvalidArgument: one of a subclass is named "l2": its radii would pass for Euclidean ones.

    Example:
        >>> class Triple(Metric):
        ...     eigenvalues = (9.0, 9.0)
        ...     def whiten(self, x): return 3 * x
        ...     def unwhiten(self, u): return u / 3
        >>> round(Triple("3 l2").bounded_by(EUCLIDEAN), 9)
        3.0
    """

    name: str = "l2"

    def __post_init__(self) -> None:
        if type(self) is not Metric and self.name == Metric.name:
            kind = type(self).__name__
            raise InvalidArgument(
                f"a {kind} is named {self.name!r}, as the Euclidean norm is; give it a name of its own: {kind}('M')."
            )

    def __init_subclass__(cls, **given: Any) -> None:
        """Of the R of a subclass holds only what it says of it, whatever it inherits.

        Raises:
            InvalidArgument: it has a norm of its own, or one of :meth:`whiten` and :meth:`unwhiten` without the other.
        """
        super().__init_subclass__(**given)
        if cls.norm is not Metric.norm:
            raise InvalidArgument(
                f"{cls.__name__} has a norm of its own; a Metric is ‖Rx‖₂: give whiten, unwhiten and eigenvalues "
                "instead (l1 and l∞ are no such norms)."
            )
        homes = [next(k for k in cls.__mro__ if name in vars(k)) for name in ("whiten", "unwhiten")]
        if homes[0] is not homes[1]:
            raise InvalidArgument(
                f"{cls.__name__} has the whiten of {homes[0].__name__} and the unwhiten of {homes[1].__name__}; they "
                "are R and R⁻¹ of one R, so give both in one class."
            )
        for claim, neutral in _UNSAID.items():
            if replaced(cls, ("whiten", "unwhiten"), (claim,), ()):
                setattr(cls, claim, neutral)

    def whiten(self, x: Tensor) -> Tensor:
        """R x for a batch: coordinates in which the norm is the Euclidean one."""
        return x

    def unwhiten(self, u: Tensor) -> Tensor:
        """R⁻¹ u for a batch."""
        return u

    @property
    def eigenvalues(self) -> tuple[float, float]:
        """A lower bound of M's smallest and an upper bound of its largest eigenvalue."""
        return 1.0, 1.0

    @property
    def whitening_error(self) -> float:
        """A bound of the error of :meth:`whiten` and :meth:`unwhiten` in float64, relative to ‖R^{±1}‖ ‖x‖."""
        return 0.0

    @property
    def condition(self) -> float:
        """The condition number of R, which multiplies rounding in coordinates."""
        return math.sqrt(self.eigenvalues[1] / self.eigenvalues[0])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the norm is one of samples of this shape."""
        return True

    def norm(self, x: Tensor) -> Tensor:
        """‖x‖_M for each row of a batch: (batch, …) ↦ (batch,)."""
        return self.whiten(x).reshape(len(x), math.prod(x.shape[1:])).norm(dim=1)

    def dual(self, w: Tensor) -> Tensor:
        """R⁻¹ w for each row: its Euclidean norm is ‖w‖_{M⁻¹}, the Lipschitz constant of x ↦ wᵀx in this norm."""
        return self.unwhiten(w)

    def bounded_by(self, other: Metric) -> float:
        """A constant c with ‖x‖ <= c ‖x‖_other for all x: what a radius in this norm is divided by in the other."""
        if self == other:
            return 1.0
        return math.sqrt(self.eigenvalues[1] / other.eigenvalues[0]) * (1 + 2.0**-50)


def _unsaid(claim: str, needed: str) -> property:
    def refuse(self: Metric) -> NoReturn:
        raise InvalidArgument(
            f"{type(self).__name__} has a whiten or an unwhiten of its own, but no {claim} to go with it; give it a "
            f"property {claim}: {needed}."
        )

    return property(refuse)


_UNSAID: dict[str, object] = {
    "eigenvalues": _unsaid("eigenvalues", "bounds of the least and of the largest eigenvalue of M"),
    "whitening_error": _unsaid("whitening_error", "a bound of the error of both in float64"),
    "bounded_by": Metric.bounded_by,
}
"""What a subclass has that says nothing of an R of its own; the ratio of two norms is then that of eigenvalues."""

EUCLIDEAN = Metric()

PROBES, POWERS = 4, 8
"""At so many random samples, and at what R² and R⁻² make of them in so many turns, a metric is held against itself."""

LEAST_DIGITS = 1e-3
"""What rounding may excuse at most, however far apart eigenvalues and however large parameters are."""


@torch.no_grad()
def require_norm(metric: Metric, shape: tuple[int, ...]) -> None:
    """Refuse a metric whose methods contradict each other at samples of a shape: constants and radii rest on all four.

    At random v, and where R² and R⁻² lead them, R⁻¹Rv = v and the eigenvalues bound ‖Rv‖²/‖v‖²; R is symmetric, as the
    dual norm is that of R⁻¹. It can refute a metric, not prove it.

    Raises:
        InvalidArgument: they do, or the norm is one of samples of another shape.

    Example:
        >>> class Triple(Metric):
        ...     eigenvalues = (3.0, 3.0)  # those of R, not of M
        ...     def whiten(self, x): return 3 * x
        ...     def unwhiten(self, u): return u / 3
        >>> require_norm(Triple("3 l2"), (2,))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        dynablocks.errors.InvalidArgument: the metric 3 l2 says that the eigenvalues of M lie in [3, 3], and ...
    """
    if type(metric) is Metric:
        return
    low, high = map(float, metric.eigenvalues)
    if not 0 < low <= high < math.inf:
        raise InvalidArgument(
            f"the metric {metric.name} says that the eigenvalues of M lie in [{low:.9g}, {high:.9g}]; two finite "
            "numbers > 0 in order are needed."
        )
    generator = torch.Generator().manual_seed(7)
    v = torch.randn(PROBES, *shape, generator=generator, dtype=torch.float64, device="cpu")
    rounding = min(LEAST_DIGITS, 64 * torch.finfo(v.dtype).eps * max(1, v[0].numel()) * high / low)
    upwards = downwards = v / _lengths(v)
    for _ in range(POWERS):
        upwards, downwards = metric.whiten(metric.whiten(upwards)), metric.unwhiten(metric.unwhiten(downwards))
        upwards, downwards = upwards / _lengths(upwards), downwards / _lengths(downwards)
    samples = torch.cat([v / _lengths(v), upwards, downwards])
    image = metric.whiten(samples)
    missed = float(_lengths(metric.unwhiten(image) - samples).max())
    if not missed <= rounding:
        raise InvalidArgument(
            f"unwhiten(whiten(v)) of the metric {metric.name} differs from v by up to {missed:.1e} of ‖v‖; they are R "
            "and R⁻¹ in float64."
        )
    ratios = _lengths(image).square()
    least, most = float(ratios.min()), float(ratios.max())
    if not (low * (1 - rounding) <= least and most <= high * (1 + rounding)):
        raise InvalidArgument(
            f"the metric {metric.name} says that the eigenvalues of M lie in [{low:.9g}, {high:.9g}], and ‖Rv‖²/‖v‖² "
            f"reaches from {least:.9g} to {most:.9g}; give bounds of those of M = R², not of R."
        )
    products = image.flatten(1) @ samples.flatten(1).mT
    gap = float((products - products.mT).abs().max())
    if not gap <= rounding * math.sqrt(high):
        raise InvalidArgument(
            f"⟨Ru, v⟩ and ⟨u, Rv⟩ of the metric {metric.name} differ by up to {gap:.1e}; give the symmetric "
            "R = M^{1/2}."
        )


def _lengths(x: Tensor) -> Tensor:
    """‖x‖₂ for each row, shaped to divide it."""
    return x.reshape(len(x), -1).norm(dim=1).reshape(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class Property:
    """A guarantee; of a module that draws random numbers: for the same draws.

    Two guarantees of one :attr:`slot` compose through :meth:`then`.

    Args:
        tolerance: to what the residual that :func:`dynablocks.verify` measures is guaranteed, beyond rounding: 0 for an
            explicit map, the solver's tolerance where an equation is solved. Tolerances of a composition add up.

    Raises:
        InvalidArgument: when a subclass is made that has an ``__init__`` of its own.
    """

    tolerance: float = field(default=0.0, kw_only=True)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls) and "__dataclass_fields__" not in vars(cls):
            raise InvalidArgument(
                f"{cls.__name__} has an __init__ of its own, whose arguments would be neither compared nor composed; "
                "make it a @dataclass(frozen=True) with fields."
            )

    @property
    def slot(self) -> tuple[object, ...]:
        """What it is a guarantee of: a module has at most one for each slot, and equal slots compose."""
        return (type(self),)

    def then(self, following: Self) -> Self | None:
        """The guarantee of "first self, then ``following``", or ``None`` when the composition has none."""
        alike = self == replace(following, tolerance=self.tolerance)
        return replace(self, tolerance=_together(self, following)) if alike else None

    def within(self, tolerance: float) -> Self:
        """The same guarantee to another tolerance."""
        return replace(self, tolerance=tolerance)

    def details(self) -> tuple[str, ...]:
        """What is told of it beside its name and its tolerance."""
        return ()

    def __str__(self) -> str:
        told = [*self.details(), *[f"to {self.tolerance:.1e}"] * bool(self.tolerance)]
        return type(self).__name__ + (f"({', '.join(told)})" if told else "")


@dataclass(frozen=True)
class Lipschitz(Property):
    r"""‖f(x) − f(y)‖_image ≤ L ‖x − y‖_metric for all x, y; constants multiply (rounded upwards) where the norms meet.

    Args:
        constant: L.
        metric: the norm of the inputs.
        to: the norm of the outputs, that of the inputs when ``None``.

    Raises:
        InvalidArgument: L is negative or no number, or a tolerance is given, which belongs into L.

    Example:
        >>> Lipschitz(2.0).then(Lipschitz(0.5)).constant <= 1.0000001
        True
        >>> M = Metric("M")
        >>> str(Lipschitz(2.0, M).then(Lipschitz(0.5, M, EUCLIDEAN))), Lipschitz(2.0, M).then(Lipschitz(0.5))
        ('Lipschitz(1, M to l2)', None)
    """

    constant: float
    metric: Metric = EUCLIDEAN
    to: Metric | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.constant) or self.constant < 0:
            raise InvalidArgument(f"a Lipschitz constant is {self.constant!r}; a number >= 0 (or inf) is needed.")
        if self.tolerance != 0:
            raise InvalidArgument(
                f"a Lipschitz constant is given to the tolerance {self.tolerance!r}, which neither compositions nor "
                "radii count; put it into the constant."
            )
        if self.to == self.metric:
            object.__setattr__(self, "to", None)

    @property
    def image(self) -> Metric:
        """The norm of the outputs."""
        return self.metric if self.to is None else self.to

    def then(self, following: Lipschitz) -> Lipschitz | None:
        if self.image != following.metric:
            return None
        product = self.constant * following.constant
        if math.isnan(product):
            product = math.inf
        exact = {0.0, 1.0} & {self.constant, following.constant} or product == math.inf
        return Lipschitz(product if exact else math.nextafter(product, math.inf), self.metric, following.image)

    def details(self) -> tuple[str, ...]:
        names = self.metric.name if self.to is None else f"{self.metric.name} to {self.to.name}"
        return (f"{self.constant:.9g}", *[names] * (names != "l2"))


def _together(first: Property, second: Property) -> float:
    """Two maps off by factors 1 + τ₁ and 1 + τ₂ are off by their product."""
    return first.tolerance + second.tolerance + first.tolerance * second.tolerance


@dataclass(frozen=True)
class GradientNormPreserving(Property):
    r"""J(x) J(x)ᵀ = I for almost every x: back-propagated gradients keep their norm."""


@dataclass(frozen=True)
class Invertible(Property):
    r"""``module.inverse(module(x)) == x``; the module has a method ``inverse``.

    Of a module that draws random numbers: for the same draws.

    Of one map as far as its own rounding leaves digits; of a composition of such maps in exact arithmetic. Each part
    multiplies what the others round, by the condition number of its Jacobian at most, and that is not counted: a
    hundred flows that each shrink a part of a state by e⁻¹ leave nothing of it. :func:`dynablocks.verify` divides what
    is missed by that number, too, so look at ``inverse(forward(x)) - x`` itself.
    """


@dataclass(frozen=True)
class Symplectic(Property):
    r"""J(x)ᵀ 𝕁 J(x) = 𝕁 with 𝕁 = [[0, I], [−I, 0]] for x = (q, p): conformal symplectic with factor 1."""

    @property
    def slot(self) -> tuple[object, ...]:
        return (ConformalSymplectic,)

    def then(self, following: Property) -> Property | None:  # type: ignore[override]
        if isinstance(following, ConformalSymplectic):
            return following.within(_together(self, following))
        return super().then(following) if isinstance(following, Symplectic) else None


@dataclass(frozen=True)
class VolumePreserving(Property):
    r"""|det J(x)| = 1."""


@dataclass(frozen=True)
class LinearInvariant(Property):
    r"""wᵀf(x) = wᵀx; ``weights=None`` is w = 1 (mass), which also composes across changes of dimension.

    A module may have several; each composes with that of equal weights.
    """

    weights: tuple[float, ...] | None = None

    @property
    def slot(self) -> tuple[object, ...]:
        return type(self), self.weights

    def details(self) -> tuple[str, ...]:
        return () if self.weights is None else tuple(map(str, self.weights))


@dataclass(frozen=True)
class NormPreserving(Property):
    r"""‖f(x)‖ = ‖x‖."""


@dataclass(frozen=True)
class ConformalSymplectic(Property):
    r"""J(x)ᵀ 𝕁 J(x) = c 𝕁; the factors of a composition multiply, as long as their product is a number."""

    factor: float = 1.0

    def then(self, following: Property) -> ConformalSymplectic | None:
        other = following.factor if isinstance(following, ConformalSymplectic) else 1.0
        factor = self.factor * other
        # What overflows is no factor, and one below the normal numbers has lost its digits.
        lost = not math.isfinite(factor) or (abs(factor) < sys.float_info.min and 0.0 not in (self.factor, other))
        return None if lost else ConformalSymplectic(factor, tolerance=_together(self, following))

    def details(self) -> tuple[str, ...]:
        return (f"{self.factor:.9g}",)


@dataclass(frozen=True)
class OfFunction(Property):
    """A guarantee about one function on the states, so it composes with that about the same function only.

    A module may have several, as one that keeps two first integrals has. That of a module (``None``) never composes:
    another module's function is another.
    """

    function: Callable[[Tensor], Tensor] | None = None

    @property
    def slot(self) -> tuple[object, ...]:
        return type(self), self.function

    def then(self, following: Self) -> Self | None:
        return None if self.function is None else super().then(following)


@dataclass(frozen=True)
class EnergyPreserving(OfFunction):
    r"""H(f(x)) = H(x) for the function H, or the module's ``energy`` when it is ``None``."""


@dataclass(frozen=True)
class Dissipative(OfFunction):
    r"""V(f(x)) ≤ V(x) for the function V, or the module's ``potential`` when it is ``None``."""


@dataclass(frozen=True)
class Positive(Property):
    r"""x >= 0 entrywise implies f(x) >= 0."""


@dataclass(frozen=True)
class Equivariant(Property):
    r"""f(g·x) = g·f(x) for every g of the named group; ``"sign"`` is {+1, −1} (f is odd)."""

    group: str = "sign"

    @property
    def slot(self) -> tuple[object, ...]:
        return type(self), self.group

    def details(self) -> tuple[str, ...]:
        return () if self.group == "sign" else (self.group,)


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
    def odd(self) -> bool:
        """Whether f(−x) = −f(x) is declared, but for rounding."""
        return any(isinstance(p, Equivariant) and p.group == "sign" and p.tolerance == 0 for p in self)

    @property
    def lipschitz(self) -> float:
        """The declared Lipschitz constant from ℓ2 to ℓ2, ``inf`` when there is none."""
        return self.lipschitz_in(EUCLIDEAN)

    def lipschitz_in(self, metric: Metric, to: Metric | None = None) -> float:
        """The declared constant from ``metric`` to ``to`` (the same when ``None``), ``inf`` when there is none."""
        wanted = (metric, metric if to is None else to)
        stated = (p for p in self if isinstance(p, Lipschitz))
        return next((p.constant for p in stated if (p.metric, p.image) == wanted), math.inf)

    def __repr__(self) -> str:
        return "(" + ", ".join(str(p) for p in self) + ")"
