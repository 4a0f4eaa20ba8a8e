"""The host in the place of a GPU: its memory, its stream, and step.cu itself, compiled as C++.

It keeps the rules that a GPU would enforce by being wrong: what is started happens when it is waited for, not before;
memory that was never written holds NaN; nothing is copied from the host while work is captured.
"""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from ddpm_deploy.runtime.device.cuda import CudaStepper, Kernel
from ddpm_deploy.runtime.device.kernel import THREADS
from ddpm_deploy.runtime.network import HostNetwork, allocate
from ddpm_deploy.runtime.protocols import Network

STAND_IN = Path(__file__).parent / "stand_in"
# As OPTIONS of the kernel: no contraction. Its `step` is not the one of the C library.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wl,-Bsymbolic,-z,now")
_BUILT = Path(tempfile.gettempdir()) / "ddpm-deploy-kernels"


def build(source: str, main: str = "main.cpp") -> ctypes.PyDLL:
    """step.cu over the stand-in for CUDA, or a source within another main, as a library; built once for each source."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    parts = [main, source, *(path.read_text() for path in sorted(STAND_IN.iterdir()))]
    folder = _BUILT / hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    library = folder / "step.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.cu").write_text(source)
        temporary = folder / f"{id(parts)}.so"
        include = f'-DSOURCE="{folder / "step.cu"}"'
        subprocess.run([compiler, *FLAGS, include, "-o", temporary, STAND_IN / main], check=True)
        temporary.replace(library)
    return ctypes.PyDLL(str(library))  # one thread at a time: its fibers are not the threads'


class HostDevice:
    """Follows `device.cuda.Cuda`. seed: of the order in which threads run."""

    name = "host"
    is_host = False
    lag = 1
    stream = 7
    index = 0

    def __init__(self, seed: int = 0) -> None:
        self._seeds = np.random.default_rng(seed)
        self._pending: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None
        self.calls: list[str] = []
        self.left = 1 << 40

    def here(self) -> AbstractContextManager[None]:
        return nullcontext()

    def start(self, work: Callable[[], None]) -> None:
        """Work on the stream: done when it is waited for, or recorded."""
        (self._pending if self._recording is None else self._recording).append(work)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        assert self._recording is None
        self.calls.append("empty")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.full(size, 0xFF, np.uint8).view(dtype).reshape(shape)  # NaN, or -1

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        memory = self.empty(shape, dtype)
        self.start(lambda: memory.fill(0))
        return memory

    def address(self, memory: NDArray[Any]) -> int:
        return memory.ctypes.data

    def upload(self, host: NDArray[Any], memory: NDArray[Any]) -> None:
        assert self._recording is None
        assert (host.shape, host.dtype) == (memory.shape, memory.dtype)
        assert host.flags.c_contiguous
        self.calls.append("upload")
        staged = host.copy()
        self.start(lambda: np.copyto(memory, staged))

    def copy(self, source: NDArray[Any], target: NDArray[Any]) -> None:
        assert self._recording is None
        assert (source.shape, source.dtype) == (target.shape, target.dtype)
        assert source.flags.c_contiguous
        assert target.flags.c_contiguous
        self.calls.append("copy")
        self.start(lambda: np.copyto(target, source))

    def fetch(self, memory: NDArray[Any]) -> NDArray[Any]:
        assert self._recording is None
        assert memory.flags.c_contiguous
        self.calls.append("fetch")
        self._run_pending()
        return memory.copy()

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        self.calls.append("pinned")
        return self.empty(shape, dtype)

    def copy_out(self, copies: Any) -> Callable[[], None]:
        assert self._recording is None
        assert all(len({(a.shape, a.dtype) for a in arrays}) == 1 for arrays in copies)
        self.calls.append("copy_out")
        done: list[bool] = []

        def keep() -> None:
            for memory, kept, _ in copies:
                kept[:] = memory
            done.append(True)

        for *_, host in copies:
            host.view(np.uint8)[:] = 0xFF  # until it is waited for
        self.start(keep)

        def wait() -> None:
            """The side stream is as late as it may be, and the stream as far ahead."""
            self.calls.append("wait")
            self._run_pending()
            assert done
            for _, kept, host in copies:
                host[:] = kept

        return wait

    def mark(self) -> Callable[[], None]:
        assert self._recording is None
        self.calls.append("mark")
        passed: list[bool] = []
        self.start(lambda: passed.append(True))

        def wait() -> None:
            while not passed:
                self._pending.pop(0)()

        return wait

    def free(self) -> int:
        return self.left

    def synchronize(self) -> None:
        assert self._recording is None
        self.calls.append("synchronize")
        self._run_pending()

    def _run_pending(self) -> None:
        while self._pending:
            self._pending.pop(0)()

    def release(self) -> None:
        self.calls.append("release")

    def compile(self, source: str, name: str) -> Kernel:
        library = build(source)
        assert name == "step"

        def launch(grid: tuple[int, int], arguments: tuple[Any, ...]) -> None:
            assert all(isinstance(a, int | np.ndarray) for a in arguments)
            converted = [
                ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments
            ]
            self.calls.append("launch")
            self.start(lambda: library.launch(*grid, THREADS, int(self._seeds.integers(2**31)), *converted))

        return launch

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        assert self._recording is None
        self.calls.append("capture")
        self.synchronize()
        self._recording = recorded = []
        work()
        self._recording = None

        def replay() -> None:
            self.calls.append("replay")
            for piece in recorded:
                self.start(piece)

        return replay

    def stepper(self, network: Network, rows: int) -> CudaStepper:
        return CudaStepper(network, self, rows)  # type: ignore[arg-type]


class DeviceNetwork:
    """A network of the tests' on the host, in the place of one on a GPU."""

    capturable = True

    def __init__(self, network: HostNetwork, device: HostDevice) -> None:
        self.spec, self.device, self.max_batch = network.spec, device, network.max_batch
        self.buckets = network.buckets
        self.network = network
        self.memory = allocate(device, self.spec, self.buckets[-1])

    def enqueue(self, bucket: int) -> None:
        self.device.start(lambda: self._run(bucket))

    def _run(self, batch: int) -> None:
        mine, theirs = self.memory, self.network.memory
        for tensor in self.spec.inputs:
            theirs[tensor.name][:batch] = mine[tensor.name][:batch]
        self.network.enqueue(batch)
        mine["prediction"][:batch] = theirs["prediction"][:batch]

    def close(self) -> None:
        """Nothing to free."""
