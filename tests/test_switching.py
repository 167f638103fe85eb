"""Regions, signals, budgets and the hook, against dense Jacobians of compositions."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import FieldFacts, GradientField, MetricField, VectorField, leaky_relu
from dynablocks.integrators import ExactFlow, ExplicitEuler
from dynablocks.linear import Conv, Dense, LinearMap, NormalisedConv, OrthogonalDense
from dynablocks.models import ModelConfig, Network, build
from dynablocks.norms import DenseMetric
from dynablocks.properties import Lipschitz, declare, verify
from dynablocks.properties.jacobians import jacobians
from dynablocks.switching import (
    REGIONS,
    EvenSteps,
    ExactFlowRegion,
    FlexibleSignal,
    FreeSignal,
    LearnedStep,
    LearnedTimes,
    NetworkBudget,
    NonExpansivePair,
    NonExpansiveStep,
    PairSignal,
    PaperFlexibleRegion,
    PaperPrescribedRegion,
    PrescribedSignal,
    Region,
    ScheduledSignal,
    SwitchingSignal,
    TightRegion,
    keep_constraints,
    project,
    regularisation,
    set_progress,
    tight_contraction,
)
from dynablocks.testing import check_block
from dynablocks.testing.suite import HOSTILE

SLOPES = (0.0, 0.1, 0.5, 0.9, 1.0)
FLOAT32 = torch.finfo(torch.float32).eps
EPS = torch.finfo(torch.float64).eps


def regions() -> list[Region]:
    made = []
    for name, slope, substeps in itertools.product(sorted(REGIONS), SLOPES, (1, 2, 3)):
        try:
            made.append(REGIONS[name](slope, substeps))
        except InvalidArgument:
            assert substeps > 1
    return made


EVERY_REGION = pytest.mark.parametrize(
    "region", regions(), ids=lambda r: f"{type(r).__name__}-a{r.slope}-S{r.substeps}"
)


def random_points(count: int = 200, size: float = 4.0) -> np.ndarray:
    return np.random.default_rng(0).uniform(-size, size, (count, 2))


@EVERY_REGION
def test_projection_lands_inside_and_fixes_exactly_the_region(region: Region) -> None:
    for first, second in random_points():
        landed = region.project(first, second)
        assert region.contains(*landed)
        assert region.project(*landed) == landed
        assert region.contains(first, second) == (landed == (first, second))


@EVERY_REGION
def test_the_boundary_rises_then_falls_and_its_pair_constant_is_at_most_one(region: Region) -> None:
    points = region.boundary(200)
    rises = np.sign(np.diff(points[:, 1]).round(12))
    rises = rises[rises != 0]
    assert (np.diff(rises) <= 0).all()
    for first, second in points:
        assert region.pair_constant(first, second) <= 1 + 1e-12


@pytest.mark.parametrize("name", sorted(REGIONS))
def test_a_larger_slope_never_shrinks_the_region(name: str) -> None:
    for small, large in itertools.pairwise(SLOPES):
        region, larger = REGIONS[name](small), REGIONS[name](large)
        assert all(larger.contains(h1, h2, slack=1e-9) or h1 < larger.first_range[0] for h1, h2 in region.boundary())


@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize("substeps", [1, 2, 3])
def test_the_paper_region_lies_inside_the_tight_one(slope: float, substeps: int) -> None:
    paper, tight = PaperPrescribedRegion(slope, substeps), TightRegion(slope, substeps)
    assert all(tight.contains(h1, h2, slack=1e-12) for h1, h2 in paper.boundary())


def test_known_points_of_the_boundaries() -> None:
    assert TightRegion(0.5).limit(4 / 3) == pytest.approx(2.0)
    assert PaperPrescribedRegion(0.5).limit(0.5) == pytest.approx(2 / math.sqrt(3) - 1)
    assert PaperPrescribedRegion(0.5).limit(0.5) == pytest.approx(0.1547, abs=1e-4)
    assert REGIONS["exact"](0.5).limit(3.0) == 1.5
    assert PaperFlexibleRegion(0.5).limit(1.0) == pytest.approx(1 / 0.75 - 1)
    assert PaperFlexibleRegion(0.5).first_range == (0.11, 1.9)
    assert PaperPrescribedRegion(1.0, 2).limit(2.0) == 2.0


def test_invalid_regions_are_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidArgument, match="it must be 1"):
        PaperFlexibleRegion(0.5, 2)
    with pytest.raises(InvalidArgument, match=r"slope is 1\.5"):
        TightRegion(1.5)


def block_of(signal: PairSignal, slope: float, expansive_slope: float) -> DynamicalBlock:
    fields = [
        GradientField(OrthogonalDense(3, 3), leaky_relu(slope)),
        GradientField(OrthogonalDense(3, 3), leaky_relu(expansive_slope), expansive=True),
    ]
    method = ExactFlow() if type(signal.region) is REGIONS["exact"] else ExplicitEuler()
    block = DynamicalBlock(fields, method, signal).double()
    for field in fields:
        nn.init.normal_(field.bias)
    return block


def measured(block: DynamicalBlock, points: int = 64) -> float:
    x = 2 * torch.randn(points, *block.in_shape, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda v: block(v[None])[0]))(x)
    return float(torch.linalg.matrix_norm(jacobians, ord=2).max().detach())


@pytest.mark.parametrize("signal", [PrescribedSignal, FlexibleSignal])
@EVERY_REGION
def test_compositions_inside_a_region_are_non_expansive(region: Region, signal: type[PairSignal]) -> None:
    random = np.random.default_rng(1)
    for expansive_slope in (region.slope, 0.0):
        first = random.uniform(*region.first_range)
        for second in (region.limit(first), random.uniform(region.second_low, 0.0)):
            chosen = signal(region).double()
            with torch.no_grad():
                chosen.steps.copy_(torch.tensor([first, second], dtype=torch.float64))
            block = block_of(chosen, region.slope, expansive_slope)
            bound = region.pair_constant(first, second) ** region.substeps
            assert bound <= 1 + 1e-12
            assert measured(block) <= block.properties.lipschitz * (1 + 1e-12)
            assert block.properties.lipschitz <= bound * (1 + 1e-9)
            assert math.exp(region.log_constant(first, second)) == pytest.approx(bound)


def test_a_point_outside_the_tight_region_can_expand() -> None:
    region = TightRegion(0.5)
    signal = PrescribedSignal(region).double()
    with torch.no_grad():
        signal.steps.copy_(torch.tensor([4 / 3, 1.01 * region.limit(4 / 3)], dtype=torch.float64))
    block = block_of(signal, 0.5, 0.5)
    block.fields[1].linear = block.fields[0].linear
    assert measured(block, 2000) > 1.005


def test_a_pair_expands_where_the_contractive_map_has_a_kernel() -> None:
    """Regions ask for AᵀA = I: what a wide A maps to 0 is stretched by 1 + h₂, and the block declares it."""
    region, first = TightRegion(0.5), 4 / 3
    second = region.limit(first)
    assert region.pair_constant(first, second) <= 1 + 1e-12
    fields = [GradientField(Dense(4, 2), leaky_relu(0.5), expansive=expansive) for expansive in (False, True)]
    block = DynamicalBlock(fields, "euler", PrescribedSignal(region)).double()
    with torch.no_grad():
        block.signal.steps.copy_(torch.tensor([first, second], dtype=torch.float64))
        for field, entries in zip(fields, torch.eye(4, dtype=torch.float64).split(2), strict=True):
            field.linear.matrix.copy_(entries)
    expands, declared = measured(block), block.properties.lipschitz
    assert expands == pytest.approx(1 + second, rel=1e-12)
    assert expands <= declared == pytest.approx(1 + second, rel=1e-9)
    # One and the same map leaves its kernel alone.
    fields[1].linear = fields[0].linear
    assert measured(block) == pytest.approx(1.0, rel=1e-12)


@EVERY_REGION
def test_steps_stored_in_float32_stay_inside_up_to_its_rounding(region: Region) -> None:
    for first, second in random_points(60):
        signal = PairSignal(region, (first, second))
        h1, h2 = (float(h) for h in signal.steps.detach().double())
        assert region.pair_constant(h1, h2) <= 1 + 8 * FLOAT32
        assert region.contains(h1, h2, slack=8 * FLOAT32 * max(1.0, abs(h2)) ** 2)


@EVERY_REGION
def test_a_network_budget_keeps_the_declared_composition_non_expansive(region: Region) -> None:
    random = np.random.default_rng(2)
    signals = []
    for _ in range(3):
        first = random.uniform(*region.first_range)
        signals.append(PrescribedSignal(region, (first, random.uniform(-2, 5)), "network"))
    budget = NetworkBudget(signals)
    budget.project_()
    assert budget.total() <= 0
    before = [s.steps.detach().clone() for s in signals]
    budget.project_()
    assert all(torch.equal(s.steps, b) for s, b in zip(signals, before, strict=True))
    blocks = [block_of(signal.double(), region.slope, 0.0) for signal in signals]
    assert math.prod(b.properties.lipschitz for b in blocks) <= 1 + 1e-5


def test_a_budget_uses_what_it_is_given() -> None:
    signals = [PrescribedSignal(REGIONS["exact"](0.5), start, "network") for start in ((2.0, 9.0), (2.0, 0.0))]
    budget = NetworkBudget(signals)
    budget.project_()
    assert -1e-5 < budget.total() <= 0
    assert signals[0].steps[1].item() == pytest.approx(2.0, abs=1e-4)


def test_a_budget_survives_a_deep_copy_with_its_signals() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.signals = nn.ModuleList([PrescribedSignal(TightRegion(0.5), (1.0, 9.0), "network")])
            self.budget = NetworkBudget(list(self.signals))

    copied = copy.deepcopy(Holder())
    project(copied)
    assert copied.budget.total() <= 0
    assert float(copied.signals[0].steps[1]) < 9


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam])
def test_the_hook_keeps_every_constraint_in_a_plain_loop(optimiser: type[torch.optim.Optimizer]) -> None:
    region = TightRegion(0.5)
    model = nn.ModuleList([LearnedStep(1.0), PrescribedSignal(region)])
    steps = optimiser(model.parameters(), lr=1.0)
    handle = keep_constraints(model, steps)
    for _ in range(5):
        steps.zero_grad()
        (-sum(p.sum() for p in model.parameters())).backward()
        steps.step()
        assert 0 <= float(model[0].steps) <= 2
        assert region.contains(*map(float, model[1].steps), slack=1e-6)
    handle.remove()
    (-model[0].steps.sum()).backward()
    steps.step()
    assert float(model[0].steps) > 2


def test_a_normalised_kernel_stays_normalised_up_to_its_power_iteration() -> None:
    conv = NormalisedConv((2, 4, 4), 2)
    steps = torch.optim.SGD(conv.parameters(), lr=0.02)
    keep_constraints(conv, steps)
    for _ in range(50):
        steps.zero_grad()
        (-conv(torch.ones(1, 2, 4, 4)).sum()).backward()
        steps.step()
    norm = float(torch.linalg.matrix_norm(conv.dense_matrix(), ord=2))
    assert 0.9 <= norm <= 1.02
    assert norm <= conv.properties.lipschitz <= norm * (1 + 1e-9)


def test_a_normalised_kernel_recovers_from_zero() -> None:
    conv = NormalisedConv((2, 4, 4), 2)
    with torch.no_grad():
        conv.kernel.zero_()
        conv.project_()
        conv.kernel.normal_().mul_(10)
    conv.project_(iterations=50)
    assert torch.linalg.matrix_norm(conv.dense_matrix(), ord=2) <= 1.01


@pytest.mark.parametrize(
    ("low", "high", "kept"), [(0.0, 2.0, 2.0), (0.5, 0.75, 0.75), (6.0, math.inf, 6.0), (-math.inf, math.inf, 5.0)]
)
def test_a_learned_step_is_put_back_into_its_range(low: float, high: float, kept: float) -> None:
    signal = LearnedStep(1.0, low, high)
    assert float(signal.steps) == min(max(1.0, low), high)
    with torch.no_grad():
        signal.steps.fill_(5.0)
    project(signal)
    assert float(signal.steps) == kept
    assert list(signal.state_dict()) == ["steps"]


def test_a_scheduled_step_is_a_function_of_the_progress_alone() -> None:
    model = nn.Sequential(ScheduledSignal(1.0, 2.0, 0.5), ScheduledSignal(2.0, 1.0, 1.0))
    for progress, first, second in ((1.0, 2.0, 1.0), (0.25, 1.5, 1.75), (0.0, 1.0, 2.0), (0.9, 2.0, 1.1)):
        set_progress(model, progress)
        assert float(model[0].steps) == pytest.approx(first)
        assert float(model[1].steps) == pytest.approx(second)
    with pytest.raises(InvalidArgument, match=r"progress is 1.5"):
        set_progress(model, 1.5)


def test_regularisation_sums_what_there_is() -> None:
    assert regularisation(nn.Sequential(nn.Flatten(), NormalisedConv((1, 3, 3), 1))) is None
    convs = [NormalisedConv((2, 3, 3), 2, penalty=w) for w in (0.1, 0.2)]
    assert float(regularisation(nn.ModuleList(convs))) == pytest.approx(sum(float(c.regularisation()) for c in convs))


class Counting(nn.Module):
    """Counts its projections and its moves."""

    def __init__(self) -> None:
        super().__init__()
        self.projected, self.moved = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        return x

    def project_(self) -> None:
        self.projected += 1

    def set_progress(self, progress: float) -> None:
        self.moved += 1


def test_the_constraints_of_a_compiled_part_count_once() -> None:
    conv, part, pair = NormalisedConv((2, 3, 3), 2, penalty=0.1), Counting(), PrescribedSignal(TightRegion(0.5))
    model = nn.ModuleList([torch.compile(each, backend="eager") for each in (conv, part, pair)])
    assert float(regularisation(model)) == float(regularisation(conv)) > 0
    assert float(regularisation(model[0])) == float(regularisation(conv))
    with torch.no_grad():
        pair.steps.copy_(torch.tensor([1.0, 9.0]))
    project(model)
    set_progress(model, 0.5)
    assert (part.projected, part.moved) == (1, 1)
    assert pair.steps.tolist() == pytest.approx(TightRegion(0.5).project(1.0, 9.0))


def test_signals_on_the_meta_device_can_be_printed() -> None:
    for signal in (LearnedStep(0.5), FreeSignal(0.5), PrescribedSignal(TightRegion(0.5)), EvenSteps(1.0, 2)):
        assert repr(signal).startswith(f"{type(signal).__name__}(h1=")
        assert repr(signal.to("meta")) == f"{type(signal).__name__}()"


def test_tight_contraction_is_the_largest_eigenvalue() -> None:
    for h, a in itertools.product(np.linspace(0, 2, 21), SLOPES):
        slopes = np.linspace(a, 1, 101)
        assert tight_contraction(h, a) == pytest.approx(np.abs(1 - h * slopes).max())


def test_a_fixed_step_is_the_given_number_in_every_precision() -> None:
    signal = FreeSignal(0.1)
    assert float(signal.steps) == float(torch.tensor(0.1))
    assert float(signal.double().steps) == 0.1
    assert float(signal.float().double().steps) == 0.1
    signal.load_state_dict({"steps": torch.tensor([0.3])})
    assert float(signal.float().double().steps) == float(torch.tensor(0.3))


def test_equal_and_scheduled_steps_are_the_given_numbers_in_every_precision() -> None:
    assert EvenSteps(1.0, 10).float().double().steps.tolist() == [0.1] * 10
    signal = ScheduledSignal(0.1, 0.3, until=1.0)
    assert float(signal.double().steps) == 0.1
    signal.float().set_progress(0.5)
    assert float(signal.double().steps) == 0.1 + (0.3 - 0.1) * 0.5
    loaded = ScheduledSignal(0.1, 0.3)
    loaded.load_state_dict({"steps": torch.tensor([0.7])})
    assert float(loaded.double().steps) == float(torch.tensor(0.7))


def test_learned_steps_keep_the_value_that_they_have() -> None:
    """What is stored cannot tell a start from a trained value; made in float64, a start is exact."""
    assert LearnedStep(0.1).double().steps.item() == torch.tensor(0.1).item() != 0.1
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        block = DynamicalBlock(GradientField(Dense(3, 3)), "euler", LearnedStep(0.1))
        pair = PrescribedSignal(TightRegion(0.5), (1.2, 0.1))
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float64}
    assert block.signal.steps.item() == 0.1
    assert pair.steps.tolist() == [1.2, 0.1]


class Halves(SwitchingSignal):
    """Two half steps, as a user writes them: plain numbers."""

    def pieces(self) -> list[tuple[int, float]]:
        return [(0, 0.4), (0, 0.4)]


def test_plain_numbers_are_steps_like_any_other() -> None:
    field = GradientField(OrthogonalDense(3, 3), leaky_relu(0.5)).double()
    numbers, tensors = DynamicalBlock(field, "exact", Halves()), DynamicalBlock(field, "exact", EvenSteps(0.8, 2))
    assert repr(numbers.signal) == "Halves(h1=0.4, h2=0.4)"
    assert numbers.signal.summary() == {"h1": 0.4, "h2": 0.4}
    assert numbers.signal.sizes() == tensors.signal.sizes() == [(0, 0.4), (0, 0.4)]
    x = torch.randn(5, 3, dtype=torch.float64)
    whole = ExactFlow().step(field, x, 0.8)
    for block in (numbers, tensors):
        torch.testing.assert_close(block(x), whole, rtol=0, atol=1e-14)
        torch.testing.assert_close(block.inverse(whole), x, rtol=0, atol=1e-14)
        torch.testing.assert_close(
            block.log_determinant(x), ExactFlow().log_determinant(field, x, 0.8), rtol=0, atol=1e-14
        )
    assert numbers.properties == tensors.properties


def test_a_signal_is_summed_up_by_its_pieces_and_a_pair_by_its_two_steps() -> None:
    assert LearnedStep(0.5).summary() == {"h1": 0.5}
    assert EvenSteps(1.0, 3).summary() == {"h1": 1 / 3, "h2": 1 / 3, "h3": 1 / 3}
    pair = PrescribedSignal(TightRegion(0.5, 2), (1.0, 0.25))
    assert pair.summary() == {"h1": 1.0, "h2": 0.25}
    assert pair.sizes() == [(0, 0.5), (1, 0.125)] * 2


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: SwitchingSignal().pieces(), r"SwitchingSignal must implement pieces\(\): .* such as \[\(0, 0.5\)\]"),
        (lambda: PairSignal(TightRegion()).pieces(), r"PairSignal must implement pieces\(\)"),
        (lambda: Region().first_range, r"Region must have a property first_range: \(low, high\)"),
        (lambda: Region().limit(0.0), r"Region must implement limit\(first\)"),
        (lambda: Region().pair_constant(0.0, 0.0), r"Region must implement pair_constant\(first, second\)"),
    ],
)
def test_what_is_missing_is_named_with_its_form(ask: Callable[[], object], sentence: str) -> None:
    with pytest.raises(NotImplementedError, match=sentence):
        ask()


def test_a_budget_that_was_registered_first_is_projected_last() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            signals = [PrescribedSignal(ExactFlowRegion(0.5), (1.0, 0.1), "network")]
            self.budget = NetworkBudget(signals)
            self.signals = nn.ModuleList(signals)

    model = Early()
    with torch.no_grad():
        model.signals[0].steps.copy_(torch.tensor([5.0, 2.4]))
    project(model)
    assert model.budget.total() <= 1e-6


class TotalTime(nn.Module):
    """A budget of one's own: the steps of some signals add up to at most 1."""

    projected_last = True

    def __init__(self, signals: list[LearnedStep]) -> None:
        super().__init__()
        self.signals = tuple(signals)

    @torch.no_grad()
    def project_(self) -> None:
        total = sum(signal.steps.item() for signal in self.signals)
        for signal in self.signals:
            signal.steps.div_(max(1.0, total))


