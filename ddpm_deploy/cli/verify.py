"""ddpm-verify: do the candidates compute what the reference computes?"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from ddpm_deploy.cli.common import (
    FilePath,
    check_outputs,
    command,
    logger,
    open_denoiser,
    require_report,
    weights_option,
)
from ddpm_deploy.cli.progress import duration, plural, stage, time_step

if TYPE_CHECKING:
    from ddpm_deploy.cli.report import Rung
    from ddpm_deploy.runtime.denoiser import Denoiser
    from ddpm_deploy.runtime.parity import Trajectory

_FORCED: Final = 50  # timesteps at which predictions are compared
_ROUNDS: Final = 5  # of the timing


@command(
    "Models compared, in numbers.",
    """
  ddpm-verify model.pt model.onnx                     the exported network against PyTorch
  ddpm-verify model.pt model.onnx --all               at every timestep
  ddpm-verify model.pt model.onnx model.fp16.onnx     the ladder: which of them to choose
  ddpm-verify model.onnx                              against its proof, without the checkpoint
  ddpm-verify engine.plan                             an engine, where it runs, against the same
  ddpm-verify a.onnx b.onnx --report r.json --plot r.png
""",
)
@click.argument("models", type=FilePath, nargs=-1, required=True)
@click.option("--count", type=click.IntRange(1, 64), show_default="4, or the proof's", help="Images.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    show_default="all of the model's, or the proof's",
    help="Steps of the chains.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), show_default="0, or the proof's", help="Of the noise."
)
@click.option("--all", "every", is_flag=True, help="Compare predictions at every timestep, not at 50.")
@click.option("--proof", type=FilePath, show_default="MODEL.proof.npz", help="Of a single model.")
@click.option("--report", type=FilePath, help="Write every figure here, as JSON.")
@click.option(
    "--plot", type=FilePath, help="Draw the error against t here, with the tolerance (.png, .svg, .pdf)."
)
@weights_option
@click.option("--threads", type=click.IntRange(1, 1024), show_default="one a core", help="Of the CPU.")
@click.pass_context
def main(
    ctx: click.Context,
    models: tuple[Path, ...],
    count: int | None,
    steps: int | None,
    seed: int | None,
    every: bool,
    proof: Path | None,
    report: Path | None,
    plot: Path | None,
    weights: Literal["ema", "raw"],
    threads: int | None,
) -> None:
    """Compare the second model, and any further ones, with the first; each is a .pt, an .onnx or an engine (.plan).

    A single model is held against the proof that ddpm-export wrote beside it.

    Teacher-forced: a model's prediction at the reference's own x_t. Free-running: whole chains on the same
    noise. Exits 0 where all are within tolerance, 1 where not.
    """
    from ddpm_deploy.cli import report as reporting
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.proof import proof_path

    check_outputs([report, plot], [*models, *map(proof_path, models), *([proof] if proof else [])])
    require_report(report)
    if plot:
        reporting.require_plotting(plot)
    for path in models:
        _look_at(path)
    if len(models) == 1:
        if every or any(value is not None for value in (count, steps, seed)):
            raise click.UsageError("a proof has its own count, steps, seed and timesteps: leave them out")
        trajectory = _proven(models[0], proof)
        reference, candidates = show(proof or "its proof"), list(models)
    else:
        if proof:
            raise click.UsageError("--proof is for a single model")
        reference, candidates = show(models[0]), list(models[1:])
        first = open_denoiser(models[0], weights=weights, threads=threads, max_batch=count or 4)
        trajectory = _recorded(first, count or 4, steps, seed or 0, every, len(candidates))
        first.close()
    rungs = _climb(candidates, trajectory, weights, threads)
    trajectory = trajectory.first(len(rungs[0].comparison.psnr))
    click.echo(reporting.as_table(rungs, trajectory, reference))
    if report:
        reporting.write_json(rungs, trajectory, report)
    if plot:
        reporting.write_plot(rungs, plot)
    ctx.exit(0 if all(rung.comparison.within for rung in rungs) else 1)


def _climb(
    candidates: "Sequence[Path]",
    trajectory: "Trajectory",
    weights: Literal["ema", "raw"],
    threads: int | None,
) -> "list[Rung]":
    """Judge and time each candidate."""
    from ddpm_deploy.cli.report import Rung
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.parity import judge

    denoisers = [
        open_denoiser(path, weights=weights, threads=threads, max_batch=trajectory.count)
        for path in candidates
    ]
    count = min(trajectory.count, *(denoiser.max_batch for denoiser in denoisers))
    if count < trajectory.count:
        logger.warning("%d of %d images are compared: a model's batch takes no more", count, trajectory.count)
        trajectory = trajectory.first(count)
    comparisons = []
    for path, denoiser in zip(candidates, denoisers, strict=True):
        if denoiser.spec.provenance.digest != trajectory.spec.provenance.digest:
            logger.warning("%s says that its weights are others than the reference's", show(path))
        with stage(show(path), len(trajectory.timesteps) + trajectory.steps) as advance:
            comparisons.append(judge(trajectory, denoiser, advance))
    times = _milliseconds(denoisers, count)
    return [
        Rung(show(path), denoiser.spec, comparison, time, path.stat().st_size / 1e6)
        for path, denoiser, comparison, time in zip(candidates, denoisers, comparisons, times, strict=True)
    ]


def _look_at(model: Path) -> None:
    """What can be said of a model before minutes of work."""
    from ddpm_deploy.artefact import ONNX_SUFFIX, is_intact, non_finite_tensor, read_spec
    from ddpm_deploy.errors import ArtefactError, SettingError
    from ddpm_deploy.files import show

    if read_spec(model).precision == "bf16" and model.suffix.lower() == ONNX_SUFFIX:
        raise SettingError(
            f"{show(model)} is in bfloat16, which ONNX Runtime has not on a CPU: ddpm-export checked it, by an oracle"
        )
    broken = non_finite_tensor(model)
    if broken:
        raise ArtefactError(
            f"{show(model)} has numbers that are not finite in {show(broken)}: export it again"
        )
    if not is_intact(model):
        logger.warning("%s is not what ddpm-export wrote: damaged, or edited since", show(model))


def _recorded(
    reference: "Denoiser", count: int, steps: int | None, seed: int, every: bool, candidates: int
) -> "Trajectory":
    """The reference's chains, with a word before on how long it will all take."""
    from ddpm_deploy.runtime.parity import record

    timesteps = reference.spec.timesteps
    length = min(steps or timesteps, timesteps)
    keep = length if every else min(length, _FORCED)
    forecast = (length + candidates * (length + keep)) * time_step(reference, count)
    chains = plural(length, "step")
    logger.info(
        "%s · %d chains of %s · about %s", plural(count, "image"), candidates + 1, chains, duration(forecast)
    )
    with stage("reference", length) as advance:
        return record(reference, count=count, steps=steps, seed=seed, keep=keep, progress=advance)


def _proven(model: Path, proof: Path | None) -> "Trajectory":
    """The chains recorded in a model's proof."""
    from ddpm_deploy.artefact import read_spec
    from ddpm_deploy.errors import ArtefactError
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.proof import load_proof, proof_path

    spec = read_spec(model)
    path = proof or proof_path(model)
    if not proof and not path.exists():
        raise ArtefactError(
            f"{show(model)} has no proof beside it ({show(path)} does not exist): name a reference, as in "
            "ddpm-verify model.pt model.onnx, or a --proof"
        )
    trajectory = load_proof(path)
    if trajectory.spec.provenance.digest != spec.provenance.digest:
        raise ArtefactError(
            f"{show(path)} is the proof of another model (its weights are "
            f"{trajectory.spec.provenance.digest[:12]}…, and {show(model)} has {spec.provenance.digest[:12]}…)"
        )
    return trajectory


def _milliseconds(denoisers: "Sequence[Denoiser]", batch: int) -> list[float]:
    """The median time of each for a batch, run in turn, so that a busy moment strikes all of them."""
    rounds = [[time_step(denoiser, batch) for denoiser in denoisers] for _ in range(_ROUNDS)]
    return [statistics.median(times) * 1e3 for times in zip(*rounds, strict=True)]
