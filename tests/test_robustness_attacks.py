from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dynablocks.errors import BadData, DynablocksError, InvalidArgument
from dynablocks.models import ModelConfig, build
from dynablocks.robustness import DEFAULT_EPSILONS, LOSSES, AttackConfig, AttackResult, attack, attacks, l2_pgd
from dynablocks.robustness.attacks import _starts, laid_out
from dynablocks.robustness.partial import Partial

EPSILONS = (0.0, 0.1, 0.3, 0.6, 1.0)


class Network(nn.Module):
    """A small convolutional network with random weights, its logits multiplied by ``scale``."""

    def __init__(self, scale: float = 1.0, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input_shape, self.num_classes, self.scale = (1, 8, 8), classes, scale
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(512, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.layers(x)


def images(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def predicted(model: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixels).argmax(dim=1)


def foolbox_pgd(model: nn.Module, pixels: Tensor, labels: Tensor, epsilons: tuple[float, ...], **options: object):
    import foolbox

    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
    _, clipped, broken = foolbox.attacks.L2PGD(steps=10, **options)(wrapped, pixels, labels, epsilons=list(epsilons))
    return torch.stack(clipped), broken.T


@pytest.mark.parametrize("relative_step_size", [0.025, 0.25])
def test_without_random_start_it_is_foolbox_image_by_image(relative_step_size):
    model, pixels = Network(), images(64)
    labels = predicted(model, pixels)
    theirs, broken = foolbox_pgd(
        model, pixels, labels, EPSILONS[1:], rel_stepsize=relative_step_size, random_start=False
    )
    ours = l2_pgd(
        model, pixels, labels, EPSILONS[1:], relative_step_size=relative_step_size, random_start=False, steps=10
    )
    assert (ours - theirs).abs().max() < 1e-5
    config = AttackConfig(
        EPSILONS, losses=("ce",), early_drop=False, random_start=False, relative_step_size=relative_step_size
    )
    assert torch.equal(attack(model, (pixels, labels), config).broken["ce"][:, 1:], broken)


def test_with_random_start_it_agrees_with_foolbox_in_accuracy():
    model, pixels = Network(), images(400)
    labels = predicted(model, pixels)
    torch.manual_seed(3)
    _, broken = foolbox_pgd(model, pixels, labels, EPSILONS)
    result = attack(model, (pixels, labels), AttackConfig(EPSILONS, losses=("ce",), early_drop=False))
    ours = torch.tensor(result.robust_accuracy_by_loss["ce"])
    theirs = (~broken).double().mean(dim=0)
    assert (ours - theirs).abs().max() < 3 * (2 * 0.25 / 400) ** 0.5
    assert 0.05 < ours[-1] < 0.95, "the comparison would be empty"


@pytest.mark.parametrize("random_start", [False, True])
def test_scaled_logits_fool_cross_entropy_but_not_margin_and_dlr(random_start):
    model, pixels = Network(scale=1e5), images(40)
    labels = predicted(model, pixels)
    plain = Network()
    with torch.no_grad():
        top = plain.eval()(pixels).topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 0.05
    data = (pixels[clear], labels[clear])
    assert len(data[0]) > 15
    config = AttackConfig((2.0,), relative_step_size=0.25, random_start=random_start)
    alone = attack(model, data, dataclasses.replace(config, early_drop=False)).robust_accuracy_by_loss
    if not random_start:
        _, theirs = foolbox_pgd(model, *data, (2.0,), rel_stepsize=0.25, random_start=False)
        assert not theirs.any()
        assert alone["ce"] == (1.0,)
    assert alone["ce"][0] > 0.8
    assert alone["margin"] == (0.0,)
    assert alone["dlr"] == (0.0,)
    assert attack(model, data, config).robust_accuracy == (0.0,)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e20])
def test_margin_ignores_the_scale_of_the_logits(scale):
    pixels = images(16)
    labels = predicted(Network(), pixels)
    config = {"loss": "margin", "random_start": False}
    plain = l2_pgd(Network(), pixels, labels, 0.5, **config)
    assert (l2_pgd(Network(scale=scale), pixels, labels, 0.5, **config) - plain).abs().max() < 1e-4


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_perturbation_is_truly_inside(loss, dtype):
    model, pixels = Network().to(dtype), images(32).to(dtype)
    pixels[:8] = pixels[:8].round()
    labels = predicted(model, pixels)
    radii = (1e-9, 1e-6, 1e-3, 0.1, 1.0, 30.0)
    for random_start in (False, True):
        found = l2_pgd(model, pixels, labels, radii, loss=loss, relative_step_size=1.0, random_start=random_start)
        norms = (found.double() - pixels.double()).flatten(2).norm(dim=2)
        assert (norms <= torch.tensor(radii, dtype=torch.float64)[:, None]).all()
        assert found.min() >= 0
        assert found.max() <= 1
        assert (norms[3] > 0.05).all(), "shrinking must not undo the attack"


def test_losses_against_their_formulas():
    logits = torch.tensor([[3.0, 1.0, 2.5, -1.0], [0.0, 4.0, 1.0, 2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    assert LOSSES["margin"](logits, labels).tolist() == [-0.5, 4.0]
    assert LOSSES["dlr"](logits, labels).tolist() == [-0.5 / 2.0, 4.0 / 3.0]
    assert LOSSES["dlr"](logits[:, :2], labels).tolist() == [-2.0, 4.0]
    assert LOSSES["dlr"](logits[:, :3], labels).tolist() == [-0.5 / 2.0, 4.0 / 4.0]
    expected = logits.logsumexp(1) - logits[:, 0]
    assert torch.allclose(LOSSES["ce"](logits, labels), expected, rtol=1e-14, atol=1e-14)


def test_results_do_not_depend_on_the_batch_size():
    model, pixels = Network().double(), images(30)
    labels = predicted(model, pixels.double())
    results = [attack(model, (pixels, labels), AttackConfig(EPSILONS, batch_size=size, restarts=2)) for size in (7, 30)]
    assert all(torch.equal(results[0].broken[name], results[1].broken[name]) for name in LOSSES)


@pytest.mark.parametrize("random_start", [False, True])
def test_radii_together_are_attacked_as_each_alone(random_start: bool) -> None:
    """They are more rows than a batch takes."""
    model, pixels = Network().double(), images(60).double()
    labels = predicted(model, pixels)
    assert len(pixels) < AttackConfig().batch_size < len(EPSILONS) * len(pixels)
    together, *alone = (
        l2_pgd(model, pixels, labels, radii, loss="margin", steps=3, random_start=random_start)
        for radii in (EPSILONS, *EPSILONS)
    )
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-9)


class Viewing(nn.Module):
    """The identity, by code that takes images with the channels first alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).view(x.shape)


def coloured() -> tuple[nn.Module, Tensor]:
    network = build(ModelConfig("certified", widths=(4,), layers=(1,)), (3, 8, 8), 5, seed=0).double()
    return network, torch.rand(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_networks_of_the_library_alone_are_given_the_channels_last() -> None:
    network, pixels = coloured()
    last = laid_out(network, pixels)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, pixels)
    assert laid_out(nn.Flatten(), pixels) is pixels
    labels = predicted(network, pixels)
    network.body.insert(0, Viewing())
    assert laid_out(network, pixels) is pixels
    config = AttackConfig((0.5,), steps=2, losses=("margin",))
    assert attack(network, (pixels, labels), config).clean_accuracy == 1.0
    assert l2_pgd(network, pixels, labels, 0.5, steps=2).is_contiguous()


def test_the_layout_of_the_pixels_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    network, pixels = coloured()
    data, config = (pixels, predicted(network, pixels)), AttackConfig((0.3, 1.0, 3.0), steps=3, restarts=2)
    last, adversarial = attack(network, data, config), l2_pgd(network, *data, 1.0)
    monkeypatch.setattr("dynablocks.robustness.attacks.laid_out", lambda model, pixels: pixels)
    first = attack(network, data, config)
    assert all(torch.equal(last.broken[name], first.broken[name]) for name in LOSSES)
    torch.testing.assert_close(last.smallest_broken_norm, first.smallest_broken_norm, rtol=1e-9, atol=1e-9)
    assert adversarial.is_contiguous()
    torch.testing.assert_close(adversarial, l2_pgd(network, *data, 1.0), rtol=0, atol=1e-9)


def test_every_restart_sample_loss_and_seed_starts_elsewhere() -> None:
    pixels = images(2)

    def starts(samples: tuple[int, ...] = (0, 1), loss: str = "ce", restart: int = 0, seed: int = 0) -> Tensor:
        drawn = _starts(pixels, samples, AttackConfig(seed=seed), loss, restart, {})
        assert drawn is not None
        return drawn

    first = starts()
    assert torch.equal(first, starts())
    assert (first.flatten(1).norm(dim=1) <= 1).all()
    for other in (starts(restart=1), starts((2, 3)), starts(loss="margin"), starts(seed=1)):
        assert ((other - first).flatten(1).norm(dim=1) > 0.1).all()
    assert (first[0] - first[1]).norm() > 0.1


def test_starts_are_drawn_once_for_all_radii_unless_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = Network(), images(6)
    config = AttackConfig(EPSILONS, steps=2, restarts=2, losses=("ce", "margin"), early_drop=False, batch_size=4)
    seeds, mixed = list[int](), attacks._mixed_seed

    def counted(*of: int | str) -> int:
        seeds.append(mixed(*of))
        return seeds[-1]

    monkeypatch.setattr(attacks, "_mixed_seed", counted)
    results = []
    for most, radii in ((4 * 2 * pixels.numel(), 1), (4 * 2 * pixels.numel() - 1, len(EPSILONS) - 1)):
        monkeypatch.setattr(attacks, "_KEPT_BYTES", most)
        seeds.clear()
        results.append(attack(model, (pixels, predicted(model, pixels)), config).tensors())
        assert len(set(seeds)) == 2 * 2 * 6
        assert len(seeds) == radii * 2 * 2 * 6
    assert all(torch.equal(results[1][name], found) for name, found in results[0].items())


@pytest.mark.parametrize("early_drop", [True, False])
def test_of_several_restarts_the_worst_counts(early_drop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of no length stay where they start: away from the other class, across its edge, or just across."""
    away, far, near = -0.9, 0.9, 0.6
    starts = [(away, away, away, away), (away, away, far, away), (far, away, away, near)]

    def given(
        pixels: Tensor, samples: Sequence[int], config: AttackConfig, loss: str, restart: int, drawn: object
    ) -> Tensor:
        lengths = torch.tensor([starts[sample][restart] for sample in samples])
        return (lengths[:, None] * torch.tensor([-1.0, 1.0]) / 2**0.5).reshape(pixels.shape)

    monkeypatch.setattr("dynablocks.robustness.attacks._starts", given)
    # The pixels are the logits, so the edge is at 0.05/√2 = 0.0354.
    data = (torch.tensor([[[[0.55, 0.5]]]]).repeat(3, 1, 1, 1), torch.zeros(3, dtype=torch.int64))
    config = AttackConfig((0.1,), steps=1, relative_step_size=1e-9, losses=("ce",), early_drop=early_drop)
    one, four = (attack(nn.Flatten(), data, dataclasses.replace(config, restarts=count)) for count in (1, 4))
    assert one.broken["ce"].tolist() == [[False], [False], [True]]
    assert four.broken["ce"].tolist() == [[False], [True], [True]]
    inf, last = float("inf"), 0.09 if early_drop else 0.06
    assert one.smallest_broken_norm.tolist() == pytest.approx([inf, inf, 0.09], abs=1e-6)
    assert four.smallest_broken_norm.tolist() == pytest.approx([inf, 0.09, last], abs=1e-6)


def test_early_drop_only_adds_breaks_and_is_monotone():
    model, pixels = Network(), images(60)
    labels = predicted(model, pixels)
    labels[:5] = (labels[:5] + 1) % 5
    full = attack(model, (pixels, labels), AttackConfig(EPSILONS, early_drop=False))
    quick = attack(model, (pixels, labels), AttackConfig(EPSILONS))
    assert torch.equal(full.worst_broken, quick.worst_broken)
    for hit in quick.broken.values():
        assert hit[:5].all()
        assert (hit[:, 1:] >= hit[:, :-1]).all()
    assert quick.robust_accuracy[0] == quick.clean_accuracy == 55 / 60
    assert all(min(v[k] for v in quick.robust_accuracy_by_loss.values()) >= quick.robust_accuracy[k] for k in range(5))
    index = quick.smallest_broken_epsilon_index
    assert index[:5].tolist() == [0] * 5
    for k, epsilon in enumerate(EPSILONS):
        assert (quick.smallest_broken_norm[index == k] <= epsilon).all()
    assert torch.isinf(quick.smallest_broken_norm[index == len(EPSILONS)]).all()


def test_what_broke_at_one_radius_is_broken_at_all_larger_ones() -> None:
    model, pixels = Network(), images(2)
    data, config = (pixels, predicted(model, pixels)), AttackConfig((0.1, 0.2, 0.3), steps=1, losses=("ce", "margin"))
    broken = {
        "ce": torch.tensor([[True, False, False], [False, False, False]]),
        "margin": torch.tensor([[False, False, False], [False, True, False]]),
    }
    # What the attack itself found may be shorter.
    unknown = torch.full((2,), torch.inf, dtype=torch.float64)
    result = dataclasses.replace(attack(model, data, config), broken=broken, smallest_broken_norm=unknown)
    assert result.robust_accuracy == (0.5, 0.0, 0.0)
    assert result.smallest_broken_epsilon_index.tolist() == [0, 1]


class Sloping(nn.Module):
    """Two pixels p, q to the logits 0 and q - 10 p - 0.8, whose gradient leaves the cube where p is 0."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1).unbind(1)
        return torch.stack([0 * first, second - 10 * first - 0.8], dim=1)


def test_what_was_found_at_a_larger_radius_breaks_the_smaller_one_that_it_is_within() -> None:
    """Ten steps of 0.4 ε go 0.398 ε along q, of which 0.3 are needed."""
    data = torch.tensor([[[[0.0, 0.5]]]]), torch.tensor([0])
    result = attack(Sloping(), data, AttackConfig((0.0, 0.5, 1.0), losses=("margin",), random_start=False))
    assert result.smallest_broken_norm.item() == pytest.approx(0.398, abs=1e-3)
    assert result.robust_accuracy == (1.0, 0.0, 0.0)
    assert result.smallest_broken_epsilon_index.tolist() == [1]
    # Of one loss alone it is Foolbox's figure: what that attack finds at each radius on its own.
    assert result.robust_accuracy_by_loss == {"margin": (1.0, 1.0, 0.0)}
    stored = AttackResult.restore(result.summary(), result.tensors())
    assert torch.equal(stored.worst_broken, result.worst_broken)
    # The norm of what was found at a radius may be rounded to above it.
    above = dataclasses.replace(result, smallest_broken_norm=torch.tensor([1.0 + 2.0**-52], dtype=torch.float64))
    assert above.robust_accuracy == (1.0, 1.0, 0.0)


def test_kept_examples_are_what_they_say():
    model, pixels = Network(), images(12)
    labels = predicted(model, pixels)
    result = attack(model, (pixels, labels), AttackConfig((0.2, 2.0), examples=12))
    assert torch.equal(predicted(model, result.examples), result.example_predictions)
    norms = (result.examples.double() - pixels.double()).flatten(1).norm(dim=1)
    assert torch.allclose(norms, result.example_norms, rtol=1e-12, atol=0)
    broke = result.example_predictions != labels
    assert torch.equal(broke, torch.isfinite(result.smallest_broken_norm))
    assert torch.equal(result.example_norms[broke], result.smallest_broken_norm[broke])
    assert set(result.example_losses) <= set(LOSSES)
    assert broke.any()


def test_the_model_comes_back_as_it_was():
    model = Network().train()
    model.layers[0].eval()
    model.layers[4].bias.requires_grad_(False)
    before = [(m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    labels = torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        attack(model, (images(4), labels), AttackConfig((0.1,)))
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(DynablocksError, match="labels range from 7 to 7"):
        attack(model, (images(4), labels + 7), AttackConfig((0.1,)))
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before


def test_uint8_images_and_progress():
    model = Network()
    raw = (images(6) * 255).to(torch.uint8)
    labels = predicted(model, raw.float() / 255)
    fractions: list[float] = []
    result = attack(model, (raw, labels), AttackConfig(EPSILONS, samples=4), fractions.append)
    same = attack(model, (raw.float() / 255, labels), AttackConfig(EPSILONS, samples=4))
    assert torch.equal(result.worst_broken, same.worst_broken)
    assert len(result.labels) == 4
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_summary_and_tensors_restore_the_result():
    import json

    model, pixels = Network(), images(6)
    result = attack(model, (pixels, predicted(model, pixels)), AttackConfig(EPSILONS))
    again = AttackResult.restore(json.loads(json.dumps(result.summary())), result.tensors())
    assert again.config == result.config
    assert again.robust_accuracy == result.robust_accuracy
    assert again.summary() == result.summary()


def test_a_curve_is_of_the_losses_that_were_used_alone() -> None:
    model, pixels = Network(), images(4)
    result = attack(model, (pixels, predicted(model, pixels)), AttackConfig(EPSILONS, steps=1, losses=("margin",)))
    assert result.curve("margin").accuracies == result.robust_accuracy_by_loss["margin"]
    with pytest.raises(InvalidArgument, match=r"loss 'dlr' was not used; used were margin\."):
        result.curve("dlr")


class Bad(nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> object:
        return self.result(x) if callable(self.result) else self.result


LABELS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("data", "kind", "sentence"),
    [
        ((images(3) * 255, LABELS), BadData, "pixel values"),
        ((images(3) - 0.5, LABELS), BadData, "pixel values"),
        ((images(3) * torch.nan, LABELS), BadData, "pixel values"),
        ((images(3).long(), LABELS), BadData, "uint8"),
        ((images(3)[0], LABELS), BadData, "shape"),
        ((images(3)[:, :, :4], LABELS), BadData, "the model takes"),
        ((images(3), LABELS[:2]), BadData, "shape"),
        ((images(0), LABELS[:0]), BadData, "no images"),
        ((images(3), LABELS + 5), BadData, "labels range"),
        ((images(3), LABELS - 1), BadData, "labels range"),
        ((images(3), LABELS.float()), BadData, "integer"),
    ],
)
def test_bad_data_gets_one_sentence(data, kind, sentence):
    for run in (lambda: attack(Network(), data), lambda: l2_pgd(Network(), *data, 0.1)):
        with pytest.raises(kind, match=sentence) as caught:
            run()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (lambda x: x.flatten(1) * torch.inf, "not finite"),
        (lambda x: x.flatten(1) * torch.nan, "not finite"),
        (lambda x: x, "are needed"),
        (lambda x: x.flatten(1)[:, :1], "are needed"),
        (lambda x: x.flatten(1).detach(), "autograd"),
        ("text", "are needed"),
    ],
)
def test_bad_models_get_one_sentence(result, sentence):
    with pytest.raises(InvalidArgument, match=sentence):
        attack(Bad(result), (images(3), LABELS), AttackConfig((0.1,), early_drop=False))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilons": ()}, "epsilons is empty"),
        ({"epsilons": (-0.1,)}, "epsilon is -0.1; allowed are values in [0, inf)"),
        ({"epsilons": (0.2, 0.1)}, "epsilons are [0.2, 0.1]; give each once, in increasing order"),
        ({"epsilons": (0.1, 0.1)}, "epsilons are [0.1, 0.1]; give each once, in increasing order"),
        ({"epsilons": (float("nan"),)}, "epsilon is nan; a finite number"),
        ({"epsilons": (0.5, 1e30)}, "epsilon is 1e+30; allowed are values in [0, 1e+06]"),
        ({"steps": 0}, "steps is 0; a whole number from 1"),
        ({"steps": 1.5}, "steps is 1.5; a whole number from 1"),
        ({"relative_step_size": 0.0}, "relative_step_size is 0.0; allowed are values in (0, 1e+06]"),
        ({"relative_step_size": 1e30}, "relative_step_size is 1e+30; allowed are values in (0, 1e+06]"),
        ({"restarts": 2, "random_start": False}, "restarts is 2 but random_start is off"),
        ({"losses": ()}, "losses are []; give one or more"),
        ({"losses": ("ce", "ce")}, "losses are ['ce', 'ce']; give one or more"),
        ({"losses": ("hinge",)}, "unknown attack loss 'hinge'"),
        ({"samples": 0}, "samples is 0; a whole number from 1"),
        ({"batch_size": 0}, "batch_size is 0; a whole number from 1"),
        ({"seed": -1}, "seed is -1; a whole number from 0"),
    ],
)
def test_bad_configurations_get_one_sentence(options, words):
    with pytest.raises(InvalidArgument, match=re.escape(words)) as caught:
        AttackConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_whose_format_steps_round_away_is_refused(dtype: torch.dtype) -> None:
    """In bfloat16 no step leaves 3/4, where numbers are 1/256 apart; 100 pixels moved by one such gap do it."""
    model, pixels = nn.Sequential(nn.Flatten(), nn.Linear(256, 2)), torch.full((1, 1, 16, 16), 0.75)
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.tensor([1.0, -1.0]).repeat(128) / 16, torch.zeros(256)]))
        model[1].bias.copy_(torch.tensor([0.02, 0.0]))
    moved = pixels.flatten(1).clone()
    moved[:, :200:2] -= 2.0**-8
    labels = torch.tensor([0])
    assert predicted(model, pixels).tolist() == [0]
    assert predicted(model, moved.reshape(pixels.shape)).tolist() == [1]
    assert float((moved - pixels.flatten(1)).norm()) < 0.05
    config = AttackConfig((0.05,), random_start=False)
    assert attack(model, (pixels, labels), config).robust_accuracy == (0.0,)
    coarse = copy.deepcopy(model).to(dtype)
    for run in (lambda: attack(coarse, (pixels, labels), config), lambda: l2_pgd(coarse, pixels, labels, 0.05)):
        with pytest.raises(InvalidArgument, match=r"the model is torch\.b?float16, .*; attack model\.float\(\)\."):
            run()


def test_default_epsilons_hold_the_stable_ones():
    wanted = {0.0, 36 / 255, 72 / 255, 108 / 255, 0.5, 1.0, 8 / 255, 16 / 255, 0.3, 0.6, 0.8}
    assert set(DEFAULT_EPSILONS) == wanted
    assert list(DEFAULT_EPSILONS) == sorted(wanted)


class Killed(Exception):
    """Nothing after this instant is run."""


def attack_until(rounds: int, config: AttackConfig, partial: Partial) -> None:
    """The attack on twelve images, killed after so many rounds."""
    model, pixels = Network(), images(12)
    done: list[float] = []

    def progress(fraction: float) -> None:
        done.append(fraction)
        if len(done) == rounds:
            raise Killed

    with pytest.raises(Killed):
        attack(model, (pixels, wrong_labels(model, pixels)), config, progress, partial)


def wrong_labels(model: nn.Module, pixels: Tensor) -> Tensor:
    labels = predicted(model, pixels)
    labels[:2] = (labels[:2] + 1) % 5
    return labels


def same_bits(found: AttackResult, wanted: AttackResult) -> bool:
    pairs = [(tensor, wanted.tensors()[name]) for name, tensor in found.tensors().items()]
    return found.summary() == wanted.summary() and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("early_drop", [True, False])
@pytest.mark.parametrize("rounds", [1, 11, 23])
def test_a_killed_attack_goes_on_to_the_same_bits(
    rounds: int, early_drop: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynablocks.progress.LINE_SECONDS", 0.0)
    config = AttackConfig((0.0, 0.2, 0.6, 2.0), restarts=2, steps=3, batch_size=5, examples=4, early_drop=early_drop)
    model, pixels = Network(), images(12)
    data = (pixels, wrong_labels(model, pixels))
    undisturbed = attack(model, data, config)
    file = tmp_path / "attack.partial.safetensors"
    attack_until(rounds, config, Partial(file, "weights", config))
    fractions: list[float] = []
    found = attack(model, data, config, fractions.append, Partial(file, "weights", config))
    assert same_bits(found, undisturbed)
    # Of 24 rounds; the first call says where it goes on.
    assert fractions == [number / 24 for number in range(rounds, 25)]
    assert any(found.example_losses)


def test_what_another_attack_left_or_damaged_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynablocks.progress.LINE_SECONDS", 0.0)
    config = AttackConfig((0.2, 0.6), steps=2, losses=("margin",), restarts=2)
    model, pixels = Network(), images(12)
    file = tmp_path / "partial.safetensors"
    attack_until(2, config, Partial(file, "weights", config))
    assert Partial(file, "weights", config).read()[0] == 2
    for other in (Partial(file, "other weights", config), Partial(file, "weights", AttackConfig())):
        assert other.read() == (0, {})
    content = file.read_bytes()
    for damage in (content[:-9], content[:20], b"", b"{}"):
        file.write_bytes(damage)
        assert Partial(file, "weights", config).read() == (0, {})
        fractions: list[float] = []
        attack(model, (pixels, predicted(model, pixels)), config, fractions.append, Partial(file, "weights", config))
        assert len(fractions) == 4
    Partial(file).remove()
    Partial(file).remove()
    assert list(tmp_path.iterdir()) == []


def test_what_was_found_is_stored_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dynablocks.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    partial = Partial(tmp_path / "partial.safetensors")
    stored = []
    for second in range(0, 200, 25):
        now[0] = float(second)
        partial.write(second, {"norm": torch.zeros(1)})
        stored.append(partial.read()[0])
    assert stored == [0, 0, 0, 75, 75, 75, 150, 150]


class Rounding(nn.Module):
    """Pixels to bytes and back, whose gradient is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (255 * x).round() / 255


class Unnumbered(nn.Module):
    """The identity, whose gradient is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (0 * x).sqrt()


def blind(first: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    model, pixels = nn.Sequential(first, Network()), Rounding()(images(8))
    return model, pixels, predicted(model, pixels)


@pytest.mark.parametrize("first", [Rounding, Unnumbered])
@pytest.mark.parametrize("losses", [("margin",), ("dlr",), ("ce", "margin"), ("ce",)])
@pytest.mark.parametrize("early_drop", [True, False])
def test_a_model_without_gradients_does_not_pass_for_a_robust_one(
    first: type[nn.Module], losses: tuple[str, ...], early_drop: bool
) -> None:
    model, pixels, labels = blind(first())
    config = AttackConfig((0.0, 0.02, 2.0), steps=3, losses=losses, early_drop=early_drop)
    with pytest.raises(InvalidArgument, match="all gradients of Sequential are 0 or not finite") as caught:
        attack(model, (pixels, labels), config)
    assert "\n" not in str(caught.value)
    for random_start in (True, False):
        with pytest.raises(InvalidArgument, match=r"within epsilon 0\.02"):
            l2_pgd(model, pixels, labels, (0.0, 0.02), loss=losses[-1], steps=3, random_start=random_start)
    # What the network behind it shows breaks it.
    found = l2_pgd(Network(), pixels, labels, 2.0, loss="margin")
    assert (predicted(model, found) != labels).any()


@pytest.mark.parametrize("epsilon", [0.01, 0.005, 0.0025])
def test_a_change_that_rounds_away_in_all_pixels_together_is_seen_in_few(epsilon: float) -> None:
    """Bytes hide moves below 1/510 = 0.00196: of 64 entries ε/8 each, but not 0.0025 of 16, of 4 or of one."""
    model, pixels, labels = blind(Rounding())
    spread = torch.where(pixels < 0.5, pixels + epsilon / 8, pixels - epsilon / 8).clamp(0, 1)
    with torch.no_grad():
        assert torch.equal(model(spread), model(pixels))
    with pytest.raises(InvalidArgument, match=rf"all gradients .* within epsilon {epsilon:g}, "):
        attack(model, (pixels, labels), AttackConfig((epsilon,), steps=2, losses=("margin",)))
    with pytest.raises(InvalidArgument, match=rf"all gradients .* within epsilon {epsilon:g}, "):
        l2_pgd(model, pixels, labels, epsilon, loss="margin", steps=2)


def test_where_no_gradient_is_needed_none_is_asked_for() -> None:
    """At the radius 0, and of images that are wrong already."""
    model, pixels, labels = blind(Rounding())
    assert attack(model, (pixels, labels), AttackConfig((0.0,))).robust_accuracy == (1.0,)
    assert torch.equal(l2_pgd(model, pixels, labels, 0.0, loss="margin", steps=2), pixels)
    wrong = (labels + 1) % 5
    for early_drop in (True, False):
        config = AttackConfig((0.1,), steps=2, early_drop=early_drop)
        assert attack(model, (pixels, wrong), config).robust_accuracy == (0.0,)
    for loss in ("ce", "margin"):
        assert l2_pgd(model, pixels, wrong, 0.1, loss=loss, steps=2).shape == pixels.shape


@pytest.mark.parametrize("count", [1, 3])
def test_cross_entropy_alone_may_be_saturated(count: int) -> None:
    """Its gradient is 0 in floating point at logits 5e4 apart; that of the margin, asked of each batch, is not."""
    pixels = torch.tensor([0.55, 0.5]).repeat(count, 1).reshape(count, 1, 1, 2)
    model, labels = Bad(lambda x: 1e6 * x.flatten(1)), torch.zeros(count, dtype=torch.int64)
    config = AttackConfig((0.1,), steps=3, losses=("ce",), random_start=False, batch_size=2)
    assert attack(model, (pixels, labels), config).robust_accuracy == (1.0,)
    assert torch.equal(l2_pgd(model, pixels, labels, 0.1, steps=3, random_start=False), pixels)
    stronger = dataclasses.replace(config, losses=("ce", "margin"))
    assert attack(model, (pixels, labels), stronger).robust_accuracy == (0.0,)


def test_a_margin_gradient_at_one_image_of_a_later_batch_is_enough() -> None:
    """Of saturated logits, where a ReLU is off at the first image."""
    model = Bad(lambda x: torch.stack([0 * x.flatten(), 1e6 * (x.flatten() - 0.5).relu() - 3e5], dim=1))
    pixels, labels = torch.tensor([0.1, 0.7]).reshape(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    config = AttackConfig((0.45,), steps=2, losses=("ce",), random_start=False, batch_size=1)
    assert attack(model, (pixels, labels), config).robust_accuracy == (1.0,)
    with pytest.raises(InvalidArgument, match="all gradients of Bad are 0"):
        attack(model, (pixels[:1], labels[:1]), config)


def test_a_constant_model_is_attacked() -> None:
    constant = Bad(lambda x: 0 * x.flatten(1)[:, :5] + torch.arange(5.0))
    labels = torch.tensor([4, 4, 0])
    found = attack(constant, (images(3), labels), AttackConfig(EPSILONS, steps=2))
    assert found.robust_accuracy == pytest.approx((2 / 3,) * 5)
    assert l2_pgd(constant, images(3), labels, 1.0, loss="margin", steps=2).shape == (3, 1, 8, 8)


def test_one_image_with_a_gradient_is_enough() -> None:
    """Of ReLUs that are all off the gradient is 0, and the other class is far away."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        for layer, weight, bias in ((model[1], [[1.0]], [-0.5]), (model[3], [[0.0], [1.0]], [0.25, 0.0])):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.copy_(torch.tensor(bias))
    pixels, config = torch.tensor([0.1, 0.6]).reshape(2, 1, 1, 1), AttackConfig((0.2,), losses=("margin",))
    assert attack(model, (pixels, torch.tensor([0, 0])), config).robust_accuracy == (0.5,)
    assert attack(model, (pixels[:1], torch.tensor([0])), config).robust_accuracy == (1.0,)


def test_a_killed_attack_remembers_that_nothing_had_a_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynablocks.progress.LINE_SECONDS", 0.0)
    model, pixels, labels = blind(Rounding())
    config, file = AttackConfig((0.5,), steps=1, losses=("margin", "ce")), tmp_path / "partial.safetensors"

    def killed(fraction: float) -> None:
        if fraction == 1.0:
            raise Killed

    with pytest.raises(Killed):
        attack(model, (pixels, labels), config, killed, Partial(file))
    assert Partial(file).read()[0] == 2
    with pytest.raises(InvalidArgument, match="all gradients"):
        attack(model, (pixels, labels), config, partial=Partial(file))
