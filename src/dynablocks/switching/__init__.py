"""Switching signals, the regions their steps live in, and the hook that keeps them there."""

from dynablocks.switching.constraints import keep_constraints, project, regularisation, set_progress
from dynablocks.switching.non_expansive import NonExpansiveStep
from dynablocks.switching.non_expansive_pair import NonExpansivePair
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
    EvenSteps,
    FlexibleSignal,
    FreeSignal,
    LearnedStep,
    LearnedTimes,
    NetworkBudget,
    PairSignal,
    Piece,
    PrescribedSignal,
    ScheduledSignal,
    SwitchingSignal,
)

__all__ = [
    "REGIONS",
    "EvenSteps",
    "ExactFlowRegion",
    "FlexibleSignal",
    "FreeSignal",
    "LearnedStep",
    "LearnedTimes",
    "NetworkBudget",
    "NonExpansivePair",
    "NonExpansiveStep",
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
