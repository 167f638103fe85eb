"""How many steps a training has: fixed by its epochs, or fitted to a time budget as it runs."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

RESERVE = 0.03
WARM_UP_STEPS = 3
FIRST_FITS = (WARM_UP_STEPS, 2 * WARM_UP_STEPS, WARM_UP_STEPS + 20)
REFIT_SHARE = 0.02
REMEMBERED = 3


@dataclass
class StepPlan:
    """The planned number of steps and, from it, the training's progress in [0, 1].

    Without a budget progress is ``step / total``. With one, the speed is measured, from steps 3 to 6, from 3 to 23,
    then over every fiftieth of the budget, and ``total`` becomes what fits (3 % kept in reserve), never more than
    ``limit``. What counts is the median of the last three measurements: a machine that slept for a while costs its
    time and no more, where a schedule hurried by it could not go back. From a new fit on, progress rises linearly from
    where it stands to 1 at the new total: it never falls, and ends at 1 exactly.

    Args:
        limit: the most steps to do; empty for as many as fit.
        budget_seconds: the time for them; empty for no limit.
        total: the planned steps.
        anchor_step: the step of the last fit.
        anchor_progress: the progress there.
        fitted_step: the step up to which the speed has been measured.
        fitted_seconds: the elapsed seconds at that step.
        step_seconds: the measured seconds a step takes.
        measured: the last measurements of it.

    Example:
        >>> plan = StepPlan.of(100, None)
        >>> plan.progress(25)
        0.25
    """

    limit: int | None
    budget_seconds: float | None
    total: int
    anchor_step: int = 0
    anchor_progress: float = 0.0
    fitted_step: int = 0
    fitted_seconds: float = 0.0
    step_seconds: float = 0.0
    measured: tuple[float, ...] = ()

    @classmethod
    def of(cls, limit: int | None, budget_seconds: float | None) -> StepPlan:
        """A plan before the first step; with only a budget the first guess is 1,000 steps."""
        return cls(limit, budget_seconds, 1000 if limit is None else limit)

    def progress(self, step: int) -> float:
        """The share of the training that is done after ``step`` steps; 1 from ``total`` on."""
        if step >= self.total:
            return 1.0
        share = (step - self.anchor_step) / (self.total - self.anchor_step)
        return self.anchor_progress + (1 - self.anchor_progress) * share

    def is_due(self, step: int, elapsed: float) -> bool:
        """Whether the speed should be measured again after ``step`` steps and ``elapsed`` seconds."""
        if self.budget_seconds is None or step >= self.total:
            return False
        waited = elapsed - self.fitted_seconds > REFIT_SHARE * self.budget_seconds
        return step in FIRST_FITS or (waited and step > self.fitted_step) or elapsed > self.budget_seconds

    def fit(self, step: int, elapsed: float) -> None:
        """Measure the speed up to ``step`` and plan what fits into the rest of the budget."""
        if self.budget_seconds is None:
            return
        if step > self.fitted_step and step != WARM_UP_STEPS:
            recent = (elapsed - self.fitted_seconds) / (step - self.fitted_step)
            before = self.measured if step > FIRST_FITS[-1] else ()
            self.measured = (*before, recent)[-REMEMBERED:]
            self.step_seconds = statistics.median_low(self.measured)
        if step not in FIRST_FITS[1:-1]:
            self.fitted_step, self.fitted_seconds = step, elapsed
        if self.step_seconds > 0:
            self._plan((1 - RESERVE) * self.budget_seconds - elapsed, step)

    def _plan(self, seconds_left: float, step: int) -> None:
        total = step + max(0, math.floor(seconds_left / self.step_seconds))
        if self.limit is not None:
            total = min(total, self.limit)
        if total != self.total:
            self.anchor_progress, self.anchor_step = self.progress(step), step
            self.total = max(total, step)

    def without_budget(self, step: int) -> None:
        """All steps of the limit again, from ``step`` on, when a budget that had shortened the plan is gone."""
        if self.limit is not None and self.total != self.limit:
            self.anchor_progress, self.anchor_step = self.progress(step), step
            self.total = max(self.limit, step)

    def state(self) -> dict[str, Any]:
        """The plan as plain numbers; ``StepPlan(**state)`` is the same plan."""
        return asdict(self)
