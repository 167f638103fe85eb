r"""A proven bound of the rounding error of a network's logits, in any floating-point format.

Each step is compared with the exact step on the *computed* input. With the unit roundoff u and
:math:`\gamma_n = nu/(1-nu)`, an inner product of length n errs by at most :math:`\gamma_n |a|^T|x|` in any order of
summation, with or without fused multiply-add, so a linear map errs by at most :math:`\gamma_n\,\||A|\|_2\,\|x\|` in ℓ2.
That local error then passes through the rest of the network, whose Lipschitz constants are known:

.. math:: E_{k+1} = L_k E_k + \text{local}_k.

Every bound is affine in the radius r, because activations move by at most :math:`L r` within it; so one evaluation
gives a bound for every image within r of the one that was measured. In float32 Euler steps take :math:`|A||x|` at that
image instead of the norms.

All this holds while no number overflows, which is proved too, for every image within the diameter of the unit cube of
those measured: each step bounds all numbers that it computes, the partial sums of Ax + b for one by
:math:`(1 + \gamma_n)(\||A|\|_2\,\|x\| + \|b\|)`, and where such a bound exceeds the largest number of the format there
is no proof.

Assumed: IEEE arithmetic rounded to nearest; convolutions that are sums of products (Winograd and FFT convolutions are
not, and TF32 is another format: :func:`dynablocks.robustness.arithmetic.plain_arithmetic` switches them off, and where
torch has no switch nothing is proved); ``exp`` accurate to two units in the last place; what the bounds of norms assume
(:mod:`dynablocks.numerics.rounding`).

Source:
    N. J. Higham, Accuracy and Stability of Numerical Algorithms (2002), sections 2.2, 3.1 and 3.5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import Activation, MetricField, RidgeField, TwoMatrixField, VectorField
from dynablocks.fields.ridge import RIDGE_METHODS
from dynablocks.integrators import ExactFlow, ExplicitEuler
from dynablocks.lifting import ChannelMix, Head, PaperLift, PixelNormalisation, SpaceToDepth, ZeroLift
from dynablocks.linear import Conv, Dense, LinearMap
from dynablocks.models import Network
from dynablocks.norms import Channelwise, Whitening
from dynablocks.numerics.bounds import linear_norm_bounds
from dynablocks.properties import EUCLIDEAN, Lipschitz, Metric, declare
from dynablocks.properties.own_code import CALLING, foreign
from dynablocks.properties.structure import pair
from dynablocks.robustness.arithmetic import (
    NoRoundingBound,
    depthwise_by_winograd,
    gamma,
    require_strict_environment,
    unit_roundoff,
)
from dynablocks.robustness.own_code import PRODUCTS, has_own

if TYPE_CHECKING:
    from jaxtyping import Float

_INFLATION = 1 + 2.0**-30
"""Covers the float64 arithmetic that evaluates the bounds."""
_EXP_ROUNDINGS = 4
_UNDERFLOW = 2.0**32
"""Smallest normal numbers a step may lose to underflow: 2^26 entries in ℓ2 times 2^19 operations each."""


@dataclass(frozen=True)
class LogitError:
    r"""How far computed logits can be from the exact ones, at each sample and within r of it.

    For r up to the diameter of the cube of images, in the norm of r. A difference :math:`z_i - z_j` errs by at most
    :math:`\|w_i - w_j\|(F + f r) + (H_i + h_i r) + (H_j + h_j r)`, F the error of the features and H that of the head.

    Attributes:
        features: F, (N,).
        features_slope: f.
        head: H, (N, classes).
        head_slope: h, (classes,).
        unit: u of the arithmetic.
    """

    features: Float[Tensor, " n"]
    features_slope: float
    head: Float[Tensor, "n classes"]
    head_slope: Float[Tensor, " classes"]
    unit: float

    @classmethod
    def joined(cls, parts: list[LogitError]) -> LogitError:
        """The bounds of several batches of one network as one."""
        features, head = (torch.cat([getattr(part, name) for part in parts]) for name in ("features", "head"))
        slope, head_slope = max(p.features_slope for p in parts), torch.stack([p.head_slope for p in parts]).amax(0)
        return cls(features, slope, head, head_slope, parts[0].unit)

    def of_logits(self, norms: Float[Tensor, " classes"], radius: float = 0.0) -> Float[Tensor, "n classes"]:
        """The bound of each logit's error within ``radius``, for rows of W with these norms."""
        if not radius:
            return self.features[:, None] * norms + self.head
        features = self.features[:, None] + self.features_slope * radius
        return features * norms + self.head + self.head_slope * radius


