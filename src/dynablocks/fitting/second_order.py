"""Second-order finishes of a least-squares fit: Levenberg–Marquardt and L-BFGS, one iteration at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dynablocks.errors import NotConverged
from dynablocks.fitting.objective import Objective
from dynablocks.switching.constraints import project

MOST_UNKNOWNS = 2000
MOST_WORK = 3e11
"""Floating-point operations of one QR factorisation, some ten seconds of one core."""

LARGEST_DAMPING, SMALLEST_DAMPING = 1e16, 1e-30


def fits_levenberg_marquardt(objective: Objective) -> bool:
    """Whether dense Jacobians are affordable: at most 2000 unknowns, and 2 · residuals · unknowns² <= 3e11."""
    unknowns = objective.unknowns
    return 0 < unknowns <= MOST_UNKNOWNS and 2.0 * objective.residual_count() * unknowns**2 <= MOST_WORK


class LevenbergMarquardt:
    r"""Steps δ of min ‖Jδ + r‖² + λd²‖δ‖², accepted when they lower the objective.

    d is the largest norm of a column of J. One d for all unknowns (Levenberg), not the norm of each column (Marquardt):
    the latter lets parameters that hardly matter run off to infinity, from where no step leads back (Transtrum and
    Sethna, 2012). λ follows the gain ratio ρ of the true to the predicted decrease: an accepted step
    multiplies it by max(1/3, 1 − (2ρ − 1)³), a rejected one by 2, 4, 8, … in turn. J is factorised by QR, so singular
    values down to eps·‖J‖ count. After each step the module's constraints are restored, before it is judged.

    Source: Levenberg, 1944; Transtrum and Sethna, 2012, arXiv 1201.5885; Nielsen,
        "Damping parameter in Marquardt's method", 1999.
    """

    name = "levenberg-marquardt"

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        self.module, self.objective = module, objective
        self.damping, self.growth = 1e-3, 2.0
        self.value = objective.value()

    def advance(self, iterations: int = 1) -> bool:
        """One accepted step, whatever is asked for; ``False`` when no step lowers the objective any more."""
        factor = self.objective.triangular_factor()
        jacobian, residual = factor[:, :-1], factor[:, -1]
        if not bool(factor.isfinite().all()):
            return False
        scale = float(jacobian.norm(dim=0).max()) or 1.0
        scaled = jacobian / scale
        before = [p.detach().clone() for p in self.objective.parameters]
        while self.damping <= LARGEST_DAMPING:
            step = _damped_solution(scaled, residual, self.damping)
            if step is not None and self._try(before, step / scale, jacobian, residual):
                return True
            self.damping *= self.growth
            self.growth *= 2
        _assign(self.objective.parameters, before)
        self.damping, self.growth = 1e-3, 2.0
        return False

    def _try(self, before: list[Tensor], step: Tensor, jacobian: Tensor, residual: Tensor) -> bool:
        moved, start = [], 0
        for old in before:
            moved.append(old + step[start : start + old.numel()].view_as(old))
            start += old.numel()
        _assign(self.objective.parameters, moved)
        if _project(self.module, self.objective):
            # The gain is that of the step which the constraints have left.
            left = [(p.detach() - old).flatten() for p, old in zip(self.objective.parameters, before, strict=True)]
            step = torch.cat(left)
        value = self.objective.value()
        if not value < self.value:
            return False
        change = jacobian @ step
        predicted = 0.5 * float(residual.square().sum() - (residual + change).square().sum()) / self.objective.samples
        gain = (self.value - value) / predicted if predicted > 0 else 0.0
        factor = max(1 / 3, 1 - (2 * min(gain, 1.0) - 1) ** 3)
        self.damping, self.growth = max(self.damping * factor, SMALLEST_DAMPING), 2.0
        self.value = value
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"damping": self.damping, "growth": self.growth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.damping, self.growth = float(state["damping"]), float(state["growth"])
        self.value = self.objective.value()


def _damped_solution(jacobian: Tensor, residual: Tensor, damping: float) -> Tensor | None:
    """argmin ‖Jδ + r‖² + λ‖δ‖², by QR of [J; √λ I]; ``None`` when it is not finite."""
    unknowns = jacobian.shape[1]
    below = math.sqrt(damping) * torch.eye(unknowns, dtype=jacobian.dtype, device=jacobian.device)
    augmented = torch.cat(
        [torch.cat([jacobian, below]), torch.cat([-residual, residual.new_zeros(unknowns)])[:, None]], 1
    )
    factor = torch.linalg.qr(augmented, mode="r").R[:unknowns]
    step = torch.linalg.solve_triangular(factor[:, :-1], factor[:, -1:], upper=True)[:, 0]
    return step if bool(step.isfinite().all()) else None


def _project(module: nn.Module, objective: Objective) -> bool:
    """Restore the constraints; whether that moved a parameter."""
    found = [p.detach().clone() for p in objective.parameters]
    project(module)
    return any(not torch.equal(p, was) for p, was in zip(objective.parameters, found, strict=True))


@torch.no_grad()
def _assign(parameters: list[nn.Parameter] | list[Any], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


class LimitedMemoryBFGS:
    """L-BFGS with a strong-Wolfe line search, up to twenty iterations at a time, then the module's constraints.

    Where restoring these undoes what was gained, projected gradient steps are taken in its place: a minimum at the edge
    of what is allowed is no minimum of the objective alone.

    Source: Liu and Nocedal, 1989; ``torch.optim.LBFGS``; Bertsekas, 1976, for the projected gradient.
    """

    name = "lbfgs"
    inner_steps = 20
    attempts = 8
    halvings = 60

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        self.module, self.objective = module, objective
        self._optimiser = torch.optim.LBFGS(
            objective.parameters,
            max_iter=self.inner_steps,
            history_size=50,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        self.value = objective.value()

    def advance(self, iterations: int = inner_steps) -> bool:
        """So many iterations; ``False`` when they did not lower the objective.

        Where they meet parameters at which an implicit step has no solution, they begin again with a shorter one.
        """
        before = [p.detach().clone() for p in self.objective.parameters]
        group = self._optimiser.param_groups[0]
        group["max_iter"], group["max_eval"] = iterations, iterations * 5 // 4

        def closure() -> Tensor:
            self._optimiser.zero_grad()
            loss = self.objective.loss()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        value = math.inf
        for _ in range(self.attempts):
            constrained = False
            try:
                self._optimiser.step(closure)  # type: ignore[no-untyped-call]
                constrained = _project(self.module, self.objective)
                value = self.objective.value()
            except NotConverged:
                value = math.inf
            if constrained:
                # What it remembers is the curvature between points that the constraints do not allow.
                self._optimiser.state.clear()
            if value < self.value:
                self.value, group["lr"] = value, 1.0
                return True
            _assign(self.objective.parameters, before)
            if not math.isinf(value):
                return constrained and self._descend(iterations)
            self._optimiser.state.clear()
            group["lr"] *= 0.25
        return False

    def _descend(self, iterations: int) -> bool:
        """So many projected gradient steps, each halved until it lowers the objective; whether there was one."""
        start, length = self.value, math.nan
        for _ in range(iterations):
            before = [p.detach().clone() for p in self.objective.parameters]
            try:
                gradients = torch.autograd.grad(self.objective.loss(), self.objective.parameters, allow_unused=True)
            except NotConverged:
                break
            steps = [torch.zeros_like(p) if g is None else g for p, g in zip(before, gradients, strict=True)]
            size = sum(float(step.abs().sum()) for step in steps)
            if not 0 < size < math.inf:
                break
            length = min(1.0, 1 / size) if math.isnan(length) else 2 * length
            for _ in range(self.halvings):
                _assign(self.objective.parameters, [p - length * step for p, step in zip(before, steps, strict=True)])
                project(self.module)
                value = self.objective.value()
                if value < self.value:
                    break
                length /= 2
            else:
                _assign(self.objective.parameters, before)
                break
            self.value = value
        return self.value < start

    def state_dict(self) -> dict[str, Any]:
        return dict(self._optimiser.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimiser.load_state_dict(state)
        self.value = self.objective.value()


FINISHES: dict[str, type[LevenbergMarquardt] | type[LimitedMemoryBFGS]] = {
    "levenberg-marquardt": LevenbergMarquardt,
    "lbfgs": LimitedMemoryBFGS,
}
