"""One training in progress: everything a step needs and a checkpoint holds."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.data import augment, batch_indices, to_unit_range
from dynablocks.data.augmentation import require_crop
from dynablocks.errors import BadCheckpoint, BadData, Diverged, InvalidArgument
from dynablocks.progress import Stopped
from dynablocks.switching.constraints import keep_constraints
from dynablocks.training.averaging import ExponentialAverage
from dynablocks.training.budget import StepPlan
from dynablocks.training.checkpoint import has_checkpoint, load_into, load_weights, save_checkpoint
from dynablocks.training.config import TrainingConfig
from dynablocks.training.losses import make_loss
from dynablocks.training.optimisers import load_optimiser, make_optimiser
from dynablocks.training.precision import (
    check_precision,
    choose_device,
    choose_precision,
    precision_plugin,
    supports_bf16,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from dynablocks.data import DataSplits, ImageDataset

ROUNDED_SUM = 0.01
"""By so much the probabilities of an image may miss the sum 1: those of 1,000 classes in bfloat16 do."""


@dataclass
class Tally:
    """Loss, hits and images of the epoch so far; steps enter on the device and are counted when looked at."""

    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    _losses: list[Tensor] = field(default_factory=list)
    _correct: list[Tensor] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Note one step, without waiting for the device."""
        self._losses.append(loss.detach())
        self._correct.append((logits.detach().argmax(1) == labels).sum())
        self._sizes.append(len(labels))

    @property
    def pending(self) -> int:
        """How many noted steps are not counted yet."""
        return len(self._losses)

    def count(self) -> list[float]:
        """Wait for the device, count the noted steps, and return their losses."""
        if not self._losses:
            return []
        losses = torch.stack(self._losses).tolist()
        self.correct += int(torch.stack(self._correct).sum())
        # One by one: the sum must not depend on when it was looked at.
        for loss, size in zip(losses, self._sizes, strict=True):
            self.loss_sum += loss * size
        self.images += sum(self._sizes)
        for noted in (self._losses, self._correct, self._sizes):
            noted.clear()
        return losses

    def means(self) -> dict[str, float]:
        """Mean loss and accuracy of the counted steps."""
        images = max(1, self.images)
        return {"loss": self.loss_sum / images, "accuracy": self.correct / images}


