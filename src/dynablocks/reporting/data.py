"""What a report shows, and how the parts of a model are measured for it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.fields import VectorField
from dynablocks.linear import frozen_weights
from dynablocks.properties import declare
from dynablocks.properties.jacobians import DENSE_LIMIT, jacobian_norms
from dynablocks.robustness.curves import Curve

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

_POWER_ITERATIONS = 8
_LARGE_PART_SAMPLES = 1


@dataclass(frozen=True)
class BlockRow:
    """A part of a network: the Lipschitz bound it declares and the largest slope found by measurement.

    Args:
        name: where it stands in the network, such as ``body.3``.
        description: what it is, in one line.
        declared: the upper bound; infinite when there is none.
        measured: a lower bound of the true constant, NaN when it was not measured.

    Example:
        >>> round(BlockRow("body.1", "a block", declared=1.1, measured=1.0).slack, 3)
        0.1
    """

    name: str
    description: str
    declared: float
    measured: float

    @property
    def slack(self) -> float:
        """``declared / measured − 1``: by how much the bound may exceed the truth; infinite when nothing bounds it."""
        if math.isnan(self.measured) or math.isnan(self.declared):
            return math.nan
        return math.inf if self.measured == 0 else self.declared / self.measured - 1


@dataclass(frozen=True)
class StepRow:
    """The step sizes of one block.

    Args:
        block: the block's name.
        values: its signal's step sizes by name.
        pieces: what is active in turn: (index of the field, signed step size).
        kinds: for each field index ``"contractive"``, ``"expansive"`` or ``"free"``.
    """

    block: str
    values: Mapping[str, float]
    pieces: Sequence[tuple[int, float]]
    kinds: tuple[str, ...] = ("contractive", "expansive")


@dataclass(frozen=True, eq=False)
class Example:
    """One test image with what was proved about it and what the attack did to it.

    Args:
        image: uint8 pixels.
        label, prediction: class indices.
        certified_radius: l2 radius in pixel units within which the class cannot change; 0 when nothing is certified.
        smallest_broken_norm: the shortest perturbation found that changes the class; 0 when the image is wrong as is,
            infinite when none was found, ``None`` when the image was not attacked.
        adversarial: the attacked image, uint8 or floats in [0, 1]; ``None`` when there is none to show.
        adversarial_prediction: the class of ``adversarial``.
        attack: the name of the attack's loss.
        proved: whether the radius counts rounding errors by a proven bound, and not by a measurement
            (:attr:`dynablocks.robustness.CertificateResult.proved`).
    """

    image: UInt8[Tensor, "c h w"]
    label: int
    prediction: int
    certified_radius: float
    smallest_broken_norm: float | None = None
    adversarial: Tensor | None = None
    adversarial_prediction: int | None = None
    attack: str = ""
    proved: bool = True

    def __post_init__(self) -> None:
        if self.image.dtype != torch.uint8 or self.image.ndim != 3 or self.image.shape[0] not in (1, 3):
            raise InvalidArgument(
                f"an example image is {self.image.dtype} {tuple(self.image.shape)}; "
                "uint8 (1 or 3, height, width) is needed."
            )
        if self.adversarial is not None and self.adversarial.shape != self.image.shape:
            raise InvalidArgument(
                f"the adversarial image has shape {tuple(self.adversarial.shape)}; "
                f"it must be that of the image, {tuple(self.image.shape)}."
            )


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything one report shows; what was not measured stays empty and is said to be so.

    Args:
        title: the headline.
        command: what to type to get this result again.
        metrics: the content of ``metrics.json``.
        history: the lines of ``metrics.jsonl``.
        curves: accuracy against epsilon by name; a name that begins with ``certified`` is a proof, others attacks.
        blocks, steps, examples: the rows of their sections.
        class_names: by class index.
        explanation: ``str(dynablocks.properties.explain(model))``.
        config_text: the complete configuration.
        watermark: a short text across every figure, such as ``"smoke preset"``, or ``None``.
    """

    title: str
    command: str
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]] = ()
    curves: Mapping[str, Curve] = field(default_factory=dict)
    blocks: Sequence[BlockRow] = ()
    steps: Sequence[StepRow] = ()
    examples: Sequence[Example] = ()
    class_names: Sequence[str] = ()
    explanation: str = ""
    config_text: str = ""
    watermark: str | None = None


