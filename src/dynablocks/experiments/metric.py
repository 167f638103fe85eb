"""Appendix B on images: a network that is non-expansive in ‖·‖_M, beside its Euclidean twin of equal size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynablocks.errors import UnsoundResult
from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.runs import TrainingCell, images
from dynablocks.models import ModelConfig, Network
from dynablocks.norms import DenseMetric, SpectralMetric, smooth_modes
from dynablocks.progress import progress_bar, track
from dynablocks.properties import Lipschitz, verify
from dynablocks.reporting.figures import BLUE, INK, VERMILION, new_figure, styled
from dynablocks.reporting.tables import markdown_table
from dynablocks.reporting.words import bound, measured_bound, percent, proved_percent
from dynablocks.robustness import certify
from dynablocks.robustness.evaluation import evaluating, to_pixels
from dynablocks.run_directory.network import load
from dynablocks.run_directory.pipeline import train_run
from dynablocks.training import TrainingConfig

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODES = 2
"""A shading is made of the 2 × 2 longest cosine waves: a constant and half a wave down, across and both."""

EPSILONS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
SHOWN, PROVED = 2.0, 1.0
SMOOTH = {"euclidean": 1.0, "metric": 0.01}
LABELS = {"euclidean": "ℓ2 (M = I)", "metric": "M, smooth 0.01"}
SEEDS = {"smoke": 1, "cpu": 3, "paper": 5}
EPOCHS = {"smoke": 3.0, "cpu": 20.0, "paper": 60.0}
WIDTHS = {"smoke": (4, 16), "cpu": (8, 32, 64), "paper": (8, 32, 64)}
LAYERS = {"smoke": (1, 1), "cpu": (1, 2, 2), "paper": (1, 2, 2)}
WAVELENGTH = 8.0
TOLERANCE = 1e-9
NON_EXPANSIVE = 1 + 1e-4
"""What a body of non-expansive steps may declare: the bounds of its norms are upper ones, together 2e-5 above 1."""

Curves = dict[str, list[float]]


@dataclass(frozen=True)
class MetricTrainingCell(TrainingCell):
    """A trained network of the metric model."""

    @property
    def title(self) -> str:
        return f"train metric, smooth {self.model.metric_smooth:g}, on {self.data}, seed {self.training.seed}"

    @property
    def cost(self) -> float:
        return 3.0 * (self.training.epochs or 1.0)

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        train_run(self.run_config(store), directory)
        return {"parameters": sum(p.numel() for p in load(directory).parameters())}


@dataclass(frozen=True)
class PerturbationCell(Cell):
    """Accuracy under shading and pixel noise of equal ℓ2 norm, measured and certified, on the test images.

    A perturbation is not clipped to [0, 1]: certificates hold for all images.

    Args:
        training: the network.
        epsilons: ℓ2 norms of the perturbations.
        draws: random perturbations an image, of each kind and norm.
        steps: of the search for the worst shading.
    """

    training: MetricTrainingCell
    epsilons: tuple[float, ...] = EPSILONS
    draws: int = 4
    steps: int = 10

    @property
    def title(self) -> str:
        return f"perturb {self.training.title.removeprefix('train ')}"

    @property
    def cost(self) -> float:
        return 0.2 * len(self.epsilons) * (self.draws + 2 * self.steps)

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        network = load(store.directory(self.training)).cpu()
        test = images(self.training.data, self.training.data_dir).test
        x, labels = to_pixels(test.images, torch.device("cpu"), torch.float32), test.labels
        radii, facts = certified_in_kinds(network, x, labels)
        with evaluating(network):
            measured, shortest = self._measure(network, x, labels)
        for kind, radius in radii.items():
            broken = (shortest[kind] <= radius) & (radius > 0)
            if bool(broken.any()):
                raise UnsoundResult(
                    f"{int(broken.sum())} images changed their class within the certified radius ({kind})."
                )
        proved = {
            f"certified {kind}": [float((r > e).double().mean()) for e in self.epsilons] for kind, r in radii.items()
        }
        medians = {f"median {kind}": float(r.median()) for kind, r in radii.items()}
        checked = verify(network.body, x[:8], kinds=(Lipschitz,), search_steps=5).require()
        stated = {
            "declared": network.certificate_inputs(network.metric)[0],
            "measured": max(c.measured for c in checked),
        }
        example = {"image": x[0, 0].tolist(), **pictures(x, SHOWN)}
        return measured | proved | medians | stated | facts | {"example": example, "samples": len(labels)}

    def _measure(self, network: Network, x: Tensor, labels: Tensor) -> tuple[Curves, dict[str, Tensor]]:
        """Accuracy against ε by kind of perturbation; and the shortest one of each kind that broke an image."""
        shade = shading(x)
        generator = torch.Generator().manual_seed(0)
        curves: Curves = {"shading": [], "worst shading": [], "noise": []}
        shortest = {kind: torch.full((len(x),), torch.inf) for kind in ("shading", "any")}
        for epsilon in track(self.epsilons, "perturbing the test images", len(self.epsilons)):
            right: dict[str, list[float]] = {"shading": [], "noise": []}
            broken = {kind: network(x).argmax(1) != labels for kind in ("shading", "noise")}
            for _ in range(self.draws):
                smooth = epsilon * unit(torch.randn(len(x), MODES**2, generator=generator))
                noise = epsilon * unit(torch.randn(x.shape, generator=generator))
                for kind, change in (("shading", shade(smooth)), ("noise", noise)):
                    wrong = network(x + change).argmax(1) != labels
                    right[kind].append(float((~wrong).double().mean()))
                    broken[kind] |= wrong
            found = worst_shading(network, x, labels, shade, epsilon, self.steps, generator)
            broken["shading"] |= network(x + shade(found)).argmax(1) != labels
            for kind, which in (("shading", broken["shading"]), ("any", broken["shading"] | broken["noise"])):
                shortest[kind][which] = shortest[kind][which].clamp_max(epsilon)
            for kind, values in right.items():
                curves[kind].append(mean(values))
            curves["worst shading"].append(float((~broken["shading"]).double().mean()))
        return curves, shortest


def unit(x: Tensor) -> Tensor:
    """Each row divided by its norm."""
    norms: Tensor = x.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.ndim - 1))
    return x / norms.clamp_min(1e-12)


def shading(x: Float[Tensor, "n c h w"]) -> Callable[[Tensor], Float[Tensor, "n c h w"]]:
    """Coefficients (n, MODES²) to grey shadings of the same ℓ2 norm."""
    channels = x.shape[1]
    basis = smooth_modes(x.shape[2], x.shape[3], MODES).to(x.dtype) / channels**0.5

    def shade(coefficients: Tensor) -> Tensor:
        grey = torch.einsum("nk,khw->nhw", coefficients, basis)
        return grey[:, None].expand(-1, channels, -1, -1)

    return shade


def worst_shading(
    network: Network,
    x: Tensor,
    labels: Tensor,
    shade: Callable[[Tensor], Tensor],
    epsilon: float,
    steps: int,
    generator: torch.Generator,
) -> Float[Tensor, "n modes"]:
    """Coefficients of norm ``epsilon`` at most that lower the margin: projected ascent with steps of 2 ε / steps."""
    coefficients = epsilon * unit(torch.randn(len(x), MODES**2, generator=generator))
    truth = nn.functional.one_hot(labels, network.num_classes).bool()
    for _ in range(steps if epsilon else 0):
        coefficients.requires_grad_(True)
        with torch.enable_grad():
            logits = network(x + shade(coefficients))
            lead = logits.masked_fill(truth, -torch.inf).amax(1) - logits[truth]
            (gradient,) = torch.autograd.grad(lead.sum(), coefficients)
        moved = coefficients.detach() + 2 * epsilon / steps * unit(gradient)
        coefficients = moved * (epsilon / moved.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
    return coefficients.detach()


def certified_in_kinds(network: Network, x: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Radii in ℓ2 units for shadings and for anything, 0 where the class is wrong, from those in the model's norm.

    ‖δ‖_M <= c ‖δ‖₂ with c the largest weight's root among the modes of a shading, or among all.
    """
    metric = network.metric
    assert isinstance(metric, SpectralMetric)
    with progress_bar(f"certifying {len(x)} images") as update:
        result = certify(network, (x, labels), metric=metric, progress=update)
    radii = torch.where(result.correct, result.radii, 0.0)
    ratios = {"shading": metric.largest_on_modes(MODES), "any": metric.largest_on_modes(max(metric.shape[1:]))}
    facts = {f"ratio {kind}": ratio for kind, ratio in ratios.items()} | {"clean": result.accuracy}
    return {kind: radii / ratio for kind, ratio in ratios.items()}, facts


