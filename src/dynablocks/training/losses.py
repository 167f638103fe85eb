"""Losses that ask for a margin: the multi-class hinge loss and cross-entropy with an offset on the true logit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from dynablocks.errors import InvalidArgument
from dynablocks.registry import Registry

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from dynablocks.training.config import TrainingConfig

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Of logits (N, classes) and labels: classes (N,), or where labels are softened their probabilities (N, classes)."""
LOSSES: Registry[Callable[[TrainingConfig], LossFunction]] = Registry("loss")


def mean_loss(
    each: LossFunction,
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
) -> Float[Tensor, ""]:
    r"""The mean over a batch of a loss ℓ of single images; where labels are probabilities p, of its expectation.

    .. math:: \frac1N \sum_i \ell(z_i, y_i) \quad\text{or}\quad \frac1N \sum_i \sum_k p_{ik}\, \ell(z_i, k)

    Of probabilities it takes the memory of N·K rows of K logits: of 1,000 classes, keep batches small.

    Args:
        each: logits and classes (N,) to the loss of each image (N,).
        logits: z, before any softmax.
        labels: y, class indices, or p.

    Example:
        >>> z, p = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.75, 0.25]])
        >>> mean_loss(lambda logits, labels: labels.float(), z, p)
        tensor(0.2500)
    """
    if not labels.is_floating_point():
        return each(logits, labels).mean()
    count, classes = logits.shape
    every = torch.arange(classes, device=logits.device).repeat(count)
    losses = each(logits.repeat_interleave(classes, 0), every).view(count, classes)
    return (labels * losses).sum(1).mean()


def hinge(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    margin: float,
) -> Float[Tensor, ""]:
    r"""Multi-class hinge loss, summed over the wrong classes and averaged over the batch.

    .. math:: \frac1N \sum_i \sum_{j \ne y_i} \max\{0,\ \mathrm{margin} - (z_{i,y_i} - z_{ij})\}

    It is zero exactly when every true logit leads every other by ``margin``.

    Args:
        logits: z, before any softmax.
        labels: y, class indices, or the probabilities of all classes, as :func:`mean_loss` takes them.
        margin: the wanted lead, in logit units.

    Source: Celledoni et al., arXiv 2210.02373, section 3.3.

    Example:
        >>> import torch
        >>> hinge(torch.tensor([[1.0, 0.95, 0.0]]), torch.tensor([0]), margin=0.1)
        tensor(0.0500)
    """
    return mean_loss(partial(_hinge_of_each, margin=margin), logits, labels)


def _hinge_of_each(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    true = logits.gather(1, labels[:, None])
    violations = (margin - true + logits).clamp_min(0)
    return violations.scatter(1, labels[:, None], 0.0).sum(1)


def offset_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    offset: float,
    temperature: float,
    power: float | None = None,
    focus: float | None = None,
) -> Float[Tensor, ""]:
    r"""Cross-entropy after ``offset`` is taken from the true logit, at a temperature t, scaled back by t.

    .. math:: \frac{t}{N} \sum_i \mathrm{CE}\Bigl(\frac{z_i - \mathrm{offset}\cdot e_{y_i}}{t},\ y_i\Bigr)

    The factor t keeps the gradient's size independent of t; for t → 0 the loss is max(0, offset − margin), a hinge.

    With a ``power`` q, CE = −log p becomes the generalised cross-entropy (1 − p^q)/q: bounded, so an image that cannot
    win its offset stops pulling at the others. For q = 1 and t → 0 it counts the images whose margin is below the
    offset: what a certified accuracy counts.

    With a ``focus`` β, CE is multiplied by (1 − p)^β: an image that has won its offset pulls less, and more of the pull
    is that of images near the decision boundary. It buys accuracy and small radii with large ones.

    Args:
        logits: z, before any softmax.
        labels: y, class indices, or the probabilities of all classes, as :func:`mean_loss` takes them.
        offset: u ≥ 0, in logit units; the wanted lead of the true logit.
        temperature: t > 0.
        power: q in (0, 1], or ``None`` for cross-entropy, the limit of q → 0.
        focus: β >= 1, or ``None`` for none; not together with ``power``.

    Raises:
        InvalidArgument: both a power and a focus.

    Source: Prach and Lampert, *Almost-Orthogonal Layers*, arXiv 2208.03160; the settings of *1-Lipschitz Layers
    Compared*, arXiv 2311.16833, are offset 2√2·36/255 and t = 1/4. Zhang and Sabuncu, *Generalized cross entropy loss*,
    arXiv 1805.07836, for q. Lai et al., *Enhancing certified robustness via block reflector orthogonal layers and logit
    annealing loss*, arXiv 2505.15174, for β (after the focal loss of Lin et al., arXiv 1708.02002).

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> offset_cross_entropy(z, y, offset=1.0, temperature=0.25)
        tensor(0.1733)
        >>> offset_cross_entropy(z, y, offset=1.0, temperature=0.25, power=1.0)
        tensor(0.1250)
        >>> offset_cross_entropy(z, y, offset=1.0, temperature=0.25, focus=1.0)
        tensor(0.0866)
    """
    if power is not None and focus is not None:
        raise InvalidArgument(f"power is {power} and focus is {focus}; one of them is possible.")
    each = partial(_offset_cross_entropy_of_each, offset=offset, temperature=temperature, power=power, focus=focus)
    return temperature * mean_loss(each, logits, labels)


def _offset_cross_entropy_of_each(
    logits: Tensor, labels: Tensor, offset: float, temperature: float, power: float | None, focus: float | None
) -> Tensor:
    """Without the factor of the temperature."""
    shifted = logits - offset * functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    losses = functional.cross_entropy(shifted / temperature, labels, reduction="none")
    if focus is not None:
        return torch.expm1(-losses).neg().clamp_min(0) ** focus * losses
    return losses if power is None else -torch.expm1(-power * losses) / power


@LOSSES.register("hinge")
def _hinge(config: TrainingConfig) -> LossFunction:
    return partial(hinge, margin=config.margin)


@LOSSES.register("offset-cross-entropy")
def _offset_cross_entropy(config: TrainingConfig) -> LossFunction:
    return partial(
        offset_cross_entropy,
        offset=config.offset,
        temperature=config.temperature,
        power=config.power,
        focus=config.focus,
    )


@LOSSES.register("cross-entropy")
def _cross_entropy(config: TrainingConfig) -> LossFunction:
    return functional.cross_entropy


def make_loss(config: TrainingConfig) -> LossFunction:
    """The loss ``config`` names, as a function of logits (N, classes) and labels (N,) or (N, classes).

    Example:
        >>> import torch
        >>> from dynablocks.training import TrainingConfig
        >>> make_loss(TrainingConfig(loss="hinge", margin=1.0))(torch.zeros(1, 3), torch.tensor([2]))
        tensor(2.)
    """
    return LOSSES.get_known(config.loss)(config)


def logit_scale(config: TrainingConfig) -> float:
    """The difference of logits that counts as much to the loss: its temperature, the hinge's margin, or 1.

    The logits of a 1-Lipschitz network differ by a few tenths; at temperature 1 their softmax is nearly flat.

    Example:
        >>> from dynablocks.training import TrainingConfig
        >>> logit_scale(TrainingConfig(loss="offset-cross-entropy", temperature=0.25))
        0.25
    """
    if config.loss == "offset-cross-entropy":
        return config.temperature
    return config.margin or 1.0 if config.loss == "hinge" else 1.0
