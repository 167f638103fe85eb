"""Data folders: searching them a little way down, and images laid out as train/<class>/ and test/<class>/."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dynablocks.data.datasets import ImageDataset
from dynablocks.data.decoding import EncodedImages, copy_name, decode_images
from dynablocks.errors import BadData
from dynablocks.files import expanded
from dynablocks.progress import tell
from dynablocks.seeding import seeded_generator

SEARCH_DEPTH = 2
_TEST_ORDER_STREAM = 0x544553
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp"})


def require_folder(data_dir: str | Path) -> Path:
    """``data_dir`` when it is a folder with something in it, otherwise :class:`BadData`.

    Raises:
        BadData: as said.
        InvalidArgument: it begins with the home folder of nobody.
    """
    folder = expanded(data_dir)
    if not folder.exists():
        raise BadData(f"the data folder {folder} does not exist; check --data-dir.")
    if not folder.is_dir():
        raise BadData(f"the data folder {folder} is a file; give --data-dir the folder that holds it.")
    if not entries(folder):
        raise BadData(f"the data folder {folder} is empty; put the data there or choose another --data-dir.")
    return folder


def entries(folder: Path) -> list[Path]:
    """What is in ``folder``, sorted by name, hidden names left out; :class:`BadData` when it cannot be listed."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise BadData(f"{folder} cannot be listed ({error.strerror or error}); check its permissions.") from error


def require_no_pipe(file: Path) -> None:
    """Refuse what only looks like a file among those of a data set: to open a pipe waits for its writer.

    Raises:
        BadData: ``file`` is a pipe or a device.
    """
    if not file.is_file() and not file.is_dir() and file.exists():
        raise BadData(f"{file} is a pipe or a device; put a file with what it gives in its place, or remove it.")


def subfolders(folder: Path, depth: int = SEARCH_DEPTH) -> list[Path]:
    """``folder`` and the folders at most ``depth`` levels below it, nearest first.

    Those below that this user may not read are left out: a mounted disk has such a lost+found.
    """
    level, found = [folder], [folder]
    for _ in range(depth):
        level = [entry for parent in level for entry in entries(parent) if entry.is_dir() and _is_readable(entry)]
        found.extend(level)
    return found


def _is_readable(folder: Path) -> bool:
    """Whether a folder can be listed, and what is in it be looked at."""
    try:
        os.scandir(folder).close()
    except OSError:
        return False
    return os.access(folder, os.X_OK)


@dataclass(frozen=True)
class ClassFolders:
    """The image files of a class-folder data set.

    Args:
        root: the folder that holds ``train`` and ``test``.
        train: training files by class name.
        test: test files by class name, each a class of ``train``.
    """

    root: Path
    train: dict[str, list[Path]]
    test: dict[str, list[Path]]

    @property
    def files(self) -> list[Path]:
        """Every image file."""
        return [file for part in (self.train, self.test) for group in part.values() for file in group]


def has_class_folders(root: Path) -> bool:
    """Whether ``root`` has both train/ and test/ with folders in them."""
    return all((root / part).is_dir() and any(e.is_dir() for e in entries(root / part)) for part in ("train", "test"))


def list_class_folders(root: Path) -> ClassFolders:
    """The images under ``root``/train/<class> and ``root``/test/<class>.

    Raises:
        BadData: a part is missing, a class folder has no images, or test has a class that train lacks.
    """
    train, test = _list_part(root / "train"), _list_part(root / "test")
    extra = sorted(set(test) - set(train))
    if extra:
        raise BadData(f"{root / 'test'} has the class {extra[0]!r}, which {root / 'train'} lacks; both must agree.")
    return ClassFolders(root, train, test)


def _list_part(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise BadData(
            f"the folder {folder} is missing; class-folder data is train/<class>/*.png and test/<class>/*.png."
        )
    found = {entry.name: entries(entry) for entry in entries(folder) if entry.is_dir()}
    part = {name: [file for file in inside if _is_image(file)] for name, inside in found.items()}
    if not part:
        raise BadData(f"{folder} has no class folders; it needs one folder of images a class.")
    for name, files in part.items():
        if not files:
            raise BadData(
                f"the class folder {folder / name} has no images (png, jpg, bmp, ppm or webp); add or remove it."
            )
    _tell_unread(folder, found)
    return part


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES


def _tell_unread(folder: Path, found: dict[str, list[Path]]) -> None:
    """Say what of the class folders is left out: a set whose better part is .tif would train on the rest."""
    inside = [entry for group in found.values() for entry in group]
    unread = [entry for entry in inside if not _is_image(entry)]
    if unread:
        _tell_once(
            f"note: {len(unread)} of {len(inside)} entries of the class folders in {folder} are not read, the first is "
            f"{unread[0].relative_to(folder)}; images end in png, jpg, jpeg, bmp, ppm, pgm or webp."
        )


@functools.cache
def _tell_once(sentence: str) -> None:
    """Told once a process: a command lists a folder whenever it looks what is in it and for each of its steps."""
    tell(sentence)


def read_class_folders(
    listed: ClassFolders, name: str, class_names: Sequence[str], channels: int | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """The training and test images of ``listed``; labels are positions in ``class_names``.

    The training images come class after class, the test images in a random order that depends on their number alone: an
    attack of the first of them meets the classes in their proportion.

    The name is marked by :func:`copy_name` unless it is that of a user's own folder, where the files are the original.

    Raises:
        BadData: an image cannot be used, or a size or class differs.
    """
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    parts, formats = [], set[str]()
    for part, groups in (("train", listed.train), ("test", listed.test)):
        files = [file for group in groups.values() for file in group]
        labels = torch.tensor([label_of[class_name] for class_name, group in groups.items() for _ in group])
        images, met = decode_images(EncodedImages(files, str(listed.root / part)), channels)
        if part == "test":
            order = torch.randperm(len(files), generator=seeded_generator(_TEST_ORDER_STREAM, len(files)))
            images, labels = images[order], labels[order]
        formats |= met
        parts.append((images, labels))
    most = max(images.shape[1] for images, _ in parts)
    marked = name if name == "folder" else copy_name(name, formats)
    train, test = (
        ImageDataset(marked, images.expand(-1, most, -1, -1).contiguous(), labels, tuple(class_names))
        for images, labels in parts
    )
    return train, test


def read_folder_dataset(listed: ClassFolders) -> tuple[ImageDataset, ImageDataset]:
    """A user's own class folders as the data set ``folder``; the classes are the training folders in sorted order.

    Raises:
        BadData: there are fewer than two classes, or an image cannot be used.
    """
    if len(listed.train) < 2:
        raise BadData(
            f"{listed.root / 'train'} has the one class {next(iter(listed.train))!r}; two or more are needed, each "
            "in a folder."
        )
    return read_class_folders(listed, "folder", sorted(listed.train))
