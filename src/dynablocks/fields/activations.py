"""Scalar functions σ with the range of their slopes and, where it is closed-form, the flow of u̇ = σ(u)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.errors import InvalidArgument, require_range
from dynablocks.registry import Registry

Scalar = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    r"""σ with slope_min <= σ'(u) <= slope_max.

    Attributes:
        name: the registry name.
        function: σ, elementwise.
        slope_min, slope_max: the range of σ'. All of the registry have 0 <= slope_min, so they are monotone.
        primitive: γ with γ' = σ, or ``None``.
        negative_slope: a when σ(u) = max(u, au) with 0 <= a <= 1, otherwise ``None``. Such σ is positively homogeneous
            and its flow is closed-form.
        odd: σ(−u) = −σ(u).

    A σ with parameters is none: parameters() and state dicts of a field list those of its modules, and an activation is
    no module. Learn them as parameters of a field of your own.

    Raises:
        InvalidArgument: the slopes are not two finite numbers in order, or those of another σ than ``negative_slope``;
            a function has parameters; ``negative_slope`` beside a ``__call__`` or a ``flow`` of a subclass.
    """

    name: str
    function: Scalar
    slope_min: float
    slope_max: float
    primitive: Scalar | None = None
    negative_slope: float | None = None
    odd: bool = False

    def __post_init__(self) -> None:
        for function in (self.function, self.primitive):
            if isinstance(function, nn.Module) and next(function.parameters(), None) is not None:
                raise InvalidArgument(
                    f"a function of {self.name} is a {type(function).__name__} with parameters, which no field would "
                    "train or save with it; learn them as parameters of a field of your own."
                )
        if not -math.inf < self.slope_min <= self.slope_max < math.inf:
            raise InvalidArgument(
                f"the slopes of {self.name} are given as {self.slope_min} to {self.slope_max}; two finite numbers, the "
                "smaller first, are needed."
            )
        a = self.negative_slope
        if a is not None and not (0 <= a <= 1 and self.slope_min <= a and self.slope_max >= 1):
            raise InvalidArgument(
                f"negative_slope of {self.name} is {a!r} beside slopes from {self.slope_min} to {self.slope_max}; it "
                "is the a of max(u, au) with 0 <= a <= 1, whose slopes are a and 1."
            )
        kind, computing = type(self), ("__call__", "flow")
        own = next((name for name in computing if getattr(kind, name) is not getattr(Activation, name)), None)
        if a is not None and own is not None:
            raise InvalidArgument(
                f"{kind.__name__} has a {own} of its own, of which negative_slope says nothing; leave negative_slope "
                "out."
            )

    @property
    def lipschitz(self) -> float:
        """The largest |σ'|."""
        return max(abs(self.slope_min), abs(self.slope_max))

    def __call__(self, u: Tensor) -> Tensor:
        return self.function(u)

    def require_primitive(self, owner: str) -> Scalar:
        """γ with γ' = σ, for the potential of ``owner``.

        Raises:
            InvalidArgument: σ has no closed-form primitive.

        Example:
            >>> leaky_relu(0.0).require_primitive("a field")(torch.tensor([2.0, 4.0]))
            tensor([2., 8.])
        """
        if self.primitive is None:
            raise InvalidArgument(
                f"{owner} with {self.name} has no closed-form potential: {self.name} has no closed-form primitive; use "
                "relu, leaky-relu, tanh or sigmoid."
            )
        return self.primitive

    def flow(self, u: Tensor, time: Tensor | float) -> Tensor:
        r"""The solution at t = ``time`` (any sign) of u̇ = σ(u) for σ(u) = max(u, au): u e^t (u >= 0), u e^{at} (u < 0).

        Raises:
            InvalidArgument: σ is not a (leaky) ReLU.

        Example:
            >>> leaky_relu(0.5).flow(torch.tensor([1.0, -1.0]), 2.0)
            tensor([ 7.3891, -2.7183])
        """
        if self.negative_slope is None:
            raise InvalidArgument(
                f"the flow of {self.name} has no closed form; use relu or leaky-relu, or a Runge–Kutta step."
            )
        time = torch.as_tensor(time, dtype=u.dtype, device=u.device)
        return u * torch.where(u >= 0, time.exp(), (self.negative_slope * time).exp())


def leaky_relu(negative_slope: float = 0.5) -> Activation:
    """σ(u) = max(u, au) with 0 <= a <= 1; slopes {a, 1}. The paper's choice is a = 1/2.

    Example:
        >>> leaky_relu(0.5).slope_min
        0.5
    """
    a = float(require_range("negative_slope", negative_slope, 0.0, 1.0))
    return Activation(
        name="relu" if a == 0 else f"leaky-relu({a:g})",
        function=functional.relu if a == 0 else partial(functional.leaky_relu, negative_slope=a),
        slope_min=a,
        slope_max=1.0,
        primitive=partial(_leaky_primitive, a),
        negative_slope=a,
        odd=a == 1.0,
    )


def smooth_leaky_relu(negative_slope: float = 0.5) -> Activation:
    """σ(u) = au + (1 − a) log(1 + e^u); slopes (a, 1)."""
    a = float(require_range("negative_slope", negative_slope, 0.0, 1.0))
    return Activation(f"smooth-leaky-relu({a:g})", partial(_smooth_leaky, a), a, 1.0)


ACTIVATIONS: Registry[Callable[[], Activation]] = Registry("activation")
ACTIVATIONS["relu"] = lambda: leaky_relu(0.0)
ACTIVATIONS["leaky-relu"] = leaky_relu
ACTIVATIONS["softplus"] = lambda: Activation("softplus", _softplus, 0.0, 1.0)
ACTIVATIONS["smooth-leaky-relu"] = smooth_leaky_relu
ACTIVATIONS["tanh"] = lambda: Activation("tanh", torch.tanh, 0.0, 1.0, _log_cosh, odd=True)
ACTIVATIONS["sigmoid"] = lambda: Activation("sigmoid", torch.sigmoid, 0.0, 0.25, _softplus)
ACTIVATIONS["arctan"] = lambda: Activation("arctan", torch.arctan, 0.0, 1.0, odd=True)


# Named functions, since those without a name cannot be pickled, nor modules that hold them.
def _leaky_primitive(a: float, u: Tensor) -> Tensor:
    return 0.5 * u * torch.maximum(u, a * u)


def _smooth_leaky(a: float, u: Tensor) -> Tensor:
    return a * u + (1 - a) * _softplus(u)


def _log_cosh(u: Tensor) -> Tensor:
    """log cosh u, to rounding of itself: log(1 + 2 sinh²(u/2)) where |u| + log(1 + e^{−2|u|}) − log 2 would cancel."""
    small = u.abs() < 1
    near = torch.log1p(2 * (torch.where(small, u, 0.0) / 2).sinh().square())
    return torch.where(small, near, u.abs() + functional.softplus(-2 * u.abs()) - 0.6931471805599453)


def _softplus(u: Tensor) -> Tensor:
    """log(1 + e^u); torch's becomes u from 20 on, where it jumps down by 2e-9, and at 40 by less than a rounding."""
    return functional.softplus(u, 1.0, 40.0)


def activation(given: str | Activation) -> Activation:
    """The activation of a registry name, or the activation itself.

    Example:
        >>> activation("relu").slope_max
        1.0
    """
    return given if isinstance(given, Activation) else ACTIVATIONS.get_known(given)()
