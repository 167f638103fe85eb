"""Certified accuracy in the same minutes: ours and the layers of orthogonium, deel-torchlip and CPL, in one job.

    python benchmarks/certified/run.py --data-dir CIFAR10 --out WORK --peers PEERS --search 2
    python benchmarks/certified/run.py --data-dir CIFAR10 --out TRIALS --peers PEERS --entries aoc --minutes 3 \
        --held-out 5000 --set lr=0.05

The first makes the whole table, in hours. CIFAR10 is a copy of the data, WORK a new folder. Entries run one after the
other, each trained for the same wall-clock minutes by the same loop with the same batches and augmentation (those of
our preset), on all CPU threads or the GPU; the loss is offset cross-entropy, its offset and temperature the peer's or
ours, see SEARCH. Every entry leaves WORK/NAME/result.json and is skipped when that is there; an interrupted training
goes on. --page FILE holds the results too: with it a table is made in several sittings on machines of one kind,
whatever became of WORK; its "title" and a "note" may be changed by hand and stay. With --search, each peer is first
trained for so many minutes with each change of SEARCH (in WORK/search), on held-out training images, and takes the best
one. With --held-out, such images are measured in place of the test images: the way to choose settings by hand.

Needs for the peers (their dependencies would bring another torch and torchvision):
pip install --no-deps --target PEERS orthogonium==0.0.4 deel-torchlip==1.0.5 einops, and --peers PEERS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.parametrize

from dynablocks.config import RunConfig, preset_settings
from dynablocks.data import DataSplits, ImageDataset, load_data, to_unit_range
from dynablocks.errors import DynablocksError, InvalidArgument, unknown_name
from dynablocks.experiments.provenance import commit, device_name
from dynablocks.files import read_json, write_json
from dynablocks.models import MODELS, ModelConfig
from dynablocks.pipeline import build_for, certify_run, load, train_run
from dynablocks.progress import progress_bar
from dynablocks.robustness import certified_radii, certify
from dynablocks.robustness.rounding import full_precision
from dynablocks.training import TrainingConfig, TrainingSummary, fit
from dynablocks.training.precision import present_device

sys.path.insert(0, str(Path(__file__).parent))
from peers import FAMILIES, explained, sound_bound

RADII = (36, 72, 108, 255)
FAMILY_SIZES = ("width", "depth", "stem", "dense")
FIXED = {"epochs", "max_minutes", "seed", "validate_every"}
"""Settings of the training that --set cannot change: the budget ends it, --seed and --held-out say the rest."""
COMMON: dict[str, Any] = {
    "schedule": "one-cycle",
    "loss": "offset-cross-entropy",
    "offset": 2 * 2**0.5 * 36 / 255,
    "temperature": 0.25,
}
"""What all peers share: the loss of "1-Lipschitz Layers Compared"; the augmentation is that of our preset."""

_ADAM: dict[str, Any] = {"optimiser": "adam", "lr": 0.003}
_OUR_FRAME: dict[str, Any] = {"stem": 4, "width": 64}
_OUR_LOSS: dict[str, Any] = {"offset": 0.6, "temperature": 0.35}
_OUR_TAIL: dict[str, Any] = {"stem": 4, "dense": 3, "batch_size": 512}
SEARCH: tuple[dict[str, Any], ...] = (
    {},
    _ADAM,
    _ADAM | _OUR_LOSS,
    _ADAM | _OUR_LOSS | _OUR_FRAME,
    _ADAM | _OUR_LOSS | _OUR_TAIL,
    _ADAM | _OUR_LOSS | _OUR_FRAME | _OUR_TAIL,
)
"""What --search tries for each peer, over its own recipe: all that helped our network and is no part of its layers."""
HELD_OUT = 5000


def shares(radii: torch.Tensor) -> dict[str, float]:
    """Percentage of images certified at each radius, in 255ths."""
    return {str(r): round(100 * float((radii > r / 255).double().mean()), 2) for r in RADII}


def train_peer(
    name: str, splits: DataSplits, measured: ImageDataset, args: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    """Train one family for the budget; measure it by its own claim and by our bound."""
    changes = dict(args.set)
    family = FAMILIES[name]
    sizes = {k: changes.pop(k) for k in FAMILY_SIZES if k in changes}
    if "depth" in sizes:
        sizes["depth"] = tuple(sizes["depth"])
    family = replace(family, **sizes)
    augmentation = crop(args) | {"flip": our_settings(args)["training"]["flip"]}
    settings = COMMON | family.settings() | augmentation | changes
    mean = (splits.train.images[:10000].double().mean((0, 2, 3)) / 255).float()
    model = family.build(splits.train.image_shape, splits.train.num_classes, mean, args.seed)
    config = TrainingConfig(**settings, epochs=None, max_minutes=args.minutes, seed=args.seed, validate_every=10**6)
    described = {"family": name, "width": family.width, "depth": list(family.depth), "stem": family.stem}
    described |= {"dense": family.dense}
    summary = fit(model, splits, config, directory, describe=described)
    # Layers of orthogonium move their kernels at each use, by rounding; cached, the kernels bounded are those applied.
    with torch.no_grad(), full_precision(), torch.nn.utils.parametrize.cached():
        bound, logits = sound_bound(model.eval()), outputs(model, measured)
    head = model.head.effective_weight().detach()
    own = certified_radii(logits, head, 1.0, labels=measured.labels)
    sound = certified_radii(logits, head, bound, labels=measured.labels)
    facts = {"source": family.source, "settings": described | settings, "own_bound": 1.0, "bound": bound}
    return facts | measures(model, summary, logits.argmax(1) == measured.labels, own, sound)


@torch.no_grad()
def outputs(model: torch.nn.Module, measured: ImageDataset) -> torch.Tensor:
    """Logits of all images, as float64 numbers from the arithmetic the model was trained in (float32)."""
    device = next(model.parameters()).device
    model.eval()
    parts = [model(to_unit_range(images.to(device))).cpu() for images in torch.split(measured.images, 256)]
    return torch.cat(parts).double()


def train_ours(
    name: str, splits: DataSplits, measured: ImageDataset, args: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    """Train the preset's network for the budget; certify it with the proven rounding bound of float64."""
    run = our_config(args)
    summary = train_run(run, directory)
    model, description = load(directory), build_for(run, splits)[1]
    if args.held_out:
        model = model.to(present_device("auto"))
        with progress_bar(f"certifying {len(measured)} images") as update:
            result = certify(model, measured, progress=update)
    else:
        result = certify_run(directory)
    radii = torch.where(result.correct, result.radii, 0.0)
    facts = {"source": "dynablocks", "settings": json.loads(json.dumps(description)), "bound": result.body_lipschitz}
    return facts | {"own_bound": result.body_lipschitz} | measures(model, summary, result.correct, radii, radii)


