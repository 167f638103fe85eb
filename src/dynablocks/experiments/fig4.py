"""Figure 4: robust accuracy of the five networks trained with margin 0.07; and the gap to what is proved."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.robustness import (
    attack_note,
    auc_checks,
    curve_table,
    order_checks,
    paper_rows,
    row_cells,
    summary_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Attacked(Experiment):
    """What Figures 4 and 10 share: networks at some margins.

    Attributes:
        margins: of the hinge loss.
    """

    margins: ClassVar[tuple[float, ...]]

    def cells(self, scale: Scale) -> list[Cell]:
        return row_cells(paper_rows(scale, self.margins))

    def tables(self, scale: Scale, store: Store) -> str:
        rows = paper_rows(scale, self.margins)
        without = "no copy was given (`--cifar100-dir`)" if scale.cifar100_dir is None else "this preset takes digits"
        large = any(row.training.data == "cifar100" for row in rows)
        missing = "" if large else f"\nCIFAR-100: not run, {without}.\n"
        curves = f"Under the paper's attack:\n\n{curve_table(rows, store)}"
        return f"{attack_note(scale)}\n{missing}\n{summary_table(rows, store)}\n\n{curves}"

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        from dynablocks.experiments.robustness_figures import attacked_figure, gap_figure

        rows = paper_rows(scale, self.margins)
        sets = {row.training.data: [r for r in rows if r.training.data == row.training.data] for row in rows}
        drawn = {}
        for data, some in sets.items():
            stem = self.name if data != "cifar100" else f"{self.name}-cifar100"
            drawn[stem] = attacked_figure(some, store, watermark=scale.watermark)
            drawn[f"{stem}-gap"] = gap_figure(some, store, watermark=scale.watermark)
        return drawn

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        rows = paper_rows(scale, self.margins)
        checks = auc_checks(scale, rows, store)
        for data in dict.fromkeys(row.claimed_of for row in rows):
            for margin in self.margins:
                checks += order_checks(scale, margin, rows, store, data)
        return checks


@EXPERIMENTS.register("fig4")
class Figure4(Attacked):
    """Margin 0.07."""

    name = "fig4"
    title = "Robust accuracy of the five networks, margin 0.07"
    source = "Figure 4"
    margins = (0.07,)
