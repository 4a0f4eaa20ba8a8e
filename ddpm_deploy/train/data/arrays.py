"""Images in the arrays of .npy and .npz files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import require_honest
from ddpm_deploy.errors import DataError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.machine import memory_limit
from ddpm_deploy.runtime.images import COLOURS
from ddpm_deploy.train.data.source import MOST_CHANNELS, Depth, Source, checked_labels

ARRAY_SUFFIXES: Final = (".npy", ".npz")
# Names that people give to the images and their labels in an .npz, in the order of asking.
_PAIRS: Final = {"images": "labels", "arr_0": "arr_1", "samples": "arr_1"}
_LABELS: Final = ("labels", "arr_1")
_SHAPES: Final = f"(N, H, W), (N, H, W, C) or (N, C, H, W) with C from 1 to {MOST_CHANNELS}"


def array_file(path: Path, labels: bool, array: str) -> Source:
    """The images of an .npy, or those of an .npz; array: the name of theirs, where it has several. Raises DataError."""
    name = show(path)
    if path.suffix.lower() == ".npy":
        if labels:
            raise DataError(f"{name} has no labels: an .npz with arrays `images` and `labels` can have them")
        return array_source(_read(path), name)
    names = _names(path)
    chosen = array or next((known for known in _PAIRS if known in names), "")
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
    partners = (images.replace("images", "labels"), _swapped(images, "x", "y"), _swapped(images, "X", "y"))
    wanted = dict.fromkeys([_PAIRS.get(images, ""), *partners, *_LABELS])
    found = next((name for name in wanted if name in names and name != images), None)
    if found is None:
        raise DataError(
            f"{show(path)} has no labels for {show(images)}: it holds the arrays {_listed(names)}, and none is named "
            "labels or arr_1"
        )
    return checked_labels(_read(path, found), count, show(path))


def _swapped(name: str, x: str, y: str) -> str:
    """x_train → y_train, train_x → train_y."""
    return "_".join(y if part == x else part for part in name.split("_"))


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
    depth = _depth(array.dtype)
    # Of 8 bits each, four channels are colours and their transparency.
    channels = 3 if own == 4 and depth == "8 bits" else own
    return Source(
        len(images),
        load=lambda i: np.ascontiguousarray(images[i]),
        name=lambda i: f"image {i} of {name}",
        channels=lambda: channels,
        depths=lambda: frozenset({depth}),
    )


def _depth(dtype: np.dtype[Any]) -> Depth:
    if dtype == np.uint8:
        return "8 bits"
    if dtype.kind == "b":
        return "bool"
    if dtype.kind == "f":
        return "floats"
    return "16 bits" if dtype.itemsize <= 2 else "32 bits"


def _channels_last(array: NDArray[Any], name: str) -> NDArray[Any]:
    """A view (N, H, W, C)."""
    shape = array.shape
    if array.ndim == 3 and shape[-1] in COLOURS:
        height, width, channels = shape
        raise DataError(
            f"{name} has the shape {shape}: is it one image of {height}×{width} with {channels} channels, or {height} "
            f"grey ones of {width}×{channels}? Save it as (1, {height}, {width}, {channels}) or as "
            f"({height}, {width}, {channels}, 1)"
        )
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and _is_channels_first(shape):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] > MOST_CHANNELS or 0 in array.shape:
        raise DataError(f"{name} has the shape {shape}: images are {_SHAPES}")
    return array


def _is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether (N, ?, ?, ?) is (N, C, H, W). Where both could be, colours come before others, then square images."""
    _, first, middle, last = shape
    if (first in COLOURS) != (last in COLOURS):
        return first in COLOURS
    if (first <= MOST_CHANNELS) != (last <= MOST_CHANNELS):
        return first <= MOST_CHANNELS
    return middle == last and first != middle
