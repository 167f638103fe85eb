"""What attacks and certificates share: the model at rest, checked images and labels, checked logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dynablocks.errors import BadData, InvalidArgument
from dynablocks.modes import eval_mode

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class LabelledImages(Protocol):
    """Anything with ``images`` (N, C, H, W), uint8 or floats in [0, 1], and ``labels`` (N,)."""

    @property
    def images(self) -> Tensor: ...

    @property
    def labels(self) -> Tensor: ...


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, its weights frozen and without gradients; what it was before comes back afterwards.

    The weights are those of the present parameters, also where others are held around it.
    """
    from dynablocks.linear import frozen_weights

    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with eval_mode(model):
        try:
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            with frozen_weights(model, anew=True):
                yield
        finally:
            for parameter, want in wanted:
                parameter.requires_grad_(want)


def model_place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of the model's first floating parameter or buffer; CPU float32 when it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32


def to_pixels(images: Tensor, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "n c h w"]:
    """Images as floats in [0, 1] on ``device``; uint8 is divided by 255, with one rounding."""
    pixels = images.to(device=device, dtype=dtype)
    if images.dtype != torch.uint8:
        return pixels
    return pixels / torch.full((), 255, dtype=dtype, device=device)  # CUDA multiplies by the reciprocal of a number


def checked_data(
    model: nn.Module, dataset: LabelledImages | tuple[Tensor, Tensor], samples: int | None = None
) -> tuple[Tensor, Int[Tensor, " n"]]:
    """The first ``samples`` images and labels (all when None), fit for ``model``.

    Raises:
        BadData: empty, wrong shape, not finite, outside [0, 1], or a label out of range.
    """
    images, labels = dataset if isinstance(dataset, tuple) else (dataset.images, dataset.labels)
    if images.ndim != 4 or labels.ndim != 1 or len(images) != len(labels):
        raise BadData(
            f"images have shape {tuple(images.shape)} and labels {tuple(labels.shape)}; "
            "(N, channels, height, width) and (N,) are needed."
        )
    images, labels = images[:samples], labels[:samples]
    if not images.numel():
        raise BadData("the data set has no images; give at least one.")
    _check_shape(model, images)
    _check_pixels(images)
    check_labels(labels, getattr(model, "num_classes", None))
    return images, labels.to(torch.int64)


def _check_shape(model: nn.Module, images: Tensor) -> None:
    wanted = getattr(model, "input_shape", None)
    if wanted is not None and tuple(images.shape[1:]) != tuple(wanted):
        raise BadData(
            f"the images have shape {tuple(images.shape[1:])} but the model takes {tuple(wanted)}; "
            "choose the data set it was trained on."
        )


def _check_pixels(images: Tensor) -> None:
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise BadData(f"images are {images.dtype}; uint8 in [0, 255] or floats in [0, 1] are needed.")
    low, high = images.amin().item(), images.amax().item()
    if not (low >= 0 and high <= 1):
        raise BadData(
            f"pixel values range from {low:g} to {high:g}; floats in [0, 1] are needed "
            "(normalisation is a layer of the model)."
        )


def check_labels(labels: Tensor, classes: int | None) -> None:
    """Raise :class:`BadData` unless the labels are integers in [0, classes)."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise BadData(f"labels are {labels.dtype}; integer class indices are needed.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        limit = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise BadData(f"labels range from {low} to {high}; this model's classes are {limit}.")


def checked_logits(model: Callable[[Tensor], Tensor], pixels: Tensor) -> Float[Tensor, "n classes"]:
    """``model(pixels)`` without gradients.

    Raises:
        InvalidArgument: the result is not (N, classes >= 2) or holds a NaN or an infinity.
    """
    with torch.no_grad():
        logits = model(pixels)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(pixels) or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidArgument(
            f"the model returned {shape} for {len(pixels)} images; logits (N, classes >= 2) are needed."
        )
    if not bool(torch.isfinite(logits).all()):
        raise InvalidArgument("the model returned logits that are not finite; train it again with a smaller step.")
    return logits
