"""One-step maps of vector fields, each declaring its order and what it preserves."""

from dynablocks.fields.base import over_states
from dynablocks.integrators.base import INTEGRATORS, ImplicitIntegrator, Integrator, integrator
from dynablocks.integrators.discrete_gradient import DiscreteGradient, discrete_gradient
from dynablocks.integrators.euler import ExplicitEuler
from dynablocks.integrators.exact import ExactFlow
from dynablocks.integrators.implicit import (
    GAUSS4,
    IMPLICIT_EULER,
    IMPLICIT_MIDPOINT,
    ImplicitRungeKutta,
    ImplicitTableau,
    Trapezoidal,
)
from dynablocks.integrators.norm_preserving import CalvoEulerHeun, LieMethod, LieScheme
from dynablocks.integrators.order import exact_solution, measured_order
from dynablocks.integrators.patankar import ModifiedPatankar
from dynablocks.integrators.projection import Projected
from dynablocks.integrators.runge_kutta import HEUN, KUTTA3, MIDPOINT, RALSTON, RK4, SSP3, ExplicitRungeKutta, Tableau
from dynablocks.integrators.splitting import Splitting

__all__ = [
    "GAUSS4",
    "HEUN",
    "IMPLICIT_EULER",
    "IMPLICIT_MIDPOINT",
    "INTEGRATORS",
    "KUTTA3",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "SSP3",
    "CalvoEulerHeun",
    "DiscreteGradient",
    "ExactFlow",
    "ExplicitEuler",
    "ExplicitRungeKutta",
    "ImplicitIntegrator",
    "ImplicitRungeKutta",
    "ImplicitTableau",
    "Integrator",
    "LieMethod",
    "LieScheme",
    "ModifiedPatankar",
    "Projected",
    "Splitting",
    "Tableau",
    "Trapezoidal",
    "discrete_gradient",
    "exact_solution",
    "integrator",
    "measured_order",
    "over_states",
]
