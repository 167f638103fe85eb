"""Normalising flows: log-determinants, inverses and densities against dense Jacobians and integrals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.data.planar import planar
from dynablocks.errors import InvalidArgument
from dynablocks.fields import GradientField, PartitionedField, RidgeField, ShearField, leaky_relu
from dynablocks.linear import OrthogonalDense
from dynablocks.models.chain import Chain
from dynablocks.models.flow import FLOW_BLOCKS, AffineCoupling, AffineMap, DensityFlow, LearnedTimes, density_flow
from dynablocks.models.sympnet import sympnet
from dynablocks.models.universal import FlowComposition
from dynablocks.properties import Invertible
from dynablocks.properties.jacobians import jacobians
from dynablocks.switching import FreeSignal, keep_constraints
from dynablocks.testing import HealthyBlock, check_block

DOUBLE = torch.float64
EVERY = ("exact", "affine", "partitioned")


def stirred(flow: DensityFlow, size: float = 0.3) -> DensityFlow:
    """In float64, away from the start."""
    with torch.no_grad():
        for parameter in flow.double().parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return flow


def integral(flow: DensityFlow, reach: float = 6.0, points: int = 300) -> float:
    """∫p over [−reach, reach]² by the trapezoidal rule."""
    axis = torch.linspace(-reach, reach, points, dtype=DOUBLE)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().reshape(points, points)
    return float(torch.trapezoid(torch.trapezoid(density, axis), axis))


@pytest.mark.parametrize("kinds", [(kind,) for kind in FLOW_BLOCKS] + [EVERY], ids=str)
@pytest.mark.parametrize("dimension", [2, 4])
def test_log_determinants_and_inverses_against_dense_jacobians(kinds: tuple[str, ...], dimension: int) -> None:
    flow, x = stirred(density_flow(dimension, 4, kinds=kinds, width=5)), torch.randn(6, dimension, dtype=DOUBLE)
    _, expected = torch.linalg.slogdet(jacobians(flow, x))
    with torch.no_grad():
        torch.testing.assert_close(flow.log_determinant(x), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(flow.inverse(flow(x)), x, rtol=0, atol=1e-11)
        base = torch.distributions.Normal(0.0, 1.0).log_prob(flow(x)).sum(1)
        torch.testing.assert_close(flow.log_prob(x), base + expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", FLOW_BLOCKS)
def test_conformance(kind: str) -> None:
    check_block(density_flow(2, 1, kinds=(kind,), width=4)).require()


def test_odd_dimensions_and_one() -> None:
    for dimension, kind in ((3, "affine"), (3, "exact"), (1, "exact")):
        flow = stirred(density_flow(dimension, 2, kinds=(kind,), width=4))
        x = torch.randn(5, dimension, dtype=DOUBLE)
        torch.testing.assert_close(
            flow.log_determinant(x), torch.linalg.slogdet(jacobians(flow, x))[1], rtol=0, atol=1e-12
        )


def test_an_affine_map_gives_the_normal_density() -> None:
    mean, std = (1.0, -2.0), (0.5, 3.0)
    flow, x = density_flow(2, 0, mean=mean, std=std).double(), torch.randn(7, 2, dtype=DOUBLE)
    expected = torch.distributions.Normal(torch.tensor(mean), torch.tensor(std)).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-6, atol=1e-6)
    points = flow.sample(20000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        points.mean(0), torch.tensor(mean, dtype=DOUBLE), rtol=0, atol=5 * 3.0 / math.sqrt(20000)
    )
    torch.testing.assert_close(points.std(0), torch.tensor(std, dtype=DOUBLE), rtol=0.03, atol=0)


def test_samples_follow_the_generator() -> None:
    flow = density_flow(2, 2)
    first, again = (flow.sample(4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert flow.sample(0).shape == (0, 2)


def test_two_moons() -> None:
    """The loss falls, and what was learned is a density that its samples follow."""
    torch.manual_seed(1)
    points = planar("moons", 128, noise=0.1, seed=0)[0].float()
    flow = density_flow(2, 4, width=24, mean=tuple(points.mean(0).tolist()), std=tuple(points.std(0).tolist()))
    optimiser = torch.optim.Adam(flow.parameters(), lr=1e-2)
    keep_constraints(flow, optimiser)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = -flow.log_prob(points).mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    normal = float(-torch.distributions.Normal(points.mean(0), points.std(0)).log_prob(points).sum(1).mean())
    assert losses[0] == pytest.approx(normal, abs=0.2)
    assert losses[-1] < normal - 0.3
    flow.double()
    assert integral(flow) == pytest.approx(1.0, abs=1e-3)
    samples = flow.sample(1000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        held_out = float(-flow.log_prob(planar("moons", 2000, noise=0.1, seed=5)[0]).mean())
        entropy = float(-flow.log_prob(samples).mean())
    assert held_out == pytest.approx(losses[-1], abs=0.2)
    assert entropy < normal


def test_the_integral_sees_a_wrong_log_determinant() -> None:
    class Wrong(HealthyBlock):
        def log_determinant(self, x: Tensor) -> Tensor:
            return super().log_determinant(x) + 0.01

    block = Wrong()
    block.scale, block.shift = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(2))
    assert abs(integral(DensityFlow([block], 2).double(), points=200) - 1) > 5e-3
    assert abs(integral(DensityFlow([AffineMap(2)], 2).double(), points=200) - 1) < 1e-6


def test_learned_times_stay_in_their_range() -> None:
    signal = LearnedTimes((5.0, -5.0), limit=1.5)
    assert signal.steps.tolist() == [1.5, -1.5]
    assert signal.fields_needed == 2
    assert LearnedTimes(torch.tensor([0.5, 0.25])).steps.tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: density_flow(3, 1, kinds=("partitioned",)), "dimension is 3; partitioned blocks need an even one"),
        (lambda: density_flow(1, 1, kinds=("affine",)), "dimension is 1; a whole number from 2 is needed"),
        (lambda: density_flow(2, 1, kinds=("exakt",)), "unknown flow block 'exakt'; did you mean 'exact'"),
        (lambda: density_flow(2, 1, kinds=()), "kinds is empty"),
        (lambda: density_flow(0, 1), "dimension is 0"),
        (lambda: density_flow(2.0, 1), r"dimension is 2\.0; a whole number from 1 is needed"),
        (lambda: density_flow(2, 1.5), r"layers is 1\.5; a whole number from 0 is needed"),
        (lambda: density_flow(2, 1, width=8.0), r"width is 8\.0; a whole number from 1 is needed"),
        (lambda: DensityFlow([], 2.5), r"dimension is 2\.5; a whole number"),
        (lambda: AffineMap(2.5), r"dimension is 2\.5; a whole number"),
        (lambda: AffineCoupling(2.5, 4), r"dimension is 2\.5; a whole number"),
        (lambda: AffineCoupling(2, 4.0), r"width is 4\.0; a whole number"),
        (lambda: FlowComposition(2.5), r"inputs is 2\.5; a whole number from 1 is needed"),
        (lambda: FlowComposition(2, layers=1.5), r"layers is 1\.5; a whole number from 1 is needed"),
        (lambda: density_flow(2, 1).sample(2.5), r"count is 2\.5; a whole number from 0 is needed"),
        (lambda: density_flow(2, 1, mean=(1.0,)), "mean has 1 entries; the dimension is 2"),
        (lambda: density_flow(2, 1, mean=(0.0, math.nan)), "mean is nan; a finite number is needed"),
        (lambda: density_flow(2, 1, mean=(-math.inf, 0.0)), "mean is -inf; a finite number is needed"),
        (lambda: density_flow(2, 1, std=(1.0, 0.0)), "std is 0.0"),
        (lambda: AffineCoupling(2, 4, limit=-1.0), "limit is -1.0"),
        (lambda: sympnet("G", 4, 1.5), r"layers is 1\.5; a whole number from 1 is needed"),
        (lambda: sympnet("G", 4, 2, 0), "width is 0; a whole number from 1 is needed"),
        (lambda: sympnet("LA", 4, 2, sublayers=True), "sublayers is True; a whole number from 1 is needed"),
        (lambda: LearnedTimes(0.5), r"start is 0\.5; a time for each field is needed, such as \(0\.5,\)"),
        (lambda: LearnedTimes(()), r"start is \(\); a time for each field is needed"),
        (lambda: LearnedTimes((0.5, None)), r"start is \(0\.5, None\); a time for each field is needed"),
        (lambda: DensityFlow([density_flow(2, 1).log_prob], 2), "is not a Module subclass"),
        (lambda: density_flow(2, 1).log_prob(torch.zeros(4, 3)), r"x has the shape \(4, 3\)"),
        (lambda: density_flow(2, 1).sample(-1), "count is -1"),
    ],
)
def test_bad_arguments(make: object, sentence: str) -> None:
    with pytest.raises((InvalidArgument, TypeError), match=sentence):
        make()  # type: ignore[operator]


def test_a_coupling_moves_q_or_p() -> None:
    with pytest.raises(InvalidArgument, match="moves"):
        AffineCoupling(3, 8, moves="P")


@pytest.mark.parametrize("part", [AffineMap(2), AffineCoupling(3, 8)])
@pytest.mark.parametrize("method", ["forward", "inverse", "log_determinant"])
def test_an_affine_part_refuses_states_of_another_size(part: nn.Module, method: str) -> None:
    (size,) = part.in_shape
    for shape in ((3, 1), (5, 3, size), (size,), ()):
        with pytest.raises(InvalidArgument, match=rf"was built for \(batch, {size}\)"):
            getattr(part, method)(torch.rand(shape))


class Force(nn.Module):
    """Any map of a half."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, q: Tensor) -> Tensor:
        return torch.tanh(self.linear(q))


