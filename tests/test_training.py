"""Losses, schedules, settings and the loop, against oracles."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_progress import Refusing
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dynablocks.training.loop as loop_module
import dynablocks.training.session as session_module
from dynablocks.config import preset_settings
from dynablocks.data import DataSplits, ImageDataset, augment, batch_indices
from dynablocks.errors import BadCheckpoint, BadData, Diverged, DynablocksError, InvalidArgument
from dynablocks.models import ModelConfig, build
from dynablocks.progress import Stopped
from dynablocks.training import (
    LOSSES,
    OPTIMISERS,
    SCHEDULES,
    TrainingConfig,
    choose_device,
    choose_precision,
    find_checkpoint,
    fit,
    hinge,
    interrupts,
    learning_rate_factor,
    make_loss,
    make_optimiser,
    offset_cross_entropy,
)
from dynablocks.training.averaging import ExponentialAverage
from dynablocks.training.budget import StepPlan
from dynablocks.training.checkpoint import read_state
from dynablocks.training.optimisers import load_optimiser
from dynablocks.training.session import Session, Tally, device_for, without_advice

QUIET = {"precision": "32", "device": "cpu", "channels_last": True}


def small_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(256, 4)]
    model = nn.Sequential(*layers)
    model.input_shape, model.num_classes = (1, 8, 8), 4
    return model


def double_model() -> nn.Module:
    """The small model in float64, for the float32 pixels that a training gives it."""
    model = small_model().double()
    model.register_forward_pre_hook(lambda module, given: (given[0].double(),))
    return model


def quadrants(count: int = 96, validation: bool = False) -> DataSplits:
    """Noise with one bright quadrant, whose number is the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 120
    data = ImageDataset("quadrants", images, labels, ("a", "b", "c", "d"))
    return DataSplits(data, data if validation else None, data, "fingerprint")


def metric_lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_hinge_is_the_double_sum() -> None:
    logits, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(0, 5, (7,))
    expected = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        expected += sum(max(0.0, 0.3 - (z[y] - z[j])) for j in range(5) if j != y) / 7
    assert hinge(logits, labels, 0.3).item() == pytest.approx(expected, rel=1e-13)
    assert torch.autograd.gradcheck(lambda z: hinge(z, labels, 0.3), logits.requires_grad_())


def test_offset_cross_entropy_is_its_formula() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    expected = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        shifted = [(v - 0.5 * (j == y)) / 0.25 for j, v in enumerate(z)]
        expected += 0.25 / 6 * (math.log(sum(math.exp(v) for v in shifted)) - shifted[y])
    assert offset_cross_entropy(logits, labels, 0.5, 0.25).item() == pytest.approx(expected, rel=1e-13)
    plain = nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(offset_cross_entropy(logits, labels, 0.0, 1.0), plain, rtol=1e-14, atol=0)


def test_offset_cross_entropy_is_a_hinge_at_temperature_zero() -> None:
    logits, labels = torch.tensor([[0.2, 0.0], [3.0, 0.0]], dtype=torch.float64), torch.tensor([0, 0])
    assert offset_cross_entropy(logits, labels, 1.0, 1e-3).item() == pytest.approx(0.8 / 2, abs=1e-3)


@pytest.mark.parametrize("power", [0.3, 0.7, 1.0])
def test_a_power_makes_offset_cross_entropy_the_generalised_one(power: float) -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    expected = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        weights = [math.exp((v - 0.5 * (j == y)) / 0.25) for j, v in enumerate(z)]
        expected += 0.25 / 6 * (1 - (weights[y] / sum(weights)) ** power) / power
    assert offset_cross_entropy(logits, labels, 0.5, 0.25, power).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda z: offset_cross_entropy(z, labels, 0.5, 0.25, power), logits.requires_grad_()
    )


@pytest.mark.parametrize("focus", [1.0, 1.5, 5.0])
def test_a_focus_weighs_each_image_by_what_its_class_lacks(focus: float) -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    expected = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        weights = [math.exp((v - 0.5 * (j == y)) / 0.25) for j, v in enumerate(z)]
        p = weights[y] / sum(weights)
        expected += 0.25 / 6 * (1 - p) ** focus * -math.log(p)
    assert offset_cross_entropy(logits, labels, 0.5, 0.25, focus=focus).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda z: offset_cross_entropy(z, labels, 0.5, 0.25, focus=focus), logits.requires_grad_()
    )


@pytest.mark.parametrize("focus", [1.0, 1.5])
def test_a_focus_leaves_images_that_are_won_for_good_in_peace(focus: float) -> None:
    logits = torch.tensor([[60.0, 0.0]], requires_grad=True)
    offset_cross_entropy(logits, torch.tensor([0]), 0.5, 0.25, focus=focus).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(1, 2))


