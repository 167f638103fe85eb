"""Image data sets in the Hugging Face Hub's parquet schema: an image struct {bytes, path} and a label column."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynablocks.data.datasets import ImageDataset
from dynablocks.data.decoding import EncodedImages, copy_name, decode_images
from dynablocks.data.folders import entries, require_no_pipe, subfolders
from dynablocks.errors import BadData

IMAGE_COLUMNS = ("img", "image")
_SPLIT = re.compile(r"(train|test)(?:[-_.].*)?\.parquet", re.IGNORECASE)
_SHARD = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")


@dataclass(frozen=True)
class ParquetFiles:
    """The shards of a training and a test split that lie in one folder, and the columns of the first."""

    folder: Path
    train: tuple[Path, ...]
    test: tuple[Path, ...]
    columns: tuple[str, ...]


def find_parquet(root: Path) -> list[ParquetFiles]:
    """Every folder at or a little below ``root`` with train-*.parquet and test-*.parquet.

    Raises:
        BadData: a split or a shard of it is missing, or a file is no parquet.
    """
    return [
        found
        for folder in subfolders(root)
        if (found := _group(folder, [e for e in entries(folder) if e.suffix == ".parquet"])) is not None
    ]


def _group(folder: Path, files: Sequence[Path]) -> ParquetFiles | None:
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        match = _SPLIT.fullmatch(file.name)
        if match:
            splits[match[1].lower()].append(file)
    if not splits:
        return None
    for split in ("train", "test"):
        if not splits[split]:
            raise BadData(
                f"{folder} has parquet files but no {split}-*.parquet; put the {split} split beside the others."
            )
        _require_all_shards(splits[split])
    columns = tuple(_open(splits["train"][0]).schema_arrow.names)
    return ParquetFiles(folder, tuple(splits["train"]), tuple(splits["test"]), columns)


def _require_all_shards(files: Sequence[Path]) -> None:
    shards = [match for file in files if (match := _SHARD.search(file.name))]
    totals = {int(shard[2]) for shard in shards}
    others = len(files) - len(shards)
    repeated = len({int(shard[1]) for shard in shards}) < len(shards)
    if len(totals) > 1 or repeated or (others and len(files) > 1):
        raise BadData(
            f"{files[0].parent} holds {files[0].name} and {files[-1].name}, copies that overlap: images would count "
            "twice; leave one complete set of shards there."
        )
    if not shards:
        return
    total = max(totals)
    missing = sorted(set(range(total)) - {int(shard[1]) for shard in shards})
    if missing:
        raise BadData(f"{files[0].parent} lacks shard {missing[0]} of the {total} of {files[0].name}; fetch the rest.")


def read_parquet(
    found: ParquetFiles, name: str, label_column: str, class_names: Sequence[str]
) -> tuple[ImageDataset, ImageDataset]:
    """The training and test images of ``found``, as RGB.

    Class names come from the files' schema metadata when there are as many as in ``class_names``.

    Raises:
        BadData: a file is truncated, a column is missing or of another type, or an image or label cannot be used.
    """
    names = _class_names(found.train[0], label_column, tuple(class_names))
    parts, formats = [], set[str]()
    for files in (found.train, found.test):
        read = [_read_file(file, label_column) for file in files]
        contents = [content for part, _ in read for content in part]
        origin = files[0].name if len(files) == 1 else f"{files[0].name} and its {len(files) - 1} further shards"
        if not contents:
            raise BadData(f"{files[0]} has no rows; fetch the data again.")
        images, met = decode_images(EncodedImages(contents, origin), channels=3)
        formats |= met
        parts.append((images, torch.tensor([label for _, part in read for label in part], dtype=torch.int64)))
    marked = copy_name(name, formats)
    train, test = (ImageDataset(marked, images, labels, names) for images, labels in parts)
    return train, test


def _open(file: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        require_no_pipe(file)
        opened = ParquetFile(file)
        _ = opened.schema_arrow.names  # bytes become text only when they are asked for
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise _unreadable(file, error) from error
    return opened


def _unreadable(file: Path, error: Exception) -> BadData:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return BadData(f"{file} is truncated or no parquet file ({reason.rstrip('.')}); fetch it again.")


def _read_file(file: Path, label_column: str) -> tuple[list[bytes], list[int]]:
    import pyarrow
    from pyarrow import compute, types

    opened = _open(file)
    schema = opened.schema_arrow
    image_column = next((column for column in IMAGE_COLUMNS if column in schema.names), None)
    if image_column is None or label_column not in schema.names:
        raise BadData(
            f"{file} has the columns {', '.join(schema.names)}; an image column ({' or '.join(IMAGE_COLUMNS)}) and "
            f"{label_column} are needed."
        )
    kind = schema.field(image_column).type
    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise BadData(f"the column {image_column} of {file} is {kind}; a struct with the field bytes is needed.")
    if not types.is_integer(schema.field(label_column).type):
        raise BadData(f"the column {label_column} of {file} is {schema.field(label_column).type}; integers are needed.")
    try:
        table = opened.read([image_column, label_column])
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise _unreadable(file, error) from error
    contents = compute.struct_field(table[image_column], "bytes")
    if contents.null_count or table[label_column].null_count:
        raise BadData(f"{file} has rows without image bytes or without a label; fetch it with the images embedded.")
    labels = table[label_column].to_pylist()
    if any(abs(label) >= 2**31 for label in labels):
        raise BadData(f"{file} has the label {max(labels, key=abs)}; class numbers are needed.")
    return contents.to_pylist(), labels


def stored_class_names(file: Path, label_column: str) -> tuple[str, ...] | None:
    """The names of the classes that the file itself gives, as files of the Hub do."""
    try:
        about = json.loads((_open(file).schema_arrow.metadata or {})[b"huggingface"])
        names = about["info"]["features"][label_column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _class_names(file: Path, label_column: str, default: tuple[str, ...]) -> tuple[str, ...]:
    names = stored_class_names(file, label_column)
    return names if names is not None and len(names) == len(set(names)) == len(default) else default
