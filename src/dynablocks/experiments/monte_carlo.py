"""Measured Lipschitz constants of pairs of steps: dense Jacobians of random and of adversarial weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_choice, require_whole
from dynablocks.experiments.cells import Cell, Store
from dynablocks.switching import REGIONS, ExactFlowRegion, FlexibleSignal, PrescribedSignal, Region

if TYPE_CHECKING:
    from jaxtyping import Float64

SIGNALS = {"prescribed": PrescribedSignal, "flexible": FlexibleSignal}
SIZES = range(2, 9)
TOLERANCE = 1e-12
"""Rounding allowed above 1: a composed Jacobian is a dozen products of 8 × 8 matrices, about 100 eps."""


@dataclass(frozen=True)
class PairStep:
    r"""How a pair (h₁, h₂) is turned into a map: the signal's pieces, and what a piece's Jacobian can be.

    A piece of size h of the field ∓AᵀΣ(Ax + b) with orthogonal A has the Jacobian Aᵀ diag(f) A. D = diag σ′ has entries
    in [a, 1]; f = 1 ∓ hD for explicit Euler, f = e^{∓hD} for the exact flow. The norm of a product of such Jacobians is
    convex in each D, so its largest value is found at corners, D ∈ {a, 1}ⁿ. σ of the expansive field is that of the
    contractive one under the prescribed signal (3.11), a ReLU under the flexible one (3.12).

    Args:
        region: the region whose signal it is; it fixes S, a, the parts of the contractive step and Euler or exact flow.
        signal: ``"prescribed"`` or ``"flexible"``.

    Example:
        >>> from dynablocks.switching import TightRegion
        >>> step = PairStep(TightRegion(0.5), "prescribed")
        >>> first, second = torch.tensor([[4 / 3], [2.0]], dtype=torch.float64)
        >>> round(float(step.worst_constants(first, second)), 12)
        1.0
    """

    region: Region
    signal: str = "prescribed"

    def __post_init__(self) -> None:
        require_choice("signal", self.signal, SIGNALS)

    def pieces(
        self, first: Float64[Tensor, " pair"], second: Float64[Tensor, " pair"]
    ) -> list[tuple[int, Float64[Tensor, " pair"]]]:
        """What the signal takes in turn, for all pairs at once and without projecting them into the region."""
        signal = SIGNALS[self.signal](self.region)
        signal.steps = nn.Parameter(torch.stack([first, second]), requires_grad=False)
        return signal.pieces()

    def slopes(self, index: int) -> tuple[float, float]:
        """The smaller and the larger slope of field ``index``: 0 contractive, 1 expansive."""
        return (0.0 if self.signal == "flexible" and index == 1 else self.region.slope), 1.0

    def factors(self, index: int, sizes: Tensor, slopes: Tensor) -> Tensor:
        """The eigenvalues f of a piece's Jacobian where σ has the slopes D."""
        signed = (sizes if index else -sizes) * slopes
        return torch.exp(signed) if isinstance(self.region, ExactFlowRegion) else 1 + signed

    def random_constants(
        self,
        first: Float64[Tensor, " pair"],
        second: Float64[Tensor, " pair"],
        trials: int,
        generator: torch.Generator,
    ) -> Float64[Tensor, " pair"]:
        """Per pair the largest norm of ``trials`` composed Jacobians of every size n in 2..8, all weights random.

        A_c and A_e are drawn by Haar's measure, the corners D anew for every piece, as activations may switch between
        the substeps. A lower bound of the true constant.
        """
        trials = require_whole("trials", trials, 1)
        largest = torch.zeros_like(first)
        for size in SIZES:
            matrices = [random_orthogonal((len(first), trials), size, generator) for _ in range(2)]
            corners = []
            for index, _ in self.pieces(first, second):
                low, high = self.slopes(index)
                chosen = torch.rand((len(first), trials, size), generator=generator, dtype=torch.float64) < 0.5
                corners.append(low + (high - low) * chosen.double())
            norms = self._norms(first, second, matrices, corners)
            largest = torch.maximum(largest, norms.amax(1))
        return largest

    def worst_constants(
        self, first: Float64[Tensor, " pair"], second: Float64[Tensor, " pair"], seed: int = 0
    ) -> Float64[Tensor, " pair"]:
        """Per pair the norm for the worst weights: A_e = A_c, every D the corner that stretches its piece the most.

        The pieces' Jacobians then commute and their norms multiply, so this is the supremum over all orthogonal weights
        and activations. It is measured on the dense product all the same.
        """
        generator = torch.Generator().manual_seed(seed)
        matrix = random_orthogonal((len(first), 1), 4, generator)
        corners = []
        for index, sizes in self.pieces(first, second):
            low, high = (torch.full_like(sizes, slope) for slope in self.slopes(index))
            stretches_more = self.factors(index, sizes, low).abs() > self.factors(index, sizes, high).abs()
            corners.append(torch.where(stretches_more, low, high)[:, None, None].expand(-1, 1, 4))
        return self._norms(first, second, [matrix, matrix], corners).squeeze(1)

    def _norms(self, first: Tensor, second: Tensor, matrices: Sequence[Tensor], corners: Sequence[Tensor]) -> Tensor:
        jacobian = torch.eye(matrices[0].shape[-1], dtype=torch.float64)
        for (index, sizes), slopes in zip(self.pieces(first, second), corners, strict=True):
            factors = self.factors(index, sizes[:, None, None], slopes)
            jacobian = matrices[index].mT @ (factors.unsqueeze(-1) * (matrices[index] @ jacobian))
        norms: Tensor = torch.linalg.matrix_norm(jacobian, 2)
        return norms


