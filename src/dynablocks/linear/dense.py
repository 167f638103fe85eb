"""Dense linear maps: free, row-normalised, orthogonal."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import require_whole
from dynablocks.linear.maps import LinearMap, require_shape
from dynablocks.linear.orthogonal import ORTHOGONAL, orthogonal_start, orthonormality_defect
from dynablocks.numerics.bounds import Bounds, linear_norm_bounds, smallest_singular_value_bounds
from dynablocks.properties.own_code import overrides, shadowed

if TYPE_CHECKING:
    from jaxtyping import Float


class Dense(LinearMap):
    """x ↦ Wx for a free matrix W (out, in), started orthogonal.

    Args:
        in_features, out_features: the sizes.

    Raises:
        InvalidArgument: a size is no whole number from 1; when called, an input of another size.

    Example:
        >>> Dense(4, 3)(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        columns, rows = require_whole("in_features", in_features, 1), require_whole("out_features", out_features, 1)
        self.in_shape, self.out_shape = (columns,), (rows,)
        self.matrix = nn.Parameter(self.start(rows, columns))

    def start(self, rows: int, columns: int) -> Tensor:
        return nn.init.orthogonal_(torch.empty(rows, columns))

    def compute_weight(self) -> Float[Tensor, "out in"]:
        return self.matrix

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        require_shape(self, self.in_shape, x)
        return nn.functional.linear(x, weight)

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        require_shape(self, self.out_shape, y)
        return nn.functional.linear(y, weight.mT)

    def compute_norm_bounds(self) -> Bounds:
        return linear_norm_bounds(self.weight.detach())

    def compute_smallest_singular_value(self) -> float:
        return smallest_singular_value_bounds(self.weight.detach()).lower


class OrthogonalDense(Dense):
    r"""x ↦ Qx with orthonormal rows (out <= in) or columns (out >= in), Q cut from an orthogonal matrix.

    Args:
        in_features, out_features: the sizes; the larger one is the size of the orthogonal matrix.
        method: ``"cayley"`` or ``"expm"`` (:data:`dynablocks.linear.ORTHOGONAL`).
        spread: size of the random start; 0 starts at the (cut) identity.

    Example:
        >>> linear = OrthogonalDense(4, 2).double()
        >>> bool(torch.allclose(linear.weight @ linear.weight.mT, torch.eye(2, dtype=torch.float64)))
        True
    """

    def __init__(self, in_features: int, out_features: int, method: str = "cayley", spread: float = 1.0) -> None:
        self.spread = spread
        self.parametrisation = ORTHOGONAL.get_known(method)
        super().__init__(in_features, out_features)
        self.rows_orthonormal = self.out_shape[0] <= self.in_shape[0]
        self.columns_orthonormal = self.out_shape[0] >= self.in_shape[0]

    def start(self, rows: int, columns: int) -> Tensor:
        return orthogonal_start((), max(rows, columns), min(rows, columns), self.spread)

    def weight_group(self) -> Hashable | None:
        if overrides(self, OrthogonalDense, "compute_weight") or shadowed(self, "compute_weights"):
            return None
        matrix = self.matrix
        wide = self.out_shape[0] < self.in_shape[0]
        return type(self).compute_weights, self.parametrisation, wide, matrix.shape, matrix.dtype, matrix.device

    def compute_weights(self, alike: Sequence[LinearMap]) -> Sequence[Float[Tensor, "out in"]]:
        frames = self.parametrisation(torch.stack([m.matrix for m in alike if isinstance(m, OrthogonalDense)]))
        return (frames if self.out_shape[0] >= self.in_shape[0] else frames.mT).unbind()

    def compute_weight(self) -> Float[Tensor, "out in"]:
        return self.compute_weights([self])[0]

    def compute_orthonormality_defect(self) -> float:
        return orthonormality_defect(self.weight)
