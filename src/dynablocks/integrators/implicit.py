"""Implicit Runge–Kutta methods from a Butcher tableau, and the trapezoidal rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.fields import VectorField
from dynablocks.fields.base import over_states
from dynablocks.integrators.base import INTEGRATORS, ROUGH, RUNGE_KUTTA_KEEPS, ImplicitIntegrator, StepSize
from dynablocks.integrators.runge_kutta import contractivity_form, of_tableau, require_coefficients, require_order
from dynablocks.integrators.solver import DENSE_LIMIT
from dynablocks.numerics.rounding import EPS
from dynablocks.properties import Invertible, NormPreserving, Property, Symplectic

ROUNDING_UP = 1 + 2.0**-48
SOLVES = 8
"""A step and its inverse are two solves; each moves x by up to four times the solver's error (of Gauss4,
|d₁| + |d₂| = 2√3)."""


@dataclass(frozen=True)
class ImplicitTableau:
    r"""Coefficients (A, b) of an implicit method with invertible A: Zᵢ = x + h Σⱼ aᵢⱼ X(Zⱼ), x ↦ x + h Σ bᵢ X(Zᵢ).

    Gauss, Radau and Lobatto IIIC methods have such an A; that of Lobatto IIIA and IIIB is singular.

    Raises:
        InvalidArgument: A is not square and invertible, an entry is no number, or a condition of the order fails.

    Example:
        >>> radau = ImplicitTableau("radau3", 3, ((5 / 12, -1 / 12), (3 / 4, 1 / 4)), (3 / 4, 1 / 4))
        >>> radau.b_stable, radau.symplectic
        (True, False)
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        require_coefficients(self)
        stages = len(self.b)
        if len(self.a) != stages or any(len(row) != stages for row in self.a):
            raise InvalidArgument(f"tableau {self.name!r}: A must be {stages} × {stages}, as b has {stages} weights.")
        require_order(self.name, self.order, np.array(self.a), np.array(self.b))
        if np.linalg.cond(np.array(self.a)) > 1e8:
            raise InvalidArgument(
                f"tableau {self.name!r}: A is singular, as of Lobatto IIIA and IIIB, and a step is taken with its "
                "inverse; implement the step of an ImplicitIntegrator instead."
            )

    @property
    def stage_weights(self) -> tuple[float, ...]:
        """d = A⁻ᵀb: the step is x + Σ dᵢ (Zᵢ − x), in which a stiff field does not magnify the solver's error."""
        return tuple(float(d) for d in np.linalg.solve(np.array(self.a).T, np.array(self.b)))

    @property
    def form(self) -> np.ndarray:
        """:func:`contractivity_form` of the method."""
        return contractivity_form(np.array(self.a), np.array(self.b))

    @property
    def symplectic(self) -> bool:
        """The step keeps every quadratic invariant and the symplectic form (Cooper, 1987; Sanz-Serna, 1988)."""
        return bool(np.abs(self.form).max() < 1e-14)

    @property
    def b_stable(self) -> bool:
        """The step is non-expansive wherever the flow is (Burrage and Butcher, 1979)."""
        return min(self.b) > 0 and float(np.linalg.eigvalsh(self.form).min()) > -1e-14

    @property
    def symmetric(self) -> bool:
        """Ψ^{−h} is the inverse of Ψ^h: aᵢⱼ + a_{s+1−i, s+1−j} = bⱼ, bⱼ = b_{s+1−j}."""
        a, b = np.array(self.a), np.array(self.b)
        gaps = a + a[::-1, ::-1] - b, b - b[::-1]
        # Coefficients are rounded by less than this; a larger gap would show in what the step back misses.
        return all(float(np.abs(gap).max()) < 1e-14 for gap in gaps)


ROOT = math.sqrt(3) / 6
IMPLICIT_EULER = ImplicitTableau("implicit-euler", 1, ((1.0,),), (1.0,))
IMPLICIT_MIDPOINT = ImplicitTableau("implicit-midpoint", 2, ((0.5,),), (1.0,))
GAUSS4 = ImplicitTableau("gauss4", 4, ((0.25, 0.25 - ROOT), (0.25 + ROOT, 0.25)), (0.5, 0.5))


