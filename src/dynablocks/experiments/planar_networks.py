"""1-Lipschitz networks in the plane with steps limited by their exact Lipschitz constants (paper section 1.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument, require_choice, require_range
from dynablocks.fields import GradientField, PlanarField, leaky_relu
from dynablocks.lifting import Head
from dynablocks.linear import OrthogonalDense
from dynablocks.properties import Declaration, Structured, compose, declare
from dynablocks.switching import LearnedStep, tight_contraction

if TYPE_CHECKING:
    from jaxtyping import Float

FAMILIES: dict[str, tuple[str, str]] = {"F+Fc": ("Fc", "F"), "F": ("F", "F"), "Fc": ("Fc", "Fc")}
"""The kinds of layers that alternate in each family of networks, the first layer's kind first."""
FOLD = 4 / 3
"""The contractive step of smallest constant for a = 1/2: 1 − h = −1/3, 1 − ah = 1/3, a fold that loses no direction."""
STARTS: dict[str, tuple[float, float]] = {"F+Fc": (0.5, 0.1), "F": (FOLD, FOLD), "Fc": (FOLD, FOLD)}
"""The steps before training and projection: the default of ``PairSignal`` for pairs, otherwise the fold."""


def largest_rotation_step(
    sign: Float[Tensor, "*batch"], cosine: Float[Tensor, "*batch"], slope: float, bound: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    r"""The largest |h| for which x + hΣ(Ax + b) with h of the given sign has constant at most ``bound`` >= 1.

    A is a rotation by θ. The norm of I + hDA is convex in D, so the largest is at a corner D = diag(p, q) with p, q in
    {a, 1}. There I + hDA is a rotation times a scaling by :math:`|1 + h m e^{iθ}|`, m = (p + q)/2, plus a reflection
    times |h||p − q|/2, and its norm is the sum of the two. That this is at most B is the quadratic inequality
    :math:`pq h^2 + 2|h|(s m \cos θ + B|p − q|/2) + 1 − B^2 \le 0`. For B = 1 the answer is
    max(0, (1 + 1/a)(−s cos θ) − (1/a − 1)): with a = 1/2 a layer may move only where −s cos θ > 1/3, and by 2 at most.

    Args:
        sign: s = ±1.
        cosine: cos θ, half the trace of A.
        slope: a in (0, 1].
        bound: B.

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> float(largest_rotation_step(one, -one, 0.5, one)), float(largest_rotation_step(one, one, 0.5, one))
        (2.0, 0.0)
    """
    limits = []
    surplus = (bound - 1) * (bound + 1)
    for p, q in ((1.0, 1.0), (1.0, slope), (slope, slope)):
        linear = sign * (p + q) / 2 * cosine + bound * (p - q) / 2
        root = (linear.square() + p * q * surplus).clamp_min(0).sqrt()
        # Two forms of one root: neither subtracts nearly equal numbers.
        falling = surplus / (linear + root).clamp_min(torch.finfo(root.dtype).tiny)
        limits.append(torch.where(linear > 0, falling, (root - linear) / (p * q)))
    return torch.stack(limits).amin(0)


class PlanarNetwork(Structured):
    r"""Points in the plane ↦ two logits: residual layers of a family, together 1-Lipschitz, and a free linear head.

    A layer of kind ``"Fc"`` is x − hAᵀΣ(Ax + b) with 0 <= h <= 2, one of kind ``"F"`` x + hΣ(Ax + b) with h of either
    sign; A = exp(W − Wᵀ), Σ the leaky ReLU. :meth:`project_` limits the steps of the second kind so that

    - in the family ``"F"`` every layer's exact constant is at most 1;
    - in ``"F+Fc"`` the product of the exact constants of every pair (Fc, then F) is at most 1.

    The paper says nothing of the last layer here; it is not constrained, so a certificate divides by its weights.
    Pairs start at the library's default (0.5, 0.1), single fields at h = 4/3, where the two slopes of a contractive
    step have one size; the first projection shortens the steps of F. There each step takes the sign with which its
    layer can contract.

    Args:
        family: a name in :data:`FAMILIES`.
        layers: how many residual layers, even.
        slope: a of the leaky ReLU, in (0, 1].

    Raises:
        InvalidArgument: an unknown family, an odd or negative number of layers, a slope out of range.

    Source: paper section 1.1, Table 1; design D3 for the exact constants.

    Example:
        >>> network = PlanarNetwork("F+Fc")
        >>> network(torch.zeros(3, 2)).shape, network.body_lipschitz() < 1.00001
        (torch.Size([3, 2]), True)
    """

    def __init__(self, family: str, layers: int = 10, slope: float = 0.5) -> None:
        super().__init__()
        if layers < 2 or layers % 2:
            raise InvalidArgument(f"layers is {layers}; an even number of at least 2 is needed.")
        require_range("slope", slope, 0.0, 1.0, open_low=True)
        self.family, self.slope = require_choice("family", family, FAMILIES), slope
        self.kinds = FAMILIES[family] * (layers // 2)
        starts = STARTS[family] * (layers // 2)
        layer = zip(self.kinds, starts, strict=True)
        self.body = nn.Sequential(*(self._layer(kind, start) for kind, start in layer))
        self.head = Head(2, 2, "none")
        self.in_shape = (2,)
        self.project_()

    def _layer(self, kind: str, start: float) -> DynamicalBlock:
        linear, sigma = OrthogonalDense(2, 2, method="expm"), leaky_relu(self.slope)
        if kind == "Fc":
            return DynamicalBlock(GradientField(linear, sigma), "euler", LearnedStep(start, 0.0, 2.0))
        if self.family == "F" and float(linear.weight.detach().trace()) > 0:
            start = -start
        return DynamicalBlock(PlanarField(linear, sigma), "euler", LearnedStep(start, -math.inf, math.inf))

    def forward(self, x: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 2"]:
        """The two logits of every point."""
        logits: Tensor = self.head(self.body(x))
        return logits

    def declare(self) -> Declaration:
        return compose([("body", self.body), ("head", self.head)], title=f"Planar network {self.family}")

    def body_lipschitz(self) -> float:
        """A sound upper bound of the body's Lipschitz constant: the product of the layers' exact constants."""
        return declare(self.body).properties.lipschitz

    def project_(self) -> None:
        """Put the steps back into their feasible set, in place."""
        self.project_parameters(dict(self.named_parameters()))

    def step_sizes(self, parameters: Mapping[str, Tensor]) -> Float[Tensor, "*runs layers"]:
        """The signed steps of all layers, from the parameters of one network or the stacked ones of many."""
        return torch.cat([parameters[f"body.{k}.signal.steps"] for k in range(len(self.kinds))], dim=-1)

    @torch.no_grad()
    def project_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """:meth:`project_` on given parameters: of this network, or stacked ones of many networks of this family."""
        first, second = self.kinds[:2]
        steps = self.step_sizes(parameters).double()
        if first == "Fc":
            steps[..., 0::2].clamp_(0, 2)
        if second == "Fc":
            steps[..., 1::2].clamp_(0, 2)
        free = [k for k, kind in enumerate(self.kinds) if kind == "F"]
        if free:
            bounds = torch.ones_like(steps[..., free])
            if first == "Fc":
                bounds = 1 / tight_contraction(steps[..., 0::2], self.slope)
            steps[..., free] = self._limited(steps[..., free], self._cosines(parameters, free), bounds)
        for k in range(len(self.kinds)):
            parameters[f"body.{k}.signal.steps"].copy_(steps[..., k : k + 1])

    def _cosines(self, parameters: Mapping[str, Tensor], layers: list[int]) -> Float[Tensor, "*runs layers"]:
        free = torch.stack([parameters[f"body.{k}.fields.0.linear.matrix"] for k in layers], dim=-3)
        rotations = torch.linalg.matrix_exp(free - free.mT).double()
        return rotations.diagonal(dim1=-2, dim2=-1).mean(-1)

    def _limited(self, steps: Tensor, cosines: Tensor, bounds: Tensor) -> Tensor:
        signs = torch.where(steps < 0, -1.0, 1.0).to(steps)
        return signs * torch.minimum(steps.abs(), largest_rotation_step(signs, cosines, self.slope, bounds))


class StandardisedTraining(PlanarNetwork):
    r"""A planar network as it is trained: the head sees the body's output minus its mean, over its spread.

    A contraction shrinks the logits of a raw head, so gradients would first undo every contraction, whatever it is good
    for. With s² the mean of the two variances the head is W(y − m)/s + c, still affine in y: :meth:`fold` writes it as
    a plain head with m and s of the training set.

    Example:
        >>> network = StandardisedTraining("Fc").double()
        >>> points = torch.randn(64, 2, dtype=torch.float64)
        >>> folded = PlanarNetwork("Fc").double()
        >>> _ = folded.load_state_dict(network.fold(dict(network.named_parameters()), network.body(points)))
        >>> bool(torch.allclose(folded(points), network(points)))
        True
    """

    def forward(self, x: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 2"]:
        """The logits, with the mean and the spread of this batch."""
        features: Tensor = self.body(x)
        mean, spread = standardisation(features)
        logits: Tensor = self.head((features - mean) / spread)
        return logits

    @torch.no_grad()
    def fold(
        self, parameters: Mapping[str, Tensor], features: Float[Tensor, "*runs samples 2"]
    ) -> dict[str, Float[Tensor, "..."]]:
        """The parameters (stacked or not) of plain networks with the same logits at ``features``, the body's output."""
        mean, spread = standardisation(features)
        matrix = parameters["head.matrix"] / spread
        bias = parameters["head.bias"] - (matrix @ mean.mT).squeeze(-1)
        kept = {name: parameter.detach() for name, parameter in parameters.items()}
        return kept | {"head.matrix": matrix.detach(), "head.bias": bias.detach()}


def standardisation(
    features: Float[Tensor, "*runs samples 2"],
) -> tuple[Float[Tensor, "*runs 1 2"], Float[Tensor, "*runs 1 1"]]:
    """The mean of the samples and √(mean of the variances), which no run of equal samples makes 0."""
    mean = features.mean(-2, keepdim=True)
    variance = (features - mean).square().mean((-2, -1), keepdim=True)
    return mean, (variance + 1e-24).sqrt()
