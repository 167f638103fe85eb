"""One hook that keeps every constraint of a model in any training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynablocks.errors import require_range
from dynablocks.properties.own_code import overrides
from dynablocks.properties.structure import original
from dynablocks.switching.signals import PairSignal


@torch.no_grad()
def project(model: nn.Module) -> None:
    """Call ``project_()`` of every submodule that has it: of those whose ``projected_last`` is true after all others.

    So a constraint on several parts meets what their own projections leave, wherever in the model it is registered:
    :class:`NetworkBudget` steps in their ranges, :class:`NonExpansiveStep` and :class:`NonExpansivePair` weights of the
    norms that they keep. Pair signals with ``balance="pair"`` come after the other parts without the mark: they are in
    their regions whatever those set.

    Example:
        >>> from dynablocks.switching import LearnedStep
        >>> class TotalTime(nn.Module):
        ...     projected_last = True
        ...     def __init__(self, signals):
        ...         super().__init__()
        ...         self.signals = tuple(signals)
        ...     @torch.no_grad()
        ...     def project_(self):
        ...         total = sum(signal.steps.item() for signal in self.signals)
        ...         for signal in self.signals:
        ...             signal.steps.div_(max(1.0, total))
        >>> signals = [LearnedStep(1.0), LearnedStep(1.0)]
        >>> project(nn.ModuleList([TotalTime(signals), *signals]))
        >>> [signal.steps.item() for signal in signals]
        [0.5, 0.5]
    """
    others: list[nn.Module] = []
    pairs: list[PairSignal] = []
    last: list[nn.Module] = []
    for module in _parts(model):
        if getattr(module, "projected_last", False):
            last.append(module)
        elif _is_pair_in_its_region(module):
            pairs.append(module)
        else:
            others.append(module)
    _project_each(others)
    _project_pairs(pairs)
    _project_each(last)


def _parts(model: nn.Module) -> Iterable[nn.Module]:
    """The model and its parts, each once: a compiled one and what is inside have the same methods."""
    return dict.fromkeys(map(original, model.modules()))


def _is_pair_in_its_region(module: nn.Module) -> TypeGuard[PairSignal]:
    """Whether its projection is that of every pair with ``balance="pair"``."""
    return isinstance(module, PairSignal) and module.balance == "pair" and not overrides(module, PairSignal, "project_")


def _project_each(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        method = getattr(module, "project_", None)
        if method is not None:
            method()


def _project_pairs(pairs: list[PairSignal]) -> None:
    if len({pair.steps.device for pair in pairs}) != 1:
        _project_each(pairs)
        return
    # Read at once, since on a GPU every reading waits for the device.
    steps = torch.stack([pair.steps.detach() for pair in pairs])
    for pair, now in zip(pairs, steps.tolist(), strict=True):
        pair.project_(now)


def keep_constraints(model: nn.Module, optimiser: torch.optim.Optimizer) -> RemovableHandle:
    """Project the model after every step of the optimiser, in any training loop.

    Example:
        >>> from dynablocks.switching import LearnedStep
        >>> signal = LearnedStep(2.0)
        >>> optimiser = torch.optim.SGD(signal.parameters(), lr=1.0)
        >>> handle = keep_constraints(signal, optimiser)
        >>> (-signal.steps.sum()).backward(); optimiser.step()
        >>> signal.steps.item()
        2.0
    """

    def after_step(optimiser: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        project(model)

    project(model)
    return optimiser.register_step_post_hook(after_step)


def set_progress(model: nn.Module, progress: float) -> None:
    """Move every scheduled step of the model to where it is at ``progress`` in [0, 1] of the training."""
    require_range("progress", progress, 0.0, 1.0)
    for module in _parts(model):
        method = getattr(module, "set_progress", None)
        if method is not None:
            method(progress)


def regularisation(model: nn.Module) -> Tensor | None:
    """The sum of the submodules' penalties, ``None`` when there is none."""
    penalties = [getattr(part, "regularisation", None) for part in _parts(model)]
    terms = [penalty() for penalty in penalties if callable(penalty)]
    present = [term for term in terms if term is not None]
    return torch.stack(present).sum() if present else None
