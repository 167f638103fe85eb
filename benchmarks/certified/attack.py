"""AutoAttack on a certified run, beside its certificate and the worst of our own attacks, on the same images.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/certified/attack.py RUN --data-dir ../shared/data/cifar10

RUN is a run directory (``dynablocks run``, or an entry ``ours-*`` of run.py). AutoAttack is the standard version:
APGD-CE, targeted APGD-DLR, targeted FAB, Square with 5,000 queries. Stopped, the same command goes on with the attack
that was not finished; the result is RUN/autoattack.json, which names the weights and the images that it is of. A
certified image that any attack breaks ends it with exit 2, and the figures of the run are removed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynablocks.config import DataConfig
from dynablocks.data import to_unit_range
from dynablocks.errors import DynablocksError, UnsoundResult, require_range
from dynablocks.experiments.provenance import commit, device_name
from dynablocks.files import read_json, write_json
from dynablocks.linear import frozen_weights
from dynablocks.robustness import PAPER_EPSILONS, CertificateResult
from dynablocks.robustness.arithmetic import full_precision
from dynablocks.robustness.soundness import ATTACK_RESOLUTION
from dynablocks.run_directory.metrics import no_figures_of_unsound_results
from dynablocks.run_directory.network import load, load_config, load_splits, weights_hash, with_data
from dynablocks.run_directory.pipeline import attack_run, certify_run
from dynablocks.run_directory.results import belongs_to
from dynablocks.run_files import AUTOATTACK
from dynablocks.training.precision import present_device

sys.path.insert(0, str(Path(__file__).parent))
from peers import explained

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack, standard version."""

PAPER_AUC = 0.680
"""The best area of the paper's table 1, on PAPER_EPSILONS."""


def auto_attack(
    run: Path, pixels: Tensor, labels: Tensor, epsilon: float, batch_size: int, fingerprint: str
) -> list[float | None]:
    """How far each image was moved when it lost its class: 0 where it never had it, ``None`` where it keeps it.

    The attacks run one after the other on the images that are left, as the package does it, but what each of them found
    is kept here: pyautoattack 0.2 refuses the state files that it writes. All is computed where the pixels are, in
    float32 without the shortcuts of GPUs.
    """
    from pyautoattack import AutoAttack

    path = run / f"autoattack-{epsilon:g}-{len(pixels)}.state.json"
    belongs = {"weights": weights_hash(run), "fingerprint": fingerprint}
    state = read_json(path) if path.exists() else {}
    if not goes_on(state, belongs, len(pixels)):
        state = belongs | {"done": [], "distances": [None] * len(pixels)}
    model = load(run).to(pixels.device).requires_grad_(False)
    for name in ATTACKS:
        left = [i for i, distance in enumerate(state["distances"]) if distance is None]
        if name in state["done"] or not left:
            continue
        attack = AutoAttack(model, device=pixels.device, norm="L2", eps=epsilon, seed=0, version="standard")
        attack.attacks_to_run = [name]
        with full_precision(), frozen_weights(model):
            moved, _ = attack.run_standard_evaluation(pixels[left], labels[left], batch_size=batch_size)
        with full_precision(), frozen_weights(model), torch.no_grad():
            lost = torch.cat([model(part).argmax(1) for part in moved.split(batch_size)]) != labels[left]
        lengths = (moved.double() - pixels[left].double()).flatten(1).norm(dim=1)
        for i, broken, length in zip(left, lost.tolist(), lengths.tolist(), strict=True):
            state["distances"][i] = length if broken else None
        state["done"].append(name)
        write_json(path, state)
    return state["distances"]


def goes_on(state: object, belongs: dict[str, str], count: int) -> bool:
    """Whether a state file is whole and of the same weights and images."""
    if not isinstance(state, dict) or {name: state.get(name) for name in belongs} != belongs:
        return False
    done, distances = state.get("done"), state.get("distances")
    if not isinstance(done, list) or not isinstance(distances, list) or len(distances) != count:
        return False
    return all(distance is None or isinstance(distance, (int, float)) for distance in distances)


