"""What the page of a run shows, from what its directory holds."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynablocks.config import DataConfig, RunConfig, to_yaml
from dynablocks.data import DataSplits, ImageDataset, to_unit_range
from dynablocks.files import expanded, resolved
from dynablocks.linear import frozen_weights
from dynablocks.progress import progress_bar
from dynablocks.robustness import AttackConfig, AttackResult, CertificateResult
from dynablocks.run_directory.metrics import accuracy_curves, run_metrics
from dynablocks.run_directory.network import load, load_config, load_splits, with_data
from dynablocks.run_directory.results import attack_settings, require_own_classes, sound_results, training_facts
from dynablocks.run_files import CONFIG, HISTORY

if TYPE_CHECKING:
    from dynablocks.reporting import Example, ReportData


def report_data(
    directory: str | Path,
    command: str | None = None,
    data: DataConfig | None = None,
    *,
    splits: DataSplits | None = None,
) -> ReportData:
    """Everything the report shows; nothing is written.

    Args:
        directory: the run directory.
        command: that made the run; ``None`` for the commands that make its results again from its configuration.
        data: where the images are now, if they moved.
        splits: the images, where they are loaded already.

    Raises:
        BadData: the classes of the images are others than those of the run, or in another order.
        UnsoundResult: the attack broke an image that is certified.
    """
    from dynablocks.properties import explain
    from dynablocks.reporting import ReportData, block_rows, step_rows

    directory = expanded(directory)
    config = with_data(load_config(directory), data)
    splits = load_splits(config, hold_out=False) if splits is None else splits
    require_own_classes(training_facts(directory), splits)
    network = load(directory)
    attacked, certificate = sound_results(directory, splits.fingerprint)
    if command is None:
        command = commands_again(directory, config, splits, attacked, certificate, data)
    with progress_bar("measuring the blocks") as update:
        blocks = block_rows(network, to_unit_range(splits.test.images[:4]), progress=update)
    # Facts of a weight are found once where it is held.
    with torch.no_grad(), frozen_weights(network):
        steps, explanation = step_rows(network), str(explain(network))
    return ReportData(
        title=f"{config.model.name} on {splits.test.name}",
        command=command,
        metrics=run_metrics(directory, splits),
        history=_history(directory),
        curves=accuracy_curves(attacked, certificate),
        blocks=blocks,
        steps=steps,
        examples=_examples(splits.test, attacked, certificate),
        class_names=splits.test.class_names,
        explanation=explanation,
        config_text=to_yaml(config),
        watermark="smoke preset" if config.preset == "smoke" else None,
    )


def commands_again(
    directory: Path,
    config: RunConfig,
    splits: DataSplits,
    attacked: AttackResult | None,
    certificate: CertificateResult | None,
    data: DataConfig | None = None,
) -> str:
    """What to type to get the results of a run again, in a new directory: a command a line.

    ``run`` certifies and attacks as the configuration says; what was asked for otherwise since has its own line, and so
    has what was done with other images than those of the training.

    Args:
        directory: the run directory.
        config: its configuration.
        splits: the images of its results.
        attacked, certificate: its results, as far as there are any.
        data: where the images are now, if they moved.
    """
    out = str(Path("runs") / f"{resolved(directory).name}-again")
    now = [] if data is None or data.dir is None else ["--data.dir", str(data.dir)]
    trained_on = training_facts(directory)["fingerprint"] == splits.fingerprint
    commands = [["run", "--config", str(directory / CONFIG), "--out", out, *(now if trained_on else [])]]
    others = [] if trained_on else now
    arithmetic = ["--arithmetic", "float32"] if certificate is not None and certificate.arithmetic == "float32" else []
    if certificate is not None and (arithmetic or others):
        commands.append(["certify", out, *arithmetic, *others])
    changed = [] if attacked is None else _changed_flags(attacked.config, attack_settings(config.attack, splits))
    if attacked is not None and (changed or others):
        commands.append(["attack", out, *changed, *others])
    return "\n".join(shlex.join(["dynablocks", *words]) for words in commands)


def _changed_flags(made: AttackConfig, usual: AttackConfig) -> list[str]:
    """The flags that make of the usual settings of an attack those it was made with."""
    changed = {name: value for name, value in asdict(made).items() if value != getattr(usual, name)}
    return [word for name, value in changed.items() for word in (f"--attack.{name}", json.dumps(value))]


def _examples(
    test: ImageDataset, attacked: AttackResult | None, certificate: CertificateResult | None
) -> list[Example]:
    from dynablocks.reporting import Example

    if attacked is None or certificate is None:
        return []
    rows = []
    for i in range(min(len(attacked.examples), len(test))):
        found = math.isfinite(float(attacked.smallest_broken_norm[i])) and attacked.example_losses[i] != ""
        rows.append(
            Example(
                image=test.images[i],
                label=int(test.labels[i]),
                prediction=int(certificate.predictions[i]),
                certified_radius=float(certificate.radii[i]) if bool(certificate.correct[i]) else 0.0,
                smallest_broken_norm=float(attacked.smallest_broken_norm[i]),
                adversarial=attacked.examples[i] if found else None,
                adversarial_prediction=int(attacked.example_predictions[i]),
                attack=attacked.example_losses[i],
                proved=certificate.proved,
            )
        )
    return rows


def _history(directory: Path) -> list[dict[str, Any]]:
    path, entries = directory / HISTORY, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]
