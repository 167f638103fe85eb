"""Train, attack, certify and report in one run directory; each step is skipped when its result is already there."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dynablocks
from dynablocks.config import DataConfig, RunConfig, from_yaml, to_yaml
from dynablocks.data import DataSplits, ImageDataset, infer_name, load_data, to_unit_range
from dynablocks.errors import BadCheckpoint, BadData, DynablocksError, InvalidArgument
from dynablocks.files import read_json, require_writable, resolved, sha256, write_json, write_tensors, write_text
from dynablocks.models import MODELS, ModelConfig, Network, build
from dynablocks.models.network import SHARED
from dynablocks.progress import progress_bar
from dynablocks.robustness import AttackConfig, AttackResult, CertificateResult, Curve, attack, certify, check_sound
from dynablocks.switching import set_progress
from dynablocks.training import TrainingConfig, TrainingSummary, find_checkpoint, fit, load_weights, read_config
from dynablocks.training.checkpoint import read_state
from dynablocks.training.loop import earlier_checkpoint, require_budget, settings_of
from dynablocks.training.precision import choose_device, present_device, synchronise

if TYPE_CHECKING:
    from dynablocks.reporting import ReportData

Say = Callable[[str], None]

PIXEL_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
}
"""Channel means and mean per-image standard deviations, as the paper normalises (design D3)."""


def data_name(config: DataConfig) -> str:
    """The data set's name: as given, or as found in the folder, or digits."""
    if config.name is not None:
        return config.name
    return "digits" if config.dir is None else infer_name(config.dir)


def load_splits(config: RunConfig) -> DataSplits:
    """The images of a configuration."""
    return load_data(data_name(config.data), config.data.dir, config.data.validation, config.training.seed)


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


def load(directory: str | Path) -> Network:
    """The trained network of a run directory, in eval mode: pixels in [0, 1], NCHW, to logits.

    Args:
        directory: the run directory (``--out`` of ``dynablocks run`` or ``train``).

    Returns:
        The network, with ``.properties`` and ``.input_shape``.

    Raises:
        BadCheckpoint: there is no checkpoint, it is corrupt, or its training is not finished.
    """
    import yaml

    directory = Path(directory)
    checkpoint = require_checkpoint(directory)
    if not read_state(checkpoint).get("summary"):
        raise unfinished(directory)
    try:
        network = build_described(yaml.safe_load(read_config(checkpoint))["model"])
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise BadCheckpoint(
            f"{checkpoint}/config.yaml describes no network of this version ({error}); train again with --overwrite."
        ) from error
    load_weights(checkpoint, network)
    if not all(bool(torch.isfinite(p).all()) for p in network.state_dict().values() if p.is_floating_point()):
        raise BadCheckpoint(
            f"the weights in {checkpoint} hold NaN or infinity; restore a copy, or train with --overwrite."
        )
    set_progress(network, 1.0)
    return network.eval()


def unfinished(directory: Path) -> BadCheckpoint:
    """The sentence for a run whose training was stopped on the way."""
    return BadCheckpoint(
        f"the training in {directory} is not finished, and its steps may still move; the command that began it goes on "
        "from there."
    )


def build_described(description: Mapping[str, Any]) -> Network:
    """The network that :func:`build_for` described, with new weights."""
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    # What changed nothing was once ignored, and stored; a setting of a later version is refused.
    known = {field.name for field in fields(ModelConfig)}
    kind = MODELS.get_known(str(options["name"]))
    unread = kind.unread(ModelConfig(kind.defaults.name, step=options.get("step")))
    settings = (kind.settings | SHARED) - unread.keys()
    options = {name: value for name, value in options.items() if name in settings or name not in known}
    if not options.get("dense_layers"):
        options.pop("dense_width", None)
    channels, height, width = (int(n) for n in description["input_shape"])
    shape, classes = (channels, height, width), int(description["num_classes"])
    return build(ModelConfig(**options), shape, classes, mean=tuple(description["mean"]), std=tuple(description["std"]))


