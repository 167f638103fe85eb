"""Trainings that begin with the weights of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynablocks.config import RunConfig
from dynablocks.data import DataSplits
from dynablocks.errors import InvalidArgument
from dynablocks.models import Network
from dynablocks.run_directory.network import build_for, load, require_checkpoint, weights_hash
from dynablocks.training import read_config


def build_untrained(config: RunConfig, splits: DataSplits) -> tuple[Network, dict[str, Any]]:
    """The untrained network, and what decides its training beside the settings of the training."""
    network, description = build_for(config, splits)
    if config.warm_start is not None:
        description["warm_start"] = weights_hash(config.warm_start)
        description["seen"] = seen_by(config.warm_start)
    return network, description


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
    """What the weights of a run were trained on, over all its warm starts: copy, images, seed; latest last."""
    import yaml

    stored = yaml.safe_load(read_config(require_checkpoint(directory)))
    data, earlier = stored["data"], stored["model"].get("seen", [])
    own = {name: data[name] for name in ("fingerprint", "train_images")} | {"seed": stored["training"]["seed"]}
    return [*earlier, own]


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
