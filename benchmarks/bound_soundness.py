"""Every spectral bound against the dense-SVD truth, over random layers of every kind.

    python benchmarks/bound_soundness.py [--layers 400] [--seed 0] [--run DIR ...] [--json FILE]

Prints a row for each (padding, mode, stride, groups, dilation, kernel) and the worst ratios; exits with 1 if a bound
fails, with 2 if a run cannot be read. ``check_layer(weight, geometry)`` gives the same checks for any other layer, a
trained one for example.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import InvalidArgument
from dynablocks.numerics.bounds import (
    METHODS,
    ConvGeometry,
    conv_norm_bounds,
    conv_smallest_singular_value,
    dense_matrix,
)

sys.path.insert(0, str(Path(__file__).parent))
from command_line import finish, require_place, write_figures

PADDINGS = ("same", "full", "valid", 1, (0, 3))
MODES = ("zeros", "circular")
STRIDES = (1, 2)
GROUPS = (1, 2)
DILATIONS = (1, 2)
KERNELS = (1, 3, 5)
SIZES = ((6, 6), (5, 7), (8, 6))
CHANNELS = ((2, 2), (1, 3), (3, 1))
SCALES = (1.0, 1e6, 1e-30)
EXACT_TOLERANCE = 1.01


@dataclass(frozen=True)
class Check:
    """One method on one layer; the three ratios are at most 1, the last only where the method is exact."""

    method: str
    exact: bool
    truth_over_upper: float
    lower_over_truth: float
    upper_over_truth: float
    smallest_over_truth: float

    @property
    def sound(self) -> bool:
        tight = not self.exact or self.upper_over_truth <= EXACT_TOLERANCE
        return max(self.truth_over_upper, self.lower_over_truth, self.smallest_over_truth) <= 1 and tight


def check_layer(weight: Tensor, geometry: ConvGeometry) -> list[Check]:
    """Each method's bounds of one layer against a dense SVD by NumPy."""
    matrix = dense_matrix(weight, geometry).numpy()
    singular = np.linalg.svd(matrix, compute_uv=False)
    truth, rounding = float(singular[0]), float(singular[0]) * max(matrix.shape) * np.finfo(float).eps
    smallest = float(singular[-1]) if matrix.shape[0] >= matrix.shape[1] else 0.0
    smallest_bound = conv_smallest_singular_value(weight, geometry)
    checks = []
    for method in METHODS:
        bound = conv_norm_bounds(weight, geometry, method)
        checks.append(
            Check(
                method=f"auto: {bound.method}" if method == "auto" else method,
                exact=bound.exact,
                truth_over_upper=_ratio(truth, bound.upper),
                lower_over_truth=_ratio(bound.lower, truth),
                upper_over_truth=_ratio(bound.upper, truth),
                smallest_over_truth=_ratio(smallest_bound, smallest + rounding),
            )
        )
    return checks


def _ratio(part: float, whole: float) -> float:
    if math.isinf(whole):
        return 0.0
    return part / whole if whole > 0 else (0.0 if part == 0 else math.inf)


def random_layers(count: int, seed: int) -> list[tuple[str, Tensor, ConvGeometry]]:
    """``count`` layers that go round all combinations; every seventh has rank one."""
    generator = torch.Generator().manual_seed(seed)
    combinations = []
    for padding, mode, stride, groups, dilation, kernel in itertools.product(
        PADDINGS, MODES, STRIDES, GROUPS, DILATIONS, KERNELS
    ):
        for size in SIZES:
            geometry = ConvGeometry(size, stride, padding, mode, groups, dilation)
            if _fits(geometry, kernel):
                label = f"{padding!s:8} {mode:9} {stride:6} {groups:6} {dilation:8} {kernel:6}"
                combinations.append((label, geometry, kernel))
                break
    layers = []
    for index in range(count):
        label, geometry, kernel = combinations[index * 37 % len(combinations)]
        outputs, inputs = CHANNELS[index % len(CHANNELS)]
        shape = (outputs * geometry.groups, inputs, kernel, kernel)
        weight = torch.randn(shape, generator=generator) * SCALES[index % 5 % len(SCALES)]
        layers.append((label, weight[:1, :1].expand(shape) if index % 7 == 6 else weight, geometry))
    return layers


