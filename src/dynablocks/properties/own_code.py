"""Whose code runs: what a class says is said of its own methods, not of those of subclasses, instances and hooks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def replaced(
    kind: type, code: Iterable[str], said: Iterable[str], roots: tuple[type, ...] = (nn.Module,)
) -> str | None:
    """The method of ``code`` that a class replaces without a word about it: no method of ``said`` beside or below it.

    A template that speaks and leaves the method to its subclasses is no such class: nothing is replaced there.

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
        defined = [k for k, each in enumerate(order) if name in vars(each) and each not in roots]
        if len(defined) > 1 and defined[0] < spoken:
            return name
    return None


def shadowed(part: object, method: str) -> bool:
    """Whether an attribute of the instance hides the method of its class.

    Example:
        >>> layer = nn.ReLU()
        >>> layer.forward = lambda x: 2 * x
        >>> shadowed(layer, "forward"), shadowed(nn.ReLU(), "forward")
        (True, False)
    """
    own = vars(part).get(method)
    # Lightning's Fabric leaves the bound method of the class itself there.
    return own is not None and getattr(own, "__func__", own) is not getattr(type(part), method, None)


def overrides(part: object, kind: type, method: str) -> bool:
    """Whether an instance of ``kind`` computes a method by other code than that class."""
    return shadowed(part, method) or getattr(type(part), method, None) is not getattr(kind, method, None)


WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
"""What ``torch.compile`` and distributed training wrap around a module, and where they keep it."""


def foreign(module: nn.Module, *, everywhere: bool = False) -> str | None:
    """Why a module does not compute what its classes say: hooks, or methods set on an instance; ``None`` if it does.

    Looked at are the module and those of its parts that speak themselves, by ``declare`` or ``facts``; what is said of
    a block with a force of torch's layers is said whatever that force computes.

    Args:
        module: any module.
        everywhere: look at all parts.

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
    for path, part in module.named_modules():
        speaks = part is module or hasattr(type(part), "declare") or hasattr(type(part), "facts")
        if type(part).__name__ in WRAPPERS or not (everywhere or speaks):
            continue
        name = path or type(part).__name__
        if part._forward_hooks or part._forward_pre_hooks:
            return f"{name} has forward hooks, which may change what it computes"
        if shadowed(part, "forward"):
            return f"{name} has a forward of this instance, not of its class"
    return None
