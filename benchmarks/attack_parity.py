"""Our cross-entropy PGD against Foolbox's L2PGD: the same robust accuracy at every epsilon?

    python benchmarks/attack_parity.py                # a small network trained on digits for some seconds
    python benchmarks/attack_parity.py --run DIR      # the model and the test set of a run directory

Both means are over ``--repeats`` sets of random starts: one set scatters by about a point on 359 images.
Prints a table and exits with 1 when the two differ by more than ``--tolerance`` (0.01) anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dynablocks.config import DataConfig
from dynablocks.data import to_unit_range
from dynablocks.errors import DynablocksError
from dynablocks.linear import frozen_weights
from dynablocks.robustness import DEFAULT_EPSILONS, AttackConfig, attack
from dynablocks.run_directory.network import load, load_config, load_splits, with_data

sys.path.insert(0, str(Path(__file__).parent))
from command_line import finish, require_counts, require_place, write_figures


class SmallNetwork(nn.Module):
    """Two convolutions and a linear layer on 8 x 8 digits."""

    input_shape = (1, 8, 8)
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 10),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def digits(count: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Train images and ``count`` others, as floats in [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    pixels = (torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16)[order]
    targets = torch.tensor(labels)[order]
    return (pixels[count:], targets[count:]), (pixels[:count], targets[:count])


def trained_on_digits(train: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model, (pixels, labels) = SmallNetwork(), train
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(pixels[chosen]), labels[chosen]).backward()
            optimiser.step()
    return model.eval()


def of_run(directory: Path, data_dir: Path | None, count: int) -> tuple[nn.Module, tuple[Tensor, Tensor], str]:
    """The model of a run directory, its test images and their name."""
    test = load_splits(with_data(load_config(directory), DataConfig(dir=data_dir))).test
    return load(directory), (to_unit_range(test.images[:count]), test.labels[:count]), test.name


def foolbox_accuracy(
    model: nn.Module, data: tuple[Tensor, Tensor], epsilons: list[float], batch: int, seed: int
) -> list[float]:
    """Robust accuracy under Foolbox's L2PGD with ten steps and its own defaults."""
    import foolbox

    torch.manual_seed(seed)
    model = model.eval()
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    survived = torch.zeros(len(epsilons))
    with frozen_weights(model):
        for pixels, labels in zip(data[0].split(batch), data[1].split(batch), strict=True):
            _, _, broken = foolbox.attacks.L2PGD(steps=10)(wrapped, pixels, labels, epsilons=epsilons)
            survived += (~broken).sum(dim=1).cpu()
    return (survived / len(data[1])).tolist()


def mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run directory; a small network on digits when left out")
    parser.add_argument("--data-dir", type=Path, help="where the run's data set lies")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1, help="sets of random starts, averaged")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=30, help="of the small network")
    parser.add_argument("--out", type=Path, help="write the table as JSON too")
    options = parser.parse_args()
    require_counts(options, samples=1, repeats=1, batch_size=1)
    require_place(options.out)
    return options


def main() -> int:
    options = parse()
    if importlib.util.find_spec("foolbox") is None:
        raise DynablocksError("foolbox is not installed; install it with: pip install -c constraints.txt -e '.[test]'")
    if options.run is None:
        train, data = digits(options.samples)
        model, name = trained_on_digits(train, options.epochs), "digits"
    else:
        model, data, name = of_run(options.run, options.data_dir, options.samples)
    config = AttackConfig(
        DEFAULT_EPSILONS, losses=("ce",), early_drop=False, samples=options.samples, batch_size=options.batch_size
    )
    seeds = range(options.repeats)
    started = time.perf_counter()
    ours = mean([attack(model, data, replace(config, seed=s)).robust_accuracy_by_loss["ce"] for s in seeds])
    between = time.perf_counter()
    radii = list(config.epsilons)
    theirs = mean([foolbox_accuracy(model, data, radii, options.batch_size, s) for s in seeds])
    ended = time.perf_counter()
    print(f"{name}, {len(data[1])} images, {options.repeats} sets of starts")
    print(f"ours {between - started:.1f} s, foolbox {ended - between:.1f} s")
    print("epsilon |   ours | foolbox | difference")
    rows = list(zip(config.epsilons, ours, theirs, strict=True))
    for epsilon, a, b in rows:
        print(f"{epsilon:7.4f} | {a:6.4f} | {b:7.4f} | {a - b:+.4f}")
    worst = max(abs(a - b) for _, a, b in rows)
    agree = worst <= options.tolerance + 1e-9
    print(f"largest difference {worst:.4f}, allowed {options.tolerance:g}: {'agree' if agree else 'DIFFER'}")
    write_figures(
        options.out,
        {
            "dataset": name,
            "samples": len(data[1]),
            "repeats": options.repeats,
            "rows": [{"epsilon": e, "ours": a, "foolbox": b} for e, a, b in rows],
            "largest_difference": worst,
        },
    )
    return 0 if agree else 1


if __name__ == "__main__":
    finish(main)
