"""Appendix D and Proposition 2.1: measured orders of every integrator, and the bounds on flows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.fields import FIELDS, GradientField, SumField, VectorField, leaky_relu
from dynablocks.integrators import INTEGRATORS, exact_solution, integrator
from dynablocks.integrators.order import errors_at, rate_of
from dynablocks.linear import Dense, OrthogonalDense, frozen_weights
from dynablocks.reporting import markdown_table
from dynablocks.reporting.figures import CYCLE, new_figure, styled
from dynablocks.seeding import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Number = TypeVar("Number", float, Tensor)

TIME = 1.0
TOLERANCE = 0.1
MARKERS = ("o", "s", "^", "v")
BOUNDS = (
    ("stability", "Proposition 2.1", "ε t e^{Lt}", True),
    ("splitting", "appendix D, corrected", "½ h² (L_f G + L_g F) e^{(L_f + L_g)h}", True),
    ("splitting_kinked", "appendix D, corrected, leaky ReLU", "½ h² (L_f G + L_g F) e^{(L_f + L_g)h}", True),
    ("splitting_of_proof", "appendix D, what its proof leads to", "½ h² L_f G e^{(L_f + L_g)h}", False),
    ("splitting_as_printed", "appendix D as printed", "½ h² G e^{Lip(X)h}", False),
)
"""The key of a result, name and formula of its bound, and whether the bound is true."""


def smooth_problems(seed: int = 0) -> list[VectorField]:
    """Smooth fields, random but fixed; each method is measured on the first that it applies to."""
    with seeded(seed):
        gradient = GradientField(Dense(3, 4), "tanh").double()
        others = [FIELDS[name].example().double() for name in ("partitioned", "rotation")]
        for field in (gradient, *others):
            for parameter in field.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        positive = FIELDS["compartments"].example().double()
    return [gradient, *others, positive]


def lipschitz_problem(seed: int = 0) -> SumField:
    """A contractive and an expansive leaky-ReLU gradient field, random but fixed: what appendix D asks for, no more.

    Both have exact flows; they are Lipschitz, and have no derivative where a unit is 0.

    Example:
        >>> [round(term.facts().lipschitz, 6) for term in lipschitz_problem().terms()]
        [1.0, 1.0]
    """
    with seeded(seed):
        parts = [GradientField(OrthogonalDense(3, 3), leaky_relu(0.5), expansive=sign) for sign in (False, True)]
        field = SumField(*parts).double()
        for parameter in field.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return field


def suited_problem(name: str, seed: int = 0) -> VectorField | None:
    """The first smooth problem of a method, ``None`` when it applies to none."""
    method = integrator(name)
    return next((field for field in smooth_problems(seed) if method.why_not(field) is None), None)


def convergence(name: str, seed: int = 0, field: VectorField | None = None) -> dict[str, Any]:
    """Errors at time 1 of a method for 4 step sizes, each half of the one before, and the slope of log error.

    Args:
        name: of the method.
        seed: of the starts, and of the field where none is given.
        field: what it is measured on, in float64; by default its first smooth problem.

    Raises:
        InvalidArgument: the method has no order, or no smooth problem.

    Example:
        >>> round(convergence("heun")["slope"])
        2
    """
    method = integrator(name)
    field = suited_problem(name, seed) if field is None else field
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


def lie_trotter_bound(lipschitz: tuple[float, float], speeds: tuple[Number, Number], h: float) -> Number:
    r"""½ h² (L_f G + L_g F) e^{(L_f + L_g)h}: by how much Φ_g^h ∘ Φ_f^h(x₀) misses Φ_{f+g}^h(x₀) at most.

    Condition: f and g have the constants L_f and L_g on a set in which Φ_f^s(x₀), Φ_g^s(Φ_f^h(x₀)) and Φ_{f+g}^s(x₀)
    stay for 0 <= s <= h. No derivative is asked for.

    Args:
        lipschitz: (L_f, L_g).
        speeds: (F, G): F = max ‖f‖ along Φ_f^s(x₀) and G = max ‖g‖ along Φ_{f+g}^s(x₀) for 0 <= s <= h.
        h: the step, not negative.

    Source: paper appendix D, whose proof misses the part of F; the whole of it is in docs/mathematics.md.

    Example:
        >>> missed = 0.1 * math.exp(0.1) - math.expm1(0.1)  # f = 1, which has L_f = 0, and g(x) = x, from 0
        >>> missed <= lie_trotter_bound((0.0, 1.0), (1.0, math.expm1(0.1)), 0.1) <= 1.05 * missed
        True
    """
    (first, second), (along_first, along_sum) = lipschitz, speeds
    return 0.5 * h**2 * math.exp((first + second) * h) * (first * along_sum + second * along_first)


@dataclass(frozen=True)
class ConvergenceCell(Cell):
    """The measured order of one method."""

    at_least: ClassVar[bool] = False
    """Whether the declared order is the least that may be measured, and not all."""

    method: str
    seed: int = 0

    @property
    def label(self) -> str:
        """What the tables call it."""
        return self.method

    @property
    def title(self) -> str:
        return f"order of {self.label}"

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        return convergence(self.method, self.seed)


@dataclass(frozen=True)
class KinkedConvergenceCell(ConvergenceCell):
    """The measured order of a splitting of fields that are Lipschitz and no more: a bound of the error is all known."""

    at_least: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"{self.method}, leaky ReLU"

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        return convergence(self.method, self.seed, lipschitz_problem(self.seed)) | {"field": "two GradientFields"}


@dataclass(frozen=True)
class FlowBoundsCell(Cell):
    r"""The largest ratios measured / bound of Proposition 2.1 and of appendix D, over random fields.

    Proposition 2.1: ‖Φ_X^t(x) − Φ_Y^t(x)‖ <= ε t e^{Lt} for sup ‖X − Y‖ <= ε over Rⁿ and L = Lip(X).

    Appendix D: one Lie–Trotter step Φ_g^h ∘ Φ_f^h within :func:`lie_trotter_bound`, on smooth and on Lipschitz fields.
    Its proof leads to ½ h² L_f G e^{(L_f + L_g)h}, since it shows the inequality that it gives to Grönwall at t = h
    alone; as printed L_f is missing, too, and L_f + L_g <= Lip(f + g) is used, which is the wrong way round.

    Args:
        fields: how many random pairs of each kind.
        seed: of the fields and starts.
    """

    version: ClassVar[int] = 2

    fields: int = 20
    seed: int = 0

    @property
    def title(self) -> str:
        return "bounds on flows"

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        found = [self._ratios(generator) for _ in range(self.fields)]
        return {key: max(ratios[key] for ratios in found) for key in found[0]}

    def _ratios(self, generator: torch.Generator) -> dict[str, float]:
        """Of one pair of each kind."""
        stability, shears = self._stability(generator), self._shears(generator)
        return {"stability": stability, **shears, "splitting_kinked": self._kinked(generator)}

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

    def _shears(self, generator: torch.Generator) -> dict[str, float]:
        """The local error of f = (ap, 0) and g = (0, −bq) over the bounds, b/a between 1/100 and 100.

        f + g turns with the speed √(ab), and Lip(f + g) = max(a, b). F and G are taken at both ends of a step, which
        is no more than along it. The printed bound has the maximum of ‖g‖ over a ball that all three curves stay in.
        """
        size, ratio = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        a = 1.0 + 9.0 * size
        b = a * math.exp(math.log(100.0) * (2.0 * ratio - 1.0))
        h, (q, p) = 0.1 / max(a, b), torch.randn(2, 8, generator=generator, dtype=torch.float64).unbind(0)
        moved = q + h * a * p
        split = torch.stack([moved, p - h * b * moved])
        turn, stretch = h * math.sqrt(a * b), math.sqrt(a / b)
        turned = math.cos(turn) * q + stretch * math.sin(turn) * p
        exact = torch.stack([turned, math.cos(turn) * p - math.sin(turn) / stretch * q])
        error = (split - exact).norm(dim=0)
        speeds = a * p.abs(), b * torch.maximum(q.abs(), turned.abs())
        in_ball = b * torch.stack([q, p]).norm(dim=0) * math.exp((a + b) * h)
        bounds = {
            "splitting": lie_trotter_bound((a, b), speeds, h),
            "splitting_of_proof": lie_trotter_bound((a, b), (torch.zeros_like(p), speeds[1]), h),
            "splitting_as_printed": 0.5 * h**2 * math.exp(max(a, b) * h) * in_ball,
        }
        return {key: float((error / bound).max()) for key, bound in bounds.items()}

    @torch.no_grad()
    def _kinked(self, generator: torch.Generator) -> float:
        """The local error of two leaky-ReLU gradient fields over the bound, F and G at both ends of the step."""
        field, h = lipschitz_problem(int(torch.randint(2**31, (), generator=generator))), 0.1
        first, second = field.terms()
        start = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        with frozen_weights(field):
            end = exact_solution(field, start, h)
            error = (integrator("lie-trotter").step(field, start, h) - end).norm(dim=1)
            along_first = torch.maximum(first(start).norm(dim=1), first(first.flow(start, h)).norm(dim=1))
            along_sum = torch.maximum(second(start).norm(dim=1), second(end).norm(dim=1))
        constants = first.facts().lipschitz, second.facts().lipschitz
        return float((error / lie_trotter_bound(constants, (along_first, along_sum), h)).max())


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
        """One for each method, and appendix D's on fields that are Lipschitz alone."""
        smooth = [ConvergenceCell(name, scale.seed) for name in self.methods()]
        return [*smooth, KinkedConvergenceCell("lie-trotter", scale.seed)]

    def bounds_cell(self, scale: Scale) -> FlowBoundsCell:
        """The bounds of Proposition 2.1 and appendix D."""
        return FlowBoundsCell(5 if scale.preset == "smoke" else 100, scale.seed)

    def cells(self, scale: Scale) -> list[Cell]:
        return [*self.convergence_cells(scale), self.bounds_cell(scale)]

    def tables(self, scale: Scale, store: Store) -> str:
        rows = []
        for cell in self.convergence_cells(scale):
            result = store.result(cell) or {}
            rows.append({"method": cell.label} | {key: result.get(key) for key in ("field", "order", "slope")})
        columns = {"method": "method", "field": "measured on", "order": "declared order", "slope": "measured"}
        table = markdown_table(rows, columns, {"slope": "{:.3f}".format})
        bounds = store.result(self.bounds_cell(scale))
        if bounds is None:
            return table + "\n\nbounds: not run"
        lines = [{"bound": f"{name}, {formula}", "ratio": bounds[key]} for key, name, formula, _ in BOUNDS]
        heads = {"bound": "bound", "ratio": "largest measured / bound"}
        return table + "\n\n" + markdown_table(lines, heads, {"ratio": "{:.3f}".format})

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        found = {cell.label: store.result(cell) for cell in self.convergence_cells(scale)}
        return {self.name: errors_figure({k: v for k, v in found.items() if v is not None}, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        bounds = store.result(self.bounds_cell(scale)) or {}
        checks = [self._order_check(cell, store.result(cell)) for cell in self.convergence_cells(scale)]
        for key, name, _, holds in BOUNDS:
            value = bounds.get(key)
            got = None if value is None else f"{value:.3f}"
            agrees = value is not None and (value <= 1) == holds
            paper = "" if "corrected" in name else "<= 1"
            expected = "<= 1" if holds else "> 1 (an erratum)"
            checks.append(Check.of(f"{name}: largest measured / bound", paper, expected, got, agrees))
        return checks

    def _order_check(self, cell: ConvergenceCell, result: dict[str, Any] | None) -> Check:
        what, order = f"order of {cell.label}", integrator(cell.method).order
        paper = "1" if cell.method == "lie-trotter" else ""
        expected = f">= {order} − {TOLERANCE}" if cell.at_least else f"{order} ± {TOLERANCE}"
        if result is None:
            return Check.of(what, paper, expected, None, None)
        off = result["slope"] - order
        agrees = off >= -TOLERANCE and (cell.at_least or off <= TOLERANCE)
        return Check.of(what, paper, expected, f"{result['slope']:.3f}", agrees)


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
