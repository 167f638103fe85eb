"""What a vector field is and what it declares about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_finite
from dynablocks.linear.maps import LOOSEST, LinearMap, why_unknown
from dynablocks.numerics.rounding import EPS, exp_up
from dynablocks.properties import EUCLIDEAN, Metric
from dynablocks.properties.own_code import COMPUTING, MOVING, replaced, require_visible
from dynablocks.registry import Registry


def over_states(step_size: Tensor | float, x: Tensor) -> Tensor | float:
    """One step a sample as a factor of a batch of states: (batch,) or (batch, 1) ↦ (batch, 1, …); a number as it is."""
    if isinstance(step_size, Tensor) and step_size.ndim:
        return step_size.reshape(-1, *(1,) * (x.ndim - 1))
    return step_size


def over_matrices(step_size: Tensor | float) -> Tensor | float:
    """A step that is one number a sample, (batch, 1), shaped to multiply a matrix a sample.

    Example:
        >>> import torch
        >>> over_matrices(torch.ones(3, 1)).shape, over_matrices(0.5)
        (torch.Size([3, 1, 1]), 0.5)
    """
    return step_size[..., None] if isinstance(step_size, Tensor) and step_size.ndim else step_size


@dataclass(frozen=True)
class FieldFacts:
    r"""Sound facts about a vector field X, from upper bounds in float64.

    Attributes:
        lipschitz: ‖X(x) − X(y)‖ <= lipschitz · ‖x − y‖.
        one_sided: ⟨X(x) − X(y), x − y⟩ <= one_sided · ‖x − y‖²; negative for a contractive field.
        spectrum: every Jacobian is symmetric with eigenvalues in this interval; ``None`` when not known to be
            symmetric.
        conservative: X = ∇V for some V.
        odd: X(−x) = −X(x).
        linear_invariants: weights w with wᵀX(x) = 0; ``None`` stands for w = 1.
        divergence_free: ∇·X = 0.
        hamiltonian: X = 𝕁∇H on x = (q, p), all positions and then all momenta, so q̇ = ∂H/∂p and ṗ = −∂H/∂q.
        damping: the rate γ of a conformal Hamiltonian field q̇ = ∂H/∂p, ṗ = −∂H/∂q − γp, ``None`` for other fields.
        conserves_energy, dissipates_energy: d/dt H <= 0 along solutions, with equality in the first case, for H the
            field's ``energy``. Of a field with a method ``structure`` it says more (:class:`VectorField`).
        tangent: ⟨x, X(x)⟩ = 0, so solutions keep their norm.
        positive: Xᵢ(x) >= 0 where xᵢ = 0 and x >= 0, so solutions stay nonnegative.
        reason: where the numbers come from.
        metric: the inner product ⟨x, y⟩_M = xᵀMy of ``lipschitz``, ``one_sided``, ``spectrum`` and ``conservative``:
            norms and symmetry are its own there, and ``conservative`` is X = M⁻¹∇V. No other fact depends on it:
            ``tangent`` is about the spheres of ℓ2, and the ∇H of ``hamiltonian`` is that of ℓ2.

    What follows is drawn, and a bound that is given is kept where it is the better one: from a spectrum the constants
    max |λ| and max λ, and ``conservative``, as a Jacobian that is symmetric on all of R^n is a Hessian (Poincaré); from
    ``lipschitz`` that ``one_sided`` is at most as large, since ⟨δX, δx⟩ <= ‖δX‖ ‖δx‖; from ``hamiltonian``
    ``divergence_free``, as ∇·(𝕁∇H) = trace(𝕁∇²H) = 0.

    Raises:
        InvalidArgument: a constant is no number, ``lipschitz`` is negative, the spectrum is no interval, or an
            invariant no tuple of finite numbers.

    Example:
        >>> facts = FieldFacts(spectrum=(-2.0, 0.5))
        >>> facts.lipschitz, facts.one_sided, facts.conservative
        (2.0, 0.5, True)
        >>> FieldFacts(1.0).one_sided, FieldFacts(hamiltonian=True).divergence_free
        (1.0, True)
    """

    lipschitz: float = math.inf
    one_sided: float = math.inf
    spectrum: tuple[float, float] | None = None
    conservative: bool = False
    odd: bool = False
    linear_invariants: tuple[tuple[float, ...] | None, ...] = ()
    divergence_free: bool = False
    hamiltonian: bool = False
    damping: float | None = None
    conserves_energy: bool = False
    dissipates_energy: bool = False
    tangent: bool = False
    positive: bool = False
    reason: str = ""
    metric: Metric = EUCLIDEAN

    def __post_init__(self) -> None:
        _require_bound("lipschitz", self.lipschitz, 0.0)
        _require_bound("one_sided", self.one_sided)
        if self.damping is not None:
            require_finite("damping", self.damping)
        _require_invariants(self.linear_invariants)
        if self.spectrum is not None:
            _require_interval("spectrum", self.spectrum)
            low, high = self.spectrum
            self._draw("lipschitz", min(self.lipschitz, float(max(abs(low), abs(high)))))
            self._draw("one_sided", min(self.one_sided, float(high)))
            self._draw("conservative", True)
        self._draw("one_sided", min(self.one_sided, self.lipschitz))
        self._draw("divergence_free", self.divergence_free or self.hamiltonian)

    def _draw(self, name: str, value: float | bool) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of_spectrum(cls, low: float, high: float, *, odd: bool, reason: str, metric: Metric = EUCLIDEAN) -> FieldFacts:
        """The facts of a gradient field whose Jacobians have their eigenvalues in [low, high].

        An end that is no number, as 0 · ∞ of a norm that overflowed, says that nothing is known of either.

        Example:
            >>> facts = FieldFacts.of_spectrum(-2.0, 0.5, odd=True, reason="two eigenvalues")
            >>> facts.lipschitz, facts.one_sided, facts.conservative
            (2.0, 0.5, True)
        """
        if math.isnan(low) or math.isnan(high):
            low, high = -math.inf, math.inf
        return cls(spectrum=(low, high), odd=odd, reason=reason, metric=metric)

    def euclidean(self) -> FieldFacts:
        r"""What these facts say in ℓ2, for fields that are made of this one.

        A Jacobian J with ‖RJR⁻¹‖ <= L has ‖J‖ <= cond(R) L; one that is self-adjoint in ⟨·,·⟩_M is not symmetric.
        What is no matter of the metric stays.
        """
        if self.metric == EUCLIDEAN:
            return self
        lipschitz = self.lipschitz * self.metric.condition * (1 + 2.0**-40)
        return replace(
            self,
            lipschitz=lipschitz,
            one_sided=lipschitz,
            spectrum=None,
            conservative=False,
            reason=f"{self.reason}, times the condition of {self.metric.name}",
            metric=EUCLIDEAN,
        )

    def scaled(self, factor: float) -> FieldFacts:
        """What these facts say of cX for c = ``factor`` of either sign, in the same metric.

        Constants, the spectrum and the rate of damping are multiplied by c, bounds rounded outwards. For c < 0 nothing
        is said of signs, nor of energies that fall.

        Raises:
            InvalidArgument: c is no finite number.

        Example:
            >>> facts = FieldFacts(spectrum=(-2.0, 0.5)).scaled(-2.0)
            >>> facts.spectrum, facts.lipschitz
            ((-1.0, 4.0), 4.0)
        """
        if require_finite("factor", factor) == 1.0:
            return self
        spectrum: tuple[float, float] | None = None
        if self.spectrum is not None:
            low, high = (max(_product_up(c, end) for end in self.spectrum) for c in (-factor, factor))
            spectrum = 0.0 - low, high
        return replace(
            self,
            lipschitz=_product_up(abs(factor), self.lipschitz),
            # Turned round, it is drawn from the spectrum or the Lipschitz constant.
            one_sided=_product_up(factor, self.one_sided) if factor >= 0 else math.inf,
            spectrum=spectrum,
            damping=None if self.damping is None else factor * self.damping + 0.0,
            dissipates_energy=self.dissipates_energy and factor >= 0,
            positive=self.positive and factor >= 0,
        )

    @property
    def cocoercive(self) -> bool:
        """−X is the gradient of a convex function, so ⟨δX, δx⟩ <= −‖δX‖² / lipschitz (Baillon–Haddad)."""
        return self.spectrum is not None and self.spectrum[1] <= 0.0


def _product_up(factor: float, value: float) -> float:
    """c · value, rounded upwards where it is no float; 0 · ∞, which says nothing, is ∞."""
    product = factor * value + 0.0
    if math.isnan(product):
        return math.inf
    exact = math.isinf(value) or (math.isfinite(product) and Fraction(factor) * Fraction(value) == Fraction(product))
    return product if exact else math.nextafter(product, math.inf)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_bound(name: str, value: float, least: float = -math.inf) -> None:
    if not _is_number(value) or not value >= least:
        kind = "a number" if least == -math.inf else f"a number >= {least:g}"
        raise InvalidArgument(
            f"{name} is {value!r}; {kind} is needed, inf where no bound is known (of a parameter p, float(p.detach()))."
        )


def _require_interval(name: str, ends: tuple[float, float]) -> None:
    pair = isinstance(ends, tuple) and len(ends) == 2 and all(map(_is_number, ends))
    if not pair or not ends[0] <= ends[1]:
        raise InvalidArgument(
            f"{name} is {ends!r}; two numbers (low, high) with low <= high are needed (of a parameter p, "
            "float(p.detach()))."
        )


def _require_invariants(invariants: tuple[tuple[float, ...] | None, ...]) -> None:
    def is_weights(given: object) -> bool:
        return isinstance(given, tuple) and all(_is_number(w) and math.isfinite(w) for w in given) and any(given)

    if not isinstance(invariants, tuple) or not all(given is None or is_weights(given) for given in invariants):
        raise InvalidArgument(
            f"linear_invariants is {invariants!r}; a tuple is needed that holds for each invariant None (for w = 1) or "
            "the tuple w of finite numbers, not all 0: (None,) for one, (None, (1.0, 2.0)) for two."
        )


SAID_OF: dict[str, tuple[str, ...]] = {
    "facts": COMPUTING,
    "euler_constant": MOVING,
    "flow_constant": (*MOVING, "flow"),
    "flow_log_determinant": (*MOVING, "flow"),
    "flow_with_log_determinant": (*MOVING, "flow", "flow_log_determinant"),
    "terms": ("forward",),
}
"""The methods by which a class says what holds of others, and which these are: who replaces one says it anew."""


OF_ANOTHER: dict[str, tuple[str, ...]] = {
    "flow": ("forward", "profile", "preactivation", "rate"),
    "structure": ("forward",),
    "energy": COMPUTING,
    "rotate": ("forward",),
    "rates": ("forward",),
    "production_destruction": ("forward",),
    "potential": ("forward", "profile", "preactivation"),
}
"""The methods of a field beside X, and those that each goes with: where one of these is replaced, an inherited one is
that of another field, and not taken."""


def _no_facts(self: VectorField) -> FieldFacts:
    name = type(self).__name__
    return FieldFacts(reason=f"{name} computes X by code of its own, of which the facts that it inherits do not speak")


class VectorField(nn.Module):
    """A parametric autonomous vector field x ↦ X(x) on inputs of one shape.

    A subclass implements :meth:`forward` and :meth:`facts`, and may sharpen :meth:`euler_constant`. One whose flow has
    a closed form implements :meth:`flow`, and :meth:`flow_log_determinant` where densities are asked for; it may
    sharpen :meth:`flow_constant`. One that is a sum of such implements :meth:`terms`, or is a
    :class:`~dynablocks.fields.SumField`. One that is ∇V for a known V has it as a method ``potential``, one number a
    sample. One whose facts read the parameters tells by :meth:`_standing_facts` what holds for all of them, beside
    :meth:`facts`: then its steps read none. :func:`dynablocks.testing.check_field` holds all of this against the field.

    One that is S(x)∇H(x) has the methods ``energy``, ``gradient`` and ``structure(x, v)``. The last is S(x)v for every
    v, and not for ∇H(x) alone: linear in v, and ⟨v, S(x)v⟩ is 0 for all v where the facts say that energy is conserved,
    <= 0 where they say that it is dissipated. Discrete gradients, which are none of the gradients, rest on it.

    Attributes:
        in_shape: the shape of one sample, a tuple of sizes.

    What a class says is said of its own methods: a subclass with another ``forward`` (or another ``profile``,
    ``preactivation``, ``rate``, ``energy``, …) has no facts until it has a :meth:`facts` of its own, one with another
    ``flow`` none of the constants of the one before. The ``flow``, ``energy``, ``structure``, ``potential``, ``rotate``
    and ``rates`` that a class inherits are not taken for those of a ``forward`` (or of another method that X is made
    of) of its own: it repeats the ones that still hold.
    """

    in_shape: tuple[int, ...]
    _of_another: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        roots = (nn.Module, VectorField)
        for claim, code in SAID_OF.items():
            if replaced(cls, code, (claim,), roots):
                setattr(cls, claim, _no_facts if claim == "facts" else vars(VectorField)[claim])
        found = {name: replaced(cls, code, (name,), roots) for name, code in OF_ANOTHER.items()}
        cls._of_another = {name: own for name, own in found.items() if own is not None}

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        """Set an attribute; a part of the field may not have the name of something that its class has.

        Raises:
            InvalidArgument: it has, as ``self.energy = nn.Linear(2, 1)`` would.
        """
        require_visible(self, name, value)
        super().__setattr__(name, value)

    @classmethod
    def example(cls) -> VectorField:
        """A small instance, for the conformance suite and the docs table."""
        raise NotImplementedError(f"{cls.__name__} must implement the class method example(): a small instance of it.")

    def forward(self, x: Tensor) -> Tensor:
        """X(x) for a batch (batch, ``*in_shape``), of the same shape."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement forward(x): X(x) for a batch of states, of the shape of the batch."
        )

    def facts(self) -> FieldFacts:
        """What holds for the present parameters."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement facts(): what holds of it for its present parameters; FieldFacts() "
            "where nothing is known."
        )

    def standing_facts(self) -> FieldFacts:
        """The structure that holds whatever the parameters are: what a step may ask for, since it costs nothing.

        Constants need not be among these facts, nor oddness. Nothing is read of the parameters, so they may be stacked
        ones under :func:`torch.func.vmap`; but a class that implements :meth:`facts` alone gives those, and they read.

        Example:
            >>> from dynablocks.fields import GradientField
            >>> field = GradientField.example()
            >>> field.standing_facts().conservative, field.standing_facts().lipschitz
            (True, inf)
        """
        # A subclass with facts of its own may say more or less than the class whose standing facts it inherits.
        speaks = next(kind for kind in type(self).__mro__ if "facts" in vars(kind))
        told = speaks is not VectorField and "_standing_facts" in vars(speaks)
        return self._standing_facts() if told else self.facts()

    def _standing_facts(self) -> FieldFacts:
        """:meth:`standing_facts` of a class whose :meth:`facts` read parameters; implemented beside it."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement _standing_facts() beside facts(): what holds whatever its "
            "parameters are."
        )

    def energy(self, x: Tensor) -> Tensor:
        """H(x) per sample: what ``conserves_energy`` and ``dissipates_energy`` are about, and H of X = 𝕁∇H."""
        name = type(self).__name__
        raise InvalidArgument(
            f"{name} has no energy; use a Hamiltonian, partitioned or dissipative field, or give it a method "
            "energy(x), one number a sample."
        )

    def _has_energy(self) -> bool:
        """Whether its class has an H that goes with its X; a field that is made of others asks these, too."""
        return type(self).energy is not VectorField.energy and why_no_energy(self) is None

    def terms(self) -> tuple[VectorField, ...]:
        """The fields whose sum this is, for splitting methods; the field itself when it is not a sum."""
        return (self,)

    def why_no_flow(self) -> str | None:
        """Why the flow has no closed form, ``None`` when it has one: by default where the class has a :meth:`flow`."""
        name = type(self).__name__
        if type(self).flow is not VectorField.flow:
            own = self._of_another.get("flow")
            return None if own is None else f"{name} has a {own} of its own, and no flow to go with it"
        if any(term is not self for term in self.terms()):
            way = "take a splitting method, which needs flows of its terms alone"
        else:
            way = "give it flow(x, time), or terms() for a splitting method"
        return f"the exact flow needs a closed form, and {name} implements none; {way}"

    def flow(self, x: Tensor, time: Tensor | float) -> Tensor:
        """Φ_t(x), the solution at t = ``time`` (any sign; a number, or shaped to multiply x), exact up to rounding."""
        raise InvalidArgument(f"{self.why_no_flow()}; a Runge–Kutta method needs no flow.")

    def flow_log_determinant(self, x: Tensor, time: Tensor | float) -> Tensor:
        """log |det DΦ_t(x)| per sample."""
        reason = self.why_no_flow()
        if reason is not None:
            raise InvalidArgument(f"{reason}; without a flow there is no log-determinant of one.")
        raise InvalidArgument(
            f"{type(self).__name__} has a flow, but not its log-determinant; give it a method "
            "flow_log_determinant(x, time): log |det DΦ_t(x)|, one number a sample."
        )

    def flow_with_log_determinant(self, x: Tensor, time: Tensor | float) -> tuple[Tensor, Tensor]:
        """Φ_t(x) and log |det DΦ_t(x)|: what :meth:`flow` and :meth:`flow_log_determinant` give.

        A class where both share work computes them at once here.
        """
        change = self.flow_log_determinant(x, time)
        return self.flow(x, time), change

    def flow_constant(self, time: float) -> tuple[float, str]:
        """A Lipschitz constant of Φ_t and the reason: e^{μ|t|} for the one-sided constant μ of X (Grönwall).

        For t < 0 it is that of −X: −λ for the least eigenvalue λ of symmetric Jacobians, else ``lipschitz`` bounds it.
        """
        facts = self.facts()
        if time == 0:
            return 1.0, "no time"
        backwards = facts.lipschitz if facts.spectrum is None else min(facts.lipschitz, -facts.spectrum[0])
        rate = facts.one_sided if time > 0 else backwards
        return exp_up(rate * abs(time)), f"e^(t·{rate:.4g}), Grönwall"

    def is_undone(self, time: float) -> bool:
        r"""Whether Φ_{−t} leads back from Φ_t but for rounding, for the present parameters.

        Rounding of Φ_t(x), which may have grown by the constant of Φ_t, grows by that of Φ_{−t} on the way back, and
        must leave the first three digits of a state: m + (x − m)e^{−t} is m for every x near m where e^{−t} is below
        the unit roundoff. No where a constant is not known. Overridden where the way back takes off what the way there
        has added.
        """
        there, back = (self.flow_constant(t)[0] for t in (time, -time))
        return back * max(1.0, there) * self._roundoff() <= LOOSEST

    def _roundoff(self) -> float:
        """eps of the coarsest format of what the field holds, of float32 where it holds nothing."""
        held = [part.dtype for part in (*self.parameters(), *self.buffers()) if part.is_floating_point()]
        return max(torch.finfo(kind).eps for kind in held or [torch.float32])

    def euler_constant(self, step_size: float, bound: str = "tight") -> tuple[float, str]:
        r"""A Lipschitz constant of x + hX(x) for h = ``step_size`` of either sign, and the reason.

        Symmetric Jacobians: max |1 + hλ| over the spectrum (tight). ``bound="paper"`` is √(1 + 2hμ + h²L²) for h >= 0
        and one-sided constant μ (paper section 3.2). Otherwise 1 + |h|L, the smaller of the two where both hold.
        (3.5) is not part of the paper's bound: a contractive ReLU step with ‖A‖ = 1 gets √(1 + h²), not 1.
        """
        facts, h = self.facts(), step_size
        if h == 0:
            return 1.0, "no step"
        if math.isinf(facts.lipschitz):
            return math.inf, "no Lipschitz constant is known"
        if facts.spectrum is not None and bound == "tight":
            low, high = facts.spectrum
            ends = sorted((abs(1 + h * low), abs(1 + h * high)))
            # 1 itself is exact where an eigenvalue may be 0 and no other factor is larger.
            exact = 0.0 in (low, high) and ends[0] < 1 == ends[1]
            # Rounding is that of hλ, which may be large where 1 + hλ is small.
            slack = 2 * EPS * (1 + abs(h) * max(abs(low), abs(high)))
            constant = 1.0 if exact else math.nextafter(ends[1] + slack, math.inf)
            if min(h * low, h * high) >= -2 * (1 - 4 * EPS) and max(h * low, h * high) <= 0:
                constant = min(constant, 1.0)
            return constant, f"max|1+hλ|, λ in [{low:.4g}, {high:.4g}]"
        general = math.nextafter(1 + abs(h) * facts.lipschitz, math.inf)
        if h < 0 and facts.spectrum is None:
            return general, f"1+|h|L, L={facts.lipschitz:.4g}"
        one_sided = facts.one_sided if h >= 0 or facts.spectrum is None else -facts.spectrum[0]
        linear, square = 2 * abs(h) * one_sided, (h * facts.lipschitz) * (h * facts.lipschitz)
        slack = 8 * EPS * (1 + abs(linear) + square)
        inner = 1 + linear + square + slack
        # ∞ − ∞, of numbers that overflow, says nothing; max(0, nan) would be 0.
        inner = math.inf if math.isnan(inner) else math.nextafter(math.sqrt(max(0.0, inner)), math.inf)
        if square * (1 + 8 * EPS) <= -linear < math.inf:
            inner = min(inner, 1.0)
        return min(general, inner), f"min(1+|h|L, √(1+2|h|μ+h²L²)), L={facts.lipschitz:.4g}, μ={one_sided:.4g}"


