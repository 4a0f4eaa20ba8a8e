"""Optional packages: imported when they are needed, and when they are missing, the exact pip line."""

import importlib
import logging
import os
import re
import shlex
import sys
from contextlib import suppress
from importlib import metadata
from types import ModuleType
from typing import Final

from ddpm_deploy.errors import DependencyError, one_line
from ddpm_deploy.signals import signals_held

logger = logging.getLogger(__name__)

# A name that a whole package has, where another module of its name, or half of it, would import as well.
_HAS = {
    "onnxruntime": "InferenceSession",
    "openvino": "Core",
    "torch": "nn",
    "onnx": "ModelProto",
    "tensorrt": "Builder",
    "tensorrt_rtx": "Builder",
    "cupy": "RawModule",
    "ncnn": "Net",
}
# Packages whose modules have another name.
_PACKAGES: Final = {
    "PIL": "pillow",
    "cuda": "cuda-bindings[all]",
    "cupy": "cupy-cuda13x",
    "sklearn": "scikit-learn",
    "tensorrt": "tensorrt-cu13",
    "tensorrt_rtx": "tensorrt-rtx",
}
_NO_TELEMETRY: Final = "ORT_DISABLE_TELEMETRY"
_OPENVINO_TELEMETRY: Final = "openvino_telemetry"
ONE_ONNXRUNTIME: Final = (
    "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime  (or onnxruntime-gpu)"
)


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise DependencyError with the pip line of the extra that brings it.

    A signal waits until it is done: half an import would look like a broken package.
    """
    try:
        with signals_held(lambda: None):
            found = importlib.import_module(module)
        getattr(found, _HAS.get(module, "__name__"))
        return found
    except (Exception, SystemExit) as error:  # a broken package may raise anything
        name, top = getattr(error, "name", None), module.partition(".")[0]
        missing = isinstance(error, ImportError) and name in (top, module)
        what = "is not installed" if missing else f"does not import ({one_line(error)})"
        line = pip_install(extra, module, "" if missing else "--force-reinstall")
        raise DependencyError(f"{module} {what}: {line}") from error


def pip_install(extra: str, module: str, option: str = "") -> str:
    """The pip line that installs what an extra of ours stands for, wherever this was installed from.

    module: whose package is named alone where that cannot be known, as in a source tree that was not installed.
    """
    top = module.partition(".")[0]
    packages = _requirements(extra) or [_PACKAGES.get(top, top)]
    return " ".join(filter(None, ["pip install", option, *map(shlex.quote, packages)]))


def _requirements(extra: str) -> list[str]:
    """What an extra brings here, as our own metadata has it; its markers are equalities, all of which must hold.

    An onnxruntime-gpu that is there takes onnxruntime's place: they install over one another.
    """
    here = {"extra": extra, "sys_platform": sys.platform, "platform_machine": os.uname().machine}
    on_gpu = is_installed("onnxruntime-gpu") and not is_installed("onnxruntime")
    found = []
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("ddpm-deploy") or []:
            requirement, _, marker = line.partition(";")
            conditions = re.findall(r"(\w+) == ['\"]([^'\"]*)['\"]", marker)
            of_extra = any(name == "extra" for name, _ in conditions)
            if of_extra and all(here[name] == value for name, value in conditions):
                found.append(requirement.strip())
    return [name for name in found if not (on_gpu and re.match(r"onnxruntime\b(?!-)", name))]


def importable(module: str) -> bool:
    """Whether a package imports here."""
    try:
        importlib.import_module(module)
    except (Exception, SystemExit):
        return False
    return True


def require_onnxruntime() -> ModuleType:
    """Import onnxruntime, or raise DependencyError where it is missing or installed twice.

    Its telemetry is switched off, unless the user set that: it collects, and a process that was forked never ends for
    the thread that does so. Where somebody imported it before, that is too late, and is told once.
    """
    if "onnxruntime" in sys.modules and _NO_TELEMETRY not in os.environ:
        logger.warning(
            "onnxruntime was imported before ddpm-deploy could switch its telemetry off: it may keep a device id and "
            "events (the system, the CPU, the path of Python) in the user's cache folder, and send them; set "
            f"{_NO_TELEMETRY}=1 before that import"
        )
    os.environ.setdefault(_NO_TELEMETRY, "1")
    if is_installed("onnxruntime") and is_installed("onnxruntime-gpu"):
        raise DependencyError(
            "onnxruntime and onnxruntime-gpu are both installed, and each overwrites the other's files: "
            f"{ONE_ONNXRUNTIME}"
        )
    return require("onnxruntime", "cpu")


def require_openvino() -> ModuleType:
    """Import openvino, or raise DependencyError where it is missing.

    Its import would start a process that tells Google Analytics of it, and keep a client's id and a count in
    `~/intel`, where openvino_telemetry is installed, which pip brings with it: as if that were missing, it is silent.
    """
    if "openvino" in sys.modules:
        return require("openvino", "openvino")
    theirs = sys.modules.get(_OPENVINO_TELEMETRY)
    sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # what makes an import of it fail
    try:
        return require("openvino", "openvino")
    finally:
        del sys.modules[_OPENVINO_TELEMETRY]
        if theirs is not None:
            sys.modules[_OPENVINO_TELEMETRY] = theirs


def onnxruntime_has_cuda() -> bool:
    """Whether an ONNX Runtime is installed that was built for CUDA; whether it works here is seen when it is used."""
    try:
        return "CUDAExecutionProvider" in require_onnxruntime().get_available_providers()
    except DependencyError:
        return False


def is_installed(distribution: str) -> bool:
    """Whether a distribution is, of whatever modules."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
