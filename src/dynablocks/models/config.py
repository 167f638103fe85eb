"""Every setting of a network, in one dataclass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from dynablocks.errors import InvalidArgument, require_choice, require_range, require_whole
from dynablocks.linear import ORTHOGONAL
from dynablocks.norms import MOST_WAVELENGTH

T = TypeVar("T")

MOST_CHANNELS, MOST_LAYERS = 65_536, 10_000

LIFTS = ("isometric", "paper")
WEIGHTS = ("orthogonal", "penalised", "free")
PADDINGS = ("same", "full", "circular")
HEADS = ("rows", "frobenius", "none")
STEPS = ("orthogonal", "preconditioned", "exact", "potential")
DENSE_STEPS = ("orthogonal", "potential")
STEP_RULES = ("scheduled", "learned")
BALANCES = ("pair", "network", "penalty")
BOUNDS = ("tight", "paper")


@dataclass(frozen=True)
class ModelConfig:
    """Which network to build; an empty (null) setting takes the default of the named model.

    Args:
        name: certified, metric, convnet, resnet, naive, non_expansive, prescribed or flexible (``dynablocks list
            models``).
        widths: channels of each stage.
        layers: dynamical blocks in each stage.
        lift: isometric (inside the guarantee) or paper (ReLU(aWx) with a free factor a: honest, large bound).
        weights: orthogonal (exactly), penalised (the paper's regulariser and projection) or free.
        method: orthogonal parametrisation: cayley or expm (``dynablocks list orthogonal``).
        padding: same, full (both with zeros) or circular.
        kernel_size: size of the square kernels.
        rows: the fraction of its channels' directions that an orthogonal step moves; with 0.5 a step costs half.
        slope: a of the leaky ReLU max(x, ax) in contractive and expansive blocks (flexible: in the contractive one,
            the other has a ReLU).
        substeps: S, each step is taken as S steps.
        region: feasible region of the pair of steps (``dynablocks list regions``). Its condition, AᵀA = I in the
            contractive field, holds for weights orthogonal with padding full or circular.
        balance: pair (each pair of steps in its region), network (one budget for the whole network) or penalty (steps
            free within their range, with a penalty on the logarithm of each pair's constant where it exceeds 1).
        step_penalty: weight of that penalty.
        bound: which Lipschitz constants to declare: tight or paper (of Euler steps the estimate behind (3.10) alone:
            √(1 + h²) for a contractive ReLU step with ‖A‖ = 1, which (3.5) shows to be non-expansive for h up to 2).
        step: what the certified model is built of: orthogonal, preconditioned, exact or potential (convolutions divided
            by their norm).
        step_start: step size at the start.
        step_end: step size reached at the fraction step_until of the training (certified model).
        step_until: the fraction of the training over which the step grows.
        step_rule: scheduled (also when empty: as the three settings before say) or learned, from step_start on within
            [0, 2].
        stem: space-to-depth factor before the first stage (certified model).
        dense_width: features of the dense orthogonal steps before the head (certified model); 0: all of them.
        dense_layers: how many dense orthogonal steps, of all features that the last stage leaves.
        dense_rows: the fraction of the features' directions that a dense step moves; 0.25 costs a quarter.
        dense_step: orthogonal (also when empty) or potential (matrices divided by their norm, which take no inverse).
        penalty: weight of the orthogonality penalty of penalised convolutions.
        expansive_penalty: the same for the expansive field's map alone; empty (null): as penalty.
        metric_smooth: weight of a constant change of the image, relative to pixel noise, in the norm that the metric
            model is certified in; 1 is the Euclidean norm.
        metric_wavelength: waves longer than so many pixels, from 1 to 1e9, count as smooth in that norm; empty: the
            image's larger side.
        head: rows (each row of norm 1), frobenius (norm 1 of all; the paper's code: at most 1) or none.
        normalise: divide pixels by the data's standard deviation (its factor counts in the certificate), or only
            centre them.

    Raises:
        InvalidArgument: a value is out of its range or a name is not known.
    """

    name: str = "certified"
    widths: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    lift: str | None = None
    weights: str | None = None
    method: str | None = None
    padding: str | None = None
    kernel_size: int | None = None
    rows: float | None = None
    slope: float | None = None
    substeps: int | None = None
    region: str | None = None
    balance: str | None = None
    step_penalty: float | None = None
    bound: str = "tight"
    step: str | None = None
    step_start: float | None = None
    step_end: float | None = None
    step_until: float | None = None
    step_rule: str | None = None
    stem: int | None = None
    dense_width: int | None = None
    dense_layers: int | None = None
    dense_rows: float | None = None
    dense_step: str | None = None
    penalty: float | None = None
    expansive_penalty: float | None = None
    metric_smooth: float | None = None
    metric_wavelength: float | None = None
    head: str | None = None
    normalise: bool | None = None

    def __post_init__(self) -> None:
        choices = {"lift": LIFTS, "weights": WEIGHTS, "padding": PADDINGS, "head": HEADS, "step": STEPS}
        choices |= {"balance": BALANCES, "bound": BOUNDS, "step_rule": STEP_RULES, "dense_step": DENSE_STEPS}
        for name, allowed in choices.items():
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), allowed)
        if self.method is not None:
            ORTHOGONAL.get_known(self.method)
        ranges = dict.fromkeys(("kernel_size", "substeps", "stem"), (1, 16))
        ranges |= {"dense_width": (0, 256 * MOST_CHANNELS), "dense_layers": (0, MOST_LAYERS)}
        for name, limits in ranges.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, require_whole(name, getattr(self, name), *limits))
        if self.slope is not None:
            require_range("slope", self.slope, 0.0, 1.0)
        for name in ("rows", "dense_rows"):
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), 0.0, 1.0, open_low=True)
        for name in ("penalty", "expansive_penalty", "step_penalty"):
            if getattr(self, name) is not None:
                require_range(name, getattr(self, name), 0)
        if self.metric_smooth is not None:
            require_range("metric_smooth", self.metric_smooth, 1e-6, 1e6)
        if self.metric_wavelength is not None:
            require_range("metric_wavelength", self.metric_wavelength, 1.0, MOST_WAVELENGTH)
        for name, low, high in (("widths", 1, MOST_CHANNELS), ("layers", 0, MOST_LAYERS)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _one_a_stage(name, getattr(self, name), low, high))
        if self.normalise is not None and not isinstance(self.normalise, bool):
            raise InvalidArgument(f"normalise is {self.normalise!r}; True or False is needed.")

    def completed(self, defaults: ModelConfig) -> ModelConfig:
        """This configuration with every empty setting taken from ``defaults``."""
        empty = {f.name: getattr(defaults, f.name) for f in fields(self) if getattr(self, f.name) is None}
        full = replace(self, **empty)
        assert full.widths is not None
        assert full.layers is not None
        if len(full.widths) != len(full.layers):
            raise InvalidArgument(
                f"widths {list(full.widths)} and layers {list(full.layers)} differ in length; give one of each a stage."
            )
        return full


def _one_a_stage(name: str, given: object, low: int, high: int) -> tuple[int, ...]:
    sizes = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    if not sizes or any(isinstance(s, bool) or not isinstance(s, int) or not low <= s <= high for s in sizes):
        shown = list(sizes) if isinstance(given, tuple) else given
        raise InvalidArgument(
            f"{name} is {shown!r}; whole numbers from {low} to {high} are needed, one a stage, such as [2, 3]."
        )
    return sizes


def needed(setting: T | None) -> T:
    """A setting that :meth:`ModelConfig.completed` has filled, since every model that reads it has a default of it.

    Example:
        >>> needed(3)
        3
    """
    assert setting is not None
    return setting
