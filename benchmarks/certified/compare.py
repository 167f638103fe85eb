"""Is one network of run.py certified on more images than another, beyond chance? Both are paired image by image.

    python benchmarks/certified/compare.py WORK/ours-0 WORK/cpl-0

Prints for every radius how many points more the first has, the standard error of that, and how likely so large a
difference is where none of the two is better (McNemar's exact test: of the images that one alone has, each is as likely
to be the first's as the second's). This is the chance in the choice of test images alone: another seed moves both. Each
radius is tested by itself.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dynablocks.errors import BadData, DynablocksError, InvalidArgument
from dynablocks.files import read_json

sys.path.insert(0, str(Path(__file__).parent))
from run import RADII, RADII_FILE

ALIKE = ("data", "images", "measured", "seed")


def paired(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """From what holds for each image (N,), (N,): the difference of shares, its standard error, both in points, and p.

    With a images that the first alone has and b that the second alone has, the difference is (a − b)/N, its variance
    ((a + b) − (a − b)²/N)/N², and under the hypothesis that none is better a is binomial with a + b trials of ½.

    Example:
        >>> more, error, p = paired(torch.tensor([True, True, True, False]), torch.tensor([True, False, False, False]))
        >>> more, round(error, 2), p
        (50.0, 25.0, 0.5)
    """
    from scipy.stats import binomtest

    alone, other = int((first & ~second).sum()), int((second & ~first).sum())
    count = len(first)
    variance = (alone + other - (alone - other) ** 2 / count) / count**2
    p = float(binomtest(alone, alone + other).pvalue) if alone + other else 1.0
    return 100 * (alone - other) / count, 100 * math.sqrt(variance), p


def radii(entry: Path, kind: str, images: int) -> Tensor:
    """The certified radii of so many images, 0 where misclassified, by the ``own`` claim or the ``sound`` bound.

    Raises:
        BadData: they are not there, or of another number of images.
    """
    try:
        found: Tensor = load_file(entry / RADII_FILE)[kind]
        if found.shape != (images,):
            raise ValueError(f"shape {tuple(found.shape)}")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise BadData(
            f"{entry} has no radii of single images ({RADII_FILE}); move its result.json away and give the command of "
            "run.py again, without --page: a finished training is measured anew, not trained."
        ) from error
    return found


def table(first: Path, second: Path, kind: str = "sound") -> str:
    """Markdown: a row for each radius.

    Raises:
        InvalidArgument: the two were not measured on the same images.
        BadData: a result is cut or edited.
    """
    results = [read_json(entry / "result.json") for entry in (first, second)]
    for entry, result in zip((first, second), results, strict=True):
        if not isinstance(result, dict) or type(result.get("images")) is not int or result["images"] < 1:
            raise BadData(f"{entry}/result.json does not say of how many images; give the command of run.py again.")
    for name in ALIKE:
        # Which images are held out depends on the seed.
        came = [result.get(name) if name != "seed" or result.get("measured") != "test" else None for result in results]
        if came[0] != came[1]:
            raise InvalidArgument(f"{first} and {second} differ in {name}: {came[0]!r} and {came[1]!r}; pair equals.")
    copies = [result.get("fingerprint") for result in results]
    if None not in copies and copies[0] != copies[1]:  # earlier results do not say of which images they are
        raise InvalidArgument(f"{first} and {second} are of images with other fingerprints; pair those of one copy.")
    a, b = (radii(entry, kind, results[0]["images"]) for entry in (first, second))
    lines = [f"| radius | {first.name} | {second.name} | difference | standard error | p |", "|---" * 6 + "|"]
    for radius in (0, *RADII):
        one, other = a > radius / 255, b > radius / 255
        more, error, p = paired(one, other)
        shares = " | ".join(f"{100 * float(held.double().mean()):.2f}" for held in (one, other))
        lines.append(f"| {radius}/255 | {shares} | {more:+.2f} | {error:.2f} | {p:.2g} |")
    seeds = [result.get("seed") for result in results]
    if seeds[0] != seeds[1]:
        lines += ["", f"The seeds differ ({seeds[0]} and {seeds[1]}); give every seed of a network that has several."]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="an entry's folder")
    parser.add_argument("second", type=Path, help="another one's")
    parser.add_argument("--bound", choices=["sound", "own"], default="sound", help="the bound that the radii are by")
    args = parser.parse_args()
    print(table(args.first, args.second, args.bound))


if __name__ == "__main__":
    try:
        main()
    except DynablocksError as error:
        sys.exit(f"error: {error}")
