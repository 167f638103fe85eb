"""Modules that declare what they are, and the rules by which declarations compose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from dynablocks.numerics.bounds import linear_norm_bounds
from dynablocks.properties.declarations import (
    Dissipative,
    EnergyPreserving,
    Equivariant,
    GradientNormPreserving,
    Invertible,
    LinearInvariant,
    Lipschitz,
    NormPreserving,
    OfFunction,
    Positive,
    Properties,
    Property,
    Symplectic,
    VolumePreserving,
)
from dynablocks.properties.own_code import failed_property, foreign, replaced, wrapped


@dataclass(frozen=True)
class Declaration:
    """What a module guarantees, why, what its parts guarantee, and what was lost on the way."""

    properties: Properties
    reason: str
    parts: tuple[tuple[str, Declaration], ...] = ()
    losses: tuple[str, ...] = ()
    title: str = ""
    identity: bool = False
    """f(x) = x: a composition loses nothing by it but a method that all its parts must have."""

    @classmethod
    def of(cls, *properties: Property, reason: str, title: str = "", losses: Iterable[str] = ()) -> Declaration:
        return cls(Properties(properties), reason, (), tuple(losses), title)


class Structured(nn.Module):
    """A module that declares its properties from its present parameters.

    Subclasses implement :meth:`declare`; every bound in it is an upper bound in float64. It speaks of the ``forward``
    beside it: a subclass with another ``forward`` (or ``inverse``, ``energy`` or ``potential``) declares nothing until
    it has a ``declare`` of its own, and so does a module with forward hooks.
    """

    _spoken_of: ClassVar[tuple[str, ...]] = ("forward", "inverse", "energy", "potential")
    """The methods that :meth:`declare` speaks of."""
    _unspoken: ClassVar[str] = ""
    """The one of these that a class replaces without a word about it."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        own = replaced(cls, cls._spoken_of, ("declare",))
        if own is not None:
            cls._unspoken = own
            cls.declare = _says_nothing  # type: ignore[method-assign]

    def declare(self) -> Declaration:
        """The guarantees that hold for the parameters as they are now, with the reason for each."""
        raise NotImplementedError(f"{type(self).__name__} must implement declare()")

    @property
    def properties(self) -> Properties:
        """The guarantees that hold for the parameters as they are now."""
        try:
            return declare(self).properties
        except AttributeError as error:
            raise failed_property(self, "properties", error) from error


def _says_nothing(self: Structured) -> Declaration:
    name = type(self).__name__
    reason = f"{name} has a method {self._unspoken} of its own, of which the declare() that it inherits does not speak"
    return Declaration.of(reason=reason, title=name)


RULES: dict[type[nn.Module], Callable[[nn.Module], Declaration]] = {}
"""Declarations of modules that are not ours, by exact type."""


def rule(kind: type[nn.Module]) -> Callable[[Callable[..., Declaration]], Callable[..., Declaration]]:
    """A decorator that files a declaration rule for a module class that is not ours."""

    def file_under(function: Callable[..., Declaration]) -> Callable[..., Declaration]:
        RULES[kind] = function
        return function

    return file_under


