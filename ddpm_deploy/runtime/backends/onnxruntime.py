"""ONNX Runtime, on the CPU or on a GPU, through memory of ours that is bound once for each batch size."""

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from typing import Any, Final, Self

from ddpm_deploy.dependencies import onnxruntime_has_cuda, require_onnxruntime
from ddpm_deploy.engine.bindings import require_gpu
from ddpm_deploy.errors import ArtefactError, BackendError, DependencyError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.machine import cpu_threads, memory_left, memory_used, trim_memory
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.backends import LoadSettings
from ddpm_deploy.runtime.backends.norms import without_group_norm
from ddpm_deploy.runtime.backends.split import Race, Split, worth_splitting
from ddpm_deploy.runtime.device.cuda import Cuda
from ddpm_deploy.runtime.device.host import Host
from ddpm_deploy.runtime.forks import keep_in_forks
from ddpm_deploy.runtime.network import (
    allocate,
    bucket_sizes,
    default_max_batch,
    require_interface,
    require_open,
)
from ddpm_deploy.runtime.protocols import Device
from ddpm_deploy.spec import ModelSpec

logger = logging.getLogger(__name__)

_CPU: Final = ["CPUExecutionProvider"]
_CUDA: Final = "CUDAExecutionProvider"
_PRODUCTS: Final = ("Conv", "Gemm", "MatMul", "Attention")  # in the names of what a GPU is there for


