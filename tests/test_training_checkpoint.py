"""Checkpoints: whole or absent, verified, and resumed to the very bits."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_training import QUIET, metric_lines, quadrants, small_model
from torch import nn
from torch.nn import functional

import dynablocks
import dynablocks.training.checkpoint as checkpoint_module
from dynablocks.data import hold_out
from dynablocks.errors import BadCheckpoint, DynablocksError
from dynablocks.files import sha256, write_text
from dynablocks.training import TrainingConfig, find_checkpoint, fit, load_checkpoint, save_checkpoint
from dynablocks.training.checkpoint import has_checkpoint, load_weights, read_state, tidy
from dynablocks.training.record import append_metrics, check_same_run, cut_metrics


class Killed(Exception):
    pass


def killed_at(step: int | None) -> object:
    def kill(done: int) -> None:
        if done == step:
            raise Killed

    return kill


def weights_digest(directory: Path) -> str:
    return sha256(directory / "checkpoint" / "model.safetensors")


SETTINGS = {
    "sgd": {"optimiser": "sgd", "crop_padding": 1, "flip": True},
    "adam": {"optimiser": "adam", "loss": "hinge", "schedule": "step", "step_epochs": 1.0, "gradient_clip": 0.5},
    "nadam": {"optimiser": "nadam", "weight_decay": 0.01, "schedule": "one-cycle-linear"},
    "ema": {"optimiser": "adamw", "ema_decay": 0.9, "flip": True},
    "bf16": {"optimiser": "adam", "precision": "bf16", "crop_padding": 2, "crop_fill": "reflect"},
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_resumed_training_ends_with_the_very_bits(name: str, tmp_path: Path) -> None:
    config = TrainingConfig(epochs=3.5, batch_size=16, checkpoint_seconds=0.0, **(QUIET | SETTINGS[name]))
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    expected = small_model(dropout=0.2)
    fit(expected, quadrants(validation=True), config, calm)
    for step in (1, 2, 6, 7, 13, 20):
        with pytest.raises(Killed):
            fit(small_model(dropout=0.2), quadrants(validation=True), config, rough, on_step=killed_at(step))
    final = small_model(dropout=0.2)
    fit(final, quadrants(validation=True), config, rough)
    assert weights_digest(calm) == weights_digest(rough)
    for ours, theirs in zip(final.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    timing = ("seconds", "images_per_second")
    calm_lines, rough_lines = (
        [{k: v for k, v in line.items() if k not in timing} for line in metric_lines(place)] for place in (calm, rough)
    )
    assert calm_lines == rough_lines


def test_a_training_that_goes_on_says_from_where(tmp_path: Path) -> None:
    config, said = TrainingConfig(epochs=2, batch_size=16, checkpoint_seconds=0.0, **QUIET), []
    for last in (5, None):
        stream = io.StringIO()
        with contextlib.suppress(Killed):
            console = Console(file=stream, width=200)
            fit(small_model(), quadrants(), config, tmp_path, console=console, on_step=killed_at(last))
        said.append(re.findall(r"Going on from the checkpoint \(step (\d+), (\S+) epochs", stream.getvalue()))
    assert said == [[], [("4", f"{4 / (len(quadrants().train.images) / 16):.4g}")]]


def test_another_seed_ends_with_other_bits(tmp_path: Path) -> None:
    for seed in (0, 1):
        fit(
            small_model(),
            quadrants(),
            TrainingConfig(epochs=1, batch_size=16, seed=seed, **QUIET),
            tmp_path / str(seed),
        )
    assert weights_digest(tmp_path / "0") != weights_digest(tmp_path / "1")


def test_metrics_lines_beyond_the_checkpoint_are_written_once(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=4, batch_size=16, checkpoint_seconds=1e6, **QUIET)
    with pytest.raises(Killed):
        fit(small_model(), quadrants(), config, tmp_path, on_step=killed_at(15))
    assert len(metric_lines(tmp_path)) == 2
    assert find_checkpoint(tmp_path) is None
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 1')
    fit(small_model(), quadrants(), config, tmp_path)
    assert [line["step"] for line in metric_lines(tmp_path)] == [6, 12, 18, 24]


def test_changed_settings_are_refused(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=3, batch_size=16, checkpoint_seconds=0.0, **QUIET)
    with pytest.raises(Killed):
        fit(small_model(), quadrants(), config, tmp_path, describe={"width": 4}, on_step=killed_at(4))
    changed = TrainingConfig(epochs=3, batch_size=16, lr=0.5, **QUIET)
    with pytest.raises(BadCheckpoint, match=r"training.lr 0.01, this one has 0.5; .*--overwrite"):
        fit(small_model(), quadrants(), changed, tmp_path, describe={"width": 4})
    with pytest.raises(BadCheckpoint, match=r"model.width 4, this one has 8"):
        fit(small_model(), quadrants(), config, tmp_path, describe={"width": 8})
    harmless = TrainingConfig(epochs=3, batch_size=16, checkpoint_seconds=5.0, validate_every=2, **QUIET)
    steps: list[int] = []
    fit(small_model(), quadrants(), harmless, tmp_path, describe={"width": 4}, on_step=steps.append)
    assert steps[0] == 4
    again: list[int] = []
    fit(small_model(), quadrants(), changed, tmp_path, describe={"width": 8}, resume=False, on_step=again.append)
    assert again[0] == 1


def test_a_training_does_not_go_on_with_other_images_held_out(tmp_path: Path) -> None:
    """Images that it was trained on would be measured as new ones."""
    whole = quadrants().train
    config = TrainingConfig(epochs=2, batch_size=16, checkpoint_seconds=0.0, **QUIET)
    one, other = (hold_out(whole, whole, 8, seed=seed) for seed in (0, 1))
    with pytest.raises(Killed):
        fit(small_model(), one, config, tmp_path, on_step=killed_at(2))
    with pytest.raises(BadCheckpoint, match=r"data\.trained_on '\w+', this one has "):
        fit(small_model(), other, config, tmp_path)
    fit(small_model(), one, config, tmp_path)
    with pytest.raises(BadCheckpoint, match=r"data\.trained_on '\w+', this one has "):
        fit(small_model(), other, config, tmp_path)


def test_a_checkpoint_of_before_need_not_say_on_which_images_it_was_trained(tmp_path: Path) -> None:
    now = "data: {fingerprint: f, trained_on: a, soft_labels: b}"
    check_same_run("data: {fingerprint: f}", now, tmp_path)
    with pytest.raises(BadCheckpoint, match=r"data\.soft_labels None, this one has 'b'"):
        check_same_run("data: {fingerprint: f, trained_on: a, soft_labels: null}", now, tmp_path)


def test_a_training_does_not_go_on_with_other_soft_labels(tmp_path: Path) -> None:
    splits = quadrants()
    config = TrainingConfig(epochs=2, batch_size=16, checkpoint_seconds=0.0, **QUIET)
    count = len(splits.train.images)
    labels = functional.one_hot(splits.train.labels, 4).float()
    soft, softer = (0.9 * labels + 0.1 / 4, 0.5 * labels + 0.5 / 4)
    assert soft.shape == (count, 4)
    with pytest.raises(Killed):
        fit(small_model(), splits, config, tmp_path, soft_labels=soft, on_step=killed_at(2))
    for given in (softer, None):
        with pytest.raises(BadCheckpoint, match=r"data\.soft_labels"):
            fit(small_model(), splits, config, tmp_path, soft_labels=given)
    fit(small_model(), splits, config, tmp_path, soft_labels=soft)


def save_twice(directory: Path) -> nn.Module:
    model = small_model()
    save_checkpoint(directory, model, "seed: 0\n", {"step": 1})
    save_checkpoint(directory, model, "seed: 0\n", {"step": 2})
    return model


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_broken_checkpoint_falls_back_to_the_previous_one(name: str, damage: str, tmp_path: Path) -> None:
    model = save_twice(tmp_path)
    path = tmp_path / "checkpoint" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    with pytest.warns(UserWarning, match="previous checkpoint"):
        assert load_checkpoint(tmp_path, model)["step"] == 1
    (tmp_path / "checkpoint.previous" / "state.pt").write_bytes(b"")
    with pytest.raises(BadCheckpoint, match=r"no whole checkpoint.*--overwrite"):
        load_checkpoint(tmp_path, model)


def test_lines_of_the_metrics_that_no_training_wrote_are_dropped(tmp_path: Path) -> None:
    lines = ['{"step": 1}', "[" * 2000, '{"step": NaN}', '{"step": "1"}', "5", "", '{"step": 2}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    cut_metrics(tmp_path, 2)
    assert metric_lines(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("content", ["[" * 2000, "5", '{"format": "\\u001b[2J"}'], ids=["deep", "number", "format"])
def test_a_manifest_that_no_training_wrote_is_passed_over(content: str, tmp_path: Path) -> None:
    model = save_twice(tmp_path)
    (tmp_path / "checkpoint" / "manifest.json").write_text(content)
    with pytest.warns(UserWarning, match=r"manifest.json cannot be read|has format '\\x1b\[2J'") as told:
        assert load_checkpoint(tmp_path, model)["step"] == 1
    assert str(told[0].message).isprintable()


def test_checkpoint_of_another_model_or_none(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="holds no checkpoint"):
        load_checkpoint(tmp_path, small_model())
    save_twice(tmp_path)
    with pytest.raises(BadCheckpoint, match="belong to another model or version") as error:
        load_checkpoint(tmp_path, nn.Linear(2, 2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_training_of_another_model_does_not_go_on(ema_decay: float, tmp_path: Path) -> None:
    """Its description says the same."""
    config = TrainingConfig(epochs=2, batch_size=16, checkpoint_seconds=0.0, ema_decay=ema_decay, **QUIET)
    with pytest.raises(Killed):
        fit(small_model(), quadrants(), config, tmp_path, on_step=killed_at(3))
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(BadCheckpoint, match="belong to another model or version") as error:
        fit(other, quadrants(), config, tmp_path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_cannot_be_deleted_stops_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that a snapshot gave back read-only, or whose file a network file system still holds open."""

    def refused(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    model = save_twice(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refused)
        save_checkpoint(tmp_path, model, "seed: 0\n", {"step": 3})
    assert load_checkpoint(tmp_path, model)["step"] == 3
    assert read_state(tmp_path / "checkpoint.previous")["step"] == 2


def test_tied_weights_and_channels_last_survive(tmp_path: Path) -> None:
    def build() -> nn.Module:
        first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        second.weight = first.weight
        return nn.Sequential(first, second).to(memory_format=torch.channels_last)

    saved, loaded = build(), build()
    save_checkpoint(tmp_path, saved, "", {"momentum": [torch.ones(2)]})
    state = load_checkpoint(tmp_path, loaded)
    assert torch.equal(saved[1].weight, loaded[1].weight)
    assert loaded[0].weight is loaded[1].weight
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(state["momentum"][0], torch.ones(2))


class Named(nn.Module):
    """Parameters of given names; where they are tied, one parameter of all these names."""

    def __init__(self, names: tuple[str, ...], tied: bool) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(3))
        for name in names:
            self.register_parameter(name, shared if tied else nn.Parameter(torch.randn(3)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [("pt",), ("pt", "format"), ("format", "pt"), ("first", "format", "last")], ids=str)
def test_names_with_which_a_file_tells_its_format_are_names_of_weights_too(
    names: tuple[str, ...], tied: bool, tmp_path: Path
) -> None:
    from safetensors import safe_open

    saved, loaded = Named(names, tied), Named(names, tied)
    path = save_checkpoint(tmp_path, saved, "", {})
    load_checkpoint(tmp_path, loaded)
    assert all(torch.equal(loaded.get_parameter(name), saved.get_parameter(name)) for name in names)
    with safe_open(path / "model.safetensors", framework="pt") as stream:
        assert stream.metadata()["format"] == "pt"


def test_a_weight_named_format_may_be_another_name_in_a_file(tmp_path: Path) -> None:
    """As long as the other is not named pt."""
    from safetensors.torch import save_file

    save_file({"first": torch.arange(3.0)}, tmp_path / "model.safetensors", metadata={"format": "first"})
    loaded = Named(("first", "format"), tied=False)
    load_weights(tmp_path, loaded)
    assert loaded.get_parameter("format").tolist() == [0.0, 1.0, 2.0]


class Views(nn.Module):
    """Buffers that begin at one place in memory, no two of them the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        square = torch.randn(3, 3)
        views = {"square": square, "turned": square.t(), "rows": square[:2], "bits": square.view(torch.int32)}
        for name, view in views.items():
            self.register_buffer(name, view)


def test_views_of_one_storage_that_differ_are_no_tied_weights(tmp_path: Path) -> None:
    saved, loaded = Views(), Views()
    save_checkpoint(tmp_path, saved, "", {})
    load_checkpoint(tmp_path, loaded)
    for name, buffer in saved.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_state_that_needs_unpickling_is_refused(tmp_path: Path) -> None:
    import pickle

    save_checkpoint(tmp_path, small_model(), "", {})
    folder = tmp_path / "checkpoint"
    (folder / "state.pt").write_bytes(pickle.dumps({"step": os.system}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"] = {
        "sha256": sha256(folder / "state.pt"),
        "bytes": (folder / "state.pt").stat().st_size,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        load_checkpoint(tmp_path, small_model())


@pytest.mark.parametrize("call", range(1, 10))
def test_a_kill_at_any_flush_or_rename_leaves_a_whole_checkpoint(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_twice(tmp_path)
    calls = 0

    def counted(original: object) -> object:
        def act(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                raise Killed
            return original(*arguments, **named)

        return act

    for name in ("_flush", "flush_directory"):
        monkeypatch.setattr(checkpoint_module, name, counted(getattr(checkpoint_module, name)))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, model, "seed: 0\n", {"step": 3})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, model)["step"] in (2, 3)


def test_leftovers_are_cleaned_and_a_broken_newest_gives_way(tmp_path: Path) -> None:
    config = TrainingConfig(epochs=3, batch_size=16, checkpoint_seconds=0.0, **QUIET)
    with pytest.raises(Killed):
        fit(small_model(), quadrants(), config, tmp_path, on_step=killed_at(5))
    (tmp_path / ".checkpoint.tmp-abc").mkdir()
    (tmp_path / "checkpoint" / "state.pt").write_bytes(b"broken")
    steps: list[int] = []
    with pytest.warns(UserWarning, match="previous checkpoint"):
        fit(small_model(), quadrants(), config, tmp_path, on_step=steps.append)
    assert steps[0] == 4
    assert not list(tmp_path.glob(".checkpoint.tmp*"))
    assert (tmp_path / "checkpoint.damaged" / "state.pt").read_bytes() == b"broken"


def all_files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def unreadable(names: Iterable[str], number: int) -> object:
    """SHA-256 on a disk that does not give the files of some folders."""

    def hashed(path: Path) -> str:
        if path.parent.name in names:
            raise OSError(number, os.strerror(number), str(path))
        return sha256(path)

    return hashed


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_moment_in_which_nothing_can_be_read_costs_no_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(epochs=1, batch_size=32, checkpoint_seconds=0.0, **QUIET)
    fit(small_model(), quadrants(), config, tmp_path)
    before = all_files(tmp_path)
    said = rf"checkpoint cannot be read \({os.strerror(number)}\); nothing was changed: make it readable, or move it"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "sha256", unreadable(["checkpoint"], number))
        with pytest.raises(DynablocksError, match=said) as error:
            fit(small_model(), quadrants(), config, tmp_path)
    assert "--overwrite" not in str(error.value)
    assert all_files(tmp_path) == before
    fit(small_model(), quadrants(), config, tmp_path, on_step=lambda step: pytest.fail("trained"))


def test_nothing_older_is_offered_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, small_model(), "", {"step": 1})
    monkeypatch.setattr(checkpoint_module, "sha256", unreadable(["checkpoint"], errno.EIO))
    with pytest.raises(DynablocksError, match=r"nothing was changed: make it readable\.$"):
        find_checkpoint(tmp_path)


def test_a_folder_that_cannot_be_looked_at_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, small_model(), "", {"step": 1})
    stat = Path.stat

    def refused(path: Path, **options: bool) -> os.stat_result:
        if path.name == "checkpoint":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refused)
        for look in (find_checkpoint, has_checkpoint):
            with pytest.raises(DynablocksError, match=r"cannot be read \(Permission denied\)"):
                look(tmp_path)
    assert has_checkpoint(tmp_path)


def test_a_state_that_cannot_be_read_now_is_no_reason_to_train_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    save_checkpoint(tmp_path, small_model(), "", {"step": 1})
    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(DynablocksError, match="nothing was changed") as error:
        read_state(tmp_path / "checkpoint")
    assert "--overwrite" not in str(error.value)


def test_damaged_checkpoints_are_set_aside_until_all_is_trained_anew(tmp_path: Path) -> None:
    model = save_twice(tmp_path)
    previous = tmp_path / "checkpoint.previous"
    for name in ("checkpoint.damaged", "checkpoint.damaged-2", "checkpoint.damaged-3"):
        (tmp_path / "checkpoint" / "state.pt").write_text(name)
        tidy(tmp_path, previous)
        assert (tmp_path / name / "state.pt").read_text() == name
        assert not (tmp_path / "checkpoint").exists()
        assert find_checkpoint(tmp_path) == previous
        tidy(tmp_path, previous)
        save_checkpoint(tmp_path, model, "seed: 0\n", {"step": 3})
    tidy(tmp_path, tmp_path / "checkpoint")
    assert len(list(tmp_path.iterdir())) == 5
    tidy(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_the_start_of_a_training_beside_a_damaged_checkpoint_alone_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.damaged").mkdir()
    tidy(tmp_path, None)
    assert (tmp_path / "checkpoint.damaged").exists()


@pytest.mark.parametrize("keep", ["checkpoint.previous", None])
def test_a_checkpoint_that_cannot_be_moved_stops_the_training_before_it_begins(
    keep: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save_twice(tmp_path)
    before = all_files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(DynablocksError, match=r"cannot move a checkpoint in .*: Permission denied; make"):
            tidy(tmp_path, None if keep is None else tmp_path / keep)
    assert all_files(tmp_path) == before


def saving_meanwhile(directory: Path, model: nn.Module, steps: Iterable[int]) -> object:
    """SHA-256 beside a training that saves whenever a state is about to be hashed."""
    left = iter(steps)

    def hashed(path: Path) -> str:
        if path.name == "state.pt" and path.parent.name in ("checkpoint", "checkpoint.previous"):
            for step in itertools.islice(left, 1):
                save_checkpoint(directory, model, "seed: 0\n", {"step": step})
        return sha256(path)

    return hashed


def test_a_reader_beside_a_training_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_twice(tmp_path)
    monkeypatch.setattr(checkpoint_module, "sha256", saving_meanwhile(tmp_path, model, (3, 4)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the previous checkpoint")
        assert load_checkpoint(tmp_path, model)["step"] == 4


def test_a_reader_that_is_always_too_late_is_not_told_to_train_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_twice(tmp_path)
    monkeypatch.setattr(checkpoint_module, "sha256", saving_meanwhile(tmp_path, model, itertools.count(3)))
    with pytest.raises(BadCheckpoint, match=r"a training replaces the checkpoints in .*; try again") as error:
        find_checkpoint(tmp_path)
    assert "--overwrite" not in str(error.value)


def test_a_line_of_the_metrics_is_on_the_disk_before_the_checkpoint_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync, path = os.fsync, tmp_path / "metrics.jsonl"

    def noted(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), path.stat()):
            flushed.append(path.read_text())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    for step in (1, 2):
        append_metrics(tmp_path, {"step": step})
    assert flushed == ['{"step": 1}\n', '{"step": 1}\n{"step": 2}\n']


def test_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        save_checkpoint(place, nn.Linear(2, 2), "", {"step": 1})
        for model, state in ((nn.Linear(300, 300), {}), (nn.Linear(2, 2), {"big": torch.zeros(60_000)})):
            with pytest.raises(DynablocksError, match=r"cannot write a checkpoint .*unchanged") as error:
                save_checkpoint(place, model, "", state)
            assert "\n" not in str(error.value)
            assert load_checkpoint(place, nn.Linear(2, 2))["step"] == 1
            assert not list(place.glob(".checkpoint.tmp*"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_full_disk_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, nn.Linear(2, 2), "", {"step": 1})

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_flush", full)
    with pytest.raises(DynablocksError, match="No space left on device"):
        save_checkpoint(tmp_path, nn.Linear(2, 2), "", {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, nn.Linear(2, 2))["step"] == 1


@pytest.mark.slow
def test_the_loop_survives_kill_nine(tmp_path: Path) -> None:
    script = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_training import *\n"
        "def on_step(s):\n"
        "    if s == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = TrainingConfig(epochs=2, batch_size=16, checkpoint_seconds=0.0, **QUIET)\n"
        "fit(small_model(), quadrants(), config, Path(sys.argv[2]), on_step=on_step)\n"
    )
    arguments = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "run")]
    killed = subprocess.run([*arguments, "5"], check=False)
    assert killed.returncode == -9
    subprocess.run([*arguments, "0"], check=True)
    config = TrainingConfig(epochs=2, batch_size=16, **QUIET)
    fit(small_model(), quadrants(), config, tmp_path / "calm")
    assert weights_digest(tmp_path / "run") == weights_digest(tmp_path / "calm")


def test_a_refused_training_leaves_no_folder(tmp_path: Path) -> None:
    for directory, left in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if left:
            directory.mkdir()
        with pytest.raises(RuntimeError), checkpoint_module.reserved(directory):
            raise RuntimeError
        assert directory.exists() == left
    with checkpoint_module.reserved(tmp_path / "kept"):
        (tmp_path / "kept" / "config.yaml").touch()
    assert (tmp_path / "kept" / "config.yaml").exists()


def test_files_are_on_the_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, named = set[int](), list[str]()
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def noted(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        named.append(Path(target).name)
        assert {file.stat().st_ino for file in (path, *path.iterdir())} <= flushed
        return rename(path, target)

    def replaced(path: Path, target: Path) -> None:
        named.append(Path(target).name)
        assert Path(path).stat().st_ino in flushed
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", noted)
        patch.setattr(Path, "rename", renamed)
        patch.setattr(os, "replace", replaced)
        save_checkpoint(tmp_path, nn.Linear(2, 2), "", {})
        write_text(tmp_path / "a.txt", "whole")
    assert named == ["checkpoint", "a.txt"]


def test_a_kill_while_all_is_removed_leaves_nothing_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_twice(tmp_path)
    rename, calls = Path.rename, itertools.count(1)

    def killed(path: Path, target: Path) -> Path:
        if next(calls) == 2:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            tidy(tmp_path, None)
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint is not None
    assert read_state(checkpoint)["step"] == 2


@pytest.mark.parametrize("given", ["{home}/run", "~/run"])
def test_a_directory_may_be_text_that_begins_at_home(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = given.format(home=tmp_path)
    model, again = small_model(), small_model()
    fit(model, quadrants(), TrainingConfig(epochs=1, batch_size=48, **QUIET), directory)
    assert find_checkpoint(directory) == tmp_path / "run" / "checkpoint"
    assert [line["step"] for line in metric_lines(tmp_path / "run")] == [2]
    assert load_checkpoint(directory, again)["step"] == 2
    assert torch.equal(again[4].weight, model[4].weight)
    assert save_checkpoint(directory, model, "", {"step": 3}) == tmp_path / "run" / "checkpoint"
    assert load_checkpoint(tmp_path / "run", again)["step"] == 3


def test_the_manifest_names_the_version_of_the_code_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of what is installed under its name, which may be another one."""
    monkeypatch.setattr(dynablocks, "__version__", "9.9")
    folder = save_checkpoint(tmp_path, nn.Linear(1, 1), "", {})
    assert json.loads((folder / "manifest.json").read_text())["dynablocks"] == "9.9"
