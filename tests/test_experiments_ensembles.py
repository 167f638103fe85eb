"""Planar networks against dense oracles, and the vectorised ensemble against a loop over its runs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scripts import load
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.data import planar
from dynablocks.ensembles import ensemble_forward, stacked_parameters
from dynablocks.errors import InvalidArgument
from dynablocks.experiments.ensembles import EnsembleTraining, train_ensemble
from dynablocks.experiments.planar_networks import (
    FAMILIES,
    PlanarNetwork,
    StandardisedTraining,
    largest_rotation_step,
)
from dynablocks.fields import GradientField
from dynablocks.linear import Dense, frozen_weights
from dynablocks.properties import declare
from dynablocks.switching import FreeSignal, tight_contraction


def rotation(angle: float) -> Tensor:
    t = torch.tensor(angle, dtype=torch.float64)
    return torch.stack([torch.stack([t.cos(), -t.sin()]), torch.stack([t.sin(), t.cos()])])


def dense_constant(step: float, matrix: Tensor, slope: float) -> float:
    """The largest norm over the corners and many interior D, by SVD."""
    entries = torch.linspace(slope, 1, 6, dtype=torch.float64)
    scalings = torch.stack([torch.diag(torch.stack(pair)) for pair in itertools.product(entries, repeat=2)])
    steps = torch.eye(2, dtype=torch.float64) + step * scalings @ matrix
    return float(torch.linalg.matrix_norm(steps, ord=2).max())


@pytest.mark.parametrize(
    ("slope", "bound"),
    [(0.5, 1.0), (0.5, 1.0 + 1e-9), (0.5, 1.3), (0.5, 3.0), (0.1, 1.0), (0.1, 1.3), (1.0, 1.0), (1.0, 1.3)],
)
def test_largest_step_is_the_one_found_by_bisection(slope: float, bound: float) -> None:
    for angle, sign in itertools.product(torch.linspace(-3.2, 3.2, 8).tolist(), (-1.0, 1.0)):
        matrix = rotation(angle)
        one = torch.ones((), dtype=torch.float64)
        found = float(largest_rotation_step(sign * one, matrix.trace() / 2, slope, bound * one))
        low, high = 0.0, 9.0
        for _ in range(36):
            middle = (low + high) / 2
            low, high = (middle, high) if dense_constant(sign * middle, matrix, slope) <= bound else (low, middle)
        # At bound 1 the norm leaves 1 with slope 0 for some angles: bisection sees rounding of the norm, not the step.
        assert found == pytest.approx(low, abs=1e-6)
        assert dense_constant(sign * found, matrix, slope) <= bound + 1e-14
        assert dense_constant(sign * (found + 1e-5), matrix, slope) > bound


def test_contraction_constant_is_the_dense_one() -> None:
    for step in (0.0, 0.5, 4 / 3, 2.0, 2.5):
        slopes = torch.linspace(0.5, 1, 6, dtype=torch.float64)
        expected = float((1 - step * slopes).abs().max())
        assert float(tight_contraction(torch.tensor(step, dtype=torch.float64), 0.5)) == pytest.approx(expected)


def networks(family: str, count: int) -> list[StandardisedTraining]:
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(StandardisedTraining(family).double())
    return found


def test_a_single_field_begins_with_the_sign_with_which_it_contracts() -> None:
    """With a = 1/2 the longest non-expansive step is 3|cos θ| − 1, against cos θ; the fold 4/3 is as far as it goes."""
    found = networks("F", 10)
    steps = torch.cat([layer.signal.steps.detach() for network in found for layer in network.body])
    cosines = torch.stack([layer.fields[0].linear.weight.trace() / 2 for network in found for layer in network.body])
    expected = -cosines.sign() * (3 * cosines.abs() - 1).clamp(0, 4 / 3)
    # The steps are projected in float32.
    torch.testing.assert_close(steps, expected.detach(), rtol=0, atol=2e-6)
    assert bool((steps > 0).any())
    assert bool((steps < 0).any())


def pieces(network: PlanarNetwork) -> list[nn.Sequential]:
    """What the constraint holds for: every layer, or every pair, and the whole body."""
    size = 2 if network.family == "F+Fc" else 1
    return [network.body[k : k + size] for k in range(0, len(network.body), size)] + [network.body]


def measured_slope(piece: nn.Module) -> float:
    """The largest slope: dense Jacobians at random points, and differences between pairs of points."""
    generator = torch.Generator().manual_seed(1)
    points = 3 * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    moved = points.clone().requires_grad_()
    image = piece(moved)
    rows = [torch.autograd.grad(image[:, k].sum(), moved, retain_graph=True)[0] for k in (0, 1)]
    slopes = [torch.linalg.matrix_norm(torch.stack(rows, dim=1), ord=2)]
    near = points + 1e-4 * torch.randn(points.shape, generator=generator, dtype=torch.float64)
    for first, second in ((points, near), (points, points.flip(0) + 0.1)):
        slopes.append((piece(first) - piece(second)).norm(dim=1) / (first - second).norm(dim=1))
    return float(torch.cat(slopes).detach().max())


class Stretched(StandardisedTraining):
    """Trained to stretch: the logits are those of the raw body, so margins reward expansion."""

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features - features.flip(-1)


class Unprojected(Stretched):
    """The broken twin: its steps stay where the optimiser puts them."""

    def project_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        pass


def trained(kind: type[PlanarNetwork], family: str, runs: int = 2) -> list[PlanarNetwork]:
    """Networks after a training that rewards expansion."""
    points = 0.2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = (points[:, 0] < points[:, 1]).long()
    starts = []
    for seed in range(runs):
        torch.manual_seed(seed)
        starts.append(kind(family).double())
    training = EnsembleTraining(steps=30, batch_size=32, learning_rate=0.1)
    parameters = train_ensemble(starts, points, labels, training, range(runs))
    for run, network in enumerate(starts):
        network.load_state_dict({name: stack[run] for name, stack in parameters.items()})
    return list(starts)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_networks_are_one_lipschitz(family: str) -> None:
    for network in trained(Stretched, family):
        assert network.body_lipschitz() <= 1 + 1e-11
        for piece in pieces(network):
            assert measured_slope(piece) <= declare(piece).properties.lipschitz + 1e-9 <= 1 + 2e-9


@pytest.mark.parametrize("family", ["F+Fc", "F"])
def test_without_the_projection_they_are_not(family: str) -> None:
    parts = [piece for network in trained(Unprojected, family) for piece in pieces(network)]
    assert max(declare(piece).properties.lipschitz for piece in parts) > 1.01
    assert max(measured_slope(piece) for piece in parts) > 1.01


def test_without_the_projection_contractive_steps_leave_their_range() -> None:
    network = networks("Fc", 1)[0]
    with torch.no_grad():
        for k in range(10):
            network.get_parameter(f"body.{k}.signal.steps").fill_(2.7)
    assert network.body_lipschitz() > 1.7**10 - 1e-9
    network.project_()
    assert network.body_lipschitz() <= 1 + 1e-11


# Ten contractions by 1/3 leave a cloud of size 1e-5, on which later steps amplify the rounding of the first one.
@pytest.mark.parametrize(("family", "steps"), [("F+Fc", 10), ("F", 3), ("Fc", 1)])
def test_the_ensemble_is_the_loop(family: str, steps: int) -> None:
    points, labels = planar("moons", 100, 0.1, seed=0)
    starts = networks(family, 3)
    training = EnsembleTraining(steps=steps, batch_size=16)
    before, train_alone = copy.deepcopy(starts), load("benchmarks/planar_ensemble.py").train_alone
    together = train_ensemble(starts, points, labels, training, [4, 5, 6])
    other = train_ensemble(starts, points, labels, training, [7, 8, 9])
    for run, (network, start) in enumerate(zip(starts, before, strict=True)):
        assert all(torch.equal(p, q) for p, q in zip(network.parameters(), start.parameters(), strict=True))
        alone = train_alone(network, points, labels, training, 4 + run)
        for name, stack in together.items():
            torch.testing.assert_close(stack[run], alone[name], rtol=0, atol=1e-6)
        assert max(float((stack[run] - alone[name]).abs().max()) for name, stack in other.items()) > 1e-3


def test_runs_do_not_see_each_other() -> None:
    points, labels = planar("moons", 100, 0.1, seed=0)
    training = EnsembleTraining(steps=3, batch_size=16)
    two = train_ensemble(networks("F", 2), points, labels, training, [4, 5])
    three = train_ensemble(networks("F", 3), points, labels, training, [4, 5, 6])
    for name, stack in two.items():
        torch.testing.assert_close(stack, three[name][:2], rtol=0, atol=1e-6)


def test_outputs_of_an_ensemble_are_those_of_its_networks() -> None:
    starts = networks("F+Fc", 3)
    points = torch.randn(7, 2, dtype=torch.float64)
    outputs = ensemble_forward(starts[0], stacked_parameters(starts), points)
    for run, network in enumerate(starts):
        torch.testing.assert_close(outputs[run], network(points), rtol=1e-9, atol=1e-9)


def test_a_batch_of_shaped_states_is_shared_unless_each_run_is_given_its_own() -> None:
    """As many states as runs, so that neither can be told from the shapes."""
    layers = [nn.Linear(3, 4).double() for _ in range(2)]
    stacked, x = stacked_parameters(layers), torch.randn(2, 5, 3, dtype=torch.float64)
    shared = ensemble_forward(layers[0], stacked, x)
    apart = ensemble_forward(layers[0], stacked, x, shared=False)
    for run, layer in enumerate(layers):
        torch.testing.assert_close(shared[run], layer(x), rtol=0, atol=1e-14)
        torch.testing.assert_close(apart[run], layer(x[run]), rtol=0, atol=1e-14)
    with pytest.raises(InvalidArgument, match="x holds 3 batches for 2 runs"):
        ensemble_forward(layers[0], stacked, torch.randn(3, 5, 3, dtype=torch.float64), shared=False)


def blocks_of_other_steps(count: int) -> list[DynamicalBlock]:
    steps = [FreeSignal(0.25 * (run + 1)) for run in range(count)]
    return [DynamicalBlock(GradientField(Dense(3, 3), "tanh"), "euler", step).double() for step in steps]


def test_buffers_are_those_of_the_template_unless_they_are_stacked_too() -> None:
    blocks, x = blocks_of_other_steps(3), torch.randn(5, 3, dtype=torch.float64)
    stacked = stacked_parameters(blocks)
    steps = torch.stack([block.signal.steps for block in blocks])
    outputs = ensemble_forward(blocks[0], stacked | {"signal.steps": steps}, x)
    for run, block in enumerate(blocks):
        torch.testing.assert_close(outputs[run], block(x), rtol=0, atol=1e-13)
    first = ensemble_forward(blocks[0], stacked, x)
    assert not torch.allclose(first[2], blocks[2](x))
    torch.testing.assert_close(x + (outputs - x) * steps[0] / steps[:, None], first, rtol=0, atol=1e-12)


def test_weights_that_a_template_holds_stand_for_those_of_all_runs() -> None:
    blocks, x = blocks_of_other_steps(2), torch.randn(5, 3, dtype=torch.float64)
    with frozen_weights(blocks[0]), torch.no_grad():
        outputs = ensemble_forward(blocks[0], stacked_parameters(blocks), x)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_keeps_the_logits(family: str) -> None:
    starts = networks(family, 2)
    points = torch.randn(50, 2, dtype=torch.float64)
    stacked = stacked_parameters(starts)
    features = torch.stack([network.body(points) for network in starts])
    folded = starts[0].fold(stacked, features)
    plain = PlanarNetwork(family).double()
    for run, network in enumerate(starts):
        plain.load_state_dict({name: stack[run] for name, stack in folded.items()})
        torch.testing.assert_close(plain(points), network(points), rtol=1e-8, atol=1e-8)


def test_bad_arguments_are_named() -> None:
    points, labels = planar("moons", 10, 0.1)
    with pytest.raises(InvalidArgument, match="seeds"):
        train_ensemble(networks("F", 2), points, labels, EnsembleTraining(1), [0])
    with pytest.raises(InvalidArgument, match="equal parameters"):
        stacked_parameters([nn.Linear(2, 2), nn.Linear(2, 3)])
    with pytest.raises(InvalidArgument, match="unknown family 'G'"):
        PlanarNetwork("G")
    with pytest.raises(InvalidArgument, match="even number"):
        PlanarNetwork("F", layers=3)


@pytest.mark.parametrize("count", [2.5, True, 0, "3"])
@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_counts_of_a_training_are_whole_numbers(name: str, count: object) -> None:
    with pytest.raises(InvalidArgument, match=rf"^{name} is .*; a whole number from 1 is needed"):
        EnsembleTraining(**{name: count})


def test_numpy_counts_make_the_same_training() -> None:
    training = EnsembleTraining(steps=np.int64(3), batch_size=np.int32(16))
    assert training == EnsembleTraining(steps=3, batch_size=16)
    assert type(training.steps) is type(training.batch_size) is int
