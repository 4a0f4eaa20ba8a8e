"""ddpm-export's way to a .ncnn file, from a checkpoint or from an .onnx file."""

import os
from dataclasses import dataclass
from pathlib import Path

import click

from ddpm_deploy.cli.bodies.outputs import check_outputs, require_same_model, require_same_proof
from ddpm_deploy.cli.bodies.progress import stage
from ddpm_deploy.cli.bodies.sources import Source
from ddpm_deploy.cli.common import logger
from ddpm_deploy.dependencies import require
from ddpm_deploy.files import quoted, require_suffix, show
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.ncnn_file import NCNN_SUFFIX
from ddpm_deploy.runtime.backends.ncnn import require_ncnn
from ddpm_deploy.runtime.proof import proof_path
from ddpm_deploy.spec import DEFAULT_CHAIN


@dataclass(frozen=True)
class NcnnOptions:
    """What the command line asks for. typed: its options that a .ncnn file cannot have."""

    output: Path | None
    force: bool
    report: Path | None
    typed: list[str]


def names_ncnn(output: Path | None) -> bool:
    """Whether -o names a .ncnn file."""
    return output is not None and output.suffix.lower() == NCNN_SUFFIX


def export_ncnn(source: Source | ModelFile, options: NcnnOptions) -> None:
    """Write the .ncnn file of a network, or of an .onnx file."""
    if options.typed:
        raise click.UsageError(
            f"{', '.join(options.typed)} cannot be given with --ncnn: a .ncnn file is in float32, and no engine"
        )
    if isinstance(source, ModelFile):
        if options.report:
            raise click.UsageError("--report cannot be given with an .onnx: only with a checkpoint")
        _from_onnx(source, options)
    else:
        _from_network(source, options)


def _output(stem: Path, options: NcnnOptions, inputs: list[Path], own_proof: Path | None) -> Path:
    """The file to write, once it and what stands beside it may be written."""
    path = options.output or stem.with_name(stem.name + NCNN_SUFFIX)
    require_suffix(path, "the output", NCNN_SUFFIX)
    proof = proof_path(path)
    shared = own_proof is not None and os.path.realpath(proof) == os.path.realpath(own_proof)
    check_outputs([path, *[proof] * (not shared), options.report], inputs)
    return path


def _require_free(path: Path, digest: str, force: bool) -> None:
    """Refuse to replace the files of another model."""
    if not force:
        require_same_model(path, digest, "fp32")
        require_same_proof(proof_path(path), digest)


def _from_onnx(onnx: ModelFile, options: NcnnOptions) -> None:
    """Write an .onnx file as ncnn reads it: PyTorch is not needed."""
    path = _output(onnx.path.with_suffix(""), options, [onnx.path], proof_path(onnx.path))
    _require_free(path, onnx.spec.provenance.digest, options.force)
    require("onnx", "export")
    from ddpm_deploy.export.ncnn import convert

    comparison = convert(onnx, path, stages=stage)
    worst = max(comparison.steps, key=lambda step: step.relative_rms)
    click.echo(f"wrote {show(path)} (fp32, {path.stat().st_size / 1e6:.1f} MB)")
    click.echo(
        f"checked against its proof in ncnn: error at most {worst.relative_rms:.1e} of the prediction's RMS "
        f"(t = {worst.timestep}), images {comparison.psnr.min():.0f} dB"
    )
    spec = open_model(path).spec
    click.echo("next:")
    click.echo(f"  ddpm-run {quoted(path)} --steps {spec.completed(DEFAULT_CHAIN).steps} -o samples.png")


def _from_network(source: Source, options: NcnnOptions) -> None:
    """Export a network, by way of ONNX in memory."""
    path = _output(source.stem, options, source.files, None)
    if options.report:
        require_suffix(options.report, "a report", ".json")
    for module in ("torch", "onnx"):
        require(module, "export")
    require_ncnn()
    # They import PyTorch.
    from ddpm_deploy.cli.bodies.to_onnx import tell, write_report
    from ddpm_deploy.export.graph import export_ncnn as export_network

    network, spec = source.load()
    _require_free(path, spec.provenance.digest, options.force)
    logger.info("exporting %s for ncnn, then checking it there", source.name)
    export = export_network(network, spec, path, stages=stage)
    if options.report:
        write_report(export, options.report)
    tell(export, source, path, spec)
