"""Switching signals: which field is active, for how long; the step sizes are parameters in a feasible region."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_choice, require_finite, require_range, require_whole
from dynablocks.switching.regions import Region, require_region

Piece = tuple[int, Tensor | float]
"""(index of the active field, signed step size)."""


class SwitchingSignal(nn.Module):
    """The piecewise constant s(t) of a block.

    A subclass implements :meth:`pieces`. Its learned step sizes are parameters; :meth:`project_` puts these back into
    their feasible set and runs after every optimiser step (:func:`dynablocks.switching.keep_constraints`).

    Attributes:
        fields_needed: how many fields the signal switches between.
        projected_last: whether :meth:`project_` runs after those of all parts without this mark, for a constraint on
            what they leave (:func:`dynablocks.switching.project`).

    Example:
        >>> class ThereAndBack(SwitchingSignal):
        ...     fields_needed = 2
        ...     def pieces(self):
        ...         return [(0, 0.5), (1, 0.25), (0, -0.5)]
        >>> ThereAndBack()
        ThereAndBack(h1=0.5, h2=0.25, h3=-0.5)
    """

    fields_needed: int = 1
    projected_last: bool = False

    def pieces(self) -> Sequence[Piece]:
        """What is active in turn: the field's index and the signed step, a number or a tensor of one element."""
        raise NotImplementedError(
            f"{type(self).__name__} must implement pieces(): the list of (index of the field, step size), such as "
            "[(0, 0.5)]; learned steps are parameters or made of such."
        )

    def sizes(self) -> list[tuple[int, float]]:
        """:meth:`pieces` with the present steps as numbers."""
        return [(index, float(step.detach() if isinstance(step, Tensor) else step)) for index, step in self.pieces()]

    @torch.no_grad()
    def project_(self) -> None:
        """Put the steps back into the feasible set, in place."""

    def summary(self) -> dict[str, float]:
        """The present step sizes by name, for plots and reports: those of the pieces unless a subclass says better."""
        return {f"h{k}": size for k, (_, size) in enumerate(self.sizes(), 1)}

    def extra_repr(self) -> str:
        if any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            return ""  # there are no numbers on the meta device
        return ", ".join(f"{name}={value:.4g}" for name, value in self.summary().items())


def _numbers(start: object) -> list[float]:
    """The steps of a sequence of numbers; none of anything else."""
    try:
        return [float(step) for step in start]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return []


def _finite(start: Sequence[float]) -> list[float]:
    return [require_finite(f"start[{index}]", step) for index, step in enumerate(start)]


def two_steps(start: object) -> list[float]:
    """(h₁, h₂) of a pair signal."""
    steps = _numbers(start)
    if len(steps) != 2:
        raise InvalidArgument(f"start is {start!r}; the two steps (h1, h2) of a pair are needed, such as (0.5, 0.1).")
    return _finite(steps)


class LearnedStep(SwitchingSignal):
    r"""One field, one learned step kept in [low, high].

    The default, [0, 2], is (3.5): Euler steps of a contractive gradient field with ‖A‖ <= 1 are non-expansive there.
    low > 0 keeps the step alive; (−∞, ∞) leaves it free. For an A of any norm there is
    :class:`dynablocks.switching.NonExpansiveStep`.

    Args:
        start: the step at the start; projected.
        low, high: the range, either end may be infinite.

    Raises:
        InvalidArgument: ``start`` is not finite, or ``low`` exceeds ``high``.

    Example:
        >>> LearnedStep(3.0).steps.item(), LearnedStep(3.0, high=float("inf")).steps.item()
        (2.0, 3.0)
    """

    def __init__(self, start: float = 1.0, low: float = 0.0, high: float = 2.0) -> None:
        super().__init__()
        require_finite("start", float(start))
        if not low <= high:
            raise InvalidArgument(f"the step range is [{low}, {high}]; low must not exceed high.")
        self.low, self.high = low, high
        self.steps = nn.Parameter(torch.tensor([float(start)]))
        self.project_()

    def pieces(self) -> list[tuple[int, Tensor]]:
        return [(0, self.steps[0])]

    @torch.no_grad()
    def project_(self) -> None:
        self.steps.clamp_(self.low, self.high)