def require_field(name: str, given: object) -> VectorField:
    """``given`` when it is a vector field that says the shape of its states.

    Raises:
        InvalidArgument: it is something else, or its ``in_shape`` is no tuple of positive sizes.

    Example:
        >>> from dynablocks.fields import IdentityField
        >>> require_field("field", IdentityField((3,))).in_shape
        (3,)
    """
    if not isinstance(given, VectorField):
        kind = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise InvalidArgument(
            f"{name} is {kind}; a VectorField is needed: one of dynablocks.fields, or your own with forward(x), "
            "facts() and in_shape."
        )
    shape: object = getattr(given, "in_shape", None)
    if not isinstance(shape, tuple) or not shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise InvalidArgument(
            f"in_shape of {type(given).__name__} is {shape!r}; set it to the shape of one sample, a tuple of positive "
            "sizes such as (3,) or (3, 32, 32)."
        )
    return given


def why_no_potential(field: nn.Module) -> str | None:
    """Why no V with ∇V = field is known, ``None`` where one is."""
    known = (
        isinstance(field, VectorField)
        and "potential" not in field._of_another
        and field.standing_facts().euclidean().conservative
    )
    if known and hasattr(field, "potential"):
        return None
    unknown = why_map_unknown(field)
    if unknown is not None:
        return unknown
    return (
        f"{type(field).__name__} has no known potential; use a GradientField or a LinearField, or give it a method "
        "potential(x) with X = ∇V, one number a sample, and facts that say conservative"
    )


