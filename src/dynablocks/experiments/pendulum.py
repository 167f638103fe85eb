r"""The pendulum's flow map from forty pairs of one orbit, with and without the field's point symmetry.

H = p²/2 − cos q, x₀ = (0, 1), h = 0.1: pairs 0–39 of the orbit are for training, 40–139 for testing. The training pairs
cover 60 % of the orbit: all of p, and q from −0.59 to π/3. A plain field must extrapolate the force to q = −π/3; an odd
one has seen it.

The map is one fourth-order splitting step of a separable H = U(p) − V(q) with gradient fields
Aᵀ diag(α) tanh(A · + b) as forces. A and b are drawn and kept, and α is fitted: nearly a linear problem, so
Levenberg–Marquardt comes to rounding in some forty steps. With A and b fitted too it crawls along a valley and still
stood at 1e-10 after 150 steps. The width was chosen by the training loss, which stays at 1e-17 for 12 features and
falls to rounding for 16 and more. The odd network is the plain one with each force wrapped in an
:class:`~dynablocks.fields.odd.OddField`, same features and same start.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dynablocks.blocks import DynamicalBlock
from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store, stored_tensors
from dynablocks.fields import GradientField, PartitionedField, VectorField
from dynablocks.fields.odd import OddField
from dynablocks.files import write_tensors
from dynablocks.fitting import fit
from dynablocks.linear import Dense
from dynablocks.properties import Symplectic, VolumePreserving, verify
from dynablocks.reporting import markdown_table
from dynablocks.reporting.figures import BLUE, FAINT, INK, VERMILION, new_figure, styled
from dynablocks.seeding import mixed_seed, seeded_generator
from dynablocks.switching.signals import FreeSignal

if TYPE_CHECKING:
    from jaxtyping import Float64
    from matplotlib.figure import Figure

STEP_SIZE, TRAIN, TEST = 0.1, 40, 100
WEIGHTS = (0.3, 1.5)
BIASES = 1.5
ROLLOUT = "rollout.safetensors"
KINDS = {True: "odd", False: "plain"}
PUBLIC = {
    "SympNet LA, public code": {"test": 2e-8, "rollout": 3.5e-4},
    "SympNet G, public code": {"test": 1.2e-6, "rollout": 7.6e-2},
}


def orbit(steps: int) -> Float64[Tensor, "states 2"]:
    r"""The states (q, p) at t = 0, 0.1, …: q = 2 arcsin(½ sn(t | ¼)), p = cn(t | ¼).

    Jacobi's elliptic functions of the parameter m = k² = ¼, k = sin(q_max / 2); accurate to about 1e-15 for t <= 100.

    Args:
        steps: one less than the number of states.

    Example:
        >>> orbit(2)[0].tolist()
        [0.0, 1.0]
    """
    from scipy.special import ellipj

    sn, cn, _, _ = ellipj(STEP_SIZE * np.arange(steps + 1), 0.25)
    return torch.from_numpy(np.stack([2 * np.arcsin(sn / 2), cn], axis=1))


def energy(x: Float64[Tensor, "states 2"]) -> Float64[Tensor, " states"]:
    """p²/2 − cos q."""
    return x[:, 1].square() / 2 - x[:, 0].cos()


def flow_map(odd: bool, width: int, seed: int, method: str = "suzuki4") -> DynamicalBlock:
    """One step of a separable Hamiltonian field with ``width`` random features a force, in float64; only α is learned.

    Example:
        >>> block = flow_map(True, 4, 0)
        >>> [type(p).__name__ for p in block.properties if type(p).__name__ in ("Symplectic", "Equivariant")]
        ['Symplectic', 'Equivariant']
    """
    u, v = (_force(odd, width, mixed_seed(seed, k)) for k in range(2))
    return DynamicalBlock(PartitionedField(u, v), method, FreeSignal(STEP_SIZE)).double()


def _force(odd: bool, width: int, seed: int) -> VectorField:
    generator = seeded_generator(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(width, dtype=torch.float64, generator=generator)

    field = GradientField(Dense(1, width), "tanh", alpha=1.0).double()
    assert isinstance(field.linear, Dense)
    assert field.bias is not None
    assert field.alpha is not None
    with torch.no_grad():
        field.linear.matrix.copy_(uniform(math.log(WEIGHTS[0]), math.log(WEIGHTS[1])).exp()[:, None])
        field.bias.copy_(uniform(-BIASES, BIASES))
        field.alpha.copy_(uniform(-0.2, 0.2))
    field.linear.matrix.requires_grad_(False)
    field.bias.requires_grad_(False)
    return OddField(field) if odd else field


@torch.no_grad()
def rollout(block: torch.nn.Module, steps: int) -> Float64[Tensor, "states 2"]:
    """x₀ = (0, 1) and its ``steps`` iterates."""
    states = [orbit(0)]
    for _ in range(steps):
        states.append(block(states[-1]))
    return torch.cat(states)


@dataclass(frozen=True)
class PendulumCell(Cell):
    """One fitted flow map and its measurements.

    Args:
        odd: whether the forces are declared odd.
        seed: of the features and the start.
        width: features of a force.
        steps: of Levenberg–Marquardt, at most.
        horizon: steps of the rollout.
    """

    odd: bool
    seed: int
    width: int = 20
    steps: int = 60
    horizon: int = 1000

    @property
    def title(self) -> str:
        return f"pendulum flow map, {KINDS[self.odd]} field, seed {self.seed}"

    @property
    def cost(self) -> float:
        return 0.08 * self.steps

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        states = orbit(max(TRAIN + TEST, self.horizon))
        block = flow_map(self.odd, self.width, self.seed)
        started = time.perf_counter()
        train = slice(0, TRAIN), slice(1, TRAIN + 1)
        history = fit(block, *(states[part] for part in train), adam_steps=0, finish_steps=self.steps)
        seconds = time.perf_counter() - started
        rolled = rollout(block, self.horizon)
        write_tensors(directory / ROLLOUT, {"states": rolled})
        return {
            "parameters": sum(p.numel() for p in block.parameters()),
            "fitted": history.unknowns,
            "train": history.mean_squared_error() / 2,
            "test": test_error(block),
            "rollout": float((rolled - states[: self.horizon + 1])[1:].square().mean()),
            "energy": float((energy(rolled) - energy(rolled[:1])).abs().max()),
            "iterations": len(history.records) - 1,
            "stopped": history.stopped,
            "properties": properties(block, states[:20]),
            "seconds": seconds,
        }


@torch.no_grad()
def test_error(block: torch.nn.Module) -> float:
    """The mean over test pairs and components of the squared error."""
    states = orbit(TRAIN + TEST)
    return float((block(states[TRAIN:-1]) - states[TRAIN + 1 :]).square().mean())


test_error.__test__ = False  # type: ignore[attr-defined]


def properties(block: DynamicalBlock, x: Tensor) -> dict[str, float]:
    """Residuals: the structure's as :func:`dynablocks.verify` measures them, and max ‖f(−x) + f(x)‖ of any block."""
    checks = verify(block, x, kinds=(Symplectic, VolumePreserving)).require()
    found = {type(check.declared).__name__: check.residual for check in checks}
    with torch.no_grad():
        return found | {"oddness": float((block(-x) + block(x)).norm(dim=1).max())}


