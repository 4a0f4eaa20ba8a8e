"""OpenVINO on the CPU: a compilation of its own for each of a few sizes of batch, over memory of ours."""

import re
from itertools import pairwise
from typing import Any, Final, Self

import msgspec

from ddpm_deploy.dependencies import require_openvino
from ddpm_deploy.errors import ArtefactError, BackendError, SettingError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.backends import LoadSettings
from ddpm_deploy.runtime.forks import keep_in_forks
from ddpm_deploy.runtime.network import HostNetwork, default_max_batch, require_interface
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.tolerances import PARITY
from ddpm_deploy.words import RunPrecision

_CPU: Final = "CPU"
_PRECISIONS: Final[dict[RunPrecision, str]] = {"fp32": "f32", "bf16": "bf16"}  # as OpenVINO calls them
_TYPES: Final = {"f32": "float32", "i64": "int64"}


class OpenvinoNetwork(HostNetwork):
    """An exported network in OpenVINO. Follows `protocols.Network`.

    model: an .onnx file. precision: to compute in; OpenVINO itself would take bfloat16 wherever the processor has it.
    threads: CPU threads to use (None: `cpu_threads`). max_batch: rows (None: `default_max_batch`).

    A network that was compiled for one size of batch is faster than one for any, and its float32 bits were found to
    depend on neither the size nor the threads. It takes some time and, for its weights in an order of its own, memory.
    So there are few (`batch_sizes`), each made when it is first needed, and a batch is cut into those.

    Raises ArtefactError, SpecError or DependencyError where it cannot be loaded, SettingError where the processor has
    no bfloat16, BackendError where OpenVINO fails at it.
    """

    def __init__(
        self,
        model: ModelFile,
        *,
        precision: RunPrecision = "fp32",
        threads: int | None = None,
        max_batch: int | None = None,
    ) -> None:
        super().__init__(_spec_at(model.spec, precision), max_batch)
        self._openvino: Any = require_openvino()
        self._core: Any = self._openvino.Core()
        if precision == "bf16":
            _require_bf16(self._core, model)
        self._precision = _PRECISIONS[precision]
        self._settings = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "INFERENCE_NUM_THREADS": threads or cpu_threads(),
            "NUM_STREAMS": 1,
            # Else each process would hold its threads to the first cores, also those that another one is held to.
            "ENABLE_CPU_PINNING": False,
            "CACHE_DIR": "",
        }
        self._sizes = batch_sizes(self.spec, self.max_batch)
        self._graph: Any = _read(model)
        self._compiled: dict[int, Any] = {}
        self._requests: dict[tuple[int, int], Any] = {}  # by the rows that they are for, first and end
        keep_in_forks(self._core, self._graph)

    @classmethod
    def open(cls, model: ModelFile, settings: LoadSettings) -> Self:
        """Load an .onnx file."""
        if settings.gpu is not None:
            raise SettingError(
                f"OpenVINO runs here on the CPU alone: leave device out, or run {model.name} by onnxruntime or tensorrt"
            )
        return cls(
            model,
            precision=settings.precision or "fp32",
            threads=settings.threads,
            max_batch=settings.max_batch,
        )

    def predict(self, batch: int) -> None:
        """Predict for the leading rows."""
        try:
            for rows in pairwise(cuts(batch, self._sizes)):
                (self._requests.get(rows) or self._request(*rows)).infer(share_outputs=True)
        except Exception as error:
            raise BackendError(
                f"OpenVINO failed on a batch of {batch}: {_reason(error)} (a smaller batch needs less memory)"
            ) from error

    def _request(self, first: int, end: int) -> Any:
        """What runs some rows, bound to their part of the memory."""
        size = end - first
        if size not in self._compiled:
            self._compiled[size] = self._compile(size)
        request = self._compiled[size].create_infer_request()
        for name, memory in self.memory.items():
            request.set_tensor(name, self._openvino.Tensor(memory[first:end], shared_memory=True))
        keep_in_forks(request)
        self._requests[first, end] = request
        return request

    def _compile(self, size: int) -> Any:
        self._graph.reshape({tensor.name: [size, *tensor.shape] for tensor in self.spec.inputs})
        compiled = self._core.compile_model(self._graph, _CPU, self._settings)
        keep_in_forks(compiled)
        got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if got != self._precision:  # it takes what it has, and says nothing
            raise BackendError(f"OpenVINO computes in {got} here, and not in {self._precision}")
        return compiled

    def close(self) -> None:
        """Free the network and the memory."""
        super().close()
        self._requests, self._compiled, self._graph, self._core = {}, {}, None, None
        self.memory = {}


