"""Weights that are drawn from a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Within the context random numbers follow from ``seed``; after it the CPU's generator is where it was.

    No other generator is touched, unless tensors are made on another device than the CPU by default: then torch seeds
    that of every device, and they stay so.

    Args:
        seed: any whole number of 64 bits; ``None`` goes on from where the generator stands.

    Example:
        >>> state = torch.get_rng_state()
        >>> with seeded(1):
        ...     first = torch.randn(2)
        >>> with seeded(1):
        ...     again = torch.randn(2)
        >>> torch.equal(first, again), torch.equal(state, torch.get_rng_state())
        (True, True)
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            if torch.get_default_device().type in ("cpu", "meta"):
                torch.default_generator.manual_seed(int(seed))
            else:
                torch.manual_seed(seed)
        yield