@dataclass(frozen=True)
class _Affine:
    """constant + slope · t for t >= 0: bounds as functions of an input's norm, or of the radius."""

    slope: float = 0.0
    constant: float = 0.0

    def __add__(self, other: _Affine) -> _Affine:
        return _Affine(self.slope + other.slope, self.constant + other.constant)

    def __mul__(self, factor: float) -> _Affine:
        return _Affine(self.slope * factor, self.constant * factor) if factor else _Affine()

    __rmul__ = __mul__


@dataclass(frozen=True)
class _Value:
    """A vector inside a step, in ℓ2: ``size`` of the exact one, ``error`` of the computed one, by the input's norm.

    ``peak`` bounds the size of every number that is computed on the way to it, itself included.
    """

    size: _Affine
    error: _Affine
    peak: _Affine

    @property
    def computed(self) -> _Affine:
        return self.size + self.error


_INPUT = _Value(_Affine(1.0), _Affine(), _Affine(1.0))


@dataclass(frozen=True)
class _Step:
    """A part of the network: the map as it runs, its Lipschitz constant, and its error on an exact input of norm t.

    ``peak`` bounds every number that it computes of that input. ``near``, where there is one, gives a sharper error
    from the activations at hand: per sample, and how fast it grows with the distance from there.
    """

    function: Callable[[Tensor], Tensor]
    stated: Lipschitz
    local: _Affine
    peak: _Affine
    near: Callable[[Tensor], tuple[Tensor, float]] | None = None


Known = dict[tuple[int, tuple[int, ...]], list[_Step]]
"""The steps of parts of a network, by the part's id and the shape of one of its inputs."""


class _Arithmetic:
    """The roundings of the operations that steps are made of."""

    def __init__(self, pixels: Tensor) -> None:
        self.unit, self.tiny = unit_roundoff(pixels.dtype), torch.finfo(pixels.dtype).tiny
        self.format, self.most = str(pixels.dtype).removeprefix("torch."), torch.finfo(pixels.dtype).max
        # Two more products with each map are worth it only where the bound is not negligible anyway.
        self.worth_measuring = self.unit > 2.0**-40
        self.depthwise_by_winograd = depthwise_by_winograd(pixels)

    def gamma(self, count: int) -> float:
        return gamma(count, self.unit)

    def rounded(self, value: _Value, slope: float, roundings: int) -> _Value:
        """An elementwise map with f(0) = 0 and slopes up to ``slope``, computed in so many roundings.

        Nothing on the way to f(x) is larger than x or f(x).
        """
        fresh = self.gamma(roundings) * slope * value.computed if roundings else _Affine()
        size, error = slope * value.size, slope * value.error + fresh
        return _Value(size, error, value.peak + size + error)

    def linear(
        self,
        linear: LinearMap,
        value: _Value,
        *,
        adjoint: bool = False,
        bias: float = 0.0,
        scale: float = 1.0,
        factor: float = 1.0,
    ) -> _Value:
        """Ax + b, or scale · Aᵀx with up to three roundings of the scaled weights or entries; ``bias`` is ‖b‖.

        Wherever b is added, it is one more term of a sum. Of the factors that make ``scale``, some are up to ``factor``
        before the others come: a sum may have it, too.
        """
        if not isinstance(linear, (Dense, Conv, ChannelMix)):
            raise NoRoundingBound(f"how the linear map {type(linear).__name__} computes is not known.")
        _refuse_own_code(linear, *PRODUCTS[1:] if isinstance(linear, Head) else PRODUCTS)
        if self.depthwise_by_winograd and isinstance(linear, Conv) and _is_depthwise(linear):
            raise NoRoundingBound(
                "torch computes depthwise 3 × 3 convolutions in float32 by Winograd's algorithm on this processor, and "
                "the rounding of that has no proved bound; certify in float64."
            )
        plain = _absolute_norm(linear)
        norm, absolute = scale * linear.norm_bounds().upper, scale * plain
        length, entries = _inner_length(linear, adjoint), math.prod(linear.in_shape if adjoint else linear.out_shape)
        fresh = self.gamma(length + 4)
        underflow = math.sqrt(entries) * (length + 4) * self.tiny * max(1.0, scale)
        error = norm * value.error + (fresh * absolute) * value.computed + _Affine(0.0, fresh * bias + underflow)
        # Entries, weights and partial sums, each of them scaled or not: a row of |A| is no longer than ‖|A|‖.
        largest = (1 + plain) * value.computed + _Affine(0.0, plain + bias)
        peak = value.peak + (1 + fresh) * max(1.0, scale, factor) * largest
        return _Value(norm * value.size + _Affine(0.0, bias), error, peak)

    def add(self, first: _Value, second: _Value) -> _Value:
        total = first.computed + second.computed
        error = first.error + second.error + self.unit * total
        return _Value(first.size + second.size, error, first.peak + second.peak + total + error)


