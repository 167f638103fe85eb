"""Folders of data, of the Hub and of the cache: those that cannot be read, are full, or have no place."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from dynablocks.data import infer_name, load_data
from dynablocks.data.cache import cache_folder
from dynablocks.data.folders import entries, list_class_folders, read_folder_dataset, subfolders
from dynablocks.data.hub import fetch_parquet
from dynablocks.errors import BadData, InvalidArgument


@pytest.fixture
def _locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders called lost+found are root's: for root itself nothing is locked, so the system is not asked."""
    for name in ("listdir", "scandir"):
        call = getattr(os, name)

        def guarded(path: Any = ".", call: Any = call) -> Any:
            if isinstance(path, (str, os.PathLike)) and Path(path).name == "lost+found":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path)

        monkeypatch.setattr(os, name, guarded)


@pytest.mark.usefixtures("_locked")
def test_a_folder_below_that_cannot_be_listed_is_left_out(tmp_path: Path) -> None:
    for name in ("lost+found", "a/lost+found/deep", "a/b/c"):
        (tmp_path / name).mkdir(parents=True)
    assert subfolders(tmp_path) == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    with pytest.raises(BadData, match=r"lost\+found cannot be listed \(Permission denied\); check its permissions"):
        entries(tmp_path / "lost+found")
    with pytest.raises(BadData, match="cannot be listed"):
        subfolders(tmp_path / "lost+found")


def test_a_folder_below_that_cannot_be_entered_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shut/deep", "open/deep"):
        (tmp_path / name).mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "shut" and access(path, mode))
    assert subfolders(tmp_path) == [tmp_path, tmp_path / "open", tmp_path / "open" / "deep"]


@pytest.mark.usefixtures("_locked")
def test_images_on_a_mounted_disk_are_found(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    (root / "lost+found").mkdir()
    assert infer_name(root) == "folder"


def image_folder(root: Path) -> Path:
    """Two classes of one image each."""
    for part in ("train", "test"):
        for shade, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            Image.new("L", (4, 4), shade).save(root / part / name / "0.png")
    return root


def test_what_is_not_read_of_class_folders_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path)
    for number in range(9):
        (root / "train" / "cat" / f"{number}.tif").touch()
    (root / "train" / "dog" / "more").mkdir()
    for _ in range(2):
        assert len(list_class_folders(root).files) == 4
    assert capsys.readouterr().err == (
        f"note: 10 of 12 entries of the class folders in {root / 'train'} are not read, the first is "
        f"{Path('cat', '0.tif')}; images end in png, jpg, jpeg, bmp, ppm, pgm or webp.\n"
    )


@pytest.mark.parametrize("name", ["train/cat/1.png", "test/dog/1.png", "train-00000-of-00001.parquet"])
def test_a_pipe_among_the_files_is_refused_before_it_is_opened(name: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    if name.endswith(".parquet"):
        (root / "test.parquet").touch()
    os.mkfifo(root / name)
    with pytest.raises(BadData, match=rf"{re.escape(name)} is a pipe or a device; put a file with what it gives in"):
        load_data(infer_name(root), root)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ECONNREFUSED])
def test_a_disk_without_room_is_no_network_without_a_copy(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(*_: Any, **__: Any) -> str:
        raise OSError(number, os.strerror(number))

    def nothing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("no snapshot")

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="train-00000-of-00001.parquet")])
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    with pytest.raises(BadData) as caught:
        fetch_parquet("uoft-cs/cifar10")
    if number == errno.ECONNREFUSED:
        assert str(caught.value) == "the Hub's uoft-cs/cifar10 could not be fetched: ConnectionRefusedError"
    else:
        room = "free space, or set HF_HOME to another place"
        assert str(caught.value) == f"the Hub's uoft-cs/cifar10 could not be stored: {os.strerror(number)}; {room}"


@pytest.fixture
def _homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without HOME and without an entry in the list of users, as a container has."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "DYNABLOCKS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", nobody)


@pytest.mark.usefixtures("_homeless")
def test_without_a_home_folder_the_cache_is_skipped_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = image_folder(tmp_path / "data")
    assert cache_folder() is None
    for _ in range(2):
        assert torch.equal(load_data("folder", root).train.labels, torch.tensor([0, 1]))
    said = capsys.readouterr().err
    note = "note: no home folder is known, so the images are decoded again next time; set DYNABLOCKS_CACHE to"
    assert said.count(note) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.usefixtures("_homeless")
def test_a_cache_that_is_named_needs_no_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dynablocks"
    monkeypatch.setenv("DYNABLOCKS_CACHE", "here")
    assert cache_folder() == Path("here")
    monkeypatch.setenv("DYNABLOCKS_CACHE", "~/cache")
    with pytest.raises(InvalidArgument, match="home folder that is not known"):
        cache_folder()


def test_the_first_test_images_of_class_folders_are_of_every_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four classes of 50 images; the shade of an image is its number, so 0 to 49 are of the first class."""
    for number in range(200):
        for part in ("train", "test"):
            folder = tmp_path / part / "abcd"[number // 50]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (2, 2), number).save(folder / f"{number:03}.png")
    train, test = read_folder_dataset(list_class_folders(tmp_path))
    assert set(test.labels[:40].tolist()) == {0, 1, 2, 3}
    numbers = test.images[:, 0, 0, 0].long()
    assert torch.equal(numbers.sort().values, torch.arange(200))
    assert torch.equal(test.labels, numbers // 50)
    assert torch.equal(train.images[:, 0, 0, 0].long(), torch.arange(200))

    iterdir = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: reversed(list(iterdir(folder))))
    _, again = read_folder_dataset(list_class_folders(tmp_path))
    assert torch.equal(again.images, test.images)
    assert torch.equal(again.labels, test.labels)