class UnmarkedTime(TotalTime):
    """The broken twin: projected where it stands."""

    projected_last = False


@pytest.mark.parametrize(("budget", "left"), [(TotalTime, [2 / 3, 1 / 3]), (UnmarkedTime, [10 / 11, 1 / 11])])
def test_a_budget_of_ones_own_is_projected_after_what_it_limits(budget: type[TotalTime], left: list[float]) -> None:
    signals = [LearnedStep(1.0).double(), LearnedStep(1.0).double()]
    model = nn.ModuleList([budget(signals), *signals])
    with torch.no_grad():
        signals[0].steps.fill_(10.0)
    project(model)
    assert [signal.steps.item() for signal in signals] == pytest.approx(left, rel=1e-14)


class Sets(nn.Module):
    """A part without the mark that sets the steps of a pair itself."""

    def __init__(self, signal: PairSignal, steps: tuple[float, float]) -> None:
        super().__init__()
        self.signal, self.given = signal, steps

    @torch.no_grad()
    def project_(self) -> None:
        self.signal.steps.copy_(torch.tensor(self.given, dtype=torch.float64))


@pytest.mark.parametrize(
    "around", [lambda part: part, lambda part: nn.ModuleList([part.signal, part])], ids=["root", "behind the pair"]
)
@pytest.mark.parametrize(("given", "left"), [((0.5, 0.1), (0.5, 0.1)), ((0.5, 9.0), (0.5, 1 / 0.75 - 1))])
def test_a_pair_is_projected_from_what_other_parts_set(
    around: Callable[[Sets], nn.Module], given: tuple[float, float], left: tuple[float, float]
) -> None:
    signal = PrescribedSignal(TightRegion(0.5), (1.0, 0.2)).double()
    project(around(Sets(signal, given)))
    assert signal.steps.tolist() == pytest.approx(left, rel=1e-14)


