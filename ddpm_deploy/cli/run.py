"""ddpm-run: a model → images, by the full reverse chain."""

import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from ddpm_deploy.cli.common import (
    FilePath,
    command,
    logger,
    open_denoiser,
    refuse_given,
    require_apart,
    weights_option,
)
from ddpm_deploy.cli.progress import duration, peak_memory, plural, stage, time_step
from ddpm_deploy.version import __version__

if TYPE_CHECKING:
    from ddpm_deploy.runtime.denoiser import Labels
    from ddpm_deploy.runtime.images import Destination
    from ddpm_deploy.runtime.sampler import Sampler
    from ddpm_deploy.solvers import Solver
    from ddpm_deploy.spacings import Spacing
    from ddpm_deploy.spec import ChainSettings

# Of solvers.Solver and spacings.Spacing, named here without NumPy, so that --help is quick.
_SOLVERS: Final = ("ddpm", "ddim", "dpmpp-2m")
_SPACINGS: Final = ("leading", "trailing", "linspace", "openai")
_WITH_REPLAY: Final = {"model", "replay", "weights", "device", "threads", "batch"}


@command(
    "A model → new images.",
    """
  ddpm-run model.onnx                          16 images, the full chain, in samples.png
  ddpm-run model.onnx --steps 50 --seed 7      a strided chain of 50 steps, and a seed to repeat it
  ddpm-run model.onnx --solver dpmpp-2m --steps 20 --spacing linspace
  ddpm-run model.onnx --count 5000 -o s.npz    uint8 (5000, H, W, C), as evaluators read it
  ddpm-run model.onnx --count 100 -o images/   a folder, one PNG an image
  ddpm-run pets.onnx --label cat --label dog   of these classes in turn; without it, of each class
  ddpm-run model.onnx --replay samples.png     make a picture again, and compare
  ddpm-run model.pt                            the checkpoint itself, in PyTorch: the reference
""",
)
@click.argument("model", type=FilePath)
@click.option(
    "-o",
    "--output",
    type=FilePath,
    default=Path("samples.png"),
    help="A .png (one grid), an .npz, or a folder.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), show_default="all of the model's", help="Steps of the chain."
)
@click.option("--count", type=click.IntRange(1, 10_000_000), default=16, help="Images.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    show_default="a fresh one",
    help="Of the noise; each image depends on it and its index alone.",
)
@click.option(
    "--first-index", type=click.IntRange(0, 2**64 - 1), default=0, help="Sample index of the first image."
)
@click.option(
    "--batch",
    type=click.IntRange(1, 65_536),
    show_default="64, fewer for images over 16×16",
    help="Images in flight at once.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    show_default="each class in turn",
    help="Class of a conditional model, by its name, else its number; several: in turn.",
)
@click.option(
    "--solver",
    type=click.Choice(_SOLVERS),
    default="ddpm",
    help="ddpm: ancestral sampling; ddim: some 50 steps; dpmpp-2m: some 20.",
)
@click.option("--eta", type=click.FloatRange(0, 1), help="Of ddim: 0, no noise, to 1.  [default: 0]")
@click.option(
    "--spacing",
    type=click.Choice(_SPACINGS),
    default="leading",
    help="Of the timesteps, where --steps are fewer than all.",
)
@weights_option
@click.option("--device", help="cpu; for a checkpoint, any torch device.  [default: cpu]")
@click.option("--threads", type=click.IntRange(1, 1024), show_default="one a core", help="Of the CPU.")
@click.option(
    "--replay", type=FilePath, help="Make this PNG again, from what it says of itself, and compare."
)
@click.option(
    "--float", "as_float", is_flag=True, help="In an .npz: `samples`, float32 (N, C, H, W), unrounded."
)
@click.pass_context
def main(
    ctx: click.Context,
    model: Path,
    output: Path,
    steps: int | None,
    count: int,
    seed: int | None,
    first_index: int,
    batch: int | None,
    labels: tuple[str, ...],
    solver: "Solver",
    eta: float | None,
    spacing: "Spacing",
    weights: Literal["ema", "raw"],
    device: str | None,
    threads: int | None,
    replay: Path | None,
    as_float: bool,
) -> None:
    """Draw images from MODEL, an exported .onnx file (or a .pt checkpoint, run in PyTorch)."""
    from ddpm_deploy.artefact import read_spec, require_intact
    from ddpm_deploy.runtime.images import Destination
    from ddpm_deploy.runtime.proof import proof_path
    from ddpm_deploy.runtime.sampler import Sampler
    from ddpm_deploy.spec import ChainSettings

    read_spec(model)
    require_intact(model)
    if replay:
        refuse_given(ctx, _WITH_REPLAY, "cannot be given with --replay: the picture has its own settings")
    require_apart(output, [model, proof_path(model)])
    seed = secrets.randbits(32) if seed is None else seed
    settings = ChainSettings(steps=steps, solver=solver, eta=eta, spacing=spacing)
    denoiser = open_denoiser(
        model, weights=weights, device=device, threads=threads, max_batch=batch and min(batch, count)
    )
    with Sampler(denoiser) as sampler:
        if replay:
            _replay(sampler, replay)
            return
        cycle = [sampler.spec.label(label) for label in labels]
        origin = _origin(sampler, settings, seed, cycle)
        destination = Destination(output, count, first_index, sampler.spec, origin, as_float)
        destination.check()
        _sample(sampler, settings, seed, cycle, destination)


