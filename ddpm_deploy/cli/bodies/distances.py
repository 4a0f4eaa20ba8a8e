"""ddpm-deploy evaluate --fid: how far samples are from images, in the features of a network, as text and as JSON."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import click
import msgspec
import numpy as np
import torch

from ddpm_deploy.bulk.source import find_samples
from ddpm_deploy.cli.bodies.chain import forecast
from ddpm_deploy.cli.bodies.models import Place, open_sampler, require_runnable
from ddpm_deploy.cli.bodies.progress import duration, peak_memory, stage
from ddpm_deploy.cli.bodies.report import finite
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import ArtefactError, DataError, plural
from ddpm_deploy.evaluate.data import NO_FEATURES, Images, images_as, require_eight_bit_model, shape_of
from ddpm_deploy.evaluate.features import BATCH, INCEPTION, KEPT, Extractor, Gathered, gather, load_extractor
from ddpm_deploy.evaluate.frechet import (
    Normal,
    bias_by_halves,
    frechet_distance,
    load_normal,
    standard_error,
)
from ddpm_deploy.evaluate.kernel import SUBSET_SIZE, SUBSETS, KernelDistance, kernel_distance
from ddpm_deploy.files import show
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.images import Pixels, to_uint8
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import EachStep, Sampler
from ddpm_deploy.stages import Progress
from ddpm_deploy.train.data.arrays import ARRAY_SUFFIXES
from ddpm_deploy.train.network import torch_device
from ddpm_deploy.version import __version__

_SAMPLES: Final = 5000  # where nothing is said: at most
_PART: Final = 64  # images that are read together
_ARCHIVE: Final = ".zip"


@dataclass(frozen=True)
class Asked:
    """What is to be compared.

    samples_from: a model, or images. data: "" where there is a file of statistics. features: as `load_extractor` takes
    it (None: Inception's). samples, count: how many of the samples and of the data (None: not typed). request: what a
    model is to draw, but for its count.
    """

    samples_from: Path
    data: str
    statistics: Path | None
    features: str | None
    samples: int | None
    count: int | None
    request: Request
    batch: int | None
    array: str
    resize: bool
    place: Place


class _Samples(Protocol):
    """One side of the comparison. name: for people. shape: (C, H, W). count: images that will be compared."""

    name: str
    shape: tuple[int, int, int]
    count: int

    def seconds(self) -> float:
        """About how long it takes to have them."""

    @property
    def steps(self) -> int:
        """Steps of progress that having them takes."""

    def parts(self, advance: Progress) -> Iterator[Pixels]:
        """All of them, (n, C, H, W) uint8 in parts."""

    def to_json(self) -> dict[str, Any]:
        """Where they are from."""

    def close(self) -> None:
        """Free what makes them."""


class _Pictures:
    """Images that are there, evenly taken from all."""

    steps: Final = 0

    def __init__(self, name: str, images: Images, count: int | None) -> None:
        self.name, self.shape, self._images = show(name), images.shape, images
        self._source, self.count = name, min(count or images.count, images.count)
        self._indices = np.linspace(0, images.count - 1, self.count).astype(np.int64)
        if self.count < 2:
            raise DataError(f"{self.name} gives one image, and two or more have a distance: give more")
        images.read(self._indices[:1])  # one that does not fit is told before anything long

    def seconds(self) -> float:
        """Reading is not counted."""
        return 0.0

    def parts(self, advance: Progress) -> Iterator[Pixels]:
        """Read them."""
        for start in range(0, self.count, _PART):
            yield self._images.read(self._indices[start : start + _PART])

    def to_json(self) -> dict[str, Any]:
        """The name, and how many of how many."""
        return {"source": self._source, "count": self.count, "of": self._images.count}

    def close(self) -> None:
        """Nothing is open."""


class _Drawn:
    """Images that a model draws."""

    def __init__(self, model: ModelFile, asked: Asked, count: int) -> None:
        require_runnable(model, asked.place)
        require_eight_bit_model(model.spec, NO_FEATURES)
        self._model = model
        self.request = msgspec.structs.replace(asked.request, count=count).checked(model.spec)
        self._sampler: Sampler | None = None
        self._open: Callable[[], Sampler] = lambda: open_sampler(
            model, self.request, asked.batch, asked.place
        )
        self._chain = len(self.request.table_for(model.spec))
        self.shape, self.count = model.spec.image_shape, count
        self.name = (
            f"{model.name}, {plural(self._chain, 'step')} of {self.request.solver}, seed {self.request.seed}"
        )

    @property
    def sampler(self) -> Sampler:
        """The model, loaded when it is first needed."""
        self._sampler = self._sampler or self._open()
        return self._sampler

    def seconds(self) -> float:
        """By one call of the network."""
        return forecast(self.sampler, self.request, self._chain)

    @property
    def steps(self) -> int:
        """Those of the chain, for each batch."""
        return self._chain * -(-self.count // self.sampler.max_batch(bool(self.request.guidance)))

    def parts(self, advance: Progress) -> Iterator[Pixels]:
        """Draw them."""
        for samples in self.sampler.draw(self.request, EachStep(lambda: advance(1))):
            pixels = to_uint8(samples, self.sampler.spec.value_range).transpose(0, 3, 1, 2)
            yield np.ascontiguousarray(pixels)

    def to_json(self) -> dict[str, Any]:
        """The model, and the request."""
        digest = self.sampler.spec.provenance.digest
        return {"source": os.fspath(self._model.path), "model": digest, **self.request.to_builtins()}

    def close(self) -> None:
        """Free the model."""
        if self._sampler:
            self._sampler.close()


@dataclass(frozen=True)
class _Found:
    """What was measured. reference: the other side: images, or None where it is a file of statistics."""

    samples: _Samples
    reference: _Pictures | None
    statistics: Path | None
    extractor: Extractor
    distance: float
    error: float
    bias: float
    kernel: KernelDistance | None
    ranks: tuple[int, int]
    seconds: float

    @property
    def few(self) -> bool:
        """Whether a covariance has not the rank of the features."""
        return min(self.ranks) < self.extractor.width


def measure_distances(asked: Asked, *, as_json: bool) -> None:
    """Compare samples with images, or with statistics of images, and tell how far they are apart."""
    if bool(asked.data) == bool(asked.statistics):
        raise click.UsageError("say what to compare with: DATA, or --statistics")
    torch.set_num_threads(asked.place["threads"] or cpu_threads())
    statistics = load_normal(asked.statistics) if asked.statistics else None
    samples, reference = _sides(asked)
    with closing(samples):
        extractor = load_extractor(asked.features or INCEPTION, _device(asked.place, samples))
        if statistics and statistics.width != extractor.width:
            raise ArtefactError(
                f"{show(asked.statistics or '')} has {statistics.width} features, and {extractor.name} makes "
                f"{extractor.width}: they are of another network"
            )
        found = _measured(asked, samples, reference, statistics, extractor)
        _tell_of_few(found)
        click.echo(json.dumps(_as_json(found), indent=1) if as_json else _as_text(found))


def _sides(asked: Asked) -> tuple[_Samples, _Pictures | None]:
    """The samples, and the images that they are compared with, if there are any; all in one shape."""
    path = asked.samples_from
    if path.is_dir() or path.suffix.lower() in (*ARRAY_SUFFIXES, _ARCHIVE):
        if asked.request != Request(seed=asked.request.seed):
            raise click.UsageError(
                f"{show(path)} is no model, and --steps, --solver and the like are of one: omit them"
            )
        _require_no_model(path, asked)
        source = find_samples(os.fspath(path))
        shape = shape_of(source)
        drawn = images_as(shape, source, resize=asked.resize, why=NO_FEATURES)
        samples: _Samples = _Pictures(os.fspath(path), drawn, asked.samples)
        reference = _reference(asked, shape)
    else:
        model = open_model(path)
        shape = model.spec.image_shape
        reference = _reference(asked, shape)
        there = reference.count if reference else _SAMPLES
        samples = _Drawn(model, asked, asked.samples or min(there, _SAMPLES))
    if shape[0] not in (1, 3):
        raise DataError(f"the samples have {plural(shape[0], 'channel')}: features are of grey or RGB images")
    return samples, reference


def _require_no_model(path: Path, asked: Asked) -> None:
    """Refuse options that say how a model runs."""
    place = asked.place
    typed = {
        "batch": asked.batch,
        "backend": place["backend"],
        "precision": place["precision"],
        "weights": place["weights"],
    }
    for name, value in typed.items():
        if value is not None:
            raise click.UsageError(f"{show(path)} is no model, and --{name} is of one: omit it")


def _reference(asked: Asked, shape: tuple[int, int, int]) -> _Pictures | None:
    if not asked.data:
        return None
    source = find_samples(asked.data, array=asked.array)
    images = images_as(shape, source, resize=asked.resize, why=NO_FEATURES)
    return _Pictures(asked.data, images, asked.count)


def _device(place: Place, samples: _Samples) -> torch.device:
    """Where features are computed: as it was typed; beside a model on its GPU, if PyTorch has that too."""
    name = place["device"] or "cpu"
    if isinstance(samples, _Pictures):
        return torch_device(name)
    return torch.device(name if name.startswith("cuda") and torch.cuda.is_available() else "cpu")


def _measured(
    asked: Asked,
    samples: _Samples,
    reference: _Pictures | None,
    statistics: Normal | None,
    extractor: Extractor,
) -> _Found:
    """Measure, after a message that says how long it will take."""
    images = samples.count + (reference.count if reference else 0)
    seconds = samples.seconds() + _seconds_an_image(extractor, samples.shape) * images
    compared = f"{plural(reference.count, 'image')}" if reference else "statistics"
    logger.info(
        f"{plural(samples.count, 'sample')} · {compared} · features by {extractor.name} · about "
        f"{duration(seconds)}{peak_memory()}"
    )
    if samples.shape[0] == 1:
        logger.info("the images are grey: the network gets them in three equal channels")
    start = time.perf_counter()
    there = _features(extractor, reference, "features of the data") if reference else None
    here = _features(extractor, samples, "features of the samples")
    with stage("comparing", SUBSETS + 4) as advance:
        target, own = there.moments.normal if there else statistics, here.moments.normal
        assert target is not None
        distance = max(frechet_distance(target, own), 0.0)  # below 0 by rounding alone
        advance(1)
        error = standard_error(target, own, here.kept)
        advance(1)
        bias = bias_by_halves(target, own, here.kept)
        advance(1)
        kernel = kernel_distance(there.kept, here.kept, progress=advance) if there else None
    ranks = own.most_rank, target.most_rank
    took = time.perf_counter() - start
    return _Found(samples, reference, asked.statistics, extractor, distance, error, bias, kernel, ranks, took)


def _seconds_an_image(extractor: Extractor, shape: tuple[int, int, int]) -> float:
    """That the features take: the second of two calls, as the first warms it up."""
    images = np.zeros((BATCH, *shape), np.uint8)
    extractor(images[:1])
    start = time.perf_counter()
    extractor(images)
    return (time.perf_counter() - start) / BATCH


def _features(extractor: Extractor, samples: _Samples, label: str) -> Gathered:
    with stage(label, samples.steps + samples.count) as advance:
        return gather(extractor, extractor.width, samples.parts(advance), advance)


def _tell_of_few(found: _Found) -> None:
    """Say what the distance of few images is worth."""
    width = found.extractor.width
    if found.few:
        own, other = found.ranks
        logger.warning(
            "there are fewer images than the %d features, and the ranks of their covariances are %d (samples) and %d "
            "(data) at most: the Fréchet distance is too large by what they lack, and to be compared with others of as "
            "many images alone%s",
            width,
            own,
            other,
            "; the kernel distance has no such bias" if found.kernel else "",
        )


def _as_text(found: _Found) -> str:
    """Write both figures, and what they are of."""
    extractor, kernel, reference = found.extractor, found.kernel, found.reference
    data = f"{reference.name}: {plural(reference.count, 'image')}" if reference else _unsaid(found.statistics)
    of = "" if extractor.is_fid else "   not FID, as this is not Inception with the weights that define it"
    rows = [
        ("samples", f"{found.samples.name}: {plural(found.samples.count, 'image')}"),
        ("data", data),
        ("features", f"{extractor.name}, {extractor.width} numbers; weights {extractor.digest}"),
        ("resizing", f"{_shape(found.samples.shape)} → {extractor.architecture.resizing}"),
        (
            "FID" if extractor.is_fid else "Fréchet distance",
            f"{found.distance:.4g} ± {found.error:.2g}{_bias(found)}{of}",
        ),
    ]
    if kernel:
        name = "KID" if extractor.is_fid else "kernel distance"
        rows.append((name, f"{kernel.value:.4g} ± {kernel.error:.2g}{_subsets(kernel)}"))
    lines = [f"{name:<18}{said}" for name, said in rows]
    return "\n".join([*lines, f"±: the standard error, by the samples. In {duration(found.seconds)}"])


def _subsets(kernel: KernelDistance) -> str:
    """Write KID as papers do, where there are images enough."""
    if math.isnan(kernel.subsets_mean):
        return ""
    mean, deviation = kernel.subsets_mean, kernel.subsets_sd
    return f"; of {SUBSETS} subsets of {SUBSET_SIZE}, mean {mean:.4g} and standard deviation {deviation:.2g}"


def _bias(found: _Found) -> str:
    if math.isnan(found.bias) or found.bias > found.distance:  # as of samples that are the data themselves
        return ""
    return f", of which about {found.bias:.2g} by the number of samples"


def _unsaid(statistics: Path | None) -> str:
    return f"{show(statistics or '')}: statistics of images whose number it does not say"


def _shape(shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    return f"{height}×{width}, {'grey, in three equal channels' if channels == 1 else 'RGB'}"


def _as_json(found: _Found) -> dict[str, Any]:
    """Return every figure."""
    extractor, kernel = found.extractor, found.kernel
    own, other = found.ranks
    source = {"source": os.fspath(found.statistics or ""), "count": None}
    distance, error, bias = finite([found.distance, found.error, found.bias])
    return {
        "ddpm_deploy": __version__,
        "samples": found.samples.to_json(),
        "data": found.reference.to_json() if found.reference else source,
        "image_shape": found.samples.shape,
        "features": {
            "network": extractor.name,
            "numbers": extractor.width,
            "weights": extractor.digest,
            "resizing": extractor.architecture.resizing,
            "grey_in_three_channels": found.samples.shape[0] == 1,
        },
        "frechet_distance": {
            "value": distance,
            "standard_error": error,
            "bias_by_number_of_samples": bias,
            "is_fid": extractor.is_fid,
            "largest_ranks": {"samples": own, "data": other},
        },
        "kernel_distance": kernel and _kernel_json(kernel, found),
        "seconds": found.seconds,
    }


def _kernel_json(kernel: KernelDistance, found: _Found) -> dict[str, Any]:
    mean, deviation = kernel.subsets_mean, kernel.subsets_sd
    subsets = {"number": SUBSETS, "size": SUBSET_SIZE, "mean": mean, "standard_deviation": deviation}
    return {
        "value": kernel.value,
        "standard_error": kernel.error,
        "is_kid": found.extractor.is_fid,
        "features_kept": min(KEPT, found.samples.count),
        "subsets": None if math.isnan(mean) else subsets,
    }
