"""Figure 3: the region (3.10) for S = 1 and S = 2."""

from __future__ import annotations

import math

from dynablocks.experiments.base import EXPERIMENTS, Check
from dynablocks.experiments.regions import SLOPE, Panel, RegionExperiment, area, peak, peak_check
from dynablocks.switching import PaperPrescribedRegion, TightRegion


@EXPERIMENTS.register("fig3")
class PrescribedRegions(RegionExperiment):
    r"""(3.10), a = 1/2, beside the tight bound and the exact flow, for the prescribed signal (3.11).

    With a = 1/2 the largest h₂ of (3.10) is S(2/√3 − 1) at h₁ = S/2, that of the tight region is 2S at h₁ = 4S/3. The
    areas at h₂ >= 0 are S²(log 3 − 1) and S²(3 log 3 − 2).

    Source: Celledoni et al., arXiv 2210.02373, section 3.2, figure 3.
    """

    name = "fig3"
    title = "Regions of step pairs that do not expand: prescribed switching"
    source = "Figure 3, (3.10)"
    paper_region = "paper-prescribed"
    panels = (
        Panel("Euler, S = 1", ("paper-prescribed", "tight"), "prescribed", 1, (0.0, 2.4, 0.0, 2.2)),
        Panel("Euler, S = 2", ("paper-prescribed", "tight"), "prescribed", 2, (0.0, 4.8, 0.0, 4.4)),
        Panel("exact flow, S = 1", ("exact",), "prescribed", 1, (0.0, 4.0, 0.0, 2.2)),
        Panel("exact flow, S = 2", ("exact",), "prescribed", 2, (0.0, 4.0, 0.0, 2.2)),
    )

    def geometry(self) -> list[Check]:
        found = []
        for substeps in (1, 2):
            paper, tight = PaperPrescribedRegion(SLOPE, substeps), TightRegion(SLOPE, substeps)
            expected = (substeps / 2, substeps * (2 / math.sqrt(3) - 1))
            found.append(peak_check(f"largest h₂ of (3.10), S = {substeps}", "(3.10)", expected, peak(paper)))
            expected = (4 * substeps / 3, 2.0 * substeps)
            found.append(peak_check(f"largest h₂ of the tight region, S = {substeps}", "", expected, peak(tight)))
            share, closed = area(paper) / area(tight), (math.log(3) - 1) / (3 * math.log(3) - 2)
            what = f"area of (3.10) in that of the tight region, S = {substeps}"
            agrees = math.isclose(share, closed, rel_tol=1e-5)
            found.append(Check.of(what, "", f"{100 * closed:.2f} %", f"{100 * share:.2f} %", agrees))
        return found
