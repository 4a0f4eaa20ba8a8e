"""ddpm-deploy replay: make a picture again, and compare."""

from pathlib import Path
from typing import Unpack

import click
import numpy as np

from ddpm_deploy.cli.bodies.models import Place, open_sampler
from ddpm_deploy.errors import DataError, plural
from ddpm_deploy.files import show
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.images import grid, read_origin, read_pixels, to_uint8


def replay(model: Path, picture: Path, *, batch: int | None, **place: Unpack[Place]) -> None:
    """Make a picture again and compare; exit with 1 where a pixel differs by more than one level."""
    opened = open_model(model)
    origin = read_origin(picture)
    if origin.between is not None:
        raise DataError(
            f"{show(picture)} is a strip between two images, which it does not hold unrounded: make it again with "
            "ddpm-run --between"
        )
    pixels = read_pixels(picture)
    with open_sampler(opened, origin.request, batch, place) as sampler:
        spec = sampler.spec  # of the weights that were chosen
        if origin.model != spec.provenance.digest:
            raise DataError(
                f"{show(picture)} was made by the model {show(origin.model[:12])}…, and {opened.name} is the model "
                f"{spec.provenance.digest[:12]}…"
            )
        request = origin.request.checked(spec)
        channels, height, width = spec.image_shape
        blank = np.zeros((request.count, height, width, channels), np.uint8)
        wanted = grid(blank) if origin.is_grid else blank[0]
        if wanted.shape != pixels.shape:  # told before minutes of work
            raise DataError(f"{show(picture)} was edited: its shape is {pixels.shape}, not {wanted.shape}")
        again = to_uint8(np.concatenate(list(sampler.draw(request))), spec.value_range)
    made = grid(again) if origin.is_grid else again[0]
    difference = abs(made.astype(int) - pixels)
    differing = int((difference > 0).any(axis=2).sum())
    verdict = "the same again"
    if differing:
        verdict = f"not the same in {plural(differing, 'pixel')}, by up to {difference.max()} of 255"
    count, chain = plural(request.count, "image"), plural(len(request.table_for(spec)), "step")
    click.echo(f"{show(picture)}: {count}, {chain}, seed {request.seed}: {verdict}")
    if difference.max() > 1:
        raise click.exceptions.Exit(1)
