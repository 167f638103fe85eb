"""Make one results table (and optionally a picture) from finished run directories.

    python docs/collect_runs.py NAME TITLE RUN [RUN ...] --command WORDS --hardware WORDS [--commit HASH]
                                [--note WORDS] [--picture FILE.svg]

writes results/NAME.json in the form docs/make_results.py reads; nothing in it is typed by hand but title, command,
hardware and note.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RADII = ((36 / 255, "36/255"), (72 / 255, "72/255"), (108 / 255, "108/255"), (0.5, "0.5"), (1.0, "1"))
COLUMNS = [
    "network",
    "clean %",
    *(f"certified @{name} %" for _, name in RADII),
    *(f"attacked @{name} %" for _, name in RADII[:1] + RADII[3:4]),
    "AUC",
    "body bound",
    "parameters",
    "training min",
    "epochs",
]


def at(points: list[dict[str, float]] | None, radius: float) -> str:
    """The accuracy at a radius, in per cent."""
    for point in points or []:
        if abs(point["epsilon"] - radius) < 1e-9:
            return f"{100 * point['accuracy']:.2f}"
    return "not measured"


def row(run: Path) -> list[str]:
    """One network."""
    import yaml

    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    lift = yaml.safe_load((run / "checkpoint" / "config.yaml").read_text(encoding="utf-8"))["model"]["config"]["lift"]
    bound = metrics["lipschitz_bound"]
    return [
        f"{metrics['model']} (lift: {lift})",
        f"{100 * metrics['clean_accuracy']:.2f}",
        *(at(metrics["certified_accuracy"], radius) for radius, _ in RADII),
        *(at(metrics["robust_accuracy"], radius) for radius, _ in RADII[:1] + RADII[3:4]),
        f"{metrics['auc']:.3f}",
        "none" if bound is None else f"{bound:.5g}",
        f"{metrics['parameters']:,}",
        f"{metrics['train_seconds'] / 60:.1f}",
        f"{metrics['epochs']:.1f}",
    ]


def draw(run: Path, file: Path) -> None:
    """The accuracy curves of a run as SVG."""
    from dynablocks.reporting.figures import robustness_figure
    from dynablocks.run_directory.metrics import stored_curves

    figure = robustness_figure(stored_curves(run))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("title")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--commit", default=None, help="the commit the runs were made with; the present one by default")
    parser.add_argument("--command", required=True, help="the command of the first run, as typed")
    parser.add_argument("--note", default="", help="what else a reader must know")
    parser.add_argument("--picture", type=Path, default=None, help="also draw the first run's curves here")
    options = parser.parse_args()
    first = json.loads((options.runs[0] / "metrics.json").read_text(encoding="utf-8"))
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    table = {
        "title": options.title,
        "caption": f"Clean and certified: all {first['test_images']} test images. Attacked: the worst of the losses of "
        f"ℓ2-PGD on the first {first['attacked_images']}. One seed. {options.note}".strip(),
        "columns": COLUMNS,
        "rows": [row(run) for run in options.runs],
        "command": options.command,
        "preset": first["preset"],
        "data": first["dataset"],
        "seed": first["seed"],
        "hardware": options.hardware,
        "commit": options.commit or head.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    path = ROOT / "results" / f"{options.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.picture is not None:
        draw(options.runs[0], options.picture)


if __name__ == "__main__":
    main()