class OrtNetwork:
    """An exported network in ONNX Runtime. Follows `protocols.Network`.

    model: an .onnx file. device: where its memory is. threads: CPU threads to use (None: `cpu_threads`). max_batch:
    rows (None: `default_max_batch`). provider: of ONNX Runtime (None: that of the device).

    Where export found that bits depend on neither the batch nor the threads, a batch that has rows enough for them runs
    in parts, a thread each (`split`), if that is the faster: its first calls tell, each way in turn.

    On a GPU its buckets are powers of two, each of which is run once when it is loaded, as cuDNN chooses its algorithms
    for a size when that is first run.

    Raises ArtefactError, SpecError or DependencyError where it cannot be loaded, BackendError where ONNX Runtime fails
    at it, or the provider does not work here: ONNX Runtime would run on the CPU instead, and say nothing.
    """

    capturable = False  # it waits and allocates as it likes

    def __init__(
        self,
        model: ModelFile,
        device: Device | None = None,
        *,
        threads: int | None = None,
        max_batch: int | None = None,
        provider: str | None = None,
    ) -> None:
        self.spec, self.device = model.spec, device or Host()
        self.max_batch = max_batch or default_max_batch(self.spec)
        every, some = range(1, self.max_batch + 1), bucket_sizes(1, self.max_batch)
        self.buckets: Sequence[int] = every if self.device.is_host else some
        on_cpu = provider in _CPU or (provider is None and self.device.is_host)
        providers = _CPU if on_cpu else [(_CUDA, _cuda_options(self.spec, self.device))]
        if not on_cpu:
            _require_cuda()
        self._model, self._threads = model, threads or cpu_threads()
        self._loaded = _state(model)
        session = _open(model, providers, self._threads)
        if not on_cpu:
            if _CUDA not in session.get_providers():
                raise _unusable()
            require_products_on_gpu(session, model.name)
        self.memory = allocate(self.device, self.spec, self.max_batch)
        self.place = ("cpu", 0) if on_cpu else ("cuda", getattr(self.device, "index", 0))
        self._whole: _Bound | None = _Bound(session, self)
        # Only where it changes nothing of what users get.
        self._may_split = on_cpu and self.device.is_host and self.spec.same_bits is True
        self._split: Split | None = None
        self._race: Race | None = None
        if not self.device.is_host:
            self._warm_up()

    @classmethod
    def open(cls, model: ModelFile, settings: LoadSettings) -> Self:
        """Load an .onnx file."""
        device = None
        if settings.gpu is not None:
            require_gpu("leave device out to run on the CPU", settings.gpu)
            device = Cuda(settings.gpu)
        return cls(model, device, threads=settings.threads, max_batch=settings.max_batch)

    def _warm_up(self) -> None:
        for bucket in reversed(self.buckets):  # the largest first: the others fit into its memory
            self.enqueue(bucket)
        self.device.synchronize()

    def enqueue(self, bucket: int) -> None:
        """Start to predict for the leading rows."""
        require_open(bool(self.memory))
        self.device.start(lambda: self._run(bucket))

    def _run(self, batch: int) -> None:
        try:
            if self._may_split and worth_splitting(batch, self._threads):
                self._run_split(batch)
            else:
                self._run_whole(batch)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime failed on a batch of {batch}: {first_line(error)} (a smaller batch needs less memory)"
            ) from error

    def _run_whole(self, batch: int) -> None:
        """With all threads; where another file is in the model's place by now, with the one thread that there is."""
        if self._whole is None and _state(self._model) == self._loaded:
            self._whole = _Bound(_open(self._model, _CPU, self._threads), self)
        if self._whole is not None:
            self._whole.run(0, batch)
        elif self._split is not None:
            self._split.run_alone(batch)

    def _run_split(self, batch: int) -> None:
        """In parts; or whole where that is faster, as the first calls of a batch tell."""
        if self._split is None:
            self._run_whole(batch)
            self._open_split(batch)
        elif self._race is None:
            self._split.run(batch)
        elif self._race.batch != batch:
            self._run_whole(batch)
        elif (faster := self._race.run()) is not None:
            self._keep(split=faster)

    def _open_split(self, batch: int) -> None:
        """Open a session with one thread, and let it and the other take turns.

        Not where another file is in the model's place by now, nor where memory is short: it takes no more than what
        this process has so far.
        """
        self._may_split = _state(self._model) == self._loaded and memory_left() > memory_used()
        if not self._may_split:
            return
        try:
            session = _open(self._model, _CPU, 1)
        except ArtefactError as error:  # the batch was run, and the next ones can be without it
            logger.debug("batches are not split: %s", error)
            self._may_split = False
            return
        self._split = Split([_Bound(session, self).run for _ in range(self._threads)])
        self._race = Race(batch, self._split, self._run_whole)

    def _keep(self, *, split: bool) -> None:
        """Free the session that is the slower, once a race has told."""
        self._race, self._may_split = None, split
        if split:
            self._whole = None  # opened again for a batch that is not split
        elif self._split is not None:
            self._split.close()
            self._split = None
        trim_memory()

    def close(self) -> None:
        """Free the sessions and the memory, once what is under way has ended."""
        if self.memory:
            with suppress(BackendError):
                self.device.synchronize()
        self._keep(split=False)
        self._whole, self.memory = None, {}
        self.device.release()


class _Bound:
    """A session, and the rows of a network's memory that it is bound to."""

    def __init__(self, session: Any, network: OrtNetwork) -> None:
        self._session = session
        self._spec, self._device, self._memory = network.spec, network.device, network.memory
        self._place = network.place
        self._binding = session.io_binding()
        self._rows = 0, 0
        keep_in_forks(session, self._binding)

    def run(self, first: int, end: int) -> None:
        """Predict for rows."""
        if (first, end) != self._rows:
            self._bind(first, end)
        # It waits for the GPU at the end. Told not to, it keeps pinned memory of every run until the session is freed,
        # and then, on an H200, it ended the process: CUDA lets nobody free pinned memory in a callback.
        self._session.run_with_iobinding(self._binding)

    def _bind(self, first: int, end: int) -> None:
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for tensor in (*self._spec.inputs, self._spec.output):
            bind = self._binding.bind_output if tensor == self._spec.output else self._binding.bind_input
            rows = self._memory[tensor.name][first:end]
            shape = [end - first, *tensor.shape]
            bind(tensor.name, *self._place, rows.dtype.type, shape, self._device.address(rows))
        self._rows = first, end


