"""ddpm-export's way from a checkpoint to an .onnx file. This module imports PyTorch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ddpm_deploy.cli.bodies.progress import stage
from ddpm_deploy.cli.bodies.report import finite, predictions_json, write_json
from ddpm_deploy.cli.bodies.sources import Source
from ddpm_deploy.cli.common import logger
from ddpm_deploy.errors import plural
from ddpm_deploy.export.graph import Export, export_onnx
from ddpm_deploy.export.precision import Calibration
from ddpm_deploy.files import quoted, show
from ddpm_deploy.runtime.parity import StepErrors
from ddpm_deploy.spec import DEFAULT_CHAIN, ModelSpec, Provenance
from ddpm_deploy.words import GraphPrecision


def to_onnx(
    source: Source,
    onnx: Path,
    precision: GraphPrecision,
    every: bool,
    report: Path | None,
    check: Callable[[str], None],
) -> None:
    """Export a network, and tell what was found.

    check: is called with the digest of the weights, before long work.
    """
    network, spec = source.load()
    check(spec.provenance.digest)
    logger.info("exporting %s in %s, then checking it in ONNX Runtime", source.name, precision)
    export = export_onnx(network, spec, onnx, precision=precision, every=every, stages=stage)
    if report:
        write_report(export, report)
    tell(export, source, onnx, spec)


def tell(export: Export, source: Source, output: Path, spec: ModelSpec) -> None:
    """Tell what was written, how it was checked, and what comes next."""
    precision = export.calibration.precision if export.calibration else "fp32"
    size = output.stat().st_size / 1e6
    click.echo(f"wrote {show(output)} ({precision}, {size:.1f} MB, {_weights(spec.provenance)})")
    worst, psnr = _largest(export.comparison.steps), export.comparison.psnr.min()
    click.echo(
        f"checked against PyTorch in {export.runner}: error at most {worst.relative_rms:.1e} of the prediction's RMS "
        f"(t = {worst.timestep}), images {psnr:.0f} dB"
    )
    if export.same_bits is not None:
        click.echo(
            f"an image has the same bits alone and in a batch of 8, with 1, 8 and 16 threads of {export.runner} here"
            if export.same_bits
            else "an image may differ in its last bits from one batch size or number of threads to another"
        )
    if export.calibration:
        _tell_calibration(export.calibration)
    if precision == "bf16":
        click.echo("it is for building engines: ONNX Runtime cannot run bfloat16 on a CPU")
        return
    click.echo("next:")
    click.echo(f"  {source.verify(output)}")
    click.echo(f"  ddpm-run {quoted(output)} --steps {spec.completed(DEFAULT_CHAIN).steps} -o samples.png")


def _weights(of: Provenance) -> str:
    return f"weights of {of.source}" if of.source else f"{of.weights} weights of step {of.step}"


def _tell_calibration(found: Calibration) -> None:
    worst = _largest(found.steps)
    click.echo(
        f"hardware that rounds to {found.precision} will be off by up to {worst.relative_rms:.1e} "
        f"(t = {worst.timestep}), says the oracle at {plural(len(found.steps), 'timestep')}; no value passed "
        f"{max(seen.largest for seen in found.ranges.values()):.3g}"
    )
    click.echo(
        f"{found.convolutions - len(found.islands)} of {plural(found.convolutions, 'convolution')} work in "
        f"{found.precision}" + ("; in float32 stay" if found.islands else "")
    )
    for name, reason in found.islands.items():
        click.echo(f"  {name}: {reason}")
    if found.precision == "fp16":
        click.echo("on a CPU this file is slower than the fp32 one: it is for building engines")


def _largest(steps: Sequence[StepErrors]) -> StepErrors:
    return max(steps, key=lambda step: step.relative_rms)


def write_report(export: Export, path: Path) -> None:
    """Write what was found."""
    found = export.calibration
    content: dict[str, Any] = {
        "within_tolerance": export.comparison.within,
        export.runner.lower().replace(" ", ""): predictions_json(export.comparison.steps),
        "psnr": finite(export.comparison.psnr),
        "same_bits": export.same_bits,
    }
    if found:
        content |= {
            "precision": found.precision,
            "islands": found.islands,
            "convolutions": found.convolutions,
            "ranges": found.ranges,
            "oracle": predictions_json(found.steps),
        }
    write_json(content, path)