def require_checkpoint(directory: Path) -> Path:
    """The newest whole checkpoint of a run directory, or one sentence."""
    if not directory.is_dir():
        raise BadCheckpoint(f"{directory} is not a run directory; make one with: dynablocks train --out {directory}")
    checkpoint = find_checkpoint(directory)
    if checkpoint is None:
        raise BadCheckpoint(f"{directory} holds no checkpoint; make one with: dynablocks train --out {directory}")
    return checkpoint


def load_config(directory: Path) -> RunConfig:
    """The configuration a run directory was made with."""
    require_checkpoint(directory)
    path = directory / "config.yaml"
    try:
        return from_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{path} cannot be read ({error}); train again with --overwrite.") from error


def train_run(config: RunConfig, directory: Path, *, overwrite: bool = False) -> TrainingSummary:
    """Train into ``directory``; resume when it holds an unfinished training of the same configuration."""
    if config.warm_start is not None and resolved(config.warm_start) == resolved(directory):
        raise InvalidArgument(f"--warm_start and --out are both {directory}; give another --out.")
    splits = load_splits(config)
    network, description = _described(config, splits)
    if config.warm_start is not None:
        require_unseen(config.warm_start, config.training.seed, splits)
        take_body(network, config.warm_start)
    settings = replace(config, data=replace(config.data, name=data_name(config.data)))

    def begin() -> None:
        if overwrite:
            for name in ("training.json", "metrics.json", "report.html"):
                (directory / name).unlink(missing_ok=True)
        write_text(directory / "config.yaml", to_yaml(settings))

    summary = fit(
        network,
        splits,
        config.training,
        directory,
        describe=description,
        resume=not overwrite,
        on_start=begin,
    )
    facts = asdict(summary) | {
        "dataset": splits.train.name,
        "fingerprint": splits.fingerprint,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    write_json(directory / "training.json", facts)
    collect_metrics(directory)
    return summary


def _described(config: RunConfig, splits: DataSplits) -> tuple[Network, dict[str, Any]]:
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
    data, model = stored["data"], stored["model"]
    # Not recorded before there was a "seen".
    earlier = model.get("seen", [{"fingerprint": None}] if "warm_start" in model else [])
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
        if data["fingerprint"] is None:
            raise InvalidArgument(
                f"--warm_start {directory} started from a run of which it does not say what it was trained on; it may "
                "have been the images that are held out here. Train it again, or start from new weights."
            )
        # Of one seed, a larger validation set contains a smaller one.
        nested = data["seed"] == seed and data["train_images"] <= len(splits.train)
        if data["fingerprint"] == splits.fingerprint and not nested:
            raise InvalidArgument(
                f"--warm_start {directory} was trained on images that are held out here; train it (and what it started "
                f"from) with --data.validation {len(splits.validation)} and --training.seed {seed} too, or start from "
                "new weights."
            )


def attack_run(directory: Path, config: AttackConfig | None = None, data: DataConfig | None = None) -> AttackResult:
    """Attack the test images of a run; write attack.json and attack.safetensors; stop where a certificate is broken."""
    run = with_data(load_config(directory), data)
    _training_facts(directory)
    splits = load_splits(run)
    wanted = run.attack if config is None else config
    settings = replace(wanted, samples=min(wanted.samples, len(splits.test)))
    result: AttackResult | None = _restore(directory, "attack", AttackResult.restore, splits.fingerprint)
    if result is None or result.config != settings:
        require_writable(directory)
        belongs = _belongs_to(directory, splits.fingerprint)
        network = load(directory).to(present_device(run.training.device))
        with progress_bar(f"attacking {settings.samples} images") as update:
            result = attack(network, splits.test, settings, update)
        _store(directory, "attack", result.summary() | belongs, result.tensors())
    collect_metrics(directory, splits)
    return result


def certify_run(directory: Path, data: DataConfig | None = None, *, arithmetic: str = "float64") -> CertificateResult:
    """Certify every test image of a run; write certificate.json and certificate.safetensors.

    The radii hold for the network evaluated in ``arithmetic``: float64, or float32 at the cost of its larger proven
    rounding bound.
    """
    run = with_data(load_config(directory), data)
    _training_facts(directory)
    splits, epsilons = load_splits(run), _radii(run.attack.epsilons)
    restored = _restore(directory, "certificate", CertificateResult.restore, splits.fingerprint)
    result: CertificateResult | None = restored
    if result is None or result.arithmetic != arithmetic:
        require_writable(directory)
        belongs = _belongs_to(directory, splits.fingerprint)
        network = load(directory).to(present_device(run.training.device))
        with progress_bar(f"certifying {len(splits.test)} images") as update:
            result = certify(network, splits.test, arithmetic=arithmetic, progress=update)
        _store(directory, "certificate", result.summary(epsilons) | belongs, result.tensors())
    collect_metrics(directory, splits)
    return result


def _radii(epsilons: Iterable[float]) -> tuple[float, ...]:
    """Where certified accuracy is stated: at the usual radii and at the attacked ones."""
    return tuple(sorted({*AttackConfig().epsilons, *epsilons}))


def report_run(directory: Path, command: str, data: DataConfig | None = None) -> Path:
    """Write report.html from what the run directory holds."""
    from dynablocks.reporting import write_report

    path = directory / "report.html"
    require_writable(directory)
    write_report(path, report_data(directory, command, data))
    return path


def run(config: RunConfig, directory: Path, command: str, say: Say, *, overwrite: bool = False) -> dict[str, Any]:
    """Train, certify, attack, report; the metrics of :func:`collect_metrics`."""
    summary = train_run(config, directory, overwrite=overwrite)
    seconds, rate = summary.train_seconds, summary.images_per_second
    say(f"trained {summary.epochs:.4g} epochs in {seconds:.0f} s, {rate:.0f} images/s")
    result = certify_run(directory)
    say(f"certified {len(result.labels)} test images, Lipschitz bound {result.body_lipschitz:.6g}")
    attacked = attack_run(directory, config.attack)
    say(f"attacked {len(attacked.labels)} test images at {len(attacked.epsilons)} radii, no certificate was broken")
    say(f"report: {report_run(directory, command)}")
    metrics: dict[str, Any] = read_json(directory / "metrics.json")
    return metrics


def collect_metrics(directory: Path, splits: DataSplits | None = None) -> dict[str, Any]:
    """metrics.json from what is there; figures that were not measured are ``None``.

    Args:
        directory: the run directory.
        splits: take figures of these images only; by default of those that the network was trained on.

    Raises:
        UnsoundResult: the attack broke an image that is certified; neither result may be reported.
    """
    training = _training_facts(directory)
    config = load_config(directory)
    images = training.get("fingerprint", "") if splits is None else splits.fingerprint
    _, result = _results(directory, images)
    certificate = _current(directory, "certificate", images)
    attacked = _current(directory, "attack", images)
    certified, of_attacked = _certified_curves(certificate, attacked, result)
    clean = (certificate or attacked or {}).get("clean_accuracy")
    metrics = {
        "model": config.model.name,
        "preset": config.preset,
        "clean_accuracy": clean,
        "robust_accuracy": (attacked or {}).get("robust_accuracy"),
        "certified_accuracy": certified,
        "certified_accuracy_of_attacked": of_attacked,
        "auc": (attacked or {}).get("auc"),
        "lipschitz_bound": (certificate or {}).get("body_lipschitz"),
        "images_per_second": training["images_per_second"],
        "train_seconds": training["train_seconds"],
        "epochs": training["epochs"],
        "parameters": training["parameters"],
        "dataset": training["dataset"] if splits is None else splits.test.name,
        "test_images": (certificate or {}).get("samples"),
        "attacked_images": (attacked or {}).get("samples"),
        "device": training["device"],
        "precision": training["precision"],
        "seed": config.training.seed,
        "version": dynablocks.__version__,
    }
    write_json(directory / "metrics.json", metrics)
    return metrics


Points = list[dict[str, float]]


def _certified_curves(
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
    return result.curve(_radii(known | asked)).points(), same.curve(sorted(asked)).points()


def _training_facts(directory: Path) -> dict[str, Any]:
    """The content of training.json."""
    path = directory / "training.json"
    if not path.exists() and find_checkpoint(directory) is not None:
        raise unfinished(directory)
    facts = read_json(path)
    numbers, words = ("images_per_second", "train_seconds", "epochs", "parameters"), ("dataset", "device", "precision")
    whole = isinstance(facts, dict) and isinstance(facts.get("fingerprint", ""), str)
    whole = whole and all(_is_number(facts.get(name)) for name in numbers)
    if not whole or not all(isinstance(facts.get(name), str) for name in words):
        raise BadCheckpoint(f"{directory}/training.json was cut or edited; the training command makes it again.")
    return facts


def weights_hash(directory: Path) -> str:
    """SHA-256 of the run's weights: results of other weights are not reused."""
    return sha256(require_checkpoint(directory) / "model.safetensors")


def _curves(attacked: AttackResult | None, certificate: CertificateResult | None) -> dict[str, Curve]:
    """Certified and attacked accuracy against the radius, as far as they were measured."""
    curves = {}
    if certificate is not None:
        curves["certified"] = certificate.curve(_radii(() if attacked is None else attacked.epsilons))
    if attacked is not None:
        curves["attacked (worst)"] = attacked.curve()
        curves |= {f"attacked ({name})": attacked.curve(name) for name in ("ce",) if name in attacked.broken}
    return curves


def stored_curves(directory: Path) -> dict[str, Curve]:
    """The curves of a run's stored certificate and attack, on the images it was trained with."""
    images = _training_facts(directory).get("fingerprint", "")
    return _curves(*_results(directory, images))


def report_data(directory: Path, command: str, data: DataConfig | None = None) -> ReportData:
    """Everything the report shows."""
    from dynablocks.properties import explain
    from dynablocks.reporting import ReportData, block_rows, step_rows

    run_config = with_data(load_config(directory), data)
    splits, network = load_splits(run_config), load(directory)
    attacked, certificate = _results(directory, splits.fingerprint)
    with progress_bar("measuring the blocks") as update:
        blocks = block_rows(network, to_unit_range(splits.test.images[:4]), progress=update)
    return ReportData(
        title=f"{run_config.model.name} on {splits.test.name}",
        command=command,
        metrics=collect_metrics(directory, splits),
        history=_history(directory),
        curves=_curves(attacked, certificate),
        blocks=blocks,
        steps=step_rows(network),
        examples=_examples(splits.test, attacked, certificate),
        class_names=splits.test.class_names,
        explanation=str(explain(network)),
        config_text=to_yaml(run_config),
        watermark="smoke preset" if run_config.preset == "smoke" else None,
    )


def _examples(test: ImageDataset, attacked: AttackResult | None, certificate: CertificateResult | None) -> list[Any]:
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
    import json

    path, entries = directory / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def with_data(config: RunConfig, data: DataConfig | None) -> RunConfig:
    if data is None or data.dir is None:
        return config
    return replace(config, data=replace(config.data, dir=data.dir))


def _store(directory: Path, name: str, summary: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files; the summary names the hash of the other, for a kill between the two."""
    written = write_tensors(directory / f"{name}.safetensors", tensors)
    write_json(directory / f"{name}.json", summary | {"tensors": written})


def _belongs_to(directory: Path, fingerprint: str) -> dict[str, str]:
    """What a stored result must agree in to be reused: the weights, the images, and the version that made it.

    Asked for before the weights are loaded: a training that goes on meanwhile may replace them.
    """
    return {"weights": weights_hash(directory), "fingerprint": fingerprint, "version": dynablocks.__version__}


def _current(directory: Path, name: str, fingerprint: str) -> dict[str, Any] | None:
    """The stored summary, when it was made with the present weights, these images and this version."""
    path = directory / f"{name}.json"
    if not path.exists():
        return None
    try:
        summary = read_json(path)
    except DynablocksError:
        return None
    wanted = _belongs_to(directory, fingerprint)
    fits = isinstance(summary, dict) and all(summary.get(key) == value for key, value in wanted.items())
    whole = fits and _is_curve(summary.get(_CURVES[name])) and isinstance(summary.get("samples"), int)
    shown = ("clean_accuracy", "auc", "body_lipschitz")
    return summary if whole and all(summary.get(key) is None or _is_number(summary[key]) for key in shown) else None


_CURVES = {"attack": "robust_accuracy", "certificate": "certified_accuracy"}


def _is_curve(points: object) -> bool:
    return isinstance(points, list) and all(
        isinstance(p, dict) and all(_is_number(p.get(key)) for key in ("epsilon", "accuracy")) for p in points
    )


def _is_number(value: object) -> bool:
    """Whether it is a number that JSON has and a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e308 < value < 1e308


def _restore(directory: Path, name: str, restore: Callable[..., Any], fingerprint: str) -> Any:
    """The stored result when it is :func:`_current`, otherwise ``None``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    summary = _current(directory, name, fingerprint)
    if summary is None:
        return None
    path = directory / f"{name}.safetensors"
    try:
        return restore(summary, load_file(path)) if sha256(path) == summary.get("tensors") else None
    except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError):
        return None


def _results(directory: Path, fingerprint: str) -> tuple[AttackResult | None, CertificateResult | None]:
    """The stored attack and certificate of the present weights and these images, which must not contradict each other.

    Raises:
        UnsoundResult: the attack broke an image that is certified; neither result may be reported.
    """
    attacked: AttackResult | None = _restore(directory, "attack", AttackResult.restore, fingerprint)
    certificate: CertificateResult | None = _restore(directory, "certificate", CertificateResult.restore, fingerprint)
    if attacked is not None and certificate is not None:
        check_sound(attacked, certificate)
    return attacked, certificate


def estimate(config: RunConfig, directory: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """What ``--dry-run`` says: parameters, cost of a training step, time estimate, what is cached."""
    import time

    from torch.utils.flop_counter import FlopCounterMode

    from dynablocks.reporting.words import duration

    splits, device = load_splits(config), torch.device(choose_device(config.training.device))
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    network, description = _described(config, splits)
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
    if not directory.is_dir() or find_checkpoint(directory) is None:
        return []
    if not (directory / "training.json").exists():
        return ["training (resumes)"]
    images = _training_facts(directory).get("fingerprint", "")
    return ["training (finished)"] + [name for name in ("attack", "certificate") if _current(directory, name, images)]


def require_out(directory: Path) -> Path:
    """``directory`` when it can be a run directory, otherwise one sentence."""
    if directory.exists() and not directory.is_dir():
        raise InvalidArgument(f"--out {directory} is a file; give a folder.")
    if directory.is_dir() and any(directory.iterdir()) and not _looks_like_run(directory):
        raise BadData(f"--out {directory} holds other files; give a new folder, or one that a run made.")
    return directory


def _looks_like_run(directory: Path) -> bool:
    """Whether a training made this folder: by what its files hold, since others have a config.yaml too."""
    if any((directory / name / "manifest.json").is_file() for name in ("checkpoint", "checkpoint.previous")):
        return True
    config = directory / "config.yaml"
    if config.is_file():
        try:
            from_yaml(config.read_text(encoding="utf-8"), str(config))
        except (OSError, UnicodeDecodeError, DynablocksError):
            return False
        return True
    return all(entry.name.startswith(".") for entry in directory.iterdir())
