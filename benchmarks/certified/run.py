"""Certified accuracy in the same minutes: ours, the layers of orthogonium and deel-torchlip, CPL and SOC, in one job.

    python benchmarks/certified/run.py --data-dir CIFAR10 --out WORK --peers PEERS --search 1
    python benchmarks/certified/run.py --data-dir CIFAR10 --out TRIALS --peers PEERS --entries aoc --minutes 3 \
        --held-out 5000 --set lr=0.05

The first makes the whole table, in hours. CIFAR10 is a copy of the data, WORK a new folder. Entries run one after the
other, each trained for the same wall-clock minutes by the same loop on the same images with the same augmentation
(that of our preset; the batch size is each one's own), on all CPU threads or the GPU; the loss is the peer's or ours,
see peers.py and SEARCH. Every entry leaves WORK/NAME/result.json and is skipped when that is there; an interrupted
training goes on. Beside it lie the radii of all images, for compare.py, and origin.json: when, by which commit and on
which machine the training was begun. A result keeps these when it is finished at another commit. --page FILE
holds the results too: with it a table is made in several sittings on machines of one kind,
whatever became of WORK; its "title" and a "note" may be changed by hand and stay. With --search M, each peer is first
trained on held-out training images: for M minutes with each change of SEARCH and those that are for it alone
(changes_of), then for LONGER times as many with the best of these and the largest network (finalists), then with other
learning rates (RATES), in WORK/search-MINUTES; it takes the best of the longer trials. What --set says holds in all of
them. With --teacher M, an entry is taught: M of its minutes go to an ordinary network (dynablocks train --model
convnet), which softens the labels of its training images, and the time of these predictions is taken off, too; its
name says so. Trials of a search are not taught. With --held-out, such images are measured in place of the test
images: the way to choose settings by hand.

Needs for the peers (their dependencies would bring another torch and torchvision):
pip install --no-deps --target PEERS orthogonium==0.0.4 deel-torchlip==1.0.5 einops, and --peers PEERS.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.parametrize
from safetensors.torch import save_file

from dynablocks.config import DataConfig, RunConfig, preset_settings
from dynablocks.data import DataSplits, ImageDataset, load_data, to_unit_range
from dynablocks.errors import Diverged, DynablocksError, InvalidArgument, require_range, unknown_name
from dynablocks.experiments.provenance import commit, device_name
from dynablocks.files import held, is_number, read_json, write_atomically, write_json
from dynablocks.models import MODELS, ModelConfig
from dynablocks.progress import progress_bar
from dynablocks.reporting.tables import markdown_table
from dynablocks.robustness import certified_radii, certify
from dynablocks.robustness.arithmetic import full_precision
from dynablocks.run_directory.beginning import TeacherLabels, keep_labels, teacher_labels
from dynablocks.run_directory.network import build_for, load, weights_hash
from dynablocks.run_directory.pipeline import certify_run, train_run
from dynablocks.training import LOSSES, TrainingConfig, TrainingSummary, fit
from dynablocks.training.checkpoint import has_checkpoint
from dynablocks.training.precision import present_device

sys.path.insert(0, str(Path(__file__).parent))
from peers import ADAM, FAMILIES, OUR_LOSS, Family, explained, lse_hkr, sound_bound

RADII = (36, 72, 108, 255)
RADII_FILE = "radii.safetensors"
ORIGIN_FILE = "origin.json"
ORIGIN = ("started", "commit", "hardware")
"""A file beside a training, and what it says of how that was begun."""
FAMILY_SIZES = ("width", "depth", "stem", "dense", "inner")
FIXED = {"epochs", "max_minutes", "seed", "validate_every"}
"""Settings of the training that --set cannot change: the budget ends it, --seed and --held-out say the rest."""
COMMON: dict[str, Any] = {
    "schedule": "one-cycle",
    "loss": "offset-cross-entropy",
    "offset": 2 * 2**0.5 * 36 / 255,
    "temperature": 0.25,
}
"""What a peer has where its own recipe says nothing: the loss of "1-Lipschitz Layers Compared"."""

_OUR_FRAME: dict[str, Any] = {"stem": 4, "width": 64}
_OUR_TAIL: dict[str, Any] = {"stem": 4, "dense": 3, "batch_size": 512}
SEARCH: tuple[dict[str, Any], ...] = (
    {},
    ADAM,
    ADAM | OUR_LOSS,
    ADAM | OUR_LOSS | _OUR_FRAME,
    ADAM | OUR_LOSS | _OUR_TAIL,
    ADAM | OUR_LOSS | _OUR_FRAME | _OUR_TAIL,
)
"""What --search tries for each peer, over its own recipe: all that helped our network and is no part of its layers."""
OUR_SIZES: dict[str, Any] = (
    ADAM | {"lr": 0.005} | OUR_LOSS | _OUR_FRAME | _OUR_TAIL | {"depth": [4, 4, 0], "inner": 0.5, "dense": 6}
)
"""And for layers of the kind of ours, steps along so many rows: the sizes and the rate of our presets."""
FINALISTS, LONGER = 3, 4
"""The best so many of these are tried again for so many times the minutes, and the largest network with them, since
short trials prefer networks that begin fast."""
RATES = (1 / 3, 3.0)
"""And then the best of those with its learning rate times each of these numbers, as long."""
HELD_OUT = 5000
EARLIER = re.compile(r" at [0-9a-f]{7,40}$")
"""How the source of a result ends that is kept by hand: made by the code and the search of that commit."""


def shares(radii: torch.Tensor) -> dict[str, float]:
    """Percentage of images certified at each radius, in 255ths."""
    return {str(r): round(100 * float((radii > r / 255).double().mean()), 2) for r in RADII}


def train_peer(
    name: str, splits: DataSplits, measured: ImageDataset, args: argparse.Namespace, directory: Path
) -> dict[str, Any]:
    """Train one family for the budget; measure it by its own claim and by our bound."""
    family, settings, config = peer_config(name, args)
    teacher, labels = taught(splits, args, directory, config.flip)
    if labels is not None:
        config = replace(config, max_minutes=minutes_left(args, labels))
    mean = (splits.train.images[:10000].double().mean((0, 2, 3)) / 255).float()
    model = family.build(splits.train.image_shape, splits.train.num_classes, mean, args.seed)
    described = {"family": name, "width": family.width, "depth": list(family.depth), "stem": family.stem}
    described |= {"dense": family.dense, "inner": family.inner, "source": family.source}
    soft = None if labels is None else labels.mixed(splits.train.labels, RunConfig.teacher_share)
    origin = {} if teacher is None else {"teacher": weights_hash(teacher), "teacher_share": RunConfig.teacher_share}
    summary = fit(model, splits, config, directory, describe=described | origin, soft_labels=soft)
    # Layers of orthogonium move their kernels at each use, by rounding; cached, the kernels bounded are those applied.
    with torch.no_grad(), full_precision(), torch.nn.utils.parametrize.cached():
        bound, logits = sound_bound(model.eval()), outputs(model, measured)
    head = model.head.effective_weight().detach()
    own = certified_radii(logits, head, 1.0, labels=measured.labels)
    sound = certified_radii(logits, head, bound, labels=measured.labels)
    keep_radii(directory, own, sound)
    facts = {"source": family.source, "settings": described | settings, "own_bound": 1.0, "bound": bound}
    facts |= about_teacher(labels, splits, args)
    return facts | measures(model, summary, logits.argmax(1) == measured.labels, own, sound)


def taught(
    splits: DataSplits, args: argparse.Namespace, directory: Path, flip: bool
) -> tuple[Path | None, TeacherLabels | None]:
    """The teacher that --teacher asks for and what it says of the training images; trained and asked where it is not.

    One teacher serves all entries of a seed; what it cost is counted for each.

    Args:
        splits: the images.
        args: the command line.
        directory: of the entry, which keeps what the teacher says.
        flip: whether the entry's training mirrors images.
    """
    if not args.teacher:
        return None, None
    teacher = args.out / f"teacher-{args.teacher:g}-{args.seed}"
    settings = preset_settings("cpu", "convnet", "cifar10")["training"]
    training = TrainingConfig(**settings | {"max_minutes": args.teacher, "seed": args.seed, "validate_every": 10**6})
    data = DataConfig(dir=args.data_dir, validation=args.held_out)
    train_run(RunConfig(model=ModelConfig("convnet"), training=training, data=data), teacher, splits=splits)
    run, origin = unchanged(args), {"teacher": weights_hash(teacher)}
    run = replace(run, teacher=teacher, training=replace(run.training, flip=flip))
    labels = teacher_labels(run, splits, directory, origin)
    keep_labels(labels, run, splits, directory, origin)
    return teacher, labels


def minutes_left(args: argparse.Namespace, labels: TeacherLabels) -> float:
    """What a teacher leaves of the budget.

    Raises:
        InvalidArgument: nothing.
    """
    left = args.minutes - labels.seconds / 60
    if left <= 0:
        raise InvalidArgument(
            f"--teacher {args.teacher:g} and its predictions took {labels.seconds / 60:.3g} of {args.minutes:g} "
            "minutes, which leaves none; give fewer."
        )
    return left


def about_teacher(labels: TeacherLabels | None, splits: DataSplits, args: argparse.Namespace) -> dict[str, Any]:
    """What a result says of its teacher: the minutes given to it, those it took, how many images it has right."""
    if labels is None:
        return {}
    right = (labels.probabilities.argmax(1) == splits.train.labels).double().mean()
    minutes = {"asked": args.teacher, "minutes": round(labels.seconds / 60, 2)}
    return {"teacher": minutes | {"share": RunConfig.teacher_share, "train_accuracy": round(100 * float(right), 2)}}


def peer_config(name: str, args: argparse.Namespace) -> tuple[Family, dict[str, Any], TrainingConfig]:
    """A family in the size asked for, what is set of its training, and its training for this budget."""
    changes = dict(args.set)
    sizes = {k: changes.pop(k) for k in FAMILY_SIZES if k in changes}
    for size, value in sizes.items():
        if size == "inner":
            continue  # a fraction, which Family checks
        numbers, least = value if size == "depth" else [value], 1 if size in ("width", "stem") else 0
        if not isinstance(numbers, list) or not numbers or any(type(n) is not int or n < least for n in numbers):
            wanted = "a list of whole numbers, one a stage, as [2,2,2]" if size == "depth" else "a whole number"
            raise InvalidArgument(f"{size} is {value!r}; {wanted} from {least} is needed.")
    if "depth" in sizes:
        sizes["depth"] = tuple(sizes["depth"])
    family = replace(FAMILIES[name], **sizes)
    augmentation = crop(args) | {"flip": unchanged(args).training.flip}
    settings = COMMON | family.settings() | augmentation | changes
    budget: dict[str, Any] = {"epochs": None, "max_minutes": args.minutes, "seed": args.seed, "validate_every": 10**6}
    return family, settings, TrainingConfig(**settings, **budget)


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
    teacher, labels = taught(splits, args, directory, run.training.flip)
    if labels is not None:
        run = replace(run, teacher=teacher, training=replace(run.training, max_minutes=minutes_left(args, labels)))
    summary = train_run(run, directory)
    model, description = load(directory), build_for(run, splits)[1]
    if args.held_out:
        model = model.to(present_device("auto"))
        with progress_bar(f"certifying {len(measured)} images") as update:
            result = certify(model, measured, progress=update)
    else:
        result = certify_run(directory)
    radii = torch.where(result.correct, result.radii, 0.0)
    keep_radii(directory, radii, radii.clone())
    facts = {"source": "dynablocks", "settings": json.loads(json.dumps(description)), "bound": result.body_lipschitz}
    facts |= about_teacher(labels, splits, args)
    return facts | {"own_bound": result.body_lipschitz} | measures(model, summary, result.correct, radii, radii)


def our_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The preset's model and training; the augmentation is that of every entry."""
    return preset_settings(args.preset, "certified", "cifar10")


