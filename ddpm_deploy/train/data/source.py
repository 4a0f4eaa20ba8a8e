"""What is known of training images before they are read, and what they are once they were."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpm_deploy.errors import DataError, plural
from ddpm_deploy.runtime.images import COLOURS
from ddpm_deploy.runtime.protocols import Labels

DIGITS: Final = "digits"  # the word for those that scikit-learn ships
MOST_CHANNELS: Final = 16  # of an array
_MOST_CLASSES: Final = 100_000  # as of a ModelSpec

DataRange = tuple[float, float]  # the values that -1 and 1 stand for
EIGHT_BITS: Final[DataRange] = (0.0, 255.0)
# What holds the numbers of an image; "bool" is of arrays alone.
Depth = Literal["8 bits", "16 bits", "32 bits", "floats", "bool"]


@dataclass(frozen=True)
class Source:
    """Images that have been found but not read yet.

    load(i): opens the i-th, as a picture or as an array (H, W, C) of numbers. name(i): of it, for errors. channels():
    C that they have: 1 where all are grey, 3 for colours with transparency or without, else an array's own.
    depths(): what holds their numbers. labels: (count,) int64, where they were asked for. class_names: of the labels,
    where they have names.
    """

    count: int
    load: Callable[[int], AbstractContextManager[Image.Image | NDArray[Any]]]
    name: Callable[[int], str]
    channels: Callable[[], int]
    depths: Callable[[], frozenset[Depth]]
    labels: Labels | None = None
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Classes; 0 where no labels were asked for."""
        return 0 if self.labels is None else len(self.class_names) or int(self.labels.max()) + 1

    def require_channels(self, channels: int) -> None:
        """Raise DataError unless the images can be read with so many channels."""
        own, depths = self.channels(), self.depths()
        colours = COLOURS if depths == {"8 bits"} else COLOURS[:2]
        if channels != own and not (own in COLOURS[:2] and channels in colours):
            raise DataError(
                f"the images have {plural(own, 'channel')} of {' and '.join(sorted(depths))}, which cannot make "
                f"the {channels} that are needed"
            )


def array_depth(dtype: np.dtype[Any]) -> Depth:
    """What holds the numbers of an array."""
    if dtype == np.uint8:
        return "8 bits"
    if dtype.kind == "b":
        return "bool"
    if dtype.kind == "f":
        return "floats"
    return "16 bits" if dtype.itemsize <= 2 else "32 bits"


@dataclass(frozen=True)
class Dataset:
    """Images in memory, and their labels (N,) int64 where the model is to have classes.

    images: (N, C, H, W), uint8 from 0 to 255 or, of what has more than 8 bits, float32 from -1 to 1. data_range: the
    values in the data's own units that the ends of that are.
    """

    images: NDArray[Any]
    labels: Labels | None = None
    data_range: DataRange = EIGHT_BITS

    def digest(self) -> str:
        """SHA-256 of the images and labels."""
        sha = hashlib.sha256(self.images.data)
        if self.labels is not None:
            sha.update(self.labels.data)
        return sha.hexdigest()


def checked_labels(labels: NDArray[Any], count: int, name: str) -> Labels:
    """Labels (N,) or (N, 1) of an array or a list as int64 (N,). Raises DataError, naming where they are from."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"the labels in {name} are {labels.dtype} {labels.shape}: whole numbers ({count},) are needed, as "
            "argmax(1) makes of one-hot rows"
        )
    numbers = labels.astype(np.int64)
    if numbers.min() < 0 or numbers.max() >= _MOST_CLASSES:
        raise DataError(
            f"the labels in {name} go from {numbers.min()} to {numbers.max()}: numbers of classes are needed, from 0 up"
        )
    return numbers
