"""Figure 10: robust accuracy of the five networks trained with margins 0.15 and 0.3."""

from __future__ import annotations

from dynablocks.experiments.base import EXPERIMENTS
from dynablocks.experiments.fig4 import Attacked


@EXPERIMENTS.register("fig10")
class Figure10(Attacked):
    """Margins 0.15 and 0.3."""

    name = "fig10"
    title = "Robust accuracy of the five networks, margins 0.15 and 0.3"
    source = "Figure 10"
    margins = (0.15, 0.3)