def original(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` or distributed training wrapped around it, or the module itself."""
    inside = wrapped(module)
    return module if inside is None else original(inside)


def declare(module: nn.Module) -> Declaration:
    """The declaration of any module; one that is unknown declares nothing, and says so.

    A compiled module is what it was before. One with forward hooks, or whose ``forward`` was set on the instance,
    declares nothing: what its class says is not of that.

    Example:
        >>> declare(nn.Sequential(nn.Flatten(), nn.ReLU())).properties
        (Lipschitz(1), Positive)
    """
    reason, module = foreign(module), original(module)
    if reason is not None:
        return Declaration.of(reason=reason, title=type(module).__name__)
    if isinstance(module, Structured):
        return module.declare()
    known = RULES.get(type(module))
    if known is not None:
        return known(module)
    name = type(module).__name__
    return Declaration.of(reason=f"{name} declares nothing", title=name)


def compose(parts: Iterable[tuple[str, nn.Module]], title: str = "composition") -> Declaration:
    """The declaration of a composition: first part first. Each property is the fold of the parts' by its own rule."""
    declared = tuple((name, declare(module)) for name, module in parts)
    if not declared:
        nothing = Declaration.of(*IDENTITY, reason="the empty composition is the identity", title=title)
        return replace(nothing, identity=True)
    kept, losses = fold(declared)
    identity = all(declaration.identity for _, declaration in declared)
    return Declaration(Properties(kept), "composition of its parts", declared, losses, title, identity)


def fold(declared: tuple[tuple[str, Declaration], ...]) -> tuple[list[Property], tuple[str, ...]]:
    """The properties that survive a composition of declarations, and one sentence for each that does not."""
    kept: list[Property] = []
    losses: list[str] = []
    firsts: list[Property] = []
    moving = tuple((name, declaration) for name, declaration in declared if not declaration.identity) or declared
    for _, declaration in moving:
        for stated in declaration.properties:
            # Compared and not hashed: the function that a guarantee is about may have no hash.
            if not any(stated.slot == known.slot for known in firsts):
                firsts.append(stated)
    for stated in firsts:
        # The identity has no method inverse.
        total, lost_at = _fold(stated.slot, declared if stated.slot == Invertible().slot else moving)
        if total is not None:
            kept.append(total)
        else:
            losses.append(f"{type(stated).__name__} is lost at {lost_at}")
    return kept, tuple(losses)


def _fold(slot: tuple[object, ...], declared: tuple[tuple[str, Declaration], ...]) -> tuple[Property | None, str]:
    total: Property | None = None
    for name, declaration in declared:
        here = next((p for p in declaration.properties if p.slot == slot), None)
        if here is None:
            return None, f"{name} ({_why_not(slot, declaration)})"
        total = here if total is None else total.then(here)
        if total is None:
            return None, f"{name} ({here} does not compose with what comes before)"
    return total, ""


def _why_not(slot: tuple[object, ...], declaration: Declaration) -> str:
    """The sentence in which a part says itself that it loses the property, otherwise what the part is."""
    names = {getattr(slot[0], "__name__", ""), *(("Symplectic",) if slot == Symplectic().slot else ())}
    told = next((loss for loss in declaration.losses if loss.split()[0] in names), declaration.reason)
    others = any(isinstance(p, OfFunction) and type(p) is slot[0] for p in declaration.properties)
    return f"there it is about another function; {told}" if others else told


IDENTITY: tuple[Property, ...] = (
    Lipschitz(1.0),
    GradientNormPreserving(),
    NormPreserving(),
    VolumePreserving(),
    LinearInvariant(),
    Equivariant(),
    Positive(),
)
"""What the identity is on any space; an even number of entries is asked of a symplectic map."""


@rule(nn.Identity)
def _identity(module: nn.Module) -> Declaration:
    return replace(Declaration.of(*IDENTITY, reason="the identity", title="Identity"), identity=True)


@rule(nn.Flatten)
def _flatten(module: nn.Flatten) -> Declaration:
    if module.start_dim < 1:
        # Counted from the end, the first dimension depends on the input.
        return Declaration.of(reason="it may flatten the batch too", title="Flatten")
    return Declaration.of(*IDENTITY, reason="reshaping", title="Flatten")


METHODS = {Invertible: "inverse", EnergyPreserving: "energy", Dissipative: "potential"}
"""What these properties of a module are about, unless they name a function of their own."""


def without_missing_methods(module: nn.Module, declared: Declaration) -> Declaration:
    """A composition's declaration without what is about a method of its parts that is not the composition's.

    Its inverse is made of those of its parts; an energy or a potential that it has is a function of its own.
    """
    lost = [(p, why) for p in declared.properties if (why := _why_of_parts_alone(module, p)) is not None]
    losses = [f"{type(p).__name__} is lost at {type(module).__name__} ({why})" for p, why in lost]
    kept = Properties(p for p in declared.properties if _why_of_parts_alone(module, p) is None)
    return replace(declared, properties=kept, losses=(*declared.losses, *losses)) if lost else declared


def _why_of_parts_alone(module: nn.Module, stated: Property) -> str | None:
    """Why a guarantee of the parts is none of the composition's own method; ``None`` where it stays."""
    method = METHODS.get(type(stated))
    if method is None or getattr(stated, "function", None) is not None:
        return None
    if not hasattr(module, method):
        return f"it has no method {method}"
    return None if method == METHODS[Invertible] else f"its {method} is not that of its parts"


@rule(nn.Sequential)
def _sequential(module: nn.Sequential) -> Declaration:
    # named_children() would name a module that stands twice only once.
    parts = [(name, part) for name, part in module._modules.items() if part is not None]
    declared = compose(parts, title="Sequential")
    return without_missing_methods(module, declared)


@rule(nn.Linear)
def _linear(module: nn.Linear) -> Declaration:
    bounds = linear_norm_bounds(module.weight.detach())
    kept: list[Property] = [Lipschitz(bounds.upper)]
    if module.bias is None:
        kept.append(Equivariant())
    return Declaration.of(*kept, reason=f"‖W‖ <= {bounds.upper:.9g} ({bounds.method})", title="Linear")


@rule(nn.ReLU)
def _relu(module: nn.Module) -> Declaration:
    return Declaration.of(Lipschitz(1.0), Positive(), reason="slopes in [0, 1]", title="ReLU")


@rule(nn.LeakyReLU)
def _leaky_relu(module: nn.LeakyReLU) -> Declaration:
    reason = f"slopes in {{1, {module.negative_slope:g}}}"
    if not math.isfinite(module.negative_slope):
        return Declaration.of(Lipschitz(math.inf), reason=reason, title="LeakyReLU")
    constant = max(1.0, abs(module.negative_slope))
    return Declaration.of(Lipschitz(constant), Positive(), reason=reason, title="LeakyReLU")


@rule(nn.Tanh)
def _tanh(module: nn.Module) -> Declaration:
    return Declaration.of(Lipschitz(1.0), Equivariant(), Positive(), reason="slopes in (0, 1]", title="Tanh")


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """The numbers for both axes of an image, as torch's layers hold one for both or two.

    Example:
        >>> pair(2), pair((2, 3))
        ((2, 2), (2, 3))
    """
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


@rule(nn.MaxPool2d)
def _max_pool(module: nn.MaxPool2d) -> Declaration:
    kernel, stride = pair(module.kernel_size), pair(module.stride)
    gapless = pair(module.dilation) == (1, 1)
    # A window with gaps may meet nothing but padding, where it is −∞.
    positive = [Positive()] if gapless or pair(module.padding) == (0, 0) else []
    if gapless and all(s >= k for s, k in zip(stride, kernel, strict=True)):
        return Declaration.of(Lipschitz(1.0), *positive, reason="windows do not overlap: L = 1", title="MaxPool2d")
    overlap = math.prod(math.ceil(k / s) if gapless else k for k, s in zip(kernel, stride, strict=True))
    constant, reason = math.nextafter(math.sqrt(overlap), math.inf), f"a pixel lies in at most {overlap} windows"
    return Declaration.of(Lipschitz(constant), *positive, reason=f"{reason}: L <= sqrt({overlap})", title="MaxPool2d")


@rule(nn.AvgPool2d)
def _average_pool(module: nn.AvgPool2d) -> Declaration:
    kernel, stride = pair(module.kernel_size), pair(module.stride)
    # Linear whatever is padded, with weights of the sign of the divisor.
    kept: list[Property] = [Equivariant()]
    if module.divisor_override is None or module.divisor_override > 0:
        kept.append(Positive())
    plain = pair(module.padding) == (0, 0) and not module.divisor_override and not module.ceil_mode
    if not plain or not all(s >= k for s, k in zip(stride, kernel, strict=True)):
        return Declaration.of(*kept, reason="overlapping, padded or re-weighted average pooling", title="AvgPool2d")
    root = math.nextafter(math.sqrt(kernel[0] * kernel[1]), 0.0)  # the root and its inverse are rounded
    constant = math.nextafter(1 / root, math.inf)
    reason = "disjoint windows of k1 x k2 pixels: L = 1/sqrt(k1 k2)"
    return Declaration.of(Lipschitz(constant), *kept, reason=reason, title="AvgPool2d")


@dataclass(frozen=True)
class Explanation:
    """The derivation of a module's properties, line by line; ``str`` of it is what a person reads."""

    lines: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__


def explain(module: nn.Module, depth: int | None = None) -> Explanation:
    """How the properties of a module follow from its parts, and which part lost what.

    Args:
        module: any module; ours declare, torch's simple ones have rules, others declare nothing.
        depth: how many levels of parts to print; all when ``None``.

    Example:
        >>> print(explain(nn.Sequential(nn.Tanh(), nn.ReLU())))
        Sequential: (Lipschitz(1), Positive)  [composition of its parts]
          - Equivariant is lost at 1 (slopes in [0, 1])
          0 Tanh: (Lipschitz(1), Equivariant, Positive)  [slopes in (0, 1]]
          1 ReLU: (Lipschitz(1), Positive)  [slopes in [0, 1]]
    """
    lines: list[str] = []
    _print_declaration(declare(module), "", 0, depth, lines)
    return Explanation(tuple(lines))


def _print_declaration(declaration: Declaration, name: str, level: int, depth: int | None, lines: list[str]) -> None:
    indent = "  " * level
    title = f"{name} {declaration.title}".strip()
    lines.append(f"{indent}{title}: {declaration.properties!r}  [{declaration.reason}]")
    lines.extend(f"{indent}  - {loss}" for loss in declaration.losses)
    if depth is None or level < depth:
        for part, child in declaration.parts:
            _print_declaration(child, part, level + 1, depth, lines)
