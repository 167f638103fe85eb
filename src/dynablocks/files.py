"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynablocks.errors import DynablocksError, InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor

ROOM = "free some space, make the folder writable or choose another"
"""What to do where nothing can be written."""
STALE_SECONDS = 86_400.0
"""A temporary file to which nothing was written for so long has no writer any more."""
LONG_NAME = 100
"""Bytes of a file's name, up to which the names of its temporary files have it whole."""


def expanded(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~NAME`` replaced by that user's folder.

    Raises:
        InvalidArgument: there is no such user, or no home folder; or the path holds a zero byte.

    Example:
        >>> expanded("data/cifar10").parts
        ('data', 'cifar10')
    """
    if "\0" in str(path):
        raise InvalidArgument(f"{str(path)!r} holds a zero byte, which no name does; write it again.")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidArgument(f"{path} begins with a home folder that is not known here; write it out.") from error


def resolved(path: str | Path) -> Path:
    """``path`` from the root, without links and dots; it need not exist.

    Raises:
        InvalidArgument: its links lead back to themselves.
    """
    looped = InvalidArgument(f"{path} is a link that leads back to itself; give the file or folder itself.")
    try:
        found = Path(path).resolve()
    except RuntimeError as error:
        raise looped from error
    try:
        found.stat()  # from Python 3.13 on, resolve() is silent about such links
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise looped from error
    return found


def require_writable(directory: Path) -> None:
    """Write a block into a folder, or into the nearest one above that exists, and remove it: now, and not after hours.

    Raises:
        DynablocksError: the disk is full, or the place is not writable.
    """
    place = Path(directory)
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        probe = place / f".{secrets.token_hex(8)}.tmp"
        try:
            with open(probe, "xb") as stream:
                stream.write(bytes(4096))
                stream.flush()
                flush(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise DynablocksError(f"cannot write to {place}: {error.strerror or error}; {ROOM}.") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then flush and rename it; a failure leaves ``path`` as it
    was. Who may read it follows the umask, as for any new file. What writers of ``path`` left that were killed more
    than a day ago is removed.

    Raises:
        DynablocksError: the disk is full, the place is not writable, or UTF-8 has not what is written.
    """
    from safetensors import SafetensorError

    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        unused = path.parent / f".{_short(path.name)}.{secrets.token_hex(8)}.tmp"
        os.close(os.open(unused, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        temporary = unused
        write(temporary)
        with open(temporary, "rb+") as stream:
            flush(stream.fileno())
        os.replace(temporary, path)
        temporary = None
        flush_directory(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DynablocksError(f"cannot write {path}: {reason}; {ROOM}; what was there is unchanged.") from error
    except UnicodeError as error:
        raise DynablocksError(
            f"cannot write {path}: {error}; rename what has this character in its name; what was there is unchanged."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _short(name: str) -> str:
    """What a temporary name has of the ``name`` of its file: of a long one a digest, so that it is no longer than that.

    File systems take 255 bytes, or fewer: a name that just fits has room for nothing more.
    """
    encoded = os.fsencode(name)
    return name if len(encoded) <= LONG_NAME else hashlib.sha256(encoded).hexdigest()[:32]


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers of ``path`` that were killed, never of one that writes."""
    name = re.compile(rf"\.{re.escape(_short(path.name))}\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if name.fullmatch(entry.name) and time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                os.unlink(entry.path)


def flush(handle: int) -> None:
    """Make what was written to an open file outlive a power cut: every ``fsync`` of the library is this one.

    On macOS that of the system leaves it in the drive's cache, which only ``F_FULLFSYNC`` empties; where a file system
    does not know the latter, ``fsync`` has to do.
    """
    os.fsync(handle)
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)


def flush_directory(path: Path) -> None:
    """Make the names in a folder outlive a power cut, where folders can be flushed.

    Windows opens no folders, and keeps them by itself; some network and FUSE file systems flush none.
    """
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically; the byte 0xff of a file's name that is no UTF-8 is written as \\udcff."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON to ``path`` atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write ``tensors`` as safetensors to ``path`` atomically; the SHA-256 of what this process wrote."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = ""

    def write(temporary: Path) -> None:
        nonlocal written
        save_file(plain, temporary, None if metadata is None else dict(metadata))
        written = sha256(temporary)  # of the own file: another process may rename its own into the place of this one

    write_atomically(path, write)
    return written


def write_keyed_tensors(path: Path, tensors: Mapping[str, Tensor], key: str, **facts: str) -> None:
    """Write tensors with facts about them under a key, all of it with its digest, atomically.

    Args:
        path: the file.
        tensors: by name.
        key: what they are, as :func:`key_of` writes it.
        facts: any others, as text.

    Raises:
        DynablocksError: the disk is full, or the place is not writable.
    """
    write_tensors(path, tensors, facts | {"key": key, "digest": _keyed_digest(tensors, key, facts)})


def read_keyed_tensors(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and facts of :func:`write_keyed_tensors`; ``None`` where none have this key, or the file is damaged.

    Example:
        >>> read_keyed_tensors(Path("nowhere"), key_of("weights", "images")) is None
        True
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            facts = dict(stream.metadata() or {})
            if facts.pop("key", None) != key:
                return None
            digest = facts.pop("digest", None)
            # Cloned, since tensors of an open file would keep it from being replaced on Windows.
            found = {name: stream.get_tensor(name).clone() for name in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    # A bit that a disk flips would go into what is made of them.
    return (found, facts) if digest == _keyed_digest(found, key, facts) else None


def key_of(*deciding: object) -> str:
    """One text for all that decides something, by ``repr``."""
    return hashlib.sha256(repr(deciding).encode()).hexdigest()


def _keyed_digest(tensors: Mapping[str, Tensor], key: str, facts: Mapping[str, str]) -> str:
    return key_of(key, sorted(facts.items()), tensor_digest(tensors))


def plain_data(value: Any) -> Any:
    """The same as JSON and YAML have it: lists for tuples, text for paths.

    Example:
        >>> plain_data({"sizes": (1, 2), "dir": Path("a")})
        {'sizes': [1, 2], 'dir': 'a'}
    """
    if isinstance(value, dict):
        return {key: plain_data(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that :func:`plain_data` wrote, with a tuple for each list, as the classes of settings have them.

    Example:
        >>> tuples({"widths": [8, 16], "name": "certified"})
        {'widths': (8, 16), 'name': 'certified'}
    """
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def is_number(value: object) -> bool:
    """Whether what JSON holds is a finite number: it also has NaN, and integers that no float can hold.

    Example:
        >>> is_number(0.5), is_number(True), is_number(10**400), is_number(float("nan"))
        (True, False, False, False)
    """
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def finite_or_none(value: float) -> float | None:
    """A number as JSON has it: ``None`` for NaN and infinity, which :func:`write_json` refuses.

    Example:
        >>> finite_or_none(0.5), finite_or_none(float("inf"))
        (0.5, None)
    """
    return value if math.isfinite(value) else None


def read_json(path: Path) -> Any:
    """The JSON content of ``path``.

    Raises:
        DynablocksError: the file is missing, cannot be read, is not JSON, or says something twice.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except FileNotFoundError as error:
        raise DynablocksError(f"{path} does not exist; run the command that makes it first.") from error
    except IsADirectoryError as error:
        raise DynablocksError(f"{path} is a folder; name a JSON file in it.") from error
    except OSError as error:
        raise DynablocksError(f"{path} cannot be read ({error.strerror or error}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise DynablocksError(f"{path} cannot be read as JSON ({error}); remove it and make it again.") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; of what stands twice a reader may take the first or the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors: names, types, shapes and bits, in whatever order, layout and place they are.

    Example:
        >>> import torch
        >>> one = tensor_digest({"a": torch.zeros(2), "b": torch.ones(1)})
        >>> one == tensor_digest({"b": torch.ones(1), "a": torch.zeros(2)})
        True
        >>> one == tensor_digest({"b": torch.ones(1), "a": torch.tensor([0.0, -0.0])})
        False
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        # Cloned, since a single entry may be contiguous with a stride that no view as bytes takes.
        tensor = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Try to hold ``path`` for this process; yields whether it was free. The lock ends with the process, however it
    ends, so a dead process never blocks another.

    Raises:
        DynablocksError: the place is not writable.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a")  # noqa: SIM115
    except OSError as error:
        raise DynablocksError(f"cannot write to {path.parent}: {error.strerror or error}; {ROOM}.") from error
    with stream:
        yield _lock(stream.fileno())


@contextlib.contextmanager
def held(path: Path, patience: float = 60.0) -> Iterator[None]:
    """Hold the lock ``path`` for this process, once others that hold it are done.

    Raises:
        DynablocksError: one is not done after ``patience`` seconds, or the place is not writable.
    """
    ends = time.monotonic() + patience
    while True:
        with lock_file(path) as free:
            if free:
                yield
                return
        if time.monotonic() > ends:
            raise DynablocksError(f"another process holds {path} for more than {patience:g} s; end it and try again.")
        time.sleep(0.05)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock ``path``. Nothing is written: the folder may be read-only, or not be there.

    Raises:
        DynablocksError: the lock cannot be read.
    """
    try:
        stream = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DynablocksError(f"cannot read {path}: {error.strerror or error}; make the file readable.") from error
    with stream:
        return not _lock(stream.fileno(), shared=True)


def can_lock(folder: Path) -> bool:
    """Whether files in ``folder``, which is made where it is not there, can be locked: of two that open one, only the
    first may hold it. Windows locks none here, and some network file systems do not either.

    Raises:
        DynablocksError: the place is not writable.
    """
    probe = Path(folder) / f".{secrets.token_hex(8)}.lock"  # a name of its own: another process may ask meanwhile
    with lock_file(probe) as first, lock_file(probe) as second:
        pass
    probe.unlink(missing_ok=True)
    return first and not second


def _lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file unless another lock forbids it; a ``shared`` one goes with others of its kind.

    Network file systems want a file open for writing to lock it exclusively, and for reading to lock it shared.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
