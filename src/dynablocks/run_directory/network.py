"""The images and the network of a run: described in its checkpoints, built again from there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dynablocks.config import DataConfig, RunConfig, from_yaml
from dynablocks.data import DataSplits, ImageDataset, infer_name, load_data
from dynablocks.errors import BadCheckpoint, DynablocksError, InvalidArgument
from dynablocks.files import expanded, read_json, sha256
from dynablocks.linear import ORTHOGONAL
from dynablocks.models import MODELS, ModelConfig, ModelKind, Network, build
from dynablocks.registry import Registry
from dynablocks.run_directory.source import is_hashed
from dynablocks.run_files import CONFIG, TRAINING, WEIGHTS
from dynablocks.switching import REGIONS, set_progress
from dynablocks.training import find_checkpoint, load_weights
from dynablocks.training.checkpoint import bad_settings, read_settings, read_state

PIXEL_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
}
"""Channel means and mean per-image standard deviations, as the paper normalises (design D3)."""

NAMED: dict[str, Registry[Any]] = {"name": MODELS, "region": REGIONS, "method": ORTHOGONAL}
"""The settings of a model that are names, and where these are registered."""


def data_name(config: DataConfig) -> str:
    """The data set's name: as given, or as found in the folder, or digits."""
    if config.name is not None:
        return config.name
    return "digits" if config.dir is None else infer_name(config.dir)


def load_splits(config: RunConfig) -> DataSplits:
    """The images of a configuration."""
    return load_data(data_name(config.data), config.data.dir, config.data.validation, config.training.seed)


def with_data(config: RunConfig, data: DataConfig | None) -> RunConfig:
    """The configuration with its images where ``data`` says that they are now; the same where it does not say."""
    if data is None or data.dir is None:
        return config
    return replace(config, data=replace(config.data, dir=data.dir))


