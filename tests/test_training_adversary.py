"""Adversarial training and TRADES, against closed forms, hand-written formulas and unshared gradients."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_training import QUIET, double_model, metric_lines, quadrants, small_model
from test_training_checkpoint import Killed, killed_at, weights_digest
from torch import Tensor, nn

import dynablocks.training.adversary as adversary_module
import dynablocks.training.loop as loop_module
from dynablocks.data import DataSplits, ImageDataset, batch_indices, load_data
from dynablocks.errors import InvalidArgument
from dynablocks.linear import shared_weights
from dynablocks.models import ModelConfig, build
from dynablocks.robustness.attacks import l2_pgd
from dynablocks.training import LOSSES, TrainingConfig, fit, hinge, make_loss
from dynablocks.training.adversary import Attack, attacked, ball_points, climbing_objective, divergence
from dynablocks.training.config import ADVERSARIES, UNREAD
from dynablocks.training.losses import logit_scale

EPSILON = 0.3


def lead(direction: Tensor) -> nn.Module:
    """Logits (0, ⟨w, x⟩) of a linear classifier."""

    class Lead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value = x.flatten(1) @ direction
            return torch.stack([torch.zeros_like(value), value], 1)

    return Lead()


def attack_of(model: nn.Module, pixels: Tensor, labels: Tensor, config: TrainingConfig) -> Tensor:
    start = ball_points(pixels, len(pixels), slice(None), config.seed, 0, 0)
    return attacked(model, pixels, labels, start, config, make_loss(config), nullcontext())


def orthogonal_network() -> nn.Module:
    config = ModelConfig("certified", widths=(8, 8), layers=(1, 1), dense_width=16, dense_layers=1)
    return build(config, (1, 8, 8), 4, seed=0).double()


def images(count: int = 6, channels: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.rand(count, channels, 8, 8, dtype=dtype), torch.arange(count) % 4


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("label", [0, 1])
def test_the_adversary_of_a_linear_classifier_is_its_closed_form(loss: str, label: int) -> None:
    pixels = 0.5 + 0.05 * torch.randn(5, 1, 8, 8, dtype=torch.float64)
    w = torch.randn(64, dtype=torch.float64)
    # A step of the whole radius halves the angle to the steepest direction.
    config = TrainingConfig(
        loss=loss,
        margin=40.0,
        adversary="pgd",
        adversary_epsilon=EPSILON,
        adversary_steps=30,
        adversary_step_size=1.0,
    )
    labels = torch.full((5,), label)
    found = attack_of(lead(w), pixels, labels, config)
    sign = 1 if label == 0 else -1
    expected = pixels + sign * EPSILON * (w / w.norm()).view(1, 1, 8, 8)
    assert (found - expected).abs().max() < EPSILON * 2**-29
    if loss == "hinge":
        rise = hinge(lead(w)(found), labels, 40.0) - hinge(lead(w)(pixels), labels, 40.0)
        assert rise.item() == pytest.approx(EPSILON * w.norm().item(), rel=1e-9)
    backwards = Attack(EPSILON, 30, -1.0)
    climb = climbing_objective(config, make_loss(config))
    twin = backwards(pixels, torch.zeros_like(pixels), lambda x: climb(lead(w)(x), labels))
    assert (twin - expected).abs().max() > 0.01


def test_the_loss_rises_where_the_hinge_is_flat_and_where_the_softmax_is_saturated() -> None:
    w, pixels, labels = torch.ones(64), torch.full((2, 1, 8, 8), 0.5), torch.tensor([1, 1])
    for loss, scale in (("hinge", 1.0), ("cross-entropy", 100.0)):
        config = TrainingConfig(loss=loss, adversary="pgd", adversary_epsilon=EPSILON, adversary_steps=4)
        model = lead(scale * w)
        at_rest = pixels.clone().requires_grad_(True)
        (flat,) = torch.autograd.grad(make_loss(config)(model(at_rest), labels), at_rest)
        assert not flat.any()
        fall = (model(pixels) - model(attack_of(model, pixels, labels, config)))[:, 1]
        assert fall.min().item() > 0.9 * EPSILON * scale * 8


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_climbing_objective_has_the_direction_of_the_loss(loss: str) -> None:
    config = TrainingConfig(loss=loss, margin=5.0)
    logits, labels = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 5, (6,))
    (ours,) = torch.autograd.grad(climbing_objective(config, make_loss(config))(logits, labels), logits)
    (theirs,) = torch.autograd.grad(make_loss(config)(logits, labels), logits)
    cosine = torch.nn.functional.cosine_similarity(ours, theirs)
    assert cosine.min().item() == pytest.approx(1.0, abs=1e-12)


def test_a_loss_of_ones_own_is_attacked_as_it_is() -> None:
    config, labels = TrainingConfig(), torch.tensor([0, 1])
    object.__setattr__(config, "loss", "mine")
    assert climbing_objective(config, lambda z, y: z.mean())(torch.ones(2, 3), labels) == 2


@pytest.mark.parametrize("adversary", ["pgd", "trades"])
@pytest.mark.parametrize("epsilon", [1e-3, 0.14, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perturbations_stay_in_the_ball_and_in_the_pixel_range(
    adversary: str, epsilon: float, dtype: torch.dtype
) -> None:
    pixels, labels = images(6, 3, dtype)
    pixels[:2] = pixels[:2].round()
    model = build(ModelConfig("resnet", widths=(8,), layers=(1,)), (3, 8, 8), 4, seed=0).to(dtype)
    config = TrainingConfig(adversary=adversary, adversary_epsilon=epsilon, adversary_steps=3)
    found = attack_of(model, pixels, labels, config)
    distances = (found.double() - pixels.double()).flatten(1).norm(dim=1)
    assert found.min() >= 0
    assert found.max() <= 1
    assert distances.max() <= epsilon
    assert distances[2:].min() > 0.5 * min(epsilon, 1.0)
    assert (found.dtype, found.requires_grad) == (dtype, False)


def test_the_ball_test_rejects_an_attack_that_takes_the_radius_as_it_is() -> None:
    pixels = torch.rand(64, 3, 32, 32) * 0.5 + 0.25
    start = torch.randn_like(pixels)

    class Careless(Attack):
        def _radius(self, clean: Tensor) -> float:
            return self.epsilon

    def farthest(attack: Attack) -> float:
        found = attack(pixels, start, lambda x: x.square().sum())
        return (found.double() - pixels.double()).flatten(1).norm(dim=1).max().item()

    assert farthest(Careless(0.1, 2, 1.0)) > 0.1
    assert 0.1 * (1 - 1e-3) < farthest(Attack(0.1, 2, 1.0)) <= 0.1


def test_starts_are_uniform_in_the_ball_and_a_function_of_the_seeds() -> None:
    like = torch.zeros(4000, 1, 1, 3)
    points = ball_points(like, 4000, slice(None), 1, 2, 3)
    radii = points.flatten(1).norm(dim=1).double()
    assert radii.max() <= 1 + 1e-6
    # A uniform point's radius has P(r <= s) = s³; 4,000 draws stay within 1.95 / √4000 of it with probability 0.999.
    steps = torch.linspace(0, 1, 21, dtype=torch.float64)
    assert all(abs((radii <= s).double().mean() - s**3) < 1.95 / math.sqrt(4000) for s in steps)
    assert points.mean((0, 1, 2)).abs().max() < 0.04
    assert torch.equal(points, ball_points(like, 4000, slice(None), 1, 2, 3))
    assert not torch.equal(points, ball_points(like, 4000, slice(None), 1, 2, 4))
    halves = [ball_points(like[rank::2], 4000, slice(rank, None, 2), 1, 2, 3) for rank in (0, 1)]
    assert all(torch.equal(half, points[rank::2]) for rank, half in enumerate(halves))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_divergence_is_its_formula(scale: float) -> None:
    clean, moved = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = 0.0
    for z, v in zip(clean.tolist(), moved.tolist(), strict=True):
        p, q = ([math.exp(x / scale) / sum(math.exp(y / scale) for y in row) for x in row] for row in (z, v))
        expected += scale / 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert divergence(clean, moved, scale).item() == pytest.approx(expected, rel=1e-12)
    assert divergence(moved, clean, scale).item() != pytest.approx(expected, rel=1e-3)
    assert divergence(clean, clean, scale) == 0
    inputs = (clean.requires_grad_(), moved.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: divergence(a, b, scale), inputs)


def test_trades_finds_a_larger_divergence_than_its_start() -> None:
    model, (pixels, labels) = orthogonal_network(), images()
    config = TrainingConfig(adversary="trades", adversary_epsilon=EPSILON, adversary_steps=4)
    start = (pixels + EPSILON * ball_points(pixels, len(pixels), slice(None), 0, 0, 0)).clamp(0, 1)
    clean, found = model(pixels), model(attack_of(model, pixels, labels, config))
    assert divergence(clean, found, logit_scale(config)) > 2 * divergence(clean, model(start), logit_scale(config))


def parameters_after_a_step(model: nn.Module, config: TrainingConfig) -> list[Tensor]:
    fit(model, quadrants(16), config)
    return [p.detach().double().clone() for p in model.parameters()]


def one_step(**changes: object) -> TrainingConfig:
    settings = {"epochs": 1, "batch_size": 16, "lr": 0.1, "momentum": 0.0, "schedule": "constant"}
    return TrainingConfig(**settings, **QUIET, **changes)


def lively_model() -> nn.Module:
    """Logits that an attack moves by about as much as they differ."""
    model = double_model()
    with torch.no_grad():
        model[4].weight.mul_(8)
    return model


def test_a_step_of_trades_is_its_formula() -> None:
    settings = {"loss": "cross-entropy", "trades_beta": 3.0, "adversary_epsilon": 1.0}
    model, config = lively_model(), one_step(adversary="trades", **settings)
    data, chosen = quadrants(16).train, batch_indices(16, 16, config.seed, 0)[0]
    pixels, labels = data.images[chosen].float() / 255, data.labels[chosen]
    moved = attack_of(model, pixels, labels, config)
    start = pixels + ball_points(pixels, 16, slice(None), config.seed, 0, 0)

    def after_a_step(beta: float, x: Tensor, *, backwards: bool = False) -> list[Tensor]:
        log_p, log_q = model(pixels).log_softmax(1), model(x).log_softmax(1)
        above, below = (log_q, log_p) if backwards else (log_p, log_q)
        divergences = (above.exp() * (above - below)).sum(1)
        loss = (beta * divergences - log_p.gather(1, labels[:, None]).squeeze(1)).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return [p.detach() - 0.1 * g for p, g in zip(model.parameters(), gradients, strict=True)]

    def distance(expected: list[Tensor]) -> float:
        return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))

    found = parameters_after_a_step(lively_model(), config)
    # The weights are in float64; only the pixels of the attack are rounded to float32.
    assert distance(after_a_step(3.0, moved)) < 1e-5
    broken = [after_a_step(6.0, moved), after_a_step(3.0, start.clamp(0, 1)), after_a_step(3.0, moved, backwards=True)]
    assert min(map(distance, broken)) > 1e-4


def test_trades_measures_logits_by_the_margin_of_the_hinge_in_the_attack_and_in_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scales: list[float] = []

    def recorded(clean: Tensor, moved: Tensor, scale: float) -> Tensor:
        scales.append(scale)
        return divergence(clean, moved, scale)

    for module in (adversary_module, loop_module):
        monkeypatch.setattr(module, "divergence", recorded)
    fit(double_model(), quadrants(16), one_step(adversary="trades", adversary_steps=2, loss="hinge", margin=0.25))
    # Two steps of the attack, then the loss.
    assert scales == [0.25] * 3
    assert logit_scale(TrainingConfig(loss="hinge", margin=0.0)) == 1.0


def test_a_step_of_the_attack_is_two_radii_over_the_steps_and_at_most_one() -> None:
    sizes = [Attack.of(TrainingConfig(adversary_steps=steps)).step_size for steps in (1, 2, 4)]
    assert sizes == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("adversary", ["pgd", "trades"])
def test_a_tiny_radius_gives_the_plain_step_in_the_limit(adversary: str) -> None:
    def distance(epsilon: float) -> float:
        config = one_step(adversary=adversary, adversary_epsilon=epsilon)
        found = parameters_after_a_step(small_model(), config)
        return max((a - b).abs().max().item() for a, b in zip(found, plain, strict=True))

    plain = parameters_after_a_step(small_model(), one_step())
    assert distance(1e-9) < 1e-6
    assert distance(1e-3) < 1e-3
    assert distance(0.5) > 20 * distance(1e-2) > 0


@pytest.mark.parametrize("adversary", ["pgd", "trades"])
@pytest.mark.parametrize("loss", ["hinge", "offset-cross-entropy"])
def test_gradients_with_shared_weights_are_those_of_an_unshared_run(adversary: str, loss: str) -> None:
    model, (pixels, labels) = orthogonal_network(), images()
    config = TrainingConfig(adversary=adversary, loss=loss, adversary_epsilon=EPSILON)
    loss_function = make_loss(config)

    def outer(moved: Tensor) -> Tensor:
        if adversary == "pgd":
            return loss_function(model(moved), labels)
        clean = model(pixels)
        return loss_function(clean, labels) + 6.0 * divergence(clean, model(moved), logit_scale(config))

    with shared_weights(model):
        moved = attack_of(model, pixels, labels, config)
        assert all(p.grad is None for p in model.parameters())
        shared = torch.autograd.grad(outer(moved), list(model.parameters()), allow_unused=True)
    alone = attack_of(model, pixels, labels, config)
    assert (alone - moved).abs().max() < 1e-12
    unshared = torch.autograd.grad(outer(alone), list(model.parameters()), allow_unused=True)
    largest = max(g.abs().max() for g in unshared if g is not None)
    for ours, theirs in zip(shared, unshared, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours - theirs).abs().max() <= 1e-12 * largest
    broken = torch.autograd.grad(outer(pixels), list(model.parameters()), allow_unused=True)
    assert max((a - b).abs().max() for a, b in zip(broken, unshared, strict=True) if a is not None) > 1e-4 * largest


def test_the_attack_leaves_modes_memory_format_and_no_gradients_behind() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 4)]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pixels, labels = images(4, 3, torch.float32)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    config = TrainingConfig(adversary="pgd")
    found = attack_of(model, pixels, labels, config)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, attack_of(model, pixels, labels, config))
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("adversary", ["pgd", "trades"])
def test_the_attack_takes_no_weight_gradient_and_computes_a_weight_once(
    adversary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynablocks.linear import OrthogonalConv

    calls: list[object] = []
    original = OrthogonalConv.compute_weights
    monkeypatch.setattr(OrthogonalConv, "compute_weights", lambda self, a: calls.extend(a) or original(self, a))
    config = ModelConfig("certified", widths=(8,), layers=(2,), dense_layers=1)
    model = build(config, (1, 8, 8), 4, seed=0)
    convolutions = sum(isinstance(m, OrthogonalConv) for m in model.modules())
    calls.clear()
    steps: list[int] = []
    fit(model, quadrants(32), one_step(adversary=adversary, adversary_steps=5), on_step=steps.append)
    assert len(steps) == 2
    assert len(calls) == 2 * convolutions


SETTINGS = {
    "pgd": {"adversary": "pgd", "loss": "hinge", "crop_padding": 1, "flip": True},
    "trades": {"adversary": "trades", "ema_decay": 0.9, "adversary_steps": 1},
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_resumed_training_ends_with_the_very_bits(name: str, tmp_path: Path) -> None:
    config = TrainingConfig(epochs=2.5, batch_size=16, checkpoint_seconds=0.0, **SETTINGS[name], **QUIET)
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    fit(small_model(dropout=0.2), quadrants(), config, calm)
    for step in (1, 2, 6, 7, 13):
        with pytest.raises(Killed):
            fit(small_model(dropout=0.2), quadrants(), config, rough, on_step=killed_at(step))
    fit(small_model(dropout=0.2), quadrants(), config, rough)
    assert weights_digest(calm) == weights_digest(rough)
    timing = ("seconds", "images_per_second")
    lines = [[{k: v for k, v in x.items() if k not in timing} for x in metric_lines(p)] for p in (calm, rough)]
    assert lines[0] == lines[1]


def test_starts_that_forget_the_step_are_seen_by_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_process_state(like: Tensor, count: int, share: slice, *seeds: int) -> Tensor:
        draws = torch.randn(like.shape, generator=generator)
        return draws / draws.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    config = TrainingConfig(epochs=2, batch_size=16, checkpoint_seconds=0.0, adversary="pgd", **QUIET)
    monkeypatch.setattr(loop_module, "ball_points", from_process_state)
    generator = torch.Generator().manual_seed(0)
    fit(small_model(), quadrants(), config, tmp_path / "calm")
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(Killed):
        fit(small_model(), quadrants(), config, tmp_path / "rough", on_step=killed_at(3))
    fit(small_model(), quadrants(), config, tmp_path / "rough")
    assert weights_digest(tmp_path / "calm") != weights_digest(tmp_path / "rough")


@pytest.mark.parametrize("adversary", ["pgd", "trades"])
def test_bf16_trains_adversarially(adversary: str) -> None:
    config = TrainingConfig(
        epochs=10,
        batch_size=16,
        optimiser="adam",
        precision="bf16",
        device="cpu",
        adversary=adversary,
        adversary_epsilon=0.1,
    )
    summary = fit(small_model(), quadrants(), config)
    assert summary.precision == "bf16"
    assert summary.metrics["accuracy"] > 0.6


def some_digits(count: int) -> DataSplits:
    splits = load_data("digits")
    part = ImageDataset("digits", splits.train.images[:count], splits.train.labels[:count], splits.train.class_names)
    return DataSplits(part, None, splits.test, "part")


def dense_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model.input_shape, model.num_classes = (1, 8, 8), 10
    return model


@pytest.mark.parametrize("loss", ["cross-entropy", "hinge"])
def test_adversarial_training_raises_the_accuracy_under_attack(loss: str) -> None:
    splits, robust = some_digits(1000), {}
    for adversary in ("none", "pgd", "trades"):
        model = dense_model()
        fit(
            model,
            splits,
            TrainingConfig(
                epochs=12,
                batch_size=50,
                optimiser="adam",
                lr=0.005,
                loss=loss,
                margin=1.0,
                adversary=adversary,
                **({} if adversary == "none" else {"adversary_epsilon": 0.6}),
                **QUIET,
            ),
        )
        pixels, labels = splits.test.images[:200] / 255, splits.test.labels[:200]
        broken = l2_pgd(model, pixels, labels, 0.6, loss="margin", steps=10)
        robust[adversary] = (model(broken).argmax(1) == labels).float().mean().item()
    print(loss, robust)
    assert robust["pgd"] > robust["none"] + 0.05
    assert robust["trades"] > robust["none"] + 0.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adversary": "pdg"}, "adversary"),
        ({"adversary_epsilon": 0.0}, "adversary_epsilon"),
        ({"adversary_steps": 0}, "adversary_steps is 0"),
        ({"adversary_step_size": -1.0}, "adversary_step_size"),
        ({"trades_beta": -1.0}, "trades_beta"),
    ],
)
def test_a_bad_setting_gets_one_sentence(settings: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as error:
        TrainingConfig(**settings)
    assert "\n" not in str(error.value)


OTHERS = {"adversary_epsilon": 0.3, "adversary_steps": 3, "adversary_step_size": 0.3, "trades_beta": 2.0}


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_what_an_adversary_leaves_unread_changes_nothing_and_all_else_does(
    adversary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {f.name for f in fields(TrainingConfig) if f.name.startswith(("adversary_", "trades_"))} == set(OTHERS)
    monkeypatch.setattr(TrainingConfig, "require_settings", lambda self: None)
    plain = parameters_after_a_step(lively_model(), one_step(adversary=adversary))
    for name, value in OTHERS.items():
        found = parameters_after_a_step(lively_model(), one_step(adversary=adversary, **{name: value}))
        same = all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))
        assert same == (name in UNREAD[adversary])


@pytest.mark.parametrize(
    ("adversary", "name"), [(adversary, name) for adversary in ADVERSARIES for name in UNREAD[adversary]]
)
def test_a_setting_that_the_adversary_leaves_unread_begins_no_training(
    adversary: str, name: str, tmp_path: Path
) -> None:
    config = one_step(adversary=adversary, **{name: OTHERS[name]})
    sentence = f"{name} is {OTHERS[name]}, which changes nothing with adversary {adversary}; leave it out."
    with pytest.raises(InvalidArgument, match=re.escape(sentence)):
        fit(small_model(), quadrants(16), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    default = next(f.default for f in fields(TrainingConfig) if f.name == name)
    one_step(adversary=adversary, **{name: default}).require_settings()


def test_a_training_that_an_older_version_began_with_an_unread_setting_goes_on(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=2, batch_size=16, checkpoint_seconds=0.0, adversary_epsilon=0.3, **QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingConfig, "require_settings", lambda self: None)
        with pytest.raises(Killed):
            fit(small_model(), quadrants(), config, tmp_path, on_step=killed_at(3))
    assert fit(small_model(), quadrants(), config, tmp_path).steps == 12
