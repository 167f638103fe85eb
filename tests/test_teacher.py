"""Labels softened by the predictions of another run, and the ordinary network that gives them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.config import DataConfig, RunConfig, from_yaml, preset_settings, to_yaml
from dynablocks.data import DataSplits, ImageDataset, to_unit_range
from dynablocks.errors import BadCheckpoint, BadData, InvalidArgument
from dynablocks.models import ModelConfig, build
from dynablocks.robustness import AttackConfig
from dynablocks.run_directory import beginning
from dynablocks.run_directory.beginning import starting_network, teacher_labels
from dynablocks.run_directory.dry_run import estimate
from dynablocks.run_directory.metrics import write_metrics
from dynablocks.run_directory.network import load, load_splits, stored_description, weights_hash
from dynablocks.run_directory.pipeline import certify_run, report_run, train_run
from dynablocks.run_directory.results import training_facts
from dynablocks.training import LOSSES, TrainingConfig, find_checkpoint, fit, hinge, make_loss, offset_cross_entropy
from dynablocks.training.loop import settings_of
from dynablocks.training.losses import mean_loss
from dynablocks.training.record import check_same_run
from dynablocks.training.session import targets_of

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
STUDENT = TrainingConfig(epochs=0.3, batch_size=64, precision="32", device="cpu")
TEACHER = replace(STUDENT, loss="cross-entropy", label_smoothing=0.1)


def student(teacher: Path | None = None, **changes: Any) -> RunConfig:
    model = ModelConfig("certified", widths=(4,), layers=(1,))
    base = RunConfig("smoke", model, DataConfig("digits"), STUDENT, AttackConfig(samples=4, steps=1), teacher=teacher)
    return replace(base, **changes)


def convnet(**changes: Any) -> RunConfig:
    model = ModelConfig("convnet", widths=(4, 8), layers=(1, 1))
    return replace(RunConfig("smoke", model, DataConfig("digits"), TEACHER), **changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of an ordinary network; whoever changes it copies it first."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train_run(convnet(), out)
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "hinge", "margin": 0.3},
        {"loss": "cross-entropy"},
        {"loss": "offset-cross-entropy", "offset": 0.5, "temperature": 0.3},
        {"loss": "offset-cross-entropy", "power": 0.6},
        {"loss": "offset-cross-entropy", "focus": 1.5},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_loss_of_probabilities_is_its_expectation(settings: dict[str, Any]) -> None:
    loss = make_loss(TrainingConfig(**settings))
    logits, chances = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64).softmax(1)
    one_by_one = [
        sum(p * loss(z[None], torch.tensor([k])) for k, p in enumerate(row))
        for z, row in zip(logits, chances, strict=True)
    ]
    close(loss(logits, chances), torch.stack(one_by_one).mean())
    labels = torch.arange(20) % 5
    certain = functional.one_hot(labels, 5).double()
    close(loss(logits, certain), loss(logits, labels))
    logits.requires_grad_(True)
    (of_chances,) = torch.autograd.grad(loss(logits, certain), logits)
    (of_labels,) = torch.autograd.grad(loss(logits, labels), logits)
    close(of_chances, of_labels)


def test_every_loss_takes_probabilities() -> None:
    for name in LOSSES:
        assert make_loss(TrainingConfig(loss=name))(torch.zeros(2, 3), torch.full((2, 3), 1 / 3)).ndim == 0
    swapped = mean_loss(lambda logits, labels: logits.gather(1, labels[:, None])[:, 0], torch.eye(2), torch.eye(2))
    assert swapped == 1  # class k of image i is asked about with the logits of image i


def test_label_smoothing_is_that_of_torch() -> None:
    logits, labels = torch.randn(30, 4), torch.randint(0, 4, (30,))
    images = ImageDataset("few", torch.zeros(30, 1, 2, 2, dtype=torch.uint8), labels, tuple("abcd"))
    targets = targets_of(images, None, 0.2, None)
    ours = make_loss(TrainingConfig(loss="cross-entropy"))(logits, targets)
    close(ours, functional.cross_entropy(logits, labels, label_smoothing=0.2))
    assert targets_of(images, None, 0.0, None) is labels
    assert targets_of(images, None, 0.2, 6).shape == (30, 6)  # a network may have more classes than the data
    soft = torch.rand(30, 4).softmax(1)
    close(targets_of(images, soft, 0.2, None), 0.8 * soft + 0.05)


def test_a_training_of_before_goes_on_though_its_settings_know_nothing_of_softened_labels(tmp_path: Path) -> None:
    config = student()
    splits = load_splits(config)
    now = settings_of(splits, config.training, starting_network(config, splits, tmp_path)[1])
    assert "label_smoothing: null" in now
    check_same_run("".join(line for line in now.splitlines(True) if "label_smoothing" not in line), now, tmp_path)
    assert replace(STUDENT, label_smoothing=0.0) == STUDENT


@pytest.mark.parametrize(
    ("soft", "sentence"),
    [
        (torch.full((29, 4), 0.25), r"shape \(29, 4\); a probability for each of 30 training images and 4 classes"),
        (torch.full((30, 3), 1 / 3), r"shape \(30, 3\)"),
        (torch.zeros(30, dtype=torch.int64), "int64"),
        (torch.full((30, 4), 0.3), "does not sum to 1"),
        (torch.tensor([[1.5, -0.5, 0.0, 0.0]]).repeat(30, 1), "negative somewhere"),
        (torch.full((30, 4), torch.nan), "does not sum to 1"),
    ],
)
def test_soft_labels_that_are_no_probabilities_are_refused(soft: Tensor, sentence: str) -> None:
    labels = torch.arange(30) % 4
    images = ImageDataset("few", torch.zeros(30, 1, 2, 2, dtype=torch.uint8), labels, tuple("abcd"))
    splits = DataSplits(images, None, images, "f")
    with pytest.raises(InvalidArgument, match=sentence):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), splits, STUDENT, soft_labels=soft)


def test_a_training_takes_the_soft_labels_of_its_own_images() -> None:
    """Of an image that says which one it is, with a random label each: they are learned, and the given ones are not."""
    count = 40
    pixels = torch.zeros(count, 1, 1, count, dtype=torch.uint8)
    pixels[torch.arange(count), 0, 0, torch.arange(count)] = 255
    given, taught = torch.randint(0, 3, (count,)), torch.randint(0, 3, (count,))
    images = ImageDataset("each its own", pixels, given, tuple("abc"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(count, 3))
    config = TrainingConfig(
        epochs=60, batch_size=10, lr=0.3, optimiser="adam", loss="cross-entropy", precision="32", device="cpu"
    )
    soft = functional.one_hot(taught, 3).float()
    summary = fit(model, DataSplits(images, None, images, "f"), config, soft_labels=soft)
    assert torch.equal(model(to_unit_range(pixels)).argmax(1), taught)
    assert summary.metrics["accuracy"] == pytest.approx((given == taught).double().mean().item(), abs=0.03)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_teacher_says_the_softmax_of_its_logits(mirrored: bool, teacher: Path, tmp_path: Path) -> None:
    config = student(teacher, training=replace(STUDENT, flip=mirrored))
    splits = load_splits(config)
    said = teacher_labels(config, splits, tmp_path, starting_network(config, splits, tmp_path)[1])
    network, pixels = load(teacher), to_unit_range(splits.train.images)
    with torch.no_grad():
        logits = (network(pixels) + network(pixels.flip(-1))) / 2 if mirrored else network(pixels)
    close(said.probabilities, logits.softmax(1))
    assert said.seconds > training_facts(teacher)["train_seconds"]


def test_a_teacher_is_as_sure_as_its_own_loss_takes_it_to_be(tmp_path: Path) -> None:
    train_run(student(training=replace(STUDENT, temperature=0.125)), tmp_path / "teacher")
    config = student(tmp_path / "teacher")
    splits = load_splits(config)
    said = teacher_labels(config, splits, tmp_path, {"teacher": weights_hash(tmp_path / "teacher")})
    with torch.no_grad():
        logits = load(tmp_path / "teacher")(to_unit_range(splits.train.images))
    close(said.probabilities, (8 * logits).softmax(1))


def test_a_taught_run_says_so_and_its_certificate_holds(teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_run(student(teacher), out)
    checkpoint = find_checkpoint(out)
    assert checkpoint is not None
    described = stored_description(checkpoint)
    assert (described["teacher"], described["teacher_share"]) == (weights_hash(teacher), 0.7)
    assert [entry["train_images"] for entry in described["seen"]] == [1438]
    assert certify_run(out).proved
    page = report_run(out).read_text(encoding="utf-8")
    assert "that of its teacher, " in page
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["teacher_seconds"] > training_facts(teacher)["train_seconds"]
    train_run(student(), tmp_path / "alone")
    assert weights_hash(tmp_path / "alone") != weights_hash(out)
    assert write_metrics(tmp_path / "alone")["teacher_seconds"] is None
    assert "its teacher" not in report_run(tmp_path / "alone").read_text(encoding="utf-8")


class Killed(Exception):
    pass


def stopped_after(steps: int, config: RunConfig, out: Path) -> None:
    """Ends as a kill would after the checkpoint of a step."""
    from dynablocks.training import loop

    original = loop.take_step
    done = 0

    def step(session: Any) -> None:
        nonlocal done
        if done == steps:
            session.save()
            raise Killed
        original(session)
        done += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "take_step", step)
        with pytest.raises(Killed):
            train_run(config, out)


def test_a_taught_training_goes_on_without_its_teacher_to_the_same_bits(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(teacher, tmp_path / "teacher")
    config = student(source)
    train_run(config, tmp_path / "calm")
    stopped_after(2, config, tmp_path / "out")
    shutil.rmtree(source)
    with pytest.raises(BadCheckpoint, match="teacher is not a run directory"):
        train_run(config, tmp_path / "new")
    assert estimate(config, tmp_path / "out")["cached"] == "training (resumes)"
    train_run(config, tmp_path / "out")
    assert f"--teacher {source} holds no trained network now" in capsys.readouterr().err
    assert weights_hash(tmp_path / "out") == weights_hash(tmp_path / "calm")
    with pytest.raises(BadCheckpoint, match=r"model\.teacher_share 0\.7, this one has 0\.5"):
        train_run(replace(config, teacher_share=0.5), tmp_path / "out")
    (tmp_path / "out" / "teacher.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="teacher is not a run directory"):
        train_run(config, tmp_path / "out")


def test_what_a_teacher_said_is_asked_again_where_the_file_is_damaged(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    ask = beginning.predictions

    def counted(directory: Path, *given: Any) -> Tensor:
        asked.append(directory)
        return ask(directory, *given)

    monkeypatch.setattr(beginning, "predictions", counted)
    out = tmp_path / "run"
    for _ in range(2):
        train_run(student(teacher), out)
    assert asked == [teacher]
    file = out / "teacher.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for _ in range(2):
        train_run(student(teacher), out)
        assert asked == [teacher, teacher]
    with pytest.raises(BadCheckpoint, match=r"training\.flip False, this one has True"):
        train_run(student(teacher, training=replace(STUDENT, flip=True)), out)
    assert asked == [teacher, teacher]
    train_run(student(), out, overwrite=True)
    assert not file.exists()


def other_classes(splits: DataSplits) -> DataSplits:
    names = tuple(f"class {name}" for name in splits.train.class_names)
    return replace(splits, train=replace(splits.train, class_names=names), test=replace(splits.test, class_names=names))


def smaller(splits: DataSplits) -> DataSplits:
    parts = {role: getattr(splits, role) for role in ("train", "test")}
    return replace(splits, **{role: replace(part, images=part.images[..., :-1]) for role, part in parts.items()})


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (other_classes, BadData, "class 0 is 'class "),
        (smaller, InvalidArgument, r"takes images of shape \(1, 8, 8\) and knows 10 classes, these have \(1, 8, 7\)"),
    ],
)
def test_a_teacher_of_other_images_is_refused(
    change: Callable[[DataSplits], DataSplits], error: type[Exception], sentence: str, teacher: Path, tmp_path: Path
) -> None:
    config = student(teacher, model=ModelConfig("convnet", widths=(4,), layers=(1,)))
    with pytest.raises(error, match=sentence):
        train_run(config, tmp_path / "run", splits=change(load_splits(config)))
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_saw_the_images_held_out_is_refused_also_through_its_student(
    teacher: Path, tmp_path: Path
) -> None:
    held_out = DataConfig("digits", validation=9)
    with pytest.raises(InvalidArgument, match=r"--teacher .* was trained on images that are held out here"):
        train_run(student(teacher, data=held_out), tmp_path / "run")
    train_run(convnet(data=DataConfig("digits", validation=20)), tmp_path / "careful")
    train_run(student(tmp_path / "careful", data=held_out), tmp_path / "run")
    with pytest.raises(InvalidArgument, match="--teacher and --out are both"):
        train_run(student(tmp_path / "run", data=held_out), tmp_path / "run")
    # Of two trainings on another copy one has a teacher that was trained on this one.
    elsewhere = replace(load_splits(student()), fingerprint="of another copy")
    for name, source in (("alone", None), ("taught", teacher)):
        train_run(student(source), tmp_path / name, splits=elsewhere)
    train_run(student(data=held_out, warm_start=tmp_path / "alone"), tmp_path / "from alone")
    with pytest.raises(InvalidArgument, match=r"--warm_start .* held out here"):
        train_run(student(data=held_out, warm_start=tmp_path / "taught"), tmp_path / "from taught")


def test_an_unfinished_teacher_is_refused(tmp_path: Path) -> None:
    stopped_after(2, convnet(), tmp_path / "teacher")
    with pytest.raises(BadCheckpoint, match="is not finished"):
        train_run(student(tmp_path / "teacher"), tmp_path / "run")


def test_the_share_of_a_teacher_needs_one() -> None:
    with pytest.raises(InvalidArgument, match=r"teacher_share is 0\.5 without a teacher"):
        student(teacher_share=0.5)
    for share in (0.0, 1.1):
        with pytest.raises(InvalidArgument, match="teacher_share"):
            student(Path("run"), teacher_share=share)
    config = student(Path("run"), teacher_share=0.5)
    assert from_yaml(to_yaml(config), "here") == config
    earlier = "\n".join(line for line in to_yaml(student()).splitlines() if not line.startswith("teacher"))
    assert from_yaml(earlier, "here") == student()


def test_a_convnet_has_no_guarantee_and_says_so(teacher: Path) -> None:
    network = load(teacher)
    assert network.properties == build(network.config, (1, 8, 8), 10).properties
    assert not list(network.properties)
    assert not certify_run(shutil.copytree(teacher, teacher.parent / "certified")).radii.any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"widths": (4, 4, 4, 4), "layers": (1, 1, 1, 1)}, "8 x 8 pixels have none left before stage 3 of 4"),
        ({"widths": (4,), "layers": (0,)}, r"layers is \[0\]; each stage of a convnet needs at least 1"),
        ({"widths": (4,), "layers": (1,), "kernel_size": 2}, "kernel_size is 2; a convnet takes odd ones"),
        ({"widths": (4,), "layers": (1,), "rows": 0.5}, "model convnet has no such setting"),
    ],
)
def test_a_convnet_that_cannot_be_built_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        build(ModelConfig("convnet", **options), (1, 8, 8), 10)


def test_a_convnet_of_one_number_a_channel_refuses_batches_of_one() -> None:
    network = build(ModelConfig("convnet", widths=(4, 4), layers=(1, 1)), (1, 5, 5), 10)
    with pytest.raises(InvalidArgument, match="batches of one image leave one"):
        network(torch.rand(1, 1, 5, 5))
    assert network.eval()(torch.rand(1, 1, 5, 5)).shape == (1, 10)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_kernels_of_a_convnet_keep_the_size(size: int) -> None:
    network = build(ModelConfig("convnet", widths=(4, 6), layers=(2, 1), kernel_size=size), (3, 9, 12), 5)
    assert network(torch.rand(2, 3, 9, 12)).shape == (2, 5)


def test_the_preset_of_a_convnet_is_an_ordinary_training() -> None:
    colour, digits = (preset_settings("cpu", "convnet", data) for data in ("cifar10", "digits"))
    assert TrainingConfig(**colour["training"]).max_minutes == 10
    assert TrainingConfig(**digits["training"]).flip is False
    build(ModelConfig("convnet", **digits["model"]), (1, 8, 8), 10)


def test_the_public_losses_say_what_the_labels_may_be() -> None:
    logits = torch.tensor([[0.2, 0.0]])
    half = torch.tensor([[0.5, 0.5]])
    assert hinge(logits, half, 0.3).item() == pytest.approx((0.1 + 0.5) / 2)
    both = [offset_cross_entropy(logits, torch.tensor([k]), 0.1, 0.5).item() for k in (0, 1)]
    assert offset_cross_entropy(logits, half, 0.1, 0.5).item() == pytest.approx(sum(both) / 2)
