"""Fields tangent to the spheres ‖x‖ = r, in the form X(x) = Λ(x)x with a skew-symmetric Λ."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_whole
from dynablocks.fields.activations import Activation, activation
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField, over_matrices
from dynablocks.fields.ridge import require_map
from dynablocks.linear import Dense, LinearMap, shared_weights
from dynablocks.linear.maps import why_unknown
from dynablocks.numerics.exponential import matrix_exponential
from dynablocks.numerics.solving import solve_systems

if TYPE_CHECKING:
    from jaxtyping import Float


def skew_matrix(pairs: Float[Tensor, "batch pairs"], entries: int) -> Float[Tensor, "batch entries entries"]:
    """A − Aᵀ for the strictly upper triangular A with these entries, row by row.

    Example:
        >>> skew_matrix(torch.tensor([[1.0, 2.0, 3.0]]), 3)
        tensor([[[ 0.,  1.,  2.],
                 [-1.,  0.,  3.],
                 [-2., -3.,  0.]]])
    """
    first, second = torch.triu_indices(entries, entries, 1, device=pairs.device)
    index = torch.zeros(entries, entries, dtype=torch.long, device=pairs.device)
    index[first, second] = index[second, first] = torch.arange(len(first), device=pairs.device)
    signs = pairs.new_ones(entries, entries).triu(1)
    matrix = pairs.index_select(-1, index.flatten()).reshape(*pairs.shape[:-1], entries, entries)
    return matrix * (signs - signs.mT)


def inverse_norm(x: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch 1"]:
    """1/‖x‖ for each row, 0 for x = 0, with finite derivatives."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)


def tangent_part(
    f: Float[Tensor, "batch entries"], x: Float[Tensor, "batch entries"]
) -> Float[Tensor, "batch entries"]:
    """P(x)f with P = I − xxᵀ/‖x‖², and 0 at x = 0, where no sphere passes."""
    unit = x * inverse_norm(x)
    return unit.square().sum(-1, keepdim=True) * f - (unit * f).sum(-1, keepdim=True) * unit


def rotate_in_plane(
    at: Float[Tensor, "batch ..."], rate: Float[Tensor, "batch ..."], v: Float[Tensor, "batch ..."], chart: str = "exp"
) -> Float[Tensor, "batch ..."]:
    r"""exp(Λ)v, or cay(Λ)v = (I − Λ/2)⁻¹(I + Λ/2)v, for Λ = (r aᵀ − a rᵀ)/‖a‖² with a = ``at`` and r = ``rate`` ⟂ a.

    With u = a/‖a‖, g = r/‖a‖ and θ = ‖g‖ both turn the plane of u and g, by θ or 2 arctan(θ/2):
    v + c(θ²u(u·v) + g(g·v)) + s(g(u·v) − u(g·v)) with s = sin θ/θ, c = (cos θ − 1)/θ² (exponential) or
    s = 1/(1 + θ²/4), c = −s/2 (Cayley).
    """
    inverse, flat = inverse_norm(at.flatten(1)), v.flatten(1)
    u, g = at.flatten(1) * inverse, rate.flatten(1) * inverse
    square = g.square().sum(-1, keepdim=True)
    if chart == "cayley":
        s = 1 / (1 + square / 4)
        c = -s / 2
    else:
        theta = torch.linalg.vector_norm(g, dim=-1, keepdim=True)
        s, c = _sinc(theta), -0.5 * _sinc(theta / 2).square()
    along, across = (u * flat).sum(-1, keepdim=True), (g * flat).sum(-1, keepdim=True)
    return keep_norm(flat + c * (square * along * u + across * g) + s * (along * g - across * u), v)