def our_config(args: argparse.Namespace) -> RunConfig:
    """The preset for this budget, with the changes asked for."""
    chosen = our_settings(args)
    sizes = {field.name for field in fields(ModelConfig)}
    changed = {k: tuple(v) if isinstance(v, list) else v for k, v in args.set.items() if k in sizes}
    model = chosen.get("model", {}) | changed
    training = chosen["training"] | {k: v for k, v in args.set.items() if k not in sizes}
    training |= {"epochs": None, "max_minutes": args.minutes, "seed": args.seed, "validate_every": 10**6}
    base = RunConfig(preset=args.preset, model=ModelConfig("certified", **model), training=TrainingConfig(**training))
    return replace(base, data=replace(base.data, dir=args.data_dir, validation=args.held_out))


def keep_radii(directory: Path, own: torch.Tensor, sound: torch.Tensor) -> None:
    """Write the certified radius of every image, 0 where it is misclassified; compare.py pairs two networks by them."""
    content = {"own": own.double().contiguous(), "sound": sound.double().contiguous()}
    write_atomically(directory / RADII_FILE, lambda path: save_file(content, str(path)))


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
    """The entry's folder: its name, its seed, whether it was taught, and what was changed."""
    changes = "".join(f"-{k}={json.dumps(v)}".replace(" ", "") for k, v in sorted(args.set.items()))
    return f"{name}-{args.seed}{'-taught' if args.teacher else ''}{changes}"


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
    return markdown_table([dict(zip(COLUMNS, cells, strict=True)) for cells in rows(results)], COLUMNS)


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
        "the same loop on the same images with the same augmentation (the batch size is each network's own), one after "
        f"the other ({', '.join(formats)}). certified: with our sound bound of the body, of ours with its proven "
        "rounding too; own claim: with the constant 1 the layer claims. Several seeds: mean ± standard deviation."
    )
    searched = [r for r in results if r.get("search")]
    caption += how_searched(searched) if searched else ""
    if any("teacher" in r for r in results):
        caption += " taught: the minutes are those of its teacher, of asking that about each image, and its own."
    origin = {
        "seed": sorted({r["seed"] for r in results}),
        "data": sorted({r["data"] for r in results}),
        "hardware": sorted({r["hardware"] for r in results}),
        "commit": sorted({commits(r) for r in results}),
        "date": sorted({r["started"][:10] for r in results}),
    }
    return {
        "title": f"1-Lipschitz networks, {minutes:g} minutes of training each",
        "readme": False,
        "caption": caption,
        "columns": COLUMNS,
        "rows": rows(results),
        "command": command_of(results, minutes, preset),
        "preset": preset,
        **{name: ", ".join(map(str, values)) for name, values in origin.items()},
        "entries": results,
    } | {name: earlier[name] for name in WRITTEN_BY_HAND if name in earlier}


