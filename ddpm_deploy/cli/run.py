"""ddpm-run: a model → images, by the full reverse chain."""

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from ddpm_deploy.cli.common import FilePath, command, logger, open_denoiser, weights_option
from ddpm_deploy.cli.progress import duration, peak_memory, plural, progress, time_step

if TYPE_CHECKING:
    from ddpm_deploy.solvers import Solver, Spacing

# Of solvers.SOLVERS and SPACINGS, named here without NumPy, so that --help is quick.
_SOLVERS: Final = ("ddpm",)
_SPACINGS: Final = ("leading",)


@command(
    "A model → new images.",
    """
  ddpm-run model.onnx                          16 images, the full chain, in samples.png
  ddpm-run model.onnx --steps 50 --seed 7      a strided chain of 50 steps, and a seed to repeat it
  ddpm-run model.onnx --count 5000 -o s.npz    uint8 (5000, H, W, C), as evaluators read it
  ddpm-run model.onnx --count 100 -o images/   a folder, one PNG an image
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
@click.option("--solver", type=click.Choice(_SOLVERS), default="ddpm", help="ddpm: ancestral sampling.")
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
    "--float", "as_float", is_flag=True, help="In an .npz: `samples`, float32 (N, C, H, W), unrounded."
)
def main(
    model: Path,
    output: Path,
    steps: int | None,
    count: int,
    seed: int | None,
    first_index: int,
    batch: int | None,
    solver: "Solver",
    spacing: "Spacing",
    weights: Literal["ema", "raw"],
    device: str | None,
    threads: int | None,
    as_float: bool,
) -> None:
    """Draw images from MODEL, an exported .onnx file (or a .pt checkpoint, run in PyTorch)."""
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.images import Destination
    from ddpm_deploy.runtime.sampler import Sampler

    seed = secrets.randbits(32) if seed is None else seed
    denoiser = open_denoiser(
        model, weights=weights, device=device, threads=threads, max_batch=batch and min(batch, count)
    )
    with Sampler(denoiser) as sampler:
        spec = sampler.spec
        table = sampler.table(steps, solver=solver, spacing=spacing)
        origin = {
            "model": spec.provenance.digest,
            "seed": seed,
            "solver": solver,
            "steps": len(table),
            "spacing": spacing,
        }
        destination = Destination(output, count, first_index, spec, origin, as_float)
        destination.check()
        in_flight = min(count, denoiser.max_batch)
        batches = -(-count // in_flight)
        forecast = time_step(denoiser, in_flight) * len(table) * count / in_flight
        images, chain = plural(count, "image"), plural(len(table), "step")
        logger.info("%s · %s · about %s%s", images, chain, duration(forecast), peak_memory())
        start = time.perf_counter()
        with progress("sampling", length=batches * len(table)) as advance, destination.open() as write:
            for samples in sampler.iter_samples(
                count,
                steps=steps,
                solver=solver,
                spacing=spacing,
                seed=seed,
                first_index=first_index,
                callback=lambda step, x, x0: advance(1, None),
            ):
                write(samples)
        took = time.perf_counter() - start
    click.echo(f"{show(output)}: {images}, {chain}, seed {seed}, in {duration(took)}")
