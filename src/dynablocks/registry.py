"""A registry is a dict from names to classes or functions; an unknown name gets the list of known ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from dynablocks.errors import InvalidArgument, unknown_name

T = TypeVar("T")


class Registry(dict[str, T]):
    """Names to things of one kind.

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
        """A decorator that files the decorated thing under ``name``; a taken name is an :class:`InvalidArgument`."""

        def file_under(thing: T) -> T:
            known = self.get(name)
            # A cell of a notebook that is run again files the same thing.
            same = all(getattr(known, key, 0) == getattr(thing, key, 1) for key in ("__module__", "__qualname__"))
            if known is not None and not same:
                raise InvalidArgument(f"the {self.kind} name {name!r} is taken by {known!r}; choose another name.")
            self[name] = thing
            return thing

        return file_under

    def get_known(self, name: str) -> T:
        """The thing filed under ``name``; raises :class:`InvalidArgument` with the known names, the nearest first."""
        if name not in self:
            raise unknown_name(self.kind, name, self)
        return self[name]
