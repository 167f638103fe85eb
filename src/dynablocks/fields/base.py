"""What a vector field is and what it declares about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from dynablocks.properties import EUCLIDEAN, Metric
from dynablocks.registry import Registry


@dataclass(frozen=True)
class FieldFacts:
    r"""Sound facts about a vector field X, from upper bounds in float64.

    Attributes:
        lipschitz: ‖X(x) − X(y)‖ <= lipschitz · ‖x − y‖.
        one_sided: ⟨X(x) − X(y), x − y⟩ <= one_sided · ‖x − y‖²; negative for a contractive field.
        spectrum: every Jacobian is symmetric with eigenvalues in this interval; ``None`` when not known to be
            symmetric.
        conservative: X = ±∇V.
        odd: X(−x) = −X(x).
        linear_invariant: 1ᵀX(x) = 0.
        reason: where the numbers come from.
        metric: the inner product of all of the above: norms, symmetry and gradients are those of ⟨x, y⟩_M = xᵀMy.
    """

    lipschitz: float
    one_sided: float
    spectrum: tuple[float, float] | None = None
    conservative: bool = False
    odd: bool = False
    linear_invariant: bool = False
    reason: str = ""
    metric: Metric = EUCLIDEAN

    @property
    def cocoercive(self) -> bool:
        """−X is the gradient of a convex function, so ⟨δX, δx⟩ <= −‖δX‖² / lipschitz (Baillon–Haddad)."""
        return self.conservative and self.spectrum is not None and self.spectrum[1] <= 0.0


class VectorField(nn.Module):
    """A parametric autonomous vector field x ↦ X(x) on inputs of one shape.

    A subclass implements :meth:`forward` and :meth:`facts`, and may sharpen :meth:`euler_constant`.

    Attributes:
        in_shape: the shape of one sample.
    """

    in_shape: tuple[int, ...]

    @classmethod
    def example(cls) -> VectorField:
        """A small instance, for the conformance suite and the docs table."""
        raise NotImplementedError(f"{cls.__name__} must implement the class method example(): a small instance of it.")

    def forward(self, x: Tensor) -> Tensor:
        """X(x) for a batch."""
        raise NotImplementedError

    def facts(self) -> FieldFacts:
        """What holds for the present parameters."""
        raise NotImplementedError

    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        r"""A Lipschitz constant of x + hX(x) for h = ``step_size`` of either sign, and the reason.

        Symmetric Jacobians: max |1 + hλ| over the spectrum (tight). ``bound="paper"`` is √(1 + 2hμ + h²L²) for h >= 0
        and one-sided constant μ (paper section 3.2). Otherwise 1 + |h|L, the smaller of the two where both hold.
        """
        facts, h = self.facts(), step_size
        if facts.spectrum is not None and bound == "tight":
            low, high = facts.spectrum
            return max(abs(1 + h * low), abs(1 + h * high)), f"max|1+hλ|, λ in [{low:.4g}, {high:.4g}]"
        general = 1 + abs(h) * facts.lipschitz
        if h < 0 and facts.spectrum is None:
            return general, f"1+|h|L, L={facts.lipschitz:.4g}"
        one_sided = facts.one_sided if h >= 0 or facts.spectrum is None else -facts.spectrum[0]
        inner = math.sqrt(max(0.0, 1 + 2 * abs(h) * one_sided + (h * facts.lipschitz) ** 2))
        return min(general, inner), f"min(1+|h|L, √(1+2|h|μ+h²L²)), L={facts.lipschitz:.4g}, μ={one_sided:.4g}"


FIELDS: Registry[type[VectorField]] = Registry("vector field")
