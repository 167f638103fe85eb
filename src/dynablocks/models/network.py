"""A classifier: pixel normalisation, stages of dynamical blocks, a linear head."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynablocks.blocks import DynamicalBlock
from dynablocks.errors import InvalidArgument
from dynablocks.lifting import Head, PixelNormalisation
from dynablocks.linear.maps import is_mixed
from dynablocks.models.config import ModelConfig, needed
from dynablocks.norms import Channelwise, SpectralMetric
from dynablocks.properties import EUCLIDEAN, Declaration, Lipschitz, Metric, Properties, Structured, compose, declare
from dynablocks.properties.own_code import failed_property
from dynablocks.registry import Registry
from dynablocks.seeding import seeded
from dynablocks.switching import NetworkBudget, PairSignal

if TYPE_CHECKING:
    from jaxtyping import Float


class Network(Structured):
    r"""Pixels in [0, 1] ↦ logits z = W f(x) + b, with everything before W in ``body``.

    Attributes:
        input_shape: (channels, height, width) of one image.
        num_classes: how many logits.
        config: the complete configuration the network was built from.
        class_names: by class index, of a network that was loaded from a run which stores them; otherwise ``None``.
    """

    class_names: tuple[str, ...] | None = None

    def __init__(self, body: nn.Sequential, head: Head, input_shape: tuple[int, int, int], config: ModelConfig) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.input_shape, self.num_classes, self.config = input_shape, head.out_shape[0], config
        if config.balance == "network":
            parts = (part for _, part in body.named_modules(remove_duplicate=False))
            self.budget = NetworkBudget([part for part in parts if isinstance(part, PairSignal)])

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """The logits of a batch of images.

        Raises:
            InvalidArgument: the images have another shape than the network was built for, are whole numbers, or are in
                a number format that its weights do not take, as float64 beside float32.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_shape:
            taken = ", ".join(map(str, self.input_shape))
            raise InvalidArgument(f"the images have shape {tuple(x.shape)}; the network takes (batch, {taken}).")
        if not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise InvalidArgument(f"the pixels are {kind}; the network takes numbers in [0, 1]: divide bytes by 255.")
        self._require_format(x)
        logits: Tensor = self.head(self.body(x))
        return logits

    def _require_format(self, x: Tensor) -> None:
        """Refuse pixels of a wider number format than the weights' own; the normalisation takes up narrower ones.

        Under autocast the formats meet.
        """
        if torch.compiler.is_compiling() or is_mixed(x):
            return
        matrices = (p for p in self.parameters() if p.ndim > 1 and p.is_floating_point())
        kind = next((matrix.dtype for matrix in matrices), x.dtype)
        if torch.promote_types(x.dtype, kind) != kind:
            raise InvalidArgument(
                f"the pixels are {x.dtype}, the weights of {type(self).__name__} are {kind}; give x.to({kind}), or "
                "convert the network, with .double() or .float()."
            )

    def declare(self) -> Declaration:
        declared = compose([("body", self.body), ("head", self.head)], title=f"Network {self.config.name}")
        stated = declared.properties.of(Lipschitz)
        if stated is None or stated.metric == EUCLIDEAN:
            return declared
        euclidean = Lipschitz(stated.metric.bounded_by(EUCLIDEAN)).then(Lipschitz(stated.constant))
        assert euclidean is not None
        return replace(declared, properties=Properties([*declared.properties, euclidean]))

    @property
    def metric(self) -> Metric:
        """The norm on images in which the body's Lipschitz constant is stated: ℓ2, or that of the metric model."""
        try:
            stated = declare(self.body).properties.of(Lipschitz)
        except AttributeError as error:
            raise failed_property(self, "metric", error) from error
        return EUCLIDEAN if stated is None else stated.metric

    def certificate_inputs(self, metric: Metric = EUCLIDEAN) -> tuple[float, Tensor]:
        """An upper bound of the body's Lipschitz constant from ``metric``, and the head's weight in float64.

        Where the constant is stated in another norm, it is multiplied by the largest ratio of the two. Where the body
        ends in a norm ‖·‖_M, the weight's rows are M^{−1/2}wᵢ, so that distances of rows are ‖wᵢ − wⱼ‖_{M⁻¹}.

        Raises:
            InvalidArgument: the norm is one of samples of another shape.

        Source: design D2.13 and D2.6.
        """
        if not metric.fits(self.input_shape):
            raise InvalidArgument(
                f"the metric {metric.name} is not one of images {self.input_shape}; give one that is."
            )
        weight = self.head.weight.detach().cpu().double()
        stated = declare(self.body).properties.of(Lipschitz)
        if stated is None:
            return math.inf, weight
        # M^{−1/2} multiplies the weight's rounding by at most its condition number; its own is one of the rows, where
        # distances of rows are asked for.
        slack = 1 + 2.0**-40 * (stated.image.condition - 1)
        error = 2 * stated.image.whitening_error * stated.image.condition
        error = error * _largest_row_in_distances(weight) if error else 0.0
        slack = slack / (1 - error) if error < 0.5 else math.inf
        return stated.constant * stated.metric.bounded_by(metric) * slack, stated.image.dual(weight)

    def blocks(self) -> list[tuple[str, DynamicalBlock]]:
        """The dynamical blocks in order, with their names."""
        return [(name, m) for name, m in self.named_modules() if isinstance(m, DynamicalBlock)]