def shear() -> DynamicalBlock:
    return DynamicalBlock(ShearField(Force(), (4,)), "exact", FreeSignal(0.5)).double()


def verlet() -> DynamicalBlock:
    return DynamicalBlock(PartitionedField(Force(), Force(), (4,)), "verlet", FreeSignal(0.5)).double()


def ridge() -> DynamicalBlock:
    field = GradientField(OrthogonalDense(4, 4), leaky_relu(0.25), alpha=0.8)
    nn.init.normal_(field.bias)
    return DynamicalBlock(field, "exact", FreeSignal(0.5)).double()


def telling(kind: type[nn.Module], method: str, calls: list[type[nn.Module]]) -> Callable[[nn.Module, Tensor], object]:
    """The method of a class, which adds the class to ``calls`` at each call."""
    of_class = getattr(kind, method)

    def told(self: nn.Module, x: Tensor) -> object:
        calls.append(kind)
        return of_class(self, x)

    return told


@pytest.mark.parametrize(("make", "step"), [(shear, [Force]), (verlet, [Force] * 3), (ridge, [RidgeField])])
def test_the_density_at_a_point_takes_each_step_once(
    make: Callable[[], DynamicalBlock], step: list[type[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many forces are evaluated, and Ax + b made, as for the image of the point."""
    flow = DensityFlow([make(), AffineCoupling(4, 5).double()], 4)
    x, calls = torch.randn(6, 4, dtype=DOUBLE), []
    _, expected = torch.linalg.slogdet(jacobians(flow, x))
    for kind, method in ((Force, "forward"), (RidgeField, "preactivation"), (AffineCoupling, "_coefficients")):
        monkeypatch.setattr(kind, method, telling(kind, method, calls))
    with torch.no_grad():
        base = torch.distributions.Normal(0.0, 1.0).log_prob(flow(x)).sum(1)
        assert bool(expected.any())
        assert calls == [*step, AffineCoupling]
        calls.clear()
        torch.testing.assert_close(flow.log_prob(x), base + expected, rtol=0, atol=1e-12)
    assert calls == [*step, AffineCoupling]


class Shifted(AffineCoupling):
    def log_determinant(self, x: Tensor) -> Tensor:
        return super().log_determinant(x) + 1


class Doubled(DynamicalBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)

    def log_determinant(self, x: Tensor) -> Tensor:
        return super().log_determinant(x) + 4 * math.log(2)


class Stretched(DynamicalBlock):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    block = shear()
    block.register_forward_hook(lambda module, given, output: 3 * output)
    return block


def hooked_before() -> nn.Module:
    block = shear()
    block.register_forward_pre_hook(lambda module, given: (3 * given[0],))
    return block


def replaced() -> nn.Module:
    coupling = AffineCoupling(4, 5).double()
    coupling.log_determinant = lambda x: x.new_ones(len(x))
    return coupling


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shifted(4, 5).double(),
        lambda: Stretched(ShearField(Force(), (4,)), "exact", FreeSignal(0.5)).double(),
        lambda: Doubled(ShearField(Force(), (4,)), "exact", FreeSignal(0.5)).double(),
        hooked,
        hooked_before,
        replaced,
        lambda: Chain(shear(), Shifted(4, 5).double()),
        lambda: DensityFlow([shear(), AffineCoupling(4, 5).double()], 4),
    ],
    ids=["log-determinant", "forward", "both", "hook", "hook before", "instance", "part of a part", "flow"],
)
def test_a_part_with_code_of_its_own_is_asked_for_both_apart(make: Callable[[], nn.Module]) -> None:
    part, x = make(), torch.randn(6, 4, dtype=DOUBLE)
    with torch.no_grad():
        image, total = Chain(part).with_log_determinant(x)
        torch.testing.assert_close(image, part(x), rtol=0, atol=1e-14)
        torch.testing.assert_close(total, part.log_determinant(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
@pytest.mark.parametrize("limit", [5.0, 80.0])
def test_an_affine_map_declares_the_factor_that_its_number_format_makes(limit: float, dtype: torch.dtype) -> None:
    """e^0.3 = 1.35 is rounded up to 1.3515625 in bfloat16; e^s itself is no larger than what is declared, either."""
    for scale in (-0.7, 0.3, *torch.linspace(0.5, limit, 20).tolist()):
        part = AffineMap(2, limit).to(dtype)
        with torch.no_grad():
            part.log_scale.copy_(torch.tensor([scale, -3.0]))
            factor = float(part(torch.ones(1, 2, dtype=dtype))[0, 0])
        exact = math.exp(limit * math.tanh(float(part.log_scale.detach()[0]) / limit))
        stated = part.properties.lipschitz
        assert max(factor, exact) <= stated
        assert stated <= max(factor, exact) * (1 + 1e-12)


def test_an_affine_map_of_a_scale_that_is_no_number_has_no_constant() -> None:
    part = AffineMap(2)
    with torch.no_grad():
        part.log_scale[0] = math.nan
    assert part.properties.lipschitz == math.inf


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 35.0), (DOUBLE, 280.0)])
def test_factors_that_their_number_format_does_not_hold_have_no_inverse(dtype: torch.dtype, limit: float) -> None:
    for size, kept in ((limit, True), (1.05 * limit, False)):
        part, coupling = AffineMap(2, 300.0), AffineCoupling(2, 3, limit=size)
        with torch.no_grad():
            part.log_scale.copy_(300.0 * torch.atanh(torch.tensor([0.0, -size / 300.0])))
        for each in (part.to(dtype), coupling.to(dtype)):
            declared = each.declare()
            assert (declared.properties.of(Invertible) is not None) == kept
            assert [loss.startswith("Invertible is lost: |s|") for loss in declared.losses] == [True] * (not kept)


def test_a_factor_that_overflows_loses_the_point() -> None:
    part, x = AffineMap(2, 300.0), torch.ones(1, 2)
    with torch.no_grad():
        part.log_scale.fill_(200.0)
        assert not torch.isfinite(part.inverse(part(x))).all()
    assert part.properties.of(Invertible) is None


def test_the_image_of_a_coupling_rests_on_no_method_that_a_subclass_replaces() -> None:
    class Louder(AffineCoupling):
        def with_log_determinant(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(x), x.new_zeros(len(x))

    coupling, x = Louder(4, 5).double(), torch.randn(6, 4, dtype=DOUBLE)
    assert coupling.properties.of(Invertible) is not None
    with torch.no_grad():
        torch.testing.assert_close(coupling.inverse(coupling(x)), x, rtol=0, atol=1e-13)
