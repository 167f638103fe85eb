"""Long runs: the energy along 10⁵ steps of the pendulum and of the Kepler problem, method by method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.fields import FieldFacts, PartitionedField, VectorField
from dynablocks.integrators import integrator
from dynablocks.progress import track
from dynablocks.reporting import markdown_table
from dynablocks.reporting.figures import new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = {"smoke": 400, "cpu": 100_000, "paper": 100_000}
METHODS = ("verlet", "yoshida4", "implicit-midpoint", "gonzalez", "rk4", "euler")
BOUNDED = ("verlet", "yoshida4", "implicit-midpoint", "gonzalez")
SOLVED = ("gonzalez",)
"""Of these, those that keep the energy itself, as far as an equation is solved."""
BLOCKS = 400
SLOPE_LIMIT = 0.1
"""How much of its own range the energy error may drift from the first to the last part of a run."""
SIZE_LIMIT = 0.1
"""A larger error is no bounded one: |H| is about ½ in both problems."""


class PendulumForce(VectorField):
    """v(q) = −sin q = ∇ cos q."""

    in_shape = (1,)

    def forward(self, x: Tensor) -> Tensor:
        return -torch.sin(x)

    def facts(self) -> FieldFacts:
        return FieldFacts(1.0, 1.0, conservative=True, odd=True, reason="|cos| <= 1")

    def potential(self, x: Tensor) -> Tensor:
        """cos q per sample."""
        return torch.cos(x).sum(1)


class KeplerForce(VectorField):
    """v(q) = −q / ‖q‖³ = ∇ (1 / ‖q‖)."""

    in_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        return -x / x.norm(dim=1, keepdim=True) ** 3

    def facts(self) -> FieldFacts:
        return FieldFacts(conservative=True, odd=True, reason="unbounded at 0")

    def potential(self, x: Tensor) -> Tensor:
        """1 / ‖q‖ per sample."""
        return 1 / x.norm(dim=1)


@dataclass(frozen=True)
class Problem:
    """A second-order system q̈ = v(q) with a start (q, p) and a step."""

    force: type[VectorField]
    start: tuple[float, ...]
    step: float

    def field(self) -> PartitionedField:
        """(p, v(q)) with H(q, p) = ‖p‖²/2 + V(q)."""
        return PartitionedField(None, self.force())


PROBLEMS = {
    "pendulum": Problem(PendulumForce, (1.0, 0.0), 0.1),
    # Eccentricity 0.6, semi-major axis 1, from the pericentre: (1 − e, 0) with speed √((1 + e)/(1 − e)).
    "kepler": Problem(KeplerForce, (0.4, 0.0, 0.0, 2.0), 0.02),
}


@dataclass(frozen=True)
class DriftCell(Cell):
    """The energy error of one method along one solution: mean and extremes of each of 400 blocks of steps.

    Of all steps: samples at multiples of 250 steps alias with the period of 314.
    """

    version: ClassVar[int] = 2
    problem: str
    method: str
    steps: int

    @property
    def title(self) -> str:
        return f"{self.steps} steps of {self.method}, {self.problem}"

    @property
    def cost(self) -> float:
        if integrator(self.method).explicit:
            return 1e-4 * self.steps
        return self.steps * (4e-3 if self.method == "gonzalez" else 1.4e-3)

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        problem, method = PROBLEMS[self.problem], integrator(self.method)
        field = problem.field().double()
        x = torch.tensor([problem.start], dtype=torch.float64)
        every = max(1, self.steps // BLOCKS)
        blocks: list[tuple[float, float, float]] = []
        with torch.no_grad():
            first = float(field.energy(x))
            for _ in track(range(self.steps // every), self.title, self.steps // every):
                states = []
                for _ in range(every):
                    x = method.step(field, x, problem.step)
                    states.append(x)
                errors = field.energy(torch.cat(states)) - first
                blocks.append((float(errors.mean()), float(errors.min()), float(errors.max())))
        return {"blocks": blocks, "every": every * problem.step, **drift(blocks)}


def drift(blocks: list[tuple[float, float, float]]) -> dict[str, float]:
    """The largest error, and how far the mean of the last quarter is from that of the first, over the range.

    Args:
        blocks: mean, least and largest energy error of each.

    Example:
        >>> drift([(0.5, 0.0, 1.0)] * 8)["moved"]
        0.0
        >>> drift([(float(k), float(k), float(k)) for k in range(1, 5)])["moved"]
        1.0
    """
    quarter = max(1, len(blocks) // 4)
    means, least, most = zip(*blocks, strict=True)
    first, last = sum(means[:quarter]) / quarter, sum(means[-quarter:]) / quarter
    width = max(most) - min(least)
    return {"largest": max(-min(least), max(most)), "moved": abs(last - first) / width if width else 0.0}


@EXPERIMENTS.register("drift")
class Drift(Experiment):
    """Symplectic and energy-preserving methods keep the energy over 10⁵ steps; Runge–Kutta methods lose it."""

    name = "drift"
    title = "Energy over many steps of the pendulum and of the Kepler problem"
    source = "Section 4.1"

    def drift_cells(self, scale: Scale) -> list[DriftCell]:
        """Every method on every problem."""
        steps = STEPS[scale.preset]
        return [DriftCell(problem, method, steps) for problem in PROBLEMS for method in METHODS]

    def cells(self, scale: Scale) -> list[Cell]:
        return list(self.drift_cells(scale))

    def tables(self, scale: Scale, store: Store) -> str:
        rows = []
        for cell in self.drift_cells(scale):
            result = store.result(cell) or {}
            numbers = (
                {key: result.get(key) for key in ("largest", "moved")}
                if result
                else {"largest": "not run", "moved": None}
            )
            rows.append({"problem": cell.problem, "method": cell.method, "steps": cell.steps} | numbers)
        columns = {
            "problem": "problem",
            "method": "method",
            "steps": "steps",
            "largest": "largest energy error",
            "moved": "drift over range",
        }
        return markdown_table(rows, columns, {"largest": scientific, "moved": "{:.3f}".format})

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        results = {(cell.problem, cell.method): store.result(cell) for cell in self.drift_cells(scale)}
        found = {key: result for key, result in results.items() if result is not None}
        return {self.name: energy_error_figure(found, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        checks = []
        short = scale.preset == "smoke"
        for cell in self.drift_cells(scale):
            result = store.result(cell)
            got = None if result is None else f"{result['largest']:.1e}, drift {result['moved']:.3f}"
            agrees = None if result is None else as_expected(cell, result, short)
            checks.append(Check.of(f"{cell.method}, {cell.problem}: energy", "", expected(cell), got, agrees))
        return checks


ROUNDING = 1e-12
"""What a step of a discrete gradient may leave of the energy: ten times the solver's tolerance, for both problems."""


