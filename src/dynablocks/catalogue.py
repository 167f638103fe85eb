"""The names that ``dynablocks list`` and the docs' tables tell, by kind.

Not those of experiments, of structures that a fit preserves, of blocks of density flows and of planar point sets, which
stand where these are used.
"""

from __future__ import annotations

from collections.abc import Iterable

from dynablocks.data import DATASETS, SYSTEMS
from dynablocks.fields import ACTIVATIONS, FIELDS
from dynablocks.integrators import INTEGRATORS
from dynablocks.linear import ORTHOGONAL
from dynablocks.models import MODELS
from dynablocks.robustness import LOSSES as ATTACK_LOSSES
from dynablocks.switching import REGIONS
from dynablocks.training import LOSSES, OPTIMISERS, SCHEDULES


def catalogue() -> dict[str, list[str]]:
    """Kind to names.

    Example:
        >>> "euler" in catalogue()["integrators"]
        True
    """
    kinds: dict[str, Iterable[str]] = {
        "models": MODELS,
        "datasets": DATASETS,
        "systems": SYSTEMS,
        "fields": FIELDS,
        "activations": ACTIVATIONS,
        "integrators": INTEGRATORS,
        "regions": REGIONS,
        "orthogonal": ORTHOGONAL,
        "losses": LOSSES,
        "optimisers": OPTIMISERS,
        "schedules": SCHEDULES,
        "attack-losses": ATTACK_LOSSES,
    }
    return {kind: list(names) for kind, names in kinds.items()}
