"""Is a linear map what it says it is? Its products, the weight that steps scale, and its bounds, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dynablocks.fields import RidgeField
from dynablocks.linear import LinearMap, shared_weights

ROUNDING = 64 * torch.finfo(torch.float64).eps
"""What rounding may do to a sum, for each of its terms and relative to the sizes of what is multiplied."""

BATCH = 3
DENSE_ENTRIES = 128
"""Up to so many entries of an input and of an output bounds are held against the singular values."""


def wrong_maps(module: nn.Module) -> Iterator[str]:
    """A sentence for each thing that is wrong with the linear maps of a float64 module.

    Of every map the adjoint is that of the map, both multiply by the weight, the bias has one entry a channel, and the
    bounds hold the singular values of the matrix. Of one that a :class:`~dynablocks.fields.RidgeField` has, whose Euler
    steps multiply the weight by one number a channel, Aᵀ of that weight is Aᵀ of the numbers times the activations.

    Example:
        >>> from dynablocks.linear import Dense
        >>> class Halved(Dense):
        ...     def adjoint(self, y):
        ...         return super().adjoint(y) / 2
        >>> next(wrong_maps(Halved(2, 2).double()))[:44]
        'Halved: ⟨Ax, y⟩ and ⟨x, Aᵀy⟩ differ by up to'
    """
    scaled = {id(part.linear) for part in module.modules() if isinstance(part, RidgeField) and part.is_plain}
    for path, part in module.named_modules():
        if isinstance(part, LinearMap):
            yield from (f"{path or type(part).__name__}: {sentence}" for sentence in _wrong(part, id(part) in scaled))


def _wrong(linear: LinearMap, scaled: bool) -> list[str]:
    with torch.no_grad(), shared_weights(linear):
        return [*_wrong_products(linear), *(_wrong_scaling(linear) if scaled else ()), *_wrong_bounds(linear)]


def _drawn(linear: LinearMap) -> tuple[Tensor, Tensor]:
    """Inputs of the map and of its adjoint."""
    return (
        torch.randn(BATCH, *linear.in_shape, dtype=torch.float64),
        torch.randn(BATCH, *linear.out_shape, dtype=torch.float64),
    )


def _over_channels(numbers: Tensor, like: int) -> Tensor:
    """One number a channel, shaped to multiply tensors with so many axes from the channels on."""
    return numbers.reshape(-1, *(1,) * (like - 1))


def _wrong_products(linear: LinearMap) -> Iterator[str]:
    x, y = _drawn(linear)
    image, back = linear.affine(x, None), linear.adjoint(y)
    for what, found, wanted in (("Ax", image, y), ("Aᵀy", back, x)):
        if found.shape != wanted.shape:
            yield f"{what} has shape {tuple(found.shape)}; {tuple(wanted.shape)} is needed"
            return
    entries = max(x[0].numel(), y[0].numel())
    one, other = (image * y).flatten(1).sum(1), (x * back).flatten(1).sum(1)
    size = float(torch.maximum(_norms(image) * _norms(y), _norms(x) * _norms(back)).max())
    yield from _difference("⟨Ax, y⟩ and ⟨x, Aᵀy⟩", one, other, entries * size)
    bias = torch.randn(linear.out_shape[0], dtype=torch.float64)
    size = max(1.0, float(_norms(image).max()), float(_norms(back).max()))
    for what, one, other in (
        ("affine(x, b) and Ax + b", linear.affine(x, bias), image + _over_channels(bias, len(linear.out_shape))),
        ("affine(x, None) and multiply(weight, x)", image, linear.multiply(linear.weight, x)),
        ("adjoint(y) and multiply_adjoint(weight, y)", back, linear.multiply_adjoint(linear.weight, y)),
    ):
        yield from _difference(what, one, other, entries * size)


def _wrong_scaling(linear: LinearMap) -> Iterator[str]:
    weight, channels = linear.weight, linear.out_shape[0]
    if tuple(weight.shape[:1]) != (channels,):
        yield (
            f"the weight has shape {tuple(weight.shape)}; steps of a gradient field multiply its first dimension by a "
            f"number for each of {channels} output channels"
        )
        return
    _, y = _drawn(linear)
    numbers = torch.randn(channels, dtype=torch.float64)
    expected = linear.adjoint(_over_channels(numbers, len(linear.out_shape)) * y)
    found = linear.multiply_adjoint(_over_channels(numbers, weight.ndim) * weight, y)
    size = max(float(_norms(expected).max()), float(_norms(linear.adjoint(y)).max()))
    what = "multiply_adjoint(c · weight, y) and Aᵀ(c · y), one c a channel as in the steps of a gradient field,"
    yield from _difference(what, found, expected, max(expected[0].numel(), y[0].numel()) * size)


def _wrong_bounds(linear: LinearMap) -> Iterator[str]:
    if max(math.prod(linear.in_shape), linear.features) > DENSE_ENTRIES:
        return
    matrix = linear.dense_matrix()
    values = torch.linalg.svdvals(matrix)
    largest, slack = float(values[0]), ROUNDING * max(matrix.shape) * float(values[0])
    least = float(values[-1]) if matrix.shape[0] >= matrix.shape[1] else 0.0
    bounds, stated = linear.norm_bounds(), linear.smallest_singular_value()
    if not bounds.lower - slack <= largest <= bounds.upper + slack:
        yield f"norm_bounds() are [{bounds.lower:.9g}, {bounds.upper:.9g}], and ‖A‖ is {largest:.9g}"
    if not stated <= least + slack:
        yield f"smallest_singular_value() is {stated:.9g}, and √λ_min(AᵀA) is {least:.9g}"


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms


def _difference(what: str, one: Tensor, other: Tensor, size: float) -> Iterator[str]:
    if one.shape != other.shape:
        yield f"{what} have the shapes {tuple(one.shape)} and {tuple(other.shape)}"
        return
    gap = float((one - other).abs().max())
    if not gap <= ROUNDING * size:
        yield f"{what} differ by up to {gap:.1e}"
