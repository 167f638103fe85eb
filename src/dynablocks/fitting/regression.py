"""Least-squares fits in float64: Adam, then a second-order finish down to rounding."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynablocks.errors import (
    OUT_OF_MEMORY,
    BadCheckpoint,
    DynablocksError,
    InvalidArgument,
    NotConverged,
    require_choice,
    require_range,
    require_whole,
)
from dynablocks.files import expanded, write_atomically
from dynablocks.fitting.objective import Objective, Residuals, flow_map_residuals
from dynablocks.fitting.second_order import FINISHES, LimitedMemoryBFGS, fits_levenberg_marquardt
from dynablocks.progress import PATIENCE_SECONDS, progress_bar
from dynablocks.switching.constraints import keep_constraints, project, set_progress

if TYPE_CHECKING:
    from jaxtyping import Float

ADAM_SHARE = 0.4
HURRY_AFTER = 0.1
"""The part of Adam's time after which its speed is known."""
PLATEAU_STEPS, PLATEAU_RATE = 20, 1e-3
PATIENCE_STEPS = 40
FINISH_STEPS = {"levenberg-marquardt": 200, "lbfgs": 4000}
TIME_OVER = "the time was over"
"""Why a fit ended that its limit of time cut short."""
SAME_LOSS, SAME_START = 1e-6, 1e-20
"""A loss is that of a checkpoint where it differs by no more than these shares of it and of the loss at the start:
machines and numbers of threads round differently, also where nothing but rounding is left."""
Data = Sequence[Tensor]


@dataclass(frozen=True)
class FitRecord:
    """Where a fit stood: phase (``start``, ``adam``, a finish), its step, elapsed seconds, ½ mean squared residuals."""

    phase: str
    step: int
    seconds: float
    loss: float
    validation: float | None = None


@dataclass
class FitHistory:
    """What a fit did.

    Attributes:
        records: from start to end.
        loss, validation: ½ mean ‖residual‖² of the parameters that were kept, on the training and validation data.
        seconds: of all runs of the fit together.
        stopped: why it ended.
        unknowns: the number of fitted parameters.
        samples: the number of rows of the training data.
    """

    records: list[FitRecord] = field(default_factory=list)
    loss: float = math.inf
    validation: float | None = None
    seconds: float = 0.0
    stopped: str = ""
    unknowns: int = 0
    samples: int = 0

    def mean_squared_error(self, validation: bool = False) -> float:
        """Mean ‖residual‖² over samples, twice the loss."""
        chosen = self.validation if validation else self.loss
        return math.nan if chosen is None else 2 * chosen