def test_the_generalised_cross_entropy_goes_from_the_plain_one_to_a_count_of_small_margins() -> None:
    logits, labels = torch.randn(50, 4, dtype=torch.float64), torch.randint(0, 4, (50,))
    plain, small = offset_cross_entropy(logits, labels, 0.5, 0.25), 1e-9
    torch.testing.assert_close(offset_cross_entropy(logits, labels, 0.5, 0.25, small), plain, rtol=1e-7, atol=0)
    lead = logits.gather(1, labels[:, None])[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    counted = offset_cross_entropy(logits, labels, 0.5, 1e-6, 1.0) / 1e-6
    assert counted.item() == pytest.approx((lead < 0.5).double().mean().item(), abs=1e-9)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_prefers_a_larger_lead(name: str) -> None:
    loss = make_loss(TrainingConfig(loss=name))
    labels = torch.tensor([0])
    assert loss(torch.tensor([[0.1, 0.0, 0.0]]), labels) > loss(torch.tensor([[0.14, 0.0, 0.0]]), labels)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_stay_in_the_unit_interval(name: str) -> None:
    config = TrainingConfig(schedule=name, warmup=0.0 if name == "constant" else 0.25)
    factors = [learning_rate_factor(k / 100, k / 100 * 90, config) for k in range(101)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == 1


def test_step_schedule_drops_at_whole_epochs() -> None:
    config = TrainingConfig(schedule="step", step_epochs=30, step_factor=0.1)
    factors = [learning_rate_factor(e / 100, e, config) for e in (0, 29.999, 30, 59.9, 60, 90)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(("factor", "epoch"), [(10.0, 400.0), (10, 40.0), (10.0, 31.0)])
def test_a_step_schedule_that_rises_beyond_all_learning_rates_gets_one_sentence(factor: float, epoch: float) -> None:
    """The power itself overflows, the product overflows float32, the product is ten times the largest allowed."""
    config = TrainingConfig(schedule="step", step_epochs=1.0, step_factor=factor, lr=1.0)
    assert learning_rate_factor(0.5, 3.0, config) == 1000.0
    with pytest.raises(InvalidArgument, match=r"step_factor 10 every 1 epochs takes the learning rate beyond") as error:
        learning_rate_factor(0.5, epoch, config)
    assert "\n" not in str(error.value)
    assert learning_rate_factor(0.5, epoch, replace(config, step_factor=0.1)) < 1e-30


def test_one_cycle_matches_torch_away_from_the_warm_up() -> None:
    config, steps = TrainingConfig(schedule="one-cycle", warmup=0.25), 400
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=300)
    for step in range(100, steps + 1):
        assert learning_rate_factor(step / steps, 0.0, config) == pytest.approx(oracle.get_last_lr()[0], abs=1e-9)
        optimiser.step()
        oracle.step()


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
def test_every_optimiser_descends(name: str) -> None:
    model = nn.Linear(3, 1)
    optimiser = make_optimiser(model, TrainingConfig(optimiser=name, lr=0.01))
    x = torch.randn(8, 3)
    losses = []
    for _ in range(30):
        loss = model(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": None}, "max_minutes"),
        ({"epochs": float("nan")}, "finite"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"optimiser": "sdg"}, "did you mean 'sgd'"),
        ({"schedule": "onecycle"}, "did you mean 'one-cycle'"),
        ({"loss": "hing"}, "did you mean 'hinge'"),
        ({"precision": "8"}, "precision"),
        ({"device": "tpu"}, "device"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": 1.0}, "momentum"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"temperature": 0.0}, "temperature"),
        ({"power": 0.0}, "power is 0"),
        ({"power": 1.5}, "power is 1.5"),
        ({"focus": 0.5}, "focus is 0.5"),
        ({"focus": 2.0, "power": 0.5}, "leave one of them out"),
        ({"focus": 2.0, "loss": "hinge"}, "focus belongs to loss offset-cross-entropy"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"threads": 0}, "threads is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"crop_padding": 1, "crop_fill": "edge"}, "crop_fill 'edge'"),
        ({"crop_fill": "reflect"}, r"crop_padding 0.* turn the fill off too: --training.crop_fill zeros\.$"),
        ({"power": 0.5, "loss": "hinge"}, "power belongs to loss offset-cross-entropy"),
        ({"max_minutes": -3.0}, "max_minutes is -3.0"),
        ({"batch_size": 9, "devices": 2}, "multiple"),
        ({"optimiser": "nesterov", "momentum": 0.0}, "nesterov"),
        ({"epochs": 1e308}, "epochs is 1e"),
        ({"epochs": None, "max_minutes": 1e307}, "max_minutes is 1e"),
        ({"threads": 3_000_000_000}, "threads is 3000000000"),
        ({"step_factor": 1e300}, "step_factor is 1e"),
        ({"lr": 1e300}, "lr is 1e"),
        ({"step_epochs": 1e-308}, "step_epochs is 1e-308"),
        ({"adversary_epsilon": 1e30}, "adversary_epsilon is 1e"),
        ({"seed": 10**400}, "seed is a whole number of more than 308 digits"),
        ({"flip": "no"}, "flip is 'no'; True or False is needed"),
        ({"channels_last": 1}, "channels_last is 1; True or False is needed"),
        ({"precision": 32}, "precision is 32; text is needed, such as '32'"),
    ],
)
def test_a_bad_setting_gets_one_sentence(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as error:
        TrainingConfig(**settings)
    assert "\n" not in str(error.value)


def test_the_crops_of_a_preset_are_turned_off_together_with_their_fill() -> None:
    settings = preset_settings("certified/cpu-1h", "certified", "cifar10")["training"] | {"crop_padding": 0}
    with pytest.raises(InvalidArgument, match="crop_fill is 'reflect' with crop_padding 0"):
        TrainingConfig(**settings)
    off = TrainingConfig(**settings | {"crop_fill": "zeros"})
    assert (off.crop_padding, off.crop_fill) == (0, None)


def test_fit_learns_the_quadrants(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=12, batch_size=16, optimiser="adam", crop_padding=0, **QUIET)
    model = small_model()
    summary = fit(model, quadrants(validation=True), config, tmp_path)
    assert summary.metrics["accuracy"] > 0.9
    assert summary.metrics["validation_accuracy"] > 0.9
    assert (summary.epochs, summary.steps) == (12, 72)
    assert not model.training
    lines = metric_lines(tmp_path)
    assert [line["step"] for line in lines] == [6 * k for k in range(1, 13)]
    assert lines[-1]["progress"] == 1.0
    assert lines[-1]["loss"] < lines[0]["loss"]


Groups = list[dict[str, Any]]
TORCH_OPTIMISERS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.8),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.8, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1.0, betas=(0.8, 0.999)),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.999)),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=1.0, betas=(0.8, 0.999), decoupled_weight_decay=True),
}
PLAIN: dict[str, dict[str, Any]] = {
    **{name: {"optimiser": name} for name in TORCH_OPTIMISERS},
    "averaged": {"ema_decay": 0.3},
    "focused": {"loss": "offset-cross-entropy", "offset": 0.25, "temperature": 0.5, "focus": 2.0},
    "in steps": {"schedule": "step", "step_epochs": 0.5, "step_factor": 0.1},
}


def plain_config(**changes: Any) -> TrainingConfig:
    """Two epochs of six steps."""
    settings = {"epochs": 2, "batch_size": 16, "seed": 5, "optimiser": "sgd", "loss": "cross-entropy"}
    rates = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1, "schedule": "one-cycle", "warmup": 0.25}
    return TrainingConfig(**(settings | rates | QUIET | changes))


def plain_factor(progress: float, schedule: str) -> float:
    """What the learning rate is multiplied by; the step schedule drops after each quarter of the two epochs."""
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 0.1 ** math.floor(4 * progress)
    return progress / 0.25 if progress < 0.25 else 0.5 * (1 + math.cos(math.pi * (progress - 0.25) / 0.75))


def plain_loss(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    if loss == "cross-entropy":
        return -logits.log_softmax(1).gather(1, labels[:, None]).mean()
    shifted = logits - 0.25 * nn.functional.one_hot(labels, 4).to(logits.dtype)
    p = (shifted / 0.5).softmax(1).gather(1, labels[:, None])
    return 0.5 * ((1 - p) ** 2 * -p.log()).mean()


def plain_loop(config: TrainingConfig, decays: Callable[[Tensor], bool] = lambda p: p.ndim > 1) -> list[Tensor]:
    """Where the weights, or their average, end after 12 steps of torch's optimisers."""
    model, data = double_model(), quadrants().train
    groups = [{"params": [p], "weight_decay": 0.1 if decays(p) else 0.0} for p in model.parameters()]
    optimiser = TORCH_OPTIMISERS[config.optimiser](groups)
    averages = [p.detach().clone() for p in model.parameters()]
    batches = [batch for epoch in range(2) for batch in batch_indices(96, 16, 5, epoch)]
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * plain_factor((step + 0.5) / 12, config.schedule)
        optimiser.zero_grad()
        plain_loss(model(data.images[batch].float() / 255), data.labels[batch], config.loss).backward()
        optimiser.step()
        d = min(config.ema_decay, (step + 1) / (step + 11))
        averages = [d * a + (1 - d) * p.detach() for a, p in zip(averages, model.parameters(), strict=True)]
    return averages


@pytest.mark.parametrize("name", PLAIN)
def test_fit_is_the_plain_loop(name: str) -> None:
    config, model = plain_config(**PLAIN[name]), double_model()
    fit(model, quadrants(), config)
    # Float64 throughout: 12 steps of sums of 10⁴ products, and Adam divides by square roots of sums of squares.
    for ours, expected in zip(model.parameters(), plain_loop(config), strict=True):
        torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=1e-9)


