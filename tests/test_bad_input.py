"""Bad input of every kind: one clear sentence, exit code 2, no traceback, nothing lost.

``python tests/test_bad_input.py`` prints the table.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dynablocks.cli import main
from dynablocks.errors import InvalidArgument
from dynablocks.lifting import Head
from dynablocks.norms import SpectralMetric

Prepare = Callable[[Path], None]
TINY = (
    "--preset smoke --model.widths [4,4] --model.layers [1,1] --training.epochs 1 --training.threads 1 "
    "--attack.samples 8 --attack.steps 2"
)


def _nothing(place: Path) -> None:
    del place


def _file(name: str, content: bytes) -> Prepare:
    def write(place: Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)

    return write


def _files(content: bytes, *names: str) -> Prepare:
    def write(place: Path) -> None:
        for name in names:
            _file(name, content)(place)

    return write


def _damage(name: str, change: Callable[[bytes], bytes]) -> Prepare:
    """A finished run whose newest and previous checkpoint both hold a damaged file."""

    def spoil(place: Path) -> None:
        for checkpoint in ("checkpoint", "checkpoint.previous"):
            path = place / "run" / checkpoint / name
            if path.exists():
                path.write_bytes(change(path.read_bytes()))

    return spoil


def _remove_config(place: Path) -> None:
    (place / "run" / "config.yaml").unlink()


def _nan_weights(place: Path) -> None:
    """Weights that hold NaN, with a manifest that agrees."""
    from safetensors.torch import load_file, save_file

    from dynablocks.files import sha256

    for name in ("checkpoint", "checkpoint.previous"):
        folder = place / "run" / name
        if folder.exists():
            weights = load_file(folder / "model.safetensors")
            save_file({k: torch.full_like(v, float("nan")) for k, v in weights.items()}, folder / "model.safetensors")
            manifest = json.loads((folder / "manifest.json").read_text())
            entry = manifest["files"]["model.safetensors"]
            entry["sha256"] = sha256(folder / "model.safetensors")
            entry["bytes"] = (folder / "model.safetensors").stat().st_size
            (folder / "manifest.json").write_text(json.dumps(manifest))


def _nan_epochs(place: Path) -> None:
    facts = json.loads((place / "run" / "training.json").read_text())
    (place / "run" / "training.json").write_text(json.dumps(facts | {"epochs": float("nan")}))


_CSV = b"trajectory,t,q,p\n" + b"".join(f"0,{k}.0,{k}.0,{-k}.0\n".encode() for k in range(40))

CASES: dict[str, tuple[str, Prepare, str]] = {
    "no command": ("", _nothing, ""),
    "unknown command": ("trian", _nothing, "unknown command 'trian'; did you mean 'train'"),
    "unknown model": (
        "train --model prescibed --preset smoke",
        _nothing,
        "unknown model 'prescibed'; did you mean 'prescribed'",
    ),
    "unknown preset": ("train --preset smok", _nothing, "unknown preset 'smok'; did you mean 'smoke'"),
    "unknown data set": ("train --data cifar11 --preset smoke", _nothing, "unknown data set 'cifar11'"),
    "unknown flag": ("train --preset smoke --speed 3", _nothing, "--speed"),
    "flag without value": (
        "train --preset smoke --epochs",
        _nothing,
        "--training.epochs: expected one argument",
    ),
    "a word for a number": ("train --preset smoke --epochs many", _nothing, "--training.epochs is many; a number"),
    "negative epochs": ("train --preset smoke --epochs -1", _nothing, "epochs is -1.0; allowed are values in (0,"),
    "minutes as on a clock": (
        "train --preset smoke --max-minutes 1:30",
        _nothing,
        "--training.max_minutes: 1:30 is no plain number",
    ),
    "epochs as on a clock": (
        "train --preset smoke --epochs=1:30 --print_config",
        _nothing,
        "--training.epochs: 1:30 is no plain number",
    ),
    "hours as on a clock": (
        "reproduce fig3 --preset smoke --dry-run --max-hours 1:30",
        _nothing,
        "--max-hours: 1:30 is no plain number",
    ),
    "minutes of a fit as on a clock": (
        "fit d.csv --preserve none --max-minutes 1:30",
        _file("d.csv", _CSV),
        "--max-minutes: 1:30 is no plain number",
    ),
    "widths with leading zeros": (
        "train --preset smoke --model.widths [010,020]",
        _nothing,
        "--model.widths: 010 is no plain number",
    ),
    "widths beyond all memories": (
        "train --preset smoke --model.widths [99999999999999999999]",
        _nothing,
        "widths is [99999999999999999999]; whole numbers from 1 to 65536 are needed",
    ),
    "a number of 400 digits": (
        f"train --preset smoke --training.lr {'9' * 400}",
        _nothing,
        "--training.lr: a number has more than 308 digits",
    ),
    "epochs of 400 digits": (
        f"train --preset smoke --epochs {'9' * 400}",
        _nothing,
        "--training.epochs: a number has more than 308 digits",
    ),
    "epochs beyond all numbers": (
        "train --preset smoke --epochs 1e308",
        _nothing,
        "epochs is 1e+308; allowed are values in (0, 1e+09]",
    ),
    "minutes beyond all numbers": (
        "train --preset smoke --max-minutes 1e307",
        _nothing,
        "max_minutes is 1e+307; allowed are values in (0, 1e+07]",
    ),
    "hours beyond all timers": (
        "reproduce fig3 --preset smoke --dry-run --max-hours 3e6",
        _nothing,
        "max_hours is 3000000.0; allowed are values in (0, 100000]",
    ),
    "a seed beyond 32 bits of reproduce": (
        "reproduce fig3 --preset smoke --dry-run --seed 5000000000",
        _nothing,
        "seed is 5000000000; allowed are values in [0, 2e+08]",
    ),
    "threads beyond all processors": (
        "train --preset smoke --training.threads 3000000000",
        _nothing,
        "threads is 3000000000; a whole number from 1 to 4096",
    ),
    "a learning rate that rises without end": (
        "train --preset smoke --training.step_factor 1e300",
        _nothing,
        "step_factor is 1e+300; allowed are values in (0, 10]",
    ),
    "a crop wider than the image": (
        f"train {TINY} --training.crop_padding 9 --out b",
        _nothing,
        "crop_padding is 9; of images of 8x8 pixels 0 to 7",
    ),
    "radii beyond float32": (
        "train --preset smoke --attack.epsilons [1e30]",
        _nothing,
        "epsilon is 1e+30; allowed are values in [0, 1e+06]",
    ),
    "NaN learning rate": ("train --preset smoke --training.lr nan", _nothing, "lr is nan; a"),
    "batch size 0": (
        "train --preset smoke --training.batch_size 0",
        _nothing,
        "batch_size is 0; a whole number from 1",
    ),
    "unknown optimiser": ("train --preset smoke --training.optimiser adan", _nothing, "unknown optimiser 'adan'"),
    "unknown loss": (
        "train --preset smoke --training.loss hing",
        _nothing,
        "unknown loss 'hing'; did you mean 'hinge'",
    ),
    "negative minutes": (
        "train --preset smoke --max-minutes -3",
        _nothing,
        "max_minutes is -3.0; allowed are values in (0,",
    ),
    "widths and layers differ": (
        "train --preset smoke --model.widths [4,4,4]",
        _nothing,
        "widths [4, 4, 4] and layers [1, 1] differ in length",
    ),
    "width 0": ("train --preset smoke --model.widths [0,4]", _nothing, "widths is [0, 4]; whole numbers from 1"),
    "too many stages": (
        "train --preset smoke --model.widths [4,4,4,4] --model.layers [1,1,1,1]",
        _nothing,
        "images of 8 x 8 pixels cannot be folded by 16",
    ),
    "unknown padding": ("train --preset smoke --model.padding reflect", _nothing, "unknown padding 'reflect'"),
    "even kernel with same padding": (
        "train --preset smoke --model.padding same --model.kernel_size 2",
        _nothing,
        "kernel_size is 2 with padding 'same'; use an odd one",
    ),
    "slope above 1": (
        "train --preset smoke --model.slope 1.5",
        _nothing,
        "slope is 1.5; allowed are values in [0, 1]",
    ),
    "unknown region": (
        "train --model prescribed --preset smoke --model.region tigt",
        _nothing,
        "unknown region 'tigt'; did you mean 'tight'",
    ),
    "a setting of other models": (
        "train --preset smoke --model.lift paper",
        _nothing,
        "lift is 'paper', but model certified has no such setting",
    ),
    "exact flow without orthogonal rows": (
        "train --model prescribed --preset smoke --model.region exact",
        _nothing,
        "the exact flow needs a gradient field whose A has orthonormal rows",
    ),
    "negative epsilon": (
        "train --preset smoke --attack.epsilons [-0.1]",
        _nothing,
        "epsilon is -0.1; allowed are values in [0, inf)",
    ),
    "unknown attack loss": ("train --preset smoke --attack.losses [cw]", _nothing, "unknown attack loss 'cw'"),
    "missing data folder": (
        "train --data-dir nowhere --preset smoke",
        _nothing,
        "the data folder nowhere does not exist",
    ),
    "data folder is a file": (
        "train --data-dir notes.txt --preset smoke",
        _file("notes.txt", b"hello"),
        "the data folder notes.txt is a file",
    ),
    "empty data folder": (
        "train --data-dir empty --preset smoke",
        lambda place: (place / "empty").mkdir(),
        "the data folder empty is empty",
    ),
    "parquet of the training alone": (
        "train --data cifar10 --data-dir data --preset smoke",
        _file("data/train-00000-of-00001.parquet", b"PAR1 and then nothing"),
        "data has parquet files but no test-*.parquet",
    ),
    "truncated parquet": (
        "train --data cifar10 --data-dir data --preset smoke",
        _files(b"PAR1 and then nothing", *(f"data/{part}-00000-of-00001.parquet" for part in ("train", "test"))),
        "data/train-00000-of-00001.parquet is truncated or no parquet file",
    ),
    "CIFAR-100 without a copy": (
        "train --data cifar100 --preset smoke",
        _nothing,
        "CIFAR-100 is not at hand (HF_HUB_OFFLINE is set",
    ),
    "validation larger than the data": (
        "train --preset smoke --data.validation 5000",
        _nothing,
        "validation is 5000; digits has 1438 training images",
    ),
    "missing config file": ("train --config nowhere.yaml", _nothing, "--config nowhere.yaml does not exist"),
    "config is not YAML": (
        "train --config bad.yaml",
        _file("bad.yaml", b"model: [unclosed"),
        "--config bad.yaml is not readable YAML",
    ),
    "config with an unknown key": (
        "train --config bad.yaml",
        _file("bad.yaml", b"model:\n  nmae: certified\n"),
        "nmae",
    ),
    "config is binary": (
        "train --config bad.yaml",
        _file("bad.yaml", b"\xff\xfe\x00\x01"),
        "--config bad.yaml is not readable YAML",
    ),
    "--out is a file": (
        "train --preset smoke --out notes.txt",
        _file("notes.txt", b"hello"),
        "--out notes.txt is a file; give a folder",
    ),
    "--out holds other files": (
        "train --preset smoke --out photos",
        _file("photos/me.jpg", b"..."),
        "--out photos holds other files",
    ),
    "--out holds the config.yaml of something else": (
        "train --preset smoke --overwrite --out theirs",
        _file("theirs/config.yaml", b"server: example.org\n"),
        "--out theirs holds other files",
    ),
    "fit --overwrite on a trained network": (
        "fit d.csv --preserve none --overwrite --out run",
        _file("d.csv", _CSV),
        "run holds something else than a fit",
    ),
    "a seed with a leading zero in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"training:\n  seed: 010\n"),
        "--config c.yaml: 010 is no plain number",
    ),
    "minutes as on a clock in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"training:\n  max_minutes: 1:30\n"),
        "--config c.yaml: 1:30 is no plain number",
    ),
    "a number of 400 digits in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"training:\n  lr: " + b"9" * 400 + b"\n"),
        "--config c.yaml: a number has more than 308 digits",
    ),
    "a date that never was in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"data:\n  dir: 2024-02-30\n"),
        "--config c.yaml is not readable YAML",
    ),
    **{
        f"a config with {text}": (
            "train --config c.yaml",
            _file("c.yaml", text.encode()),
            "--config c.yaml is not readable YAML",
        )
        for text in ("model: !!bool x", "training: !!timestamp x", "seed: !!int ''")
    },
    "a flag with a tag of YAML": ("train --data.name !!bool", _nothing, "see dynablocks train --help"),
    "a config that is nested too deep": (
        "train --config c.yaml",
        _file("c.yaml", b"data: " + b"[" * 3000 + b"]" * 3000),
        "--config c.yaml is not readable YAML",
    ),
    **{
        f"{command} with a config that is binary": (
            f"{command} run --config bad.yaml",
            _file("bad.yaml", b"\xff\xfe\x00\x01"),
            "--config bad.yaml is not readable YAML",
        )
        for command in ("attack", "certify", "verify", "explain", "report")
    },
    "a data folder in the home of nobody": (
        "train --preset smoke --data-dir ~no-such-user-here/data",
        _nothing,
        "~no-such-user-here/data begins with a home folder that is not known here",
    ),
    "a zero byte in a config": (
        "train --config c.yaml",
        _file("c.yaml", b'data:\n  dir: "a\\0b"\n'),
        r"'a\x00b' holds a zero byte, which no name does",
    ),
    "--json over a file that is no certificate": (
        "certify run --json notes.txt",
        _file("notes.txt", b"hello"),
        "--json notes.txt is there and holds no certificate; give another name",
    ),
    "--json is a link to itself": (
        "certify run --json loop.json",
        lambda place: (place / "loop.json").symlink_to(place / "loop.json"),
        "loop.json is a link that leads back to itself",
    ),
    "a warm start that is a link to itself": (
        f"train {TINY} --warm_start loop --out b",
        lambda place: (place / "loop").symlink_to(place / "loop"),
        "loop is a link that leads back to itself",
    ),
    "training.json with NaN": ("certify run", _nan_epochs, "run/training.json was cut or edited"),
    "a name that is too long": (f"train --preset smoke --out {'x' * 300}", _nothing, "File name too long"),
    "a seed that is too large": (
        "train --preset smoke --seed 18446744073709551616",
        _nothing,
        "seed is 18446744073709551616; a whole number from 0",
    ),
    "a number for a data set in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"data:\n  name: 5\n"),
        "--data.name is 5; text, in quotes in YAML, is needed",
    ),
    "a precision without quotes in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"training:\n  precision: 32\n"),
        "--training.precision is 32; text, in quotes in YAML, is needed",
    ),
    "a group twice in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"training:\n  lr: 0.5\nmodel:\n  name: resnet\ntraining:\n  epochs: 1\n"),
        "--config c.yaml: training stands twice",
    ),
    "a setting twice in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"training:\n  lr: 0.5\n  epochs: 1\n  lr: 0.25\n"),
        "--config c.yaml: training.lr stands twice",
    ),
    "a group behind a full name of it in a config": (
        "train --config c.yaml",
        _file("c.yaml", b"model.name: resnet\nmodel:\n  widths: [4, 4]\n"),
        "--config c.yaml: model stands twice",
    ),
    "a setting twice in the file of a group": (
        "train --training t.yaml",
        _file("t.yaml", b"lr: 0.5\nlr: 0.25\n"),
        "--training t.yaml: lr stands twice",
    ),
    "--out is not writable": ("train --preset smoke --out /proc/run", _nothing, "cannot write to /proc/run"),
    "attack without a directory": ("attack", _nothing, "no run directory was given; use: dynablocks attack DIR"),
    "attack a missing run": ("attack nowhere", _nothing, "nowhere is not a run directory"),
    "certify an empty folder": (
        "certify empty",
        lambda place: (place / "empty").mkdir(),
        "empty holds no checkpoint",
    ),
    "explain a file": ("explain notes.txt", _file("notes.txt", b"hello"), "notes.txt is not a run directory"),
    "verify with 0 samples": ("verify run --samples 0", _nothing, "--samples is 0; a whole number from 1 is needed"),
    "audit with -1 samples": ("audit c.json --samples=-1", _nothing, "--samples is -1; a whole number from 0"),
    "audit with 0 steps": ("audit c.json --steps 0", _nothing, "--steps is 0; a whole number from 1 is needed"),
    "a stem without a stage behind it": (
        "train --preset smoke --model metric --model.widths [4] --model.layers [1] --model.stem 2 --out b",
        _nothing,
        "stem is 2, which changes nothing with one width; leave it out",
    ),
    "report of a missing run": ("report nowhere", _nothing, "nowhere is not a run directory"),
    "list an unknown kind": ("list modles", _nothing, "unknown kind 'modles'; did you mean 'models'"),
    "warm start that saw the held-out images": (
        f"train {TINY} --warm_start run --data.validation 9 --out b",
        _nothing,
        "--warm_start run was trained on images that are held out here",
    ),
    "resume with other settings": (
        f"train {TINY} --training.lr 0.5 --out run",
        _nothing,
        "run holds a training with training.lr",
    ),
    "truncated weights": (
        "certify run",
        _damage("model.safetensors", lambda b: b[: len(b) // 2]),
        "no whole checkpoint in run (run/checkpoint: model.safetensors has",
    ),
    "flipped bit in the weights": (
        "certify run",
        _damage("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        "model.safetensors does not match its SHA-256",
    ),
    "empty weights": (
        "explain run",
        _damage("model.safetensors", lambda b: b""),
        "model.safetensors has 0 bytes instead of",
    ),
    "broken manifest": ("certify run", _damage("manifest.json", lambda b: b"{"), "manifest.json cannot be read"),
    "NaN weights": ("certify run", _nan_weights, "the weights in run/checkpoint hold NaN or infinity"),
    "config.yaml removed": ("attack run", _remove_config, "run/config.yaml cannot be read"),
    "a schedule that rises beyond all numbers": (
        f"train {TINY} --training.schedule step --training.step_factor 10 --training.step_epochs 0.0001 --out b",
        _nothing,
        "step_factor 10 every 0.0001 epochs takes the learning rate beyond all numbers",
    ),
    "a run and a model to explain": (
        "explain run --model prescribed",
        _nothing,
        "a run directory and a model (--model, or model: in a --config file) were given; give one.",
    ),
    "certify in an unknown arithmetic, dry": ("certify run --arithmetic float16 --dry-run", _nothing, "float16"),
    "explain a missing run, dry": ("explain nowhere --dry-run", _nothing, "nowhere is not a run directory"),
    "explain an unknown model, dry": ("explain --model prescibed --dry-run", _nothing, "unknown model 'prescibed'"),
    "a dry run with a warm start that saw the held-out images": (
        f"train {TINY} --warm_start run --data.validation 9 --out b --dry-run",
        _nothing,
        "--warm_start run was trained on images that are held out here",
    ),
    "a dry run with a warm start of another body": (
        f"train {TINY.replace('[4,4]', '[4,8]')} --warm_start run --out b --dry-run",
        _nothing,
        "the network in run has another body",
    ),
    "a dry run with a warm start from itself": (
        f"train {TINY} --warm_start run --out run --dry-run",
        _nothing,
        "--warm_start and --out are both run",
    ),
    "a dry attack of a run without its training": (
        "attack run --dry-run",
        lambda place: (place / "run" / "training.json").unlink(),
        "the training in run is not finished",
    ),
}
"""Arguments, what is there before, and what the sentence says of it."""


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished training."""
    place = tmp_path_factory.mktemp("finished")
    assert main(f"train {TINY} --out {place / 'run'}".split()) == 0
    return place / "run"


