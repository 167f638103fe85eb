"""Figure 11: appendix C's region for the flexible signal."""

from __future__ import annotations

import math

from dynablocks.experiments.base import EXPERIMENTS, Check
from dynablocks.experiments.regions import SLOPE, Panel, RegionExperiment, area, peak, peak_check
from dynablocks.switching import PaperFlexibleRegion

WINDOW = (0.0, 4.0, -2.4, 8.4)


@EXPERIMENTS.register("fig11")
class FlexibleRegions(RegionExperiment):
    r"""Appendix C's region, a = 1/2, beside the tight bound and the exact flow, for the flexible signal (3.12).

    The paper takes the contractive step in two halves; the tight region of that very step stands beside it. The paper's
    limit is largest at h₁ = 1 with h₂ = 1/3; its area at h₂ >= 0 is the integral of 4/((h₁ − 1)² + 3) − 1.

    Source: Celledoni et al., arXiv 2210.02373, appendix C, figure 11.
    """

    name = "fig11"
    title = "Regions of step pairs that do not expand: flexible switching"
    source = "Figure 11, appendix C"
    paper_region = "paper-flexible"
    panels = (
        Panel("Euler, h₁ in two halves", ("paper-flexible", "tight-halves"), "flexible", 1, WINDOW),
        Panel("Euler, h₁ in one step", ("tight",), "flexible", 1, WINDOW),
        Panel("exact flow", ("exact",), "flexible", 1, WINDOW),
    )

    def geometry(self) -> list[Check]:
        region = PaperFlexibleRegion(SLOPE)
        low, high = region.first_range
        root = math.sqrt(3)
        closed = 4 / root * (math.atan((high - 1) / root) - math.atan((low - 1) / root)) - (high - low)
        got = area(region)
        agrees = math.isclose(got, closed, rel_tol=1e-5)
        return [
            peak_check("largest h₂ of appendix C's region", "(h₁, h₂) ∈ R", (1.0, 1 / 3), peak(region)),
            Check.of("area of appendix C's region at h₂ ≥ 0", "", f"{closed:.4f}", f"{got:.4f}", agrees),
        ]