def pixel_statistics(train: ImageDataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, for the model's first layer: the paper's, or measured."""
    known = PIXEL_STATISTICS.get(train.name.removesuffix("-jpeg"))
    if known is not None:
        return known
    shades = torch.arange(256, dtype=torch.float64) / 255
    channels = range(train.image_shape[0])
    counts = torch.stack([torch.bincount(train.images[:, c].flatten(), minlength=256) for c in channels]).double()
    pixels = counts.sum(1)
    means = counts @ shades / pixels
    squares = counts * (shades - means[:, None]).square()
    deviations = (squares.sum(1) / (pixels - 1).clamp_min(1)).sqrt()
    return tuple(round(float(m), 4) for m in means), tuple(max(round(float(s), 4), 1e-3) for s in deviations)


def build_for(config: RunConfig, splits: DataSplits) -> tuple[Network, dict[str, Any]]:
    """The network of a configuration for its images, and the description from which :func:`load` builds it again."""
    mean, std = pixel_statistics(splits.train)
    shape = splits.train.image_shape
    classes = splits.train.num_classes
    network = build(config.model, shape, classes, mean=mean, std=std, seed=config.training.seed)
    description = {
        "config": asdict(network.config),
        "input_shape": list(shape),
        "num_classes": classes,
        "mean": list(mean),
        "std": list(std),
    }
    return network, description


def build_described(description: Mapping[str, Any]) -> Network:
    """The network that :func:`build_for` described, with new weights."""
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    channels, height, width = (int(n) for n in description["input_shape"])
    shape, classes = (channels, height, width), int(description["num_classes"])
    # Complete: a setting that came later has its default, and what is refused beside another choice is so for new ones.
    config = ModelConfig(**options)
    config = config.completed(MODELS.get_known(config.name).defaults)
    return build(config, shape, classes, mean=tuple(description["mean"]), std=tuple(description["std"]))


def stored_description(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its network, as :func:`build_for` described it; empty where it says nothing.

    Raises:
        BadCheckpoint: its settings are no YAML of groups, or one with aliases.
        DynablocksError: they cannot be read, and may be whole.
    """
    try:
        return dict(read_settings(checkpoint).get("model", {}))
    except (TypeError, ValueError) as error:
        raise bad_settings(checkpoint / CONFIG, error) from error


def require_names(config: Mapping[str, Any], where: str) -> None:
    """Refuse a description of a network that names what is not registered here, as of one's own that was not imported.

    Args:
        config: the settings of its model.
        where: the file that holds them.

    Raises:
        BadCheckpoint: nothing is registered under the name of the model, of its region or of its parametrisation.
        KeyError: the model has no name.
    """
    for setting, known in NAMED.items():
        name = config[setting] if known is MODELS else config.get(setting)
        if name is None and known is not MODELS:
            continue
        if not isinstance(name, str) or name not in known:
            raise BadCheckpoint(
                f"{where} is of {known.kind} {name!r}, and registered here are {', '.join(sorted(known))}; for one of "
                "your own, import the file that registers it in Python, and run the command there: "
                "dynablocks.cli.main([...])."
            )


def foreign_names(config: Mapping[str, Any]) -> list[str]:
    """The names in a model's settings that stand for code which the source hash does not cover, or for nothing here.

    Example:
        >>> foreign_names({"name": "prescribed", "region": "timid", "method": "cayley"})
        ['timid']
    """
    names = ((config.get(setting), known) for setting, known in NAMED.items())
    return [name for name, known in names if name is not None and not _is_shipped(known.get(name))]


def _is_shipped(thing: object) -> bool:
    if isinstance(thing, ModelKind):
        return all(_is_shipped(part) for part in (thing.build_body, thing.metric) if part is not None)
    return is_hashed(str(getattr(thing, "__module__", "")))


def load(directory: str | Path) -> Network:
    """The trained network of a run directory, in eval mode: pixels in [0, 1], NCHW, to logits.

    Args:
        directory: the run directory (``--out`` of ``dynablocks run`` or ``train``).

    Returns:
        The network, with ``.properties``, ``.input_shape`` and ``.class_names``: what its classes are called, by the
        position of their logits; ``None`` where the run stores no names.

    Raises:
        BadCheckpoint: there is no checkpoint, it is corrupt, its training is not finished, or its model, region or
            orthogonal parametrisation is not registered here.
    """
    directory = expanded(directory)
    checkpoint = require_checkpoint(directory)
    if not read_state(checkpoint).get("summary"):
        raise unfinished(directory)
    try:
        description = stored_description(checkpoint)
        require_names(description["config"], str(checkpoint / CONFIG))
        network = build_described(description)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpoint(
            f"{checkpoint / CONFIG} describes no network of this version ({error}); train again with --overwrite."
        ) from error
    load_weights(checkpoint, network)
    if not all(bool(torch.isfinite(p).all()) for p in network.state_dict().values() if p.is_floating_point()):
        raise BadCheckpoint(
            f"the weights in {checkpoint} hold NaN or infinity; restore a copy, or train with --overwrite."
        )
    set_progress(network, 1.0)
    network.class_names = _class_names(directory, network.num_classes)
    return network.eval()


def _class_names(directory: Path, count: int) -> tuple[str, ...] | None:
    """The names that the training stored; ``None`` where there are none, or not one for each class."""
    with contextlib.suppress(DynablocksError, AttributeError):
        names = read_json(directory / TRAINING).get("class_names")
        if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def unfinished(directory: Path) -> BadCheckpoint:
    """The sentence for a run whose training was stopped on the way."""
    return BadCheckpoint(
        f"the training in {directory} is not finished, and its steps may still move; the command that began it, "
        "without --overwrite, goes on from there."
    )


def require_checkpoint(directory: Path) -> Path:
    """The newest whole checkpoint of a run directory, or one sentence."""
    if not directory.is_dir():
        raise BadCheckpoint(f"{directory} is not a run directory; make one with: dynablocks train --out {directory}")
    checkpoint = find_checkpoint(directory)
    if checkpoint is None:
        raise BadCheckpoint(f"{directory} holds no checkpoint; make one with: dynablocks train --out {directory}")
    return checkpoint


def load_config(directory: str | Path) -> RunConfig:
    """The configuration a run directory was made with.

    Raises:
        BadCheckpoint: there is no checkpoint, the configuration cannot be read, or names what is not registered here.
        InvalidArgument: it is none of this version.
    """
    directory = expanded(directory)
    checkpoint, path = require_checkpoint(directory), directory / CONFIG
    try:
        return from_yaml(path.read_text(encoding="utf-8"), str(path))
    except InvalidArgument:
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            require_names(stored_description(checkpoint)["config"], str(checkpoint / CONFIG))
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadCheckpoint(
            f"{path} cannot be read ({reason}); the same training command, without --overwrite, writes it again."
        ) from error


def weights_hash(directory: Path) -> str:
    """SHA-256 of the run's weights: results of other weights are not reused."""
    return sha256(require_checkpoint(directory) / WEIGHTS)