def expected(cell: DriftCell) -> str:
    """What theory says of a method's energy, in words."""
    if cell.method in SOLVED:
        return f"<= {ROUNDING * cell.steps:.0e}"
    return "no drift" if cell.method in BOUNDED else "drifts"


def as_expected(cell: DriftCell, result: dict[str, Any], short: bool) -> bool | None:
    """Whether the energy does that; ``None`` where a run is too short to show a drift.

    A discrete gradient leaves at most :data:`ROUNDING` a step, so that its bound holds after any number of steps; an
    error that is larger and stays is that of another method.
    """
    if cell.method in SOLVED:
        solved: bool = result["largest"] <= ROUNDING * cell.steps
        return solved
    if short:
        return None
    bounded: bool = result["moved"] <= SLOPE_LIMIT and result["largest"] <= SIZE_LIMIT
    return bounded == (cell.method in BOUNDED)


def scientific(value: Any) -> str:
    """Three digits of a number; words as they are."""
    return value if isinstance(value, str) else f"{value:.2e}"


@styled
def energy_error_figure(results: dict[tuple[str, str], dict[str, Any]], *, watermark: str | None = None) -> Figure:
    """The largest |H − H₀| of each block of steps against time, logarithmic, one panel for each problem."""
    figure = new_figure(9.0, 3.6, watermark)
    for axes, problem in zip(figure.subplots(1, len(PROBLEMS)), PROBLEMS, strict=True):
        for (name, method), result in results.items():
            if name == problem:
                times = [result["every"] * (k + 1) for k in range(len(result["blocks"]))]
                errors = [max(-least, most) + 1e-17 for _, least, most in result["blocks"]]
                axes.loglog(times, errors, label=method, linewidth=0.8)
        axes.set(title=problem, xlabel="time", ylabel="|H − H₀|")
        if axes.lines:
            axes.legend(fontsize=6)
    return figure
