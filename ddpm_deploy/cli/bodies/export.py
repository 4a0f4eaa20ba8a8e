"""ddpm-export: decide what is written where, then export a checkpoint, build an engine, or both."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import click

from ddpm_deploy.cli.bodies.engine import (
    EngineOptions,
    build,
    engine_files,
    engine_settings,
    engine_words,
    require_fits,
    require_same_engine,
    why_no_engine,
)
from ddpm_deploy.cli.bodies.ncnn import NcnnOptions, export_ncnn, names_ncnn
from ddpm_deploy.cli.bodies.outputs import check_outputs, require_same_model
from ddpm_deploy.cli.bodies.sources import ImportOptions, Source, source_of
from ddpm_deploy.dependencies import require, require_onnxruntime
from ddpm_deploy.errors import BackendError, SettingError
from ddpm_deploy.files import quoted, require_suffix, show
from ddpm_deploy.gpu import visible_gpu
from ddpm_deploy.model_file import ONNX_SUFFIX, ModelFile, open_model
from ddpm_deploy.plan import PLAN_SUFFIX
from ddpm_deploy.runtime.proof import proof_path
from ddpm_deploy.words import GraphPrecision, Precision, Weights


def export(
    model: Path,
    *,
    output: Path | None,
    weights: Weights | Path | None,
    key: str | None,
    spec: Path | None,
    flags: Path | None,
    check_images: Path | None,
    told: Mapping[str, str],
    precision: Precision | None,
    fp16: bool,
    every: bool,
    report: Path | None,
    ncnn: bool,
    engine: bool,
    force: bool,
    **options: Unpack[EngineOptions],
) -> None:
    """Export a network to ONNX, and build its engine; or build the engine of an .onnx file; or make a .ncnn file."""
    if fp16 and precision not in (None, "fp16"):
        raise click.UsageError(f"--fp16 and --precision {precision} exclude each other")
    source = source_of(model, ImportOptions(weights, key, spec, flags, check_images, told))
    wanted = _Wanted(output, "fp16" if fp16 else precision, engine, force, options)
    if ncnn or names_ncnn(output):
        export_ncnn(source, NcnnOptions(output, force, report, _not_of_ncnn(wanted, every)))
        return
    if isinstance(source, ModelFile):
        given = {"--all": every, "--report": report}
        if typed := [name for name, value in given.items() if value]:
            raise click.UsageError(
                f"{', '.join(typed)} cannot be given with an .onnx: only with a checkpoint"
            )
        _from_onnx(wanted, source)
    else:
        _from_network(wanted, source, every, report)


def _not_of_ncnn(wanted: "_Wanted", every: bool) -> list[str]:
    """The options that were typed and a .ncnn file cannot have."""
    precision = [] if wanted.precision in (None, "fp32") else [f"--precision {wanted.precision}"]
    return [*precision, *["--all"] * every, *["--engine"] * wanted.engine, *engine_words(wanted.options)]


@dataclass(frozen=True)
class _Wanted:
    """What the command line asks for. precision: None where it was not typed."""

    output: Path | None
    precision: Precision | None
    engine: bool
    force: bool
    options: EngineOptions

    @property
    def tf32(self) -> bool:
        return self.precision == "tf32"

    @property
    def graph(self) -> GraphPrecision | None:
        """The precision of the .onnx: an engine alone may be in tf32."""
        return "fp32" if self.precision == "tf32" else self.precision

    @property
    def names_plan(self) -> bool:
        return self.output is not None and self.output.suffix.lower() == PLAN_SUFFIX

    @property
    def insists(self) -> bool:
        """Whether it is an error that no engine can be built here."""
        return self.names_plan or self.engine or self.options["rtx"] or self.tf32

    def plan_of(self, onnx: Path) -> Path:
        """The default name of an engine: model.fp16.onnx → model.fp16.plan, model.fp16.rtx.plan, model.tf32.plan."""
        return onnx.with_suffix(".tf32" * self.tf32 + ".rtx" * self.options["rtx"] + PLAN_SUFFIX)


def _from_onnx(wanted: _Wanted, onnx: ModelFile) -> None:
    """Build the engine of an .onnx file."""
    options, spec = wanted.options, onnx.spec
    if wanted.graph not in (None, spec.precision):
        raise SettingError(
            f"{onnx.name} is in {spec.precision}, and its engine will be too: for {wanted.precision}, export the "
            f"checkpoint with --precision {wanted.precision}"
        )
    settings = engine_settings(options, spec, tf32=wanted.tf32)
    plan = wanted.output or wanted.plan_of(onnx.path)
    require_suffix(plan, "an engine", PLAN_SUFFIX)
    own = proof_path(onnx.path)
    *files, proof = engine_files(plan)
    proofs = [proof] if os.path.realpath(proof) != os.path.realpath(own) else []
    check_outputs([*files, *proofs, options["timing_cache"]], [onnx.path, own])
    if missing := why_no_engine(options):
        rtx = "" if options["rtx"] else ", or build one of TensorRT-RTX here, with --rtx"
        raise BackendError(
            f"{show(plan)} cannot be built here: {missing}. Run this on the machine it is for{rtx}"
        )
    if not wanted.force:
        require_same_engine(plan, spec.provenance.digest, "tf32" if wanted.tf32 else spec.precision)
    build(onnx, plan, settings)


def _from_network(wanted: _Wanted, source: Source, every: bool, report: Path | None) -> None:
    """Write the .onnx, and the engine where it was asked for or can be built."""
    graph, options = wanted.graph or "fp32", wanted.options
    if every and graph == "fp32":
        raise click.UsageError("--all is for exports in bf16 and fp16")
    onnx, plan = _names(wanted, source.stem, graph)
    words = engine_words(options)
    if words and not plan:
        raise click.UsageError(
            f"{' '.join(words)}: an option for engines, and -o names an .onnx; add --engine, or leave it out"
        )
    if report:
        require_suffix(report, "a report", ".json")
    written = [onnx, proof_path(onnx), *(engine_files(plan) if plan else []), options["timing_cache"], report]
    check_outputs(dict.fromkeys(written), source.files)
    settings = missing = None
    if plan:
        settings = engine_settings(options, source.spec, tf32=wanted.tf32)
        missing = why_no_engine(options)
        if not missing:
            require_fits(source.spec, settings)
        elif wanted.insists:
            raise BackendError(f"{show(plan)} cannot be built here: {missing}. {_instead(wanted, words)}")
    for module in ("torch", "onnx"):
        require(module, "export")
    require_onnxruntime()
    # It imports PyTorch, which building an engine does not need.
    from ddpm_deploy.cli.bodies.to_onnx import to_onnx

    def check(digest: str) -> None:
        """Refuse to replace the files of another model, once the digest of these weights is known."""
        if not wanted.force:
            require_same_model(onnx, digest, graph)
            if plan and not missing:
                require_same_engine(plan, digest, wanted.precision or "fp32")

    to_onnx(source, onnx, graph, every, report, check)
    if missing:
        command = " ".join(["ddpm-export", quoted(onnx), *words, "-o engine.plan"])
        where = "Then" if visible_gpu() else "On the target"
        click.echo(f"engine.plan skipped: {missing}. {where}: {command}")
    elif plan and settings:
        build(open_model(onnx), plan, settings)


def _names(wanted: _Wanted, stem: Path, graph: GraphPrecision) -> tuple[Path, Path | None]:
    """The .onnx and the .plan of a network; no .plan where -o names an .onnx, and nothing asks for an engine."""
    output = wanted.output
    if output and wanted.names_plan:
        return output.with_suffix(ONNX_SUFFIX), output
    tag = "" if graph == "fp32" else f".{graph}"
    onnx = output or stem.with_name(f"{stem.name}{tag}{ONNX_SUFFIX}")
    require_suffix(onnx, "the output", ONNX_SUFFIX, PLAN_SUFFIX)
    return onnx, wanted.plan_of(onnx) if wanted.insists or output is None else None


def _instead(wanted: _Wanted, words: list[str]) -> str:
    """What to do where an engine that was insisted on cannot be built. words: the options of engines."""
    typed = [
        *["--engine"] * wanted.engine,
        *words,
        *["--precision tf32"] * wanted.tf32,
        *["-o with a .plan"] * wanted.names_plan,
    ]
    here = f"Leave out {' '.join(typed)} to make the .onnx here, and build its engine where that is possible"
    options = wanted.options
    if (
        options["rtx"] or options["hardware_compatible"] or options["timing_cache"]
    ):  # the last two are of TensorRT
        return here
    return f"{here}; or build one of TensorRT-RTX here, with --rtx"
