"""The declared properties of a surrogate, measured where it was not fitted."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from dynablocks.errors import NotConverged
from dynablocks.fitting.surrogates import FlowMap
from dynablocks.properties import Property, verify
from dynablocks.properties.declarations import OfFunction
from dynablocks.properties.verify import Verification


class OfSizeOne(nn.Module):
    """z ↦ Φ(sz)/s for a surrogate Φ and the size s of its data.

    Every property of Φ is one of this map, and what rounding may do to it does not depend on the unit of the data.
    """

    def __init__(self, flow: FlowMap) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, z: Tensor) -> Tensor:
        return self.flow(z * self.flow.scale) / self.flow.scale

    def inverse(self, z: Tensor) -> Tensor:
        return self.flow.inverse(z * self.flow.scale) / self.flow.scale

    def claims(self) -> tuple[Property, ...]:
        """What Φ declares, of this map."""
        return tuple(self._claim(kept) for kept in self.flow.properties)

    def _claim(self, kept: Property) -> Property:
        if not isinstance(kept, OfFunction) or kept.function is None:
            return kept
        function = kept.function
        return replace(kept, function=lambda z: function(z * self.flow.scale))


def verified(flow: FlowMap, x: Tensor) -> Verification | None:
    """The checks at those states from which a step's equation is solved; ``None`` where it is at none."""
    solved = [state for state in x if _is_solved(flow, state)]
    scaled = OfSizeOne(copy.deepcopy(flow).double())
    try:
        return verify(scaled, torch.stack(solved) / flow.scale, against=scaled.claims()) if solved else None
    except NotConverged:
        return None


@torch.no_grad()
def _is_solved(flow: FlowMap, state: Tensor) -> bool:
    try:
        flow(state[None])
    except NotConverged:
        return False
    return True
