"""Attacks inside an autocast around them: they are of the network in its own number format."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dynablocks.models import ModelConfig, build
from dynablocks.robustness import AttackConfig, attack, l2_pgd
from dynablocks.robustness.arithmetic import full_precision

LOSSES = ("ce", "margin")


def network() -> nn.Module:
    return build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10, seed=0).eval()


def images() -> tuple[Tensor, Tensor]:
    """Images with the classes that the network finds, so that there is something to attack."""
    pixels = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        return pixels, network()(pixels).argmax(1)


def test_autocast_changes_what_this_network_says() -> None:
    """Otherwise the tests below would see nothing."""
    model, (pixels, _) = network(), images()
    with torch.no_grad():
        with full_precision():
            plain = model(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(pixels)
            with full_precision():
                exact = model(pixels)
    assert not torch.equal(mixed.float(), plain)
    assert torch.equal(exact, plain)


def test_an_attack_inside_autocast_has_the_bits_of_one_outside() -> None:
    model, data = network(), images()
    config = AttackConfig((0.0, 0.2, 0.8), steps=3, losses=LOSSES)
    outside = attack(model, data, config)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attack(model, data, config)
        assert torch.is_autocast_enabled("cpu")
    assert bool(outside.worst_broken.any())
    assert inside.summary() == outside.summary()
    found = inside.tensors()
    for name, tensor in outside.tensors().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("loss", LOSSES)
def test_adversarial_images_made_inside_autocast_have_the_bits_of_those_outside(loss: str) -> None:
    model, (pixels, labels) = network(), images()
    outside = l2_pgd(model, pixels, labels, 0.5, loss=loss, steps=3)
    with torch.autocast("cpu", torch.bfloat16):
        inside = l2_pgd(model, pixels, labels, 0.5, loss=loss, steps=3)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert not torch.equal(outside, pixels)
