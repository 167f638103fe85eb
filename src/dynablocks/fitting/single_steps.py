"""Errors of a surrogate's single steps: over all entries, by column, and of two half steps against a whole one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynablocks.data.trajectories import Pairs, Trajectories
from dynablocks.errors import NotConverged
from dynablocks.fitting.objective import SAMPLES_AT_ONCE, flow_map_residuals
from dynablocks.fitting.surrogates import FlowMap

if TYPE_CHECKING:
    from jaxtyping import Float


@torch.no_grad()
def column_errors(flow: FlowMap, data: Trajectories | Pairs) -> Float[Tensor, " entries"] | None:
    """Mean squared error of single steps by entry, over samples; ``None`` where a step's equation is not solved."""
    x, y, h = data.pairs()
    pieces = zip(*(torch.split(part, SAMPLES_AT_ONCE) for part in (x, y, h)), strict=True)
    try:
        squares = [flow_map_residuals(flow, *piece).square().sum(0) for piece in pieces]
    except NotConverged:
        return None
    return torch.stack(squares).sum(0) / len(x)


def one_step_error(flow: FlowMap, data: Trajectories | Pairs) -> float:
    """Mean squared error of single steps over samples and entries; infinite where a step's equation is not solved."""
    found = column_errors(flow, data)
    return math.inf if found is None else float(found.mean())


@torch.no_grad()
def step_halving_gap(flow: FlowMap, x: Float[Tensor, "batch entries"]) -> float | None:
    """The largest ‖Ψ^h(x) − Ψ^{h/2}(Ψ^{h/2}(x))‖, h the usual step; ``None`` where a step's equation is not solved.

    It is 0 for the flow of a field. A map fitted at one h has learned the field that makes up for its method's error
    there. By a method of order p half a step is then off by about half of this, and twice the step by 2^{p+1} times it.

    Example:
        >>> from dynablocks.fitting.surrogates import Structure, build
        >>> flow = build(Structure("none", ("a", "b"), width=4, step=0.1))
        >>> step_halving_gap(flow, torch.ones(3, 2, dtype=torch.float64)) < 1e-3
        True
    """
    half = flow.structure.step / 2
    try:
        return float((flow(x) - flow(flow(x, half), half)).norm(dim=1).max())
    except NotConverged:
        return None
