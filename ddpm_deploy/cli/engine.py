"""What ddpm-export says and asks of engines: its options, what was built, and why one was not."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ddpm_deploy.cli.common import FilePath, logger, typed_options
from ddpm_deploy.cli.progress import plural, stage

if TYPE_CHECKING:
    from ddpm_deploy.engine.build import EngineSettings
    from ddpm_deploy.engine.layers import Layers
    from ddpm_deploy.spec import EngineSpec, ModelSpec
    from ddpm_deploy.words import Flavour

# Of engine.build.CAPABILITIES, named here without NumPy, so that --help is quick.
_CAPABILITIES: Final = ("8.0", "8.6", "8.9", "12.0", "12.1")
_GIB: Final = 1 << 30


class _Buckets(click.ParamType[tuple[int, ...]]):
    """Batch sizes, as 1,8,64."""

    name = "sizes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Check and convert."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(size) for size in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not of the form 1,8,64", param, ctx)
        if list(sizes) != sorted(set(sizes)) or not 1 <= sizes[0] <= sizes[-1] <= 65_536:
            self.fail(f"{value!r}: sizes from 1 to 65536, each larger than the one before", param, ctx)
        return sizes


_OPTIONS: Final = (
    click.option("--engine", is_flag=True, help="Insist on the engine: where none can be built, exit 1."),
    click.option(
        "--rtx",
        is_flag=True,
        help="An engine of TensorRT-RTX, which builds without a GPU, for GeForce and RTX GPUs.",
    ),
    click.option(
        "--compute-capability",
        "capabilities",
        multiple=True,
        type=click.Choice(_CAPABILITIES),
        show_default="all, compiled when first loaded",
        help="Of --rtx: GPUs to build for; several times for several.",
    ),
    click.option(
        "--max-batch",
        type=click.IntRange(1, 65_536),
        show_default="64, fewer for images over 64×64",
        help="Images at once, at most.",
    ),
    click.option(
        "--opt-batch",
        type=click.IntRange(1, 65_536),
        show_default="--max-batch",
        help="Images at once, best.",
    ),
    click.option(
        "--batch-buckets", "buckets", type=_Buckets(), help="One profile for each size, as 1,8,64, instead."
    ),
    click.option(
        "--workspace",
        type=float,
        show_default="all there is",
        help="GiB of scratch that TensorRT may use.",
    ),
    click.option(
        "--optimization-level", "level", type=click.IntRange(0, 5), default=3, help="Higher builds longer."
    ),
    click.option(
        "--timing-cache",
        type=FilePath,
        show_default="in the user's cache folder",
        help="TensorRT's measurements, kept from build to build.",
    ),
    click.option(
        "--hardware-compatible", is_flag=True, help="For every GPU from Ampere on, at some cost in speed."
    ),
)
ENGINE_OPTIONS: Final = frozenset(
    {"rtx", "capabilities", "max_batch", "opt_batch", "buckets", "workspace", "level", "timing_cache"}
    | {"hardware_compatible"}
)


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of engines to a command."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def flavour_of(options: dict[str, Any]) -> "Flavour":
    """Which TensorRT is asked for."""
    return "tensorrt-rtx" if options["rtx"] else "tensorrt"


def engine_settings(options: dict[str, Any], spec: "ModelSpec") -> "EngineSettings":
    """What the options say of a model's engine."""
    from ddpm_deploy.engine.build import EngineSettings
    from ddpm_deploy.errors import SettingError

    workspace = options["workspace"]
    if workspace is not None and not 1 / _GIB <= workspace <= 65_536:  # nor NaN
        raise click.UsageError(f"--workspace {workspace} is no number of GiB from 0 to 65536")
    try:
        return EngineSettings(
            flavour=flavour_of(options),
            batches=_batches(options, spec),
            tf32=options["precision"] == "tf32",
            workspace=None if workspace is None else int(workspace * _GIB),
            level=options["level"],
            hardware_compatible=options["hardware_compatible"],
            capabilities=tuple(dict.fromkeys(options["capabilities"])),
            timing_cache=options["timing_cache"],
        )
    except SettingError as error:
        raise click.UsageError(str(error)) from error


def require_room(spec: "ModelSpec", settings: "EngineSettings") -> None:
    """Raise SpecError where the ModelSpec will not fit in the engine, before minutes of work for it."""
    from ddpm_deploy.engine.bindings import load_tensorrt
    from ddpm_deploy.engine.build import engine_spec

    engine_spec(spec, settings, str(load_tensorrt(settings.flavour).__version__)).to_json()


def _batches(options: dict[str, Any], spec: "ModelSpec") -> tuple[tuple[int, int, int], ...]:
    from ddpm_deploy.engine.build import default_engine_batch

    if options["buckets"]:
        if options["max_batch"] or options["opt_batch"]:
            raise click.UsageError("--batch-buckets is instead of --max-batch and --opt-batch")
        return tuple((size, size, size) for size in options["buckets"])
    largest = options["max_batch"] or default_engine_batch(spec)
    best = options["opt_batch"] or largest
    if best > largest:
        raise click.UsageError(f"--opt-batch {best} is more than --max-batch {largest}")
    return ((1, best, largest),)


def engine_name(onnx: Path, options: dict[str, Any]) -> Path:
    """The default name: model.fp16.onnx → model.fp16.plan, model.fp16.rtx.plan, model.tf32.plan."""
    tags = (".tf32" if options["precision"] == "tf32" else "") + (".rtx" if options["rtx"] else "")
    return onnx.with_name(onnx.stem + tags + ".plan")


