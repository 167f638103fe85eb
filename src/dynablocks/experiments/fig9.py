"""Figure 9: three images, and the same with the red channel of one pixel changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynablocks.experiments.base import EXPERIMENTS, Check, Experiment, Scale
from dynablocks.experiments.cells import Cell, Store
from dynablocks.experiments.runs import images
from dynablocks.norms import SpectralMetric
from dynablocks.reporting import markdown_table
from dynablocks.reporting.figures import new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTH = 100.0
"""Weight of a constant change in the metric: brightness counts ten times as much as pixel noise of the same norm."""


@dataclass(frozen=True)
class OnePixelCell(Cell):
    """Test images of different classes, each with a random change of the red channel (of grey itself) in one pixel.

    Args:
        data: ``"cifar10"`` or ``"digits"``.
        count: how many images.
        seed: chooses images, pixels and changes.
        data_dir: where the images are.
    """

    data: str
    count: int = 3
    seed: int = 0
    data_dir: Path | None = field(default=None, metadata={"result": False})

    @property
    def title(self) -> str:
        return f"one-pixel changes of {self.data}"

    def data_hash(self) -> str:
        return images(self.data, self.data_dir).fingerprint

    def build(self, directory: Path, store: Store) -> dict[str, Any]:
        test = images(self.data, self.data_dir).test
        generator = torch.Generator().manual_seed(self.seed)
        pictures: list[dict[str, Any]] = []
        for index in torch.randperm(len(test), generator=generator).tolist():
            name = test.class_names[int(test.labels[index])]
            if len(pictures) < self.count and all(picture["class"] != name for picture in pictures):
                changed = change_one_pixel(test.images[index], generator)
                pictures.append({"class": name, "index": index} | changed)
        return {"data": test.name, "shape": list(test.image_shape), "pictures": pictures}


def change_one_pixel(image: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """The image, its changed copy and the size of the change; the new value is at least 64 levels from the old one.

    ``l2`` and ``metric`` are ‖δ‖₂ and ‖δ‖_M of the change δ, pixels in [0, 1], with M a :class:`SpectralMetric` that
    weighs smooth changes more; ``shading_metric`` is ‖·‖_M of a uniform change of brightness with the same ‖·‖₂.

    Args:
        image: uint8, (channels, height, width).

    Example:
        >>> grey = torch.full((1, 8, 8), 100, dtype=torch.uint8)
        >>> changed = change_one_pixel(grey, torch.Generator().manual_seed(0))
        >>> sum(a != b for a, b in zip(changed["clean"], changed["perturbed"])), changed["l2"] >= 64 / 255
        (1, True)
    """
    channels, height, width = image.shape
    row, column = (int(torch.randint(size, (), generator=generator)) for size in (height, width))
    old = int(image[0, row, column])
    allowed = [value for value in range(256) if abs(value - old) >= 64]
    new = allowed[int(torch.randint(len(allowed), (), generator=generator))]
    perturbed = image.clone()
    perturbed[0, row, column] = new
    change = (perturbed.double() - image.double()) / 255
    shading = torch.full_like(change, float(change.norm()) / change.numel() ** 0.5)
    metric = SpectralMetric((channels, height, width), SMOOTH)
    norms = metric.norm(torch.stack([change, shading])).tolist()
    return {
        "pixel": [row, column],
        "old": old,
        "new": new,
        "l2": float(change.norm()),
        "metric": norms[0],
        "shading_metric": norms[1],
        "clean": image.flatten().tolist(),
        "perturbed": perturbed.flatten().tolist(),
    }


@EXPERIMENTS.register("fig9")
class OnePixelPictures(Experiment):
    """Pictures that a person takes for the same, at an ℓ2 distance that a network may not survive.

    Source: Celledoni et al., arXiv 2210.02373, appendix B, figure 9.
    """

    name = "fig9"
    title = "One-pixel perturbations of the red channel"
    source = "Figure 9, appendix B"

    def cell(self, scale: Scale) -> OnePixelCell:
        """CIFAR-10, whose pixels have a red channel; at smoke the embedded digits."""
        if scale.preset == "smoke":
            return OnePixelCell("digits", seed=scale.seed)
        return OnePixelCell("cifar10", seed=scale.seed, data_dir=scale.data_dir)

    def cells(self, scale: Scale) -> list[Cell]:
        return [self.cell(scale)]

    def tables(self, scale: Scale, store: Store) -> str:
        result = store.result(self.cell(scale))
        if result is None:
            return "not run"
        columns = {
            "class": "picture",
            "change": "pixel (row, column): change",
            "l2": "ℓ2 norm",
            "metric": "norm in a metric that weighs smooth changes",
            "shading_metric": "the same for a change of brightness with this ℓ2 norm",
        }
        rows = [
            picture | {"change": "({}, {}): {} → {}".format(*picture["pixel"], picture["old"], picture["new"])}
            for picture in result["pictures"]
        ]
        norms = dict.fromkeys(("l2", "metric", "shading_metric"), "{:.3f}".format)
        channel = "red channel" if result["shape"][0] == 3 else "grey value"
        return f"{result['data']}, the {channel} of one pixel:\n\n" + markdown_table(rows, columns, norms)

    def figures(self, scale: Scale, store: Store) -> dict[str, Figure]:
        result = store.result(self.cell(scale))
        if result is None:
            return {}
        return {self.name: pictures_figure(result["shape"], result["pictures"], watermark=scale.watermark)}

    def checks(self, scale: Scale, store: Store) -> list[Check]:
        result = store.result(self.cell(scale))
        what, expected = "values changed in each picture, and of which channel", "1 of channel 0"
        if result is None:
            return [Check.of(what, "1, red", expected, None, None)]
        size = math.prod(result["shape"][1:])
        changed = [changed_entries(picture) for picture in result["pictures"]]
        counts = sorted({len(entries) for entries in changed})
        channels = sorted({entry // size for entries in changed for entry in entries})
        got = " of channel ".join(", ".join(map(str, some)) for some in (counts, channels))
        return [Check.of(what, "1, red", expected, got, (counts, channels) == ([1], [0]))]


def changed_entries(picture: dict[str, Any]) -> list[int]:
    """Where the flattened pictures, channel after channel, differ.

    Example:
        >>> changed_entries({"clean": [5, 6, 7], "perturbed": [5, 9, 7]})
        [1]
    """
    pairs = zip(picture["clean"], picture["perturbed"], strict=True)
    return [index for index, (before, after) in enumerate(pairs) if before != after]


@styled
def pictures_figure(
    shape: Sequence[int], pictures: Sequence[dict[str, Any]], *, watermark: str | None = None
) -> Figure:
    """The clean images above, the changed ones below with the norms of their changes.

    Args:
        shape: (channels, height, width).
        pictures: what :func:`change_one_pixel` gives, with the name of the class.
        watermark: a text across the figure.

    Example:
        >>> black = change_one_pixel(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.Generator().manual_seed(0))
        >>> len(pictures_figure((3, 4, 4), [black | {"class": "cat"}]).axes)
        2
    """
    figure = new_figure(7.4, 5.4, watermark)
    grid = figure.subplots(2, len(pictures), squeeze=False)
    for column, picture in zip(grid.T, pictures, strict=True):
        for axes, key in zip(column, ("clean", "perturbed"), strict=True):
            pixels = torch.tensor(picture[key], dtype=torch.uint8).reshape(tuple(shape)).permute(1, 2, 0)
            axes.imshow(pixels.expand(-1, -1, 3).numpy(), interpolation="none")
            axes.set_axis_off()
        column[0].set_title(picture["class"], loc="center")
        norms = f"‖δ‖₂ = {picture['l2']:.3f}, ‖δ‖_M = {picture['metric']:.3f}"
        column[1].text(0.5, -0.04, norms, ha="center", va="top", transform=column[1].transAxes, fontsize=8.5)
    return figure
