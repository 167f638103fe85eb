"""Files and their places: home folders, links that lead round, disks without room, text that is none, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch

from dynablocks import files
from dynablocks.errors import DynablocksError, InvalidArgument, require_finite
from dynablocks.files import (
    can_lock,
    expanded,
    held,
    is_held,
    lock_file,
    plain_data,
    require_writable,
    resolved,
    tensor_digest,
    tuples,
    write_atomically,
    write_text,
)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_home_folder_of_nobody_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert expanded("~/data") == Path("/home/someone/data")
    with pytest.raises(InvalidArgument, match="~no-such-user-here/data begins with a home folder that is not known"):
        expanded("~no-such-user-here/data")


@pytest.mark.parametrize("given", ["a\0b", "~a\0b", Path("a\0b")])
def test_a_zero_byte_in_a_path_is_one_sentence(given: str | Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^'~?a\\x00b' holds a zero byte, which no name does; write it again\.$"):
        expanded(given)


def test_links_that_lead_back_to_themselves_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InvalidArgument, match="a is a link that leads back to itself"):
        resolved(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "missing")
    assert resolved(tmp_path / "c") == tmp_path.resolve() / "missing"


def test_a_place_without_room_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DynablocksError, match="No space left on device; free some space, make the folder writable"):
        require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(DynablocksError, match="Not a directory"):
        require_writable(tmp_path / "file")


def test_the_advice_fits_commands_without_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DynablocksError, match=r"No space left on device.*what was there is unchanged") as caught:
        write_text(tmp_path / "metrics.json", "{}")
    assert "--out" not in str(caught.value)


def test_a_byte_that_is_no_text_is_written_out(tmp_path: Path) -> None:
    write_text(tmp_path / "report.html", f"dynablocks run --out {os.fsdecode(bytes([255]))}")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == r"dynablocks run --out \udcff"


def test_text_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(DynablocksError, match="rename what has this character in its name"):
        write_atomically(path, lambda temporary: temporary.write_text(os.fsdecode(bytes([255])), encoding="utf-8"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("table.csv", "before")]


def test_a_lock_is_held_and_waited_for(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock):
        with lock_file(lock) as free:
            assert not free
        with pytest.raises(DynablocksError, match="another process holds"), held(lock, patience=0.01):
            pass
    with held(lock, patience=0.01):
        pass


def test_a_whole_number_that_no_float_holds_is_one_sentence() -> None:
    with pytest.raises(InvalidArgument, match="samples is a whole number of more than 308 digits"):
        require_finite("samples", 10**400)
    assert require_finite("samples", 10**300) == 1e300


def test_whether_a_lock_is_held_is_asked_without_writing(tmp_path: Path) -> None:
    lock = tmp_path / "not" / "yet" / "lock"
    assert not is_held(lock)
    assert list(tmp_path.iterdir()) == []
    with held(lock):
        assert is_held(lock)
    assert not is_held(lock)


def test_who_asks_whether_a_lock_is_held_holds_none_of_the_others(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock):
        pass
    with open(lock, "rb") as another:
        fcntl.flock(another, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not is_held(lock)


def test_whether_a_lock_is_held_is_seen_on_network_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS refuses an exclusive lock of a file that is open for reading, a shared one of one open for writing."""
    flock = fcntl.flock

    def of_nfs(handle: int, operation: int) -> None:
        writes = bool(fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR))
        if writes != bool(operation & fcntl.LOCK_EX):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    lock = tmp_path / "lock"
    with held(lock):
        assert is_held(lock)
        with lock_file(lock) as free:
            assert not free
    assert not is_held(lock)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