def complaint(arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments.split())
    return code, errors.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_sentence(
    name: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, prepare, words = CASES[name]
    shutil.copytree(finished_run, tmp_path / "run")
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("DYNABLOCKS_CACHE", str(tmp_path / "cache"))
    code, text = complaint(arguments)
    assert code == 2
    if name == "no command":
        return
    sentences = [line for line in text.splitlines() if line.startswith("dynablocks: error: ")]
    assert len(sentences) == 1
    assert "Traceback" not in text
    assert words in sentences[0]
    assert len(sentences[0]) < 420


def test_settings_of_another_training_leave_it_as_it_was(finished_run: Path) -> None:
    before = {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()}
    code, text = complaint(f"train {TINY} --training.lr 0.5 --out {finished_run}")
    assert code == 2
    assert "training.lr" in text
    assert {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "change",
    [
        "--max-minutes 60",
        "--device cuda",
        "--overwrite --training.crop_fill reflect --training.crop_padding 8",
    ],
)
def test_a_refused_training_leaves_the_settings_of_the_run(finished_run: Path, change: str) -> None:
    if change == "--device cuda" and torch.cuda.is_available():
        pytest.skip("here is a GPU")
    before = {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()}
    assert complaint(f"train {TINY} {change} --out {finished_run}")[0] == 2
    assert {p: p.read_bytes() for p in finished_run.rglob("*") if p.is_file()} == before


def test_a_foreign_folder_keeps_all_its_files(tmp_path: Path) -> None:
    for name, content in (("config.yaml", "a: 1"), ("metrics.jsonl", "{}"), ("checkpoint/mine.bin", "1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert complaint(f"train {TINY} --overwrite --out {tmp_path}")[0] == 2
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("shape", [3, None, "abc", (4, 4), (1, 4, 0)])
def test_a_shape_of_no_image_gets_one_sentence(shape: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^shape is .*; 3 positive sizes are needed, such as \(3, 32, 32\)\.$"):
        SpectralMetric(shape)


def test_features_of_another_size_than_those_of_the_head_get_one_sentence() -> None:
    with pytest.raises(InvalidArgument, match=r"the input has shape \(2, 4\); Head was built for \(batch, 5\)"):
        Head(5, 3)(torch.ones(2, 4))


def table() -> None:
    """Print every case with its sentence."""
    import os

    with tempfile.TemporaryDirectory() as name:
        finished = Path(name) / "finished"
        main(f"train {TINY} --out {finished / 'run'}".split())
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("| input | exit | sentence |\n|---|---|---|")
        for case, (arguments, prepare, _) in CASES.items():
            place = Path(name) / case.replace(" ", "-").replace("/", "-")
            shutil.copytree(finished, place)
            prepare(place)
            os.chdir(place)
            code, text = complaint(arguments)
            said = [line for line in text.splitlines() if line.startswith("dynablocks: error: ")]
            print(f"| {case} | {code} | {' / '.join(said).removeprefix('dynablocks: error: ') or '(usage)'} |")


if __name__ == "__main__":
    table()