def trained_layers(directory: Path, limit: int) -> list[tuple[str, Tensor, ConvGeometry, bool]]:
    """The convolutions of a run with at most ``limit`` inputs: name, weight, geometry, whether AᵀA = I is claimed."""
    import dynablocks
    from dynablocks.linear import Conv

    network = dynablocks.load(directory)
    found = [(name, m) for name, m in network.named_modules() if isinstance(m, Conv)]
    return [
        (f"{directory.name} {name}", m.weight.detach(), m.geometry, m.columns_orthonormal)
        for name, m in found
        if math.prod(m.in_shape) <= limit
    ]


def _departure_from_one(weight: Tensor, geometry: ConvGeometry) -> float:
    singular = np.linalg.svd(dense_matrix(weight, geometry).numpy(), compute_uv=False)
    return float(np.abs(singular - 1).max())


def _fits(geometry: ConvGeometry, kernel: int) -> bool:
    try:
        geometry.output_size((kernel, kernel))
    except InvalidArgument:
        return False
    return True


def _worst(checks: Sequence[Check]) -> dict[str, float]:
    return {
        "truth/upper": max(check.truth_over_upper for check in checks),
        "lower/truth": max(check.lower_over_truth for check in checks),
        "smallest/truth": max(check.smallest_over_truth for check in checks),
        "upper/truth, exact": max((check.upper_over_truth for check in checks if check.exact), default=0.0),
        "upper/truth, all": max(
            (check.upper_over_truth for check in checks if math.isfinite(check.upper_over_truth)), default=0.0
        ),
    }


def _seconds_of_a_large_layer() -> float:
    weight = torch.randn(128, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    conv_norm_bounds(weight, ConvGeometry((16, 16), padding="same"), "fft")
    return time.process_time() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep, print its tables, and return 0 when every bound holds."""
    parser = argparse.ArgumentParser(description="every spectral bound against the dense-SVD truth")
    parser.add_argument("--layers", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--run", type=Path, nargs="*", default=[], help="also the trained layers of these run directories"
    )
    parser.add_argument("--limit", type=int, default=2100, help="only trained layers with at most so many inputs")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the worst ratios of each method there")
    options = parser.parse_args(arguments)
    if options.layers < 1:
        parser.error(f"--layers is {options.layers}; at least 1 is needed")
    require_place(options.json)
    trained = [layer for run in options.run for layer in trained_layers(run, options.limit)]
    by_kind: dict[str, list[list[Check]]] = {}
    for label, weight, geometry in random_layers(options.layers, options.seed):
        by_kind.setdefault(label, []).append(check_layer(weight, geometry))
    for name, weight, geometry, orthogonal in trained:
        by_kind.setdefault("trained", []).append(check_layer(weight, geometry))
        if orthogonal:
            print(f"{name}: all singular values within {_departure_from_one(weight, geometry):.1e} of 1")
    print("padding  mode      stride groups dilation kernel  layers  truth/upper  lower/truth  upper/truth (exact)")
    for label, layers in sorted(by_kind.items()):
        worst = _worst([check for checks in layers for check in checks])
        row = f"{label}  {len(layers):6}  {worst['truth/upper']:11.9f}  {worst['lower/truth']:11.9f}"
        print(f"{row}  {worst['upper/truth, exact']:.12f}")
    everything = [check for layers in by_kind.values() for checks in layers for check in checks]
    methods = {
        name: _worst([c for c in everything if c.method == name]) for name in sorted({c.method for c in everything})
    }
    count = sum(map(len, by_kind.values()))
    print(f"\n{count} layers of {len(by_kind)} kinds; the worst ratio of each method:")
    for name, worst in methods.items():
        print(f"  {name:12}" + "".join(f"  {key} {value:.15f}" for key, value in worst.items()))
    print(f"A 128 x 128 x 3 x 3 kernel on 16 x 16 pixels takes {_seconds_of_a_large_layer():.2f} CPU seconds.")
    failures = [dataclasses.asdict(check) for check in everything if not check.sound]
    print(f"{len(failures)} of {len(everything)} checks failed.")
    figures = {"layers": options.layers, "seed": options.seed, "failures": failures, "worst": methods}
    write_figures(options.json, figures)
    for failure in failures[:10]:
        print(json.dumps(failure))
    return int(bool(failures))


if __name__ == "__main__":
    finish(main)
