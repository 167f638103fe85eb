"""What the page of a run shows, from what its directory holds."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynablocks.config import DataConfig, to_yaml
from dynablocks.data import ImageDataset, to_unit_range
from dynablocks.progress import progress_bar
from dynablocks.robustness import AttackResult, CertificateResult
from dynablocks.run_directory.metrics import accuracy_curves, collect_metrics
from dynablocks.run_directory.network import load, load_config, load_splits, with_data
from dynablocks.run_directory.results import sound_results
from dynablocks.run_files import HISTORY

if TYPE_CHECKING:
    from dynablocks.reporting import Example, ReportData


def report_data(directory: Path, command: str, data: DataConfig | None = None) -> ReportData:
    """Everything the report shows."""
    from dynablocks.properties import explain
    from dynablocks.reporting import ReportData, block_rows, step_rows

    config = with_data(load_config(directory), data)
    splits, network = load_splits(config), load(directory)
    attacked, certificate = sound_results(directory, splits.fingerprint)
    with progress_bar("measuring the blocks") as update:
        blocks = block_rows(network, to_unit_range(splits.test.images[:4]), progress=update)
    return ReportData(
        title=f"{config.model.name} on {splits.test.name}",
        command=command,
        metrics=collect_metrics(directory, splits),
        history=_history(directory),
        curves=accuracy_curves(attacked, certificate),
        blocks=blocks,
        steps=step_rows(network),
        examples=_examples(splits.test, attacked, certificate),
        class_names=splits.test.class_names,
        explanation=str(explain(network)),
        config_text=to_yaml(config),
        watermark="smoke preset" if config.preset == "smoke" else None,
    )


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
            )
        )
    return rows


def _history(directory: Path) -> list[dict[str, Any]]:
    path, entries = directory / HISTORY, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]
