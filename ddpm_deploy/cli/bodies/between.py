"""ddpm-run --between: a strip from one image to another."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from ddpm_deploy.cli.bodies.chain import ChainOptions, Watch, checked_outputs, forecast, write_images
from ddpm_deploy.cli.bodies.models import open_sampler
from ddpm_deploy.cli.bodies.outputs import require_apart
from ddpm_deploy.cli.bodies.progress import duration, stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import DataError, OutputError, SettingError, first_line, plural
from ddpm_deploy.files import require_file, show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.images import COLOURS, Destination, Origin, Pixels, Writer, grid, save_png
from ddpm_deploy.runtime.interpolate import (
    Latents,
    encoded,
    end_errors,
    inversion_request,
    strip_request,
    strip_weights,
)
from ddpm_deploy.runtime.protocols import Array
from ddpm_deploy.runtime.request import Request
from ddpm_deploy.runtime.sampler import EachStep, Sampler
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.train.data.pictures import open_picture
from ddpm_deploy.train.data.pixels import DeeperError, Seen, fit
from ddpm_deploy.train.data.source import EIGHT_BITS
from ddpm_deploy.words import Encoder


def run_between(
    model: ModelFile,
    asked: Request,
    files: tuple[Path, Path],
    encoder: Encoder,
    batch: int | None,
    options: ChainOptions,
) -> None:
    """Make the strip, and tell how near its ends are to the originals."""
    request = strip_request(asked, model.spec, encoder)
    outputs = checked_outputs(model, request, options, None)
    for path in filter(None, (options["output"], options["progress"])):
        require_apart(path, files)
    ends = np.stack([read_end(path, model.spec) for path in files])
    there = outputs.destination
    strip = Strip(
        there.path,
        request,
        there.spec,
        there.form,
        there.force,
        ends=ends,
        made_from=_made_from(files, ends, encoder),
    )
    strip.check()
    with open_sampler(model, request, batch, options) as sampler:
        latents = _encoded(sampler, ends, request, encoder)
        watch = Watch(sampler, model, request, replace(outputs, destination=strip))
        start, decoded = latents.blended(strip_weights(request)), _Ends()
        images = decoded.noted(sampler.draw(request, watch, start=start))
        write_images(
            images, watch, lambda: strip.made_from | {"end_errors": decoded.errors(ends, model.spec)}
        )
        if not options["as_json"]:
            first, last = decoded.errors(ends, model.spec)
            click.echo(f"the ends differ from the originals by {first:.2f} and {last:.2f} of 255 (RMS)")


def _encoded(sampler: Sampler, ends: Array, request: Request, encoder: Encoder) -> Latents:
    """Both images at the depth, with a message first where that takes a chain."""
    if encoder == "noise":
        return encoded(sampler, ends, request, encoder)
    inversion = inversion_request(request, sampler.spec)
    steps = len(inversion.table_for(sampler.spec))
    seconds = forecast(sampler, inversion, steps)
    logger.info(f"2 images · {plural(steps, 'step')} of inversion · about {duration(seconds)}")
    parts = -(-2 // sampler.max_batch(guided=bool(request.guidance)))
    with stage("encoding", steps * parts) as advance:
        return encoded(sampler, ends, request, encoder, EachStep(lambda: advance(1)))


class _Ends:
    """The first and the last of images that pass."""

    def __init__(self) -> None:
        self._seen: list[Array] = []

    def noted(self, images: Iterable[Array]) -> Iterator[Array]:
        """Let them pass."""
        for part in images:
            self._seen = [self._seen[0] if self._seen else part[0].copy(), part[-1].copy()]
            yield part

    def errors(self, ends: Array, spec: ModelSpec) -> tuple[float, float]:
        """How far they are from the originals."""
        return end_errors(np.stack(self._seen), ends, spec)


@dataclass(frozen=True, kw_only=True)
class Strip(Destination):
    """A picture of a strip: one row, between the two originals; an .npz holds the strip alone.

    ends: the originals, (2, C, H, W). made_from: which these are, and how they were encoded.
    """

    ends: Array
    made_from: dict[str, Any]

    def check(self) -> None:
        """Raise OutputError where it could not be written."""
        super().check()
        if self._suffix == "":
            raise OutputError(f"{show(self.path)}: a strip goes to a .png or an .npz")

    @contextmanager
    def open(self) -> Iterator[Writer]:
        """Give the function that takes the samples in order."""
        if self._suffix == ".npz":
            with super().open() as write:
                yield write
            return
        tiles: list[Pixels] = []
        yield lambda samples: tiles.append(self._pixels(samples))
        first, last = self._pixels(self.ends)
        row = np.concatenate([first[None], *tiles, last[None]])
        origin = Origin(self.spec.provenance.digest, self.request, True, self.made_from)
        save_png(grid(row, columns=len(row)), self.path, origin.to_text())


def _made_from(files: Sequence[Path], ends: Array, encoder: Encoder) -> dict[str, Any]:
    """What a strip is of: the names of its images, and a digest of each as the model takes it."""
    digests = [hashlib.sha256(end.tobytes()).hexdigest() for end in ends]
    return {
        "between": [
            {"name": path.name, "sha256": digest} for path, digest in zip(files, digests, strict=True)
        ],
        "encoder": encoder,
    }


def read_end(path: Path, spec: ModelSpec) -> Array:
    """An image file as the model takes images, (C, H, W) in its value range: scaled and cropped as ddpm-train does.

    Raises DataError where it cannot be read, or has other values than the model's images; SettingError where those are
    no pictures.
    """
    channels, height, width = spec.image_shape
    is_deep = spec.data_range != EIGHT_BITS
    if channels not in COLOURS[: 2 if is_deep else 3]:
        raise SettingError(f"the images of this model have {channels} channels, which no image file has")
    require_file(path, DataError)
    try:
        with open_picture(path) as image:
            values, seen = fit(image, (height, width), channels, deep=is_deep)
    except MemoryError:
        raise
    except DeeperError as error:
        raise DataError(f"{show(path)} holds {error.depth}, and the model is of 8-bit images") from error
    except Exception as error:  # Pillow's decoders of a broken file raise nearly anything
        raise DataError(f"{show(path)} cannot be read: {first_line(error)}") from error
    low, high = spec.data_range
    if seen.lowest < low or seen.highest > high:
        raise DataError(
            f"{show(path)} has values from {seen.lowest:.7g} to {seen.highest:.7g}, and the images of this model are "
            f"from {low:.7g} to {high:.7g}"
        )
    _tell_fitted(path, seen)
    value_low, value_high = spec.value_range
    shares = (values.astype(np.float64) - low) / (high - low)
    scaled: Array = (value_low + np.clip(shares, 0, 1) * (value_high - value_low)).astype(np.float32)
    return scaled


def _tell_fitted(path: Path, seen: Seen) -> None:
    if seen.size != seen.wanted:
        had, wanted = ("×".join(map(str, size)) for size in (seen.size, seen.wanted))
        how = "scaled and cropped" if seen.is_cropped else "scaled"
        logger.info("%s is %s and was %s to %s", show(path), had, how, wanted)
