"""Certified radii: how far a sample may move before a network of known Lipschitz constant can change its class."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument, require_choice, require_range, require_whole
from dynablocks.files import finite_or_none
from dynablocks.lifting import Head
from dynablocks.models import Network
from dynablocks.models.network import row_distances
from dynablocks.numerics.rounding import product_slack
from dynablocks.properties import EUCLIDEAN, Metric
from dynablocks.properties.declarations import require_norm
from dynablocks.properties.own_code import foreign, overrides
from dynablocks.properties.structure import original
from dynablocks.robustness.arithmetic import NoRoundingBound, plain_arithmetic
from dynablocks.robustness.attacks import laid_out
from dynablocks.robustness.curves import Curve, checked_epsilons
from dynablocks.robustness.evaluation import (
    LabelledImages,
    check_labels,
    checked_data,
    checked_logits,
    evaluating,
    model_place,
    to_pixels,
)
from dynablocks.robustness.rounding import Known, LogitError, rounding_bound

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

ARITHMETICS = {"float64": torch.float64, "float32": torch.float32}
"""The number formats in which a network is certified."""

_ARITHMETIC = 1 - 2.0**-40
_TWIN_IMAGES = 32
_TWIN_SAFETY = 8.0
_EPS_FACTOR = 32.0
_ROWS = 4096
"""Radii are computed of so many samples at a time: each takes some eight float64 numbers a class on the way."""


def certified_radii(
    logits: Float[Tensor, "n classes"],
    head_weight: Float[Tensor, "classes features"],
    body_lipschitz: float,
    *,
    labels: Int[Tensor, " n"] | None = None,
    logit_error: float = 0.0,
    rounding: LogitError | None = None,
) -> Float[Tensor, " n"]:
    """The l2 radius around each sample within which the predicted class cannot change.

    ``min over j != i of (z_i - z_j - 4e) / (L ||w_i - w_j||)``, i the predicted class, and 0 when that is not positive.

    Holds when z = W f(x) + b, f has Lipschitz constant at most L, and L is an **upper** bound. ``e`` bounds the
    rounding error of one logit: each of the two logits errs at the sample and again at the perturbed one, hence 4e. The
    distances of rows are raised by what rounding may have taken from them, and the result is lowered by one part in
    2^40 for the rest of the float64 arithmetic done here. Ties and logits that are not finite get 0. Two equal rows of
    W differ by their biases only, so their pair never limits the radius; if no pair limits it, it is infinite.

    With ``rounding``, the features err by F + f r within r and the logits in the head by H + h r; then it is
    ``(z_i - z_j - 2 (F d + H_i + H_j)) / ((L + f) d + h_i + h_j)``, d = ||w_i - w_j||.

    Args:
        logits: (N, classes), best in float64.
        head_weight: (classes, features) of the last layer.
        body_lipschitz: L, from an upper bound; infinite gives radii 0.
        labels: (N,); where the prediction is another class, the radius is 0.
        logit_error: e, in units of the logits; left out where ``rounding`` is given.
        rounding: a proven bound for these logits (:func:`dynablocks.robustness.rounding.rounding_bound`).

    Returns:
        (N,) float64 radii in units of the body's input.

    Raises:
        InvalidArgument: shapes that do not fit, a negative or NaN constant, a head that is not finite.

    Source:
        D2.13 of the design; Tsuzuku, Sato, Sugiyama, NeurIPS 2018, proposition 1 (the general form).

    Example:
        >>> radii = certified_radii(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.eye(2), 1.0)
        >>> [round(r, 4) for r in radii.tolist()]
        [1.4142, 0.0]
    """
    weight = head_weight.detach().to(torch.float64)
    _check_radius_arguments(logits, body_lipschitz, logit_error)
    if weight.ndim != 2 or len(weight) != logits.shape[1]:
        raise InvalidArgument(f"head_weight has shape {tuple(weight.shape)}; ({logits.shape[1]}, features) is needed.")
    if not bool(torch.isfinite(weight).all()):
        raise InvalidArgument("head_weight holds values that are not finite; train the model again.")
    distances = row_distances(weight) * (1 + product_slack(weight.shape[1]))
    predictions = logits.argmax(dim=1)
    distances = distances.to(logits.device)

    def of_some(some: slice) -> Tensor:
        chosen = predictions[some]
        if rounding is None:
            return _smallest_ratio(logits[some], chosen, (body_lipschitz * distances)[chosen], 4 * logit_error)
        bound = replace(rounding, features=rounding.features[some], head=rounding.head[some])
        return _smallest_ratio(logits[some], chosen, *_rounded(bound, chosen, distances, body_lipschitz))

    radii = torch.cat([of_some(slice(start, start + _ROWS)) for start in range(0, max(1, len(logits)), _ROWS)])
    if labels is not None:
        check_labels(labels, logits.shape[1])
        radii = torch.where(labels.to(predictions.device) == predictions, radii, 0.0)
    return radii


def generic_radii(
    logits: Float[Tensor, "n classes"], lipschitz: float, *, logit_error: float = 0.0
) -> Float[Tensor, " n"]:
    """The radius that needs only the Lipschitz constant of the whole network.

    ``(z_(1) - z_(2) - 4e) / (sqrt(2) L)``. With L = L_body ‖W‖ it never exceeds :func:`certified_radii`, but for
    rounding, because two rows of W are at most sqrt(2) ‖W‖ apart.

    Args:
        logits: (N, classes).
        lipschitz: an upper bound of the constant of x -> logits.
        logit_error: e, in units of the logits.

    Returns:
        (N,) float64 radii; ties and logits that are not finite get 0.

    Raises:
        InvalidArgument: logits that are not (N, classes >= 2), a negative or NaN constant.

    Source:
        Celledoni et al., arXiv 2210.02373, equation (3.1).

    Example:
        >>> [round(r, 4) for r in generic_radii(torch.tensor([[2.0, 0.0, 1.0]]), 1.0).tolist()]
        [0.7071]
    """
    _check_radius_arguments(logits, lipschitz, logit_error)
    classes = logits.shape[1]
    distances = torch.full((classes, classes), math.sqrt(2), dtype=torch.float64, device=logits.device)
    predictions = logits.argmax(dim=1)
    return _smallest_ratio(logits, predictions, (lipschitz * distances)[predictions], 4 * logit_error)


def _check_radius_arguments(logits: Tensor, lipschitz: float, logit_error: float) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InvalidArgument(f"logits have shape {tuple(logits.shape)}; (N, classes >= 2) is needed.")
    if math.isnan(lipschitz) or lipschitz < 0:
        raise InvalidArgument(f"the Lipschitz constant is {lipschitz!r}; a bound of 0 or more is needed.")
    require_range("logit_error", logit_error, 0.0)


def _rounded(rounding: LogitError, predictions: Tensor, distances: Tensor, lipschitz: float) -> tuple[Tensor, Tensor]:
    """How fast z_i - z_j can fall as it is computed, and by how much it can be wrong here and there, for all j."""
    rows = distances[predictions]
    chosen = predictions[:, None]
    slopes = (lipschitz + rounding.features_slope) * rows + rounding.head_slope[chosen] + rounding.head_slope
    losses = 2 * (rounding.features[:, None] * rows + rounding.head.gather(1, chosen) + rounding.head)
    return slopes, losses


def _smallest_ratio(logits: Tensor, predictions: Tensor, slopes: Tensor, losses: Tensor | float) -> Tensor:
    """min over j != i of (z_i - z_j - losses_j) / slopes_j; ``slopes`` (N, classes) bounds how fast it can fall."""
    values, own = logits.detach().to(torch.float64), predictions[:, None]
    margins = values.gather(1, own) - values - losses
    # 0/0 and inf/inf are decided by the margin; an infinite slope or loss certifies nothing.
    ratios = torch.where(slopes > 0, margins / slopes, torch.inf).scatter(1, own, torch.inf)
    sound = (margins > 0).scatter(1, own, True).all(dim=1) & torch.isfinite(values).all(dim=1)
    sound &= torch.isfinite(slopes).scatter(1, own, True).all(dim=1)
    radii = torch.where(sound, ratios.amin(dim=1), 0.0)
    return torch.nan_to_num(radii, nan=0.0, posinf=torch.inf).clamp_min(0.0) * _ARITHMETIC


@dataclass(frozen=True)
class CertificateResult:
    """Certified radii of a model on a data set, in sample order, in pixel units [0, 1] and the norm that is named.

    ``arithmetic`` is the number format of the model, the coarsest of its logits, parameters and buffers,
    ``logit_error`` the largest bound of a logit's rounding error at a sample, ``proved`` whether it is a proof rather
    than a measurement, and ``rounding_reason`` the sentence that says why it is none.

    A sample counts at epsilon when it is correct and its radius is **larger** than epsilon: then every perturbation
    with norm <= epsilon leaves a positive margin. At epsilon 0 this is the accuracy without the ties.
    """

    radii: Float[Tensor, " n"]
    predictions: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    body_lipschitz: float
    logit_error: float = 0.0
    norm: str = "l2"
    arithmetic: str = ""
    proved: bool = False
    rounding_reason: str = ""

    @property
    def correct(self) -> Bool[Tensor, " n"]:
        """Which samples are classified as labelled."""
        return self.predictions == self.labels

    @property
    def accuracy(self) -> float:
        """Clean accuracy."""
        return float(self.correct.double().mean())

    def certified_accuracy(self, epsilons: Sequence[float]) -> tuple[float, ...]:
        """The fraction of samples that are correct and certified at each epsilon.

        Example:
            >>> labels = torch.tensor([0, 1])
            >>> result = CertificateResult(torch.tensor([0.3, 0.0]).double(), labels, labels, body_lipschitz=1.0)
            >>> result.certified_accuracy([0.0, 0.2, 0.3001])
            (0.5, 0.5, 0.0)
        """
        values = checked_epsilons(epsilons)
        return tuple(float((self.correct & (self.radii > value)).double().mean()) for value in values)

    def first(self, count: int) -> CertificateResult:
        """The same of the first samples alone, such as those that were attacked.

        Example:
            >>> labels = torch.tensor([0, 1])
            >>> result = CertificateResult(torch.tensor([0.3, 0.0]).double(), labels, labels, body_lipschitz=1.0)
            >>> result.first(1).certified_accuracy([0.2])
            (1.0,)
        """
        some = slice(count)
        return replace(self, radii=self.radii[some], predictions=self.predictions[some], labels=self.labels[some])

    def curve(self, epsilons: Sequence[float]) -> Curve:
        """Certified accuracy against epsilon."""
        return Curve(tuple(epsilons), self.certified_accuracy(epsilons), len(self.labels))

    def summary(self, epsilons: Sequence[float]) -> dict[str, Any]:
        """What ``certificate.json`` holds; an infinite bound is written as None."""
        return {
            "samples": len(self.labels),
            "clean_accuracy": self.accuracy,
            "body_lipschitz": finite_or_none(self.body_lipschitz),
            "logit_error": finite_or_none(self.logit_error),
            "arithmetic": self.arithmetic,
            "rounding": "proved" if self.proved else "measured",
            "rounding_reason": self.rounding_reason,
            "certified_accuracy": self.curve(epsilons).points(),
        } | ({} if self.norm == "l2" else {"norm": self.norm})

    def tensors(self) -> dict[str, Tensor]:
        """What ``certificate.safetensors`` holds."""
        return {"radii": self.radii, "predictions": self.predictions, "labels": self.labels}

    @classmethod
    def restore(cls, summary: dict[str, Any], tensors: dict[str, Tensor]) -> CertificateResult:
        """The result again from :meth:`summary` and :meth:`tensors`."""
        bound = math.inf if summary["body_lipschitz"] is None else float(summary["body_lipschitz"])
        error = math.inf if summary["logit_error"] is None else float(summary["logit_error"])
        norm, arithmetic = str(summary.get("norm", "l2")), str(summary.get("arithmetic", ""))
        return cls(
            **tensors,
            body_lipschitz=bound,
            logit_error=error,
            norm=norm,
            arithmetic=arithmetic,
            proved=summary.get("rounding") == "proved",
            rounding_reason=str(summary.get("rounding_reason", "")),
        )


def certify(
    model: nn.Module,
    dataset: LabelledImages | tuple[Tensor, Tensor],
    batch_size: int = 256,
    *,
    metric: Metric = EUCLIDEAN,
    arithmetic: str = "float64",
    samples: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> CertificateResult:
    """Certified radius of every sample by :func:`certified_radii`.

    ``model.certificate_inputs()`` gives ``(body_lipschitz, head_weight)``; for another norm than l2,
    ``model.certificate_inputs(metric)`` does, with the constant from that norm on images.

    A :class:`~dynablocks.models.Network` is evaluated in ``arithmetic``, and the radii are lowered by a proven bound of
    that arithmetic's rounding (:mod:`dynablocks.robustness.rounding`): about 1e-10 in float64; in float32 the proven
    worst case is far above what happens and costs about 0.01 of radius for small networks, most of it for large ones.
    Where there is no such bound, and for any other model, which is evaluated as it is, the error of one logit is
    measured, not proved, and ``rounding_reason`` says why: the larger of 8 times the largest difference between the
    model and its float64 copy on the first 32 images, and 32 eps max|z| (1024 eps max|z| without a float64 copy). The
    eps is that of the coarsest format of logits, parameters and buffers: logits widened at the end were rounded before.

    Radii are capped at sqrt(C H W), the diameter of [0, 1]^(C H W), times the largest ratio of ``metric`` to l2.

    Of ``torch.compile(model)``, and of a network with parts compiled in place, the certificate is that of the model run
    without compilation: how compiled code rounds is not known.

    Args:
        model: pixels in [0, 1] (N, C, H, W) to logits, with ``certificate_inputs()``.
        dataset: ``images`` and ``labels``, or a pair of them.
        batch_size: images at once.
        metric: the norm of the radii; ``model.metric`` is the one a network's own constant is stated in.
        arithmetic: float64 or float32, the number format in which the network will run.
        samples: the first so many; all when None.
        progress: called with the fraction done.

    Raises:
        InvalidArgument: the model offers no certificate inputs, its logits are not finite, or ``metric`` is named "l2"
            and is another norm, or its methods, or those of the network's own norm, contradict each other.
        BadData: images or labels that do not fit.

    Source:
        D2.13 of the design.

    Example:
        >>> class Linear(nn.Module):
        ...     def forward(self, x): return x.flatten(1)
        ...     def certificate_inputs(self): return 1.0, torch.eye(2, dtype=torch.float64)
        >>> result = certify(Linear(), (torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([0])))
        >>> f"{result.radii.item():.4f}"
        '0.7071'
    """
    batch_size = require_whole("batch_size", batch_size, 1)
    if samples is not None:
        samples = require_whole("samples", samples, 1)
    if metric != EUCLIDEAN and metric.name == EUCLIDEAN.name:
        raise InvalidArgument(
            f"the metric, a {type(metric).__name__}, is named {metric.name!r}, as the Euclidean norm is; give it a "
            "name of its own."
        )
    # What is wrapped around a network lends it the network's attributes, and is none: its code would not be looked at.
    given, model = model, original(model)
    certificate_inputs: Callable[..., tuple[float, Tensor]] | None = getattr(model, "certificate_inputs", None)
    if certificate_inputs is None:
        raise InvalidArgument(
            f"{type(model).__name__} has no certificate_inputs(); make it a dynablocks.models.Network(body, head, "
            "input_shape, ModelConfig()) with a dynablocks.lifting.Head, or give it that method: (an upper bound of "
            "the Lipschitz constant of all before the last layer, the weight of that layer)."
        )
    dtype = ARITHMETICS[require_choice("arithmetic", arithmetic, ARITHMETICS)]
    images, labels = checked_data(model, dataset, samples)
    reason = foreign(given, everywhere=True)
    if reason is not None:
        raise InvalidArgument(f"{reason}; a certificate is of what the classes compute: remove it before.")
    if isinstance(model, Network):
        if type(model).forward is not Network.forward:
            raise InvalidArgument(
                f"{type(model).__name__} has a forward of its own, of which nothing is known; a certificate is made of "
                "the body and the head. Put what it does into a layer of the body."
            )
        if overrides(model.head, Head, "forward"):
            raise InvalidArgument(
                f"{type(model.head).__name__} has a forward of its own, of which its weight does not tell; put what it "
                "does into the weight."
            )
        # A copy runs as it is written, where a part of the network was compiled in place.
        compiled = any(part._compiled_call_impl for part in model.modules())
        model = model if _formats(model) == {dtype} and not compiled else copy.deepcopy(model).to(dtype)
        certificate_inputs = model.certificate_inputs
    # The weights are computed in plain arithmetic, too.
    with plain_arithmetic(), evaluating(model):
        body_lipschitz, head_weight = certificate_inputs() if metric == EUCLIDEAN else certificate_inputs(metric)
        for norm in (metric, model.metric if isinstance(model, Network) else EUCLIDEAN):
            if norm.fits(tuple(images.shape[1:])):
                require_norm(norm, tuple(images.shape[1:]))
        logits, rounding, why = _logits(model, images, metric, batch_size, progress)
    check_labels(labels, logits.shape[1])
    head_weight, constant = head_weight.cpu(), float(body_lipschitz)
    if rounding is None:
        logit_error = _logit_error(model, images, logits)
    else:
        logit_error = float(rounding.of_logits(head_weight.double().norm(dim=1)).max())
    radii = certified_radii(
        logits, head_weight, constant, logit_error=0.0 if rounding else logit_error, rounding=rounding
    )
    radii = radii.clamp_max(math.sqrt(images[0].numel()) * metric.bounded_by(EUCLIDEAN))
    kind = str(_coarsest(model, logits)).removeprefix("torch.")
    return CertificateResult(
        radii, logits.argmax(dim=1), labels.cpu(), constant, logit_error, metric.name, kind, rounding is not None, why
    )


def _logits(
    model: nn.Module,
    images: Tensor,
    metric: Metric,
    batch_size: int,
    progress: Callable[[float], None] | None,
) -> tuple[Float[Tensor, "n classes"], LogitError | None, str]:
    """The logits and the proven bound of their error; where there is no proof, ``None`` and the sentence why."""
    why = f"{type(model).__name__} is no dynablocks.models.Network, of whose layers the rounding is known."
    if isinstance(model, Network):
        bounds: list[LogitError] = []
        start = model.metric
        known: Known = {}

        def forward(pixels: Tensor) -> Tensor:
            logits, error = rounding_bound(model, pixels, metric, start=start, known=known)
            bounds.append(error)
            return logits

        try:
            return _all_logits(model, images, batch_size, progress, forward), LogitError.joined(bounds), ""
        except NoRoundingBound as error:
            why = str(error)
    return _all_logits(model, images, batch_size, progress, model), None, why


def _all_logits(
    model: nn.Module,
    images: Tensor,
    batch_size: int,
    progress: Callable[[float], None] | None,
    forward: Callable[[Tensor], Tensor],
) -> Float[Tensor, "n classes"]:
    device, dtype = model_place(model)
    parts = []
    for start in range(0, len(images), batch_size):
        batch = laid_out(model, to_pixels(images[start : start + batch_size], device, dtype))
        parts.append(checked_logits(forward, batch).cpu())
        if progress is not None:
            progress(min(1.0, (start + batch_size) / len(images)))
    return torch.cat(parts)


def _formats(model: nn.Module) -> set[torch.dtype]:
    """The number formats of a model's parameters and buffers."""
    return {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}


def _coarsest(model: nn.Module, logits: Tensor) -> torch.dtype:
    """The coarsest of the number formats in which the model computes, as far as it shows them.

    Its parameters, buffers and logits do; what has neither of the first two is given float32.
    """
    return max({logits.dtype, model_place(model)[1], *_formats(model)}, key=lambda kind: torch.finfo(kind).eps)


def _logit_error(model: nn.Module, images: Tensor, logits: Tensor) -> float:
    """e of :func:`certified_radii` for logits computed in the model's own dtype; see :func:`certify`."""
    device, dtype = model_place(model)[0], _coarsest(model, logits)
    scale = float(logits.abs().max()) * torch.finfo(dtype).eps
    if dtype == torch.float64:
        return _EPS_FACTOR * scale
    few = images[:_TWIN_IMAGES]
    try:
        twin = copy.deepcopy(model).to(torch.float64)
        with evaluating(twin):
            exact = checked_logits(twin, to_pixels(few, device, torch.float64)).cpu()
    except (RuntimeError, TypeError):
        return 1024 * scale
    difference = float((exact - logits[: len(few)].to(torch.float64)).abs().max())
    return max(_TWIN_SAFETY * difference, _EPS_FACTOR * scale)
