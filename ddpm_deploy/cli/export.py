"""ddpm-export: a checkpoint → an ONNX file that has been checked against PyTorch."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ddpm_deploy.cli.common import FilePath, check_outputs, command, logger
from ddpm_deploy.cli.progress import stage

if TYPE_CHECKING:
    from ddpm_deploy.export.graph import Export
    from ddpm_deploy.runtime.parity import StepErrors
    from ddpm_deploy.spec import ModelSpec, Precision


@command(
    "A checkpoint → a checked ONNX file.",
    """
  ddpm-export model.pt                  model.onnx, with the averaged (EMA) weights
  ddpm-export model.pt --fp16           model.fp16.onnx: half precision, for building engines
  ddpm-export model.pt -o net.onnx      under another name
  ddpm-export model.pt --weights raw    the weights as trained, without averaging
""",
)
@click.argument("checkpoint", type=FilePath)
@click.option(
    "-o",
    "--output",
    type=FilePath,
    show_default="CHECKPOINT with .onnx, .fp16.onnx or .bf16.onnx",
    help="The .onnx file to write; its proof is written beside it.",
)
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", help="Averaged, or as trained.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    help="Of the network's insides; inputs and outputs stay float32.",
)
@click.option("--fp16", is_flag=True, help="Short for --precision fp16.")
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="Calibrate a large network at every timestep, not at some: minutes to hours.",
)
@click.option("--report", type=FilePath, help="Write what was found on the way here, as JSON.")
@click.option("--engine", is_flag=True, help="A TensorRT engine: not in this version.")
@click.option("--force", is_flag=True, help="Replace an .onnx file that holds another model.")
@click.pass_context
def main(
    ctx: click.Context,
    checkpoint: Path,
    output: Path | None,
    weights: Literal["ema", "raw"],
    precision: "Precision",
    fp16: bool,
    every: bool,
    report: Path | None,
    engine: bool,
    force: bool,
) -> None:
    """Export CHECKPOINT, a .pt of ddpm-train, to ONNX, and check it against PyTorch.

    In half precision, what must stay in float32 is found by running real chains on an oracle of
    half-precision hardware; the report says what, and why.
    """
    from ddpm_deploy.artefact import CHECKPOINT_SUFFIXES, read_spec
    from ddpm_deploy.dependencies import require, require_onnxruntime
    from ddpm_deploy.errors import ArtefactError, SettingError
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.proof import proof_path

    if fp16:
        precision = _half(ctx, precision)
    if every and precision == "fp32":
        raise click.UsageError("--all is of the calibration of bf16 and fp16")
    if checkpoint.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise ArtefactError(
            f"{show(checkpoint)} is not a checkpoint by its name: a .pt of ddpm-train is needed"
        )
    read_spec(checkpoint)  # a broken or foreign file is refused before torch is loaded
    output = output or checkpoint.with_suffix(".onnx" if precision == "fp32" else f".{precision}.onnx")
    if engine or output.suffix.lower() == ".plan":
        raise SettingError(
            "TensorRT engines are not supported by this version: it exports ONNX; leave --engine out"
        )
    if output.suffix.lower() != ".onnx":
        raise SettingError(f"{show(output)}: the output's name must end in .onnx")
    check_outputs([output, proof_path(output), report], [checkpoint])
    require("torch", "export")
    require("onnx", "export")
    require_onnxruntime()
    from ddpm_deploy.export.graph import export_onnx
    from ddpm_deploy.train.checkpoint import load_network

    network, spec = load_network(checkpoint, weights)
    if not force:
        _require_same_model(output, spec.provenance.digest, precision)
    logger.info("exporting %s in %s, then checking it in ONNX Runtime", show(checkpoint), precision)
    export = export_onnx(network, spec, output, precision=precision, every=every, stages=stage)
    if report:
        _write_report(export, report)
    _tell(export, checkpoint, output, spec)


def _half(ctx: click.Context, precision: "Precision") -> "Precision":
    """What --fp16 stands for, where --precision says nothing else."""
    typed = ctx.get_parameter_source("precision") == click.core.ParameterSource.COMMANDLINE
    if typed and precision != "fp16":
        raise click.UsageError(f"--fp16 and --precision {precision} exclude each other")
    return "fp16"


def _tell(export: "Export", checkpoint: Path, output: Path, spec: "ModelSpec") -> None:
    """What was written, how it was checked, and what comes next."""
    from ddpm_deploy.files import quoted, show

    weights, step = spec.provenance.weights, spec.provenance.step
    precision = export.calibration.precision if export.calibration else "fp32"
    size = output.stat().st_size / 1e6
    click.echo(f"wrote {show(output)} ({precision}, {size:.1f} MB, {weights} weights of step {step})")
    _tell_checks(export)
    if precision == "bf16":
        click.echo(
            "it is for building engines: ONNX Runtime has no bfloat16 on a CPU, and cannot run it there"
        )
        return
    raw = " --weights raw" if weights == "raw" else ""
    click.echo("next:")
    click.echo(f"  ddpm-verify {quoted(checkpoint)} {quoted(output)}{raw}")
    click.echo(f"  ddpm-run {quoted(output)} --steps {spec.timesteps} -o samples.png")


def _tell_checks(export: "Export") -> None:
    worst, psnr = _largest(export.comparison.steps), float(export.comparison.psnr.min())
    click.echo(
        f"checked against PyTorch in ONNX Runtime: error at most {worst.relative_rms:.1e} of the prediction's RMS "
        f"(t = {worst.timestep}), images {psnr:.0f} dB"
    )
    found = export.calibration
    if found is None:
        return
    oracle = _largest(found.steps)
    click.echo(
        f"hardware that rounds to {found.precision} will be off by up to {oracle.relative_rms:.1e} "
        f"(t = {oracle.timestep}), says the oracle at {len(found.steps)} timesteps; no value passed "
        f"{max(seen.largest for seen in found.ranges.values()):.3g}"
    )
    click.echo(
        f"{found.convolutions - len(found.islands)} of {found.convolutions} convolutions work in {found.precision}; "
        "in float32 stay"
    )
    for name, reason in found.islands.items():
        click.echo(f"  {name}: {reason}")
    if found.precision == "fp16":
        click.echo("on a CPU this file is slower than the fp32 one: it is for building engines")


def _largest(steps: "Sequence[StepErrors]") -> "StepErrors":
    return max(steps, key=lambda step: step.relative_rms)


def _write_report(export: "Export", path: Path) -> None:
    from ddpm_deploy.cli.report import predictions_json
    from ddpm_deploy.files import atomic

    found = export.calibration
    content = {
        "within_tolerance": export.comparison.within,
        "onnxruntime": predictions_json(export.comparison.steps),
        "psnr": [None if value == float("inf") else value for value in export.comparison.psnr.tolist()],
    }
    if found:
        content |= {
            "precision": found.precision,
            "islands": found.islands,
            "convolutions": found.convolutions,
            "ranges": {name: asdict(seen) for name, seen in found.ranges.items()},
            "oracle": predictions_json(found.steps),
        }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _require_same_model(output: Path, digest: str, precision: "Precision") -> None:
    """Refuse to replace a file of another model or precision: it may be all there is of it."""
    from ddpm_deploy.artefact import read_spec
    from ddpm_deploy.errors import ArtefactError, OutputError
    from ddpm_deploy.files import show

    if not output.exists():
        return
    try:
        there = read_spec(output)
        same = there.provenance.digest == digest and there.precision == precision
    except ArtefactError:
        same = False
    if not same:
        raise OutputError(
            f"{show(output)} exists and holds another model or precision: choose another --output, or pass --force"
        )
