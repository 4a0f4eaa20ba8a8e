"""Which reading of a checkpoint fits real images: the loss of each, on the same images and noise.

Neither the weights nor a picture of pure noise tells a wrong guess: the prediction at large t is nearly the noise
itself whatever the network sees of t. The loss on images that it was trained on does, in part: heads, the ε of the
norms and the order of q, k and v may not be told apart by it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import ArtefactError, DataError, SettingError, first_line
from ddpm_deploy.importers.imported import Imported
from ddpm_deploy.noise import addressed_noise
from ddpm_deploy.runtime.network import ask
from ddpm_deploy.runtime.protocols import Labels
from ddpm_deploy.schedule import Floats, Schedule
from ddpm_deploy.solvers import denoised_coefficients
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.stages import Progress, Stages, silent
from ddpm_deploy.train.data import Source, find_images, read_images
from ddpm_deploy.train.network import TorchNetwork

logger = logging.getLogger(__name__)

_LEVELS: Final = 16  # of noise
_WORK: Final = 6e12  # parameters × pixels × images × levels of one reading: some ten seconds on two cores
_FEWEST, _MOST = 8, 64  # images
_SIGNIFICANT: Final = 4.0  # standard errors of a mean paired difference
_POOR: Final = 0.5  # a loss that no network has on images that it was trained on; one that gives 0 has 1


@dataclass(frozen=True)
class Fit:
    """How one reading fits the images.

    flag, value: what it takes in place of what was assumed; "" for the assumed reading itself. loss: L_simple, in ε,
    over the images and levels of noise; None where it makes no network. why: it makes none. better, worse: whether it
    fits better or worse than the assumed reading by more than chance.
    """

    flag: str
    value: Any
    loss: float | None
    why: str = ""
    better: bool = False
    worse: bool = False


def compare(
    imported: Imported, read: Callable[[Mapping[str, Any]], Imported], data: str, *, stages: Stages = silent
) -> list[Fit]:
    """L_simple of what was assumed and of every other reading of one flag, on images of `data`; the assumed one first.

    imported: as it was assumed. read: the checkpoint with some flags told otherwise. data: as `find_images` takes it.

    Raises DataError where the images cannot be read or do not fit the model.
    """
    readings = [(one.flag, value) for one in imported.assumed for value in one.others]
    spec = imported.spec
    work = sum(p.numel() for p in imported.network.parameters()) * spec.image_shape[1] * spec.image_shape[2]
    count = int(np.clip(_WORK / (max(work, 1) * _LEVELS), _FEWEST, _MOST))
    images, labels = _some_images(spec, data, count)
    fits = []
    with stages("comparing readings on images", (1 + len(readings)) * _LEVELS) as progress:
        own = _losses(imported, spec, images, labels, progress)
        fits.append(Fit("", None, float(own.mean())))
        for flag, value in readings:
            try:
                other = read({flag: value})
            except (ArtefactError, SettingError) as error:
                fits.append(Fit(flag, value, None, first_line(error)))
                progress(_LEVELS)
                continue
            if _predict_alike(spec, other.spec):
                progress(_LEVELS)
                fits.append(_judged(flag, value, own, own))
            else:
                fits.append(_judged(flag, value, own, _losses(other, spec, images, labels, progress)))
    if own.mean() > _POOR and not any(fit.better for fit in fits):
        logger.warning(
            "its loss on %s is %.2f, and a network that has learned nothing of them has 1: they are not what it was "
            "trained on, or something that was told or assumed of it is wrong",
            data,
            own.mean(),
        )
    return fits


def _predict_alike(one: ModelSpec, other: ModelSpec) -> bool:
    """Whether two readings of the same weights differ in nothing but how they are sampled, which no loss tells.

    Of a network that is not ours the spec does not say everything.
    """
    as_one = msgspec.structs.replace(other, clip=one.clip, variance=one.variance, sampling=one.sampling)
    return one.network is not None and as_one == one


def _judged(flag: str, value: Any, own: Floats, losses: Floats) -> Fit:
    """A reading by its paired differences to the assumed one, image by image."""
    difference = (losses - own).mean(axis=0)  # over the levels: (images,)
    error = max(float(difference.std(ddof=1)) / len(difference) ** 0.5, 1e-12)
    by = float(difference.mean()) / error
    return Fit(flag, value, float(losses.mean()), better=by < -_SIGNIFICANT, worse=by > _SIGNIFICANT)


def _some_images(spec: ModelSpec, data: str, count: int) -> tuple[NDArray[np.float32], Labels]:
    """Images (N, C, H, W) in the model's value range, evenly taken from all, and a label for each."""
    source = _labelled(data, spec)
    chosen = np.unique(np.linspace(0, source.count - 1, count).astype(np.int64))
    few = replace(
        source,
        count=len(chosen),
        load=lambda i: source.load(chosen[i]),
        name=lambda i: source.name(chosen[i]),
        labels=None,
        class_names=(),
    )
    if len(chosen) < 2:
        raise DataError(f"{data} has one image: some {_FEWEST} are needed to compare by")
    channels, *size = spec.image_shape
    pixels = read_images(few, (size[0], size[1]), channels).images
    # uint8 from 0 to 255, or float32 from -1 to 1.
    share = pixels / np.float32(255) if pixels.dtype == np.uint8 else (pixels + 1) / 2
    low, high = spec.value_range
    null = spec.num_classes if spec.null_class else 0
    labels = np.full(len(chosen), null) if source.labels is None else source.labels[chosen]
    return (low + (high - low) * share).astype(np.float32), labels