def batch_sizes(spec: ModelSpec, max_batch: int) -> list[int]:
    """The sizes of batch to compile for: powers of four up to a quarter of the largest batch that a CPU gains from.

    Past that a larger size gained at most 5 % more: digits are at their best by 16, 32×32 images by 4, larger ones
    alone.
    """
    most = max(1, min(max_batch, default_max_batch(spec) // 4))
    return [4**power for power in range(most.bit_length()) if 4**power <= most]


def cuts(batch: int, sizes: list[int]) -> list[int]:
    """Where a batch is cut into sizes that ascend from 1, the largest first: 21 is 0, 16, 20, 21."""
    places = [0]
    for size in reversed(sizes):
        places += range(places[-1] + size, batch + 1, size)
    return places


def _spec_at(spec: ModelSpec, precision: RunPrecision) -> ModelSpec:
    """What a model says of itself, in the coarser of its own precision and the one it runs in."""
    coarser = max(spec.precision, precision, key=list(PARITY).index)
    return msgspec.structs.replace(spec, precision=coarser, same_bits=None)


def _require_bf16(core: Any, model: ModelFile) -> None:
    if "BF16" not in core.get_property(_CPU, "OPTIMIZATION_CAPABILITIES"):
        raise SettingError(
            f"this processor has no bfloat16 arithmetic, which OpenVINO would only imitate, more slowly than float32: "
            f"run {model.name} with precision fp32"
        )


def _read(model: ModelFile) -> Any:
    """The graph of a model, as OpenVINO has it, with the interface of the contract."""
    try:
        from openvino.frontend import FrontEndManager

        # By its name: asked for any, OpenVINO would try its readers of other formats on a file that is broken.
        reader = FrontEndManager().load_by_framework("onnx")
        graph = reader.convert(reader.load(str(model.path)))
    except Exception as error:
        raise ArtefactError(f"{model.name}: OpenVINO cannot load it: {_reason(error)}") from error
    sides = [
        [
            (_name(port), _TYPES.get(kind := port.element_type.get_type_name(), kind), _shape(port))
            for port in side
        ]
        for side in (graph.inputs, graph.outputs)
    ]
    require_interface(model, *sides)
    return graph


# Lines of OpenVINO's that say where in its source it failed, and not why.
_WHERE: Final = re.compile(r"Exception from |Check '|FrontEnd API failed|Loading input model")
_LACKING: Final = re.compile(r"No conversion rule found for operations: (.*)")


def _reason(error: Exception) -> str:
    """Why OpenVINO failed, on one line."""
    if lacking := _LACKING.search(str(error)):
        return f"it has no operator {show(lacking[1])}"
    lines = [line for line in str(error).splitlines() if line.strip() and not _WHERE.match(line)]
    return first_line(Exception("\n".join(lines)) if lines else error)


def _name(port: Any) -> str:
    return ", ".join(sorted(port.names))


def _shape(port: Any) -> list[int | None]:
    """The shape of an input or output, with None for what is not fixed."""
    if port.partial_shape.rank.is_dynamic:
        return []
    return [None if size.is_dynamic else size.get_length() for size in port.partial_shape]
