"""Linear maps between dimensions that keep a structure: mass, the symplectic form, the norm."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dynablocks.errors import InvalidArgument
from dynablocks.linear import OrthogonalDense
from dynablocks.properties import (
    Declaration,
    Equivariant,
    GradientNormPreserving,
    LinearInvariant,
    Lipschitz,
    NormPreserving,
    Positive,
    Structured,
)

if TYPE_CHECKING:
    from jaxtyping import Float


class MassLift(Structured):
    """Append zero entries (channels of an image): mass, norm and signs stay.

    Raises:
        InvalidArgument: not 1 <= in_entries <= out_entries.

    Source: paper section 4.3.

    Example:
        >>> MassLift(2, 4)(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2., 0., 0.]])
    """

    def __init__(self, in_entries: int, out_entries: int) -> None:
        super().__init__()
        _require_order(in_entries, out_entries)
        self.in_entries, self.out_entries = in_entries, out_entries
        self.in_shape, self.out_shape = (in_entries,), (out_entries,)

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch lifted ..."]:
        _require_entries(type(self).__name__, self.in_entries, x)
        return functional.pad(x, (0,) * (2 * (x.ndim - 2)) + (0, self.out_entries - self.in_entries))

    def declare(self) -> Declaration:
        kept = (Lipschitz(1.0), NormPreserving(), LinearInvariant(), Positive(), Equivariant())
        return Declaration.of(*kept, reason="zeros appended", title=f"MassLift({self.in_entries}->{self.out_entries})")


class MassProjection(Structured):
    r"""Keep the first k entries and add o = (1/k) Σ dropped to each of them: mass and nonnegativity stay.

    It is the matrix [I, (1/k)11ᵀ], of norm √(1 + s/k) for s dropped entries.

    Args:
        in_entries: k + s entries (channels of an image).
        out_entries: k.

    Raises:
        InvalidArgument: not 1 <= out_entries <= in_entries.

    Source: paper section 4.3, whose o = (1/s) Σ dropped keeps the mass for s = k only (design D3).

    Example:
        >>> MassProjection(4, 2)(torch.tensor([[1.0, 2.0, 3.0, 5.0]]))
        tensor([[5., 6.]])
    """

    def __init__(self, in_entries: int, out_entries: int) -> None:
        super().__init__()
        _require_order(out_entries, in_entries)
        self.in_entries, self.out_entries = in_entries, out_entries
        self.in_shape, self.out_shape = (in_entries,), (out_entries,)

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch kept ..."]:
        _require_entries(type(self).__name__, self.in_entries, x)
        kept, dropped = x[:, : self.out_entries], x[:, self.out_entries :]
        return kept + dropped.sum(1, keepdim=True) / self.out_entries

    def declare(self) -> Declaration:
        k, s = self.out_entries, self.in_entries - self.out_entries
        norm = math.nextafter(math.sqrt(1 + s / k) * (1 + 2.0**-52), math.inf) if s else 1.0
        kept = (Lipschitz(norm), LinearInvariant(), Positive(), Equivariant())
        title = f"MassProjection({self.in_entries}->{self.out_entries})"
        return Declaration.of(*kept, reason=f"‖[I, 11ᵀ/k]‖ = √(1 + s/k) = {norm:.5g}", title=title)


class SymplecticLift(Structured):
    r"""(q, p) ↦ (q, 0, p, 0): the canonical embedding E of R^{2m} in R^{2n}, with Eᵀ𝕁E = 𝕁 and EᵀE = I.

    Lift, symplectic block and :class:`SymplecticProjection` in turn: a map of R^{2m} whose symplecticity the projection
    loses, unless the block keeps the image of E.

    Args:
        in_entries, out_entries: 2m and 2n, even, m <= n.

    Raises:
        InvalidArgument: odd sizes, or a lift that goes down.

    Example:
        >>> SymplecticLift(2, 4)(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 0., 2., 0.]])
    """

    def __init__(self, in_entries: int, out_entries: int) -> None:
        super().__init__()
        _require_order(in_entries, out_entries, even=True)
        self.in_entries, self.out_entries = in_entries, out_entries
        self.in_shape, self.out_shape = (in_entries,), (out_entries,)

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch lifted ..."]:
        _require_entries(type(self).__name__, self.in_entries, x)
        pad = (0,) * (2 * (x.ndim - 2)) + (0, (self.out_entries - self.in_entries) // 2)
        return torch.cat([functional.pad(half, pad) for half in x.chunk(2, dim=1)], dim=1)

    def declare(self) -> Declaration:
        kept = (Lipschitz(1.0), NormPreserving(), LinearInvariant(), Positive(), Equivariant())
        title = f"SymplecticLift({self.in_entries}->{self.out_entries})"
        return Declaration.of(*kept, reason="canonical embedding (q, 0, p, 0)", title=title)


class SymplecticProjection(Structured):
    r"""(q, q′, p, p′) ↦ (q, p): the adjoint Eᵀ of :class:`SymplecticLift`, and its symplectic inverse 𝕁ᵀEᵀ𝕁.

    Args:
        in_entries, out_entries: 2n and 2m, even, m <= n.

    Raises:
        InvalidArgument: odd sizes, or a projection that goes up.

    Example:
        >>> SymplecticProjection(4, 2)(torch.tensor([[1.0, 5.0, 2.0, 6.0]]))
        tensor([[1., 2.]])
    """

    def __init__(self, in_entries: int, out_entries: int) -> None:
        super().__init__()
        _require_order(out_entries, in_entries, even=True)
        self.in_entries, self.out_entries = in_entries, out_entries
        self.in_shape, self.out_shape = (in_entries,), (out_entries,)

    def forward(self, x: Float[Tensor, "batch entries ..."]) -> Float[Tensor, "batch kept ..."]:
        _require_entries(type(self).__name__, self.in_entries, x)
        return torch.cat([half[:, : self.out_entries // 2] for half in x.chunk(2, dim=1)], dim=1)

    def declare(self) -> Declaration:
        kept = (Lipschitz(1.0), GradientNormPreserving(), Positive(), Equivariant())
        title = f"SymplecticProjection({self.in_entries}->{self.out_entries})"
        return Declaration.of(*kept, reason="entries dropped", title=title)


class NormLift(OrthogonalDense):
    r"""x ↦ Qx with QᵀQ = I, learned: ‖Qx‖ = ‖x‖.

    Args:
        in_entries, out_entries: the sizes, in_entries <= out_entries.
        method: ``"cayley"`` or ``"expm"`` (:data:`dynablocks.linear.ORTHOGONAL`).
        spread: size of the random start; 0 starts at (I, 0)ᵀ.

    Raises:
        InvalidArgument: a lift that goes down.

    Example:
        >>> bool(torch.isclose(NormLift(2, 5)(torch.tensor([[3.0, 4.0]])).norm(), torch.tensor(5.0)))
        True
    """

    def __init__(self, in_entries: int, out_entries: int, method: str = "cayley", spread: float = 1.0) -> None:
        _require_order(in_entries, out_entries)
        super().__init__(in_entries, out_entries, method, spread)

    def declare(self) -> Declaration:
        declared = super().declare()
        return replace(declared, reason=f"orthonormal columns, {declared.reason}")


def _require_entries(name: str, entries: int, x: Tensor) -> None:
    """What is declared holds for one size of the states."""
    if x.ndim < 2 or x.shape[1] != entries:
        raise InvalidArgument(f"the states have shape {tuple(x.shape)}; {name} takes (batch, {entries}, ...).")


def _require_order(smaller: int, larger: int, *, even: bool = False) -> None:
    if not 1 <= smaller <= larger:
        raise InvalidArgument(f"the sizes are {smaller} and {larger}; 1 <= {smaller} <= {larger} is needed.")
    if even and (smaller % 2 or larger % 2):
        raise InvalidArgument(f"the sizes are {smaller} and {larger}; states (q, p) need even sizes.")
