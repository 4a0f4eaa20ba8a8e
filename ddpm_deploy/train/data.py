"""Training images: a folder, an array file, or the digits; as one uint8 array (N, C, H, W)."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ddpm_deploy.arrays import require_honest
from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import require_file, show

Pixels = NDArray[np.uint8]
Progress = Callable[[int], None]  # how many images more are done

DIGITS: Final = "digits"
# What Pillow decodes by itself. It goes by a file's content, and would start Ghostscript for PostScript
# that calls itself .png.
_RASTERS: Final = (
    *(
        "AVIF",
        "BMP",
        "DDS",
        "DIB",
        "GIF",
        "ICNS",
        "ICO",
        "JPEG",
        "JPEG2000",
        "MPO",
        "PCX",
        "PNG",
        "PPM",
        "QOI",
    ),
    *("SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
)
Image.init()  # registers its decoders
_FORMATS: Final = tuple(name for name in _RASTERS if name in Image.OPEN)
_ARRAY_SUFFIXES: Final = (".npy", ".npz")
_NAMED: Final = 3  # broken files named in an error


@dataclass(frozen=True)
class Source:
    """Images that have been found but not read yet.

    load(i): the i-th. name(i): of it, for errors. grey(): whether all of them are.
    """

    count: int
    load: Callable[[int], Image.Image]
    name: Callable[[int], str]
    grey: Callable[[], bool]


def find_images(data: str) -> Source:
    """What `data` names: an .npy or .npz of uint8 images, a folder of images, or the word "digits".

    A folder of that name is "./digits".

    An array is (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W). A folder is searched with its
    subfolders. Raises DataError.
    """
    path = Path(data)
    if data == DIGITS:
        return _array_source(_digits(), DIGITS)
    if path.is_dir():
        return _folder_source(path)
    if path.suffix.lower() in _ARRAY_SUFFIXES:
        require_file(path, DataError)
        return _array_source(_read_array(path), show(path))
    require_file(path, DataError)
    raise DataError(
        f"{show(path)} is not a folder of images, nor an .npy or .npz file, nor the word {DIGITS!r}"
    )


def read_images(
    source: Source,
    image_size: int,
    channels: int,
    *,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> Pixels:
    """Read, scale and crop all of them: (N, channels, image_size, image_size) uint8.

    Raises DataError naming images that are broken, unless they are to be skipped, and where they
    would not fit in memory.
    """
    shape = (source.count, channels, image_size, image_size)
    _require_memory(math.prod(shape))
    images = np.empty(shape, np.uint8)
    broken: list[tuple[int, Exception]] = []

    def read(i: int) -> None:
        try:
            with source.load(i) as image:
                images[i] = fit(image, image_size, channels)
        except Exception as error:  # Pillow's decoders of a broken file raise nearly anything
            broken.append((i, error))

    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        # Of images over 89 megapixels; those over twice that are refused.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for _ in pool.map(read, range(source.count)):
            if progress:
                progress(1)
    broken.sort(key=lambda item: item[0])
    if broken and (not skip_broken or len(broken) == source.count):
        named = "; ".join(f"{source.name(i)} ({first_line(error)})" for i, error in broken[:_NAMED])
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise DataError(
            f"{len(broken)} of {source.count} images cannot be read: {named}{more}: mend them, or pass --skip-broken"
        )
    return np.delete(images, [i for i, _ in broken], axis=0) if broken else images


def fit(image: Image.Image, size: int, channels: int) -> Pixels:
    """One image as (channels, size, size) uint8: upright, scaled by its shorter side, cropped to the middle.

    16-bit greys keep their top 8 bits; what is transparent is laid on white; of an animation, the
    first frame.
    """
    image.draft(None, (size, size))  # a large JPEG is decoded near the size that is needed
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.uint8).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1)


def _to_8_bits(values: NDArray[np.int32] | NDArray[np.float32]) -> Pixels:
    """32-bit greys: integers as 16-bit ones where they pass 255, floats as [0, 1] where they stay in it."""
    top = float(np.nanmax(values, initial=0))
    scale = 1 / 256 if top > 255 else 255.0 if values.dtype.kind == "f" and top <= 1 else 1.0
    pixels: Pixels = np.clip(np.nan_to_num(values * scale), 0, 255).astype(np.uint8)
    return pixels


def _digits() -> Pixels:
    """1,797 handwritten digits, (N, 8, 8) (Alpaydin & Kaynak 1998, UCI, CC BY 4.0; shipped by scikit-learn)."""
    images = require("sklearn.datasets", "train").load_digits().images
    pixels: Pixels = np.rint(images * (255 / 16)).astype(np.uint8)
    return pixels


def _read_array(path: Path) -> NDArray[np.generic]:
    try:
        if path.suffix.lower() == ".npy":
            # Mapped: a header that lies about the size costs no memory.
            array: NDArray[np.generic] = np.lib.format.open_memmap(path, mode="r")
            return array
        require_honest(path, _memory())
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            name = next((n for n in ("images", "arr_0") if n in names), names[0] if len(names) == 1 else None)
            if not names:
                raise ValueError("it holds no array")
            if name is None:
                raise ValueError(f"it holds the arrays {', '.join(names)}, and none is named images or arr_0")
            member: NDArray[np.generic] = archive[name]
            return member
    except Exception as error:  # NumPy's parsers of a hostile file raise nearly anything
        raise DataError(f"{show(path)} is not a readable array of images: {first_line(error)}") from error


def _array_source(array: NDArray[np.generic], name: str) -> Source:
    if array.dtype != np.uint8:
        raise DataError(
            f"{name} holds {array.dtype} values, and images are uint8: convert them to 0..255 first"
        )
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and array.shape[-1] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise DataError(
            f"{name} has the shape {array.shape}: images are (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)"
        )
    grey = array.shape[-1] == 1

    def load(i: int) -> Image.Image:
        pixels = np.asarray(array[i])
        return Image.fromarray(pixels[..., 0] if grey else np.ascontiguousarray(pixels))

    return Source(len(array), load, lambda i: f"image {i} of {name}", lambda: grey)


def _folder_source(folder: Path) -> Source:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS}
    paths = sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in suffixes and p.is_file())
    if not paths:
        raise DataError(f"{show(folder)} holds no images: files such as .png, .jpg or .webp are needed")
    return Source(len(paths), lambda i: _open(paths[i]), lambda i: show(paths[i]), partial(_all_grey, paths))


def _open(path: Path) -> Image.Image:
    return Image.open(path, formats=_FORMATS)


def _all_grey(paths: Sequence[Path]) -> bool:
    """Whether every image that opens is grey, by its header."""
    for path in paths:
        try:
            with _open(path) as image:
                if image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;16"):
                    return False
        except Exception:  # it is broken, which is told when it is read
            continue
    return True


def _require_memory(size: int) -> None:
    memory = _memory()
    if size > memory:
        raise DataError(
            f"the images would take {size / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f} GiB of memory: "
            "choose a smaller --image-size, or fewer images"
        )


def _memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
