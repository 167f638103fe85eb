"""The paper's numbers, as released by its authors' networks (``paper_results.json``)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from dynablocks.robustness import Curve

NAMES = {
    "resnet": "unconstrained_resnet",
    "naive": "naive",
    "non_expansive": "non_expansive",
    "prescribed": "switch_prescribed",
    "flexible": "switch_flexible",
}
SAMPLES = 1024


@functools.cache
def paper_results() -> dict[str, Any]:
    """The whole file."""
    content = Path(__file__).with_name("paper_results.json").read_text(encoding="utf-8")
    return dict(json.loads(content))


def paper_curve(data: str, model: str, margin: float) -> Curve | None:
    """Robust accuracy under the paper's attack of its network on ``cifar10`` or ``cifar100``; ``None`` when not given.

    Example:
        >>> round(paper_curve("cifar10", "flexible", 0.07).auc, 4)
        0.6802
    """
    results = paper_results()
    found = results["datasets"].get(data, {}).get(NAMES.get(model, ""), {}).get(f"{margin:g}")
    return None if found is None else Curve(tuple(results["epsilons"]), tuple(found["robust_accuracy"]), SAMPLES)


def released_note(model: str) -> str:
    """What a check says behind a number of the paper where the code released beside it takes other steps.

    The steps of ``prescribed`` and ``flexible`` there are neither (3.11) nor (3.12): docs/reproduce.md.

    Example:
        >>> released_note("flexible"), released_note("naive")
        (' (released network, other steps)', '')
    """
    return " (released network, other steps)" if model in ("prescribed", "flexible") else ""
