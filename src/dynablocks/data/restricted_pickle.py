"""Read the pickles of the original CIFAR batches without running anything that is in them."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from dynablocks.errors import BadData

_ITEM_TYPES = frozenset({"u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "b1"})


class _Refused(pickle.UnpicklingError):
    """What the pickle holds that no CIFAR batch holds."""


class _DataType:
    __slots__ = ("code",)

    def __init__(self, code: object) -> None:
        text = code.decode("ascii") if isinstance(code, bytes) else str(code)
        text = text.lstrip("<|=")
        if text not in _ITEM_TYPES:
            raise _Refused(f"an array of type {text!r}")
        self.code = text

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] in (">", b">"):
            raise _Refused("a big-endian array")


class _Array:
    __slots__ = ("values",)

    values: np.ndarray[Any, Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran_order, content = state
        self.values = _to_array(content, kind, shape, "F" if fortran_order else "C")


def _to_array(content: object, kind: object, shape: object, order: str) -> np.ndarray[Any, Any]:
    if not (isinstance(kind, _DataType) and isinstance(shape, tuple) and isinstance(content, (bytes, bytearray))):
        raise _Refused("an array that is not plain bytes")
    if any(type(extent) is not int or extent < 0 for extent in shape):
        raise _Refused(f"an array of shape {shape!r}")
    values = np.frombuffer(content, np.dtype(kind.code).newbyteorder("<"))
    if values.size != math.prod(shape):
        raise _Refused(f"an array of {values.size} items for shape {shape!r}")
    return values.reshape(shape, order="F" if order == "F" else "C")


class _StandIn:
    """Called in place of a NumPy function; without attributes, as all its kinds are, so a pickle cannot change it."""

    __slots__ = ()


class _Reconstruct(_StandIn):
    __slots__ = ()

    def __call__(self, *_: object) -> _Array:
        return _Array()


class _MakeDataType(_StandIn):
    __slots__ = ()

    def __call__(self, code: object, *_: object) -> _DataType:
        return _DataType(code)


class _FromBuffer(_StandIn):
    __slots__ = ()

    def __call__(self, content: object, kind: object, shape: object, order: object) -> _Array:
        array = _Array()
        array.values = _to_array(content, kind, shape, str(order))
        return array


class _EncodeLatin1(_StandIn):
    __slots__ = ()

    def __call__(self, text: object, encoding: object = "latin1") -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise _Refused("bytes that are not latin-1")
        return text.encode("latin1")


def _stand_in(module: str, name: str) -> object:
    module = module.replace("numpy._core", "numpy.core")
    if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
        return _Reconstruct()
    if (module, name) == ("numpy.core.numeric", "_frombuffer"):
        return _FromBuffer()
    if (module, name) == ("numpy", "dtype"):
        return _MakeDataType()
    if (module, name) == ("numpy", "ndarray"):
        return None
    if (module, name) == ("_codecs", "encode"):
        return _EncodeLatin1()
    raise _Refused(f"the name {module}.{name}")


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _stand_in(module, name)


def read_pickled_batch(path: Path) -> dict[str, Any]:
    """The dict in a pickled batch: plain values and NumPy arrays of whole numbers, keyed by str.

    No global is ever looked up: the names NumPy's arrays are pickled under get stand-ins that only read bytes, and any
    other name is refused before anything is called.

    Raises:
        BadData: the file is truncated, is no pickle of a dict, or holds anything else.
    """
    try:
        content = _RestrictedUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(content, dict):
            raise _Refused(f"a {type(content).__name__} rather than a dict")
        return {_text(key): value.values if isinstance(value, _Array) else value for key, value in content.items()}
    except OSError as error:
        raise BadData(f"{path} cannot be read ({error.strerror or error}); check it and its permissions.") from error
    except _Refused as error:
        raise BadData(
            f"{path} holds {error}, which no CIFAR batch does; nothing in it was run: fetch the originals again."
        ) from error
    except Exception as error:
        raise BadData(
            f"{path} is truncated or no pickled CIFAR batch ({type(error).__name__}); fetch the original batches again."
        ) from error


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
