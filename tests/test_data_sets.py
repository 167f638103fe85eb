"""Every format of every data set on small schema-true samples, the cache, and one sentence for each bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dynablocks.data import ImageDataset, fingerprint, hold_out, infer_name, load_data
from dynablocks.data.class_names import CIFAR10_CLASSES, CIFAR100_CLASSES
from dynablocks.data.decoding import EncodedImages, decode_images
from dynablocks.errors import BadData, InvalidArgument

REAL_COPY = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
NAMES = {"cifar10": CIFAR10_CLASSES, "cifar100": CIFAR100_CLASSES}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNABLOCKS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _pixels(count: int, seed: int = 0, size: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def _encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def _labels(name: str, count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + 100).integers(0, len(NAMES[name]), count).tolist()


def _write_parquet(
    path: Path,
    contents: list[bytes | None],
    labels: list[Any],
    name: str = "cifar10",
    image_column: str = "img",
    class_names: list[str] | None = None,
) -> None:
    rows: dict[str, Any] = {
        image_column: pa.array(
            [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    }
    column = "label" if name == "cifar10" else "fine_label"
    rows[column] = labels
    if name == "cifar100":
        rows["coarse_label"] = [label // 5 for label in labels]
    table = pa.table(rows)
    if class_names:
        about = {"info": {"features": {column: {"names": class_names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _parquet_copy(root: Path, name: str = "cifar10", kind: str = "PNG", **options: Any) -> Path:
    for split, count, seed in (("train", 12, 0), ("test", 6, 1)):
        contents = [_encode(p, kind) for p in _pixels(count, seed)]
        _write_parquet(root / f"{split}-00000-of-00001.parquet", contents, _labels(name, count, seed), name, **options)
    return root


def _pickled_copy(root: Path, name: str, protocol: int = 2, keys: type = bytes) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    files = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "cifar100": ["train", "test"]}[name]
    label_key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    for seed, file in enumerate(files):
        rows = _pixels(4, seed).transpose(0, 3, 1, 2).reshape(4, -1)
        content = {
            "data": rows,
            label_key: _labels(name, 4, seed),
            "batch_label": b"batch",
            "filenames": [b"a.png"] * 4,
        }
        if keys is bytes:
            content = {key.encode(): value for key, value in content.items()}
        (root / file).write_bytes(pickle.dumps(content, protocol))
    (root / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps({b"label_names": []}, 2))
    return root


def _binary_copy(root: Path, name: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    files = {"cifar10": [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"], "cifar100": ["train", "test"]}[name]
    for seed, file in enumerate(files):
        labels = np.array(_labels(name, 4, seed), np.uint8)[:, None]
        coarse = [labels // 5] if name == "cifar100" else []
        rows = np.concatenate([*coarse, labels, _pixels(4, seed).transpose(0, 3, 1, 2).reshape(4, -1)], axis=1)
        (root / f"{file}.bin").write_bytes(rows.astype(np.uint8).tobytes())
    return root


def _folder_copy(root: Path, classes: tuple[str, ...], kind: str = "png", size: int = 32, grey: bool = False) -> Path:
    for part, seed in (("train", 0), ("test", 1)):
        for label, class_name in enumerate(classes):
            folder = root / part / class_name
            folder.mkdir(parents=True)
            for i, pixels in enumerate(_pixels(2, seed * 1000 + label, size)):
                Image.fromarray(pixels[:, :, 0] if grey else pixels).save(folder / f"{i}.{kind}")
    return root


def _nchw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("depth", ["", "plain_text", "hub/plain_text"])
def test_parquet_round_trip(tmp_path: Path, name: str, depth: str) -> None:
    _parquet_copy(tmp_path / depth, name)
    splits = load_data(name, tmp_path)
    assert splits.train.name == splits.test.name == name
    assert torch.equal(splits.train.images, _nchw(_pixels(12, 0)))
    assert torch.equal(splits.test.images, _nchw(_pixels(6, 1)))
    assert splits.train.labels.tolist() == _labels(name, 12, 0)
    assert splits.train.class_names == NAMES[name]
    assert splits.validation is None
    assert infer_name(tmp_path) == name


def test_jpeg_bytes_are_called_by_their_name_whatever_the_path_says(tmp_path: Path) -> None:
    assert load_data("cifar10", _parquet_copy(tmp_path, kind="JPEG")).train.name == "cifar10-jpeg"


def test_one_jpeg_among_pngs_marks_the_copy(tmp_path: Path) -> None:
    contents = [_encode(p) for p in _pixels(3)] + [_encode(_pixels(1)[0], "JPEG")]
    _write_parquet(tmp_path / "train.parquet", contents, [0, 1, 2, 3])
    _write_parquet(tmp_path / "test.parquet", contents[:3], [0, 1, 2], image_column="img")
    assert load_data("cifar10", tmp_path).test.name == "cifar10-jpeg"


def test_class_names_come_from_the_schema_when_they_fit(tmp_path: Path) -> None:
    own = [f"class {i}" for i in range(10)]
    assert load_data("cifar10", _parquet_copy(tmp_path / "a", class_names=own)).train.class_names == tuple(own)
    assert load_data("cifar10", _parquet_copy(tmp_path / "b", class_names=own[:3])).train.class_names == CIFAR10_CLASSES


@pytest.mark.parametrize("extra", ["train-00000-of-00001.parquet", "train.parquet", "train-old.parquet"])
def test_copies_that_overlap_are_refused(extra: str, tmp_path: Path) -> None:
    content = [_encode(p) for p in np.zeros((3, 32, 32, 3), dtype=np.uint8)]
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", extra, "test.parquet"):
        _write_parquet(tmp_path / name, content, [0] * 3, image_column="image")
    with pytest.raises(BadData, match="would count twice"):
        load_data("cifar10", tmp_path)


def test_shards_with_a_hash_are_counted_and_two_sets_without_numbers_are_refused(tmp_path: Path) -> None:
    content = [_encode(p) for p in np.zeros((3, 32, 32, 3), dtype=np.uint8)]
    for name in ("train-00000-of-00002-3f2ab.parquet", "test.parquet"):
        _write_parquet(tmp_path / name, content, [0] * 3, image_column="image")
    with pytest.raises(BadData, match="lacks shard 1 of the 2"):
        load_data("cifar10", tmp_path)
    (tmp_path / "train-00000-of-00002-3f2ab.parquet").unlink()
    for name in ("train.parquet", "train-old.parquet"):
        _write_parquet(tmp_path / name, content, [0] * 3, image_column="image")
    with pytest.raises(BadData, match="would count twice"):
        load_data("cifar10", tmp_path)


def test_columns_whose_names_are_no_text_are_one_sentence(tmp_path: Path) -> None:
    for split in ("train", "test"):
        file = tmp_path / f"{split}.parquet"
        pq.write_table(pa.table({"img": [b"x"], "labQl": [1]}), file, store_schema=False)
        file.write_bytes(file.read_bytes().replace(b"labQl", b"lab\xffl"))
    with pytest.raises(BadData, match="truncated or no parquet file"):
        load_data("cifar10", tmp_path)


def test_the_home_folder_of_nobody_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match="home folder that is not known"):
        load_data("cifar10", Path("~no-such-user-here/cifar10"))
    monkeypatch.setenv("DYNABLOCKS_CACHE", "~no-such-user-here/cache")
    with pytest.raises(InvalidArgument, match="home folder that is not known"):
        load_data("cifar10", _parquet_copy(tmp_path))


def test_a_folder_whose_name_is_no_text_is_read(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"images-\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("file names are text here")
    assert len(load_data("folder", _folder_copy(folder, ("a", "b"), size=8)).train) == 4


def test_shards_are_joined_in_order_and_the_column_may_be_image(tmp_path: Path) -> None:
    pixels = _pixels(6)
    for shard in range(2):
        contents = [_encode(p) for p in pixels[3 * shard : 3 * shard + 3]]
        _write_parquet(tmp_path / f"train-0000{shard}-of-00002.parquet", contents, [shard] * 3, image_column="image")
    _write_parquet(tmp_path / "test-00000-of-00001.parquet", [_encode(pixels[0])], [9], image_column="image")
    splits = load_data("cifar10", tmp_path)
    assert torch.equal(splits.train.images, _nchw(pixels))
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(BadData, match="lacks shard 0 of the 2"):
        load_data("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("kind", ["pickle 2", "pickle 4", "pickle 5", "binary"])
def test_original_batches_round_trip(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "batches"
    if kind == "binary":
        _binary_copy(folder, name)
    else:
        _pickled_copy(folder, name, int(kind[-1]), keys=bytes if kind == "pickle 2" else str)
    splits = load_data(name, tmp_path)
    batches = 5 if name == "cifar10" else 1
    assert splits.train.name == name
    assert torch.equal(splits.train.images, _nchw(np.concatenate([_pixels(4, seed) for seed in range(batches)])))
    assert splits.train.labels.tolist() == [label for seed in range(batches) for label in _labels(name, 4, seed)]
    assert torch.equal(splits.test.images, _nchw(_pixels(4, batches)))
    assert infer_name(tmp_path) == name


def test_a_batch_as_python_2_and_old_numpy_pickled_it_is_read(tmp_path: Path) -> None:
    _pickled_copy(tmp_path, "cifar10")
    raw = _pixels(1, 7).transpose(0, 3, 1, 2).reshape(1, -1).tobytes()

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
        b"(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + len(raw).to_bytes(4, "little")
        + raw
    ) + b"tb"
    content = b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"]K\x06a" + b"u."
    (tmp_path / "test_batch").write_bytes(content)
    test = load_data("cifar10", tmp_path).test
    assert torch.equal(test.images, _nchw(_pixels(1, 7)))
    assert test.labels.tolist() == [6]


@pytest.mark.parametrize(("kind", "name"), [("png", "cifar10"), ("jpg", "cifar10-jpeg")])
def test_class_folders_of_cifar(tmp_path: Path, kind: str, name: str) -> None:
    _folder_copy(tmp_path / "copy", CIFAR10_CLASSES, kind)
    splits = load_data("cifar10", tmp_path)
    assert splits.train.name == name
    assert splits.train.labels.tolist() == [label for label in range(10) for _ in range(2)]
    if kind == "png":
        assert torch.equal(splits.train.images[2:4], _nchw(_pixels(2, 1)))
    assert infer_name(tmp_path) == "cifar10"


def test_class_folders_of_cifar100_and_of_the_user(tmp_path: Path) -> None:
    hundred = _folder_copy(tmp_path / "hundred", CIFAR100_CLASSES)
    assert load_data("cifar100", hundred).test.num_classes == 100
    own = _folder_copy(tmp_path / "own", ("cat", "dog"), "jpg", size=9)
    assert infer_name(own) == "folder"
    splits = load_data("folder", own)
    assert splits.train.name == "folder"
    assert splits.train.image_shape == (3, 9, 9)
    assert splits.train.class_names == ("cat", "dog")


def test_a_single_class_is_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="has the one class 'cat'; two or more are needed"):
        load_data("folder", _folder_copy(tmp_path / "own", ("cat",), "jpg", size=8))


def test_grey_images_keep_one_channel_and_are_widened_beside_colour(tmp_path: Path) -> None:
    grey = _folder_copy(tmp_path / "grey", ("a", "b"), grey=True, size=8)
    assert load_data("folder", grey).train.image_shape == (1, 8, 8)
    Image.fromarray(_pixels(1, 3, 8)[0]).save(grey / "test" / "a" / "colour.png")
    splits = load_data("folder", grey)
    assert splits.train.image_shape == (3, 8, 8)
    assert torch.equal(splits.train.images[:, 0], splits.train.images[:, 2])


_BMP_OF_16_BITS_A_PIXEL = (
    struct.pack("<2sIHHI", b"BM", 194, 0, 0, 66)
    + struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0)
    + struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    + 128 * b"\xff"
)


@pytest.mark.parametrize(
    "content",
    [b"P1 8 8\n" + 64 * b"0 ", b"P6 8 8 15\n" + 192 * b"\x0f", _BMP_OF_16_BITS_A_PIXEL],
    ids=["plain PBM", "4-bit PPM", "BMP of 5, 6 and 5 bits"],
)
def test_white_of_fewer_bits_is_white(content: bytes) -> None:
    images, _ = decode_images(EncodedImages([content], "images"))
    assert images.shape[2:] == (8, 8)
    assert bool((images == 255).all())


def test_grey_images_are_widened_beside_colour_in_whatever_chunk_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynablocks.data.decoding._CHUNK", 2)
    pixels = _pixels(5, size=4)
    pixels[1:4] = pixels[1:4, :, :, :1].copy()
    contents = [_encode(image[:, :, 0] if 1 <= i < 4 else image) for i, image in enumerate(pixels)]
    images, formats = decode_images(EncodedImages(contents, "images"))
    assert formats == {"png"}
    assert images.is_contiguous()
    assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    grey, widened = (decode_images(EncodedImages(contents[1:4], "images"), channels)[0] for channels in (None, 3))
    assert torch.equal(grey, images[1:4, :1])
    assert torch.equal(widened, images[1:4])


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    first, second = load_data("digits", seed=0), load_data("digits", seed=5)
    assert first.fingerprint == second.fingerprint
    assert len(first.train) + len(first.test) == 1797
    shares = first.test.labels.bincount() / (first.test.labels.bincount() + first.train.labels.bincount())
    assert ((shares - 0.2).abs() < 0.01).all()
    together = torch.cat([first.train.images, first.test.images]).flatten(1).double()
    original = torch.from_numpy(load_digits().data) / 16 * 255
    assert together.sum() == original.round().sum()
    assert (together.sort(dim=0).values - original.sort(dim=0).values).abs().max() <= 0.5


def test_validation_comes_from_training_only_and_is_a_function_of_the_seed() -> None:
    whole = load_data("digits")
    splits = load_data("digits", validation=300, seed=3)
    assert splits.validation is not None
    assert fingerprint(splits.test) == fingerprint(whole.test)
    assert splits.fingerprint == whole.fingerprint == fingerprint(whole.train, whole.test)
    both = torch.cat([splits.train.images, splits.validation.images]).flatten(1)
    assert len(both) == len(whole.train)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, whole.train.images.flatten(1).tolist()))
    torch.manual_seed(77)
    again, other = load_data("digits", validation=300, seed=3), load_data("digits", validation=300, seed=4)
    assert again.validation is not None
    assert other.validation is not None
    assert torch.equal(again.validation.images, splits.validation.images)
    assert not torch.equal(other.validation.images, splits.validation.images)


def test_a_smaller_validation_set_lies_within_a_larger_one() -> None:
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    numbered = ImageDataset("numbered", images, torch.zeros(50, dtype=torch.int64), ("only",))
    small, large = hold_out(numbered, numbered, 5).validation, hold_out(numbered, numbered, 20).validation
    assert small is not None
    assert large is not None
    assert set(small.images.flatten().tolist()) < set(large.images.flatten().tolist())


def test_fingerprint_sees_a_pixel_and_a_label() -> None:
    train = load_data("digits").train
    images, labels = train.images.clone(), train.labels.clone()
    images[3, 0, 2, 2] ^= 1
    labels[5] = (labels[5] + 1) % 10
    prints = {
        fingerprint(train),
        fingerprint(ImageDataset("d", images, train.labels, train.class_names)),
        fingerprint(ImageDataset("d", train.images, labels, train.class_names)),
    }
    assert len(prints) == 3
    channels_last = train.images.contiguous(memory_format=torch.channels_last)
    assert fingerprint(ImageDataset("d", channels_last, train.labels, train.class_names)) == fingerprint(train)


def test_the_cache_is_used_rebuilt_and_keyed_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dynablocks.data.parquet as parquet

    root = _parquet_copy(tmp_path)
    first = load_data("cifar10", root)
    (stored,) = Path(os.environ["DYNABLOCKS_CACHE"]).glob("*.safetensors")
    decode = parquet.decode_images
    calls: list[int] = []
    monkeypatch.setattr(parquet, "decode_images", lambda *a, **k: calls.append(1) or decode(*a, **k))
    assert load_data("cifar10", root).fingerprint == first.fingerprint
    assert not calls
    whole = stored.read_bytes()
    flipped = bytearray(whole)
    flipped[-2000] ^= 255
    for damaged in (b"", whole[:100], whole[:-7], bytes(flipped), b"\xff" * 64):
        stored.write_bytes(damaged)
        calls.clear()
        assert load_data("cifar10", root).fingerprint == first.fingerprint
        assert calls
        assert stored.stat().st_size == len(whole)
        calls.clear()
        load_data("cifar10", root)
        assert not calls
    file = root / "train-00000-of-00001.parquet"
    status = file.stat()
    _write_parquet(file, [_encode(p) for p in _pixels(12, 8)], _labels("cifar10", 12))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_data("cifar10", root).fingerprint != first.fingerprint


def test_an_unwritable_cache_is_skipped_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _parquet_copy(tmp_path / "data")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNABLOCKS_CACHE", str(tmp_path / "file" / "below"))
    assert len(load_data("cifar10", root).train) == 12
    captured = capsys.readouterr()
    assert "cannot be written" in captured.err
    assert "12 training and 6 test images" in captured.err
    assert captured.out == ""


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path, protocol: int) -> None:
    root = _pickled_copy(tmp_path / "batches", "cifar10")
    target = tmp_path / "written"
    content = pickle.dumps({b"data": _Evil(str(target)), b"labels": [0]}, protocol)
    (root / "data_batch_3").write_bytes(content)
    with pytest.raises(BadData, match="nothing in it was run") as caught:
        load_data("cifar10", root)
    assert "open" in str(caught.value)
    assert not target.exists()
    pickle.loads(content)[b"data"].close()
    assert target.exists(), "the pickle must be harmful without the restriction, or this test shows nothing"


BROKEN = "data_batch_2 is truncated or no pickled CIFAR batch"
NO_DATA = "data_batch_2 has no uint8 array 'data' of shape (N, 3072)"
NO_LABELS = "data_batch_2 has no 'labels' of one integer an image"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "data_batch_2 holds the name builtins.eval, which no CIFAR batch does"),
        (b"cos\nsystem\n(S'true'\ntR.", "data_batch_2 holds the name os.system, which no CIFAR batch does"),
        (b"c__builtin__\ngetattr\n.", "data_batch_2 holds the name __builtin__.getattr, which no CIFAR batch does"),
        (b"\x80\x04\x8c\x05numpy\x8c\x09load.load\x93.", "data_batch_2 holds the name numpy.load.load"),
        (b"cnumpy\ndtype\n(S'O'\ntR.", "data_batch_2 holds an array of type 'O'"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I3\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'ab'\ntb.",
            "data_batch_2 holds an array of 2 items for shape (3,)",
        ),
        (b"cnumpy.core.multiarray\n_reconstruct\n.", "data_batch_2 holds a _Reconstruct rather than a dict"),
        # What stands in for a function takes no attribute, neither into a dict of its own nor by setattr.
        (b"cnumpy.core.multiarray\n_reconstruct\n}Vx\nI1\nsb.", f"{BROKEN} (AttributeError)"),
        (b"cnumpy.core.numeric\n_frombuffer\n}Vx\nI1\nsb.", f"{BROKEN} (AttributeError)"),
        (b"cnumpy\ndtype\nN}V__call__\nI1\ns\x86b.", f"{BROKEN} (AttributeError)"),
        (b"c_codecs\nencode\nN}V__call__\nI1\ns\x86b.", f"{BROKEN} (AttributeError)"),
        (pickle.dumps([1, 2], 2), "data_batch_2 holds a list rather than a dict"),
        (
            pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [0]}, 2),
            "data_batch_2 holds an array of type 'f8'",
        ),
        (b"", BROKEN),
        (b"not a pickle", BROKEN),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}, 2)[:-30], BROKEN),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0, 1]}, 2), NO_LABELS),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0.5]}, 2), NO_LABELS),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [2**70]}, 2), NO_LABELS),
        (pickle.dumps({b"data": np.zeros((1, 3071), np.uint8), b"labels": [0]}, 2), NO_DATA),
        (
            # Bytes of length 0 are pickled as a call of their class.
            pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, 2),
            "data_batch_2 holds the name __builtin__.bytes",
        ),
        (pickle.dumps({b"labels": [0]}, 2), NO_DATA),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, 2),
            "to 10; with 10 classes allowed are 0 to 9",
        ),
    ],
)
def test_a_batch_that_is_not_one_gets_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    root = _pickled_copy(tmp_path, "cifar10")
    (root / "data_batch_2").write_bytes(content)
    with pytest.raises(BadData, match=re.escape(words)) as caught:
        load_data("cifar10", root)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def _file(root: Path) -> Path:
    path = root / "file"
    path.write_text("x")
    return path


def _truncated(root: Path) -> Path:
    file = _parquet_copy(root) / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    return root


def _damaged_inside(root: Path) -> Path:
    file = _parquet_copy(root) / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:4000] = bytes(3996)
    file.write_bytes(content)
    return root


def _with_train(root: Path, contents: list[bytes | None], labels: list[Any], **options: Any) -> Path:
    _parquet_copy(root)
    _write_parquet(root / "train-00000-of-00001.parquet", contents, labels, **options)
    return root


def _wrong_columns(root: Path) -> Path:
    for split in ("train", "test"):
        pq.write_table(pa.table({"picture": [b"x"], "target": [1]}), root / f"{split}.parquet")
    return root


def _plain_binary(root: Path) -> Path:
    for split in ("train", "test"):
        pq.write_table(pa.table({"img": [b"x"], "label": [1]}), root / f"{split}.parquet")
    return root


def _without(root: Path, name: str) -> Path:
    (root / name).unlink()
    return root


def _cut_binary(root: Path) -> Path:
    file = _binary_copy(root, "cifar10") / "data_batch_4.bin"
    file.write_bytes(file.read_bytes()[:-1])
    return root


def _own(root: Path) -> Path:
    return _folder_copy(root, ("a", "b"), size=8)


def _no_images(root: Path) -> Path:
    (_own(root) / "train" / "c").mkdir()
    return root


def _extra_test_class(root: Path) -> Path:
    (_own(root) / "test" / "c").mkdir()
    (root / "test" / "c" / "0.png").write_bytes(_encode(_pixels(1, size=8)[0]))
    return root


def _own_with(root: Path, pixels: np.ndarray | bytes, part: str = "train") -> Path:
    file = _own(root) / part / "b" / "9.png"
    if isinstance(pixels, bytes):
        file.write_bytes(pixels)
    else:
        Image.fromarray(pixels).save(file)
    return root


def _deep_png(colours: int, channels: int) -> bytes:
    """A PNG of 8 x 8 white pixels with 16 bits a channel, by the number of its colour type; Pillow writes none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colours, 0, 0, 0))
    rows = zlib.compress(8 * (b"\0" + 16 * channels * b"\xff"))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