def our_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The preset's model and training; the augmentation is that of every entry."""
    return preset_settings(args.preset, "certified", "cifar10")


def our_config(args: argparse.Namespace) -> RunConfig:
    """The preset for this budget, with the changes asked for."""
    chosen = our_settings(args)
    sizes = {field.name for field in fields(ModelConfig)}
    model = chosen["model"] | {k: tuple(v) if isinstance(v, list) else v for k, v in args.set.items() if k in sizes}
    training = chosen["training"] | {k: v for k, v in args.set.items() if k not in sizes}
    training |= {"epochs": None, "max_minutes": args.minutes, "seed": args.seed, "validate_every": 10**6}
    base = RunConfig(preset=args.preset, model=ModelConfig("certified", **model), training=TrainingConfig(**training))
    return replace(base, data=replace(base.data, dir=args.data_dir, validation=args.held_out))


def measures(
    model: torch.nn.Module, summary: TrainingSummary, correct: torch.Tensor, own: torch.Tensor, sound: torch.Tensor
) -> dict[str, Any]:
    """What every entry reports."""
    return {
        "clean": round(100 * float(correct.double().mean()), 2),
        "own": shares(own),
        "certified": shares(sound),
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_second": round(summary.images_per_second),
        "epochs": round(summary.epochs, 2),
        "train_minutes": round(summary.train_seconds / 60, 2),
        "train_accuracy": round(100 * summary.metrics.get("accuracy", float("nan")), 2),
        "precision": summary.precision,
        "device": summary.device,
    }


def label(name: str, args: argparse.Namespace) -> str:
    """The entry's folder: its name, seed, and what was changed."""
    changes = "".join(f"-{k}={json.dumps(v)}".replace(" ", "") for k, v in sorted(args.set.items()))
    return f"{name}-{args.seed}{changes}"


