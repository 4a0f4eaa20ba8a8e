"""Build on arrival: an engine made once for the machine that an .onnx file has come to, and kept."""

import fcntl
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from ddpm_deploy.dependencies import importable
from ddpm_deploy.engine.bindings import load_tensorrt, require_builder, require_gpu
from ddpm_deploy.engine.build import (
    EngineSettings,
    build_engine,
    default_engine_batch,
    engine_spec,
)
from ddpm_deploy.errors import ArtefactError, OutputError
from ddpm_deploy.files import atomic, quoted, show
from ddpm_deploy.gpu import Gpu, driver, visible_gpu
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.stages import Stages, silent
from ddpm_deploy.version import __version__
from ddpm_deploy.words import CAPABILITIES, Flavour

logger = logging.getLogger(__name__)
Loaded = TypeVar("Loaded")
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """The user's own: $XDG_CACHE_HOME/ddpm-deploy, else ~/.cache/ddpm-deploy.

    Raises OutputError where there is no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if Path(given).is_absolute():  # others are to be ignored, by its specification
        return Path(given) / "ddpm-deploy"
    try:
        return Path.home() / ".cache" / "ddpm-deploy"
    except RuntimeError as error:
        raise OutputError(f"there is no folder for the cache ({error}): set XDG_CACHE_HOME") from error


def with_timing_cache(settings: EngineSettings) -> EngineSettings:
    """The settings with the user's own timing cache where they name none, for this GPU and TensorRT."""
    gpu = visible_gpu(settings.gpu)
    if settings.timing_cache or settings.flavour != "tensorrt" or gpu is None:
        return settings
    version = load_tensorrt("tensorrt").__version__
    name = f"timing-{version}-{'-'.join(gpu.name.split())}.cache"
    return replace(settings, timing_cache=cache_folder() / name)


def flavour_here(gpu: Gpu) -> Flavour | None:
    """Which TensorRT builds and runs on this GPU, of those that are installed; None where none does."""
    if importable("tensorrt"):
        return "tensorrt"
    return "tensorrt-rtx" if importable("tensorrt_rtx") and gpu.capability in CAPABILITIES else None


def settings_here(spec: ModelSpec, max_batch: int | None, index: int = 0) -> EngineSettings:
    """How to build a model for the GPU of that number. max_batch: of which there may be less in use than the engine
    can.

    Raises BackendError where that GPU is not visible, DependencyError where no TensorRT is installed that could.
    """
    gpu = require_gpu("leave backend and device out to run on the CPU", index)
    flavour = flavour_here(gpu) or "tensorrt"
    load_tensorrt(flavour)  # with the line that installs it
    largest = max(max_batch or 1, default_engine_batch(spec))
    own = (gpu.capability,) if flavour == "tensorrt-rtx" else ()
    return with_timing_cache(EngineSettings(flavour, _tuned(largest), capabilities=own, gpu=index))