_png = _encode(_pixels(1)[0])

BAD_COPIES = {
    "missing folder": ("cifar10", lambda r: r / "none", "does not exist"),
    "file for a folder": ("cifar10", _file, "is a file; give --data-dir the folder that holds it"),
    "empty folder": ("cifar10", lambda r: r, "is empty"),
    "empty folder, own images": ("folder", lambda r: r, "is empty"),
    "truncated parquet": ("cifar10", _truncated, "truncated or no parquet"),
    "parquet damaged inside": ("cifar10", _damaged_inside, "truncated or no parquet|cannot be decoded|has rows"),
    "wrong columns": ("cifar10", _wrong_columns, "columns picture, target.*run once with a network"),
    "no image column": ("cifar10", lambda r: _with_train(r, [_png], [1], image_column="photo"), "photo, label"),
    "image column not a struct": ("cifar10", _plain_binary, "a struct with the field bytes"),
    "labels are text": ("cifar10", lambda r: _with_train(r, [_png], ["cat"]), "integers are needed"),
    "label missing": ("cifar10", lambda r: _with_train(r, [_png, _png], [None, 3]), "without a label"),
    "image bytes missing": ("cifar10", lambda r: _with_train(r, [None], [3]), "without image bytes"),
    "no rows": ("cifar10", lambda r: _with_train(r, [], pa.array([], pa.int64())), "has no rows"),
    "label too large": ("cifar10", lambda r: _with_train(r, [_png], [10]), "reach from 10 to 10; .* 0 to 9"),
    "label beyond 64 bits": ("cifar10", lambda r: _with_train(r, [_png], pa.array([2**63], pa.uint64())), "label"),
    "label negative": ("cifar10", lambda r: _with_train(r, [_png], [-1]), "reach from -1 to -1"),
    "undecodable image": ("cifar10", lambda r: _with_train(r, [_png, b"GIF?"], [1, 1]), "image 1 of .* no PNG"),
    "truncated image": ("cifar10", lambda r: _with_train(r, [_png, _png[:200]], [1, 1]), "image 1 of .* decoded"),
    "mixed sizes": (
        "cifar10",
        lambda r: _with_train(r, [_png, _encode(_pixels(1, size=16)[0])], [1, 1]),
        "is 16x16 pixels, the first one is 32x32",
    ),
    "train and test sizes differ": (
        "cifar10",
        lambda r: _with_train(r, [_encode(_pixels(1, size=16)[0])], [1]),
        "CIFAR-10 has",
    ),
    "only a test split": (
        "cifar10",
        lambda r: _without(_parquet_copy(r), "train-00000-of-00001.parquet"),
        "but no train-",
    ),
    "the other CIFAR": ("cifar100", _parquet_copy, "holds no CIFAR-100 .*columns img, label"),
    "two copies": ("cifar10", lambda r: (_parquet_copy(r / "a"), _parquet_copy(r / "b"), r)[-1], "holds 2 copies"),
    "a batch missing": (
        "cifar10",
        lambda r: _without(_pickled_copy(r, "cifar10"), "data_batch_3"),
        "lacks the batch data_batch_3",
    ),
    "cut binary batch": ("cifar10", _cut_binary, "multiple of 3073"),
    "class folder without images": ("folder", _no_images, "has no images"),
    "class only in test": ("folder", _extra_test_class, "has the class 'c'"),
    "no test folder": ("folder", lambda r: (shutil.rmtree(_own(r) / "test"), r)[-1], "test is missing"),
    "own images of mixed sizes": ("folder", lambda r: _own_with(r, _pixels(1, size=9)[0]), "9.png is 9x9 pixels"),
    "own test images of another size": (
        "folder",
        lambda r: [Image.fromarray(_pixels(1, size=9)[0]).save(f) for f in (_own(r) / "test").rglob("*.png")] and r,
        r"shape \(3, 9, 9\) and the training images \(3, 8, 8\)",
    ),
    "own image is text": ("folder", lambda r: _own_with(r, b"hello"), "9.png cannot be decoded"),
    "16-bit image": ("folder", lambda r: _own_with(r, np.ones((8, 8), np.uint16)), "8 bits a channel"),
    "16-bit colour image": ("folder", lambda r: _own_with(r, _deep_png(2, 3)), "9.png has more than 8 bits a channel"),
    "16-bit colour image with alpha": ("folder", lambda r: _own_with(r, _deep_png(6, 4)), "more than 8 bits a channel"),
    "16-bit grey image with alpha": ("folder", lambda r: _own_with(r, _deep_png(4, 2)), "more than 8 bits a channel"),
    "16-bit PPM": ("folder", lambda r: _own_with(r, b"P6 8 8 65535\n" + bytes(384)), "more than 8 bits a channel"),
    "10-bit plain PPM": ("folder", lambda r: _own_with(r, b"P3 8 8 1023\n" + b"7 " * 192), "more than 8 bits"),
    "transparent image": ("folder", lambda r: _own_with(r, np.full((8, 8, 4), 9, np.uint8)), "partly transparent"),
    "folders of other classes": ("cifar10", _own, "holds no CIFAR-10: run once with a network"),
}


