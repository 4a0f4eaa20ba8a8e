"""ddpm-export: a checkpoint → an ONNX file that has been checked against PyTorch → a TensorRT engine."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ddpm_deploy.cli.common import FilePath, check_outputs, command, logger, refuse_given, require_report
from ddpm_deploy.cli.engine import (
    ENGINE_OPTIONS,
    build,
    engine_files,
    engine_name,
    engine_options,
    engine_settings,
    engine_words,
    flavour_of,
    require_digest,
    require_room,
    require_same_proof,
    skipped,
)
from ddpm_deploy.cli.progress import stage

if TYPE_CHECKING:
    from ddpm_deploy.export.graph import Export
    from ddpm_deploy.runtime.parity import StepErrors
    from ddpm_deploy.spec import ModelSpec
    from ddpm_deploy.words import GraphPrecision, Precision

_ANY_WAY: Final = {"model", "output", "force"}
_WITH_ONNX: Final = {*_ANY_WAY, *ENGINE_OPTIONS, "engine", "precision", "fp16"}


@command(
    "A checkpoint → a checked ONNX file, and its TensorRT engine.",
    """
  ddpm-export model.pt                          model.onnx, with the averaged (EMA) weights
  ddpm-export model.pt --fp16                   model.fp16.onnx; where there is a GPU, model.fp16.plan
  ddpm-export model.pt --fp16 -o engine.plan    engine.onnx and engine.plan, or exit 1
  ddpm-export model.fp16.onnx -o engine.plan    the engine alone: no PyTorch is needed
  ddpm-export model.fp16.onnx --batch-buckets 1,8,64
  ddpm-export model.pt --fp16 --rtx             model.fp16.rtx.plan, for RTX GPUs; builds without one
  ddpm-export model.fp16.onnx --rtx --compute-capability 8.6 --compute-capability 8.9
  ddpm-export model.pt -o net.onnx              under another name, and no engine
  ddpm-export model.pt --weights raw            the weights as trained, without averaging
