"""A TensorRT engine, of either flavour, as a network on a GPU."""

import math
from pathlib import Path
from typing import Any, Self

import numpy as np

from ddpm_deploy.artefact import read_spec
from ddpm_deploy.engine.bindings import MODULES, made
from ddpm_deploy.engine.load import LoadedEngine, load_engine
from ddpm_deploy.errors import ArtefactError, BackendError
from ddpm_deploy.files import show
from ddpm_deploy.plan import read_plan_head
from ddpm_deploy.runtime.device import Cuda, Device
from ddpm_deploy.spec import ModelSpec


class TrtNetwork:
    """An engine. Follows `network.DeviceNetwork`.

    spec: of its network. device: where its memory is. max_batch: rows of the buffers, at most the engine's own (None:
    that).

    A batch smaller than the smallest of the engine's profiles is padded to that.

    Raises ArtefactError where the engine does not fit its spec, BackendError where TensorRT or the GPU fails.
    """

    capturable = True

    def __init__(
        self, loaded: LoadedEngine, spec: ModelSpec, device: Device, max_batch: int | None = None
    ) -> None:
        self.spec, self.device = spec, device
        self._log = loaded.log
        self._shapes = {"x": spec.image_shape, "temb": (spec.embedding.dim,)} | (
            {"y": ()} if spec.num_classes else {}
        )
        _require_interface(loaded, self._shapes, spec.prediction_shape)
        self._profiles = _profiles(loaded.engine)
        largest = max(high for _, high in self._profiles)
        self.max_batch = min(max_batch or largest, largest)
        self._require_memory(loaded.engine)
        self._engine, self._context = loaded.engine, self._make_context(loaded.trt, loaded.engine)
        self.memory = self._bind_memory()
        self._bound = 0

    @classmethod
    def load(cls, path: Path, *, max_batch: int | None = None, spec: ModelSpec | None = None) -> Self:
        """Load a .plan file, with its digest beside it, on the first visible GPU; spec: in place of the file's own.

        Raises also SpecError, DependencyError, and what `load_engine` raises.
        """
        loaded = load_engine(path)
        _, extra = MODULES[read_plan_head(path).flavour]
        return cls(loaded, spec or read_spec(path), Cuda(extra), max_batch)

    def _bind_memory(self) -> dict[str, Any]:
        """Memory on the device for each input and the output, for as long as the engine is loaded."""
        _, rows = self._rows(self.max_batch)
        memory = {
            name: self.device.empty((rows, *shape), _dtype(name))
            for name, shape in {**self._shapes, "prediction": self.spec.prediction_shape}.items()
        }
        for name, place in memory.items():
            self.device.upload(
                np.zeros(place.shape, _dtype(name)), place
            )  # labels of padded rows are looked up
            taken = self._context.set_tensor_address(name, self.device.address(place))
            self._must(taken, f"the address of {name}")
        return memory

    def _require_memory(self, cuda_engine: Any) -> None:
        """Say which batch would fit, where the engine's does not."""
        _, rows = self._rows(self.max_batch)
        numbers = sum(
            map(math.prod, (*self._shapes.values(), self.spec.prediction_shape, self.spec.image_shape))
        )
        needed, free = cuda_engine.device_memory_size_v2 + 4 * rows * numbers, self.device.free()
        if needed > free:
            fits = self.max_batch * free // needed
            raise BackendError(
                f"batches of {self.max_batch} need {needed / 2**20:.0f} MiB of the GPU's memory, and "
                f"{free / 2**20:.0f} MiB are left: "
                + (f"build the engine for --max-batch {fits}" if fits else "free some, or use a larger GPU")
            )

    def _make_context(self, trt: Any, cuda_engine: Any) -> Any:
        """The one execution context, over scratch memory of ours."""
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = made("an execution context", self._log, cuda_engine.create_execution_context, strategy)
        size = cuda_engine.device_memory_size_v2
        self._scratch = self.device.empty((max(size, 1),), np.uint8)
        context.set_device_memory(self.device.address(self._scratch), size)
        return context

    def enqueue(self, batch: int) -> None:
        """Start to predict for the leading `batch` rows."""
        if self._context is None:
            raise BackendError("this model is closed: load it again")
        if batch != self._bound:
            self._bind(batch)
        self._must(self._context.execute_async_v3(self.device.stream), f"a batch of {batch}")

    def _bind(self, batch: int) -> None:
        """Choose the profile and set the shapes for a batch."""
        self._bound = 0  # until all of it is done
        profile, rows = self._rows(batch)
        if self._context.active_optimization_profile != profile:
            chosen = self._context.set_optimization_profile_async(profile, self.device.stream)
            self._must(chosen, f"profile {profile}")
        for name, shape in self._shapes.items():
            self._must(
                self._context.set_input_shape(name, (rows, *shape)), f"the shape {(rows, *shape)} of {name}"
            )
        self._bound = batch

    def _rows(self, batch: int) -> tuple[int, int]:
        """The profile for a batch, the one with the smallest largest batch, and the rows to run there."""
        fitting = [(high, low, index) for index, (low, high) in enumerate(self._profiles) if high >= batch]
        _, low, index = min(fitting)
        return index, max(batch, low)

    def _must(self, succeeded: bool, what: str) -> None:
        """TensorRT says no by False, and why in its log."""
        if not succeeded:
            raise BackendError(f"TensorRT refused {what}: {self._log.reason('it does not say why')}")

    def close(self) -> None:
        """Free the engine and its memory."""
        self._context = self._engine = self._scratch = None
        self.memory = {}
        self.device.release()


def _dtype(name: str) -> np.dtype[Any]:
    """Of an input or the output."""
    return np.dtype(np.int64 if name == "y" else np.float32)


def _profiles(cuda_engine: Any) -> list[tuple[int, int]]:
    """The smallest and largest batch of each optimisation profile."""
    shapes = [
        cuda_engine.get_tensor_profile_shape("x", index)
        for index in range(cuda_engine.num_optimization_profiles)
    ]
    return [(int(smallest[0]), int(largest[0])) for smallest, _, largest in shapes]


def _require_interface(
    loaded: LoadedEngine, inputs: dict[str, tuple[int, ...]], prediction: tuple[int, ...]
) -> None:
    """The engine must have the inputs and the output of the contract, in the shapes of the spec."""
    trt, cuda_engine = loaded.trt, loaded.engine
    types = {"y": trt.DataType.INT64}
    wanted = {
        name: (trt.TensorIOMode.INPUT, types.get(name, trt.DataType.FLOAT), shape)
        for name, shape in inputs.items()
    }
    wanted["prediction"] = (trt.TensorIOMode.OUTPUT, trt.DataType.FLOAT, prediction)
    names = [cuda_engine.get_tensor_name(index) for index in range(cuda_engine.num_io_tensors)]
    got = {
        name: (
            cuda_engine.get_tensor_mode(name),
            cuda_engine.get_tensor_dtype(name),
            tuple(cuda_engine.get_tensor_shape(name))[1:],
        )
        for name in names
    }
    if got != wanted:
        raise ArtefactError(
            f"{show(loaded.path)} does not fit its ModelSpec: it has {show(str(got))}, and {wanted} is needed: build "
            "it again with ddpm-export"
        )
