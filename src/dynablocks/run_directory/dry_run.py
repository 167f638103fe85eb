"""What ``--dry-run`` says: what a run would cost, and what its directory holds already."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from dynablocks.config import RunConfig
from dynablocks.data import DataSplits, to_unit_range
from dynablocks.errors import BadCheckpoint
from dynablocks.models import Network
from dynablocks.modes import cpu_threads
from dynablocks.robustness import AttackConfig
from dynablocks.run_directory.beginning import require_labels, starting_network
from dynablocks.run_directory.network import load_splits
from dynablocks.run_directory.results import (
    ATTACK,
    CERTIFICATE,
    attack_settings,
    matching_attack,
    matching_certificate,
    restored,
)
from dynablocks.run_files import TRAINING
from dynablocks.training import TrainingConfig, choose_device, find_checkpoint
from dynablocks.training.checkpoint import read_state
from dynablocks.training.loop import earlier_checkpoint, require_budget, settings_of
from dynablocks.training.precision import synchronise
from dynablocks.training.session import device_for


def estimate(config: RunConfig, directory: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """What ``--dry-run`` says: parameters, cost of a training step, number of steps, time estimate, what is cached.

    Raises:
        InvalidArgument: the training would be refused: for its warm start or teacher, or as :func:`device_for` says.
        BadCheckpoint: its teacher is gone, and what that said is not kept.
    """
    splits, training = load_splits(config), config.training
    network, description = starting_network(config, splits, directory, resume=not overwrite)
    require_labels(config, splits, directory, description)
    state, refusal = _earlier(directory, training, settings_of(splits, training, description), overwrite)
    if state.get("summary"):  # it is taken as it is, on any machine
        device = torch.device(choose_device(training.device))
    else:
        device = torch.device(device_for(training, splits.train, state.get("precision")))
    batch = min(training.batch_size, len(splits.train))
    with cpu_threads(training.threads):
        flops, seconds = _measured_step(network.to(device), splits, training, device, batch)
    seconds *= training.adversary_factor
    plain = training.adversary == "none"
    of_cost, of_time = ("", "") if plain else (", without the adversary", ", with the adversary")
    steps, total = _steps(training, len(splits.train) // batch, seconds)
    return {
        "model": config.model.name,
        "data": f"{splits.train.name}: {len(splits.train)} training, {len(splits.test)} test images",
        "parameters": sum(p.numel() for p in network.parameters()),
        "cost": f"{flops / batch / 1e6:.1f} MFLOP an image and training step{of_cost}",
        "optimiser steps": steps,
        "training time": f"about {total} here ({seconds:.3g} s a step of {batch} images{of_time})",
        "cached": refusal or ", ".join(cached_results(directory, splits, config.attack, "float64")) or "nothing",
    }


def _measured_step(
    network: Network, splits: DataSplits, config: TrainingConfig, device: torch.device, batch: int
) -> tuple[int, float]:
    """The floating-point operations and the seconds of a step on one batch, forward and backward, unattacked."""
    from torch.utils.flop_counter import FlopCounterMode

    pixels = to_unit_range(splits.train.images[:batch]).to(device)
    if config.channels_last:
        pixels = pixels.to(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        network(pixels).sum().backward()
    synchronise(device)
    started = time.perf_counter()
    network(pixels).sum().backward()
    synchronise(device)
    return counter.get_total_flops(), time.perf_counter() - started


def _steps(config: TrainingConfig, per_epoch: int, step_seconds: float) -> tuple[str, str]:
    """How many optimiser steps a training takes, and how long: by its epochs, by its minutes, or by what ends first."""
    from dynablocks.reporting.words import count, duration

    fitting = None if config.max_minutes is None else max(1, int(60 * config.max_minutes / step_seconds))
    budget = "" if config.max_minutes is None else duration(60 * config.max_minutes)
    if config.epochs is None:
        return f"as many as fit into {budget}, about {count(fitting)} ({count(per_epoch)} an epoch)", budget
    limit = max(1, round(config.epochs * per_epoch))
    planned = f"{count(limit)} ({config.epochs:g} epochs of {count(per_epoch)} step{'s' * (per_epoch != 1)})"
    if fitting is None or fitting >= limit:
        return planned, duration(limit * step_seconds)
    return f"as many of {planned} as fit into {budget}, about {count(fitting)}", budget


def _earlier(directory: Path, config: TrainingConfig, settings: str, overwrite: bool) -> tuple[dict[str, Any], str]:
    """What the training in ``directory`` has stored that a run would take over, and why it would take nothing."""
    if overwrite:
        return {}, "nothing: --overwrite starts anew"
    try:
        checkpoint = earlier_checkpoint(directory, settings) if directory.is_dir() else None
        if checkpoint is None:
            return {}, ""
        state = read_state(checkpoint)
        if state.get("summary"):
            require_budget(config, checkpoint, state)
    except BadCheckpoint as error:
        return {}, f"nothing that can be used: {error}"
    return {name: state.get(name) for name in ("precision", "summary")}, ""


def cached_results(
    directory: Path, splits: DataSplits, attack: AttackConfig | None = None, arithmetic: str | None = None
) -> list[str]:
    """What of a run directory is taken and not made again: its training, its attack and certificate of these images.

    Args:
        directory: the run directory.
        splits: the images.
        attack: how they are to be attacked; ``None``: nothing is attacked, and what is stored counts as it is.
        arithmetic: in which they are to be certified; ``None`` likewise.
    """
    if not directory.is_dir() or find_checkpoint(directory) is None:
        return []
    if not (directory / TRAINING).exists():
        return ["training (resumes)"]
    images = splits.fingerprint
    if attack is None:
        attacked = restored(directory, ATTACK, images)
    else:
        attacked = matching_attack(directory, attack_settings(attack, splits), images)
    if arithmetic is None:
        certificate = restored(directory, CERTIFICATE, images)
    else:
        certificate = matching_certificate(directory, arithmetic, images)
    found = {"attack": attacked, "certificate": certificate}
    return ["training (finished)", *(name for name, result in found.items() if result is not None)]
