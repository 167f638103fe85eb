"""Every setting of a training, in one dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from dynablocks.data.augmentation import CROP_FILLS
from dynablocks.errors import InvalidArgument, require_choice, require_range, require_whole
from dynablocks.training.losses import LOSSES
from dynablocks.training.optimisers import OPTIMISERS
from dynablocks.training.schedules import LARGEST_RATE, SCHEDULES

PRECISIONS = ("auto", "32", "bf16", "16")
DEVICES = ("auto", "cpu", "cuda")
HOW = {"result": False}
"""Marks a setting that says how or where to compute and does not decide what comes out, up to rounding."""
ADVERSARIES = ("none", "pgd", "trades")
UNREAD: dict[str, tuple[str, ...]] = {
    "none": ("adversary_epsilon", "adversary_steps", "adversary_step_size", "trades_beta"),
    "pgd": ("trades_beta",),
    "trades": (),
}
"""The settings that each adversary leaves unread."""
MOST = {
    "epochs": 1e9,
    "max_minutes": 1e7,
    "lr": LARGEST_RATE,
    "step_factor": 10.0,
    "adversary_epsilon": 1e6,
    "adversary_step_size": 1e6,
}
"""The largest values of settings with which larger ones make numbers of steps, seconds, pixels or learning rates
overflow."""
MOST_THREADS = 4096


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; every field has a default that trains a small network.

    Args:
        epochs: passes over the training images; may be a fraction; empty (null) means as many as fit into max_minutes.
        batch_size: images per step, over all devices together.
        optimiser: sgd, nesterov, adam, adamw or nadam.
        lr: the largest learning rate; the schedule multiplies it.
        momentum: momentum of SGD, or beta1 of the Adam family.
        weight_decay: weight decay on tensors with two or more dimensions.
        schedule: step, one-cycle (linear warm-up, then cosine to 0), one-cycle-linear or constant.
        step_epochs: the step schedule multiplies the learning rate by step_factor every so many epochs.
        step_factor: see step_epochs.
        warmup: the share of the training in which a one-cycle schedule rises.
        loss: hinge, offset-cross-entropy or cross-entropy.
        margin: the lead of the true logit that the hinge loss asks for.
        offset: what offset-cross-entropy takes from the true logit.
        temperature: temperature of offset-cross-entropy.
        power: q in (0, 1] makes offset-cross-entropy the bounded (1 − p^q)/q, in which images that cannot be won count
            less; empty (null): −log p.
        focus: β >= 1 multiplies offset-cross-entropy by (1 − p)^β, so that images that are won count less; empty
            (null): by 1.
        label_smoothing: s in (0, 1), the share of each label that goes to all classes alike; empty (null), or 0: none.
        regularisation: weight of the model's own penalties (OCNN orthogonality, step sizes outside their region).
        adversary: none; pgd trains on the images an attack found in place of the images; trades adds the divergence
            between the logits of both.
        adversary_epsilon: l2 radius of the training's attack, in pixel units [0, 1].
        adversary_steps: gradient steps of the training's attack; each costs about 0.7 of a training step.
        adversary_step_size: step length divided by adversary_epsilon; empty (null): 1 for one step, else 2 / steps.
        trades_beta: weight of the divergence in trades.
        crop_padding: pixels of padding for the random crop; 0 turns it off.
        crop_fill: what that padding holds: zeros (black; also when empty), or reflect (the image mirrored at its edge,
            for paddings below its height and width).
        flip: mirror images left-right at random.
        ema_decay: decay of the exponential average of the weights that is evaluated and kept; 0 turns it off.
        gradient_clip: largest gradient norm; empty (null) turns it off.
        precision: 32, bf16 or 16 (mixed), or auto, which takes bf16 when it measures it as 10 % faster (on
            several devices: where they support it). 32 leaves torch's settings as they are, by which convolutions on
            GPUs take factors in TF32; attacks and certificates never do.
        channels_last: lay images out with the channels last, which is faster for convolutions.
        max_minutes: time budget of the training; the schedule is fitted to it.
        device: cpu, cuda, or auto, which takes a GPU when there is one.
        devices: how many of them to train on together.
        threads: CPU threads; empty (null) leaves torch's choice.
        seed: seed of everything random: first weights, held-out images, batch order, augmentation, attacks while
            training.
        checkpoint_seconds: write a checkpoint this often, and at an epoch's end when a tenth of this has passed, and
            fifty times the seconds that one takes.
        validate_every: measure the validation images every so many epochs, and at the end.

    Raises:
        InvalidArgument: a value is of another kind or out of its range, or a name is unknown.

    Example:
        >>> TrainingConfig(batch_size=0)
        Traceback (most recent call last):
        dynablocks.errors.InvalidArgument: batch_size is 0; a whole number from 1 is needed.
    """

    epochs: float | None = 10.0
    batch_size: int = 128
    optimiser: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "one-cycle"
    step_epochs: float = 30.0
    step_factor: float = 0.1
    warmup: float = 0.1
    loss: str = "offset-cross-entropy"
    margin: float = 0.15
    offset: float = 0.4
    temperature: float = 0.25
    power: float | None = None
    focus: float | None = None
    label_smoothing: float | None = None
    regularisation: float = 0.0
    adversary: str = "none"
    adversary_epsilon: float = 0.5
    adversary_steps: int = 2
    adversary_step_size: float | None = None
    trades_beta: float = 6.0
    crop_padding: int = 0
    crop_fill: str | None = None
    flip: bool = False
    ema_decay: float = 0.0
    gradient_clip: float | None = None
    precision: str = "auto"
    channels_last: bool = field(default=True, metadata=HOW)
    max_minutes: float | None = None
    device: str = field(default="auto", metadata=HOW)
    devices: int = field(default=1, metadata=HOW)
    threads: int | None = field(default=None, metadata=HOW)
    seed: int = 0
    checkpoint_seconds: float = field(default=60.0, metadata=HOW)
    validate_every: int = field(default=1, metadata=HOW)

    def __post_init__(self) -> None:
        if self.epochs is None and self.max_minutes is None:
            raise InvalidArgument("epochs and max_minutes are both empty; give at least one of them.")
        self._check_flags()
        self._check_names()
        self._check_numbers()
        ranges: dict[str, tuple[int, int | None]] = dict.fromkeys(
            ("batch_size", "devices", "validate_every", "adversary_steps"), (1, None)
        )
        ranges |= {"crop_padding": (0, None), "seed": (0, 2**63 - 1), "threads": (1, MOST_THREADS)}
        for name, limits in ranges.items():
            if name != "threads" or self.threads is not None:
                object.__setattr__(self, name, require_whole(name, getattr(self, name), *limits))
        if self.batch_size % self.devices:
            raise InvalidArgument(
                f"batch_size {self.batch_size} cannot be shared by {self.devices} devices; choose a multiple of "
                f"{self.devices}."
            )

    @property
    def adversary_factor(self) -> float:
        """About how many times as long a step takes as one without an adversary."""
        # TRADES trains on the images as well, and takes their predictions for the attack.
        without = {"none": 1.0, "pgd": 1.0, "trades": 2.3}[self.adversary]
        return without if self.adversary == "none" else without + 0.7 * self.adversary_steps

    def require_settings(self) -> None:
        """Refuse a setting of the adversary that would change nothing.

        Trainings ask for it that begin. Settings that are read may hold one: a run of before is still certified and
        shown, and goes on.

        Raises:
            InvalidArgument: such a setting is given, and not as by default.

        Example:
            >>> TrainingConfig(adversary="pgd", adversary_steps=7).require_settings()
        """
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in UNREAD[self.adversary] and value != setting.default:
                raise InvalidArgument(
                    f"{setting.name} is {value!r}, which changes nothing with adversary {self.adversary}; leave it out."
                )

    def _check_flags(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if isinstance(setting.default, bool) and not isinstance(value, bool):
                raise InvalidArgument(f"{setting.name} is {value!r}; True or False is needed.")

    def _check_names(self) -> None:
        OPTIMISERS.get_known(self.optimiser)
        SCHEDULES.get_known(self.schedule)
        LOSSES.get_known(self.loss)
        require_choice("precision", self.precision, PRECISIONS)
        require_choice("device", self.device, DEVICES)
        if self.crop_fill is not None:
            require_choice("crop_fill", self.crop_fill, CROP_FILLS)
        require_choice("adversary", self.adversary, ADVERSARIES)

    def _check_numbers(self) -> None:
        for name in ("epochs", "max_minutes", "gradient_clip", "adversary_step_size"):
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), 0, MOST.get(name, math.inf), open_low=True)
        for name in ("lr", "step_factor", "temperature", "adversary_epsilon"):
            require_range(name, getattr(self, name), 0, MOST.get(name, math.inf), open_low=True)
        require_range("step_epochs", self.step_epochs, 1e-6)
        for name in ("weight_decay", "margin", "offset", "regularisation", "trades_beta", "checkpoint_seconds"):
            require_range(name, getattr(self, name), 0)
        if self.power is not None:
            require_range("power", self.power, 0, 1, open_low=True)
        if self.focus is not None:
            require_range("focus", self.focus, 1, 1000)
        if self.label_smoothing is not None:
            require_range("label_smoothing", self.label_smoothing, 0, 0.999999)
        for name in ("momentum", "warmup", "ema_decay"):
            require_range(name, getattr(self, name), 0, 0.999999)
        for name in ("power", "focus"):
            if getattr(self, name) is not None and self.loss != "offset-cross-entropy":
                raise InvalidArgument(
                    f"{name} belongs to loss offset-cross-entropy; got loss {self.loss}; leave {name} out."
                )
        if self.power is not None and self.focus is not None:
            raise InvalidArgument(f"power is {self.power} and focus is {self.focus}; leave one of them out.")
        if self.label_smoothing == 0:
            object.__setattr__(self, "label_smoothing", None)
        if self.crop_fill == "zeros":
            object.__setattr__(self, "crop_fill", None)  # one training, however it is spelled
        if self.crop_fill is not None and self.crop_padding == 0:
            raise InvalidArgument(
                f"crop_fill is {self.crop_fill!r} with crop_padding 0: nothing is cropped; give a crop_padding, or "
                "turn the fill off too: --training.crop_fill zeros."
            )
        if self.optimiser == "nesterov" and self.momentum == 0:
            raise InvalidArgument("optimiser nesterov needs momentum above 0; choose sgd, or a momentum such as 0.9.")