COLUMNS = ["network", "seeds", "clean", *(f"certified @{r}" for r in RADII), "own claim @36", "sound bound"]
COLUMNS += ["images/s", "epochs", "parameters"]


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of :data:`COLUMNS` for each network, best certified first; of several seeds the mean ± deviation."""
    networks: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        networks.setdefault(result["name"].replace(f"-{result['seed']}", "", 1), []).append(result)
    order = sorted(networks, key=lambda name: -statistics.mean(r["certified"]["36"] for r in networks[name]))
    return [[name, str(len(networks[name])), *_cells(networks[name])] for name in order]


def _cells(seeds: list[dict[str, Any]]) -> list[str]:
    certified = [[r["certified"][str(radius)] for r in seeds] for radius in RADII]
    shown = [[r["clean"] for r in seeds], *certified, [r["own"]["36"] for r in seeds]]
    rates, epochs = [r["images_per_second"] for r in seeds], [r["epochs"] for r in seeds]
    bound = f"{max(r['bound'] for r in seeds):.5f}"
    rate, passes = f"{statistics.mean(rates):.0f}", f"{statistics.mean(epochs):.1f}"
    return [*map(_spread, shown), bound, rate, passes, f"{seeds[0]['parameters']:,}"]


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown of :func:`rows`."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, *rows(results))]
    return "\n".join([lines[0], "|---" * len(COLUMNS) + "|", *lines[1:]])


FORMATS = {"32": "float32", "bf16": "mixed bfloat16", "16": "mixed float16"}


WRITTEN_BY_HAND = ("title", "note", "readme")


def as_page(
    results: list[dict[str, Any]], minutes: float, preset: str = "certified/cpu-1h", earlier: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """What ``docs/make_results.py`` reads: the rows and how they were made; title and note as on the earlier page."""
    images = sorted({f"{r['images']} {r['measured']} images" for r in results})
    formats = sorted({f"{FORMATS[r['precision']]} on {r['device']}" for r in results})
    caption = (
        f"Clean and certified accuracy (%) on {', '.join(images)}, each network trained for {minutes:g} minutes by "
        f"the same loop on the same batches, one after the other ({', '.join(formats)}). certified: with our sound "
        "bound of the body, of ours with its proven rounding too; own claim: with the constant 1 the layer claims. "
        "Several seeds: mean ± standard deviation."
    )
    searched = [r for r in results if r["search"]]
    names = sorted({r["name"].replace(f"-{r['seed']}", "", 1) for r in searched})
    each = max((r["search"]["minutes"] for r in searched), default=0.0)
    if searched:
        counts = sorted({len(r["search"]["tried"]) for r in searched})
        caption += (
            f" {', '.join(names)}: the best of {' or '.join(map(str, counts))} settings (sizes, "
            f"optimiser, loss, batches), chosen by {each:g}-minute trainings on {HELD_OUT} held-out training images."
        )
    command = f"python benchmarks/certified/run.py --data-dir CIFAR10 --out WORK --peers PEERS --minutes {minutes:g}"
    command += f" --preset {preset}" + (f" --search {each:g}" if searched else "")
    origin = {
        "seed": sorted({r["seed"] for r in results}),
        "data": sorted({r["data"] for r in results}),
        "hardware": sorted({r["hardware"] for r in results}),
        "commit": sorted({r["commit"] for r in results}),
        "date": sorted({r["started"][:10] for r in results}),
    }
    return {
        "title": f"1-Lipschitz networks, {minutes:g} minutes of training each",
        "readme": True,
        "caption": caption,
        "columns": COLUMNS,
        "rows": rows(results),
        "command": command,
        "preset": preset,
        **{name: ", ".join(map(str, values)) for name, values in origin.items()},
        "entries": results,
    } | {name: earlier[name] for name in WRITTEN_BY_HAND if name in earlier}


def kept_entries(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The results that the page holds from earlier sittings, by name.

    Raises:
        InvalidArgument: they were made with other minutes or on another machine, or the page has rows alone.
    """
    if args.page is None or not args.page.exists():
        return {}
    page = read_json(args.page)
    if "entries" not in page:
        raise InvalidArgument(f"{args.page} has no entries to add to, only their table; name another file.")
    for result in page["entries"]:
        require_same(args.page, result, args, hardware=device_name())
    return {result["name"]: result for result in page["entries"]}


def assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as JSON or as text."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the CIFAR-10 copy")
    parser.add_argument("--out", type=Path, required=True, help="a folder for trainings and results")
    parser.add_argument("--minutes", type=float, default=60.0, help="training minutes of each entry")
    parser.add_argument("--entries", nargs="+", default=["ours", *FAMILIES], choices=["ours", *FAMILIES])
    parser.add_argument("--preset", default="certified/cpu-1h", help="our preset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--search", type=float, default=0.0, help="minutes for each change tried for a peer; 0: none")
    parser.add_argument("--held-out", type=int, default=0, help="training images to hold out and measure instead")
    parser.add_argument("--peers", type=Path, help="folder with orthogonium, deel and einops")
    parser.add_argument("--page", type=Path, help="add to the table in this file, for docs/make_results.py")
    parser.add_argument("--set", type=assignment, nargs="*", default=[], help="NAME=VALUE changes, for a search")
    args = parser.parse_args()
    args.set = dict(args.set)
    training = {field.name for field in fields(TrainingConfig)} - FIXED
    model = {field.name for field in fields(ModelConfig)} - {"name"}
    for entry in args.entries:
        allowed = training | (set(FAMILY_SIZES) if entry != "ours" else model)
        for name in args.set.keys() - allowed:
            raise unknown_name(f"setting of {entry}", name, sorted(allowed))
    return args


