"""Cells: keys that follow the settings, builds that survive kills and failures, and folders that are shared."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors import SafetensorError

from dynablocks.errors import BadData, DynablocksError
from dynablocks.experiments.cells import Cell, Store, in_order, stored_tensors
from dynablocks.experiments.commands import _sum_up
from dynablocks.experiments.provenance import device_name
from dynablocks.experiments.runner import build_cells
from dynablocks.experiments.runs import AttackCell, CertificateCell, TrainingCell
from dynablocks.files import write_json, write_tensors
from dynablocks.models import ModelConfig
from dynablocks.robustness import AttackConfig
from dynablocks.run_files import FAILED, RESULT
from dynablocks.training import TrainingConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    device: str = field(default="cpu", metadata={"result": False})
    later: int | None = None


@dataclass(frozen=True)
class SumCell(Cell):
    numbers: tuple[int, ...] = (1, 2)
    inner: Inner = Inner()
    parent: SumCell | None = None

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        below = 0 if self.parent is None else (store.result(self.parent) or {})["sum"]
        return {"sum": sum(self.numbers) + below}


@dataclass(frozen=True)
class FailingCell(Cell):
    message: str = "no such luck"

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        if not (directory / "tried").exists():
            (directory / "tried").touch()
            raise ValueError(self.message)
        return {"ok": True}


@dataclass(frozen=True)
class NeedyCell(Cell):
    need: FailingCell = FailingCell()

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class FarCell(Cell):
    name: str = "far"

    def data_hash(self) -> str:
        raise BadData("the images are far away; give --data-dir.")

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        raise AssertionError("a cell without data is never built")


def test_the_key_follows_every_deciding_setting() -> None:
    cell = SumCell()
    same = [SumCell(), replace(cell, inner=Inner(device="cuda")), replace(cell, inner=Inner(later=None))]
    assert {other.key for other in same} == {cell.key}
    others = [
        replace(cell, numbers=(1, 3)),
        replace(cell, inner=Inner(rate=0.2)),
        replace(cell, inner=Inner(later=1)),
        replace(cell, parent=SumCell((5,))),
        replace(cell, parent=SumCell((6,))),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 1 + len(others)


def test_a_new_version_of_a_kind_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SumCell().key
    monkeypatch.setattr(SumCell, "version", 2)
    assert SumCell().key != before


@pytest.fixture
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    device_name.cache_clear()
    yield
    device_name.cache_clear()


@pytest.mark.usefixtures("_a_gpu")
def test_a_result_names_what_it_was_computed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is there is named by the cells alone that compute on it; the key does not tell."""
    store, here, there = Store(tmp_path), SumCell(numbers=(1,)), SumCell(numbers=(2,))
    store.build(here)
    key = there.key
    monkeypatch.setattr(SumCell, "computes_on", "cuda")
    assert there.key == key
    store.build(there)
    devices = [(store.record(cell) or {})["made"]["device"] for cell in (here, there)]
    assert "cores" in devices[0]
    assert devices[1] == "a GPU"


