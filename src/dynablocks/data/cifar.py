"""CIFAR-10 and CIFAR-100 from whatever copy is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dynablocks.data.batches import BatchLayout, find_batches, read_batches
from dynablocks.data.cache import cached
from dynablocks.data.class_names import CIFAR10_CLASSES, CIFAR100_CLASSES
from dynablocks.data.datasets import ImageDataset
from dynablocks.data.folders import (
    ClassFolders,
    has_class_folders,
    list_class_folders,
    read_class_folders,
    require_folder,
    subfolders,
)
from dynablocks.data.hub import fetch_parquet
from dynablocks.data.parquet import find_parquet, read_parquet, stored_class_names
from dynablocks.errors import BadData
from dynablocks.progress import tell

_SHAPE = (3, 32, 32)
_FULL_SIZE = (50_000, 10_000)


@dataclass(frozen=True)
class Cifar:
    """What tells CIFAR-10 and CIFAR-100 apart."""

    name: str
    title: str
    label_column: str
    class_names: tuple[str, ...]
    repository: str
    batches: BatchLayout

    @property
    def three_ways(self) -> str:
        """How to get a copy."""
        archive = f"{self.title.lower()}-python.tar.gz"
        return (
            f"run once with a network so that the Hub's copy {self.repository} is fetched, or give --data-dir a folder "
            f"with its parquet files or the unpacked https://www.cs.toronto.edu/~kriz/{archive}, or give --data-dir a "
            "folder of images train/<class>/*.png and test/<class>/*.png"
        )


CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    label_column="label",
    class_names=CIFAR10_CLASSES,
    repository="uoft-cs/cifar10",
    batches=BatchLayout(tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "labels", label_bytes=1),
)
CIFAR100 = Cifar(
    name="cifar100",
    title="CIFAR-100",
    label_column="fine_label",
    class_names=CIFAR100_CLASSES,
    repository="uoft-cs/cifar100",
    batches=BatchLayout(("train",), "test", "fine_labels", label_bytes=2, marker="meta"),
)


@dataclass(frozen=True)
class Copy:
    """One copy found on disk: where it is, the files it stands on, and how to read it."""

    place: Path
    files: Sequence[Path]
    read: Callable[[], tuple[ImageDataset, ImageDataset]]


def find_copy(cifar: Cifar, root: Path) -> Copy | None:
    """The copy of ``cifar`` at or at most two folders below ``root``, or None.

    Looked for in this order: Hub-schema parquet, the original batches (pickled or binary), class folders.

    Raises:
        BadData: a copy is incomplete or unreadable, or there are several of one kind.
    """
    for find in (_parquet_copies, _batch_copies, _folder_copies):
        copies = find(cifar, root)
        if len(copies) > 1:
            raise BadData(
                f"{root} holds {len(copies)} copies of {cifar.title}, in {copies[0].place} and {copies[1].place}; "
                "give --data-dir the folder of one of them."
            )
        if copies:
            return copies[0]
    return None


def _parquet_copies(cifar: Cifar, root: Path) -> list[Copy]:
    return [
        Copy(
            found.folder,
            (*found.train, *found.test),
            partial(read_parquet, found, cifar.name, cifar.label_column, cifar.class_names),
        )
        for found in find_parquet(root)
        if cifar.label_column in found.columns
    ]


def foreign_classes(cifar: Cifar, root: Path) -> tuple[str, ...] | None:
    """The classes that a parquet copy names itself, where most are not those of ``cifar``: it holds something else.

    Copies of the Hub spell single classes in their own way.
    """
    for found in find_parquet(root):
        if cifar.label_column in found.columns:
            names = stored_class_names(found.train[0], cifar.label_column)
            if names is not None and 2 * len(set(names) & set(cifar.class_names)) < len(cifar.class_names):
                return names
    return None


def _batch_copies(cifar: Cifar, root: Path) -> list[Copy]:
    return [
        Copy(
            found.test.parent,
            (*found.train, found.test),
            partial(read_batches, found, cifar.name, cifar.class_names),
        )
        for found in find_batches(root, cifar.batches)
    ]


def _folder_copies(cifar: Cifar, root: Path) -> list[Copy]:
    listed = [list_class_folders(folder) for folder in subfolders(root) if has_class_folders(folder)]
    return [
        Copy(found.root, found.files, partial(read_class_folders, found, cifar.name, cifar.class_names, channels=3))
        for found in listed
        if _are_classes_of(cifar, found)
    ]


def _are_classes_of(cifar: Cifar, listed: ClassFolders) -> bool:
    return set(listed.train) == set(cifar.class_names)


def load_cifar(cifar: Cifar, data_dir: str | Path | None) -> tuple[ImageDataset, ImageDataset, str]:
    """The training and test images of ``cifar`` and their fingerprint.

    Args:
        data_dir: where a copy is; None takes the Hub's.

    Raises:
        BadData: there is no copy, or it cannot be used.
    """
    root = _hub_copy(cifar) if data_dir is None else require_folder(data_dir)
    copy = find_copy(cifar, root)
    if copy is None:
        raise BadData(f"{root} holds no {cifar.title}{_what_else(root)}: {cifar.three_ways}.")
    train, test, digest = cached(cifar.name, root, copy.files, copy.read)
    for part in (train, test):
        if part.image_shape != _SHAPE:
            raise BadData(
                f"the images in {copy.place} have shape {part.image_shape}; {cifar.title} has {_SHAPE}. Resize them, "
                "or take them as your own images with --data folder."
            )
    if (len(train), len(test)) != _FULL_SIZE:
        tell(
            f"note: the copy in {copy.place} has {len(train):,} training and {len(test):,} test images; "
            f"{cifar.title} has {_FULL_SIZE[0]:,} and {_FULL_SIZE[1]:,}."
        )
    return train, test, digest


def _hub_copy(cifar: Cifar) -> Path:
    try:
        return fetch_parquet(cifar.repository)
    except BadData as error:
        raise BadData(f"{cifar.title} is not at hand ({error}): {cifar.three_ways}.") from error


def _what_else(root: Path) -> str:
    columns = [f"the columns {', '.join(found.columns)}" for found in find_parquet(root)]
    return f" (its parquet files have {columns[0]})" if columns else ""
