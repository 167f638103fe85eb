"""Appendix D and Proposition 2.1: measured orders of every integrator, and the two bounds on flows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.fields import FIELDS, GradientField, VectorField
from dynablocks.integrators import INTEGRATORS, exact_solution, integrator
from dynablocks.integrators.order import errors_at, rate_of
from dynablocks.linear import Dense
from dynablocks.reporting import markdown_table
from dynablocks.reporting.figures import CYCLE, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIME = 1.0
TOLERANCE = 0.1
MARKERS = ("o", "s", "^", "v")


def smooth_problems(seed: int = 0) -> list[VectorField]:
    """Smooth fields, random but fixed; each method is measured on the first that it applies to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gradient = GradientField(Dense(3, 4), "tanh").double()
        others = [FIELDS[name].example().double() for name in ("partitioned", "rotation")]
        for field in (gradient, *others):
            for parameter in field.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        positive = FIELDS["compartments"].example().double()
    return [gradient, *others, positive]


def suited_problem(name: str, seed: int = 0) -> VectorField | None:
    """The first smooth problem of a method, ``None`` when it applies to none."""
    method = integrator(name)
    return next((field for field in smooth_problems(seed) if method.why_not(field) is None), None)


def convergence(name: str, seed: int = 0) -> dict[str, Any]:
    """Errors at time 1 of a method for 4 step sizes, each half of the one before, and the slope of log error.

    Example:
        >>> round(convergence("heun")["slope"])
        2
    """
    method, field = integrator(name), suited_problem(name, seed)
    if field is None or method.order is None:
        raise InvalidArgument(f"{name} has no order, or no smooth problem that it applies to.")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(3, *field.in_shape, dtype=torch.float64, generator=generator).abs()
    truth = exact_solution(field, start, TIME)
    first = {4: 16, 6: 2}.get(method.order, 32)
    counts = [first * 2**k for k in range(4)]
    errors = errors_at(method, field, start, truth, TIME, counts)
    slope = rate_of(counts, errors)
    return {"field": type(field).__name__, "steps": counts, "errors": errors, "order": method.order, "slope": slope}


@dataclass(frozen=True)
class ConvergenceCell(Cell):
    """The measured order of one method."""

    method: str
    seed: int = 0

    @property
    def title(self) -> str:
        return f"order of {self.method}"

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        return convergence(self.method, self.seed)


@dataclass(frozen=True)
class FlowBoundsCell(Cell):
    r"""The largest ratios measured / bound of Proposition 2.1 and of appendix D, over random fields.

    Proposition 2.1: ‖Φ_X^t(x) − Φ_Y^t(x)‖ <= ε t e^{Lt} for sup ‖X − Y‖ <= ε over Rⁿ and L = Lip(X).

    Appendix D: one Lie–Trotter step Φ_g^h ∘ Φ_f^h. Its proof gives ½ h² L_f G e^{(L_f + L_g)h} with G = max ‖g‖ where
    the solutions run; as printed L_f is missing and L_f + L_g <= Lip(f + g) is used, which is the wrong way round.

    Args:
        fields: how many random pairs.
        seed: of the fields and starts.
    """

    fields: int = 20
    seed: int = 0

    @property
    def title(self) -> str:
        return "bounds on flows"

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        stability, corrected, printed = [], [], []
        for _ in range(self.fields):
            stability.append(self._stability(generator))
            ratios = self._splitting(generator)
            corrected.append(ratios[0])
            printed.append(ratios[1])
        return {"stability": max(stability), "splitting": max(corrected), "splitting_as_printed": max(printed)}

    def _stability(self, generator: torch.Generator) -> float:
        matrix, push = (torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)).unbind(0)
        size = float(torch.rand((), generator=generator, dtype=torch.float64)) * 0.1
        lipschitz = float(torch.linalg.matrix_norm(matrix, ord=2))

        def field(x: Tensor) -> Tensor:
            return torch.tanh(x @ matrix.mT)

        def other(x: Tensor) -> Tensor:
            return field(x) + size / math.sqrt(3) * torch.sin(x @ push.mT)

        start = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        worst = 0.0
        for time in (0.1, 0.5, 1.0, 2.0):
            gap = (exact_solution(field, start, time) - exact_solution(other, start, time)).norm(dim=1).max()
            worst = max(worst, float(gap) / (size * time * math.exp(lipschitz * time)))
        return worst

    def _splitting(self, generator: torch.Generator) -> tuple[float, float]:
        """The local error of a kick and a drift of stiffness c, over the corrected bound and over the printed one."""
        c = 1.0 + 9.0 * float(torch.rand((), generator=generator, dtype=torch.float64))
        h, (q, p) = 0.1 / c, torch.randn(2, 8, generator=generator, dtype=torch.float64).unbind(0)
        # f = (cp, 0), g = (0, −cq); f + g rotates with speed c, and Lip(f + g) = c.
        moved = q + h * c * p
        split = torch.stack([moved, p - h * c * moved])
        turn = c * h
        exact = torch.stack([math.cos(turn) * q + math.sin(turn) * p, math.cos(turn) * p - math.sin(turn) * q])
        error = (split - exact).norm(dim=0)
        largest = c * torch.stack([q, p]).norm(dim=0)
        corrected = 0.5 * h**2 * c * largest * math.exp(2 * c * h)
        return float((error / corrected).max()), float((error / (0.5 * h**2 * largest * math.exp(c * h))).max())


