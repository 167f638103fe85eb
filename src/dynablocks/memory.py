"""Keep freed memory in the process, so that a training step does not fault its activations in anew."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_MAX = -4


@cache
def keep_freed_memory() -> bool:
    """Tell glibc to serve every allocation from its heap and never to give the heap back; returns whether it did.

    By default glibc maps each large tensor afresh and unmaps it when freed: every step then pays a page fault for
    every 4 KiB
    of activations, which made training on a virtual machine 5 to 9 times slower (``benchmarks/allocator.py``). The
    price is that the process keeps its peak memory until it ends. Elsewhere than on Linux with glibc nothing happens.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, value) for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 1 << 28)))
