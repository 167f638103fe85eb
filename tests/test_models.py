"""Every named network: it builds, says what it guarantees, and keeps it while it is trained."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynablocks.blocks import DynamicalBlock
from dynablocks.config import CERTIFIED_PRESETS, PAPER_MODELS, PRESETS, preset_settings
from dynablocks.errors import InvalidArgument
from dynablocks.linear import ORTHOGONAL
from dynablocks.models import MODELS, ModelConfig, ModelKind, build, certified
from dynablocks.models.config import BALANCES, DENSE_STEPS, STEPS, WEIGHTS
from dynablocks.models.network import SHARED
from dynablocks.norms import DenseMetric, SpectralMetric, _spectral_factors
from dynablocks.properties import declare, explain
from dynablocks.properties.jacobians import jacobian_norms
from dynablocks.registry import Registry
from dynablocks.seeding import seeded
from dynablocks.switching import REGIONS, LearnedStep, ScheduledSignal, keep_constraints, project, set_progress

EVERY_MODEL = pytest.mark.parametrize("name", sorted(MODELS.keys() - {"convnet"}))
"""But for the one that has no dynamical blocks and no bound: tests/test_teacher.py."""
TINY = {"widths": (3, 4), "layers": (1, 1)}
CERTIFIED = {
    "orthogonal": {},
    "learned step": {"step_rule": "learned"},
    "preconditioned": {"step": "preconditioned"},
    "exact": {"step": "exact"},
    "exact, network budget": {"step": "exact", "balance": "network"},
    "preconditioned, zeros": {"step": "preconditioned", "padding": "same"},
    "full": {"padding": "full"},
    "half of the rows": {"rows": 0.5, "padding": "circular"},
    "dense": {"dense_layers": 2, "dense_width": 6},
    "potential": {"step": "potential", "dense_layers": 2, "dense_step": "potential", "dense_rows": 0.5},
    "potential, zeros": {"step": "potential", "padding": "same"},
    "dense, a quarter of the directions": {"dense_layers": 2, "dense_rows": 0.25, "layers": (1, 0)},
}


@EVERY_MODEL
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_models_build_for_digits_and_cifar(name: str, shape: tuple[int, int, int]) -> None:
    model = build(ModelConfig(name, widths=(4, 4, 5), layers=(1, 0, 1)), shape, 10)
    assert model(torch.rand(2, *shape)).shape == (2, 10)
    assert model.input_shape == shape
    assert model.num_classes == 10
    constant, weight = model.certificate_inputs()
    assert 0 < constant < math.inf
    assert weight.shape == (10, 5 * (shape[1] // 8) ** 2)
    assert weight.dtype == torch.float64
    assert not weight.requires_grad
    with pytest.raises(InvalidArgument, match=r"the network takes \(batch, "):
        model(torch.rand(2, shape[0], 9, 9))
    with pytest.raises(InvalidArgument, match="the images have shape"):
        model(torch.rand(*shape))
    assert f"Network {name}" in str(explain(model))


@pytest.mark.parametrize("options", CERTIFIED.values(), ids=CERTIFIED)
def test_the_certified_model_is_non_expansive_at_every_progress(options: dict) -> None:
    # In training mode maps divided by their norm take it from power iteration, and declare what that is off by.
    model = build(ModelConfig("certified", **TINY | options), (1, 8, 8), 5).eval()
    for progress in (0.0, 0.5, 1.0):
        set_progress(model, progress)
        project(model)
        assert model.certificate_inputs()[0] <= 1 + 1e-4


@pytest.mark.parametrize("rows", [0.25, 0.5, 1.0])
def test_a_step_of_length_two_that_moves_some_directions_keeps_gradient_norms(rows: float) -> None:
    model = build(ModelConfig("certified", widths=(8,), layers=(2,), rows=rows, padding="circular"), (1, 8, 8), 3)
    set_progress(model, 1.0)
    project(model)
    model.double()
    x = torch.randn(8, 4, 4, dtype=torch.float64)
    for _, block in model.blocks():
        jacobian = torch.autograd.functional.jacobian(lambda y, step=block: step(y[None])[0], x).reshape(128, 128)
        values = torch.linalg.svdvals(jacobian)
        torch.testing.assert_close(values, torch.ones(128, dtype=torch.float64), rtol=0, atol=1e-4)
        moved = torch.linalg.matrix_rank(jacobian - torch.eye(128, dtype=torch.float64), tol=1e-3)
        assert 0 < int(moved) <= 128 * rows


@pytest.mark.parametrize("rows", [0.25, 0.5])
def test_dense_steps_of_length_two_reflect_at_most_their_share_of_directions(rows: float) -> None:
    options = {"widths": (4,), "layers": (0,), "dense_layers": 2, "dense_rows": rows}
    model = build(ModelConfig("certified", **options), (1, 8, 8), 3)
    set_progress(model, 1.0)
    project(model)
    model.double()
    x = torch.randn(64, dtype=torch.float64)
    assert len(model.blocks()) == 2
    for _, block in model.blocks():
        jacobian = torch.autograd.functional.jacobian(lambda y, step=block: step(y[None])[0], x)
        torch.testing.assert_close(jacobian @ jacobian.mT, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-4)
        moved = int(torch.linalg.matrix_rank(jacobian - torch.eye(64, dtype=torch.float64), tol=1e-3))
        assert 0 < moved <= 64 * rows


def test_the_metric_model_of_one_stage_has_its_dense_steps() -> None:
    config = ModelConfig("metric", widths=(4,), layers=(1,), dense_layers=2, dense_width=8)
    model = build(config, (1, 8, 8), 3)
    assert len(model.blocks()) == 3
    assert model.head.in_shape == (8,)
    assert_sound(trained(model, 5))


def test_a_metric_of_other_images_certifies_nothing() -> None:
    model = build(ModelConfig("certified", **TINY), (1, 8, 8), 3)
    for metric in (SpectralMetric((1, 4, 4)), DenseMetric(torch.eye(2))):
        with pytest.raises(InvalidArgument, match="not one of images"):
            model.certificate_inputs(metric)
    assert model.certificate_inputs(SpectralMetric((1, 8, 8)))[0] > 0


def test_a_metric_first_asked_for_in_inference_mode_serves_training_later() -> None:
    _spectral_factors.cache_clear()
    model = build(ModelConfig("metric", widths=(4,), layers=(1,)), (1, 8, 8), 3)
    with torch.inference_mode():
        model(torch.rand(1, 1, 8, 8))
    model(torch.rand(1, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_longest_wavelength_leaves_a_constant_image_alone_smooth() -> None:
    assert SpectralMetric((1, 4, 4), 0.01, 1e9).eigenvalues == pytest.approx((0.01, 1.0), rel=1e-9, abs=0)


@pytest.mark.parametrize("wavelength", [0.5, 1.1e9, 1e90])
def test_a_wavelength_out_of_range_is_refused(wavelength: float) -> None:
    """The fourth power of 2π/1e90 is 0, and the weight of a constant image would be 0/0."""
    allowed = r"wavelength is .*; allowed are values in \[1, 1e\+09\]\.$"
    with pytest.raises(InvalidArgument, match=f"^{allowed}"):
        SpectralMetric((1, 4, 4), 0.01, wavelength)
    with pytest.raises(InvalidArgument, match=f"^metric_{allowed}"):
        ModelConfig("metric", metric_wavelength=wavelength)


def test_every_part_of_the_default_certified_model_declares_a_constant() -> None:
    model = build(ModelConfig("certified"), (1, 8, 8), 10)
    parts = declare(model).parts[0][1].parts
    assert all(part.properties.lipschitz <= 1 + 1e-5 for _, part in parts)
    assert len(model.blocks()) == 9
    assert all(isinstance(block, DynamicalBlock) for _, block in model.blocks())


def trained(model, steps: int = 25):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    keep_constraints(model, optimiser)
    x, labels = torch.rand(16, *model.input_shape), torch.randint(model.num_classes, (16,))
    for step in range(steps):
        set_progress(model, step / steps)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


def assert_sound(model) -> float:
    """The body's largest Jacobian norm at many points is at most the declared constant of the very same weights."""
    exact = copy.deepcopy(model).double()
    x = torch.rand(24, *model.input_shape, dtype=torch.float64)
    declared = exact.certificate_inputs()[0]
    measured = float(jacobian_norms(exact.body, x).max())
    assert measured <= declared * (1 + 1e-12)
    return declared


