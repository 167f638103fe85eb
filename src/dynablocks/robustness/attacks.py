"""Projected gradient descent in l2 over many radii, with losses that scaled logits cannot fool."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynablocks.ball import foolbox_direction, foolbox_norms, projected, unit_ball_points
from dynablocks.errors import InvalidArgument, require_range, require_whole
from dynablocks.files import plain_data, tuples
from dynablocks.models import Network
from dynablocks.registry import Registry
from dynablocks.robustness.arithmetic import full_precision
from dynablocks.robustness.curves import PAPER_EPSILONS, Curve, checked_epsilons
from dynablocks.robustness.evaluation import (
    LabelledImages,
    check_labels,
    checked_data,
    checked_logits,
    evaluating,
    model_place,
    to_pixels,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from dynablocks.robustness.partial import Partial

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: Registry[Loss] = Registry("attack loss")
DEFAULT_EPSILONS = tuple(sorted({*PAPER_EPSILONS, 36 / 255, 72 / 255, 108 / 255}))
_FOOLBOX_STEP = 0.025
_LONG_STEPS = 4.0
_SHRINK_ATTEMPTS = 24
_MOST = 1e6
"""Larger radii and steps leave the numbers of float32, and the model would be blamed for it."""
_KEPT_BYTES = 2**28
"""What is drawn for the starts of a loss is kept for all radii where that of all restarts and samples takes no more."""


@LOSSES.register("ce")
def cross_entropy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``-log softmax(z)_y``, the paper's loss; its gradient vanishes for large logits, so it never stands alone.

    Example:
        >>> round(float(cross_entropy(torch.zeros(1, 2), torch.tensor([0]))), 4)
        0.6931
    """
    return F.cross_entropy(logits, labels, reduction="none")


@LOSSES.register("margin")
def margin(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``max_{j != y} z_j - z_y``: positive when misclassified; the direction of its gradient ignores the logits' scale.

    Source:
        Carlini and Wagner, IEEE S&P 2017 (their f_6 without the clamp).

    Example:
        >>> float(margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])))
        -1.0
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - true


