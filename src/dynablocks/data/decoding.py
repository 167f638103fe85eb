"""Encoded images (bytes or files) to one uint8 tensor, in threads, with the file formats that were met."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dynablocks.errors import BadData
from dynablocks.progress import track

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from numpy.typing import NDArray
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")
LOSSLESS = frozenset({"png", "bmp", "ppm"})
_CHUNK = 256
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


@dataclass(frozen=True)
class EncodedImages:
    """Where the images of one split come from.

    Args:
        sources: the encoded bytes, or the files, one an image.
        origin: what an error calls the whole, for example the parquet file's name.
    """

    sources: Sequence[bytes | Path]
    origin: str

    def describe(self, index: int) -> str:
        """What an error calls image ``index``."""
        source = self.sources[index]
        return str(source) if isinstance(source, Path) else f"image {index} of {self.origin}"


def copy_name(name: str, formats: set[str]) -> str:
    """``name``, marked with the formats that may have lost detail: ``cifar10`` from JPEG files is ``cifar10-jpeg``.

    Example:
        >>> copy_name("cifar10", {"png"}), copy_name("cifar10", {"png", "jpeg"})
        ('cifar10', 'cifar10-jpeg')
    """
    return "-".join([name, *sorted(formats - LOSSLESS)])


def decode_images(
    encoded: EncodedImages, channels: int | None = None
) -> tuple[UInt8[Tensor, "image channel height width"], set[str]]:
    """Decode every image; all must have the size of the first.

    Args:
        encoded: at least one image.
        channels: 3 makes RGB of grey images; None does so only when some image has colours.

    Returns:
        uint8 (N, C, H, W), and the formats met in lower case (``"jpeg"``, ``"png"``, …), read from the files' first
        bytes rather than their names.

    Raises:
        BadData: an image cannot be decoded, differs in size, is transparent or has more than 8 bits a channel.
    """
    size = _decode(encoded, 0, None)[0].shape[:2]
    chunks = [range(i, min(i + _CHUNK, len(encoded.sources))) for i in range(0, len(encoded.sources), _CHUNK)]

    def decode_chunk(chunk: range) -> tuple[NDArray[np.uint8], set[str]]:
        arrays, names = zip(*(_decode(encoded, index, size) for index in chunk), strict=True)
        return _stack(arrays, channels), set(names)

    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        results = list(track(pool.map(decode_chunk, chunks), f"decoding {encoded.origin}", len(chunks)))
    finally:
        pool.shutdown(cancel_futures=True)
    formats = {name for _, names in results for name in names}
    most = max(part.shape[-1] for part, _ in results)
    pixels = np.empty((len(encoded.sources), most, *size), dtype=np.uint8)
    for chunk in reversed(chunks):
        # Each is given back as it is copied, so that all images are in memory once and not twice.
        pixels[chunk.start : chunk.stop] = results.pop()[0].transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels), formats


def _decode(encoded: EncodedImages, index: int, size: tuple[int, ...] | None) -> tuple[NDArray[np.uint8], str]:
    from PIL import Image, UnidentifiedImageError

    source = encoded.sources[index]
    try:
        content = source.read_bytes() if isinstance(source, Path) else source
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if size is not None and (image.height, image.width) != size:
            raise BadData(
                f"{encoded.describe(index)} is {image.width}x{image.height} pixels, the first one is "
                f"{size[1]}x{size[0]}; all images must have one size: resize or crop them first."
            )
        _refuse_deep_or_transparent(image, encoded.describe(index))
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except BadData:
        raise
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is no PNG, JPEG, BMP, PPM or WebP image" if unknown else str(error)
        raise BadData(
            f"{encoded.describe(index)} cannot be decoded ({reason}); fetch the data again or remove this image."
        ) from error
    return pixels.reshape(image.height, image.width, -1), _format(image)


def _format(image: ImageFile) -> str:
    name = (image.format or "unknown").lower()
    return "jpeg" if name == "mpo" else name


def _refuse_deep_or_transparent(image: ImageFile, described: str) -> None:
    if image.mode not in _EIGHT_BIT_MODES:
        raise BadData(f"{described} has pixels of mode {image.mode}; 8 bits a channel are needed: convert it first.")
    if _is_cut_to_eight_bits(image):
        raise BadData(f"{described} has more than 8 bits a channel; 8 are needed: convert it first.")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise BadData(f"{described} is partly transparent; paint it on a background and save it without alpha.")


def _is_cut_to_eight_bits(image: ImageFile) -> bool:
    """Whether Pillow will keep the upper 8 bits of each channel alone: no mode says that a colour image has more.

    To be asked before the image is loaded, which empties its list of tiles.
    """
    return any(
        ";16B" in str(arguments) or (codec.startswith("ppm") and isinstance(arguments, tuple) and arguments[1] > 255)
        for codec, _, _, arguments in image.tile
    )


def _stack(arrays: Sequence[NDArray[np.uint8]], channels: int | None) -> NDArray[np.uint8]:
    stacked = np.stack(_same_channels(arrays))
    if channels == 3 and stacked.shape[-1] == 1:
        return np.repeat(stacked, 3, axis=-1)
    return stacked


def _same_channels(arrays: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    most = max(array.shape[-1] for array in arrays)
    return [array if array.shape[-1] == most else np.repeat(array, most, axis=-1) for array in arrays]
