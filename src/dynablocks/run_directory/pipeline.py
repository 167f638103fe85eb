"""Train, attack, certify and report in one run directory; each step is skipped when its result is already there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dynablocks.config import DataConfig, RunConfig, from_yaml, to_yaml
from dynablocks.data import DataSplits
from dynablocks.errors import BadData, DynablocksError, InvalidArgument
from dynablocks.files import expanded, is_held, read_json, require_writable, write_json, write_text
from dynablocks.modes import cpu_threads
from dynablocks.progress import Stopped, progress_bar, tell
from dynablocks.robustness import AttackConfig, AttackResult, CertificateResult, attack, certify
from dynablocks.robustness.partial import Partial
from dynablocks.run_directory.beginning import keep_labels, starting_network, teacher_labels
from dynablocks.run_directory.metrics import no_figures_of_unsound_results, stated_radii, write_metrics
from dynablocks.run_directory.network import (
    data_name,
    load,
    load_config,
    load_splits,
    require_checkpoint,
    with_data,
)
from dynablocks.run_directory.report import report_data
from dynablocks.run_directory.results import (
    ATTACK,
    CERTIFICATE,
    attack_settings,
    belongs_to,
    certificate_environment,
    matching_attack,
    matching_certificate,
    require_own_classes,
    store,
    training_facts,
)
from dynablocks.run_files import (
    ATTACK_PARTIAL,
    AUTOATTACK,
    CHECKPOINT,
    CONFIG,
    LOCK,
    MANIFEST,
    METRICS,
    PREVIOUS_CHECKPOINT,
    REPORT,
    TEACHER_LABELS,
    TRAINING,
)
from dynablocks.training import TrainingSummary, fit
from dynablocks.training.checkpoint import has_checkpoint, plain_yaml
from dynablocks.training.loop import earlier_checkpoint, is_first_process, settings_of
from dynablocks.training.precision import present_device

Say = Callable[[str], None]


def train_run(
    config: RunConfig, directory: str | Path, *, overwrite: bool = False, splits: DataSplits | None = None
) -> TrainingSummary:
    """Train into ``directory``; resume when it holds an unfinished training of the same configuration.

    The images of ``config`` may be given as ``splits`` where they are loaded already.

    Raises:
        KeyboardInterrupt: after Ctrl-C; it is a ``Stopped`` where a sentence has said what is kept.
    """
    out = expanded(directory)
    with _kept_until_begun(config, out, overwrite) as mark_begun:
        splits = load_splits(config) if splits is None else splits
        network, description = starting_network(config, splits, out, resume=not overwrite)
        if config.teacher is not None and not overwrite:  # a refusal, before a teacher is asked for a minute
            earlier_checkpoint(out, settings_of(splits, config.training, description))
        taught = None if config.teacher is None else teacher_labels(config, splits, out, description)
        settings = replace(config, data=replace(config.data, name=data_name(config.data)))

        def begin() -> None:
            mark_begun()
            if not has_checkpoint(out):  # so these tell of a network that is gone
                for name in (TRAINING, METRICS, REPORT, AUTOATTACK, TEACHER_LABELS):
                    (out / name).unlink(missing_ok=True)
            if taught is not None:
                keep_labels(taught, config, splits, out, description)
            write_text(out / CONFIG, to_yaml(settings))

        summary = fit(
            network,
            splits,
            config.training,
            out,
            describe=description,
            resume=not overwrite,
            on_start=begin,
            soft_labels=None if taught is None else taught.mixed(splits.train.labels, config.teacher_share),
        )
    facts = asdict(summary) | {
        "dataset": splits.train.name,
        "fingerprint": splits.fingerprint,
        "parameters": sum(p.numel() for p in network.parameters()),
        "class_names": list(splits.train.class_names),
        "teacher_seconds": None if taught is None else taught.seconds,
    }
    write_json(out / TRAINING, facts)
    write_metrics(out)
    return summary


@contextlib.contextmanager
def _kept_until_begun(config: RunConfig, directory: Path, overwrite: bool) -> Iterator[Callable[[], None]]:
    """Tell of a Ctrl-C that comes before ``--overwrite`` has deleted the old training; yields what marks that it has.

    After a later one the same command goes on without the flag; now it would hand back the old network as the new one.
    """
    begun: list[bool] = []
    try:
        yield lambda: begun.append(True)
    except KeyboardInterrupt:
        if begun or not overwrite or not has_checkpoint(directory):
            raise
        if is_first_process(config.training):  # of several, it alone knows whether the training has begun
            tell("Stopped before anything was overwritten; give the same command again.")
        raise Stopped from None


def attack_run(
    directory: str | Path,
    config: AttackConfig | None = None,
    data: DataConfig | None = None,
    *,
    splits: DataSplits | None = None,
) -> AttackResult:
    """Attack the test images of a run; write attack.json and attack.safetensors; stop where a certificate is broken.

    An attack that was stopped goes on from its last minute, while network, images, code and settings stay; of code of
    one's own that is not known, and it begins anew. Images that are not those of the run's own copy are told on
    standard error. The images may be given as ``splits`` where they are loaded already.

    Raises:
        BadData: the classes of the images are others than those of the run, or in another order.
        UnsoundResult: a certified image was broken; the figures of the run and its page are removed.
    """
    directory = expanded(directory)
    run = with_data(load_config(directory), data)
    facts = training_facts(directory)
    splits = load_splits(run, hold_out=False) if splits is None else splits
    require_own_classes(facts, splits)
    _tell_of_other_images(facts, splits)
    settings = attack_settings(run.attack if config is None else config, splits)
    result = matching_attack(directory, settings, splits.fingerprint)
    if result is None:
        require_writable(directory)
        belongs = belongs_to(directory, splits.fingerprint, losses=settings.losses)
        network = load(directory).to(present_device(run.training.device))
        partial = Partial(directory / ATTACK_PARTIAL, belongs, settings)
        with progress_bar(f"attacking {settings.samples} images") as update:
            result = attack(network, splits.test, settings, update, partial)
        store(directory, ATTACK, result.summary() | belongs, result.tensors())
        partial.remove()
    write_metrics(directory, splits)
    return result


def certify_run(
    directory: str | Path,
    data: DataConfig | None = None,
    *,
    arithmetic: str = "float64",
    splits: DataSplits | None = None,
) -> CertificateResult:
    """Certify every test image of a run; write certificate.json and certificate.safetensors.

    The radii hold for the network evaluated in ``arithmetic``: float64, or float32 at the cost of its larger proven
    rounding bound. A stored certificate is taken while network, images, code, torch, machine and device stay. Standard
    error is told where the images are not those of the run's own copy, and why the rounding is measured where no bound
    of it is proved. The images may be given as ``splits`` where they are loaded already.

    Raises:
        BadData: the classes of the images are others than those of the run, or in another order.
        UnsoundResult: the stored attack broke a certified image; the figures of the run and its page are removed.
    """
    directory = expanded(directory)
    run = with_data(load_config(directory), data)
    facts = training_facts(directory)
    splits = load_splits(run, hold_out=False) if splits is None else splits
    require_own_classes(facts, splits)
    epsilons = stated_radii(run.attack.epsilons)
    _tell_of_other_images(facts, splits)
    result = matching_certificate(directory, arithmetic, splits.fingerprint)
    if result is None:
        require_writable(directory)
        belongs = belongs_to(directory, splits.fingerprint) | certificate_environment(directory)
        network = load(directory).to(present_device(run.training.device))
        with progress_bar(f"certifying {len(splits.test)} images") as update:
            result = certify(network, splits.test, arithmetic=arithmetic, progress=update)
        store(directory, CERTIFICATE, result.summary(epsilons) | belongs, result.tensors())
    if not result.proved:
        tell(f"note: certified, rounding measured: {result.rounding_reason or 'no bound of it is proved.'}")
    write_metrics(directory, splits)
    return result


def _tell_of_other_images(facts: dict[str, Any], splits: DataSplits) -> None:
    """Say that a result is not of the copy that the run was trained on, by what ``training.json`` says of that."""
    if splits.fingerprint != facts["fingerprint"]:
        tell(
            f"note: these are not the images of the run's own copy; the result is of {len(splits.test)} test images of "
            f"{splits.test.name} with fingerprint {splits.fingerprint[:16]}."
        )


def report_run(
    directory: str | Path,
    command: str | None = None,
    data: DataConfig | None = None,
    *,
    splits: DataSplits | None = None,
) -> Path:
    """Write report.html and metrics.json from what the run directory holds, and all settings into config.yaml.

    Args:
        directory: the run directory.
        command: that made the run; ``None`` for the commands that make its results again from its configuration.
        data: where the images are now, if they moved.
        splits: the images, where they are loaded already.

    Returns:
        Where the page is.

    Raises:
        BadData: the classes of the images are others than those of the run, or in another order.
        UnsoundResult: the attack broke a certified image; the page that was there is removed, with the figures.
    """
    from dynablocks.reporting import write_report

    directory = expanded(directory)
    path = directory / REPORT
    require_checkpoint(directory)
    require_writable(directory)
    with no_figures_of_unsound_results(directory):
        shown = report_data(directory, command, data, splits=splits)
    _write_all_settings(directory)
    write_json(directory / METRICS, shown.metrics)
    write_report(path, shown)
    return path


def _write_all_settings(directory: Path) -> None:
    """Write into ``config.yaml`` what that of an older version does not say, as it is read.

    The page tells to give it to ``--config``, which takes from today's preset what a file does not say.
    """
    path, full = directory / CONFIG, to_yaml(load_config(directory))
    said = plain_yaml(path.read_text(encoding="utf-8"))
    if said != plain_yaml(full) and not is_held(directory / LOCK):  # a training writes its own
        write_text(path, full)


def run(config: RunConfig, directory: str | Path, command: str, say: Say, *, overwrite: bool = False) -> dict[str, Any]:
    """Train, certify, attack, report; the content of metrics.json."""
    from dynablocks.reporting import words

    directory = expanded(directory)
    with _kept_until_begun(config, directory, overwrite):
        splits = load_splits(config)  # once: each step would load and hash them again, and holds them meanwhile anyway
    summary = train_run(config, directory, overwrite=overwrite, splits=splits)
    seconds, rate = summary.train_seconds, summary.images_per_second
    say(f"trained {words.several(summary.epochs, 'epoch')} in {seconds:.0f} s, {rate:.0f} images/s")
    with cpu_threads(config.training.threads):
        result = certify_run(directory, splits=splits)
        how = "" if result.proved else ", rounding measured"
        bound = f"Lipschitz bound {words.bound(result.body_lipschitz)}"
        bound = bound if math.isfinite(result.body_lipschitz) else "no finite Lipschitz bound"
        say(f"certified {words.several(len(result.labels), 'test image')}{how}, {bound}")
        attacked = attack_run(directory, config.attack, splits=splits)
    images, radii = words.several(len(attacked.labels), "test image"), len(attacked.epsilons)
    say(f"attacked {images} at {radii} {'radius' if radii == 1 else 'radii'}, no certificate was broken")
    say(f"report: {report_run(directory, command, splits=splits)}")
    metrics: dict[str, Any] = read_json(directory / METRICS)
    return metrics


def require_out(directory: str | Path) -> Path:
    """``directory`` when it can be a run directory, otherwise one sentence."""
    directory = expanded(directory)
    if directory.exists() and not directory.is_dir():
        raise InvalidArgument(f"--out {directory} is a file; give a folder.")
    if directory.is_dir() and any(directory.iterdir()) and not _looks_like_run(directory):
        raise BadData(f"--out {directory} holds other files; give a new folder, or one that a run made.")
    return directory


def _looks_like_run(directory: Path) -> bool:
    """Whether a training made this folder: by what its files hold, since others have a config.yaml too."""
    if any((directory / name / MANIFEST).is_file() for name in (CHECKPOINT, PREVIOUS_CHECKPOINT)):
        return True
    config = directory / CONFIG
    if config.is_file():
        try:
            from_yaml(config.read_text(encoding="utf-8"), str(config))
        except (OSError, UnicodeDecodeError, DynablocksError):
            return False
        return True
    return all(entry.name.startswith(".") for entry in directory.iterdir())
