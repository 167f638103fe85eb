r"""Figure 8: two fields from pairs of their flows, X = ∇V + X_S (paper appendix A).

X₁(x)ᵢ = sin³ xᵢ + xᵢ³ in R⁴ is a gradient, X₂(x) = (x₂, −sin x₁) a pendulum. A pair is (x, Φ^h(x)) with x uniform in
[−1, 1]ⁿ and h = 0.05; 900 of 1,000 pairs are for training. The loss is mean (Ψ(x, y) − y)² with
Ψ(x, y) = z + h ∇̄V(z, y), z = Ψ_S^h(x): a step of Calvo's method on X_S, then one of Gonzalez' discrete gradient, whose
end is the known y, so nothing is solved.

Three networks:

- The paper's network, sizes of the released code (the paper prints none): V with two hidden layers of 10, the entries
  of Λ in X_S = Λ(x)x with three of 60, sigmoid; Adam at 0.1, divided by ten every 100 epochs, batches of 64. That code
  lets no gradient through ∇V at the midpoint (its input is detached); here the gradient is the true one.
- Splitting: V(x) = αᵀγ(Ax + b), X_S with one hidden layer whose inner weights are random and kept; Adam, then
  Levenberg–Marquardt on the same loss, in float64. The loss falls below what the splitting itself errs by on the true
  field: the learned field is that of a modified equation, O(h) or O(h²) beside the true one.
- Fourth order: the same field, but the loss is that of one RK4 step of ∇V + X_S, whose error is O(h⁵): this row is
  about the field rather than the loss.

Widths were chosen on the last 100 of 900 training pairs of another draw (seed 100), by RK4. V on X₁: A and b random and
kept, 300 functions: 7e-7; A and b trained, 40 without Adam: 5e-10; 80: 6e-10 after 60 steps; 24: 1.1e-10. X_S on X₂: 10
hidden units: 4e-8; 40: 7e-12.
"""

from __future__ import annotations

import itertools
import statistics
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dynablocks.errors import require_choice
from dynablocks.experiments.base import EXPERIMENTS, Check, Scale
from dynablocks.experiments.cells import Store
from dynablocks.experiments.fitted import AdamTraining, FittedCell, Samples
from dynablocks.experiments.grouped import GroupedExperiment
from dynablocks.experiments.reference import paper_results
from dynablocks.fields import FieldFacts, GradientField, SumField, VectorField
from dynablocks.fields.base import potential_of
from dynablocks.fields.sphere import RotationField, TangentField, skew_matrix
from dynablocks.fields.symmetric import GradientOf
from dynablocks.fitting import fit
from dynablocks.integrators import exact_solution, integrator
from dynablocks.integrators.discrete_gradient import discrete_gradient
from dynablocks.linear import Dense
from dynablocks.reporting.figures import BLUE, FAINT, GREEN, VERMILION, new_figure, styled
from dynablocks.seeding import seeded, seeded_generator

if TYPE_CHECKING:
    from jaxtyping import Float64
    from matplotlib.figure import Figure

STEP = 0.05
RUNS = 5
DIMENSIONS = {"X1": 4, "X2": 2}
FORMULAS = {"X1": "X₁ = sin³x + x³, R⁴", "X2": "X₂ = (x₂, −sin x₁)"}
LIMIT = 1e-9
PLOTTED = 7.6e-6
"""Of X₂ the paper shows arrows alone: a field a tenth off, which such a plot just shows, has the loss
(0.1 h)² mean (x₂² + sin² x₁)/2 = 7.6e-6."""
EPOCH_MEAN = 4.98e-5
"""Of X₁ the released run prints 5.474e-6 for its last epoch: the sum over 11 of its 15 batches, divided by 100, so that
their mean is 4.976e-5. Its 2.75e-5 (``paper_results.json``) is the loss of the last batch, of four pairs."""
ARROWS = 20.0
"""How long a field is where its arrow spans the panel, for all networks."""


def target(name: str, x: Float64[Tensor, "batch n"]) -> Float64[Tensor, "batch n"]:
    """X₁ or X₂.

    Example:
        >>> target("X2", torch.tensor([[0.0, 3.0]]))
        tensor([[3., -0.]])
    """
    require_choice("field", name, DIMENSIONS)
    return x.sin() ** 3 + x**3 if name == "X1" else torch.stack([x[:, 1], -x[:, 0].sin()], dim=1)


