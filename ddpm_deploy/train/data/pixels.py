"""One image, as it was found, to the pixels that are trained on: upright, in one shape, with its channels."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ddpm_deploy.runtime.images import COLOURS, Pixels, to_pillow
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.train.data.source import Depth, array_depth

Size = tuple[int, int]  # height and width

_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as Pillow's
_SOME: Final = 61  # numbers of an image that are looked at
_NONE: Final = np.empty(0, np.float32)
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SMALL_DIFFERENCE: Final = 0.01  # of two proportions, which nobody would call a crop


@dataclass(frozen=True)
class Seen:
    """What an image was, before it was made to fit.

    depth: what held its numbers. lowest, highest: of these, in the units that are kept. some: of these, spread over the
    image, where all bits are kept. size, wanted: height and width that it had, and got. on_white: whether what is
    transparent in it was laid on white. is_cut: whether Pillow gave less than the bits that it has.
    """

    depth: Depth
    lowest: float
    highest: float
    some: Array
    size: Size
    wanted: Size
    on_white: bool = False
    is_cut: bool = False

    @property
    def is_enlarged(self) -> bool:
        """Whether it has fewer pixels than it takes."""
        return any(had < wanted for had, wanted in zip(self.size, self.wanted, strict=True))

    @property
    def is_cropped(self) -> bool:
        """Whether its proportions are others."""
        (height, width), (had_height, had_width) = self.wanted, self.size
        return abs(height * had_width / (width * had_height) - 1) > _SMALL_DIFFERENCE


class DeeperError(ValueError):
    """An image has more bits than it was to have. depth: that it has."""

    def __init__(self, depth: Depth) -> None:
        super().__init__(f"it holds {depth}, unlike the others")
        self.depth = depth


def depth_of(image: Image.Image) -> Depth:
    """What holds the numbers of a picture that Pillow opened."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return "16 bits"
    return {"I": "32 bits", "F": "floats"}.get(image.mode, "8 bits")  # type: ignore[return-value]


def fit(
    image: Image.Image | NDArray[Any], size: Size, channels: int, *, deep: bool = False
) -> tuple[Pixels | Array, Seen]:
    """One image as (channels, height, width): upright, scaled until one side fits, the other cropped to the middle.

    image: a picture, or an array (H, W, C). size: height and width. deep: whether to keep all bits that there are, as
    float32 in the data's own units; else uint8, for which 16-bit numbers give their top 8 bits. What is transparent is
    laid on white, unless there are four channels; of an animation, the first frame is taken.

    Raises ValueError where numbers are not finite, DeeperError where they are of more than 16 bits and not to be deep.
    """
    if not isinstance(image, np.ndarray):
        return _fit_opened(image, size, channels, deep)
    if image.dtype == np.uint8 and image.shape[-1] in COLOURS:
        return _fit_picture(to_pillow(image), size, channels, deep)
    return _fit_numbers(image, array_depth(image.dtype), size, channels, deep)


def _fit_opened(image: Image.Image, size: Size, channels: int, deep: bool) -> tuple[Pixels | Array, Seen]:
    """Fit what Pillow opened."""
    if (depth := depth_of(image)) != "8 bits":
        return _fit_numbers(_numbers(image)[..., None], depth, size, channels, deep)
    return _fit_picture(image, size, channels, deep)


def _fit_picture(image: Image.Image, size: Size, channels: int, deep: bool) -> tuple[Pixels | Array, Seen]:
    """Fit a picture of 8 bits."""
    if image.mode == "L" and _tag(image, _SAMPLE_FORMAT, 1) != 1:
        raise ValueError("it holds signed 8-bit numbers, which Pillow does not read: use an array")
    is_cut = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    width = image.width
    image.draft(None, (max(size), max(size)))  # a large JPEG is decoded near the size that is needed
    drafted = round(width / image.width)
    image = ImageOps.exif_transpose(image)
    had = image.height * drafted, image.width * drafted
    on_white = False
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        on_white = bool(np.asarray(image.getchannel("A")).min() < 255)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(_MODES[channels])
    lowest, highest = np.reshape(image.getextrema(), (-1, 2)).T
    fitted = np.asarray(_resized(image, size), np.uint8).reshape(*size, channels).transpose(2, 0, 1)
    seen = Seen(
        "8 bits",
        float(lowest.min()),
        float(highest.max()),
        _some(np.asarray(image)) if deep else _NONE,
        had,
        size,
        on_white,
        is_cut,
    )
    return (fitted.astype(np.float32) if deep else fitted), seen


def _fit_numbers(
    values: NDArray[Any], depth: Depth, size: Size, channels: int, deep: bool
) -> tuple[Pixels | Array, Seen]:
    """Fit an array (H, W, C), each channel by itself."""
    if deep:
        with np.errstate(over="ignore"):
            planes = values.astype(np.float32)
    elif depth == "8 bits":
        planes = values
    elif depth == "16 bits":
        planes = (values >> 8).astype(np.uint8)
    else:
        raise DeeperError(depth)
    lowest, highest = float(planes.min()), float(planes.max())
    if not np.isfinite([lowest, highest]).all():
        raise ValueError("it has numbers that are not finite, or larger than float32 can hold")
    own = planes.shape[-1]
    if own != channels:
        planes = planes.repeat(channels, axis=2) if own == 1 else (planes @ _LUMA)[..., None]
    fitted = [
        _resized(Image.fromarray(np.ascontiguousarray(plane)), size) for plane in planes.transpose(2, 0, 1)
    ]
    height, width = values.shape[:2]
    seen = Seen(depth, lowest, highest, _some(planes) if deep else _NONE, (height, width), size)
    return np.stack([np.asarray(plane) for plane in fitted]), seen


def _numbers(image: Image.Image) -> NDArray[Any]:
    """The numbers (H, W) of a picture with more than 8 bits, and what Pillow overlooks of what a TIFF says of them."""
    inverted = image.mode.startswith("I;16") and _tag(image, _PHOTOMETRIC, 1) == 0
    unsigned = image.mode == "I" and _tag(image, _BITS, 0) == 32 and _tag(image, _SAMPLE_FORMAT, 1) == 1
    values = np.asarray(ImageOps.exif_transpose(image))
    if unsigned:
        return values.view(np.uint32)
    if depth_of(image) == "16 bits":
        values = values.astype(np.uint16)
    return np.iinfo(np.uint16).max - values if inverted else values


def _tag(image: Image.Image, number: int, default: int) -> int:
    """A number in a TIFF's header."""
    found = getattr(image, "tag_v2", {}).get(number, default)
    return int(found[0] if isinstance(found, tuple) else found)


def _some(values: NDArray[Any]) -> Array:
    """Some of the numbers, spread so that no row or column has them all."""
    flat = values.ravel()
    return flat[:: max(1, flat.size // _SOME) | 1][:_SOME].astype(np.float32)


def _resized(image: Image.Image, size: Size) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