@pytest.mark.parametrize("case", BAD_COPIES)
def test_a_bad_copy_gets_one_sentence(tmp_path: Path, case: str) -> None:
    name, make, sentence = BAD_COPIES[case]
    with pytest.raises(BadData, match=sentence) as caught:
        load_data(name, make(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "cifar01"}, "did you mean 'cifar10"),
        ({"name": "digit"}, "did you mean 'digits'"),
        ({"name": "digits", "validation": -1}, "validation is -1"),
        ({"name": "digits", "validation": 2.5}, "validation is 2.5"),
        ({"name": "digits", "validation": True}, "validation is True"),
        ({"name": "digits", "validation": 1438}, "allowed are 0 to 1437"),
        ({"name": "digits", "validation": 10, "seed": "a"}, "seed is 'a'"),
        ({"name": "digits", "data_dir": Path("x")}, "digits is built in"),
        ({"name": "folder"}, "needs --data-dir"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        load_data(**arguments)


def test_infer_name_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BadData, match="holds no data set that is known here"):
        infer_name(tmp_path)
    _parquet_copy(tmp_path / "ten")
    _parquet_copy(tmp_path / "hundred", "cifar100")
    with pytest.raises(BadData, match="both CIFAR-10 and CIFAR-100"):
        infer_name(tmp_path)
    assert load_data("cifar100", tmp_path).train.num_classes == 100


