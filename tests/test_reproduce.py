"""``dynablocks reproduce``: what a user types, what is written, and that a killed run ends with the same tables."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planted import Planted
from rich.console import Console

from dynablocks.cli import main
from dynablocks.errors import BadData, InvalidArgument, UnsoundResult
from dynablocks.experiments import EXPERIMENTS, Scale, Store, adversarial, runner, runs
from dynablocks.experiments.cells import Cell, in_order
from dynablocks.experiments.commands import MOST_SEED
from dynablocks.experiments.energy import NAMES, Energy
from dynablocks.experiments.fig6 import SirFlowMap
from dynablocks.experiments.fig7 import FlowRegression
from dynablocks.experiments.metric import MisprintCell
from dynablocks.experiments.pendulum import ROLLOUT, PendulumFlowMap
from dynablocks.experiments.provenance import made_here
from dynablocks.experiments.regions import RegionExperiment
from dynablocks.experiments.robustness import order_checks, paper_rows, warm_row
from dynablocks.experiments.runner import (
    all_cells,
    build_with_workers,
    chosen,
    interrupt_once,
    page,
    require_workers,
    time_limit,
    write_outputs,
)
from dynablocks.experiments.runs import AttackCell, TrainingCell, stored_attack, stored_certificate
from dynablocks.experiments.table1 import PlanarClassification
from dynablocks.experiments.table1_cells import WEIGHTS, stored_network
from dynablocks.files import lock_file, write_json
from dynablocks.robustness import PAPER_EPSILONS
from dynablocks.run_files import ATTACK_PARTIAL, ATTACK_TENSORS, CERTIFICATE_TENSORS, RESULT
from dynablocks.training import interrupts

SMOKE = Scale("smoke")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("reproduced")
    assert main(["reproduce", "fig5", "--preset", "smoke", "--out", str(out)]) == 0
    return out


def tables(out: Path, endings: tuple[str, ...] = (".md", ".png")) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "smoke").iterdir()) if path.suffix in endings}


def test_figures_are_the_same_bytes_each_time_they_are_written(made: Path, tmp_path: Path) -> None:
    write_outputs(chosen(["fig5"])[0], SMOKE, Store(made / "cells"), tmp_path)
    everything = (".md", ".png", ".svg")
    assert tables(tmp_path, everything) == tables(made, everything)


def test_a_page_a_record_and_pictures_are_written(made: Path) -> None:
    names = {path.name for path in (made / "smoke").iterdir()}
    assert {"fig5.md", "fig5.json", "fig5.png", "fig5.svg"} <= names
    record = json.loads((made / "smoke" / "fig5.json").read_text())
    assert [cell["state"] for cell in record["cells"]] == ["built"]
    assert record["cells"][0]["made"]["torch"]
    assert "smoke preset" in (made / "smoke" / "fig5.svg").read_text()


def test_a_second_run_builds_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tables(made)
    assert main(["reproduce", "fig5", "--preset", "smoke", "--out", str(made)]) == 0
    assert "train" not in capsys.readouterr().err
    assert tables(made) == before


def test_a_cell_is_a_run_directory(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = next((made / "cells").glob("training-*"))
    assert main(["certify", str(directory)]) == 0


KILLED = """
import os, signal, sys
from dynablocks.cli import main
from dynablocks.training import loop

step = loop.take_step

def killed_in_the_second_epoch(session):
    if session.step == session.steps_per_epoch:
        os.kill(os.getpid(), signal.SIGKILL)
    step(session)