""",
)
@click.argument("model", type=FilePath)
@click.option(
    "-o",
    "--output",
    type=FilePath,
    show_default="MODEL with .onnx, .fp16.onnx, … and with .plan",
    help="The .onnx or .plan to write; its proof is written beside it.",
)
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", help="Averaged, or as trained.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
    default="fp32",
    help="Of the network's insides; inputs and outputs stay float32. tf32 is of engines.",
)
@click.option("--fp16", is_flag=True, help="Short for --precision fp16.")
@click.option(
    "--all",
    "every",
    is_flag=True,
    help="Calibrate a large network at every timestep, not at some: minutes to hours.",
)
@click.option("--report", type=FilePath, help="Write what was found on the way here, as JSON.")
@engine_options
@click.option("--force", is_flag=True, help="Replace a file that holds another model.")
@click.pass_context
def main(ctx: click.Context, /, model: Path, **options: Any) -> None:
    """Export MODEL, a .pt of ddpm-train, to ONNX, checked against PyTorch, and that to a TensorRT engine; or
    build the engine of MODEL, an .onnx.

    In half precision, what must stay in float32 is found by running real chains on an oracle of
    half-precision hardware; the report says what, and why. Without a GPU there is no engine, but for --rtx.
    """
    from ddpm_deploy.artefact import CHECKPOINT_SUFFIXES, ONNX_SUFFIX, read_spec
    from ddpm_deploy.errors import ArtefactError
    from ddpm_deploy.files import show

    if options["fp16"]:
        options["precision"] = _half(ctx, options["precision"])
    suffix = model.suffix.lower()
    if suffix not in (*CHECKPOINT_SUFFIXES, ONNX_SUFFIX):
        raise ArtefactError(
            f"{show(model)} is neither a checkpoint nor an ONNX file by its name: a .pt of ddpm-train or an .onnx of "
            "ddpm-export is needed"
        )
    spec = read_spec(model)  # a broken or foreign file is refused before torch is loaded
    if suffix in CHECKPOINT_SUFFIXES:
        _from_checkpoint(ctx, model, spec, options)
    else:
        refuse_given(ctx, _WITH_ONNX, "cannot be given with an .onnx: of checkpoints alone")
        _from_onnx(ctx, model, spec, options)


def _half(ctx: click.Context, precision: "Precision") -> "Precision":
    """What --fp16 stands for, where --precision says nothing else."""
    typed = ctx.get_parameter_source("precision") == click.core.ParameterSource.COMMANDLINE
    if typed and precision != "fp16":
        raise click.UsageError(f"--fp16 and --precision {precision} exclude each other")
    return "fp16"


def _from_checkpoint(
    ctx: click.Context, checkpoint: Path, spec: "ModelSpec", options: dict[str, Any]
) -> None:
    """The .onnx, and the engine where it was asked for or can be had."""
    from ddpm_deploy.dependencies import require, require_onnxruntime
    from ddpm_deploy.errors import BackendError, SettingError
    from ddpm_deploy.files import show

    precision, output = options["precision"], options["output"]
    if options["every"] and precision in ("fp32", "tf32"):
        raise click.UsageError("--all is of the calibration of bf16 and fp16")
    named = output if output and output.suffix.lower() == ".plan" else None
    insisted = bool(named) or options["engine"] or options["rtx"] or precision == "tf32"
    wanted = insisted or output is None
    words = engine_words(ctx)
    if words and not wanted:
        raise click.UsageError(
            f"{' '.join(words)}: of an engine, and -o names an .onnx; add --engine, or leave it out"
        )
    tag = f".{precision}" if precision in ("bf16", "fp16") else ""
    onnx = output.with_suffix(".onnx") if named else output or checkpoint.with_suffix(f"{tag}.onnx")
    if onnx.suffix.lower() != ".onnx":
        raise SettingError(f"{show(onnx)}: the output's name must end in .onnx or .plan")
    plan = named or engine_name(onnx, options)
    require_report(options["report"])
    engines = engine_files(plan) if wanted else []
    check_outputs(
        dict.fromkeys([*_written(onnx), *engines, options["timing_cache"], options["report"]]), [checkpoint]
    )
    settings = engine_settings(options, spec) if wanted else None
    missing = _why_no_engine(options) if wanted else None
    if settings and not missing:
        require_room(spec, settings)
    if insisted and missing:
        raise BackendError(f"{show(plan)} cannot be built here: {missing}. {_instead(options, words)}")
    require("torch", "export")
    require("onnx", "export")
    require_onnxruntime()
    _export(checkpoint, onnx, plan if wanted and not missing else None, options)
    if missing:
        skipped(onnx, words, missing)
    elif settings:
        build(onnx, plan, settings)


def _instead(options: dict[str, Any], words: list[str]) -> str:
    """What to do where an engine that was insisted on cannot be built. words: the options of engines."""
    typed = (["--engine"] if options["engine"] else []) + words
    typed += ["--precision tf32"] if options["precision"] == "tf32" else []
    if options["output"] and options["output"].suffix.lower() == ".plan":
        typed.append("-o with a .plan")
    here = f"Leave out {' '.join(typed)} to make the .onnx here, and the engine of that where it can be built"
    of_tensorrt = any(options[name] for name in ("rtx", "hardware_compatible", "timing_cache"))
    return here if of_tensorrt else f"{here}; or build one of TensorRT-RTX here, with --rtx"


def _export(checkpoint: Path, onnx: Path, plan: Path | None, options: dict[str, Any]) -> None:
    """The .onnx; plan: the engine that will be built of it."""
    from ddpm_deploy.export.graph import export_onnx
    from ddpm_deploy.files import show
    from ddpm_deploy.train.checkpoint import load_network

    network, spec = load_network(checkpoint, options["weights"])
    graph: GraphPrecision = "fp32" if options["precision"] == "tf32" else options["precision"]
    if not options["force"]:
        _require_same_model(onnx, spec.provenance.digest, graph)
        if plan:
            _require_same_engine(plan, spec.provenance.digest, options["precision"])
    logger.info("exporting %s in %s, then checking it in ONNX Runtime", show(checkpoint), graph)
    export = export_onnx(network, spec, onnx, precision=graph, every=options["every"], stages=stage)
    if options["report"]:
        _write_report(export, options["report"])
    _tell(export, checkpoint, onnx, spec)


def _from_onnx(ctx: click.Context, onnx: Path, spec: "ModelSpec", options: dict[str, Any]) -> None:
    """The engine of a file that was exported before."""
    from ddpm_deploy.errors import BackendError, SettingError
    from ddpm_deploy.files import show

    precision = options["precision"]
    typed = options["fp16"] or ctx.get_parameter_source("precision") == click.core.ParameterSource.COMMANDLINE
    if typed and precision != spec.precision and (precision, spec.precision) != ("tf32", "fp32"):
        raise SettingError(
            f"{show(onnx)} is in {spec.precision}, which its engine will be: for {precision}, export the checkpoint "
            f"with --precision {precision}"
        )
    settings = engine_settings(options, spec)
    plan = _plan_output(options["output"] or engine_name(onnx, options))
    _check_engine(plan, onnx, options)
    if missing := _why_no_engine(options):
        rtx = "" if options["rtx"] else ", or build one of TensorRT-RTX here, with --rtx"
        raise BackendError(
            f"{show(plan)} cannot be built here: {missing}. Run this on the machine it is for{rtx}"
        )
    if not options["force"]:
        _require_same_engine(plan, spec.provenance.digest, "tf32" if settings.tf32 else spec.precision)
    build(onnx, plan, settings)


def _check_engine(plan: Path, onnx: Path, options: dict[str, Any]) -> None:
    """Refuse outputs that cannot be written, or that would replace what is read."""
    from ddpm_deploy.runtime.proof import proof_path

    own = proof_path(onnx)
    *files, proof = engine_files(plan)
    if os.path.realpath(proof) != os.path.realpath(own):
        files.append(proof)
    check_outputs([*files, options["timing_cache"]], [onnx, own])


def _written(onnx: Path) -> list[Path]:
    from ddpm_deploy.runtime.proof import proof_path

    return [onnx, proof_path(onnx)]


def _plan_output(output: Path) -> Path:
    from ddpm_deploy.errors import SettingError
    from ddpm_deploy.files import show

    if output.suffix.lower() != ".plan":
        raise SettingError(f"{show(output)}: the name of an engine must end in .plan")
    return output


def _why_no_engine(options: dict[str, Any]) -> str | None:
    """Why none can be built here, or None."""
    from ddpm_deploy.engine.bindings import require_builder
    from ddpm_deploy.errors import BackendError, DependencyError

    try:
        require_builder(flavour_of(options))
    except (BackendError, DependencyError) as error:
        return str(error)
    return None


def _require_same_engine(plan: Path, digest: str, precision: "Precision") -> None:
    """Refuse to replace an engine, or a proof, of another model."""
    _require_same_model(plan, digest, precision)
    require_digest(plan)
    require_same_proof(plan, digest)


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
            f"{show(output)} exists and holds another model or precision, or is broken: choose another --output, or "
            "pass --force"
        )