def fit(
    module: nn.Module,
    x: Float[Tensor, "samples ..."],
    y: Float[Tensor, "samples ..."],
    *,
    step: Float[Tensor, "samples ..."] | None = None,
    residuals: Residuals = flow_map_residuals,
    adam_steps: int = 1000,
    lr: float = 1e-2,
    batch_size: int = 1024,
    finish: str | None = "levenberg-marquardt",
    finish_steps: int | None = None,
    max_seconds: float | None = None,
    validation: Data | None = None,
    callback: Callable[[FitRecord], object] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 5.0,
    seed: int = 0,
    label: str = "fitting",
) -> FitHistory:
    r"""Minimise ½ mean_i ‖module(x_i) − y_i‖² in float64, in place; the module ends with its best parameters.

    Adam with cosine decay of its rate, then a second-order finish. Levenberg–Marquardt takes dense Jacobians of up to
    2000 unknowns and reaches rounding where the data can be met exactly; where it does not apply it gives way to
    L-BFGS. The best parameters are those of the smallest validation loss, or training loss when there is no
    validation. Constraints (``project_``) hold after every step.

    Equal arguments give equal results on one machine, unless ``max_seconds`` cuts the fit short.

    Args:
        module: any module; it is converted to float64.
        x, y: inputs and targets, one row a sample.
        step: one row a sample, given to the module as ``module(x, step)``.
        residuals: another loss: ``residuals(module, x, y)`` (with ``step``: ``residuals(module, x, y, step)``) returns
            one row a sample, which may depend on that sample only; no data-dependent control flow, since it runs under
            ``vmap`` in one finish.
        adam_steps: 0 for none.
        lr: Adam's first rate.
        batch_size: Adam takes all samples when they are no more than this, otherwise batches of this size.
        finish: ``"levenberg-marquardt"``, ``"lbfgs"`` or ``None``.
        finish_steps: at most so many iterations; by default 200 or 4000. Where L-BFGS stands in for
            Levenberg–Marquardt, at most twenty times as many.
        max_seconds: of wall clock; Adam takes at most 40 % of it when a finish follows.
        validation: (x, y) or (x, y, step), held out.
        callback: called with every :class:`FitRecord`.
        checkpoint: a file for the state, written every ``checkpoint_seconds``; where it exists the fit goes on from it.
            That of a fit which has ended, by ``max_seconds`` too, gives its result again at once: take another file to
            fit for longer.
        seed: of the batches.

    Raises:
        InvalidArgument: an argument is out of range, module(x) and y have different shapes, or the loss is not finite.
        BadCheckpoint: the checkpoint is of another fit: of other data or settings, or its parameters have another loss
            in this module.

    Source: Kingma and Ba, 2015; Nielsen, 1999 (Levenberg–Marquardt); Liu and Nocedal, 1989 (L-BFGS).

    Example:
        >>> line = nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        >>> fit(line, x, 3 * x + 1, adam_steps=0).loss < 1e-28
        True
    """
    _require_arguments(lr, finish, max_seconds)
    adam_steps, batch_size = require_whole("adam_steps", adam_steps, 0), require_whole("batch_size", batch_size, 1)
    finish_steps = None if finish_steps is None else require_whole("finish_steps", finish_steps, 0)
    seed = require_whole("seed", seed)
    place = None if checkpoint is None else expanded(checkpoint)
    module.double()
    project(module)
    data = _as_data("the training data", (x, y) if step is None else (x, y, step))
    objective = Objective(module, data, residuals)
    held_out = None if validation is None else Objective(module, _as_data("the validation", validation), residuals)
    if held_out is not None and len(held_out.data) != len(data):
        raise InvalidArgument(f"the validation has {len(held_out.data)} tensors, the training data {len(data)}.")
    settings = (getattr(residuals, "__qualname__", ""), adam_steps, lr, batch_size, finish, finish_steps, seed)
    asked = _digest(settings, data, () if held_out is None else held_out.data)
    run = _Run(module, objective, held_out, max_seconds, callback, place, checkpoint_seconds, asked)
    with run.progress(label):
        run.start()
        if run.phase == "adam":
            _adam(run, adam_steps, lr, batch_size, seed, ADAM_SHARE if finish else 1.0)
        if run.phase == "finish":
            _finish(run, finish, finish_steps, ADAM_SHARE if adam_steps else 0.0)
        return run.end()


def _require_arguments(lr: float, finish: str | None, seconds: float | None) -> None:
    require_range("lr", lr, 0, open_low=True)
    if finish is not None:
        require_choice("finish", finish, FINISHES)
    if seconds is not None:
        require_range("max_seconds", seconds, 0, open_low=True)


def _as_data(name: str, given: Data) -> tuple[Tensor, ...]:
    data = tuple(torch.as_tensor(part).detach().double() for part in given)
    lengths = {len(part) if part.ndim else 0 for part in data}
    if len(lengths) != 1 or lengths == {0} or len(data) not in (2, 3):
        raise InvalidArgument(
            f"{name} has the shapes {[tuple(p.shape) for p in data]}; (x, y[, step]) with equal rows."
        )
    if not all(bool(part.isfinite().all()) for part in data):
        raise InvalidArgument(f"{name} holds values that are not finite; leave those samples out.")
    return data