def why_no_energy(field: VectorField) -> str | None:
    """Why the energy that a class inherits is not of its X; ``None`` where it is its own, or there is none."""
    own = field._of_another.get("energy")
    if own is None or type(field).energy is VectorField.energy:
        return None
    name = type(field).__name__
    return f"{name} has a {own} of its own, and the energy of another; give it an energy(x) of its own"


def energy_of(field: VectorField, x: Tensor) -> Tensor:
    """H(x) per sample, for the energy of what is made of the field.

    Raises:
        InvalidArgument: it has none, or inherits that of another X.

    Example:
        >>> import torch
        >>> from dynablocks.fields import SeparableHamiltonian
        >>> field, x = SeparableHamiltonian(entries=2), torch.ones(3, 2)
        >>> bool(torch.equal(energy_of(field, x), field.energy(x)))
        True
    """
    reason = why_no_energy(field)
    if reason is not None:
        raise InvalidArgument(f"{reason}.")
    return one_number_a_state(f"the energy of {type(field).__name__}", field.energy(x), x)


def why_map_unknown(field: nn.Module) -> str | None:
    """Why nothing is known of the field's ``linear``, and what to do; ``None`` where it has none, or it is known."""
    linear = getattr(field, "linear", None)
    unknown = why_unknown(linear) if isinstance(linear, LinearMap) else None
    return None if unknown is None else f"{unknown}; give it a compute_norm_bounds of its own"


