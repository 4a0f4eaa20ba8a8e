"""One image, as it was found, to the pixels that are trained on: upright, in one shape, with its channels."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ddpm_deploy.runtime.images import COLOURS, Pixels, to_pillow
from ddpm_deploy.runtime.protocols import Array

Size = tuple[int, int]  # height and width

_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as Pillow's
_SMALL_DIFFERENCE: Final = 0.01  # of two proportions, which nobody would call a crop


@dataclass(frozen=True)
class Seen:
    """What an image was, before it was made to fit.

    lowest, highest: number in it. size, wanted: height and width that it had, and got. on_white: whether what is
    transparent in it was laid on white.
    """

    lowest: float
    highest: float
    size: Size
    wanted: Size
    on_white: bool = False

    @property
    def is_enlarged(self) -> bool:
        """Whether it has fewer pixels than it takes."""
        return any(had < wanted for had, wanted in zip(self.size, self.wanted, strict=True))

    @property
    def is_cropped(self) -> bool:
        """Whether its proportions are others."""
        (height, width), (had_height, had_width) = self.wanted, self.size
        return abs(height * had_width / (width * had_height) - 1) > _SMALL_DIFFERENCE


def fit(
    image: Image.Image | NDArray[Any], size: Size, channels: int, *, deep: bool = False
) -> tuple[Pixels | Array, Seen]:
    """One image as (channels, height, width): upright, scaled until one side fits, the other cropped to the middle.

    image: a picture, or an array (H, W, C). size: height and width. deep: whether to keep all bits that there are, as
    float32 in the data's own units; else uint8, for which 16-bit numbers give their top 8 bits. What is transparent is
    laid on white, unless there are four channels; of an animation, the first frame is taken.

    Raises ValueError where numbers are not finite, or are of more than 16 bits and not to be deep.
    """
    if not isinstance(image, np.ndarray):
        return _fit_picture(image, size, channels, deep)
    if image.dtype == np.uint8 and image.shape[-1] in COLOURS:
        return _fit_picture(to_pillow(image), size, channels, deep)
    return _fit_numbers(image, size, channels, deep)


def _fit_picture(image: Image.Image, size: Size, channels: int, deep: bool) -> tuple[Pixels | Array, Seen]:
    """Fit what Pillow opened."""
    had = (image.height, image.width)
    image.draft(None, (size[1], size[0]))  # a large JPEG is decoded near the size that is needed
    image = ImageOps.exif_transpose(image)
    if (image.height > image.width) != (had[0] > had[1]):
        had = had[::-1]
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _fit_numbers(np.asarray(image)[..., None], size, channels, deep)
    on_white: bool | np.bool = False
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        on_white = np.asarray(image.getchannel("A")).min() < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = _resized(image.convert(_MODES[channels]), size)
    pixels = np.asarray(image, np.uint8).reshape(*size, channels).transpose(2, 0, 1)
    seen = Seen(float(pixels.min()), float(pixels.max()), had, size, bool(on_white))
    return (pixels.astype(np.float32) if deep else pixels), seen


def _fit_numbers(values: NDArray[Any], size: Size, channels: int, deep: bool) -> tuple[Pixels | Array, Seen]:
    """Fit an array (H, W, C), each channel by itself."""
    lowest, highest = float(values.min()), float(values.max())
    if not np.isfinite([lowest, highest]).all():
        raise ValueError("it has numbers that are not finite")
    if deep:
        planes = values.astype(np.float32)
    elif values.dtype == np.uint8:
        planes = values
    elif values.dtype.kind == "u" and values.dtype.itemsize == 2:
        planes = (values >> 8).astype(np.uint8)
    else:
        raise ValueError(f"it holds {values.dtype} numbers, unlike the others")
    own = planes.shape[-1]
    if own != channels:
        planes = planes.repeat(channels, axis=2) if own == 1 else (planes @ _LUMA)[..., None]
    fitted = [
        _resized(Image.fromarray(np.ascontiguousarray(plane)), size) for plane in planes.transpose(2, 0, 1)
    ]
    seen = Seen(lowest, highest, (values.shape[0], values.shape[1]), size)
    return np.stack([np.asarray(plane) for plane in fitted]), seen


def _resized(image: Image.Image, size: Size) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
