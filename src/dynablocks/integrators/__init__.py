"""One-step maps of vector fields, each declaring its order and what it preserves."""

from dynablocks.integrators.base import INTEGRATORS, Integrator, integrator
from dynablocks.integrators.euler import ExplicitEuler
from dynablocks.integrators.exact import ExactFlow
from dynablocks.integrators.runge_kutta import HEUN, KUTTA3, MIDPOINT, RALSTON, RK4, SSP3, ExplicitRungeKutta, Tableau
from dynablocks.integrators.splitting import Splitting

__all__ = [
    "HEUN",
    "INTEGRATORS",
    "KUTTA3",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "SSP3",
    "ExactFlow",
    "ExplicitEuler",
    "ExplicitRungeKutta",
    "Integrator",
    "Splitting",
    "Tableau",
    "integrator",
]
