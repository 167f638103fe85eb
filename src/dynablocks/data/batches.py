"""The original CIFAR batches: pickled by Python, or binary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dynablocks.data.datasets import ImageDataset
from dynablocks.data.folders import subfolders
from dynablocks.data.restricted_pickle import read_pickled_batch
from dynablocks.errors import BadData

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class BatchLayout:
    """How one data set's original batches are named and filled.

    Args:
        train: names of the training batches, without ``.bin``.
        test: name of the test batch, without ``.bin``.
        label_key: where the labels are in a pickled batch.
        label_bytes: how many label bytes start a row of a binary batch; the last of them is the label.
        marker: a file that the pickled form also has, so that a folder that just has ``train`` is not taken for it.
    """

    train: tuple[str, ...]
    test: str
    label_key: str
    label_bytes: int
    marker: str | None = None


@dataclass(frozen=True)
class BatchFiles:
    """The batch files found in one folder."""

    layout: BatchLayout
    train: tuple[Path, ...]
    test: Path


def find_batches(root: Path, layout: BatchLayout) -> list[BatchFiles]:
    """Every folder at or a little below ``root`` that holds the batches of ``layout``, pickled or binary.

    Raises:
        BadData: a folder has some of the batches but not all.
    """
    return [
        found
        for folder in subfolders(root)
        for suffix in ("", ".bin")
        if (found := _in_folder(folder, layout, suffix)) is not None
    ]


def _in_folder(folder: Path, layout: BatchLayout, suffix: str) -> BatchFiles | None:
    files = [folder / (name + suffix) for name in (*layout.train, layout.test)]
    missing = [file.name for file in files if not file.is_file()]
    unmarked = layout.marker is not None and suffix == "" and not (folder / layout.marker).is_file()
    if len(missing) == len(files) or unmarked:
        return None
    if missing:
        raise BadData(f"{folder} lacks the batch {missing[0]}; unpack the whole original archive there.")
    return BatchFiles(layout, tuple(files[:-1]), files[-1])


def read_batches(found: BatchFiles, name: str, class_names: Sequence[str]) -> tuple[ImageDataset, ImageDataset]:
    """The training and test images of ``found``.

    Raises:
        BadData: a batch is truncated, holds something else, or a label is out of range.
    """
    train, test = (
        _dataset([_read(file, found.layout) for file in files], name, class_names)
        for files in (found.train, (found.test,))
    )
    return train, test


def _dataset(
    batches: Sequence[tuple[NDArray[np.uint8], NDArray[np.int64]]], name: str, class_names: Sequence[str]
) -> ImageDataset:
    pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in batches]))
    labels = torch.from_numpy(np.concatenate([labels for _, labels in batches]))
    return ImageDataset(name, pixels.reshape(-1, *_SHAPE), labels, tuple(class_names))


def _read(file: Path, layout: BatchLayout) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    return _read_binary(file, layout) if file.suffix == ".bin" else _read_pickled(file, layout)


def _read_binary(file: Path, layout: BatchLayout) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    row = layout.label_bytes + _PIXELS
    try:
        content = np.fromfile(file, np.uint8)
    except OSError as error:
        raise BadData(f"{file} cannot be read ({error.strerror or error}); check it and its permissions.") from error
    if not content.size or content.size % row:
        raise BadData(
            f"{file} has {content.size} bytes, not a positive multiple of {row}, the size of a row; fetch it again."
        )
    rows = content.reshape(-1, row)
    return rows[:, layout.label_bytes :], rows[:, layout.label_bytes - 1].astype(np.int64)


def _read_pickled(file: Path, layout: BatchLayout) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = read_pickled_batch(file)
    pixels, labels = content.get("data"), content.get(layout.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise BadData(f"{file} has no uint8 array 'data' of shape (N, {_PIXELS}); fetch the original batches again.")
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    whole = isinstance(labels, list) and all(type(label) is int and abs(label) < 2**31 for label in labels)
    if not isinstance(labels, list) or not whole or len(labels) != len(pixels) or not labels:
        raise BadData(f"{file} has no {layout.label_key!r} of one integer an image; fetch the original batches again.")
    return pixels, np.array(labels, np.int64)
