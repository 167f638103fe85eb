"""The scripts in benchmarks/: what cannot be measured or kept is refused before the work, and packs outlive kills."""

from __future__ import annotations

import io
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import load
from torch import nn

from dynablocks.errors import DynablocksError, InvalidArgument
from dynablocks.experiments.base import Scale
from dynablocks.experiments.cells import Store
from dynablocks.experiments.robustness import paper_row
from dynablocks.files import read_json, write_json
from dynablocks.models import ModelConfig, build
from dynablocks.run_files import CELL, RESULT, WEIGHTS

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("attack_parity", "--repeats 0", "--repeats is 0; a whole number from 1 is needed"),
        ("bound_soundness", "--run nowhere", "nowhere"),
        ("implicit_steps", "--repeats 0", "--repeats is 0"),
        ("pendulum_peers", "--seeds 0", "--seeds is 0"),
        ("planar_ensemble", "--loop-runs 0", "--loop-runs is 0; a whole number from 1 to 100"),
        ("planar_ensemble", "--runs 3 --loop-runs 4", "--loop-runs is 4; a whole number from 1 to 3"),
        ("reversible_depth", "--rounds 0", "--rounds is 0"),
        ("reversible_peers", "--rounds 0", "--rounds is 0"),
        ("reversible_peers", "--depth 4", "--depth is 4; a whole number from 5"),
        ("training_step", "--repeats 0", "--repeats is 0"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    name: str, flags: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
    with pytest.raises(DynablocksError, match=sentence):
        load(f"benchmarks/{name}.py").main()


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("attack_parity", "--out"),
        ("bound_soundness", "--json"),
        ("implicit_steps", "--json"),
        ("pendulum_peers", "--json"),
        ("planar_ensemble", "--json"),
        ("reversible_depth", "--json"),
        ("reversible_peers", "--json"),
        ("training_step", "--json"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    name: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", flag, str(tmp_path / "file" / "figures.json")])
    with pytest.raises(DynablocksError, match="cannot write to"):
        load(f"benchmarks/{name}.py").main()


def test_a_script_ends_with_its_own_code_or_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def refused() -> int:
        raise InvalidArgument("--repeats is 0")

    finish = load("benchmarks/command_line.py").finish
    for main, code in ((lambda: None, None), (lambda: 1, 1), (refused, 2)):
        with pytest.raises(SystemExit) as stopped:
            finish(main)
        assert stopped.value.code == code
    assert capsys.readouterr().err == "error: --repeats is 0\n"


def test_figures_without_a_number_are_written_as_null(tmp_path: Path) -> None:
    figures = {"ratio": 1.5, "gap": math.inf, "runs": [{"loss": math.nan, "steps": 3}], "layer": "dense"}
    load("benchmarks/command_line.py").write_figures(tmp_path / "figures.json", figures)
    wanted = figures | {"gap": None, "runs": [{"loss": None, "steps": 3}]}
    assert read_json(tmp_path / "figures.json") == wanted


@pytest.mark.parametrize("batch", [1, 3])
def test_raw_products_are_those_on_images_and_each_is_there_once(batch: int) -> None:
    config = ModelConfig("certified", widths=(4,), layers=(1,), stem=1, dense_layers=2, dense_step="potential")
    network = build(config, (4, 4, 4), 3, seed=0)
    calls = load("benchmarks/training_step.py").heavy_operations(network, torch.rand(batch, 4, 4, 4))
    assert [pixels[0] for pixels, _, _ in calls] == [batch] * len(calls)
    # The map of the channels, A and its transpose of the convolution and of each dense step, the head.
    kernels = [tuple(weight) for _, weight, _ in calls]
    assert kernels == [(4, 4, 1, 1), (4, 4, 3, 3), (4, 4, 3, 3), (64, 64), (64, 64), (64, 64), (64, 64), (3, 64)]


@pytest.mark.parametrize(("ratio", "code"), [(1.0, 0), (1.2, 1)])
def test_a_limit_that_reversible_chains_miss_is_an_exit_code(
    ratio: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batches = load("benchmarks/reversible_depth.py"), set()

    def memory(depth: int, way: str, batch: int) -> dict[str, float]:
        batches.add(batch)
        return {"peak": ratio if depth == 1000 else 1.0, "parameters": 0.0}

    monkeypatch.setattr(module, "memory", memory)
    monkeypatch.setattr(module, "gradient_difference", lambda depth: 0.0)
    monkeypatch.setattr(module, "step_times", lambda *given: (1.0, 1.0, 1.0))
    monkeypatch.setattr(sys, "argv", ["reversible_depth.py"])
    assert module.main() == code
    assert batches == {65536}


class Clock:
    """A clock that moves by one second whenever it is read."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def test_actions_are_timed_in_turns_after_a_round_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring, clock, done = load("benchmarks/measuring.py"), Clock(), []

    def slow() -> None:
        clock.now += 10.0
        done.append("slow")

    monkeypatch.setattr(measuring, "time", clock)
    seconds = measuring.seconds_in_turns({"slow": slow, "quick": lambda: done.append("quick")}, 2)
    assert seconds == {"slow": [11.0] * 2, "quick": [1.0] * 2}
    assert done == ["slow", "quick"] * 3


def test_a_process_of_its_own_is_told_what_to_measure_and_runs_on_one_thread(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ['OMP_NUM_THREADS']]))\n")
    found = load("benchmarks/measuring.py").in_fresh_process(str(script), "--measure", 3)
    assert found == [["--measure", "3"], "1"]


def test_a_peer_ends_with_its_best_weights_whose_keeping_takes_no_time_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()

    class Slow(nn.Linear):
        def state_dict(self, *given: object, **named: object) -> dict[str, torch.Tensor]:
            clock.now += 100.0
            return super().state_dict(*given, **named)

    peers = load("benchmarks/pendulum_peers.py")
    monkeypatch.setattr(peers, "time", clock)
    module = Slow(2, 2).double()
    made = peers.train(module, seconds=10.0, lr=1e-2)
    assert made["steps"] >= 5
    assert made["seconds"] < 20.0
    states = peers.orbit(peers.TRAIN)
    with torch.no_grad():
        loss = float((module(states[:-1]) - states[1:]).square().mean())
    assert loss == pytest.approx(made["train"], rel=1e-12)


STUB = """#!/bin/sh
if [ "$1" = -c ]; then
  case $2 in *find_spec*) echo $MISSING ;; esac
  exit 0
fi
echo "$@" >>"$HERE/said"
while [ "$1" != --out ]; do shift; done
echo piece >>"$2/pieces"
head -c 100000 /dev/zero >"$2/large"
[ "$(wc -l <"$2/pieces")" -ge 2 ] || exit 3
"""
"""A Python that writes 100 kB and is done when it is called for the second time in a folder."""

needs_tools = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("awk", "bash", "sed", "split", "tar")), reason="needs its tools"
)


def piece(place: Path, work: str, **changes: object) -> subprocess.CompletedProcess[str]:
    """A call of the script with PRESET=smoke, by default with the stub for Python."""
    stub = place / "python"
    stub.write_text(STUB, encoding="utf-8")
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "HERE": str(place), "PRESET": "smoke"}
    environment |= {"PACK": "", "OUT": "", "MISSING": ""} | {name: str(value) for name, value in changes.items()}
    command = ["bash", str(FOLDER / "paper_on_gpu.sh"), "data", str(place / work)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def packed(folder: Path) -> set[str]:
    """The names in a pack."""
    whole = b"".join(path.read_bytes() for path in sorted(folder.glob("work.tar.*")))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        return {name.removeprefix("./") for name in archive.getnames()}


@needs_tools
def test_a_bare_machine_goes_on_from_a_pack_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    assert piece(tmp_path, "first", OUT=tmp_path / "out").returncode == 3
    pack = tmp_path / "out" / "pack"
    before = contents(pack)
    assert set(before) == {"work.tar.aa"}
    pack.chmod(0o555)
    again = piece(tmp_path, "second", PACK=pack, OUT=tmp_path / "later")
    pack.chmod(0o755)
    assert again.returncode == 0, again.stderr
    assert contents(pack) == before
    assert (tmp_path / "second" / "pieces").read_text() == "piece\n" * 2
    assert packed(tmp_path / "later" / "pack") == {".", "pieces", "large"}
    # Eight minutes, less what the script has taken so far.
    hours = [float(line.split()[-1]) for line in (tmp_path / "said").read_text().splitlines()]
    assert all(0 < left <= 8 / 60 + 1e-6 for left in hours)


@needs_tools
def test_a_pack_that_is_not_there_is_no_reason_to_begin_anew(tmp_path: Path) -> None:
    refused = piece(tmp_path, "first", PACK=tmp_path / "typo", OUT=tmp_path / "out")
    assert refused.returncode == 2
    assert f"error: PACK={tmp_path / 'typo'} holds no whole pack" in refused.stderr
    assert not (tmp_path / "first").exists()


@needs_tools
def test_without_a_folder_for_output_the_pack_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    assert piece(tmp_path, "first", PACK=pack).returncode == 3
    assert piece(tmp_path, "second", PACK=pack).returncode == 0
    assert set(contents(pack)) == {"work.tar.aa"}
    assert (tmp_path / "second" / "pieces").read_text() == "piece\n" * 2


@needs_tools
def test_a_pack_that_was_cut_is_refused_and_stays(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    assert piece(tmp_path, "first", PACK=pack).returncode == 3
    part = pack / "work.tar.aa"
    part.write_bytes(part.read_bytes()[:50_000])
    before = contents(pack)
    for _ in range(2):
        refused = piece(tmp_path, "second", PACK=pack)
        assert refused.returncode == 1
        assert f"error: {pack} is not whole" in refused.stderr
        assert contents(pack) == before
        assert list((tmp_path / "second").iterdir()) == []


@needs_tools
def test_the_weights_of_an_attacked_network_are_not_packed(tmp_path: Path) -> None:
    store = Store(tmp_path / "work" / "cells")
    attacked, trained = (paper_row(Scale("smoke"), name, 0.07) for name in ("flexible", "prescribed"))
    weights = [store.directory(row.training) / "checkpoint" / WEIGHTS for row in (attacked, trained)]
    for path in weights:
        path.parent.mkdir(parents=True)
        path.touch()
    folders = store.directory(attacked.attack), store.directory(trained.attack).with_suffix(".partial")
    for folder, row in zip(folders, (attacked, trained), strict=True):
        write_json(folder / CELL, row.attack.description())
        write_json(folder / RESULT, {})
    piece(tmp_path, "work", OUT=tmp_path / "out")
    names = packed(tmp_path / "out" / "pack")
    left_out, kept = (str(path.relative_to(tmp_path / "work")) for path in weights)
    assert left_out not in names
    assert {kept, str((folders[0] / RESULT).relative_to(tmp_path / "work"))} <= names


@needs_tools
def test_a_package_that_the_machine_lacks_is_told_at_once(tmp_path: Path) -> None:
    refused = piece(tmp_path, "work", MISSING="jsonargparse rich")
    assert refused.returncode == 2
    assert "lacks jsonargparse rich; install" in refused.stderr
    assert not (tmp_path / "said").exists()


@needs_tools
@pytest.mark.slow
def test_a_pack_without_weights_is_all_that_a_later_call_needs(tmp_path: Path) -> None:
    real = {"PYTHON": sys.executable, "OMP_NUM_THREADS": 1}
    first = piece(tmp_path, "first", OUT=tmp_path / "out", **real)
    assert first.returncode == 0, first.stderr
    pack = tmp_path / "out" / "pack"
    assert not any("checkpoint" in Path(name).parts for name in packed(pack))
    again = piece(tmp_path, "second", PACK=pack, OUT=tmp_path / "later", **real)
    assert again.returncode == 0, again.stderr
    assert ": built in " in first.stdout + first.stderr
    assert ": built in " not in again.stdout + again.stderr