def build(onnx: Path, plan: Path, settings: "EngineSettings") -> None:
    """Build an engine, put the proof of the .onnx beside it, and tell what was built."""
    from ddpm_deploy.artefact import read_spec
    from ddpm_deploy.engine.build import build_engine
    from ddpm_deploy.engine.cache import with_timing_cache

    layers = build_engine(onnx, plan, with_timing_cache(settings), stages=stage)
    carry_proof(onnx, plan)
    _tell(plan, read_spec(plan), layers)


def engine_files(plan: Path) -> list[Path]:
    """What is written of an engine."""
    from ddpm_deploy.plan import digest_path
    from ddpm_deploy.runtime.proof import proof_path

    return [plan, digest_path(plan), proof_path(plan)]


def carry_proof(onnx: Path, plan: Path) -> None:
    """Put the proof of an .onnx beside its engine, or say that it has none."""
    from ddpm_deploy.errors import ArtefactError
    from ddpm_deploy.files import atomic, show
    from ddpm_deploy.runtime.proof import load_proof, proof_path

    proof, copy = proof_path(onnx), proof_path(plan)
    try:
        load_proof(proof)
    except ArtefactError as error:
        logger.warning("%s has no proof to go with it: %s", show(plan), error)
        return
    if os.path.realpath(proof) != os.path.realpath(copy):
        with atomic(copy) as temporary:
            temporary.write_bytes(proof.read_bytes())


def require_digest(plan: Path) -> None:
    """Refuse to replace a file that is no digest, and stands where the engine's is to stand."""
    from ddpm_deploy.errors import OutputError
    from ddpm_deploy.files import show
    from ddpm_deploy.plan import digest_path

    path = digest_path(plan)
    if not path.exists():
        return
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head.strip(b"0123456789abcdef"):
        raise OutputError(f"{show(path)} exists and is no digest: choose another --output, or pass --force")


def require_same_proof(plan: Path, digest: str) -> None:
    """Refuse to replace the proof of another model, which is beside `plan` by its name."""
    from ddpm_deploy.errors import ArtefactError, OutputError
    from ddpm_deploy.files import show
    from ddpm_deploy.runtime.proof import load_proof, proof_path

    proof = proof_path(plan)
    if not proof.exists():
        return
    try:
        same = load_proof(proof).spec.provenance.digest == digest
    except ArtefactError:
        same = False
    if not same:
        raise OutputError(
            f"{show(proof)} exists and is not the proof of this model: choose another --output, or pass --force"
        )


def _tell(plan: Path, spec: "ModelSpec", layers: "Layers") -> None:
    from ddpm_deploy.files import quoted, show

    assert spec.engine is not None
    megabytes = plan.stat().st_size / 1e6
    click.echo(f"wrote {show(plan)} ({spec.precision}, {built_for(spec.engine)}, {megabytes:.1f} MB)")
    kept = layers.in_float32
    if spec.precision in ("fp16", "bf16"):
        click.echo(
            f"{len(layers.products) - len(kept)} of {plural(len(layers.products), 'convolution')} and matrix products "
            f"are in {spec.precision}; in float32, as was meant: {', '.join(map(show, kept))}"
        )
    click.echo("next, on a machine with such a GPU, with the .sha256 and the .proof.npz beside it:")
    click.echo(f"  ddpm-verify {quoted(plan)}")
    click.echo(f"  ddpm-run {quoted(plan)} --steps {spec.timesteps} -o samples.png")


def built_for(engine: "EngineSpec | None") -> str:
    """What an engine was built by and for, in words."""
    if engine is None:
        return "for what, it does not say"
    from ddpm_deploy.files import show

    gpus = "every GPU from Ampere on" if engine.hardware_compatible else "every GPU that it supports"
    if engine.capabilities:
        gpus = f"compute capability {', '.join(engine.capabilities)}"
    where = f" ({engine.gpu})" if engine.gpu else ""
    batches = ", ".join(str(low) if low == high else f"{low} to {high}" for low, _, high in engine.batches)
    name = "TensorRT-RTX" if engine.flavour == "tensorrt-rtx" else "TensorRT"
    return show(f"{name} {engine.version} for {gpus}{where}, batch {batches}")


def skipped(onnx: Path, options: list[str], reason: str) -> None:
    """Tell why there is no engine, and the command that makes one elsewhere with these options."""
    from ddpm_deploy.files import quoted
    from ddpm_deploy.gpu import visible_gpu

    command = " ".join(["ddpm-export", quoted(onnx), *options, "-o", "engine.plan"])
    where = "Then" if visible_gpu() else "On the target"
    click.echo(f"engine.plan skipped: {reason}. {where}: {command}")


def engine_words(ctx: click.Context) -> list[str]:
    """The options of engines as they were typed, to be pasted into a shell."""
    words: list[str] = []
    for parameter in typed_options(ctx):
        value, flag = ctx.params[parameter.name or ""], parameter.opts[0]
        if parameter.name not in ENGINE_OPTIONS:
            continue
        if value is True:
            words.append(flag)
        elif parameter.name == "buckets":
            words += [flag, ",".join(map(str, value))]
        else:
            words += [
                word
                for item in (value if isinstance(value, tuple) else (value,))
                for word in (flag, str(item))
            ]
    return [shlex.quote(word) for word in words]