def keep_norm(moved: Float[Tensor, "batch n"], v: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """``moved`` scaled to the norm of v, in the shape of v: what rounding did to the norm is undone."""
    length = torch.linalg.vector_norm(v.flatten(1), dim=-1, keepdim=True)
    return (moved * (length * inverse_norm(moved))).reshape(v.shape)


def _sinc(t: Tensor) -> Tensor:
    small = t.abs() < 1e-4
    return torch.where(small, 1 - t.square() / 6, torch.where(small, 1.0, t).sin() / torch.where(small, 1.0, t))


class TangentField(VectorField):
    r"""X with ⟨x, X(x)⟩ = 0: X(x) = Λ(x)x with Λ(x) = (X(x)xᵀ − x X(x)ᵀ)/‖x‖².

    Lie-group methods move by rotations exp(hΛ) or cay(hΛ). This Λ has rank two, so both cost O(n)
    (:func:`rotate_in_plane`). A subclass with another Λ overrides :meth:`rotate`; where it declares its field odd, its
    Λ must be even.
    """

    def rotate(
        self, at: Float[Tensor, "batch ..."], v: Float[Tensor, "batch ..."], time: Tensor | float, chart: str = "exp"
    ) -> Float[Tensor, "batch ..."]:
        """exp(tΛ(at))v, or cay(tΛ(at))v with ``chart="cayley"``."""
        return rotate_in_plane(at, time * self(at), v, chart)


@FIELDS.register("sphere")
class SphereField(TangentField):
    r"""X(x) = P(x) Bᵀ Σ(Cx + d) with P(x) = I − xxᵀ/‖x‖²: every tangent field is one P(x)f(x). X(0) = 0.

    Every P f with f(0) ≠ 0 jumps at 0, so there is no Lipschitz constant.

    Args:
        inner: C, dense or convolutional.
        outer: B, of the same shapes; a copy of C when ``None``, with parameters of its own.
        sigma: σ; an odd one without bias makes the field odd.
        bias: whether there is a d (one per output channel of C).

    Raises:
        InvalidArgument: B or C is no :class:`~dynablocks.linear.LinearMap`, or they have different shapes.

    Source: paper section 2.1; design D2.7.

    Example:
        >>> field = SphereField(Dense(3, 5)).double()
        >>> x = torch.randn(4, 3, dtype=torch.float64)
        >>> bool((x * field(x)).sum(1).abs().max() < 1e-14)
        True
    """

    def __init__(
        self,
        inner: LinearMap,
        outer: LinearMap | None = None,
        sigma: str | Activation = "tanh",
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.inner = require_map("inner", inner)
        self.outer = copy.deepcopy(inner) if outer is None else require_map("outer", outer)
        if (inner.in_shape, inner.out_shape) != (self.outer.in_shape, self.outer.out_shape):
            maps = [f"{m.in_shape} -> {m.out_shape}" for m in (inner, self.outer)]
            raise InvalidArgument(f"C maps {maps[0]}, B maps {maps[1]}; they must have the same shapes.")
        self.in_shape, self.sigma = inner.in_shape, activation(sigma)
        self.bias = nn.Parameter(torch.zeros(inner.out_shape[0])) if bias else None

    @classmethod
    def example(cls) -> SphereField:
        return cls(Dense(3, 5), Dense(3, 5))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        f = self.outer.adjoint(self.sigma(self.inner.affine(x, self.bias)))
        return tangent_part(f.flatten(1), x.flatten(1)).reshape(x.shape)

    def facts(self) -> FieldFacts:
        odd = self.sigma.odd and self.bias is None and why_unknown(self.inner, self.outer) is None
        return FieldFacts(odd=odd, tangent=True, reason="tangent to spheres; it may jump at 0")


@FIELDS.register("rotation")
class RotationField(TangentField):
    r"""X(x) = Λ(x)x with Λ = A − Aᵀ, A strictly upper triangular with the entries BᵀΣ(Cx + b) ∈ R^{n(n−1)/2}.

    Smooth at 0, unlike :class:`SphereField`; products of σ and x, so there is no global Lipschitz constant.

    Args:
        entries: n >= 2.
        hidden: the number of rows of C and B.
        sigma, bias: of the hidden layer.

    Raises:
        InvalidArgument: fewer than two entries, or ``hidden`` is no whole number from 1.

    Source: paper appendix A; design D2.7.

    Example:
        >>> field = RotationField(3, 5).double()
        >>> x = torch.randn(4, 3, dtype=torch.float64)
        >>> bool(torch.equal(field.generator(x), -field.generator(x).mT))
        True
    """

    def __init__(self, entries: int, hidden: int = 10, sigma: str | Activation = "tanh", *, bias: bool = True) -> None:
        super().__init__()
        entries, hidden = require_whole("entries", entries, 2), require_whole("hidden", hidden, 1)
        self.in_shape, self.sigma = (entries,), activation(sigma)
        self.inner, self.outer = Dense(entries, hidden), Dense(entries * (entries - 1) // 2, hidden)
        self.bias = nn.Parameter(torch.zeros(hidden)) if bias else None

    @classmethod
    def example(cls) -> RotationField:
        return cls(3, 5)

    def generator(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n n"]:
        """Λ(x), skew-symmetric, with Λ(x)x = X(x)."""
        with shared_weights(self.inner), shared_weights(self.outer):
            pairs = self.outer.adjoint(self.sigma(self.inner.affine(x, self.bias)))
        return skew_matrix(pairs, self.in_shape[0])

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        return (self.generator(x) @ x.unsqueeze(-1)).squeeze(-1)

    def rotate(
        self, at: Float[Tensor, "batch n"], v: Float[Tensor, "batch n"], time: Tensor | float, chart: str = "exp"
    ) -> Float[Tensor, "batch n"]:
        # Rounding of exp and of the solve grows with tΛ; it moves v along the sphere only, once the norm is put back.
        matrix, column = over_matrices(time) * self.generator(at), v.unsqueeze(-1)
        if chart == "cayley":
            eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
            moved = solve_systems(eye - matrix / 2, column + matrix @ column / 2)
        else:
            moved = matrix_exponential(matrix) @ column
        return keep_norm(moved.squeeze(-1), v)

    def facts(self) -> FieldFacts:
        return FieldFacts(tangent=True, reason="Λ(x)x with skew Λ")