def pictures(x: Tensor, epsilon: float) -> dict[str, list[list[float]]]:
    """The first image under a shading and under noise of norm ``epsilon``."""
    generator = torch.Generator().manual_seed(1)
    smooth = shading(x[:1])(epsilon * unit(torch.tensor([[0.3, 1.0, 1.0, 0.0]])))
    noise = epsilon * unit(torch.randn(x[:1].shape, generator=generator))
    return {"shading": (x[0, 0] + smooth[0, 0]).tolist(), "noise": (x[0, 0] + noise[0, 0]).tolist()}


@dataclass(frozen=True)
class MisprintCell(Cell):
    """The norms ‖J‖_M of small Euler steps of (B.1) as printed, −WᵀΣ(MWz + b), and corrected, −WᵀΣ(WMz + b).

    The largest over random W and M and the corners of σ′ in [0, 1], at h λ_max(W M Wᵀ) = 0.1.
    """

    size: int = 4
    trials: int = 100

    @property
    def title(self) -> str:
        return "the field (B.1) as printed"

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        largest = {"printed": 0.0, "corrected": 0.0}
        eye = torch.eye(self.size, dtype=torch.float64)
        for _ in range(self.trials):
            w, root = torch.randn(2, self.size, self.size, dtype=torch.float64, generator=generator)
            metric = DenseMetric(root @ root.mT + 0.1 * eye)
            corner = (torch.rand(self.size, generator=generator) < 0.5).double().diag()
            step = 0.1 / float(torch.linalg.matrix_norm(w @ metric.root, ord=2)) ** 2
            for name, inner in (("printed", metric.matrix @ w), ("corrected", w @ metric.matrix)):
                jacobian = metric.root @ (eye - step * w.mT @ corner @ inner) @ metric.inverse_root
                largest[name] = max(largest[name], float(torch.linalg.matrix_norm(jacobian, ord=2)))
        return dict(largest)


