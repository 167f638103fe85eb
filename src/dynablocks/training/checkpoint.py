"""Checkpoints that survive being killed: written whole beside the last one, verified by SHA-256 when read."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dynablocks
from dynablocks.errors import BadCheckpoint, DynablocksError
from dynablocks.files import expanded, flush, flush_directory, lock_file, sha256
from dynablocks.run_files import (
    CHECKPOINT,
    CONFIG,
    DAMAGED_CHECKPOINT,
    LOCK,
    MANIFEST,
    PREVIOUS_CHECKPOINT,
    STATE,
    UNFINISHED_CHECKPOINT,
    WEIGHTS,
)

FORMAT = 1
LOOKS = 3
"""How often to look at checkpoints that a training replaces meanwhile."""
_FILE_FORMAT = {"format": "pt"}
"""What the metadata of stored weights say of the file, as safetensors' own functions write it; all else is of ties."""


def save_checkpoint(directory: str | Path, model: nn.Module, config_text: str, state: Mapping[str, Any]) -> Path:
    """Write ``directory/checkpoint``; the one before becomes ``checkpoint.previous``.

    The files are written and flushed in a temporary folder, then the folders are renamed, so a kill at any instant
    leaves at least one whole checkpoint.

    Args:
        directory: the run directory, which may begin with ``~``; made when missing.
        model: its ``state_dict`` goes to ``model.safetensors``; tied weights are stored once.
        config_text: goes to ``config.yaml`` as it is.
        state: tensors, numbers, strings, lists and dicts only, so that ``torch.load(weights_only=True)`` reads it.

    Returns:
        The path of the checkpoint.

    Raises:
        DynablocksError: the disk is full or the place is not writable; earlier checkpoints are unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     path = save_checkpoint(Path(place), nn.Linear(1, 1), "seed: 0", {"step": 3})
        ...     load_checkpoint(Path(place), nn.Linear(1, 1))["step"]
        3
    """
    from safetensors import SafetensorError

    directory = expanded(directory)
    temporary = directory / f"{UNFINISHED_CHECKPOINT}{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        _write_files(temporary, model, config_text, state)
        _swap_in(directory, temporary)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DynablocksError(
            f"cannot write a checkpoint to {directory}: {reason}; free some space; the same command, without "
            "--overwrite, goes on from the last checkpoint, which is unchanged."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory / CHECKPOINT


def _write_files(folder: Path, model: nn.Module, config_text: str, state: Mapping[str, Any]) -> None:
    _write_weights(folder / WEIGHTS, model)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    (folder / STATE).write_bytes(buffer.getbuffer())
    (folder / CONFIG).write_text(config_text, encoding="utf-8")
    files = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in (WEIGHTS, CONFIG, STATE)
    }
    manifest = {"format": FORMAT, "dynablocks": dynablocks.__version__, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in (*files, MANIFEST):
        _flush(folder / name)
    flush_directory(folder)


def _write_weights(path: Path, model: nn.Module) -> None:
    """Store each tensor once; the metadata maps the other names of a tied one to the stored name.

    ``safetensors.torch.save_model`` does the same but fails on tied weights in channels_last layout (0.8). A tensor
    named ``format`` is stored itself, tied or not: under that name the metadata tell what the file is.
    """
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    first_name: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        may_be_tied = tensor.numel() > 0 and name not in _FILE_FORMAT
        kept = first_name.setdefault(place, name) if may_be_tied else name
        if kept == name:
            stored[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            aliases[name] = kept
    save_file(stored, path, metadata=_FILE_FORMAT | aliases)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        weights = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        said = stream.metadata() or {}
    aliases = {name: kept for name, kept in said.items() if (name, kept) not in _FILE_FORMAT.items()}
    return weights | {name: weights[kept] for name, kept in aliases.items() if kept in weights}


def _swap_in(directory: Path, temporary: Path) -> None:
    newest, previous = directory / CHECKPOINT, directory / PREVIOUS_CHECKPOINT
    if newest.exists():
        _remove(previous)
        newest.rename(previous)
    temporary.rename(newest)
    flush_directory(directory)


def _flush(path: Path) -> None:
    with open(path, "rb+") as stream:
        flush(stream.fileno())


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or ``None`` when every file matches its manifest.

    Raises:
        DynablocksError: a file is there and cannot be read; it may be whole.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"has format {manifest['format']!r}, this version reads format {FORMAT}"
        for name in (WEIGHTS, CONFIG, STATE):
            entry, path = manifest["files"][name], checkpoint / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']!r}"
            if sha256(path) != entry["sha256"]:
                return f"{name} does not match its SHA-256"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        raise _unreadable(checkpoint, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _unreadable(checkpoint: Path, error: OSError) -> DynablocksError:
    """The sentence for a checkpoint that may be whole: disks, networks and permissions come back."""
    older = checkpoint.name == CHECKPOINT and os.path.isdir(checkpoint.parent / PREVIOUS_CHECKPOINT)
    escape = ", or move it away to go on from the one before" if older else ""
    return DynablocksError(
        f"{checkpoint} cannot be read ({error.strerror or error}); nothing was changed: make it readable{escape}."
    )


def _is_there(checkpoint: Path) -> bool:
    # Not exists(): from Python 3.14 on that takes a folder which cannot be looked at for one that is not there.
    try:
        checkpoint.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(checkpoint, error) from error
    return True


def has_checkpoint(directory: Path | None) -> bool:
    """Whether a run directory holds a checkpoint, whole or not."""
    return directory is not None and any(_is_there(directory / name) for name in (CHECKPOINT, PREVIOUS_CHECKPOINT))


def find_checkpoint(directory: str | Path) -> Path | None:
    """The newest whole checkpoint in a run directory; ``None`` when there never was one.

    A broken newest one is passed over for the previous one, with a warning. What a training replaces meanwhile looks
    broken and is looked at again.

    Raises:
        BadCheckpoint: checkpoints are there and none is whole.
        DynablocksError: one cannot be read, and may be whole.

    Example:
        >>> find_checkpoint(Path("no-such-directory")) is None
        True
    """
    directory = expanded(directory)
    for _ in range(LOOKS):
        before = _manifests(directory)
        found, faults = _newest_whole(directory)
        if (found is not None and not faults) or _manifests(directory) == before:
            break
    else:
        if found is None:
            raise BadCheckpoint(f"a training replaces the checkpoints in {directory}; try again, or when it has ended.")
    if found is not None and faults:
        warnings.warn(f"{faults[0]}; the previous checkpoint {found} is used.", UserWarning, stacklevel=2)
    if found is None and faults:
        raise BadCheckpoint(
            f"no whole checkpoint in {directory} ({'; '.join(faults)}); restore it from a copy, "
            "or train again with --overwrite."
        )
    return found


def _newest_whole(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and what is wrong with those passed over."""
    faults: list[str] = []
    for path in (directory / CHECKPOINT, directory / PREVIOUS_CHECKPOINT):
        if _is_there(path):
            fault = what_is_wrong(path)
            if fault is None:
                return path, faults
            faults.append(f"{path}: {fault}")
    return None, faults


def _manifests(directory: Path) -> list[bytes | None]:
    """The manifests as they are now: a checkpoint that was replaced has another one."""
    found: list[bytes | None] = []
    for name in (CHECKPOINT, PREVIOUS_CHECKPOINT):
        try:
            found.append((directory / name / MANIFEST).read_bytes())
        except OSError:
            found.append(None)
    return found


def load_checkpoint(directory: str | Path, model: nn.Module) -> dict[str, Any]:
    """Load the newest whole checkpoint's weights into ``model`` and return the state saved with them.

    Args:
        directory: the run directory, which may begin with ``~``.
        model: built like the saved one; its device and memory layout stay.

    Raises:
        BadCheckpoint: there is no whole checkpoint, or it belongs to another model.
    """
    directory = expanded(directory)
    checkpoint = find_checkpoint(directory)
    if checkpoint is None:
        raise BadCheckpoint(f"{directory} holds no checkpoint; give a directory that dynablocks train --out has made.")
    load_weights(checkpoint, model)
    return read_state(checkpoint)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load ``model.safetensors`` of a checkpoint folder into ``model``.

    Raises:
        BadCheckpoint: names or shapes differ.
    """
    from safetensors import SafetensorError

    try:
        weights = _read_weights(checkpoint / WEIGHTS)
    except (RuntimeError, SafetensorError) as error:
        raise _of_another_model(checkpoint, error) from error
    load_into(model, weights, checkpoint)


def load_into(model: nn.Module, weights: Mapping[str, torch.Tensor], checkpoint: Path) -> None:
    """Load weights that a checkpoint folder holds into ``model``.

    Raises:
        BadCheckpoint: names or shapes differ.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise _of_another_model(checkpoint, error) from error


def _of_another_model(checkpoint: Path, error: Exception) -> BadCheckpoint:
    lines = [line.strip() for line in str(error).splitlines()]
    reason = lines[min(1, len(lines) - 1)][:200].rstrip(".")
    return BadCheckpoint(
        f"the weights in {checkpoint} belong to another model or version ({reason}); build the model they were "
        "saved from, or train again with --overwrite."
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What ``state.pt`` of a checkpoint folder holds, read without unpickling code."""
    import pickle

    try:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unreadable(checkpoint, error) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BadCheckpoint(f"{checkpoint / STATE} cannot be read; train again with --overwrite.") from error
    if not isinstance(state, dict):
        raise BadCheckpoint(f"{checkpoint / STATE} holds no training state; train again with --overwrite.")
    return state


def read_config(checkpoint: Path) -> str:
    """The text of ``config.yaml`` of a checkpoint folder.

    Raises:
        BadCheckpoint: it is no UTF-8.
        DynablocksError: it cannot be read, and may be whole.
    """
    try:
        return (checkpoint / CONFIG).read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(checkpoint, error) from error
    except UnicodeDecodeError as error:
        raise bad_settings(checkpoint / CONFIG, error) from error


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings in ``config.yaml`` of a checkpoint folder.

    Raises:
        BadCheckpoint: there are none, see :func:`parse_settings`.
        DynablocksError: the file cannot be read, and may be whole.
    """
    return parse_settings(read_config(checkpoint), checkpoint / CONFIG)


def parse_settings(text: str, where: Path) -> dict[str, Any]:
    """The settings that a text ``where`` holds, as :func:`dynablocks.training.record.describe_run` writes them.

    Raises:
        BadCheckpoint: it is no YAML, or no mapping; or it has aliases, see :func:`plain_yaml`.
    """
    import yaml

    try:
        content = plain_yaml(text)
        if not isinstance(content, dict):
            raise TypeError("no mapping")
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, yaml.YAMLError) as error:
        # PyYAML ends so, too, where a tag, such as !!bool, does not fit its text, and where all is nested too deep.
        raise bad_settings(where, error) from error
    return content


def plain_yaml(text: str) -> Any:
    """What a YAML text holds, which has no aliases: none are written here, and a few lines of them fill any memory.

    Raises:
        yaml.YAMLError: it is no YAML, or has an alias. PyYAML ends with other errors, too: see :func:`parse_settings`.

    Example:
        >>> plain_yaml("seed: 0")
        {'seed': 0}
    """
    import yaml

    class WithoutAliases(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    return yaml.load(text, Loader=WithoutAliases)


def bad_settings(where: Path, error: Exception) -> BadCheckpoint:
    """The sentence for settings that are not those of a training."""
    return BadCheckpoint(
        f"the settings in {where} cannot be read ({type(error).__name__}); train again with --overwrite."
    )


def tidy(directory: Path, keep: Path | None) -> None:
    """Remove what a killed writer left behind, and set a broken newest checkpoint aside when ``keep`` is the previous.

    What is set aside becomes ``checkpoint.damaged``, the next one ``checkpoint.damaged-2``, and so on. With
    ``keep=None`` every checkpoint goes, and these with it: the start of a new training.

    Raises:
        DynablocksError: a checkpoint cannot be moved.
    """
    directory = Path(directory)
    for leftover in directory.glob(f"{UNFINISHED_CHECKPOINT}*"):
        _discard(leftover)
    try:
        if keep is None and has_checkpoint(directory):
            # The newest last: a kill on the way leaves the training before, and nothing older in its place.
            damaged = *directory.glob(DAMAGED_CHECKPOINT), *directory.glob(f"{DAMAGED_CHECKPOINT}-[0-9]*")
            for place in (*damaged, directory / PREVIOUS_CHECKPOINT, directory / CHECKPOINT):
                _remove(place)
            flush_directory(directory)
        elif keep is not None and keep.name == PREVIOUS_CHECKPOINT and _is_there(directory / CHECKPOINT):
            _set_aside(directory / CHECKPOINT)
            flush_directory(directory)
    except OSError as error:
        raise DynablocksError(
            f"cannot move a checkpoint in {directory}: {error.strerror or error}; make the folder writable, or choose "
            "another --out."
        ) from error


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, if it is there, at once: a kill leaves none in part."""
    if _is_there(checkpoint):
        leftover = checkpoint.parent / f"{UNFINISHED_CHECKPOINT}{uuid.uuid4().hex}"
        checkpoint.rename(leftover)
        _discard(leftover)


def _discard(leftover: Path) -> None:
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            leftover.unlink()


def _set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint: something of it may still be of use to somebody."""
    names = itertools.chain([DAMAGED_CHECKPOINT], (f"{DAMAGED_CHECKPOINT}-{number}" for number in itertools.count(2)))
    places = (checkpoint.parent / name for name in names)
    checkpoint.rename(next(place for place in places if not os.path.lexists(place)))


@contextlib.contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Hold the run directory for one training; the lock ends with the process, however it ends.

    A folder that was made for it goes again where the training was refused before it wrote anything.

    Raises:
        DynablocksError: another process trains there, or the directory is not writable.
    """
    directory = Path(directory)
    lock, new = directory / LOCK, not directory.exists()
    with lock_file(lock) as free:
        if not free:
            raise DynablocksError(f"another training runs in {directory}; wait for it, or choose another --out.")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if new and list(directory.iterdir()) == [lock]:
                    lock.unlink()
                    directory.rmdir()
