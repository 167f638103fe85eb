"""What ``--dry-run`` says: what a run would cost, and what its directory holds already."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dynablocks.config import RunConfig
from dynablocks.data import to_unit_range
from dynablocks.errors import BadCheckpoint
from dynablocks.run_directory.network import load_splits
from dynablocks.run_directory.results import KINDS, current_summary, training_facts
from dynablocks.run_directory.warm_start import build_untrained
from dynablocks.run_files import TRAINING
from dynablocks.training import TrainingConfig, choose_device, find_checkpoint
from dynablocks.training.checkpoint import read_state
from dynablocks.training.loop import earlier_checkpoint, require_budget, settings_of
from dynablocks.training.precision import synchronise


def estimate(config: RunConfig, directory: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """What ``--dry-run`` says: parameters, cost of a training step, time estimate, what is cached."""
    import time

    from torch.utils.flop_counter import FlopCounterMode

    from dynablocks.reporting.words import duration

    splits, device = load_splits(config), torch.device(choose_device(config.training.device))
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    network, description = build_untrained(config, splits)
    network = network.to(device)
    batch = min(config.training.batch_size, len(splits.train))
    pixels = to_unit_range(splits.train.images[:batch]).to(device)
    if config.training.channels_last:
        pixels = pixels.to(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        network(pixels).sum().backward()
    synchronise(device)
    started = time.perf_counter()
    network(pixels).sum().backward()
    synchronise(device)
    step = time.perf_counter() - started
    step *= config.training.adversary_factor
    steps = len(splits.train) // batch
    epochs, minutes = config.training.epochs, config.training.max_minutes
    seconds = math.inf if epochs is None else step * steps * epochs
    if minutes is not None:
        seconds = min(seconds, minutes * 60)
    return {
        "model": config.model.name,
        "data": f"{splits.train.name}: {len(splits.train)} training, {len(splits.test)} test images",
        "parameters": sum(p.numel() for p in network.parameters()),
        "cost": f"{counter.get_total_flops() / batch / 1e6:.1f} MFLOP an image and training step",
        "training time": f"about {duration(seconds)} here ({step:.3g} s a step of {batch} images)",
        "cached": _cached_for(directory, config.training, settings_of(splits, config.training, description), overwrite),
    }


def _cached_for(directory: Path, config: TrainingConfig, settings: str, overwrite: bool) -> str:
    """What a run in ``directory`` would take over, or why it would refuse the folder."""
    if overwrite:
        return "nothing: --overwrite starts anew"
    try:
        checkpoint = earlier_checkpoint(directory, settings) if directory.is_dir() else None
        if checkpoint is not None and (state := read_state(checkpoint)).get("summary"):
            require_budget(config, checkpoint, state)
    except BadCheckpoint as error:
        return f"nothing that can be used: {error}"
    return ", ".join(cached_results(directory)) or "nothing"


def cached_results(directory: Path) -> list[str]:
    """What a run directory holds of a run: its training, attack and certificate."""
    if not directory.is_dir() or find_checkpoint(directory) is None:
        return []
    if not (directory / TRAINING).exists():
        return ["training (resumes)"]
    images = training_facts(directory)["fingerprint"]
    done = [kind.name for kind in KINDS if current_summary(directory, kind, images, same_code=True)]
    return ["training (finished)", *done]
