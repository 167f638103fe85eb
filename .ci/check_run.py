"""Whether a run directory holds what scripts rely on: python .ci/check_run.py DIR"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

NUMBERS = ("clean_accuracy", "auc", "lipschitz_bound", "images_per_second", "train_seconds", "parameters", "seed")
TEXTS = ("dataset", "device", "version")
EPSILONS = (0.0, 36 / 255, 72 / 255, 108 / 255, 0.5, 1.0)


def problems(directory: Path) -> list[str]:
    """One sentence for each thing that is missing or wrong."""
    import torch

    import dynablocks

    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    found = [f"{k} is {metrics.get(k)!r}" for k in NUMBERS if not isinstance(metrics.get(k), (int, float))]
    found += [f"{k} is {metrics.get(k)!r}" for k in TEXTS if not isinstance(metrics.get(k), str)]
    for curve in ("robust_accuracy", "certified_accuracy"):
        points = {point["epsilon"]: point["accuracy"] for point in metrics.get(curve) or ()}
        missing = [e for e in EPSILONS if not any(math.isclose(e, p, abs_tol=1e-9) for p in points)]
        found += [f"{curve} lacks epsilon {e:.4g}" for e in missing]
        found += [f"{curve} holds {a!r}" for a in points.values() if not 0 <= a <= 1]
    report = directory / "report.html"
    if not report.exists() or "<html" not in report.read_text(encoding="utf-8"):
        found.append("report.html is missing or no page")
    network = dynablocks.load(directory)
    logits = network(torch.rand(2, *network.input_shape))
    if network.training or logits.shape != (2, network.num_classes) or not math.isfinite(network.properties.lipschitz):
        found.append("the loaded network is not in eval mode, or its logits or properties are wrong")
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print("\n".join(wrong) or f"{sys.argv[1]}: metrics.json, report.html and the loaded network are as promised")
    sys.exit(bool(wrong))