def result_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one entry, or read what is there."""
    path = args.out / label(name, args) / "result.json"
    if not path.exists():
        searched = best_change(name, args) if args.search and name != "ours" else {}
        chosen = argparse.Namespace(**vars(args) | {"set": args.set | searched.get("chosen", {})})
        splits = load_data("cifar10", args.data_dir, args.held_out, args.seed)
        measured = splits.validation if args.held_out else splits.test
        started = time.strftime("%Y-%m-%d %H:%M")
        result = (train_ours if name == "ours" else train_peer)(name, splits, measured, chosen, path.parent)
        facts = {"name": label(name, args), "seed": args.seed, "minutes": args.minutes, "data": splits.train.name}
        facts |= {"measured": "held-out" if args.held_out else "test", "images": len(measured), "started": started}
        facts |= crop(args)
        facts |= {"preset": args.preset, "search": searched, "commit": commit(), "hardware": device_name()}
        write_json(path, facts | result)
        print(table([read_json(path)]), flush=True)
    result = read_json(path)
    require_same(path, result, args)
    return result


def require_same(path: Path, result: dict[str, Any], args: argparse.Namespace, **also: Any) -> None:
    """Refuse a result that was made otherwise than ``args`` ask for, or does not say how.

    Ours of an earlier preset stays on a page when its name and its source ("dynablocks at COMMIT") are changed by hand.

    Raises:
        InvalidArgument: naming the first difference.
    """
    asked = {"minutes": args.minutes, "measured": "held-out" if args.held_out else "test", "preset": args.preset}
    asked |= crop(args) | also
    made = {"crop_fill": "zeros"} | result  # there was no other when the first results were written
    if result["source"] == "dynablocks":
        if "=" not in result["name"]:
            asked |= as_named(our_config(argparse.Namespace(**vars(args) | {"set": {}})))
            made |= {f"model.{name}": value for name, value in result["settings"]["config"].items()}
    elif not result["source"].startswith("dynablocks") and set(args.entries) - {"ours"}:
        searched = result.get("search") or {}
        made |= {
            "search": searched.get("minutes", 0.0),
            "changes searched": [t["change"] for t in searched.get("tried", [])],
        }
        asked |= {"search": args.search, "changes searched": list(SEARCH) if args.search else []}
    for name, wanted in asked.items():
        if made.get(name) != wanted:
            raise InvalidArgument(
                f"{path} holds {result['name']} with {name} {made.get(name, 'not recorded')!r}, asked for is "
                f"{wanted!r}; one table compares equals, so name another file or folder."
            )


def crop(args: argparse.Namespace) -> dict[str, Any]:
    """The random crop of the preset, which is that of every entry."""
    training = our_config(argparse.Namespace(**vars(args) | {"set": {}})).training
    return {"crop_padding": training.crop_padding, "crop_fill": training.crop_fill or "zeros"}


def as_named(config: RunConfig) -> dict[str, Any]:
    """The settings of the network as a result has them, by name."""
    complete = config.model.completed(MODELS[config.model.name].defaults)
    return {f"model.{name}": value for name, value in json.loads(json.dumps(asdict(complete))).items()}


def best_change(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The change of SEARCH with which a family certifies most held-out images at 36/255, and what all of them gave."""
    tried = []
    for change in SEARCH:
        changes = {"set": args.set | change, "out": args.out / "search", "minutes": args.search}
        short = argparse.Namespace(**vars(args) | changes | {"held_out": HELD_OUT, "search": 0.0})
        result = result_of(name, short)
        tried.append({"change": change, "clean": result["clean"], "certified": result["certified"]["36"]})
    return {"chosen": max(tried, key=lambda t: t["certified"])["change"], "minutes": args.search, "tried": tried}


def main() -> None:
    """Run what is missing, print the table of what is there."""
    args = parse()
    if args.peers:
        sys.path.append(str(args.peers))
    kept = kept_entries(args)
    for name in set(args.entries) - {"ours"}:
        # A missing package is found out now, and not after an hour of ours.
        FAMILIES[name].build((3, 32, 32), 10, torch.zeros(3), args.seed)
    for name in args.entries:
        if label(name, args) not in kept:
            result_of(name, args)
            write_page(args, kept)
    print(table(write_page(args, kept)))


def write_page(args: argparse.Namespace, kept: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The results so far, those of earlier sittings first, which the page then holds; so after every entry."""
    here = [read_json(path) for path in sorted(args.out.glob("*/result.json"))]
    for result in here:
        require_same(args.out, result, args)
    results = list((dict(kept) | {result["name"]: result for result in here}).values())
    if args.page:
        earlier = read_json(args.page) if args.page.exists() else {}
        write_json(args.page, as_page(results, args.minutes, args.preset, earlier))
    return results


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
    except (DynablocksError, ModuleNotFoundError) as error:
        sys.exit(explained(error))