class Session:
    """A model on its device with optimiser, plan and data, at a step.

    Batch order and augmentation are functions of (seed, epoch, step), so the state of a session is the weights, the
    optimiser's state, the plan, the epoch's tally and torch's random state (for models with dropout): no loader, no
    other generator.

    Args:
        model: pixels in [0, 1] to logits.
        splits: the data.
        config: the settings.
        directory: where checkpoints go; empty for none.
        config_text: stored beside each checkpoint.
        state: what a checkpoint stored; empty for a new training.
        checkpoint: the folder that ``state`` came from.
        soft_labels: probabilities of the classes for each training image, in place of its label.

    Raises:
        InvalidArgument: :func:`device_for` refuses the training, or a second one on several devices is asked of one
            program.
    """

    joined: ClassVar[bool] = False
    """Whether this program has trained on several devices: their other processes have ended, or wait in vain."""

    def __init__(
        self,
        model: nn.Module,
        splits: DataSplits,
        config: TrainingConfig,
        directory: Path | None,
        config_text: str,
        state: dict[str, Any],
        checkpoint: Path | None,
        soft_labels: Tensor | None = None,
    ) -> None:
        check_data(model, splits.train)
        smoothing, classes = config.label_smoothing or 0.0, getattr(model, "num_classes", None)
        targets = targets_of(splits.train, soft_labels, smoothing, classes)
        if config.devices > 1 and Session.joined:
            raise InvalidArgument("one program trains on several devices once; train the next network in another.")
        begun: str | None = state.get("precision")
        device = device_for(config, splits.train, begun)
        self.config, self.directory, self.config_text = config, directory, config_text
        # Of several processes each has a GPU of its own; "cuda" alone is the first one's.
        several = device == "cuda" and config.devices > 1
        self.model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if several else device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.precision = begun or self._choose_precision(splits.train, device)
        self.fabric = launched(self.precision, device, config.devices)
        if config.devices > 1:
            Session.joined = True
        with others_ended(self.fabric):
            self._prepare(splits, targets, state, checkpoint)

    def _prepare(self, splits: DataSplits, targets: Tensor, state: dict[str, Any], checkpoint: Path | None) -> None:
        """All that follows the start of the other processes."""
        config, model = self.config, self.model
        if config.threads is not None:
            # Fabric gave each of several processes its share of the processors.
            torch.set_num_threads(config.threads)
        self.optimiser = make_optimiser(model, config)
        keep_constraints(model, self.optimiser)
        self.wrapped, self.wrapped_optimiser = self.fabric.setup(model, self.optimiser)
        self.average = ExponentialAverage(model, config.ema_decay) if config.ema_decay else None
        self.loss_function = make_loss(config)
        self.device = self.fabric.device
        self.images = self._laid_out(splits.train.images.to(self.device))
        self.labels, self.targets = splits.train.labels.to(self.device), targets.to(self.device)
        self.validation = splits.validation
        self._epoch: int | None = None
        self._batches: list[Tensor] = []
        first = self._batches_of(0)
        self.steps_per_epoch, self.batch_size = len(first), len(first[0])
        limit = None if config.epochs is None else max(1, round(config.epochs * self.steps_per_epoch))
        budget = None if config.max_minutes is None else 60 * config.max_minutes
        self.plan = StepPlan.of(limit, budget)
        self.step, self.tally, self._seconds = 0, Tally(), 0.0
        self.metrics: dict[str, float] = {}
        # torch.manual_seed seeds GPUs too, which this training may not be on.
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(config.seed)
        else:
            torch.manual_seed(config.seed)
        if checkpoint is not None:
            self._restore(state, checkpoint)
        self.last_save = self._started = time.perf_counter()
        self.save_seconds = 0.0

    def _choose_precision(self, train: ImageDataset, device: str) -> str:
        if self.config.precision != "auto":
            return self.config.precision
        if self.config.devices > 1:
            return "bf16" if supports_bf16(torch.device(device)) else "32"
        sample = to_unit_range(train.images[: self.config.batch_size].to(device))
        return choose_precision(self.model, self._laid_out(sample), device)

    def _laid_out(self, pixels: Tensor) -> Tensor:
        return pixels.contiguous(memory_format=torch.channels_last) if self.config.channels_last else pixels

    def _batches_of(self, epoch: int) -> list[Tensor]:
        if epoch != self._epoch:
            batches = batch_indices(len(self.images), self.config.batch_size, self.config.seed, epoch)
            self._epoch, self._batches = epoch, [batch.to(self.device) for batch in batches]
        return self._batches

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Augmented pixels in [0, 1], labels, and what the loss takes for these; of several devices, each its share."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        whole, config = self._batches_of(epoch)[position], self.config
        share = slice(self.fabric.global_rank, None, self.fabric.world_size)
        chosen, crops = whole[share], (config.crop_padding, config.flip, config.crop_fill or "zeros")
        pixels = augment(self.images[chosen], config.seed, epoch, position, *crops, count=len(whole), share=share)
        return self._laid_out(pixels), self.labels[chosen], self.targets[chosen]

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, over all resumes; validation is not counted."""
        return self._seconds + time.perf_counter() - self._started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the training clock."""
        self._seconds = self.elapsed
        try:
            yield
        finally:
            self._started = time.perf_counter()

    def images_per_second(self) -> float:
        """Images trained on in a second, over the whole training."""
        return self.step * self.batch_size / max(self.elapsed, 1e-9)

    def epochs_done(self) -> float:
        """Passes over the training images, whole and part."""
        return self.step / self.steps_per_epoch

    def result(self) -> nn.Module:
        """The model to evaluate and keep: the averaged one where averaging is on."""
        return self.model if self.average is None else self.average.model()

    def save(self, summary: dict[str, Any] | None = None) -> None:
        """Write a checkpoint, in the first process."""
        started = time.perf_counter()
        if self.directory is not None and self.fabric.is_global_zero:
            save_checkpoint(self.directory, self.result(), self.config_text, self._state(summary))
            self.save_seconds = time.perf_counter() - started
        # Its end counts: where writing takes longer than checkpoint_seconds, each step would have to be written.
        self.last_save = time.perf_counter()

    def part(self) -> None:
        """After the last exchange of several processes: end the threads that exchanged. No step can follow.

        A process that ends with them alive may be aborted: such a thread lets its last tensor go while Python ends.
        They are joined once nothing holds the group, as the wrapped model does; destroying it is not enough. With
        NCCL the processes wait for each other in it, so it must not be left to their exits, which may lie hours apart.

        Source: https://github.com/pytorch/pytorch/issues/190489.
        """
        if self.fabric.world_size == 1:
            return
        del self.wrapped, self.wrapped_optimiser
        gc.collect()
        torch.distributed.destroy_process_group()

    def _state(self, summary: dict[str, Any] | None) -> dict[str, Any]:
        """What a checkpoint holds beside the model; a finished training never goes on, and so needs no optimiser."""
        state: dict[str, Any] = {
            "step": self.step,
            "seconds": self.elapsed,
            "precision": self.precision,
            "plan": self.plan.state(),
            "tally": [self.tally.loss_sum, self.tally.correct, self.tally.images],
            "metrics": self.metrics,
            "summary": summary,
        }
        if summary is not None:
            return state
        state["optimiser"] = self.optimiser.state_dict()
        state["scaler"] = self.fabric.strategy.precision.state_dict()
        state["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        if self.average is not None:
            state["weights"], state["average"] = self.model.state_dict(), self.average.copy.state_dict()
        return state

    def _restore(self, state: dict[str, Any], checkpoint: Path) -> None:
        if self.average is None:
            load_weights(checkpoint, self.model)
        else:
            load_into(self.average.copy, state["average"], checkpoint)
            load_into(self.model, state["weights"], checkpoint)
        try:
            load_optimiser(self.optimiser, state["optimiser"])
        except ValueError as error:
            raise BadCheckpoint(
                f"{checkpoint} was made by other code, whose optimiser had other weights ({error}); choose another "
                "--out, or --overwrite to train from the start."
            ) from error
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
        budget = self.plan.budget_seconds
        self.step, self._seconds, self.metrics = state["step"], state["seconds"], state["metrics"]
        self.plan = StepPlan(**{**state["plan"], "budget_seconds": budget})
        if budget is None:
            self.plan.without_budget(self.step)
        elif budget != state["plan"]["budget_seconds"]:
            self.plan.fit(self.step, self._seconds)
            # Of a budget that is used up one step is left, after which the epoch is recorded and validated.
            self.plan.total = max(self.plan.total, self.step + 1)
        self.tally = Tally(*state["tally"])


def launched(precision: str, device: str, devices: int) -> Fabric:
    """Fabric with its processes, of which the settings alone, and torchrun, say how many there are.

    Not so a job of SLURM, LSF or MPI, in which Fabric would take its variables for the processes of one training, or
    refuse them: each of several tasks is a training of its own.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    environment = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()
    with without_advice():
        fabric = Fabric(accelerator=device, devices=devices, plugins=[precision_plugin(precision, device), environment])
        fabric.launch()
    return fabric


@contextlib.contextmanager
def others_ended(fabric: Fabric) -> Iterator[None]:
    """Where the first process fails, end those that it started: they would wait for it for half an hour.

    After a stop that was agreed on they end by themselves.
    """
    try:
        yield
    except Stopped:
        raise
    except BaseException:
        if fabric.world_size > 1:
            from lightning_fabric.utilities import distributed

            # Its farewell at exit would wait for the others, which are killed here.
            farewell: Any = getattr(distributed, "_destroy_dist_connection", None)
            atexit.unregister(farewell)
        # Fabric keeps an eye on this list: where one of it ended by a signal, it kills this process too.
        started = getattr(fabric.strategy.launcher, "procs", [])
        others = list(started)
        started.clear()
        for process in others:
            process.kill()
        raise


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Leave out that Fabric advises TF32 for products: that is for the user's own settings of torch.

    That all processes are there is left out with it; that each one begins stays.
    """
    logger = logging.getLogger("lightning_fabric.utilities.rank_zero")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def device_for(config: TrainingConfig, train: ImageDataset, begun: str | None = None) -> str:
    """``"cpu"`` or ``"cuda"``, once nothing in the settings speaks against a training on these images and devices.

    Args:
        config: the settings.
        train: the images.
        begun: the precision that a training which goes on began in and keeps; ``None`` for one that begins.

    Raises:
        InvalidArgument: the images cannot be cropped or shared as the settings say, the devices are not there or have
            no such precision, or a training that begins has a setting that would change nothing.
    """
    if begun is None:
        config.require_settings()
    require_crop(train.image_shape[1:], config.crop_padding, config.crop_fill or "zeros")
    if min(config.batch_size, len(train)) % config.devices:
        raise InvalidArgument(
            f"{len(train)} training images make one batch, which {config.devices} devices cannot share equally; use "
            "another number of devices."
        )
    device = choose_device(config.device, config.devices)
    check_precision(begun or config.precision, device, begun=begun is not None)
    return device


def check_data(model: nn.Module, train: ImageDataset) -> None:
    """Refuse training images that the model cannot take.

    Raises:
        BadData: the shape or a label does not fit the model.
    """
    shape, wanted = tuple(train.images.shape[1:]), getattr(model, "input_shape", None)
    if wanted is not None and shape != tuple(wanted):
        raise BadData(
            f"{train.name} has images of shape {shape}, the model takes {tuple(wanted)}; choose one that fits."
        )
    classes, largest = getattr(model, "num_classes", None), int(train.labels.max())
    if classes is not None and largest >= classes:
        raise BadData(f"{train.name} has the label {largest}, the model has {classes} classes; give it more.")


def targets_of(train: ImageDataset, soft_labels: Tensor | None, smoothing: float, classes: int | None) -> Tensor:
    r"""What the loss takes for the labels: these, (N,), or where they are softened probabilities of classes, (N, K).

    .. math:: (1 - s)\, p_i + \frac{s}{K}

    with the soft labels p, or those of certainty where there are none.

    Args:
        train: the training images.
        soft_labels: p, (N, K).
        smoothing: s.
        classes: K, the number of logits; that of the data when ``None``.

    Raises:
        InvalidArgument: the soft labels are no probabilities, not one row an image, or not one column a class.
    """
    count = train.num_classes if classes is None else classes
    if soft_labels is not None:
        require_probabilities(soft_labels, len(train), count)
    elif not smoothing:
        return train.labels
    certain = functional.one_hot(train.labels, count).float()
    return (1 - smoothing) * (certain if soft_labels is None else soft_labels.float()) + smoothing / count


def require_probabilities(soft_labels: Tensor, images: int, classes: int) -> None:
    """Refuse soft labels that a training on so many images of so many classes cannot take.

    Raises:
        InvalidArgument: as :func:`targets_of` says.
    """
    shape = tuple(soft_labels.shape)
    if not soft_labels.is_floating_point() or shape != (images, classes):
        raise InvalidArgument(
            f"soft_labels are {soft_labels.dtype} of shape {shape}; a probability for each of {images} training images "
            f"and {classes} classes is needed."
        )
    sums = soft_labels.double().sum(1)
    if not bool((soft_labels >= 0).all() and ((sums - 1).abs() <= ROUNDED_SUM).all()):
        raise InvalidArgument("soft_labels hold a row that is negative somewhere, or does not sum to 1; normalise it.")


def require_finite_weights(session: Session) -> None:
    """Refuse to go on, or to save, when a weight is not finite.

    Raises:
        Diverged: one is not.
    """
    sums = [p.detach().sum() for p in session.model.parameters()]
    if not bool(torch.stack([s.float() for s in sums]).isfinite().all()):
        raise diverged(session, session.step, "a weight")


def diverged(session: Session, step: int, what: str) -> Diverged:
    """The error for a training that left the finite numbers at ``step``."""
    lr = session.optimiser.param_groups[0]["lr"]
    kept = f" The last good checkpoint in {session.directory} is kept." if has_checkpoint(session.directory) else ""
    return Diverged(
        f"{what} is not finite after step {step} (learning rate {lr:.3g}); train again with a smaller "
        f"--training.lr or a --training.gradient_clip such as 1, into another --out or with --overwrite.{kept}"
    )
