"""Image data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dynablocks.data.cache import cached
from dynablocks.data.cifar import CIFAR10, CIFAR100, Copy, find_copy, foreign_classes, load_cifar
from dynablocks.data.datasets import ImageDataset, fingerprint
from dynablocks.data.digits import load_digits
from dynablocks.data.folders import has_class_folders, list_class_folders, read_folder_dataset, require_folder
from dynablocks.data.splits import DataSplits, hold_out, require_validation
from dynablocks.errors import BadData, InvalidArgument
from dynablocks.registry import Registry

Loader = Callable[["Path | None"], tuple[ImageDataset, ImageDataset, str]]
DATASETS: Registry[Loader] = Registry("data set")


@DATASETS.register("digits")
def _digits(data_dir: Path | None) -> tuple[ImageDataset, ImageDataset, str]:
    if data_dir is not None:
        raise InvalidArgument(
            f"digits is built in, but --data-dir is {data_dir}; leave it out or choose another data set."
        )
    train, test = load_digits()
    return train, test, fingerprint(train, test)


@DATASETS.register("cifar10")
def _cifar10(data_dir: Path | None) -> tuple[ImageDataset, ImageDataset, str]:
    return load_cifar(CIFAR10, data_dir)


@DATASETS.register("cifar100")
def _cifar100(data_dir: Path | None) -> tuple[ImageDataset, ImageDataset, str]:
    return load_cifar(CIFAR100, data_dir)


@DATASETS.register("folder")
def _folder(data_dir: Path | None) -> tuple[ImageDataset, ImageDataset, str]:
    if data_dir is None:
        raise InvalidArgument(
            "the data set folder needs --data-dir, a folder with train/<class>/*.png and test/<class>/*.png."
        )
    root = require_folder(data_dir)
    listed = list_class_folders(root)
    return cached("folder", root, listed.files, lambda: read_folder_dataset(listed))


def load_data(name: str, data_dir: str | Path | None = None, validation: int = 0, seed: int = 0) -> DataSplits:
    """The data set ``name``, split into training, validation and test images.

    Args:
        name: ``digits`` (built in), ``cifar10``, ``cifar100`` or ``folder`` (your train/<class>/, test/<class>/).
            The loaded parts may carry a more exact name: ``cifar10-jpeg`` is a copy of CIFAR-10 that went through JPEG.
        data_dir: where the copy is: Hub-schema parquet, the original batches or class folders, at most two folders
            down. None takes the Hub's copy, which stays in its cache.
        validation: how many training images to hold out, see :func:`hold_out`; the test images are never touched.
        seed: decides which ones; nothing else depends on it.

    Raises:
        InvalidArgument: an unknown name, or an argument out of range.
        BadData: there is no copy, or it cannot be used.

    Example:
        >>> splits = load_data("digits", validation=100)
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (1338, 100, 359)
    """
    load = DATASETS.get_known(name)
    require_validation(validation)
    train, test, digest = load(None if data_dir is None else Path(data_dir))
    return hold_out(train, test, validation, seed, digest)


def infer_name(data_dir: str | Path) -> str:
    """Which of ``cifar10``, ``cifar100`` and ``folder`` lies in ``data_dir``.

    Raises:
        BadData: none of them, both CIFARs, or a copy that cannot be used.
    """
    root = require_folder(data_dir)
    found: dict[str, Copy] = {}
    for cifar in (CIFAR10, CIFAR100):
        copy = find_copy(cifar, root)
        if copy is not None:
            found[cifar.name] = copy
            foreign = foreign_classes(cifar, root)
            if foreign is not None:
                raise BadData(
                    f"{copy.place} has parquet files with the classes {', '.join(foreign[:3])}, …, which is not "
                    f"{cifar.title}; give your own images as class folders, or --data {cifar.name} to take them for it."
                )
    if len(found) > 1:
        raise BadData(f"{root} holds both CIFAR-10 and CIFAR-100; choose one with --data.")
    if found:
        return next(iter(found))
    if has_class_folders(root):
        return "folder"
    raise BadData(
        f"{root} holds no data set that is known here; needed are Hub-schema parquet files (train-*.parquet, "
        "test-*.parquet), the original CIFAR batches, or class folders train/<class>/*.png and test/<class>/*.png."
    )
