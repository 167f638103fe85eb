"""Files that are whole or absent: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynablocks.errors import DynablocksError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then flush and rename it; a failure leaves ``path`` as it
    was. Who may read it follows the umask, as for any new file.

    Raises:
        DynablocksError: the disk is full, or the place is not writable.
    """
    from safetensors import SafetensorError

    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unused = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
        os.close(os.open(unused, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        temporary = unused
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
        flush_directory(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DynablocksError(
            f"cannot write {path}: {reason}; free some space or choose another --out; what was there is unchanged."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()


def flush_directory(path: Path) -> None:
    """Make the names in a folder outlive a power cut; Windows opens no folders, and keeps them by itself."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as indented JSON to ``path`` atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write ``tensors`` as safetensors to ``path`` atomically; the SHA-256 of what this process wrote."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = ""

    def write(temporary: Path) -> None:
        nonlocal written
        save_file(plain, temporary)
        written = sha256(temporary)  # of the own file: another process may rename its own into the place of this one

    write_atomically(path, write)
    return written


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


def read_json(path: Path) -> Any:
    """The JSON content of ``path``.

    Raises:
        DynablocksError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DynablocksError(f"{path} does not exist; run the command that makes it first.") from error
    except IsADirectoryError as error:
        raise DynablocksError(f"{path} is a folder; name a JSON file in it.") from error
    except OSError as error:
        raise DynablocksError(f"{path} cannot be read ({error.strerror or error}); check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise DynablocksError(f"{path} cannot be read as JSON ({error}); remove it and make it again.") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
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
        raise DynablocksError(f"cannot write to {path.parent}: {error.strerror}; choose another --out.") from error
    with stream:
        yield _lock(stream.fileno())


def _lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