def command_of(results: list[dict[str, Any]], minutes: float, preset: str) -> str:
    """The command that makes a page; in brackets what only some of its results were made with."""
    searched = [r["search"].get("minutes", 0.0) for r in results if r.get("search")]
    held_out = max((r["images"] for r in results if r["measured"] == "held-out"), default=0)
    command = f"python benchmarks/certified/run.py --data-dir CIFAR10 --out WORK --peers PEERS --minutes {minutes:g}"
    command += f" --preset {preset}" + (f" --held-out {held_out}" if held_out else "")
    command += f" --search {max(searched):g}" if searched else ""
    lessons = sorted({r["teacher"]["asked"] for r in results if "teacher" in r})
    command += f" [--teacher {lessons[-1]:g}]" if lessons else ""
    command += " [--seed N]" if any(r["seed"] for r in results) else ""
    return command + (" [--entries NAME --set ...]" if any("=" in r["name"] for r in results) else "")


def how_searched(searched: list[dict[str, Any]]) -> str:
    """The sentences of the caption about the searches: one for all whose trials were of the same lengths."""
    groups: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    for result in searched:
        search = result["search"]
        lengths = {t.get("minutes", search.get("minutes", 0.0)) for t in search.get("tried", [])}
        groups.setdefault(tuple(sorted(lengths)), []).append(result)
    return "".join(_searched_alike(groups[lengths], lengths) for lengths in sorted(groups))


