"""The pendulum's flow map: the library's odd and plain maps beside the public ``strupnet`` (SympNets G, LA, P).

All see the same forty training pairs and are measured on the same hundred test pairs and the same 1000-step rollout.
Each peer trains for the same wall time on one thread (full batch, Adam, its rate decayed to 0 by a cosine of the time),
in float64, and ends with its best training loss; the library's maps take what they need and stop at rounding. With
``--match`` the peers get just the seconds that the library's odd map took.

Run: ``PYTHONPATH=peers:src python benchmarks/pendulum_peers.py [--seconds 120] [--match] [--seeds 1] [--json FILE]``;
``pip install strupnet`` first (0.0.4 is what was tried).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynablocks.experiments import Store
from dynablocks.experiments.pendulum import KINDS, STEP_SIZE, TRAIN, PendulumCell, orbit, rollout, test_error

sys.path.insert(0, str(Path(__file__).parent))
from command_line import finish, require_counts, require_place, write_figures

PEERS: dict[str, tuple[dict[str, Any], float]] = {
    "strupnet G": ({"method": "G", "layers": 5, "width": 30, "activation": "tanh"}, 1e-3),
    "strupnet LA": ({"method": "LA", "layers": 3, "sublayers": 2}, 1e-3),
    "strupnet P": ({"method": "P", "layers": 6, "max_degree": 6}, 1e-2),
}


class Peer(nn.Module):
    """A ``strupnet`` map on (q, p); it takes (p, q)."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        from strupnet import SympNet

        torch.set_default_dtype(torch.float64)  # method P holds a matrix of the default type that .double() leaves
        self.net = SympNet(dim=1, **options)
        torch.set_default_dtype(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flip(1), STEP_SIZE).flip(1)


def train(module: nn.Module, seconds: float, lr: float) -> dict[str, Any]:
    """Adam for ``seconds``, the keeping of weights not counted; the module ends with its best training loss."""
    states = orbit(TRAIN)
    optimiser = torch.optim.Adam(module.parameters(), lr=lr)
    kept = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    best, steps, started = math.inf, 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * spent / seconds))
        optimiser.zero_grad()
        loss = (module(states[:-1]) - states[1:]).square().mean()
        if (value := float(loss.detach())) < best:
            best, before = value, time.perf_counter()
            for name, tensor in module.state_dict().items():
                kept[name].copy_(tensor)
            started += time.perf_counter() - before
        loss.backward()
        optimiser.step()
        steps += 1
    module.load_state_dict(kept)
    return {"steps": steps, "train": best, "seconds": time.perf_counter() - started}


def peer(name: str, seed: int, seconds: float) -> dict[str, Any]:
    """One run of a peer."""
    options, lr = PEERS[name]
    torch.manual_seed(seed)
    module = Peer(options)
    made = train(module, seconds, lr)
    error = float((rollout(module, 1000) - orbit(1000))[1:].square().mean())
    parameters = sum(p.numel() for p in module.parameters())
    return made | {"parameters": parameters, "test": test_error(module), "rollout": error}


def ours(odd: bool, seed: int) -> dict[str, Any]:
    """One run of the library's map."""
    with tempfile.TemporaryDirectory() as folder:
        return PendulumCell(odd, seed).build(Path(folder), Store(Path(folder)))


def summary(name: str, run: Callable[[int], dict[str, Any]], seeds: int) -> dict[str, Any]:
    """The medians over the seeds, printed."""
    results = [run(seed) for seed in range(seeds)]
    keys = ("parameters", "seconds", "train", "test", "rollout")
    middle = {key: statistics.median(result[key] for result in results) for key in keys}
    print(
        f"{name:18s} {middle['parameters']:5.0f} parameters {middle['seconds']:7.1f} s  train {middle['train']:.1e}"
        f"  test {middle['test']:.1e}  1000 steps {middle['rollout']:.1e}",
        flush=True,
    )
    return {"median": middle, "runs": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of training of every peer")
    parser.add_argument("--match", action="store_true", help="peers train as long as the library's odd map took")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    require_counts(options, seeds=1)
    require_place(options.json)
    if importlib.util.find_spec("strupnet") is None:  # not imported, so that our maps train as without it
        sys.exit("error: strupnet is not installed; install it with: pip install strupnet==0.0.4")
    torch.set_num_threads(1)
    figures = {
        f"dynablocks {KINDS[odd]}": summary(f"dynablocks {KINDS[odd]}", lambda s, o=odd: ours(o, s), options.seeds)
        for odd in KINDS
    }
    seconds = figures["dynablocks odd"]["median"]["seconds"] if options.match else options.seconds
    for name in PEERS:
        figures[name] = summary(name, lambda s, n=name: peer(n, s, seconds), options.seeds)
    write_figures(options.json, figures)


if __name__ == "__main__":
    finish(main)
