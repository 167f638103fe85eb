"""Neural networks from dynamical systems: field × integrator × switching signal, with properties that are checked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

# Read by torch when it first asks for memory: large tensors in huge pages. Without them a training step took 155 to
# 196 ms in four processes that did the same, with them 145 to 153 (2 vCPU AMD EPYC, Linux).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from dynablocks.blocks import DynamicalBlock
    from dynablocks.models import ModelConfig, build
    from dynablocks.properties import explain, verify
    from dynablocks.run_directory.network import load
    from dynablocks.switching import keep_constraints

_HOMES = {
    "DynamicalBlock": "dynablocks.blocks",
    "ModelConfig": "dynablocks.models",
    "build": "dynablocks.models",
    "explain": "dynablocks.properties",
    "keep_constraints": "dynablocks.switching",
    "load": "dynablocks.run_directory.network",
    "verify": "dynablocks.properties",
}

__all__ = ["DynamicalBlock", "ModelConfig", "build", "explain", "keep_constraints", "load", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynablocks' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Also the names that are loaded when they are first used."""
    return sorted({*globals(), *__all__})
