"""Table 1 and Figure 1: three families of 1-Lipschitz networks on points in the plane.

The paper fixes the families, ten residual layers, a = 1/2, A = exp(W − Wᵀ) and 100 runs. It shows its points as a
picture alone, so neither its accuracies nor its T can be held against those found here: they stand beside each other,
and what is compared is that every body is 1-Lipschitz. The rest was chosen here, on validation points (other seeds
than the test points and starts of the table):

- Points: two moons with noise 0.16, chosen so that the best networks reach a little over 98 %, as the paper's do; that
  accuracies then lie near the paper's shows nothing. The points are centred, so that the first kinks pass through them.
  With noise 0.14 the validation medians of F ∪ Fc and F (40 runs, not centred) were 98.7 and 99.0 %; that of Fc was
  94.7 to 96.5 % by seed, and 97.2 and 99.0 % after centring. The noise 0.16 follows from that trend and was itself seen
  on the test points only. Circles are solved by all families alike, spirals by none in 1,500 steps.
- Head: free, so that the body alone is 1-Lipschitz, and standardised while training (``StandardisedTraining``). With a
  raw or normalised head every step shrank, because a contraction costs logits: T ended near 1.4 for both single
  families on circles, whatever the start, and on the moons most networks stayed at a straight line (88 %).
- Starts: h = 4/3 for the single fields, the contraction that loses no direction; h = 1 makes a point of a quadrant and
  h = 2 does not train. Pairs start at the library's default (0.5, 0.1). **T remembers the start**: with the single
  fields from 1/2 it was 6.9 for Fc and 5.4 for F, less than the 6.1 of F ∪ Fc (20 runs, noise 0.15). So the order of T
  here is partly that of the starts; no start tried pushed Fc to the paper's 19.82 at a useful accuracy.
- Constraint of the alternating family: the product of each pair's exact constants is at most 1; the contractive step
  decides and the step of F is shortened.
- Optimiser: Adam, 0.02 with a cosine to 0, 1,500 steps of 64 points. A part of the runs of Fc ends at a straight line
  (about 90 %), more than half of them with 0.05, so its median varies by a point or two with the seed.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.planar_networks import FAMILIES
from dynablocks.experiments.reference import paper_results
from dynablocks.experiments.table1_cells import NAMES, EnsembleCell
from dynablocks.reporting.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_KEYS = {"F+Fc": "alternating", "F": "expansive_only", "Fc": "contractive_only"}
OTHER_DATA = "other data than the paper's"
"""What is expected of accuracies and T: nothing, since the paper's points are not at hand."""
ROUNDING = 1e-9
"""What the product of ten stored constants may have above 1."""


