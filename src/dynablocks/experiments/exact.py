"""Solutions of differential equations to rounding, against which flows and methods are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float64


def exact_solution(
    field: Callable[[Tensor], Tensor], start: Float64[Tensor, "batch ..."], time: float
) -> Float64[Tensor, "batch ..."]:
    """Φ_t of each start, float64, by DOP853 at relative tolerance 1e-13.

    Args:
        field: the right-hand side, of a batch of states.
        start: the states at time 0.
        time: t.

    Example:
        >>> end = exact_solution(lambda x: -x, torch.ones(1, 1, dtype=torch.float64), 1.0)
        >>> round(float(end), 12)
        0.367879441171
    """
    from scipy.integrate import solve_ivp

    shape = start.shape

    def slope(_: float, flat: Any) -> Any:
        with torch.no_grad():
            return field(torch.from_numpy(flat).reshape(shape)).flatten().numpy()

    solved = solve_ivp(slope, (0.0, time), start.flatten().numpy(), method="DOP853", rtol=1e-13, atol=1e-15)
    return torch.from_numpy(solved.y[:, -1].copy()).reshape(shape)