loop.take_step, loop.is_save_due = killed_in_the_second_epoch, lambda session: True
sys.exit(main(sys.argv[1:]))
"""


def test_killed_in_mid_cell_and_resumed_gives_the_same_tables(made: Path, tmp_path: Path) -> None:
    arguments = ["reproduce", "fig5", "--preset", "smoke", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *arguments]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == -signal.SIGKILL
    (begun,) = (tmp_path / "cells").glob("training-*.partial")
    assert (begun / "checkpoint").is_dir()
    command = [sys.executable, "-m", "dynablocks", *arguments]
    said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stderr.splitlines()
    assert [line.split("  ")[0] for line in said if line.startswith("epoch ")] == ["epoch 2/2"]
    assert tables(tmp_path) == tables(made)


def test_dry_run_builds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "all", "--preset", "smoke", "--out", str(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "waiting" in said
    assert "on two CPU cores" in said
    assert not any((tmp_path / "cells").glob("*-*"))


def test_check_says_not_run_where_nothing_was_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "fig4", "--preset", "smoke", "--out", str(tmp_path), "--check"]) == 0
    said = capsys.readouterr().out
    assert said.count("not run") >= 3
    assert "agrees" not in said


def test_a_folder_without_images_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "images"
    empty.mkdir()
    arguments = ["reproduce", "fig5", "--preset", "cpu", "--data-dir", str(empty), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "is empty; put the data there" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["fig4", "fig5", "improved"])
def test_data_that_cannot_be_had_is_not_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise BadData("the Hub cannot be reached; give --data-dir.")

    monkeypatch.setattr("dynablocks.experiments.runs.images", unreachable)
    assert main(["reproduce", name, "--preset", "cpu", "--out", str(tmp_path)]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"not run: \d+ cells?\b", said)
    assert "cannot be reached" in said
    assert "not run" in (tmp_path / "cpu" / f"{name}.md").read_text()
    assert main(["reproduce", name, "--preset", "cpu", "--out", str(tmp_path), "--check"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing was named"),
        (["fig44"], "fig4"),
        (["fig4", "--preset", "huge"], "smoke"),
        (["fig4", "--jobs", "0"], "jobs is 0"),
        (["fig4", "--max-hours", "-1"], "max_hours is -1"),
        (["fig4", "--data-dir", "/no/such/folder"], "/no/such/folder"),
        (["fig4", "--out", __file__], "is a file"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_experiments_are_found_by_their_names() -> None:
    kinds = {"fig6": SirFlowMap, "fig7": FlowRegression, "pendulum": PendulumFlowMap, "table1": PlanarClassification}
    assert {name: EXPERIMENTS.get_known(name) for name in kinds} == kinds


@pytest.mark.parametrize("preset", ["smoke", "paper"])
@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_experiment_draws_itself_with_nothing_run(
    name: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if preset == "paper":
        # Its images are not at hand, and counting the operations of its networks takes long.
        monkeypatch.setattr(runs, "_images", lambda data, data_dir: SimpleNamespace(fingerprint=data))
        monkeypatch.setattr(adversarial, "mflop", lambda model, shape: 1.0)
    experiment, scale, store = EXPERIMENTS[name](), Scale(preset), Store(tmp_path / "cells")
    cells = list(in_order(experiment.cells(scale)))
    assert len({cell.key for cell in cells}) == len(cells) > 0
    written = write_outputs(experiment, scale, store, tmp_path)
    # The pictures of fig9 are a cell's result, and laws has none.
    assert (len(written) > 2) == (name not in ("fig9", "laws"))
    table = experiment.tables(scale, store).strip()
    assert "not run" in table
    assert table in (tmp_path / preset / f"{name}.md").read_text(encoding="utf-8")
    verdicts = {check.verdict for check in experiment.checks(scale, store)}
    # What is geometry alone, such as a region's largest step, needs no cell.
    assert verdicts == ({"not run", "agrees"} if isinstance(experiment, RegionExperiment) else {"not run"})
    assert EXPERIMENTS[name].name == name


@pytest.mark.parametrize(("name", "times"), [("fig6", 3), ("fig7", 4), ("table1", 15)])
def test_every_row_says_that_it_was_not_run(name: str, times: int, tmp_path: Path) -> None:
    """Each network once, and of table1 each of five numbers."""
    assert EXPERIMENTS[name]().tables(Scale("cpu"), Store(tmp_path)).count("not run") == times


def test_all_shares_cells_between_figures() -> None:
    together = all_cells(chosen(["all"]), SMOKE)
    apart = sum(len(list(in_order(e.cells(SMOKE)))) for e in chosen(["all"]))
    assert len(together) < apart
    assert len({cell.key for cell in together}) == len(together)


def test_a_seed_is_taken_and_has_its_own_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "fig3", "--preset", "smoke", "--seed", "7", "--dry-run", "--out", str(tmp_path)]) == 0
    experiment, scale = EXPERIMENTS["fig3"](), Scale("smoke", seed=7)
    page = write_outputs(experiment, scale, Store(tmp_path / "cells"), tmp_path)[0]
    assert page.parent == tmp_path / "smoke-seed-7"
    assert "--seed 7" in page.read_text()


def test_no_network_of_smoke_begins_with_digits_and_goes_on_with_cifar(tmp_path: Path) -> None:
    scale = Scale("smoke", cifar100_dir=tmp_path)
    assert warm_row(scale, "flexible", 0.07) is None
    assert warm_row(Scale("cpu", tmp_path, tmp_path), "flexible", 0.07) is not None


@pytest.mark.parametrize("name", ["pendulum", "energy", "laws", "adversarial", "metric"])
@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
def test_runs_of_two_seeds_are_different_runs(name: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "mflop", lambda model, shape: 1.0)
    experiment = EXPERIMENTS[name]()
    first, second = (set(in_order(experiment.cells(Scale(preset, seed=seed)))) for seed in (0, 1))
    # The misprint of appendix B depends on no seed.
    assert {type(cell) for cell in first & second} <= {MisprintCell}
    assert len(first) == len(second)


def test_the_seeds_of_the_tuning_are_in_no_table() -> None:
    for system in NAMES:
        seeds = [seed for scale in range(60) for seed in Energy().seeds(Scale("cpu", seed=scale), system)]
        assert len(set(seeds)) == len(seeds)
        assert not {100, 101} & set(seeds)
    assert [len(Energy().seeds(Scale("cpu"), system)) for system in NAMES] == [5, 5, 3]
    assert Energy().seeds(Scale("cpu"), "spring") == [0, 1, 2, 3, 4]
    assert max(Energy().seeds(Scale("paper", seed=int(MOST_SEED)), "spring")) < 2**32


@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
def test_no_training_leaves_its_precision_to_a_timing(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key would say "auto" for float32 on one machine and bfloat16 on another."""
    monkeypatch.setattr(adversarial, "mflop", lambda model, shape: 1.0)
    cells = in_order([cell for kind in EXPERIMENTS.values() for cell in kind().cells(Scale(preset))])
    trained = [cell.training.precision for cell in cells if isinstance(cell, TrainingCell)]
    assert len(trained) > 20
    assert set(trained) == {"32"}


