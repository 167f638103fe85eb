"""Points, projections and directions of the ball, against float64; gradients that are tiny, zero or undefined."""

from __future__ import annotations

import pytest
import torch

from dynablocks.ball import (
    direction,
    foolbox_direction,
    foolbox_norms,
    image_norms,
    projected,
    unit_ball_points,
)

EPS = torch.finfo(torch.float32).eps


def lengths(x: torch.Tensor) -> torch.Tensor:
    return x.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("norms", [image_norms, foolbox_norms])
def test_norms_are_those_of_float64(norms) -> None:
    x = torch.randn(5, 3, 8, 8)
    assert norms(x).shape == (5, 1, 1, 1)
    assert torch.allclose(norms(x).flatten().double(), lengths(x), rtol=192 * EPS, atol=0)


@pytest.mark.parametrize("norms", [image_norms, foolbox_norms])
def test_the_projection_is_the_nearest_point_of_the_ball(norms) -> None:
    delta = torch.randn(6, 3, 4, 4) * torch.tensor([1e-3, 0.01, 0.1, 1.0, 10.0, 100.0]).view(-1, 1, 1, 1)
    moved = projected(delta, 1.0, norms(delta))
    inside = lengths(delta) <= 1
    assert 0 < int(inside.sum()) < 6
    assert torch.equal(moved[inside], delta[inside])
    assert torch.allclose(
        lengths(moved[~inside]), torch.ones(int((~inside).sum()), dtype=torch.float64), rtol=0, atol=48 * EPS
    )
    along = torch.nn.functional.cosine_similarity(moved.double().flatten(1), delta.double().flatten(1))
    assert torch.allclose(along, torch.ones(6, dtype=torch.float64), rtol=0, atol=48 * EPS)
    each = torch.full((6, 1, 1, 1), 1.0)
    # A number is divided by a tensor as its reciprocal times the number.
    assert torch.allclose(projected(delta, each, norms(delta)), moved, rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_directions_have_length_one_whatever_the_size_of_the_gradient(scale: float) -> None:
    gradient = torch.randn(4, 3, 4, 4)
    for found in (direction(scale * gradient), foolbox_direction(scale * gradient, exact=True)):
        assert torch.allclose(lengths(found), torch.ones(4, dtype=torch.float64), rtol=0, atol=48 * EPS)
        along = torch.nn.functional.cosine_similarity(found.double().flatten(1), gradient.double().flatten(1))
        assert float(along.min()) > 1 - 48 * EPS


def test_foolbox_leaves_tiny_gradients_short() -> None:
    gradient = 1e-20 * torch.randn(2, 1, 4, 4)
    assert float(lengths(foolbox_direction(gradient, exact=False)).max()) < 1e-6


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_no_direction_comes_of_zero_or_undefined_gradients(value: float) -> None:
    gradient = torch.full((1, 1, 2, 2), value)
    ways = (direction(gradient), foolbox_direction(gradient, exact=True), foolbox_direction(gradient, exact=False))
    assert all(torch.equal(found, torch.zeros(1, 1, 2, 2)) for found in ways)


def test_the_memory_format_of_images_stays() -> None:
    gradient = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    found = direction(gradient)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert projected(found, 0.5, image_norms(found)).is_contiguous(memory_format=torch.channels_last)


def test_points_are_uniform_in_the_ball() -> None:
    points = unit_ball_points(torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)))
    assert points.shape == (4000, 2)
    # A uniform point's radius has P(r <= s) = s²; 4,000 draws stay within 1.95 / √4000 of it with probability 0.999.
    radii = points.double().norm(dim=1)
    steps = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert float(radii.max()) <= 1 + 4 * EPS
    assert all(abs(float((radii <= s).double().mean()) - float(s) ** 2) < 1.95 / 4000**0.5 for s in steps)