class ImplicitRungeKutta(ImplicitIntegrator):
    r"""One step of an implicit Runge–Kutta method, its stages solved by Newton's method.

    Implicit midpoint and Gauss–Legendre methods keep the symplectic form and the volume exactly (the derivative of the
    implicit function is a Cayley transform of the field's Jacobian, whatever the solver's error; to the solver's
    tolerance beyond 128 unknowns, where that transform is iterated, and above 1e-12), quadratic invariants to the
    solver's tolerance, and linear ones to rounding.

    Lipschitz constant, with hμ for the field's one-sided constant (of −X for h < 0): 1 for B-stable methods where
    hμ <= 0; for one stage R(z) = (1 + (1 − a)z)/(1 − az) at z = hμ < 1/a, and |R(∞)|, whichever is larger, or max |R|
    over the spectrum of a symmetric Jacobian. Under |h|L max Σ|aᵢⱼ| < 1 the stages are unique, so that a symmetric
    method is invertible by its step −h.

    Args:
        tableau: the coefficients.
        tolerance, max_iterations: of the solver, as in :class:`ImplicitIntegrator`.

    Raises:
        InvalidArgument: the tableau is none, or a setting of the solver is out of range.
        NotConverged: when a step's equation is not solved.

    Source: Hairer, Lubich and Wanner, "Geometric Numerical Integration", II.1.3, VI.4; Hairer and Wanner, "Solving
        Ordinary Differential Equations II", IV.8, IV.12.

    Example:
        >>> import torch
        >>> from dynablocks.linear import OrthogonalDense
        >>> from dynablocks.fields import GradientField
        >>> method, field = ImplicitRungeKutta(GAUSS4), GradientField(OrthogonalDense(3, 3), "tanh").double()
        >>> x = torch.randn(2, 3, dtype=torch.float64)
        >>> bool(torch.allclose(method.inverse(field, method.step(field, x, 0.3), 0.3), x))
        True
    """

    solved = frozenset({NormPreserving})
    name, order, symmetric = of_tableau("name"), of_tableau("order"), of_tableau("symmetric")

    def __init__(self, tableau: ImplicitTableau, tolerance: float = 1e-13, max_iterations: int = 50) -> None:
        super().__init__(tolerance, max_iterations)
        if not isinstance(tableau, ImplicitTableau):
            kind = type(tableau).__name__
            raise InvalidArgument(f"tableau is of class {kind}; an implicit method takes an ImplicitTableau.")
        self._tableau = tableau

    @property
    def tableau(self) -> ImplicitTableau:
        """The coefficients, as they were given: name, order and symmetry are theirs, so that they cannot be set."""
        return self._tableau

    @property
    def keeps(self) -> frozenset[type[Property]]:  # type: ignore[override]
        """Quadratic invariants where the tableau is symplectic, beside what every Runge–Kutta method keeps."""
        return RUNGE_KUTTA_KEEPS | ({Symplectic, NormPreserving} if self.tableau.symplectic else set())

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        a, d, step_size = self.tableau.a, self.tableau.stage_weights, over_states(step_size, x)

        def one_stage(z: Tensor, x: Tensor, h: StepSize) -> Tensor:
            return z - x - (h * a[0][0]) * field(z)

        def all_stages(z: Tensor, x: Tensor, h: StepSize) -> Tensor:
            slopes = field(z.flatten(0, 1)).reshape(z.shape).unbind(1)
            mixed = torch.stack([sum_of(row, slopes) for row in a], dim=1)
            step = h.reshape(-1, *(1,) * x.ndim) if isinstance(h, Tensor) and h.ndim else h
            return z - x.unsqueeze(1) - step * mixed

        if len(d) == 1:
            return x + d[0] * (self.solve(one_stage, x, x, step_size) - x)
        repeated = x.unsqueeze(1).expand(-1, len(d), *x.shape[1:])
        z = self.solve(all_stages, repeated, x, step_size)
        return x + sum_of(d, (z - x.unsqueeze(1)).unbind(1))

    def tolerance_of(self, kind: type[Property], field: VectorField) -> float:
        # The Cayley transform that keeps the form is iterated where there are more unknowns, and it is the derivative
        # of the solution: one that is found roughly jumps beside it.
        iterated = math.prod(field.in_shape) * len(self.tableau.b) > DENSE_LIMIT
        if kind is Symplectic and (iterated or self.tolerance > ROUGH):
            return self._of_two_solves()
        return super().tolerance_of(kind, field)

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        kept, losses = self.inherited(field, step_size)
        reach = max(sum(map(abs, row)) for row in self.tableau.a)
        if self.symmetric and abs(step_size) * reach * field.facts().lipschitz < 1:
            kept.append(Invertible(tolerance=self._of_two_solves()))
        return kept, losses

    def _of_two_solves(self) -> float:
        """What a step and its inverse miss: each of the solves moves x by up to Σ|dᵢ| times the solver's error."""
        return max(SOLVES, 2 * sum(map(abs, self.tableau.stage_weights))) * self.tolerance

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        facts, h = field.facts(), step_size
        if h == 0:
            return 1.0, "no step"
        rate = growth_rate(field, h)
        if len(self.tableau.b) == 1 and self.tableau.a[0][0] > 0 and self.tableau.a[0][0] * rate < 1:
            if facts.spectrum is not None:
                low, high = facts.spectrum
                largest = max(self._gain(h * low), self._gain(h * high)) * ROUNDING_UP
                # Rounding of R(0) = 1 is none of the step's.
                largest = min(largest, 1.0) if self.tableau.b_stable and rate <= 0 else largest
                return largest, f"max|R(hλ)|, λ in [{low:.4g}, {high:.4g}]"
            if rate > 0 or self.tableau.a[0][0] > 0.5:
                far = (1 - self.tableau.a[0][0]) / self.tableau.a[0][0]
                largest = max(self._gain(rate), far) * ROUNDING_UP
                largest = min(largest, 1.0) if self.tableau.b_stable and rate <= 0 else largest
                return largest, f"max(|R(hμ)|, |R(∞)|), hμ={rate:.4g}"
        if self.tableau.b_stable and rate <= 0:
            return 1.0, f"B-stable: hμ={rate:.4g} <= 0"
        return math.inf, f"no constant is known for hμ={rate:.4g}"

    def _gain(self, z: float) -> float:
        """An upper bound of |R(z)|, R(z) = (1 + (1 − a)z)/(1 − az), for az < 1."""
        a = self.tableau.a[0][0]
        above, below = (1 - a) * z, a * z
        # Rounding is that of az, which may be near 1 where 1 − az is small.
        left = 1 - below - 4 * EPS * (1 + abs(below))
        return (abs(1 + above) + 4 * EPS * (1 + abs(above))) / left if left > 0 else math.inf


