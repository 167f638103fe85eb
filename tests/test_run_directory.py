"""What a run directory holds: reused while weights, images and code stay, overwritten at once, found behind links."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynablocks import cli
from dynablocks.config import DataConfig, RunConfig
from dynablocks.errors import BadCheckpoint, DynablocksError
from dynablocks.models import ModelConfig
from dynablocks.robustness import CertificateResult
from dynablocks.run_directory import pipeline, results
from dynablocks.run_directory.certificate_file import audit_certificate, write_certificate
from dynablocks.run_directory.dry_run import estimate
from dynablocks.run_directory.network import load, load_config, weights_hash
from dynablocks.run_directory.pipeline import train_run
from dynablocks.run_directory.results import CERTIFICATE, belongs_to, restored, store, training_facts
from dynablocks.run_directory.source import COMPUTING, source_hash
from dynablocks.training import TrainingConfig, find_checkpoint, loop


def package(place: Path) -> Path:
    for name in ("blocks.py", "numerics/bounds.py", "robustness/attacks.py", "reporting/page.py", "cli.py"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(f"# {name}\n")
    return place


@pytest.mark.parametrize(
    "change",
    [
        lambda place: (place / "numerics" / "bounds.py").write_text("SLACK = 0\n"),
        lambda place: (place / "blocks.py").write_text(""),
        lambda place: (place / "models").mkdir() or (place / "models" / "new.py").write_text("x = 1\n"),
        lambda place: (place / "robustness" / "attacks.py").unlink(),
        lambda place: (place / "robustness" / "attacks.py").rename(place / "robustness" / "renamed.py"),
    ],
    ids=["edited", "emptied", "added", "removed", "renamed"],
)
def test_changed_code_that_computes_is_noticed(change: Callable[[Path], object], tmp_path: Path) -> None:
    place = package(tmp_path)
    before = source_hash(place)
    assert source_hash(place) == before
    change(place)
    assert source_hash(place) != before


def test_code_that_computes_no_certificate_may_change(tmp_path: Path) -> None:
    place = package(tmp_path)
    before = source_hash(place)
    (place / "reporting" / "page.py").write_text("other\n")
    (place / "cli.py").unlink()
    (place / "numerics" / "notes.txt").write_text("no code\n")
    (place / "numerics" / ".#bounds.py").symlink_to("an-editor-that-runs")
    assert source_hash(place) == before


def test_what_is_hashed_is_what_certificates_and_attacks_import() -> None:
    code = "import sys, dynablocks.robustness; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    rooms = {name.split(".")[1] for name in loaded if name.startswith("dynablocks.")}
    sentences_and_names = {"errors", "registry"}
    assert rooms - sentences_and_names == {entry.removesuffix(".py") for entry in COMPUTING}


def test_a_result_of_other_code_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "weights_hash", lambda directory: "w")
    labels = torch.tensor([0, 1])
    made = CertificateResult(torch.tensor([0.5, 0.0], dtype=torch.float64), labels, labels.clone(), body_lipschitz=1.0)
    store(tmp_path, CERTIFICATE, made.summary([0.0]) | belongs_to(tmp_path, "images"), made.tensors())
    again = restored(tmp_path, CERTIFICATE, "images")
    assert again is not None
    assert torch.equal(again.radii, made.radii)
    assert restored(tmp_path, CERTIFICATE, "other images") is None
    assert restored(tmp_path, CERTIFICATE, "images", same_code=True) is not None
    monkeypatch.setattr(results, "SOURCE", "of another commit")
    assert restored(tmp_path, CERTIFICATE, "images") is not None  # it is shown, and not taken for the computation
    assert restored(tmp_path, CERTIFICATE, "images", same_code=True) is None


def tiny(width: int) -> RunConfig:
    training = TrainingConfig(epochs=0.1, batch_size=64, precision="32", device="cpu")
    return RunConfig("smoke", ModelConfig("certified", widths=(width,), layers=(1,)), DataConfig("digits"), training)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; whoever changes it copies it first."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train_run(tiny(4), out)
    return out


class Killed(Exception):
    pass


def kill_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """Stop before so many changes of the run directory have been made, at the latest before the first step."""
    calls = itertools.count(1)

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def act(*arguments: object, **named: object) -> object:
            if next(calls) == call:
                raise Killed
            return change(*arguments, **named)

        return act

    def never(*_: object) -> None:
        raise Killed

    for owner, name in ((Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (pipeline, "write_text")):
        patch.setattr(owner, name, counted(getattr(owner, name)))
    patch.setattr(loop, "train", never)


@pytest.mark.parametrize("call", range(1, 11))
def test_a_kill_while_a_run_is_overwritten_leaves_no_network_with_the_settings_of_another(
    call: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(run / "checkpoint", run / "checkpoint.previous")
    (run / "report.html").touch()
    with monkeypatch.context() as patch:
        kill_at(call, patch)
        with pytest.raises(Killed):
            train_run(tiny(8), run, overwrite=True)
    if find_checkpoint(run) is not None:
        assert load(run).config.widths == load_config(run).model.widths == (4,)
        train_run(tiny(4), run)
        assert load_config(run).model.widths == (4,)
        return
    with monkeypatch.context() as patch:
        kill_at(1000, patch)
        with pytest.raises(Killed):
            train_run(tiny(8), run)
    assert not [name for name in ("training.json", "metrics.json", "report.html") if (run / name).exists()]


def test_overwriting_ends_with_the_new_network_alone(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(run / "checkpoint", run / "checkpoint.previous")
    train_run(tiny(8), run, overwrite=True)
    assert load(run).config.widths == load_config(run).model.widths == (8,)
    assert not list(run.glob("checkpoint.*"))


@pytest.mark.parametrize("content", [None, b"preset: [", b"preset: cpu\n", b"\xff"])
def test_settings_that_are_lost_are_written_again_by_the_same_training(
    content: bytes | None, trained: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    path = run / "config.yaml"
    before, made = path.read_bytes(), (run / "checkpoint" / "manifest.json").stat().st_mtime_ns
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DynablocksError, match=r"the same training command, without --overwrite, writes it again\.$"):
        load_config(run)
    pipeline.require_out(run)
    train_run(tiny(4), run)
    assert path.read_bytes() == before
    assert (run / "checkpoint" / "manifest.json").stat().st_mtime_ns == made


def test_a_certificate_behind_a_link_is_audited_from_the_link_and_from_the_file(trained: Path, tmp_path: Path) -> None:
    run, file = shutil.copytree(trained, tmp_path / "run"), tmp_path / "far" / "off" / "certificate.json"
    file.parent.mkdir(parents=True)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    write_certificate(run, link)
    assert link.is_symlink()
    for path in (link, file):
        said: list[str] = []
        audit_certificate(path, samples=0, say=said.append)
        assert said


@pytest.mark.parametrize(
    ("options", "again"),
    [([], "the same command"), (["--overwrite"], "the same command, without --overwrite,")],
)
def test_ctrl_c_after_the_training_says_how_it_is_kept(
    options: list[str], again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    summary = SimpleNamespace(epochs=1.0, train_seconds=1.0, images_per_second=1.0)
    monkeypatch.setattr(pipeline, "train_run", lambda *_, **__: summary)
    monkeypatch.setattr(pipeline, "certify_run", pressed)
    assert cli.main(["run", "--preset", "smoke", "--out", str(tmp_path / "run"), *options]) == 130
    said = f"dynablocks: stopped; what was finished is kept, and {again} does the rest.\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    ("command", "again"), [("fit", "the same command, without --overwrite,"), ("rollout", "the same command")]
)
def test_a_rollout_alone_is_made_again_with_overwrite_after_ctrl_c(
    command: str, again: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its one file is written at the end: the one before is still there."""

    def pressed(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, pressed)
    assert cli.main([command, "--overwrite"]) == 130
    assert capsys.readouterr().err == f"dynablocks: stopped; what was finished is kept, and {again} does the rest.\n"