def test_the_plain_loop_tells_settings_apart() -> None:
    assert TORCH_OPTIMISERS.keys() == set(OPTIMISERS)
    ends = [plain_loop(plain_config(**changes)) for changes in PLAIN.values()]
    ends += [plain_loop(plain_config(schedule="constant")), plain_loop(plain_config(), decays=lambda p: True)]
    for one, other in itertools.combinations(ends, 2):
        assert max((a - b).abs().max().item() for a, b in zip(one, other, strict=True)) > 1e-6


def test_tally_counts_what_a_plain_loop_counts() -> None:
    config = TrainingConfig(epochs=1, batch_size=32, lr=1e-12, loss="cross-entropy", **QUIET)
    model, splits = small_model(), quadrants()
    pixels = splits.train.images.float() / 255
    loss = nn.functional.cross_entropy(model(pixels), splits.train.labels).item()
    accuracy = (model(pixels).argmax(1) == splits.train.labels).float().mean().item()
    summary = fit(model, splits, config)
    assert summary.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert summary.metrics["accuracy"] == pytest.approx(accuracy)


def test_the_sum_of_losses_does_not_depend_on_when_it_is_looked_at() -> None:
    losses = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums: set[float] = set()
    for every in (1, 7, 100):
        tally = Tally()
        counted: list[float] = []
        for number, loss in enumerate(losses, 1):
            tally.add(loss, torch.zeros(9, 2), torch.zeros(9, dtype=torch.int64))
            counted += tally.count() if number % every == 0 else []
        counted += tally.count()
        assert counted == losses.tolist()
        sums.add(tally.loss_sum)
    assert len(sums) == 1
    assert sums.pop() == pytest.approx(9 * math.fsum(losses.tolist()), rel=1e-13)


def test_noted_losses_keep_no_graph_alive() -> None:
    tally, x = Tally(), torch.ones(2, requires_grad=True)
    tally.add(x.sum(), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    assert not tally._losses[0].requires_grad
    assert tally.count() == [2.0]


def test_every_hook_of_the_loop_is_called() -> None:
    class Watched(nn.Module):
        input_shape, num_classes = (1, 8, 8), 4

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 4)
            self.seen: list[float] = []
            self.asked = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.flatten(1))

        def set_progress(self, fraction: float) -> None:
            self.seen.append(fraction)

        def project_(self) -> None:
            with torch.no_grad():
                self.linear.weight.div_(self.linear.weight.norm().clamp_min(1))

        def regularisation(self) -> torch.Tensor:
            self.asked += 1
            return self.linear.bias.square().sum()

    model, free = Watched(), Watched()
    free.load_state_dict(model.state_dict())
    settings = {"lr": 10.0, "regularisation": 0.01, "gradient_clip": 1.0, "flip": True}
    config = TrainingConfig(epochs=2, batch_size=32, **settings, **QUIET)
    fit(model, quadrants(), config)
    fit(free, quadrants(), replace(config, regularisation=0.0))
    assert (model.asked, free.asked) == (6, 0)
    assert not torch.equal(model.linear.bias, free.linear.bias)
    assert model.linear.weight.norm() <= 1 + 1e-6
    assert model.seen[:6] == pytest.approx([k / 6 for k in range(1, 7)])
    assert model.seen[-1] == 1.0


def test_gradient_clip_bounds_the_step() -> None:
    model, splits = small_model(), quadrants()
    before = [p.detach().clone() for p in model.parameters()]
    config = TrainingConfig(
        epochs=1, batch_size=96, lr=1.0, momentum=0.0, schedule="constant", gradient_clip=1e-3, **QUIET
    )
    fit(model, splits, config)
    moved = sum((p - b).square().sum() for p, b in zip(model.parameters(), before, strict=True)).sqrt()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model = small_model()

    def poison(step: int) -> None:
        if step == 7:
            with torch.no_grad():
                model[0].weight.fill_(float("nan"))

    config = TrainingConfig(epochs=9, batch_size=16, checkpoint_seconds=0.0, **QUIET)
    with pytest.raises(Diverged, match=r"a weight is not finite after step 7.*smaller --training.lr.*is kept"):
        fit(model, quadrants(), config, tmp_path, on_step=poison)
    fit(small_model(), quadrants(), config, tmp_path)
    lazy = TrainingConfig(epochs=9, batch_size=16, **QUIET)
    with pytest.raises(Diverged, match=r"the loss is not finite after step 8 "):
        fit(small_model_poisoned_at(model, poison), quadrants(), lazy, on_step=poison)


def test_weights_that_diverge_in_the_last_step_are_not_stored(tmp_path: Path) -> None:
    model = small_model()

    def poison(step: int) -> None:
        if step == 6:
            with torch.no_grad():
                model[0].weight.fill_(math.nan)

    with pytest.raises(Diverged, match="a weight is not finite after step 6 "):
        fit(model, quadrants(), TrainingConfig(epochs=1, batch_size=16, **QUIET), tmp_path, on_step=poison)
    assert find_checkpoint(tmp_path) is None


