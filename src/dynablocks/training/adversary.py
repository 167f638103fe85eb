"""Adversarial training and TRADES: an attack inside the training step, and what is minimised at the images it finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynablocks.ball import direction, image_norms, projected, unit_ball_points
from dynablocks.linear import frozen_weights
from dynablocks.modes import eval_mode
from dynablocks.seeding import mixed_seed
from dynablocks.training.config import TrainingConfig
from dynablocks.training.losses import LossFunction, logit_scale

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from jaxtyping import Float, Int

_START_STREAM = 0x414456


@dataclass(frozen=True)
class Attack:
    r"""Projected gradient ascent in the l2 ball of radius ε around each image, within [0, 1].

    .. math:: x_{k+1} = \mathrm{clamp}_{[0,1]}\, P_{B(x, \varepsilon)}\bigl(x_k + \eta\,\varepsilon\,g_k/\|g_k\|\bigr)

    g is the gradient of the objective with respect to the image. The radius used is smaller than ε by the rounding of
    the pixels, so that ‖x' − x‖ <= ε holds for the stored numbers. A zero gradient leaves the image where it is.

    Args:
        epsilon: ε, in pixel units [0, 1].
        steps: how many.
        step_size: η.

    Source: Madry et al., *Towards deep learning models resistant to adversarial attacks*, ICLR 2018.

    Example:
        >>> clean, start = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, 1, 1, 2)
        >>> moved = Attack(0.1, 1, 1.0)(clean, start, lambda x: x[..., 0].sum())
        >>> [round(pixel, 5) for pixel in moved.flatten().tolist()]
        [0.6, 0.5]
    """

    epsilon: float
    steps: int
    step_size: float

    @classmethod
    def of(cls, config: TrainingConfig) -> Attack:
        """The attack of a training; a step is 2 / steps of the radius, but the whole radius for one step."""
        default = 1.0 if config.adversary_steps == 1 else 2 / config.adversary_steps
        return cls(config.adversary_epsilon, config.adversary_steps, config.adversary_step_size or default)

    def __call__(
        self,
        clean: Float[Tensor, "batch channels height width"],
        start: Float[Tensor, "batch channels height width"],
        objective: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in the ball that raise the objective; nothing here waits for the device.

        Args:
            clean: pixels in [0, 1].
            start: a point of the unit ball for each image.
            objective: images to a number whose gradient is taken; samples must not mix.
        """
        radius = self._radius(clean)
        x = self._inside(clean, radius * start, radius)
        for _ in range(self.steps):
            x.requires_grad_(True)
            with torch.enable_grad():
                value = objective(x)
            (gradient,) = torch.autograd.grad(value, x)
            x = self._inside(clean, x.detach() - clean + self.step_size * radius * direction(gradient), radius)
        return x

    def _radius(self, clean: Tensor) -> float:
        rounding = torch.finfo(clean.dtype).eps
        return max(0.0, self.epsilon * (1 - 8 * rounding) - rounding * math.sqrt(clean[0].numel()))

    @staticmethod
    def _inside(clean: Tensor, delta: Tensor, radius: float) -> Tensor:
        norms = image_norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)
        return (clean + projected(delta, radius, norms)).clamp_(0, 1)


def ball_points(
    like: Float[Tensor, "batch channels height width"], count: int, share: slice, *seeds: int
) -> Float[Tensor, "batch channels height width"]:
    """Uniform points of the unit ball, a function of the seeds and of the kind of device only.

    They are drawn for ``count`` images, of which ``share`` is returned, in the memory format of ``like``; so several
    devices together have the points that one has.

    Example:
        >>> bool(ball_points(torch.zeros(4, 1, 2, 2), 4, slice(None), 0).flatten(1).norm(dim=1).max() <= 1)
        True
    """
    generator = torch.Generator(like.device).manual_seed(mixed_seed(_START_STREAM, *seeds))
    size = like[0].numel()
    draws = torch.randn(count, size + 2, generator=generator, device=like.device, dtype=like.dtype)[share]
    return torch.empty_like(like).copy_(unit_ball_points(draws).view(like.shape))


