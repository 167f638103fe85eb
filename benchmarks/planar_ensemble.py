"""How much faster the 100 runs of a planar family train as one vectorised ensemble than in a Python loop.

Both do the same work on one thread: the same starts, batches, optimiser steps and projections. The ensemble's seconds
are measured on all runs, the loop's on a few runs and scaled to all of them. The largest difference between the
weights of the runs that both trained is printed too, after one step and after all of them. Adam divides a gradient
that is 0 but for rounding by its size or 1e-5, so the first step differs by up to about 1e-7 where such gradients
are; ten contractions by 1/3 (Fc) leave the last layers a cloud of size 1e-5, on which 1e-7 is no longer small: there
the weights of some runs drift apart after the first step.

Run: ``python benchmarks/planar_ensemble.py [--runs 100] [--loop-runs 2] [--steps 40] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.errors import require_whole
from dynablocks.experiments.ensembles import EnsembleTraining, batch_choices, train_ensemble
from dynablocks.experiments.planar_networks import FAMILIES
from dynablocks.experiments.table1_cells import EnsembleCell

sys.path.insert(0, str(Path(__file__).parent))
from command_line import finish, require_counts, require_place, write_figures


def train_alone(
    network: nn.Module, points: Tensor, labels: Tensor, training: EnsembleTraining, seed: int
) -> dict[str, Tensor]:
    """Train one network in place, as a Python loop over runs does; its parameters after training."""
    optimiser, schedule = training.optimiser(list(network.parameters()))
    project = getattr(network, "project_", None)
    choices = batch_choices([seed], training, len(points))[0]
    for chosen in choices:
        loss = functional.cross_entropy(network(points[chosen]), labels[chosen])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if project is not None:
            project()
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def compare(cell: EnsembleCell, loop_runs: int) -> dict[str, float]:
    """Seconds of both ways for all runs, their ratio, and the largest difference of a weight."""
    points, labels = cell.points.points("train", cell.seed)
    seeds, networks = cell.batch_seeds(), cell.networks()
    started = time.perf_counter()
    together = train_ensemble(networks, points, labels, cell.training, seeds)
    ensemble = time.perf_counter() - started
    started = time.perf_counter()
    alone = [train_alone(networks[k], points, labels, cell.training, seeds[k]) for k in range(loop_runs)]
    loop = (time.perf_counter() - started) * cell.runs / loop_runs
    difference = max(
        float((together[name][k] - alone[k][name]).abs().max()) for name in together for k in range(loop_runs)
    )
    return {"ensemble": ensemble, "loop": loop, "ratio": loop / ensemble, "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--loop-runs", type=int, default=2, help="runs of the loop that are measured")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    require_counts(options, runs=1, steps=1)
    require_whole("--loop-runs", options.loop_runs, 1, options.runs)
    require_place(options.json)
    torch.set_num_threads(1)
    figures = {}
    for family in FAMILIES:
        cell = EnsembleCell(family, runs=options.runs)
        cell = replace(cell, training=replace(cell.training, steps=options.steps))
        first = compare(replace(cell, training=replace(cell.training, steps=1)), options.loop_runs)["difference"]
        found = figures[family] = compare(cell, options.loop_runs) | {"first_difference": first}
        print(
            f"{family:5s} {options.runs} runs, {options.steps} steps: ensemble {found['ensemble']:.1f} s, loop"
            f" {found['loop']:.1f} s (scaled from {options.loop_runs} runs), ratio {found['ratio']:.1f},"
            f" largest difference of a weight {first:.0e} after one step, {found['difference']:.0e} at the end"
        )
    total = sum(f["loop"] for f in figures.values()) / sum(f["ensemble"] for f in figures.values())
    print(f"all families: ratio {total:.1f}")
    write_figures(options.json, figures | {"ratio": total})


if __name__ == "__main__":
    finish(main)
