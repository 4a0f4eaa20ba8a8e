"""Optional packages: imported when they are needed, and when they are missing, the exact pip line."""

import importlib
import os
from importlib import metadata
from types import ModuleType

from ddpm_deploy.errors import DependencyError, one_line

# A name that a whole package has, where another module of its name, or half of it, would import as well.
_HAS = {
    "onnxruntime": "InferenceSession",
    "torch": "nn",
    "onnx": "ModelProto",
    "tensorrt": "Builder",
    "tensorrt_rtx": "Builder",
    "cupy": "RawModule",
}


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise DependencyError with the pip line of the extra that brings it."""
    try:
        found = importlib.import_module(module)
        getattr(found, _HAS.get(module, "__name__"))
        return found
    except (Exception, SystemExit) as error:  # a broken package may raise anything
        name = getattr(error, "name", None)
        if isinstance(error, ImportError) and name in (module.partition(".")[0], module):
            raise DependencyError(f"{module} is not installed: pip install 'ddpm-deploy[{extra}]'") from error
        raise DependencyError(
            f"{module} does not import ({one_line(error)}): pip install --force-reinstall 'ddpm-deploy[{extra}]'"
        ) from error


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
    the thread that does so.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if _installed("onnxruntime") and _installed("onnxruntime-gpu"):
        raise DependencyError(
            "onnxruntime and onnxruntime-gpu are both installed, and each overwrites the other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'ddpm-deploy[cpu]' or 'ddpm-deploy[gpu]'"
        )
    return require("onnxruntime", "cpu")


def onnxruntime_has_cuda() -> bool:
    """Whether an ONNX Runtime is installed that was built for CUDA; whether it works here is seen when it is used."""
    try:
        return "CUDAExecutionProvider" in require_onnxruntime().get_available_providers()
    except DependencyError:
        return False


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