@pytest.mark.parametrize(
    ("signals", "sentence"),
    [
        (LearnedStep(), "signals is a LearnedStep; a list of pair signals is needed"),
        ([LearnedStep()], r"signals\[0\] is a LearnedStep; a budget takes pair signals"),
        (
            [PrescribedSignal(TightRegion(), balance="network"), FlexibleSignal(TightRegion())],
            r"signals\[1\] has balance='pair'; a budget takes pair signals with balance='network'",
        ),
        ([PrescribedSignal(TightRegion(), balance="penalty")], r"signals\[0\] has balance='penalty'"),
    ],
)
def test_a_budget_takes_pair_signals_that_leave_their_balance_to_it(signals: object, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        NetworkBudget(signals)


def grown(sigma: str, make: Callable[[VectorField], SwitchingSignal], dtype: torch.dtype) -> DynamicalBlock:
    """A block after a training that asks for a larger A and a longer step."""
    field = GradientField(Dense(4, 3), sigma)
    nn.init.normal_(field.linear.matrix)
    block = DynamicalBlock(field, "euler", make(field)).to(dtype)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    keep_constraints(block, optimiser)
    for _ in range(20):
        optimiser.zero_grad()
        (-field.linear.matrix.square().sum() - block.signal.steps.sum()).backward()
        optimiser.step()
    return block


def squared_norm(block: DynamicalBlock) -> float:
    return float(torch.linalg.matrix_norm(block.fields[0].linear.matrix.detach().double(), ord=2)) ** 2


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sigma", ["relu", "tanh"])
def test_a_non_expansive_step_follows_a_learned_norm(sigma: str, dtype: torch.dtype, slack: float) -> None:
    block = grown(sigma, NonExpansiveStep, dtype)
    assert squared_norm(block) > 100
    assert block.properties.lipschitz <= 1
    assert measured(copy.deepcopy(block).double()) <= 1 + 1e-12
    assert block.signal.steps.item() * squared_norm(block) == pytest.approx(2, rel=slack)
    assert list(block.signal.state_dict()) == ["steps"]
    # A fixed range does not follow.
    assert grown(sigma, lambda field: LearnedStep(1.0), dtype).properties.lipschitz > 100


def test_a_step_beyond_the_longest_non_expansive_one_expands() -> None:
    block = grown("relu", NonExpansiveStep, torch.float64)
    with torch.no_grad():
        # Every σ is on its slope of 1.
        block.fields[0].bias.fill_(1e6)
        block.signal.steps.mul_(1.02)
    assert measured(block) == pytest.approx(1.04, rel=1e-6)
    project(block)
    assert measured(block) == pytest.approx(1.0, rel=1e-6)


def stays_non_expansive_under(name: str, block: DynamicalBlock) -> None:
    """Under hostile parameters, once they are projected: as declared and as measured."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(HOSTILE[name](parameter))
    project(block)
    assert block.properties.lipschitz <= 1
    assert measured(block) <= 1 + 1e-12


@pytest.mark.parametrize("sigma", ["relu", "tanh", "leaky-relu"])
@pytest.mark.parametrize("name", sorted(HOSTILE))
@pytest.mark.parametrize("sizes", [(4, 3), (4, 5)])
def test_a_non_expansive_step_stays_one_under_hostile_parameters(sigma: str, name: str, sizes: tuple[int, int]) -> None:
    field = GradientField(Dense(*sizes), sigma)
    block = DynamicalBlock(field, "euler", NonExpansiveStep(field, 1.5)).double()
    stays_non_expansive_under(name, block)


def test_a_block_with_a_non_expansive_step_conforms() -> None:
    field = GradientField(Dense(4, 3), "tanh")
    check_block(DynamicalBlock(field, "euler", NonExpansiveStep(field))).require()


def test_an_expansive_field_contracts_backwards() -> None:
    field = GradientField(Dense(3, 3), "relu", expansive=True).double()
    block = DynamicalBlock(field, "euler", NonExpansiveStep(field, -5.0)).double()
    project(block)
    assert block.signal.steps.item() == pytest.approx(-2 / squared_norm(block), rel=1e-5)
    assert block.properties.lipschitz <= 1
    assert float(NonExpansiveStep(field, 5.0).steps.detach()) == 0


class Spiral(VectorField):
    """X(x) = (ωR − I)x for the quarter turn R: (I + hM)ᵀ(I + hM) = (1 − 2h + h²(1 + ω²))I, <= I for h <= 2/(1 + ω²)."""

    in_shape = (2,)

    def __init__(self, turning: float = 1.0) -> None:
        super().__init__()
        self.turning = turning

    def forward(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return torch.stack([self.turning * p - q, -self.turning * q - p], dim=1)

    def facts(self) -> FieldFacts:
        return FieldFacts(math.hypot(1.0, self.turning) * (1 + EPS), -1.0, reason="MᵀM = (1 + ω²)I, M + Mᵀ = −2I")


@pytest.mark.parametrize("turning", [0.1, 1.0, 10.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_without_symmetry_is_limited_by_the_one_sided_constant(turning: float, dtype: torch.dtype) -> None:
    field = Spiral(turning)
    block = DynamicalBlock(field, "euler", NonExpansiveStep(field, 0.5)).to(dtype)
    with torch.no_grad():
        block.signal.steps.fill_(3.0)
    assert block.properties.lipschitz > 2
    project(block)
    assert block.signal.steps.item() == pytest.approx(2 / (1 + turning**2), rel=64 * torch.finfo(dtype).eps)
    assert block.properties.lipschitz <= 1
    assert measured(block.double()) <= 1 + 1e-12


class Unknown(Spiral):
    def facts(self) -> FieldFacts:
        return FieldFacts(2.0)


def test_a_field_without_a_non_expansive_step_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no step of Unknown but 0 is known not to expand"):
        NonExpansiveStep(Unknown())
    with pytest.raises(InvalidArgument, match="field is a Linear; a VectorField is needed"):
        NonExpansiveStep(nn.Linear(2, 2))
    with pytest.raises(InvalidArgument, match="start is nan"):
        NonExpansiveStep(Spiral(), math.nan)


def test_a_non_expansive_step_is_projected_after_the_weights() -> None:
    class SignalFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            field = GradientField(NormalisedConv((2, 4, 4), 2))
            self.signal = NonExpansiveStep(field, 1.0)
            self.field = field

    model = SignalFirst()
    with torch.no_grad():
        model.field.linear.kernel.mul_(10.0)
    project(model)
    # Before the kernel is divided by its norm the longest step is far below 1.
    assert model.signal.steps.item() == 1.0 < model.signal.limits()[1]


def test_a_copied_non_expansive_step_follows_the_field_of_its_copy() -> None:
    field = GradientField(Dense(3, 3))
    block = DynamicalBlock(field, "euler", NonExpansiveStep(field, 1.0)).double()
    copied = copy.deepcopy(block)
    with torch.no_grad():
        copied.fields[0].linear.matrix.mul_(10.0)
    project(copied)
    assert copied.properties.lipschitz <= 1
    project(block)
    assert block.signal.steps.item() == 1.0


GENERAL: dict[str, Callable[[], LinearMap]] = {
    "dense": lambda: Dense(4, 5),
    "zero-padded convolution": lambda: Conv((2, 4, 4), 2),
}


def general_fields(make: Callable[[], LinearMap]) -> list[GradientField]:
    """A contractive and an expansive field of matrices near the identity, which are not orthogonal."""
    fields = [GradientField(make(), leaky_relu(0.5), expansive=expansive) for expansive in (False, True)]
    for field in fields:
        (weight,) = field.linear.parameters()
        (nn.init.dirac_ if weight.ndim == 4 else nn.init.eye_)(weight)
        with torch.no_grad():
            weight.add_(0.05 * torch.randn_like(weight))
        nn.init.normal_(field.bias)
    return fields


def pair_after_training(
    make: Callable[[], LinearMap], signal: type[NonExpansivePair], dtype: torch.dtype, substeps: int = 1
) -> tuple[DynamicalBlock, list[float]]:
    """A block after a training that moves all weights and asks for expansion, and what it declared after each step."""
    fields = general_fields(make)
    block = DynamicalBlock(fields, "euler", signal(*fields, (0.5, 0.5), substeps=substeps)).to(dtype)
    weights = [weight for field in fields for weight in field.parameters()]
    goals = [weight.detach() + 0.05 * torch.randn_like(weight) for weight in weights]
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    keep_constraints(block, optimiser)
    declared = []
    for _ in range(15):
        optimiser.zero_grad()
        gaps = torch.stack([(weight - goal).square().sum() for weight, goal in zip(weights, goals, strict=True)])
        (gaps.sum() - block.signal.steps[1]).backward()
        optimiser.step()
        declared.append(block.properties.lipschitz)
    return block, declared


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-9), (torch.float32, 3e-3)])
@pytest.mark.parametrize("substeps", [1, 3])
@pytest.mark.parametrize("name", sorted(GENERAL))
def test_a_pair_of_general_matrices_stays_non_expansive_and_alive(
    name: str, substeps: int, dtype: torch.dtype, slack: float
) -> None:
    block, declared = pair_after_training(GENERAL[name], NonExpansivePair, dtype, substeps)
    assert max(declared) <= 1
    assert list(block.signal.state_dict()) == ["steps"]
    assert [index for index, _ in block.signal.pieces()] == [0, 1] * substeps
    first, second = block.signal.steps.tolist()
    values, others = (torch.linalg.svdvals(field.linear.dense_matrix()) for field in block.fields)
    assert float((values - 1).abs().max()) > 0.02
    h, largest, smallest = first / substeps, float(values[0]) ** 2, float(values[-1]) ** 2
    contraction = max(abs(1 - h * largest), abs(1 - 0.5 * h * smallest))
    expected = substeps * (1 / contraction - 1) / float(others[0]) ** 2
    assert first == 0.5
    assert second == pytest.approx(expected, rel=slack)
    assert second > 0
    exact = copy.deepcopy(block).double()
    found = jacobians(exact, 2 * torch.randn(64, *block.in_shape, dtype=torch.float64))
    assert float(torch.linalg.matrix_norm(found, ord=2).max()) <= exact.properties.lipschitz * (1 + 1e-12)
    with torch.no_grad():
        block.signal.steps[1] *= 1.01
    assert block.properties.lipschitz > 1


class Unprojected(NonExpansivePair):
    """The broken twin: it leaves its steps where training has them."""

    def project_(self) -> None:
        pass


@pytest.mark.parametrize(("signal", "kept"), [(NonExpansivePair, True), (Unprojected, False)])
def test_a_pair_that_is_not_projected_is_refuted(signal: type[NonExpansivePair], kept: bool) -> None:
    block, declared = pair_after_training(GENERAL["dense"], signal, torch.float64)
    x = torch.randn(16, 4, dtype=torch.float64)
    assert verify(block, x, kinds=(), against=(Lipschitz(1.0),)).passed == kept
    assert verify(block, x).passed
    assert (max(declared) <= 1) == kept


@pytest.mark.parametrize("shared", [False, True])
def test_a_kernel_of_the_contractive_map_leaves_no_room_for_expansion(shared: bool) -> None:
    """The two pairs that a region lets expand, or would, were the maps not one and the same."""
    fields = [GradientField(Dense(4, 2), leaky_relu(0.5), expansive=expansive) for expansive in (False, True)]
    with torch.no_grad():
        for field, entries in zip(fields, torch.eye(4).split(2), strict=True):
            field.linear.matrix.copy_(entries)
    if shared:
        fields[1].linear = fields[0].linear
    block = DynamicalBlock(fields, "euler", NonExpansivePair(*fields)).double()
    for second, kept in ((2.0, 0.0), (-1.0, -1.0)):
        with torch.no_grad():
            block.signal.steps.copy_(torch.tensor([4 / 3, second], dtype=torch.float64))
        if second > 0:
            assert block.properties.lipschitz == pytest.approx(3.0, rel=1e-9)
            assert (measured(block) > 2.9) != shared
        project(block)
        assert block.signal.steps.tolist() == [4 / 3, kept]
        assert block.properties.lipschitz == 1.0
        assert measured(block) <= 1 + 1e-12


def test_more_expansion_than_a_pair_allows_expands() -> None:
    fields = [GradientField(Dense(2, 2), leaky_relu(0.5), expansive=expansive) for expansive in (False, True)]
    block = DynamicalBlock(fields, "euler", NonExpansivePair(*fields, (0.5, 1.0))).double()
    with torch.no_grad():
        # On the second axis A_c is smallest and σ on its slope 1/2, A_e largest and σ on its slope 1.
        fields[0].linear.matrix.copy_(torch.tensor([1.0, 0.5]).diag())
        fields[0].bias.fill_(-1e3)
        fields[1].linear.matrix.copy_(torch.tensor([0.25, 1.0]).diag())
        fields[1].bias.fill_(1e3)
    project(block)
    # L_c = 1 − 0.5 · 0.5 · 0.25, of which L_e is the inverse.
    assert block.signal.steps.tolist() == pytest.approx([0.5, 1 / 0.9375 - 1], rel=1e-9)
    assert measured(block) == pytest.approx(1.0, rel=1e-9)
    with torch.no_grad():
        block.signal.steps[1] *= 1.01
    assert measured(block) > 1.0005
    project(block)
    assert measured(block) <= 1 + 1e-12


@pytest.mark.parametrize("substeps", [1, 3])
@pytest.mark.parametrize(("bound", "kind"), [("tight", TightRegion), ("paper", PaperPrescribedRegion)])
def test_a_pair_of_orthogonal_matrices_is_kept_in_the_region_of_its_bound(
    bound: str, kind: type[Region], substeps: int
) -> None:
    region = kind(0.5, substeps)
    fields = [GradientField(OrthogonalDense(3, 3), leaky_relu(0.5), expansive=expansive) for expansive in (False, True)]
    signal = NonExpansivePair(*fields, substeps=substeps, bound=bound)
    block = DynamicalBlock(fields, "euler", signal, bound=bound).double()
    for part in (0.1, 0.5, 0.9):
        first = part * substeps
        with torch.no_grad():
            signal.steps.copy_(torch.tensor([first, 50.0], dtype=torch.float64))
        project(block)
        assert signal.steps.tolist() == pytest.approx([first, region.limit(first)], rel=1e-9)
        assert block.properties.lipschitz <= 1


@pytest.mark.parametrize("name", sorted(HOSTILE))
@pytest.mark.parametrize("sizes", [(4, 3), (4, 5)])
def test_a_non_expansive_pair_stays_one_under_hostile_parameters(name: str, sizes: tuple[int, int]) -> None:
    fields = [GradientField(Dense(*sizes), leaky_relu(0.5), expansive=expansive) for expansive in (False, True)]
    block = DynamicalBlock(fields, "euler", NonExpansivePair(*fields)).double()
    stays_non_expansive_under(name, block)


def test_a_block_with_a_non_expansive_pair_conforms() -> None:
    fields = general_fields(GENERAL["dense"])
    check_block(DynamicalBlock(fields, "euler", NonExpansivePair(*fields))).require()


def test_a_pair_is_balanced_in_the_metric_of_its_fields() -> None:
    metric = DenseMetric(torch.tensor([[2.0, 0.5], [0.5, 1.0]]))
    fields = [MetricField(Dense(2, 2), metric, leaky_relu(0.5), expansive=expansive) for expansive in (False, True)]
    for field in fields:
        nn.init.normal_(field.bias)
        with torch.no_grad():
            field.linear.matrix.copy_(torch.eye(2) + 0.1 * torch.randn(2, 2))
    block = DynamicalBlock(fields, "euler", NonExpansivePair(*fields, (0.3, 5.0))).double()
    block.signal.steps.data[1] = 5.0  # projected in float32 before, by more than float64 needs
    project(block)
    assert 0 < float(block.signal.steps[1]) < 1
    declared = block.properties.lipschitz_in(metric)
    assert 1 - 1e-9 <= declared <= 1
    found = metric.root @ jacobians(block, 2 * torch.randn(64, 2, dtype=torch.float64)) @ metric.inverse_root
    assert float(torch.linalg.matrix_norm(found, ord=2).max()) <= declared * (1 + 1e-12)


class Outward(Spiral):
    """X(x) = (I − ωR)x: the norm of I + hM is √(1 + 2h + h²(1 + ω²))."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)

    def facts(self) -> FieldFacts:
        return FieldFacts(math.hypot(1.0, self.turning) * (1 + EPS), 1.0, reason="MᵀM = (1 + ω²)I, M + Mᵀ = 2I")


@pytest.mark.parametrize("turning", [0.5, 1.0])
def test_a_pair_without_symmetry_is_balanced_by_the_one_sided_constants(turning: float) -> None:
    fields, square = [Spiral(turning), Outward(turning)], 1 + turning**2
    block = DynamicalBlock(fields, "euler", NonExpansivePair(*fields, (0.25, 5.0))).double()
    block.signal.steps.data[1] = 5.0  # projected in float32 before, by more than float64 needs
    project(block)
    room = 1 / (1 - 2 * 0.25 + 0.25**2 * square)
    expected = (math.sqrt(1 + square * (room - 1)) - 1) / square
    assert block.signal.steps.tolist() == pytest.approx([0.25, expected], rel=1e-9)
    assert block.properties.lipschitz <= 1
    assert measured(block) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("bound", ["tight", "paper"])
def test_a_pair_without_symmetry_goes_back_as_far_as_its_constants_show(bound: str) -> None:
    """L_c² = 1 − 2/4 + 2/16, and 1 + |h₂|√2 <= 1/L_c."""
    fields = [Spiral(1.0), Outward(1.0)]
    block = DynamicalBlock(fields, "euler", NonExpansivePair(*fields, (0.25, -5.0), bound=bound), bound=bound).double()
    block.signal.steps.data[1] = -5.0  # projected in float32 before, by more than float64 needs
    project(block)
    expected = -(1 / math.sqrt(0.625) - 1) / math.sqrt(2)
    assert block.signal.steps.tolist() == pytest.approx([0.25, expected], rel=1e-9)
    assert block.properties.lipschitz <= 1


def test_a_pair_credits_no_contraction_below_a_thousandth() -> None:
    """A_c = I, a = 1, h₁ = 1: the step ends in one point, and h₂ <= 1000 − 1."""
    fields = [GradientField(Dense(2, 2), leaky_relu(1.0), expansive=expansive) for expansive in (False, True)]
    with torch.no_grad():
        for field in fields:
            field.linear.matrix.copy_(torch.eye(2))
    assert 990 < NonExpansivePair(*fields, (1.0, 1e9)).steps[1].item() <= 999


class Boundless(Outward):
    def facts(self) -> FieldFacts:
        return FieldFacts()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: NonExpansivePair(Unknown(), Outward()), "no step of contractive, a Unknown, but 0 is known not"),
        (lambda: NonExpansivePair(Spiral(), Boundless()), "no Lipschitz constant of expansive, a Boundless, is known"),
        (lambda: NonExpansivePair(Spiral(), nn.Linear(2, 2)), "expansive is a Linear; a VectorField is needed"),
        (
            lambda: NonExpansivePair(Spiral(), MetricField(Dense(2, 2), DenseMetric(torch.eye(2)))),
            "constants of steps multiply in one norm alone",
        ),
        (lambda: NonExpansivePair(Spiral(), Outward(), (0.5,)), r"start is \(0.5,\); the two steps \(h1, h2\)"),
        (lambda: NonExpansivePair(Spiral(), Outward(), substeps=0), "substeps is 0"),
        (lambda: NonExpansivePair(Spiral(), Outward(), bound="tihgt"), "unknown bound 'tihgt'; did you mean 'tight'"),
    ],
)
def test_fields_and_settings_that_make_no_pair_are_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        make()