def target_pairs(name: str, count: int, seed: int) -> Samples:
    """Points uniform in [−1, 1]ⁿ and Φ^h of them, the flow of :func:`target`."""
    generator = seeded_generator(seed)
    x = 2 * torch.rand(count, DIMENSIONS[name], dtype=torch.float64, generator=generator) - 1
    return x, exact_solution(lambda z: target(name, z), x, STEP)


class NetworkRotation(TangentField):
    r"""X(x) = Λ(x)x, the entries of the skew Λ from any module: (batch, n) ↦ (batch, n(n − 1)/2).

    Example:
        >>> turn = NetworkRotation(nn.Linear(2, 1), 2)
        >>> bool((turn(x := torch.ones(1, 2)) * x).sum().abs() < 1e-6)
        True
    """

    def __init__(self, network: nn.Module, entries: int) -> None:
        super().__init__()
        self.network, self.in_shape = network, (entries,)

    def generator(self, x: Tensor) -> Tensor:
        return skew_matrix(self.network(x), self.in_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return (self.generator(x) @ x.unsqueeze(-1)).squeeze(-1)

    def facts(self) -> FieldFacts:
        return FieldFacts(tangent=True, reason="Λ(x)x with skew Λ")


class FlowStep(nn.Module):
    """(x, y) in one row of 2n numbers ↦ the step from x that is compared with y.

    Args:
        field: ∇V + X_S, of two terms in this order.
        method: ``"splitting"``, Calvo's step and then a discrete gradient that ends in y, or an integrator's name.
    """

    def __init__(self, field: SumField, method: str) -> None:
        super().__init__()
        self.field, self.method = field, method

    def forward(self, pair: Float64[Tensor, "batch twice"]) -> Float64[Tensor, "batch n"]:
        x, y = pair.chunk(2, dim=1)
        if self.method != "splitting":
            return integrator(self.method).step(self.field, x, STEP)
        gradient, tangent = self.field.terms()
        z = integrator("calvo").step(tangent, x, STEP)

        def potential(point: Tensor) -> Tensor:
            return potential_of(gradient, point)

        return z + STEP * discrete_gradient("gonzalez", potential, z, y, gradient=gradient)


def printed_field(entries: int, width: int, hidden: int) -> SumField:
    """V: two hidden layers of ``width``; Λ: three of ``hidden``; sigmoid, PyTorch's start."""
    sizes = [entries, hidden, hidden, hidden, entries * (entries - 1) // 2]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Sigmoid()]
    potential = nn.Sequential(
        nn.Linear(entries, width), nn.Sigmoid(), nn.Linear(width, width), nn.Sigmoid(), nn.Linear(width, 1, bias=False)
    )
    return SumField(GradientOf(potential, (entries,)), NetworkRotation(nn.Sequential(*layers[:-1]), entries))


def ridge_field(entries: int, width: int, hidden: int) -> SumField:
    """V = αᵀγ(Ax + b), all of it to be learned; X_S with random inner weights that stay and outer ones from 0."""
    gradient, tangent = GradientField(Dense(entries, width), "tanh", alpha=0.0), RotationField(entries, hidden)
    assert isinstance(gradient.linear, Dense)
    assert gradient.alpha is not None
    for inner, bias in ((gradient.linear, gradient.bias), (tangent.inner, tangent.bias)):
        assert bias is not None
        nn.init.normal_(inner.matrix)
        nn.init.normal_(bias)
    nn.init.normal_(gradient.alpha, std=0.1)
    nn.init.zeros_(tangent.outer.matrix)
    tangent.inner.requires_grad_(False)
    assert tangent.bias is not None
    tangent.bias.requires_grad_(False)
    return SumField(gradient, tangent)


@dataclass(frozen=True)
class FieldCell(FittedCell):
    """One learned field.

    Args:
        target: ``"X1"`` or ``"X2"``.
        width, hidden: of V and of Λ.
    """

    target: str = "X1"
    width: int = 10
    hidden: int = 60

    @property
    def title(self) -> str:
        return f"{self.target} from its flow, {self.name}, run {self.run}"

    @abstractmethod
    def step(self) -> FlowStep:
        """The step to be fitted, with random parameters."""

    def data(self) -> Samples:
        x, y = target_pairs(self.target, self.points, self.mixed(0))
        return torch.cat([x, y], dim=1), y

    def network(self) -> FlowStep:
        with seeded(self.mixed(1)):
            return self.step().double()

    def measure(self, network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        assert isinstance(network, FlowStep)
        with torch.no_grad():
            errors = (network(x) - y).square().mean(1)
        losses = {"train": float(errors[: self.train].mean()), "test": float(errors[self.train :].mean())}
        fitted = sum(p.numel() for p in network.parameters() if p.requires_grad)
        return losses | judged(self.target, network.field) | {"fitted": fitted}


@torch.no_grad()
def judged(name: str, learned: VectorField) -> dict[str, Any]:
    """‖X_θ − X‖/‖X‖ in L² and the largest error over the largest ‖X‖, at 20,000 points; values for plots."""
    x = 2 * torch.rand(20_000, DIMENSIONS[name], dtype=torch.float64, generator=seeded_generator(1)) - 1
    truth = target(name, x)
    error, size = (learned(x) - truth).norm(dim=1), truth.norm(dim=1)
    line = torch.zeros(41, DIMENSIONS[name], dtype=torch.float64)
    line[:, 0] = torch.linspace(-1, 1, 41, dtype=torch.float64)
    side = torch.linspace(-1, 1, 9, dtype=torch.float64)
    shown = line if name == "X1" else torch.cartesian_prod(side, side)
    return {
        "relative": float(error.square().mean().sqrt() / size.square().mean().sqrt()),
        "largest": float(error.max() / size.max()),
        "shown": [shown.tolist(), learned(shown).tolist()],
    }


@dataclass(frozen=True)
class PrintedFieldCell(FieldCell):
    """The paper's networks and training, sizes of the released code."""

    name: ClassVar[str] = "the paper's network"

    training: AdamTraining = field(
        default_factory=lambda: AdamTraining(epochs=200, batch_size=64, lr=0.1, weight_decay=0.0, stair=100)
    )

    @property
    def cost(self) -> float:
        return 0.3 * self.training.epochs * self.points / 1000

    def step(self) -> FlowStep:
        return FlowStep(printed_field(DIMENSIONS[self.target], self.width, self.hidden), "splitting")

    def fit(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        self.training.train(network, x, y, self.mixed(2), self.title)


@dataclass(frozen=True)
class SplittingFieldCell(FieldCell):
    """Ridge functions; Adam on all points, then Levenberg–Marquardt.

    Args:
        adam_steps, finish_steps: at most so many.
    """

    name: ClassVar[str] = "splitting, second order"
    method: ClassVar[str] = "splitting"

    width: int = 24
    hidden: int = 40
    adam_steps: int = 1000
    finish_steps: int = 150

    @property
    def cost(self) -> float:
        return (0.005 * self.adam_steps + 0.1 * self.finish_steps) * self.points / 1000

    def step(self) -> FlowStep:
        return FlowStep(ridge_field(DIMENSIONS[self.target], self.width, self.hidden), self.method)

    def fit(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        fit(network, x, y, adam_steps=self.adam_steps, finish_steps=self.finish_steps, label=self.title)


@dataclass(frozen=True)
class FourthOrderFieldCell(SplittingFieldCell):
    """The same field through one step of RK4."""

    name: ClassVar[str] = "RK4, second order"
    method: ClassVar[str] = "rk4"


KINDS: tuple[type[FieldCell], ...] = (PrintedFieldCell, SplittingFieldCell, FourthOrderFieldCell)


@EXPERIMENTS.register("fig8")
class FieldsFromFlows(GroupedExperiment[tuple[str, str]]):
    """Two fields from pairs of their flows by ∇V + X_S."""

    name = "fig8"
    title = "Two fields learned from their flows: a gradient and a field tangent to spheres"
    source = "Appendix A, figure 8"
    columns: ClassVar[dict[str, str]] = {
        "field": "field",
        "network": "network",
        "runs": "runs",
        "train": "training loss, median",
        "most": "most",
        "test": "test loss",
        "relative": "‖X_θ − X‖/‖X‖ on [−1, 1]ⁿ",
        "largest": "largest error / largest ‖X‖",
        "fitted": "fitted numbers",
        "seconds": "seconds, at most",
    }
    formats = dict.fromkeys(("train", "most", "test", "relative", "largest"), "{:.1e}".format)

    def groups(self, scale: Scale) -> dict[tuple[str, str], list[FieldCell]]:
        """By target and network."""
        small: dict[str, Any] = {"seed": scale.seed}
        short: dict[str, Any] = {}
        training: dict[str, Any] = {}
        if scale.preset == "smoke":
            small |= {"points": 60, "train": 50, "width": 4, "hidden": 4}
            short = {"adam_steps": 20, "finish_steps": 5}
            training = {"training": AdamTraining(epochs=2, batch_size=64, lr=0.1, weight_decay=0.0)}
        runs = range(1 if scale.preset == "smoke" else RUNS)
        groups: dict[tuple[str, str], list[FieldCell]] = {}
        for name in DIMENSIONS:
            for kind in KINDS:
                options = training if kind is PrintedFieldCell else short
                groups[name, kind.name] = [kind(name, run=run, **small, **options) for run in runs]
        return groups

    def labels(self, group: tuple[str, str]) -> dict[str, str]:
        name, network = group
        return {"field": FORMULAS[name], "network": network}

    def summary(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        medians = {
            key: statistics.median(result[key] for result in results)
            for key in ("train", "test", "relative", "largest")
        }
        return medians | {
            "most": max(result["train"] for result in results),
            "runs": len(results),
            "fitted": results[0]["fitted"],
            "seconds": max(result["seconds"] for result in results),
        }

    def tables(self, scale: Scale, store: Store) -> str:
        batch = paper_results()["vector_field_X1"]["train_mse"]
        released = {"paper, last epoch of one run": EPOCH_MEAN, "paper, last batch of one run": batch}
        rows: list[dict[str, Any]] = [
            {"field": FORMULAS["X1"], "network": name, "train": loss} for name, loss in released.items()
        ]
        return self.table(scale, store, *rows)

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        first = self.first_runs(scale, store)
        shown = {key: torch.tensor(result["shown"], dtype=torch.float64) for key, result in first.items()}
        return {self.name: fields_figure(shown, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        rows, checks = self.summaries(scale, store), []
        limits, said = {"X1": EPOCH_MEAN, "X2": PLOTTED}, {"X1": f"{EPOCH_MEAN:g}", "X2": "a plot"}
        for name in DIMENSIONS:
            for kind in KINDS:
                row = rows[name, kind.name]
                got = None if row is None else f"{row['train']:.1e}"
                limit = limits[name] if kind is PrintedFieldCell else LIMIT
                agrees = None if row is None or scale.preset == "smoke" else row["train"] <= limit
                # The loss of RK4 steps is another than the paper's.
                paper = "" if kind is FourthOrderFieldCell else said[name]
                checks.append(Check.of(f"{name}: training loss, {kind.name}", paper, f"<= {limit:g}", got, agrees))
        return checks


@styled
def fields_figure(shown: dict[tuple[str, str], Tensor], *, watermark: str | None = None) -> Figure:
    """X₁ along the first axis with the errors of each network, and X₂ with networks' arrows over it, to one scale."""
    figure = new_figure(10.0, 3.4, watermark)
    along, errors, plane = figure.subplots(1, 3)
    line = torch.linspace(-1, 1, 41, dtype=torch.float64)
    along.plot(line, line.sin() ** 3 + line**3, color=FAINT, linewidth=5.0, label="X₁")
    # The thinner arrows lie upon the thicker ones, so that all are seen.
    looks = zip(KINDS, (VERMILION, BLUE, GREEN), (0.010, 0.007, 0.0035), strict=True)
    for above, (kind, colour, width) in enumerate(looks, start=3):
        if ("X1", kind.name) in shown:
            points, values = shown["X1", kind.name]
            along.plot(points[:, 0], values[:, 0], "--", color=colour, label=kind.name)
            errors.semilogy(points[:, 0], (values - target("X1", points)).norm(dim=1), color=colour, label=kind.name)
        if ("X2", kind.name) in shown:
            points, values = shown["X2", kind.name]
            if not plane.collections:
                plane.quiver(*points.T, *target("X2", points).T, color=FAINT, width=0.016, scale=ARROWS)
            plane.quiver(*points.T, *values.T, color=colour, width=width, scale=ARROWS, zorder=above)
    along.set(xlabel="x₁", ylabel="first entry of X₁")
    errors.set(xlabel="x₁", ylabel="‖X_θ − X₁‖")
    plane.set(xlabel="x₁", ylabel="x₂", title="X₂ (grey), and as learned")
    along.legend(fontsize=6)
    return figure
