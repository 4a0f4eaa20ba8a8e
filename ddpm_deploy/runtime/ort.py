"""ONNX Runtime as a Denoiser, through buffers bound once for each batch size."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ddpm_deploy.artefact import read_spec
from ddpm_deploy.dependencies import require_onnxruntime
from ddpm_deploy.errors import ArtefactError, BackendError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.runtime.denoiser import allocate, default_max_batch
from ddpm_deploy.spec import ModelSpec

_Side = dict[str, tuple[str, list[Any]]]  # inputs or outputs: type and shape behind B, by name


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
        self.x, self.temb, self.y, self.prediction = allocate(self.spec, self.max_batch)
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
        floats = "tensor(float)"
        inputs: _Side = {
            "x": (floats, list(self.spec.image_shape)),
            "temb": (floats, [self.spec.embedding.dim]),
        }
        if self.spec.num_classes:
            inputs["y"] = "tensor(int64)", []
        wanted = inputs, {"prediction": (floats, list(self.spec.prediction_shape))}
        sides = self._session.get_inputs(), self._session.get_outputs()
        got = tuple({a.name: (a.type, a.shape[1:]) for a in side if a.shape} for side in sides)
        if got != wanted or any(len(side) != len(named) for side, named in zip(sides, wanted, strict=True)):
            raise ArtefactError(
                f"{show(path)} does not fit its ModelSpec: it has {_interface(got)}, and {_interface(wanted)} is "
                "needed: export it again with ddpm-export"
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
        inputs: dict[str, NDArray[Any]] = {"x": self.x, "temb": self.temb}
        if self.spec.num_classes:
            inputs["y"] = self.y
        for name, buffer in inputs.items():
            self._binding.bind_input(name, *_where(buffer, batch))
        self._binding.bind_output("prediction", *_where(self.prediction, batch))
        self._bound = batch

    def close(self) -> None:
        """Free the session. Closing again does nothing."""
        self._session = self._binding = None


def _where(buffer: NDArray[Any], batch: int) -> tuple[object, ...]:
    """The leading rows of a buffer, as ONNX Runtime binds them: device, its number, type, shape, address."""
    return "cpu", 0, buffer.dtype.type, [batch, *buffer.shape[1:]], buffer.ctypes.data


def _interface(sides: tuple[_Side, ...]) -> str:
    texts = [
        ", ".join(
            f"{name} {kind} ({', '.join(map(str, ['B', *shape]))})" for name, (kind, shape) in side.items()
        )
        for side in sides
    ]
    return " → ".join(text or "nothing" for text in texts)
