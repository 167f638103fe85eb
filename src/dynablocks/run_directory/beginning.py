"""What a training takes from other runs: the weights that it begins with, and what a teacher says of its images."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynablocks.config import RunConfig
from dynablocks.data import DataSplits, ImageDataset, to_unit_range
from dynablocks.errors import BadCheckpoint, InvalidArgument
from dynablocks.files import expanded, is_number, key_of, read_keyed_tensors, resolved, write_keyed_tensors
from dynablocks.linear import frozen_weights
from dynablocks.models import Network
from dynablocks.modes import cpu_threads
from dynablocks.progress import progress_bar, tell
from dynablocks.run_directory.network import (
    build_for,
    load,
    load_config,
    require_checkpoint,
    stored_description,
    weights_hash,
)
from dynablocks.run_directory.results import require_own_classes, training_facts
from dynablocks.run_files import CONFIG, TEACHER_LABELS
from dynablocks.training import TrainingConfig, find_checkpoint
from dynablocks.training.checkpoint import bad_settings, read_settings
from dynablocks.training.losses import logit_scale
from dynablocks.training.precision import present_device, supports_bf16

ORIGIN = ("warm_start", "teacher", "teacher_share", "seen")
"""What a checkpoint says of the runs that its training took something from."""
PREDICTED_AT_ONCE = 512


def starting_network(
    config: RunConfig, splits: DataSplits, directory: Path, *, resume: bool = True
) -> tuple[Network, dict[str, Any]]:
    """The network as its training in ``directory`` begins, and what decides that beside the settings of the training.

    A training that goes on there has its weights in its checkpoint and what its teacher said beside it: where one of
    those runs is gone, or holds no network any more, what the checkpoint says of it counts.

    Args:
        config: the configuration.
        splits: its images.
        directory: where it is trained.
        resume: whether a training in ``directory`` goes on; otherwise all is trained anew.

    Raises:
        InvalidArgument: nothing can be taken from ``config.warm_start`` or ``config.teacher``: that is ``directory``
            itself, was trained on images that are held out now, or has another body (a teacher: takes other images).
        BadData: the teacher's classes are others than those of the images.
        BadCheckpoint: one of them holds no trained network, and ``directory`` no training that took something there.
    """
    network, description = build_for(config, splits)
    seen: list[dict[str, Any]] = []
    origin: dict[str, Any] = {}
    for option, source in (("warm_start", config.warm_start), ("teacher", config.teacher)):
        if source is None:
            continue
        source = expanded(source)
        if resolved(source) == resolved(directory):
            raise InvalidArgument(f"--{option} and --out are both {directory}; give another --out.")
        try:
            origin[option], theirs = weights_hash(source), seen_by(source)
            require_unseen(source, config.training.seed, splits, option)
            if option == "warm_start":
                take_body(network, source)
            else:
                require_teacher(source, splits)
        except BadCheckpoint:
            stored = stored_origin(directory) if resume else {}
            if option not in stored:
                raise
            origin[option], theirs = stored[option], stored.get("seen", [])
            tell(f"note: --{option} {source} holds no trained network now; {directory} keeps what it took from one.")
        seen += [entry for entry in theirs if entry not in seen]
    origin |= {"teacher_share": config.teacher_share} if config.teacher is not None else {}
    return network, description | origin | ({"seen": seen} if origin else {})


def stored_origin(directory: Path) -> dict[str, Any]:
    """What the checkpoint in ``directory`` says of the runs that its training took something from; nothing of none."""
    checkpoint = find_checkpoint(directory)
    model: dict[str, Any] = {} if checkpoint is None else stored_description(checkpoint)
    return {name: model[name] for name in ORIGIN if name in model}


def take_body(network: Network, directory: Path) -> None:
    """Give ``network`` the trained weights of a run, but for the last layer and the normalisation of its own images.

    Raises:
        InvalidArgument: the run's network has another body.
    """
    trained = load(directory)
    own = {f"0.{name}": value for name, value in network.body[0].state_dict().items()}
    try:
        network.body.load_state_dict(trained.body.state_dict() | own)
    except RuntimeError as error:
        raise InvalidArgument(
            f"the network in {directory} has another body than {network.config.name} with these settings; "
            "give a --warm_start of the same model and widths."
        ) from error


def seen_by(directory: Path) -> list[dict[str, Any]]:
    """What the weights of a run were trained on, over all its warm starts: copy, images, seed; latest last.

    Raises:
        BadCheckpoint: its checkpoint does not say.
    """
    checkpoint = require_checkpoint(directory)
    stored = read_settings(checkpoint)
    try:
        data, earlier = stored["data"], stored["model"].get("seen", [])
        own = {name: data[name] for name in ("fingerprint", "train_images")} | {"seed": stored["training"]["seed"]}
        seen = [*earlier, own]
        if not all(is_number(entry["train_images"]) and {"fingerprint", "seed"} <= entry.keys() for entry in seen):
            raise ValueError("it is not said of which images an entry is")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad_settings(checkpoint / CONFIG, error) from error
    return seen


def require_unseen(directory: Path, seed: int, splits: DataSplits, option: str = "warm_start") -> None:
    """Refuse a run that was trained on images held out now: they would be no judge of the training that follows.

    Raises:
        InvalidArgument: the run, or one that it started from, trained on such images of the same copy.
    """
    if splits.validation is None:
        return
    for data in seen_by(directory):
        # Of one seed, a larger validation set contains a smaller one.
        nested = data["seed"] == seed and data["train_images"] <= len(splits.train)
        if data["fingerprint"] == splits.fingerprint and not nested:
            raise InvalidArgument(
                f"--{option} {directory} was trained on images that are held out here; train it (and what it started "
                f"from) with --data.validation {len(splits.validation)} and --training.seed {seed} too, or leave "
                f"--{option} out."
            )


def require_teacher(directory: Path, splits: DataSplits) -> None:
    """Refuse a teacher that says nothing of these images.

    Raises:
        InvalidArgument: it takes images of another shape, or has another number of classes.
        BadData: its classes are others, or in another order.
        BadCheckpoint: its training is not finished.
    """
    facts, network = training_facts(directory), load(directory)
    require_own_classes(facts, splits)
    theirs, ours = (network.input_shape, network.num_classes), (splits.train.image_shape, splits.train.num_classes)
    if theirs != ours:
        raise InvalidArgument(
            f"--teacher {directory} takes images of shape {theirs[0]} and knows {theirs[1]} classes, these have "
            f"{ours[0]} and {ours[1]}; give a teacher that was trained on such images."
        )


@dataclass(frozen=True)
class TeacherLabels:
    """What a teacher says of the training images.

    Args:
        probabilities: of the classes, for each image, (N, classes).
        seconds: that its training and these predictions took.
    """

    probabilities: Tensor
    seconds: float

    def mixed(self, labels: Tensor, share: float) -> Tensor:
        r"""Soft labels of which the teacher has a share λ: :math:`λ p + (1 - λ) e_y`.

        Example:
            >>> said = TeacherLabels(torch.tensor([[0.5, 0.5]]), 0.0)
            >>> said.mixed(torch.tensor([1]), 0.5)
            tensor([[0.2500, 0.7500]])
        """
        certain = torch.nn.functional.one_hot(labels, self.probabilities.shape[1]).float()
        return share * self.probabilities + (1 - share) * certain


def teacher_labels(config: RunConfig, splits: DataSplits, directory: Path, origin: Mapping[str, Any]) -> TeacherLabels:
    """What the teacher of a configuration says of its training images: as kept in ``directory``, or asked now.

    Args:
        config: the configuration, which has a teacher.
        splits: its images.
        directory: where it is trained.
        origin: what :func:`starting_network` says of the teacher.

    Raises:
        BadCheckpoint: nothing is kept, and the teacher is gone.
    """
    assert config.teacher is not None
    path, key = directory / TEACHER_LABELS, labels_key(config, splits, origin)
    kept = read_keyed_tensors(path, key)
    if kept is not None:
        return TeacherLabels(kept[0]["probabilities"], float(kept[1]["seconds"]))
    source, started = expanded(config.teacher), time.perf_counter()
    require_checkpoint(source)
    facts = training_facts(source)
    with cpu_threads(config.training.threads):
        probabilities = predictions(source, facts, splits.train, config.training)
    own = facts.get("teacher_seconds")
    spent = facts["train_seconds"] + (own if is_number(own) else 0.0)
    return TeacherLabels(probabilities, spent + time.perf_counter() - started)


def require_labels(config: RunConfig, splits: DataSplits, directory: Path, origin: Mapping[str, Any]) -> None:
    """Refuse a training whose teacher is gone where what it said is not kept.

    Raises:
        BadCheckpoint: it is.
    """
    if config.teacher is not None:
        kept = read_keyed_tensors(directory / TEACHER_LABELS, labels_key(config, splits, origin))
        if kept is None:
            require_checkpoint(expanded(config.teacher))


def keep_labels(
    labels: TeacherLabels, config: RunConfig, splits: DataSplits, directory: Path, origin: Mapping[str, Any]
) -> None:
    """Write what :func:`teacher_labels` found, so that the training goes on with the very bits, and without a teacher.

    Raises:
        DynablocksError: the disk is full, or the place is not writable.
    """
    path, key = directory / TEACHER_LABELS, labels_key(config, splits, origin)
    if read_keyed_tensors(path, key) is None:
        write_keyed_tensors(path, {"probabilities": labels.probabilities}, key, seconds=repr(labels.seconds))


def labels_key(config: RunConfig, splits: DataSplits, origin: Mapping[str, Any]) -> str:
    """What decides the predictions of a teacher: its weights, the images and whether they are mirrored."""
    held_out = len(splits.train), config.training.seed
    return key_of(origin["teacher"], splits.fingerprint, held_out, config.training.flip)


@torch.no_grad()
def predictions(directory: Path, facts: Mapping[str, Any], images: ImageDataset, training: TrainingConfig) -> Tensor:
    r"""Probabilities of the classes by the network of a run, for each image, (N, classes).

    .. math:: \mathrm{softmax}(z / t)

    with the temperature t of its own loss, and where images are mirrored in training the mean logits z of both: so an
    image has one label. In bfloat16 where the run was trained in it and the device has it.

    Args:
        directory: the run.
        facts: its :func:`~dynablocks.run_directory.results.training_facts`.
        images: the images.
        training: the settings of the training that they are for, which say the device and whether it mirrors images.
    """
    temperature = logit_scale(load_config(directory).training)
    device = torch.device(present_device(training.device))
    network = load(directory).to(device)
    short = facts["precision"] == "bf16" and supports_bf16(device)
    found: list[Tensor] = []
    parts = torch.split(images.images, PREDICTED_AT_ONCE)
    with (
        frozen_weights(network),
        progress_bar(f"asking the teacher about {len(images)} images") as update,
        torch.autocast(device.type, torch.bfloat16, enabled=short),
    ):
        for number, part in enumerate(parts, start=1):
            pixels = to_unit_range(part.to(device)).contiguous(memory_format=torch.channels_last)
            logits = network(pixels).float()
            logits = (logits + network(pixels.flip(-1)).float()) / 2 if training.flip else logits
            found.append((logits / temperature).softmax(1).cpu())
            update(number / len(parts))
    return torch.cat(found)
