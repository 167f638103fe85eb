"""The odd part of a field: point symmetry as one more property."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dynablocks.fields.base import FIELDS, FieldFacts, VectorField, energy_of
from dynablocks.fields.gradient import GradientField
from dynablocks.fields.parity import OddDifference
from dynablocks.linear import Dense

if TYPE_CHECKING:
    from jaxtyping import Float


@FIELDS.register("odd")
class OddField(OddDifference):
    r"""X(x) = ½(g(x) − g(−x)) for a field g: odd, so every method here gives an odd map, Ψ(−x) = −Ψ(x).

    That is so of every method that takes it, since discrete gradients find an even H and S = 𝕁 or −I here. Of other odd
    fields splittings need odd terms, and discrete gradients an even H with S(−x) = S(x).

    Its Jacobian is the mean of g's at x and at −x, so what is convex in the Jacobian carries over: Lipschitz and
    one-sided constants, the spectrum, a potential ½(V(x) + V(−x)), a Hamiltonian ½(H(x) + H(−x)), zero divergence,
    linear invariants, tangency to spheres. A sign on the nonnegative states does not, nor does an energy other than a
    Hamiltonian.

    A subclass with another factor c in place of ½ is 2c times that, and so are its constants and its energy.

    A bias of g that starts at 0 gets the gradient 0 where g is odd for it; start it elsewhere.

    Args:
        field: g. In a :class:`PartitionedField` wrap its forces, so that their flows stay exact.

    Raises:
        InvalidArgument: ``field`` is no vector field, or has no ``in_shape``.

    Source: design D2.9b.

    Example:
        >>> import torch
        >>> field = OddField(GradientField(Dense(2, 3), "sigmoid"))
        >>> x = torch.randn(4, 2)
        >>> bool((field(-x) == -field(x)).all()), field.facts().conservative
        (True, True)
    """

    factor = 0.5

    @classmethod
    def example(cls) -> OddField:
        field = GradientField(Dense(4, 3), "tanh")
        assert field.bias is not None
        nn.init.uniform_(field.bias, -1.0, 1.0)
        return cls(field)

    def facts(self) -> FieldFacts:
        return self._of_odd_part(self.field.facts())

    def _standing_facts(self) -> FieldFacts:
        return self._of_odd_part(self.field.standing_facts())

    def energy(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """c(H(x) + H(−x)), c = ½.

        Raises:
            InvalidArgument: g has no energy, or inherits that of another field.
        """
        return self.factor * (energy_of(self.field, x) + energy_of(self.field, -x))

    def why_no_flow(self) -> str | None:
        if type(self).flow is not VectorField.flow:
            return super().why_no_flow()
        return "the odd part of a field has no closed-form flow: in a PartitionedField, wrap the forces"

    def _has_energy(self) -> bool:
        return super()._has_energy() and self.field._has_energy()

    def _of_odd_part(self, known: FieldFacts) -> FieldFacts:
        return replace(
            known.scaled(2 * self.factor),
            odd=True,
            conserves_energy=known.hamiltonian and known.conserves_energy and self._has_energy(),
            dissipates_energy=False,
            positive=False,
            reason=f"odd part, {known.reason}" if known.reason else "odd part",
        )