@EXPERIMENTS.register("pendulum")
class PendulumFlowMap(Experiment):
    """Forty pairs, an odd and a plain field, five seeds each."""

    name = "pendulum"
    title = "The pendulum's flow map from forty pairs of one orbit"
    source = "Sections 2.2, 4.1, 4.2"

    def runs(self, scale: Scale, odd: bool) -> list[PendulumCell]:
        """One cell a seed; the presets ``cpu`` and ``paper`` share theirs."""
        if scale.preset == "smoke":
            return [PendulumCell(odd, scale.seed, width=8, steps=8, horizon=100)]
        return [PendulumCell(odd, seed) for seed in scale.seeds(5)]

    def cells(self, scale: Scale) -> list[Cell]:
        return [cell for odd in KINDS for cell in self.runs(scale, odd)]

    def results(self, scale: Scale, store: Store, odd: bool) -> list[dict[str, Any]]:
        """Those that are built."""
        return store.results_of(self.runs(scale, odd))

    def tables(self, scale: Scale, store: Store) -> str:
        rows: list[dict[str, Any]] = [self._row(scale, store, odd) for odd in KINDS]
        for name, known in PUBLIC.items():
            rows.append({"map": name} | {key: f"{value:.1e}" for key, value in known.items()})
        columns = {
            "map": "map",
            "runs": "runs",
            "parameters": "parameters (fitted)",
            "train": "training MSE",
            "test": "test MSE",
            "rollout": f"MSE of {self.runs(scale, True)[0].horizon} steps",
            "energy": "largest energy error",
            "symplectic": "‖DᵀJD − J‖",
            "oddness": "‖f(−x) + f(x)‖",
            "seconds": "seconds",
        }
        return f"{markdown_table(rows, scale.columns(columns))}\n\n{NOTE}"

    def _row(self, scale: Scale, store: Store, odd: bool) -> dict[str, Any]:
        results = self.results(scale, store, odd)
        row: dict[str, Any] = {"map": f"{KINDS[odd]} field", "runs": f"{len(results)}", "symplectic": "not run"}
        if not results:
            return row | dict.fromkeys(
                ("parameters", "train", "test", "rollout", "energy", "oddness", "seconds"), "not run"
            )
        row["parameters"] = f"{results[0]['parameters']} ({results[0]['fitted']})"
        row |= {key: spread([r[key] for r in results]) for key in ("train", "test", "rollout", "energy")}
        for name, key in (("symplectic", "Symplectic"), ("oddness", "oddness")):
            row[name] = f"{max(r['properties'][key] for r in results):.1e}"
        return row | {"seconds": f"{statistics.median(r['seconds'] for r in results):.1f}"}

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        found = {}
        for odd in KINDS:
            built = [(r["rollout"], cell) for cell in self.runs(scale, odd) if (r := store.result(cell)) is not None]
            if built:
                middle = sorted(built, key=lambda pair: pair[0])[(len(built) - 1) // 2][1]
                found[KINDS[odd]] = stored_tensors(middle, store, ROLLOUT, lambda tensors: tensors["states"])
        return {self.name: pendulum_figure(found, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        limits = ((True, "test", 1e-12), (True, "rollout", 1e-10), (False, "test", 2e-9))
        checks = []
        for odd, key, limit in limits:
            values = [result[key] for result in self.results(scale, store, odd)]
            got = statistics.median(values) if len(values) == len(self.runs(scale, odd)) else None
            agrees = None if got is None or scale.preset == "smoke" else got <= limit
            horizon = self.runs(scale, odd)[0].horizon
            what = f"median {'test MSE' if key == 'test' else f'MSE of {horizon} steps'}, {KINDS[odd]} field"
            public = f"{PUBLIC['SympNet LA, public code'][key]:.1e} (public SympNet LA)"
            text = None if got is None else f"{got:.1e}"
            checks.append(Check.of(what, public, f"at most {limit:.0e}", text, agrees))
        return [*checks, self._structure_check(scale, store)]

    def _structure_check(self, scale: Scale, store: Store) -> Check:
        results = [result for odd in KINDS for result in self.results(scale, store, odd)]
        if len(results) < len(self.cells(scale)):
            return Check.of("largest ‖DᵀJD − J‖", "", "at most 1e-12", None, None)
        worst = max(result["properties"]["Symplectic"] for result in results)
        return Check.of("largest ‖DᵀJD − J‖", "", "at most 1e-12", f"{worst:.1e}", worst <= 1e-12)


def spread(values: list[float]) -> str:
    """Median, least and largest.

    Example:
        >>> spread([1e-3, 2e-3, 4e-3])
        '2.0e-03 (1.0e-03–4.0e-03)'
    """
    return f"{statistics.median(values):.1e} ({min(values):.1e}–{max(values):.1e})"


@styled
def pendulum_figure(rollouts: dict[str, Tensor], *, watermark: str | None = None) -> Figure:
    """Phase portrait, energy error and distance from the true orbit of the rollouts of the median networks.

    Args:
        rollouts: states by name; a missing one is not drawn.
        watermark: a text across the figure.
    """
    figure = new_figure(10.2, 3.4, watermark)
    portrait, drift, growth = figure.subplots(1, 3)
    true = orbit(140)
    portrait.plot(*true.T.tolist(), color=FAINT, linewidth=5)
    portrait.plot(*true[: TRAIN + 1].T.tolist(), color=INK, linewidth=0, marker="o", markersize=3, label="training")
    for (name, states), colour in zip(rollouts.items(), (BLUE, VERMILION), strict=False):
        portrait.plot(*states[: 1 + min(len(states), 140)].T.tolist(), color=colour, linewidth=0.8, label=name)
        times = (STEP_SIZE * torch.arange(1, len(states))).tolist()
        errors = (energy(states) - energy(states[:1])).abs()[1:]
        distance = (states - orbit(len(states) - 1)).norm(dim=1)[1:]
        drift.semilogy(times, (errors + 1e-17).tolist(), color=colour, linewidth=0.8, label=name)
        growth.loglog(times, (distance + 1e-17).tolist(), color=colour, linewidth=0.9, label=name)
    portrait.set(title="one orbit", xlabel="q", ylabel="p")
    drift.set(title="energy", xlabel="time", ylabel="|H − H₀|")
    growth.set(title="distance from the true state", xlabel="time", ylabel="‖x − x true‖")
    for axes in (portrait, drift, growth) if rollouts else (portrait,):
        axes.legend(fontsize=7)
    return figure


NOTE = """Median (least–largest) over the seeds; errors are means over states and components, the rollout's over all its
states, which start at (0, 1). Energy, symplecticity and oddness: the largest. Parameters count the random features,
which are drawn and kept. The odd and the plain map of a seed have the same features and start; the plain map declares
no symmetry and has to extrapolate 22 % of the range of q. Public figures: test MSE and 1000 steps of SympNets in the
authors' code, trained on the same pairs; `benchmarks/pendulum_peers.py` trains the public strupnet beside this."""