def test_folders_that_cannot_be_flushed_are_no_failure(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def of_files_alone(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    if number == errno.EIO:
        with pytest.raises(DynablocksError, match="cannot write"):
            write_text(tmp_path / "a.txt", "whole")
    else:
        write_text(tmp_path / "a.txt", "whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "whole")]


@pytest.mark.parametrize("platform", ["darwin", "linux"])
@pytest.mark.parametrize("known", [True, False])
def test_on_macos_the_cache_of_the_drive_is_flushed_too(
    known: bool, platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def of_the_system(handle: int) -> None:
        flushed.append(("fsync", stat.S_ISDIR(os.fstat(handle).st_mode)))
        fsync(handle)

    def of_the_drive(handle: int, operation: int) -> int:
        assert operation == 51
        flushed.append(("drive", stat.S_ISDIR(os.fstat(handle).st_mode)))
        if not known:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return 0

    monkeypatch.setattr(files, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", of_the_drive)
    monkeypatch.setattr(os, "fsync", of_the_system)
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    ways = ("fsync", "drive") if platform == "darwin" else ("fsync",)
    assert flushed == [(way, is_folder) for is_folder in (False, True) for way in ways]


def test_nothing_is_flushed_by_the_system_alone() -> None:
    source = Path(files.__file__).parent
    calls = {
        path.relative_to(source).as_posix(): len(re.findall(r"\bfsync\(", path.read_text(encoding="utf-8")))
        for path in source.rglob("*.py")
    }
    assert {name: count for name, count in calls.items() if count} == {"files.py": 1}


def unknown(handle: int, operation: int) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize(("flock", "known"), [(fcntl.flock, True), (unknown, False), (lambda *_: None, False)])
def test_whether_files_can_be_locked_is_tried(
    flock: Callable[[int, int], None], known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the file system has no locks, nor where all may hold one at once."""
    monkeypatch.setattr(fcntl, "flock", flock)
    assert can_lock(tmp_path / "new") is known
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path: Path) -> None:
    hour, day = 3600.0, 86_400.0
    ages = {
        ".a [1].txt.0123456789abcdef.tmp": 2 * day,
        ".a [1].txt.fedcba9876543210.tmp": 25 * hour,
        ".a [1].txt.00000000ffffffff.tmp": 23 * hour,  # it may have a writer
        ".a [1].txt.0f0f.tmp": 2 * day,
        ".a [1].txt.0123456789abcdef.tmp.txt": 2 * day,
        ".a 1.txt.0123456789abcdef.tmp": 2 * day,
        "a [1].txt.0123456789abcdef.tmp": 2 * day,
    }
    now = time.time()
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    for text in ("one", "two"):
        write_text(tmp_path / "a [1].txt", text)
    assert (tmp_path / "a [1].txt").read_text() == "two"
    assert {path.name for path in tmp_path.iterdir()} == {"a [1].txt", *list(ages)[2:]}


@pytest.mark.parametrize("length", [100, 101, 234, 255])
def test_a_name_that_just_fits_is_written(length: int, tmp_path: Path) -> None:
    path, used = tmp_path / ("ä" * (length // 2) + "a" * (length % 2)), list[Path]()

    def write(temporary: Path) -> None:
        used.append(temporary)
        temporary.write_text("whole")

    write_atomically(path, write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "whole")]
    used[0].touch()  # as a writer leaves it that is killed
    killed = time.time() - 2 * 86_400.0
    os.utime(used[0], (killed, killed))
    write_text(path, "again")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "again")]


def test_a_digest_sees_names_types_shapes_and_every_bit() -> None:
    x = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    digest = tensor_digest({"x": x})
    for same in (x.T.contiguous().T, torch.cat([x, x])[:2], x.clone().requires_grad_(True)):
        assert tensor_digest({"x": same}) == digest
    flipped = x.clone()
    flipped.view(torch.uint8)[1, -8] ^= 1
    others = [{"y": x}, {"x": x.float()}, {"x": x.reshape(3, 2)}, {"x": x, "y": x[:0]}, {"x": flipped}, {}]
    assert len({digest, *(tensor_digest(other) for other in others)}) == 1 + len(others)
    # A single entry with the stride of a column, no entry, one without a dimension, and half precision.
    for tensor in (x[:1, 0], x[:0], x[0, 0], x.bfloat16(), x > 1):
        assert tensor_digest({"x": tensor}) == tensor_digest({"x": tensor.clone()})


def test_settings_come_back_from_plain_data_as_they_were() -> None:
    settings = {"widths": (8, 16), "losses": (), "name": "certified", "stem": None, "lr": 0.5}
    plain = plain_data(settings)
    assert plain == settings | {"widths": [8, 16], "losses": []}
    assert tuples(plain) == settings
    assert tuples(MappingProxyType(plain)) == settings