@EXPERIMENTS.register("table1")
class PlanarClassification(Experiment):
    """Medians of accuracy and final time T = Σ|h| over 100 networks of each family."""

    name = "table1"
    title = "Classification of points in the plane by three families of fields"
    source = "Table 1, Figure 1"

    def cells(self, scale: Scale) -> list[Cell]:
        return [self.cell(scale, family) for family in FAMILIES]

    def cell(self, scale: Scale, family: str) -> EnsembleCell:
        """The ensemble of a family; the presets ``cpu`` and ``paper`` share theirs."""
        cell = EnsembleCell(family, seed=scale.seed)
        if scale.preset != "smoke":
            return cell
        return replace(cell, runs=4, training=replace(cell.training, steps=30))

    def tables(self, scale: Scale, store: Store) -> str:
        cells = {family: self.cell(scale, family) for family in FAMILIES}
        rows = [self._row(family, store.result(cell)) for family, cell in cells.items()]
        columns = {
            "family": "family",
            "paper accuracy": "accuracy, paper",
            "accuracy": "accuracy, here",
            "accuracy quartiles": "quartiles",
            "paper time": "T, paper",
            "time": "T, here",
            "time quartiles": "quartiles",
            "bound": "largest bound",
        }
        return f"{markdown_table(rows, columns)}\n\n{self._note(cells['F+Fc'])}"

    def _row(self, family: str, result: dict[str, Any] | None) -> dict[str, str]:
        paper = paper_results()["table1"][PAPER_KEYS[family]]
        row = {"family": NAMES[family], "paper accuracy": f"{100 * paper['accuracy']:.1f} %"}
        row |= {"paper time": f"{paper['T']:.2f}", "accuracy": "not run", "time": "not run"}
        if result is None:
            return row | dict.fromkeys(("accuracy quartiles", "time quartiles", "bound"), "not run")
        low, middle, high = quartiles(result["accuracies"])
        row |= {"accuracy": f"{100 * middle:.1f} %", "accuracy quartiles": f"{100 * low:.1f}–{100 * high:.1f} %"}
        low, middle, high = quartiles(result["final_times"])
        row |= {"time": f"{middle:.2f}", "time quartiles": f"{low:.2f}–{high:.2f}"}
        return row | {"bound": f"{max(result['bounds']):.9f}"}

    def _note(self, cell: EnsembleCell) -> str:
        points, training = cell.points, cell.training
        return (
            f"Medians and quartiles of {cell.runs} networks with {cell.layers} residual layers, a = 1/2; each family is"
            " trained as one vectorised ensemble. The paper shows its points as a picture only; here they are"
            f" {points.train} training and {points.test} test points of `planar({points.name!r}, noise={points.noise})`"
            " less the training mean, chosen so that the best networks reach a little over 98 %: accuracies and T are"
            f" not compared with the paper's. {training.steps} steps of Adam, batches of {training.batch_size}. The"
            " bound is the product of the layers' exact Lipschitz constants; the linear head is free, and the certified"
            " radii divide by its weights. T remembers where the steps start (4/3 for F and Fc, 1/2 and 1/10 in a"
            " pair): from 1/2, F ended below F ∪ Fc, so the order of T is not a property of the families alone."
        )

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        from dynablocks.experiments.table1_figures import planar_figure

        cells = [self.cell(scale, family) for family in FAMILIES]
        return {"fig1": planar_figure(cells, store, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        results = {family: store.result(self.cell(scale, family)) for family in FAMILIES}
        accuracies = [self._accuracy_check(family, result) for family, result in results.items()]
        return [*accuracies, self._times_check(results), *self._bound_checks(results)]

    def _accuracy_check(self, family: str, result: dict[str, Any] | None) -> Check:
        paper = f"{100 * paper_results()['table1'][PAPER_KEYS[family]]['accuracy']:.1f} %"
        got = None if result is None else f"{100 * statistics.median(result['accuracies']):.1f} %"
        return Check.of(f"median accuracy, {NAMES[family]}", paper, OTHER_DATA, got, None)

    def _times_check(self, results: dict[str, dict[str, Any] | None]) -> Check:
        built = [result for result in results.values() if result is not None]
        times = [statistics.median(result["final_times"]) for result in built]
        got = " < ".join(f"{t:.2f}" for t in times) if times == sorted(times) else ", ".join(f"{t:.2f}" for t in times)
        names = ", ".join(NAMES[family] for family in results)
        complete = len(times) == len(results)
        return Check.of(f"median T: {names}", "1.84 < 7.53 < 19.82", OTHER_DATA, got if complete else None, None)

    def _bound_checks(self, results: dict[str, dict[str, Any] | None]) -> list[Check]:
        """Section 1.1 constrains the steps to 1-Lipschitz networks: that holds at any size, in every run."""
        checks = []
        for family, result in results.items():
            worst = None if result is None else max(result["bounds"])
            got, holds = (None, None) if worst is None else (f"{worst:.10g}", worst <= 1 + ROUNDING)
            what = f"largest bound of a body, {NAMES[family]}"
            checks.append(Check.of(what, "1", f"<= 1 + {ROUNDING:g}", got, holds))
        return checks


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The quartiles, by linear interpolation as ``numpy.quantile`` does; one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
