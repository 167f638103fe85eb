"""``certify --json`` and ``audit``: a genuine certificate passes, and everything that was changed is found."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.cli import main
from dynablocks.data import load_data
from dynablocks.errors import BadData, DynablocksError
from dynablocks.fields import GradientField, MetricField, PreconditionedField, TwoMatrixField, leaky_relu
from dynablocks.files import sha256
from dynablocks.integrators import ExactFlow, ExplicitEuler
from dynablocks.lifting import Head, PaperLift
from dynablocks.linear import Conv, Dense, OrthogonalConv, OrthogonalDense
from dynablocks.models import MODELS, ModelConfig, Network, build
from dynablocks.properties import EUCLIDEAN, declare
from dynablocks.properties.jacobians import jacobians
from dynablocks.robustness.arithmetic import plain_arithmetic
from dynablocks.robustness.artefact import checked_artefact, ledger
from dynablocks.robustness.audit import (
    AuditFailed,
    _ascend,
    _attack,
    _check_layers,
    _check_radii,
    _entrance,
    _layer_bound,
    _step_bound,
    body_bound,
    singular_range,
)
from dynablocks.robustness.evaluation import evaluating
from dynablocks.run_directory.certificate_file import audit_certificate
from dynablocks.run_directory.network import load
from dynablocks.switching import FreeSignal

TRAIN = "--preset smoke --model.widths [4,4] --model.layers [1,1] --training.epochs 2 --training.threads 1"


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of a tiny digits network, in the run directory's parent."""
    place = tmp_path_factory.mktemp("audit")
    assert main(["train", *TRAIN.split(), "--out", str(place / "run")]) == 0
    assert main(["certify", str(place / "run"), "--json", str(place / "cert.json")]) == 0
    return place / "cert.json"


def check(path: Path, **options: Any) -> list[str]:
    said: list[str] = []
    audit_certificate(path, say=said.append, **{"samples": 6, "steps": 5, **options})
    return said


