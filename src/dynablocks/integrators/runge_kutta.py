"""General explicit Runge–Kutta methods from a Butcher tableau."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.fields import VectorField
from dynablocks.fields.base import over_states
from dynablocks.integrators.base import INTEGRATORS, RUNGE_KUTTA_KEEPS, Integrator, StepSize
from dynablocks.numerics.rounding import EPS

if TYPE_CHECKING:
    from dynablocks.integrators.implicit import ImplicitTableau


def require_order(name: str, order: int, a: np.ndarray, b: np.ndarray) -> None:
    """Refuse coefficients that miss one of the eight conditions up to order 4; higher orders are taken on trust.

    Source: Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", section II.2.

    Example:
        >>> require_order("heun", 3, HEUN.matrix, np.array(HEUN.b))
        Traceback (most recent call last):
        ...
        dynablocks.errors.InvalidArgument: tableau 'heun': Σ bᵢcᵢ² is 0.5, and order 3 needs 0.333333.
    """
    c = a.sum(1)
    conditions = (
        (1, "Σ bᵢ", b.sum(), 1),
        (2, "Σ bᵢcᵢ", b @ c, 1 / 2),
        (3, "Σ bᵢcᵢ²", b @ c**2, 1 / 3),
        (3, "Σ bᵢaᵢⱼcⱼ", b @ a @ c, 1 / 6),
        (4, "Σ bᵢcᵢ³", b @ c**3, 1 / 4),
        (4, "Σ bᵢcᵢaᵢⱼcⱼ", (b * c) @ a @ c, 1 / 8),
        (4, "Σ bᵢaᵢⱼcⱼ²", b @ a @ c**2, 1 / 12),
        (4, "Σ bᵢaᵢⱼaⱼₖcₖ", b @ a @ a @ c, 1 / 24),
    )
    for needed_by, sum_of, value, wanted in conditions:
        if max(1, order) >= needed_by and not abs(value - wanted) <= 1e-12 * (1 + np.abs(b).sum()):
            raise InvalidArgument(f"tableau {name!r}: {sum_of} is {value:g}, and order {order} needs {wanted:g}.")


def contractivity_form(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """BA + AᵀB − bbᵀ with B = diag(b): zero for symplectic methods, >= 0 for B-stable ones (b > 0).

    Example:
        >>> contractivity_form(np.array([[0.5]]), np.array([1.0])).tolist()
        [[0.0]]
    """
    form: np.ndarray = np.diag(b) @ a + a.T @ np.diag(b) - np.outer(b, b)
    return form


def require_coefficients(tableau: Tableau | ImplicitTableau) -> None:
    """Make the coefficients of a tableau, of any kind of number, tuples of floats.

    Raises:
        InvalidArgument: A is no sequence of rows, b no sequence, or an entry no finite number.

    Example:
        >>> from fractions import Fraction
        >>> Tableau("thirds", 1, ((), (1,)), (Fraction(1, 3), Fraction(2, 3))).b[0]
        0.3333333333333333
    """
    sentence = f"tableau {tableau.name!r}: A is to be a tuple of rows and b a tuple, of finite numbers; (1.0,) has one."
    try:
        rows = tuple(tuple(float(entry) for entry in row) for row in tableau.a)
        weights = tuple(float(entry) for entry in tableau.b)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(sentence) from error
    if not all(math.isfinite(entry) for row in (*rows, weights) for entry in row):
        raise InvalidArgument(sentence)
    object.__setattr__(tableau, "a", rows)
    object.__setattr__(tableau, "b", weights)


@dataclass(frozen=True)
class Tableau:
    r"""Coefficients (A, b) of an explicit method: kᵢ = X(x + h Σⱼ aᵢⱼ kⱼ), x ↦ x + h Σ bᵢ kᵢ.

    Raises:
        InvalidArgument: A is not strictly lower triangular, sizes differ, an entry is no number, or a condition of the
            order fails.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        require_coefficients(self)
        stages = len(self.b)
        if len(self.a) != stages or any(len(row) != i for i, row in enumerate(self.a)):
            raise InvalidArgument(
                f"tableau {self.name!r}: row i of A must have i entries (0, 1, … {stages - 1}); an implicit method is "
                "given as an ImplicitTableau."
            )
        require_order(self.name, self.order, self.matrix, np.array(self.b))

    @property
    def matrix(self) -> np.ndarray:
        """A as a square matrix."""
        full = np.zeros((len(self.b), len(self.b)))
        for i, row in enumerate(self.a):
            full[i, : len(row)] = row
        return full

    @property
    def circle_radius(self) -> float:
        r"""The largest r for which ⟨δX, δx⟩ <= −(1/L)‖δX‖² and 0 <= h <= 2r/L imply ‖δΨ^h‖ <= ‖δx‖.

        r = −1/λ_min(B^{−1/2}(BA + AᵀB − bbᵀ)B^{−1/2}) for positive weights, B = diag(b); 0 otherwise.

        Source: Dahlquist and Jeltsch (1979), "Generalized disks of contractivity for explicit and implicit
            Runge–Kutta methods".
        """
        b = np.array(self.b)
        if (b <= 0).any():
            return 0.0
        scaled = np.sqrt(b)
        form = contractivity_form(self.matrix, b) / np.outer(scaled, scaled)
        smallest = float(np.linalg.eigvalsh(form).min())
        return math.inf if smallest >= 0 else -1.0 / (smallest - 1e-12)