def _labelled(data: str, spec: ModelSpec) -> Source:
    """The images, with their classes where these are the model's."""
    if spec.num_classes:
        try:
            source = find_images(data, labels=True)
            if source.num_classes == spec.num_classes:
                return source
            if source.num_classes == spec.num_classes - 1 and not spec.null_class:
                logger.warning(
                    "%s has one class less than the model: its last one is taken to mean no class", data
                )
                return source
        except DataError:
            pass
        told = "as of no class" if spec.null_class else "as of its first class, which raises all losses alike"
        logger.warning(
            "%s has not the model's %d classes: its images are taken %s", data, spec.num_classes, told
        )
    return find_images(data)


def _losses(
    imported: Imported,
    assumed: ModelSpec,
    images: NDArray[np.float32],
    labels: Labels,
    progress: Progress,
) -> Floats:
    """The mean squared error of ε, (levels, images), at the same levels of noise for every reading."""
    spec = imported.spec
    network = TorchNetwork(imported.network, spec, max_batch=len(images))
    embedding, schedule, rows = spec.embedding.table(spec.timesteps), spec.make_schedule(), []
    indices = np.arange(len(images), dtype=np.uint64)
    for level, t in enumerate(_timesteps(schedule, assumed.make_schedule())):
        noise = addressed_noise(0, indices, level, spec.image_shape)  # the same for all readings
        signal = np.float32(schedule.alphas_cumprod[t] ** 0.5)
        deviation = np.float32((1 - schedule.alphas_cumprod[t]) ** 0.5)
        x = signal * images + deviation * noise
        temb = np.broadcast_to(embedding[t], (len(images), spec.embedding.dim))
        out = ask(network, x, temb, labels)[:, : spec.image_shape[0]]
        a, b = (np.float32(one[0]) for one in denoised_coefficients(spec.prediction, schedule, np.array([t])))
        error = (x - signal * (a * x + b * out)) / deviation - noise
        rows.append(np.square(error, dtype=np.float64).mean(axis=(1, 2, 3)))
        progress(1)
    network.close()
    return np.array(rows)


def _timesteps(schedule: Schedule, assumed: Schedule) -> list[int]:
    """The timesteps with the levels of noise that even timesteps of the assumed schedule have."""
    even = np.linspace(0, assumed.timesteps - 1, _LEVELS + 2).astype(np.int64)[1:-1]
    return [int(np.abs(schedule.log_snr - level).argmin()) for level in assumed.log_snr[even]]
