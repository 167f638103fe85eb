r"""Section 2.2: any field inside a Hamiltonian one, so that symplectic maps approximate any flow map.

H(z, p) = pᵀf(z) has ż = f(z), and p = 0 stays: with E: z ↦ (z, 0) and P: (z, p) ↦ z, a step of the embedded field is
P Ψ E, a step of f. Measured for five systems: the largest ‖PΨE(z) − Ψ_f(z)‖ and ‖p‖ on p = 0, and the symplecticity of
Ψ at states with p ≠ 0.

Learned: the map of the damped pendulum (q̇ = p, ṗ = −sin q − p/2) after 0.2, which contracts areas by e^{−0.1}. A
symplectic map of the plane keeps them and cannot be it; lifted to R⁴ symplectic maps can. Three networks, fitted alike
(Levenberg–Marquardt in float64 after Adam; the last tenth of the training pairs chooses the parameters that are kept):
a symplectic map of R² (Suzuki's method on T(p) + V(q)), H = pᵀf(z) with a free f through the implicit midpoint rule
in R⁴, and a SympNet of gradient modules in R⁴ between E and P. The states of training and test are uniform in [−2, 2]²;
rollouts start in [−1, 1]², from where the true path stays in that square.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.data.systems import PhysicalSystem, require_system
from dynablocks.errors import require_choice
from dynablocks.experiments.base import EXPERIMENTS, Check, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.fitted import RunCell, Samples, last_tenth
from dynablocks.experiments.grouped import GroupedExperiment
from dynablocks.fields import FieldFacts, VectorField
from dynablocks.fields.hamiltonian import HamiltonianEmbedding
from dynablocks.fitting import fit
from dynablocks.fitting.objective import flow_map_residuals
from dynablocks.fitting.structures import FreeField
from dynablocks.fitting.surrogates import Structure, build
from dynablocks.integrators import exact_solution, integrator
from dynablocks.models.sympnet import sympnet
from dynablocks.properties.jacobians import jacobians, symplectic_defect
from dynablocks.reporting import markdown_table
from dynablocks.reporting.figures import new_figure, styled
from dynablocks.seeding import seeded, seeded_generator
from dynablocks.switching.signals import FreeSignal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMBEDDED_SYSTEMS = ("pendulum", "rigid-body", "sir", "lotka-volterra", "abc-flow")
METHODS = ("implicit-midpoint", "gauss4", "rk4")
SYMPLECTIC = ("implicit-midpoint", "gauss4")
NETWORKS = {"plane": "symplectic in R²", "embedded": "pᵀf(z) in R⁴, midpoint", "sympnet": "SympNet G in R⁴"}
STEP, DAMPING = 0.2, 0.5
EXACT = 1e-12
ROLLOUT = 50


class SystemField(VectorField):
    """The field of a physical system."""

    def __init__(self, system: PhysicalSystem) -> None:
        super().__init__()
        self.system, self.in_shape = system, (len(system.state_names),)

    def forward(self, x: Tensor) -> Tensor:
        return self.system.vector_field(x)

    def facts(self) -> FieldFacts:
        return FieldFacts(reason=self.system.name)


@dataclass(frozen=True)
class EmbeddingCell(Cell):
    """Residuals of the embedding for one system and method.

    Args:
        system: of :data:`dynablocks.data.systems.SYSTEMS`.
        method: an integrator.
        states: how many.
        seed: of the states.
    """

    system: str
    method: str
    states: int = 10
    seed: int = 0

    @property
    def title(self) -> str:
        return f"embedding of {self.system}, {self.method}"

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        system, method = require_system(self.system), integrator(self.method)
        field = SystemField(system)
        embedded = HamiltonianEmbedding(field)
        generator = seeded_generator(self.seed)
        z = system.draw(self.states, generator)
        with torch.no_grad():
            moved = method.step(embedded, embedded.embed(z), 0.1)
            gap = embedded.restrict(moved) - method.step(field, z, 0.1)
        p = torch.randn(z.shape, dtype=z.dtype, generator=generator)
        block = DynamicalBlock(embedded, method, FreeSignal(0.1)).double()
        n = z.shape[1]
        return {
            "gap": float(gap.abs().max()),
            "momentum": float(moved[:, n:].abs().max()),
            "symplectic": symplecticity(block, torch.cat([z, p], dim=1)),
        }


def symplecticity(map_: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The largest ‖DᵀJD − J‖/max(1, ‖D‖²) over the samples, in spectral norms."""
    dense = jacobians(map_, x)
    sizes = torch.linalg.matrix_norm(dense, ord=2).square().clamp_min(1)
    return float((torch.linalg.matrix_norm(symplectic_defect(dense), ord=2) / sizes).max())


