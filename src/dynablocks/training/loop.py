"""The training loop: one function for every network, device, precision and number of processes."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.data import fingerprint, to_unit_range
from dynablocks.errors import BadCheckpoint
from dynablocks.files import expanded, tensor_digest
from dynablocks.linear import frozen_weights, shared_weights
from dynablocks.modes import cpu_threads, eval_mode
from dynablocks.progress import Stopped, clock
from dynablocks.run_files import HISTORY
from dynablocks.switching.constraints import regularisation, set_progress
from dynablocks.training.adversary import attacked, ball_points, divergence
from dynablocks.training.budget import FIRST_FITS, StepPlan
from dynablocks.training.checkpoint import find_checkpoint, load_weights, read_config, read_state, reserved, tidy
from dynablocks.training.config import TrainingConfig
from dynablocks.training.display import Display
from dynablocks.training.interrupts import polite_interrupt
from dynablocks.training.losses import logit_scale
from dynablocks.training.precision import choose_device
from dynablocks.training.record import append_metrics, check_same_run, cut_metrics, describe_run
from dynablocks.training.schedules import learning_rate_factor
from dynablocks.training.session import Session, Tally, diverged, others_ended, require_finite_weights

if TYPE_CHECKING:
    from rich.console import Console

    from dynablocks.data import DataSplits, ImageDataset

LOOK_STEPS = 20
LOOK_SECONDS = 1.0
SAVES_SHARE = 50
"""Between two checkpoints at ends of epochs lie at least so many times the seconds that one takes."""
VALIDATED_AT_ONCE = 4, 512
"""So many batches of a device are validated at once, and at most so many images: each takes far less memory than in
training, since no gradient is wanted."""


@dataclass(frozen=True)
class TrainingSummary:
    """What a finished training says about itself.

    Args:
        train_seconds: time spent training, over all resumes, without validation.
        images_per_second: images trained on in a second.
        epochs: passes over the training images.
        steps: optimiser steps.
        precision: 32, bf16 or 16.
        device: cpu or cuda.
        metrics: the last epoch's loss and accuracy (with several devices over the first one's share of the images),
            and the validation's where there are validation images.
    """

    train_seconds: float
    images_per_second: float
    epochs: float
    steps: int
    precision: str
    device: str
    metrics: dict[str, float] = field(default_factory=dict)


def fit(
    model: nn.Module,
    splits: DataSplits,
    config: TrainingConfig,
    directory: str | Path | None = None,
    *,
    describe: Mapping[str, Any] | None = None,
    console: Console | None = None,
    resume: bool = True,
    on_step: Callable[[int], None] | None = None,
    on_start: Callable[[], None] | None = None,
    soft_labels: Tensor | None = None,
) -> TrainingSummary:
    """Train ``model`` in place on ``splits.train``; go on from ``directory`` when it holds a checkpoint.

    On a CPU a resumed training ends with the very bits of an undisturbed one, as long as the threads stay and no time
    budget changes the plan: a plan fitted to measured speed depends on the machine's load. With several devices all
    processes but the first end here, so one program trains on several devices once. Torch's random state and its number
    of threads are the training's own meanwhile, and afterwards, whatever happens, what they were before.

    Args:
        model: pixels in [0, 1] (N, C, H, W) to logits; left in eval mode on the training device, with the averaged
            weights where averaging is on.
        splits: train and, where given, validation images.
        config: the settings.
        directory: gets ``checkpoint/`` and ``metrics.jsonl``; it may begin with ``~``; ``None`` for neither of the
            two.
        describe: what else decides the result (the model's settings, where soft labels are from); compared at a resume.
        console: a rich console for the progress; standard error when empty.
        resume: go on from a checkpoint; otherwise earlier checkpoints are deleted.
        on_step: called after each step with the number of steps done.
        on_start: called by the first process once nothing speaks against this training any more, and no checkpoint is
            left but one to go on from.
        soft_labels: probabilities of the classes for each training image, (N, classes), which the loss takes in place
            of its label: of a teacher, of several people who labelled it. Accuracies count the labels. They are
            compared at a resume, bit by bit, unless ``describe`` has a ``"teacher"``, which then stands for them.

    Returns:
        The summary; of a training that had finished before, the stored one, at once.

    Raises:
        BadCheckpoint: the checkpoint is broken, or belongs to other settings.
        InvalidArgument: the settings do not fit the images or the devices, one of a training that begins would change
            nothing, the soft labels are no probabilities for these images, or this program has trained on several
            devices before and is to do so again.
        DynablocksError: the loss is no longer finite, the disk is full, or a checkpoint cannot be read or moved.
        KeyboardInterrupt: after Ctrl-C, when the checkpoint is written; with several devices after one of the next
            steps, in the first process.
    """
    directory = None if directory is None else expanded(directory)
    with contextlib.ExitStack() as stack:
        stack.enter_context(global_state_kept(config))
        # A teacher, whose labels are no other at a resume, stands in what the run says of itself.
        told = soft_labels is None or "teacher" in (describe or {})
        text = settings_of(splits, config, describe, None if told else soft_labels)
        first = is_first_process(config)
        if directory is not None and first:
            stack.enter_context(reserved(directory))
        checkpoint = earlier_checkpoint(directory, text) if resume and directory is not None else None
        state = read_state(checkpoint) if checkpoint is not None else {}
        begin = on_start if on_start is not None and first else lambda: None
        if checkpoint is not None and state.get("summary"):
            summary = finished_before(model, config, checkpoint, state)
            begin()
            return summary
        session = Session(model, splits, config, directory, text, state, checkpoint, soft_labels)
        stack.enter_context(others_ended(session.fabric))
        prepare_directory(session, checkpoint)
        begin()
        display = stack.enter_context(Display(console, silent=not session.fabric.is_global_zero))
        if session.step:
            done = f"step {session.step}, {session.epochs_done():.4g} epochs"
            display.say(f"Going on from the checkpoint ({done}, {clock(session.elapsed)} of training).")
        stopping = stack.enter_context(polite_interrupt(silent=not session.fabric.is_global_zero))
        summary = train(session, display, stopping, on_step)
        session.part()
        if not session.fabric.is_global_zero:
            raise SystemExit(0)
        return summary


@contextlib.contextmanager
def global_state_kept(config: TrainingConfig) -> Iterator[None]:
    """Train with the threads of ``config``; give torch's random state and its threads back as they were.

    The random state of GPUs is read, and so CUDA started, where the training may run on one alone.
    """
    gpus = list(range(torch.cuda.device_count())) if config.device != "cpu" and torch.cuda.is_available() else []
    with cpu_threads(config.threads), torch.random.fork_rng(devices=gpus):
        yield


def settings_of(
    splits: DataSplits,
    config: TrainingConfig,
    describe: Mapping[str, Any] | None = None,
    soft_labels: Tensor | None = None,
) -> str:
    """All that decides the result of :func:`fit`, as its checkpoints store it."""
    count = len(splits.train.images)
    data: dict[str, Any] = {"name": splits.train.name, "fingerprint": splits.fingerprint, "train_images": count}
    # The fingerprint of a copy is that before some were held out.
    data["trained_on"] = None if splits.validation is None else fingerprint(splits.train)
    labels = None if soft_labels is None else {"soft_labels": torch.as_tensor(soft_labels)}
    data["soft_labels"] = None if labels is None else tensor_digest(labels)
    return describe_run(config, describe or {}, data)


def train(
    session: Session, display: Display, stopping: Callable[[], bool], on_step: Callable[[int], None] | None
) -> TrainingSummary:
    """Step until the plan is done; look, record and save on the way."""
    session.model.train()
    looked = time.perf_counter()
    while session.step < session.plan.total:
        take_step(session)
        session.step += 1
        if on_step is not None:
            on_step(session.step)
        # Asked once: a Ctrl-C between two questions would be told of a checkpoint that was not written.
        stop = is_stop_asked(session, stopping)
        if stop or is_look_due(session, looked):
            look(session, display)
            looked = time.perf_counter()
        if is_epoch_end(session):
            finish_epoch(session, display)
        if session.fabric.is_global_zero and session.step < session.plan.total and (stop or is_save_due(session)):
            # No look: the plan changes only at steps at which every process looks, and not after an epoch's end.
            require_finite_losses(session, alone=True)
            require_finite_weights(session)
            session.save()
        if stop and session.step < session.plan.total:
            where = (
                ""
                if session.directory is None
                else f"; {session.directory} holds a checkpoint: the same command, without --overwrite, goes on"
            )
            end_early(session, display, f"Stopped after step {session.step} of {session.plan.total}{where}.")
    summary = finish(session)
    if is_stop_asked(session, stopping):
        sentence = "Stopped after the last step; the same command, without --overwrite, finishes the run."
        end_early(session, display, sentence)
    return summary


def is_stop_asked(session: Session, stopping: Callable[[], bool]) -> bool:
    """Whether this process was told to stop, or any one of several, which ask each other at the steps of their looks.

    One that stopped after a step of its own would leave the others waiting for it in the next.
    """
    if session.fabric.world_size == 1:
        return stopping()
    if not is_shared_look(session):
        return False
    return any(heard(session, stopping()))


T = TypeVar("T")


def heard(session: Session, said: T) -> list[T]:
    """What each of several processes says; all of them ask at the same step.

    Not by all_reduce, which begins with a bare barrier: on GPUs Fabric's own takes care to name the device.
    """
    return [session.fabric.broadcast(said, src=rank) for rank in range(session.fabric.world_size)]


def end_early(session: Session, display: Display, sentence: str) -> NoReturn:
    """Say why, and end; all processes but the first as if nothing were wrong: where one fails, all are killed.

    Raises:
        Stopped: in the first process.
        SystemExit: in the others, once the first has written its checkpoint.
    """
    display.say(sentence)
    session.fabric.barrier()
    session.part()
    if not session.fabric.is_global_zero:
        raise SystemExit(0)
    raise Stopped


def take_step(session: Session) -> None:
    """One optimiser step on one batch, in which nothing waits for the device but these.

    The projection of learned steps reads them; ``method="expm"`` (torch.matrix_exp) asks for norms; float16 asks
    whether gradients overflowed; implicit steps ask whether they have converged, a ReversibleChain for its drift, and a
    step that is divided by a bound of its norm for that bound.
    """
    model, config, plan = session.model, session.config, session.plan
    learning_rate = config.lr * rate_factor(session)
    for group in session.optimiser.param_groups:
        group["lr"] = learning_rate
    set_progress(model, plan.progress(session.step + 1))
    pixels, labels, targets = session.batch()
    with shared_weights(model):
        loss, logits = training_loss(session, pixels, labels, targets)
        penalty = regularisation(model) if config.regularisation else None
        if penalty is not None:
            loss = loss + config.regularisation * penalty
    session.fabric.backward(loss)
    if config.gradient_clip is not None:
        session.fabric.clip_gradients(
            session.wrapped, session.wrapped_optimiser, max_norm=config.gradient_clip, error_if_nonfinite=False
        )
    session.wrapped_optimiser.step()
    session.wrapped_optimiser.zero_grad(set_to_none=True)
    if session.average is not None:
        session.average.update(model, session.step + 1)
    session.tally.add(loss, logits, labels)


def training_loss(session: Session, pixels: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one batch, at attacked images where the settings ask for them, and the logits that count as hits.

    An attack moves away from the label, also where the loss takes a softened one.

    The network runs once, also for clean and attacked images together: so several processes communicate once a step.
    """
    config, loss = session.config, session.loss_function
    if config.adversary == "none":
        logits = session.wrapped(pixels)
        return loss(logits, targets), logits
    epoch, position = divmod(session.step, session.steps_per_epoch)
    share = slice(session.fabric.global_rank, None, session.fabric.world_size)
    start = ball_points(pixels, session.batch_size, share, config.seed, epoch, position)
    moved = attacked(session.model, pixels, labels, start, config, loss, session.fabric.autocast())
    if config.adversary == "pgd":
        logits = session.wrapped(moved)
        return loss(logits, targets), logits
    logits, moved_logits = session.wrapped(torch.cat([pixels, moved])).chunk(2)
    return loss(logits, targets) + config.trades_beta * divergence(logits, moved_logits, logit_scale(config)), logits


def rate_factor(session: Session) -> float:
    """The schedule's factor in the middle of the current step; a shortened plan shortens the step schedule with it."""
    step, plan, epochs = session.step, session.plan, session.config.epochs
    progress = 0.5 * (plan.progress(step) + plan.progress(step + 1))
    epoch = (step + 0.5) / session.steps_per_epoch if epochs is None else progress * epochs
    return learning_rate_factor(progress, epoch, session.config)


def is_epoch_end(session: Session) -> bool:
    """Whether the last step ended a pass over the images, or the training."""
    return session.step % session.steps_per_epoch == 0 or session.step >= session.plan.total


def is_look_due(session: Session, looked: float) -> bool:
    """Whether to wait for the device now; with several processes at the same steps in all of them."""
    if is_shared_look(session):
        return True
    return session.fabric.world_size == 1 and time.perf_counter() - looked > LOOK_SECONDS


def is_shared_look(session: Session) -> bool:
    """Whether every process looks at this step."""
    return session.step % LOOK_STEPS == 0 or session.step in FIRST_FITS or is_epoch_end(session)


def is_save_due(session: Session) -> bool:
    """Whether a checkpoint is due: by the clock, and up to ten times sooner at an epoch's end."""
    waited, wanted = time.perf_counter() - session.last_save, session.config.checkpoint_seconds
    if is_epoch_end(session):
        wanted = min(wanted, max(0.1 * wanted, SAVES_SHARE * session.save_seconds))
    return waited >= wanted


def look(session: Session, display: Display) -> None:
    """Wait for the device, stop on a loss that is not finite, fit the plan to the time, and move the bar."""
    require_finite_losses(session)
    if session.fabric.world_size == 1:
        refit(session.plan, session)
    elif is_shared_look(session) and session.plan.budget_seconds is not None:
        refit(session.plan, session)
        session.plan = StepPlan(**session.fabric.broadcast(session.plan.state()))
    display.update(session.plan.progress(session.step), seconds_left(session), current_metrics(session))


def seconds_left(session: Session) -> float:
    """The time that the steps of the plan still take, at the speed so far."""
    return session.elapsed / session.step * (session.plan.total - session.step)


def require_finite_losses(session: Session, *, alone: bool = False) -> None:
    """Count the losses of the steps since the last count; stop on one that is not finite.

    Of several processes each has the losses of its own share. Where all look, they stop together: one that raised by
    itself would be the end of the first, without a word.

    Args:
        session: the training.
        alone: whether this process may look while the others do not.
    """
    first = session.step - session.tally.pending
    bad = [first + number + 1 for number, loss in enumerate(session.tally.count()) if not math.isfinite(loss)]
    if session.fabric.world_size > 1 and not alone:
        bad = [step for steps in heard(session, bad[:1]) for step in steps]
        if bad:
            session.part()
            if not session.fabric.is_global_zero:
                raise SystemExit(0)
    if bad:
        raise diverged(session, min(bad), "the loss")


def refit(plan: StepPlan, session: Session) -> None:
    """Fit the plan to the time when that is due."""
    elapsed = session.elapsed
    if plan.is_due(session.step, elapsed):
        plan.fit(session.step, elapsed)


def current_metrics(session: Session) -> dict[str, float]:
    """The epoch so far, as the bar and ``metrics.jsonl`` have it."""
    return {
        "epoch": session.epochs_done(),
        "epochs": session.plan.total / session.steps_per_epoch,
        "step": session.step,
        "progress": session.plan.progress(session.step),
        "lr": session.optimiser.param_groups[0]["lr"],
        **session.tally.means(),
        "seconds": session.elapsed,
        "images_per_second": session.images_per_second(),
    }


def finish_epoch(session: Session, display: Display) -> None:
    """Validate where due, write the epoch's line, and start the next tally."""
    metrics = current_metrics(session)
    number = round(session.epochs_done())
    last = session.step >= session.plan.total
    if session.validation is not None and (last or number % session.config.validate_every == 0):
        require_finite_weights(session)
        with session.paused():
            progress = session.plan.progress(session.step)
            metrics |= validate(session.result(), session.validation, progress, validation_batch(session))
        if not math.isfinite(metrics["validation_loss"]):
            raise diverged(session, session.step, "the validation loss")
    session.metrics, session.tally = metrics, Tally()
    if session.fabric.is_global_zero and session.directory is not None:
        append_metrics(session.directory, metrics)
    display.epoch(metrics, seconds_left(session))


def validation_batch(session: Session) -> int:
    """How many images are validated at once; a training of few at a time may have no memory for more."""
    batches, most = VALIDATED_AT_ONCE
    return min(most, batches * session.batch_size // session.fabric.world_size)


@torch.no_grad()
def validate(model: nn.Module, dataset: ImageDataset, progress: float, batch_size: int) -> dict[str, float]:
    """Cross-entropy and accuracy of ``model`` on a data set, in the model's own precision."""
    device = next(model.parameters()).device
    set_progress(model, progress)
    loss, correct = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.int64)
    images_of, labels_of = torch.split(dataset.images, batch_size), torch.split(dataset.labels, batch_size)
    with eval_mode(model), frozen_weights(model):
        for images, labels in zip(images_of, labels_of, strict=True):
            logits, wanted = model(to_unit_range(images.to(device))), labels.to(device)
            loss += functional.cross_entropy(logits, wanted, reduction="sum")
            correct += (logits.argmax(1) == wanted).sum()
    count = len(dataset.labels)
    return {"validation_loss": loss.item() / count, "validation_accuracy": correct.item() / count}


def finish(session: Session) -> TrainingSummary:
    """Leave the final weights in the model and save them with the summary."""
    require_finite_weights(session)
    set_progress(session.model, 1.0)
    if session.average is not None:
        set_progress(session.average.copy, 1.0)
    summary = TrainingSummary(
        train_seconds=session.elapsed,
        images_per_second=session.images_per_second(),
        epochs=session.epochs_done(),
        steps=session.step,
        precision=session.precision,
        device=session.device.type,
        metrics={k: v for k, v in session.metrics.items() if k.endswith(("loss", "accuracy"))},
    )
    session.save(asdict(summary) | {"max_minutes": session.config.max_minutes})
    if session.average is not None:
        session.model.load_state_dict(session.average.model().state_dict())
    session.fabric.barrier()
    session.model.eval()
    return summary


def is_first_process(config: TrainingConfig) -> bool:
    """Whether this is the first of the processes that train together, before they are joined.

    A rank in the environment of a training on one device is a launcher's, for something else.
    """
    return config.devices == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def earlier_checkpoint(directory: Path, text: str) -> Path | None:
    """The checkpoint to go on from, after a look at its settings."""
    checkpoint = find_checkpoint(directory)
    if checkpoint is not None:
        check_same_run(read_config(checkpoint), text, directory)
    return checkpoint


def prepare_directory(session: Session, checkpoint: Path | None) -> None:
    """Once every process has read the checkpoint, the first removes what no longer holds; what is damaged it keeps."""
    session.fabric.barrier()
    if session.directory is None or not session.fabric.is_global_zero:
        return
    tidy(session.directory, checkpoint)
    if checkpoint is not None:
        cut_metrics(session.directory, session.step)
    else:
        (session.directory / HISTORY).unlink(missing_ok=True)


def finished_before(
    model: nn.Module, config: TrainingConfig, checkpoint: Path, state: dict[str, Any]
) -> TrainingSummary:
    """The stored summary of a finished training, with its weights in ``model``.

    Raises:
        BadCheckpoint: the time budget was another one: the result would differ.
    """
    require_budget(config, checkpoint, state)
    stored = {name: value for name, value in state["summary"].items() if name != "max_minutes"}
    load_weights(checkpoint, model)
    set_progress(model, 1.0)
    model.to(choose_device(config.device)).eval()
    return TrainingSummary(**stored)


def require_budget(config: TrainingConfig, checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse a finished training that had another time budget.

    Raises:
        BadCheckpoint: it had.
    """
    budget = state["summary"]["max_minutes"]
    if budget != config.max_minutes:
        raise BadCheckpoint(
            f"{checkpoint.parent} holds a finished training with max_minutes {budget}, this one has "
            f"{config.max_minutes}; choose another --out, or --overwrite to train from the start."
        )