def test_images_that_cannot_be_had_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(config: object) -> None:
        asked.append(config)
        raise BadData("the Hub cannot be reached; give --data-dir.")

    monkeypatch.setattr(runs, "load_splits", unreachable)
    runs._images.cache_clear()
    for _ in range(3):
        with pytest.raises(BadData, match="cannot be reached"):
            runs.images("cifar10", None)
    runs._images.cache_clear()
    assert len(asked) == 1


def test_one_ctrl_c_that_comes_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.3, 12.0, 14.0, 14.2, 14.4])
    monkeypatch.setattr(interrupts, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(interrupts, "_latest_interrupt", [0.0])
    with pytest.raises(KeyboardInterrupt):
        interrupt_once(signal.SIGINT, None)
    interrupt_once(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt_once(signal.SIGINT, None)
    with interrupts.polite_interrupt() as stopping:
        for _ in range(2):  # the terminal's and the command's, in a training
            signal.raise_signal(signal.SIGINT)
        assert stopping()
    interrupt_once(signal.SIGINT, None)


def test_the_commit_is_that_of_the_source_and_tells_of_any_change(tmp_path: Path) -> None:
    import importlib.util
    import shutil

    import dynablocks.experiments.provenance as provenance

    def commit() -> str | None:
        spec = importlib.util.spec_from_file_location("copied_provenance", inside / "provenance.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.commit()

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    inside = tmp_path / "source" / "experiments"
    inside.mkdir(parents=True)
    shutil.copy(provenance.__file__, inside / "provenance.py")
    (tmp_path / "loop.py").write_text("1")
    git("init")
    git("add", "loop.py")
    git("commit", "-m", "without the source, as when it is installed inside a repository")
    assert commit() is None
    git("add", ".")
    git("commit", "-m", "all")
    assert not (found := commit() or "+").endswith("+")
    (tmp_path / "loop.py").write_text("2")
    assert commit() == f"{found}+"


def of_areas(areas: dict[str, float]) -> Planted:
    """A store in which every network has one accuracy at all radii."""

    def result(cell: Cell) -> dict[str, Any]:
        assert isinstance(cell, AttackCell)
        points = [{"epsilon": e, "accuracy": areas[cell.training.model.name]} for e in PAPER_EPSILONS]
        return {"samples": 1024, "robust_accuracy": points, "robust_accuracy_by_loss": {"ce": points}}

    return Planted(result)


def test_the_papers_orderings_are_told_from_others() -> None:
    scale = Scale("cpu")
    rows = paper_rows(scale, (0.07,))
    right = {"flexible": 0.7, "prescribed": 0.6, "non_expansive": 0.5, "naive": 0.4, "resnet": 0.3}

    def verdicts(**changes: float) -> list[str]:
        return [c.verdict for c in order_checks(scale, 0.07, rows, of_areas(right | changes))]

    assert verdicts() == ["agrees"] * 3
    assert verdicts(naive=0.55) == ["differs", "agrees", "agrees"]
    assert verdicts(prescribed=0.45) == ["agrees", "differs", "agrees"]
    assert verdicts(flexible=0.55) == ["agrees", "agrees", "differs"]
    # Half a percent or less is within the noise of 1,024 images.
    assert verdicts(flexible=0.605) == ["agrees", "agrees", "not compared"]
    assert verdicts(prescribed=0.501) == ["agrees", "not compared", "agrees"]
    assert verdicts(naive=0.501) == ["not compared", "agrees", "agrees"]
    near = order_checks(scale, 0.07, rows, of_areas(right | {"naive": 0.499}))[0]
    assert (near.expected, near.verdict) == ("closer than 1,024 images can tell", "not compared")


def test_one_folder_may_hold_both_cifars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(
        "dynablocks.experiments.commands.find_copy", lambda wanted, folder: asked.append(wanted.name) or folder
    )
    folders = ["--data-dir", str(tmp_path), "--cifar100-dir", str(tmp_path)]
    assert main(["reproduce", "table1", "--dry-run", *folders, "--out", str(tmp_path / "out")]) == 0
    assert asked == ["cifar10", "cifar100"]


def test_check_ends_with_one_where_a_cell_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "fig5", "--preset", "smoke", "--out", str(tmp_path), "--check"]
    assert main(command) == 0
    monkeypatch.setattr(Store, "state", lambda self, cell: "failed")
    monkeypatch.setattr(Store, "failure", lambda self, cell: "a certificate is broken.")
    assert main(command) == 1
    assert "failed: train" in capsys.readouterr().err


def test_a_page_beyond_smoke_says_where_it_was_made(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((made / "smoke" / "fig5.json").read_text())
    monkeypatch.setattr("dynablocks.experiments.runner.provenance", lambda *_: record | {"preset": "cpu"})
    monkeypatch.setattr(Store, "result", lambda self, cell: None)
    text = page(chosen(["fig5"])[0], Scale("cpu"), Store(made / "cells"), [])
    assert "Where it was made: preset cpu; data digits; seed 0; hardware " in text
    assert "Where it was made" not in (made / "smoke" / "fig5.md").read_text()


@pytest.mark.parametrize("windows", [False, True])
def test_a_time_limit_interrupts_where_interrupts_were_ignored(windows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows not by os.kill, which ends a process there."""

    class Alarm:
        """A timer that goes off when it is told to."""

        def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
            self.seconds, self.ring, self.daemon, self.state = seconds, ring, False, "made"
            alarms.append(self)

        def start(self) -> None:
            self.state = "started"

        def cancel(self) -> None:
            self.state = "cancelled"

    def kill(process: int, number: int) -> None:
        assert not windows
        assert process == os.getpid()
        signal.raise_signal(number)

    alarms: list[Alarm] = []
    monkeypatch.setattr(runner, "WINDOWS", windows)
    monkeypatch.setattr(runner, "threading", SimpleNamespace(Event=threading.Event, Timer=Alarm))
    monkeypatch.setattr(runner, "os", SimpleNamespace(getpid=os.getpid, kill=kill))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), time_limit(2.0) as is_over:  # noqa: PT012
            (alarm,) = alarms
            assert (alarm.seconds, alarm.state, alarm.daemon, is_over()) == (7200, "started", True, False)
            alarm.ring()
        assert is_over()
        assert alarm.state == "cancelled"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_check_ends_with_one_where_a_result_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = [1.0]
    monkeypatch.setattr(Store, "result", lambda self, cell: {"body_lipschitz": bound[0]})
    data = ["--data-dir", str(tmp_path)]
    (tmp_path / "images").mkdir()
    monkeypatch.setattr("dynablocks.experiments.commands.find_copy", lambda wanted, folder: object())
    command = ["reproduce", "laws", "--preset", "cpu", *data, "--out", str(tmp_path / "out"), "--check"]
    assert main(command) == 0
    bound[0] = 1.01
    assert main(command) == 1


@pytest.mark.parametrize(("name", "said"), [("fig1", "drawn by table1"), ("fig2", "a sketch")])
def test_a_figure_without_an_experiment_of_its_name_is_told_where_it_is(name: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        chosen([name, "all"])


def test_states_are_told_without_writing_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "cells")
    (cell,) = all_cells(chosen(["fig5"]), SMOKE)
    begun, lock = store.directory(cell).with_suffix(".partial"), store.root / "locks" / store.directory(cell).name
    begun.mkdir(parents=True)
    with lock_file(lock) as free:
        assert free
        assert store.state(cell) == "running"
    lock.unlink()
    lock.parent.rmdir()
    monkeypatch.setattr("dynablocks.experiments.cells.lock_file", lambda path: pytest.fail("a lock was written"))
    assert store.state(cell) == "partial"
    command = ["reproduce", "fig5", "--preset", "smoke", "--out", str(tmp_path)]
    assert main([*command, "--dry-run"]) == 0
    assert main([*command, "--check"]) == 0
    assert "partial" in capsys.readouterr().out
    assert [path.name for path in store.root.iterdir()] == [begun.name]


def test_a_command_that_is_killed_ends_its_workers_as_ctrl_c_does() -> None:
    """SIGTERM, as `kill` and job schedulers send it, would end the command and leave them running."""
    code = (
        "import os, signal\n"
        "from dynablocks.experiments.runner import terminated_as_interrupted\n"
        "before = signal.getsignal(signal.SIGTERM)\n"
        "try:\n"
        "    with terminated_as_interrupted():\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        signal.pause()\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', signal.getsignal(signal.SIGTERM) == before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["interrupted", "True"]


def test_workers_draw_no_bars_over_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    terminals = []

    def started(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        terminals.append(Console(file=io.StringIO(), force_terminal=True, _environ=env))
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=started))
    build_with_workers(["fig5"], jobs=3, cores=2)
    assert [terminal.is_interactive for terminal in terminals] == [False] * 3


def test_workers_that_a_signal_ended_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = iter([-9, 3, -15, 0, 2, 2])
    started = SimpleNamespace(Popen=lambda command, env: SimpleNamespace(wait=lambda: next(codes)))
    monkeypatch.setattr(runner, "subprocess", started)
    build_with_workers(["fig5"], jobs=6, cores=6)
    assert capsys.readouterr().err.splitlines() == [
        "a worker was ended by signal 9 (out of memory?); use fewer --jobs",
        "a worker was ended by signal 15; the same command goes on from what it left",
        "2 of 6 workers ended with an error, exit code 2; each has said above what to do",
    ]


def test_an_experiment_of_ones_own_is_built_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Own(EXPERIMENTS["fig5"]):  # type: ignore[misc]
        name = "own"

    monkeypatch.setitem(EXPERIMENTS, "own", Own)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=lambda *_, **__: pytest.fail("one was started")))
    options = ["--preset", "smoke", "--out", str(tmp_path)]
    for name in ("own", "all"):
        assert main(["reproduce", name, *options, "--jobs", "2"]) == 2
        said = capsys.readouterr().err
        assert said.endswith(f"the experiment own (of {__name__}) is known to this process only; give --jobs 1.\n")
    assert main(["reproduce", "own", *options, "--jobs", "1", "--dry-run"]) == 0


def test_processes_share_no_cells_where_nothing_locks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    require_workers(chosen(["all"]), tmp_path)
    said = f"{tmp_path}, where nothing locks files (Windows, a file system without flock); give --jobs 1, or another"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)  # as on Windows
        with pytest.raises(InvalidArgument, match=re.escape(said)):
            require_workers(chosen(["fig5"]), tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(fcntl, "flock", unknown)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(Popen=lambda *_, **__: pytest.fail("one was started")))
    command = ["reproduce", "fig5", "--preset", "smoke", "--out", str(tmp_path / "new"), "--jobs", "2"]
    for only in ("--dry-run", "--check"):
        assert main([*command, only]) == 0
        assert not (tmp_path / "new").exists()
    capsys.readouterr()
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "where nothing locks files" in message
    assert message.count("\n") == 1


def test_workers_import_no_file_of_the_folder_they_are_started_in(tmp_path: Path) -> None:
    """``dynablocks``, the program, does not; ``python -m dynablocks`` does."""
    (tmp_path / "platform.py").write_text("raise SystemExit(7)\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"}
    arguments = ["-m", "dynablocks", "reproduce", "fig11", "--preset", "smoke", "--jobs", "2", "--out", "out"]
    for safe, code in (([], 7), (["-P"], 0)):
        command = [sys.executable, *safe, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
    assert (tmp_path / "out" / "smoke" / "fig11.md").exists()


@pytest.mark.parametrize("place", [None, "", "here"])
def test_workers_look_for_modules_where_their_command_does(
    place: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    others = [entry for entry in sys.path if entry not in ("", os.getcwd())]
    monkeypatch.setattr(sys, "path", others if place is None else [os.getcwd() if place else "", *others])
    done = SimpleNamespace(wait=lambda: 0)
    started = SimpleNamespace(Popen=lambda command, env: commands.append(command) or done)
    monkeypatch.setattr(runner, "subprocess", started)
    build_with_workers(["fig5"], jobs=1, cores=1)
    (command,) = commands
    safe = ["-P"] if place is None else []
    assert command[: command.index("dynablocks")] == [sys.executable, *safe, "-m"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence_and_the_cell_is_built_later(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Cell, directory: Path, store: Store) -> dict[str, Any]:
        raise error

    (cell,) = all_cells(chosen(["fig5"]), SMOKE)
    monkeypatch.setattr(type(cell), "build", fails)
    assert main(["reproduce", "fig5", "--preset", "smoke", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert Store(tmp_path / "cells").state(cell) == "partial"


def test_an_attack_keeps_what_it_found_until_its_result_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that it breaks, or a kill, comes between."""

    def attacked(network: object, images: object, config: object, progress: object, partial: Any) -> SimpleNamespace:
        partial.path.write_text("found")
        return SimpleNamespace(tensors=lambda: {"labels": torch.zeros(1)}, summary=lambda: {"samples": 1})

    def broken(*_: object) -> None:
        raise UnsoundResult("the attack broke a certificate.")

    row = paper_rows(SMOKE, (0.07,))[0]
    monkeypatch.setattr(runs, "attack", attacked)
    monkeypatch.setattr(runs, "load", lambda run: torch.nn.Identity())
    monkeypatch.setattr(runs, "belongs_to", lambda run, fingerprint, **_: {"weights": "0"})
    monkeypatch.setattr(runs, "stored_certificate", lambda cell, store: None)
    monkeypatch.setattr(AttackCell, "needs", lambda self: ())
    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "check_sound", broken)
        assert store.build(row.attack) == "failed"
    (left,) = tmp_path.rglob(ATTACK_PARTIAL)
    assert left.read_text() == "found"
    monkeypatch.setattr(runs, "check_sound", lambda attacked, certificate: None)
    assert store.build(row.attack, retry=True) == "built"
    assert not list(tmp_path.rglob(ATTACK_PARTIAL))
    record = store.record(row.attack)
    assert record is not None
    assert list(record["files"]) == [ATTACK_TENSORS]


def test_a_folder_of_cells_may_be_text_and_begin_with_a_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store("~/cells").root == Store(str(tmp_path / "cells")).root == tmp_path / "cells"


@pytest.mark.parametrize("name", ["certificate", "attack", "network", "rollout"])
@pytest.mark.parametrize("content", [None, b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_cut_file_of_a_built_cell_is_one_sentence(content: bytes | None, name: str, tmp_path: Path) -> None:
    row, pendulum = paper_rows(SMOKE, (0.07,))[0], PendulumFlowMap()
    store, ensemble = Store(tmp_path), PlanarClassification().cell(SMOKE, "F")
    fitted = pendulum.cells(SMOKE)[0]
    readers: dict[str, tuple[Cell, str, Callable[[], object]]] = {
        "certificate": (row.certificate, CERTIFICATE_TENSORS, lambda: stored_certificate(row.certificate, store)),
        "attack": (row.attack, ATTACK_TENSORS, lambda: stored_attack(row.attack, store)),
        "network": (ensemble, WEIGHTS, lambda: stored_network(ensemble, store, 0)),
        "rollout": (fitted, ROLLOUT, lambda: pendulum.figures(SMOKE, store)),
    }
    cell, file, read = readers[name]
    folder = store.directory(cell)
    write_json(folder / RESULT, {"result": {"rollout": 1.0}, "made": made_here() | {"seconds": 1.0}})
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(BadData) as caught:
        read()
    assert str(caught.value) == f"{folder / file} is damaged; remove {folder} and give the command again."