def sum_of(weights: tuple[float, ...], terms: tuple[Tensor, ...]) -> Tensor:
    """Σ wᵢ tᵢ."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def growth_rate(field: VectorField, h: float) -> float:
    """hμ: of X for h >= 0; for h < 0 |h| times the one-sided constant of −X."""
    facts = field.facts()
    if h >= 0:
        return h * facts.one_sided if h else 0.0
    return -h * (facts.lipschitz if facts.spectrum is None else -facts.spectrum[0])


@INTEGRATORS.register("trapezoidal")
class Trapezoidal(ImplicitIntegrator):
    r"""The z with z = x + (h/2)(X(x) + X(z)): half an explicit and half an implicit Euler step.

    Order 2 and symmetric; conjugate to the implicit midpoint rule, but not symplectic itself. Lipschitz constant: that
    of the explicit half step times 1/(1 − hμ/2) of the implicit one, which is at most 1 for hμ <= 0.

    Args:
        tolerance, max_iterations: of the solver, as in :class:`ImplicitIntegrator`.

    Raises:
        NotConverged: when a step's equation is not solved.

    Source: Hairer, Lubich and Wanner, "Geometric Numerical Integration", section II.1, VI.8.

    Example:
        >>> Trapezoidal().order, Trapezoidal().symmetric
        (2, True)
    """

    order = 2
    symmetric = True
    keeps = RUNGE_KUTTA_KEEPS

    def step(self, field: VectorField, x: Tensor, step_size: StepSize) -> Tensor:
        step_size = over_states(step_size, x)
        half = x + 0.5 * step_size * field(x)
        return self.solve(lambda z, half, h: z - half - 0.5 * h * field(z), x, half, step_size)

    def step_constant(self, field: VectorField, step_size: float, bound: str = "tight") -> tuple[float, str]:
        first, reason = field.euler_constant(step_size / 2, bound)
        rate = growth_rate(field, step_size / 2)
        left = 1 - rate - 4 * EPS * (1 + abs(rate))
        constant = first / left * ROUNDING_UP if left > 0 else math.inf
        # The implicit half of a step without growth does not expand.
        constant = min(constant, first) if rate <= 0 else constant
        return constant, f"({reason})/(1-hμ/2), hμ/2={rate:.4g}"

    def title(self, step_size: float) -> str:
        return f"trapezoidal(h={step_size:.5g})"

    def guarantees(self, field: VectorField, step_size: float) -> tuple[list[Property], list[str]]:
        kept, losses = self.inherited(field, step_size)
        if abs(step_size) * field.facts().lipschitz < 2:
            kept.append(Invertible(tolerance=SOLVES * self.tolerance))
        return kept, losses


for _tableau in (IMPLICIT_EULER, IMPLICIT_MIDPOINT, GAUSS4):
    INTEGRATORS[_tableau.name] = partial(ImplicitRungeKutta, _tableau)
