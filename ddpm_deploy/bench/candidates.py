"""Which backends there are for a model's file."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ddpm_deploy.dependencies import pip_install
from ddpm_deploy.model_file import Kind, ModelFile
from ddpm_deploy.words import Backend, Precision, RunPrecision


@dataclass(frozen=True)
class Candidate:
    """A backend for a file. asked: the precision that is asked of it; None where it runs the file as that is."""

    model: ModelFile
    backend: Backend
    asked: RunPrecision | None = None

    @property
    def precision(self) -> Precision:
        """Of its network."""
        return self.asked or self.model.spec.precision

    @property
    def words(self) -> str:
        """What asks a command line for it."""
        return f"--backend {self.backend}" + f" --precision {self.asked}" * bool(self.asked)


# What takes each kind of file, its own backend first, and the precisions that are asked of it.
_TAKES: Final[dict[Kind, tuple[tuple[Backend, RunPrecision | None], ...]]] = {
    "onnx": (("onnxruntime", None), ("openvino", "fp32"), ("openvino", "bf16")),
    "ncnn": (("ncnn", None),),
    "plan": (("tensorrt", None),),
    "checkpoint": (("torch", None),),
    "foreign": (),
}
# The package of each backend, and the extra that brings it.
_PACKAGES: Final[dict[Backend, tuple[str, str]]] = {
    "onnxruntime": ("onnxruntime", "cpu"),
    "openvino": ("openvino", "openvino"),
    "ncnn": ("ncnn", "ncnn"),
    "tensorrt": ("tensorrt", "gpu"),
    "torch": ("torch", "train"),
}


def candidates(models: Sequence[ModelFile]) -> list[Candidate]:
    """Those whose package is installed, by model; a file in half precision is run as it is, by its own backend."""
    return [
        Candidate(model, backend, asked)
        for model in models
        for backend, asked in _TAKES[model.kind]
        if not missing(backend) and (asked is None or model.spec.precision == "fp32")
    ]


def not_installed(models: Sequence[ModelFile]) -> dict[Backend, str]:
    """The backends that would take one of these models, were they installed, each with its pip line."""
    takers = {backend: "" for model in models for backend, _ in _TAKES[model.kind]}
    return {backend: pip for backend in takers if (pip := missing(backend))}


def missing(backend: Backend) -> str:
    """The pip line that installs a backend's package; "" where it is there."""
    module, extra = _PACKAGES[backend]
    return "" if importlib.util.find_spec(module) else pip_install(extra, module)