@EVERY_MODEL
def test_the_declared_constant_holds_after_training(name: str) -> None:
    assert_sound(trained(build(ModelConfig(name, **TINY), (1, 8, 8), 4)))


@pytest.mark.parametrize("options", CERTIFIED.values(), ids=CERTIFIED)
def test_certified_variants_stay_certified_after_training(options: dict) -> None:
    model = trained(build(ModelConfig("certified", **TINY | options), (1, 8, 8), 4))
    assert assert_sound(model) <= 1 + 1e-5
    assert model.certificate_inputs()[0] <= 1 + 1e-4


@pytest.mark.parametrize("name", ["prescribed", "flexible"])
@pytest.mark.parametrize("region", sorted(REGIONS))
@pytest.mark.parametrize("balance", ["pair", "network"])
def test_pair_models_in_every_region_stay_non_expansive_where_weights_are_orthogonal(
    name: str, region: str, balance: str
) -> None:
    config = ModelConfig(
        name,
        **TINY,
        region=region,
        balance=balance,
        weights="orthogonal",
        padding="circular",
        normalise=False,
        bound="tight",
    )
    model = trained(build(config, (1, 8, 8), 4), steps=8)
    for _, block in model.blocks():
        if balance == "pair":
            assert block.properties.lipschitz <= 1 + 1e-4
    assert math.prod(block.properties.lipschitz for _, block in model.blocks()) <= 1 + 1e-4
    assert_sound(model)