def test_a_copied_pair_follows_the_fields_of_its_copy() -> None:
    fields = general_fields(GENERAL["dense"])
    block = DynamicalBlock(fields, "euler", NonExpansivePair(*fields, (0.5, 5.0))).double()
    project(block)
    copied, before = copy.deepcopy(block), block.signal.steps.tolist()
    with torch.no_grad():
        copied.fields[0].linear.matrix.mul_(0.5)
    project(copied)
    assert copied.properties.lipschitz <= 1
    assert 0 < copied.signal.steps[1].item() < 0.5 * before[1]
    project(block)
    assert block.signal.steps.tolist() == before


@pytest.mark.parametrize(("base", "method"), [(ExactFlowRegion, ExactFlow), (TightRegion, ExplicitEuler)])
@pytest.mark.parametrize("name", ["mine", "exact"])
def test_a_named_model_takes_the_method_of_its_region_whatever_the_region_is_called(
    name: str, base: type[Region], method: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(base):
        pass

    monkeypatch.setitem(REGIONS, name, Mine)
    options = {"widths": (4,), "layers": (1,), "weights": "orthogonal", "padding": "circular"}
    ((_, block),) = build(ModelConfig("prescribed", region=name, **options), (1, 8, 8), 3, seed=0).blocks()
    assert type(block.method) is method
    assert type(block.signal.region) is Mine
    # Of an exact flow substeps are no other map; Euler steps are taken as the configuration says.
    assert block.signal.region.substeps == (1 if base is ExactFlowRegion else 2)
    assert block.properties.lipschitz <= 1 + 1e-4


def test_a_budget_credits_no_more_than_stored_matrices_contract() -> None:
    signals = [
        PrescribedSignal(TightRegion(1.0), (1.0, 0.0), "network"),
        PrescribedSignal(TightRegion(1.0), (0.0, 1e9), "network"),
    ]
    budget = NetworkBudget(signals)
    budget.project_()
    assert budget.total() <= 1e-9
    assert signals[1].summary()["h2"] < 1001
    for region in (TightRegion(1.0), PaperPrescribedRegion(0.95)):
        low, high = region.first_range
        for first in (low, 0.5 * (low + high), high):
            assert region.pair_constant(first, region.limit(first)) <= 1 + 1e-12


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TightRegion(0.5, 1.5), "substeps is 1.5"),
        (lambda: LearnedStep(math.nan), "start is nan"),
        (lambda: LearnedStep(1.0, math.nan), "the step range is"),
        (lambda: ScheduledSignal(1.0, math.inf), "end is inf"),
        (lambda: FreeSignal(math.nan), "step is nan"),
        (lambda: EvenSteps(math.inf, 2), "time is inf"),
        (lambda: EvenSteps(1.0, 0), "count is 0"),
        (lambda: LearnedTimes((0.5, math.nan)), r"start\[1\] is nan"),
        (lambda: LearnedTimes((-math.inf,)), r"start\[0\] is -inf"),
        (lambda: PrescribedSignal(TightRegion(0.5), (math.nan, 0.1)), r"start\[0\] is nan"),
        (lambda: FlexibleSignal(TightRegion(0.5), (0.5, math.inf)), r"start\[1\] is inf"),
        (lambda: PairSignal(TightRegion(0.5), (0.5,)), r"start is \(0.5,\); the two steps \(h1, h2\) of a pair"),
        (lambda: PairSignal(TightRegion(0.5), (0.5, 0.1, 0.2)), r"start is \(0.5, 0.1, 0.2\); the two steps"),
        (lambda: PairSignal(TightRegion(0.5), 0.5), "start is 0.5; the two steps"),
    ],
)
def test_unusable_numbers_get_one_sentence(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        make()


def test_the_budget_of_a_network_counts_a_block_as_often_as_it_acts() -> None:
    torch.manual_seed(0)
    config = ModelConfig("certified", widths=(4,), layers=(1,), step="exact", balance="network")
    built = build(config, (1, 8, 8), 10)
    (place,) = (i for i, part in enumerate(built.body) if isinstance(part, DynamicalBlock))
    block, other = built.body[place], copy.deepcopy(built.body[place])
    with torch.no_grad():
        block.signal.steps.copy_(torch.tensor([0.5, 2.0]))
        other.signal.steps.copy_(torch.tensor([1.0, 0.0]))
    body = nn.Sequential(*built.body[:place], block, block, other, block, *built.body[place + 1 :])
    network = Network(body, built.head, built.input_shape, built.config)
    assert declare(network.body).properties.lipschitz > 1.1
    project(network)
    assert declare(network.body).properties.lipschitz <= 1 + 1e-5
    assert float(block.signal.steps[1]) > 0
