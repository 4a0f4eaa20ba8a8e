"""Training images: a folder, an array file, or the digits; as one uint8 array (N, C, H, W)."""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ddpm_deploy.arrays import require_honest
from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import require_file, show
from ddpm_deploy.runtime.images import Pixels, to_pillow
from ddpm_deploy.runtime.protocols import Labels
from ddpm_deploy.stages import Progress, no_progress

DIGITS: Final = "digits"
# What Pillow decodes by itself. It goes by a file's content, and would start Ghostscript for PostScript
# that calls itself .png.
_RASTERS: Final = "AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 MPO PCX PNG PPM QOI SGI TGA TIFF WEBP XBM XPM"
Image.init()  # registers its decoders
_FORMATS: Final = tuple(name for name in _RASTERS.split() if name in Image.OPEN)
_ARRAY_SUFFIXES: Final = (".npy", ".npz")
_IMAGE_ARRAYS: Final = ("images", "arr_0")  # names in an .npz
_NAMED: Final = 3  # broken files named in an error


@dataclass(frozen=True)
class Source:
    """Images that have been found but not read yet.

    load(i): the i-th. name(i): of it, for errors. grey(): whether all of them are. labels: (count,) int64,
    where they were asked for. class_names: of the labels, where they have names.
    """

    count: int
    load: Callable[[int], Image.Image]
    name: Callable[[int], str]
    grey: Callable[[], bool]
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Classes; 0 where no labels were asked for."""
        return 0 if self.labels is None else len(self.class_names) or int(self.labels.max()) + 1


@dataclass(frozen=True)
class Dataset:
    """Images in memory: (N, C, H, W) uint8, and their labels (N,) int64 where the model is to have classes."""

    images: Pixels
    labels: Labels | None = None

    def digest(self) -> str:
        """SHA-256 of the images and labels."""
        sha = hashlib.sha256(self.images.data)
        if self.labels is not None:
            sha.update(self.labels.data)
        return sha.hexdigest()


def find_images(data: str, *, labels: bool = False) -> Source:
    """What `data` names: an .npy or .npz of uint8 images, a folder of images, or the word "digits".

    A folder of that name is "./digits".

    An array is (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W). A folder is searched with its
    subfolders.

    labels: whether to find labels too: each folder in the folder is a class, an .npz has an array `labels`
    (N,) of numbers from 0, and the digits have theirs. Raises DataError.
    """
    path = Path(data)
    if data == DIGITS:
        return _digits(labels)
    if path.is_dir():
        return _folder_source(path, labels)
    require_file(path, DataError)
    if path.suffix.lower() not in _ARRAY_SUFFIXES:
        raise DataError(
            f"{show(path)} is not a folder of images, nor an .npy or .npz file, nor the word {DIGITS!r}"
        )
    source = _array_source(_read_array(path, *_IMAGE_ARRAYS), show(path))
    return replace(source, labels=_array_labels(path, source.count)) if labels else source


def read_images(
    source: Source,
    image_size: int,
    channels: int,
    *,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> Dataset:
    """Read, scale and crop all of them to (channels, image_size, image_size).

    workers: threads that decode (None: one a core). skip_broken: leave out what cannot be read.

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
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders of a broken file raise nearly anything
            broken.append((i, error))

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool, warnings.catch_warnings():
        # Of images over 89 megapixels; those over twice that are refused.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for _ in pool.map(read, range(source.count)):
            progress(1)
    broken.sort(key=lambda item: item[0])
    if broken and (not skip_broken or len(broken) == source.count):
        named = "; ".join(f"{source.name(i)} ({first_line(error)})" for i, error in broken[:_NAMED])
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise DataError(
            f"{len(broken)} of {source.count} images cannot be read: {named}{more}: mend them, or pass --skip-broken"
        )
    if not broken:
        return Dataset(images, source.labels)
    gone = [i for i, _ in broken]
    labels = None if source.labels is None else np.delete(source.labels, gone)
    return Dataset(np.delete(images, gone, axis=0), labels)


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


def _digits(labels: bool) -> Source:
    """1,797 handwritten digits, (N, 8, 8) (Alpaydin & Kaynak 1998, UCI, CC BY 4.0; shipped by scikit-learn)."""
    digits = require("sklearn.datasets", "train").load_digits()
    source = _array_source(np.rint(digits.images * (255 / 16)).astype(np.uint8), DIGITS)
    if not labels:
        return source
    return replace(source, labels=digits.target.astype(np.int64), class_names=tuple("0123456789"))


def _read_array(path: Path, *wanted: str) -> NDArray[np.generic]:
    """The array of an .npy, or that of an .npz with one of these names (of images: with any, if it is alone)."""
    array: NDArray[np.generic]
    try:
        if path.suffix.lower() == ".npy":
            # Mapped: a header that lies about the size costs no memory.
            array = np.lib.format.open_memmap(path, mode="r")
            return array
        require_honest(path, _memory())
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            if not names:
                raise ValueError("it holds no array")
            if len(names) == 1 and wanted == _IMAGE_ARRAYS:
                wanted = names[0], *wanted
            found = [name for name in wanted if name in names]
            if not found:
                raise ValueError(
                    f"it holds the arrays {', '.join(names)}, and none is named {' or '.join(wanted)}"
                )
            array = archive[found[0]]
            return array
    except Exception as error:  # NumPy's parsers of a hostile file raise nearly anything
        raise DataError(f"{show(path)} is not a readable array of images: {first_line(error)}") from error


def _array_labels(path: Path, count: int) -> Labels:
    if path.suffix.lower() != ".npz":
        raise DataError(
            f"{show(path)} has no labels: an .npz with arrays `images` and `labels` can have them"
        )
    labels = _read_array(path, "labels")
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"the labels in {show(path)} are {labels.dtype} {labels.shape}: whole numbers ({count},) are needed"
        )
    numbers = labels.astype(np.int64)
    if numbers.min() < 0 or numbers.max() >= count:
        raise DataError(f"the labels in {show(path)} are not the numbers of classes, from 0 up")
    return numbers


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
    return Source(
        len(array),
        load=lambda i: to_pillow(np.ascontiguousarray(array[i], np.uint8)),
        name=lambda i: f"image {i} of {name}",
        grey=lambda: array.shape[-1] == 1,
    )


def _folder_source(folder: Path, labels: bool) -> Source:
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS}
    paths = sorted(p for p in _files(folder) if p.suffix.lower() in suffixes and p.is_file())
    if not paths:
        raise DataError(f"{show(folder)} holds no images: files such as .png, .jpg or .webp are needed")
    source = Source(len(paths), lambda i: _open(paths[i]), lambda i: show(paths[i]), lambda: _all_grey(paths))
    return _with_class_folders(source, folder, paths) if labels else source


def _files(folder: Path) -> Iterator[Path]:
    """Every file in a folder and its subfolders, links followed, but for what is hidden."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _with_class_folders(source: Source, folder: Path, paths: Sequence[Path]) -> Source:
    """Label each image by the folder in `folder` that holds it."""
    inside = [path.relative_to(folder).parts for path in paths]
    bare = next((parts[0] for parts in inside if len(parts) == 1), None)
    if bare is not None:
        raise DataError(
            f"{show(folder / bare)} is in no class: with --labels, each image is in a folder of its class"
        )
    names = sorted({parts[0] for parts in inside})
    number = {name: i for i, name in enumerate(names)}
    labels = np.array([number[parts[0]] for parts in inside], np.int64)
    return replace(source, labels=labels, class_names=tuple(names))


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