def _tuned(largest: int) -> tuple[tuple[int, int, int], ...]:
    """Profiles for every batch up to the largest, tuned for 1, a middle and the largest.

    TensorRT tunes a profile for its best batch alone: tuned for 64, it is slow at 1.
    """
    middle = min(largest, 1 << largest.bit_length() // 2)  # between the two in the number of doublings
    tops = sorted({1, middle, largest})
    return tuple((below + 1, top, top) for below, top in zip([0, *tops], tops, strict=False))


def built_on_arrival(
    onnx: ModelFile,
    settings: EngineSettings,
    load: Callable[[ModelFile], Loaded],
    *,
    folder: Path | None = None,
    stages: Stages = silent,
) -> Loaded:
    """What `load` makes of the engine of an .onnx file, which is built where it is not in the cache, and says so.

    An engine is looked up by all that it depends on: the file, TensorRT, the GPU, the driver and the settings. Of
    several processes that ask at once one builds, and the others wait for it. A cached engine that cannot be used (an
    ArtefactError of `load`) is built again, with a warning. folder: of the cache (None: `cache_folder`).

    Raises what `build_engine` and `load` raise, OutputError where the cache cannot be written, or where others may
    write to it: nothing is loaded from such a one.
    """
    plan = (folder or cache_folder() / "engines") / f"{_key(onnx, settings)}.plan"
    # First without the lock, as others may be reading it too; then another process may have built it by now.
    if (loaded := _if_there(plan, load, logging.DEBUG)) is not None:
        return loaded
    with _locked(plan.with_suffix(".lock")):
        if (loaded := _if_there(plan, load, logging.WARNING)) is not None:
            return loaded
        logger.info(f"no engine of {onnx.name} is kept for this machine: one is built, once, as {show(plan)}")
        try:
            build_engine(onnx, plan, settings, stages=stages)
            plan.chmod(0o600)  # whatever the umask
        except OutputError as error:
            raise OutputError(f"{error} (XDG_CACHE_HOME names another place for the cache)") from error
        return load(open_model(plan))


def kernels_path(plan: ModelFile, version: str, index: int) -> Path:
    """Where the kernels are kept that TensorRT-RTX of a version compiles of an engine, for the GPU of that number."""
    found = driver()
    gpu = found.gpus[index]
    all_of_it = plan.digest, version, found.version, gpu.name, gpu.capability
    name = hashlib.sha256(msgspec.json.encode(all_of_it)).hexdigest()
    return cache_folder() / "kernels" / f"{name}.kernels"


def kept_kernels(path: Path) -> bytes:
    """What is kept, or b"": what somebody else may have put there is left alone, as it would be run; that is said."""
    try:
        if os.path.lexists(path):
            _require_own_file(path)
            return path.read_bytes()
    except (OutputError, OSError) as error:
        logger.warning("the kept kernels are not used, and are compiled again: %s", error)
    return b""


def keep_kernels(path: Path, kernels: memoryview) -> None:
    """Keep them for other processes, whole or not at all; where that cannot be, it is said and costs nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_own(path.parent)
        with atomic(path) as temporary:
            temporary.write_bytes(kernels)
            temporary.chmod(0o600)
    except (OutputError, OSError) as error:
        logger.warning("the compiled kernels were not kept: %s", error)


def _if_there(plan: Path, load: Callable[[ModelFile], Loaded], level: int) -> Loaded | None:
    """What is in the cache, if it can be used; where it cannot that is said at `level`.

    Raises OutputError for an engine that somebody else may have put there while the cache was open to them.
    """
    if not os.path.lexists(plan):
        return None
    _require_own_file(plan)
    try:
        return load(open_model(plan))
    except ArtefactError as error:
        logger.log(level, "the cached engine cannot be used, and is built again: %s", error)
        return None


def _key(onnx: ModelFile, settings: EngineSettings) -> str:
    """Of the file's bytes, not of the weights alone, as a graph may change with them the same; and of this product's
    version, as another builds otherwise."""
    trt = require_builder(settings.flavour, settings.gpu)
    found, own = driver(), slice(settings.gpu, settings.gpu + 1)
    machine = (found.version, found.cuda, [(gpu.name, gpu.capability) for gpu in found.gpus[own]])
    how = msgspec.structs.astuple(engine_spec(onnx.spec, settings, str(trt.__version__)))
    all_of_it = onnx.digest, __version__, machine, how, settings.workspace, settings.level
    return hashlib.sha256(msgspec.json.encode(all_of_it)).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_own(path.parent)
        file = path.open("a")  # which leaves alone what it may be a link to
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process builds this engine: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise OutputError(
            f"the cache of engines {show(path.parent)} cannot be used: {error.strerror or error} (XDG_CACHE_HOME names "
            "another place for it)"
        ) from error
    with file:
        yield


def _require_own_file(path: Path) -> None:
    """Raise OutputError where anybody else may have written a file of the cache."""
    _require_own(path.parent)
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & _WRITABLE_BY_OTHERS:  # which every link is
        raise OutputError(f"{show(path)}, in the cache of engines, may be somebody else's: remove it")


def _require_own(folder: Path) -> None:
    """Raise OutputError where anybody else may put a file into the cache: engines are native code."""
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise OutputError(
            f"the cache of engines {show(folder)} is another user's, and what is in it is run: set XDG_CACHE_HOME to a "
            "folder of your own"
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise OutputError(
            f"others may write to the cache of engines {show(folder)}, and what is in it is run: empty it, then "
            f"chmod go-w {quoted(folder)}; or set XDG_CACHE_HOME to a folder of your own"
        )