def block_rows(
    model: nn.Module, samples: Float[Tensor, "n c h w"], *, progress: Callable[[float], None] | None = None
) -> list[BlockRow]:
    """Declared and measured Lipschitz constants of every part of ``model``, and of all parts before the head together.

    Measured is the largest ‖J(x)‖₂ at the inputs that reach the part; where J is large, a few power iterations at the
    first sample. It is a lower bound, so a sound declaration is never below it by more than rounding. Declared is
    the Euclidean bound of the part's declaration. Both belong to one float64 copy of the model.
    :func:`dynablocks.properties.verify` searches harder.

    Args:
        model: a network with ``body`` and ``head``, or any module.
        samples: a few images in [0, 1]; four are enough.
        progress: called with the fraction done.

    Raises:
        InvalidArgument: there are no samples.

    Example:
        >>> from dynablocks.models import ModelConfig, build
        >>> network = build(ModelConfig("certified", widths=(4,), layers=(1,), stem=4), (1, 8, 8), 3, seed=0)
        >>> [row.name for row in block_rows(network, torch.rand(1, 1, 8, 8))]
        ['body.0', 'body.1', 'body.2', 'body.3', 'head', 'body (all parts)']
    """
    if samples.ndim < 2 or len(samples) == 0:
        raise InvalidArgument(f"samples have shape {tuple(samples.shape)}; a batch of at least one image is needed.")
    twin = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    rows = []
    with frozen_weights(twin):
        targets = _inputs_of(twin, dict(_parts(twin)), samples.detach().cpu().double())
        for done, (name, (part, x)) in enumerate(targets.items()):
            declared = declare(part).properties.lipschitz
            with torch.enable_grad():
                measured = _largest_slope(part, x)
            rows.append(BlockRow(name, describe(part), declared, measured))
            if progress is not None:
                progress((done + 1) / len(targets))
    return rows


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts that do something to a norm, in order, and last the whole body."""
    body, head = getattr(model, "body", None), getattr(model, "head", None)
    if not isinstance(body, nn.Module) or not isinstance(head, nn.Module):
        yield from _leaves(model, "model")
        return
    yield from _leaves(body, "body")
    yield "head", head
    yield "body (all parts)", body


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        for child, part in module.named_children():
            yield from _leaves(part, f"{name}.{child}")
    elif not isinstance(module, (nn.Flatten, nn.Identity)):
        yield name, module


def _inputs_of(model: nn.Module, parts: dict[str, nn.Module], x: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """Each part with the batch that reaches it; a part that is not reached is left out."""
    reached: dict[str, Tensor] = {}

    def remember(part: nn.Module, inputs: tuple[Any, ...], name: str) -> None:
        reached.setdefault(name, inputs[0].detach())

    handles = [part.register_forward_pre_hook(functools.partial(remember, name=name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (part, reached[name]) for name, part in parts.items() if name in reached}


def _largest_slope(part: nn.Module, x: Tensor) -> float:
    points = x if x[0].numel() <= DENSE_LIMIT else x[:_LARGE_PART_SAMPLES]
    return float(jacobian_norms(part, points, iterations=_POWER_ITERATIONS).detach().max())


def describe(part: nn.Module) -> str:
    """One line that says what a part is.

    Example:
        >>> describe(nn.MaxPool2d(2))
        'MaxPool2d: windows do not overlap: L = 1'
    """
    if isinstance(part, DynamicalBlock):
        fields = " and ".join(dict.fromkeys(_field_name(f) for f in part.fields))
        steps = ", ".join(f"{name} = {value:.4g}" for name, value in part.signal.summary().items())
        return f"{fields}, {part.method!r}, {steps}"
    declaration = declare(part)
    return f"{declaration.title or type(part).__name__}: {declaration.reason}"


def _field_name(part: nn.Module) -> str:
    detail = part.extra_repr()
    return f"{type(part).__name__}({detail})" if detail else type(part).__name__


def step_rows(model: nn.Module) -> list[StepRow]:
    """The step sizes of every dynamical block of ``model``, in order.

    Example:
        >>> from dynablocks.models import ModelConfig, build
        >>> network = build(ModelConfig("certified", widths=(4,), layers=(1,), stem=4), (1, 8, 8), 3, seed=0)
        >>> step_rows(network)[0].pieces
        [(0, 1.0)]
    """
    rows = []
    for name, block in model.named_modules():
        if isinstance(block, DynamicalBlock):
            kinds = tuple(_kind(part) for part in block.fields)
            rows.append(StepRow(name, block.signal.summary(), block.signal.sizes(), kinds))
    return rows


def _kind(part: nn.Module) -> str:
    """What a positive step does: the Jacobian's spectrum is nowhere positive, nowhere negative, or neither."""
    assert isinstance(part, VectorField)
    facts = part.facts()
    if facts.one_sided <= 0:
        return "contractive"
    return "expansive" if facts.spectrum is not None and facts.spectrum[0] >= 0 else "free"
