"""Neural networks from dynamical systems: field × integrator × switching signal, with properties that are checked."""

from __future__ import annotations

__version__ = "0.1.0"
