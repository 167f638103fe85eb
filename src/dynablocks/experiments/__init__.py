"""The paper's figures and tables: one file each, made of cached cells by ``dynablocks reproduce``."""

from __future__ import annotations

import importlib
import pkgutil

from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["EXPERIMENTS", "Cell", "Check", "Experiment", "Scale", "Store"]
