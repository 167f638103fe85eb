"""What function transforms hide."""

from __future__ import annotations

import torch
from torch import Tensor


def unwrapped(value: Tensor) -> Tensor:
    """The numbers in a tensor that function transforms have wrapped: under ``vmap`` those of all runs.

    For decisions that are the same for all runs, such as how often a loop runs; what is computed from it cannot be
    differentiated, nor taken apart into runs again.

    Example:
        >>> torch.func.vmap(lambda x: x * int(unwrapped(x).max()))(torch.tensor([1.0, 3.0]))
        tensor([3., 9.])
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value
