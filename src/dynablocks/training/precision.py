"""Which number format a training computes in, chosen by a short measurement."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.linear import shared_weights
from dynablocks.progress import progress_bar

if TYPE_CHECKING:
    from lightning_fabric.plugins import Precision

MIXED: dict[str, Literal["bf16-mixed", "16-mixed"]] = {"bf16": "bf16-mixed", "16": "16-mixed"}
NEEDED_GAIN = 1.1
SECONDS_EACH = 1.0
ROUNDS, LEAST_SECONDS = 30, 0.2
"""So many steps in each format decide once all took so long together: a busy moment of the machine has passed then."""


def choose_precision(model: nn.Module, sample_batch: Tensor, device: torch.device | str) -> str:
    """``"bf16"`` when mixed precision makes a training step at least 10 % faster here, otherwise ``"32"``.

    A copy of the model does forward and backward passes in both formats, in turn: thirty of each, or fewer where they
    take about a second, or more until all took 0.2 seconds. The fastest of each counts. Where the device has no
    bfloat16 arithmetic nothing is measured. The model and the random state stay as they were.

    Args:
        model: on ``device``.
        sample_batch: pixels in [0, 1], (N, C, H, W), on ``device``.
        device: where the training will run.

    Example:
        >>> choose_precision(nn.Flatten(), torch.zeros(2, 1, 4, 4), "cpu")
        '32'
    """
    device = torch.device(device)
    if not supports_bf16(device) or not any(p.requires_grad for p in model.parameters()):
        return "32"
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), progress_bar("choosing the precision") as update:
        trial = copy.deepcopy(model).train()
        fastest = {"32": float("inf"), "bf16": float("inf")}
        for done, name in enumerate(fastest, start=1):
            timed_step(trial, sample_batch, device, name)
            update(0.25 * done)
        spent, steps = 0.0, 0
        while measured(spent, steps) < 1:
            for name in fastest:
                seconds = timed_step(trial, sample_batch, device, name)
                fastest[name] = min(fastest[name], seconds)
                spent, steps = spent + seconds, steps + 1
                update(0.5 + 0.5 * min(1.0, measured(spent, steps)))
    return "bf16" if fastest["32"] > NEEDED_GAIN * fastest["bf16"] else "32"


def measured(spent: float, steps: int) -> float:
    """How much of the comparison is done after so many seconds and steps, of both formats together; 1: enough."""
    return max(spent / (2 * SECONDS_EACH), min(steps / (2 * ROUNDS), spent / LEAST_SECONDS))


def timed_step(model: nn.Module, batch: Tensor, device: torch.device, precision: str) -> float:
    """Seconds that one forward and backward pass takes."""
    synchronise(device)
    start = time.perf_counter()
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    with shared_weights(model), autocast:
        logits = model(batch)
    logits.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait until the device has done its work; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def supports_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Wheels without oneDNN (Apple's) do not register the question.
    there = device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_device(name: str, count: int = 1) -> str:
    """``"cpu"`` or ``"cuda"`` for the configured name; of the latter ``count`` are needed.

    Raises:
        InvalidArgument: a GPU is asked for and there is none, or there are fewer than asked for.

    Example:
        >>> choose_device("cpu")
        'cpu'
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InvalidArgument(
            "device is 'cuda' but torch sees no GPU; use --training.device cpu, or install a CUDA build of torch."
        )
    if name == "cpu" or not available:
        return "cpu"
    if count > torch.cuda.device_count():
        raise InvalidArgument(f"devices is {count}, but torch sees {torch.cuda.device_count()} GPUs; give that many.")
    return "cuda"


def present_device(name: str) -> str:
    """:func:`choose_device`, or ``"cpu"`` where the GPU of a finished training is gone: any device evaluates it."""
    return choose_device("auto" if name == "cuda" else name)


def check_precision(precision: str, device: str, *, begun: bool = False) -> None:
    """Refuse float16 where gradients cannot be scaled.

    Args:
        precision: 32, bf16, 16 or auto.
        device: cpu or cuda.
        begun: whether a training that goes on began in this precision, which it keeps.

    Raises:
        InvalidArgument: ``"16"`` on a CPU.
    """
    if precision == "16" and device == "cpu":
        anew = "the training began in it: go on on a GPU, or train anew with --overwrite"
        advice = anew if begun else "use bf16 or 32 there"
        raise InvalidArgument(f"precision is '16' but the device is a CPU; {advice}.")


def precision_plugin(precision: str, device: str) -> Precision:
    """Fabric's plugin for a precision, which leaves the pixels as they are.

    Fabric's own casts every input to the short type. The first linear map does that after the mean is taken off, and an
    attack searches at float32 pixels: the images that it finds are to be those trained on.
    """
    from lightning_fabric.plugins import MixedPrecision, Precision

    class UncastMixedPrecision(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data

    return Precision() if precision == "32" else UncastMixedPrecision(MIXED[precision], device)
