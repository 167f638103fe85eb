"""The command line end to end on tiny networks."""

from __future__ import annotations

import dataclasses
import errno
import html
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import dynablocks
from dynablocks import arguments, reporting
from dynablocks.arguments import make_parser
from dynablocks.catalogue import catalogue
from dynablocks.cli import COMMANDS, main
from dynablocks.config import RunConfig, from_yaml, preset_settings, to_yaml
from dynablocks.data import DataSplits, ImageDataset, load_data
from dynablocks.errors import BadCheckpoint, InvalidArgument, UnsoundResult
from dynablocks.files import sha256, write_text
from dynablocks.linear import ORTHOGONAL, LinearMap
from dynablocks.models import MODELS, ModelConfig, ModelKind, build
from dynablocks.properties import Lipschitz, explain
from dynablocks.registry import Registry
from dynablocks.robustness import AttackConfig, CertificateResult, attacks
from dynablocks.run_directory import pipeline, results
from dynablocks.run_directory.certificate_file import audit_certificate, write_certificate
from dynablocks.run_directory.commands import _parse_run, preset_model_data
from dynablocks.run_directory.dry_run import _steps
from dynablocks.run_directory.metrics import stored_curves, write_metrics
from dynablocks.run_directory.network import build_for, load, load_config, load_splits, pixel_statistics
from dynablocks.run_directory.pipeline import attack_run, certify_run, report_run
from dynablocks.run_directory.report import report_data
from dynablocks.run_files import ATTACK_PARTIAL
from dynablocks.switching import REGIONS
from dynablocks.training import TrainingConfig, fit, loop

TINY = (
    "--preset smoke --model.widths [4,4] --model.layers [1,1] --training.epochs 2 --training.threads 1 "
    "--training.precision 32 --attack.samples 16 --attack.steps 3"
)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images are kept apart from those of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNABLOCKS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole ``dynablocks run``; whoever changes it copies it first."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", *TINY.split(), "--out", str(out)]) == 0
    return out


def class_folders(root: Path) -> Path:
    """Ten classes of four grey images of 8 x 8 pixels, each of one shade, for training and for testing."""
    from PIL import Image

    for part, name, k in itertools.product(("train", "test"), "abcdefghij", range(4)):
        (root / part / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * ord(name) % 200 + k, np.uint8)).save(root / part / name / f"{k}.png")
    return root


