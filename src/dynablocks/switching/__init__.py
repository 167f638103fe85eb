"""Switching signals, the regions their steps live in, and the hook that keeps them there."""

from dynablocks.switching.constraints import keep_constraints, project, regularisation, set_progress
from dynablocks.switching.regions import (
    REGIONS,
    ExactFlowRegion,
    PaperFlexibleRegion,
    PaperPrescribedRegion,
    Region,
    TightHalvesRegion,
    TightRegion,
    tight_contraction,
)
from dynablocks.switching.signals import (
    FlexibleSignal,
    FreeSignal,
    LearnedTimes,
    NetworkBudget,
    NonExpansiveSignal,
    PairSignal,
    Piece,
    PrescribedSignal,
    ScheduledSignal,
    SwitchingSignal,
)

__all__ = [
    "REGIONS",
    "ExactFlowRegion",
    "FlexibleSignal",
    "FreeSignal",
    "LearnedTimes",
    "NetworkBudget",
    "NonExpansiveSignal",
    "PairSignal",
    "PaperFlexibleRegion",
    "PaperPrescribedRegion",
    "Piece",
    "PrescribedSignal",
    "Region",
    "ScheduledSignal",
    "SwitchingSignal",
    "TightHalvesRegion",
    "TightRegion",
    "keep_constraints",
    "project",
    "regularisation",
    "set_progress",
    "tight_contraction",
]
