"""The Jacobian of a least-squares objective counts a parameter once, wherever it stands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynablocks.fitting import fit
from dynablocks.fitting.objective import Objective


class TwoNames(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.second(self.first(x).tanh())
        return value


class SharedWeight(nn.Module):
    """Two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.second(self.first(x).tanh())
        return value


@pytest.mark.parametrize("kind", [TwoNames, SharedWeight])
def test_the_jacobian_of_a_tied_module(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind().double()
    x, y = torch.randn(2, 7, 2, dtype=torch.float64)
    factor = Objective(module, (x, y)).triangular_factor()
    columns = []
    for parameter in module.parameters():
        rows = [torch.autograd.grad(r, parameter, retain_graph=True)[0].flatten() for r in (module(x) - y).flatten()]
        columns.append(torch.stack(rows))
    dense = torch.cat([*columns, (module(x) - y).detach().flatten()[:, None]], dim=1)
    assert torch.allclose(factor.mT @ factor, dense.mT @ dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [TwoNames, SharedWeight])
def test_a_tied_module_is_fitted(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 2, dtype=torch.float64)
    truth = kind().double()
    module = kind()
    history = fit(module, x, truth(x).detach(), adam_steps=100, finish_steps=60)
    assert history.loss < 1e-6 * history.records[0].loss
