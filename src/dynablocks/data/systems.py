"""Physical systems with known vector fields, first integrals and initial states: the oracles of structured fitting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from jaxtyping import Float64

Invariant = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PhysicalSystem:
    """An autonomous system x' = X(x) on Rⁿ whose structure is known; its dataclass fields are its constants.

    Attributes:
        name: its name in :data:`SYSTEMS`.
        state_names: one name a component, positions before momenta.
        preserves: what the flow keeps: "energy", "mass", "norm" (these are among the invariants, too), "volume",
            "symplectic" (the form) or "positive" (states >= 0 stay so).
        stiff: whether an explicit reference solver would be hopeless.
        separable: whether there is an energy of the form T(p) + V(q).
        open_low: every constant must be larger than this.

    Raises:
        InvalidArgument: a constant is not finite or not larger than ``open_low``.
    """

    name: ClassVar[str]
    state_names: ClassVar[tuple[str, ...]]
    preserves: ClassVar[tuple[str, ...]]
    stiff: ClassVar[bool] = False
    separable: ClassVar[bool] = False
    open_low: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        for constant in fields(self):
            require_range(f"{constant.name} of {self.name}", getattr(self, constant.name), self.open_low, open_low=True)

    @property
    def dimension(self) -> int:
        """n, the number of state components."""
        return len(self.state_names)

    @property
    def invariants(self) -> dict[str, Invariant]:
        """First integrals by name, each a map (batch, n) -> (batch,) that is constant along solutions."""
        return {}

    def vector_field(self, x: Float64[Tensor, "batch n"]) -> Float64[Tensor, "batch n"]:
        """X(x) row by row, differentiable by autograd."""
        raise NotImplementedError

    def draw(self, count: int, generator: torch.Generator) -> Float64[Tensor, "count n"]:
        """``count`` random initial states from the set that the class names."""
        raise NotImplementedError


class HamiltonianSystem(PhysicalSystem):
    """q' = ∂H/∂p, p' = −∂H/∂q in canonical coordinates x = (q, p)."""

    preserves = ("energy", "symplectic", "volume")
    separable = True

    def hamiltonian(self, x: Float64[Tensor, "batch n"]) -> Float64[Tensor, "batch"]:
        """H(x) row by row."""
        raise NotImplementedError

    @property
    def invariants(self) -> dict[str, Invariant]:
        return {"energy": self.hamiltonian}


SYSTEMS: Registry[type[PhysicalSystem]] = Registry("physical system")
S = TypeVar("S", bound=PhysicalSystem)


def _register(system: type[S]) -> type[S]:
    SYSTEMS.register(system.name)(system)
    return system


def require_system(system: PhysicalSystem | str) -> PhysicalSystem:
    """``system``, or the one of that name with its default constants.

    Raises:
        InvalidArgument: an unknown name, or neither a name nor a system.

    Example:
        >>> require_system("kepler").state_names
        ('q1', 'q2', 'p1', 'p2')
    """
    if isinstance(system, PhysicalSystem):
        return system
    if not isinstance(system, str):
        raise InvalidArgument(f"system is {system!r}; a name of SYSTEMS or a PhysicalSystem is needed.")
    return SYSTEMS.get_known(system)()


def _uniform(count: int, generator: torch.Generator, bounds: list[tuple[float, float]]) -> Tensor:
    low, high = torch.tensor(bounds, dtype=torch.float64).T
    require_whole("count", count, low=1)
    return low + (high - low) * torch.rand(count, len(bounds), dtype=torch.float64, generator=generator)


def _simplex(count: int, generator: torch.Generator, n: int) -> Tensor:
    """Uniform on {x >= 0, Σx = 1}: normalised exponentials."""
    weights = -torch.log1p(-_uniform(count, generator, [(0.0, 1.0)] * n))
    return weights / weights.sum(dim=1, keepdim=True)


def _mass(x: Tensor) -> Tensor:
    return x.sum(dim=1)


@_register
@dataclass(frozen=True)
class Pendulum(HamiltonianSystem):
    """A plane pendulum, H = p²/2 − ω² cos q.

    Initial states: q uniform in [−π/2, π/2], p in [−1, 1], so every one swings (H < 1/2 < ω² at the default).

    Args:
        frequency: ω of small swings, rad per unit of time; 1 gives the paper's and the SympNet papers' pendulum.

    Source: paper section 4.1 and figure 8 (X₂); design D4.

    Example:
        >>> Pendulum().vector_field(torch.tensor([[0.0, 1.0]], dtype=torch.float64)).tolist()
        [[1.0, -0.0]]
    """

    frequency: float = 1.0

    name = "pendulum"
    state_names = ("q", "p")

    def hamiltonian(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return p.square() / 2 - self.frequency**2 * q.cos()

    def vector_field(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return torch.stack([p, -(self.frequency**2) * q.sin()], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return _uniform(count, generator, [(-math.pi / 2, math.pi / 2), (-1.0, 1.0)])


@_register
@dataclass(frozen=True)
class DoublePendulum(HamiltonianSystem):
    """Two point masses on two rigid massless rods; q are the rods' angles from the vertical, p their momenta.

    H = (m₂l₂²p₁² + (m₁+m₂)l₁²p₂² − 2m₂l₁l₂p₁p₂ cos Δ) / (2m₂l₁²l₂²(m₁ + m₂ sin²Δ))
    − (m₁+m₂)g l₁ cos q₁ − m₂g l₂ cos q₂, with Δ = q₁ − q₂.

    Initial states: angles uniform in [−1, 1] rad, momenta in [−1/2, 1/2].

    Args:
        mass_1, mass_2: the inner and the outer mass, kg.
        length_1, length_2: the rods, m.
        gravity: m/s².

    Source: Landau and Lifshitz, Mechanics, section 5, problem 1, in Hamiltonian form.
    """

    mass_1: float = 1.0
    mass_2: float = 1.0
    length_1: float = 1.0
    length_2: float = 1.0
    gravity: float = 1.0

    name = "double-pendulum"
    state_names = ("q1", "q2", "p1", "p2")
    separable = False

    def _kinetic_parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the kinetic energy."""
        q1, q2, p1, p2 = x.unbind(1)
        m1, m2, l1, l2 = self.mass_1, self.mass_2, self.length_1, self.length_2
        coupling = 2 * m2 * l1 * l2 * p1 * p2 * (q1 - q2).cos()
        numerator = m2 * l2**2 * p1.square() + (m1 + m2) * l1**2 * p2.square() - coupling
        return numerator, 2 * m2 * (l1 * l2) ** 2 * (m1 + m2 * (q1 - q2).sin().square())

    def hamiltonian(self, x: Tensor) -> Tensor:
        q1, q2, _, _ = x.unbind(1)
        numerator, denominator = self._kinetic_parts(x)
        inner = (self.mass_1 + self.mass_2) * self.gravity * self.length_1 * q1.cos()
        return numerator / denominator - inner - self.mass_2 * self.gravity * self.length_2 * q2.cos()

    def vector_field(self, x: Tensor) -> Tensor:
        q1, q2, p1, p2 = x.unbind(1)
        m1, m2, l1, l2, g = self.mass_1, self.mass_2, self.length_1, self.length_2, self.gravity
        numerator, denominator = self._kinetic_parts(x)
        sine, cosine, coupling = (q1 - q2).sin(), (q1 - q2).cos(), 2 * m2 * l1 * l2
        slope = 4 * (m2 * l1 * l2) ** 2 * sine * cosine
        kinetic_slope = (coupling * p1 * p2 * sine - numerator / denominator * slope) / denominator
        return torch.stack(
            [
                (2 * m2 * l2**2 * p1 - coupling * p2 * cosine) / denominator,
                (2 * (m1 + m2) * l1**2 * p2 - coupling * p1 * cosine) / denominator,
                -kinetic_slope - (m1 + m2) * g * l1 * q1.sin(),
                kinetic_slope - m2 * g * l2 * q2.sin(),
            ],
            dim=1,
        )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return _uniform(count, generator, [(-1.0, 1.0)] * 2 + [(-0.5, 0.5)] * 2)


