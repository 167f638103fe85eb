"""Every setting of a run, the presets, and the YAML they are written in."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dynablocks.errors import InvalidArgument, require_choice, require_range
from dynablocks.files import plain_data, tuples
from dynablocks.models import MODELS, ModelConfig
from dynablocks.models.network import SHARED
from dynablocks.robustness import AttackConfig
from dynablocks.training import TrainingConfig
from dynablocks.training.checkpoint import plain_yaml

PRESETS = ("smoke", "cpu", "paper")
"""Presets that every model, data set and experiment has."""

CERTIFIED_PRESETS = ("certified/cpu-15min", "certified/cpu-1h", "certified/gpu-5min", "certified/gpu-25min")
"""The most certified accuracy from so many minutes of training; for the certified model and images of 32 x 32 pixels.
Sides of 16, 32, 48 or 64 will do: the dense matrices grow with their fourth power."""


@dataclass(frozen=True)
class DataConfig:
    """Which images.

    Args:
        name: digits, cifar10, cifar100 or folder; empty (null) is found out from dir, or digits without one.
        dir: where the copy is: Hub-schema parquet, the original batches, or class folders.
        validation: how many training images to hold out for validation; the test images are never used to choose.
    """

    name: str | None = None
    dir: Path | None = None
    validation: int = 0


@dataclass(frozen=True)
class RunConfig:
    """Every setting of train, attack, certify and report.

    Args:
        preset: smoke (seconds), cpu (minutes on two cores) or paper (the paper's settings; a GPU or patience);
            certified/cpu-15min, certified/cpu-1h, certified/gpu-5min, certified/gpu-25min: the certified model in so
            many minutes of training, the first of them the default for CIFAR images.
        model: the network.
        data: the images.
        training: how to train.
        attack: how to attack.
        warm_start: a run directory whose weights, but for the last layer, the training starts from.
        teacher: a run directory whose network tells, beside the label, what else each training image may be.
        teacher_share: the share in (0, 1] of a label that is the teacher's; the rest is the given one's.

    Raises:
        InvalidArgument: an unknown preset, or a share out of its range or without a teacher.
    """

    preset: str = "cpu"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    warm_start: Path | None = None
    teacher: Path | None = None
    teacher_share: float = 0.7

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS + CERTIFIED_PRESETS)
        require_range("teacher_share", self.teacher_share, 0, 1, open_low=True)
        if self.teacher is None and self.teacher_share != RunConfig.teacher_share:
            raise InvalidArgument(
                f"teacher_share is {self.teacher_share:g} without a teacher, which changes nothing; give a --teacher."
            )


_CONVNET: dict[str, Any] = {
    "training": {
        "epochs": None,
        "max_minutes": 10.0,
        "batch_size": 512,
        "optimiser": "nesterov",
        "lr": 0.4,
        "weight_decay": 5e-4,
        "schedule": "one-cycle-linear",
        "warmup": 0.2,
        "loss": "cross-entropy",
        "label_smoothing": 0.1,
        "crop_padding": 2,
        "crop_fill": "reflect",
        "flip": True,
    },
}
_CONVNET_ON_DIGITS: dict[str, Any] = {
    "model": {"widths": (32, 64), "layers": (2, 2)},
    "training": _CONVNET["training"]
    | {"epochs": 20, "max_minutes": None, "batch_size": 64, "lr": 0.1, "crop_padding": 0, "crop_fill": None}
    | {"flip": False},
}
PAPER_MODELS = ("resnet", "naive", "non_expansive", "prescribed", "flexible")

_SMOKE: dict[str, Any] = {
    "model": {"widths": (8, 16), "layers": (1, 1)},
    "training": {"epochs": 4, "batch_size": 128, "lr": 0.02, "optimiser": "adam"},
    "attack": {
        "samples": 64,
        "steps": 5,
        "epsilons": (0.0, 36 / 255, 72 / 255, 108 / 255, 0.5, 1.0),
        "losses": ("ce", "margin"),
    },
}
_OFFSET_ADAM: dict[str, Any] = {
    "optimiser": "adam",
    "lr": 0.01,
    "momentum": 0.9,
    "schedule": "one-cycle",
    "loss": "offset-cross-entropy",
    "temperature": 0.25,
}
_DIGITS: dict[str, Any] = {
    "model": {"widths": (32, 64), "layers": (2, 2), "kernel_size": 2, "padding": "full"},
    "training": _OFFSET_ADAM | {"epochs": 60, "batch_size": 64, "offset": 0.6},
    "attack": {"samples": 359},
}
_CIFAR: dict[str, Any] = {
    "model": {"widths": (32, 64, 128), "layers": (2, 3, 3), "kernel_size": 2, "padding": "full"},
    "training": _OFFSET_ADAM
    | {
        "epochs": 32,
        "max_minutes": 42.0,
        "batch_size": 256,
        "offset": 0.6,
        "temperature": 0.35,
        "crop_padding": 2,
        "flip": True,
    },
}
# Chosen on held-out training images: circular padding keeps gradient norms at h = 2; a step that moves half of the
# directions costs half, and more of them do better; few pixels with many channels beat many with few, and dense steps
# of all 2 x 2 x 256 numbers that are left beat convolutions of them, and matrices divided by their norm orthogonal rows
# there. Batches of 512 halve what orthogonality costs.
# The budget alone ends the training: as many epochs as fit. The hour overfits with crops of 3 pixels filled with zeros;
# 4 reflected pixels certified more on held-out images after 25 minutes. The GPU budgets are untried: they should pass
# over the images more often than the hour does, so they have its crops, and are validated after every twentieth pass:
# each time the norms of all matrices are computed on the CPU.
_PER_MINUTE: dict[str, Any] = {
    "model": {
        "stem": 4,
        "widths": (64, 128, 256),
        "layers": (4, 4, 0),
        "kernel_size": 2,
        "padding": "circular",
        "rows": 0.5,
        "dense_layers": 6,
        "dense_rows": 0.5,
        "dense_step": "potential",
    },
    "training": _CIFAR["training"] | {"epochs": None, "batch_size": 512, "lr": 0.005},
}
_BUDGETS: dict[str, dict[str, Any]] = {
    "certified/cpu-15min": {"training": {"max_minutes": 15.0}},
    "certified/cpu-1h": {"training": {"max_minutes": 60.0, "crop_padding": 4, "crop_fill": "reflect"}},
    "certified/gpu-5min": {
        "model": {"widths": (128, 256, 512)},
        "training": {"max_minutes": 5.0, "crop_padding": 4, "crop_fill": "reflect", "validate_every": 20},
    },
    "certified/gpu-25min": {
        "model": {"widths": (192, 384, 768), "layers": (6, 6, 0)},
        "training": {"max_minutes": 25.0, "crop_padding": 4, "crop_fill": "reflect", "validate_every": 20},
    },
}
_HINGE: dict[str, Any] = {"loss": "hinge", "margin": 0.07, "optimiser": "sgd", "momentum": 0.9, "regularisation": 1.0}
_PAPER_ON_CPU: dict[str, Any] = {
    "model": {"widths": (16, 32, 64), "layers": (1, 1, 1)},
    "training": _HINGE
    | {
        "epochs": 20,
        "max_minutes": 42.0,
        "batch_size": 128,
        "lr": 0.05,
        "schedule": "one-cycle",
        "crop_padding": 2,
        "flip": True,
    },
}
_PAPER: dict[str, Any] = {
    "training": _HINGE
    | {
        "epochs": 100,
        "batch_size": 128,
        "lr": 0.01,
        "schedule": "step",
        "crop_padding": 4,
        "flip": True,
        "precision": "32",
    },
}


def default_preset(model: str, data: str) -> str:
    """The preset of a run that names none.

    Example:
        >>> default_preset("certified", "cifar10"), default_preset("certified", "digits")
        ('certified/cpu-15min', 'cpu')
    """
    return CERTIFIED_PRESETS[0] if model == "certified" and data.startswith("cifar") else "cpu"


def preset_settings(preset: str, model: str, data: str) -> dict[str, Any]:
    """What a preset sets for a model on a data set; configuration files and flags override it.

    A model of one's own gets those of its settings that it has.

    Example:
        >>> preset_settings("paper", "prescribed", "cifar10")["training"]["epochs"]
        100
    """
    settings = _preset_settings(preset, model, data)
    kind = MODELS.get(model)
    if kind is None or "model" not in settings:
        return settings
    taken = kind.settings | SHARED
    return settings | {"model": {name: value for name, value in settings["model"].items() if name in taken}}


def _preset_settings(preset: str, model: str, data: str) -> dict[str, Any]:
    require_choice("preset", preset, PRESETS + CERTIFIED_PRESETS)
    if preset in CERTIFIED_PRESETS:
        return _certified_preset(preset, model, data)
    colour = not data.startswith("digits")
    if preset == "smoke":
        return _SMOKE
    # A mirrored digit is none, and of 8 x 8 pixels a crop loses the stroke.
    upright = {"crop_padding": 0, "flip": False}
    if preset == "paper":
        return _PAPER if colour else {"training": _PAPER["training"] | upright}
    if model == "convnet":
        return _CONVNET if colour else _CONVNET_ON_DIGITS | {"attack": _DIGITS["attack"]}
    if model in PAPER_MODELS:
        small = {"training": _PAPER_ON_CPU["training"] | upright | {"epochs": 60}}
        return _PAPER_ON_CPU if colour else _PAPER_ON_CPU | small | {"attack": _DIGITS["attack"]}
    return _CIFAR if colour else _DIGITS


def _certified_preset(preset: str, model: str, data: str) -> dict[str, Any]:
    if model != "certified" or data.startswith("digits"):
        raise InvalidArgument(
            f"preset {preset} is for model certified on images of 32 x 32 pixels (sides of 16, 32, 48 or 64 will do), "
            f"not for {model} on {data}; add --data-dir with a CIFAR copy, or take --preset cpu."
        )
    changes = _BUDGETS[preset]
    return {group: settings | changes.get(group, {}) for group, settings in _PER_MINUTE.items()}


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML that ``--config`` reads again."""
    import yaml

    return str(yaml.safe_dump(plain_data(asdict(config)), sort_keys=False, allow_unicode=True))


def from_yaml(text: str, where: str) -> RunConfig:
    """The configuration of :func:`to_yaml`.

    Raises:
        InvalidArgument: not YAML, with an alias, or a setting is unknown or out of range.
    """
    import yaml

    try:
        content = plain_yaml(text)
        return RunConfig(
            preset=content["preset"],
            model=ModelConfig(**tuples(content["model"])),
            data=DataConfig(**(content["data"] | {"dir": content["data"]["dir"] and Path(content["data"]["dir"])})),
            training=TrainingConfig(**content["training"]),
            attack=AttackConfig(**tuples(content["attack"])),
            warm_start=Path(content["warm_start"]) if content.get("warm_start") else None,
            teacher=Path(content["teacher"]) if content.get("teacher") else None,
            teacher_share=content.get("teacher_share", RunConfig.teacher_share),
        )
    except InvalidArgument:
        raise
    except (yaml.YAMLError, TypeError, LookupError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidArgument(
            f"{where} is not a configuration of this version ({first}); the same training command, without "
            "--overwrite, writes it again."
        ) from error
