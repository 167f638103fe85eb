"""Eval mode, or so many CPU threads, for a while, and then again what was before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the context every module of ``model`` is in eval mode; afterwards each is in the mode it was in before.

    Modes are set one by one: ``model.train(mode)`` would give all modules the mode of the root, and so undo what a
    caller froze.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with eval_mode(model):
        ...     [module.training for module in model]
        [False, False]
        >>> [module.training for module in model]
        [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Within the context torch computes with so many CPU threads, or with as many as before where it is ``None``.

    Example:
        >>> before = torch.get_num_threads()
        >>> with cpu_threads(1):
        ...     torch.get_num_threads()
        1
        >>> torch.get_num_threads() == before
        True
    """
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        # Not where nothing changed: told a number, MKL no longer chooses fewer threads where fewer are faster.
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
