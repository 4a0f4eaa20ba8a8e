"""The 8-bit images that a model is evaluated on, read as they are needed."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import DataError, SettingError, first_line, plural
from ddpm_deploy.files import show
from ddpm_deploy.runtime.images import Pixels
from ddpm_deploy.runtime.protocols import Array, Labels
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.data import Source, find_images
from ddpm_deploy.train.data.pixels import Seen, fit
from ddpm_deploy.train.data.source import EIGHT_BITS

logger = logging.getLogger(__name__)

NO_DECODER: Final = (
    "the term L_0 counts the 256 values of 8-bit images, so that there is no bits/dim of others"
)
NO_FEATURES: Final = "the networks of features were trained on images of 8 bits, and say nothing of others"
Find = Callable[..., Source]  # as find_images
_WHOLE: Final = ("8 bits", "16 bits", "32 bits")  # what may hold whole numbers from 0 to 255


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a source, each in one shape.

    shape: (C, H, W), the model's. labels: (N,), of a conditional model. resize: whether images of another size are
    scaled and cropped. why: they must be of 8 bits, for messages.
    """

    source: Source
    shape: tuple[int, int, int]
    labels: Labels | None
    resize: bool
    why: str

    @property
    def count(self) -> int:
        """Images that there are."""
        return self.source.count

    def read(self, indices: NDArray[np.int64]) -> Pixels:
        """Some of them, (n, C, H, W) uint8. Raises DataError naming one that cannot be evaluated."""
        return np.stack([self._read(int(i)) for i in indices])

    def _read(self, i: int) -> Pixels:
        channels, height, width = self.shape
        name = self.source.name(i)
        try:
            with self.source.load(i) as image:
                values, seen = fit(image, (height, width), channels, deep=True)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders of a broken file raise nearly anything
            raise DataError(f"{name} cannot be read: {first_line(error)}") from error
        if seen.size != seen.wanted and not self.resize:
            had = "×".join(map(str, seen.size))
            raise DataError(
                f"{name} is {had}, and {height}×{width} is needed: pass --resize to scale and crop as ddpm-train does"
            )
        _require_eight_bits(name, values, seen, self.why)
        return values.astype(np.uint8)


def _require_eight_bits(name: str, values: Array | Pixels, seen: Seen, why: str) -> None:
    """Raise DataError unless an image has whole numbers from 0 to 255."""
    what = "colours of 16 bits" if seen.is_cut else seen.depth
    if seen.is_cut or seen.depth not in _WHOLE:
        raise DataError(f"{name} holds {what}, and not 8 bits: {why}")
    low, high = EIGHT_BITS
    if values.min() < low or values.max() > high or (values != np.rint(values)).any():
        raise DataError(f"{name} has values from {values.min():.7g} to {values.max():.7g}: {why}")


def open_images(
    data: str, spec: ModelSpec, *, array: str = "", resize: bool = False, find: Find = find_images
) -> Images:
    """Find the images that `data` names, as ddpm-train does, with their labels where the model has classes.

    find: finds them. Raises DataError where there are none or they have other channels; SettingError where the model is
    not of 8-bit images.
    """
    require_eight_bit_model(spec, NO_DECODER)
    source, labels = _labelled(data, spec, array, find)
    return images_as(spec.image_shape, source, resize=resize, labels=labels, why=NO_DECODER)


def require_eight_bit_model(spec: ModelSpec, why: str) -> None:
    """Raise SettingError unless a model is of 8-bit images; why: it must be."""
    if spec.data_range != EIGHT_BITS:
        low, high = spec.data_range
        raise SettingError(f"this model is of images from {low:.7g} to {high:.7g}: {why}")


def images_as(
    shape: tuple[int, int, int], source: Source, *, resize: bool, why: str, labels: Labels | None = None
) -> Images:
    """The images of a source, in the shape of a model's. Raises DataError where they have other channels."""
    channels, own = shape[0], source.channels()
    source.require_channels(channels)
    if own != channels:
        logger.warning(
            "the images have %s, and are made to have %d, as is needed: the figures are of those",
            plural(own, "channel"),
            channels,
        )
    return Images(source, shape, labels, resize, why)


def shape_of(source: Source) -> tuple[int, int, int]:
    """(C, H, W) of the first image of a source. Raises DataError where it cannot be read."""
    channels, name = source.channels(), source.name(0)
    try:
        with source.load(0) as image:
            (height, width) = fit(image, (1, 1), channels, deep=True)[1].size
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise DataError(f"{name} cannot be read: {first_line(error)}") from error
    return channels, height, width


def _labelled(data: str, spec: ModelSpec, array: str, find: Find) -> tuple[Source, Labels | None]:
    """The images, and their classes by the model's numbers."""
    if not spec.num_classes:
        return find(data, array=array), None
    try:
        source = find(data, labels=True, array=array)
    except DataError as error:
        source = find(data, array=array)  # unless it is something else that is wrong
        if not spec.null_class:
            raise
        logger.warning("%s: its images are taken as of no class", first_line(error))
        return source, np.full(source.count, spec.num_classes)
    assert source.labels is not None
    if source.class_names and spec.class_names:
        unknown = [name for name in source.class_names if name not in spec.class_names]
        if unknown:
            raise DataError(f"{show(data)} has the class {show(unknown[0])}, which the model does not know")
        return source, np.array([spec.class_names.index(name) for name in source.class_names])[source.labels]
    if source.labels.max() >= spec.num_classes:
        raise DataError(
            f"{show(data)} has labels up to {source.labels.max()}, and the model knows "
            f"{plural(spec.num_classes, 'class')}"
        )
    return source, source.labels