def _digest(settings: tuple[object, ...], *data: Data) -> str:
    """SHA-256 of all that decides a fit but the module."""
    digest = hashlib.sha256(repr(settings).encode())
    for part in itertools.chain(*data):
        digest.update(f"{tuple(part.shape)}".encode())
        digest.update(part.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Run:
    """The state of a fit: where it is, the best so far, the clock, and its checkpoint."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        held_out: Objective | None,
        max_seconds: float | None,
        callback: Callable[[FitRecord], object] | None,
        checkpoint: Path | None,
        checkpoint_seconds: float,
        asked: str,
    ) -> None:
        self.asked = asked
        self.module, self.objective, self.held_out = module, objective, held_out
        self.max_seconds, self.callback = max_seconds, callback
        self.checkpoint, self.checkpoint_seconds = checkpoint, checkpoint_seconds
        self.history = FitHistory(unknowns=objective.unknowns, samples=objective.samples)
        self.phase, self.step = "adam", 0
        self.optimiser_state: dict[str, Any] | None = None
        self.best: dict[str, Tensor] = {}
        self.best_record = FitRecord("start", 0, 0.0, math.inf, None)
        self.best_step = 0
        self.hurried = False
        self._begun = self._written = time.monotonic()
        self._bar: Callable[[float], None] | None = None
        self._stack = contextlib.ExitStack()
        self._label = ""

    @property
    def seconds(self) -> float:
        return self.history.seconds + time.monotonic() - self._begun

    def is_hurried(self, steps: int, share: float) -> bool:
        """Whether the clock decides: from the moment on at which so many steps will not fit into their time.

        Until then nothing depends on the clock, so that equal fits end equal.
        """
        if self.max_seconds is not None and not self.hurried:
            limit = share * self.max_seconds
            measured = self.seconds > HURRY_AFTER * limit
            self.hurried = measured and self.seconds * steps > limit * max(self.step, 1)
        return self.hurried

    def time_is_over(self) -> bool:
        return self.max_seconds is not None and self.seconds >= self.max_seconds

    @contextlib.contextmanager
    def progress(self, label: str) -> Iterator[None]:
        self._label = label
        with self._stack:
            yield

    def show(self, fraction: float) -> None:
        """Move the bar, which appears after two seconds."""
        if self._bar is None and time.monotonic() - self._begun > PATIENCE_SECONDS:
            self._bar = self._stack.enter_context(progress_bar(self._label))
        if self._bar is not None:
            self._bar(min(1.0, fraction))

    def start(self) -> None:
        if self.checkpoint is not None and self.checkpoint.exists():
            self._load(self.checkpoint)
        elif not self.objective.unknowns:
            raise InvalidArgument("the module has no parameters to fit; give one that has, with requires_grad.")
        else:
            self.record("start", 0)

    def record(self, phase: str, step: int, loss: float | None = None) -> FitRecord:
        """Evaluate, note, and keep the parameters when they are the best so far; ``loss`` is theirs where known."""
        loss = self.objective.value() if loss is None else loss
        if math.isinf(loss) and phase == "adam" and self.best:
            return self.best_record  # a step without a solution; the best comes back when Adam ends
        if not math.isfinite(loss):
            raise InvalidArgument(
                f"the loss is {loss} at {phase} step {step}: numbers overflow, or the equation of a step is not "
                "solved; use a smaller lr or step size (of dynablocks fit: more --substeps), or scale the data."
            )
        held = None if self.held_out is None else self.held_out.value()
        found = FitRecord(phase, step, self.seconds, loss, held if held is not None and math.isfinite(held) else None)
        self.history.records.append(found)
        if not self.best or self._rank(found) < self._rank(self.best_record):
            self.best_record, self.best_step = found, step
            self.best = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        if self.callback is not None:
            self.callback(found)
        return found

    def _rank(self, record: FitRecord) -> tuple[float, float]:
        held = 0.0 if self.held_out is None else math.inf if record.validation is None else record.validation
        return held, record.loss

    def save(self, optimiser: Any, *, now: bool = False) -> None:
        """Write the checkpoint when it is time to."""
        if self.checkpoint is None or (not now and time.monotonic() - self._written < self.checkpoint_seconds):
            return
        state = {
            "asked": self.asked,
            "phase": self.phase,
            "step": self.step,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "optimiser": None if optimiser is None else optimiser.state_dict(),
            "best": self.best,
            "best_record": asdict(self.best_record),
            "best_step": self.best_step,
            "hurried": self.hurried,
            "records": [asdict(entry) for entry in self.history.records],
            "stopped": self.history.stopped,
        }
        buffer = io.BytesIO()  # torch.save to a file says RuntimeError for a full disk
        torch.save(state, buffer)
        write_atomically(self.checkpoint, lambda path: path.write_bytes(buffer.getbuffer()))
        self._written = time.monotonic()

    def _load(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DynablocksError(
                f"{path} cannot be read ({error.strerror or error}); nothing was changed: make it readable."
            ) from error
        before = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        try:
            state = torch.load(io.BytesIO(content), weights_only=True)
            if state["asked"] != self.asked:
                raise BadCheckpoint("other data or settings")
            self._take(state)
        except Exception as error:
            self.module.load_state_dict(before)
            if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
                raise
            raise BadCheckpoint(f"{path} is not a checkpoint of this fit; remove it to fit from the start.") from error

    def _take(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's content. The best parameters must have in this module the loss that they had."""
        self.history.records = [FitRecord(**entry) for entry in state["records"]]
        self.best, self.best_record = dict(state["best"]), FitRecord(**state["best_record"])
        self.restore()
        if not self._has_loss(self.best_record.loss):
            raise BadCheckpoint("another module, of the same names and shapes")
        self.module.load_state_dict(state["module"])
        self.phase, self.step = str(state["phase"]), int(state["step"])
        self.optimiser_state = state["optimiser"]
        self.best_step, self.hurried = int(state["best_step"]), bool(state.get("hurried", False))
        self.history.seconds, self.history.stopped = float(state["seconds"]), str(state["stopped"])

    def _has_loss(self, loss: float) -> bool:
        """Whether the objective has this value, to rounding; one that is drawn anew each time may have any."""
        least = SAME_START * self.history.records[0].loss
        found = self.objective.value()
        if abs(found - loss) <= SAME_LOSS * loss + least:
            return True
        return abs(self.objective.value() - found) > SAME_LOSS * found + least

    def restore(self) -> None:
        """Put the best parameters back."""
        self.module.load_state_dict(self.best)

    def end(self) -> FitHistory:
        self.restore()
        self.history.loss, self.history.validation = self.best_record.loss, self.best_record.validation
        total = self.seconds
        self.phase = "done"
        self.save(None, now=True)
        self.history.seconds = total
        return self.history


def _adam(run: _Run, steps: int, lr: float, batch_size: int, seed: int, share: float) -> None:
    optimiser = torch.optim.Adam(run.objective.parameters, lr=lr)
    if run.optimiser_state is not None:
        optimiser.load_state_dict(run.optimiser_state)
    handle = keep_constraints(run.module, optimiser)
    every, batches = max(5, steps // 100), _Batches(run.objective.samples, batch_size, seed)
    stopped: str | None = None
    while run.step < steps:
        progress = run.step / steps
        if run.is_hurried(steps, share):
            assert run.max_seconds is not None
            progress = max(progress, run.seconds / (share * run.max_seconds))
        if progress >= 1:
            break
        set_progress(run.module, progress)
        optimiser.param_groups[0]["lr"] = lr * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimiser.zero_grad()
        try:
            loss = run.objective.loss(batches.of(run.step))
            loss.backward()  # type: ignore[no-untyped-call]
        except NotConverged:
            run.restore()
            stopped = "a step had no solution"
            break
        optimiser.step()
        run.step += 1
        if run.step % every == 0:
            run.record("adam", run.step)
            run.save(optimiser)
            run.show(share * progress)
    handle.remove()
    set_progress(run.module, 1.0)
    project(run.module)
    if run.step:
        run.record("adam", run.step)
        run.restore()
    if stopped is None:
        stopped = "the steps of Adam were done" if run.step >= steps else TIME_OVER
    run.phase, run.step, run.optimiser_state = "finish", 0, None
    run.history.stopped = stopped


class _Batches:
    """The samples of each step, a function of seed and step; the order of an epoch is drawn once for its steps."""

    def __init__(self, samples: int, size: int, seed: int) -> None:
        self.samples, self.size, self.seed = samples, size, seed
        self._epoch: int | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    def of(self, step: int) -> Tensor | None:
        """Those of one step; ``None`` for all."""
        if self.samples <= self.size:
            return None
        epoch, position = divmod(step, self.samples // self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(self.samples, generator=generator)
        return self._order[position * self.size : (position + 1) * self.size]


def _finish(run: _Run, name: str | None, steps: int | None, begun: float) -> None:
    """Second-order steps, after a part ``begun`` of the whole."""
    if name is None:
        return
    kind = FINISHES[name]
    if name == "levenberg-marquardt" and not _applies(run.objective):
        kind = LimitedMemoryBFGS
        steps = None if steps is None else LimitedMemoryBFGS.inner_steps * steps
    method = kind(run.module, run.objective)
    if run.optimiser_state is not None:
        method.load_state_dict(run.optimiser_state)
    inner = getattr(method, "inner_steps", 1)
    most = FINISH_STEPS[method.name] if steps is None else steps
    while True:
        # Asked before a step and not after it, so that a fit that was killed after its last one takes no other.
        reason = _why_stop(run, inner, most)
        now = min(inner, most - run.step)
        if reason is None and not method.advance(now):
            reason = "no step lowers the loss any more"
        if reason is not None:
            run.history.stopped = reason
            return
        run.step += now
        # An accepted step has just been judged by the objective of these parameters.
        run.record(method.name, run.step, method.value)
        run.save(method)
        done = max(run.step / most, 0.0 if run.max_seconds is None else run.seconds / run.max_seconds)
        run.show(begun + (1 - begun) * done)


def _applies(objective: Objective) -> bool:
    """Dense Jacobians are affordable, and the residuals can be differentiated under ``vmap``."""
    if not fits_levenberg_marquardt(objective):
        return False
    try:
        Objective(objective.module, [part[:2] for part in objective.data], objective.residuals).triangular_factor()
    except (RuntimeError, NotImplementedError, InvalidArgument, NotConverged):
        # Of many unknowns a sample an implicit step has none, and says so.
        return False
    return True


def _why_stop(run: _Run, inner: int, most: int) -> str | None:
    """Why the finish takes no other step; ``None`` where it takes one."""
    settled = _why_settled(run, inner) if run.step else None
    if settled is not None:
        return settled
    if run.step >= most:
        return "the steps of the finish were done"
    return TIME_OVER if run.time_is_over() else None


def _why_settled(run: _Run, inner: int) -> str | None:
    records = run.history.records
    if records[-1].loss == 0:
        return "the loss is zero"
    recent = [entry for entry in records[-PLATEAU_STEPS - 1 :] if entry.phase == records[-1].phase]
    if len(recent) > PLATEAU_STEPS and recent[-1].loss > recent[0].loss * (1 - PLATEAU_RATE):
        return "the loss fell by less than a thousandth in twenty steps"
    waited = run.step - (run.best_step if run.best_record.phase == records[-1].phase else 0)
    if run.held_out is not None and waited > PATIENCE_STEPS * inner:
        return "the validation loss stopped falling"
    return None