@pytest.mark.usefixtures("_a_gpu")
@pytest.mark.parametrize(("device", "wanted"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_trainings_certificates_and_attacks_compute_on_the_device_of_the_training(device: str, wanted: str) -> None:
    training = TrainingCell(ModelConfig("resnet"), TrainingConfig(device=device), "digits", "smoke")
    cells = [training, CertificateCell(training), AttackCell(training, AttackConfig())]
    assert [cell.computes_on for cell in cells] == [wanted] * 3


def test_the_data_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SumCell().key
    monkeypatch.setattr(SumCell, "data_hash", lambda self: "other images")
    assert SumCell().key != before


def test_a_setting_without_a_stable_form_is_refused() -> None:
    with pytest.raises(TypeError, match="no stable hash"):
        _ = SumCell(numbers=(object(),)).key  # type: ignore[arg-type]


def test_cells_come_after_what_they_need() -> None:
    parent, child = SumCell((5,)), SumCell((1,), parent=SumCell((5,)))
    assert list(in_order([child, parent])) == [parent, child]


def test_a_failure_is_noted_and_blocks_only_what_needs_it(tmp_path: Path) -> None:
    store, lines = Store(tmp_path / "cells"), []
    bad, needy, good, far = FailingCell(), NeedyCell(), SumCell(), FarCell()
    build_cells([bad, needy, good, far], store, lines.append)
    assert [store.state(c) for c in (bad, needy, good, far)] == ["failed", "waiting", "built", "impossible"]
    noted = json.loads(next(tmp_path.rglob(FAILED)).read_text())
    assert noted["error"] == "no such luck"
    assert "Traceback" in noted["traceback"]
    assert any("no such luck" in line for line in lines)
    build_cells([bad, needy], store, lines.append)
    assert store.state(bad) == "failed"
    build_cells([bad, needy], store, lines.append, retry=True)
    assert [store.state(c) for c in (bad, needy)] == ["built", "built"]
    assert store.result(far) is None
    assert "far away" in str(store.obstacle(far))


@pytest.mark.parametrize(
    "text",
    [
        '{"result": ',
        "{}",
        "[]",
        '{"result": {"sum": 3}}',
        '{"result": {"sum": 3}, "made": {"seconds": 1.0}}',
        '{"result": 3, "made": {"commit": "", "torch": "", "device": "", "threads": 1, "date": "", "seconds": 1.0}}',
    ],
)
def test_a_truncated_or_edited_result_is_a_failure_that_retry_mends(text: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.build(SumCell())
    whole = store.result(SumCell())
    (store.directory(SumCell()) / "kept.txt").write_text("a file of the cell")
    (store.directory(SumCell()) / "result.json").write_text(text)
    again = Store(tmp_path)
    assert again.result(SumCell()) is None
    assert again.build(SumCell()) == "failed"
    assert str(again.failure(SumCell())).endswith("is damaged; --retry builds it again.")
    assert again.build(SumCell(), retry=True) == "built"
    assert again.result(SumCell()) == whole
    assert (again.directory(SumCell()) / "kept.txt").exists()


@pytest.mark.parametrize("text", ["[]", "{}", "5"])
def test_an_edited_note_of_a_failure_says_nothing(text: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.build(FailingCell()) == "failed"
    next(tmp_path.rglob(FAILED)).write_text(text)
    assert store.failure(FailingCell()) is None


SLOW = textwrap.dedent(
    """
    import sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from dynablocks.experiments.cells import Cell, Store

    HALTS = __name__ == "__main__" and sys.argv[2:] == ["halting"]

    @dataclass(frozen=True)
    class CountCell(Cell):
        steps: int = 5
        number: int = 0
        def build(self, directory, store):
            path = directory / "steps"
            while (done := int(path.read_text()) if path.exists() else 0) < self.steps:
                time.sleep(0.15)
                path.write_text(str(done + 1))
                print(self.number, done + 1, flush=True)
                if HALTS:
                    sys.stdin.readline()
            return {"steps": done}

    if __name__ == "__main__":
        from dynablocks.experiments.runner import build_cells
        cells = [CountCell(5, n) for n in range(3)]
        build_cells(cells, Store(Path(sys.argv[1])), lambda line: print(line, flush=True))
    """
)


class Counting:
    """Processes that build the three cells of ``SLOW`` in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "count.py"
        self.script.write_text(SLOW)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A process; with the word ``halting`` one that goes on after each step when it is sent a line."""
        source = str(Path(__file__).parent.parent / "src")
        environment = os.environ | {"PYTHONPATH": source}
        arguments = [sys.executable, str(self.script), str(self.folder / "cells"), *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True, env=environment)

    def results(self) -> list[dict[str, Any]]:
        found = (self.folder / "cells").glob("count-*/result.json")
        return [json.loads(path.read_text())["result"] for path in sorted(found)]


def test_a_killed_build_goes_on_where_it_was(tmp_path: Path) -> None:
    counting = Counting(tmp_path)
    with counting.start("halting") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "0 1\n"
        first.kill()
    assert not counting.results()
    steps = [line for line in counting.start().communicate()[0].splitlines() if line[0].isdigit()]
    assert steps == [f"{n} {k}" for n in range(3) for k in range(1, 6)][1:]
    assert counting.results() == [{"steps": 5}] * 3


def test_processes_share_the_cells_of_a_folder(tmp_path: Path) -> None:
    counting = Counting(tmp_path)
    workers = [counting.start() for _ in range(3)]
    outputs = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    steps = [line for output in outputs for line in output.splitlines() if line[0].isdigit()]
    assert sorted(steps) == sorted(f"{n} {k}" for n in range(3) for k in range(1, 6))
    assert counting.results() == [{"steps": 5}] * 3


def test_the_time_left_counts_what_other_processes_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [SumCell((n,)) for n in range(5)]
    store, others = Store(tmp_path), Store(tmp_path)
    clock = iter(range(0, 10_000, 300))
    clocked = SimpleNamespace(perf_counter=lambda: float(next(clock)), sleep=time.sleep)
    monkeypatch.setattr("dynablocks.experiments.runner.time", clocked)
    build = store.build

    def beside_another_process(cell: Cell, *, retry: bool = False) -> str:
        if cell == cells[0]:
            others.build(cells[3])
            others.build(cells[4])
        return build(cell, retry=retry)

    monkeypatch.setattr(store, "build", beside_another_process)
    lines: list[str] = []
    build_cells(cells, store, lines.append)
    # 600 s for three of five cells: 400 s for the other two.
    assert "about 6 min 40 s left" in lines[0]


def test_a_live_lock_is_respected_and_a_dead_one_is_not(tmp_path: Path) -> None:
    counting = Counting(tmp_path)
    sys.path.insert(0, str(tmp_path))
    try:
        from count import CountCell  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    store, cell = Store(tmp_path / "cells"), CountCell(5, 0)
    with counting.start("halting") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "0 1\n"
        assert store.state(cell) == "running"
        assert store.build(cell) == "running"
        holder.kill()
    assert store.state(cell) == "partial"
    assert store.build(cell) == "built"


def test_a_failure_that_is_forgotten_is_built_again_by_anyone(tmp_path: Path) -> None:
    store = Store(tmp_path)

    @dataclass(frozen=True)
    class LuckyCell(Cell):
        def build(self, directory: Path, store: Store) -> dict[str, Any]:
            if not (directory / "tried").exists():
                (directory / "tried").touch()
                raise BadData("no such luck")
            return {}

    assert store.build(LuckyCell()) == "failed"
    store.forget_failure(LuckyCell())
    assert store.state(LuckyCell()) == "partial"
    assert store.build(LuckyCell()) == "built"


def test_a_failure_that_cannot_be_stored_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class FullDiskCell(Cell):
        def build(self, directory: Path, store: Store) -> dict[str, Any]:
            def full(path: Path, content: object) -> None:
                raise DynablocksError("the disk is full")

            monkeypatch.setattr("dynablocks.experiments.cells.write_json", full)
            raise BadData("no such luck")

    with pytest.warns(UserWarning, match=r"no such luck.*not stored: the disk is full"):
        Store(tmp_path).build(FullDiskCell())


@pytest.mark.parametrize("result", ["gone", '{"result": ', "{}"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_without_a_whole_result_is_in_nobodys_way(begun: bool, result: str, tmp_path: Path) -> None:
    """As a kill between two renamings leaves it, or a user who deletes result.json to have the cell built again."""
    cell, store = SumCell(), Store(tmp_path)
    store.build(cell)
    final, whole = store.directory(cell), store.result(cell)
    (final / "kept.txt").write_text("a file of the cell")
    if result == "gone":
        (final / "result.json").unlink()
    else:
        (final / "result.json").write_text(result)
    if begun:
        final.with_suffix(".partial").mkdir()
        (final.with_suffix(".partial") / "begun.txt").write_text("a file of a later build")
    again = Store(tmp_path)
    assert again.build(cell, retry=True) == "built"
    assert again.result(cell) == whole
    aside = [path for path in tmp_path.iterdir() if ".damaged-" in path.name]
    assert len(aside) == begun
    assert (final / "begun.txt").exists() == begun
    assert [path.name for path in tmp_path.rglob("kept.txt")] == ["kept.txt"]
    assert (aside[0] if begun else final).joinpath("kept.txt").exists()


def test_a_cell_that_another_process_built_meanwhile_stays_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.build(SumCell())
    late = Store(tmp_path)
    monkeypatch.setattr(late, "state", lambda cell: "failed")
    late.forget_failure(SumCell())
    assert Store(tmp_path).state(SumCell()) == "built"


@dataclass(frozen=True)
class SteppingCell(Cell):
    leftovers: ClassVar[tuple[str, ...]] = ("progress.txt",)

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        path = directory / "progress.txt"
        before = path.read_text() if path.exists() else "nothing"
        path.write_text("everything")
        return {"went on from": before}


def test_a_build_keeps_what_it_goes_on_from_until_its_result_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, content: object) -> None:
        if path.name == RESULT:
            raise KeyboardInterrupt
        write_json(path, content)

    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("dynablocks.experiments.cells.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            store.build(SteppingCell())
    assert store.build(SteppingCell()) == "built"
    assert store.result(SteppingCell()) == {"went on from": "everything"}
    assert sorted(path.name for path in store.directory(SteppingCell()).iterdir()) == ["cell.json", "result.json"]


def test_a_result_that_is_stored_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    store, cell = Store(tmp_path), SteppingCell()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            store.build(cell)
    result = store.directory(cell).with_suffix(".partial") / RESULT
    whole = result.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(SteppingCell, "build", lambda *_: pytest.fail("the result was there"))
        assert store.build(cell) == "built"
    assert (store.directory(cell) / RESULT).read_text() == whole
    another = whole.replace('"version": 1', '"version": 2').replace('"nothing"', '"another"')
    for other in ('{"result": ', another):
        (store.directory(cell) / RESULT).unlink()
        os.rename(store.directory(cell), result.parent)
        result.write_text(other)
        assert Store(tmp_path).build(cell) == "built"
        assert Store(tmp_path).result(cell) == {"went on from": "nothing"}


def caused(error: DynablocksError, cause: Exception) -> DynablocksError:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (FULL, "partial"),
        (PermissionError(errno.EACCES, "Permission denied"), "partial"),
        (MemoryError(), "partial"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "partial"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "partial"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "partial"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "partial"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "failed"),
        (caused(DynablocksError("cannot write a"), FULL), "partial"),
        (caused(DynablocksError("cannot write b"), SafetensorError("I/O error")), "partial"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "failed"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "failed"),
        (caused(DynablocksError("c does not exist"), FileNotFoundError()), "failed"),
        (caused(DynablocksError("d is no JSON"), ValueError()), "failed"),
        (caused(BadData("e is no image"), FULL), "failed"),
        (DynablocksError("no such luck"), "failed"),
    ],
)
def test_what_the_machine_lacks_is_no_failure_of_the_cell(
    error: Exception, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Cell, directory: Path, store: Store) -> dict[str, Any]:
        raise error

    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(SumCell, "build", fails)
        if state == "failed":
            assert store.build(SumCell()) == "failed"
        else:
            with pytest.raises(type(error)) as caught:
                store.build(SumCell())
            assert caught.value is error
    assert store.state(SumCell()) == state
    assert bool(list(tmp_path.rglob(FAILED))) == (state == "failed")
    assert store.build(SumCell()) == ("built" if state == "partial" else "failed")


@dataclass(frozen=True)
class CountsCell(Cell):
    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        write_tensors(directory / "counts.safetensors", {"counts": torch.arange(3, dtype=torch.float64)})
        return {}


def stored_counts(store: Store) -> torch.Tensor:
    return stored_tensors(CountsCell(), store, "counts.safetensors", lambda tensors: tensors["counts"])


@dataclass(frozen=True)
class ReadingCell(Cell):
    counts: CountsCell = CountsCell()

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        return {"sum": float(stored_counts(store).sum())}


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "another"])
def test_a_damaged_file_of_a_built_cell_is_one_sentence(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.build(CountsCell())
    folder = store.directory(CountsCell())
    path = folder / "counts.safetensors"
    assert stored_counts(store).tolist() == [0.0, 1.0, 2.0]
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "another":
        write_tensors(path, {"others": torch.zeros(3)})
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BadData) as caught:
        stored_counts(store)
    assert str(caught.value) == f"{path} is damaged; remove {folder} and give the command again."
    # Nor has the cell that reads it failed: after the advice it is built.
    with pytest.raises(BadData, match="is damaged; remove"):
        store.build(ReadingCell())
    assert store.state(ReadingCell()) == "partial"
    shutil.rmtree(folder)
    again = Store(tmp_path)
    assert [again.build(cell) for cell in (CountsCell(), ReadingCell())] == ["built", "built"]
    assert again.result(ReadingCell()) == {"sum": 3.0}


def test_a_cell_without_digests_is_read(tmp_path: Path) -> None:
    """As earlier commits stored it."""
    store = Store(tmp_path)
    store.build(CountsCell())
    path = store.directory(CountsCell()) / RESULT
    record = json.loads(path.read_text())
    assert list(record["files"]) == ["counts.safetensors"]
    del record["files"]
    write_json(path, record)
    old = Store(tmp_path)
    assert stored_counts(old).tolist() == [0.0, 1.0, 2.0]
    tensors = path.parent / "counts.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(BadData, match="is damaged; remove"):
        stored_counts(old)


def test_one_cell_is_not_spoken_of_as_several() -> None:
    said: list[str] = []
    cells, store = [SimpleNamespace(title="train a")] * 2, SimpleNamespace(obstacle=lambda cell: "no data")
    _sum_up(cells, ["impossible", "waiting"], store, said.append)
    assert said == [
        "not run: 1 cell, such as train a: no data",
        "1 of 2 cells is not built yet; the same command goes on",
    ]
    said.clear()
    _sum_up(cells, ["waiting", "running"], store, said.append)
    assert said == ["2 of 2 cells are not built yet; the same command goes on"]
