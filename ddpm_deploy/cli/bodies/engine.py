"""What ddpm-export does about engines: their settings and names, building one, and telling why there is none."""

import os
import re
import shlex
from pathlib import Path
from typing import Final, TypedDict

import click

from ddpm_deploy.cli.bodies.outputs import require_same, require_same_model, require_same_proof
from ddpm_deploy.cli.bodies.progress import stage
from ddpm_deploy.cli.common import logger
from ddpm_deploy.engine.bindings import load_tensorrt, require_builder
from ddpm_deploy.engine.build import (
    DEFAULT_LEVEL,
    EngineSettings,
    build_engine,
    default_engine_batch,
    engine_spec,
)
from ddpm_deploy.engine.cache import with_timing_cache
from ddpm_deploy.engine.layers import Layers
from ddpm_deploy.engine.load import gpus_of
from ddpm_deploy.errors import ArtefactError, BackendError, DependencyError, SettingError, plural
from ddpm_deploy.files import atomic, quoted, show
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.plan import digest_beside, digest_path
from ddpm_deploy.runtime.proof import load_proof, proof_path
from ddpm_deploy.spec import EngineSpec, ModelSpec
from ddpm_deploy.words import Flavour, Precision

_GIB: Final = 1 << 30


class EngineOptions(TypedDict):
    """The options of engines; None, False or () where they were not typed."""

    rtx: bool
    compute_capability: tuple[str, ...]
    max_batch: int | None
    opt_batch: int | None
    batch_buckets: tuple[int, ...] | None
    workspace: float | None
    optimization_level: int | None
    timing_cache: Path | None
    hardware_compatible: bool


def flavour_of(options: EngineOptions) -> Flavour:
    """Return which TensorRT is asked for."""
    return "tensorrt-rtx" if options["rtx"] else "tensorrt"


def engine_settings(options: EngineOptions, spec: ModelSpec, *, tf32: bool = False) -> EngineSettings:
    """Return what the options say of a model's engine."""
    workspace, level = options["workspace"], options["optimization_level"]
    if workspace is not None and not 1 / _GIB <= workspace <= 65_536:  # nor NaN
        raise click.UsageError(f"--workspace {workspace} is not a number of GiB above 0, to 65536")
    try:
        return EngineSettings(
            flavour=flavour_of(options),
            batches=_batches(options, spec),
            tf32=tf32,
            workspace=None if workspace is None else int(workspace * _GIB),
            level=DEFAULT_LEVEL if level is None else level,
            hardware_compatible=options["hardware_compatible"],
            capabilities=tuple(dict.fromkeys(options["compute_capability"])),
            timing_cache=options["timing_cache"],
        )
    except SettingError as error:
        raise click.UsageError(str(error)) from error


def _batches(options: EngineOptions, spec: ModelSpec) -> tuple[tuple[int, int, int], ...]:
    """The smallest, best and largest batch of each profile."""
    buckets, largest, best = options["batch_buckets"], options["max_batch"], options["opt_batch"]
    if buckets and (largest or best):
        raise click.UsageError("--batch-buckets is given in place of --max-batch and --opt-batch")
    if buckets:
        return tuple((size, size, size) for size in buckets)
    largest = largest or default_engine_batch(spec)
    best = best or largest
    if best > largest:
        raise click.UsageError(f"--opt-batch {best} is more than --max-batch {largest}")
    return ((1, best, largest),)


def engine_words(options: EngineOptions) -> list[str]:
    """Write the options that were typed, to be pasted into a shell."""
    words: list[str] = []
    for name in EngineOptions.__annotations__:
        value: object = options[name]  # type: ignore[literal-required]
        if name == "batch_buckets" and options["batch_buckets"]:
            value = ",".join(map(str, options["batch_buckets"]))
        for item in value if isinstance(value, tuple) else [value]:
            if item is not None and item is not False:
                words += ["--" + name.replace("_", "-"), *([] if item is True else [shlex.quote(str(item))])]
    return words


def engine_files(plan: Path) -> list[Path]:
    """Return the files that an engine consists of."""
    return [plan, digest_path(plan), proof_path(plan)]


def why_no_engine(options: EngineOptions) -> str | None:
    """Return why no engine can be built here, or None where one can."""
    try:
        require_builder(flavour_of(options))
    except (BackendError, DependencyError) as error:
        return str(error)
    return None


def require_fits(spec: ModelSpec, settings: EngineSettings) -> None:
    """Raise SpecError where the ModelSpec is too long for an engine, before minutes of work for it."""
    engine_spec(spec, settings, str(load_tensorrt(settings.flavour).__version__)).to_json()


def require_same_engine(plan: Path, digest: str, precision: Precision) -> None:
    """Refuse to replace an engine, a digest or a proof that belongs to another model."""
    require_same_model(plan, digest, precision)
    require_same(
        digest_path(plan), lambda: bool(re.fullmatch("[0-9a-f]{64}", digest_beside(plan))), "is no digest"
    )
    require_same_proof(proof_path(plan), digest)


def build(onnx: ModelFile, plan: Path, settings: EngineSettings) -> None:
    """Build an engine, copy the proof of the .onnx file beside it, and tell what was built."""
    layers = build_engine(onnx, plan, with_timing_cache(settings), stages=stage)
    proof, copy = proof_path(onnx.path), proof_path(plan)
    try:
        load_proof(proof)
        if os.path.realpath(proof) != os.path.realpath(copy):
            with atomic(copy) as temporary:
                temporary.write_bytes(proof.read_bytes())
    except ArtefactError as error:
        logger.warning("%s gets no proof: %s", show(plan), error)
    _tell(plan, open_model(plan).spec, layers)


def _tell(plan: Path, spec: ModelSpec, layers: Layers) -> None:
    megabytes = plan.stat().st_size / 1e6
    click.echo(f"wrote {show(plan)} ({spec.precision}, {built_for(spec.engine)}, {megabytes:.1f} MB)")
    if spec.precision in ("fp16", "bf16"):
        kept = layers.in_float32
        click.echo(
            f"{len(layers.products) - len(kept)} of {plural(len(layers.products), 'convolution')} and matrix products "
            f"are in {spec.precision}; in float32, as was meant: {', '.join(map(show, kept))}"
        )
    click.echo("next, on a machine with such a GPU, with the .sha256 and the .proof.npz beside it:")
    click.echo(f"  ddpm-verify {quoted(plan)}")
    click.echo(f"  ddpm-run {quoted(plan)} --steps {spec.timesteps} -o samples.png")


def built_for(engine: EngineSpec | None) -> str:
    """Write what an engine was built by and for."""
    if engine is None:
        return "for an unknown GPU"
    batches = ", ".join(str(low) if low == high else f"{low} to {high}" for low, _, high in engine.batches)
    name = "TensorRT-RTX" if engine.flavour == "tensorrt-rtx" else "TensorRT"
    return f"{name} {show(engine.version)} for {gpus_of(engine)}, batch {batches}"
