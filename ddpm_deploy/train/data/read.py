"""Images that were found, into memory."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from ddpm_deploy.train.data.pixels import DeeperError, Seen, Size, fit
from ddpm_deploy.train.data.scale import pixel_type, require_common_scale, scale
from ddpm_deploy.train.data.source import DataRange, Dataset, Source

logger = logging.getLogger(__name__)

_NAMED: Final = 10  # broken images


def read_images(
    source: Source,
    size: Size,
    channels: int,
    *,
    data_range: DataRange | None = None,
    known_range: DataRange | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> Dataset:
    """Read, scale and crop all of them to (channels, height, width), and tell what that did to them.

    size: height and width. data_range: the values that are to be -1 and 1 (None: 0 and 255 of 8-bit images, and of
    others what `scale` finds). known_range: what it found before, for images that are read again. skip_broken: leave
    out what cannot be read. workers: threads that decode (None: `machine.cpu_threads`).

    Raises DataError naming images that are broken, unless they are to be skipped, and where they
    would not fit in memory.
    """
    source.require_channels(channels)
    if not skip_broken:  # else it is seen later whether those that can be read have one
        require_common_scale(source.depths(), data_range)
    shape, workers = (source.count, channels, *size), workers or cpu_threads()
    kept = pixel_type(source.depths(), data_range)
    images, seen = _read(source, shape, kept, workers, progress)
    depths = frozenset(one.depth for one in seen if isinstance(one, Seen | DeeperError))
    if depths and (kept := pixel_type(depths, data_range)) != images.dtype:
        # A header was of a broken image, or a name was of another kind of file.
        images, seen = _read(source, shape, kept, workers, no_progress)
    labels = source.labels
    if broken := {i: one for i, one in enumerate(seen) if isinstance(one, Exception)}:
        _tell_broken(source, broken, skip_broken)
        images = np.delete(images, list(broken), axis=0)
        labels = None if labels is None else np.delete(labels, list(broken))
    _require_classes(source, labels)
    require_common_scale(depths, data_range)
    whole = [one for one in seen if isinstance(one, Seen)]
    _tell(whole, size)
    return Dataset(images, labels, scale(images, whole, data_range, known_range))


def _read(
    source: Source, shape: tuple[int, ...], dtype: np.dtype[Any], workers: int, progress: Progress
) -> tuple[NDArray[Any], list[Seen | Exception]]:
    """All images, and what each was, or why it cannot be read. Raises DataError where they do not fit in memory."""
    takes, memory = math.prod(shape) * dtype.itemsize, memory_limit()
    if takes > memory:
        raise DataError(
            f"the images would take {takes / 2**30:.1f} GiB, and this process may use {memory / 2**30:.1f} GiB of "
            "memory: choose a smaller --image-size, or fewer images"
        )
    images = np.empty(shape, dtype)
    _, channels, height, width = shape

    def read(i: int) -> Seen | Exception:
        try:
            with source.load(i) as image:
                images[i], seen = fit(image, (height, width), channels, deep=dtype == np.float32)
                return seen
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders of a broken file raise nearly anything
            return error.with_traceback(None)  # which would hold its image

    found: list[Seen | Exception] = []
    with ThreadPoolExecutor(workers) as pool, warnings.catch_warnings():
        # Of images over 89 megapixels; those over twice that are refused.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for one in pool.map(read, range(source.count)):
            found.append(one)
            progress(1)
    return images, found


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


def _tell(seen: Sequence[Seen], size: Size) -> None:
    """Tell, once, what was done to images that are not as the model takes them."""
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
    for count, what in (
        (
            sum(one.on_white for one in seen),
            "are laid on white where they are transparent: --channels rgba keeps that",
        ),
        (
            sum(one.is_cut for one in seen),
            "have colours of 16 bits, of which the top 8 are read: an array has all",
        ),
        (_in_top_bits(seen), "have 16 bits, of which the top 8 are used, as the others have 8"),
    ):
        if count:
            logger.info("%d of %d images %s", count, len(seen), what)


def _in_top_bits(seen: Sequence[Seen]) -> int:
    """Images of 16 bits that are read as the others, of 8 bits."""
    return sum(one.depth == "16 bits" and not len(one.some) for one in seen)