def changed(genuine: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A certificate with one thing changed, beside the genuine run."""
    content = json.loads(genuine.read_text())
    change(content)
    path = tmp_path / "cert.json"
    path.write_text(json.dumps(content))
    shutil.copytree(genuine.parent / "run", tmp_path / "run")
    return path


def with_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object], *, claim: bool) -> Path:
    """Other weights in the run; with ``claim`` the certificate names their hash."""
    from safetensors.torch import load_file, save_file

    file = path.parent / "run" / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file({key: value.contiguous() for key, value in weights.items()}, file, metadata={"format": "pt"})
    if claim:
        content = json.loads(path.read_text())
        content["weights"] = sha256(file)
        path.write_text(json.dumps(content))
    return path


def nothing(content: dict[str, Any]) -> None:
    pass


def test_the_artefact_says_all_and_passes(genuine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(genuine.read_text())
    assert content["run"] == "run"
    assert content["arithmetic"]["format"] == "float64"
    assert content["arithmetic"]["rounding"] == "proved"
    assert len(content["images"]) == content["data"]["images"] == 359
    assert [row["kind"] for row in content["layers"]][:2] == ["PixelNormalisation", "SpaceToDepth(2)"]
    assert content["layers"][-1]["product"] == pytest.approx(content["body_lipschitz"])
    assert main(["audit", str(genuine), "--samples", "6", "--steps", "5"]) == 0
    said = capsys.readouterr().out
    for word in ("weights", "data", "normalisation", "bounds", "radii", "attacks", "the certificate holds"):
        assert word in said


def test_a_float32_certificate_passes_and_has_smaller_radii(genuine: Path, tmp_path: Path) -> None:
    shutil.copytree(genuine.parent / "run", tmp_path / "run")
    path = tmp_path / "single.json"
    assert main(["certify", str(tmp_path / "run"), "--json", str(path), "--arithmetic", "float32"]) == 0
    assert "float32" in " ".join(check(path))
    single, double = (json.loads(p.read_text())["images"] for p in (path, genuine))
    assert sum(row["radius"] for row in single) < sum(row["radius"] for row in double)


def test_a_certificate_may_move_with_its_run(genuine: Path, tmp_path: Path) -> None:
    path = changed(genuine, tmp_path, nothing)
    assert check(path)
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run", moved)
    with pytest.raises(BadData, match="--run DIR"):
        check(path)
    assert check(path, run=moved)


def halve(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda weights: weights[name].mul_(0.5)


def swap(weights: dict[str, torch.Tensor]) -> None:
    weights["head.matrix"] = weights["head.matrix"].flip(0)


@pytest.mark.parametrize("change", [halve("head.bias"), swap], ids=["weights", "head"])
def test_tampered_weights_are_caught_by_their_hash(
    genuine: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    path = with_weights(changed(genuine, tmp_path, nothing), change, claim=False)
    shutil.rmtree(tmp_path / "run" / "checkpoint.previous", ignore_errors=True)
    with pytest.raises(AuditFailed, match="the weights were changed"):
        check(path)


def test_a_swapped_head_is_caught_behind_a_new_hash(genuine: Path, tmp_path: Path) -> None:
    path = with_weights(changed(genuine, tmp_path, nothing), swap, claim=True)
    with pytest.raises(AuditFailed, match=r"is classified as .* head"):
        check(path)


def test_tampered_weights_are_caught_behind_a_new_hash(genuine: Path, tmp_path: Path) -> None:
    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["head.bias"][:2] += torch.tensor([1e-3, -1e-3])

    path = with_weights(changed(genuine, tmp_path, nothing), nudge, claim=True)
    with pytest.raises(AuditFailed, match=r"certified at radius|classified as"):
        check(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_caught_behind_a_new_hash(genuine: Path, tmp_path: Path, value: float) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["head.bias"][0] = value

    path = with_weights(changed(genuine, tmp_path, nothing), spoil, claim=True)
    with pytest.raises(AuditFailed, match="holds NaN or infinity"):
        check(path)


def test_another_normalisation_in_the_weights_is_caught(genuine: Path, tmp_path: Path) -> None:
    path = with_weights(changed(genuine, tmp_path, nothing), halve("body.0.scale"), claim=True)
    with pytest.raises(AuditFailed, match="normalisation was changed"):
        check(path)


def lower(row: int | None, share: float = 0.999) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        if row is None:
            content["body_lipschitz"] *= 0.9
        else:
            content["layers"][row]["bound"] *= share

    return change


def mean(content: dict[str, Any]) -> None:
    content["normalisation"]["mean"] = [0.1]


def described(content: dict[str, Any]) -> None:
    content["model"]["mean"] = [0.1]


def config(content: dict[str, Any]) -> None:
    content["model"]["config"]["normalise"] = True


def radius(factor: float) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        next(row for row in content["images"] if row["radius"] > 0)["radius"] *= factor

    return change


def largest_radius(factor: float) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        max(content["images"], key=lambda row: row["radius"])["radius"] *= factor

    return change


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a layer's bound": (lower(4), "layer 4 .*too low"),
    "a bound lowered by two billionths": (lower(4, 1 - 2e-9), "layer 4 .*too low"),
    "the body's bound": (lower(None), "the whole body .* too low"),
    "a raised bound": (lambda c: c["layers"][2].update(bound=1.5), "recomputed from the weights: 1"),
    "a bound raised by two hundred-millionths": (
        lambda c: c["layers"][2].update(bound=1 + 2e-8),
        "bounds layer 2 .*recomputed from the weights: 1",
    ),
    "the product": (lambda c: c["layers"][-1].update(product=0.5), "the body up to layer .* too low"),
    "a bound that is no number": (lambda c: c["layers"][1].update(bound="1"), "no number"),
    "a layer that is none": (lambda c: c.update(layers=[1]), "layer 0 of .* no number"),
    "a bound that no float holds": (lambda c: c["layers"][1].update(bound=10**400), "no number"),
    "a radius that no float holds": (lambda c: c["images"][0].update(radius=10**400), "image 0 .* lacks"),
    "a radius that is NaN": (lambda c: c["images"][0].update(radius=float("nan")), "image 0 .* lacks"),
    "a mean that is none": (lambda c: c["normalisation"].update(mean=[None]), "mean in 'normalisation'"),
    "a described mean of text": (lambda c: c["model"].update(mean="0.5"), "mean in 'model'"),
    "a described deviation of 0": (lambda c: c["model"].update(std=[0.0]), "describes"),
    "a folder that is a number": (lambda c: c["data"].update(dir=5), "data in 5"),
    "widths without end": (lambda c: c["model"]["config"].update(widths=[10**9, 4]), "describes no network"),
    "the stated mean": (mean, "normalisation was changed"),
    "the described mean": (described, "normalisation was changed"),
    "the described scaling": (config, "normalisation was changed"),
    "a larger radius": (radius(1.001), "margin allows"),
    "a radius larger by five millionths": (largest_radius(1 + 5e-6), "margin allows"),
    "a radius larger by half a millionth": (largest_radius(1 + 5e-7), "recomputed from the weights"),
    "a smaller radius": (radius(0.5), "recomputed from the weights"),
    "a prediction": (lambda c: c["images"][0].update(prediction=(c["images"][0]["prediction"] + 1) % 10), "classified"),
    "a label": (lambda c: c["images"][3].update(label=11), "image 3 has label"),
    "no normalise": (lambda c: c["model"]["config"].pop("normalise"), "describes a network with config"),
    "classes without end": (lambda c: c["model"].update(num_classes=math.inf), "describes no network"),
    "the data": (lambda c: c["data"].update(fingerprint="0" * 64), "other data"),
    "an image less": (lambda c: c["images"].pop(), "lists 358 images"),
    "the arithmetic": (lambda c: c["arithmetic"].update(format="float32"), "certified at radius|margin allows|too low"),
    "the accuracy": (lambda c: c.update(clean_accuracy=0.999), "states accuracy 0.999"),
    "the norm": (lambda c: c.update(norm="linf"), "radii are in linf"),
    "an unknown arithmetic": (lambda c: c["arithmetic"].update(format="float16"), "is in 'float16' arithmetic"),
    "the proof": (lambda c: c["arithmetic"].update(rounding="measured"), "proved or measured"),
    "a layer less": (lambda c: c["layers"].pop(), "lists 7 layers"),
    "a layer's kind": (lambda c: c["layers"][1].update(kind="Identity"), "calls layer 1 'Identity'"),
    "the number of images": (lambda c: c["data"].update(images=1000), "lists 1000 images"),
    "the logit error": (lambda c: c["arithmetic"].update(largest_logit_error=0.0), "states largest_logit_error 0.0"),
    "no logit error": (lambda c: c["arithmetic"].pop("largest_logit_error"), "states largest_logit_error inf"),
    "the roundoff": (lambda c: c["arithmetic"].update(unit_roundoff=1e-20), "states unit_roundoff 1e-20"),
    "a setting of training": (lambda c: c["model"]["config"].update(step_until=0.5), "describes .* that of the run"),
    "a setting of other models": (lambda c: c["model"]["config"].update(penalty=0.7), "has no such setting"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_edited_certificate_is_caught(
    genuine: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = CHANGES[name]
    path = changed(genuine, tmp_path, change)
    with pytest.raises(DynablocksError, match=sentence) as caught:
        check(path)
    assert "\n" not in str(caught.value)
    assert main(["audit", str(path), "--samples", "2", "--steps", "2"]) == 2
    assert capsys.readouterr().err.startswith("dynablocks: error: ")


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "": lambda content: content,
    **{
        f" in {name!r}": lambda content, name=name: content[name]
        for name in ("model", "normalisation", "arithmetic", "data")
    },
    **{f" in {name!r}": lambda content, name=name: content[name][-1] for name in ("layers", "images")},
}


@pytest.mark.parametrize("claim", ["certified_accuracy", "attacked_accuracy\x1b[2J"])
@pytest.mark.parametrize("where", PARTS)
def test_what_is_added_to_a_certificate_is_refused(genuine: Path, where: str, claim: str) -> None:
    """No check would read it, and the audit would seem to have passed it."""
    content = json.loads(genuine.read_text())
    assert checked_artefact(content, "cert.json") is content
    PARTS[where](content)[claim] = None if where else 0.9
    with pytest.raises(BadData, match=re.escape(f"cert.json has {claim!r}{where}, which no audit checks")):
        checked_artefact(content, "cert.json")


def test_a_certificate_of_a_network_that_started_from_another_says_so(genuine: Path) -> None:
    content = json.loads(genuine.read_text())
    seen = [{"fingerprint": "0" * 64, "train_images": 5, "seed": 0}]
    content["model"].update(warm_start="0" * 64, seen=seen)
    assert checked_artefact(content, "cert.json")["model"]["seen"] == seen
    content["dynablocks"] = {"certified_accuracy": 0.9}
    with pytest.raises(BadData, match="has no valid 'dynablocks'"):
        checked_artefact(content, "cert.json")


@pytest.mark.parametrize("version", ["0.1.0; 90 % of the images are certified", "", "better"])
def test_a_certificate_whose_version_is_none_is_refused(genuine: Path, version: str) -> None:
    content = json.loads(genuine.read_text()) | {"dynablocks": version}
    with pytest.raises(BadData, match=re.escape(f"cert.json is by dynablocks {version!r}, which is no version")):
        checked_artefact(content, "cert.json")


@pytest.mark.parametrize("claim", ['"radius": 9.0, "radius":', '"clean_accuracy": 0.99, "clean_accuracy":'])
def test_a_certificate_that_says_something_twice_is_refused(
    claim: str, genuine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader may take the first of two, and the audit checks the last."""
    path, name = changed(genuine, tmp_path, nothing), claim.split()[-1]
    text = path.read_text()
    assert name in text
    path.write_text(text.replace(name, claim, 1))
    assert main(["audit", str(path)]) == 2
    assert f"{name[1:-2]!r} stands twice in one object" in capsys.readouterr().err


def test_an_audit_attacks_in_batches(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads(genuine.read_text())
    network, sizes = load(genuine.parent / "run").double().eval(), []
    network.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    images, said = load_data("digits").test.images, []
    for batch in (256, 4):
        monkeypatch.setattr("dynablocks.robustness.audit._BATCH", batch)
        sizes.clear()
        said.append(_attack(content, network, images, 10, 3, 0))
        assert max(sizes) == min(10, batch)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("share", [1 + 5e-8, 1 - 5e-7])
def test_a_radius_may_end_in_other_digits_on_another_machine(genuine: Path, tmp_path: Path, share: float) -> None:
    """By 1e-9 + 1e-7 r above and 1e-9 + 1e-6 r below; half a millionth above is refused."""
    said = check(changed(genuine, tmp_path, largest_radius(share)))
    assert any(sentence.startswith("radii: the same when made again") for sentence in said)


DEEP = pytest.param(f"model: {'[' * 3000}{']' * 3000}", id="deep")


@pytest.mark.parametrize(
    "text", ["x: [", "{}", "model: 5", "model: &a {b: 1}\ndata: *a", "model: !!bool x", DEEP, None]
)
def test_damaged_settings_of_the_run_get_one_sentence(
    genuine: Path, tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(genuine, tmp_path, nothing)
    settings = path.parent / json.loads(path.read_text())["run"] / "checkpoint" / "config.yaml"
    settings.unlink()
    if text is not None:
        settings.write_text(text)
    assert main(["audit", str(path), "--samples", "2", "--steps", "2"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_every_check_is_told_as_soon_as_it_is_passed(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def attack(*_: Any) -> str:
        assert any(sentence.startswith("bounds: ") for sentence in told)
        return "attacks: none"

    monkeypatch.setattr("dynablocks.robustness.audit._attack", attack)
    audit_certificate(genuine, say=told.append)
    assert "attacks: none" in told


def test_a_cut_or_foreign_file_gets_one_sentence(genuine: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    for text, sentence in (
        (genuine.read_text()[:5000], "cannot be read as JSON"),
        ("[]", "no dynablocks certificate"),
        (json.dumps(json.loads(genuine.read_text()) | {"version": 9}), "version 9"),
        (json.dumps({k: v for k, v in json.loads(genuine.read_text()).items() if k != "layers"}), "no valid 'layers'"),
        (json.dumps(json.loads(genuine.read_text()) | {"images": [{"label": 1}]}), "image 0 .* lacks"),
    ):
        path.write_text(text)
        with pytest.raises(DynablocksError, match=sentence) as caught:
            check(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DynablocksError, match="does not exist"):
        check(tmp_path / "none.json")
    assert main(["audit"]) == 2
    assert main(["audit", "--help"]) == 0
    assert main(["audit", str(genuine), "--samples", "-1"]) == 2


def test_the_attack_breaks_what_is_certified_too_far(genuine: Path) -> None:
    """The broken twin: the same attack with radii of 3 instead of those proved."""
    network = load(genuine.parent / "run").double()
    content = json.loads(genuine.read_text())
    from dynablocks.data import load_data

    pixels = load_data("digits").test.images[:12].double() / 255
    guesses = torch.tensor([row["prediction"] for row in content["images"][:12]])
    radii = torch.full((12,), 3.0, dtype=torch.float64)
    with evaluating(network):
        for loss in ("margin", "cross-entropy", "ratio"):
            broken, norms = _ascend(network, pixels, guesses, radii, loss, 10, torch.Generator().manual_seed(0))
            assert broken.sum() >= 6
            assert (norms[broken] <= 3.0).all()


@pytest.mark.parametrize("loss", ["margin", "cross-entropy", "ratio"])
def test_each_attack_finds_the_boundary_between_two_classes(loss: str) -> None:
    """The boundary is 0.2 away, and no start farther than half of the radius, 0.15."""
    network = Network(nn.Sequential(nn.Flatten()), Head(4, 2, "none"), (1, 2, 2), ModelConfig()).eval()
    with torch.no_grad():
        network.head.matrix.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        network.head.bias.copy_(torch.tensor([0.0, 0.5]))
    pixels, label, radius = torch.full((1, 1, 2, 2), 0.7), torch.tensor([0]), torch.tensor([0.3])
    broken, norms = _ascend(network, pixels, label, radius, loss, 20, torch.Generator().manual_seed(0))
    assert broken.tolist() == [True]
    assert 0.199 < norms.item() <= 0.3
    inside, _ = _ascend(network, pixels, label, torch.tensor([0.19]), loss, 20, torch.Generator().manual_seed(0))
    assert inside.tolist() == [False]


@pytest.mark.parametrize(
    "config",
    [
        *(ModelConfig(name, widths=(4, 8), layers=(1, 1)) for name in MODELS if name != "convnet"),
        ModelConfig("certified", widths=(4, 8), layers=(1, 0), dense_layers=2, dense_rows=0.25, step_start=2.0),
        ModelConfig("certified", widths=(4, 8), layers=(1, 0), dense_layers=2, dense_width=6),
        ModelConfig("metric", widths=(4,), layers=(1,), dense_layers=2, dense_rows=0.25),
        *(
            ModelConfig("certified", widths=(4, 8), layers=(1, 1), step=step)
            for step in ("preconditioned", "exact", "potential")
        ),
        ModelConfig("certified", widths=(4,), layers=(0,), dense_layers=2, dense_step="potential"),
    ],
    ids=lambda config: f"{config.name}-{config.step}-{config.dense_layers}-{config.dense_width}-{config.dense_step}",
)
def test_bounds_of_every_model_agree_with_the_declared_ones(config: ModelConfig) -> None:
    """Two ways to the same number: never above the declared bound, and for plain layers not far below it."""
    network = build(config, (1, 8, 8), 10, seed=0).double().eval()
    with evaluating(network):
        for row, (part, bound) in zip(ledger(network), body_bound(network), strict=True):
            assert row["name"] == part
            assert row["bound"] * 0.99 <= bound <= row["bound"] * (1 + 1e-9)


MAPS: dict[str, Callable[[], Conv]] = {
    "same": lambda: Conv((2, 5, 5), 3, 3),
    "full": lambda: Conv((2, 5, 6), 3, 3, "full"),
    "circular": lambda: Conv((2, 5, 5), 3, 3, "circular"),
    "stride and groups": lambda: Conv((4, 6, 6), 4, 3, stride=2, groups=2),
    "dilation": lambda: Conv((2, 7, 7), 2, 3, dilation=2),
    "orthogonal": lambda: OrthogonalConv((4, 4, 4)),
    "one pixel": lambda: Conv((3, 4, 4), 5, 1),
}


@pytest.mark.parametrize("name", MAPS)
def test_singular_values_against_the_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = MAPS[name]()
    matrix = conv.dense_matrix().detach().numpy()
    values = np.linalg.svd(matrix, compute_uv=False)
    least = values[-1] if matrix.shape[0] >= matrix.shape[1] else 0.0
    largest, smallest = singular_range(conv)
    assert largest == pytest.approx(values[0], rel=1e-6)
    assert smallest <= least * (1 + 1e-6) + 1e-12
    monkeypatch.setattr("dynablocks.robustness.audit._DENSE_SIDE", 0)
    padded, low = singular_range(conv)
    assert values[0] * (1 - 1e-9) <= padded <= 1.5 * values[0]
    assert low <= least * (1 + 1e-9) + 1e-12


def test_the_audit_changes_nothing(genuine: Path) -> None:
    before = copy.deepcopy({p: p.read_bytes() for p in genuine.parent.rglob("*") if p.is_file()})
    check(genuine)
    assert {p: p.read_bytes() for p in genuine.parent.rglob("*") if p.is_file()} == before


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "instead"), [(Terminal, r"\?"), (io.TextIOWrapper, r"\\u2026")])
def test_the_audit_speaks_where_a_character_is_lacking(
    kind: type[io.TextIOWrapper], instead: str, genuine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream := kind(written, encoding="latin-1"))
        assert main(["audit", str(genuine), "--samples", "0"]) == 0
        said = written.getvalue().decode("latin-1")
        assert stream.errors == "strict"
    assert re.search(rf"SHA-256 [0-9a-f]{{16}}{instead} as certified", said)
    assert "the certificate holds" in said


def test_a_layer_that_declares_too_little_is_caught(
    genuine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin of the library: certificate and reproduction agree, the audit's singular values do not."""
    from dynablocks import lifting
    from dynablocks.linear import Bounds

    shutil.copytree(genuine.parent / "run", tmp_path / "run")
    for stored in (tmp_path / "run").glob("certificate.*"):
        stored.unlink()
    monkeypatch.setattr(lifting, "linear_norm_bounds", lambda weight: Bounds(0.0, 0.9, exact=False, method="hope"))
    path = tmp_path / "cert.json"
    assert main(["certify", str(tmp_path / "run"), "--json", str(path)]) == 0
    assert json.loads(path.read_text())["body_lipschitz"] < 0.99
    with pytest.raises(AuditFailed, match=r"layer 2 \(ChannelMix\) by 0\.9 but its constant is 1"):
        check(path)


def test_an_attack_that_succeeds_fails_the_audit(genuine: Path) -> None:
    from dynablocks.data import load_data

    content = json.loads(genuine.read_text())
    for row in content["images"]:
        row["radius"] = 3.0
    network = load(genuine.parent / "run").double()
    with evaluating(network), pytest.raises(AuditFailed, match="attack changes its class"):
        _attack(content, network, load_data("digits").test.images, 12, 10, 0)


def uneven(factor: float = 1.0) -> Dense:
    """A map whose rows are neither orthogonal nor of one length."""
    linear = Dense(3, 3)
    with torch.no_grad():
        linear.matrix.copy_(factor * torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.25, 0.0, 1.0]]))
    return linear


def in_a_metric(expansive: bool) -> MetricField:
    return MetricField(uneven(), MetricField.example().metric, "tanh", expansive=expansive, whitened=True)


STEPS = {
    "exact": (ExactFlow(), lambda: GradientField(OrthogonalDense(3, 3), leaky_relu(0.3)), 0.7),
    "exact, expansive": (
        ExactFlow(),
        lambda: GradientField(OrthogonalDense(3, 3), leaky_relu(0.3), expansive=True),
        0.7,
    ),
    "recursion": (ExplicitEuler(3), lambda: GradientField(OrthogonalDense(3, 3), leaky_relu(0.3)), 2.4),
    "substeps": (ExplicitEuler(2), lambda: GradientField(Dense(3, 3), leaky_relu(0.3)), 0.8),
    "alpha": (ExplicitEuler(), lambda: GradientField(Dense(3, 4), "tanh", alpha=0.7, expansive=True), 0.8),
    "preconditioned": (ExplicitEuler(), lambda: PreconditionedField(uneven(), "tanh"), 3.0),
    "two matrices": (ExplicitEuler(), lambda: TwoMatrixField(uneven(), uneven(2.0), "tanh", decay=0.5), 0.8),
    "two matrices, substeps": (
        ExplicitEuler(2),
        lambda: TwoMatrixField(uneven(), uneven(2.0), "tanh", decay=0.5),
        0.8,
    ),
    "metric": (ExplicitEuler(), lambda: in_a_metric(expansive=False), 2.5),
    "metric, expansive, substeps": (ExplicitEuler(2), lambda: in_a_metric(expansive=True), 0.8),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_step_bounds_lie_between_jacobians_and_declarations(name: str) -> None:
    torch.manual_seed(0)
    method, make, h = STEPS[name]
    block = DynamicalBlock(make(), method, FreeSignal(h)).double()
    x = torch.cat([3 * torch.randn(400, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)])
    field, dense, metric = block.fields[0], jacobians(block, x), EUCLIDEAN
    if isinstance(field, MetricField):
        metric = field.metric
        dense = metric.root @ dense @ metric.inverse_root
    measured = float(torch.linalg.matrix_norm(dense, ord=2).max())
    bound = _step_bound(block.method, field, h)
    assert measured <= bound * (1 + 1e-9) <= block.properties.lipschitz_in(metric) * (1 + 2e-9)
    assert measured >= (0.8 if name == "substeps" else 0.99) * bound


def test_a_lifts_factor_and_the_norm_at_the_entrance_count() -> None:
    lift = PaperLift((1, 4, 4), 2).double()
    with torch.no_grad():
        lift.alpha.fill_(-3.0)
    assert _layer_bound(lift) == pytest.approx(lift.properties.lipschitz, rel=1e-6)
    config = ModelConfig("metric", widths=(3, 8), layers=(1, 1), metric_smooth=4.0)
    network = build(config, (1, 8, 8), 4, seed=0).double()
    with evaluating(network):
        product = math.prod(bound for _, bound in body_bound(network)) * _entrance(network)
        assert product == pytest.approx(network.certificate_inputs()[0], rel=0.02)


def test_a_body_constant_without_the_ratio_of_norms_at_the_entrance_is_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the library itself leaves it out: shadings count twice in the norm on images."""
    config = ModelConfig("metric", widths=(3, 8), layers=(1, 1), metric_smooth=4.0)
    network = build(config, (1, 8, 8), 4, seed=0).double().eval()
    with evaluating(network), plain_arithmetic():
        rows, constant = ledger(network), network.certificate_inputs()[0]
        content: dict[str, Any] = {"layers": rows, "arithmetic": {"format": "float64"}, "body_lipschitz": constant}
        assert _check_layers(content, network) == pytest.approx(constant, rel=0.02)
        content["body_lipschitz"] = low = rows[-1]["product"]
        assert low == pytest.approx(constant / 2, rel=1e-6)
        monkeypatch.setattr(Network, "certificate_inputs", lambda self: (low, self.head.weight))
        with pytest.raises(AuditFailed, match=r"bounds the whole body by .* too low"):
            _check_layers(content, network)


DECOMPOSED: dict[str, Callable[[], Conv]] = {
    "wide": lambda: Conv((1, 8, 8), 32, 3),
    "groups": lambda: Conv((4, 12, 12), 4, 3, groups=2),
    "orthogonal, full": lambda: OrthogonalConv((16, 8, 8), kernel_size=3, padding="full"),
    "orthogonal rows": lambda: OrthogonalConv((32, 8, 8), 16, kernel_size=3),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_the_audit_is_no_looser_than_the_library_where_that_decomposes_the_matrix(name: str) -> None:
    conv = DECOMPOSED[name]()
    largest, smallest = singular_range(conv)
    assert largest <= conv.norm_bounds().upper * (1 + 1e-9)
    assert smallest >= conv.smallest_singular_value() * (1 - 1e-9)


def test_a_leaky_step_with_full_padding_is_audited_as_it_is_declared() -> None:
    block = DynamicalBlock(
        GradientField(OrthogonalConv((16, 8, 8), kernel_size=3, padding="full"), leaky_relu(0.5)),
        ExplicitEuler(),
        FreeSignal(0.5),
    ).double()
    assert _layer_bound(block) == pytest.approx(block.properties.lipschitz, rel=1e-6)
    assert _layer_bound(block) == pytest.approx(0.75, rel=1e-6)


@pytest.mark.parametrize(
    ("pool", "windows"),
    [(nn.MaxPool2d(2, 2, dilation=2), 4), (nn.MaxPool2d(3, 1), 9), (nn.MaxPool2d(3, 2), 4)],
    ids=["dilated", "stride 1", "stride 2"],
)
def test_pooling_whose_windows_share_pixels_is_not_audited_as_disjoint(pool: nn.MaxPool2d, windows: int) -> None:
    """A bump at (2, 2) is seen by several windows: with dilation 2 by {0, 2} and {2, 4} in its row."""
    bump = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    bump[0, 0, 2, 2] = 1.0
    assert float(jacobians(pool, bump)[0, :, 2 * 8 + 2].norm()) == math.sqrt(windows)
    assert declare(pool).properties.lipschitz == pytest.approx(math.sqrt(windows))
    with pytest.raises(AuditFailed, match="does not know the layer MaxPool2d"):
        _layer_bound(pool)


def test_of_pooling_the_audit_knows_disjoint_windows_without_padding_alone() -> None:
    assert _layer_bound(nn.MaxPool2d(2)) == 1.0
    with pytest.raises(AuditFailed, match="does not know the layer MaxPool2d"):
        _layer_bound(nn.MaxPool2d(2, padding=1))


def _halve_a_number(layers: list[dict[str, Any]]) -> None:
    layer = next(layer for layer in layers if "<= " in layer["reason"])
    layer["reason"] = re.sub(r"<= \d+(\.\d+)?", "<= 0.5", layer["reason"], count=1)


@pytest.mark.parametrize("stated", ["another", 11, -3])
def test_predictions_are_compared_also_where_nothing_can_be_certified(stated: Any, genuine: Path) -> None:
    content = json.loads(genuine.read_text())
    network, digits = load(genuine.parent / "run").double(), load_data("digits").test
    for row in content["images"]:
        row["radius"] = 0.0
    with evaluating(network), plain_arithmetic():
        assert "agree" in _check_radii(content, network, digits.images, digits.labels, 1e9)
        first = content["images"][0]
        first["prediction"] = (first["prediction"] + 1) % 10 if stated == "another" else stated
        content["clean_accuracy"] = sum(r["label"] == r["prediction"] for r in content["images"]) / len(digits)
        with pytest.raises(AuditFailed, match="image 0 is classified as"):
            _check_radii(content, network, digits.images, digits.labels, 1e9)


def tied(genuine: Path, gap: float, predictions: list[int]) -> str:
    """The check of radii of 0 where class 0 is ahead of class 1 by ``gap`` in 100, and the first images are said to be
    in other classes."""
    content = json.loads(genuine.read_text())
    network, digits = load(genuine.parent / "run").double(), load_data("digits").test
    with torch.no_grad():
        network.head.matrix[1] = network.head.matrix[0]
        network.head.bias[0], network.head.bias[1] = 100.0, 100.0 - gap
    for row, prediction in itertools.zip_longest(content["images"], predictions, fillvalue=0):
        row.update(radius=0.0, prediction=prediction)
    content["clean_accuracy"] = sum(r["label"] == r["prediction"] for r in content["images"]) / len(digits)
    with evaluating(network), plain_arithmetic():
        return _check_radii(content, network, digits.images, digits.labels, 1e9)


def test_one_near_tie_may_be_decided_otherwise_and_is_told(genuine: Path) -> None:
    """Another machine may round two equal logits apart; that is rare, so of more than one image it is no excuse."""
    assert "near ties" not in tied(genuine, 1e-9, [])
    assert "(1 predictions of near ties do not)" in tied(genuine, 1e-9, [1])
    with pytest.raises(AuditFailed, match="2 images are classified otherwise"):
        tied(genuine, 1e-9, [1, 1])


def test_what_is_no_near_tie_is_not_excused(genuine: Path) -> None:
    for gap, prediction in ((1e-7, 1), (1e-9, 2)):
        with pytest.raises(AuditFailed, match=f"image 0 is classified as 0 but the certificate says {prediction}"):
            tied(genuine, gap, [prediction])


def test_a_float32_radius_just_above_the_proved_one_is_caught(genuine: Path, tmp_path: Path) -> None:
    run = shutil.copytree(genuine.parent / "run", tmp_path / "run")
    path = tmp_path / "single.json"
    assert main(["certify", str(run), "--json", str(path), "--arithmetic", "float32"]) == 0
    content = json.loads(path.read_text())
    largest = max(content["images"], key=lambda row: row["radius"])
    largest["radius"] *= 1.00009
    path.write_text(json.dumps(content))
    with pytest.raises(AuditFailed, match="recomputed from the weights"):
        check(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.update(body_lipschitz=10**400), "no valid 'body_lipschitz'"),
        (lambda content: content["images"][0].update(label=True), "image 0 of .* lacks a label"),
        (lambda content: content["layers"][1].update(name="other"), "lists a layer 'other' where the network has"),
        (lambda content: content["layers"][1].update(reason="by grace"), "explains layer .* by 'by grace'"),
        (lambda content: _halve_a_number(content["layers"]), "explains layer"),
    ],
)
def test_edits_that_change_no_radius_are_caught_too(
    change: Callable[[dict[str, Any]], object], sentence: str, genuine: Path, tmp_path: Path
) -> None:
    with pytest.raises(DynablocksError, match=sentence):
        check(changed(genuine, tmp_path, change))


@pytest.mark.parametrize("name", ["training.json", "config.yaml", "metrics.json", "checkpoint/manifest.json"])
def test_a_certificate_file_does_not_overwrite_what_the_run_needs(name: str, genuine: Path, tmp_path: Path) -> None:
    run = shutil.copytree(genuine.parent / "run", tmp_path / "run")
    before = (run / name).read_bytes()
    assert main(["certify", str(run), "--json", str(run / name)]) == 2
    assert (run / name).read_bytes() == before


@pytest.mark.parametrize("content", ["", "# Notes\n", "[]", '{"format": "another"}', DEEP])
def test_a_certificate_file_replaces_nothing_but_a_certificate(
    content: str, genuine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.md"
    path.write_text(content)
    for dry in ([], ["--dry-run"]):
        assert main(["certify", str(genuine.parent / "run"), "--json", str(path), *dry]) == 2
        assert f"--json {path} is there and holds no certificate; give another name" in capsys.readouterr().err
    assert path.read_text() == content


def test_a_certificate_file_replaces_a_certificate(genuine: Path, tmp_path: Path) -> None:
    run, path = shutil.copytree(genuine.parent / "run", tmp_path / "run"), tmp_path / "cert.json"
    path.write_text(json.dumps(json.loads(genuine.read_text()) | {"version": 0}))
    assert main(["certify", str(run), "--json", str(path)]) == 0
    made, kept = (json.loads(file.read_text()) for file in (path, genuine))
    assert all(made[name] == kept[name] for name in ("version", "run", "weights", "images"))


@pytest.mark.parametrize("name", ["Metrics.json", "CERTIFICATE.JSON", "pipe"])
def test_a_certificate_file_takes_no_name_that_another_file_may_have(name: str, genuine: Path, tmp_path: Path) -> None:
    """In capitals it is the same file on many a Mac, and what is written into a pipe is no file."""
    run = shutil.copytree(genuine.parent / "run", tmp_path / "run")
    os.mkfifo(run / "pipe")
    before = sorted(run.rglob("*"))
    assert main(["certify", str(run), "--json", str(run / name)]) == 2
    assert sorted(run.rglob("*")) == before


def test_what_a_certificate_holds_moves_no_cursor(
    genuine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile, written = "\x1b[2J\nthe certificate holds", r"\x1b[2J\nthe certificate holds"
    path = changed(genuine, tmp_path, lambda content: content.update(run=hostile))
    capsys.readouterr()
    assert main(["audit", str(path)]) == 2
    shown, told = capsys.readouterr()
    assert shown == ""
    assert told.count("\n") == 1
    assert f"{Path(written, 'checkpoint', 'model.safetensors')} does not exist" in told
    monkeypatch.setattr("dynablocks.run_directory.certificate_file.audit", lambda *_, say, **__: say(hostile))
    assert main(["audit", str(genuine)]) == 0
    assert f"\n{written}\n" in capsys.readouterr().out


def test_the_audit_takes_the_checkpoint_that_certify_takes(
    genuine: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = shutil.copytree(genuine.parent / "run", tmp_path / "run")
    shutil.copytree(run / "checkpoint", run / "checkpoint.previous", dirs_exist_ok=True)
    (run / "checkpoint" / "model.safetensors").write_bytes(b"")
    assert main(["certify", str(run), "--json", str(tmp_path / "made.json")]) == 0
    assert check(tmp_path / "made.json", steps=1, samples=2)


def test_every_long_check_shows_how_far_it_is(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []

    def recorded(items: Iterable[Any], label: str, total: int) -> list[Any]:
        steps = list(items)
        told.append((label, len(steps), total))
        return steps

    monkeypatch.setattr("dynablocks.robustness.audit.track", recorded)
    check(genuine, samples=2, steps=3)
    losses = ("margin", "cross-entropy", "ratio")
    layers, images = (len(json.loads(genuine.read_text())[part]) for part in ("layers", "images"))
    batches = -(-images // 256)
    assert told == [
        ("bounding the layers", layers, layers),
        ("classifying the images", batches, batches),
        *((f"attacking with the {loss} loss", 4, 4) for loss in losses),
    ]


STRIDED: dict[str, Callable[[], Conv]] = {
    "two": lambda: Conv((1, 5, 6), 16, 3, "full", stride=2),
    "three": lambda: Conv((1, 7, 6), 16, 3, "full", stride=3),
    "groups": lambda: Conv((2, 5, 5), 16, 3, "full", stride=2, groups=2),
    "dilation": lambda: Conv((1, 6, 5), 16, 3, "full", stride=2, dilation=3),
}


@pytest.mark.parametrize("name", STRIDED)
def test_a_stride_leaves_full_padding_the_least_singular_value_of_its_grid(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = STRIDED[name]()
    values = np.linalg.svd(conv.dense_matrix().detach().numpy(), compute_uv=False)
    monkeypatch.setattr("dynablocks.robustness.audit._DENSE_SIDE", 0)
    monkeypatch.setattr("dynablocks.numerics.bounds._is_small", lambda *_: False)
    largest, smallest = singular_range(conv)
    assert 0 < smallest <= values[-1] * (1 + 1e-9)
    assert largest >= values[0] * (1 - 1e-9)
    assert smallest == pytest.approx(conv.smallest_singular_value(), rel=1e-6)
    block = DynamicalBlock(GradientField(conv, leaky_relu(0.5)), ExplicitEuler(), FreeSignal(0.5)).double()
    assert block.properties.lipschitz < 1 - 1e-3 * smallest**2
    assert _layer_bound(block) == pytest.approx(block.properties.lipschitz, rel=1e-6)


def test_without_full_padding_nothing_is_said_of_the_least_singular_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of one pixel and a stride of two see a quarter of the pixels."""
    monkeypatch.setattr("dynablocks.robustness.audit._DENSE_SIDE", 0)
    for conv in (Conv((1, 5, 6), 16, 3, stride=2), Conv((1, 5, 6), 16, 1, stride=2)):
        assert singular_range(conv)[1] <= 1e-12


def test_a_measured_logit_error_may_end_otherwise_but_not_below_the_least(
    genuine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynablocks.robustness import NoRoundingBound

    def unproved(*_: Any, **__: Any) -> Any:
        raise NoRoundingBound("nothing is to be proved here.")

    monkeypatch.setattr("dynablocks.robustness.certificates.rounding_bound", unproved)
    run, path = shutil.copytree(genuine.parent / "run", tmp_path / "run"), tmp_path / "measured.json"
    assert main(["certify", str(run), "--json", str(path), "--arithmetic", "float32"]) == 0
    content = json.loads(path.read_text())
    facts, network = content["arithmetic"], load(run).eval()
    assert facts["rounding"] == "measured"
    with torch.no_grad(), evaluating(network):
        largest = float(network(load_data("digits").test.images / 255).abs().max())
    least = 32 * torch.finfo(torch.float32).eps * largest

    def checked(error: float | None) -> list[str]:
        facts["largest_logit_error"] = error
        path.write_text(json.dumps(content))
        return check(path)

    stated = facts["largest_logit_error"]
    assert stated >= least * (1 - 1e-3)
    for error in (stated, 1.3 * stated):
        assert any("float32 with a measured rounding bound" in sentence for sentence in checked(error))
    for error, sentence in ((0.9 * least, "measured, it is at least"), (None, "states largest_logit_error inf")):
        with pytest.raises(AuditFailed, match=sentence):
            checked(error)
