"""Decoded images kept between runs: one safetensors file a data folder, checked before use, never trusted."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from dynablocks.data.datasets import ImageDataset, fingerprint
from dynablocks.data.folders import require_no_pipe
from dynablocks.errors import BadData, DynablocksError, InvalidArgument
from dynablocks.files import expanded, resolved, sha256, write_atomically
from dynablocks.progress import tell, track

_VERSION = "3"
"""Another one wherever the same files give other tensors than before, or are refused."""
Splits = tuple[ImageDataset, ImageDataset]


def cache_folder() -> Path | None:
    """Where decoded data is kept: $DYNABLOCKS_CACHE, or dynablocks under $XDG_CACHE_HOME, or ~/.cache/dynablocks.

    Returns:
        ``None`` where none of them is set and this user has no home folder, as in some containers.

    Raises:
        InvalidArgument: $DYNABLOCKS_CACHE begins with the home folder of nobody.
    """
    chosen = os.environ.get("DYNABLOCKS_CACHE")
    if chosen:
        return expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "dynablocks"
    try:
        return expanded("~") / ".cache" / "dynablocks"
    except InvalidArgument:
        return None


def cached(
    name: str, root: Path, files: Sequence[Path], read: Callable[[], Splits]
) -> tuple[ImageDataset, ImageDataset, str]:
    """What ``read`` gives and its fingerprint, from the cache when the files are unchanged.

    A folder and name own one cache file. It is used only when the names, sizes, modification times and SHA-256 of
    ``files`` are those it was made from and its content has the fingerprint it was written with; otherwise it is
    rebuilt. A cache that cannot be written, or has no place, is skipped with a note on stderr.

    Raises:
        BadData: a file cannot be read, or what ``read`` raises.
    """
    key = _key(root, files)
    slot = hashlib.sha256(os.fsencode(f"{name}\0{resolved(root)}")).hexdigest()[:16]
    folder = cache_folder()
    path = None if folder is None else folder / f"{name}-{slot}.safetensors"
    found = None if path is None else _load(path, key)
    if found is not None:
        return found
    train, test = read()
    digest = fingerprint(train, test)
    if path is None:
        _tell_skipped("no home folder is known")
    else:
        _save(path, key, digest, train, test)
    return train, test, digest


def _tell_skipped(reason: str) -> None:
    tell(f"note: {reason}, so the images are decoded again next time; set DYNABLOCKS_CACHE to a writable folder.")


def _key(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(_VERSION.encode())
    for file in track(files, "checking files", len(files)):
        try:
            require_no_pipe(file)
            status = file.stat()
            line = [str(file.relative_to(root)), status.st_size, status.st_mtime_ns, sha256(file)]
        except OSError as error:
            raise BadData(
                f"{file} cannot be read ({error.strerror or error}); check it and its permissions."
            ) from error
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _load(path: Path, key: str) -> tuple[ImageDataset, ImageDataset, str] | None:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            about = stored.metadata() or {}
            if about.get("key") != key:
                return None
            tensors = {entry: stored.get_tensor(entry) for entry in stored.keys()}  # noqa: SIM118
        names = tuple(json.loads(about["class_names"]))
        train = ImageDataset(about["name"], tensors["train_images"], tensors["train_labels"], names)
        test = ImageDataset(about["name"], tensors["test_images"], tensors["test_labels"], names)
    except Exception:
        # Whatever is wrong with a cache, the remedy is the same and costs seconds.
        return None
    return (train, test, about["fingerprint"]) if fingerprint(train, test) == about.get("fingerprint") else None


def _save(path: Path, key: str, digest: str, train: ImageDataset, test: ImageDataset) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {
        "train_images": train.images.contiguous(),
        "train_labels": train.labels.contiguous(),
        "test_images": test.images.contiguous(),
        "test_labels": test.labels.contiguous(),
    }
    about = {"key": key, "fingerprint": digest, "name": train.name, "class_names": json.dumps(train.class_names)}
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=about))
    except (DynablocksError, SafetensorError, OSError):
        _tell_skipped(f"{path.parent} cannot be written")
