"""Circular padding and products against torch's, and the derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dynablocks.linear import convolution
from dynablocks.linear.circular import circulant_product, circular_pad

BORDERS = [(0, 1), (1, 0), (1, 1), (2, 1), (3, 3)]


@pytest.mark.parametrize(("before", "after"), BORDERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_padding_of_torch_in_the_same_layout(before: int, after: int, layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 3).contiguous(memory_format=layout)
    padded = circular_pad(x, before, after)
    assert torch.equal(padded, functional.pad(x, (before, after, before, after), mode="circular"))
    assert padded.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("before", "after"), BORDERS)
def test_derivatives_of_every_order_and_mode(before: int, after: int) -> None:
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    cubed = lambda x: circular_pad(x, before, after) ** 3  # noqa: E731
    assert torch.autograd.gradcheck(cubed, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cubed, x, check_batched_grad=True)


@pytest.mark.parametrize("axis", [0, 2])
def test_under_vmap_as_in_a_loop(axis: int) -> None:
    x = torch.randn(2, 3, 4, 3, 3)
    each = torch.stack([circular_pad(part, 1, 2) for part in x.unbind(axis)])
    assert torch.equal(torch.func.vmap(lambda part: circular_pad(part, 1, 2), in_dims=axis)(x), each)
    jacobian = torch.func.jacrev(lambda part: circular_pad(part, 1, 2))(x[0])
    assert torch.equal(jacobian, torch.autograd.functional.jacobian(lambda part: circular_pad(part, 1, 2), x[0]))


@pytest.mark.parametrize(("size", "before"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_circulant_product_is_the_circular_convolution(size: int, before: int, layout: torch.memory_format) -> None:
    x = torch.randn(4, 3, size, size, dtype=torch.float64).contiguous(memory_format=layout)
    kernel, bias = torch.randn(5, 3, size, size, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    for offset in (bias, None):
        expected = functional.conv2d(circular_pad(x, before, size - 1 - before), kernel, offset)
        torch.testing.assert_close(circulant_product(kernel, x, before, offset), expected, rtol=0, atol=1e-13)


def test_a_convolution_takes_the_product_where_its_kernel_covers_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = convolution.circulant_product
    monkeypatch.setattr(convolution, "circulant_product", lambda *a: sizes.append(a[0].shape[2]) or original(*a))
    # The matrix of a large image would fill the memory.
    large = (convolution.MOST_CIRCULANT, convolution.MOST_CIRCULANT + 1, 8)
    every = [(2, 2, 1, 1), (3, 3, 1, 1), (3, 2, 1, 1), (3, 2, 2, 1), (2, 2, 1, 2), *((n, n, 1, 1) for n in large)]
    for side, size, dilation, groups in every:
        conv = convolution.Conv((2, side, side), 4, size, "circular", dilation=dilation, groups=groups).double()
        x, y = torch.randn(3, 2, side, side).double(), torch.randn(3, 4, side, side).double()
        torch.testing.assert_close((conv(x) * y).sum(), (x * conv.adjoint(y)).sum(), rtol=0, atol=1e-11)
    assert sizes == [2, 2, 3, 3, 4, 4]
