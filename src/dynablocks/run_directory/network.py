"""The images and the network of a run: described in its checkpoints, built again from there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from dynablocks.config import DataConfig, RunConfig, from_yaml
from dynablocks.data import DataSplits, ImageDataset, infer_name, load_data
from dynablocks.errors import BadCheckpoint, DynablocksError, InvalidArgument
from dynablocks.files import expanded, is_number, plain_data, read_json, sha256, tuples
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

_PUT_BACK = (
    "put the checkpoint of this run back; where that is its own, its training command, without --overwrite, writes "
    "this file again"
)
"""What to do where a run directory holds the checkpoint of another one."""


def data_name(config: DataConfig) -> str:
    """The data set's name: as given, or as found in the folder, or digits."""
    if config.name is not None:
        return config.name
    return "digits" if config.dir is None else infer_name(config.dir)


def load_splits(config: RunConfig, *, hold_out: bool = True) -> DataSplits:
    """The images of a configuration; without a hold-out for what needs the test images alone, of any copy."""
    held_out = config.data.validation if hold_out else 0
    return load_data(data_name(config.data), config.data.dir, held_out, config.training.seed)


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
    options = tuples(description["config"])
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
    return [name for name, known in names if name is not None and not is_shipped(known.get(name))]


def is_shipped(thing: object) -> bool:
    """Whether the source hash covers the code of a registered thing, and of what it wraps, closes over, or defaults to.

    A function has the code of the module in which it was written, whatever its ``__module__`` says: that of a function
    of one's own which wraps one of the library (:func:`functools.wraps`) is the library's.

    Example:
        >>> from dynablocks.models.paper import stages
        >>> is_shipped(MODELS["prescribed"]), is_shipped(stages(lambda config, shape: None))
        (True, False)
    """
    waiting, seen = [thing], set[int]()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if not is_hashed(_home(part)):
            return False
        waiting += _made_of(part)
    return True


def _home(thing: object) -> str:
    """The module in which the code of a thing was written; empty of what may hold any code, such as a partial."""
    if isinstance(thing, FunctionType):
        return str(thing.__globals__.get("__name__", ""))
    return str(thing.__module__) if isinstance(thing, (type, ModelKind)) else ""


def _made_of(thing: object) -> Iterator[object]:
    """The functions of a model; what a function wraps, and what it can call of its defaults and where it was made."""
    if isinstance(thing, ModelKind):
        yield from (part for part in (thing.build_body, thing.metric) if part is not None)
    if not isinstance(thing, FunctionType):
        return
    if hasattr(thing, "__wrapped__"):
        yield thing.__wrapped__
    yield from filter(callable, (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()))
    for cell in thing.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing has been put there yet
            content = cell.cell_contents
            if callable(content):
                yield content


def load(directory: str | Path) -> Network:
    """The trained network of a run directory, in eval mode: pixels in [0, 1], NCHW, to logits.

    Args:
        directory: the run directory (``--out`` of ``dynablocks run`` or ``train``).

    Returns:
        The network, with ``.properties``, ``.input_shape`` and ``.class_names``: what its classes are called, by the
        position of their logits; ``None`` where the run stores no names.

    Raises:
        BadCheckpoint: there is no checkpoint, it is corrupt, its training is not finished or is not the one that
            ``training.json`` tells of, or its model, region or orthogonal parametrisation is not registered here.
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
    network.class_names = _class_names(directory, checkpoint, network.num_classes)
    return network.eval()


def _class_names(directory: Path, checkpoint: Path, count: int) -> tuple[str, ...] | None:
    """The names that the training stored; ``None`` where there are none, or not one for each class.

    Raises:
        BadCheckpoint: they are those of another training than the checkpoint's.
    """
    try:
        facts = read_json(directory / TRAINING)
    except DynablocksError:
        return None
    if not isinstance(facts, dict):
        return None
    require_own_checkpoint(directory, facts, checkpoint)
    names = facts.get("class_names")
    if isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def require_own_checkpoint(directory: Path, facts: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint of another training than ``training.json`` tells of, such as one copied from another run.

    The images, the steps and the seconds tell trainings apart; what one of the two does not say is not compared.

    Args:
        directory: the run directory.
        facts: what its ``training.json`` holds.
        checkpoint: its newest whole checkpoint.

    Raises:
        BadCheckpoint: naming what they differ in.
    """
    stored = _group(read_settings(checkpoint), "data") | _group(read_state(checkpoint), "summary")
    for name in ("fingerprint", "steps", "train_seconds"):
        ours, theirs = facts.get(name), stored.get(name)
        known = all(isinstance(value, str) or is_number(value) for value in (ours, theirs))
        if known and ours != theirs:
            raise BadCheckpoint(
                f"{directory / TRAINING} tells of a training with {name} {_short(ours)}, and {checkpoint} is of one "
                f"with {_short(theirs)}; {_PUT_BACK}."
            )


def _group(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A group of settings or facts; an empty one where it is none."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _short(value: object) -> str:
    return f"{value[:16]}…" if isinstance(value, str) else f"{value}"


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
        BadCheckpoint: there is no checkpoint, or one of a network with other settings; the configuration cannot be
            read, or names what is not registered here.
        InvalidArgument: it is none of this version.
    """
    directory = expanded(directory)
    checkpoint, path = require_checkpoint(directory), directory / CONFIG
    try:
        config = from_yaml(path.read_text(encoding="utf-8"), str(path))
    except InvalidArgument:
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            require_names(stored_description(checkpoint)["config"], str(checkpoint / CONFIG))
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadCheckpoint(
            f"{path} cannot be read ({reason}); the same training command, without --overwrite, writes it again."
        ) from error
    _require_own_settings(path, config, checkpoint)
    return config


def _require_own_settings(path: Path, config: RunConfig, checkpoint: Path) -> None:
    """Refuse a configuration of another network than the checkpoint's, as where that was copied from another run.

    An empty setting is not compared: it is the default of the version that trained, which need not be that of today.

    Raises:
        BadCheckpoint: naming the first setting that differs.
    """
    stored = read_settings(checkpoint)
    described = _group(_group(stored, "model"), "config")
    trained = {f"model.{name}": value for name, value in described.items()}
    trained["seed"] = _group(stored, "training").get("seed", config.training.seed)
    given = {f"model.{name}": value for name, value in plain_data(asdict(config.model)).items()}
    for name, value in (given | {"seed": config.training.seed}).items():
        if value is not None and name in trained and trained[name] != value:
            raise BadCheckpoint(
                f"{path} says {name} {value!r}, and the network in {checkpoint} was trained with {trained[name]!r}; "
                f"{_PUT_BACK}."
            )


def weights_hash(directory: Path) -> str:
    """SHA-256 of the run's weights: results of other weights are not reused."""
    return sha256(require_checkpoint(directory) / WEIGHTS)
