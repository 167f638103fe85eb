"""Figure 12: the steps that the flexible networks learned, margins 0.15 and 0.3."""

from __future__ import annotations

from dynablocks.experiments.base import EXPERIMENTS
from dynablocks.experiments.fig5 import LearnedSteps


@EXPERIMENTS.register("fig12")
class Figure12(LearnedSteps):
    """Margins 0.15 and 0.3."""

    name = "fig12"
    title = "Learned steps of the flexible network, margins 0.15 and 0.3"
    source = "Figure 12"
    margins = (0.15, 0.3)
