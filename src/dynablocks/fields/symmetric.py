"""Conservative fields X = ∇V with a known potential: linear, diagonal, the gradient of any module, their sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_sizes, require_whole
from dynablocks.fields.activations import Activation, activation
from dynablocks.fields.base import FIELDS, FieldFacts, VectorField, over_matrices, potential_of, why_no_potential
from dynablocks.fields.gradient import GradientField
from dynablocks.fields.parity import OddDifference
from dynablocks.fields.sums import SumField
from dynablocks.linear import Dense
from dynablocks.linear.maps import require_shape
from dynablocks.numerics.exponential import matrix_exponential
from dynablocks.numerics.rounding import EPS, checked_float64

if TYPE_CHECKING:
    from jaxtyping import Float


def gradient_of(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇V(x) for a V with one value per sample; it works under ``no_grad`` and can be differentiated again.

    Example:
        >>> gradient_of(lambda x: x.square().sum(1), torch.ones(1, 2))
        tensor([[2., 2.]])
    """
    gradient: Tensor = torch.func.grad(lambda y: energy(y).sum())(x)
    return gradient


@FIELDS.register("linear")
class LinearField(VectorField):
    r"""X(x) = Sx + b with the symmetric S = (W + Wᵀ)/2: the gradient of V(x) = ½xᵀSx + bᵀx.

    As the force of a shear it is the linear module of a SympNet. The spectrum is S's, in float64. It has a flow, so
    that sums with other fields can be split (:class:`SumField`).

    Args:
        entries: n.
        bias: whether b is learned or absent; without it the field is odd.
        spread: W starts normal with this standard deviation over √n.

    Raises:
        InvalidArgument: ``entries`` is no whole number from 1.

    Source: Jin, Zhang, Zhu, Tang and Karniadakis (2020), "SympNets", section 3.1.

    Example:
        >>> field = LinearField(3)
        >>> field(torch.ones(2, 3)).shape, field.facts().conservative
        (torch.Size([2, 3]), True)
    """

    def __init__(self, entries: int, *, bias: bool = False, spread: float = 0.5) -> None:
        super().__init__()
        entries = require_whole("entries", entries, 1)
        self.in_shape = (entries,)
        self.matrix = nn.Parameter(spread / math.sqrt(entries) * torch.randn(entries, entries))
        self.bias = nn.Parameter(torch.zeros(entries)) if bias else None

    @classmethod
    def example(cls) -> LinearField:
        return cls(3, bias=True)

    def symmetric(self) -> Float[Tensor, "n n"]:
        """S = (W + Wᵀ)/2."""
        return 0.5 * (self.matrix + self.matrix.mT)

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        return nn.functional.linear(x, self.symmetric(), self.bias)

    def potential(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """V(x) = ½xᵀSx + bᵀx, so that X = ∇V."""
        image = 0.5 * (x @ self.symmetric())
        return (x * (image if self.bias is None else image + self.bias)).sum(1)

    def flow(self, x: Float[Tensor, "batch n"], time: Tensor | float) -> Float[Tensor, "batch n"]:
        r"""e^{tS}x + ∫₀ᵗ e^{sS}b ds, which are the upper rows of exp(t[[S, b/c], [0, 0]])(x, c) for every c > 0.

        Rounding is of the size of n|t|‖S‖ε, relative to ‖e^{tS}‖‖x‖ and to the integral.
        """
        matrix, column = self.symmetric(), x.unsqueeze(-1)
        if self.bias is None:
            return (matrix_exponential(over_matrices(time) * matrix) @ column).squeeze(-1)
        # So large a c leaves it to S how often the exponential is squared, each of which doubles the error of e^{tS}.
        c = 2.0**20 * self.bias.detach().abs().amax().clamp_min(1.0)
        rows = torch.cat([matrix, (self.bias / c).unsqueeze(-1)], dim=1)
        grown = matrix_exponential(over_matrices(time) * nn.functional.pad(rows, (0, 0, 0, 1)))[..., :-1, :]
        return (grown[..., :-1] @ column).squeeze(-1) + c * grown[..., -1]

    def flow_log_determinant(self, x: Float[Tensor, "batch n"], time: Tensor | float) -> Float[Tensor, " batch"]:
        """t trace S."""
        return (time * self.symmetric().trace()).flatten().expand(x.shape[0])

    def is_undone(self, time: float) -> bool:
        """Whether enough digits of x are left.

        The condition number of e^{tS} may be e^{2|t|‖S‖}: up to e^30 = 1e13 is let pass in float64, 5e5 in float32. A
        bias b adds |t|‖b‖e^{|t|‖S‖} to the image of x, and its rounding to that of the inverse.
        """
        limit = 15.0 * math.log(torch.finfo(self.matrix.dtype).eps) / math.log(EPS)
        shift = 0.0 if self.bias is None else float(self.bias.detach().double().norm())
        return abs(time) * self.facts().lipschitz + math.log(max(1.0, abs(time) * shift)) / 2 <= limit

    def facts(self) -> FieldFacts:
        ends = torch.linalg.eigvalsh(checked_float64(self.symmetric(), "matrix", 2))
        slack = 16 * EPS * self.in_shape[0] * float(ends.abs().max())
        low, high = float(ends[0]) - slack, float(ends[-1]) + slack
        reason = "symmetric matrix, eigenvalues in float64"
        return FieldFacts.of_spectrum(low, high, odd=self.bias is None, reason=reason)

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=True)