def small_model_poisoned_at(model: nn.Module, poison: object) -> nn.Module:
    model.load_state_dict(small_model().state_dict())
    return model


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_moments_follow_the_layout_of_their_weights(name: str) -> None:
    """A fused step walks both in memory; a training may go on with another ``channels_last``."""
    pixels, config = torch.randn(2, 3, 5, 5), TrainingConfig(optimiser=name, lr=0.1)

    def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        model(pixels).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    model = nn.Conv2d(3, 4, 3)
    optimiser = make_optimiser(model, config)
    step(model, optimiser)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    resumed = make_optimiser(other, config)
    load_optimiser(resumed, copy.deepcopy(optimiser.state_dict()))
    for one, its in ((model, optimiser), (other, resumed)):
        step(one, its)
    assert optimiser.param_groups[0]["fused"]
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize(("stored", "own"), [(None, True), (True, None)])
def test_a_resumed_optimiser_steps_as_its_own_device_has_it(name: str, stored: bool | None, own: bool | None) -> None:
    """A checkpoint of another device, or of a version without fused steps, says otherwise; the formula is the same."""
    torch.manual_seed(0)
    model, config = nn.Linear(3, 2).double(), TrainingConfig(optimiser=name, lr=0.1, weight_decay=0.01)
    x = torch.randn(5, 3, dtype=torch.float64)

    def optimiser_of(network: nn.Module, fused: bool | None) -> torch.optim.Optimizer:
        optimiser = make_optimiser(network, config)
        for group in optimiser.param_groups:
            group["fused"] = fused
        return optimiser

    def step(network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        network(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    optimiser = optimiser_of(model, stored)
    step(model, optimiser)
    other = copy.deepcopy(model)
    resumed = optimiser_of(other, own)
    load_optimiser(resumed, copy.deepcopy(optimiser.state_dict()))
    assert [group["fused"] for group in resumed.param_groups] == [own, own]
    for one, its in ((model, optimiser), (other, resumed)):
        step(one, its)
        step(one, its)
    torch.testing.assert_close(other.weight, model.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(other.bias, model.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_weight_with_gaps_leaves_its_neighbours_alone(name: str) -> None:
    """A fused step would walk over them; the first step of Adam is −lr · sign of the gradient."""
    whole, model = torch.zeros(4, 6, dtype=torch.float64), nn.Module()
    model.weight = nn.Parameter(whole[:, ::2])
    optimiser = make_optimiser(model, TrainingConfig(optimiser=name, lr=0.1))
    model.weight.sum().backward()
    optimiser.step()
    assert whole[:, 1::2].count_nonzero() == 0
    torch.testing.assert_close(whole[:, ::2], torch.full((4, 3), -0.1, dtype=torch.float64), rtol=0, atol=1e-8)


def test_exponential_average_is_the_recursion() -> None:
    model = nn.Linear(1, 1, bias=False)
    average, expected = ExponentialAverage(model, 0.9), model.weight.item()
    for step in range(1, 40):
        model.weight.data.fill_(float(step % 5))
        average.update(model, step)
        decay = min(0.9, step / (step + 10))
        expected = decay * expected + (1 - decay) * (step % 5)
    assert average.model().weight.item() == pytest.approx(expected, rel=1e-5)


def test_data_that_does_not_fit_the_model() -> None:
    model, config = small_model(), TrainingConfig(**QUIET)
    model.input_shape = (3, 32, 32)
    with pytest.raises(BadData, match=r"\(1, 8, 8\), the model takes \(3, 32, 32\)"):
        fit(model, quadrants(), config)
    model.input_shape, model.num_classes = (1, 8, 8), 3
    with pytest.raises(BadData, match="label 3"):
        fit(model, quadrants(), config)


def test_sixteen_bits_on_a_cpu_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="bf16 or 32"):
        fit(small_model(), quadrants(), TrainingConfig(precision="16", device="cpu"))


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_step_trains_on_the_augmented_float32_images_of_its_batch(precision: str) -> None:
    seen: list[torch.Tensor] = []
    model, splits = small_model(), quadrants()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    crops = {"crop_padding": 2, "crop_fill": "reflect", "flip": True}
    config = TrainingConfig(epochs=1 / 6, batch_size=16, seed=5, precision=precision, device="cpu", **crops)
    fit(model, splits, config)
    chosen = batch_indices(96, 16, 5, 0)[0]
    (first,) = seen
    assert first.dtype == torch.float32
    assert torch.equal(first, augment(splits.train.images[chosen], 5, 0, 0, 2, True, "reflect"))
    assert not torch.equal(first, augment(splits.train.images[chosen], 5, 0, 0, 2, True, "zeros"))


def test_each_of_several_devices_augments_its_own_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(images: Tensor, *given: Any, **named: Any) -> Tensor:
        sizes.append(len(images))
        return augment(images, *given, **named)

    monkeypatch.setattr(session_module, "augment", counted)
    config = TrainingConfig(batch_size=16, seed=5, crop_padding=2, flip=True, **QUIET)
    session = Session(small_model(), quadrants(), config, None, "", {}, None)
    pixels, labels, targets = session.batch()
    assert torch.equal(labels, targets)
    for rank in range(4):
        monkeypatch.setattr(session, "fabric", SimpleNamespace(global_rank=rank, world_size=4))
        own, names, _ = session.batch()
        assert torch.equal(own, pixels[rank::4])
        assert torch.equal(names, labels[rank::4])
        assert own.is_contiguous(memory_format=torch.channels_last)
    assert sizes == [16, 4, 4, 4, 4]


def test_a_crop_that_may_hold_no_image_is_refused() -> None:
    config = TrainingConfig(epochs=1, batch_size=16, crop_padding=9, **QUIET)
    with pytest.raises(InvalidArgument, match="crop_padding is 9; of images of 8x8 pixels 0 to 7 is allowed"):
        fit(small_model(), quadrants(), config)


def test_more_devices_than_there_are_get_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto", 1) == "cuda"
    assert choose_device("cpu", 4) == "cpu"
    for name in ("auto", "cuda"):
        with pytest.raises(InvalidArgument, match="devices is 4, but torch sees 1 GPU"):
            choose_device(name, 4)


def test_a_training_needs_as_many_gpus_as_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    train = quadrants().train
    assert device_for(TrainingConfig(batch_size=16, devices=2), train) == "cuda"
    with pytest.raises(InvalidArgument, match="devices is 4, but torch sees 2 GPU"):
        device_for(TrainingConfig(batch_size=16, devices=4), train)


def test_images_that_the_devices_cannot_share_equally_get_a_sentence() -> None:
    with pytest.raises(InvalidArgument, match="15 training images make one batch, which 2 devices"):
        fit(small_model(), quadrants(15), TrainingConfig(batch_size=16, devices=2, device="cpu"))


def test_bf16_trains_on_a_cpu() -> None:
    config = TrainingConfig(epochs=6, batch_size=16, optimiser="adam", precision="bf16", device="cpu")
    summary = fit(small_model(), quadrants(), config)
    assert summary.precision == "bf16"
    assert summary.metrics["accuracy"] > 0.7


def test_choose_precision_takes_the_faster_and_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import dynablocks.training.precision as precision

    model, batch = small_model(dropout=0.5), torch.rand(4, 1, 8, 8)
    before, random = model[0].weight.clone(), torch.get_rng_state()
    monkeypatch.setattr(precision, "supports_bf16", lambda device: True)
    monkeypatch.setattr(precision, "SECONDS_EACH", 0.01)
    # On a clock of its own: steps in both formats take turns, float32 first.
    for seconds, expected in (((0.02, 0.01), "bf16"), ((0.01, 0.02), "32")):
        now = itertools.accumulate(itertools.cycle([0.0, seconds[0], 0.0, seconds[1]]))
        monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=now.__next__))
        assert choose_precision(model, batch, "cpu") == expected
    assert torch.equal(before, model[0].weight)
    assert torch.equal(random, torch.get_rng_state())
    assert model[0].weight.grad is None
    for gain, expected in ((1.05, "32"), (1.3, "bf16")):
        seconds = {"32": 0.01 * gain, "bf16": 0.01}
        monkeypatch.setattr(precision, "timed_step", lambda m, b, d, name, seconds=seconds: seconds[name])
        assert choose_precision(model, batch, "cpu") == expected


def test_the_choice_of_the_precision_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import dynablocks.training.precision as precision

    told: list[str | float] = []

    @contextlib.contextmanager
    def recorded(label: str) -> Iterator[Callable[[float], None]]:
        told.append(label)
        yield told.append

    monkeypatch.setattr(precision, "progress_bar", recorded)
    monkeypatch.setattr(precision, "supports_bf16", lambda device: True)
    monkeypatch.setattr(precision, "timed_step", lambda *_: 0.75)
    choose_precision(small_model(), torch.rand(4, 1, 8, 8), "cpu")
    assert told == ["choosing the precision", 0.25, 0.5, 0.6875, 0.875, 1.0, 1.0]


@pytest.mark.parametrize(("seconds", "rounds"), [(2.0**-3, 8), (2.0**-8, 30), (2.0**-10, 103)])
def test_the_choice_of_the_precision_takes_thirty_steps_of_each_or_a_second(
    seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of very short steps as many as a fifth of a second holds."""
    import dynablocks.training.precision as precision

    names: list[str] = []
    told: list[float] = []

    def timed(model: nn.Module, batch: Tensor, device: torch.device, name: str) -> float:
        names.append(name)
        return seconds

    monkeypatch.setattr(precision, "progress_bar", lambda label: contextlib.nullcontext(told.append))
    monkeypatch.setattr(precision, "supports_bf16", lambda device: True)
    monkeypatch.setattr(precision, "timed_step", timed)
    assert choose_precision(small_model(), torch.rand(4, 1, 8, 8), "cpu") == "32"
    assert names == ["32", "bf16"] * (1 + rounds)
    assert told == sorted(told)
    assert told[-3] < told[-1] == 1.0


@pytest.mark.parametrize("slow_down", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("limit", [None, 2000])
def test_plan_fills_the_budget_and_progress_never_falls(slow_down: float, limit: int | None) -> None:
    plan, elapsed, step, last = StepPlan.of(limit, 60.0), 0.0, 0, 0.0
    while step < plan.total:
        elapsed += 1.0 if step < 2 else 0.05 * (slow_down if elapsed > 30 else 1.0)
        step += 1
        if plan.is_due(step, elapsed):
            plan.fit(step, elapsed)
        assert plan.progress(step) >= last - 1e-15
        last = plan.progress(step)
    assert plan.progress(step) == 1.0
    if limit is not None and step == limit:
        assert elapsed <= 60
    else:
        assert 55 < elapsed < 61


@pytest.mark.parametrize("pause", [5.0, 20.0])
def test_a_machine_that_sleeps_does_not_hurry_the_schedule(pause: float) -> None:
    """Steps of 0.1 s in a budget of 100 s, and a pause after 30 s: 97 − 30 − pause seconds are left."""
    plan, elapsed, step, slopes = StepPlan.of(None, 100.0), 0.0, 0, []
    while step < plan.total:
        before = plan.progress(step)
        step, elapsed = step + 1, elapsed + 0.1 + (pause if step == 300 else 0.0)
        if plan.is_due(step, elapsed):
            plan.fit(step, elapsed)
        slopes.append(plan.progress(step) - before)
    assert 95 <= elapsed <= 97
    fair = (1 - 300 / 970) / ((97 - 30 - pause) / 0.1)
    assert max(slopes[301:]) <= 1.05 * fair
    assert min(slopes[301:]) >= 0.95 * fair


def test_plan_without_need_of_the_budget_is_untouched() -> None:
    shortened = StepPlan(100, 1.0, 40, fitted_step=20)
    shortened.budget_seconds = None
    before = shortened.progress(30)
    shortened.without_budget(30)
    assert shortened.total == 100
    assert shortened.progress(30) == before < shortened.progress(99) < shortened.progress(100) == 1
    plan = StepPlan.of(100, 3600.0)
    for step in range(1, 101):
        if plan.is_due(step, step * 0.01):
            plan.fit(step, step * 0.01)
        assert plan.progress(step) == StepPlan.of(100, None).progress(step)


def test_fit_keeps_a_time_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: a step takes 10 ms."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr("dynablocks.training.session.time", clock)
    monkeypatch.setattr(loop_module, "time", clock)

    def tick(step: int) -> None:
        now[0] += 0.01

    config = TrainingConfig(epochs=None, max_minutes=1.5 / 60, batch_size=16, **QUIET)
    summary = fit(small_model(), quadrants(), config, on_step=tick)
    assert 130 <= summary.steps <= 150
    assert summary.train_seconds <= 1.5


def test_a_plain_console_gets_a_line_an_epoch() -> None:
    from rich.console import Console

    stream = io.StringIO()
    config = TrainingConfig(epochs=2, batch_size=32, **QUIET)
    fit(small_model(), quadrants(validation=True), config, console=Console(file=stream, width=200))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2  loss ")
    assert "validation" in lines[1]
    assert "images/s" in lines[1]
    terminal = io.StringIO()
    fit(small_model(), quadrants(), config, console=Console(file=terminal, force_terminal=True, width=160))
    assert "left" in terminal.getvalue()
    assert [line.endswith(" left") for line in lines] == [True, True]


def test_a_long_epoch_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from dynablocks.training.display import Display

    now = [0.0]
    monkeypatch.setattr("dynablocks.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    stream, metrics = io.StringIO(), {"epoch": 0.5, "epochs": 2.0, "loss": 1.0, "seconds": 30.0}
    with Display(Console(file=stream, force_terminal=False)) as display:
        for second in range(0, 200, 10):
            now[0] = float(second)
            display.update(0.1, 90.0, metrics)
            if second == 90:
                display.epoch(metrics, 75.0)
    assert stream.getvalue().splitlines() == [
        "epoch 0.5/2  loss 1.0000  1:30 left",
        "epoch 0.5/2  loss 1.0000  0:30 trained, 1:15 left",
        "epoch 0.5/2  loss 1.0000  1:30 left",
    ]
    with Display(Console(file=stream, force_terminal=False), silent=True) as display:
        now[0] += 90.0
        display.update(0.2, 80.0, metrics)
        display.epoch(metrics, 80.0)
    assert len(stream.getvalue().splitlines()) == 3


def test_a_narrow_terminal_shows_the_time_left() -> None:
    from rich.console import Console

    from dynablocks.training.display import Display

    stream = io.StringIO()
    metrics = {"epoch": 0.5, "epochs": 2.0, "loss": 1.0, "accuracy": 0.5, "images_per_second": 1234.0}
    with Display(Console(file=stream, force_terminal=True, width=40, _environ={"TERM": "xterm"})) as display:
        display.update(0.5, 90.0, metrics)
    assert "1:30 left" in stream.getvalue()


@pytest.mark.parametrize(
    ("width", "said"),
    [
        (200, "1:02:30 left  epoch 12.5/151.4  loss 1.1682  accuracy 43.9 %  1850 images/s"),
        (80, "1:02:30 left  epoch 12.5/151.4  accuracy 43.9 %"),
        (60, "1:02:30 left  epoch 12.5/151.4"),
        (34, "1:02:30 left"),
    ],
)
def test_the_bar_keeps_its_place_beside_what_there_is_room_for(width: int, said: str) -> None:
    from rich.console import Console

    from dynablocks.training.display import Display

    stream = io.StringIO()
    metrics = {"epoch": 12.5, "epochs": 151.4, "loss": 1.1682, "accuracy": 0.439, "images_per_second": 1850.0}
    console = Console(file=stream, force_terminal=True, no_color=True, width=width, _environ={"TERM": "xterm"})
    with Display(console) as display:
        display.update(0.42, 3750.0, metrics)
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).splitlines()[-1].strip()
    assert re.fullmatch(rf"train \W+ 42% {re.escape(said)}", line), line


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_training_goes_on_where_standard_error_takes_nothing(
    number: int, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setenv("TERM", "xterm")
    config = TrainingConfig(epochs=2, batch_size=32, **QUIET)
    stream = Refusing(number, terminal=terminal)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        summary = fit(small_model(), quadrants(), config, tmp_path)
        assert sys.stderr is stream
    assert stream.tries > 0
    assert summary.steps == 6
    assert [line["step"] for line in metric_lines(tmp_path)] == [3, 6]


def test_a_console_of_the_callers_that_fails_at_the_end_ends_no_training() -> None:
    from rich.console import Console

    from dynablocks.training.display import Display

    class FilledLater(Refusing):
        full = False

        def write(self, text: str) -> int:
            return super().write(text) if self.full else len(text)

    stream = FilledLater(errno.ENOSPC)
    with Display(Console(file=stream, force_terminal=True, width=80, _environ={"TERM": "xterm"})):
        stream.full = True
    assert stream.tries > 0


def test_only_an_interrupt_that_counted_makes_the_next_one_a_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 1.2, 1.3])
    monkeypatch.setattr(interrupts, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(interrupts, "_latest_interrupt", [-math.inf])
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 1.0)
    assert [interrupts.is_repeated_interrupt() for _ in range(4)] == [False, True, False, True]


def test_the_average_meets_the_constraints_and_has_the_present_buffers() -> None:
    class Sphere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 0.0]))
            self.register_buffer("seen", torch.zeros(()))

        @torch.no_grad()
        def project_(self) -> None:
            self.weight.div_(self.weight.norm())

    model = Sphere()
    average = ExponentialAverage(model, 0.5)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([0.0, 1.0]))
        model.seen.fill_(3.0)
    average.update(model, 100)
    assert float(average.copy.weight.norm()) < 0.9
    assert float(average.model().weight.norm()) == pytest.approx(1)
    assert float(average.model().seen) == 3


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As in the background job of a script, whose Ctrl-C is meant for what runs in the foreground."""
    import os
    import signal

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.polite_interrupt() as stopping:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert not stopping()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("silent", [False, True])
def test_the_first_ctrl_c_is_answered_at_once(
    silent: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import signal

    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", -1.0)  # so that no second one is taken for a repetition
    with interrupts.polite_interrupt(silent=silent) as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping()
        said = capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert said == ("" if silent else "\nStopping at the end of a step; Ctrl-C again stops at once.\n")
    assert capfd.readouterr().err == ""


def test_a_ctrl_c_is_noted_where_standard_error_takes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal
    import sys

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as without_a_reader:
        for stream in (None, io.StringIO(), without_a_reader):
            with interrupts.polite_interrupt() as stopping, monkeypatch.context() as patch:
                patch.setattr(sys, "stderr", stream)
                signal.raise_signal(signal.SIGINT)
                assert stopping()


def test_interrupt_writes_a_checkpoint_and_the_training_goes_on(tmp_path: Path) -> None:
    import os
    import signal

    config = TrainingConfig(epochs=3, batch_size=16, **QUIET)

    def press_ctrl_c(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), quadrants(), config, tmp_path, on_step=press_ctrl_c)
    steps: list[int] = []
    fit(small_model(), quadrants(), config, tmp_path, on_step=steps.append)
    assert steps == list(range(6, 19))


def test_a_stop_is_told_of_with_the_checkpoint_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes just before the third time that the loop asks for it, wherever in a step that is."""
    answers = iter([False, False, True])
    monkeypatch.setattr(loop_module, "polite_interrupt", lambda **_: contextlib.nullcontext(lambda: next(answers)))
    config = TrainingConfig(epochs=3, batch_size=16, checkpoint_seconds=1e9, **QUIET)
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), quadrants(), config, tmp_path, on_step=steps.append)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == steps[-1]


def test_an_interrupt_in_the_last_step_stops_after_the_training_is_stored(tmp_path: Path) -> None:
    import os
    import signal

    config = TrainingConfig(epochs=1, batch_size=32, **QUIET)
    last = len(quadrants().train) // 32 + bool(len(quadrants().train) % 32)

    def press_ctrl_c(step: int) -> None:
        if step == last:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), quadrants(), config, tmp_path, on_step=press_ctrl_c)
    steps: list[int] = []
    assert fit(small_model(), quadrants(), config, tmp_path, on_step=steps.append).steps == last
    assert steps == []


def test_two_trainings_cannot_share_a_directory(tmp_path: Path) -> None:
    def second(step: int) -> None:
        fit(small_model(), quadrants(), TrainingConfig(**QUIET), tmp_path)

    with pytest.raises(DynablocksError, match="another training runs"):
        fit(small_model(), quadrants(), TrainingConfig(**QUIET), tmp_path, on_step=second)


def test_a_rank_in_the_environment_makes_one_device_no_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    begun: list[bool] = []

    def second(step: int) -> None:
        fit(small_model(), quadrants(), TrainingConfig(**QUIET), tmp_path)

    with pytest.raises(DynablocksError, match="another training runs"):
        fit(
            small_model(),
            quadrants(),
            TrainingConfig(**QUIET),
            tmp_path,
            on_start=lambda: begun.append(True),
            on_step=second,
        )
    assert begun == [True]
    assert not loop_module.is_first_process(TrainingConfig(devices=2))


def test_the_tasks_of_a_cluster_are_no_processes_of_one_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_fabric import Fabric

    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(RuntimeError, match="ntasks=4"):
        Fabric(accelerator="cpu", devices=1)
    assert fit(small_model(), quadrants(), TrainingConfig(epochs=1, batch_size=48, **QUIET)).steps == 2


def test_one_program_trains_on_several_devices_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "joined", True)
    assert fit(small_model(), quadrants(), TrainingConfig(epochs=1, batch_size=48, **QUIET)).steps == 2
    monkeypatch.setattr("dynablocks.training.session.launched", lambda *given: pytest.fail("launched"))
    with pytest.raises(InvalidArgument, match="trains on several devices once; train the next network in another"):
        fit(small_model(), quadrants(), TrainingConfig(batch_size=16, devices=2, **QUIET))


@pytest.mark.parametrize(
    ("error", "left"), [(Diverged("the loss is not finite"), 0), (KeyboardInterrupt(), 0), (Stopped(), 2)]
)
def test_where_the_first_process_fails_the_others_are_ended(
    error: BaseException, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after a stop that they agreed on; nor are they left in the list in which Fabric looks for killed ones."""
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

    ended: list[int] = []
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 3, 1)
    for number in range(2):
        launcher.procs.append(SimpleNamespace(kill=lambda number=number: ended.append(number)))

    def fails(session: Session, *rest: object) -> None:
        monkeypatch.setattr(session.fabric.strategy, "_launcher", launcher)
        raise error

    monkeypatch.setattr(loop_module, "train", fails)
    with pytest.raises(type(error)):
        fit(small_model(), quadrants(), TrainingConfig(**QUIET))
    assert (len(launcher.procs), ended) == (left, list(range(2 - left)))


def test_the_others_are_ended_where_the_first_process_fails_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    launched = session_module.launched

    def with_another(*given: Any) -> Any:
        fabric = launched(*given)
        other = SimpleNamespace(kill=lambda: ended.append(1))
        monkeypatch.setattr(fabric.strategy, "_launcher", SimpleNamespace(procs=[other]))
        return fabric

    monkeypatch.setattr(session_module, "launched", with_another)
    with pytest.raises(InvalidArgument, match="no trainable parameters"):
        fit(small_model().requires_grad_(False), quadrants(), TrainingConfig(epochs=1, batch_size=48, **QUIET))
    assert ended == [1]


def test_fabrics_advice_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_fabric.utilities.rank_zero import rank_zero_info, rank_zero_only

    told: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    monkeypatch.setattr(rank_zero_only, "rank", 0)
    logger, handler = logging.getLogger("lightning_fabric.utilities.rank_zero"), Noting()
    logger.addHandler(handler)
    with without_advice():
        rank_zero_info("use TF32")
    rank_zero_info("outside")
    logger.removeHandler(handler)
    assert told == ["outside"]


def test_finished_training_returns_at_once(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=1, batch_size=32, ema_decay=0.5, **QUIET)
    model = small_model()
    first = fit(model, quadrants(), config, tmp_path)
    again = small_model()
    assert fit(again, quadrants(), config, tmp_path, on_step=lambda step: pytest.fail("trained")) == first
    assert torch.equal(model[4].weight, again[4].weight)
    with pytest.raises(BadCheckpoint, match="finished training with max_minutes None"):
        fit(
            again, quadrants(), TrainingConfig(epochs=1, batch_size=32, ema_decay=0.5, max_minutes=1, **QUIET), tmp_path
        )


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_finished_training_stores_nothing_to_go_on_from(ema_decay: float, tmp_path: Path) -> None:
    """The checkpoint before, which counts where the last one is damaged, holds all."""
    settings = {"batch_size": 32, "optimiser": "adam", "checkpoint_seconds": 0.0, "ema_decay": ema_decay, **QUIET}
    config, model, again = TrainingConfig(epochs=1, **settings), small_model(), small_model()
    fit(model, quadrants(), config, tmp_path)
    before, last = (read_state(tmp_path / name) for name in ("checkpoint.previous", "checkpoint"))
    averaged = {"weights", "average"} if ema_decay else set()
    assert before.keys() - last.keys() == {"optimiser", "scaler", "random"} | averaged
    assert last.keys() <= before.keys()
    assert before["summary"] is None
    assert last["summary"]["steps"] == last["step"] == before["step"] + 1
    (tmp_path / "checkpoint" / "state.pt").write_bytes(b"broken")
    steps: list[int] = []
    with pytest.warns(UserWarning, match="previous checkpoint"):
        fit(again, quadrants(), config, tmp_path, on_step=steps.append)
    assert steps == [last["step"]]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.parameters(), model.parameters(), strict=True))


