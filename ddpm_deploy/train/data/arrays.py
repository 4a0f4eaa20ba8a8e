"""Images in the arrays of .npy and .npz files."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import require_honest
from ddpm_deploy.errors import DataError, first_line, plural
from ddpm_deploy.files import show
from ddpm_deploy.machine import memory_limit
from ddpm_deploy.runtime.images import COLOURS
from ddpm_deploy.train.data.source import MOST_CHANNELS, Source, array_depth, checked_labels

ARRAY_SUFFIXES: Final = (".npy", ".npz")
_IMAGES: Final = ("images", "arr_0", "samples")  # names of an array that need no --array
_LABELS: Final = ("labels", "arr_1")
# What stands in the name of an array of images, and in its place in that of their labels.
_PARTNERS: Final = (
    (r"(?i)image", "label"),
    (r"X|(?<![a-z])x(?![a-z])", "y"),
    (r"(?i)data", "labels"),
    (r"(?i)data", "target"),
    (r"(?i)data", "targets"),
)
_SHAPES: Final = f"(N, H, W), (N, H, W, C) or (N, C, H, W) with C from 1 to {MOST_CHANNELS}"


def array_file(path: Path, labels: bool, array: str) -> Source:
    """The images of an .npy, or those of an .npz; array: the name of theirs, where it has several. Raises DataError."""
    name = show(path)
    if path.suffix.lower() == ".npy":
        if labels:
            raise DataError(f"{name} has no labels: an .npz with arrays `images` and `labels` can have them")
        return array_source(_read(path), name)
    names = _names(path)
    chosen = array or next((known for known in _IMAGES if known in names), "")
    if not chosen and len(names) == 1:
        chosen = names[0]
    if chosen not in names:
        wanted = f"none is named {chosen}" if chosen else "none is named images or arr_0"
        raise DataError(
            f"{name} is not a readable array of images: it holds the arrays {_listed(names)}, and {wanted}: "
            "choose one with --array"
        )
    source = array_source(_read(path, chosen), name)
    return replace(source, labels=_labels(path, chosen, names, source.count)) if labels else source


def _labels(path: Path, images: str, names: Sequence[str], count: int) -> NDArray[np.int64]:
    """The labels that go with an array of images: y_train with x_train, train_labels with train_images."""
    partners = [re.sub(there, instead, images).lower() for there, instead in _PARTNERS]
    # arr_1 goes with the array that nobody named.
    wanted = [*partners, *(_LABELS if images in _IMAGES else _LABELS[:1])]
    others = {name.lower(): name for name in names if name != images}
    found = next((others[name] for name in wanted if name in others), None)
    if found is None:
        raise DataError(
            f"{show(path)} has no labels for {show(images)}: it holds the arrays {_listed(names)}, and labels are "
            "named as the images are (y_train for x_train, train_labels for train_images), or labels or arr_1"
        )
    return checked_labels(_read(path, found), count, show(path))


def _listed(names: Sequence[str]) -> str:
    return show(", ".join(names[:10])) + (", …" if len(names) > 10 else "")


def _names(path: Path) -> list[str]:
    """The names of the arrays in an .npz, none of which claims what it has not."""
    try:
        require_honest(path, memory_limit())
        with np.load(path, allow_pickle=False) as archive:
            if not archive.files:
                raise ValueError("it holds no array")
            return list(archive.files)
    except Exception as error:  # NumPy's parsers of a hostile file raise nearly anything
        raise _unreadable(path, error) from error


def _read(path: Path, name: str = "") -> NDArray[Any]:
    """The array of an .npy, or one of an .npz."""
    array: NDArray[Any]
    try:
        if not name:
            # Mapped: a header that lies about the size costs no memory.
            array = np.lib.format.open_memmap(path, mode="r")
            return array
        with np.load(path, allow_pickle=False) as archive:
            array = archive[name]
            return array
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{show(path)} is not a readable array of images: {first_line(error)}")


def array_source(array: NDArray[Any], name: str) -> Source:
    """The images of an array; name: of where it is from. Raises DataError where it is of no images."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {array.dtype} values, and images are of whole numbers or floats")
    images = _channels_last(array, name)
    own = images.shape[-1]
    depth = array_depth(array.dtype)
    # Of 8 bits each, four channels are colours and their transparency.
    channels = 3 if own == 4 and depth == "8 bits" else own
    return Source(
        len(images),
        load=lambda i: nullcontext(np.ascontiguousarray(images[i])),
        name=lambda i: f"image {i} of {name}",
        channels=lambda: channels,
        depths=lambda: frozenset({depth}),
    )


def _channels_last(array: NDArray[Any], name: str) -> NDArray[Any]:
    """A view (N, H, W, C)."""
    shape = array.shape
    if array.ndim == 3 and shape[-1] <= max(COLOURS):
        height, width, channels = shape
        raise DataError(
            f"{name} has the shape {shape}: is it one image of {height}×{width} with {plural(channels, 'channel')}, or "
            f"{height} grey ones of {width}×{channels}? Save it as (1, {height}, {width}, {channels}) or as "
            f"({height}, {width}, {channels}, 1)"
        )
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and _is_channels_first(shape, name):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] > MOST_CHANNELS or 0 in array.shape:
        raise DataError(f"{name} has the shape {shape}: images are {_SHAPES}")
    return array


def _is_channels_first(shape: tuple[int, ...], name: str) -> bool:
    """Whether (N, ?, ?, ?) is (N, C, H, W): colours come before other numbers of channels, square images before
    others, fewer channels before more.

    Raises DataError where that does not tell.
    """
    _, first, middle, last = shape
    for could_be in (COLOURS, range(MOST_CHANNELS + 1)):
        if (first in could_be) != (last in could_be):
            return first in could_be
    if (middle == last) != (first == middle):
        return middle == last
    if first == last != middle:
        raise DataError(
            f"{name} has the shape {shape}, and either {first} could be the channels: cut off some"
        )
    return first < last
