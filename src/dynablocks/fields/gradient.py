"""Gradient fields ±Aᵀ diag(α) Σ(Ax + b)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields.activations import Activation, leaky_relu
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField
from dynablocks.fields.ridge import RidgeField
from dynablocks.linear import LinearMap, OrthogonalDense
from dynablocks.linear.maps import why_unknown
from dynablocks.properties.own_code import replaced, shadowed

FORMULA = ("forward", "profile", "preactivation", "per_channel")
"""The methods that make X of A, b and σ: a split is one of the field that they give."""


@FIELDS.register("gradient")
class GradientField(RidgeField):
    r"""X(x) = s Aᵀ diag(α) Σ(Ax + b) = s ∇(αᵀΓ(Ax + b)), s = ±1, γ' = σ.

    With α >= 0 it is contractive for s = −1 and expansive for s = +1. Its Jacobian is symmetric with eigenvalues in
    s·[c₋, c₊], where c₊ = ‖A‖² max α σ'₊ and c₋ = σ_min(A)² min α σ'₋ (paper section 3.1, design D2.1–D2.2).

    Args:
        linear: A, dense or convolutional.
        sigma: σ, a registry name or an :class:`Activation`.
        expansive: s = +1.
        alpha: ``None`` for α = 1, or a start value for a learned α per channel (any sign, then the field mixes both
            kinds).
        bias: whether b is learned (one per output channel) or absent.

    Raises:
        InvalidArgument: ``linear`` is no :class:`~dynablocks.linear.LinearMap`, or an unknown σ.

    Example:
        >>> from dynablocks.linear import OrthogonalDense
        >>> from dynablocks.fields import leaky_relu
        >>> field = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5))
        >>> low, high = field.facts().spectrum
        >>> round(low, 5), round(high, 5)
        (-1.0, -0.5)
    """

    def __init__(
        self,
        linear: LinearMap,
        sigma: str | Activation = "relu",
        *,
        expansive: bool = False,
        alpha: float | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(linear, sigma, bias=bias)
        self.expansive = expansive
        self.alpha = None if alpha is None else nn.Parameter(torch.full((linear.out_shape[0],), float(alpha)))

    @classmethod
    def example(cls) -> GradientField:
        return cls(OrthogonalDense(4, 4), leaky_relu(0.5))

    @property
    def sign(self) -> float:
        return 1.0 if self.expansive else -1.0

    def slope_scales(self) -> Tensor | None:
        return None if self.alpha is None else self.sign * self.alpha

    def facts(self) -> FieldFacts:
        unknown = why_unknown(self.linear)
        if unknown is not None:
            return FieldFacts(reason=unknown)
        low, high = self.update_spectrum(*self.slope_range())
        reason = f"symmetric Jacobian, {self.linear.norm_bounds().method}"
        return FieldFacts.of_spectrum(low, high, odd=self.sigma.odd and self.bias is None, reason=reason)

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=self.linear.is_known)

    def split(self) -> tuple[GradientField, GradientField]:
        """The expansive and the contractive field, both with α >= 0, whose sum this field is (Corollary 2.3).

        A and b are this field's own; α is copied: (sα)⁺ of the first and (sα)⁻ of the second.

        Raises:
            InvalidArgument: the class has another formula (``forward``, ``profile``, ``preactivation`` or
                ``per_channel``) than the one that its split is of.

        Example:
            >>> field = GradientField(OrthogonalDense(2, 2), "tanh", alpha=-1.0)
            >>> expansive, contractive = field.split()
            >>> x = torch.ones(1, 2)
            >>> bool(torch.allclose(field(x), expansive(x) + contractive(x)))
            True
        """
        name, roots = type(self).__name__, (nn.Module, VectorField)
        own = replaced(type(self), FORMULA, ("split",), roots) or next((m for m in FORMULA if shadowed(self, m)), None)
        if own is not None:
            raise InvalidArgument(
                f"{name} has a {own} of its own, and no split to go with it: the parts would add up to another field; "
                "give it a split of its own."
            )
        scales = self.slope_scales()
        if scales is None:
            scales = self.sign * self.linear.weight.new_ones(self.linear.out_shape[0])
        return self._part(scales, expansive=True), self._part(-scales, expansive=False)

    def _part(self, alpha: Tensor, *, expansive: bool) -> GradientField:
        part = GradientField(self.linear, self.sigma, expansive=expansive, bias=False)
        part.bias, part.alpha = self.bias, nn.Parameter(alpha.detach().clamp_min(0))
        return part

    def extra_repr(self) -> str:
        return f"{'expansive' if self.expansive else 'contractive'}, sigma={self.sigma.name}"
