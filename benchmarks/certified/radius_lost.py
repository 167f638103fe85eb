"""Where a trained network loses certified radius: the gradient of its margins, layer by layer.

    python benchmarks/certified/radius_lost.py RUN [--data.dir CIFAR10] [--images 256]

A certificate takes a margin z_i − z_j to fall by no more than L ‖w_i − w_j‖ a unit of ℓ2; where it is linear it falls
by its gradient. Printed is the mean over test images of ‖∂(z_i − z_j)/∂h‖ / ‖w_i − w_j‖ in float64, j the class that
comes second, for the output h of each layer of the body: 1 at its end, and at the pixels the share of the radius that
the certificate could not lose to anything but curvature. Between two lines is what the layer there loses.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dynablocks.data import to_unit_range
from dynablocks.errors import DynablocksError, require_whole
from dynablocks.models import Network
from dynablocks.run_directory.network import load, load_config, load_splits


def shares(network: Network, pixels: Tensor) -> list[tuple[str, float]]:
    """The pixels and each layer of the body, with the mean share of gradient norm that arrives there.

    Example:
        >>> from dynablocks.models import ModelConfig, build
        >>> network = build(ModelConfig("certified", widths=(4,), layers=(1,), stem=1), (4, 4, 4), 3).double().eval()
        >>> [name for name, _ in shares(network, torch.rand(2, 4, 4, 4, dtype=torch.float64))][-1]
        'Flatten'
    """
    places, held = ["pixels"], [pixels.detach().requires_grad_(True)]
    for layer in network.body:
        places.append(type(layer).__name__)
        held.append(layer(held[-1]))
    logits = network.head(held[-1])
    first, second = logits.topk(2, 1).indices.unbind(1)
    rows = torch.arange(len(logits))
    margins = logits[rows, first] - logits[rows, second]
    weight = network.head.weight.detach()
    distances = (weight[first] - weight[second]).norm(dim=1)
    slopes = torch.autograd.grad(margins.sum(), held)
    return [
        (place, float((slope.flatten(1).norm(dim=1) / distances).mean()))
        for place, slope in zip(places, slopes, strict=True)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished training")
    parser.add_argument("--data.dir", dest="data_dir", type=Path, help="where the images are now")
    parser.add_argument("--images", type=int, default=256, help="how many test images")
    args = parser.parse_args()
    require_whole("--images", args.images, 1)
    network, config = load(args.run).double().eval(), load_config(args.run)
    if args.data_dir is not None:
        config = replace(config, data=replace(config.data, dir=args.data_dir))
    test = load_splits(config).test
    print("| layer | share of the gradient norm |\n|---|---|")
    for place, share in shares(network, to_unit_range(test.images[: args.images]).double()):
        print(f"| {place} | {share:.4f} |")


if __name__ == "__main__":
    try:
        main()
    except (DynablocksError, OSError) as error:
        sys.exit(f"error: {error}")
