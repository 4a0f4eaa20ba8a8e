"""A TensorRT engine, of either flavour, as a network on a GPU."""

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from ddpm_deploy.engine.bindings import MODULES, as_bytes, made
from ddpm_deploy.engine.cache import (
    built_on_arrival,
    keep_kernels,
    kept_kernels,
    kernels_path,
    settings_here,
)
from ddpm_deploy.engine.load import LoadedEngine, load_engine
from ddpm_deploy.errors import ArtefactError, BackendError, OutputError, SettingError
from ddpm_deploy.files import show
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.backends import LoadSettings
from ddpm_deploy.runtime.device.cuda import Cuda
from ddpm_deploy.runtime.device.kernel import require_nvrtc
from ddpm_deploy.runtime.network import allocate, bucket_sizes, require_open
from ddpm_deploy.spec import ModelSpec

logger = logging.getLogger(__name__)


class TrtNetwork:
    """An engine. Follows `protocols.Network`.

    spec: of its network. device: where its memory is. max_batch: rows of the buffers, at most the engine's own (None:
    that). kernels: the file of what TensorRT-RTX compiles of it on this GPU, for other processes too (None: it is not
    kept).

    Each bucket has an execution context of its own, whose profile, shapes and addresses are set once; all share their
    scratch memory, as one runs at a time. Where a profile takes a range of sizes, its buckets are powers of two.

    Raises ArtefactError where the engine does not fit its spec, BackendError where TensorRT or the GPU fails.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        spec: ModelSpec,
        device: Cuda,
        max_batch: int | None = None,
        kernels: Path | None = None,
    ) -> None:
        self.spec, self.device, self._log = spec, device, loaded.log
        _require_interface(loaded, spec)
        profiles = _profiles(loaded.engine)
        largest = max(high for _, high in profiles)
        self.max_batch = min(max_batch or largest, largest)
        self.buckets: Sequence[int] = _buckets(profiles, self.max_batch)
        config = self._runtime_config(loaded)
        if not hasattr(config, "create_runtime_cache"):  # TensorRT compiled when it built
            kernels = None
        known = kept_kernels(kernels) if kernels else b""
        self._compiled: Any = self._runtime_cache(config, known) if kernels else None
        self._contexts = {
            bucket: self._make_context(loaded, config, profiles, bucket) for bucket in self.buckets
        }
        self._give_memory()
        if kernels:
            self._keep(kernels, known)
        # TensorRT-RTX tells whether what it runs can be captured; TensorRT always can.
        self.capturable = all(
            not hasattr(context, "is_stream_capturable") or context.is_stream_capturable(device.stream)
            for context in self._contexts.values()
        )

    @classmethod
    def open(cls, model: ModelFile, settings: LoadSettings) -> Self:
        """Load an engine, with its digest beside it, on a GPU; or that of an .onnx file, which is built here, once."""
        if settings.device == "cpu":
            raise SettingError(
                f"TensorRT runs on a GPU: leave device out, or run {model.name} by onnxruntime"
            )
        index = settings.gpu or 0
        if model.kind == "plan":
            return cls._loaded(model, settings, index)
        how = settings_here(model.spec, settings.max_batch, index)
        _, extra = MODULES[how.flavour]
        require_nvrtc(extra)  # what is missing to run it is told before minutes of building
        with Cuda(index, extra).here():
            return built_on_arrival(
                model, how, lambda plan: cls._loaded(plan, settings, index), stages=settings.stages
            )

    @classmethod
    def _loaded(cls, plan: ModelFile, settings: LoadSettings, index: int) -> Self:
        assert plan.head is not None
        _, extra = MODULES[plan.head.flavour]

        @cache
        def device() -> Cuda:
            """Asked for once the plan was found to fit this machine."""
            return Cuda(index, extra)

        # TensorRT works on the device that is the thread's.
        loaded = load_engine(plan, index, lambda: device().here())
        with device().here():
            kernels = None
            if plan.head.flavour == "tensorrt-rtx":
                try:
                    kernels = kernels_path(plan, str(loaded.trt.__version__), index)
                except OutputError as error:  # it works without
                    logger.warning(f"{error}: the kernels of this engine are compiled in every process")
            return cls(loaded, plan.spec, device(), settings.max_batch, kernels)

    def _runtime_config(self, loaded: LoadedEngine) -> Any:
        """How every context is made."""
        trt, cuda_engine = loaded.trt, loaded.engine
        runtime_config = made("a runtime configuration", self._log, cuda_engine.create_runtime_config)
        runtime_config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # TensorRT-RTX would compile in the background, and run other kernels until then: a graph would keep those.
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        return runtime_config

    def _runtime_cache(self, runtime_config: Any, known: bytes) -> Any:
        """The cache that every context compiles into, with what is known of before."""
        runtime_cache = made("a cache of kernels", self._log, runtime_config.create_runtime_cache)
        if known and not runtime_cache.deserialize(known):
            why = self._log.reason("they are damaged, or of another version, driver or GPU")
            logger.warning(f"the kept kernels are not used, and are compiled again: {why}")
        self._must(runtime_config.set_runtime_cache(runtime_cache), "its cache of kernels")
        return runtime_cache

    def _keep(self, kernels: Path, known: bytes) -> None:
        """Run every bucket once, which compiles what it needs, and keep what is new."""
        for bucket in self.buckets:
            self.enqueue(bucket)
        self.device.synchronize()
        runtime_cache = self._compiled
        compiled = as_bytes(made("a copy of its kernels", self._log, runtime_cache.serialize))
        if compiled != known:
            keep_kernels(kernels, compiled)

    def _make_context(
        self, loaded: LoadedEngine, runtime_config: Any, profiles: list[tuple[int, int]], bucket: int
    ) -> Any:
        """A context with its profile and shapes, and as yet no memory."""
        cuda_engine = loaded.engine
        context = made(
            "an execution context", self._log, cuda_engine.create_execution_context, runtime_config
        )
        profile = _profile_of(profiles, bucket)
        self._must(context.set_optimization_profile_async(profile, self.device.stream), f"profile {profile}")
        for tensor in self.spec.inputs:
            shape = bucket, *tensor.shape
            self._must(context.set_input_shape(tensor.name, shape), f"the shape {shape} of {tensor.name}")
        return context

    def _give_memory(self) -> None:
        """The largest scratch of the contexts, and the inputs' and output's memory, for as long as it is loaded."""
        contexts = self._contexts.values()
        self._log.errors.clear()
        scratch = max(context.update_device_memory_size_for_shapes() for context in contexts)
        self._must(
            not self._log.errors, "to say how much scratch memory it needs"
        )  # by a 0, which may also be true
        self._require_room(scratch)
        self._scratch = self.device.empty((max(scratch, 1),), np.uint8)
        self.memory = allocate(self.device, self.spec, self.buckets[-1])
        for context in contexts:
            context.set_device_memory(self.device.address(self._scratch), scratch)
            for name, place in self.memory.items():
                taken = context.set_tensor_address(name, self.device.address(place))
                self._must(taken, f"the address of {name}")

    def _require_room(self, scratch: int) -> None:
        """Say which batch would fit, where this one does not."""
        rows = self.buckets[-1]
        numbers = sum(math.prod(tensor.shape) for tensor in (*self.spec.inputs, self.spec.output))
        needed, free = scratch + 4 * rows * numbers, self.device.free()
        if needed > free:
            fits = rows * free // needed
            raise BackendError(
                f"batches of {rows} need {needed / 2**20:.0f} MiB of the GPU's memory, and {free / 2**20:.0f} MiB are "
                + (f"left: load it with max_batch {fits}" if fits else "left: free some, or use a larger GPU")
            )

    def enqueue(self, bucket: int) -> None:
        """Start to predict for a bucket's rows."""
        require_open(bool(self._contexts))
        context = self._contexts[bucket]
        with self.device.here():
            self._must(context.execute_async_v3(self.device.stream), f"a batch of {bucket}")

    def _must(self, succeeded: bool, what: str) -> None:
        """TensorRT says no by False, and why in its log."""
        if not succeeded:
            raise BackendError(f"TensorRT refused {what}: {self._log.reason('it does not say why')}")

    def close(self) -> None:
        """Free the engine and its memory, once what is under way has ended."""
        if self._contexts:
            with suppress(BackendError):
                self.device.synchronize()
        with self.device.here():  # TensorRT frees on the device that is the thread's
            self._contexts, self._compiled, self._scratch, self.memory = {}, None, None, {}
        self.device.release()


