"""The universal network: what its layers keep, and that it approximates a function and a flow map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynablocks.errors import InvalidArgument
from dynablocks.fields import GradientField
from dynablocks.fitting import fit
from dynablocks.integrators import exact_solution
from dynablocks.linear import Dense
from dynablocks.models.universal import FlowComposition, PairedFlows
from dynablocks.properties import NormPreserving, Properties, declare, verify
from dynablocks.properties.jacobians import jacobians


def pairs(network: FlowComposition) -> list[PairedFlows]:
    return [part for part in network.parts if isinstance(part, PairedFlows)]


def test_it_is_the_composition_that_is_printed() -> None:
    network = FlowComposition(2, 3, width=4, blocks=2, layers=3, seed=1)
    assert [type(part).__name__ for part in network.parts] == ["Linear", *["PairedFlows"] * 3] * 2 + ["Linear"]
    z = torch.randn(5, 4, dtype=torch.float64)
    layer = pairs(network)[0]
    h = layer.signal.steps[0]
    by_hand = layer.gradient(z) * h + z
    moved = layer.methods[1].step(layer.rotation, by_hand, h)
    torch.testing.assert_close(layer(z), moved, rtol=0, atol=1e-14)
    assert torch.allclose(moved.norm(dim=1), by_hand.norm(dim=1), rtol=0, atol=1e-14)


def test_euler_steps_do_not_keep_the_norm() -> None:
    network = FlowComposition(2, width=4, keep_norm=False, seed=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    layer, z = pairs(network)[0], torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        first = layer.methods[0].step(layer.gradient, z, 0.3)
        second = layer.methods[1].step(layer.rotation, first, 0.3)
    assert float((second.norm(dim=1) - first.norm(dim=1)).abs().max()) > 1e-3


def test_the_gradient_part_has_both_signs() -> None:
    gradient = pairs(FlowComposition(1, width=8, seed=0))[0].gradient
    low, high = gradient.facts().spectrum or (0.0, 0.0)
    assert low < 0 < high


@pytest.mark.parametrize("keep_norm", [True, False])
def test_each_step_declares_what_it_has_and_both_what_is_left(keep_norm: bool) -> None:
    network = FlowComposition(2, width=4, layers=1, keep_norm=keep_norm, seed=1)
    (layer,) = pairs(network)
    declared = declare(layer)
    (_, gradient), (_, rotation) = declared.parts
    assert (NormPreserving() in rotation.properties) == keep_norm
    z = torch.randn(32, 4, dtype=torch.float64)
    found = jacobians(lambda state: layer.methods[0].step(layer.gradient, state, layer.signal.steps[0]), z)
    largest = float(torch.linalg.matrix_norm(found, ord=2).max())
    assert 0 < largest <= gradient.properties.lipschitz * (1 + 1e-12) < 10
    assert declared.properties == declare(network).properties == Properties()
    lost = ["Lipschitz is lost at rotation", *["NormPreserving is lost at gradient"] * keep_norm]
    assert [loss.split(" (")[0] for loss in declared.losses] == lost
    assert declare(network).title == "FlowComposition"


def test_without_time_only_the_linear_maps_are_left() -> None:
    network = FlowComposition(2, width=3, layers=2, keep_norm=False, seed=1)
    with torch.no_grad():
        for layer in pairs(network):
            layer.signal.steps.zero_()
    first, last = (torch.linalg.matrix_norm(network.parts[k].weight.detach(), ord=2) for k in (0, -1))
    assert network.properties.lipschitz == pytest.approx(float(first * last), rel=1e-12)
    assert verify(network, torch.randn(8, 2, dtype=torch.float64)).passed


def test_stored_networks_keep_their_names() -> None:
    names = {f"parts.{k}.{name}" for k in (0, 2) for name in ("weight", "bias")}
    names |= {f"parts.1.gradient.{name}" for name in ("bias", "alpha", "linear.matrix")}
    names |= {f"parts.1.rotation.{name}" for name in ("bias", "inner.matrix", "outer.matrix")}
    assert set(FlowComposition(1, width=3, layers=1).state_dict()) == names | {"parts.1.signal.steps"}


def test_equal_seeds_equal_networks() -> None:
    first, again, other = (FlowComposition(2, width=3, seed=seed) for seed in (4, 4, 5))
    x = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(first(x), again(x))
    assert not torch.allclose(first(x), other(x))


def test_a_seed_reaches_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    state = torch.get_rng_state()
    FlowComposition(2, width=3, seed=4)
    assert not seeds
    assert torch.equal(torch.get_rng_state(), state)


def test_it_approximates_a_function_and_a_flow_map() -> None:
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)[:, None]
    network = FlowComposition(1, width=6, layers=3, seed=0)
    fit(network, x, x.square() + x.sin(), adam_steps=100, finish_steps=60)
    assert float((network(x) - x.square() - x.sin()).detach().abs().max()) < 1e-3
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    points = torch.randn(80, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = FlowComposition(2, 2, width=3, layers=2, seed=0)
    fit(network, points, points @ turn.mT, adam_steps=50, finish_steps=30)
    assert float((network(points) - points @ turn.mT).detach().square().mean()) < 1e-20


def test_flows_of_the_line_increase_and_so_miss_minus_x() -> None:
    """Why (2.2) is for n >= 2 in L^p, and for maps that keep the orientation in the sup norm (design D2.8, D3)."""
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
    torch.manual_seed(0)
    y = x
    for _ in range(6):
        field = GradientField(Dense(1, 3), "tanh", expansive=True, alpha=1.0).double()
        for parameter in field.parameters():
            nn.init.normal_(parameter)
        y = exact_solution(field, y, 0.5)
    assert float((y - x).abs().max()) > 1e-3
    assert float(y.diff(dim=0).min()) > 0
    assert float((y + x).abs().max()) >= 1


@pytest.mark.parametrize("sizes", [{"width": 1}, {"layers": 0}, {"blocks": 0}])
def test_bad_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(sizes))):
        FlowComposition(2, **sizes)