def check(distances: list[float | None], certificate: CertificateResult) -> None:
    """Stop when an image lost its class within the radius that it is certified at.

    Raises:
        UnsoundResult: naming the first such image.
    """
    for i, distance in enumerate(distances):
        radius = float(certificate.radii[i]) if certificate.correct[i] else 0.0
        if distance is not None and radius - ATTACK_RESOLUTION > distance:
            raise UnsoundResult(
                f"image {i} is certified at radius {radius:.6g}, and AutoAttack changes its class at a distance "
                f"of {distance:.6g}; a bound is wrong, no result may be reported."
            )


def measured(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Certificate, PGD and AutoAttack of the first images, and which weights, network and images they are of.

    Raises:
        UnsoundResult: one of the attacks broke a certified image; an earlier result and the figures are removed.
        ModuleNotFoundError: pyautoattack is not installed, which is asked before anything is computed.
    """
    if importlib.util.find_spec("pyautoattack") is None:
        raise ModuleNotFoundError("pyautoattack is not installed")
    data = DataConfig(dir=options.data_dir)
    config = with_data(load_config(run), data)
    certificate = certify_run(run, data)
    settings = replace(
        config.attack,
        samples=options.samples,
        epsilons=tuple(sorted({*config.attack.epsilons, *PAPER_EPSILONS, options.epsilon})),
        losses=tuple(dict.fromkeys(("ce", *config.attack.losses))),
    )
    ours = attack_run(run, settings, data)
    splits = load_splits(config)
    test = splits.test
    count = min(options.samples, len(test))
    device = present_device(config.training.device)
    pixels, labels = to_unit_range(test.images[:count]).to(device), test.labels[:count].long().to(device)
    curve = ours.curve()
    worst = curve.at((options.epsilon,)).accuracies[0]
    belongs = belongs_to(run, splits.fingerprint, same_code=False)
    distances = auto_attack(run, pixels, labels, options.epsilon, options.batch_size, splits.fingerprint)
    with no_figures_of_unsound_results(run):
        check(distances, certificate)
    radii = torch.where(certificate.correct[:count], certificate.radii[:count], 0.0)
    return belongs | {
        "images": count,
        "epsilon": options.epsilon,
        "clean": ours.clean_accuracy,
        "certified": float((radii > options.epsilon).double().mean()),
        "autoattack": sum(distance is None for distance in distances) / count,
        "pgd": worst,
        "pgd_curve": curve.points(),
        "auc": curve.at(PAPER_EPSILONS).auc,
        "auc_cross_entropy": ours.curve("ce").at(PAPER_EPSILONS).auc,
        "auc_paper": PAPER_AUC,
        "commit": commit(),
        "hardware": device_name(device),
    }


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        InvalidArgument: a number is out of its range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--data-dir", type=Path, help="where the images are now, if they moved")
    parser.add_argument("--epsilon", type=float, default=0.5, help="the l2 radius, in pixels [0, 1]; one PGD attacks")
    parser.add_argument("--samples", type=int, default=1000, help="the first so many test images")
    parser.add_argument("--batch-size", type=int, default=250)
    options = parser.parse_args()
    require_range("--epsilon", options.epsilon, 0, 1e6, open_low=True)
    require_range("--samples", options.samples, 1)
    require_range("--batch-size", options.batch_size, 1)
    return options


def main() -> int:
    """Attack, write, print."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("auto-attack").setLevel(logging.DEBUG)
    try:
        options = parse()
        facts = measured(options.run, options)
        write_json(options.run / AUTOATTACK, facts)
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the attack that was not finished", file=sys.stderr)
        return 130
    except UnsoundResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (DynablocksError, ModuleNotFoundError, OSError) as error:
        print(explained(error, "install it with: pip install -c constraints.txt -e '.[bench]'"), file=sys.stderr)
        return 1
    for name, value in facts.items():
        if isinstance(value, float):
            print(f"{name:<20} {value:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
