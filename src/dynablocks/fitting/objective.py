"""A least-squares objective: its value, and the triangular factor of its Jacobian for second-order methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from dynablocks.errors import InvalidArgument, NotConverged

Residuals = Callable[..., Tensor]
"""``residuals(module, x, y)`` or ``residuals(module, x, y, step)`` -> (samples, …), each sample on its own."""

CHUNK_ENTRIES = 4_000_000
SAMPLES_AT_ONCE = 4096
"""Values are computed of so many samples at a time: an implicit step needs far more room than its states."""


def flow_map_residuals(module: nn.Module, x: Tensor, y: Tensor, *step: Tensor) -> Tensor:
    """module(x) − y, or module(x, step) − y.

    Raises:
        InvalidArgument: they have different shapes.
    """
    output: Tensor = module(x, *step)
    if output.shape != y.shape:
        raise InvalidArgument(
            f"the module gives {tuple(output.shape)} for targets of shape {tuple(y.shape)}; equal shapes are needed: "
            "reshape the targets (y[:, None] makes a column) or what the module gives."
        )
    return output - y


class Objective:
    r"""½ mean_i ‖r_i(θ)‖² over samples i, for residuals r_i of a module with parameters θ.

    Args:
        module: holds θ, its parameters that require gradients.
        data: (x, y) or (x, y, step), each with one row a sample.
        residuals: of the module on a batch; row i may depend on sample i only.
    """

    def __init__(self, module: nn.Module, data: Sequence[Tensor], residuals: Residuals = flow_map_residuals) -> None:
        self.module, self.data, self.residuals = module, tuple(data), residuals
        self._call = _Call(module, residuals)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.unknowns = sum(p.numel() for p in self.parameters)

    @property
    def samples(self) -> int:
        return len(self.data[0])

    def loss(self, rows: Tensor | None = None) -> Tensor:
        """The objective on all samples, or on the chosen ones, with gradients."""
        chosen = self.data if rows is None else tuple(part[rows] for part in self.data)
        found = self._call(*chosen)
        return 0.5 * found.reshape(len(found), -1).square().sum(1).mean()

    @torch.no_grad()
    def value(self) -> float:
        """The objective on all samples; infinite where an implicit step has no solution."""
        try:
            total = sum(float(self._call(*part).square().sum()) for part in self._chunks(SAMPLES_AT_ONCE))
        except NotConverged:
            return math.inf
        return 0.5 * total / self.samples

    def triangular_factor(self) -> Tensor:
        r"""R (p + 1, p + 1), upper triangular, with RᵀR = [J r]ᵀ[J r] for all residuals r and J = ∂r/∂θ, p unknowns.

        By Householder QR of chunks of rows, one after the other: no product JᵀJ, so the condition number of J is not
        squared, and memory does not grow with the number of samples.
        """
        factor: Tensor | None = None
        for part in self._chunks(self._chunk_samples()):
            rows = self._rows(part)
            stacked = rows if factor is None else torch.cat([factor, rows])
            factor = torch.linalg.qr(stacked, mode="r").R
        assert factor is not None
        missing = self.unknowns + 1 - factor.shape[0]
        return torch.cat([factor, factor.new_zeros(missing, factor.shape[1])]) if missing > 0 else factor

    def residual_count(self) -> int:
        """The number of residuals of all samples."""
        with torch.no_grad():
            return self.samples * self._call(*(part[:1] for part in self.data)).numel()

    def _rows(self, part: Sequence[Tensor]) -> Tensor:
        """[J r] of some samples: (samples · m, p + 1)."""
        parameters = {name: p for name, p in self._call.named_parameters() if p.requires_grad}
        places = _places(self._call, parameters)

        def one(chosen: dict[str, Tensor], *sample: Tensor) -> tuple[Tensor, Tensor]:
            given = {place: chosen[name] for place, name in places.items()}
            rows = tuple(entry[None] for entry in sample)
            residual = functional_call(self._call, given, rows, tie_weights=False).flatten()
            return residual, residual

        axes = (None, *(0 for _ in part))
        with torch.no_grad():
            jacobians, residual = vmap(jacrev(one, has_aux=True), in_dims=axes)(parameters, *part)
        columns = [jacobians[name].reshape(*residual.shape, -1) for name in parameters]
        return torch.cat([*columns, residual[..., None]], dim=2).flatten(0, 1).detach()

    def _chunk_samples(self) -> int:
        per_sample = max(1, self.residual_count() // self.samples)
        return max(1, min(self.samples, max(CHUNK_ENTRIES, 4 * self.unknowns**2) // (per_sample * (self.unknowns + 1))))

    def _chunks(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, self.samples, size):
            yield tuple(part[start : start + size] for part in self.data)


class _Call(nn.Module):
    """The residuals as a module's forward, so that ``functional_call`` can exchange its parameters."""

    def __init__(self, module: nn.Module, residuals: Residuals) -> None:
        super().__init__()
        self.module, self._residuals = module, residuals

    def forward(self, *sample: Tensor) -> Tensor:
        return self._residuals(self.module, *sample)


def _places(module: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """Every name by which a module holds one of the parameters -> the parameter's name, each module object once.

    ``functional_call`` would tie a module that stands under two names by exchanging its parameters twice, and then puts
    the exchanged ones back.
    """
    names = {id(p): name for name, p in parameters.items()}
    return {
        f"{prefix}.{key}" if prefix else key: names[id(p)]
        for prefix, part in module.named_modules()
        for key, p in part.named_parameters(recurse=False)
        if id(p) in names
    }