def _absolute_norm(linear: LinearMap) -> float:
    """An upper bound of ‖|A|‖₂, once for each held weight."""
    return linear.once("absolute norm", lambda: _compute_absolute_norm(linear))


def _compute_absolute_norm(linear: LinearMap) -> float:
    """For kernels >= 0 the frequency 0 has the largest symbol."""
    weight = linear.weight.detach().double().abs()
    if weight.ndim == 4:
        weight = weight.sum(dim=(2, 3)) * (1 + 2.0**-40)
        groups = getattr(linear, "groups", 1)
        return max(linear_norm_bounds(block).upper for block in weight.chunk(groups))
    return linear_norm_bounds(weight).upper


def _is_depthwise(conv: Conv) -> bool:
    """Whether A, or Aᵀ, which may be computed as a convolution too, has one input channel a group, and 3 × 3 pixels."""
    outputs, inputs, *kernel = conv.weight.shape
    return kernel == [3, 3] and conv.stride == conv.dilation == 1 and 1 in (inputs, outputs // conv.groups)


def _inner_length(linear: LinearMap, adjoint: bool) -> int:
    """How many products one output sums; an adjoint may sum over all output channels of A."""
    weight = linear.weight
    taps = math.prod(weight.shape[2:])
    return taps * (weight.shape[0] if adjoint else weight.shape[1])


def _bias_norm(bias: Tensor | None, linear: LinearMap) -> float:
    """‖b‖ with one entry per output."""
    if bias is None:
        return 0.0
    return float(bias.detach().double().norm()) * math.sqrt(linear.features / linear.out_shape[0])


def _leaky_slope(sigma: Activation) -> float:
    """a of σ(u) = max(u, au) for 0 <= a <= 1, by the library's code: the same function by other code rounds otherwise.

    Raises:
        NoRoundingBound: σ is another function, or by other code.
    """
    slope = sigma.negative_slope
    if slope is None or type(sigma) is not Activation or not _is_leaky_relu(sigma.function, slope):
        raise NoRoundingBound(
            f"the rounding of {sigma.name} has no proved bound; use relu or leaky-relu of dynablocks.fields."
        )
    return slope


def _is_leaky_relu(function: object, slope: float) -> bool:
    """Whether :func:`dynablocks.fields.leaky_relu` makes this function for the slope."""
    if function is functional.relu:
        return slope == 0
    return (
        isinstance(function, functools.partial)
        and function.func is functional.leaky_relu
        and not function.args
        and function.keywords == {"negative_slope": slope}
        and 0 <= slope <= 1
    )


def _sigma(sigma: Activation, arithmetic: _Arithmetic, value: _Value) -> _Value:
    return arithmetic.rounded(value, 1.0, 2 if _leaky_slope(sigma) else 0)


def _ridge_euler(field: RidgeField, h: float, arithmetic: _Arithmetic) -> _Value:
    """x + (h s)Aᵀσ(Ax + b), the factor multiplied into the weight, into σ or afterwards."""
    inner = arithmetic.linear(field.linear, _INPUT, bias=_bias_norm(field.bias, field.linear))
    slope = max(abs(end) for end in field.scale_range())
    active = _sigma(field.sigma, arithmetic, inner)
    image = arithmetic.linear(field.linear, active, adjoint=True, scale=abs(h) * slope, factor=slope)
    return arithmetic.add(_INPUT, image)


def _ridge_euler_near(field: RidgeField, h: float, arithmetic: _Arithmetic, x: Tensor) -> tuple[Tensor, float]:
    """The error of the same step at x, from |A||x| and |A|ᵀ|σ(Ax + b)| themselves, and its growth with ‖x′ − x‖."""
    linear, weight = field.linear, field.linear.weight.abs()
    norm, absolute = linear.norm_bounds().upper, _absolute_norm(linear)
    inner, outer = (arithmetic.gamma(_inner_length(linear, adjoint) + 4) for adjoint in (False, True))
    sigma = arithmetic.gamma(2) if _leaky_slope(field.sigma) else 0.0
    scale = abs(h) * max(abs(end) for end in field.scale_range())
    u = field.preactivation(x)
    active = field.sigma(u)
    # Sums of terms >= 0 err by γ of themselves; what is computed here and what runs differ by twice the error.
    products = _norms(linear.multiply(weight, x.abs())) * (1 + 2 * inner)
    wrong_u = inner * (products + _bias_norm(field.bias, linear))
    wrong = wrong_u + sigma * (_norms(u) + 2 * wrong_u)
    products = _norms(linear.multiply_adjoint(weight, active.abs())) * (1 + 2 * outer) + 2 * absolute * wrong
    change = scale * (norm * wrong + outer * products)
    here = change + arithmetic.unit * (_norms(x) + scale * norm * (_norms(active) + 2 * wrong) + change)
    slope_u = inner * absolute
    slope = slope_u + sigma * (norm + slope_u)
    growth = scale * (norm * slope + outer * absolute * (norm + slope))
    return here, growth + arithmetic.unit * (1 + scale * norm * (norm + slope) + growth)


def _norms(x: Tensor) -> Float[Tensor, " n"]:
    """‖x‖₂ of each sample, in float64."""
    return torch.linalg.vector_norm(x.detach().double().flatten(1), dim=1).cpu()


def _ridge_change(
    field: RidgeField, slope: float, growth: float, roundings: int, arithmetic: _Arithmetic, factor: float = 1.0
) -> _Value:
    """x + Aᵀe(Ax + b): e has slopes up to ``slope`` and passes through values up to ``growth`` times its argument.

    ``factor`` is by how much those values are multiplied on the way, at most.
    """
    inner = arithmetic.linear(field.linear, _INPUT, bias=_bias_norm(field.bias, field.linear))
    fresh = arithmetic.gamma(roundings) * (growth + 1) * inner.computed
    passed = (1 + arithmetic.gamma(roundings)) * max(1.0, factor) * (growth + 1)
    peak = inner.peak + passed * inner.computed + _Affine(0.0, passed)
    change = _Value(slope * inner.size, slope * inner.error + fresh, peak)
    return arithmetic.add(_INPUT, arithmetic.linear(field.linear, change, adjoint=True))


def _euler(method: ExplicitEuler, field: VectorField, h: Tensor, arithmetic: _Arithmetic) -> list[_Step]:
    """The substeps, or the one step of an elementwise recursion."""
    _refuse_own_code(field, *(RIDGE_METHODS if isinstance(field, RidgeField) else ("forward",)))
    if isinstance(field, RidgeField) and method.substeps > 1 and field.linear.rows_orthonormal:
        return [_recursion(method, field, h, arithmetic)]
    part, number = h / method.substeps, float(h.detach()) / method.substeps
    near: Callable[[Tensor], tuple[Tensor, float]] | None = None
    if isinstance(field, RidgeField):
        image = _ridge_euler(field, number, arithmetic)
        if arithmetic.worth_measuring:
            near = functools.partial(_ridge_euler_near, field, number, arithmetic)
    elif isinstance(field, TwoMatrixField):
        image = _two_matrices(field, number, arithmetic)
    elif isinstance(field, MetricField):
        image = _metric_euler(field, number, arithmetic)
    else:
        raise NoRoundingBound(f"the rounding of {type(field).__name__} has no proved bound.")
    stated = Lipschitz(field.euler_constant(number)[0], field.standing_facts().metric)
    if method.substeps == 1:
        return [_Step(lambda x: method.step(field, x, h), stated, image.error, image.peak, near)]
    return [_Step(lambda x: x + part * field(x), stated, image.error, image.peak, near)] * method.substeps


def _refuse_own_code(part: object, *methods: str) -> None:
    """Refuse a part with methods of its own: what was proved is how the library's computes.

    Raises:
        NoRoundingBound: it has one.
    """
    for method in methods:
        if has_own(part, method):
            name = type(part).__name__
            raise NoRoundingBound(f"{name} has a {method} of its own, whose rounding has no proved bound.")


def _recursion(method: ExplicitEuler, field: RidgeField, h: Tensor, arithmetic: _Arithmetic) -> _Step:
    _leaky_slope(field.sigma)
    number = float(h.detach())
    scale = max(abs(end) for end in field.scale_range())
    growth = (1 + abs(number) / method.substeps * scale) ** method.substeps
    image = _ridge_change(field, growth + 1, growth, 6 * method.substeps + 1, arithmetic, factor=scale)
    stated = Lipschitz(method.declare(field, number).properties.lipschitz)
    return _Step(lambda x: method.step(field, x, h), stated, image.error, image.peak)


def _two_matrices(field: TwoMatrixField, h: float, arithmetic: _Arithmetic) -> _Value:
    inner = arithmetic.linear(field.inner, _INPUT, bias=_bias_norm(field.bias, field.inner))
    image = arithmetic.linear(field.outer, _sigma(field.sigma, arithmetic, inner), adjoint=True)
    if field.decay:
        image = arithmetic.add(image, arithmetic.rounded(_INPUT, abs(field.decay), 2))
    return arithmetic.add(_INPUT, arithmetic.rounded(image, abs(h), 2))


def _metric_euler(field: MetricField, h: float, arithmetic: _Arithmetic) -> _Value:
    metric = field.metric
    low, high = (math.sqrt(value) for value in metric.eigenvalues)
    value = _whitened(arithmetic, metric, _INPUT, high)
    if not field.whitened:
        value = _whitened(arithmetic, metric, value, high)
    inner = arithmetic.linear(field.linear, value, bias=_bias_norm(field.bias, field.linear))
    image = arithmetic.linear(field.linear, _sigma(field.sigma, arithmetic, inner), adjoint=True)
    if field.whitened:
        image = _whitened(arithmetic, metric, image, 1 / low)
    return arithmetic.add(_INPUT, arithmetic.rounded(image, abs(h), 2))


def _whitened(arithmetic: _Arithmetic, metric: Metric, value: _Value, norm: float) -> _Value:
    """M^{±1/2}x, computed in float64 and rounded once; ``norm`` is that of the matrix.

    Rows of M^{±1/2}, of cosine bases and of their products are no longer than 1 or ``norm``, and so no partial sum is
    larger than x or the image may be.
    """
    try:
        exact = metric.whitening_error
    except InvalidArgument as refused:
        raise NoRoundingBound(str(refused)) from None
    fresh = (arithmetic.unit + exact) * norm * (1 + exact) * value.computed
    size, error = norm * value.size, norm * value.error + fresh
    return _Value(size, error, value.peak + 2 * (value.computed + size + error))


def _flow(method: ExactFlow, field: VectorField, time: Tensor, arithmetic: _Arithmetic) -> _Step:
    number = float(time.detach())
    if not isinstance(field, RidgeField):
        raise NoRoundingBound(f"the rounding of the exact flow of {type(field).__name__} has no proved bound.")
    _leaky_slope(field.sigma)
    _refuse_own_code(field, "flow", *RIDGE_METHODS)
    exponents = [number * scale for scale in field.scale_range()]
    largest = max(map(abs, exponents))
    if largest > 80:
        raise NoRoundingBound(f"the exact flow for t = {number:.4g} leaves the range of float32; use shorter steps.")
    growth = math.exp(max(0.0, *exponents))
    slope = max(abs(math.expm1(exponent)) for exponent in exponents)
    # An exponent rounded three times changes exp by the relative e^{3u|t|} - 1.
    roundings = _EXP_ROUNDINGS + 3 + math.ceil(4 * largest)
    image = _ridge_change(field, slope, growth, roundings, arithmetic)
    stated = Lipschitz(field.flow_constant(number)[0])
    return _Step(lambda x: method.step(field, x, time), stated, image.error, image.peak)


def _block(block: DynamicalBlock, arithmetic: _Arithmetic) -> Iterator[_Step]:
    _refuse_own_code(block, "forward")
    _refuse_own_code(block.method, "step")
    for index, step_size in block.signal.pieces():
        field = block.fields[index]
        assert isinstance(field, VectorField)
        if not isinstance(step_size, Tensor):
            signal = type(block.signal).__name__
            raise NoRoundingBound(f"the steps of {signal} are plain numbers, whose rounding is not followed.")
        if isinstance(block.method, ExplicitEuler):
            yield from _euler(block.method, field, step_size, arithmetic)
        elif isinstance(block.method, ExactFlow):
            yield _flow(block.method, field, step_size, arithmetic)
        else:
            raise NoRoundingBound(f"the rounding of {block.method!r} has no proved bound; use Euler or exact steps.")


def _leaf(module: nn.Module, arithmetic: _Arithmetic, pixels: int) -> _Value:
    """The image of one layer, whose inputs have so many pixels a channel."""
    _refuse_own_code(module, "forward")
    if isinstance(module, Channelwise):
        return _leaf(module.module, arithmetic, pixels)
    if type(module) in (nn.Identity, nn.Flatten, nn.ReLU, nn.MaxPool2d) or isinstance(module, (SpaceToDepth, ZeroLift)):
        return _INPUT
    if isinstance(module, PixelNormalisation):
        return _normalisation(module, arithmetic, pixels)
    if type(module) is nn.AvgPool2d:
        count = math.prod(pair(module.kernel_size))
        root, fresh = math.sqrt(count), arithmetic.gamma(count + 1)
        return _Value(_Affine(1 / root), _Affine(fresh / root), _Affine((1 + fresh) * root))
    if isinstance(module, PaperLift):
        alpha = abs(float(module.alpha.detach()))
        return arithmetic.rounded(arithmetic.linear(module.linear, _INPUT), alpha, 1)
    if isinstance(module, Whitening):
        return _whitened(arithmetic, module.metric, _INPUT, math.sqrt(module.metric.eigenvalues[1]))
    if isinstance(module, LinearMap) and not isinstance(module, Head):
        return arithmetic.linear(module, _INPUT)
    raise NoRoundingBound(f"the rounding of {type(module).__name__} has no proved bound.")


def _normalisation(module: PixelNormalisation, arithmetic: _Arithmetic, pixels: int) -> _Value:
    """(x − m)s: two roundings, relative to ‖x − m‖ <= ‖x‖ + ‖m‖."""
    mean = float(module.mean.detach().double().norm()) * math.sqrt(pixels)
    centred, scale = _Affine(1.0, mean), float(module.scale.double().abs().max())
    fresh = arithmetic.gamma(2)
    return _Value(scale * centred, (fresh * scale) * centred, (1 + fresh) * (1 + scale) * centred)


def _steps(module: nn.Module, arithmetic: _Arithmetic, pixels: int) -> Iterator[_Step]:
    """The steps of a block, or a layer as one step; its inputs have so many pixels a channel."""
    if isinstance(module, DynamicalBlock):
        yield from _block(module, arithmetic)
        return
    stated = declare(module).properties.of(Lipschitz) or Lipschitz(math.inf)
    image = _leaf(module, arithmetic, pixels)
    yield _Step(module, stated, image.error, image.peak)


def rounding_bound(
    network: Network,
    pixels: Float[Tensor, "n c h w"],
    metric: Metric = EUCLIDEAN,
    *,
    start: Metric | None = None,
    known: Known | None = None,
) -> tuple[Float[Tensor, "n classes"], LogitError]:
    r"""The logits as computed, and a proven bound of their error within every radius up to the diameter of [0, 1]^d.

    The exact logits are those of the network whose weights are the ones held (inside
    :func:`dynablocks.linear.frozen_weights`), in real arithmetic, at the image before it was rounded to the format, as
    k/255 is. Call it inside :func:`plain_arithmetic`.

    Args:
        network: in eval mode, its weights frozen; the format of its parameters is the arithmetic.
        pixels: images in [0, 1] of that format.
        metric: the norm of the radius, and of the diameter, which is √d in ℓ2 for images of d entries.
        start: ``network.metric``, where it is known already: asking for it declares the whole body.
        known: one dictionary, empty at first, for all batches of a network whose weights are held: what does not depend
            on the images is found once, and kept there.

    Raises:
        NoRoundingBound: a layer has no proved bound, a number in it may overflow at an image within the diameter, the
            environment lets products be less than that, or how the device computes is not known.

    Example:
        >>> from dynablocks.linear import frozen_weights
        >>> from dynablocks.models import ModelConfig, build
        >>> from dynablocks.robustness import plain_arithmetic
        >>> network = build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10, seed=0).eval()
        >>> with torch.no_grad(), frozen_weights(network), plain_arithmetic():
        ...     logits, error = rounding_bound(network, torch.rand(2, 1, 8, 8))
        >>> bool(error.features.max() < 1e-3)
        True
    """
    require_strict_environment(pixels)
    reason = foreign(network, everywhere=True)
    if reason is not None:
        raise NoRoundingBound(f"{reason}, so the rounding of the network has no proved bound.")
    compiled = next((path for path, part in network.named_modules() if path and part._compiled_call_impl), None)
    if compiled is not None:
        raise NoRoundingBound(
            f"{compiled} is compiled in place, and how compiled code rounds is not known; take copy.deepcopy(network), "
            "which leaves that out."
        )
    _refuse_own_code(network.head, "forward")
    arithmetic = _Arithmetic(pixels)
    start = network.metric if start is None else start
    chain = _Chain(pixels, start, metric, arithmetic, {} if known is None else known)
    chain.pass_through(network.body, arithmetic)
    return chain.through_head(network.head, arithmetic)


class _Chain:
    """Activations of a batch, and bounds of their error and movement, layer after layer."""

    def __init__(self, x: Tensor, start: Metric, metric: Metric, arithmetic: _Arithmetic, known: Known) -> None:
        unit = arithmetic.unit
        self.x, self.norm, self.lost, self.known = x, start, _UNDERFLOW * arithmetic.tiny, known
        self.reach = start.bounded_by(metric)
        self.format, self.most = arithmetic.format, arithmetic.most
        self.diameter = math.sqrt(math.prod(x.shape[1:])) * metric.bounded_by(EUCLIDEAN)
        # The image itself was rounded to this format: x, and x' within r of it.
        rounding = unit * (1 + 2 * unit) * start.bounded_by(EUCLIDEAN)
        self.error, self.slope = rounding * _norms(x), rounding * EUCLIDEAN.bounded_by(metric)

    def size(self) -> tuple[Tensor, float]:
        """‖computed activation‖₂ within r, as constant and slope: moved by reach · r, and wrong here and there."""
        moved, growth = self.moved()
        return _norms(self.x) + moved, growth

    def moved(self) -> tuple[Tensor, float]:
        """How far, in ℓ2, the computed activation within r can be from the one at hand."""
        euclidean = EUCLIDEAN.bounded_by(self.norm)
        return 2 * euclidean * self.error, euclidean * (self.reach + self.slope)

    def pass_through(self, module: nn.Module, arithmetic: _Arithmetic) -> None:
        """Take the steps of a module, part after part: what a layer does depends on how many pixels reach it."""
        if isinstance(module, nn.Sequential):
            _refuse_own_code(module, "forward", *CALLING)
            for part in module._modules.values():
                if part is not None:
                    self.pass_through(part, arithmetic)
            return
        key = id(module), tuple(self.x.shape[1:])
        if key not in self.known:
            self.known[key] = list(_steps(module, arithmetic, math.prod(self.x.shape[2:])))
        for step in self.known[key]:
            self.take(step, type(module).__name__)

    def take(self, step: _Step, name: str) -> None:
        if step.stated.metric != self.norm:
            raise NoRoundingBound(f"a layer is bounded in {step.stated.metric.name} but reached in {self.norm.name}.")
        if not math.isfinite(step.stated.constant):
            raise NoRoundingBound(f"{name} has no Lipschitz constant, by which errors before it would be bounded.")
        size, growth = self.size()
        self.refuse_overflow(step.peak, size, growth, name)
        outwards = step.stated.image.bounded_by(EUCLIDEAN)
        constant = step.stated.constant
        if step.near is None:
            rate = step.local.slope
            fresh = rate * size + step.local.constant
        else:
            here, rate = step.near(self.x)
            fresh = here + rate * self.moved()[0]
        self.error = (constant * self.error + outwards * (fresh + self.lost)) * _INFLATION
        self.slope = (constant * self.slope + outwards * rate * growth) * _INFLATION
        self.reach *= constant * _INFLATION
        self.x, self.norm = step.function(self.x), step.stated.image

    def refuse_overflow(self, peak: _Affine, size: Tensor, growth: float, name: str) -> None:
        """Refuse a part that may compute a number beyond the format's, at an image within the diameter of these.

        Raises:
            NoRoundingBound: it may.
        """
        farthest = (float(size.max()) if len(size) else 0.0) + growth * self.diameter
        largest = (peak.slope * farthest + peak.constant) * _INFLATION
        if not largest <= self.most:
            cure = "smaller weights" + ("" if self.format == "float64" else ", or float64,")
            raise NoRoundingBound(
                f"the numbers inside {name} are bounded by {largest:.3g} only, and the largest of {self.format} is "
                f"{self.most:.3g}, so that one may overflow; {cure} are needed."
            )

    def through_head(self, head: Head, arithmetic: _Arithmetic) -> tuple[Tensor, LogitError]:
        weight = head.weight.detach().cpu().double()
        norms, bias = weight.norm(dim=1), head.bias.detach().cpu().double().abs()
        size, growth = self.size()
        fresh, underflow = arithmetic.gamma(weight.shape[1] + 1), (weight.shape[1] + 1) * arithmetic.tiny
        peak = (1 + fresh) * _Affine(float(norms.max()), float(bias.max()))
        self.refuse_overflow(peak, size, growth, type(head).__name__)
        local = (fresh * (size[:, None] * norms + bias) + underflow) * _INFLATION
        logits: Tensor = head(self.x)
        error = LogitError(self.error, self.slope, local, fresh * growth * norms * _INFLATION, arithmetic.unit)
        return logits.cpu(), error
