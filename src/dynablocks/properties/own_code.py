"""Whose code runs: what a class says is said of its own methods, not of those of subclasses, instances and hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from dynablocks.errors import InvalidArgument


def replaced(
    kind: type, code: Iterable[str], said: Iterable[str], roots: tuple[type, ...] = (nn.Module,)
) -> str | None:
    """The method of ``code`` that a class replaces without a word about it: no method of ``said`` beside or below it.

    A template that speaks and leaves the method to its subclasses (as an ``abstractmethod``, or not at all) is no such
    class: nothing is replaced there.

    Args:
        kind: the class.
        code: names of methods that compute.
        said: names of methods and attributes that tell what holds of them.
        roots: classes whose methods are placeholders, which every subclass is to replace.

    Example:
        >>> class Half:
        ...     def forward(self, x): return x / 2
        ...     def declare(self): return "halves"
        >>> class Louder(Half):
        ...     def forward(self, x): return 9 * super().forward(x)
        >>> class Honest(Louder):
        ...     def declare(self): return "multiplies by 4.5"
        >>> [replaced(kind, ["forward"], ["declare"]) for kind in (Half, Louder, Honest)]
        [None, 'forward', None]
    """
    order = kind.__mro__
    spoken = next((k for k, each in enumerate(order) if any(name in vars(each) for name in said)), len(order))
    for name in code:
        defined = [k for k, each in enumerate(order) if each not in roots and _has_code(vars(each).get(name))]
        if len(defined) > 1 and defined[0] < spoken:
            return name
    return None


def _has_code(method: object) -> bool:
    return method is not None and not getattr(method, "__isabstractmethod__", False)


def shadowed(part: object, method: str) -> bool:
    """Whether an attribute of the instance that can be called hides the method of its class.

    Example:
        >>> layer = nn.ReLU()
        >>> layer.forward = lambda x: 2 * x
        >>> shadowed(layer, "forward"), shadowed(nn.ReLU(), "forward")
        (True, False)
    """
    own = getattr(part, "__dict__", {}).get(method)
    if not callable(own):
        return False
    of_class = getattr(type(part), method, None)
    # Lightning's Fabric leaves the bound method of the class itself there.
    bound = getattr(own, "__func__", None) is of_class and getattr(own, "__self__", None) is part
    return callable(of_class) and not bound


def overrides(part: object, kind: type, method: str) -> bool:
    """Whether an instance of ``kind`` computes a method by other code than that class."""
    return shadowed(part, method) or getattr(type(part), method, None) is not getattr(kind, method, None)


def require_visible(owner: nn.Module, name: str, value: object) -> None:
    """Refuse a part of a module that has the name of something of its class.

    torch looks for modules, parameters and buffers last, so the method, property or value of the class would be found
    in place of the part, without a word; a property that is made of the part would ask for itself forever.

    Raises:
        InvalidArgument: ``value`` is a module, a parameter or a buffer, and the class of ``owner`` has that name.

    Example:
        >>> require_visible(nn.ReLU(), "slope", nn.Linear(2, 2))
        >>> require_visible(nn.ReLU(), "forward", nn.Linear(2, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        dynablocks.errors.InvalidArgument: ReLU sets self.forward to a Linear, which the method forward of ReLU ...
    """
    if not isinstance(value, (nn.Module, nn.Parameter, nn.Buffer)):
        return
    home = next((kind for kind in type(owner).__mro__ if name in vars(kind)), None)
    if home is None:
        return
    hiding = vars(home)[name]
    if isinstance(hiding, (property, cached_property)):
        what = "property"
    else:
        what = "method" if callable(hiding) or isinstance(hiding, (classmethod, staticmethod)) else "attribute"
    raise InvalidArgument(
        f"{type(owner).__name__} sets self.{name} to a {type(value).__name__}, which the {what} {name} of "
        f"{home.__name__} would hide; choose another name, such as self.{name}_part."
    )


def failed_property(owner: nn.Module, name: str, error: AttributeError) -> RuntimeError:
    """The error of a property that failed by an AttributeError.

    torch would take that for the absence of the property, and say so in place of what is missing.

    Example:
        >>> print(failed_property(nn.ReLU(), "slope", AttributeError("'ReLU' object has no attribute 'leek'")))
        ReLU.slope raised AttributeError: 'ReLU' object has no attribute 'leek'; set it, or correct its name.
    """
    return RuntimeError(f"{type(owner).__name__}.{name} raised AttributeError: {error}; set it, or correct its name.")


WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}
"""What ``torch.compile`` and distributed training wrap around a module, by full names, and where they keep it."""


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module inside of one of torch's :data:`WRAPPERS`; ``None`` of every other class, whatever its name is.

    Example:
        >>> wrapped(nn.ReLU()) is None
        True
    """
    kind = type(module)
    inside = WRAPPERS.get(f"{kind.__module__}.{kind.__qualname__}")
    found: nn.Module | None = None if inside is None else getattr(module, inside)
    return found


MOVING = ("forward", "profile", "preactivation", "per_channel", "rate", "rotate", "generator", "symmetric")
"""The methods that a vector field X is made of and that steps and flows call."""

COMPUTING = (
    *MOVING,
    *("energy", "gradient", "structure", "potential"),
    *("rates", "production_destruction", "hidden_layer", "outputs", "mixing"),
)
"""The methods that a vector field X is made of."""

WATCHED = (
    *COMPUTING,
    *("inverse", "ordinary", "flow", "step", "solve"),
    *("multiply", "multiply_adjoint", "affine", "adjoint"),
)
"""The methods that are looked for on instances: of modules, fields, integrators and linear maps."""

CALLING = ("__call__", "_call_impl")
"""The methods of ``nn.Module`` by which ``module(x)`` comes to be ``module.forward(x)``."""


def foreign(module: nn.Module, *, everywhere: bool = False) -> str | None:
    """Why a module does not compute what its classes say: hooks, a call of its own, or methods set on an instance.

    Looked at are the module and those of its parts that speak themselves, by ``declare`` or ``facts``, with what these
    hold that speaks and is no module, as a block holds its integrator; what is said of a block with a force of torch's
    layers is said whatever that force computes.

    Hooks on all modules at once count, also those of a tool that only watches, as a flop counter does: what a hook does
    is not known. So does a ``__call__`` of a class that speaks, since it speaks of ``forward``; what ``torch.compile``
    or distributed training wraps around a module has its own.

    Args:
        module: any module.
        everywhere: look at all parts.

    Returns:
        A sentence without its full stop; ``None`` where the classes are to be believed.

    Example:
        >>> chain = nn.Sequential(nn.ReLU())
        >>> handle = chain[0].register_forward_hook(lambda module, given, output: 2 * output)
        >>> foreign(chain) is None
        True
        >>> foreign(chain[0])
        'ReLU has forward hooks, which may change what it computes'
        >>> foreign(chain, everywhere=True)
        '0 has forward hooks, which may change what it computes'
    """
    if _global_forward_hooks or _global_forward_pre_hooks:
        return (
            "torch has forward hooks on all modules (register_module_forward_hook, or within a tool such as a flop "
            "counter), which may change what they compute"
        )
    for path, part in module.named_modules():
        spoken_of = part is module or _speaks(part) or _speaks(wrapped(part))
        if not (everywhere or spoken_of):
            continue
        name = path or type(part).__name__
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{name} has forward hooks, which may change what it computes"
        looked_at: list[tuple[str, object]] = [*_tools(name, part)]
        if wrapped(part) is None:
            call = next((method for method in CALLING if spoken_of and overrides(part, nn.Module, method)), None)
            if call is not None:
                return f"{name} has a {call} of its own, which may change what its forward computes"
            looked_at.insert(0, (name, part))
        for where, each in looked_at:
            own = next((method for method in WATCHED if shadowed(each, method)), None)
            if own is not None:
                return f"{where} has a {own} of this instance, not of its class"
    return None


def _speaks(part: object) -> bool:
    return hasattr(type(part), "declare") or hasattr(type(part), "facts")


def _tools(name: str, part: object) -> Iterator[tuple[str, object]]:
    """What a part holds that speaks and is no module, such as an integrator, and what that holds in turn."""
    waiting, seen = [(name, part)], {id(part)}
    while waiting:
        path, holder = waiting.pop()
        for key, value in getattr(holder, "__dict__", {}).items():
            if _speaks(value) and not isinstance(value, nn.Module) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{path}.{key}", value))
                yield f"{path}.{key}", value
