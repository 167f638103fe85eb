"""The sharp restriction of a pair: as much expansion as the contractive step makes up for, whatever was learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_choice, require_whole
from dynablocks.fields.base import VectorField, require_field
from dynablocks.linear import shared_weights
from dynablocks.numerics.rounding import EPS
from dynablocks.switching.non_expansive import SHORTENED, step_limits
from dynablocks.switching.signals import SwitchingSignal, two_steps

DECLARED = 64 * EPS
"""What declaring the constants of both steps, and their product, may add to it: all of that is done in float64."""

LEAST = 1e-3
"""What a contractive step counts as at least, as in the tight region: what expands behind it multiplies the rounding of
the states, too, of which the constants know nothing."""


class NonExpansivePair(SwitchingSignal):
    r"""A contractive and an expansive Euler step, h₁ and h₂, learned and kept where together they do not expand.

    Regions take A_cᵀA_c = I and ‖A_e‖ <= 1 for granted; here both fields may be of any A. With L_c(h₁) and L_e(h₂), the
    constants that the fields declare of their steps for their present parameters
    (:meth:`dynablocks.fields.VectorField.euler_constant`), the law is

    .. math:: L_c(h_1) \le 1, \qquad L_c(h_1)\, L_e(h_2) \le 1,

    of each of the S pairs, with hᵢ/S for hᵢ. For x ∓ hAᵀΣ(Ax + b), slopes of σ in [a, 1] and h₂ >= 0 they are

    .. math:: L_c(h_1) = \max\big(|1 - h_1\|A_c\|^2|,\ |1 - h_1 a\,\lambda_{\min}(A_c^T A_c)|\big), \qquad
        L_e(h_2) = 1 + h_2\|A_e\|^2 .

    So h₁ <= 2/‖A_c‖² and h₂ <= (1/L_c(h₁) − 1)/‖A_e‖²: the tight region where A_cᵀA_c = I and ‖A_e‖ = 1, and (3.6), L
    h₂ <= μ h₁, where steps are small. Steps h₂ < 0, along which an expansive field contracts, are allowed as far as
    the law holds (with ``bound="paper"`` as far as 1 + |h₂|L shows it). The projection puts h₁ into its range, and
    then h₂ into that which h₁ leaves. L_c counts as at least 0.001.

    Where A_c has a kernel, L_c(h₁) is 1 at best: then h₂ <= 0. The same happens where no bound λ_min > 0 is known, as
    of convolutions with zero padding to the same size that are too large for a dense decomposition; there padding
    "full" or circular is needed. Of an h₁ at its limit nothing is left for h₂, either.

    Condition: explicit Euler on these very fields, first ``contractive``, the ``bound`` of the block, and
    :func:`dynablocks.switching.keep_constraints`, or :func:`dynablocks.switching.project` after each change of the
    parameters; maps that have another weight in training than in evaluation (``UnitDense``, ``UnitConv``) are projected
    in evaluation. The metric is that of the fields' facts. In between, and with other methods, the block declares the
    constant that it has.

    Args:
        contractive, expansive: the fields of the block, in this order; they stay registered there.
        start: (h₁, h₂) at the start; projected.
        substeps: S.
        bound: ``"tight"``, or ``"paper"`` for √(1 − 2h₁μ + h₁²L²) as L_c(h₁): (3.10) for any A.

    Raises:
        InvalidArgument: one of the fields is none, their facts are of two metrics, ``contractive`` is known to allow no
            step but 0 by the bound, no Lipschitz constant of ``expansive`` is known, ``start`` is not two finite
            numbers, ``substeps`` is below 1, or another ``bound``.

    Source: paper (3.6), (3.8)–(3.10); design D2.2, D2.3.

    Example:
        >>> from dynablocks import DynamicalBlock
        >>> from dynablocks.fields import GradientField, leaky_relu
        >>> from dynablocks.linear import Dense
        >>> sigma = leaky_relu(0.5)
        >>> fields = GradientField(Dense(2, 2), sigma), GradientField(Dense(2, 2), sigma, expansive=True)
        >>> block = DynamicalBlock(fields, "euler", NonExpansivePair(*fields, (0.4, 1.0)))
        >>> round(block.signal.steps[1].item(), 4)
        0.25
        >>> _ = fields[0].requires_grad_(False).linear.matrix.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
        >>> block.signal.project_()
        >>> round(block.signal.steps[1].item(), 4), block.properties.lipschitz <= 1
        (0.0526, True)
    """

    fields_needed = 2
    projected_last: bool = True

    def __init__(
        self,
        contractive: VectorField,
        expansive: VectorField,
        start: tuple[float, float] = (0.5, 0.1),
        *,
        substeps: int = 1,
        bound: str = "tight",
    ) -> None:
        super().__init__()
        # In a tuple, which registers nothing: the fields' parameters are the block's.
        self._both = (require_field("contractive", contractive), require_field("expansive", expansive))
        self.substeps = require_whole("substeps", substeps, 1)
        self.bound = require_choice("bound", bound, ("tight", "paper"))
        self.steps = nn.Parameter(torch.tensor(two_steps(start)))
        self._require_room()
        self.project_()

    def pieces(self) -> list[tuple[int, Tensor]]:
        return list(enumerate((self.steps / self.substeps).unbind())) * self.substeps

    @torch.no_grad()
    def project_(self) -> None:
        contractive, expansive = self._both
        # What storing the steps, dividing them by S and declaring the constants may be off by.
        margin = SHORTENED * torch.finfo(self.steps.dtype).eps + DECLARED
        first, second = self.steps.tolist()
        with shared_weights(contractive, expansive):
            first = self._nearest(first, contractive, 1.0, margin)
            constant, _ = contractive.euler_constant(first / self.substeps, self.bound)
            room = (1 - margin) / (max(constant, LEAST) + margin)
            second = self._nearest(second, expansive, max(room, 1.0), margin)
        self.steps.copy_(torch.tensor([first, second], dtype=torch.float64))

    def _nearest(self, step: float, field: VectorField, most: float, margin: float) -> float:
        """The nearest step whose parts h/S have the constant ``most``, with a margin."""
        limits = step_limits(field.facts(), most, self.bound)
        low, high = (limit * self.substeps * (1 - margin) for limit in limits)
        return min(max(step, low), high)

    def summary(self) -> dict[str, float]:
        """h₁ and h₂, each as a whole."""
        return {f"h{k}": size for k, size in enumerate(self.steps.detach().tolist(), 1)}

    def _require_room(self) -> None:
        """Refuse fields of which no pair of steps could be known not to expand."""
        contractive, expansive = self._both
        with torch.no_grad(), shared_weights(contractive, expansive):
            first, second = contractive.facts(), expansive.facts()
        if first.metric != second.metric:
            raise InvalidArgument(
                f"the facts of contractive are in the norm {first.metric.name}, those of expansive in "
                f"{second.metric.name}; the constants of steps multiply in one norm alone, so give fields of one."
            )
        if not any(step_limits(first, bound=self.bound)):
            strongly = " strongly (μ < 0), or bound='tight'" if self.bound == "paper" else ""
            raise InvalidArgument(
                f"no step of contractive, a {type(contractive).__name__}, but 0 is known not to expand by the bound "
                f"{self.bound!r}; take a field whose facts say that it is contractive{strongly}."
            )
        if math.isinf(second.lipschitz):
            raise InvalidArgument(
                f"no Lipschitz constant of expansive, a {type(expansive).__name__}, is known, so that none of its "
                "steps but 0 can be balanced; take a field whose facts give one."
            )
