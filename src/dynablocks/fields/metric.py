"""Fields that are non-expansive in a norm other than the Euclidean one (paper appendix B)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields.activations import Activation, activation, leaky_relu
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField
from dynablocks.fields.ridge import require_map
from dynablocks.linear import Dense, LinearMap, shared_weights
from dynablocks.linear.maps import why_unknown
from dynablocks.norms import DenseMetric
from dynablocks.numerics.bounds import linear_norm_bounds, smallest_singular_value_bounds
from dynablocks.numerics.rounding import product_slack, round_down, round_up
from dynablocks.properties import Metric

if TYPE_CHECKING:
    from jaxtyping import Float

DENSE_ENTRIES = 2**18
"""W M^{1/2} is formed when it has at most so many entries; beyond that ‖W‖ ‖M^{1/2}‖ bounds it."""


@FIELDS.register("metric")
class MetricField(VectorField):
    r"""X(x) = s Wᵀ Σ(W M x + b), s = ±1, with M symmetric positive definite.

    In the coordinates u = M^{1/2}x it is the gradient field s Aᵀ Σ(Au + b) with A = W M^{1/2}, AAᵀ = W M Wᵀ. So its
    facts in the inner product of M are those of that field in ℓ2: for s = −1

        ⟨X(x) − X(y), x − y⟩_M = −⟨Σ(WMx + b) − Σ(WMy + b), WM(x − y)⟩ <= 0,

    and the Euler step has at most the constant max(|1 − h‖A‖²|, |1 − h a σ_min(A)²|) in ‖·‖_M: it is non-expansive for
    0 <= h λ_max(W M Wᵀ) <= 2. Both are tight where the rows of W are linearly independent. Steps of contractive and
    expansive fields balance in ‖·‖_M by the regions of ℓ2, whose conditions are then those of A: AᵀA = I, ‖A‖ <= 1.

    Condition: none on W. The declared ‖A‖ is an upper bound of ‖W M^{1/2}‖ in float64.

    Args:
        linear: W, dense or convolutional; with ``whitened`` it is A, and W = A M^{−1/2}: orthogonal in coordinates when
            A is orthogonal.
        metric: the norm; its samples have the shape of the inputs of ``linear``.
        sigma: σ, a registry name or an :class:`Activation`.
        expansive: s = +1.
        whitened: see ``linear``.
        bias: whether b is learned (one per output channel) or absent.

    Raises:
        InvalidArgument: ``linear`` is no :class:`~dynablocks.linear.LinearMap`, or the metric is one of samples of
            another shape.

    Source: paper (B.1), which prints M W z in place of W M z; its proof needs the latter (design D2.6).

    Example:
        >>> metric = DenseMetric(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
        >>> field = MetricField(Dense(2, 2), metric, "relu")
        >>> facts = field.facts()
        >>> facts.metric == metric, facts.one_sided <= 0, round(facts.lipschitz, 4)
        (True, True, 2.2071)
    """

    def __init__(
        self,
        linear: LinearMap,
        metric: Metric,
        sigma: str | Activation = "relu",
        *,
        expansive: bool = False,
        whitened: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not metric.fits(require_map("linear", linear).in_shape):
            raise InvalidArgument(
                f"the linear map takes samples of shape {linear.in_shape}; the metric {metric.name} has another shape."
            )
        self.linear, self.metric, self.sigma, self.in_shape = linear, metric, activation(sigma), linear.in_shape
        self.expansive, self.whitened = expansive, whitened
        self.bias = nn.Parameter(torch.zeros(linear.out_shape[0])) if bias else None

    @classmethod
    def example(cls) -> MetricField:
        root = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.25, 0.0, 1.0]])
        return cls(Dense(3, 4), DenseMetric(0.25 * root @ root.mT), leaky_relu(0.5))

    @property
    def sign(self) -> float:
        """+1 for an expansive, −1 for a contractive field."""
        return 1.0 if self.expansive else -1.0

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """X(x) = s Wᵀ Σ(W M x + b)."""
        u = self.metric.whiten(x)
        with shared_weights(self.linear):
            if self.whitened:
                inner = self.linear.affine(u, self.bias)
                return self.sign * self.metric.unwhiten(self.linear.adjoint(self.sigma(inner)))
            inner = self.linear.affine(self.metric.whiten(u), self.bias)
            return self.sign * self.linear.adjoint(self.sigma(inner))

    def singular_values(self) -> tuple[float, float, str]:
        """A lower bound of σ_min(A), an upper bound of ‖A‖ for A = W M^{1/2}, and how they were found."""
        if self.whitened:
            bounds = self.linear.norm_bounds()
            return self.linear.smallest_singular_value(), bounds.upper, bounds.method
        entries = math.prod(self.in_shape)
        if entries * self.linear.features <= DENSE_ENTRIES and self.linear.has_its_matrix:
            # Once for each weight that is held. The metric is kept with them, so that no other gets its id meanwhile.
            key = f"singular values in the metric {id(self.metric)}"
            return self.linear.once(key, lambda: (self.metric, self._dense_singular_values(entries)))[1]
        low, high = self.metric.eigenvalues
        largest = round_up(self.linear.norm_bounds().upper * math.sqrt(high))
        return round_down(self.linear.smallest_singular_value() * math.sqrt(low)), largest, "‖W‖‖M^{1/2}‖"

    def _dense_singular_values(self, entries: int) -> tuple[float, float, str]:
        outer = self.linear.dense_matrix()
        matrix = self.metric.whiten(outer.reshape(-1, *self.in_shape)).flatten(1)
        # Each of at most four products with factors of norm <= ‖M^{1/2}‖ errs by this, entry by entry.
        slack = 8 * product_slack(entries) * float(outer.norm()) * math.sqrt(entries * self.metric.eigenvalues[1])
        smallest = smallest_singular_value_bounds(matrix).lower
        return max(0.0, smallest - slack), linear_norm_bounds(matrix).upper + slack, "dense W M^{1/2}"

    def facts(self) -> FieldFacts:
        unknown = why_unknown(self.linear)
        if unknown is not None:
            return FieldFacts(reason=unknown, metric=self.metric)
        smallest, largest, method = self.singular_values()
        slopes = sorted(self.sign * slope for slope in (self.sigma.slope_min, self.sigma.slope_max))
        ends = largest if slopes[0] < 0 else smallest, largest if slopes[1] > 0 else smallest
        low = math.nextafter(slopes[0] * (ends[0] * ends[0]), -math.inf) if slopes[0] else 0.0
        high = math.nextafter(slopes[1] * (ends[1] * ends[1]), math.inf) if slopes[1] else 0.0
        odd, reason = self.sigma.odd and self.bias is None, f"self-adjoint Jacobian in {self.metric.name}, {method}"
        return FieldFacts.of_spectrum(low, high, odd=odd, reason=reason, metric=self.metric)

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=self.linear.is_known, metric=self.metric)

    def extra_repr(self) -> str:
        kind = "expansive" if self.expansive else "contractive"
        return f"{kind} in {self.metric.name}, sigma={self.sigma.name}"