HEUN = Tableau("heun", 2, ((), (1.0,)), (0.5, 0.5))
MIDPOINT = Tableau("midpoint", 2, ((), (0.5,)), (0.0, 1.0))
RALSTON = Tableau("ralston", 2, ((), (2 / 3,)), (0.25, 0.75))
SSP3 = Tableau("ssp3", 3, ((), (1.0,), (0.25, 0.25)), (1 / 6, 1 / 6, 2 / 3))
KUTTA3 = Tableau("kutta3", 3, ((), (0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6))
RK4 = Tableau("rk4", 4, ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def of_tableau(name: str) -> Any:
    """A property of a method that is one of its tableau, and so cannot be set."""
    return property(lambda method: getattr(method.tableau, name))


class ExplicitRungeKutta(Integrator):
    r"""One step of an explicit Runge–Kutta method.

    Lipschitz constant: 1 when the field is −∇V with V convex and L-smooth and 0 <= h <= 2r/L (circle contractivity, r =
    :attr:`Tableau.circle_radius`: 1 for Heun and RK4); otherwise 1 + |h| Σ|bᵢ|ℓᵢ with ℓᵢ = L(1 + |h| Σ|aᵢⱼ|ℓⱼ).

    Example:
        >>> ExplicitRungeKutta(RK4).order, round(RK4.circle_radius, 6)
        (4, 1.0)
    """

    keeps = RUNGE_KUTTA_KEEPS
    name, order = of_tableau("name"), of_tableau("order")

    def __init__(self, tableau: Tableau) -> None:
        if not isinstance(tableau, Tableau):
            raise InvalidArgument(f"tableau is of class {type(tableau).__name__}; an explicit method takes a Tableau.")
        self._tableau = tableau

    @property
    def tableau(self) -> Tableau:
        """The coefficients, as they were given: name and order are theirs, so that they cannot be set."""
        return self._tableau

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        slopes: list[Tensor] = []
        step_size = over_states(step_size, x)
        for row in self.tableau.a:
            slopes.append(field(self._combine(x, step_size, row, slopes)))
        return self._combine(x, step_size, self.tableau.b, slopes)

    @staticmethod
    def _combine(x: Tensor, step_size: StepSize, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
        for weight, slope in zip(weights, slopes, strict=True):
            if weight:
                x = x + (step_size * weight) * slope
        return x

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        facts = field.facts()
        limit = 2 * self.tableau.circle_radius / facts.lipschitz if facts.lipschitz > 0 else math.inf
        if facts.cocoercive and 0 <= step_size <= limit:
            return 1.0, f"circle contractive: 0 <= h <= 2r/L = {limit:.5g}"
        return self._growth(facts.lipschitz, abs(step_size)), f"1+hΣ|b|ℓ, L={facts.lipschitz:.4g}"

    def _growth(self, lipschitz: float, h: float) -> float:
        if h == 0 or math.isinf(lipschitz):
            return 1.0 if h == 0 else math.inf
        stages: list[float] = []
        for row in self.tableau.a:
            stages.append(lipschitz * (1 + h * sum(abs(a) * s for a, s in zip(row, stages, strict=True))))
        growth = h * sum(abs(b) * s for b, s in zip(self.tableau.b, stages, strict=True))
        # Of positive numbers alone: at most k + 4 roundings in each of k stages.
        return math.nextafter(1 + growth * (1 + (len(self.tableau.b) + 4) ** 2 * EPS), math.inf)


for _tableau in (HEUN, MIDPOINT, RALSTON, SSP3, KUTTA3, RK4):
    INTEGRATORS[_tableau.name] = partial(ExplicitRungeKutta, _tableau)