def _buckets(profiles: list[tuple[int, int]], max_batch: int) -> tuple[int, ...]:
    """The sizes that are run for batches up to max_batch."""
    ordered = sorted(
        {size for low, high in profiles for size in bucket_sizes(low, max(low, min(high, max_batch)))}
    )
    return tuple(ordered[: bisect_left(ordered, max_batch) + 1])


def _profile_of(profiles: list[tuple[int, int]], bucket: int) -> int:
    """The profile that takes a bucket: of several the narrowest."""
    fitting = [(high - low, index) for index, (low, high) in enumerate(profiles) if low <= bucket <= high]
    return min(fitting)[1]


def _profiles(cuda_engine: Any) -> list[tuple[int, int]]:
    """The smallest and largest batch of each optimisation profile."""
    shapes = [
        cuda_engine.get_tensor_profile_shape("x", index)
        for index in range(cuda_engine.num_optimization_profiles)
    ]
    return [(int(smallest[0]), int(largest[0])) for smallest, _, largest in shapes]


def _require_interface(loaded: LoadedEngine, spec: ModelSpec) -> None:
    """The engine must have the inputs and the output of the contract, in the shapes of the spec."""
    trt, cuda_engine = loaded.trt, loaded.engine
    types = {"float32": trt.DataType.FLOAT, "int64": trt.DataType.INT64}
    wanted = {
        tensor.name: (
            trt.TensorIOMode.OUTPUT if tensor == spec.output else trt.TensorIOMode.INPUT,
            types[tensor.dtype],
            tensor.shape,
        )
        for tensor in (*spec.inputs, spec.output)
    }
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
            f"{loaded.plan.name} does not fit its ModelSpec: it has {show(str(got))}, and {wanted} is needed: build "
            "it again with ddpm-export"
        )
