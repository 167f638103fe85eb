"""Section 4.2: the flow map of a free rigid body, by maps that keep volume, norm or a learned energy, and a free one.

ẏ = y × I⁻¹y with I = (2, 1, 2/3) keeps the energy, ‖y‖ and, since ∂fᵢ/∂yᵢ = 0, the volume. Pairs (y, Φ^τ(y)) have
τ = 0.1; the starts are uniform on the spheres of radius between 0.5 and 1.5, so that the radial direction is seen. All
maps have functions of the same width and are fitted alike: Adam, then Levenberg–Marquardt, in float64; the last tenth
of the training pairs chooses the parameters that are kept. The rollouts begin on the unit sphere and take 1,000 steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dynablocks.data.physics import integrate
from dynablocks.data.systems import require_system
from dynablocks.experiments.base import EXPERIMENTS, Check, Scale
from dynablocks.experiments.cells import Store
from dynablocks.experiments.drift import ROUNDING
from dynablocks.experiments.fitted import RunCell, last_tenth
from dynablocks.experiments.grouped import GroupedExperiment
from dynablocks.fitting import fit
from dynablocks.fitting.surrogates import FlowMap, Structure, build, training_residuals
from dynablocks.properties.jacobians import jacobians
from dynablocks.reporting.figures import new_figure, styled
from dynablocks.seeding import seeded, seeded_generator

if TYPE_CHECKING:
    from jaxtyping import Float64
    from matplotlib.figure import Figure

SYSTEM, STEP = "rigid-body", 0.1
KINDS = {"volume": "volume", "norm": "norm", "energy": "a learned energy", "none": "nothing"}
ROLLOUTS = 5
SHOWN = 250
EXACT = 1e-12


def pairs(count: int, seed: int) -> tuple[Float64[Tensor, "count 3"], Float64[Tensor, "count 3"]]:
    """States of norms between 0.5 and 1.5, and their images after τ."""
    generator = seeded_generator(seed)
    x = require_system(SYSTEM).draw(count, generator)
    x = x * (0.5 + torch.rand(count, 1, dtype=torch.float64, generator=generator))
    return x, integrate(SYSTEM, x, torch.tensor([0.0, STEP], dtype=torch.float64))[:, -1]


@dataclass(frozen=True)
class RigidBodyCell(RunCell):
    """One fitted map.

    Args:
        preserve: a key of :data:`KINDS`.
        train, test: pairs.
        width: hidden units of each learned function.
        adam_steps, finish_steps: of the fit, at most.
        horizon: steps of the rollouts.
    """

    preserve: str
    train: int = 200
    test: int = 100
    width: int = 16
    adam_steps: int = 500
    finish_steps: int = 100
    horizon: int = 1000

    @property
    def title(self) -> str:
        return f"rigid body, keeping {KINDS[self.preserve]}, run {self.run}"

    @property
    def cost(self) -> float:
        solve = 0.06 if self.preserve == "energy" else 0.004
        return 0.004 * self.adam_steps + 0.08 * self.finish_steps + solve * self.horizon

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        x, y = pairs(self.train + self.test, self.mixed(0))
        with seeded(self.mixed(1)):
            flow = build(Structure(self.preserve, ("y1", "y2", "y3"), width=self.width, step=STEP))
        flow.adopt_units(x[: self.train], y[: self.train], torch.full((self.train,), STEP, dtype=torch.float64))
        clock = time.perf_counter()
        chosen, held_out = last_tenth(x[: self.train], y[: self.train])
        history = fit(
            flow,
            *chosen,
            validation=held_out,
            residuals=training_residuals(flow),
            adam_steps=self.adam_steps,
            finish_steps=self.finish_steps,
            label=self.title,
        )
        seconds = time.perf_counter() - clock
        test = slice(self.train, None)
        with torch.no_grad():
            error = float((flow(x[test]) - y[test]).square().mean())
        found = {"test": error, "parameters": history.unknowns, "seconds": seconds}
        learned = flow.energy if self.preserve == "energy" else None
        return found | determinant(flow, x[test][:20]) | rolled_out(flow, self.horizon, learned)


def determinant(flow: FlowMap, x: Tensor) -> dict[str, float]:
    """The largest |det DΨ − 1|."""
    return {"determinant": float((torch.linalg.det(jacobians(flow, x)) - 1).abs().max())}


@torch.no_grad()
def rolled_out(flow: FlowMap, horizon: int, learned: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """Errors along rollouts from the unit sphere: of the states, of norm and true energy; the first for the figure.

    Args:
        flow: the map.
        horizon: steps.
        learned: the energy that it keeps, per sample; ``None`` for a map that has none.
    """
    system = require_system(SYSTEM)
    x = system.draw(ROLLOUTS, seeded_generator(7))
    times = STEP * torch.arange(horizon + 1, dtype=torch.float64)
    truth = integrate(SYSTEM, x, times)
    rolled = flow.rollout(x, torch.full((ROLLOUTS, horizon), STEP, dtype=torch.float64))
    drifts = {}
    for name, invariant in system.invariants.items():
        start = invariant(x)[:, None]
        drifts[name] = (invariant(rolled.flatten(0, 1)).view(ROLLOUTS, -1) - start) / start
    found: dict[str, Any] = {}
    if learned is not None:
        change = learned(rolled.flatten(0, 1)).view(ROLLOUTS, -1) - learned(x)[:, None]
        found["learned"] = float(change.abs().max())
    every = max(1, horizon // SHOWN)
    return found | {
        "rollout": float((rolled - truth).square().mean()),
        "energy": float(drifts["energy"].abs().max()),
        "norm": float(drifts["norm"].abs().max()),
        "times": times[::every].tolist(),
        "energies": drifts["energy"].abs().amax(0)[::every].tolist(),
        "norms": drifts["norm"].abs().amax(0)[::every].tolist(),
        "path": rolled[0, ::every].tolist(),
    }


@EXPERIMENTS.register("rigid-body")
class RigidBodyFlowMap(GroupedExperiment[str]):
    """The rigid body's flow map by four kinds of maps."""

    name = "rigid-body"
    title = "The flow map of a free rigid body: volume, norm, energy"
    source = "Section 4.2"
    columns: ClassVar[dict[str, str]] = {
        "kept": "what is kept",
        "runs": "runs",
        "parameters": "parameters",
        "test": "test MSE, median",
        "rollout": "rollout MSE, median",
        "energy": "true energy's relative drift, median",
        "norm": "norm's relative drift, largest",
        "determinant": "largest abs(det DΨ − 1)",
        "learned": "learned energy's drift, largest",
        "seconds": "seconds, at most",
    }
    formats = dict.fromkeys(("test", "rollout", "energy", "norm", "determinant", "learned"), "{:.1e}".format)

    def groups(self, scale: Scale) -> dict[str, list[RigidBodyCell]]:
        """By what is kept."""
        if scale.preset == "smoke":
            small = {"train": 30, "test": 10, "width": 3, "adam_steps": 10, "finish_steps": 5, "horizon": 20}
            return {kind: [RigidBodyCell(kind, seed=scale.seed, **small)] for kind in KINDS}
        return {kind: [RigidBodyCell(kind, run=run, seed=scale.seed) for run in range(3)] for kind in KINDS}

    def labels(self, group: str) -> dict[str, str]:
        return {"kept": KINDS[group]}

    def summary(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Medians of errors, the largest residual of each structure."""
        row: dict[str, Any] = {"runs": len(results), "parameters": results[0]["parameters"]}
        row |= {key: statistics.median(r[key] for r in results) for key in ("test", "rollout", "energy")}
        row |= {key: max(r[key] for r in results) for key in ("norm", "determinant", "seconds")}
        # Cells that were stored before it was measured have none.
        drifts = [r["learned"] for r in results if "learned" in r]
        return row | {"learned": max(drifts) if len(drifts) == len(results) else None}

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        return {self.name: rigid_body_figure(self.first_runs(scale, store), watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        rows, checks = self.summaries(scale, store), []
        for kind, key, what in (
            ("volume", "determinant", "volume: largest |det DΨ − 1|"),
            ("norm", "norm", "norm: largest drift along the rollouts"),
        ):
            row = rows[kind]
            agrees = None if row is None else row[key] <= EXACT
            got = None if row is None else f"{row[key]:.1e}"
            checks.append(Check.of(what, "", f"<= {EXACT:g}", got, agrees))
        checks.append(self._energy_check(scale, rows["energy"]))
        free = rows["none"]
        for kind in ("volume", "norm", "energy"):
            row = rows[kind]
            got = None if row is None or free is None else f"{row['rollout']:.1e} against {free['rollout']:.1e}"
            agrees = None
            if row is not None and free is not None and scale.preset != "smoke":
                agrees = row["rollout"] <= free["rollout"]
            checks.append(Check.of(f"{kind}: rollout MSE against nothing kept", "", "no larger", got, agrees))
        return checks

    def _energy_check(self, scale: Scale, row: dict[str, Any] | None) -> Check:
        """What the solver of a discrete gradient leaves of the learned H, as in the long runs of ``drift``."""
        what, limit = "energy: largest drift of the learned one", ROUNDING * self.groups(scale)["energy"][0].horizon
        if row is None:
            return Check.of(what, "", f"<= {limit:.0e}", None, None)
        drift = row["learned"]
        if drift is None:
            return Check.of(what, "", f"<= {limit:.0e}", "not measured", None)
        return Check.of(what, "", f"<= {limit:.0e}", f"{drift:.1e}", drift <= limit)


@styled
def rigid_body_figure(results: dict[str, dict[str, Any]], *, watermark: str | None = None) -> Figure:
    """Drift of energy and norm along the rollouts, and one over the truth in the plane of the first two entries."""
    figure = new_figure(10.0, 3.8, watermark)
    energy, norm, plane = figure.subplots(1, 3)
    for result in list(results.values())[:1]:
        start, times = (torch.tensor(result[key], dtype=torch.float64) for key in ("path", "times"))
        truth = integrate(SYSTEM, start[:1], times)[0]
        plane.plot(truth[:, 0], truth[:, 1], color="0.6", linewidth=3.0, label="the true path")
    for kind, result in results.items():
        energy.semilogy(result["times"][1:], [e + 1e-17 for e in result["energies"][1:]], label=f"{KINDS[kind]} kept")
        norm.semilogy(result["times"][1:], [e + 1e-17 for e in result["norms"][1:]])
        path = torch.tensor(result["path"])
        plane.plot(path[:, 0], path[:, 1], linewidth=0.6)
    energy.set(xlabel="time", ylabel="relative drift of the energy")
    norm.set(xlabel="time", ylabel="relative drift of the norm")
    plane.set(xlabel="y₁", ylabel="y₂", aspect="equal")
    if results:
        figure.legend(loc="outside upper left", frameon=False, fontsize=8.5, ncols=5)
    return figure
