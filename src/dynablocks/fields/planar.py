"""Fields Σ(Ax + b) and AᵀΣ(Bx + b), which are not gradients."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields.activations import Activation, activation, leaky_relu
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField
from dynablocks.fields.ridge import require_map
from dynablocks.linear import Dense, LinearMap, OrthogonalDense
from dynablocks.linear.maps import why_unknown
from dynablocks.numerics.rounding import EPS, checked_float64, round_up

if TYPE_CHECKING:
    from jaxtyping import Float

CORNER_LIMIT = 8
SLACK = 16 * 2 * CORNER_LIMIT + 64
"""Rounding of a singular value of so few numbers, and of the sums before it, in units of ε."""


@FIELDS.register("planar")
class PlanarField(VectorField):
    r"""X(x) = s Σ(Ax + b) on a small space, with its exact step constants.

    The Jacobian of x + hX(x) is I + hsDA with D diagonal, entries in [σ'₋, σ'₊]. Its norm is convex in D, so the
    largest is at one of the 2ⁿ corners: an exact Lipschitz constant for a σ with two slopes and an invertible A, for
    which every corner occurs (design D3; paper section 1.1).

    Args:
        linear: A, from n to n entries with n <= 8.
        sigma: σ.
        expansive: s = +1 (the default, the paper's family F) or −1.

    Raises:
        InvalidArgument: A is no :class:`~dynablocks.linear.LinearMap`, or not one from n to n <= 8 entries.

    Example:
        >>> from dynablocks.linear import OrthogonalDense
        >>> from dynablocks.fields import leaky_relu
        >>> field = PlanarField(OrthogonalDense(2, 2, spread=0.0), leaky_relu(0.5))
        >>> round(field.euler_constant(0.5)[0], 12)
        1.5
    """

    def __init__(
        self, linear: LinearMap, sigma: str | Activation = "relu", *, expansive: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        size = require_map("linear", linear).features
        if linear.in_shape != (size,) or size > CORNER_LIMIT:
            raise InvalidArgument(
                f"a planar field maps n to n entries with n <= {CORNER_LIMIT}; got {linear.in_shape} -> {size}."
            )
        self.linear, self.sigma, self.in_shape = linear, activation(sigma), linear.in_shape
        self.sign = 1.0 if expansive else -1.0
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    @classmethod
    def example(cls) -> PlanarField:
        return cls(OrthogonalDense(2, 2), leaky_relu(0.5))

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """X(x) = s Σ(Ax + b)."""
        return self.sign * self.sigma(self.linear.affine(x, self.bias))

    def corner_jacobians(self) -> Float[Tensor, "corners n n"]:
        """The Jacobians sDA of X for D at the corners of [σ'₋, σ'₊]ⁿ, in float64."""
        matrix = checked_float64(self.linear.dense_matrix(), "weight", 2)
        ends = (self.sigma.slope_min, self.sigma.slope_max)
        corners = torch.tensor(list(itertools.product(ends, repeat=matrix.shape[0])), dtype=torch.float64)
        return self.sign * corners.unsqueeze(-1) * matrix

    def facts(self) -> FieldFacts:
        unknown = why_unknown(self.linear)
        if unknown is not None:
            return FieldFacts(reason=unknown)
        if not self.linear.has_its_matrix:
            upper = self.linear.norm_bounds().upper
            return FieldFacts(round_up(upper * self.sigma.lipschitz), reason=f"max|σ'|‖A‖, ‖A‖ <= {upper:.6g}")
        jacobians = self.corner_jacobians()
        slack = 1 + SLACK * EPS
        one_sided = float(torch.linalg.eigvalsh(0.5 * (jacobians + jacobians.mT)).max())
        lipschitz = float(torch.linalg.matrix_norm(jacobians, ord=2).max()) * slack
        return FieldFacts(
            lipschitz=lipschitz,
            one_sided=one_sided + (slack - 1) * lipschitz,
            odd=self.sigma.odd and self.bias is None,
            reason=f"largest of {len(jacobians)} corner Jacobians",
        )

    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        if bound == "paper" or not self.linear.has_its_matrix:
            return super().euler_constant(step_size, bound)
        jacobians = self.corner_jacobians()
        steps = torch.eye(jacobians.shape[-1], dtype=torch.float64) + step_size * jacobians
        # Rounding is that of 1 + hλ, which may be large where the norm is small.
        slack = SLACK * EPS * (1 + float(jacobians.abs().max()) * abs(step_size))
        norm = float(torch.linalg.matrix_norm(steps, ord=2).max()) * (1 + SLACK * EPS) + slack
        return norm, f"largest of {len(jacobians)} corner norms ‖I + hDA‖"


@FIELDS.register("two-matrix")
class TwoMatrixField(VectorField):
    r"""X(x) = AᵀΣ(Bx + b) − c x: with h = 1, c = 0 a ResNet step, with h = 1/2, c = 1 the "naive" ½(x + AᵀΣ(Bx + b)).

    Lip(x + hX) <= |1 − hc| + |h| ‖A‖ ‖B‖ σ'₊ (paper section 3.3).

    Args:
        inner, outer: B and A, of equal shapes.
        sigma: σ, a registry name or an :class:`Activation`.
        decay: c.
        bias: whether b is learned (one per output channel of B) or absent.

    Raises:
        InvalidArgument: A or B is no :class:`~dynablocks.linear.LinearMap`, or they have different shapes.

    Example:
        >>> field = TwoMatrixField(Dense(3, 5), Dense(3, 5), "relu", decay=1.0)
        >>> field(torch.ones(2, 3)).shape, field.facts().lipschitz < 2.0001
        (torch.Size([2, 3]), True)
    """

    def __init__(
        self,
        inner: LinearMap,
        outer: LinearMap,
        sigma: str | Activation = "relu",
        *,
        decay: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        require_map("inner", inner)
        require_map("outer", outer)
        if inner.in_shape != outer.in_shape or inner.out_shape != outer.out_shape:
            raise InvalidArgument(f"A and B must have equal shapes; got {outer.extra_repr()} and {inner.extra_repr()}.")
        self.inner, self.outer, self.sigma, self.decay = inner, outer, activation(sigma), decay
        self.in_shape = inner.in_shape
        self.bias = nn.Parameter(torch.zeros(inner.out_shape[0])) if bias else None

    @classmethod
    def example(cls) -> TwoMatrixField:
        return cls(Dense(3, 5), Dense(3, 5), "relu")

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """X(x) = AᵀΣ(Bx + b) − c x."""
        image = self.outer.adjoint(self.sigma(self.inner.affine(x, self.bias)))
        return image - self.decay * x if self.decay else image

    def _product(self) -> float:
        return round_up(self.inner.norm_bounds().upper * self.outer.norm_bounds().upper * self.sigma.lipschitz)

    def facts(self) -> FieldFacts:
        unknown = why_unknown(self.inner, self.outer)
        if unknown is not None:
            return FieldFacts(reason=unknown)
        product = self._product()
        odd = self.sigma.odd and self.bias is None
        reason = f"‖A‖‖B‖ <= {product:.6g}, decay {self.decay:g}"
        lipschitz = round_up(product + abs(self.decay))
        one_sided = product - self.decay + 4 * EPS * lipschitz
        return FieldFacts(lipschitz, one_sided, odd=odd, reason=reason)

    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        if why_unknown(self.inner, self.outer) is not None:
            return super().euler_constant(step_size, bound)
        decayed, moved = step_size * self.decay, abs(step_size) * self._product()
        constant = abs(1 - decayed) + moved
        # Rounding is that of hc, which may be large where 1 − hc is small.
        slack = 4 * EPS * (1 + abs(decayed) + moved) if step_size else 0.0
        return constant + slack, f"|1−h·{self.decay:g}| + |h|‖A‖‖B‖"
