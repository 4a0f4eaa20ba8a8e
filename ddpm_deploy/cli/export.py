"""ddpm-export: a checkpoint → an ONNX file that has been checked against PyTorch."""

from pathlib import Path
from typing import Literal

import click

from ddpm_deploy.cli.common import FilePath, command, logger

_NOT_YET = "is not supported by this version: it exports FP32 ONNX; leave the option out"


@command(
    "A checkpoint → a checked ONNX file.",
    """
  ddpm-export model.pt                  model.onnx, with the averaged (EMA) weights
  ddpm-export model.pt -o net.onnx      under another name
  ddpm-export model.pt --weights raw    the weights as trained, without averaging
""",
)
@click.argument("checkpoint", type=FilePath)
@click.option(
    "-o", "--output", type=FilePath, show_default="CHECKPOINT with .onnx", help="The .onnx file to write."
)
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", help="Averaged, or as trained.")
@click.option("--fp16", is_flag=True, help="Half precision: not in this version.")
@click.option("--engine", is_flag=True, help="A TensorRT engine: not in this version.")
@click.option("--force", is_flag=True, help="Replace an .onnx file that holds another model.")
def main(
    checkpoint: Path,
    output: Path | None,
    weights: Literal["ema", "raw"],
    fp16: bool,
    engine: bool,
    force: bool,
) -> None:
    """Export CHECKPOINT, a .pt of ddpm-train, to ONNX, and check it against PyTorch."""
    from ddpm_deploy.artefact import read_spec
    from ddpm_deploy.dependencies import require, require_onnxruntime
    from ddpm_deploy.errors import SettingError
    from ddpm_deploy.files import quoted, require_output, show

    read_spec(checkpoint)  # a broken or foreign file is refused before torch is loaded
    output = output or checkpoint.with_suffix(".onnx")
    for name, given in (("--fp16", fp16), ("--engine", engine or output.suffix.lower() == ".plan")):
        if given:
            raise SettingError(f"{name} {_NOT_YET}")
    if output.suffix.lower() != ".onnx":
        raise SettingError(f"{show(output)}: the output's name must end in .onnx")
    require_output(output)
    require("torch", "export")
    require("onnx", "export")
    require_onnxruntime()
    from ddpm_deploy.export.graph import export_onnx
    from ddpm_deploy.train.checkpoint import load_network

    network, spec = load_network(checkpoint, weights)
    if not force:
        _require_same_model(output, spec.provenance.digest)
    logger.info("exporting %s, then checking it in ONNX Runtime: some seconds", show(checkpoint))
    check = export_onnx(network, spec, output)
    size = output.stat().st_size / 1e6
    click.echo(f"wrote {show(output)} ({size:.1f} MB, {weights} weights of step {spec.provenance.step})")
    click.echo(f"checked against PyTorch: largest RMS error {check.relative_rms:.1e} of the prediction's RMS")
    click.echo("next:")
    raw = " --weights raw" if weights == "raw" else ""
    click.echo(f"  ddpm-verify {quoted(checkpoint)} {quoted(output)}{raw}")
    click.echo(f"  ddpm-run {quoted(output)} --steps {spec.timesteps} -o samples.png")


def _require_same_model(output: Path, digest: str) -> None:
    """Refuse to replace a file of another model: it may be all there is of it."""
    from ddpm_deploy.artefact import read_spec
    from ddpm_deploy.errors import ArtefactError, OutputError
    from ddpm_deploy.files import show

    if not output.exists():
        return
    try:
        same = read_spec(output).provenance.digest == digest
    except ArtefactError:
        same = False
    if not same:
        raise OutputError(
            f"{show(output)} exists and holds another model: choose another --output, or pass --force"
        )
