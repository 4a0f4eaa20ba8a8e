"""Which backend runs a model: one class a file, found by name, imported when it is used.

A new backend is a file beside this one with a class that follows `protocols.Network` and has
`open(model, settings) -> Network`, and a line in `_BACKENDS`.
"""

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Final

from ddpm_deploy.dependencies import onnxruntime_has_cuda, require
from ddpm_deploy.engine.bindings import require_gpu
from ddpm_deploy.engine.cache import flavour_here
from ddpm_deploy.errors import SettingError
from ddpm_deploy.machine import MOST_THREADS
from ddpm_deploy.model_file import Kind, ModelFile
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.stages import Stages, silent
from ddpm_deploy.words import BACKENDS, MAX_BATCH, RUN_PRECISIONS, Backend, RunPrecision, Weights

logger = logging.getLogger(__name__)

# Each one's class, and the kinds of file that it takes. PyTorch's stands in train/, which needs torch: named, not
# imported, as nothing here may need that.
_BACKENDS: Final[dict[Backend, tuple[str, str, tuple[Kind, ...]]]] = {
    "onnxruntime": ("ddpm_deploy.runtime.backends.onnxruntime", "OrtNetwork", ("onnx",)),
    "openvino": ("ddpm_deploy.runtime.backends.openvino", "OpenvinoNetwork", ("onnx",)),
    "tensorrt": ("ddpm_deploy.runtime.backends.tensorrt", "TrtNetwork", ("onnx", "plan")),
    "torch": ("ddpm_deploy.train.network", "TorchNetwork", ("checkpoint",)),
    "ncnn": ("ddpm_deploy.runtime.backends.ncnn", "NcnnNetwork", ("ncnn",)),
}
# Those that compute in what they are asked for when they load; the others in what their file was made for.
_CHOOSES_PRECISION: Final[tuple[Backend, ...]] = ("openvino",)


@dataclass(frozen=True)
class LoadSettings:
    """How to load a model.

    device: "cpu", "cuda" or "cuda:1"; of torch any of its devices (None: an engine on the GPU, others on the CPU).
    threads: CPU threads to use (None: as many as this process may). max_batch: rows of the batch (None: the backend's
    own). precision: to compute in, of a backend that is told when it loads (None: float32). weights: of a checkpoint.
    stages: shows how far the build of an engine is.
    """

    device: str | None = None
    threads: int | None = None
    max_batch: int | None = None
    precision: RunPrecision | None = None
    weights: Weights = "ema"
    stages: Stages = silent

    def __post_init__(self) -> None:
        if self.device == "":
            raise SettingError("the name of the device is empty: say cpu, cuda or cuda:1, or leave it out")
        for name, most in (("threads", MOST_THREADS), ("max_batch", MAX_BATCH)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise SettingError(f"{name} must be a whole number from 1 to {most}, not {value!r}")

        if self.precision not in (None, *RUN_PRECISIONS):
            raise SettingError(
                f"precision {self.precision!r} is not one to load a model in: choose {' or '.join(RUN_PRECISIONS)}"
            )

    @property
    def gpu(self) -> int | None:
        """The number of the GPU that is asked for; None for the CPU, or where nothing is said."""
        if self.device in (None, "cpu"):
            return None
        place, colon, number = str(self.device).partition(":")
        if place != "cuda" or (colon and not number.isdecimal()):
            raise SettingError(
                f"device {self.device!r} is not known: say cpu, cuda or cuda:1, or leave it out"
            )
        return int(number or 0)


def load_network(
    model: ModelFile, settings: LoadSettings | None = None, *, backend: Backend | None = None
) -> Network:
    """Load a model into a backend (None: the one for its kind of file and the device).

    Raises ArtefactError, SpecError, DependencyError, BackendError or SettingError.
    """
    settings = settings or LoadSettings()
    name = _backend_for(model, settings) if backend is None else backend
    if name not in BACKENDS:
        raise SettingError(f"backend {name!r} is not known: choose from {', '.join(BACKENDS)}")
    module, network, kinds = _BACKENDS[name]
    model.require_kind(*kinds)
    _require_precision(model, name, settings)
    if name == "torch":
        require("torch", "train")
    found: Any = getattr(importlib.import_module(module), network)
    opened: Network = found.open(model, settings)
    return opened


def _require_precision(model: ModelFile, backend: Backend, settings: LoadSettings) -> None:
    """Refuse a precision that a backend would not heed."""
    if settings.precision is not None and backend not in _CHOOSES_PRECISION:
        raise SettingError(
            f"{backend} runs {model.name} in the precision of its file, and cannot be told another: leave precision "
            f"out, or choose the backend {' or '.join(_CHOOSES_PRECISION)} for a float32 .onnx"
        )


def _backend_for(model: ModelFile, settings: LoadSettings) -> Backend:
    if model.kind == "checkpoint":
        return "torch"
    if model.kind == "plan":
        return "tensorrt"
    if model.kind == "ncnn":
        return "ncnn"
    if settings.gpu is None:
        return "onnxruntime"
    gpu = require_gpu(
        "leave device out to run on the CPU; ddpm-deploy doctor says what is missing", settings.gpu
    )
    if flavour_here(gpu) is None and onnxruntime_has_cuda():
        logger.info("no TensorRT is installed that runs on this GPU: using ONNX Runtime")
        return "onnxruntime"
    return "tensorrt"