@EXPERIMENTS.register("orders")
class Orders(Experiment):
    """Every integrator against its declared order, and the bounds that the approximation theorems stand on."""

    name = "orders"
    title = "Measured orders of every integrator; bounds on flows"
    source = "Proposition 2.1, appendix D"

    def methods(self) -> list[str]:
        """Every method that has an order and a smooth problem."""
        return [name for name in INTEGRATORS if integrator(name).order is not None and suited_problem(name) is not None]

    def convergence_cells(self, scale: Scale) -> list[ConvergenceCell]:
        """One for each method."""
        return [ConvergenceCell(name, scale.seed) for name in self.methods()]

    def bounds_cell(self, scale: Scale) -> FlowBoundsCell:
        """The bounds of Proposition 2.1 and appendix D."""
        return FlowBoundsCell(5 if scale.preset == "smoke" else 100, scale.seed)

    def cells(self, scale: Scale) -> list[Cell]:
        return [*self.convergence_cells(scale), self.bounds_cell(scale)]

    def tables(self, scale: Scale, store: Store) -> str:
        rows = []
        for cell in self.convergence_cells(scale):
            result = store.result(cell) or {}
            rows.append({"method": cell.method} | {key: result.get(key) for key in ("field", "order", "slope")})
        columns = {"method": "method", "field": "measured on", "order": "declared order", "slope": "measured"}
        table = markdown_table(rows, columns, {"slope": "{:.3f}".format})
        bounds = store.result(self.bounds_cell(scale))
        if bounds is None:
            return table + "\n\nbounds: not run"
        lines = [
            {"bound": "Proposition 2.1, ε t e^{Lt}", "ratio": bounds["stability"]},
            {"bound": "appendix D, ½ h² L_f G e^{(L_f + L_g)h}", "ratio": bounds["splitting"]},
            {"bound": "appendix D as printed, ½ h² G e^{Lip(X)h}", "ratio": bounds["splitting_as_printed"]},
        ]
        heads = {"bound": "bound", "ratio": "largest measured / bound"}
        return table + "\n\n" + markdown_table(lines, heads, {"ratio": "{:.3f}".format})

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        found = {cell.method: store.result(cell) for cell in self.convergence_cells(scale)}
        return {self.name: errors_figure({k: v for k, v in found.items() if v is not None}, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        checks = []
        for cell in self.convergence_cells(scale):
            result = store.result(cell)
            got = None if result is None else f"{result['slope']:.3f}"
            agrees = result is not None and abs(result["slope"] - result["order"]) <= TOLERANCE
            expected = f"{integrator(cell.method).order} ± {TOLERANCE}"
            paper = "1" if cell.method == "lie-trotter" else ""
            checks.append(Check.of(f"order of {cell.method}", paper, expected, got, agrees))
        bounds = store.result(self.bounds_cell(scale)) or {}
        for key, what, holds in (
            ("stability", "Proposition 2.1: largest measured / bound", True),
            ("splitting", "appendix D with L_f: largest measured / bound", True),
            ("splitting_as_printed", "appendix D as printed: largest measured / bound", False),
        ):
            value = bounds.get(key)
            got = None if value is None else f"{value:.3f}"
            agrees = value is not None and (value <= 1) == holds
            checks.append(Check.of(what, "<= 1", "<= 1" if holds else "> 1 (an erratum)", got, agrees))
        return checks


@styled
def errors_figure(results: dict[str, dict[str, Any]], *, watermark: str | None = None) -> Figure:
    """Errors at time 1 against the step size, both logarithmic, one panel for each order, its methods named below."""
    orders = sorted({result["order"] for result in results.values()}) or [1]
    figure = new_figure(3.2 * len(orders), 4.4, watermark)
    panels, names = figure.subplots(2, len(orders), squeeze=False, height_ratios=(5, 2))
    for axes, below, order in zip(panels, names, orders, strict=True):
        chosen = {name: result for name, result in results.items() if result["order"] == order}
        for place, (name, result) in enumerate(chosen.items()):
            # Where the colours are used up they begin anew with another marker.
            turn, colour = divmod(place, len(CYCLE))
            look: dict[str, Any] = {"color": CYCLE[colour], "marker": MARKERS[turn % len(MARKERS)], "markersize": 3}
            axes.loglog([TIME / n for n in result["steps"]], result["errors"], label=name, **look)
        axes.set(title=f"order {order}", xlabel="step size h", ylabel="error at t = 1")
        counts = sorted({n for result in chosen.values() for n in result["steps"]})
        axes.set_xticks([TIME / n for n in counts], [f"{TIME:g}/{n}" for n in counts])
        axes.minorticks_off()
        below.set_axis_off()
        below.legend(*axes.get_legend_handles_labels(), fontsize=6, ncols=2, loc="upper center")
    return figure