class Waited(Exception):
    """Something read a tensor's numbers, for which a GPU must first have done all that was asked of it."""


class NoNumberIsRead(TorchDispatchMode):
    """Refuses what ``item()``, ``float()`` and an ``if`` come down to, and shapes that depend on numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


class NoTensorIsCopied(TorchFunctionMode):
    """Refuses by name what on a CPU copies nothing, and so is not seen below."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "numpy", "tolist"):
            raise Waited(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _waiting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop_module.take_step

    def refusing(session: Any) -> None:
        with NoNumberIsRead(), NoTensorIsCopied():
            step(session)

    monkeypatch.setattr(loop_module, "take_step", refusing)


@pytest.mark.usefixtures("_waiting_is_refused")
@pytest.mark.parametrize("adversary", ["none", "pgd", "trades"])
def test_a_step_waits_for_nothing(adversary: str) -> None:
    # Of labels on a CPU, and of no others, torch's one_hot asks the range: so not with an offset.
    settings = {"loss": "hinge", "ema_decay": 0.9, "gradient_clip": 1.0, "crop_padding": 1, "flip": True}
    config = TrainingConfig(epochs=2, batch_size=48, adversary=adversary, **settings, **QUIET)
    steps: list[int] = []
    fit(small_model(), quadrants(), config, on_step=steps.append)
    assert steps == [1, 2, 3, 4]


@pytest.mark.usefixtures("_waiting_is_refused")
@pytest.mark.parametrize("reading", [float, bool, Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero])
def test_a_step_that_waits_is_seen(reading: Callable[[Tensor], object], monkeypatch: pytest.MonkeyPatch) -> None:
    def wasteful(logits: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, labels)
        reading(loss.detach())
        return loss

    monkeypatch.setattr("dynablocks.training.session.make_loss", lambda config: wasteful)
    with pytest.raises(Waited):
        fit(small_model(), quadrants(), TrainingConfig(epochs=1, batch_size=48, **QUIET))


@pytest.mark.slow
def test_two_processes_train_the_same_network_as_one(tmp_path: Path) -> None:
    import subprocess
    import sys

    from safetensors.torch import load_file

    script = tmp_path / "train.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_training import *\n"
        "config = TrainingConfig(epochs=2, batch_size=16, devices=int(sys.argv[3]), flip=True, **QUIET)\n"
        "fit(small_model(), quadrants(), config, Path(sys.argv[2]))\n"
    )
    weights = []
    for devices in ("1", "2"):
        place = tmp_path / devices
        subprocess.run([sys.executable, script, Path(__file__).parent, place, devices], check=True)
        weights.append(load_file(place / "checkpoint" / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)


def with_two_processes(place: Path, settings: str, on_step: str, at_end: str = "pass") -> Any:
    """Two epochs of six steps in two processes, as a command runs them; it ends with 130 where they were stopped."""
    import os
    import subprocess
    import sys

    script = place / "train.py"
    script.write_text(
        "import glob, os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_training import *\n"
        "from dynablocks.progress import Stopped\n"
        "model = small_model()\n"
        f"def on_step(step):\n    {on_step}\n"
        f"config = TrainingConfig(epochs=2, batch_size=16, devices=2, {settings} **QUIET)\n"
        "try:\n"
        "    fit(model, quadrants(), config, Path(sys.argv[2]), on_step=on_step)\n"
        "except Stopped:\n"
        "    sys.exit(130)\n"
        f"finally:\n    {at_end}\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, script, Path(__file__).parent, place / "run"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(("pressed", "stored", "said"), [(5, 6, "step 6 of 12"), (12, 12, "the last step")])
def test_ctrl_c_in_one_of_two_processes_stops_both_after_the_same_step(
    pressed: int, stored: int, said: str, tmp_path: Path
) -> None:
    """Pressed in the second alone, and heard at the end of the epoch, where both look."""
    second = f"step == {pressed} and os.environ['LOCAL_RANK'] == '1'"
    done = with_two_processes(tmp_path, "", f"if {second}: os.kill(os.getpid(), signal.SIGINT)")
    assert done.returncode == 130, done.stderr
    assert f"Stopped after {said}" in done.stderr
    assert "Traceback" not in done.stderr
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == stored


@pytest.mark.slow
def test_each_of_two_processes_has_the_threads_that_are_asked_for(tmp_path: Path) -> None:
    """Three: Fabric would give each a half of the processors, which may be one or two."""
    done = with_two_processes(tmp_path, "threads=3,", "print(torch.get_num_threads(), flush=True)")
    assert done.returncode == 0, done.stderr
    # Two may print on one line, so that 3 and 3 are 33.
    assert {digit for line in done.stdout.splitlines() if line.isdigit() for digit in line} == {"3"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the names of threads are read from Linux")
@pytest.mark.parametrize("pressed", [0, 6])
def test_no_thread_that_exchanged_is_left_at_the_end_of_a_process(pressed: int, tmp_path: Path) -> None:
    """One that lets a tensor go while Python ends aborts the process: seen once in some ten trainings."""
    told = "print(word, *(open(name).read() for name in glob.glob('/proc/self/task/*/comm')), flush=True)"
    press = f"if step == {pressed}: os.kill(os.getpid(), signal.SIGINT)"
    on_step = f"word = 'within'; {told}\n    {press}"
    done = with_two_processes(tmp_path, "", on_step, f"word = 'after'; {told}")
    assert done.returncode == (130 if pressed else 0), done.stderr
    within, *after = done.stdout.partition("after")
    assert "gloo" in within
    assert "gloo" not in "".join(after)
    assert done.stdout.count("after") == 2


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_of_two_processes_is_told_by_the_first(tmp_path: Path) -> None:
    """In the last step of an epoch, where both look: the second, which alone sees it there, would end the first."""
    second = "step == 5 and os.environ['LOCAL_RANK'] == '1'"
    done = with_two_processes(tmp_path, "", f"if {second}: next(model.parameters()).data.fill_(float('nan'))")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("Diverged: the loss is not finite after step 6") == 1


def test_every_weight_that_is_trained_gets_a_gradient() -> None:
    """Several devices wait for all of them; convolutions of a pixel have no frames to train."""
    model = build(ModelConfig("certified", widths=(4,), layers=(1,), kernel_size=1), (1, 8, 8), 4, seed=0)
    model(torch.rand(2, 1, 8, 8)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def certified_images() -> DataSplits:
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = ImageDataset("noise", images, torch.arange(64) % 4, tuple("abcd"))
    return DataSplits(train, train, train, "noise")


def test_what_fit_leaves_with_an_average_is_what_a_run_loads(tmp_path: Path) -> None:
    """The step that is scheduled ends where it should end, also where the plan ends early."""
    config = TrainingConfig(epochs=None, max_minutes=1e-4, ema_decay=0.9, batch_size=16, **QUIET)
    models = [build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 4, seed=0) for _ in range(2)]
    fit(models[0], certified_images(), config, tmp_path)
    fit(models[1], certified_images(), config, tmp_path)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert models[0].blocks()[0][1].signal.summary() == {"h1": 2.0}


@pytest.mark.parametrize(("seconds", "steps"), [(60.0, (5000, 6000)), (0.5, (101, 101))])
def test_another_budget_counts_when_a_training_goes_on(
    seconds: float, steps: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of its own: 100 steps of 10 ms of a budget of 1.5 s, then another budget."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr("dynablocks.training.session.time", clock)
    monkeypatch.setattr(loop_module, "time", clock)
    config = TrainingConfig(epochs=None, max_minutes=1.5 / 60, batch_size=16, checkpoint_seconds=0.0, **QUIET)

    def tick(step: int) -> None:
        now[0] += 0.01
        if step == 101:
            raise KeyboardInterrupt

    def go_on(step: int) -> None:
        now[0] += 0.01

    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), quadrants(), config, tmp_path, on_step=tick)
    later = replace(config, max_minutes=seconds / 60, checkpoint_seconds=1e9)
    summary = fit(small_model(), quadrants(), later, tmp_path, on_step=go_on)
    assert steps[0] <= summary.steps <= steps[1]
    assert summary.metrics


def test_a_validation_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 4))
    settings = {"lr": 1e25, "schedule": "constant", "loss": "cross-entropy", "optimiser": "sgd"}
    config = TrainingConfig(epochs=1, batch_size=64, **(QUIET | settings))
    with pytest.raises(DynablocksError, match="the validation loss is not finite"):
        fit(network, certified_images(), config, tmp_path)


