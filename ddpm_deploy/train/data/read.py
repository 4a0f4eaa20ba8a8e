"""Images that were found, into memory."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.machine import cpu_threads, memory_limit
from ddpm_deploy.runtime.protocols import Labels
from ddpm_deploy.stages import Progress, no_progress
from ddpm_deploy.train.data.pixels import Seen, Size, fit
from ddpm_deploy.train.data.scale import pixel_type, scale
from ddpm_deploy.train.data.source import DataRange, Dataset, Source

logger = logging.getLogger(__name__)

_NAMED: Final = 10  # broken images


def read_images(
    source: Source,
    size: Size,
    channels: int,
    *,
    data_range: DataRange | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> Dataset:
    """Read, scale and crop all of them to (channels, height, width), and tell what that did to them.

    size: height and width. data_range: the values that are to be -1 and 1 (None: 0 and 255 of 8-bit images, and of
    others what `scale` finds). skip_broken: leave out what cannot be read. workers: threads that decode
    (None: `machine.cpu_threads`).

    Raises DataError naming images that are broken, unless they are to be skipped, and where they
    would not fit in memory.
    """
    source.require_channels(channels)
    depths = source.depths()
    images = _allocated((source.count, channels, *size), pixel_type(depths, data_range))
    if images.dtype == np.uint8 and "16 bits" in depths:
        logger.info("there are images of 8 and of 16 bits: of the latter, the top 8 bits are used")
    seen = _read_into(images, source, workers or cpu_threads(), progress)
    labels = source.labels
    if broken := {i: one for i, one in enumerate(seen) if isinstance(one, Exception)}:
        _tell_broken(source, broken, skip_broken)
        images = np.delete(images, list(broken), axis=0)
        labels = None if labels is None else np.delete(labels, list(broken))
    _require_classes(source, labels)
    whole = [one for one in seen if isinstance(one, Seen)]
    _tell_shapes(whole, size)
    ends = min(one.lowest for one in whole), max(one.highest for one in whole)
    return Dataset(images, labels, scale(images, ends, depths, data_range))


def _allocated(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Room for all images. Raises DataError where there is none."""
    size, memory = math.prod(shape) * dtype.itemsize, memory_limit()
    if size > memory:
        raise DataError(
            f"the images would take {size / 2**30:.1f} GiB, and this process may use {memory / 2**30:.1f} GiB of "
            "memory: choose a smaller --image-size, or fewer images"
        )
    return np.empty(shape, dtype)


def _read_into(
    images: NDArray[Any], source: Source, workers: int, progress: Progress
) -> list[Seen | Exception]:
    """Fill `images`, as deep as they are; gives what each was, or why it cannot be read."""
    channels, *size = images.shape[1:]

    def read(i: int) -> Seen | Exception:
        try:
            with _closing(source.load(i)) as image:
                images[i], seen = fit(image, (size[0], size[1]), channels, deep=images.dtype == np.float32)
                return seen
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders of a broken file raise nearly anything
            return error

    found: list[Seen | Exception] = []
    with ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        # Of images over 89 megapixels; those over twice that are refused.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for one in pool.map(read, range(source.count)):
            found.append(one)
            progress(1)
    return found


def _closing(image: Any) -> AbstractContextManager[Any]:
    """A picture, to be closed; an array needs none."""
    return nullcontext(image) if isinstance(image, np.ndarray) else image


def _tell_broken(source: Source, broken: Mapping[int, Exception], skip: bool) -> None:
    """Name what cannot be read. Raises DataError unless it is to be left out, and something remains."""
    named = "; ".join(
        f"{source.name(i)} ({first_line(error)})" for i, error in islice(broken.items(), _NAMED)
    )
    more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    what = f"{len(broken)} of {source.count} images cannot be read"
    if not skip or len(broken) == source.count:
        raise DataError(f"{what}: {named}{more}: mend them, or pass --skip-broken")
    logger.warning("%s and are left out: %s%s", what, named, more)


def _require_classes(source: Source, labels: Labels | None) -> None:
    """Each class has images, or is told to have none. Raises DataError where it has a name."""
    if labels is None:
        return
    empty = np.flatnonzero(np.bincount(labels, minlength=source.num_classes) == 0)
    if len(empty) and source.class_names:
        raise DataError(
            f"of the class {show(source.class_names[empty[0]])}, no image can be read: mend some of them"
        )
    if len(empty):
        listed = ", ".join(map(str, empty[:_NAMED])) + ", …" * (len(empty) > _NAMED)
        logger.warning("no image has one of the labels %s, which the model will have all the same", listed)


def _tell_shapes(seen: Sequence[Seen], size: Size) -> None:
    """Tell, once, what was done to images of other shapes."""
    for found, what in (
        ([one for one in seen if one.is_cropped], "have other proportions and are cropped to the middle"),
        ([one for one in seen if one.is_enlarged], "are smaller and are enlarged"),
    ):
        if found:
            (height, width), count = found[0].size, len(found)
            logger.info(
                "for %d×%d, %d of %d images (as one of %d×%d) %s",
                *size,
                count,
                len(seen),
                height,
                width,
                what,
            )
    if on_white := sum(one.on_white for one in seen):
        what = "are laid on white where they are transparent: --channels rgba keeps that"
        logger.info("%d of %d images %s", on_white, len(seen), what)
