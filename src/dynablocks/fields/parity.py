"""What is made of a field g at x and at −x: odd fields, gradients of even potentials."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from dynablocks.fields.base import VectorField, potential_of, require_field
from dynablocks.linear import shared_weights

if TYPE_CHECKING:
    from jaxtyping import Float


class OddDifference(VectorField):
    r"""X(x) = c(g(x) − g(−x)), an odd field; where g = ∇V it is the gradient of c(V(x) + V(−x)).

    A subclass gives c: :class:`OddField` has ½, which leaves odd fields as they are, :class:`EvenPotential` has 1.

    Args:
        field: g.

    Raises:
        InvalidArgument: ``field`` is no vector field, or has no ``in_shape``.

    Attributes:
        factor: c.
    """

    factor: ClassVar[float]

    def __init__(self, field: VectorField) -> None:
        super().__init__()
        self.field = require_field("field", field)
        self.in_shape = field.in_shape

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        with shared_weights(self.field):
            there: Tensor = self.field(x)
            back: Tensor = self.field(-x)
        return self.factor * (there - back)

    def potential(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """c(V(x) + V(−x)) per sample.

        Raises:
            InvalidArgument: g is not a gradient field with a known potential.
        """
        return self.factor * (potential_of(self.field, x) + potential_of(self.field, -x))
