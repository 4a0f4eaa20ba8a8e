"""One scale for all images of a data set: which values become -1 and 1."""

import logging
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import DataError
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.train.data.pixels import Seen
from ddpm_deploy.train.data.source import EIGHT_BITS, DataRange, Depth

logger = logging.getLogger(__name__)

_UNITS: Final[tuple[DataRange, ...]] = ((0.0, 1.0), (-1.0, 1.0))  # that floats usually have
_HARDLY: Final = 1 / 8  # of the range
_OUTLIERS: Final = 0.1  # percent of the values at either end
_LEVELS: Final = 4096  # that float32 must be able to tell apart in the range
_BLOCK: Final = 64  # images


def pixel_type(depths: frozenset[Depth], given: DataRange | None) -> np.dtype[Any]:
    """What images are kept as: uint8, from 0 to 255, or float32, which keeps all bits that there are.

    given: the range of the data, if it was said.
    """
    plain = depths == {"8 bits"} and given == EIGHT_BITS
    mixed = "8 bits" in depths and depths <= {"8 bits", "16 bits"} and given is None
    return np.dtype(np.uint8 if plain or mixed else np.float32)


def require_common_scale(depths: frozenset[Depth], given: DataRange | None) -> None:
    """Raise DataError where images of these kinds have no scale in common, and none was said."""
    if given is None and len(depths) > 1 and depths not in ({"8 bits", "16 bits"}, {"16 bits", "32 bits"}):
        raise DataError(
            f"there are images of {' and of '.join(sorted(depths))}, which have no scale in common: keep them apart, "
            "or say which values are the darkest and the brightest with --data-range LO HI"
        )


def scale(
    images: NDArray[Any], seen: Sequence[Seen], given: DataRange | None, known: DataRange | None
) -> DataRange:
    """Bring images of more than 8 bits to [-1, 1], in place, and tell how. Returns the values that -1 and 1 stand for.

    images: as `pixel_type` says, in the data's own units. seen: what each was. given: the range of the data, if it was
    said; known: if it was found before.

    Raises DataError where the values are all the same, or too close to one another for float32.
    """
    ends = min(one.lowest for one in seen), max(one.highest for one in seen)
    if images.dtype == np.uint8:
        _tell_use(ends, EIGHT_BITS)
        return EIGHT_BITS
    chosen = given or known or _found_range(*ends, frozenset(one.depth for one in seen))
    _require_digits(chosen)
    other = "" if given else ": --data-range sets another"
    logger.info("values from %.7g to %.7g become -1 to 1, by one scale for all images%s", *chosen, other)
    some = np.concatenate([one.some for one in seen])
    _tell_outside(ends, some, chosen)
    if _tell_use(ends, chosen):
        _tell_outliers(ends, some, chosen)
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
        raise DataError(f"all values of all images are {highest:.7g}: there is nothing to learn from them")
    return found


def _require_digits(data_range: DataRange) -> None:
    """Raise DataError where float32 does not tell the values in a range apart."""
    low, high = data_range
    largest = max(abs(low), abs(high))
    if largest > np.finfo(np.float32).max or np.spacing(np.float32(largest)) > (high - low) / _LEVELS:
        raise DataError(
            f"values from {low:.9g} to {high:.9g} differ in digits that float32 does not keep: subtract the smallest "
            "from all of them, and save them again"
        )


def _rescale(images: Array, data_range: DataRange) -> None:
    """From the data's own units to [-1, 1], in place; what is outside is clipped."""
    lowest, highest = data_range
    for first in range(0, len(images), _BLOCK):
        block = images[first : first + _BLOCK]
        block -= np.float32(lowest)
        block *= np.float32(2 / (highest - lowest))
        block -= 1
        np.clip(block, -1, 1, out=block)


def _tell_outside(ends: DataRange, some: Array, data_range: DataRange) -> None:
    """Warn where values are outside their range. some: of them."""
    low, high = data_range
    if ends[0] < low or ends[1] > high:
        share = max(((some < low) | (some > high)).mean(), 1 / len(some))
        logger.warning(
            "about %.2g %% of the values are outside %.7g to %.7g, and clipped to it", 100 * share, low, high
        )


def _tell_use(ends: DataRange, data_range: DataRange) -> bool:
    """Whether images use their range; warns where they hardly do: they would all be dark, or all alike."""
    (lowest, highest), (low, high) = ends, data_range
    hardly = _HARDLY * (high - low)
    if lowest == highest:
        logger.warning("all values of all images are %.7g: there is nothing to learn from them", lowest)
    elif lowest >= high or highest <= low:
        logger.warning("all values are from %.7g to %.7g: pass another --data-range", lowest, highest)
    elif low < highest < low + hardly:
        logger.warning(
            "the brightest value of all images is %.7g of %.7g: if none can be brighter, pass --data-range %.7g %.7g",
            *(highest, high, low, highest),
        )
    elif highest - lowest < hardly:
        logger.warning(
            "all values are from %.7g to %.7g, a small part of %.7g to %.7g: if none can be outside, pass --data-range "
            "%.7g %.7g",
            *(*ends, *data_range, *ends),
        )
    else:
        return True
    return False


def _tell_outliers(ends: DataRange, some: Array, data_range: DataRange) -> None:
    """Warn where the two extremes alone make the range wide: a broken pixel, or a number that stands for no data."""
    inner = some[(some != ends[0]) & (some != ends[1])]
    if not len(inner):
        return
    low, high = np.percentile(inner, [_OUTLIERS, 100 - _OUTLIERS]).tolist()
    hardly = _HARDLY * (data_range[1] - data_range[0])
    if not low < high < low + hardly:
        return
    low, high = (
        end if abs(end - near) < hardly else near for end, near in zip(ends, (low, high), strict=True)
    )
    logger.warning(
        "nearly all values are from %.7g to %.7g, a small part of %.7g to %.7g: if the others mean nothing, pass "
        "--data-range %.7g %.7g",
        *(low, high, *data_range, low, high),
    )