def _origin(sampler: "Sampler", settings: "ChainSettings", seed: int, cycle: list[int]) -> dict[str, Any]:
    """What a picture says of where it came from."""
    return {
        "model": sampler.spec.provenance.digest,
        "seed": seed,
        "solver": settings.solver,
        "steps": len(sampler.table(settings)),
        "spacing": settings.spacing,
        "eta": settings.eta,
        "labels": cycle,
        "ddpm_deploy": __version__,
    }


def _sample(
    sampler: "Sampler", settings: "ChainSettings", seed: int, cycle: list[int], destination: "Destination"
) -> None:
    """Draw what the destination takes, with a word before and after."""
    from ddpm_deploy.files import show

    count, steps = destination.count, len(sampler.table(settings))
    in_flight = min(count, sampler.denoiser.max_batch)
    forecast = time_step(sampler.denoiser, in_flight) * steps * count / in_flight
    images, chain = plural(count, "image"), plural(steps, "step")
    logger.info("%s · %s · about %s%s", images, chain, duration(forecast), peak_memory())
    start = time.perf_counter()
    with stage("sampling", -(-count // in_flight) * steps) as advance, destination.open() as write:
        for samples in sampler.iter_samples(
            count,
            steps=settings.steps,
            solver=settings.solver,
            eta=settings.eta,
            spacing=settings.spacing,
            seed=seed,
            first_index=destination.first_index,
            labels=_in_turn(cycle, destination.first_index, count),
            callback=lambda step, x, x0: advance(1),
        ):
            write(samples)
    took = duration(time.perf_counter() - start)
    click.echo(f"{show(destination.path)}: {images}, {chain}, seed {seed}, in {took}")


def _in_turn(cycle: Sequence[int], first_index: int, count: int) -> "Labels | None":
    """The label of each sample: it depends on its index alone."""
    import numpy as np

    if not cycle:
        return None
    return np.resize(np.roll(cycle, -(first_index % len(cycle))), count)


def _replay(sampler: "Sampler", picture: Path) -> None:
    """Make a picture again and compare; exits 1 where any pixel is off by more than one level."""
    from ddpm_deploy.errors import DataError
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.images import grid, read_origin, to_uint8

    origin, pixels = read_origin(picture)
    digest = sampler.spec.provenance.digest
    if origin.model != digest:
        raise DataError(
            f"{show(picture)} was drawn by the model {show(origin.model[:12])}…, and this is {digest[:12]}…"
        )
    first = origin.first_index if origin.index is None else origin.index
    images = sampler.sample(
        origin.count,
        steps=origin.steps,
        solver=origin.solver,
        eta=origin.eta,
        spacing=origin.spacing,
        seed=origin.seed,
        first_index=first,
        labels=_in_turn(origin.labels, first, origin.count),
    )
    again = to_uint8(images, sampler.spec.value_range)
    made = grid(again) if origin.index is None else again[0]
    if made.shape != pixels.shape:
        raise DataError(
            f"{show(picture)} was edited: its shape is {pixels.shape}, and {made.shape} was made again"
        )
    difference = abs(made.astype(int) - pixels)
    differing = int((difference > 0).any(axis=2).sum())
    verdict = (
        f"{differing} pixels differ, by up to {difference.max()} of 255" if differing else "the same again"
    )
    images_, chain = plural(origin.count, "image"), plural(origin.steps, "step")
    click.echo(f"{show(picture)}: {images_}, {chain}, seed {origin.seed}: {verdict}")
    if difference.max() > 1:
        raise click.exceptions.Exit(1)
