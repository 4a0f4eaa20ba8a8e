"""Build on arrival: an engine made once for the machine that an .onnx file has come to, and kept."""

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from ddpm_deploy.artefact import read_spec
from ddpm_deploy.dependencies import importable
from ddpm_deploy.engine.bindings import load_tensorrt, require_builder, require_gpu
from ddpm_deploy.engine.build import (
    CAPABILITIES,
    EngineSettings,
    build_engine,
    default_max_batch,
    engine_spec,
)
from ddpm_deploy.errors import DdpmDeployError, OutputError
from ddpm_deploy.files import show
from ddpm_deploy.gpu import visible_gpu
from ddpm_deploy.plan import require_trusted
from ddpm_deploy.spec import Flavour, ModelSpec
from ddpm_deploy.stages import Stages, silent

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")


def cache_folder() -> Path:
    """The user's own: $XDG_CACHE_HOME/ddpm-deploy, else ~/.cache/ddpm-deploy."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm-deploy"


def timing_cache_path(flavour: Flavour, gpu: str) -> Path | None:
    """Where TensorRT's measurements of one kind of GPU are kept; None for TensorRT-RTX, which measures nothing."""
    if flavour != "tensorrt":
        return None
    version = load_tensorrt(flavour).__version__
    return cache_folder() / f"timing-{version}-{'-'.join(gpu.split()) or 'gpu'}.cache"


def settings_here(spec: ModelSpec, max_batch: int | None) -> EngineSettings:
    """How to build a model on this machine: by TensorRT, or where that is not installed by TensorRT-RTX.

    Raises BackendError where no GPU is visible, DependencyError where neither is installed.
    """
    require_gpu()
    gpu = visible_gpu()
    assert gpu is not None
    flavour: Flavour = "tensorrt"
    if not importable("tensorrt") and importable("tensorrt_rtx") and gpu.capability in CAPABILITIES:
        flavour = "tensorrt-rtx"
    load_tensorrt(flavour)  # with the line that installs it
    largest = max_batch or default_max_batch(spec)
    return EngineSettings(
        flavour=flavour,
        batches=((1, largest, largest),),
        capabilities=(gpu.capability,) if flavour == "tensorrt-rtx" else (),
        timing_cache=timing_cache_path(flavour, gpu.name),
    )


def built_on_arrival(
    onnx: Path,
    settings: EngineSettings,
    load: Callable[[Path], Loaded],
    *,
    folder: Path | None = None,
    stages: Stages = silent,
) -> Loaded:
    """What `load` makes of the engine of an .onnx file, which is built where it is not in the cache, and says so.

    An engine is looked up by all that it depends on: the file, TensorRT, the GPU, the driver and the settings. Of
    several processes that ask at once one builds, and the others wait for it. A cached engine that does not load is
    built again, with a warning. folder: of the cache (None: `cache_folder`).

    Raises what `build_engine` and `load` raise, OutputError where the cache cannot be written.
    """
    plan = (folder or cache_folder() / "engines") / f"{_key(onnx, settings)}.plan"
    with _locked(plan.with_suffix(".lock")):
        if plan.exists():
            try:
                require_trusted(plan)
                return load(plan)
            except DdpmDeployError as error:
                logger.warning("the cached engine does not load, and is built again: %s", error)
        logger.info(
            "building an engine of %s for this machine, once: it is kept in %s", show(onnx), show(plan)
        )
        try:
            build_engine(onnx, plan, settings, stages)
        except OutputError as error:
            raise OutputError(f"{error} (XDG_CACHE_HOME names another place for the cache)") from error
    return load(plan)


def _key(onnx: Path, settings: EngineSettings) -> str:
    """Of the file's bytes, not of the weights alone, as a graph may change with them the same."""
    trt = require_builder(settings.flavour, refittable=settings.refittable)
    spec = engine_spec(read_spec(onnx), settings, str(trt.__version__))
    with onnx.open("rb") as file:
        key = hashlib.file_digest(file, "sha256")
    built = (spec.engine, spec.precision, settings.workspace, settings.level, settings.hardware_compatible)
    key.update(msgspec.json.encode(built))
    return key.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise OutputError(
            f"the cache of engines {show(path.parent)} cannot be written: {error.strerror} (XDG_CACHE_HOME names "
            "another place for it)"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.info("another process builds this engine: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
