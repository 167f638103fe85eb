"""The figures of a run, ``metrics.json``, and its curves of accuracy against the radius."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import dynablocks
from dynablocks.data import DataSplits
from dynablocks.errors import UnsoundResult
from dynablocks.files import expanded, write_json
from dynablocks.robustness import AttackConfig, AttackResult, CertificateResult, Curve
from dynablocks.run_directory.network import load_config
from dynablocks.run_directory.results import ATTACK, CERTIFICATE, current_summary, sound_results, training_facts
from dynablocks.run_files import AUTOATTACK, METRICS, REPORT

Points = list[dict[str, float]]


def stated_radii(epsilons: Iterable[float]) -> tuple[float, ...]:
    """Where certified accuracy is stated: at the usual radii and at the attacked ones."""
    return tuple(sorted({*AttackConfig().epsilons, *epsilons}))


def write_metrics(directory: str | Path, splits: DataSplits | None = None) -> dict[str, Any]:
    """Write ``metrics.json``; what it holds, which is :func:`run_metrics`.

    Raises:
        UnsoundResult: the attack broke an image that is certified; ``metrics.json`` and ``report.html`` are removed.
    """
    directory = expanded(directory)
    with no_figures_of_unsound_results(directory):
        metrics = run_metrics(directory, splits)
    write_json(directory / METRICS, metrics)
    return metrics


@contextlib.contextmanager
def no_figures_of_unsound_results(directory: Path) -> Iterator[None]:
    """Remove the files with figures of a run where an attack refutes its certificate: they were made before that.

    Raises:
        UnsoundResult: as it came.
    """
    try:
        yield
    except UnsoundResult:
        for name in (METRICS, REPORT, AUTOATTACK):
            with contextlib.suppress(OSError):  # the error counts, also of a folder that is read-only
                (directory / name).unlink(missing_ok=True)
        raise


def run_metrics(directory: Path, splits: DataSplits | None = None) -> dict[str, Any]:
    """The figures of a run from what is there; those that were not measured are ``None``.

    Args:
        directory: the run directory.
        splits: take figures of these images only; by default of those that the network was trained on.

    Raises:
        UnsoundResult: the attack broke an image that is certified; neither result may be reported.
    """
    training = training_facts(directory)
    config = load_config(directory)
    images = training["fingerprint"] if splits is None else splits.fingerprint
    broken, result = sound_results(directory, images)
    certificate = None if result is None else current_summary(directory, CERTIFICATE, images)
    attacked = None if broken is None else current_summary(directory, ATTACK, images)
    certified, of_attacked = _certified_points(certificate, attacked, result)
    clean = (certificate or attacked or {}).get("clean_accuracy")
    return {
        "model": config.model.name,
        "preset": config.preset,
        "clean_accuracy": clean,
        "robust_accuracy": (attacked or {}).get("robust_accuracy"),
        "certified_accuracy": certified,
        "certified_accuracy_of_attacked": of_attacked,
        "auc": (attacked or {}).get("auc"),
        "lipschitz_bound": (certificate or {}).get("body_lipschitz"),
        "arithmetic": (certificate or {}).get("arithmetic") or None,
        "rounding": (certificate or {}).get("rounding"),
        "rounding_reason": (certificate or {}).get("rounding_reason") or None,
        "images_per_second": training["images_per_second"],
        "train_seconds": training["train_seconds"],
        "teacher_seconds": training.get("teacher_seconds"),
        "epochs": training["epochs"],
        "parameters": training["parameters"],
        "dataset": training["dataset"] if splits is None else splits.test.name,
        "fingerprint": images,
        "own_images": images == training["fingerprint"],
        "test_images": (certificate or {}).get("samples"),
        "attacked_images": (attacked or {}).get("samples"),
        "device": training["device"],
        "precision": training["precision"],
        "seed": config.training.seed,
        "version": dynablocks.__version__,
    }


def _certified_points(
    certificate: dict[str, Any] | None, attacked: dict[str, Any] | None, result: CertificateResult | None
) -> tuple[Points | None, Points | None]:
    """The certificate's curve, also at radii that were attacked after it was made; that of the attacked images alone.

    An attack may have taken the first images only: next to what it left belongs what is certified of the same ones.
    """
    if certificate is None:
        return None, None
    points: Points = certificate["certified_accuracy"]
    if attacked is None or result is None:
        return points, None
    known, asked = ({p["epsilon"] for p in some} for some in (points, attacked["robust_accuracy"]))
    same = result.first(attacked["samples"])
    return result.curve(stated_radii(known | asked)).points(), same.curve(sorted(asked)).points()


def accuracy_curves(attacked: AttackResult | None, certificate: CertificateResult | None) -> dict[str, Curve]:
    """Certified and attacked accuracy against the radius, as far as they were measured."""
    curves = {}
    if certificate is not None:
        curves["certified"] = certificate.curve(stated_radii(() if attacked is None else attacked.epsilons))
    if attacked is not None:
        curves["attacked (worst)"] = attacked.curve()
        curves |= {f"attacked ({name})": attacked.curve(name) for name in ("ce",) if name in attacked.broken}
    return curves


def stored_curves(directory: str | Path) -> dict[str, Curve]:
    """The curves of a run's stored certificate and attack, on the images it was trained with."""
    directory = expanded(directory)
    return accuracy_curves(*sound_results(directory, training_facts(directory)["fingerprint"]))
