"""How much the body of a trained peer of run.py really expands near test images: a lower bound of its constant.

    python benchmarks/certified/expansion.py WORK/soc-0 --data-dir CIFAR10 --peers PEERS

Prints the largest ‖f(x + d) − f(x)‖ / ‖d‖ found, ‖d‖ = 0.05, by power iteration on the Jacobian. Above 1, the claim
that the body is 1-Lipschitz is false.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dynablocks.data import load_data, to_unit_range
from dynablocks.errors import BadCheckpoint, DynablocksError, InvalidArgument, require_range
from dynablocks.files import read_json

sys.path.insert(0, str(Path(__file__).parent))
from peers import FAMILIES, Classifier, explained

LENGTH = 0.05


def trained(directory: Path) -> Classifier:
    """The network of an entry's checkpoint.

    Raises:
        InvalidArgument: the entry is ours.
        BadCheckpoint: its result or its weights are missing, cut or edited.
    """
    try:
        settings = read_json(directory / "result.json")["settings"]
        if "family" not in settings:
            raise InvalidArgument(f"{directory} is no peer; dynablocks verify measures a network of ours.")
        sizes = {"width": settings["width"], "depth": tuple(settings["depth"]), "stem": settings["stem"]}
        sizes |= {"dense": settings.get("dense", 0), "inner": settings.get("inner", 1.0)}  # entries of before have none
        if any(type(n) is not int for n in (*sizes["depth"], sizes["width"], sizes["stem"], sizes["dense"])):
            raise TypeError("sizes are whole numbers")
        family = replace(FAMILIES[settings["family"]], **sizes)
        weights = load_file(directory / "checkpoint" / "model.safetensors")
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise _cut(directory, error) from error
    model = family.build((3, 32, 32), 10, torch.zeros(3), seed=0)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise _cut(directory, error) from error
    return model.eval()


def _cut(directory: Path, error: Exception) -> BadCheckpoint:
    reason = next(iter(str(error).splitlines()), "").rstrip(":.")
    return BadCheckpoint(
        f"{directory} holds no whole network of run.py ({type(error).__name__}: {reason}); give its command again."
    )


def expansion(model: Classifier, pixels: Tensor, steps: int = 12) -> float:
    """The largest quotient found over the images."""
    x, direction, largest = pixels - model.mean, torch.randn_like(pixels), 0.0
    for _ in range(steps):
        direction = direction * (LENGTH / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        with torch.no_grad():
            moved = model.body(x + direction) - model.body(x)
            lengths = (x + direction - x).flatten(1).norm(dim=1)
        largest = max(largest, float((moved.flatten(1).norm(dim=1) / lengths).max()))
        start = x.clone().requires_grad_()
        (direction,) = torch.autograd.grad(model.body(start), start, moved)
    return largest


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        InvalidArgument: no images are asked for.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", type=Path, help="the entry's folder")
    parser.add_argument("--data-dir", type=Path, required=True, help="the CIFAR-10 copy")
    parser.add_argument("--peers", type=Path, help="folder with orthogonium, deel and einops")
    parser.add_argument("--images", type=int, default=16)
    args = parser.parse_args()
    require_range("--images", args.images, 1)
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    if args.peers:
        sys.path.append(str(args.peers))
    torch.manual_seed(0)
    test = load_data("cifar10", args.data_dir, 0, 0).test
    print(f"{expansion(trained(args.entry), to_unit_range(test.images[: args.images])):.3f}  {args.entry}")


if __name__ == "__main__":
    try:
        main()
    except (DynablocksError, ModuleNotFoundError) as error:
        sys.exit(explained(error))