def damped(x: Tensor) -> Tensor:
    """(p, −sin q − p/2)."""
    q, p = x.unbind(1)
    return torch.stack([p, -q.sin() - DAMPING * p], dim=1)


def damped_pairs(count: int, seed: int) -> Samples:
    """States uniform in [−2, 2]² and their images."""
    x = 4 * torch.rand(count, 2, dtype=torch.float64, generator=seeded_generator(seed)) - 2
    return x, exact_solution(damped, x, STEP)


def rollout_start(seed: int) -> Tensor:
    """A state (1, 2) uniform in [−1, 1]²; the true path from there stays in the square of :func:`damped_pairs`.

    H = p²/2 + 1 − cos q is at most 0.96 in [−1, 1]² and falls along solutions, so |q| < 1.54 and |p| < 1.39.
    """
    return 2 * torch.rand(1, 2, dtype=torch.float64, generator=seeded_generator(seed, 1)) - 1


class Embedded(nn.Module):
    """P Ψ E with Ψ in R⁴: zeros are appended to the state, and taken off its image."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, z: Tensor) -> Tensor:
        moved: Tensor = self.step(torch.cat([z, torch.zeros_like(z)], dim=1))
        return moved[:, : z.shape[1]]


def network(kind: str, width: int) -> nn.Module:
    """One of :data:`NETWORKS`, float64, random.

    Example:
        >>> network("sympnet", 3)(torch.zeros(2, 2, dtype=torch.float64)).shape
        torch.Size([2, 2])
    """
    require_choice("network", kind, NETWORKS)
    if kind == "plane":
        return build(Structure("symplectic", ("q", "p"), width=width, step=STEP))
    if kind == "embedded":
        embedded = HamiltonianEmbedding(FreeField(2, width))
        return Embedded(DynamicalBlock(embedded, "implicit-midpoint", FreeSignal(STEP))).double()
    return Embedded(sympnet("G", 4, 6, width)).double()


def midpoint_residuals(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """y − x − hPX((x + y)/2, 0): it vanishes where the embedded midpoint step from x is y, and nothing is solved."""
    field = module.step.fields[0]  # type: ignore[union-attr, index]
    slope: Tensor = field.restrict(field(field.embed((x + y) / 2)))  # type: ignore[operator, union-attr]
    return y - x - STEP * slope


@dataclass(frozen=True)
class DampedCell(RunCell):
    """One network fitted to the damped pendulum's map.

    Args:
        network: a key of :data:`NETWORKS`.
        train, test: pairs.
        width: hidden units.
        adam_steps, finish_steps: of the fit, at most.
    """

    version: ClassVar[int] = 2

    network: str
    train: int = 200
    test: int = 100
    width: int = 20
    adam_steps: int = 500
    finish_steps: int = 60

    @property
    def title(self) -> str:
        return f"damped pendulum, {NETWORKS[self.network]}, run {self.run}"

    @property
    def cost(self) -> float:
        return 0.004 * self.adam_steps + 0.1 * self.finish_steps

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        x, y = damped_pairs(self.train + self.test, self.mixed(0))
        with seeded(self.mixed(1)):
            module = network(self.network, self.width)
        clock = time.perf_counter()
        chosen, held_out = last_tenth(x[: self.train], y[: self.train])
        history = fit(
            module,
            *chosen,
            validation=held_out,
            residuals=midpoint_residuals if self.network == "embedded" else flow_map_residuals,
            adam_steps=self.adam_steps,
            finish_steps=self.finish_steps,
            label=self.title,
        )
        seconds, test = time.perf_counter() - clock, slice(self.train, None)
        start = rollout_start(self.mixed(0))
        path, true_path = [start], [start]
        with torch.no_grad():
            error = float((module(x[test]) - y[test]).square().mean())
            for _ in range(ROLLOUT):
                path.append(module(path[-1]))
                true_path.append(exact_solution(damped, true_path[-1], STEP))
        return {
            "test": error,
            "rollout": float((path[-1] - true_path[-1]).square().mean()),
            "parameters": history.unknowns,
            "seconds": seconds,
            "area": float(torch.linalg.det(jacobians(module, x[:20])).mean()),
            "path": torch.cat(path).tolist(),
            "true_path": torch.cat(true_path).tolist(),
        }


@EXPERIMENTS.register("embedding")
class Embedding(GroupedExperiment[str]):
    """The Hamiltonian embedding: exact on known systems, and learned for a map that contracts areas."""

    name = "embedding"
    title = "Any field inside a Hamiltonian one"
    source = "Section 2.2"
    columns: ClassVar[dict[str, str]] = {
        "network": "network",
        "runs": "runs",
        "parameters": "parameters",
        "test": "test MSE, median",
        "most": "most",
        "rollout": f"MSE after {ROLLOUT} steps, median",
        "rollout most": "most",
        "area": "mean det D (truth 0.9048)",
        "seconds": "seconds, at most",
    }
    formats = dict.fromkeys(("test", "most", "rollout", "rollout most"), "{:.1e}".format) | {"area": "{:.4f}".format}

    def embeddings(self, scale: Scale) -> list[EmbeddingCell]:
        """Every system and method."""
        systems = EMBEDDED_SYSTEMS[:2] if scale.preset == "smoke" else EMBEDDED_SYSTEMS
        states = 2 if scale.preset == "smoke" else 10
        return [EmbeddingCell(system, method, states, scale.seed) for system in systems for method in METHODS]

    def groups(self, scale: Scale) -> dict[str, list[DampedCell]]:
        """The fits of each network."""
        if scale.preset == "smoke":
            small = {"train": 30, "test": 10, "width": 3, "adam_steps": 10, "finish_steps": 5}
            return {kind: [DampedCell(kind, seed=scale.seed, **small)] for kind in NETWORKS}
        return {kind: [DampedCell(kind, run=run, seed=scale.seed) for run in range(3)] for kind in NETWORKS}

    def cells(self, scale: Scale) -> list[Cell]:
        return [*self.embeddings(scale), *super().cells(scale)]

    def labels(self, group: str) -> dict[str, str]:
        return {"network": NETWORKS[group]}

    def summary(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """Medians over the runs, and the worst of them."""
        medians = {key: statistics.median(r[key] for r in results) for key in ("test", "rollout", "area")}
        return medians | {
            "most": max(r["test"] for r in results),
            "rollout most": max(r["rollout"] for r in results),
            "parameters": results[0]["parameters"],
            "runs": len(results),
            "seconds": max(r["seconds"] for r in results),
        }

    def tables(self, scale: Scale, store: Store) -> str:
        rows = []
        for cell in self.embeddings(scale):
            result = store.result(cell)
            numbers = dict.fromkeys(("gap", "momentum", "symplectic")) if result is None else result
            rows.append(
                {"system": cell.system, "method": cell.method if result else f"{cell.method}: not run"} | numbers
            )
        columns = {
            "system": "system",
            "method": "method",
            "gap": "largest abs(PΨE − Ψ_f)",
            "momentum": "largest abs(p)",
            "symplectic": "‖DᵀJD − J‖/‖D‖², p ≠ 0",
        }
        exact = markdown_table(rows, columns, dict.fromkeys(("gap", "momentum", "symplectic"), "{:.1e}".format))
        return f"{exact}\n\nThe damped pendulum's map:\n\n{self.table(scale, store)}"

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        return {self.name: paths_figure(self.first_runs(scale, store), watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        checks = []
        for cell in self.embeddings(scale):
            result, keeps = store.result(cell), cell.method in SYMPLECTIC
            got = None if result is None else f"{result['gap']:.1e}, {result['symplectic']:.1e}"
            agrees = None
            if result is not None:
                agrees = result["gap"] <= EXACT and (result["symplectic"] <= EXACT) == keeps
            expected = f"<= {EXACT:g}, {'<=' if keeps else '>'} {EXACT:g}"
            checks.append(Check.of(f"{cell.system}, {cell.method}: gap, symplecticity", "0", expected, got, agrees))
        rows = self.summaries(scale, store)
        plane = rows["plane"]
        for kind, name, share, expected in (
            ("embedded", "embedded", 1e-3, "1000 times smaller"),
            ("sympnet", "SympNet", 1e-2, "100 times smaller"),
        ):
            row, got, agrees = rows[kind], None, None
            if row is not None and plane is not None:
                got = f"{row['test']:.1e} against {plane['test']:.1e}"
                agrees = None if scale.preset == "smoke" else row["test"] <= share * plane["test"]
            checks.append(Check.of(f"damped pendulum: {name} against R²", "", expected, got, agrees))
        return checks


@styled
def paths_figure(results: dict[str, dict[str, Any]], *, watermark: str | None = None) -> Figure:
    """One rollout of each network over the damped pendulum's spiral."""
    figure = new_figure(3.2 * len(NETWORKS), 3.4, watermark)
    styles: dict[str, dict[str, Any]] = {
        "true_path": {"label": "truth", "color": "0.6", "linewidth": 3.0},
        "path": {"label": "network", "linewidth": 1.0},
    }
    for axes, kind in zip(figure.subplots(1, len(NETWORKS)), NETWORKS, strict=True):
        axes.set(title=NETWORKS[kind], xlabel="q", ylabel="p", aspect="equal")
        if kind in results:
            for key, style in styles.items():
                path = torch.tensor(results[kind][key])
                axes.plot(path[:, 0], path[:, 1], **style)
            axes.legend(fontsize=6)
    return figure