def potential_of(field: nn.Module, x: Tensor) -> Tensor:
    """V(x) per sample, with ∇V = field.

    Raises:
        InvalidArgument: the field is not a gradient field with a known potential.

    Example:
        >>> import torch
        >>> from dynablocks.fields import IdentityField
        >>> potential_of(IdentityField((2,)), torch.tensor([[3.0, 4.0]]))
        tensor([12.5000])
    """
    reason = why_no_potential(field)
    if reason is not None:
        raise InvalidArgument(f"{reason}.")
    assert isinstance(field, VectorField)
    return known_potential(field, x)


def known_potential(field: VectorField, x: Tensor) -> Tensor:
    """:func:`potential_of` a field that has been found to have one, when its owner was made: no facts are asked for."""
    value: Tensor = field.potential(x)  # type: ignore[operator]
    return one_number_a_state(f"the potential of {type(field).__name__}", value, x)


def one_number_a_state(what: str, value: Tensor, x: Tensor) -> Tensor:
    """The value itself.

    Raises:
        InvalidArgument: it is not of shape (batch,); a column would be added to others as a matrix.

    Example:
        >>> one_number_a_state("H", torch.ones(2, 1), torch.ones(2, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        dynablocks.errors.InvalidArgument: H has shape (2, 1) for 2 states; one number a state, of shape (2,), ...
    """
    if tuple(value.shape) != (x.shape[0],):
        raise InvalidArgument(
            f"{what} has shape {tuple(value.shape)} for {x.shape[0]} states; one number a state, of shape "
            f"({x.shape[0]},), is needed."
        )
    return value


FIELDS: Registry[type[VectorField]] = Registry("vector field")
