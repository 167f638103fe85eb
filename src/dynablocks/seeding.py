"""Random numbers as a function of names, not of call order: seeds of several integers, weights drawn from a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dynablocks.errors import require_whole

_WORD = (1 << 64) - 1


def _finalise(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def mixed_seed(*values: int) -> int:
    """A 63-bit seed that depends on every value and on their order.

    Each value v updates the state s to f(s + 0x9E3779B97F4A7C15 + f(v)) modulo 2⁶⁴, f being SplitMix64's bijective
    finaliser; so two sequences that differ in one value never share the 64-bit state, and flipped bits spread evenly.

    Args:
        values: integers of any sign, taken modulo 2⁶⁴.

    Raises:
        InvalidArgument: a value is not an integer.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.

    Example:
        >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
        (True, False)
    """
    state = 0
    for value in values:
        word = require_whole("a seed", value) & _WORD
        state = _finalise((state + 0x9E3779B97F4A7C15 + _finalise(word)) & _WORD)
    return state >> 1


def seeded_generator(*values: int) -> torch.Generator:
    """A CPU generator seeded by :func:`mixed_seed`; the global random state is neither read nor changed."""
    return torch.Generator().manual_seed(mixed_seed(*values))


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