@_register
@dataclass(frozen=True)
class Kepler(HamiltonianSystem):
    """A planet of mass 1 about a fixed sun in the plane, H = |p|²/2 − k/|q|.

    Initial states: ellipses of semi-major axis 1, eccentricity e uniform in [0, 1/2], eccentric anomaly and
    direction of the perihelion uniform; so H = −k/2 and the period is 2π/√k.

    Args:
        strength: k = GM, length³/time².

    Source: Hairer, Lubich and Wanner, Geometric Numerical Integration, 2006, section I.2.
    """

    strength: float = 1.0

    name = "kepler"
    state_names = ("q1", "q2", "p1", "p2")

    def hamiltonian(self, x: Tensor) -> Tensor:
        return x[:, 2:].square().sum(dim=1) / 2 - self.strength / x[:, :2].square().sum(dim=1).sqrt()

    @property
    def invariants(self) -> dict[str, Invariant]:
        return {"energy": self.hamiltonian, "angular momentum": lambda x: x[:, 0] * x[:, 3] - x[:, 1] * x[:, 2]}

    def vector_field(self, x: Tensor) -> Tensor:
        q, p = x[:, :2], x[:, 2:]
        return torch.cat([p, -self.strength * q / q.square().sum(dim=1, keepdim=True) ** 1.5], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        bounds = [(0.0, 0.5), (0.0, 2 * math.pi), (0.0, 2 * math.pi)]
        eccentricity, anomaly, direction = _uniform(count, generator, bounds).unbind(1)
        minor = (1 - eccentricity.square()).sqrt()
        speed = math.sqrt(self.strength) / (1 - eccentricity * anomaly.cos())
        position = torch.stack([anomaly.cos() - eccentricity, minor * anomaly.sin()], dim=1)
        momentum = speed[:, None] * torch.stack([-anomaly.sin(), minor * anomaly.cos()], dim=1)
        rotation = torch.stack([direction.cos(), -direction.sin(), direction.sin(), direction.cos()], 1).view(-1, 2, 2)
        return torch.cat([(rotation @ part[:, :, None])[:, :, 0] for part in (position, momentum)], dim=1)


@_register
@dataclass(frozen=True)
class HenonHeiles(HamiltonianSystem):
    """A star in a galactic plane, H = (|p|² + |q|²)/2 + λ(q₁²q₂ − q₂³/3); chaotic at higher energies.

    Initial states: every component uniform in [−1/4, 1/4]; at the default λ their energy is below the escape energy
    1/6, so they stay bounded.

    Args:
        coupling: λ, 1/length.

    Source: Hénon and Heiles, The applicability of the third integral of motion, 1964.
    """

    coupling: float = 1.0

    name = "henon-heiles"
    state_names = ("q1", "q2", "p1", "p2")

    def hamiltonian(self, x: Tensor) -> Tensor:
        q1, q2, _, _ = x.unbind(1)
        return x.square().sum(dim=1) / 2 + self.coupling * (q1.square() * q2 - q2**3 / 3)

    def vector_field(self, x: Tensor) -> Tensor:
        q1, q2, p1, p2 = x.unbind(1)
        force = [-q1 - 2 * self.coupling * q1 * q2, -q2 - self.coupling * (q1.square() - q2.square())]
        return torch.stack([p1, p2, *force], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return _uniform(count, generator, [(-0.25, 0.25)] * 4)


@_register
@dataclass(frozen=True)
class MassSpring(HamiltonianSystem):
    """A mass on a linear spring, H = p²/(2m) + kq²/2.

    Initial states: q and p uniform in [−1, 1].

    Args:
        mass: m, kg.
        stiffness: k, N/m.
    """

    mass: float = 1.0
    stiffness: float = 1.0

    name = "mass-spring"
    state_names = ("q", "p")

    def hamiltonian(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return p.square() / (2 * self.mass) + self.stiffness * q.square() / 2

    def vector_field(self, x: Tensor) -> Tensor:
        q, p = x.unbind(1)
        return torch.stack([p / self.mass, -self.stiffness * q], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return _uniform(count, generator, [(-1.0, 1.0)] * 2)


@_register
@dataclass(frozen=True)
class RigidBody(PhysicalSystem):
    """Euler's equations of a free rigid body, y' = y × I⁻¹y for the angular momentum y in the body's frame.

    Energy H = Σyᵢ²/(2Iᵢ); the norm |y| is a Casimir; the field is divergence-free.
    Initial states: uniform on the unit sphere.

    Args:
        inertia_1, inertia_2, inertia_3: the principal moments of inertia, kg·m².

    Source: Hairer, Lubich and Wanner, Geometric Numerical Integration, 2006, section VII.5, and its moments.
    """

    inertia_1: float = 2.0
    inertia_2: float = 1.0
    inertia_3: float = 2.0 / 3.0

    name = "rigid-body"
    state_names = ("y1", "y2", "y3")
    preserves = ("energy", "norm", "volume")

    def _angular_velocity(self, x: Tensor) -> Tensor:
        return x / x.new_tensor([self.inertia_1, self.inertia_2, self.inertia_3])

    @property
    def invariants(self) -> dict[str, Invariant]:
        return {
            "energy": lambda x: (x * self._angular_velocity(x)).sum(dim=1) / 2,
            "norm": lambda x: x.square().sum(dim=1).sqrt(),
        }

    def vector_field(self, x: Tensor) -> Tensor:
        return torch.linalg.cross(x, self._angular_velocity(x))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        height, angle = _uniform(count, generator, [(-1.0, 1.0), (0.0, 2 * math.pi)]).unbind(1)
        radius = (1 - height.square()).sqrt()
        return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)


@_register
@dataclass(frozen=True)
class SIR(PhysicalSystem):
    """Susceptible, infected and recovered shares of a population: S' = −βSI, I' = βSI − γI, R' = γI.

    Initial states: uniform on the simplex {S, I, R >= 0, S + I + R = 1}.

    Args:
        infection: β, 1/time; 1 in the paper.
        recovery: γ, 1/time; 1 in the paper.

    Source: paper equation (4.3) and figure 6, which names no set of initial states (the components are "percentages of
        three species on the total population"); Kermack and McKendrick, 1927.
    """

    infection: float = 1.0
    recovery: float = 1.0

    name = "sir"
    state_names = ("S", "I", "R")
    preserves = ("mass", "positive")

    @property
    def invariants(self) -> dict[str, Invariant]:
        return {"mass": _mass}

    def vector_field(self, x: Tensor) -> Tensor:
        susceptible, infected, _ = x.unbind(1)
        new, cured = self.infection * susceptible * infected, self.recovery * infected
        return torch.stack([-new, new - cured, cured], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return _simplex(count, generator, 3)


@_register
@dataclass(frozen=True)
class SEIR(PhysicalSystem):
    """SIR with an exposed stage: S' = −βSI, E' = βSI − σE, I' = σE − γI, R' = γI.

    Initial states: uniform on the simplex {S, E, I, R >= 0, sum 1}.

    Args:
        infection: β, 1/time.
        incubation: σ, 1/time.
        recovery: γ, 1/time.

    Source: Hethcote, The mathematics of infectious diseases, SIAM Review 2000.
    """

    infection: float = 1.0
    incubation: float = 1.0
    recovery: float = 1.0

    name = "seir"
    state_names = ("S", "E", "I", "R")
    preserves = ("mass", "positive")

    @property
    def invariants(self) -> dict[str, Invariant]:
        return {"mass": _mass}

    def vector_field(self, x: Tensor) -> Tensor:
        susceptible, exposed, infected, _ = x.unbind(1)
        new, ill, cured = self.infection * susceptible * infected, self.incubation * exposed, self.recovery * infected
        return torch.stack([-new, new - ill, ill - cured, cured], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return _simplex(count, generator, 4)


@_register
@dataclass(frozen=True)
class Robertson(PhysicalSystem):
    """Three species A → B, 2B → B + C, B + C → A + C: stiff, the rates differ by nine orders of magnitude.

    A' = −k₁A + k₃BC, B' = k₁A − k₃BC − k₂B², C' = k₂B².

    Initial states: A uniform in [1/2, 1 − 10⁻⁴], B in [0, 10⁻⁴], C = 1 − A − B.

    Args:
        slow: k₁, 1/time.
        fast: k₂, 1/(concentration·time).
        middle: k₃, 1/(concentration·time).

    Source: Robertson, The solution of a set of reaction rate equations, 1966.
    """

    slow: float = 0.04
    fast: float = 3e7
    middle: float = 1e4

    name = "robertson"
    state_names = ("A", "B", "C")
    preserves = ("mass", "positive")
    stiff = True

    @property
    def invariants(self) -> dict[str, Invariant]:
        return {"mass": _mass}

    def vector_field(self, x: Tensor) -> Tensor:
        a, b, c = x.unbind(1)
        exchange, made = self.slow * a - self.middle * b * c, self.fast * b.square()
        return torch.stack([-exchange, exchange - made, made], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = _uniform(count, generator, [(0.5, 1 - 1e-4), (0.0, 1e-4)])
        return torch.cat([drawn, 1 - drawn.sum(dim=1, keepdim=True)], dim=1)


@_register
@dataclass(frozen=True)
class LotkaVolterra(PhysicalSystem):
    """Prey u and predators v: u' = αu − βuv, v' = δuv − γv.

    "energy" is the integral δu − γ ln u + βv − α ln v, the Hamiltonian in the logarithms of the populations; it is
    defined for positive populations.
    Initial states: u and v uniform in [1/2, 2].

    Args:
        birth: α, 1/time.
        predation: β, 1/(population·time).
        growth: δ, 1/(population·time).
        death: γ, 1/time.

    Source: Hairer, Lubich and Wanner, Geometric Numerical Integration, 2006, section I.1.1.
    """

    birth: float = 1.0
    predation: float = 1.0
    growth: float = 1.0
    death: float = 1.0

    name = "lotka-volterra"
    state_names = ("u", "v")
    preserves = ("energy", "positive")

    @property
    def invariants(self) -> dict[str, Invariant]:
        def integral(x: Tensor) -> Tensor:
            prey, predators = x.unbind(1)
            return (
                self.growth * prey - self.death * prey.log() + self.predation * predators - self.birth * predators.log()
            )

        return {"energy": integral}

    def vector_field(self, x: Tensor) -> Tensor:
        prey, predators = x.unbind(1)
        met = prey * predators
        return torch.stack([self.birth * prey - self.predation * met, self.growth * met - self.death * predators], 1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return _uniform(count, generator, [(0.5, 2.0)] * 2)


@_register
@dataclass(frozen=True)
class ABCFlow(PhysicalSystem):
    """Arnold–Beltrami–Childress flow, a steady Euler flow on the torus with chaotic streamlines and zero divergence.

    x' = A sin z + C cos y, y' = B sin x + A cos z, z' = C sin y + B cos x.

    Initial states: uniform in [0, 2π]³; solutions are not wrapped.

    Args:
        amplitude_a, amplitude_b, amplitude_c: A, B, C, length/time, of either sign.

    Source: Dombre et al., Chaotic streamlines in the ABC flows, J. Fluid Mech. 1986 (A² = 3, B² = 2, C² = 1).
    """

    amplitude_a: float = math.sqrt(3.0)
    amplitude_b: float = math.sqrt(2.0)
    amplitude_c: float = 1.0

    name = "abc-flow"
    state_names = ("x", "y", "z")
    preserves = ("volume",)
    open_low = -math.inf

    def vector_field(self, x: Tensor) -> Tensor:
        u, v, w = x.unbind(1)
        a, b, c = self.amplitude_a, self.amplitude_b, self.amplitude_c
        return torch.stack([a * w.sin() + c * v.cos(), b * u.sin() + a * w.cos(), c * v.sin() + b * u.cos()], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return _uniform(count, generator, [(0.0, 2 * math.pi)] * 3)