class LearnedTimes(SwitchingSignal):
    r"""Each field in turn for a learned time of any sign, kept in [−limit, limit].

    Args:
        start: the times at the start, one a field.
        limit: the largest |time|.

    Raises:
        InvalidArgument: ``start`` is no sequence of finite numbers, or empty, or ``limit`` is not above 0.

    Example:
        >>> [index for index, _ in LearnedTimes((0.5, 0.2)).pieces()]
        [0, 1]
    """

    def __init__(self, start: tuple[float, ...], limit: float = 2.0) -> None:
        super().__init__()
        self.limit = require_range("limit", limit, 0.0, open_low=True)
        times = _numbers(start)
        if not times:
            raise InvalidArgument(f"start is {start!r}; a time for each field is needed, such as (0.5,) or (0.5, 0.1).")
        self.fields_needed = len(times)
        self.steps = nn.Parameter(torch.tensor(_finite(times)))
        self.project_()

    def pieces(self) -> list[tuple[int, Tensor]]:
        return list(enumerate(self.steps.unbind()))

    @torch.no_grad()
    def project_(self) -> None:
        self.steps.clamp_(-self.limit, self.limit)


class _GivenSteps(SwitchingSignal):
    """Steps that are given, and not learned: the same numbers in every precision.

    ``.double()`` would keep their rounding to float32. What a state dict has brought since stays as it came.
    """

    given: tuple[float, ...] = ()
    steps: Tensor

    def _hold(self, given: Sequence[float], dtype: torch.dtype | None = None) -> None:
        self.given = tuple(given)
        self.register_buffer("steps", torch.tensor(self.given, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        unchanged = not self.steps.is_meta and torch.equal(self.steps, self.steps.new_tensor(self.given))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if unchanged:
            self.steps.copy_(self.steps.new_tensor(self.given))
        return self


class ScheduledSignal(_GivenSteps):
    r"""One field; the step moves linearly from ``start`` to ``end`` over the first ``until`` of training, then stays.

    Continuation (design D2.5): h = 1 learns fast, h = 2 preserves gradient norms where AAᵀ = I and σ is the ReLU. The
    step is a function of the training progress only (:func:`dynablocks.switching.set_progress`), so a resumed run
    follows the same path.

    Example:
        >>> signal = ScheduledSignal(1.0, 2.0, until=0.5)
        >>> signal.set_progress(0.25); float(signal.steps)
        1.5
    """

    def __init__(self, start: float = 1.0, end: float = 2.0, until: float = 0.7) -> None:
        super().__init__()
        require_range("until", until, 0.0, 1.0, open_low=True)
        self.start, self.end = require_finite("start", float(start)), require_finite("end", float(end))
        self.until = float(until)
        self._hold([self.start])

    def set_progress(self, progress: float) -> None:
        """Move to where the schedule is at ``progress`` in [0, 1]."""
        part = min(1.0, progress / self.until)
        self.given = (self.start + (self.end - self.start) * part,)
        self.steps.fill_(self.given[0])

    def pieces(self) -> list[tuple[int, Tensor]]:
        return [(0, self.steps[0])]


class PairSignal(SwitchingSignal):
    r"""A contractive field (index 0, step h₁) and an expansive one (index 1, step h₂) in balance.

    Args:
        region: the feasible set of (h₁, h₂).
        start: (h₁, h₂) at the start; projected.
        balance: ``"pair"`` keeps every pair in the region; ``"network"`` keeps each step in its range only and leaves
            the balance to a :class:`NetworkBudget`; ``"penalty"`` does so too and asks for the balance in the loss
            (:meth:`regularisation`), so a block may expand, and declares that it does.
        step_penalty: weight of that penalty, 1 where it is left out.

    Raises:
        InvalidArgument: ``region`` is none, ``start`` is not two finite numbers, an unknown ``balance``, a weight below
            0, or one with a ``balance`` that does not read it.

    Example:
        >>> from dynablocks.switching import ExactFlowRegion
        >>> PairSignal(ExactFlowRegion(0.5), (2.0, 3.0)).steps.tolist()
        [2.0, 1.0]
    """

    fields_needed = 2

    def __init__(
        self,
        region: Region,
        start: tuple[float, float] = (0.5, 0.1),
        balance: str = "pair",
        step_penalty: float | None = None,
    ) -> None:
        super().__init__()
        require_choice("balance", balance, ("pair", "network", "penalty"))
        if step_penalty is not None and balance != "penalty":
            raise InvalidArgument(
                f"step_penalty is {step_penalty!r}, which changes nothing with balance={balance!r}; leave it out, or "
                "give balance='penalty'."
            )
        self.region, self.balance = require_region(region), balance
        self.step_penalty = require_range("step_penalty", 1.0 if step_penalty is None else step_penalty, 0.0)
        self.steps = nn.Parameter(torch.tensor(two_steps(start)))
        self.project_()

    @torch.no_grad()
    def project_(self, now: Sequence[float] | None = None) -> None:
        """Move the steps to the nearest feasible ones; ``now`` is what they are, where that has been read already."""
        if self.balance == "pair":
            first, second = self.steps.tolist() if now is None else now
            self.steps.copy_(torch.tensor(self.region.project(first, second), dtype=torch.float64))
        else:
            self.steps[0].clamp_(*self.region.first_range)
            self.steps[1].clamp_min_(self.region.second_low)

    def regularisation(self) -> Tensor | None:
        r"""``step_penalty`` · max{0, S log L(h₁, h₂)} with the pair's constant L; ``None`` unless balance is "penalty".

        It is zero in the region. :func:`dynablocks.switching.regularisation` sums it over a network; the training
        weighs that sum by ``regularisation``.

        Example:
            >>> from dynablocks.switching import ExactFlowRegion
            >>> PrescribedSignal(ExactFlowRegion(0.5), (1.0, 2.0), "penalty", step_penalty=0.1).regularisation()
            tensor(0.1500, grad_fn=<ToCopyBackward0>)
        """
        if self.balance != "penalty":
            return None
        first, second = self.steps.double().unbind()
        penalty = self.step_penalty * self.region.log_constant(first, second).clamp_min(0)
        return penalty.to(self.steps.dtype)

    def pieces(self) -> list[tuple[int, Tensor]]:
        raise NotImplementedError(
            f"{type(self).__name__} must implement pieces(): the order of a pair's two steps, as PrescribedSignal and "
            "FlexibleSignal do."
        )

    def parts(self) -> tuple[list[tuple[int, Tensor]], tuple[int, Tensor]]:
        """One of the S pairs: the contractive pieces and the expansive one."""
        first, second = self.steps[0] / self.region.substeps, self.steps[1] / self.region.substeps
        count = self.region.contractive_parts
        return [(0, first / count)] * count, (1, second)

    def summary(self) -> dict[str, float]:
        """h₁ and h₂, each as a whole."""
        return {f"h{k}": size for k, size in enumerate(self.steps.detach().tolist(), 1)}


class PrescribedSignal(PairSignal):
    r"""(Ψ_E^{h₂/S} ∘ Ψ_C^{h₁/S}) S times: (3.11) for S = 2; the region may ask for the contractive step in equal parts.

    Example:
        >>> from dynablocks.switching import PaperPrescribedRegion
        >>> signal = PrescribedSignal(PaperPrescribedRegion(0.5, 2))
        >>> [index for index, _ in signal.pieces()]
        [0, 1, 0, 1]
    """

    def pieces(self) -> list[tuple[int, Tensor]]:
        contraction, expansion = self.parts()
        return [*contraction, expansion] * self.region.substeps


class FlexibleSignal(PairSignal):
    r"""Ψ_C^{h₁/2} ∘ Ψ_C^{h₁/2} ∘ Ψ_E^{h₂}: (3.12); h₂ may be negative, then both maps contract.

    The halves are those of :class:`PaperFlexibleRegion`; another region's contractive step is taken as it asks.

    Example:
        >>> from dynablocks.switching import PaperFlexibleRegion
        >>> [index for index, _ in FlexibleSignal(PaperFlexibleRegion(0.5), (1.0, -0.3)).pieces()]
        [1, 0, 0]
    """

    def pieces(self) -> list[tuple[int, Tensor]]:
        contraction, expansion = self.parts()
        return [expansion, *contraction] * self.region.substeps


class FreeSignal(_GivenSteps):
    """One field, a fixed step: what an unconstrained network does (a ResNet step is h = 1).

    The step is the given number in every precision: ``.double()`` does not keep its rounding to float32.

    Example:
        >>> FreeSignal(0.1).double().steps.item()
        0.1
    """

    def __init__(self, step: float = 1.0) -> None:
        super().__init__()
        self._hold([require_finite("step", float(step))])

    def pieces(self) -> list[tuple[int, Tensor]]:
        return [(0, self.steps[0])]


class EvenSteps(_GivenSteps):
    """One field, followed for a fixed time in equal steps.

    Args:
        time: the whole of it, of either sign.
        count: how many steps.

    Raises:
        InvalidArgument: ``time`` is not finite, or ``count`` no whole number from 1.

    Example:
        >>> [float(step) for _, step in EvenSteps(1.0, 4).pieces()]
        [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, time: float, count: int) -> None:
        super().__init__()
        step = require_finite("time", time) / require_whole("count", count, 1)
        self._hold([step] * count, torch.float64)

    def pieces(self) -> list[tuple[int, Tensor]]:
        return [(0, step) for step in self.steps.unbind()]


class NetworkBudget(nn.Module):
    r"""One constraint for a whole network: Σ log Lᵢ(hᵢ) <= 0 over its pair signals (design D2.3).

    The projection multiplies every positive expansive step by the largest common θ in [0, 1] that meets the budget.
    What steps outside of these signals contract is not credited.

    Condition, as for the regions: A₁ᵀA₁ = I in contractive fields and ‖A₂‖ <= 1 in expansive ones; otherwise a pair may
    expand beyond its Lᵢ, and the network with it, and the blocks declare what they have.

    Args:
        signals: pair signals with ``balance="network"``; they stay registered where they are. One that acts several
            times stands here as often.

    Attributes:
        projected_last: set, so that it meets steps that are back in their ranges. A budget of one's own is any module
            with a method ``project_()`` and this mark (:func:`dynablocks.switching.project`).

    Make it an attribute of the model, as its parts are: :func:`dynablocks.switching.project` finds it there alone, and
    knows the signals that it was given, not those of blocks that come later.

    Raises:
        InvalidArgument: ``signals`` holds something else than pair signals, or one of another ``balance``.

    Example:
        >>> from dynablocks.switching import ExactFlowRegion
        >>> signals = [PrescribedSignal(ExactFlowRegion(0.5), start, "network") for start in ((2.0, 1.5), (2.0, 0.1))]
        >>> budget = NetworkBudget(signals)
        >>> budget.project_(); budget.total() <= 1e-6
        True
    """

    projected_last: bool = True

    def __init__(self, signals: Iterable[PairSignal]) -> None:
        super().__init__()
        self._signals = _budgeted(signals)

    def total(self, shrink: float = 1.0) -> float:
        """Σ log Lᵢ with every positive expansive step multiplied by ``shrink``."""
        return self._total(self._steps(), shrink)

    def _steps(self) -> list[tuple[float, float]]:
        if not self._signals:
            return []
        pairs = torch.stack([signal.steps.detach().double() for signal in self._signals])
        return [(first, second) for first, second in pairs.tolist()]

    def _total(self, steps: list[tuple[float, float]], shrink: float) -> float:
        return sum(
            signal.region.log_constant(first, second * shrink if second > 0 else second)
            for signal, (first, second) in zip(self._signals, steps, strict=True)
        )

    @torch.no_grad()
    def project_(self) -> None:
        """Shrink the expansive steps until the budget holds."""
        steps = self._steps()
        if self._total(steps, 1.0) <= 0:
            return
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._total(steps, middle) <= 0 else (low, middle)
        for signal in dict.fromkeys(self._signals):
            if signal.steps[1] > 0:
                signal.steps[1].mul_(low * (1 - 1e-6))


def _budgeted(signals: object) -> tuple[PairSignal, ...]:
    """The signals of a budget: pairs that leave their balance to it."""
    if not isinstance(signals, Iterable):
        raise InvalidArgument(f"signals is a {type(signals).__name__}; a list of pair signals is needed.")
    given = tuple(signals)
    for index, signal in enumerate(given):
        if not isinstance(signal, PairSignal):
            raise InvalidArgument(
                f"signals[{index}] is a {type(signal).__name__}; a budget takes pair signals (PrescribedSignal, "
                "FlexibleSignal); for other steps write a module with project_() and projected_last = True."
            )
        if signal.balance != "network":
            raise InvalidArgument(
                f"signals[{index}] has balance={signal.balance!r}; a budget takes pair signals with "
                "balance='network', which leave their balance to it."
            )
    return given
