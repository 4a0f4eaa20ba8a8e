"""ncnn, on the CPU: float32 by Winograd's convolutions, which take fewer multiplications than direct ones."""

import os
import platform
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from types import ModuleType
from typing import Any, Final, Self

import numpy as np

from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import BackendError, SettingError
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import ModelFile
from ddpm_deploy.runtime.backends import LoadSettings
from ddpm_deploy.runtime.forks import keep_in_forks
from ddpm_deploy.runtime.network import HostNetwork

# What a Net may do. Winograd's F(2,3) alone: F(4,3) and F(6,3), which ncnn prefers, err ten times as much on trained
# networks at small t (docs/cpu.md). Numbers stay float32 wherever they are kept.
_OPTIONS: Final = {
    "use_winograd43_convolution": False,
    "use_winograd63_convolution": False,
    "use_fp16_packed": False,
    "use_fp16_storage": False,
    "use_fp16_arithmetic": False,
    "use_bf16_packed": False,
    "use_bf16_storage": False,
    "use_int8_inference": False,
    "use_vulkan_compute": False,
}


class NcnnNetwork(HostNetwork):
    """A .ncnn file in ncnn, which takes one image a call. Follows `protocols.Network`.

    threads: CPU threads to use (None: `cpu_threads`). max_batch: rows (None: `default_max_batch`).

    As many images as there are threads are computed at the same time, one a thread, by a Net of one thread; those that
    are left over one after another, by a Net of all threads. Both give the same bits, and each is loaded when it is
    first needed, as it holds the weights. Where another file is in the model's place by then, the one that there is
    does it all.

    Raises ArtefactError where the file is not sound, DependencyError or BackendError where ncnn cannot be used here.
    """

    def __init__(self, model: ModelFile, *, threads: int | None = None, max_batch: int | None = None) -> None:
        assert model.ncnn is not None
        model.ncnn.require_sound(model.spec)
        self._ncnn = require_ncnn()
        super().__init__(model.spec, max_batch)
        self._model, self._file = model, model.ncnn
        self._threads = threads or cpu_threads()
        self._nets: dict[int, Any] = {}  # by their number of threads
        self._crew = ThreadPoolExecutor(self._threads, "crew")

    @classmethod
    def open(cls, model: ModelFile, settings: LoadSettings) -> Self:
        """Load a .ncnn file."""
        if settings.device not in (None, "cpu"):
            raise SettingError(
                f"{model.name} runs on the CPU alone: leave device out, or say cpu, not {settings.device}"
            )
        return cls(model, threads=settings.threads, max_batch=settings.max_batch)

    def predict(self, batch: int) -> None:
        """Predict for the leading rows."""
        together = batch // self._threads * self._threads if self._threads > 1 else 0
        one = self._net(1) if together else None
        if one is None:
            together = 0
        else:
            rows = iter(range(together))  # of which each thread takes the next
            _finish([self._crew.submit(self._predict_rows, one, rows) for _ in range(self._threads)])
        if together < batch:
            all_ = self._net(self._threads) or self._nets[1]
            _finish([_leader().submit(self._predict_rows, all_, iter(range(together, batch)))])

    def _predict_rows(self, net: Any, rows: Any) -> None:
        for row in rows:
            self._predict_row(net, row)

    def _predict_row(self, net: Any, row: int) -> None:
        with net.create_extractor() as extractor:
            for tensor in self.spec.inputs:
                numbers = self.memory[tensor.name][row]
                if tensor.dtype == "int64":
                    numbers = numbers.reshape(1).astype(np.int32)
                # A Mat of an array does not keep it, and is not aligned as ncnn's own: a copy is.
                extractor.input(tensor.name, self._ncnn.Mat(numbers).clone())
            prediction = self._ncnn.Mat()
            code = extractor.extract(self.spec.output.name, prediction)
            if code:
                raise BackendError(f"ncnn failed ({code}): it may be out of memory")
            np.copyto(self.memory[self.spec.output.name][row], np.asarray(prediction))

    def _net(self, threads: int) -> Any:
        """The Net of so many threads; None where another file is in the model's place, and there is another Net."""
        if threads not in self._nets:
            net = _leader().submit(self._load, threads).result()
            if net is None:
                return None
            self._nets[threads] = net
        return self._nets[threads]

    def _load(self, threads: int) -> Any:
        net = self._ncnn.Net()
        keep_in_forks(net)
        net.opt.num_threads = threads
        for name, value in _OPTIONS.items():
            setattr(net.opt, name, value)
        failed = net.load_param_mem(self._file.param) or net.load_model(str(self._model.path))
        if not self._file.in_place:  # its weights may be another model's
            if self._nets:
                return None
            raise BackendError(
                f"another file is in the place of {self._model.name} since it was opened: load the model again"
            )
        if failed:
            raise BackendError(f"ncnn cannot load {self._model.name}: it may be out of memory")
        return net

    def close(self) -> None:
        """Free the Nets, once what is under way has ended."""
        super().close()
        self._crew.shutdown()
        self._nets.clear()
        self.memory = {}


def _finish(started: "list[Future[None]]") -> None:
    """Wait for all, whatever happens to one of them or here: none goes on to write where the next call does."""
    try:
        for future in started:
            future.result()
    finally:
        wait(started)


@cache
def _leader() -> ThreadPoolExecutor:
    """The one thread of this process that calls ncnn with several threads.

    Those belong to the thread that called for them. A second such thread would have as many again, and OpenMP, which
    then sees more threads than processors, lets all of them sleep between any two loops: half the speed. And those of
    a thread that was forked are waited for, and are not there: so it is none of the caller's.
    """
    return ThreadPoolExecutor(1, "leader")


os.register_at_fork(after_in_child=_leader.cache_clear)


def require_ncnn() -> ModuleType:
    """Import ncnn, or raise DependencyError; BackendError where the processor lacks what it is fast by."""
    ncnn = require("ncnn", "ncnn")
    if platform.machine() in ("x86_64", "AMD64") and not ncnn.cpu_support_x86_avx2():
        raise BackendError(
            "this processor has no AVX2, which ncnn is fast by: run the .onnx of this model in ONNX Runtime"
        )
    return ncnn