@EXPERIMENTS.register("metric")
class MetricExperiment(Experiment):
    """Non-expansive networks in a norm that weighs smooth changes less than pixel noise."""

    name = "metric"
    title = "Non-expansive in a norm of images: shading and pixel noise"
    source = "Appendix B"

    def cells(self, scale: Scale) -> list[Cell]:
        trained = [cell for kind in SMOOTH for cell in self._perturbed(scale, kind)]
        return [MisprintCell(), *trained]

    def _perturbed(self, scale: Scale, kind: str) -> list[PerturbationCell]:
        return [perturbation_cell(scale, kind, seed) for seed in scale.seeds(SEEDS[scale.preset])]

    def _mean(self, scale: Scale, store: Store, kind: str) -> dict[str, Any] | None:
        """The mean of the built cells' numbers over the seeds; ``None`` when there is none."""
        found = store.results_of(self._perturbed(scale, kind))
        if not found:
            return None
        first = found[0]
        average: dict[str, Any] = {"runs": len(found), "example": first["example"]}
        for name, value in first.items():
            if isinstance(value, float):
                average[name] = mean(result[name] for result in found)
            elif isinstance(value, list):
                average[name] = [mean(values) for values in zip(*(result[name] for result in found), strict=True)]
        return average

    def tables(self, scale: Scale, store: Store) -> str:
        rows: list[dict[str, str]] = []
        for kind, label in LABELS.items():
            got = self._mean(scale, store, kind)
            rows.append({"norm": label} | (dict.fromkeys(COLUMNS, "not run") if got is None else _row(got)))
        return f"{NOTE}\n\n{markdown_table(rows, {'norm': 'norm'} | COLUMNS)}"

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        means = {kind: self._mean(scale, store, kind) for kind in SMOOTH}
        return {"metric": perturbation_figure(means, watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        printed = store.result(MisprintCell())
        checks = []
        for name, what in (("printed", "WᵀΣ(MWz + b), as printed"), ("corrected", "WᵀΣ(WMz + b)")):
            got = None if printed is None else f"{printed[name]:.4f}"
            expected = "above 1: a misprint" if name == "printed" else "not above 1"
            agrees = printed is not None and (printed[name] > 1 + TOLERANCE) == (name == "printed")
            checks.append(Check.of(f"largest ‖J‖_M of small steps, {what}", "not above 1", expected, got, agrees))
        return [*checks, *(self._constant_check(scale, store, kind) for kind in LABELS)]

    def _constant_check(self, scale: Scale, store: Store, kind: str) -> Check:
        """Of the run whose constant is most above what is declared, or whose declared one is most above 1."""
        cells = self._perturbed(scale, kind)
        what = f"‖J‖ of the trained body from ‖·‖_M to ℓ2, {LABELS[kind]}"
        expected = f"not above declared, nor that above {NON_EXPANSIVE:g}"
        found = store.results_of(cells)
        if len(found) < len(cells):
            return Check.of(what, "not above 1", expected, None, None)
        worst = max(found, key=_excess)
        got = f"{measured_bound(worst['measured'])} measured, {bound(worst['declared'])} declared"
        return Check.of(what, "not above 1", expected, got, _excess(worst) <= TOLERANCE)


def _excess(result: dict[str, Any]) -> float:
    """By how much the measured constant is above the declared one, or the declared one above NON_EXPANSIVE."""
    excess: float = max(result["measured"] - result["declared"], result["declared"] - NON_EXPANSIVE)
    return excess


NOTE = """Both networks have the same layers and the same number of parameters, and are trained alike on the digits;
M = I is the Euclidean twin. A shading is a combination of the 2 × 2 longest cosine waves, noise has independent normal
pixels; both have the ℓ2 norm given, and are not clipped. Worst shading is the worst of random ones and of a gradient
search. The certified radius of the M network is one in ‖·‖_M; divided by the largest ‖δ‖_M / ‖δ‖₂ among shadings, or
among all δ, it is the ℓ2 norm up to which such a δ cannot change the class. Means over the runs."""


COLUMNS = {
    "clean": "clean",
    "noise": f"noise of norm {SHOWN:g}",
    "shading": f"shading of norm {SHOWN:g}",
    "worst shading": "worst shading",
    "certified shading": f"certified, shadings to {PROVED:g}",
    "median shading": "median radius, shadings",
    "median any": "median radius, anything",
    "runs": "runs",
}


def _row(got: dict[str, Any]) -> dict[str, str]:
    """The table's entries from the mean over the runs."""
    place = {name: EPSILONS.index(PROVED if name.startswith("certified") else SHOWN) for name in COLUMNS}
    row = {name: f"{got[name]:.3f}" for name in COLUMNS if name.startswith("median")}
    for name in ("noise", "shading", "worst shading", "certified shading"):
        write: Callable[[float], str] = proved_percent if name.startswith("certified") else percent
        row[name] = write(got[name][place[name]])
    return row | {"clean": percent(got["clean"]), "runs": str(got["runs"])}


def perturbation_cell(scale: Scale, kind: str, seed: int) -> PerturbationCell:
    """One network of the experiment with its measurement."""
    widths, layers = WIDTHS[scale.preset], LAYERS[scale.preset]
    model = ModelConfig(
        "metric", widths=widths, layers=layers, metric_smooth=SMOOTH[kind], metric_wavelength=WAVELENGTH
    )
    training = TrainingConfig(
        epochs=EPOCHS[scale.preset],
        batch_size=64,
        optimiser="adam",
        schedule="one-cycle",
        loss="offset-cross-entropy",
        temperature=0.25,
        offset=0.6,
        precision="32",
        seed=seed,
    )
    cell = MetricTrainingCell(model, training, "digits", scale.preset)
    return PerturbationCell(cell, steps=3 if scale.preset == "smoke" else 10)


@styled
def perturbation_figure(means: dict[str, dict[str, Any] | None], *, watermark: str | None = None) -> Figure:
    """Accuracy against the ℓ2 norm of a shading (left) and of pixel noise (right), measured and certified."""
    figure = new_figure(8.6, 3.7, watermark)
    panels = figure.subplots(1, 2, sharey=True)
    kinds = (("shading", "worst shading", "certified shading"), ("noise", "", "certified any"))
    for axes, (random, worst, proved) in zip(panels, kinds, strict=True):
        for kind, colour in (("euclidean", BLUE), ("metric", VERMILION)):
            got = means[kind]
            if got is None:
                continue
            for name, style in ((random, "-"), (worst, "--"), (proved, ":")):
                if name:
                    axes.plot(EPSILONS, [100 * v for v in got[name]], style, color=colour)
            axes.plot([], [], color=colour, label=LABELS[kind])
        axes.set(xlim=(0, EPSILONS[-1]), ylim=(0, 100), xlabel=f"ℓ2 norm of the {random}, pixels in [0, 1]")
    for style, label in (("-", "random"), ("--", "worst found"), (":", "certified")):
        panels[0].plot([], [], style, color=INK, label=label)
    panels[0].set_ylabel("accuracy in %")
    panels[1].legend(*panels[0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    got = next((got for got in means.values() if got), None)
    for place, kind in enumerate(("shading", "noise")):
        _picture(panels[1], got, kind, place)
    return figure


def _picture(axes: Axes, got: dict[str, Any] | None, kind: str, place: int) -> None:
    """A digit under the perturbation of norm SHOWN, beside the panel."""
    if got is None:
        return
    inset = axes.inset_axes((1.06 + 0.25 * place, 0.12, 0.21, 0.28))
    inset.imshow(got["example"][kind], cmap="gray", vmin=0, vmax=1)
    inset.set(xticks=[], yticks=[])
    inset.set_xlabel(f"{kind}, {SHOWN:g}", fontsize=7.5)
