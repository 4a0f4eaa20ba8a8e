"""A plan → an engine, on the machine that it was built for; on any other, what to do instead."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ddpm_deploy.engine.bindings import Log, load_tensorrt, log_of, made, require_gpu
from ddpm_deploy.errors import ArtefactError, DependencyError, SpecError
from ddpm_deploy.files import quoted, show
from ddpm_deploy.gpu import Gpu
from ddpm_deploy.model_file import ONNX_SUFFIX, ModelFile
from ddpm_deploy.plan import trusted
from ddpm_deploy.spec import EngineSpec, ModelSpec
from ddpm_deploy.words import CAPABILITIES

logger = logging.getLogger(__name__)

_AMPERE: Final = 8.0


@dataclass(frozen=True)
class LoadedEngine:
    """An ICudaEngine, with the module that made it, its log, and the file it came from."""

    plan: ModelFile
    trt: Any
    engine: Any
    log: Log


def load_engine(
    plan: ModelFile, index: int = 0, here: Callable[[], AbstractContextManager[None]] = nullcontext
) -> LoadedEngine:
    """Load a plan on the GPU of that number. here: makes that GPU the thread's, for as long as it is loaded.

    Raises ArtefactError where it is damaged, not trusted, of another GPU or version, or TensorRT cannot load it,
    DependencyError where its TensorRT is not installed, BackendError where no GPU is visible.
    """
    gpu = require_gpu(f"{_on_the_cpu(plan)} ({plan.name} needs a GPU)", index)
    content = trusted(plan.path)
    assert plan.head is not None
    flavour = plan.head.flavour
    try:
        trt = load_tensorrt(flavour)
    except DependencyError as error:
        raise DependencyError(
            f"{plan.name} was built by {flavour} {_version(plan)}: {error}; or {rebuild_hint(plan, gpu)}"
        ) from error
    require_runs_here(plan, str(trt.__version__), gpu)
    log = log_of(flavour)
    with here():
        return LoadedEngine(plan, trt, deserialized(trt, log, content, plan.name), log)


def deserialized(trt: Any, log: Log, plan: bytes | memoryview, name: str) -> Any:
    """The ICudaEngine of a plan, on the GPU; name: for messages.

    Raises ArtefactError where TensorRT cannot load it.
    """
    log.errors.clear()
    runtime = made("a runtime", log, trt.Runtime, log.handle)  # engine_host_code_allowed stays off
    cuda_engine = runtime.deserialize_cuda_engine(plan)
    if cuda_engine is None:
        raise ArtefactError(f"TensorRT cannot load {name}: {log.reason()}")
    return cuda_engine


def engine_of(plan: ModelFile) -> EngineSpec | None:
    """How a plan says that it was built; None for one that another tool built."""
    with suppress(SpecError):
        return plan.spec.engine
    return None


def _version(plan: ModelFile) -> str:
    """Of the TensorRT that built a plan; "" where nothing tells it."""
    built = engine_of(plan)
    return built.version if built else plan.head.version if plan.head else ""


def runs_on(built: EngineSpec, gpu: Gpu) -> bool:
    """Whether an engine was built for such a GPU."""
    if built.flavour == "tensorrt-rtx":
        return gpu.capability in (built.capabilities or CAPABILITIES)
    if built.hardware_compatible:
        return float(gpu.capability) >= _AMPERE
    return gpu.capability in built.capabilities


def gpus_of(built: EngineSpec) -> str:
    """The GPUs that an engine was built for, in words."""
    gpus = "every GPU from Ampere on"
    if not built.hardware_compatible:
        gpus = f"compute capability {', '.join(built.capabilities or CAPABILITIES)}"
    return show(gpus + (f" ({built.gpu})" if built.gpu else ""))


def require_runs_here(plan: ModelFile, version: str, gpu: Gpu) -> None:
    """Raise ArtefactError where a plan was built for another GPU, or by another version of its TensorRT."""
    by, built, hint = _version(plan), engine_of(plan), rebuild_hint(plan, gpu)
    if by and by.split(".")[:3] != version.split(".")[:3]:  # 11.4.0 of 11.4.0.106
        assert plan.head is not None
        raise ArtefactError(
            f"{plan.name} was built by {plan.head.flavour} {show(by)}, and {version} is installed here: {hint}"
        )
    if built is None:
        return
    if not runs_on(built, gpu):
        raise ArtefactError(
            f"{plan.name} was built for {gpus_of(built)}, and this is {show(gpu.name)} "
            f"({gpu.capability}): {hint}"
        )
    if built.gpu and built.gpu != gpu.name and not built.hardware_compatible:
        logger.warning(
            f"{plan.name} was built on {show(built.gpu)}, and this is {show(gpu.name)}: it may be slow or fail; {hint}"
        )


def rebuild_hint(plan: ModelFile, gpu: Gpu) -> str:
    """The command that builds an engine again on a machine with this GPU, as it was built."""
    options = _options_of(plan.spec, gpu) if engine_of(plan) else []
    onnx = source_of(plan.path)
    command = ["ddpm-export", quoted(onnx), *options, "-o", quoted(plan.path), "--force"]
    return f"build it again here, with {' '.join(command)}{_whether_there(onnx)}"


def _whether_there(onnx: Path) -> str:
    return "" if onnx.exists() else f" ({show(onnx.name)} is not beside it: the .onnx that it was built of)"


def _options_of(spec: ModelSpec, gpu: Gpu) -> list[str]:
    """Of ddpm-export, to build such an engine."""
    built = spec.engine
    assert built is not None
    rtx = built.flavour == "tensorrt-rtx" and gpu.capability in CAPABILITIES
    _, best, largest = built.batches[0]
    buckets = ",".join(str(high) for _, _, high in built.batches)
    several = len(built.batches) > 1
    options = {
        "--rtx": rtx,
        "--precision tf32": spec.precision == "tf32",
        f"--batch-buckets {buckets}": several,
        f"--max-batch {largest}": not several,
        f"--opt-batch {best}": not several and best != largest,
        "--hardware-compatible": built.hardware_compatible and not rtx,
    }
    return [option for option, given in options.items() if given]


def source_of(plan: Path) -> Path:
    """The .onnx that a plan was built of, by its name: the first that is there, else the likeliest."""
    stem = plan.stem
    names = [stem, stem.removesuffix(".rtx"), stem.removesuffix(".rtx").removesuffix(".tf32")]
    candidates = [plan.with_name(name + ONNX_SUFFIX) for name in dict.fromkeys(names)]
    return next((path for path in candidates if path.exists()), candidates[-1])


def _on_the_cpu(plan: ModelFile) -> str:
    """What to run instead of an engine; bfloat16 does not run there."""
    doctor = "ddpm-deploy doctor says what is missing"
    with suppress(SpecError):
        if plan.spec.precision == "bf16":
            return f"a CPU runs the model exported in fp32, not in bfloat16; {doctor}"
    onnx = source_of(plan.path)
    run = (
        f"on this machine's CPU run the model it was built of, ddpm-run {quoted(onnx)}{_whether_there(onnx)}"
    )
    return f"{run}; {doctor}"