@LOSSES.register("dlr")
def difference_of_logits_ratio(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """``margin / (z_(1) - z_(3))``, z_(k) the k-th largest logit; with two classes there is no z_(3): the margin.

    Source:
        Croce and Hein, ICML 2020, arXiv 2003.01690, equation (6).

    Example:
        >>> float(difference_of_logits_ratio(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])))
        -0.5
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp_min(torch.finfo(logits.dtype).tiny)


@dataclass(frozen=True)
class AttackConfig:
    """How to attack: the defaults hold the paper's attack ("ce": Foolbox's ``L2PGD``, ten steps) and stronger ones.

    Ten steps of Foolbox's length, 0.025 epsilon, move a random start by a quarter of the radius at most, so on its own
    that attack badly overestimates robustness: for a small network on digits 78 % at epsilon 1, where steps of
    4 epsilon / steps leave 2 %. So only "ce" takes the short steps; the other losses take the longer ones, and the
    worst case counts.

    Args:
        epsilons: l2 radii in pixel units [0, 1], increasing.
        steps: gradient steps.
        relative_step_size: step length divided by epsilon, for every loss; when None, 0.025 for "ce" (Foolbox's
            default) and 4 / steps for the others (of 2.5, 3.5, 5 and 7 the best on digits was 3.5 to 5).
        random_start: begin at a uniform point of the ball rather than at the image.
        restarts: attacks from different starts; the worst counts.
        losses: names in :data:`LOSSES`; the worst counts.
        samples: the first so many images (all when there are fewer).
        batch_size: images at once.
        seed: of the random starts; each depends on its sample only, not on the batch.
        early_drop: attack a sample no further once a loss broke it (with that loss, at that or a larger epsilon).
            Without it every loss attacks every sample at every epsilon on its own, as Foolbox does.
        examples: of how many samples the adversarial image is kept.

    Raises:
        InvalidArgument: a value out of its range; the sentence names it.

    Example:
        >>> AttackConfig(steps=0)
        Traceback (most recent call last):
        ...
        dynablocks.errors.InvalidArgument: steps is 0; a whole number from 1 to 1000000000 is needed.
    """

    epsilons: tuple[float, ...] = DEFAULT_EPSILONS
    steps: int = 10
    relative_step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    losses: tuple[str, ...] = ("ce", "margin", "dlr")
    samples: int = 1024
    batch_size: int = 256
    seed: int = 0
    early_drop: bool = True
    examples: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilons", checked_epsilons(self.epsilons))
        require_range("epsilon", self.epsilons[-1], 0.0, _MOST)
        object.__setattr__(self, "losses", tuple(self.losses))
        if self.relative_step_size is not None:
            require_range("relative_step_size", self.relative_step_size, 0.0, _MOST, open_low=True)
        for name, least, most in (
            ("steps", 1, 10**9),
            ("restarts", 1, 10**9),
            ("samples", 1, 10**9),
            ("batch_size", 1, 10**9),
            ("seed", 0, 2**63 - 1),
            ("examples", 0, 10**9),
        ):
            object.__setattr__(self, name, require_whole(name, getattr(self, name), least, most))
        if not self.losses or len(set(self.losses)) != len(self.losses):
            raise InvalidArgument(f"losses are {list(self.losses)}; give one or more of {sorted(LOSSES)}, each once.")
        for loss in self.losses:
            LOSSES.get_known(loss)
        if self.restarts > 1 and not self.random_start:
            raise InvalidArgument(
                f"restarts is {self.restarts} but random_start is off; all restarts would be the same."
            )

    def step_size_of(self, loss: str) -> float:
        """The step length of one loss, divided by epsilon."""
        if self.relative_step_size is not None:
            return self.relative_step_size
        return _FOOLBOX_STEP if loss == "ce" else _LONG_STEPS / self.steps


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, in sample order.

    ``broken[loss]`` is (N, epsilons): did the attack with this loss alone find a perturbation within epsilon. The worst
    case adds the samples misclassified when clean and holds each perturbation against every epsilon: one found at a
    larger epsilon breaks also at a smaller one that it is within.
    ``smallest_broken_norm`` is the shortest perturbation found that changes the class (0: misclassified when clean;
    infinite: none found). ``examples`` holds, for the first samples, the shortest adversarial image found, or else the
    last image tried at the largest epsilon; ``example_losses`` who made it, "" where nothing was tried.
    """

    config: AttackConfig
    labels: Int[Tensor, " n"]
    clean_predictions: Int[Tensor, " n"]
    broken: dict[str, Bool[Tensor, "n epsilons"]]
    smallest_broken_norm: Float[Tensor, " n"]
    examples: Float[Tensor, "k c h w"]
    example_predictions: Int[Tensor, " k"]
    example_norms: Float[Tensor, " k"]
    example_losses: tuple[str, ...]

    @property
    def epsilons(self) -> tuple[float, ...]:
        """The radii attacked."""
        return self.config.epsilons

    @property
    def clean_accuracy(self) -> float:
        """The fraction of the images, unperturbed, that are classified as labelled."""
        return float((self.clean_predictions == self.labels).double().mean())

    @property
    def worst_broken(self) -> Bool[Tensor, "n epsilons"]:
        """Broken within this epsilon by any loss, at whatever epsilon it was found, or misclassified when clean."""
        broken = (self.clean_predictions != self.labels)[:, None] | torch.stack(list(self.broken.values())).any(dim=0)
        norms = self.smallest_broken_norm[:, None]
        broken |= norms <= torch.tensor(self.epsilons, dtype=torch.float64, device=norms.device)
        return broken.int().cummax(dim=1).values.bool()

    @property
    def smallest_broken_epsilon_index(self) -> Int[Tensor, " n"]:
        """Index into ``epsilons`` of the smallest that broke the sample; ``len(epsilons)`` when none did."""
        return (~self.worst_broken).sum(dim=1)

    @property
    def robust_accuracy(self) -> tuple[float, ...]:
        """The fraction of samples that survive every loss and restart, one an epsilon."""
        return tuple((~self.worst_broken).double().mean(dim=0).tolist())

    @property
    def robust_accuracy_by_loss(self) -> dict[str, tuple[float, ...]]:
        """The same against one loss alone; "ce" without ``early_drop`` is the paper's figure."""
        return {name: tuple((~hit).double().mean(dim=0).tolist()) for name, hit in self.broken.items()}

    def curve(self, loss: str | None = None) -> Curve:
        """Robust accuracy against epsilon: the worst case, or against one of ``config.losses`` alone."""
        if loss is not None and loss not in self.broken:
            raise InvalidArgument(f"loss {loss!r} was not used; used were {', '.join(self.broken)}.")
        values = self.robust_accuracy if loss is None else self.robust_accuracy_by_loss[loss]
        return Curve(self.epsilons, values, len(self.labels))

    def summary(self) -> dict[str, Any]:
        """What ``attack.json`` holds."""
        return {
            "config": plain_data(asdict(self.config)),
            "samples": len(self.labels),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.curve().points(),
            "robust_accuracy_by_loss": {name: self.curve(name).points() for name in self.broken},
            "auc": self.curve().auc if len(self.epsilons) > 1 else None,
            "example_losses": list(self.example_losses),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What ``attack.safetensors`` holds."""
        names = (
            "labels",
            "clean_predictions",
            "smallest_broken_norm",
            "examples",
            "example_predictions",
            "example_norms",
        )
        return {name: getattr(self, name) for name in names} | {f"broken.{k}": v for k, v in self.broken.items()}

    @classmethod
    def restore(cls, summary: dict[str, Any], tensors: dict[str, Tensor]) -> AttackResult:
        """The result again from :meth:`summary` and :meth:`tensors`."""
        config = AttackConfig(**tuples(summary["config"]))
        plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("broken.")}
        broken = {name: tensors[f"broken.{name}"] for name in config.losses}
        return cls(config=config, broken=broken, example_losses=tuple(summary["example_losses"]), **plain)


def l2_pgd(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    epsilons: float | Sequence[float],
    *,
    loss: str = "ce",
    steps: int = 10,
    relative_step_size: float | None = None,
    random_start: bool = True,
    seed: int = 0,
) -> Float[Tensor, "epsilons n c h w"]:
    """Adversarial images by projected gradient ascent, every image at every epsilon, in batches.

    ``x <- clip(project(x + s ε g/‖g‖))`` from a uniform point of the ball, with g the gradient of the loss, ``project``
    onto the ball around the image and ``clip`` to [0, 1]: Foolbox's ``L2PGD``. Two things are added: for losses other
    than "ce" a tiny gradient is normalised too (Foolbox leaves ‖g‖ < 1e-12 alone), and the result is shrunk where
    rounding put it outside: measured in float64, ‖x - image‖ ≤ ε holds for the image in the model's number format.

    Args:
        model: pixels in [0, 1] (N, C, H, W) to logits; in eval mode, without autocast; returned as it was.
        images: (N, C, H, W), uint8 or floats in [0, 1].
        labels: (N,) true classes.
        epsilons: one l2 radius or several, in pixel units [0, 1].
        loss: a name in :data:`LOSSES`.
        steps: gradient steps.
        relative_step_size: s; when None, 0.025 for "ce" and 4 / steps for the other losses.
        random_start: begin at a uniform point of the ball rather than at the image.
        seed: of the random starts.

    Returns:
        (N, C, H, W) for one radius, (epsilons, N, C, H, W) for several.

    Raises:
        InvalidArgument, BadData: see :class:`AttackConfig` and the data's checks; a model not in float32 or float64, or
            one without gradients, as for :func:`attack`.

    Source:
        Madry et al., ICLR 2018; Rauber et al., Foolbox 3.3, ``L2ProjectedGradientDescentAttack``.

    Example:
        >>> image = torch.full((1, 1, 1, 2), 0.5)
        >>> adversarial = l2_pgd(nn.Flatten(), image, torch.tensor([0]), 0.1, loss="margin", steps=60)
        >>> bool(nn.Flatten()(adversarial).argmax() == 1)
        True
    """
    several = not isinstance(epsilons, (int, float))
    radii = tuple(epsilons) if not isinstance(epsilons, (int, float)) else (epsilons,)
    config = AttackConfig(
        radii, steps, relative_step_size, random_start, losses=(loss,), seed=seed, samples=len(images) or 1
    )
    images, labels = checked_data(model, (images, labels))
    device, dtype = _attacked_place(model)
    pixels, labels = to_pixels(images, device, dtype), labels.to(device)
    count, again = len(pixels), len(config.epsilons)
    with full_precision(), evaluating(model):
        right = _clean_predictions(model, pixels, labels, config.batch_size) == labels.cpu()
        rows = torch.tensor(config.epsilons, dtype=torch.float64, device=device).repeat_interleave(count)
        starts = _starts(pixels, range(count), config, loss, 0, {})
        result = pixels.new_empty(again * count, *pixels.shape[1:])
        moved = torch.zeros(again * count, dtype=torch.bool, device=device)
        # Rows are attacked each on its own, and the graph of all of them may not fit into memory.
        for chunk in torch.split(torch.arange(again * count, device=device), config.batch_size):
            sample = chunk % count
            clean, begun = laid_out(model, pixels[sample]), None if starts is None else starts[sample]
            result[chunk], moved[chunk] = _ascend(model, clean, labels[sample], rows[chunk], begun, loss, config)
        attacked = right.repeat(again) & (rows > 0).cpu()
        if bool(attacked.any()) and not bool((attacked & moved.cpu()).any()):
            still = right.nonzero()[:, 0].to(device)
            _require_no_gradient(model, pixels[still], labels[still], config)
    shaped = result.reshape(again, *pixels.shape)
    return shaped if several else shaped[0]


def attack(
    model: nn.Module,
    dataset: LabelledImages | tuple[Tensor, Tensor],
    config: AttackConfig | None = None,
    progress: Callable[[float], None] | None = None,
    partial: Partial | None = None,
) -> AttackResult:
    """:func:`l2_pgd` with every loss, restart and epsilon; the worst case and each loss alone.

    Args:
        model: pixels in [0, 1] (N, C, H, W) to logits; in eval mode, without autocast; returned as it was.
        dataset: ``images`` (uint8, or floats in [0, 1]) and ``labels``, or a pair of them.
        config: how; the paper's setting with three losses when None.
        progress: called with the fraction done.
        partial: where to store what was found so far, and to go on from; whoever stores the result removes it.

    Raises:
        BadData: images or labels that do not fit the model.
        InvalidArgument: logits that are not finite or not (N, classes), or a model that is not in float32 or float64;
            all gradients of losses but "ce" (of "ce" alone: also those of the margin at the images) are 0 or not
            finite, while the logits change within the largest epsilon.
        DynablocksError: ``partial`` cannot be written.

    Source:
        Madry et al., ICLR 2018; Croce and Hein, ICML 2020.

    Example:
        >>> data = (torch.tensor([[[[0.6, 0.4]]]]), torch.tensor([0]))
        >>> config = AttackConfig(epsilons=(0.0, 0.1, 0.3))
        >>> attack(nn.Flatten(), data, config).robust_accuracy
        (1.0, 1.0, 0.0)
    """
    config = AttackConfig() if config is None else config
    images, labels = checked_data(model, dataset, config.samples)
    with full_precision(), evaluating(model):
        return _Attack(model, images, labels, config).run(progress, partial)


class _Attack:
    """One run of :func:`attack`: what was found so far."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, config: AttackConfig) -> None:
        self.model, self.images, self.config = model, images, config
        self.device, self.dtype = _attacked_place(model)
        self.labels = labels.cpu()
        self.clean_predictions = _clean_predictions(model, images, self.labels, config.batch_size)
        wrong = self.clean_predictions != self.labels
        count = len(images)
        self.broken = {name: torch.zeros(count, len(config.epsilons), dtype=torch.bool) for name in config.losses}
        self.norm = torch.where(wrong, 0.0, torch.inf).to(torch.float64)
        self.attacked, self.moved = (torch.zeros(count, dtype=torch.bool) for _ in range(2))
        kept = min(config.examples, count)
        self.examples = to_pixels(images[:kept], torch.device("cpu"), torch.float32).clone()
        self.example_predictions = self.clean_predictions[:kept].clone()
        self.example_norms = torch.zeros(kept, dtype=torch.float64)
        self.example_losses = [""] * kept
        self._drawn_for = ""
        self._draws: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)

    def run(self, progress: Callable[[float], None] | None, partial: Partial | None) -> AttackResult:
        total = len(self.config.losses) * len(self.config.epsilons) * self.config.restarts
        done = 0 if partial is None else self._go_on(partial)
        if done and progress is not None:
            progress(done / total)
        for loss, index, restart in itertools.islice(self._rounds(), done, None):
            self._attack_at(loss, index, restart)
            done += 1
            if partial is not None:
                partial.write(done, self._found())
            if progress is not None:
                progress(done / total)
        self._require_gradients()
        return AttackResult(
            self.config,
            self.labels,
            self.clean_predictions,
            self.broken,
            self.norm,
            self.examples,
            self.example_predictions,
            self.example_norms,
            tuple(self.example_losses),
        )

    def _rounds(self) -> Iterator[tuple[str, int, int]]:
        """Loss, number of the epsilon and of the restart, one round after the other.

        A round depends on what those before have found and on nothing else: its starts are those of its samples.
        """
        for loss in self.config.losses:
            for index in range(len(self.config.epsilons)):
                for restart in range(self.config.restarts):
                    yield loss, index, restart

    def _require_gradients(self) -> None:
        """Refuse a model of which no loss that counts (:meth:`_counts`) had a gradient at an image that was right."""
        if bool(self.attacked.any()) and not bool(self.moved.any()):
            still = self.attacked.nonzero()[:, 0]
            images = self.images[still.to(self.images.device)]
            _require_no_gradient(self.model, images, self.labels[still], self.config)

    def _counts(self, loss: str) -> bool:
        """Whether a loss tells of the model that has no gradient: "ce" saturates, and tells nothing beside others."""
        return loss != "ce" or self.config.losses == ("ce",)

    def _found(self) -> dict[str, Tensor]:
        """All that a round changes."""
        makers = [self.config.losses.index(loss) if loss else -1 for loss in self.example_losses]
        found = {
            "norm": self.norm,
            "attacked": self.attacked,
            "moved": self.moved,
            "examples": self.examples,
            "example_predictions": self.example_predictions,
            "example_norms": self.example_norms,
            "example_losses": torch.tensor(makers, dtype=torch.int64),
        }
        return found | {f"broken.{loss}": hit for loss, hit in self.broken.items()}

    def _go_on(self, partial: Partial) -> int:
        """Take what an attack that was stopped had found; how many rounds it had done."""
        done, found = partial.read()
        if done:
            self.broken = {loss: found[f"broken.{loss}"] for loss in self.config.losses}
            self.norm, self.examples = found["norm"], found["examples"]
            self.attacked, self.moved = found["attacked"], found["moved"]
            self.example_predictions, self.example_norms = found["example_predictions"], found["example_norms"]
            self.example_losses = [self.config.losses[i] if i >= 0 else "" for i in found["example_losses"].tolist()]
        return done

    def _attack_at(self, loss: str, index: int, restart: int) -> None:
        """Attack with one loss at one epsilon from one start every sample that is still worth it."""
        hit, wrong = self.broken[loss], self.clean_predictions != self.labels
        if self.config.early_drop and restart == 0:
            hit[:, index] = wrong | (hit[:, index - 1] if index else False)
        if self.config.epsilons[index] == 0:
            hit[:, index] |= wrong
            return
        targets = (~hit[:, index] if self.config.early_drop else torch.ones_like(wrong)).nonzero()[:, 0]
        for start in range(0, len(targets), self.config.batch_size):
            chunk = targets[start : start + self.config.batch_size]
            self._attack_batch(chunk, loss, index, restart)

    def _draws_of(self, loss: str, restart: int) -> dict[int, Tensor]:
        """Where :func:`_starts` keeps for the radii to come what it draws; a new place where that would be too much."""
        if 4 * self.config.restarts * self.images.numel() > _KEPT_BYTES:
            return {}
        if self._drawn_for != loss:
            self._drawn_for = loss
            self._draws.clear()
        return self._draws[restart]

    def _attack_batch(self, chunk: Tensor, loss: str, index: int, restart: int) -> None:
        images = self.images[chunk.to(self.images.device)]
        pixels = laid_out(self.model, to_pixels(images, self.device, self.dtype))
        radii = torch.full((len(chunk),), self.config.epsilons[index], dtype=torch.float64, device=self.device)
        drawn = self._draws_of(loss, restart)
        starts = _starts(pixels, chunk.tolist(), self.config, loss, restart, drawn)
        labels = self.labels[chunk]
        adversarial, moved = _ascend(self.model, pixels, labels.to(self.device), radii, starts, loss, self.config)
        predictions = checked_logits(self.model, adversarial).argmax(dim=1).cpu()
        norms = _norms(adversarial, pixels).cpu()
        broken = predictions != labels
        if self._counts(loss):
            right = self.clean_predictions[chunk] == labels
            self.attacked[chunk] |= right
            self.moved[chunk] |= right & moved.cpu()
        self.broken[loss][chunk, index] |= broken
        shorter = broken & (norms < self.norm[chunk])
        self.norm[chunk[shorter]] = norms[shorter]
        last = index == len(self.config.epsilons) - 1
        for place in (chunk < len(self.examples)).nonzero()[:, 0].tolist():
            sample = int(chunk[place])
            if bool(shorter[place]) or (last and not bool(torch.isfinite(self.norm[sample]))):
                self.examples[sample] = adversarial[place].detach().to("cpu", torch.float32)
                self.example_predictions[sample] = predictions[place]
                self.example_norms[sample] = norms[place]
                self.example_losses[sample] = loss


