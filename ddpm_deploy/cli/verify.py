"""ddpm-verify: does the candidate compute what the reference computes?"""

from pathlib import Path
from typing import Literal

import click

from ddpm_deploy.cli.common import FilePath, command, logger, open_denoiser, weights_option
from ddpm_deploy.cli.progress import duration, plural, progress, time_step

_FORCED = 50  # timesteps at which predictions are compared


@command(
    "Two models compared, in numbers.",
    """
  ddpm-verify model.pt model.onnx                     the exported network against PyTorch
  ddpm-verify model.pt model.onnx --all               at every timestep
  ddpm-verify a.onnx b.onnx --report r.json --plot r.png
""",
)
@click.argument("reference", type=FilePath)
@click.argument("candidate", type=FilePath)
@click.option("--count", type=click.IntRange(1, 64), default=4, help="Images.")
@click.option(
    "--steps", type=click.IntRange(min=1), show_default="all of the model's", help="Steps of the chains."
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, help="Of the noise.")
@click.option("--all", "every", is_flag=True, help="Compare predictions at every timestep, not at 50.")
@click.option("--report", type=FilePath, help="Write every figure here, as JSON.")
@click.option(
    "--plot", type=FilePath, help="Draw the error against t here, with the tolerance (.png, .svg, .pdf)."
)
@weights_option
@click.option("--threads", type=click.IntRange(1, 1024), show_default="one a core", help="Of the CPU.")
@click.pass_context
def main(
    ctx: click.Context,
    reference: Path,
    candidate: Path,
    count: int,
    steps: int | None,
    seed: int,
    every: bool,
    report: Path | None,
    plot: Path | None,
    weights: Literal["ema", "raw"],
    threads: int | None,
) -> None:
    """Compare CANDIDATE with REFERENCE, each a .pt or an .onnx of the same model.

    Teacher-forced: the candidate's prediction at the reference's own x_t. Free-running: both chains whole,
    on the same noise. Exits 0 where both are within tolerance, 1 where not.
    """
    from ddpm_deploy.cli import report as reporting
    from ddpm_deploy.errors import SettingError
    from ddpm_deploy.files import require_output, show
    from ddpm_deploy.runtime.parity import compare, require_comparable

    outputs = [path for path in (report, plot) if path]
    for path in outputs:
        require_output(path)
    if len({path.resolve() for path in (reference, candidate, *outputs)}) < len({reference, candidate}) + len(
        outputs
    ):
        raise SettingError("--report and --plot must be files of their own, and neither of the models")
    if plot:
        reporting.require_plotting(plot)
    models = [
        open_denoiser(path, weights=weights, threads=threads, max_batch=count)
        for path in (reference, candidate)
    ]
    require_comparable(models[0].spec, models[1].spec)
    if models[0].spec.provenance.digest != models[1].spec.provenance.digest:
        logger.warning("the two files say that their weights are not the same (provenance.digest)")
    timesteps = models[0].spec.timesteps
    length = min(steps or timesteps, timesteps)
    forced = length if every else min(length, _FORCED)
    reference_time, candidate_time = (time_step(model, count) for model in models)
    forecast = length * reference_time + (length + forced) * candidate_time
    logger.info(
        "%s · 2 chains of %s · about %s", plural(count, "image"), plural(length, "step"), duration(forecast)
    )
    with progress("comparing", length=2 * length) as advance:
        result = compare(
            models[0],
            models[1],
            count=count,
            steps=steps,
            seed=seed,
            forced=forced,
            progress=lambda steps: advance(steps, None),
        )
    for model in models:
        model.close()
    click.echo(reporting.as_table(result, show(reference), show(candidate), timesteps))
    if report:
        reporting.write_json(result, models[0].spec, models[1].spec, report)
    if plot:
        reporting.write_plot(result, show(candidate), plot)
    ctx.exit(0 if result.within else 1)
