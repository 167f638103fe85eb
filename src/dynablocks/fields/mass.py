"""Fields that keep linear functions of the state, such as mass, and nonnegative ones among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.errors import InvalidArgument, require_whole
from dynablocks.fields.activations import Activation, activation
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField, require_field
from dynablocks.fields.gradient import GradientField
from dynablocks.linear import Dense, linear_norm_bounds, shared_weights
from dynablocks.numerics.rounding import EPS

if TYPE_CHECKING:
    from jaxtyping import Float

Weights = tuple[float, ...]


def span_basis(vectors: Sequence[Sequence[float]]) -> np.ndarray:
    """Orthonormal columns, in float64, that span the vectors: as many as these are linearly independent, to rounding.

    Each is taken over its largest entry, so that its unit does not matter. An array: a tensor made in inference mode or
    inside a function transform could not be used outside of it.

    Args:
        vectors: one or more, of finite numbers and of one length; they may be dependent, or 0.

    Example:
        >>> basis = span_basis([(1.0, 1.0, 0.0), (0.0, 0.0, 5.0), (1.0, 1.0, 1.0)])
        >>> basis.shape, bool(abs(basis[0] - basis[1]).max() < 1e-14)
        ((3, 2), True)
    """
    matrix = np.array(vectors, dtype=np.float64).T
    largest = np.abs(matrix).max(axis=0)
    columns, sizes, _ = np.linalg.svd(matrix / np.where(largest > 0, largest, 1.0), full_matrices=False)
    basis: np.ndarray = columns[:, sizes > max(matrix.shape) * EPS * sizes[0]]
    return basis


class InvariantSpace:
    r"""span(w₁, …, w_m): the projection P = I − QQᵀ away from it, Q an orthonormal basis computed in float64.

    Args:
        entries: n.
        weights: m < n linearly independent vectors of n numbers; ``None`` is 1 = (1, …, 1).

    Raises:
        InvalidArgument: the weights are not m < n linearly independent vectors of n finite numbers.

    Example:
        >>> projected = InvariantSpace(3, [None]).remove(torch.tensor([[1.0, 2.0, 3.0]]))
        >>> bool(torch.allclose(projected, torch.tensor([[-1.0, 0.0, 1.0]]), atol=1e-6))
        True
    """

    def __init__(self, entries: int, weights: Sequence[Sequence[float] | None]) -> None:
        entries = require_whole("entries", entries, 1)
        rows = [(1.0,) * entries if w is None else tuple(map(float, w)) for w in weights]
        if not rows or any(len(row) != entries or not all(map(math.isfinite, row)) for row in rows):
            raise InvalidArgument(
                f"weights {list(weights)} are not vectors of {entries} finite numbers; give one each."
            )
        basis = span_basis(rows)
        if len(rows) >= entries or basis.shape[1] < len(rows):
            raise InvalidArgument(
                f"{len(rows)} invariants of {entries} entries must be linearly independent and fewer than the entries."
            )
        self._weights: tuple[Weights | None, ...] = tuple(None if set(row) == {1.0} else row for row in rows)
        self._basis: Tensor = torch.from_numpy(basis)

    @property
    def weights(self) -> tuple[Weights | None, ...]:
        """w₁, …, w_m as they were given, ``None`` for 1: Q is of these, so that neither can be set."""
        return self._weights

    @property
    def basis(self) -> Float[Tensor, "entries m"]:
        """Q."""
        return self._basis

    def remove(self, v: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        """Pv."""
        basis = self.basis.to(v)
        return v - (v @ basis) @ basis.mT


class ExchangeField(VectorField):
    r"""Entries that exchange mass in pairs, so wᵀX(x) = 0: how much, the outputs BᵀΣ(Cx + b) of a hidden layer tell.

    What :class:`MassPreservingField` and :class:`CompartmentField` have in common; they differ in what the outputs are.

    Args:
        entries: n >= 2.
        hidden: the number of rows of C and B.
        sigma: σ of the hidden layer.
        outputs: the number of columns of B.
        weights: w; ``None`` is w = 1.
        bias: whether there is a b.

    Raises:
        InvalidArgument: fewer than two entries, or weights of another length, not finite or all zero.
    """

    def __init__(
        self,
        entries: int,
        hidden: int,
        sigma: str | Activation,
        *,
        outputs: int,
        weights: Sequence[float] | None,
        bias: bool,
    ) -> None:
        super().__init__()
        entries, hidden = require_whole("entries", entries, 2), require_whole("hidden", hidden, 1)
        self.space = InvariantSpace(entries, [weights])
        self.in_shape, self.sigma = (entries,), activation(sigma)
        self.inner, self.outer = Dense(entries, hidden), Dense(outputs, hidden)
        self.bias = nn.Parameter(torch.zeros(hidden)) if bias else None

    @property
    def weights(self) -> Weights:
        """w as it was given: the facts rest on it, so that it cannot be set."""
        return self.space.weights[0] or (1.0,) * self.in_shape[0]

    def hidden_layer(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch hidden"]:
        """Σ(Cx + b)."""
        return self.sigma(self.inner.affine(x, self.bias))

    def outputs(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch outputs"]:
        """BᵀΣ(Cx + b)."""
        return self.outer.adjoint(self.hidden_layer(x))

    def extra_repr(self) -> str:
        return f"weights={self.space.weights[0] or 1}"


@FIELDS.register("mass-preserving")
class MassPreservingField(ExchangeField):
    r"""X(x) = (A(x) − A(x)ᵀ)w with A strictly upper triangular, its entries BᵀΣ(Cx + b) ∈ R^{n(n−1)/2}: wᵀX = 0.

    Every Runge–Kutta step keeps the mass wᵀx. The entry of the pair (i, j) enters Xᵢ as +wⱼ and Xⱼ as −wᵢ, so with the
    fixed matrix D of these coefficients X = GΣ(Cx + b) with G = DBᵀ: one product, not one of n² entries a sample.

    Args:
        entries: n >= 2.
        hidden: the number of rows of C and B.
        sigma: σ of the hidden layer.
        weights: w, no entry 0; ``None`` is w = 1.
        bias: whether there is a b; without it an odd σ makes the field odd.

    Raises:
        InvalidArgument: fewer than two entries, or weights of another length, not finite or zero.

    Source: paper section 4.3, eq. (4.2); design D2.11.

    Example:
        >>> field = MassPreservingField(3, 8, weights=(1.0, 2.0, 4.0)).double()
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> bool((field(x) @ torch.tensor([1.0, 2.0, 4.0]).double()).abs().max() < 1e-14)
        True
    """

    def __init__(
        self,
        entries: int,
        hidden: int = 50,
        sigma: str | Activation = "tanh",
        *,
        weights: Sequence[float] | None = None,
        bias: bool = True,
    ) -> None:
        entries = require_whole("entries", entries)
        pairs = entries * (entries - 1) // 2
        super().__init__(entries, hidden, sigma, outputs=pairs, weights=weights, bias=bias)
        if 0 in self.weights:
            raise InvalidArgument(f"weights are {self.weights}; all must be nonzero; ConstrainedField allows zeros.")

    @classmethod
    def example(cls) -> MassPreservingField:
        return cls(3, 5, weights=(1.0, 2.0, 0.5))

    def forward(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        with shared_weights(self.inner), shared_weights(self.outer):
            return self.space.remove(functional.linear(self.hidden_layer(x), self.mixing()))

    def incidence(self) -> Float[Tensor, "entries pairs"]:
        """D in float64: wⱼ at i and −wᵢ at j for each pair i < j, so wᵀD = 0 exactly."""
        n = self.in_shape[0]
        first, second = torch.triu_indices(n, n, 1)
        weights, pairs = torch.tensor(self.weights, dtype=torch.float64), torch.arange(len(first))
        matrix = torch.zeros(n, len(first), dtype=torch.float64)
        matrix[first, pairs] = weights[second]
        matrix[second, pairs] = -weights[first]
        return matrix

    def mixing(self) -> Float[Tensor, "entries hidden"]:
        """G = DBᵀ, with wᵀG = 0."""
        return self.incidence().to(self.outer.weight) @ self.outer.weight.mT

    def facts(self) -> FieldFacts:
        lipschitz = self._lipschitz()
        return replace(
            self._standing_facts(),
            lipschitz=lipschitz,
            one_sided=lipschitz,
            odd=self.sigma.odd and self.bias is None,
            reason="‖DBᵀ‖ · max σ' · ‖C‖",
        )

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(linear_invariants=self.space.weights)

    def _lipschitz(self) -> float:
        incidence, outer = self.incidence(), self.outer.weight.detach().cpu().double()
        rounding = len(outer[0]) * 2.0**-52 * float(incidence.norm()) * float(outer.norm())
        mixing = linear_norm_bounds(incidence @ outer.mT).upper * (1 + 2.0**-48) + rounding
        return mixing * self.sigma.lipschitz * self.inner.norm_bounds().upper * (1 + 2.0**-50)


@FIELDS.register("compartments")
class CompartmentField(ExchangeField):
    r"""Compartments that exchange mass: zᵢ = wᵢxᵢ, żᵢ = Σⱼ (rᵢⱼ(x)zⱼ − rⱼᵢ(x)zᵢ) with rates rᵢⱼ >= 0, so wᵀX = 0.

    The rates r(x) = softplus(BᵀΣ(Cx + b) + c), one for each ordered pair, move mass from j to i in proportion to what j
    has, so Xᵢ >= 0 where xᵢ = 0 <= x: compartments stay nonnegative along solutions, and in steps of the Patankar
    methods. Products of rates and x have no global Lipschitz constant.

    Args:
        entries: n >= 2.
        hidden: the number of rows of C and B.
        sigma: σ of the hidden layer.
        weights: w, all > 0; ``None`` is w = 1.
        bias: whether there are b and c.

    Raises:
        InvalidArgument: fewer than two entries, or weights of another length, not finite or not positive.

    Source: Burchard, Deleersnijder and Meister (2003), "A high-order conservative Patankar-type discretisation".

    Example:
        >>> field, x = CompartmentField(3, 8).double(), torch.tensor([[0.0, 1.0, 2.0]]).double()
        >>> bool(field(x)[0, 0] >= 0), bool(field(x).sum().abs() < 1e-13), field.rates(x).shape
        (True, True, torch.Size([1, 3, 3]))
    """

    def __init__(
        self,
        entries: int,
        hidden: int = 50,
        sigma: str | Activation = "tanh",
        *,
        weights: Sequence[float] | None = None,
        bias: bool = True,
    ) -> None:
        entries = require_whole("entries", entries)
        ordered_pairs = entries * (entries - 1)
        super().__init__(entries, hidden, sigma, outputs=ordered_pairs, weights=weights, bias=bias)
        if min(self.weights) <= 0:
            raise InvalidArgument(f"weights are {self.weights}; all must be positive.")
        self.rate_bias = nn.Parameter(torch.zeros(ordered_pairs)) if bias else None

    @classmethod
    def example(cls) -> CompartmentField:
        return cls(3, 5, weights=(1.0, 2.0, 0.5))

    def forward(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries"]:
        weights = x.new_tensor(self.weights)
        flux = self.rates(x) * (weights * x).unsqueeze(-2)
        # F − Fᵀ is antisymmetric to the last bit, so the mass that leaves j is the mass that arrives.
        return (flux - flux.mT).sum(-1) / weights

    def rates(self, x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch entries entries"]:
        """rᵢⱼ(x) >= 0, the rate at which mass moves from j to i (per unit of time and of mass at j); rᵢᵢ = 0."""
        raw = self.outputs(x)
        rates = functional.softplus(raw if self.rate_bias is None else raw + self.rate_bias)
        n = self.in_shape[0]
        # n(n − 1) rates, cut into rows of n and shifted by one zero a row, lie off the diagonal.
        rows = functional.pad(rates.reshape(*rates.shape[:-1], n - 1, n), (1, 0))
        return functional.pad(rows.flatten(-2), (0, 1)).reshape(*rates.shape[:-1], n, n)

    def facts(self) -> FieldFacts:
        # Of the weights that X divides by: the space may have been replaced, or a subclass says weights of its own.
        weights = tuple(map(float, self.weights))
        stated, least = None if set(weights) == {1.0} else weights, min(weights)
        return FieldFacts(
            linear_invariants=() if 0 in weights else (stated,),
            positive=least > 0,
            reason="rates · x: no global Lipschitz constant" if least > 0 else f"a weight is {least:g}, not positive",
        )


@FIELDS.register("constrained")
class ConstrainedField(VectorField):
    r"""X(x) = P f(x) with P the orthogonal projector onto {v: wₖᵀv = 0 for all k}: any field f, several invariants.

    Args:
        inner: f.
        weights: the vectors wₖ (of the flattened state), linearly independent, fewer than its entries; ``None`` among
            them is 1.

    Raises:
        InvalidArgument: ``inner`` is no vector field or has no ``in_shape``, or the weights do not fit.

    Source: design D2.11; ‖P‖ = 1, so the Lipschitz constant is that of f.

    Example:
        >>> field = ConstrainedField(GradientField(Dense(3, 4), "tanh"), [None, (0.0, 1.0, 2.0)])
        >>> bool(field(torch.randn(2, 3)).sum(1).abs().max() < 1e-6), field.facts().linear_invariants
        (True, (None, (0.0, 1.0, 2.0)))
    """

    def __init__(self, inner: VectorField, weights: Sequence[Sequence[float] | None]) -> None:
        super().__init__()
        self.inner = require_field("inner", inner)
        self.in_shape = inner.in_shape
        self.space = InvariantSpace(math.prod(inner.in_shape), weights)

    @classmethod
    def example(cls) -> ConstrainedField:
        return cls(GradientField(Dense(4, 5), "tanh"), [None, (1.0, -2.0, 0.5, 0.0)])

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        rate = self.inner(x).flatten(1)
        # Twice: the first leaves rounding of the size of f, the second of the size of Pf.
        return self.space.remove(self.space.remove(rate)).reshape(x.shape)

    def facts(self) -> FieldFacts:
        inner = self.inner.facts().euclidean()
        lipschitz = inner.lipschitz * (1 + 2.0**-48)
        return replace(
            self._standing_facts(),
            lipschitz=lipschitz,
            one_sided=lipschitz,
            odd=inner.odd,
            reason=f"projected, {inner.reason}",
        )

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(linear_invariants=self.space.weights)

    def extra_repr(self) -> str:
        return f"invariants={self.space.weights}"
