"""The arithmetic that a proof is about: IEEE formats, sums of products, no shortcuts of the device."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument

_FPMATH_VARIABLES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
_FPMATH_FOUND = {name: os.environ.get(name) for name in _FPMATH_VARIABLES}
"""What they were when this was imported: oneDNN reads them once in a process, so that unsetting them is too late."""
_EMULATION_VARIABLES = ("CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLAS_EMULATE_DOUBLE_PRECISION")
_PRECISION_SWITCHES = (("cuda", "matmul"), ("cudnn", "conv"), ("mkldnn", "matmul"), ("mkldnn", "conv"))
_WINOGRAD_MACHINES = ("arm", "aarch", "riscv")


class NoRoundingBound(InvalidArgument):
    """A layer for which no bound of its rounding error has been proved."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """u, half the gap between 1 and the next number of the format.

    Example:
        >>> unit_roundoff(torch.float32) == 2.0**-24
        True
    """
    return torch.finfo(dtype).eps / 2


def gamma(count: int, unit: float) -> float:
    r""":math:`\gamma_n = nu / (1 - nu)`: a product of n factors 1 + δ, |δ| <= u, differs from 1 by at most that.

    Infinite for nu >= 1.

    Example:
        >>> 1152 * 2.0**-24 < gamma(1152, 2.0**-24) < 1153 * 2.0**-24
        True
    """
    return math.inf if count * unit >= 1 else count * unit / (1 - count * unit)


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Within the context convolutions and products are sums of products in the format of their inputs.

    NNPACK (small batches of 3 × 3 convolutions on one CPU thread: Winograd), cuDNN (Winograd, FFT, TF32), products in
    TF32 or bfloat16 and autocast are switched off; oneDNN is asked for its direct algorithm by torch and stays. What an
    environment variable makes of oneDNN's products is not undone, nor is Winograd's algorithm where torch has no switch
    for it (:func:`depthwise_by_winograd`); :func:`rounding_bound` proves nothing then.

    Example:
        >>> with plain_arithmetic():
        ...     torch.backends.cudnn.enabled
        False
    """
    cudnn, nnpack = torch.backends.cudnn.enabled, torch._C._get_nnpack_enabled()
    try:
        torch.backends.cudnn.enabled = False
        torch._C._set_nnpack_enabled(False)
        with full_precision():
            yield
    finally:
        torch._C._set_nnpack_enabled(nnpack)
        torch.backends.cudnn.enabled = cudnn


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No autocast, no TF32, no bfloat16 in float32 products.

    Inside an autocast around it, logits would be those of the network in bfloat16, which is another one. For float32
    products torch has old and new switches, and refuses to mix them.

    Example:
        >>> matrix = torch.eye(2)
        >>> with torch.autocast("cpu"), full_precision():
        ...     (matrix @ matrix).dtype
        torch.float32
    """
    found = (getattr(getattr(torch.backends, name), kind, None) for name, kind in _PRECISION_SWITCHES)
    held: list[tuple[Any, str]] = [
        (s, s.fp32_precision) for s in found if s is not None and hasattr(s, "fp32_precision")
    ]
    before = None if held else (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    try:
        for switch, _ in held:
            switch.fp32_precision = "ieee"
        if before is not None:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
        with contextlib.ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):  # asked: releases of torch warn of "cuda" where there is none
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        for switch, value in held:
            switch.fp32_precision = value
        if before is not None:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


def depthwise_by_winograd(pixels: Tensor) -> bool:
    """Whether torch may take Winograd's algorithm for depthwise 3 × 3 convolutions of these pixels.

    It does on CPUs with ARM or RISC-V vectors, in float32, with stride and dilation 1.

    Example:
        >>> depthwise_by_winograd(torch.zeros(1, dtype=torch.float64))
        False
    """
    on_cpu = pixels.device.type == "cpu" and pixels.dtype == torch.float32
    return on_cpu and platform.machine().lower().startswith(_WINOGRAD_MACHINES)


def environment_text() -> str:
    """What decides on this machine how numbers are rounded: torch, the processor, variables that change products.

    Of the processor the kind, and the instructions that torch takes of it.

    Example:
        >>> environment_text().startswith(f"torch {torch.__version__} on ")
        True
    """
    variables = [f"{name}={os.environ.get(name)!r}" for name in (*_FPMATH_VARIABLES, *_EMULATION_VARIABLES)]
    changed = [
        f"{name}={found!r} when imported" for name, found in _FPMATH_FOUND.items() if found != os.environ.get(name)
    ]
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return ", ".join([f"torch {torch.__version__} on {processor}", *variables, *changed])


def require_strict_environment(pixels: Tensor) -> None:
    kind = pixels.device.type
    if kind not in ("cpu", "cuda"):
        raise NoRoundingBound(f"how a device of type {kind} computes is not known; certify on a CPU.")
    for name, found in _FPMATH_FOUND.items():
        for value in (os.environ.get(name), found):
            if pixels.dtype == torch.float32 and value is not None and value.lower() != "strict":
                raise NoRoundingBound(
                    f"{name} is {value!r}, or was at the start: oneDNN may round float32 factors; unset it, and start "
                    "Python anew."
                )
    for name in _EMULATION_VARIABLES:
        if kind == "cuda" and os.environ.get(name, "0") not in ("", "0"):
            raise NoRoundingBound(f"{name} is {os.environ[name]!r}: cuBLAS may emulate products; unset it.")
