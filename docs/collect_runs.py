"""Make one results table (and optionally a picture) from finished run directories.

    python docs/collect_runs.py NAME TITLE RUN [RUN ...] --command WORDS --hardware WORDS [--commit HASH]
                                [--note WORDS] [--picture FILE.svg]

writes results/NAME.json in the form docs/make_results.py reads; nothing in it is typed by hand but title, command,
hardware and note. A "note" and a "readme" that were written into that file by hand stay. The runs are of one data set,
tested on the same images. What is certified is rounded down, and a bound up.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynablocks.errors import DynablocksError, InvalidArgument
from dynablocks.experiments.provenance import commit
from dynablocks.files import read_json, write_text
from dynablocks.reporting import words

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
WRITTEN_BY_HAND = ("note", "readme")
ALIKE = ("dataset", "test_images")


def percent(accuracy: float | None) -> str:
    """An accuracy in per cent, where it was measured."""
    return "not measured" if accuracy is None else f"{100 * accuracy:.2f}"


def proved(accuracy: float | None) -> str:
    """The same of a share that is certified: no more than is."""
    return words.proved_percent(accuracy, 2).removesuffix(" %")


def at(points: list[dict[str, float]] | None, radius: float, write: Callable[[float | None], str]) -> str:
    """The accuracy at a radius, in per cent."""
    return write(next((p["accuracy"] for p in points or [] if abs(p["epsilon"] - radius) < 1e-9), None))


def bound_of(metrics: dict[str, Any]) -> str:
    """The bound of the body of a certified run."""
    if metrics["certified_accuracy"] is None:
        return "not measured"
    bound = metrics["lipschitz_bound"]
    return "none" if bound is None else words.bound(bound)


def row(run: Path, metrics: dict[str, Any]) -> list[str]:
    """One network."""
    import yaml

    lift = yaml.safe_load((run / "checkpoint" / "config.yaml").read_text(encoding="utf-8"))["model"]["config"]["lift"]
    return [
        f"{metrics['model']} (lift: {lift})",
        # Without a certificate it is that of the attacked images alone.
        percent(None if metrics["test_images"] is None else metrics["clean_accuracy"]),
        *(at(metrics["certified_accuracy"], radius, proved) for radius, _ in RADII),
        *(at(metrics["robust_accuracy"], radius, percent) for radius, _ in RADII[:1] + RADII[3:4]),
        "not measured" if metrics["auc"] is None else f"{metrics['auc']:.3f}",
        bound_of(metrics),
        f"{metrics['parameters']:,}",
        f"{metrics['train_seconds'] / 60:.1f}",
        f"{metrics['epochs']:.1f}",
    ]


def each(runs: list[dict[str, Any]], name: str, joint: str = ", ") -> str:
    """What the runs have under a name, each once; nothing where none of them has it."""
    return joint.join(dict.fromkeys(str(run[name]) for run in runs if run[name] is not None))


def caption(runs: list[dict[str, Any]], note: str) -> str:
    """What was measured on which images, and the seeds."""
    tested, attacked, seeds = each(runs, "test_images"), each(runs, "attacked_images", " or "), each(runs, "seed")
    sentences = [
        f"Clean and certified: all {tested} test images." if tested else "",
        f"Attacked: the worst of the losses of ℓ2-PGD on the first {attacked}." if attacked else "",
        f"Seeds {seeds}." if "," in seeds else "One seed.",
        note,
    ]
    return " ".join(filter(None, sentences))


def draw(run: Path, file: Path) -> None:
    """The accuracy curves of a run as SVG."""
    from dynablocks.reporting.figures import robustness_figure
    from dynablocks.run_directory.metrics import stored_curves

    figure = robustness_figure(stored_curves(run))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight")


def write_table(options: argparse.Namespace) -> None:
    """Write results/NAME.json.

    Raises:
        InvalidArgument: the runs are of several data sets, or tested on other images or another number of them.
        DynablocksError: a run has no figures, or the file cannot be written.
    """
    runs = [read_json(run / "metrics.json") for run in options.runs]
    for name in ALIKE:
        if len({run[name] for run in runs} - {None}) > 1:
            raise InvalidArgument(f"the runs differ in {name}: {each(runs, name)}; make a table of each.")
    known = [run for run in runs if run.get("fingerprint") is not None]  # figures of older versions name no images
    if len({run["fingerprint"] for run in known}) > 1:
        raise InvalidArgument(f"the runs differ in fingerprint: {each(known, 'fingerprint')}; make a table of each.")
    path = ROOT / "results" / f"{options.name}.json"
    earlier = read_json(path) if path.exists() else {}
    table = {
        "title": options.title,
        "caption": caption(runs, options.note),
        "columns": COLUMNS,
        "rows": [row(run, metrics) for run, metrics in zip(options.runs, runs, strict=True)],
        "command": options.command,
        "preset": each(runs, "preset"),
        "data": each(runs, "dataset"),
        "seed": each(runs, "seed"),
        "hardware": options.hardware,
        "commit": options.commit or commit() or "unknown",
        "date": datetime.date.today().isoformat(),
    } | {name: earlier[name] for name in WRITTEN_BY_HAND if name in earlier}
    write_text(path, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("title")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--commit", default=None, help="the commit the runs were made with; the present one by default")
    parser.add_argument("--command", required=True, help="the command of the first run, as typed")
    parser.add_argument("--note", default="", help="what else a reader must know")
    parser.add_argument("--picture", type=Path, default=None, help="also draw the first run's curves here")
    options = parser.parse_args(arguments)
    try:
        write_table(options)
        if options.picture is not None:
            draw(options.runs[0], options.picture)
    except KeyError as error:
        print(f"error: the metrics of a run lack {error}; run dynablocks report on it again.", file=sys.stderr)
        return 2
    except (DynablocksError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
