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
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.parity import compare

    _check_outputs([path for path in (report, plot) if path], [reference, candidate])
    if plot:
        reporting.require_plotting(plot)
    first, second = (
        open_denoiser(path, weights=weights, threads=threads, max_batch=count)
        for path in (reference, candidate)
    )
    if first.spec.provenance.digest != second.spec.provenance.digest:
        logger.warning("the two files say that their weights are not the same (provenance.digest)")
    timesteps = first.spec.timesteps
    length = min(steps or timesteps, timesteps)
    forced = length if every else min(length, _FORCED)
    forecast = length * time_step(first, count) + (length + forced) * time_step(second, count)
    images, chains = plural(count, "image"), plural(length, "step")
    logger.info("%s · 2 chains of %s · about %s", images, chains, duration(forecast))
    with progress("comparing", length=2 * length) as advance:
        result = compare(
            first,
            second,
            count=count,
            steps=steps,
            seed=seed,
            forced=forced,
            progress=lambda steps: advance(steps, None),
        )
    click.echo(reporting.as_table(result, show(reference), show(candidate), timesteps))
    if report:
        reporting.write_json(result, first.spec, second.spec, report)
    if plot:
        reporting.write_plot(result, show(candidate), plot)
    ctx.exit(0 if result.within else 1)


def _check_outputs(outputs: list[Path], models: list[Path]) -> None:
    """Refuse outputs that cannot be written, or that would replace one another or a model."""
    from ddpm_deploy.errors import SettingError
    from ddpm_deploy.files import require_output

    taken = {path.resolve() for path in models}
    for path in outputs:
        require_output(path)
        if path.resolve() in taken:
            raise SettingError("--report and --plot must be files of their own, and neither of the models")
        taken.add(path.resolve())