def test_two_builds_from_one_seed_agree_and_leave_the_global_state_alone() -> None:
    state = torch.random.get_rng_state()
    one, other = (build(ModelConfig("certified", **TINY), (1, 8, 8), 3, seed=5) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    x = torch.rand(2, 1, 8, 8)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_a_seed_is_for_the_weights_and_reaches_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.Generator().manual_seed(5).get_state()
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with seeded(5):
        assert torch.equal(torch.get_rng_state(), expected)
    build(ModelConfig("certified", **TINY), (1, 8, 8), 3, seed=5)
    assert not seeds
    torch.manual_seed(5)
    assert seeds == [5]


def test_pixel_normalisation_counts_in_the_certificate() -> None:
    options = dict(TINY, normalise=True)
    model = build(ModelConfig("certified", **options), (1, 8, 8), 3, mean=(0.3,), std=(0.25,))
    assert model.certificate_inputs()[0] == pytest.approx(4.0, rel=1e-4)
    assert_sound(model)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: build(ModelConfig("certifed"), (1, 8, 8), 3), "did you mean 'certified'"),
        (lambda: build(ModelConfig("certified", widths=(4, 4)), (1, 8, 8), 3), "differ in length"),
        (lambda: build(ModelConfig("certified", **TINY), (1, 7, 7), 3), "7 x 7 pixels cannot be folded by 4 "),
        (lambda: build(ModelConfig("resnet", widths=(2,) * 4, layers=(0,) * 4), (1, 8, 8), 3), "below one pixel"),
        (lambda: ModelConfig("certified", widths=(0,)), "whole numbers from 1"),
        (lambda: ModelConfig("certified", widths=8), r"widths is 8; whole numbers from 1 .*, such as \[2, 3\]"),
        (lambda: ModelConfig("certified", layers="2"), "layers is '2'; whole numbers from 0"),
        (lambda: ModelConfig("certified", layers=(True,)), r"layers is \[True\]"),
        (lambda: ModelConfig("certified", normalise="false"), "normalise is 'false'; True or False"),
        (lambda: ModelConfig("certified", normalise=1), "normalise is 1; True or False"),
        (lambda: ModelConfig("certified", slope=2.0), "slope is 2.0"),
        (lambda: ModelConfig("certified", rows=0.0), "rows is 0.0"),
        (lambda: ModelConfig("certified", rows=1.5), "rows is 1.5"),
        (lambda: ModelConfig("certified", dense_rows=0.0), "dense_rows is 0.0"),
        (lambda: ModelConfig("certified", dense_layers=1.5), "dense_layers is 1.5"),
        (lambda: ModelConfig("certified", dense_width=0.25), "dense_width is 0.25"),
        (lambda: ModelConfig("certified", stem=True), "stem is True"),
        (
            lambda: build(ModelConfig("certified", **TINY, dense_layers=1, dense_width=99), (1, 8, 8), 3),
            "at most the 16 features",
        ),
        (lambda: build(ModelConfig("certified", **TINY, dense_width=9), (1, 8, 8), 3), "give dense_layers >= 1"),
        (lambda: ModelConfig("certified", padding="sames"), "did you mean 'same'"),
        (lambda: build(ModelConfig("prescribed", **TINY, region="tihgt"), (1, 8, 8), 3), "did you mean 'tight'"),
    ],
)
def test_bad_configurations_get_one_sentence(make, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        make()


FLAGS = re.compile(r"--model\.stem (\d+) --model\.widths '(\[[\d,]+\])' --model\.layers '(\[[\d,]+\])'\.$")


@pytest.mark.parametrize("side", [28, 30, 9, 7])
@pytest.mark.parametrize(("name", "stages", "stem"), [("certified", 3, 2), ("certified", 3, 4), ("metric", 4, 2)])
def test_images_that_the_stages_do_not_fit_are_told_of_settings_that_do(
    name: str, stages: int, stem: int, side: int
) -> None:
    """In terms of the images that a person has: nobody knows of the 7 x 7 ones that two folds leave of 28 x 28."""
    shape = (1, side, 2 * side)
    config = ModelConfig(name, widths=(4, 5, 6, 7)[:stages], layers=(1, 0, 1, 0)[:stages], stem=stem)
    with pytest.raises(InvalidArgument, match=f"images of {side} x {2 * side} pixels cannot be folded by") as error:
        build(config, shape, 3)
    found = FLAGS.search(str(error.value))
    assert found is not None
    fitting = replace(config, stem=int(found[1]), widths=json.loads(found[2]), layers=json.loads(found[3]))
    assert build(fitting, shape, 3)(torch.rand(2, *shape)).shape == (2, 3)


def test_the_cpu_preset_takes_images_of_28_pixels_with_two_stages() -> None:
    settings = preset_settings("cpu", "certified", "folder")["model"]
    with pytest.raises(InvalidArgument, match=r"divisible by 8, or give .* '\[32,64\]' --model.layers '\[2,3\]'\.$"):
        build(ModelConfig("certified", **settings), (1, 28, 28), 10)
    two = settings | {"widths": (32, 64), "layers": (2, 3)}
    assert build(ModelConfig("certified", **two), (1, 28, 28), 10)(torch.rand(1, 1, 28, 28)).shape == (1, 10)


def test_dense_steps_of_large_images_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = preset_settings("certified/cpu-15min", "certified", "folder")["model"]
    said = r"50,176 features have a matrix of 1,258,815,488 numbers.* give --model.dense_width 1024, take --preset cpu"
    with pytest.raises(InvalidArgument, match=said):
        build(ModelConfig("certified", **settings), (3, 224, 224), 10)
    # Of 16 features: a step of 8 x 16 numbers, or 4 x 16 that leave 4 features, and a step of 2 x 4.
    for width, entries in ((0, 128), (4, 64)):
        config = ModelConfig("certified", **TINY, dense_layers=1, dense_width=width, dense_rows=0.5)
        monkeypatch.setattr(certified, "MOST_DENSE_ENTRIES", entries)
        build(config, (1, 8, 8), 3)
        monkeypatch.setattr(certified, "MOST_DENSE_ENTRIES", entries - 1)
        with pytest.raises(InvalidArgument, match=f"16 features have a matrix of {entries} numbers"):
            build(config, (1, 8, 8), 3)


ELSEWHERE = {
    "lift": "paper",
    "method": "expm",
    "padding": "full",
    "rows": 0.5,
    "slope": 0.25,
    "substeps": 3,
    "region": "tight",
    "balance": "network",
    "step_penalty": 2.0,
    "step": "exact",
    "step_start": 0.7,
    "step_end": 1.5,
    "step_until": 0.5,
    "step_rule": "learned",
    "stem": 4,
    "dense_width": 4,
    "dense_layers": 1,
    "dense_rows": 0.5,
    "dense_step": "potential",
    "weights": "free",
    "penalty": 0.5,
    "expansive_penalty": 0.5,
    "metric_smooth": 0.5,
    "metric_wavelength": 4.0,
}
"""A value, not the default, of each setting that some model does not have."""


class Recorded(ModelConfig):
    """A configuration that notes which settings the functions that build bodies read."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        if Path(sys._getframe(1).f_code.co_filename).name in ("paper.py", "certified.py", "convnet.py", "metric.py"):
            self.read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_has_the_settings_that_it_reads_and_refuses_others(name: str) -> None:
    kind, settings = MODELS[name], {field.name for field in fields(ModelConfig)}
    Recorded.read.clear()
    ways: list[dict[str, Any]] = [{"weights": weights} for weights in WEIGHTS if "weights" in kind.settings]
    ways += [{"step": step} for step in STEPS] if "step" in kind.settings else []
    ways += [{"dense_layers": 1, "dense_step": step} for step in DENSE_STEPS] if "step" in kind.settings else []
    for way in ways or [{}]:
        kind.build_body(Recorded(name, **TINY, **way).completed(kind.defaults), (1, 8, 8))
    # Pairs of exact steps have the region of that name and orthonormal rows, whatever the configuration says.
    own = {"region", "weights", "penalty", "expansive_penalty"} if "step" in kind.settings else set()
    assert Recorded.read & settings - SHARED - own == kind.settings
    for other in settings - kind.settings - SHARED:
        value = ELSEWHERE[other]
        with pytest.raises(InvalidArgument, match=f"{other} is {value!r}, but model {name} has no such setting; leave"):
            build(ModelConfig(name, **TINY, **{other: value}), (1, 8, 8), 3)
    build(kind.defaults, (3, 32, 32), 3)


OF_STEPS = {"slope", "balance", "step_penalty", "step_start", "step_end", "step_until", "step_rule"}
"""What some steps read and others do not, besides the rows, which presets set."""


@pytest.mark.parametrize("dense", [0, 1])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["certified", "metric"])
def test_a_setting_of_other_steps_is_refused(name: str, step: str, dense: int) -> None:
    kind, options = MODELS[name], TINY | {"step": step, "dense_layers": dense}
    Recorded.read.clear()
    kind.build_body(Recorded(name, **options).completed(kind.defaults), (1, 8, 8))
    # Pairs of exact flows hand the weight on to their signal, which has no penalty for it.
    expected = (OF_STEPS - Recorded.read) | {"step_penalty"}
    assert set(kind.unread(ModelConfig(name, **options))) == expected
    for other in expected:
        with pytest.raises(InvalidArgument, match=f"{other} is .*, which changes nothing with (step|balance) "):
            build(ModelConfig(name, **options, **{other: ELSEWHERE[other]}), (1, 8, 8), 3)
    for other in OF_STEPS - expected:
        build(ModelConfig(name, **options, **{other: ELSEWHERE[other]}), (1, 8, 8), 3)


@pytest.mark.parametrize("other", ["stem", "rows", "step", "slope", "balance", "step_penalty"])
def test_a_metric_model_of_one_width_refuses_the_settings_of_stages(other: str) -> None:
    kind, value = MODELS["metric"], (ELSEWHERE | {"stem": 2})[other]
    single: dict[str, Any] = {"widths": (4,), "layers": (1,)}
    for step in STEPS:
        Recorded.read.clear()
        kind.build_body(Recorded("metric", **single, step=step).completed(kind.defaults), (1, 8, 8))
        assert other not in Recorded.read
    config = ModelConfig("metric", **single, **{other: value})
    with pytest.raises(InvalidArgument, match=f"{other} is .*, which changes nothing with one width; leave it out"):
        build(config, (1, 8, 8), 3)
    stored = config.completed(kind.defaults)
    assert build(stored, (1, 8, 8), 3).config == stored
    more = {"step": "exact", "balance": "penalty"} if other in ("slope", "balance", "step_penalty") else {}
    build(ModelConfig("metric", **TINY, **more | {other: value}), (1, 8, 8), 3)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("certified", {"step_rule": "learned", "step_end": 1.5}, "step_rule learned"),
        ("metric", {"step_rule": "learned", "step_until": 0.5}, "step_rule learned"),
        ("certified", {"step": "exact", "balance": "network", "step_penalty": 2.0}, "balance network"),
        ("prescribed", {"step_penalty": 2.0}, "balance pair"),
        ("flexible", {"balance": "network", "step_penalty": 2.0}, "balance network"),
        ("prescribed", {"weights": "orthogonal", "penalty": 0.5}, "weights orthogonal"),
        ("prescribed", {"weights": "free", "expansive_penalty": 0.5}, "weights free"),
        ("resnet", {"penalty": 0.5}, "weights free"),
        ("resnet", {"method": "expm"}, "lift paper and weights free"),
        *(
            (name, {"lift": "paper", "method": "expm"}, "lift paper and weights penalised")
            for name in ("naive", "non_expansive", "prescribed", "flexible")
        ),
        ("prescribed", {"region": "paper-flexible", "substeps": 3}, "region paper-flexible"),
        (
            "prescribed",
            {"region": "exact", "weights": "orthogonal", "padding": "circular", "substeps": 3},
            "region exact",
        ),
    ],
)
def test_a_setting_that_another_choice_leaves_unread_is_refused_of_new_networks(
    name: str, options: dict[str, Any], word: str
) -> None:
    config = ModelConfig(name, **TINY, **options)
    with pytest.raises(InvalidArgument, match=f"which changes nothing with {word}; leave it out"):
        build(config, (1, 8, 8), 3)
    stored = config.completed(MODELS[name].defaults)
    assert build(stored, (1, 8, 8), 3).config == stored


def test_penalties_that_are_read_are_taken() -> None:
    build(ModelConfig("resnet", **TINY, weights="penalised", penalty=0.5), (1, 8, 8), 3)
    build(ModelConfig("flexible", **TINY, balance="penalty", step_penalty=2.0, expansive_penalty=0.5), (1, 8, 8), 3)
    build(ModelConfig("certified", **TINY, step="exact", balance="penalty", step_penalty=2.0), (1, 8, 8), 3)


FLAGS_OF: dict[str, list[dict[str, Any]]] = {
    "step": [{"step": step, "dense_layers": dense} for step in STEPS for dense in (0, 2)],
    "weights": [{"weights": weights} for weights in WEIGHTS],
    "balance": [{"balance": balance} for balance in BALANCES],
}


@pytest.mark.parametrize(
    ("preset", "data", "names"),
    [
        *((preset, data, sorted(MODELS)) for preset in PRESETS for data in ("digits", "cifar10")),
        *((preset, "cifar10", ["certified"]) for preset in CERTIFIED_PRESETS),
    ],
)
def test_flags_may_turn_off_what_reads_a_setting_of_a_preset(preset: str, data: str, names: list[str]) -> None:
    for name in names:
        kind, settings = MODELS[name], preset_settings(preset, name, data).get("model", {})
        steps = {"step": "exact"} if "step" in kind.settings else {}
        for of, flags in FLAGS_OF.items():
            for flag in flags if of in kind.settings else []:
                kind.require_settings(ModelConfig(name, **settings | steps | flag))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("certified", {"dense_layers": 1}),
        ("certified", {"step": "preconditioned"}),
        ("metric", {"widths": (1, 4), "layers": (1, 1)}),
        ("prescribed", {"weights": "orthogonal"}),
        ("prescribed", {"weights": "orthogonal", "widths": (1,)}),
    ],
)
def test_every_part_takes_the_settings_of_the_model(name: str, options: dict[str, Any]) -> None:
    config = ModelConfig(name, **{"widths": (4,), "layers": (1,)} | options, bound="paper", method="expm")
    network = build(config, (1, 8, 8), 10)
    assert {block.bound for _, block in network.blocks()} == {"paper"}
    methods = {m.parametrisation for m in network.modules() if hasattr(m, "parametrisation")}
    assert methods == {ORTHOGONAL["expm"]}


def test_the_layers_of_a_body_may_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(config: ModelConfig, shape: tuple[int, int, int]) -> tuple[nn.Sequential, int]:
        return nn.Sequential(OrderedDict(flat=nn.Flatten(), still=nn.Identity())), 64

    monkeypatch.setitem(MODELS, "named", ModelKind("pixels", MODELS["certified"].defaults, named, frozenset()))
    network = build(ModelConfig("named", widths=(1,), layers=(1,)), (1, 8, 8), 3)
    assert [type(part).__name__ for part in network.body] == ["PixelNormalisation", "Flatten", "Identity"]
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("settings", [("kernel_size",), ["kernel_size"], {"kernelsize"}])
def test_settings_that_are_no_set_of_names_are_refused(settings: Any) -> None:
    with pytest.raises(InvalidArgument, match="a set of names of ModelConfig is needed"):
        ModelKind("m", MODELS["certified"].defaults, MODELS["certified"].build_body, settings)


def test_a_schedule_needs_a_time() -> None:
    with pytest.raises(InvalidArgument, match="until"):
        build(ModelConfig("certified", widths=(4,), layers=(1,), step_until=0.0), (1, 8, 8), 10)


def test_a_name_is_not_taken_over_by_a_class_of_the_same_name() -> None:
    registry: Registry[type] = Registry("shape")
    registry.register("square")(type("Square", (), {"__module__": "one"}))
    registry.register("square")(type("Square", (), {"__module__": "one"}))
    with pytest.raises(InvalidArgument, match="is taken"):
        registry.register("square")(type("Square", (), {"__module__": "two"}))


@pytest.mark.parametrize(("rule", "kind"), [(None, ScheduledSignal), ("learned", LearnedStep)])
def test_the_step_rule_decides_between_schedule_and_learning(rule: str | None, kind: type) -> None:
    network = build(ModelConfig("certified", **TINY, step_rule=rule), (1, 8, 8), 10)
    assert {type(block.signal) for _, block in network.blocks()} == {kind}


@pytest.mark.parametrize(("name", "region"), [("prescribed", "paper-prescribed"), ("flexible", "paper-flexible")])
def test_a_slope_without_contractive_steps_is_refused(name: str, region: str) -> None:
    with pytest.raises(InvalidArgument, match=f"slope is 0, for which the region '{region}' holds no contractive step"):
        build(ModelConfig(name, **TINY, slope=0.0, region=region), (1, 8, 8), 10)
    build(ModelConfig(name, **TINY, slope=0.0, region="tight"), (1, 8, 8), 10)


def test_pixels_that_are_whole_numbers_are_refused() -> None:
    network = build(ModelConfig("certified", widths=(4,), layers=(1,)), (1, 8, 8), 10)
    for kind in (torch.uint8, torch.int64):
        with pytest.raises(InvalidArgument, match="divide bytes by 255"):
            network(torch.zeros(2, 1, 8, 8, dtype=kind))


@pytest.mark.parametrize("name", ["certified", "metric", "resnet"])
def test_pixels_wider_than_the_weights_are_refused_and_narrower_ones_are_taken(name: str) -> None:
    network = build(ModelConfig(name, **TINY), (1, 8, 8), 3).eval()
    x = torch.rand(2, 1, 8, 8)
    single, double = torch.float32, torch.float64
    refused = rf"^the pixels are {double}, the weights of Network are {single}; give x\.to\({single}\), or convert"
    with torch.no_grad():
        with pytest.raises(InvalidArgument, match=refused):
            network(x.double())
        for kind in (torch.float16, torch.bfloat16):
            assert torch.equal(network(x.to(kind)), network(x.to(kind).float()))
        network.double()
        assert network(x.double()).dtype == double
        assert torch.equal(network(x), network(x.double()))


def test_pixels_wider_than_weights_of_sixteen_bits_are_refused() -> None:
    network, x = build(ModelConfig("resnet", **TINY), (1, 8, 8), 3).bfloat16(), torch.rand(2, 1, 8, 8)
    for kind in (torch.float32, torch.float16):
        with pytest.raises(InvalidArgument, match=r"the weights of Network are torch\.bfloat16"):
            network(x.to(kind))


def test_the_papers_networks_have_twelve_layers_and_half_the_kernels_of_the_others() -> None:
    networks = {}
    for name in PAPER_MODELS:
        settings = preset_settings("paper", name, "cifar10").get("model", {})
        networks[name] = build(ModelConfig(name, **(settings | {"lift": "paper"})), (3, 32, 32), 10)
    sizes = {name: kernels(network) for name, network in networks.items()}
    assert sizes["non_expansive"] == sizes["prescribed"] == sizes["flexible"]
    assert sizes["naive"] == sizes["resnet"] == 2 * sizes["non_expansive"] == 2 * 4 * 9 * (32**2 + 64**2 + 128**2)
    for name, network in networks.items():
        pairs = name in ("prescribed", "flexible")
        assert len(network.blocks()) == (6 if pairs else 12)


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_the_papers_last_layer_is_free_in_two_networks_and_of_frobenius_norm_one_in_the_others(name: str) -> None:
    head = build(ModelConfig(name, **TINY), (1, 8, 8), 3).head
    free = name in ("resnet", "naive")
    assert head.normalise == ("none" if free else "frobenius")
    # The start has orthonormal rows, one a class.
    assert float(head.weight.detach().norm()) == pytest.approx(math.sqrt(3) if free else 1.0, rel=1e-5)


@pytest.mark.parametrize(("name", "share"), [("resnet", 1.0), ("naive", 0.5)])
def test_a_step_of_the_reference_networks_is_its_formula(name: str, share: float) -> None:
    """x + AᵀReLU(Bx + b), and half of that, by the convolutions of torch."""
    network = build(ModelConfig(name, widths=(2,), layers=(1,)), (1, 8, 8), 3, seed=0).double().eval()
    ((_, block),) = network.blocks()
    (field,) = block.fields
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
        hidden = functional.conv2d(x, field.inner.weight, field.bias, padding=1).relu()
        whole = x + functional.conv_transpose2d(hidden, field.outer.weight, padding=1)
        torch.testing.assert_close(block(x), share * whole, rtol=0, atol=1e-12)


def kernels(network: nn.Module) -> int:
    """How many numbers the steps' kernels hold."""
    return sum(p.numel() for _, block in network.blocks() for p in block.parameters() if p.ndim == 4)


def test_the_package_lists_its_names_before_they_are_loaded() -> None:
    code = "import dynablocks; print(*sorted(set(dynablocks.__all__) - set(dir(dynablocks))))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
