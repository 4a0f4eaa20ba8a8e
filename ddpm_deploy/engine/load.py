"""A plan → an engine, on the machine that it was built for; on any other, what to do instead."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_deploy.artefact import ONNX_SUFFIX, read_spec
from ddpm_deploy.engine.bindings import Log, load_tensorrt, log_of, made
from ddpm_deploy.errors import ArtefactError, BackendError, SpecError
from ddpm_deploy.files import quoted, show
from ddpm_deploy.gpu import Gpu, visible_gpu
from ddpm_deploy.plan import PlanHead, read_plan_head, require_trusted
from ddpm_deploy.spec import EngineSpec


@dataclass(frozen=True)
class LoadedEngine:
    """An ICudaEngine, with the module that made it, its log, and the file it came from."""

    path: Path
    trt: Any
    engine: Any
    log: Log


def load_engine(path: Path) -> LoadedEngine:
    """Load a plan on the GPU.

    Raises ArtefactError where it is damaged, not trusted, or of another GPU, version or flavour, DependencyError where
    its TensorRT is not installed, BackendError where no GPU is visible or TensorRT cannot load it.
    """
    head = read_plan_head(path)
    gpu = visible_gpu()
    if gpu is None:
        raise BackendError(f"{show(path)} needs a GPU, and no NVIDIA GPU is visible: {_on_the_cpu(path)}")
    require_trusted(path)
    trt = load_tensorrt(head.flavour)
    require_runs_here(path, head, engine_of(path), str(trt.__version__), gpu)
    log = log_of(head.flavour)
    runtime = made("a runtime", log, trt.Runtime, log.handle)  # engine_host_code_allowed stays off
    loaded = made(f"an engine of {show(path)}", log, runtime.deserialize_cuda_engine, path.read_bytes())
    return LoadedEngine(path, trt, loaded, log)


def engine_of(path: Path) -> EngineSpec | None:
    """How a plan says that it was built; None for one that another tool built."""
    try:
        return read_spec(path).engine
    except SpecError:
        return None


def require_runs_here(path: Path, head: PlanHead, built: EngineSpec | None, version: str, gpu: Gpu) -> None:
    """Raise ArtefactError where a plan was built for another GPU, or by another version of its TensorRT."""
    if _release(head.version) != _release(version):
        raise ArtefactError(
            f"{show(path)} was built by {head.flavour} {head.version}, and {version} is installed here: "
            f"{rebuild_hint(path, built)}"
        )
    if built and built.capabilities and gpu.capability not in built.capabilities:
        where = f" ({built.gpu})" if built.gpu else ""
        raise ArtefactError(
            f"{show(path)} was built for compute capability {', '.join(built.capabilities)}{where}, and this is "
            f"{gpu.name} ({gpu.capability}): {rebuild_hint(path, built)}"
        )


def rebuild_hint(path: Path, built: EngineSpec | None) -> str:
    """The command that builds an engine again here."""
    rtx = " --rtx" if built and built.flavour == "tensorrt-rtx" else ""
    return f"build it again here, with ddpm-export {quoted(source_of(path))}{rtx} -o {quoted(path)}"


def source_of(plan: Path) -> Path:
    """The .onnx that a plan was built of, by its name: the first that is there, else the likeliest."""
    stem = plan.stem
    names = [stem, stem.removesuffix(".rtx"), stem.removesuffix(".rtx").removesuffix(".tf32")]
    candidates = [plan.with_name(name + ONNX_SUFFIX) for name in dict.fromkeys(names)]
    return next((path for path in candidates if path.exists()), candidates[-1])


def _on_the_cpu(plan: Path) -> str:
    onnx = source_of(plan)
    there = "" if onnx.exists() else " (which is not beside it)"
    return (
        f"on this machine's CPU run the model it was built of, ddpm-run {quoted(onnx)}{there}; ddpm-deploy doctor says "
        "what is missing"
    )


def _release(version: str) -> tuple[str, ...]:
    """What an engine is tied to: 11.4.0 of 11.4.0.106."""
    return tuple(version.split(".")[:3])
