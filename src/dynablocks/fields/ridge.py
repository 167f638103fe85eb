"""Fields of the form ±Aᵀ diag(α) Σ(Ax + b): everything that happens between one A and one Aᵀ is elementwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields.activations import Activation, activation
from dynablocks.fields.base import VectorField, over_states
from dynablocks.linear import LinearMap, shared_weights
from dynablocks.linear.maps import LOOSEST, ROUNDINGS, is_mixed
from dynablocks.numerics.rounding import checked_float64, expm1_bounds
from dynablocks.properties.own_code import overrides

if TYPE_CHECKING:
    from jaxtyping import Float


RIDGE_METHODS = ("forward", "profile", "preactivation", "per_channel", "ridge_step", "euler_step")
"""What a ridge field computes with: steps in u = Ax + b are those of a field that has none of its own."""

STRETCH = ROUNDINGS // 4
"""How often a flow may multiply rounding, for each entry of a state, and still count as undone by the flow of −t.

The others of the :data:`ROUNDINGS` are left to the flow itself."""


def require_map(name: str, given: object) -> LinearMap:
    """``given`` when it is a linear map of the library, with an adjoint and bounds, as ``torch.nn.Linear`` is not.

    Raises:
        InvalidArgument: it is something else.

    Example:
        >>> from dynablocks.linear import Dense
        >>> require_map("linear", Dense(4, 3)).out_shape
        (3,)
    """
    if not isinstance(given, LinearMap):
        kind = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise InvalidArgument(f"{name} is {kind}; a LinearMap is needed, such as dynablocks.linear.Dense(4, 4).")
    return given


class RidgeField(VectorField):
    r"""Common part of gradient fields: x ↦ Aᵀ g(Ax + b) with an elementwise g.

    Every map x + Aᵀ e(Ax + b) with elementwise e of slopes in [e₋, e₊] has the symmetric Jacobian I + AᵀEA. Euler
    steps, their elementwise substeps and exact flows are all of this form, so :meth:`update_spectrum` bounds all of
    them.

    Raises:
        InvalidArgument: ``linear`` is no :class:`~dynablocks.linear.LinearMap`.
    """

    def __init__(self, linear: LinearMap, sigma: str | Activation = "relu", *, bias: bool = True) -> None:
        super().__init__()
        self.linear = require_map("linear", linear)
        self.sigma = activation(sigma)
        self.in_shape = linear.in_shape
        channels = linear.out_shape[0]
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def preactivation(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """u = Ax + b, with one bias per output channel."""
        return self.linear.affine(x, self.bias)

    def per_channel(self, values: Tensor) -> Tensor:
        """``values`` (one per output channel) shaped to broadcast over a batch of outputs of A."""
        return values.reshape(-1, *(1,) * (len(self.linear.out_shape) - 1))

    def slope_scales(self) -> Tensor | None:
        """The signed factor on σ per output channel, or ``None`` when it is the constant :attr:`sign`."""
        return None

    @property
    def sign(self) -> float:
        """+1 for an expansive, −1 for a contractive field."""
        return 1.0

    def profile(self, u: Tensor) -> Tensor:
        """g(u): the field between A and Aᵀ."""
        scales = self.slope_scales()
        return self.sigma(u) * (self.sign if scales is None else self.per_channel(scales))

    @property
    def is_plain(self) -> bool:
        """Whether the class computes X(x) = Aᵀ g(Ax + b), with none of these methods of its own."""
        return not any(overrides(self, RidgeField, name) for name in RIDGE_METHODS)

    def ridge_step(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """x + Aᵀ change(Ax + b): one product with A and one with Aᵀ."""
        with shared_weights(self.linear):
            return x + self.linear.adjoint(change(_widened(self.preactivation(x))))

    def euler_step(self, x: Tensor, step_size: Tensor | float) -> Tensor:
        """x + hX(x), with h and the factors on σ multiplied into the weight of Aᵀ, not into activations; h may be one
        a sample.

        A map with an adjoint of its own takes no other weight, and one h a sample is no factor of it: h multiplies X.
        """
        one_for_all = not isinstance(step_size, Tensor) or step_size.numel() == 1
        if not one_for_all or overrides(self.linear, LinearMap, "adjoint"):
            return x + over_states(step_size, x) * self(x)
        scales = self.slope_scales()
        factor = step_size * (self.sign if scales is None else scales)
        with shared_weights(self.linear):
            weight = self.linear.weight
            if isinstance(factor, Tensor) and factor.ndim:
                factor = factor.reshape(-1, *(1,) * (weight.ndim - 1))
            return x + self.linear.multiply_adjoint(weight * factor, self.sigma(self.preactivation(x)))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """X(x) = Aᵀ g(Ax + b)."""
        with shared_weights(self.linear):
            return self.linear.adjoint(self.profile(self.preactivation(x)))

    def potential(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """V(x) = cᵀΓ(Ax + b) for the signed factors c on σ and γ' = σ, so that X = ∇V.

        Raises:
            InvalidArgument: σ has no closed-form primitive.
        """
        scales = self.slope_scales()
        density = self.sigma.require_primitive(type(self).__name__)(_widened(self.preactivation(x)))
        density = density * (self.sign if scales is None else self.per_channel(scales))
        return density.flatten(1).sum(1)

    def why_no_flow(self) -> str | None:
        """There is one for AAᵀ = I and σ(u) = max(u, au): u = Ax + b obeys u̇ = g(u) elementwise (design D2.4)."""
        if type(self).flow is not RidgeField.flow:
            return super().why_no_flow()
        if not self.linear.rows_orthonormal:
            return (
                "the exact flow needs a gradient field whose A has orthonormal rows (AAᵀ = I): an OrthogonalDense with "
                "out <= in or an OrthogonalConv with circular padding"
            )
        if not self.is_plain:
            return f"{type(self).__name__} has a forward or a profile of its own, and no flow to go with it"
        if self.sigma.negative_slope is None:
            return f"the exact flow of a gradient field needs relu or leaky-relu; got {self.sigma.name}"
        return None

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        return self.ridge_step(x, lambda u: self.sigma.flow(u, self._times(time, u)) - u)

    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        u = _widened(self.preactivation(x))
        return self._log_growth(u, self._times(time, u))

    def flow_with_log_determinant(self, x: Tensor, time: Tensor | float) -> tuple[Tensor, Tensor]:
        """Both from one Ax + b, as long as the methods that compute them apart are those of this class."""
        if any(overrides(self, RidgeField, name) for name in ("flow", "flow_log_determinant", "ridge_step")):
            return super().flow_with_log_determinant(x, time)
        with shared_weights(self.linear):
            u = _widened(self.preactivation(x))
            times = self._times(time, u)
            return x + self.linear.adjoint(self.sigma.flow(u, times) - u), self._log_growth(u, times)

    def flow_constant(self, time: float) -> tuple[float, str]:
        ends = [expm1_bounds(time * slope) for slope in self.slope_range()]
        low, high = self.update_spectrum(min(below for below, _ in ends), max(above for _, above in ends))
        constant = math.nextafter(max(abs(1 + low), abs(1 + high)), math.inf)
        return constant, f"exact flow, symmetric Jacobian with eigenvalues in [{1 + low:.6g}, {1 + high:.6g}]"

    def is_undone(self, time: float) -> bool:
        r"""Whether Gδ is rounding: ‖AAᵀ − I‖ <= δ, G = ‖A‖ e₊ e₋ (‖A‖ + ‖b‖), e± = max |e^{±st} − 1| for slopes s of g.

        The flow −t starts from A(x + Aᵀ(φ_t(u) − u)) + b = φ_t(u) + (AAᵀ − I)(φ_t(u) − u) for u = Ax + b, and not from
        φ_t(u) itself. Rounding of Φ_t(x), which is of the size of x where units shrink to e^{−t}, grows by G on the way
        back, too: nothing is left where that is more than :data:`STRETCH` times the number of entries, or moves the
        first three digits of a state.
        """
        if type(self).flow is not RidgeField.flow:
            return super().is_undone(time)
        slopes, upper = self.slope_range(), self.linear.norm_bounds().upper
        there, back = (max(abs(end) for s in slopes for end in expm1_bounds(t * s)) for t in (time, -time))
        pixels = self.linear.features // self.linear.out_shape[0]
        bias = 0.0 if self.bias is None else math.sqrt(pixels) * float(self.bias.detach().double().norm())
        growth = upper * there * back * (upper + bias)
        limit = min(STRETCH * math.prod(self.in_shape), LOOSEST / torch.finfo(self.linear.weight.dtype).eps)
        # What is no number is no bound, either.
        return growth <= limit and self.linear.isometry_tolerance(growth) == 0.0

    def _times(self, time: Tensor | float, u: Tensor) -> Tensor:
        scales = self.slope_scales()
        if scales is None:
            return torch.as_tensor(self.sign * time, dtype=u.dtype, device=u.device)
        return self.per_channel(scales) * time

    def _log_growth(self, u: Tensor, times: Tensor) -> Tensor:
        """log |det| of the flow of u, for the signed times of :meth:`_times`: one factor e^t or e^{at} an entry."""
        return torch.where(u >= 0, times, (self.sigma.negative_slope or 0.0) * times).flatten(1).sum(1)

    def scale_range(self) -> tuple[float, float]:
        """The smallest and largest signed factor on σ, in float64."""
        scales = self.slope_scales()
        if scales is None:
            return self.sign, self.sign
        exact = checked_float64(scales.flatten(), "the scale of σ", 1)
        return float(exact.min()), float(exact.max())

    def slope_range(self) -> tuple[float, float]:
        """The smallest and largest slope of g."""
        ends = [c * s for c in self.scale_range() for s in (self.sigma.slope_min, self.sigma.slope_max)]
        return min(ends), max(ends)

    def update_spectrum(self, low: float, high: float) -> tuple[float, float]:
        """An interval that holds the eigenvalues of AᵀEA for every diagonal E with entries in [low, high].

        All numbers where an end is none, as ∞ − ∞ of products that overflowed.
        """
        upper = self.linear.norm_bounds().upper
        # Rounded outwards, since products of tiny numbers underflow; those of large ones are inf where ** would raise.
        largest = math.nextafter(upper * upper, math.inf) if upper else 0.0

        def least(slope: float) -> float:
            """The least eigenvalue where no entry is below ``slope``."""
            if slope < 0:
                return math.nextafter(slope * largest, -math.inf) if largest else slope * largest
            if not slope:
                return 0.0
            # Asked for here alone: a bound of it may cost as much as that of the norm, and no ReLU field needs it.
            lower = self.linear.smallest_singular_value()
            smallest = math.nextafter(lower * lower, 0.0)
            # 0 · inf: an infinite slope in a direction that A may not reach bounds nothing from the other side.
            return math.nextafter(slope * smallest, 0.0) if smallest else 0.0

        ends = least(low), 0.0 - least(-high)
        if any(map(math.isnan, (low, high, *ends))):
            return -math.inf, math.inf
        return ends


def _widened(u: Tensor) -> Tensor:
    """What a product under autocast leaves, in float32: a short step moves it by less than its last digits there."""
    return u.float() if u.dtype in (torch.bfloat16, torch.float16) and is_mixed(u) else u
