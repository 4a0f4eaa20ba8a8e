"""A folder of shards as images to evaluate: one shard is in memory at a time, looked through when it is opened."""

from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.bulk.manifest import NAME, Manifest
from ddpm_deploy.bulk.merge import require_all, whole_shard
from ddpm_deploy.errors import DataError
from ddpm_deploy.files import show
from ddpm_deploy.runtime.images import Pixels, to_uint8
from ddpm_deploy.train.data import Source, find_images


def find_samples(data: str, *, labels: bool = False, array: str = "") -> Source:
    """The images that `data` names: as `find_images`, or a folder of ddpm-run --shards. Raises DataError."""
    folder = Path(data)
    if (folder / NAME).is_file():
        source = shard_source(folder)
        if labels and source.labels is None:
            raise DataError(f"{show(folder)} has no labels: the model that it was drawn from has no classes")
        return source
    return find_images(data, labels=labels, array=array)


def shard_source(folder: Path) -> Source:
    """The images of a run in shards, in 8 bits, and their labels where its model has classes.

    Raises ArtefactError where its manifest is broken, DataError where a shard is missing; one that is not whole is told
    when it is read.
    """
    manifest = Manifest.load(folder)
    require_all(folder, manifest)
    shard = lru_cache(maxsize=1)(partial(_pixels, folder, manifest))

    def load(i: int) -> nullcontext[NDArray[Any]]:
        number, place = divmod(i, manifest.shard_size)
        return nullcontext(shard(number)[place])

    spec, request = manifest.spec, manifest.request
    return Source(
        request.count,
        load=load,
        name=lambda i: f"image {i} of {show(folder)}",
        channels=lambda: 3 if manifest.form == "rgb" else spec.image_shape[0],
        depths=lambda: frozenset({"8 bits"}),
        labels=request.label_numbers(spec),
        class_names=spec.class_names,
    )


def _pixels(folder: Path, manifest: Manifest, number: int) -> Pixels:
    """The images of a shard, (n, H, W, C)."""
    _, dtype, shape = manifest.array
    with whole_shard(folder, manifest, number) as shard:
        images: NDArray[Any] = np.frombuffer(b"".join(shard.pieces()), dtype).reshape(-1, *shape)
    if manifest.form in ("uint8", "rgb"):
        return images
    spec = manifest.spec
    return to_uint8(images, spec.data_range if manifest.form == "data" else spec.value_range)