def test_half_precision_does_not_go_on_without_a_gpu(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=2, batch_size=16, **QUIET)

    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), quadrants(), replace(config, checkpoint_seconds=0), tmp_path, on_step=stop)
    state = loop_module.read_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "read_state", lambda checkpoint: state(checkpoint) | {"precision": "16"})
        with pytest.raises(InvalidArgument, match="began in it: go on on a GPU, or train anew with --overwrite"):
            fit(small_model(), quadrants(), config, tmp_path)


@pytest.mark.parametrize(
    ("step", "waited", "seconds", "due"),
    [
        (10, 7, 0.01, True),
        (10, 7, 1.0, False),
        (10, 51, 1.0, True),
        (10, 61, 9.0, True),
        (11, 59, 0.01, False),
        (11, 61, 0.01, True),
    ],
)
def test_checkpoints_at_ends_of_epochs_take_a_small_share_of_the_time(
    step: int, waited: float, seconds: float, due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: 1000.0 + waited)
    session = SimpleNamespace(
        step=step,
        steps_per_epoch=10,
        plan=SimpleNamespace(total=100),
        last_save=1000.0,
        save_seconds=seconds,
        config=SimpleNamespace(checkpoint_seconds=60.0),
    )
    assert loop_module.is_save_due(session) == due


