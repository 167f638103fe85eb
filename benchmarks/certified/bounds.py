"""Bounds of one convolution's norm: ours, orthogonium's and deel-torchlip's estimators against the dense SVD.

    python benchmarks/certified/bounds.py --peers PEERS [--layers 240] [--seed 0] [--json FILE]

A layer zoo (zero and circular padding, stride 1 and 2, groups, kernels 1 to 5, sizes 5 to 10; Gaussian kernels, kernels
of rank one, kernels with one strong frequency, orthogonal ones) goes through each estimator. Printed for each: on how
many layers it says that it holds, how often it is ``below`` the truth by more than one part in 100,000, its least,
median and 90 % ratio to the truth, and its time as a multiple of ours (median over layers; one thread, in turns; ours
in float64, theirs in the float32 they are used in; 4 iterations are orthogonium's default).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dynablocks.errors import DynablocksError, require_range
from dynablocks.files import require_writable, write_json
from dynablocks.linear import OrthogonalConv
from dynablocks.numerics.bounds import ConvGeometry, conv_norm_bounds, dense_matrix

sys.path.insert(0, str(Path(__file__).parent))
from peers import explained

BELOW = 1e-5
Estimator = Callable[[nn.Conv2d, int], float | None]


def zoo(count: int, seed: int) -> list[tuple[nn.Conv2d, int]]:
    """``count`` layers and their input sizes, going round all combinations."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("gaussian", "rank one", "one frequency", "orthogonal")
    grid = itertools.product((1, 2, 3, 5), ("zeros", "circular"), (1, 2), (1, 2), (5, 7, 8, 10), kinds)
    chosen = [c for c in grid if not (c[5] == "orthogonal" and (c[2], c[3]) != (1, 1))]
    layers = []
    for index in range(count):
        kernel, mode, stride, groups, size, kind = chosen[index * 53 % len(chosen)]
        layer = nn.Conv2d(4, 4, kernel, stride, kernel // 2, groups=groups, bias=False, padding_mode=mode).double()
        layer.weight.data.copy_(_weight(kind, layer.weight.shape, size, generator))
        layers.append((layer, size))
    return layers


def _weight(kind: str, shape: torch.Size, size: int, generator: torch.Generator) -> Tensor:
    free = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "gaussian":
        return free
    if kind == "rank one":
        return free[:1, :1].expand(shape)
    if kind == "one frequency":
        wave = torch.cos(2.0 * torch.arange(shape[-1], dtype=torch.float64))
        return free[:, :, :1, :1] * wave * wave[:, None] + 0.05 * free
    conv = OrthogonalConv((4, size, size), kernel_size=shape[-1]).double()
    for parameter in conv.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return conv.compute_weight().detach()


def truth(layer: nn.Conv2d, size: int) -> float:
    """The largest singular value of the dense matrix."""
    matrix = dense_matrix(layer.weight.detach(), ConvGeometry.of(layer, (size, size)))
    return float(np.linalg.svd(matrix.numpy(), compute_uv=False)[0])


def ours(layer: nn.Conv2d, size: int, method: str = "auto") -> float:
    """The upper bound a certificate uses, or that of another method."""
    return conv_norm_bounds(layer.weight.detach(), ConvGeometry.of(layer, (size, size)), method).upper


@functools.cache
def in_float32(layer: nn.Conv2d) -> nn.Conv2d:
    """A copy in the precision that ``get_conv_sv`` needs, made once, before its time is taken."""
    return copy.deepcopy(layer).float()


def orthogonium(iterations: int) -> Estimator:
    """``get_conv_sv``, where it says that it holds.

    Left out: strides other than 1, which it takes for its own layers only, and even kernels with circular padding, of
    which its documentation says that the number may be too small.
    """

    def estimate(layer: nn.Conv2d, size: int) -> float | None:
        from orthogonium.layers.conv.singular_values import get_conv_sv

        even = layer.padding_mode == "circular" and layer.kernel_size[0] % 2 == 0
        if layer.stride[0] > 1 or even:
            return None
        return float(get_conv_sv(in_float32(layer), iterations, return_stab_rank=False, imsize=size))

    return estimate


def torchlip_factor(layer: nn.Conv2d, size: int) -> float | None:
    """What SpectralConv2d divides by: the power-iterated norm of the flattened kernel over its factor.

    The layer calls ``lconv_norm``, which knows of no image: the factor is that of k / stride windows over each pixel.
    """
    from deel.torchlip.normalizers import spectral_normalization
    from deel.torchlip.utils.lconv_norm import compute_lconv_coef

    if layer.groups > 1:
        return None
    flat = layer.weight.detach().flatten(1)
    _, _, sigma = spectral_normalization(flat.float())
    return float(sigma) / float(compute_lconv_coef(layer.kernel_size, None, layer.stride))


def torchlip_probe(layer: nn.Conv2d, size: int) -> float:
    """``evaluate_lip_const`` by noise, which calls itself empirical."""
    from deel.torchlip.utils.evaluate_lip_const import evaluate_lip_const

    with contextlib.redirect_stdout(io.StringIO()):
        points = torch.randn(8, layer.in_channels, size, size, dtype=torch.float64)
        return float(evaluate_lip_const(layer, points, "noise_norm"))


ESTIMATORS: dict[str, Estimator] = {
    "dynablocks, upper bound": ours,
    "dynablocks, cholesky": partial(ours, method="cholesky"),
    "dynablocks, fft": partial(ours, method="fft"),
    "orthogonium get_conv_sv, 2 iterations": orthogonium(2),
    "orthogonium get_conv_sv, 4 iterations": orthogonium(4),
    "deel-torchlip SpectralConv2d's divisor": torchlip_factor,
    "deel-torchlip evaluate_lip_const, noise": torchlip_probe,
}


def measure(layers: list[tuple[nn.Conv2d, int]]) -> list[list[str]]:
    """One row for each estimator."""
    ratios: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    slower: dict[str, list[float]] = {name: [] for name in ESTIMATORS}
    for layer, size in layers:
        true, base = truth(layer, size), 0.0
        in_float32(layer)
        for name, estimator in ESTIMATORS.items():
            started = time.perf_counter()
            value = estimator(layer, size)
            seconds = time.perf_counter() - started
            base = base or seconds
            if value is not None:
                ratios[name].append(value / true)
                slower[name].append(seconds / base)
    rows = []
    for name, found in ratios.items():
        below = sum(r < 1 - BELOW for r in found)
        spread = np.quantile(found, [0.0, 0.5, 0.9])
        numbers = [str(len(found)), str(below), *(f"{q:.6f}" for q in spread), f"{statistics.median(slower[name]):.2f}"]
        rows.append([name, *numbers])
    return rows


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        InvalidArgument: a number is out of its range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder with orthogonium and deel")
    parser.add_argument("--layers", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_range("--layers", args.layers, 1)
    require_range("--seed", args.seed, 0, 2**63 - 1)
    return args


def main() -> None:
    """Print the table."""
    args = parse()
    if args.json:
        require_writable(args.json.parent)
    sys.path.append(str(args.peers))
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    layers = zoo(args.layers, args.seed)
    measure(layers[:8])
    rows = measure(layers)
    columns = ["estimator", "layers", "below", "least ratio", "median ratio", "90 % ratio", "time / ours"]
    for row in [columns, ["---"] * len(columns), *rows]:
        print("| " + " | ".join(row) + " |")
    if args.json:
        write_json(args.json, {"columns": columns, "rows": rows, "layers": args.layers, "seed": args.seed})
    if rows[0][2] != "0":
        sys.exit("our bound fell below the truth")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; nothing is kept")
    except (DynablocksError, ModuleNotFoundError) as error:
        sys.exit(explained(error))