def _searched_alike(searched: list[dict[str, Any]], lengths: tuple[float, ...]) -> str:
    trials = " and ".join(f"{minutes:g}-minute" for minutes in lengths)
    sentence = (
        f" {'; '.join(searches(searched))} settings (sizes, optimiser, rate, loss, batches), chosen by {trials} "
        f"trainings on {HELD_OUT} held-out training images"
    )
    longer = f" (the longer ones of the best {FINALISTS} and the largest network, then of two other rates)"
    return sentence + (longer if len(lengths) > 1 else "") + "."


def searches(searched: list[dict[str, Any]]) -> list[str]:
    """Which networks are the best of how many different settings."""
    names: dict[int, list[str]] = {}
    for result in searched:
        name = result["name"].replace(f"-{result['seed']}", "", 1)
        settings = {json.dumps(t.get("change"), sort_keys=True) for t in result["search"].get("tried", [])}
        names.setdefault(len(settings), []).append(name)
    return [f"{', '.join(sorted(set(names[count])))}: the best of {count}" for count in sorted(names)]


def kept_entries(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The results that the page holds from earlier sittings, by name.

    Raises:
        InvalidArgument: they were made with other minutes or on another machine, or the page has rows alone.
    """
    entries = entries_of(args.page)
    for result in entries:
        require_same(args.page, result, args, hardware=hardware())
    return {result["name"]: result for result in entries}


def entries_of(page: Path | None) -> list[Any]:
    """The results on a page; none where there is no page.

    Raises:
        InvalidArgument: the page has rows alone.
    """
    if page is None or not page.exists():
        return []
    content = read_json(page)
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise InvalidArgument(f"{page} has no entries to add to, only their table; name another file.")
    entries: list[Any] = content["entries"]
    return entries


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
    parser.add_argument("--search", type=float, default=0.0, help="minutes of a peer's first trials; 0: no search")
    parser.add_argument(
        "--teacher", type=float, default=0.0, help="minutes of an entry's that a teacher takes; 0: none"
    )
    parser.add_argument("--held-out", type=int, default=0, help="training images to hold out and measure instead")
    parser.add_argument("--peers", type=Path, help="folder with orthogonium, deel and einops")
    parser.add_argument("--page", type=Path, help="add to the table in this file, for docs/make_results.py")
    text = "NAME=VALUE changes, for a search"
    parser.add_argument("--set", type=assignment, nargs="*", action="extend", default=[], help=text)
    args = parser.parse_args()
    args.set = dict(args.set)
    for name, least in (("minutes", 1e-6), ("search", 0), ("teacher", 0), ("held_out", 0), ("seed", 0)):
        require_range(f"--{name.replace('_', '-')}", getattr(args, name), least)
    training = {field.name for field in fields(TrainingConfig)} - FIXED
    model = {field.name for field in fields(ModelConfig)} - {"name"}
    for entry in args.entries:
        allowed = training | (set(FAMILY_SIZES) if entry != "ours" else model)
        for name in args.set.keys() - allowed:
            raise unknown_name(f"setting of {entry}", name, sorted(allowed))
        try:
            if entry == "ours":
                our_config(args)
            else:
                peer_config(entry, args)
        except InvalidArgument:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgument(
                f"{entry} cannot be made with {args.set} ({error}); give a list as widths=[64,128,256], see --help."
            ) from error
    return args


def result_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one entry, or read what is there."""
    path = args.out / label(name, args) / "result.json"
    if not path.exists():
        searched = best_change(name, args) if args.search and name != "ours" else {}
        chosen = argparse.Namespace(**vars(args) | {"set": searched.get("chosen", {}) | args.set})
        splits = load_data("cifar10", args.data_dir, args.held_out, args.seed)
        measured = splits.validation if args.held_out else splits.test
        asked = {"name": label(name, args), "fingerprint": splits.fingerprint}
        require_one_copy([*entries_of(args.page), *map(read_json, sorted(args.out.glob("*/result.json"))), asked])
        origin = origin_of(path.parent)
        result = (train_ours if name == "ours" else train_peer)(name, splits, measured, chosen, path.parent)
        facts = {"name": label(name, args), "seed": args.seed, "minutes": args.minutes, "data": splits.train.name}
        facts |= {"measured": "held-out" if args.held_out else "test", "images": len(measured)} | origin
        facts |= {"fingerprint": splits.fingerprint}
        facts |= {"finished_by": commit()} if commit() != origin["commit"] else {}
        facts |= crop(args) | {name: args.set[name] for name in crop(args) if name in args.set}
        facts |= {"preset": args.preset, "search": searched}
        write_json(path, facts | result)
        print(table([read_json(path)]), flush=True)
    result = read_json(path)
    require_same(path, result, args)
    return result


def hardware() -> str:
    """What the entries are trained on here."""
    return device_name(present_device("auto"))


def origin_of(directory: Path) -> dict[str, Any]:
    """When, by which commit and on which machine the training in a folder was begun.

    It is written before the training, which may go on or be measured again at another commit. Of a training without
    it nothing of this is known.

    Raises:
        InvalidArgument: the file was cut or edited.
    """
    path = directory / ORIGIN_FILE
    if not has_checkpoint(directory):  # so what is there tells of a training that came to nothing
        write_json(path, {"started": time.strftime("%Y-%m-%d %H:%M"), "commit": commit(), "hardware": hardware()})
    elif not path.exists():
        return {"started": "unknown", "commit": None, "hardware": "unknown"}
    origin = read_json(path)
    said = isinstance(origin, dict) and all(isinstance(origin.get(name), str) for name in ("started", "hardware"))
    if not said or not isinstance(origin.get("commit"), str | None):
        raise InvalidArgument(
            f"{path} does not say when, by which commit and on which machine the training was begun: it was cut or "
            "edited; write it again, or remove it where this is not known."
        )
    return {name: origin.get(name) for name in ORIGIN}


def commits(result: dict[str, Any]) -> str:
    """The commit that began the training of a network, and the one that finished or measured it where it is another."""
    trained: str = result.get("commit") or "unknown"
    return trained + (f" (finished by {result['finished_by'] or 'unknown'})" if "finished_by" in result else "")


def require_same(path: Path, result: dict[str, Any], args: argparse.Namespace, **also: Any) -> None:
    """Refuse a result that was made otherwise than ``args`` ask for, or does not say how.

    An earlier entry, ours or a peer's, stays on a page when its name is changed by hand and its source says at which
    commit it was made (:data:`EARLIER`): it is not held against today's preset, layers and search. An entry with --set,
    which its name tells, need not have been searched.

    Raises:
        InvalidArgument: naming the first difference.
    """
    require_whole(path, result)
    asked = {"minutes": args.minutes, "measured": "held-out" if args.held_out else "test", "preset": args.preset}
    asked |= {"images": args.held_out} if args.held_out else {}
    asked |= also if "crop" in result["name"] else crop(args) | also  # a trial of other crops says so in its name
    family = (result.get("settings") or {}).get("family")
    earlier = EARLIER.search(result["source"]) is not None and result["name"] != f"{family}-{result['seed']}"
    asked |= {"source": FAMILIES[family].source} if family in FAMILIES and not earlier else {}
    made = {"crop_fill": "zeros"} | result  # there was no other when the first results were written
    if args.teacher and "teacher" in result:
        asked, made = asked | {"teacher": args.teacher}, made | {"teacher": result["teacher"].get("asked")}
    if result["source"] == "dynablocks":
        if "=" not in result["name"]:
            asked |= as_named(unchanged(args))
            made |= {f"model.{name}": value for name, value in result["settings"]["config"].items()}
    elif not earlier and "=" not in result["name"] and set(args.entries) - {"ours"}:
        searched, planned = made_and_planned(result.get("search") or {}, family, args.search)
        made, asked = made | searched, asked | planned
    for name, wanted in asked.items():
        if made.get(name) != wanted:
            raise InvalidArgument(
                f"{path} holds {result['name']} with {name} {made.get(name, 'not recorded')!r}, asked for is "
                f"{wanted!r}; one table compares equals, so name another file or folder."
            )


def require_one_copy(results: list[Any]) -> None:
    """Refuse results of images of several copies of the data. Earlier results do not say of which images they are.

    Raises:
        InvalidArgument: naming two that differ.
    """
    known = [result for result in results if isinstance(result, dict) and "fingerprint" in result]
    for result in known:
        if result["fingerprint"] != known[0]["fingerprint"]:
            first, other = (f"{r.get('name')} (fingerprint {str(r['fingerprint'])[:16]}…)" for r in (known[0], result))
            raise InvalidArgument(
                f"{first} and {other} are of the images of two copies; one table compares equals, so give --data-dir "
                "the same copy, or name another file and folder."
            )


def made_and_planned(
    search: dict[str, Any], family: str | None, minutes: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a search tried, and what one of so many minutes tries after the same first trials; 0 minutes: nothing."""
    changes, tried = changes_of(family) if minutes else [], search.get("tried", [])
    first, later = tried[: len(changes)], tried[len(changes) :]
    chosen = finalists(first, family) if minutes else []
    made = {
        "search": search.get("minutes", 0.0),
        "changes searched": [t.get("change") for t in first],
        "finalists": [t.get("change") for t in later[: len(chosen)]],
        "minutes of trials": [t.get("minutes") for t in tried],
    }
    longer = len(chosen) + len(RATES) if minutes else 0
    planned: dict[str, Any] = {"search": minutes, "changes searched": changes, "finalists": chosen}
    return made, planned | {"minutes of trials": [minutes] * len(changes) + [LONGER * minutes] * longer}


TEXTS = ("name", "source", "data", "hardware", "started", "measured", "precision", "device")
NUMBERS = ("seed", "images", "clean", "bound", "images_per_second", "epochs", "parameters")


def require_whole(path: Path, result: Any) -> None:
    """Refuse what is no result of one entry, such as a file that was cut or edited.

    Raises:
        InvalidArgument: naming the first part that the table needs and that is not there.
    """
    parts = result if isinstance(result, dict) else {}
    search, settings = parts.get("search") or {}, parts.get("settings")
    faults = [name for name in TEXTS if not isinstance(parts.get(name), str)]
    faults += [name for name in NUMBERS if not is_number(parts.get(name))]
    faults += [name for name in ("own", "certified") if not has_shares(parts.get(name))]
    faults += [] if isinstance(parts.get("fingerprint", ""), str) else ["fingerprint"]
    faults += [] if str(parts.get("precision")) in FORMATS else ["precision"]
    tried = search.get("tried", []) if isinstance(search, dict) and is_number(search.get("minutes", 0.0)) else None
    faults += [] if isinstance(tried, list) and all(is_trial(t) for t in tried) else ["search"]
    ours = parts.get("source") == "dynablocks"
    described = isinstance(settings, dict) and isinstance(settings.get("config"), dict)
    faults += ["settings"] if ours and not described else []
    if faults:
        raise InvalidArgument(
            f"{path} holds a result without {faults[0]}, or with another kind of it: it was cut or edited; remove it "
            "there, and the same command measures it again."
        )


def is_trial(value: object) -> bool:
    """Whether it may be a trial of a search; those of earlier searches do not have all parts."""
    return isinstance(value, dict) and all(is_number(value.get(name, 0.0)) for name in ("minutes", "certified"))


def has_shares(value: object) -> bool:
    """Whether it is what :func:`shares` gives."""
    return isinstance(value, dict) and all(is_number(value.get(str(radius))) for radius in RADII)


def unchanged(args: argparse.Namespace) -> RunConfig:
    """The preset for this budget, without --set."""
    return our_config(argparse.Namespace(**vars(args) | {"set": {}}))


def crop(args: argparse.Namespace) -> dict[str, Any]:
    """The random crop of the preset, which is that of every entry."""
    training = unchanged(args).training
    return {"crop_padding": training.crop_padding, "crop_fill": training.crop_fill or "zeros"}


def as_named(config: RunConfig) -> dict[str, Any]:
    """The settings of the network as a result has them, by name."""
    complete = config.model.completed(MODELS[config.model.name].defaults)
    return {f"model.{name}": value for name, value in json.loads(json.dumps(asdict(complete))).items()}


def changes_of(family: str | None) -> list[dict[str, Any]]:
    """What --search tries first for a family: SEARCH, our sizes if its layers have them, and its own."""
    known = FAMILIES.get(family or "")
    ours = [OUR_SIZES] if known is not None and known.takes_inner else []
    return [*SEARCH, *ours, *(known.search if known is not None else ())]


def finalists(tried: list[dict[str, Any]], family: str | None) -> list[dict[str, Any]]:
    """The changes that a family's search tries for longer: the best of the first trials, and the largest network."""
    largest = OUR_SIZES if OUR_SIZES in changes_of(family) else SEARCH[-1]
    best = sorted(tried, key=lambda trial: -trial.get("certified", 0.0))[:FINALISTS]
    chosen = [trial.get("change", {}) for trial in best]
    return chosen if largest in chosen else [*chosen, largest]


def best_change(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The change with which a family certifies most held-out images at 36/255, by successive halving, and all trials.

    All of :func:`changes_of` are tried for ``args.search`` minutes, their :func:`finalists` for LONGER times as many,
    and as long the best of these with each of RATES, unless --set says the rate. The best of the longer trials is
    chosen. A trial that diverges counts as one that certifies nothing.
    """

    def trials(changes: list[dict[str, Any]], minutes: float) -> list[dict[str, Any]]:
        short = {"out": args.out / f"search-{minutes:g}", "minutes": minutes, "held_out": HELD_OUT, "search": 0.0}
        short |= {"teacher": 0.0}
        found: list[dict[str, Any]] = []
        for change in changes:
            try:
                result = result_of(name, argparse.Namespace(**vars(args) | short | {"set": change | args.set}))
                facts = {"clean": result["clean"], "certified": result["certified"]["36"]}
            except Diverged as error:
                print(f"{name} with {change}: {error}", flush=True)
                facts = {"clean": 0.0, "certified": 0.0, "diverged": True}
            found.append({"change": change, "minutes": minutes} | facts)
        return found

    def best(tried: list[dict[str, Any]]) -> dict[str, Any]:
        change: dict[str, Any] = max(tried, key=lambda trial: trial["certified"])["change"]
        return change

    first = trials(changes_of(name), args.search)
    longer = trials(finalists(first, name), LONGER * args.search)
    leader = best(longer)
    rate = (FAMILIES[name].settings() | leader)["lr"]
    factors = () if "lr" in args.set else RATES
    longer += trials([leader | {"lr": float(f"{factor * rate:.3g}")} for factor in factors], LONGER * args.search)
    return {"chosen": best(longer), "minutes": args.search, "tried": first + longer}


def main() -> None:
    """Run what is missing, print the table of what is there."""
    args = parse()
    if args.peers:
        sys.path.append(str(args.peers))
    kept_entries(args)  # refuses a page of other entries now, and not after hours
    for name in set(args.entries) - {"ours"}:
        # A missing package is found out now, and not after an hour of ours.
        FAMILIES[name].build((3, 32, 32), 10, torch.zeros(3), args.seed)
    for name in args.entries:
        if label(name, args) not in kept_entries(args):
            result_of(name, args)
            write_page(args)
    print(table(write_page(args)))


def write_page(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The results so far, those of other sittings first, which the page then holds; so after every entry."""
    here = {}
    for path in sorted(args.out.glob("*/result.json")):
        result = read_json(path)
        require_same(path, result, args)
        here[result["name"]] = result
    if args.page is None:
        require_one_copy(list(here.values()))
        return list(here.values())
    with held(args.page.with_name(f".{args.page.name}.lock")):
        results = list((kept_entries(args) | here).values())
        require_one_copy(results)
        earlier = read_json(args.page) if args.page.exists() else {}
        write_json(args.page, as_page(results, args.minutes, args.preset, earlier))
    return results


if __name__ == "__main__":
    LOSSES.register("lse-hkr")(lse_hkr)  # here, so that importing this file adds nothing to the library's losses
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
    except (DynablocksError, ModuleNotFoundError, OSError, torch.linalg.LinAlgError) as error:
        sys.exit(explained(error))
