"""Trainings that begin with the weights of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynablocks.config import RunConfig
from dynablocks.data import DataSplits
from dynablocks.errors import BadCheckpoint, InvalidArgument
from dynablocks.files import expanded, is_number, resolved
from dynablocks.models import Network
from dynablocks.progress import tell
from dynablocks.run_directory.network import build_for, load, require_checkpoint, stored_description, weights_hash
from dynablocks.run_files import CONFIG
from dynablocks.training import find_checkpoint
from dynablocks.training.checkpoint import bad_settings, read_settings


def starting_network(
    config: RunConfig, splits: DataSplits, directory: Path, *, resume: bool = True
) -> tuple[Network, dict[str, Any]]:
    """The network as its training in ``directory`` begins, and what decides that beside the settings of the training.

    A training that goes on there has its weights in its checkpoint: where the run it started from is gone, or holds no
    network any more, what the checkpoint says of it counts.

    Args:
        config: the configuration.
        splits: its images.
        directory: where it is trained.
        resume: whether a training in ``directory`` goes on; otherwise all is trained anew.

    Raises:
        InvalidArgument: its weights cannot come from ``config.warm_start``: that is ``directory`` itself, has another
            body, or was trained on images that are held out now.
        BadCheckpoint: ``config.warm_start`` holds no trained network, and ``directory`` no training that started there.
    """
    start = None if config.warm_start is None else expanded(config.warm_start)
    if start is not None and resolved(start) == resolved(directory):
        raise InvalidArgument(f"--warm_start and --out are both {directory}; give another --out.")
    network, description = build_for(config, splits)
    if start is None:
        return network, description
    try:
        origin: dict[str, Any] = {"warm_start": weights_hash(start), "seen": seen_by(start)}
        require_unseen(start, config.training.seed, splits)
        take_body(network, start)
    except BadCheckpoint:
        origin = stored_origin(directory) if resume else {}
        if not origin:
            raise
        tell(f"note: --warm_start {start} holds no trained network now; {directory} keeps what it took from one.")
    return network, description | origin


def stored_origin(directory: Path) -> dict[str, Any]:
    """What the checkpoint in ``directory`` says of the run that its training started from; nothing where it did not."""
    checkpoint = find_checkpoint(directory)
    model: dict[str, Any] = {} if checkpoint is None else stored_description(checkpoint)
    return {name: model[name] for name in ("warm_start", "seen") if name in model}


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


def require_unseen(directory: Path, seed: int, splits: DataSplits) -> None:
    """Refuse weights that were trained on images held out now: they would be no judge of the training that follows.

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
                f"--warm_start {directory} was trained on images that are held out here; train it (and what it started "
                f"from) with --data.validation {len(splits.validation)} and --training.seed {seed} too, or start from "
                "new weights."
            )
