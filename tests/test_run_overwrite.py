"""Ctrl-C around ``--overwrite``, settings that an older version left out, and what a dry run refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dynablocks import cli
from dynablocks.config import DataConfig, RunConfig
from dynablocks.data import load_data
from dynablocks.errors import InvalidArgument
from dynablocks.files import lock_file
from dynablocks.models import ModelConfig
from dynablocks.progress import Stopped
from dynablocks.run_directory import pipeline
from dynablocks.run_directory.commands import _parse_run
from dynablocks.run_directory.dry_run import estimate
from dynablocks.run_directory.network import load_config
from dynablocks.run_directory.pipeline import certify_run, report_run, train_run
from dynablocks.training import TrainingConfig, loop

ALL_KEPT = "Stopped before anything was overwritten; give the same command again.\n"


def tiny(**changes: Any) -> RunConfig:
    settings = {"epochs": 0.1, "batch_size": 64, "precision": "32", "device": "cpu"} | changes
    model = ModelConfig("certified", widths=(4,), layers=(1,))
    return RunConfig("smoke", model, DataConfig("digits"), TrainingConfig(**settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; whoever changes it copies it first."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train_run(tiny(), out)
    return out


def files(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def pressed(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("owner", "name"),
    [(pipeline, "load_splits"), (pipeline, "starting_network"), (loop, "Session"), (loop, "prepare_directory")],
    ids=["images", "network", "session", "folder"],
)
def test_ctrl_c_before_anything_is_overwritten_says_so(
    owner: object,
    name: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The advice after a later one, the same command without --overwrite, would hand back the old network."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = files(run)
    monkeypatch.setattr(owner, name, pressed)
    with pytest.raises(Stopped):
        train_run(tiny(), run, overwrite=True)
    shown = capsys.readouterr().err
    assert shown.endswith(ALL_KEPT)
    assert shown.count("Stopped") == 1
    assert files(run) == before


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_command_that_overwrote_nothing_promises_nothing_else(
    command: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(pipeline, "load_splits", pressed)
    assert cli.main([command, "--preset", "smoke", "--out", str(run), "--overwrite"]) == 130
    shown = capsys.readouterr().err
    assert shown.endswith(ALL_KEPT)
    assert "without --overwrite" not in shown


def save_and_press(session: Any, *_: object) -> NoReturn:
    session.save()
    raise KeyboardInterrupt


@pytest.mark.parametrize("train", [pressed, save_and_press], ids=["no checkpoint yet", "a new checkpoint"])
def test_ctrl_c_once_the_old_training_is_gone_goes_on_without_the_flag(
    train: Callable[..., NoReturn],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", train)
        with pytest.raises(KeyboardInterrupt) as stopped:
            train_run(tiny(lr=0.5), run, overwrite=True)
    assert not isinstance(stopped.value, Stopped)
    assert "Stopped" not in capsys.readouterr().err
    assert train_run(tiny(lr=0.5), run).steps > 0
    assert load_config(run).training.lr == 0.5


@pytest.mark.parametrize(("name", "overwrite"), [("run", False), ("new", True)], ids=["no flag", "nothing there"])
def test_ctrl_c_is_left_to_the_command_where_no_old_network_can_pass_for_the_new_one(
    name: str,
    overwrite: bool,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(pipeline, "load_splits", pressed)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_run(tiny(), tmp_path / name, overwrite=overwrite)
    assert not isinstance(stopped.value, Stopped)
    assert "Stopped" not in capsys.readouterr().err


def test_of_several_processes_the_first_alone_says_what_is_kept(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(pipeline, "load_splits", pressed)
    with pytest.raises(Stopped):
        train_run(tiny(devices=2), run, overwrite=True)
    assert "Stopped" not in capsys.readouterr().err


def test_a_report_writes_the_settings_that_an_older_version_left_out(tmp_path: Path) -> None:
    """The page says ``--config``, which takes from the preset of today what the file does not say."""

    def parsed() -> RunConfig:
        return _parse_run("run", "Run.", ["--config", str(path)])[0]

    old = replace(tiny(crop_padding=1), model=ModelConfig("certified", widths=(4,), layers=(1,), dense_layers=1))
    run, splits = tmp_path / "run", load_data("digits")
    path = run / "config.yaml"
    train_run(old, run)
    text = path.read_text().replace("preset: smoke", "preset: certified/cpu-1h")
    text = text.replace("name: digits", "name: cifar10")
    left_out = ("dense_step", "crop_fill")
    kept = [line for line in text.splitlines(keepends=True) if line.partition(":")[0].strip() not in left_out]
    assert len(kept) == len(text.splitlines()) - 2
    path.write_text("".join(kept))
    assert (parsed().model.dense_step, parsed().training.crop_fill) == ("potential", "reflect")
    with lock_file(run / ".lock") as free:  # as a training holds it
        assert free
        report_run(run, splits=splits)
    assert path.read_text() == "".join(kept)
    report_run(run, splits=splits)
    assert path.read_text() == text
    assert (parsed().model, parsed().training) == (old.model, old.training)
    written = path.stat().st_mtime_ns
    report_run(run, splits=splits)
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"precision": "16"}, "precision is '16' but the device is a CPU; use bf16 or 32 there."),
        ({"crop_padding": 9}, "crop_padding is 9; of images of 8x8 pixels 0 to 7 is allowed."),
        ({"batch_size": 2001, "devices": 3}, "training images make one batch, which 3 devices cannot share equally"),
        ({"adversary_epsilon": 0.1}, "adversary_epsilon is 0.1, which changes nothing with adversary none"),
    ],
)
def test_a_dry_run_refuses_what_the_training_refuses_at_once(
    settings: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    for refused in (estimate, train_run):
        with pytest.raises(InvalidArgument, match=re.escape(sentence)):
            refused(tiny(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_an_older_version_made_with_an_unread_setting_is_still_used(tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny(adversary_epsilon=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingConfig, "require_settings", lambda self: None)
        train_run(config, run)
    assert load_config(run).training == config.training
    assert estimate(config, run)["cached"] == "training (finished)"
    assert train_run(config, run).steps > 0
    assert len(certify_run(run).labels) > 0
    for options in ({"directory": tmp_path / "new"}, {"directory": run, "overwrite": True}):
        for refused in (estimate, train_run):
            with pytest.raises(InvalidArgument, match="which changes nothing with adversary none; leave it out"):
                refused(config, **options)
    assert train_run(config, run).steps > 0


def test_what_autoattack_found_goes_with_the_network_that_it_attacked(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "autoattack.json").write_text("{}")
    train_run(tiny(), run)
    assert (run / "autoattack.json").exists(), "the training was finished: its network is the same"
    train_run(tiny(lr=0.5), run, overwrite=True)
    assert not (run / "autoattack.json").exists()