def random_orthogonal(batch: tuple[int, ...], size: int, generator: torch.Generator) -> Float64[Tensor, "*batch n n"]:
    """Orthogonal matrices by Haar's measure: Q of a Gaussian matrix, R's diagonal made positive (Mezzadri 2007).

    Example:
        >>> q = random_orthogonal((2,), 3, torch.Generator().manual_seed(0))
        >>> bool((q @ q.mT - torch.eye(3)).abs().max() < 1e-14)
        True
    """
    q, r = torch.linalg.qr(torch.randn((*batch, size, size), generator=generator, dtype=torch.float64))
    orthogonal: Tensor = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return orthogonal


@dataclass(frozen=True)
class MonteCarloCell(Cell):
    """Pairs (h₁, h₂) and the largest Lipschitz constants measured for each.

    The pairs are ``pairs`` uniform ones over the window, then for each region ``claimed`` at its lower boundary, inside
    it and at its upper boundary: the places where a claim is sharp.

    Args:
        regions: names in ``REGIONS``; all must take a pair in the same pieces.
        signal: ``"prescribed"`` or ``"flexible"``.
        substeps: S.
        window: (lowest h₁, highest h₁, lowest h₂, highest h₂).
        pairs: how many uniform pairs.
        claimed: how many pairs of each of the three kinds a region gets.
        trials: random weights for each pair and size n in 2..8.
        slope: a.

    Raises:
        InvalidArgument: regions of one cell that take a pair in different pieces, or an unknown name.
    """

    regions: tuple[str, ...]
    signal: str
    substeps: int
    window: tuple[float, float, float, float]
    pairs: int
    claimed: int
    trials: int
    slope: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        ways = {(region.contractive_parts, isinstance(region, ExactFlowRegion)) for region in self.claims().values()}
        if len(ways) != 1:
            raise InvalidArgument(
                f"regions are {', '.join(self.regions)}, which take a pair in different pieces; "
                "give each kind of step a cell of its own."
            )

    @property
    def title(self) -> str:
        return f"constants of {self.pairs} pairs, {self.signal}, S = {self.substeps}: {', '.join(self.regions)}"

    def claims(self) -> dict[str, Region]:
        """The regions by name."""
        return {name: REGIONS.get_known(name)(self.slope, self.substeps) for name in self.regions}

    def step(self) -> PairStep:
        """The map whose constant is measured."""
        return PairStep(next(iter(self.claims().values())), self.signal)

    def data_hash(self) -> str:
        """A hash of what is measured, so that a changed region or signal is measured anew."""
        digest = hashlib.sha256()
        for region in self.claims().values():
            digest.update(region.boundary(64).round(9).tobytes() + repr(region.second_low).encode())
        one = torch.ones(1, dtype=torch.float64)
        digest.update(repr([(index, float(size)) for index, size in self.step().pieces(one, one)]).encode())
        return digest.hexdigest()

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = [*self._uniform(generator)]
        for region in self.claims().values():
            chosen += claimed_pairs(region, self.claimed, generator)
        first, second = torch.tensor(chosen, dtype=torch.float64).T.contiguous()
        step = self.step()
        return {
            "first": first.tolist(),
            "second": second.tolist(),
            "random": step.random_constants(first, second, self.trials, generator).tolist(),
            "worst": step.worst_constants(first, second, self.seed).tolist(),
        }

    def _uniform(self, generator: torch.Generator) -> Iterator[tuple[float, float]]:
        left, right, bottom, top = self.window
        for x, y in torch.rand((self.pairs, 2), generator=generator, dtype=torch.float64).tolist():
            yield left + (right - left) * x, bottom + (top - bottom) * y


def claimed_pairs(region: Region, count: int, generator: torch.Generator) -> list[tuple[float, float]]:
    """``count`` pairs each at the lower boundary of the region, inside it, and at its upper boundary.

    Example:
        >>> from dynablocks.switching import ExactFlowRegion
        >>> pairs = claimed_pairs(ExactFlowRegion(0.5), 2, torch.Generator().manual_seed(0))
        >>> [ExactFlowRegion(0.5).contains(*pair) for pair in pairs]
        [True, True, True, True, True, True]
    """
    low, high = region.first_range
    pairs = []
    for height in (0.0, None, 1.0):
        for x, y in torch.rand((count, 2), generator=generator, dtype=torch.float64).tolist():
            first = low + (high - low) * x
            top = max(region.limit(first), region.second_low)
            part = y if height is None else height
            pairs.append((first, top if part == 1.0 else region.second_low + (top - region.second_low) * part))
    return pairs


def violations(region: Region, result: dict[str, Any], tolerance: float = TOLERANCE) -> list[tuple[float, float]]:
    """The pairs of a :class:`MonteCarloCell`'s result that lie in the region and have a constant above 1.

    Example:
        >>> from dynablocks.switching import TightRegion
        >>> result = {"first": [1.0, 1.0], "second": [0.5, 0.9], "random": [1.0, 1.0], "worst": [0.75, 1.1]}
        >>> violations(TightRegion(0.5), result)
        [(1.0, 0.9)]
    """
    return [
        (first, second)
        for first, second, constant in measured(result)
        if constant > 1 + tolerance and region.contains(first, second)
    ]


def measured(result: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(h₁, h₂, largest constant found) of every pair."""
    columns = (result[key] for key in ("first", "second", "random", "worst"))
    return [(first, second, max(random, worst)) for first, second, random, worst in zip(*columns, strict=True)]
