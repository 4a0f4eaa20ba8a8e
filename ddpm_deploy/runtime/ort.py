"""ONNX Runtime as a Denoiser, through buffers bound once for each batch size."""

from pathlib import Path
from typing import Any

import numpy as np

from ddpm_deploy.artefact import read_spec
from ddpm_deploy.dependencies import require_onnxruntime
from ddpm_deploy.errors import ArtefactError, BackendError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.runtime.denoiser import allocate, default_max_batch
from ddpm_deploy.spec import ModelSpec


class OrtDenoiser:
    """An exported network in ONNX Runtime's CPU provider. Follows `denoiser.Denoiser`.

    path: the .onnx file. threads: of the pool (None: one a core). max_batch: rows of the buffers.
    spec: in place of the file's own, for a graph that carries none.

    Raises ArtefactError, SpecError or DependencyError where it cannot be loaded, BackendError where
    ONNX Runtime fails at it.
    """

    device = "cpu"

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        max_batch: int | None = None,
        spec: ModelSpec | None = None,
    ) -> None:
        self.spec = spec or read_spec(path)
        self.max_batch = max_batch or default_max_batch(self.spec)
        onnxruntime = require_onnxruntime()
        self._session = self._open(onnxruntime, path, threads)
        self._check_interface(path)
        self.x, self.temb, self.prediction = allocate(self.spec, self.max_batch)
        self._binding: Any = self._session.io_binding()
        self._bound = 0

    def _open(self, onnxruntime: Any, path: Path, threads: int | None) -> Any:
        bf16 = self.spec.precision == "bf16"
        hint = " (it has no bfloat16 on a CPU: this file is for building an engine)" if bf16 else ""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it logs, it also raises
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Its threads spin while a network runs, and leave the cores to others between two runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ArtefactError(
                f"{show(path)}: ONNX Runtime cannot load it: {first_line(error)}{hint}"
            ) from error

    def _check_interface(self, path: Path) -> None:
        """The graph must have the inputs and the output of the contract, in the shapes of the spec."""
        image = list(self.spec.image_shape)
        wanted = {"x": image, "temb": [self.spec.embedding.dim]}, {"prediction": image}
        sides = self._session.get_inputs(), self._session.get_outputs()
        got = tuple(
            {a.name: a.shape[1:] for a in side if a.type == "tensor(float)" and a.shape} for side in sides
        )
        if got != wanted or any(len(side) != len(named) for side, named in zip(sides, wanted, strict=True)):
            raise ArtefactError(
                f"{show(path)} does not fit its ModelSpec: it has {_interface(got)} in float32, and "
                f"{_interface(wanted)} is needed: export it again with ddpm-export"
            )
        if any(isinstance(argument.shape[0], int) for side in sides for argument in side):
            raise ArtefactError(f"{show(path)} has a fixed batch dimension: export it again with ddpm-export")

    def run(self, batch: int) -> None:
        """Predict for the leading `batch` rows."""
        if self._session is None:
            raise BackendError("this model is closed: load it again")
        try:
            if batch != self._bound:
                self._bind(batch)
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on a batch of {batch}: {first_line(error)} (a smaller batch needs less memory)"
            ) from error

    def _bind(self, batch: int) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for bind, name, buffer in (
            (self._binding.bind_input, "x", self.x),
            (self._binding.bind_input, "temb", self.temb),
            (self._binding.bind_output, "prediction", self.prediction),
        ):
            bind(name, "cpu", 0, np.float32, [batch, *buffer.shape[1:]], buffer.ctypes.data)
        self._bound = batch

    def close(self) -> None:
        """Free the session. Closing again does nothing."""
        self._session = self._binding = None


def _interface(sides: tuple[dict[str, list[Any]], ...]) -> str:
    texts = [
        ", ".join(f"{name} (B, {', '.join(map(str, shape))})" for name, shape in side.items())
        for side in sides
    ]
    return " → ".join(text or "nothing" for text in texts)
