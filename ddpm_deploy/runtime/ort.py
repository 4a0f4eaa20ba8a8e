"""ONNX Runtime: on the CPU as a Denoiser, on a GPU as a network there; through buffers bound once for each batch."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.artefact import read_spec
from ddpm_deploy.dependencies import require_onnxruntime
from ddpm_deploy.errors import ArtefactError, BackendError, DependencyError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.runtime.denoiser import allocate, default_max_batch
from ddpm_deploy.runtime.device import Device
from ddpm_deploy.runtime.network import allocate_on
from ddpm_deploy.spec import ModelSpec

_CPU: Final = ["CPUExecutionProvider"]
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
        self._session: Any = _open(path, self.spec, _CPU, threads)
        self.x, self.temb, self.y, self.prediction = allocate(self.spec, self.max_batch)
        arrays: dict[str, NDArray[Any]] = {"x": self.x, "temb": self.temb, "prediction": self.prediction}
        if self.spec.num_classes:
            arrays["y"] = self.y
        places = {
            name: _Place("cpu", array.dtype.type, array.shape[1:], array.ctypes.data)
            for name, array in arrays.items()
        }
        self._binding: _Binding | None = _Binding(self._session, places)

    def run(self, batch: int) -> None:
        """Predict for the leading `batch` rows."""
        if self._binding is None:
            raise BackendError("this model is closed: load it again")
        self._binding.run(batch)

    def close(self) -> None:
        """Free the session. Closing again does nothing."""
        self._session = self._binding = None


class OrtNetwork:
    """An exported network in ONNX Runtime on a GPU, in memory and on a stream of ours. Follows
    `network.DeviceNetwork`.

    device: where its memory is. max_batch: rows of the buffers. provider: of ONNX Runtime.

    Raises as OrtDenoiser, and BackendError where the provider does not work here: ONNX Runtime would run on the CPU
    instead, and say nothing.
    """

    capturable = False  # it waits and allocates as it likes

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        max_batch: int | None = None,
        spec: ModelSpec | None = None,
        provider: str = "CUDAExecutionProvider",
    ) -> None:
        self.spec, self.device = spec or read_spec(path), device
        self.max_batch = max_batch or default_max_batch(self.spec)
        self.buckets: Sequence[int] = range(1, self.max_batch + 1)
        kind = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
        self._session: Any = None
        if provider in require_onnxruntime().get_available_providers():
            providers = _CPU if kind == "cpu" else [(provider, _cuda_options(self.spec, device))]
            if kind == "cuda" and hasattr(require_onnxruntime(), "preload_dlls"):
                require_onnxruntime().preload_dlls()  # CUDA's libraries and cuDNN, out of NVIDIA's packages
            self._session = _open(path, self.spec, providers, None)
        if self._session is None or provider not in self._session.get_providers():
            raise BackendError(
                f"ONNX Runtime cannot use its {provider} here, and would run on the CPU (see ddpm-deploy doctor)"
            )
        self.memory = allocate_on(device, self.spec, self.max_batch)
        places = {
            name: _Place(
                kind, np.int64 if name == "y" else np.float32, tuple(at.shape[1:]), device.address(at)
            )
            for name, at in self.memory.items()
        }
        self._binding: _Binding | None = _Binding(self._session, places)

    def enqueue(self, bucket: int) -> None:
        """Start to predict for the leading rows."""
        if self._binding is None:
            raise BackendError("this model is closed: load it again")
        binding = self._binding
        self.device.start(lambda: binding.run(bucket))

    def close(self) -> None:
        """Free the session and the memory, once what is under way has ended."""
        if self._binding is not None:
            with suppress(BackendError):
                self.device.synchronize()
        self._session = self._binding = None
        self.memory = {}
        self.device.release()


def onnxruntime_has_cuda() -> bool:
    """Whether an ONNX Runtime is installed that was built for CUDA; whether it works here is seen when it is used."""
    try:
        return "CUDAExecutionProvider" in require_onnxruntime().get_available_providers()
    except DependencyError:
        return False


def _cuda_options(spec: ModelSpec, device: Device) -> dict[str, str]:
    """Our stream, the precision that was asked for (TF32 is on by default there), and the same algorithms each time."""
    return {
        "user_compute_stream": str(device.stream),
        "use_tf32": "1" if spec.precision == "tf32" else "0",
        "cudnn_conv_algo_search": "HEURISTIC",
    }


@dataclass(frozen=True)
class _Place:
    """Memory of an input or the output: on "cpu" or "cuda", its type, a row's shape, its address."""

    device: str
    dtype: type[np.generic]
    shape: tuple[int, ...]
    address: int


class _Binding:
    """A session over memory at fixed places, bound anew where the batch changes."""

    def __init__(self, session: Any, places: dict[str, _Place]) -> None:
        self._session, self._places = session, places
        self._binding: Any = session.io_binding()
        self._options: Any = require_onnxruntime().RunOptions()
        self._options.add_run_config_entry(
            "disable_synchronize_execution_providers", "1"
        )  # it is the stream's
        self._bound = 0

    def run(self, batch: int) -> None:
        """Predict for the leading `batch` rows."""
        try:
            if batch != self._bound:
                self._bind(batch)
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on a batch of {batch}: {first_line(error)} (a smaller batch needs less memory)"
            ) from error

    def _bind(self, batch: int) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for name, place in self._places.items():
            bind = self._binding.bind_output if name == "prediction" else self._binding.bind_input
            bind(name, place.device, 0, place.dtype, [batch, *place.shape], place.address)
        self._bound = batch


def _open(path: Path, spec: ModelSpec, providers: list[Any], threads: int | None) -> Any:
    """A session that has the interface of the contract."""
    onnxruntime = require_onnxruntime()
    hint = (
        " (it has no bfloat16 on a CPU: this file is for building an engine)"
        if spec.precision == "bf16"
        else ""
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it logs, it also raises
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    # Its threads spin while a network runs, and leave the cores to others between two runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if providers != _CPU:  # nothing of it may run there instead, unseen
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise ArtefactError(
            f"{show(path)}: ONNX Runtime cannot load it: {first_line(error)}{hint}"
        ) from error
    _require_interface(session, spec, path)
    return session


def _require_interface(session: Any, spec: ModelSpec, path: Path) -> None:
    """The graph must have the inputs and the output of the contract, in the shapes of the spec."""
    floats = "tensor(float)"
    inputs: _Side = {"x": (floats, list(spec.image_shape)), "temb": (floats, [spec.embedding.dim])}
    if spec.num_classes:
        inputs["y"] = "tensor(int64)", []
    wanted = inputs, {"prediction": (floats, list(spec.prediction_shape))}
    sides = session.get_inputs(), session.get_outputs()
    got = tuple({a.name: (a.type, a.shape[1:]) for a in side if a.shape} for side in sides)
    if got != wanted or any(len(side) != len(named) for side, named in zip(sides, wanted, strict=True)):
        raise ArtefactError(
            f"{show(path)} does not fit its ModelSpec: it has {_interface(got)}, and {_interface(wanted)} is "
            "needed: export it again with ddpm-export"
        )
    if any(isinstance(argument.shape[0], int) for side in sides for argument in side):
        raise ArtefactError(f"{show(path)} has a fixed batch dimension: export it again with ddpm-export")


def _interface(sides: tuple[_Side, ...]) -> str:
    texts = [
        ", ".join(
            f"{name} {kind} ({', '.join(map(str, ['B', *shape]))})" for name, (kind, shape) in side.items()
        )
        for side in sides
    ]
    return " → ".join(text or "nothing" for text in texts)