def documented_figures() -> set[str]:
    """The keys of ``metrics.json`` in the page about the run directory."""
    page = (ROOT / "docs" / "run_directory.md").read_text(encoding="utf-8")
    rows = page.partition("\n## metrics.json\n")[2].partition("\n## ")[0].splitlines()
    return {key for row in rows if row.startswith("| `") for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_run_leaves_the_stable_files(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics.keys() == documented_figures()
    assert metrics["dataset"] == "digits"
    for name in ("robust_accuracy", "certified_accuracy"):
        radii = [point["epsilon"] for point in metrics[name]]
        for wanted in (0.0, 36 / 255, 72 / 255, 108 / 255, 0.5, 1.0):
            assert min(abs(r - wanted) for r in radii) < 1e-12
    page = (finished / "report.html").read_text()
    assert "<svg" in page
    assert "smoke preset" in page


def test_load_gives_an_eval_model_with_properties(finished: Path) -> None:
    network = dynablocks.load(finished)
    assert not network.training
    assert network.input_shape == (1, 8, 8)
    assert network(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    bound = network.properties.of(Lipschitz)
    assert bound is not None
    assert bound.constant < 10**0.5 * 1.001
    assert network.certificate_inputs()[0] < 1.001


def test_second_run_reuses_everything(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in finished.glob("*.safetensors")}
    assert main(["run", *TINY.split(), "--out", str(finished)]) == 0
    assert {p.name: p.stat().st_mtime_ns for p in finished.glob("*.safetensors")} == before
    assert "certified" in capsys.readouterr().out


def test_other_attack_settings_attack_again(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "attack.safetensors").stat().st_mtime_ns
    assert main(["attack", str(run), "--attack.steps", "4"]) == 0
    assert (run / "attack.safetensors").stat().st_mtime_ns != before
    assert json.loads((run / "attack.json").read_text())["config"]["steps"] == 4


def test_the_attack_settings_of_the_run_hold_whatever_comes_first(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(["attack", "--attack.steps", "2", str(run)]) == 0
    config = json.loads((run / "attack.json").read_text())["config"]
    assert (config["steps"], config["samples"]) == (2, 16)


def test_directory_commands(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(["certify", "--out", str(run)]) == 0
    assert main(["verify", str(run), "--samples", "2", "--deep"]) == 0
    assert "holds" in capsys.readouterr().out
    assert main(["explain", str(run), "--depth", "1"]) == 0
    assert "Network certified" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    for command in ("attack", "certify", "verify", "explain", "report"):
        assert main([command, str(run), "--dry-run"]) == 0


def test_a_deep_verification_measures_the_parts_too(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for options in ([], ["--deep"]):
        assert main(["verify", str(finished), "--samples", "2", *options]) == 0
        counts.append(capsys.readouterr().out.count(" holds "))
    assert 0 < counts[0] < counts[1]


def test_the_figures_are_those_of_the_network_and_its_training(finished: Path) -> None:
    metrics, training = (json.loads((finished / name).read_text()) for name in ("metrics.json", "training.json"))
    network, test = load(finished).double(), load_data("digits").test
    with torch.no_grad():
        correct = network(test.images.double() / 255).argmax(1) == test.labels
    assert metrics["clean_accuracy"] == pytest.approx(correct.double().mean().item(), abs=1e-12)
    assert metrics["lipschitz_bound"] == pytest.approx(network.certificate_inputs()[0], rel=1e-9)
    for name in ("train_seconds", "images_per_second", "parameters", "precision", "device"):
        assert metrics[name] == training[name]
    assert metrics["epochs"] == training["epochs"] == 2
    assert metrics["parameters"] == sum(p.numel() for p in network.parameters())
    assert (metrics["test_images"], metrics["attacked_images"]) == (len(test), 16)
    assert (metrics["model"], metrics["preset"], metrics["seed"]) == ("certified", "smoke", 0)
    assert metrics["version"] == dynablocks.__version__


def test_the_curves_are_those_of_the_images(finished: Path) -> None:
    from safetensors.torch import load_file

    metrics, labels = json.loads((finished / "metrics.json").read_text()), load_data("digits").test.labels
    found = load_file(finished / "certificate.safetensors")
    assert torch.equal(found["labels"], labels)
    lead = torch.where(found["predictions"] == labels, found["radii"], -1.0)
    for name, radii in (("certified_accuracy", lead), ("certified_accuracy_of_attacked", lead[:16])):
        for point in metrics[name]:
            certified = (radii > point["epsilon"]).double().mean().item()
            assert point["accuracy"] == pytest.approx(certified, abs=1e-12)
    found = load_file(finished / "attack.safetensors")
    assert torch.equal(found["labels"], labels[:16])
    hits = torch.stack([hit for name, hit in found.items() if name.startswith("broken.")]).any(0)
    right = found["clean_predictions"] == found["labels"]
    # Who was broken within one radius is so within all larger ones.
    left = [(right & ~hits[:, : k + 1].any(1)).double().mean().item() for k in range(hits.shape[1])]
    points = [(point["epsilon"], point["accuracy"]) for point in metrics["robust_accuracy"]]
    assert [accuracy for _, accuracy in points] == pytest.approx(left, abs=1e-12)
    area = sum((b - a) * (u + v) / 2 for (a, u), (b, v) in itertools.pairwise(points))
    assert metrics["auc"] == pytest.approx(area, abs=1e-12)


def test_a_broken_certificate_is_a_hard_error(finished: Path, tmp_path: Path) -> None:
    """The broken twin: radii ten thousand times too large."""
    from safetensors.torch import load_file, save_file

    twin = tmp_path / "run"
    shutil.copytree(finished, twin)
    certificate = load_file(twin / "certificate.safetensors")
    certificate["radii"] = certificate["radii"] * 1e4 + 1e4
    save_file(certificate, twin / "certificate.safetensors")
    assert certify_run(twin).radii.max() < 1e4, "two files that do not belong together are not used"
    save_file(certificate, twin / "certificate.safetensors")
    summary = json.loads((twin / "certificate.json").read_text())
    claimed = CertificateResult.restore(summary, certificate)
    summary |= claimed.summary([point["epsilon"] for point in summary["certified_accuracy"]])
    summary["tensors"] = sha256(twin / "certificate.safetensors")
    (twin / "certificate.json").write_text(json.dumps(summary))
    for report in (certify_run, write_metrics, stored_curves):
        with pytest.raises(UnsoundResult, match="certified at radius"):
            report(twin)
    for command in ("attack", "certify", "report"):
        figures = [twin / name for name in ("metrics.json", "report.html", "autoattack.json")]
        for file in figures:
            file.write_text("{}")
        assert main([command, str(twin)]) == 2
        assert not any(file.exists() for file in figures), "they were made before the certificate was refuted"
    assert (twin / "certificate.json").exists()
    assert (twin / "attack.json").exists()


def test_results_of_other_weights_are_not_reused(finished: Path, tmp_path: Path) -> None:
    import shutil

    twin = tmp_path / "run"
    shutil.copytree(finished, twin)
    summary = json.loads((twin / "attack.json").read_text())
    (twin / "attack.json").write_text(json.dumps(summary | {"weights": "0" * 64}))
    assert write_metrics(twin)["robust_accuracy"] is None
    attack_run(twin)
    assert write_metrics(twin)["robust_accuracy"] is not None


def test_a_warning_is_one_sentence_without_source_code(finished: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(copied / "checkpoint", copied / "checkpoint.previous", dirs_exist_ok=True)
    (copied / "checkpoint" / "model.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "dynablocks", "explain", str(copied)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "warn" in line.lower()]
    assert len(lines) == 1
    assert lines[0].startswith("dynablocks: warning: ")
    assert lines[0].endswith("checkpoint.previous is used.")


def test_a_broken_line_of_the_history_or_a_cut_summary(finished: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(finished, tmp_path / "run")
    with open(twin / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 1')
    assert main(["report", str(twin)]) == 0
    facts = json.loads((twin / "training.json").read_text())
    edits = ({"epochs": float("nan")}, {"train_seconds": None}, {"dataset": 5}, {"fingerprint": []})
    for text in ("{}", "[]", *(json.dumps(facts | edit) for edit in edits)):
        (twin / "training.json").write_text(text)
        with pytest.raises(BadCheckpoint, match=r"training\.json was cut or edited"):
            write_metrics(twin)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fails)
    assert main(["run", "--preset", "smoke"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert ("smaller --attack.batch_size" in said) == (sentence == "out of memory")
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a shape is wrong")))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        main(["run", "--preset", "smoke"])


def test_a_warm_start_may_come_from_a_run_that_held_out_the_same_images_and_more(tmp_path: Path) -> None:
    first, second = (f"{tmp_path}/{name}" for name in ("first", "second"))
    assert main(["train", *TINY.split(), "--data.validation", "40", "--out", first]) == 0
    assert main(["train", *TINY.split(), "--warm_start", first, "--data.validation", "30", "--out", second]) == 0
    third = ["--data.validation", "30", "--seed", "1", "--out", f"{tmp_path}/third"]
    assert main(["train", *TINY.split(), "--warm_start", first, *third]) == 2
    assert main(["train", *TINY.split(), "--warm_start", first, "--overwrite", "--out", first]) == 2
    assert main(["explain", first]) == 0


def test_a_warm_start_takes_the_body_and_not_the_head(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    still = ["--training.lr", "1e-12", "--warm_start", str(finished), "--out", str(out)]
    assert main(["train", *TINY.split(), *still]) == 0
    config = load_config(out)
    networks = {"first": load(finished), "second": load(out), "new": build_for(config, load_splits(config))[0]}
    weights = {key: dict(network.named_parameters()) for key, network in networks.items()}

    def distance(key: str, other: str, part: str) -> float:
        pairs = [(weight, weights[other][name]) for name, weight in weights[key].items() if name.startswith(part)]
        return max((a - b).abs().max().item() for a, b in pairs)

    # Adam moves a weight by about the learning rate in each of the 22 steps.
    assert distance("second", "first", "body.") < 1e-9
    assert distance("second", "new", "head.") < 1e-9
    assert distance("first", "new", "body.") > 1e-3
    assert distance("first", "new", "head.") > 1e-3


def test_a_warm_start_from_another_body_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, wider = tmp_path / "run", TINY.replace("[4,4]", "[4,8]")
    assert main(["train", *wider.split(), "--warm_start", str(finished), "--out", str(out)]) == 2
    assert f"the network in {finished} has another body" in capsys.readouterr().err
    assert not out.exists()


def test_images_held_out_now_may_not_come_in_through_two_warm_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = class_folders(tmp_path / "other")
    first, second, third = (f"{tmp_path}/{name}" for name in ("first", "second", "third"))
    assert main(["train", *TINY.split(), "--out", first]) == 0
    assert main(["train", *TINY.split(), "--data-dir", str(other), "--warm_start", first, "--out", second]) == 0
    last = ["train", *TINY.split(), "--warm_start", second, "--data.validation", "9", "--out", third]
    assert main(last) == 2
    assert "held out here" in capsys.readouterr().err
    assert main([word for word in last if word not in ("--data.validation", "9")]) == 0


def test_a_warm_start_normalises_its_own_images_and_its_certificate_holds(tmp_path: Path) -> None:
    first, second, file = (f"{tmp_path}/{name}" for name in ("first", "second", "c.json"))
    tiny = [*TINY.split(), "--model.normalise", "true"]
    # So many images are held out that the mean of the others is another number.
    assert main(["train", *tiny, "--data.validation", "900", "--out", first]) == 0
    assert main(["train", *tiny, "--warm_start", first, "--data.validation", "800", "--out", second]) == 0
    assert not torch.equal(load(first).body[0].mean, load(second).body[0].mean)
    assert main(["certify", second, "--json", file]) == 0
    assert main(["audit", file, "--samples", "4"]) == 0
    assert main(["audit", second]) == 2


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A whole run on class folders, its certificate file, and where its images have gone since."""
    folder = tmp_path_factory.mktemp("moved")
    run, certificate, images = folder / "run", folder / "certificate.json", class_folders(folder / "images")
    assert main(["run", *TINY.split(), "--data-dir", str(images), "--out", str(run)]) == 0
    assert main(["certify", str(run), "--json", str(certificate)]) == 0
    return run, certificate, images.rename(folder / "elsewhere")


@pytest.mark.parametrize("command", ["attack", "certify", "audit", "verify", "report"])
def test_images_that_moved_are_found_where_they_are_now(
    command: str, moved: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, certificate, images = moved
    given = {"audit": [str(certificate), "--samples", "4", "--steps", "3"], "verify": [str(run), "--samples", "2"]}
    words = [command, *given.get(command, [str(run)])]
    assert main(words) == 2
    assert re.search(r"the data folder .*images does not exist", capsys.readouterr().err)
    assert main([*words, "--data.dir", str(images)]) == 0


def test_images_that_are_not_those_of_the_run_are_told(
    moved: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    run, images = shutil.copytree(moved[0], tmp_path / "run"), moved[2]
    other = shutil.copytree(images, tmp_path / "other")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(other / "test" / "a" / "0.png")
    told = "these are not the images of the run's own copy"
    for place, count in ((images, 0), (other, 1)):
        file = str(tmp_path / f"{place.name}.json")
        for command in (["certify", str(run), "--json", file], ["attack", str(run)]):
            capsys.readouterr()
            assert main([*command, "--data.dir", str(place)]) == 0
            assert capsys.readouterr().err.count(told) == count
        assert main(["audit", file, "--samples", "2", "--steps", "2"]) == 0
        said = capsys.readouterr().out
        assert said.count(told) == count
        assert "the certificate holds" in said
        assert main(["report", str(run), "--data.dir", str(place)]) == 0
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["own_images"] is (count == 0)
        assert metrics["fingerprint"] == json.loads(Path(file).read_text())["data"]["fingerprint"]
        page = html.unescape((run / "report.html").read_text(encoding="utf-8"))
        assert page.count("These are not the images of the run's own copy") == count
        assert page.count("A training on the run's own copy alone does not get these results") == count
        assert page.count(f"folder with fingerprint {metrics['fingerprint'][:16]}…") == 2 * count


def test_a_copy_with_too_few_training_images_to_hold_out_serves_for_tests(tmp_path: Path) -> None:
    """The training held out more images than another copy has for training."""
    run, images = tmp_path / "run", class_folders(tmp_path / "images")
    assert main(["train", *TINY.split(), "--data-dir", str(images), "--data.validation", "12", "--out", str(run)]) == 0
    other = shutil.copytree(images, tmp_path / "other", ignore=lambda folder, names: {"1.png", "2.png", "3.png"})
    place = ["--data.dir", str(other)]
    assert main(["certify", str(run), *place, "--dry-run"]) == 0
    assert main(["certify", str(run), *place, "--json", str(tmp_path / "certificate.json")]) == 0
    for command in ("certify", "attack", "report"):
        assert main([command, str(run), *place]) == 0
    assert main(["verify", str(run), *place, "--samples", "2"]) == 0


def test_images_whose_labels_mean_other_classes_are_refused(
    moved: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the folder of the first class each label is that of the class before."""
    run, other = shutil.copytree(moved[0], tmp_path / "run"), shutil.copytree(moved[2], tmp_path / "other")
    for part in ("train", "test"):
        shutil.rmtree(other / part / "a")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    for command, dry in itertools.product(("certify", "attack", "report"), ([], ["--dry-run"])):
        assert main([command, str(run), "--data.dir", str(other), *dry]) == 2
        said = capsys.readouterr().err
        assert "class 0 is 'b' in the images of folder and 'a' in those that the network learned" in said
        assert "give images with its classes a, b, c, d, e and 5 more." in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["verify", str(run), "--data.dir", str(other), "--samples", "2"]) == 0
    facts = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps({name: facts[name] for name in facts if name != "class_names"}))
    assert main(["certify", str(run), "--data.dir", str(other)]) == 0


def test_ctrl_c_ends_a_training_with_130_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[int] = []
    take_step = loop.take_step

    def pressed_in_the_fifth(session: Any) -> None:
        take_step(session)
        steps.append(session.step)
        if len(steps) == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "take_step", pressed_in_the_fifth)
    command = ["train", *TINY.split(), "--out", str(tmp_path / "run")]
    assert main(command) == 130
    said = capsys.readouterr().err
    assert "Stopped after step 5 of 22" in said
    assert "what was finished" not in said
    assert main(command) == 0
    assert steps == list(range(22))


def test_ctrl_c_outside_a_training_is_one_sentence(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    twin = shutil.copytree(finished, tmp_path / "run")
    for stored in twin.glob("certificate.*"):
        stored.unlink()
    monkeypatch.setattr(pipeline, "certify", pressed)
    assert main(["certify", str(twin)]) == 130
    said = capsys.readouterr().err
    assert said == "dynablocks: stopped; nothing of it is kept, and the same command begins anew.\n"


def test_an_attack_that_was_stopped_goes_on_to_the_same_result(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = (shutil.copytree(finished, tmp_path / name) for name in ("whole", "stopped"))
    for stored in (*whole.glob("attack.*"), *stopped.glob("attack.*")):
        stored.unlink()
    assert main(["attack", str(whole)]) == 0
    begun: list[tuple[str, int, int]] = []
    attack_at = attacks._Attack._attack_at

    def pressed_in_the_fifth(self: Any, *attacked: Any) -> None:
        begun.append(attacked)
        if len(begun) == 5:
            raise KeyboardInterrupt
        attack_at(self, *attacked)

    monkeypatch.setattr("dynablocks.progress.LINE_SECONDS", 0.0)
    monkeypatch.setattr(attacks._Attack, "_attack_at", pressed_in_the_fifth)
    assert main(["attack", str(stopped)]) == 130
    assert (stopped / ATTACK_PARTIAL).exists()
    assert main(["attack", str(stopped)]) == 0
    assert len(begun) == len(set(begun)) + 1, "only the round that was stopped is made again"
    assert not (stopped / ATTACK_PARTIAL).exists()
    for name in ("attack.json", "attack.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_without_a_preset_cifar_images_take_the_quarter_of_an_hour() -> None:
    assert preset_model_data(["--data.name", "cifar10"])[0] == "certified/cpu-15min"
    assert preset_model_data(["--data.name", "cifar10", "--model.name", "resnet"])[0] == "cpu"
    assert preset_model_data([])[0] == "cpu"


def test_a_flag_that_is_null_names_nothing(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"data:\n  dir: {class_folders(tmp_path / 'photos')}\n")
    assert preset_model_data(["--data.name", "null"]) == ("cpu", "certified", "digits")
    assert preset_model_data(["--config", str(file)])[2] == "folder"
    assert preset_model_data(["--config", str(file), "--data.name=null"])[2] == "folder"
    assert preset_model_data(["--config", str(file), "--data.dir", "null"])[2] == "digits"
    config, options = _parse_run("train", "Train.", [f"--config={file}", "--data", "null", "--data-dir", "null"])
    assert (config.data.name, config.data.dir) == (None, None)
    assert config.training == _parse_run("train", "Train.", [])[0].training
    assert options.out == Path("runs") / "digits-certified-cpu"


def test_dry_run_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", *TINY.split(), "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for word in ("parameters", "cost", "optimiser steps", "training time", "cached"):
        assert word in said
    assert not out.exists()


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY.split(), "--print_config"]) == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert main(["train", "--config", str(file), "--dry-run", "--out", str(tmp_path / "run")]) == 0
    assert "certified" in capsys.readouterr().out


def test_shorthands_and_flags_override_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", "prescribed", "--lift=paper", "--preset", "paper", "--print_config"]) == 0
    text = capsys.readouterr().out
    assert "name: prescribed" in text
    assert "lift: paper" in text
    assert "epochs: 100" in text


@pytest.mark.parametrize(
    "command", ["run", "train", "attack", "certify", "verify", "explain", "report", "fit", "rollout", "list"]
)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert len(capsys.readouterr().out) > 200


def test_a_named_model_is_explained_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--model.widths", "[4,4]", "--model.layers", "[1,1]"]
    assert main(["explain", "--model", "resnet", *sizes, "--depth", "1"]) == 0
    network = build(ModelConfig("resnet", widths=(4, 4), layers=(1, 1)), (3, 32, 32), 10, seed=0)
    said = capsys.readouterr().out
    assert said == f"{explain(network, 1)}\n"
    assert said.startswith("Network resnet: ")


def test_a_list_without_a_kind_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = [line.partition(":") for line in capsys.readouterr().out.splitlines()]
    named = {kind: sorted(name.strip() for name in names.split(",")) for kind, _, names in lines}
    assert named == {kind: sorted(names) for kind, names in catalogue().items()}


def test_one_version_is_told_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in settings["project"]["dynamic"]
    version, home = dynablocks.__version__, ROOT / settings["tool"]["hatch"]["version"]["path"]
    assert f'\n__version__ = "{version}"\n' in home.read_text(encoding="utf-8")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dynablocks {version}\n"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == ("Unreleased" if ".dev" in version else version)


HEAVY = (
    "PIL",
    "datasets",
    "huggingface_hub",
    "jsonargparse",
    "lightning_fabric",
    "matplotlib",
    "pyarrow",
    "scipy",
    "sklearn",
)
IMPORTS = """
import sys, torch
already = set(sys.modules)
import dynablocks
for name in dynablocks.__all__:
    getattr(dynablocks, name)
import dynablocks.cli, dynablocks.experiments
print(*sorted((set(sys.modules) - already) & set(sys.argv[1:])))
"""


def test_what_is_heavy_is_imported_when_it_is_used() -> None:
    command = [sys.executable, "-c", IMPORTS, *HEAVY]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []


MODULES = """
import sys
import dynablocks
assert "dynablocks.fitting" not in sys.modules
print(dynablocks.fitting.load_fit.__name__)
print({"fitting", "experiments", "load"} <= set(dir(dynablocks)), hasattr(dynablocks, "fittings"))
"""


def test_the_modules_of_the_package_are_imported_when_they_are_named() -> None:
    done = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["load_fit", "True", "False"]


def test_config_round_trip() -> None:
    config = RunConfig(model=ModelConfig("flexible", widths=(8, 8), layers=(1, 2), slope=0.25))
    assert from_yaml(to_yaml(config), "here") == config


def test_load_refuses_a_directory_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no checkpoint"):
        dynablocks.load(tmp_path)


def test_results_of_other_images_or_another_version_are_not_reused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = shutil.copytree(finished, tmp_path / "run")
    attack_run(twin)
    before = certify_run(twin)
    stored = (twin / "certificate.json").stat().st_mtime_ns
    assert torch.equal(certify_run(twin).radii, before.radii)
    assert (twin / "certificate.json").stat().st_mtime_ns == stored
    plain = load_splits

    def darker(config: RunConfig, **options: bool) -> DataSplits:
        splits = plain(config, **options)
        test = dataclasses.replace(splits.test, images=splits.test.images // 2)
        return dataclasses.replace(splits, test=test, fingerprint="darker")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "load_splits", darker)
        assert not torch.equal(certify_run(twin).radii, before.radii)
        assert json.loads((twin / "metrics.json").read_text())["robust_accuracy"] is None
    assert torch.equal(certify_run(twin).radii, before.radii)
    assert json.loads((twin / "metrics.json").read_text())["robust_accuracy"] is not None
    with monkeypatch.context() as patch:
        patch.setattr(dynablocks, "__version__", "99")
        stored = (twin / "certificate.json").stat().st_mtime_ns
        certify_run(twin)
        assert (twin / "certificate.json").stat().st_mtime_ns != stored


def test_what_is_certified_of_the_attacked_images_stands_beside_what_attacks_left(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = write_metrics(finished)
    same = {p["epsilon"]: p["accuracy"] for p in metrics["certified_accuracy_of_attacked"]}
    robust = {p["epsilon"]: p["accuracy"] for p in metrics["robust_accuracy"]}
    assert metrics["attacked_images"] < metrics["test_images"]
    assert same.keys() == robust.keys()
    assert all(same[epsilon] <= robust[epsilon] for epsilon in robust)
    radii = certify_run(finished)
    first = (radii.correct & (radii.radii > 0))[: metrics["attacked_images"]]
    assert same[0.0] == pytest.approx(float(first.double().mean()))
    assert main(["attack", str(finished)]) == 0
    assert "certified of these" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("certificate.json", {"certified_accuracy": None}),
        ("certificate.json", {"certified_accuracy": [{"epsilon": 0.0}]}),
        ("attack.json", {"config": []}),
        ("attack.json", {"robust_accuracy": 5}),
        ("attack.json", {"robust_accuracy": [{"epsilon": None, "accuracy": 1.0}]}),
        ("attack.json", {"samples": "x"}),
        ("attack.json", {"robust_accuracy": [{"epsilon": float("nan"), "accuracy": 1.0}]}),
        ("attack.json", {"auc": float("inf")}),
        ("certificate.json", {"clean_accuracy": float("nan")}),
        ("certificate.json", {"body_lipschitz": "x"}),
        ("certificate.json", {"clean_accuracy": 1.0}),
        ("certificate.json", {"certified_accuracy": [{"epsilon": 0.0, "accuracy": 1.0}]}),
        ("attack.json", {"clean_accuracy": 1.0}),
        ("attack.json", {"robust_accuracy": []}),
        ("attack.json", {"auc": 1.0}),
    ],
)
def test_edited_results_are_made_again(finished: Path, tmp_path: Path, file: str, change: dict) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    command = [file.removesuffix(".json").replace("certificate", "certify"), str(run)]
    assert main(command) == 0
    content = json.loads((run / file).read_text())
    (run / file).write_text(json.dumps(content | change))
    assert main(command) == 0
    assert json.loads((run / file).read_text()) == content


@pytest.mark.parametrize("edited", ["accuracy", "radii"])
def test_an_edited_curve_is_made_again(edited: str, finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    assert main(["attack", str(run)]) == 0
    kept = (run / "attack.json").read_text()
    content = json.loads(kept)
    if edited == "accuracy":
        content["robust_accuracy"][1]["accuracy"] += 0.01
    else:
        content["config"]["epsilons"] = content["config"]["epsilons"][:-1]
    (run / "attack.json").write_text(json.dumps(content))
    assert main(["attack", str(run)]) == 0
    assert json.loads((run / "attack.json").read_text()) == json.loads(kept)


def test_a_result_does_not_vouch_for_the_tensors_of_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    ours, theirs = {"radii": torch.zeros(2)}, {"radii": torch.ones(2)}
    write_json = results.write_json

    def late(path: Path, content: dict) -> None:
        save_file(theirs, tmp_path / "certificate.safetensors")
        write_json(path, content)

    monkeypatch.setattr(results, "write_json", late)
    results.store(tmp_path, results.CERTIFICATE, {}, ours)
    stored = json.loads((tmp_path / "certificate.json").read_text())["tensors"]
    assert stored != sha256(tmp_path / "certificate.safetensors")


def test_starting_anew_removes_the_report_of_the_network_before(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert (run / "report.html").exists()
    assert main(["train", *TINY.split(), "--seed", "1", "--overwrite", "--out", str(run)]) == 0
    assert not (run / "report.html").exists()


def test_names_with_brackets_are_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a[" / "b] [red]"
    assert main(["train", *TINY.split(), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().err.replace("\n", "")


def test_measured_pixel_statistics_are_those_of_the_pixels() -> None:
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    train = ImageDataset("folder", images, torch.zeros(7, dtype=torch.long), ("a",))
    pixels = images.transpose(0, 1).flatten(1).double() / 255
    mean, std = pixel_statistics(train)
    assert mean == tuple(round(float(m), 4) for m in pixels.mean(1))
    assert std == tuple(round(float(s), 4) for s in pixels.std(1))


def test_an_unfinished_training_is_refused_before_anything_is_certified(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = shutil.copytree(finished, tmp_path / "run")
    (twin / "training.json").unlink()
    (twin / "certificate.json").unlink()
    monkeypatch.setattr(pipeline, "certify", lambda *given, **options: pytest.fail("certified"))
    assert main(["certify", str(twin)]) == 2


@pytest.mark.parametrize("command", ["certify", "attack"])
def test_a_disk_without_room_is_known_before_the_computation(
    command: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    twin = shutil.copytree(finished, tmp_path / "run")
    for stored in (*twin.glob("certificate.*"), *twin.glob("attack.*")):
        stored.unlink()
    monkeypatch.setattr(pipeline, "load", lambda directory: pytest.fail("the network was loaded"))
    monkeypatch.setattr(os, "fsync", full)
    assert main([command, str(twin)]) == 2
    said = capsys.readouterr().err
    assert "No space left on device; free some space, make the folder writable" in said
    assert "--out" not in said


class FullDisk(io.RawIOBase):
    """A stream that takes nothing until there is room."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number: int | None = number

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        if self.number is not None:
            raise OSError(self.number, os.strerror(self.number))
        return len(content)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.ENOSPC, 2, "dynablocks: error: standard output: No space left on device; choose another place.\n"),
        (errno.EPIPE, 1, ""),
    ],
)
@pytest.mark.parametrize("command", ["list models", "list --help"])
def test_an_output_that_takes_nothing_is_told_by_the_exit_code(
    command: str, number: int, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = FullDisk(number)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(disk), encoding="utf-8"))
        assert main(command.split()) == code
        disk.number = None
    assert capsys.readouterr().err == said


def test_radii_that_are_attacked_later_are_certified_too(finished: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(finished, tmp_path / "run")
    assert main(["attack", str(twin), "--attack.epsilons", "[0.0,0.123]"]) == 0
    metrics = json.loads((twin / "metrics.json").read_text())
    assert 0.123 in [point["epsilon"] for point in metrics["certified_accuracy"]]
    assert set(stored_curves(twin)) >= {"certified", "attacked (worst)"}
    assert 0.123 in stored_curves(twin)["certified"].epsilons


def test_weights_that_change_while_they_are_certified_make_no_certificate(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = iter(["before", "after"])
    monkeypatch.setattr("dynablocks.run_directory.certificate_file.weights_hash", lambda directory: next(hashes))
    assert main(["certify", str(finished), "--json", str(tmp_path / "c.json")]) == 2
    assert not (tmp_path / "c.json").exists()


def test_flags_override_configuration_files_wherever_they_stand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("preset: cpu\nmodel:\n  name: resnet\n")
    two.write_text("training:\n  lr: 0.5\n")
    files = ["--config", str(one), f"--config={two}"]
    assert main(["train", "--preset", "smoke", "--lr-is-no-flag", *files]) == 2
    assert main(["train", "--preset", "smoke", "--training.lr", "0.25", *files, "--print_config"]) == 0
    text = capsys.readouterr().out
    assert "preset: smoke" in text
    assert "name: resnet" in text
    assert "lr: 0.25" in text
    assert "epochs: 4" in text


@pytest.mark.parametrize("command", ["train --pres smoke", "reproduce table1 --pres smoke", "attack run --device cpu"])
def test_abbreviations_and_shorthands_of_other_commands_are_refused(command: str) -> None:
    assert main(command.split()) == 2


def test_a_gpu_that_is_gone_is_no_reason_not_to_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    from dynablocks.training.precision import present_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert present_device("cuda") == "cpu"


def test_digits_are_neither_mirrored_nor_cropped() -> None:
    for preset in ("smoke", "cpu", "paper"):
        for model in ("certified", "prescribed"):
            training = preset_settings(preset, model, "digits")["training"]
            assert not training.get("flip"), (preset, model)
            assert not training.get("crop_padding"), (preset, model)


def test_verify_refuses_a_run_that_breaks_its_word(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dynablocks.models import Network
    from dynablocks.properties import Declaration

    monkeypatch.setattr(Network, "declare", lambda self: Declaration.of(Lipschitz(1e-3), reason="hope"))
    assert main(["verify", str(finished), "--samples", "2"]) == 2
    assert "VIOLATED" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["report", "attack", "certify", "verify", "explain"])
def test_two_run_directories_are_one_too_many(command: str, finished: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main([command, str(finished), "--out", str(tmp_path / "other")]) == 2
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_dry_run_says_that_another_training_is_in_the_way(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *TINY.split(), "--out", str(finished), "--dry-run"]) == 0
    assert "training (finished)" in capsys.readouterr().out
    assert main(["run", *TINY.split(), "--training.lr", "0.5", "--out", str(finished), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "nothing that can be used" in said
    assert "training.lr" in said
    assert main(["run", *TINY.split(), "--max-minutes", "60", "--out", str(finished), "--dry-run"]) == 0
    assert "finished training with max_minutes None, this one has 60" in " ".join(capsys.readouterr().out.split())
    assert main(["run", *TINY.split(), "--overwrite", "--out", str(finished), "--dry-run"]) == 0
    assert "nothing: --overwrite starts anew" in capsys.readouterr().out


def test_what_a_report_shows_is_read_and_its_figures_are_written_with_the_page(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    shown = report_data(str(run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (run / "metrics.json").unlink()
    assert report_run(str(run)) == run / "report.html"
    assert json.loads((run / "metrics.json").read_text()) == shown.metrics


def test_a_report_tells_a_measured_rounding_from_a_proved_one(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    stored = json.loads((run / "certificate.json").read_text())
    for changes, reason in (({}, None), ({"rounding": "measured", "rounding_reason": "A guess."}, "A guess.")):
        (run / "certificate.json").write_text(json.dumps(stored | changes))
        shown = report_data(run)
        assert {example.proved for example in shown.examples} == {reason is None}
        assert shown.metrics["rounding"] == ("proved" if reason is None else "measured")
        assert shown.metrics["rounding_reason"] == reason


def test_metrics_name_the_images_that_they_are_of(finished: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(finished, tmp_path / "run")
    splits = load_splits(load_config(twin))
    other = replace(splits, test=replace(splits.test, name="other-digits"), fingerprint="f" * 64)
    assert write_metrics(twin)["dataset"] == "digits"
    assert write_metrics(twin, other)["dataset"] == "other-digits"
    write_metrics(twin)


def test_load_refuses_a_training_that_is_not_finished(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 3:
            raise Stop

    splits = load_data("digits")
    config = RunConfig(training=TrainingConfig(epochs=1, batch_size=64, checkpoint_seconds=0.0, precision="32"))
    network, description = build_for(config, splits)
    with pytest.raises(Stop):
        fit(network, splits, config.training, tmp_path, describe=description, on_step=stop)
    write_text(tmp_path / "config.yaml", to_yaml(config))
    for use in (dynablocks.load, certify_run, attack_run):
        with pytest.raises(BadCheckpoint, match=r"is not finished.*goes on from there"):
            use(tmp_path)


def test_values_that_look_like_odd_numbers_and_are_none_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    group = tmp_path / "exp" / "01" / "training.yaml"
    group.parent.mkdir(parents=True)
    group.write_text("epochs: 1.5\nlr: 1e-05\n")
    settings = tmp_path / "settings.yaml"
    settings.write_text("data:\n  name: digits\n  dir: '010'\n")
    given = ["--out", "runs/010", "--training", "exp/01/training.yaml", "--config", "settings.yaml"]
    assert main(["train", "--preset", "smoke", *given, "--attack.epsilons", "[0.05,1e-05]", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["training"]["epochs"] == 1.5
    assert shown["attack"]["epsilons"] == [0.05, 1e-05]
    assert shown["data"]["dir"] == "010"
    group.write_text("max_minutes: 1:30\n")
    assert main(["train", "--preset", "smoke", *given, "--print_config"]) == 2
    assert "1:30 is no plain number" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["notes.txt", "missing"])
def test_a_report_of_what_is_no_run_says_so_and_writes_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert main(["report", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    assert "free some space" not in said
    assert name in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_a_home_folder_is_one_wherever_a_path_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = tmp_path / "settings.yaml"
    settings.write_text("out: ~/runs/a\nwarm_start: ~/runs/b\n")
    config, options = _parse_run("train", "Train.", ["--preset", "smoke", f"--config={settings}"])
    assert (options.out, config.warm_start) == (tmp_path / "runs" / "a", tmp_path / "runs" / "b")
    assert _parse_run("train", "Train.", ["--preset", "smoke", "--out=~/c"])[1].out == tmp_path / "c"
    parser = make_parser("audit", "Audit.")
    for flag in ("--run", "--json"):
        parser.add_argument(flag, type=Path)
    found = parser.parse_args(["--run=~/d", "--json", "~/e.json"])
    assert (found.run, found.json) == (tmp_path / "d", tmp_path / "e.json")
    with pytest.raises(InvalidArgument, match="begins with a home folder that is not known here"):
        parser.parse_args(["--run=~no-such-user-here/d"])


def test_a_configuration_file_is_read_once_with_or_without_a_byte_order_mark(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[str] = []
    text_of = arguments._text

    def counted(file: str, flag: str) -> str:
        read.append(file)
        return text_of(file, flag)

    monkeypatch.setattr(arguments, "_text", counted)
    for name, mark in (("plain.yaml", ""), ("marked.yaml", "\ufeff")):
        file = tmp_path / name
        capsys.readouterr()
        file.write_text(f"{mark}data:\n  name: digits\n  dir: größer\n", encoding="utf-8")
        assert main(["train", "--preset", "smoke", "--config", str(file), "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["data"]["dir"] == "größer"
        file.write_text(f"{mark}attack:\n  steps: 2\n", encoding="utf-8")
        assert main(["attack", str(finished), f"--config={file}", "--dry-run"]) == 0
        assert read == [str(file)] * 2
        read.clear()


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="open files have no names here")
def test_a_configuration_may_come_through_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"preset: smoke\nmodel:\n  name: resnet\n")
        os.close(writing)
        assert main(["train", "--config", f"/dev/fd/{reading}", "--print_config"]) == 0
    finally:
        os.close(reading)
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["preset"], shown["model"]["name"]) == ("smoke", "resnet")


@pytest.mark.parametrize("text", ["", "# training:\n#   lr: 0.1\n", "- 1\n"])
def test_a_configuration_without_settings_is_one_sentence(
    text: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    for command in (["train"], ["attack", str(finished)]):
        assert main([*command, "--config", str(file)]) == 2
        said = capsys.readouterr().err
        assert said == f"dynablocks: error: --config {file} holds no settings; write one with --print_config.\n"


def test_commands_work_where_there_is_no_standard_output(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        codes = [main(["list", "models"]), main(["certify", str(finished)])]
    assert codes == [0, 0]


ALL_CACHED = "training (finished), attack, certificate"


def said_to_be_cached(capsys: pytest.CaptureFixture[str]) -> str:
    found = re.search(r"cached:? +(.*)\n$", capsys.readouterr().out)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("command", "flags", "cached"),
    [
        ("run", "", ALL_CACHED),
        ("run", "--attack.steps 4", "training (finished), certificate"),
        ("attack", "", ALL_CACHED),
        ("attack", "--attack.steps 4", "training (finished), certificate"),
        ("attack", "--attack.samples 9", "training (finished), certificate"),
        ("certify", "", ALL_CACHED),
        ("certify", "--arithmetic float32", "training (finished), attack"),
        ("verify", "", ALL_CACHED),
        ("report", "", ALL_CACHED),
    ],
)
def test_a_dry_run_promises_the_results_that_are_taken(
    command: str, flags: str, cached: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TINY.split() if command == "run" else []
    assert main([command, *settings, "--out", str(finished), *flags.split(), "--dry-run"]) == 0
    assert said_to_be_cached(capsys) == cached


def test_a_dry_run_with_other_images_promises_no_result(
    moved: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    run, _, images = moved
    other = shutil.copytree(images, tmp_path / "other")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(other / "test" / "a" / "0.png")
    for command in ("attack", "certify", "report"):
        assert main([command, str(run), "--dry-run"]) == 2
        for place, cached in ((images, ALL_CACHED), (other, "training (finished)")):
            assert main([command, str(run), "--data.dir", str(place), "--dry-run"]) == 0
            assert said_to_be_cached(capsys) == cached


@pytest.mark.parametrize(
    ("settings", "per_epoch", "seconds", "steps", "total"),
    [
        ({"epochs": 32}, 7, 0.01, "224 (32 epochs of 7 steps)", "2 s"),
        ({"epochs": 0.1}, 7, 2.0, "1 (0.1 epochs of 7 steps)", "2 s"),
        ({"epochs": 32, "max_minutes": 5}, 7, 1.0, "224 (32 epochs of 7 steps)", "3 min 44 s"),
        (
            {"epochs": 32, "max_minutes": 1},
            7,
            1.0,
            "as many of 224 (32 epochs of 7 steps) as fit into 1 min 0 s, about 60",
            "1 min 0 s",
        ),
        (
            {"epochs": None, "max_minutes": 1},
            7,
            0.5,
            "as many as fit into 1 min 0 s, about 120 (7 an epoch)",
            "1 min 0 s",
        ),
    ],
)
def test_a_dry_run_counts_the_optimiser_steps(
    settings: dict[str, Any], per_epoch: int, seconds: float, steps: str, total: str
) -> None:
    assert _steps(TrainingConfig(**settings), per_epoch, seconds) == (steps, total)


def test_a_dry_run_counts_the_steps_that_are_taken_and_says_what_is_counted(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = json.loads((finished / "training.json").read_text())["steps"]
    dry = ["train", *TINY.split(), "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(dry) == 0
    said = capsys.readouterr().out
    assert re.search(r"^optimiser steps +(\d+) ", said, re.MULTILINE)[1] == str(taken)
    assert "adversary" not in said
    assert main([*dry, "--training.adversary", "pgd"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^cost .* MFLOP an image and training step, without the adversary$", said, re.MULTILINE)
    assert re.search(r"^training time .* images, with the adversary\)$", said, re.MULTILINE)


def commands_of(page: Path) -> list[list[str]]:
    """The words of the commands that a report gives."""
    found = re.search(r'<pre class="command">(.*?)</pre>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return [shlex.split(line) for line in html.unescape(found[1]).splitlines()]


def test_the_commands_of_a_report_get_its_results_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "a run")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a run"]) == 0
    train = ["dynablocks", "run", "--config", "a run/config.yaml", "--out", "runs/a run-again"]
    assert commands_of(run / "report.html") == [train]
    assert main(["certify", "a run", "--arithmetic", "float32"]) == 0
    assert main(["attack", "a run", "--attack.steps", "2", "--attack.losses", "[ce]"]) == 0
    assert main(["report", "a run"]) == 0
    commands = commands_of(run / "report.html")
    assert [words[1] for words in commands] == ["run", "certify", "attack"]
    assert all(main(words[1:]) == 0 for words in commands)
    before, after = (json.loads((place / "metrics.json").read_text()) for place in (run, Path("runs") / "a run-again"))
    for metrics in (before, after):
        for timed in ("train_seconds", "images_per_second"):
            del metrics[timed]
    assert after.pop("lipschitz_bound") == pytest.approx(before.pop("lipschitz_bound"), rel=1e-9)
    assert after == before


def test_a_report_says_where_the_images_are_now(moved: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from PIL import Image

    run, images = shutil.copytree(moved[0], tmp_path / "run"), str(moved[2])
    other = shutil.copytree(images, tmp_path / "other")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(other / "test" / "a" / "0.png")
    train = ["dynablocks", "run", "--config", str(run / "config.yaml"), "--out", "runs/run-again"]
    assert main(["report", str(run), "--data.dir", images]) == 0
    assert commands_of(run / "report.html") == [[*train, "--data.dir", images]]
    # The network was not trained on those, so no training on them gets its results again.
    assert main(["certify", str(run), "--data.dir", str(other)]) == 0
    assert main(["report", str(run), "--data.dir", str(other)]) == 0
    certify = ["dynablocks", "certify", "runs/run-again", "--data.dir", str(other)]
    assert commands_of(run / "report.html") == [train, certify]


def test_a_run_and_a_model_in_a_file_are_not_both_explained(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("model:\n  name: resnet\n  widths: [4, 4]\n  layers: [1, 1]\n")
    assert main(["explain", str(finished), "--config", str(file)]) == 2
    assert "a run directory and a model (--model, or model: in a --config file) were given" in capsys.readouterr().err
    assert main(["explain", "--config", str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out == "would explain an untrained resnet\n"
    file.write_text("depth: 1\n")
    assert main(["explain", str(finished), "--config", str(file)]) == 0


def test_a_loaded_network_names_its_classes_without_the_images(
    finished: Path, moved: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    assert load(finished).class_names == tuple("0123456789")
    assert load(moved[0]).class_names == tuple("abcdefghij")
    run = shutil.copytree(finished, tmp_path / "run")
    facts = json.loads((run / "training.json").read_text())
    for names in (None, [], ["0"], "0123456789", list(range(10))):
        (run / "training.json").write_text(json.dumps(facts | {"class_names": names}))
        assert load(run).class_names is None


def test_a_run_that_stores_no_class_names_is_whole_and_gets_them_from_its_command(
    finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    facts = json.loads((run / "training.json").read_text())
    del facts["class_names"]
    (run / "training.json").write_text(json.dumps(facts))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert load(run).class_names is None
    assert main(["certify", str(run), "--json", str(tmp_path / "c.json")]) == 0
    assert main(["audit", str(tmp_path / "c.json"), "--samples", "2", "--steps", "2"]) == 0
    assert main(["run", *TINY.split(), "--out", str(run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert load(run).class_names == tuple("0123456789")


def test_the_printed_settings_of_an_attack_are_those_that_it_uses(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for words in ([str(finished)], [str(finished), "--attack.steps", "4"], []):
        assert main(["attack", *words, "--print_config"]) == 0
        printed.append(capsys.readouterr().out)
    settings = [yaml.safe_load(text)["attack"] for text in printed]
    assert [(shown["samples"], shown["steps"]) for shown in settings[:2]] == [(16, 3), (16, 4)]
    assert settings[2]["samples"] == AttackConfig().samples
    file = tmp_path / "attack.yaml"
    file.write_text(printed[0])
    assert main(["attack", str(finished), f"--config={file}", "--dry-run"]) == 0
    assert said_to_be_cached(capsys) == ALL_CACHED


def test_full_names_in_a_configuration_file_count_as_in_their_groups(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nested, full = tmp_path / "nested.yaml", tmp_path / "full.yaml"
    nested.write_text("model:\n  name: prescribed\n  lift: paper\ntraining:\n  lr: 0.5\n")
    full.write_text("model.name: prescribed\nmodel.lift: paper\ntraining.lr: 0.5\n")
    parsed = [_parse_run("train", "Train.", [f"--config={file}"]) for file in (nested, full)]
    (config, options), (other, others) = parsed
    assert (other, others.out) == (config, options.out)
    assert (other.model.name, other.model.lift, other.model.widths) == ("prescribed", "paper", (16, 32, 64))
    full.write_text("model.name: resnet\n")
    assert main(["explain", str(finished), "--config", str(full)]) == 2
    assert "or model: in a --config file" in capsys.readouterr().err
    full.write_text(f"data.dir: {class_folders(tmp_path / 'photos')}\n")
    assert preset_model_data(["--config", str(full)])[2] == "folder"


def test_a_model_of_ones_own_gets_of_a_preset_the_settings_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_body(config: ModelConfig, shape: tuple[int, int, int]) -> tuple[torch.nn.Sequential, int]:
        return torch.nn.Sequential(torch.nn.Flatten()), shape[0] * shape[1] * shape[2]

    defaults = ModelConfig("mine", widths=(4,), layers=(1,), head="rows", normalise=False)
    for settings in ((), ("kernel_size",)):
        kind = ModelKind("the pixels", defaults, build_body, frozenset(settings))
        monkeypatch.setitem(MODELS, "mine", kind)
        config, _ = _parse_run("run", "Run.", ["--model", "mine"])
        assert (config.model.widths, config.model.padding) == ((32, 64), None)
        assert config.model.kernel_size == (2 if settings else None)
        assert config.training == _parse_run("run", "Run.", [])[0].training
    assert main(["run", "--model", "mine", "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert re.search("^model +mine$", capsys.readouterr().out, re.MULTILINE)
    assert main(["run", "--model", "mine", "--model.padding", "full", "--dry-run"]) == 2
    assert "padding is 'full', but model mine has no such setting" in capsys.readouterr().err


def test_a_model_of_ones_own_is_told_to_say_how_many_features_it_ends_in(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = ModelConfig("mine", widths=(4,), layers=(1,), head="rows", normalise=False)
    kind = ModelKind("the pixels", defaults, lambda config, shape: torch.nn.Sequential(torch.nn.Flatten()), frozenset())
    monkeypatch.setitem(MODELS, "mine", kind)
    with pytest.raises(InvalidArgument, match="build_body of model 'mine' gives a Sequential; a pair is needed"):
        build(ModelConfig("mine"), (1, 4, 4), 10)


@pytest.mark.parametrize("missing", ["widths", "layers", "head"])
def test_a_model_of_ones_own_says_what_its_defaults_lack(missing: str) -> None:
    given: dict[str, Any] = {"widths": (4,), "layers": (1,), "head": "rows"}
    del given[missing]
    with pytest.raises(InvalidArgument, match=rf"^the defaults of model mine leave {missing} empty; give each a value"):
        ModelKind("none", ModelConfig("mine", **given), lambda config, shape: (torch.nn.Sequential(), 1), frozenset())


@pytest.fixture(scope="module")
def timid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training with a region of one's own, which is not registered any more."""
    out = tmp_path_factory.mktemp("timid") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGIONS, "timid", REGIONS["tight"])
        own = ["--model", "prescribed", "--model.region", "timid"]
        assert main(["train", *TINY.split(), *own, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("command", ["explain", "certify", "audit"])
@pytest.mark.parametrize(
    ("registry", "name"), [(MODELS, "certified"), (ORTHOGONAL, "cayley")], ids=["model", "parametrisation"]
)
def test_a_network_of_a_model_that_is_not_registered_here_says_what_to_import(
    registry: Registry[Any],
    name: str,
    command: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, certificate = shutil.copytree(finished, tmp_path / "run"), tmp_path / "certificate.json"
    settings = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(settings.replace("method: null", "method: cayley"), encoding="utf-8")
    assert main(["certify", str(run), "--json", str(certificate)]) == 0
    capsys.readouterr()
    monkeypatch.delitem(registry, name)
    assert main([command, str(certificate if command == "audit" else run)]) == 2
    said = capsys.readouterr().err
    assert f"is of {registry.kind} {name!r}, and registered here are {', '.join(sorted(registry))}; for one of" in said
    assert "import the file that registers it in Python" in said
    assert "--overwrite" not in said


@pytest.mark.parametrize("command", ["explain", "certify", "verify"])
def test_a_network_with_a_region_that_is_not_registered_here_says_what_to_import(
    command: str, timid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(timid)]) == 2
    said = capsys.readouterr().err
    assert "is of region 'timid', and registered here are exact, paper-flexible" in said
    assert "import the file that registers it in Python" in said
    assert "--overwrite" not in said
    monkeypatch.setitem(REGIONS, "timid", REGIONS["tight"])
    assert main(["explain", str(timid)]) == 0


@pytest.mark.parametrize("command", ["run", "train", "explain"])
def test_the_help_offers_no_file_for_a_flag_that_is_a_shorthand(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--model CONFIG" not in said
    assert "--data CONFIG" not in said
    assert "--model.name" in said
    assert ("--training CONFIG" in said) == (command != "explain")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("run", "a preset sets many of them first: --print_config prints what holds."),
        ("train", "a preset sets many of them first: --print_config prints what holds."),
        ("attack", "The settings of the run come before the defaults above: --print_config prints what holds."),
    ],
)
def test_the_help_says_which_defaults_hold(command: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_the_usage_names_every_command_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().out
    named = re.findall(r"^  ([a-z]+) ", said.partition("examples:")[0], re.MULTILINE)
    assert sorted(named) == sorted(COMMANDS)
    assert "dynablocks --version" in said


def test_a_setting_that_is_no_text_is_told_how_to_write_it() -> None:
    with pytest.raises(InvalidArgument, match=r"^precision is 32; text is needed, such as '32'\.$"):
        TrainingConfig(precision=32)
    with pytest.raises(InvalidArgument, match=r"^padding is 1; text is needed, such as 'same'\.$"):
        ModelConfig(padding=1)


def test_a_certificate_that_no_relative_way_leads_from_names_the_whole_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def between_drives(*_: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    with monkeypatch.context() as patch:
        patch.setattr(os.path, "relpath", between_drives)
        content = write_certificate(finished, tmp_path / "certificate.json")
    assert Path(content["run"]) == finished.resolve()
    told: list[str] = []
    audit_certificate(tmp_path / "certificate.json", samples=2, steps=2, say=told.append)
    assert any(sentence.startswith("weights: ") for sentence in told)


def test_a_batch_that_devices_cannot_share_is_told_what_they_can() -> None:
    with pytest.raises(InvalidArgument, match=r"5 cannot be shared by 2 devices; choose a multiple of 2\.$"):
        TrainingConfig(batch_size=5, devices=2)


def test_help_that_is_printed_as_it_stands_fits_into_80_columns() -> None:
    from dynablocks.cli import USAGE
    from dynablocks.fitting import commands as fit_command
    from dynablocks.fitting import rollout_command
    from dynablocks.run_directory.commands import AUDIT_EXAMPLES, AUDIT_SUMMARY

    texts = [USAGE, AUDIT_SUMMARY, AUDIT_EXAMPLES, fit_command.SUMMARY, fit_command.EXAMPLES]
    for text in (*texts, rollout_command.SUMMARY, rollout_command.EXAMPLES):
        assert max(len(line) for line in text.splitlines()) <= 79


def test_a_report_asks_for_its_rows_where_weights_are_held(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, rows = list[bool](), reporting.step_rows

    def noted(model: torch.nn.Module) -> list[dict[str, Any]]:
        held.extend(part._held is not None for part in model.modules() if isinstance(part, LinearMap))
        return rows(model)

    monkeypatch.setattr(reporting, "step_rows", noted)
    report_data(finished)
    assert held
    assert all(held)