def test_parquet_files_of_other_classes_are_not_taken_for_cifar10(tmp_path: Path) -> None:
    _parquet_copy(tmp_path, class_names=[str(digit) for digit in range(10)])
    with pytest.raises(BadData, match=r"classes 0, 1, 2, …, which is not CIFAR-10"):
        infer_name(tmp_path)
    assert load_data("cifar10", tmp_path).train.class_names[0] == "0"
    names = ["cra" if name == "crab" else name for name in CIFAR100_CLASSES]
    assert infer_name(_parquet_copy(tmp_path / "hundred", "cifar100", class_names=names)) == "cifar100"


GREY = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (GREY.float() * torch.nan, [0, 1], "float32; a uint8 tensor .*cannot hold NaN"),
        (GREY[0], [0, 1], r"shape \(1, 4, 4\)"),
        (GREY[:0], [], "at least one image"),
        (GREY.expand(2, 2, 4, 4), [0, 1], r"C = 1 \(grey\) or 3"),
        (GREY, [0], r"int64 tensor of shape \(2,\)"),
        (GREY, [0.0, 1.0], "int64 tensor"),
        (GREY, [0, 2], "reach from 0 to 2"),
        (GREY, [-1, 0], "reach from -1 to 0"),
        ([[1]], [0], "are list"),
    ],
)
def test_a_data_set_checks_what_it_is_made_of(images: Any, labels: list[Any], sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        ImageDataset("x", images, torch.tensor(labels), ("a", "b"))


@pytest.mark.parametrize("indices", [[], [2], [-1], [0.5], [True, False], [[0]]])
def test_subset_refuses_bad_indices(indices: list[Any]) -> None:
    with pytest.raises(InvalidArgument, match="indices"):
        ImageDataset("x", GREY, torch.tensor([0, 1]), ("a", "b")).subset(indices)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_offline_without_a_copy_says_the_three_ways(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def nothing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("no snapshot")

    def network(*_: Any, **__: Any) -> str:
        raise AssertionError("HF_HUB_OFFLINE must keep off the network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", network)
    three = f"HF_HUB_OFFLINE is set.*run once with a network.*uoft-cs/{name}.*python.tar.gz.*train/<class>"
    with pytest.raises(BadData, match=three):
        load_data(name)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", nothing)
    with pytest.raises(BadData, match=r"could not be fetched: FileNotFoundError.*run once"):
        load_data(name)


@pytest.mark.parametrize("cached", [True, False])
def test_the_hub_copy_is_taken_from_its_cache_or_fetched(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    _parquet_copy(tmp_path / "whole" / "plain_text")
    shutil.copytree(tmp_path / "whole", tmp_path / "partial")
    (tmp_path / "partial" / "plain_text" / "train-00000-of-00001.parquet").unlink()
    names = ["README.md", *(f"plain_text/{split}-00000-of-00001.parquet" for split in ("test", "train"))]
    fetched: list[str] = []

    def download(repository: str, file: str, **_: Any) -> str:
        fetched.append(file)
        return str(tmp_path / "whole" / file)

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
    snapshot = str(tmp_path / ("whole" if cached else "partial"))
    if not cached:
        monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: snapshot)
    assert len(load_data("cifar10").test) == 6
    assert fetched == ([] if cached else names[1:])


@pytest.mark.slow
@pytest.mark.skipif(not REAL_COPY.is_dir(), reason="the real CIFAR-10 copy is not beside the repository")
def test_the_real_copy() -> None:
    splits = load_data("cifar10", REAL_COPY, validation=5000)
    assert splits.train.name == "cifar10-jpeg"
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (45_000, 5_000, 10_000)
    assert splits.test.labels.bincount().tolist() == [1000] * 10
    means = torch.cat([splits.train.images, splits.validation.images]).double().mean((0, 2, 3)) / 255
    assert (means - torch.tensor([0.4913, 0.4821, 0.4465], dtype=torch.float64)).abs().max() < 1e-4
    assert load_data("cifar10", REAL_COPY).fingerprint == splits.fingerprint
