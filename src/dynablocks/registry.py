"""A registry is a dict from names to classes or functions; an unknown name gets the list of known ones."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TypeVar

from dynablocks.errors import InvalidArgument, unknown_name

T = TypeVar("T")


class Registry(dict[str, T]):
    """Names to things of one kind.

    ``registry[name] = thing`` replaces what has the name; :meth:`register` asks first.

    Example:
        >>> shapes: Registry[type] = Registry("shape")
        >>> @shapes.register("square")
        ... class Square: ...
        >>> shapes.get_known("square").__name__
        'Square'
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that files the decorated thing under ``name``; a taken name is an :class:`InvalidArgument`.

        A class or function of the same module and name replaces the one before, as where a cell of a notebook is run
        again; a lambda does so where it is the same expression.
        """

        def file_under(thing: T) -> T:
            known = self.get(name)
            if known is not None and not _is_filed_again(known, thing):
                raise InvalidArgument(f"the {self.kind} name {name!r} is taken by {known!r}; choose another name.")
            self[name] = thing
            return thing

        return file_under

    def get_known(self, name: str) -> T:
        """The thing filed under ``name``; raises :class:`InvalidArgument` with the known names, the nearest first."""
        if not isinstance(name, str) or name not in self:
            raise unknown_name(self.kind, name, self)
        return self[name]


def _is_filed_again(known: object, thing: object) -> bool:
    """Whether ``thing`` is ``known``, made once more by the same lines."""
    if any(getattr(known, key, 0) != getattr(thing, key, 1) for key in ("__module__", "__qualname__")):
        return False
    if not str(getattr(thing, "__qualname__", "")).endswith("<lambda>"):
        return True
    # All lambdas of one place have one name; what one holds from there cannot be compared.
    if not (isinstance(known, FunctionType) and isinstance(thing, FunctionType)):
        return False
    held = [part for one in (known, thing) for part in (one.__closure__, one.__defaults__, one.__kwdefaults__)]
    return all(part is None for part in held) and _expression(known) == _expression(thing)


def _expression(function: FunctionType) -> tuple[object, ...]:
    code = function.__code__
    # The repr tells 1 from True; that of a nested function holds its address, so that two such are never the same.
    return code.co_code, repr(code.co_consts), code.co_names, code.co_varnames, code.co_argcount, code.co_flags