def test_a_disk_that_is_slower_than_checkpoints_are_due_does_not_get_one_of_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of its own: a step takes a second, a checkpoint 70, and one is due after 60."""
    now, saved = [0.0], list[int]()
    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])

    def slow(directory: Path, model: nn.Module, text: str, state: dict[str, Any]) -> None:
        saved.append(state["step"])
        now[0] += 70.0

    def tick(step: int) -> None:
        now[0] += 1.0

    monkeypatch.setattr("dynablocks.training.session.time", clock)
    monkeypatch.setattr("dynablocks.training.session.save_checkpoint", slow)
    monkeypatch.setattr(loop_module, "time", clock)
    config = TrainingConfig(epochs=1, batch_size=1, checkpoint_seconds=60.0, **QUIET)
    fit(small_model(), quadrants(), config, tmp_path, on_step=tick)
    assert saved == [60, 96]


def test_what_is_validated_is_the_network_that_is_kept() -> None:
    """The averaged weights, without dropout, on all validation images at once."""
    model, splits = small_model(dropout=0.5), quadrants(validation=True)
    config = TrainingConfig(epochs=1, batch_size=32, lr=0.1, ema_decay=0.9, **QUIET)
    found = fit(model, splits, config).metrics
    with torch.no_grad():
        logits = model(splits.train.images.float() / 255)
    expected = nn.functional.cross_entropy(logits, splits.train.labels).item()
    assert found["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["validation_accuracy"] == (logits.argmax(1) == splits.train.labels).double().mean().item()


def test_a_training_of_few_images_at_a_time_validates_few() -> None:
    model, sizes = small_model(), list[int]()
    model.register_forward_pre_hook(lambda module, given: None if module.training else sizes.append(len(given[0])))
    fit(model, quadrants(20, validation=True), TrainingConfig(epochs=1, batch_size=4, **QUIET))
    assert sizes == [16, 4]
    for batch, devices, most in ((1024, 2, 512), (8, 2, 16), (128, 1, 512), (1, 1, 4)):
        session = SimpleNamespace(batch_size=batch, fabric=SimpleNamespace(world_size=devices))
        assert loop_module.validation_batch(session) == most


def test_dropout_follows_the_seed_alone() -> None:
    ends = []
    for before in (0, 1):
        model = small_model(dropout=0.5)
        torch.manual_seed(before)
        fit(model, quadrants(), TrainingConfig(epochs=1, batch_size=32, **QUIET))
        ends.append(model[4].weight.detach().clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_leaves_the_random_state_and_the_threads_as_they_were(fails: bool) -> None:
    model, threads = small_model(dropout=0.5), torch.get_num_threads()
    config = TrainingConfig(epochs=1, batch_size=48, threads=threads + 1, **QUIET)
    torch.manual_seed(7)
    before, inside = torch.get_rng_state(), list[int]()

    def on_step(step: int) -> None:
        inside.append(torch.get_num_threads())
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        fit(model, quadrants(), config, on_step=on_step)
    assert set(inside) == {threads + 1}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), before)
