"""The universal network of the paper: gradient flows and flows tangent to spheres, composed, with linear lifts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynablocks.errors import require_whole
from dynablocks.fields import GradientField, VectorField
from dynablocks.fields.sphere import RotationField
from dynablocks.integrators import ExplicitEuler, Integrator
from dynablocks.integrators.norm_preserving import CalvoEulerHeun
from dynablocks.linear import Dense, shared_weights
from dynablocks.properties import Declaration, Properties, Structured, declare
from dynablocks.properties.structure import fold
from dynablocks.seeding import seeded
from dynablocks.switching import LearnedStep

if TYPE_CHECKING:
    from jaxtyping import Float


class PairedFlows(Structured):
    r"""Ψ_{X_S}^h ∘ Ψ_{X_G}^h with one learned h: X_G moves first; Ψ are numerical steps, as in (2.4).

    Trainings that project (:func:`dynablocks.switching.keep_constraints`, as in :func:`dynablocks.fitting.fit`) keep
    h >= 0; Adam alone, as the paper's authors train, leaves it free, so that it may become negative.

    Declared is what both steps have. As a rule that is nothing: the step of X_G has a Lipschitz constant and changes
    norms; that of X_S keeps them, with ``keep_norm``, and has no constant, since X_S multiplies entries of z by σ. For
    h = 0 without ``keep_norm`` the constant 1 is left. :func:`dynablocks.properties.explain` tells of each step.

    Args:
        gradient, rotation: X_G and X_S.
        keep_norm: take the steps of X_S by a method that keeps ‖z‖ as its flow does, otherwise by Euler.
        step: the start of h.
    """

    def __init__(self, gradient: GradientField, rotation: RotationField, keep_norm: bool, step: float) -> None:
        super().__init__()
        self.gradient, self.rotation = gradient, rotation
        self.signal = LearnedStep(step, 0.0, math.inf)
        self.methods = ExplicitEuler(), CalvoEulerHeun() if keep_norm else ExplicitEuler()

    def forward(self, z: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Both steps."""
        for _, flow, method in self._moves():
            z = method.step(flow, z, self.signal.steps[0])
        return z

    def declare(self) -> Declaration:
        ((_, step_size),) = self.signal.sizes()
        with torch.no_grad(), shared_weights(self.gradient, self.rotation):
            declared = tuple((name, method.declare(flow, step_size)) for name, flow, method in self._moves())
        kept, losses = fold(declared)
        return Declaration(Properties(kept), "X_G, then X_S", declared, losses, title=type(self).__name__)

    def _moves(self) -> tuple[tuple[str, VectorField, Integrator], ...]:
        first, second = self.methods
        return ("gradient", self.gradient, first), ("rotation", self.rotation, second)


class FlowComposition(Structured):
    r"""Blocks of Ψ_{X_S}^h ∘ Ψ_{X_G}^h layers in R^width, each after a linear lift, and a linear map at the end.

    X_G(z) = Aᵀ diag(α) Σ(Az + b), α of any sign, and X_S(z) = Λ(z)z with skew Λ. Ψ are Euler steps, or Calvo's for X_S.

    It differs from (2.4), which is made of layers Ψ_{X_C} ∘ Ψ_{X_E} ∘ Ψ_{X_S}:

    - X_G is a contractive field X_C and an expansive one X_E in one, with one step of both
      (:meth:`dynablocks.fields.GradientField.split` gives the two). They contract and expand weakly: rows of A with
      the other sign of α drop out, and where that leaves a kernel, distances along it stay. The rows √δ I that would
      make A injective (errata, docs/mathematics.md) are not in code;
    - X_G moves first and X_S then, as in the released code; (2.4) has X_S first;
    - σ is tanh by default, and the ReLU of the released code in half of Figure 7; Corollary 2.3 has max(ax, x) with
      0 < a < 1, which ``sigma="leaky-relu"`` is.

    Theorem 2.2: what compositions of flows of C² fields approximate on a compact set, in a norm that the sup norm
    bounds, those of gradient and sphere-preserving fields approximate, too, by Presnov's decomposition. By the works
    that the paper cites these are in L^p, p < ∞, the continuous maps of R^n, n >= 2; in the sup norm the smooth
    diffeomorphisms of R^n that keep the orientation, as every flow does; and with lifts all continuous functions. (The
    paper has C¹ fields, any norm, and any smooth invertible map with a smooth inverse; not so, see design D3.) Sums
    of X_G come near every gradient where γ, γ' = σ, is C¹ and no polynomial (Theorem 2.4), as it is for tanh
    and the ReLU.

    Declared is the composition of what linear maps and layers declare, as a rule nothing (:class:`PairedFlows`): these
    networks are to approximate, not to be stable.

    Args:
        inputs, outputs: entries of a point and of its value.
        width: of the layers, and of the hidden layer of X_S.
        blocks, layers: how many blocks, and layers in each.
        sigma: σ.
        keep_norm: take the steps of X_S by a method that keeps ‖z‖ as its flow does, otherwise by Euler.
        step: the start of every h; ``None`` draws |h| from a normal distribution.
        seed: of all weights.

    Raises:
        InvalidArgument: a size that is no whole number from 1, or a width below 2.

    Source: paper (2.4) in section 2.1, and appendix A; design D2.8.

    Example:
        >>> FlowComposition(2, width=4, blocks=1, layers=2)(torch.zeros(3, 2, dtype=torch.float64)).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int = 1,
        *,
        width: int = 10,
        blocks: int = 1,
        layers: int = 3,
        sigma: str = "tanh",
        keep_norm: bool = True,
        step: float | None = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        inputs, outputs = require_whole("inputs", inputs, 1), require_whole("outputs", outputs, 1)
        width = require_whole("width", width, 2)
        blocks, layers = require_whole("blocks", blocks, 1), require_whole("layers", layers, 1)
        parts: list[nn.Module] = []
        with seeded(seed):
            for block in range(blocks):
                parts.append(nn.Linear(width if block else inputs, width))
                for _ in range(layers):
                    start = abs(float(torch.randn(()))) if step is None else step
                    parts.append(PairedFlows(_gradient(width, sigma), _rotation(width, sigma), keep_norm, start))
            parts.append(nn.Linear(width, outputs))
        self.parts = nn.Sequential(*parts).double()

    def forward(self, x: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch outputs"]:
        """The value at each point."""
        values: Tensor = self.parts(x)
        return values

    def declare(self) -> Declaration:
        return replace(declare(self.parts), title=type(self).__name__)


def _gradient(width: int, sigma: str) -> GradientField:
    field = GradientField(Dense(width, width), sigma, expansive=True, alpha=1.0)
    assert field.alpha is not None
    nn.init.normal_(field.alpha)
    _uniform(field.linear.matrix, field.bias)
    return field


def _rotation(width: int, sigma: str) -> RotationField:
    field = RotationField(width, width, sigma)
    _uniform(field.inner.matrix, field.bias)
    _uniform(field.outer.matrix)
    return field


def _uniform(*given: Any) -> None:
    """PyTorch's start of a linear layer, whose width stands last in the first of the tensors."""
    bound = 1 / math.sqrt(given[0].shape[-1])
    for parameter in given:
        nn.init.uniform_(parameter, -bound, bound)