def climbing_objective(config: TrainingConfig, loss: LossFunction) -> LossFunction:
    r"""What the attack raises in place of ``loss``: summed over the batch, with the same maxima but no flat parts.

    Hinge: Σⱼ max{0, vⱼ} + min{0, max v} with the violations v; zero loss still shows where it would rise. Cross-entropy
    c, with or without an offset: t log Σ_{j≠y} e^{zⱼ/t} − z_y, an increasing function of c; its gradient has the
    direction of c's, and does not vanish for confident samples. A loss of your own is raised as it is.

    Example:
        >>> climb = climbing_objective(TrainingConfig(loss="hinge", margin=0.5), None)
        >>> climb(torch.tensor([[2.0, 0.0], [0.2, 0.0]]), torch.tensor([0, 0]))
        tensor(-1.2000)
    """
    if config.loss == "hinge":
        return partial(_violations, margin=config.margin)
    if config.loss in ("cross-entropy", "offset-cross-entropy"):
        return partial(_soft_lead_of_the_wrong, temperature=logit_scale(config))
    return lambda logits, labels: loss(logits, labels) * len(labels)


def _violations(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    violations = margin - logits.gather(1, labels[:, None]) + logits
    wrong = violations.scatter(1, labels[:, None], -torch.inf)
    return wrong.clamp_min(0).sum() + wrong.amax(1).clamp_max(0).sum()


def _soft_lead_of_the_wrong(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    true = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -torch.inf)
    return (temperature * torch.logsumexp(wrong / temperature, 1) - true).sum()


def divergence(
    clean: Float[Tensor, "batch classes"], moved: Float[Tensor, "batch classes"], scale: float
) -> Float[Tensor, ""]:
    r"""How far the predictions moved, averaged over the batch; gradients flow to both.

    .. math:: \frac{t}{N} \sum_i \mathrm{KL}\bigl(\mathrm{softmax}(z_i/t) \,\|\, \mathrm{softmax}(z'_i/t)\bigr)

    Args:
        clean: z, the logits at the images.
        moved: z', the logits at the perturbed images.
        scale: t, the size of logits that matters to the loss (:func:`dynablocks.training.losses.logit_scale`); the
            factor t weighs the divergence as offset-cross-entropy is weighed.

    Source: Zhang et al., *Theoretically principled trade-off between robustness and accuracy* (TRADES), ICML 2019,
    arXiv 1901.08573, equation (5); there t = 1.

    Example:
        >>> divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 1.0)
        tensor(0.1201)
    """
    before, after = functional.log_softmax(clean / scale, 1), functional.log_softmax(moved / scale, 1)
    return scale * functional.kl_div(after, before, reduction="batchmean", log_target=True)


def attacked(
    model: nn.Module,
    clean: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    start: Float[Tensor, "batch channels height width"],
    config: TrainingConfig,
    loss: LossFunction,
    arithmetic: AbstractContextManager[object],
) -> Float[Tensor, "batch channels height width"]:
    """The images that ``config.adversary`` finds: those of large loss, or of large divergence (trades).

    Weights are constants here: those already computed by :func:`dynablocks.linear.shared_weights` are used, and no
    gradient of theirs is taken. The model is in eval mode meanwhile, so no dropout and no running statistic joins in.

    Args:
        model: pixels to logits, not wrapped for several processes, so the attack needs no communication.
        clean: pixels in [0, 1].
        labels: class indices.
        start: a point of the unit ball for each image.
        config: the settings.
        loss: the training's loss.
        arithmetic: a context to compute in, ``fabric.autocast()`` for mixed precision.
    """
    attack = Attack.of(config)

    def logits(x: Tensor) -> Tensor:
        found: Tensor = model(x)
        return found.float() if found.dtype in (torch.bfloat16, torch.float16) else found

    with eval_mode(model), frozen_weights(model), arithmetic:
        if config.adversary == "trades":
            with torch.no_grad():
                reference = logits(clean)
            scale = logit_scale(config)
            return attack(clean, start, lambda x: divergence(reference, logits(x), scale) * len(clean))
        climb = climbing_objective(config, loss)
        return attack(clean, start, lambda x: climb(logits(x), labels))
