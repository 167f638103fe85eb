"""The penalty on pairs that expand, and the network budget after training, against differences and dense Jacobians."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_switching import EVERY_REGION, block_of, measured, random_points
from test_training import QUIET, quadrants
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.linear import NormalisedConv
from dynablocks.models import MODELS, ModelConfig, build
from dynablocks.switching import (
    REGIONS,
    ExactFlowRegion,
    FlexibleSignal,
    NetworkBudget,
    PairSignal,
    PaperFlexibleRegion,
    PaperPrescribedRegion,
    PrescribedSignal,
    Region,
    TightHalvesRegion,
    TightRegion,
    keep_constraints,
    regularisation,
)
from dynablocks.training import TrainingConfig, fit

NAMES = sorted(REGIONS)
SIGNALS = pytest.mark.parametrize("signal", [PrescribedSignal, FlexibleSignal])


def penalised(region: Region, steps: tuple[float, float], weight: float = 0.3) -> PairSignal:
    signal = PrescribedSignal(region, balance="penalty", step_penalty=weight).double()
    with torch.no_grad():
        signal.steps.copy_(torch.tensor(steps, dtype=torch.float64))
    return signal


def points_in_range(region: Region, count: int = 120) -> list[tuple[float, float]]:
    random = np.random.default_rng(3)
    low, high = region.first_range
    return [(random.uniform(low, high), random.uniform(region.second_low, 4.0)) for _ in range(count)]


@EVERY_REGION
def test_one_formula_for_floats_and_tensors(region: Region) -> None:
    for first, second in [*points_in_range(region), (region.first_range[1], 0.0)]:
        as_tensors = torch.tensor([first, second], dtype=torch.float64).unbind()
        for formula in (region.pair_constant, region.log_constant):
            found, expected = formula(*as_tensors), formula(first, second)
            assert isinstance(expected, float)
            assert found.item() == pytest.approx(expected, rel=1e-13, abs=1e-13)


@EVERY_REGION
def test_the_penalty_is_its_formula_and_its_gradient_that_of_differences(region: Region) -> None:
    shift = 1e-6
    positive = 0
    for first, second in points_in_range(region):
        signal = penalised(region, (first, second))

        def value(h1: float, h2: float) -> float:
            return 0.3 * region.substeps * max(0.0, math.log(max(region.pair_constant(h1, h2), 1e-300)))

        penalty = signal.regularisation()
        assert penalty is not None
        assert penalty.item() == pytest.approx(value(first, second), rel=1e-12, abs=1e-15)
        (gradient,) = torch.autograd.grad(penalty, signal.steps)
        around = [value(first + a, second + b) for a, b in ((shift, 0), (-shift, 0), (0, shift), (0, -shift))]
        if min(around) == 0 < max(around):
            continue
        positive += min(around) > 0
        slopes = [(around[0] - around[1]) / (2 * shift), (around[2] - around[3]) / (2 * shift)]
        # Central differences: shift² of curvature and eps / shift of rounding, of values below 10.
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-8)
    assert positive > 3


@EVERY_REGION
def test_the_penalty_is_zero_inside_and_positive_outside(region: Region) -> None:
    for point in random_points(60):
        inside = penalised(region, region.project(*point))
        penalty = inside.regularisation()
        assert penalty is not None
        assert penalty.item() <= 1e-12
        (gradient,) = torch.autograd.grad(penalty, inside.steps)
        assert gradient.isfinite().all()
        first = inside.steps[0].item()
        second = max(region.limit(first), 0.0) * 1.01 + 0.01
        grown = penalised(region, (first, second)).regularisation()
        assert (grown > 0) == (region.pair_constant(first, second) > 1)
        # The paper's region stops at h₂ = S, and the tight ones at 999 S, short of where a pair expands.
        capped = region.limit(first) > 998.9 * region.substeps
        assert grown > 0 or capped or isinstance(region, PaperPrescribedRegion)


def test_a_vanishing_contraction_has_a_finite_gradient() -> None:
    for name, dtype in itertools.product(NAMES, (torch.float32, torch.float64)):
        region = REGIONS[name](1.0)
        signal = PrescribedSignal(region, (1.0, 3.0), "penalty").to(dtype)
        (gradient,) = torch.autograd.grad(signal.regularisation(), signal.steps)
        assert gradient.isfinite().all()
        assert gradient.dtype == dtype


def test_only_the_penalty_balance_has_a_penalty_and_names_are_checked() -> None:
    region = TightRegion(0.5)
    assert PairSignal(region).regularisation() is None
    assert PairSignal(region, balance="network").regularisation() is None
    assert PairSignal(region, (9.0, -9.0), "penalty").steps.tolist() == [2.0, -2.0]
    assert PairSignal(region, (1.0, 9.0), "penalty").steps.tolist() == [1.0, 9.0]
    with pytest.raises(InvalidArgument, match="penalty"):
        PairSignal(region, balance="penalties")
    with pytest.raises(InvalidArgument, match="step_penalty is -1"):
        PairSignal(region, balance="penalty", step_penalty=-1.0)


@SIGNALS
def test_a_weight_that_another_balance_does_not_read_is_refused(signal: type[PairSignal]) -> None:
    region = TightHalvesRegion(0.5)
    assert signal(region, (1.0, 9.0), "penalty").step_penalty == 1.0
    assert torch.equal(
        signal(region, (1.0, 9.0), "penalty").regularisation(),
        signal(region, (1.0, 9.0), "penalty", step_penalty=1.0).regularisation(),
    )
    for balance, weight in itertools.product(("pair", "network"), (0.0, 1.0, 5.0)):
        said = rf"step_penalty is {weight}, which changes nothing with balance='{balance}'; leave it out"
        with pytest.raises(InvalidArgument, match=said):
            signal(region, balance=balance, step_penalty=weight)
        assert signal(region, balance=balance).regularisation() is None


@pytest.mark.parametrize("balance", ["pair", "network"])
def test_a_stored_weight_that_the_balance_does_not_read_stays_stored(balance: str) -> None:
    given = ModelConfig("prescribed", widths=(4,), layers=(1,), balance=balance)
    stored = replace(given.completed(MODELS["prescribed"].defaults), step_penalty=2.0)
    model = build(stored, (1, 8, 8), 4)
    assert model.config == stored
    assert [signal.regularisation() for signal in pairs_of(model)] == [None]


def small(name: str, **changes: object) -> nn.Module:
    config = ModelConfig(name, widths=(4, 4), layers=(2, 1), kernel_size=3, **changes)
    return build(config, (1, 8, 8), 4, seed=0)


def pairs_of(model: nn.Module) -> list[PairSignal]:
    return [m for m in model.modules() if isinstance(m, PairSignal)]


@pytest.mark.parametrize("name", ["prescribed", "flexible"])
def test_the_sum_over_a_network_has_both_kinds_of_penalty(name: str) -> None:
    model = small(name, balance="penalty", step_penalty=0.2, penalty=0.1)
    for signal, second in zip(pairs_of(model), (0.9, 2.0, -0.5), strict=True):
        with torch.no_grad():
            signal.steps[1] = second
    kernels = sum(float(m.regularisation()) for m in model.modules() if isinstance(m, NormalisedConv))
    steps = sum(0.2 * max(0.0, s.region.log_constant(*s.steps.tolist())) for s in pairs_of(model))
    assert steps > 0.1
    total = regularisation(model)
    assert total is not None
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(kernels + steps, rel=1e-5)
    total.backward()
    assert [bool(s.steps.grad.any()) for s in pairs_of(model)] == [True, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_training_on_the_penalty_brings_a_violating_pair_into_its_region(name: str) -> None:
    region = REGIONS[name](0.5)
    signal = PrescribedSignal(region, (0.6, 1.5), "penalty")
    optimiser = torch.optim.SGD(signal.parameters(), lr=0.02)
    keep_constraints(signal, optimiser)
    values = []
    for _ in range(200):
        optimiser.zero_grad()
        penalty = signal.regularisation()
        values.append(float(penalty))
        penalty.backward()
        optimiser.step()
    assert values[0] > 0.1
    assert values[-1] == 0
    assert region.contains(*signal.steps.tolist(), slack=1e-6)
    # Each value falls until the last step of length 0.02 · slope lands inside.
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


@SIGNALS
@pytest.mark.parametrize("name", NAMES)
def test_the_declared_constant_of_an_expanding_block_is_the_measured_one(name: str, signal: type[PairSignal]) -> None:
    region = PaperFlexibleRegion(0.5) if name == "paper-flexible" else REGIONS[name](0.5, 2)
    chosen = signal(region, (0.7, 1.9), "penalty").double()
    block = block_of(chosen, 0.5, 0.5)
    block.fields[1].linear = block.fields[0].linear
    for field in block.fields:
        nn.init.normal_(field.bias, std=0.1)
    declared, found = block.properties.lipschitz, measured(block, 4000)
    assert chosen.regularisation() > 0.1
    assert declared > 1.5
    assert found <= declared * (1 + 1e-12)
    assert found == pytest.approx(declared, rel=1e-6)
    # The region's formula is the paper's bound for the paper's regions, and the tight one for the others.
    formula = math.exp(region.log_constant(*chosen.steps.tolist()))
    assert declared <= formula * (1 + 1e-9)
    assert (declared == pytest.approx(formula, rel=1e-6)) == (not name.startswith("paper"))


def test_a_network_with_a_penalty_declares_what_its_steps_came_to() -> None:
    model = small("prescribed", balance="penalty", region="tight", weights="orthogonal", padding="circular")

    def total() -> float:
        return sum(s.region.log_constant(*s.steps.tolist()) for s in pairs_of(model))

    declared, logs = model.certificate_inputs()[0], total()
    with torch.no_grad():
        for signal in pairs_of(model):
            signal.steps[1] = 5.0
    assert total() - logs > 2
    assert model.certificate_inputs()[0] == pytest.approx(declared * math.exp(total() - logs), rel=1e-4)


def test_fit_trains_a_violating_network_down() -> None:
    def total(weight: float) -> float:
        model = small("prescribed", balance="penalty", weights="orthogonal", padding="circular", region="tight")
        with torch.no_grad():
            for signal in pairs_of(model):
                signal.steps[1] = 3.0
        settings = {"epochs": 3, "batch_size": 16, "lr": 0.001, "loss": "hinge", "regularisation": weight}
        fit(model, quadrants(), TrainingConfig(**settings, **QUIET))
        return sum(max(0.0, s.region.log_constant(*s.steps.tolist())) for s in pairs_of(model))

    assert total(100.0) < 0.02
    assert total(0.0) > 0.1


def pull(model: nn.Module) -> Tensor:
    """A loss that wants the second of three expansive steps smaller and the others larger."""
    return torch.stack([(1 if k == 1 else -1) * s.steps[1] for k, s in enumerate(pairs_of(model))]).sum()


BUDGETS = [(m, r) for m in ("prescribed", "flexible") for r in NAMES]


@pytest.mark.parametrize(("name", "region"), BUDGETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_budget_holds_after_every_training_step(name: str, region: str, seed: int) -> None:
    model = small(name, balance="network", region=region, weights="orthogonal", padding="circular").double()
    torch.manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    keep_constraints(model, optimiser)
    pixels, labels = torch.rand(8, 1, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    fullest = -math.inf
    for step in range(6):
        optimiser.zero_grad()
        (nn.functional.cross_entropy(model(pixels), labels) + 3 * pull(model)).backward()
        optimiser.step()
        total = model.budget.total()
        fullest = max(fullest, total)
        assert total <= 0
        for signal in pairs_of(model):
            first, second = signal.steps.tolist()
            low, high = signal.region.first_range
            assert low <= first <= high
            assert second >= signal.region.second_low
        if step in (0, 5):
            declared = math.prod(block.properties.lipschitz for _, block in model.blocks())
            assert declared <= 1 + 1e-6
    assert fullest > -1e-4
    broken = NetworkBudget(pairs_of(model))
    with torch.no_grad():
        next(s for s in pairs_of(model) if float(s.steps[1].detach()) > 0).steps[1] += 3.0
    assert broken.total() > 0
    declared = math.prod(block.properties.lipschitz for _, block in model.blocks())
    assert declared > 1 + 1e-6 or region.startswith("paper")


def test_a_budget_reads_each_step_once_and_an_empty_one_is_nothing() -> None:
    assert NetworkBudget([]).total() == 0
    NetworkBudget([]).project_()
    signal = PrescribedSignal(ExactFlowRegion(0.5), (2.0, 9.0), "network")
    reads: list[int] = []

    class Counted(NetworkBudget):
        def _steps(self) -> list[tuple[float, float]]:
            reads.append(1)
            return super()._steps()

    Counted([signal]).project_()
    assert len(reads) == 1
    assert 0.999 < signal.steps[1].item() <= 1.0