def _state(model: ModelFile) -> tuple[int, int, int] | None:
    """What tells whether another file was put in a model's place since; None where there is none."""
    with suppress(OSError):
        status = model.path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _require_cuda() -> None:
    if not onnxruntime_has_cuda():
        raise _unusable()
    onnxruntime = require_onnxruntime()
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        raise DependencyError(
            f"onnxruntime-gpu {onnxruntime.__version__} does not say what it runs on the CPU, as 1.24 and later do: "
            "update it (ddpm-deploy doctor says which build this driver runs)"
        )
    said = io.StringIO()
    with redirect_stdout(said):  # which is for results
        onnxruntime.preload_dlls()  # CUDA's libraries and cuDNN, out of NVIDIA's packages
    for line in said.getvalue().splitlines():
        logger.info("ONNX Runtime: %s", line)


def _unusable() -> BackendError:
    return BackendError(
        f"ONNX Runtime cannot use its {_CUDA} here, and would run on the CPU (see ddpm-deploy doctor)"
    )


def require_products_on_gpu(session: Any, name: str) -> None:
    """Raise BackendError where a session placed a convolution or matrix product on the CPU, by its own report.

    Shape arithmetic may be there: a normalisation that the provider has no kernel for is taken apart, and the sizes
    that it computes with are the CPU's. session: made with `session.record_ep_graph_assignment_info`. name: of the
    model.
    """
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes() if part.ep_name in _CPU else ():
            if any(product in node.op_type for product in _PRODUCTS):
                raise BackendError(
                    f"{name}: ONNX Runtime would run {show(node.op_type)} {show(node.name)} on the CPU, not on the "
                    "GPU: export the model again with ddpm-export, in fp32 or fp16"
                )


def _cuda_options(spec: ModelSpec, device: Any) -> dict[str, str]:
    """Our stream, the precision that was asked for (TF32 is on by default there), and the same algorithms each time."""
    return {
        "device_id": str(device.index),
        "user_compute_stream": str(device.stream),
        "use_tf32": "1" if spec.precision == "tf32" else "0",
        "cudnn_conv_algo_search": "HEURISTIC",
    }


def _open(model: ModelFile, providers: list[Any], threads: int) -> Any:
    """A session that has the interface of the contract."""
    onnxruntime = require_onnxruntime()
    hint = "" if providers == _CPU else " (ddpm-deploy doctor says whether it works on this GPU)"
    if not hint and model.spec.precision == "bf16":
        hint = " (it has no bfloat16 on a CPU: this file is for building an engine)"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it logs, it also raises
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads spin while a network runs, and leave the cores to others between two runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if providers != _CPU:  # what of it runs there instead is looked at
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        # Where the provider fails it would print that, and go on with the CPU.
        session = onnxruntime.InferenceSession(
            _given(model, providers), options, providers=providers, enable_fallback=0
        )
    except Exception as error:
        raise ArtefactError(
            f"{model.name}: ONNX Runtime cannot load it: {first_line(error)}{hint}"
        ) from error
    trim_memory()
    _require_interface(session, model)
    return session


def _given(model: ModelFile, providers: list[Any]) -> str | bytes:
    """What a session is made of: the file, or a copy of it with normalisations that are fast on a CPU."""
    faster = without_group_norm(model.onnx) if providers == _CPU and model.onnx else None
    return faster or str(model.path)


def _require_interface(session: Any, model: ModelFile) -> None:
    """The graph must have the inputs and the output that its spec says."""
    sides = [
        [
            (argument.name, _TYPES.get(argument.type, argument.type), _sizes(argument.shape or ()))
            for argument in side
        ]
        for side in (session.get_inputs(), session.get_outputs())
    ]
    require_interface(model, *sides)


_TYPES: Final = {"tensor(float)": "float32", "tensor(int64)": "int64"}


def _sizes(shape: Sequence[Any]) -> list[int | None]:
    """A shape, with None for what is not fixed."""
    return [size if isinstance(size, int) else None for size in shape]
