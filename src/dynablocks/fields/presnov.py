"""The Presnov decomposition of a vector field into a gradient and a field tangent to spheres."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, require_sizes, require_whole
from dynablocks.fields.base import FieldFacts, VectorField
from dynablocks.fields.sphere import TangentField, tangent_part

if TYPE_CHECKING:
    from jaxtyping import Float

Field = Callable[[Tensor], Tensor]


class PresnovGradient(VectorField):
    r"""∇U with U(x) = ∫₀¹ x·f(tx) dt by Gauss–Legendre quadrature: the exact gradient of the quadrature's U."""

    def __init__(self, f: Field, in_shape: tuple[int, ...], nodes: int) -> None:
        super().__init__()
        self.f, self.in_shape, self.nodes = f, in_shape, nodes
        points, weights = np.polynomial.legendre.leggauss(nodes)
        self._rule = [(float(t + 1) / 2, float(w) / 2) for t, w in zip(points, weights, strict=True)]

    def potential(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """U(x), with U(0) = 0."""
        times = x.new_tensor([t for t, _ in self._rule]).reshape(-1, *(1,) * x.ndim)
        values = self.f((times * x).flatten(0, 1)).reshape(len(self._rule), *x.shape)
        radial = (values * x).flatten(2).sum(-1)
        return x.new_tensor([w for _, w in self._rule]) @ radial

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        gradient: Tensor = torch.func.grad(lambda point: self.potential(point).sum())(x)
        return gradient

    def facts(self) -> FieldFacts:
        odd = isinstance(self.f, VectorField) and self.f.facts().odd
        return replace(self._standing_facts(), odd=odd, reason=f"gradient of a potential ({self.nodes} nodes)")

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=True)


class PresnovTangent(TangentField):
    r"""X_S = P(x)(f − ∇U) with P = I − xxᵀ/‖x‖²; P removes what the quadrature leaves of x·(f − ∇U) = 0."""

    def __init__(self, gradient: PresnovGradient) -> None:
        super().__init__()
        self.gradient, self.in_shape = gradient, gradient.in_shape

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        rest = self.gradient.f(x) - self.gradient(x)
        return tangent_part(rest.flatten(1), x.flatten(1)).reshape(x.shape)

    def facts(self) -> FieldFacts:
        odd, reason = self.gradient.facts().odd, "f − ∇U, projected on the tangent space"
        return replace(self._standing_facts(), odd=odd, reason=reason)

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(tangent=True)


@dataclass(frozen=True)
class Presnov:
    """f = ∇U + X_S: the parts of :func:`presnov`, usable in blocks; parameters of f are shared by both."""

    gradient: PresnovGradient
    tangent: PresnovTangent

    def potential(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """U(x) per sample."""
        return self.gradient.potential(x)


def presnov(f: Field, in_shape: tuple[int, ...] | None = None, *, nodes: int = 16) -> Presnov:
    r"""Decompose f = ∇U + X_S with x·X_S(x) = 0 and U(x) = ∫₀¹ x·f(tx) dt, unique up to a constant of U.

    ∇U is a gradient and X_S tangent to spheres to rounding; their sum is f up to the radial error of the quadrature,
    which is 0 for polynomials f of degree < 2 ``nodes``.

    Condition: f is C¹, acts on each sample of a batch alone, and torch can differentiate it. Since ∇U contains Df, the
    parts are then continuous, and C¹ where f is C²: of f = (|x₂|^{3/2}, 0) the second entry of ∇U is
    (3/5) x₁ sign(x₂) |x₂|^{1/2}, which is not Lipschitz.

    Args:
        f: (batch, …) ↦ (batch, …); a module keeps its parameters, and gradients reach them.
        in_shape: of one sample; that of f by default.
        nodes: of the Gauss–Legendre quadrature.

    Raises:
        InvalidArgument: no shape is known, or it is no tuple of sizes, or ``nodes`` no whole number from 1.

    Source: Presnov (2002), "Non-local decomposition of vector fields"; paper section 2.1; design D2.7.

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> parts, x = presnov(lambda x: 2 * x + x @ turn.mT, (2,)), torch.tensor([[1.0, 3.0]])
        >>> parts.gradient(x).round(decimals=4), parts.tangent(x).round(decimals=4)
        (tensor([[2., 6.]]), tensor([[ 3., -1.]]))
    """
    shape = getattr(f, "in_shape", None) if in_shape is None else in_shape
    if shape is None:
        raise InvalidArgument("f has no in_shape; give the shape of one sample as in_shape=.")
    nodes = require_whole("nodes", nodes, 1)
    gradient = PresnovGradient(f, require_sizes("in_shape", shape), nodes)
    return Presnov(gradient, PresnovTangent(gradient))