def _largest_row_in_distances(weight: Tensor) -> float:
    """The length of the longest row over the least distance of two rows that differ."""
    distances = row_distances(weight)
    distances = distances[distances > 0]
    return float(weight.norm(dim=1).max() / distances.min()) if len(distances) else 0.0


def row_distances(weight: Tensor) -> Tensor:
    """‖wᵢ − wⱼ‖ for all rows of a matrix, also where the squares of their differences underflow or overflow.

    Example:
        >>> row_distances(torch.tensor([[3e-170, 4e-170], [0.0, 0.0]], dtype=torch.float64))[0, 1].item() > 0
        True
    """
    return torch.stack([_lengths(row - weight) for row in weight])


def _lengths(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(1)
    scale = torch.where(largest > 0, largest.clamp_min(torch.finfo(rows.dtype).tiny), 1.0)
    lengths = scale * torch.linalg.vector_norm(rows / scale[:, None], dim=1)
    return torch.where(largest.isinf(), math.inf, lengths)


SHARED = frozenset({"name", "widths", "layers", "bound", "head", "normalise"})
"""The settings that every model has."""

BodyBuilder = Callable[[ModelConfig, tuple[int, int, int]], tuple[nn.Sequential, int]]


@dataclass(frozen=True)
class ModelKind:
    """A named family of networks: its defaults, and the function that builds everything between pixels and head.

    Args:
        summary: one line, for tables.
        defaults: what a configuration leaves empty; ``widths``, ``layers`` and ``head`` of it are needed.
        build_body: from a complete configuration and (channels, height, width), the layers between pixels and head and
            how many features they leave.
        settings: what the family reads of a configuration, besides :data:`SHARED`.
        metric: the norm on images in which the body's constant is stated; ℓ2 when ``None``.
        unread: what other choices in a configuration leave unread, with a word for that choice: not what presets set,
            so that a flag may turn off what reads it.

    Raises:
        InvalidArgument: the defaults leave empty what every network needs, or the settings are no set of names of
            :class:`ModelConfig`.

    Example:
        >>> def build_body(config, shape):
        ...     return nn.Sequential(nn.Flatten()), shape[0] * shape[1] * shape[2]
        >>> defaults = ModelConfig("pixels", widths=(1,), layers=(0,), head="rows")
        >>> ModelKind("a linear classifier", defaults, build_body, frozenset()).metric is None
        True
    """

    summary: str
    defaults: ModelConfig
    build_body: BodyBuilder
    settings: frozenset[str]
    metric: Callable[[ModelConfig, tuple[int, int, int]], SpectralMetric] | None = None
    unread: Callable[[ModelConfig], dict[str, str]] = lambda config: {}

    def __post_init__(self) -> None:
        empty = [name for name in ("widths", "layers", "head") if getattr(self.defaults, name) is None]
        if empty:
            raise InvalidArgument(
                f"the defaults of model {self.defaults.name} leave {', '.join(empty)} empty; give each a value, as in "
                "ModelConfig(..., widths=(4,), layers=(1,), head='rows')."
            )
        known = {setting.name for setting in fields(ModelConfig)}
        if not isinstance(self.settings, Set) or not self.settings <= known:
            raise InvalidArgument(
                f"the settings of model {self.defaults.name} are {self.settings!r}; a set of names of ModelConfig is "
                "needed, such as frozenset({'kernel_size'})."
            )

    def require_settings(self, config: ModelConfig) -> None:
        """Refuse a setting that would change nothing.

        A complete configuration, as networks have and runs store, is that of a network which was built before: of it
        those settings alone are refused that these networks do not have.

        Raises:
            InvalidArgument: a setting that these networks do not have, or do not read with the others (as far as
                ``unread`` knows), is given, and not as in ``defaults``.
        """
        taken = sorted(self.settings | SHARED)
        unread = {} if config == config.completed(self.defaults) else self.unread(config)
        for name, value in vars(config).items():
            if value is None or value == getattr(self.defaults, name):
                continue
            if name not in taken:
                raise InvalidArgument(
                    f"{name} is {value!r}, but model {config.name} has no such setting; leave it out. It has "
                    f"{', '.join(taken)}."
                )
            if name in unread:
                raise InvalidArgument(f"{name} is {value!r}, which changes nothing with {unread[name]}; leave it out.")


MODELS: Registry[ModelKind] = Registry("model")


def build(
    config: ModelConfig,
    input_shape: tuple[int, int, int],
    num_classes: int,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    seed: int | None = None,
) -> Network:
    """The network of a configuration.

    Args:
        config: what to build.
        input_shape: (channels, height, width) of one image.
        num_classes: how many classes.
        mean, std: per channel, of the training pixels; ``std`` is used only where ``config.normalise``.
        seed: start the random weights from this seed and leave the global random state as it is: all of it where the
            CPU is the default device, otherwise that of the CPU.

    Raises:
        InvalidArgument: an unknown name, a setting that the model does not have, or the image does not fit the stages.

    Example:
        >>> network = build(ModelConfig("certified", widths=(8, 8), layers=(1, 1)), (1, 8, 8), 10)
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    kind = MODELS.get_known(config.name)
    kind.require_settings(config)
    full = config.completed(kind.defaults)
    channels = input_shape[0]
    mean = mean or (0.5,) * channels
    std = (std or (0.25,) * channels) if full.normalise else (1.0,) * channels
    if not len(mean) == len(std) == channels:
        raise InvalidArgument(
            f"mean and std have {len(mean)} and {len(std)} numbers; images of shape {input_shape} need {channels}."
        )
    with seeded(seed):
        built = kind.build_body(full, input_shape)
        if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Sequential)):
            raise InvalidArgument(
                f"build_body of model {config.name!r} gives a {type(built).__name__}; a pair is needed: an "
                "nn.Sequential and the number of features that it ends in."
            )
        body, features = built
        normalisation = PixelNormalisation(mean, std)
        if list(body._modules) != [str(number) for number in range(len(body))]:
            body = nn.Sequential(*body)  # of other names none can be put first
        body.insert(0, Channelwise(normalisation, kind.metric(full, input_shape)) if kind.metric else normalisation)
        head = Head(features, num_classes, needed(full.head))
    return Network(body, head, (channels, input_shape[1], input_shape[2]), full)