def _clean_predictions(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Int[Tensor, " n"]:
    parts = []
    for batch in torch.split(images, batch_size):
        logits = checked_logits(model, laid_out(model, to_pixels(batch, *model_place(model))))
        check_labels(labels, logits.shape[1])
        parts.append(logits.argmax(dim=1).cpu())
    return torch.cat(parts)


def _require_no_gradient(model: nn.Module, images: Tensor, labels: Int[Tensor, " n"], config: AttackConfig) -> None:
    """:func:`_require_constant` of images, all of them right, at which no loss had a gradient.

    Of "ce" alone the margin is asked at the images themselves: where it has a gradient, "ce" was saturated.
    """
    if config.losses == ("ce",) and _has_margin_gradient(model, images, labels, config):
        return
    _require_constant(model, images[: config.batch_size], config.epsilons[-1])


def _has_margin_gradient(model: nn.Module, images: Tensor, labels: Int[Tensor, " n"], config: AttackConfig) -> bool:
    once = replace(config, steps=1)
    batches = (torch.split(tensor, config.batch_size) for tensor in (images, labels))
    for batch, true in zip(*batches, strict=True):
        pixels = laid_out(model, to_pixels(batch, *model_place(model)))
        radii = torch.full((len(pixels),), config.epsilons[-1], dtype=torch.float64, device=pixels.device)
        if bool(_ascend(model, pixels, true.to(pixels.device), radii, None, "margin", once)[1].any()):
            return True
    return False


def _require_constant(model: nn.Module, images: Tensor, radius: float) -> None:
    """Refuse a model without gradients, unless its logits stay as they are.

    All entries, then a quarter of them, a sixteenth, and so on to one, are moved, by the radius together: a step that
    rounds the pixels undoes what is spread over many.

    Raises:
        InvalidArgument: they change.
    """
    pixels = to_pixels(images, *model_place(model))
    logits, count = checked_logits(model, laid_out(model, pixels)), pixels[0].numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu").to(pixels.device)
    while count:
        move = torch.zeros(len(order), dtype=pixels.dtype, device=pixels.device)
        move[order[:count]] = radius / count**0.5
        move = move.reshape(pixels.shape[1:])
        nearby = torch.where(pixels < 0.5, pixels + move, pixels - move).clamp(0, 1)
        if not torch.equal(checked_logits(model, laid_out(model, nearby)), logits):
            raise InvalidArgument(
                f"all gradients of {type(model).__name__} are 0 or not finite, but its logits change within epsilon "
                f"{radius:g}, so that no step moves and the robust accuracy would be overstated; leave out what has no "
                "gradient, such as a rounding of the pixels, or give it one (straight-through)."
            )
        count = max(1, count // 4) if count > 1 else 0


def _attacked_place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """:func:`model_place` of a model whose numbers follow the steps of an attack.

    Raises:
        InvalidArgument: they are too coarse; an image that no step moves would pass for one that no attack breaks.
    """
    device, dtype = model_place(model)
    if dtype not in (torch.float32, torch.float64):
        raise InvalidArgument(f"the model is {dtype}, in which steps of an attack round away; attack model.float().")
    return device, dtype


def laid_out(model: nn.Module, pixels: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The same pixels, with the channels last for a :class:`~dynablocks.models.Network`, as in training.

    The kernels of its convolutions are laid out so, and pixels that are not are copied for each of them. They stay as
    they are where a module is of another's code, whose ``view`` may need them so (functions and hooks are not looked
    at), and where convolutions would copy them back: on CUDA without cuDNN, or in float64.
    """
    refused = pixels.is_cuda and (pixels.dtype == torch.float64 or not torch.backends.cudnn.enabled)
    if refused or not isinstance(model, Network):
        return pixels
    homes = {type(part).__module__.partition(".")[0] for part in model.modules()}
    return pixels.contiguous(memory_format=torch.channels_last) if homes <= {"dynablocks", "torch"} else pixels


def _ascend(
    model: nn.Module,
    clean: Tensor,
    labels: Tensor,
    radii: Float[Tensor, " rows"],
    starts: Tensor | None,
    loss: str,
    config: AttackConfig,
) -> tuple[Tensor, Bool[Tensor, " rows"]]:
    """PGD of one row an (image, float64 radius) pair; ``starts`` are points of the unit ball, one a row.

    The radii stay float64: 0.1 in float32 is larger than 0.1. Beside the images: which rows had a gradient.
    """
    objective, step_size = LOSSES.get_known(loss), config.step_size_of(loss)
    radius = radii.to(clean.dtype)[:, None, None, None]
    x = clean
    if starts is not None:
        x = (clean + radius * starts).clamp(0, 1)
    moved = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
    for _ in range(config.steps):
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            value = objective(model(x), labels).sum()
        if not value.requires_grad:
            raise InvalidArgument(
                "the model's logits do not depend on its input through autograd; PGD needs gradients."
            )
        (gradient,) = torch.autograd.grad(value, x)
        with torch.no_grad():
            direction = foolbox_direction(gradient, exact=loss != "ce")
            moved |= direction.abs().amax(dim=(1, 2, 3)) > 0
            x = x + step_size * radius * direction
            delta = x - clean
            x = (clean + projected(delta, radius, foolbox_norms(delta))).clamp(0, 1)
    return _shrunk(x.detach(), clean, radii), moved


def _norms(x: Tensor, clean: Tensor) -> Float[Tensor, " rows"]:
    """‖x - clean‖ of each row, in float64."""
    return (x.to(torch.float64) - clean.to(torch.float64)).flatten(1).norm(dim=1)


def _shrunk(x: Tensor, clean: Tensor, radii: Tensor) -> Tensor:
    """``x`` moved towards ``clean`` until its float64 distance is at most the radius; what is inside stays as it is."""
    delta = x - clean
    for attempt in range(_SHRINK_ATTEMPTS):
        norms = _norms(x, clean)
        outside = norms > radii
        if not bool(outside.any()):
            return x
        slack = 2.0 ** (attempt + 1 - _SHRINK_ATTEMPTS)
        factor = torch.where(outside, (radii / norms).clamp_max(1.0) * (1 - slack), 1.0).to(x.dtype)
        smaller = (clean + factor[:, None, None, None] * delta).clamp(0, 1)
        x = torch.where(outside[:, None, None, None], smaller, x)
        delta = x - clean
    return torch.where((_norms(x, clean) > radii)[:, None, None, None], clean, x)


def _starts(
    pixels: Tensor, samples: Sequence[int], config: AttackConfig, loss: str, restart: int, drawn: dict[int, Tensor]
) -> Float[Tensor, "n c h w"] | None:
    """A uniform point of the unit ball for each sample, the same in whatever batch it comes.

    ``drawn`` holds the normal numbers of samples that were drawn before, and gets those of the others.
    """
    if not config.random_start:
        return None
    size, generator = pixels[0].numel(), torch.Generator()
    for sample in samples:
        if sample not in drawn:
            generator.manual_seed(_mixed_seed(config.seed, sample, restart, loss))
            drawn[sample] = torch.empty(size + 2).normal_(generator=generator)
    draws = torch.stack([drawn[sample] for sample in samples])
    return unit_ball_points(draws).reshape(pixels.shape).to(pixels.device, pixels.dtype)


def _mixed_seed(seed: int, sample: int, restart: int, loss: str) -> int:
    # Not seeding's, which mixes integers alone and to other numbers: stored attacks depend on these starts.
    packed = struct.pack("<QQQ", seed % 2**64, sample, restart) + loss.encode()
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1
