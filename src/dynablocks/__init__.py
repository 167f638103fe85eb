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
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _modules():
        return importlib.import_module(f"dynablocks.{name}")
    raise AttributeError(f"module 'dynablocks' has no attribute {name!r}")


def _modules() -> list[str]:
    """The modules of this package, which are imported when they are first named: ``dynablocks.fitting``."""
    import pkgutil

    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def __dir__() -> list[str]:
    """Also the names and modules that are loaded when they are first used."""
    return sorted({*globals(), *__all__, *_modules()})
