"""What every linear map of the library has: a weight, the map, its adjoint, and sound bounds on its singular values."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument
from dynablocks.numerics.bounds import Bounds
from dynablocks.properties import (
    Declaration,
    Equivariant,
    GradientNormPreserving,
    Lipschitz,
    NormPreserving,
    Property,
    Structured,
)
from dynablocks.properties.own_code import failed_property, replaced, require_visible

if TYPE_CHECKING:
    from jaxtyping import Float

T = TypeVar("T")

__all__ = ["Bounds", "LinearMap", "frozen_weights", "shared_weights"]


TINY = 1e-30
"""Divides in place of a norm that is zero."""

ROUNDINGS = 64
"""‖AAᵀ − I‖ <= 64 n ε, for rows of n entries and ε of their number format, is what rounding leaves of AAᵀ = I."""

LOOSEST = 1e-3
"""What A misses by more than this for want of AAᵀ = I is not said of it at all."""


def own_precision(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """No autocast, where the device has one (the meta device does not)."""
    return torch.autocast(like.device.type, enabled=False) if is_mixed(like) else contextlib.nullcontext()


def is_mixed(like: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    kind = like.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


PRODUCTS, IMAGES = ("multiply", "multiply_adjoint"), ("affine", "adjoint")
"""The methods of a linear map that multiply, and those that the library makes of them."""

WEIGHTS = ("compute_weight", "compute_weights")
"""The methods that make its weight."""

ORTHONORMAL = ("rows_orthonormal", "columns_orthonormal")
"""What a class may say of its weight."""


class LinearMap(Structured):
    """x ↦ Ax between spaces of declared shapes, with the adjoint y ↦ Aᵀy.

    Subclasses implement :meth:`compute_weight`, :meth:`multiply`, :meth:`multiply_adjoint`,
    :meth:`compute_norm_bounds` and :meth:`compute_smallest_singular_value`. The weight may be a parameter or a function
    of parameters (an orthogonal parametrisation), which have other names: ``weight`` is what is computed of them, once
    inside :func:`shared_weights`.

    Attributes:
        in_shape, out_shape: shapes of one sample, without the batch.
        rows_orthonormal: A Aᵀ = I by construction (exact flows need it).
        columns_orthonormal: AᵀA = I by construction.

    A construction can lose all its digits where its parameters are large, so what orthonormal rows or columns guarantee
    is declared as far as the :meth:`orthonormality_defect` of the present weight allows (:meth:`isometry_tolerance`).

    :meth:`compute_norm_bounds` speaks of the products beside it; :meth:`declare` alone does of a ``forward``.
    A subclass with a :meth:`compute_weight` of its own says that its rows or columns are orthonormal as an attribute of
    the class, or measures what it inherits of that by a :meth:`compute_orthonormality_defect` of its own.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    rows_orthonormal: bool = False
    columns_orthonormal: bool = False
    _images_of_another: bool = False
    _held: Tensor | None = None
    _held_facts: dict[str, object] | None = None
    _held_copy: Tensor | None = None

    def __init_subclass__(cls, **given: Any) -> None:
        """Of products of a subclass holds only what it says of them, whatever it inherits.

        Bounds read the weight as it is, also one of a subclass; whether its rows are orthonormal they do not say.
        """
        super().__init_subclass__(**given)
        own = replaced(cls, PRODUCTS, ("compute_orthonormality_defect",), (LinearMap,))
        own = own or replaced(cls, IMAGES, ("multiply", "compute_orthonormality_defect"))
        neutral = [*ORTHONORMAL] if own else []
        if not own and replaced(cls, WEIGHTS, ("compute_orthonormality_defect",), (LinearMap,)):
            # Down to the class that makes the weight; what an __init__ sets may be of another.
            makes = next(k for k, kind in enumerate(cls.__mro__) if any(name in vars(kind) for name in WEIGHTS))
            speaking = cls.__mro__[: makes + 1]
            neutral += [name for name in ORTHONORMAL if not any(vars(kind).get(name) is True for kind in speaking)]
        for claim in ("compute_norm_bounds", "compute_smallest_singular_value"):
            if replaced(cls, PRODUCTS, (claim,), (LinearMap,)) or replaced(cls, IMAGES, (claim,)):
                neutral.append(claim)
        said = ("declare", "compute_norm_bounds")
        if replaced(cls, PRODUCTS, said, (LinearMap,)) or replaced(cls, IMAGES, said):
            neutral.append("declare")
        for claim in neutral:
            setattr(cls, claim, vars(_Unknown)[claim])
        cls._images_of_another = replaced(cls, IMAGES, ("multiply",)) is not None

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        """Set an attribute; a part of the map may not have the name of something that its class has.

        Raises:
            InvalidArgument: it has, as ``self.weight = nn.Parameter(matrix)`` would.
        """
        require_visible(self, name, value)
        super().__setattr__(name, value)

    @property
    def is_known(self) -> bool:
        """Whether the class speaks of the products that it has, by :meth:`compute_norm_bounds`.

        Of one that does not, not even that :meth:`adjoint` is the adjoint of :meth:`affine` is taken for granted.
        """
        return type(self).compute_norm_bounds is not vars(_Unknown)["compute_norm_bounds"]

    @property
    def has_its_matrix(self) -> bool:
        """Whether :meth:`dense_matrix`, which is that of :meth:`multiply`, is known to be that of all products."""
        return self.is_known and not self._images_of_another

    def compute_weight(self) -> Tensor:
        """The weight as a differentiable function of the parameters."""
        raise NotImplementedError(f"{type(self).__name__} must implement compute_weight(): the weight that it uses.")

    def weight_group(self) -> Hashable | None:
        """What maps must share to compute their weights in one batch; ``None``: each computes its own."""
        return None

    def compute_weights(self, alike: Sequence[LinearMap]) -> Sequence[Tensor]:
        """The weights of maps of this map's group in one batch; for maps that have a :meth:`weight_group`."""
        raise NotImplementedError

    def multiply(self, weight: Tensor, x: Tensor) -> Tensor:
        """A x for the given weight."""
        raise NotImplementedError(f"{type(self).__name__} must implement multiply(weight, x): A x for a batch.")

    def multiply_adjoint(self, weight: Tensor, y: Tensor) -> Tensor:
        """Aᵀ y for the given weight, linear in it; the weight's first dimension is that of the output channels of A.

        So c · weight, one number c a channel, is the weight of diag(c)A: Euler steps of gradient fields multiply the
        weight by the step size and by factors on σ, in place of activations.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must implement multiply_adjoint(weight, y): Aᵀy for a batch, linear in the weight."
        )

    def compute_norm_bounds(self) -> Bounds:
        """Sound lower and upper bounds of ‖A‖₂ in float64 for the weight as it is stored and used."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement compute_norm_bounds(): Bounds(0.0, math.inf, exact=False, "
            'method="unknown") where nothing is known of ‖A‖.'
        )

    def compute_smallest_singular_value(self) -> float:
        """A sound lower bound of the square root of λ_min(AᵀA); 0 when nothing better is known."""
        return 0.0

    def norm_bounds(self) -> Bounds:
        """:meth:`compute_norm_bounds`, once for each weight held by :func:`shared_weights`."""
        return self.once("norm bounds", self.compute_norm_bounds)

    def smallest_singular_value(self) -> float:
        """:meth:`compute_smallest_singular_value`, once for each weight held by :func:`shared_weights`."""
        return self.once("smallest singular value", self.compute_smallest_singular_value)

    def compute_orthonormality_defect(self) -> float:
        """δ >= ‖AAᵀ − I‖, or ‖AᵀA − I‖, of the weight as it is stored and used, where that is 0 by construction.

        0 where the construction is not measured.
        """
        return 0.0

    def orthonormality_defect(self) -> float:
        """:meth:`compute_orthonormality_defect`, once for each weight held by :func:`shared_weights`."""
        return self.once("orthonormality defect", self.compute_orthonormality_defect)

    def isometry_tolerance(self, growth: float = 1.0) -> float | None:
        """To what holds, beyond rounding, what is exact for δ = 0 and missed by at most ``growth`` · δ otherwise.

        Singular values lie within δ of 1, which is ``growth`` = 1. The tolerance is 0 where δ is rounding of the weight
        (:data:`ROUNDINGS`), and ``None`` where it exceeds :data:`LOOSEST`.
        """
        weight, defect = self.weight, self.orthonormality_defect()
        entries = max(weight.shape[0], weight[0].numel())
        if defect <= min(ROUNDINGS * entries * torch.finfo(weight.dtype).eps, LOOSEST):
            return 0.0
        tolerance = growth * defect
        return tolerance if tolerance <= LOOSEST else None

    def why_no_isometry(self) -> str:
        """The sentence for an :meth:`isometry_tolerance` of ``None``."""
        return (
            f"rounding leaves ‖AAᵀ − I‖ = {self.orthonormality_defect():.1e} of the orthonormal {type(self).__name__}; "
            "its parameters are too large for their number format"
        )

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """``compute()``, a fact of the weight, once for each weight held by :func:`shared_weights`."""
        held = self._held
        if held is None:
            return compute()
        # A held weight can be changed in place, by an optimiser, a projection or through its data.
        now, before = held.detach(), self._held_copy
        same = before is not None and (before.dtype, before.device) == (now.dtype, now.device)
        if self._held_facts is None or before is None or not same or not torch.equal(before, now):
            self._held_facts, self._held_copy = {}, now.clone()
        if name not in self._held_facts:
            self._held_facts[name] = compute()
        return cast(T, self._held_facts[name])

    @property
    def weight(self) -> Tensor:
        """The weight; the one computed first inside :func:`shared_weights` or :func:`frozen_weights`."""
        if self._held is not None:
            return self._held
        try:
            return self.compute_weight()
        except AttributeError as error:
            raise failed_property(self, "weight", error) from error

    def hold(self, weight: Tensor | None) -> None:
        """Use this weight until told otherwise; ``None`` returns to computing it.

        For contexts that give back what was held before them: :func:`shared_weights`, :func:`frozen_weights`, the
        backward pass of a reversible chain.
        """
        # Not by __setattr__, which would register a weight that is a parameter.
        object.__setattr__(self, "_held", weight)
        object.__setattr__(self, "_held_facts", None)
        object.__setattr__(self, "_held_copy", None)

    def __getstate__(self) -> dict[str, Any]:
        """Without the held weight: a copy made inside :func:`frozen_weights` computes its own.

        Nor does it run what ``compile()`` made in place, which is bound to this module, as no copy of torch does.
        """
        left_out = ("_held", "_compiled_call_impl")
        return {name: value for name, value in self.__dict__.items() if not name.startswith(left_out)}

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """A x for a batch, as fields multiply it: by an :meth:`affine` of its own where the class has one.

        So one of its own calls ``super().affine``, and never the map itself.
        """
        return self.affine(x, None) if self._images_of_another else self.multiply(self.weight, x)

    def affine(self, x: Float[Tensor, "batch ..."], bias: Tensor | None) -> Float[Tensor, "batch ..."]:
        """A x + b with one entry of b per output channel."""
        image = self.multiply(self.weight, x)
        return image if bias is None else image + bias.reshape(-1, *(1,) * (len(self.out_shape) - 1))

    def adjoint(self, y: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Aᵀ y for a batch."""
        return self.multiply_adjoint(self.weight, y)

    @torch.no_grad()
    def power_step(self, weight: Tensor, vector: Tensor) -> Tensor:
        """AᵀAv/‖AᵀAv‖, a step of power iteration; v itself where that is 0 or no number, which says nothing."""
        # Normalised in between: A Aᵀ v of large weights would overflow.
        image = self.multiply(weight, vector)
        image = self.multiply_adjoint(weight, image / image.norm().clamp_min(TINY))
        length = image.norm()
        return torch.where((length > TINY) & length.isfinite(), image / length.clamp_min(TINY), vector)

    def dense_matrix(self) -> Float[Tensor, "outputs inputs"]:
        """The matrix of the map in float64, by applying it to the unit vectors: the oracle for every bound."""
        weight = self.weight.detach().cpu().double()
        size = int(torch.Size(self.in_shape).numel())
        units = torch.eye(size, dtype=torch.float64, device="cpu").reshape(size, *self.in_shape)
        return self.multiply(weight, units).reshape(size, -1).mT

    def declare(self) -> Declaration:
        # One weight for all that is said: a map in training may make another at each use with gradients.
        with torch.no_grad(), shared_weights(self):
            return self._declared()

    def _declared(self) -> Declaration:
        bounds = self.norm_bounds()
        kept: list[Property] = [Lipschitz(bounds.upper), Equivariant()]
        built = (self.rows_orthonormal, GradientNormPreserving()), (self.columns_orthonormal, NormPreserving())
        isometries: list[Property] = [owned for holds, owned in built if holds]
        tolerance = self.isometry_tolerance() if isometries else 0.0
        losses: list[str] = []
        if tolerance is None:
            losses += [f"{type(owned).__name__} is lost: {self.why_no_isometry()}" for owned in isometries]
        else:
            kept += [owned.within(tolerance) for owned in isometries]
        reason = f"‖A‖ <= {bounds.upper:.9g} ({bounds.method})"
        return Declaration.of(*kept, reason=reason, title=type(self).__name__, losses=losses)

    def extra_repr(self) -> str:
        return f"{self.in_shape} -> {self.out_shape}"

    @cached_property
    def features(self) -> int:
        """The number of entries of one output."""
        try:
            return int(torch.Size(self.out_shape).numel())
        except AttributeError as error:
            raise failed_property(self, "features", error) from error


class _Unknown:
    """What is known of a map whose products are not those that its class speaks of."""

    rows_orthonormal = property(lambda self: False, lambda self, value: None)
    columns_orthonormal = property(lambda self: False, lambda self, value: None)

    def compute_norm_bounds(self) -> Bounds:
        return Bounds(0.0, math.inf, exact=False, method="unknown products")

    def compute_smallest_singular_value(self) -> float:
        return 0.0

    def declare(self) -> Declaration:
        name = type(self).__name__
        if isinstance(self, LinearMap) and self.is_known:  # a subclass has spoken since
            if type(self).forward is LinearMap.forward:
                return LinearMap.declare(self)
            reason = f"{name} has a method forward of its own, of which its bounds do not speak; give it a declare()"
            return Declaration.of(reason=reason, title=name)
        return Declaration.of(reason=f"{name} {OWN_PRODUCTS}", title=name)


OWN_PRODUCTS = "has products of its own, of which the bounds that it inherits do not speak"


def why_unknown(*maps: LinearMap) -> str | None:
    """Why nothing is known of a field that multiplies by these maps, ``None`` where all of them speak of themselves.

    Example:
        >>> from dynablocks.linear import Dense
        >>> class Louder(Dense):
        ...     def multiply(self, weight, x):
        ...         return 9 * super().multiply(weight, x)
        >>> why_unknown(Dense(2, 2), Louder(2, 2))
        'Louder has products of its own, of which the bounds that it inherits do not speak'
    """
    unknown = next((linear for linear in maps if not linear.is_known), None)
    return None if unknown is None else f"{type(unknown).__name__} {OWN_PRODUCTS}"


def require_shape(module: object, shape: tuple[int, ...], x: Tensor) -> None:
    """What is declared holds for samples of one shape: another one is an :class:`InvalidArgument`."""
    if tuple(x.shape[-len(shape) :]) != shape:
        raise wrong_shape(module, shape, x)


def require_batch(module: object, shape: tuple[int, ...], x: Tensor) -> None:
    """As :func:`require_shape`, of one axis for the batch and no more."""
    if tuple(x.shape[1:]) != shape:
        raise wrong_shape(module, shape, x)


def require_dtype(module: nn.Module, x: Tensor) -> None:
    """Matrices and kernels multiply inputs of their own number format alone: another one is an InvalidArgument.

    Under autocast the formats meet; a module without matrices takes any.
    """
    if torch.compiler.is_compiling() or is_mixed(x):
        return
    kind = next((parameter.dtype for parameter in module.parameters() if parameter.ndim > 1), x.dtype)
    if kind != x.dtype:
        raise InvalidArgument(
            f"the input is {x.dtype}, the weights of {type(module).__name__} are {kind}; give x.to({kind}), or convert "
            "the module, with .double() or .float()."
        )


def wrong_shape(module: object, shape: tuple[int, ...], x: Tensor) -> InvalidArgument:
    """The sentence for an input of another shape than (batch, *shape)."""
    wanted = ", ".join(map(str, shape))
    return InvalidArgument(
        f"the input has shape {tuple(x.shape)}; {type(module).__name__} was built for (batch, {wanted}), and "
        "what it declares holds for that shape alone."
    )


@contextlib.contextmanager
def shared_weights(*modules: nn.Module) -> Iterator[None]:
    """Within the context every linear map of ``modules`` computes its weight once, with gradients.

    Maps of one :meth:`LinearMap.weight_group` compute theirs together.
    """
    held = [m for module in modules for m in module.modules() if isinstance(m, LinearMap) and m._held is None]
    groups: dict[Hashable, list[LinearMap]] = {}
    try:
        for linear in held:
            group = linear.weight_group()
            if group is None:
                linear.hold(linear.compute_weight())
            else:
                groups.setdefault(group, []).append(linear)
        for alike in groups.values():
            for linear, weight in zip(alike, alike[0].compute_weights(alike), strict=True):
                linear.hold(weight)
        yield
    finally:
        for linear in held:
            linear.hold(None)


@contextlib.contextmanager
def frozen_weights(module: nn.Module, *, anew: bool = False) -> Iterator[None]:
    """Within the context every linear map of ``module`` uses one constant weight: evaluation and attacks run in it.

    It is the weight held around the context, where there is one; with ``anew`` that of the present parameters always.
    Nothing is cached beyond the context, so no later change of a parameter can meet a stale weight.

    Example:
        >>> from dynablocks.linear import OrthogonalDense
        >>> linear = OrthogonalDense(3, 3)
        >>> with frozen_weights(linear):
        ...     linear.weight is linear.weight, linear.weight.requires_grad
        (True, False)
    """
    before = {m: m._held for m in module.modules() if isinstance(m, LinearMap)}
    try:
        with torch.no_grad():
            for linear in before:
                if anew:
                    linear.hold(None)
                # Cloned, so that a step of an optimiser inside the context cannot move a weight whose bounds are held.
                linear.hold(linear.weight.detach().clone())
        yield
    finally:
        for linear, weight in before.items():
            linear.hold(weight)
