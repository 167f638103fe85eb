"""What a run directory says about a training: its settings, compared at a resume, and its metrics, a line an epoch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dynablocks.errors import BadCheckpoint, DynablocksError
from dynablocks.files import flush, write_text
from dynablocks.run_files import HISTORY
from dynablocks.training.checkpoint import parse_settings
from dynablocks.training.config import TrainingConfig

HARMLESS = {"training.max_minutes"} | {
    f"training.{f.name}" for f in fields(TrainingConfig) if not f.metadata.get("result", True)
}
"""Settings that may change between a training and its resume."""


def describe_run(config: TrainingConfig, describe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The settings that decide what a training computes, as YAML.

    Args:
        config: the training's settings.
        describe: whatever else decides, such as the model's name and widths; values that JSON cannot hold become text.
        data: what identifies the training images.
    """
    import yaml

    content = {"training": asdict(config), "model": dict(describe), "data": dict(data)}
    plain = json.loads(json.dumps(content, default=str))
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def check_same_run(stored: str, wanted: str, directory: Path) -> None:
    """Refuse to resume a training under settings that would make it another one.

    ``max_minutes`` may change, and the settings of :class:`TrainingConfig` that say how or where to compute: the result
    stays a valid training of the same network, though bit-identical only when threads, devices and layout stay too.

    Raises:
        BadCheckpoint: another setting differs; the sentence names it. Or the stored ones cannot be read.
    """
    old, new = (_flatten(parse_settings(text, directory)) for text in (stored, wanted))
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    # Checkpoints before December 2026 say nothing of these.
    harmless = {*HARMLESS, *({"data.trained_on", "data.soft_labels"} - old.keys())}
    differing = [name for name in differing if name not in harmless]
    if not differing:
        return
    name = differing[0]
    more = len(differing) - 1
    others = f" ({more} more setting{'s differ' if more > 1 else ' differs'})" if more else ""
    raise BadCheckpoint(
        f"{directory} holds a training with {name} {old.get(name)!r}, this one has {new.get(name)!r}{others}; "
        "choose another --out, or --overwrite to train from the start."
    )


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def append_metrics(directory: Path, metrics: Mapping[str, Any]) -> None:
    """Append one JSON line to ``metrics.jsonl`` and flush it: no checkpoint outlives a power cut without its lines."""
    try:
        with open(directory / HISTORY, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics, allow_nan=False) + "\n")
            stream.flush()
            flush(stream.fileno())
    except OSError as error:
        raise DynablocksError(
            f"cannot write to {directory / HISTORY}: {error.strerror}; free some space; the same command, "
            "without --overwrite, goes on from the last checkpoint."
        ) from error


def cut_metrics(directory: Path, step: int) -> None:
    """Drop the lines of ``metrics.jsonl`` that are beyond ``step`` or broken; the resumed training rewrites them."""
    path = directory / HISTORY
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))
