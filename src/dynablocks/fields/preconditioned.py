"""The preconditioned contractive field: non-expansive steps for kernels that are not orthogonal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.errors import InvalidArgument
from dynablocks.fields.activations import Activation
from dynablocks.fields.base import FIELDS, FieldFacts
from dynablocks.fields.ridge import RidgeField
from dynablocks.lifting import ChannelMix
from dynablocks.linear import Conv, Dense, LinearMap
from dynablocks.linear.maps import IMAGES, PRODUCTS, why_unknown
from dynablocks.numerics.rounding import checked_float64
from dynablocks.properties.own_code import overrides

if TYPE_CHECKING:
    from jaxtyping import Float


@FIELDS.register("preconditioned")
class PreconditionedField(RidgeField):
    r"""X(x) = −Aᵀ T⁻¹ Σ(Ax + b) with T diagonal and AAᵀ ≼ T, so x + hX(x) is non-expansive for 0 <= h <= 2, slopes in
    [0, 1].

    T_ii = Σⱼ |AAᵀ|ᵢⱼ qⱼ / qᵢ for any q > 0 (diagonal dominance of T − AAᵀ after the scaling q; learned as log q). A
    convolution is A = PCE: E puts the image on a grid with zeros around it (E = I with circular padding), C is the
    circular convolution there and P takes the outputs. As EEᵀ ≼ I, AAᵀ ≼ PCCᵀPᵀ, and |CCᵀ|, which |AAᵀ| may exceed at a
    border, is bounded by the kernel's correlation with itself summed over all shifts, so T has one entry per channel.

    Condition: none on A but that T, which is made of the weight, is one of A: the weight is the matrix or the kernel.
    The declared spectrum is −[0, c] with c = max T*/T, T* recomputed in float64 with a rounding slack. Factors on σ of
    either sign, of a subclass with another :meth:`slope_scales`, make it [min (T*·D)⁻, max (T*·D)⁺] for the slopes D of
    g: D <= D⁺, and AᵀD⁺A has the eigenvalues of √D⁺ AAᵀ √D⁺ ≼ T*·D⁺ beside 0.

    Args:
        linear: A, a :class:`~dynablocks.linear.Dense`, a stride-1, ungrouped :class:`~dynablocks.linear.Conv` or a
            :class:`~dynablocks.lifting.ChannelMix` that multiplies as these classes do, however its weight is made.
        sigma: σ, monotone; its slopes are at most 1 for the constants below to hold up to h = 2.

    Raises:
        InvalidArgument: σ is not monotone, A multiplies by code of its own, or the convolution has a stride or groups.

    Source: design D2.5; Araujo et al. (2023), "A unified algebraic perspective on Lipschitz neural networks" (SLL).

    Example:
        >>> from dynablocks.linear import Dense
        >>> field = PreconditionedField(Dense(3, 5))
        >>> -1.0001 < field.facts().spectrum[0] <= -0.9999
        True
    """

    def __init__(self, linear: LinearMap, sigma: str | Activation = "relu", *, bias: bool = True) -> None:
        super().__init__(linear, sigma, bias=bias)
        if self.sigma.slope_min < 0:
            raise InvalidArgument(
                f"{self.sigma.name} has slopes down to {self.sigma.slope_min:g}; a preconditioned field needs a "
                "monotone σ, of slopes >= 0."
            )
        if not _is_its_weight(linear):
            raise InvalidArgument(
                "a preconditioned field takes the weight for the matrix or the kernel of A, which is not known of "
                f"{type(linear).__name__}; give a Dense, a Conv or a ChannelMix, or a subclass with a compute_weight "
                "of its own, but no products."
            )
        if not _is_dense_over_channels(linear):
            raise InvalidArgument("a preconditioned field needs a convolution with stride 1 and groups 1.")
        self.log_scale = nn.Parameter(torch.zeros(linear.out_shape[0]))

    @classmethod
    def example(cls) -> PreconditionedField:
        return cls(Dense(3, 5), "relu")

    def slope_scales(self) -> Float[Tensor, " channels"]:
        diagonal = _dominating_diagonal(absolute_gram(self.linear.weight), self.log_scale)
        return -1.0 / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny ** 0.5)

    def facts(self) -> FieldFacts:
        lost = self._why_no_facts()
        if lost is not None:
            return FieldFacts(reason=lost)
        log_scale = checked_float64(self.log_scale, "log_scale", 1).to(self.log_scale.device)
        # Once for each weight that is held: it is the dearest part, and q alone may have moved since.
        gram = self.linear.once("|AAᵀ| in float64", self._exact_gram).to(log_scale.device)
        exact, shape = _dominating_diagonal(gram, log_scale), self.linear.weight.shape
        # Sums over the channels and, of a kernel, over its entries at each of (2k − 1)² lags: some k⁴ of them.
        terms = shape.numel() * (2 * shape[-1] - 1 if len(shape) == 4 else 1)
        slack = 1 + 8 * torch.finfo(torch.float64).eps * terms
        ratio = exact * slack * self.slope_scales().detach().double()
        # NaN, of products that overflowed, stays in both ends.
        ends = torch.stack([ratio * self.sigma.slope_min, ratio * self.sigma.slope_max])
        low, high = float(ends.min().clamp_max(0.0)), float(ends.max().clamp_min(0.0)) + 0.0
        odd = self.sigma.odd and self.bias is None
        return FieldFacts.of_spectrum(low, high, odd=odd, reason="AAᵀ ≼ T by diagonal dominance")

    def _exact_gram(self) -> Float[Tensor, "channels channels"]:
        weight = self.linear.weight
        return absolute_gram(checked_float64(weight, "weight", weight.ndim).to(self.log_scale.device))

    def _standing_facts(self) -> FieldFacts:
        return FieldFacts(conservative=self._why_no_facts() is None)

    def _why_no_facts(self) -> str | None:
        """Why T is not known to be one of A, which may have been replaced since the field was made."""
        if _is_its_weight(self.linear) and _is_dense_over_channels(self.linear):
            return why_unknown(self.linear)
        return f"the weight of {type(self.linear).__name__} is not known to be the matrix or the kernel that T is of"


def _is_dense_over_channels(linear: LinearMap) -> bool:
    """Whether a map is no convolution with a stride or groups, of whose kernel T is not made."""
    return not isinstance(linear, Conv) or (linear.stride == 1 and linear.groups == 1)


def _is_its_weight(linear: LinearMap) -> bool:
    """Whether a map multiplies by its weight as a matrix or as a kernel, by the products of these classes."""
    kind = next((kind for kind in (Dense, Conv, ChannelMix) if isinstance(linear, kind)), None)
    return kind is not None and not any(overrides(linear, kind, name) for name in (*PRODUCTS, *IMAGES))


def absolute_gram(weight: Tensor) -> Float[Tensor, "channels channels"]:
    """|AAᵀ| of a matrix; of a kernel the correlation of each two of its outputs, its sizes summed over all shifts.

    Example:
        >>> absolute_gram(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
        tensor([[5., 6.],
                [6., 9.]])
    """
    if weight.ndim == 2:
        return (weight @ weight.mT).abs()
    reach = weight.shape[-1] - 1
    return functional.conv2d(weight, weight, padding=reach).abs().sum(dim=(2, 3))


def _dominating_diagonal(gram: Tensor, log_scale: Tensor) -> Float[Tensor, " channels"]:
    """The diagonal of T."""
    # Any q > 0 is sound; beyond e^±15 products with it would lose the weight's digits.
    q = log_scale.clamp(-15, 15).exp()
    return (gram * q).sum(1) / q