@FIELDS.register("diagonal")
class DiagonalField(VectorField):
    r"""X(x) = diag(a) Σ(x) = ∇(aᵀΓ(x)), γ' = σ: the force of a SympNet's activation module; odd where σ is.

    Args:
        entries: n.
        sigma: σ, a registry name or an :class:`Activation`.
        spread: a starts normal with this standard deviation.

    Raises:
        InvalidArgument: ``entries`` is no whole number from 1.

    Source: Jin, Zhang, Zhu, Tang and Karniadakis (2020), "SympNets", section 3.1.

    Example:
        >>> DiagonalField(3, "tanh").facts().odd
        True
    """

    def __init__(self, entries: int, sigma: str | Activation = "tanh", *, spread: float = 0.5) -> None:
        super().__init__()
        entries = require_whole("entries", entries, 1)
        self.in_shape, self.sigma = (entries,), activation(sigma)
        self.scale = nn.Parameter(spread * torch.randn(entries))

    @classmethod
    def example(cls) -> DiagonalField:
        return cls(3, "tanh")

    def forward(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        require_shape(self, self.in_shape, x)
        return self.scale * self.sigma(x)

    def potential(self, x: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """V(x) = aᵀΓ(x), so that X = ∇V.

        Raises:
            InvalidArgument: σ has no closed-form primitive.
        """
        return (self.scale * self.sigma.require_primitive(type(self).__name__)(x)).sum(1)

    def facts(self) -> FieldFacts:
        scale = checked_float64(self.scale, "scale", 1).tolist()
        ends = [a * s for a in scale for s in (self.sigma.slope_min, self.sigma.slope_max)]
        low, high = math.nextafter(min(ends), -math.inf), math.nextafter(max(ends), math.inf)
        return FieldFacts.of_spectrum(low, high, odd=self.sigma.odd, reason="diagonal Jacobian")

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=True)


@FIELDS.register("gradient-of")
class GradientOf(VectorField):
    r"""X(x) = ∇V(x) for any differentiable module V: (batch, …) ↦ (batch,) or (batch, 1), by automatic differentiation.

    Its Lipschitz constant is not known, unless bounds of the Hessian of V are given. An additive constant in V (a last
    bias) gets no gradient.

    Args:
        module: V.
        in_shape: the shape of one sample.
        spectrum: an interval that holds the eigenvalues of ∇²V at every x and for all parameters that V may get;
            :func:`dynablocks.testing.check_field` tries to refute it.

    Raises:
        InvalidArgument: ``in_shape`` is no tuple of sizes, the spectrum no interval, or (when called) V does not return
            one number per sample.

    Example:
        >>> V = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
        >>> GradientOf(V, (2,))(torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, module: nn.Module, in_shape: tuple[int, ...], *, spectrum: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        FieldFacts(spectrum=spectrum)  # which refuses what is no interval
        self.module, self.in_shape, self.spectrum = module, require_sizes("in_shape", in_shape), spectrum

    @classmethod
    def example(cls) -> GradientOf:
        return cls(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1, bias=False)), (2,))

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return gradient_of(self.potential, x)

    def potential(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """V(x) per sample."""
        value: Tensor = self.module(x)
        if value.numel() != x.shape[0]:
            raise InvalidArgument(
                f"{type(self.module).__name__} gives {tuple(value.shape)} for a batch of {x.shape[0]}; "
                "an energy must be one number per sample: (batch,) or (batch, 1)."
            )
        return value.reshape(x.shape[0])

    def facts(self) -> FieldFacts:
        if self.spectrum is None:
            return FieldFacts(conservative=True, reason="the gradient of a module")
        return FieldFacts(spectrum=self.spectrum, reason="given Hessian bounds")


class PotentialSum(SumField):
    r"""X = s(∇V₁ + … + ∇V_k), s = ±1, for fields ∇Vᵢ, conservative where all are; the Jacobians' spectra add up.

    Its terms are those of the fields for s = +1, for s = −1 itself.

    Raises:
        InvalidArgument: ``sign`` is another number, or as :class:`SumField`.

    Example:
        >>> total = PotentialSum(LinearField(2), DiagonalField(2))
        >>> bool(torch.allclose(total(torch.ones(1, 2)), sum(field(torch.ones(1, 2)) for field in total.fields)))
        True
    """

    def __init__(self, *fields: VectorField, sign: float = 1.0) -> None:
        super().__init__(*fields)
        if sign not in (1.0, -1.0):
            raise InvalidArgument(f"sign is {sign}; 1.0 or -1.0 is needed: scale the potentials themselves.")
        self.sign = sign

    def terms(self) -> tuple[VectorField, ...]:
        return super().terms() if self.sign == 1.0 else (self,)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        return self.sign * super().forward(x)

    def potential(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """s(V₁ + … + V_k)(x)."""
        return self.sign * sum((potential_of(field, x) for field in self._parts()), x.new_zeros(x.shape[0]))

    def energy(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
        """s(H₁ + … + H_k)(x) of Hamiltonian parts."""
        return self.sign * super().energy(x)

    def facts(self) -> FieldFacts:
        return super().facts().scaled(self.sign)

    def _standing_facts(self) -> FieldFacts:
        return super()._standing_facts().scaled(self.sign)


class EvenPotential(OddDifference):
    r"""X(x) = ∇(V(x) + V(−x)) = ∇V(x) − ∇V(−x) for a conservative field ∇V: odd.

    Twice the :class:`OddField` of ∇V, for where the energy is what is learned.

    Args:
        field: ∇V.

    Example:
        >>> field = EvenPotential(LinearField(2, bias=True))
        >>> bool((field(-torch.ones(1, 2)) == -field(torch.ones(1, 2))).all())
        True
    """

    factor = 1.0

    def facts(self) -> FieldFacts:
        known = self.field.facts().euclidean().scaled(2 * self.factor)
        if known.spectrum is None:
            kept = known.conservative
            return FieldFacts(known.lipschitz, conservative=kept, odd=True, reason="even potential")
        return FieldFacts.of_spectrum(*known.spectrum, odd=True, reason=known.reason)

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=self.field.standing_facts().euclidean().conservative)


def conservative_field(energy: nn.Module, in_shape: tuple[int, ...] | None = None) -> VectorField:
    """∇V: the field itself where ``energy`` is a conservative field with a potential, else ``GradientOf`` the module.

    Raises:
        InvalidArgument: a field that is not conservative or whose potential is unknown, or a module without a shape.

    Example:
        >>> conservative_field(nn.Linear(2, 1), (2,))(torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """
    if isinstance(energy, VectorField):
        sigma = getattr(energy, "sigma", None)
        if isinstance(sigma, Activation):
            sigma.require_primitive(type(energy).__name__)
        if why_no_potential(energy) is not None:
            raise InvalidArgument(
                f"{type(energy).__name__} is no gradient field with a potential; give a scalar module, or give the "
                "field a method potential(x) with X = ∇V and facts that say conservative."
            )
        return energy
    if in_shape is None:
        raise InvalidArgument(
            f"the input shape of {type(energy).__name__} is unknown; give in_shape=, or GradientOf(module, in_shape)."
        )
    return GradientOf(energy, in_shape)


def ridge_energy(
    entries: int,
    width: int,
    sigma: str | Activation = "tanh",
    *,
    quadratic: bool = True,
    bias: bool = True,
    linear: bool = False,
) -> VectorField:
    r"""∇H for H(x) = αᵀΓ(Ax + b) + ½xᵀQx, A of ``width`` rows, both in closed form; Q symmetric, of either sign.

    Args:
        quadratic: whether H has the term ½xᵀQx.
        bias: whether there is a b.
        linear: whether H also has a term cᵀx, c = 0 at first, so that a constant gradient is one of the fields.

    Raises:
        InvalidArgument: a size that is no whole number from 1, or ``linear`` without ``quadratic``.

    Example:
        >>> ridge_energy(2, 8)(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """
    if linear and not quadratic:
        raise InvalidArgument("the field of ½xᵀQx keeps the linear term, too; leave quadratic as True.")
    entries, width = require_whole("entries", entries, 1), require_whole("width", width, 1)
    ridge = GradientField(Dense(entries, width), sigma, expansive=True, alpha=1.0, bias=bias)
    if ridge.bias is not None:
        nn.init.normal_(ridge.bias, std=0.5)
    return PotentialSum(ridge, LinearField(entries, bias=linear)) if quadratic else ridge
