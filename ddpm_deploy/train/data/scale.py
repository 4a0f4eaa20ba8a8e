"""One scale for all images of a data set: which values become -1 and 1."""

import logging
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import DataError
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.train.data.source import EIGHT_BITS, DataRange, Depth

logger = logging.getLogger(__name__)

_UNITS: Final[tuple[DataRange, ...]] = ((0.0, 1.0), (-1.0, 1.0))  # that floats usually have
_HARDLY: Final = 1 / 8  # of the range
_OUTLIERS: Final = 0.1  # percent of the values at either end
_LOOKED_AT: Final = 1 << 20  # values, to find outliers
_BLOCK: Final = 64  # images


def pixel_type(depths: frozenset[Depth], given: DataRange | None) -> np.dtype[Any]:
    """What images are kept as: uint8, from 0 to 255, or float32, which keeps all bits that there are.

    given: the range of the data, if it was said. Raises DataError where images of these kinds have no common scale.
    """
    eight_bits = "8 bits" in depths and depths <= {"8 bits", "16 bits"}
    if given is not None:
        return np.dtype(np.uint8 if eight_bits and given == EIGHT_BITS else np.float32)
    if len(depths) > 1 and not eight_bits and depths != {"16 bits", "32 bits"}:
        raise DataError(
            f"there are images of {' and of '.join(sorted(depths))}, which have no scale in common: keep them apart, "
            "or say which values are the darkest and the brightest with --data-range LO HI"
        )
    return np.dtype(np.uint8 if eight_bits else np.float32)


def scale(
    images: NDArray[Any], ends: DataRange, depths: frozenset[Depth], given: DataRange | None
) -> DataRange:
    """Bring images of more than 8 bits to [-1, 1], in place, and tell how. Returns the values that -1 and 1 stand for.

    images: as `pixel_type` says, in the data's own units. ends: the smallest and the largest value of all of them.
    given: the range of the data, if it was said.
    """
    if images.dtype == np.uint8:
        _tell_use(images, ends, EIGHT_BITS)
        return EIGHT_BITS
    chosen = given or _found_range(*ends, depths)
    other = "" if given else ": --data-range sets another"
    logger.info("values from %g to %g become -1 to 1, by one scale for all images%s", *chosen, other)
    _tell_use(images, ends, chosen)
    _rescale(images, chosen)
    return chosen


def _found_range(lowest: float, highest: float, depths: frozenset[Depth]) -> DataRange:
    """The range of data with more than 8 bits, by the smallest and the largest value of all images.

    Floats that stay in [0, 1] or [-1, 1] have that range, and others the values that occur. Whole numbers begin at 0,
    unless some are negative; those that stay in [0, 255] are 8-bit images in a larger type.

    Raises DataError where all values are the same.
    """
    if depths == {"bool"}:
        return _UNITS[0]
    if "floats" in depths:
        found = next((unit for unit in _UNITS if unit[0] <= lowest and highest <= unit[1]), (lowest, highest))
    elif lowest >= 0 and highest <= EIGHT_BITS[1]:
        found = EIGHT_BITS
    else:
        found = min(lowest, 0.0), highest
    if found[0] == found[1]:
        raise DataError(f"all values of all images are {highest:g}: there is nothing to learn from them")
    return found


def _rescale(images: Array, data_range: DataRange) -> None:
    """From the data's own units to [-1, 1], in place; what is outside is clipped."""
    lowest, highest = data_range
    for first in range(0, len(images), _BLOCK):
        block = images[first : first + _BLOCK]
        block -= np.float32(lowest)
        block *= np.float32(2 / (highest - lowest))
        block -= 1
        np.clip(block, -1, 1, out=block)


def _tell_use(images: NDArray[Any], ends: DataRange, data_range: DataRange) -> None:
    """Warn where images, in the data's own units, leave their range, or hardly use it: all dark, or all alike."""
    (lowest, highest), (low, high) = ends, data_range
    if lowest < low or highest > high:
        share = 100 * np.mean([((block < low) | (block > high)).mean() for block in images])
        logger.warning("%.2g %% of the values are outside %g to %g, and clipped to it", share, low, high)
    if highest - low < _HARDLY * (high - low):
        logger.warning(
            "the brightest value of all images is %g of %g: if none can be brighter, pass --data-range %g %g",
            *(highest, high, low, highest),
        )
    elif high - lowest < _HARDLY * (high - low):
        logger.warning(
            "the darkest value of all images is %g, and the range is %g to %g: if none can be darker, pass "
            "--data-range %g %g",
            *(lowest, low, high, lowest, high),
        )
    elif images.dtype == np.float32:
        some = images.ravel()[:: max(1, images.size // _LOOKED_AT)]
        most = np.percentile(some, [_OUTLIERS, 100 - _OUTLIERS]).tolist()
        if most[1] - most[0] < _HARDLY * (high - low):
            logger.warning(
                "nearly all values are from %g to %g, a small part of %g to %g: if the others mean nothing, pass "
                "--data-range %g %g",
                *(*most, low, high, *most),
            )