def test_a_training_is_finished_without_the_flag_that_would_delete_it(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "training.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"the training command, without --overwrite, makes it again\.$"):
        training_facts(run)
    (run / "training.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"the command that began it, without --overwrite, goes on from there\.$"):
        training_facts(run)


def train_until(step: int, config: RunConfig, out: Path, *, overwrite: bool = False) -> None:
    """A training with a checkpoint of every step that is killed in the one after."""
    numbers, take_step = itertools.count(), loop.take_step

    def killed(session: loop.Session) -> None:
        if next(numbers) == step:
            raise Killed
        take_step(session)

    often = replace(config, training=replace(config.training, checkpoint_seconds=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", killed)
        with pytest.raises(Killed):
            train_run(often, out, overwrite=overwrite)


@pytest.mark.parametrize(
    ("lose", "sentence"),
    [
        (shutil.rmtree, "source is not a run directory"),
        (lambda source: train_until(1, tiny(8), source, overwrite=True), "source is not finished"),
    ],
    ids=["removed", "trained anew"],
)
def test_a_training_outlives_the_run_that_it_started_from(
    lose: Callable[[Path], object],
    sentence: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, calm, out = shutil.copytree(trained, tmp_path / "source"), tmp_path / "calm", tmp_path / "out"
    config = replace(tiny(4), training=replace(tiny(4).training, epochs=0.2), warm_start=source)
    assert train_run(config, calm).steps == 4
    train_until(2, config, out)
    assert "holds no trained network" not in capsys.readouterr().err
    lose(source)
    for directory, overwrite in ((tmp_path / "new", False), (out, True)):
        with pytest.raises(BadCheckpoint, match=sentence):
            train_run(config, directory, overwrite=overwrite)
    assert estimate(config, out)["cached"] == "training (resumes)"
    for _ in range(2):
        assert train_run(config, out).steps == 4
        assert f"--warm_start {source} holds no trained network now" in capsys.readouterr().err
    assert weights_hash(out) == weights_hash(calm)
