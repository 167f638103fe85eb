"""The sharp restriction of one step: as far as its field allows without expansion, whatever the field has learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_finite
from dynablocks.fields.base import FieldFacts, VectorField, require_field
from dynablocks.linear import shared_weights
from dynablocks.switching.signals import SwitchingSignal

SHORTENED = 24
"""By how many roundings of its number format a longest step is shortened: more than dividing, storing it and declaring
the constant of the step take."""


class NonExpansiveStep(SwitchingSignal):
    r"""One field, one learned Euler step, kept where it does not expand for the present parameters of the field.

    Where every Jacobian of X is symmetric with eigenvalues λ in [−c, 0], the step x + hX(x) has one with eigenvalues
    1 + hλ in [1 − hc, 1]. So it does not expand for

    .. math:: 0 \le h \le 2/c,

    and where −c is an eigenvalue somewhere, it does for every larger h. For x − hAᵀΣ(Ax + b) and slopes up to 1 that is
    h <= 2/‖A‖², which is (3.5) for an A of any norm. An expansive field, λ in [0, c], has the steps −2/c <= h <= 0.

    Where the Jacobians are not symmetric, but X has the one-sided constant μ < 0 and the Lipschitz constant L,
    ‖x + hX(x) − y − hX(y)‖² <= (1 + 2hμ + h²L²)‖x − y‖², so the steps are 0 <= h <= −2μ/L².

    c, μ and L are the sound bounds of :meth:`dynablocks.fields.VectorField.facts`, asked for at each projection, which
    comes after those of the weights: a bound of ‖A‖ for each step of the optimiser. :class:`LearnedStep` does without
    for the maps ``UnitDense`` and ``UnitConv``, whose norm is at most 1 in evaluation. With (leaky) ReLU they give the
    same steps: hAᵀΣ(Ax + b) = h‖A‖² UᵀΣ(Ux + b/‖A‖) for U = A/‖A‖.

    Condition: explicit Euler on this very field, ``bound="tight"``, and :func:`dynablocks.switching.keep_constraints`,
    or :func:`dynablocks.switching.project` after each change of the parameters. The metric is that of the field's
    facts. In between, and with other methods, the block declares the constant that it has.

    Args:
        field: X, the field of the block; it stays registered there.
        start: the step at the start, of the sign in which the field contracts; projected.

    Raises:
        InvalidArgument: ``field`` is no field, its facts allow no step but 0, or ``start`` is not finite.

    Source: paper (3.5); design D2.2.

    Example:
        >>> from dynablocks import DynamicalBlock
        >>> from dynablocks.fields import GradientField
        >>> from dynablocks.linear import Dense
        >>> field = GradientField(Dense(2, 2))
        >>> block = DynamicalBlock(field, "euler", NonExpansiveStep(field, 1.5))
        >>> _ = field.requires_grad_(False).linear.matrix.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> block.signal.project_()
        >>> round(block.signal.steps.item(), 5), block.properties.lipschitz
        (0.5, 1.0)
    """

    projected_last: bool = True

    def __init__(self, field: VectorField, start: float = 1.0) -> None:
        super().__init__()
        # In a tuple, which registers nothing: the field's parameters are the block's.
        self._field = (require_field("field", field),)
        self.steps = nn.Parameter(torch.tensor([require_finite("start", float(start))]))
        if not any(self.limits()):
            raise InvalidArgument(
                f"no step of {type(field).__name__} but 0 is known not to expand; take a field whose facts say that it "
                "is contractive or expansive, or LearnedStep."
            )
        self.project_()

    def limits(self) -> tuple[float, float]:
        """The least and the largest step that do not expand, for the present parameters of the field."""
        (field,) = self._field
        with torch.no_grad(), shared_weights(field):
            return step_limits(field.facts())

    def pieces(self) -> list[tuple[int, Tensor]]:
        return [(0, self.steps[0])]

    @torch.no_grad()
    def project_(self) -> None:
        number = torch.finfo(self.steps.dtype)
        low, high = (limit * (1 - SHORTENED * number.eps) for limit in self.limits())
        self.steps.clamp_(max(low, number.min), min(high, number.max))


def step_limits(facts: FieldFacts, most: float = 1.0, bound: str = "tight") -> tuple[float, float]:
    r"""The least and the largest h for which the facts of X give x + hX(x) a constant of at most ``most`` >= 1.

    The constant is max |1 + hλ| over the spectrum of symmetric Jacobians; without one, and with ``bound="paper"``, it
    is √(1 + 2hμ + h²L²) for h >= 0, and at most 1 + |h|L for h < 0
    (:meth:`dynablocks.fields.VectorField.euler_constant`). All of these are convex in h and 1 at h = 0, so that
    nothing between the two limits exceeds ``most``. They are not rounded outwards or inwards.

    Example:
        >>> step_limits(FieldFacts(spectrum=(0.0, 2.0)), 3.0)
        (-2.0, 1.0)
        >>> step_limits(FieldFacts(2.0, -1.0))
        (0.0, 0.5)
    """
    if facts.spectrum is None or bound == "paper":
        if not 0 < facts.lipschitz < math.inf:
            return 0.0, 0.0
        return (1 - most) / facts.lipschitz, _longest_without_symmetry(facts, most)
    low, high = facts.spectrum
    return 0.0 - _longest(-high, -low, most), _longest(low, high, most)


def _longest(low: float, high: float, most: float) -> float:
    """The largest h with |1 + hλ| <= most for all λ in [low, high]."""
    up = (most - 1) / high if high > 0 else math.inf
    down = (most + 1) / -low if low < 0 else math.inf
    return min(up, down)


def _longest_without_symmetry(facts: FieldFacts, most: float) -> float:
    """The largest h with 1 + 2hμ + h²L² <= most², for L > 0."""
    ratio, growth = facts.one_sided / facts.lipschitz, (most - 1) * (most + 1)
    root = math.hypot(ratio, math.sqrt(growth))
    # Where μ > 0 the difference of root and ratio would lose its digits.
    length = growth / (root + ratio) if ratio > 0 else root - ratio
    return length / facts.lipschitz
